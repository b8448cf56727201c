"""A model's settings under OpenLM's names (JSON configs, `params.txt`, Hugging Face configs) as ModelConfig fields.

No torch here: experiments and the command line read configs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.models.config import ALIASES, MODELS, ModelConfig, model_config, not_dense, resolve_model
from openlm_pipeline.storage.files import read_json
from openlm_pipeline.strict import explain

_NAMES = {
    "dim": "hidden_dim",
    "model_norm": "norm",
    "norm_type": "norm",
    "apply_qk_norm": "qk_norm",
    "positional_embedding_type": "positional_embedding",
    "ffn_type": "ffn",
}


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
    _refuse_other_models(document, str(path))
    fields = {_NAMES.get(key, key): value for key, value in document.items() if not key.startswith("moe_")}
    if len(fields) < sum(not key.startswith("moe_") for key in document):
        raise ConfigError(f"{path} gives one setting under two names: {', '.join(document)}")
    try:
        return ModelConfig(**fields)
    except ValidationError as e:
        raise explain(e, f"model config {path}") from e


def _refuse_other_models(document: Mapping[str, Any], where: str) -> None:
    if document.get("ffn_type", document.get("ffn")) == "moe" or document.get("moe_freq"):
        raise not_dense(where, "moe")
    if "d_model" in document or "ssm_cfg" in document:
        raise not_dense(where, "mamba")


def settings_of_flags(flags: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of ModelConfig that a flat mapping with OpenLM's names gives; what is no model setting is passed over.

    A model's own JSON settings win over flags, as in OpenLM. Of two names for one field, the later in `_NAMES` counts.

    Raises:
        ConfigError: a model that is not built here.
    """
    _refuse_other_models(flags, where)
    fields: dict[str, Any] = {}
    for name in [*ModelConfig.model_fields, *_NAMES]:
        if flags.get(name) is not None:
            fields[_NAMES.get(name, name)] = flags[name]
    model = flags.get("model")
    if isinstance(model, str):
        known = model in MODELS or model in ALIASES or (model.endswith(".json") and Path(model).exists())
        named = find_config(model) if known else None
        if named is not None:
            fields |= {name: getattr(named, name) for name in named.model_fields_set}
    return fields


def read_params_txt(path: Path) -> dict[str, Any]:
    """The flags of an OpenLM run, from the sorted `key: value` lines that it writes to `params.txt`."""
    values = {"True": True, "False": False, "None": None}
    flags: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        key, separator, text = line.partition(": ")
        if separator:
            flags[key.strip()] = values.get(text.strip(), text.strip())
    return flags


def settings_of_params_txt(path: Path) -> dict[str, Any]:
    """Fields of ModelConfig that a run's `params.txt` gives; sizes only where its model is known here by name."""
    flags = read_params_txt(path)
    if "positional_embedding_type" not in flags and "model" in flags:
        # Up to September 2023 there was no such flag, and OpenLM rotated over heads unless --rotary-old said otherwise.
        old = flags.get("rotary_old", True)
        flags["positional_embedding_type"] = "head_rotary" if old else "rotary"
    for name in ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size"):
        if isinstance(flags.get(name), str):
            flags[name] = int(flags[name])
    if isinstance(flags.get("moe_freq"), str):
        flags["moe_freq"] = int(flags["moe_freq"])
    return settings_of_flags(flags, str(path))
