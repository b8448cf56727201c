"""Initial weights depend on the parameter's name and the seed, and on nothing else."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_workers import run_in_processes
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from openlm_pipeline.models import create_model
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.init import initialize, parameter_name

TINY = ModelConfig(hidden_dim=44, n_layers=2, n_heads=3, seq_len=32, vocab_size=51)  # 51 rows split unevenly over 2
VARIANTS = [TINY, TINY.model_copy(update={"weight_tying": True, "ffn": "gelu", "qk_norm": True})]
IDS = torch.arange(24).reshape(2, 12)


def sharded_model(config: ModelConfig, **policy) -> nn.Module:
    model = create_model(config, device="meta")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    model.to_empty(device="cpu")
    initialize(model, config, seed=7)
    return model


def worker(folder: Path) -> None:
    """One process of the sharded run: saves what every rank sees of full weights, sums, gradients and types."""
    dist.init_process_group("gloo")
    results = []
    for config in VARIANTS:
        model = sharded_model(config)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        weights = {name: p.full_tensor() for name, p in model.state_dict().items() if isinstance(p, DTensor)}
        model.loss_chunk = 10  # of 24 positions, so that chunks are made again in the backward pass
        sums = model(IDS, IDS)
        sum(sums).backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        results.append({"weights": weights, "sums": [s.detach() for s in sums], "gradients": gradients})

    model = sharded_model(TINY, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen = []
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[1].cos.dtype)))
    bf16_sums = [s.detach() for s in model(IDS, IDS)]
    results.append({"sums": bf16_sums, "types": seen})
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_two_processes_of_fsdp_start_from_the_weights_of_one(tmp_path: Path):
    run_in_processes(2, worker, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for i, config in enumerate(VARIANTS):
        model = create_model(config, seed=7)
        state = model.state_dict()
        sums = model(IDS, IDS)
        sum(sums).backward()
        for results in ranks:
            assert results[i]["weights"].keys() == {k for k in state if not k.endswith("inv_freq")}
            for name, full in results[i]["weights"].items():
                assert torch.equal(full, state[name]), name
            torch.testing.assert_close(results[i]["sums"], [s.detach() for s in sums])
            assert results[i]["gradients"].keys() == dict(model.named_parameters()).keys()
            for name, gradient in results[i]["gradients"].items():
                torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)

    # bf16 mixed precision: the activations are bf16, the rotation tables are not, and the sums come out in fp32.
    ce, _ = create_model(TINY, seed=7)(IDS, IDS)
    for results in ranks:
        assert results[-1]["types"] == [(torch.bfloat16, torch.float32)]
        assert results[-1]["sums"][0].dtype == torch.float32
        torch.testing.assert_close(results[-1]["sums"][0], ce.detach(), rtol=1e-2, atol=0)


def test_weights_do_not_depend_on_other_layers_or_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        small = create_model(TINY, seed=3, vocab_size=5000).state_dict()
        torch.set_num_threads(2)
        deep = create_model(TINY, seed=3, vocab_size=5000, n_layers=4).state_dict()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, deep[name]) for name, value in small.items())


def test_the_seed_and_the_name_change_the_weights():
    a, b = create_model(TINY, seed=0).state_dict(), create_model(TINY, seed=1).state_dict()
    assert not torch.equal(a["output.weight"], b["output.weight"])
    assert not torch.equal(a["output.weight"], a["tok_embeddings.weight"])
    assert not torch.equal(a["layers.0.attention.in_proj.weight"], a["layers.1.attention.in_proj.weight"])


@pytest.fixture(scope="module")
def wide_model() -> nn.Module:
    return create_model("open_lm_87m", n_layers=2, vocab_size=4000)


@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        ("tok_embeddings.weight", 1 / math.sqrt(488)),
        ("output.weight", 1 / math.sqrt(488)),
        ("layers.0.attention.in_proj.weight", 1 / math.sqrt(488)),
        ("layers.0.attention.out_proj.weight", 1 / math.sqrt(488) / math.sqrt(2)),
        ("layers.1.attention.out_proj.weight", 1 / math.sqrt(488) / math.sqrt(4)),
        ("layers.1.feed_forward.w12.weight", 1 / math.sqrt(488)),
        ("layers.1.feed_forward.w3.weight", 1 / math.sqrt(1536) / math.sqrt(4)),
    ],
)
def test_openlm_sigmas_cut_at_three(wide_model: nn.Module, name: str, sigma: float):
    weight = wide_model.get_parameter(name)
    assert weight.std().item() == pytest.approx(0.9866 * sigma, rel=0.01)
    assert 2.9 * sigma < weight.abs().max().item() <= 3 * sigma * (1 + 1e-6)
    assert abs(weight.mean().item()) < 0.01 * sigma


def test_norms_start_as_identity():
    for name, value in create_model(TINY, qk_norm=True).named_parameters():
        if value.ndim == 1:
            assert (value == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("wrap", [lambda layer: layer, checkpoint_wrapper], ids=["plain", "checkpointed"])
def test_compiled_blocks_take_any_length_and_change_neither_weights_nor_loss(wrap: Callable[[nn.Module], nn.Module]):
    plain = create_model(TINY, seed=5, n_layers=1)
    model = create_model(TINY, device="meta", n_layers=1)
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(wrap(layer), backend="aot_eager", fullgraph=True, dynamic=True)
    model.to_empty(device="cpu")
    initialize(model, plain.config, seed=5)
    wrapped = {parameter_name(name): value for name, value in model.named_parameters()}
    assert all(torch.equal(wrapped[name], value) for name, value in plain.named_parameters())
    for length in (5, 3, 4):
        ids = IDS[:, :length]
        torch.testing.assert_close(model(ids, ids), plain(ids, ids))
