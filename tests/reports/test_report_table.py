"""The milestones table: what a cell says, and that Markdown, CSV and Parquet say the same."""

import csv
import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from openlm_pipeline.errors import DataError
from openlm_pipeline.reports import Table, milestones_table
from openlm_pipeline.reports.table import AVERAGE

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def table(cards, experiment) -> Table:
    return milestones_table("demo", "v1", cards, experiment.milestones)


def test_markdown_is_the_golden_file(table):
    assert table.to_markdown() == (GOLDEN / "table.md").read_text()


def test_csv_is_the_golden_file(table):
    assert table.to_csv() == (GOLDEN / "table.csv").read_text()


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
    assert table.cell(row, AVERAGE).text == "failed"


def test_marks_stand_only_at_significant_changes(table):
    marks = {(row.label, c.key): cell.mark for row in table.rows for c, cell in zip(table.columns, row.cells)}
    assert {k: m for k, m in marks.items() if m} == {
        ("t0500K", "choice/0-shot"): "▲",
        ("t0001M", "cloze/0-shot"): "▼",
    }


def test_a_change_against_another_milestone_than_the_one_above_is_not_marked(first_card, last_card, experiment):
    table = milestones_table("demo", "v1", [first_card, last_card], experiment.milestones)
    assert not any(cell.mark for row in table.rows for cell in row.cells)


def test_the_interval_is_never_understated(table):
    assert table.cell(table.rows[0], "choice/0-shot").text == "0.310 ±0.050"  # 0.05 below, 0.04 above


def test_categories_of_a_task_are_one_cell_their_mean(first_card):
    part = first_card.tasks[0]
    parts = [
        part.model_copy(update={"category": name, "accuracy": accuracy})
        for name, accuracy in (("law", 0.2), ("maths", 0.4))
    ]
    table = milestones_table("demo", "v1", [first_card.model_copy(update={"tasks": tuple(parts)})])
    assert [c.key for c in table.task_columns()] == ["choice/0-shot"]
    cell = table.rows[0].cells[0]
    assert cell.value == pytest.approx(0.3)
    assert (cell.high - cell.low) / 2 == pytest.approx(0.05 / 2**0.5, rel=1e-3)  # two equal errors in quadrature
    assert table.columns[0].num_items == 800


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"suite_digest": "6" * 64}, "suite_digest"),
        ({"harness_version": "2"}, "harness_version"),
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
