"""The report: a page that stands alone, says the truth in its first sentence, and never runs what it shows."""

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from openlm_pipeline.reports import milestones_table, write_report
from openlm_pipeline.reports.contamination import contamination
from openlm_pipeline.reports.curves import series, small_picture
from openlm_pipeline.reports.headline import headline
from openlm_pipeline.reports.plots import _apart, loss_chart

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
def others(baseline, published) -> dict:
    counts = {"items": 400, "seen": 3, "clean": 390, "too_short": 7, "share_seen": 3 / 400}
    scored = {"num_fewshot": 0, "accuracy_seen": 1.0, "accuracy_clean": 0.44, "difference": 0.56}
    last = {"task": "choice", **counts, **scored, "difference_low": 0.12, "difference_high": 0.61}
    first = {"task": "choice", "num_fewshot": 0, **counts, "seen": 0, "share_seen": 0.0}
    items = [
        {"task": "choice", "item": n, "overlap": o, "overlap_question": None, "overlap_answer": o, "times_seen": n}
        | {"first_seen_tokens": 1000 * (n + 1)}
        for n, o in enumerate((0.004, 1.0, 0.25))
    ]
    seen = contamination({"250K": [first], "1M": [last]}, items, ["What is seen."], listed=2)
    return {"baselines": [baseline], "quoted": [published], "contamination": seen}


@pytest.fixture(scope="module")
def paths(tmp_path_factory, experiment, cards, metrics, others) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("report")
    return write_report(out, experiment, cards, metrics, {"Code version": "1.2.3"}, **others)


@pytest.fixture(scope="module")
def html(paths) -> str:
    return paths["report.html"].read_text()


def test_markdown_is_the_golden_file(paths, golden):
    golden("report.md", paths["report.md"].read_text())


def test_html_but_for_its_charts_and_style_is_the_golden_file(html, golden):
    text = re.sub(r"<svg.*?</svg>", "<svg></svg>", html, flags=re.DOTALL)
    golden("report.html", re.sub(r"<style>.*?</style>", "<style></style>", text, flags=re.DOTALL))


def test_html_is_well_formed_and_has_every_part(html):
    page = Page(html)
    text = " ".join(page.text)
    assert page.tags.count("svg") == 4
    for part in ("Scores", "Average accuracy", "Loss", "How it was made", "Provenance", "failed"):
        assert part in text


def test_html_loads_nothing_and_runs_nothing(html):
    page = Page(html)
    assert "@import" not in html
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    references = [v for k, v in page.attributes if k in ("src", "href", "xlink:href")]
    references += re.findall(r"url\(([^)]*)\)", html)
    assert references and all(r.startswith("#") for r in references)
    ids = {v for k, v in page.attributes if k == "id"}
    assert {r[1:] for r in references} <= ids


def test_a_milestone_not_scored_says_not_run(tmp_path, experiment, first_card):
    page = Page(write_report(tmp_path, experiment, [first_card], [])["report.html"].read_text())
    assert page.text.count("not run") == 2 * (
        7 + 4
    )  # two milestones; three tasks, four summaries; an average and three tasks


def test_charts_take_their_colours_from_the_page(html):
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "currentColor" in svgs and "var(--accent)" in svgs
    assert not re.search(r"#[0-9a-f]{6}\b", svgs)


def test_categories_fold_out_by_milestone(tmp_path, experiment, first_card):
    part = first_card.tasks[0].model_copy(update={"category": "law", "accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.59})
    card = first_card.model_copy(update={"categories": (part,)})
    page = Page(write_report(tmp_path, experiment, [card], [])["report.html"].read_text())
    assert "choice/0-shot by category (1)" in page.text and "0.50 ±0.10" in page.text


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
    assert set(re.findall(r"<[^>]*>", markdown)) == {"<details>", "</details>", "<summary>", "</summary>"}
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 2  # two tables


def test_the_same_inputs_give_the_same_bytes_whatever_matplotlib_is_set_to(
    tmp_path, paths, experiment, cards, metrics, others
):
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "svg.fonttype": "path", "axes.grid": False}):
        again = write_report(tmp_path, experiment, cards[::-1], metrics, {"Code version": "1.2.3"}, **others)
        assert matplotlib.rcParams["font.size"] == 30
    assert set(again) == {"report.md", "report.html", "table.csv", "table.parquet"}
    for name, path in again.items():
        assert path.read_bytes() == paths[name].read_bytes()


def test_a_run_without_scores_or_metrics_still_has_a_report(tmp_path, experiment):
    paths = write_report(tmp_path, experiment, [], [])
    page = Page(paths["report.html"].read_text())
    assert "svg" not in page.tags
    assert "No milestone has an average score yet." in page.text


def _with_average(card, average: float, half: float | None = 0.02, **fields):
    ends = {"ci_low": None, "ci_high": None} if half is None else {"ci_low": average - half, "ci_high": average + half}
    mean = card.averages[0].model_copy(update={"value": average, **ends})
    return card.model_copy(update={"averages": (mean, *card.averages[1:]), **fields})


def _headline(*cards, baselines=(), quoted=()):
    nominal = [{"t0250K": 250_000, "t0500K": 500_000, "t0001M": 1_000_000}[card.milestone] for card in cards]
    table = milestones_table("demo", "v1", cards, nominal, baselines=baselines, quoted=quoted)
    return headline(table, [*cards, *baselines])


def _figures(found) -> dict[str, tuple[str, str, str]]:
    return {f.title: (f.value, f.detail.replace("\u00a0", " "), f.sign) for f in found.figures}


def test_headline_says_best_by_how_much_and_whether_it_is_noise(first_card, last_card):
    found = _headline(_with_average(first_card, 0.24), _with_average(last_card, 0.287))
    assert found.main == "1M tokens is the best of 2 scored milestones, 0.047 ahead of 250K, which is more than noise."
    lead = "more than noise, 95% +0.007 to +0.087, p = 0.004 after correction (paired over the same items)"
    figures = _figures(found)
    assert figures["Average accuracy"] == ("0.287 ±0.020", "3 tasks, 1,200 items", "")
    assert figures["Lead over 250K"] == ("+0.047", lead, "up")
    over_chance = "more than noise, 95% +0.100 to +0.140, p < 0.001 after correction (guessing gets 0.167)"
    assert figures["Over chance"] == ("+0.120", over_chance, "up")


def test_a_lead_of_the_earlier_milestone_turns_the_paired_difference_around(first_card, last_card):
    (found,) = (d for d in last_card.against if d.against == "t0250K")
    worse = found.model_copy(update={"delta": -0.05, "ci_low": -0.09, "ci_high": -0.01})
    cards = (_with_average(first_card, 0.30), _with_average(last_card, 0.25, against=(worse,)))
    assert _figures(_headline(*cards))["Lead over 1M"][:2] == (
        "+0.050",
        "more than noise, 95% +0.010 to +0.090, p = 0.004 after correction (paired over the same items)",
    )


def test_without_a_paired_difference_the_headline_says_so(first_card, last_card):
    found = _headline(_with_average(first_card, 0.30), _with_average(last_card, 0.29, against=()))
    assert found.main.endswith("0.010 ahead of 1M, which is within noise.")
    assert _figures(found)["Lead over 1M"][1:] == (
        "within noise, 95% −0.018 to +0.038 (errors taken as independent)",
        "",
    )
    unknown = _headline(_with_average(first_card, 0.30, None), _with_average(last_card, 0.29, None, against=()))
    assert "how much of it is noise is not known" in unknown.main


def test_a_model_at_or_below_chance_is_called_that(first_card):
    assert "not distinguishable from chance" in _headline(_with_average(first_card, 0.18)).main
    assert "below chance" in _headline(_with_average(first_card, 0.10)).main


def test_headline_compares_with_the_best_baseline_of_each_kind(cards, last_card, baseline, published):
    whole = published.model_copy(update={"average_tasks": last_card.averages[0].tasks, "average": 0.35})
    figures = _figures(_headline(*cards, baselines=[baseline], quoted=[whole]))
    value, detail, sign = figures["Against the best baseline"]
    assert (value, sign) == ("−0.020", "") and detail.startswith("tiny_lm 0.310: within noise, 95% −0.060 to +0.020")
    value, detail, sign = figures["Against the best published score"]
    assert (value, sign) == ("−0.06", "") and "not tested" in detail


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


def test_names_at_the_ends_of_lines_never_overlap_and_move_least():
    assert _apart([0.1, 0.5], 0.1) == [0.1, 0.5]
    assert _apart([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    crowded = _apart([0.5, 0.51, 0.52, 0.6], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(crowded, crowded[1:]))


def test_baselines_are_named_in_the_chart(html):
    (chart,) = re.findall(r'<svg[^>]*aria-label="Average accuracy.*?</svg>', html, re.DOTALL)
    assert "tiny_lm 0.310 (re-run)" in chart and "chance 0.167" in chart


def test_a_chart_of_a_long_run_stays_small_and_keeps_its_spike():
    records = [{"tokens": 1000 * i, "loss": 90.0 if i == 50_000 else 3.0} for i in range(1, 100_001)]
    svg = loss_chart(records, [])
    assert len(svg) < 200_000
    assert ">80<" in svg  # the axis reaches the spike


@pytest.mark.parametrize("count", [1, 2, 11, 600_000])
def test_a_small_picture_fits_where_dagster_shows_it_at_once(count):
    values = [1e-9 + 9e9 * (i % 2) for i in range(count)]
    curve = series([{"tokens": 1_600_000_000_000 * i // count, "loss": v} for i, v in enumerate(values, 1)], "loss")
    assert "data:image/svg" in small_picture("loss against tokens", curve)
    assert len(small_picture("loss against tokens, that of held-out text as dots", curve, curve)) < 1000


def test_there_is_no_small_picture_of_nothing():
    none = series([{"tokens": 1, "loss": float("nan")}], "loss")
    assert small_picture("loss", none, none) is None
