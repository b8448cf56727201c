"""The data order: sample i of a run is a pure function of (sizes, weights, seed, i).

Sources are interleaved so that in every prefix each source's count is within one of its exact share (for two sources;
below the number of sources in general). Within a source, each sample comes once an epoch, in a new seeded order each
epoch. Nothing depends on world size, workers or restarts: the state of a loader is i.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from openlm_pipeline.ordering.permutation import mix, permute

_BLOCK = 4096


class DataOrder:
    """Maps a sample number of the run to (source, sample in the source)."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """
        Args:
            sizes: number of samples in each source, at least one.
            weights: share of each source, positive, in any scale.
            seed: chooses the permutations.
        """
        if len(sizes) != len(weights) or not sizes or min(sizes) < 1 or min(weights) <= 0:
            raise ValueError("every source needs at least one sample and a positive weight")
        self.sizes = tuple(sizes)
        total = sum(weights)
        self.shares = tuple(w / total for w in weights)
        self.seed = seed

    @cached_property
    def _block(self) -> tuple[np.ndarray, np.ndarray]:
        """For one block of the mixture: source[_BLOCK] and how many of that source came before it in the block."""
        quotas = np.floor(np.array(self.shares) * _BLOCK).astype(np.int64)
        missing = _BLOCK - quotas.sum()
        remainders = np.array(self.shares) * _BLOCK - quotas
        quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
        if quotas.min() == 0:
            raise ValueError(f"a source has less than 1/{_BLOCK} of the mixture; give it more weight or leave it out")
        # The k-th sample of a source with quota q is due at (k + 1/2) / q of the block.
        due = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
        source = np.repeat(np.arange(len(quotas)), quotas)
        order = np.lexsort((source, due))
        rank = np.concatenate([np.arange(q) for q in quotas])
        return source[order], rank[order]

    @cached_property
    def _quotas(self) -> np.ndarray:
        return np.bincount(self._block[0], minlength=len(self.sizes))

    def __getitem__(self, i: int) -> tuple[int, int]:
        """(source, sample in the source) of sample i of the run, i >= 0."""
        block, offset = divmod(i, _BLOCK)
        source, rank = int(self._block[0][offset]), int(self._block[1][offset])
        epoch, position = divmod(block * int(self._quotas[source]) + rank, self.sizes[source])
        return source, permute(position, self.sizes[source], mix(mix(self.seed) ^ mix(source)) ^ epoch)
