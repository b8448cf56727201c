"""Intervals and tests for accuracies: pure functions of counts. scipy is imported on first use."""

import math
from collections.abc import Sequence


def _z(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))


def wilson_interval(num_correct: int, num_items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); sensible at 0, at 1 and for few items.

    Raises:
        ValueError: no items, or more correct ones than items.
    """
    if not 0 <= num_correct <= num_items or not num_items:
        raise ValueError(f"{num_correct} correct of {num_items} items")
    z2 = _z((1 + confidence) / 2) ** 2
    p, n = num_correct / num_items, num_items
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def standard_error(num_correct: int, num_items: int) -> float:
    """Standard error of an accuracy, sqrt(p (1 - p) / (n - 1)), as lm-evaluation-harness has it; NaN for one item."""
    if num_items < 2:
        return math.nan
    p = num_correct / num_items
    return math.sqrt(p * (1 - p) / (num_items - 1))


def centred_accuracy(accuracy: float, chance: float) -> float:
    """(accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect, as in LLM Foundry's gauntlet."""
    return (accuracy - chance) / (1 - chance)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p-value from the items that exactly one of two models gets right (McNemar 1947).

    Under no difference the discordant items fall either way with probability 1/2; 1.0 if there are none.
    """
    from scipy.stats import binomtest

    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    adjusted, running, m = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def minimum_detectable_effect(num_items: int, discordance: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true difference of accuracy that a two-sided paired test finds with probability `power`.

    Normal approximation (z_{1-alpha/2} + z_{power}) sqrt(discordance / n), after Miettinen (1968).

    Args:
        discordance: share of items that exactly one of the two models gets right. Two models of accuracy p that err
            independently have 2 p (1 - p), which gives the unpaired formula; similar models have less.
    """
    return (_z(1 - alpha / 2) + _z(power)) * math.sqrt(discordance / num_items)


def mean_interval(
    values: Sequence[float], standard_errors: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high) of independent values: their errors add in quadrature; NaN errors give a NaN interval."""
    mean = math.fsum(values) / len(values)
    half = _z((1 + confidence) / 2) * math.sqrt(math.fsum(se * se for se in standard_errors)) / len(values)
    return mean, mean - half, mean + half
