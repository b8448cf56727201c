"""What is scored: a milestone of a run, a checkpoint file of ours or OpenLM's, or any causal Hugging Face model.

A subject has all that a backend needs: a model that loads on its first use, its tokenizer, a digest of its weights, and
a Hugging Face folder of it for programs that take one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from openlm_pipeline.checkpoints.folders import INFO, Checkpoint, read_checkpoint, recipe_of, recorded_config
from openlm_pipeline.checkpoints.llama import LLAMAS, llama_differences
from openlm_pipeline.checkpoints.loading import find_model_config, load_checkpoint
from openlm_pipeline.checkpoints.weight_files import check_export, weight_parts
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.evaluation.huggingface import HuggingFaceModel
from openlm_pipeline.evaluation.model import NativeModel, Precision, ScoringModel
from openlm_pipeline.evaluation.scored import milestone_digest, scored_digest
from openlm_pipeline.fingerprint import fingerprint, settings_tree
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.result import Say
from openlm_pipeline.shards.openlm_formats import EOT
from openlm_pipeline.storage.files import read_json, sha256_file
from openlm_pipeline.storage.home import Home
from openlm_pipeline.strict import read_mapping
from openlm_pipeline.tokenizers.engine import largest_id, refuse_dropout
from openlm_pipeline.tokenizers.tokenizer import default_tokenizer, fetch_tokenizer_json, tokenizer_file

_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt"]
_OPENLM_TYPES = ("openlm", "open_lm")


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer, ready to be scored."""

    name: str
    model: ScoringModel
    tokenizer: Tokenizer
    digest: str
    """Identifies the weights, and what else changes their scores."""
    max_seq_len: int
    """Longest sequence in tokens that the model was made for."""
    huggingface_folder: Callable[[Path], Path]
    """Gives a folder that transformers loads: its own, or one written to the path given."""


def default_device() -> str:
    """`cuda`, `mps` or `cpu`: the first that is there."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_tokenizer(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """
    Raises:
        ConfigError: it may give an id for which the model has no embedding, or other ids each time.
    """
    refuse_dropout(tokenizer, f"the tokenizer of {where}")
    if (largest := largest_id(tokenizer)) >= vocab_size:
        raise ConfigError(
            f"the tokenizer may give the id {largest}, and the embedding of {where} has {vocab_size} rows: it is not "
            "this model's tokenizer; name the right one by --tokenizer"
        )


def _native(
    name: str,
    load: Callable[[], Transformer],
    config: ModelConfig,
    tokenizer: Tokenizer,
    digest: str,
    device: str,
    precision: Precision,
    eot: str = EOT,
) -> Subject:
    _check_tokenizer(tokenizer, config.vocab_size, name)

    def folder(out: Path) -> Path:
        from openlm_pipeline.checkpoints.model_export import export_huggingface

        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / "tokenizer-source.json"))
        return export_huggingface(load(), out, out / "tokenizer-source.json", eot=eot)

    model = NativeModel(load, device=device, precision=precision)
    return Subject(name, model, tokenizer, digest, config.seq_len, folder)


def place_of(path_or_name: str, revision: str | None = None) -> tuple[str, str | None]:
    """A model's absolute path, or its hub name with the revision; and of a path what tells that its files changed."""
    path = Path(path_or_name)
    if not path.exists():
        return (path_or_name if revision is None else f"{path_or_name}@{revision}"), None
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    about = {p.name: [(stat := p.stat()).st_size, stat.st_mtime_ns] for p in files}
    return str(path.absolute()), fingerprint({"files": about})


def milestone_subject(
    name: str,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    *,
    eot: str = EOT,
    average: str | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
) -> Subject:
    """A checkpoint of a run.

    Args:
        eot: the token that ends each document.
        average: one of the run's `training.averages`, to score it in place of the last weights.
    """
    config = recorded_config(checkpoint.path)

    def load() -> Transformer:
        from openlm_pipeline.checkpoints.reading import load_model  # imports much of torch

        return load_model(checkpoint, average=average)

    digest = milestone_digest(checkpoint, precision, average)
    return _native(name, load, config, tokenizer, digest, device, precision, eot)


def _downloaded(name: str, revision: str | None) -> Path:
    """The files of a model of the Hugging Face hub, in its cache; weights only as safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise MissingInputError(
            f"there is no file or folder {name}, and as a model of the hub it could not be fetched: {reason}"
        ) from e


def _huggingface_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer as transformers sets it up, its BOS rule included."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise MissingInputError(
            f"{folder} has no tokenizer that can be used ({reason}); name one by --tokenizer"
        ) from e
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(f"the tokenizer of {folder} has no fast form (tokenizer.json); name one by --tokenizer")
    return loaded.backend_tokenizer


def _named_tokenizer(source: str) -> Tokenizer:
    content = fetch_tokenizer_json(source)
    try:
        return Tokenizer.from_buffer(content)
    except Exception as e:  # noqa: BLE001 - `tokenizers` raises bare Exception for a file it cannot read
        raise DataError(f"{source} is not a tokenizer.json: {e}") from e


def _tokenizer_of_run(checkpoint: Path) -> Path | None:
    """The tokenizer with which the data of a run was made, where its home has it."""
    above = checkpoint.absolute().parents  # HOME/runs/NAME/VERSION/checkpoints/step-N
    if not (checkpoint / INFO).is_file() or len(above) < 5 or not (recipe := recipe_of(above[1])):
        return None
    found = tokenizer_file(Home(above[4]).tokenizer(read_mapping(recipe)["tokenizer"]["name"]))
    return found if found.is_file() else None


def _huggingface(folder: Path, name: str, tokenizer: str | None, device: str, precision: Precision) -> Subject:
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise MissingInputError(
            f"{folder} has no *.safetensors; weights in other forms are not read, as they can run code"
        )
    digest = fingerprint({"config": config, "weights": {p.name: sha256_file(p) for p in weights}})
    found = _named_tokenizer(tokenizer) if tokenizer else _huggingface_tokenizer(folder)
    _check_tokenizer(found, text["vocab_size"], name)
    lengths = [text[k] for k in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length") if text.get(k)]
    if config.get("model_type") in LLAMAS and not llama_differences(config):
        model = NativeModel(lambda: load_checkpoint(folder), device=device, precision=precision)
    else:
        model = HuggingFaceModel(str(folder), device=device, precision=precision)
    return Subject(
        name, model, found, scored_digest(digest, precision), lengths[0] if lengths else 2048, lambda _: folder
    )


def open_subject(
    path_or_name: str,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    report: Say = lambda line: None,
    **settings: Any,
) -> Subject:
    """A model from files.

    Args:
        path_or_name: OpenLM's `.pt`, a folder `step-*` of a run, a Hugging Face folder, or a name of its hub.
        model: name or JSON file of an OpenLM model's config, where the checkpoint does not say enough.
        tokenizer: `tokenizer.json`, its folder, or a hub name; by default a Hugging Face folder's or a run's own, else
            that of `OPENLM_TOKENIZER`, else GPT-NeoX-20B's.
        revision: branch, tag or commit, for a hub name.
        settings: fields of `ModelConfig` that are known better than by the files.

    Raises:
        MissingInputError: there is no such model or tokenizer, or the hub cannot be reached.
        ConfigError: the tokenizer is not the model's, or the config does not fit.
        DataError: the checkpoint is damaged or holds more than plain data.
    """
    path = Path(path_or_name)
    if not path.exists():
        if path.is_absolute() or path_or_name.count("/") != 1 or path_or_name.startswith((".", "~")):
            raise MissingInputError(f"there is no checkpoint {path_or_name}")
        path = _downloaded(path_or_name, revision)
    elif revision is not None:
        raise ConfigError("--revision goes with a model of the Hugging Face hub")
    check_export(path)
    config_file = path / "config.json"
    if config_file.is_file() and read_json(config_file).get("model_type") not in _OPENLM_TYPES:
        if model is not None or settings:
            raise ConfigError(f"{path_or_name} is not an OpenLM model, so no OpenLM config or model flag goes with it")
        return _huggingface(path, path_or_name, tokenizer, device, precision)

    def say(line: str) -> None:
        report(f"{path_or_name}: {line}")

    found = find_model_config(path, config=model, **settings)
    own = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else _tokenizer_of_run(path)
    named = _named_tokenizer(tokenizer or str(own or default_tokenizer()))
    for note in found.notes:
        say(note)
    if (path / INFO).is_file():
        digest = read_checkpoint(path).digest
    else:
        files = weight_parts(path) if path.is_dir() else [path]
        digest = fingerprint({"model": settings_tree(found.config), "weights": {p.name: sha256_file(p) for p in files}})

    def load() -> Transformer:
        return load_checkpoint(path, config=model, warn=lambda _: None, **settings)

    return _native(path_or_name, load, found.config, named, scored_digest(digest, precision), device, precision)
