"""`openlm fsck` finds every damaged and every missing file, and what it sets aside is made again, the same."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from commands import openlm

from openlm_pipeline.runs.folder import RunFolder

LAST = "runs/tiny/v1/checkpoints/step-00000157"
MENDED = {  # file: the command that makes it again
    "tokenizers/tiny_bpe/tokenizer.json": "tokenize tiny",
    "tokenized/tiny_text/v1/a.jsonl.tokens": "tokenize tiny",
    "tokenized/tiny_text/v1/a.jsonl.documents": "tokenize tiny",
    "tokenized/tiny_text/v1/a.jsonl.offsets": "tokenize tiny",
    "shards/tiny_text/v1/00000001.tar": "tokenize tiny",
    "shards/tiny_text/v1/00000001.sums": "tokenize tiny",
    "shards/tiny_text/v1/00000001.provenance.parquet": "tokenize tiny",
    "shards/tiny_text/v1/dataset.json": "tokenize tiny",
    f"{LAST}/checkpoint.json": "train tiny --allow remake; evaluate tiny",
    "scorecards/tiny/v1/t0040K/scorecard.json": "evaluate tiny@40K",
    "scorecards/tiny/v1/t0040K/items.parquet": "evaluate tiny@40K",
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def found(pipeline, *options: str) -> list[dict]:
    ended = openlm("fsck", "--json", *options, variables=pipeline.variables)
    assert ended.returncode == (4 if ended.stdout else 0), ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("how", [flip, Path.unlink], ids=["flipped", "deleted"])
def test_each_damaged_file_is_found_and_made_again(finished, tmp_path, how):
    pipeline = finished.copy(tmp_path)
    assert found(pipeline) == []
    before = {name: sha256(pipeline.home / name) for name in MENDED}
    for name, command in MENDED.items():
        path = pipeline.home / name
        how(path)
        damaged = found(pipeline)
        assert damaged and all(d["harms"] and d["mends"] for d in damaged), name
        assert any(path.name in d["what"] or path.name in d["path"] for d in damaged), (name, damaged)
        found(pipeline, "--repair")
        for each in command.split("; "):
            ended = openlm(*each.split(), variables=pipeline.variables)
            assert ended.returncode == 0, (name, ended.stderr)
        assert found(pipeline) == [], name
        if not name.startswith(("runs", "scorecards")):  # those hold times
            assert sha256(path) == before[name], name


def test_a_milestone_that_is_gone_is_missed(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    shutil.rmtree(pipeline.home / "runs/tiny/v1/checkpoints/step-00000040")
    (damage,) = found(pipeline)
    assert "t0010K, which is not there" in damage["what"] and damage["mends"].endswith("or: openlm train tiny")
    for command in ("train tiny", "evaluate tiny"):
        assert openlm(*command.split(), variables=pipeline.variables).returncode == 0
    assert found(pipeline) == []


@pytest.mark.parametrize("name", ["run.json", "experiment.yaml"])
def test_a_run_that_lost_what_says_which_it_is_is_named(finished, tmp_path, name):
    pipeline = finished.copy(tmp_path)
    (pipeline.run_folder / name).unlink()
    (damage,) = found(pipeline, "--repair")
    assert name in damage["what"] and not damage["movable"] and pipeline.run_folder.exists()


def test_what_a_trainer_is_at_is_left_out(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    (pipeline.home / LAST / "COMPLETE").unlink()
    with RunFolder(pipeline.run_folder).lock():
        assert found(pipeline, "--repair") == []
    assert (pipeline.home / LAST).exists() and found(pipeline) != []


def test_scores_in_another_precision_are_no_damage(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("evaluation: {", "evaluation: {precision: bf16, "))
    assert openlm("evaluate", "tiny@40K", variables=pipeline.variables).returncode == 0
    assert found(pipeline) == []
    card = json.loads((pipeline.home / "scorecards/tiny/v1/t0040K/scorecard.json").read_text())
    assert card["precision"] == "bf16"


def test_what_is_known_of_seen_items_is_looked_at(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    command = "contamination", "tiny", "--json", "--workers=1"
    items = openlm(*command, variables=pipeline.variables)
    assert items.returncode == 0 and found(pipeline) == []
    folders = [pipeline.home / "contamination", pipeline.home / "scorecards" / "tiny" / "v1" / "t0040K"]
    patterns = ("suites/*/*/windows.*", "datasets/*/*/*/*/*.parquet", "contamination.parquet")
    paths = [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]
    assert len(paths) >= 4
    for path in paths:
        path.write_bytes(path.read_bytes()[:-20])
        (damage,) = found(pipeline, "--repair")
        assert path.name in damage["what"] and "openlm contamination" in damage["mends"]
        again = openlm(*command, variables=pipeline.variables)
        assert again.returncode == 0 and json.loads(again.stdout) == json.loads(items.stdout)
        assert path.exists() and found(pipeline) == []
