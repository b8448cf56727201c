"""Weights as files of others: OpenLM's `.pt`, Hugging Face folders of OpenLM, Llama and Qwen3 models; read without
running their code.

Tensors come memory-mapped, under OpenLM's own names or Llama's, with what stands beside them about the model.
"""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from openlm_pipeline.checkpoints.llama import LLAMAS, settings_of_llama
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.models.config import ModelConfig, not_dense
from openlm_pipeline.models.openlm_settings import settings_of_flags, settings_of_params_txt
from openlm_pipeline.storage.export_record import check_file, recorded_files
from openlm_pipeline.storage.file_hashes import FileHashes
from openlm_pipeline.storage.files import check_inside, read_json

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_PREFIXES = ("module.", "model.")
_RELEASED_BYTES = {5_759_684_039: "OpenLM-1B", 27_558_844_659: "OpenLM-7B"}
"""Sizes of the released `open_lm_1b.pt` and `open_lm_7b_1p25T.pt`, which hold nothing but weights."""

_NUMPY_SCALARS = [  # what NumPy's numbers among OpenLM's evaluation metrics are pickled with
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
]


@dataclass(frozen=True)
class WeightFiles:
    """What was read."""

    path: Path
    layout: str
    state: dict[str, Tensor]
    """By OpenLM's names, without prefixes, or by Llama's."""
    declared: dict[str, Any]
    """Fields of ModelConfig that the files state."""
    source: str
    """Where `declared` comes from, for people."""
    is_llama: bool = False
    """Whether the names in `state` are Llama's."""


def check_export(path: Path) -> None:
    """Compare a Hugging Face folder, or OpenLM's `checkpoints/*.pt`, with the record of `openlm export`, if it has one;
    errors as of `check_file`."""
    hashes, folder = FileHashes(), path if path.is_dir() else path.parent.parent
    for name, recorded in recorded_files(folder).items():
        if path in (folder, folder / name):
            check_file(folder / name, recorded, hashes.sha256)


def read_weight_files(path: Path) -> WeightFiles:
    """Read a `.pt` file, a `.safetensors` file, or a Hugging Face folder.

    Raises:
        MissingInputError: there is nothing of the kind.
        DataError: a file is damaged, holds more than tensors and plain data, or is another kind of model's.
        ConfigError: the model is one that is not built here.
    """
    check_export(path)
    if path.is_dir():
        return _read_huggingface(path)
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return _named(path, "safetensors file", _load_safetensors(path), {}, "")
    return _read_openlm(path)


def _named(path: Path, layout: str, state: dict[str, Any], declared: dict[str, Any], source: str) -> WeightFiles:
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise DataError(f"{path}: {name!r} is a {type(value).__name__} where a weight should be")
        short = canonical_name(str(name))
        if short in renamed:
            raise DataError(f"{path} holds {short} twice, once as {name}")
        renamed[short] = value
    if any("mixer" in name or name.startswith("backbone.") for name in renamed):
        raise not_dense(str(path), "mamba")
    if any(".experts." in name or ".router." in name or ".gate.wg" in name for name in renamed):
        raise not_dense(str(path), "moe")
    if not {"tok_embeddings.weight", "output.weight"} & renamed.keys():
        some = ", ".join(list(renamed)[:4])
        raise DataError(f"{path} is no OpenLM model: it has no tok_embeddings.weight, but {some or 'nothing'}")
    return WeightFiles(path, layout, renamed, declared, source)


def canonical_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP, torch.compile and Hugging Face classes put before it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _torch_load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        raise DataError(
            f"{path} is damaged, or holds more than tensors and plain data, which could run code and is not loaded: {e}"
        ) from e
    except Exception as e:  # noqa: BLE001 - torch raises anything of bytes that it did not write
        raise DataError(f"{path} is not a file of torch.save, or is damaged: {e}") from e


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as e:
        raise DataError(f"{path} is not a safetensors file, or is damaged: {e}") from e


def _read_openlm(path: Path) -> WeightFiles:
    document = _torch_load(path)
    if not isinstance(document, dict):
        raise DataError(f"{path} holds a {type(document).__name__}, not the weights of a model")
    inner = next((key for key in ("state_dict", "av_model_sd") if isinstance(document.get(key), dict)), None)
    state = document[inner] if inner else document
    declared, source = _declared_by_openlm(path, document if inner else {})
    layout = "OpenLM checkpoint" if inner else "OpenLM state_dict"
    return _named(path, layout, state, declared, source)


def _declared_by_openlm(path: Path, document: dict[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(document.get("model_config"), dict):  # in exports of ours
        config = document["model_config"]
        return {name: config[name] for name in ModelConfig.model_fields if name in config}, "its model_config"
    if path.stat().st_size in _RELEASED_BYTES:
        name = _RELEASED_BYTES[path.stat().st_size]
        return {"positional_embedding": "head_rotary"}, f"the size of the file, that of the released {name}"
    for folder in (path.parent, path.parent.parent):
        if (folder / "params.txt").is_file():
            return settings_of_params_txt(folder / "params.txt"), str(folder / "params.txt")
    return {}, ""


def _read_huggingface(folder: Path) -> WeightFiles:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise MissingInputError(
            f"{folder} is neither a checkpoint step-* nor a Hugging Face folder (it has no config.json)"
        )
    config = read_json(config_file)
    kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
    if kind not in ("openlm", *LLAMAS):
        raise DataError(f"{config_file} describes a model of type {kind!r}, not 'openlm', {' or '.join(LLAMAS)}")
    state: dict[str, Any] = {}
    if kind in LLAMAS:
        declared = settings_of_llama(config, str(config_file))
    else:
        settings = {**config, **(config.get("params") or {}), **(config.get("params_args_dict") or {})}
        declared = settings_of_flags(settings, str(config_file))
    for path in weight_parts(folder):
        state |= _load_safetensors(path) if path.suffix == ".safetensors" else _torch_load(path)
    if kind in LLAMAS:
        state = {name: value for name, value in state.items() if not name.endswith("rotary_emb.inv_freq")}
        embedding, head = state.get("model.embed_tokens.weight"), state.get("lm_head.weight")
        if declared["weight_tying"] and head is not None and embedding is not None and torch.equal(head, embedding):
            del state["lm_head.weight"]
        return WeightFiles(folder, f"{kind} folder", state, declared, str(config_file), is_llama=True)
    return _named(folder, "Hugging Face folder", state, declared, str(config_file))


def weight_parts(folder: Path) -> list[Path]:
    """The files that hold the weights of a Hugging Face folder.

    Raises:
        MissingInputError: one of them is not there.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            try:
                names = sorted(set(read_json(index)["weight_map"].values()))
                check_inside(names, index)
            except (AttributeError, KeyError, TypeError) as e:
                raise DataError(f"{index} has no weight_map from weights to files") from e
            parts = [folder / name for name in names]
            if missing := [p for p in parts if not p.is_file()]:
                raise MissingInputError(f"{missing[0]}, which {index.name} names, does not exist")
            return parts
    raise MissingInputError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
