"""From steps to documents and raw text, and from documents and texts to the steps that read them."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError, nearest
from openlm_pipeline.lineage.run_order import RunOrder, Seen, Source
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.document_index import Place, find_document, has_provenance
from openlm_pipeline.shards.inspect import tokenizer_of
from openlm_pipeline.shards.opening import segments_of
from openlm_pipeline.shards.provenance import spans_of
from openlm_pipeline.shards.round_trip import RawRecords, first_difference
from openlm_pipeline.shards.search import find_text
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenization.documents import record_offsets
from openlm_pipeline.tokenizers.engine import load_any
from openlm_pipeline.tokenizers.tokenizer import tokenizer_file

_SHOWN = 60
"""Characters of a part that are shown."""


@dataclass(frozen=True)
class Part:
    """A part of a sample: of one document, or padding."""

    source: str
    """Name of its dataset and version."""
    sample: int
    """Number in the dataset."""
    start: int
    """Token of the sample where it starts."""
    tokens: int
    file: str | None
    """Name of the raw file; None for padding, and where no provenance says it."""
    record: int | None
    """Number in the raw file, blank lines not counted."""
    document_start: int | None
    """Token of the document where the part starts."""
    offset: int | None
    """Byte of the raw file's decompressed content where the record begins, in Parquet the row; None where nothing says
    it any more."""
    text: str | None
    """How it begins; None without the tokenizer, and where the shards of a whole batch would have to be fetched."""
    step: int | None = None
    row: int | None = None
    """In the step's batch, from 0."""
    left_out: str | None = None
    """Why the step was not learned from."""
    raw: str | None = None
    """Text of the whole record in the raw file, where it was asked for."""


@dataclass(frozen=True)
class TracedDocument:
    """A document, or the places of a text in one, and each time that it was read."""

    source: str
    file: str | None
    record: int | None
    offset: int | None
    """As of `Part`."""
    samples: list[int]
    """Those of the dataset that have a part of it."""
    tokens: int | None
    """Of the document, end-of-text included; None of a text."""
    seen: list[Seen] = field(default_factory=list)
    note: str = ""
    """Why it is in no sample, or not in all."""

    @property
    def learned(self) -> list[Seen]:
        """The times that count: trained and not left out."""
        return [s for s in self.seen if s.trained and s.left_out is None]


@dataclass
class _Segment:
    """Shards of a dataset of the run, and what they came from."""

    source: Source
    shards: ShardedDataset
    first: int
    """Number in the dataset of their first sample."""
    home: Home

    @cached_property
    def is_known(self) -> bool:
        """Whether anything says of which documents they are made."""
        return has_provenance(self.shards)

    @cached_property
    def tokenizer(self) -> Path:
        """`tokenizer.json` of the shards; of OpenLM's, which don't say which it was, the recipe's.

        Raises:
            MissingInputError: it is not there.
        """
        if self.shards.info["tokenizer"]["sha256"]:
            return tokenizer_of(self.shards.folder)
        path = tokenizer_file(self.home.tokenizer(self.source.dataset.tokenizer.name))
        if not path.is_file():
            raise MissingInputError(f"there is no {path} to read {self.source.name} with")
        return path

    def beginning(self, token: int, tokens: int, fetch: bool) -> str | None:
        """How a part of a sample begins; None without the tokenizer, and where the shard would have to be fetched."""
        sample, start = divmod(token, self.shards.format.sample_tokens)
        if not fetch and not self.shards.file(self._shard(sample)).exists():
            return None
        try:
            decoder = load_any(self.tokenizer)
        except MissingInputError:
            return None
        ids = self.shards[sample][start : start + min(tokens, 2 * _SHOWN)]
        return decoder.decode(ids.tolist(), skip_special_tokens=False)[:_SHOWN]

    def _shard(self, sample: int) -> int:
        return int(self.shards.shards_of(np.array([sample]))[0])

    def offsets(self, file: str, records: Collection[int]) -> dict[int, int | None]:
        folder = self.home.tokenized(self.shards.info["name"], self.shards.info["version"])
        return record_offsets(folder, file, records)

    def offset(self, file: str | None, record: int | None) -> int | None:
        return None if file is None or record is None else self.offsets(file, [record]).get(record)

    def parts(self, begin: int, end: int) -> list[tuple[int, int, str | None, int | None, int | None]]:
        """Of the tokens begin..end of the shards, all of one sample, the parts of documents: first token and number of
        tokens, file, record, and token of the document where the part starts. Padding has no file; nor has the one part
        of shards without provenance."""
        if not self.is_known:
            return [(begin, end - begin, None, None, None)]
        width = self.shards.format.sample_tokens
        k = self._shard(begin // width)
        spans, first = spans_of(self.shards, k, begin // width), int(self.shards.shard_sizes[:k].sum()) * width
        rows = np.flatnonzero((spans.begin < end - first) & (spans.begin + spans.length > begin - first)).tolist()
        found = [
            (first + int(spans.begin[r]), int(spans.length[r]), *spans.document(r), int(spans.document_start[r]))
            for r in rows
        ]
        covered = found[-1][0] + found[-1][1] if found else begin
        return [*found, *([(covered, end - covered, None, None, None)] if covered < end else [])]

    @cached_property
    def raw(self) -> RawRecords:
        """
        Raises:
            MissingInputError: the raw files, or the tokenizer, are not there.
        """
        dataset = self.source.dataset
        if not dataset.source.files or not self.is_known:
            raise MissingInputError(
                f"{dataset.name} is ready-made: nothing says which raw records its samples were made of"
            )
        how = {"map": dataset.source.map, "offsets": self.offsets}
        return RawRecords(self.shards, discover(dataset, self.home), dataset.source.text_key, **how)


class Trace:
    """Traces through one run."""

    def __init__(self, order: RunOrder) -> None:
        self.order = order
        self._segments = {
            source.name: [_Segment(source, *segment, order.home) for segment in segments_of(source.opened)]
            for source in order.sources.values()
        }

    def _segment(self, source: str, sample: int) -> _Segment | None:
        """That which has a sample of a dataset; None of synthetic samples."""
        return next((s for s in reversed(self._segments[source]) if s.first <= sample), None)

    def _all_segments(self) -> Iterator[_Segment]:
        return itertools.chain(*self._segments.values())

    def step(self, step: int, row: int | None = None) -> Iterator[Part]:
        """What a step read, by row of its batch.

        Raises:
            ConfigError: there is no such step or row.
            DataError: a shard, or its provenance, is damaged.
        """
        batch = self.order.batch_of(step)
        rows = range(len(batch.samples))
        if row is not None and row not in rows:
            raise ConfigError(f"a batch has the rows 0 to {len(rows) - 1}, and no row {row}")
        left_out = batch.stretch.left_out.get(step)
        for r in rows if row is None else [row]:
            source = self.order.sources[batch.contents[r]]
            for part in self.parts(source, int(batch.samples[r]), fetch=row is not None):
                yield replace(part, step=step, row=r, left_out=left_out)

    def parts(self, source: Source, sample: int, fetch: bool = True) -> Iterator[Part]:
        """The parts of a sample of a dataset.

        Args:
            fetch: a shard that is in a store alone, for how they begin.
        """
        segment, width = self._segment(source.name, sample), source.opened.info["seq_len"] + 1
        if segment is None:
            yield Part(source.name, sample, 0, width, None, None, None, None, None)
            return
        begin = (sample - segment.first) * width
        for token, tokens, file, record, start in segment.parts(begin, begin + width):
            where = file, record, start, segment.offset(file, record)
            yield Part(source.name, sample, token - begin, tokens, *where, segment.beginning(token, tokens, fetch))

    def document(self, file: str, record: int, until: int | None = None) -> list[TracedDocument]:
        """The document of a raw file's record, in each dataset of the run that has it.

        Args:
            until: tokens, as of `RunOrder.seen`.

        Raises:
            ConfigError: no dataset was made from such a file.
            MissingInputError: no dataset has such a document.
        """
        found, files = [], set[str]()
        for segment in self._all_segments():
            own = segment.shards.info.get("inputs", {})
            files |= own.keys()
            if file in own and (place := find_document(segment.shards, file, record)):
                found.append(self._traced(segment, file, record, place, until))
        if file not in files:
            why = nearest(file, sorted(files)[:1000], "some are") if files else "nothing says what they were made from"
            raise ConfigError(f"no dataset of {self.order.name} was made from a raw file {file}; {why}")
        if not found:
            raise MissingInputError(
                f"no dataset of {self.order.name} has record {record} of {file}: it was quarantined, dropped by the "
                "source's map, or is not there (blank lines have no number)"
            )
        return found

    def _traced(self, segment: _Segment, file: str, record: int, place: Place, until: int | None) -> TracedDocument:
        source, width = segment.source, segment.shards.format.sample_tokens
        own = place.samples(segment.shards) + segment.first
        samples = own[own < len(source.opened)]
        note = ""
        if len(samples) * width < place.start % width + place.tokens:
            where = "past max_tokens" if len(samples) < len(own) else "among the last, which fill no sample"
            note = f"{'its last tokens are' if len(samples) else 'it is'} {where}"
        seen = list(self.order.seen(source.content, samples, until))
        offset = segment.offset(file, record)
        return TracedDocument(source.name, file, record, offset, samples.tolist(), place.tokens, seen, note)

    def text(
        self, text: str, until: int | None = None, told: Callable[[str, int, int], None] = lambda *_: None
    ) -> Iterator[TracedDocument]:
        """The documents that an exact text stands in, with the samples that have a part of it, and their steps.

        Args:
            until: tokens, as of `RunOrder.seen`.
            told: called with dataset, shards that were searched, and all of its shards.

        Raises:
            ConfigError: there is nothing to search for.
            MissingInputError: a tokenizer is not there.
        """
        if not text:
            raise ConfigError("--text is empty: give the text to search for")
        for segment in self._all_segments():
            source, shards, first = segment.source, segment.shards, segment.first
            name, width = source.name, shards.format.sample_tokens
            by_document: dict[tuple[str | None, int | None], dict[int, None]] = {}
            of = len(shards.entries)
            for hit in find_text(shards, segment.tokenizer, text, lambda k, name=name, of=of: told(name, k, of)):
                samples = range(first + hit.begin // width, first - (-hit.end // width))
                known = by_document.setdefault(segment.parts(hit.begin, hit.begin + 1)[0][2:4], {})
                known |= dict.fromkeys(s for s in samples if s < len(source.opened))
            for (file, record), samples in by_document.items():
                if samples:
                    seen = self.order.seen(source.content, np.array(list(samples), np.int64), until)
                    offset = segment.offset(file, record)
                    yield TracedDocument(name, file, record, offset, list(samples), None, list(seen))

    def documents_of(self, source: Source, sample: int) -> list[tuple[str, str | None, int | None]]:
        """(source, file, record) of each document that a sample has a part of; no token of it is read."""
        if (segment := self._segment(source.name, sample)) is None:
            return [(source.name, None, None)]
        width = segment.shards.format.sample_tokens
        begin = (sample - segment.first) * width
        return list(dict.fromkeys((source.name, *part[2:4]) for part in segment.parts(begin, begin + width)))

    def raw(self, parts: Iterable[Part], *, check: bool = False) -> Iterator[Part]:
        """Parts with the text of their raw records; each raw file is read once.

        Args:
            check: tokenize the records again and compare.

        Raises:
            DataError: names the first part whose tokens are not those of its raw record.
            MissingInputError: a raw file, or what says which record it was, is not there.
        """
        parts = list(parts)
        wanted: dict[tuple[str, int, str | None], list[int]] = {}
        for part in parts:
            segment = self._segment(part.source, part.sample)
            if segment is None or part.file is None and not segment.is_known:
                raise MissingInputError(f"nothing says which raw records the samples of {part.source} were made of")
            if part.file is not None:
                wanted.setdefault((part.source, segment.first, part.file), []).append(part.record)
        made = {
            (source, first, file): self._segment(source, first).raw.read(file, set(records))
            for (source, first, file), records in wanted.items()
        }
        for part in parts:
            if part.file is None:
                yield part  # padding
                continue
            segment = self._segment(part.source, part.sample)
            of = made[part.source, segment.first, part.file][part.record]
            if differs := of if isinstance(of, str) else check and self._difference(part, segment, of[1]):
                where = f"step {part.step}, row {part.row}, " if part.step is not None else ""
                another = "; the raw file is not the one that was tokenized" * segment.raw.is_another(part.file)
                raise DataError(f"{where}sample {part.sample} of {part.source}: {differs}{another}")
            yield replace(part, raw=of[0])

    def _difference(self, part: Part, segment: _Segment, expected: Sequence[int]) -> str | None:
        ids = segment.source.opened[part.sample][part.start : part.start + part.tokens].tolist()
        first = part.document_start
        return first_difference(part.file, part.record, ids, expected[first : first + part.tokens], first)

    def document_parts(self, document: TracedDocument) -> Iterator[Part]:
        """The parts of samples that are of one document, in its order."""
        source = next(s for s in self.order.sources.values() if s.name == document.source)
        for sample in document.samples:
            for part in self.parts(source, sample):
                if (part.file, part.record) == (document.file, document.record):
                    yield part
