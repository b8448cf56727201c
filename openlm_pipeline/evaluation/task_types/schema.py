"""Several questions, one answer: Winograd schemas."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from openlm_pipeline.evaluation.task_types import Options, RowFields, TaskType, Text, stripped
from openlm_pipeline.registry import TASK_TYPES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.suite import IclTask


class _Fields(RowFields):
    context_options: Annotated[list[Text], Field(min_length=2)]
    continuation: Text
    gold: Annotated[int, Field(ge=0)]


@TASK_TYPES.register("schema")
class Schema(TaskType):
    """After which of several contexts one continuation is the likeliest."""

    Fields = _Fields
    metric = "InContextLearningMultipleChoiceAccuracy"
    rule = "mean"

    @classmethod
    def options(cls, fields: _Fields, task: "IclTask") -> Options:
        return Options(tuple(fields.context_options), (stripped(fields.continuation, task),), fields.gold)

    @classmethod
    def question(cls, task: "IclTask", context: str, preceded: bool) -> str:
        """The prelimiter comes before the example delimiter, as LLM Foundry has it."""
        delimiter = task.example_delimiter if preceded else ""
        return f"{task.question_prelimiter}{delimiter}{context}{task.continuation_delimiter}"

    @classmethod
    def contexts(cls, task: "IclTask", contexts: tuple[str, ...], preceded: bool) -> tuple[str, ...]:
        """The delimiter comes only after a preamble, and only it is stripped, not the context."""
        if not preceded:
            return tuple(f"{task.question_prelimiter}{context}" for context in contexts)
        delimiter = task.continuation_delimiter.rstrip() if task.strip_dataset else task.continuation_delimiter
        return tuple(f"{task.question_prelimiter}{task.example_delimiter}{c}{delimiter}" for c in contexts)
