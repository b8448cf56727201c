"""A finished dataset: samples by number, and damage that is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.manifest import ShardEntry, read_manifest, write_manifest
from openlm_pipeline.storage.files import write_json

FORMAT = SampleFormat(9, "uint16")
ROWS = np.random.default_rng(0).integers(0, 65_536, (10, 9))
CUTS = [(0, 4), (4, 8), (8, 10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten samples in three shards, the last one shorter."""
    entries = [
        ShardEntry(f"{n:08d}", source="text", **write_shard(tmp_path / f"{n:08d}.tar", ROWS[a:b], a, FORMAT))
        for n, (a, b) in enumerate(CUTS)
    ]
    write_json(tmp_path / "dataset.json", {"seq_len": 8, "dtype": "uint16"})
    write_manifest(tmp_path, entries)
    return tmp_path


def test_samples_by_number(folder: Path) -> None:
    made = ShardedDataset(folder)
    assert len(made) == 10
    assert [made[i].tolist() for i in (9, 0, 4, 3, 8)] == ROWS[[9, 0, 4, 3, 8]].tolist()
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            made[outside]


def test_manifest_lines_have_openlm_keys(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["num_sequences"]) for line in lines] == [
        (f"{n:08d}", b - a) for n, (a, b) in enumerate(CUTS)
    ]


@pytest.mark.parametrize("position", [0, 600, 1100, -1])
def test_verify_names_the_shard_with_a_flipped_bit(folder: Path, position: int) -> None:
    made = ShardedDataset(folder)
    made.verify()
    path = folder / "00000001.tar"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path} has sha256 .* damaged"):
        made.verify()


def test_verify_names_a_missing_and_a_truncated_shard(folder: Path) -> None:
    path = folder / "00000002.tar"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"{path} has \d+ bytes"):
        ShardedDataset(folder).verify()
    with pytest.raises(DataError, match=rf"{path} has \d+ bytes"):
        ShardedDataset(folder)[9]
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} is missing"):
        ShardedDataset(folder).verify()


def test_the_version_is_that_of_the_content(folder: Path) -> None:
    before = ShardedDataset(folder).version
    assert ShardedDataset(folder).version == before
    entries = read_manifest(folder)
    write_manifest(folder, entries[:-1])
    assert ShardedDataset(folder).version != before


def test_without_a_manifest_there_is_no_dataset(folder: Path) -> None:
    (folder / "manifest.jsonl").unlink()
    with pytest.raises(MissingInputError, match=rf"no finished shards in {folder}; `openlm tokenize RECIPE`"):
        ShardedDataset(folder)


@pytest.mark.parametrize("line", ['{"shard": "x"}', "{", "[]", '"text"', '{"shard": "x", "colour": 1}', ""])
def test_a_bad_manifest_line_is_named(folder: Path, line: str) -> None:
    path = folder / "manifest.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=rf"{path}, line 2 is not a manifest entry"):
        read_manifest(folder)
