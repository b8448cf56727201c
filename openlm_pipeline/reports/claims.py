"""What a report says of the best milestone, with p-values that know that it is the best of many."""

from collections.abc import Sequence

from openlm_pipeline.evaluation import statistics
from openlm_pipeline.evaluation.comparison import Difference
from openlm_pipeline.evaluation.scorecard import Scorecard

LEAD, CHANCE, BASELINE = "lead", "chance", "baseline"


def claims(cards: Sequence[Scorecard], baselines: Sequence[Scorecard]) -> dict[str, float]:
    """p-values of: the best milestone leads the second, is above chance, differs from the best baseline.

    The best of k guesses is above chance, and above a baseline, k times as easily as one is; a lead over the second is
    no larger than between any two.
    """
    scored = _by_score(cards)
    if not scored:
        return {}
    best, found = scored[0], {}
    if len(scored) > 1 and (gap := paired(best, scored[1])):
        found[LEAD] = gap.p_value
    if best.headline.chance is not None and best.headline.ci_low is not None:
        over = best.average - best.headline.chance
        side = best.average - best.headline.ci_low if over > 0 else best.headline.ci_high - best.average
        found[CHANCE] = statistics.normal_p_value(over, side / statistics.half_width(1.0))
    others = [c for c in baselines if c.average is not None]
    if others and (gap := paired(best, max(others, key=lambda c: c.headline.goodness))):
        found[BASELINE] = gap.p_value
    picked = {LEAD: 1, CHANCE: len(scored), BASELINE: len(scored) * len(others)}
    return {name: min(1.0, p * picked[name]) for name, p in found.items()}


def _by_score(cards: Sequence[Scorecard]) -> list[Scorecard]:
    return sorted((c for c in cards if c.average is not None), key=lambda c: -c.headline.goodness)


def best_two(cards: Sequence[Scorecard]) -> list[str]:
    """Labels of the best milestone and the second, between which a report says how large the lead is."""
    return [card.label for card in _by_score(cards)[:2]]


def paired(card: Scorecard, other: Scorecard) -> Difference | None:
    """The comparison of two scorecards' headlines, whichever of them has it."""
    measure = card.headline.name
    return card.difference(measure, other.label) or other.difference(measure, card.label)
