"""OpenLM's two ways of sampling, as pure functions of (shard sizes, weights, seed, batch, i).

Source: `open_lm/data.py` and `open_lm/file_utils.py` of mlfoundations/open_lm.

Like OpenLM: the source is drawn anew for each batch, with the weights (webdataset's RandomMix). `resampled` draws
shards uniformly with replacement and mixes about 20,000 samples. `manifest` takes the shards of pass p in the order of
numpy's `default_rng(seed + p)`, which is OpenLM's with `--shard-shuffle-seed`, and reads each from first to last.

Unlike OpenLM, which depends on the number of GPUs and loader workers: there is one stream of batches instead of one a
worker, so the generators' streams differ and a batch of `manifest` comes from one shard or two neighbours; samples are
mixed within groups of whole shards instead of in a sliding buffer; no sample is left out to make workers even; a source
that is exhausted starts its next pass alone, so the weights hold in total; and a run goes on from any sample.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from openlm_pipeline.ordering.mixture import MixedOrder, RandomMixture, check_sources, key_of, uniform
from openlm_pipeline.ordering.permutation import mix_array
from openlm_pipeline.ordering.windowed import ShardSequence

_BUFFER_SAMPLES = 20_000
_MASK = (1 << 64) - 1


class ResampledOrder(MixedOrder):
    """Shards drawn with replacement, the samples of about 20,000 mixed."""

    def __init__(self, shard_sizes: Sequence[np.ndarray], weights: Sequence[float], seed: int, batch: int) -> None:
        """
        Args:
            shard_sizes: number of samples in each shard of each source.
            weights: chance of each source, positive, in any scale.
            batch: consecutive samples that come from one source.
        """
        totals = [int(np.sum(sizes)) for sizes in shard_sizes]
        check_sources(totals, weights)
        super().__init__(RandomMixture(weights, seed, batch))
        self._sizes, self._seed = shard_sizes, seed
        self._buffer_shards = [
            max(1, round(_BUFFER_SAMPLES * len(sizes) / total)) for sizes, total in zip(shard_sizes, totals)
        ]
        self._drawn = [self._draw(source, 8 * shards) for source, shards in enumerate(self._buffer_shards)]

    def _draw(self, source: int, count: int) -> ShardSequence:
        sizes = self._sizes[source]
        shards = (uniform(key_of(self._seed, source, 0), 0, count) * len(sizes)).astype(np.int64)
        return ShardSequence(shards, sizes)

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        while len(self._drawn[source]) <= positions[-1]:  # twice as many draws, the first half the same as before
            self._drawn[source] = self._draw(source, 2 * len(self._drawn[source].shards))
        drawn = self._drawn[source]
        windows = np.arange(0, len(drawn.shards), self._buffer_shards[source])
        keys = mix_array(np.arange(len(windows), dtype=np.uint64)) ^ np.uint64(key_of(self._seed, source, 1))
        return drawn.shuffled(positions, windows, keys)


class ManifestOrder(MixedOrder):
    """Passes over all shards, shuffled by shard only."""

    def __init__(self, shard_sizes: Sequence[np.ndarray], weights: Sequence[float], seed: int, batch: int) -> None:
        """
        Args:
            shard_sizes: number of samples in each shard of each source.
            weights: chance of each source, positive, in any scale.
            seed: OpenLM's shard shuffle seed.
            batch: consecutive samples that come from one source.
        """
        self._totals = [int(np.sum(sizes)) for sizes in shard_sizes]
        check_sources(self._totals, weights)
        super().__init__(RandomMixture(weights, seed, batch))
        self._sizes, self._seed = shard_sizes, seed
        self._passes = lru_cache(2 * len(shard_sizes))(self._make_passes)

    def _make_passes(self, source: int, first: int, count: int) -> ShardSequence:
        """The shards of `count` passes one after the other."""
        sizes = self._sizes[source]
        seeds = ((self._seed + number) & _MASK for number in range(first, first + count))
        return ShardSequence(np.concatenate([np.random.default_rng(s).permutation(len(sizes)) for s in seeds]), sizes)

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        total = self._totals[source]
        first, last = int(positions[0] // total), int(positions[-1] // total)
        return self._passes(source, first, last - first + 1).in_order(positions - first * total)
