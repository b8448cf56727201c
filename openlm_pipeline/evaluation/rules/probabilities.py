"""Rules over the probabilities of texts that are there."""

import math
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


@RULES.register("bits")
class Bits(Rule):
    """Bits to code a byte of the text: nothing is right or wrong."""

    judges = False

    @classmethod
    def judge(cls, task: "IclTask", item: "Item", given: Sequence["RequestScore"]) -> dict[str, Any]:
        (whole,) = given
        (text_bytes,) = item.continuation_bytes
        return {"value": -whole.sum_logprob / math.log(2) / text_bytes, "value_kind": "bits_per_byte"}


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
