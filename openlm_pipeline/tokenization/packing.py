"""Stage 2: documents in a seeded global order -> samples of `seq_len + 1` tokens -> shards with provenance.

The order is a pure function of (document counts, seed). All documents in that order form one stream of tokens; sample k
is its k-th run of `seq_len + 1` tokens; the last incomplete run is the tail, recorded and left out. So any worker can
make any shard alone, and the bytes do not depend on who did.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openlm_pipeline.files import atomic_writer
from openlm_pipeline.shards.dataset import ShardEntry
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.tokenization.documents import FileTokens

PACKING_VERSION = 1
"""Raised when the same streams and seed would give other shards."""

_ORDER_FILES = ("file", "document", "start", "end")


@dataclass(frozen=True)
class DocumentOrder:
    """All documents of a dataset in their global order; arrays of the same length."""

    file: np.ndarray
    """int32: position of the raw file in the sorted list."""
    document: np.ndarray
    """int64: position of the document in its file."""
    start: np.ndarray
    """int64: first token of the document in its file's stream."""
    end: np.ndarray
    """int64: tokens of this and all earlier documents in the global order."""

    @property
    def num_tokens(self) -> int:
        return int(self.end[-1]) if len(self.end) else 0

    def save(self, folder: Path) -> None:
        for name in _ORDER_FILES:
            with atomic_writer(folder / f"{name}.npy") as f:
                np.save(f, getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "DocumentOrder":
        """Memory-mapped, so that workers share one copy."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ORDER_FILES))


def order_documents(files: list[FileTokens], tokenized: Path, seed: int) -> DocumentOrder:
    """The global order: a permutation of all documents of all files, in the order of `files`."""
    lengths = [np.load(tokenized / f"{f.name}.documents.npy")[:, 1] for f in files]
    counts = [len(x) for x in lengths]
    order = np.random.Generator(np.random.PCG64(seed)).permutation(sum(counts))
    starts = np.concatenate([np.cumsum(x) - x for x in lengths]) if lengths else np.zeros(0, np.int64)
    return DocumentOrder(
        file=np.repeat(np.arange(len(files), dtype=np.int32), counts)[order],
        document=np.concatenate([np.arange(c) for c in counts])[order],
        start=starts[order],
        end=np.cumsum(np.concatenate(lengths)[order]),
    )


@dataclass(frozen=True)
class _Spans:
    """The documents that a stretch of the global stream touches; arrays of the same length."""

    positions: np.ndarray
    """Position of the document in the order."""
    begin: np.ndarray
    """Token of the global stream where its part starts."""
    skipped: np.ndarray
    """Token within the document where its part starts."""


def _gather(order: DocumentOrder, begin: int, end: int, streams: list[np.ndarray]) -> tuple[np.ndarray, _Spans]:
    """Tokens begin..end of the global stream, and the documents they come from."""
    first = int(np.searchsorted(order.end, begin, side="right"))
    last = int(np.searchsorted(order.end, end, side="left")) + 1
    positions = np.arange(first, last)
    ends = np.asarray(order.end[first:last])
    begins = np.concatenate([[order.end[first - 1] if first else 0], ends[:-1]])
    part_begin, part_end = np.maximum(begins, begin), np.minimum(ends, end)
    skipped = part_begin - begins
    source = np.asarray(order.start[first:last]) + skipped
    tokens = np.concatenate(
        [streams[f][s : s + n] for f, s, n in zip(order.file[first:last], source, part_end - part_begin)]
    )
    return tokens, _Spans(positions, part_begin, skipped)


def _provenance(
    order: DocumentOrder, spans: _Spans, begin: int, end: int, width: int, names: list[str], records: list[np.ndarray]
) -> pa.Table:
    """One row for each (sample, document) pair among the tokens begin..end.

    Columns: `sample` (number in the dataset), `start` and `length` (tokens in the sample), `file`, `record` (number in
    the raw file, blank lines not counted), `document_start` (token of the document where the span starts).
    """
    cuts = np.union1d(spans.begin, np.arange(begin, end, width))  # each span lies in one document and one sample
    owner = np.searchsorted(spans.begin, cuts, side="right") - 1
    file, document = (np.asarray(x)[spans.positions][owner] for x in (order.file, order.document))
    return pa.table(
        {
            "sample": pa.array(cuts // width, pa.int64()),
            "start": pa.array(cuts % width, pa.int32()),
            "length": pa.array(np.diff(np.append(cuts, end)), pa.int32()),
            "file": pa.DictionaryArray.from_arrays(pa.array(file, pa.int32()), names),
            "record": pa.array([records[f][d] for f, d in zip(file, document)], pa.int64()),
            "document_start": pa.array(spans.skipped[owner] + cuts - spans.begin[owner], pa.int64()),
        }
    )


def make_shard(
    number: int,
    samples_per_shard: int,
    sample_format: SampleFormat,
    source: str,
    files: list[str],
    tokenized: Path,
    order_folder: Path,
    out: Path,
) -> ShardEntry:
    """Make shard `number` of a dataset; runs in a Dask worker.

    Args:
        files: names of the raw files, sorted.
        tokenized: folder of stage 1.
        order_folder: where the `DocumentOrder` is saved.
        out: the dataset's folder.
    """
    order = DocumentOrder.load(order_folder)
    width = sample_format.sample_tokens
    total = order.num_tokens // width
    first = number * samples_per_shard
    count = min(samples_per_shard, total - first)
    streams = [
        np.memmap(p, dtype=sample_format.numpy_dtype, mode="r")
        if p.stat().st_size
        else np.zeros(0, sample_format.dtype)
        for p in (tokenized / f"{name}.tokens" for name in files)
    ]
    begin, end = first * width, (first + count) * width
    tokens, spans = _gather(order, begin, end, streams)
    records = [np.load(tokenized / f"{name}.documents.npy", mmap_mode="r")[:, 0] for name in files]
    name = f"{number:08d}"
    with atomic_writer(out / f"{name}.provenance.parquet") as f:
        pq.write_table(_provenance(order, spans, begin, end, width, files, records), f, compression="zstd")
    made = write_shard(out / f"{name}.tar", tokens.reshape(count, width), first, sample_format)
    return ShardEntry(shard=name, source=source, **made)
