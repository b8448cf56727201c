"""Both stages over a dataset, on Dask: what is done stays, what is missing is made, the manifest comes last."""

import json
import shutil
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openlm_pipeline.corpus.discovery import RawFile
from openlm_pipeline.errors import DataError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.files import atomic_writer, folder_lock, read_json, set_aside, sha256_file, write_json
from openlm_pipeline.lineage.fingerprint import Tree, differences, fingerprint
from openlm_pipeline.result import Report
from openlm_pipeline.shards.dataset import DATASET, MANIFEST, ShardEntry, write_manifest
from openlm_pipeline.shards.format import SampleFormat
from openlm_pipeline.tokenization.cluster import ClientFactory
from openlm_pipeline.tokenization.documents import FileTokens, finished, tokenize_file
from openlm_pipeline.tokenization.packing import PACKING_VERSION, make_shard, order_documents
from openlm_pipeline.tokenization.tokenizer import TokenizerInfo

if TYPE_CHECKING:
    from distributed import Client


_REPORT_SECONDS = 2.0
_BUILDING = ".building"
_IDENTITY = "identity.json"
_QUARANTINE = "quarantine.jsonl"


def _run(client: "Client", report: Report, what: str, calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Run `function(*args)` for each named call on the cluster; results by name, the first error raised."""
    from distributed import as_completed

    started = time.monotonic()
    if find_spec("bokeh"):  # without it the dashboard's pages only say that it is missing
        report(f"Dask dashboard: {client.dashboard_link}")
    futures = {client.submit(function, *args, pure=False): name for name, (function, *args) in calls.items()}
    results: dict[str, Any] = {}
    reported = 0.0
    for future in as_completed(list(futures)):
        results[futures[future]] = future.result()
        elapsed = time.monotonic() - started
        if elapsed - reported >= _REPORT_SECONDS or len(results) == len(calls):
            reported = elapsed
            left = elapsed / len(results) * (len(calls) - len(results))
            report(f"{what}: {len(results)} of {len(calls)} done, {elapsed:.0f} s, about {left:.0f} s left")
    return results


def tokenize_files(
    dataset: Dataset,
    raw_files: list[RawFile],
    tokenizer: TokenizerInfo,
    tokenizer_folder: Path,
    folder: Path,
    clients: ClientFactory,
    report: Report,
) -> tuple[list[FileTokens], list[str]]:
    """Stage 1 over `raw_files`: results in their order, and the names of those that had to be done.

    Raises:
        DataError: a file is damaged; the others that were finished stay.
        BusyError: another process is tokenizing this dataset.
    """
    with folder_lock(folder, "tokenizing"):
        done = {raw.name: finished(dataset, raw, tokenizer, folder) for raw in raw_files}
        largest_first = sorted(raw_files, key=lambda raw: -raw.size_bytes)  # so that no large one is left over
        missing = {
            raw.name: (tokenize_file, dataset, raw, tokenizer, tokenizer_folder, folder)
            for raw in largest_first
            if done[raw.name] is None
        }
        if missing:
            with clients() as client:
                done |= _run(client, report, f"tokenizing {dataset.name}", missing)
    return [done[raw.name] for raw in raw_files], sorted(missing)


def shards_identity(dataset: Dataset, files: list[FileTokens], tokenizer: TokenizerInfo) -> Tree:
    """What the shards of a dataset are made from."""
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "seq_len": dataset.seq_len,
        "samples_per_shard": dataset.samples_per_shard,
        "shuffle_seed": dataset.shuffle_seed,
        "files": {f.name: f.version for f in files},
        "code": PACKING_VERSION,
    }


def pack_shards(
    dataset: Dataset,
    files: list[FileTokens],
    tokenizer: TokenizerInfo,
    tokenized: Path,
    folder: Path,
    clients: ClientFactory,
    report: Report,
) -> tuple[bool, list[str]]:
    """Stage 2: make the dataset in `folder` unless it is there; return (reused, how it differs from what was there).

    A finished dataset of another identity is set aside, not deleted.

    Raises:
        DataError: there is too little text for one sample, or tokens were lost.
        BusyError: another process is packing this dataset.
    """
    identity = shards_identity(dataset, files, tokenizer)
    changed: list[str] = []
    with folder_lock(folder.parent / f".{folder.name}", "packing"):
        if (folder / MANIFEST).exists():
            old = read_json(folder / DATASET)["identity"]
            if old == identity:
                return True, []
            changed = differences(old, identity)
            report(f"set the old shards of {dataset.name} aside as {set_aside(folder)}")
        building = folder / _BUILDING
        begun = building / _IDENTITY
        if folder.exists() and not (begun.exists() and read_json(begun) == identity):
            shutil.rmtree(folder)  # a beginning that can't be told to be of this identity
        write_json(begun, identity)
        _pack(dataset, files, tokenizer, tokenized, folder, building, identity, clients, report)
        shutil.rmtree(building)
    return False, changed


def _pack(
    dataset: Dataset,
    files: list[FileTokens],
    tokenizer: TokenizerInfo,
    tokenized: Path,
    folder: Path,
    building: Path,
    identity: Tree,
    clients: ClientFactory,
    report: Report,
) -> None:
    sample_format = SampleFormat.for_vocabulary(dataset.seq_len + 1, tokenizer.vocab_size)
    order = order_documents(files, tokenized, dataset.shuffle_seed)
    num_samples, tail = divmod(order.num_tokens, sample_format.sample_tokens)
    if num_samples == 0:
        raise DataError(
            f"dataset {dataset.name} has {order.num_tokens} tokens, fewer than one sample of "
            f"{sample_format.sample_tokens}; give it more text"
        )
    order.save(building)
    numbers = range(-(-num_samples // dataset.samples_per_shard))
    entries = {n: e for n in numbers if (e := _finished_shard(folder, building, n)) is not None}
    calls = {
        str(n): (
            make_and_note_shard, building, n, dataset.samples_per_shard, sample_format, dataset.name,
            [f.name for f in files], tokenized, building, folder,
        )
        for n in numbers
        if n not in entries
    }  # fmt: skip
    if calls:
        with clients() as client:
            entries |= {int(n): e for n, e in _run(client, report, f"packing {dataset.name}", calls).items()}
    written = sum(e.tokens for e in entries.values())
    tokens = sum(f.tokens for f in files)
    if written + tail != tokens:
        raise DataError(f"dataset {dataset.name}: {tokens} tokens in, {written} in shards and {tail} in the tail")
    with atomic_writer(folder / _QUARANTINE) as out:
        for f in files:
            out.write((tokenized / f"{f.name}.quarantine.jsonl").read_bytes())
    info = {
        "name": dataset.name,
        "version": dataset.version,
        "fingerprint": fingerprint(identity),
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "eot_id": tokenizer.eot_id,
        "pad_id": None,
        "seq_len": dataset.seq_len,
        "dtype": sample_format.dtype,
        "totals": {
            "files": len(files),
            "documents": sum(f.documents for f in files),
            "quarantined": sum(f.quarantined for f in files),
            "text_bytes": sum(f.text_bytes for f in files),
            "tokens": tokens,
            "samples": num_samples,
            "tail_tokens": tail,
            "shards": len(entries),
        },
        "identity": identity,
        "inputs": {f.name: f.identity for f in files},
    }
    write_json(folder / DATASET, info)
    write_manifest(folder, [entries[n] for n in numbers])


def make_and_note_shard(building: Path, number: int, *args: Any) -> ShardEntry:
    """`make_shard`, then a note that it is done, so that a later attempt need not redo it."""
    entry = make_shard(number, *args)
    write_json(building / f"{number:08d}.json", asdict(entry))
    return entry


def _finished_shard(folder: Path, building: Path, number: int) -> ShardEntry | None:
    note, shard = building / f"{number:08d}.json", folder / f"{number:08d}.tar"
    if not note.exists() or not shard.exists():
        return None
    entry = ShardEntry(**json.loads(note.read_text()))
    return entry if sha256_file(shard) == entry.sha256 else None
