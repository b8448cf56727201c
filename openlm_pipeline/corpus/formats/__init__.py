"""Raw file formats, one module each; a file's suffix says which it has.

Compression is not theirs: `corpus.blocks` gives a `.zst` or `.gz` file's content, and a format has the suffixes with
them that it can have. Where several suffixes fit a name, the longest wins: `.csv.zst` before `.zst`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, ClassVar, Protocol

from openlm_pipeline.corpus import blocks as limits
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.registry import RAW_FORMATS


@dataclass(frozen=True)
class Part:
    """A stretch of a raw file's own bytes (compressed ones, where it is); its records are those that begin there."""

    begin: int = 0
    end: int | None = None
    """None: to the end of the file."""


WHOLE = Part()


@dataclass(frozen=True)
class Found:
    """A record as it stands in a file."""

    line: int
    """From 1, counted in the part that is read; where a format has no lines, the row."""
    offset: int
    """Byte at which it begins in the file's decompressed content; where a format has no such thing the row, from 0."""
    text: str | None
    problem: str = ""
    """Why it cannot be used, where `text` is None."""


class Reading(Protocol):
    """A part under way: what to read, and what the format counts while it does."""

    url: str
    text_key: str
    part: Part
    lines: int
    """Lines so far, blank ones too."""
    bytes: int
    """Decompressed bytes of the part so far."""
    raw_bytes: int
    """The file's own bytes read so far, those before the part left out."""
    at_end: bool
    """All of the part's bytes were read, and given to `digest`."""
    digest: Callable[[bytes], object]
    """Takes the file's own bytes in order, where they are read in order."""


class RawFormat(ABC):
    """How the records of a raw file are found."""

    suffixes: ClassVar[tuple[str, ...]]

    def cut(self, size_bytes: int, count: int) -> list[Part]:
        """At most `count` parts of about the same size, in order; `[WHOLE]` where it cannot be read in parts."""
        blocks = max(1, size_bytes // limits.BLOCK_BYTES)
        count = max(1, min(count, blocks))
        cuts = [i * blocks // count * limits.BLOCK_BYTES for i in range(count)]
        return [Part(begin, end) for begin, end in zip(cuts, [*cuts[1:], None])]

    @abstractmethod
    def records(self, file: BinaryIO, reading: Reading) -> Iterator[Found]:
        """The records that begin in `reading.part`, in order, in bounded memory; bad ones have no text.

        Raises:
            DataError: the file is empty, truncated or corrupt.
        """


def format_of(url: str) -> RawFormat:
    """The format of a file.

    Raises:
        ConfigError: none has its suffix.
    """
    known = {suffix: entry for _, entry in RAW_FORMATS for suffix in entry.suffixes}
    found = max((suffix for suffix in known if url.endswith(suffix)), key=len, default=None)
    if found is None:
        raise ConfigError(f"{url} has no suffix that can be read; those that can: {', '.join(known)}")
    return known[found]()
