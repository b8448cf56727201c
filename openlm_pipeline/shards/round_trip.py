"""From shards back to text: documents of a finished dataset, found by their provenance, against the raw records.

This catches what no checksum can: shards that are whole and wrong, such as those of another tokenizer, or a provenance
that names the wrong documents.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from openlm_pipeline.corpus.discovery import RawFile
from openlm_pipeline.corpus.maps import Drop, load_map
from openlm_pipeline.corpus.reader import records_of
from openlm_pipeline.errors import IdentityError, MissingInputError
from openlm_pipeline.experiments import DocumentMap
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.inspect import tokenizer_of
from openlm_pipeline.shards.provenance import Spans, provenance_path, read_spans, shard_tokens
from openlm_pipeline.storage.remote import download, join, sha256_url
from openlm_pipeline.tokenizers.engine import load_reference

_SHARDS, _FILES = 8, 3  # at most: a raw file is read from its start to reach a record


@dataclass(frozen=True)
class RoundTrip:
    """What became of the documents that were looked at."""

    exact: int
    """Decode to the raw record's text."""
    lossy: int
    """Have the ids of the raw text, but the tokenizer does not decode them to it: it normalises Unicode, say."""
    damaged: tuple[str, ...]
    """A line for each document whose ids are not those of its raw text."""


def round_trip(
    dataset: ShardedDataset,
    raw_files: Sequence[RawFile],
    text_key: str,
    *,
    map: DocumentMap | None = None,
    offsets: Callable[[str, Collection[int]], dict[int, int | None]] = lambda _, records: dict.fromkeys(records),
    documents: int = 16,
    seed: int = 0,
) -> RoundTrip:
    """Decode documents of a dataset and compare them with the raw records that they came from.

    Args:
        raw_files: those that the dataset was made from.
        map: of the source.
        offsets: where in a raw file, by its name, records begin, as far as that is known.
        documents: at most so many, drawn by `seed` from up to 8 shards and 3 raw files.

    Raises:
        MissingInputError: a raw file, the tokenizer or the provenance is not there.
        IdentityError: a raw file is no longer the one that the dataset was made from.
        DataError: a shard, its provenance or a raw file is damaged.
    """
    as_text = any(identity.get("special_tokens") == "text" for identity in dataset.info["inputs"].values())
    tokenizer = load_reference(tokenizer_of(dataset.folder), special_as_text=as_text)
    change = load_map(map) if map else None
    by_name = {raw.name: raw for raw in raw_files}
    begin = [dataset.info["bos_id"]] if "bos_id" in dataset.info else []
    exact, lossy, damaged = 0, 0, []
    for name, drawn in _draw(dataset, documents, np.random.default_rng(seed)).items():
        if name not in by_name:
            raise MissingInputError(f"{dataset.folder} was made from a raw file {name}, which is not there any more")
        raw, wrong = by_name[name], []
        records = offsets(name, {record for record, _ in drawn})
        fields = map.fields if map else ()
        found = records_of(raw.url, records, text_key=text_key, format=raw.format, fields=fields)
        for record, ids in drawn:
            if record not in found:
                wrong.append(f"record {record} of {name} is not in the raw file")
                continue
            text = found[record].text
            if change and isinstance(text := change(text, found[record].fields), Drop):
                wrong.append(f"record {record} of {name} is one that {map.function} drops: {text.reason}")
                continue
            own = tokenizer.encode(text, add_special_tokens=False).ids
            if ids != (expected := [*begin, *own, dataset.info["eot_id"]]):
                same = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), min(len(ids), len(expected)))
                wrong.append(f"record {record} of {name} differs in the shards from its raw text, from token {same} on")
            elif tokenizer.decode(own, skip_special_tokens=False) == text:
                exact += 1
            else:
                lossy += 1
        if wrong and sha256_url(raw.url) != dataset.info["inputs"][name]["raw_sha256"]:
            raise IdentityError(
                f"raw file {raw.url} is not the one that {dataset.folder} was made from; tokenize again"
            )
        damaged += wrong
    return RoundTrip(exact, lossy, tuple(damaged))


def _draw(dataset: ShardedDataset, count: int, rng: np.random.Generator) -> dict[str, list[tuple[int, list[int]]]]:
    """Raw file -> (record, its ids with the end-of-text)."""
    drawn: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    shards = rng.permutation(len(dataset.entries))[:_SHARDS].tolist()
    for place, k in enumerate(shards):
        spans = _spans(dataset, k)
        missing = count - sum(map(len, drawn.values()))
        wanted = -(-missing // (len(shards) - place))
        for head in rng.permutation(spans.heads).tolist():
            file, record = spans.document(head)
            if wanted and (file in drawn or len(drawn) < _FILES) and (ids := _document(dataset, k, spans, head)):
                drawn[file].append((record, ids))
                wanted -= 1
    return drawn


def _spans(dataset: ShardedDataset, k: int) -> Spans:
    path = provenance_path(dataset, k)
    if path.exists() or dataset.remote is None:
        return read_spans(dataset, k)
    download(join(dataset.remote, path.name), path)
    spans = read_spans(dataset, k)
    path.unlink()  # as it was: a folder has the provenance of all its shards or of none
    return spans


def _document(dataset: ShardedDataset, k: int, spans: Spans, head: int) -> list[int]:
    """Ids of the document that begins in row `head` of shard `k`, to its end in this shard or a later one; none if its
    end may be among the tokens that are in no sample."""
    begin, later = int(spans.begin[head]), spans.heads
    later = later[later > head]
    ids: list[int] = []
    while not len(later):
        ids += shard_tokens(dataset, k)[begin : spans.end].tolist()
        if k + 1 == len(dataset.entries):
            return [] if dataset.info["totals"]["tail_tokens"] else ids
        begin, k = 0, k + 1
        spans = _spans(dataset, k)
        later = spans.heads
    return ids + shard_tokens(dataset, k)[begin : int(spans.begin[later[0]])].tolist()
