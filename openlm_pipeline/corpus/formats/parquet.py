"""Parquet: a record per row, read in parts of whole row groups."""

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from openlm_pipeline.corpus.blocks import empty, memory_bound
from openlm_pipeline.corpus.formats import Found, RawFormat, Reading
from openlm_pipeline.errors import DataError
from openlm_pipeline.registry import RAW_FORMATS

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_BATCH = 1024
_BYTES_PER_BATCH = 8 << 20
_MOST_BYTES_PER_BATCH = 64 << 20
_BUFFER_BYTES = 1 << 20
"""Read of a column at a time: without it a row group's column is read as a whole."""
_MEMORY_BYTES, _MEMORY_TIMES = 320 << 20, 10
"""What reading may take at a time: so many bytes, or so many times those of the file."""


@RAW_FORMATS.register("parquet")
class Parquet(RawFormat):
    """Rows of a Parquet file, of which only the text's column is read."""

    suffixes = (".parquet",)
    compressible = False

    def records(self, file: BinaryIO, reading: Reading) -> Iterator[Found]:
        for row, value, fields in _parquet_rows(file, reading):
            reading.lines += 1
            if value is None:
                yield Found(reading.lines, row, None, f"field {reading.text_key!r} is a null, not a string")
                continue
            reading.bytes += len(value)
            reading.raw_bytes = max(0, file.tell() - reading.part.begin)
            try:
                text = value.decode()
            except UnicodeDecodeError as e:
                yield Found(reading.lines, row, None, f"invalid UTF-8 at byte {e.start} of the record", len(value))
            else:
                yield Found(reading.lines, row, text, fields=fields)


def _inner(column: "pa.Array", path: list[str]) -> "pa.Array":
    import pyarrow.compute as pc

    for key in path[1:]:
        column = pc.struct_field(column, key)
    return column


def _type(schema: "pa.Schema", path: list[str]) -> "pa.DataType | None":
    """The type of a field, None where there is none."""
    import pyarrow as pa

    fields, kind = schema, None
    for key in path:
        number = fields.get_field_index(key) if fields is not None else -1
        if number < 0:
            return None
        kind = fields.field(number).type
        fields = kind if pa.types.is_struct(kind) else None
    return kind


def _leaves(batch: "pa.RecordBatch") -> "Iterator[pa.Array]":
    """All columns, those inside of structs too."""
    import pyarrow as pa

    columns = list(batch.columns)
    while columns:
        column = columns.pop()
        if pa.types.is_struct(column.type):
            columns += column.flatten()
        else:
            yield column


def _values(batch: "pa.RecordBatch", path: list[str]) -> "list[Any]":
    """The values of a field, None where the file has no such column."""
    if _type(batch.schema, path) is None:
        return [None] * len(batch)
    return _inner(batch.column(batch.schema.get_field_index(path[0])), path).to_pylist()


def _parquet_rows(file: BinaryIO, reading: Reading) -> Iterator[tuple[int, bytes | None, dict[str, Any]]]:
    """Row numbers in the file, texts and other fields; a row group belongs to the part in which its share of the rows
    begins."""
    import pyarrow as pa  # slow to import, and most raw files are no Parquet
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    url, text_key, part = reading.url, reading.text_key, reading.part
    try:
        if not (file_bytes := file.seek(0, io.SEEK_END)):
            raise empty(url)
        file.seek(0)
        table = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        fields, path = table.schema_arrow, [text_key] if text_key in table.schema_arrow.names else text_key.split(".")
        for depth, key in enumerate(path):
            if key not in (names := [field.name for field in fields]):
                raise DataError(
                    f"raw file {url} has no column {'.'.join(path[: depth + 1])!r} but {', '.join(names)}; set the "
                    "source's text_key"
                )
            kind = next(field for field in fields if field.name == key).type
            fields = list(kind) if pa.types.is_struct(kind) else []
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        types = pa.types
        texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
        if not any(is_kind(kind) for is_kind in texts):
            raise DataError(f"column {text_key!r} of raw file {url} is {kind}, not a string; set the source's text_key")
        names = table.schema_arrow.names
        others = {name: [name] if name in names else name.split(".") for name in reading.fields}
        typed = {".".join(other): _type(table.schema_arrow, other) for other in others.values()}
        columns = [".".join(path), *(column for column, other in typed.items() if other is not None)]
        dictionary = [column for column in columns[1:] if any(is_kind(typed[column]) for is_kind in texts)]
        peek = pq.ParquetFile(
            file,
            metadata=table.metadata,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            read_dictionary=[columns[0], *dictionary],
        )
        most = max(_MEMORY_BYTES, _MEMORY_TIMES * file_bytes)
        row = rows_before = 0
        for group in range(table.num_row_groups):
            about = table.metadata.row_group(group)
            # By rows, as `RowGroupMetaData.column` with its sizes aborts the process on some corrupt files.
            begins_at = rows_before * file_bytes // max(1, table.metadata.num_rows)
            rows_before += max(0, about.num_rows)
            if begins_at < part.begin or (part.end is not None and begins_at >= part.end):
                row += about.num_rows
                continue
            row_bytes = max(1, about.total_byte_size // max(1, about.num_rows))
            longest = 1  # of the group's dictionary, which each row may be: 600 bytes of a file stand for 200 GB then
            try:
                with memory_bound(most):  # its first row brings all of the dictionary
                    batch = next(peek.iter_batches(1, row_groups=[group], columns=columns, use_threads=False), None)
            except OSError as e:
                if "Not yet implemented" not in str(e):
                    raise
                batch = None  # texts that are stored as differences from each other, which have no dictionary
            for column in _leaves(batch) if batch else ():
                if types.is_dictionary(column.type) and any(is_kind(column.type.value_type) for is_kind in texts):
                    lengths = pc.binary_length(column.dictionary.cast(pa.large_binary()))
                    longest = max(longest, pc.max(lengths).as_py() or 1)
            rows = max(1, min(_ROWS_PER_BATCH, _BYTES_PER_BATCH // row_bytes, _MOST_BYTES_PER_BATCH // longest))
            batches = table.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
            while True:
                with memory_bound(most):
                    if (batch := next(batches, None)) is None:
                        break
                    column = _inner(batch.column(batch.schema.get_field_index(path[0])), path)
                    values = {name: _values(batch, other) for name, other in others.items()}
                    if pa.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    # As bytes: invalid UTF-8 in one row must not hide the others.
                    found = column.cast(pa.large_binary()).to_pylist()
                for i, value in enumerate(found):
                    yield row, value, {name: of[i] for name, of in values.items()}
                    row += 1
    except MemoryError as e:  # Arrow's is one, too
        raise DataError(
            f"raw file {url} takes over {most >> 20} MiB for a page of row group {group}, for {file_bytes:,} bytes: "
            "write it with smaller pages, or leave it out"
        ) from e
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:  # names of columns may be no UTF-8
        raise DataError(f"raw file {url} is not a whole Parquet file: {e}. Fetch it again.") from e
