"""Each record says the norms of every layer's gradients and weights, alike on every mesh, and what was wasted."""

import math
from pathlib import Path

import pytest
from gloo_workers import train_in_processes
from small_run import BATCH, SmallRun

from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.shards.opening import open_dataset
from train.data import Batches
from train.hooks.reporters import scalars

PARTS = {"tok_embeddings", "layer_00", "layer_01", "norm", "output"}


def training_records(small: SmallRun) -> dict[int, dict]:
    return {r["step"]: r for r in small.run.read_metrics() if "loss" in r}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    small = SmallRun(tmp_path_factory.mktemp("one"), (4,))
    small.train()
    return small


@pytest.mark.parametrize("clip", ["1.0", "0.01", "null"])
def test_norms_of_layers_add_up_to_those_of_the_model(small: SmallRun, clip: str):
    small.train("milestones=[1024]", f"training.grad_clip={clip}")
    records = training_records(small)
    assert len(records) == 4
    for record in records.values():
        assert set(record["grad_norms"]) == set(record["weight_norms"]) == PARTS
        assert math.hypot(*record["grad_norms"].values()) == pytest.approx(record["grad_norm"], rel=1e-3)
    (checkpoint,) = list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)
    model = load_model(checkpoint)
    first = math.sqrt(sum(float(p.square().sum()) for p in model.layers[0].parameters()))
    assert records[4]["weight_norms"]["layer_00"] == pytest.approx(first, rel=1e-3)
    shown = scalars(records[4])
    assert shown["train/grad_norms/layer_01"] == records[4]["grad_norms"]["layer_01"]


@pytest.mark.parametrize("overrides", [[], ["execution.replicas=2"]])
def test_norms_are_the_same_at_two_processes(one_process: SmallRun, tmp_path: Path, overrides: list[str]):
    two = SmallRun(tmp_path, (4,))
    train_in_processes(two, 2, *overrides)
    here, there = training_records(one_process)[4], training_records(two)[4]
    for key in ("grad_norms", "weight_norms"):
        assert there[key] == pytest.approx(here[key], rel=2e-3)


def test_wasted_are_tokens_without_a_target_and_those_of_steps_left_out(small: SmallRun):
    small.train("milestones=[1024]", "execution.log_every=2", "training.skip_steps=[3]", "training.mask_token=7")
    experiment = small.experiment()
    datasets = [open_dataset(d, small.home) for d in experiment.training_datasets()]
    batches = Batches(experiment, datasets, 0, 1, small.run.identity)
    masked = [int((batches.load(step)[:, 1:] == 7).sum()) for step in range(4)]
    records = training_records(small)
    assert records[2]["wasted_token_fraction"] == pytest.approx(sum(masked[:2]) / (2 * BATCH)) != 0
    assert records[4]["wasted_token_fraction"] == pytest.approx((BATCH + masked[3]) / (2 * BATCH))
    assert set(records[4]["grad_norms"]) == PARTS


def test_nothing_is_wasted_where_every_token_is_predicted(one_process: SmallRun):
    assert {r["wasted_token_fraction"] for r in training_records(one_process).values()} == {0}
