"""Typed experiments and the recipes that ship with the project."""

from openlm_pipeline.experiments.load import apply_overrides, load_experiment, recipe_names, recipe_paths
from openlm_pipeline.experiments.spec import (
    Baseline,
    Dataset,
    DocumentMap,
    Evaluation,
    Experiment,
    Source,
    TokenizerSpec,
)

__all__ = [
    "Baseline",
    "Dataset",
    "DocumentMap",
    "Evaluation",
    "Experiment",
    "Source",
    "TokenizerSpec",
    "apply_overrides",
    "load_experiment",
    "recipe_names",
    "recipe_paths",
]
