"""Causal attention: rotary positions, masks, and the cache of keys and values for generation.

Shape suffixes: B batch, S positions of this call, T positions that can be seen (S, and before them those in the cache),
D hidden_dim, H heads, K head_dim.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.norms import make_norm

_FLEX_MIN_HEAD_DIM = 16
_CPU_HEAD_DIM = 16
"""Narrower heads are filled up with zeros: the CPU's kernel takes 1.7 times as long for heads of 8 as of 16."""

StoreKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keeps the keys and values [B, H, S, K] of a layer, and gives all so far, [B, H, T, K]."""


def rotary_frequencies(head_dim: int, device: torch.device | str = "cpu", theta: float = 10_000.0) -> Tensor:
    """theta^(-2j/K) for j < K/2, in radians per position, fp32. RoPE, https://arxiv.org/abs/2104.09864."""
    return theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


class RotaryFrequencies(nn.Module):
    """Holder of `inv_freq`, the buffer that OpenLM's checkpoints have in every layer."""

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.register_buffer("inv_freq", rotary_frequencies(head_dim, theta=theta))

    def init_buffers(self) -> None:
        self.inv_freq.copy_(rotary_frequencies(self.head_dim, self.inv_freq.device, self.theta))

    def _apply(self, fn, recurse=True):
        before = self.inv_freq
        super()._apply(fn, recurse)
        # bfloat16 frequencies put position 2047 off by up to 3.8 rad: `model.to(bfloat16)` must not round them.
        if self.inv_freq.dtype != before.dtype:
            self.inv_freq = before.to(self.inv_freq.device)
        return self


class Rotation:
    """The rotation of each position, int [S] or [B, S]; call it on queries and keys [B, S, H, K].

    Neither a tensor nor a dataclass, because FSDP's mixed precision looks into those among a block's inputs and
    would cast the tables to bfloat16.
    """

    def __init__(self, frequencies: Tensor, positions: Tensor, interleaved: bool):
        angles = positions.float()[..., None, None] * frequencies  # B, S, 1, K/2: the same for all heads
        self.cos, self.sin, self.interleaved = angles.cos(), angles.sin(), interleaved

    def __call__(self, x_BSHK: Tensor) -> Tensor:
        """Rotate the pairs (i, i + K/2), or (2i, 2i + 1) if interleaved; computed and returned in fp32."""
        a, b = x_BSHK.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else x_BSHK.chunk(2, dim=-1)
        rotated = a * self.cos - b * self.sin, b * self.cos + a * self.sin
        return torch.stack(rotated, dim=-1).flatten(-2) if self.interleaved else torch.cat(rotated, dim=-1)


class KVCache:
    """Keys and values of the positions a model has seen, so that generation computes each once.

    Args:
        max_len: positions it has room for.
        dtype: the type the model computes in.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.n_layers, batch_size, config.kv_heads, max_len, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        """Positions stored by all layers."""

    def append(self, layer: int, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values after `length`; all so far. `length` moves when the last layer has stored.

        Raises:
            ValueError: there is no room for them.
        """
        end = self.length + k_BHSK.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache has room for {self.keys.shape[3]} positions, and {end} are asked for")
        self.keys[layer, :, :, self.length : end] = k_BHSK
        self.values[layer, :, :, self.length : end] = v_BHSK
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows of the batch only, int64."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def document_mask(documents_BS: Tensor, head_dim: int) -> Tensor | BlockMask:
    """The mask of attention within documents: causal, and only where the document's number is the same.

    Args:
        documents_BS: number of the document at each position, int64.

    Returns:
        On CUDA FlexAttention's block mask, which skips what is masked; elsewhere, and for heads narrower than it takes,
        bool [B, 1, S, S].
    """
    batch_size, seq_len = documents_BS.shape
    if documents_BS.is_cuda and head_dim >= _FLEX_MIN_HEAD_DIM:

        def same_document(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (q >= kv) & (documents_BS[b, q] == documents_BS[b, kv])

        return create_block_mask(same_document, batch_size, None, seq_len, seq_len, device=documents_BS.device)
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same_BSS.tril()[:, None]


def cache_mask(seq_len: int, start: int, device: torch.device) -> Tensor | None:
    """The mask of `seq_len` positions after `start` others, bool [1, 1, S, T]; None where SDPA's own will do."""
    if start == 0 or seq_len == 1:
        return None
    queries_S = torch.arange(start, start + seq_len, device=device)
    return (queries_S[:, None] >= torch.arange(start + seq_len, device=device))[None, None]


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def attend(q_BHSK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v under the mask, [B, H, S, K]; without one each position sees those up to itself.

    A single query without a mask sees all keys. Where keys and values have fewer heads, each serves several of queries.
    """
    grouped = q_BHSK.shape[1] != k_BHTK.shape[1]
    if isinstance(mask, BlockMask):
        # Alone it would write out all scores; inside a compiled block it is compiled with it.
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        return flex(q_BHSK, k_BHTK, v_BHTK, block_mask=mask, enable_gqa=grouped)
    is_causal = mask is None
    if q_BHSK.shape[2] == 1:  # a branch, as a comparison is no bool in a graph that is compiled for any length
        is_causal = False
    head_dim = q_BHSK.shape[-1]
    if q_BHSK.device.type == "cpu" and head_dim < _CPU_HEAD_DIM:
        q_BHSK, k_BHTK, v_BHTK = (F.pad(t, (0, _CPU_HEAD_DIM - head_dim)) for t in (q_BHSK, k_BHTK, v_BHTK))
    out_BHSK = F.scaled_dot_product_attention(
        q_BHSK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=is_causal, scale=head_dim**-0.5, enable_gqa=grouped
    )
    return out_BHSK[..., :head_dim]


class Attention(nn.Module):
    """Multi-head attention whose `in_proj` holds queries, keys and values one after another, each by head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.norm_per_head = config.head_dim, config.qk_norm_per_head
        inner_dim = config.n_heads * config.head_dim  # 480, not 488, in the 87m model
        kv_dim = config.kv_heads * config.head_dim
        self.widths = [inner_dim, kv_dim, kv_dim]
        self.in_proj = nn.Linear(config.hidden_dim, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(inner_dim, config.hidden_dim, bias=False)
        if config.positional_embedding in ("rotary", "head_rotary"):
            self.pos_embed = RotaryFrequencies(config.head_dim, config.rope_theta)
        q_width, k_width = (config.head_dim, config.head_dim) if config.qk_norm_per_head else (inner_dim, kv_dim)
        self.q_norm = make_norm(config, q_width) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, k_width) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BSD: Tensor, rotation: Rotation | None, mask: Tensor | BlockMask | None, store: StoreKV | None
    ) -> Tensor:
        q, k, v = self.in_proj(x_BSD).split(self.widths, dim=-1)
        if not self.norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # B, S, H, K
        if self.norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:  # so laid out, attention's result has its heads side by side, as out_proj takes them
            q, k = rotation(q), rotation(k)
        q, k, v = (t.transpose(1, 2) for t in (q.to(v.dtype), k.to(v.dtype), v))
        if store is not None:
            k, v = store(k, v)
        return self.out_proj(attend(q, k, v, mask).transpose(1, 2).flatten(-2))
