"""The sharded model: what is done to a model before it trains, in the one order that works.

Float8 replaces linear layers; activation checkpointing wraps blocks; compilation takes a wrapped block as one graph;
FSDP2 shards around it, over one mesh axis or two. Names in the state dict stay those of the bare model throughout.
"""

import functools
import os

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.runs.layout import layout
from train.distributed import World

_aten = torch.ops.aten
_KEPT_BY_SELECTIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}
"""Matrix products and attention: dear to make again, while norms, rotations and activations are cheap."""

_FLOAT8_CAPABILITY = (8, 9)
_FLOAT8_ALIGNMENT = 16
"""Float8 matrix products want both sides of a weight to be a multiple of this."""


def use_deterministic_algorithms() -> None:
    """Only operations that give the same bits each time. Call before the first matrix product on a GPU.

    An operation that has no such form raises. https://pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16; a processor without does it more slowly than fp32."""
    has = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def make_mesh(world: World, replicas: int) -> DeviceMesh:
    """All processes as one axis `shard`, or as `replicate` x `shard` where each of `replicas` groups has all weights.

    Neighbouring ranks are in one group, so a group of a node's size keeps gathering inside the node. `replicas` divides
    the processes.
    """
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (replicas, world.size // replicas)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    mesh._flatten()  # lets DTensor sum the gradient norm over both axes at once, and so alike on every rank
    return mesh


def build_model(experiment: Experiment, world: World) -> Transformer:
    """The experiment's model, sharded by block; its weights are not set yet.

    Raises:
        ConfigError: the batch does not divide over the processes, or float8 is not to be had here.
    """
    training, execution = experiment.training, experiment.execution
    mesh = make_mesh(world, layout(experiment, world.size, world.per_node).replicas)
    config = experiment.model_config_resolved()
    with torch.device("meta"):
        model = Transformer(config)
    if training.state_precision == "bf16":
        model.to(torch.bfloat16)
    if training.float8:
        require_float8(world.device)
        to_float8(model)
    model.output.loss_chunk = execution.loss_chunk
    compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[training.precision]
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for name, block in model.layers.named_children():
        if execution.activation_checkpointing != "none":
            block = with_activation_checkpointing(block, selective=execution.activation_checkpointing == "selective")
            model.layers.register_module(name, block)
        if execution.compile:
            block.compile(fullgraph=True)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=execution.reshard_after_forward)
    if execution.compile:
        model.final_norm = torch.compile(model.final_norm, fullgraph=True)
        model.output.chunk_loss = torch.compile(model.output.chunk_loss, fullgraph=True)
    if not config.weight_tying:  # units of their own: nothing waits for both, and one is reduced at the end
        for unit in (model.tok_embeddings, model.output):
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=world.device)
    model.init_buffers()
    return model


def with_activation_checkpointing(block: nn.Module, *, selective: bool) -> nn.Module:
    """The block, whose inner activations are made again in the backward pass: all, or those cheap to make."""
    if not selective:
        return checkpoint_wrapper(block, preserve_rng_state=False)

    def keep(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        kept = operation in _KEPT_BY_SELECTIVE
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    return checkpoint_wrapper(block, preserve_rng_state=False, context_fn=contexts)


def require_float8(device: torch.device) -> None:
    """
    Raises:
        ConfigError: the device has no float8 matrix products.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY:
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ConfigError(f"training.float8 needs an NVIDIA GPU of the H100's kind or later; here is {found}")


def to_float8(model: Transformer, *, emulate: bool = False) -> None:
    """Replace the blocks' linear layers, in place, by torchao's, with one dynamic scale a tensor.

    Layers whose sides are no multiple of 16 stay, and so do embedding and head, as torchao advises.

    Args:
        emulate: compute in the layers' own type what float8 would give, on any device.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as e:
        raise ConfigError("training.float8 needs torchao: pip install 'openlm-pipeline[float8]'") from e

    def is_wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(side % _FLOAT8_ALIGNMENT for side in module.weight.shape)

    convert_to_float8_training(model.layers, config=Float8LinearConfig(emulate=emulate), module_filter_fn=is_wanted)
