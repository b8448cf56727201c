"""The scorer: log-probabilities of continuations under a causal model, and from them the per-item table of a suite.

Requests are batched by length and padded on the right to the longest of their batch, which a causal model does not
see; only the hidden states that predict a continuation go through the head. Results do not depend on the batching
beyond rounding. Finished tasks are kept on disk, so an evaluation that was killed goes on where it stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.items import concat_items, items_table, read_items, with_context, write_items
from openlm_pipeline.evaluation.suite import HARNESS_VERSION, IclTask, Suite, task_name
from openlm_pipeline.evaluation.tasks import Item, Request, TaskFile, build_items, read_task_file
from openlm_pipeline.layout import Home
from openlm_pipeline.lineage.fingerprint import Tree, differences, fingerprint
from openlm_pipeline.result import Report

_HEAD_POSITIONS = 1024
"""Positions whose logits are computed at once, so that a large vocabulary does not multiply the memory of a batch."""


class CausalModel(Protocol):
    """What is asked of a model: hidden states and a head; position i sees positions 0..i only."""

    output: nn.Module

    def hidden(self, ids: Tensor) -> Tensor:
        """Token ids [B, S] int64 -> hidden states [B, S, D], the final norm applied."""
        ...


@dataclass(frozen=True)
class RequestScore:
    """The continuation of one request under the model."""

    sum_logprob: float
    """Natural logarithm of its probability."""
    num_tokens: int
    all_argmax: bool
    """Every token is the most likely one, given the true tokens before it."""


def _batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, longest first, cut so that rows times longest row stays within `batch_tokens`."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // len(rows[order[start]]))
        yield order[start : start + size]
        start += size


def _continuation_logprobs(model: CausalModel, hidden_PD: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
    """Per position: log-probability of the target in fp32, and whether it is the argmax."""
    logprobs, hits = [], []
    for hidden, targets in zip(hidden_PD.split(_HEAD_POSITIONS), targets_P.split(_HEAD_POSITIONS)):
        logits = model.output(hidden).float()
        logprobs.append(-nn.functional.cross_entropy(logits, targets, reduction="none"))
        hits.append(logits.argmax(dim=-1) == targets)
    return torch.cat(logprobs), torch.cat(hits)


@torch.no_grad()
def score_requests(
    model: CausalModel,
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[RequestScore]:
    """Score each continuation after its context, in the order given.

    Requests whose model input is the same (single-token options of one question, say) share a forward pass.

    Args:
        batch_tokens: tokens in one forward pass, padding included; a longer request gets a pass of its own.
        progress: called after each batch with requests done and requests in all.

    Raises:
        DataError: the model gives NaN or an infinity.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for i, r in enumerate(requests):
        sharing.setdefault(r.context_ids + r.continuation_ids[:-1], []).append(i)
    rows = list(sharing)
    scores: list[RequestScore | None] = [None] * len(requests)
    done = 0
    for batch in _batches(rows, batch_tokens):
        length = len(rows[batch[0]])
        ids_BS = torch.tensor([rows[b] + (0,) * (length - len(rows[b])) for b in batch], device=device)
        hidden_BSD = model.hidden(ids_BS)
        members = [(b, i) for b, row in enumerate(batch) for i in sharing[rows[row]]]
        where_B, where_S, targets = [], [], []
        for b, i in members:
            first = len(requests[i].context_ids) - 1  # the state of the last context token predicts the first token
            n = len(requests[i].continuation_ids)
            where_B += [b] * n
            where_S += range(first, first + n)
            targets += requests[i].continuation_ids
        hidden_PD = hidden_BSD[torch.tensor(where_B, device=device), torch.tensor(where_S, device=device)]
        logprobs, hits = _continuation_logprobs(model, hidden_PD, torch.tensor(targets, device=device))
        sizes = [len(requests[i].continuation_ids) for _, i in members]
        for (_, i), lp, hit in zip(members, logprobs.double().cpu().split(sizes), hits.cpu().split(sizes)):
            if not lp.isfinite().all():  # NaN compares as false, so that the first option would win
                raise DataError("the model gives a log-probability that is not finite; its weights are not usable")
            scores[i] = RequestScore(float(lp.sum()), len(lp), bool(hit.all()))
        done += len(members)
        if progress:
            progress(done, len(requests))
    return [s for s in scores if s is not None]


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])  # max keeps the first of equals


def item_row(task: IclTask, num_fewshot: int, item: Item, scores: Sequence[RequestScore]) -> dict[str, Any]:
    """The table row of an item (without its context columns) from the scores of its requests, by all three rules.

    mean: largest mean token log-probability (LLM Foundry); sum: largest total (lm-evaluation-harness `acc`);
    norm: largest total over the continuation's characters (`acc_norm`). Ties go to the first option.
    """
    gold = scores[item.gold]
    row: dict[str, Any] = {
        "task": task.label,
        "num_fewshot": num_fewshot,
        "category": item.category,
        "item": item.index,
        "item_hash": item.item_hash,
        "prompt_hash": item.prompt_hash,
        "num_choices": len(scores),
        "gold": item.gold,
        "choice_logprobs": [s.sum_logprob for s in scores],
        "choice_tokens": [s.num_tokens for s in scores],
        "nll": -gold.sum_logprob,
        "num_tokens": gold.num_tokens,
        "metric": task.metric,
    }
    if task.rule == "argmax":
        return row | {"correct": gold.all_argmax}
    mean = _first_largest([s.sum_logprob / s.num_tokens for s in scores])
    total = _first_largest([s.sum_logprob for s in scores])
    norm = _first_largest([s.sum_logprob / n for s, n in zip(scores, item.continuation_chars)])
    return row | {
        "choice_mean": mean,
        "choice_sum": total,
        "choice_norm": norm,
        "correct": mean == item.gold,
        "correct_sum": total == item.gold,
        "correct_norm": norm == item.gold,
    }


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
    not_run: dict[str, str]
    """Task -> why, where its file is missing; only with `tolerant`."""
    failed: dict[str, str]
    """Task -> why, where its file is broken; only with `tolerant`."""


def _read_cached(path: Path, identity: Tree, name: str, report: Report) -> pa.Table | None:
    """The stored items of a task if they are of this very identity."""
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


def _score_task(
    model: CausalModel,
    task: IclTask,
    num_fewshot: int,
    items: Sequence[Item],
    batch_tokens: int,
    device: torch.device | str,
    report: Report,
) -> list[dict[str, Any]]:
    name, start = task_name(task.label, num_fewshot), time.monotonic()
    requests = [r for item in items for r in item.requests]

    def progress(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - start, 1e-9)
        report(f"{name}: {done} of {total} requests, {rate:.0f} a second")

    scores = iter(score_requests(model, requests, batch_tokens=batch_tokens, device=device, progress=progress))
    return [item_row(task, num_fewshot, item, [next(scores) for _ in item.requests]) for item in items]


def score_suite(
    model: CausalModel,
    tokenizer: Tokenizer,
    suite: Suite,
    home: Home,
    out_dir: Path,
    context: Mapping[str, Any],
    *,
    checkpoint_digest: str,
    max_seq_len: int,
    batch_tokens: int = 16384,
    device: torch.device | str = "cpu",
    report: Report = lambda line: None,
    tolerant: bool = False,
) -> SuiteResult:
    """Score every task of a suite into `out_dir/items.parquet`.

    All files are read and checked and all prompts built before the first forward pass. Each task's items are written
    to `out_dir/tasks/` as soon as it is done; they are taken again if their recorded identity (checkpoint, file,
    settings, tokenizer, length, harness version) is the same. A `scorecard.json` made from other items is removed.

    Args:
        model: on `device`, in evaluation mode.
        context: run, run_version, milestone, step (int), tokens (int): the columns that say what was scored.
        checkpoint_digest: identifies the weights.
        max_seq_len: longest sequence in tokens, where a task does not say.
        tolerant: leave out a task whose file is missing or broken, and say so in the result, instead of raising.

    Raises:
        MissingInputError: a task's file is missing.
        DataError: a row is malformed, or cannot be scored within the length, or the model gives NaN.
    """
    context = {**context, "suite": suite.name, "suite_version": suite.version}
    with_context(items_table([]), context)  # a wrong context is found before the work, not after
    tokenizer_digest = fingerprint({"tokenizer": tokenizer.to_str()})
    not_run: dict[str, str] = {}
    failed: dict[str, str] = {}
    prepared: list[tuple[IclTask, int, TaskFile, list[Item]]] = []
    for task in suite.icl_tasks:
        try:
            file = read_task_file(task, home)
            built = [(task, k, file, build_items(task, file, k, tokenizer, max_seq_len)) for k in task.num_fewshot]
        except (MissingInputError, DataError) as e:
            if not tolerant:
                raise
            problems = not_run if isinstance(e, MissingInputError) else failed
            problems.update({task_name(task.label, k): str(e) for k in task.num_fewshot})
            report(str(e))
            continue
        prepared += built

    tables, scored, reused, task_files = [], [], [], {}
    for task, k, file, items in prepared:
        name = task_name(task.label, k)
        identity: Tree = {
            "harness_version": HARNESS_VERSION,
            "checkpoint": checkpoint_digest,
            "tokenizer": tokenizer_digest,
            "task_file_sha256": file.sha256,
            "task": task.settings(),
            "num_fewshot": k,
            "max_seq_len": task.max_seq_len or max_seq_len,
        }
        path = out_dir / "tasks" / f"{task.label}-{k}shot.parquet"
        table = _read_cached(path, identity, name, report)
        if table is None:
            rows = _score_task(model, task, k, items, batch_tokens, device, report)
            table = items_table([{**context, **row} for row in rows])
            write_items(path, table, identity)
            scored.append(name)
        else:
            report(f"{name}: {table.num_rows} items already scored")
            reused.append(name)
        task_files[name] = file.sha256
        tables.append(with_context(table, context))
    recorded = {
        "harness_version": HARNESS_VERSION,
        "checkpoint": checkpoint_digest,
        "context": context,
        "suite_digest": suite.digest,
        "task_files": task_files,
        "not_run": not_run,
        "failed": failed,
    }
    path, result = out_dir / "items.parquet", concat_items(tables)
    if scored or _read_cached(path, recorded, "all items", report) is None:
        (out_dir / "scorecard.json").unlink(missing_ok=True)  # it sums up other items; written again last
        write_items(path, result, recorded)
    return SuiteResult(result, path, task_files, tuple(scored), tuple(reused), not_run, failed)
