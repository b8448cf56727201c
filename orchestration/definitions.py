"""All recipes as one set of Dagster definitions: `dagster dev`, `dg`, and `dagster job launch` load this module."""

import gc
import os
from collections.abc import Mapping

import dagster as dg

from assets.common import OWNERS, DaskResource, RunEnd, owned_by, owners
from assets.contamination import contamination_asset, task_files_asset
from assets.data import corpus_asset, dataset_assets, tokenizer_asset
from assets.evaluation import baseline_asset, scorecard_assets
from assets.preflight import preflight_asset
from assets.reports import report_asset
from assets.studies import study_asset
from assets.training import checkpoint_assets
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.evaluation.suite import load_suite
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.pipeline.recipes import load_recipes
from openlm_pipeline.shards.synthetic import SCHEME
from openlm_pipeline.studies.study import StudyRun, expand, load_study
from orchestration.automation import alert_sensors, checkpoint_sensor, gap_schedule
from orchestration.dead_runs import dead_run_sensor, end_with_run, executor
from orchestration.jobs import (
    dataset_job,
    derive_job,
    evaluation_job,
    failing_job,
    recipe_job,
    study_job,
    training_job,
)
from orchestration.live import live_logger


def build_definitions(experiments: list[Experiment], not_loaded: Mapping[str, str] = {}) -> dg.Definitions:
    """Assets, checks and jobs of experiments that agree with each other.

    Args:
        not_loaded: recipe -> why it is not among them. It is an asset that says so, and a job that fails with it.
    """
    datasets = {d.name: d for e in reversed(experiments) for d in e.datasets()}
    baselines = {b.name: (e, b) for e in reversed(experiments) if e.evaluation for b in e.evaluation.baselines}
    not_loaded = dict(not_loaded)
    try:
        owners()
    except ConfigError as e:
        not_loaded[OWNERS] = str(e)
    assets: list[dg.AssetsDefinition | dg.AssetSpec] = [
        preflight_asset(experiments),
        *(tokenizer_asset(e) for e in {e.tokenizer.name: e for e in reversed(experiments)}.values()),
    ]
    checks: list[dg.AssetChecksDefinition] = []
    if embedded := [e for e in experiments if any(d.source.origin == "embedded" for d in e.datasets())]:
        assets.append(corpus_asset(embedded[0]))
    for dataset in datasets.values():
        *made, check = dataset_assets(dataset)
        assets += made
        checks.append(check)
    suites = {suite: load_suite(suite) for suite in {e.evaluation.suite for e in experiments if e.evaluation}}
    assets += [baseline_asset(e, suites[e.evaluation.suite], baseline) for e, baseline in baselines.values()]
    assets += [task_files_asset(suite) for suite in {suite.name: suite for suite in suites.values()}.values()]
    looked_in = {
        (d.name, suites[e.evaluation.suite].name): (d, e.evaluation.suite)
        for e in reversed(experiments)
        if e.evaluation
        for d in e.training_datasets()
        if not (d.source.shards or "").startswith(SCHEME)
    }
    assets += [contamination_asset(d, file, suites[file]) for d, file in looked_in.values()]
    for experiment in experiments:
        assets += [checkpoint_assets(experiment), report_asset(experiment)]
        if experiment.evaluation:
            assets += scorecard_assets(experiment, suites[experiment.evaluation.suite])
    studies = _studies(experiments, not_loaded)
    assets += [study_asset(load_study(name), runs, experiments) for name, runs in studies.items()]
    jobs: list[dg.JobDefinition | dg.UnresolvedAssetJobDefinition] = [
        *(study_job(name, runs) for name, runs in studies.items()),
        *(recipe_job(e) for e in experiments),
        *(training_job(e) for e in experiments),
        *(evaluation_job(e) for e in experiments if e.evaluation),
        *(dataset_job(d) for d in datasets.values()),
        derive_job(),
    ]
    taken = {job.name for job in jobs}
    for name, error in not_loaded.items():
        job = failing_job(name, error, taken)
        taken.add(job.name)
        jobs.append(job)
        assets.append(
            dg.AssetSpec(["not_loaded", job.name], description=error, group_name="not_loaded", owners=owned_by())
        )
    scored = [e for e in experiments if e.evaluation]
    return dg.Definitions(
        assets=assets,
        asset_checks=checks,
        jobs=jobs,
        sensors=[*([checkpoint_sensor(scored)] if scored else []), *alert_sensors(), dead_run_sensor()],
        schedules=[gap_schedule(scored)] if scored else [],
        resources={"dask": DaskResource(), "run_end": RunEnd()},
        executor=executor,
        loggers={"live": live_logger, "console": dg.colored_console_logger},
    )


def _studies(experiments: list[Experiment], not_loaded: dict[str, str]) -> dict[str, list[StudyRun]]:
    """The runs of each study of which all recipes are there; why another is not goes to `not_loaded`."""
    names, found = {e.name for e in experiments}, {}
    for name in sorted({e.study for e in experiments if e.study}):
        try:
            runs = expand(load_study(name))
        except ConfigError as e:
            not_loaded[name] = str(e)
            continue
        if {run.name for run in runs} <= names:
            found[name] = runs
    return found


end_with_run()
gc.disable()  # what is made here stays: a collection meanwhile or at the end would look through all of it for nothing
try:
    defs = build_definitions(*load_recipes(os.environ.get("OPENLM_ONLY", "").replace(",", " ").split()))
finally:
    gc.freeze()
    gc.enable()
