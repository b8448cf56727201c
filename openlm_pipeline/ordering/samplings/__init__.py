"""Orders of a run's samples: `training.sampling` names one."""

from typing import ClassVar

import numpy as np

from openlm_pipeline.ordering.mixture import MixedOrder
from openlm_pipeline.ordering.permutation import permute_array, unpermute_array


class Sampling(MixedOrder):
    """An order, made as `Class(shard_sizes, weights, seed, **settings)`.

    `shard_sizes`: number of samples in each shard of each source; `weights`: share of each source, positive, in any
    scale; `seed` chooses all that is random. The constructor calls `super().__init__(mixture)`, and `samples` is a pure
    function of a source and positions in it: independent of world size, workers and restarts.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `training` that the constructor takes."""


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
        self._first = np.cumsum(sizes) - sizes
        self._shift = self._first[shards] - self.starts[:-1]

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

    def find_in_order(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `in_order`: indices in `samples`, and positions, sorted by position."""
        own = np.searchsorted(self._first, samples, side="right") - 1
        by_shard = np.argsort(self.shards, kind="stable")
        begins, ends = (np.searchsorted(self.shards[by_shard], own, side=side) for side in ("left", "right"))
        times = ends - begins
        index = np.repeat(np.arange(len(samples)), times)
        turn = np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)
        return by_position(index, samples[index] - self._shift[by_shard[begins[index] + turn]])

    def find_shuffled(
        self, samples: np.ndarray, windows: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `shuffled`, with the same `windows` and `keys`: as `find_in_order`."""
        index, read = self.find_in_order(samples)
        bounds = self.starts[np.append(windows, len(self.shards))]
        window = np.searchsorted(bounds, read, side="right") - 1
        start, end = bounds[window], bounds[window + 1]
        return by_position(index, start + unpermute_array(read - start, end - start, keys[window]))


def by_position(index: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sorted by position."""
    order = np.argsort(positions, kind="stable")
    return index[order], positions[order]


def between(index: np.ndarray, positions: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Of what is sorted by position, that at first..last."""
    some = slice(*np.searchsorted(positions, [first, last]))
    return index[some], positions[some]
