"""Find and load recipes: YAML files with `extends`, `${VAR:-default}` and `key=value` overrides."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments.spec import Experiment
from openlm_pipeline.strict import expand_variables, explain, read_mapping

SHIPPED = Path(__file__).parent / "recipes"


def recipe_paths() -> dict[str, Path]:
    """Recipe name -> file: the shipped ones, then those of the user, which may take the place of a shipped one.

    Raises:
        ConfigError: a folder of `OPENLM_RECIPES` does not exist, or two files in them share a name.
    """
    found: dict[str, Path] = {}
    for folder in user_folders():
        if not folder.is_dir():
            raise ConfigError(f"OPENLM_RECIPES names {folder}, which is not a folder")
        for path in sorted(folder.glob("*.yaml")):
            if path.stem in found:
                raise ConfigError(f"two recipes are named {path.stem}: {found[path.stem]} and {path}")
            found[path.stem] = path
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))} | found


def user_folders() -> list[Path]:
    """The folders of `OPENLM_RECIPES`, `:` between them."""
    return [Path(p) for p in os.environ.get("OPENLM_RECIPES", "").split(":") if p]


def recipe_names() -> list[str]:
    return list(recipe_paths())


def _find(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"there is no recipe file {path}")
        return path
    known = recipe_paths()
    if recipe not in known:
        near = difflib.get_close_matches(recipe, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"there is no recipe {recipe!r}; {hint}")
    return known[recipe]


def _merge(base: Any, top: Any) -> Any:
    if isinstance(base, dict) and isinstance(top, dict):
        return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in top.items()}}
    return top


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in seen:
        raise ConfigError(f"recipes extend each other in a circle: {' -> '.join(map(str, [*seen, path]))}")
    document = read_mapping(path)
    if base := document.pop("extends", None):
        document = _merge(_read(_base(base, path), (*seen, path)), document)
    return document


def _base(base: str, path: Path) -> Path:
    """The file that a recipe extends: a path from its own, or a recipe's name; of its own name the shipped one."""
    if base.endswith((".yaml", ".yml")):
        return (path.parent / base).resolve()
    return SHIPPED / f"{base}.yaml" if base == path.stem else _find(base)


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted keys: `training.lr=1e-3`, `milestones=[1M,2M]`; values are YAML.

    Raises:
        ConfigError: not of the form key=value, or the value is not YAML.
    """
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item!r} is not an override of the form key=value, such as training.lr=1e-3")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"the value of {key} is not valid YAML: {e}") from e
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        document = _merge(document, nested)
    return document


def load_experiment(recipe: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a recipe's name or YAML file, with overrides applied.

    Raises:
        ConfigError: no such recipe, bad YAML, an unknown key, a bad value; each names the file and the field.
    """
    path = _find(recipe)
    document = expand_variables(apply_overrides(_read(path), overrides), path)
    try:
        experiment = Experiment(**document)
    except ValidationError as e:
        raise explain(e, f"recipe {path}") from e
    except ConfigError as e:
        raise ConfigError(f"recipe {path}: {e}") from e
    if experiment.name != path.stem and path in recipe_paths().values():
        raise ConfigError(f"recipe {path} is named {experiment.name!r}; a recipe's name is its file's name")
    return experiment
