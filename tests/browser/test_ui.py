"""What a person does in the Dagster UI works: see the whole graph, make one asset, read its numbers."""

from collections import Counter
from pathlib import Path

import dagster as dg
import pytest
from tiny_pipeline import LABELS, TinyPipeline

# Marks, and no skip of the whole file: all processes that run tests side by side must find the same ones.
no_browser = pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="there is no /usr/bin/chromium")
pytestmark = [pytest.mark.browser, pytest.mark.drill, no_browser]
pytest.importorskip("playwright", reason="playwright is not installed")

from dagster_ui import graph_texts, open_graph  # noqa: E402 - it needs playwright
from gestures import ui_of  # noqa: E402


@pytest.fixture
def pipeline(finished, tmp_path) -> TinyPipeline:
    return finished.copy(tmp_path)


def test_the_graph_shows_every_asset_and_one_click_makes_one(pipeline):
    with ui_of(pipeline, daemon=False) as ui:
        page = ui.page
        open_graph(page, ui.address)
        drawn = page.locator("svg foreignObject")
        for text in ("tokenized", "shards", "tiny_scores", "tiny_bpe", *LABELS):
            drawn.filter(has_text=text).first.wait_for()
        names = Counter(
            name for text in graph_texts(page) for name in ("tiny_text", "tiny_bpe", *LABELS) if text.startswith(name)
        )
        # raw_files, tokenized and shards; the tokenizer; the checkpoint and the scorecard of each milestone
        assert names == {"tiny_text": 3, "tiny_bpe": 1, **dict.fromkeys(LABELS, 2)}

        ui.open(f"assets/scorecard/tiny/{LABELS[0]}")
        reused = page.get_by_role("row").filter(has=page.get_by_text("reused", exact=True))
        assert "false" in reused.inner_text().lower()
        run = ui.press_on_asset(f"scorecard/tiny/{LABELS[0]}", "Materialize")
        assert ui.end_of(run) == dg.DagsterRunStatus.SUCCESS
        page.reload()
        row = page.get_by_role("row").filter(has=page.get_by_text("average", exact=True))
        row.wait_for()
        assert "true" in reused.inner_text().lower()  # the numbers are those of the new run
        key = dg.AssetKey(["scorecard", "tiny", LABELS[0]])
        made = ui.instance.fetch_materializations(key, limit=1).records[0].asset_materialization
        assert f"{made.metadata['average'].value:.6g}"[:6] in row.inner_text()
