"""Learning rates at the points where a schedule turns."""

import math

import pytest

from openlm_pipeline.experiments.spec import Training
from openlm_pipeline.registry import SCHEDULES

BATCH, HORIZON = 100, 10_000
LR, FLOOR = 3e-3, 3e-4


def training(schedule: str, **changes: object) -> Training:
    return Training(
        **{"global_batch": BATCH, "lr": LR, "lr_min": FLOOR, "warmup": 1000, "schedule": schedule, **changes}
    )


def learning_rate(t: Training, horizon: int | None, step: int) -> float:
    return SCHEDULES[t.schedule](t, horizon).rate(step)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str):
    horizon = None if schedule == "constant" else HORIZON
    t = training(schedule, decay=2000 if schedule == "wsd" else 0)
    assert [learning_rate(t, horizon, step) for step in range(10)] == pytest.approx([LR * k / 10 for k in range(1, 11)])
    assert learning_rate(t, horizon, 10) == LR


def openlm_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """open_lm/scheduler.py: `cosine_lr` with `min_lr`, transcribed."""
    if step < warmup_steps:
        return LR * (step + 1) / warmup_steps
    e, es = step - warmup_steps, total_steps - warmup_steps
    return FLOOR + 0.5 * (1 + math.cos(math.pi * e / es)) * (LR - FLOOR)


def test_cosine_is_openlms_formula_down_to_the_floor():
    t = training("cosine")
    for step in range(101):
        assert learning_rate(t, HORIZON, step) == pytest.approx(openlm_cosine(step, 10, 100), rel=1e-12)
    assert learning_rate(t, HORIZON, 55) == pytest.approx((LR + FLOOR) / 2)
    assert learning_rate(t, HORIZON, 100) == pytest.approx(FLOOR)
    assert learning_rate(t, HORIZON, 1000) == pytest.approx(FLOOR)


def test_wsd_stays_then_falls_linearly_over_its_last_tokens():
    t = training("wsd", decay=2000)
    assert {learning_rate(t, HORIZON, step) for step in range(10, 81)} == {LR}
    assert learning_rate(t, HORIZON, 90) == pytest.approx((LR + FLOOR) / 2)
    assert learning_rate(t, HORIZON, 99) == pytest.approx(FLOOR + (LR - FLOOR) / 20)
    assert learning_rate(t, HORIZON, 100) == FLOOR


def test_the_decay_of_wsd_takes_a_power_as_openlms_cooldown():
    t = training("wsd", decay=2000, decay_power=2.0)
    assert learning_rate(t, HORIZON, 80) == LR
    assert learning_rate(t, HORIZON, 90) == pytest.approx(FLOOR + (LR - FLOOR) / 4)
    assert learning_rate(t, HORIZON, 95) == pytest.approx(FLOOR + (LR - FLOOR) / 16)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_there_is_never_less_than_the_floor_after_the_warm_up(schedule: str):
    t = training(schedule, decay=2000 if schedule == "wsd" else 0, lr_floor=1e-3)
    free = training(schedule, decay=2000 if schedule == "wsd" else 0)
    for step in range(110):
        rate = learning_rate(free, HORIZON, step)
        assert learning_rate(t, HORIZON, step) == (rate if step < 10 else max(rate, 1e-3))
    assert learning_rate(t, HORIZON, 0) < 1e-3 == learning_rate(t, HORIZON, 100)


def test_constant_has_no_end():
    assert learning_rate(training("constant"), None, 10**9) == LR


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(training("cosine", warmup=0), HORIZON, 0) == LR
