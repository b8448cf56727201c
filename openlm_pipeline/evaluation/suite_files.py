"""Suite files as people have them, read into one form: ours, OpenLM's `in_memory_hf_eval.yaml`, LLM Foundry's.

A key that changes scores is followed or refused; one that only says how to run is left out and named. Checking the
tasks themselves is `suite.py`'s.
"""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from openlm_pipeline.errors import ConfigError, nearest
from openlm_pipeline.strict import Strict, expand_variables, explain, read_mapping

SHIPPED = Path(__file__).parent / "suites"
_RANDOM_BASELINES = Path(__file__).parent / "baselines" / "random_v1.yaml"
_HOW_TO_RUN = frozenset(
    [
        "callbacks",
        "console_log_interval",
        "dataset",
        "device_eval_batch_size",
        "dist_timeout",
        "epoch",
        "fsdp_config",
        "load_path",
        "log_config",
        "loggers",
        "metadata",
        "model",
        "model_name",
        "model_name_or_path",
        "models",
        "num_params",
        "precision",
        "python_log_level",
        "run_name",
        "seed",
        "tokenizer",
        "tokenizer_name",
        "variables",
    ]
)
"""Top keys that change no score: models and precision are arguments here, and nothing scored is drawn by `seed`."""
_CHANGES_SCORES = {
    "code_paths": None,
    "eval_loader": None,
    "eval_loaders": None,
    "eval_subset_num_batches": -1,
    "icl_subset_num_batches": None,
}
"""Top keys that this harness does not follow -> the value that asks for nothing."""
_OTHER_NAMES = {"icl_tasks_str": "icl_tasks", "eval_gauntlet_str": "eval_gauntlet"}
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")
_MISSING = object()


class _Benchmark(Strict):
    name: str
    num_fewshot: Annotated[int, Field(ge=0)]
    random_baseline: float | None = None


class _Category(Strict):
    name: str
    benchmarks: tuple[_Benchmark, ...] = Field(min_length=1)


class _Gauntlet(Strict):
    """LLM Foundry's `eval_gauntlet`, as far as its scores are those of `Suite.categories`."""

    weighting: Literal["EQUAL"] = "EQUAL"
    subtract_random_baseline: Literal[True] = True
    rescale_accuracy: Literal[True] = True
    averages: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    categories: tuple[_Category, ...] = Field(min_length=1)


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def suite_path(name_or_path: str) -> Path:
    """The file of a shipped suite's name, or a path that ends in .yaml or .yml.

    Raises:
        ConfigError: there is no such suite or file.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not os.path.isfile(path):  # noqa: PTH113 - pathlib raises for a name that is too long
            local = "; a suite is a file of this machine, which may name questions in a store"
            raise ConfigError(f"there is no suite file {name_or_path}{local if '://' in name_or_path else ''}")
        return path
    if name_or_path not in suite_names():
        hint = nearest(name_or_path, suite_names(), "known")
        raise ConfigError(f"there is no suite {name_or_path!r}, and one of your own is given by its .yaml path; {hint}")
    return SHIPPED / f"{name_or_path}.yaml"


def read_suite_file(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of a `Suite`, and the top keys that only said how to run.

    Followed beside a suite's own fields:
    `base: NAME` starts from a shipped suite, with `overrides: {task label: {key: value}}`.
    `icl_tasks` may be, or have among its entries, the path of a YAML file with `icl_tasks`, and `eval_gauntlet` that of
    one with it; they start at the working folder, or at the folder of this file or one above it.
    `max_seq_len` is that of the tasks that have none.
    `${key}` and `${key.key}` are values of the same file, as in OmegaConf; other names are environment variables,
    and begin with OPENLM_.

    Raises:
        ConfigError: bad YAML, a key that would change scores and is not followed, or a file or value that is not there.
    """
    whole = read_mapping(path)
    whole = {_OTHER_NAMES.get(key, key): value for key, value in whole.items() if value is not None}
    for key, nothing in _CHANGES_SCORES.items():
        if whole.pop(key, nothing) not in (nothing, []):
            raise ConfigError(f"{path}: {key} would change what is scored, and is not followed here; leave it out")
    ignored = tuple(key for key in whole if key in _HOW_TO_RUN)
    kept = {key: value for key, value in whole.items() if key not in _HOW_TO_RUN}
    document: dict[str, Any] = expand_variables(_resolve(kept, whole, path), path, "OPENLM_")

    if base := document.pop("base", None):
        inherited, _ = read_suite_file(suite_path(str(base)))
        document = {**{key: value for key, value in inherited.items() if key != "name"}, **document}
    tasks = _tasks(document.get("icl_tasks"), path)
    overrides, length = document.pop("overrides", {}), document.pop("max_seq_len", None)
    if isinstance(tasks, list) and all(isinstance(task, dict) for task in tasks):
        labels = [str(task.get("label")) for task in tasks]
        if not isinstance(overrides, dict) or not all(isinstance(o, dict) for o in overrides.values()):
            raise ConfigError(f"{path}: overrides has not the form {{task label: {{key: value}}}}")
        if unknown := [label for label in overrides if label not in labels]:
            raise ConfigError(f"{path}: overrides name {unknown[0]!r}, which is not a task")
        default = {} if length is None else {"max_seq_len": length}
        tasks = [{**default, **task, **overrides.get(label, {})} for label, task in zip(labels, tasks)]
    if (gauntlet := document.pop("eval_gauntlet", None)) is not None:
        document["categories"] = {**_categories(gauntlet, path), **document.get("categories", {})}
    return {**document, **({} if tasks is None else {"icl_tasks": tasks})}, ignored


def _resolve(value: Any, whole: dict[str, Any], path: Path, within: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {k: _resolve(v, whole, path, within) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolve(v, whole, path, within) for v in value]
    if not isinstance(value, str):
        return value

    def found(match: re.Match[str]) -> Any:
        name = match[1]
        if name in within:
            raise ConfigError(f"{path}: ${{{name}}} refers to itself")
        target: Any = whole
        for part in name.split("."):
            target = target.get(part, _MISSING) if isinstance(target, dict) else _MISSING
        if target is not _MISSING:
            return _resolve(target, whole, path, (*within, name))
        if "." in name:  # no environment variable has a dot
            raise ConfigError(f"{path}: ${{{name}}} names nothing in this file")
        return match[0]

    if match := _REFERENCE.fullmatch(value):
        return found(match)
    return _REFERENCE.sub(lambda m: str(found(m)), value)


def _named_file(name: str, path: Path, key: str) -> Any:
    """The value of `key` in the YAML file that a suite file names."""
    places = (folder / name for folder in (Path(), *path.absolute().parents))
    found = [place for place in places if os.path.isfile(place)]  # noqa: PTH113
    if not found:
        raise ConfigError(
            f"{path}: {key} names {name}, which is neither below the working folder nor below the folder of this file "
            "or one above it"
        )
    document, _ = read_suite_file(found[0]) if key == "icl_tasks" else (read_mapping(found[0]), ())
    if key not in document:
        raise ConfigError(f"{found[0]} has no {key}, which {path} takes from it")
    return document[key]


def _tasks(tasks: Any, path: Path) -> Any:
    """The tasks with those of named files in place of their names; what is no list is left for the suite to refuse."""
    entries = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(entries, list):
        return entries
    lists = [_named_file(entry, path, "icl_tasks") if isinstance(entry, str) else [entry] for entry in entries]
    return [task for part in lists for task in part]


def _categories(gauntlet: Any, path: Path) -> dict[str, tuple[str, ...]]:
    """`Suite.categories` of LLM Foundry's `eval_gauntlet`; its averages and baselines must be those that we have."""
    if isinstance(gauntlet, str):
        gauntlet = _named_file(gauntlet, path, "eval_gauntlet")
    try:
        parsed = _Gauntlet.model_validate(gauntlet)
    except ValidationError as e:
        raise explain(e, f"eval_gauntlet of {path}") from e
    names = {category.name for category in parsed.categories}
    if partial := [name for name, members in parsed.averages.items() if set(members) != names]:
        raise ConfigError(
            f"{path}: eval_gauntlet's average {partial[0]!r} is not over all its categories; only that one is made here"
        )
    known = read_mapping(_RANDOM_BASELINES)["baselines"]
    for benchmark in (b for category in parsed.categories for b in category.benchmarks):
        ours = known.get(benchmark.name)
        if benchmark.random_baseline is not None and (
            ours is None or not math.isclose(ours, benchmark.random_baseline)
        ):
            raise ConfigError(
                f"{path}: eval_gauntlet has the random baseline {benchmark.random_baseline} for {benchmark.name}, but "
                f"version v1 has {'none' if ours is None else ours} ({_RANDOM_BASELINES.name}). Leave that key out to "
                "use v1's, or 1 over the number of options where it has none"
            )
    return {c.name: tuple(f"{b.name}/{b.num_fewshot}-shot" for b in c.benchmarks) for c in parsed.categories}
