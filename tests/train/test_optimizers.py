"""Which optimizer and which weight decay each parameter gets, and that their state survives a checkpoint."""

import pytest
import torch
from small_run import SmallRun

from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.experiments.spec import Training
from openlm_pipeline.models import ModelConfig, create_model
from train.optimizers import make_optimizer

CONFIG = ModelConfig(hidden_dim=32, n_layers=2, n_heads=2, vocab_size=64, qk_norm=True)


def groups(**settings: object) -> dict[str, tuple[str, float]]:
    """Parameter -> (optimizer, weight decay)."""
    model = create_model(CONFIG)
    optimizer = make_optimizer(Training(global_batch=8, lr=1.0, weight_decay=0.1, **settings), model)
    names = {p: name for name, p in model.named_parameters()}
    found = [
        (names[p], (type(part).__name__, group["weight_decay"]))
        for part in optimizer
        for group in part.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


def is_norm(name: str) -> bool:
    return "norm" in name


def test_adamw_decays_every_parameter_as_openlm_does():
    assert set(groups().values()) == {("AdamW", 0.1)}


def test_norms_and_embeddings_are_spared_where_the_recipe_says_so():
    for name, (_, decay) in groups(no_decay=("norms",)).items():
        assert decay == (0.0 if is_norm(name) else 0.1), name
    for name, (_, decay) in groups(no_decay=("embeddings",)).items():
        assert decay == (0.0 if name in ("tok_embeddings.weight", "output.weight") else 0.1), name


def test_muon_takes_the_matrices_of_the_blocks():
    matrices = ("in_proj.weight", "out_proj.weight", "w12.weight", "w3.weight")
    for name, (optimizer, decay) in groups(optimizer="muon", no_decay=("norms", "embeddings")).items():
        is_matrix = name.startswith("layers.") and name.endswith(matrices)
        assert (optimizer, decay) == (("Muon", 0.1) if is_matrix else ("AdamW", 0.0)), name


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.optimizer=muon", "training.no_decay=[norms]"],
        ["training.no_decay=[norms,embeddings]", "training.averages=[ema_0.9_3]"],
        ["training.state_precision=bf16", "training.precision=bf16"],
        ["execution.activation_checkpointing=full"],
    ],
)
def test_a_run_goes_on_bitwise_from_a_checkpoint(small: SmallRun, tmp_path, overrides: list[str]):
    whole = SmallRun(tmp_path / "whole", (4, 8))
    whole.train(*overrides, "milestones=[2048]")
    small.train(*overrides, "milestones=[1024]")
    small.train(*overrides, "milestones=[1024,2048]")
    assert small.losses() == whole.losses()
    assert whole.losses()[8] < whole.losses()[1]
    a, b = (load_model(list_checkpoints(r.run.checkpoints, r.run.fingerprint, pytest.fail)[-1]) for r in (small, whole))
    assert [name for name, w in a.state_dict().items() if not torch.equal(w, b.state_dict()[name])] == []


def test_bf16_state_halves_what_a_checkpoint_takes(small: SmallRun, tmp_path):
    def parts_bytes(run: SmallRun) -> int:
        return sum(p.stat().st_size for p in run.run.checkpoints.rglob("*.distcp"))

    half = SmallRun(tmp_path / "half", (2,))
    half.train("training.state_precision=bf16")
    small.train("milestones=[512]")
    assert parts_bytes(half) < 0.6 * parts_bytes(small)
