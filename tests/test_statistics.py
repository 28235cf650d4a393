import math
import re

import numpy as np
import pytest
from helpers.intervals import mean_ends
from scipy import stats

from sharpness.statistics import (
    compare_readings,
    mean_and_sd,
    mean_interval,
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


# -- the interval of a mean ----------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("num", [3, 5, 20])
def test_each_end_of_a_mean_is_the_wider_of_two(num, power, confidence):
    for seed in range(20):
        x = np.random.default_rng(seed).normal(size=num) ** power * (-1) ** seed
        expected = mean_ends(x, confidence)
        assert mean_interval(x, confidence) == pytest.approx(expected, rel=1e-8)


def test_the_interval_of_a_mean_moves_and_scales_with_it():
    x = np.random.default_rng(0).exponential(size=9)
    low, high = mean_interval(x)
    assert mean_interval(3 + 2 * x) == pytest.approx((3 + 2 * low, 3 + 2 * high))
    assert mean_interval(-x) == pytest.approx((-high, -low))
    assert low < x.mean() < high
    assert high - x.mean() > x.mean() - low  # lopsided as the draws are


@pytest.mark.parametrize("x", [[], [1.0], [1.0, 2.0], [1.0, 2.0, math.nan]])
def test_a_mean_without_three_finite_values_has_no_interval(x):
    assert all(math.isnan(end) for end in mean_interval(x))


def test_equal_values_leave_no_doubt_of_their_mean():
    assert mean_interval([2.5] * 4) == (2.5, 2.5)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("num", [10, 20])
def test_the_mean_of_normal_numbers_and_of_their_squares_is_covered(num, power):
    x = np.random.default_rng(num).normal(size=(1500, num)) ** power
    hits = sum(low <= power - 1 <= high for low, high in map(mean_interval, x))
    assert hits >= 1500 * 0.93 - 3 * math.sqrt(1500 * 0.93 * 0.07)
