"""OpenLM's sampling by manifest, as a pure function of (shard sizes, weights, seed, batch, i).

Source: `open_lm/file_utils.py` of mlfoundations/open_lm.

Like OpenLM: the source is drawn anew for each batch, with the weights; the shards of pass p come in the order of
numpy's `default_rng(seed + p)`, which is OpenLM's with `--shard-shuffle-seed`, each read from first to last.

Unlike OpenLM: there is one stream of batches instead of one per worker, so a batch comes from one shard or two
neighbours; no sample is left out to make workers even; a source that is exhausted starts its next pass alone, so the
weights hold in total; and a run resumes from any sample.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from openlm_pipeline.ordering.samplings import OneSourcePerBatch
from openlm_pipeline.ordering.shard_sequence import ShardSequence
from openlm_pipeline.registry import SAMPLINGS

_MASK = (1 << 64) - 1


@SAMPLINGS.register("manifest")
class ManifestOrder(OneSourcePerBatch):
    """OpenLM's: passes over all shards, shuffled by shard only."""

    def __init__(
        self, shard_sizes: Sequence[np.ndarray], weights: Sequence[float], seed: int, source_batch: int
    ) -> None:
        """
        Args:
            seed: OpenLM's shard shuffle seed.
            shard_sizes, weights, source_batch: as for `OneSourcePerBatch`.
        """
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
