"""One model against another on the same items: task by task, as a table and as a page with both curves."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from openlm_pipeline.evaluation.averages import AverageDefinition
from openlm_pipeline.evaluation.comparison import Difference, compare, corrected_over_page
from openlm_pipeline.evaluation.scorecard import Scorecard
from openlm_pipeline.reports.items import of_task
from openlm_pipeline.reports.plots import Curves
from openlm_pipeline.reports.rows import check_comparable
from openlm_pipeline.reports.table import escape_markdown, signed
from openlm_pipeline.units import format_tokens

KINDS = ("accuracy", "bits_per_byte")
HEADER = ("measure", "A", "B", "A − B", "95% interval", "p", "bits A", "bits B", "A − B", "95% interval", "p")
_OF_DIFFERENCE = ("delta", "ci_low", "ci_high", "p_value", "p_holm", "better", "note")


@dataclass(frozen=True)
class Scored:
    """A scorecard with the items that it sums up."""

    title: str
    tokens: int | None
    """A milestone's own number."""
    card: Scorecard
    items: pa.Table


@dataclass(frozen=True)
class Line:
    """The accuracy, or the bits per byte, of a task or an average, of A and of B."""

    title: str
    ours: float | None
    theirs: float | None
    difference: Difference

    @property
    def texts(self) -> list[str]:
        """Both numbers, the difference with a mark where A is better or worse beyond noise, its interval, its p."""
        both = ["–" if v is None else f"{v:.3f}" for v in (self.ours, self.theirs)]
        found = self.difference
        if found.delta is None:
            return [*both, "–", found.note, "–"]
        mark = {True: " ▲", False: " ▼", None: ""}[found.better]
        interval = "–" if found.ci_low is None else f"{signed(found.ci_low)} to {signed(found.ci_high)}"
        p = "<0.001" if found.p_holm < 0.001 else f"{found.p_holm:.3f}"
        return [*both, signed(found.delta) + mark, interval, p]


@dataclass(frozen=True)
class Comparison:
    """What is shown of A and B."""

    a: str
    b: str
    lines: tuple[Line, ...]
    rules: str
    """When an item of a task is right."""

    @property
    def headline(self) -> str:
        """Which is ahead, and whether that is more than noise."""
        found = self.lines[0].difference
        if not found.delta:
            why = "are level" if found.delta == 0 else f"can't be compared: {found.note}"
            return f"{self.a} and {self.b} {why}."
        ahead, behind = (self.a, self.b) if found.delta > 0 else (self.b, self.a)
        verdict = "within noise" if found.better is None else "more than noise"
        said = f"{ahead} is {abs(found.delta):.3f} ahead of {behind}, which is {verdict} (p = {found.p_holm:.2g})."
        bits = next((n.difference for n in self.lines if n.difference.kind != "accuracy" and n.difference.delta), None)
        if found.kind != "accuracy" or found.better is not None or bits is None or bits.better is None:
            return said
        by = f"{self.a if bits.better else self.b}: {abs(bits.delta):.3f} bits per byte, beyond noise."
        return f"{said} The right answers are likelier under {by}"

    @property
    def rows(self) -> list[list[str]]:
        """A row for each task and average, in the columns of `HEADER`."""
        found: dict[str, dict[str, list[str]]] = {}
        for line in self.lines:
            found.setdefault(line.title, {})[line.difference.kind] = line.texts
        return [[title, *(t for kind in KINDS for t in of.get(kind, ["–"] * 5))] for title, of in found.items()]

    def to_markdown(self) -> str:
        rows = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *(map(escape_markdown, row) for row in self.rows)]
        said = escape_markdown(f"A: {self.a}; B: {self.b}. {self.headline} Rules: {self.rules}.")
        return f"{said}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def to_csv(self) -> str:
        """A row for each line, with unrounded numbers."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("measure", "kind", "a", "b", *_OF_DIFFERENCE))
        for x in self.lines:
            values = (getattr(x.difference, name) for name in _OF_DIFFERENCE)
            writer.writerow([x.title, x.difference.kind, x.ours, x.theirs, *values])
        return out.getvalue()


def compared(last: tuple[Scored, Scored], earlier: Iterable[tuple[Scored, Scored]] = ()) -> Comparison:
    """Compare two models item by item at one pair of milestones; at earlier ones, read one by one, their headline.

    p-values are corrected (Holm) over all that is shown.

    Raises:
        DataError: two of a pair were scored with other suites, task files, precisions or harnesses.
    """
    a, b = last
    check_comparable(a.card, b.card)
    lines = _lines(a, b)
    for pair in earlier:
        check_comparable(*(side.card for side in pair))
        at = f" at {format_tokens(pair[0].tokens)}"
        lines += [replace(x, title=x.title + at) for x in _lines(*pair) if x.title == lines[0].title]
    shown = a.card.model_copy(update={"changes": tuple(x.difference for x in lines)})
    ((corrected,), _) = corrected_over_page([shown])
    by_rule: dict[str, list[str]] = {}
    for task in a.card.tasks:
        by_rule.setdefault(task.rule, []).append(task.name)
    rules = "; ".join(f"{rule}: {', '.join(names)}" for rule, names in by_rule.items())
    made = tuple(replace(x, difference=d) for x, d in zip(lines, corrected.changes))
    return Comparison(a.title, b.title, made, rules)


def _lines(a: Scored, b: Scored) -> list[Line]:
    """Of the averages, the headline and its bits per byte first, then of the tasks."""
    theirs = {average.name for average in b.card.averages}
    averages = [x for x in a.card.averages if x.kind in KINDS and x.name in theirs]
    tasks = [t for t in a.card.tasks if t.status == "scored"]
    made = compare(
        *({t.name: of_task(side.items, t.task, t.num_fewshot) for t in tasks} for side in (a, b)),
        b.title,
        averages=[AverageDefinition(x.name, x.kind, {t: 1 / len(x.tasks) for t in x.tasks}) for x in averages],
        chances={},
        same_prompts=False,
    )
    values = [
        {(x.name, x.kind): x.value for x in side.card.averages}
        | {(t.name, kind): getattr(t, kind) for t in side.card.tasks for kind in KINDS}
        for side in (a, b)
    ]
    titles = {x.name: f"average {x.name}" for x in averages}
    titles |= {next(x.name for x in averages if x.kind == kind): "average" for kind in {x.kind for x in averages}}
    lines = [Line(titles.get(d.measure, d.measure), *(v.get((d.measure, d.kind)) for v in values), d) for d in made]
    return sorted(lines, key=lambda x: (x.difference.measure not in titles, x.title != "average"))


def curves_of(cards: Mapping[str, Sequence[Scorecard]], kind: str) -> Curves:
    """The first average of a kind at each milestone, by model."""
    found = {}
    for title, of_model in cards.items():
        values = ((c.tokens, next((x.value for x in c.averages if x.kind == kind), None)) for c in of_model)
        if points := sorted(p for p in values if None not in p):
            found[title] = tuple(np.array(points, dtype=float).T)
    return found
