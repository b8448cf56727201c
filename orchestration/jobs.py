"""Jobs: per recipe from raw files to report, per run its scorecards, per dataset its shards. None is partitioned.

Beside these `derive`, which saves a new recipe, and one that fails for each recipe that does not load.
"""

import re
from collections.abc import Collection, Sequence

import dagster as dg
from pydantic import Field

from assets.common import (
    CORPUS_KEY,
    PREFLIGHT_KEY,
    baseline_key,
    checkpoint_key,
    report_key,
    scorecard_key,
    shards_key,
    study_key,
    tokenizer_key,
    user_errors,
)
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.pipeline.new_recipe import derive
from openlm_pipeline.pipeline.recipes import DERIVE, RESERVED, SAVE
from openlm_pipeline.studies.study import StudyRun
from orchestration.dead_runs import executor_of_processes


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


def study_job(name: str, runs: Sequence[StudyRun]) -> dg.JobDefinition:
    """All runs of a study, each step in a process of its own, so that as many train as the training pool has slots."""
    experiments = list({run.name: run.experiment for run in runs}.values())
    keys = [key for e in experiments for key in _data_keys(e.datasets())]
    keys += [checkpoint_key(e.name, label) for e in experiments for label, _ in e.labelled_milestones()]
    keys += [study_key(name), *(key for e in experiments for key in _score_keys(e))]
    return dg.define_asset_job(
        name,
        selection=dg.AssetSelection.assets(*dict.fromkeys(keys)),
        description=f"All runs of the study {name}, and what they predict.",
        executor_def=executor_of_processes,
        tags={"openlm/study": name, "openlm/stage": "all"},
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


def failing_job(recipe: str, error: str, taken: Collection[str]) -> dg.JobDefinition:
    """The job of a recipe that does not load: its description says why, and so does its failure.

    Args:
        recipe: its name, or the path of what has none.
        taken: names of other jobs.
    """
    name = re.sub(r"\W", "_", recipe.rpartition("/")[2].removesuffix(".yaml"), flags=re.ASCII)
    while name in taken or name in RESERVED:
        name += "_"

    @dg.op(name=f"{name}__not_loaded")
    def fail() -> None:
        raise dg.Failure(description=error, allow_retries=False)

    @dg.graph(name=f"{name}__job")  # among steps and graphs a name is used once
    def failing() -> None:
        fail()

    return failing.to_job(name, description=f"Not loaded: {error}")


class NewRecipe(dg.Config):
    """Settings of the job `derive`."""

    recipe: str = Field(description="Name of the recipe to extend.")
    overrides: list[str] = Field(default=[], description="KEY=VALUE each, such as training.lr=2e-3.")
    name: str | None = Field(default=None, description="Name of the new recipe; by default RECIPE_KEY_VALUE.")


def derive_job() -> dg.JobDefinition:
    """`openlm launch RECIPE KEY=VALUE` without the launch."""

    @dg.op(name=SAVE)
    def save(context: dg.OpExecutionContext, config: NewRecipe) -> None:
        with user_errors():
            made = derive(config.recipe, config.overrides, config.name)
        made.save()
        context.log.info(then := f"Reload definitions; job {made.experiment.name}")
        context.add_output_metadata({"next": then, "recipe": dg.MetadataValue.path(str(made.path))})

    @dg.job(name=DERIVE, description="Saves a recipe with settings changed in OPENLM_HOME/recipes; reload definitions.")
    def job() -> None:
        save()

    return job
