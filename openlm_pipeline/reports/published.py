"""Published scores as their source lays them out: tasks as rows, models as columns, empty where not published."""

import math
from collections.abc import Mapping, Sequence

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.evaluation.baselines import QuotedBaseline, quoted_baselines
from openlm_pipeline.reports.table import Table, escape_markdown
from openlm_pipeline.units import format_tokens

OPENLM_TABLES = {
    "openlm_1b": ("openlm_1b", "opt_1_3b", "pythia_1b", "neox_1_3b", "opt_iml_1_3b"),
    "openlm_7b": ("openlm_7b", "OpenLM-7B 1.5T", "OpenLM-7B 1.6T", "llama_7b", "mpt_7b"),
}
"""The tables of OpenLM's README: quoted baselines, and titles of columns that are empty there."""
_EMPTY_ROW, _BEFORE = "triviaqa/0-shot", "winogrande/0-shot"
_AVERAGE = "average"
Column = tuple[str, Mapping[str, float]]
"""A model's title, and its scores by task, with its average under `average`."""


def quoted_table(rows: Sequence[QuotedBaseline]) -> str:
    """Published rows as a GitHub table, with their sources."""
    tasks = dict.fromkeys(task for row in rows for task in row.scores)
    return _markdown(list(map(_published, rows)), [*tasks, _AVERAGE], rows)


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
    averaged = quoted[0].average_tasks
    columns: list[Column] = []
    for row in run.rows if run else ():
        scores = {c.key: cell.value for c, cell in zip(run.columns, row.cells) if cell.value is not None}
        if set(averaged) <= scores.keys():
            scores[_AVERAGE] = math.fsum(scores[task] for task in averaged) / len(averaged)
        if row.kind != "quoted":
            columns.append((f"{run.run} {row.title}" if row.kind == "milestone" else row.title, scores))
    for family in OPENLM_TABLES[name]:
        columns += [_published(row) for row in quoted if row.family == family] or [(family, {})]
    at = averaged.index(_BEFORE)
    tasks = [*averaged[:at], _EMPTY_ROW, *averaged[at:], _AVERAGE]
    beside = dict.fromkeys(task for row in quoted for task in row.scores if task not in tasks)
    return _markdown(columns, [*tasks, *beside], quoted)


def _published(row: QuotedBaseline) -> Column:
    title = f"{row.title} {format_tokens(row.tokens)}" if row.tokens else row.title
    return title, {**row.scores, _AVERAGE: row.average}


def _markdown(columns: Sequence[Column], tasks: Sequence[str], quoted: Sequence[QuotedBaseline]) -> str:
    noted = {_published(row)[0]: row.note for row in quoted if row.note}
    lines = [["task", *(escape_markdown(title) for title, _ in columns)], ["---", *["---:"] * len(columns)]]
    for task in tasks:
        marks = ["*" if task == _AVERAGE and title in noted else "" for title, _ in columns]
        cells = [f"{scores[task]:.2f}{mark}" if task in scores else "" for (_, scores), mark in zip(columns, marks)]
        lines.append([task, *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = [f"\\* {title}: {note}." for title, note in noted.items()]
    sources = dict.fromkeys(f"Quoted from {row.source}; {row.harness}." for row in quoted)
    return "\n\n".join([table, *notes, *sources])
