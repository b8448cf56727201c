"""The task types of LLM Foundry: how a text continues, one question or several with one answer, free answers."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from openlm_pipeline.evaluation.task_types import Options, RowFields, TaskType, Text, stripped
from openlm_pipeline.registry import TASK_TYPES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.suite import IclTask


@TASK_TYPES.register("language_modeling")
class LanguageModeling(TaskType):
    """Whether each token of a continuation is the likeliest one."""

    class Fields(RowFields):
        context: str
        continuation: Text

    metric = "InContextLearningLMAccuracy"
    rule = "argmax"

    @classmethod
    def options(cls, fields: Fields, task: "IclTask") -> Options:
        return Options((stripped(fields.context, task),), (stripped(fields.continuation, task),))


@TASK_TYPES.register("multiple_choice")
class MultipleChoice(TaskType):
    """Which of several continuations of one context is the likeliest."""

    class Fields(RowFields):
        query: str
        choices: Annotated[list[Text], Field(min_length=2)]
        gold: Annotated[int, Field(ge=0)]

    metric = "InContextLearningMultipleChoiceAccuracy"
    rule = "mean"

    @classmethod
    def options(cls, fields: Fields, task: "IclTask") -> Options:
        return Options((stripped(fields.query, task),), tuple(fields.choices), fields.gold)


@TASK_TYPES.register("schema")
class Schema(TaskType):
    """After which of several contexts one continuation is the likeliest."""

    class Fields(RowFields):
        context_options: Annotated[list[Text], Field(min_length=2)]
        continuation: Text
        gold: Annotated[int, Field(ge=0)]

    metric = "InContextLearningMultipleChoiceAccuracy"
    rule = "mean"

    @classmethod
    def options(cls, fields: Fields, task: "IclTask") -> Options:
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


@TASK_TYPES.register("generation_task_with_answers")
class GenerationWithAnswers(TaskType):
    """Whether the text that the model writes begins with one of the answers."""

    class Fields(RowFields):
        context: str
        answer: Text
        aliases: list[Text] = []
        chain_of_thought: str = ""

    metric = "InContextLearningGenerationExactMatchAccuracy"
    rule = "prefix"
    settings = ("cot_delimiter", "early_stopping_criteria", "do_normalization", "generation_kwargs")
    old_names = ("question_answering",)
    old_metrics = ("InContextLearningQAAccuracy",)

    @classmethod
    def options(cls, fields: Fields, task: "IclTask") -> Options:
        has_thought = "chain_of_thought" in fields.model_fields_set
        thought = fields.chain_of_thought + task.cot_delimiter if has_thought else ""
        shown = stripped(fields.chain_of_thought, task) + task.cot_delimiter if has_thought else ""
        answers = tuple(dict.fromkeys((fields.answer, *fields.aliases)))
        if not all(answer.strip() for answer in answers):
            raise ValueError("an answer is blank")
        return Options(
            contexts=(stripped(fields.context, task),),
            continuations=(shown + stripped(fields.answer, task),),
            answers=answers,
            responses=tuple(thought + answer for answer in answers),
            has_chain_of_thought=has_thought,
        )
