"""A finished dataset of shards: `manifest.jsonl`, `dataset.json`, and samples by number.

The manifest is written last, so a folder without one is unfinished and nobody reads it. The folder is local; what is
missing in it may come from a remote folder with the same files.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.shards.format import SampleFormat, open_shard
from openlm_pipeline.shards.manifest import DATASET, MANIFEST, ShardEntry, check_hash, read_dataset
from openlm_pipeline.shards.samples import Samples
from openlm_pipeline.shards.store import ShardStore, only_one
from openlm_pipeline.shards.sums import agree, damaged_sample, open_checked, read_sums
from openlm_pipeline.storage.remote import download, join, public, remote_size

_MAX_OPEN = 512
"""Shards that all datasets of a process have mapped at a time; each takes one of maybe 1,024 file descriptors."""
_datasets: "WeakSet[ShardedDataset]" = WeakSet()


class ShardedDataset(Samples):
    """Samples of a finished dataset by number, over memory-mapped shards."""

    def __init__(
        self,
        folder: Path,
        *,
        remote: str | None = None,
        cache_bytes: int | None = None,
        made: tuple[list[ShardEntry], dict[str, Any], str, ShardStore | None] | None = None,
    ) -> None:
        """
        Args:
            folder: where `manifest.jsonl`, `dataset.json` and shards are, or are brought.
            remote: fsspec URL of a folder with the same files. `manifest.jsonl` and `dataset.json` are fetched at
                once if they are missing here, shards when they are needed.
            cache_bytes: what the fetched shards may take in `folder`; those that were there count and go never.
            made: entries, info and version, as the attributes, and the store that brings shards, where not all of the
                folder is meant, or they come in some other way.

        Raises:
            MissingInputError: there is no finished dataset.
            DataError: it is damaged.
            ConfigError: the remote folder may not be read, or `cache_bytes` can't hold one shard.
        """
        self.folder, self.remote, self._store = folder, remote, None
        if made is not None:
            self.entries, self.info, self.version, self._store = made
        else:
            for name in (DATASET, MANIFEST) if remote is not None else ():
                _fetch_once(folder, remote, name)
            self.entries, self.info, self.version = read_dataset(folder)
            """The version is a content hash, which covers the sha256 of every shard."""
        entries, info = self.entries, self.info
        if remote is not None:

            def bring(k: int, path: Path) -> None:
                download(join(remote, path.name), path, size=entries[k].bytes, sha256=entries[k].sha256)

            names, sizes = [e.tar for e in entries], [e.bytes for e in entries]
            self._store = ShardStore(folder, names, sizes, [e.sha256 for e in entries], bring, cache_bytes)
        self.format = SampleFormat(info["seq_len"] + 1, info["dtype"])
        self.shard_sizes = np.array([e.num_sequences for e in entries], np.int64)
        """Samples in each shard."""
        self._first = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        _datasets.add(self)
        self._open: OrderedDict[int, tuple[np.ndarray, memoryview | None]] = OrderedDict()

    @property
    def segments(self) -> "list[ShardedDataset]":
        """What it was made of, one after the other: itself, as it extends nothing."""
        return [self]

    def __len__(self) -> int:
        return int(self._first[-1])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        indices = self.checked(indices)
        out = np.empty((len(indices), self.format.sample_tokens), self.format.numpy_dtype)
        by_place = np.argsort(indices, kind="stable")
        places = indices[by_place]
        shards = self.shards_of(places)
        current, expected, unchecked = -1, 0, []
        # Row by row: a fancy index into a mapped shard would copy each sample twice.
        for row, k, i in zip(by_place.tolist(), shards.tolist(), (places - self._first[shards]).tolist()):
            if k != current:
                samples, sums = self._shard(k)
                current = k
            out[row] = samples[i]
            if sums is None:
                unchecked.append(row)
            else:
                expected ^= sums[i]
        if len(unchecked) < len(out):
            checked = np.delete(out, unchecked, axis=0) if unchecked else out
            twice = (places[1:] == places[:-1]).any()  # such a sample would hide its own damage
            if twice or not agree(checked, expected):
                self._check_shards(np.unique(shards).tolist(), places)
                if not twice:
                    raise DataError(
                        f"a sample of {self.folder} was damaged when it was read, and is not now: look at the memory "
                        "and the disks of this machine"
                    )
        return out

    def _check_shards(self, shards: list[int], places: np.ndarray) -> None:
        """Check samples one by one.

        Raises:
            DataError: one of them is damaged.
        """
        for k in shards:
            samples, sums = self._shard(k)
            if sums is not None:
                own = places[self.shards_of(places) == k] - self._first[k]
                if not all(agree(samples[i : i + 1], sums[i]) for i in own.tolist()):
                    raise damaged_sample(self.file(k), samples, sums)

    def shard_samples(self, k: int) -> np.ndarray:
        """All samples of shard `k`, found as they were written: ids[num_sequences, seq_len + 1], read-only.

        Raises:
            DataError: it is damaged.
        """
        self._shard(k)  # which fetches what is not here
        return open_checked(self.folder, self.entries[k], self.format)

    def prefetch(self, indices: np.ndarray) -> None:
        """Start to fetch the shards of these samples in the background, in the order asked; nothing for local data.

        Each call replaces the one before, so it should name all that is wanted soon. With `cache_bytes` no more is
        fetched ahead than fits beside the shard in use.
        """
        if self._store is not None:
            shards, firsts = np.unique(self.shards_of(self.checked(indices)), return_index=True)
            self._store.prefetch(shards[np.argsort(firsts)].tolist())

    def shard_path(self, k: int) -> Path:
        """The local file of shard `k`, fetched if need be; with `cache_bytes` it may go when others are needed."""
        return self.file(k) if self._store is None else self._store.path(k)

    @property
    def has_sums(self) -> bool:
        """Whether damage shows when a sample is read, or showed when its shard was brought here."""
        return self._store is not None or all(e.sums_sha256 for e in self.entries)

    def verify(self, *, fetch: bool = True, since: float = 0.0) -> int:
        """Read every shard and what is beside it, and compare their sha256 with the manifest's.

        Args:
            fetch: fetch remote shards to read them; without it only their sizes are looked up.
            since: seconds since 1970; of a file that was not written or replaced after it, the size is compared alone.

        Returns:
            Number of shards that were read.

        Raises:
            DataError: names the first file that differs.
            MissingInputError: a remote shard is missing.
        """
        read = 0
        for k, entry in enumerate(self.entries):
            path = self.file(k)
            if self._store is not None and (fetch or path.exists()):
                self._store.path(k)  # which compares the hash
                read += 1
            elif self.remote is not None:
                url = join(self.remote, path.name)
                if (size := remote_size(url)) != entry.bytes:
                    raise DataError(f"shard {public(url)} has {size} bytes, but the manifest says {entry.bytes}")
            else:
                read += self.check_shard(k, since)
        return read

    def check_shard(self, k: int, since: float = 0.0) -> bool:
        """Compare a local shard, its sums and its provenance with the manifest; `since` as for `verify`.

        Returns:
            Whether the shard itself was read.

        Raises:
            DataError: names a file that differs.
        """
        entry = self.entries[k]
        open_shard(self.file(k), entry.num_sequences, self.format)
        read = {name: sha256 for name, sha256 in entry.hashes.items() if _ctime(self.folder / name) >= since}
        for name, sha256 in read.items():
            check_hash(self.folder / name, sha256)
        return entry.tar in read

    def file(self, k: int) -> Path:
        """Where shard `k` is, once it is here."""
        return self.folder / self.entries[k].tar

    def shards_of(self, indices: np.ndarray) -> np.ndarray:
        """The shard of each sample."""
        return np.searchsorted(self._first, indices, side="right") - 1

    def _shard(self, k: int) -> tuple[np.ndarray, memoryview | None]:
        """Shard `k` mapped, ids[num_sequences, seq_len + 1], and the sums of its samples."""
        if self._store is not None:
            self._store.path(k)  # notes the use
        if (opened := self._open.get(k)) is None:
            entry = self.entries[k]
            if self._store is None:
                array = open_shard(self.file(k), entry.num_sequences, self.format)
            else:
                with self._store.held(k) as path:
                    array = open_shard(path, entry.num_sequences, self.format)
                # A mapped file takes its space even when it was removed.
                for j in [j for j in list(self._open) if not self._store.has(j)]:
                    self._open.pop(j, None)
                if entry.sums_sha256 is not None:
                    _fetch_once(self.folder, self.remote, entry.sums)
            opened = self._open[k] = array, read_sums(self.folder, entry)
            while len(self._open) > max(1, _MAX_OPEN // len(_datasets)):
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(k)
        return opened


def _ctime(path: Path) -> float:
    """When a file was last written or replaced; infinite where it is missing, so that it is looked for."""
    return path.stat().st_ctime if path.exists() else float("inf")


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
