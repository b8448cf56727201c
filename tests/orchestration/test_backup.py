"""Backups made while the pipeline works, as the operations manual describes them, and what a restored one does."""

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import dagster as dg
import psutil
import pytest
from postgres_server import PostgresServer
from tiny_pipeline import LABELS, NOT_IN_JOBS, REPOSITORY, FinishedPipeline, TinyPipeline, environment

from openlm_pipeline.storage.files import read_json

pytestmark = pytest.mark.drill
MADE = ("tokenizers", "tokenized", "shards", "runs/tiny/v1/checkpoints", "scorecards")


def _back_up(pipeline: TinyPipeline, to: Path) -> TinyPipeline:
    """A copy of all state of a pipeline that may be at work: first Dagster's, then what it speaks of."""
    shutil.copytree(pipeline.root, to, ignore=shutil.ignore_patterns("dagster", "openlm_home"))
    script = [sys.executable, "deploy/backup_sqlite.py", str(pipeline.root / "dagster"), str(to / "dagster")]
    subprocess.run(script, cwd=REPOSITORY, check=True)
    subprocess.run(["cp", "-a", str(pipeline.home), str(to)], check=True)
    return TinyPipeline(to)


def _command(pipeline: TinyPipeline, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(pipeline), capture_output=True, text=True)


def _assert_nothing_to_do(pipeline: TinyPipeline) -> None:
    """By the plan, and by what a run of the job writes."""
    planned = _command(pipeline, "openlm_pipeline", "plan", "tiny")
    assert "nothing to do" in planned.stdout, planned.stdout + planned.stderr
    before = {part: pipeline.snapshot(part) for part in MADE}
    result = pipeline.execute("tiny")
    assert result.success
    made = [e.step_materialization_data.materialization for e in result.all_events if e.is_step_materialization]
    assert {m.asset_key.to_user_string() for m in made} >= {f"checkpoint/tiny/{label}" for label in LABELS}
    remade = {m.asset_key.to_user_string() for m in made if "reused" in m.metadata and not m.metadata["reused"].value}
    assert remade <= {"report/tiny"}  # a report is written each time
    assert {part: pipeline.snapshot(part) for part in before} == before


def test_a_copy_made_while_it_trains_goes_on_from_there(
    long_finished: FinishedPipeline, tmp_path, wait_until, instance_of
):
    pipeline = long_finished.copy(tmp_path)
    pipeline.run_folder.rename(tmp_path / "old_run")
    first = pipeline.run_folder / "checkpoints" / "step-00000157"
    with (tmp_path / "output.txt").open("w") as output:
        working = psutil.Popen(
            [sys.executable, "-m", "orchestration", "tiny"],
            cwd=REPOSITORY, env=environment(pipeline), stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    wait_until(lambda: (first / "COMPLETE").exists() or working.poll() is not None, "the first milestone", 300)
    copy = _back_up(pipeline, tmp_path / "copy")
    assert working.poll() is None, (tmp_path / "output.txt").read_text()
    trainers = working.children(recursive=True)
    working.kill()
    working.wait()
    psutil.wait_procs(trainers, timeout=300)
    shutil.rmtree(pipeline.root)  # the machine is lost

    for database in (copy.root / "dagster").rglob("*.db"):
        with contextlib.closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    there = copy.snapshot("runs", "tiny", "v1", "checkpoints", first.name)
    assert there
    again = _command(copy, "orchestration", "tiny")
    assert again.returncode == 0, again.stdout + again.stderr
    assert copy.snapshot("runs", "tiny", "v1", "checkpoints", first.name) == there
    assert f"milestone {LABELS[0]} reused" in again.stdout
    newest, interrupted, oldest = instance_of(copy).get_runs()
    assert [run.status for run in (newest, interrupted, oldest)] == [
        dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS,
    ]  # fmt: skip
    _assert_nothing_to_do(copy)


def test_a_lost_history_loses_no_work(finished: FinishedPipeline, tmp_path, instance_of):
    copy = _back_up(finished.pipeline, tmp_path / "copy")
    shutil.rmtree(copy.root / "dagster")
    (copy.root / "dagster").mkdir()
    shutil.copy(REPOSITORY / ".dagster" / "dagster.yaml", copy.root / "dagster")
    assert instance_of(copy).get_runs() == []
    _assert_nothing_to_do(copy)


def test_a_dump_of_postgresql_brings_back_runs_and_freshness(
    finished: FinishedPipeline, postgres: PostgresServer, tmp_path, stale_status, instance_of
):
    pipeline = finished.copy(tmp_path)
    shutil.rmtree(pipeline.root / "dagster")
    (pipeline.root / "dagster").mkdir()
    shutil.copy(REPOSITORY / "deploy" / "dagster-postgres.yaml", pipeline.root / "dagster" / "dagster.yaml")
    assert pipeline.execute("tiny").success
    instance = instance_of(pipeline)  # connected while it is dumped
    (run,) = instance.get_runs()
    num_events, status = len(instance.all_logs(run.run_id)), stale_status(pipeline)
    archive = postgres.dump()
    assert pipeline.execute("tiny").success  # after the backup: lost with the database
    postgres.restore(archive)

    restored = instance_of(pipeline)
    assert [r.run_id for r in restored.get_runs()] == [run.run_id]
    assert len(restored.all_logs(run.run_id)) == num_events
    assert stale_status(pipeline) == status
    assert {name for name, (state, _) in status.items() if state != "FRESH"} == NOT_IN_JOBS
    assert read_json(pipeline.run_folder / "outcome.json")["status"] == "completed"
    planned = subprocess.run(
        [sys.executable, "-m", "openlm_pipeline", "plan", "tiny"],
        cwd=REPOSITORY, env=environment(pipeline, **postgres.variables), capture_output=True, text=True,
    )  # fmt: skip
    assert "nothing to do" in planned.stdout, planned.stdout + planned.stderr


def test_a_backup_never_overwrites_and_needs_a_dagster_home(finished: FinishedPipeline, tmp_path):
    for source, target in ((finished.pipeline.root / "dagster", tmp_path), (tmp_path, tmp_path / "new")):
        command = [sys.executable, "deploy/backup_sqlite.py", str(source), str(target)]
        refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert (refused.returncode, refused.stderr[:7]) == (1, "error: ")
        assert list(tmp_path.iterdir()) == []
