"""Runs whose process is gone with nobody left to say so: after a power cut, or a kill of the code server as well.

Dagster's code server tells of a run's process that dies under it, and the daemon frees the pool slots of runs that have
ended; neither looks at a run whose code server died too.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import dagster as dg
import psutil
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster._core.events import DagsterEvent
from dagster._core.execution.api import ExecuteRunWithPlanIterable
from dagster._core.execution.context.system import PlanExecutionContext, PlanOrchestrationContext
from dagster._core.execution.context_creation_job import PlanExecutionContextManager
from dagster._core.execution.plan.execute_plan import inner_plan_execution_iterator
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.executor.in_process import InProcessExecutor
from dagster._utils.interrupts import check_captured_interrupt

from openlm_pipeline.result import Say
from orchestration.live import began, run_process

PROCESS_TAG = "openlm/process"
_SET_DEATH_SIGNAL = 1
"""Of prctl(2)."""
_SLOT_SECONDS = 3.0
"""Between two looks for a free slot."""
_CLOCK_SECONDS = 60.0
"""By how much the clock may have been set since a process began."""


def end_with_run() -> None:
    """Have a step in a process of its own end as if asked to, once the process that runs its job is gone (Linux).

    Killed, that asks nothing of its steps: they would train on, beside those of the next run.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != run_process() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent.pid:  # it went before this was asked for
        os.kill(os.getpid(), signal.SIGTERM)


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


def clear_dead_runs(instance: dg.DagsterInstance) -> None:
    """Fail dead runs and free their slots, where no daemon need be there to do it."""
    fail_dead_runs(instance)
    free_slots_of_ended_runs(instance)


class _Claims(InstanceConcurrencyContext):
    """Pool slots of a run, which says whom it waits for, and takes those of dead runs."""

    def __init__(self, instance: dg.DagsterInstance, run: dg.DagsterRun, say: Say) -> None:
        super().__init__(instance, run)
        self._instance, self._say, self._said = instance, say, set[str]()

    def claim(self, concurrency_key: str, step_key: str, step_priority: int = 0) -> bool:
        """Whether the step has its slot; asked again every few seconds."""
        if check_captured_interrupt():  # Dagster looks as it runs a step, and there is none
            raise dg.DagsterExecutionInterruptedError
        asks_now = time.time() > self._pending_timeouts.get(step_key, 0.0)
        if claimed := super().claim(concurrency_key, step_key, step_priority):
            return claimed
        if asks_now:
            clear_dead_runs(self._instance)
        if step_key not in self._said:
            self._said.add(step_key)
            ids = self._instance.event_log_storage.get_concurrency_info(concurrency_key).active_run_ids
            runs = [run for run_id in sorted(ids) if (run := self._instance.get_run_by_id(run_id))]
            held = ", ".join(f"{run.job_name} (run {run.run_id})" for run in runs)
            self._say(f"{step_key} waits for a slot of pool {concurrency_key}" + (f", held by {held}" if held else ""))
        return False

    def interval_to_next_pending_claim_check(self) -> float:
        """Seconds; Dagster's own are never above 0, and its executor keeps a CPU core busy until a slot is free."""
        due = [self._pending_timeouts[step] for step in self.pending_claim_steps()]
        return min(_SLOT_SECONDS, max(0.0, min(due, default=0.0) - time.time()))


class _InProcess(InProcessExecutor):
    """Dagster's, with slots as `_Claims` has them."""

    def execute(self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan) -> Iterator[DagsterEvent]:
        def steps(execution_plan: ExecutionPlan, job_context: PlanExecutionContext) -> Iterator[DagsterEvent]:
            with _Claims(job_context.instance, job_context.dagster_run, job_context.log.info) as claims:
                yield from inner_plan_execution_iterator(job_context, execution_plan, claims)

        yield from ExecuteRunWithPlanIterable(
            execution_plan=execution_plan,
            iterator=steps,
            execution_context_manager=PlanExecutionContextManager(
                job=plan_context.job,
                retry_mode=plan_context.retry_mode,
                execution_plan=execution_plan,
                run_config=plan_context.run_config,
                dagster_run=plan_context.dagster_run,
                instance=plan_context.instance,
                raise_on_error=plan_context.raise_on_error,
                output_capture=plan_context.output_capture,
                step_dependency_config=self.step_dependency_config,
            ),
        )


@dg.executor(name="in_process", config_schema=dg.in_process_executor.config_schema)
def executor(context: dg.InitExecutorContext) -> dg.Executor:
    """Dagster's in-process executor, for runs that find the slots of dead ones free."""
    clear_dead_runs(context.instance)
    made = dg.in_process_executor.executor_creation_fn(context)
    return _InProcess(made.retries, made.step_dependency_config)


@dg.executor(
    name="multiprocess",
    config_schema=dg.multiprocess_executor.config_schema,
    requirements=multiple_process_executor_requirements(),
)
def executor_of_processes(context: dg.InitExecutorContext) -> dg.Executor:
    """Dagster's multiprocess executor, whose steps end with it, for runs that find the slots of dead ones free."""
    clear_dead_runs(context.instance)
    began()
    return dg.multiprocess_executor.executor_creation_fn(context)


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
