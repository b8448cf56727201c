"""Results of others as points: the records that Gadre et al. published, or a table in CSV or JSON lines.

exp_data of github mlfoundations/scaling: models/NAME.json has the losses, evals/evaluation_NAME_heavy.json the
accuracies. Batch and learning rate in there are not read: those of the 7B models contradict themselves.
"""

import csv
import json
import math
import operator
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError, nearest
from openlm_pipeline.studies.laws import Point
from openlm_pipeline.units import parse_tokens

TASKS_17 = tuple(
    """
    bigbench_operators pubmed_qa_labeled hellaswag_zeroshot boolq arc_easy coqa bigbench_dyck_languages lambada_openai
    bigbench_novel_concepts winograd bigbench_cs_algorithms commonsense_qa bigbench_qa_wikidata hellaswag copa squad
    piqa
    """.split()  # noqa: SIM905
)
"""Those that a 154M model does better than guessing (SUBSET in scaling/constants.py); there are 46 in all."""
_VALIDATION = "c4_val"
_FIELDS = ("parameters", "tokens", "loss", "loss_error", "error", "seed", "name", "dataset", "model")
_SETTING = "setting."


def read_published(folder: Path, *, tasks: int = 17) -> list[Point]:
    """All runs of a folder, or of one .csv or .jsonl file.

    A table has the columns parameters, tokens and loss, and as one likes loss_error, error, seed, name, dataset, model
    and `setting.X` for a setting X that was varied. Counts may be written as 1.4B.

    Args:
        tasks: of Gadre et al., over how many the error is averaged: 17 or 46.

    Raises:
        MissingInputError: there is nothing to read.
        DataError: a value is missing or wrong; file and field are named.
    """
    if records := sorted((folder / "models").glob("*.json")):
        return [_record(path, tasks) for path in records]
    files = [folder] if folder.is_file() else sorted(p for p in folder.glob("*") if p.suffix in (".csv", ".jsonl"))
    if not files:
        raise MissingInputError(f"{folder} holds no models/*.json of mlfoundations/scaling, no .csv and no .jsonl")
    return [point for path in files for point in _table(path)]


def _record(path: Path, tasks: int) -> Point:
    record = _json(path)
    sizes = _field(record, "hyperparameters", dict, path)
    results = _field(record, "results", list, path)
    found = [r for r in results if isinstance(r, dict) and _validation(r) == _VALIDATION]
    if len(found) != 1:
        raise DataError(f"{path}: results has {len(found)} losses on {_VALIDATION}, not one")
    lower, upper = (_field(found[0], f"loss_sequences_{end}_95", float, path) for end in ("lower", "upper"))
    dataset = _field(record, "dataset_name", str, path)
    return Point(
        name=path.stem,
        parameters=_field(sizes, "params", int, path),
        tokens=_field(sizes, "tokens", int, path),
        loss=_field(found[0], "loss", float, path),
        loss_error=(upper - lower) / (2 * 1.959964),
        error=_error(path.parent.parent / "evals" / f"evaluation_{path.stem}_heavy.json", tasks),
        dataset=dataset.removesuffix("_original"),
        model=path.stem.removeprefix(f"{dataset}-").rpartition("-")[0],
    )


def _validation(result: Mapping[str, Any]) -> str:
    """Name of the held-out text, which is the folder of its first file."""
    files = result.get("val_data")
    return PurePosixPath(str(files[0])).parent.name if isinstance(files, list) and files else ""


def _error(path: Path, tasks: int) -> float | None:
    """1 - the mean accuracy, not centred; None where the model was not scored."""
    if not path.exists():
        return None
    metrics = _field(_field(_json(path), "eval_metrics", dict, path), "icl", dict, path)
    names = TASKS_17 if tasks == 17 else sorted(metrics)
    if len(names) != tasks:
        raise DataError(f"{path}: icl has {len(names)} tasks, not {tasks}")
    return 1 - fmean(_field(metrics, name, float, path) for name in names)


def _table(path: Path) -> list[Point]:
    """The rows of a CSV, or of a file of JSON lines."""
    text = _text(path)
    if path.suffix == ".csv":
        rows = [(n, dict(row)) for n, row in enumerate(csv.DictReader(text.splitlines()), 2)]
    else:
        rows = [(n, _parsed(line, f"{path}:{n}")) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no runs")
    return [_row(row, f"{path}:{n}") for n, row in rows]


def _row(row: Mapping[str, Any], where: str) -> Point:
    values = {key: value for key, value in row.items() if value not in (None, "")}
    for key in values:
        if key not in _FIELDS and not str(key).startswith(_SETTING):
            raise DataError(f"{where}: unknown column {key!r}; {nearest(str(key), _FIELDS)}")
    settings = {k.removeprefix(_SETTING): _number(values, k, where) for k in values if k.startswith(_SETTING)}
    return Point(
        name=str(values.get("name", where.rpartition("/")[2])),
        parameters=_count(values, "parameters", where),
        tokens=_count(values, "tokens", where),
        loss=_number(values, "loss", where),
        loss_error=_number(values, "loss_error", where) if "loss_error" in values else None,
        error=_number(values, "error", where) if "error" in values else None,
        seed=int(_number(values, "seed", where)) if "seed" in values else 0,
        dataset=str(values.get("dataset", "")),
        model=str(values.get("model", "")),
        settings=settings,
    )


def _count(values: Mapping[str, Any], key: str, where: str) -> int:
    try:
        found = parse_tokens(values[key])
    except KeyError:
        raise DataError(f"{where}: {key} is missing") from None
    except ValueError:
        raise DataError(f"{where}: {key} is {values[key]!r}, not a whole number such as 79M or 1580000000") from None
    if not found:
        raise DataError(f"{where}: {key} is 0")
    return found


def _number(values: Mapping[str, Any], key: str, where: str) -> float:
    try:
        found = float(values[key])
    except KeyError:
        raise DataError(f"{where}: {key} is missing") from None
    except (TypeError, ValueError):
        raise DataError(f"{where}: {key} is {values[key]!r}, not a number") from None
    if not (0 < found < float("inf")) and not (found == 0 and key in ("seed", "error", "loss_error")):
        raise DataError(f"{where}: {key} is {values[key]!r}, not a positive number")
    return found


def _json(path: Path) -> dict[str, Any]:
    return _parsed(_text(path), str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as e:
        raise DataError(f"{where} is not valid JSON: {e}") from e
    if not isinstance(found, dict):
        raise DataError(f"{where} is not a JSON object")
    return found


def _field(record: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    value = record.get(key)
    wrong = isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind)
    if wrong or (kind in (int, float) and not (math.isfinite(value) and value >= 0)):
        raise DataError(f"{path}: {key} is {value!r}, not {'a number' if kind in (int, float) else kind.__name__}")
    return value


def of_dataset(points: list[Point], dataset: str | None) -> list[Point]:
    """Those of one dataset.

    Raises:
        ConfigError: there are several and none is named, or there is none of this name.
    """
    names = sorted({p.dataset for p in points})
    if dataset is None and len(names) > 1:
        raise ConfigError(f"these runs are of several datasets; choose one with --dataset: {', '.join(names)}")
    if dataset is not None and dataset not in names:
        raise ConfigError(f"there is no dataset {dataset!r}; {nearest(dataset, names)}")
    return [p for p in points if dataset in (None, p.dataset)]


_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": math.isclose}
_SELECTABLE = ("parameters", "tokens", "compute", "tokens_per_parameter", "loss", "seed")


def select(points: list[Point], selection: str, *, errors: bool = False) -> list[Point]:
    """Some of the runs.

    Args:
        selection: `all`; `small`, the design of Gadre et al.: the sizes under 500M at 20 tokens per parameter, and the
            smallest at 320; or conditions that all hold, such as `parameters<500M,tokens_per_parameter<=80`.
        errors: what `small` takes for the law of error: also the sizes up to 2B at 20.

    Raises:
        ConfigError: the selection is not understood, or selects nothing.
    """
    kept = points
    if selection == "small":
        smallest = min(p.parameters for p in points)
        at_20 = [p for p in points if p.parameters < (2e9 if errors else 5e8) and _near(p, 20)]
        kept = at_20 + [p for p in points if p.parameters == smallest and _near(p, 320)]
    elif selection != "all":
        for condition in selection.split(","):
            kept = [p for p in kept if _holds(p, condition.strip())]
    if not kept:
        raise ConfigError(f"--train {selection} selects none of the {len(points)} runs")
    return kept


def _near(point: Point, tokens_per_parameter: float) -> bool:
    return abs(point.tokens_per_parameter / tokens_per_parameter - 1) < 0.1


def _holds(point: Point, condition: str) -> bool:
    match = re.fullmatch(r"(\w+)\s*(<=|>=|<|>|=)\s*(\S+)", condition)
    if not match:
        raise ConfigError(f"--train: {condition!r} is no condition; write all, small, or one such as parameters<500M")
    name, sign, text = match.groups()
    if name not in _SELECTABLE:
        raise ConfigError(f"--train: runs have no {name!r}; {nearest(name, _SELECTABLE)}")
    try:
        value = float(text)
    except ValueError:
        try:
            value = parse_tokens(text)
        except ValueError as e:
            raise ConfigError(f"--train: {e}") from e
    return _OPERATORS[sign](getattr(point, name), value)
