"""Bytes of a raw file, decompressed block by block in bounded memory; a file that is not whole is an error.

The decompressors are driven frame by frame because the convenience readers of `zstandard` end silently at a cut.
"""

import contextlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
import zstandard

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError

_PLAIN_BLOCK = 1 << 20
# A zstd block of 128 KiB can come from 4 bytes, so small inputs bound what one call may return.
_ZSTD_BLOCK = 1 << 15
_MAX_ZSTD_WINDOW = 1 << 31


@contextlib.contextmanager
def open_raw(url: str) -> Iterator[BinaryIO]:
    """Open a local path or fsspec URL for reading bytes.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: no installed library speaks the URL's protocol.
        DataError: the file can't be read.
    """
    try:
        file = fsspec.open(url, "rb").open()
    except FileNotFoundError:
        raise MissingInputError(f"raw file {url} does not exist") from None
    except (ImportError, ValueError) as e:
        raise ConfigError(f"raw file {url} can't be opened: {e}") from e
    except OSError as e:
        raise DataError(f"raw file {url} can't be read: {e}") from e
    with file:
        yield file


def empty(url: str) -> DataError:
    """The error for a file of no bytes."""
    return DataError(f"raw file {url} is empty (0 bytes). Fetch it again, or remove it from the source.")


def _plain(file: BinaryIO, url: str, size: int) -> Iterator[bytes]:
    position = 0
    while True:
        try:
            block = file.read(size)
        except OSError as e:
            raise DataError(f"raw file {url} can't be read past byte {position}: {e}") from e
        if not block:
            if not position:
                raise empty(url)
            return
        position += len(block)
        yield block


def _truncated(url: str, position: int, kind: str) -> DataError:
    return DataError(
        f"raw file {url} is truncated: it ends inside a {kind} at compressed byte {position}. Fetch it again; "
        "nothing made from its beginning is kept."
    )


def _corrupt(url: str, position: int, error: Exception) -> DataError:
    return DataError(f"raw file {url} is corrupt near compressed byte {position}: {error}. Fetch it again.")


def _zstd(file: BinaryIO, url: str) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
    frame = None
    position = 0
    for block in _plain(file, url, _ZSTD_BLOCK):
        rest = block
        while rest:
            frame = frame or decompressor.decompressobj()
            try:
                data = frame.decompress(rest)
            except zstandard.ZstdError as e:
                raise _corrupt(url, position, e) from e
            if data:
                yield data
            rest = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
        position += len(block)
    if frame is not None:
        raise _truncated(url, position, "zstd frame")


def _gzip(file: BinaryIO, url: str) -> Iterator[bytes]:
    member = None
    position = 0
    for block in _plain(file, url, _PLAIN_BLOCK):
        rest = block
        while rest:
            # Some writers pad with zeros between and after members.
            if member is None and not (rest := rest.lstrip(b"\0")):
                break
            member = member or zlib.decompressobj(wbits=31)
            try:
                data = member.decompress(rest, _PLAIN_BLOCK)
                if data:
                    yield data
                rest = member.unused_data if member.eof else member.unconsumed_tail
                # Output may wait inside zlib although its input is used up.
                while not member.eof and not rest and (data := member.decompress(b"", _PLAIN_BLOCK)):
                    yield data
                    rest = member.unconsumed_tail
            except zlib.error as e:
                raise _corrupt(url, position, e) from e
            if member.eof:
                rest = member.unused_data
                member = None
        position += len(block)
    if member is not None:
        raise _truncated(url, position, "gzip member")


def decompressed_blocks(file: BinaryIO, url: str) -> Iterator[bytes]:
    """The file's content in blocks of about 1 MiB, decompressed as the name's suffix says (`.zst`, `.gz`, else plain).

    Several zstd frames or gzip members after one another are one content.

    Raises:
        DataError: empty, truncated, corrupt or unreadable; names the file and the compressed byte.
    """
    if url.endswith(".zst"):
        return _zstd(file, url)
    if url.endswith(".gz"):
        return _gzip(file, url)
    return _plain(file, url, _PLAIN_BLOCK)
