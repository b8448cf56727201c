"""What `openlm compare` sets against each other: runs by recipe, milestones, models and folders of scores, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.experiments import load_experiment, recipe_names
from openlm_pipeline.pipeline.evaluation import CARD, items_of
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
    folders: Mapping[int | None, Path]
    """Tokens of a milestone -> its scores; None for a model."""
    curve: Mapping[int | None, Path]
    """The same of all its scored milestones."""
    metrics: list[dict[str, Any]]
    """Records of training, of a run."""

    def scored(self, tokens: int | None) -> "Scored":
        from openlm_pipeline.reports.compare import Scored

        folder = self.folders[tokens]
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
        folders = {
            tokens: home.scorecard(experiment.name, experiment.version, label)
            for label, tokens in experiment.labelled_milestones()
        }
        names = {n: t for label, t in experiment.labelled_milestones() for n in (label, format_tokens(t))}
        if milestone and milestone not in names:
            raise ConfigError(f"recipe {name} has no milestone {milestone!r}; it has {', '.join(names)}")
        curve = {tokens: folder for tokens, folder in folders.items() if (folder / CARD).exists()}
        chosen = {t: f for t, f in curve.items() if not milestone or t == names[milestone]}
        if not chosen:
            raise MissingInputError(f"{text} is not scored in {home.root}; `openlm evaluate {name}` does it")
        run = RunFolder(home.run(experiment.name, experiment.version))
        title = experiment.name if experiment.version == "v1" else f"{experiment.name} {experiment.version}"
        return Side(title, chosen, curve, run.read_metrics() if run.metrics_file.exists() else [])
    path = Path(text)
    folder = path.parent if path.name == CARD else path
    models = home.root / "scorecards" / "models"
    home.pull(models / text)
    found = [at for at in (folder, models / text) if (at / CARD).exists()][:1]
    found = found or sorted(card.parent for card in (models / text).glob(f"*/{CARD}"))
    if len(found) > 1:
        raise ConfigError(f"{text!r} has several scorecards; name one: {', '.join(map(str, found))}")
    if not found:
        raise ConfigError(
            f"{text!r} is no recipe (`openlm recipes`), no model scored in {models}, and no folder with a {CARD}"
        )
    card = _card(found[0])
    one = {None: found[0]}
    return Side(f"{card.run} {card.milestone}" if card.milestone else card.run, one, one, [])


def compare_sides(a: Side, b: Side) -> "Comparison":
    """Compare two runs at the last milestone that both have, and their headline at each; others as they are.

    Raises:
        MissingInputError: two runs have no scored milestone at equal tokens.
        DataError: they were not scored alike.
    """
    from openlm_pipeline.reports.compare import compared

    if len(a.folders) > 1 and len(b.folders) > 1:
        common = sorted(a.folders.keys() & b.folders.keys())
        if not common:
            had = "; ".join(f"{s.name}: {', '.join(format_tokens(t) for t in s.folders)}" for s in (a, b))
            raise MissingInputError(f"no milestone of equal tokens is scored for both ({had}); name two: RUN@MILESTONE")
        return compared([(a.scored(tokens), b.scored(tokens)) for tokens in common])
    return compared([(a.scored(list(a.folders)[-1]), b.scored(list(b.folders)[-1]))])


def comparison_page(a: Side, b: Side, found: "Comparison") -> str:
    """An HTML page: the table, and the curves of both."""
    from openlm_pipeline.reports.render import compare_page

    cards = {s.name: [_card(folder) for folder in s.curve.values()] for s in (a, b)}
    return compare_page(found, cards, {s.name: s.metrics for s in (a, b)})
