"""Raw files are found, told apart and stamped; when there are none, the message says where it looked."""

import os
from pathlib import Path

import fsspec
import pytest

from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.experiments.spec import Source, TokenizerSpec
from openlm_pipeline.storage.home import Home


def dataset(*files: str, origin: str = "files") -> Dataset:
    return Dataset(
        source=Source(name="pile", files=files, origin=origin),  # type: ignore[arg-type]
        tokenizer=TokenizerSpec(name="t", source="x"),
        seq_len=8,
        samples_per_shard=8,
        shuffle_seed=0,
    )


def test_globs_below_the_home_and_absolute_paths(tmp_path: Path) -> None:
    for name in ("raw/b.jsonl", "raw/a.jsonl", "raw/sub/c.jsonl.zst", "raw/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = discover(dataset("raw/*.jsonl", str(tmp_path / "raw/sub/c.jsonl.zst"), "raw/a.jsonl"), Home(tmp_path))
    assert [f.name for f in files] == ["a.jsonl", "b.jsonl", "c.jsonl.zst"]
    assert [f.url for f in files] == [str(tmp_path / "raw" / n) for n in ("a.jsonl", "b.jsonl", "sub/c.jsonl.zst")]
    assert files[0].size_bytes == len("raw/a.jsonl")


def test_the_stamp_changes_with_the_file_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("one")
    first = discover(dataset("*.jsonl"), Home(tmp_path))
    assert discover(dataset("*.jsonl"), Home(tmp_path)) == first
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert discover(dataset("*.jsonl"), Home(tmp_path))[0].stamp != first[0].stamp


def test_remote_files(tmp_path: Path) -> None:
    for name in ("y.jsonl", "x.jsonl"):
        with fsspec.open(f"memory://discovery/{name}", "wb") as f:
            f.write(b"{}")
    files = discover(dataset("memory://discovery/*.jsonl"), Home(tmp_path))
    assert [(f.name, f.url, f.size_bytes) for f in files] == [
        (n, f"memory:///discovery/{n}", 2) for n in ("x.jsonl", "y.jsonl")
    ]
    assert discover(dataset("memory://discovery/x.jsonl"), Home(tmp_path)) == files[:1]


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"two raw files named x\.jsonl"):
        discover(dataset("*/x.jsonl"), Home(tmp_path))


def test_a_format_without_reader_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"x\.csv has no suffix"):
        discover(dataset("x.csv"), Home(tmp_path))


@pytest.mark.parametrize(
    "where", ["raw/*.jsonl", "raw/x.jsonl", "memory://nowhere/*.jsonl", "memory://nowhere/x.jsonl"]
)
def test_no_files_says_where_it_looked_and_how_to_set_it(tmp_path: Path, where: str) -> None:
    with pytest.raises(MissingInputError, match=r"sources\.files(.|\n)*OPENLM_RAW_DATA(.|\n)*OPENLM_HOME") as e:
        discover(dataset(where), Home(tmp_path))
    assert Home(tmp_path).resolve(where) in str(e.value)


def test_no_embedded_files_names_the_stage_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="openlm demo"):
        discover(dataset("raw/embedded/train/*.jsonl.zst", origin="embedded"), Home(tmp_path))


def test_an_unknown_protocol_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        discover(dataset("nosuch://bucket/*.jsonl"), Home(tmp_path))
