"""The programs that people start: `dagster job launch` and `python -m orchestration`, bare and after a kill."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import psutil
import pytest
from commands import openlm
from tiny_pipeline import LABELS, REPOSITORY, TinyPipeline, environment


def _failure(instance: dg.DagsterInstance, run_id: str) -> str:
    """The description of the step failure of a run."""
    events = [entry.dagster_event for entry in instance.all_logs(run_id) if entry.dagster_event]
    failed = [event.step_failure_data for event in events if event.is_step_failure]
    assert failed, [event.message for event in events]
    assert failed[0].user_failure_data is not None, failed[0].error
    return failed[0].user_failure_data.description


def _orchestrate(pipeline: TinyPipeline, job: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestration", job]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(pipeline), capture_output=True, text=True)


def test_launching_a_recipe_without_its_data_fails_early_and_says_what_to_do(tmp_path, wait_until, instance_of):
    pipeline = TinyPipeline.create(tmp_path / "pipeline")
    variables = environment(OPENLM_HOME=str(pipeline.home), DAGSTER_HOME=str(pipeline.root / "dagster"))
    dagster = Path(sys.executable).parent / "dagster"
    with (tmp_path / "output.txt").open("w") as output:
        launched = subprocess.run(
            [str(dagster), "job", "launch", "-j", "pretrain_1b"],
            cwd=REPOSITORY, env=variables, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert launched.returncode == 0, (tmp_path / "output.txt").read_text()
    instance = instance_of(pipeline)
    wait_until(lambda: all(run.is_finished for run in instance.get_runs()), "the launched run to end")
    (run,) = instance.get_runs()
    assert (run.job_name, run.status) == ("pretrain_1b", dg.DagsterRunStatus.FAILURE)
    description = _failure(instance, run.run_id)
    assert f"{pipeline.home}/raw/pile/*.jsonl.zst" in description
    assert "OPENLM_RAW_DATA" in description
    assert not (pipeline.home / "tokenizers").exists()


def _launch(pipeline: TinyPipeline, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openlm_pipeline", "launch", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(pipeline), capture_output=True, text=True)


def test_a_launch_says_its_run_and_outlives_the_command(finished, tmp_path, wait_until, instance_of):
    pipeline = finished.copy(tmp_path)
    launched = _launch(pipeline, "tiny", "--budget", "0")
    assert launched.returncode == 0, launched.stderr
    assert "nothing to do" in launched.stdout
    run_id = launched.stdout.split("launched tiny: run ")[1].split()[0]
    assert f"http://127.0.0.1:3000/runs/{run_id}" in launched.stdout
    instance = instance_of(pipeline)
    wait_until(lambda: instance.get_run_by_id(run_id).is_finished, "the launched run to end")
    assert instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.SUCCESS


def test_a_launch_over_the_budget_needs_yes(tmp_path):
    pipeline = TinyPipeline.create(tmp_path / "pipeline")
    refused = openlm("launch", "tiny", "--budget", "1", variables=pipeline.variables)
    assert refused.returncode == 2
    assert "of a length that is not known is over the budget of 1; add --yes" in refused.stderr
    assumed = openlm("launch", "tiny", "--gpu", "H100", "--budget", "0", variables=pipeline.variables)
    assert assumed.returncode == 2
    assert "GPU-hours is over the budget of 0" in assumed.stderr
    assert not (pipeline.root / "dagster" / "storage").exists()
    assert openlm("launch", "nosuch", variables=pipeline.variables).returncode == 2


def test_an_unknown_job_is_refused_with_the_list(tmp_path):
    pipeline = TinyPipeline.create(tmp_path / "pipeline")
    refused = _orchestrate(pipeline, "nosuchjob")
    assert refused.returncode == 2
    assert "there is no job 'nosuchjob'" in refused.stderr
    for job in ("demo", "pretrain_1b", "tiny", "evaluate_tiny", "tokenize_tiny_text"):
        assert f" {job}," in refused.stderr or refused.stderr.rstrip().endswith(f" {job}")
    assert "Traceback" not in refused.stderr


@pytest.mark.drill
def test_a_run_killed_while_it_trains_leaves_no_trainer_and_the_next_one_finishes(
    long_finished, tmp_path, wait_until, instance_of
):
    pipeline = long_finished.copy(tmp_path)
    pipeline.run_folder.rename(tmp_path / "old_run")
    metrics = pipeline.run_folder / "metrics.jsonl"
    command = [sys.executable, "-m", "orchestration", "tiny"]
    with (tmp_path / "output.txt").open("w") as output:
        killed = psutil.Popen(command, cwd=REPOSITORY, env=environment(pipeline), stdout=output, stderr=output)
    wait_until(lambda: metrics.exists() or killed.poll() is not None, "training to begin")
    trainers = [child for child in killed.children(recursive=True) if "train" in child.cmdline()]
    killed.kill()
    killed.wait()
    assert trainers, (tmp_path / "output.txt").read_text()
    assert psutil.wait_procs(trainers, timeout=300)[1] == [], "trainers outlived the run"

    instance = instance_of(pipeline)
    dead = instance.get_runs(dg.RunsFilter(job_name="tiny"), limit=1)[0]
    held = instance.event_log_storage.get_concurrency_info("training").active_run_ids
    assert (dead.status, held) == (dg.DagsterRunStatus.STARTED, {dead.run_id})  # what a kill leaves behind

    done = _orchestrate(pipeline, "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert instance.get_run_by_id(dead.run_id).status == dg.DagsterRunStatus.FAILURE
    assert instance.event_log_storage.get_concurrency_info("training").active_run_ids == set()
    checkpoints = [path.name for path in (pipeline.run_folder / "checkpoints").iterdir()]
    assert {"step-00000157", "step-00000625"} <= set(checkpoints)
    assert f"checkpoint/tiny/{LABELS[-1]}" in done.stdout
    assert f"file://{pipeline.home}/reports/tiny/v1/report.html" in done.stdout
