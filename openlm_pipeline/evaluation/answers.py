"""When a generated text is a right answer: the rule of llm-foundry 0.22's generation tasks."""

import re
import string
from collections.abc import Sequence

from openlm_pipeline.evaluation.suite import IclTask

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space: TriviaQA's rule."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_TO_SPACES)).split())


def is_right(generated: str, answers: Sequence[str], task: IclTask) -> bool:
    """Whether the text, up to the first stop and after the last `cot_delimiter`, starts with one of the answers."""
    if task.early_stopping_criteria:
        generated = re.split("|".join(task.early_stopping_criteria), generated)[0]
    if task.cot_delimiter:
        generated = generated.split(task.cot_delimiter)[-1]
    clean = normalize_answer if task.do_normalization else str.strip
    return any(clean(generated).startswith(clean(answer)) for answer in answers)
