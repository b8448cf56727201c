"""The UI of a tiny pipeline, and what a person does in it: launch, terminate, reload, switch on."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import dagster as dg
from dagster_ui import browser_page, webserver
from playwright.sync_api import Locator, Page
from tiny_pipeline import REPOSITORY, TinyPipeline, environment

WAIT_SECONDS = 300.0
LOCATION = "tiny_definitions.py"
DEFINITIONS = """
from openlm_pipeline.experiments import load_experiment
from orchestration.definitions import build_definitions

defs = build_definitions([load_experiment("tiny")])
"""
CONDITION, SENSOR, SCHEDULE = "default_automation_condition_sensor", "checkpoints_in_run_folders", "missing_scores"
FAR = "t1500K"  # a milestone that nobody waits for
FAR_COPIES = 8
"""How often the text must be there for it: a recipe that repeats its data too often is refused."""


def edit_recipe(pipeline: TinyPipeline, **fields: str) -> None:
    """Write other values into the recipe, as a person does with an editor."""
    path = pipeline.root / "recipes" / "tiny.yaml"
    text = path.read_text()
    for field, value in fields.items():
        text, replaced = re.subn(rf"\b{field}: (\[.*?\]|[^,}}\n]+)", f"{field}: {value}", text)
        assert replaced == 1, field
    path.write_text(text)


@dataclass(frozen=True)
class Ui:
    """The address of a running UI, a page to see it on, and Dagster's storage to compare with."""

    address: str
    page: Page
    instance: dg.DagsterInstance

    def open(self, path: str) -> None:
        self.page.goto(f"{self.address}/{path}")

    def button(self, label: str) -> Locator:
        """Buttons of exactly that label; their icons have names too, which a role's name would include."""
        return self.page.get_by_role("button").filter(has_text=re.compile(rf"^\s*{re.escape(label)}\s*$"))

    def wait_until(self, holds: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
        """Until `holds` returns something true; the page lives on meanwhile."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
            self.page.wait_for_timeout(200)

    def status(self, run: dg.DagsterRun) -> dg.DagsterRunStatus:
        return self.instance.get_run_by_id(run.run_id).status

    def end_of(self, run: dg.DagsterRun) -> dg.DagsterRunStatus:
        """How a run ended, once it has."""
        self.wait_until(lambda: self.instance.get_run_by_id(run.run_id).is_finished, f"the end of run {run.run_id}")
        return self.status(run)

    def launched(self) -> dg.DagsterRun:
        """The run that the page says it launched; its warning that upstream assets are missing is confirmed."""
        said = self.page.get_by_text(re.compile(r"Launched run\s*[0-9a-f]{8}")).last
        confirm = self.button("Confirm")
        said.or_(confirm).first.wait_for()
        if confirm.is_visible():
            confirm.click()
        short = said.inner_text().split()[2]
        (run,) = [run for run in self.instance.get_runs(limit=5) if run.run_id.startswith(short)]
        return run

    def launch_job(self, job: str) -> dg.DagsterRun:
        """Press "Materialize all" on the page of a job."""
        self.open(f"locations/{LOCATION}/jobs/{job}")
        self.button("Materialize all").click()
        return self.launched()

    def press_on_asset(self, key: str, label: str) -> dg.DagsterRun:
        """Press "Materialize" or "Observe" on the page of an asset."""
        self.open(f"assets/{key}")
        self.button(label).click()
        return self.launched()

    def terminate(self, run: dg.DagsterRun) -> float:
        """Terminate a run on its page.

        Returns:
            The monotonic time of the last click, in seconds.
        """
        self.open(f"runs/{run.run_id}")
        self.button("Terminate").click()
        self.button("Terminate 1 run").wait_for()
        clicked = time.monotonic()
        self.button("Terminate 1 run").click()
        return clicked

    def reload_definitions(self) -> None:
        """Press "Reload definitions" on the graph."""
        self.open("asset-groups")
        with self.page.expect_response(lambda response: "Reload" in response.url):
            self.button("Reload definitions").click()

    def unsynced(self) -> tuple[list[str], Locator]:
        """Choose "Materialize unsynced" on the graph.

        Returns:
            The assets that the dialog lists, and its button.
        """
        self.open("asset-groups")
        self.page.get_by_role("button", name="Materialize all").wait_for()
        self.page.locator('button:has([aria-label="arrow_drop_down"])').last.click()
        self.page.get_by_role("menuitem", name="Materialize unsynced").click()
        dialog = self.page.get_by_role("dialog").filter(has_text="Materialize unsynced assets")
        button = dialog.get_by_role("button").filter(has_text=re.compile("Materialize|Dismiss"))
        button.wait_for()
        names = re.findall(r"^\S+(?: / \S+)+$", dialog.inner_text(), re.MULTILINE)
        return sorted({name.replace(" / ", "/") for name in names}), button

    def automation(self, name: str) -> tuple[bool, int]:
        """Whether a sensor or schedule is on, and the number of its ticks, as Dagster's storage has it."""
        for state in self.instance.all_instigator_state():
            if state.instigator_name == name:
                return state.is_running, len(self.instance.get_ticks(state.instigator_origin_id, state.selector_id))
        return False, 0

    def switch(self, name: str) -> Locator:
        """The switch of a sensor or schedule on the Automation page, which is open."""
        row = self.page.get_by_role("link", name=name).locator("xpath=ancestor::*[count(.//input)=2][1]")
        return row.locator("label").last

    def turn(self, name: str, on: bool) -> None:
        """Click the switch of a sensor or schedule on the Automation page, and see it on or off."""
        self.open("automation")
        switch = self.switch(name)
        switch.click()
        self.wait_until(lambda: self.automation(name)[0] == on, f"{name} to change")
        self.wait_until(lambda: switch.locator("input").is_checked() == on, f"the switch of {name} to change")


@contextlib.contextmanager
def ui_of(pipeline: TinyPipeline, *, daemon: bool) -> Iterator[Ui]:
    """The UI of a pipeline's recipe, with Dagster's daemon or without."""
    definitions = pipeline.root / LOCATION
    definitions.write_text(DEFINITIONS)
    log = pipeline.root / "webserver.log"
    source = ["-f", str(definitions)]
    with (
        webserver(source, REPOSITORY, environment(pipeline), log, daemon=daemon) as address,
        pipeline.active(),
        dg.DagsterInstance.get() as instance,
        browser_page() as page,
    ):
        yield Ui(address, page, instance)
