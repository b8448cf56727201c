"""Engines turn texts into token ids. All give the ids of Hugging Face `tokenizers`; the fast one is far cheaper.

`make_engine` takes the fast engine where it can load the tokenizer, and says why where it cannot. The fast engine never
stands alone: documents with code points on which the two are known to differ go to Hugging Face `tokenizers`, and a
sample of the others is encoded by both.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import orjson

from openlm_pipeline.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERIFY_EVERY = 500
"""One in so many documents is encoded by both engines, the first of each file among them."""

_RESET_BYTES = (
    256 << 20
)  # gigatoken 0.10 caches every distinct word it sees; a new tokenizer starts with an empty cache


@dataclass(frozen=True)
class Encoded:
    """The ids of several texts, one after the other."""

    ids: np.ndarray
    """uint32[sum of lengths]"""
    lengths: np.ndarray
    """int64[number of texts]"""

    def split(self) -> list[np.ndarray]:
        """The ids of each text."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []

    @classmethod
    def of(cls, ids: Sequence[np.ndarray]) -> "Encoded":
        lengths = np.array([len(x) for x in ids], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.uint32), *ids]), lengths)


class Engine(Protocol):
    """What a stage needs of a tokenizer."""

    name: str

    def encode_batch(self, texts: list[str]) -> Encoded:
        """Token ids of the texts, without special tokens added.

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


def load_reference(tokenizer_json: Path) -> "Tokenizer":
    """Hugging Face's tokenizer of a file; a second call gives the same one while the file is the same.

    Raises:
        Exception: it is no tokenizer; the library has no narrower one.
    """
    about = tokenizer_json.stat()
    return _load(tokenizer_json, about.st_mtime_ns, about.st_size, about.st_ino)


@lru_cache(maxsize=4)
def _load(tokenizer_json: Path, *stamp: int) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_json))


class HuggingFaceEngine:
    """The reference: `tokenizers` itself."""

    name = "huggingface"

    def __init__(self, tokenizer_json: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a Dask worker is one core; more threads cost CPU and give none
        self._tokenizer = load_reference(tokenizer_json)

    def encode_batch(self, texts: list[str]) -> Encoded:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return Encoded.of([np.array(e.ids, dtype=np.uint32) for e in encodings])


_ALWAYS, _MARK, _ENDS_IN_MARK = 1, 2, 4


@cache
def _guarded_code_points() -> np.ndarray:
    """uint8[0x110000] of flags: where the engines' ideas of Unicode differ; see benchmarks/probe_fast_engine.py."""
    table = np.zeros(0x110000, dtype=np.uint8)
    found = orjson.loads(Path(__file__).with_name("guard_codepoints.json").read_bytes())
    for kind, flag in (("always", _ALWAYS), ("marks", _MARK), ("ends_in_mark", _ENDS_IN_MARK)):
        for first, last in found[kind]:
            table[first : last + 1] |= flag
    return table


def is_guarded(text: str) -> bool:
    """Whether a text holds a code point, or a run of combining marks, on which the engines may differ."""
    if text.isascii():
        return False
    flags = _guarded_code_points()[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
    if not flags.any():
        return False
    return bool((flags & _ALWAYS).any() or ((flags[1:] & _MARK) & ((flags[:-1] & _ENDS_IN_MARK) >> 1)).any())


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

    def encode_batch(self, texts: list[str]) -> Encoded:
        if self._bytes > _RESET_BYTES:
            self._fast, self._bytes = self._load(), 0
        self._bytes += sum(map(len, texts))
        guarded = [i for i, text in enumerate(texts) if is_guarded(text)]
        encoded = self._encode_guarded(texts, guarded) if guarded else self._encode_fast(texts)
        sampled = set(range(-self._documents % self._verify_every, len(texts), self._verify_every)) - set(guarded)
        if sampled:
            found = encoded.split()
            expected = self._reference.encode_batch([texts[i] for i in sorted(sampled)]).split()
            for i, ids in zip(sorted(sampled), expected):
                if not np.array_equal(found[i], ids):
                    raise EngineMismatch("the fast tokenizer engine and Hugging Face tokenizers give different ids", i)
        self._documents += len(texts)
        return encoded

    def _encode_guarded(self, texts: list[str], guarded: list[int]) -> Encoded:
        """Encode all, those in `guarded` by the reference."""
        ids: dict[int, np.ndarray] = dict(
            zip(guarded, self._reference.encode_batch([texts[i] for i in guarded]).split())
        )
        plain = [i for i in range(len(texts)) if i not in ids]
        ids |= zip(plain, self._encode_fast([texts[i] for i in plain]).split())
        return Encoded.of([ids[i] for i in range(len(texts))])

    def _encode_fast(self, texts: list[str]) -> Encoded:
        # One at a time: the batched call imports awkward, which costs as much CPU time as 20 MB of text.
        return Encoded.of([self._fast.encode(text) for text in texts])


def _why_not_fast(tokenizer_json: Path) -> str | None:
    """Why the fast engine must not be tried on a tokenizer: only byte-level BPE was compared with the reference."""
    config = orjson.loads(tokenizer_json.read_bytes())
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
