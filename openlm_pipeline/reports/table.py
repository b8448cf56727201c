"""The scores table: milestones and baselines against tasks and averages, and its Markdown, CSV and Parquet forms.

A cell without a value says why. Nothing is computed here that a scorecard or a publication does not state.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from openlm_pipeline.evaluation.comparison import Difference
from openlm_pipeline.evaluation.items import column
from openlm_pipeline.evaluation.scores import TaskScore
from openlm_pipeline.storage.files import atomic_writer

Status = Literal["scored", "failed", "not run", "stale", "n/a"]
RowKind = Literal["milestone", "re-run", "quoted"]
ColumnKind = Literal["average", "accuracy", "centred", "category", "bits_per_byte", "loss"]

_NARROW = 9
"""Columns that stand comfortably beside each other on a page."""
NOT_RUN: Status = "not run"
STALE: Status = "stale"
"""Scored, but by another suite, precision or harness, or of other weights."""
NOT_APPLICABLE: Status = "n/a"
"""Not published, or nothing that a model of others has."""


@dataclass(frozen=True)
class Cell:
    """One measurement of one model."""

    status: Status
    value: float | None = None
    low: float | None = None
    """Lower end of the 95% interval; None where the measurement has none."""
    high: float | None = None
    mde: float | None = None
    """Smallest difference found with 80% power between two models that err independently."""
    score: TaskScore | None = None
    """What else is known of a task."""
    change: Difference | None = None
    """Since the milestone in the row above."""
    likelihood: Difference | None = None
    """The same of a task's bits per byte, where `value` is its accuracy."""
    decimals: int = 3

    @property
    def mark(self) -> str:
        """▲ better or ▼ worse, where the paired test against the milestone before is significant after correction; △ or
        ▽ where accuracy can't tell and likelihood can."""
        for difference, better, worse in ((self.change, "▲", "▼"), (self.likelihood, "△", "▽")):
            if difference is not None and difference.better is not None:
                return better if difference.better else worse
        return ""

    @property
    def mark_note(self) -> str:
        """What the mark rests on, in words."""
        hollow = self.mark in ("△", "▽")
        found = self.likelihood if hollow else self.change
        of = " bits per byte" if found.kind == "bits_per_byte" else ""
        said = f"{signed(found.delta)}{of} since the milestone before, p = {found.p_holm:.2g}"
        likelier = "more" if self.mark == "△" else "less"
        return f"accuracy can't tell; the right answers became {likelier} likely: {said}" if hollow else said

    @property
    def number(self) -> str:
        """`0.413`, or the status where there is no value."""
        return self.status if self.value is None else f"{self.value:.{self.decimals}f}".replace("-", "−")

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
    """`copa/0-shot`, `average/openlm_11`, `validation_loss`."""
    title: str
    kind: ColumnKind
    chance: float | None = None
    """What guessing gets."""
    num_items: int | None = None
    num_fewshot: int | None = None
    small: bool = False
    """On so few items that most of what moves it is noise."""
    rule: str | None = None
    """When an item of a task is right: a name in `RULES`."""
    majority: float | None = None
    """What always choosing the commonest right option gets."""
    num_clusters: int | None = None
    """Of items that go together, where they are fewer than the items."""

    @property
    def heading(self) -> str:
        """`copa 0-shot`; a small task has an asterisk."""
        shots = "" if self.num_fewshot is None else f" {self.num_fewshot}-shot"
        return f"{self.title}{shots}{'*' if self.small else ''}"


@dataclass(frozen=True)
class Row:
    """One model; `cells` are in the order of the table's columns."""

    label: str
    """A milestone's label, or a baseline's name."""
    title: str
    kind: RowKind
    cells: tuple[Cell, ...]
    tokens: int | None = None
    """A milestone's own number: training stops at the first full step that reaches it. None where not known."""
    step: int | None = None
    """None for what was not scored, and for baselines."""
    source: str | None = None
    """Who published a quoted row, and scored with what."""

    @property
    def heading(self) -> str:
        """`250B`, `pythia_1b (re-run)`."""
        return self.title if self.kind == "milestone" else f"{self.title} ({self.kind})"


@dataclass(frozen=True)
class Table:
    """Models against measurements, for one run and one suite: its milestones in order of tokens, then baselines."""

    run: str
    run_version: str
    columns: tuple[Column, ...]
    """The headline average, the tasks, the other summaries, the held-out loss."""
    rows: tuple[Row, ...]
    claims: Mapping[str, float] = field(default_factory=dict)
    """p-values of what is claimed of the best milestone (`reports.claims`), corrected over the page."""
    likelihoods: "Table | None" = None
    """Bits per byte of the right answers, their average first; lower is better."""

    @property
    def headline(self) -> Column:
        return self.columns[0]

    @property
    def milestones(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind == "milestone")

    @property
    def baselines(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind != "milestone")

    def cell(self, row: Row, key: str) -> Cell:
        return row.cells[[c.key for c in self.columns].index(key)]

    def task_columns(self) -> list[Column]:
        return [c for c in self.columns if c.kind == "accuracy"]

    @property
    def better(self) -> int:
        """1 where a larger headline average is better, -1 where a smaller one is."""
        return -1 if self.headline.kind == "bits_per_byte" else 1

    def best(self) -> Row | None:
        """The milestone with the best headline average, the earlier of equals; None if none has one."""
        scored = [row for row in self.milestones if row.cells[0].value is not None]
        return max(scored, key=lambda row: self.better * row.cells[0].value, default=None)

    def split(self) -> "tuple[Table, Table | None]":
        """The table in two that fit a page, where it has many columns: the headline with the tasks, and the rest."""
        if len(self.columns) <= _NARROW:
            return self, None
        kept = [i for i, c in enumerate(self.columns) if i == 0 or c.kind in ("accuracy", "bits_per_byte")]
        rest = [i for i in range(len(self.columns)) if i not in kept]
        others = self.only(rest)
        shown = tuple(row for row in others.rows if any(cell.value is not None for cell in row.cells))
        return self.only(kept), replace(others, rows=shown)

    def only(self, columns: Sequence[int]) -> "Table":
        """Some of the columns, by their numbers."""
        rows = tuple(replace(row, cells=tuple(row.cells[i] for i in columns)) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in columns), rows=rows)

    def footer(self) -> list[tuple[str, list[str]]]:
        """What belongs to a column as a whole; what is detectable is that of its last scored milestone."""

        def number(value: float | None) -> str:
            return "–" if value is None else f"{value:.3f}"

        cells = [[row.cells[i] for row in reversed(self.milestones)] for i in range(len(self.columns))]
        paired = [next((c.change.mde for c in of if c.change and c.change.mde is not None), None) for of in cells]
        alone = [next((c.mde for c in of if c.mde is not None), None) for of in cells]
        common = [
            c.majority if None not in (c.majority, c.chance) and c.majority > c.chance else None for c in self.columns
        ]
        rows = [
            ("rule", [c.rule or "–" for c in self.columns]),
            ("chance", [number(c.chance) for c in self.columns]),
            ("majority", [number(value) for value in common]),
            ("items", ["–" if c.num_items is None else str(c.num_items) for c in self.columns]),
            ("detectable change", [number(p) for p in paired]),
            ("detectable", [number(m if p is None else None) for p, m in zip(paired, alone)]),
        ]
        return [(name, values) for name, values in rows if any(v != "–" for v in values)]

    def to_markdown(self) -> str:
        """A GitHub table; its last rows are the `footer`. The best milestone's headline average is bold."""
        best = self.best()
        lines = [_md_row(["model", *(c.heading for c in self.columns)])]
        lines.append("| --- |" + " ---: |" * len(self.columns))
        for row in self.rows:
            cells = [escape_markdown(text) for text in (row.heading, *(c.text for c in row.cells))]
            if row is best:
                cells[1] = f"**{cells[1]}**"
            lines.append("| " + " | ".join(cells) + " |")
        lines += [_md_row([f"*{name}*", *values]) for name, values in self.footer()]
        return "\n".join(lines) + "\n"

    def to_arrow(self) -> pa.Table:
        """The tidy form, one row per cell: the content of the CSV and of the Parquet file."""
        averages = {column.key for column in self.columns if column.kind != "accuracy"}
        records = [
            {
                "run": self.run,
                "run_version": self.run_version,
                "model": row.label,
                "kind": row.kind,
                "tokens": row.tokens,
                "step": row.step,
                "source": row.source,
                "measure": column.key,
                "measure_kind": column.kind,
                "num_fewshot": column.num_fewshot,
                "num_items": column.num_items,
                "chance": column.chance,
                "status": cell.status,
                "value": cell.value,
                "ci95_low": cell.low,
                "ci95_high": cell.high,
                "mde": cell.mde,
                **_change(cell.change),
                "rule": column.rule,
                "majority": column.majority,
                "num_clusters": column.num_clusters,
                **{name: getattr(cell.score, name, None) for name in _OTHER_ACCURACIES},
            }
            for table in (self, self.likelihoods)
            if table
            for row in table.rows
            for column, cell in zip(table.columns, row.cells)
            if table is self or column.key not in averages
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


def _change(change: Difference | None) -> dict[str, float | bool | None]:
    if change is None or change.delta is None:
        return {}
    return {
        "change": change.delta,
        "change_ci95_low": change.ci_low,
        "change_ci95_high": change.ci_high,
        "change_p_holm": change.p_holm,
        "change_significant": change.significant,
        "mde_paired": change.mde,
    }


_OTHER_ACCURACIES = ("accuracy_micro", "accuracy_sum", "accuracy_norm", "accuracy_exact")
_SCHEMA = pa.schema(
    [
        column("run", pa.string(), "Name of the run of the report."),
        column("run_version", pa.string(), "Its version."),
        column("model", pa.string(), "Milestone or baseline."),
        column("kind", pa.string(), "What the row is of: a milestone, a re-run or a quoted baseline."),
        column("tokens", pa.int64(), "Trained on."),
        column("step", pa.int64(), "Optimizer step."),
        column("source", pa.string(), "Where a quoted number stands."),
        column("measure", pa.string(), "Task, category, average or loss."),
        column("measure_kind", pa.string(), "What the measure is."),
        column("num_fewshot", pa.int32(), "Solved rows before a question."),
        column("num_items", pa.int64(), "Items scored."),
        column("chance", pa.float64(), "What guessing gets."),
        column("status", pa.string(), "Whether it was scored."),
        column("value", pa.float64(), "The measure's value."),
        column("ci95_low", pa.float64(), "Lower end of its 95% interval."),
        column("ci95_high", pa.float64(), "Upper end."),
        column("accuracy_micro", pa.float64(), "Over all items together, where a task has categories."),
        column("mde", pa.float64(), "Smallest difference found with 80% power between independent models."),
        column("change", pa.float64(), "Since the milestone before."),
        column("change_ci95_low", pa.float64(), "Lower end of the change's paired 95% interval."),
        column("change_ci95_high", pa.float64(), "Upper end."),
        column("change_p_holm", pa.float64(), "Its p-value, corrected (Holm)."),
        column("change_significant", pa.bool_(), "The p-value is below 0.05."),
        column("rule", pa.string(), "By which an option is picked."),
        column("accuracy_sum", pa.float64(), "By total log-probability: acc of lm-evaluation-harness."),
        column("accuracy_norm", pa.float64(), "By log-probability per character: its acc_norm."),
        column("accuracy_exact", pa.float64(), "In generation: share of texts that are an answer."),
        column("majority", pa.float64(), "Accuracy of always choosing the option that is right most often."),
        column("num_clusters", pa.int64(), "Of items that go together."),
        column("mde_paired", pa.float64(), "Smallest change that the paired test finds with 80% power."),
    ]
)


def signed(value: float, decimals: int = 3) -> str:
    """`+0.031`, with a true minus sign."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def escape_markdown(text: str) -> str:
    """Text that stays inside its table cell or paragraph and carries no HTML."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("[", "\\[")


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape_markdown(c) for c in cells) + " |"
