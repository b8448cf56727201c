"""What `openlm gc` plans and removes, and what it never does."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import openlm
from small_run import SmallRun, write_dataset
from tiny_pipeline import LABELS, FinishedPipeline, TinyPipeline, environment

from openlm_pipeline.checkpoints.folders import COMPLETE, unfinished
from openlm_pipeline.errors import BusyError
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pipeline.retention import Removals, Retention, apply, plan_gc
from openlm_pipeline.pools import DaskSettings
from openlm_pipeline.storage.files import folder_lock, set_aside
from openlm_pipeline.storage.home import Home

EVERYTHING = Retention(superseded_days=0, unfinished_hours=0)
ROTATING = ("execution.checkpoint_every=512", "execution.keep_checkpoints=9")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A finished run with milestones at steps 3 and 8 and rotating checkpoints between. Tests work on copies."""
    small = SmallRun(tmp_path_factory.mktemp("small"), (3, 8))
    small.train(*ROTATING)
    assert small.steps_on_disk() == {2: None, 3: "t0768", 4: None, 6: None, 8: "t2048"}
    return small


@pytest.fixture
def small(trained: SmallRun, tmp_path: Path) -> SmallRun:
    copy = SmallRun(tmp_path / "copy", (3, 8))
    shutil.rmtree(copy.home.root)
    shutil.copytree(trained.home.root, copy.home.root)
    return copy


def names(plan: Removals) -> set[str]:
    """Paths in a plan below the home."""
    return {str(e.path.relative_to(plan.home.root.resolve())) for e in plan.entries}


def kept(plan: Removals) -> dict[str, str]:
    return {str(k.path.relative_to(plan.home.root.resolve())): k.why for k in plan.kept}


def files(root: Path) -> set[str]:
    """All files below a folder but locks."""
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def checkpoint(step: int, version: str = "v1") -> str:
    return f"runs/small/{version}/checkpoints/step-{step:08d}"


def superseded(small: SmallRun) -> None:
    """Train the run anew with another learning rate, which sets the old one aside."""
    small.train("training.lr=2e-2", allow={"supersede"})
    assert (small.home.root / "runs/small/v1.superseded-1").is_dir()


def test_a_plan_touches_nothing_and_applying_it_removes_exactly_what_it_names(small: SmallRun):
    everything = sorted(small.home.root.rglob("*"))
    before = files(small.home.root)
    plan = plan_gc(small.home)
    assert sorted(small.home.root.rglob("*")) == everything
    assert names(plan) == {checkpoint(step) for step in (2, 4, 6)}
    assert apply(plan, lambda _: None) == plan.bytes
    assert files(small.home.root) == {f for f in before if not f.startswith(tuple(f"{n}/" for n in names(plan)))}
    assert small.steps_on_disk() == {3: "t0768", 8: "t2048"}
    assert plan_gc(small.home).entries == ()


def test_every_entry_says_what_it_takes_why_and_what_is_lost(small: SmallRun):
    for entry in plan_gc(small.home).entries:
        assert entry.bytes >= sum(p.stat().st_size for p in entry.path.iterdir())
        assert entry.why == "rotating checkpoint of a finished run"
        assert "trained again from the milestone before" in entry.consequence


def test_rotating_checkpoints_of_a_run_that_is_not_finished_stay(small: SmallRun):
    shutil.rmtree(small.home.root / checkpoint(8))
    assert plan_gc(small.home, EVERYTHING).entries == ()


def test_milestones_stay_even_where_their_run_was_set_aside(small: SmallRun):
    superseded(small)
    plan = plan_gc(small.home, EVERYTHING)
    assert names(plan) == {checkpoint(step, "v1.superseded-1") for step in (2, 4, 6)}
    assert "holds 2 milestones" in kept(plan)["runs/small/v1.superseded-1"]


def test_a_run_that_was_set_aside_goes_with_its_milestones_only_when_told_and_with_their_names(small: SmallRun):
    superseded(small)
    plan = plan_gc(small.home, Retention(superseded_days=0, superseded_runs=True))
    (entry,) = plan.entries
    assert names(plan) == {"runs/small/v1.superseded-1"}
    assert "replaced by v1" in entry.why and "training.lr 0.01 -> 0.02" in entry.why
    assert "t0768, t2048" in entry.consequence
    apply(plan, lambda _: None)
    assert not entry.path.exists()
    assert set(small.steps_on_disk().values()) == {"t0768", "t2048"}


def test_what_was_set_aside_stays_for_its_days_and_while_nothing_took_its_place(small: SmallRun):
    shards = small.home.shards("heldout", "v1")
    old = set_aside(shards)
    name = str(old.relative_to(small.home.root))
    month = time.time() + 31 * 86400
    assert kept(plan_gc(small.home, now=month))[name] == "nothing has taken its place at v1 yet"
    write_dataset(small.home, "heldout", 41, seed=9)
    assert kept(plan_gc(small.home))[name] == "set aside 0 days ago; 30 are kept"
    plan = plan_gc(small.home, now=month)
    assert name in names(plan)
    assert "set aside 31 days ago, replaced by v1" in {e.path: e.why for e in plan.entries}[old.resolve()]


def test_shards_that_a_run_was_trained_on_stay_until_the_run_goes(small: SmallRun):
    old = set_aside(small.home.shards("text", "v1"))
    write_dataset(small.home, "text", 302, seed=9)
    name = str(old.relative_to(small.home.root))
    assert kept(plan_gc(small.home, EVERYTHING))[name] == "run runs/small/v1 was trained on it"
    superseded(small)
    assert kept(plan_gc(small.home, EVERYTHING))[name] == "run runs/small/v1.superseded-1 was trained on it"
    with_runs = Retention(superseded_days=0, superseded_runs=True)
    assert names(plan_gc(small.home, with_runs)) == {name, "runs/small/v1.superseded-1"}


def test_a_damaged_checkpoint_that_was_set_aside_goes_once_it_is_made_again(small: SmallRun):
    whole = small.home.root / checkpoint(8)
    damaged = set_aside(whole)
    name = str(damaged.relative_to(small.home.root))
    assert kept(plan_gc(small.home, EVERYTHING))[name] == "nothing has taken its place at step-00000008 yet"
    small.train(*ROTATING)
    assert whole.is_dir()
    assert name in names(plan_gc(small.home, EVERYTHING))


def test_what_a_dead_process_left_unfinished_goes_and_what_is_fresh_stays(small: SmallRun):
    left = unfinished(small.run.checkpoints, 9)
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    (small.home.shards("text", "v1") / "00000009.tar.tmp").write_bytes(b"half")
    expected = {"runs/small/v1/checkpoints/.tmp-step-00000009", "shards/text/v1/00000009.tar.tmp"}
    assert not expected & names(plan_gc(small.home))
    plan = plan_gc(small.home, now=time.time() + 25 * 3600)
    assert expected < names(plan)
    apply(plan, lambda _: None, now=time.time() + 25 * 3600)
    assert not any((small.home.root / name).exists() for name in expected)


HOLDER = """
import sys
from pathlib import Path
from openlm_pipeline.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_a_live_process_has_locked_is_not_planned_and_not_removed(small: SmallRun):
    plan = plan_gc(small.home)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(small.run.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        lines: list[str] = []
        assert apply(plan, lines.append) == 0  # the plan was made before the lock was taken
        assert len(lines) == 3 and all("in use now" in line for line in lines)
        held = plan_gc(small.home)
        assert held.entries == ()
        assert set(kept(held).values()) == {"a live process works there"}
        assert 2 in small.steps_on_disk()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert names(plan_gc(small.home)) == names(plan)  # the lock went with its process


def test_what_changed_since_the_plan_stays(small: SmallRun):
    plan = plan_gc(small.home)
    shutil.rmtree(small.home.root / checkpoint(8))  # the run is no longer finished
    assert apply(plan, lambda _: None) == 0
    assert small.steps_on_disk() == {2: None, 3: "t0768", 4: None, 6: None}


def test_only_one_process_removes_at_a_time(small: SmallRun):
    with folder_lock(small.home.root / ".gc", "removing"), pytest.raises(BusyError):
        apply(plan_gc(small.home), lambda _: None)


def test_symbolic_links_are_neither_followed_nor_removed(small: SmallRun, tmp_path: Path):
    outside = tmp_path / "outside"
    shutil.move(small.home.root / "runs", outside)
    (outside / "small/v1/left.tmp").write_text("half")
    (small.home.root / "runs").symlink_to(outside)
    (small.home.root / "shards/text/v1.superseded-1").symlink_to(small.home.shards("text", "v1"))
    before = files(outside)
    plan = plan_gc(small.home, EVERYTHING)
    assert plan.entries == ()
    assert kept(plan)["runs"] == "it is a symbolic link, which is not followed"
    apply(plan, lambda _: None)
    assert files(outside) == before


KILLED = """
import os, shutil, sys
from pathlib import Path
from openlm_pipeline.storage.home import Home
from openlm_pipeline.pipeline.retention import apply, plan_gc

def kill_inside_a_folder(path):
    os.unlink(sorted(p for p in Path(path).iterdir() if p.is_file())[0])
    os._exit(9)

shutil.rmtree = kill_inside_a_folder
home = Home(Path(sys.argv[1]))
apply(plan_gc(home), print)
"""


def test_a_kill_in_the_middle_leaves_nothing_half_and_the_next_plan_has_the_rest(small: SmallRun):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(small.home.root)], env=environment(), check=False)
    assert killed.returncode == 9
    assert small.steps_on_disk() == {3: "t0768", 8: "t2048"}  # each is whole or not seen
    assert not [p for p in small.run.checkpoints.iterdir() if not (p / COMPLETE).exists() and p.name[0] != "."]
    plan = plan_gc(small.home)
    assert len(plan.entries) == 3
    assert {e.why for e in plan.entries} == {"left by an `openlm gc` that was stopped"}
    apply(plan, lambda _: None)
    assert {p.name for p in small.run.checkpoints.iterdir()} == {"step-00000003", "step-00000008"}


@pytest.fixture
def pipeline(finished: FinishedPipeline, tmp_path: Path) -> TinyPipeline:
    return finished.copy(tmp_path)


def test_a_pipeline_after_its_job_has_nothing_to_remove(pipeline: TinyPipeline):
    assert plan_gc(Home(pipeline.home), EVERYTHING).entries == ()


def test_token_streams_go_when_told_and_are_made_again_the_same(pipeline: TinyPipeline):
    home = Home(pipeline.home)
    plan = plan_gc(home, Retention(token_streams=True))
    assert names(plan) == {"tokenized/tiny_text/v1"}
    (entry,) = plan.entries
    assert "must read 2 raw files" in entry.consequence
    shards = pipeline.snapshot("shards")
    apply(plan, lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in pipeline.variables.items():
            patch.setenv(name, value)
        (dataset,) = load_experiment("tiny").datasets()
        pools = DaskSettings(workers=1).pool
        made, done = data_stages.tokenize(dataset, home, pools, lambda _: None)
        assert done == ["a.jsonl", "b.jsonl"]
        assert data_stages.make_shards(dataset, made, home, pools, lambda _: None).reused
    assert pipeline.snapshot("shards") == shards


@pytest.mark.parametrize("harm", ["a shard is short", "the manifest is gone", "a raw file was tokenized anew"])
def test_token_streams_stay_where_their_shards_are_not_complete(pipeline: TinyPipeline, harm: str):
    shards, streams = pipeline.home / "shards/tiny_text/v1", pipeline.home / "tokenized/tiny_text/v1"
    if harm == "a shard is short":
        shard = next(shards.glob("*.tar"))
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "the manifest is gone":
        (shards / "manifest.jsonl").unlink()
    else:
        text = (streams / "a.jsonl.json").read_text()
        (streams / "a.jsonl.json").write_text(text.replace('"documents": 30', '"documents": 29'))
        assert text != (streams / "a.jsonl.json").read_text()
    plan = plan_gc(Home(pipeline.home), Retention(token_streams=True))
    assert plan.entries == ()
    assert "tokenized/tiny_text/v1" in kept(plan)


def test_scores_by_task_of_a_run_that_was_set_aside_go_and_its_tokenizer_stays_while_shards_need_it(
    pipeline: TinyPipeline,
):
    home = pipeline.home
    run = home / "runs/tiny/v1"
    old = set_aside(run)
    run.mkdir()
    for name in ("run.json", "experiment.yaml"):
        shutil.copy(old / name, run)  # as after the start of the run that took its place
    tokenizer = set_aside(home / "tokenizers/tiny_bpe")
    shutil.copytree(tokenizer, home / "tokenizers/tiny_bpe")
    plan = plan_gc(Home(home), EVERYTHING)
    assert names(plan) == {f"scorecards/tiny/v1/{label}/tasks" for label in LABELS}
    assert "were made with it" in kept(plan)["tokenizers/tiny_bpe.superseded-1"]
    apply(plan, lambda _: None)
    for label in LABELS:
        assert {"items.parquet", "scorecard.json"} <= {p.name for p in (home / "scorecards/tiny/v1" / label).iterdir()}


def test_the_command_only_plans_unless_told(small: SmallRun):
    def run(*flags: str) -> str:
        done = openlm("gc", *flags, variables={"OPENLM_HOME": str(small.home.root)})
        assert done.returncode == 0, done.stderr
        return done.stdout

    planned = run()
    assert f"{checkpoint(4)}  " in planned
    assert "why: rotating checkpoint of a finished run" in planned
    assert "3 places" in planned and "nothing was removed" in planned
    assert 4 in small.steps_on_disk()
    assert f"removed {checkpoint(4)}" in run("--apply")
    assert 4 not in small.steps_on_disk()
