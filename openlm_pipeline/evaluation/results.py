"""From scores to the per-item table of a suite, the same for every backend; finished tasks are kept on disk.

Each task's items are written to `<folder>/tasks/` as soon as it is done, so that an evaluation that was killed resumes
where it stopped. They are taken again if their recorded identity (model, file, settings, tokenizer, length, harness
version) is the same.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.items import concat_items, items_table, read_items, with_context, write_items
from openlm_pipeline.evaluation.parallel import Processes
from openlm_pipeline.evaluation.prepare import PreparedTask
from openlm_pipeline.evaluation.suite import HARNESS_VERSION, IclTask, Suite
from openlm_pipeline.evaluation.tasks import Item
from openlm_pipeline.fingerprint import Tree, differences, fingerprint
from openlm_pipeline.registry import RULES
from openlm_pipeline.result import Say

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RequestScore:
    """The continuation of one request under the model."""

    sum_logprob: float
    """Natural logarithm of its probability."""
    num_tokens: int
    all_argmax: bool
    """Every token is the most likely one, given the true tokens before it."""


@dataclass(frozen=True)
class Generated:
    """What a model wrote."""

    text: str
    """Up to the first stop, without special tokens."""
    num_tokens: int


@dataclass(frozen=True)
class SuiteResult:
    """A scored suite. Tasks are named `label/k-shot`."""

    items: pa.Table
    path: Path
    task_files: dict[str, str]
    """Task -> sha256 of its file."""
    scored: tuple[str, ...]
    reused: tuple[str, ...]
    """Tasks taken from an earlier evaluation of the same checkpoint with the same files and settings."""
    num_rows: Mapping[str, int] = field(default_factory=dict)
    """Rows of the files of tasks of which only some were scored."""
    warnings: tuple[str, ...] = ()
    """What a reader of the scores must know, each with its task."""


def _common(task: IclTask, num_fewshot: int, item: Item) -> dict[str, Any]:
    return {
        "task": task.label,
        "num_fewshot": num_fewshot,
        "category": item.category,
        "item": item.index,
        "item_hash": item.item_hash,
        "prompt_hash": item.prompt_hash,
        "gold": item.gold,
        "metric": task.metric,
        "value_kind": "correct",
        "cluster": item.cluster,
        "shots": item.shots,
        "cut_tokens": item.cut_tokens,
    }


def _valued(judged: dict[str, Any]) -> dict[str, Any]:
    """With `value`, unless the rule gives its own."""
    return {"value": None if judged.get("correct") is None else float(judged["correct"]), **judged}


def item_row(task: IclTask, num_fewshot: int, item: Item, scores: Sequence[RequestScore]) -> dict[str, Any]:
    """The table row of an item (without its context columns) from the scores of its requests."""
    if len(item.continuation_bytes) == 1 < len(scores):  # windows of one text
        tokens = sum(s.num_tokens for s in scores)
        scores = [RequestScore(math.fsum(s.sum_logprob for s in scores), tokens, all(s.all_argmax for s in scores))]
    gold = scores[item.gold]
    return _common(task, num_fewshot, item) | {
        "num_choices": len(scores),
        "choice_logprobs": [s.sum_logprob for s in scores],
        "choice_tokens": [s.num_tokens for s in scores],
        "nll": -gold.sum_logprob,
        "num_tokens": gold.num_tokens,
        "choice_bytes": list(item.continuation_bytes),
        **_valued(RULES[task.rule].judge(task, item, scores)),
    }


def generation_row(task: IclTask, num_fewshot: int, item: Item, generated: Generated) -> dict[str, Any]:
    """The table row of an item (without its context columns) that the model answered in its own words."""
    return _common(task, num_fewshot, item) | {
        "num_choices": 1,
        "generated": generated.text,
        "num_tokens": generated.num_tokens,
        **_valued(RULES[task.rule].judge(task, item, generated)),
    }


def _read_stored(path: Path, identity: Tree, name: str, report: Say) -> pa.Table | None:
    """The stored items if they are of this very identity."""
    if not path.exists():
        return None
    try:
        table, recorded = read_items(path)
    except DataError as e:
        report(f"{name}: made again: {e}")
        return None
    if fingerprint(recorded) == fingerprint(identity):
        return table
    report(f"{name}: made again, as it differs: {'; '.join(differences(recorded, identity))}")
    return None


def _read_task(path: Path, identity: Tree, task: PreparedTask, report: Say) -> pa.Table | None:
    """The stored items of a task, if the model was asked then what it would be asked now."""
    table = _read_stored(path, identity, task.name, report)
    if table is None or table["prompt_hash"].to_pylist() == [i.prompt_hash for i in task.items]:
        return table
    report(f"{task.name}: made again, as some prompts differ")
    return None


def collect_results(
    prepared: Sequence[PreparedTask],
    suite: Suite,
    out_dir: Path,
    context: Mapping[str, Any],
    subject: Tree,
    score: Callable[[Sequence[PreparedTask]], Iterator[Rows]],
    processes: Processes,
    report: Say,
) -> SuiteResult:
    """Have the tasks scored that are not on disk yet, and write `out_dir/items.parquet` over all.

    A `scorecard.json` made from other items is removed. Only the first process reads and writes.

    Args:
        context: run, run_version, milestone, step (int), tokens (int): the columns that say what was scored.
        subject: identifies the model, and the backend where it matters.
        score: gives the rows of each of these tasks, one task after the other; each is kept before the next is asked
            for.
    """
    context = {**context, "suite": suite.name, "suite_version": suite.version}
    with_context(items_table([]), context)  # a wrong context is found before the work, not after

    def stored_at(task: PreparedTask) -> Path:
        return out_dir / "tasks" / f"{task.task.label}-{task.num_fewshot}shot.parquet"

    tables: dict[str, pa.Table | None] = processes.from_first(
        lambda: {t.name: _read_task(stored_at(t), subject | t.identity, t, report) for t in prepared}
    )
    for name, table in tables.items():
        if table is not None:
            report(f"{name}: {table.num_rows} items already scored")
    missing = [t for t in prepared if tables[t.name] is None]
    for task, rows in zip(missing, score(missing), strict=True):
        table = items_table([{**context, **row} for row in rows])
        processes.from_first(partial(write_items, stored_at(task), table, subject | task.identity))
        tables[task.name] = table

    task_files = {t.name: t.file.sha256 for t in prepared}
    recorded = subject | {
        "harness_version": HARNESS_VERSION,
        "context": context,
        "suite_digest": suite.digest,
        "task_files": task_files,
        "not_run": {},  # as the first release wrote these two
        "failed": {},
    }
    items = concat_items([with_context(tables[t.name], context) for t in prepared])
    path = out_dir / "items.parquet"

    def write() -> None:
        if missing or _read_stored(path, recorded, "all items", report) is None:
            (out_dir / "scorecard.json").unlink(missing_ok=True)  # it sums up other items; written again last
            write_items(path, items, recorded)

    processes.from_first(write)
    scored = tuple(t.name for t in missing)
    reused = tuple(t.name for t in prepared if t.name not in scored)
    warnings = tuple(f"{t.name}: {warning}" for t in prepared for warning in t.warnings)
    num_rows = {t.name: len(t.file.rows) for t in prepared if len(t.items) < len(t.file.rows)}
    return SuiteResult(items, path, task_files, scored, reused, num_rows, warnings)
