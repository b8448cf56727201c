"""What all datasets have in common: samples by number."""

from abc import ABC, abstractmethod

import numpy as np


class Samples(ABC):
    """Samples of token ids, each [seq_len + 1]."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Samples in the order asked, as token ids [n, seq_len + 1]; `indices` is int[n].

        Raises:
            IndexError: an index is not that of a sample.
            DataError: a sample is not what was written, or its shard can't be read.
        """

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` as token ids [seq_len + 1]."""
        return self.gather(np.array([index]))[0]

    def checked(self, indices: np.ndarray) -> np.ndarray:
        """int64[n].

        Raises:
            IndexError: an index is not that of a sample.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"an index is not in range({len(self)})")
        return indices
