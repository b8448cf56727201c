"""One model against another on the same items: task by task, as a table and as a page with both curves."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from openlm_pipeline.evaluation import statistics
from openlm_pipeline.evaluation.averages import AverageDefinition
from openlm_pipeline.evaluation.comparison import ALPHA, Difference, compare
from openlm_pipeline.evaluation.scorecard import Scorecard
from openlm_pipeline.reports.items import of_task
from openlm_pipeline.reports.plots import Curves
from openlm_pipeline.reports.rows import check_comparable
from openlm_pipeline.reports.table import escape_markdown, signed
from openlm_pipeline.units import format_tokens

HEADER = ("measure", "A", "B", "A − B", "95% interval", "p", "bits A", "bits B", "A − B", "95% interval", "p")


@dataclass(frozen=True)
class Scored:
    """A scorecard with the items that it sums up."""

    title: str
    tokens: int | None
    """A milestone's own number."""
    card: Scorecard
    items: pa.Table


@dataclass(frozen=True)
class Measured:
    """Both models' accuracy, or bits per byte, and how they differ; None where they have none."""

    ours: float | None = None
    theirs: float | None = None
    difference: Difference | None = None

    @property
    def texts(self) -> tuple[str, str, str, str, str]:
        """Both numbers, the difference with a mark where A is better or worse beyond noise, its interval, its p."""
        both = ["–" if v is None else f"{v:.3f}" for v in (self.ours, self.theirs)]
        found = self.difference
        if found is None or found.delta is None:
            return *both, "–", (found.note or "–") if found else "–", "–"
        mark = {True: " ▲", False: " ▼", None: ""}[found.better]
        interval = "–" if found.ci_low is None else f"{signed(found.ci_low)} to {signed(found.ci_high)}"
        p = "–" if found.p_holm is None else "<0.001" if found.p_holm < 0.001 else f"{found.p_holm:.3f}"
        return *both, signed(found.delta) + mark, interval, p


@dataclass(frozen=True)
class Line:
    """A task or an average."""

    title: str
    accuracy: Measured
    bits: Measured
    summary: bool = False


@dataclass(frozen=True)
class Comparison:
    """What is shown of A and B."""

    a: str
    b: str
    lines: tuple[Line, ...]
    at_tokens: tuple[Line, ...]
    """The headline wherever both have a milestone at as many tokens, where there are several."""

    def headline(self) -> str:
        """Which is ahead, and whether that is more than noise."""
        found = self.lines[0].accuracy.difference
        if found is None or found.delta is None:
            return f"{self.a} and {self.b} have no headline average in common."
        verdict = "within noise" if found.better is None else "more than noise"
        if not found.delta:
            return f"{self.a} and {self.b} are level."
        ahead, behind = (self.a, self.b) if found.delta > 0 else (self.b, self.a)
        p = self.lines[0].accuracy.texts[-1]
        said = f"{ahead} is {abs(found.delta):.3f} ahead of {behind}, which is {verdict}"
        return f"{said} (p {p.replace('<', '< ') if '<' in p else f'= {p}'})."

    def rows(self) -> list[list[str]]:
        """All lines as texts, in the columns of `HEADER`."""
        return [[line.title, *line.accuracy.texts, *line.bits.texts] for line in (*self.lines, *self.at_tokens)]

    def to_markdown(self) -> str:
        lines = [["---", *["---:"] * (len(HEADER) - 1)], *([escape_markdown(t) for t in row] for row in self.rows())]
        table = "\n".join("| " + " | ".join(line) + " |" for line in [HEADER, *lines])
        said = f"A: {self.a}; B: {self.b}. {self.headline()}"
        return f"{escape_markdown(said)}\n\n{table}"

    def to_csv(self) -> str:
        """A row a measure and kind, with unrounded numbers."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        numbers = ("difference", "ci95_low", "ci95_high", "p_value", "p_holm", "better", "note")
        writer.writerow(("measure", "kind", "a", "b", *numbers))
        for line in (*self.lines, *self.at_tokens):
            for kind, m in (("accuracy", line.accuracy), ("bits_per_byte", line.bits)):
                if d := m.difference:
                    values = (m.ours, m.theirs, d.delta, d.ci_low, d.ci_high, d.p_value, d.p_holm, d.better, d.note)
                    writer.writerow([line.title, kind, *values])
        return out.getvalue()


def compared(pairs: Sequence[tuple[Scored, Scored]]) -> Comparison:
    """Compare two models item by item at the last of some pairs of milestones; at the others their headline.

    p-values are corrected (Holm) over all that is shown.

    Raises:
        DataError: two of a pair were scored with other suites, task files, precisions or harnesses.
    """
    for a, b in pairs:
        check_comparable(a.card, b.card)
    *earlier, (a, b) = pairs
    several = [_lines(*pair)[:1] for pair in earlier]
    groups = _corrected([_lines(a, b), *several])
    at = [
        Line(f"{line.title} at {format_tokens(pair[0].tokens)}", line.accuracy, line.bits, True)
        for (line,), pair in zip(groups[1:], earlier)
    ]
    return Comparison(a.title, b.title, tuple(groups[0]), tuple(at))


def _lines(a: Scored, b: Scored) -> list[Line]:
    """The averages of both, the headline with its bits per byte first, then the tasks of both."""
    theirs = {average.name: average for average in b.card.averages}
    averages = [x for x in a.card.averages if x.kind in ("accuracy", "bits_per_byte") and x.name in theirs]
    definitions = [AverageDefinition(x.name, x.kind, {t: 1 / len(x.tasks) for t in x.tasks}) for x in averages]
    tasks = [t for t in a.card.tasks if t.status == "scored"]
    of_a, of_b = ({t.name: of_task(s.items, t.task, t.num_fewshot) for t in tasks} for s in (a, b))
    chances = {t.name: t.chance for t in tasks if t.chance is not None}
    made = compare(of_a, of_b, b.title, averages=definitions, chances=chances, same_prompts=False)
    differences = {(d.measure, d.kind): d for d in made}
    bits = next((x for x in averages if x.kind == "bits_per_byte"), None)

    def average(x, other) -> Measured:
        return Measured(x.value, other.value, differences.get((x.name, x.kind)))

    lines = []
    for i, x in enumerate(x for x in averages if x.kind == "accuracy"):
        of_bits = average(bits, theirs[bits.name]) if bits and not i else Measured()
        lines.append(Line(f"average {x.name}".replace(" all_tasks", ""), average(x, theirs[x.name]), of_bits, True))
    others = {t.name: t for t in b.card.tasks}
    for t in tasks:
        o = others.get(t.name)
        accuracy = Measured(t.accuracy, o and o.accuracy, differences.get((t.name, "accuracy")))
        likely = Measured(t.bits_per_byte, o and o.bits_per_byte, differences.get((t.name, "bits_per_byte")))
        lines.append(Line(t.name, accuracy, likely))
    return lines


def _corrected(groups: Sequence[Sequence[Line]]) -> list[list[Line]]:
    """With p-values adjusted over all differences of all lines."""
    found = [m.difference for lines in groups for line in lines for m in (line.accuracy, line.bits)]
    tested = [d for d in found if d is not None and d.p_value is not None]
    adjusted = iter(statistics.holm([d.p_value for d in tested]))

    def again(m: Measured) -> Measured:
        if m.difference is None or m.difference.p_value is None:
            return m
        p = next(adjusted)
        changed = m.difference.model_copy(update={"p_holm": p, "significant": p < ALPHA})
        return Measured(m.ours, m.theirs, changed)

    return [[Line(x.title, again(x.accuracy), again(x.bits), x.summary) for x in lines] for lines in groups]


def curves_of(cards: Mapping[str, Sequence[Scorecard]], kind: str) -> Curves:
    """The first average of a kind at each milestone, by model."""
    found = {}
    for title, of_model in cards.items():
        points = [(c.tokens, a.value) for c in of_model for a in [x for x in c.averages if x.kind == kind][:1]]
        points = sorted((t, v) for t, v in points if t is not None and v is not None)
        if points:
            found[title] = tuple(np.array(points, dtype=float).T)
    return found
