"""The text that the model writes begins with an answer."""

import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openlm_pipeline.evaluation.rules import Rule
from openlm_pipeline.registry import RULES

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.results import Generated
    from openlm_pipeline.evaluation.suite import IclTask
    from openlm_pipeline.evaluation.tasks import Item

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space: TriviaQA's rule."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_TO_SPACES)).split())


def is_right(generated: str, answers: Sequence[str], task: "IclTask") -> bool:
    """Whether the text, up to the first stop and after the last `cot_delimiter`, starts with one of the answers."""
    if task.early_stopping_criteria:
        generated = re.split("|".join(task.early_stopping_criteria), generated)[0]
    if task.cot_delimiter:
        generated = generated.split(task.cot_delimiter)[-1]
    clean = normalize_answer if task.do_normalization else str.strip
    return any(clean(generated).startswith(clean(answer)) for answer in answers)


@RULES.register("prefix")
class Prefix(Rule):
    """The generated text begins with one of the answers (LLM Foundry)."""

    generates = True

    @classmethod
    def judge(cls, task: "IclTask", item: "Item", given: "Generated") -> dict[str, Any]:
        return {"correct": is_right(given.text, item.answers, task)}
