"""Bytes of a raw file, decompressed block by block in bounded memory; a file that is not whole is an error.

The decompressors are driven frame by frame because the convenience readers of `zstandard` end silently at a cut.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import zstandard

from openlm_pipeline.errors import DataError
from openlm_pipeline.storage.remote import open_remote

BLOCK_BYTES = 1 << 17
"""Bytes of a raw file read at once; every cut between parts of a file is a multiple."""
MAX_RECORD_BYTES = 256 << 20
"""A longer record of JSON is bad."""
_MAX_OUTPUT_BYTES = 1 << 20
# A zstd block of 128 KiB can come from 4 bytes, so small inputs bound what one call may return.
_ZSTD_BLOCK = 1 << 15
_MAX_ZSTD_WINDOW = 1 << 31


@contextlib.contextmanager
def open_raw(url: str) -> Iterator[BinaryIO]:
    """Open a local path or fsspec URL for reading bytes; a remote file's end is never taken for earlier than it is.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: no installed library speaks the URL's protocol.
        DataError: the file can't be read.
    """
    with open_remote(url, "raw file") as file:
        yield file


def empty(url: str) -> DataError:
    """The error for a file of no bytes."""
    return DataError(f"raw file {url} is empty (0 bytes). Fetch it again, or remove it from the source.")


ByteBlock = tuple[int, bytes]
"""Position among the raw file's bytes, and content that comes from what is there."""


def _plain(file: BinaryIO, url: str, size: int, begin: int = 0) -> Iterator[ByteBlock]:
    position = begin
    while True:
        try:
            block = file.read(size)
            while 0 < len(block) < size and (more := file.read(size - len(block))):  # some files give less than asked
                block += more
        except OSError as e:
            raise DataError(f"raw file {url} can't be read past byte {position}: {e}") from e
        if not block:
            if not position:
                raise empty(url)
            return
        yield position, block
        position += len(block)


def _truncated(url: str, position: int, kind: str) -> DataError:
    return DataError(
        f"raw file {url} is truncated: it ends inside a {kind} at compressed byte {position}. Fetch it again; "
        "nothing made from its beginning is kept."
    )


def _corrupt(url: str, position: int, error: Exception) -> DataError:
    return DataError(f"raw file {url} is corrupt near compressed byte {position}: {error}. Fetch it again.")


def _zstd(raw: Iterator[ByteBlock], url: str) -> Iterator[ByteBlock]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
    frame = None
    for position, block in raw:
        rest = block
        while rest:
            frame = frame or decompressor.decompressobj()
            try:
                data = frame.decompress(rest)
            except zstandard.ZstdError as e:
                raise _corrupt(url, position, e) from e
            if data:
                yield position, data
            rest = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise _truncated(url, position + len(block), "zstd frame")


def _gzip(raw: Iterator[ByteBlock], url: str) -> Iterator[ByteBlock]:
    member = None
    for position, block in raw:
        rest = block
        while rest:
            # Some writers pad with zeros between and after members.
            if member is None and not (rest := rest.lstrip(b"\0")):
                break
            member = member or zlib.decompressobj(wbits=31)
            try:
                data = member.decompress(rest, _MAX_OUTPUT_BYTES)
                if data:
                    yield position, data
                rest = member.unused_data if member.eof else member.unconsumed_tail
                # Output may wait inside zlib although its input is used up.
                while not member.eof and not rest and (data := member.decompress(b"", _MAX_OUTPUT_BYTES)):
                    yield position, data
                    rest = member.unconsumed_tail
            except zlib.error as e:
                raise _corrupt(url, position, e) from e
            if member.eof:
                rest = member.unused_data
                member = None
    if member is not None:
        raise _truncated(url, position + len(block), "gzip member")


def is_compressed(url: str) -> bool:
    return url.endswith((".zst", ".gz"))


def decompressed_blocks(
    file: BinaryIO, url: str, begin: int = 0, on_raw: Callable[[bytes], object] = lambda block: None
) -> Iterator[ByteBlock]:
    """The file's content in blocks of about 1 MiB, decompressed as the name's suffix says (`.zst`, `.gz`, else plain).

    Several zstd frames or gzip members after one another are one content.

    Args:
        begin: byte at which reading begins, only where nothing is compressed.
        on_raw: gets the raw file's bytes as they are read.

    Raises:
        DataError: empty, truncated, corrupt or unreadable; names the file and the compressed byte.
    """

    def raw(size: int) -> Iterator[ByteBlock]:
        for position, block in _plain(file, url, size, begin):
            on_raw(block)
            yield position, block

    if url.endswith(".zst"):
        return _zstd(raw(_ZSTD_BLOCK), url)
    if url.endswith(".gz"):
        return _gzip(raw(BLOCK_BYTES), url)
    file.seek(begin)
    return raw(BLOCK_BYTES)
