"""OpenLM's decoder-only Transformer: pre-norm blocks, causal attention, no biases but those of the norms.

The names and layout of `state_dict` are those of open_lm, so that its checkpoints load as they are.
Shape suffixes: B batch, S sequence, D hidden_dim, H heads, K head_dim, F feed-forward width, V vocabulary, N = B*S.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openlm_pipeline.models.config import ModelConfig

NORM_EPS = 1e-5
ROPE_THETA = 10_000.0
IGNORE_INDEX = -100
LOSS_CHUNK = 2048
"""Positions whose logits exist at one time in the loss: 2048 * 50432 fp32 logits are 413 MB."""


class LowPrecisionLayerNorm(nn.LayerNorm):
    """LayerNorm that stays in autocast's type instead of fp32; the same as LayerNorm where there is no autocast."""

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        if not torch.is_autocast_enabled(device_type):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device_type)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm that `config.norm` names, over the last axis."""
    match config.norm:
        case "default_layer_norm":
            return nn.LayerNorm(width, NORM_EPS)
        case "lp_layer_norm":
            return LowPrecisionLayerNorm(width, NORM_EPS)
        case "gain_only_layer_norm":
            return nn.LayerNorm(width, NORM_EPS, bias=False)
        case "gain_only_lp_layer_norm":
            return LowPrecisionLayerNorm(width, NORM_EPS, bias=False)
        case "no_wb_layer_norm":
            return nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)
        case "rms_norm":
            return nn.RMSNorm(width, NORM_EPS)
    raise AssertionError(config.norm)


def rotary_frequencies(head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """theta^(-2j/K) for j < K/2, in radians per position, fp32. RoPE, https://arxiv.org/abs/2104.09864."""
    return ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


class RotaryFrequencies(nn.Module):
    """Holder of `inv_freq`, the buffer that OpenLM's checkpoints have in every layer."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inv_freq", rotary_frequencies(head_dim))

    def init_buffers(self) -> None:
        self.inv_freq.copy_(rotary_frequencies(self.head_dim, self.inv_freq.device))

    def _apply(self, fn, recurse=True):
        before = self.inv_freq
        super()._apply(fn, recurse)
        # bfloat16 frequencies put position 2047 off by up to 3.8 rad: `model.to(bfloat16)` must not round them.
        if self.inv_freq.dtype != before.dtype:
            self.inv_freq = before.to(self.inv_freq.device)
        return self


class Rotation:
    """The rotation of each position; call it on queries and keys.

    Neither a tensor nor a dataclass, because FSDP's mixed precision looks into those among a block's inputs and
    would cast the tables to bfloat16.
    """

    def __init__(self, frequencies: Tensor, seq_len: int, interleaved: bool):
        positions = torch.arange(seq_len, device=frequencies.device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)  # S, K/2
        self.cos, self.sin, self.interleaved = angles.cos(), angles.sin(), interleaved

    def __call__(self, x_BHSK: Tensor) -> Tensor:
        """Rotate the pairs (i, i + K/2), or (2i, 2i + 1) if interleaved; computed and returned in fp32."""
        a, b = x_BHSK.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else x_BHSK.chunk(2, dim=-1)
        rotated = a * self.cos - b * self.sin, b * self.cos + a * self.sin
        return torch.stack(rotated, dim=-1).flatten(-2) if self.interleaved else torch.cat(rotated, dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        inner_dim = config.n_heads * config.head_dim  # 480, not 488, in the 87m model
        self.in_proj = nn.Linear(config.hidden_dim, 3 * inner_dim, bias=False)
        self.out_proj = nn.Linear(inner_dim, config.hidden_dim, bias=False)
        if config.positional_embedding in ("rotary", "head_rotary"):
            self.pos_embed = RotaryFrequencies(config.head_dim)
        self.q_norm = make_norm(config, inner_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, inner_dim) if config.qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, rotation: Rotation | None) -> Tensor:
        q, k, v = self.in_proj(x_BSD).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))  # B, H, S, K
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        out_BHSK = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.out_proj(out_BHSK.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """w3(silu(gate) * up), gate and up being the first and second half of w12. https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w12 = nn.Linear(config.hidden_dim, 2 * config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.ffn_dim, config.hidden_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate_BSF, up_BSF = self.w12(x_BSD).chunk(2, dim=-1)
        return self.w3(F.silu(gate_BSF) * up_BSF)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        if config.ffn == "gelu":
            # OpenLM registers these twice, so that its checkpoints hold `_ff_w1` and `feed_forward.0`, and so on.
            self._ff_w1 = nn.Linear(config.hidden_dim, config.ffn_dim, bias=False)
            self._ff_w2 = nn.Linear(config.ffn_dim, config.hidden_dim, bias=False)
            self.feed_forward = nn.Sequential(self._ff_w1, nn.GELU(), self._ff_w2)
        else:
            self.feed_forward = SwiGLU(config)
        self.attention_norm = make_norm(config, config.hidden_dim)
        self.ffn_norm = make_norm(config, config.hidden_dim)

    def forward(self, x_BSD: Tensor, rotation: Rotation | None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotation)
        return x_BSD + self.feed_forward(self.ffn_norm(x_BSD))


class Transformer(nn.Module):
    """A language model. After construction on the meta device and `to_empty`, call `init_buffers` before use."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.post_embed_norm = make_norm(config, config.hidden_dim) if config.post_embed_norm else nn.Identity()
        output = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        # One module under two names, not two modules with one weight: `to_empty` would separate those.
        self.tok_embeddings = output if config.weight_tying else nn.Embedding(config.vocab_size, config.hidden_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = make_norm(config, config.hidden_dim)
        self.output = output

    def init_buffers(self) -> None:
        """Set the rotary frequencies to their formula; a checkpoint loaded later brings its own."""
        for module in self.modules():
            if isinstance(module, RotaryFrequencies):
                module.init_buffers()

    def rotation(self, seq_len: int, device: torch.device) -> Rotation | None:
        """What turns queries and keys by their position, None for a model without positions."""
        kind = self.config.positional_embedding
        # head_rotary turns q and k of a head by one and the same angle, which leaves every score as it was.
        if kind in ("none", "head_rotary"):
            return None
        if kind == "rotary":
            frequencies = self.layers[0].attention.pos_embed.inv_freq
        else:
            frequencies = rotary_frequencies(self.config.head_dim, device)
        if self.config.rope_freq_dtype == "bfloat16":
            frequencies = frequencies.bfloat16().float()
        return Rotation(frequencies, seq_len, interleaved=kind == "llama_rotary")

    def hidden(self, ids_BS: Tensor) -> Tensor:
        """Token ids -> hidden states [B, S, D] after the final norm; `output` makes logits of them.

        Under FSDP only calls of the model itself gather the parameters: use `model(ids)` or `model(ids, targets)`.
        """
        rotation = self.rotation(ids_BS.shape[1], ids_BS.device)
        x_BSD = self.post_embed_norm(F.embedding(ids_BS, self.tok_embeddings.weight))
        for layer in self.layers:
            x_BSD = layer(x_BSD, rotation)
        return self.norm(x_BSD)

    def forward(self, ids_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or with targets the loss sums.

        Args:
            ids_BS: token ids, int64 or int32.
            targets_BS: the id each position should predict, int64; -100 where there is none.

        Returns:
            Without targets: logits [B, S, V], fp32.
            With targets: 0-d fp32 sums over the positions that have a target: of the cross-entropy in nats, and of the
            squared log-partition for the z-loss. Leave the second out of the loss where its coefficient is 0: it costs
            a backward pass of its own through the logits.
        """
        x_BSD = self.hidden(ids_BS)
        if targets_BS is None:
            return self.output(x_BSD).float()
        return loss_sums(x_BSD.flatten(0, 1), self.output, targets_BS.flatten())


def loss_sums(x_ND: Tensor, output: nn.Module, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of cross-entropy and of squared log-partition, see `Transformer.forward`.

    More than LOSS_CHUNK positions are taken in chunks whose logits are made again in the backward pass.
    """
    if len(x_ND) <= LOSS_CHUNK:
        return _chunk_loss_sums(x_ND, output, targets_N)
    chunks = zip(x_ND.split(LOSS_CHUNK), targets_N.split(LOSS_CHUNK))
    sums = [
        checkpoint(_chunk_loss_sums, x, output, t, use_reentrant=False, preserve_rng_state=False) for x, t in chunks
    ]
    return torch.stack([ce for ce, _ in sums]).sum(), torch.stack([z for _, z in sums]).sum()


def _chunk_loss_sums(x_ND: Tensor, output: nn.Module, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    logits_NV = output(x_ND).float()
    ce_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")
    valid_N = targets_N != IGNORE_INDEX
    target_logit_N = logits_NV.gather(1, targets_N.where(valid_N, 0)[:, None])[:, 0]
    # Cross-entropy is log-partition minus target logit, so the log-partition needs no second pass over the logits.
    return ce_N.sum(), (ce_N + target_logit_N).square().where(valid_N, 0.0).sum()
