"""OpenLM's models: configs by name and the Transformer. Checkpoints of them are in `openlm_pipeline.checkpoints`.

Importing this package does not import torch; what needs it is imported when it is used.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.openlm_settings import find_config

if TYPE_CHECKING:
    import torch

    from openlm_pipeline.models.attention import KVCache
    from openlm_pipeline.models.init import initialize
    from openlm_pipeline.models.transformer import Transformer

__all__ = [
    "KVCache",
    "ModelConfig",
    "Transformer",
    "count_parameters",
    "create_model",
    "find_config",
    "initialize",
]

_MODULES = {
    "KVCache": "attention",
    "Transformer": "transformer",
    "initialize": "init",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def create_model(
    name_or_config: str | Path | ModelConfig,
    *,
    seed: int = 0,
    device: "torch.device | str" = "cpu",
    **overrides: Any,
) -> "Transformer":
    """A Transformer with OpenLM's initial weights, fp32, in training mode.

    Args:
        name_or_config: `open_lm_1b`, an alias, the path of an OpenLM JSON config, or a ModelConfig.
        seed: the weights are a pure function of it and of the config.
        device: `meta` gives a model without storage, to be sharded, then filled by `initialize` or a checkpoint.
        overrides: fields of ModelConfig, for example `norm="rms_norm"`, `qk_norm=True`.

    Raises:
        ConfigError, MissingInputError, DataError: as `find_config`.
    """
    config = find_config(name_or_config, **overrides)

    import torch

    from openlm_pipeline.models.init import initialize
    from openlm_pipeline.models.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        initialize(model, config, seed)
    return model


def count_parameters(config: ModelConfig) -> int:
    """Trainable parameters, a tied embedding counted once."""
    width, inner_width = config.hidden_dim, config.n_heads * config.head_dim
    per_norm_unit = {"default_layer_norm": 2, "lp_layer_norm": 2, "no_wb_layer_norm": 0}.get(config.norm, 1)
    kv_width = config.kv_heads * config.head_dim
    attention = 2 * width * (inner_width + kv_width)
    if config.qk_norm:
        attention += per_norm_unit * (2 * config.head_dim if config.qk_norm_per_head else inner_width + kv_width)
    feed_forward = (2 if config.ffn == "gelu" else 3) * width * config.ffn_dim
    if config.ffn == "gemma_geglu":
        feed_forward += 2 * config.ffn_dim + width  # biases
    norms = width * per_norm_unit
    block = attention + feed_forward + 2 * norms
    embeddings = (1 if config.weight_tying else 2) * config.vocab_size * width
    return embeddings + config.n_layers * block + norms * (2 if config.post_embed_norm else 1)
