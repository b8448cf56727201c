"""What scores are set against without scoring another model: accuracies of guessing, and published tables.

Both are YAML files in `baselines/`: `random_VERSION.yaml` has the accuracy of guessing by task; any other file is a
published table with its source. A row whose stated average is not the mean of its own cells is refused, unless the
file says so beside it.
"""

import functools
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from pydantic import Field, ValidationError

from openlm_pipeline.errors import ConfigError, nearest
from openlm_pipeline.strict import Strict, explain, read_mapping
from openlm_pipeline.units import Tokens

SHIPPED = Path(__file__).parent / "baselines"


class QuotedBaseline(Strict):
    """A published row. Two decimals, no intervals, no items: nothing that a test could be made of."""

    name: str
    family: str
    """Rows of one model at several token counts share it."""
    title: str
    tokens: int | None = None
    """Trained on, where the source says."""
    source: str
    """Address of the table."""
    harness: str
    """What scored it, as far as the source says."""
    scores: dict[str, float]
    """`copa/0-shot` -> accuracy, to two decimals; a task that is not here was not published."""
    average: float
    """As stated, to two decimals."""
    average_tasks: tuple[str, ...]
    """What it is the mean of."""
    note: str | None = None


class _QuotedModel(Strict):
    family: str
    title: str
    tokens: Tokens | None = None
    scores: tuple[Decimal, ...]
    """In the order of the table's tasks."""
    average: Decimal
    recomputed: Decimal | None = None
    """What the cells average to, where that is not the average stated."""
    beside: dict[str, Decimal] = Field(default_factory=dict)
    """Cells outside the average."""


class _Table(Strict):
    source: str
    harness: str
    tasks: tuple[str, ...]
    rows: dict[str, _QuotedModel]


def load_quoted(path: Path) -> list[QuotedBaseline]:
    """The rows of one published table, each checked against its own average.

    Raises:
        ConfigError: the file is malformed, or a row has other cells than tasks or another mean than it states.
    """
    try:
        table = _Table.model_validate(read_mapping(path))
    except ValidationError as e:
        raise explain(e, f"table of baselines {path}") from e
    return [_checked(path, table, name, row) for name, row in table.rows.items()]


def _checked(path: Path, table: _Table, name: str, row: _QuotedModel) -> QuotedBaseline:
    if len(row.scores) != len(table.tasks):
        raise ConfigError(f"{path}: row {name} has {len(row.scores)} scores for {len(table.tasks)} tasks")
    mean = (sum(row.scores) / len(row.scores)).quantize(Decimal("0.01"), ROUND_HALF_UP)
    if mean != (row.average if row.recomputed is None else row.recomputed):
        raise ConfigError(
            f"{path}: row {name} states the average {row.average:.2f} but its cells average to {mean}. Correct the "
            f"cell that is wrong, or, if the source prints it so, add `recomputed: {mean}`"
        )
    return QuotedBaseline(
        name=name,
        **row.model_dump(include={"family", "title", "tokens"}),
        **table.model_dump(include={"source", "harness"}),
        scores={k: float(v) for k, v in [*zip(table.tasks, row.scores), *row.beside.items()]},
        average=float(row.average),
        average_tasks=table.tasks,
        note=None if row.recomputed is None else f"its cells as printed average to {mean}, not {row.average:.2f}",
    )


@functools.cache
def _shipped_rows() -> tuple[QuotedBaseline, ...]:
    files = sorted(path for path in SHIPPED.glob("*.yaml") if not path.name.startswith("random_"))
    return tuple(row for path in files for row in load_quoted(path))


def quoted_baselines(names: Sequence[str] | None = None) -> list[QuotedBaseline]:
    """Published rows by name (`pythia_1b`, `openlm_1b_1T`) or by family (`openlm_1b`: all of its); all by default.

    Raises:
        ConfigError: a name that is neither.
    """
    rows = _shipped_rows()
    if names is None:
        return list(rows)
    known = dict.fromkeys(name for row in rows for name in (row.name, row.family))
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no quoted baseline {name!r}; {nearest(name, known, 'known')}")
    return [row for row in rows if row.name in names or row.family in names]


class _Random(Strict):
    source: str
    baselines: dict[str, float]


@functools.cache
def _random(version: str) -> dict[str, float]:
    path = SHIPPED / f"random_{version}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem.removeprefix("random_") for p in SHIPPED.glob("random_*.yaml")))
        raise ConfigError(f"there are no random baselines {version!r}; known: {known}")
    try:
        return _Random.model_validate(read_mapping(path)).baselines
    except ValidationError as e:
        raise explain(e, f"random baselines {path}") from e


def random_baseline(version: str | None, task: str, default: float) -> float:
    """Accuracy of guessing on a task (its label), which centred scores are measured from.

    Args:
        version: None lists no task.
        default: for a task that the version doesn't list, such as the mean of 1 / options.

    Raises:
        ConfigError: there is no such version.
    """
    return default if version is None else _random(version).get(task, default)
