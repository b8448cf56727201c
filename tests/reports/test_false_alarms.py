"""Pages about models of which none is better than another say so 19 times in 20, whatever they show."""

import numpy as np
import pytest

from openlm_pipeline.evaluation import estimates as es
from openlm_pipeline.evaluation import statistics as st
from openlm_pipeline.evaluation.comparison import Difference, corrected_over_page
from openlm_pipeline.evaluation.scorecard import Scorecard
from openlm_pipeline.evaluation.scores import Average
from openlm_pipeline.reports.claims import CHANCE, LEAD, claims

PAGES = 1000
MOST = 0.05 + 3 * (0.05 * 0.95 / PAGES) ** 0.5


def card(label: str, changes: list[float] = (), headline: es.Estimate | None = None, against=()) -> Scorecard:
    made = [
        Difference.model_construct(measure=f"task_{i}/0-shot", against="before", kind="accuracy", delta=0.1, p_value=p)
        for i, p in enumerate(changes)
    ]
    averages = ()
    if headline:
        ends = {"value": headline.value, "ci_low": headline.low, "ci_high": headline.high}
        averages = (Average.model_construct(name="all_tasks", kind="accuracy", chance=0.25, **ends),)
    return Scorecard.model_construct(
        run="r", milestone=label, averages=averages, changes=tuple(made), against=tuple(against)
    )


def test_twelve_equal_milestones_on_eleven_tasks():
    """Each milestone compared with the one before on 100 items of each task: 121 tests of one page, and uncorrected."""
    rng, marked, naive = np.random.default_rng(0), 0, 0
    for _ in range(PAGES):
        chances = rng.beta(4, 4, (11, 100))
        right = rng.random((12, 11, 100)) < chances
        gained = (right[1:] & ~right[:-1]).sum(2)
        lost = (right[:-1] & ~right[1:]).sum(2)
        p_values = [[st.mcnemar_exact(int(a), int(b)) for a, b in zip(*counts)] for counts in zip(gained, lost)]
        page, _ = corrected_over_page([card(f"m{i}", p) for i, p in enumerate(p_values)])
        marked += any(d.significant for c in page for d in c.changes)
        naive += any(min(st.holm(p)) < 0.05 for p in p_values)  # each milestone by itself
    assert marked / PAGES <= MOST < 0.15 < naive / PAGES


@pytest.mark.parametrize("k", [2, 10])
def test_the_best_of_guessing_models_is_not_above_chance(k: int):
    rng, alarms = np.random.default_rng(k), {CHANCE: 0, LEAD: 0}
    codes = [np.arange(150, dtype=np.uint64) + 1000 * t for t in range(4)]
    for _ in range(PAGES):
        right = rng.random((k, 4, 150)) < 0.25
        cards = [
            card(f"m{i}", headline=es.combined([(0.25, es.accuracy(r, c)) for r, c in zip(of, codes)]))
            for i, of in enumerate(right)
        ]
        best, second = sorted(range(k), key=lambda i: -cards[i].average)[:2]
        parts = [(0.25, es.accuracy_difference(a, b, c)) for a, b, c in zip(right[best], right[second], codes)]
        found = es.combined_difference(parts)
        lead = Difference.model_construct(
            measure="all_tasks",
            against=f"m{second}",
            kind="accuracy",
            delta=found.estimate.value,
            p_value=found.p_value,
        )
        cards[best] = cards[best].model_copy(update={"against": (lead,)})
        said = claims(cards, [])
        _, adjusted = corrected_over_page(cards, list(said.values()))
        for name, p in zip(said, adjusted):
            alarms[name] += p < 0.05
    assert sum(alarms.values()) / PAGES <= MOST
