"""The recipe of a fork: what it extends, where it begins, and what is changed."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments.load import apply_overrides, load_experiment, recipe_paths
from openlm_pipeline.experiments.spec import Experiment
from openlm_pipeline.storage.files import write_text
from openlm_pipeline.units import format_tokens


def write_fork(
    recipe: str, milestone: int, name: str, overrides: Sequence[str], folder: Path, pinned: bool = False
) -> tuple[Path, Experiment]:
    """Write `NAME.yaml`: a run that continues from a milestone of a recipe's run, with settings changed.

    The milestones are those of the recipe after that one, unless `overrides` have others. Another schedule begins at
    the rate where the recipe's own is then, and ends at the fork's last milestone, unless they say otherwise.

    Args:
        pinned: the run has a milestone there, whether the recipe has or not.

    Returns:
        The file, and the experiment in it.

    Raises:
        ConfigError: the recipe has no such milestone or none after it, the name is taken, or a setting is wrong; no
            file is left then.
    """
    known = recipe_paths()
    if recipe not in known:
        raise ConfigError(f"there is no recipe {recipe!r}; known: {', '.join(known)}")
    if name in known:
        raise ConfigError(f"there is a recipe {name} already: {known[name]}")
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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    if path.exists():
        raise ConfigError(f"{path} is there already")
    write_text(path, yaml.safe_dump(apply_overrides(document, overrides), sort_keys=False))
    try:
        return path, load_experiment(str(path))
    except ConfigError:
        path.unlink()
        raise
