"""A finished dataset of shards: `manifest.jsonl`, `dataset.json`, and samples by number.

The manifest is written last, so a folder without one is unfinished and nobody reads it. The folder is local; what is
missing in it may come from a remote folder with the same files.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.shards.format import SampleFormat, open_shard
from openlm_pipeline.shards.store import ShardStore, only_one
from openlm_pipeline.storage.files import read_json, sha256_file, write_text
from openlm_pipeline.storage.remote import download, join, public, remote_size

MANIFEST = "manifest.jsonl"
DATASET = "dataset.json"
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class ShardEntry:
    """A line of the manifest. `shard` and `num_sequences` are OpenLM's keys."""

    shard: str
    num_sequences: int
    bytes: int
    sha256: str
    tokens: int
    source: str


def write_manifest(folder: Path, entries: list[ShardEntry]) -> None:
    """Write the manifest: the mark that the dataset is whole."""
    write_text(folder / MANIFEST, "".join(json.dumps(vars(e)) + "\n" for e in entries))


def read_manifest(folder: Path) -> list[ShardEntry]:
    """The manifest's lines in order.

    Raises:
        MissingInputError: there is no manifest: the dataset was never made, or not finished.
        DataError: a line is not a manifest entry.
    """
    path = folder / MANIFEST
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise MissingInputError(
            f"there are no finished shards in {folder}; `openlm tokenize RECIPE` makes them"
        ) from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(ShardEntry(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as e:
            raise DataError(f"{path}, line {number} is not a manifest entry: {e}") from e
    return entries


class ShardedDataset:
    """Samples of a finished dataset by number, over memory-mapped shards."""

    def __init__(self, folder: Path, *, remote: str | None = None, cache_bytes: int | None = None) -> None:
        """
        Args:
            folder: where `manifest.jsonl`, `dataset.json` and shards are, or are brought.
            remote: fsspec URL of a folder with the same files. `manifest.jsonl` and `dataset.json` are fetched at
                once if they are missing here, shards when they are needed.
            cache_bytes: what the fetched shards may take in `folder`; those that were there count and go never.

        Raises:
            MissingInputError: there is no finished dataset.
            DataError: it is damaged.
            ConfigError: the remote folder may not be read, or `cache_bytes` can't hold one shard.
        """
        if remote is not None:
            for name in (DATASET, MANIFEST):
                _fetch_once(folder, remote, name)
        entries = read_manifest(folder)
        store = None
        if remote is not None:

            def bring(k: int, path: Path) -> None:
                download(join(remote, path.name), path, size=entries[k].bytes, sha256=entries[k].sha256)

            names, sizes = [f"{e.shard}.tar" for e in entries], [e.bytes for e in entries]
            store = ShardStore(folder, names, sizes, [e.sha256 for e in entries], bring, cache_bytes)
        self._set(folder, entries, read_json(folder / DATASET), sha256_file(folder / MANIFEST), store)
        self.remote = remote

    @classmethod
    def over(
        cls, folder: Path, entries: Sequence[ShardEntry], info: dict[str, Any], version: str, store: ShardStore
    ) -> "ShardedDataset":
        """A dataset whose shards a store brings in some other way; the arguments are as the attributes."""
        self = cls.__new__(cls)
        self._set(folder, list(entries), info, version, store)
        self.remote = None
        return self

    def _set(
        self, folder: Path, entries: list[ShardEntry], info: dict[str, Any], version: str, store: ShardStore | None
    ) -> None:
        self.folder = folder
        self.entries = entries
        self.info = info
        self.format = SampleFormat(info["seq_len"] + 1, info["dtype"])
        self.version = version
        """sha256 of the manifest, which holds the sha256 of every shard."""
        self.shard_sizes = np.array([e.num_sequences for e in entries], np.int64)
        """Samples in each shard."""
        self._first = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._store = store
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` as token ids [seq_len + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        k = int(self._shards_of(index))
        return self._shard(k)[index - self._first[k]]

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Samples in the order asked, as token ids [n, seq_len + 1]; `indices` is int[n].

        Raises:
            IndexError: an index is not that of a sample.
        """
        indices = self._checked(indices)
        shards = self._shards_of(indices)
        out = np.empty((len(indices), self.format.sample_tokens), self.format.numpy_dtype)
        opened = {k: self._shard(k) for k in set(shards.tolist())}
        # Row by row: a fancy index into a mapped shard would copy each sample twice.
        for row, k, i in zip(out, shards.tolist(), (indices - self._first[shards]).tolist()):
            row[:] = opened[k][i]
        return out

    def prefetch(self, indices: np.ndarray) -> None:
        """Start to fetch the shards of these samples in the background, in the order asked; nothing for local data.

        Each call replaces the one before, so it should name all that is wanted soon. With `cache_bytes` no more is
        fetched ahead than fits beside the shard in use.
        """
        if self._store is not None:
            shards, firsts = np.unique(self._shards_of(self._checked(indices)), return_index=True)
            self._store.prefetch(shards[np.argsort(firsts)].tolist())

    def shard_path(self, k: int) -> Path:
        """The local file of shard `k`, fetched if need be; with `cache_bytes` it may go when others are needed."""
        return self.folder / f"{self.entries[k].shard}.tar" if self._store is None else self._store.path(k)

    def verify(self, *, fetch: bool = True, since: float = 0.0) -> int:
        """Read every shard and compare its sha256 with the manifest's.

        Args:
            fetch: fetch remote shards to read them; without it only their sizes are looked up.
            since: seconds since 1970; of a shard that was not written or replaced after it, the size is compared alone.

        Returns:
            Number of shards that were read.

        Raises:
            DataError: names the first shard that differs.
            MissingInputError: a remote shard is missing.
        """
        read = 0
        for k, entry in enumerate(self.entries):
            path = self.folder / f"{entry.shard}.tar"
            if self._store is not None and (fetch or path.exists()):
                self._store.path(k)  # which compares the hash
                read += 1
            elif self.remote is not None:
                url = join(self.remote, path.name)
                if (size := remote_size(url)) != entry.bytes:
                    raise DataError(f"shard {public(url)} has {size} bytes, but the manifest says {entry.bytes}")
            else:
                open_shard(path, entry.num_sequences, self.format)
                if path.stat().st_ctime < since:
                    continue
                read += 1
                if (found := sha256_file(path)) != entry.sha256:
                    raise DataError(
                        f"shard {path} has sha256 {found}, but the manifest says {entry.sha256}: it is damaged. "
                        "Delete it, and `openlm tokenize` makes it again"
                    )
        return read

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"an index is not in range({len(self)})")
        return indices

    def _shards_of(self, indices: Any) -> Any:
        return np.searchsorted(self._first, indices, side="right") - 1

    def _shard(self, k: int) -> np.ndarray:
        """Shard `k` mapped: ids[num_sequences, seq_len + 1]."""
        if self._store is not None:
            self._store.path(k)  # notes the use
        if (array := self._open.get(k)) is None:
            if self._store is None:
                array = open_shard(self.shard_path(k), self.entries[k].num_sequences, self.format)
            else:
                with self._store.held(k) as path:
                    array = open_shard(path, self.entries[k].num_sequences, self.format)
                # A mapped file takes its space even when it was removed.
                for j in [j for j in list(self._open) if not self._store.has(j)]:
                    self._open.pop(j, None)
            self._open[k] = array
        return array


def _fetch_once(folder: Path, remote: str, name: str) -> None:
    path = folder / name
    if path.exists():
        return
    with only_one(folder, name):
        if path.exists():
            return
        try:
            download(join(remote, name), path)
        except MissingInputError as e:
            raise MissingInputError(f"there are no finished shards in {public(remote)}: it has no {name}") from e
