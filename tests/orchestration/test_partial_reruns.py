"""A milestone more, a fork, a score: each makes what is new and touches nothing else."""

import json

import dagster as dg
import pytest
from tiny_pipeline import LABELS, NOT_IN_JOBS, TinyPipeline
from typer.testing import CliRunner

from openlm_pipeline.cli.main import app
from openlm_pipeline.storage.files import read_json

FIRST, LAST = LABELS
MORE = "t0050K"


def _new(result: dg.ExecuteInProcessResult) -> set[str]:
    """Assets that a run materialized and did not reuse."""
    made = [e.step_materialization_data.materialization for e in result.all_events if e.is_step_materialization]
    return {m.asset_key.to_user_string() for m in made if "reused" in m.metadata and not m.metadata["reused"].value}


def _steps(pipeline: TinyPipeline, run: str) -> list[int]:
    lines = (pipeline.home / "runs" / run / "v1" / "metrics.jsonl").read_text().splitlines()
    return [r["step"] for r in map(json.loads, lines) if "loss" in r]


def _unchanged(pipeline: TinyPipeline, before: dict[str, dict]) -> bool:
    return all(files.items() <= pipeline.snapshot(*place.split("/")).items() for place, files in before.items())


def _snapshots(pipeline: TinyPipeline, *places: str) -> dict[str, dict]:
    return {place: pipeline.snapshot(*place.split("/")) for place in places}


UPSTREAM = ("tokenizers", "tokenized", "shards")


def test_a_milestone_more_is_all_that_is_trained_and_scored(finished, tmp_path, stale_status):
    pipeline = finished.copy(tmp_path)
    before = _snapshots(pipeline, *UPSTREAM, "runs/tiny/v1/checkpoints", f"scorecards/tiny/v1/{FIRST}")
    trained = len(_steps(pipeline, "tiny"))
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("milestones: [10K, 40K]", "milestones: [10K, 40K, 50K]"))
    unsynced = {name for name, (state, _) in stale_status(pipeline).items() if state != "FRESH"} - NOT_IN_JOBS
    assert unsynced == {f"checkpoint/tiny/{MORE}", f"scorecard/tiny/{MORE}", "report/tiny"}
    result = pipeline.execute("tiny")
    assert result.success
    assert _new(result) == {f"checkpoint/tiny/{MORE}", f"scorecard/tiny/{MORE}", "report/tiny"}
    assert _unchanged(pipeline, before)
    new_steps = _steps(pipeline, "tiny")[trained:]
    assert (min(new_steps) > 157, max(new_steps)) == (True, 196)
    assert {name for name, (state, _) in stale_status(pipeline).items() if state != "FRESH"} == NOT_IN_JOBS


def test_a_fork_is_a_run_of_its_own_below_its_parents_milestone(finished, tmp_path, monkeypatch):
    pipeline = finished.copy(tmp_path)
    for name, value in pipeline.variables.items():
        monkeypatch.setenv(name, value)
    changes = ("training.schedule=wsd", "training.decay=5K", "milestones=[20K]")
    made = CliRunner().invoke(app, ["fork", "tiny@10K", "twig", *changes])
    assert made.exit_code == 0, made.output
    before = _snapshots(pipeline, *UPSTREAM, "runs/tiny", "scorecards/tiny", "reports/tiny")
    with pipeline.active("tiny", "twig") as definitions:
        parents = definitions.resolve_asset_graph().get(dg.AssetKey(["checkpoint", "twig", "t0020K"])).parent_keys
    assert dg.AssetKey(["checkpoint", "tiny", FIRST]) in parents
    planned = CliRunner().invoke(app, ["plan", "twig"]).output
    assert "checkpoint/twig/t0020K" in planned and "to train: 9.984K tokens, 39 steps" in planned

    result = pipeline.execute("twig", recipes=("tiny", "twig"))
    assert result.success
    assert _new(result) == {"checkpoint/twig/t0020K", "scorecard/twig/t0020K", "report/twig"}
    assert _unchanged(pipeline, before)
    assert min(_steps(pipeline, "twig")) > 40
    identity = read_json(pipeline.home / "runs" / "twig" / "v1" / "run.json")["identity"]
    assert identity["parent"] | {"checkpoint": "", "tokens": 0} == {
        "run": "tiny", "version": "v1", "milestone": 10_000, "optimizer": "keep", "schedule": "continue",
        "checkpoint": "", "tokens": 0,
    }  # fmt: skip
    table = (pipeline.home / "reports" / "twig" / "v1" / "report.md").read_text()
    assert "10.24K of tiny" in table
    card = read_json(pipeline.home / "scorecards" / "twig" / "v1" / "t0020K" / "scorecard.json")
    assert {change["against"] for change in card["changes"]} == {FIRST}
    assert "nothing to do" in CliRunner().invoke(app, ["plan", "twig"]).output


def test_a_fork_of_what_is_not_trained_says_what_to_do(finished, tmp_path, monkeypatch):
    pipeline = finished.copy(tmp_path)
    for name, value in pipeline.variables.items():
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(app, ["fork", "tiny@10K", "twig"]).exit_code == 0
    pipeline.run_folder.rename(tmp_path / "elsewhere")
    result = pipeline.execute("twig", recipes=("tiny", "twig"))
    (failed,) = [e.step_failure_data for e in result.all_events if e.is_step_failure]
    assert "`openlm train tiny --until 10K` makes it" in failed.user_failure_data.description
    assert not (pipeline.home / "runs" / "twig" / "v1" / "metrics.jsonl").exists()


def test_a_finished_cosine_is_not_trained_again_for_a_milestone_more(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    cosine = recipe.read_text().replace("schedule: constant", "schedule: cosine").replace("[10K, 40K]", "[10K]")
    recipe.write_text(cosine)
    assert pipeline.execute("tiny_checkpoints", tags={"openlm/allow": "supersede"}).success
    before = _snapshots(pipeline, "runs/tiny")
    recipe.write_text(cosine.replace("[10K]", "[10K, 20K]"))
    result = pipeline.execute("tiny")
    (failed,) = [e.step_failure_data for e in result.all_events if e.is_step_failure]
    assert "the cosine schedule of tiny ended at 10K tokens" in failed.user_failure_data.description
    assert _unchanged(pipeline, before)


@pytest.mark.parametrize("label", LABELS)
def test_one_milestone_is_scored_again_alone(finished, tmp_path, label):
    pipeline = finished.copy(tmp_path)
    (pipeline.home / "scorecards" / "tiny" / "v1" / label / "scorecard.json").unlink()
    for task in (pipeline.home / "scorecards" / "tiny" / "v1" / label / "tasks").iterdir():
        task.unlink()
    (other,) = set(LABELS) - {label}
    before = _snapshots(pipeline, *UPSTREAM, "runs", f"scorecards/tiny/v1/{other}", "reports")
    with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
        key = dg.AssetKey(["scorecard", "tiny", label])
        job = definitions.resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(instance=instance, asset_selection=[key])
    assert result.success
    assert _new(result) == {f"scorecard/tiny/{label}"}
    assert _unchanged(pipeline, before)


def test_a_raw_file_more_is_a_version_that_extends_the_first_and_packs_that_file_alone(
    finished, tmp_path, stale_status
):
    pipeline = finished.copy(tmp_path)
    before = _snapshots(pipeline, "tokenizers", "tokenized/tiny_text/v1", "shards/tiny_text/v1")
    raw = pipeline.home / "raw" / "tiny_text"
    (raw / "c.jsonl").write_text("".join((raw / "a.jsonl").read_text().splitlines(keepends=True)[:9]))
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("{name: tiny_text,", "{name: tiny_text, version: v2, extends: v1,"))
    result = pipeline.execute("tokenize_tiny_text")
    assert result.success
    assert _unchanged(pipeline, before)
    made = [e.step_materialization_data.materialization for e in result.all_events if e.is_step_materialization]
    assert [m.partition for m in made if m.asset_key.path[0] == "tokenized"] == ["c.jsonl"]
    assert {e.check_name for e in result.get_asset_check_evaluations() if not e.passed} == set()
    (shards,) = [m for m in made if m.asset_key.path[0] == "shards"]
    info = read_json(pipeline.home / "shards" / "tiny_text" / "v2" / "dataset.json")
    assert info["totals"]["files"] == 1 < shards.metadata["files"].value == 3
    stale = {name for name, (state, _) in stale_status(pipeline).items() if state != "FRESH"}
    assert not {name for name in stale if name.startswith(("tokenizer", "tokenized", "shards", "raw_files"))}
    assert f"checkpoint/tiny/{FIRST}" in stale
    again = pipeline.execute("tokenize_tiny_text")
    assert again.success and _new(again) == set()
