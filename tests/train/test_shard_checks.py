"""Damaged shards stop a run by name: by the sums of their samples, or by the hash of those of earlier releases."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from small_run import SmallRun, write_dataset

from openlm_pipeline.errors import DataError
from openlm_pipeline.ordering import order_of
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.file_hashes import FileHashes
from train.hooks.shards import check_shard


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this machine remembers, of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openlm_pipeline" / "file_hashes.jsonl"


@pytest.fixture
def old(small: SmallRun) -> SmallRun:
    """A run on data of the first release."""
    for seed, (name, size) in enumerate({"text": 301, "code": 67, "heldout": 40}.items()):
        write_dataset(small.home, name, size, seed=seed, sums=False)
    return small


def damage(small: SmallRun, name: str, shard: int = 0, sample: int = 5) -> Path:
    dataset = ShardedDataset(small.home.shards(name, "v1"))
    path = dataset.shard_path(shard)
    with path.open("r+b") as f:
        f.seek(sample * dataset.format.record_bytes + 512 + len(dataset.format.npy_header) + 8)
        f.write(b"\xfa")
    return path


def remembered(memory: Path) -> list[str]:
    return [Path(json.loads(line)[0]).relative_to(memory.parents[2] / "home").as_posix() for line in memory.open()]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_flipped_bit_stops_training_when_it_is_read(small: SmallRun, number: int) -> None:
    experiment = small.experiment()
    datasets = [open_dataset(d, small.home) for d in experiment.datasets()]
    source, read = order_of(experiment, [d.shard_sizes for d in datasets[:2]]).picks(0, 64)
    index = read[source == number][:1] if number < 2 else np.array([20])
    dataset = datasets[number]
    shard = int(dataset.shards_of(index)[0])
    sample = int(index[0] - dataset.shard_sizes[:shard].sum())
    path = damage(small, dataset.info["name"], shard, sample)
    with pytest.raises(DataError, match=rf"{path} is damaged.* 1 of its .* from sample {sample} on"):
        small.train("validation.every=1024")
    assert len(small.steps_on_disk()) < 2


@pytest.mark.parametrize("name", ["text", "code", "heldout"])
def test_no_milestone_is_made_of_a_damaged_shard_of_an_earlier_release(old: SmallRun, name: str) -> None:
    path = damage(old, name)
    with pytest.raises(DataError, match=rf"{path} has sha256 .* it is damaged"):
        old.train()
    assert not any(old.steps_on_disk().values())


def test_what_was_checked_is_remembered_and_trains_the_same(old: SmallRun, memory: Path, tmp_path: Path) -> None:
    old.train()
    names = remembered(memory)
    assert sorted(set(names)) == sorted(names) and {n.split("/")[1] for n in names} >= {"text", "code"}
    new = SmallRun(tmp_path / "new", (2, 4))
    new.train()
    assert new.losses() == {step: loss for step, loss in old.losses().items() if step in new.losses()}
    assert remembered(memory) == names  # sums need no hashes


def test_a_shard_is_hashed_again_once_it_changes(old: SmallRun, memory: Path) -> None:
    dataset = ShardedDataset(old.home.shards("text", "v1"))
    check_shard(FileHashes(), dataset, 0)
    os.utime(dataset.shard_path(0), ns=(1, 1))
    check_shard(FileHashes(), dataset, 0)
    check_shard(FileHashes(), dataset, 0)
    assert len(remembered(memory)) == 2
    damage(old, "text")
    with pytest.raises(DataError, match="damaged"):
        check_shard(FileHashes(), dataset, 0)


def test_a_cache_that_cannot_be_written_costs_time_alone(old: SmallRun, memory: Path) -> None:
    memory.parent.parent.mkdir(parents=True)
    memory.parent.write_text("a file, and no folder")
    dataset = ShardedDataset(old.home.shards("text", "v1"))
    check_shard(FileHashes(), dataset, 0)
    damage(old, "text")
    with pytest.raises(DataError, match="damaged"):
        check_shard(FileHashes(), dataset, 0)


def test_a_missing_shard_is_named(old: SmallRun) -> None:
    dataset = ShardedDataset(old.home.shards("text", "v1"))
    dataset.shard_path(1).unlink()
    check_shard(FileHashes(), dataset, 0)
    with pytest.raises(DataError, match=r"00000001\.tar is missing"):
        check_shard(FileHashes(), dataset, 1)


def test_sums_cover_every_sample(small: SmallRun) -> None:
    folder = small.home.shards("text", "v1")
    size = len(ShardedDataset(folder))
    original = {path: path.read_bytes() for path in folder.glob("*.tar")}
    for index in range(0, size, 37):
        k = int(ShardedDataset(folder).shards_of(np.array([index]))[0])
        damage(small, "text", k, index - int(ShardedDataset(folder).shard_sizes[:k].sum()))
        dataset = ShardedDataset(folder)
        dataset.gather(np.delete(np.arange(size), index))
        with pytest.raises(DataError, match="1 of its"):
            dataset.gather(np.arange(size))
        for path, content in original.items():
            path.write_bytes(content)
