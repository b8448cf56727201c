"""Shards on a remote store: fetched once, checked, kept below a limit, and never short."""

import hashlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from faulty_s3 import CUT, FLIP, Bucket

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.manifest import ShardEntry, write_manifest
from openlm_pipeline.storage.files import write_json

FORMAT = SampleFormat(9, "uint16")
ROWS = np.random.default_rng(0).integers(0, 65_536, (40, 9))
PER_SHARD = 4
SHARD_BYTES = FORMAT.shard_bytes(PER_SHARD)


def make_dataset(folder: Path) -> None:
    """Forty samples in ten shards."""
    entries = []
    for n, first in enumerate(range(0, len(ROWS), PER_SHARD)):
        path = folder / f"{n:08d}.tar"
        made = write_shard(path, ROWS[first : first + PER_SHARD], first, FORMAT)
        entries.append(ShardEntry(path.stem, source="text", **made))
    write_json(folder / "dataset.json", {"seq_len": 8, "dtype": "uint16"})
    write_manifest(folder, entries)


@pytest.fixture
def remote(bucket: Bucket, tmp_path: Path) -> str:
    """URL of the dataset on the store."""
    make_dataset(tmp_path / "made")
    for path in (tmp_path / "made").iterdir():
        bucket.put(f"data/{path.name}", path.read_bytes())
    return f"{bucket.url}/data"


def cached(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in folder.glob("*.tar"))


def test_local_samples_are_gathered_in_the_order_asked(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    made = ShardedDataset(tmp_path)
    asked = np.random.default_rng(1).integers(0, len(ROWS), 100)
    assert np.array_equal(made.gather(asked), ROWS[asked])
    assert made.gather(asked[:0]).shape == (0, 9)
    assert made.shard_sizes.tolist() == [PER_SHARD] * 10
    made.prefetch(asked)
    for outside in ([-1], [0, len(ROWS)]):
        with pytest.raises(IndexError):
            made.gather(np.array(outside))


def test_remote_samples_equal_local_ones_and_each_shard_is_fetched_once(
    bucket: Bucket, remote: str, tmp_path: Path
) -> None:
    made = ShardedDataset(tmp_path / "cache", remote=remote)
    assert made.version == ShardedDataset(tmp_path / "made").version
    assert bucket.faults.count("GET", ".tar") == 0
    asked = np.array([39, 0, 1, 38, 0])
    assert np.array_equal(made.gather(asked), ROWS[asked])
    assert made[5].tolist() == ROWS[5].tolist()
    assert cached(tmp_path / "cache") == [0, 1, 9]
    made.verify()
    assert cached(tmp_path / "cache") == list(range(10))
    again = ShardedDataset(tmp_path / "cache", remote=remote)
    again.verify()
    assert np.array_equal(again.gather(np.arange(40)), ROWS)
    assert [bucket.faults.count("GET", f"{k:08d}.tar") for k in range(10)] == [1] * 10


def test_many_threads_that_ask_for_a_shard_fetch_it_once(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    made = ShardedDataset(tmp_path / "cache", remote=remote)
    begin = threading.Barrier(8)

    def ask(i: int) -> list[int]:
        begin.wait()
        return made[i % 3].tolist()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [ROWS[i % 3].tolist() for i in range(8)]
    assert bucket.faults.count("GET", "00000000.tar") == 1


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from openlm_pipeline.shards.dataset import ShardedDataset
made = ShardedDataset(Path(sys.argv[1]), remote=sys.argv[2], cache_bytes=int(sys.argv[3]))
rows = np.concatenate([made.gather(np.arange(i, len(made), 7)) for i in range(7)])
print(int(rows.astype(np.int64).sum()))
"""


@pytest.mark.parametrize("shards_kept", [2, 10])
def test_processes_share_a_cache(bucket: Bucket, remote: str, tmp_path: Path, shards_kept: int) -> None:
    args = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), f"{bucket.http_url}/data"]
    processes = [
        subprocess.Popen([*args, str(shards_kept * SHARD_BYTES)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [p.communicate()[0] for p in processes] == [f"{ROWS.sum()}\n"] * 2
    if shards_kept == 10:
        assert [bucket.faults.count("GET", f"{k:08d}.tar") for k in range(10)] == [1] * 10
    assert len(cached(tmp_path / "cache")) <= shards_kept


def test_prefetched_shards_are_there_before_they_are_read(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    made = ShardedDataset(tmp_path / "cache", remote=remote)
    made.prefetch(np.array([30, 0, 31, 20]))
    made.prefetch(np.array([39, 12, 0]))
    paths = [made.shard_path(k) for k in (9, 3, 0)]
    assert all(p.stat().st_size == SHARD_BYTES for p in paths)
    assert np.array_equal(made.gather(np.array([39, 12, 0])), ROWS[[39, 12, 0]])
    assert [bucket.faults.count("GET", f"{k:08d}.tar") for k in (9, 3, 0)] == [1, 1, 1]


def test_the_cache_keeps_what_was_used_last_and_local_shards_always(
    bucket: Bucket, remote: str, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "00000007.tar").write_bytes((tmp_path / "made/00000007.tar").read_bytes())
    made = ShardedDataset(folder, remote=remote, cache_bytes=3 * SHARD_BYTES)
    for k in (0, 1, 2, 7, 0, 3):
        assert made[k * PER_SHARD].tolist() == ROWS[k * PER_SHARD].tolist()
    assert cached(folder) == [0, 2, 3, 7]
    kept = made[3 * PER_SHARD]
    for k in (4, 5, 6, 8):
        assert np.array_equal(made.gather(np.arange(4) + k * PER_SHARD), ROWS[k * PER_SHARD :][:4])
        assert len(cached(folder)) == 4
    assert kept.tolist() == ROWS[12].tolist()
    assert bucket.faults.count("GET", "00000007.tar") == 0
    with pytest.raises(ConfigError, match="can't hold one shard"):
        ShardedDataset(folder, remote=remote, cache_bytes=SHARD_BYTES - 1)


def test_prefetching_leaves_room_for_the_shard_in_use(remote: str, tmp_path: Path) -> None:
    made = ShardedDataset(tmp_path / "cache", remote=remote, cache_bytes=3 * SHARD_BYTES)
    made.prefetch(np.arange(40))
    for k in (9, 0, 8, 1):
        assert made[k * PER_SHARD].tolist() == ROWS[k * PER_SHARD].tolist()
        assert len(cached(tmp_path / "cache")) <= 3


def test_a_damaged_cached_shard_is_fetched_again(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    ShardedDataset(folder, remote=remote).verify()
    flipped, cut = folder / "00000001.tar", folder / "00000002.tar"
    data = flipped.read_bytes()
    flipped.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    cut.write_bytes(cut.read_bytes()[:-1])
    made = ShardedDataset(folder, remote=remote)
    assert np.array_equal(made.gather(np.arange(40)), ROWS)
    assert [bucket.faults.count("GET", f"{k:08d}.tar") for k in range(4)] == [1, 2, 2, 1]


@pytest.mark.parametrize("fault", [CUT, FLIP, "500"])
@pytest.mark.parametrize("times", [1, 10**6])
def test_a_fault_in_fetching_a_shard_is_mended_or_named(
    bucket: Bucket, remote: str, tmp_path: Path, fault: str, times: int
) -> None:
    made = ShardedDataset(tmp_path / "cache", remote=remote)
    bucket.faults.set(fault, times, path_end="00000003.tar")
    if times == 1:
        assert np.array_equal(made.gather(np.arange(40)), ROWS)
        return
    made.prefetch(np.array([12]))
    with pytest.raises(DataError, match=rf"{remote}/00000003.tar can't be fetched"):
        made.gather(np.arange(40))
    assert cached(tmp_path / "cache") == [0, 1, 2]
    bucket.faults.set(fault, 0)
    assert np.array_equal(made.gather(np.arange(40)), ROWS)


def test_a_remote_shard_of_another_dataset_or_none_is_named(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    made = ShardedDataset(tmp_path / "cache", remote=remote)
    bucket.put("data/00000003.tar", bytes(SHARD_BYTES))
    with pytest.raises(DataError, match=rf"{remote}/00000003.tar has sha256 .* is expected"):
        made[12]
    made.verify(fetch=False)  # asks for sizes only
    bucket.put("data/00000003.tar", bytes(SHARD_BYTES - 1))
    with pytest.raises(DataError, match=rf"{remote}/00000003.tar has {SHARD_BYTES - 1} bytes"):
        made.verify(fetch=False)
    bucket.direct.rm_file(f"{bucket.name}/data/00000003.tar")
    for verify in (made.verify, lambda: made.verify(fetch=False)):
        with pytest.raises(MissingInputError, match=rf"{remote}/00000003.tar does not exist"):
            verify()
    with pytest.raises(MissingInputError, match=rf"no finished shards in {bucket.url}/other"):
        ShardedDataset(tmp_path / "other", remote=f"{bucket.url}/other")


def test_the_version_is_the_hash_of_the_manifest(remote: str, tmp_path: Path) -> None:
    made = ShardedDataset(tmp_path / "cache", remote=remote)
    assert made.version == hashlib.sha256((tmp_path / "made/manifest.jsonl").read_bytes()).hexdigest()


def test_a_program_that_ends_while_shards_come_ends_quietly(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    program = PROGRAM.split("rows =")[0] + "made.prefetch(np.arange(len(made)))"
    args = [sys.executable, "-c", program, str(tmp_path / "cache"), f"{bucket.http_url}/data", str(10 * SHARD_BYTES)]
    done = subprocess.run(args, capture_output=True, text=True, check=True, timeout=300)
    assert (done.stdout, done.stderr) == ("", "")
