"""Bytes of a raw file, decompressed block by block in bounded memory; a file that is not whole is an error.

Decompressors are driven stream by stream, because readers of whole files end silently at a cut. What one call gives is
bounded: a few bytes may stand for gigabytes.
"""

import bz2
import contextlib
import lzma
import resource
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from backports import zstd

from openlm_pipeline.errors import DataError

BLOCK_BYTES = 1 << 17
"""Bytes of a raw file read at once; every cut between parts of a file is a multiple."""
MAX_RECORD_BYTES = 256 << 20
"""A longer record of JSON is bad."""
_MAX_OUTPUT_BYTES = 1 << 20
_USUAL_ZSTD_WINDOW_LOG, _MAX_ZSTD_WINDOW_LOG = 27, 31
"""128 MiB, as of the `zstd` command; `--long=31`."""
_ZSTD_HEADER_BYTES, _MOST_TIMES = 18, 1000
_MAX_XZ_BYTES = 1 << 28
_HEAD_BYTES = 64
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
COMPRESSIONS = {".zst": "zstd", ".zstd": "zstd", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
"""Suffix -> compression."""
_MAGIC = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}


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


class _GzipMember:
    """zlib's decompressor as a `_Decompressor`."""

    def __init__(self) -> None:
        self._member, self.needs_input = zlib.decompressobj(wbits=31), True

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        found = self._member.decompress(self._member.unconsumed_tail + data, max_length)
        self.eof, self.unused_data = self._member.eof, self._member.unused_data
        # Output may wait inside zlib although its input is used up.
        self.needs_input = not self._member.unconsumed_tail and len(found) < max_length
        return found


def _zstd_frame(window_log: int) -> _Decompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window_log})


class _ZstdFrame:
    """zstd's decompressor as a `_Decompressor` whose memory goes with what it reads: of a frame that asks for a large
    window, all that it gives may stay in memory."""

    def __init__(self) -> None:
        self._frame, self._head, self._is_wide = _zstd_frame(_USUAL_ZSTD_WINDOW_LOG), b"", False
        self._read = self._given = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._frame, name)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        try:
            found = self._frame.decompress(data, max_length)
        except zstd.ZstdError:
            if self._is_wide or self._given or len(self._head) >= _ZSTD_HEADER_BYTES:
                raise
            self._frame, self._is_wide = _zstd_frame(_MAX_ZSTD_WINDOW_LOG), True
            found = self._frame.decompress(self._head + data, max_length)
        self._head += data[:_ZSTD_HEADER_BYTES]
        self._read, self._given = self._read + len(data), self._given + len(found)
        if self._is_wide and self._given > (1 << _USUAL_ZSTD_WINDOW_LOG) + _MOST_TIMES * self._read:
            raise zstd.ZstdError(
                f"its large window is filled with {_MOST_TIMES:,} times the bytes that are read for it"
            )
        return found


_STREAMS: dict[str, tuple[str, Callable[[], _Decompressor], type[Exception]]] = {
    "zstd": ("zstd frame", _ZstdFrame, zstd.ZstdError),
    "gzip": ("gzip member", _GzipMember, zlib.error),
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
                rest = rest.lstrip(b"\0") if kind in ("xz", "gzip") else rest  # padding between streams
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
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return None
    return next((kind for suffix, kind in COMPRESSIONS.items() if url.lower().endswith(suffix)), None)


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
    return _streams(raw(), url, compression)


@contextlib.contextmanager
def memory_bound(more: int) -> Iterator[None]:
    """At most `more` bytes of memory beyond what this process has, all its threads together; past it a MemoryError.

    Where the system has no such limit (Linux has), nothing is bounded.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        yield
        return
    used = int(status.partition("VmData:")[2].split()[0]) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (soft, hard, used + more) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
