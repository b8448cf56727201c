"""The same 24-step run at any number of processes, however they share the weights and wherever it changes hands.

Real processes with gloo. fp32 losses agree within 1e-6; batches and initial weights, bitwise, are in
test_train_data.py, and bitwise resume on one mesh in test_processes.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from gloo_workers import train_in_processes
from small_run import BATCH, SmallRun

from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.checkpoints.weights_digest import weights_digest

STEPS = (6, 12, 18, 24)
SETTINGS = ("training.lr=1.0e-3", "training.mask_token=7", "training.averages=[ema_0.9_2]")
"""Targets are masked, so that processes and micro-batches have different numbers of them."""


def milestones(*steps: int) -> str:
    return f"milestones={[s * BATCH for s in steps]}".replace(" ", "")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """The run in a single process."""
    small = SmallRun(tmp_path_factory.mktemp("one"), STEPS)
    small.train(*SETTINGS)
    assert list(small.losses()) == list(range(1, 25))
    return small


def test_four_processes_give_the_losses_of_one(one: SmallRun, tmp_path: Path):
    several = SmallRun(tmp_path, STEPS)
    train_in_processes(several, 4, *SETTINGS, "execution.micro_batch=1", milestones(24))
    assert several.losses() == pytest.approx(one.losses(), rel=1e-6)


def test_a_run_passed_from_one_to_two_to_two_times_two_processes_gives_the_losses_of_one(one: SmallRun, tmp_path: Path):
    passed = SmallRun(tmp_path, STEPS)
    passed.train(*SETTINGS, milestones(6))
    train_in_processes(passed, 2, *SETTINGS, "execution.micro_batch=1", milestones(6, 12))
    hybrid = ("execution.replicas=2", "execution.activation_checkpointing=full")
    train_in_processes(passed, 4, *SETTINGS, *hybrid, milestones(6, 12, 18))
    passed.train(*SETTINGS)
    assert passed.losses() == pytest.approx(one.losses(), rel=1e-6)
    assert passed.validation_losses() == pytest.approx(one.validation_losses(), rel=1e-6)
    for checkpoint in list_checkpoints(passed.run.checkpoints, passed.run.fingerprint, warn=pytest.fail):
        assert weights_digest(replace(checkpoint, weights_digest=None)) == checkpoint.weights_digest, checkpoint.path
