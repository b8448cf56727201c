"""OpenLM's decoder-only Transformer: pre-norm blocks, causal attention, no biases but those of norms and of GeGLU.

The names and layout of `state_dict` are those of open_lm, so that its checkpoints load as they are.
Shape suffixes: B batch, S sequence, D hidden_dim, F feed-forward width, V vocabulary, N = B*S; T = S and, before it,
the positions in the cache.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from openlm_pipeline.models.attention import (
    Attention,
    KVCache,
    RotaryFrequencies,
    Rotation,
    StoreKV,
    cache_mask,
    document_mask,
    rotary_frequencies,
)
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.norms import make_norm

IGNORE_INDEX = -100
LOSS_CHUNK = 2048
"""Positions whose logits exist at one time in the loss: 2048 * 50432 fp32 logits are 413 MB."""


class SwiGLU(nn.Module):
    """w3(silu(gate) * up), gate and up being the first and second half of w12. https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w12 = nn.Linear(config.hidden_dim, 2 * config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.ffn_dim, config.hidden_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate_BSF, up_BSF = self.w12(x_BSD).chunk(2, dim=-1)
        return self.w3(F.silu(gate_BSF) * up_BSF)


class GeGLU(nn.Module):
    """down(gelu(gate) * up), with biases. https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_dim, config.ffn_dim)
        self.up_proj = nn.Linear(config.hidden_dim, config.ffn_dim)
        self.down_proj = nn.Linear(config.ffn_dim, config.hidden_dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        if config.ffn == "gelu":
            # OpenLM registers these twice, so that its checkpoints hold `_ff_w1` and `feed_forward.0`, and so on.
            self._ff_w1 = nn.Linear(config.hidden_dim, config.ffn_dim, bias=False)
            self._ff_w2 = nn.Linear(config.ffn_dim, config.hidden_dim, bias=False)
            self.feed_forward = nn.Sequential(self._ff_w1, nn.GELU(), self._ff_w2)
        elif config.ffn == "gemma_geglu":
            self.feed_forward = GeGLU(config)
        else:
            self.feed_forward = SwiGLU(config)
        self.attention_norm = make_norm(config, config.hidden_dim)
        self.ffn_norm = make_norm(config, config.hidden_dim)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation | None,
        mask: Tensor | BlockMask | None = None,
        store: StoreKV | None = None,
    ) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotation, mask, store)
        return x_BSD + self.feed_forward(self.ffn_norm(x_BSD))


class Output(nn.Linear):
    """The output matrix. It makes the loss as well, so that FSDP gathers it once for all chunks of the loss."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_dim, config.vocab_size, bias=False)
        self.loss_chunk = LOSS_CHUNK
        """Positions whose logits exist at one time in the loss."""
        self.chunk_loss = chunk_loss_sums
        """The loss of such a chunk; may be compiled."""

    def forward(
        self, x_ND: Tensor, targets_N: Tensor | None = None, with_z: bool = True
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits, or with targets the sums of cross-entropy and of squared log-partition, see `Transformer.forward`.

        More than `loss_chunk` positions are taken in chunks whose logits are made again in the backward pass.
        """
        if targets_N is None:
            return F.linear(x_ND, self.weight)
        if len(x_ND) <= self.loss_chunk:
            return self.chunk_loss(x_ND, self.weight, targets_N, with_z)
        sums = [
            checkpoint(self.chunk_loss, x, self.weight, t, with_z, use_reentrant=False, preserve_rng_state=False)
            for x, t in zip(x_ND.split(self.loss_chunk), targets_N.split(self.loss_chunk))
        ]
        return torch.stack([ce for ce, _ in sums]).sum(), torch.stack([z for _, z in sums]).sum() if with_z else None


def apply_norm(norm: nn.Module, x_BSD: Tensor) -> Tensor:
    """A function of its own, because torch's norms can't be compiled as modules."""
    return norm(x_BSD)


class Transformer(nn.Module):
    """A language model. After construction on the meta device and `to_empty`, call `init_buffers` before use."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.final_norm = apply_norm
        """Applies `norm`; may be compiled."""
        self.post_embed_norm = make_norm(config, config.hidden_dim) if config.post_embed_norm else nn.Identity()
        output = Output(config)
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

    def rotation(self, positions: Tensor) -> Rotation | None:
        """What turns queries and keys at the positions, int [S] or [B, S]; None for a model without positions."""
        kind = self.config.positional_embedding
        # head_rotary turns q and k of a head by one and the same angle, which leaves every score as it was.
        if kind in ("none", "head_rotary"):
            return None
        if kind == "rotary":
            frequencies = self.layers[0].attention.pos_embed.inv_freq
        else:
            frequencies = rotary_frequencies(self.config.head_dim, positions.device, self.config.rope_theta)
        if self.config.rope_freq_dtype == "bfloat16":
            frequencies = frequencies.bfloat16().float()
        return Rotation(frequencies, positions, interleaved=kind == "llama_rotary")

    def hidden(
        self,
        ids_BS: Tensor,
        *,
        documents_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Token ids -> hidden states [B, S, D] after the final norm; `output` makes logits of them.

        Under FSDP only calls of the model itself gather the parameters: use `model(ids)` or `model(ids, targets)`.

        Args:
            documents_BS: number of the document at each position, int64: attention stays within a document. Not with
                `cache`.
            positions_BS: position of each token, int64, where it isn't its place after what the cache holds.
            cache: keys and values of the tokens before these; these are added to it.
            mask: bool [B, 1, S, S], True where a query sees a key, in place of what the other arguments would give.
        """
        seq_len, start = ids_BS.shape[1], 0 if cache is None else cache.length
        if mask is not None:
            assert documents_BS is None and cache is None
        elif documents_BS is None:
            mask = cache_mask(seq_len, start, ids_BS.device)
        else:
            assert cache is None
            mask = document_mask(documents_BS, self.config.head_dim)
        if positions_BS is None:
            positions_BS = torch.arange(start, start + seq_len, device=ids_BS.device)
        rotation = self.rotation(positions_BS)
        tied = self.tok_embeddings is self.output
        x_BSD = F.embedding(ids_BS, self.output.weight) if tied else self.tok_embeddings(ids_BS)
        x_BSD = self.post_embed_norm(x_BSD)
        for i, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, rotation, mask, None if cache is None else partial(cache.append, i))
        if cache is not None:
            cache.length += seq_len
        return self.final_norm(self.norm, x_BSD)

    def forward(
        self,
        ids_BS: Tensor,
        targets_BS: Tensor | None = None,
        *,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
        with_z: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits, or with targets the loss sums.

        Args:
            ids_BS: token ids, int64 or int32.
            targets_BS: the id each position should predict, int64; -100 where there is none.
            documents_BS, cache: as for `hidden`.
            with_z: give the second sum. Without a backward pass of its own it would keep the logits of every chunk.

        Returns:
            Without targets: logits [B, S, V], fp32.
            With targets: 0-d fp32 sums over the positions that have a target: of the cross-entropy in nats, and of the
            squared log-partition for the z-loss, or None.
        """
        x_BSD = self.hidden(ids_BS, documents_BS=documents_BS, cache=cache)
        if targets_BS is None:
            return self.output(x_BSD).float()
        return self.output(x_BSD.flatten(0, 1), targets_BS.flatten(), with_z)


def chunk_loss_sums(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, with_z: bool) -> tuple[Tensor, Tensor | None]:
    logits_NV = F.linear(x_ND, weight_VD).float()
    ce_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")
    if not with_z:
        return ce_N.sum(), None
    valid_N = targets_N != IGNORE_INDEX
    target_logit_N = logits_NV.gather(1, targets_N.where(valid_N, 0)[:, None])[:, 0]
    # Cross-entropy is log-partition minus target logit, so the log-partition needs no second pass over the logits.
    return ce_N.sum(), (ce_N + target_logit_N).square().where(valid_N, 0.0).sum()
