"""What takes a person minutes in the Dagster UI, with its daemon: a training watched, stopped and continued, raw files
that arrive, a recipe that changes, automation that scores while training continues.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import psutil
import pytest
from tiny_pipeline import LABELS, LONG, REPOSITORY, FinishedPipeline, TinyPipeline, environment

# Marks, and no skip of the whole file: all processes that run tests side by side must find the same ones.
no_browser = pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="there is no /usr/bin/chromium")
pytestmark = [pytest.mark.browser, pytest.mark.drill, no_browser]
pytest.importorskip("playwright", reason="playwright is not installed")

from dagster_ui import open_graph  # noqa: E402 - it needs playwright
from gestures import CONDITION, FAR, FAR_COPIES, LOCATION, SCHEDULE, SENSOR, Ui, edit_recipe, ui_of  # noqa: E402

from openlm_pipeline.experiments import load_experiment  # noqa: E402
from openlm_pipeline.runs.folder import RunFolder  # noqa: E402

SUCCESS, FAILURE, CANCELED, STARTED = (
    dg.DagsterRunStatus[name] for name in ("SUCCESS", "FAILURE", "CANCELED", "STARTED")
)


def materializations(ui: Ui, key: str) -> list[dg.EventLogRecord]:
    """All materializations of an asset, newest first."""
    return list(ui.instance.fetch_materializations(dg.AssetKey(key.split("/")), limit=100).records)


def reused(ui: Ui, key: str) -> bool:
    """Whether the latest materialization of an asset says that nothing had to be made."""
    return materializations(ui, key)[0].asset_materialization.metadata["reused"].value


def trainers(pipeline: TinyPipeline) -> list[psutil.Process]:
    """torchrun and its ranks that train the pipeline's run."""
    recipe = str(pipeline.run_folder / "experiment.yaml")
    return [p for p in psutil.process_iter(["cmdline"]) if recipe in (p.info["cmdline"] or [])]


def shown_number(ui: Ui, name: str) -> float:
    """A number of the event that the Events page of an asset shows."""
    row = ui.page.get_by_role("row").filter(has=ui.page.get_by_text(name, exact=True)).first
    return float(row.get_by_role("cell").nth(1).inner_text())


def wait_for_observations(ui: Ui, key: str, number: int) -> None:
    asset = dg.AssetKey(key.split("/"))
    ui.wait_until(
        lambda: len(ui.instance.fetch_observations(asset, limit=number).records) >= number, f"observations of {key}"
    )


def test_a_training_is_watched_live_terminated_and_goes_on(tmp_path):
    pipeline = TinyPipeline.create(tmp_path / "pipeline", copies=FAR_COPIES)
    edit_recipe(pipeline, milestones="[10K, 1500K]", processes="2", log_every="5")
    folder = RunFolder(pipeline.run_folder)
    with ui_of(pipeline, daemon=True) as ui:
        run = ui.launch_job("tiny_checkpoints")
        wait_for_observations(ui, f"checkpoint/tiny/{FAR}", 1)
        ui.open(f"assets/checkpoint/tiny/{FAR}?view=events")
        ui.page.get_by_text("is currently refreshing this asset").wait_for()
        first = {name: shown_number(ui, name) for name in ("step", "loss", "tokens_per_second")}
        wait_for_observations(ui, f"checkpoint/tiny/{FAR}", 3)
        ui.page.reload()
        later = {name: shown_number(ui, name) for name in first}
        assert later["step"] > first["step"]
        assert all(later[name] != first[name] for name in first)
        written = {record["step"]: record["loss"] for record in folder.read_metrics()}
        assert written[first["step"]] == pytest.approx(first["loss"])

        alive = trainers(pipeline)
        assert len(alive) == 3  # torchrun and two ranks
        ui.open(f"runs/{run.run_id}")
        shown = ui.page.locator("td").filter(has_text="tokens_per_second").last.locator("xpath=ancestor::table[1]")
        seen = shown.inner_text()
        ui.wait_until(lambda: shown.inner_text() != seen, "a newer loss on the page of the run, without a reload")
        clicked = ui.terminate(run)
        assert psutil.wait_procs(alive, timeout=60)[1] == []
        seconds = time.monotonic() - clicked
        print(
            f"\ntrainers gone {seconds:.1f} s after the click, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
        )
        assert ui.end_of(run) == CANCELED
        ui.page.get_by_text("Canceled", exact=True).first.wait_for()
        outcome = folder.read_outcome()
        assert outcome["status"] == "preempted"
        assert (folder.checkpoints / f"step-{outcome['step']:08d}" / "COMPLETE").exists()
        assert ui.instance.event_log_storage.get_concurrency_info("training").active_run_ids == set()

        lines = len(folder.metrics_file.read_text().splitlines())
        again = ui.launch_job("tiny_checkpoints")
        ui.wait_until(lambda: len(folder.new_metrics(0)[0]) > lines, "training to continue")
        step = folder.new_metrics(0)[0][lines]["step"]
        assert outcome["step"] < step <= outcome["step"] + 5
        ui.terminate(again)
        assert ui.end_of(again) == CANCELED


def test_new_raw_files_are_tokenized_by_a_backfill_in_one_run(finished: FinishedPipeline, tmp_path):
    pipeline = finished.copy(tmp_path)
    raw = pipeline.home / "raw" / "tiny_text"
    lines = (raw / "a.jsonl").read_text().splitlines(keepends=True)
    for name, some in {"c": lines[:10], "d": lines[10:20], "e": lines[20:]}.items():
        (raw / f"{name}.jsonl").write_text("".join(some))
    with ui_of(pipeline, daemon=True) as ui:
        assert ui.end_of(ui.press_on_asset("raw_files/tiny_text", "Observe")) == SUCCESS
        ui.open("assets/tokenized/tiny_text")
        ui.button("Materialize…").click()
        dialog = ui.page.get_by_role("dialog")
        dialog.get_by_text("Backfills all partitions in a single run.").wait_for()
        dialog.get_by_role("button", name="Missing", exact=True).click()
        dialog.get_by_text("3 partitions").wait_for()
        ui.button("Launch backfill").click()
        ui.page.get_by_text(re.compile(r"Created backfill")).first.wait_for()
        ui.open("runs?view=backfills")
        ui.page.get_by_text("Success", exact=True).wait_for()
        (backfill,) = ui.instance.get_backfills()
        assert backfill.status.name == "COMPLETED_SUCCESS"
        (run,) = [run for run in ui.instance.get_runs() if run.tags.get("dagster/backfill") == backfill.backfill_id]
        made = [m.partition_key for m in materializations(ui, "tokenized/tiny_text") if m.run_id == run.run_id]
        assert sorted(made) == ["c.jsonl", "d.jsonl", "e.jsonl"]


def test_a_changed_recipe_shows_as_unsynced_step_by_step_and_a_new_milestone_is_made_alone(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    checkpoints, scorecards = ([f"{kind}/tiny/{label}" for label in LABELS] for kind in ("checkpoint", "scorecard"))
    with ui_of(pipeline, daemon=True) as ui:
        stale, button = ui.unsynced()
        assert stale == []
        assert button.inner_text() == "Dismiss"  # "All assets are up to date"
        ui.page.get_by_text("All assets are up to date").wait_for()

        edit_recipe(pipeline, lr="2.0e-3")
        ui.reload_definitions()
        ui.open(f"assets/{checkpoints[0]}")
        ui.page.get_by_text("Unsynced (1)").hover()
        ui.page.get_by_text("has a new code version").wait_for()
        for expected in (checkpoints, scorecards, ["report/tiny"]):
            stale, button = ui.unsynced()
            assert stale == expected
            button.click()
            ended = ui.end_of(ui.launched())
            if expected is checkpoints:  # a finished run is not set aside by a click
                assert ended == FAILURE
                assert pipeline.execute("tiny_checkpoints", tags={"openlm/allow": "supersede"}).success
                ui.page.reload()
            else:
                assert ended == SUCCESS
        assert ui.unsynced()[0] == []

        made_before = pipeline.snapshot("runs", "tiny", "v1", "checkpoints")
        records = len(RunFolder(pipeline.run_folder).read_metrics())
        edit_recipe(pipeline, milestones="[10K, 40K, 60K]")
        ui.reload_definitions()
        open_graph(ui.page, ui.address)
        drawn = ui.page.locator("svg foreignObject").filter(has_text=re.compile("^t0060K"))
        ui.wait_until(lambda: drawn.count() == 2, "the new milestone's checkpoint and scorecard on the graph")
        assert ui.end_of(ui.launch_job("tiny")) == SUCCESS
        new = ["checkpoint/tiny/t0060K", "scorecard/tiny/t0060K"]
        assert {key: reused(ui, key) for key in (*checkpoints, *scorecards, *new)} == {
            **dict.fromkeys((*checkpoints, *scorecards), True),
            **dict.fromkeys(new, False),
        }
        metrics = RunFolder(pipeline.run_folder).read_metrics()[records:]
        assert min(record["tokens"] for record in metrics) > 40_000
        assert max(record["tokens"] for record in metrics) >= 60_000
        made_after = pipeline.snapshot("runs", "tiny", "v1", "checkpoints")
        assert made_before == {path: made_after[path] for path in made_before}
        assert ui.unsynced()[0] == []


def asked_by(ui: Ui, record: dg.EventLogRecord) -> str:
    """The sensor whose run made an asset."""
    return ui.instance.get_run_by_id(record.run_id).tags["dagster/sensor_name"]


def test_automation_scores_each_milestone_once_while_training_goes_on(tmp_path):
    pipeline = TinyPipeline.create(tmp_path / "pipeline", global_batch=LONG, copies=FAR_COPIES)
    edit_recipe(pipeline, milestones="[10K, 40K, 1500K]")
    scorecards = [f"scorecard/tiny/{label}" for label in LABELS]
    with ui_of(pipeline, daemon=True) as ui:
        for name in (CONDITION, SENSOR, SCHEDULE):
            ui.turn(name, on=True)
        training = ui.launch_job("tiny_checkpoints")
        ui.wait_until(lambda: all(materializations(ui, key) for key in scorecards), "scores while it trains", 600)
        assert ui.status(training) == STARTED
        ui.terminate(training)
        assert ui.end_of(training) == CANCELED
        ended = ui.instance.get_run_record_by_id(training.run_id).end_time
        for key in scorecards:
            (score,) = materializations(ui, key)
            assert score.timestamp < ended
            assert asked_by(ui, score) == CONDITION

        tokens = RunFolder(pipeline.run_folder).read_outcome()["tokens"] // 1000 + 10
        edit_recipe(pipeline, milestones=f"[10K, 40K, {tokens}K]")
        label, _ = list(load_experiment("tiny").labelled_milestones())[-1]
        ui.reload_definitions()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        subprocess.run([*torchrun, "-m", "train", "tiny"], cwd=REPOSITORY, env=environment(pipeline), check=True)
        ui.wait_until(lambda: materializations(ui, f"scorecard/tiny/{label}"), "the score of the one made by hand")
        ui.wait_until(lambda: materializations(ui, "report/tiny"), "the report over all scores")
        before = {name: ui.automation(name)[1] for name in (CONDITION, SENSOR)}
        ui.wait_until(
            lambda: all(ui.automation(name)[1] >= before[name] + 2 for name in before), "two more looks of each"
        )
        (told,) = materializations(ui, f"checkpoint/tiny/{label}")
        assert ui.instance.get_run_by_id(told.run_id) is None
        (score,) = materializations(ui, f"scorecard/tiny/{label}")
        assert asked_by(ui, score) == SENSOR
        for key in (*scorecards, "report/tiny"):
            (made,) = materializations(ui, key)
            assert asked_by(ui, made) == CONDITION
        assert {run.status for run in ui.instance.get_runs() if run.run_id != training.run_id} == {SUCCESS}

        for name, said in {CONDITION: "materializations requested", SENSOR: "run requested"}.items():
            ui.open(f"locations/{LOCATION}/sensors/{name}")
            ui.page.get_by_text(re.compile(rf"^[1-9]\d* {said}")).first.wait_for()
        for name in (CONDITION, SENSOR, SCHEDULE):
            ui.turn(name, on=False)
