"""The text that the model writes begins with an answer."""

from typing import TYPE_CHECKING, Any

from openlm_pipeline.evaluation.answers import is_right
from openlm_pipeline.evaluation.rules import Rule
from openlm_pipeline.registry import RULES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.results import Generated
    from openlm_pipeline.evaluation.suite import IclTask
    from openlm_pipeline.evaluation.tasks import Item


@RULES.register("prefix")
class Prefix(Rule):
    """The generated text begins with one of the answers (LLM Foundry)."""

    generates = True

    @classmethod
    def judge(cls, task: "IclTask", item: "Item", given: "Generated") -> dict[str, Any]:
        return {"correct": is_right(given.text, item.answers, task)}
