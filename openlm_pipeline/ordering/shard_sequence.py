"""Shards of a source one after the other, and the samples in them by position: what orders that read few shards use."""

import numpy as np

from openlm_pipeline.ordering.permutation import permute_array


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
