"""Where every token of a dataset came from: documents put together again from shards and their provenance alone.

`NNNNNNNN.provenance.parquet` beside a shard has one row for each (sample, document) pair, of `COLUMNS`. Documents
follow one another without gaps, across samples and shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.manifest import DOCUMENTS, QUARANTINE, check_hash, recorded_beside

COLUMNS = {
    "sample": "Number of the sample in the dataset.",
    "start": "Token of the sample where the row's part starts.",
    "length": "Tokens of the part.",
    "file": "Name of the raw file.",
    "record": "Number in the raw file, blank lines not counted.",
    "document_start": "Token of the document where the part starts.",
}


@dataclass(frozen=True)
class Spans:
    """The parts of documents in a shard, in the order of its tokens; arrays of the same length."""

    begin: np.ndarray
    """int64: token of the shard where the part starts."""
    length: np.ndarray
    """int64: tokens."""
    files: list[str]
    """Names of raw files."""
    file: np.ndarray
    """int64: position in `files`."""
    record: np.ndarray
    """int64: number in the raw file."""
    document_start: np.ndarray
    """int64: token of the document where the part starts."""

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def end(self) -> int:
        """Tokens of the shard that the spans cover."""
        return int(self.begin[-1] + self.length[-1]) if len(self) else 0

    @property
    def heads(self) -> np.ndarray:
        """Rows with which a document begins."""
        return np.flatnonzero(self.document_start == 0)

    def document(self, row: int) -> tuple[str, int]:
        """(file, record) of a row."""
        return self.files[self.file[row]], int(self.record[row])


def provenance_path(dataset: ShardedDataset, k: int) -> Path:
    return dataset.folder / dataset.entries[k].provenance


def read_spans(dataset: ShardedDataset, k: int, sample: int | None = None) -> Spans:
    """The spans of shard `k`.

    Args:
        sample: number in the dataset; then the spans around it, of which others are left out to read little.

    Raises:
        MissingInputError: the file is not there.
        DataError: it is damaged, of another shard, or does not cover the shard's tokens one by one.
    """
    path, entry, width = provenance_path(dataset, k), dataset.entries[k], dataset.format.sample_tokens
    if not path.exists():
        raise MissingInputError(f"{path} does not exist; without it nobody can say where the shard's tokens came from")
    if entry.provenance_sha256:
        check_hash(path, entry.provenance_sha256)
    try:
        table = _read_rows(path, sample)
        samples, start, length, record, document_start = (
            table[name].to_numpy().astype(np.int64)
            for name in ("sample", "start", "length", "record", "document_start")
        )
        named = table["file"].combine_chunks().dictionary_encode()
        file = named.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    except (pa.ArrowException, OSError, KeyError) as e:
        raise DataError(f"{path} is damaged: {e}") from e
    first = int(dataset.shard_sizes[:k].sum())
    spans = Spans((samples - first) * width + start, length, named.dictionary.to_pylist(), file, record, document_start)
    padding = dataset.info["totals"].get("padding_tokens", 0) if k == len(dataset.entries) - 1 else 0
    ends = spans.begin + length
    continued = document_start[1:] > 0
    same = (np.diff(file) == 0) & (np.diff(record) == 0) & (document_start[1:] == (document_start + length)[:-1])
    gapless = len(spans) and (spans.begin[1:] == ends[:-1]).all()
    if sample is None:
        gapless = gapless and spans.begin[0] == 0 and spans.end == entry.num_sequences * width - padding
    if not gapless or not same[continued].all():
        raise DataError(f"{path} is damaged, or of another shard: it does not cover the tokens of {entry.shard}.tar")
    return spans


def _read_rows(path: Path, sample: int | None) -> pa.Table:
    """All rows of a provenance, or those of the row groups that have rows of a sample."""
    with pq.ParquetFile(path) as file:
        if sample is None:
            return file.read()
        return file.read_row_groups(_groups(file, sample=sample))


def _groups(parquet: pq.ParquetFile, /, **wanted: Any) -> list[int]:
    """Row groups that may have a row with these values in these columns."""

    def may_have(group: pq.RowGroupMetaData) -> bool:
        stats = {name: group.column(parquet.schema_arrow.get_field_index(name)).statistics for name in wanted}
        return all(s is None or not s.has_min_max or s.min <= wanted[name] <= s.max for name, s in stats.items())

    return [i for i in range(parquet.metadata.num_row_groups) if may_have(parquet.metadata.row_group(i))]


def shard_tokens(dataset: ShardedDataset, k: int) -> np.ndarray:
    """All tokens of shard `k` one after the other: ids[n * (seq_len + 1)]."""
    return dataset.shard_samples(k).reshape(-1)


def iterate_documents(folder: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """All whole documents of a dataset in the order of its tokens: (raw file, record, ids without the end-of-text).

    Needs memory for one shard and for the longest document. Documents that lie in the dropped tail, or reach into it,
    do not come; where nothing was dropped all do. (A cut document that names the end-of-text token itself, and is cut
    right behind it, can't be told from a whole one.)

    Raises:
        MissingInputError: there is no finished dataset, or no provenance.
        DataError: a shard or its provenance is damaged, or they do not belong together.
    """
    dataset = ShardedDataset(folder)
    eot_id = dataset.info["eot_id"]
    open_document: tuple[str, int] | None = None
    parts: list[np.ndarray] = []

    def close() -> tuple[str, int, np.ndarray]:
        ids = np.concatenate(parts)
        if ids[-1] != eot_id:
            raise DataError(
                f"record {open_document[1]} of {open_document[0]} does not end with the end-of-text token {eot_id}: "
                f"the shards in {folder} and their provenance do not belong together"
            )
        return *open_document, ids[:-1]

    for k in range(len(dataset.entries)):
        spans, tokens = read_spans(dataset, k), shard_tokens(dataset, k)
        heads = spans.heads
        cuts = [*spans.begin[heads].tolist(), spans.end]
        if cuts[0] > 0:
            if spans.document(0) != open_document or spans.document_start[0] != sum(map(len, parts)):
                raise DataError(f"{provenance_path(dataset, k)} does not continue where the shard before it ended")
            parts.append(tokens[: cuts[0]])
        for head, begin, end in zip(heads.tolist(), cuts, cuts[1:]):
            if parts:
                yield close()
            open_document, parts = spans.document(head), [tokens[begin:end]]
    if parts and (not dataset.info["totals"]["tail_tokens"] or parts[-1][-1] == eot_id):
        yield close()


def find_document(dataset: ShardedDataset, file: str, record: int) -> tuple[int, int]:
    """Where a document is: (token of the dataset where it begins, its tokens, the end-of-text included).

    Its tokens follow one another through the samples, and then through the tail that is in no sample.

    Raises:
        MissingInputError: the dataset has no such document, or no index of its documents.
        DataError: the index is damaged.
    """
    path = dataset.folder / DOCUMENTS
    if not path.exists():
        raise MissingInputError(
            f"{path} does not exist; `openlm tokenize` makes it, also for the datasets of earlier releases"
        )
    if recorded := recorded_beside(dataset.entries).get(DOCUMENTS):
        check_hash(path, recorded)
    try:
        with pq.ParquetFile(path) as index:
            for group in _groups(index, file=file, record=record):
                table = index.read_row_group(group, columns=["file", "record", "start", "tokens"])
                names = table["file"].combine_chunks().dictionary_encode()
                own = table["record"].to_numpy() == record
                for row in np.flatnonzero(own).tolist():
                    if names[row].as_py() == file:
                        return table["start"][row].as_py(), table["tokens"][row].as_py()
    except (pa.ArrowException, OSError, KeyError) as e:
        raise DataError(f"{path} is damaged: {e}") from e
    raise MissingInputError(f"{dataset.folder} has no record {record} of {file}; look in {QUARANTINE}")


def document_tokens(folder: Path, file: str, record: int) -> np.ndarray:
    """One whole document: its ids without the end-of-text.

    Raises:
        MissingInputError: the dataset has no such document, or no index of its documents.
        DataError: a part of it is not in the shards, or damaged.
    """
    dataset = ShardedDataset(folder)
    start, tokens = find_document(dataset, file, record)
    width = dataset.format.sample_tokens
    first, last = start // width, -(-(start + tokens) // width)
    if start + tokens > len(dataset) * width:
        raise DataError(f"record {record} of {file} is cut: its end is among the tokens of {folder} in no sample")
    ids = dataset.gather(np.arange(first, last)).reshape(-1)[start - first * width :][:tokens]
    if ids[-1] != dataset.info["eot_id"]:
        raise DataError(f"{folder / DOCUMENTS} and the shards of {folder} do not belong together")
    return ids[:-1]
