"""Both stages over a dataset: what is done stays, what is missing is made on a pool, the manifest comes last."""

import shutil
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from openlm_pipeline.corpus.discovery import RawFile
from openlm_pipeline.corpus.reader import cut
from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.fingerprint import Tree, differences, fingerprint
from openlm_pipeline.pools import Call, Facts, Pool, PoolFactory, TaskProgress
from openlm_pipeline.result import ProgressLine, Say, refusal, refuse
from openlm_pipeline.shards.format import SampleFormat, open_shard
from openlm_pipeline.shards.manifest import (
    DATASET,
    DOCUMENTS,
    MANIFEST,
    QUARANTINE,
    ShardEntry,
    check_hash,
    finish_dataset,
    read_dataset,
    read_manifest,
    recorded_beside,
    version_of,
    write_info_again,
)
from openlm_pipeline.shards.sums import write_sums
from openlm_pipeline.storage.files import (
    atomic_writer,
    folder_lock,
    read_json,
    remove_leftovers,
    set_aside,
    sha256_file,
    write_json,
)
from openlm_pipeline.tokenization.documents import (
    FileTokens,
    added_up,
    finished,
    join_parts,
    leave_in,
    leave_out,
    left_out,
    notes_of_left_out,
    remove_parts,
    tokenize_part,
)
from openlm_pipeline.tokenization.packing import (
    PACKING_VERSION,
    check_stream,
    make_shard,
    packing_tree,
    write_document_index,
    write_order,
)
from openlm_pipeline.tokenizers.tokenizer import TokenizerInfo
from openlm_pipeline.units import format_bytes, format_seconds, format_tokens

_REPORT_SECONDS = 5.0
_MIN_PART_BYTES = 32 << 20
_PART = " part "
_BUILDING = ".building"
_IDENTITY = "identity.json"


class _Meter:
    """Progress of a stage in bytes of its input, as lines for people."""

    def __init__(self, what: str, total_bytes: int, report: Say) -> None:
        self._what, self._total, self._report = what, max(1, total_bytes), report
        self._facts: dict[str, Facts] = {}
        self._started = self._reported = time.monotonic()

    def update(self, name: str, facts: Facts) -> None:
        self._facts[name] = facts
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self.say()

    def say(self) -> None:
        self._reported = now = time.monotonic()
        elapsed = max(now - self._started, 1e-3)
        done = min(self._total, sum(f.get("raw_bytes", 0) for f in list(self._facts.values())))
        tokens = sum(f.get("tokens", 0) for f in list(self._facts.values()))
        line = f"{self._what}: {format_bytes(done)} of {format_bytes(self._total)} ({done / self._total:.0%})"
        if tokens:
            line += (
                f", {format_tokens(tokens, digits=3)} tokens at {format_tokens(round(tokens / elapsed), digits=3)}/s"
            )
        line += f", {format_seconds(elapsed)}"
        facts = {
            "bytes_done": done,
            "bytes_total": self._total,
            "tokens": tokens,
            "tokens_per_second": tokens / elapsed,
        }
        if done and done < self._total:
            facts["seconds_left"] = elapsed / done * (self._total - done)
            line += f", about {format_seconds(facts['seconds_left'])} left"
        self._report(ProgressLine(line, facts))


def _run(
    pool: Pool, meter: _Meter, sizes: dict[str, int], calls: dict[str, Call]
) -> tuple[dict[str, Any], dict[str, DataError]]:
    """Run the calls on the pool; results by name, and what is damaged by name.

    Args:
        sizes: bytes of input of each call, which count as read when it ends.
    """
    results: dict[str, Any] = {}
    damaged: dict[str, DataError] = {}
    tokens: dict[str, int] = {}

    def on_progress(name: str, facts: Facts) -> None:
        if name not in results:
            tokens[name] = facts.get("tokens", 0)
            meter.update(name, facts)

    for name, result in pool.run(calls, on_progress):
        if isinstance(result, DataError):
            damaged[name] = result
            continue
        results[name] = result
        made = getattr(result, "tokens", tokens.get(name, 0))
        meter.update(name, {"raw_bytes": sizes[name], "tokens": made})
    return results, damaged


def _raise_all(damaged: dict[str, DataError]) -> None:
    """
    Raises:
        DataError: there is one in `damaged`; all are named.
    """
    if len(damaged) == 1:
        raise next(iter(damaged.values()))
    if damaged:
        lines = "\n  ".join(str(damaged[name]) for name in sorted(damaged))
        raise DataError(
            f"{len(damaged)} files can't be used:\n  {lines}\n"
            "To do without such raw files, set the source's on_bad_file: skip, or --on-bad-file skip"
        )


def tokenize_files(
    dataset: Dataset,
    raw_files: list[RawFile],
    tokenizer: TokenizerInfo,
    tokenizer_folder: Path,
    folder: Path,
    pools: PoolFactory,
    report: Say,
    *,
    min_part_bytes: int = _MIN_PART_BYTES,
) -> tuple[list[FileTokens], list[str]]:
    """Stage 1 over `raw_files`: results in their order, and the names of those that had to be done.

    Args:
        min_part_bytes: a raw file is not cut into parts of fewer bytes.

    Raises:
        DataError: files are damaged, all of which are named; the others stay. With the source's `on_bad_file: skip`
            they are left out of the results instead, see `left_out`.
        BusyError: another process is tokenizing this dataset.
    """
    with folder_lock(folder, "tokenizing"):
        skipped = left_out(dataset, raw_files, tokenizer, folder)
        done: dict[str, FileTokens | None] = {}
        damaged: dict[str, DataError] = {}
        for raw in raw_files:
            if raw.name not in skipped:
                try:
                    done[raw.name] = finished(dataset, raw, tokenizer, folder)
                except DataError as e:
                    damaged[raw.name] = e
        missing = [raw for raw in raw_files if done.get(raw.name, raw) is None]
        remove_parts(folder, {name for name, result in done.items() if result})
        if missing:
            remove_leftovers(folder)
            with pools(report) as pool:
                parts = {
                    raw.name: cut(raw.url, raw.size_bytes, count, raw.format)
                    for raw, count in _part_counts(missing, pool.workers, min_part_bytes).items()
                }
                calls: dict[str, Call] = {}
                sizes: dict[str, int] = {}
                largest_first = sorted(missing, key=lambda raw: -raw.size_bytes)  # so that no large one is left over
                for raw in largest_first:
                    args = (tokenizer, tokenizer_folder, folder)
                    if len(parts[raw.name]) == 1:
                        calls[raw.name] = (tokenize_whole, dataset, raw, *args)
                        sizes[raw.name] = raw.size_bytes
                    for number, part in enumerate(parts[raw.name] if len(parts[raw.name]) > 1 else []):
                        name = f"{raw.name}{_PART}{number}"
                        calls[name] = (tokenize_part, dataset, raw, part, number, *args)
                        sizes[name] = (part.end or raw.size_bytes) - part.begin
                meter = _Meter(f"tokenizing {dataset.name}", sum(sizes.values()), report)
                results, wrong = _run(pool, meter, sizes, calls)
                meter.say()
                damaged |= {name.partition(_PART)[0]: error for name, error in wrong.items()}
                joins = {
                    raw.name: (join_parts, dataset, raw, len(parts[raw.name]), tokenizer, folder)
                    for raw in largest_first
                    if len(parts[raw.name]) > 1 and raw.name not in damaged
                }
                if joins:
                    sizes = {raw.name: raw.size_bytes for raw in missing}
                    what = f"joining the parts of {dataset.name}"
                    more, wrong = _run(pool, _Meter(what, sum(sizes[n] for n in joins), report), sizes, joins)
                    results, damaged = results | more, damaged | wrong
            done |= {raw.name: results[raw.name] for raw in missing if raw.name not in damaged}
            remove_parts(folder, {name for name, result in done.items() if result})  # of one that cut in another way
        if dataset.source.on_bad_file == "fail":
            _raise_all(damaged)
        for raw in raw_files:
            if raw.name in damaged:
                leave_out(dataset, raw, tokenizer, folder, str(damaged[raw.name]))
                report(f"left out: {damaged[raw.name]}")
        made = [result for raw in raw_files if (result := done.get(raw.name))]
        for result in made:
            leave_in(folder, result.name)
    return made, sorted(raw.name for raw in missing if raw.name not in damaged)


def _part_counts(files: list[RawFile], workers: int, min_part_bytes: int) -> dict[RawFile, int]:
    """How many parts to cut each file into, so that all workers stay busy; a compressed file is read from its start for
    each of them, so no more than that takes."""
    total = sum(raw.size_bytes for raw in files)
    target = max(min_part_bytes, total // (2 * workers))
    return {raw: 1 if workers == 1 else min(workers, -(-raw.size_bytes // target) or 1) for raw in files}


def tokenize_whole(
    dataset: Dataset,
    raw: RawFile,
    tokenizer: TokenizerInfo,
    tokenizer_folder: Path,
    folder: Path,
    *,
    progress: TaskProgress,
) -> FileTokens:
    """Stage 1 of a raw file that is not cut."""
    [part] = cut(raw.url, raw.size_bytes, 1, raw.format)
    tokenize_part(dataset, raw, part, 0, tokenizer, tokenizer_folder, folder, progress=progress)
    return join_parts(dataset, raw, 1, tokenizer, folder, progress=progress)


def shards_identity(dataset: Dataset, files: list[FileTokens], tokenizer: TokenizerInfo) -> Tree:
    """What the shards of a dataset are made from."""
    return {
        **packing_tree(dataset),
        "tokenizer_sha256": tokenizer.sha256,
        "files": {f.name: f.version for f in files},
        "code": PACKING_VERSION,
    }


def pack_shards(
    dataset: Dataset,
    files: list[FileTokens],
    tokenizer: TokenizerInfo,
    tokenized: Path,
    folder: Path,
    pools: PoolFactory,
    report: Say,
    allow: Collection[str] = (),
    *,
    local: bool = True,
) -> tuple[bool, list[str]]:
    """Stage 2: make the dataset in `folder` unless it is there; return (reused, how it differs from what was there).

    Shards of a finished dataset that are lost are made again, alone.

    Args:
        local: the shards are to be in the folder, and not in a store alone.
        allow: consents; with `supersede` a finished dataset of another identity is set aside, not deleted.

    Raises:
        ConsentError: another finished dataset is there.
        DataError: there is too little text for one sample, or tokens were lost.
        BusyError: another process is packing this dataset.
    """
    identity = shards_identity(dataset, files, tokenizer)
    changed: list[str] = []
    with folder_lock(folder.parent / f".{folder.name}", "packing"):
        if (folder / MANIFEST).exists():
            old = _recorded_info(dataset, files, tokenizer, tokenized, folder, report)["identity"]
            if old == identity:
                remade = local and _make_whole(dataset, files, tokenizer, tokenized, folder, pools, report)
                shutil.rmtree(folder / _BUILDING, ignore_errors=True)
                return not remade, []
            changed = differences(old, identity)
            what = "\n  ".join([f"{folder} holds another dataset. What differs:", *changed])
            refuse([refusal("supersede", what, "To keep it, give the source another `version` or name")], allow)
            report(f"set the old shards of {dataset.name} aside as {set_aside(folder)}")
        building = folder / _BUILDING
        begun = building / _IDENTITY
        for place in (folder, building):
            remove_leftovers(place)
        if folder.exists() and not (begun.exists() and read_json(begun) == identity):
            _clear(folder)
        write_json(begun, identity)
        _pack(dataset, files, tokenizer, tokenized, folder, building, identity, pools, report)
        shutil.rmtree(building)
    return False, changed


def _clear(folder: Path) -> None:
    """Empty a folder in which packing of another identity had begun.

    Raises:
        IdentityError: it was not packing that filled it.
    """
    building = folder / _BUILDING
    found = [path for path in folder.iterdir() if path != building]
    if found and not building.exists() and not (folder / DATASET).exists():
        raise IdentityError(
            f"{folder} should become a dataset's folder, but holds {found[0].name} and no manifest; move it away"
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(building, ignore_errors=True)  # last: it marks the rest as packing's


def _pack(
    dataset: Dataset,
    files: list[FileTokens],
    tokenizer: TokenizerInfo,
    tokenized: Path,
    folder: Path,
    building: Path,
    identity: Tree,
    pools: PoolFactory,
    report: Say,
) -> None:
    sample_format = SampleFormat.for_vocabulary(dataset.seq_len + 1, tokenizer.num_rows)
    info = _info(dataset, files, tokenizer, tokenized)
    totals = info["totals"]
    num_samples = totals["samples"]
    if num_samples == 0:
        raise DataError(
            f"dataset {dataset.name} has {totals['tokens']} tokens, fewer than one sample of "
            f"{sample_format.sample_tokens}; give it more text"
        )
    write_order(files, tokenized, dataset.shuffle_seed, building)
    numbers = range(totals["shards"])
    with pools(report) as pool:
        entries = _still_whole(dataset, folder, building, numbers, pool, report)
        shard_bytes = dataset.samples_per_shard * sample_format.record_bytes
        all_bytes = num_samples * sample_format.record_bytes
        make = {n: min(shard_bytes, all_bytes - n * shard_bytes) for n in numbers if n not in entries}
        entries |= _make_shards(dataset, files, tokenizer, tokenized, folder, make, pool, report, index=True)
    with atomic_writer(folder / QUARANTINE) as out:
        for f in files:
            out.write((tokenized / f"{f.name}.quarantine.jsonl").read_bytes())
    in_shards = sum(e.tokens for e in entries.values()) - totals["padding_tokens"]
    if in_shards + totals["tail_tokens"] != totals["tokens"]:
        raise DataError(f"dataset {dataset.name}: {in_shards} tokens are in shards, which differs from {totals}")
    finish_dataset(folder, [entries[n] for n in numbers], info)


def _info(dataset: Dataset, files: list[FileTokens], tokenizer: TokenizerInfo, tokenized: Path) -> dict[str, Any]:
    """What `dataset.json` says of the dataset that is made of these files."""
    identity = shards_identity(dataset, files, tokenizer)
    sample_format = SampleFormat.for_vocabulary(dataset.seq_len + 1, tokenizer.num_rows)
    skipped = notes_of_left_out(tokenized, files) if dataset.source.on_bad_file == "skip" else {}
    tokens = sum(f.tokens for f in files)
    num_samples, tail = divmod(tokens, sample_format.sample_tokens)
    padding = 0
    if dataset.pad_id is not None and tail:
        num_samples, padding, tail = num_samples + 1, sample_format.sample_tokens - tail, 0
    info = {
        "name": dataset.name,
        "version": dataset.version,
        "fingerprint": fingerprint(identity),
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "largest_id": tokenizer.num_rows - 1,
        },
        "eot_id": tokenizer.eot_id,
        **({"bos_id": tokenizer.bos_id} if tokenizer.bos_id is not None else {}),
        "pad_id": dataset.pad_id,
        "seq_len": dataset.seq_len,
        "dtype": sample_format.dtype,
        "totals": {
            "files": len(files),
            "skipped_files": len(skipped),
            "documents": sum(f.documents for f in files),
            "quarantined": sum(f.quarantined for f in files),
            "text_bytes": sum(f.text_bytes for f in files),
            "special_strings": added_up(f.special_strings for f in files),
            "tokens": tokens,
            "samples": num_samples,
            "tail_tokens": tail,
            "padding_tokens": padding,
            "shards": -(-num_samples // dataset.samples_per_shard),
        },
        "identity": identity,
        "inputs": {f.name: f.identity for f in files},
    }
    if skipped:
        info["skipped"] = skipped
    return info


def make_and_note_shard(building: Path, number: int, *args: Any, progress: TaskProgress) -> ShardEntry:
    """`make_shard`, then a note that it is done, so that a later attempt need not redo it."""
    entry = make_shard(number, *args)
    write_json(building / f"{number:08d}.json", asdict(entry))
    return entry


def check_shard(folder: Path, entry: ShardEntry, *, progress: TaskProgress) -> bool:
    """Whether a shard that was made earlier, and what is beside it, has its content; runs in a worker."""
    return all(
        (folder / name).exists() and sha256_file(folder / name) == sha256 for name, sha256 in entry.hashes.items()
    )


def _still_whole(
    dataset: Dataset, folder: Path, building: Path, numbers: Iterable[int], pool: Pool, report: Say
) -> dict[int, ShardEntry]:
    """The shards that an attempt that was stopped has finished, by their numbers."""
    notes = {n: building / f"{n:08d}.json" for n in numbers if (folder / f"{n:08d}.tar").exists()}
    noted = {n: ShardEntry(**read_json(note)) for n, note in notes.items() if note.exists()}
    noted = {n: entry for n, entry in noted.items() if entry.sums_sha256}  # a release without them began to pack
    if not noted:
        return {}
    sizes = {str(n): entry.bytes for n, entry in noted.items()}
    calls: dict[str, Call] = {str(n): (check_shard, folder, entry) for n, entry in noted.items()}
    meter = _Meter(f"checking the finished shards of {dataset.name}", sum(sizes.values()), report)
    whole, _ = _run(pool, meter, sizes, calls)
    return {n: entry for n, entry in noted.items() if whole.get(str(n))}


def _make_shards(
    dataset: Dataset,
    files: list[FileTokens],
    tokenizer: TokenizerInfo,
    tokenized: Path,
    folder: Path,
    numbers: dict[int, int],
    pool: Pool,
    report: Say,
    *,
    index: bool,
) -> dict[int, ShardEntry]:
    """Make shards, once all token streams are found as recorded.

    Args:
        numbers: of the shards, with their sizes in bytes, or about these.
        index: make the index of documents too.

    Raises:
        DataError: a stream is damaged.
    """
    if not numbers and not index:
        return {}
    sample_format = SampleFormat.for_vocabulary(dataset.seq_len + 1, tokenizer.num_rows)
    building, token_bytes = folder / _BUILDING, sample_format.numpy_dtype.itemsize
    streams = {f.name: f.tokens * token_bytes for f in files}
    checks: dict[str, Call] = {f.name: (check_stream, tokenized, f.name, f.tokens_sha256) for f in files}
    meter = _Meter(f"checking {dataset.name}", sum(streams.values()), report)
    if numbers:
        _raise_all(_run(pool, meter, streams, checks)[1])
    settings = (dataset.samples_per_shard, sample_format, dataset.pad_id, dataset.name, tokenized, building, folder)
    calls: dict[str, Call] = {str(n): (make_and_note_shard, building, n, *settings) for n in numbers}
    sizes = {str(n): size for n, size in numbers.items()}
    if index:
        calls[DOCUMENTS] = (write_document_index, building, folder / DOCUMENTS)
        sizes[DOCUMENTS] = 0
    meter = _Meter(f"packing {dataset.name}", sum(sizes.values()), report)
    made, damaged = _run(pool, meter, sizes, calls)
    _raise_all(damaged)
    meter.say()
    made.pop(DOCUMENTS, None)
    return {int(n): entry for n, entry in made.items()}


def lost_files(folder: Path) -> tuple[dict[int, ShardEntry], bool]:
    """What a finished dataset lacks: the shards, by number, that are not in its folder, or not in their size, or lack
    what is beside them; and whether the index of its documents is gone."""
    entries = read_manifest(folder)

    def is_there(entry: ShardEntry) -> bool:
        path = folder / entry.tar
        return (
            all((folder / name).exists() for name in entry.hashes)
            and path.exists()
            and path.stat().st_size == entry.bytes
        )

    index_gone = DOCUMENTS in recorded_beside(entries) and not (folder / DOCUMENTS).exists()
    return {n: entry for n, entry in enumerate(entries) if not is_there(entry)}, index_gone


def _recorded_info(
    dataset: Dataset, files: list[FileTokens], tokenizer: TokenizerInfo, tokenized: Path, folder: Path, report: Say
) -> dict[str, Any]:
    """`dataset.json` of a finished dataset, written again where it is damaged.

    Raises:
        DataError: it, or the manifest, is damaged, and would be another now.
    """
    try:
        return read_dataset(folder)[1]
    except (DataError, MissingInputError) as e:
        info = _info(dataset, files, tokenizer, tokenized)
        if not write_info_again(folder, info):
            raise
        report(f"{folder / DATASET} is written again: {e}")
        return info


def _make_whole(
    dataset: Dataset,
    files: list[FileTokens],
    tokenizer: TokenizerInfo,
    tokenized: Path,
    folder: Path,
    pools: PoolFactory,
    report: Say,
) -> bool:
    """Make what a finished dataset lacks; return whether shards were lost."""
    entries = read_manifest(folder)
    lost, index = lost_files(folder)
    if lost or index:
        _make_again(dataset, files, tokenizer, tokenized, folder, lost, pools, report, index=index)
        if index:
            check_hash(folder / DOCUMENTS, recorded_beside(entries)[DOCUMENTS])
    if not entries[0].sums_sha256:
        _add_sums(dataset, files, tokenizer, tokenized, folder, pools, report)
    return bool(lost)


def sum_shard(folder: Path, entry: ShardEntry, sample_format: SampleFormat, *, progress: TaskProgress) -> ShardEntry:
    """Write the sums of a shard that was made without; return its entry with them; runs in a worker.

    Raises:
        DataError: the shard is damaged.
    """
    check_hash(folder / entry.tar, entry.sha256)
    sums_sha256 = write_sums(folder / entry.sums, open_shard(folder / entry.tar, entry.num_sequences, sample_format))
    provenance = folder / entry.provenance
    return replace(
        entry,
        sums_sha256=sums_sha256,
        provenance_sha256=sha256_file(provenance) if provenance.exists() else None,
    )


def _add_sums(
    dataset: Dataset,
    files: list[FileTokens],
    tokenizer: TokenizerInfo,
    tokenized: Path,
    folder: Path,
    pools: PoolFactory,
    report: Say,
) -> None:
    """Give a dataset of the first release what later ones have. Its shards and its version stay what they are.

    Raises:
        DataError: a shard is damaged.
    """
    entries, info, version = read_dataset(folder)
    if version_of(entries) != version:
        return  # its manifest was formatted by somebody else, and would become another by being written again
    report(f"{dataset.name} was made by an earlier release: its shards are checked once, and get sums of their samples")
    sample_format = SampleFormat(info["seq_len"] + 1, info["dtype"])
    building = folder / _BUILDING
    write_order(files, tokenized, dataset.shuffle_seed, building)
    sizes = {entry.shard: entry.bytes for entry in entries}
    calls: dict[str, Call] = {entry.shard: (sum_shard, folder, entry, sample_format) for entry in entries}
    calls[DOCUMENTS], sizes[DOCUMENTS] = (write_document_index, building, folder / DOCUMENTS), 0
    with pools(report) as pool:
        made, damaged = _run(pool, _Meter(f"checking {dataset.name}", sum(sizes.values()), report), sizes, calls)
    _raise_all(damaged)
    finish_dataset(folder, [made[entry.shard] for entry in entries], info)


def _make_again(
    dataset: Dataset,
    files: list[FileTokens],
    tokenizer: TokenizerInfo,
    tokenized: Path,
    folder: Path,
    lost: dict[int, ShardEntry],
    pools: PoolFactory,
    report: Say,
    *,
    index: bool,
) -> None:
    """Make shards of a finished dataset that are lost, the index of its documents if it is, and nothing else.

    Raises:
        DataError: what is made is not what the manifest says.
    """
    if lost:
        names = ", ".join(entry.tar for entry in list(lost.values())[:3]) + (", ..." if len(lost) > 3 else "")
        report(f"{dataset.name}: {len(lost)} shards are missing or not whole, and are made again: {names}")
    if index:
        report(f"{dataset.name}: {DOCUMENTS} is missing, and is made again")
    write_order(files, tokenized, dataset.shuffle_seed, folder / _BUILDING)
    with pools(report) as pool:
        numbers = {n: entry.bytes for n, entry in lost.items()}
        made = _make_shards(dataset, files, tokenizer, tokenized, folder, numbers, pool, report, index=index)
    for n, entry in made.items():
        if any(entry.hashes[name] != sha256 for name, sha256 in lost[n].hashes.items()):
            path = folder / entry.tar
            path.unlink()
            raise DataError(
                f"shard {path}, made again, is not what {folder / MANIFEST} says: that file, or the index of a token "
                "stream, is damaged. Delete the dataset's folder to make all of it again"
            )
