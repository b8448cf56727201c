"""Find and load recipes: YAML files with `extends`, `${VAR:-default}` and `key=value` overrides."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from openlm_pipeline.errors import ConfigError, nearest, public
from openlm_pipeline.experiments.spec import Experiment
from openlm_pipeline.storage.home import Home
from openlm_pipeline.strict import Origin, expand_variables, explain, place, read_mapping

SHIPPED = Path(__file__).parent / "recipes"
SHIPPED_STUDIES = Path(__file__).parent / "studies"
SCHEMA = Path(__file__).parent / "recipe.schema.json"
STUDY = ".study.yaml"
"""How the name of a file ends that stands for a family of recipes, see `studies.study`."""


def recipe_paths() -> dict[str, Path]:
    """Recipe name -> file: the shipped ones, then those of the user, which may take the place of a shipped one.

    Of two files of the user that share a name it is the first; `lost_files` names the other.
    """
    found = {path.stem: path for path in reversed(_user_files())}
    shipped = {path.stem: path for path in SHIPPED.glob("*.yaml") if path.stem not in found}
    return dict(sorted(shipped.items())) | dict(sorted(found.items()))


def study_paths() -> dict[str, Path]:
    """Study name -> file: the shipped ones, then those beside the recipes of the user, in place of a shipped one."""
    folders = [SHIPPED_STUDIES, *(folder for folder in reversed(user_folders()) if _readable(folder))]
    return {path.name.removesuffix(STUDY): path for folder in folders for path in sorted(folder.glob(f"*{STUDY}"))}


def _recipes_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.yaml")) if not path.name.endswith(STUDY)]


def lost_files() -> dict[Path, str]:
    """What stands for no recipe, and why: folders of `OPENLM_RECIPES` that do not exist, files whose name is taken."""
    named, paths = _folders_of_variable(), recipe_paths()
    lost = {f: f"OPENLM_RECIPES names {f}, which is not a folder to read" for f in named if not _readable(f)}
    taken = {p: f"two recipes are named {p.stem}: {paths[p.stem]}, which is used, and {p}" for p in _user_files()}
    return lost | {path: why for path, why in taken.items() if path not in paths.values()}


def _folders_of_variable() -> list[Path]:
    return [Path(p) for p in os.environ.get("OPENLM_RECIPES", "").split(":") if p]


def user_folders() -> list[Path]:
    """The folders of `OPENLM_RECIPES`, `:` between them, and `recipes` under `OPENLM_HOME`."""
    return [*_folders_of_variable(), Home.from_env().root / "recipes"]


def _readable(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK) and folder.is_dir()


def _user_files() -> list[Path]:
    folders = {os.path.realpath(folder): folder for folder in user_folders() if _readable(folder)}
    return [path for folder in folders.values() for path in _recipes_in(folder)]


def recipe_names() -> list[str]:
    return list(recipe_paths())


def _find(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not os.path.isfile(path):  # noqa: PTH113 - pathlib raises for a name that is too long
            raise ConfigError(f"there is no recipe file {path}")
        return path
    known = recipe_paths()
    if recipe not in known:
        is_folder = os.path.isdir(recipe)  # noqa: PTH112
        hint = "it is a folder" if is_folder else nearest(recipe, known, "known")
        raise ConfigError("; ".join([f"there is no recipe {recipe!r}; {hint}", *lost_files().values()]))
    return known[recipe]


def _merge(base: Any, top: Any) -> Any:
    if isinstance(base, list) and isinstance(top, dict) and {str(k) for k in top} <= {str(i) for i in range(len(base))}:
        base = {str(i): value for i, value in enumerate(base)}
        return list(_merge(base, {str(i): value for i, value in top.items()}).values())
    if isinstance(base, dict) and isinstance(top, dict):
        return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in top.items()}}
    return top


def _read(path: Path, files: list[Origin]) -> dict[str, Any]:
    """The document of a file and of what it extends; `files` grows by those that were read."""
    document = read_mapping(path)
    files.append((path, path.read_text(encoding="utf-8")))
    return _extended(document, path, files)


def _extended(document: dict[str, Any], path: Path, files: list[Origin]) -> dict[str, Any]:
    base = document.get("extends")
    document = {key: value for key, value in document.items() if key != "extends"}
    if not base:
        return document
    try:
        if not isinstance(base, str):
            raise ConfigError("it must be the name or the path of one recipe")
        found = _base(base, path)
        if found in (read := [path for path, _ in files]):
            raise ConfigError(f"recipes extend each other in a circle: {' -> '.join(map(str, [*read, found]))}")
    except ConfigError as e:
        raise ConfigError(f"{path} extends {base!r}: {e}{place(files[-1:], ['extends'])}") from e
    return _merge(_read(found, files), document)


def _base(base: str, path: Path) -> Path:
    """The file that a recipe extends: a path from its own, or a recipe's name; of its own name the shipped one."""
    if base.endswith((".yaml", ".yml")):
        found = (path.parent / base).resolve()
        if not os.path.exists(found):  # noqa: PTH110
            raise ConfigError(f"there is no file {found}")
        return found
    return SHIPPED / f"{base}.yaml" if base == path.stem else _find(base)


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted keys: `training.lr=1e-3`, `milestones=[1M,2M]`, `sources.0.name=text`; values are YAML.

    Raises:
        ConfigError: not of the form key=value, or the value is not YAML.
    """
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item!r} is not an override of the form key=value, such as training.lr=1e-3")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as e:
            raise ConfigError(f"the value of {key} is not valid YAML: {' '.join(str(e).split())}") from e
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        document = _merge(document, nested)
    return document


Check = Callable[[Experiment], None]


def load_experiment(recipe: str, overrides: Sequence[str] = (), check: Check = lambda experiment: None) -> Experiment:
    """The experiment of a recipe's name or YAML file, with overrides applied.

    Args:
        check: raises a `ConfigError` that begins with the key that is wrong, to which its place is added.

    Raises:
        ConfigError: no such recipe, bad YAML, an unknown key, a bad value; each names the file, its line or the
            override, and the field.
    """
    path = _find(recipe)
    experiment = check_document(read_mapping(path), path, overrides, check)
    if experiment.name != path.stem and path in recipe_paths().values():
        where = place([(path, path.read_text(encoding="utf-8"))], ["name"])
        raise ConfigError(f"recipe {path} is named {experiment.name!r}; a recipe's name is its file's name{where}")
    return experiment


def check_document(
    document: dict[str, Any], path: Path, overrides: Sequence[str] = (), check: Check = lambda experiment: None
) -> Experiment:
    """The experiment of a recipe that is, or is yet to be, the file `path`.

    Raises:
        ConfigError: as `load_experiment`.
    """
    files: list[Origin] = [(path, path.read_text(encoding="utf-8") if path.exists() else "")]
    changes = [
        (f"override {public(item)}", yaml.safe_dump(apply_overrides({}, [item]))) for item in reversed(overrides)
    ]
    whole = apply_overrides(_extended(document, path, files), overrides)
    try:
        check(experiment := Experiment.model_validate(expand_variables(whole, path)))
        return experiment
    except ValidationError as e:
        raise explain(e, f"recipe {path}", [*changes, *files]) from e
    except ConfigError as e:
        text = str(e) if str(path) in str(e) else f"recipe {path}: {e}"
        inside = str(e).partition(" ")[0].strip(":").split(".")  # `model is not valid: ...` and the like
        raise ConfigError(text + place([*changes, *files], inside, str(e))) from e
