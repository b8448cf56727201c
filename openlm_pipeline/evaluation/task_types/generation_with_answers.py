"""A question that the model answers in its own words."""

from typing import TYPE_CHECKING

from openlm_pipeline.evaluation.task_types import Options, RowFields, TaskType, Text, stripped
from openlm_pipeline.registry import TASK_TYPES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.suite import IclTask


class _Fields(RowFields):
    context: str
    answer: Text
    aliases: list[Text] = []
    chain_of_thought: str = ""


@TASK_TYPES.register("generation_task_with_answers")
class GenerationWithAnswers(TaskType):
    """Whether the text that the model writes begins with one of the answers."""

    Fields = _Fields
    metric = "InContextLearningGenerationExactMatchAccuracy"
    rule = "prefix"
    settings = ("cot_delimiter", "early_stopping_criteria", "do_normalization", "generation_kwargs")
    old_names = ("question_answering",)
    old_metrics = ("InContextLearningQAAccuracy",)

    @classmethod
    def options(cls, fields: _Fields, task: "IclTask") -> Options:
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
