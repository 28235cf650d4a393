import math

import numpy as np
import pytest
from scipy import stats

from sharpness.statistics import (
    Verdict,
    mean_and_sd,
    order_verdict,
    paired_comparison,
    row,
    size_verdict,
)

SMALL, LARGE = [1.0, 2.0, 4.0], [10.0, 30.0, 50.0]


def test_ratio_is_the_geometric_mean_of_the_pairs_ratios():
    assert paired_comparison(SMALL, LARGE).ratio == pytest.approx(
        (10 * 15 * 12.5) ** (1 / 3)
    )


def test_p_value_is_that_of_a_one_sided_paired_t_test_on_logarithms():
    a, b = np.log10(SMALL), np.log10(LARGE)
    expected = stats.ttest_rel(b, a, alternative="greater").pvalue
    found = paired_comparison(SMALL, LARGE)
    assert found.p_value == pytest.approx(expected, rel=1e-12)
    assert paired_comparison(LARGE, SMALL).p_value == pytest.approx(1 - expected)


@pytest.mark.parametrize(
    ("large", "p"), [([2, 4, 8], 1 / 8), ([2, 4, 3.9], 2 / 8), ([0.5, 1, 2], 1.0)]
)
def test_sign_flip_p_counts_the_patterns_at_least_as_large(large, p):
    found = paired_comparison(SMALL, [float(x) for x in large])
    assert found.sign_flip_p == pytest.approx(p)
    assert found.sign_flip_smallest == 1 / 8


def test_pairs_are_counted_one_by_one():
    found = paired_comparison(SMALL, [10.0, 1.0, 50.0])
    assert (found.num_larger, found.num_pairs) == (2, 3)
    assert not found.larger_in_every_pair


def test_one_pair_gives_no_p_value():
    found = paired_comparison([1.0], [2.0])
    assert math.isnan(found.p_value)
    assert found.sign_flip_p == 0.5


@pytest.mark.parametrize("bad", [[0.0, 1, 1], [-1.0, 1, 1], [math.nan, 1, 1], [1.0, 2]])
def test_values_without_a_logarithm_or_a_partner_are_refused(bad):
    with pytest.raises(ValueError, match="got"):
        paired_comparison(bad, LARGE)


def comparison(larger: bool):
    return paired_comparison(SMALL, LARGE if larger else [0.9, 2.5, 3.0])


def test_a_verdict_must_hold_for_both_solvers():
    yes, no = comparison(True), comparison(False)
    assert order_verdict(yes, yes) is Verdict.REPRODUCED
    assert order_verdict(yes, no) is Verdict.INCONCLUSIVE_SOLVER
    assert order_verdict(no, yes) is Verdict.INCONCLUSIVE_SOLVER
    assert order_verdict(no, no) is Verdict.NOT_REPRODUCED


def test_larger_in_every_pair_is_not_enough_without_a_small_p():
    weak = paired_comparison(SMALL, [1.01, 2.01, 400.0])
    assert weak.larger_in_every_pair
    assert weak.p_value > 0.05
    assert order_verdict(weak, weak) is Verdict.NOT_REPRODUCED


def test_one_pair_is_too_few_for_a_verdict():
    single = paired_comparison([1.0], [2.0])
    assert order_verdict(single, single) is Verdict.INCONCLUSIVE_FEW


@pytest.mark.parametrize(
    ("ratio", "agrees"), [(16.8, True), (16.6, False), (1669, True), (1671, False)]
)
def test_size_agrees_within_ten_times_of_the_papers_ratio(ratio, agrees):
    assert size_verdict(ratio, 167.0) is agrees


def test_sd_is_the_sample_standard_deviation():
    assert mean_and_sd([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(mean_and_sd([1.0])[1])


def test_a_row_carries_the_papers_numbers_and_ratio():
    found = row("phi", SMALL, LARGE, ([1.23, 0.83], [205.14, 69.52]))
    assert found.paper_ratio == pytest.approx(205.14 / 1.23)
    assert row("lambda_max", SMALL, LARGE).paper_ratio is None
