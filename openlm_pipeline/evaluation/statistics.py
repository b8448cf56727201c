"""Intervals and tests: pure functions of counts, estimates and errors. scipy is imported on first use."""

import math
from collections.abc import Sequence

import numpy as np

_EXACT_SUM = 5000
"""Signed sums up to this are tested exactly; beyond it the normal approximation is as good."""


_Z, _Z_POWER = 1.959963984540054, 0.8416212335729143
"""Quantiles of the normal distribution: of a 95% interval and a two-sided test at 5%, and of 80% power."""


def wilson_interval(num_correct: float, num_items: float) -> tuple[float, float]:
    """Wilson score interval (95%) of a proportion (Wilson 1927); sensible at 0, at 1 and for few items.

    Args:
        num_items: may be a fraction, of what items that go together are worth.

    Raises:
        ValueError: no items, or more correct ones than items.
    """
    if not 0 <= num_correct <= num_items * (1 + 1e-12) or not num_items:
        raise ValueError(f"{num_correct} correct of {num_items} items")
    z2 = _Z**2
    p, n = num_correct / num_items, num_items
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def standard_error(accuracy: float, num_items: int) -> float:
    """Standard error of an accuracy, sqrt(p (1 - p) / (n - 1)), as lm-evaluation-harness has it; NaN for one item."""
    return math.nan if num_items < 2 else math.sqrt(accuracy * (1 - accuracy) / (num_items - 1))


def centred_accuracy(accuracy: float, chance: float) -> float:
    """(accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect, as in LLM Foundry's gauntlet."""
    return (accuracy - chance) / (1 - chance)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p-value from the items that exactly one of two models gets right (McNemar 1947).

    Under no difference the discordant items fall either way with probability 1/2; 1.0 if there are none.
    """
    from scipy.special import bdtr

    if only_first + only_second == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def sign_flip_exact(sums: np.ndarray) -> float:
    """Two-sided p-value of sums, int[G], whose signs are a fair coin's under no difference; sums of ±1 give McNemar's.

    Exact, by the distribution of their total; normal where the sums are many.
    """
    sizes = np.abs(sums[sums != 0])
    total, most = abs(int(sums.sum())), int(sizes.sum())
    if not most:
        return 1.0
    if (sizes == 1).all():
        return mcnemar_exact((most + total) // 2, (most - total) // 2)
    if most > _EXACT_SUM:
        return normal_p_value(total, math.sqrt(float((sizes.astype(float) ** 2).sum())))
    chances = np.zeros(2 * most + 1)
    chances[most] = 1.0
    for size in sizes.tolist():
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    return min(1.0, float(chances[most + total :].sum() + chances[: most - total + 1].sum()))


def student_half_width(standard_error: float, clusters: int) -> float:
    """Half of a 95% interval by Student's t with one degree of freedom fewer than clusters."""
    from scipy.special import stdtrit

    return float(stdtrit(clusters - 1, 0.975)) * standard_error


def student_p_value(estimate: float, standard_error: float, clusters: int) -> float:
    """Two-sided p-value of `estimate` being 0, by Student's t; 1 where nothing tells its error."""
    from scipy.special import stdtr

    if clusters < 2 or not standard_error > 0:
        return 1.0
    return float(2 * stdtr(clusters - 1, -abs(estimate) / standard_error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    adjusted, running, m = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def paired_standard_error(only_first: int, only_second: int, num_items: int) -> float:
    """Standard error of the difference of two accuracies over the same items, from the items only one gets right.

    One item is added to each of the two counts and two to all (Bonett and Price 2012, Statistical Methods in Medical
    Research 21:441), so that two models which agree on all of a few items don't seem to differ by exactly nothing.
    """
    first, second, n = only_first + 1, only_second + 1, num_items + 2
    return math.sqrt(((first + second) / n - ((first - second) / n) ** 2) / n)


def paired_interval(only_first: int, only_second: int, num_items: int, *, effect: float = 1.0) -> tuple[float, float]:
    """Adjusted Wald interval of accuracy of the first minus the second (Bonett and Price 2012).

    Args:
        effect: how many times the variance is that of independent items.
    """
    centre, difference = (only_first - only_second) / (num_items + 2), (only_first - only_second) / num_items
    error = paired_standard_error(only_first, only_second, num_items) * math.sqrt(effect)
    half = half_width(error)
    return min(difference, max(-1.0, centre - half)), max(difference, min(1.0, centre + half))


def half_width(standard_error: float) -> float:
    """Half of a normal 95% interval."""
    return _Z * standard_error


def normal_p_value(estimate: float, standard_error: float) -> float:
    """Two-sided p-value of `estimate` being 0, by the normal approximation; 1 without an error."""
    if not standard_error > 0:
        return 1.0
    return math.erfc(abs(estimate) / standard_error / math.sqrt(2))


def minimum_detectable_effect(standard_error: float) -> float:
    """Smallest true difference that a two-sided test at 5% finds with probability 0.8: (z_{0.975} + z_{0.8}) s.e.

    Args:
        standard_error: of the difference. For two accuracies over the same n items it is sqrt(discordance / n), where
            discordance is the share of items that exactly one model gets right (Miettinen 1968); two models of
            accuracy p that err independently have 2 p (1 - p), the unpaired formula, and similar models have less.
    """
    return (_Z + _Z_POWER) * standard_error
