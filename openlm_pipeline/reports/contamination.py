"""Items of a suite that a run has trained on, as tables for a terminal and for a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openlm_pipeline.evaluation.suite import task_name
from openlm_pipeline.reports.table import signed
from openlm_pipeline.units import format_tokens

LISTED = 20
"""Items of a report."""
Rows = list[list[str]]


@dataclass(frozen=True)
class Contamination:
    """What is shown of it."""

    tasks: Rows
    """Headings, then a row a task: its items, the share seen at each milestone, and accuracies at the last one."""
    items: Rows
    """Headings, then those items with the largest overlap; empty for none."""
    num_seen: int
    notes: tuple[str, ...] = ()


def contamination(
    milestones: Mapping[str, Sequence[Mapping[str, Any]]],
    seen: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    listed: int = LISTED,
) -> Contamination:
    """
    Args:
        milestones: title -> the rows of `lineage.contamination.by_task`, in order.
        seen: rows of items at the last of them.
    """
    last = list(milestones.values())[-1]
    shares = {
        title: {_name(row): f"{row['seen']:,} ({row['share_seen']:.1%})" if row["seen"] else "0" for row in rows}
        for title, rows in milestones.items()
    }
    titles = [f"seen at {title}" for title in milestones]
    tasks = [["task", "items", *titles, "too short to tell", "accuracy seen", "clean", "difference, 95%"]]
    for row in last:
        accuracies = [f"{row[k]:.3f}" if k in row else "" for k in ("accuracy_seen", "accuracy_clean")]
        ends = [signed(row[k]) for k in ("difference", "difference_low", "difference_high") if k in row]
        difference = f"{ends[0]} ({ends[1]} to {ends[2]})" if ends else ""
        counts = [f"{row['items']:,}", *(of.get(_name(row), "") for of in shares.values()), f"{row['too_short']:,}"]
        tasks.append([_name(row), *counts, *accuracies, difference])
    by_overlap = sorted(seen, key=lambda row: (-row["overlap"], row["first_seen_tokens"], row["task"], row["item"]))
    items = [["item", "overlap", "question", "answer", "first seen after", "times"]] if by_overlap[:listed] else []
    for row in by_overlap[:listed]:
        parts = [_share(row[name]) for name in ("overlap", "overlap_question", "overlap_answer")]
        first = f"{format_tokens(row['first_seen_tokens'], 4)} tokens"
        items.append([f"{row['task']} {row['item']}", *parts, first, f"{row['times_seen']:,}"])
    return Contamination(tasks, items, len(seen), tuple(notes))


def seen_text(row: Mapping[str, Any]) -> str:
    """Of an item, whether and when it was seen, as the end of a sentence."""
    if row["first_seen_tokens"] is None:
        return row["verdict"]
    first = format_tokens(row["first_seen_tokens"], 4)
    return f"seen in training first after {first} tokens, overlap {_share(row['overlap'])}, times {row['times_seen']:,}"


def _name(row: Mapping[str, Any]) -> str:
    return task_name(row["task"], row["num_fewshot"]) if "num_fewshot" in row else row["task"]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}" if not 0 < value < 0.01 else f"{value:.2%}"
