"""Two models on the same items: differences of accuracy and of likelihood, with paired intervals and tests.

For tasks and for averages. In a scorecard the tasks are one family of tests, and so are the averages beside the
headline, which is the one test that stands for itself; p-values are corrected within each (Holm), for accuracy and for
likelihood apart. A page that shows several scorecards corrects over all of them: see `corrected_over_page`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa

from openlm_pipeline.evaluation import estimates, statistics
from openlm_pipeline.evaluation.averages import AverageDefinition
from openlm_pipeline.evaluation.estimates import Tested
from openlm_pipeline.evaluation.scores import gold_bytes
from openlm_pipeline.fingerprint import Neutral
from openlm_pipeline.strict import Strict

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.scorecard import Scorecard

ALPHA = 0.05
"""Level of a family of tests."""
COMPARED_COLUMNS = [
    "task", "num_fewshot", "category", "item", "item_hash", "prompt_hash", "metric", "correct", "nll", "choice_bytes",
    "gold", "cluster",
]  # fmt: skip
"""Those of the per-item table that a comparison reads."""


class Difference(Strict):
    """One task or average of a model minus that of another, item by item."""

    measure: str
    """`copa/0-shot`, or the name of an average."""
    against: str
    """Milestone or baseline."""
    kind: Annotated[Literal["accuracy", "bits_per_byte"], Neutral("accuracy")] = "accuracy"
    """What differs; fewer bits per byte of the right continuations are better."""
    delta: float | None = None
    """Here minus there; of a task with categories, the mean of its categories' differences."""
    ci_low: float | None = None
    ci_high: float | None = None
    """95% interval, paired (accuracy: Bonett and Price 2012; bits per byte: Student; sums: errors in quadrature)."""
    p_value: float | None = None
    """Two-sided: of a task's accuracy the exact test of signs (McNemar's where no items go together), of its bits per
    byte Student's, of sums normal."""
    p_holm: float | None = None
    """Adjusted for the number of tests in the family."""
    significant: bool = False
    """p_holm is below 0.05."""
    mde: float | None = None
    """Difference that this paired test finds with 80% power, from how often these two models disagree."""
    note: str | None = None
    """Why there is no comparison."""

    @property
    def better(self) -> bool | None:
        """Whether here is significantly better, or worse; None where the test can't tell."""
        if not self.significant or not self.delta:
            return None
        return (self.delta > 0) == (self.kind == "accuracy")


def compare(
    ours: Mapping[str, pa.Table],
    theirs: Mapping[str, pa.Table],
    against: str,
    *,
    averages: Sequence[AverageDefinition],
    chances: Mapping[str, float],
    same_prompts: bool,
) -> tuple[Difference, ...]:
    """Differences of all tasks that `ours` has, then of all averages, then the same of their bits per byte.

    Args:
        ours, theirs: `label/k-shot` -> its rows of the per-item table.
        same_prompts: the token ids must be the same too, as they are between milestones of one run; another model may
            have another tokenizer, and then the same questions are enough.
    """
    tasks = {name: _compare_task(table, theirs.get(name), against, same_prompts) for name, table in ours.items()}
    of_bits = [a for a in averages if a.kind == "bits_per_byte"]
    of_accuracy = [a for a in averages if a.kind != "bits_per_byte"]

    def made(name: str, kind: str, found: Tested | str) -> Difference:
        if isinstance(found, str):
            return Difference(measure=name, against=against, kind=kind, note=found)
        estimate = found.estimate
        return Difference(
            measure=name,
            against=against,
            kind=kind,
            delta=estimate.value,
            ci_low=estimate.low if math.isfinite(estimate.low) else None,
            ci_high=estimate.high if math.isfinite(estimate.high) else None,
            p_value=found.p_value,
            mde=statistics.minimum_detectable_effect(estimate.error) if math.isfinite(estimate.error) else None,
        )

    differences: list[Difference] = []
    for kind, named in (("accuracy", of_accuracy), ("bits_per_byte", of_bits)):
        of_tasks = {name: task[kind] for name, task in tasks.items()}
        means = [made(a.name, kind, _compare_average(a, of_tasks, chances)) for a in named]
        alone = [made(name, kind, found) for name, found in of_tasks.items() if found != _NO_SUCH]
        for family in (alone, means[:1], means[1:]):
            differences += _corrected(family)
    return tuple(differences)


_KINDS = ("accuracy", "bits_per_byte")
_NO_SUCH = "none of its items has this"


def _compare_task(ours: pa.Table, theirs: pa.Table | None, against: str, same_prompts: bool) -> dict[str, Tested | str]:
    """A task's differences by kind; one that could not be made is a note."""
    if theirs is None or not theirs.num_rows:
        return dict.fromkeys(_KINDS, f"not scored at {against}")
    keys = ["category", "item", "item_hash", "metric", *(["prompt_hash"] if same_prompts else [])]
    if not _same(ours, theirs, keys):
        order = [("category", "ascending"), ("item", "ascending")]
        ours, theirs = ours.sort_by(order), theirs.sort_by(order)
        if not _same(ours, theirs, keys):
            return dict.fromkeys(_KINDS, f"other {'items or prompts' if same_prompts else 'items'} than at {against}")
    category = ours["category"].combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()
    parts = [category == k for k in range(category.max() + 1)]
    codes = estimates.cluster_codes(ours)

    def differ(one: Callable[..., Tested], *columns) -> Tested:
        found = [(1 / len(parts), one(*(c[part] for c in columns), codes[part])) for part in parts]
        return estimates.combined_difference(found)

    accuracy: Tested | str = _NO_SUCH
    if not ours["correct"].null_count:
        accuracy = differ(estimates.accuracy_difference, ours["correct"].to_numpy(), theirs["correct"].to_numpy())
    bits: Tested | str = _NO_SUCH
    if not ours["nll"].null_count and not theirs["nll"].null_count and (sizes := gold_bytes(ours)) is not None:
        bits = differ(estimates.likelihood_difference, ours["nll"].to_numpy(), theirs["nll"].to_numpy(), sizes)
    return {"accuracy": accuracy, "bits_per_byte": bits}


def _same(ours: pa.Table, theirs: pa.Table, keys: list[str]) -> bool:
    return ours.select(keys).combine_chunks().equals(theirs.select(keys).combine_chunks())


def _compare_average(
    average: AverageDefinition, tasks: Mapping[str, Tested | str], chances: Mapping[str, float]
) -> Tested | str:
    for task in average.weights:
        found = tasks.get(task, "has no score here")
        if isinstance(found, str):
            return f"{task} {found}" if task not in tasks else f"{task}: {found}"
    return estimates.combined_difference([(w, tasks[task]) for task, w in average.coefficients(chances).items()])


def _corrected(family: Sequence[Difference]) -> list[Difference]:
    return _adjusted(family, statistics.holm([d.p_value for d in family if d.p_value is not None]))


def _adjusted(family: Sequence[Difference], p_values: Sequence[float]) -> list[Difference]:
    """With the adjusted p-value of each that has one, in their order."""
    adjusted = iter(p_values)
    tested = (next(adjusted) if d.p_value is not None else None for d in family)
    return [
        d if p is None else d.model_copy(update={"p_holm": p, "significant": p < ALPHA}) for d, p in zip(family, tested)
    ]


def corrected_over_page(
    cards: "Sequence[Scorecard]", claims: Sequence[float] = ()
) -> "tuple[list[Scorecard], list[float]]":
    """Scorecards whose changes, with what else the page that shows them says, are wrong one time in twenty.

    Changes are one family of tests and claims another, each at half the level.

    Args:
        claims: p-values of what else the page says.

    Returns:
        The scorecards, and the adjusted p-values of the claims.
    """
    families = [card.changes for card in cards]
    tests = [d.p_value for family in families for d in family if d.p_value is not None]
    share = 2 if tests and claims else 1
    adjusted = [min(1.0, share * p) for p in (*statistics.holm(tests), *statistics.holm(claims))]
    done, at = [], 0
    for card, family in zip(cards, families):
        size = sum(d.p_value is not None for d in family)
        changes = tuple(_adjusted(family, adjusted[at : at + size]))
        done.append(card.model_copy(update={"changes": changes}))
        at += size
    return done, adjusted[at:]
