import math
import re

import numpy as np
import pytest
from scipy import stats

from sharpness.statistics import (
    compare_readings,
    mean_and_sd,
    mean_sd,
    paired_t,
    sign_flip,
)


def every_pattern(differences):
    """The share of all sign patterns whose mean is at least the one that was found."""
    signs = 1 - 2 * (np.arange(2 ** len(differences))[:, None] >> np.arange(20) & 1)
    means = (signs[:, : len(differences)] * differences).mean(1)
    return (means >= differences.mean() - 1e-12).mean()


def t_by_hand(differences):
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(len(differences)))
    return stats.t.sf(t, len(differences) - 1)


def drawn(case):
    rng = np.random.default_rng(case)
    return rng.normal(rng.choice([-0.5, 0.0, 0.5]), 1.0, int(rng.integers(2, 12)))


def readings(values):
    return [{"m": {"value": value, "error": 0.0}} for value in values]


@pytest.mark.parametrize("case", range(12))
def test_p_is_the_upper_tail_of_students_t(case):
    differences = drawn(case)
    assert paired_t(differences) == pytest.approx(t_by_hand(differences), rel=1e-9)
    assert paired_t(-differences) == pytest.approx(1 - t_by_hand(differences), rel=1e-9)


@pytest.mark.parametrize(
    "differences", [[1.0], [], [0.0, 0.0], [0.3, 0.3, 0.3], [0.1 + 0.2, 0.3]]
)
def test_too_few_differences_or_equal_ones_have_no_p(differences):
    assert math.isnan(paired_t(np.array(differences)))


def test_a_small_spread_beyond_rounding_is_a_spread():
    differences = np.array([0.3, 0.3 + 1e-8, 0.3 - 1e-8])
    assert paired_t(differences) < 1e-12


@pytest.mark.parametrize("case", range(12))
def test_sign_flips_are_counted_one_by_one(case):
    differences = drawn(case)
    assert sign_flip(differences) == pytest.approx(every_pattern(differences), rel=1e-12)


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1, 1, 1], 1 / 8), ([1, 2, -0.1], 2 / 8), ([-1, -1, -1], 1.0), ([1, -1], 3 / 4)],
)
def test_sign_flip_p_counts_the_patterns_at_least_as_large(differences, p):
    assert sign_flip(np.array(differences, float)) == pytest.approx(p)


@pytest.mark.parametrize(("difference", "p"), [(0.2, 0.5), (0.0, 1.0), (-3.0, 1.0)])
def test_one_pair_can_be_flipped_once(difference, p):
    assert sign_flip(np.array([difference])) == p


def test_beyond_thirteen_pairs_flips_are_drawn_and_the_same_each_time():
    differences = np.random.default_rng(0).normal(0.4, 1.0, 15)
    found, exact = sign_flip(differences), every_pattern(differences)
    assert found == sign_flip(differences)
    assert abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / 1e4)
    assert sign_flip(np.linspace(1, 2, 15)) == pytest.approx(1e-4, rel=1e-9)


def test_sd_is_the_sample_standard_deviation():
    assert mean_and_sd([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(mean_and_sd([1.0])[1])
    assert mean_and_sd([1.0])[0] == 1.0


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [
        (0.01234, 0.00056, "0.01234 ± 0.00056"),
        (0.5, 0.1, "0.50 ± 0.10"),
        (99.123, 0.234, "99.12 ± 0.23"),
        (123.4, 5.6, "123.4 ± 5.6"),
        (205.14, 69.52, "205 ± 70"),
        (-3.21, 0.5, "-3.21 ± 0.50"),
        (5.0, 0.004, "5.000 ± 0.004"),
        (98.5, 0.0, "98.5 ± 0"),
        (98.5, math.nan, "98.5"),
        (math.nan, 1.0, "–"),
        (math.inf, 1.0, "–"),
        (1.234e-7, 5e-8, "1.23e-07 ± 5e-08"),
    ],
)
def test_a_mean_has_the_digits_that_its_deviation_allows(mean, sd, text):
    assert mean_sd(mean, sd) == text


@pytest.mark.parametrize(("mean", "sd"), [(5.0, 0.004), (99.5, 1e-3), (-2.0, 2e-4)])
def test_a_deviation_that_is_not_nothing_is_not_shown_as_nothing(mean, sd):
    shown = re.fullmatch(r".* ± (.*)", mean_sd(mean, sd)).group(1)
    assert float(shown) > 0


def test_readings_are_compared_by_the_same_tests_on_logarithms():
    first, second = [1.0, 2.0, 4.0], [10.0, 30.0, 50.0]
    (row,) = compare_readings(readings(first), readings(second), [None] * 6)
    moved = np.log10(second) - np.log10(first)
    assert row.ratio == pytest.approx((10 * 15 * 12.5) ** (1 / 3))
    assert row.p_value == pytest.approx(
        stats.ttest_rel(np.log10(second), np.log10(first), alternative="greater").pvalue
    )
    assert row.sign_flip_p == pytest.approx(every_pattern(moved)) == 1 / 8
    assert (row.num_pairs, row.num_larger, row.num_smaller) == (3, 3, 0)
    assert (row.first, row.second) == (mean_and_sd(first), mean_and_sd(second))
