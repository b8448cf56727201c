"""The data order: sample i of a run is a pure function of sizes, weights, seed and i."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.ordering import make_order
from openlm_pipeline.ordering.permutation import mix, permute_array
from openlm_pipeline.ordering.samplings.epochs import DataOrder, WindowedOrder
from openlm_pipeline.ordering.samplings.openlm import ManifestOrder, ResampledOrder

seeds = st.integers(0, 2**63)


def permute(index: int, size: int, seed: int) -> int:
    """Black and Rogaway's Feistel network with cycle walking, for one index."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = [mix(mix(seed) ^ r) for r in range(6)]
    while True:
        left, right = index >> half, index & low
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & low)
        index = (left << half) | right
        if index < size:
            return index


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 600), seed=seeds)
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute_array(np.arange(size), size, seed).tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 2**48), seed=seeds, data=st.data())
def test_permute_stays_in_a_large_domain_and_hits_nothing_twice(size: int, seed: int, data: st.DataObject) -> None:
    picked = data.draw(st.sets(st.integers(0, size - 1), max_size=20))
    images = {permute(i, size, seed) for i in picked}
    assert len(images) == len(picked)
    assert all(0 <= image < size for image in images)


@settings(deadline=None)
@given(size=st.integers(1, 2**48), seed=seeds, data=st.data())
def test_an_array_is_permuted_as_its_elements_are(size: int, seed: int, data: st.DataObject) -> None:
    picked = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    assert permute_array(np.array(picked, np.int64), size, seed).tolist() == [permute(i, size, seed) for i in picked]


@pytest.mark.parametrize("index", [-1, 5])
def test_permute_refuses_what_is_outside(index: int) -> None:
    with pytest.raises(IndexError):
        permute_array(np.array([0, index]), 5, 0)


def test_permute_moves_every_index_everywhere() -> None:
    """Over many seeds each index goes to each place about equally often: chi-square over 8 x 8 cells."""
    num_seeds = 2000
    counts = Counter((i, permute(i, 8, seed)) for seed in range(num_seeds) for i in range(8))
    expected = num_seeds / 8
    chi_square = sum((counts[i, j] - expected) ** 2 / expected for i in range(8) for j in range(8))
    assert chi_square < 100, chi_square  # 49 degrees of freedom: 1 in 30,000 seeds' sets is above 93


def test_the_order_of_a_seed_is_the_same_in_every_version() -> None:
    """A run that is resumed after an upgrade continues with the samples it would have had."""
    source, sample = DataOrder([301, 67], [3, 1], 0).picks(8190, 8)
    assert source.tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert sample.tolist() == [24, 141, 81, 64, 14, 295, 122, 96]


def test_each_epoch_and_each_seed_and_each_source_has_its_own_order() -> None:
    source, sample = DataOrder([50, 50], [1, 1], 3).picks(0, 200)
    epochs = {tuple(sample[source == s][k : k + 50]) for s in (0, 1) for k in (0, 50)}
    other_seed = {tuple(DataOrder([50], [1], seed).picks(0, 50)[1]) for seed in (3, 4)}
    assert len(epochs) == 4 and len(other_seed) == 2
    assert all(epoch != tuple(range(50)) for epoch in epochs)


def test_a_source_in_windows_needs_few_shards_at_a_time() -> None:
    """Each run of W shards is read whole before the next begins, its samples well mixed."""
    sizes, window = [40, 30, 50, 20, 60, 45, 5], 3
    ends = np.cumsum(sizes)
    _, sample = WindowedOrder([np.array(sizes)], [1], 7, window).picks(0, 2 * sum(sizes))
    shards = np.searchsorted(ends, sample, side="right")
    windows = []
    for epoch in np.split(shards, 2):
        while len(epoch):
            seen = set(epoch[:40].tolist())  # mixed: 40 samples of at most 155 are enough to see every large shard
            length = sum(sizes[k] for k in set(epoch[: sum(sizes[k] for k in seen)].tolist()))
            windows.append(set(epoch[:length].tolist()))
            assert Counter(epoch[:length].tolist()) == {k: sizes[k] for k in windows[-1]}
            epoch = epoch[length:]
    assert [len(w) for w in windows] == [3, 3, 1, 3, 3, 1]
    assert windows[:3] != windows[3:], "both epochs read their shards in the same order"


def test_resampled_draws_shards_uniformly_whatever_their_size() -> None:
    sizes = np.array([3000, 1000, 2000, 500])
    _, sample = ResampledOrder([sizes], [1], 11, 8).picks(0, 2_000_000)
    shards = np.searchsorted(np.cumsum(sizes), sample, side="right")
    draws = np.bincount(shards) / sizes  # each draw gives all samples of its shard
    expected = draws.sum() / 4
    assert 1100 < draws.sum() < 1350
    assert ((draws - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom: 1 in 1,000


def test_resampled_mixes_about_twenty_thousand_samples() -> None:
    sizes = np.full(1000, 1000)
    _, sample = ResampledOrder([sizes], [1], 0, 8).picks(0, 60_000)
    shards = sample // 1000
    groups = [set(part) for part in np.split(shards, 3)]
    assert all(15 <= len(group) <= 20 for group in groups)  # 20 draws out of 1,000; some may be the same shard
    assert all(set(part[:1000]) == group for part, group in zip(np.split(shards, 3), groups))


@pytest.mark.parametrize("seed", [0, 42])
def test_manifest_takes_shards_as_openlm_shuffles_its_manifest(seed: int) -> None:
    """OpenLM shuffles the list of manifest lines with numpy's `default_rng(seed + pass)`."""
    sizes = np.array([5, 1, 3, 2, 4, 6])
    first = np.cumsum(sizes) - sizes
    expected = []
    for number in range(3):
        lines = list(range(6))
        np.random.default_rng(seed + number).shuffle(lines)
        expected += [sample for k in lines for sample in range(first[k], first[k] + sizes[k])]
    _, sample = ManifestOrder([sizes], [1], seed, 4).picks(0, 3 * 21)
    assert sample.tolist() == expected


@pytest.mark.parametrize("sampling", ["resampled", "manifest"])
def test_openlm_takes_each_batch_from_one_source_drawn_with_the_weights(sampling: str) -> None:
    order = make_order(sampling, [np.full(9, 100), np.full(4, 100)], [3, 1], 5, window_shards=1, source_batch=8)
    batches = order.picks(0, 8 * 20_000)[0].reshape(-1, 8)
    assert (batches == batches[:, :1]).all()
    drawn = batches[:, 0]
    assert abs(drawn.mean() - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    repeats = (drawn[1:] == drawn[:-1]).mean()  # draws are independent: 10 / 16 of neighbours are equal
    assert abs(repeats - 0.625) < 4 * (0.625 * 0.375 / 20_000) ** 0.5


@pytest.mark.parametrize("sampling", ["windowed", "resampled", "manifest"])
def test_an_order_goes_on_from_far_away_as_from_the_start(sampling: str) -> None:
    """Tables that grow with the run give the same samples whether they grew in one step or in many."""
    sizes = [np.array([7000, 3000]), np.array([1100])]
    walked = make_order(sampling, sizes, [2, 1], 3, window_shards=1, source_batch=8)
    for start in range(0, 600_000, 9_999):
        walked.picks(start, 16)
    fresh = make_order(sampling, sizes, [2, 1], 3, window_shards=1, source_batch=8)
    assert np.array_equal(fresh.picks(600_000, 500), walked.picks(600_000, 500))


@pytest.mark.parametrize(
    ("sizes", "weights"), [([], []), ([1], [1, 2]), ([0], [1]), ([1, 1], [1, 0]), ([1, 1], [1, -1])]
)
@pytest.mark.parametrize("sampling", ["permutation", "windowed", "resampled", "manifest"])
def test_impossible_mixtures_are_refused(sampling: str, sizes: list[int], weights: list[float]) -> None:
    shard_sizes = [np.array([size]) for size in sizes]
    with pytest.raises(ValueError, match="at least one sample and a positive weight"):
        make_order(sampling, shard_sizes, weights, 0, window_shards=2, source_batch=8)


@pytest.mark.parametrize("sampling", ["permutation", "windowed"])
def test_a_share_too_small_for_a_block_is_an_error_for_the_user(sampling: str) -> None:
    with pytest.raises(ConfigError, match=r"source 1 of the mixture has less than 1/4096"):
        make_order(sampling, [np.array([10])] * 2, [1, 1e-6], 0, window_shards=2, source_batch=8)


@pytest.mark.parametrize(("start", "count"), [(-1, 5), (3, 0), (3, -2)])
def test_samples_before_the_first_are_refused(start: int, count: int) -> None:
    with pytest.raises(IndexError):
        DataOrder([10], [1], 0).picks(start, count)
