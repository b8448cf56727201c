"""Orders of a run's samples, one module each: `training.sampling` names one."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from openlm_pipeline.ordering.mixture import MixedOrder, RandomMixture, checked_totals


class Sampling(MixedOrder):
    """An order, made as `Class(shard_sizes, weights, seed, **settings)`.

    `shard_sizes`: number of samples in each shard of each source; `weights`: share of each source, positive, in any
    scale; `seed` chooses all that is random. The constructor calls `super().__init__(mixture)`, and `samples` is a pure
    function of a source and positions in it: independent of world size, workers and restarts.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `training` that the constructor takes."""


class OneSourcePerBatch(Sampling):
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
