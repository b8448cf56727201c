"""The pictures of the documentation: `PYTHONPATH=. python tests/browser/screenshots.py FOLDER [HOME DAGSTER_HOME]`.

FOLDER, which must not exist, is where a tiny pipeline is made; its path is seen on the pictures. With both homes of a
finished `make demo` the pictures of the demo are made instead, and FOLDER only holds the log of their server.
"""

import io
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import dagster as dg
from dagster_ui import browser_page, open_graph, webserver
from gestures import CONDITION, FAR_COPIES, LOCATION, SCHEDULE, SENSOR, Ui, edit_recipe, ui_of
from PIL import Image
from playwright.sync_api import Page
from tiny_pipeline import LABELS, REPOSITORY, TinyPipeline

_COLOURS = 256
_MADE = 13
"""Assets of the demo, without its raw files."""
_GREEN_FRAMES = """least => [...document.querySelectorAll("svg foreignObject")].filter(node =>
    [...node.querySelectorAll("*")].map(e => getComputedStyle(e).borderTopColor.match(/\\d+/g).map(Number))
    .some(([red, green, blue]) => green > red + 50 && green > blue + 50)).length >= least"""


def save(page: Page, name: str) -> None:
    """The page as it is now, as `docs/images/<name>.png` with a palette."""
    page.wait_for_load_state("networkidle")
    picture = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    path = REPOSITORY / "docs" / "images" / f"{name}.png"
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(REPOSITORY)}  {path.stat().st_size / 1000:.0f} kB")


def times_made(ui: Ui, key: str) -> int:
    return len(ui.instance.fetch_materializations(dg.AssetKey(key.split("/")), limit=100).records)


def of_demo(folder: Path, home: Path, dagster_home: Path) -> None:
    """The graph, pages of what was made, and a recipe that is refused for too little text."""
    folder.mkdir()
    module = "openlm_pipeline.cli.definitions"
    variables = {"OPENLM_HOME": str(home), "DAGSTER_HOME": str(dagster_home), "OPENLM_ONLY": "demo"}
    variables |= os.environ | variables | {"OPENLM_RAW_DATA": str(home / "raw" / "embedded" / "train")}
    with webserver(["-m", module], REPOSITORY, variables, folder / "log") as address, browser_page(2600, 1100) as page:
        open_graph(page, address)
        page.wait_for_function(_GREEN_FRAMES, arg=_MADE)
        page.get_by_text("Hide navigation").click()
        save(page, "graph")
        page.set_viewport_size({"width": 1600, "height": 1000})
        page.goto((home / "reports" / "demo" / "v1" / "report.html").as_uri())
        save(page, "report")
    variables["OPENLM_ONLY"] = "demo,pretrain_1b"
    with webserver(["-m", module], REPOSITORY, variables, folder / "log") as address, browser_page() as page:
        page.goto(f"{address}/assets/scorecard/demo/t0400K")
        page.get_by_text("wrong_items").wait_for()
        save(page, "ui-scorecard")
        page.goto(f"{address}/assets/checkpoint/demo/t0400K")
        page.get_by_alt_text("loss against tokens").wait_for()
        save(page, "ui-live-loss")
        page.goto(f"{address}/locations/{module}/jobs/pretrain_1b")
        page.get_by_role("button", name="Materialize all").click()
        page.get_by_role("button", name="Confirm").or_(page.get_by_text("Launched run")).first.wait_for()
        if (confirm := page.get_by_role("button", name="Confirm")).is_visible():
            confirm.click()
        page.get_by_text("Launched run").first.wait_for()
        with dg.DagsterInstance.from_config(str(dagster_home)) as instance:
            (run,) = instance.get_runs(limit=1)
        page.goto(f"{address}/runs/{run.run_id}")
        page.get_by_text("RUN_FAILURE").first.wait_for()
        save(page, "ui-refused")


def main(folder: Path) -> None:
    pipeline = TinyPipeline.create(folder, copies=FAR_COPIES)
    edit_recipe(pipeline, milestones="[10K, 40K, 1500K]", log_every="5")
    with ui_of(pipeline, daemon=True) as ui:
        for name in (CONDITION, SENSOR, SCHEDULE):
            ui.turn(name, on=True)
        run = ui.launch_job("tiny_checkpoints")
        for label in LABELS:
            ui.wait_until(lambda: times_made(ui, f"scorecard/tiny/{label}"), "scores")  # noqa: B023
        ui.open("automation")
        ui.page.get_by_text("Scheduled Every hour").wait_for()
        for name in (SCHEDULE, SENSOR, CONDITION):
            ui.wait_until(lambda: ui.switch(name).locator("input").is_checked(), f"{name} to show as on")  # noqa: B023
        save(ui.page, "ui-automation")
        ui.open(f"locations/{LOCATION}/sensors/{CONDITION}")
        ui.page.get_by_text("materializations requested").first.wait_for()
        save(ui.page, "ui-ticks")

        ui.open(f"runs/{run.run_id}")
        ui.page.get_by_text("tokens_per_second").last.wait_for()
        ui.button("Terminate").click()
        ui.button("Terminate 1 run").wait_for()
        save(ui.page, "ui-terminate")
        ui.button("Terminate 1 run").click()
        ui.end_of(run)

        edit_recipe(pipeline, milestones="[10K, 40K]", lr="2.0e-3")
        ui.reload_definitions()
        ui.open(f"assets/checkpoint/tiny/{LABELS[0]}")
        ui.page.get_by_text("Unsynced (1)").hover()
        ui.page.get_by_text("has a new code version").wait_for()
        save(ui.page, "ui-unsynced")

        raw = pipeline.home / "raw" / "tiny_text"
        for name in ("c", "d", "e"):
            (raw / f"{name}.jsonl").write_text((raw / "a.jsonl").read_text())
        ui.end_of(ui.press_on_asset("raw_files/tiny_text", "Observe"))
        ui.open("assets/tokenized/tiny_text")
        ui.button("Materialize…").click()
        dialog = ui.page.get_by_role("dialog")
        dialog.get_by_role("button", name="Missing", exact=True).click()
        dialog.get_by_text("3 partitions").wait_for()
        save(ui.page, "ui-backfill")


if __name__ == "__main__":
    of_demo(*map(Path, sys.argv[1:])) if len(sys.argv) > 2 else main(Path(sys.argv[1]))
