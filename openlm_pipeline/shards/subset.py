"""A part of a dataset without a copy: its first samples, which are random text as documents are in random order."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.extended import ExtendedDataset
from openlm_pipeline.shards.samples import Samples


def info_of_part(info: dict[str, Any], samples: int, shards: int) -> dict[str, Any]:
    """What `dataset.json` would say of some of its samples; what it says of documents stays that of all."""
    totals = {"samples": samples, "tokens": samples * (info["seq_len"] + 1), "shards": shards}
    return {**info, "totals": {**info["totals"], **totals, "tail_tokens": 0, "padding_tokens": 0}}


class FirstSamples(Samples):
    """The first samples of a dataset, with what is used of a `ShardedDataset`; of two the smaller begins the larger."""

    def __init__(self, whole: ShardedDataset | ExtendedDataset, count: int) -> None:
        self.whole, self._count = whole, count
        self.folder, self.remote, self.format, self.has_sums = whole.folder, whole.remote, whole.format, whole.has_sums
        self.version = hashlib.sha256(f"{whole.version} {count}".encode()).hexdigest()
        ends = np.cumsum(whole.shard_sizes)
        used = int(np.searchsorted(ends, count)) + 1
        self.entries = whole.entries[:used]
        self.shard_sizes = np.diff(np.minimum(ends[:used], count), prepend=0)
        self.info = info_of_part(whole.info, count, used)

    def __len__(self) -> int:
        return self._count

    def gather(self, indices: np.ndarray) -> np.ndarray:
        return self.whole.gather(self.checked(indices))

    def prefetch(self, indices: np.ndarray) -> None:
        """As of `ShardedDataset`."""
        self.whole.prefetch(indices)

    def shards_of(self, indices: np.ndarray) -> np.ndarray:
        """The shard of each sample."""
        return self.whole.shards_of(indices)

    def shard_samples(self, k: int) -> np.ndarray:
        """As of `ShardedDataset`: those of it that are in this part."""
        return self.whole.shard_samples(k)[: self.shard_sizes[k]]

    def shard_path(self, k: int) -> Path:
        """As of `ShardedDataset`."""
        return self.whole.shard_path(k)

    def file(self, k: int) -> Path:
        """As of `ShardedDataset`."""
        return self.whole.file(k)

    def check_shard(self, k: int, since: float = 0.0) -> bool:
        """As of `ShardedDataset`."""
        return self.whole.check_shard(k, since)
