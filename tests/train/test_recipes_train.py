"""Every shipped recipe: its model builds at full size, and it trains two steps at reduced width."""

import math

import pytest
from small_run import SmallRun, train_here, write_dataset

from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.experiments.load import SHIPPED
from openlm_pipeline.models import count_parameters, create_model
from openlm_pipeline.runs.folder import RunFolder

RECIPES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_builds_at_full_size(recipe: str):
    config = load_experiment(recipe).model_config_resolved()
    model = create_model(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_two_steps_at_reduced_width(recipe: str, small: SmallRun):
    full = load_experiment(recipe)
    vocab_size = 512
    settings = [
        f"model.vocab_size={vocab_size}",
        "model.hidden_dim=32",
        "model.n_layers=2",
        "model.n_heads=2",
        "model.n_kv_heads=null",
        "model.ffn_hidden_dim=null",
        "training.decay=0",
        "seq_len=32",
        "execution.micro_batch=2",
        "execution.compile=false",  # it takes a minute, and test_parallel.py has it
    ]
    settings += ["training.global_batch=256", "training.warmup=256", "milestones=[512]", "execution.log_every=1"]
    reduced = load_experiment(recipe, settings)
    assert reduced.training.precision == full.training.precision
    for dataset in reduced.datasets():
        write_dataset(small.home, dataset.name, 64, seed=0, vocab_size=vocab_size)
    outcome = train_here(reduced, small.home)
    assert (outcome.status, outcome.step) == ("completed", 2)
    run = RunFolder(small.home.run(reduced.name, reduced.version))
    losses = [r["loss"] for r in run.read_metrics() if "loss" in r]
    assert losses == pytest.approx([math.log(vocab_size)] * 2, abs=1.0)
