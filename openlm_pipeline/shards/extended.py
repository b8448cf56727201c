"""A dataset that a later version extends: the shards of the earlier one as they are, and a segment of new ones.

The source `{version: v2, extends: v1}` packs only the raw files that v1 lacks, in v2's own folder. The samples of v1
keep their numbers, those of the new segment come after them. `dataset.json` of the segment names the content of what
it extends, so another v1 is refused.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from openlm_pipeline.errors import IdentityError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.manifest import ShardEntry
from openlm_pipeline.shards.samples import Samples

EXTENDS = "extends"
"""In a segment's identity: the `version` that it extends, and the sha256 of its `content`."""


def extended_version(before: str, segment: str) -> str:
    """sha256 of both contents."""
    return hashlib.sha256(f"{before} {segment}".encode()).hexdigest()


class ExtendedDataset(Samples):
    """Samples of several segments one after the other, with what is used of a `ShardedDataset`."""

    def __init__(self, before: "ShardedDataset | ExtendedDataset", segment: ShardedDataset) -> None:
        """
        Raises:
            IdentityError: the segment extends another content, or has samples of another kind.
        """
        recorded = segment.info["identity"][EXTENDS]
        if recorded["content"] != before.version:
            raise IdentityError(
                f"{segment.folder} extends {recorded['version']} of content {recorded['content'][:12]}, and "
                f"{before.folder} has {before.version[:12]}: make {segment.info['version']} again, or restore what it "
                "extends"
            )
        for name in ("seq_len", "dtype", "eot_id", "tokenizer"):
            if segment.info[name] != before.info[name]:
                raise IdentityError(
                    f"{segment.folder} has {name} {segment.info[name]}, and {before.folder}, which it extends, "
                    f"{before.info[name]}"
                )
        self.segments: list[ShardedDataset] = [*before.segments, segment]
        self.folder, self.remote, self.format = segment.folder, segment.remote, segment.format
        self.version = extended_version(before.version, segment.version)
        self.info = _added(before.info, segment.info)
        self.entries: list[ShardEntry] = [entry for s in self.segments for entry in s.entries]
        self.shard_sizes = np.concatenate([s.shard_sizes for s in self.segments])
        self._first = np.concatenate([[0], np.cumsum([len(s) for s in self.segments])])
        self._first_shard = np.concatenate([[0], np.cumsum([len(s.entries) for s in self.segments])])

    def __len__(self) -> int:
        return int(self._first[-1])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        indices = self.checked(indices)
        out = np.empty((len(indices), self.format.sample_tokens), self.format.numpy_dtype)
        for segment, mine, own in self._by_segment(indices):
            out[mine] = segment.gather(own)
        return out

    def prefetch(self, indices: np.ndarray) -> None:
        """As of `ShardedDataset`, in each segment."""
        for segment, _, own in self._by_segment(np.asarray(indices, np.int64)):
            segment.prefetch(own)

    def shards_of(self, indices: np.ndarray) -> np.ndarray:
        """The shard of each sample."""
        return np.searchsorted(np.cumsum(self.shard_sizes), indices, side="right")

    def shard_samples(self, k: int) -> np.ndarray:
        """As of `ShardedDataset`."""
        segment, own = self._shard(k)
        return segment.shard_samples(own)

    def shard_path(self, k: int) -> Path:
        """As of `ShardedDataset`."""
        segment, own = self._shard(k)
        return segment.shard_path(own)

    def file(self, k: int) -> Path:
        """As of `ShardedDataset`."""
        segment, own = self._shard(k)
        return segment.file(own)

    def check_shard(self, k: int, since: float = 0.0) -> bool:
        """As of `ShardedDataset`."""
        segment, own = self._shard(k)
        return segment.check_shard(own, since)

    def verify(self, *, fetch: bool = True, since: float = 0.0) -> int:
        """As of `ShardedDataset`, of all segments."""
        return sum(segment.verify(fetch=fetch, since=since) for segment in self.segments)

    @property
    def has_sums(self) -> bool:
        """As of `ShardedDataset`."""
        return all(segment.has_sums for segment in self.segments)

    def _shard(self, k: int) -> tuple[ShardedDataset, int]:
        s = int(np.searchsorted(self._first_shard, k, side="right")) - 1
        return self.segments[s], k - int(self._first_shard[s])

    def _by_segment(self, indices: np.ndarray) -> Iterator[tuple[ShardedDataset, np.ndarray, np.ndarray]]:
        """(segment, places in `indices`, its samples) of each segment that has some."""
        of = np.searchsorted(self._first, indices, side="right") - 1
        for s in np.unique(of).tolist():
            mine = np.flatnonzero(of == s)
            yield self.segments[s], mine, indices[mine] - self._first[s]


def _added(before: dict[str, Any], segment: dict[str, Any]) -> dict[str, Any]:
    """What `dataset.json` would say of both."""
    from openlm_pipeline.corpus.maps import added

    totals = {
        name: None if None in (before["totals"].get(name, 0), count) else before["totals"].get(name, 0) + (count or 0)
        for name, count in {**dict.fromkeys(before["totals"], 0), **segment["totals"]}.items()
    }
    identity = segment["identity"] | {"files": {**before["identity"]["files"], **segment["identity"]["files"]}}
    info = segment | {"totals": totals, "identity": identity, "inputs": before["inputs"] | segment["inputs"]}
    for name in ("dropped", "breakdown"):
        if found := added([part[name] for part in (before, segment) if name in part]):
            info[name] = found
    return info
