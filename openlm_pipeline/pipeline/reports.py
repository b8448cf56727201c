"""What is made of scorecards: a run's report, a model card, a table in Weights & Biases, blocks of Markdown files.

Made anew each time, as it takes seconds. Differences between milestones are taken over all scores that are there now,
whatever the order in which they were made.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openlm_pipeline import __version__
from openlm_pipeline.corpus.maps import largest_first
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError, OpenLMError
from openlm_pipeline.experiments import Experiment, load_experiment, recipe_names
from openlm_pipeline.fingerprint import differences
from openlm_pipeline.pipeline.contamination import for_report
from openlm_pipeline.pipeline.evaluation import (
    CARD,
    baseline_staleness,
    evaluation_of,
    items_of,
    items_of_others,
    milestones_and_scores,
    parent_scorecard,
    staleness,
)
from openlm_pipeline.pipeline.items import MOST_MILESTONES, look_at_items
from openlm_pipeline.pipeline.preflight import preflight
from openlm_pipeline.pipeline.training import open_run
from openlm_pipeline.result import Say, StageResult
from openlm_pipeline.runs import ledger
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import settled
from openlm_pipeline.runs.launch import milestone_checkpoints
from openlm_pipeline.runs.parent import parent_folder
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.files import is_held, sha256_file, write_text
from openlm_pipeline.storage.home import Home

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.baselines import QuotedBaseline
    from openlm_pipeline.evaluation.scorecard import Scorecard
    from openlm_pipeline.reports import Table

_WORST_STEPS, _WORST_SAMPLES, _WORST_DOCUMENTS = 3, 64, 8
"""Of each kind; of their samples those whose documents are looked up, which takes seconds in all; of these named."""
_OUTSTANDING = 10
"""Median deviations above the records before: of ten thousand records of normal noise one is so far."""


@dataclass(frozen=True)
class _Cards:
    """The scorecards of a run's milestones and baselines that are of what the recipe says now."""

    milestones: "list[Scorecard]"
    baselines: "list[Scorecard]"
    without: dict[str, str]
    """Milestone or baseline -> why it has no scorecard, or one of something else."""


def _cards(experiment: Experiment, home: Home) -> _Cards:
    """Each compared with all that is there now."""
    from openlm_pipeline.evaluation.scorecard import Provenance, load_scorecard, make_scorecard
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.reports.claims import best_two

    home.pull(home.root / "scorecards" / experiment.name / experiment.version)
    suite = load_suite(evaluation_of(experiment).suite)
    labels = [label for label, _ in experiment.labelled_milestones()]
    cards: list[Scorecard] = []
    without: dict[str, str] = {}

    def compared(card: "Scorecard", at: int, *others: str) -> "Scorecard":
        """A milestone's card with its change since the one before, and its differences to others."""
        before, against = items_of_others(experiment, home, suite, labels[:at], among=others)
        return make_scorecard(
            items_of(home.scorecard(experiment.name, experiment.version, card.label)),
            before,
            suite=suite,
            provenance=Provenance(**card.model_dump(include=set(Provenance.model_fields))),
            task_files={t.name: t.task_file_sha256 for t in card.tasks if t.task_file_sha256},
            against=against,
            warnings=card.warnings,
        )

    try:
        known = {label: why for label, _, why in milestones_and_scores(experiment, home)}
    except OpenLMError:  # scores outlive the run that they are of
        known = {}
    for i, label in enumerate(labels):
        folder = home.scorecard(experiment.name, experiment.version, label)
        if not (path := folder / CARD).exists():
            if label in known:
                without[label] = "not scored yet: `openlm evaluate` does it"
            if (folder / "items.parquet").exists() and not is_held(folder):
                raise MissingInputError(f"{path} is missing, though its items are there; `openlm evaluate` makes it")
            continue
        card = load_scorecard(path)
        if (of := (card.run, card.run_version, card.milestone)) != (experiment.name, experiment.version, label):
            raise DataError(f"{path} is the scorecard of {' '.join(map(str, of))}; `openlm evaluate` makes it again")
        if changed := known.get(label, staleness(card, suite, evaluation_of(experiment))):
            without[label] = f"its scorecard is of something else ({'; '.join(changed)}): `openlm evaluate` scores it"
            continue
        cards.append(compared(card, i))
    # What is said of the best: its lead over the second, and the best baseline.
    baselines, names = [], [baseline.name for baseline in evaluation_of(experiment).baselines]
    best = best_two(cards)
    for label in best:
        at = [card.label for card in cards].index(label)
        cards[at] = compared(cards[at], labels.index(label), *best, *names)
    for baseline in evaluation_of(experiment).baselines:
        if changed := baseline_staleness(experiment, home, baseline, suite):
            without[baseline.name] = f"not scored as the recipe has it ({'; '.join(changed)})"
        else:
            baselines.append(load_scorecard(home.model_scorecard(baseline.name, suite.name) / CARD))
    return _Cards(cards, baselines, without)


def _parent_card(experiment: Experiment, home: Home, cards: "Sequence[Scorecard]") -> "Scorecard | None":
    """The scorecard of the milestone that a fork continues from, where it is of the same suite."""
    from openlm_pipeline.evaluation.scorecard import load_scorecard

    folder = parent_scorecard(experiment, home)
    card = load_scorecard(folder / CARD) if folder and (folder / CARD).exists() else None
    same = ("suite_digest", "precision", "harness_version")
    return card if card and all(getattr(c, k) == getattr(card, k) for c in cards for k in same) else None


def _records(experiment: Experiment, home: Home, history: ledger.History) -> list[dict[str, Any]]:
    """The losses of a run; of a fork those of its parent come before."""
    before: list[dict[str, Any]] = []
    if experiment.parent:
        start = history.run.identity["parent"]["tokens"]
        before = [r for r in parent_folder(experiment, home).read_metrics() if r["tokens"] <= start]
    return [*before, *history.losses.records()]


def of_other_seeds(home: Home, run: RunFolder, cards: "Sequence[Scorecard]") -> dict[str, list[float]]:
    """Milestone -> headline of this run, then of each run that differs from it in its seed alone, scored alike."""
    from openlm_pipeline.evaluation.scorecard import load_scorecard
    from openlm_pipeline.reports.rows import incomparable

    found = {card.label: [card.average] for card in cards if card.average is not None}
    for path in sorted((home.root / "runs").glob("*/*/run.json")):
        other = settled(RunFolder(path.parent).identity)
        if [line.split()[0] for line in differences(settled(run.identity), other)] != ["seed"]:
            continue
        for card in cards:
            file = home.scorecard(path.parts[-3], path.parts[-2], card.label) / CARD
            twin = load_scorecard(file) if card.label in found and file.exists() else None
            if twin and twin.average is not None and not incomparable(card, twin):
                found[card.label].append(twin.average)
    return found


def _quoted(experiment: Experiment) -> "list[QuotedBaseline]":
    from openlm_pipeline.evaluation.baselines import quoted_baselines

    names = experiment.evaluation.quoted if experiment.evaluation else ()
    return quoted_baselines(names) if names else []


_MOST_VALUES = 8


def _texts(experiment: Experiment, home: Home) -> dict[str, str]:
    """What maps and lists left out of the raw text, and what is left by a field, where shards are here."""
    found = {}
    for dataset in experiment.training_datasets():
        if dataset.source.shards or not (dataset.source.map or dataset.source.breakdown or dataset.source.exclude):
            continue
        try:
            info = open_dataset(dataset, home).info
        except MissingInputError:
            continue
        if dropped := info.get("dropped"):
            most = sorted(dropped.items(), key=lambda row: -row[1])[:_MOST_VALUES]
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in most)
            records = info["totals"]["documents"] + info["totals"]["dropped"]
            found[f"left out of {dataset.name}"] = f"{info['totals']['dropped']:,} of {records:,} documents: {reasons}"
        if breakdown := info.get("breakdown"):
            most = largest_first(breakdown)
            shares = [f"{name} {row[2] / max(1, info['totals']['tokens']):.1%}" for name, row in most[:_MOST_VALUES]]
            more = [f"and {len(most) - _MOST_VALUES:,} more"] if len(most) > _MOST_VALUES else []
            found[f"tokens of {dataset.name} by {dataset.source.breakdown}"] = ", ".join([*shares, *more])
    return found


def make_report(experiment: Experiment, home: Home, report: Say) -> StageResult:
    """Write the report of a run over all its scorecards that are there."""
    from openlm_pipeline.reports import write_report

    run = open_run(experiment, home)
    found = _cards(experiment, home) if experiment.evaluation else _Cards([], [], {})
    out = home.report(experiment.name, experiment.version)
    history = ledger.History(run)
    took = ledger.sentence(history.facts())
    provenance = {"run fingerprint": run.fingerprint, "openlm_pipeline": __version__, "training took": took}
    provenance |= _texts(experiment, home)
    folders = {c.label: home.scorecard(experiment.name, experiment.version, c.label) for c in found.milestones}
    shown = list(folders)[-MOST_MILESTONES:]
    items = look_at_items(experiment, home, shown) if shown else []
    contamination, why = for_report(experiment, home, list(folders))
    if why:
        provenance |= {"items in the training data": why}
    reached = milestone_checkpoints(experiment, run)
    ahead = {f"checkpoint/{experiment.name}/{label}" for label, _ in experiment.labelled_milestones()}
    ahead -= {f"checkpoint/{experiment.name}/{label}" for label in reached}
    needs = preflight(experiment, home, ahead) if ahead else []
    with home.artefact(out):
        paths = write_report(
            out,
            experiment,
            found.milestones,
            _records(experiment, home, history),
            provenance,
            parent=_parent_card(experiment, home, found.milestones),
            baselines=found.baselines,
            quoted=_quoted(experiment),
            without=found.without,
            seeds=of_other_seeds(home, run, found.milestones),
            items=items,
            worst_steps=_worst_steps(run, home),
            contamination=contamination,
            ahead=[f"Before the next milestone: {need.line()}" for need in needs if need.level != "ok"],
        )
    page = paths["report.html"]
    report(f"report: {page}")
    for name, why in found.without.items():
        report(f"{name}: {why}")
    facts = {
        "scorecards": len(found.milestones),
        "milestones": len(experiment.milestones),
        "baselines": len(found.baselines),
    }
    return StageResult(page, sha256_file(paths["table.csv"]), False, facts)


def _worst_steps(run: RunFolder, home: Home) -> list[tuple[str, str]]:
    """What stood out in training, with the documents of those steps; why nobody can say which, where that is so."""
    from openlm_pipeline.lineage.run_order import RunOrder
    from openlm_pipeline.lineage.spikes import spikes
    from openlm_pipeline.lineage.trace import Trace

    try:
        found = spikes(Trace(RunOrder(run, home)), _WORST_STEPS, _WORST_SAMPLES)
    except OpenLMError as e:
        return [("Which documents were read then can't be told", str(e))]
    worst = [spike for spike in found if spike.spreads is None or spike.spreads >= _OUTSTANDING]
    return [(spike.title, spike.sentence(_WORST_DOCUMENTS)) for spike in worst]


def _scored(experiment: Experiment, home: Home) -> _Cards:
    """`_cards` where there are any of milestones; else MissingInputError."""
    found = _cards(experiment, home)
    if not found.milestones:
        raise MissingInputError(
            f"no milestone of {experiment.name} is scored; `openlm evaluate {experiment.name}` does it"
        )
    return found


def scores_table(experiment: Experiment, home: Home) -> "Table":
    """The table of the report: milestones, then baselines.

    Raises:
        MissingInputError: no milestone is scored.
    """
    from openlm_pipeline.reports import milestones_table

    found = _scored(experiment, home)
    return milestones_table(
        experiment.name,
        experiment.version,
        found.milestones,
        experiment.milestones,
        parent=_parent_card(experiment, home, found.milestones),
        baselines=found.baselines,
        quoted=_quoted(experiment),
        without=found.without,
    )


def write_model_card(experiment: Experiment, home: Home, path: Path) -> Path:
    """Write the Hugging Face model card of the last scored milestone; `path` is the file, such as `README.md`."""
    from openlm_pipeline.reports.model_card import model_card

    write_text(path, model_card(experiment, _scored(experiment, home).milestones[-1]))
    return path


def log_to_wandb(experiment: Experiment, home: Home) -> str:
    """Log the table of scores to a new run of the project WANDB_PROJECT (default `openlm`); where that run is."""
    from openlm_pipeline.reports.wandb_table import log_table

    table = scores_table(experiment, home)
    try:
        import wandb
    except ImportError:
        raise MissingInputError("wandb is not installed; `pip install 'openlm-pipeline[wandb]'`") from None
    name = f"{experiment.name}-{experiment.version}-scores"
    with wandb.init(project=os.environ.get("WANDB_PROJECT", "openlm"), name=name, job_type="evaluation") as run:
        log_table(table, run)
        return run.url or str(run.dir)


def openlm_table(name: str, run: Experiment | None, home: Home) -> str:
    """A table of OpenLM's README, beside a run's milestones where one is given."""
    from openlm_pipeline.reports import published

    return published.openlm_table(name, scores_table(run, home) if run else None)


def fill_blocks(path: Path, home: Home, *, write: bool = True) -> list[str]:
    """Fill the marked blocks of a Markdown file: `RECIPE` with its table, `quoted FAMILY` with published scores.

    Args:
        write: False only looks.

    Returns:
        The blocks that were, or are, out of date.

    Raises:
        MissingInputError: there is no such file, or no scores for a block.
        ConfigError: a marker is wrong, or names no recipe and no family.
    """
    from openlm_pipeline.evaluation.baselines import quoted_baselines
    from openlm_pipeline.reports.markdown_blocks import block_names, check_blocks, update_blocks
    from openlm_pipeline.reports.published import quoted_table

    tables = {}
    for name in block_names(path):
        kind, _, family = name.partition(" ")
        if kind == "quoted":
            tables[name] = quoted_table(quoted_baselines([family]))
        elif name in recipe_names():
            tables[name] = scores_table(load_experiment(name), home).to_markdown()
        else:
            raise ConfigError(f"{path}: block {name!r} is neither a recipe nor `quoted FAMILY`")
    return (update_blocks if write else check_blocks)(path, tables)
