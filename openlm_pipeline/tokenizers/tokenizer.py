"""Tokenizers by name under `tokenizers/`: trained here, or copied from a file or the Hugging Face hub.

A tokenizer folder holds `tokenizer.json` and, written last, `tokenizer_info.json` with its identity.
"""

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import orjson

from openlm_pipeline.corpus.discovery import RawFile
from openlm_pipeline.corpus.reader import RecordReader
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.experiments import TokenizerSpec
from openlm_pipeline.fingerprint import differences, settings_tree
from openlm_pipeline.result import refusal, refuse
from openlm_pipeline.storage.files import atomic_writer, make_folder, read_json, set_aside, sha256_file, write_json
from openlm_pipeline.storage.remote import sha256_url
from openlm_pipeline.tokenizers.engine import largest_id, load_any, load_reference

TRAINING_VERSION = 1
"""Raised when the same corpus and settings would give another tokenizer."""

_INFO = "tokenizer_info.json"
_FILE = "tokenizer.json"
_LOOK_SECONDS = 5


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer on disk."""

    name: str
    sha256: str
    """The hash of `tokenizer.json`."""
    vocab_size: int
    """Number of ids, added tokens included; the largest id may lie far above it."""
    eot_id: int
    identity: dict[str, Any]
    """What it was made from."""
    stamps: dict[str, str] = field(default_factory=dict)
    """Stamp of each raw file when it was hashed: an equal one means that its content need not be hashed again."""
    largest_id: int | None = None
    """None only in what a release before this field wrote; `read_tokenizer_info` fills it in."""
    bos_id: int | None = None
    """What begins each document, if anything does."""
    switched_off: list[str] | None = None
    """Which of `truncation` and `padding` the file has, that do nothing here; None as for `largest_id`."""

    @property
    def num_rows(self) -> int:
        """Rows that an embedding needs for its ids: the largest one and 1."""
        return self.vocab_size if self.largest_id is None else self.largest_id + 1


NEOX = "EleutherAI/gpt-neox-20b"


def default_tokenizer() -> str:
    """Where a command's tokenizer is that nothing says: `OPENLM_TOKENIZER`, or else OpenLM's on the hub."""
    return os.environ.get("OPENLM_TOKENIZER") or NEOX


def tokenizer_file(folder: Path) -> Path:
    return folder / _FILE


def read_tokenizer_info(folder: Path) -> TokenizerInfo:
    """The tokenizer of a folder.

    Raises:
        MissingInputError: none is there.
        DataError: `tokenizer.json` is not the one that was recorded.
    """
    if not (folder / _INFO).exists():
        raise MissingInputError(f"there is no tokenizer in {folder}; `openlm tokenize RECIPE` makes or fetches it")
    try:
        info = TokenizerInfo(**read_json(folder / _INFO))
    except TypeError as e:
        raise DataError(f"{folder / _INFO} is damaged: {e}; delete the folder to make it again") from e
    path = tokenizer_file(folder)
    if not path.exists() or sha256_file(path) != info.sha256:
        raise DataError(f"{path} is not the file that {folder / _INFO} describes; delete the folder to make it again")
    return info if info.largest_id is not None else replace(info, **_facts(path, info.sha256))


def _texts(files: Iterable[RawFile], text_key: str) -> Iterator[str]:
    for raw in files:
        every = {"max_bad_fraction": 1.0, "on_bad": lambda _: None}  # stage 1 judges
        for record in RecordReader(raw.url, text_key=text_key, format=raw.format, **every):
            yield record.text


def _train(spec: TokenizerSpec, files: list[RawFile], text_key: str, path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.train.vocab_size,
        special_tokens=[spec.eot, "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files, text_key), trainer)
    with atomic_writer(path) as f:
        f.write(tokenizer.to_str().encode())


def local_file(source: str) -> Path | None:
    """The file that a path names; None for a name on the hub.

    Raises:
        MissingInputError: it can be no name on the hub, and there is no such file.
        DataError: it is one of a home, and damaged.
    """
    path = Path(source)
    if path.is_dir():
        path = path / _FILE
    if path.is_file():
        if path.name == _FILE and path.with_name(_INFO).exists():
            read_tokenizer_info(path.parent)
        return path
    if path.is_absolute() or source.startswith((".", "~")) or source.endswith(".json") or source.count("/") != 1:
        raise MissingInputError(
            f"there is no tokenizer at {source}: give a tokenizer.json, a folder that holds one, or a Hugging Face hub "
            "name such as EleutherAI/gpt-neox-20b, as `tokenizer.source` or in OPENLM_TOKENIZER"
        )
    return None


@contextlib.contextmanager
def _hub(source: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise MissingInputError(
            f"the tokenizer {source} could not be fetched from the Hugging Face hub ({reason}). Without internet, set "
            "OPENLM_TOKENIZER (or `tokenizer.source`) to the path of a tokenizer.json"
        ) from e


def fetch_tokenizer_json(source: str) -> bytes:
    """The bytes of `tokenizer.json` from a file, a folder or the Hugging Face hub.

    Raises:
        MissingInputError: it is not there, or the hub cannot be reached.
    """
    if path := local_file(source):
        return path.read_bytes()
    from huggingface_hub import hf_hub_download

    with _hub(source):
        return Path(hf_hub_download(source, _FILE)).read_bytes()


def check_reachable(source: str) -> None:
    """Look whether `fetch_tokenizer_json` would find it, without fetching it: one request, not tried again.

    Raises:
        MissingInputError: as that does.
    """
    if local_file(source):
        return
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(source, _FILE), str):
        with _hub(source):
            try:
                urlopen(Request(hf_hub_url(source, _FILE), method="HEAD"), timeout=_LOOK_SECONDS).close()
            except HTTPError as e:
                if e.code not in (401, 403):  # where a token is asked for, the hub's own library has it
                    raise


def make_tokenizer(
    spec: TokenizerSpec, files: list[RawFile], text_key: str, folder: Path, allow: Collection[str] = ()
) -> tuple[TokenizerInfo, bool, list[str]]:
    """Make or fetch a tokenizer unless the folder holds the one asked for.

    Args:
        files: text to train on, used only where the spec says to train.
        folder: where it goes.
        allow: consents; `supersede` sets a different tokenizer that is there aside.

    Returns:
        The tokenizer, whether it was there already, and how it differs from the one set aside.

    Raises:
        MissingInputError: the source does not exist or cannot be reached.
        ConsentError: another one is there.
        ConfigError: it lacks the end-of-text token, or is no tokenizer.
    """
    content = None
    info = read_tokenizer_info(folder) if (folder / _INFO).exists() else None
    stamps = {raw.name: raw.stamp for raw in files} if spec.train else {}
    if spec.train:
        corpus = {raw.name: _recorded_hash(info, raw) or sha256_url(raw.url) for raw in files}
        identity = {"train": settings_tree(spec.train), **spec.ends(), "corpus": corpus, "code": TRAINING_VERSION}
    else:
        identity = {"source": spec.source, **spec.ends()}
    changed: list[str] = []
    if info:
        local = spec.source is not None and Path(spec.source).exists()
        content = fetch_tokenizer_json(spec.source) if local else None
        same_file = content is None or content == tokenizer_file(folder).read_bytes()
        if info.identity == identity and same_file:
            if info.stamps != stamps:  # touched, but the same: remember it, or it is hashed again each time
                info = replace(info, stamps=stamps)
                write_json(folder / _INFO, {**read_json(folder / _INFO), "stamps": stamps})
            return info, True, []
        changed = differences(info.identity, identity) or ["the content of tokenizer.json"]
        what = "\n  ".join([f"{folder} holds another tokenizer. What differs:", *changed])
        refuse([refusal("supersede", what, "To keep it, give the recipe's tokenizer another name")], allow)
        set_aside(folder)
    make_folder(folder)
    path = tokenizer_file(folder)
    if spec.train:
        _train(spec, files, text_key, path)
    else:
        with atomic_writer(path) as f:
            f.write(content or fetch_tokenizer_json(spec.source))
    info = replace(_describe(spec, path, identity), stamps=stamps)
    write_json(folder / _INFO, asdict(info))
    return info, False, changed


def _recorded_hash(info: TokenizerInfo | None, raw: RawFile) -> str | None:
    """The hash of a raw file that is as it was when the tokenizer was made."""
    if info is None or info.stamps.get(raw.name) != raw.stamp:
        return None
    return info.identity.get("corpus", {}).get(raw.name)


def _describe(spec: TokenizerSpec, path: Path, identity: dict[str, Any]) -> TokenizerInfo:
    try:
        tokenizer = load_reference(path)
    except ConfigError:
        raise
    except Exception as e:  # noqa: BLE001 - `tokenizers` raises bare Exception for a file it cannot read
        raise ConfigError(f"{spec.source or path} is not a tokenizer.json: {e}") from e
    eot_id = tokenizer.token_to_id(spec.eot)
    if spec.bos is not None and tokenizer.token_to_id(spec.bos) is None:
        raise ConfigError(
            f"tokenizer {spec.name} has no token {spec.bos!r}; set `tokenizer.bos`, or --bos, to one of its"
        )
    if eot_id is None:
        raise ConfigError(
            f"tokenizer {spec.name} has no token {spec.eot!r}; set `tokenizer.eot`, or --eot, to its end-of-text token"
        )
    bos_id = None if spec.bos is None else tokenizer.token_to_id(spec.bos)
    sha256, size = sha256_file(path), tokenizer.get_vocab_size()
    return TokenizerInfo(spec.name, sha256, size, eot_id, identity, bos_id=bos_id, **_facts(path, sha256))


@lru_cache(maxsize=4)
def _facts(path: Path, sha256: str) -> dict[str, Any]:
    """What the ids of a tokenizer depend on beside its file's hash, `sha256`."""
    try:
        config = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as e:  # the reference reads some that are not JSON
        raise ConfigError(f"{path} is not a tokenizer.json: {e}") from e
    off = [name for name in ("truncation", "padding") if config.get(name)]
    return {"largest_id": largest_id(load_any(path)), "switched_off": off}
