"""Documents put together again from shards and what is beside them alone, as any reader of a dataset could."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from openlm_pipeline.errors import DataError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.manifest import DOCUMENTS
from openlm_pipeline.shards.provenance import provenance_path, read_spans, shard_tokens


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
    """Where the index has a document: (token of the dataset where it begins, its tokens, the end-of-text included)."""
    wanted = [("file", "==", file), ("record", "==", record)]
    [row] = pq.read_table(dataset.folder / DOCUMENTS, filters=wanted).to_pylist()
    return row["start"], row["tokens"]


def document_tokens(folder: Path, file: str, record: int) -> np.ndarray:
    """One whole document by the index: its ids without the end-of-text."""
    dataset = ShardedDataset(folder)
    start, tokens = find_document(dataset, file, record)
    width = dataset.format.sample_tokens
    first, last = start // width, -(-(start + tokens) // width)
    ids = dataset.gather(np.arange(first, last)).reshape(-1)[start - first * width :][:tokens]
    assert ids[-1] == dataset.info["eot_id"]
    return ids[:-1]
