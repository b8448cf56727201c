"""Stage 1: one raw file -> one stream of token ids and an index of its documents.

Files of `tokenized/<dataset>/<version>/`, for a raw file F: `F.tokens` (ids, little-endian, end-of-text after each
document), `F.documents` (int64[n, 2]: record number, tokens with the end-of-text), `F.offsets` (int64[n]: the byte of
F's decompressed content, or the row, where the record begins), `F.quarantine.jsonl` (bad records), and `F.json`,
written last, with identity, counts, hashes and a seal over these. A file is done when its `F.json` says so for the same
identity. The first release wrote no offsets and no seal.

A large raw file is tokenized in parts, `F.part-00000.*` and so on, which are then joined; the result does not depend on
the cuts. Work that was killed redoes at most the parts it was in. Memory: about eight times the longest document, and
never less than some 250 MiB for the engines.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import orjson

from openlm_pipeline.corpus.discovery import RawFile, restat
from openlm_pipeline.corpus.excluded import read_excluded
from openlm_pipeline.corpus.maps import Counts, Drop, Mapped, added, load_map, map_identity
from openlm_pipeline.corpus.reader import (
    BadRecord,
    Part,
    Record,
    RecordReader,
    check_bad_fraction,
    quarantine_writer,
)
from openlm_pipeline.errors import ConfigError, DataError, IdentityError, MissingInputError, OpenLMError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.fingerprint import Tree, differences, fingerprint, settings_tree
from openlm_pipeline.pools import TaskProgress
from openlm_pipeline.shards.format import SampleFormat
from openlm_pipeline.storage.files import (
    atomic_writer,
    make_folder,
    read_json,
    read_sealed,
    rename,
    sha256_file,
    write_json,
    write_sealed,
)
from openlm_pipeline.storage.remote import sha256_url
from openlm_pipeline.tokenizers.engine import load_reference, make_engine, special_strings
from openlm_pipeline.tokenizers.engines import Encoded, EncodingError
from openlm_pipeline.tokenizers.tokenizer import TokenizerInfo, tokenizer_file

_Result = TypeVar("_Result")
STAGE_VERSION = 2
"""Raised when the same text and tokenizer would give another stream."""

_BATCH_CHARACTERS = 1 << 20
_COPY_BYTES = 1 << 22
INDEX_DTYPE = np.dtype("<i8")
KINDS = ("tokens", "documents", "offsets", "quarantine.jsonl", "json")


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """What is recorded of a raw file, or of a part of one."""

    identity: dict[str, Any]
    documents: int
    quarantined: int
    tokens: int
    """End-of-text tokens included."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    tokens_sha256: str
    engine: str
    """Which engine encoded it, and why that one."""
    seconds: float
    """Time that tokenizing took, summed over the parts."""
    content_bytes: int = 0
    """Decompressed bytes of the file; 0 in those of the first release."""
    bad_bytes: int = 0
    """Those of them in bad records."""
    index_sha256: str | None = None
    """The hash of `F.documents`; None as for `special_strings`."""
    offsets_sha256: str | None = None
    quarantine_sha256: str | None = None
    special_strings: int | None = None
    """How often the string of a special token, such as `<|endoftext|>`, stands in a document; None in what a release
    before this field wrote."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> documents that the source's `map`, or its `exclude`, left out."""
    changed: int = 0
    """Documents whose text it changed."""
    breakdown: dict[str, list[int]] = field(default_factory=dict)
    """Value of the source's `breakdown` -> documents, UTF-8 bytes of their text, tokens."""

    @property
    def records(self) -> int:
        """All that were read."""
        return self.documents + self.quarantined + sum(self.dropped.values())

    def content(self) -> dict[str, Any]:
        """What is written; of a source without a map or breakdown nothing of these."""
        return {k: v for k, v in asdict(self).items() if v or k not in ("dropped", "changed", "breakdown")}


@dataclass(frozen=True, kw_only=True)
class FileTokens(_Tokens):
    """A finished file of stage 1: the content of its `F.json`."""

    name: str
    stamp: str
    """The raw file's stamp when it was read: an equal one means that the content need not be hashed again."""

    @property
    def version(self) -> str:
        """Content hash of the stream and its document boundaries."""
        identity = {"max_bad_fraction": FIRST_MAX_BAD_FRACTION, **self.identity}
        return fingerprint({"tokens": self.tokens_sha256, "documents": self.documents, "identity": identity})


@dataclass(frozen=True, kw_only=True)
class PartTokens(_Tokens):
    """A finished part of a raw file: the content of its `F.part-NNNNN.json`."""

    lines: int
    raw_sha256: str | None
    """The hash of the whole raw file, where reading this part meant reading all of it."""
    first_bad: dict[str, Any] | None


@dataclass(frozen=True)
class _Paths:
    """The files of a raw file or of one of its parts."""

    tokens: Path
    documents: Path
    offsets: Path
    quarantine: Path
    done: Path

    @classmethod
    def of(cls, folder: Path, stem: str) -> "_Paths":
        return cls(*(folder / f"{stem}.{kind}" for kind in KINDS))

    def sizes_fit(self, made: FileTokens | PartTokens, token_bytes: int, elsewhere: Mapping[Path, int] = {}) -> bool:
        """Whether the files are there, of the sizes that `made` says; those of `elsewhere` may be there alone."""
        wanted = {self.tokens: made.tokens * token_bytes, self.documents: made.documents * 2 * INDEX_DTYPE.itemsize}
        if made.offsets_sha256 is not None:
            wanted[self.offsets] = made.documents * INDEX_DTYPE.itemsize
        sizes = {path: path.stat().st_size if path.exists() else elsewhere.get(path) for path in wanted}
        return self.quarantine.exists() and sizes == wanted


FIRST_MAX_BAD_FRACTION = 0.001
"""Stands in the version of each file: its identity once held the source's `max_bad_fraction`, of which this is the
default. That changes no token, so it is judged when a file is accepted; a file of that time keeps what it recorded."""

_NOT_TOKENS = {
    "name",
    "version",
    "extends",
    "max_tokens",
    "files",
    "shards",
    "origin",
    "weight",
    "max_bad_fraction",
    "on_bad_file",
    "exclude",
}
"""Fields of a source that change no token stream; what the files hold has its own hash."""


def files_tree(dataset: Dataset) -> Tree:
    """The source's settings that change its token streams."""
    return settings_tree(dataset.source, _NOT_TOKENS)


def _settings(dataset: Dataset, tokenizer: TokenizerInfo) -> dict[str, Any]:
    tree = {
        **files_tree(dataset),
        "tokenizer_sha256": tokenizer.sha256,
        "eot_id": tokenizer.eot_id,
        **({"bos_id": tokenizer.bos_id} if tokenizer.bos_id is not None else {}),
        "code": STAGE_VERSION,
    }
    if dataset.source.map:
        tree |= map_identity(dataset.source.map)
    if dataset.source.exclude:
        tree["exclude_sha256"] = read_excluded(dataset.source.exclude).sha256
    if tokenizer.switched_off:  # the first release cut or padded documents by them
        tree["switched_off"] = tokenizer.switched_off
    return tree


def _identity(dataset: Dataset, tokenizer: TokenizerInfo, raw_sha256: str) -> dict[str, Any]:
    return {"raw_sha256": raw_sha256, **_settings(dataset, tokenizer)}


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """Without what a file of the first release recorded and no result depends on."""
    return {name: value for name, value in identity.items() if name != "max_bad_fraction"}


def _kept(before: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """`identity`, as a file of the first release recorded it where it is that file made again."""
    return before if _plain(before) == identity else identity


def _part_identity(dataset: Dataset, tokenizer: TokenizerInfo, raw: RawFile, part: Part) -> dict[str, Any]:
    return {"stamp": raw.stamp, "begin": part.begin, "end": part.end, **_settings(dataset, tokenizer)}


def _token_bytes(tokenizer: TokenizerInfo) -> int:
    return SampleFormat.for_vocabulary(1, tokenizer.num_rows).numpy_dtype.itemsize


def finished(
    dataset: Dataset, raw: RawFile, tokenizer: TokenizerInfo, folder: Path, elsewhere: Mapping[Path, int] = {}
) -> FileTokens | None:
    """The result of a file that is done for this content, tokenizer and settings, else None.

    Args:
        elsewhere: path in `folder` -> size of what is in an exchange.

    Raises:
        DataError: more of its records are bad than the source allows by now, or the list of these is damaged.
    """
    paths = _Paths.of(folder, raw.name)
    if not paths.done.exists():
        return None
    fields = read_sealed(paths.done)
    if fields["identity"]["code"] != STAGE_VERSION:
        return None
    done = _of_fields(FileTokens, fields, paths.done)
    raw_sha256 = done.identity["raw_sha256"] if done.stamp == raw.stamp else sha256_url(raw.url)
    if _plain(done.identity) != _identity(dataset, tokenizer, raw_sha256):
        return None
    if not paths.sizes_fit(done, _token_bytes(tokenizer), elsewhere):
        return None
    limit = dataset.source.max_bad_fraction
    judged = (done.records - done.quarantined, done.quarantined, limit, _first_bad(paths.quarantine))
    check_bad_fraction(raw.url, *judged, done.bad_bytes, done.content_bytes)
    if done.stamp != raw.stamp:  # touched, but the same: remember it, or it is hashed again each time
        write_sealed(paths.done, {**fields, "stamp": raw.stamp})
    return done


def _first_bad(path: Path) -> BadRecord | None:
    with path.open("rb") as bad:
        line = bad.readline()
    try:
        return BadRecord(**orjson.loads(line)) if line else None
    except (ValueError, TypeError) as e:
        raise _damaged(path) from e


def record_offsets(folder: Path, name: str, records: Collection[int]) -> dict[int, int | None]:
    """Where records of a raw file begin, as `Record.offset`; None for all where stage 1 wrote no offsets."""
    paths = _Paths.of(folder, name)
    if not paths.offsets.exists() or not paths.documents.exists():
        return dict.fromkeys(records)
    numbers = np.memmap(paths.documents, INDEX_DTYPE, mode="r").reshape(-1, 2)[:, 0]
    offsets = np.memmap(paths.offsets, INDEX_DTYPE, mode="r")
    rows = np.searchsorted(numbers, list(records)).tolist()
    found = {record: row for record, row in zip(records, rows) if row < len(numbers) and numbers[row] == record}
    return {record: int(offsets[row]) for record, row in found.items()}


def take_over(
    dataset: Dataset, raw: RawFile, tokenizer: TokenizerInfo, folder: Path, gone: list[FileTokens]
) -> FileTokens | None:
    """The result of a raw file that had another name before, now under its own; None where there is none.

    Args:
        gone: results whose raw files are no longer there under their names.
    """
    alike = [made for made in gone if made.stamp.partition("-")[0] == str(raw.size_bytes)]
    wanted = fingerprint(_identity(dataset, tokenizer, sha256_url(raw.url))) if alike else None
    made = next((made for made in alike if fingerprint(_plain(made.identity)) == wanted), None)
    old = made and _Paths.of(folder, made.name)
    if made is None or not old.sizes_fit(made, _token_bytes(tokenizer)):
        return None
    new = _Paths.of(folder, raw.name)
    bad = map(orjson.loads, read_quarantine(old.quarantine, made.quarantine_sha256).splitlines())
    make_folder(new.done.parent)
    gone.remove(made)
    old.done.unlink()  # what it describes is about to go
    with atomic_writer(new.quarantine, shared=True) as file:
        file.writelines(orjson.dumps({**line, "file": raw.url}) + b"\n" for line in bad)
    for source, target in ((old.tokens, new.tokens), (old.documents, new.documents), (old.offsets, new.offsets)):
        if source.exists():
            rename(source, target)
    result = replace(made, name=raw.name, stamp=raw.stamp, quarantine_sha256=sha256_file(new.quarantine))
    write_sealed(new.done, result.content())
    old.quarantine.unlink()
    return result


def files_to_add(
    dataset: Dataset,
    raw_files: list[RawFile],
    tokenizer: TokenizerInfo,
    inputs: dict[str, Tree],
    stamps: dict[str, str],
) -> list[RawFile]:
    """The raw files that the version which `dataset` extends lacks.

    Args:
        inputs: name -> identity of each file of that version.
        stamps: name -> stamp of those of its files whose streams are still there.

    Raises:
        DataError: a file of that version is another by now.
        IdentityError: its files were read or tokenized otherwise.
        MissingInputError: there is none.
    """
    settings, name = _settings(dataset, tokenizer), f"{dataset.name} {dataset.source.extends}"
    anew = "leave out `extends` to make all of it anew"
    first = next(iter(inputs.values()), {})
    recorded = {key: value for key, value in _plain(first).items() if key != "raw_sha256"}
    if changed := differences(recorded, settings):
        raise IdentityError(
            f"{name} was made with other settings than {dataset.version}, which extends it: {'; '.join(changed)}. "
            f"Take its settings, or {anew}"
        )
    for raw in raw_files:
        touched = raw.name in inputs and stamps.get(raw.name) != raw.stamp
        if touched and sha256_url(raw.url) != inputs[raw.name]["raw_sha256"]:
            raise DataError(
                f"raw file {raw.url} is not the one that {name} was made from, which {dataset.version} extends: give "
                f"the new one another name, or {anew}"
            )
    new = [raw for raw in raw_files if raw.name not in inputs]
    if not new:
        raise MissingInputError(f"{dataset.name} {dataset.version} has no raw file that {dataset.source.extends} lacks")
    return new


_LEFT_OUT = ".left_out.json"


def read_result(kind: type[_Result], path: Path) -> _Result:
    """The result of a file or a part, as its `.json` has it.

    Raises:
        MissingInputError, DataError: it is not there, or damaged.
    """
    return _of_fields(kind, read_sealed(path), path)


def _of_fields(kind: type[_Result], fields: dict[str, Any], path: Path) -> _Result:
    try:
        return kind(**fields)
    except TypeError as e:  # other fields
        raise _damaged(path) from e


def results(folder: Path) -> list[FileTokens]:
    """Those of all raw files that are finished.

    Raises:
        DataError: a file is damaged.
    """
    return [read_result(FileTokens, path) for path in _done_files(folder)]


def results_of_others(folder: Path, names: Collection[str]) -> list[FileTokens]:
    """Those of raw files of other names; one that is damaged counts as none, as nothing needs it."""
    found = []
    for path in _done_files(folder):
        if path.relative_to(folder).as_posix().removesuffix(".json") not in names:
            with suppress(DataError):
                found.append(read_result(FileTokens, path))
    return found


def _done_files(folder: Path) -> list[Path]:
    """The `F.json` of all raw files that are finished."""
    paths = sorted(path for path in folder.rglob("*.json") if not path.name.endswith(_LEFT_OUT))
    return [path for path in paths if ".part-" not in path.name]


def check_streams(folder: Path, *, quick: bool = False) -> Iterator[tuple[Path, str | None]]:
    """Check the files of each raw file that is finished; yields (its `F.json`, what is wrong or None).

    Args:
        quick: only that they are there, and what `F.json` says of itself.
    """
    for path in _done_files(folder):
        try:
            made = read_result(FileTokens, path)
            paths = _Paths.of(path.parent, path.name.removesuffix(".json"))
            recorded = {paths.tokens: made.tokens_sha256, paths.documents: made.index_sha256}
            recorded |= {paths.offsets: made.offsets_sha256, paths.quarantine: made.quarantine_sha256}
            for file, sha256 in recorded.items():
                if not file.exists() and (sha256 or file == paths.quarantine):
                    raise DataError(f"{file} is missing")
                if sha256 and not quick and sha256_file(file) != sha256:
                    raise DataError(f"{file} does not have its recorded sha256: it is damaged")
        except (OpenLMError, OSError) as e:
            yield path, str(e)
        else:
            yield path, None


def _note(folder: Path, name: str) -> Path:
    return folder / f"{name}{_LEFT_OUT}"


def leave_out(dataset: Dataset, raw: RawFile, tokenizer: TokenizerInfo, folder: Path, reason: str) -> None:
    """Note that a raw file, as it is, is not used."""
    write_json(
        _note(folder, raw.name), {"stamp": raw.stamp, "reason": reason, "settings": _settings(dataset, tokenizer)}
    )


def leave_in(folder: Path, name: str) -> None:
    """Forget that a raw file was left out."""
    _note(folder, name).unlink(missing_ok=True)


def notes_of_left_out(folder: Path, files: list[FileTokens]) -> dict[str, str]:
    """Name -> reason of all raw files that were left out, beside the `files` that were not."""
    used, notes = {file.name for file in files}, sorted(folder.rglob(f"*{_LEFT_OUT}"))
    names = (path.relative_to(folder).as_posix().removesuffix(_LEFT_OUT) for path in notes)
    return {name: read_json(_note(folder, name))["reason"] for name in names if name not in used}


def left_out(dataset: Dataset, raw_files: list[RawFile], tokenizer: TokenizerInfo, folder: Path) -> dict[str, str]:
    """Name -> reason of the raw files that the source's `on_bad_file: skip` leaves out, as far as they were read.

    A file that has changed since, or is read in another way, counts as not read.
    """
    if dataset.source.on_bad_file == "fail":
        return {}
    settings, found = _settings(dataset, tokenizer), {}
    for raw in raw_files:
        if (note := _note(folder, raw.name)).exists():
            noted = read_json(note)
            if noted["stamp"] == raw.stamp and noted["settings"] == settings:
                found[raw.name] = noted["reason"]
    return found


def _with_ends(encoded: Encoded, tokenizer: TokenizerInfo, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts, each followed by the end-of-text, and after what begins a document; and their lengths."""
    begins = tokenizer.bos_id is not None
    lengths = encoded.lengths + 1 + begins
    ends = np.cumsum(lengths)
    out = np.empty(len(encoded.ids) + (1 + begins) * len(ends), dtype)
    is_id = np.ones(len(out), bool)
    is_id[ends - 1] = False
    out[ends - 1] = tokenizer.eot_id
    if begins:
        is_id[ends - lengths] = False
        out[ends - lengths] = tokenizer.bos_id
    out[is_id] = encoded.ids
    return out, lengths


def _batches(reader: RecordReader) -> Iterator[list[Record]]:
    """Records with about a mebibyte of text at a time."""
    batch: list[Record] = []
    characters = 0
    for record in reader:
        batch.append(record)
        characters += len(record.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def part_stem(raw: RawFile, number: int) -> str:
    return f"{raw.name}.part-{number:05d}"


def finished_part(
    dataset: Dataset,
    raw: RawFile,
    part: Part,
    number: int,
    tokenizer: TokenizerInfo,
    folder: Path,
    elsewhere: Mapping[Path, int] = {},
) -> PartTokens | None:
    """The result of a part that is done for this file, tokenizer and settings, whose `.json` is there, else None.

    Args:
        elsewhere: as for `finished`.
    """
    paths = _Paths.of(folder, part_stem(raw, number))
    done = read_result(PartTokens, paths.done)
    fits = done.identity == _part_identity(dataset, tokenizer, raw, part)
    return done if fits and paths.sizes_fit(done, _token_bytes(tokenizer), elsewhere) else None


def tokenize_part(
    dataset: Dataset,
    raw: RawFile,
    part: Part,
    number: int,
    tokenizer: TokenizerInfo,
    tokenizer_folder: Path,
    folder: Path,
    *,
    progress: TaskProgress,
) -> PartTokens:
    """Tokenize part `number` of a raw file, unless that is done; runs in a worker.

    Raises:
        DataError: the file is damaged, or nearly all of its records are bad.
    """
    started = time.monotonic()
    paths = _Paths.of(folder, part_stem(raw, number))
    identity = _part_identity(dataset, tokenizer, raw, part)
    if paths.done.exists():
        if done := finished_part(dataset, raw, part, number, tokenizer, folder):
            return done
        paths.done.unlink()
    path = tokenizer_file(tokenizer_folder)
    as_text = dataset.source.special_tokens == "text"
    engine, engine_reason = make_engine(path, dataset.engine, dataset.verify_every, special_as_text=as_text)
    special = special_strings(load_reference(path))
    change = load_map(dataset.source.map) if dataset.source.map else None
    counts, wanted, excluded = Counts(), _fields(dataset), _excluded(dataset, raw)
    dtype = SampleFormat.for_vocabulary(1, tokenizer.num_rows).numpy_dtype
    text_bytes = tokens = found = 0
    with (
        quarantine_writer(paths.quarantine) as quarantine,
        _hashed_writer(paths.tokens) as out,
        _hashed_writer(paths.documents) as index,
        _hashed_writer(paths.offsets) as offsets,
    ):
        reader = RecordReader(
            raw.url,
            text_key=dataset.source.text_key,
            max_bad_fraction=dataset.source.max_bad_fraction,
            on_bad=quarantine,
            part=part,
            format=raw.format,
            fields=wanted,
        )
        for batch in _batches(reader):
            if excluded and not (batch := _not_excluded(batch, excluded, counts)):
                continue
            if change and not (batch := _mapped(batch, change, dataset, counts, raw)):
                continue
            texts = [record.text for record in batch]
            try:
                encoded = engine.encode_batch(texts)
            except EncodingError as e:
                raise DataError(
                    f"{raw.url}, record {batch[e.position].number} from byte {part.begin} on: {e}; and please report "
                    "the document"
                ) from e
            stream, lengths = _with_ends(encoded, tokenizer, dtype)
            ids = stream.tobytes()
            out.write(ids)
            rows = np.stack([[record.number for record in batch], lengths], axis=1)
            index.write(rows.astype(INDEX_DTYPE).tobytes())
            offsets.write(np.array([record.offset for record in batch], INDEX_DTYPE).tobytes())
            sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
            text_bytes += sum(sizes)
            if by := dataset.source.breakdown:
                for record, size, length in zip(batch, sizes, lengths.tolist()):
                    counts.keep(record.fields[by], size, length)
            tokens += len(ids) // dtype.itemsize
            found += sum(special.count(text) for text in texts)
            progress({"raw_bytes": reader.raw_bytes, "tokens": tokens})
    result = PartTokens(
        identity=identity,
        documents=reader.records - counts.dropped.total(),
        quarantined=reader.bad,
        lines=reader.lines,
        tokens=tokens,
        text_bytes=text_bytes,
        tokens_sha256=out.sha256.hexdigest(),
        raw_sha256=reader.raw_sha256,
        first_bad=asdict(reader.first_bad) if reader.first_bad else None,
        engine=engine_reason,
        seconds=time.monotonic() - started,
        content_bytes=reader.bytes,
        bad_bytes=reader.bad_bytes,
        index_sha256=index.sha256.hexdigest(),
        offsets_sha256=offsets.sha256.hexdigest(),
        quarantine_sha256=sha256_file(paths.quarantine),
        special_strings=found,
        dropped=dict(sorted(counts.dropped.items())),
        changed=counts.changed,
        breakdown=dict(sorted(counts.breakdown.items())),
    )
    write_sealed(paths.done, result.content())
    return result


def _fields(dataset: Dataset) -> tuple[str, ...]:
    """What is read of each record beside its text."""
    source = dataset.source
    return tuple(dict.fromkeys([*(source.map.fields if source.map else ()), *filter(None, [source.breakdown])]))


def _excluded(dataset: Dataset, raw: RawFile) -> dict[int, str]:
    """Offset -> reason of the records of a raw file that the source leaves out."""
    place = dataset.source.exclude
    return read_excluded(place).of(dataset.name, raw.name) if place else {}


def _not_excluded(batch: list[Record], excluded: Mapping[int, str], counts: Counts) -> list[Record]:
    kept = []
    for record in batch:
        if (reason := excluded.get(record.offset)) is None:
            kept.append(record)
        else:
            counts.drop(reason)
    return kept


def _check_excluded(dataset: Dataset, raw: RawFile, dropped: Mapping[str, int]) -> None:
    """
    Raises:
        ConfigError: some of the records to leave out are not in the file.
    """
    for reason, wanted in Counter(_excluded(dataset, raw).values()).items():
        if dropped.get(reason, 0) < wanted:
            raise ConfigError(
                f"{dataset.source.exclude} leaves {wanted} records of {raw.url} out as {reason!r}, and "
                f"{dropped.get(reason, 0)} of them are there: it is of another file; write it again"
            )


def _mapped(batch: list[Record], change: Mapped, dataset: Dataset, counts: Counts, raw: RawFile) -> list[Record]:
    """What the source's map leaves of a batch.

    Raises:
        ConfigError: the function failed; it is named, and the record.
    """
    kept = []
    for record in batch:
        try:
            made = change(record.text, record.fields)
        except Exception as e:  # noqa: BLE001 - whatever the user's code raises
            raise ConfigError(
                f"{dataset.source.map.function} failed on the record at byte or row {record.offset} of {raw.url}: "
                f"{type(e).__name__}: {e}"
            ) from e
        if isinstance(made, Drop):
            counts.drop(made.reason)
        else:
            counts.changed += made != record.text
            kept.append(replace(record, text=made))
    return kept


class _Hashed:
    """A file under way, if one is written, and the hash of what is in it."""

    def __init__(self, file: BinaryIO | None) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        if self.file is not None:
            self.file.write(data)
        self.sha256.update(data)


@contextmanager
def _hashed_writer(path: Path) -> Iterator[_Hashed]:
    with atomic_writer(path, shared=True) as file:
        yield _Hashed(file)


def _append(
    paths: _Paths,
    path: Path,
    recorded: str | None,
    out: _Hashed,
    change: Callable[[bytes], bytes] = bytes,
    opened: Callable[[Path], BinaryIO] = lambda path: path.open("rb"),
) -> None:
    """Add a file of a part to that of the whole, each block as `change` makes it.

    Raises:
        DataError: it is not what was written; the part counts as not done.
    """
    own = hashlib.sha256()
    with opened(path) as f:
        while block := f.read(_COPY_BYTES):
            own.update(block)
            out.write(change(block))
    if recorded not in (None, own.hexdigest()):
        paths.done.unlink(missing_ok=True)
        raise DataError(
            f"{path} is damaged: its sha256 is not the recorded one; run the command again, and it is remade"
        )


def _renumbered(first_record: int, index: bytes) -> bytes:
    rows = np.frombuffer(index, INDEX_DTYPE).reshape(-1, 2).copy()
    rows[:, 0] += first_record
    return rows.tobytes()


def _append_quarantine(path: Path, recorded: str | None, out: BinaryIO, first_line: int) -> None:
    for line in read_quarantine(path, recorded).splitlines():
        bad = orjson.loads(line)
        out.write(orjson.dumps({**bad, "line": bad["line"] + first_line}) + b"\n")


def read_quarantine(path: Path, recorded: str | None) -> bytes:
    """`F.quarantine.jsonl`, as the `F.json` beside it has its hash; None of an earlier release.

    Raises:
        DataError: it is damaged.
    """
    content = path.read_bytes()
    if recorded not in (None, hashlib.sha256(content).hexdigest()):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged: it is not what was written; delete it, and it is made again")


def join_parts(
    dataset: Dataset,
    raw: RawFile,
    count: int,
    tokenizer: TokenizerInfo,
    folder: Path,
    *,
    progress: TaskProgress,
    streams: Callable[[Path], BinaryIO] | None = None,
) -> FileTokens:
    """Make a raw file's result from its finished parts, which are then gone; runs in a worker.

    Args:
        streams: opens the token streams of the parts where they are elsewhere; they stay there, and are not joined.

    Raises:
        DataError: more of the records are bad than the source allows, or the raw file changed meanwhile.
    """
    final = _Paths.of(folder, raw.name)
    sources = [_Paths.of(folder, part_stem(raw, number)) for number in range(count)]
    parts = [read_result(PartTokens, paths.done) for paths in sources]
    summed = ("documents", "quarantined", "tokens", "text_bytes", "content_bytes", "bad_bytes", "changed")
    totals = {name: sum(getattr(p, name) for p in parts) for name in summed}
    totals |= {name: added([getattr(p, name) for p in parts]) for name in ("dropped", "breakdown")}
    _check_excluded(dataset, raw, totals["dropped"])
    first_line, first_bad = 0, None
    for p in parts:
        if p.first_bad and first_bad is None:
            first_bad = BadRecord(**{**p.first_bad, "line": p.first_bad["line"] + first_line})
        first_line += p.lines
    good = sum(p.records for p in parts) - totals["quarantined"]
    counts = (good, totals["quarantined"], dataset.source.max_bad_fraction, first_bad)
    check_bad_fraction(raw.url, *counts, totals["bad_bytes"], totals["content_bytes"])
    raw_sha256 = parts[-1].raw_sha256 or sha256_url(raw.url)
    if restat(raw).stamp != raw.stamp:
        raise DataError(f"raw file {raw.url} changed while it was read; run the command again")
    before = read_sealed(final.done)["identity"] if final.done.exists() else {}
    final.done.unlink(missing_ok=True)  # what it describes is about to be replaced
    if count == 1 and streams is None:
        hashes = parts[0].tokens_sha256, parts[0].index_sha256, parts[0].offsets_sha256
        for name in ("tokens", "documents", "offsets", "quarantine"):
            rename(getattr(sources[0], name), getattr(final, name))
    else:
        with (
            nullcontext(_Hashed(None)) if streams else _hashed_writer(final.tokens) as tokens,
            _hashed_writer(final.documents) as index,
            _hashed_writer(final.offsets) as offsets,
            atomic_writer(final.quarantine, shared=True) as quarantine,
        ):
            how = {"opened": streams} if streams else {}
            first_record = first_line = 0
            for paths, p in zip(sources, parts):
                _append(paths, paths.tokens, p.tokens_sha256, tokens, **how)
                _append(paths, paths.offsets, p.offsets_sha256, offsets)
                _append(paths, paths.documents, p.index_sha256, index, partial(_renumbered, first_record))
                _append_quarantine(paths.quarantine, p.quarantine_sha256, quarantine, first_line)
                first_record, first_line = first_record + p.records, first_line + p.lines
        hashes = [written.sha256.hexdigest() for written in (tokens, index, offsets)]
    result = FileTokens(
        name=raw.name,
        identity=_kept(before, _identity(dataset, tokenizer, raw_sha256)),
        stamp=raw.stamp,
        **totals,
        tokens_sha256=hashes[0],
        engine=parts[0].engine,
        seconds=round(sum(p.seconds for p in parts), 3),
        index_sha256=hashes[1],
        offsets_sha256=hashes[2],
        quarantine_sha256=sha256_file(final.quarantine),
        special_strings=added_up(p.special_strings for p in parts),
    )
    write_sealed(final.done, result.content())
    for paths in sources:
        for path in (paths.tokens, paths.documents, paths.offsets, paths.quarantine, paths.done):
            path.unlink(missing_ok=True)
    return result


def added_up(counts: Iterable[int | None]) -> int | None:
    """The sum; None where one is not known."""
    known = list(counts)
    return None if None in known else sum(known)


def remove_parts(folder: Path, names: set[str]) -> None:
    """Delete the parts of raw files that are finished."""
    for path in folder.rglob("*.part-*"):
        if path.relative_to(folder).as_posix().rpartition(".part-")[0] in names:
            path.unlink()
