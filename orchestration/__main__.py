"""`python -m orchestration JOB`: run a job in this process, with its events kept where the Dagster UI shows them."""

import os
import socket
import sys
import warnings
from pathlib import Path

import dagster as dg
import psutil
from rich.console import Console

from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.experiments import load_experiment, recipe_names
from openlm_pipeline.layout import Home

_PROCESS_TAG = "openlm/process"


def _this_process() -> str:
    """Names a process for as long as its host is up: a process id alone is used again."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def _is_alive(tag: str) -> bool:
    host, pid, created = tag.rsplit(":", 2)
    if host != socket.gethostname():
        return True  # it cannot be looked at from here
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == created
    except psutil.NoSuchProcess:
        return False


def bury_dead_runs(instance: dg.DagsterInstance) -> None:
    """Fail runs of this program whose process is gone, and free the pool slots they still hold."""
    running = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING])
    for record in instance.get_run_records(running):
        tag = record.dagster_run.tags.get(_PROCESS_TAG)
        if tag and not _is_alive(tag):
            instance.report_run_failed(record.dagster_run, "Its process was killed.")
    storage = instance.event_log_storage
    for pool in storage.get_concurrency_keys():
        info = storage.get_concurrency_info(pool)
        for run_id in info.active_run_ids | info.pending_run_ids:
            run = instance.get_run_by_id(run_id)
            if run is None or run.is_finished:
                storage.free_concurrency_slots_for_run(run_id)


def run(job_name: str) -> int:
    """Run a job; 0 if it succeeded."""
    console = Console(highlight=False, soft_wrap=True)
    warnings.filterwarnings("ignore", category=dg.BetaWarning)  # for whoever changes the code, not for whoever runs it
    os.environ.setdefault("DAGSTER_HOME", str(Path(".dagster").absolute()))
    if not (Path(os.environ["DAGSTER_HOME"]) / "dagster.yaml").exists():
        print(f"error: DAGSTER_HOME is {os.environ['DAGSTER_HOME']}, which has no dagster.yaml; run this from the "
              "project's root folder", file=sys.stderr)  # fmt: skip
        return 2
    from orchestration.definitions import defs

    if job_name not in {job.name for job in defs.jobs}:
        print(f"error: there is no job {job_name!r}; jobs: {', '.join(j.name for j in defs.jobs)}", file=sys.stderr)
        return 2
    home = Home.from_env()
    console.print(f"{job_name}: state is under {home.root}")
    with dg.DagsterInstance.get() as instance:
        bury_dead_runs(instance)
        result = defs.resolve_job_def(job_name).execute_in_process(
            instance=instance,
            raise_on_error=False,
            run_config={"loggers": {"live": {}}},
            tags={_PROCESS_TAG: _this_process()},
        )
    if not result.success:
        console.print(f"{job_name} did not finish. Run the same command again: what is done stays done.")
        return 1
    console.print(f"\n{job_name} is done.")
    if job_name in recipe_names():
        experiment = load_experiment(job_name)
        console.print(f"  report   file://{home.report(experiment.name, experiment.version) / 'report.html'}")
    console.print("  Dagster  make ui, then http://127.0.0.1:3000 (the graph, every run, all metadata)")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m orchestration JOB")
    try:
        sys.exit(run(sys.argv[1]))
    except OpenLMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
