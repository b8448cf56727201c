"""Write a run's report: Markdown, one self-contained HTML page, CSV and Parquet, all from one table.

The same inputs give the same bytes. Nothing on the pages is loaded from elsewhere. The report holds no script; the page
of items has one of its own, for its search.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from openlm_pipeline.evaluation.baselines import QuotedBaseline
from openlm_pipeline.evaluation.scorecard import Scorecard
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.reports.compare import Comparison, curves_of
from openlm_pipeline.reports.contamination import Contamination, seen_text
from openlm_pipeline.reports.curves import series
from openlm_pipeline.reports.headline import Headline, headline
from openlm_pipeline.reports.items import ItemsOfTask, clipped
from openlm_pipeline.reports.noise import seed_noise
from openlm_pipeline.reports.plots import average_chart, comparison_chart, loss_chart, pace_chart, task_charts
from openlm_pipeline.reports.rows import milestones_table
from openlm_pipeline.reports.summary import (
    Facts,
    categories,
    checkpoints,
    evaluation_facts,
    made_from,
    notes,
    origin,
    problems,
    sources,
    task_files,
)
from openlm_pipeline.reports.table import Table, escape_markdown
from openlm_pipeline.storage.files import write_text

LARGEST_PAGE = 5_000_000


def write_report(
    out_dir: Path,
    experiment: Experiment,
    scorecards: Sequence[Scorecard],
    training_metrics: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any] | None = None,
    *,
    parent: Scorecard | None = None,
    baselines: Sequence[Scorecard] = (),
    quoted: Sequence[QuotedBaseline] = (),
    without: Mapping[str, str] = {},
    seeds: Mapping[str, Sequence[float]] = {},
    items: Sequence[ItemsOfTask] = (),
    ahead: Sequence[str] = (),
    worst_steps: Sequence[tuple[str, str]] = (),
    contamination: Contamination | None = None,
) -> dict[str, Path]:
    """Write `report.md`, `report.html`, `table.csv` and `table.parquet` into `out_dir`; return them by those names.

    Args:
        training_metrics: the records of `metrics.jsonl`.
        provenance: added to the footer as it is: names and values worth keeping that the scorecards do not hold,
            such as the code version.
        parent: scorecard of the milestone that a fork continues from.
        baselines: scorecards of other models on the same suite.
        quoted: published scores.
        without: milestone or baseline -> why it has no scorecard that can be shown.
        seeds: milestone -> headline of this run and of those that differ from it in their seed alone.
        items: what `items.html` shows, which there is only with some.
        ahead: what stands in the way of the milestones that are still to be trained.
        worst_steps: what stood out in training, and the documents that were read then.
        contamination: items of the suite that it has trained on, where its data was scanned for them.

    Raises:
        DataError: the scorecards are of another run or cannot be compared with each other.
    """
    milestones = sorted(scorecards, key=lambda card: card.tokens or 0)
    cards = [*([parent] if parent else []), *milestones, *baselines]
    table = milestones_table(
        experiment.name,
        experiment.version,
        scorecards,
        experiment.milestones,
        parent=parent,
        baselines=baselines,
        quoted=quoted,
        without=without,
    )
    facts = [*evaluation_facts(milestones), *((name, str(value)) for name, value in (provenance or {}).items())]
    page = {
        "experiment": experiment,
        "headline": headline(table, cards, seed_noise(seeds)),
        "origin": origin(table, cards),
        "table": table,
        "problems": [*problems(table, cards), *(f"{name}: {why}" for name, why in without.items()), *ahead],
        "notes": notes(table, cards),
        "made_from": made_from(experiment),
        "facts": facts,
        "contamination": contamination,
        "sources": sources(table),
        "checkpoints": checkpoints(table, cards),
        "files": task_files(cards),
        "worst_steps": worst_steps,
    }
    charts = [
        ("Accuracy by task", task_charts(table)),
        ("Loss", loss_chart(training_metrics, experiment.milestones)),
        ("Optimisation", pace_chart(training_metrics)),
    ]
    paths = {name: out_dir / name for name in ("report.md", "report.html", "table.csv", "table.parquet")}
    write_text(paths["report.md"], _markdown(**page))
    charts = [(title, Markup(svg)) for title, svg in charts if svg]
    average = Markup(average_chart(table) or "")
    write_text(
        paths["report.html"],
        html_page(
            "page.html",
            average=average,
            categories=categories(table, cards),
            charts=charts,
            items_page=bool(items),
            **page,
        ),
    )
    (out_dir / "items.html").unlink(missing_ok=True)  # an earlier report's
    if items:
        paths["items.html"] = out_dir / "items.html"
        write_text(paths["items.html"], items_page(experiment, items))
    write_text(paths["table.csv"], table.to_csv())
    table.write_parquet(paths["table.parquet"])
    return paths


def items_page(experiment: Experiment, items: Sequence[ItemsOfTask]) -> str:
    """A page of items to search, of at most `LARGEST_PAGE` bytes: beyond that each task has fewer."""
    page = html_page("items.html", experiment=experiment, tasks=items)
    while len(page.encode()) > LARGEST_PAGE:
        items = [replace(of, items=of.items[: len(of.items) // 2]) for of in items]
        page = html_page("items.html", experiment=experiment, tasks=items)
    return page


def compare_page(
    found: Comparison, cards: Mapping[str, Sequence[Scorecard]], metrics: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """A page of one model against another, with the curves of both.

    Args:
        cards, metrics: of each of the two, the scorecards of its milestones, and its records of training.
    """
    losses = {name: series(records, "loss") for name, records in metrics.items()}
    panels = [
        ("average accuracy", curves_of(cards, "accuracy")),
        ("bits per byte of the right answers", curves_of(cards, "bits_per_byte")),
        ("training loss, nats per token", {name: points for name, points in losses.items() if len(points[0])}),
    ]
    return html_page("compare.html", found=found, charts=Markup(comparison_chart(panels) or ""))


def html_page(template: str, **page: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["zip"] = zip
    environment.filters["breakable"] = lambda text: Markup("_<wbr>").join(re.split(r"_(?=[^_]{4})", text))
    environment.filters["clipped"], environment.filters["seen"] = clipped, seen_text
    return environment.get_template(template).render(page)


def _markdown(
    experiment: Experiment,
    headline: Headline,
    origin: str,
    table: Table,
    problems: list[str],
    notes: Facts,
    made_from: Facts,
    facts: Facts,
    contamination: Contamination | None,
    sources: Facts,
    checkpoints: list[tuple[str, str, str]],
    files: Facts,
    worst_steps: Sequence[tuple[str, str]],
) -> str:
    parts = [f"# {experiment.name} {escape_markdown(experiment.version)}"]
    if experiment.description:
        parts.append(escape_markdown(experiment.description))
    parts.append(f"**{escape_markdown(headline.main)}**")
    if headline.figures:
        parts.append(_facts([(f.title, f"{f.value}; {f.detail}") for f in headline.figures]))
    parts += [escape_markdown(text) for text in (*headline.details, origin) if text]
    parts += ["## Scores", table.to_markdown().rstrip()]
    if table.likelihoods:
        parts += ["### Bits per byte of the right answers", table.likelihoods.to_markdown().rstrip()]
    if problems:
        parts.append("\n".join(f"- {escape_markdown(problem)}" for problem in problems))
    if contamination:
        parts += ["## Items seen in training", _rows(contamination.tasks), " ".join(contamination.notes)]
        parts += [_rows(contamination.items)] if contamination.items else []
    parts.append(f"<details>\n<summary>How to read the table</summary>\n\n{_facts(notes)}\n\n</details>")
    if worst_steps:
        parts += ["## Data of the worst steps", _facts(worst_steps)]
    parts += ["## How it was made", _facts(made_from), "## Provenance", _facts(facts)]
    if checkpoints:
        rows = [f"- {escape_markdown(name)} ({escape_markdown(at)}): `{digest}`" for name, at, digest in checkpoints]
        parts += ["Checkpoints:", "\n".join(rows)]
    if sources:
        parts += ["Published scores:", _facts(sources)]
    if files:
        rows = [f"- {escape_markdown(name)}: `{digest}`" for name, digest in files]
        parts += ["Task files (sha256):", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    headings, *others = (f"| {' | '.join(map(escape_markdown, row))} |" for row in rows)
    return "\n".join([headings, "| --- |" + " ---: |" * (len(rows[0]) - 1), *others])


def _facts(facts: Facts) -> str:
    return "\n".join(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in facts)
