"""Real processes: the same numbers at any world size, and runs that are killed, stopped and resumed under torchrun.

One run of two processes is hurt four times, and compared with one that nobody touched. That torchrun itself is killed
is in tests/drills/test_killed_trainers.py.
"""

import signal
import sys
from pathlib import Path

import pytest
import torch
from gloo_workers import SECONDS, Forked, ranks_of, torchrun, train_in_processes
from small_run import BATCH, SmallRun
from waiting import wait_until

from openlm_pipeline.checkpoints.folders import list_checkpoints, verify
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.errors import BusyError

STEPS = (20, 120)
SAVE_EVERY = 30
EVERY = f"execution.checkpoint_every={SAVE_EVERY * BATCH}"


def last_step(small: SmallRun) -> int:
    return max(small.losses(), default=0)


def assert_intact(small: SmallRun) -> None:
    for checkpoint in list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail):
        verify(checkpoint)


def final_weights(small: SmallRun) -> dict[str, torch.Tensor]:
    checkpoint = list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)[-1]
    assert checkpoint.step == STEPS[-1]
    return load_model(checkpoint).state_dict()


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run of two processes from beginning to end."""
    small = SmallRun(tmp_path_factory.mktemp("untouched"), STEPS)
    train_in_processes(small, 2, EVERY)
    return small


def test_losses_are_the_same_at_one_and_two_processes(untouched: SmallRun, tmp_path: Path):
    one = SmallRun(tmp_path, STEPS)
    one.train("milestones=[5120]")
    assert list(one.losses()) == list(range(1, 21))
    two = {step: loss for step, loss in untouched.losses().items() if step <= 20}
    assert two == pytest.approx(one.losses(), rel=1e-6)
    assert untouched.validation_losses()[20] == pytest.approx(one.validation_losses()[20], rel=1e-6)


def test_a_checkpoint_of_two_processes_is_a_model_in_one(untouched: SmallRun):
    checkpoint = list_checkpoints(untouched.run.checkpoints, untouched.run.fingerprint, warn=pytest.fail)[0]
    assert len(list(checkpoint.path.glob("*.distcp"))) == 2
    with torch.no_grad():
        logits = load_model(checkpoint)(torch.arange(32)[None])
    assert logits.shape == (1, 32, 260)
    assert torch.isfinite(logits).all()


def test_a_run_goes_on_at_another_number_of_processes(untouched: SmallRun, tmp_path: Path):
    """From the milestone of two processes at step 20, one process gives the same losses."""
    one = SmallRun(tmp_path, STEPS)
    one.run.checkpoints.parent.mkdir(parents=True)
    for name in ("run.json", "experiment.yaml"):
        (one.run.path / name).write_bytes((untouched.run.path / name).read_bytes())
    first = "checkpoints/step-00000020"
    (one.run.path / first).mkdir(parents=True)
    for path in (untouched.run.path / first).iterdir():
        (one.run.path / first / path.name).write_bytes(path.read_bytes())
    one.train("milestones=[5120,7680]")
    assert list(one.losses()) == list(range(21, 31))
    assert one.losses() == pytest.approx({s: untouched.losses()[s] for s in range(21, 31)}, rel=1e-5)


def test_a_run_survives_stops_kills_and_a_second_trainer_bitwise(
    untouched: SmallRun, tmp_path: Path, monkeypatch, capsys
):
    hurt = SmallRun(tmp_path, STEPS)

    def started(after: int, *flags: str) -> Forked:
        launcher = torchrun(hurt, 2, EVERY, flags=flags)
        wait_until(lambda: last_step(hurt) > after + 5, launcher)
        return launcher

    def stopped() -> int:
        """The step of the checkpoint that a run saved when it was told to stop."""
        outcome = hurt.run.read_outcome()
        assert outcome["status"] == "preempted"
        assert outcome["step"] == last_step(hurt) < STEPS[-1]
        assert outcome["step"] in hurt.steps_on_disk()
        return outcome["step"]

    # SIGTERM to torchrun: a checkpoint of the step at which it stopped, and an outcome that says so.
    launcher = started(SAVE_EVERY)
    assert len(ranks_of(launcher)) == 2
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(SECONDS) != 0
    at = stopped()
    assert hurt.steps_on_disk()[20] == f"t{20 * BATCH}"

    # While the run is trained again, a second trainer is refused and leaves it unharmed. Then SIGUSR1, as by Slurm.
    launcher = started(at, "--signals-to-handle=SIGTERM,SIGUSR1")
    assert f"resumed from step-{at:08d}" in hurt.log()
    family = [launcher, *launcher.children(recursive=True)]
    for process in family:
        process.suspend()  # so that it can't end before the second one has tried
    before = {p: p.stat().st_mtime_ns for p in hurt.run.path.rglob("*") if p.is_file()}
    from train.__main__ import main
    from train.distributed import leave_process_group

    monkeypatch.setenv("OPENLM_HOME", str(hurt.home.root))
    monkeypatch.setattr(sys, "argv", ["train", str(hurt.recipe)])
    try:
        assert main() == BusyError.exit_code == 7
    finally:
        leave_process_group()
        after = {p: p.stat().st_mtime_ns for p in hurt.run.path.rglob("*") if p.is_file()}
        for process in family:
            process.resume()
    assert "already training" in capsys.readouterr().err
    assert after == before
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(SECONDS) != 0
    again_at = stopped()
    assert again_at > at

    # kill -9 of a rank: torchrun starts both again, which resume; and of another, when it may not start any more.
    log_before = hurt.log()
    launcher = started(again_at, "--max-restarts=1")
    killed = ranks_of(launcher)
    killed[0].kill()
    wait_until(lambda: hurt.log().removeprefix(log_before).count("resumed from step-") == 2, launcher)
    wait_until(lambda: ranks_of(launcher).keys() == {0, 1}, launcher)
    assert not set(killed.values()) & set(ranks_of(launcher).values())
    ranks_of(launcher)[1].kill()
    assert launcher.wait(SECONDS) != 0
    assert hurt.run.read_outcome()["status"] == "failed"
    assert hurt.steps_on_disk()[20] == f"t{20 * BATCH}"
    assert_intact(hurt)

    assert torchrun(hurt, 2, EVERY).wait(SECONDS) == 0, hurt.log()
    assert (
        hurt.run.read_outcome().items()
        >= {"status": "completed", "step": STEPS[-1], "tokens": STEPS[-1] * BATCH}.items()
    )
    assert_intact(hurt)
    assert hurt.losses() == untouched.losses()
    expected, found = final_weights(untouched), final_weights(hurt)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
