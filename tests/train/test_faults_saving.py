"""Saves that are killed at any point, and disks that are full: what was complete before is still there, and used."""

import contextlib
import itertools
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gloo_workers import exit_codes, run_in_processes, train_in_processes
from save_program import run_and_die
from small_run import SmallRun, train_here
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from openlm_pipeline.checkpoints.folders import list_checkpoints, read_checkpoint, verify
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.errors import TrainingError
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.storage.home import Home

FIRST_ONLY = "milestones=[512]"


def intact(small: SmallRun) -> list[int]:
    """Steps of the complete checkpoints, each verified."""
    found = list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)
    for checkpoint in found:
        verify(checkpoint)
    return [c.step for c in found]


def weights(small: SmallRun, step: int) -> dict[str, torch.Tensor]:
    return load_model(read_checkpoint(small.run.checkpoints / f"step-{step:08d}")).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run that nobody disturbed: milestones at 2 and 4 steps."""
    small = SmallRun(tmp_path_factory.mktemp("whole"), (2, 4))
    small.train()
    return small


def test_a_save_that_is_killed_at_any_change_of_its_folder_loses_nothing(tmp_path: Path, whole: SmallRun):
    """Each run is killed at another point of its second save and trained again; all end with the same weights."""
    first = SmallRun(tmp_path / "first", (2, 4))
    first.train(FIRST_ONLY)
    changes: list[str] = []
    for at in itertools.count():
        hurt = SmallRun.__new__(SmallRun)
        hurt.home, hurt.recipe = Home(tmp_path / f"killed-{at}"), first.recipe
        shutil.copytree(first.home.root, hurt.home.root)
        said = tmp_path / f"change-{at}"
        (code,) = exit_codes(1, run_and_die, str(first.recipe), hurt.home.root, at, said)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        changes.append(said.read_text())
        assert 2 in intact(hurt), changes
        hurt.train()
        assert intact(hurt) == [2, 4], changes
        assert not list(hurt.run.checkpoints.glob(".tmp-*")), changes
        assert_same(weights(hurt, 4), weights(whole, 4))
    assert len(changes) >= 8  # the folder, each of its files, its new name and its mark
    assert sum("COMPLETE" in change for change in changes) >= 1


@contextlib.contextmanager
def small_files_only(small: SmallRun) -> Iterator[None]:
    """No file of this process may grow beyond half of a checkpoint's data: writing fails as on a full disk."""
    (data,) = (small.run.checkpoints / "step-00000002").glob("*.distcp")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (data.stat().st_size // 2, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def full_disk(small: SmallRun) -> Iterator[None]:
    """The checkpoints are on a file system that has room for one and a half of them; then it is made larger."""
    folder, kept = small.run.checkpoints, small.run.path / "kept"
    folder.rename(kept)
    folder.mkdir()
    size = sum(p.stat().st_size for p in kept.rglob("*") if p.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of a given size can be mounted by root only")
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield
        shutil.copytree(folder, kept, dirs_exist_ok=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()
        kept.rename(folder)


@pytest.mark.parametrize("full", [small_files_only, full_disk])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    full: object, asynchronous: str, tmp_path: Path, whole: SmallRun
):
    small = SmallRun(tmp_path, (2, 4))
    small.train(FIRST_ONLY)
    with full(small):
        with pytest.raises(TrainingError, match=r"step 4 could not be written to .*\.tmp-step-00000004.*room"):
            small.train(f"execution.async_save={asynchronous}")
        assert intact(small) == [2]
        assert not list(small.run.checkpoints.glob(".tmp-*"))  # half a checkpoint takes no room
    outcome = small.run.read_outcome()
    assert outcome["status"] == "failed" and "step 4 could not be written" in outcome["reason"]
    small.train()
    assert intact(small) == [2, 4]
    assert_same(weights(small, 4), weights(whole, 4))


def test_a_save_that_fails_while_training_goes_on_ends_it(tmp_path: Path):
    """A rotating checkpoint is not waited for, yet its failure is raised before the run's last step."""
    small = SmallRun(tmp_path, (2, 2000))
    small.train(FIRST_ONLY)
    with small_files_only(small), pytest.raises(TrainingError, match="step 4 could not be written"):
        small.train("execution.checkpoint_every=1024", "execution.log_every=1000")
    assert intact(small) == [2]
    assert small.run.read_outcome()["step"] < 2000


def test_checkpoints_written_beside_training_equal_those_that_stop_it(tmp_path: Path):
    """While one is written the weights change; the copy that was taken does not."""
    both = []
    for name, asynchronous in (("beside", "true"), ("stopping", "false")):
        small = SmallRun(tmp_path / name, (12,))
        every = ("execution.checkpoint_every=512", "execution.keep_checkpoints=9")
        small.train(f"execution.async_save={asynchronous}", *every)
        both.append(small)
    assert intact(both[0]) == intact(both[1]) == [2, 4, 6, 8, 10, 12]
    for step in (2, 4, 6, 8, 10, 12):
        assert_same(weights(both[0], step), weights(both[1], step))


def _save_in_turn(recipe: str, root: Path, counted: Path) -> None:
    """Train a run that saves at each second step, and count the plans that this rank makes for all."""
    plans = []
    make = DefaultSavePlanner._create_global_plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefaultSavePlanner, "_create_global_plan", lambda *a: plans.append(1) or make(*a))
        every = ["execution.checkpoint_every=512", "execution.keep_checkpoints=9"]
        train_here(load_experiment(recipe, every), Home(root))
    (counted / f"rank-{os.environ['RANK']}").write_text(str(len(plans)))


def test_a_plan_is_made_once_and_each_save_holds_what_one_after_a_resume_would(tmp_path: Path):
    """Files are equal to the byte those of a run that was started again for each of its checkpoints."""
    once, again = SmallRun(tmp_path / "once", (6,)), SmallRun(tmp_path / "again", (6,))
    run_in_processes(2, _save_in_turn, str(once.recipe), once.home.root, tmp_path)
    assert [(tmp_path / f"rank-{r}").read_text() for r in (0, 1)] == ["1", "0"]
    for steps in ("[512]", "[512,1024]", "[512,1024,1536]"):
        train_in_processes(again, 2, f"milestones={steps}")
    hashes = [
        {
            (c.step, name): file["sha256"]
            for c in list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)
            for name, file in c.files.items()
            if name.endswith(".distcp")
        }
        for small in (once, again)
    ]
    assert hashes[0] == hashes[1] and len(set(hashes[0].values())) == 6  # three steps, two ranks
