"""The data order: sample i of a run is a pure function of sizes, weights, seed and i."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.ordering import DataOrder
from openlm_pipeline.ordering.permutation import permute

BLOCK = 4096
seeds = st.integers(0, 2**63)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 600), seed=seeds)
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute(i, size, seed) for i in range(size)) == list(range(size))


@given(size=st.integers(1, 2**48), seed=seeds, data=st.data())
def test_permute_stays_in_a_large_domain_and_hits_nothing_twice(size: int, seed: int, data: st.DataObject) -> None:
    picked = data.draw(st.sets(st.integers(0, size - 1), max_size=20))
    images = {permute(i, size, seed) for i in picked}
    assert len(images) == len(picked)
    assert all(0 <= image < size for image in images)


@pytest.mark.parametrize("index", [-1, 5])
def test_permute_refuses_what_is_outside(index: int) -> None:
    with pytest.raises(IndexError):
        permute(index, 5, 0)


def test_permute_moves_every_index_everywhere() -> None:
    """Over many seeds each index goes to each place about equally often: chi-square over 8 x 8 cells."""
    num_seeds = 2000
    counts = Counter((i, permute(i, 8, seed)) for seed in range(num_seeds) for i in range(8))
    expected = num_seeds / 8
    chi_square = sum((counts[i, j] - expected) ** 2 / expected for i in range(8) for j in range(8))
    assert chi_square < 100, chi_square  # 49 degrees of freedom: 1 in 30,000 seeds' sets is above 93


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=3), seed=seeds, data=st.data())
def test_each_sample_comes_once_an_epoch(sizes: list[int], seed: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.2, 5), min_size=len(sizes), max_size=len(sizes)))
    order = DataOrder(sizes, weights, seed)
    seen: list[list[int]] = [[] for _ in sizes]
    for i in range(700):
        source, sample = order[i]
        seen[source].append(sample)
    for samples, size in zip(seen, sizes, strict=True):
        epochs = [samples[k : k + size] for k in range(0, len(samples), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs if len(epoch) == size)
        assert len(set(epochs[-1])) == len(epochs[-1])


def test_each_epoch_and_each_seed_and_each_source_has_its_own_order() -> None:
    order = DataOrder([50, 50], [1, 1], 3)
    samples: list[list[int]] = [[], []]
    for i in range(200):
        source, sample = order[i]
        samples[source].append(sample)
    epochs = {tuple(s[k : k + 50]) for s in samples for k in (0, 50)}
    other_seed = {tuple(DataOrder([50], [1], seed)[i][1] for i in range(50)) for seed in (3, 4)}
    assert len(epochs) == 4 and len(other_seed) == 2
    assert all(epoch != tuple(range(50)) for epoch in epochs)


def _deviations(weights: list[float], start: int) -> np.ndarray:
    """For each source the largest distance of its count from its exact share, over all prefixes of one block."""
    order = DataOrder([1] * len(weights), weights, 0)
    picked = np.array([order[i][0] for i in range(start, start + BLOCK)])
    counts = np.cumsum(picked[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, BLOCK + 1)[:, None] * (np.array(weights) / sum(weights))
    return np.abs(counts - exact).max(axis=0)


@settings(deadline=None, max_examples=10)
@given(weights=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), block=st.integers(0, 10**9))
def test_two_sources_are_within_one_of_their_share_in_every_prefix_of_a_block(
    weights: tuple[float, float], block: int
) -> None:
    assert _deviations(list(weights), block * BLOCK).max() <= 1 + 1e-9


@settings(deadline=None, max_examples=10)
@given(weights=st.lists(st.floats(0.02, 1), min_size=3, max_size=6))
def test_many_sources_are_within_their_number(weights: list[float]) -> None:
    assert _deviations(weights, 0).max() < len(weights)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_number_of_readers_sees_the_same_run(world_size: int) -> None:
    """Rank r reads samples r, r + world_size, ...; in any order of asking, each from an order of its own."""
    arguments = ([30, 70, 11], [0.5, 0.2, 0.3], 9)
    whole = [DataOrder(*arguments)[i] for i in range(240)]
    got: dict[int, tuple[int, int]] = {}
    for rank in reversed(range(world_size)):
        order = DataOrder(*arguments)
        got |= {i: order[i] for i in reversed(range(rank, 240, world_size))}
    assert [got[i] for i in range(240)] == whole


@pytest.mark.parametrize(
    ("sizes", "weights"), [([], []), ([1], [1, 2]), ([0], [1]), ([1, 1], [1, 0]), ([1, 1], [1, -1])]
)
def test_impossible_mixtures_are_refused(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one sample and a positive weight"):
        DataOrder(sizes, weights, 0)


def test_a_share_too_small_for_a_block_is_an_error_for_the_user() -> None:
    with pytest.raises(ConfigError, match=r"source 1 of the mixture has less than 1/4096"):
        DataOrder([10, 10], [1, 1e-6], 0)
