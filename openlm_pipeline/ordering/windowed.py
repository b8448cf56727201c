"""Orders that read few shards at a time, for shards that are far away.

Each epoch of a source takes its shards in a new seeded order and cuts it into windows of W consecutive shards, the last
one shorter; the samples of a window are permuted together. So each sample comes once an epoch, and a reader needs the
shards of one window, then those of the next. Still a pure function of (shard sizes, weights, seed, W, i).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from openlm_pipeline.ordering.mixture import MixedOrder, StratifiedMixture, check_sources, key_of
from openlm_pipeline.ordering.permutation import mix_array, permute_array


class ShardSequence:
    """Shards of one source in the order in which they are read; a position counts samples through that order."""

    def __init__(self, shards: np.ndarray, sizes: np.ndarray) -> None:
        """
        Args:
            shards: numbers of the shards, int64[n]; one may come several times.
            sizes: samples in each shard of the source.
        """
        self.shards = shards
        self.starts = np.concatenate([[0], np.cumsum(sizes[shards])])
        """Position at which each shard begins, and at last where all end: int64[n + 1]."""
        self._shift = (np.cumsum(sizes) - sizes)[shards] - self.starts[:-1]

    def __len__(self) -> int:
        """Samples in all its shards."""
        return int(self.starts[-1])

    def in_order(self, positions: np.ndarray) -> np.ndarray:
        """Samples at `positions`, each shard read from its first sample to its last."""
        return positions + self._shift[np.searchsorted(self.starts, positions, side="right") - 1]

    def shuffled(self, positions: np.ndarray, windows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Samples at `positions`, permuted within windows of consecutive shards.

        Args:
            windows: index in the sequence of the first shard of each window, the first one's is 0: int64[w].
            keys: seed of each window's permutation: uint64[w].
        """
        bounds = self.starts[np.append(windows, len(self.shards))]
        window = np.searchsorted(bounds, positions, side="right") - 1
        start, end = bounds[window], bounds[window + 1]
        return self.in_order(start + permute_array(positions - start, end - start, keys[window]))


class WindowedOrder(MixedOrder):
    """Samples shuffled within windows of shards."""

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
        self._totals = [int(np.sum(sizes)) for sizes in shard_sizes]
        check_sources(self._totals, weights)
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
