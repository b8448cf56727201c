"""`documents.parquet` beside the shards: where each document of a dataset is, by its raw file and record.

Two row groups at the most are read to find a document, whatever the size of the dataset. One of the first release has
no index: then all provenance is read. A dataset in a store is asked there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from openlm_pipeline.errors import DataError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.manifest import DOCUMENTS, recorded_beside
from openlm_pipeline.shards.provenance import provenance_path, spans_of
from openlm_pipeline.storage.remote import exists, join, open_remote


@dataclass(frozen=True)
class Place:
    """Where a document is."""

    start: int
    """Token of the dataset where it begins: of its samples one after the other, and then of the tail."""
    tokens: int
    """End-of-text included."""

    def samples(self, dataset: ShardedDataset) -> np.ndarray:
        """Numbers of the samples that have a part of it: int64[n]; none of the tail."""
        width = dataset.format.sample_tokens
        return np.arange(self.start // width, min(-(-(self.start + self.tokens) // width), len(dataset)))


def has_provenance(dataset: ShardedDataset) -> bool:
    """Whether anything says which documents are in its shards; of ready-made ones nothing may."""
    path = provenance_path(dataset, 0)
    return path.exists() or (dataset.remote is not None and exists(join(dataset.remote, path.name)))


@contextmanager
def _opened(dataset: ShardedDataset) -> Iterator[pq.ParquetFile | None]:
    if DOCUMENTS not in recorded_beside(dataset.entries):
        yield None
        return
    path = dataset.folder / DOCUMENTS
    here = path.exists() or dataset.remote is None
    try:
        with open_remote(str(path) if here else join(dataset.remote, DOCUMENTS)) as raw, pq.ParquetFile(raw) as file:
            yield file
    except (pa.ArrowException, OSError, KeyError) as e:  # Arrow has both of its own and of Python's
        raise DataError(f"{path} is damaged: {e}; `openlm tokenize` makes it again once it is deleted") from e


def find_document(dataset: ShardedDataset, file: str, record: int) -> Place | None:
    """Where the document of a raw file's record is; None where the dataset has no such document.

    Raises:
        MissingInputError: there is neither an index nor provenance.
        DataError: the index, or a provenance, is damaged.
    """
    with _opened(dataset) as index:
        if index is None:
            return _scanned(dataset, file, record)
        wanted = {"file": file, "record": record}
        groups = [
            i for i in range(index.num_row_groups) if all(_may_have(index, i, *column) for column in wanted.items())
        ]
        rows = index.read_row_groups(groups)
    rows = rows.filter(pc.and_(pc.equal(rows["file"].cast(pa.string()), file), pc.equal(rows["record"], record)))
    if not rows.num_rows:
        return None
    place = Place(rows["start"][0].as_py(), rows["tokens"][0].as_py())
    if len(samples := place.samples(dataset)):  # the index has no checksums of its own
        _check(dataset, file, record, place.start, int(samples[0]))
    return place


def _may_have(index: pq.ParquetFile, group: int, column: str, value: str | int) -> bool:
    stats = index.metadata.row_group(group).column(index.schema_arrow.get_field_index(column)).statistics
    return stats is None or not stats.has_min_max or stats.min <= value <= stats.max


def _check(dataset: ShardedDataset, file: str, record: int, start: int, sample: int) -> None:
    """
    Raises:
        DataError: a document does not begin where the index says it does, in a sample.
    """
    k = int(dataset.shards_of(np.array([sample]))[0])
    spans = spans_of(dataset, k, sample)
    begins = start - int(dataset.shard_sizes[:k].sum()) * dataset.format.sample_tokens
    rows = np.flatnonzero((spans.begin == begins) & (spans.document_start == 0))
    if not len(rows) or spans.document(int(rows[0])) != (file, record):
        raise DataError(
            f"{dataset.folder / DOCUMENTS} is damaged: its record {record} of {file} does not begin at token {start}, "
            "as the shards' provenance says; `openlm tokenize` makes it again once it is deleted"
        )


def _scanned(dataset: ShardedDataset, file: str, record: int) -> Place | None:
    start, tokens = None, 0
    for k in range(len(dataset.entries)):
        spans = spans_of(dataset, k)
        number = spans.files.index(file) if file in spans.files else -1
        rows = np.flatnonzero((spans.file == number) & (spans.record == record))
        if len(rows):
            first = int(dataset.shard_sizes[:k].sum()) * dataset.format.sample_tokens
            start = first + int(spans.begin[rows[0]]) if start is None else start
            tokens += int(spans.length[rows].sum())
        elif start is not None:
            break
    return None if start is None else Place(start, tokens)


def indexed(dataset: ShardedDataset) -> dict[str, tuple[int, int]] | None:
    """Raw file -> documents and tokens by the index; None where there is none. Memory does not grow with documents."""
    with _opened(dataset) as index:
        if index is None:
            return None
        found: dict[str, tuple[int, int]] = {}
        for batch in index.iter_batches(columns=["file", "tokens"]):
            sums = pa.table({"file": batch["file"].cast(pa.string()), "tokens": batch["tokens"]})
            for row in sums.group_by("file").aggregate([("tokens", "sum"), ("tokens", "count")]).to_pylist():
                documents, tokens = found.get(row["file"], (0, 0))
                found[row["file"]] = documents + row["tokens_count"], tokens + row["tokens_sum"]
        return found
