"""Records of a raw file, streamed; what is wrong with a record is named, what is wrong with a file ends the reading.

Formats go by suffix, see `corpus/formats`. Every non-blank line, array element or row is either a `Record` or a
`BadRecord`; each takes one record number, so that numbers name records for ever.

A file of lines or rows can be read in parts, by as many readers as there are parts. A record belongs to the part in
which it begins, and to no other, wherever the cuts are.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from openlm_pipeline.corpus.blocks import actual_compression
from openlm_pipeline.corpus.formats import WHOLE, Found, Part, Reading, format_of
from openlm_pipeline.errors import DataError
from openlm_pipeline.storage.files import atomic_writer
from openlm_pipeline.storage.remote import open_remote

_BAD_BEFORE_EARLY_STOP = 1000
_BYTES_PER_RECORD_SHARE = 10


@dataclass(frozen=True)
class Record:
    """One document of a raw file."""

    number: int
    """Place in the part that is read, from 0; bad records count, blank lines don't."""
    text: str
    offset: int
    """Byte at which the record begins in the file's decompressed content; in Parquet the row, from 0."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The values of `RecordReader`'s `fields`, None where the record has no such field."""


@dataclass(frozen=True)
class BadRecord:
    """A record that can't be used, and why."""

    file: str
    line: int
    """From 1, counted in the part that is read; in Parquet the row."""
    offset: int
    """As in `Record`."""
    reason: str


class RecordReader(Reading, Iterator[Record]):
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
        format: str | None = None,
        fields: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            text_key: field or column of the text; dots lead into fields of fields.
            format: as for `format_of`.
            fields: others that are wanted of each record, named likewise.
        """
        self._sha256 = hashlib.sha256()
        super().__init__(url, text_key, part, digest=self._sha256.update, fields=fields)
        self._format = format_of(url, format)
        self.records = 0
        """Good records so far."""
        self.bad = 0
        """Bad records so far."""
        self.bad_bytes = 0
        """Bytes of the bad records so far, as `bytes` counts them."""
        self.first_bad: BadRecord | None = None
        self._max_bad_fraction = max_bad_fraction
        self._on_bad = on_bad
        self._iterator = self._read()

    def __next__(self) -> Record:
        return next(self._iterator)

    def close(self) -> None:
        """Close the file before its end is reached."""
        self._iterator.close()

    @property
    def raw_sha256(self) -> str | None:
        """Hash of the file's own bytes, if all of them were read."""
        all_read = self.at_end and (self.part.begin == 0 or self.compression is not None)
        return self._sha256.hexdigest() if all_read else None

    def _read(self) -> Generator[Record, None, None]:
        with open_remote(self.url, "raw file") as file:
            if self._format.compressible:
                self.compression = actual_compression(file, self.url)
            for found in self._format.records(file, self):
                if found.text is None:
                    self._reject(found)
                else:
                    self.records += 1
                    yield Record(self.records + self.bad - 1, found.text, found.offset, found.fields)
        if self.part == WHOLE:
            self._judge()

    def _judge(self) -> None:
        check_bad_fraction(
            self.url, self.records, self.bad, self._max_bad_fraction, self.first_bad, self.bad_bytes, self.bytes
        )

    def _reject(self, found: Found) -> None:
        bad = BadRecord(self.url, found.line, found.offset, found.problem)
        self.bad += 1
        self.bad_bytes += found.size
        self.first_bad = self.first_bad or bad
        self._on_bad(bad)
        if self.bad > _BAD_BEFORE_EARLY_STOP and self.bad > self.records:
            self._judge()


def check_bad_fraction(
    url: str,
    records: int,
    bad: int,
    max_bad_fraction: float,
    first_bad: BadRecord | None,
    bad_bytes: int = 0,
    content_bytes: int = 0,
) -> None:
    """Raises:
    DataError: more than `max_bad_fraction` of all records are bad, or more than ten times that share of all bytes.
    """
    total = records + bad
    if first_bad is None:
        return
    shares = [(bad, total, "records are bad", max_bad_fraction, "max_bad_fraction")]
    if content_bytes:
        limit = _BYTES_PER_RECORD_SHARE * max_bad_fraction
        called = f"{_BYTES_PER_RECORD_SHARE} times max_bad_fraction"
        shares.append((bad_bytes, content_bytes, "bytes are in bad records", limit, called))
    for count, of, what, limit, called in shares:
        if count > limit * of:
            raise DataError(
                f"raw file {url}: {count} of {of} {what} ({count / of:.2%}, more than {called} "
                f"{max_bad_fraction:.2%}). The first is line {first_bad.line}: {first_bad.reason}. Repair the file, or "
                "raise max_bad_fraction of its source."
            )


def records_of(
    url: str,
    records: Mapping[int, int | None],
    *,
    text_key: str = "text",
    format: str | None = None,
    fields: tuple[str, ...] = (),
) -> dict[int, Record]:
    """Some records of a raw file, by their numbers; those that are bad, or not there, are left out.

    Args:
        records: number -> `Record.offset`, if that is known; a plain file of lines is then read there alone, and else
            from its start.

    Raises:
        MissingInputError, DataError: as for `RecordReader`.
    """
    settings = {"text_key": text_key, "max_bad_fraction": 1.0, "on_bad": lambda _: None}
    settings |= {"format": format, "fields": fields}
    found: dict[int, Record] = {}
    if format_of(url, format).seekable and None not in records.values():
        for number, offset in records.items():
            reader = RecordReader(url, part=Part(offset, offset + 1), **settings)
            record = next(reader, None)
            reader.close()
            if reader.compression is not None:
                break
            if record is not None and record.offset == offset:
                found[number] = record
        else:
            return found
    reader, found = RecordReader(url, **settings), {}
    for record in reader:
        if record.number in records:
            found[record.number] = record
        if record.number >= max(records):
            break
    reader.close()
    return found


@contextmanager
def quarantine_writer(path: Path) -> Iterator[Callable[[BadRecord], None]]:
    """Writes bad records, as an `on_bad`, to a JSON-lines file that appears only when the `with` succeeds.

    Lines are `{"file", "line", "offset", "reason"}`. With no bad records the file is there and empty.
    """
    with atomic_writer(path, shared=True) as f:
        yield lambda bad: f.write(orjson.dumps(asdict(bad)) + b"\n")
