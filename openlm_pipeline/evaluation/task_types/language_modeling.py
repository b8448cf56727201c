"""How a text continues."""

from typing import TYPE_CHECKING

from openlm_pipeline.evaluation.task_types import Options, RowFields, TaskType, Text, stripped
from openlm_pipeline.registry import TASK_TYPES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.suite import IclTask


class _Fields(RowFields):
    context: str
    continuation: Text


@TASK_TYPES.register("language_modeling")
class LanguageModeling(TaskType):
    """Whether each token of a continuation is the likeliest one."""

    Fields = _Fields
    metric = "InContextLearningLMAccuracy"
    rule = "argmax"

    @classmethod
    def options(cls, fields: _Fields, task: "IclTask") -> Options:
        return Options((stripped(fields.context, task),), (stripped(fields.continuation, task),))
