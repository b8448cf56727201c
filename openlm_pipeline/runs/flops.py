"""Floating-point operations a token costs, and what devices can do at most: the two sides of MFU.

Both follow PaLM, appendix B (https://arxiv.org/abs/2204.02311): a token costs 6 operations for each weight that it is
multiplied with, and 12 * layers * width * seq_len for attention, causal or not. What is computed again in the backward
pass does not count. Peaks are the makers' dense numbers, without sparsity, with sums in fp32. Needs no torch.
"""

import re
from dataclasses import dataclass
from typing import Literal

from openlm_pipeline.models.config import ModelConfig

Arithmetic = Literal["bf16", "tf32", "fp32"]
"""What matrix products are computed in; `tf32` is what torch does with fp32 tensors where it is allowed to."""


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: the blocks' matrices and the output matrix, no input embedding."""
    attention = 4 * config.hidden_dim * config.n_heads * config.head_dim
    feed_forward = (2 if config.ffn == "gelu" else 3) * config.hidden_dim * config.ffn_dim
    return config.n_layers * (attention + feed_forward) + config.vocab_size * config.hidden_dim


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Operations of one token's forward and backward pass, in samples of `seq_len` tokens."""
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * seq_len
    return 6 * matmul_parameters(config) + attention


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


DEVICES = (
    # Sources: the data sheets of NVIDIA and AMD; for GeForce cards the Ada and Ampere GA102 white papers.
    Device("B200", r"b200", 2250, 1125, 75),
    Device("GB200", r"gb200", 2500, 1250, 80),
    Device("H200 SXM", r"h200( sxm5?)?", 989.4, 494.7, 66.9),
    Device("H200 NVL", r"h200 nvl", 835.5, 417.5, 60),
    Device("GH200", r"gh200( \d+gb)?", 989.4, 494.7, 66.9),
    Device("H100 SXM", r"h100([ -]sxm5?)?([ -]80gb)?( hbm3)?", 989.4, 494.7, 66.9),
    Device("H100 PCIe", r"h100([ -]80gb)?[ -]pcie", 756.5, 378, 51.2),
    Device("H100 NVL", r"h100 nvl", 835.5, 417.5, 60),
    Device("A100", r"a100([ -](sxm4?|pcie))?([ -][48]0gb)?( pcie)?", 312, 156, 19.5),
    Device("A10G", r"a10g", 70, 35, 31.5),
    Device("A10", r"a10", 125, 62.5, 31.2),
    Device("L4", r"l4", 121, 60, 30.3),
    Device("L40", r"l40", 181, 90.5, 90.5),
    Device("L40S", r"l40s", 362, 183, 91.6),
    Device("RTX 4090", r"(geforce )?rtx 4090", 165.2, 82.6, 82.6),
    Device("RTX 3090", r"(geforce )?rtx 3090", 71, 35.6, 35.6),
    Device("V100 SXM2", r"v100([ -]sxm[23])?([ -](16|32)gb)?", None, None, 15.7),
    Device("V100 PCIe", r"v100[ -]pcie([ -](16|32)gb)?", None, None, 14),
    Device("T4", r"t4", None, None, 8.1),
    Device("MI300X", r"mi300x( oam| vf)?", 1307.4, 653.7, 163.4),
)


def find_device(name: str) -> Device | None:
    """The device that torch calls `name` (`NVIDIA H100 80GB HBM3`), or a person (`H100`); None for any other.

    A slice of a GPU, a laptop's or another edition with a like name is another device.
    """
    short = re.sub(r"^((nvidia|tesla|amd|instinct) )+", "", " ".join(name.lower().split()))
    return next((d for d in DEVICES if re.fullmatch(d.pattern, short)), None)


def peak_flops(name: str, arithmetic: Arithmetic) -> float | None:
    """Most operations a second of the device called `name`; None where that is not known."""
    device = find_device(name)
    teraflops = getattr(device, arithmetic) if device else None
    return teraflops * 1e12 if teraflops else None
