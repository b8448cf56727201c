"""The fused kernel of attention that a run trains with on a GPU: the fastest for its shapes there.

Kernels are timed once, by rank 0 for all. The run folder keeps their order for each kind of GPU, so that a resumed run
continues with the same one. With `execution.deterministic` nothing is timed, and cuDNN's is not used.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.runs.layout import layout
from openlm_pipeline.storage.files import read_json, write_json
from train.distributed import World

_KERNELS = {
    "flash": (SDPBackend.FLASH_ATTENTION, cuda.can_use_flash_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, cuda.can_use_efficient_attention),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, cuda.can_use_cudnn_attention),
}
_DETERMINISTIC = ["flash", "efficient"]
_WARM_UP, _TIMED = 3, 20
Shape = tuple[int, int, int, int]
"""Sequences, positions, heads, head_dim: as the projections lay them."""


def seconds_of(kernel: str, shape: Shape, dtype: torch.dtype) -> float | None:
    """Seconds of causal attention's forward and backward pass on this GPU; None where the kernel can't take it."""
    random = torch.Generator("cuda").manual_seed(0)
    q, k, v, gradient = (
        torch.randn(shape, generator=random, dtype=dtype, device="cuda").transpose(1, 2) for _ in range(4)
    )
    inputs = [t.requires_grad_() for t in (q, k, v)]
    backend, can_use = _KERNELS[kernel]
    if not can_use(cuda.SDPAParams(*inputs, None, 0.0, True, False)):
        return None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with sdpa_kernel(backend):
        for i in range(_WARM_UP + _TIMED):
            if i == _WARM_UP:
                begin.record()
            torch.autograd.grad(F.scaled_dot_product_attention(*inputs, is_causal=True), inputs, gradient)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / _TIMED


def fastest_first(
    file: Path, gpu: str, seconds: Callable[[str], float | None], say: Callable[[str], None]
) -> list[str]:
    """The kernels that take the shapes, as `file` has them for this GPU; else timed, and written there."""
    known = read_json(file) if file.exists() else {}
    if gpu not in known:
        timed: dict[str, float | None] = dict.fromkeys(_KERNELS)
        for kernel in _KERNELS:
            try:
                timed[kernel] = seconds(kernel)
            except RuntimeError as e:  # cuDNN may say only now that it has no plan for a shape
                say(f"attention: {kernel} is left out: {e}")
        order = sorted((k for k, s in timed.items() if s is not None), key=timed.__getitem__)
        write_json(file, known | {gpu: order})
        say("attention: " + (", ".join(f"{k} {timed[k] * 1e3:.3f} ms" for k in order) or "no fused kernel takes it"))
        return order
    say(f"attention: {known[gpu][0] if known[gpu] else 'no fused kernel'}, as when the run began on {gpu}")
    return known[gpu]


def attention_kernels(
    experiment: Experiment, world: World, file: Path, say: Callable[[str], None]
) -> AbstractContextManager:
    """Within it attention takes the first kernel of the run's order that its shapes allow; on a CPU nothing changes."""
    if world.device.type != "cuda":
        return nullcontext()
    order = _DETERMINISTIC
    if not experiment.execution.deterministic:
        config, training = experiment.model_config_resolved(), experiment.training
        sequences = layout(experiment, world.size, world.per_node).micro_batch
        shape = (sequences, experiment.seq_len, config.n_heads, config.head_dim)
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        gpu = torch.cuda.get_device_name(world.device)
        order = world.from_rank0(lambda: fastest_first(file, gpu, lambda k: seconds_of(k, shape, dtype), say))
    return sdpa_kernel([*(_KERNELS[kernel][0] for kernel in order), SDPBackend.MATH], set_priority=True)
