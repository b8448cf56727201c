"""Published scores as their source lays them out: tasks as rows, models as columns, empty where not published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.evaluation.baselines import QuotedBaseline, quoted_baselines
from openlm_pipeline.reports.table import Row, Table, escape_markdown
from openlm_pipeline.units import format_tokens

OPENLM_TABLES = {
    "openlm_1b": ("openlm_1b", "opt_1_3b", "pythia_1b", "neox_1_3b", "opt_iml_1_3b"),
    "openlm_7b": ("openlm_7b", "OpenLM-7B 1.5T", "OpenLM-7B 1.6T", "llama_7b", "mpt_7b"),
}
"""The tables of OpenLM's README: quoted baselines, and titles of columns that are empty there."""
_EMPTY_ROW, _BEFORE = "triviaqa/0-shot", "winogrande/0-shot"


@dataclass(frozen=True)
class _Column:
    title: str
    scores: Mapping[str, float]
    average: float | None = None
    note: str | None = None


def quoted_table(rows: Sequence[QuotedBaseline]) -> str:
    """Published rows as a GitHub table, with their sources."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.scores))
    return _markdown(list(map(_published, rows)), [*tasks, None], rows)


def openlm_table(name: str, run: Table | None = None) -> str:
    """A table of OpenLM's README, its empty row and columns too.

    Args:
        run: the scores of a run, whose milestones and own baselines come first.

    Raises:
        ConfigError: there is no table of this name.
    """
    if name not in OPENLM_TABLES:
        raise ConfigError(f"OpenLM's README has no table {name!r}; there are: {', '.join(OPENLM_TABLES)}")
    quoted = quoted_baselines([n for n in OPENLM_TABLES[name] if " " not in n])
    families: dict[str, list[_Column]] = {n: [_Column(n, {})] for n in OPENLM_TABLES[name] if " " in n}
    for row in quoted:
        families.setdefault(row.family, []).append(_published(row))
    columns = [c for n in OPENLM_TABLES[name] for c in families[n]]
    tasks: list[str | None] = list(quoted[0].average_tasks)
    tasks.insert(tasks.index(_BEFORE), _EMPTY_ROW)
    beside = dict.fromkeys(task for row in quoted for task in row.scores if task not in tasks)
    own = [_scored(run, row, quoted[0].average_tasks) for row in run.rows if row.kind != "quoted"] if run else []
    return _markdown([*own, *columns], [*tasks, None, *beside], quoted)


def _published(row: QuotedBaseline) -> _Column:
    title = f"{row.title} {format_tokens(row.tokens)}" if row.tokens else row.title
    return _Column(title, row.scores, row.average, row.note)


def _scored(table: Table, row: Row, tasks: Sequence[str]) -> _Column:
    scores = {c.key: cell.value for c, cell in zip(table.columns, row.cells) if cell.value is not None}
    average = sum(scores[t] for t in tasks) / len(tasks) if set(tasks) <= scores.keys() else None
    return _Column(f"{table.run} {row.title}" if row.kind == "milestone" else row.title, scores, average)


def _markdown(columns: Sequence[_Column], tasks: Sequence[str | None], quoted: Sequence[QuotedBaseline]) -> str:
    """Rows in the order of `tasks`, in which None is the average."""

    def cell(column: _Column, task: str | None) -> str:
        value = column.average if task is None else column.scores.get(task)
        return "" if value is None else f"{value:.2f}" + ("*" if task is None and column.note else "")

    lines = [["task", *(escape_markdown(c.title) for c in columns)], ["---", *["---:"] * len(columns)]]
    lines += [[task or "average", *(cell(c, task) for c in columns)] for task in tasks]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = [f"\\* {c.title}: {c.note}." for c in columns if c.note]
    sources = dict.fromkeys(f"Quoted from {row.source}; {row.harness}." for row in quoted)
    return "\n\n".join([table, *notes, *sources])
