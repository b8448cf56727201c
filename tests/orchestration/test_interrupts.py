"""A run that is terminated at the worst moment: when Dagster handles an output, and our generator stands still."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from tiny_pipeline import LABELS, REPOSITORY, FinishedPipeline, environment
from waiting import wait_until

from openlm_pipeline.runs.folder import RunFolder

# The run's process loads this file, interrupts itself then, and notes at its exit whether the trainer had ended.
DEFINITIONS = """
import atexit, os, pathlib, signal
import dagster as dg
from openlm_pipeline.experiments import load_experiment
from orchestration.definitions import build_definitions

defs = build_definitions([load_experiment("tiny")])
handle = dg.DagsterInstance.handle_new_event

def handle_and_interrupt(self, event, **options):
    handle(self, event, **options)
    key = event.dagster_event and event.dagster_event.asset_key
    if key == dg.AssetKey(["checkpoint", "tiny", "{label}"]) and event.dagster_event.is_step_materialization:
        atexit.register(lambda: pathlib.Path("{seen}").write_text(str(pathlib.Path("{outcome}").exists())))
        os.kill(os.getpid(), signal.SIGINT)

dg.DagsterInstance.handle_new_event = handle_and_interrupt
"""


@pytest.mark.drill
def test_training_is_stopped_before_the_process_ends(finished: FinishedPipeline, tmp_path: Path):
    pipeline = finished.copy(tmp_path)
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("[10K, 40K]", "[10K, 1B]").replace("lr: 1.0e-3", "lr: 2.0e-3"))
    run, seen = RunFolder(pipeline.run_folder), tmp_path / "seen.txt"
    definitions = pipeline.root / "interrupted.py"
    definitions.write_text(DEFINITIONS.format(label=LABELS[0], seen=seen, outcome=run.path / "outcome.json"))
    command = [str(Path(sys.executable).parent / "dagster"), "job", "execute", "-f", str(definitions)]
    command += ["-j", "tiny_checkpoints", "--tags", json.dumps({"openlm/allow": "supersede,repeat_data"})]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(pipeline), capture_output=True, text=True)
    assert done.returncode != 0 and "DagsterExecutionInterruptedError" in done.stderr, done.stderr
    assert seen.read_text() == "True"
    outcome = run.read_outcome()
    assert outcome["status"] == "preempted"
    assert (run.checkpoints / f"step-{outcome['step']:08d}" / "COMPLETE").exists()


RUNS_TINY = "import sys; from openlm_pipeline.runs.programs import attend, starting; "
RUNS_TINY += "sys.exit(attend([sys.executable, *starting('orchestration'), 'tiny', '--allow', 'repeat_data']))"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_a_job_in_one_line_and_cancel_its_run(number, finished, tmp_path, instance_of):
    """Ctrl-C reaches the process group of a terminal, SIGTERM the one process; `openlm demo` starts its job so."""
    pipeline = finished.copy(tmp_path / "pipeline")
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("[10K, 40K]", "[10K, 40K, 20M]"))
    metrics = RunFolder(pipeline.run_folder).metrics_file
    size = metrics.stat().st_size
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RUNS_TINY], env=environment(pipeline), cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        wait_until(lambda: metrics.stat().st_size > size, process, seconds=120)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1] == "tiny was stopped. Run the same command again: it goes on from here."
    assert RunFolder(pipeline.run_folder).read_outcome()["status"] == "preempted"
    instance = instance_of(pipeline)
    assert instance.get_runs(limit=1)[0].status == dg.DagsterRunStatus.CANCELED
    pools = instance.event_log_storage
    assert all(not pools.get_concurrency_info(name).active_run_ids for name in pools.get_concurrency_keys())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_waits_for_another_says_so_and_can_be_stopped(number, finished, tmp_path, instance_of):
    pipeline = finished.copy(tmp_path / "pipeline")
    instance = instance_of(pipeline)
    instance.event_log_storage.set_concurrency_slots("evaluation", 1)
    other = instance.create_run_for_job(dg.GraphDefinition(name="other").to_job(), status=dg.DagsterRunStatus.STARTED)
    assert instance.event_log_storage.claim_concurrency_slot("evaluation", other.run_id, "step").is_claimed
    shutil.rmtree(pipeline.home / "scorecards")
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RUNS_TINY], env=environment(pipeline), cwd=tmp_path,
        stdout=out, stderr=out, start_new_session=True,
    ) as process:  # fmt: skip
        waits = f"waits for a slot of pool evaluation, held by other (run {other.run_id})"
        wait_until(lambda: waits in log.read_text(), process, seconds=120)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.wait(timeout=30) == 130
    said = log.read_text()
    assert "Traceback" not in said and said.splitlines()[-1].startswith("tiny was stopped"), said
    assert instance.get_runs(limit=1)[0].status == dg.DagsterRunStatus.CANCELED
