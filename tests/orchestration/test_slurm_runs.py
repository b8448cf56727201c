"""A recipe that Slurm trains, through Dagster: its run is killed and launched again, and cancelled as in the UI."""

import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import dagster as dg
import psutil
import pytest
from slurm_cluster import SlurmCluster, job_ids
from tiny_pipeline import LABELS, REPOSITORY, TinyPipeline, environment

from openlm_pipeline.runs.folder import RunFolder

pytestmark = pytest.mark.drill
JOB = "tiny_checkpoints"


@pytest.fixture
def pipeline(tmp_path: Path, slurm_cluster: SlurmCluster) -> TinyPipeline:
    """A pipeline whose recipe Slurm trains for as long as nobody ends it."""
    made = TinyPipeline.create(tmp_path / "pipeline")
    recipe = made.root / "recipes" / "tiny.yaml"
    text = recipe.read_text().replace("milestones: [10K, 40K]", "milestones: [10K, 40K, 1B]")
    text = text.replace("{log_every: 20}", "{log_every: 5, checkpoint_every: 5K}")
    recipe.write_text(text.replace("{processes: 1}", "{kind: slurm, processes: 1, grace_seconds: 60}"))
    return made


def variables(pipeline: TinyPipeline, cluster: SlurmCluster) -> dict[str, str]:
    return environment(pipeline, SLURM_CONF=str(cluster.folder / "slurm.conf"))


def assert_saved_and_cancelled(pipeline: TinyPipeline) -> None:
    assert job_ids() == []
    outcome = RunFolder(pipeline.run_folder).read_outcome()
    assert outcome["status"] == "preempted"
    assert (pipeline.run_folder / "checkpoints" / f"step-{outcome['step']:08d}" / "COMPLETE").exists()


def orchestrate(pipeline: TinyPipeline, cluster: SlurmCluster, output: Path) -> psutil.Popen:
    with output.open("w") as out:
        return psutil.Popen(
            [sys.executable, "-m", "orchestration", JOB, "--allow=repeat_data"],
            cwd=REPOSITORY, env=variables(pipeline, cluster), stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip


def test_a_killed_orchestrator_finds_its_job_again_and_ctrl_c_ends_it(pipeline, slurm_cluster, tmp_path, wait_until):
    first_output, second_output = tmp_path / "first.txt", tmp_path / "second.txt"
    first = orchestrate(pipeline, slurm_cluster, first_output)
    milestone = f"done   checkpoint/tiny/{LABELS[0]}"
    wait_until(lambda: milestone in first_output.read_text() or first.poll() is not None, "the first milestone", 600)
    first.kill()
    first.wait()
    (job_id,) = job_ids()

    second = orchestrate(pipeline, slurm_cluster, second_output)
    found = f"Slurm job {job_id} of this run is running already: it is watched, none is added"
    wait_until(lambda: found in second_output.read_text() or second.poll() is not None, "the job to be found", 600)
    wait_until(
        lambda: "loss " in second_output.read_text().partition(found)[2] or second.poll() is not None, "its loss", 300
    )
    assert job_ids() == [job_id]
    second.send_signal(signal.SIGINT)
    assert second.wait(timeout=300) != 0
    assert [path.name for path in (pipeline.run_folder / "launch").glob("slurm-*.log")] == [f"slurm-{job_id}.log"]
    assert_saved_and_cancelled(pipeline)


def test_a_run_that_is_terminated_in_dagster_saves_and_its_job_is_cancelled(
    pipeline, slurm_cluster, tmp_path, wait_until, instance_of
):
    run_id = str(uuid.uuid4())
    launch = [str(Path(sys.executable).parent / "dagster"), "job", "launch", "-j", JOB, "--run-id", run_id]
    launch += ["--tags", json.dumps({"openlm/allow": "repeat_data"})]
    with (tmp_path / "launch.txt").open("w") as out:
        subprocess.run(
            launch, cwd=REPOSITORY, env=variables(pipeline, slurm_cluster), stdout=out, stderr=subprocess.STDOUT,
            check=True,
        )  # fmt: skip
    instance = instance_of(pipeline)

    def trains() -> bool:
        run = instance.get_run_by_id(run_id)
        return run.is_finished or instance.get_latest_materialization_event(checkpoint) is not None

    checkpoint = dg.AssetKey(["checkpoint", "tiny", LABELS[0]])
    wait_until(trains, "the first milestone", 600)
    assert len(job_ids()) == 1
    assert instance.run_launcher.terminate(run_id)
    wait_until(lambda: instance.get_run_by_id(run_id).is_finished, "the run to end", 300)
    assert instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.CANCELED
    # Interrupted while it records the milestone, Dagster says so before it closes what the run left open.
    wait_until(lambda: job_ids() == [], "the job to end", 60)
    assert_saved_and_cancelled(pipeline)
    assert instance.event_log_storage.get_concurrency_info("training").active_run_ids == set()
