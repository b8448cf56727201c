"""Checkpoints in the forms of others: OpenLM's log folder with `.pt` files, and a Hugging Face folder.

Both say what model they hold, so that `load_checkpoint` needs nothing else to read them back.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from openlm_pipeline.checkpoints.folders import INFO, Checkpoint, read_checkpoint
from openlm_pipeline.checkpoints.loading import load_checkpoint
from openlm_pipeline.checkpoints.reading import AdamState, load_adam_state
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.models.config import MODELS, ModelConfig
from openlm_pipeline.models.norms import NORM_EPS
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.storage.files import atomic_writer, read_json, write_json, write_text

EOT = "<|endoftext|>"
_PADDING = "<|padding|>"
_SIZES = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size", "post_embed_norm", "weight_tying")
_HF_FILES = ("configuration_openlm.py", "modeling_openlm.py")
_MAX_SHARD_BYTES = 5_000_000_000


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
    return path


def export_huggingface(
    model_or_checkpoint: Transformer | str | Path,
    out: str | Path,
    tokenizer_json: str | Path | None = None,
    *,
    eot: str = EOT,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> Path:
    """Write a folder for `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`; returns it.

    It has safetensors, `config.json`, the two Python files of the model, and with a tokenizer what `AutoTokenizer`
    needs. After `models.huggingface.register()` it loads without remote code.

    Args:
        tokenizer_json: a `tokenizer.json`, or its folder.
        eot: the tokenizer's end-of-text token, which ends generation.
        max_shard_bytes: weights are split into files up to this size.

    Raises:
        MissingInputError: there is no such tokenizer.
        ConfigError: the tokenizer has no token `eot`, or more ids than the model.
        OpenLMError: as `load_checkpoint`.
    """
    from huggingface_hub import save_torch_state_dict

    out = Path(out)
    model, _ = _open(model_or_checkpoint)
    config = model.config
    special = _write_tokenizer(Path(tokenizer_json), out, eot, config) if tokenizer_json else {}
    out.mkdir(parents=True, exist_ok=True)
    # One name for each weight: the head of a tied model and GELU's second names are left out.
    doubled = (".feed_forward.0.", ".feed_forward.2.") if config.ffn == "gelu" else ()
    state = {
        f"model.{name}": value
        for name, value in model.state_dict().items()
        if not any(part in name for part in doubled) and not (config.weight_tying and name == "output.weight")
    }
    save_torch_state_dict(state, out, max_shard_size=max_shard_bytes, metadata={"format": "pt"})
    for name in _HF_FILES:
        shutil.copyfile(Path(__file__).parent / "hf" / name, out / name)
    write_json(out / "generation_config.json", special)
    write_json(out / "config.json", _huggingface_config(config) | special)
    return out


def _open(model_or_checkpoint: Transformer | str | Path) -> tuple[Transformer, Checkpoint | None]:
    if isinstance(model_or_checkpoint, Transformer):
        return model_or_checkpoint, None
    path = Path(model_or_checkpoint)
    return load_checkpoint(path), read_checkpoint(path) if (path / INFO).is_file() else None


def _save(path: Path, document: dict[str, Any]) -> None:
    with atomic_writer(path) as f:
        torch.save(document, f)


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
    """Whether the run's recipe ends here; its resolved form stands in the run folder, two levels up."""
    path = checkpoint.path.parent.parent / "experiment.yaml"
    return path.is_file() and checkpoint.tokens >= max(yaml.safe_load(path.read_text())["milestones"])


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
        "norm_eps": NORM_EPS,
        "norm_type": config.norm,
        "apply_qk_norm": config.qk_norm,
        "post_embed_norm": config.post_embed_norm,
        "weight_tying": config.weight_tying,
        "tie_word_embeddings": config.weight_tying,
        "positional_embedding_type": config.positional_embedding,
        "ffn_type": config.ffn,
        "attn_name": "auto",
        "rope_freq_dtype": config.rope_freq_dtype,
        "torch_dtype": "float32",
    }


def _write_tokenizer(path: Path, out: Path, eot: str, config: ModelConfig) -> dict[str, int]:
    """Copy the tokenizer and describe it; the ids of its special tokens under transformers' names."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise MissingInputError(f"there is no tokenizer at {path}")
    tokenizer = read_json(path)
    try:
        ids = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    except (KeyError, TypeError) as e:
        raise DataError(f"{path} is not a tokenizer of Hugging Face tokenizers with a vocabulary: {e}") from e
    if eot not in ids:
        raise ConfigError(f"{path} has no token {eot!r}; name its end-of-text token with eot (--eot)")
    if max(ids.values()) >= config.vocab_size:
        raise ConfigError(f"{path} has ids up to {max(ids.values())}, the model only {config.vocab_size}: not its own")
    pad = _PADDING if _PADDING in ids else eot
    out.mkdir(parents=True, exist_ok=True)
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
