"""Nothing is right or wrong: how likely a text is."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openlm_pipeline.evaluation.rules import Rule
from openlm_pipeline.registry import RULES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.results import RequestScore
    from openlm_pipeline.evaluation.suite import IclTask
    from openlm_pipeline.evaluation.tasks import Item


@RULES.register("bits")
class Bits(Rule):
    """Bits to code a byte of the text."""

    judges = False

    @classmethod
    def judge(cls, task: "IclTask", item: "Item", given: Sequence["RequestScore"]) -> dict[str, Any]:
        (whole,) = given
        (text_bytes,) = item.continuation_bytes
        return {"value": -whole.sum_logprob / math.log(2) / text_bytes, "value_kind": "bits_per_byte"}
