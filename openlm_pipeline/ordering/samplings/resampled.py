"""OpenLM's sampling with replacement, as a pure function of (shard sizes, weights, seed, batch, i).

Source: `open_lm/data.py` of mlfoundations/open_lm.

Like OpenLM: the source is drawn anew for each batch, with the weights (webdataset's RandomMix); shards are drawn
uniformly with replacement, and about 20,000 samples are mixed.

Unlike OpenLM, which depends on the number of GPUs and loader workers: there is one stream of batches instead of one per
worker, so the generators' streams differ; samples are mixed within groups of whole shards instead of in a sliding
buffer; and a run resumes from any sample.
"""

from collections.abc import Sequence

import numpy as np

from openlm_pipeline.ordering.mixture import key_of, uniform
from openlm_pipeline.ordering.permutation import mix_array
from openlm_pipeline.ordering.samplings import OneSourcePerBatch
from openlm_pipeline.ordering.shard_sequence import ShardSequence
from openlm_pipeline.registry import SAMPLINGS

_BUFFER_SAMPLES = 20_000


@SAMPLINGS.register("resampled")
class ResampledOrder(OneSourcePerBatch):
    """OpenLM's: shards drawn with replacement, the samples of about 20,000 mixed."""

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

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        while len(self._drawn[source]) <= positions[-1]:  # twice as many draws, the first half the same as before
            self._drawn[source] = self._draw(source, 2 * len(self._drawn[source].shards))
        drawn = self._drawn[source]
        windows = np.arange(0, len(drawn.shards), self._buffer_shards[source])
        keys = mix_array(np.arange(len(windows), dtype=np.uint64)) ^ np.uint64(key_of(self.seed, source, 1))
        return drawn.shuffled(positions, windows, keys)

    def coverage(self, source: int, positions: int) -> tuple[float, float]:
        """About what share of a source its first `positions` read twice or more, and what share they never read."""
        self.samples(source, np.array([positions - 1]))  # draws as far as that
        drawn, sizes = self._drawn[source], self.sizes[source]
        times = np.bincount(drawn.shards[: np.searchsorted(drawn.starts, positions)], minlength=len(sizes))
        return sizes[times > 1].sum() / sizes.sum(), sizes[times == 0].sum() / sizes.sum()
