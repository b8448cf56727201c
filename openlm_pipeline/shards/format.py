"""The shard: an uncompressed tar of equal-sized `.npy` members, which is also one array.

Member `{index:08d}.npy` holds one sample, a 1-D array of `seq_len + 1` token ids, and `index` counts through the
dataset, with more digits from sample 100,000,000 on; readers take a name of any width. Each member takes the same
number of bytes (512 of tar header, the npy file, zeros up to a multiple of 512), so webdataset reads the file as a tar
and `open_shard` maps it as an array of records with O(1) access.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from openlm_pipeline.errors import DataError
from openlm_pipeline.storage.files import atomic_writer

_BLOCK = 512
_END = bytes(2 * _BLOCK)  # two zero blocks end a tar archive
_NAME_DIGITS = 8
"""At least."""


@dataclass(frozen=True)
class SampleFormat:
    """Size and type of the samples of a dataset."""

    sample_tokens: int
    """Tokens in a stored sample: seq_len + 1."""
    dtype: str
    """`uint16` or `uint32`."""

    @classmethod
    def for_vocabulary(cls, sample_tokens: int, vocab_size: int) -> "SampleFormat":
        """The format for ids below `vocab_size`."""
        return cls(sample_tokens, "uint16" if vocab_size <= 1 << 16 else "uint32")

    @cached_property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def npy_header(self) -> bytes:
        out = io.BytesIO()
        descr = {"descr": self.numpy_dtype.str, "fortran_order": False, "shape": (self.sample_tokens,)}
        np.lib.format.write_array_header_1_0(out, descr)
        return out.getvalue()

    @property
    def member_bytes(self) -> int:
        return len(self.npy_header) + self.sample_tokens * self.numpy_dtype.itemsize

    @property
    def record_bytes(self) -> int:
        return _BLOCK + -(-self.member_bytes // _BLOCK) * _BLOCK

    def shard_bytes(self, num_samples: int) -> int:
        return num_samples * self.record_bytes + len(_END)


def _tar_header(size: int, digits: int) -> np.ndarray:
    """A ustar header block with the number in the name and the checksum still to be filled: uint8[512]."""
    header = bytearray(_BLOCK)
    header[digits : digits + 4] = b".npy"
    header[100:108] = b"0000644\0"
    header[108:124] = b"0000000\0" * 2  # uid, gid
    header[124:136] = b"%011o\0" % size
    header[136:148] = b"%011o\0" % 0  # mtime: equal samples must give equal bytes
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    return np.frombuffer(bytes(header), np.uint8)


def encode_records(samples: np.ndarray, first_index: int, sample_format: SampleFormat) -> np.ndarray:
    """samples[n, sample_tokens] -> the members of a shard, which count from `first_index`: uint8[n, record_bytes]."""
    n = len(samples)
    records = np.zeros((n, sample_format.record_bytes), np.uint8)
    headers = records[:, :_BLOCK]
    end, begin = first_index + n, first_index
    while begin < end:  # names of the same width at a time
        digits = max(_NAME_DIGITS, len(str(begin)))
        stop = min(end, 10**digits)
        named = headers[begin - first_index : stop - first_index]
        named[:] = _tar_header(sample_format.member_bytes, digits)
        powers = 10 ** np.arange(digits - 1, -1, -1, dtype=np.int64)
        named[:, :digits] = np.arange(begin, stop)[:, None] // powers % 10 + ord("0")
        begin = stop
    checksums = headers.sum(axis=1, dtype=np.int64)
    headers[:, 148:154] = (checksums[:, None] >> np.arange(15, -1, -3)) % 8 + ord("0")
    headers[:, 154] = 0
    body = records[:, _BLOCK : _BLOCK + sample_format.member_bytes]
    body[:, : len(sample_format.npy_header)] = np.frombuffer(sample_format.npy_header, np.uint8)
    tokens = np.ascontiguousarray(samples, dtype=sample_format.numpy_dtype)
    body[:, len(sample_format.npy_header) :] = tokens.view(np.uint8).reshape(n, -1)
    return records


def write_shard(path: Path, samples: np.ndarray, first_index: int, sample_format: SampleFormat) -> dict[str, object]:
    """Write a shard atomically; return `{"num_sequences", "bytes", "sha256", "tokens"}`."""
    records = encode_records(samples, first_index, sample_format)
    digest = hashlib.sha256()
    with atomic_writer(path, shared=True) as f:
        for piece in (records.data, _END):
            f.write(piece)
            digest.update(piece)
    return {
        "num_sequences": len(samples),
        "bytes": sample_format.shard_bytes(len(samples)),
        "sha256": digest.hexdigest(),
        "tokens": int(samples.size),
    }


def open_shard(path: Path, num_samples: int, sample_format: SampleFormat) -> np.ndarray:
    """Map a shard as an array of token ids [num_samples, sample_tokens], read-only, without copying.

    Raises:
        DataError: the file is missing, or its size is not that of `num_samples` records.
    """
    expected = sample_format.shard_bytes(num_samples)
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing though the manifest lists it") from None
    if actual != expected:
        raise DataError(f"shard {path} has {actual} bytes, but {num_samples} samples take {expected}: it is damaged")
    record = np.dtype(
        {
            "names": ["tokens"],
            "formats": [(sample_format.numpy_dtype, (sample_format.sample_tokens,))],
            "offsets": [_BLOCK + len(sample_format.npy_header)],
            "itemsize": sample_format.record_bytes,
        }
    )
    return np.memmap(path, dtype=record, mode="r", shape=(num_samples,))["tokens"].view(np.ndarray)
