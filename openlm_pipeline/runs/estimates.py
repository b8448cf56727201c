"""What a recipe costs, as arithmetic on its settings: operations per token, peaks of devices, memory per GPU.

Operations follow PaLM, appendix B (https://arxiv.org/abs/2204.02311): a token costs 6 operations for each weight that
it is multiplied with, and 12 * layers * width * seq_len for attention, causal or not. What is computed again in the
backward pass does not count. Peaks are the makers' dense numbers, without sparsity, with sums in fp32.

The parts of the memory are what FSDP2 and autograd keep alive: each is an upper bound of its own, and they are added up
although not all of them peak at one time. What the allocator wastes and the CUDA context (about 1 GB) come on top.
Compiled blocks keep less. Against measured peaks of one process the total is right within the factor `TOLERANCE`.

Needs neither torch nor data.
"""

import re
from dataclasses import asdict, dataclass
from typing import Literal

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.models import count_parameters
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.registry import OPTIMIZERS
from openlm_pipeline.runs.layout import layout

Arithmetic = Literal["bf16", "tf32", "fp32"]
"""What matrix products are computed in; `tf32` is what torch does with fp32 tensors where it is allowed to."""


def block_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """[rows, columns] of the matrices of one block, as they are stored: q, k and v in one, SwiGLU's two in one."""
    width, inner, hidden = config.hidden_dim, config.n_heads * config.head_dim, config.ffn_dim
    into = {"gelu": [hidden], "gemma_geglu": [hidden, hidden]}.get(config.ffn, [2 * hidden])
    in_rows = inner + 2 * config.kv_heads * config.head_dim
    return [(in_rows, width), (width, inner), *((rows, width) for rows in into), (width, hidden)]


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: the blocks' matrices and the output matrix, no input embedding."""
    block = sum(rows * columns for rows, columns in block_matrices(config))
    return config.n_layers * block + config.vocab_size * config.hidden_dim


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Operations of one token's forward and backward pass, in samples of `seq_len` tokens."""
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * seq_len
    return 6 * matmul_parameters(config) + attention


def optimizer_flops(experiment: Experiment) -> int:
    """Operations of the optimizer in one step, over all processes, where they are more than a few per parameter."""
    config, training = experiment.model_config_resolved(), experiment.training
    return OPTIMIZERS[training.optimizer](training).flops_per_step(config.n_layers * block_matrices(config))


@dataclass(frozen=True)
class Device:
    """A kind of GPU."""

    name: str
    pattern: str
    """Regular expression for the whole of what torch calls it, without the maker, in lower case."""
    bf16: float | None
    """TFLOP/s; None where there is no such arithmetic."""
    tf32: float | None
    fp32: float
    memory_gb: float
    """Of the smallest edition of that name."""


DEVICES = (
    # Sources: the data sheets of NVIDIA and AMD; for GeForce cards the Ada and Ampere GA102 white papers.
    Device("B200", r"b200", 2250, 1125, 75, 180),
    Device("GB200", r"gb200", 2500, 1250, 80, 186),
    Device("H200 SXM", r"h200( sxm5?)?", 989.4, 494.7, 66.9, 141),
    Device("H200 NVL", r"h200 nvl", 835.5, 417.5, 60, 141),
    Device("GH200", r"gh200( \d+gb)?", 989.4, 494.7, 66.9, 96),
    Device("H100 SXM", r"h100([ -]sxm5?)?([ -]80gb)?( hbm3)?", 989.4, 494.7, 66.9, 80),
    Device("H100 PCIe", r"h100([ -]80gb)?[ -]pcie", 756.5, 378, 51.2, 80),
    Device("H100 NVL", r"h100 nvl", 835.5, 417.5, 60, 94),
    Device("A100", r"a100([ -](sxm4?|pcie))?([ -][48]0gb)?( pcie)?", 312, 156, 19.5, 40),
    Device("A10G", r"a10g", 70, 35, 31.5, 24),
    Device("A10", r"a10", 125, 62.5, 31.2, 24),
    Device("L4", r"l4", 121, 60, 30.3, 24),
    Device("L40", r"l40", 181, 90.5, 90.5, 48),
    Device("L40S", r"l40s", 362, 183, 91.6, 48),
    Device("RTX 4090", r"(geforce )?rtx 4090", 165.2, 82.6, 82.6, 24),
    Device("RTX 3090", r"(geforce )?rtx 3090", 71, 35.6, 35.6, 24),
    Device("V100 SXM2", r"v100([ -]sxm[23])?([ -](16|32)gb)?", None, None, 15.7, 16),
    Device("V100 PCIe", r"v100[ -]pcie([ -](16|32)gb)?", None, None, 14, 16),
    Device("T4", r"t4", None, None, 8.1, 16),
    Device("MI300X", r"mi300x( oam| vf)?", 1307.4, 653.7, 163.4, 192),
)


def find_device(name: str) -> Device | None:
    """The device that torch calls `name` (`NVIDIA H100 80GB HBM3`), or a person (`H100`); None for any other.

    A slice of a GPU, a laptop's or another edition with a like name is another device.
    """
    short = re.sub(r"^((nvidia|tesla|amd|instinct) )+", "", " ".join(name.lower().split()))
    return next((d for d in DEVICES if re.fullmatch(d.pattern, short)), None)


def peak_flops(name: str, arithmetic: Arithmetic) -> float | None:
    """Most operations per second of the device called `name`; None where that is not known."""
    device = find_device(name)
    teraflops = getattr(device, arithmetic) if device else None
    return teraflops * 1e12 if teraflops else None


def device_memory(name: str) -> int | None:
    """Bytes of the device called `name`, of the smallest edition where the name does not say; None if not known."""
    device, said = find_device(name), re.search(r"(\d+) ?gb", name.lower())
    return int(said[1] if said else device.memory_gb) * 10**9 if device else None


BYTES = {"fp32": 4, "bf16": 2}


MOMENTS = {
    "loss": "in the loss",
    "backward": "in the backward pass of the last block",
    "end": "at the end of the backward pass",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the moment of a step when it holds most."""

    moment: str
    """One of `MOMENTS`."""
    weights: int
    """This rank's share of the weights."""
    optimizer: int
    averages: int
    gradients: int
    """Whole ones in fp32 where micro-batches are added up before they are reduced, and those on their way."""
    gathered: int
    """Whole weights of the embeddings and of the blocks under way."""
    activations: int
    """What the backward pass will need."""
    working: int
    """What one moment makes and frees again: logits and their gradients, or the inner values of a block."""

    @property
    def total(self) -> int:
        return sum(value for value in asdict(self).values() if isinstance(value, int))


def block_activations(config: ModelConfig, element_bytes: int, keep: str = "none") -> int:
    """Bytes per token that one block keeps for its backward pass, from its input on.

    Args:
        keep: `none`, `selective` or `full` activation checkpointing.
    """
    width, inner, hidden = config.hidden_dim, config.n_heads * config.head_dim, config.ffn_dim
    products, kv = 2 if config.ffn != "gelu" else 1, config.kv_heads * config.head_dim
    if keep == "full":
        return width * element_bytes  # the block's input
    sums = 4 * config.n_heads  # of the softmax, in fp32
    if keep == "selective":  # also q, k and v, what attention gives, its projection, and the products of the FFN
        return (3 * width + 2 * inner + 2 * kv + products * hidden) * element_bytes + sums
    is_turned = config.qk_norm or config.positional_embedding not in ("none", "head_rotary")
    turned = inner + kv if is_turned else 0  # q and k
    # Input and the sum after attention, each with its norm; q, k and v; attention; the FFN's products, twice activated.
    kept = 4 * width + 2 * inner + 2 * kv + turned + 2 * products * hidden
    return kept * element_bytes + sums


def estimate_memory(experiment: Experiment, processes: int, per_node: int | None = None) -> MemoryEstimate:
    """What each of `processes` needs, of which `per_node` are on a machine, or all.

    Blocks that are compiled keep less, and an allocator and a CUDA context (about 1 GB) take more.
    """
    config, training, execution = experiment.model_config_resolved(), experiment.training, experiment.execution
    num_parameters, compute_bytes = count_parameters(config), BYTES[training.precision]
    state_bytes = BYTES[training.state_precision]
    laid = layout(experiment, processes, per_node)
    shards = processes // laid.replicas
    matrix = config.vocab_size * config.hidden_dim
    embeddings = matrix if config.weight_tying else 2 * matrix
    blocks = num_parameters - embeddings
    block = blocks // config.n_layers
    tokens = laid.micro_batch * experiment.seq_len
    keep, reshard = execution.activation_checkpointing, execution.reshard_after_forward
    in_blocks, elsewhere = OPTIMIZERS[training.optimizer](training).state_values()
    state = {
        "weights": num_parameters * state_bytes // shards,
        "optimizer": int(in_blocks * blocks + elsewhere * embeddings) * state_bytes // shards,
        "averages": len(training.averages) * num_parameters * 4 // shards,
    }
    # FSDP adds up the gradients of micro-batches whole, in the type it will reduce them in.
    summed = num_parameters * 4 if laid.micro_batches > 1 else 0
    stream = tokens * config.hidden_dim * compute_bytes
    by_block = tokens * block_activations(config, compute_bytes, keep)
    kept = config.n_layers * by_block + 2 * stream
    made_again = tokens * block_activations(config, compute_bytes) - by_block
    chunk = min(execution.loss_chunk, tokens)
    copies = 4 if training.z_loss else 3  # log-probabilities and gradients, in fp32
    logits = copies * chunk * config.vocab_size * 4
    if chunk < tokens:  # the gradients of earlier chunks are there; adding one up takes three of the output matrix
        logits = stream + max(logits + matrix * compute_bytes, 3 * matrix * compute_bytes)
    alive = embeddings + (block if reshard else blocks)
    moments = [
        MemoryEstimate(
            "loss", **state, gradients=summed, gathered=alive * compute_bytes, activations=kept, working=logits
        ),
        MemoryEstimate(
            "backward",
            **state,
            gradients=summed + (matrix + config.hidden_dim * config.ffn_dim) * compute_bytes,
            gathered=(alive + (block if reshard else 0)) * compute_bytes,
            activations=kept - stream,
            working=made_again + stream + 2 * tokens * config.ffn_dim * compute_bytes,
        ),
        MemoryEstimate(
            "end",
            **state,
            gradients=4 * num_parameters // shards + matrix * (8 if summed else 4),
            gathered=0,
            activations=0,
            working=0,
        ),
    ]
    return max(moments, key=lambda m: m.total)
