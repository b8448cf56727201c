"""The numbers of a scorecard: of one task or category from its items, of a task from its categories, of an average."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from openlm_pipeline.evaluation import estimates, statistics
from openlm_pipeline.evaluation.averages import SMALL_TASK, AverageDefinition, AverageKind
from openlm_pipeline.evaluation.baselines import random_baseline
from openlm_pipeline.evaluation.estimates import Estimate
from openlm_pipeline.evaluation.suite import IclTask, task_name
from openlm_pipeline.fingerprint import Neutral
from openlm_pipeline.registry import RULES, RuleName
from openlm_pipeline.strict import Strict

FROM_ROWS = "rows"
"""In place of a version of random baselines: chance is what the rows say."""
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
    """95% interval: Wilson's, for as many items as the clusters of items are worth; of a task with categories, that of
    their mean."""
    standard_error: float | None = None
    chance: float | None = None
    """Accuracy of guessing: what the suite says, else the mean of 1 / options; 0 without options."""
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
    majority: Annotated[float | None, Neutral(None)] = None
    """Accuracy of always choosing the option that is right most often, where all items have as many options."""
    bits_per_byte: Annotated[float | None, Neutral(None)] = None
    """Bits to code a byte of the right continuations; of a task with categories the mean of theirs."""
    bits_low: Annotated[float | None, Neutral(None)] = None
    bits_high: Annotated[float | None, Neutral(None)] = None
    """Its 95% interval."""
    num_clusters: Annotated[int | None, Neutral(None)] = None
    """Of items that go together, where they are fewer than the items."""
    cut_items: Annotated[int, Neutral(0)] = 0
    """Items whose context lost tokens for the model's length."""
    fewer_shots: Annotated[int, Neutral(0)] = 0
    """Items with fewer solved rows before them than asked for."""
    accuracy_exact: Annotated[float | None, Neutral(None)] = None
    """In generation: share of texts that are an answer; `accuracy` counts those that begin with one."""
    num_rows: Annotated[int | None, Neutral(None)] = None
    """Of the task's file, where only some were scored."""

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
    """`accuracy`: of accuracies; `centred`: of centred ones; `category`: of centred ones, over the suite's category;
    `bits_per_byte`: of the bits per byte of the right continuations."""
    tasks: tuple[str, ...]
    random_baselines: str | None = None
    """Version of the accuracies of guessing that it is centred with."""
    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    """95% interval of the tasks' together: sampling of the items only."""
    standard_error: float | None = None
    chance: float | None = None
    mde: float | None = None
    """As a task's."""
    status: Status
    missing: tuple[str, ...] = ()
    """Its tasks without scores."""

    @property
    def goodness(self) -> float | None:
        """Its value, larger where it is better."""
        return -self.value if self.kind == "bits_per_byte" and self.value is not None else self.value


@dataclass(frozen=True)
class Measured:
    """A task, or a category of one: its score, and what averages are made of."""

    score: TaskScore
    accuracy: Estimate | None = None
    bits: Estimate | None = None


def _mean(table: pa.Table, column: str) -> float | None:
    return pc.mean(pc.cast(table[column], pa.float64())).as_py()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def gold_bytes(table: pa.Table) -> np.ndarray | None:
    """UTF-8 bytes of each right continuation, float64[rows]; None where they are not known."""
    if not table.num_rows or table["choice_bytes"].null_count or table["nll"].null_count:
        return None
    sizes = zip(table["choice_bytes"].to_pylist(), table["gold"].to_pylist())
    return np.array([of_options[gold] for of_options, gold in sizes], float)


def score_items(
    task: IclTask, k: int, category: str | None, table: pa.Table, version: str | None, file_sha256: str
) -> Measured:
    """The score of a task, or of one of its categories, from its rows of the per-item table.

    Args:
        version: of the random baselines.
    """
    n, codes = table.num_rows, estimates.cluster_codes(table)
    sizes = gold_bytes(table)
    bits = None if sizes is None else estimates.bits_per_byte(table["nll"].to_numpy(), sizes, codes)
    found: dict[str, Any] = {}
    accuracy = None
    if not table["correct"].null_count:
        correct = table["correct"].to_numpy()
        accuracy = estimates.accuracy(correct, codes)
        options = pc.mean(pc.divide(1.0, pc.cast(table["num_choices"], pa.float64()))).as_py()
        chance = task.chance
        if chance is None:
            chance = random_baseline(version, task.label, RULES[task.rule].chance(options))
        # Agresti and Coull's shrunken accuracy: at 0% or 100% of few items the plain one would detect anything.
        shrunken = (correct.sum() + 2) / (n + 4)
        effect = n / accuracy.clusters if not 0 < accuracy.value < 1 else _effect(accuracy, n)
        found = {
            "accuracy": accuracy.value,
            "ci_low": accuracy.low,
            "ci_high": accuracy.high,
            "standard_error": _finite(accuracy.error),
            "chance": chance,
            "majority": _majority(table),
            "centred": statistics.centred_accuracy(accuracy.value, chance),
            "mde": statistics.minimum_detectable_effect(math.sqrt(2 * shrunken * (1 - shrunken) / n * effect)),
            "accuracy_sum": _mean(table, "correct_sum"),
            "accuracy_norm": _mean(table, "correct_norm"),
            "accuracy_exact": _mean(table, "exact"),
        }
    score = TaskScore(
        task=task.label,
        num_fewshot=k,
        category=category,
        metric=task.metric,
        rule=task.rule,
        num_items=n,
        **found,
        **_bits(bits),
        num_clusters=None if (clusters := len(np.unique(codes))) == n else clusters,
        cut_items=pc.sum(pc.greater(table["cut_tokens"], 0)).as_py() or 0,
        fewer_shots=pc.sum(pc.less(table["shots"], k)).as_py() or 0,
        status="scored",
        task_file_sha256=file_sha256,
    )
    return Measured(score, accuracy, bits)


def _effect(found: Estimate, n: int) -> float:
    """How many times the variance is that of as many independent items."""
    return 1.0 if n < 2 else (found.error / statistics.standard_error(found.value, n)) ** 2


def _bits(found: Estimate | None) -> dict[str, float | None]:
    if found is None:
        return {}
    return {"bits_per_byte": found.value, "bits_low": _finite(found.low), "bits_high": _finite(found.high)}


def _majority(table: pa.Table) -> float | None:
    options = pc.unique(table["num_choices"]).to_pylist()
    if len(options) != 1 or options[0] < 2:
        return None
    return float(np.bincount(table["gold"].to_numpy()).max() / table.num_rows)


def score_categories(parts: Sequence[Measured]) -> Measured:
    """The score of a task from those of its categories: their plain mean, as LLM Foundry averages them."""
    scores = [p.score for p in parts]

    def mean(field: str) -> float | None:
        values = [getattr(s, field) for s in scores]
        return None if None in values else math.fsum(values) / len(values)

    def combined(of: str) -> Estimate | None:
        found = [getattr(p, of) for p in parts]
        return None if None in found else estimates.combined([(1 / len(found), e) for e in found])

    num_items = sum(s.num_items for s in scores)
    accuracy, bits = combined("accuracy"), combined("bits")
    found: dict[str, Any] = {}
    if accuracy is not None:
        fields = ("chance", "centred", "majority", "accuracy_sum", "accuracy_norm", "accuracy_exact")
        found = {
            "accuracy": accuracy.value,
            "ci_low": accuracy.low,
            "ci_high": accuracy.high,
            "standard_error": _finite(accuracy.error),
            "mde": math.sqrt(math.fsum(s.mde**2 for s in scores)) / len(scores),
            "accuracy_micro": math.fsum(s.accuracy * s.num_items for s in scores) / num_items,
            **{field: mean(field) for field in fields},
        }
    clusters = [s.num_clusters or s.num_items for s in scores]
    update = {
        "category": None,
        "num_items": num_items,
        "num_categories": len(parts),
        "num_clusters": None if sum(clusters) == num_items else sum(clusters),
        "cut_items": sum(s.cut_items for s in scores),
        "fewer_shots": sum(s.fewer_shots for s in scores),
    }
    return Measured(scores[0].model_copy(update=update | found | _bits(bits)), accuracy, bits)


def score_average(definition: AverageDefinition, tasks: Mapping[str, Measured], version: str | None) -> Average:
    """An average from the scores of its tasks, by `label/k-shot`; empty if one of them has none.

    Args:
        version: of the random baselines.
    """
    members = {name: tasks[name] for name in definition.weights}
    missing = tuple(name for name, m in members.items() if m.score.status != "scored")
    centred = definition.kind in ("centred", "category")
    common: dict[str, Any] = {
        "name": definition.name,
        "kind": definition.kind,
        "tasks": tuple(members),
        "random_baselines": (definition.baselines or version or FROM_ROWS) if centred else None,
    }
    if missing:
        status = "failed" if any(members[name].score.status == "failed" for name in missing) else "not run"
        return Average(**common, status=status, missing=missing)
    scores = {name: m.score for name, m in members.items()}
    if definition.kind == "bits_per_byte":
        if without := tuple(name for name, m in members.items() if m.bits is None):
            return Average(**common, status="not run", missing=without)
        found = estimates.combined([(w, members[name].bits) for name, w in definition.weights.items()])
        return Average(**common, **_interval(found), status="scored")
    chances = definition.chances({name: score.chance for name, score in scores.items()})
    scales = definition.coefficients(chances)
    found = estimates.combined([(scale, members[name].accuracy) for name, scale in scales.items()])
    guessed = math.fsum(scale * chances[name] for name, scale in scales.items())
    if centred:
        value = math.fsum(
            w * statistics.centred_accuracy(scores[name].accuracy, chances[name])
            for name, w in definition.weights.items()
        )
        found = replace(found, value=value, low=found.low - guessed, high=found.high - guessed)
    mde = math.sqrt(math.fsum((scale * scores[name].mde) ** 2 for name, scale in scales.items()))
    alone = math.sqrt(math.fsum((scale * members[name].accuracy.error) ** 2 for name, scale in scales.items()))
    if alone > 0:
        mde *= found.error / alone  # tasks over the same questions err together
    return Average(**common, **_interval(found), chance=0.0 if centred else guessed, mde=mde, status="scored")


def _interval(found: Estimate) -> dict[str, float | None]:
    return {
        "value": found.value,
        "ci_low": _finite(found.low),
        "ci_high": _finite(found.high),
        "standard_error": _finite(found.error),
    }
