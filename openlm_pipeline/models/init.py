"""Initial weights: a pure function of each parameter's name and the seed.

So they are bitwise the same on every mesh, at any world size and in any order of construction. Sigmas and truncation
are open_lm's.
"""

import math
import zlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer

_GEGLU = ("gate_proj", "up_proj", "down_proj")
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")


def parameter_name(name: str) -> str:
    """A parameter's own name, without what torch.compile and activation checkpointing put before it."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def init_std(name: str, config: ModelConfig) -> float:
    """Standard deviation, before truncation, of the weight matrix `name`: OpenLM's rule.

    1/sqrt(fan_in), and for the two matrices that write to the residual stream of layer l also 1/sqrt(2(l + 1)).
    OpenLM takes hidden_dim as the fan-in of `out_proj` even where the heads are narrower (87m).
    """
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module in ("w3", "_ff_w2"):
        return _depth_scale(name) / math.sqrt(config.ffn_dim)
    if module == "out_proj":
        return _depth_scale(name) / math.sqrt(config.hidden_dim)
    if module in ("tok_embeddings", "output", "in_proj", "w12", "_ff_w1"):
        return 1 / math.sqrt(config.hidden_dim)
    raise AssertionError(f"no rule for the initial values of {name}")


def _depth_scale(name: str) -> float:
    layer = int(name.split(".")[1])
    return 1 / math.sqrt(2 * (layer + 1))


def initial_values(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The full fp32 value of a parameter, on the CPU: matrices a normal cut at 3 sigma, gains 1, biases 0.

    OpenLM leaves its GeGLU as torch makes a Linear: weights and biases uniform within 1/sqrt(fan_in).
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{seed}".encode()))
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module in _GEGLU:
        bound = 1 / math.sqrt(config.ffn_dim if module == "down_proj" else config.hidden_dim)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = init_std(name, config)
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-3 * std, b=3 * std, generator=generator)


@torch.no_grad()
def initialize(model: Transformer, config: ModelConfig, seed: int) -> None:
    """Fill parameters and buffers in place; `model` may be sharded by `fully_shard` and come from `to_empty`.

    Every rank draws each full tensor on the CPU and keeps its part, so nothing is communicated, and a GPU starts from
    the same weights as a CPU.
    """
    for wrapped_name, parameter in model.named_parameters():
        full = initial_values(parameter_name(wrapped_name), parameter.shape, config, seed)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            full = distribute_tensor(full.to(parameter.device), mesh, placements, src_data_rank=None)
        parameter.copy_(full)
    model.init_buffers()
