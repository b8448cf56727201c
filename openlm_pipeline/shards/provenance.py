"""Where every token of a dataset came from, so that shards and their provenance alone give the documents again.

`NNNNNNNN.provenance.parquet` beside a shard has one row for each (sample, document) pair, of `COLUMNS`. Documents
follow one another without gaps, across samples and shards.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.manifest import check_hash
from openlm_pipeline.storage.remote import download, join

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


def spans_of(dataset: ShardedDataset, k: int, sample: int | None = None) -> Spans:
    """As `read_spans`; a provenance that is in the dataset's store alone is fetched for it, and not kept."""
    path = provenance_path(dataset, k)
    if path.exists() or dataset.remote is None:
        return read_spans(dataset, k, sample)
    download(join(dataset.remote, path.name), path)
    spans = read_spans(dataset, k, sample)
    path.unlink()  # as it was: a folder has the provenance of all its shards or of none
    return spans


def _read_rows(path: Path, sample: int | None) -> pa.Table:
    """All rows of a provenance, or those of the row groups that have rows of a sample."""
    with pq.ParquetFile(path) as file:
        if sample is None:
            return file.read()
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        stats = [group.column(file.schema_arrow.get_field_index("sample")).statistics for group in groups]
        may_have = [i for i, s in enumerate(stats) if s is None or not s.has_min_max or s.min <= sample <= s.max]
        return file.read_row_groups(may_have)


def shard_tokens(dataset: ShardedDataset, k: int) -> np.ndarray:
    """All tokens of shard `k` one after the other: ids[n * (seq_len + 1)]."""
    return dataset.shard_samples(k).reshape(-1)
