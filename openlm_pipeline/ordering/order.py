"""The data order: sample i of a run is a pure function of (sizes, weights, seed, i).

Nothing depends on world size, workers or restarts: the state of a loader is i. `DataOrder`, the default, interleaves
sources in equal blocks; within a source, each sample comes once an epoch, in a new seeded order each epoch.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from openlm_pipeline.ordering.mixture import MixedOrder, StratifiedMixture, check_sources
from openlm_pipeline.ordering.openlm_modes import ManifestOrder, ResampledOrder
from openlm_pipeline.ordering.permutation import mix, permute_array
from openlm_pipeline.ordering.windowed import WindowedOrder

Sampling = Literal["permutation", "windowed", "resampled", "manifest"]


class Order(Protocol):
    """What a loader needs of an order."""

    def picks(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source[count], sample in that source[count]) of samples `start` .. `start + count` of the run, int64."""


class DataOrder(MixedOrder):
    """Each source as a whole permuted anew each epoch."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """
        Args:
            sizes: number of samples in each source, at least one.
            weights: share of each source, positive, in any scale.
            seed: chooses the permutations.

        Raises:
            ConfigError: a source has too small a share of the mixture.
        """
        check_sources(sizes, weights)
        super().__init__(StratifiedMixture(weights))
        self.sizes = tuple(sizes)
        self.seed = seed

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(positions, self.sizes[source])
        key = mix(mix(self.seed) ^ mix(source))
        return permute_array(within, self.sizes[source], epochs.astype(np.uint64) ^ np.uint64(key))


def make_order(
    sampling: Sampling,
    shard_sizes: Sequence[np.ndarray],
    weights: Sequence[float],
    seed: int,
    *,
    window_shards: int,
    batch: int,
) -> Order:
    """The order of a run.

    Args:
        shard_sizes: number of samples in each shard of each source.
        weights: share of each source, positive, in any scale.
        window_shards: shards whose samples `windowed` shuffles together.
        batch: consecutive samples that `resampled` and `manifest` take from one source.

    Raises:
        ConfigError: a source has too small a share of the mixture.
    """
    if sampling == "permutation":
        return DataOrder([int(np.sum(sizes)) for sizes in shard_sizes], weights, seed)
    if sampling == "windowed":
        return WindowedOrder(shard_sizes, weights, seed, window_shards)
    if sampling == "resampled":
        return ResampledOrder(shard_sizes, weights, seed, batch)
    if sampling == "manifest":
        return ManifestOrder(shard_sizes, weights, seed, batch)
    raise ValueError(f"unknown sampling {sampling!r}")
