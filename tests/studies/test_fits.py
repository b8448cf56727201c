"""Scaling laws: published predictions are reproduced, known laws lie in their intervals, a hold-out is a must."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.studies.fitting import best_of_settings, fit_study
from openlm_pipeline.studies.laws import Point, fit_loss, fit_optimum
from openlm_pipeline.studies.published import of_dataset, read_published, select
from openlm_pipeline.studies.results import Interval, Prediction

SIZES = (1_000_000, 4_000_000, 16_000_000, 64_000_000)
GRID = tuple((n, m * n) for n in SIZES for m in (5, 20, 80))


def loss_of(n: float, d: float, alpha: float = 0.35, beta: float = 0.35) -> float:
    return 1.8 + 400 / n**alpha + 1500 / d**beta


def runs(cells=GRID, noise: float = 0.0, random=None, **exponents) -> list[Point]:
    return [
        Point(f"{n}-{d}", n, d, loss_of(n, d, **exponents) * math.exp(noise * random.standard_normal() if noise else 0))
        for n, d in cells
    ]


@pytest.fixture(scope="module")
def published(shared_data: Path) -> list[Point]:
    folder = shared_data / "scaling_exp_data"
    if not folder.is_dir():
        pytest.skip(f"the results of mlfoundations/scaling are not at {folder}")
    return read_published(folder)


def predicted(published, dataset: str, predict: tuple[int, int], estimator: str):
    points = of_dataset(published, dataset)
    errors = select(points, "small", errors=True)
    chosen = select(points, "small")
    return fit_study(chosen, predict, estimator=estimator, error_points=errors, others=points, refits=20).prediction


AT_900B, AT_138B = (1_400_000_000, 900_000_000_000), (6_900_000_000, 138_000_000_000)


def test_the_authors_estimator_reproduces_the_errors_they_printed(published):
    """scaling_explorer.ipynb of mlfoundations/scaling prints these four, for RedPajama."""
    found = [predicted(published, "rpj", target, "gadre") for target in (AT_900B, AT_138B)]
    printed = [f"{100 * abs(c.relative_error):.4f}" for p in found for c in (p.measured, p.measured_error)]
    assert printed == ["0.7103", "3.6365", "0.7320", "0.0464"]


@pytest.mark.parametrize("dataset, tokens", [("rpj", 28.8e9), ("rpj", 921e9), ("rw", 28.8e9), ("rw", 461e9)])
def test_five_small_runs_predict_the_1b_within_0_7_percent(published, dataset, tokens):
    of = predicted(published, dataset, (1_440_000_000, int(tokens)), "huber")
    assert abs(of.measured.relative_error) < 0.007 and of.measured.inside


def test_a_known_law_lies_in_its_intervals_in_90_of_100_draws():
    random = np.random.default_rng(7)
    truth = {"E": 1.8, "a": 400 * 6**0.175, "b": 1500 * 6**0.175, "h": 0.175, "loss": loss_of(1e9, 2e10)}
    inside = dict.fromkeys([*truth, "held out"], 0)
    for draw in range(100):
        of = fit_study(runs(noise=0.003, random=random), (10**9, 2 * 10**10), refits=40, seed=draw)
        intervals = {**of.coefficients, "loss": of.prediction.loss}
        for name, value in truth.items():
            inside[name] += intervals[name].holds(value)
        inside["held out"] += of.hold_out.checks[0].inside
    assert min(inside.values()) >= 90, inside


@pytest.mark.parametrize("law, exponents", [("gadre", {}), ("hoffmann", {"alpha": 0.33, "beta": 0.38})])
def test_without_noise_the_law_itself_is_found(law, exponents):
    fit = fit_loss(runs(**exponents), law)
    e, a, b, alpha, beta = fit.hoffmann()
    assert (e, alpha, beta) == pytest.approx((1.8, exponents.get("alpha", 0.35), exponents.get("beta", 0.35)), rel=1e-3)
    n, d = fit.optimum(6e18)
    others = [fit.loss(n * f, d / f) for f in (0.9, 1.1)]
    assert 6 * n * d == pytest.approx(6e18) and fit.loss(n, d) < min(others)


def test_both_forms_of_the_law_of_gadre_are_one():
    fit = fit_loss(runs(), "gadre")
    of, c, m = fit.coefficients(), 6 * 3e7 * 9e8, 30
    assert of["E"] + (of["a"] * m ** of["h"] + of["b"] * m ** -of["h"]) * c ** -of["h"] == pytest.approx(
        float(fit.loss(3e7, 9e8))
    )


@pytest.mark.parametrize(
    "cells, what",
    [
        (GRID[:4], "4 runs for a law of 4 unknowns"),
        ([(SIZES[0], SIZES[0] * m) for m in (5, 10, 20, 40, 80, 160)], "0 runs of 0 sizes are left"),
        ([(n, n * m) for n in SIZES[:2] for m in (5, 20, 80)], "3 runs of 1 sizes are left"),
    ],
)
def test_without_a_hold_out_nothing_is_predicted(cells, what):
    with pytest.raises(ConfigError, match=what):
        fit_study(runs(cells), (10**9, 2 * 10**10))


def test_a_prediction_is_not_made_without_its_hold_out():
    with pytest.raises(ConfigError, match="held out"):
        Prediction(10**9, 2 * 10**10, Interval(2.5), None)


def test_runs_at_one_budget_per_parameter_are_called_ill_conditioned():
    random = np.random.default_rng(0)
    at_20 = [(int(n), 20 * int(n)) for n in np.geomspace(1e6, 1e8, 8)]
    of = fit_study(runs(at_20, 0.002, random, beta=0.38), (10**9, 10**11), law="hoffmann", refits=20)
    assert any("ill-conditioned" in w for w in of.warnings)
    assert any("100 tokens per parameter lie outside" in w for w in of.warnings)
    assert not any("ill-conditioned" in w for w in fit_study(runs(noise=0.002, random=random), refits=20).warnings)


def test_a_run_of_the_predicted_size_is_compared_and_not_fitted():
    points = runs(noise=0.002, random=np.random.default_rng(1))
    far = Point("far", 256_000_000, 5_120_000_000, 9.0)
    of = fit_study([*points, far], (250_000_000, 5_000_000_000), refits=20)
    assert of.prediction.measured.name == "far" and not of.prediction.measured.inside
    assert [r["name"] for r in of.runs if not r["in_fit"]] == ["far"]
    assert of.prediction.loss == fit_study(points, (256_000_000, 5_120_000_000), refits=20).prediction.loss


def test_the_noise_floor_is_what_seeds_differ_by():
    points = runs()
    twins = [dataclasses.replace(points[0], seed=s, loss=points[0].loss + x) for s, x in ((1, 0.01), (2, -0.01))]
    of = fit_study([*points, *twins], refits=20)
    assert of.noise.seeds == pytest.approx(0.01) and of.noise.num_seeds == 3
    assert not any("seed" in w for w in of.warnings)
    assert fit_study(points, refits=20).noise.seeds is None


def test_errors_follow_losses_and_are_held_out_too():
    points = runs(noise=0.001, random=np.random.default_rng(3))
    scored = [dataclasses.replace(p, error=0.85 - 2.2 * math.exp(-0.75 * p.loss)) for p in points]
    of = fit_study(scored, (10**9, 2 * 10**10), refits=40)
    assert of.prediction.error.holds(0.85 - 2.2 * math.exp(-0.75 * loss_of(1e9, 2e10)))
    assert of.prediction.error_hold_out.parameters == SIZES[-1]
    assert abs(of.prediction.error_hold_out.worst.relative_error) < 0.02
    few = fit_study([*scored[:3], *points[3:]], (10**9, 2 * 10**10), refits=20)
    assert few.prediction.error is None and any("no error is predicted" in w for w in few.warnings)


def sweep(best_exponent: float = -0.25, values=(1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)) -> list[Point]:
    """Losses that are parabolas in log(lr) around 5 x 10^-3 (N / 10^6)^exponent, plus the same at half the budget."""
    return [
        Point(
            f"{n}-{lr}-{d}",
            n,
            d,
            loss_of(n, d) + 0.02 * math.log(lr / (8e-3 * (n / 1e6) ** best_exponent)) ** 2,
            settings={"training.lr": lr, "training.global_batch": 2.0**15},
        )
        for n in SIZES
        for d, tried in ((20 * n, values), (10 * n, values[:1]))
        for lr in tried
    ]


def test_the_optimum_of_a_setting_is_recovered():
    found = fit_optimum(sweep(), "training.lr")
    assert (found.exponent, found.at(1e9)) == pytest.approx((-0.25, 8e-3 * 1000**-0.25), rel=1e-6)
    assert found.hold_out_error == pytest.approx(0, abs=1e-6)
    two = fit_optimum([p for p in sweep() if p.parameters < 5e6], "training.lr")
    with pytest.raises(ConfigError, match="none to hold out"):
        two.at(1e9)
    with pytest.raises(ConfigError, match="the end of those tried; add lower"):
        fit_optimum(sweep(-1.5), "training.lr")


def test_of_a_sweep_the_best_settings_are_fitted():
    points = best_of_settings(sweep())
    assert len(points) == 2 * len(SIZES)
    assert {p.settings["training.lr"] for p in points if p.parameters == SIZES[0] and p.tokens == 20 * SIZES[0]} == {
        8e-3
    }
    of = fit_study(sweep(), refits=20)
    assert [o.setting for o in of.optima] == ["training.lr"]  # the batch was not varied
    assert sum(r["in_fit"] for r in of.runs) == len(points)


def test_the_result_is_json():
    of = fit_study(runs(noise=0.002, random=np.random.default_rng(2)), (10**9, 2 * 10**10), refits=20)
    found = json.loads(json.dumps(of.to_json(), allow_nan=False))
    assert found["prediction"]["hold_out"]["parameters"] == SIZES[-1]
    assert found["coefficients"]["E"].keys() == {"value", "low", "high"}
