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
    source = Path(spec.source or "")
    places = [tokenizer_file(folder), *([source, source / "tokenizer.json"] if spec.source else [])]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise MissingInputError(f"there is no tokenizer.json in {folder}; `openlm tokenize` fetches it")
    if sha256 and sha256_file(path) != sha256:
        raise DataError(f"{path} is not the tokenizer that the samples were made with")
    sizes = np.array([len(text) for text in texts_of_ids(path)], np.int32)
    sizes[[i for i, token in load_any(path).get_added_tokens_decoder().items() if token.special]] = 0
    return sizes


def texts_of_ids(path: Path) -> list[bytes]:
    """What each id, up to the largest, adds to the UTF-8 bytes of a text; a special token its own name.

    Args:
        path: a `tokenizer.json`.

    Raises:
        DataError: it is of a kind whose tokens don't tell their bytes.
    """
    config = orjson.loads(path.read_bytes())
    decoders = set(_types(config.get("decoder")))
    if not decoders & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise DataError(f"{path} is neither a byte-level tokenizer nor one of SentencePiece's")
    added = {token["id"] for token in config.get("added_tokens", ())}
    vocabulary = load_any(path).get_vocab(with_added_tokens=True)
    texts = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i in added:
            texts[i] = token.encode()
        elif "ByteLevel" in decoders:
            texts[i] = b"".join(_BYTE_OF.get(c) or c.encode() for c in token)
        elif len(token) == 6 and token.startswith("<0x"):
            texts[i] = bytes.fromhex(token[3:5])
        else:
            texts[i] = token.replace(_SPACE, " ").encode()
    return texts


def _bytes_of_characters() -> dict[str, bytes]:
    """The byte that each character of a byte-level token stands for: printable ones for themselves, the others in their
    order for the characters from 256 on. Source: `bytes_to_unicode` of GPT-2's encoder."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(b): bytes([b]) for b in themselves} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


def _types(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _types(part)
