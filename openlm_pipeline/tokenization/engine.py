"""Engines turn texts into token ids. All give the ids of Hugging Face `tokenizers`; the fast one is far cheaper.

`make_engine` takes the fast engine where it can load the tokenizer, and says why where it cannot. The fast engine never
stands alone: documents with code points on which the two are known to differ go to Hugging Face `tokenizers`, and a
sample of the others is encoded by both.
"""

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from openlm_pipeline.errors import DataError

VERIFY_EVERY = 200
"""One in so many documents is encoded by both engines, the first of each file among them."""

_RESET_BYTES = (
    256 << 20
)  # gigatoken 0.10 caches every distinct word it sees; a new tokenizer starts with an empty cache


class Engine(Protocol):
    """What a stage needs of a tokenizer."""

    name: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, unsigned integers [n], without special tokens added.

        Raises:
            EngineMismatch: a sampled document came out different from Hugging Face `tokenizers`.
        """
        ...


class EngineMismatch(DataError):
    """The fast engine gave other ids than the reference; `position` is the document's place in its batch."""

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message, position)
        self.position = position

    def __str__(self) -> str:
        return str(self.args[0])


class HuggingFaceEngine:
    """The reference: `tokenizers` itself."""

    name = "huggingface"

    def __init__(self, tokenizer_json: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a Dask worker is one core; more threads cost CPU and give none
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encodings]


@cache
def _guarded_code_points() -> np.ndarray:
    """bool[0x110000]: where the engines' ideas of Unicode differ; made by benchmarks/probe_fast_engine.py."""
    table = np.zeros(0x110000, dtype=bool)
    for first, last in json.loads(Path(__file__).with_name("guard_codepoints.json").read_text())["ranges"]:
        table[first : last + 1] = True
    return table


def is_guarded(text: str) -> bool:
    """Whether a text holds a code point on which the engines may differ."""
    if text.isascii():
        return False
    return bool(_guarded_code_points()[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any())


class GigatokenEngine:
    """gigatoken, guarded and sampled against the reference."""

    name = "gigatoken"

    def __init__(self, tokenizer_json: Path, verify_every: int = VERIFY_EVERY) -> None:
        """
        Args:
            verify_every: one in so many documents is checked; 1 checks all.

        Raises:
            ImportError: gigatoken is not installed.
            ValueError: it cannot load this tokenizer.
        """
        import gigatoken

        self._load = lambda: gigatoken.Tokenizer(str(tokenizer_json))
        self._fast = self._load()
        self._reference = HuggingFaceEngine(tokenizer_json)
        self._verify_every = verify_every
        self._documents = 0
        self._bytes = 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._bytes > _RESET_BYTES:
            self._fast, self._bytes = self._load(), 0
        self._bytes += sum(map(len, texts))
        guarded = [i for i, text in enumerate(texts) if is_guarded(text)]
        plain = sorted(set(range(len(texts))) - set(guarded))
        ids: list[np.ndarray] = [np.zeros(0, np.uint32)] * len(texts)
        for i, encoded in zip(plain, self._encode_fast([texts[i] for i in plain])):
            ids[i] = encoded
        for i, encoded in zip(guarded, self._reference.encode_batch([texts[i] for i in guarded])):
            ids[i] = encoded
        sampled = [i for i in plain if (self._documents + i) % self._verify_every == 0]
        for i, expected in zip(sampled, self._reference.encode_batch([texts[i] for i in sampled])):
            if not np.array_equal(ids[i], expected):
                raise EngineMismatch("the fast tokenizer engine and Hugging Face tokenizers give different ids", i)
        self._documents += len(texts)
        return ids

    def _encode_fast(self, texts: Sequence[str]) -> list[np.ndarray]:
        import awkward as ak

        if not texts:
            return []
        ragged = self._fast.encode_batch(list(texts), parallel=False)
        lengths = np.asarray(ak.num(ragged))
        return np.split(np.asarray(ak.flatten(ragged)), np.cumsum(lengths)[:-1])


def _why_not_fast(tokenizer_json: Path) -> str | None:
    """Why the fast engine must not be tried on a tokenizer: only byte-level BPE was compared with the reference."""
    config = json.loads(tokenizer_json.read_text())
    if config["model"].get("type") != "BPE":
        return f"it is a {config['model'].get('type')} model, not BPE"
    if (config.get("pre_tokenizer") or {}).get("type") != "ByteLevel":
        return "its pre-tokenizer is not plain ByteLevel"
    if (config.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        return "its normalizer is not NFC"
    return None


def make_engine(tokenizer_json: Path, choice: str = "auto", verify_every: int = VERIFY_EVERY) -> tuple[Engine, str]:
    """The fastest engine that can be trusted with a tokenizer, and a line that says which and why.

    Args:
        choice: `auto`, or `huggingface` for the reference alone.
        verify_every: one in so many documents of the fast engine is checked against the reference.
    """
    reason = "it was asked for" if choice == "huggingface" else _why_not_fast(tokenizer_json)
    if reason is None:
        try:
            engine = GigatokenEngine(tokenizer_json, verify_every)
            return engine, f"gigatoken, 1 in {verify_every} documents checked against Hugging Face tokenizers"
        except ImportError:
            reason = "gigatoken is not installed"
        except Exception as e:  # noqa: BLE001 - whatever a beta library raises, the reference still works
            reason = f"gigatoken cannot load it: {e}"
    return HuggingFaceEngine(tokenizer_json), f"Hugging Face tokenizers, because {reason}"
