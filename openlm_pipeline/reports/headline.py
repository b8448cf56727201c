"""The answer of a report: which milestone is best, by how much, and whether that is more than noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openlm_pipeline.evaluation.scorecard import Scorecard
from openlm_pipeline.reports.claims import BASELINE, CHANCE, LEAD
from openlm_pipeline.reports.noise import ABOVE_CHANCE, SeedNoise, stuck_tasks
from openlm_pipeline.reports.rows import LOSS
from openlm_pipeline.reports.table import Cell, Row, Table, signed


@dataclass(frozen=True)
class Figure:
    """One number of the answer: what it is, its value, what bears it out."""

    title: str
    value: str
    detail: str
    sign: Literal["up", "down", ""] = ""
    """Beyond noise, and in which direction."""


@dataclass(frozen=True)
class Headline:
    """What a reader takes away in five seconds, and the numbers that bear it out."""

    main: str
    figures: tuple[Figure, ...] = ()
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Gap:
    """One model's headline average less another's."""

    delta: float
    low: float | None
    high: float | None
    p_value: float | None
    how: str

    @property
    def beyond_noise(self) -> bool | None:
        if self.p_value is not None:
            return self.p_value < 0.05
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0

    @property
    def sign(self) -> Literal["up", "down", ""]:
        return "" if not self.beyond_noise else "up" if self.delta > 0 else "down"

    @property
    def verdict(self) -> str:
        known = {True: "more than noise", False: "within noise", None: "how much of it is noise is not known"}
        return known[self.beyond_noise]

    @property
    def detail(self) -> str:
        parts = [self.verdict]
        if self.low is not None and self.high is not None:
            parts.append(f"95% {signed(self.low)} to {signed(self.high)}")
        if self.p_value is not None:
            value = "<\u00a00.001" if self.p_value < 0.001 else f"=\u00a0{self.p_value:.3f}"
            parts.append(f"p\u00a0{value} after correction")
        return ", ".join(parts) + f" ({self.how})"


def headline(table: Table, cards: Sequence[Scorecard] = (), seeds: SeedNoise | None = None) -> Headline:
    """Which milestone is best on the headline average, and how far ahead of the next, of chance and of the baselines.

    Args:
        cards: scorecards of the milestones and the re-run baselines, which hold the paired differences.
        seeds: noise between runs that differ in their seed alone.
    """
    scored = [row for row in table.milestones if row.cells[0].value is not None]
    if not scored:
        return Headline("No milestone has an average score yet.", details=_loss_sentence(table))
    best = table.best()
    cell, by_label = best.cells[0], {card.label: card for card in cards}
    if len(scored) == 1:
        main = f"{best.title} tokens is the only scored milestone"
    else:
        main = f"{best.title} tokens is the best of {len(scored)} scored milestones"
    title = "Average accuracy" if table.better > 0 else table.headline.title.capitalize()
    figures = [Figure(title, f"{cell.number} {cell.half_width}".rstrip(), _tasks(table, by_label, best))]
    if len(scored) > 1:
        second = max((row for row in scored if row is not best), key=lambda row: table.better * row.cells[0].value)
        gap = _gap(table, by_label, best, second, LEAD)
        figures.append(Figure(f"Lead over {second.title}", signed(gap.delta), gap.detail, gap.sign))
        main += (
            f", {gap.delta:.3f} ahead of {second.title}, {'' if gap.beyond_noise is None else 'which is '}{gap.verdict}"
        )
        if seeds:
            figures.append(_between_seeds(seeds, gap, {row.label: row.title for row in table.rows}))
    chance = table.headline.chance
    if chance is not None:
        p_value = table.claims.get(CHANCE)
        gap = _Gap(cell.value - chance, *_shifted(cell, chance), p_value, f"guessing gets {chance:.3f}")
        figures.append(Figure("Over chance", signed(gap.delta), gap.detail, gap.sign))
        if gap.beyond_noise is False:
            main += "; it is not distinguishable from chance"
        elif gap.sign == "down":
            main += "; it is below chance"
    figures += _against_baselines(table, by_label, best)
    details = _stuck_sentence(table, best)
    if scored[-1] is not best and len(scored) > 2:
        details.append(f"The last scored milestone, {scored[-1].title}, stands at {scored[-1].cells[0].text}.")
    return Headline(f"{main}.", tuple(figures), (*details, *_loss_sentence(table)))


def _tasks(table: Table, cards: dict[str, Scorecard], row: Row) -> str:
    card = cards.get(row.label)
    if card is None or not card.averages:
        return table.headline.title
    items = {t.name: t.num_items for t in card.tasks}
    tasks = card.averages[0].tasks
    name = "" if table.headline.title == "average" else f"{table.headline.title.removeprefix('average ')}: "
    return f"{name}{len(tasks)} tasks, {sum(items.get(t, 0) for t in tasks):,} items"


def _against_baselines(table: Table, cards: dict[str, Scorecard], best: Row) -> list[Figure]:
    figures = []
    for kind, title in (("re-run", "Against the best baseline"), ("quoted", "Against the best published score")):
        rows = [r for r in table.baselines if r.kind == kind and r.cells[0].value is not None]
        if not rows:
            continue
        other = max(rows, key=lambda row: table.better * row.cells[0].value)
        if kind == "re-run":
            gap = _gap(table, cards, best, other, BASELINE)
            figures.append(
                Figure(title, signed(gap.delta), f"{other.title} {other.cells[0].number}: {gap.detail}", gap.sign)
            )
        else:
            delta = signed(best.cells[0].value - other.cells[0].value, 2)
            detail = f"{other.title} {other.cells[0].number}: quoted to two decimals, another harness, not tested"
            figures.append(Figure(title, delta, detail))
    return figures


def _between_seeds(seeds: SeedNoise, gap: _Gap, titles: dict[str, str]) -> Figure:
    detail = f"standard deviation of the average over {seeds.num_runs} runs that differ in their seed alone, at "
    detail += titles[seeds.label]
    if gap.low is not None and gap.high is not None:
        least = seeds.beyond_both((gap.high - gap.low) / 2)
        reached = "has" if gap.delta >= least else "has not"
        detail += f"; a lead beyond items and seeds needs {least:.3f}, which this {reached}"
    return Figure("Between seeds", f"±{seeds.deviation:.3f}", detail)


def _stuck_sentence(table: Table, best: Row) -> list[str]:
    if not (stuck := stuck_tasks(table)):
        return []
    names = " and ".join(", ".join(c.heading for c in stuck).rsplit(", ", 1))
    said = f"{names} {'stays' if len(stuck) == 1 else 'stay'} at chance at every scored milestone"
    if any(column.key == ABOVE_CHANCE for column in table.columns):
        average = table.cell(best, ABOVE_CHANCE).number
        said += f"; without {'it' if len(stuck) == 1 else 'them'} the average at {best.title} is {average}"
    return [f"{said}."]


def _shifted(cell: Cell, by: float) -> tuple[float | None, float | None]:
    return (None, None) if cell.low is None or cell.high is None else (cell.low - by, cell.high - by)


def _gap(table: Table, cards: dict[str, Scorecard], row: Row, other: Row, claim: str) -> _Gap:
    """How much better one is: paired where one of the two scorecards has the comparison; else the errors count as
    independent."""
    measure = table.headline.key.removeprefix("average/")
    for mine, theirs, sign in ((row, other, table.better), (other, row, -table.better)):
        card = cards.get(mine.label)
        found = card.difference(measure, theirs.label) if card else None
        if found is not None and found.ci_low is not None:
            low, high = sorted((sign * found.ci_low, sign * found.ci_high))
            p_value = table.claims.get(claim, found.p_value)
            return _Gap(sign * found.delta, low, high, p_value, "paired over the same items")
    ours, theirs = row.cells[0], other.cells[0]
    delta = table.better * (ours.value - theirs.value)
    if None in (ours.low, ours.high, theirs.low, theirs.high):
        return _Gap(delta, None, None, None, "no intervals")
    half = math.hypot(ours.high - ours.low, theirs.high - theirs.low) / 2
    return _Gap(delta, delta - half, delta + half, None, "errors taken as independent")


def _loss_sentence(table: Table) -> tuple[str, ...]:
    losses = [(r, cell.value) for r in table.milestones if (cell := table.cell(r, LOSS)).value is not None]
    if len(losses) < 2:
        return ()
    (first, start), (last, end) = losses[0], losses[-1]
    verb = "fell" if end < start else "rose" if end > start else "stayed"
    return (f"Held-out loss {verb} from {start:.3f} at {first.title} to {end:.3f} at {last.title} (nats per token).",)
