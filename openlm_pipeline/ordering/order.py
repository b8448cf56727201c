"""The data order: sample i of a run is a pure function of (sizes, weights, seed, i).

Sources are interleaved in blocks of 4,096 samples, all with the same counts. In every prefix of a block each source's
count is within one of its exact share (for two sources; below the number of sources in general). Within a source, each
sample comes once an epoch, in a new seeded order each epoch. Nothing depends on world size, workers or restarts: the
state of a loader is i.
"""

from collections.abc import Sequence

import numpy as np

from openlm_pipeline.errors import ConfigError
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

        Raises:
            ConfigError: a source has too small a share to appear in a block.
        """
        if len(sizes) != len(weights) or not sizes or min(sizes) < 1 or min(weights) <= 0:
            raise ValueError("every source needs at least one sample and a positive weight")
        self.sizes = tuple(sizes)
        total = sum(weights)
        self.shares = tuple(w / total for w in weights)
        self.seed = seed
        self._block = self._interleave()
        self._quotas = np.bincount(self._block[0], minlength=len(self.sizes))

    def _interleave(self) -> tuple[np.ndarray, np.ndarray]:
        """For one block of the mixture: source[_BLOCK] and how many of that source came before it in the block."""
        quotas = np.floor(np.array(self.shares) * _BLOCK).astype(np.int64)
        missing = _BLOCK - quotas.sum()
        remainders = np.array(self.shares) * _BLOCK - quotas
        quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
        if quotas.min() == 0:
            raise ConfigError(
                f"source {quotas.argmin()} of the mixture has less than 1/{_BLOCK} of it; "
                "give it more weight or leave it out"
            )
        # The k-th sample of a source with quota q is due at (k + 1/2) / q of the block.
        due = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
        source = np.repeat(np.arange(len(quotas)), quotas)
        order = np.lexsort((source, due))
        rank = np.concatenate([np.arange(q) for q in quotas])
        return source[order], rank[order]

    def __getitem__(self, i: int) -> tuple[int, int]:
        """(source, sample in the source) of sample i of the run, i >= 0."""
        block, offset = divmod(i, _BLOCK)
        source, rank = int(self._block[0][offset]), int(self._block[1][offset])
        epoch, position = divmod(block * int(self._quotas[source]) + rank, self.sizes[source])
        return source, permute(position, self.sizes[source], mix(mix(self.seed) ^ mix(source)) ^ epoch)
