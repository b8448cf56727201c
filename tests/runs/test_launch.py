"""Training through the launcher: what a caller sees of a torchrun child, and what is redone."""

import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil
import pytest
from gloo_workers import forked_trainers, ranks_of
from small_run import SmallRun

from openlm_pipeline.errors import BusyError, ConfigError, ConsentError, TrainingError
from openlm_pipeline.pipeline import training as training_stage
from openlm_pipeline.runs.launch import Event, Measured, MilestoneReached, MilestoneReused, milestone_checkpoints
from openlm_pipeline.runs.launchers.local import Local


@pytest.fixture(autouse=True)
def forked() -> Iterator[None]:
    """torchrun finds all imports done."""
    with forked_trainers(torchrun=True):
        yield


def train(small: SmallRun, *overrides: str, allow: Collection[str] = ()) -> tuple[list[Event], list[str]]:
    """The events and reports of `training_stage.train` to the last milestone."""
    experiment = small.experiment(*overrides)
    reports: list[str] = []
    training = training_stage.train(experiment, small.home, experiment.milestones[-1], reports.append, allow=allow)
    return list(training), reports


def milestones(events: list[Event]) -> list[tuple[type, str]]:
    return [(type(e), e.label) for e in events if isinstance(e, MilestoneReached)]


def test_only_a_damaged_milestone_is_made_again(tmp_path: Path):
    small = SmallRun(tmp_path, (2, 4))
    small.train()
    digests = {label: c.digest for label, c in milestone_checkpoints(small.experiment(), small.run).items()}
    (part,) = list((small.run.checkpoints / "step-00000004").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ConsentError, match=r"milestone t1024 is damaged: .*__0_0.distcp.*\n.*--allow remake"):
        train(small)
    events, reports = train(small, allow={"remake"})
    assert milestones(events) == [(MilestoneReused, "t0512"), (MilestoneReached, "t1024")]
    assert [e.record["step"] for e in events if isinstance(e, Measured) and "loss" in e.record] == [3, 4]
    assert any("t1024 is damaged" in r and "is made again" in r and "superseded" in r for r in reports)
    made = milestone_checkpoints(small.experiment(), small.run)
    assert {label: c.digest for label, c in made.items()}.keys() == digests.keys()
    assert made["t0512"].digest == digests["t0512"]
    assert all(training_stage.is_intact(c) for c in made.values())

    events, _ = train(small)
    assert milestones(events) == [(MilestoneReused, "t0512"), (MilestoneReused, "t1024")]


def test_a_failed_training_gives_its_own_reason(tmp_path: Path):
    small = SmallRun(tmp_path, (2, 4))
    with pytest.raises(TrainingError, match=r"ended early: loss .* at step \d+: not finite"):
        train(small, "training.lr=1e30", "training.grad_clip=null", "training.warmup=0")
    assert milestone_checkpoints(small.experiment(), small.run) == {}


def test_the_folder_of_a_run_that_is_being_trained_is_left_alone(tmp_path: Path):
    small = SmallRun(tmp_path, (2,))
    small.train()
    before = sorted(small.run.path.rglob("*"))
    experiment = small.experiment("seed=1")
    with small.run.lock(), pytest.raises(BusyError, match="already training"):
        list(training_stage.train(experiment, small.home, 512, lambda _: None, allow={"supersede"}))
    assert sorted(small.run.path.rglob("*")) == before


def test_a_cancelled_trainer_saves(tmp_path: Path):
    small = SmallRun(tmp_path, (2, 100_000))
    experiment = small.experiment()
    others = set(psutil.Process().children(recursive=True))
    events = training_stage.train(
        experiment, small.home, experiment.milestones[-1], lambda _: None, allow={"repeat_data"}
    )
    next(events)
    events.close()
    assert not set(psutil.Process().children(recursive=True)) - others
    outcome = small.run.read_outcome()
    assert outcome["status"] == "preempted"
    assert outcome["step"] in small.steps_on_disk()


def test_a_cancelled_trainer_that_cannot_save_is_gone_within_five_seconds(tmp_path: Path):
    """Its worker is stopped as by a debugger, and has a process group of its own."""
    small = SmallRun(tmp_path, (2, 100_000))
    experiment = small.experiment("launcher.grace_seconds=1")
    others = set(psutil.Process().children(recursive=True))
    events = training_stage.train(
        experiment, small.home, experiment.milestones[-1], lambda _: None, allow={"repeat_data"}
    )
    next(events)
    processes = set(psutil.Process().children(recursive=True)) - others
    (worker,) = ranks_of(psutil.Process()).values()
    worker.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    events.close()
    assert time.monotonic() - started < 5
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_one_machine_has_one_node(tmp_path: Path):
    with pytest.raises(ConfigError, match="'local' is this machine: nodes must be 1"):
        SmallRun(tmp_path, (2,)).experiment("launcher.nodes=2")


def test_a_consent_reaches_the_trainer_that_asks_for_it_too(tmp_path: Path, monkeypatch):
    def not_started(launcher: Local, until: int) -> None:
        raise TrainingError(launcher.show(until))

    monkeypatch.setattr(Local, "submit", not_started)
    with pytest.raises(TrainingError, match="--allow=cpu$"):
        train(SmallRun(tmp_path, (2,)), allow={"cpu", "supersede"})
