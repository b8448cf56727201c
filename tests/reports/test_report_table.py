"""The milestones table: what a cell says, and that Markdown, CSV and Parquet say the same."""

import csv
import io

import pyarrow.parquet as pq
import pytest

from openlm_pipeline.errors import DataError
from openlm_pipeline.reports import Table, milestones_table


@pytest.fixture
def table(cards, experiment, baseline, published) -> Table:
    return milestones_table("demo", "v1", cards, experiment.milestones, baselines=[baseline], quoted=[published])


def test_markdown_is_the_golden_file(table, golden):
    golden("table.md", table.to_markdown())


def test_csv_is_the_golden_file(table, golden):
    golden("table.csv", table.to_csv())


def test_parquet_holds_what_the_csv_holds(table, tmp_path):
    table.write_parquet(tmp_path / "table.parquet")
    stored = pq.read_table(tmp_path / "table.parquet").to_pylist()
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in stored] == read


def test_an_unscored_milestone_is_a_row_of_not_run(first_card, experiment):
    table = milestones_table("demo", "v1", [first_card], experiment.milestones)
    assert [row.tokens for row in table.rows] == [250_000, 500_000, 1_000_000]
    assert {cell.text for row in table.rows[1:] for cell in row.cells} == {"not run"}


def test_no_cell_is_ever_blank(table):
    assert all(cell.text for row in table.rows for cell in row.cells)


def test_a_failed_task_says_so_and_leaves_no_average(table):
    row = table.rows[1]
    assert table.cell(row, "harder/0-shot").text == "failed"
    assert table.cell(row, "average/all_tasks").text == "failed"


def test_marks_stand_only_at_significant_changes(table):
    marks = {(row.label, c.key): cell.mark for row in table.rows for c, cell in zip(table.columns, row.cells)}
    assert {k: m for k, m in marks.items() if m} == {
        ("t0500K", "choice/0-shot"): "▲",
        ("t0500K", "cloze/0-shot"): "△",  # its accuracy may be noise, its likelihood isn't
        ("t0001M", "choice/0-shot"): "▽",
        ("t0001M", "cloze/0-shot"): "▼",
    }
    likelihoods = [(row.label, c.key, row.cells[i].mark) for row in table.likelihoods.rows for i, c in bits(table)]
    assert [found for found in likelihoods if found[2]] == [
        ("t0500K", "cloze/0-shot", "▲"),  # fewer bits are better
        ("t0001M", "choice/0-shot", "▼"),
        ("t0001M", "cloze/0-shot", "▼"),
    ]


def bits(table):
    return list(enumerate(table.likelihoods.columns))


def test_likelihoods_stand_beside_accuracies_in_every_form(table):
    assert [c.title for c in table.columns[:3]] == ["average", "bits per byte", "choice"]
    assert [c.title for c in table.likelihoods.columns] == ["average", "choice", "cloze", "harder"]
    assert [row.label for row in table.likelihoods.rows] == ["t0250K", "t0500K", "t0001M", "tiny_lm"]
    assert table.likelihoods.best().label == "t0001M"  # the lowest
    tidy = {(r["model"], r["measure"], r["measure_kind"]): r for r in table.to_arrow().to_pylist()}
    assert len(tidy) == table.to_arrow().num_rows
    assert tidy["t0250K", "choice/0-shot", "bits_per_byte"]["value"] == 1.69
    known = tidy["t0500K", "choice/0-shot", "accuracy"]
    others = ("rule", "accuracy_sum", "accuracy_norm", "majority", "mde_paired")
    assert [known[name] for name in others] == ["mean", 0.39, pytest.approx(0.41), 0.2625, 0.06]


def test_the_footer_names_rules_and_says_which_change_could_be_seen(table):
    footer = {name: dict(zip((c.key for c in table.columns), values)) for name, values in table.footer()}
    assert footer["rule"]["choice/0-shot"] == "mean" and footer["rule"]["average/all_tasks"] == "–"
    assert footer["majority"]["choice/0-shot"] == "0.263" and footer["majority"]["cloze/0-shot"] == "–"
    assert footer["detectable change"]["choice/0-shot"] == "0.060"  # tested item by item
    assert footer["detectable"]["choice/0-shot"] == "–" and footer["detectable"]["harder/0-shot"] == "0.098"


def test_a_change_against_another_milestone_than_the_one_above_is_not_marked(first_card, last_card, experiment):
    table = milestones_table("demo", "v1", [first_card, last_card], experiment.milestones)
    assert not any(cell.mark for row in table.rows for cell in row.cells)


def test_the_interval_is_never_understated(table):
    assert table.cell(table.rows[0], "choice/0-shot").text == "0.310 ±0.050"  # 0.05 below, 0.04 above


def test_a_task_with_categories_is_one_cell_with_its_micro_accuracy_beside(first_card):
    whole = first_card.tasks[0].model_copy(update={"num_categories": 2, "accuracy_micro": 0.32})
    card = first_card.model_copy(update={"tasks": (whole, *first_card.tasks[1:])})
    table = milestones_table("demo", "v1", [card])
    (row, _) = (r for r in table.to_arrow().to_pylist() if r["measure"] == "choice/0-shot")
    assert (row["value"], row["accuracy_micro"]) == (0.31, 0.32)


def test_a_small_task_is_flagged(first_card):
    small = first_card.tasks[0].model_copy(update={"num_items": 100})
    table = milestones_table("demo", "v1", [first_card.model_copy(update={"tasks": (small, *first_card.tasks[1:])})])
    assert [c.heading for c in table.task_columns()] == ["choice 0-shot*", "cloze 0-shot", "harder 0-shot"]


def test_baselines_stand_below_and_are_told_apart(table, last_card):
    assert [(row.label, row.kind) for row in table.rows[3:]] == [("tiny_lm", "re-run"), ("paper_lm", "quoted")]
    rerun, quoted = table.rows[3:]
    assert table.cell(rerun, "choice/0-shot").text == "0.440 ±0.050"
    assert table.cell(quoted, "choice/0-shot").text == "0.50"  # two decimals, no interval
    assert table.cell(quoted, "harder/0-shot").text == "n/a"
    assert quoted.source.startswith("https://example.org/paper")


def test_bold_is_the_best_milestone_and_no_baseline(table):
    bold = [line for line in table.to_markdown().splitlines() if "**" in line]
    assert len(bold) == 1 and bold[0].startswith("| 1M | **0.290")  # though tiny_lm has 0.310
    assert table.best().label == "t0001M"


def test_a_published_average_stands_only_under_the_average_of_the_same_tasks(table, cards, published):
    quoted = table.rows[-1]
    assert table.cell(quoted, "average/all_tasks").text == "n/a"  # theirs is over two of the three tasks
    whole = published.model_copy(update={"average_tasks": cards[0].averages[0].tasks})
    again = milestones_table("demo", "v1", cards, quoted=[whole])
    assert again.cell(again.rows[-1], "average/all_tasks").text == "0.29"


def test_a_published_model_without_any_of_the_tasks_is_left_out(cards, published):
    other = published.model_copy(update={"scores": {"copa/0-shot": 0.7}, "average_tasks": ("copa/0-shot",)})
    assert not milestones_table("demo", "v1", cards, quoted=[other]).baselines


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"suite_digest": "6" * 64}, "suite_digest"),
        ({"harness_version": "2"}, "harness_version"),
        ({"random_baselines": "v2"}, "random_baselines"),
        ({"milestone": None, "tokens": None}, "no milestone"),
        ({"run": "other"}, "other"),
        ({"milestone": "t0250K"}, "same milestone"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(first_card, last_card, change, named):
    with pytest.raises(DataError, match=named):
        milestones_table("demo", "v1", [first_card, last_card.model_copy(update=change)])


def test_scores_on_another_task_file_are_refused(first_card, last_card):
    tasks = [last_card.tasks[0].model_copy(update={"task_file_sha256": "f" * 64}), *last_card.tasks[1:]]
    with pytest.raises(DataError, match="the file of choice/0-shot"):
        milestones_table("demo", "v1", [first_card, last_card.model_copy(update={"tasks": tuple(tasks)})])


def test_a_baseline_of_another_suite_is_refused(cards, baseline):
    with pytest.raises(DataError, match="suite_digest"):
        milestones_table("demo", "v1", cards, baselines=[baseline.model_copy(update={"suite_digest": "6" * 64})])
