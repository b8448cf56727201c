"""New recipes from others: derived ones, which change settings, and forks, which continue from a milestone."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment, apply_overrides, load_experiment, recipe_paths
from openlm_pipeline.experiments.load import check_document
from openlm_pipeline.pipeline.recipes import check_beside
from openlm_pipeline.storage.files import write_text
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens

_LONGEST_NAME = 64


@dataclass(frozen=True)
class NewRecipe:
    """A recipe that was found good, and its file, which `save` writes."""

    path: Path
    experiment: Experiment
    text: str

    def save(self) -> None:
        write_text(self.path, self.text)


def derive(recipe: str, overrides: Sequence[str], name: str | None = None) -> NewRecipe:
    """A recipe under `OPENLM_HOME` that extends another with settings changed; the same one again where it is there.

    Args:
        name: by default that of the recipe and the overrides, `demo_lr_2e_3`.

    Raises:
        ConfigError: there is no such recipe, a setting is wrong, another recipe has that name, or a name inside it
            means something else in another recipe.
    """
    folder = Home.from_env().root / "recipes"
    if recipe.endswith((".yaml", ".yml")):
        raise ConfigError(f"{recipe} is a file, and a recipe's name is needed: copy it to {folder}, which makes it one")
    load_experiment(recipe)
    last_keys = [re.sub(r"^[^=]*\.", "", item) for item in overrides]
    made = re.sub(r"[^a-z0-9]+", "_", "_".join([recipe, *last_keys]).lower()).strip("_")
    if len(made) > _LONGEST_NAME:
        made = f"{made[:_LONGEST_NAME]}_{hashlib.sha256(made.encode()).hexdigest()[:8]}"
    described = f"{recipe} with {', '.join(overrides)}" if overrides else recipe
    document = {"extends": recipe, "name": name or made, "version": "v1", "description": described}
    new = _new_recipe(document, overrides, folder)
    check_beside(new.experiment)
    return new


def _new_recipe(document: dict[str, Any], overrides: Sequence[str], folder: Path) -> NewRecipe:
    """
    Raises:
        ConfigError: a setting is wrong, or another recipe has that name.
    """
    whole = apply_overrides(document, overrides)
    path, text = folder / f"{whole['name']}.yaml", yaml.safe_dump(whole, sort_keys=False)
    there = recipe_paths().get(path.stem, path)
    if there.exists() and there.read_text() != text:
        raise ConfigError(f"there is a recipe {path.stem} already: {there}; give the new one another name")
    return NewRecipe(there, check_document(document, there, overrides), text)


def fork(
    recipe: str, milestone: int, name: str, overrides: Sequence[str], folder: Path, pinned: bool = False
) -> NewRecipe:
    """The recipe of a run that continues from a milestone of a recipe's run, with settings changed.

    The milestones are those of the recipe after that one, unless `overrides` have others. Another schedule begins at
    the rate where the recipe's own is then, and ends at the fork's last milestone, unless they say otherwise.

    Args:
        pinned: the run has a milestone there, whether the recipe has or not.

    Raises:
        ConfigError: the recipe has no such milestone or none after it, a setting is wrong, or the name is taken.
    """
    parent = load_experiment(recipe)
    if milestone not in parent.milestones and not pinned:
        have = ", ".join(format_tokens(t) for t in parent.milestones)
        raise ConfigError(f"{recipe} has no milestone at {format_tokens(milestone)} tokens; it has {have}")
    changed = apply_overrides({}, overrides)
    later = [format_tokens(t) for t in parent.milestones if t > milestone]
    if not later and "milestones" not in changed:
        raise ConfigError(f"{recipe} has no milestone after {format_tokens(milestone)}; give some: milestones=[...]")
    begin = {"run": parent.name, "version": parent.version, "milestone": format_tokens(milestone)}
    document = {
        "extends": recipe,
        "name": name,
        "version": "v1",
        "description": f"{recipe} from {format_tokens(milestone)} on"
        + (f", {', '.join(overrides)}" if overrides else ""),
        "milestones": later,
        "parent": {**begin, "optimizer": "keep", "schedule": "continue"},
    }
    training = changed.get("training", {})
    restarts = changed.get("parent", {}).get("schedule") == "restart"
    if training.get("schedule", parent.training.schedule) != parent.training.schedule and not restarts:
        last = parent.learning_rates(parent.start_tokens())(parent.steps(milestone) - 1)
        document["training"] = {"lr": float(f"{last:.6g}"), "horizon": None, "warmup": 0}
    return _new_recipe(document, overrides, folder)
