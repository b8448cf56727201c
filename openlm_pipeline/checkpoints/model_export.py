"""Checkpoints in the forms of others: OpenLM's log folder with `.pt` files, and a Hugging Face folder.

Both say what model they hold, so that `load_checkpoint` needs nothing else to read them back.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from openlm_pipeline.checkpoints.folders import INFO, Checkpoint, read_checkpoint, recipe_of
from openlm_pipeline.checkpoints.llama import check_llama, has_exact_frequencies, llama_config, llama_state
from openlm_pipeline.checkpoints.loading import load_checkpoint
from openlm_pipeline.checkpoints.model_card import model_card
from openlm_pipeline.checkpoints.reading import AdamState, averages_in, load_adam_state, load_model
from openlm_pipeline.checkpoints.weights_digest import digest_of_parts, local_part, weights_digest
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.models.config import MODELS, ModelConfig
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.storage.export_record import write_record
from openlm_pipeline.storage.files import atomic_writer, make_folder, read_json, write_json, write_text
from openlm_pipeline.tokenizers.tokenizer import local_file

EOT = "<|endoftext|>"
_PADDING = "<|padding|>"
_SIZES = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size", "post_embed_norm", "weight_tying")
_HF_FILES = ("configuration_openlm.py", "modeling_openlm.py")
_MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_openlm(
    model_or_checkpoint: Transformer | str | Path,
    out: str | Path,
    *,
    epoch: int = 1,
    fsdp: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write OpenLM's log folder: `params.txt`, `model.json` for its `--model`, and `checkpoints/epoch_N.pt`.

    From a checkpoint of a run also `optimizer_N.pt` and `stats_N.pt`, so that OpenLM's `--resume` continues from it.

    Args:
        model_or_checkpoint: a model, or the path of whatever `load_checkpoint` reads.
        epoch: N, the number of epochs that count as completed.
        fsdp: key the optimizer's state by parameter names, as OpenLM reads it under `--fsdp`, not by their numbers.
        say: told what could not be exported.

    Returns:
        The path of `epoch_N.pt`.

    Raises:
        OpenLMError: as `load_checkpoint`.
    """
    out = Path(out)
    model, checkpoint = _open(model_or_checkpoint)
    config, folder = model.config, out / "checkpoints"
    if config.beyond_openlm:
        raise ConfigError(
            f"OpenLM has no {', '.join(config.beyond_openlm)}; use --format huggingface, or llama where that is exact"
        )
    write_json(out / "model.json", {name: getattr(config, name) for name in _SIZES} | _variant(config))
    flags = {"name": out.name, "model": _model_name(config) or str(out / "model.json"), **_variant(config)}
    write_text(out / "params.txt", "".join(f"{key}: {flags[key]}\n" for key in sorted(flags)))
    step = checkpoint.step if checkpoint else 0
    metrics = _evaluation_metrics(checkpoint)
    head = {"epoch": epoch, "name": out.name, "step": step}
    if checkpoint:
        state = load_adam_state(checkpoint, [name for name, _ in model.named_parameters()])
        if state is None:
            say("the optimizer is not AdamW throughout, so that OpenLM can't resume with it; only weights are exported")
        else:
            optimizer = {**head, "optimizer": _adamw(state, fsdp), "evaluation_metrics": metrics}
            _save(folder / f"optimizer_{epoch}.pt", optimizer)
        stats = {
            **head,
            "is_final_checkpoint": _is_final(checkpoint),
            "evaluation_metrics": metrics,
            "percentage_of_data_seen": -1.0,  # OpenLM's own value where it does not know
            "next_shard_per_source": None,
            "samples_seen": checkpoint.tokens // config.seq_len,
            "shard_shuffle_seed": None,
            "train_data_string": None,
        }
        _save(folder / f"stats_{epoch}.pt", stats)
    path = folder / f"epoch_{epoch}.pt"
    document = {**head, "state_dict": model.state_dict(), "evaluation_metrics": metrics, "shard_shuffle_seed": None}
    _save(path, {**document, "model_config": config.model_dump()})  # last: OpenLM's --resume latest looks for it
    write_record(out, {"checkpoint": _origin(model, checkpoint)}, folder.glob("*.pt"))
    return path


def export_huggingface(
    model_or_checkpoint: Transformer | str | Path,
    out: str | Path,
    tokenizer_json: str | Path | None = None,
    *,
    eot: str = EOT,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    llama: bool = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
    average: str | None = None,
    licence: str | None = None,
) -> Path:
    """Write a folder for `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`; returns it.

    It has safetensors, `config.json`, the two Python files of the model, a model card, `export.json`, which names the
    checkpoint and the weights by their digests, and with a tokenizer what `AutoTokenizer` needs. After
    `checkpoints.hf.register()` it loads without remote code.

    Args:
        tokenizer_json: a `tokenizer.json`, or its folder.
        eot: the tokenizer's end-of-text token, which ends generation.
        max_shard_bytes: weights are split into files up to this size.
        llama: write transformers' own `LlamaForCausalLM`, or `Qwen3ForCausalLM`, without Python files.
        dtype: type of the weights; rotary frequencies stay fp32.
        average: one of the run's `training.averages`, to have it in place of the last weights.
        licence: identifier for the model card.

    Raises:
        MissingInputError: there is no such tokenizer.
        ConfigError: the tokenizer has no token `eot`, or more ids than the model; the model is not exactly a Llama; the
            checkpoint has no such average; bf16 would lose rotary frequencies that are not the formula's.
        OpenLMError: as `load_checkpoint`.
    """
    from huggingface_hub import save_torch_state_dict

    out = Path(out)
    model, checkpoint = _open(model_or_checkpoint, average)
    config = model.config
    if llama:
        check_llama(model)
    if dtype == "bf16" and not has_exact_frequencies(model):
        raise ConfigError("its rotary frequencies are not those of the formula, and in bf16 they would be; use fp32")
    special = _write_tokenizer(Path(tokenizer_json), out, eot, config) if tokenizer_json else {}
    make_folder(out)
    # Each weight under one name: the head of a tied model and GELU's second names are left out.
    weights = {name: p.detach().to(_DTYPES[dtype]) for name, p in model.named_parameters()}
    settings = {"torch_dtype": str(_DTYPES[dtype]).removeprefix("torch.")} | special
    if llama:
        weights = state = llama_state(weights, config)
        # transformers would train no embedding of padding, and that may be the end-of-text token.
        settings = llama_config(config) | {key: value for key, value in settings.items() if key != "pad_token_id"}
    else:
        state = {f"model.{name}": value for name, value in (weights | dict(model.named_buffers())).items()}
        settings = _huggingface_config(config) | settings
        for name in _HF_FILES:
            shutil.copyfile(Path(__file__).parent / "hf" / name, out / name)
    with _disk_errors(out):
        save_torch_state_dict(state, out, max_shard_size=max_shard_bytes, metadata={"format": "pt"})
    export = {
        "checkpoint": _origin(model, checkpoint),
        "average": average,
        "dtype": settings["torch_dtype"],
        "weights_digest": _digest(weights),
    }
    recipe = _recipe(checkpoint) if checkpoint else {}
    data = [source["name"] for source in recipe.get("sources", [])]
    has = {"with_remote_code": not llama, "with_tokenizer": bool(special)}
    write_text(out / "README.md", model_card(out.resolve().name, config, export, data, licence=licence, **has))
    write_json(out / "generation_config.json", special)
    write_json(out / "config.json", settings)
    for path in out.glob("*.safetensors*"):
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    kinds = ("*.safetensors*", "config.json", "tokenizer.json", "*.py")
    write_record(out, export, (path for kind in kinds for path in out.glob(kind)))
    return out


def _open(
    model_or_checkpoint: Transformer | str | Path, average: str | None = None
) -> tuple[Transformer, Checkpoint | None]:
    if isinstance(model_or_checkpoint, Transformer):
        return model_or_checkpoint, None
    path = Path(model_or_checkpoint)
    checkpoint = read_checkpoint(path) if (path / INFO).is_file() else None
    if average is None:
        return load_checkpoint(path), checkpoint
    found = averages_in(checkpoint) if checkpoint else []
    if average not in found:
        raise ConfigError(f"{path} has no average {average!r}; it has {', '.join(found) or 'none'}")
    return load_model(checkpoint, average=average), checkpoint


def _recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The resolved recipe of the checkpoint's run, in the run folder, two levels up; empty if it is not there."""
    path = recipe_of(checkpoint.path.parent.parent)
    return yaml.safe_load(path.read_text()) if path else {}


def _digest(weights: dict[str, Tensor]) -> str:
    return digest_of_parts([{name: local_part(value) for name, value in weights.items()}])


def _origin(model: Transformer, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What the export was made from: digest of the weights, and of a run's checkpoint where it stands in the run."""
    if checkpoint is None:
        return {"weights_digest": _digest(dict(model.named_parameters()))}
    recipe = _recipe(checkpoint)
    return {
        "run": f"{recipe['name']}/{recipe['version']}" if recipe else None,
        "run_fingerprint": checkpoint.run_fingerprint,
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
        "milestone": checkpoint.milestone,
        "weights_digest": weights_digest(checkpoint),
    }


def _save(path: Path, document: dict[str, Any]) -> None:
    with atomic_writer(path) as f, _disk_errors(path):
        torch.save(document, f)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Have what torch and safetensors make of an error of the disk be that error."""
    try:
        yield
    except (RuntimeError, SafetensorError) as e:
        told = re.search(r"\(os error (\d+)\)", str(e))
        if (number := int(told[1]) if told else getattr(e.__context__, "errno", None)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from e


def _variant(config: ModelConfig) -> dict[str, Any]:
    """The settings that OpenLM keeps in flags."""
    return {
        "model_norm": config.norm,
        "qk_norm": config.qk_norm,
        "positional_embedding_type": config.positional_embedding,
        "ffn_type": config.ffn,
    }


def _model_name(config: ModelConfig) -> str | None:
    """The name of OpenLM's config of this size, if there is one that leaves the variant to flags."""
    sizes = {name: getattr(config, name) for name in _SIZES}
    plain = (n for n, m in MODELS.items() if "norm" not in m.model_fields_set and "ffn" not in m.model_fields_set)
    return next((n for n in plain if {k: getattr(MODELS[n], k) for k in _SIZES} == sizes), None)


def _evaluation_metrics(checkpoint: Checkpoint | None) -> list[dict[str, float]]:
    loss = checkpoint.metrics.get("validation_loss") if checkpoint else None
    return [] if loss is None else [{"loss": loss, "train_tokens": checkpoint.tokens}]


def _is_final(checkpoint: Checkpoint) -> bool:
    """Whether the run's recipe ends here."""
    recipe = _recipe(checkpoint)
    return bool(recipe) and checkpoint.tokens >= max(recipe["milestones"])


def _adamw(state: AdamState, fsdp: bool) -> dict[str, Any]:
    """AdamW's state_dict as OpenLM builds its optimizer: a first group without weight decay, always empty."""
    keys: list[Any] = list(state.moments) if fsdp else list(range(len(state.moments)))
    group = torch.optim.AdamW([Tensor([0.0])]).state_dict()["param_groups"][0] | state.settings
    groups = [{**group, "weight_decay": 0.0, "params": []}, {**group, "params": keys}]
    return {"state": dict(zip(keys, state.moments.values())), "param_groups": groups}


def _huggingface_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["OpenLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_openlm.OpenLMConfig",
            "AutoModelForCausalLM": "modeling_openlm.OpenLMForCausalLM",
        },
        "model_type": "openlm",
        "dim": config.hidden_dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "seq_len": config.seq_len,
        "norm_eps": config.norm_eps,
        "norm_type": config.norm,
        "apply_qk_norm": config.qk_norm,
        "post_embed_norm": config.post_embed_norm,
        "weight_tying": config.weight_tying,
        "tie_word_embeddings": config.weight_tying,
        "positional_embedding_type": config.positional_embedding,
        "ffn_type": config.ffn,
        "attn_name": "auto",
        "rope_freq_dtype": config.rope_freq_dtype,
        **{name: getattr(config, name) for name in config.beyond_openlm},
    }


def _write_tokenizer(path: Path, out: Path, eot: str, config: ModelConfig) -> dict[str, int]:
    """Copy the tokenizer and describe it; the ids of its special tokens under transformers' names."""
    found = local_file(str(path)) if path.exists() else None
    if found is None:
        raise MissingInputError(f"there is no tokenizer at {path}")
    tokenizer = read_json(path := found)
    try:
        ids = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    except (KeyError, TypeError) as e:
        raise DataError(f"{path} is not a tokenizer of Hugging Face tokenizers with a vocabulary: {e}") from e
    if eot not in ids:
        raise ConfigError(f"{path} has no token {eot!r}; name its end-of-text token with eot (--eot)")
    if max(ids.values()) >= config.vocab_size:
        raise ConfigError(f"{path} has ids up to {max(ids.values())}, the model only {config.vocab_size}: not its own")
    pad = _PADDING if _PADDING in ids else eot
    make_folder(out)
    shutil.copyfile(path, out / "tokenizer.json")
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot,
        "eos_token": eot,
        "unk_token": eot,
        "pad_token": pad,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.seq_len,
    }
    write_json(out / "tokenizer_config.json", description)
    return {"bos_token_id": ids[eot], "eos_token_id": ids[eot], "pad_token_id": ids[pad]}
