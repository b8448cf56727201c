"""The numbers of a scorecard: of one task or category from its items, of a task from its categories, of an average."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from openlm_pipeline.evaluation import statistics
from openlm_pipeline.evaluation.averages import SMALL_TASK, AverageDefinition, AverageKind
from openlm_pipeline.evaluation.baselines import random_baseline
from openlm_pipeline.evaluation.suite import IclTask, task_name
from openlm_pipeline.registry import RULES, RuleName
from openlm_pipeline.strict import Strict

Status = Literal["scored", "failed", "not run"]


class TaskScore(Strict):
    """One task, or one category of a task with categories. Fractions, not per cent."""

    task: str
    num_fewshot: int
    category: str | None = None
    metric: str
    rule: RuleName
    """`mean`: lowest mean token cross-entropy wins; `argmax`: every continuation token is the most likely one;
    `prefix`: the generated text begins with an answer."""
    num_items: int = 0
    num_categories: int | None = None
    """Where a task has categories; its numbers are then the plain means of theirs."""
    accuracy: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    """95% interval: Wilson's; for a task with categories the normal one of their mean."""
    standard_error: float | None = None
    chance: float | None = None
    """Accuracy of guessing by the suite's random baselines, else the mean of 1 / options; 0 without options."""
    centred: float | None = None
    """(accuracy - chance) / (1 - chance)."""
    mde: float | None = None
    """Smallest accuracy difference found with 80% power at 5% between two models that err independently."""
    accuracy_micro: float | None = None
    """Over all items together, where a task has categories."""
    accuracy_sum: float | None = None
    accuracy_norm: float | None = None
    """By the other two rules: total log-probability, and total over characters. None without options."""
    status: Status
    problem: str | None = None
    task_file_sha256: str | None = None

    @property
    def name(self) -> str:
        """`mmlu/5-shot/anatomy`."""
        return task_name(self.task, self.num_fewshot) + (f"/{self.category}" if self.category else "")

    @property
    def small(self) -> bool:
        """Scored on fewer than 300 items."""
        return 0 < self.num_items < SMALL_TASK


class Average(Strict):
    """A mean over tasks; empty unless all of them are scored."""

    name: str
    kind: AverageKind
    """`accuracy`: of accuracies; `centred`: of centred ones; `category`: of centred ones, over the suite's category."""
    tasks: tuple[str, ...]
    random_baselines: str | None = None
    """Version of the accuracies of guessing that it is centred with."""
    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    """95% normal interval: sampling of the items only."""
    standard_error: float | None = None
    chance: float | None = None
    mde: float | None = None
    """As a task's."""
    status: Status
    missing: tuple[str, ...] = ()
    """Its tasks without scores."""


def _mean(table: pa.Table, column: str) -> float | None:
    return pc.mean(pc.cast(table[column], pa.float64())).as_py()


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def score_items(
    task: IclTask, k: int, category: str | None, table: pa.Table, version: str, file_sha256: str
) -> TaskScore:
    """The score of a task, or of one of its categories, from its rows of the per-item table.

    Args:
        version: of the random baselines.
    """
    n, correct = table.num_rows, pc.sum(table["correct"]).as_py()
    options = pc.mean(pc.divide(1.0, pc.cast(table["num_choices"], pa.float64()))).as_py()
    chance = random_baseline(version, task.label, RULES[task.rule].chance(options))
    low, high = statistics.wilson_interval(correct, n)
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
        standard_error=_finite(statistics.standard_error(correct, n)),
        chance=chance,
        centred=statistics.centred_accuracy(correct / n, chance),
        mde=statistics.minimum_detectable_effect(math.sqrt(2 * shrunken * (1 - shrunken) / n)),
        accuracy_sum=_mean(table, "correct_sum"),
        accuracy_norm=_mean(table, "correct_norm"),
        status="scored",
        task_file_sha256=file_sha256,
    )


def score_categories(parts: Sequence[TaskScore]) -> TaskScore:
    """The score of a task from those of its categories: their plain mean, as LLM Foundry averages them."""

    def mean(field: str) -> float | None:
        values = [getattr(p, field) for p in parts]
        return None if None in values else math.fsum(values) / len(values)

    def error(field: str) -> float:
        values = [getattr(p, field) for p in parts]
        return statistics.quadrature([math.nan if v is None else v for v in values], [1 / len(parts)] * len(parts))

    num_items = sum(p.num_items for p in parts)
    accuracy, se = mean("accuracy"), error("standard_error")
    half = statistics.half_width(se)
    fields = ("chance", "centred", "accuracy_sum", "accuracy_norm")
    return parts[0].model_copy(
        update={
            "category": None,
            "num_items": num_items,
            "num_categories": len(parts),
            "accuracy": accuracy,
            "ci_low": None if math.isnan(se) else max(0.0, accuracy - half),
            "ci_high": None if math.isnan(se) else min(1.0, accuracy + half),
            "standard_error": _finite(se),
            "mde": error("mde"),
            "accuracy_micro": math.fsum(p.accuracy * p.num_items for p in parts) / num_items,
            **{field: mean(field) for field in fields},
        }
    )


def score_average(definition: AverageDefinition, tasks: Mapping[str, TaskScore], version: str) -> Average:
    """An average from the scores of its tasks, by `label/k-shot`; empty if one of them has none.

    Args:
        version: of the random baselines.
    """
    members = {name: tasks[name] for name in definition.weights}
    missing = tuple(name for name, score in members.items() if score.status != "scored")
    common: dict[str, Any] = {
        "name": definition.name,
        "kind": definition.kind,
        "tasks": tuple(members),
        "random_baselines": None if definition.kind == "accuracy" else version,
    }
    if missing:
        status = "failed" if any(members[name].status == "failed" for name in missing) else "not run"
        return Average(**common, status=status, missing=missing)
    weights, scores = list(definition.weights.values()), list(members.values())
    chances = {name: score.chance for name, score in members.items()}
    scales = list(definition.coefficients(chances).values())
    values = [s.accuracy if definition.kind == "accuracy" else s.centred for s in scores]
    value = math.fsum(w * v for w, v in zip(weights, values))
    errors = [math.nan if s.standard_error is None else s.standard_error for s in scores]
    error = statistics.quadrature(errors, scales)
    half = statistics.half_width(error)
    chance = math.fsum(w * s.chance for w, s in zip(weights, scores)) if definition.kind == "accuracy" else 0.0
    return Average(
        **common,
        value=value,
        ci_low=_finite(value - half),
        ci_high=_finite(value + half),
        standard_error=_finite(error),
        chance=chance,
        mde=statistics.quadrature([s.mde for s in scores], scales),
        status="scored",
    )
