"""SIGKILL of Dask workers under a job, and of everything at once, as a power cut does it."""

import dagster as dg
import pytest
from drill_pipeline import (
    FIRST,
    NUM_FILES,
    WAIT_SECONDS,
    DrillPipeline,
    Programs,
    held_slots,
    kill,
    newest_run,
    status,
    wait_until,
)

pytestmark = pytest.mark.drill


def _workers(pipeline: DrillPipeline, job) -> list:
    """The processes of Dask below a job that use a CPU."""
    return [p for p in job.children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


def test_a_killed_dask_worker_changes_no_byte(undisturbed, tmp_path, programs_on):
    pipeline = DrillPipeline.create(tmp_path / "pipeline")
    programs = programs_on(pipeline)
    job = programs.start("-m", "orchestration", "tokenize_tiny_text")
    wait_until(pipeline.tokenized, "the first file to be tokenized", job)
    victim = _workers(pipeline, job)[0]
    kill(victim)
    assert 0 < len(pipeline.tokenized()) < NUM_FILES
    assert job.wait(timeout=WAIT_SECONDS) == 0, programs.printed()
    for part in ("tokenized", "shards"):
        files = [name for name in undisturbed.snapshot(part) if name.endswith((".tokens", ".documents", ".tar"))]
        assert files
        for name in files:
            assert (pipeline.home / part / name).read_bytes() == (undisturbed.home / part / name).read_bytes(), name


def _cut_power_while_it_trains(pipeline: DrillPipeline, programs: Programs, instance: dg.DagsterInstance) -> str:
    """Launch the job and kill all of its processes; the run's id."""
    programs.finish("dagster", "job", "launch", "-j", "tiny")
    wait_until(lambda: pipeline.last_step() >= 140, "training to be under way")
    run_id = newest_run(instance)
    kill(*pipeline.processes())
    return run_id


def test_after_a_power_cut_the_job_goes_on(undisturbed, tmp_path, programs_on, instance_of):
    pipeline = undisturbed.copy(tmp_path / "pipeline")
    pipeline.untrain()
    programs, instance = programs_on(pipeline), instance_of(pipeline)
    run_id = _cut_power_while_it_trains(pipeline, programs, instance)
    assert pipeline.milestones() == {FIRST} and pipeline.processes() == []
    assert (status(instance, run_id), held_slots(instance)) == (dg.DagsterRunStatus.STARTED, {"training": {run_id}})
    programs.finish("-m", "orchestration", "tiny")
    assert status(instance, run_id) == dg.DagsterRunStatus.FAILURE
    assert held_slots(instance) == {}
    assert pipeline.results() == undisturbed.results()


def test_after_a_power_cut_the_daemon_tells_the_run_failed_and_frees_its_slot(
    undisturbed, tmp_path, programs_on, instance_of
):
    pipeline = undisturbed.copy(tmp_path / "pipeline")
    pipeline.untrain()
    pipeline.free_slots_at_once()
    programs, instance = programs_on(pipeline), instance_of(pipeline)
    run_id = _cut_power_while_it_trains(pipeline, programs, instance)
    programs.daemon()
    wait_until(lambda: status(instance, run_id) == dg.DagsterRunStatus.FAILURE, "the dead run to be found")
    wait_until(lambda: held_slots(instance) == {}, "its slot to be free")
