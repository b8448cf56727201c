"""The default order: sources interleaved in equal blocks, each source a new seeded permutation each epoch."""

from collections.abc import Sequence

import numpy as np

from openlm_pipeline.ordering.mixture import StratifiedMixture, checked_totals
from openlm_pipeline.ordering.permutation import mix, permute_array
from openlm_pipeline.ordering.samplings import Sampling
from openlm_pipeline.registry import SAMPLINGS


@SAMPLINGS.register("permutation")
class DataOrder(Sampling):
    """Each sample once per epoch, each source as a whole permuted anew in each."""

    def __init__(self, sizes: Sequence[int | np.ndarray], weights: Sequence[float], seed: int) -> None:
        """
        Args:
            sizes: number of samples in each source, at least one, or in each of its shards.
            weights: share of each source, positive, in any scale.
            seed: chooses the permutations.

        Raises:
            ConfigError: a source has too small a share of the mixture.
        """
        self.sizes = tuple(checked_totals(sizes, weights))
        super().__init__(StratifiedMixture(weights))
        self.seed = seed

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(positions, self.sizes[source])
        key = mix(mix(self.seed) ^ mix(source))
        return permute_array(within, self.sizes[source], epochs.astype(np.uint64) ^ np.uint64(key))
