"""The windows of a suite's items: of each question, and of what has some of its right answer after it.

A question or a question with its answer that is shorter than a window is a window of its own, if it has the rule's
least size; an item that has none is too short to tell. What all questions of a task begin or end with, such as
`Question: `, is no part of them.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.suite import IclTask, Suite
from openlm_pipeline.evaluation.task_files import TaskFile, TaskItem, read_task_file
from openlm_pipeline.fingerprint import Tree, fingerprint
from openlm_pipeline.lineage import SCAN_VERSION
from openlm_pipeline.lineage.windows import RULES, Hasher, Rule, Windows, codes, joined, mixed, normalised, words_of
from openlm_pipeline.storage.files import atomic_writer, read_sealed, sha256_file, write_sealed
from openlm_pipeline.storage.home import Home

_ROWS_OF_A_TEMPLATE = 10
"""With fewer rows, what they all begin with may be no template."""
_IDENTITY, _ARRAYS, _ARRAYS_SHA256 = "windows.json", "windows.npz", "arrays_sha256"
AGAIN = "`openlm contamination` makes it again"


@dataclass(frozen=True)
class SuiteWindows:
    """Items and their windows. Arrays of windows are sorted by hash; one that several items have is there for each."""

    identity: Tree
    task: np.ndarray
    """int32[items]: number of the item's task, in the order of the identity."""
    row: np.ndarray
    """int64[items]: row of the task's file."""
    item_hash: np.ndarray
    """S64[items]."""
    text: np.ndarray
    """uint32: characters of all items one after the other."""
    hashes: np.ndarray
    """uint64[windows]."""
    item: np.ndarray
    """int32[windows]: number of the item."""
    answer: np.ndarray
    """bool[windows]: it has some of the answer."""
    begin: np.ndarray
    """int64[windows]: in `text`."""
    length: np.ndarray
    """int32[windows]: in characters, or words."""
    least: np.ndarray
    """uint64, sorted: windows of the least size of texts that are compared whole."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @property
    def tasks(self) -> list[str]:
        """Their labels."""
        return list(self.identity["tasks"])

    @property
    def rule(self) -> Rule:
        return RULES[self.identity["rule"]]

    @cached_property
    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes, each once, and the first window that has each."""
        return np.unique(self.hashes, return_index=True)

    def counts(self, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Windows of each item's question, and of its answer: int64[items, 2]; of those in `which` alone."""
        cell = self.item[which].astype(np.int64) * 2 + self.answer[which]
        return np.bincount(cell, minlength=2 * len(self.row)).reshape(-1, 2)

    def in_many(self) -> np.ndarray:
        """Of each of `distinct`, whether items that differ have it: bool."""
        _, of_item = np.unique(self.item_hash, return_inverse=True)
        which = np.searchsorted(self.distinct[0], self.hashes)
        lowest, highest = np.full(len(self.distinct[0]), len(of_item)), np.full(len(self.distinct[0]), -1)
        np.minimum.at(lowest, which, of_item[self.item])
        np.maximum.at(highest, which, of_item[self.item])
        return lowest < highest

    def to_find(self) -> Windows:
        """What to look for in a stream of tokens."""
        hashes, first = self.distinct
        return Windows(self.rule, self.text, hashes, self.begin[first], self.length[first], self.least)


def suite_windows(suite: Suite, home: Home, rule: Rule) -> SuiteWindows:
    """The windows of a suite's task files as they are, kept in the home for workers and for joins.

    Raises:
        MissingInputError, DataError: a task's file is not there, or damaged.
    """
    files = {task.label: read_task_file(task, home) for task in suite.icl_tasks}
    tasks = {
        t.label: {"sha256": files[t.label].sha256, "type": t.icl_task_type, "strip": t.strip_dataset}
        for t in suite.icl_tasks
    }
    identity = {"code": SCAN_VERSION, "rule": rule.name, "tasks": tasks}
    folder = home.windows(suite.name, rule.name)
    with home.artefact(folder):
        with contextlib.suppress(MissingInputError, DataError):  # what is damaged is made again
            if read_identity(folder) == identity:
                return load_windows(folder)
        made = _made(identity, suite.icl_tasks, files, rule)
        arrays = {name: value for name, value in vars(made).items() if isinstance(value, np.ndarray)}
        (folder / _IDENTITY).unlink(missing_ok=True)
        with atomic_writer(folder / _ARRAYS) as f:
            np.savez(f, **arrays)
        write_sealed(folder / _IDENTITY, {**identity, _ARRAYS_SHA256: sha256_file(folder / _ARRAYS)})
    return made


def read_identity(folder: Path) -> dict[str, Any]:
    """What the windows in a folder are made from.

    Raises:
        MissingInputError: there are none.
        DataError: it is damaged.
    """
    identity = read_sealed(folder / _IDENTITY)
    identity.pop(_ARRAYS_SHA256, None)
    return identity


def load_windows(folder: Path) -> SuiteWindows:
    """What `suite_windows` left in a folder.

    Raises:
        MissingInputError: nothing.
        DataError: it is damaged.
    """
    path, identity = folder / _ARRAYS, read_sealed(folder / _IDENTITY)
    recorded = identity.pop(_ARRAYS_SHA256, None)
    try:
        if sha256_file(path) != recorded:
            raise DataError(f"{path} is damaged: it has another hash than {_IDENTITY} says. {AGAIN}")
        with np.load(path) as arrays:
            return SuiteWindows(identity, **arrays)
    except FileNotFoundError:
        raise MissingInputError(f"{path} does not exist. {AGAIN}") from None


def _made(identity: Tree, tasks: Sequence[IclTask], files: dict[str, TaskFile], rule: Rule) -> SuiteWindows:
    texts: list[str] = []
    sizes: list[tuple[int, int]] = []
    """Of each item's question, and of question and answer, in characters or words."""
    for task in tasks:
        rows = files[task.label].rows
        halves = [_halves(row, task) for row in rows]
        for question, (_, answer) in zip(_without_template([q for q, _ in halves], rule), halves):
            after = normalised(answer, rule)
            whole = question[: len(question) - rule.words] + after if after.strip() else question
            texts.append(whole)
            sizes.append((_size(question, rule), _size(whole, rule)))
    text = codes("".join(texts))
    firsts = np.cumsum([0, *map(len, texts)])
    places = np.flatnonzero(text == ord(" ")) if rule.words else np.zeros(0, np.int64)
    unit = np.searchsorted(places, firsts) if rule.words else firsts  # of an item's first character, or word
    item, answer, at, length = _windows(sizes, unit, rule)
    begin, end = (places[at] + 1, places[at + length]) if rule.words else (at, at + length)
    hasher, short = Hasher(), length < rule.size
    sums = hasher.sums(mixed(text))
    hashes = hasher.hashes(sums, begin, end)
    order = np.argsort(hashes, kind="stable")
    shifts = [at[short] + k for k in range(rule.size - rule.least)]
    inside = [s[s + rule.least <= (at + length)[short]] for s in shifts]
    least = np.concatenate([np.zeros(0, np.int64), *inside])
    ends = (places[least] + 1, places[least + rule.least]) if rule.words else (least, least + rule.least)
    return SuiteWindows(
        identity,
        task=np.repeat(np.arange(len(tasks), dtype=np.int32), [len(files[t.label].rows) for t in tasks]),
        row=np.concatenate([np.arange(len(files[t.label].rows)) for t in tasks]),
        item_hash=np.array([row.item_hash.encode() for t in tasks for row in files[t.label].rows], "S64"),
        text=text,
        hashes=hashes[order],
        item=item[order].astype(np.int32),
        answer=answer[order],
        begin=begin[order],
        length=length[order].astype(np.int32),
        least=np.unique(hasher.hashes(sums, *ends)),
    )


def _windows(
    sizes: Sequence[tuple[int, int]], unit: np.ndarray, rule: Rule
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Item, whether it has some of the answer, first character or word, and length of each window."""
    found: list[tuple[int, bool, int, int, int]] = []  # item, answer, first, past the last, length
    for n, (question, whole) in enumerate(sizes):
        if question >= rule.least:
            length = min(question, rule.size)
            found.append((n, False, 0, question - length + 1, length))
        if whole > question and whole >= rule.least:
            length = min(whole, rule.size)
            found.append((n, True, max(0, question - length + 1), whole - length + 1, length))
    item, answer, first, past, length = np.array(found, np.int64).reshape(-1, 5).T
    many = past - first
    at = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many) + np.repeat(first + unit[item], many)
    return np.repeat(item, many), np.repeat(answer, many).astype(bool), at, np.repeat(length, many)


def _halves(row: TaskItem, task: IclTask) -> tuple[str, str]:
    """Question and right answer; of a task of whole texts, the text."""
    return (row.gold_continuation, "") if task.type.whole_texts else (row.gold_context, row.gold_continuation)


def _without_template(questions: list[str], rule: Rule) -> list[str]:
    """Questions without the words that all of them begin or end with, normalised."""
    words = [words_of(question) for question in questions]
    asked = [w for w in words if w]
    first = last = 0
    if len(asked) >= _ROWS_OF_A_TEMPLATE:
        first = len(os.path.commonprefix(asked))
        last = len(os.path.commonprefix([w[::-1] for w in asked]))
        if first + last >= min(map(len, asked)):
            first = last = 0
    return [joined(w[first : len(w) - last], rule) for w in words]


def _size(text: str, rule: Rule) -> int:
    return text.count(" ") - 1 if rule.words else len(text)
