"""The native scorer: log-probabilities of continuations and greedy texts of any `ScoringModel`, over a suite.

Rows are batched by length and padded on the right to the longest of their batch, which a causal model does not see;
what the options of a question share is computed once; only the positions that predict a continuation go through the
head. Results do not depend on the batching beyond rounding.

Nothing stops early at a token that is not the argmax: a continuation is scored in the one pass that reads it, so the
later tokens cost no pass of their own, and their log-probabilities are wanted for the item's `nll`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import nn

from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.batches import PackedRow, batch_tensors, make_batches, question_rows
from openlm_pipeline.evaluation.generation import generate, generation_batches
from openlm_pipeline.evaluation.model import ScoringModel
from openlm_pipeline.evaluation.parallel import Processes, scoring_processes
from openlm_pipeline.evaluation.prepare import PreparedTask, prepare_suite
from openlm_pipeline.evaluation.results import (
    Generated,
    RequestScore,
    Rows,
    SuiteResult,
    collect_results,
    generation_row,
    item_row,
)
from openlm_pipeline.evaluation.suite import WHOLE, Part, Suite
from openlm_pipeline.evaluation.tasks import GenerationRequest, Request
from openlm_pipeline.registry import RULES
from openlm_pipeline.result import ProgressLine, Say
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_seconds

CPU_BATCH_TOKENS = 512
"""A CPU is no faster with more, and the longest and shortest row of a batch differ by more: padding."""
CPU_GENERATION_TOKENS = 4096
"""A step reads all weights, whatever the number of texts: 16 at once take half the time of batches of one."""
GPU_BATCH_TOKENS = 16384
_MIN_SCORED = 1024
_SCORED_SHARE = 1 / 4
"""Of the positions of a batch, those whose logits it may need."""
_LOGIT_BYTES = 12
"""Of one logit: in bf16, in fp32 and as its log-probability, rounded up."""
_PROGRESS_SECONDS = 5.0
_END_OF_TEXT = "<|endoftext|>"

T = TypeVar("T")
R = TypeVar("R")
ScoringProgress = Callable[[int, int], None]
"""Called after each batch with questions done and questions in all."""


def default_batch_tokens(model: ScoringModel, *, generation: bool = False) -> int:
    """Tokens of a batch, padding included; in generation those of its prompts and of all that may be written."""
    device = model.device
    if device.type == "cpu":
        return CPU_GENERATION_TOKENS if generation else CPU_BATCH_TOKENS
    if device.type != "cuda":
        return GPU_BATCH_TOKENS
    vocab_size = model.vocab_size  # loads the model, whose memory is no longer free then
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return fitting_batch_tokens(torch.cuda.mem_get_info(device)[0] + unused, vocab_size)


def fitting_batch_tokens(free_bytes: int, vocab_size: int) -> int:
    """At most `GPU_BATCH_TOKENS`, of which the logits of `_SCORED_SHARE` fit into half of the free memory."""
    return max(1, min(GPU_BATCH_TOKENS, int(free_bytes / 2 / (vocab_size * _LOGIT_BYTES * _SCORED_SHARE))))


def _in_turn(
    batches: Sequence[T],
    work: Callable[[T], R],
    weight: Callable[[T], int],
    processes: Processes,
    progress: ScoringProgress | None,
) -> list[tuple[T, R]]:
    """Each batch with its result; processes take turns, and progress is that of the first one's turns."""
    total, done = sum(map(weight, batches)), 0
    mine: list[R] = []

    def share() -> list[R]:
        nonlocal done
        for start in range(0, len(batches), processes.size):
            turn = batches[start : start + processes.size]
            if processes.rank < len(turn):
                mine.append(work(turn[processes.rank]))
            done += sum(map(weight, turn))
            if progress:
                progress(done, total)
        return mine

    shares = processes.gather(share)
    return [(batch, shares[i % processes.size][i // processes.size]) for i, batch in enumerate(batches)]


def score_questions(
    model: ScoringModel,
    questions: Sequence[Sequence[Request]],
    *,
    batch_tokens: int | None = None,
    processes: Processes | None = None,
    progress: ScoringProgress | None = None,
) -> list[list[RequestScore]]:
    """Score the continuation of each request; the requests of one question share what they have in common.

    Args:
        batch_tokens: tokens in one forward pass, padding included; a longer row gets a pass of its own. By default what
            suits the device.
        processes: share the work with these, all of whom call this with the same questions.

    Raises:
        DataError: the model gives NaN or an infinity.
    """
    processes = processes or Processes(0, 1)
    batch_tokens = batch_tokens or processes.from_first(lambda: default_batch_tokens(model))
    max_branched_len = processes.from_first(lambda: model.max_branched_len)
    flat = [request for question in questions for request in question]
    rows, number = [], 0
    for question in questions:
        rows += question_rows(list(enumerate(question, start=number)), max_branched_len)
        number += len(question)

    def score(batch: Sequence[PackedRow]) -> list[RequestScore]:
        members = [i for row in batch for i in row.requests]
        targets = torch.tensor([t for i in members for t in flat[i].continuation_ids], device=model.device)
        logits_PV = model.logits(**batch_tensors(batch, model.device))
        logprobs = -nn.functional.cross_entropy(logits_PV, targets, reduction="none")
        hits = logits_PV.argmax(dim=-1) == targets
        if not logprobs.isfinite().all():  # NaN compares as false, so that the first option would win
            raise DataError("the model gives a log-probability that is not finite; its weights are not usable")
        sizes = [len(flat[i].continuation_ids) for i in members]
        parts = zip(sizes, logprobs.cpu().double().split(sizes), hits.cpu().split(sizes))
        return [RequestScore(float(lp.sum()), n, bool(hit.all())) for n, lp, hit in parts]

    max_scored = max(_MIN_SCORED, int(batch_tokens * _SCORED_SHARE))
    batches = list(make_batches(rows, batch_tokens, max_scored))
    scores: dict[int, RequestScore] = {}
    for batch, found in _in_turn(batches, score, lambda b: sum(len(row.requests) for row in b), processes, progress):
        scores |= zip((i for row in batch for i in row.requests), found)
    numbers = iter(range(len(flat)))
    return [[scores[next(numbers)] for _ in question] for question in questions]


def generate_texts(
    model: ScoringModel,
    requests: Sequence[GenerationRequest],
    tokenizer: Tokenizer,
    *,
    batch_tokens: int | None = None,
    processes: Processes | None = None,
    progress: ScoringProgress | None = None,
) -> list[Generated]:
    """What the model writes after each prompt, greedily; arguments as for `score_questions`.

    A model that does not say how a text ends, ends it by `<|endoftext|>`, or id 0 where there is no such token.
    """
    processes = processes or Processes(0, 1)
    end_ids = processes.from_first(lambda: model.end_ids) or (tokenizer.token_to_id(_END_OF_TEXT) or 0,)
    batch_tokens = batch_tokens or processes.from_first(lambda: default_batch_tokens(model, generation=True))
    batches = list(generation_batches(requests, batch_tokens))

    def write(batch: Sequence[int]) -> list[Generated]:
        return generate(model, [requests[i] for i in batch], tokenizer, end_ids)

    written: dict[int, Generated] = {}
    for batch, texts in _in_turn(batches, write, len, processes, progress):
        written |= zip(batch, texts)
    return [written[i] for i in range(len(requests))]


def _progress_of(name: str, noun: str, report: Say) -> ScoringProgress:
    """Reports the first and the last call, and between them one in some seconds."""
    start = time.monotonic()
    told = -_PROGRESS_SECONDS

    def progress(done: int, total: int) -> None:
        nonlocal told
        took = time.monotonic() - start
        if done < total and took - told < _PROGRESS_SECONDS:
            return
        told = took
        rate = done / max(took, 1e-9)
        text = f"{name}: {done} of {total} {noun}, {rate:.3g} a second"
        left = (total - done) / rate
        facts = {"done": done, "total": total, "per_second": rate, "seconds_left": left}
        report(ProgressLine(text if done == total else f"{text}, {format_seconds(left)} left", facts))

    return progress


def score_suite(
    model: ScoringModel,
    tokenizer: Tokenizer,
    suite: Suite,
    home: Home,
    out_dir: Path,
    context: Mapping[str, Any],
    *,
    checkpoint_digest: str,
    max_seq_len: int,
    batch_tokens: int | None = None,
    report: Say = lambda line: None,
    part: Part = WHOLE,
) -> SuiteResult:
    """Score every task of a suite into `out_dir/items.parquet`; see `results` for what is kept and taken again.

    All files are read and checked and all prompts built before the first forward pass. Under torchrun the processes
    share the work; each gets the result, and the first reports and writes.

    Args:
        context: run, run_version, milestone, step (int), tokens (int): the columns that say what was scored.
        checkpoint_digest: identifies the weights.
        max_seq_len: longest sequence in tokens, where a task does not say.
        batch_tokens: tokens in one forward pass, padding included; by default what suits the device.
        part: which rows of each task, where not all.

    Raises:
        MissingInputError: a task's file is missing.
        DataError: a row is malformed, or cannot be scored within the length, or the model gives NaN.
        ScoringError: another process failed.
    """
    processes = scoring_processes()
    if processes.rank:
        report = lambda line: None  # noqa: E731 - only the first process speaks
    mine: list[PreparedTask] = []
    processes.gather(lambda: mine.extend(prepare_suite(suite, home, tokenizer, max_seq_len, report, part=part)))

    def score(tasks: Sequence[PreparedTask]) -> Iterator[Rows]:
        for t in tasks:
            generates = RULES[t.task.rule].generates
            progress = _progress_of(t.name, "texts" if generates else "requests", report)
            shared = {"batch_tokens": batch_tokens, "processes": processes, "progress": progress}
            if generates:
                asked = [item.generation for item in t.items if item.generation]
                texts = generate_texts(model, asked, tokenizer, **shared)
                yield [generation_row(t.task, t.num_fewshot, i, text) for i, text in zip(t.items, texts, strict=True)]
            else:
                scores = score_questions(model, [item.requests for item in t.items], **shared)
                yield [item_row(t.task, t.num_fewshot, i, found) for i, found in zip(t.items, scores, strict=True)]

    subject = {"checkpoint": checkpoint_digest, "precision": model.precision}
    return collect_results(mine, suite, out_dir, context, subject, score, processes, report)
