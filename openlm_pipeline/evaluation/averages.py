"""Which averages a suite has: its own, the one without small tasks, centred ones, and LLM Foundry's categories.

Each is a weighted sum over tasks, so that one rule gives its interval and the error of its difference between models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.evaluation.baselines import random_baseline
from openlm_pipeline.evaluation.suite import Suite, task_name
from openlm_pipeline.registry import RULES

SMALL_TASK = 300
"""With fewer items the 95% interval at 50% is wider than ±5.6 points, more than most gains between milestones."""
HELD_OUT_TEXT = "held_out_text"
"""Name of the mean over texts that are neither right nor wrong."""
AverageKind = Literal["accuracy", "centred", "category", "bits_per_byte"]


@dataclass(frozen=True)
class AverageDefinition:
    """A weighted mean over tasks: of their accuracies, of their centred accuracies, or of their bits per byte."""

    name: str
    kind: AverageKind
    weights: Mapping[str, float]
    """Task (`copa/0-shot`) -> its share; they add up to 1."""
    baselines: str | None = None
    """Version of the random baselines that it is centred by, where it is not the suite's."""

    def chances(self, of_tasks: Mapping[str, float]) -> dict[str, float]:
        """Task -> accuracy of guessing that this average counts from; `of_tasks` are those of the scorecard."""
        return {
            task: random_baseline(self.baselines, task.rpartition("/")[0], chance) for task, chance in of_tasks.items()
        }

    def coefficients(self, chances: Mapping[str, float]) -> dict[str, float]:
        """Task -> how much the average moves when the task's accuracy, or bits per byte, moves by 1."""
        if self.kind in ("accuracy", "bits_per_byte"):
            return dict(self.weights)
        own = self.chances(chances)
        return {task: weight / (1 - own[task]) for task, weight in self.weights.items()}


def suite_averages(suite: Suite, num_items: Mapping[str, int]) -> list[AverageDefinition]:
    """The averages of a suite, its headline first.

    Args:
        num_items: scored tasks -> items. A suite that names no second average gets one without its small tasks.

    Raises:
        ConfigError: a category has the name of an average.
    """
    texts = tuple(task_name(t.label, k) for t, k in suite.runs() if not RULES[t.rule].judges)
    of_texts = [AverageDefinition(HELD_OUT_TEXT, "bits_per_byte", _equal(texts))] if texts else []
    if len(texts) == len(list(suite.runs())):
        return of_texts
    plain = dict(suite.averages) or {"all_tasks": suite.headline}
    if len(suite.averages) < 2:
        large = tuple(task for task in suite.headline if num_items.get(task, SMALL_TASK) >= SMALL_TASK)
        if 0 < len(large) < len(suite.headline):
            plain["without_small"] = large
    found = [AverageDefinition(name, "accuracy", _equal(tasks)) for name, tasks in plain.items()]
    if suite.centred:
        centred = [AverageDefinition(n, "centred", found[0].weights, v) for n, v in suite.centred.items()]
        found = [centred[0], *found, *centred[1:]]
    else:
        found.append(AverageDefinition(f"{found[0].name}_centred", "centred", found[0].weights))
    generated = {task_name(t.label, k) for t, k in suite.runs() if RULES[t.rule].generates}
    if read := tuple(task for task in suite.headline if task not in generated):
        found.append(AverageDefinition(f"{found[0].name}_bits_per_byte", "bits_per_byte", _equal(read)))
    found += of_texts
    of_all: dict[str, float] = {}
    for name, tasks in suite.categories.items():
        found.append(AverageDefinition(name, "category", _equal(tasks)))
        for task, weight in found[-1].weights.items():
            of_all[task] = of_all.get(task, 0.0) + weight / len(suite.categories)
    if of_all:
        found.append(AverageDefinition("mean_of_categories", "category", of_all))
    names = [average.name for average in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"suite {suite.name} has two averages named {repeated[0]!r}; rename the one or the category")
    return found


def _equal(tasks: tuple[str, ...]) -> dict[str, float]:
    return {task: 1 / len(tasks) for task in tasks}
