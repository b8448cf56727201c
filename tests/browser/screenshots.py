"""The pictures of docs/ui.md, from a tiny pipeline: `PYTHONPATH=. python tests/browser/screenshots.py FOLDER`.

FOLDER, which must not exist, is where the pipeline is made; its path is seen on the pictures.
"""

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import dagster as dg
from dagster_ui import open_graph
from gestures import CONDITION, FAR, LOCATION, SCHEDULE, SENSOR, Ui, edit_recipe, ui_of
from PIL import Image
from tiny_pipeline import LABELS, REPOSITORY, TinyPipeline

_COLOURS = 256


def save(ui: Ui, name: str) -> None:
    """The page as it is now, as `docs/images/ui-<name>.png` with a palette."""
    ui.page.wait_for_load_state("networkidle")
    picture = Image.open(io.BytesIO(ui.page.screenshot(animations="disabled"))).convert("RGB")
    path = REPOSITORY / "docs" / "images" / f"ui-{name}.png"
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(REPOSITORY)}  {path.stat().st_size / 1000:.0f} kB")


def number_of(ui: Ui, key: str, kind: str) -> int:
    fetch = ui.instance.fetch_observations if kind == "observations" else ui.instance.fetch_materializations
    return len(fetch(dg.AssetKey(key.split("/")), limit=100).records)


def main(folder: Path) -> None:
    pipeline = TinyPipeline.create(folder)
    edit_recipe(pipeline, milestones="[10K, 40K, 1500K]", log_every="5")
    with ui_of(pipeline, daemon=True) as ui:
        for name in (CONDITION, SENSOR, SCHEDULE):
            ui.turn(name, on=True)
        run = ui.launch_job("tiny_checkpoints")
        open_graph(ui.page, ui.address)
        ui.wait_until(lambda: number_of(ui, "shards/tiny_text", "materializations"), "shards")
        save(ui, "materialize")

        ui.wait_until(lambda: number_of(ui, f"checkpoint/tiny/{FAR}", "observations") >= 12, "losses")
        ui.open(f"assets/checkpoint/tiny/{FAR}")
        ui.button("Plots").click()
        ui.page.get_by_text("loss", exact=True).evaluate("title => title.scrollIntoView()")
        save(ui, "live-loss")

        for label in LABELS:
            ui.wait_until(lambda: number_of(ui, f"scorecard/tiny/{label}", "materializations"), "scores")  # noqa: B023
        ui.open("automation")
        ui.page.get_by_text("Scheduled Every hour").wait_for()
        for name in (SCHEDULE, SENSOR, CONDITION):
            ui.wait_until(lambda: ui.switch(name).locator("input").is_checked(), f"{name} to show as on")  # noqa: B023
        save(ui, "automation")
        ui.open(f"locations/{LOCATION}/sensors/{CONDITION}")
        ui.page.get_by_text("materializations requested").first.wait_for()
        save(ui, "ticks")

        ui.open(f"runs/{run.run_id}")
        ui.page.get_by_text("tokens_per_second").last.wait_for()
        ui.button("Terminate").click()
        ui.button("Terminate 1 run").wait_for()
        save(ui, "terminate")
        ui.button("Terminate 1 run").click()
        ui.end_of(run)

        edit_recipe(pipeline, milestones="[10K, 40K]", lr="2.0e-3")
        ui.reload_definitions()
        ui.open(f"assets/checkpoint/tiny/{LABELS[0]}")
        ui.page.get_by_text("Unsynced (1)").hover()
        ui.page.get_by_text("has a new code version").wait_for()
        save(ui, "unsynced")

        raw = pipeline.home / "raw" / "tiny_text"
        for name in ("c", "d", "e"):
            (raw / f"{name}.jsonl").write_text((raw / "a.jsonl").read_text())
        ui.end_of(ui.press_on_asset("raw_files/tiny_text", "Observe"))
        ui.open("assets/tokenized/tiny_text")
        ui.button("Materialize…").click()
        dialog = ui.page.get_by_role("dialog")
        dialog.get_by_role("button", name="Missing", exact=True).click()
        dialog.get_by_text("3 partitions").wait_for()
        save(ui, "backfill")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
