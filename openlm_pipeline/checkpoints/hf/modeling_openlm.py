"""OpenLM models for transformers (4.48 and later). Stands alone: copied into exported folders.

Parameters have OpenLM's names under `model.`. Shapes: B batch, S tokens of this call, T tokens seen so far, D dim,
H heads, K dim // n_heads.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_openlm import OpenLMConfig

# transformers 5 renames `past_key_values` to `cache`.
_CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def make_norm(config, width):
    """The norm that `norm_type` names, over the last axis."""
    kind = config.norm_type
    if kind == "rms_norm":
        return nn.RMSNorm(width, config.norm_eps)
    if kind == "no_wb_layer_norm":
        return nn.LayerNorm(width, config.norm_eps, elementwise_affine=False)
    if kind in ("gain_only_layer_norm", "gain_only_lp_layer_norm"):
        return nn.LayerNorm(width, config.norm_eps, bias=False)
    if kind in ("default_layer_norm", "lp_layer_norm"):
        return nn.LayerNorm(width, config.norm_eps)
    raise ValueError(f"norm_type {kind!r} is none of OpenLM's")


def rotary_frequencies(head_dim, theta, device=None):
    """theta^(-2j/K) in radians per position, fp32."""
    return theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


class RotaryFrequencies(nn.Module):
    """Holder of the buffer that OpenLM's checkpoints have in every layer."""

    def __init__(self, head_dim, theta):
        super().__init__()
        self.register_buffer("inv_freq", rotary_frequencies(head_dim, theta))


def rotate(x_BHSK, cos, sin, interleaved):
    """Turn the pairs (i, i + K/2), or (2i, 2i + 1), in fp32."""
    a, b = x_BHSK.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x_BHSK.chunk(2, dim=-1)
    rotated = a * cos - b * sin, b * cos + a * sin
    return torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.dim // config.n_heads
        self.interleaved = config.positional_embedding_type == "llama_rotary"
        inner_dim, kv_dim = config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        self.widths, self.norm_per_head = [inner_dim, kv_dim, kv_dim], config.qk_norm_per_head
        self.group = config.n_heads // config.n_kv_heads
        self.in_proj = nn.Linear(config.dim, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(inner_dim, config.dim, bias=False)
        if config.positional_embedding_type in ("rotary", "head_rotary"):
            self.pos_embed = RotaryFrequencies(self.head_dim, config.rope_theta)
        q_width, k_width = [self.head_dim] * 2 if self.norm_per_head else [inner_dim, kv_dim]
        self.q_norm = make_norm(config, q_width) if config.apply_qk_norm else nn.Identity()
        self.k_norm = make_norm(config, k_width) if config.apply_qk_norm else nn.Identity()

    def forward(self, x_BSD, angles, mask, cache, with_weights):
        """Output [B, S, D], and if asked for the weights [B, H, S, T] of the values, else None."""
        q, k, v = self.in_proj(x_BSD).split(self.widths, dim=-1)
        if not self.norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = (rotate(t, *angles, self.interleaved) for t in (q, k))
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            start = cache.get_seq_length(self.layer)
            where = torch.arange(k.shape[2], device=k.device) + start  # for transformers 4's caches of fixed length
            k, v = cache.update(k, v, self.layer, {"cache_position": where})
        if self.group > 1:
            k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
        mask = None if mask is None else mask_for_keys(mask, k.shape[2])
        weights = attention_weights(q, k, mask) if with_weights else None
        if with_weights:
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(out.transpose(1, 2).flatten(-2)), weights


def attention_weights(q, k, mask):
    """The softmax of the scores, [B, H, S, T], which torch's fused attention does not give."""
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype)


def mask_for_keys(mask, num_keys):
    """A cache of fixed length gives more keys than there are tokens; those are masked."""
    return F.pad(mask, (0, num_keys - mask.shape[-1]), value=False) if num_keys > mask.shape[-1] else mask


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.w3 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class GeGLU(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim)
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention = Attention(config, layer)
        hidden_dim = config.ffn_hidden_dim or 256 * -(-int(8 * config.dim / 3) // 256)
        self.gelu = config.ffn_type == "gelu"
        if self.gelu:
            hidden_dim = config.ffn_hidden_dim or 4 * config.dim
            self._ff_w1 = nn.Linear(config.dim, hidden_dim, bias=False)
            self._ff_w2 = nn.Linear(hidden_dim, config.dim, bias=False)
        elif config.ffn_type == "gemma_geglu":
            self.feed_forward = GeGLU(config.dim, hidden_dim)
        elif config.ffn_type in ("swiglu", "swiglu_torch"):
            self.feed_forward = SwiGLU(config.dim, hidden_dim)
        else:
            raise ValueError(f"ffn_type {config.ffn_type!r} is not supported")
        self.attention_norm = make_norm(config, config.dim)
        self.ffn_norm = make_norm(config, config.dim)

    def forward(self, x, angles, mask, cache, with_weights):
        attended, weights = self.attention(self.attention_norm(x), angles, mask, cache, with_weights)
        x = x + attended
        y = self.ffn_norm(x)
        return x + (self._ff_w2(F.gelu(self._ff_w1(y))) if self.gelu else self.feed_forward(y)), weights


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # transformers sets it, and with it the function that checkpoints
        self.post_embed_norm = make_norm(config, config.dim) if config.post_embed_norm else nn.Identity()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = make_norm(config, config.dim)
        if not config.weight_tying:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def angles(self, position_ids_BS):
        """Cosines and sines [B, 1, S, K/2], fp32; None for head_rotary, which changes no score, and none."""
        kind, head_dim = self.config.positional_embedding_type, self.config.dim // self.config.n_heads
        if kind in ("none", "head_rotary"):
            return None
        frequencies = rotary_frequencies(head_dim, self.config.rope_theta, position_ids_BS.device)
        if kind == "rotary":
            stored = self.layers[0].attention.pos_embed.inv_freq
            if stored.dtype == torch.float32:  # in a model cast to lower precision they would be off by radians
                frequencies = stored
        if self.config.rope_freq_dtype == "bfloat16":
            frequencies = frequencies.bfloat16().float()
        angles = position_ids_BS[:, None, :, None].float() * frequencies
        return angles.cos(), angles.sin()

    def forward(self, x_BSD, position_ids_BS, mask, cache, with_states, with_weights):
        """Hidden states after the last norm, and if asked for those before each layer, and each attention's weights."""
        x_BSD = self.post_embed_norm(x_BSD)
        angles = self.angles(position_ids_BS)
        states, weights = [], []
        for layer in self.layers:
            if with_states:
                states.append(x_BSD)
            call = layer
            if self.gradient_checkpointing and self.training:
                call = partial(self._gradient_checkpointing_func, layer.__call__)
            x_BSD, w = call(x_BSD, angles, mask, cache, with_weights)
            weights.append(w)
        return self.norm(x_BSD), states, weights


class OpenLMForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OpenLMConfig
    _auto_class = "AutoModelForCausalLM"  # `save_pretrained` copies this file
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    # OpenLM has GELU's weights under two names, and a tied head under one more.
    _keys_to_ignore_on_load_unexpected = [r"feed_forward\.[02]\.weight", r"inv_freq"]

    def __init__(self, config):
        super().__init__(config)
        self.model = Transformer(config)
        if config.weight_tying:
            self._keys_to_ignore_on_load_unexpected = [*self._keys_to_ignore_on_load_unexpected, r"output\.weight"]
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def set_input_embeddings(self, value):
        self.model.tok_embeddings = value

    def get_output_embeddings(self):
        return None if self.config.weight_tying else self.model.output

    def set_output_embeddings(self, value):
        self.model.output = value

    def tie_weights(self, *args, **kwargs):
        """A tied head is the embedding itself: there is nothing to tie."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        **kwargs,
    ):
        """Logits [B, S, V] in fp32, and with `labels` [B, S] (-100 for none) their mean loss, shifted by one inside.

        Hidden states are the input of each layer and what the last norm gives; attentions [B, H, S, T] for each layer.

        Args:
            kwargs: for transformers' loss, such as `num_items_in_batch`, by which the sum is divided then.
            attention_mask: [B, T], 0 at padding, which no token sees; or [B, 1, S, T], bool or additive.
            position_ids: [B, S]; by default counted over what `attention_mask` leaves.
            logits_to_keep: only the last so many positions get logits; 0 is all.
        """
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_weights = self.config.output_attentions if output_attentions is None else output_attentions
        if self.training and self.model.gradient_checkpointing:  # a layer that is run twice would store its keys twice
            cache, use_cache = None, False
        if use_cache and cache is None:
            cache = DynamicCache()
        start = 0 if cache is None else int(cache.get_seq_length())
        x_BSD = self.model.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        seq_len, device = x_BSD.shape[1], x_BSD.device
        if attention_mask is not None and attention_mask.ndim == 2 and bool(attention_mask.all()):
            attention_mask = None
        if position_ids is None:
            if attention_mask is None or attention_mask.ndim == 4:
                position_ids = torch.arange(start, start + seq_len, device=device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq_len:]
        mask = self._mask(attention_mask, start, seq_len, device, cache)
        hidden, states, weights = self.model(x_BSD, position_ids, mask, cache, with_states, with_weights)
        states.append(hidden)
        hidden = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        head = self.model.tok_embeddings if self.config.weight_tying else self.model.output
        logits = F.linear(hidden, head.weight).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=tuple(states) if with_states else None,
            attentions=tuple(weights) if with_weights else None,
            **{_CACHE_FIELD: cache if use_cache else None},
        )
        return output.to_tuple() if return_dict is False else output

    def _mask(self, attention_mask, start, seq_len, device, cache):
        """bool [B or 1, 1, S, T], or additive where the caller's is; None where plain causal attention will do."""
        if attention_mask is not None and attention_mask.ndim == 4:
            return attention_mask
        if attention_mask is None and start == 0 and isinstance(cache, (DynamicCache, type(None))):
            return None
        queries_S = torch.arange(start, start + seq_len, device=device)
        keys_T = torch.arange(start + seq_len, device=device)
        mask = (queries_S[:, None] >= keys_T)[None]
        if attention_mask is not None:
            # Padding sees itself: a row that sees nothing has no softmax.
            valid_BT = attention_mask[:, None, : start + seq_len].bool()
            mask = mask & (valid_BT | (queries_S[:, None] == keys_T))
        return mask[:, None]
