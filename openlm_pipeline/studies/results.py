"""What a fit gives: values with intervals, checks, predictions. Of plain values, so that all of it is JSON."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.studies.laws import Estimator, LawName, Optimum, Point


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; its ends are None where nothing tells the noise."""

    value: float
    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool | None:
        """Whether a value lies inside; None without an interval."""
        return None if self.low is None or self.high is None else self.low <= value <= self.high


@dataclass(frozen=True)
class Check:
    """A prediction against what was measured."""

    name: str
    parameters: int
    tokens: int
    predicted: Interval
    measured: float
    relative_error: float
    """predicted / measured - 1."""
    inside: bool | None


def check(point: Point, predicted: Interval, measured: float) -> Check:
    """Set a prediction against a measured loss or error of the same run."""
    error = predicted.value / measured - 1
    return Check(point.name, point.parameters, point.tokens, predicted, measured, error, predicted.holds(measured))


@dataclass(frozen=True)
class HoldOut:
    """The runs of the largest size, predicted by a fit of the smaller ones alone."""

    parameters: int
    num_runs: int
    """That were fitted."""
    checks: tuple[Check, ...]

    @property
    def worst(self) -> Check:
        return max(self.checks, key=lambda c: abs(c.relative_error))


@dataclass(frozen=True)
class Prediction:
    """What a law says of a run that it has not seen; there is none without a hold-out error.

    Raises:
        ConfigError: the law was not held against a size that it has not seen.
    """

    parameters: int
    tokens: int
    loss: Interval
    hold_out: HoldOut | None
    error: Interval | None = None
    error_hold_out: HoldOut | None = None
    measured: Check | None = None
    measured_error: Check | None = None

    def __post_init__(self) -> None:
        if self.hold_out is None:
            raise ConfigError("a prediction needs an error on a size that was held out")

    @property
    def compute(self) -> float:
        """FLOP of training."""
        return 6.0 * self.parameters * self.tokens


@dataclass(frozen=True)
class Noise:
    """How far runs lie off the law for no reason that it knows, as a share of the loss."""

    relative: float | None
    """Standard deviation of log loss; None where nothing tells it."""
    freedom: float
    """Degrees of freedom behind it; infinite where the evaluation's own error is larger than all else."""
    seeds: float | None
    """Standard deviation between seeds of equal runs, nats."""
    num_seeds: int
    """Runs behind `seeds`."""
    evaluation: float | None
    """Mean standard error of the evaluation, nats."""


@dataclass(frozen=True)
class StudyFit:
    """All that was found, of plain values: `to_json` has it as JSON."""

    study: str
    law: LawName
    estimator: Estimator
    coefficients: dict[str, Interval]
    noise: Noise
    hold_out: HoldOut | None
    prediction: Prediction | None
    error_coefficients: dict[str, Interval]
    runs: tuple[dict[str, Any], ...]
    """Each run with the loss that is fitted, its residual, and whether it was in the fit."""
    envelope: tuple[dict[str, float], ...]
    """Compute in FLOP with the parameters and tokens of least loss."""
    curves: tuple[dict[str, Any], ...]
    """For each number of tokens per parameter compute and loss."""
    optima: tuple[Optimum, ...]
    warnings: tuple[str, ...]
    refits: int = 0
    """Behind the intervals; those that did not converge are not counted."""

    def to_json(self) -> dict[str, Any]:
        return _finite(asdict(self))


def _finite(value: Any) -> Any:
    """Without infinities, which JSON does not have, and with lists for tuples."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
