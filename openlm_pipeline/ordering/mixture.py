"""Mixtures: which source sample i of a run comes from, and its position among the samples of that source.

`MixedOrder` adds which sample of a source stands at a position, and is the base of all orders. It works in chunks of
about 16,000 samples, since numpy needs many at once to be fast; a batch is a slice of the chunks kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.ordering.permutation import mix, mix_array

_BLOCK = 4096
_CHUNK = 4 * _BLOCK
_KEPT_CHUNKS = 4


def key_of(seed: int, *numbers: int) -> int:
    """A 64-bit seed of its own for each sequence of numbers."""
    key = mix(seed)
    for number in numbers:
        key = mix(key ^ mix(number))
    return key


def uniform(key: int, first: int, count: int) -> np.ndarray:
    """Numbers `first` .. `first + count` of the random sequence `key`: float64[count] in [0, 1)."""
    bits = mix_array(np.arange(first, first + count, dtype=np.uint64) ^ np.uint64(key))
    return (bits >> np.uint64(11)) * 2.0**-53


class Mixture(Protocol):
    """Sources of the samples of a run."""

    chunk: int
    """Samples in a chunk."""

    def positions(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of chunk `number`: source[chunk], and how many of that source came before it in the run."""

    def before(self, number: int) -> np.ndarray:
        """How many samples of each source came before chunk `number`: int64[sources]."""

    def places(self, source: int, positions: np.ndarray) -> np.ndarray:
        """Which samples of the run the positions of a source are: int64, as long as `positions`."""


class StratifiedMixture:
    """Blocks of 4,096 samples with the same counts and the same interleaving of sources in each.

    In every prefix of a block each source's count is within one of its exact share (for two sources; below the number
    of sources in general).
    """

    chunk = _CHUNK

    def __init__(self, weights: Sequence[float]) -> None:
        """
        Raises:
            ConfigError: a source has too small a share to appear in a block.
        """
        exact = np.array([w / sum(weights) for w in weights]) * _BLOCK
        quotas = np.floor(exact).astype(np.int64)
        quotas[np.argsort(quotas - exact, kind="stable")[: _BLOCK - quotas.sum()]] += 1
        if quotas.min() == 0:
            raise ConfigError(
                f"source {quotas.argmin()} of the mixture has less than 1/{_BLOCK} of it; "
                "give it more weight or leave it out"
            )
        # The k-th sample of a source with quota q is due at (k + 1/2) / q of the block.
        source = np.repeat(np.arange(len(quotas)), quotas)
        rank = np.concatenate([np.arange(q) for q in quotas])
        order = np.lexsort((source, (rank + 0.5) / quotas[source]))
        blocks = np.arange(_CHUNK // _BLOCK)[:, None]
        self._source = np.tile(source[order], len(blocks))
        self._rank = (rank[order] + blocks * quotas[source[order]]).ravel()
        self._quotas = len(blocks) * quotas

    def positions(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self._source, self._rank + self.before(number)[self._source]

    def before(self, number: int) -> np.ndarray:
        return number * self._quotas

    def places(self, source: int, positions: np.ndarray) -> np.ndarray:
        chunk, rank = np.divmod(positions, self._quotas[source])
        return chunk * self.chunk + np.flatnonzero(self._source == source)[rank]


class RandomMixture:
    """One source a batch, drawn with the weights, as webdataset's RandomMix does."""

    def __init__(self, weights: Sequence[float], seed: int, batch: int) -> None:
        """
        Args:
            batch: consecutive samples that have the same source.
        """
        self._batch, self._batches = batch, -(-_CHUNK // batch)
        self.chunk = self._batches * batch
        self._key = key_of(seed)
        self._upper = np.cumsum(weights) / sum(weights)
        self._before = np.zeros((1, len(weights)), np.int64)
        """[chunk, source]: batches of each source before each chunk, as far as was asked so far."""

    def _draws(self, first: int, count: int) -> np.ndarray:
        drawn = np.searchsorted(self._upper, uniform(self._key, first, count), side="right")
        return np.minimum(drawn, len(self._upper) - 1)  # the last bound may be rounded to just below one

    def positions(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        batches = self.before(number) // self._batch
        drawn = self._draws(number * self._batches, self._batches)
        batches_before = np.empty_like(drawn)
        for s, already in enumerate(batches):
            batches_before[drawn == s] = already + np.arange((drawn == s).sum())
        position = batches_before[:, None] * self._batch + np.arange(self._batch)
        return np.repeat(drawn, self._batch), position.ravel()

    def before(self, number: int) -> np.ndarray:
        while (known := len(self._before)) <= number:
            more = min(known, 256)  # bounds what a far resume takes at once
            drawn = self._draws((known - 1) * self._batches, more * self._batches).reshape(more, self._batches)
            counts = np.stack([(drawn == s).sum(axis=1) for s in range(len(self._upper))], axis=1)
            self._before = np.concatenate([self._before, self._before[-1] + np.cumsum(counts, axis=0)])
        return self._before[number] * self._batch

    def places(self, source: int, positions: np.ndarray) -> np.ndarray:
        wanted, within = np.divmod(positions, self._batch)
        while len(wanted) and self.before(len(self._before) - 1)[source] <= positions.max():
            self.before(len(self._before))
        chunk = np.searchsorted(self._before[:, source], wanted, side="right") - 1
        batch = np.empty_like(wanted)
        for number in np.unique(chunk):
            here = chunk == number
            own = np.flatnonzero(self._draws(number * self._batches, self._batches) == source)
            batch[here] = number * self._batches + own[wanted[here] - self._before[number, source]]
        return batch * self._batch + within


class MixedOrder(ABC):
    """A mixture of sources, each with an endless order of its own samples."""

    start = 0
    """Sample of the run at which it begins."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._kept = lru_cache(_KEPT_CHUNKS)(self._picks_of_chunk)

    @abstractmethod
    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        """The samples of a source at increasing `positions` of its order, counted through all epochs: int64."""

    def find(self, source: int, samples: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Where samples stand at the positions first..last of their source's order, the inverse of `samples`.

        Returns:
            Indices in `samples`, and the positions, both int64[n] and sorted by position: a sample comes as often as
            it stands there.

        Raises:
            ConfigError: the order has no inverse.
        """
        raise ConfigError(
            f"{type(self).__name__} has no `find`, by which the steps that read a sample are known; give it one"
        )

    def occurrences(self, source: int, samples: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Where samples of a source come among the samples begin..end of the run, the inverse of `picks`.

        Returns:
            Indices in `samples`, and the samples of the run, both int64[n] and sorted by the latter.
        """
        first, last = (int(self.taken(at)[source]) for at in (begin, end))
        index, positions = self.find(source, samples, first, last)
        return index, self.mixture.places(source, positions)

    def taken(self, samples: int) -> np.ndarray:
        """How many positions of each source's order the first `samples` of the run take: int64[sources]."""
        number, offset = divmod(samples, self.mixture.chunk)
        before = self.mixture.before(number)
        return before + np.bincount(self.mixture.positions(number)[0][:offset], minlength=len(before))

    def of_source(self, source: int) -> tuple["MixedOrder", int, int]:
        """The order that a source's samples come in, the source's number there, and how many of its positions were
        taken before this order began."""
        return self, source, 0

    def _picks_of_chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        source, position = self.mixture.positions(number)
        sample = np.empty_like(position)
        for s in np.unique(source):
            here = source == s
            sample[here] = self.samples(int(s), position[here])
        return source, sample

    def picks(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source[count], sample in that source[count]) of samples `start` .. `start + count` of the run, int64.

        Raises:
            IndexError: `start` is negative or `count` is not positive.
        """
        if start < 0 or count < 1:
            raise IndexError(f"no {count} samples from {start}")
        first, offset = divmod(start, self.mixture.chunk)
        last = (start + count - 1) // self.mixture.chunk
        chunks = [self._kept(number) for number in range(first, last + 1)]
        source, sample = chunks[0] if first == last else map(np.concatenate, zip(*chunks))
        return source[offset : offset + count].copy(), sample[offset : offset + count].copy()


def checked_totals(shard_sizes: Sequence[int | np.ndarray], weights: Sequence[float]) -> list[int]:
    """Number of samples in each source.

    Args:
        shard_sizes: number of samples in each source, or in each of its shards.

    Raises:
        ValueError: there is no source, one without samples, or one without a positive weight.
    """
    num_samples = [int(np.sum(sizes)) for sizes in shard_sizes]
    if len(num_samples) != len(weights) or not num_samples or min(num_samples) < 1 or min(weights) <= 0:
        raise ValueError("every source needs at least one sample and a positive weight")
    return num_samples
