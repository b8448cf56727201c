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
from openlm_pipeline.corpus.reader import Record, records_of
from openlm_pipeline.errors import IdentityError, MissingInputError
from openlm_pipeline.experiments import DocumentMap
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.inspect import tokenizer_of
from openlm_pipeline.shards.provenance import Spans, shard_tokens, spans_of
from openlm_pipeline.storage.remote import sha256_url
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


class RawRecords:
    """Raw records of a dataset, read again and tokenized as they were."""

    def __init__(
        self,
        dataset: ShardedDataset,
        raw_files: Sequence[RawFile],
        text_key: str,
        *,
        map: DocumentMap | None = None,
        offsets: Callable[[str, Collection[int]], dict[int, int | None]] = lambda _, records: dict.fromkeys(records),
    ) -> None:
        """
        Args:
            raw_files: those that the dataset was made from.
            map: of the source.
            offsets: where in a raw file, by its name, records begin, as far as that is known.

        Raises:
            MissingInputError: the tokenizer is not there.
        """
        self.dataset, self.map, self._text_key, self._offsets = dataset, map, text_key, offsets
        as_text = any(identity.get("special_tokens") == "text" for identity in dataset.info["inputs"].values())
        self.tokenizer = load_reference(tokenizer_of(dataset.folder), special_as_text=as_text)
        self._change = load_map(map) if map else None
        self._by_name = {raw.name: raw for raw in raw_files}
        self.begin = [dataset.info["bos_id"]] if "bos_id" in dataset.info else []

    def read(self, name: str, records: Collection[int]) -> dict[int, tuple[str, list[int]] | str]:
        """Record -> its text and ids, with the end-of-text; or what is wrong with it.

        Raises:
            MissingInputError: the raw file is not there.
            DataError: it can't be read.
        """
        if name not in self._by_name:
            raise MissingInputError(
                f"{self.dataset.folder} was made from a raw file {name}, which is not there any more"
            )
        raw, fields = self._by_name[name], self.map.fields if self.map else ()
        places = dict.fromkeys(records) | self._offsets(name, records)
        found = records_of(raw.url, places, text_key=self._text_key, format=raw.format, fields=fields)
        return {record: self._made_of(name, record, found.get(record)) for record in records}

    def _made_of(self, name: str, number: int, record: Record | None) -> tuple[str, list[int]] | str:
        if record is None:
            return f"record {number} of {name} is not in the raw file"
        text = record.text
        if self._change and isinstance(text := self._change(text, record.fields), Drop):
            return f"record {number} of {name} is one that {self.map.function} drops: {text.reason}"
        own = self.tokenizer.encode(text, add_special_tokens=False).ids
        return text, [*self.begin, *own, self.dataset.info["eot_id"]]

    def is_another(self, name: str) -> bool:
        """Whether a raw file is no longer the one that the dataset was made from."""
        return sha256_url(self._by_name[name].url) != self.dataset.info["inputs"][name]["raw_sha256"]

    def url(self, name: str) -> str:
        return self._by_name[name].url


def first_difference(name: str, record: int, ids: Sequence[int], expected: Sequence[int], start: int = 0) -> str | None:
    """Where tokens of a document, from its token `start` on, differ from those expected; None where they don't."""
    if list(ids) == list(expected):
        return None
    same = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), min(len(ids), len(expected)))
    return f"record {record} of {name} differs in the shards from its raw text, from token {start + same} on"


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
    raw = RawRecords(dataset, raw_files, text_key, map=map, offsets=offsets)
    begins = len(raw.begin)
    exact, lossy, damaged = 0, 0, []
    for name, drawn in _draw(dataset, documents, np.random.default_rng(seed)).items():
        wrong, found = [], raw.read(name, {record for record, _ in drawn})
        for record, ids in drawn:
            if isinstance(made := found[record], str):
                wrong.append(made)
                continue
            text, expected = made
            if differs := first_difference(name, record, ids, expected):
                wrong.append(differs)
            elif raw.tokenizer.decode(ids[begins:-1], skip_special_tokens=False) == text:
                exact += 1
            else:
                lossy += 1
        if wrong and raw.is_another(name):
            raise IdentityError(
                f"raw file {raw.url(name)} is not the one that {dataset.folder} was made from; tokenize again"
            )
        damaged += wrong
    return RoundTrip(exact, lossy, tuple(damaged))


def _draw(dataset: ShardedDataset, count: int, rng: np.random.Generator) -> dict[str, list[tuple[int, list[int]]]]:
    """Raw file -> (record, its ids with the end-of-text)."""
    drawn: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    shards = rng.permutation(len(dataset.entries))[:_SHARDS].tolist()
    for place, k in enumerate(shards):
        spans = spans_of(dataset, k)
        missing = count - sum(map(len, drawn.values()))
        wanted = -(-missing // (len(shards) - place))
        for head in rng.permutation(spans.heads).tolist():
            file, record = spans.document(head)
            if wanted and (file in drawn or len(drawn) < _FILES) and (ids := _document(dataset, k, spans, head)):
                drawn[file].append((record, ids))
                wanted -= 1
    return drawn


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
        spans = spans_of(dataset, k)
        later = spans.heads
    return ids + shard_tokens(dataset, k)[begin : int(spans.begin[later[0]])].tolist()
