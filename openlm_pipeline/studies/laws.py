"""Scaling laws: loss from parameters N and training tokens D, error from loss, and the best setting of each size.

Both laws of loss are L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556). That of Gadre et al.
(2024, arXiv 2403.08540), L(C, M) = E + (a M^h + b M^-h) C^-h with C = 6ND and M = D/N, is the same with
alpha = beta = 2h, A = a 6^-h and B = b 6^-h. Losses are in nats per token, errors are 1 - accuracy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import numpy as np

from openlm_pipeline.errors import ConfigError

LawName = Literal["gadre", "hoffmann"]
Estimator = Literal["huber", "gadre"]
COEFFICIENTS: dict[str, tuple[str, ...]] = {
    "gadre": ("E", "a", "b", "h"),
    "hoffmann": ("E", "A", "B", "alpha", "beta"),
    "error": ("epsilon", "k", "gamma"),
}
"""Of each law, in the order in which they are returned."""
_HUBER = 1e-3
"""Width of the quadratic part on log loss, as Hoffmann et al. chose it."""


@dataclass(frozen=True)
class Point:
    """One finished run."""

    name: str
    parameters: int
    """With embeddings."""
    tokens: int
    """Trained on."""
    loss: float
    """On held-out text, nats per token."""
    loss_error: float | None = None
    """Standard error of the evaluation, nats."""
    error: float | None = None
    """1 - average accuracy."""
    seed: int = 0
    dataset: str = ""
    model: str = ""
    settings: Mapping[str, float] = field(default_factory=dict)
    """What was varied, such as the learning rate."""

    @property
    def compute(self) -> float:
        """FLOP of training, 6ND."""
        return 6.0 * self.parameters * self.tokens

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Fit:
    """A fitted law."""

    law: str
    estimator: Estimator
    theta: np.ndarray
    """What the estimator optimises, shape (unknowns,)."""

    def coefficients(self) -> dict[str, float]:
        """In the form of the paper, by the names in `COEFFICIENTS`."""
        if self.law == "error":
            return dict(zip(COEFFICIENTS["error"], map(float, self.theta)))
        e, a, b, alpha, beta = self.hoffmann()
        if self.law == "hoffmann":
            return dict(zip(COEFFICIENTS["hoffmann"], (e, a, b, alpha, beta)))
        h = alpha / 2
        return dict(zip(COEFFICIENTS["gadre"], (e, a * 6**h, b * 6**h, h)))

    def hoffmann(self) -> tuple[float, float, float, float, float]:
        """E, A, B, alpha and beta."""
        if self.estimator == "gadre":
            p, q, s, e = map(float, self.theta)
            return e, p, q * 6 ** (s / 2), -s, -s
        *logs, alpha, beta = _untied(self.theta)
        return (*map(math.exp, logs), float(alpha), float(beta))

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Predicted loss, broadcast over both."""
        e, a, b, alpha, beta = self.hoffmann()
        with np.errstate(over="ignore", invalid="ignore"):  # a refit to much noise may run off
            return e + a * np.asarray(parameters, float) ** -alpha + b * np.asarray(tokens, float) ** -beta

    def optimum(self, compute: float) -> tuple[float, float]:
        """The N and D of least loss at so much compute, in FLOP (Hoffmann et al., equation 4).

        Raises:
            ConfigError: the law has none, as more parameters or more tokens alone make the loss no better.
        """
        _, a, b, alpha, beta = self.hoffmann()
        if min(a, b, alpha, beta) <= 0:
            raise ConfigError("the fitted law has no best size: more parameters or more tokens make no loss better")
        scale = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
        parameters = scale * (compute / 6) ** (beta / (alpha + beta))
        return parameters, compute / 6 / parameters


def _untied(theta: np.ndarray) -> np.ndarray:
    """log E, log A, log B, alpha, beta; where both exponents are one, it is given once."""
    return theta if len(theta) == 5 else np.append(theta, theta[-1])


def fit_loss(
    points: Sequence[Point],
    law: LawName = "gadre",
    estimator: Estimator = "huber",
    *,
    losses: np.ndarray | None = None,
    start: Fit | None = None,
) -> Fit:
    """Fit a law of loss.

    Args:
        estimator: `huber`: Huber loss on log L, in log E, log A, log B and the exponents, the best of many starts.
            `gadre`: least squares on L as github mlfoundations/scaling has it (scaling/laws.py), of 128 starts.
        losses: instead of the points' own, shape (points,).
        start: begin there alone, which suits losses that differ little from those of that fit.

    Raises:
        ConfigError: there are fewer points than unknowns, or the estimator is not of this law.
    """
    unknowns = len(COEFFICIENTS[law])
    if len(points) < unknowns:
        raise ConfigError(f"{len(points)} runs can't settle the {unknowns} unknowns of this law; add runs")
    n = np.array([p.parameters for p in points], float)
    d = np.array([p.tokens for p in points], float)
    y = np.array([p.loss for p in points]) if losses is None else losses
    if estimator == "gadre":
        if law != "gadre":
            raise ConfigError(f"the estimator of Gadre et al. fits their law alone, not {law}; take --estimator huber")
        return Fit(law, estimator, _fit_gadre(n, d, y, start))
    starts = [start.theta] if start else _starts(n, d, y, law)
    if not start:  # plain least squares get near in a few steps, where Huber's take hundreds
        near = sorted((_fit_logs(n, d, y, s, "linear", 60) for s in starts), key=lambda found: found[0])
        starts = [theta for _, theta in near[:: max(1, len(near) // 3)]]
    return Fit(law, estimator, min((_fit_logs(n, d, y, s) for s in starts), key=lambda found: found[0])[1])


def _fit_logs(
    n: np.ndarray, d: np.ndarray, y: np.ndarray, start: np.ndarray, loss: str = "huber", most: int = 300
) -> tuple[float, np.ndarray]:
    """Cost and theta. The exponents multiply centred logarithms meanwhile, which makes the problem well conditioned."""
    from scipy.optimize import least_squares

    log_n, log_d, log_y = np.log(n), np.log(d), np.log(y)
    mean_n, mean_d = log_n.mean(), log_d.mean()
    tied = len(start) == 4

    def terms(theta: np.ndarray) -> np.ndarray:
        e, a, b, alpha, beta = _untied(theta)
        return np.stack([np.full_like(log_n, e), a - alpha * (log_n - mean_n), b - beta * (log_d - mean_d)])

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(terms(theta)) - log_y

    def jacobian(theta: np.ndarray) -> np.ndarray:
        u = terms(theta)
        share = np.exp(u - np.logaddexp.reduce(u))
        by_n, by_d = -share[1] * (log_n - mean_n), -share[2] * (log_d - mean_d)
        return np.stack([*share, *([by_n + by_d] if tied else [by_n, by_d])], axis=1)

    shift = np.zeros_like(start)
    shift[1:3] = 1
    means = np.array([0, mean_n, mean_d, 0, 0])[: len(start)]

    def exponents(theta: np.ndarray) -> np.ndarray:
        _, _, _, alpha, beta = _untied(theta)
        return np.array([0, alpha, beta, 0, 0])[: len(start)]

    found = least_squares(
        residuals, start - shift * means * exponents(start), jacobian, loss=loss, f_scale=_HUBER, max_nfev=most
    )
    return found.cost, found.x + shift * means * exponents(found.x)


def _starts(n: np.ndarray, d: np.ndarray, y: np.ndarray, law: LawName) -> list[np.ndarray]:
    """For E and the exponents a grid; A and B by non-negative least squares."""
    from scipy.optimize import nnls

    grid = (0.15, 0.3, 0.5)
    pairs = product(grid, grid) if law == "hoffmann" else ((s, s) for s in (0.1, 0.2, 0.3, 0.4, 0.6))
    starts = []
    for (alpha, beta), share in product(pairs, (0.3, 0.6, 0.9)):
        columns = np.stack([n**-alpha, d**-beta], axis=1)
        scale = columns.max(axis=0)
        a, b = nnls(columns / scale, y - share * y.min())[0] / scale
        floor = 1e-3 * y.min() / scale
        logs = np.log([share * y.min(), max(a, floor[0]), max(b, floor[1])])
        starts.append(np.array([*logs, alpha, beta][: len(COEFFICIENTS[law])]))
    return starts


def _fit_gadre(n: np.ndarray, d: np.ndarray, y: np.ndarray, start: Fit | None) -> np.ndarray:
    """p, q, s and E of L = p N^s + q 6^(s/2) (MN)^s + E."""

    def law(x: np.ndarray, p: float, q: float, s: float, e: float) -> np.ndarray:
        return p * x[0] ** s + q * 6 ** (s / 2) * x[1] ** s + e

    scales = (1e2, 3e2, 1e3, 3e3)
    starts = [start.theta] if start else list(product(scales, scales, (-0.1, -0.3), (0, 1, 2, 10)))
    return _curve_fit(law, np.stack([n, d]), y, starts)


def fit_error(losses: np.ndarray, errors: np.ndarray, start: Fit | None = None) -> Fit:
    """Fit err(L) = epsilon - k exp(-gamma L) to errors of the same shape (Gadre et al. 2024, equation 5).

    Raises:
        ConfigError: there are fewer points than unknowns.
    """
    if len(losses) < 3:
        raise ConfigError(f"{len(losses)} runs with an error can't settle the 3 unknowns of its law; add runs")
    return Fit("error", "huber", _curve_fit(error_of_loss, losses, errors, [start.theta] if start else [(1, 1, 1)]))


def error_of_loss(loss: np.ndarray, epsilon: float, k: float, gamma: float) -> np.ndarray:
    return epsilon - k * np.exp(-gamma * loss)


def _curve_fit(law: Callable[..., np.ndarray], x: np.ndarray, y: np.ndarray, starts: Sequence) -> np.ndarray:
    """The least squares of all starts that converge.

    Raises:
        ConfigError: none does.
    """
    import warnings

    from scipy.optimize import OptimizeWarning, curve_fit

    best, least = None, math.inf
    for start in starts:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", OptimizeWarning)  # no covariance, which nothing here asks for
            try:
                theta, _ = curve_fit(law, x, y, p0=start, maxfev=10_000)
            except RuntimeError:  # this start does not converge
                continue
            cost = float(np.sum((law(x, *theta) - y) ** 2))
        if cost < least:
            best, least = theta, cost
    if best is None:
        raise ConfigError("the law can't be fitted to these runs: no start converges")
    return best


@dataclass(frozen=True)
class Optimum:
    """The best value of a setting as a power of the model's size: value = scale * N^exponent."""

    setting: str
    scale: float
    exponent: float
    best: dict[int, float]
    """Parameters -> the value of least loss."""
    hold_out_error: float | None
    """Of the largest size, predicted from the others: predicted / found - 1. None below three sizes."""

    def at(self, parameters: float) -> float:
        """The best value of a model of this size.

        Raises:
            ConfigError: the law was not held against a size that it has not seen.
        """
        if self.hold_out_error is None:
            raise ConfigError(
                f"the best {self.setting} is known of {len(self.best)} sizes, which leaves none to hold out: vary it "
                "at 3 or more before predicting it for another"
            )
        return self.scale * parameters**self.exponent


def fit_optimum(points: Sequence[Point], setting: str) -> Optimum:
    """The minimum of a parabola in log(setting) for each size, and a power law through the minima.

    A size counts at the budget with the most values, the larger of equals; of other settings the best is taken.

    Raises:
        ConfigError: a size has two values alone, its best value is at the end of those tried, or there is one size.
    """
    best: dict[int, float] = {}
    for size in sorted({p.parameters for p in points}):
        budgets = (_mean_losses(points, setting, size, tokens) for tokens in {p.tokens for p in points})
        values = max(budgets, key=lambda found: (len(found[1]), found[0]))[1]
        if len(values) == 1:
            continue
        if len(values) == 2:
            raise ConfigError(f"{setting} has 2 values at {size:,} parameters; a minimum needs 3")
        x, y = (np.array(of) for of in zip(*((math.log(value), values[value]) for value in sorted(values))))
        at = int(y.argmin())
        if at in (0, len(y) - 1):
            side = "lower" if at == 0 else "higher"
            raise ConfigError(
                f"the best {setting} at {size:,} parameters is {math.exp(x[at]):g}, the end of those tried; add {side}"
            )
        near = slice(max(0, at - 2), at + 3)
        curve, slope, _ = np.polyfit(x[near], y[near], 2)
        inside = curve > 0 and x[0] < -slope / 2 / curve < x[-1]
        best[size] = math.exp(-slope / 2 / curve if inside else x[at])
    return _power_law(setting, best)


def _mean_losses(points: Sequence[Point], setting: str, size: int, tokens: int) -> tuple[int, dict[float, float]]:
    """The tokens, and by value of the setting the mean loss over seeds, at the best of the other settings."""
    cells: dict[float, dict[tuple, list[float]]] = {}
    for p in points:
        if (p.parameters, p.tokens) == (size, tokens) and setting in p.settings:
            rest = tuple(sorted((k, v) for k, v in p.settings.items() if k != setting))
            cells.setdefault(p.settings[setting], {}).setdefault(rest, []).append(p.loss)
    return tokens, {value: min(float(np.mean(losses)) for losses in of.values()) for value, of in cells.items()}


def _power_law(setting: str, best: dict[int, float]) -> Optimum:
    if len(best) < 2:
        raise ConfigError(f"{setting} was varied at one size; a power law needs 2, and a third to hold out")
    sizes, values = np.log(list(best)), np.log(list(best.values()))
    exponent, scale = np.polyfit(sizes, values, 1)
    held_out = None
    if len(best) > 2:
        held_out = math.exp(np.polyval(np.polyfit(sizes[:-1], values[:-1], 1), sizes[-1]) - values[-1]) - 1
    return Optimum(setting, math.exp(scale), float(exponent), best, held_out)
