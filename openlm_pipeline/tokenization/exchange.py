"""Both stages on workers that share no disk: what they hand on goes through a folder of an object store, the exchange.

Stage 1: a worker tokenizes a raw file, or a part of a large one, in a scratch folder of its own, and sends the stream
with what is beside it. The streams of parts are not joined.

Stage 2 is two shuffles, each in two passes: first of the documents' lengths, which gives each its token of the global
order, then of the documents. *Place*: for a unit, which is some streams, find the places of its documents in the order,
and deal out their lengths to blocks of places. *Sum*: add up the lengths of a block, in the order of places. *Scatter*:
read the streams of a unit one after the other, and deal out each document to the group of shards where the order has
it. *Gather*: fetch what was dealt to a group, put it in its place, write the group's shards and send them to where the
dataset is published. The order is the same function of document counts and seed as on one machine, so the bytes are the
same. The client has none of its tables: it writes the index of documents as it reads them from the exchange.

A worker's disk holds the stream of a raw file or part, or one group of shards: about a thirty-second of the dataset.
What is done is noted in the exchange; whoever starts again goes on from there. There is an object for each pair of a
unit and a group; for fewer than 300 million documents at most 64 x 32, and two for each pair of a unit and a block.
"""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from openlm_pipeline.corpus.discovery import RawFile
from openlm_pipeline.corpus.formats import Part
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.ordering.permutation import unpermute_array
from openlm_pipeline.pools import Call, TaskProgress
from openlm_pipeline.shards.format import SampleFormat
from openlm_pipeline.storage import copies
from openlm_pipeline.storage.files import make_folder, sha256_file, unsealed, write_sealed
from openlm_pipeline.storage.remote import (
    download,
    file_system,
    join,
    names_in,
    open_remote,
    public,
    read_json_at,
    remote_size,
    remove,
    storage_errors,
    upload,
)
from openlm_pipeline.tokenization.documents import (
    INDEX_DTYPE,
    KINDS,
    FileTokens,
    PartTokens,
    finished_part,
    join_parts,
    part_stem,
    read_result,
    tokenize_part,
)
from openlm_pipeline.tokenizers.tokenizer import TokenizerInfo, tokenizer_file

PARTS, UNITS, GROUPS, BLOCKS = 16, 64, 32, 32
"""Of one raw file, of all raw files, of all shards and of all documents; at most, but for `MOST_DOCUMENTS`."""
MOST_DOCUMENTS = 1 << 22
"""Of a block, and about those of a unit, which bounds a worker's memory to some 400 MiB."""
BLOCK_DOCUMENTS = 1 << 20
"""Fewer are not cut into blocks."""
_PART = re.compile(r"(.+)\.part-\d{5}\.tokens")
_BLOCK_TOKENS = 4 << 20
_ROWS = 1 << 16
_SHA256_BYTES = 32
_PLACE_COLUMNS, _ORDER_COLUMNS, _PIECE_COLUMNS = 2, 3, 5
"""Of a document: place in the order, tokens; first token in the order, tokens, record. Of a piece: first token in the
order, tokens skipped, tokens, file, record."""


def _scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="openlm-")


def _put(path: Path, url: str) -> None:
    """Send a file, unless the store has it."""
    if not copies.holds(url, copies.describe_file(path)):
        upload(path, url)


def _send(path: Path, url: str) -> None:
    """Send a file with the sha256 of its bytes after them."""
    digest = sha256_file(path)
    with path.open("ab") as f:
        f.write(bytes.fromhex(digest))
    upload(path, url)


def _fetch(url: str, path: Path) -> None:
    """Fetch what `_send` sent.

    Raises:
        DataError: it is damaged.
    """
    download(url, path)
    size = max(0, path.stat().st_size - _SHA256_BYTES)
    with path.open("rb+") as f:
        f.seek(size)
        recorded = f.read()
        f.truncate(size)
    if sha256_file(path) != recorded.hex():
        raise _altered(url)


def _altered(url: str) -> DataError:
    folder = public(url.rpartition("/")[0])
    return DataError(f"{public(url)} is damaged: remove the folder {folder}, and run the command again")


@dataclass(frozen=True)
class Exchange:
    """A folder of a store, for one dataset."""

    url: str

    def sizes(self) -> dict[str, int]:
        """Of all files of stage 1 that are there, by name."""
        fs, where = file_system(join(self.url, "streams"))
        with storage_errors(public(self.url), "can't be listed"):
            fs.invalidate_cache()
            found = fs.find(where, detail=True)
        sizes = {path[len(where.rstrip("/")) + 1 :]: int(about["size"]) for path, about in found.items()}
        cut: Counter[str] = Counter()
        for name, size in sizes.items():
            if part := _PART.fullmatch(name):
                cut[f"{part[1]}.tokens"] += size
        return {**cut, **sizes}

    def give_tokenizer(self, tokenizer: TokenizerInfo, folder: Path) -> None:
        """Put the tokenizer where workers find it."""
        _put(tokenizer_file(folder), self._tokenizer(tokenizer))

    def _tokenizer(self, tokenizer: TokenizerInfo) -> str:
        return join(self.url, f"tokenizer-{tokenizer.sha256}.json")

    def fetch(self, name: str, folder: Path, there: Mapping[str, int]) -> None:
        """Bring what the client needs of a finished raw file: its bad records, and what is recorded of it."""
        for kind in KINDS:
            if kind in ("quarantine.jsonl", "json") and f"{name}.{kind}" in there:
                download(join(self.url, f"streams/{name}.{kind}"), folder / f"{name}.{kind}")

    def call(
        self, dataset: Dataset, raw: RawFile, tokenizer: TokenizerInfo, part: Part | None = None, number: int = 0
    ) -> Call:
        """The task that tokenizes a raw file, or a part of one."""
        where = self._tokenizer(tokenizer), join(self.url, "streams")
        if part is None:
            return tokenize_away, dataset, raw, tokenizer, *where
        return tokenize_part_away, dataset, raw, part, number, tokenizer, *where

    def sum_up(self, dataset: Dataset, raw: RawFile, tokenizer: TokenizerInfo, count: int) -> Call:
        """The task that sums up the parts of a raw file."""
        return join_away, dataset, raw, count, tokenizer, join(self.url, "streams")

    def streams(self, files: list[FileTokens]) -> list["_Stream"]:
        """All token streams, in the order of `files`."""
        there = self.sizes()
        parts: dict[str, list[str]] = {file.name: [] for file in files}
        for name in sorted(there):
            if (m := _PART.fullmatch(name)) and m[1] in parts:
                parts[m[1]].append(name.removesuffix(".tokens"))
        found: list[_Stream] = []
        for number, file in enumerate(files):
            record = 0
            for stem in parts[file.name]:
                with _scratch() as scratch:
                    download(join(self.url, f"streams/{stem}.json"), Path(scratch, "part"))
                    made = read_result(PartTokens, Path(scratch, "part"))
                found.append(_Stream.of(number, stem, record, made))
                record += made.records
            if not parts[file.name]:
                found.append(_Stream.of(number, file.name, 0, file))
        return found


@dataclass(frozen=True)
class _Stream:
    """A token stream of a raw file or part in the exchange."""

    file: int
    """Number of the raw file."""
    stem: str
    first_record: int
    documents: int
    tokens: int
    tokens_sha256: str
    index_sha256: str | None

    @classmethod
    def of(cls, file: int, stem: str, record: int, made: FileTokens | PartTokens) -> "_Stream":
        return cls(file, stem, record, made.documents, made.tokens, made.tokens_sha256, made.index_sha256)


def tokenize_away(
    dataset: Dataset, raw: RawFile, tokenizer: TokenizerInfo, tokenizer_url: str, url: str, *, progress: TaskProgress
) -> FileTokens:
    """Stage 1 of a raw file on a worker without a shared disk."""
    from openlm_pipeline.tokenization.job import tokenize_whole

    with _scratch() as scratch:
        tokenizer_folder, folder = Path(scratch, "tokenizer"), Path(scratch, "streams")
        download(tokenizer_url, tokenizer_file(tokenizer_folder), sha256=tokenizer.sha256)
        made = tokenize_whole(dataset, raw, tokenizer, tokenizer_folder, folder, progress=progress)
        for kind in KINDS:  # `F.json` is the last
            upload(folder / f"{raw.name}.{kind}", join(url, f"{raw.name}.{kind}"))
        _remove_parts(url, raw.name, 0)
    return made


def _remove_parts(url: str, name: str, first: int, kind: str = "") -> None:
    """Remove what an attempt that cut a raw file otherwise left, from part `first` on; or one kind of its files."""
    folder, _, base = join(url, name).rpartition("/")
    for found in names_in(folder):
        part = re.fullmatch(rf"{re.escape(base)}\.part-(\d{{5}})\.(.+)", found)
        if part and int(part[1]) >= first and part[2].startswith(kind):
            remove(join(folder, found))


def tokenize_part_away(
    dataset: Dataset,
    raw: RawFile,
    part: Part,
    number: int,
    tokenizer: TokenizerInfo,
    tokenizer_url: str,
    url: str,
    *,
    progress: TaskProgress,
) -> PartTokens:
    """Stage 1 of a part of a raw file on a worker without a shared disk, unless it is done."""
    stem = part_stem(raw, number)
    with _scratch() as scratch:
        tokenizer_folder, folder = Path(scratch, "tokenizer"), Path(scratch, "streams")
        with suppress(MissingInputError):  # one of its files: then it is not done
            for kind in ("quarantine.jsonl", "json"):
                download(join(url, f"{stem}.{kind}"), folder / f"{stem}.{kind}")
            there = {folder / f"{stem}.{kind}": remote_size(join(url, f"{stem}.{kind}")) for kind in KINDS[:3]}
            if done := finished_part(dataset, raw, part, number, tokenizer, folder, there):
                return done
        (folder / f"{stem}.json").unlink(missing_ok=True)
        download(tokenizer_url, tokenizer_file(tokenizer_folder), sha256=tokenizer.sha256)
        made = tokenize_part(dataset, raw, part, number, tokenizer, tokenizer_folder, folder, progress=progress)
        for kind in KINDS:
            upload(folder / f"{stem}.{kind}", join(url, f"{stem}.{kind}"))
    return made


def join_away(
    dataset: Dataset, raw: RawFile, count: int, tokenizer: TokenizerInfo, url: str, *, progress: TaskProgress
) -> FileTokens:
    """Sum up the parts of a raw file, whose streams stay as they are; runs in a worker without a shared disk."""
    with _scratch() as scratch:
        folder = Path(scratch)
        for number in range(count):
            stem = part_stem(raw, number)
            for kind in KINDS[1:]:
                download(join(url, f"{stem}.{kind}"), folder / f"{stem}.{kind}")

        def stream(path: Path) -> BinaryIO:
            return open_remote(join(url, path.relative_to(folder).as_posix()))

        try:
            made = join_parts(dataset, raw, count, tokenizer, folder, progress=progress, streams=stream)
        except DataError:
            _remove_parts(url, raw.name, 0, "json")  # so that they are made again
            raise
        _remove_parts(url, raw.name, count)
        remove(join(url, f"{raw.name}.tokens"))
        for kind in KINDS[1:]:
            upload(folder / f"{raw.name}.{kind}", join(url, f"{raw.name}.{kind}"))
    return made


@dataclass(frozen=True)
class Shuffle:
    """Stage 2 of a dataset through an exchange."""

    exchange: Exchange
    key: str
    """Of what is packed: another identity has other pieces."""
    sample_format: SampleFormat
    samples_per_shard: int
    samples: int
    seed: int
    documents: int
    documents_per_block: int
    source: str
    pad_id: int | None
    target: str
    """Where the shards go."""

    @property
    def work(self) -> str:
        return join(self.exchange.url, f"packing-{self.key}")

    @property
    def shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

    @property
    def shards_per_group(self) -> int:
        return -(-self.shards // GROUPS)

    @property
    def group_tokens(self) -> int:
        return self.shards_per_group * self.samples_per_shard * self.sample_format.sample_tokens

    @property
    def groups(self) -> int:
        return -(-self.shards // self.shards_per_group)

    @property
    def blocks(self) -> int:
        return -(-self.documents // self.documents_per_block)

    def prepare(self, files: list[FileTokens]) -> dict[str, "_Unit"]:
        """Put what the units are into the exchange; the units by their numbers."""
        streams = self.exchange.streams(files)
        first_ids = np.cumsum([0, *(stream.documents for stream in streams)])
        first_tokens = np.cumsum([0, *(stream.tokens for stream in streams)])
        units_wanted = max(UNITS, self.documents // MOST_DOCUMENTS)
        of_unit = first_tokens[:-1] // max(1, -(-int(first_tokens[-1]) // units_wanted))
        units = {}
        with _scratch() as scratch:
            self._put_json(Path(scratch, "names.json"), {"names": [file.name for file in files]})
            for number, found in enumerate(np.unique(of_unit)):
                first, last = np.searchsorted(of_unit, found), np.searchsorted(of_unit, found, side="right")
                unit = _Unit(int(first_ids[first]), streams[first:last])
                self._put_json(Path(scratch, f"unit-{number}.json"), asdict(unit))
                units[str(number)] = unit
        return units

    def unit(self, number: int) -> "_Unit":
        made = self._json(f"unit-{number}.json")
        return _Unit(made["first_id"], [_Stream(**stream) for stream in made["streams"]])

    def names(self) -> list[str]:
        """Of the raw files."""
        return self._json("names.json")["names"]

    def _put_json(self, path: Path, value: dict[str, Any]) -> None:
        write_sealed(path, value)
        _put(path, join(self.work, path.name))

    def _json(self, name: str) -> dict[str, Any]:
        return unsealed(read_json_at(url := join(self.work, name)), public(url))

    def done(self, task: str) -> Any:
        """What a task gave, None while it is not done."""
        note = read_json_at(url := join(self.work, f"{task}.done.json"))
        return None if note is None else unsealed(note, public(url))["result"]

    def note(self, task: str, result: Any, scratch: Path) -> Any:
        """Note that a task is done, and give its result."""
        write_sealed(scratch / "done.json", {"result": result})
        upload(scratch / "done.json", join(self.work, f"{task}.done.json"))
        return result

    def write_index(self, units: Mapping[str, "_Unit"], files: list[FileTokens], path: Path) -> None:
        """Write the index of documents from what `scatter` left of each unit."""
        from openlm_pipeline.tokenization.packing import write_index

        def tables() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for number, unit in units.items():
                digest = hashlib.sha256()
                with open_remote(url := join(self.work, f"order-{number}")) as table:
                    for stream in unit.streams:
                        for at in range(0, stream.documents, _ROWS):
                            count = min(_ROWS, stream.documents - at)
                            data = table.read(size := count * _ORDER_COLUMNS * INDEX_DTYPE.itemsize)
                            if len(data) < size:
                                raise _altered(url)
                            digest.update(data)
                            rows = np.frombuffer(data, INDEX_DTYPE)
                            yield np.full(count, stream.file), rows.reshape(count, _ORDER_COLUMNS)
                    if table.read() != digest.digest():
                        raise _altered(url)

        write_index(path, [file.name for file in files], tables())

    def clear(self) -> None:
        """Remove the pieces."""
        remove(self.work)


@dataclass(frozen=True)
class _Unit:
    """Some streams one after the other."""

    first_id: int
    """Of its first document, counted through all streams."""
    streams: list[_Stream]

    @property
    def documents(self) -> int:
        return sum(stream.documents for stream in self.streams)

    @property
    def tokens(self) -> int:
        return sum(stream.tokens for stream in self.streams)


def _damaged(url: str, problem: str = "its sha256 is not the recorded one") -> DataError:
    return DataError(f"{public(url)} is damaged: {problem}; remove the .json beside it to make it again")


def _documents(shuffle: Shuffle, unit: _Unit, scratch: Path) -> np.ndarray:
    """(record, tokens) of the documents of a unit: int64[n, 2].

    Raises:
        DataError: an index of stage 1 is damaged.
    """
    found, path = [np.zeros((0, 2), INDEX_DTYPE)], scratch / "documents"
    for stream in unit.streams:
        url = join(shuffle.exchange.url, f"streams/{stream.stem}.documents")
        download(url, path)
        if stream.index_sha256 not in (None, sha256_file(path)):
            raise _damaged(url)
        rows = np.fromfile(path, INDEX_DTYPE).reshape(-1, 2)
        if len(rows) != stream.documents or rows[:, 1].sum() != stream.tokens:
            raise _damaged(url, f"it has {len(rows)} documents of {rows[:, 1].sum()} tokens in all")
        found.append(rows + [stream.first_record, 0])
        path.unlink()
    return np.concatenate(found)


def _places(shuffle: Shuffle, unit: _Unit) -> np.ndarray:
    """Of a unit's documents in the order."""
    ids = np.arange(unit.first_id, unit.first_id + unit.documents)
    return unpermute_array(ids, shuffle.documents, shuffle.seed)


def place(shuffle: Shuffle, number: int, *, progress: TaskProgress) -> list[int]:
    """Deal out the lengths of a unit's documents to blocks of places; the blocks that got some; runs in a worker.

    Raises:
        DataError: an index of stage 1 is damaged.
    """
    unit = shuffle.unit(number)
    with _scratch() as folder:
        scratch = Path(folder)
        places = _places(shuffle, unit)
        rows = np.stack([places, _documents(shuffle, unit, scratch)[:, 1]], axis=1)
        of_block = places // shuffle.documents_per_block
        blocks = np.unique(of_block).tolist()
        for block in blocks:
            rows[of_block == block].tofile(scratch / "places")
            _send(scratch / "places", join(shuffle.work, f"{number}.{block}.places"))
        return shuffle.note(f"place-{number}", blocks, scratch)


def add_up(shuffle: Shuffle, block: int, units: list[int], *, progress: TaskProgress) -> int:
    """Find where in a block of places each of its documents begins, for each unit; runs in a worker.

    Args:
        units: those that have documents in it.

    Returns:
        Tokens of the block.

    Raises:
        DataError: documents are missing, or what was dealt is damaged.
    """
    first = block * shuffle.documents_per_block
    count = min(shuffle.documents_per_block, shuffle.documents - first)
    with _scratch() as folder:
        scratch = Path(folder)
        lengths = np.memmap(scratch / "lengths", INDEX_DTYPE, "w+", shape=(count,))
        lengths[:] = -1
        for unit in units:
            path = scratch / f"{unit}.places"
            _fetch(join(shuffle.work, f"{unit}.{block}.places"), path)
            places, tokens = np.fromfile(path, INDEX_DTYPE).reshape(-1, _PLACE_COLUMNS).T
            lengths[places - first] = tokens
        if (lengths < 0).any():
            raise DataError(
                f"documents of block {block} are missing in {public(shuffle.work)}: remove that folder, and run the "
                "command again"
            )
        ends = np.cumsum(lengths, out=lengths)
        for unit in units:
            places, tokens = np.fromfile(scratch / f"{unit}.places", INDEX_DTYPE).reshape(-1, _PLACE_COLUMNS).T
            (ends[places - first] - tokens).tofile(scratch / "starts")
            _send(scratch / "starts", join(shuffle.work, f"{unit}.{block}.starts"))
        return shuffle.note(f"block-{block}", int(ends[-1]), scratch)


def _order(shuffle: Shuffle, number: int, unit: _Unit, blocks: list[int], scratch: Path) -> np.ndarray:
    """(first token in the order, tokens, record) of a unit's documents: int64[n, 3].

    Args:
        blocks: first token of each block.
    """
    records, lengths = _documents(shuffle, unit, scratch).T
    of_block = _places(shuffle, unit) // shuffle.documents_per_block
    starts = np.zeros(len(lengths), INDEX_DTYPE)
    for block in np.unique(of_block).tolist():
        _fetch(join(shuffle.work, f"{number}.{block}.starts"), scratch / "starts")
        starts[of_block == block] = blocks[block] + np.fromfile(scratch / "starts", INDEX_DTYPE)
    return np.stack([starts, lengths, records], axis=1)


def scatter(shuffle: Shuffle, number: int, blocks: list[int], *, progress: TaskProgress) -> list[int]:
    """Deal out the documents of a unit to groups of shards; the groups that got some; runs in a worker.

    Args:
        blocks: first token of each block of places.

    Raises:
        DataError: a stream is not what stage 1 wrote, or what the block gave is damaged.
    """
    dtype, unit = shuffle.sample_format.numpy_dtype, shuffle.unit(number)
    with _scratch() as scratch:
        rows = _order(shuffle, number, unit, blocks, Path(scratch))
        table = Path(scratch, "order")
        rows.astype(INDEX_DTYPE).tofile(table)
        _send(table, join(shuffle.work, f"order-{number}"))
        table.unlink()
        outs: dict[int, tuple[Any, Any]] = {}
        try:
            first = read = 0
            for stream in unit.streams:
                url, digest = join(shuffle.exchange.url, f"streams/{stream.stem}.tokens"), hashlib.sha256()
                with open_remote(url) as data, storage_errors(public(url), "can't be read"):
                    for block, ids in _blocks(data, rows[first : first + stream.documents], dtype, digest, url):
                        _deal(ids, block, stream.file, shuffle, Path(scratch), outs)
                        read += ids.nbytes
                        progress({"raw_bytes": read})
                first += stream.documents
                if digest.hexdigest() != stream.tokens_sha256:
                    raise _damaged(url)
        finally:
            for pair in outs.values():
                for out in pair:
                    out.close()
        groups = sorted(outs)
        for group in groups:
            for kind in ("tokens", "pieces"):
                path = Path(scratch, f"{group}.{kind}")
                _send(path, join(shuffle.work, f"{number}.{group}.{kind}"))
                path.unlink()
        return shuffle.note(f"unit-{number}", groups, Path(scratch))


def _blocks(stream: Any, rows: np.ndarray, dtype: np.dtype, digest: Any, url: str) -> Any:
    """(rows, ids) of some whole documents after the other."""
    at = 0
    while at < len(rows):
        ends = np.cumsum(rows[at : at + _ROWS, 1])
        count = max(1, int(np.searchsorted(ends, _BLOCK_TOKENS, side="right")))
        size = int(ends[count - 1]) * dtype.itemsize
        data = stream.read(size)
        if len(data) < size:
            raise DataError(f"{public(url)} ends before its document {at + count}: it is damaged")
        digest.update(data)
        yield rows[at : at + count], np.frombuffer(data, dtype)
        at += count


def _deal(
    ids: np.ndarray, rows: np.ndarray, file: int, shuffle: Shuffle, scratch: Path, outs: dict[int, tuple[Any, Any]]
) -> None:
    """Append documents to the files of their groups, cut where a group ends."""
    size = shuffle.group_tokens
    starts, lengths, records = rows.T
    offsets = np.cumsum(lengths) - lengths
    first, last = starts // size, (starts + lengths - 1) // size
    times = last - first + 1
    of = np.repeat(np.arange(len(rows)), times)
    group = first[of] + np.arange(len(of)) - np.repeat(np.cumsum(times) - times, times)
    begin = np.maximum(starts[of], group * size)
    skipped = begin - starts[of]
    count = np.minimum((starts + lengths)[of], (group + 1) * size) - begin
    source = offsets[of] + skipped
    pieces = np.stack([begin, skipped, count, np.full(len(of), file), records[of]], axis=1)
    for number in np.unique(group).tolist():
        if number >= shuffle.groups:
            continue  # of the tail alone
        mine = np.flatnonzero(group == number)
        if number not in outs:
            outs[number] = tuple((scratch / f"{number}.{kind}").open("ab") for kind in ("tokens", "pieces"))
        tokens, index = outs[number]
        parts = [ids[a : a + n] for a, n in zip(source[mine].tolist(), count[mine].tolist())]
        tokens.write(np.concatenate(parts).tobytes())
        index.write(np.ascontiguousarray(pieces[mine], INDEX_DTYPE).tobytes())


def gather(
    shuffle: Shuffle, group: int, units: list[int], num_tokens: int, *, progress: TaskProgress
) -> list[dict[str, Any]]:
    """Make the shards of a group from what was dealt to it, and send them; their entries; runs in a worker.

    Args:
        units: those that have pieces for it.
        num_tokens: of the whole order.

    Raises:
        DataError: pieces are missing, or damaged.
    """
    from openlm_pipeline.tokenization.packing import Spans, provenance, write_shard_files  # and with it Arrow

    sample_format = shuffle.sample_format
    width, dtype = sample_format.sample_tokens, sample_format.numpy_dtype
    begin = group * shuffle.group_tokens
    end = min(begin + shuffle.group_tokens, num_tokens)
    with _scratch() as scratch:
        tokens = np.memmap(Path(scratch, "all"), dtype, "w+", shape=(end - begin,))
        found, read = [], 0
        for unit in units:
            data, index = Path(scratch, "tokens"), Path(scratch, "pieces")
            for path in (data, index):
                _fetch(join(shuffle.work, f"{unit}.{group}.{path.name}"), path)
            pieces = np.fromfile(index, INDEX_DTYPE).reshape(-1, _PIECE_COLUMNS)
            ids = np.memmap(data, dtype, "r") if data.stat().st_size else np.zeros(0, dtype)
            at = 0
            for place, count in zip((pieces[:, 0] - begin).tolist(), pieces[:, 2].tolist()):
                tokens[place : place + count] = ids[at : at + count]
                at += count
            found.append(pieces)
            read += data.stat().st_size
            data.unlink()
            index.unlink()
            progress({"raw_bytes": read})
        pieces = np.concatenate(found)
        pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]
        ends = pieces[:, 0] + pieces[:, 2]
        if pieces[0, 0] != begin or ends[-1] != end or (ends[:-1] != pieces[1:, 0]).any():
            raise DataError(
                f"pieces of group {group} are missing in {public(shuffle.work)}: remove that folder, and run "
                "the command again"
            )
        names = shuffle.names()
        out = Path(scratch, "out")
        make_folder(out)
        made = []
        first_shard = group * shuffle.shards_per_group
        for number in range(first_shard, min(first_shard + shuffle.shards_per_group, shuffle.shards)):
            first = number * shuffle.samples_per_shard
            count = min(shuffle.samples_per_shard, shuffle.samples - first)
            a, b = first * width, min((first + count) * width, end)
            of = slice(int(np.searchsorted(ends, a, side="right")), int(np.searchsorted(pieces[:, 0], b, side="left")))
            part_begin = np.maximum(pieces[of, 0], a)
            spans = Spans(pieces[of, 3], pieces[of, 4], part_begin, pieces[of, 1] + part_begin - pieces[of, 0])
            own = np.asarray(tokens[a - begin : b - begin])
            if padding := count * width - len(own):
                own = np.append(own, np.full(padding, shuffle.pad_id, own.dtype))
            table = provenance(names, spans, a, b, width)
            entry = write_shard_files(
                out, number, own.reshape(count, width), first, sample_format, table, shuffle.source
            )
            for name in (entry.sums, entry.provenance, entry.tar):
                upload(out / name, join(shuffle.target, name))
                (out / name).unlink()
            made.append(asdict(entry))
        return shuffle.note(f"group-{group}", made, Path(scratch))
