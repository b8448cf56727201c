"""OpenLM's shards: tars with one member a sample, a list of token ids as JSON, gzipped JSON or a Python literal.

Reading takes what OpenLM's own scripts wrote in all their versions (`.json.gz`, `.json`, `.txt`; keys of digits padded
with zeros or blanks, or hashes) and our `.npy` members, in the order of the file. Nothing is skipped: what is not a
sample is an error that names shard and member. Facts about OpenLM's writers and readers are of mlfoundations/open_lm,
`open_lm/data.py` and `open_lm/datapreprocess`.
"""

import array
import ast
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.shards.format import SampleFormat
from openlm_pipeline.storage.files import atomic_writer

OpenLMFormat = Literal["json.gz", "json", "txt"]
EOT = "<|endoftext|>"
PAD = "<|pad|>"
"""What OpenLM's writers of 2023 put in place of ids."""

_BLOCK_BYTES = 512
_MAX_MEMBER_BYTES = 1 << 26
_MAX_LITERAL_BYTES = 1 << 20
# On real text level 3 is 1.8 times as fast as level 6 and gives 10% more bytes.
_GZIP_LEVEL = 3
_GZIP = 31  # zlib's wbits for a gzip header, in which it writes neither time nor name


def read_shard(
    path: Path,
    *,
    seq_len: int,
    vocab_size: int,
    eot_id: int,
    pad_id: int | None = None,
    trim: bool = False,
    num_samples: int | None = None,
) -> np.ndarray:
    """All samples of a shard: ids[n, seq_len + 1], uint16 where the vocabulary allows, else uint32.

    Args:
        vocab_size: of the model, as in OpenLM: a negative id -k stands for `vocab_size - k`.
        eot_id: id for the string `<|endoftext|>`.
        pad_id: id for the string `<|pad|>`.
        trim: take the first seq_len + 1 ids of longer samples. (OpenLM takes a random window of them.)
        num_samples: how many the manifest promises. If given, the archive may lack its end mark, as make_2048.py's may.

    Raises:
        MissingInputError: there is no such file.
        DataError: the archive is cut or damaged, has another number of samples, or a member is not a sample.
    """
    width = seq_len + 1
    strings = {EOT: eot_id, PAD: pad_id}
    samples = []
    for name, data in _members(path, may_lack_end=num_samples is not None):
        try:
            ids = _ids(name, data, strings)
            if len(ids) != width and not (trim and len(ids) > width):
                hint = "; its first ids can be taken instead" if len(ids) > width else ""
                raise ValueError(f"it has {len(ids)} ids, not seq_len + 1 = {width}{hint}")
            samples.append(_in_vocabulary(ids[:width], vocab_size))
        except (ValueError, zlib.error) as e:
            raise DataError(f"shard {path}, member {name}: {e}") from e
    if num_samples is not None and len(samples) != num_samples:
        raise DataError(f"shard {path} has {len(samples)} samples, but the manifest says {num_samples}: it is damaged")
    sample_format = SampleFormat.for_vocabulary(width, vocab_size)
    return np.array(samples, sample_format.numpy_dtype).reshape(-1, width)


def first_length(path: Path) -> int | None:
    """Ids in a shard's first sample; None where it can't be read, or there is none."""
    try:
        for name, data in _members(path, may_lack_end=True):
            return len(_ids(name, data, {EOT: 0, PAD: 0}))
    except (DataError, ValueError, zlib.error):
        pass  # whoever checks the shard says what is wrong with it
    return None


def _members(path: Path, *, may_lack_end: bool) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members that are files."""
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if not info.isreg():
                    continue
                if not 0 <= info.size <= _MAX_MEMBER_BYTES:
                    raise DataError(f"shard {path}, member {info.name}: {info.size} bytes are too many for a sample")
                yield info.name, archive.extractfile(info).read()
            # tarfile takes a broken header for the end of the archive.
            archive.fileobj.seek(archive.offset)
            mark = archive.fileobj.read(_BLOCK_BYTES)
            if mark != bytes(_BLOCK_BYTES) and (mark or not may_lack_end):
                raise DataError(f"shard {path} is cut or damaged at byte {archive.offset}: no member and no end mark")
    except FileNotFoundError:
        raise MissingInputError(f"shard {path} does not exist") from None
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as e:
        raise DataError(f"shard {path} is not a whole tar archive: {e}") from e


def _ids(name: str, data: bytes, strings: dict[str, int | None]) -> np.ndarray:
    """Ids of a member, as it has them: int[n].

    Raises:
        ValueError, zlib.error: its content is not a list of ids.
    """
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    if extension == "json.gz":
        return _to_ids(orjson.loads(_ungzip(data)), strings)
    if extension == "json":
        return _to_ids(orjson.loads(data), strings)
    if extension == "txt":
        return _to_ids(_parse_literal(data), strings)
    if extension == "npy":
        return _parse_npy(data)
    raise ValueError(f"its extension {extension!r} is none of json.gz, json, txt, npy")


def _ungzip(data: bytes) -> bytes:
    stream = zlib.decompressobj(_GZIP)
    text = stream.decompress(data, _MAX_MEMBER_BYTES)
    if not stream.eof or stream.unused_data:
        raise ValueError("its gzip stream is cut, too long, or followed by other bytes")
    return text


def _parse_literal(data: bytes) -> Any:
    """As `ast.literal_eval`, and much faster for what make_2048.py writes: numbers and plain strings."""
    if b'"' not in data and b"\\" not in data:
        try:
            return orjson.loads(data.replace(b"'", b'"'))
        except orjson.JSONDecodeError:
            pass  # Python allows more: the literal parser decides
    if len(data) > _MAX_LITERAL_BYTES or sum(map(data.count, (b"[", b"(", b"{"))) > 1:
        raise ValueError("it is not a flat list of ids")
    try:
        return ast.literal_eval(data.decode().strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as e:
        raise ValueError(f"it is not a Python list: {e}") from e


def _to_ids(values: Any, strings: dict[str, int | None]) -> np.ndarray:
    if not isinstance(values, list):
        raise ValueError(f"it holds no list of ids but a {type(values).__name__}")
    if {*map(type, values)} == {int}:
        try:
            return np.frombuffer(array.array("q", values), np.int64)
        except OverflowError:
            raise ValueError(f"{max(values, key=abs)} is no token id") from None
    return np.array([_to_id(value, strings) for value in values], np.int64)


def _to_id(value: Any, strings: dict[str, int | None]) -> int:
    if type(value) is int and abs(value) < 1 << 63:
        return value
    known = strings.get(value) if isinstance(value, str) else None
    if known is None:
        hint = "; say which id it has (pad_id)" if value == PAD else ""
        raise ValueError(f"{str(value)[:40]!r} is no token id{hint}")
    return known


def _parse_npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is not an npy file of version 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "iu" or len(shape) != 1 or shape[0] * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"its array is {dtype}{list(shape)} in {len(data)} bytes, not a whole list of integers")
    return np.frombuffer(data, dtype, offset=file.tell())


def _in_vocabulary(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    low, high = int(ids.min()), int(ids.max())
    if high >= vocab_size or low < -vocab_size:
        raise ValueError(f"id {high if high >= vocab_size else low} is outside the vocabulary of {vocab_size}")
    return np.where(ids < 0, ids + vocab_size, ids) if low < 0 else ids


def write_openlm_shard(
    path: Path, samples: np.ndarray, first_index: int, *, format: OpenLMFormat, eot_as_string: int | None = None
) -> None:
    """Write a shard that OpenLM reads, atomically; equal samples give equal bytes, `json.gz` for the same zlib.

    Keys are `%012d` like those of make_2048.py, but count through the dataset from `first_index`: webdataset takes two
    members of one key for one sample, also where one shard ends with the key with which the next begins.

    Args:
        samples: ids[n, seq_len + 1].
        eot_as_string: id to be written as `<|endoftext|>`, as make_2048.py does.
    """
    quote = b"'" if format == "txt" else b'"'
    eot = quote + EOT.encode() + quote
    eot_number = None if eot_as_string is None else re.compile(rb"(?<=[\[,])%d(?=[,\]])" % eot_as_string)
    with atomic_writer(path) as f:
        for index, sample in enumerate(np.ascontiguousarray(samples), first_index):
            data = orjson.dumps(sample, option=orjson.OPT_SERIALIZE_NUMPY)
            if eot_number is not None:
                data = eot_number.sub(eot, data)
            if format == "txt":
                data = data.replace(b",", b", ")
            elif format == "json.gz":
                stream = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP)
                data = stream.compress(data) + stream.flush()
            info = tarfile.TarInfo(f"{index:012d}.{format}")
            info.size = len(data)
            f.write(info.tobuf(tarfile.USTAR_FORMAT))
            f.write(data)
            f.write(bytes(-len(data) % _BLOCK_BYTES))
        f.write(bytes(2 * _BLOCK_BYTES))
