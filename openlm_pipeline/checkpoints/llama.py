"""Models that are exactly transformers' Llama, or Qwen3 with its norms of each head, to and from its names, so that
whatever reads a Llama reads ours, and ours reads a Llama."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.models.attention import rotary_frequencies
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer

LLAMAS = ("llama", "qwen3")
"""transformers' `model_type` of those that are read."""
_IN_PROJ = "attention.in_proj"
_LAYER_NAMES = {
    "attention_norm": ("input_layernorm",),
    _IN_PROJ: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out_proj": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "ffn_norm": ("post_attention_layernorm",),
    "feed_forward.w12": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.w3": ("mlp.down_proj",),
}
_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_SIZES = {
    "hidden_size": "hidden_dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_len",
}
_EXACT = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "use_sliding_window": False,
    "quantization_config": None,
}
"""What a config's fields may say, where they are there."""
_EXACT_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


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
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.weight_tying,
        "bos_token_id": None,  # transformers' own defaults are the ids of Llama's tokenizer
        "eos_token_id": None,
    }


def llama_differences(config: Mapping[str, Any]) -> list[str]:
    """What in the `config.json` of one of `LLAMAS` makes it another model than any of ours, each with its field."""
    if lacking := [name for name in _SIZES if name not in config]:
        return [f"it has no {' or '.join(lacking)}"]
    found = [f"its {k} is {config[k]!r}" for k, exact in _EXACT.items() if config.get(k) not in (None, exact)]
    if others := set(config.get("layer_types") or ()) - {"full_attention"}:
        found.append(f"its layer_types have {', '.join(sorted(others))}")
    for name in ("rope_scaling", "rope_parameters"):
        rope = dict(config.get(name) or {})
        rope.pop("rope_theta", None)
        if any(value != _EXACT_ROPE.get(key) for key, value in rope.items()):
            found.append(f"its {name} is {config[name]}")
    if _head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        found.append(f"its head_dim is {_head_dim(config)}, not hidden_size / num_attention_heads")
    return found


def _head_dim(config: Mapping[str, Any]) -> int:
    by_default = 128 if config["model_type"] == "qwen3" else config["hidden_size"] // config["num_attention_heads"]
    return config.get("head_dim") or by_default


def settings_of_llama(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of ModelConfig that the `config.json` of one of `LLAMAS` gives, of transformers 4 or 5.

    Raises:
        ConfigError: it is a model that is not built here; the fields that differ are named.
    """
    if differences := llama_differences(config):
        raise ConfigError(f"{where} is no {config['model_type']} that is built here: {'; '.join(differences)}")
    sizes = {ours: config[theirs] for theirs, ours in _SIZES.items()}
    width, heads, is_qwen3 = sizes.pop("ffn_dim"), sizes["n_heads"], config["model_type"] == "qwen3"
    kv_heads = config.get("num_key_value_heads") or heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        **sizes,
        "weight_tying": bool(config.get("tie_word_embeddings")),
        "norm": "rms_norm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "qk_norm": is_qwen3,
        "qk_norm_per_head": is_qwen3,
        "positional_embedding": "rotary",
        "ffn": "swiglu",
        "n_kv_heads": None if kv_heads == heads else kv_heads,
        "ffn_hidden_dim": None if width == ModelConfig(**sizes).ffn_dim else width,
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
    }


def _theirs(name: str) -> list[str]:
    """Llama's names of what stands in one parameter, one after another."""
    name = name.removesuffix(".weight")
    if name in _NAMES:
        return [f"{_NAMES[name]}.weight"]
    _, number, part = name.split(".", 2)
    return [f"model.layers.{number}.{theirs}.weight" for theirs in _LAYER_NAMES[part]]


def llama_state(parameters: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """OpenLM's parameters under Llama's names: queries, keys and values apart, and so gate and up."""
    state, kv_dim = {}, config.kv_heads * config.head_dim
    for name, value in parameters.items():
        names, is_qkv = _theirs(name), _IN_PROJ in name
        widths = [config.n_heads * config.head_dim, kv_dim, kv_dim] if is_qkv else len(value) // len(names)
        parts = list(value.split(widths))
        if is_qkv and config.positional_embedding == "llama_rotary":
            parts[:2] = _halves(parts[0], config.n_heads), _halves(parts[1], config.kv_heads)
        state |= {theirs: part.clone() for theirs, part in zip(names, parts, strict=True)}
    return state


def openlm_state(state: Mapping[str, Tensor], names: Iterable[str], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `llama_state`, for parameters of these names."""
    parameters = {}
    for name in names:
        parts = [state[theirs] for theirs in _theirs(name)]
        if _IN_PROJ in name and config.positional_embedding == "llama_rotary":
            parts[:2] = _pairs(parts[0], config.n_heads), _pairs(parts[1], config.kv_heads)
        parameters[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return parameters


def _halves(weight: Tensor, heads: int) -> Tensor:
    """transformers turns the pairs (i, i + K/2) of a head; weights of the pairs (2i, 2i + 1) are put in that order."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `_halves`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
