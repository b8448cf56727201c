"""What an average hides: tasks that never leave chance, and noise between seeds of training."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from openlm_pipeline.reports.table import NOT_APPLICABLE, NOT_RUN, Cell, Column, Row, Table

ABOVE_CHANCE = "average/above_chance"


def stuck_tasks(table: Table) -> list[Column]:
    """Tasks whose interval includes chance at every scored milestone, of two or more, or that are 0 at each."""

    def stuck(i: int, chance: float) -> bool:
        cells = [row.cells[i] for row in table.milestones if row.cells[i].value is not None]
        at_chance = all(c.low is not None and c.low <= chance <= c.high for c in cells)
        return len(cells) > 1 and (at_chance or all(c.value == 0 for c in cells))

    found = enumerate(table.columns)
    return [c for i, c in found if c.kind == "accuracy" and c.chance is not None and stuck(i, c.chance)]


def with_average_above_chance(table: Table, headline: Collection[str]) -> Table:
    """The table with the mean of the headline's tasks but the stuck ones, where some of them are and not all."""
    stuck = {column.key for column in stuck_tasks(table)}
    moving = [i for i, column in enumerate(table.columns) if column.key in headline and column.key not in stuck]
    if not moving or len(moving) == len(headline):
        return table

    def cell(row: Row) -> Cell:
        cells = [row.cells[i] for i in moving]
        if any(c.value is None for c in cells):
            return Cell(NOT_APPLICABLE if row.kind == "quoted" else NOT_RUN)
        return Cell("scored", math.fsum(c.value for c in cells) / len(cells), decimals=cells[0].decimals)

    column = Column(ABOVE_CHANCE, "average above chance", "average")
    rows = tuple(replace(row, cells=(*row.cells[:-1], cell(row), row.cells[-1])) for row in table.rows)
    return replace(table, columns=(*table.columns[:-1], column, table.columns[-1]), rows=rows)


@dataclass(frozen=True)
class SeedNoise:
    """How much the headline differs between runs that differ in their seed alone."""

    label: str
    """The milestone that was compared."""
    deviation: float
    num_runs: int

    def beyond_both(self, half_width: float) -> float:
        """The difference of two runs that neither the items nor the seeds explain, at 5%.

        Args:
            half_width: of the difference's 95% interval over items.
        """
        from scipy.stats import t

        of_seeds = float(t.ppf(0.975, self.num_runs - 1)) * self.deviation * math.sqrt(2)
        return math.hypot(half_width, of_seeds)


def seed_noise(averages: Mapping[str, Sequence[float]]) -> SeedNoise | None:
    """From the headline of each run by milestone: at the last of those that most runs have; None below two runs."""
    label = max(reversed(averages), key=lambda name: len(averages[name]), default=None)
    if label is None or len(averages[label]) < 2:
        return None
    return SeedNoise(label, statistics.stdev(averages[label]), len(averages[label]))
