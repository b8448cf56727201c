"""Orders in which each sample comes once per epoch, sources interleaved in equal blocks.

The windowed one reads few shards at a time, for shards that are far away. Each epoch of a source takes its shards in a
new seeded order and cuts it into windows of W consecutive shards, the last one shorter; the samples of a window are
permuted together. So a reader needs the shards of one window, then those of the next. Still a pure function of (shard
sizes, weights, seed, W, i).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from openlm_pipeline.ordering.mixture import StratifiedMixture, checked_totals, key_of
from openlm_pipeline.ordering.permutation import mix, mix_array, permute_array, unpermute_array
from openlm_pipeline.ordering.samplings import Sampling, ShardSequence, between, by_position
from openlm_pipeline.registry import SAMPLINGS


@SAMPLINGS.register("permutation")
class DataOrder(Sampling):
    """Each sample once per epoch, each source as a whole permuted anew in each."""

    def __init__(self, sizes: Sequence[int | np.ndarray], weights: Sequence[float], seed: int) -> None:
        """
        Args:
            sizes: number of samples in each source, at least one, or in each of its shards.
            weights: share of each source, positive, in any scale.
            seed: chooses the permutations.

        Raises:
            ConfigError: a source has too small a share of the mixture.
        """
        self.sizes = tuple(checked_totals(sizes, weights))
        super().__init__(StratifiedMixture(weights))
        self.seed = seed

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(positions, self.sizes[source])
        return permute_array(within, self.sizes[source], epochs.astype(np.uint64) ^ self._key(source))

    def _key(self, source: int) -> np.uint64:
        return np.uint64(mix(mix(self.seed) ^ mix(source)))

    def find(self, source: int, samples: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.sizes[source]
        epochs = np.repeat(np.arange(first // size, -(-last // size)), len(samples))
        index = np.tile(np.arange(len(samples)), len(epochs) // max(1, len(samples)))
        places = unpermute_array(samples[index], size, epochs.astype(np.uint64) ^ self._key(source))
        return between(*by_position(index, epochs * size + places), first, last)


@SAMPLINGS.register("windowed")
class WindowedOrder(Sampling):
    """Each sample once per epoch, shuffled within `window_shards` shards at a time, for remote shards."""

    settings = ("window_shards",)

    def __init__(
        self, shard_sizes: Sequence[np.ndarray], weights: Sequence[float], seed: int, window_shards: int
    ) -> None:
        """
        Args:
            shard_sizes: number of samples in each shard of each source.
            weights: share of each source, positive, in any scale.
            seed: chooses the permutations.
            window_shards: shards whose samples are shuffled together.

        Raises:
            ConfigError: a source has too small a share of the mixture.
        """
        self._totals = checked_totals(shard_sizes, weights)
        super().__init__(StratifiedMixture(weights))
        self._sizes, self._seed, self._window_shards = shard_sizes, seed, window_shards
        self._epochs = lru_cache(2 * len(shard_sizes))(self._make_epochs)

    def _make_epochs(self, source: int, first: int, count: int) -> tuple[ShardSequence, np.ndarray, np.ndarray]:
        """The shards of `count` epochs one after the other; first shard and key of each window."""
        sizes, key = self._sizes[source], np.uint64(key_of(self._seed, source, 0))
        epochs = np.repeat(np.arange(first, first + count, dtype=np.uint64), len(sizes))
        shards = permute_array(np.tile(np.arange(len(sizes)), count), len(sizes), mix_array(epochs) ^ key)
        windows = np.arange(0, len(sizes), self._window_shards)
        numbers = np.arange(first * len(windows), (first + count) * len(windows), dtype=np.uint64)
        keys = mix_array(numbers) ^ np.uint64(key_of(self._seed, source, 1))
        return ShardSequence(shards, sizes), (np.arange(count)[:, None] * len(sizes) + windows).ravel(), keys

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        total = self._totals[source]
        first, last = int(positions[0] // total), int(positions[-1] // total)
        sequence, windows, keys = self._epochs(source, first, last - first + 1)
        return sequence.shuffled(positions - first * total, windows, keys)

    def find(self, source: int, samples: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        total = self._totals[source]
        epoch = first // total
        sequence, windows, keys = self._epochs(source, epoch, max(1, -(-last // total) - epoch))
        index, positions = sequence.find_shuffled(samples, windows, keys)
        return between(index, positions + epoch * total, first, last)
