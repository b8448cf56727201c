"""OpenLM's own shards, local or remote: converted once, and the same samples."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from faulty_s3 import CUT, Bucket

from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.foreign import open_foreign

ROWS = np.random.default_rng(0).integers(0, 50_000, (10, 9))
SETTINGS = {"seq_len": 8, "vocab_size": 50_432, "eot_id": 0, "pad_id": 1}


def shard(rows: np.ndarray) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for n, row in enumerate(rows):
            data = gzip.compress(json.dumps(row.tolist()).encode())
            info = tarfile.TarInfo(f"{n}.json.gz")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def openlm_files(key: str = "num_sequences") -> dict[str, bytes]:
    """Ten samples in two shards."""
    lines = [{"shard": "00000001", key: 6}, {"shard": "00000002", key: 4}]
    return {
        "manifest.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in lines),
        "00000001.tar": shard(ROWS[:6]),
        "00000002.tar": shard(ROWS[6:]),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "openlm"
    path.mkdir()
    for name, content in openlm_files().items():
        (path / name).write_bytes(content)
    return path


def all_samples(made: ShardedDataset) -> np.ndarray:
    return made.gather(np.arange(len(made)))


@pytest.mark.parametrize("key", ["num_sequences", "num_chunks"])
def test_a_remote_folder_is_converted_shard_by_shard_and_once(bucket: Bucket, tmp_path: Path, key: str) -> None:
    for name, content in openlm_files(key).items():
        bucket.put(f"rpj/{name}", content)
    for _ in range(2):
        made = open_foreign(f"{bucket.url}/rpj", tmp_path / "cache", **SETTINGS)
        assert (len(made), made.info["seq_len"], made.format.dtype) == (10, 8, "uint16")
        assert made[9].tolist() == ROWS[9].tolist()
    assert bucket.faults.count("GET", "00000001.tar") == 0
    assert np.array_equal(all_samples(made), ROWS)
    made.verify()
    assert [bucket.faults.count("GET", f"0000000{k}.tar") for k in (1, 2)] == [1, 1]


def test_a_local_folder_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    made = open_foreign(folder, tmp_path / "cache", **SETTINGS)
    assert np.array_equal(all_samples(made), ROWS)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    damaged = tmp_path / "cache/00000001.tar"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    assert np.array_equal(all_samples(open_foreign(folder, tmp_path / "cache", **SETTINGS)), ROWS)


def test_a_cut_fetch_is_mended(bucket: Bucket, tmp_path: Path) -> None:
    for name, content in openlm_files().items():
        bucket.put(f"rpj/{name}", content)
    bucket.faults.set(CUT, path_end=".tar")
    assert np.array_equal(all_samples(open_foreign(f"{bucket.http_url}/rpj", tmp_path / "cache", **SETTINGS)), ROWS)


def test_another_number_of_samples_than_the_manifest_says_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "00000001.tar").write_bytes(shard(ROWS[:5]))
    made = open_foreign(folder, tmp_path / "cache", **SETTINGS)
    with pytest.raises(DataError, match=rf"shard {folder}/00000001.tar .* 5 samples, but the manifest says 6"):
        made.gather(np.arange(10))
    assert made[9].tolist() == ROWS[9].tolist()


def test_a_cache_belongs_to_one_dataset(folder: Path, tmp_path: Path) -> None:
    first = open_foreign(folder, tmp_path / "cache", **SETTINGS)
    with pytest.raises(IdentityError, match="converted from something else: .*eot_id"):
        open_foreign(folder, tmp_path / "cache", **{**SETTINGS, "eot_id": 5})
    other = open_foreign(folder, tmp_path / "other", **{**SETTINGS, "eot_id": 5})
    assert other.version != first.version


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"shard": "1"}', '{"num_chunks": 3}', '{"shard": "1", "num_chunks": "3"}']
)
def test_a_bad_line_of_the_manifest_is_named(folder: Path, tmp_path: Path, line: str) -> None:
    path = folder / "manifest.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"{path}, line 3 is not a manifest entry"):
        open_foreign(folder, tmp_path / "cache", **SETTINGS)
    path.unlink()
    with pytest.raises(MissingInputError, match=f"no shards of OpenLM in {folder}"):
        open_foreign(folder, tmp_path / "cache", **SETTINGS)
