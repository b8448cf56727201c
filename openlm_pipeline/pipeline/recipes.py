"""All recipes together: those that load and agree with each other, and why the others do not count."""

import keyword
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from openlm_pipeline.errors import ConfigError, OpenLMError
from openlm_pipeline.evaluation.suite import load_suite
from openlm_pipeline.experiments import Dataset, Experiment, load_experiment, recipe_paths
from openlm_pipeline.experiments.load import SHIPPED, lost_files

DERIVE = "derive"
"""The job that saves a recipe."""
SAVE = "new_recipe"
"""Its step."""
_DAGSTERS = "arg_dict bool conf config context dict float input input_arg_dict int meta output output_arg_dict str type"
RESERVED = frozenset([DERIVE, SAVE, "preflight", *_DAGSTERS.split(), *keyword.kwlist])
"""What no job of a recipe can be called."""
_RESERVED: dict[str, tuple[Any, str]] = {f"job {name}": (None, "the graph") for name in RESERVED}


def load_recipes(only: Sequence[str] = ()) -> tuple[list[Experiment], dict[str, str]]:
    """The recipes, the shipped ones first, and what is not loaded: its name, or its path where it has none -> why.

    Of two that disagree the one is left out whose file was written later, and no shipped one.

    Args:
        only: patterns of names, such as `pretrain_*`, of which one must fit; by default all do.
    """
    paths, suites, meanings = recipe_paths(), cache(load_suite), dict(_RESERVED)
    names = sorted(paths, key=lambda n: (paths[n].parent != SHIPPED and paths[n].lstat().st_mtime_ns, n))
    chosen = [name for name in names if not only or any(fnmatchcase(name, pattern) for pattern in only)]
    loaded, not_loaded = [], {str(path): why for path, why in lost_files().items()}

    def check(experiment: Experiment) -> None:
        try:
            suites(experiment.evaluation.suite) if experiment.evaluation else None
        except ConfigError as e:
            raise ConfigError(f"evaluation.suite: {e}") from e

    for name in [*chosen, *(pattern for pattern in only if not any(fnmatchcase(name, pattern) for name in names))]:
        try:
            experiment = load_experiment(name, check=check)
            _agree(experiment, meanings)
            loaded.append(experiment)
        except Exception as e:  # noqa: BLE001 - whatever is in one file, the others load, and their jobs go on
            not_loaded[name] = str(e) if isinstance(e, OpenLMError) else f"{type(e).__name__}: {e}"
    return loaded, not_loaded


def check_beside(experiment: Experiment) -> None:
    """Refuse a new recipe that would not load beside the others.

    Raises:
        ConfigError: it uses a name that means something else in another recipe.
    """
    meanings = dict(_RESERVED)
    for other in [*(e for e in load_recipes()[0] if e.name != experiment.name), experiment]:
        _agree(other, meanings)


def _agree(experiment: Experiment, known: dict[str, tuple[Any, str]]) -> None:
    """Add what an experiment means by names to what is known: the meaning, and who says so.

    Raises:
        ConfigError: a name means something else already.
    """
    if "__" in experiment.name:
        raise ConfigError(f"recipe {experiment.name}: steps of the graph have __ in their names, recipes do not")
    meanings = list(_meanings(experiment))
    other = {name: key for name, meaning, key in meanings if known.get(name, (meaning,))[0] != meaning}
    if other:
        owner, keys = known[next(iter(other))][1], dict.fromkeys(other.values())
        raise ConfigError(
            f"{owner} and recipe {experiment.name} mean different things by {', '.join(other)}; in "
            f"{experiment.name} give other names: {' '.join(f'{key}=NAME' for key in keys)}"
        )
    known |= {name: known.get(name, (meaning, f"recipe {experiment.name}")) for name, meaning, _ in meanings}


def _meanings(experiment: Experiment) -> Iterator[tuple[str, Any, str]]:
    """What a recipe uses of the names that all recipes share: the name, its meaning, and the key that changes it."""
    run, scored, held_out = experiment.name, experiment.evaluation, experiment.validation
    yield f"tokenizer {experiment.tokenizer.name}", experiment.tokenizer, "tokenizer.name"
    keys = [f"sources.{i}.name" for i in range(len(experiment.sources))]
    if held_out:
        keys += [f"validation.sources.{i}.name" for i in range(len(held_out.sources))] or ["validation.source.name"]
    for dataset, key in zip(experiment.datasets(), keys, strict=True):
        yield f"dataset {dataset.name}", _content(dataset), key
        yield f"job tokenize_{dataset.name}", "tokenize", key
    for i, baseline in enumerate(scored.baselines if scored else ()):
        how = scored.model_dump(include={"suite", "backend", "precision"})
        yield f"baseline {baseline.name}", (baseline, how), f"evaluation.baselines.{i}.name"
        yield f"asset scorecard/baseline/{baseline.name}", "baseline", f"evaluation.baselines.{i}.name"
    for job in (run, f"{run}_checkpoints", f"evaluate_{run}", f"train_{run}"):
        yield f"job {job}", run, "name"
    for label, _ in experiment.labelled_milestones():
        yield f"asset scorecard/{run}/{label}", run, "name"


def _content(dataset: Dataset) -> dict[str, Any]:
    """What makes a dataset what it is: neither its share of a mixture nor how it is tokenized."""
    execution = ("engine", "verify_every", "shards_url", "keep_local_shards", "shard_cache_bytes")
    return dataset.model_dump(exclude={"source": {"weight"}, **dict.fromkeys(execution, True)})
