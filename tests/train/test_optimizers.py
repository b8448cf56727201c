"""Which optimizer and which weight decay each parameter gets, and that their state survives a checkpoint."""

import pytest
import torch
import torch.distributed as dist
from gloo_workers import run_in_processes, train_in_processes
from small_run import SmallRun
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import Muon

from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.experiments.sharded_muon import ShardedMuon
from openlm_pipeline.experiments.spec import Training
from openlm_pipeline.models import ModelConfig, create_model
from openlm_pipeline.registry import OPTIMIZERS
from train.distributed import leave_process_group, start
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


class _Matrices(nn.Module):
    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=seeded)) for shape in shapes])


def _sharded_muon_is_torchs(shapes: list[tuple[int, int]], mesh_shape: tuple[int, ...]) -> None:
    """Three steps on shards end with the bits of torch's Muon on whole matrices, with two collectives each."""
    start()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    whole, sharded = _Matrices(shapes), _Matrices(shapes)
    fully_shard(sharded, mesh=mesh)
    settings = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon(whole.parameters(), **settings), ShardedMuon(sharded.parameters(), **settings)
    size, sent = mesh_shape[-1], torch.zeros(())
    muon = OPTIMIZERS["muon"](Training(global_batch=8, lr=1.0))
    exchange = dist.all_to_all_single

    def counted(output, values, output_sizes, input_sizes, group):
        nonlocal sent
        own = input_sizes[group.rank()]
        sent += (values.numel() - own) * values.element_size()
        exchange(output, values, output_sizes, input_sizes, group=group)

    dist.all_to_all_single = counted
    for step in range(3):
        seeded = torch.Generator().manual_seed(step)
        for a, b in zip(whole.parameters(), sharded.parameters()):
            a.grad = torch.randn(a.shape, generator=seeded)
            b.grad = distribute_tensor(a.grad, mesh, b.placements)
        optimizers[0].step()
        with CommDebugMode() as collectives:
            optimizers[1].step()
        assert collectives.get_total_counts() == 2, collectives.get_comm_counts()
    for a, b in zip(whole.parameters(), sharded.parameters()):
        assert torch.equal(a, b.full_tensor())
        momenta = (optimizer.state[p]["momentum_buffer"] for optimizer, p in zip(optimizers, (a, b)))
        assert torch.equal(next(momenta), next(momenta).full_tensor())
    dist.all_reduce(sent)
    if all(rows % size == 0 for rows, _ in shapes):
        assert sent / dist.get_world_size() / 3 == muon.bytes_per_step(shapes, size)
    leave_process_group()


@pytest.mark.parametrize(
    ("processes", "mesh_shape", "shapes"),
    [
        (2, (2,), [(96, 32), (32, 32), (64, 16), (16, 64)]),
        (3, (3,), [(7, 20), (20, 7), (2, 5)]),  # rows that do not divide, and a process that has none of a matrix
        (4, (2, 2), [(8, 8), (12, 4)]),
        (3, (3,), [(9, 4)]),  # processes without a matrix of their own
    ],
)
def test_muon_on_shards_has_the_bits_of_torchs_on_whole_matrices(processes, mesh_shape, shapes):
    run_in_processes(processes, _sharded_muon_is_torchs, shapes, mesh_shape)


def test_muon_gives_the_losses_of_one_process_on_two_and_goes_on_bitwise(small: SmallRun, tmp_path):
    muon = ("training.optimizer=muon", "training.lr=1.0e-3")
    one, whole = SmallRun(tmp_path / "one", (4, 8)), SmallRun(tmp_path / "whole", (4, 8))
    one.train(*muon)
    train_in_processes(whole, 2, *muon)
    train_in_processes(small, 2, *muon, "milestones=[1024]")
    train_in_processes(small, 2, *muon)
    assert small.losses() == whole.losses() == pytest.approx(one.losses(), rel=1e-4)


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
