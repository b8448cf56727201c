"""A model from a checkpoint: ours, OpenLM's, or a Hugging Face folder of OpenLM's, Llama's or Qwen3's, with its variant
found in keys and shapes, or in Llama's config.

Norm, qk-norm, feed-forward type, tying and sizes show in the weights. What does not show (the position type; whether a
norm with gains only is a LayerNorm or an RMSNorm) comes from arguments or from what stands beside the file; where that
says nothing either, the default is taken and said aloud.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openlm_pipeline.checkpoints.folders import check_layers, recorded_config
from openlm_pipeline.checkpoints.llama import llama_state, openlm_state
from openlm_pipeline.checkpoints.weight_files import WeightFiles, read_weight_files
from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.models.attention import rotary_frequencies
from openlm_pipeline.models.config import ModelConfig, resolve_model
from openlm_pipeline.models.openlm_settings import find_config
from openlm_pipeline.models.transformer import Transformer

_FIRST = "layers.0."
_INV_FREQ = "attention.pos_embed.inv_freq"
_ALIASES = (("_ff_w1", "feed_forward.0"), ("_ff_w2", "feed_forward.2"))
_NAMED_IN_ERRORS = 6
_NOT_IN_SHAPES = ("n_heads", "norm", "positional_embedding", "norm_eps", "rope_theta")


@dataclass(frozen=True)
class FoundModel:
    """What a checkpoint holds."""

    path: Path
    layout: str
    """`OpenLM checkpoint` (epoch_N.pt), `OpenLM state_dict`, `Hugging Face folder`, `llama folder`, `qwen3 folder`,
    `safetensors file` or `openlm_pipeline checkpoint`."""
    config: ModelConfig
    source: str
    """What beside the weights told of it: a path of `params.txt` or `config.json`, say; empty if nothing did."""
    notes: tuple[str, ...]
    """What the weights could not say, and what was taken for it."""


def find_model_config(
    path: str | Path, *, config: str | Path | ModelConfig | None = None, **overrides: Any
) -> FoundModel:
    """Which model a checkpoint holds; arguments and errors as for `load_checkpoint`."""
    if _is_ours(Path(path)):
        return _find_ours(Path(path), config, overrides)
    return _find(read_weight_files(Path(path)), config, overrides)


def load_checkpoint(
    path: str | Path,
    *,
    config: str | Path | ModelConfig | None = None,
    device: torch.device | str = "cpu",
    warn: Callable[[str], None] = warnings.warn,
    **overrides: Any,
) -> Transformer:
    """The model of a checkpoint, fp32, in evaluation mode. Nothing in the files is run.

    Args:
        path: OpenLM's `.pt` (epoch_N.pt, an averager's file, or a bare state_dict), a `.safetensors` file, a Hugging
            Face folder of an OpenLM model or of a Llama or Qwen3 that is exactly one of ours, or a folder `step-*` of a
            run.
        config: name, JSON file or ModelConfig where the files do not say enough; fields that it leaves open are found.
        warn: told what was assumed because nothing says it.
        overrides: fields of ModelConfig that are known better, such as `positional_embedding="head_rotary"`.

    Raises:
        MissingInputError: there is no checkpoint.
        DataError: it is damaged, holds more than plain data, or its keys and shapes do not fit; they are named.
        ConfigError: the config is wrong, not enough is known, or the model is not one that is built here.
    """
    path = Path(path)
    if _is_ours(path):
        from openlm_pipeline.checkpoints.folders import read_checkpoint
        from openlm_pipeline.checkpoints.reading import load_model

        _find_ours(path, config, overrides)
        return load_model(read_checkpoint(path), device)
    files = read_weight_files(path)
    found = _find(files, config, overrides)
    for note in found.notes:
        warn(f"{path}: {note}")
    check_layers(path, found.config, files.state)
    with torch.device("meta"):
        model = Transformer(found.config)
    if files.is_llama:
        parameters = dict(model.named_parameters())
        _check_keys(files.path, files.state, llama_state(parameters, found.config), found.config)
        state = openlm_state(files.state, parameters, found.config)
    else:
        state = _completed(files.state, found.config)
        _check_keys(files.path, state, model.state_dict(), found.config)
    model.to_empty(device=device)
    model.init_buffers()
    model.load_state_dict(state, strict=False)  # a checkpoint without frequencies has those of the formula
    return model.eval()


def _is_ours(path: Path) -> bool:
    return (path / "checkpoint.json").is_file()


def _find_ours(path: Path, config: str | Path | ModelConfig | None, overrides: dict[str, Any]) -> FoundModel:
    recorded = recorded_config(path)
    asked = find_config(recorded if config is None else config, **overrides)
    if asked != recorded:
        raise ConfigError(f"{path} records its own model config, which is not the one given; leave that out")
    return FoundModel(path, "openlm_pipeline checkpoint", recorded, str(path / "model_config.json"), ())


def _find(files: WeightFiles, config: str | Path | ModelConfig | None, overrides: dict[str, Any]) -> FoundModel:
    given = {}
    if config is not None:
        named = find_config(config)
        given = {name: getattr(named, name) for name in named.model_fields_set}
    known = {**files.declared, **given, **overrides}
    seen, notes = ({}, []) if files.is_llama else _seen_in(files, known)
    notes += _contradicted(files, known)
    return FoundModel(files.path, files.layout, resolve_model({**seen, **known}), files.source, tuple(notes))


def _contradicted(files: WeightFiles, known: dict[str, Any]) -> list[str]:
    """Notes on what the files state, arguments say otherwise, and no shape tells."""
    said = {name: files.declared[name] for name in _NOT_IN_SHAPES if name in files.declared}
    if files.is_llama and known["positional_embedding"] == "llama_rotary":
        said["positional_embedding"] = "llama_rotary"  # the weights are put in its order
    return [
        f"{files.source} says {name} {value}, and {known[name]} is taken, as asked"
        for name, value in said.items()
        if known[name] != value and (name != "norm" or "rms_norm" in (known[name], value))
    ]


def _seen_in(files: WeightFiles, known: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields that keys and shapes show, and notes on what neither they nor `known` say."""
    state, notes = files.state, []
    try:
        embedding = state.get("tok_embeddings.weight", state.get("output.weight"))
        vocab_size, hidden_dim = embedding.shape
        inner_dim = state[f"{_FIRST}attention.in_proj.weight"].shape[0] // 3
    except (KeyError, ValueError) as e:
        raise DataError(f"{files.path} is no OpenLM model: {e} is missing or has another shape") from e
    seen: dict[str, Any] = {
        "hidden_dim": hidden_dim,
        "vocab_size": vocab_size,
        "n_layers": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
        "qk_norm": f"{_FIRST}attention.q_norm.weight" in state,
        "weight_tying": _tied(state),
        "post_embed_norm": "post_embed_norm.weight" in state,
    }
    if f"{_FIRST}attention_norm.bias" in state:
        seen["norm"] = "default_layer_norm"
    elif f"{_FIRST}attention_norm.weight" not in state:
        seen["norm"] = "no_wb_layer_norm"
    else:
        seen["norm"] = "gain_only_layer_norm"
        if "norm" not in known:
            notes.append("its norms have gains only: gain_only_layer_norm is assumed; pass norm='rms_norm' if they are")
    if f"{_FIRST}_ff_w1.weight" in state or f"{_FIRST}feed_forward.0.weight" in state:
        seen["ffn"] = "gelu"
    elif f"{_FIRST}feed_forward.gate_proj.weight" in state:
        seen["ffn"] = "gemma_geglu"
    frequencies = state.get(_FIRST + _INV_FREQ)
    if frequencies is None:
        if missing := [name for name in ("n_heads", "positional_embedding") if name not in known]:
            raise ConfigError(
                f"{files.path} has no rotary frequencies, so that its weights do not tell {' or '.join(missing)}: "
                "pass config= or these fields (without frequencies it is llama_rotary or none)"
            )
        return seen, notes
    head_dim = 2 * len(frequencies)
    seen["n_heads"] = inner_dim // head_dim
    if "positional_embedding" not in known:
        notes.append(
            "its weights do not tell the position type: rotary is assumed. Pass positional_embedding='head_rotary' if "
            "OpenLM's code of August 2023 trained it, as it did the released 1B and 7B"
        )
    exact = rotary_frequencies(head_dim, theta=known.get("rope_theta", 10_000.0))
    if not torch.allclose(frequencies.float(), exact, rtol=1e-5, atol=0):
        if torch.equal(frequencies.float(), exact.bfloat16().float()):
            seen["rope_freq_dtype"] = "bfloat16"
            notes.append("its rotary frequencies are rounded to bfloat16, and are kept so")
        else:
            notes.append("its rotary frequencies are not those of the formula, and are kept as they are")
    return seen, notes


def _tied(state: dict[str, Tensor]) -> bool:
    a, b = state.get("tok_embeddings.weight"), state.get("output.weight")
    if a is None or b is None or a.data_ptr() == b.data_ptr():
        return True
    return a.shape == b.shape and torch.equal(a[0], b[0]) and torch.equal(a, b)


def _completed(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """With both names of what has two, of which some files keep one."""
    pairs = [("tok_embeddings.weight", "output.weight")] if config.weight_tying else []
    if config.ffn == "gelu":
        layers = range(config.n_layers)
        pairs += [(f"layers.{i}.{a}.weight", f"layers.{i}.{b}.weight") for i in layers for a, b in _ALIASES]
    full = dict(state)
    for a, b in pairs:
        value = full.get(a, full.get(b))
        if value is not None:
            full |= {a: value, b: value}
    return full


def _check_keys(path: Path, state: dict[str, Tensor], model: dict[str, Tensor], config: ModelConfig) -> None:
    expected = {name: tuple(value.shape) for name, value in model.items()}
    wrong = [f"missing {n}" for n in expected if n not in state and not n.endswith(_INV_FREQ)]
    wrong += [f"unknown {n}" for n in state if n not in expected]
    wrong += [
        f"{n} is {list(state[n].shape)}, not {list(shape)}"
        for n, shape in expected.items()
        if n in state and tuple(state[n].shape) != shape
    ]
    if wrong:
        more = f"\n  and {len(wrong) - _NAMED_IN_ERRORS} more" if len(wrong) > _NAMED_IN_ERRORS else ""
        lines = "\n  ".join(wrong[:_NAMED_IN_ERRORS])
        raise DataError(f"{path} does not fit the model ({config}):\n  {lines}{more}")
