"""Texts as they are, such as those of a corpus' domain that was not trained on."""

from typing import TYPE_CHECKING

from openlm_pipeline.evaluation.task_types import Options, RowFields, TaskType, Text
from openlm_pipeline.registry import TASK_TYPES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.suite import IclTask


@TASK_TYPES.register("held_out_text")
class HeldOutText(TaskType):
    """How many bits a byte of a text costs: each token after as many of the text as fit, or after its window's first.

    A text longer than the model reads is cut into windows that do not overlap, each after the last token of the one
    before, as lm-evaluation-harness does.
    """

    class Fields(RowFields):
        text: Text

    metric = "BitsPerByte"
    rule = "bits"
    whole_texts = True

    @classmethod
    def options(cls, fields: Fields, task: "IclTask") -> Options:
        return Options(("",), (fields.text,))
