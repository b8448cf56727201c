"""`scorecard/<run>/<milestone>` and `scorecard/baseline/<name>`: the scores of one model on a suite."""

import dagster as dg

from assets.common import (
    EVALUATION_POOL,
    baseline_key,
    checkpoint_key,
    code_version,
    metadata,
    scorecard_key,
    user_errors,
    when_ready,
)
from openlm_pipeline import scoring
from openlm_pipeline.evaluation.suite import HARNESS_VERSION, load_suite
from openlm_pipeline.experiments import Baseline, Experiment
from openlm_pipeline.layout import Home
from openlm_pipeline.result import StageResult

COMPLETE, REGRESSION = "complete_suite", "no_significant_regression"


def _version(experiment: Experiment, **more: str | None) -> str:
    evaluation = experiment.evaluation
    how = evaluation.model_dump(include={"backend", "precision", "average"})
    return code_version({"suite": load_suite(evaluation.suite).digest, "harness": HARNESS_VERSION, **how, **more})


def _result(key: dg.AssetKey, made: StageResult, compared: bool) -> dg.MaterializeResult:
    results = [
        dg.AssetCheckResult(asset_key=key, check_name=COMPLETE, passed=made.facts["average"] is not None),
        dg.AssetCheckResult(
            asset_key=key,
            check_name=REGRESSION,
            passed=not made.facts["significant_regressions"],
            severity=dg.AssetCheckSeverity.WARN,
            description=", ".join(f"{what} {by:+.3f}" for what, by in made.facts["significant_regressions"].items()),
        ),
    ]
    return dg.MaterializeResult(
        metadata=metadata(made), data_version=dg.DataVersion(made.version), check_results=results[: 1 + compared]
    )


def scorecard_asset(experiment: Experiment, label: str) -> dg.AssetsDefinition:
    """The scorecard of one milestone."""
    suite = load_suite(experiment.evaluation.suite)
    key = scorecard_key(experiment.name, label)

    @dg.asset(
        key=key,
        deps=[checkpoint_key(experiment.name, label), *(baseline_key(b.name) for b in experiment.evaluation.baselines)],
        group_name=experiment.name,
        kinds={"pytorch", "scorecard"},
        code_version=_version(experiment),
        automation_condition=when_ready(),
        pool=EVALUATION_POOL,
        check_specs=[
            dg.AssetCheckSpec(COMPLETE, asset=key),
            dg.AssetCheckSpec(REGRESSION, asset=key, description="Since the milestone before, by paired tests."),
        ],
        description=f"Accuracy on the suite {suite.name} with 95% intervals, from one Parquet row an item.",
    )
    def scorecard(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with user_errors():
            made = scoring.score(experiment, Home.from_env(), label, context.log.info)
        return _result(key, made, compared=True)

    return scorecard


def baseline_asset(experiment: Experiment, baseline: Baseline) -> dg.AssetsDefinition:
    """The scorecard of a model that no run here made."""
    suite = load_suite(experiment.evaluation.suite)
    key = baseline_key(baseline.name)

    @dg.asset(
        key=key,
        group_name="baselines",
        kinds={"huggingface", "scorecard"},
        code_version=_version(experiment, model=baseline.model, revision=baseline.revision),
        pool=EVALUATION_POOL,
        check_specs=[dg.AssetCheckSpec(COMPLETE, asset=key)],
        description=f"{baseline.model} on the suite {suite.name}, scored by the same harness as the runs.",
    )
    def scorecard(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with user_errors():
            made = scoring.score_baseline(experiment, Home.from_env(), baseline.name, context.log.info)
        return _result(key, made, compared=False)

    return scorecard
