"""The option whose tokens are the likeliest on average, and beside it the rules of lm-evaluation-harness."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openlm_pipeline.evaluation.rules import Rule
from openlm_pipeline.registry import RULES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.results import RequestScore
    from openlm_pipeline.evaluation.suite import IclTask
    from openlm_pipeline.evaluation.tasks import Item


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])  # max keeps the first of equals


@RULES.register("mean")
class Mean(Rule):
    """The largest mean token log-probability wins (LLM Foundry).

    Also told: the largest total (`acc` of lm-evaluation-harness) and the largest total over the continuation's
    characters (`acc_norm`). Ties go to the first option.
    """

    @classmethod
    def judge(cls, task: "IclTask", item: "Item", given: Sequence["RequestScore"]) -> dict[str, Any]:
        mean = _first_largest([s.sum_logprob / s.num_tokens for s in given])
        total = _first_largest([s.sum_logprob for s in given])
        norm = _first_largest([s.sum_logprob / n for s, n in zip(given, item.continuation_chars)])
        return {
            "choice_mean": mean,
            "choice_sum": total,
            "choice_norm": norm,
            "correct": mean == item.gold,
            "correct_sum": total == item.gold,
            "correct_norm": norm == item.gold,
        }

    @classmethod
    def chance(cls, one_of_options: float) -> float:
        return one_of_options
