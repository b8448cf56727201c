"""What the scorer asks of a model, and OpenLM's Transformer as one.

A model loads on its first use. In bf16 it keeps fp32 weights and computes under autocast, as LLM Foundry's `amp_bf16`
does: norms, softmax and log-probabilities stay fp32.
Shape suffixes: B batch, S positions of this call, P positions whose logits are wanted, V vocabulary.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openlm_pipeline.models.attention import KVCache

Precision = Literal["fp32", "tf32", "bf16"]
"""What matrix products of fp32 weights are computed in. `tf32` is fp32 where the device has no TF32."""


class Decoding(Protocol):
    """A batch of texts under way; what was computed of them is kept."""

    def step(self, ids_BS: Tensor) -> Tensor:
        """Add tokens to each text; fp32 logits [B, V] after the last of them."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Continue with these texts only, int64 indices into the batch."""
        ...


class ScoringModel(ABC):
    """A causal language model: position i sees positions 0..i only."""

    end_ids: tuple[int, ...] = ()
    """Tokens that end a text; empty where the model does not say."""
    max_branched_len: int = sys.maxsize
    """Longest row for which `logits` follows `segments_BS` and `positions_BS`; 0 if it cannot at all."""

    def __init__(self, load: Callable[[], nn.Module], device: str = "cpu", precision: Precision = "fp32") -> None:
        """
        Args:
            load: gives the model with fp32 weights; called once, on first use.
        """
        self._load, self.device, self.precision = load, local_device(device), precision

    @cached_property
    def model(self) -> nn.Module:
        return self._load().to(self.device).eval()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Logits of a position."""

    @abstractmethod
    def logits(
        self,
        ids_BS: Tensor,
        rows_P: Tensor,
        columns_P: Tensor,
        *,
        segments_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """fp32 logits [P, V] at the positions (row, column) of a batch that is padded on the right.

        Args:
            ids_BS: int64, as all integers here.
            segments_BS: 0 in what a row's branches share, then a number for each branch: see `branch_mask`. Without
                it a row is one text.
            positions_BS: place of each token in its own text; given with `segments_BS`.
        """

    @abstractmethod
    def decoding(self, batch_size: int, max_len: int) -> Decoding:
        """Start `batch_size` texts of at most `max_len` tokens."""


def branch_mask(segments_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S]: a position sees those before it that all branches share or that are of its own branch."""
    keys, queries = segments_BS[:, None, :], segments_BS[:, :, None]
    return ((keys == 0) | (keys == queries)).tril()[:, None]


def local_device(name: str) -> torch.device:
    """`cuda` is this process's own GPU under torchrun; others are what they say."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


class _OneDnnProducts(TorchFunctionMode):
    """Products of fp32 matrices by oneDNN: in fp32 too, and 1.2 times as fast as MKL on an AMD CPU with AVX-512."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not F.linear or kwargs or args[0].dtype != torch.float32:
            return function(*args, **(kwargs or {}))
        bias = args[2] if len(args) > 2 else None
        return torch.ops.mkldnn._linear_pointwise(*args[:2], bias, "none", [], "")


@contextmanager
def computing(device: torch.device, precision: Precision) -> Iterator[None]:
    """The context in which a model of this precision computes: TF32 is allowed by it, and not by what was set before.

    What it sets of TF32 stays set after the context.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    rounded = precision == "bf16"
    on_cpu = device.type == "cpu" and not rounded and torch.backends.mkldnn.is_available()
    fast = on_cpu and torch.backends.cpu.get_cpu_capability() == "AVX512"
    with torch.autocast(device.type, torch.bfloat16, enabled=rounded), _OneDnnProducts() if fast else nullcontext():
        yield


class _NativeDecoding:
    def __init__(self, owner: "NativeModel", batch_size: int, max_len: int) -> None:
        self.owner = owner
        dtype = torch.bfloat16 if owner.precision == "bf16" else torch.float32
        self.cache = KVCache(owner.model.config, batch_size, max_len, device=owner.device, dtype=dtype)
        self.keep = self.cache.keep

    @torch.no_grad()
    def step(self, ids_BS: Tensor) -> Tensor:
        with computing(self.owner.device, self.owner.precision):
            hidden_BSD = self.owner.model.hidden(ids_BS, cache=self.cache)
            return self.owner.model.output(hidden_BSD[:, -1]).float()


class NativeModel(ScoringModel):
    """An OpenLM model."""

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @torch.no_grad()
    def logits(self, ids_BS, rows_P, columns_P, *, segments_BS=None, positions_BS=None) -> Tensor:
        mask = None if segments_BS is None else branch_mask(segments_BS)
        with computing(self.device, self.precision):
            hidden_BSD = self.model.hidden(ids_BS, positions_BS=positions_BS, mask=mask)
            return self.model.output(hidden_BSD[rows_P, columns_P]).float()

    def decoding(self, batch_size: int, max_len: int) -> Decoding:
        return _NativeDecoding(self, batch_size, max_len)
