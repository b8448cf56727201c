"""Two models on the same items: differences of accuracy with paired intervals and tests, for tasks and averages.

Tasks are one family of tests and the averages beside the headline another; p-values are corrected within each (Holm).
The headline average is the one test that stands for itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from openlm_pipeline.evaluation import statistics
from openlm_pipeline.evaluation.averages import AverageDefinition
from openlm_pipeline.strict import Strict

ALPHA = 0.05
"""Level of a family of tests."""
COMPARED_COLUMNS = ["task", "num_fewshot", "category", "item", "item_hash", "prompt_hash", "metric", "correct"]
"""Those of the per-item table that a comparison reads."""


class Difference(Strict):
    """One task or average of a model minus that of another, item by item."""

    measure: str
    """`copa/0-shot`, or the name of an average."""
    against: str
    """Milestone or baseline."""
    delta: float | None = None
    """Here minus there; of a task with categories, the mean of its categories' differences."""
    ci_low: float | None = None
    ci_high: float | None = None
    """95% interval, paired (Bonett and Price 2012; for means, their standard errors in quadrature)."""
    p_value: float | None = None
    """Two-sided: exact McNemar for a task, normal for an average and for a task with categories."""
    p_holm: float | None = None
    """Adjusted for the number of tests in the family."""
    significant: bool = False
    """p_holm is below 0.05."""
    mde: float | None = None
    """Difference that this paired test finds with 80% power, from how often these two models disagree."""
    note: str | None = None
    """Why there is no comparison."""


@dataclass(frozen=True)
class _Paired:
    difference: Difference
    standard_error: float = math.nan


def compare(
    ours: Mapping[str, pa.Table],
    theirs: Mapping[str, pa.Table],
    against: str,
    *,
    averages: Sequence[AverageDefinition],
    chances: Mapping[str, float],
    same_prompts: bool,
) -> tuple[Difference, ...]:
    """Differences of all tasks that `ours` has, then of all averages.

    Args:
        ours, theirs: `label/k-shot` -> its rows of the per-item table.
        same_prompts: the token ids must be the same too, as they are between milestones of one run; another model may
            have another tokenizer, and then the same questions are enough.
    """
    tasks = {name: _compare_task(name, table, theirs.get(name), against, same_prompts) for name, table in ours.items()}
    means = [_compare_average(average, tasks, against, chances) for average in averages]
    families = [[t.difference for t in tasks.values()], means[:1], means[1:]]
    return tuple(difference for family in families for difference in _corrected(family))


def _compare_task(name: str, ours: pa.Table, theirs: pa.Table | None, against: str, same_prompts: bool) -> _Paired:
    if theirs is None or not theirs.num_rows:
        return _Paired(Difference(measure=name, against=against, note=f"not scored at {against}"))
    keys = ["category", "item", "item_hash", "metric", *(["prompt_hash"] if same_prompts else [])]
    if not _same(ours, theirs, keys):
        order = [("category", "ascending"), ("item", "ascending")]
        ours, theirs = ours.sort_by(order), theirs.sort_by(order)
        if not _same(ours, theirs, keys):
            what = "items or prompts" if same_prompts else "items"
            return _Paired(Difference(measure=name, against=against, note=f"other {what} than at {against}"))
    category = ours["category"].combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()
    mine, other = ours["correct"].to_numpy(), theirs["correct"].to_numpy()
    gained, lost, items = (np.bincount(category, weights) for weights in (mine & ~other, other & ~mine, None))
    parts = [(int(g), int(k), int(n)) for g, k, n in zip(gained, lost, items)]
    weights = [1 / len(parts)] * len(parts)
    delta = math.fsum((gained - lost) / n for gained, lost, n in parts) / len(parts)
    error = statistics.quadrature([statistics.paired_standard_error(*part) for part in parts], weights)
    if len(parts) == 1:
        gained, lost, n = parts[0]
        low, high = statistics.paired_interval(gained, lost, n)
        p_value = statistics.mcnemar_exact(lost, gained)
    else:
        half = statistics.half_width(error)
        low, high, p_value = delta - half, delta + half, statistics.normal_p_value(delta, error)
    mde = statistics.minimum_detectable_effect(error)
    fields = {"delta": delta, "ci_low": low, "ci_high": high, "p_value": p_value, "mde": mde}
    return _Paired(Difference(measure=name, against=against, **fields), error)


def _same(ours: pa.Table, theirs: pa.Table, keys: list[str]) -> bool:
    return ours.select(keys).combine_chunks().equals(theirs.select(keys).combine_chunks())


def _compare_average(
    average: AverageDefinition, tasks: Mapping[str, _Paired], against: str, chances: Mapping[str, float]
) -> Difference:
    for task in average.weights:
        if task not in tasks:
            return Difference(measure=average.name, against=against, note=f"{task} has no score here")
        if tasks[task].difference.delta is None:
            return Difference(measure=average.name, against=against, note=f"{task}: {tasks[task].difference.note}")
    weights = average.coefficients(chances)
    delta = math.fsum(weight * tasks[task].difference.delta for task, weight in weights.items())
    error = statistics.quadrature([tasks[task].standard_error for task in weights], list(weights.values()))
    half = statistics.half_width(error)
    return Difference(
        measure=average.name,
        against=against,
        delta=delta,
        ci_low=delta - half,
        ci_high=delta + half,
        p_value=statistics.normal_p_value(delta, error),
        mde=statistics.minimum_detectable_effect(error),
    )


def _corrected(family: Sequence[Difference]) -> list[Difference]:
    tested = [d.p_value for d in family if d.p_value is not None]
    adjusted = iter(statistics.holm(tested))
    done = []
    for difference in family:
        if difference.p_value is not None:
            p = next(adjusted)
            difference = difference.model_copy(update={"p_holm": p, "significant": p < ALPHA})
        done.append(difference)
    return done
