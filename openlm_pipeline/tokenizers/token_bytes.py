"""The bytes of text that each id stands for, by which a loss a token becomes bits a byte, whatever the tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.experiments import TokenizerSpec
from openlm_pipeline.storage.files import sha256_file
from openlm_pipeline.tokenizers.engine import load_any
from openlm_pipeline.tokenizers.tokenizer import tokenizer_file

_SPACE = "▁"


def bytes_of_ids(spec: TokenizerSpec, folder: Path, sha256: str | None) -> np.ndarray:
    """int32[largest id + 1]: UTF-8 bytes of the text of each id; special tokens, which are no text, have none.

    Args:
        folder: of the tokenizer in a home; a local `tokenizer.source` serves where it has none.
        sha256: of the `tokenizer.json` that samples were made with, where it is known.

    Raises:
        MissingInputError: there is no `tokenizer.json` on this machine.
        DataError: it is another one, or of a kind whose tokens don't tell their bytes.
    """
    return np.array([len(text or b"") for text in texts_of_ids(tokenizer_json(spec, folder, sha256))], np.int32)


def tokenizer_json(spec: TokenizerSpec, folder: Path, sha256: str | None) -> Path:
    """The `tokenizer.json` that samples were made with.

    Args, Raises: as of `bytes_of_ids`.
    """
    source = Path(spec.source or "")
    places = [tokenizer_file(folder), *([source, source / "tokenizer.json"] if spec.source else [])]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise MissingInputError(f"there is no tokenizer.json in {folder}; `openlm tokenize` fetches it")
    if sha256 and sha256_file(path) != sha256:
        raise DataError(f"{path} is not the tokenizer that the samples were made with")
    return path


def texts_of_ids(path: Path, *, named: bool = False) -> list[bytes | None]:
    """The bytes of text that each id of a `tokenizer.json` stands for, which may be part of a character; None for
    special tokens, which are no text, and ids without a token.

    Args:
        named: give special tokens as their names.

    Raises:
        DataError: it is of a kind whose tokens don't tell their bytes.
    """
    config = orjson.loads(path.read_bytes())
    decoders = set(_types(config.get("decoder")))
    if not decoders & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise DataError(f"{path} is neither a byte-level tokenizer nor one of SentencePiece's")
    added = {token["id"]: token for token in config.get("added_tokens", ())}
    vocabulary = load_any(path).get_vocab(with_added_tokens=True)
    bytes_of = _byte_level()
    texts: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i in added:
            texts[i] = None if added[i]["special"] and not named else token.encode()
        elif "ByteLevel" in decoders:
            texts[i] = b"".join(bytes_of.get(c) or c.encode() for c in token)
        elif len(token) == 6 and token.startswith("<0x"):
            texts[i] = bytes([int(token[3:5], 16)])
        else:
            texts[i] = token.replace(_SPACE, " ").encode()
    return texts


def _byte_level() -> dict[str, bytes]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    return {chr(b): bytes([b]) for b in shown} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


def _types(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _types(part)
