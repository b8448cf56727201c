"""Items side by side: what was asked, and what each milestone made of it, as text and as a page to search."""

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
    """An item with the answers of some models; texts are None where its row cannot be shown."""

    item: int
    """Row of the task's file, from 0."""
    category: str | None
    gold: int
    shots: int
    question: str | None
    options: tuple[str, ...]
    accepted: tuple[str, ...]
    """In generation: the texts that are right."""
    answers: tuple[Answer, ...]
    prompt: str | None = None
    """The whole prompt of the right option, solved rows included, as the model read it."""

    @property
    def flipped(self) -> bool:
        """Right at one of the last two, wrong at the other."""
        return len({a.right for a in self.answers[-2:]}) > 1

    @property
    def headline(self) -> str:
        """`right at 400K, wrong at 800K`."""
        words = {True: "right", False: "wrong", None: "not judged"}
        return ", ".join(f"{words[a.right]} at {a.model}" for a in self.answers)


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
    keys = ["item", "item_hash"]
    if any(not t.select(keys).combine_chunks().equals(last.select(keys).combine_chunks()) for t in before):
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
    first = [n for n, flip in zip(numbers, flips) if flip]
    return (first if only_flipped else first + [n for n, flip in zip(numbers, flips) if not flip])[:limit]


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
    rows = {
        model: {r["item"]: r for r in table.filter(pc.is_in(table["item"], wanted)).to_pylist()}
        for model, table in tables.items()
    }
    found = tuple(_looked_at(task, {model: of[n] for model, of in rows.items()}, file) for n in items)
    measure = "mean log-probability per token" if task.rule == "mean" else "log-probability"
    return ItemsOfTask(task_name(task.label, k), measure, found, max(t.num_rows for t in tables.values()), problem)


def _looked_at(task: IclTask, rows: Mapping[str, dict[str, Any]], file: TaskFile | None) -> LookedAt:
    first = next(iter(rows.values()))
    source = file.rows[first["item"]] if file and first["item"] < len(file.rows) else None
    if source is not None and source.item_hash != first["item_hash"]:
        source = None
    question, options, accepted = None, (), ()
    if source is not None:
        contexts = task.type.contexts(task, source.contexts, preceded=bool(first["shots"]))
        question = contexts[0] if len(contexts) == 1 else ""
        accepted = source.answers
        if not RULES[task.rule].generates:
            texts = source.continuations
            options = texts if len(contexts) == 1 else tuple(f"{c} {t}" for c in contexts for t in texts)
    return LookedAt(
        first["item"],
        first["category"],
        first["gold"],
        first["shots"] or 0,
        question,
        options,
        accepted,
        tuple(_answer(task, model, row) for model, row in rows.items()),
    )


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
    parts = [f"{found.task}: {len(found.items)} of {found.num_items} items"]
    parts += [found.problem] if found.problem else []
    for item in found.items:
        category = f" ({item.category})" if item.category else ""
        lines = [f"item {item.item}{category}: {item.headline}"]
        if item.prompt is not None:
            lines.append(item.prompt)
        elif item.question:
            solved = f"[{item.shots} solved rows] " if item.shots else ""
            lines.append("  " + clipped(f"{solved}{item.question}").replace("\n", "\n  "))
        if any(a.measures for a in item.answers):
            lines.append("       " + "".join(f"{a.model:>9} " for a in item.answers) + f" {found.measure}")
        for i in range(len(item.answers[0].measures)):
            numbers = "".join(f"{a.measures[i]:9.3f}{'*' if a.chosen == i else ' '}" for a in item.answers)
            option = clipped(re.sub(r"\s+", " ", item.options[i]), 300) if item.options else f"option {i}"
            lines.append(f"  {'gold' if i == item.gold else '    '} {numbers} {option}")
        lines += [f"  {a.model} wrote: {a.generated!r}" for a in item.answers if a.generated is not None]
        lines += [f"  right: {' | '.join(item.accepted)}"] if item.accepted else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
