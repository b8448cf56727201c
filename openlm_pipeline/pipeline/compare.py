"""What `openlm compare` sets against each other, by name: runs, milestones, models and folders of scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.experiments import load_experiment, recipe_names
from openlm_pipeline.pipeline.evaluation import CARD, items_of
from openlm_pipeline.pipeline.items import milestone_named
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.scorecard import Scorecard
    from openlm_pipeline.reports.compare import Comparison, Scored


@dataclass(frozen=True)
class Side:
    """One of two that are compared."""

    name: str
    milestones: Mapping[int | None, Path]
    """Tokens -> scores; None for a model."""
    chosen: int | None = None
    """The milestone to compare; None leaves it open."""
    run: RunFolder | None = None

    def scored(self, tokens: int | None) -> "Scored":
        from openlm_pipeline.reports.compare import Scored

        folder = self.milestones[tokens]
        if (items := items_of(folder)) is None:
            raise MissingInputError(f"{folder} has no items.parquet, so nothing there can be compared item by item")
        title = self.name if tokens is None else f"{self.name} {format_tokens(tokens)}"
        return Scored(title, tokens, _card(folder), items)


def _card(folder: Path) -> "Scorecard":
    from openlm_pipeline.evaluation.scorecard import load_scorecard

    return load_scorecard(folder / CARD)


def side(text: str, home: Home) -> Side:
    """A side by what a user calls it: `RECIPE`, `RECIPE@MILESTONE`, a model that was scored, or a folder of scores.

    Raises:
        ConfigError: there is no such thing.
        MissingInputError: it is not scored.
    """
    name, _, milestone = text.partition("@")
    if name in recipe_names() or (name.endswith((".yaml", ".yml")) and Path(name).exists()):
        experiment = load_experiment(name, [])
        home.pull(home.root / "scorecards" / experiment.name / experiment.version)
        labels = {tokens: label for label, tokens in experiment.labelled_milestones()}
        folders = {t: home.scorecard(experiment.name, experiment.version, label) for t, label in labels.items()}
        scored = {tokens: folder for tokens, folder in folders.items() if (folder / CARD).exists()}
        wanted = milestone and milestone_named(experiment, milestone)
        chosen = next((t for t, label in labels.items() if label == wanted), None)
        if not scored or (chosen and chosen not in scored):
            raise MissingInputError(f"{text} is not scored in {home.root}; `openlm evaluate {name}` does it")
        return Side(experiment.name, scored, chosen, RunFolder(home.run(experiment.name, experiment.version)))
    models = home.root / "scorecards" / "models"
    home.pull(models / text)
    places = [Path(text).parent if Path(text).name == CARD else Path(text), models / text]
    found = [place for place in places if (place / CARD).exists()][:1]
    found = found or sorted(card.parent for card in (models / text).glob(f"*/{CARD}"))
    if len(found) > 1:
        raise ConfigError(f"{text!r} has several scorecards; name one: {', '.join(map(str, found))}")
    if not found:
        raise ConfigError(
            f"{text!r} is no recipe (`openlm recipes`), no model scored in {models}, and no folder with a {CARD}"
        )
    card = _card(found[0])
    return Side(f"{card.run} {card.milestone}" if card.milestone else card.run, {None: found[0]})


def compare_sides(a: Side, b: Side) -> "Comparison":
    """Compare two runs at the last milestone that both have, and their headline at each; others as they are.

    Raises:
        MissingInputError: two runs have no scored milestone at equal tokens.
        DataError: they were not scored alike.
    """
    from openlm_pipeline.reports.compare import compared

    if a.run is None or b.run is None or a.chosen or b.chosen:
        return compared(tuple(s.scored(s.chosen or list(s.milestones)[-1]) for s in (a, b)))
    common = sorted(a.milestones.keys() & b.milestones.keys())
    if not common:
        had = "; ".join(f"{s.name}: {', '.join(format_tokens(t) for t in s.milestones)}" for s in (a, b))
        raise MissingInputError(f"no milestone of equal tokens is scored for both ({had}); name two: RUN@MILESTONE")
    *earlier, last = common

    def pair(tokens: int) -> "tuple[Scored, Scored]":
        return a.scored(tokens), b.scored(tokens)

    return compared(pair(last), map(pair, earlier))


def comparison_page(a: Side, b: Side, found: "Comparison") -> str:
    """An HTML page: the table, and the curves of both."""
    from openlm_pipeline.reports.render import compare_page

    nothing = {"tasks": (), "categories": (), "changes": (), "against": ()}  # of each milestone only its averages stay
    cards = {s.name: [_card(f).model_copy(update=nothing) for f in s.milestones.values()] for s in (a, b)}
    metrics = {s.name: s.run.read_metrics() for s in (a, b) if s.run and s.run.metrics_file.exists()}
    return compare_page(found, cards, metrics)
