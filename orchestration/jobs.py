"""Jobs: per recipe from raw files to report, per run its scorecards, per dataset its shards. None is partitioned."""

import dagster as dg

from assets.common import (
    CORPUS_KEY,
    PREFLIGHT_KEY,
    baseline_key,
    checkpoint_key,
    report_key,
    scorecard_key,
    shards_key,
    tokenizer_key,
)
from openlm_pipeline.experiments import Dataset, Experiment


def _data_keys(datasets: list[Dataset]) -> list[dg.AssetKey]:
    corpus = [CORPUS_KEY] if any(d.source.origin == "embedded" for d in datasets) else []
    return [
        PREFLIGHT_KEY,
        *corpus,
        *{tokenizer_key(d.tokenizer.name) for d in datasets},
        *(shards_key(d) for d in datasets),
    ]


def _score_keys(experiment: Experiment) -> list[dg.AssetKey]:
    if experiment.evaluation is None:
        return []
    baselines = [baseline_key(b.name) for b in experiment.evaluation.baselines]
    return [*baselines, *(scorecard_key(experiment.name, label) for label, _ in experiment.labelled_milestones())]


def training_job(experiment: Experiment) -> dg.JobDefinition:
    """Data and checkpoints of a recipe without their scores: `automation` can score each while training continues."""
    keys = [
        *_data_keys(experiment.datasets()),
        *(checkpoint_key(experiment.name, label) for label, _ in experiment.labelled_milestones()),
    ]
    return dg.define_asset_job(
        f"{experiment.name}_checkpoints",
        selection=dg.AssetSelection.assets(*keys),
        description=f"{experiment.name} without scores, which the automation can make while it trains.",
        tags={"openlm/recipe": experiment.name, "openlm/stage": "training"},
    )


def recipe_job(experiment: Experiment) -> dg.JobDefinition:
    """Everything of a recipe: `dagster job launch -j <recipe>`."""
    keys = [
        *_data_keys(experiment.datasets()),
        *(checkpoint_key(experiment.name, label) for label, _ in experiment.labelled_milestones()),
        *_score_keys(experiment),
        report_key(experiment.name),
    ]
    return dg.define_asset_job(
        experiment.name,
        selection=dg.AssetSelection.assets(*keys),
        description=f"Raw files to report: {experiment.description}".rstrip(": "),
        tags={"openlm/recipe": experiment.name, "openlm/stage": "all"},
    )


def evaluation_job(experiment: Experiment) -> dg.JobDefinition:
    """Score the milestones of a run that are trained, and write its report."""
    keys = [*_score_keys(experiment), report_key(experiment.name)]
    return dg.define_asset_job(
        f"evaluate_{experiment.name}",
        selection=dg.AssetSelection.assets(*keys),
        description=f"Scores of the milestones of {experiment.name} that are trained, and its report.",
        tags={"openlm/recipe": experiment.name, "openlm/stage": "evaluation"},
    )


def dataset_job(dataset: Dataset) -> dg.JobDefinition:
    """Tokenizer and shards of one dataset."""
    return dg.define_asset_job(
        f"tokenize_{dataset.name}",
        selection=dg.AssetSelection.assets(*_data_keys([dataset])),
        description=f"Raw files of {dataset.name} to its shards, with its tokenizer.",
        tags={"openlm/dataset": dataset.name, "openlm/stage": "data"},
    )
