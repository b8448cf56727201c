"""What a training run is: everything that changes its weights, and nothing else."""

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.lineage.fingerprint import Tree

TRAINER_VERSION = 1
"""Raised when the same experiment and data would give other weights."""


def settings_identity(experiment: Experiment) -> Tree:
    """The part of a run's identity that stands in the recipe; milestones only extend a run, so they are not in it."""
    unused = {"horizon"}
    if experiment.training.sampling != "windowed":
        unused.add("window_shards")
    if experiment.training.sampling not in ("resampled", "manifest"):
        unused.add("source_batch")
    training = experiment.training.model_dump(mode="json", exclude=unused)
    return {
        "model": experiment.model_config_resolved().model_dump(),
        "training": {**training, "horizon": experiment.schedule_horizon()},
        "seq_len": experiment.seq_len,
        "seed": experiment.seed,
        "code": TRAINER_VERSION,
    }


def run_identity(experiment: Experiment, dataset_versions: dict[str, str]) -> Tree:
    """The whole identity.

    Args:
        dataset_versions: sha256 of the manifest of each training dataset, by name.
    """
    data = [
        {"name": d.name, "weight": d.source.weight, "manifest_sha256": dataset_versions[d.name]}
        for d in experiment.training_datasets()
    ]
    return {**settings_identity(experiment), "data": data}
