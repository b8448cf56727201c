"""Batches of rows cost least of all that keep to the limits."""

import itertools
import random

import pytest

from openlm_pipeline.evaluation.batches import PackedRow, make_batches

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
