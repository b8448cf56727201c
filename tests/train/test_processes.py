"""Real processes under torchrun: the same numbers at any world size, and runs that are killed, stopped and resumed.

One run of two processes is hurt three times, and compared with one that nobody touched.
"""

import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
from small_run import BATCH, SmallRun, wait_until

from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.errors import BusyError

STEPS = (20, 160)
SAVE_EVERY = 40
EVERY = f"execution.checkpoint_every={SAVE_EVERY * BATCH}"


def last_step(small: SmallRun) -> int:
    return max(small.losses(), default=0)


def final_weights(small: SmallRun) -> dict[str, torch.Tensor]:
    checkpoint = list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)[-1]
    assert checkpoint.step == STEPS[-1]
    return load_model(checkpoint).state_dict()


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run of two processes from beginning to end."""
    small = SmallRun(tmp_path_factory.mktemp("untouched"), STEPS)
    assert small.finish(small.torchrun(2, EVERY)) == 0, small.log()
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


def test_a_run_survives_a_kill_a_second_trainer_and_a_stop_bitwise(
    untouched: SmallRun, tmp_path: Path, monkeypatch, capsys
):
    hurt = SmallRun(tmp_path, STEPS)

    # kill -9 of torchrun alone: its workers go with it, and what is complete on disk stays.
    torchrun = hurt.torchrun(2, EVERY)
    wait_until(lambda: last_step(hurt) > SAVE_EVERY + 5, torchrun)
    workers = torchrun.children(recursive=True)
    assert len(workers) >= 2
    torchrun.kill()
    torchrun.wait()
    wait_until(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers), seconds=10)
    assert hurt.run.read_outcome() is None
    killed_at = last_step(hurt)
    assert killed_at < STEPS[-1]

    # While the run is trained again, a second trainer is refused and leaves it unharmed.
    torchrun = hurt.torchrun(2, EVERY)
    wait_until(lambda: last_step(hurt) > killed_at + 5, torchrun)
    assert "resumed from step-000000" in hurt.log()
    family = [torchrun, *torchrun.children(recursive=True)]
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

    # SIGTERM to torchrun: a checkpoint of the step at which it stopped, and an outcome that says so.
    torchrun.send_signal(signal.SIGTERM)
    assert hurt.finish(torchrun) != 0
    outcome = hurt.run.read_outcome()
    assert outcome["status"] == "preempted"
    assert killed_at < outcome["step"] < STEPS[-1]
    assert outcome["step"] in hurt.steps_on_disk()

    assert hurt.finish(hurt.torchrun(2, EVERY)) == 0, hurt.log()
    assert f"resumed from step-{outcome['step']:08d}" in hurt.log()
    assert hurt.run.read_outcome() == {"status": "completed", "step": STEPS[-1], "tokens": STEPS[-1] * BATCH}
    assert hurt.losses() == untouched.losses()
    expected, found = final_weights(untouched), final_weights(hurt)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
