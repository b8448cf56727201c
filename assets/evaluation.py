"""`scorecard/<run>/<milestone>`: the scores of one checkpoint."""

import dagster as dg

from assets.common import EVALUATION_POOL, checkpoint_key, code_version, metadata, scorecard_key, user_errors
from openlm_pipeline import stages
from openlm_pipeline.evaluation.suite import HARNESS_VERSION, load_suite
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.layout import Home


def scorecard_asset(experiment: Experiment, label: str) -> dg.AssetsDefinition:
    """The scorecard of one milestone."""
    suite = load_suite(experiment.evaluation.suite)
    key = scorecard_key(experiment.name, label)

    @dg.asset(
        key=key,
        deps=[checkpoint_key(experiment.name, label)],
        group_name=experiment.name,
        kinds={"pytorch", "scorecard"},
        code_version=code_version({"suite": suite.digest, "harness": HARNESS_VERSION}),
        pool=EVALUATION_POOL,
        check_specs=[dg.AssetCheckSpec("complete_suite", asset=key)],
        description=f"Accuracy on the suite {suite.name} with 95% intervals, from one Parquet row an item.",
    )
    def scorecard(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with user_errors():
            made = stages.score(experiment, Home.from_env(), label, context.log.info)
        complete = made.facts["average"] is not None
        return dg.MaterializeResult(
            metadata=metadata(made),
            data_version=dg.DataVersion(made.version),
            check_results=[dg.AssetCheckResult(asset_key=key, check_name="complete_suite", passed=complete)],
        )

    return scorecard
