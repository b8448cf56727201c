"""Training as a job of a real Slurm: over nodes, found again by another watcher, stopped, put into the queue again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, command, job_field, job_ids
from small_run import BATCH, REPOSITORY, SmallRun
from waiting import wait_until

from openlm_pipeline.checkpoints.folders import list_checkpoints, verify
from openlm_pipeline.errors import BusyError, ClusterError, MissingInputError, TrainingError
from openlm_pipeline.pipeline import training as training_stage
from openlm_pipeline.runs.launch import Event, Measured, MilestoneReached
from openlm_pipeline.storage.files import read_json

pytestmark = [pytest.mark.usefixtures("slurm_cluster"), pytest.mark.drill]
WATCHER = """
import sys
from openlm_pipeline.pipeline import training as training_stage
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.storage.home import Home
experiment = load_experiment(sys.argv[1], sys.argv[2:])
for event in training_stage.train(experiment, Home.from_env(), experiment.milestones[-1], print, allow={"repeat_data"}):
    pass
"""
SLURM = ("launcher.kind=slurm", "launcher.grace_seconds=60", f"execution.checkpoint_every={200 * BATCH}")


@pytest.fixture(autouse=True)
def _search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def watch(small: SmallRun, reports: list[str], *overrides: str):
    experiment = small.experiment(*SLURM, *overrides)
    return training_stage.train(
        experiment, small.home, experiment.milestones[-1], reports.append, allow={"repeat_data"}
    )


def steps(events: list[Event]) -> list[int]:
    return [e.record["step"] for e in events if isinstance(e, Measured) and "loss" in e.record]


def num_resumed(small: SmallRun) -> int:
    """Starts of the trainer that resumed from a checkpoint."""
    logs = (small.run.path / "launch").glob("slurm-*.log")
    return sum(log.read_text().count("resumed from step-") for log in logs)


def assert_intact(small: SmallRun) -> None:
    for checkpoint in list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail):
        verify(checkpoint)


def test_two_nodes_train_to_the_milestone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = SmallRun(tmp_path, (3, 6))
    monkeypatch.setenv("WANDB_API_KEY", "not-for-files")
    reports: list[str] = []
    events = list(watch(small, reports, "launcher.nodes=2", "launcher.slurm.setup=[export FROM_SETUP=1]"))
    assert steps(events) == [1, 2, 3, 4, 5, 6]
    assert [e.label for e in events if isinstance(e, MilestoneReached)] == ["t0768", "t1536"]
    assert small.run.read_outcome()["status"] == "completed"
    assert_intact(small)

    job_id = read_json(small.run.path / "launch" / "slurm.json")["job_id"]
    assert any(f"Slurm job {job_id} submitted" in r for r in reports)
    assert job_field(job_id, "JobName") == "openlm-small-v1"
    assert (job_field(job_id, "NodeList"), job_field(job_id, "JobState")) == ("a,b", "COMPLETED")
    assert "on 2 x cpu" in (small.run.path / "launch" / f"slurm-{job_id}.log").read_text()
    files = [p for p in small.run.path.rglob("*") if p.is_file()]
    assert not [p for p in files if b"not-for-files" in p.read_bytes()]
    assert list(watch(small, reports, "launcher.nodes=2"))  # all there: nothing is submitted
    assert job_ids() == []


def test_a_job_outlives_its_watcher_and_the_next_one_watches_and_cancels_it(tmp_path: Path):
    small = SmallRun(tmp_path, (10, 100_000))
    program = [sys.executable, "-c", WATCHER, str(small.recipe), *SLURM]
    environment = {"OPENLM_HOME": str(small.home.root)}
    first = subprocess.Popen(program, env={**os.environ, **environment}, cwd=tmp_path)
    wait_until(lambda: len(small.losses()) > 5)
    with pytest.raises(BusyError, match="already watching the training"):
        list(watch(small, []))
    first.kill()
    first.wait()
    (job_id,) = job_ids()
    (small.run.path / "launch" / "slurm.json").unlink()  # as if it had died before it wrote the id down

    reports: list[str] = []
    events = watch(small, reports)
    seen = [next(events) for _ in range(20)]
    assert job_ids() == [job_id]
    assert any(f"Slurm job {job_id} of this run is running already" in r for r in reports)
    assert len(steps(seen)) > 5
    with pytest.raises(BusyError, match="from something else"):
        list(watch(small, [], "seed=1"))

    events.close()
    assert job_ids() == []
    outcome = small.run.read_outcome()
    assert outcome["status"] == "preempted"
    assert outcome["step"] in small.steps_on_disk()
    assert_intact(small)


def test_a_job_that_the_cluster_takes_away_goes_on_from_its_checkpoint(tmp_path: Path):
    """Requeued by the cluster; by itself when Slurm warns of its time limit; by the watcher when only it can tell."""
    small = SmallRun(tmp_path, (10, 600))
    reports: list[str] = []
    disturbances = [["scontrol", "requeue"], ["scancel", "--batch", "--signal=USR1"], ["scancel", "--signal=USR1"]]
    job_id, num_done = "", 0
    for _ in watch(small, reports):
        if num_done < len(disturbances) and num_resumed(small) == num_done:
            (job_id,) = job_ids()
            command(*disturbances[num_done], job_id)
            num_done += 1
    assert num_done == len(disturbances)
    assert small.run.read_outcome()["status"] == "completed"
    assert sorted(small.losses()) == list(range(1, 601))
    assert [m for m in small.steps_on_disk().values() if m] == ["t2560", "t153600"]
    assert job_field(job_id, "Restarts") == "2"
    first, second = sorted((small.run.path / "launch").glob("slurm-*.log"))
    assert first.read_text().count("resumed from step-") == 2
    assert second.read_text().count("resumed from step-") == 1
    assert sum("submitted" in r for r in reports) == 2
    assert any("is pending: BeginTime" in r for r in reports)


def test_a_controller_that_crashes_and_comes_back_finds_the_job_watched(tmp_path: Path, slurm_cluster: SlurmCluster):
    small = SmallRun(tmp_path, (10, 100_000))
    reports: list[str] = []
    events = watch(small, reports)
    next(events)
    (job_id,) = job_ids()
    slurm_cluster.kill_controller()
    for _ in events:
        if any("is not known of at the moment" in r for r in reports):
            break
    slurm_cluster.start_controller()
    last = max(small.losses())
    told = len(reports)
    for event in events:
        if isinstance(event, Measured) and event.record["step"] > last and len(reports) > told:
            break
    assert reports[told:] == [f"Slurm job {job_id} is running"]
    assert job_ids() == [job_id]
    events.close()
    assert job_ids() == []
    assert small.run.read_outcome()["step"] in small.steps_on_disk()
    assert sum("submitted" in r for r in reports) == 1


def test_a_job_that_a_person_cancels_saves_and_is_not_submitted_again(tmp_path: Path):
    small = SmallRun(tmp_path, (10, 100_000))
    reports: list[str] = []
    events = watch(small, reports)
    next(events)
    (job_id,) = job_ids()
    command("scancel", job_id)
    with pytest.raises(
        TrainingError, match=rf"preempted\nSlurm job {job_id} ended as CANCELLED\nThe end of .*{job_id}.log"
    ):
        list(events)
    assert job_ids() == []
    assert small.run.read_outcome()["step"] in small.steps_on_disk()


def test_a_refused_job_shows_sbatchs_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = SmallRun(tmp_path, (2,))
    with pytest.raises(ClusterError, match="invalid partition specified: nope"):
        list(watch(small, [], "launcher.slurm.partition=nope"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingInputError, match="no `squeue` on this machine's PATH"):
        list(watch(small, []))
