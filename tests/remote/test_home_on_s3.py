"""A home at an S3 URL: what one machine made another one has, whole or not at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faulty_s3 import Bucket
from small_run import SmallRun
from tiny_pipeline import LABELS, RECIPE, REPOSITORY, SUITE, FinishedPipeline

from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pipeline import evaluation as scoring
from openlm_pipeline.pipeline import reports as reporting
from openlm_pipeline.pipeline import training as training_stage
from openlm_pipeline.pools import DaskSettings
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.upload import push_run
from openlm_pipeline.storage.files import read_json
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.sync import MARK


def machine(bucket: Bucket, cache: Path) -> Home:
    """The home at the bucket as a machine with this cache has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENLM_HOME", f"{bucket.url}/home/")
        patch.setenv("OPENLM_HOME_CACHE", str(cache))
        return Home.from_env()


def files(folder: Path) -> dict[str, bytes]:
    """Content of the files of a home that are not of one machine only."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock" and ".sync" not in p.parts
    }


def write(folder: Path, **contents: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


def test_the_place_of_the_cache_says_what_it_is_of_and_other_processes_find_the_same(bucket: Bucket, tmp_path: Path):
    home = machine(bucket, tmp_path)
    assert home.root == tmp_path / bucket.name / "home"
    assert home.url == f"{bucket.url}/home"
    assert home.resolve("raw/text/*.jsonl") == f"{bucket.url}/home/raw/text/*.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in home.variables.items():
            patch.setenv(name, value)
        assert Home.from_env() == home


def test_a_local_home_pushes_and_pulls_nothing(tmp_path: Path):
    home = Home(tmp_path)
    with home.artefact(home.report("a", "v1")) as folder:
        write(folder, a="1")
    assert set(files(tmp_path)) == {"reports/a/v1/a"}


def test_a_password_in_the_url_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENLM_HOME", "s3://key:secret@bucket/home")
    with pytest.raises(ConfigError) as refused:
        Home.from_env()
    assert "secret" not in str(refused.value)


def test_what_is_made_on_one_machine_is_on_the_other_byte_for_byte(bucket: Bucket, tmp_path: Path):
    a, b = machine(bucket, tmp_path / "a"), machine(bucket, tmp_path / "b")
    with a.artefact(a.shards("text", "v1")) as folder:
        write(folder, manifest="m", x_json="{}")
        write(folder / "deep", y="y" * 100)
        write(folder, **{"half.tmp": "of this machine"})
    b.pull(b.shards("text", "v1"))
    expected = files(a.root)
    del expected["shards/text/v1/half.tmp"]
    assert files(b.root) == expected


def test_what_is_there_already_is_neither_sent_nor_fetched_again(bucket: Bucket, tmp_path: Path):
    a, b = machine(bucket, tmp_path / "a"), machine(bucket, tmp_path / "b")
    folder = write(a.report("x", "v1"), one="1", two="2")
    a.push(folder)
    b.pull(b.report("x", "v1"))
    bucket.faults.reset()
    a.push(folder)
    b.pull(b.report("x", "v1"))
    assert bucket.faults.count("PUT", "") == 0
    assert {path.rsplit("/")[-1] for method, path in bucket.faults.requests if method == "GET"} <= {
        MARK,
        bucket.name,
        "",
    }
    write(folder, two="changed")
    bucket.faults.reset()
    a.push(folder)
    assert sorted(p.rsplit("/")[-1] for m, p in bucket.faults.requests if m == "PUT") == [MARK, "two"]
    b.pull(b.report("x", "v1"))
    assert files(b.root) == files(a.root)


def test_what_was_changed_here_is_not_overwritten(bucket: Bucket, tmp_path: Path):
    a, b = machine(bucket, tmp_path / "a"), machine(bucket, tmp_path / "b")
    a.push(write(a.report("x", "v1"), one="of a", two="2"))
    write(b.report("x", "v1"), one="of b")
    b.pull(b.report("x", "v1"))
    assert files(b.root) == {"reports/x/v1/one": b"of b"}
    b.push(b.report("x", "v1"))
    a.pull(a.report("x", "v1"))  # unchanged there since its push, so what is newer comes, and what went goes
    assert files(a.root) == {"reports/x/v1/one": b"of b"}


KILLED = """
import os, sys, threading
from pathlib import Path
from openlm_pipeline.storage import remote
from openlm_pipeline.storage.home import Home

whole, lock, left = remote.upload, threading.Lock(), [int(sys.argv[2])]

def upload(path, url):
    with lock:
        if left[0] == 0:
            os._exit(9)
        whole(path, url)
        left[0] -= 1

remote.upload = upload
home = Home.from_env()
home.push(home.root / sys.argv[1])
"""


def push_killed_after(home: Home, folder: str, uploads: int) -> None:
    environment = {**os.environ, **home.variables, "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, str(uploads)], env=environment, check=False)
    assert killed.returncode == 9


@pytest.mark.parametrize("uploads", [0, 1, 3])
def test_a_push_killed_between_two_files_leaves_nothing_that_looks_whole_and_goes_on(
    bucket: Bucket, tmp_path: Path, uploads: int
):
    a, b = machine(bucket, tmp_path / "a"), machine(bucket, tmp_path / "b")
    folder = write(a.tokenizer("t"), **{"tokenizer.json": "{}", "tokenizer_info.json": "{}", "other": "o"})
    push_killed_after(a, "tokenizers/t", uploads)
    there = bucket.names()
    assert len(there) == uploads
    assert f"home/tokenizers/t/{MARK}" not in there
    assert ("home/tokenizers/t/tokenizer_info.json" in there) == (uploads == 3)  # by then all it speaks of is there
    b.pull(b.tokenizer("t"))
    assert files(b.root) == {}
    bucket.faults.reset()
    a.push(folder)
    sent_before = min(uploads, 2)  # a mark that is there without the rest's description goes first, and comes again
    assert bucket.faults.count("PUT", "") == 4 - sent_before
    b.pull(b.tokenizer("t"))
    assert files(b.root) == files(a.root)


def test_a_second_push_that_is_killed_does_not_pass_for_the_first(bucket: Bucket, tmp_path: Path):
    a, b, c = (machine(bucket, tmp_path / name) for name in "abc")
    folder = write(a.tokenizer("t"), **{"tokenizer.json": "1", "tokenizer_info.json": "{}"})
    a.push(folder)
    b.pull(b.tokenizer("t"))
    before = files(b.root)
    write(folder, **{"tokenizer.json": "2"})
    push_killed_after(a, "tokenizers/t", 1)
    assert bucket.names() == {"home/tokenizers/t/tokenizer.json"}
    c.pull(c.tokenizer("t"))
    b.pull(b.tokenizer("t"))
    assert (files(c.root), files(b.root)) == ({}, before)
    a.push(folder)
    b.pull(b.tokenizer("t"))
    assert files(b.root) == files(a.root)


def test_a_store_that_is_down_is_a_clear_error_and_nothing_is_lost(bucket: Bucket, tmp_path: Path):
    a, b = machine(bucket, tmp_path / "a"), machine(bucket, tmp_path / "b")
    folder = write(a.report("x", "v1"), one="1")
    before = files(a.root)
    bucket.faults.set("503", 99, method="PUT")
    with pytest.raises(DataError, match="can't be uploaded"):
        a.push(folder)
    assert files(a.root) == before
    bucket.faults.reset()
    a.push(folder)
    bucket.faults.set("503", 99, method="GET")
    with pytest.raises(DataError, match="can't be"):
        b.pull(b.report("x", "v1"))
    assert files(b.root) == {}


def test_a_damaged_file_there_is_named_and_not_taken(bucket: Bucket, tmp_path: Path):
    a, b = machine(bucket, tmp_path / "a"), machine(bucket, tmp_path / "b")
    a.push(write(a.report("x", "v1"), one="1", two="2"))
    bucket.put("home/reports/x/v1/two", b"3")
    with pytest.raises(DataError, match="reports/x/v1/two has sha256"):
        b.pull(b.report("x", "v1"))
    assert files(b.root) == {}


def test_a_description_that_names_files_outside_is_refused(bucket: Bucket, tmp_path: Path):
    b = machine(bucket, tmp_path / "b")
    bucket.put(f"home/reports/x/v1/{MARK}", b'{"files": {"../../../evil": {"bytes": 1, "sha256": "0"}}}')
    with pytest.raises(DataError, match="evil.*outside its folder"):
        b.pull(b.report("x", "v1"))


def _experiment(folder: Path) -> Experiment:
    write(folder, **{"suite.yaml": SUITE, "tiny.yaml": RECIPE.format(vocab_size=300, global_batch=256)})
    return load_experiment(str(folder / "tiny.yaml"), [f"evaluation.suite={folder / 'suite.yaml'}"])


def _whole_pipeline(experiment: Experiment, home: Home) -> dict[str, Any]:
    """Every stage; what each one had to make."""
    lines: list[str] = []
    pools = DaskSettings(workers=1).pool
    made: dict[str, Any] = {}
    made["tokenizer"] = not data_stages.ensure_tokenizer(experiment, home, lines.append).reused
    for dataset in experiment.datasets():
        streams, made["tokenized"] = data_stages.tokenize(dataset, home, pools, lines.append)
        made["shards"] = not data_stages.make_shards(dataset, streams, home, pools, lines.append).reused
    events = list(training_stage.train(experiment, home, experiment.milestones[-1], lines.append))
    made["milestones"] = [e.label for e in events if not isinstance(e, data_stages.MilestoneReused)]
    for label in LABELS:
        made[label] = scoring.score(experiment, home, label, lines.append).facts["scored_tasks"]
    reporting.make_report(experiment, home, lines.append)
    return made


@pytest.mark.drill
def test_a_second_machine_with_an_empty_cache_makes_only_what_is_missing(
    bucket: Bucket, finished: FinishedPipeline, tmp_path: Path
):
    a, b = machine(bucket, tmp_path / "a"), machine(bucket, tmp_path / "b")
    experiment = _experiment(tmp_path / "recipes")
    for path in (finished.pipeline.home / "raw").rglob("*.jsonl"):
        bucket.put(f"home/{path.relative_to(finished.pipeline.home)}", path.read_bytes())
    for part in ("tokenizers", "tokenized", "shards", "runs", "scorecards", "reports"):
        shutil.copytree(finished.pipeline.home / part, a.root / part)
    nothing = {"tokenizer": False, "tokenized": [], "shards": False, "milestones": [], **dict.fromkeys(LABELS, [])}
    assert _whole_pipeline(experiment, a) == nothing
    last = f"home/scorecards/tiny/v1/{LABELS[-1]}"
    bucket.direct.rm(f"{bucket.name}/{last}", recursive=True)
    assert _whole_pipeline(experiment, b) == nothing | {LABELS[-1]: ["last_word/0-shot", "choice/1-shot"]}
    scorecard = read_json(b.scorecard("tiny", "v1", LABELS[-1]) / "scorecard.json")
    assert scorecard == read_json(a.scorecard("tiny", "v1", LABELS[-1]) / "scorecard.json")
    assert f"{last}/{MARK}" in bucket.names()
    own = RunFolder(a.run("tiny", "v1"))
    assert RunFolder(b.run("tiny", "v1")).fingerprint == own.fingerprint


def test_of_a_run_its_records_and_milestones_go_and_another_run_there_is_set_aside(bucket: Bucket, tmp_path: Path):
    small = SmallRun(tmp_path, (3, 8))
    a, b = machine(bucket, tmp_path / "a"), machine(bucket, tmp_path / "b")
    small.home = Home(a.root)
    shutil.copytree(tmp_path / "home", a.root)
    small.train("execution.checkpoint_every=512")
    push_run(a, small.run)
    b.pull(b.run("small", "v1"))
    assert {p.name for p in (b.run("small", "v1") / "checkpoints").iterdir()} == {"step-00000003", "step-00000008"}
    there = {n: bucket.read(n) for n in bucket.names()}
    small.train("training.lr=2e-2", allow={"supersede"})
    push_run(a, small.run)
    now = {n: bucket.read(n) for n in bucket.names()}
    assert {n.replace("/v1/", "/v1.superseded-1/"): data for n, data in there.items()}.items() <= now.items()
    c = machine(bucket, tmp_path / "c")
    c.pull(c.run("small", "v1"))
    assert RunFolder(c.run("small", "v1")).fingerprint == small.run.fingerprint
