"""What every order promises for any sizes, weights, seeds and splits over processes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_pipeline.ordering import Order, make_order
from openlm_pipeline.ordering.samplings.epochs import DataOrder, WindowedOrder
from openlm_pipeline.ordering.samplings.openlm import ManifestOrder, ResampledOrder

BLOCK = 4096
SAMPLINGS = ("permutation", "windowed", "resampled", "manifest")
seeds = st.integers(0, 2**63)
shards_of_one = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any).map(np.array)
sources = st.lists(shards_of_one, min_size=1, max_size=3)
quick = settings(deadline=None, max_examples=25)


def draw_weights(data: st.DataObject, count: int) -> list[float]:
    return data.draw(st.lists(st.floats(0.2, 5), min_size=count, max_size=count))


def any_order(data: st.DataObject, sampling: str, shard_sizes: list[np.ndarray], seed: int) -> Order:
    weights = draw_weights(data, len(shard_sizes))
    window, batch = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 3, 8, 5000]))
    return make_order(sampling, shard_sizes, weights, seed, window_shards=window, source_batch=batch)


def joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, int]]:
    """Picks one after the other as pairs."""
    source, sample = map(np.concatenate, zip(*parts))
    return list(zip(source.tolist(), sample.tolist()))


@quick
@given(shard_sizes=sources, seed=seeds, data=st.data())
@pytest.mark.parametrize("sampling", ["permutation", "windowed", "manifest"])
def test_each_sample_comes_once_an_epoch(
    sampling: str, shard_sizes: list[np.ndarray], seed: int, data: st.DataObject
) -> None:
    source, sample = any_order(data, sampling, shard_sizes, seed).picks(0, 1500)
    for s, sizes in enumerate(shard_sizes):
        total, samples = int(sizes.sum()), sample[source == s]
        epochs = np.split(samples, range(total, len(samples), total))
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(total))
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert all(0 <= i < total for i in epochs[-1])


@settings(deadline=None, max_examples=10)
@given(sizes=st.lists(st.integers(20_000, 40_000), min_size=1, max_size=5).map(np.array), seed=seeds)
def test_resampled_gives_a_drawn_shard_whole(sizes: np.ndarray, seed: int) -> None:
    """Shards as large as the buffer are drawn one by one, and each sample of a drawn one comes once, shuffled."""
    _, sample = ResampledOrder([sizes], [1], seed, 8).picks(0, 100_000)
    shards = np.searchsorted(np.cumsum(sizes), sample, side="right")
    start = 0
    while start <= 60_000:
        k = shards[start]
        drawn = sample[start : start + sizes[k]]
        assert np.array_equal(np.sort(drawn), np.arange(sizes[:k].sum(), sizes[: k + 1].sum()))
        assert not np.array_equal(drawn, np.sort(drawn))
        start += sizes[k]


@quick
@given(shard_sizes=sources, seed=seeds, start=st.integers(0, 30_000), data=st.data())
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_picks_are_the_same_in_pieces_of_any_size(
    sampling: str, shard_sizes: list[np.ndarray], seed: int, start: int, data: st.DataObject
) -> None:
    order = any_order(data, sampling, shard_sizes, seed)
    counts = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=8))
    starts = start + np.cumsum([0, *counts])
    pieces = [order.picks(int(first), count) for first, count in zip(starts, counts)]
    assert joined(pieces) == joined([order.picks(start, sum(counts))])


@settings(deadline=None, max_examples=15)
@given(
    shard_sizes=sources,
    seed=seeds,
    world_size=st.integers(1, 9),
    local=st.integers(1, 40),
    step=st.integers(0, 300),
    data=st.data(),
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_ranks_together_see_the_batch_of_one(
    sampling: str,
    shard_sizes: list[np.ndarray],
    seed: int,
    world_size: int,
    local: int,
    step: int,
    data: st.DataObject,
) -> None:
    """Each rank has an order of its own, and none has seen an earlier step."""
    weights = draw_weights(data, len(shard_sizes))
    start = step * world_size * local

    def new() -> Order:
        return make_order(sampling, shard_sizes, weights, seed, window_shards=3, source_batch=8)

    ranks = [new().picks(start + rank * local, local) for rank in range(world_size)]
    assert joined(ranks) == joined([new().picks(start, world_size * local)])


def deviations(order: Order, weights: list[float], start: int) -> np.ndarray:
    """For each source the largest distance of its count from its exact share, over all prefixes of one block."""
    source, _ = order.picks(start, BLOCK)
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, BLOCK + 1)[:, None] * (np.array(weights) / sum(weights))
    return np.abs(counts - exact).max(axis=0)


@settings(deadline=None, max_examples=15)
@given(weights=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), block=st.integers(0, 10**9))
@pytest.mark.parametrize("sampling", ["permutation", "windowed"])
def test_two_sources_are_within_one_of_their_share_in_every_prefix_of_a_block(
    sampling: str, weights: tuple[float, float], block: int
) -> None:
    order = make_order(sampling, [np.full(3, 9000)] * 2, weights, 0, window_shards=2, source_batch=1)
    assert deviations(order, list(weights), block * BLOCK).max() <= 1 + 1e-9


@settings(deadline=None, max_examples=15)
@given(weights=st.lists(st.floats(0.02, 1), min_size=3, max_size=6))
def test_many_sources_are_within_their_number(weights: list[float]) -> None:
    assert deviations(DataOrder([20_000] * len(weights), weights, 0), weights, 0).max() < len(weights)


@quick
@given(sizes=shards_of_one, seed=seeds, window=st.integers(1, 14))
def test_windows_follow_one_another_without_mixing(sizes: np.ndarray, seed: int, window: int) -> None:
    """No shard is needed any more once one of a later window came, and a window has at most W shards."""
    _, sample = WindowedOrder([sizes], [1], seed, window).picks(0, int(sizes.sum()))
    shards = np.searchsorted(np.cumsum(sizes), sample, side="right").tolist()
    last = {shard: i for i, shard in enumerate(shards)}
    open_shards: set[int] = set()
    for i, shard in enumerate(shards):
        open_shards.add(shard)
        assert len(open_shards) <= window
        open_shards = {k for k in open_shards if last[k] > i}


@quick
@given(sizes=shards_of_one, seed=seeds)
def test_manifest_reads_each_shard_from_first_to_last_in_every_pass(sizes: np.ndarray, seed: int) -> None:
    total, first = int(sizes.sum()), np.cumsum(sizes) - sizes
    _, sample = ManifestOrder([sizes], [1], seed, 8).picks(0, 3 * total)
    shards = np.searchsorted(np.cumsum(sizes), sample, side="right")
    for number in range(3):
        part = slice(number * total, (number + 1) * total)
        changes = np.flatnonzero(np.diff(shards[part], prepend=-1))
        for run, shard in zip(np.split(sample[part], changes[1:]), shards[part][changes]):
            assert run.tolist() == list(range(first[shard], first[shard] + sizes[shard]))
        assert Counter(shards[part][changes].tolist()) == dict.fromkeys(np.flatnonzero(sizes).tolist(), 1)


@quick
@given(shard_sizes=sources, seed=seeds, data=st.data())
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_each_place_of_a_sample_is_found(
    sampling: str, shard_sizes: list[np.ndarray], seed: int, data: st.DataObject
) -> None:
    order = any_order(data, sampling, shard_sizes, seed)
    begin, end = sorted(data.draw(st.lists(st.integers(0, 40_000), min_size=2, max_size=2, unique=True)))
    source, sample = order.picks(begin, end - begin)
    for s, sizes in enumerate(shard_sizes):
        wanted = np.array(data.draw(st.lists(st.integers(0, int(sizes.sum()) - 1), max_size=5, unique=True)), np.int64)
        index, places = order.occurrences(s, wanted, begin, end)
        read = [begin + np.flatnonzero((source == s) & (sample == one)) for one in wanted]
        assert places.tolist() == sorted(np.concatenate([*read, []]).tolist())
        assert sample[places - begin].tolist() == wanted[index].tolist()
