"""The scores table of a run, put together from scorecards and published scores that can be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.averages import HELD_OUT_TEXT
from openlm_pipeline.evaluation.baselines import QuotedBaseline
from openlm_pipeline.evaluation.comparison import corrected_over_page
from openlm_pipeline.evaluation.scorecard import Average, Scorecard, TaskScore
from openlm_pipeline.evaluation.suite import task_name
from openlm_pipeline.reports.claims import claims
from openlm_pipeline.reports.noise import with_average_above_chance
from openlm_pipeline.reports.table import NOT_APPLICABLE, NOT_RUN, STALE, Cell, Column, Row, Table
from openlm_pipeline.units import format_tokens, milestone_label

LOSS = "validation_loss"


def milestones_table(
    run: str,
    run_version: str,
    scorecards: Sequence[Scorecard],
    milestones: Sequence[int] = (),
    *,
    parent: Scorecard | None = None,
    baselines: Sequence[Scorecard] = (),
    quoted: Sequence[QuotedBaseline] = (),
    without: Mapping[str, str] = {},
) -> Table:
    """The table of one run's scorecards; a milestone (in tokens) without a scorecard is a row of `not run`.

    What its rows say of changes, and what the headline will say, is one family of tests.

    Args:
        parent: scorecard of the milestone that a fork continues from.
        baselines: scorecards of other models on the same suite, in the order to show.
        quoted: published scores; a model without any of the table's tasks is left out.
        without: milestones whose scorecard is of something else, rows of `stale`, and baselines that have none.

    Raises:
        DataError: a scorecard of another run, two of one milestone, or scorecards that cannot be compared because
            their suite, task files or harness version differs.
    """
    nominal = {milestone_label(tokens): tokens for tokens in milestones}
    cards = {card.label: card for card in sorted(scorecards, key=lambda card: card.tokens or 0)}
    if len(cards) < len(scorecards):
        raise DataError(f"two scorecards are of the same milestone of {run}; give one for each")
    for card in cards.values():
        if (card.run, card.run_version) != (run, run_version):
            raise DataError(f"a scorecard of {card.run} {card.run_version} was given for {run} {run_version}")
        if card.tokens is None:
            raise DataError(f"the scorecard {card.label} is of no milestone; give it as a baseline")
    claimed = claims(scorecards, baselines)
    corrected, adjusted = corrected_over_page(list(cards.values()), list(claimed.values()))
    cards = dict(zip(cards, corrected))
    every = [*cards.values(), *([parent] if parent else []), *baselines]
    for card in every:
        check_comparable(card, every[-1])
    judged = {t.name for card in every for t in card.tasks if t.accuracy is not None or t.status != "scored"}
    every_column = _columns(every)
    shown = [c for c in every_column if c.kind != "accuracy" or c.key in judged]
    columns = (*shown, *_likelihood_columns(every_column, every))
    rows: list[Row] = []
    before = None
    if parent is not None:
        cells, title = tuple(_cell(parent, c, None) for c in columns), f"{format_tokens(parent.tokens)} of {parent.run}"
        rows.append(Row(parent.label, title, "milestone", cells, parent.tokens, parent.step))
        before = parent.milestone
    for label, card in cards.items():
        tokens = nominal.get(label, card.tokens)
        cells = tuple(_cell(card, column, before) for column in columns)
        rows.append(Row(label, format_tokens(tokens), "milestone", cells, tokens, card.step))
        before = label
    rows += [
        Row(
            label,
            format_tokens(tokens),
            "milestone",
            tuple(Cell(STALE if label in without else NOT_RUN) for _ in columns),
            tokens,
        )
        for label, tokens in nominal.items()
        if label not in cards
    ]
    rows.sort(key=lambda row: row.tokens)
    for card in baselines:
        cells = tuple(_cell(card, column, None) for column in columns)
        rows.append(Row(card.run, card.run, "re-run", cells, card.tokens))
    for name in (name for name in without if name not in nominal):
        rows.append(Row(name, name, "re-run", tuple(Cell(NOT_RUN) for _ in columns)))
    tasks_of = {a.name: set(a.tasks) for card in every for a in card.averages}
    for published in quoted:
        cells = tuple(_quoted_cell(published, column, tasks_of) for column in columns)
        if any(cell.value is not None for cell in cells):
            tokens = published.tokens
            title = published.title if tokens is None else f"{published.title} {format_tokens(tokens)}"
            source = f"{published.source}; {published.harness}" + (f"; {published.note}" if published.note else "")
            rows.append(Row(published.name, title, "quoted", cells, tokens, source=source))
    whole = Table(run, run_version, columns, tuple(rows), dict(zip(claimed, adjusted)))
    table, bits = whole.only(range(len(shown))), whole.only(range(len(shown), len(columns)))
    if bits.columns:
        table = replace(table, likelihoods=replace(bits, rows=tuple(r for r in bits.rows if r.kind != "quoted")))
    return with_average_above_chance(table, every[-1].headline.tasks) if every else table


def incomparable(card: Scorecard, last: Scorecard) -> str | None:
    """What two scorecards were measured with that differs, by name; None where nothing does."""

    def instrument(c: Scorecard) -> dict[str, str]:
        files = {f"the file of {t.name}": t.task_file_sha256 for t in c.tasks if t.task_file_sha256}
        names = ("suite", "suite_version", "suite_digest", "random_baselines", "harness_version", "precision")
        return {k: getattr(c, k) for k in names} | files

    mine, other = instrument(card), instrument(last)
    differing = (what for what in mine if what in other and mine[what] != other[what])
    return next((f"{what} ({mine[what]}, {other[what]})" for what in differing), None)


def check_comparable(card: Scorecard, last: Scorecard) -> None:
    """Raises DataError if two scorecards cannot be compared."""
    if what := incomparable(card, last):
        raise DataError(
            f"the scorecards of {card.run} {card.milestone or ''} and {last.run} {last.milestone or ''} differ in "
            f"{what}, so their scores cannot be compared; score both again"
        )


def _columns(cards: Sequence[Scorecard]) -> tuple[Column, ...]:
    """The headline and its likelihood, the tasks in the suite's order, then the other averages and the loss."""
    tasks: dict[str, TaskScore] = {}
    averages: dict[str, Average] = {}
    for card in cards:
        tasks |= {t.name: t for t in card.tasks if t.name not in tasks or t.status == "scored"}
        averages |= {a.name: a for a in card.averages if a.name not in averages or a.status == "scored"}
    means = [_average_column(a) for a in averages.values()] or [Column("average/all_tasks", "average", "average")]
    measured = [
        Column(
            key=name,
            title=t.task,
            kind="accuracy",
            chance=t.chance,
            num_items=t.num_items or None,
            num_fewshot=t.num_fewshot,
            small=t.small,
            rule=t.rule,
            majority=t.majority,
            num_clusters=t.num_clusters,
        )
        for name, t in tasks.items()
    ]
    bits, others = ([m for m in means[1:] if (m.kind == "bits_per_byte") == is_bits] for is_bits in (True, False))
    return means[0], *bits, *measured, *others, Column(LOSS, "held-out loss", "loss")


def _likelihood_columns(columns: Sequence[Column], cards: Sequence[Scorecard]) -> tuple[Column, ...]:
    """The average bits per byte, and those of each task that has them; none without an average."""
    average = tuple(
        replace(c, title=c.title.replace("bits per byte", "average")) for c in columns if c.kind == "bits_per_byte"
    )
    known = {t.name for card in cards for t in card.tasks if t.bits_per_byte is not None}
    tasks = (replace(c, kind="bits_per_byte", chance=None, rule=None, majority=None) for c in columns if c.key in known)
    return (*average, *tasks) if average else ()


def _average_column(average: Average) -> Column:
    titles = {"all_tasks": "average", "without_small": "average without *"}
    title = titles.get(average.name, f"average {average.name}")
    if average.kind == "bits_per_byte":
        title = "held-out text" if average.name == HELD_OUT_TEXT else "bits per byte"
    elif average.kind != "accuracy":
        title = "centred average" if average.kind == "centred" else average.name
        title = f"{title} (random {average.random_baselines})"
    kind = "average" if average.kind == "accuracy" else average.kind
    return Column(f"average/{average.name}", title, kind, chance=average.chance)


def _cell(card: Scorecard, column: Column, before: str | None) -> Cell:
    if column.kind == "loss":
        if card.validation_loss is None:
            return Cell(NOT_APPLICABLE if card.milestone is None else NOT_RUN)
        return Cell("scored", card.validation_loss)
    measure = column.key.removeprefix("average/")
    changes = {d.kind: d for d in card.changes if (d.measure, d.against) == (measure, before)}
    bits = changes.get("bits_per_byte")
    change = bits if column.kind == "bits_per_byte" else changes.get("accuracy")
    if measure == column.key:
        score = next((t for t in card.tasks if task_name(t.task, t.num_fewshot) == column.key), None)
        if score is None or score.status != "scored":
            return Cell(NOT_RUN if score is None else score.status)
        if column.kind == "bits_per_byte":
            if score.bits_per_byte is None:
                return Cell(NOT_APPLICABLE)
            return Cell("scored", score.bits_per_byte, score.bits_low, score.bits_high, score=score, change=change)
        ends = (score.accuracy, score.ci_low, score.ci_high, score.mde)
        return Cell(score.status if score.accuracy is not None else NOT_APPLICABLE, *ends, score, change, bits)
    average = next((a for a in card.averages if a.name == measure), None)
    if average is None or average.value is None:
        return Cell(NOT_RUN if average is None else average.status)
    return Cell("scored", average.value, average.ci_low, average.ci_high, average.mde, change=change)


def _quoted_cell(published: QuotedBaseline, column: Column, tasks_of: dict[str, set[str]]) -> Cell:
    value = published.scores.get(column.key) if column.kind == "accuracy" else None
    if column.kind == "average" and tasks_of.get(column.key.removeprefix("average/")) == set(published.average_tasks):
        value = published.average
    return Cell(NOT_APPLICABLE) if value is None else Cell("scored", value, decimals=2)
