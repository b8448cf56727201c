"""Scorecards: the summary of one model's per-item table, with intervals, averages and paired differences.

Everything is derived from the per-item tables. A task without scores has an empty row that says why, and the averages
that it belongs to are then empty too: none is ever taken over fewer tasks than it is defined by.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.averages import suite_averages
from openlm_pipeline.evaluation.comparison import COMPARED_COLUMNS, Difference, compare
from openlm_pipeline.evaluation.scores import (
    FROM_ROWS,
    Average,
    Measured,
    TaskScore,
    score_average,
    score_categories,
    score_items,
)
from openlm_pipeline.evaluation.suite import HARNESS_VERSION, IclTask, Suite, task_name
from openlm_pipeline.fingerprint import Neutral
from openlm_pipeline.storage.files import read_sealed, sha256_file, write_sealed
from openlm_pipeline.strict import Strict

_ITEMS_SHA256 = "items_sha256"


class Provenance(Strict):
    """What was scored: a milestone of a run, or a baseline, which has a name alone."""

    run: str
    """Or the baseline's name."""
    run_version: str | None = None
    milestone: str | None = None
    """Its label, such as `t0250B`; None for a baseline."""
    tokens: int | None = None
    """Trained on at this milestone."""
    step: int | None = None
    checkpoint_digest: str
    data_fingerprint: str | None = None
    tokenizer: str
    validation_loss: float | None = None
    """Nats a token on held-out text."""
    precision: Annotated[str, Neutral("fp32")] = "fp32"
    """What matrix products were computed in."""
    average_of_weights: Annotated[str | None, Neutral(None)] = None
    """Which of the run's `training.averages` was scored in place of its last weights."""
    model: Annotated[str | None, Neutral(None)] = None
    """Of a model that is no milestone: its absolute path, or its name on the hub with the revision asked for."""
    weights_stamp: Annotated[str | None, Neutral(None)] = None
    """Sizes and times of change of its files as they were, where it is one of this machine."""

    @property
    def label(self) -> str:
        """The milestone, or the baseline's name."""
        return self.milestone or self.run


class Scorecard(Provenance):
    """A model's scores on a suite."""

    suite: str
    suite_version: str
    suite_digest: str
    random_baselines: str
    harness_version: str = HARNESS_VERSION
    tasks: tuple[TaskScore, ...]
    categories: tuple[TaskScore, ...] = ()
    """Parts of the tasks that have categories."""
    averages: tuple[Average, ...]
    """The headline first."""
    status: Literal["complete", "incomplete"]
    missing: tuple[str, ...] = ()
    """Tasks of the suite without scores, as `label/k-shot`."""
    warnings: Annotated[tuple[str, ...], Neutral(())] = ()
    """What a reader of the scores must know, each with its task."""
    changes: tuple[Difference, ...] = ()
    """Since the milestone before."""
    against: tuple[Difference, ...] = ()
    """To the other milestones and baselines given."""

    @property
    def headline(self) -> Average:
        return self.averages[0]

    @property
    def average(self) -> float | None:
        """Value of the headline."""
        return self.headline.value

    def difference(self, measure: str, against: str) -> Difference | None:
        """A paired difference of a task's accuracy, or of an average, to another milestone or baseline, if made."""
        of_bits = any((a.name, a.kind) == (measure, "bits_per_byte") for a in self.averages)
        every = (d for d in (*self.changes, *self.against) if (d.kind == "bits_per_byte") == of_bits)
        made = (d for d in every if (d.measure, d.against) == (measure, against))
        return next((d for d in made if d.delta is not None), None)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Scorecard":
        """Raises DataError if the text is no scorecard."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as e:
            wrong = "; ".join(f"{'.'.join(map(str, w['loc']))}: {w['msg']}" for w in e.errors())
            raise DataError(f"not a scorecard of this version: {wrong}. Score again; finished tasks are reused") from e


def _select(table: pa.Table, task: IclTask, k: int) -> pa.Table:
    return table.filter(pc.and_(pc.equal(table["task"], task.label), pc.equal(table["num_fewshot"], k)))


def _check_stated(items: pa.Table, suite: Suite, provenance: Provenance) -> None:
    fields = ("run", "run_version", "milestone", "step", "tokens")
    stated = {field: getattr(provenance, field) for field in fields}
    for column, value in {**stated, "suite": suite.name, "suite_version": suite.version}.items():
        other = [v for v in pc.unique(items[column]).to_pylist() if v != value]
        if value is not None and other:
            raise DataError(f"the items are of {column} {other[0]!r}, the scorecard is of {value!r}")


def _one_milestone(items: pa.Table) -> str:
    milestones = pc.unique(items["milestone"]).to_pylist()
    if len(milestones) != 1:
        raise DataError(f"the items to compare with are of {len(milestones)} milestones, not of one: {milestones}")
    return milestones[0]


def make_scorecard(
    items: pa.Table,
    previous_items: pa.Table | None,
    *,
    suite: Suite,
    provenance: Provenance,
    task_files: Mapping[str, str],
    against: Iterable[tuple[str, pa.Table]] = (),
    warnings: tuple[str, ...] = (),
    num_rows: Mapping[str, int] = {},
) -> Scorecard:
    """Sum up the items of one model.

    Args:
        items: table of `items.SCHEMA`, of this model and suite only.
        previous_items: the table of the milestone before, for the changes.
        task_files: `label/k-shot` -> sha256 of the task's file (`SuiteResult.task_files`).
        against: milestone labels or baseline names and their items, for differences to them. Between models of one
            run the prompts must be the same token ids, between others the questions.
        warnings, num_rows: of `SuiteResult`.

    Raises:
        DataError: the items are of another run, milestone or suite than stated, `previous_items` of several
            milestones, or a suite of `against` is another.
    """
    _check_stated(items, suite, provenance)
    version = suite.random_baselines
    tables: dict[str, pa.Table] = {}
    scores: dict[str, Measured] = {}
    categories: list[TaskScore] = []
    for task, k in suite.runs():
        name, table = task_name(task.label, k), _select(items, task, k)
        problem = None
        found = sorted(c for c in pc.unique(table["category"]).to_pylist() if c is not None)
        if table.num_rows and (absent := [c for c in task.category_names if c not in found]):
            problem = f"no items of category {absent[0]}"
        if not table.num_rows or problem:
            scores[name] = Measured(
                TaskScore(
                    task=task.label,
                    num_fewshot=k,
                    metric=task.metric,
                    rule=task.rule,
                    status="failed" if problem else "not run",
                    problem=problem,
                )
            )
            continue
        tables[name] = table
        if found:
            in_category = [(c, table.filter(pc.equal(table["category"], c))) for c in found]
            parts = [score_items(task, k, c, part, version, task_files[name]) for c, part in in_category]
            categories += (p.score for p in parts)
            scores[name] = score_categories(parts)
        else:
            scores[name] = score_items(task, k, None, table, version, task_files[name])

    of_tasks = {name: m.score.model_copy(update={"num_rows": num_rows.get(name)}) for name, m in scores.items()}
    definitions = suite_averages(suite, {name: s.num_items for name, s in of_tasks.items() if s.status == "scored"})
    if not any(m.bits for m in scores.values()):  # tables of the first release have no bytes
        definitions = [d for d in definitions if d.kind != "bits_per_byte"]
    chances = {name: s.chance for name, s in of_tasks.items() if s.chance is not None}

    def differences(label: str, other: pa.Table) -> tuple[Difference, ...]:
        for column, value in (("suite", suite.name), ("suite_version", suite.version)):
            if other_value := [v for v in pc.unique(other[column]).to_pylist() if v != value]:
                raise DataError(
                    f"the items of {label} are of {column} {other_value[0]!r}, the scorecard is of {value!r}"
                )
        same_run = pc.unique(other["run"]).to_pylist() == [provenance.run]
        other = other.select(COMPARED_COLUMNS)
        theirs = {task_name(task.label, k): _select(other, task, k) for task, k in suite.runs()}
        return compare(tables, theirs, label, averages=definitions, chances=chances, same_prompts=same_run)

    missing = tuple(name for name, score in of_tasks.items() if score.status != "scored")
    return Scorecard(
        **provenance.model_dump(),
        suite=suite.name,
        suite_version=suite.version,
        suite_digest=suite.digest,
        random_baselines=version or FROM_ROWS,
        tasks=tuple(of_tasks.values()),
        categories=tuple(categories),
        averages=tuple(score_average(definition, scores, version) for definition in definitions),
        status="incomplete" if missing else "complete",
        missing=missing,
        warnings=warnings,
        changes=() if previous_items is None else differences(_one_milestone(previous_items), previous_items),
        against=tuple(d for label, other in against for d in differences(label, other)),
    )


def save_scorecard(out_dir: Path, scorecard: Scorecard) -> Path:
    """Write `scorecard.json` beside `items.parquet`; its presence says that the evaluation is finished.

    Raises:
        MissingInputError: the items are not there; a scorecard does not stand without them.
    """
    items = out_dir / "items.parquet"
    if not items.is_file():
        raise MissingInputError(f"{out_dir} has no items.parquet, which the scorecard is derived from")
    path = out_dir / "scorecard.json"
    write_sealed(path, {**scorecard.model_dump(mode="json"), _ITEMS_SHA256: sha256_file(items)})
    return path


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MissingInputError(f"{path} does not exist: this checkpoint has not been scored")
    return read_sealed(path)


def load_scorecard(path: Path) -> Scorecard:
    """Raises MissingInputError if there is no such file, DataError if it is damaged or no scorecard."""
    fields = _read(path)
    fields.pop(_ITEMS_SHA256, None)
    try:
        return Scorecard.from_json(json.dumps(fields))
    except DataError as e:
        raise DataError(f"{path}: {e}") from e


def check_items(card: Path) -> None:
    """Compare `items.parquet` with what the `scorecard.json` beside it was derived from.

    Raises:
        MissingInputError: one of the two is not there.
        DataError: the scorecard is damaged, or the items are others; earlier releases did not say which.
    """
    recorded, items = _read(card).get(_ITEMS_SHA256), card.with_name("items.parquet")
    if not items.exists():
        raise MissingInputError(f"{items} is missing, which {card.name} sums up; `openlm evaluate` makes it again")
    if recorded is not None and sha256_file(items) != recorded:
        raise DataError(f"{items} is not what {card.name} sums up: it is damaged. `openlm evaluate` makes it again")
