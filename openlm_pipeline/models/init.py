"""Initial weights: a pure function of each parameter's name and the seed.

So they are bitwise the same on every mesh, at any world size and in any order of construction. Sigmas and truncation
are open_lm's.
"""

import itertools
import math
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

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
    if config.init_std is not None:
        return config.init_std
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


def shares(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank takes each of some tensors, of these sizes: the one that has least so far."""
    taken, takers = [0] * ranks, []
    for size in sizes:
        takers.append(taken.index(min(taken)))
        taken[takers[-1]] += size
    return takers


@torch.no_grad()
def initialize(model: Transformer, config: ModelConfig, seed: int, threads: int = 1) -> None:
    """Fill parameters and buffers in place; `model` may be sharded by `fully_shard` and come from `to_empty`.

    The ranks that share a copy of the weights draw whole tensors on the CPU, about as many values each, and send the
    others their rows; so a GPU starts from the same weights as a CPU.

    Args:
        threads: in which a rank draws tensors ahead; each takes the memory of one.
    """
    named = [(parameter_name(name), parameter) for name, parameter in model.named_parameters()]
    meshes = [parameter.device_mesh for _, parameter in named if isinstance(parameter, DTensor)]
    group = meshes[0] if meshes else None
    if group and group.ndim > 1:
        group = group[group.mesh_dim_names[-1]]  # inside a replica
    rank, size = (group.get_local_rank(), group.size()) if group else (0, 1)
    drawers = shares([p.numel() for _, p in named], size)
    with ThreadPoolExecutor(threads, thread_name_prefix="init") as pool:
        ahead: deque[Future[Tensor]] = deque()
        mine = iter([(name, p.shape) for (name, p), drawer in zip(named, drawers) if drawer == rank])

        def draw_ahead() -> None:
            for name, shape in itertools.islice(mine, threads - len(ahead)):
                ahead.append(pool.submit(initial_values, name, shape, config, seed))

        for (_, parameter), drawer in zip(named, drawers):
            draw_ahead()
            if not isinstance(parameter, DTensor):
                parameter.copy_(ahead.popleft().result())
                continue
            drawn = ahead.popleft().result() if drawer == rank else torch.empty(parameter.shape)
            part = distribute_tensor(drawn.to(parameter.device), group, parameter.placements[-1:], src_data_rank=drawer)
            parameter.to_local().copy_(part.to_local())
    model.init_buffers()
