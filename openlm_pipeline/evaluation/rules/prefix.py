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


def _cleaned(text: str, task: "IclTask") -> str:
    return normalize_answer(text) if task.do_normalization else text.strip()


def _answered(generated: str, task: "IclTask") -> str:
    """The text up to the first stop and after the last `cot_delimiter`."""
    if task.early_stopping_criteria:
        generated = re.split("|".join(task.early_stopping_criteria), generated)[0]
    return _cleaned(generated.split(task.cot_delimiter)[-1] if task.cot_delimiter else generated, task)


def is_right(generated: str, answers: Sequence[str], task: "IclTask") -> bool:
    """Whether the text starts with one of the answers."""
    return any(_answered(generated, task).startswith(_cleaned(answer, task)) for answer in answers)


def answers_that_say_nothing(answers: Sequence[str], task: "IclTask") -> list[str]:
    """Those of which normalisation leaves nothing, so that every text begins with them."""
    return [answer for answer in answers if not _cleaned(answer, task)]


@RULES.register("prefix")
class Prefix(Rule):
    """The generated text begins with one of the answers (LLM Foundry); `exact` says whether it is one."""

    generates = True

    @classmethod
    def judge(cls, task: "IclTask", item: "Item", given: "Generated") -> dict[str, Any]:
        text = _answered(given.text, task)
        exact = bool(text) and any(text == _cleaned(answer, task) for answer in item.answers)
        return {"correct": is_right(given.text, item.answers, task), "exact": exact}
