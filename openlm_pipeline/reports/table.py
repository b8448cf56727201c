"""The milestones table: one object made from scorecards, and its Markdown, CSV and Parquet forms.

Rows are milestones in order of tokens; columns are the suite's tasks, the average, the centred average and the
validation loss. A cell without a value says why. Nothing is computed here that a scorecard does not state, but for a
task with categories: its cell is the mean of its categories, as in the average.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.scorecard import Scorecard, TaskScore
from openlm_pipeline.evaluation.statistics import mean_interval
from openlm_pipeline.evaluation.suite import task_name
from openlm_pipeline.files import atomic_writer
from openlm_pipeline.units import format_tokens, milestone_label

Status = Literal["scored", "failed", "not run"]
Mark = Literal["▲", "▼", ""]

AVERAGE, CENTRED, LOSS = "average", "centred_average", "validation_loss"
NOT_RUN: Status = "not run"


@dataclass(frozen=True)
class Cell:
    """One measurement of one milestone."""

    status: Status
    value: float | None = None
    low: float | None = None
    """Lower end of the 95% interval; None where the measurement has none."""
    high: float | None = None
    mark: Mark = ""
    """▲ or ▼ only where the paired test against the milestone before is significant after correction."""
    mde: float | None = None
    """Smallest difference found with 80% power between two models that err independently."""

    @property
    def number(self) -> str:
        """`0.413`, or the status where there is no value."""
        return self.status if self.value is None else f"{self.value:.3f}".replace("-", "−")

    @property
    def half_width(self) -> str:
        """`±0.050`: the longer side of the interval, so that it never understates; empty without an interval."""
        if self.value is None or self.low is None or self.high is None:
            return ""
        return f"±{max(self.high - self.value, self.value - self.low):.3f}"

    @property
    def text(self) -> str:
        """`0.413 ±0.050 ▲`."""
        return " ".join(part for part in (self.number, self.half_width, self.mark) if part)


@dataclass(frozen=True)
class Column:
    """What is measured."""

    key: str
    title: str
    kind: Literal["accuracy", "average", "centred", "loss"]
    chance: float | None = None
    """Accuracy of guessing."""
    num_items: int | None = None
    num_fewshot: int | None = None

    @property
    def heading(self) -> str:
        """`copa 0-shot`."""
        return self.title if self.num_fewshot is None else f"{self.title} {self.num_fewshot}-shot"


@dataclass(frozen=True)
class Row:
    """One milestone; `cells` are in the order of the table's columns. `tokens` is the milestone's own number: training
    stops at the first full step that reaches it."""

    label: str
    tokens: int
    step: int | None
    """None for a milestone that was not scored."""
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Milestones against measurements, for one run and one suite."""

    run: str
    run_version: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def cell(self, row: Row, key: str) -> Cell:
        return row.cells[[c.key for c in self.columns].index(key)]

    def task_columns(self) -> list[Column]:
        return [c for c in self.columns if c.kind == "accuracy"]

    def best(self) -> Row | None:
        """The milestone with the highest average, the earlier of equals; None if none has one."""
        scored = [row for row in self.rows if self.cell(row, AVERAGE).value is not None]
        return max(scored, key=lambda row: self.cell(row, AVERAGE).value, default=None)

    def footer(self) -> list[tuple[str, list[str]]]:
        """What belongs to a column as a whole: chance, items and the detectable change of its last scored milestone."""
        mde = [next((c.mde for c in reversed(cells) if c.mde is not None), None) for cells in self._by_column()]
        rows = [
            ("chance", ["–" if c.chance is None else f"{c.chance:.3f}" for c in self.columns]),
            ("items", ["–" if c.num_items is None else str(c.num_items) for c in self.columns]),
            ("detectable", ["–" if m is None else f"{m:.3f}" for m in mde]),
        ]
        return [(name, values) for name, values in rows if any(v != "–" for v in values)]

    def _by_column(self) -> list[list[Cell]]:
        return [[row.cells[i] for row in self.rows] for i in range(len(self.columns))]

    def to_markdown(self) -> str:
        """A GitHub table; its last rows are the `footer`."""
        lines = [_md_row(["tokens", *(c.heading for c in self.columns)])]
        lines.append(_md_row(["---:"] * (len(self.columns) + 1), escape=False))
        lines += [_md_row([format_tokens(r.tokens), *(c.text for c in r.cells)]) for r in self.rows]
        lines += [_md_row([f"*{name}*", *values]) for name, values in self.footer()]
        return "\n".join(lines) + "\n"

    def to_arrow(self) -> pa.Table:
        """The tidy form, one row a cell: the content of the CSV and of the Parquet file."""
        records = [
            {
                "run": self.run,
                "run_version": self.run_version,
                "milestone": row.label,
                "tokens": row.tokens,
                "step": row.step,
                "measure": column.key,
                "kind": column.kind,
                "num_fewshot": column.num_fewshot,
                "num_items": column.num_items,
                "chance": column.chance,
                "status": cell.status,
                "value": cell.value,
                "ci95_low": cell.low,
                "ci95_high": cell.high,
                "mde": cell.mde,
                "change": {"▲": "up", "▼": "down", "": "none"}[cell.mark],
            }
            for row in self.rows
            for column, cell in zip(self.columns, row.cells)
        ]
        return pa.Table.from_pylist(records, schema=_SCHEMA)

    def to_csv(self) -> str:
        """The tidy form; a number that does not exist is empty and `status` says why."""
        out = io.StringIO()
        writer = csv.DictWriter(out, _SCHEMA.names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.to_arrow().to_pylist())
        return out.getvalue()

    def write_parquet(self, path: Path) -> None:
        with atomic_writer(path) as f:
            pq.write_table(self.to_arrow(), f)


def milestones_table(
    run: str, run_version: str, scorecards: Sequence[Scorecard], milestones: Sequence[int] = ()
) -> Table:
    """The table of one run's scorecards; a milestone (in tokens) without a scorecard is a row of `not run`.

    Raises:
        DataError: a scorecard of another run, two of one milestone, or scorecards that cannot be compared because
            their suite or harness version differs.
    """
    nominal = {milestone_label(tokens): tokens for tokens in milestones}
    cards = {card.milestone: card for card in sorted(scorecards, key=lambda card: card.tokens)}
    if len(cards) < len(scorecards):
        raise DataError(f"two scorecards are of the same milestone of {run}; give one for each")
    for card in cards.values():
        if (card.run, card.run_version) != (run, run_version):
            raise DataError(f"a scorecard of {card.run} {card.run_version} was given for {run} {run_version}")
        _check_comparable(card, next(reversed(cards.values())))
    columns = _columns(list(cards.values()))
    rows, before = [], None
    for label, card in cards.items():
        cells = tuple(_cell(card, column, before) for column in columns)
        rows.append(Row(label, nominal.get(label, card.tokens), card.step, cells))
        before = label
    rows += [
        Row(label, tokens, None, tuple(Cell(NOT_RUN) for _ in columns))
        for label, tokens in nominal.items()
        if label not in cards
    ]
    return Table(run, run_version, columns, tuple(sorted(rows, key=lambda row: row.tokens)))


def _check_comparable(card: Scorecard, last: Scorecard) -> None:
    def instrument(c: Scorecard) -> dict[str, str]:
        files = {f"the file of {t.name}": t.task_file_sha256 for t in c.tasks if t.task_file_sha256}
        return {k: getattr(c, k) for k in ("suite", "suite_version", "suite_digest", "harness_version")} | files

    mine, other = instrument(card), instrument(last)
    for what in mine.keys() & other.keys():
        if mine[what] != other[what]:
            raise DataError(
                f"the scorecards {card.milestone} and {last.milestone} of {card.run} differ in {what} ({mine[what]}, "
                f"{other[what]}), so their scores cannot be compared; score both again"
            )


def _parts(card: Scorecard, key: str) -> list[TaskScore]:
    """The scores of one task: several where it has categories."""
    return [t for t in card.tasks if task_name(t.task, t.num_fewshot) == key]


def _columns(cards: Sequence[Scorecard]) -> tuple[Column, ...]:
    """The tasks in the suite's order, then the three summaries."""
    columns = []
    for key in dict.fromkeys(task_name(t.task, t.num_fewshot) for card in cards for t in card.tasks):
        of_cards = [parts for card in cards if (parts := _parts(card, key))]
        parts = next((p for p in reversed(of_cards) if p[0].status == "scored"), of_cards[-1])
        chances = [t.chance for t in parts if t.chance is not None]
        columns.append(
            Column(
                key=key,
                title=parts[0].task,
                kind="accuracy",
                chance=math.fsum(chances) / len(chances) if chances else None,
                num_items=sum(t.num_items for t in parts) or None,
                num_fewshot=parts[0].num_fewshot,
            )
        )
    chances = [c.chance for c in columns]
    known = bool(chances) and None not in chances
    return (
        *columns,
        Column(AVERAGE, "average", "average", chance=math.fsum(chances) / len(chances) if known else None),
        Column(CENTRED, "centred average", "centred", chance=0.0 if known else None),
        Column(LOSS, "held-out loss", "loss"),
    )


def _cell(card: Scorecard, column: Column, before: str | None) -> Cell:
    if column.kind == "loss":
        return Cell(NOT_RUN) if card.validation_loss is None else Cell("scored", card.validation_loss)
    if column.kind != "accuracy":
        if card.average is None or card.centred_average is None:
            return Cell("failed" if any(t.status == "failed" for t in card.tasks) else NOT_RUN)
        if column.kind == "centred":
            return Cell("scored", card.centred_average)
        return Cell("scored", card.average, card.average_ci_low, card.average_ci_high)
    parts = _parts(card, column.key)
    if not parts:
        return Cell(NOT_RUN)
    if problem := next((t.status for t in parts if t.status != "scored"), None):
        return Cell(problem)
    changes = [c for c in card.changes if task_name(c.task, c.num_fewshot) == column.key]
    mark: Mark = ""
    for change in changes:
        if change.significant and change.delta and change.previous_milestone == before:
            mark = "▲" if change.delta > 0 else "▼"
    if len(parts) == 1:
        (only,) = parts
        return Cell("scored", only.accuracy, only.ci_low, only.ci_high, mark, only.mde)
    errors = [math.nan if t.standard_error is None else t.standard_error for t in parts]
    mean, low, high = mean_interval([t.accuracy for t in parts], errors)
    return Cell("scored", mean, *((None, None) if math.isnan(low) else (low, high)), mark)


_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("run_version", pa.string()),
        ("milestone", pa.string()),
        ("tokens", pa.int64()),
        ("step", pa.int64()),
        ("measure", pa.string()),
        ("kind", pa.string()),
        ("num_fewshot", pa.int32()),
        ("num_items", pa.int64()),
        ("chance", pa.float64()),
        ("status", pa.string()),
        ("value", pa.float64()),
        ("ci95_low", pa.float64()),
        ("ci95_high", pa.float64()),
        ("mde", pa.float64()),
        ("change", pa.string()),
    ]
)


def escape_markdown(text: str) -> str:
    """Text that stays inside its table cell or paragraph and carries no HTML."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("[", "\\[")


def _md_row(cells: Sequence[str], escape: bool = True) -> str:
    return "| " + " | ".join(escape_markdown(c) if escape else c for c in cells) + " |"
