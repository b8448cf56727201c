"""Raw file formats, one module each; a file's suffix says which it has.

Compression is not theirs: `corpus.blocks` gives the content of a compressed file, whose name has one more suffix. Case
does not count. Where several suffixes fit a name, the longest wins.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

from openlm_pipeline.corpus import blocks as limits
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.registry import RAW_FORMATS
from openlm_pipeline.storage.remote import public

_USUAL = ".jsonl"
"""What a file holds whose name says nothing but its compression."""


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
    size: int = 0
    """Bytes of one that cannot be used, as `Reading.bytes` counts them."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The values of `Reading.fields`, None where it has no such field."""


@dataclass
class Reading:
    """A part under way: what to read, and what the format counts while it does."""

    url: str
    text_key: str
    part: Part
    compression: str | None = None
    """Of the file as it is, whatever its name says; None for a plain one."""
    lines: int = 0
    """Lines so far, blank ones too; in Parquet rows, in an array elements."""
    bytes: int = 0
    """Decompressed bytes of the part so far; in Parquet the bytes of the texts."""
    raw_bytes: int = 0
    """The file's own bytes read so far, those before the part left out."""
    at_end: bool = False
    """All of the part's bytes were read, and given to `digest`."""
    digest: Callable[[bytes], object] = lambda block: None
    """Takes the file's own bytes in order, where they are read in order."""
    fields: tuple[str, ...] = ()
    """What is wanted of each record beside its text; dots lead into fields of fields."""


class RawFormat(ABC):
    """How the records of a raw file are found."""

    suffixes: ClassVar[tuple[str, ...]]
    """Without those of compression."""
    compressible: ClassVar[bool] = True
    """Whether such a file may be compressed as a whole, and is given decompressed."""

    seekable: ClassVar[bool] = False
    """Whether a plain file can be read from where a record begins, `Found.offset`."""

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
            DataError: the file is truncated or corrupt.
        """


def format_of(url: str, named: str | None = None) -> RawFormat:
    """The format of a file.

    Args:
        named: a suffix that stands for the name's own, such as `.jsonl`.

    Raises:
        ConfigError: none has its suffix.
    """
    known = {suffix: entry for _, entry in RAW_FORMATS for suffix in entry.suffixes}
    name = (f".{named.lstrip('.')}" if named else url).lower()
    fitting = [suffix for suffix in known if name.endswith(suffix)]
    for compression in limits.COMPRESSIONS:
        inner = name.removesuffix(compression)
        if inner != name:
            fitting += [suffix for suffix in known if inner.endswith(suffix)] or [_USUAL]
    if not fitting:
        readable = f"{', '.join(known)}, each also with {', '.join(limits.COMPRESSIONS)}"
        if named:
            raise ConfigError(f"there is no format {named!r} of raw files; there are: {readable}")
        raise ConfigError(
            f"{public(url)} has no suffix that can be read; those that can: {readable}. If its name is just unusual, "
            "say the suffix that it should have: the source's `format`, or --format"
        )
    return known[max(fitting, key=len)]()
