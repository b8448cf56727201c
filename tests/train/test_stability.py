"""Steps that are left out: by all ranks alike, recorded, capped, and the same after a resume."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gloo_workers import run_in_processes
from small_run import SmallRun

from openlm_pipeline.checkpoints.folders import read_checkpoint
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.errors import TrainingError
from openlm_pipeline.experiments.spec import Training
from openlm_pipeline.fingerprint import fingerprint
from train.distributed import World, leave_process_group, start
from train.hooks import Step
from train.hooks.stability import SkippedSteps

DIVERGES = ("training.lr=1e30", "training.grad_clip=null", "training.warmup=0")


@pytest.fixture
def world() -> Iterator[World]:
    yield start()
    leave_process_group()


def policy(world: World, **training: Any) -> SkippedSteps:
    experiment = SimpleNamespace(training=Training(global_batch=32, lr=1, **training))
    return SkippedSteps(SimpleNamespace(experiment=experiment, world=world, step=0))


def judged(stability: SkippedSteps, loss: float, grad_norm: float) -> bool:
    return stability.accepts(Step(1.0, torch.tensor(loss), torch.tensor(grad_norm), 0.0, 32))


def test_without_a_policy_every_step_is_taken(world: World):
    stability = policy(world)
    assert judged(stability, math.nan, math.inf)
    assert stability.state() == {}


def test_what_is_not_finite_is_left_out_up_to_a_number_in_a_row(world: World):
    stability = policy(world, max_skipped_steps=2)
    for loss, grad_norm in [(math.nan, 1.0), (1.0, math.inf)]:
        assert not judged(stability, loss, grad_norm)
        assert "not finite" in stability.reason
    assert stability.skipped_in_a_row == 2
    assert judged(stability, 1.0, 1.0)
    assert stability.reason is None and stability.skipped_in_a_row == 0
    assert [judged(stability, math.nan, 1.0) for _ in range(3)] == [False] * 3
    assert stability.skipped_in_a_row == 3


def test_a_spike_is_measured_against_the_mean_of_accepted_steps(world: World):
    stability = policy(world, max_skipped_steps=9, spike_factor=3.0)
    assert all(judged(stability, 1.0, norm) for norm in [100.0, *[2.0] * 98])  # the first ones are no measure
    assert judged(stability, 1.0, 6.0)
    assert not judged(stability, 1.0, 60.0)
    assert "gradient norm 60 is over 3 times its mean" in stability.reason
    assert judged(stability, 1.0, 2.0)


def _judge_losses(folder: Path) -> None:
    """One of two ranks: what it accepts of losses that differ between them."""
    world = start()
    stability = policy(world, max_skipped_steps=2)
    losses = [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 1.0)]
    accepted = [judged(stability, step[world.rank], 1.0) for step in losses]
    (folder / str(world.rank)).write_text(str(accepted))
    leave_process_group()


def test_all_ranks_leave_out_a_step_that_is_bad_on_one(tmp_path: Path):
    run_in_processes(2, _judge_losses, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        "01", "[True, False, False, True]"
    )


def test_too_many_bad_steps_in_a_row_stop_the_run_and_none_is_saved(small: SmallRun):
    with pytest.raises(TrainingError, match=r"4 steps in a row were left out.*max_skipped_steps is 3.*is kept"):
        small.train(*DIVERGES, "training.max_skipped_steps=3", "milestones=[4096]", "execution.checkpoint_every=256")
    outcome = small.run.read_outcome()
    assert outcome["status"] == "failed" and "left out" in outcome["reason"]
    skipped = small.run.skipped_steps()
    steps = [r["step"] for r in skipped]
    assert steps == list(range(steps[0], steps[0] + 4)) and outcome["step"] == steps[-1]
    assert [(r["first_sample"], r["num_samples"]) for r in skipped] == [((s - 1) * 8, 8) for s in steps]
    assert all("not finite" in r["skipped"] for r in skipped)
    for step in small.steps_on_disk():
        model = load_model(read_checkpoint(small.run.checkpoints / f"step-{step:08d}"))
        assert all(torch.isfinite(p).all() for p in model.parameters())


SPIKES = (
    "training.spike_factor=1.02", "training.max_skipped_steps=50", "training.lr=1e-5", "training.warmup=0",
    "training.averages=[ema_0.9]",
)  # fmt: skip


def test_a_step_left_out_changes_no_weights_and_a_resumed_run_leaves_out_the_same(tmp_path):
    """Weights hardly move, so the gradient norm varies about one value, and a low factor makes spikes of some steps."""
    whole, halves = SmallRun(tmp_path / "whole", (24, 40)), SmallRun(tmp_path / "halves", (24, 40))
    whole.train(*SPIKES, "execution.checkpoint_every=256", "execution.keep_checkpoints=40")
    skipped = [r["step"] for r in whole.run.skipped_steps()]
    assert skipped and min(skipped) > 20 and max(skipped) > 24

    def state(step: int) -> dict[str, torch.Tensor]:
        return load_model(read_checkpoint(whole.run.checkpoints / f"step-{step:08d}")).state_dict()

    for step in skipped:
        before, after = state(step - 1), state(step)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not set(skipped) & set(whole.losses())  # each logged step is one that was taken

    halves.train(*SPIKES, "milestones=[6144]")
    halves.train(*SPIKES)
    assert [r["step"] for r in halves.run.skipped_steps()] == skipped
    assert halves.losses() == whole.losses()


def test_the_policy_may_change_as_a_run_goes_and_named_steps_are_left_out(small: SmallRun):
    """The way past a step whose data are broken: the run is the same, on from its last checkpoint."""
    small.train("milestones=[1024]")
    losses, fingerprint = small.losses(), small.run.fingerprint
    small.train("training.max_skipped_steps=3", "training.spike_factor=100", "training.skip_steps=[6]")
    assert small.run.fingerprint == fingerprint
    assert {step: small.losses()[step] for step in losses} == losses
    assert [(r["step"], r["skipped"]) for r in small.run.skipped_steps()] == [(6, "it is one of training.skip_steps")]
    assert sorted(small.losses()) == [1, 2, 3, 4, 5, 7, 8]


def test_a_run_of_the_first_release_with_a_policy_stays_itself(small: SmallRun):
    """Its identity, and with it the fingerprint in its checkpoints, had the policy."""
    small.train("milestones=[1024]", "training.max_skipped_steps=3")
    ours = small.run.identity
    theirs = {**ours, "training": {**ours["training"], "max_skipped_steps": 3}}
    record = {"name": "small", "version": "v1", "fingerprint": fingerprint(theirs), "identity": theirs}
    (small.run.path / "run.json").write_text(json.dumps(record))
    assert small.run.claim(small.experiment(), ours) == []
    assert json.loads((small.run.path / "run.json").read_text()).items() >= record.items()
