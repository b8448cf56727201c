"""The data order: sample i of a run is a pure function of (sizes, weights, seed, i).

Nothing depends on world size, workers or restarts: the state of a loader is i.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.ordering.continued import order_record, recorded_order
from openlm_pipeline.registry import SAMPLINGS


class Order(Protocol):
    """What a loader needs of an order."""

    def picks(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source[count], sample in that source[count]) of samples `start` .. `start + count` of the run, int64."""


def make_order(
    sampling: str, shard_sizes: Sequence[np.ndarray], weights: Sequence[float], seed: int, **settings: Any
) -> Order:
    """The order of a run.

    Args:
        sampling: a name in `SAMPLINGS`.
        shard_sizes: number of samples in each shard of each source.
        weights: share of each source, positive, in any scale.
        settings: fields of `training`; the sampling takes those that are its own.

    Raises:
        ConfigError: there is no such sampling, or a source has too small a share of the mixture.
    """
    made = SAMPLINGS[sampling]
    return made(shard_sizes, weights, seed, **{name: settings[name] for name in made.settings})


def order_of(
    experiment: Experiment, shard_sizes: Sequence[np.ndarray], identity: Mapping[str, Any] | None = None
) -> Order:
    """The order of a recipe's training datasets.

    Args:
        shard_sizes: number of samples in each shard of each dataset.
        identity: of the run. A fork with another mixture than its parent's continues each source where that left it.

    Raises:
        ConfigError: as `make_order`.
    """
    if identity and "order" in identity.get("parent", {}):
        sizes = {d["manifest_sha256"]: size for d, size in zip(identity["data"], shard_sizes)}
        return recorded_order(order_record(identity, 0), sizes)
    training = experiment.training
    settings = {name: getattr(training, name) for name in SAMPLINGS[training.sampling].settings}
    weights = [dataset.source.weight for dataset in experiment.training_datasets()]
    return make_order(training.sampling, shard_sizes, weights, experiment.seed, **settings)
