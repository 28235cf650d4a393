import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from sharpness.reproduce.claims import (
    Check,
    Finding,
    Verdict,
    by_both_solvers,
    by_test,
    holds,
    paired,
    ratio_within,
    trend,
    within,
)

YES, NO = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED
FEW, SOLVER = Verdict.INCONCLUSIVE_FEW, Verdict.INCONCLUSIVE_SOLVER
PART = Verdict.IN_PART
SMALL, LARGE = [1.0, 2.0, 4.0], [10.0, 30.0, 50.0]


def t_of(first, second, larger=True):
    """SciPy's own paired test, with the verdict that it means."""
    side = "greater" if larger else "less"
    return stats.ttest_rel(second, first, alternative=side).pvalue


def check(verdict, claim="c"):
    return Check(claim=claim, ours="", n=6, verdict=verdict)


def finding(*verdicts, stand_in=None):
    return Finding(
        paper="p",
        item="i",
        title="",
        claim="",
        study="",
        data="",
        preset="quick",
        command="",
        stand_in=stand_in,
        checks=[check(verdict) for verdict in verdicts],
    )


# -- what a test says ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "opposite", "n", "verdict"),
    [
        (0.049, 0.951, 3, YES),
        (0.001, 0.999, 6, YES),
        (0.951, 0.049, 3, NO),
        (0.051, 0.949, 6, NO),
        (0.5, 0.5, 100, NO),
        (math.nan, math.nan, 6, NO),
        (0.051, 0.949, 5, FEW),
        (0.949, 0.051, 5, FEW),
        (math.nan, math.nan, 5, FEW),
        # Of few ranks all reversed p is 1 whatever they would show.
        (1.0, 0.5, 3, FEW),
        # Two pairs or runs decide nothing, however small the p.
        (1e-9, 1.0, 2, FEW),
        (1.0, 1e-9, 2, FEW),
        (1e-9, 1.0, 1, FEW),
        (math.nan, math.nan, 1, FEW),
    ],
)
def test_a_test_shows_a_claim_or_its_opposite_or_had_too_few(p, opposite, n, verdict):
    assert by_test(p, opposite, n) is verdict


# -- pairs -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_pairs_are_judged_by_scipys_paired_test(case, larger, shift):
    rng = np.random.default_rng(case)
    first = np.exp(rng.normal(size=int(rng.integers(3, 9))))
    second = first * np.exp(rng.normal(0.3, 0.5, len(first))) - shift
    first = first - shift
    found = paired("c", first, second, larger=larger)
    values = (first, second)
    if min(first.min(), second.min()) > 0:
        values = (np.log10(first), np.log10(second))
    p = t_of(*values, larger)
    assert found.p == pytest.approx(p, rel=1e-9)
    assert found.n == len(first)
    enough = len(first) >= 6
    assert found.verdict is (YES if p < 0.05 else NO if p > 0.95 or enough else FEW)


def test_larger_in_every_pair_is_not_enough_without_a_small_p():
    found = paired("c", SMALL, [1.01, 2.01, 400.0])
    assert "3 of 3 larger" in found.ours
    assert found.p > 0.05
    assert found.verdict is FEW


def test_no_difference_in_many_pairs_counts_against_a_claim():
    first = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    second = [2.0, 1.0, 4.0, 3.0, 6.0, 5.0]
    assert paired("c", first, second).verdict is NO
    assert paired("c", first[:4], second[:4]).verdict is FEW


def test_the_direction_of_a_claim_decides():
    assert paired("c", SMALL, LARGE).verdict is YES
    assert paired("c", SMALL, LARGE, larger=False).verdict is NO
    assert paired("c", LARGE, SMALL, larger=False).verdict is YES
    assert paired("c", LARGE, SMALL).verdict is NO


def test_one_pair_is_too_few_and_so_are_two():
    found = paired("c", [1.0], [2.0])
    assert (found.verdict, found.p, found.flip_p, found.n) == (FEW, None, None, 1)
    for second in ([100.0, 1000.1], [100.0, 1000.0], [0.01, 0.1]):
        found = paired("c", [1.0, 10.0], second)
        assert (found.verdict, found.n) == (FEW, 2)


def test_sign_flips_stand_beside_the_t_test():
    assert paired("c", SMALL, LARGE).flip_p == pytest.approx(1 / 8)
    assert paired("c", SMALL, LARGE, larger=False).flip_p == pytest.approx(1.0)
    assert paired("c", [1.0] * 4, [2.0, 3.0, 4.0, 0.99]).flip_p == pytest.approx(2 / 16)


def test_positive_values_are_compared_by_ratios_unless_told_otherwise():
    by_ratio, by_difference = (
        paired("c", SMALL, LARGE),
        paired("c", SMALL, LARGE, ratio=False),
    )
    assert by_ratio.p == pytest.approx(t_of(np.log(SMALL), np.log(LARGE)))
    assert by_difference.p == pytest.approx(t_of(SMALL, LARGE))
    assert by_ratio.ours == "2.3 ± 1.5 → 30 ± 20 (12.3×, 3 of 3 larger)"
    assert by_difference.ours == "2.3 ± 1.5 → 30 ± 20 (+27.67, 3 of 3 larger)"


def test_what_falls_is_told_as_falling():
    found = paired("c", [98.0, 97.0, 99.0], [96.0, 97.5, 96.0], larger=False, ratio=False)
    assert found.ours == "98.0 ± 1.0 → 96.50 ± 0.87 (-1.50, 2 of 3 smaller)"
    halved = paired("c", [4.0, 6.0, 8.0], [2.0, 3.1, 3.9], larger=False)
    assert "(0.501×, 3 of 3 smaller)" in halved.ours


def test_the_papers_numbers_are_told_as_they_were_printed():
    published = ([1.23, 0.83], [205.14, 69.52])
    assert paired("c", SMALL, LARGE, paper=published).paper == (
        "1.23 ± 0.83 → 205.14 ± 69.52 (167×)"
    )
    assert paired("c", SMALL, LARGE, paper=published, ratio=False).paper.endswith(
        "(+203.91)"
    )
    assert paired("c", SMALL, LARGE).paper == ""


def test_what_the_paper_does_not_claim_is_not_judged():
    found = paired("c", SMALL, LARGE, judged=False)
    assert found.verdict is None
    assert found.p < 0.05


def test_pairs_without_any_difference_count_against_a_claim():
    same = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    found = paired("c", same, same)
    assert (found.p, found.flip_p, found.verdict) == (1.0, 1.0, NO)
    assert paired("c", same[:5], same[:5]).verdict is FEW


@pytest.mark.parametrize("ratio", [True, False])
def test_where_every_pair_differs_by_the_same_sign_flips_decide(ratio):
    first = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    second = 2 * first if ratio else first + 0.5
    found = paired("c", first, second, ratio=ratio)
    assert found.p == found.flip_p == pytest.approx(1 / 64)
    assert found.verdict is YES
    assert paired("c", first, second, ratio=ratio, larger=False).verdict is NO
    # Of four pairs 1 / 16 is the least that flips can give.
    for larger in (True, False):
        few = paired("c", first[:4], second[:4], ratio=ratio, larger=larger)
        assert few.verdict is FEW


@pytest.mark.parametrize("larger", [True, False])
def test_a_pair_that_is_not_a_number_is_left_out(larger):
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0, math.nan], [2.0, 3.0, 5.0, 6.0, 7.0, 8.0]
    found = paired("c", first, second, larger=larger)
    assert found == paired("c", first[:5], second[:5], larger=larger)
    assert found.n == 5
    nothing = paired("c", [math.nan] * 6, second, larger=larger)
    assert (nothing.n, nothing.verdict) == (0, FEW)


# -- both solvers ----------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "best"), [*product([YES, NO, FEW, None], repeat=2)])
def test_a_verdict_must_hold_for_both_solvers(ours, best):
    protocol = paired("by the protocol", SMALL, LARGE, paper=([1, 1], [2, 1]))
    protocol = Check(**{**vars(protocol), "verdict": ours})
    found = by_both_solvers(protocol, check(best, "by the best"))
    assert found.verdict is (ours if ours is best else SOLVER)
    assert (found.claim, found.p, found.ours, found.paper) == (
        "by the protocol",
        protocol.p,
        protocol.ours,
        protocol.paper,
    )


# -- trends ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("rising", [True, False])
def test_a_trend_is_pages_within_starting_points(case, rising):
    rng = np.random.default_rng(case)
    x = [8.0, 2.0, 4.0, 1.0]  # in any order
    runs = rng.normal(size=(3, 4)) + rng.choice([-1.0, 0.0, 1.0]) * np.log2(x)
    runs += 100 * rng.normal(size=(3, 1))  # how starting points differ plays no part
    in_order = runs[:, np.argsort(x)]
    p, opposite = (stats.page_trend_test(values).pvalue for values in (in_order, -in_order))
    if not rising:
        p, opposite = opposite, p
    found = trend("c", x, runs.tolist(), rising=rising)
    assert found.p == pytest.approx(p, rel=1e-9)
    assert found.n == 12
    assert found.verdict is (YES if p < 0.05 else NO)  # 12 runs are enough
    taus = [stats.kendalltau(x, run).statistic for run in runs]
    assert found.ours == f"tau {np.mean(taus):+.2f}"


@pytest.mark.parametrize("case", range(4))
def test_a_trend_of_one_starting_point_is_kendalls(case):
    x = np.arange(6.0)
    y = np.random.default_rng(case).normal(size=6) + 0.4 * x
    test = stats.kendalltau(x, y, alternative="greater")
    found = trend("c", x, [y])
    assert (found.p, found.n) == (pytest.approx(test.pvalue), 6)
    assert found.ours == f"tau {test.statistic:+.2f}"


def test_starting_points_that_differ_hide_no_trend_and_make_none():
    rising = [[100.0 * k + step for step in (1, 2, 3)] for k in (3, 1, 2)]
    found = trend("c", [1, 2, 3], rising)
    assert (found.verdict, found.ours) == (YES, "tau +1.00")
    assert found.p == pytest.approx(1 / 6**3)
    assert trend("c", [1, 2, 3], rising, rising=False).verdict is NO


def test_a_trend_between_two_values_of_x_is_a_paired_t_test():
    runs = [[1.0, 2.0], [1.0, 3.0], [2.0, 5.0]]
    first, second = zip(*runs, strict=True)
    found = trend("c", [10, 20], runs)
    assert found.p == pytest.approx(t_of(first, second))
    assert (found.n, found.verdict) == (6, YES)
    assert trend("c", [10, 20], runs, rising=False).verdict is NO
    assert trend("c", [10, 20], runs[:2]).verdict is FEW  # two pairs, of four runs
    same = [[1.0, 2.0]] * 3  # no spread: sign flips
    assert trend("c", [10, 20], same).p == pytest.approx(1 / 8)
    assert trend("c", [10, 20], same).verdict is FEW


def test_a_trend_is_seen_or_its_opposite_or_neither():
    x = [1, 2, 3, 4, 5]
    up, mixed = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 2.5]
    # All five in order: one of 5! permutations.
    assert trend("c", x, [up]).p == pytest.approx(1 / 120)
    assert trend("c", x, [up]).verdict is YES
    assert trend("c", x, [up[::-1]]).verdict is NO
    assert trend("c", x, [up[::-1]], rising=False).verdict is YES
    assert trend("c", x, [mixed]).verdict is FEW
    for few in ([1, 2], [1, 2, 3]):  # 1 / 3! is more than .05
        assert trend("c", few, [few]).verdict is FEW
        assert trend("c", few, [few[::-1]]).verdict is FEW
    assert trend("c", [*x, 6], [[*mixed, 2.2]]).verdict is NO


def test_what_is_constant_shows_no_trend():
    found = trend("c", [1, 2, 3], [[5.0, 5.0, 5.0]], ours="5 everywhere")
    assert (found.ours, found.p, found.verdict) == ("5 everywhere; constant", None, FEW)
    assert trend("c", range(6), [[5.0] * 6]).verdict is NO


def test_a_starting_point_without_any_change_does_not_hide_the_others():
    runs = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [5.0] * 4]
    found = trend("c", [1, 2, 3, 4], runs)
    assert found.ours == "tau +0.67"
    assert found.p == pytest.approx(stats.page_trend_test(runs).pvalue)
    assert found.verdict is YES
    assert trend("c", [1, 2, 3, 4], runs, rising=False).verdict is NO


def test_a_starting_point_that_lacks_a_number_is_left_out_of_a_trend():
    whole, x = [1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4]
    for lacking in (math.nan, math.inf):
        found = trend("c", x, [whole, [1.0, lacking, 0.5, 0.1]])
        assert (found.n, found.ours) == (4, "tau +1.00")
        assert found.p == pytest.approx(1 / 24)
        assert found.verdict is YES
    for runs in ([[math.nan] * 4], []):
        found = trend("c", x, runs)
        assert (found.p, found.n, found.verdict) == (None, 0, FEW)


def test_a_trend_beyond_the_paper_is_not_judged():
    found = trend("c", range(6), [range(6)], judged=False, ours="0 to 5")
    assert (found.verdict, found.ours) == (None, "0 to 5; tau +1.00")


# -- ranges ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(8))
def test_a_range_is_judged_by_students_interval(case):
    rng = np.random.default_rng(case)
    values = rng.normal(2.0, rng.choice([0.05, 0.5]), int(rng.integers(2, 8)))
    low, high = rng.choice([1.5, 2.2]), 2.5
    edges = stats.t.interval(
        0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values)
    )
    inside = low <= edges[0] and edges[1] <= high
    outside = edges[1] < low or edges[0] > high
    expected = YES if inside else NO if outside else FEW
    assert within("c", values.tolist(), low, high).verdict is expected


def test_a_mean_lies_in_a_range_or_beside_it_or_about_its_edge():
    values = [0.9, 1.0, 1.1]
    assert within("c", values, 0.5, 1.5).verdict is YES
    assert within("c", values, 1.5, 2.0).verdict is NO
    assert within("c", values, 0.0, 0.5).verdict is NO
    assert within("c", values, 0.5, 1.1).verdict is FEW
    assert within("c", values, 0.95, 1.5).verdict is FEW
    # 4.303 is Student's t for two degrees of freedom: 1 ± 4.303 · 0.1 / sqrt 3.
    half = 4.303 * 0.1 / math.sqrt(3)
    assert within("c", values, 1 - half - 1e-3, 1 + half + 1e-3).verdict is YES
    assert within("c", values, 1 - half + 1e-3, 1 + half - 1e-3).verdict is FEW


def test_one_value_cannot_be_in_a_range_and_equal_ones_can():
    assert within("c", [1.0], 0.0, 2.0).verdict is FEW
    assert within("c", [5.0], 0.0, 2.0).verdict is FEW
    assert within("c", [1.0, 1.0], 0.0, 1.0).verdict is FEW
    assert within("c", [1.0] * 3, 0.0, 1.0).verdict is YES
    assert within("c", [1.5] * 3, 0.0, 1.0).verdict is NO


def test_our_range_does_not_stand_for_the_papers_number():
    found = within("c", [0.9, 1.0, 1.1], 0.5, 1.5)
    assert (found.paper, found.ours, found.n) == ("", "1.00 ± 0.10", 3)
    assert within("c", [1.0], 0.5, 1.5, paper="about 1").paper == "about 1"


def test_a_ratio_lies_in_a_range_or_not():
    first, moved = [1.0, 2.0, 4.0], [1.0, 1.1, 0.9]
    for factor, verdict in [
        (100, YES),
        (15, YES),
        (700, YES),
        (11, FEW),
        (950, FEW),
        (5, NO),
        (2000, NO),
    ]:
        second = [factor * a * b for a, b in zip(first, moved, strict=True)]
        assert ratio_within("c", first, second, 10, 1000).verdict is verdict
        above = YES if factor >= 15 else verdict
        assert ratio_within("c", first, second, low=10).verdict is above
        below = YES if factor < 900 else verdict
        assert ratio_within("c", first, second, high=1000).verdict is below
    wide = [10.0, 200.0, 40_000.0]
    assert ratio_within("c", first, wide, 10, 1000).verdict is FEW
    assert ratio_within("c", [1.0], [100.0], 10, 1000).verdict is FEW
    assert ratio_within("c", [1.0], [100.0], 10, 1000).ours == "100×"


def test_of_what_is_0_there_is_no_ratio():
    for first, second in ([0.0, 1.0, 1.0], SMALL), (SMALL, [1.0, 0.0, 1.0]), ([], []):
        found = ratio_within("c", first, second, high=1.5, paper="p")
        assert (found.verdict, found.n, found.paper) == (FEW, len(first), "p")
        assert "nan" not in found.ours


@pytest.mark.parametrize("case", range(6))
def test_a_ratio_is_judged_by_students_interval_of_its_logarithm(case):
    rng = np.random.default_rng(case)
    first = np.exp(rng.normal(size=int(rng.integers(3, 8))))
    logs = rng.normal(rng.choice([0.0, 1.0, 3.0]), 0.3, len(first))
    second = (first * 10**logs).tolist()
    found = ratio_within("c", first.tolist(), second, 1.0, 100.0, paper="10×")
    interval = stats.t.interval(0.95, len(logs) - 1, loc=logs.mean(), scale=stats.sem(logs))
    low, high = interval
    expected = YES if low >= 0 and high <= 2 else NO if high < 0 or low > 2 else FEW
    assert found.verdict is expected
    middle, least, most = (f"{10**x:.3g}" for x in (logs.mean(), *interval))
    assert found.ours == f"{middle}× ({least} to {most})"
    assert (found.paper, found.n, found.p) == ("10×", len(logs), None)


def test_what_has_no_test_holds_or_does_not():
    yes = holds("c", True, ours="4 of 4", n=4, paper="all")
    assert yes == Check(claim="c", ours="4 of 4", n=4, paper="all", verdict=YES)
    assert holds("c", False, ours="", n=1).verdict is NO


# -- findings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "outcome"),
    [
        ([], Verdict.NOT_RUN),
        ([None, None], Verdict.NO_CLAIM),
        ([YES], YES),
        ([YES, None, YES], YES),
        ([YES, FEW], PART),
        ([FEW, SOLVER, YES], PART),
        ([YES, None, NO], PART),
        ([FEW, FEW], FEW),
        ([FEW, SOLVER, FEW], SOLVER),
        ([FEW, SOLVER, NO], NO),
        ([None, NO], NO),
    ],
)
def test_an_item_is_reproduced_where_every_claim_holds_and_in_part_where_some_do(
    verdicts, outcome
):
    for order in (verdicts, verdicts[::-1]):
        assert finding(*order).outcome is outcome
        assert finding(*order).verdict is outcome


def test_a_stand_in_is_called_one_whatever_it_shows():
    for verdicts, outcome in [([YES], YES), ([NO, YES], PART), ([FEW], FEW)]:
        found = finding(*verdicts, stand_in="digits for TIMIT")
        assert (found.verdict, found.outcome) == (Verdict.STAND_IN, outcome)


def test_a_stand_in_that_was_not_looked_at_was_not_run():
    assert finding(stand_in="digits for TIMIT").verdict is Verdict.NOT_RUN
    assert finding(None, stand_in="digits for TIMIT").verdict is Verdict.NO_CLAIM


@pytest.mark.parametrize(
    ("verdicts", "stand_in", "text"),
    [
        ([], None, "not run"),
        ([], "s", "not run"),
        ([YES], None, "reproduced"),
        ([YES, None], None, "reproduced"),
        ([YES, YES], None, "reproduced (2 of 2 claims hold)"),
        ([NO, YES, None, FEW], None, "reproduced in part (1 of 3 claims hold)"),
        ([FEW], None, "inconclusive (n too small)"),
        ([SOLVER, YES], None, "reproduced in part (1 of 2 claims hold)"),
        ([SOLVER, FEW], None, "inconclusive (solver) (0 of 2 claims hold)"),
        ([FEW, NO], None, "not reproduced (0 of 2 claims hold)"),
        ([YES], "s", "stand-in: reproduced there"),
        ([NO, YES], "s", "stand-in: reproduced in part there (1 of 2 claims hold)"),
    ],
)
def test_the_verdict_says_how_many_claims_hold(verdicts, stand_in, text):
    assert finding(*verdicts, stand_in=stand_in).verdict_text == text
