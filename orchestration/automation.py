"""What happens by itself, once switched on in the UI: scoring of new checkpoints, filling of gaps, alerts.

Scorecards and reports carry an automation condition, for checkpoints that a run here makes. The sensor looks at the run
folders, for those that `torchrun -m train` or `openlm train` made. The schedule asks once per hour for what is missing.
Whatever asks twice finds every task scored.
"""

from collections.abc import Iterator, Sequence

import dagster as dg

from assets.common import DATA_VERSION_TAG, checkpoint_key, scorecard_key
from openlm_pipeline.alerts import send_alert
from openlm_pipeline.checkpoints.folders import Checkpoint
from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.pipeline import evaluation as scoring
from openlm_pipeline.storage.home import Home

_SECONDS_BETWEEN_LOOKS = 30
_UNDER_WAY = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]


def _known(instance: dg.DagsterInstance, key: dg.AssetKey) -> tuple[str | None, bool]:
    """The data version that Dagster knows of an asset, and whether a run here made it."""
    event = instance.get_latest_materialization_event(key)
    if event is None or event.asset_materialization is None:
        return None, False
    return (event.asset_materialization.tags or {}).get(DATA_VERSION_TAG), bool(event.run_id)


def _keys_under_way(instance: dg.DagsterInstance) -> set[dg.AssetKey]:
    """Assets that runs which have not ended are to make."""
    return {
        planned.get_dagster_event().asset_key
        for run in instance.get_runs(dg.RunsFilter(statuses=_UNDER_WAY))
        for planned in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    }


def _found(experiment: Experiment, home: Home, log) -> Iterator[tuple[str, Checkpoint, list[str]]]:
    try:
        yield from scoring.milestones_and_scores(experiment, home)
    except OpenLMError as e:
        log.info(f"{experiment.name}: {e}")


def checkpoint_sensor(experiments: Sequence[Experiment]) -> dg.SensorDefinition:
    """Reports checkpoints made outside Dagster, and asks for the score of each; all experiments are evaluated.

    Those that a run here makes are left to the automation condition, so that nothing is scored twice.
    """

    @dg.sensor(
        name="checkpoints_in_run_folders",
        target=dg.AssetSelection.assets(
            *(scorecard_key(e.name, label) for e in experiments for label, _ in e.labelled_milestones())
        ),
        minimum_interval_seconds=_SECONDS_BETWEEN_LOOKS,
        description="Milestones made with `torchrun -m train` or `openlm train`: told to Dagster, and scored.",
    )
    def checkpoints_in_run_folders(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        home = Home.from_env()
        under_way = _keys_under_way(context.instance)
        events, requests = [], []
        for experiment in experiments:
            for label, checkpoint, why in _found(experiment, home, context.log):
                key = checkpoint_key(experiment.name, label)
                version, made_here = _known(context.instance, key)
                is_told = version == checkpoint.digest
                if key in under_way or (is_told and made_here):
                    continue
                if not is_told:
                    facts = {"step": checkpoint.step, "tokens": checkpoint.tokens, "path": str(checkpoint.path)}
                    tags = {DATA_VERSION_TAG: checkpoint.digest}
                    events.append(dg.AssetMaterialization(key, metadata=facts, tags=tags))
                # Also where it is told: the daemon may have died since. Dagster runs the same run_key once.
                if why:
                    requests.append(
                        dg.RunRequest(
                            run_key=f"{experiment.name}/{label}/{checkpoint.digest}",
                            asset_selection=[scorecard_key(experiment.name, label)],
                        )
                    )
        return dg.SensorResult(run_requests=requests, asset_events=events)

    return checkpoints_in_run_folders


def gap_schedule(experiments: Sequence[Experiment]) -> dg.ScheduleDefinition:
    """Once an hour, the scores that are missing: of a new suite, of a run that failed; all experiments have a suite."""

    @dg.schedule(
        name="missing_scores",
        cron_schedule="0 * * * *",
        target=dg.AssetSelection.assets(
            *(scorecard_key(e.name, label) for e in experiments for label, _ in e.labelled_milestones())
        ),
        description="Milestones on disk that have no scorecard of the present suite.",
    )
    def missing_scores(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        home = Home.from_env()
        under_way = _keys_under_way(context.instance)
        missing = [
            key
            for experiment in experiments
            for label, _, why in _found(experiment, home, context.log)
            if why and (key := scorecard_key(experiment.name, label)) not in under_way
        ]
        if not missing:
            yield dg.SkipReason("every milestone on disk is scored, or being scored")
        else:
            yield dg.RunRequest(asset_selection=missing)

    return missing_scores


def alert_sensors() -> list[dg.SensorDefinition]:
    """Alerts on failed runs and on failed checks: a loss that is not finite, damage, a significant regression."""

    @dg.run_failure_sensor(name="alert_on_failure", description="Log, and OPENLM_ALERT_WEBHOOK where it is set.")
    def alert_on_failure(context: dg.RunFailureSensorContext) -> None:
        send_alert(f"{context.dagster_run.job_name} failed (run {context.dagster_run.run_id}): {_why(context)}")

    @dg.run_status_sensor(
        run_status=dg.DagsterRunStatus.SUCCESS,
        name="alert_on_failed_checks",
        description="Checks that failed in a run that went through, such as a significant regression.",
    )
    def alert_on_failed_checks(context: dg.RunStatusSensorContext) -> None:
        run = context.dagster_run
        for entry in context.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
            check = entry.get_dagster_event().asset_check_evaluation_data
            if not check.passed:
                name = f"{check.asset_key.to_user_string()} {check.check_name}"
                send_alert(
                    f"check {name} failed in {run.job_name} (run {run.run_id}): {check.description or ''}".strip()
                )

    return [alert_on_failure, alert_on_failed_checks]


def _why(context: dg.RunFailureSensorContext) -> str:
    """The first step's own reason: the text for people that assets give, else the error's last line."""
    for event in context.get_step_failure_events():
        data = event.step_failure_data
        if data.user_failure_data and data.user_failure_data.description:
            return data.user_failure_data.description
        if data.error:
            return data.error.message.strip().splitlines()[-1]
    return context.failure_event.message or "no reason given"
