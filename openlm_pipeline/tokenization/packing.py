"""Stage 2: documents in a seeded global order -> samples of `seq_len + 1` tokens -> shards with provenance.

The order is a pure function of (document counts, seed). All documents in that order form one stream of tokens; sample k
is its k-th run of `seq_len + 1` tokens. The last incomplete run is the tail: left out and counted, or filled up with
padding. So any worker can make any shard alone, and the bytes do not depend on who did.

Memory does not grow with the corpus: the order is a permutation without memory, its tables (32 bytes per document) lie
in files that are mapped, and a shard's tokens are read document by document. A worker needs about six times its shard's
size; making the tables takes some 100 MiB.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openlm_pipeline.errors import DataError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.fingerprint import Tree, settings_tree
from openlm_pipeline.ordering.permutation import permute_array
from openlm_pipeline.pools import TaskProgress
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.manifest import ShardEntry
from openlm_pipeline.shards.sums import write_sums
from openlm_pipeline.storage.files import atomic_writer, read_json, sha256_file, write_json
from openlm_pipeline.tokenization.documents import INDEX_DTYPE, FileTokens

PACKING_VERSION = 2
"""Raised when the same streams and seed would give other shards."""

_NOT_SHARDS = {
    "source",
    "tokenizer",
    "vocab_size",
    "shards_url",
    "keep_local_shards",
    "shard_cache_bytes",
    "engine",
    "verify_every",
}
"""Fields of a dataset that change no shard; its files and its tokenizer have their own hashes."""

_CHUNK = 1 << 20
_MAX_OPEN_FILES = 256
_TABLES = "order.json"
_ROW_GROUP = 4096
"""Rows of a provenance that are read at a time: of about a thousand samples."""
_INDEX_ROWS = 1 << 16
"""Rows of the index of documents that are read at a time."""


def packing_tree(dataset: Dataset) -> Tree:
    """The dataset's settings that change its shards."""
    return settings_tree(dataset, _NOT_SHARDS)


def _mapped(path: Path) -> np.ndarray:
    """int64[:] in a file, mapped; an empty file can't be."""
    return np.memmap(path, INDEX_DTYPE, mode="r") if path.stat().st_size else np.zeros(0, INDEX_DTYPE)


def _writable(path: Path, count: int) -> np.memmap:
    """int64[count] in a new file, mapped."""
    if count:
        return np.memmap(path, INDEX_DTYPE, mode="w+", shape=(count,))
    path.write_bytes(b"")
    return np.zeros(0, INDEX_DTYPE)


class DocumentOrder:
    """All documents of a dataset in their global order. A document's id counts through the files, in their order."""

    def __init__(self, folder: Path) -> None:
        """Open the tables that `write_order` made in `folder`."""
        info = read_json(folder / _TABLES)
        self.seed: int = info["seed"]
        self.names: list[str] = info["names"]
        """Of the raw files, in their order."""
        self.first_ids = np.cumsum([0, *info["documents"]])
        """int64[files + 1]: id of each file's first document, then the number of all."""
        self.first_tokens = np.cumsum([0, *info["tokens"]])
        """int64[files + 1]: tokens in the files before each, then in all."""
        self.begins = _mapped(folder / "begins")
        """int64[documents + 1] by id: tokens of all documents of smaller ids."""
        self.records = _mapped(folder / "records")
        """int64[documents] by id: record number in the raw file."""
        self.ends = _mapped(folder / "ends")
        """int64[documents] by place in the order: tokens of this and all earlier documents."""
        self.starts = _mapped(folder / "starts")
        """int64[documents] by id: token of the order where it begins."""

    @property
    def num_tokens(self) -> int:
        return int(self.first_tokens[-1])

    def ids(self, first: int, last: int) -> np.ndarray:
        """int64[last - first]: the documents at places first..last of the order."""
        return permute_array(np.arange(first, last), int(self.first_ids[-1]), self.seed)


def _index_chunks(path: Path) -> Iterator[np.ndarray]:
    """The rows (record, tokens) of a file of stage 1."""
    with path.open("rb") as f:
        while block := f.read(_CHUNK * 2 * INDEX_DTYPE.itemsize):
            yield np.frombuffer(block, INDEX_DTYPE).reshape(-1, 2)


def write_order(files: list[FileTokens], tokenized: Path, seed: int, folder: Path) -> DocumentOrder:
    """Make the tables of the global order: a permutation of all documents of all files, in the order of `files`.

    Raises:
        DataError: an index of stage 1 does not add up to its file's tokens.
    """
    total = 0
    with atomic_writer(folder / "begins") as begins, atomic_writer(folder / "records") as records:
        begins.write(np.zeros(1, INDEX_DTYPE).tobytes())
        for file in files:
            start, path, digest = total, tokenized / f"{file.name}.documents", hashlib.sha256()
            for rows in _index_chunks(path):
                digest.update(rows)
                records.write(np.ascontiguousarray(rows[:, 0]).tobytes())
                begins.write((total + np.cumsum(rows[:, 1])).astype(INDEX_DTYPE).tobytes())
                total += int(rows[:, 1].sum())
            problem = None
            if total - start != file.tokens:
                problem = f"its documents have {total - start} tokens, not {file.tokens}"
            elif file.index_sha256 not in (None, digest.hexdigest()):
                problem = "its sha256 is not the recorded one"
            if problem:
                raise DataError(
                    f"{path} is damaged: {problem}; delete {file.name}.json beside it to tokenize the file again"
                )
    counts = [f.documents for f in files]
    all_begins = _mapped(folder / "begins")
    end = 0
    starts = _writable(folder / "starts", sum(counts))
    with atomic_writer(folder / "ends") as ends:
        for first in range(0, sum(counts), _CHUNK):
            ids = permute_array(np.arange(first, min(first + _CHUNK, sum(counts))), sum(counts), seed)
            lengths = all_begins[ids + 1] - all_begins[ids]
            chunk = end + np.cumsum(lengths)
            starts[ids] = chunk - lengths
            ends.write(chunk.astype(INDEX_DTYPE).tobytes())
            end = int(chunk[-1])
    if sum(counts):
        starts.flush()  # another machine may read them
    tables = {"names": [f.name for f in files], "documents": counts, "tokens": [f.tokens for f in files]}
    write_json(folder / _TABLES, {"seed": seed, **tables})
    return DocumentOrder(folder)


class _Streams:
    """Token streams of stage 1, read at any place; at most `_MAX_OPEN_FILES` are open."""

    def __init__(self, paths: list[Path], dtype: np.dtype) -> None:
        self._paths, self._dtype = paths, dtype
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> "_Streams":
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, file: int, start: int, count: int) -> np.ndarray:
        """Tokens start..start+count of a file."""
        descriptor = self._open.get(file)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[file] = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
        size = self._dtype.itemsize
        data = os.pread(descriptor, count * size, start * size)
        if len(data) != count * size:
            raise DataError(f"{self._paths[file]} ends before its token {start + count}: it is damaged")
        return np.frombuffer(data, self._dtype)


@dataclass(frozen=True)
class Spans:
    """The documents that a stretch of the global stream touches; arrays of the same length."""

    file: np.ndarray
    record: np.ndarray
    begin: np.ndarray
    """Token of the global stream where its part starts."""
    skipped: np.ndarray
    """Token within the document where its part starts."""


def _gather(order: DocumentOrder, begin: int, end: int, streams: _Streams) -> tuple[np.ndarray, Spans]:
    """Tokens begin..end of the global stream, and the documents they come from."""
    first = int(np.searchsorted(order.ends, begin, side="right"))
    last = int(np.searchsorted(order.ends, end, side="left")) + 1
    ids = order.ids(first, last)
    file = np.searchsorted(order.first_ids, ids, side="right") - 1
    ends = np.asarray(order.ends[first:last])
    begins = np.concatenate([[order.ends[first - 1] if first else 0], ends[:-1]])
    part_begin, part_end = np.maximum(begins, begin), np.minimum(ends, end)
    skipped = part_begin - begins
    start = order.begins[ids] - order.first_tokens[file] + skipped
    parts = [streams.read(f, s, n) for f, s, n in zip(file.tolist(), start.tolist(), (part_end - part_begin).tolist())]
    return np.concatenate(parts), Spans(file, order.records[ids], part_begin, skipped)


def provenance(names: list[str], spans: Spans, begin: int, end: int, width: int) -> pa.Table:
    """One row for each (sample, document) pair among the tokens begin..end; `shards.provenance.COLUMNS` has them."""
    cuts = np.union1d(spans.begin, np.arange(begin, end, width))  # each span lies in one document and one sample
    owner = np.searchsorted(spans.begin, cuts, side="right") - 1
    return pa.table(
        {
            "sample": _column(cuts // width, "i8"),
            "start": _column(cuts % width, "i4"),
            "length": _column(np.diff(np.append(cuts, end)), "i4"),
            "file": _files(names, spans.file[owner]),
            "record": _column(spans.record[owner], "i8"),
            "document_start": _column(spans.skipped[owner] + cuts - spans.begin[owner], "i8"),
        }
    )


def write_document_index(order_folder: Path, path: Path, *, progress: TaskProgress) -> None:
    """`write_index` of a `DocumentOrder`; runs in a worker."""
    order = DocumentOrder(order_folder)

    def tables() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin in range(0, len(order.starts), _INDEX_ROWS):
            end = min(begin + _INDEX_ROWS, len(order.starts))
            file = np.searchsorted(order.first_ids, np.arange(begin, end), side="right") - 1
            lengths = np.diff(order.begins[begin : end + 1])
            yield file, np.stack([order.starts[begin:end], lengths, order.records[begin:end]], axis=1)

    write_index(path, order.names, tables())


def write_index(path: Path, names: list[str], tables: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write where each document of a dataset is, sorted by raw file and record.

    Columns: `file`, `record` (number in the raw file), `start` (token of the dataset where it begins: of its samples
    one after the other, and then of its tail), `tokens` (end-of-text included).

    Args:
        names: of the raw files.
        tables: number of the raw file and (start, tokens, record) of documents, int64[n] and int64[n, 3], in that
            order.
    """
    numbers = {"record": pa.int64(), "start": pa.int64(), "tokens": pa.int64()}
    schema = pa.schema({"file": pa.dictionary(pa.int32(), pa.string()), **numbers})
    with (
        atomic_writer(path, shared=True) as f,
        pq.ParquetWriter(f, schema, compression="zstd", use_dictionary=["file"]) as out,
    ):
        for file, rows in _rows_of(tables, _INDEX_ROWS):
            start, tokens, record = (_column(column, "i8") for column in rows.T)
            columns = {"file": _files(names, file), "record": record, "start": start, "tokens": tokens}
            out.write_table(pa.table(columns, schema=schema))


def _rows_of(tables: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same rows, `count` at a time."""
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for table in tables:
        kept.append(table)
        while sum(len(file) for file, _ in kept) >= count:
            file, rows = map(np.concatenate, zip(*kept))
            yield file[:count], rows[:count]
            kept = [(file[count:], rows[count:])]
    if kept and sum(len(file) for file, _ in kept):
        yield tuple(map(np.concatenate, zip(*kept)))


def _files(names: list[str], file: np.ndarray) -> pa.Array:
    """Names of files by their numbers; only those that occur are in its dictionary, for there may be 30,000."""
    used, place = np.unique(file, return_inverse=True)
    return pa.DictionaryArray.from_arrays(_column(place, "i4"), _strings([names[f] for f in used]))


def _strings(values: list[str]) -> pa.Array:
    data = [v.encode() for v in values]
    ends = np.cumsum([0, *map(len, data)], dtype="i4")
    return pa.Array.from_buffers(pa.string(), len(data), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(data))])


def _column(values: np.ndarray, dtype: str) -> pa.Array:
    """Not `pa.array`, which imports pandas where it is installed: 0.4 CPU-seconds."""
    data = np.ascontiguousarray(values, dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(data.dtype), len(data), [None, pa.py_buffer(data)])


def check_stream(tokenized: Path, name: str, tokens_sha256: str, *, progress: TaskProgress) -> None:
    """Whether a token stream is still what stage 1 wrote; runs in a worker.

    Raises:
        DataError: it is not.
    """
    path = tokenized / f"{name}.tokens"
    if sha256_file(path) != tokens_sha256:
        raise DataError(f"{path} is damaged: its sha256 is not the recorded one; delete {name}.json to make it again")
    progress({"raw_bytes": path.stat().st_size})


def make_shard(
    number: int,
    samples_per_shard: int,
    sample_format: SampleFormat,
    pad_id: int | None,
    source: str,
    tokenized: Path,
    order_folder: Path,
    out: Path,
) -> ShardEntry:
    """Make shard `number` of a dataset; runs in a worker. What it is told does not grow with the dataset.

    Args:
        pad_id: fills up the last sample; with None an incomplete sample is left out.
        tokenized: folder of stage 1.
        order_folder: where the `DocumentOrder` is.
        out: the dataset's folder.
    """
    order = DocumentOrder(order_folder)
    width = sample_format.sample_tokens
    total = order.num_tokens // width if pad_id is None else -(-order.num_tokens // width)
    first = number * samples_per_shard
    count = min(samples_per_shard, total - first)
    begin = first * width
    end = min((first + count) * width, order.num_tokens)
    with _Streams([tokenized / f"{name}.tokens" for name in order.names], sample_format.numpy_dtype) as streams:
        tokens, spans = _gather(order, begin, end, streams)
    if padding := count * width - len(tokens):
        tokens = np.append(tokens, np.full(padding, pad_id, tokens.dtype))
    table = provenance(order.names, spans, begin, end, width)
    return write_shard_files(out, number, tokens.reshape(count, width), first, sample_format, table, source)


def write_shard_files(
    out: Path, number: int, samples: np.ndarray, first: int, sample_format: SampleFormat, table: pa.Table, source: str
) -> ShardEntry:
    """Write a shard and what is beside it.

    Args:
        samples: ids[n, sample_tokens]; `first` is the number of its first sample.
        table: its provenance.
    """
    name = f"{number:08d}"
    provenance_sha256 = _write_parquet(out / f"{name}.provenance.parquet", table)
    sums_sha256 = write_sums(out / f"{name}.sums", samples)
    made = write_shard(out / f"{name}.tar", samples, first, sample_format)
    return ShardEntry(shard=name, source=source, sums_sha256=sums_sha256, provenance_sha256=provenance_sha256, **made)


def _write_parquet(path: Path, table: pa.Table) -> str:
    """Write a table in small row groups, of which a reader needs one or two; return the sha256 of the file."""
    out = pa.BufferOutputStream()
    pq.write_table(table, out, compression="zstd", row_group_size=_ROW_GROUP)
    data = out.getvalue()
    with atomic_writer(path, shared=True) as f:
        f.write(data)
    return hashlib.sha256(data).hexdigest()
