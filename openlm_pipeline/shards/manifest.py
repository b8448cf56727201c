"""`manifest.jsonl`, one line a shard, and what it vouches for: the files beside each shard and beside all of them.

Beside shard `NNNNNNNN.tar` are `NNNNNNNN.sums` (a crc32 of each sample) and `NNNNNNNN.provenance.parquet`, beside all
shards `dataset.json`, `quarantine.jsonl` and `documents.parquet`. Datasets of the first release have neither sums nor
an index of documents, and their manifests hold the hashes of the shards alone.

Damage to the manifest itself shows by its seal, and another manifest by the dataset's version: `dataset.json` holds it,
and the manifest the hash of `dataset.json`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.storage.files import check_inside, read_json, sha256_file, write_text

MANIFEST = "manifest.jsonl"
DATASET = "dataset.json"
QUARANTINE = "quarantine.jsonl"
QUARANTINE_SUM = "quarantine.sha256"
"""Not in the manifest: bad records name the place of their raw file, and a manifest is the same wherever it is made."""
DOCUMENTS = "documents.parquet"

_VERSION = "version_sha256"
_UNSEALED = "unsealed"
_FIRST_FIELDS = ("shard", "num_sequences", "bytes", "sha256", "tokens", "source")
"""Of the first release; what a dataset's version is made from, whatever fields came later."""


@dataclass(frozen=True)
class ShardEntry:
    """A line of the manifest. `shard` and `num_sequences` are OpenLM's keys."""

    shard: str
    num_sequences: int
    bytes: int
    sha256: str
    tokens: int
    source: str
    sums_sha256: str | None = None
    provenance_sha256: str | None = None
    beside: dict[str, str] | None = None
    """On the first line: sha256 of the files beside all shards, by their names."""
    seal_sha256: str | None = None
    """On the first line: sha256 of the whole manifest with `unsealed` in this place."""

    @property
    def tar(self) -> str:
        """Name of the shard's file."""
        return f"{self.shard}.tar"

    @property
    def sums(self) -> str:
        """Name of the file of its samples' checksums."""
        return f"{self.shard}.sums"

    @property
    def provenance(self) -> str:
        return f"{self.shard}.provenance.parquet"

    @property
    def samples(self) -> dict[str, str]:
        """Those of `hashes` that speak for the samples themselves, whoever wrote them."""
        return {name: sha256 for name, sha256 in self.hashes.items() if name != self.provenance}

    @property
    def hashes(self) -> dict[str, str]:
        """Recorded sha256 of each of its files, by name, the shard's first."""
        known = {self.tar: self.sha256, self.sums: self.sums_sha256, self.provenance: self.provenance_sha256}
        return {name: sha256 for name, sha256 in known.items() if sha256}

    def line(self) -> str:
        return json.dumps({name: value for name, value in vars(self).items() if value is not None}) + "\n"


def write_manifest(folder: Path, entries: Sequence[ShardEntry]) -> None:
    """Write the manifest: the mark that the dataset is whole."""
    seal = _UNSEALED if recorded_beside(entries) else None
    text = "".join(map(ShardEntry.line, [*(replace(entry, seal_sha256=seal) for entry in entries[:1]), *entries[1:]]))
    if seal:
        text = text.replace(seal, hashlib.sha256(text.encode()).hexdigest(), 1)
    write_text(folder / MANIFEST, text)


def read_manifest(folder: Path) -> list[ShardEntry]:
    """The manifest's lines in order.

    Raises:
        MissingInputError: there is no manifest: the dataset was never made, or not finished.
        DataError: a line is not a manifest entry, or not what was written.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingInputError(
            f"there are no finished shards in {folder}; `openlm tokenize RECIPE` makes them"
        ) from None
    entries = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entries.append(entry := ShardEntry(**orjson.loads(line)))
            check_inside([entry.shard, *(entry.beside or ())], f"{path}, line {number},")
        except (orjson.JSONDecodeError, TypeError) as e:
            raise DataError(f"{path}, line {number} is not a manifest entry: {e}") from e
    seal = (entries[0].seal_sha256 if entries else None) or ""
    if seal and hashlib.sha256(content.replace(seal.encode(), _UNSEALED.encode(), 1)).hexdigest() != seal:
        raise DataError(
            f"{path} is damaged: it is not what was written. Restore it from a copy, or delete the folder to make the "
            "dataset again"
        )
    return entries


def version_of(entries: Sequence[ShardEntry]) -> str:
    """The content hash of a dataset: sha256 of the manifest as the first release writes it, shards' hashes and all."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update((json.dumps({name: getattr(entry, name) for name in _FIRST_FIELDS}) + "\n").encode())
    return digest.hexdigest()


def read_version(folder: Path, entries: Sequence[ShardEntry] | None = None) -> str:
    """The version of the finished dataset in `folder`.

    Args:
        entries: of its manifest, if they were read already.
    """
    entries = read_manifest(folder) if entries is None else entries
    # A manifest of the first release is what it is, even where somebody formatted it anew.
    return version_of(entries) if any(e.sums_sha256 for e in entries[:1]) else sha256_file(folder / MANIFEST)


def finish_dataset(folder: Path, entries: list[ShardEntry], info: dict[str, Any]) -> None:
    """Write `dataset.json`, and then the manifest: the mark that the dataset is whole."""
    write_text(folder / DATASET, _info_text(info, entries))
    beside = {name: sha256_file(folder / name) for name in (DATASET, DOCUMENTS) if (folder / name).exists()}
    entries = [replace(entries[0], beside=beside), *entries[1:]]
    write_manifest(folder, entries)


def _info_text(info: dict[str, Any], entries: Sequence[ShardEntry]) -> str:
    return json.dumps({**info, _VERSION: version_of(entries)}, indent=2) + "\n"


def write_info_again(folder: Path, info: dict[str, Any]) -> bool:
    """Write `dataset.json` of a finished dataset again; False, with nothing written, where it was not `info`."""
    entries = read_manifest(folder)
    text = _info_text(info, entries)
    if hashlib.sha256(text.encode()).hexdigest() != recorded_beside(entries).get(DATASET):
        return False
    write_text(folder / DATASET, text)
    return True


def read_dataset(folder: Path) -> tuple[list[ShardEntry], dict[str, Any], str]:
    """Manifest, `dataset.json` and version of a finished dataset, each compared with what the others say of it.

    Raises:
        MissingInputError: there is none.
        DataError: one of them is damaged, or of another dataset.
    """
    entries = read_manifest(folder)
    path = folder / DATASET
    info = read_json(path)
    version = read_version(folder, entries)
    refuse = partial(_refuse, folder)
    if (recorded := recorded_beside(entries).get(DATASET)) and sha256_file(path) != recorded:
        raise refuse(f"{path} is not the one that {folder / MANIFEST} was written with")
    if info.get(_VERSION, version) != version:
        raise refuse(f"{folder / MANIFEST} is not the one that {path} was written with")
    samples = sum(e.num_sequences for e in entries)
    promised = info.get("totals", {}).get("samples", samples)
    if samples != promised:
        raise refuse(f"{path} says {promised} samples, {folder / MANIFEST} {samples}")
    return entries, info, version


def _refuse(folder: Path, what: str) -> DataError:
    return DataError(
        f"{what}: one of them is damaged, or of another dataset. `openlm tokenize` writes a damaged {DATASET} again; "
        f"if it was not that, restore {MANIFEST} from a copy, or delete the folder to make the dataset again"
    )


def recorded_beside(entries: Sequence[ShardEntry]) -> dict[str, str]:
    """sha256 of the files beside all shards, by name, as far as the manifest says."""
    return (entries[0].beside if entries else None) or {}


def check_hash(path: Path, recorded: str, said_by: str = "the manifest") -> None:
    """
    Args:
        said_by: what has the recorded sha256.

    Raises:
        DataError: a file of the dataset has another sha256 than the manifest says, or is not there.
    """
    what = f"shard {path}" if path.suffix == ".tar" else str(path)
    if not path.exists():
        raise DataError(f"{what} is missing though {said_by} lists it; `openlm tokenize` makes it again")
    if (found := sha256_file(path)) != recorded:
        raise DataError(
            f"{what} has sha256 {found}, but {said_by} says {recorded}: it is damaged. Delete it, and "
            "`openlm tokenize` makes it again"
        )
