"""The engine of a tokenizer: the one asked for, or the fastest that can be trusted with it.

An engine that is not the reference never stands alone: documents on which it says that it may differ go to Hugging Face
`tokenizers`, and a sample of the others is encoded by both.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.registry import ENGINES
from openlm_pipeline.tokenizers.engines import Encoded, Engine

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERIFY_EVERY = 500
"""One in so many documents is encoded by both engines, the first of each file among them."""
_REFERENCE, _FAST = "huggingface", "gigatoken"


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


class CheckedEngine:
    """An engine with the reference beside it."""

    def __init__(self, engine: Engine, reference: Engine, verify_every: int = VERIFY_EVERY) -> None:
        """
        Args:
            verify_every: one in so many documents is checked; 1 checks all.
        """
        self._engine, self._reference, self._verify_every = engine, reference, verify_every
        self._documents = 0

    def encode_batch(self, texts: list[str]) -> Encoded:
        """Token ids of the texts, without special tokens added.

        Raises:
            EngineMismatch: a sampled document came out different from the reference.
        """
        doubtful = [i for i, text in enumerate(texts) if self._engine.is_doubtful(text)]
        encoded = self._encode_apart(texts, doubtful) if doubtful else self._engine.encode_batch(texts)
        sampled = set(range(-self._documents % self._verify_every, len(texts), self._verify_every)) - set(doubtful)
        if sampled:
            found = encoded.split()
            expected = self._reference.encode_batch([texts[i] for i in sorted(sampled)]).split()
            for i, ids in zip(sorted(sampled), expected):
                if not np.array_equal(found[i], ids):
                    raise EngineMismatch("the fast tokenizer engine and Hugging Face tokenizers give different ids", i)
        self._documents += len(texts)
        return encoded

    def _encode_apart(self, texts: list[str], doubtful: list[int]) -> Encoded:
        """Encode all, those in `doubtful` by the reference."""
        ids: dict[int, np.ndarray] = dict(
            zip(doubtful, self._reference.encode_batch([texts[i] for i in doubtful]).split())
        )
        plain = [i for i in range(len(texts)) if i not in ids]
        ids |= zip(plain, self._engine.encode_batch([texts[i] for i in plain]).split())
        return Encoded.of([ids[i] for i in range(len(texts))])


def make_engine(
    tokenizer_json: Path, choice: str = "auto", verify_every: int = VERIFY_EVERY
) -> tuple[Engine | CheckedEngine, str]:
    """An engine for a tokenizer, and a line that says which and why.

    Args:
        choice: a name in `ENGINES`; `auto`: gigatoken where it can be trusted with the tokenizer, else the reference.
        verify_every: one in so many documents of another engine is checked against the reference.

    Raises:
        ConfigError: there is no such engine, or the one asked for does not take this tokenizer.
    """
    reference = ENGINES[_REFERENCE]
    if choice == _REFERENCE:
        return reference(tokenizer_json), f"{reference.title}, because it was asked for"
    wanted = ENGINES[_FAST if choice == "auto" else choice]
    engine, reason = _load_engine(wanted, tokenizer_json)
    if engine is None:
        if choice != "auto":
            raise ConfigError(
                f"execution.tokenizer_engine={choice} does not work for {tokenizer_json}: {reason}. Leave it out, and "
                "the engine is chosen by what works"
            )
        return reference(tokenizer_json), f"{reference.title}, because {reason}"
    line = f"{wanted.title}, 1 in {verify_every} documents checked against {reference.title}"
    return CheckedEngine(engine, reference(tokenizer_json), verify_every), line


def _load_engine(wanted: type[Engine], tokenizer_json: Path) -> tuple[Engine | None, str]:
    """The engine, or None and why not."""
    if reason := wanted.unfit(tokenizer_json):
        return None, reason
    try:
        return wanted(tokenizer_json), ""
    except ImportError as e:
        return None, f"{e.name or wanted.title} is not installed"
    except Exception as e:  # noqa: BLE001 - whatever a beta library raises, the reference still works
        return None, f"{wanted.title} cannot load it: {e}"
