"""A study: a YAML beside the recipes that stands for a family of them.

`NAME.study.yaml` says which sizes, token budgets, settings and seeds of a base recipe to train. It expands to ordinary
recipes, which are saved in `OPENLM_HOME/recipes` and are runs like any others. All budgets of a size share one trunk at
a constant rate, of which each is a fork that cools down: to 5, 10, 20, 40 and 80 tokens a parameter are 87.5 units of
work, not 155.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from openlm_pipeline.errors import ConfigError, nearest
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.experiments.load import STUDY, apply_overrides, check_document, recipe_paths, study_paths
from openlm_pipeline.experiments.spec import Name, Tokens
from openlm_pipeline.models import count_parameters
from openlm_pipeline.storage.files import write_text
from openlm_pipeline.storage.home import Home
from openlm_pipeline.strict import Strict, explain, read_mapping
from openlm_pipeline.units import format_tokens, milestone_label

MADE_BY = "# Made by `openlm study`, which writes it again: change the study instead.\n"
_LONGEST_NAME = 60


class LogRange(Strict):
    """Values at equal ratios."""

    log: tuple[float, float]
    """The first and the last."""
    count: int = Field(ge=2)

    @property
    def values(self) -> list[float]:
        low, high = self.log
        ratio = (high / low) ** (1 / (self.count - 1))
        return [float(f"{low * ratio**i:.4g}") for i in range(self.count)]

    @model_validator(mode="after")
    def _positive(self) -> "LogRange":
        if min(self.log) <= 0:
            raise ValueError("log needs two positive numbers")
        return self


class Size(Strict):
    """A model of the study."""

    label: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    model: dict[str, Any]
    """Changes of the base recipe's `model`."""
    set: dict[str, Any] = {}
    """Other settings of this size, by dotted keys: `training.lr`."""


class Target(Strict):
    """A run to predict."""

    model: str | dict[str, Any] | None = None
    """By default the largest of the study."""
    tokens: Annotated[Tokens, Field(ge=1)] | None = None
    tokens_per_parameter: float | None = Field(default=None, gt=0)
    recipe: str | None = None
    """Whose last milestone it is: once that is there, the prediction is compared with it."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Target":
        if self.recipe is None and (self.tokens is None) == (self.tokens_per_parameter is None):
            raise ValueError("give tokens, or tokens_per_parameter, or a recipe")
        return self


class Study(Strict):
    """A family of runs. All but `description`, `predict` and `budget_gpu_hours` say which."""

    name: Name
    description: str = ""
    base: str = Field(min_length=1)
    """The recipe that they all extend."""
    models: tuple[Size, ...] = Field(min_length=1)
    """Names of models, shapes such as `{hidden_dim: 64, n_layers: 2}`, or `{label, model, set}`."""
    tokens_per_parameter: tuple[Annotated[float, Field(gt=0)], ...] = ()
    tokens: tuple[Annotated[Tokens, Field(ge=1)], ...] = ()
    """Budgets of each size: these, or as many as parameters, embeddings included, times each of those."""
    cooldown: float = Field(default=0.1, ge=0, lt=1)
    """Share of a budget over which the rate falls to `lr_min`, in a fork of the size's trunk; 0 trains at a constant
    rate throughout, and budgets are milestones of one run."""
    vary: dict[str, tuple[Any, ...] | LogRange] = {}
    """Dotted keys of a recipe, and the values of each."""
    combine: Literal["grid", "list"] = "grid"
    """Each value with each of the others, or the first of all, then the second of all."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    seeds_of: Literal["all", "smallest"] = "smallest"
    """Which sizes are trained with all seeds; the others with the first. What seeds do is the noise floor."""
    set: dict[str, Any] = {}
    """Settings of all runs, by dotted keys."""
    predict: Target | None = None
    budget_gpu_hours: float | None = Field(default=None, ge=0)
    """Over which `openlm study run` wants `--yes`."""

    @field_validator("models", mode="before")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        return [_as_size(item) for item in value] if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _sensible(self) -> "Study":
        if bool(self.tokens) == bool(self.tokens_per_parameter):
            raise ValueError("give tokens or tokens_per_parameter")
        for values in (self.tokens, self.tokens_per_parameter, [s.label for s in self.models], self.seeds):
            if len(set(values)) < len(values):
                raise ValueError(f"{values} has something twice")
        reserved = {"model", "seed", "milestones", "name", "version", "parent", "training.schedule", "training.decay"}
        if taken := reserved & {*self.vary, *self.set}:
            raise ValueError(f"{', '.join(sorted(taken))}: the study itself sets that")
        lengths = {len(_values(v)) for v in self.vary.values()}
        if self.combine == "list" and len(lengths) > 1:
            raise ValueError("with `combine: list` all that varies needs as many values")
        return self

    def combinations(self) -> list[dict[str, Any]]:
        """What varies, one dict of dotted keys for each combination."""
        columns = [[(key, value) for value in _values(values)] for key, values in self.vary.items()]
        return [dict(row) for row in (itertools.product(*columns) if self.combine == "grid" else zip(*columns))] or [{}]


def _as_size(item: Any) -> Any:
    if isinstance(item, str):
        return {"label": re.sub(r"\W", "_", item.removeprefix("open_lm_")), "model": {"name": item}}
    if isinstance(item, dict) and "model" not in item:
        shape = [f"{short}{item[key]}" for key, short in _SHORT.items() if key in item]
        return {"label": "_".join(shape) or "size", "model": item}
    return item


_SHORT = {"name": "", "hidden_dim": "d", "n_layers": "l", "n_heads": "h"}


def _values(values: tuple[Any, ...] | LogRange) -> list[Any]:
    return values.values if isinstance(values, LogRange) else list(values)


@dataclass(frozen=True)
class StudyRun:
    """A recipe of a study."""

    experiment: Experiment
    text: str
    """Of its file."""
    size: str
    """Label of its model."""
    settings: Mapping[str, Any]
    """What varies."""
    budget: int | None
    """Tokens at which it is a point of the study; None of a trunk that is no point itself."""

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def parameters(self) -> int:
        return count_parameters(self.experiment.model_config_resolved())

    @property
    def label(self) -> str:
        """Of the milestone that is its point."""
        return milestone_label(self.budget)


def load_study(name: str) -> Study:
    """The study of a name, or of a file `NAME.study.yaml`.

    Raises:
        ConfigError: there is none, or a key or value in it is wrong; names the file and its line.
    """
    known = study_paths()
    path = Path(name) if name.endswith(STUDY) else known.get(name)
    if path is not None and path.name.removesuffix(STUDY) in recipe_paths():
        raise ConfigError(f"study {path} has the name of a recipe; give it another")
    if path is None or not path.is_file():
        raise ConfigError(f"there is no study {name!r}; {nearest(name, known)}")
    document = read_mapping(path)
    try:
        study = Study(**{"name": path.name.removesuffix(STUDY), **document})
    except ValidationError as e:
        raise explain(e, f"study {path}", [(path, path.read_text(encoding="utf-8"))]) from e
    if study.name != path.name.removesuffix(STUDY):
        raise ConfigError(f"study {path} is named {study.name!r}; a study's name is its file's name")
    return study


def expand(study: Study) -> list[StudyRun]:
    """All recipes of a study, each trunk before its forks, the sizes from small to large.

    Raises:
        ConfigError: there is no such base, or a setting makes no recipe; names the recipe.
    """
    base = load_experiment(study.base)
    if "name" not in base.model and (named := [s.label for s in study.models if "name" in s.model]):
        raise ConfigError(
            f"study {study.name}: {study.base} gives its model as a shape, so that {', '.join(named)} can't be named; "
            "give shapes, such as {hidden_dim: 64, n_layers: 2, n_heads: 2}"
        )
    families = []
    for size in study.models:
        for settings in study.combinations():
            parameters = count_parameters(_probe(study, size, settings).model_config_resolved())
            families.append((parameters, size, settings))
    families.sort(key=lambda family: family[0])
    smallest = families[0][0]
    runs: list[StudyRun] = []
    for parameters, size, settings in families:
        seeds = study.seeds if study.seeds_of == "all" or parameters == smallest else study.seeds[:1]
        for seed in seeds:
            runs += _family(study, size, settings, seed, parameters)
    if without := [run.name for run in runs if run.budget is not None and not run.experiment.validation]:
        raise ConfigError(
            f"study {study.name} compares losses on held-out text, and {without[0]} has none: give {study.base} a "
            "`validation`, or the study a `set: {validation: {source: {...}}}`"
        )
    names = [run.name for run in runs if run.budget is None or study.cooldown]
    if len(set(names)) < len(names):
        raise ConfigError(f"study {study.name}: two runs would have one name; give the sizes labels of their own")
    return runs


def target_experiment(study: Study) -> Experiment:
    """The run that a study predicts: its recipe, or one of its own with the model that is asked for.

    Raises:
        ConfigError: there is no such recipe or model.
    """
    target = study.predict
    if target.recipe is not None:
        return load_experiment(target.recipe)
    size = Size(**_as_size(target.model)) if target.model is not None else _largest(study)
    return _probe(study, size)


def target_of(study: Study) -> tuple[int, int] | None:
    """Parameters and tokens of the run that a study predicts.

    Raises:
        ConfigError: its model or recipe is none.
    """
    if study.predict is None:
        return None
    experiment = target_experiment(study)
    parameters = count_parameters(experiment.model_config_resolved())
    if study.predict.recipe is not None:
        return parameters, experiment.milestones[-1]
    return parameters, study.predict.tokens or round(study.predict.tokens_per_parameter * parameters)


def is_study(name: str) -> bool:
    """Whether this names a study and not a recipe."""
    return name.endswith(STUDY) or name in study_paths()


def _largest(study: Study) -> Size:
    return max(study.models, key=lambda size: count_parameters(_probe(study, size).model_config_resolved()))


def _probe(study: Study, size: Size, settings: Mapping[str, Any] = {}) -> Experiment:
    """A recipe with the model and settings, for what these say."""
    return _made(_document(study, size, settings, study.seeds[0], [], []))[0]


def _family(study: Study, size: Size, settings: Mapping[str, Any], seed: int, parameters: int) -> Iterator[StudyRun]:
    """The trunk of a size and its forks."""
    batch = _probe(study, size, settings).training.global_batch
    wanted = study.tokens or [ratio * parameters for ratio in study.tokens_per_parameter]
    budgets = sorted({max(1, round(tokens / batch)) * batch for tokens in wanted})
    if not study.cooldown:
        trunk = _document(study, size, settings, seed, budgets, ["training.schedule=constant"])
        for budget in budgets:
            yield StudyRun(*_made(trunk), size.label, settings, budget)
        return
    decays = {budget: max(1, math.ceil(study.cooldown * budget / batch)) * batch for budget in budgets}
    starts = sorted({budget - decay for budget, decay in decays.items()})
    constant = ["training.schedule=constant", "evaluation=null"]
    if starts[0] < batch:
        raise ConfigError(
            f"study {study.name}: the budget of {format_tokens(budgets[0])} tokens of {size.label} is too few steps of "
            f"{format_tokens(batch)} to cool down in; give more tokens, or a smaller training.global_batch"
        )
    trunk = _document(study, size, settings, seed, starts, constant)
    yield StudyRun(*_made(trunk), size.label, settings, None)
    for budget in budgets:
        begin = {"run": trunk["name"], "version": trunk["version"], "milestone": budget - decays[budget]}
        changes = ["training.schedule=wsd", f"training.decay={decays[budget]}", "training.warmup=0"]
        fork = _document(study, size, settings, seed, [budget], changes)
        fork |= {"name": f"{trunk['name']}_{_tokens(budget)}", "parent": begin}
        fork["description"] = f"{trunk['description']}, cooled down to {format_tokens(budget)} tokens"
        yield StudyRun(*_made(fork), size.label, settings, budget)


def _tokens(tokens: int) -> str:
    return format_tokens(tokens, 4).lower().replace(".", "p")


def _document(
    study: Study, size: Size, settings: Mapping[str, Any], seed: int, milestones: list[int], changes: list[str]
) -> dict[str, Any]:
    """A recipe as it stands in its file."""
    told = [f"{key.rpartition('.')[2]} {value}" for key, value in settings.items()]
    named = [study.name, size.label, *(re.sub(r"\W+", "_", word.lower()) for word in told)]
    if seed != study.seeds[0]:
        named.append(f"s{seed}")
        told.append(f"seed {seed}")
    name = re.sub(r"_+", "_", "_".join(named))
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    document: dict[str, Any] = {
        "extends": study.base,
        "name": name,
        "version": "v1",
        "study": study.name,
        "description": ", ".join([f"study {study.name}: {size.label}", *told]),
        "model": dict(size.model),
        "seed": seed,
        **({"milestones": milestones} if milestones else {}),
    }
    for key, value in {**study.set, **size.set, **settings}.items():
        document = apply_overrides(document, [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}"])
    return apply_overrides(document, changes)


def _made(document: dict[str, Any]) -> tuple[Experiment, str]:
    path = Home.from_env().root / "recipes" / f"{document['name']}.yaml"
    return check_document(document, path), MADE_BY + yaml.safe_dump(document, sort_keys=False)


def save_recipes(runs: list[StudyRun]) -> list[Path]:
    """Write the recipes of a study that are not there as they are; their paths.

    Raises:
        ConfigError: a file of one's name is no study's.
    """
    folder, written = Home.from_env().root / "recipes", []
    for run in runs:
        path = folder / f"{run.name}.yaml"
        there = path.read_text(encoding="utf-8") if path.exists() else None
        if there is not None and not there.startswith(MADE_BY):
            raise ConfigError(f"there is a recipe {path} already, which no study made; move it, or rename the study")
        if there != run.text:
            write_text(path, run.text)
            written.append(path)
    return written
