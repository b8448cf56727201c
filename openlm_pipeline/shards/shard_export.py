"""A dataset of ours as OpenLM reads it: its shards in one of OpenLM's formats, and then its manifest.

An export that was interrupted resumes: a shard has its name only when it is whole. `export.json` says what the folder
is an export of.
"""

import json
from pathlib import Path
from typing import Literal

import numpy as np

from openlm_pipeline.errors import DataError, IdentityError
from openlm_pipeline.fingerprint import differences
from openlm_pipeline.pools import Call, PoolFactory, TaskProgress
from openlm_pipeline.result import Say, StageResult
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.format import SampleFormat
from openlm_pipeline.shards.manifest import MANIFEST, ShardEntry
from openlm_pipeline.shards.openlm_formats import OpenLMFormat, write_openlm_shard
from openlm_pipeline.shards.sums import open_checked
from openlm_pipeline.storage.export_record import EXPORT, read_record, write_record
from openlm_pipeline.storage.files import folder_lock, remove_leftovers, sha256_file, write_text

EXPORT_VERSION = 1
"""Raised when the same shards would give other exported bytes."""


def export_shards(
    folder: Path,
    out: Path,
    pools: PoolFactory,
    report: Say,
    *,
    format: OpenLMFormat = "json.gz",
    eot_as: Literal["id", "string"] = "id",
    count_key: Literal["num_sequences", "num_chunks"] = "num_sequences",
) -> StageResult:
    """Write a dataset's samples to `out` as OpenLM's shards `00000000.tar`, ... and `manifest.jsonl`.

    Samples keep their order and their number per shard. What the dataset left out (its tail) is not there either.

    Args:
        format: OpenLM's newest readers take all three; those of August 2023 take `json`, and else only `txt`.
        eot_as: `string` writes `<|endoftext|>` as make_2048.py does. OpenLM's readers take the string for a fixed id
            (0 or 50256), whatever the tokenizer; so `id` is right wherever it is not compared with make_2048.py.
        count_key: `num_chunks` is the key of OpenLM's older manifests.

    Raises:
        IdentityError: `out` holds something else.
        DataError: a shard of the dataset is damaged.
        BusyError: another process is exporting to `out`.
    """
    dataset = ShardedDataset(folder)
    identity = {
        "dataset": dataset.version,
        "format": format,
        "eot_as": eot_as,
        "count_key": count_key,
        "code": EXPORT_VERSION,
    }
    eot_as_string = dataset.info["eot_id"] if eot_as == "string" else None
    with folder_lock(out, "exporting"):
        _check_folder(out, identity)
        targets = {entry.shard: out / f"{entry.shard}.tar" for entry in dataset.entries}
        missing = [k for k, entry in enumerate(dataset.entries) if not targets[entry.shard].exists()]
        reused = not missing and (out / MANIFEST).exists()
        if not reused:
            (out / MANIFEST).unlink(missing_ok=True)  # it would promise what is not there
            remove_leftovers(out)
            write_record(out, identity)
            first = np.cumsum(dataset.shard_sizes) - dataset.shard_sizes
            calls: dict[str, Call] = {
                dataset.entries[k].shard: (
                    _export_shard,
                    folder,
                    dataset.entries[k],
                    dataset.format,
                    int(first[k]),
                    targets[dataset.entries[k].shard],
                    format,
                    eot_as_string,
                )
                for k in missing
            }
            if calls:
                with pools(report) as pool:
                    for done, (name, made) in enumerate(pool.run(calls, lambda name, facts: None), 1):
                        if isinstance(made, DataError):
                            raise made
                        report(f"exported shard {name}, {done + len(targets) - len(calls)} of {len(targets)}")
            lines = [{"shard": e.shard, count_key: e.num_sequences} for e in dataset.entries]
            write_text(out / MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
            write_record(out, identity, [*targets.values(), out / MANIFEST])
    facts = {
        "shards": len(targets),
        "samples": len(dataset),
        "tokens": len(dataset) * dataset.format.sample_tokens,
        "bytes": sum(path.stat().st_size for path in targets.values()),
    }
    return StageResult(out, sha256_file(out / MANIFEST), reused, facts)


def _check_folder(out: Path, identity: dict[str, object]) -> None:
    if (out / EXPORT).exists():
        if changed := differences(read_record(out), identity):
            lines = "\n  ".join(changed)
            raise IdentityError(f"{out} holds another export:\n  {lines}\nGive another folder, or delete this one.")
    elif any(out.glob("*.tar")) or (out / MANIFEST).exists():
        raise IdentityError(f"{out} holds shards that no export made; give another folder")


def _export_shard(
    folder: Path,
    entry: ShardEntry,
    sample_format: SampleFormat,
    first_index: int,
    target: Path,
    format: OpenLMFormat,
    eot_as_string: int | None,
    *,
    progress: TaskProgress,
) -> None:
    samples = open_checked(folder, entry, sample_format)
    write_openlm_shard(target, samples, first_index, format=format, eot_as_string=eot_as_string)
