"""Which tokens go through the model together, so that none is computed twice and few are padding.

The options of a question become one row: what their texts share at the start, then each one's own part, a branch. A
mask keeps branches apart, in one forward pass.
"""

import itertools
import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openlm_pipeline.evaluation.tasks import Request

_BATCH_COST = 1 / 16
"""What a batch costs beside its tokens, as a share of the most it may have: measured at 512 on a CPU, 135M weights."""


@dataclass(frozen=True)
class PackedRow:
    """Texts that share their start."""

    ids: list[int]
    segments: list[int]
    """0 in the shared part, then the number of the branch, from 1."""
    positions: list[int]
    """Place of each token in its own text."""
    requests: list[int]
    columns: list[list[int]]
    """For each request, the places in the row that predict its continuation's tokens."""

    @property
    def num_scored(self) -> int:
        return sum(map(len, self.columns))

    @property
    def is_branched(self) -> bool:
        return self.segments[-1] > 0


def _text(request: Request) -> tuple[int, ...]:
    """What the model reads: the last token of a continuation predicts nothing."""
    return request.context_ids + request.continuation_ids[:-1]


def _row(texts: Sequence[tuple[int, ...]], members: Sequence[tuple[int, Request]]) -> PackedRow:
    num_shared = len(os.path.commonprefix(texts))
    ids = list(texts[0][:num_shared])
    segments, positions = [0] * num_shared, list(range(num_shared))
    starts: dict[tuple[int, ...], int] = {}
    columns = []
    for text, (_, request) in zip(texts, members):
        if text not in starts:
            starts[text] = len(ids)
            branch = text[num_shared:]
            ids += branch
            segments += [len(starts)] * len(branch)
            positions += range(num_shared, len(text))
        first, n = len(request.context_ids) - 1, len(request.continuation_ids)
        shift = starts[text] - num_shared
        columns.append([j if j < num_shared else j + shift for j in range(first, first + n)])
    return PackedRow(ids, segments, positions, [i for i, _ in members], columns)


def question_rows(members: Sequence[tuple[int, Request]], max_branched_len: int) -> list[PackedRow]:
    """The rows of one question: one, where its texts share a start and this makes no row above `max_branched_len`.

    Otherwise one for each distinct text.

    Args:
        members: number and request of each option.
    """
    texts = [_text(request) for _, request in members]
    if len({text[0] for text in texts}) == 1:
        row = _row(texts, members)
        if not row.is_branched or len(row.ids) <= max_branched_len:
            return [row]
    same: dict[tuple[int, ...], list[tuple[int, Request]]] = {}
    for text, member in zip(texts, members):
        same.setdefault(text, []).append(member)
    return [_row([text] * len(those), those) for text, those in same.items()]


def make_batches(rows: Sequence[PackedRow], max_tokens: int, max_scored: int) -> Iterator[list[PackedRow]]:
    """Rows by length, longest first, so that memory gives out at the start if it does; cut where it costs least.

    Rows with branches are by themselves, as the others need no mask of ours, which may not suit their length.

    Args:
        max_tokens: in one batch, padding included; a longer row is a batch of its own.
        max_scored: positions whose logits a batch may need, again more for a single row.
    """
    for branched in (True, False):
        some = [row for row in rows if row.is_branched == branched]
        some.sort(key=lambda row: (-len(row.ids), row.requests))
        starts = _starts([len(row.ids) for row in some], [row.num_scored for row in some], max_tokens, max_scored)
        yield from (some[start:end] for start, end in itertools.pairwise([*starts, len(some)]))


def _starts(lengths: Sequence[int], scored: Sequence[int], max_tokens: int, max_scored: int) -> list[int]:
    """Where batches of rows, longest first, start, for the fewest tokens; a batch costs some of them by itself."""
    lengths_N, scored_N = np.array(lengths), np.cumsum([0, *scored])
    costs, start_of, first = np.zeros(len(lengths) + 1), [0], 0
    for end in range(1, len(lengths) + 1):
        while first < end - 1 and (
            (end - first) * lengths_N[first] > max_tokens or scored_N[end] - scored_N[first] > max_scored
        ):
            first += 1
        total = costs[first:end] + np.arange(end - first, 0, -1) * lengths_N[first:end]
        start_of.append(first + int(total.argmin()))
        costs[end] = total.min() + max_tokens * _BATCH_COST
    starts, end = [], len(lengths)
    while end:
        starts.append(end := start_of[end])
    return starts[::-1]


def batch_tensors(batch: Sequence[PackedRow], device: torch.device) -> dict[str, Tensor]:
    """What `ScoringModel.logits` takes for a batch of `make_batches`, padded on the right; int64.

    Segments and positions are there only where its rows have branches.
    """
    length = max(len(row.ids) for row in batch)

    def padded(lists: Sequence[list[int]], filler: int) -> Tensor:
        return torch.tensor([values + [filler] * (length - len(values)) for values in lists], device=device)

    def flat(values: Iterator[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    found = {
        "ids_BS": padded([row.ids for row in batch], 0),
        "rows_P": flat(b for b, row in enumerate(batch) for _ in range(row.num_scored)),
        "columns_P": flat(column for row in batch for columns in row.columns for column in columns),
    }
    if batch[0].is_branched:
        found["segments_BS"] = padded([row.segments for row in batch], -1)
        found["positions_BS"] = padded([row.positions for row in batch], 0)
    return found
