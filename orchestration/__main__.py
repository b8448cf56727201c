"""`python -m orchestration JOB [--allow NAME]`: run a job in this process, its events kept where the UI shows them."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import dagster as dg
from dagster._core.definitions.reconstruct import ReconstructableRepository
from rich.console import Console

from assets.common import EVALUATION_POOL, TRAINING_POOL
from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.experiments import load_experiment, recipe_names
from openlm_pipeline.result import ALLOW_TAG, CONSENTS, parse_allow
from openlm_pipeline.runs.programs import dagster_home
from openlm_pipeline.storage.home import Home
from openlm_pipeline.studies.stage import PAGE
from openlm_pipeline.studies.study import is_study
from orchestration.dead_runs import PROCESS_TAG, clear_dead_runs, this_process
from orchestration.live import is_interrupt


def _database_error(error: BaseException | None) -> str | None:
    """The reason of a database that is away, full, damaged or another release's, if an error comes from that."""
    from alembic.util.exc import CommandError
    from sqlalchemy.exc import DBAPIError

    while error is not None:
        if isinstance(error, CommandError):
            return f"a later release of Dagster wrote it ({error})"
        if isinstance(error, DBAPIError):
            return str(error.orig).strip().splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _slots(instance: dg.DagsterInstance, count: int | None) -> Iterator[None]:
    """So many runs may train, and be scored, at a time until this one ends; without a number as `dagster.yaml` says."""
    if count is None:
        yield
        return
    pools, storage = (TRAINING_POOL, EVALUATION_POOL), instance.event_log_storage
    for pool in pools:
        storage.set_concurrency_slots(pool, count)
    try:
        yield
    finally:
        for pool in pools:
            storage.delete_concurrency_limit(pool)


def run(job_name: str, allow: Collection[str] = (), slots: int | None = None) -> int:
    """Run a job; 0 if it succeeded."""
    console = Console(highlight=False, soft_wrap=True)
    warnings.filterwarnings("ignore", category=dg.BetaWarning)  # for whoever changes the code, not for whoever runs it
    os.environ.setdefault("PYTHONWARNINGS", "ignore:Function `multi_observable_source_asset`")  # in steps' processes
    # Dagster's six attempts at a database, each of several lines; how they end is told in one.
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("Retrying failed database"))
    os.environ["DAGSTER_HOME"] = str(dagster_home())
    from orchestration.definitions import defs

    if job_name not in {job.name for job in defs.jobs}:
        print(f"error: there is no job {job_name!r}; jobs: {', '.join(j.name for j in defs.jobs)}", file=sys.stderr)
        return 2
    home = Home.from_env()
    console.print(f"{job_name}: state is under {home.root}")
    with dg.DagsterInstance.get() as instance, _slots(instance, slots):
        clear_dead_runs(instance)
        result = dg.execute_job(  # `execute_in_process` has an executor of its own, which waits for slots in silence
            ReconstructableRepository.for_module("orchestration.definitions", "defs").get_reconstructable_job(job_name),
            instance,
            run_config={"loggers": {"live": {}}},
            tags={PROCESS_TAG: this_process(), **({ALLOW_TAG: ",".join(sorted(allow))} if allow else {})},
        )
        was_stopped = any(is_interrupt(getattr(e.event_specific_data, "error", None)) for e in result.all_events)
        if was_stopped:  # which Dagster has as a failed step
            instance.report_run_canceled(instance.get_run_by_id(result.run_id), "It was stopped from the terminal.")
    if was_stopped:
        console.print(f"{job_name} was stopped. Run the same command again: it goes on from here.")
        return 130
    if not result.success:
        console.print(f"{job_name} did not finish. Run the same command again: what is done stays done.")
        return 1
    console.print(f"\n{job_name} is done.")
    if job_name in recipe_names():
        experiment = load_experiment(job_name)
        console.print(f"  report   file://{home.report(experiment.name, experiment.version) / 'report.html'}")
    elif is_study(job_name):
        console.print(f"  report   file://{home.study(job_name) / PAGE}")
    if job_name == "demo":
        import torch

        from openlm_pipeline.pipeline.generate import Writer

        torch.set_num_threads(1)  # of so small a model a thread has too little to do for another to wait for it
        writer = Writer(job_name, home)
        for prompt in ("def ", "The function "):
            text = "".join(writer.write(prompt, max_tokens=40, temperature=0.6)).replace("\n", "\n" + 11 * " ")
            console.print(f"  sample   {text}", markup=False)
    console.print("  Dagster  openlm ui, then http://127.0.0.1:3000 (the graph, every run, all metadata)")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orchestration", description=__doc__)
    parser.add_argument("job", help="a recipe's name, or another job")
    parser.add_argument("--allow", action="append", metavar="NAME", help=f"what is otherwise refused: {list(CONSENTS)}")
    parser.add_argument("--slots", type=int, metavar="N", help="runs that train at the same time")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _arguments()
    try:
        sys.exit(run(arguments.job, parse_allow(arguments.allow), arguments.slots))
    except OpenLMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        reason = _database_error(error)
        if reason is None:
            raise
        print(
            f"error: Dagster's database, set by {dagster_home() / 'dagster.yaml'}, fails: {reason}. What is done stays "
            "done: see to the database, or move it away with Dagster's history, then run the same command again.",
            file=sys.stderr,
        )
        sys.exit(1)
