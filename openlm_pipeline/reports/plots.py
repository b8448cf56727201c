"""The charts of a report, drawn from the milestones table and from the records of `metrics.jsonl`."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from openlm_pipeline.reports.curves import Curve, Records, series
from openlm_pipeline.reports.svg import ACCENT, INK, MUTED, RULE, SECOND, drawing_style, inline_svg
from openlm_pipeline.reports.table import Cell, Column, Row, Table
from openlm_pipeline.units import format_tokens

Curves = Mapping[str, Curve]
"""By model."""

_HELD_OUT = "validation_loss"
_WIDTH_INCHES = 9.6
_MAX_POINTS = 800


def loss_chart(records: Records, milestones: Sequence[int]) -> str | None:
    """Training loss against tokens with the validation losses; None without any loss.

    Many records are drawn as the mean and the range of equal runs of them, so that no spike is hidden.
    """
    tokens, loss = series(records, "loss")
    held_out = {k.partition("/")[2]: series(records, k) for r in records for k in r if k.startswith(f"{_HELD_OUT}/")}
    held_out = held_out or {"held-out text": series(records, _HELD_OUT)}
    held_out = {name: drawn for name, drawn in held_out.items() if len(drawn[0])}
    if not len(tokens) and not held_out:
        return None
    with drawing_style():
        figure = Figure(figsize=(_WIDTH_INCHES, 3.3), layout="constrained")
        ax = figure.subplots()
        ends = []
        if len(tokens):
            _line(ax, tokens, loss, INK)
            ends.append((loss[-1], f"training {loss[-1]:.2f}", INK))
        for (name, (val_tokens, val_loss)), marker in zip(held_out.items(), cycle("osD^v")):
            ax.plot(val_tokens, val_loss, marker + ":", color=ACCENT, linewidth=0.9, markersize=4.5, zorder=4)
            ends.append((val_loss[-1], f"{name} {val_loss[-1]:.2f}", ACCENT))
        for milestone in milestones:
            ax.axvline(milestone, ymax=0.035, color=INK, linewidth=1.4, zorder=1)
        ax.set_ylabel("loss, nats per token")
        _token_axis(ax)
        name_ends(ax, ends)
        ax.set_xlabel("training tokens; strokes on the axis are milestones" if milestones else "training tokens")
        return inline_svg(figure, "loss", "Training and held-out loss against training tokens")


def pace_chart(records: Records) -> str | None:
    """Learning rate and throughput against tokens, side by side; None without either."""
    panels = [
        ("lr", "learning rate", FuncFormatter(lambda y, _: f"{y:g}")),
        ("tokens_per_second", "throughput, tokens/s", FuncFormatter(lambda y, _: _short_count(y))),
        ("grad_norm", "gradient norm", None),
    ]
    drawn = [(*series(records, key), title, formatter) for key, title, formatter in panels]
    drawn = [panel for panel in drawn if len(panel[0])]
    if not drawn:
        return None
    with drawing_style():
        figure = Figure(figsize=(_WIDTH_INCHES, 1.9), layout="constrained")
        for ax, (tokens, values, title, formatter) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn):
            _line(ax, tokens, values, INK)
            ax.set_title(title)
            ax.set_ylim(0, ax.dataLim.y1 * 1.12 or 1.0)
            ax.yaxis.set_major_locator(_ticks(4))
            if formatter:
                ax.yaxis.set_major_formatter(formatter)
            _token_axis(ax, bins=4)
        figure.supxlabel("training tokens", fontsize=8.5, color=MUTED)
        return inline_svg(figure, "pace", ", ".join(title for _, _, title, _ in drawn) + " against training tokens")


def comparison_chart(panels: Sequence[tuple[str, Curves]]) -> str | None:
    """Two models' curves over each other against tokens, a panel for each measure that they have; None without any."""
    drawn = [(title, curves) for title, curves in panels if curves]
    if not drawn:
        return None
    with drawing_style():
        figure = Figure(figsize=(_WIDTH_INCHES, 2.9 * len(drawn)), layout="constrained")
        figure.get_layout_engine().set(hspace=0.06)
        names = list(dict.fromkeys(name for _, curves in drawn for name in curves))
        for ax, (title, curves) in zip(figure.subplots(len(drawn), squeeze=False).ravel(), drawn):
            ends = []
            for name, (tokens, values) in curves.items():
                colour = (ACCENT, SECOND)[names.index(name)]
                _line(ax, tokens, values, colour)
                if len(tokens) < 30:
                    ax.plot(tokens, values, "o", color=colour, markersize=4)
                ends.append((values[-1], f"{name} {values[-1]:.3f}", colour))
            ax.set_title(title)
            _token_axis(ax)
            name_ends(ax, ends)
        figure.supxlabel("training tokens", fontsize=8.5, color=MUTED)
        return inline_svg(figure, "comparison", ", ".join(title for title, _ in drawn) + " against training tokens")


def average_chart(table: Table) -> str | None:
    """The headline average against tokens on a log axis: 95% band, chance, baselines; None if no milestone has one.

    A baseline is a line across; published milestones of a run that lie near those of the table are points joined.
    """
    column = table.headline
    if not _points(table, column):
        return None
    with drawing_style():
        lines = _baseline_values(table, column)
        figure = Figure(figsize=(_WIDTH_INCHES, 3.1 + 0.08 * len(lines)), layout="constrained")
        ax = figure.subplots()
        _accuracy_panel(ax, table, column)
        ends = [] if column.chance is None else [(column.chance, f"chance {column.chance:.3f}", SECOND)]
        for family in _published_curves(table, column):
            xs, ys = zip(*((row.tokens, table.cell(row, column.key).value) for row in family))
            ax.plot(xs, ys, ":", marker=".", color=MUTED, linewidth=1.1)
            ends.append((ys[-1], f"{family[-1].title.rsplit(' ', 1)[0]} {ys[-1]:.2f} (quoted)", MUTED))
        across = [value for value, _, _ in ends[: column.chance is not None]] + [value for _, value in lines]
        ends += [(value, f"{row.title} {row.cells[0].number} ({row.kind})", MUTED) for row, value in lines]
        ax.margins(y=0.1)
        ax.autoscale_view(scalex=False)
        name_ends(ax, ends)
        labelled = _spaced([tokens for tokens, _ in _points(table, column)], 0.05)
        for tokens, cell in _points(table, column):
            if tokens in labelled:
                _label(ax, cell, tokens, [*across, *_published_at(table, column, tokens)])
        ax.set_ylabel(
            "average accuracy"
            if column.title == "average"
            else f"average accuracy, {column.title.removeprefix('average ')}"
        )
        ax.set_xlabel("training tokens, log scale; band: 95% interval")
        return inline_svg(figure, "average", "Average accuracy against training tokens, with 95% band and baselines")


def task_charts(table: Table) -> str | None:
    """One small panel a task, accuracy against tokens; None if no task was scored."""
    columns = [c for c in table.task_columns() if _points(table, c)]
    if not columns:
        return None
    titles = [c.title for c in columns]
    per_row = min(4, len(columns))
    rows = -(-len(columns) // per_row)
    with drawing_style():
        figure = Figure(figsize=(_WIDTH_INCHES, 1.75 * rows + 0.2), layout="constrained")
        figure.get_layout_engine().set(hspace=0.07, wspace=0.04)
        axes = figure.subplots(rows, per_row, squeeze=False).ravel()
        for ax, column in zip(axes, columns):
            _accuracy_panel(ax, table, column)
            ax.set_title(column.heading if titles.count(column.title) > 1 else column.title + "*" * column.small)
            ax.yaxis.set_major_locator(_ticks(4))
        for ax in axes[len(columns) :]:
            ax.set_axis_off()
        return inline_svg(figure, "tasks", "Accuracy against training tokens, one panel a task")


def _points(table: Table, column: Column) -> list[tuple[int, Any]]:
    cells = ((row.tokens, table.cell(row, column.key)) for row in table.milestones)
    return [(tokens, cell) for tokens, cell in cells if cell.value is not None]


def _near(table: Table, row: Row) -> bool:
    """Trained on about as many tokens as the table's milestones."""
    ends = [r.tokens for r in table.milestones]
    return row.tokens is not None and min(ends) / 2 <= row.tokens <= max(ends) * 2


def _published_curves(table: Table, column: Column) -> list[list[Row]]:
    """Quoted milestones of one run each, in order of tokens."""
    families: dict[str, list[Row]] = {}
    for row in table.baselines:
        if row.kind == "quoted" and _near(table, row) and table.cell(row, column.key).value is not None:
            families.setdefault(row.title.rsplit(" ", 1)[0], []).append(row)
    return [sorted(rows, key=lambda row: row.tokens) for rows in families.values() if len(rows) > 1]


def _baseline_values(table: Table, column: Column) -> list[tuple[Row, float]]:
    """What is drawn as a line across: the baselines that are not points of a curve, one of a run's milestones."""
    on_curves = {row.title.rsplit(" ", 1)[0] for rows in _published_curves(table, column) for row in rows}
    lines: dict[str, tuple[Row, float]] = {}
    for row in table.baselines:
        family = row.title if row.tokens is None or row.kind != "quoted" else row.title.rsplit(" ", 1)[0]
        value = table.cell(row, column.key).value
        if value is not None and family not in on_curves:
            lines[f"{row.kind} {family}"] = (row, value)
    return list(lines.values())


def _accuracy_panel(ax: Axes, table: Table, column: Column) -> None:
    every = [row.tokens for row in table.milestones]
    cells = [table.cell(row, column.key) for row in table.milestones]
    value, low, high = (
        np.array([math.nan if v is None else v for v in ends])  # a gap where a milestone has no score
        for ends in zip(*((c.value, c.low, c.high) for c in cells))
    )
    for row, level in _baseline_values(table, column):
        style = "-" if row.kind == "re-run" else (0, (1, 2))
        ax.axhline(level, color=MUTED, linewidth=0.8, linestyle=style, zorder=1)
    ax.fill_between(every, low, high, color=ACCENT, alpha=0.16, linewidth=0)
    ax.vlines(every, low, high, color=ACCENT, linewidth=1, alpha=0.7)
    ax.plot(every, value, "o-", color=ACCENT, markersize=4, linewidth=1.5, zorder=3)
    if column.chance is not None:
        ax.axhline(column.chance, color=SECOND, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
    ax.set_xscale("log")
    pad = (max(every) / min(every)) ** 0.06 if len(every) > 1 else 2.0
    ax.set_xlim(min(every) / pad, max(every) * pad)
    ax.set_xticks(_spaced(every, 0.2), minor=False)
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_tokens(round(x))))


def name_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names beside the right end of lines at these heights, moved apart where they would overlap."""
    bottom, top = ax.get_ylim()
    panels = ax.get_subplotspec().get_gridspec().nrows
    line = 0.19 * panels / ax.figure.get_size_inches()[1]  # a line of text, as a share of the axes
    ordered = sorted(ends)
    heights = _apart([(value - bottom) / (top - bottom) for value, _, _ in ordered], line)
    for height, (value, text, colour) in zip(heights, ordered):
        ax.annotate(
            text,
            (1.0, value),
            (1.02, height),
            xycoords=ax.get_yaxis_transform(),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": RULE, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending positions moved as little as makes them at least `gap` apart: neighbours that touch share a centre."""
    groups: list[tuple[float, int]] = []  # centre, members
    for position in wanted:
        groups.append((position, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (low, n), (high, m) = groups[-2:]
            groups[-2:] = [((low * n + high * m) / (n + m), n + m)]
    return [centre + gap * (i - (n - 1) / 2) for centre, n in groups for i in range(n)]


def _label(ax: Axes, cell: Cell, x: float, lines: Sequence[float]) -> None:
    """The cell's number above its interval or below, where no line, at one of these heights, crosses it if possible."""
    bottom, top = ax.get_ylim()
    point = (top - bottom) / (ax.figure.get_size_inches()[1] * 0.8 * 72)
    high, low = (cell.value if end is None else end for end in (cell.high, cell.low))
    places = [(high, 6), (low, -14), (high, 18), (low, -26)]
    free = [
        (y, up) for y, up in places if not any(y + (up - 4) * point < line < y + (up + 11) * point for line in lines)
    ]
    y, up = (free or places)[0]
    ax.annotate(cell.number, (x, y), (0, up), textcoords="offset points", ha="center", color=INK, fontsize=8.5)


def _published_at(table: Table, column: Column, tokens: int) -> list[float]:
    """Heights of the published curves at so many tokens, where they are drawn."""
    curves = [
        zip(*((r.tokens, table.cell(r, column.key).value) for r in rows)) for rows in _published_curves(table, column)
    ]
    return [float(np.interp(math.log(tokens), np.log(xs), ys)) for xs, ys in curves]


def _spaced(tokens: Sequence[int], apart: float) -> list[int]:
    """The last and, going down, each milestone at least `apart` of the log range from the one kept before."""
    if len(tokens) < 2:
        return list(tokens)
    span = math.log(max(tokens) / min(tokens))
    kept = [max(tokens)]
    for t in sorted(tokens, reverse=True)[1:]:
        if math.log(kept[-1] / t) >= apart * span:
            kept.append(t)
    return kept[::-1]


def _line(ax: Axes, tokens: np.ndarray, values: np.ndarray, colour: str) -> None:
    """All records, or above `_MAX_POINTS` their mean within a band from the least to the greatest."""
    if len(tokens) > _MAX_POINTS:
        parts = np.array_split(np.arange(len(tokens)), _MAX_POINTS)
        middle = np.array([tokens[p].mean() for p in parts])
        low, high = (np.array([f(values[p]) for p in parts]) for f in (np.min, np.max))
        ax.fill_between(middle, low, high, color=colour, alpha=0.18, linewidth=0)
        tokens, values = middle, np.array([values[p].mean() for p in parts])
    ax.plot(tokens, values, color=colour, linewidth=1.2)


def _ticks(bins: int) -> MaxNLocator:
    return MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10])


def _token_axis(ax: Axes, bins: int = 8) -> None:
    ax.set_xlim(0, ax.dataLim.x1 * 1.03)
    ax.xaxis.set_major_locator(_ticks(bins))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short_count(x)))


def _short_count(number: float) -> str:
    return format_tokens(round(number))
