"""All recipes as one set of Dagster definitions: `dagster dev`, `dg`, and `dagster job launch` load this module."""

import dagster as dg

from assets.common import DaskResource
from assets.data import corpus_asset, dataset_assets, tokenizer_asset
from assets.evaluation import scorecard_asset
from assets.reports import report_asset
from assets.training import checkpoint_assets
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Dataset, Experiment, load_experiment, recipe_names
from orchestration.jobs import dataset_job, evaluation_job, recipe_job
from orchestration.live import live_logger


def _content(dataset: Dataset) -> dict:
    """What makes a dataset what it is: neither its share of a mixture nor how it is tokenized."""
    execution = ("engine", "verify_every", "shards_url", "keep_local_shards", "shard_cache_bytes")
    return dataset.model_dump(exclude={"source": {"weight"}, **dict.fromkeys(execution, True)})


def _shared(experiments: list[Experiment]) -> tuple[dict[str, Dataset], dict[str, Experiment]]:
    """Datasets by name, and an experiment for each tokenizer's name; recipes may share them only if they agree.

    Raises:
        ConfigError: two recipes use one name for different datasets or tokenizers.
    """
    datasets: dict[str, tuple[Dataset, str]] = {}
    tokenizers: dict[str, Experiment] = {}
    for experiment in experiments:
        other = tokenizers.setdefault(experiment.tokenizer.name, experiment)
        if other.tokenizer != experiment.tokenizer:
            raise ConfigError(
                f"recipes {other.name} and {experiment.name} describe tokenizer {other.tokenizer.name} differently"
            )
        for dataset in experiment.datasets():
            known, owner = datasets.setdefault(dataset.name, (dataset, experiment.name))
            if _content(known) != _content(dataset):
                raise ConfigError(f"recipes {owner} and {experiment.name} describe dataset {dataset.name} differently")
    return {name: dataset for name, (dataset, _) in datasets.items()}, tokenizers


def build_definitions(experiments: list[Experiment]) -> dg.Definitions:
    """Assets, checks and jobs of the given experiments."""
    datasets, tokenizers = _shared(experiments)
    assets: list[dg.AssetsDefinition] = [tokenizer_asset(e) for e in tokenizers.values()]
    checks: list[dg.AssetChecksDefinition] = []
    if embedded := [e for e in experiments if any(d.source.origin == "embedded" for d in e.datasets())]:
        assets.append(corpus_asset(embedded[0]))
    for dataset in datasets.values():
        *made, check = dataset_assets(dataset)
        assets += made
        checks.append(check)
    for experiment in experiments:
        assets += [checkpoint_assets(experiment), report_asset(experiment)]
        if experiment.evaluation:
            assets += [scorecard_asset(experiment, label) for label, _ in experiment.labelled_milestones()]
    jobs = [
        *(recipe_job(e) for e in experiments),
        *(evaluation_job(e) for e in experiments if e.evaluation),
        *(dataset_job(d) for d in datasets.values()),
    ]
    return dg.Definitions(
        assets=assets,
        asset_checks=checks,
        jobs=jobs,
        resources={"dask": DaskResource()},
        executor=dg.in_process_executor,
        loggers={"live": live_logger, "console": dg.colored_console_logger},
    )


defs = build_definitions([load_experiment(name) for name in recipe_names()])
