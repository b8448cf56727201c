"""Intervals never collapse and know what goes together; under no difference alarms come as rarely as they say."""

import numpy as np
import pytest

from openlm_pipeline.evaluation import estimates as es
from openlm_pipeline.evaluation import statistics as st

DRAWS = 1000
MOST = 0.05 + 3 * (0.05 * 0.95 / DRAWS) ** 0.5
"""Alarms of a test of 5% in so many draws, but for one time in a thousand."""


def alone(n: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + n, dtype=np.uint64)


def bits(*values: int) -> np.ndarray:
    return np.array(values, bool)


def test_items_alone_have_wilsons_interval():
    found = es.accuracy(np.arange(100) < 55, alone(100))
    assert (found.value, found.low, found.high) == (0.55, *st.wilson_interval(55, 100))
    assert found.error == st.standard_error(0.55, 100)


def test_items_of_which_all_are_told_by_others_count_once():
    """Each question five times: as many observations as questions."""
    rng = np.random.default_rng(0)
    right = rng.random(80) < 0.6
    once = es.accuracy(right, alone(80))
    five = es.accuracy(np.repeat(right, 5), np.repeat(alone(80), 5))
    assert five.clusters == 80
    assert (five.low, five.high) == pytest.approx((once.low, once.high), rel=0.01)
    shuffled = rng.permutation(400)
    again = es.accuracy(np.repeat(right, 5)[shuffled], np.repeat(alone(80), 5)[shuffled])
    assert (again.low, again.high) == pytest.approx((five.low, five.high))


@pytest.mark.parametrize("n", [1, 4, 30])
def test_an_average_of_what_is_all_right_has_the_interval_of_its_parts(n: int):
    whole = es.accuracy(np.ones(n, bool), alone(n))
    assert whole.low < 0.99 and whole.high == pytest.approx(1.0)
    assert es.combined([(1.0, whole)]) is whole
    parts = [es.accuracy(np.ones(n, bool), alone(n, 100 * i)) for i in range(4)]
    mean = es.combined([(0.25, part) for part in parts])
    assert mean.value == 1.0 and mean.high == pytest.approx(1.0)
    assert mean.value - mean.low == pytest.approx((1 - whole.low) / 2)


def test_one_task_at_two_numbers_of_shots_is_no_second_sample():
    rng = np.random.default_rng(1)
    right = rng.random(300) < 0.5
    same = es.accuracy(right, alone(300))
    twice = es.combined([(0.5, same), (0.5, es.accuracy(right, alone(300)))])
    assert (twice.low, twice.high) == pytest.approx((same.low, same.high))
    apart = es.combined([(0.5, same), (0.5, es.accuracy(right, alone(300, 1000)))])
    assert apart.high - apart.low == pytest.approx((same.high - same.low) / 2**0.5, rel=1e-3)
    nothing_wrong = es.accuracy(np.ones(9, bool), alone(9))
    assert es.combined([(0.5, nothing_wrong)] * 2).low == pytest.approx(nothing_wrong.low)


def test_bits_per_byte_weigh_texts_by_their_bytes():
    nll, sizes = np.array([7.0, 1.0, 4.0]), np.array([10.0, 2.0, 4.0])
    found = es.bits_per_byte(nll, sizes, alone(3))
    assert found.value == pytest.approx(12 / np.log(2) / 16)
    assert found.low < found.value < found.high
    one = es.bits_per_byte(nll[:1], sizes[:1], alone(1))
    assert (one.low, one.high) == (-np.inf, np.inf)


def cluster_effects(rng: np.random.Generator, clusters: int, each: int, accuracy: float) -> np.ndarray:
    """Chances of being right that vary from cluster to cluster, their mean being `accuracy`."""
    return np.repeat(rng.beta(2 * accuracy, 2 * (1 - accuracy), clusters), each)


def alarms(p_values: list[float]) -> float:
    return float(np.mean(np.array(p_values) < 0.05))


def test_rows_that_share_a_passage_give_no_false_alarms():
    """Two models, each with its own luck on every passage of six questions."""
    rng, codes, p_values, naive = np.random.default_rng(2), np.repeat(alone(50), 6), [], []
    for _ in range(DRAWS):
        ours, theirs = (rng.random(300) < cluster_effects(rng, 50, 6, 0.5) for _ in range(2))
        p_values.append(es.accuracy_difference(ours, theirs, codes).p_value)
        naive.append(es.accuracy_difference(ours, theirs, alone(300)).p_value)
    assert alarms(p_values) <= MOST < 0.12 < alarms(naive)


def test_intervals_of_clustered_rows_hold_the_truth():
    rng, codes, held = np.random.default_rng(3), np.repeat(alone(60), 5), 0
    for _ in range(DRAWS):
        found = es.accuracy(rng.random(300) < cluster_effects(rng, 60, 5, 0.7), codes)
        held += found.low <= 0.7 <= found.high
    assert held / DRAWS >= 0.93


def test_an_average_over_two_numbers_of_shots_gives_no_false_alarms():
    """A question that a model happens to know it knows with five shots too."""
    rng, codes, p_values = np.random.default_rng(4), alone(200), []
    for _ in range(DRAWS):
        parts = []
        knows = [rng.random(200) for _ in range(2)]
        for _ in range(2):
            ours, theirs = (np.where(rng.random(200) < 0.2, rng.random(200), k) < 0.6 for k in knows)
            parts.append((0.5, es.accuracy_difference(ours, theirs, codes)))
        p_values.append(es.combined_difference(parts).p_value)
    assert alarms(p_values) <= MOST


@pytest.mark.parametrize("n", [12, 100])
def test_likelihoods_of_equal_models_give_no_false_alarms(n: int):
    """Differences with heavy tails, of texts of very different lengths."""
    rng, p_values, averages = np.random.default_rng(5), [], []
    for _ in range(DRAWS):
        parts = []
        for task in range(4):
            sizes = np.exp(rng.normal(3, 0.7, n))
            common = sizes * rng.gamma(2, 0.4, n)
            ours, theirs = (common + sizes * 0.05 * rng.standard_t(4, n) for _ in range(2))
            parts.append((0.25, es.likelihood_difference(ours, theirs, sizes, alone(n, task * n))))
        p_values.append(parts[0][1].p_value)
        averages.append(es.combined_difference(parts).p_value)
    assert alarms(p_values) <= MOST and alarms(averages) <= MOST


def test_a_scaled_difference_has_the_test_of_the_difference():
    """The centred average of a single task says no more than the task."""
    tested = es.accuracy_difference(bits(1, 1, 1, 1, 1, 1, 0), bits(0, 0, 0, 0, 0, 1, 1), alone(7))
    assert es.combined_difference([(2.0, tested)]).p_value == tested.p_value


def test_likelihood_tells_what_accuracy_cannot():
    """A model that gives each right answer a little more, on 60 rows."""
    rng = np.random.default_rng(6)
    theirs = rng.gamma(4, 2, 60)
    ours = theirs - 0.3 + 0.5 * rng.normal(size=60)
    likelihood = es.likelihood_difference(ours, theirs, np.full(60, 8.0), alone(60))
    accuracy = es.accuracy_difference(ours < 6, theirs < 6, alone(60))
    assert likelihood.p_value < 0.001 < 0.05 < accuracy.p_value
    assert likelihood.estimate.high < 0
