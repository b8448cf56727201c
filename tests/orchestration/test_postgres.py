"""Dagster on a real PostgreSQL, as `deploy/` describes it: what is stored there outlives the server's crashes."""

import shutil
import subprocess
import sys

import dagster as dg
import psutil
import pytest
from postgres_server import PostgresServer
from tiny_pipeline import LABELS, REPOSITORY, FinishedPipeline, TinyPipeline, environment

from openlm_pipeline.checkpoints.folders import COMPLETE

pytest.importorskip("dagster_postgres")
CONFIG = REPOSITORY / "deploy" / "dagster-postgres.yaml"


@pytest.fixture
def pipeline(long_finished: FinishedPipeline, postgres: PostgresServer, tmp_path) -> TinyPipeline:
    """A copy of the finished pipeline whose Dagster is a new one in PostgreSQL."""
    copy = long_finished.copy(tmp_path)
    shutil.rmtree(copy.root / "dagster")
    (copy.root / "dagster").mkdir()
    shutil.copy(CONFIG, copy.root / "dagster" / "dagster.yaml")
    return copy


def _start(pipeline: TinyPipeline, postgres: PostgresServer, output) -> psutil.Popen:
    command = [sys.executable, "-m", "orchestration", "tiny"]
    variables = environment(pipeline, **postgres.variables)
    return psutil.Popen(command, cwd=REPOSITORY, env=variables, stdout=output, stderr=subprocess.STDOUT)


def _stored(instance: dg.DagsterInstance) -> dict[str, int]:
    """Events of each kind in the newest run."""
    (run,) = instance.get_runs(limit=1)
    counts: dict[str, int] = {}
    for entry in instance.all_logs(run.run_id):
        if entry.dagster_event:
            kind = entry.dagster_event.event_type_value
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def test_the_config_holds_no_secret_and_names_the_driver_that_is_installed():
    text = CONFIG.read_text()
    assert all(f"{{env: DAGSTER_POSTGRES_{name}}}" in text for name in ("USER", "PASSWORD", "HOST", "PORT", "DB"))
    assert "scheme: postgresql+psycopg2" in text


def _assert_one_line_says_it(output: str) -> None:
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Dagster's database, set by " in error and " fails: " in error and "run the same command again" in error
    assert "Traceback" not in output


def test_a_server_that_is_not_there_is_told_in_one_line(tmp_path):
    pipeline = TinyPipeline.create(tmp_path / "pipeline")
    shutil.copy(CONFIG, pipeline.root / "dagster" / "dagster.yaml")
    nobody = {"USER": "dagster", "PASSWORD": "secret", "HOST": "127.0.0.1", "PORT": "9", "DB": "dagster"}
    variables = {f"DAGSTER_POSTGRES_{name}": value for name, value in nobody.items()}
    command = [sys.executable, "-m", "orchestration", "tiny"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(pipeline, **variables), capture_output=True, text=True
    )
    assert done.returncode == 1
    _assert_one_line_says_it(done.stderr)
    assert "127.0.0.1" in done.stderr and "Connection refused" in done.stderr and "secret" not in done.stderr


@pytest.mark.drill
def test_runs_and_events_are_there_after_the_server_crashed(pipeline, postgres, instance_of):
    assert pipeline.execute("tiny").success
    before = _stored(instance_of(pipeline))
    assert (
        before["ASSET_MATERIALIZATION"] == 12
    )  # preflight, 2 raw files, tokenizer, 2 tokenized files, shards, 5 below
    assert before["PIPELINE_SUCCESS"] == 1
    postgres.crash()
    postgres.start()
    instance = instance_of(pipeline)
    assert _stored(instance) == before
    for label in LABELS:
        assert instance.get_latest_materialization_event(dg.AssetKey(["checkpoint", "tiny", label])) is not None
    assert [f.name for f in (pipeline.root / "dagster").rglob("*.db")] == []


@pytest.mark.drill
def test_a_run_under_which_the_server_goes_away_ends_cleanly_and_the_next_one_redoes_nothing(
    pipeline, postgres, tmp_path, wait_until, instance_of
):
    pipeline.run_folder.rename(tmp_path / "old_run")
    first = pipeline.run_folder / "checkpoints" / "step-00000157"
    made = {part: pipeline.snapshot(part) for part in ("tokenizers", "tokenized", "shards")}
    with (tmp_path / "output.txt").open("w") as output:
        process = _start(pipeline, postgres, output)
    wait_until(lambda: pipeline.run_folder.exists() or process.poll() is not None, "training to begin", 1200)
    postgres.crash()
    postgres.start()  # back in a moment: the run continues, unless a statement was under way
    wait_until(lambda: (first / COMPLETE).exists() or process.poll() is not None, "the first milestone", 1200)
    trainers = [child for child in process.children(recursive=True) if "train" in child.cmdline()]
    postgres.crash()  # and now for longer than anyone waits
    assert process.wait(timeout=1200) == 1
    _assert_one_line_says_it((tmp_path / "output.txt").read_text())
    assert psutil.wait_procs(trainers, timeout=300)[1] == [], "trainers outlived the run"
    postgres.start()

    there = {path.name: pipeline.snapshot("runs", "tiny", "v1", "checkpoints", path.name)
             for path in pipeline.run_folder.glob("checkpoints/step-*")}  # fmt: skip
    with (tmp_path / "again.txt").open("w") as output:
        again = _start(pipeline, postgres, output).wait(timeout=1200)
    assert again == 0, (tmp_path / "output.txt").read_text() + (tmp_path / "again.txt").read_text()
    assert {name: pipeline.snapshot("runs", "tiny", "v1", "checkpoints", name) for name in there} == there
    assert {part: pipeline.snapshot(part) for part in made} == made
    instance = instance_of(pipeline)
    newest, dead = instance.get_runs(limit=2)
    assert (newest.status, dead.status) == (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE)
    assert instance.event_log_storage.get_concurrency_info("training").active_run_ids == set()
    assert (pipeline.home / "reports" / "tiny" / "v1" / "report.html").exists()
