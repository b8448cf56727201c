"""Averages of the weights equal a direct computation from the weights after each step."""

import pytest
import torch
from small_run import SmallRun

from openlm_pipeline.checkpoints.folders import Checkpoint, list_checkpoints
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.experiments.spec import parse_average
from openlm_pipeline.models import create_model
from train.hooks.averages import Averages

AVERAGES = ("ema_0.9_2", "ema_0.5", "poly_3_2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """The checkpoint of each of eight steps of a run that was interrupted after three."""
    small = SmallRun(tmp_path_factory.mktemp("averages"), (8,))
    overrides = ["execution.checkpoint_every=256", "execution.keep_checkpoints=9"]
    overrides.append(f"training.averages=[{','.join(AVERAGES)}]")
    small.train(*overrides, "milestones=[768]")
    small.train(*overrides, "milestones=[768,2048]")
    found = list_checkpoints(small.run.checkpoints, small.run.fingerprint, pytest.fail)
    assert [c.step for c in found] == list(range(1, 9))
    return found


def weights(checkpoint: Checkpoint, average: str | None = None) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_model(checkpoint, average=average).named_parameters()}


@pytest.mark.parametrize("spec", AVERAGES)
def test_an_average_is_what_its_formula_says(checkpoints: list[Checkpoint], spec: str):
    method, parameter, every = parse_average(spec)
    # The first step has a learning rate of its own; what is before it is the initial weights.
    expected = {n: p.detach() for n, p in create_model(load_model(checkpoints[0]).config).named_parameters()}
    for checkpoint in checkpoints:
        if checkpoint.step % every == 0:
            k = checkpoint.step // every
            old = parameter if method == "ema" else 1 - (parameter + 1) / (parameter + k)
            new = weights(checkpoint)
            expected = {name: old * value + (1 - old) * new[name] for name, value in expected.items()}
        found = weights(checkpoint, spec)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found["output.weight"], weights(checkpoints[-1])["output.weight"])


def test_an_average_that_was_not_kept_is_named(checkpoints: list[Checkpoint]):
    with pytest.raises(DataError, match="in the average ema_0.1_1"):
        load_model(checkpoints[0], average="ema_0.1_1")


@pytest.mark.parametrize("spec", ["ema", "ema_1.0_1", "poly_1_0", "cosine_1_1", "ema_0.9_1_1"])
def test_what_is_no_average_is_refused(spec: str, small: SmallRun):
    with pytest.raises(ConfigError, match="ema_GAMMA_EVERY"):
        small.experiment(f"training.averages=[{spec}]")


def test_an_average_moves_towards_the_weights_which_stay_what_they_are(checkpoints: list[Checkpoint]):
    model = load_model(checkpoints[-1])
    own = {name: value.clone() for name, value in model.state_dict().items()}
    averages = Averages(["ema_0.5"], model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    averages.update(1)
    torch.testing.assert_close(averages.state["ema_0.5"]["output.weight"], own["output.weight"] + 0.5)
    torch.testing.assert_close(model.output.weight, own["output.weight"] + 1.0)
