"""All recipes as one set of Dagster definitions: `dagster dev`, `dg`, and `dagster job launch` load this module."""

import dagster as dg

from assets.common import DaskResource, RunEnd, owners
from assets.data import corpus_asset, dataset_assets, tokenizer_asset
from assets.evaluation import baseline_asset, scorecard_assets
from assets.preflight import preflight_asset
from assets.reports import report_asset
from assets.training import checkpoint_assets
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Baseline, Dataset, Experiment, load_experiment, recipe_names
from orchestration.automation import alert_sensors, checkpoint_sensor, gap_schedule
from orchestration.dead_runs import dead_run_sensor
from orchestration.jobs import dataset_job, evaluation_job, recipe_job, training_job
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


def _baselines(experiments: list[Experiment]) -> dict[str, tuple[Experiment, Baseline]]:
    """Baselines by name, each with a recipe that has it.

    Raises:
        ConfigError: two recipes use one name for different models, or score it differently.
    """
    found: dict[str, tuple[Experiment, Baseline]] = {}
    for experiment in experiments:
        for baseline in experiment.evaluation.baselines if experiment.evaluation else ():
            other, known = found.setdefault(baseline.name, (experiment, baseline))
            how = [e.evaluation.model_dump(include={"suite", "backend", "precision"}) for e in (other, experiment)]
            if known != baseline or how[0] != how[1]:
                raise ConfigError(
                    f"recipes {other.name} and {experiment.name} describe the baseline {baseline.name} differently"
                )
    return found


def build_definitions(experiments: list[Experiment]) -> dg.Definitions:
    """Assets, checks and jobs of the given experiments."""
    datasets, tokenizers = _shared(experiments)
    assets: list[dg.AssetsDefinition] = [
        preflight_asset(experiments),
        *(tokenizer_asset(e) for e in tokenizers.values()),
    ]
    checks: list[dg.AssetChecksDefinition] = []
    if embedded := [e for e in experiments if any(d.source.origin == "embedded" for d in e.datasets())]:
        assets.append(corpus_asset(embedded[0]))
    for dataset in datasets.values():
        *made, check = dataset_assets(dataset)
        assets += made
        checks.append(check)
    assets += [baseline_asset(*owned) for owned in _baselines(experiments).values()]
    for experiment in experiments:
        assets += [checkpoint_assets(experiment), report_asset(experiment), *scorecard_assets(experiment)]
    owned_by = owners()
    assets = list(dg.map_asset_specs(lambda spec: spec.replace_attributes(owners=owned_by), assets))
    jobs = [
        *(recipe_job(e) for e in experiments),
        *(training_job(e) for e in experiments),
        *(evaluation_job(e) for e in experiments if e.evaluation),
        *(dataset_job(d) for d in datasets.values()),
    ]
    scored = [e for e in experiments if e.evaluation]
    return dg.Definitions(
        assets=assets,
        asset_checks=checks,
        jobs=jobs,
        sensors=[*([checkpoint_sensor(scored)] if scored else []), *alert_sensors(), dead_run_sensor()],
        schedules=[gap_schedule(scored)] if scored else [],
        resources={"dask": DaskResource(), "run_end": RunEnd()},
        executor=dg.in_process_executor,
        loggers={"live": live_logger, "console": dg.colored_console_logger},
    )


defs = build_definitions([load_experiment(name) for name in recipe_names()])
