"""OpenLM's models: configs by name, the Transformer, and the way in for users of the library.

Importing this package does not import torch; `create_model`, `Transformer` and `initialize` do when they are used.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.files import read_json
from openlm_pipeline.models.config import ModelConfig, model_config, resolve_model
from openlm_pipeline.strict import explain

if TYPE_CHECKING:
    import torch

    from openlm_pipeline.models.init import initialize
    from openlm_pipeline.models.transformer import Transformer

__all__ = ["ModelConfig", "Transformer", "count_parameters", "create_model", "find_config", "initialize"]

_OPENLM_KEYS = {"model_norm": "norm", "positional_embedding_type": "positional_embedding", "ffn_type": "ffn"}


def __getattr__(name: str) -> Any:
    if name == "Transformer":
        from openlm_pipeline.models.transformer import Transformer

        return Transformer
    if name == "initialize":
        from openlm_pipeline.models.init import initialize

        return initialize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find_config(name_or_config: str | Path | ModelConfig, **overrides: Any) -> ModelConfig:
    """The config of a model's name or alias, of an OpenLM JSON file (a path ending in `.json`), or given as it is.

    Args:
        overrides: fields of ModelConfig that replace those found.

    Raises:
        ConfigError: no such name (the nearest is suggested), an unknown field, or a value out of range.
        MissingInputError: the JSON file does not exist.
        DataError: the JSON file is not a JSON object.
    """
    if isinstance(name_or_config, ModelConfig):
        config = name_or_config
    elif str(name_or_config).endswith(".json"):
        config = _read_openlm_json(Path(name_or_config))
    else:
        config = model_config(str(name_or_config))
    return resolve_model({**config.model_dump(), **overrides}) if overrides else config


def _read_openlm_json(path: Path) -> ModelConfig:
    document = read_json(path)
    if not isinstance(document, dict):
        raise DataError(f"{path} holds a {type(document).__name__}, not the JSON object of a model config")
    fields = {_OPENLM_KEYS.get(key, key): value for key, value in document.items()}
    if len(fields) < len(document):
        raise ConfigError(f"{path} gives one setting under two names: {', '.join(document)}")
    try:
        return ModelConfig(**fields)
    except ValidationError as e:
        raise explain(e, f"model config {path}") from e


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
    attention = 4 * width * inner_width + (2 * inner_width * per_norm_unit if config.qk_norm else 0)
    feed_forward = (2 if config.ffn == "gelu" else 3) * width * config.ffn_dim
    norms = width * per_norm_unit
    block = attention + feed_forward + 2 * norms
    embeddings = (1 if config.weight_tying else 2) * config.vocab_size * width
    return embeddings + config.n_layers * block + norms * (2 if config.post_embed_norm else 1)
