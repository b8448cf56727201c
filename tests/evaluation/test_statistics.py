"""Intervals and tests against values of the literature, of other programs or worked by hand."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binomtest

from openlm_pipeline.evaluation import statistics as st


def test_wilson_interval_of_newcombe_1998():
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3.
    for (k, n), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert st.wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (55, 100), (1, 1)])
def test_wilson_interval_agrees_with_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert st.wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_needs_items():
    with pytest.raises(ValueError):
        st.wilson_interval(0, 0)
    with pytest.raises(ValueError):
        st.wilson_interval(3, 2)


def test_mcnemar_is_the_exact_binomial_test():
    assert st.mcnemar_exact(0, 0) == 1.0
    assert st.mcnemar_exact(0, 5) == pytest.approx(2 / 2**5)
    assert st.mcnemar_exact(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert st.mcnemar_exact(8, 2) == st.mcnemar_exact(2, 8)
    assert st.mcnemar_exact(4, 4) == 1.0


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.9]) == [1.0, 1.0]
    assert st.holm([]) == []


def test_centred_accuracy():
    assert st.centred_accuracy(0.25, 0.25) == 0
    assert st.centred_accuracy(1.0, 0.25) == 1
    assert st.centred_accuracy(0.625, 0.25) == 0.5
    assert st.centred_accuracy(0.4, 0.0) == 0.4


def test_standard_error_of_copa():
    assert st.standard_error(0.5, 100) == pytest.approx(0.5 / math.sqrt(99))
    assert math.isnan(st.standard_error(1, 1))


def test_paired_interval_of_bonett_and_price_2012():
    # The R package contingencytables on Cavo et al. (2012): 6 and 16 discordant of 161.
    assert st.paired_interval(6, 16, 161) == pytest.approx((-0.1195, -0.0032), abs=5e-5)
    assert st.paired_interval(16, 6, 161) == pytest.approx((0.0032, 0.1195), abs=5e-5)
    assert st.mcnemar_exact(6, 16) == pytest.approx(0.052479, abs=5e-7)
    low, high = st.paired_interval(0, 0, 10)
    assert low == -high and high == pytest.approx(1.959964 * math.sqrt(2 / 12 / 12))


def test_paired_standard_error_is_that_of_the_items_differences_for_many_items():
    # 300 items +1, 200 items -1, 500 items 0.
    plain = math.sqrt((0.5 - 0.1**2) / 1000)
    assert st.paired_standard_error(300, 200, 1000) == pytest.approx(plain, rel=2e-3)


def test_normal_p_value():
    assert st.normal_p_value(1.959964, 1.0) == pytest.approx(0.05, abs=1e-6)
    assert st.normal_p_value(-1.959964, 1.0) == pytest.approx(0.05, abs=1e-6)
    assert st.normal_p_value(0.0, 0.3) == 1.0


def test_minimum_detectable_effect_has_its_power():
    # z(.975) + z(.8) = 2.8016; two independent models at 50% on 100 items differ detectably from 19.8 points.
    assert st.minimum_detectable_effect(math.sqrt(0.5 / 100)) == pytest.approx(2.801585 * math.sqrt(0.005), abs=1e-6)
    power = 1 - NormalDist().cdf(NormalDist().inv_cdf(0.975) - st.minimum_detectable_effect(0.03) / 0.03)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_signs_of_single_items_are_mcnemars_test():
    signs = np.array([1] * 16 + [-1] * 6 + [0] * 100)
    assert st.sign_flip_exact(signs) == pytest.approx(st.mcnemar_exact(6, 16)) == pytest.approx(0.052479, abs=5e-7)
    assert st.sign_flip_exact(np.zeros(9, int)) == 1.0


def test_signs_of_sums_are_tested_by_all_their_flips():
    sums = np.array([3, -1, 2, 2, 0, 1])
    totals = [abs(np.dot(flip, sums)) for flip in itertools.product((-1, 1), repeat=6)]
    assert st.sign_flip_exact(sums) == pytest.approx(np.mean([t >= 7 for t in totals]))
    many = np.tile([2, -1, 3, 1, -1], 400)
    assert st.sign_flip_exact(many * 2) == pytest.approx(st.sign_flip_exact(many), rel=0.05)  # normal, and exact
    assert st.sign_flip_exact(-many) == st.sign_flip_exact(many)


def test_students_interval_and_test_agree():
    half = st.student_half_width(0.3, 8)
    assert st.student_p_value(half, 0.3, 8) == pytest.approx(0.05)
    assert half / 0.3 == pytest.approx(2.364624, abs=1e-5)
    assert st.student_p_value(1.0, 0.0, 8) == st.student_p_value(1.0, 0.3, 1) == 1.0
