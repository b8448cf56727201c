"""A dataset copied to a store: all of it or no manifest; a stopped copy resumes; nothing of another is overwritten."""

from pathlib import Path

import numpy as np
import pytest
from faulty_s3 import FLIP_SENT, Bucket

from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.manifest import ShardEntry, write_manifest
from openlm_pipeline.shards.publish import publish
from openlm_pipeline.storage.files import write_json

FORMAT = SampleFormat(9, "uint16")


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65_536, (12, 9))


def make_dataset(folder: Path, seed: int = 0) -> Path:
    """Twelve samples in three shards, with what lies beside them."""
    entries = []
    for n in range(3):
        path = folder / f"{n:08d}.tar"
        made = write_shard(path, rows(seed)[4 * n : 4 * n + 4], 4 * n, FORMAT)
        entries.append(ShardEntry(path.stem, source="text", **made))
        (folder / f"{path.stem}.provenance.parquet").write_bytes(f"provenance {n}".encode())
    (folder / "quarantine.jsonl").write_text("")
    write_json(folder / "dataset.json", {"seq_len": 8, "dtype": "uint16"})
    write_manifest(folder, entries)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "made")


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_what_is_published_is_the_dataset_and_reads_as_it(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    publish(folder, f"{bucket.url}/data/", lines.append)
    assert {f"data/{name}" for name in files(folder)} == bucket.names()
    assert all(bucket.read(f"data/{name}") == content for name, content in files(folder).items())
    made = ShardedDataset(tmp_path / "cache", remote=f"{bucket.url}/data")
    assert np.array_equal(made.gather(np.arange(12)), rows(0))
    uploads = [path for method, path in bucket.faults.requests if method == "PUT"]
    assert uploads[-1].endswith("/manifest.jsonl")
    assert lines == [f"published 3 shards in {bucket.url}/data/: 9 files sent, 0 were there"]
    publish(folder, f"{bucket.url}/data", lines.append)
    assert lines[1:] == [f"published 3 shards in {bucket.url}/data: 0 files sent, 9 were there"]


@pytest.mark.parametrize("fault", [FLIP_SENT, "500"])
def test_a_failed_copy_has_no_manifest_and_goes_on_where_it_was(bucket: Bucket, folder: Path, fault: str) -> None:
    bucket.faults.set(fault, 10**6, method="PUT", path_end="00000001.tar")
    with pytest.raises(DataError, match=r"00000001.tar can't be uploaded"):
        publish(folder, f"{bucket.url}/data", print)
    assert not {"data/manifest.jsonl", "data/00000001.tar"} & bucket.names()
    bucket.faults.reset()
    publish(folder, f"{bucket.url}/data", print)
    sent = [path for method, path in bucket.faults.requests if method == "PUT"]
    assert not any(path.endswith("00000000.tar") for path in sent)
    assert all(bucket.read(f"data/{name}") == content for name, content in files(folder).items())


def test_leftovers_of_the_same_size_are_not_taken_for_it(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", seed=1)
    for url in (f"{bucket.url}/data", "memory://published"):
        publish(other, url, print)
        with pytest.raises(IdentityError, match="holds another finished dataset"):
            publish(folder, url, print)
    bucket.direct.rm_file(f"{bucket.name}/data/manifest.jsonl")
    publish(folder, f"{bucket.url}/data", print)
    assert all(bucket.read(f"data/{name}") == content for name, content in files(folder).items())


def test_shards_can_be_deleted_once_they_are_there(bucket: Bucket, folder: Path) -> None:
    bucket.faults.set("500", 10**6, method="PUT", path_end="manifest.jsonl")
    with pytest.raises(DataError):
        publish(folder, f"{bucket.url}/data", print, delete_local=True)
    assert len(files(folder)) == 9
    bucket.faults.reset()
    for _ in range(2):
        publish(folder, f"{bucket.url}/data", print, delete_local=True)
        assert set(files(folder)) == {"quarantine.jsonl", "dataset.json", "manifest.jsonl"}
    assert np.array_equal(ShardedDataset(folder, remote=f"{bucket.url}/data").gather(np.arange(12)), rows(0))
    publish(folder, f"{bucket.url}/data", print)


def test_damaged_missing_and_unfinished_shards_are_not_published(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    path = folder / "00000002.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"shard {path} is damaged"):
        publish(folder, f"{bucket.url}/data", print)
    path.unlink()
    with pytest.raises(DataError, match=f"shard {path} is missing"):
        publish(folder, f"{bucket.url}/data", print)
    with pytest.raises(MissingInputError, match="no finished shards"):
        publish(tmp_path / "empty", f"{bucket.url}/data", print)
    assert "data/manifest.jsonl" not in bucket.names()
