"""Batches of rows cost least of all that keep to the limits."""

import itertools
import random

import pytest

from openlm_pipeline.evaluation.batches import PackedRow, make_batches
from openlm_pipeline.evaluation.scorer import GPU_BATCH_TOKENS, fitting_batch_tokens

MAX_TOKENS, MAX_SCORED, COST = 64, 12, 4


def rows(seed: int) -> list[PackedRow]:
    rng = random.Random(seed)

    def row(n: int, i: int) -> PackedRow:
        return PackedRow([1] * n, [0] * n, list(range(n)), [i], [[n - 1] * rng.randint(1, 3)])

    return [row(rng.choice((3, 7, 8, 20, 30, 70)), i) for i in range(11)]


def fits(batch: list[PackedRow]) -> bool:
    tokens, scored = len(batch) * len(batch[0].ids), sum(row.num_scored for row in batch)
    return len(batch) == 1 or (tokens <= MAX_TOKENS and scored <= MAX_SCORED)


def cost(batches: list[list[PackedRow]]) -> int:
    return sum(len(batch) * len(batch[0].ids) + COST for batch in batches)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_of_the_rows_by_length_costs_less(seed):
    given = rows(seed)
    found = list(make_batches(given, MAX_TOKENS, MAX_SCORED))
    flat = [row for batch in found for row in batch]
    assert sorted(row.requests for row in flat) == [[i] for i in range(len(given))]
    assert [len(row.ids) for row in flat] == sorted((len(row.ids) for row in given), reverse=True)
    assert all(map(fits, found))
    possible = []
    for n in range(len(flat)):
        for cuts in itertools.combinations(range(1, len(flat)), n):
            batches = [flat[a:b] for a, b in itertools.pairwise((0, *cuts, len(flat)))]
            if all(map(fits, batches)):
                possible.append(cost(batches))
    assert cost(found) == min(possible)


def test_batches_on_a_gpu_leave_half_of_its_memory_whatever_the_vocabulary():
    gib, logit_bytes = 1 << 30, 12
    assert fitting_batch_tokens(80 * gib, 50_432) == GPU_BATCH_TOKENS
    for free, vocab_size in ((2 * gib, 50_432), (8 * gib, 262_144)):
        tokens = fitting_batch_tokens(free, vocab_size)
        assert 0.95 * free / 2 < tokens / 4 * vocab_size * logit_bytes <= free / 2
    assert fitting_batch_tokens(0, 50_432) == 1
