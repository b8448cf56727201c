"""Random token ids as a dataset, for measuring speed without data: OpenLM's `--dataset-type synthetic`.

A source whose `shards` is `synthetic://NUM_SAMPLES/SEED`. Sample i is a pure function of the seed and i.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.ordering.mixture import key_of
from openlm_pipeline.ordering.permutation import mix_array
from openlm_pipeline.shards.samples import Samples

SCHEME = "synthetic://"


class SyntheticDataset(Samples):
    """Samples of uniformly drawn ids, with what a trainer uses of a `ShardedDataset`."""

    def __init__(self, url: str, seq_len: int, vocab_size: int) -> None:
        """
        Raises:
            ConfigError: `url` is not `synthetic://NUM_SAMPLES/SEED`.
        """
        try:
            self._count, seed = map(int, url.removeprefix(SCHEME).split("/"))
        except ValueError:
            raise ConfigError(f"{url} is not of the form synthetic://NUM_SAMPLES/SEED") from None
        self.folder = Path(url)
        self._key, self._width, self._vocab_size = np.uint64(key_of(seed)), seq_len + 1, vocab_size
        tokenizer = {"name": None, "sha256": None, "vocab_size": vocab_size}
        self.info: dict[str, Any] = {"name": "synthetic", "tokenizer": tokenizer, "seq_len": seq_len, "eot_id": 0}
        self.info["totals"] = {"samples": self._count, "tokens": self._count * self._width, "shards": 1}
        self.version = hashlib.sha256(f"{url} {seq_len} {vocab_size}".encode()).hexdigest()
        self.shard_sizes = np.array([self._count], np.int64)

    def __len__(self) -> int:
        return self._count

    def gather(self, indices: np.ndarray) -> np.ndarray:
        indices = self.checked(indices)
        numbers = indices[:, None].astype(np.uint64) * np.uint64(self._width) + np.arange(self._width, dtype=np.uint64)
        return (mix_array(numbers ^ self._key) % np.uint64(self._vocab_size)).astype(np.uint32)

    @property
    def has_sums(self) -> bool:
        """Nothing can be damaged."""
        return True

    def prefetch(self, indices: np.ndarray) -> None:
        """Nothing: there is nothing to fetch."""
