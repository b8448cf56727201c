"""One question, several answers."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from openlm_pipeline.evaluation.task_types import Options, RowFields, TaskType, Text, stripped
from openlm_pipeline.registry import TASK_TYPES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.suite import IclTask


class _Fields(RowFields):
    query: str
    choices: Annotated[list[Text], Field(min_length=2)]
    gold: Annotated[int, Field(ge=0)]


@TASK_TYPES.register("multiple_choice")
class MultipleChoice(TaskType):
    """Which of several continuations of one context is the likeliest."""

    Fields = _Fields
    metric = "InContextLearningMultipleChoiceAccuracy"
    rule = "mean"

    @classmethod
    def options(cls, fields: _Fields, task: "IclTask") -> Options:
        return Options((stripped(fields.query, task),), tuple(fields.choices), fields.gold)
