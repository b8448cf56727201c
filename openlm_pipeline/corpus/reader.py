"""Records of a raw file, streamed; what is wrong with a record is named, what is wrong with a file ends the reading.

Formats go by suffix: JSON lines (`.jsonl`, `.jsonl.zst`, `.zst`, `.jsonl.gz`, `.gz`), `.json` (JSON lines or one
array; may be compressed too) and `.parquet`. Every non-blank line, array element or row is either a `Record` or a
`BadRecord`; each takes one record number, so that numbers name records for ever.

A file of lines or rows can be read in parts, by as many readers as there are parts. A record belongs to the part in
which it begins, and to no other, wherever the cuts are.
"""

import hashlib
import io
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import orjson

from openlm_pipeline.corpus.blocks import BLOCK_BYTES, decompressed_blocks, empty, is_compressed, open_raw
from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.storage.files import atomic_writer

FORMATS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json", ".json.zst", ".json.gz", ".zst", ".gz", ".parquet")
MAX_RECORD_BYTES = 256 << 20
_BAD_BEFORE_EARLY_STOP = 1000
_ROWS_PER_BATCH = 1024
_BOM = b"\xef\xbb\xbf"
# A whole string, a string that the buffer cuts, or a character that nests or separates.
_JSON_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A stretch of a raw file's own bytes (compressed ones, where it is); its records are those that begin there."""

    begin: int = 0
    end: int | None = None
    """None: to the end of the file."""


WHOLE = Part()


def cut(url: str, size_bytes: int, count: int) -> list[Part]:
    """At most `count` parts of about the same size, in order; one where the format can't be read in parts."""
    if url.removesuffix(".zst").removesuffix(".gz").endswith(".json"):
        return [WHOLE]  # it may be one array
    blocks = max(1, size_bytes // BLOCK_BYTES)
    count = max(1, min(count, blocks))
    cuts = [i * blocks // count * BLOCK_BYTES for i in range(count)]
    return [Part(begin, end) for begin, end in zip(cuts, [*cuts[1:], None])]


@dataclass(frozen=True)
class Record:
    """One document of a raw file."""

    number: int
    """Place in the part that is read, from 0; bad records count, blank lines don't."""
    text: str
    offset: int
    """Byte at which the record begins in the file's decompressed content; in Parquet the row, from 0."""


@dataclass(frozen=True)
class BadRecord:
    """A record that can't be used, and why."""

    file: str
    line: int
    """From 1, counted in the part that is read; in Parquet the row."""
    offset: int
    """As in `Record`."""
    reason: str


@dataclass(frozen=True)
class _Raw:
    """Bytes that should be a JSON record; None stands for more than `MAX_RECORD_BYTES`."""

    line: int
    offset: int
    data: bytes | None


class _Bad(Exception):
    """Why a record is bad."""


def check_format(url: str) -> None:
    """Raises:
    ConfigError: no reader for this suffix.
    """
    if not url.endswith(FORMATS):
        raise ConfigError(f"{url} has no suffix that can be read; those that can: {', '.join(FORMATS)}")


def _text_of(data: bytes | None, text_key: str) -> str:
    """The text of a JSON record; raises `_Bad`."""
    if data is None:
        raise _Bad(f"longer than {MAX_RECORD_BYTES >> 20} MiB")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as e:
        try:
            data.decode()
        except UnicodeDecodeError as u:
            raise _Bad(f"invalid UTF-8 at byte {u.start} of the record") from None
        raise _Bad(f"not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise _Bad(f"not a JSON object but a {_JSON_NAMES[type(value)]}")
    if text_key not in value:
        raise _Bad(f"no field {text_key!r}")
    text = value[text_key]
    if not isinstance(text, str):
        raise _Bad(f"field {text_key!r} is a {_JSON_NAMES[type(text)]}, not a string")
    return text


_JSON_NAMES = {
    dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null",
}  # fmt: skip


def _lines(blocks: Iterator[bytes], first_offset: int, past_end: Callable[[int], bool]) -> Iterator[_Raw]:
    """Lines up to the first that begins where `past_end` says so; it is asked when the block of the line was read."""
    line, offset = 1, first_offset
    parts: list[bytes] = []
    size = 0

    def joined(last: bytes) -> bytes | None:
        return None if size + len(last) > MAX_RECORD_BYTES else b"".join([*parts, last])

    for block in blocks:
        *ended, rest = block.split(b"\n")
        for piece in ended:
            if past_end(offset):
                return
            yield _Raw(line, offset, joined(piece))
            line, offset = line + 1, offset + size + len(piece) + 1
            parts, size = [], 0
        if past_end(offset):
            return
        size += len(rest)
        if size <= MAX_RECORD_BYTES:
            parts.append(rest)
        else:
            parts = []
    if size:
        yield _Raw(line, offset, joined(b""))


def _elements(blocks: Iterator[bytes], url: str) -> Iterator[_Raw]:
    """Elements of a top-level JSON array, found by its brackets and strings; each is parsed on its own later."""
    buffer, base, line = b"", 0, 1  # `base` is the offset of the buffer's first byte, `line` its line
    scan = start = depth = 0
    closed = False

    def element(end: int) -> _Raw | None:
        data = buffer[start:end]
        begin = start + len(data) - len(data.lstrip())
        stripped = data.strip()
        if len(stripped) > MAX_RECORD_BYTES:
            raise DataError(
                f"raw file {url} has an element of over {MAX_RECORD_BYTES >> 20} MiB at byte {base + begin}"
            )
        return _Raw(line + buffer.count(b"\n", 0, begin), base + begin, stripped) if stripped else None

    while block := next(blocks, b""):
        # Grow a buffer that ends inside a long string by as much as it holds, so that rescanning stays linear.
        grown = [block]
        wanted = len(buffer)
        while wanted > sum(map(len, grown)) and (block := next(blocks, b"")):
            grown.append(block)
        buffer = b"".join([buffer, *grown])
        while match := _JSON_TOKEN.search(buffer, scan):
            token = match[0]
            if token == b'"':
                break
            scan = match.end()
            if closed:
                raise DataError(f"raw file {url} goes on after its top-level array, at byte {base + match.start()}")
            if token in (b"[", b"{"):
                depth += 1
                if depth == 1:
                    start = scan
            elif token in (b"]", b"}") or (token == b"," and depth == 1):
                depth -= token != b","
                if depth == 0 or token == b",":
                    if found := element(match.start()):
                        yield found
                    start = scan
                    closed = depth == 0
        else:
            scan = len(buffer)
        line, base = line + buffer.count(b"\n", 0, start), base + start
        buffer, scan, start = buffer[start:], scan - start, 0
        if len(buffer) > MAX_RECORD_BYTES:
            raise DataError(f"raw file {url} has an element of over {MAX_RECORD_BYTES >> 20} MiB at byte {base}")
    if not closed:
        raise DataError(
            f"raw file {url} is truncated: its top-level array does not end; the last whole element ends at "
            f"decompressed byte {base}. Fetch it again."
        )
    if buffer.strip():
        raise DataError(f"raw file {url} goes on after its top-level array, at byte {base}")


def _parquet_rows(file: BinaryIO, url: str, text_key: str, part: Part) -> Iterator[tuple[int, bytes | None]]:
    """Row numbers in the file and texts; a row group belongs to the part in which its share of the rows begins."""
    import pyarrow as pa  # slow to import, and most raw files are no Parquet
    import pyarrow.parquet as pq

    try:
        if not (file_bytes := file.seek(0, io.SEEK_END)):
            raise empty(url)
        file.seek(0)
        table = pq.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            raise DataError(
                f"raw file {url} has no column {text_key!r} but {', '.join(table.schema_arrow.names)}; "
                "set the source's text_key"
            )
        kind = table.schema_arrow.field(text_key).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not any(f(kind) for f in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
                                     pa.types.is_binary, pa.types.is_large_binary)):  # fmt: skip
            raise DataError(f"column {text_key!r} of raw file {url} is {kind}, not a string; set the source's text_key")
        row = rows_before = 0
        for group in range(table.num_row_groups):
            about = table.metadata.row_group(group)
            # By rows, as `RowGroupMetaData.column` with its sizes aborts the process on some corrupt files.
            begins_at = rows_before * file_bytes // max(1, table.metadata.num_rows)
            rows_before += max(0, about.num_rows)
            if begins_at < part.begin or (part.end is not None and begins_at >= part.end):
                row += about.num_rows
                continue
            for batch in table.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=[text_key]):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # As bytes: invalid UTF-8 in one row must not hide the others.
                for value in column.cast(pa.large_binary()).to_pylist():
                    yield row, value
                    row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:  # names of columns may be no UTF-8
        raise DataError(f"raw file {url} is not a whole Parquet file: {e}. Fetch it again.") from e


class RecordReader(Iterator[Record]):
    """The records of a local path or fsspec URL, or of a part of it, streamed in order; each bad one goes to `on_bad`.

    After the last one the attributes describe all that was read.

    Raises:
        ConfigError: the suffix or the URL's protocol can't be read.
        MissingInputError: there is no such file.
        DataError: empty, truncated or corrupt, or more than `max_bad_fraction` of all records are bad (seen at the
            end, or as soon as over 1000 and most are bad). What was read before an error is not the whole file.
    """

    def __init__(
        self,
        url: str,
        *,
        text_key: str = "text",
        max_bad_fraction: float = 0.001,
        on_bad: Callable[[BadRecord], None],
        part: Part = WHOLE,
    ) -> None:
        check_format(url)
        self.url = url
        self.records = 0
        """Good records so far."""
        self.bad = 0
        """Bad records so far."""
        self.lines = 0
        """Lines so far, blank ones too; in Parquet rows, in an array elements."""
        self.bytes = 0
        """Decompressed bytes of the part so far; in Parquet the bytes of the texts."""
        self.raw_bytes = 0
        """The file's own bytes read so far, those before the part left out."""
        self.first_bad: BadRecord | None = None
        self._text_key = text_key
        self._max_bad_fraction = max_bad_fraction
        self._on_bad = on_bad
        self._part = part
        self._digest = hashlib.sha256()
        self._at_end = False
        self._iterator = self._read()

    def __next__(self) -> Record:
        return next(self._iterator)

    def close(self) -> None:
        """Close the file before its end is reached."""
        self._iterator.close()

    @property
    def raw_sha256(self) -> str | None:
        """Hash of the file's own bytes, if all of them were read."""
        all_read = self._at_end and (self._part.begin == 0 or is_compressed(self.url))
        return self._digest.hexdigest() if all_read and not self.url.endswith(".parquet") else None

    def _read(self) -> Generator[Record, None, None]:
        with open_raw(self.url) as file:
            yield from self._parquet(file) if self.url.endswith(".parquet") else self._json(file)
        if self._part == WHOLE:
            check_bad_fraction(self.url, self.records, self.bad, self._max_bad_fraction, self.first_bad)

    def _json(self, file: BinaryIO) -> Iterator[Record]:
        for raw in self._raw_records(file):
            self.lines += 1
            if raw.data is not None and not raw.data.strip():
                continue
            try:
                text = _text_of(raw.data, self._text_key)
            except _Bad as e:
                self._reject(raw.line, raw.offset, str(e))
            else:
                yield self._accept(text, raw.offset)

    def _raw_records(self, file: BinaryIO) -> Iterator[_Raw]:
        """What should be JSON records, of this part alone."""
        part, url = self._part, self.url
        # A plain file is read from the byte before the part, which says whether a line begins with the part.
        plain_begin = None if is_compressed(url) else max(0, part.begin - 1)
        blocks = decompressed_blocks(file, url, plain_begin or 0, self._digest.update)
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
            if not offset and not plain_begin:
                raise DataError(f"raw file {url} is empty: it decompresses to nothing. Fetch it again.")
            self._at_end = True
            return
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
                self.bytes = (reached if end is None else min(reached, end)) - first
                self.raw_bytes = position - part.begin
                yield block
            self._at_end = True

        rest = content()
        if last != b"\n":  # the part begins inside a line, which belongs to the part before
            for block in rest:
                before, newline, after = block.partition(b"\n")
                offset += len(before) + len(newline)
                if newline:
                    rest = chain([after], rest)
                    break
            else:
                return
        elif offset == 0:  # a compressed file's first bytes of content may come from a later part
            head = b""
            while not head.strip(b"\xef\xbb\xbf \t\r\n") and (block := next(rest, b"")):
                head += block
            if head.startswith(_BOM):
                head = b"   " + head[3:]  # keeps offsets
            rest = chain([head], rest)
            if url.removesuffix(".zst").removesuffix(".gz").endswith(".json") and head.lstrip()[:1] == b"[":
                yield from _elements(rest, url)
                return
        yield from _lines(rest, offset, lambda at: end is not None and at >= end)

    def _parquet(self, file: BinaryIO) -> Iterator[Record]:
        for row, value in _parquet_rows(file, self.url, self._text_key, self._part):
            self.lines += 1
            if value is None:
                self._reject(self.lines, row, f"field {self._text_key!r} is a null, not a string")
                continue
            self.bytes += len(value)
            self.raw_bytes = max(0, file.tell() - self._part.begin)
            try:
                text = value.decode()
            except UnicodeDecodeError as e:
                self._reject(self.lines, row, f"invalid UTF-8 at byte {e.start} of the record")
            else:
                yield self._accept(text, row)

    def _accept(self, text: str, offset: int) -> Record:
        self.records += 1
        return Record(self.records + self.bad - 1, text, offset)

    def _reject(self, line: int, offset: int, reason: str) -> None:
        bad = BadRecord(self.url, line, offset, reason)
        self.bad += 1
        self.first_bad = self.first_bad or bad
        self._on_bad(bad)
        if self.bad > _BAD_BEFORE_EARLY_STOP and self.bad > self.records:
            check_bad_fraction(self.url, self.records, self.bad, self._max_bad_fraction, self.first_bad)


def check_bad_fraction(url: str, records: int, bad: int, max_bad_fraction: float, first_bad: BadRecord | None) -> None:
    """Raises:
    DataError: more than `max_bad_fraction` of all records are bad.
    """
    total = records + bad
    if first_bad and bad > max_bad_fraction * total:
        raise DataError(
            f"raw file {url}: {bad} of {total} records are bad ({bad / total:.2%}, more than "
            f"max_bad_fraction {max_bad_fraction:.2%}). The first is line {first_bad.line}: "
            f"{first_bad.reason}. Repair the file, or raise max_bad_fraction of its source."
        )


class QuarantineWriter:
    """A JSON-lines file of bad records, for use in a `with` and as `on_bad`; it appears only when the `with` succeeds.

    Lines are `{"file", "line", "offset", "reason"}`. With no bad records the file is there and empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._stack = ExitStack()

    def __enter__(self) -> "QuarantineWriter":
        self._file = self._stack.enter_context(atomic_writer(self.path, shared=True))
        return self

    def __call__(self, bad: BadRecord) -> None:
        self._file.write(orjson.dumps(asdict(bad)) + b"\n")
        self.count += 1

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)
