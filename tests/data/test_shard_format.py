"""A shard is a tar archive that anyone can read, and the same file is an array."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openlm_pipeline.errors import DataError
from openlm_pipeline.shards.format import SampleFormat, encode_records, open_shard, write_shard

samples = st.sampled_from(["uint16", "uint32"]).flatmap(
    lambda dtype: hnp.arrays(dtype, st.tuples(st.integers(1, 5), st.integers(2, 700)))
)


def members(data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:  # as a stream, the way webdataset reads
        return [(info, archive.extractfile(info).read()) for info in archive]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=samples,
    first=st.one_of(st.integers(0, 10**8 - 5), st.integers(10**8 - 4, 4 * 10**9), st.integers(10**9 - 4, 10**9)),
)
def test_as_archive_and_as_array_it_holds_the_same_samples(samples: np.ndarray, first: int, tmp_path: Path) -> None:
    sample_format = SampleFormat(samples.shape[1], samples.dtype.name)
    path = tmp_path / "shard.tar"
    noted = write_shard(path, samples, first, sample_format)
    found = members(path.read_bytes())

    assert [info.name for info, _ in found] == [f"{first + k:08d}.npy" for k in range(len(samples))]
    for (info, data), sample in zip(found, samples, strict=True):
        assert info.isreg() and info.mode == 0o644 and info.mtime == 0
        array = np.load(io.BytesIO(data), allow_pickle=False)
        assert array.dtype == sample_format.numpy_dtype and array.tolist() == sample.tolist()

    mapped = open_shard(path, len(samples), sample_format)
    assert mapped.dtype == sample_format.numpy_dtype and mapped.tolist() == samples.tolist()
    assert not mapped.flags.writeable
    assert noted["bytes"] == path.stat().st_size == sample_format.shard_bytes(len(samples))
    assert noted["tokens"] == samples.size and noted["num_sequences"] == len(samples)


@given(tokens=st.integers(2, 10_000), dtype=st.sampled_from(["uint16", "uint32"]))
def test_every_record_takes_the_same_bytes(tokens: int, dtype: str) -> None:
    sample_format = SampleFormat(tokens, dtype)
    data = encode_records(np.ones((3, tokens), dtype), 7, sample_format)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        offsets = [info.offset for info in archive]
    assert offsets == [k * sample_format.record_bytes for k in range(3)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_tokens_are_as_narrow_as_the_vocabulary_allows(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    sample_format = SampleFormat.for_vocabulary(4, vocab_size)
    assert sample_format.dtype == dtype
    highest = np.full((1, 4), vocab_size - 1)
    write_shard(tmp_path / "s.tar", highest, 0, sample_format)
    assert open_shard(tmp_path / "s.tar", 1, sample_format).tolist() == highest.tolist()


def test_equal_samples_give_equal_bytes() -> None:
    sample_format = SampleFormat(3, "uint16")
    rows = np.arange(6).reshape(2, 3)
    assert np.array_equal(
        encode_records(rows, 5, sample_format), encode_records(np.asfortranarray(rows), 5, sample_format)
    )


@pytest.mark.parametrize("change", [-1, 1, -512, 512])
def test_a_file_of_another_size_is_refused(change: int, tmp_path: Path) -> None:
    sample_format = SampleFormat(9, "uint16")
    path = tmp_path / "00000000.tar"
    write_shard(path, np.zeros((4, 9)), 0, sample_format)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(DataError, match=rf"shard {path} has {len(data) + change} bytes.*4 samples take {len(data)}"):
        open_shard(path, 4, sample_format)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"shard {tmp_path}/00000003\.tar is missing"):
        open_shard(tmp_path / "00000003.tar", 1, SampleFormat(9, "uint16"))


def test_webdataset_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    rows = np.arange(30).reshape(3, 10)
    write_shard(tmp_path / "00000000.tar", rows, 40, SampleFormat(10, "uint16"))
    found = list(webdataset.WebDataset(str(tmp_path / "00000000.tar"), shardshuffle=False).decode())
    assert [item["__key__"] for item in found] == ["00000040", "00000041", "00000042"]
    assert [item["npy"].tolist() for item in found] == rows.tolist()
