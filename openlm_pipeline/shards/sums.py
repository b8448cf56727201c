"""A crc32 of each sample of a shard, `NNNNNNNN.sums`: uint32[num_sequences], little-endian, of the bytes of its ids.

Whoever reads samples compares them. Several at once cost one crc32: it is affine, so the sums of samples of one length,
xored, are the sum of the samples, xored. What that can't see is equal damage in an even number of samples read at once.
"""

import hashlib
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from openlm_pipeline.errors import DataError
from openlm_pipeline.shards.format import SampleFormat, open_shard
from openlm_pipeline.shards.manifest import ShardEntry, check_hash
from openlm_pipeline.storage.files import atomic_writer

_DTYPE = np.dtype("<u4")


def write_sums(path: Path, samples: np.ndarray) -> str:
    """Write the sums of samples [n, sample_tokens]; return the sha256 of the file."""
    sums = np.fromiter((zlib.crc32(row) for row in samples), _DTYPE, len(samples)).tobytes()
    with atomic_writer(path, shared=True) as f:
        f.write(sums)
    return hashlib.sha256(sums).hexdigest()


def read_sums(folder: Path, entry: ShardEntry) -> memoryview | None:
    """The sums of a shard by sample, as whole numbers; None where the dataset was made without.

    Raises:
        DataError: they are damaged.
    """
    if entry.sums_sha256 is None:
        return None
    path = folder / entry.sums
    check_hash(path, entry.sums_sha256)
    return memoryview(np.fromfile(path, _DTYPE).astype(np.uint32))


def agree(samples: np.ndarray, sums: int) -> bool:
    """Whether samples [n, sample_tokens] have the sums of which this is the exclusive or."""
    if len(samples) == 1:
        return zlib.crc32(samples[0]) == sums
    if len(samples) % 2 == 0:
        sums ^= _sum_of_zeros(samples[0].nbytes)
    return zlib.crc32(np.bitwise_xor.reduce(samples, axis=0)) == sums


@cache
def _sum_of_zeros(size: int) -> int:
    return zlib.crc32(bytes(size))


def open_checked(folder: Path, entry: ShardEntry, sample_format: SampleFormat) -> np.ndarray:
    """Map a local shard as `open_shard` does, once all of it is found as it was written.

    Raises:
        DataError: it is damaged or missing.
    """
    path = folder / entry.tar
    samples = open_shard(path, entry.num_sequences, sample_format)
    if (sums := read_sums(folder, entry)) is None:
        if entry.sha256:  # none where OpenLM made it, and it was checked when it was converted
            check_hash(path, entry.sha256)
    elif any(zlib.crc32(row) != expected for row, expected in zip(samples, sums)):
        raise damaged_sample(path, samples, sums)
    return samples


def damaged_sample(path: Path, samples: np.ndarray, sums: memoryview) -> DataError:
    """The error for a shard of which a sample differs from its sum; says which, and how many."""
    wrong = [i for i, (row, expected) in enumerate(zip(samples, sums)) if zlib.crc32(row) != expected]
    which = f"{len(wrong)} of its {len(samples)} samples, from sample {wrong[0]} on, are" if wrong else "a sample was"
    return DataError(
        f"shard {path} is damaged, or of another dataset: {which} not what was written. Delete it, and "
        "`openlm tokenize` makes it again"
    )
