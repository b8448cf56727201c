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


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def names(root: Path, *files: str) -> list[str]:
    return [f.name for f in discover(dataset(*files), Home(root))]


def test_base_names_may_repeat(tmp_path: Path) -> None:
    make(tmp_path, "raw/a/x.jsonl", "raw/b/x.jsonl", "raw/b/deep/x.jsonl")
    assert names(tmp_path, "raw/*/x.jsonl") == ["a/x.jsonl", "b/x.jsonl"]
    assert names(tmp_path, "raw/**/*.jsonl") == ["a/x.jsonl", "b/deep/x.jsonl", "b/x.jsonl"]
    assert names(tmp_path, "raw/a/x.jsonl", "raw/b/x.jsonl") == ["a/x.jsonl", "b/x.jsonl"]
    assert names(tmp_path, "raw/a/*.jsonl") == ["x.jsonl"]


def test_a_folder_stands_for_all_files_in_it(tmp_path: Path) -> None:
    make(tmp_path, "raw/a/x.jsonl", "raw/y.jsonl", "raw/_SUCCESS", "raw/a/.x.jsonl.crc", "raw/_temporary/z.jsonl")
    assert names(tmp_path, "raw") == ["a/x.jsonl", "y.jsonl"]
    assert names(tmp_path, str(tmp_path / "raw/")) == ["a/x.jsonl", "y.jsonl"]


def test_files_that_an_earlier_release_named_keep_their_names(tmp_path: Path) -> None:
    make(tmp_path, "raw/a/x.jsonl", "raw/b/y.jsonl", "tokenized/pile/v1/x.jsonl.json")
    assert names(tmp_path, "raw/*/*.jsonl") == ["b/y.jsonl", "x.jsonl"]
    make(tmp_path, "raw/b/x.jsonl")
    assert names(tmp_path, "raw/*/*.jsonl") == ["a/x.jsonl", "b/x.jsonl", "b/y.jsonl"]


def test_a_file_that_lists_files(tmp_path: Path) -> None:
    make(tmp_path, "raw/a.jsonl", "raw/b.jsonl", "raw/c.jsonl")
    (tmp_path / "list.txt").write_text(f"# two of three\nraw/a.jsonl\n\n{tmp_path}/raw/c*.jsonl\n")
    assert names(tmp_path, "@list.txt") == ["a.jsonl", "c.jsonl"]
    (tmp_path / "list.txt").write_text("raw/a.jsonl\nraw/gone.jsonl\n")
    with pytest.raises(MissingInputError, match=r"match no raw file:\n.*raw/gone\.jsonl"):
        names(tmp_path, "@list.txt")
    (tmp_path / "list.txt").write_text("# none\n")
    with pytest.raises(MissingInputError, match=r"list\.txt lists no raw files"):
        names(tmp_path, "@list.txt")


def test_a_name_with_brackets_is_itself_where_it_is_there(tmp_path: Path) -> None:
    make(tmp_path, "raw/x[1].jsonl", "raw/x1.jsonl")
    assert names(tmp_path, "raw/x[1].jsonl") == ["x[1].jsonl"]
    assert names(tmp_path, "raw/x[12].jsonl") == ["x1.jsonl"]


def test_each_pattern_without_a_match_is_named(tmp_path: Path) -> None:
    make(tmp_path, "raw/a.jsonl", "empty/x")
    with pytest.raises(MissingInputError) as e:
        names(tmp_path, "raw/a.jsonl", "part2/b.jsonl", "raw/*.jsonl", "part3/*.jsonl")
    assert "part2/b.jsonl" in str(e.value) and "part3/*.jsonl" in str(e.value)
    assert "raw/a.jsonl" not in str(e.value)


def test_a_broken_link_is_named_and_others_are_followed(tmp_path: Path) -> None:
    make(tmp_path, "real/x.jsonl")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/x.jsonl").symlink_to(tmp_path / "real/x.jsonl")
    (tmp_path / "raw/folder.jsonl").symlink_to(tmp_path / "real")
    [found] = discover(dataset("raw/*.jsonl"), Home(tmp_path))
    assert found.size_bytes == 2
    (tmp_path / "raw/gone.jsonl").symlink_to(tmp_path / "real/gone.jsonl")
    for pattern in ("raw/*.jsonl", "raw/gone.jsonl", "raw"):
        with pytest.raises(
            MissingInputError, match=r"raw/gone\.jsonl is a broken link: there is no .*real/gone\.jsonl"
        ):
            names(tmp_path, pattern)


def test_a_format_may_be_said(tmp_path: Path) -> None:
    make(tmp_path, "raw/part-00000", "raw/x.JSONL", "raw/x.NDJSON.xz", "raw/_SUCCESS")
    assert names(tmp_path, "raw/x.*") == ["x.JSONL", "x.NDJSON.xz"]
    with pytest.raises(ConfigError, match=r"part-00000 has no suffix that can be read(.|\n)*`format`"):
        names(tmp_path, "raw/part-*")
    source = Source(name="pile", files=("raw/part-*",), format="jsonl")
    [found] = discover(dataset("x").model_copy(update={"source": source}), Home(tmp_path))
    assert found.format == "jsonl"
    source = Source(name="pile", files=("raw/part-*",), format="csv")
    with pytest.raises(ConfigError, match="there is no format 'csv'"):
        discover(dataset("x").model_copy(update={"source": source}), Home(tmp_path))


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
