"""Models that are exactly transformers' Llama, or Qwen3 with its norms of each head, under its names, so that whatever
reads a Llama reads them."""

from typing import Any

import torch
from torch import Tensor

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.models.attention import rotary_frequencies
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer

_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out_proj.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w3.weight": "mlp.down_proj.weight",
}
_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def has_exact_frequencies(model: Transformer) -> bool:
    """Whether its rotary frequencies are those of the formula, which a checkpoint of others may replace."""
    stored = [value for name, value in model.named_buffers() if name.endswith("inv_freq")]
    exact = rotary_frequencies(model.config.head_dim, theta=model.config.rope_theta)
    return all(torch.allclose(value.cpu().float(), exact, rtol=1e-5, atol=0) for value in stored)


def check_llama(model: Transformer) -> None:
    """
    Raises:
        ConfigError: the model is not exactly a Llama; all differences are named.
    """
    config = model.config
    differences = {
        f"its norm is {config.norm}, not rms_norm": config.norm != "rms_norm",
        f"its ffn is {config.ffn}, not swiglu": config.ffn not in ("swiglu", "swiglu_torch"),
        f"its positional_embedding is {config.positional_embedding}, not rotary or llama_rotary": (
            config.positional_embedding not in ("rotary", "llama_rotary")
        ),
        "it has qk_norm, and not per head": config.qk_norm and not config.qk_norm_per_head,
        "it has qk_norm and llama_rotary": config.qk_norm and config.positional_embedding == "llama_rotary",
        "its hidden_dim is no multiple of its n_heads": config.hidden_dim % config.n_heads != 0,
        "it has post_embed_norm": config.post_embed_norm,
        "its rotary frequencies are rounded to bfloat16": config.rope_freq_dtype == "bfloat16",
        "its rotary frequencies are not those of the formula": not has_exact_frequencies(model),
    }
    if found := [what for what, differs in differences.items() if differs]:
        raise ConfigError(f"this model is not exactly a Llama: {'; '.join(found)}. Use --format huggingface")


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of `LlamaForCausalLM` or `Qwen3ForCausalLM`, without what tokenizer and weights' type say."""
    kind = "Qwen3" if config.qk_norm else "Llama"
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.weight_tying,
        "bos_token_id": None,  # transformers' own defaults are the ids of Llama's tokenizer
        "eos_token_id": None,
    }


def llama_state(parameters: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """OpenLM's parameters under Llama's names: queries, keys and values apart, and so gate and up."""
    state = {}
    for name, value in parameters.items():
        if name in _NAMES:
            state[_NAMES[name]] = value
            continue
        _, number, part = name.split(".", 2)
        layer = f"model.layers.{number}"
        if part == "attention.in_proj.weight":
            kv_dim = config.kv_heads * config.head_dim
            q, k, v = value.split([config.n_heads * config.head_dim, kv_dim, kv_dim])
            if config.positional_embedding == "llama_rotary":
                q, k = _halves(q, config.n_heads), _halves(k, config.kv_heads)
            state |= {f"{layer}.self_attn.{n}_proj.weight": t for n, t in (("q", q), ("k", k), ("v", v))}
        elif part == "feed_forward.w12.weight":
            gate, up = value.chunk(2)
            state |= {f"{layer}.mlp.gate_proj.weight": gate, f"{layer}.mlp.up_proj.weight": up}
        else:
            state[f"{layer}.{_LAYER_NAMES[part]}"] = value
    return {name: value.clone() for name, value in state.items()}


def _halves(weight: Tensor, heads: int) -> Tensor:
    """transformers turns the pairs (i, i + K/2) of a head; weights of the pairs (2i, 2i + 1) are put in that order."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
