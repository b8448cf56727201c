"""Items side by side: what was asked, and what each milestone made of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.suite import IclTask, task_name
from openlm_pipeline.evaluation.task_files import TaskFile
from openlm_pipeline.registry import RULES
from openlm_pipeline.reports.contamination import seen_text

LONGEST_TEXT = 1200
"""Characters of a question that are shown: its end, which the options follow."""


@dataclass(frozen=True)
class Answer:
    """What a model made of an item."""

    model: str
    """Title of the milestone."""
    right: bool | None
    chosen: int | None
    """The option that the task's rule picked; None where there is nothing to choose."""
    measures: tuple[float, ...]
    """Of each option, what `ItemsOfTask.measure` says."""
    generated: str | None
    nll: float | None
    """Of the right option, nats."""


@dataclass(frozen=True)
class LookedAt:
    """An item with the answers of some models; it has no texts where its row cannot be shown."""

    item: int
    """Row of the task's file, from 0."""
    category: str | None
    gold: int
    shots: int
    question: str
    options: tuple[str, ...]
    accepted: tuple[str, ...]
    """In generation: the texts that are right."""
    answers: tuple[Answer, ...]
    prompt: str = ""
    """The whole prompt of the right option, solved rows included, as the model read it."""
    contamination: Mapping[str, Any] | None = None
    """`verdict`, `first_seen_tokens`, `overlap` and `times_seen` at the last model, where its data was scanned."""

    @property
    def flipped(self) -> bool:
        """Right at one of the last two, wrong at the other."""
        return len({a.right for a in self.answers[-2:]}) > 1


@dataclass(frozen=True)
class ItemsOfTask:
    """Some items of a task."""

    task: str
    measure: str
    """What the numbers beside the options are."""
    items: tuple[LookedAt, ...]
    num_items: int
    """How many there are to choose from."""
    problem: str = ""
    """Why texts are missing."""


def of_task(table: pa.Table, label: str, k: int) -> pa.Table:
    """The items of a task in the order of its file."""
    found = table.filter(pc.and_(pc.equal(table["task"], label), pc.equal(table["num_fewshot"], k)))
    return found.sort_by("item")


def picked(tables: Mapping[str, pa.Table], *, only_flipped: bool, by: str, limit: int) -> list[int]:
    """Which items to show: those that the last two models judge differently first, in the order of the file.

    Args:
        tables: model -> a task's items (`of_task`), all of the same ones.
        only_flipped: leave out the others.
        by: `file`, or `likelihood`: whichever flipped, the largest change of the right option's first.

    Raises:
        DataError: two models were scored on other items, or they have no likelihoods to sort by.
    """
    *before, last = tables.values()
    if any(not t["item_hash"].combine_chunks().equals(last["item_hash"].combine_chunks()) for t in before):
        raise DataError(f"{', '.join(tables)} were scored on other items, so they can't stand side by side")
    numbers = last["item"].to_pylist()
    if not before:
        return numbers[:limit]
    if by == "likelihood":
        if last["nll"].null_count:
            raise DataError("written answers have no likelihood; leave out `--by likelihood`")
        change = pc.abs(pc.subtract(last["nll"], before[-1]["nll"])).to_pylist()
        return [n for _, n in sorted(zip(change, numbers), key=lambda pair: -pair[0])][:limit]
    flips = [a != b for a, b in zip(before[-1]["correct"].to_pylist(), last["correct"].to_pylist())]
    ordered = sorted(zip(flips, numbers), key=lambda pair: not pair[0])
    return [n for flip, n in ordered if flip or not only_flipped][:limit]


def side_by_side(
    task: IclTask,
    k: int,
    tables: Mapping[str, pa.Table],
    items: Sequence[int],
    file: TaskFile | None,
    problem: str = "",
) -> ItemsOfTask:
    """Put the answers of several models to some items together.

    Args:
        tables: model -> the task's items (`of_task`).
        file: rows that the texts are taken from; None where it cannot be read, for which `problem` gives the reason.
    """
    wanted = pa.array(items, pa.int64())
    chosen = {model: table.filter(pc.is_in(table["item"], wanted)).to_pylist() for model, table in tables.items()}
    rows = {model: {row["item"]: row for row in found} for model, found in chosen.items()}
    looked = tuple(_looked_at(task, {model: of[n] for model, of in rows.items()}, file) for n in items)
    measure = "mean log-probability per token" if task.rule == "mean" else "log-probability"
    return ItemsOfTask(task_name(task.label, k), measure, looked, max(t.num_rows for t in tables.values()), problem)


def _looked_at(task: IclTask, rows: Mapping[str, dict[str, Any]], file: TaskFile | None) -> LookedAt:
    first = next(iter(rows.values()))
    row = file.rows[first["item"]] if file and first["item"] < len(file.rows) else None
    question, options, accepted = "", (), ()
    if row is not None and row.item_hash == first["item_hash"]:
        contexts, accepted = task.type.contexts(task, row.contexts, preceded=bool(first["shots"])), row.answers
        question = contexts[0] if len(contexts) == 1 else ""
        if not RULES[task.rule].generates:
            options = row.continuations if question else tuple(f"{c} {t}" for c in contexts for t in row.continuations)
    answers = tuple(_answer(task, model, of_model) for model, of_model in rows.items())
    shown = (first[name] for name in ("item", "category", "gold"))
    return LookedAt(*shown, first["shots"] or 0, question, options, accepted, answers)


def _answer(task: IclTask, model: str, row: dict[str, Any]) -> Answer:
    measures = row["choice_logprobs"] or []
    if task.rule == "mean":
        measures = [total / tokens for total, tokens in zip(measures, row["choice_tokens"])]
    chosen = row.get(f"choice_{task.rule}")
    return Answer(model, row["correct"], chosen, tuple(measures), row["generated"], row["nll"])


def clipped(text: str, most: int = LONGEST_TEXT) -> str:
    """The end of a text that is too long."""
    return text if len(text) <= most else "… " + text[-most:]


def as_text(found: ItemsOfTask) -> str:
    """The items for a terminal: `*` is the option chosen, `gold` the right one."""
    parts = [f"{found.task}: {len(found.items)} of {found.num_items} items", found.problem]
    words = {True: "right", False: "wrong", None: "not judged"}
    for item in found.items:
        category = f" ({item.category})" if item.category else ""
        lines = [f"item {item.item}{category}: " + ", ".join(f"{words[a.right]} at {a.model}" for a in item.answers)]
        lines += [f"  {seen_text(item.contamination)}"] if item.contamination else []
        solved = f"[{item.shots} solved rows] " if item.shots else ""
        lines += [item.prompt or clipped(solved + item.question)] if item.prompt or item.question else []
        if item.answers[0].measures:
            lines.append(f"{'':7}{''.join(f'{a.model:>9} ' for a in item.answers)} {found.measure}")
        for i in range(len(item.answers[0].measures)):
            numbers = "".join(f"{a.measures[i]:9.3f}{'*' if a.chosen == i else ' '}" for a in item.answers)
            option = clipped(re.sub(r"\s+", " ", item.options[i]), 300) if item.options else f"option {i}"
            lines.append(f"  {'gold' if i == item.gold else '':4} {numbers} {option}")
        lines += [f"  {a.model} wrote: {a.generated!r}" for a in item.answers if a.generated is not None]
        lines += [f"  right: {' | '.join(item.accepted)}"] if item.accepted else []
        parts.append("\n".join(lines))
    return "\n\n".join(filter(None, parts))
