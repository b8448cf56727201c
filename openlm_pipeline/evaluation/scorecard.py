"""Scorecards: the summary of one checkpoint's per-item table, with intervals and the change since the last milestone.

Everything is derived from the per-item tables. A task without scores has an empty row that says why, and the averages
are then empty too: they are never taken over fewer tasks than the suite has.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation import statistics
from openlm_pipeline.evaluation.suite import HARNESS_VERSION, IclTask, Suite, task_name
from openlm_pipeline.files import write_text
from openlm_pipeline.strict import Strict

ALPHA = 0.05
"""Level of the test between milestones, over all tasks together."""


class TaskScore(Strict):
    """One task, or one category of a task with categories. Fractions, not per cent."""

    task: str
    num_fewshot: int
    category: str | None = None
    metric: str
    rule: Literal["mean", "argmax"]
    """`mean`: lowest mean token cross-entropy wins; `argmax`: every continuation token is the most likely one."""
    num_items: int = 0
    accuracy: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    """95% Wilson interval."""
    standard_error: float | None = None
    chance: float | None = None
    """Expected accuracy of guessing: the mean of 1 / options; 0 for `argmax`."""
    centred: float | None = None
    """(accuracy - chance) / (1 - chance)."""
    mde: float | None = None
    """Smallest accuracy difference found with 80% power at 5% between two models that err independently."""
    accuracy_sum: float | None = None
    accuracy_norm: float | None = None
    """By the other two rules: total log-probability, and total over bytes. None for `argmax`."""
    status: Literal["scored", "failed", "not run"]
    problem: str | None = None
    task_file_sha256: str | None = None

    @property
    def name(self) -> str:
        """`mmlu/5-shot/anatomy`."""
        return task_name(self.task, self.num_fewshot) + (f"/{self.category}" if self.category else "")


class Change(Strict):
    """A task against the milestone before, item by item, all categories together."""

    task: str
    num_fewshot: int
    previous_milestone: str
    delta: float | None = None
    """Accuracy now minus accuracy then."""
    p_value: float | None = None
    """Exact two-sided McNemar test."""
    p_holm: float | None = None
    """Adjusted for the number of tasks compared."""
    significant: bool = False
    """p_holm is below 0.05."""
    note: str | None = None
    """Why there is no comparison."""


class Provenance(Strict):
    """What was scored."""

    run: str
    run_version: str
    milestone: str
    """Its label, such as `t0250B`."""
    tokens: int
    """Trained on at this milestone."""
    step: int
    checkpoint_digest: str
    data_fingerprint: str
    tokenizer: str
    validation_loss: float | None = None
    """Nats a token on held-out text."""


class Scorecard(Provenance):
    """A checkpoint's scores on a suite."""

    suite: str
    suite_version: str
    suite_digest: str
    harness_version: str = HARNESS_VERSION
    tasks: tuple[TaskScore, ...]
    status: Literal["complete", "incomplete"]
    missing: tuple[str, ...] = ()
    """Tasks of the suite without scores, as `label/k-shot`."""
    average: float | None = None
    """Unweighted mean over tasks; a task with categories counts as the mean of its categories. None if incomplete."""
    average_ci_low: float | None = None
    average_ci_high: float | None = None
    """95% normal interval of the average: sampling of the items only."""
    centred_average: float | None = None
    """The same mean of centred accuracies."""
    changes: tuple[Change, ...] = ()

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Scorecard":
        """Raises DataError if the text is no scorecard."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as e:
            raise DataError(f"not a scorecard: {e}") from e


def _mean(table: pa.Table, column: str) -> float | None:
    return pc.mean(pc.cast(table[column], pa.float64())).as_py()


def _score(task: IclTask, k: int, category: str | None, table: pa.Table, file_sha256: str) -> TaskScore:
    n, correct = table.num_rows, pc.sum(table["correct"]).as_py()
    chance = (
        0.0 if task.rule == "argmax" else pc.mean(pc.divide(1.0, pc.cast(table["num_choices"], pa.float64()))).as_py()
    )
    low, high = statistics.wilson_interval(correct, n)
    se = statistics.standard_error(correct, n)
    # Agresti and Coull's shrunken accuracy: at 0% or 100% of few items the plain one would claim to detect anything.
    shrunken = (correct + 2) / (n + 4)
    return TaskScore(
        task=task.label,
        num_fewshot=k,
        category=category,
        metric=task.metric,
        rule=task.rule,
        num_items=n,
        accuracy=correct / n,
        ci_low=low,
        ci_high=high,
        standard_error=None if math.isnan(se) else se,
        chance=chance,
        centred=statistics.centred_accuracy(correct / n, chance),
        mde=statistics.minimum_detectable_effect(n, 2 * shrunken * (1 - shrunken)),
        accuracy_sum=_mean(table, "correct_sum"),
        accuracy_norm=_mean(table, "correct_norm"),
        status="scored",
        task_file_sha256=file_sha256,
    )


def _select(table: pa.Table, task: IclTask, k: int) -> pa.Table:
    mask = pc.and_(pc.equal(table["task"], task.label), pc.equal(table["num_fewshot"], k))
    return table.filter(mask).sort_by("item")


def _compare(task: IclTask, k: int, now: pa.Table, before: pa.Table, milestone: str) -> Change:
    change = Change(task=task.label, num_fewshot=k, previous_milestone=milestone)
    if not before.num_rows:
        return change.model_copy(update={"note": f"not scored at {milestone}"})
    keys = ["item", "item_hash", "prompt_hash", "metric"]
    if not now.select(keys).combine_chunks().equals(before.select(keys).combine_chunks()):
        return change.model_copy(update={"note": f"other items or prompts than at {milestone}"})
    gained = pc.sum(pc.and_not(now["correct"], before["correct"])).as_py()
    lost = pc.sum(pc.and_not(before["correct"], now["correct"])).as_py()
    p_value = statistics.mcnemar_exact(lost, gained)
    return change.model_copy(update={"delta": (gained - lost) / now.num_rows, "p_value": p_value})


def _changes(suite: Suite, items: pa.Table, previous: pa.Table) -> tuple[Change, ...]:
    milestones = pc.unique(previous["milestone"]).to_pylist()
    if len(milestones) != 1:
        raise DataError(f"the items to compare with are of {len(milestones)} milestones, not of one: {milestones}")
    pairs = [(task, k, _select(items, task, k)) for task, k in suite.runs()]
    changes = [
        _compare(task, k, now, _select(previous, task, k), milestones[0]) for task, k, now in pairs if now.num_rows
    ]
    tested = [i for i, c in enumerate(changes) if c.p_value is not None]
    for i, p in zip(tested, statistics.holm([changes[i].p_value for i in tested])):
        changes[i] = changes[i].model_copy(update={"p_holm": p, "significant": p < ALPHA})
    return tuple(changes)


def _averages(scores: list[list[TaskScore]]) -> dict[str, float]:
    """Means over tasks of the means over each task's categories."""
    accuracies, errors, centred = [], [], []
    for group in scores:
        group_errors = [math.nan if s.standard_error is None else s.standard_error for s in group]
        accuracies.append(math.fsum(s.accuracy for s in group) / len(group))
        errors.append(math.sqrt(math.fsum(e * e for e in group_errors)) / len(group))
        centred.append(math.fsum(s.centred for s in group) / len(group))
    mean, low, high = statistics.mean_interval(accuracies, errors)
    result = {"average": mean, "centred_average": math.fsum(centred) / len(centred)}
    return result if math.isnan(low) else result | {"average_ci_low": low, "average_ci_high": high}


def make_scorecard(
    items: pa.Table,
    previous_items: pa.Table | None,
    *,
    suite: Suite,
    provenance: Provenance,
    task_files: Mapping[str, str],
    not_run: Mapping[str, str] | None = None,
    failed: Mapping[str, str] | None = None,
) -> Scorecard:
    """Sum up the items of one checkpoint.

    Args:
        items: table of `items.SCHEMA`, of this checkpoint and suite only.
        previous_items: the table of the milestone before, for the changes.
        task_files: `label/k-shot` -> sha256 of the task's file (`SuiteResult.task_files`).
        not_run, failed: `label/k-shot` -> why there are no items.

    Raises:
        DataError: the items are of another run, milestone or suite than stated, or `previous_items` of several.
    """
    stated = {
        "run": provenance.run,
        "run_version": provenance.run_version,
        "milestone": provenance.milestone,
        "step": provenance.step,
        "tokens": provenance.tokens,
        "suite": suite.name,
        "suite_version": suite.version,
    }
    for column, value in stated.items():
        if other := [v for v in pc.unique(items[column]).to_pylist() if v != value]:
            raise DataError(f"the items are of {column} {other[0]!r}, the scorecard is of {value!r}")

    groups: list[list[TaskScore]] = []
    missing: list[str] = []
    for task, k in suite.runs():
        name, table = task_name(task.label, k), _select(items, task, k)
        if table.num_rows:
            file = task_files[name]
            categories = sorted(c for c in pc.unique(table["category"]).to_pylist() if c is not None)
            parts = [(c, table.filter(pc.equal(table["category"], c))) for c in categories] or [(None, table)]
            groups.append([_score(task, k, category, part, file) for category, part in parts])
            continue
        missing.append(name)
        broken = (failed or {}).get(name)
        empty = TaskScore(
            task=task.label,
            num_fewshot=k,
            metric=task.metric,
            rule=task.rule,
            status="failed" if broken else "not run",
            problem=broken or (not_run or {}).get(name),
        )
        groups.append([empty])
    return Scorecard(
        **provenance.model_dump(),
        suite=suite.name,
        suite_version=suite.version,
        suite_digest=suite.digest,
        tasks=tuple(score for group in groups for score in group),
        status="incomplete" if missing else "complete",
        missing=tuple(missing),
        changes=() if previous_items is None else _changes(suite, items, previous_items),
        **({} if missing else _averages(groups)),
    )


def save_scorecard(out_dir: Path, scorecard: Scorecard) -> Path:
    """Write `scorecard.json` beside `items.parquet`; its presence says that the evaluation is finished.

    Raises:
        MissingInputError: the items are not there; a scorecard does not stand without them.
    """
    if not (out_dir / "items.parquet").is_file():
        raise MissingInputError(f"{out_dir} has no items.parquet, which the scorecard is derived from")
    path = out_dir / "scorecard.json"
    write_text(path, scorecard.to_json())
    return path


def load_scorecard(path: Path) -> Scorecard:
    """Raises MissingInputError if there is no such file, DataError if it is no scorecard."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise MissingInputError(f"{path} does not exist: this checkpoint has not been scored") from None
    try:
        return Scorecard.from_json(text)
    except DataError as e:
        raise DataError(f"{path}: {e}") from e
