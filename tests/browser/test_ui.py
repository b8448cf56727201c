"""What a person does in the Dagster UI works: see the whole graph, make one asset, read its numbers."""

import re
from collections import Counter
from pathlib import Path

import dagster as dg
import pytest
from tiny_pipeline import LABELS, REPOSITORY, TinyPipeline, environment

pytestmark = pytest.mark.browser
if not Path("/usr/bin/chromium").exists():
    pytest.skip("there is no /usr/bin/chromium", allow_module_level=True)
pytest.importorskip("playwright", reason="playwright is not installed")

from dagster_ui import browser_page, graph_texts, open_graph, webserver  # noqa: E402 - it needs playwright

DEFINITIONS = """
from openlm_pipeline.experiments import load_experiment
from orchestration.definitions import build_definitions

defs = build_definitions([load_experiment("tiny")])
"""
UI_SECONDS = 90.0


@pytest.fixture
def pipeline(finished, tmp_path) -> TinyPipeline:
    return finished.copy(tmp_path)


def test_the_graph_shows_every_asset_and_one_click_makes_one(pipeline, tmp_path):
    definitions = pipeline.root / "tiny_definitions.py"
    definitions.write_text(DEFINITIONS)
    log = tmp_path / "webserver.log"
    with (
        webserver(["-f", str(definitions)], REPOSITORY, environment(pipeline), log) as address,
        browser_page() as page,
    ):
        open_graph(page, address)
        drawn = page.locator("svg foreignObject")
        for text in ("data", "tiny", "tiny_bpe", *LABELS):
            drawn.filter(has_text=text).first.wait_for()
        names = Counter(
            name for text in graph_texts(page) for name in ("tiny_text", "tiny_bpe", *LABELS) if text.startswith(name)
        )
        # raw_files, tokenized and shards; the tokenizer; the checkpoint and the scorecard of each milestone
        assert names == {"tiny_text": 3, "tiny_bpe": 1, **dict.fromkeys(LABELS, 2)}

        page.goto(f"{address}/assets/scorecard/tiny/{LABELS[0]}")
        reused = page.get_by_role("row").filter(has=page.get_by_text("reused", exact=True))
        assert "false" in reused.inner_text().lower()
        runs_before = _runs(pipeline)
        page.get_by_role("button").filter(has_text=re.compile(r"^\s*Materialize\s*$")).click()
        _wait_for_run(pipeline, page, runs_before)
        page.reload()
        row = page.get_by_role("row").filter(has=page.get_by_text("average", exact=True))
        row.wait_for()
        assert "true" in reused.inner_text().lower()  # the numbers are those of the new run
        assert f"{_average(pipeline):.6g}"[:6] in row.inner_text()


def _runs(pipeline: TinyPipeline) -> set[str]:
    with pipeline.active(), dg.DagsterInstance.get() as instance:
        return {run.run_id for run in instance.get_runs()}


def _wait_for_run(pipeline: TinyPipeline, page, before: set[str]) -> None:
    """Until the run that the click launched has ended, which must be well."""
    with pipeline.active(), dg.DagsterInstance.get() as instance:
        for _ in range(int(UI_SECONDS / 0.2)):
            new = [run for run in instance.get_runs() if run.run_id not in before]
            if new and new[0].is_finished:
                break
            page.wait_for_timeout(200)
        assert [run.status for run in new] == [dg.DagsterRunStatus.SUCCESS]


def _average(pipeline: TinyPipeline) -> float:
    with pipeline.active(), dg.DagsterInstance.get() as instance:
        key = dg.AssetKey(["scorecard", "tiny", LABELS[0]])
        made = instance.fetch_materializations(key, limit=1).records[0].asset_materialization
        return made.metadata["average"].value
