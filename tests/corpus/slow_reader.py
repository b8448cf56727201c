"""A slow reader of raw files, to compare the real one with: other decompressors, one byte at a time, `json`."""

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

MAX_RECORD_BYTES = 4000
"""The limit that both readers get, low so that small inputs pass it."""
MAX_DEPTH = 1024
BOM = b"\xef\xbb\xbf"


@dataclass
class Reading:
    """What came out of a file: (record number, text, offset) and (line, offset)."""

    good: list[tuple[int, str, int]] = field(default_factory=list)
    bad: list[tuple[int, int]] = field(default_factory=list)


class FileFails(Exception):
    """The file as a whole can't be read."""


def expand(name: str, data: bytes) -> bytes:
    if not data and name.endswith((".zst", ".gz")):
        raise FileFails("empty")
    try:
        if name.endswith(".zst"):
            data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
        elif name.endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as e:
        raise FileFails(str(e)) from e
    return data


def depth_of(data: bytes) -> int:
    depth = deepest = 0
    for byte in outside_strings(data):
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    return deepest


def outside_strings(data: bytes) -> Iterator[int]:
    """Each byte that is not in a string; others come as a space."""
    in_string = escaped = False
    for byte in data:
        yield b" "[0] if in_string else byte
        if in_string:
            in_string = escaped or byte != b'"'[0]
            escaped = byte == b"\\"[0] and not escaped
        else:
            in_string = byte == b'"'[0]


def finite(value: str) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


def slow_text(data: bytes, is_cut: bool = False) -> str | None:
    """The text of a record, or None where it is bad.

    Args:
        is_cut: no line break follows, so that what is no JSON is half a record.
    """
    if len(data) > MAX_RECORD_BYTES or depth_of(data) > MAX_DEPTH:
        if is_cut:
            raise FileFails("ends inside a line")
        return None
    try:
        value = json.loads(data.decode(), parse_float=finite, parse_int=finite, parse_constant=lambda name: None)
        json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except ValueError:
        if is_cut:
            raise FileFails("ends inside a line") from None
        return None
    text = value.get("text") if isinstance(value, dict) else None
    return text if isinstance(text, str) else None


def slow_elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    depth = start = 0
    for at, byte in enumerate(outside_strings(content)):
        if byte in b"[{":
            depth += 1
            start = at + 1 if depth == 1 else start
        elif byte in b"]}" or (byte in b"," and depth == 1):
            depth -= byte in b"]}"
            if depth == 0 or byte in b",":
                piece = content[start:at]
                if len(piece.strip()) > MAX_RECORD_BYTES:
                    raise FileFails("too long an element")
                yield start + len(piece) - len(piece.lstrip()), piece.strip()
                start = at + 1
            if depth == 0:
                if content[start:].strip():
                    raise FileFails("continues")
                return
    raise FileFails("does not end")


def slow_records(name: str, content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(line, offset, bytes) of what should be records."""
    if content.startswith(BOM):
        content = b"   " + content[3:]
    if ".json" in name and ".jsonl" not in name and content.lstrip()[:1] == b"[":
        for offset, piece in slow_elements(content):
            if piece:
                yield content[:offset].count(b"\n") + 1, offset, piece
        return
    offset = 0
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip() or len(line) > MAX_RECORD_BYTES:
            yield number, offset, line
        offset += len(line) + 1


def slow_reading(name: str, data: bytes) -> Reading:
    out = Reading()
    if name.endswith(".parquet"):
        if not data:
            raise FileFails("empty")
        try:
            rows = pq.read_table(io.BytesIO(data), columns=["text"]).column("text").cast(pa.large_binary()).to_pylist()
        except (pa.ArrowException, OSError, KeyError, ValueError) as e:
            raise FileFails(str(e)) from e
        found = [(n + 1, n, row) for n, row in enumerate(rows)]
    else:
        found = list(slow_records(name, expand(name, data)))
    for number, (line, offset, piece) in enumerate(found):
        if name.endswith(".parquet"):
            try:
                text = None if piece is None else piece.decode()
            except UnicodeDecodeError:
                text = None
        else:
            text = slow_text(piece, piece is found[-1][2] and ends_in_a_line(name, data))
        if text is None:
            out.bad.append((line, offset))
        else:
            out.good.append((number, text, offset))
    return out


def ends_in_a_line(name: str, data: bytes) -> bool:
    """Whether a file of lines ends without a line break."""
    content = expand(name, data)
    of_lines = ".jsonl" in name or content.removeprefix(BOM).lstrip()[:1] != b"["
    return of_lines and not content.endswith(b"\n")
