"""A page of OpenLM's size, 12 tasks at 7 milestones, is cut nowhere and has no label on a line."""

from pathlib import Path

import pytest

from openlm_pipeline.evaluation.baselines import quoted_baselines
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.reports import write_report
from openlm_pipeline.units import milestone_label

no_browser = pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="there is no /usr/bin/chromium")
pytestmark = [pytest.mark.browser, no_browser]

TOKENS = [250, 500, 750, 1000, 1250, 1500, 1600]
LABELS = "[...document.querySelectorAll('[aria-label^=\"Average\"] text')].map(e => e.getBoundingClientRect())"
LINES = """[...document.querySelectorAll('[aria-label^="Average"] path')].map(e => [e.getAttribute('style'), e])
  .filter(([style]) => /--muted|--second/.test(style)).map(([_, e]) => e.getBoundingClientRect())
  .filter(box => box.height < 1 && box.width > 500)"""


@pytest.fixture(scope="module")
def page_of_openlm(tmp_path_factory, baseline, first_card, of_tasks):
    quoted = quoted_baselines(["openlm_1b", "pythia_1b", "opt_1_3b"])
    tasks = [task.removesuffix("/0-shot") for task in quoted[0].average_tasks] + ["triviaqa"]
    names = tuple(f"{task}/0-shot" for task in tasks)
    quoted = [row.model_copy(update={"average_tasks": names}) for row in quoted]
    settings = {"run": "pretrain_1b"}
    cards = [
        of_tasks(
            {t: 0.35 + 0.02 * i + 0.01 * k for k, t in enumerate(tasks)},
            milestone_label(b * 10**9),
            b * 10**9,
            **settings,
        )
        for i, b in enumerate(TOKENS)
    ]
    other = of_tasks({t: 0.47 + 0.01 * k for k, t in enumerate(tasks)}, None, None, run="tiny_lm", run_version="main")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENLM_RAW_DATA", "/none")
        experiment = load_experiment("pretrain_1b", [f"milestones=[{','.join(f'{b}B' for b in TOKENS)}]"])
    records = [
        {"tokens": b * 10**9, "loss": 2.0, "validation_loss/pile": 2.2, "validation_loss/c4": 2.21} for b in TOKENS
    ]
    out = tmp_path_factory.mktemp("openlm")
    return write_report(out, experiment, cards, records, baselines=[other], quoted=quoted)["report.html"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [390, 1300, 1920])
def test_nothing_is_wider_than_the_window(browser, page_of_openlm, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(page_of_openlm.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    cut = page.evaluate("[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).length")
    assert cut == 0 or width == 390  # there a table scrolls by itself
    page.close()


def test_labels_overlap_neither_each_other_nor_a_line_across(browser, page_of_openlm):
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(page_of_openlm.as_uri())
    texts, paths = page.evaluate(LABELS), page.evaluate(LINES)
    inside = [t for t in texts if t["height"] < t["width"]]
    assert len(inside) > 8
    for i, a in enumerate(inside):
        for b in inside[:i]:
            across, down = (min(a[e], b[e]) - max(a[s], b[s]) for s, e in (("left", "right"), ("top", "bottom")))
            assert across <= 0 or down <= 1
    assert len(paths) > 3
    for t in inside:
        middle = t["top"] + t["height"] / 2
        assert all(abs(middle - p["top"]) > 4 for p in paths if p["left"] < t["left"] and t["right"] < p["right"])
    page.close()
