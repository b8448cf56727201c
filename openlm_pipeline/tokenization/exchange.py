"""Both stages on workers that share no disk: what they hand on goes through a folder of an object store, the exchange.

Stage 1: a worker tokenizes a raw file, or a part of a large one, in a scratch folder of its own, and sends the stream
with what is beside it. The streams of parts are not joined.

Stage 2 is a shuffle in two passes. *Scatter*: for some raw files, read their streams one after the other, and deal out
each document to the group of shards where the global order has it. *Gather*: fetch what was dealt to a group, put it in
its place, write the group's shards and send them to where the dataset is published. The order is the same function of
document counts and seed as on one machine, so the bytes are the same. Its tables, and the sizes of all documents, are
on the disk of the client: 56 bytes for each document.

A worker's disk holds the stream of a raw file or part, or one group of shards: about a thirty-second of the dataset.
What is done is noted in the exchange; whoever starts again goes on from there. There is an object for each pair of a
group and a unit of raw files, at most 64 x 32.
"""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import orjson

from openlm_pipeline.corpus.discovery import RawFile
from openlm_pipeline.corpus.formats import Part
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.pools import Call, TaskProgress
from openlm_pipeline.shards.format import SampleFormat
from openlm_pipeline.shards.manifest import ShardEntry
from openlm_pipeline.storage import copies
from openlm_pipeline.storage.files import make_folder, write_json
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
    tokenize_part,
)
from openlm_pipeline.tokenizers.tokenizer import TokenizerInfo, tokenizer_file

if TYPE_CHECKING:
    from openlm_pipeline.tokenization.packing import DocumentOrder

PARTS, UNITS, GROUPS = 16, 64, 32
"""At most, of one raw file, of all raw files and of all shards."""
_PART = re.compile(r"(.+)\.part-\d{5}\.tokens")
_BLOCK_TOKENS = 4 << 20
_ROWS = 1 << 16
_ORDER_COLUMNS, _PIECE_COLUMNS = 3, 5
"""Of a document: place in the order, tokens, record. Of a piece: place, tokens skipped, tokens, file, record."""


def _scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="openlm-")


def _put(path: Path, url: str) -> None:
    """Send a file, unless the store has it."""
    if not copies.holds(url, copies.describe_file(path)):
        upload(path, url)


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
        """Bring what the client needs of a finished raw file, all but its stream and the offsets of its records."""
        for kind in KINDS:
            if kind not in ("tokens", "offsets") and f"{name}.{kind}" in there:
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

    def streams(self, files: list[FileTokens]) -> list[tuple[int, str, int, int, str]]:
        """(number of the raw file, object, documents, tokens, sha256) of all token streams, in order."""
        there, found = self.sizes(), []
        for number, file in enumerate(files):
            parts = sorted(name for name in there if (m := _PART.fullmatch(name)) and m[1] == file.name)
            if not parts:
                found.append((number, f"{file.name}.tokens", file.documents, file.tokens, file.tokens_sha256))
            for name in parts:
                made = read_json_at(join(self.url, f"streams/{name.removesuffix('tokens')}json"))
                found.append((number, name, *(made[key] for key in ("documents", "tokens", "tokens_sha256"))))
        return found


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

    def prepare(self, order: "DocumentOrder", files: list[FileTokens]) -> list[int]:
        """Put the order's tables into the exchange, those of each unit apart; the sizes of the units in bytes."""
        streams = self.exchange.streams(files)
        first_ids = np.cumsum([0, *(documents for _, _, documents, _, _ in streams)])
        first_tokens = np.cumsum([0, *(tokens for _, _, _, tokens, _ in streams)])
        of_unit = first_tokens[:-1] // max(1, -(-order.num_tokens // UNITS))
        units = [np.flatnonzero(of_unit == unit) for unit in np.unique(of_unit)]
        with _scratch() as scratch:
            self._put_json(Path(scratch, "names.json"), order.names)
            for number, numbers in enumerate(units):
                first, last = int(numbers[0]), int(numbers[-1]) + 1
                facts = [[i, name, documents, sha256] for i, name, documents, _, sha256 in streams[first:last]]
                self._put_json(Path(scratch, f"{number}.json"), facts)
                path = Path(scratch, f"{number}.order")
                begin, end = int(first_ids[first]), int(first_ids[last])
                with path.open("wb") as out:
                    for a in range(begin, end, _ROWS):
                        b = min(a + _ROWS, end)
                        lengths = np.diff(order.begins[a : b + 1])
                        rows = np.stack([order.starts[a:b], lengths, order.records[a:b]], axis=1)
                        out.write(rows.astype(INDEX_DTYPE).tobytes())
                _put(path, join(self.work, path.name))
                path.unlink()
        width = self.sample_format.numpy_dtype.itemsize
        return [int(first_tokens[numbers[-1] + 1] - first_tokens[numbers[0]]) * width for numbers in units]

    def _put_json(self, path: Path, value: Any) -> None:
        write_json(path, value)
        _put(path, join(self.work, path.name))

    def scattered(self, unit: int) -> list[int] | None:
        """The groups that a unit has pieces for, once it is dealt out."""
        done = read_json_at(join(self.work, f"{unit}.done.json"))
        return None if done is None else done["groups"]

    def gathered(self, group: int) -> list[ShardEntry] | None:
        """The shards of a group, once they are made."""
        done = read_json_at(join(self.work, f"group-{group}.json"))
        return None if done is None else [ShardEntry(**entry) for entry in done["shards"]]

    def clear(self) -> None:
        """Remove the pieces."""
        remove(self.work)


def scatter(shuffle: Shuffle, unit: int, *, progress: TaskProgress) -> list[int]:
    """Deal out the documents of a unit's raw files to groups of shards; runs in a worker.

    Raises:
        DataError: a stream is not what stage 1 wrote.
    """
    dtype, files = shuffle.sample_format.numpy_dtype, read_json_at(join(shuffle.work, f"{unit}.json"))
    with _scratch() as scratch:
        table = Path(scratch, "order")
        download(join(shuffle.work, f"{unit}.order"), table)
        rows = np.fromfile(table, INDEX_DTYPE).reshape(-1, _ORDER_COLUMNS)
        table.unlink()
        outs: dict[int, tuple[Any, Any]] = {}
        try:
            first = read = 0
            for number, name, documents, sha256 in files:
                url, digest = join(shuffle.exchange.url, f"streams/{name}"), hashlib.sha256()
                with open_remote(url) as stream, storage_errors(public(url), "can't be read"):
                    for block, ids in _blocks(stream, rows[first : first + documents], dtype, digest, url):
                        _deal(ids, block, number, shuffle, Path(scratch), outs)
                        read += ids.nbytes
                        progress({"raw_bytes": read})
                first += documents
                if digest.hexdigest() != sha256:
                    raise DataError(
                        f"{public(url)} is damaged: its sha256 is not the recorded one; remove the .json "
                        "beside it to make it again"
                    )
        finally:
            for pair in outs.values():
                for out in pair:
                    out.close()
        groups = sorted(outs)
        for group in groups:
            for kind in ("tokens", "pieces"):
                path = Path(scratch, f"{group}.{kind}")
                upload(path, join(shuffle.work, f"{unit}.{group}.{kind}"))
                path.unlink()
        write_json(Path(scratch, "done.json"), {"groups": groups})
        upload(Path(scratch, "done.json"), join(shuffle.work, f"{unit}.done.json"))
    return groups


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
) -> list[ShardEntry]:
    """Make the shards of a group from what was dealt to it, and send them; runs in a worker.

    Args:
        units: those that have pieces for it.
        num_tokens: of the whole order.

    Raises:
        DataError: pieces are missing.
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
                download(join(shuffle.work, f"{unit}.{group}.{path.name}"), path)
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
        names = read_json_at(join(shuffle.work, "names.json"))
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
            made.append(entry)
        path = Path(scratch, "done.json")
        path.write_bytes(orjson.dumps({"shards": [asdict(entry) for entry in made]}))
        upload(path, join(shuffle.work, f"group-{group}.json"))
    return made
