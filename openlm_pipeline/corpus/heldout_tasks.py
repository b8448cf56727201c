"""The demo's evaluation tasks, made from held-out prose, as rows in LLM Foundry's formats.

Deterministic: rows are picked by hashes of their text. Contexts stay below `MAX_CONTEXT_CHARS`, which a byte-level
BPE of 4096 ids turns into fewer than 256 tokens. A paragraph that also stands in a training document is not used.
"""

import hashlib
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from openlm_pipeline.corpus.python_text import Document

MAX_CONTEXT_CHARS = 450
TaskRow = dict[str, Any]

_LAST_WORD_ROWS = 300
_CONTINUATION_ROWS = 400
_CONTEXT_CHOICE_ROWS = 200
_ROWS_PER_DOCUMENT = 40
_CHOICES = 4
_CONTINUATION_WORDS = 10
_MIN_CONTEXT_CHARS = 60
_MIN_PROSE_LETTERS = 0.95
_CODE = re.compile(r">>>|::|==|----|\*\*|\||[{}]|\bdef |[a-z]\(.*=|import ")
_NOT_PROSE = re.compile(r"[^A-Za-z ,.;:'\"()`_-]")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"\b([A-Za-z]{4,})\.(?=\s|$)")


@dataclass(frozen=True)
class _Passage:
    """The beginning of a held-out paragraph and the words that follow it."""

    path: str
    context: str
    continuation: str


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _paragraphs(text: str) -> Iterator[str]:
    """Each paragraph with its white space made single."""
    return (" ".join(paragraph.split()) for paragraph in _PARAGRAPH_END.split(text))


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < 100 or _CODE.search(paragraph):
        return False
    return len(_NOT_PROSE.findall(paragraph)) <= (1 - _MIN_PROSE_LETTERS) * len(paragraph)


def _prose(documents: Iterable[Document], known: set[str]) -> Iterator[tuple[str, str]]:
    """(path, paragraph) of all prose paragraphs that stand nowhere else."""
    for document in documents:
        for paragraph in _paragraphs(document.text):
            if paragraph not in known and _is_prose(paragraph):
                known.add(paragraph)
                yield document.path, paragraph


def _spread(rows: Iterable[tuple[str, str, Any]], count: int) -> list[Any]:
    """At most `count` of the (path, context, row) triples, few from each path, in random but fixed order."""
    taken: dict[str, int] = defaultdict(int)
    picked = []
    for path, _, row in sorted(rows, key=lambda item: _key(*item[:2])):
        if taken[path] < _ROWS_PER_DOCUMENT and len(picked) < count:
            taken[path] += 1
            picked.append(row)
    return picked


def _last_words(prose: list[tuple[str, str]]) -> Iterator[tuple[str, str, TaskRow]]:
    """A word that ends a sentence and stands earlier in its document's prose, so that the context tells it."""
    before: dict[str, str] = defaultdict(str)
    for path, paragraph in prose:
        text = before[path] + paragraph
        for match in _SENTENCE_END.finditer(text, len(before[path])):
            context = text[: match.start()].rstrip()
            if len(context) > MAX_CONTEXT_CHARS:
                context = context[-MAX_CONTEXT_CHARS:].split(maxsplit=1)[1]
            if len(context) >= _MIN_CONTEXT_CHARS and re.search(rf"\b{match[1]}\b", context):
                yield path, context, {"context": context, "continuation": match[1]}
        before[path] = text + "\n"


def _passages(prose: list[tuple[str, str]]) -> Iterator[tuple[str, str, _Passage]]:
    """Each paragraph in pieces that fit, the last words of a piece being its continuation."""
    for path, paragraph in prose:
        for piece in textwrap.wrap(paragraph, MAX_CONTEXT_CHARS, break_long_words=False, break_on_hyphens=False):
            words = piece.split(" ")
            context = " ".join(words[:-_CONTINUATION_WORDS])
            if len(context) >= _MIN_CONTEXT_CHARS:
                yield path, context, _Passage(path, context, " ".join(words[-_CONTINUATION_WORDS:]))


def _others(passage: _Passage, pool: list[_Passage], count: int) -> list[_Passage]:
    """`count` passages of other documents, all different."""
    found: list[_Passage] = []
    start = int(_key(passage.context)[:8], 16)
    for i in range(len(pool)):
        other = pool[(start + i * 7919) % len(pool)]
        taken = {passage.path, *(f.path for f in found)}
        if other.path not in taken and other.continuation != passage.continuation:
            found.append(other)
            if len(found) == count:
                return found
    raise ValueError(f"held-out text has no {count} other documents to draw choices from")


def _continuation_row(i: int, passage: _Passage, pool: list[_Passage]) -> TaskRow:
    choices = [other.continuation for other in _others(passage, pool, _CHOICES - 1)]
    choices.insert(i % _CHOICES, passage.continuation)
    return {"query": passage.context, "choices": choices, "gold": i % _CHOICES}


def _context_choice_row(i: int, passage: _Passage, pool: list[_Passage]) -> TaskRow:
    options = [_others(passage, pool, 1)[0].context]
    options.insert(i % 2, passage.context)
    return {"context_options": options, "continuation": passage.continuation, "gold": i % 2}


def make_tasks(heldout: list[Document], train: list[Document]) -> dict[str, list[TaskRow]]:
    """Rows of each task by file name, from held-out prose documents; `train` says what a model may have seen.

    `last_word.jsonl` (language_modeling, at most 300 rows), `continuation.jsonl` (multiple_choice of 4, 400) and
    `context_choice.jsonl` (schema of 2, 200); the right answers' positions are balanced.

    Raises:
        ValueError: too few held-out documents to draw wrong choices from.
    """
    known = {p for d in train for p in _paragraphs(d.text) if len(p) >= 100}
    prose = list(_prose(heldout, known))
    pool = _spread(_passages(prose), _CONTINUATION_ROWS + _CONTEXT_CHOICE_ROWS)
    split = len(pool) * _CONTINUATION_ROWS // (_CONTINUATION_ROWS + _CONTEXT_CHOICE_ROWS)
    return {
        "last_word.jsonl": _spread(_last_words(prose), _LAST_WORD_ROWS),
        "continuation.jsonl": [_continuation_row(i, p, pool) for i, p in enumerate(pool[:split])],
        "context_choice.jsonl": [_context_choice_row(i, p, pool) for i, p in enumerate(pool[split:])],
    }
