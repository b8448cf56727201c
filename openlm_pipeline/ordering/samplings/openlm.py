"""OpenLM's samplings, as pure functions of (shard sizes, weights, seed, batch, i): of mlfoundations/open_lm.

Like OpenLM: the source is drawn anew for each batch, with the weights (webdataset's RandomMix). Unlike OpenLM: there is
one stream of batches instead of one per worker, and a run resumes from any sample.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from openlm_pipeline.ordering.mixture import RandomMixture, checked_totals, key_of, uniform
from openlm_pipeline.ordering.permutation import mix_array
from openlm_pipeline.ordering.samplings import Sampling, ShardSequence, between
from openlm_pipeline.registry import SAMPLINGS

_MASK = (1 << 64) - 1
_BUFFER_SAMPLES = 20_000


class _OneSourcePerBatch(Sampling):
    """Base of OpenLM's samplings, which draw the source anew for each batch, with the weights."""

    settings = ("source_batch",)

    def __init__(
        self, shard_sizes: Sequence[np.ndarray], weights: Sequence[float], seed: int, source_batch: int
    ) -> None:
        """
        Args:
            shard_sizes: number of samples in each shard of each source.
            weights: chance of each source, positive, in any scale.
            seed: chooses the sources, and what else is random.
            source_batch: consecutive samples that come from one source.
        """
        self.sizes, self.seed = shard_sizes, seed
        self.totals = checked_totals(shard_sizes, weights)
        super().__init__(RandomMixture(weights, seed, source_batch))


@SAMPLINGS.register("manifest")
class ManifestOrder(_OneSourcePerBatch):
    """OpenLM's: passes over all shards, shuffled by shard only.

    Source: `open_lm/file_utils.py`. The shards of pass p come in the order of numpy's `default_rng(seed + p)`, which is
    OpenLM's with `--shard-shuffle-seed`, each read from first to last. Unlike there, a batch comes from one shard or
    two neighbours; no sample is left out to make workers even; and a source that is exhausted starts its next pass
    alone, so the weights hold in total.
    """

    def __init__(
        self, shard_sizes: Sequence[np.ndarray], weights: Sequence[float], seed: int, source_batch: int
    ) -> None:
        super().__init__(shard_sizes, weights, seed, source_batch)
        self._passes = lru_cache(2 * len(shard_sizes))(self._make_passes)

    def _make_passes(self, source: int, first: int, count: int) -> ShardSequence:
        """The shards of `count` passes one after the other."""
        sizes = self.sizes[source]
        seeds = ((self.seed + number) & _MASK for number in range(first, first + count))
        return ShardSequence(np.concatenate([np.random.default_rng(s).permutation(len(sizes)) for s in seeds]), sizes)

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        total = self.totals[source]
        first, last = int(positions[0] // total), int(positions[-1] // total)
        return self._passes(source, first, last - first + 1).in_order(positions - first * total)

    def find(self, source: int, samples: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        total = self.totals[source]
        number = first // total
        sequence = self._passes(source, number, max(1, -(-last // total) - number))
        index, positions = sequence.find_in_order(samples)
        return between(index, positions + number * total, first, last)


@SAMPLINGS.register("resampled")
class ResampledOrder(_OneSourcePerBatch):
    """OpenLM's: shards drawn with replacement, the samples of about 20,000 mixed.

    Source: `open_lm/data.py`. Shards are drawn uniformly. Unlike there, where the order depends on the number of GPUs
    and loader workers, the generators' streams differ, and samples are mixed within groups of whole shards instead of
    in a sliding buffer.
    """

    def __init__(
        self, shard_sizes: Sequence[np.ndarray], weights: Sequence[float], seed: int, source_batch: int
    ) -> None:
        super().__init__(shard_sizes, weights, seed, source_batch)
        self._buffer_shards = [
            max(1, round(_BUFFER_SAMPLES * len(sizes) / total)) for sizes, total in zip(shard_sizes, self.totals)
        ]
        self._drawn = [self._draw(source, 8 * shards) for source, shards in enumerate(self._buffer_shards)]

    def _draw(self, source: int, count: int) -> ShardSequence:
        sizes = self.sizes[source]
        shards = (uniform(key_of(self.seed, source, 0), 0, count) * len(sizes)).astype(np.int64)
        return ShardSequence(shards, sizes)

    def _far_as(self, source: int, position: int) -> tuple[ShardSequence, np.ndarray, np.ndarray]:
        """Draws that reach `position`; first shard and key of each window."""
        while len(self._drawn[source]) <= position:  # twice as many draws, the first half the same as before
            self._drawn[source] = self._draw(source, 2 * len(self._drawn[source].shards))
        drawn = self._drawn[source]
        windows = np.arange(0, len(drawn.shards), self._buffer_shards[source])
        keys = mix_array(np.arange(len(windows), dtype=np.uint64)) ^ np.uint64(key_of(self.seed, source, 1))
        return drawn, windows, keys

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        drawn, windows, keys = self._far_as(source, int(positions[-1]))
        return drawn.shuffled(positions, windows, keys)

    def find(self, source: int, samples: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        drawn, windows, keys = self._far_as(source, last - 1)
        return between(*drawn.find_shuffled(samples, windows, keys), first, last)

    def coverage(self, source: int, positions: int) -> tuple[float, float]:
        """About what share of a source its first `positions` read twice or more, and what share they never read."""
        drawn, sizes = self._far_as(source, positions - 1)[0], self.sizes[source]
        times = np.bincount(drawn.shards[: np.searchsorted(drawn.starts, positions)], minlength=len(sizes))
        return sizes[times > 1].sum() / sizes.sum(), sizes[times == 0].sum() / sizes.sum()
