"""Stage 2 over the streams of a dataset: what is done stays, what is missing is made on a pool."""

import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from openlm_pipeline.corpus.maps import added
from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.fingerprint import Tree, differences, fingerprint
from openlm_pipeline.pools import Call, Pool, PoolFactory, TaskProgress
from openlm_pipeline.result import Say, refusal, refuse
from openlm_pipeline.shards.extended import EXTENDS
from openlm_pipeline.shards.format import SampleFormat, open_shard
from openlm_pipeline.shards.manifest import (
    DATASET,
    DOCUMENTS,
    MANIFEST,
    QUARANTINE,
    QUARANTINE_SUM,
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
    write_text,
)
from openlm_pipeline.tokenization.documents import INDEX_DTYPE, FileTokens, added_up, notes_of_left_out, read_quarantine
from openlm_pipeline.tokenization.exchange import (
    BLOCK_DOCUMENTS,
    BLOCKS,
    MOST_DOCUMENTS,
    Exchange,
    Shuffle,
    add_up,
    gather,
    place,
    scatter,
)
from openlm_pipeline.tokenization.packing import (
    PACKING_VERSION,
    check_stream,
    make_shard,
    packing_tree,
    write_document_index,
    write_order,
)
from openlm_pipeline.tokenization.tasks import Meter, raise_all, run_all
from openlm_pipeline.tokenizers.tokenizer import TokenizerInfo

_BUILDING = ".building"
_IDENTITY = "identity.json"


def shards_identity(
    dataset: Dataset, files: list[FileTokens], tokenizer: TokenizerInfo, extends: str | None = None
) -> Tree:
    """What the shards of a dataset are made from; `extends` is the content of the version that it extends."""
    return {
        **packing_tree(dataset),
        "tokenizer_sha256": tokenizer.sha256,
        "files": {f.name: f.version for f in files},
        **({EXTENDS: {"version": dataset.source.extends, "content": extends}} if extends else {}),
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
    extends: str | None = None,
    exchange: Exchange | None = None,
    target: str | None = None,
) -> tuple[bool, list[str]]:
    """Stage 2: make the dataset in `folder` unless it is there; return (reused, how it differs from what was there).

    What a finished dataset has lost is made again, alone; one of the first release gets what later ones have.

    Args:
        local: the shards are to be in the folder, and not in a store alone.
        extends: content of the version that it extends.
        exchange, target: through which workers hand on what they make, where they share no disk, and where the shards
            go then.
        allow: consents; with `supersede` a finished dataset of another identity is set aside, not deleted.

    Raises:
        ConsentError: another finished dataset is there.
        DataError: there is too little text for one sample, or tokens were lost.
        BusyError: another process is packing this dataset.
    """
    made = _Packing(dataset, files, tokenizer, tokenized, folder, pools, report, extends, exchange, target)
    changed: list[str] = []
    with folder_lock(folder.parent / f".{folder.name}", "packing"):
        if (folder / MANIFEST).exists():
            old = made.recorded_info()["identity"]
            if old == made.identity:
                remade = local and made.complete()
                shutil.rmtree(made.building, ignore_errors=True)
                return not remade, []
            changed = differences(old, made.identity)
            what = "\n  ".join([f"{folder} holds another dataset. What differs:", *changed])
            refuse([refusal("supersede", what, "To keep it, give the source another `version` or name")], allow)
            report(f"set the old shards of {dataset.name} aside as {set_aside(folder)}")
        begun = made.building / _IDENTITY
        for place in (folder, made.building):
            remove_leftovers(place)
        if folder.exists() and not (begun.exists() and read_json(begun) == made.identity):
            _clear(folder)
        write_json(begun, made.identity)
        made.make()
        shutil.rmtree(made.building)
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


@dataclass(frozen=True)
class _Packing:
    """The making of one dataset; the arguments of `pack_shards`."""

    dataset: Dataset
    files: list[FileTokens]
    tokenizer: TokenizerInfo
    tokenized: Path
    folder: Path
    pools: PoolFactory
    report: Say
    extends: str | None = None
    exchange: Exchange | None = None
    target: str | None = None

    @property
    def building(self) -> Path:
        """What only packing needs."""
        return self.folder / _BUILDING

    @cached_property
    def identity(self) -> Tree:
        return shards_identity(self.dataset, self.files, self.tokenizer, self.extends)

    @property
    def sample_format(self) -> SampleFormat:
        return SampleFormat.for_vocabulary(self.dataset.seq_len + 1, self.tokenizer.num_rows)

    def make(self) -> None:
        """All of it, but for the shards that an attempt that was stopped has finished.

        Raises:
            DataError: there is too little text for one sample, a stream is damaged, or tokens were lost.
        """
        info, dataset = self.info(), self.dataset
        totals, record_bytes = info["totals"], self.sample_format.record_bytes
        if totals["samples"] == 0:
            raise DataError(
                f"dataset {dataset.name} has {totals['tokens']} tokens, fewer than one sample of "
                f"{self.sample_format.sample_tokens}; give it more text"
            )
        numbers = range(totals["shards"])
        if not self.exchange:
            self._write_order()
        with self.pools(self.report) as pool:
            if self.exchange:
                entries = self._shuffled(self.exchange, totals, pool)
            else:
                entries = self._still_whole(numbers, pool)
                shard_bytes, all_bytes = dataset.samples_per_shard * record_bytes, totals["samples"] * record_bytes
                missing = {n: min(shard_bytes, all_bytes - n * shard_bytes) for n in numbers if n not in entries}
                entries |= self._make_shards(missing, pool, index=True)
        self._write_quarantine()
        in_shards = sum(e.tokens for e in entries.values()) - totals["padding_tokens"]
        if in_shards + totals["tail_tokens"] != totals["tokens"]:
            raise DataError(f"dataset {dataset.name}: {in_shards} tokens are in shards, which differs from {totals}")
        finish_dataset(self.folder, [entries[n] for n in numbers], info)
        if self.exchange:
            self._shuffle(self.exchange, totals).clear()

    def _shuffle(self, exchange: Exchange, totals: dict[str, Any]) -> Shuffle:
        return Shuffle(
            exchange=exchange,
            key=fingerprint(self.identity)[:16],
            sample_format=self.sample_format,
            samples_per_shard=self.dataset.samples_per_shard,
            samples=totals["samples"],
            seed=self.dataset.shuffle_seed,
            documents=totals["documents"],
            documents_per_block=min(max(BLOCK_DOCUMENTS, -(-totals["documents"] // BLOCKS)), MOST_DOCUMENTS),
            source=self.dataset.name,
            pad_id=self.dataset.pad_id,
            target=self.target,
        )

    def _shuffled(self, exchange: Exchange, totals: dict[str, Any], pool: Pool) -> dict[int, ShardEntry]:
        """All shards, made by workers that share no disk, and the index of documents.

        Raises:
            DataError: a stream is damaged.
        """
        shuffle, width = self._shuffle(exchange, totals), self.sample_format.numpy_dtype.itemsize
        units = shuffle.prepare(self.files)

        def each(doing: str, task: str, function: Callable[..., Any], calls: dict[str, Any], size: Any) -> dict:
            """What all calls of a pass give, by the number of the unit, block or group."""
            made = {number: shuffle.done(f"{task}-{number}") for number in calls}
            missing = {n: (function, shuffle, int(n), *calls[n]) for n in calls if made[n] is None}
            found, damaged = self._run(doing, missing, {n: size(n) for n in missing}, pool)
            raise_all(damaged)
            return made | found

        def of_each(dealt: dict[str, list[int]], count: int) -> dict[str, list[int]]:
            """For each block or group the units that have dealt to it."""
            return {str(n): [int(unit) for unit in units if n in dealt[unit]] for n in range(count)}

        row = 2 * INDEX_DTYPE.itemsize
        lengths = each("placing", "place", place, dict.fromkeys(units, ()), lambda u: units[u].documents * row)
        blocks = {n: (of,) for n, of in of_each(lengths, shuffle.blocks).items()}
        tokens = each("ordering", "block", add_up, blocks, lambda _: shuffle.documents_per_block * row)
        first = [0, *accumulate(tokens[n] for n in blocks)]
        dealt = each("dealing out", "unit", scatter, dict.fromkeys(units, (first,)), lambda u: units[u].tokens * width)
        shuffle.write_index(units, self.files, self.folder / DOCUMENTS)
        groups = {n: (of, totals["tokens"]) for n, of in of_each(dealt, shuffle.groups).items()}
        made = each("packing", "group", gather, groups, lambda _: shuffle.group_tokens * width)
        return dict(enumerate(ShardEntry(**entry) for n in groups for entry in made[n]))

    def _write_quarantine(self) -> None:
        with atomic_writer(self.folder / QUARANTINE) as out:
            for f in self.files:
                out.write(read_quarantine(self.tokenized / f"{f.name}.quarantine.jsonl", f.quarantine_sha256))
        write_text(self.folder / QUARANTINE_SUM, f"{sha256_file(self.folder / QUARANTINE)}  {QUARANTINE}\n")

    def recorded_info(self) -> dict[str, Any]:
        """`dataset.json` of the finished dataset, written again where it is damaged.

        Raises:
            DataError, MissingInputError: it, or the manifest, is damaged, and would be another now.
        """
        try:
            return read_dataset(self.folder)[1]
        except (DataError, MissingInputError) as e:
            info = self.info()
            if not write_info_again(self.folder, info):
                raise
            self.report(f"{self.folder / DATASET} is written again: {e}")
            return info

    def complete(self) -> bool:
        """Make what the finished dataset lacks; return whether shards were lost.

        Raises:
            DataError: a shard is damaged, or what is made again is not what the manifest says.
        """
        entries = read_manifest(self.folder)
        lost, index_lost = lost_files(self.folder, entries)
        if lost or index_lost:
            self._make_again(lost, index=index_lost)
        recorded = self.folder / QUARANTINE_SUM
        sum_lost = not recorded.exists() or not recorded.read_bytes().endswith(f"  {QUARANTINE}\n".encode())
        if not (self.folder / QUARANTINE).exists() or (recorded_beside(entries) and sum_lost):
            self._write_quarantine()
        if not entries[0].sums_sha256:
            self._add_sums()
        return bool(lost)

    def info(self) -> dict[str, Any]:
        """What `dataset.json` says, but for the version."""
        skipped = notes_of_left_out(self.tokenized, self.files) if self.dataset.source.on_bad_file == "skip" else {}
        leaves_out = self.dataset.source.map or self.dataset.source.exclude
        dropped, changed = added([f.dropped for f in self.files]), sum(f.changed for f in self.files)
        tokens = sum(f.tokens for f in self.files)
        num_samples, tail = divmod(tokens, self.sample_format.sample_tokens)
        padding = 0
        if self.dataset.pad_id is not None and tail:
            num_samples, padding, tail = num_samples + 1, self.sample_format.sample_tokens - tail, 0
        info = {
            "name": self.dataset.name,
            "version": self.dataset.version,
            "fingerprint": fingerprint(self.identity),
            "tokenizer": {
                "name": self.tokenizer.name,
                "sha256": self.tokenizer.sha256,
                "vocab_size": self.tokenizer.vocab_size,
                "largest_id": self.tokenizer.num_rows - 1,
            },
            "eot_id": self.tokenizer.eot_id,
            **({"bos_id": self.tokenizer.bos_id} if self.tokenizer.bos_id is not None else {}),
            "pad_id": self.dataset.pad_id,
            "seq_len": self.dataset.seq_len,
            "dtype": self.sample_format.dtype,
            "totals": {
                "files": len(self.files),
                "skipped_files": len(skipped),
                "documents": sum(f.documents for f in self.files),
                "quarantined": sum(f.quarantined for f in self.files),
                "text_bytes": sum(f.text_bytes for f in self.files),
                "special_strings": added_up(f.special_strings for f in self.files),
                **({"dropped": sum(dropped.values()), "changed": changed} if leaves_out else {}),
                "tokens": tokens,
                "samples": num_samples,
                "tail_tokens": tail,
                "padding_tokens": padding,
                "shards": -(-num_samples // self.dataset.samples_per_shard),
            },
            "identity": self.identity,
            "inputs": {f.name: f.identity for f in self.files},
        }
        if skipped:
            info["skipped"] = skipped
        if dropped:
            info["dropped"] = dropped
        if self.dataset.source.breakdown:
            info["breakdown"] = added([f.breakdown for f in self.files])
        return info

    def _write_order(self) -> None:
        write_order(self.files, self.tokenized, self.dataset.shuffle_seed, self.building)

    def _still_whole(self, numbers: Iterable[int], pool: Pool) -> dict[int, ShardEntry]:
        """The shards that an attempt that was stopped has finished, by their numbers."""
        notes = {n: self.building / f"{n:08d}.json" for n in numbers if (self.folder / f"{n:08d}.tar").exists()}
        noted = {}
        for n, note in notes.items():
            with suppress(MissingInputError, DataError, TypeError):  # of one that is damaged the shard is made again
                noted[n] = ShardEntry(**read_json(note))
        noted = {n: entry for n, entry in noted.items() if entry.sums_sha256}  # a release without them began to pack
        if not noted:
            return {}
        calls: dict[str, Call] = {str(n): (check_shard, self.folder, entry) for n, entry in noted.items()}
        sizes = {str(n): entry.bytes for n, entry in noted.items()}
        whole, _ = self._run("checking the finished shards of", calls, sizes, pool)
        return {n: entry for n, entry in noted.items() if whole.get(str(n))}

    def _make_shards(self, numbers: dict[int, int], pool: Pool, *, index: bool) -> dict[int, ShardEntry]:
        """Make shards, once all token streams are found as recorded.

        Args:
            numbers: of the shards, with their sizes in bytes, or about these.
            index: make the index of documents too.

        Raises:
            DataError: a stream is damaged.
        """
        calls: dict[str, Call]
        if numbers:
            streams = {f.name: f.tokens * self.sample_format.numpy_dtype.itemsize for f in self.files}
            calls = {f.name: (check_stream, self.tokenized, f.name, f.tokens_sha256) for f in self.files}
            raise_all(self._run("checking", calls, streams, pool)[1])
        settings = (self.dataset.samples_per_shard, self.sample_format, self.dataset.pad_id, self.dataset.name)
        places = (self.tokenized, self.building, self.folder)
        calls = {str(n): (make_and_note_shard, self.building, n, *settings, *places) for n in numbers}
        if index:
            calls[DOCUMENTS] = self._index_call()
        made, damaged = self._run("packing", calls, {str(n): size for n, size in numbers.items()}, pool)
        raise_all(damaged)
        made.pop(DOCUMENTS, None)
        return {int(n): entry for n, entry in made.items()}

    def _index_call(self) -> Call:
        return write_document_index, self.building, self.folder / DOCUMENTS

    def _run(
        self, doing: str, calls: dict[str, Call], sizes: dict[str, int], pool: Pool
    ) -> tuple[dict[str, Any], dict[str, DataError]]:
        """As `run_all`, with lines that begin with what is done; a call of no size counts nothing."""
        meter = Meter(f"{doing} {self.dataset.name}", sum(sizes.values()), self.report)
        found = run_all(pool, meter, {name: sizes.get(name, 0) for name in calls}, calls)
        meter.say()
        return found

    def _make_again(self, lost: dict[int, ShardEntry], *, index: bool) -> None:
        """Make shards of a finished dataset that are lost, the index of its documents if it is, and nothing else.

        Raises:
            DataError: a shard that is made is not what the manifest says.
        """
        name, folder = self.dataset.name, self.folder
        if lost:
            shown = ", ".join(entry.tar for entry in list(lost.values())[:3]) + (", ..." if len(lost) > 3 else "")
            self.report(f"{name}: {len(lost)} shards are missing or not whole, and are made again: {shown}")
        if index:
            self.report(f"{name}: {DOCUMENTS} is missing, and is made again")
        self._write_order()
        with self.pools(self.report) as pool:
            made = self._make_shards({n: entry.bytes for n, entry in lost.items()}, pool, index=index)
        for n, entry in made.items():
            if any(sha256 != lost[n].hashes.get(file, sha256) for file, sha256 in entry.samples.items()):
                path = folder / entry.tar
                path.unlink()
                raise DataError(
                    f"shard {path}, made again, is not what {folder / MANIFEST} says: that file, or the index of a "
                    "token stream, is damaged. Delete the dataset's folder to make all of it again"
                )
        # Another release of the Parquet library may write the same rows as other bytes.
        before, info, _ = read_dataset(folder)
        entries = list(before)
        for n, entry in made.items():
            entries[n] = replace(before[n], provenance_sha256=entry.provenance_sha256)
        other_index = index and sha256_file(folder / DOCUMENTS) != recorded_beside(before)[DOCUMENTS]
        if before[0].sums_sha256 and (other_index or entries != before):
            finish_dataset(folder, entries, info)

    def _add_sums(self) -> None:
        """Give a dataset of the first release what later ones have. Its shards and its version stay what they are.

        Raises:
            DataError: a shard is damaged.
        """
        entries, info, version = read_dataset(self.folder)
        if version_of(entries) != version:
            return  # its manifest was formatted by somebody else, and would become another by being written again
        name = self.dataset.name
        self.report(
            f"{name} was made by an earlier release: its shards are checked once, and get sums of their samples"
        )
        self._write_order()
        sample_format = SampleFormat(info["seq_len"] + 1, info["dtype"])
        calls: dict[str, Call] = {entry.shard: (sum_shard, self.folder, entry, sample_format) for entry in entries}
        sizes = {entry.shard: entry.bytes for entry in entries}
        with self.pools(self.report) as pool:
            made, damaged = self._run("checking", calls | {DOCUMENTS: self._index_call()}, sizes, pool)
        raise_all(damaged)
        finish_dataset(self.folder, [made[entry.shard] for entry in entries], info)


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


def lost_files(folder: Path, entries: Sequence[ShardEntry]) -> tuple[dict[int, ShardEntry], bool]:
    """What a finished dataset lacks: the shards, by number, that are not in its folder, or not in their size, or lack
    what is beside them; and whether the index of its documents is gone.

    Args:
        entries: of its manifest.
    """

    def is_there(entry: ShardEntry) -> bool:
        path = folder / entry.tar
        return (
            all((folder / name).exists() for name in entry.hashes)
            and path.exists()
            and path.stat().st_size == entry.bytes
        )

    index_gone = DOCUMENTS in recorded_beside(entries) and not (folder / DOCUMENTS).exists()
    return {n: entry for n, entry in enumerate(entries) if not is_there(entry)}, index_gone


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
