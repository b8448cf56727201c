"""Orders of a run's samples, one module each: `training.sampling` names one."""

from typing import ClassVar

from openlm_pipeline.ordering.mixture import MixedOrder


class Sampling(MixedOrder):
    """An order, made as `Class(shard_sizes, weights, seed, **settings)`.

    `shard_sizes`: number of samples in each shard of each source; `weights`: share of each source, positive, in any
    scale; `seed` chooses all that is random. The constructor calls `super().__init__(mixture)`, and `samples` is a pure
    function of a source and positions in it: independent of world size, workers and restarts.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `training` that the constructor takes."""
