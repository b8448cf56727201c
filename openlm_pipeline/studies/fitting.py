"""A study's fit: the law of its runs, its error on the largest size, and what it predicts, with 95% intervals.

Intervals are of refits. Each redraws every loss around the fitted law with the noise of a run, and a new run's noise is
added to what is predicted. The noise is the larger of what the law leaves over and of what seeds and the evaluation
explain; of few runs it is itself uncertain, so each refit draws it from its chi-squared distribution, as a t-test does.
Resampling runs instead would leave fewer runs than unknowns where there are few.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

import numpy as np

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.studies.laws import (
    COEFFICIENTS,
    Estimator,
    Fit,
    LawName,
    Optimum,
    Point,
    error_of_loss,
    fit_error,
    fit_loss,
    fit_optimum,
)
from openlm_pipeline.studies.results import HoldOut, Interval, Noise, Prediction, StudyFit, check
from openlm_pipeline.units import format_tokens

_LEVELS = (2.5, 97.5)
_SAME = 1.05
"""Sizes and budgets within this factor count as equal where a run is looked for by them."""


def fit_study(
    points: Sequence[Point],
    predict: tuple[int, int] | None = None,
    *,
    law: LawName = "gadre",
    estimator: Estimator = "huber",
    error_points: Sequence[Point] | None = None,
    others: Sequence[Point] = (),
    refits: int = 200,
    seed: int = 0,
    study: str = "",
) -> StudyFit:
    """Fit a law of loss, and one of error where runs have errors; hold the largest size out; predict.

    Where settings were varied, the runs of the best setting at each size and budget are fitted.

    Args:
        predict: parameters and tokens. A run that has them within 5% is not fitted; its exact numbers are taken, and
            the prediction is compared with it.
        error_points: for the law of error; default: the points that have an error.
        others: runs that are not fitted, to compare with.
        refits: behind the intervals.

    Raises:
        ConfigError: there are too few runs for the law, or, with `predict`, for a hold-out.
    """
    target, measured = _target(predict, [*points, *others]) if predict else (None, None)
    every = [p for p in points if p is not measured]
    points = best_of_settings(every)
    _enough(points, law)
    fit = fit_loss(points, law, estimator)
    noise = noise_of(points, fit)
    random = np.random.default_rng(seed)
    draws = _refits(points, fit, noise, refits, random)
    hold_out, why = _hold_out(points, law, estimator, refits, random)
    warnings = _warnings(points, law, fit, noise, hold_out)
    if why:
        warnings.append(why)
    prediction, error_coefficients = None, {}
    scored = [p for p in (points if error_points is None else error_points) if p.error is not None]
    if target:
        if hold_out is None:
            raise ConfigError(f"nothing is predicted without a hold-out error: {why}")
        scored = [p for p in scored if p is not measured]
        loss = _predicted(fit, draws, noise, target, random)
        prediction = Prediction(
            *(target.parameters, target.tokens, loss, hold_out),
            measured=check(measured, loss, measured.loss) if measured else None,
        )
        warnings += _far(points, target)
    if scored:
        try:
            chain = _errors(scored, points, fit, draws, prediction, law, estimator, random)
        except ConfigError as e:
            warnings.append(f"no error is predicted: {e}")
        else:
            error_coefficients, prediction = chain
            if prediction and prediction.error and measured and measured.error:
                of_error = check(measured, prediction.error, measured.error)
                prediction = replace(prediction, measured_error=of_error)
    coefficients = _intervals(fit, draws)
    warnings += [
        f"{name} is hardly known from these runs: {of.low:.3g} to {of.high:.3g}"
        for name, of in coefficients.items()
        if name in ("E", "h", "alpha", "beta") and of.low is not None and of.high - of.low > of.value
    ]
    optima, refused = _optima(every)
    try:
        envelope = _envelope([*points, *others], prediction, fit)
    except ConfigError as e:
        envelope = ()
        warnings.append(str(e))
    return StudyFit(
        study=study,
        law=law,
        estimator=estimator,
        coefficients=coefficients,
        noise=noise,
        hold_out=hold_out,
        prediction=prediction,
        error_coefficients=error_coefficients,
        runs=_runs([*every, *others, *([measured] if measured else [])], points, fit),
        envelope=envelope,
        curves=_curves(points, prediction, fit),
        optima=optima,
        warnings=(*warnings, *refused),
        refits=len(draws),
    )


def best_of_settings(points: Sequence[Point]) -> list[Point]:
    """Of each size and budget the runs, of all seeds, with the settings of least mean loss."""

    def cell(p: Point) -> tuple[int, int]:
        return p.parameters, p.tokens

    def settings(p: Point) -> list[tuple[str, float]]:
        return sorted(p.settings.items())

    kept = []
    for _, found in groupby(sorted(points, key=cell), cell):
        choices = [list(runs) for _, runs in groupby(sorted(found, key=settings), settings)]
        kept += min(choices, key=lambda runs: np.mean([p.loss for p in runs]))
    return kept


def noise_of(points: Sequence[Point], fit: Fit) -> Noise:
    """What the fit leaves over, and what seeds and evaluation explain."""
    squares, freedom, logs = 0.0, 0, 0.0
    cells: dict[tuple, list[Point]] = {}
    for p in points:
        cells.setdefault((p.parameters, p.tokens, *sorted(p.settings.items())), []).append(p)
    twins = [runs for runs in cells.values() if len({p.seed for p in runs}) > 1]
    for runs in twins:
        losses = np.array([p.loss for p in runs])
        squares += float(np.sum((losses - losses.mean()) ** 2))
        logs += float(np.sum((np.log(losses) - np.log(losses).mean()) ** 2))
        freedom += len(runs) - 1
    evaluated = [p for p in points if p.loss_error]
    evaluation = float(np.mean([p.loss_error for p in evaluated])) if evaluated else None
    of_evaluation = float(np.mean([(p.loss_error / p.loss) ** 2 for p in evaluated])) if evaluated else 0.0
    known = (logs / freedom if freedom else 0.0) + of_evaluation
    left = len(points) - len(fit.theta)
    residuals = _logs(points) - np.log(_fitted(points, fit))
    unexplained = float(np.sum(residuals**2)) / left if left else 0.0
    variance, degrees = (unexplained, left) if unexplained >= known else (known, freedom or math.inf)
    return Noise(
        relative=math.sqrt(variance) if variance else None,
        freedom=degrees,
        seeds=math.sqrt(squares / freedom) if freedom else None,
        num_seeds=sum(map(len, twins)),
        evaluation=evaluation,
    )


def _logs(points: Sequence[Point]) -> np.ndarray:
    return np.log([p.loss for p in points])


def _fitted(points: Sequence[Point], fit: Fit) -> np.ndarray:
    return fit.loss(np.array([p.parameters for p in points], float), np.array([p.tokens for p in points], float))


def _refits(points: Sequence[Point], fit: Fit, noise: Noise, count: int, random: np.random.Generator) -> list[Fit]:
    """The law refitted, from where it is, to losses redrawn around it; none where nothing tells the noise."""
    if noise.relative is None:
        return []
    around, found = _fitted(points, fit), []
    for scale in _scales(noise.relative, noise.freedom, count, random):
        losses = around * np.exp(scale * random.standard_normal(len(points)))
        try:
            found.append(fit_loss(points, fit.law, fit.estimator, losses=losses, start=fit))
        except ConfigError:  # least squares that do not converge from there
            continue
    return found


def _scales(scale: float, freedom: float, count: int, random: np.random.Generator) -> np.ndarray:
    """Standard deviations as uncertain as their degrees of freedom have it, shape (count,)."""
    if math.isinf(freedom):
        return np.full(count, scale)
    return scale * np.sqrt(freedom / random.chisquare(freedom, count))


def _predicted(fit: Fit, draws: Sequence[Fit], noise: Noise, at: Point, random: np.random.Generator) -> Interval:
    """The loss of one new run."""
    value = float(fit.loss(at.parameters, at.tokens))
    if not draws:
        return Interval(value)
    losses = np.array([float(d.loss(at.parameters, at.tokens)) for d in draws])
    losses *= np.exp(_scales(noise.relative, noise.freedom, len(draws), random) * random.standard_normal(len(draws)))
    return _interval(value, losses)


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws[np.isfinite(draws)], _LEVELS)
    return Interval(value, float(low), float(high))


def _intervals(fit: Fit, draws: Sequence[Fit]) -> dict[str, Interval]:
    of_draws = [d.coefficients() for d in draws]
    return {
        name: _interval(value, np.array([c[name] for c in of_draws])) if draws else Interval(value)
        for name, value in fit.coefficients().items()
    }


def _enough(points: Sequence[Point], law: LawName) -> None:
    unknowns = len(COEFFICIENTS[law])
    if len(points) <= unknowns:
        raise ConfigError(
            f"{len(points)} runs for a law of {unknowns} unknowns: it would go through any losses; "
            f"it needs {unknowns + 1} or more"
        )


def _hold_out(
    points: Sequence[Point], law: LawName, estimator: Estimator, refits: int, random: np.random.Generator
) -> tuple[HoldOut | None, str]:
    """The check of the largest size, or why there is none."""
    largest = max(p.parameters for p in points)
    rest, held = ([p for p in points if (p.parameters == largest) is same] for same in (False, True))
    sizes, unknowns = len({p.parameters for p in rest}), len(COEFFICIENTS[law])
    if sizes < 2 or len(rest) < unknowns:
        return None, (
            f"without the largest size, {format_tokens(largest, 3)}, {len(rest)} runs of {sizes} sizes are left, and "
            f"the law needs {unknowns} of 2; train more sizes"
        )
    fit = fit_loss(rest, law, estimator)
    noise = noise_of(rest, fit)
    draws = _refits(rest, fit, noise, refits, random)
    checks = tuple(check(p, _predicted(fit, draws, noise, p, random), p.loss) for p in held)
    return HoldOut(largest, len(rest), checks), ""


def _target(predict: tuple[int, int], others: Sequence[Point]) -> tuple[Point, Point | None]:
    """What is predicted, and the run that it is compared with."""

    def off(p: Point) -> float:
        return max(abs(math.log(p.parameters / predict[0])), abs(math.log(p.tokens / predict[1])))

    measured = min((p for p in others if off(p) < math.log(_SAME)), key=off, default=None)
    name = f"{format_tokens(predict[0], 3)}:{format_tokens(predict[1], 3)}"
    return measured or Point(name, *predict, loss=math.nan), measured


def _errors(
    scored: Sequence[Point],
    points: Sequence[Point],
    fit: Fit,
    draws: Sequence[Fit],
    prediction: Prediction | None,
    law: LawName,
    estimator: Estimator,
    random: np.random.Generator,
) -> tuple[dict[str, Interval], Prediction | None]:
    """The law of error, its hold-out through predicted losses, and the prediction with its error.

    Raises:
        ConfigError: there are too few runs with an error.
    """
    if len(scored) < 4:
        raise ConfigError(f"{len(scored)} runs have one, and its law of 3 unknowns needs 4")
    losses, errors = (np.array([getattr(p, name) for p in scored]) for name in ("loss", "error"))
    of_error = fit_error(losses, errors)
    around = error_of_loss(losses, *of_error.theta)
    freedom = len(scored) - 3
    spread = math.sqrt(float(np.sum((errors - around) ** 2)) / freedom)
    refits = []
    for of_loss, scale in zip(draws, _scales(spread, freedom, len(draws), random)):
        try:
            redrawn = fit_error(losses, around + scale * random.standard_normal(len(losses)), of_error)
        except ConfigError:  # least squares that do not converge from there
            continue
        refits.append((of_loss, redrawn, scale * random.standard_normal()))
    coefficients = _intervals(of_error, [redrawn for _, redrawn, _ in refits])
    if prediction is None:
        return coefficients, None
    at = prediction.parameters, prediction.tokens
    value = float(error_of_loss(prediction.loss.value, *of_error.theta))
    sampled = np.array([error_of_loss(float(d.loss(*at)), *e.theta) + new for d, e, new in refits])
    error = _interval(value, sampled) if len(sampled) else Interval(value)
    held_out = _error_hold_out(scored, points, law, estimator)
    return coefficients, replace(prediction, error=error, error_hold_out=held_out)


def _error_hold_out(scored: Sequence[Point], points: Sequence[Point], law: LawName, estimator: Estimator) -> HoldOut:
    """The largest size's error from the smaller ones' losses and errors.

    Raises:
        ConfigError: the smaller ones are too few.
    """
    largest = max(p.parameters for p in scored)
    rest = [p for p in scored if p.parameters < largest]
    of_loss = fit_loss([p for p in points if p.parameters < largest], law, estimator)
    of_error = fit_error(np.array([p.loss for p in rest]), np.array([p.error for p in rest]))
    held = [p for p in scored if p.parameters == largest]
    predicted = error_of_loss(_fitted(held, of_loss), *of_error.theta)
    checks = tuple(check(p, Interval(float(value)), p.error) for p, value in zip(held, predicted))
    return HoldOut(largest, len(rest), checks)


def _warnings(points: Sequence[Point], law: LawName, fit: Fit, noise: Noise, hold_out: HoldOut | None) -> list[str]:
    found = []
    ratios = [p.tokens_per_parameter for p in points]
    if max(ratios) / min(ratios) < 1.5:
        what = "the exponents of N and D are ill-conditioned" if law == "hoffmann" else "a and b can't be told apart"
        found.append(
            f"all runs have {min(ratios):.3g} to {max(ratios):.3g} tokens per parameter, so {what}: vary the budget"
        )
    left = len(points) - len(fit.theta)
    if left <= 2:
        found.append(f"{len(points)} runs for {len(fit.theta)} unknowns: the law is hardly tested, the intervals wide")
    if hold_out and hold_out.num_runs == len(fit.theta):
        found.append(
            f"without the largest size the law goes through all {hold_out.num_runs} runs; its interval knows only the "
            "noise of evaluation and seeds"
        )
    elif hold_out and any(c.inside is False for c in hold_out.checks):
        found.append("a run of the size that was held out lies outside its interval: take the intervals as too narrow")
    if noise.seeds is None:
        found.append("no run was repeated with another seed, so the noise between seeds is not known")
    return found


def _far(points: Sequence[Point], at: Point) -> list[str]:
    ratios = [p.tokens_per_parameter for p in points]
    ratio = at.tokens_per_parameter
    if min(ratios) / 1.5 < ratio < max(ratios) * 1.5:
        return []
    return [f"{ratio:.3g} tokens per parameter lie outside those of the runs, {min(ratios):.3g} to {max(ratios):.3g}"]


def _optima(points: Sequence[Point]) -> tuple[tuple[Optimum, ...], list[str]]:
    """The best value of each setting that takes several, and why there is none."""
    found, refused = [], []
    cells: dict[tuple[int, int], list[Point]] = {}
    for p in points:
        cells.setdefault((p.parameters, p.tokens), []).append(p)
    for name in sorted({name for p in points for name in p.settings}):
        if all(len({p.settings.get(name) for p in runs}) < 2 for runs in cells.values()):
            continue
        try:
            found.append(fit_optimum(points, name))
        except ConfigError as e:
            refused.append(f"no law of {name}: {e}")
    return tuple(found), refused


def _runs(every: Sequence[Point], points: Sequence[Point], fit: Fit) -> tuple[dict[str, Any], ...]:
    """By size and budget, each once."""
    chosen = {id(p) for p in points}
    rows = sorted({id(p): p for p in every}.values(), key=lambda p: (p.parameters, p.tokens, p.loss))
    fitted = map(float, _fitted(rows, fit))
    return tuple(
        {
            **asdict(p),
            "compute": p.compute,
            "tokens_per_parameter": p.tokens_per_parameter,
            "fitted": value,
            "residual": p.loss / value - 1,
            "in_fit": id(p) in chosen,
        }
        for p, value in zip(rows, fitted)
    )


def _range(points: Sequence[Point], prediction: Prediction | None) -> np.ndarray:
    """FLOP from the smallest run to the largest or the predicted one, shape (60,)."""
    every = [p.compute for p in points] + ([prediction.compute] if prediction else [])
    return np.geomspace(min(every) / 1.5, max(every) * 1.5, 60)


def _envelope(points: Sequence[Point], prediction: Prediction | None, fit: Fit) -> tuple[dict[str, float], ...]:
    found = ((c, *fit.optimum(c)) for c in map(float, _range(points, prediction)))
    return tuple({"compute": c, "parameters": n, "tokens": d, "loss": float(fit.loss(n, d))} for c, n, d in found)


def _curves(points: Sequence[Point], prediction: Prediction | None, fit: Fit) -> tuple[dict[str, Any], ...]:
    """Of the budgets per parameter that two or more sizes share, and the predicted one's; at most six."""
    near: dict[int, list[Point]] = {}
    for p in points:
        near.setdefault(round(math.log(p.tokens_per_parameter) / math.log(1.25)), []).append(p)
    shared = [runs for runs in near.values() if len({p.parameters for p in runs}) > 1]
    most = sorted(shared, key=lambda runs: -len({p.parameters for p in runs}))[:6]
    ratios = {float(np.median([p.tokens_per_parameter for p in runs])) for runs in most}
    if prediction and not any(abs(math.log(prediction.tokens / prediction.parameters / r)) < 0.2 for r in ratios):
        ratios.add(prediction.tokens / prediction.parameters)
    compute = _range(points, prediction)
    return tuple(
        {
            "tokens_per_parameter": m,
            "compute": list(map(float, compute)),
            "loss": list(map(float, fit.loss(np.sqrt(compute / 6 / m), np.sqrt(compute * m / 6)))),
        }
        for m in sorted(ratios)
    )
