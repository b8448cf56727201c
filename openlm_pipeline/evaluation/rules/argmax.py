"""Every token of the continuation is the model's first choice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openlm_pipeline.evaluation.rules import Rule
from openlm_pipeline.registry import RULES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.results import RequestScore
    from openlm_pipeline.evaluation.suite import IclTask
    from openlm_pipeline.evaluation.tasks import Item


@RULES.register("argmax")
class Argmax(Rule):
    """Every token of the right continuation is the most likely one, given the true tokens before it (LLM Foundry)."""

    @classmethod
    def judge(cls, task: "IclTask", item: "Item", given: Sequence["RequestScore"]) -> dict[str, Any]:
        return {"correct": given[item.gold].all_argmax}
