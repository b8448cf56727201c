"""One recipe on any number of processes: micro-batch and replicas fit themselves, and say so."""

import pytest

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.experiments.load import SHIPPED as RECIPES
from openlm_pipeline.runs.layout import largest_divisor, layout

SHIPPED = sorted(path.stem for path in RECIPES.glob("*_*.yaml"))
WORLDS = (1, 2, 8, 64, 256)


@pytest.fixture(autouse=True)
def raw_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLM_RAW_DATA", "raw/*.jsonl")


@pytest.mark.parametrize("processes", WORLDS)
@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_runs_unchanged(recipe: str, processes: int) -> None:
    experiment = load_experiment(recipe)
    laid = layout(experiment, processes, min(processes, 8))
    sequences = experiment.training.global_batch // experiment.seq_len
    assert laid.local_sequences * processes == sequences
    assert laid.micro_batches * laid.micro_batch == laid.local_sequences
    assert laid.micro_batch <= experiment.execution.micro_batch
    assert processes % laid.replicas == 0
    asked = laid.local_sequences % experiment.execution.micro_batch == 0
    assert asked == (not any("micro-batches of" in note for note in laid.notes))


@pytest.mark.parametrize(("processes", "near"), [(7, "5 or 8"), (1279, "640 or 1280"), (3000, "1280")])
def test_another_number_is_refused_with_the_nearest(processes: int, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"1280 sequences does not divide over {processes} processes; take {near}$"):
        layout(load_experiment("pretrain_1b"), processes)


def test_a_micro_batch_that_does_not_divide_becomes_the_largest_divisor_below() -> None:
    laid = layout(load_experiment("pretrain_1b"), 64)
    assert laid.micro_batch == 5 and laid.micro_batches == 4
    assert laid.notes[0] == "micro-batches of 5 sequences, not 8: each of 64 processes has 20 a step"


@pytest.mark.parametrize(
    ("processes", "per_node", "overrides", "replicas"),
    [
        (8, 8, [], 1),
        (64, 8, [], 8),
        (64, 8, ["execution.replicas=1"], 1),
        (64, 1, [], 1),  # 17 GB of weights and optimizer on each GPU
        (64, 1, ["model.n_layers=20"], 64),
        (64, 8, ["execution.replicas=3"], 2),
        (10, 8, [], 1),  # machines of unequal size
    ],
)
def test_replicas(processes: int, per_node: int, overrides: list[str], replicas: int) -> None:
    laid = layout(load_experiment("pretrain_1b", overrides), processes, per_node)
    assert laid.replicas == replicas


def test_the_largest_divisor() -> None:
    assert [largest_divisor(20, n) for n in (1, 3, 8, 20, 99)] == [1, 2, 5, 20, 20]
