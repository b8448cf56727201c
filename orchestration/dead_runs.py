"""Runs whose process is gone with nobody left to say so: after a power cut, or a kill of the code server as well.

Dagster's code server tells of a run's process that dies under it, and the daemon frees the pool slots of runs that have
ended; neither looks at a run whose code server died too.
"""

import os
import socket

import dagster as dg
import psutil

PROCESS_TAG = "openlm/process"
_CLOCK_SECONDS = 60.0
"""By how much the clock may have been set since a process began."""


def this_process() -> str:
    """Names a process for as long as its host is up: a process id alone is used again."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def _is_gone(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether the process of a run that has begun is known to be gone."""
    if tag := run.tags.get(PROCESS_TAG):
        host, pid, created = tag.rsplit(":", 2)
        return host == socket.gethostname() and _is_other(int(pid), float(created) + 0.01)
    if type(instance.run_storage).__name__ != "SqliteRunStorage":
        return False  # Dagster does not record the machine of a run, and only SQLite means this one
    begun = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_START)
    return bool(begun) and _is_other(begun[-1].dagster_event.pid, begun[-1].timestamp + _CLOCK_SECONDS)


def _is_other(pid: int, latest: float) -> bool:
    """Whether no process, or one created after `latest` (seconds since 1970), has the id."""
    try:
        return psutil.Process(pid).create_time() > latest
    except psutil.NoSuchProcess:
        return True


def fail_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs under way whose process is gone as failed; their ids."""
    under_way = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    failed = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=under_way)):
        run = record.dagster_run
        # Read again, as it may have ended well before its process did.
        if _is_gone(instance, run) and not instance.get_run_by_id(run.run_id).is_finished:
            instance.report_run_failed(run, "Its process was killed, or the machine went down.")
            failed.append(run.run_id)
    return failed


def free_slots_of_ended_runs(instance: dg.DagsterInstance) -> None:
    """Free the pool slots that runs which have ended still hold."""
    storage = instance.event_log_storage
    for pool in storage.get_concurrency_keys():
        info = storage.get_concurrency_info(pool)
        for run_id in info.active_run_ids | info.pending_run_ids:
            run = instance.get_run_by_id(run_id)
            if run is None or run.is_finished:
                storage.free_concurrency_slots_for_run(run_id)


@dg.executor(name="in_process", config_schema=dg.in_process_executor.config_schema)
def executor(context: dg.InitExecutorContext) -> dg.Executor:
    """Dagster's in-process executor, for runs that find the slots of dead ones free: no daemon need be there."""
    fail_dead_runs(context.instance)
    free_slots_of_ended_runs(context.instance)
    return dg.in_process_executor.executor_creation_fn(context)


def dead_run_sensor() -> dg.SensorDefinition:
    """Fails dead runs wherever a daemon runs; the daemon itself frees their slots."""

    @dg.sensor(
        name="dead_runs",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Runs whose process is gone with nobody left to say so, as after a power cut, are failed.",
    )
    def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        failed = fail_dead_runs(context.instance)
        return dg.SkipReason(f"failed: {', '.join(failed)}" if failed else "every run under way has its process")

    return dead_runs
