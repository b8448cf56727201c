"""Engines that turn texts into token ids, one module each: `execution.tokenizer_engine` names one.

All must give the ids of Hugging Face `tokenizers`, the reference, against which `tokenizers.engine` checks the others.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openlm_pipeline.errors import DataError


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


class EncodingError(DataError):
    """A document can't be encoded; `position` is its place in its batch."""

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message, position)
        self.position = position

    def __str__(self) -> str:
        return str(self.args[0])


CUT = re.compile(r"[A-Za-z](?= )")


def pieces(text: str, characters: int) -> Iterator[str]:
    """A text cut between letters and spaces, at the first such place after each so many characters."""
    begin = 0
    while cut := CUT.search(text, begin + characters - 1):
        yield text[begin : cut.end()]
        begin = cut.end()
    yield text[begin:]


class Engine(ABC):
    """A tokenizer of a file, ready to encode."""

    title: str
    """What it is called in records and messages."""

    @abstractmethod
    def __init__(self, tokenizer_json: Path) -> None:
        """
        One that takes `special_as_text=True` too is used for sources with `special_tokens: text`: then it encodes the
        strings of special tokens as any other text.

        Raises:
            ImportError: its library is not installed.
            Exception: it cannot load this tokenizer.
        """

    @classmethod
    def unfit(cls, tokenizer_json: Path) -> str | None:
        """Why it must not be tried on a tokenizer; None if it may."""
        return None

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> Encoded:
        """Token ids of the texts, without special tokens added."""

    @property
    def can_cut(self) -> bool:
        """Whether the ids of a text are those of its `pieces`, one after the other."""
        return False

    def is_doubtful(self, text: str) -> bool:
        """Whether it may give other ids than the reference for a text, which then goes to the reference."""
        return False
