"""Bytes of a raw file, decompressed block by block in bounded memory; a file that is not whole is an error.

Decompressors are driven stream by stream, because readers of whole files end silently at a cut. What one call gives is
bounded: a few bytes may stand for gigabytes.
"""

import bz2
import contextlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from backports import zstd

from openlm_pipeline.errors import DataError
from openlm_pipeline.storage.remote import open_remote

BLOCK_BYTES = 1 << 17
"""Bytes of a raw file read at once; every cut between parts of a file is a multiple."""
MAX_RECORD_BYTES = 256 << 20
"""A longer record of JSON is bad."""
_MAX_OUTPUT_BYTES = 1 << 20
_MAX_ZSTD_WINDOW_LOG = 31
_MAX_XZ_BYTES = 1 << 28
_HEAD_BYTES = 64
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
COMPRESSIONS = {".zst": "zstd", ".zstd": "zstd", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
"""Suffix -> compression."""
_MAGIC = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}


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


def _plain(file: BinaryIO, url: str, begin: int) -> Iterator[ByteBlock]:
    position, size = begin, BLOCK_BYTES
    while True:
        try:
            block = file.read(size)
            while 0 < len(block) < size and (more := file.read(size - len(block))):  # some files give less than asked
                block += more
        except OSError as e:
            raise DataError(f"raw file {url} can't be read past byte {position}: {e}") from e
        if not block:
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


class _Decompressor(Protocol):
    """What those of the standard library and of `backports.zstd` have in common."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


def _zstd_frame() -> _Decompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MAX_ZSTD_WINDOW_LOG})


_STREAMS: dict[str, tuple[str, Callable[[], _Decompressor], type[Exception]]] = {
    "zstd": ("zstd frame", _zstd_frame, zstd.ZstdError),
    "bzip2": ("bzip2 stream", bz2.BZ2Decompressor, OSError),
    "xz": ("xz stream", lambda: lzma.LZMADecompressor(memlimit=_MAX_XZ_BYTES), lzma.LZMAError),
}
"""What a compressed file is a sequence of, what reads one, and how that fails."""


def _streams(raw: Iterator[ByteBlock], url: str, kind: str) -> Iterator[ByteBlock]:
    """The content of streams one after the other; what one call gives is bounded, whatever it comes from."""
    called, make, error = _STREAMS[kind]
    stream = None
    for position, block in raw:
        rest = block
        while True:
            if stream is None:
                rest = rest.lstrip(b"\0") if kind == "xz" else rest  # padding between streams
                if not rest:
                    break
                stream = make()
            try:
                data = stream.decompress(rest, _MAX_OUTPUT_BYTES)
            except error as e:
                raise _corrupt(url, position, e) from e
            if data:
                yield position, data
            rest = b""
            if stream.eof:
                rest, stream = stream.unused_data, None
            elif stream.needs_input:
                break
    if stream is not None:
        raise _truncated(url, position + len(block), called)


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


def compression_of(url: str) -> str | None:
    """The compression that a name says; None for a plain file."""
    lower = url.lower()
    return next((kind for suffix, kind in COMPRESSIONS.items() if lower.endswith(suffix)), None)


def actual_compression(file: BinaryIO, url: str) -> str | None:
    """The compression that a file has, whatever its name says; None for a plain one. Goes back to the file's start.

    Raises:
        DataError: it can't be read.
    """
    try:
        file.seek(0)
        head = file.read(_HEAD_BYTES)
        file.seek(0)
    except OSError as e:
        raise DataError(f"raw file {url} can't be read past byte 0: {e}") from e
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[1:4] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5:
        return "zstd"
    is_json = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    return None if is_json else compression_of(url)


def decompressed_blocks(
    file: BinaryIO,
    url: str,
    compression: str | None,
    begin: int = 0,
    on_raw: Callable[[bytes], object] = lambda block: None,
) -> Iterator[ByteBlock]:
    """The file's content in blocks of at most about 1 MiB.

    Several zstd frames, gzip members or other streams after one another are one content.

    Args:
        compression: as `actual_compression` found it.
        begin: byte at which reading begins, only where nothing is compressed.
        on_raw: gets the raw file's bytes as they are read.

    Raises:
        DataError: truncated, corrupt or unreadable; names the file and the compressed byte. What a compressed file
            holds, and a plain one, may be empty.
    """

    def raw() -> Iterator[ByteBlock]:
        position = -1
        for position, block in _plain(file, url, begin):
            on_raw(block)
            yield position, block
        if compression and position < 0:
            raise empty(url)

    if compression is None:
        file.seek(begin)
        return raw()
    return _gzip(raw(), url) if compression == "gzip" else _streams(raw(), url, compression)
