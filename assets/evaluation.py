"""`scorecard/<run>/<milestone>` and `scorecard/baseline/<name>`: the scores of one model on a suite."""

from collections.abc import Callable, Iterator

import dagster as dg

from assets.common import (
    EVALUATION_POOL,
    baseline_key,
    checkpoint_key,
    code_version,
    made_from,
    metadata,
    owned_by,
    scorecard_key,
    scores_group,
    shown,
    table,
    user_errors,
    when_ready,
)
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.suite import HARNESS_VERSION, Suite
from openlm_pipeline.experiments import Baseline, Experiment
from openlm_pipeline.fingerprint import settings_tree
from openlm_pipeline.pipeline import evaluation as scoring
from openlm_pipeline.pipeline.items import wrong_items
from openlm_pipeline.result import StageResult
from openlm_pipeline.storage.home import Home

_ITEMS = "items.parquet"
_FIRST = ("score", "change", "average", "validation_loss", "tokens")
_NOT_SCORING = {"while_training", "suite", "baselines", "quoted", "batch_tokens", "processes"}
"""Fields of `evaluation` that change no score; the suite has its own digest."""
COMPLETE, REGRESSION = "complete_suite", "no_significant_regression"


def _version(experiment: Experiment, suite: Suite, **more: str | None) -> str:
    how = settings_tree(experiment.evaluation, _NOT_SCORING)
    return code_version({"suite": suite.digest, "harness": HARNESS_VERSION, **how, **more})


def _specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    return [
        dg.AssetCheckSpec(COMPLETE, asset=key, description="Every task of the suite is scored."),
        dg.AssetCheckSpec(REGRESSION, asset=key, description="Since the milestone before, by paired tests."),
    ]


def _events(
    key: dg.AssetKey, score: Callable[[], StageResult], checks: int, experiment: Experiment | None = None
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult]:
    """What scoring gave, with the first `checks` of `_specs`; what can't be scored fails `COMPLETE` and the step.

    Args:
        experiment: of a milestone; the last part of `key` is its label.
    """
    with user_errors():
        try:
            made = score()
        except (DataError, MissingInputError) as e:
            yield dg.AssetCheckResult(asset_key=key, check_name=COMPLETE, passed=False, description=str(e))
            raise
    fell = made.facts["significant_regressions"]
    results = [
        dg.AssetCheckResult(asset_key=key, check_name=COMPLETE, passed=made.facts["average"] is not None),
        dg.AssetCheckResult(
            asset_key=key,
            check_name=REGRESSION,
            passed=not fell,
            severity=dg.AssetCheckSeverity.WARN,
            description=", ".join(f"{what} {by:+.3f}" for what, by in fell.items()),
        ),
    ]
    items = made.path / _ITEMS
    links, wrong = {}, []
    if experiment:
        links = made_from(experiment, key.path[-1])
        rows = wrong_items(experiment, Home.from_env(), key.path[-1])
        # A row for each text: Dagster's page has room for one wide column.
        wrong = [dg.TableRecord({"what": what, "text": text}) for row in rows for what, text in row.items() if text]
    first = shown({name: made.facts[name] for name in _FIRST})
    tables = {
        **table([items], columns_key="columns"),
        **({"wrong_items": dg.MetadataValue.table(wrong)} if wrong else {}),
    }
    yield dg.MaterializeResult(
        metadata={**first, **links, **metadata(made), **tables},
        data_version=dg.DataVersion(made.version),
        check_results=results[:checks],
    )


def scorecard_assets(experiment: Experiment, suite: Suite) -> list[dg.AssetsDefinition]:
    """The scorecard of each milestone."""
    version = _version(experiment, suite)
    return [_scorecard_asset(experiment, label, suite, version) for label, _ in experiment.labelled_milestones()]


def _scorecard_asset(experiment: Experiment, label: str, suite: Suite, version: str) -> dg.AssetsDefinition:
    key = scorecard_key(experiment.name, label)

    @dg.asset(
        key=key,
        deps=[checkpoint_key(experiment.name, label), *(baseline_key(b.name) for b in experiment.evaluation.baselines)],
        group_name=scores_group(experiment.group),
        kinds={"pytorch", "scorecard"},
        owners=owned_by(),
        code_version=version,
        automation_condition=when_ready(),
        pool=EVALUATION_POOL,
        check_specs=_specs(key),
        description=f"Accuracy on the suite {suite.name} with 95% intervals, from one Parquet row per item.",
    )
    def scorecard(context: dg.AssetExecutionContext):
        yield from _events(
            key,
            lambda: scoring.score(experiment, Home.from_env(), label, context.log.info),
            2,
            experiment,
        )

    return scorecard


def baseline_asset(experiment: Experiment, suite: Suite, baseline: Baseline) -> dg.AssetsDefinition:
    """The scorecard of a model that no run here made."""
    key = baseline_key(baseline.name)

    @dg.asset(
        key=key,
        group_name="baselines",
        kinds={"huggingface", "scorecard"},
        owners=owned_by(),
        code_version=_version(experiment, suite, model=baseline.model, revision=baseline.revision),
        pool=EVALUATION_POOL,
        check_specs=_specs(key)[:1],
        description=f"{baseline.model} on the suite {suite.name}, scored by the same harness as the runs.",
    )
    def scorecard(context: dg.AssetExecutionContext):
        yield from _events(
            key, lambda: scoring.score_baseline(experiment, Home.from_env(), baseline.name, context.log.info), 1
        )

    return scorecard
