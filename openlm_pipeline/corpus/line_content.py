"""The content of a part of a file of lines: from the first line that begins in the part to the last."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

from openlm_pipeline.corpus import blocks as limits
from openlm_pipeline.corpus.blocks import decompressed_blocks
from openlm_pipeline.corpus.formats import Reading

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Raw:
    """Bytes of a line or element; None stands for more than `MAX_RECORD_BYTES`."""

    line: int
    offset: int
    data: bytes | None
    size: int
    """Bytes of it."""
    ended: bool = True
    """Whether a line break follows, or whatever ends such a record."""


@dataclass(frozen=True)
class LineContent:
    """Where the part's first line begins, and what stands from there on."""

    offset: int
    """Where the first byte is, in the file's decompressed content."""
    head: bytes
    """At a file's beginning: its first bytes, up to one that is not white space or the byte order mark."""
    blocks: Iterator[bytes]
    """All of it, `head` included."""
    past_end: Callable[[int], bool]
    """Whether a line that begins at an offset belongs to a later part; asked when the block of the line was read."""


def line_content(file: BinaryIO, reading: Reading) -> LineContent | None:
    """The content of `reading.part`; None where no line begins in it.

    Raises:
        DataError: the file is truncated or corrupt.
    """
    part, url = reading.part, reading.url
    # A plain file is read from the byte before the part, which says whether a line begins with the part.
    plain_begin = None if reading.compression else max(0, part.begin - 1)
    blocks = decompressed_blocks(file, url, reading.compression, plain_begin or 0, reading.digest)
    offset, last, pending = 0, b"\n", b""
    for position, block in blocks:
        if plain_begin is not None:
            offset, last, pending = (
                part.begin,
                block[: part.begin - position] or last,
                block[part.begin - position :],
            )
            break
        if position >= part.begin:
            pending = block
            break
        last, offset = block[-1:], offset + len(block)
    else:
        reading.at_end = True
        return None
    first, own = offset, (position, pending)
    # The content's byte at which the part ends: of a compressed file it is known once it is reached.
    end = None if plain_begin is None else part.end

    def content() -> Iterator[bytes]:
        nonlocal end
        reached = first
        for position, block in chain([own], blocks):
            if end is None and part.end is not None and position >= part.end:
                end = reached
            reached += len(block)
            reading.bytes = (reached if end is None else min(reached, end)) - first
            reading.raw_bytes = position - part.begin
            yield block
        reading.at_end = True

    rest = content()
    if last != b"\n":  # the part begins inside a line, which belongs to the part before
        for block in rest:
            before, newline, after = block.partition(b"\n")
            offset += len(before) + len(newline)
            if newline:
                rest = chain([after], rest)
                break
        else:
            return None
    head = b""
    if last == b"\n" and offset == 0:  # a compressed file's first bytes of content may come from a later part
        while not head.strip(b"\xef\xbb\xbf \t\r\n") and (block := next(rest, b"")):
            head += block
        if head.startswith(_BOM):
            head = b"   " + head[3:]  # keeps offsets
        rest = chain([head], rest)
    return LineContent(offset, head, rest, lambda at: end is not None and at >= end)


def lines_of(blocks: Iterator[bytes], first_offset: int, past_end: Callable[[int], bool]) -> Iterator[Raw]:
    """Lines up to the first that begins where `past_end` says so; it is asked when the block of the line was read."""
    line, offset = 1, first_offset
    parts: list[bytes] = []
    size = 0

    def whole(last: bytes, ended: bool = True) -> Raw:
        length = size + len(last)
        return Raw(line, offset, None if length > limits.MAX_RECORD_BYTES else b"".join([*parts, last]), length, ended)

    for block in blocks:
        *ended, rest = block.split(b"\n")
        for piece in ended:
            if past_end(offset):
                return
            yield whole(piece)
            line, offset = line + 1, offset + size + len(piece) + 1
            parts, size = [], 0
        if past_end(offset):
            return
        size += len(rest)
        if size <= limits.MAX_RECORD_BYTES:
            parts.append(rest)
        else:
            parts = []
    if size:
        yield whole(b"", ended=False)
