"""The report: a page that stands alone, says the truth in its first sentence, and never runs what it shows."""

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from openlm_pipeline.reports import milestones_table, write_report
from openlm_pipeline.reports.plots import loss_chart, series
from openlm_pipeline.reports.summary import headline

GOLDEN = Path(__file__).parent / "golden"
VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that every element is closed in order and ids are unique; keeps attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        ids = [value for name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def paths(tmp_path_factory, experiment, cards, metrics) -> dict[str, Path]:
    return write_report(tmp_path_factory.mktemp("report"), experiment, cards, metrics, {"Code version": "1.2.3"})


@pytest.fixture(scope="module")
def html(paths) -> str:
    return paths["report.html"].read_text()


def test_markdown_is_the_golden_file(paths):
    assert paths["report.md"].read_text() == (GOLDEN / "report.md").read_text()


def test_html_is_well_formed_and_has_every_part(html):
    page = Page(html)
    text = " ".join(page.text)
    assert page.tags.count("svg") == 4
    for part in ("Scores", "Average accuracy", "Loss", "How it was made", "Provenance", "failed"):
        assert part in text


def test_html_loads_nothing_and_runs_nothing(html):
    page = Page(html)
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    references = [v for k, v in page.attributes if k in ("src", "href", "xlink:href")]
    references += re.findall(r"url\(([^)]*)\)", html)
    assert references and all(r.startswith("#") for r in references)
    ids = {v for k, v in page.attributes if k == "id"}
    assert {r[1:] for r in references} <= ids


def test_a_milestone_not_scored_says_not_run(tmp_path, experiment, first_card):
    page = Page(write_report(tmp_path, experiment, [first_card], [])["report.html"].read_text())
    assert page.text.count("not run") == 2 * 6  # two milestones; three tasks and three summaries


def test_charts_take_their_colours_from_the_page(html):
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "currentColor" in svgs and "var(--accent)" in svgs
    assert not re.search(r"#[0-9a-f]{6}\b", svgs)


def test_footer_names_what_the_scores_came_from(html, cards):
    for card in cards:
        assert card.checkpoint_digest in html
    for value in ("d" * 64, "5" * 64, "c" * 64, "h" * 64, "1.2.3"):
        assert value in html


def test_text_from_outside_is_never_markup(tmp_path, experiment, first_card, metrics):
    attack = '<script>alert("x")</script>|<img src=x onerror=alert(1)>'
    bad = first_card.tasks[0].model_copy(update={"task": attack})
    failed = first_card.tasks[1].model_copy(update={"status": "failed", "problem": attack, "accuracy": None})
    card = first_card.model_copy(update={"tasks": (bad, failed), "tokenizer": attack, "run_version": attack})
    hostile = experiment.model_copy(update={"description": attack, "version": attack})
    paths = write_report(tmp_path, hostile, [card], metrics, {attack: attack})
    page = Page(paths["report.html"].read_text())
    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert attack in "".join(page.text)
    markdown = paths["report.md"].read_text()
    assert "<script" not in markdown and "<img" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1


def test_the_same_inputs_give_the_same_bytes_whatever_matplotlib_is_set_to(tmp_path, paths, experiment, cards, metrics):
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "svg.fonttype": "path", "axes.grid": False}):
        again = write_report(tmp_path, experiment, list(reversed(cards)), metrics, {"Code version": "1.2.3"})
        assert matplotlib.rcParams["font.size"] == 30
    assert set(again) == {"report.md", "report.html", "table.csv", "table.parquet"}
    for name, path in again.items():
        assert path.read_bytes() == paths[name].read_bytes()


def test_a_run_without_scores_or_metrics_still_has_a_report(tmp_path, experiment):
    paths = write_report(tmp_path, experiment, [], [])
    page = Page(paths["report.html"].read_text())
    assert "svg" not in page.tags
    assert "No milestone has an average score yet." in page.text


def _headline(cards, **averages) -> str:
    changed = [card.model_copy(update=averages[card.milestone]) for card in cards]
    found = headline(milestones_table("demo", "v1", changed, [250_000, 1_000_000]))
    return " ".join([found.main, *found.details])


def _scored(average: float, half: float = 0.02) -> dict[str, float]:
    return {"average": average, "average_ci_low": average - half, "average_ci_high": average + half}


def test_headline_says_best_by_how_much_and_whether_it_is_noise(first_card, last_card):
    cards = [first_card, last_card]  # mean chance (0.25 + 0 + 0.25) / 3
    clear = _headline(cards, t0250K=_scored(0.24), t0001M=_scored(0.30))
    assert clear.startswith(
        "1M tokens is the best of 2 scored milestones: average accuracy 0.300 ±0.020, above chance (0.167)."
        " It leads the runner-up, 250K, by 0.060 ±0.028, more than noise."
    )
    noise = _headline(cards, t0250K=_scored(0.30), t0001M=_scored(0.29))
    assert "by 0.010 ±0.028, which is within noise." in noise
    assert "not distinguishable from chance" in _headline(cards, t0250K=_scored(0.18), t0001M=_scored(0.17))
    assert "below chance" in _headline(cards, t0250K=_scored(0.10), t0001M=_scored(0.09))


def test_metrics_after_a_resume_count_once_and_not_finite_ones_are_left_out():
    records = [
        {"tokens": 10, "loss": 3.0},
        {"tokens": 20, "loss": 2.0},
        {"tokens": 20, "loss": 2.5},
        {"tokens": 30, "loss": float("inf")},
        {"tokens": 30, "validation_loss": 1.0},
    ]
    tokens, loss = series(records, "loss")
    assert tokens.tolist() == [10, 20] and loss.tolist() == [3.0, 2.5]


def test_a_chart_of_a_long_run_stays_small_and_keeps_its_spike():
    records = [{"tokens": 1000 * i, "loss": 90.0 if i == 50_000 else 3.0} for i in range(1, 100_001)]
    svg = loss_chart(records, [])
    assert len(svg) < 200_000
    assert ">80<" in svg  # the axis reaches the spike
