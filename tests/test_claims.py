import math
from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from sharpness.reproduce.claims import (
    Check,
    Finding,
    Role,
    Verdict,
    by_both_solvers,
    by_test,
    effect_of,
    holds,
    paired,
    published_effect,
    ratio_within,
    trend,
    with_holm,
    within,
)
from sharpness.statistics import holm, page_p, sign_flip, student_interval

YES, NO = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED
FEW, SOLVER = Verdict.UNDECIDED, Verdict.SOLVER
PREMISE, ALSO, BEYOND = Role.PREMISE, Role.SECONDARY, Role.BEYOND
SMALL, LARGE = [1.0, 2.0, 4.0], [10.0, 30.0, 50.0]


def t_of(first, second, larger=True):
    """SciPy's own paired test, with the verdict that it means."""
    side = "greater" if larger else "less"
    return stats.ttest_rel(second, first, alternative=side).pvalue


def check(verdict, role=Role.PRIMARY, n=6, **more):
    return Check(claim="c", ours="", n=n, verdict=verdict, role=role, **more)


def finding(*checks, **more):
    settings = {name: "" for name in ("item", "title", "claim", "study", "data", "command")}
    settings |= {"paper": "p", "preset": "quick"}
    return Finding(**{**settings, **more}, checks=list(checks))


# -- what a test says ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "opposite", "n", "verdict"),
    [
        (0.0249, 0.9751, 3, YES),
        (0.001, 0.999, 6, YES),
        (0.9751, 0.0249, 3, NO),
        # One level, 2.5 % a side.
        (0.0251, 0.9749, 6, FEW),
        (0.9749, 0.0251, 6, FEW),
        # That a test shows nothing is no evidence, however many pairs there were.
        (0.5, 0.5, 100, FEW),
        (math.nan, math.nan, 6, FEW),
        # Of few ranks all reversed p is 1 whatever they would show.
        (1.0, 0.5, 3, FEW),
        # Two pairs decide nothing, however small the p.
        (1e-9, 1.0, 2, FEW),
        (1.0, 1e-9, 2, FEW),
        (1e-9, 1.0, 1, FEW),
    ],
)
def test_a_test_shows_a_claim_or_its_opposite_or_nothing(p, opposite, n, verdict):
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
    assert found.verdict is (YES if p < 0.025 else NO if p > 0.975 else FEW)


@pytest.mark.parametrize("case", range(20))
def test_a_direction_is_decided_where_the_interval_lies_on_one_side_of_zero(case):
    rng = np.random.default_rng(case)
    first = rng.normal(size=6)
    second = first + rng.normal(rng.choice([-0.8, 0.0, 0.8]), 0.7, 6)
    low, high = stats.ttest_rel(second, first).confidence_interval(0.95)
    found = paired("c", first, second, ratio=False)
    assert found.verdict is (YES if low > 0 else NO if high < 0 else FEW)
    assert f", {low:+.2f} to {high:+.2f};" in found.ours


def test_larger_in_every_pair_is_not_enough_without_a_small_p():
    found = paired("c", SMALL, [1.01, 2.01, 400.0])
    assert "3 of 3 larger" in found.ours
    assert found.p > 0.025
    assert found.verdict is FEW


def test_no_difference_in_many_pairs_counts_not_against_a_claim():
    first = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    second = [2.0, 1.0, 4.0, 3.0, 6.0, 5.0]
    found = paired("c", first, second)
    assert found.verdict is FEW
    assert found.verdict_text == "undecided at n = 6"


def test_the_direction_of_a_claim_decides():
    assert paired("c", SMALL, LARGE).verdict is YES
    assert paired("c", SMALL, LARGE, larger=False).verdict is NO
    assert paired("c", LARGE, SMALL, larger=False).verdict is YES
    assert paired("c", LARGE, SMALL).verdict is NO


def test_one_pair_is_too_few_and_so_are_two():
    found = paired("c", [1.0], [2.0])
    assert (found.verdict, found.p, found.flip_p, found.n) == (FEW, None, None, 1)
    assert found.ours == "1 → 2 (2×; 1 of 1 larger)"  # no interval
    for second in ([100.0, 1000.1], [100.0, 1000.0], [0.01, 0.1]):
        found = paired("c", [1.0, 10.0], second)
        assert (found.verdict, found.n) == (FEW, 2)


def test_sign_flips_stand_beside_the_t_test():
    assert paired("c", SMALL, LARGE).flip_p == pytest.approx(1 / 8)
    assert paired("c", SMALL, LARGE, larger=False).flip_p == pytest.approx(1.0)
    assert paired("c", [1.0] * 4, [2.0, 3.0, 4.0, 0.99]).flip_p == pytest.approx(2 / 16)


@pytest.mark.parametrize("num", [3, 6])
@pytest.mark.parametrize("case", range(4))
def test_sign_flips_are_all_patterns_by_brute_force(case, num):
    moved = np.random.default_rng(case).normal(0.3, 1, num).round(1)  # with ties
    signs = np.array(list(product((1, -1), repeat=num)))
    share = np.mean((signs * moved).sum(1) >= moved.sum() - 1e-9)
    assert sign_flip(moved) == pytest.approx(share)


def test_positive_values_are_compared_by_ratios_unless_told_otherwise():
    by_ratio, by_difference = (
        paired("c", SMALL, LARGE),
        paired("c", SMALL, LARGE, ratio=False),
    )
    assert by_ratio.p == pytest.approx(t_of(np.log(SMALL), np.log(LARGE)))
    assert by_difference.p == pytest.approx(t_of(SMALL, LARGE))
    low, high = 10 ** np.array(student_interval(np.log10(LARGE) - np.log10(SMALL)))
    interval = f"{low:.3g} to {high:.3g}"
    assert by_ratio.ours == f"2.3 ± 1.5 → 30 ± 20 (12.3×, {interval}; 3 of 3 larger)"
    assert by_difference.ours.startswith("2.3 ± 1.5 → 30 ± 20 (+27.67, ")


def test_what_falls_is_told_as_falling():
    found = paired("c", [98.0, 97.0, 99.0], [96.0, 97.5, 96.0], larger=False, ratio=False)
    assert found.ours.startswith("98.0 ± 1.0 → 96.50 ± 0.87 (-1.50, ")
    assert found.ours.endswith("; 2 of 3 smaller)")
    halved = paired("c", [4.0, 6.0, 8.0], [2.0, 3.1, 3.9], larger=False)
    assert "(0.501×, " in halved.ours
    assert halved.ours.endswith("3 of 3 smaller)")


def test_what_the_paper_does_not_claim_is_not_judged():
    found = paired("c", SMALL, LARGE, role=BEYOND, paper=([1, 1], [2, 1]))
    assert (found.verdict_text, found.size) == ("beyond the paper", None)
    assert found.p < 0.05
    assert finding(found).outcome is Verdict.NO_CLAIM


def test_pairs_without_any_difference_decide_nothing():
    same = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    found = paired("c", same, same)
    assert (found.p, found.flip_p, found.verdict) == (1.0, 1.0, FEW)


@pytest.mark.parametrize("ratio", [True, False])
def test_where_every_pair_differs_by_the_same_sign_flips_decide(ratio):
    first = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    second = 2 * first if ratio else first + 0.5
    found = paired("c", first, second, ratio=ratio)
    assert found.p == found.flip_p == pytest.approx(1 / 64)
    assert found.verdict is YES
    assert paired("c", first, second, ratio=ratio, larger=False).verdict is NO
    # Of five pairs 1 / 32 is the least that flips can give.
    for larger in (True, False):
        few = paired("c", first[:5], second[:5], ratio=ratio, larger=larger)
        assert few.verdict is FEW


@pytest.mark.parametrize("larger", [True, False])
def test_a_pair_that_is_not_a_number_is_left_out(larger):
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0, math.nan], [2.0, 3.0, 5.0, 6.0, 7.0, 8.0]
    found = paired("c", first, second, larger=larger)
    assert found == paired("c", first[:5], second[:5], larger=larger)
    assert found.n == 5
    nothing = paired("c", [math.nan] * 6, second, larger=larger)
    assert (nothing.n, nothing.verdict) == (0, FEW)


# -- beside the paper's number -----------------------------------------------------------


def test_the_papers_numbers_are_told_as_they_were_printed_with_their_interval():
    published = ([1.23, 0.83], [205.14, 69.52])
    found = paired("c", SMALL, LARGE, paper=published)
    assert found.paper == "1.23 ± 0.83 → 205.14 ± 69.52 (167×, 72.7 to 382)"
    found = paired("c", SMALL, LARGE, paper=published, ratio=False)
    assert found.paper.startswith("1.23 ± 0.83 → 205.14 ± 69.52 (+203.91, ")
    assert paired("c", SMALL, LARGE).paper == ""


def test_the_papers_interval_of_a_difference_is_welchs():
    published = ([98.03, 0.07], [97.81, 0.09])
    found = published_effect(published, False)
    drawn = np.array([-1.0, -0.5, 0.0, 0.5, 1.0]) / np.std([-1, -0.5, 0, 0.5, 1], ddof=1)
    test = stats.ttest_ind(97.81 + 0.09 * drawn, 98.03 + 0.07 * drawn, equal_var=False)
    assert found.middle == pytest.approx(-0.22)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))


def test_the_papers_interval_of_a_ratio_is_that_of_drawn_trials():
    rng = np.random.default_rng(0)
    small, large = rng.normal(10, 0.5, (20_000, 5)), rng.normal(200, 12, (20_000, 5))
    spread = np.std(np.log10(large.mean(1) / small.mean(1)))
    found = published_effect(([10, 0.5], [200, 12]), True)
    half = spread * stats.t.ppf(0.975, 7.9)
    assert 10**found.middle == pytest.approx(20)
    assert found.high - found.middle == pytest.approx(half, rel=0.05)


@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize(
    ("theirs", "spread", "size"),
    [
        (20, 0.01, YES),  # ours is 20 times
        (25, 0.01, NO),
        (16, 0.01, NO),
        (25, 0.3, YES),
        (25, 3.0, FEW),  # no change is in the interval as well
        (1e9, 3.0, NO),
    ],
)
def test_size_is_refuted_where_the_interval_excludes_the_papers_number(
    theirs, spread, size, n
):
    moved = math.log10(20) + spread * np.array([-1, 1, -1, 1, -1, 1][:n])
    found = paired("c", [1.0] * n, 10**moved, paper=([1, 0], [theirs, 0]))
    assert found.size is (size if n > 2 else FEW)
    assert (found.verdict is YES) == (n > 2 and spread < 3)


def test_direction_and_size_are_two_verdicts():
    found = paired("c", [1.0] * 6, [8, 9, 10, 10, 11, 12.0], paper=([1, 0.1], [167, 1]))
    assert (found.verdict, found.size) == (YES, NO)
    assert found.verdict_text == "reproduced; size not reproduced"
    assert finding(found).outcome is YES
    wide = paired("c", [1.0] * 6, [8, 9, 10, 10, 11, 12.0], paper=([1, 0.7], [12, 4]))
    aside = ", though the paper's own interval overlaps ours"
    assert wide.verdict_text == f"reproduced; size not reproduced{aside}"
    reduced = paired(
        "c", [1.0] * 6, [8, 9, 10, 10, 11, 12.0], paper=([1, 0.1], [167, 1]), sized=False
    )
    assert (reduced.size, reduced.verdict_text) == (None, "reproduced")
    assert reduced.paper == found.paper


# -- both solvers ----------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "best"), [*product([YES, NO, FEW], repeat=2)])
def test_only_verdicts_that_contradict_each_other_are_left_to_the_solver(ours, best):
    protocol = paired("by the protocol", SMALL, LARGE, paper=([1, 1], [2, 1]))
    protocol = Check(**{**vars(protocol), "verdict": ours})
    found = by_both_solvers(protocol, check(best))
    contradict = {ours, best} == {YES, NO}
    assert found.verdict is (ours if ours is best else SOLVER if contradict else FEW)
    assert (found.claim, found.p, found.ours, found.paper, found.size) == (
        "by the protocol",
        protocol.p,
        protocol.ours,
        protocol.paper,
        protocol.size,
    )


# -- trends ----------------------------------------------------------------------------


def brute_force(x, runs):
    """Share of all orders of every run's values with at least this sum of products."""
    at = stats.rankdata(x)
    ranks = [stats.rankdata(run) for run in runs]
    found = sum(at @ row for row in ranks)
    sums = [
        sum(at @ np.array(row) for row in rows)
        for rows in product(*map(permutations, ranks))
    ]
    return np.mean(np.array(sums) >= found - 1e-9)


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize(("num_runs", "num_x"), [(1, 5), (2, 4), (3, 3)])
def test_pages_p_is_the_share_of_all_orders_by_brute_force(case, num_runs, num_x):
    rng = np.random.default_rng(case)
    x = [8.0, 2.0, 4.0, 1.0, 16.0][:num_x]
    runs = rng.integers(0, 4, size=(num_runs, num_x)).astype(float)  # ties everywhere
    assert page_p(np.array(x), runs) == pytest.approx(brute_force(x, runs), rel=1e-12)


def test_a_three_way_tie_of_five_has_one_order_in_twenty():
    """Masters' stable range, by tau's normal approximation .026."""
    found = trend("c", [4, 16, 64, 256, 1000], [[-6, -8, -15, -15, -15]], rising=False)
    assert found.p == pytest.approx(1 / 20)
    assert (found.verdict, found.n) == (FEW, 1)


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("rising", [True, False])
def test_a_trend_is_pages_within_starting_points(case, rising):
    rng = np.random.default_rng(case)
    x = [8.0, 2.0, 4.0, 1.0]  # in any order
    runs = rng.normal(size=(3, 4)) + rng.choice([-1.0, 0.0, 1.0]) * np.log2(x)
    runs += 100 * rng.normal(size=(3, 1))  # how starting points differ plays no part
    in_order = runs[:, np.argsort(x)]
    p, opposite = (
        stats.page_trend_test(values, method="exact").pvalue
        for values in (in_order, -in_order)
    )
    if not rising:
        p, opposite = opposite, p
    found = trend("c", x, runs.tolist(), rising=rising)
    assert found.p == pytest.approx(p, rel=1e-9)
    assert found.n == 3
    assert found.verdict is (YES if p < 0.025 else NO if opposite < 0.025 else FEW)
    taus = [stats.kendalltau(x, run).statistic for run in runs]
    assert found.ours == f"tau {np.mean(taus):+.2f}"


def test_with_many_values_the_orders_are_drawn():
    x = np.arange(10.0)
    runs = np.random.default_rng(1).normal(size=(3, 10)) + 0.2 * x
    exact = stats.page_trend_test(runs, method="exact").pvalue
    assert page_p(x, runs) == pytest.approx(exact, rel=0.1)
    assert page_p(x, [x] * 1) >= 1 / 50_000


@pytest.mark.parametrize("num", [1, 2, 3])
def test_n_of_a_trend_counts_starting_points_not_runs(num):
    """Seven networks along one training are one witness."""
    x, runs = range(7), [[k + step for step in range(7)] for k in range(num)]
    for rising, decided in ((True, YES), (False, NO)):
        found = trend("c", x, runs, rising=rising)
        assert found.n == num
        assert found.verdict is (decided if num == 3 else FEW)
        if num < 3:
            assert found.verdict_text == f"undecided at n = {num}"


def test_starting_points_that_differ_hide_no_trend_and_make_none():
    rising = [[100.0 * k + step for step in (1, 2, 3)] for k in (3, 1, 2)]
    found = trend("c", [1, 2, 3], rising)
    assert (found.verdict, found.ours) == (YES, "tau +1.00")
    assert found.p == pytest.approx(1 / 6**3)
    assert trend("c", [1, 2, 3], rising, rising=False).verdict is NO


def test_a_trend_between_two_values_of_x_is_a_sign_test():
    runs = [[1.0, 2.0], [1.0, 3.0], [2.0, 5.0], [1.0, 2.0], [1.0, 4.0], [0.0, 1.0]]
    for num in (3, 6):
        found = trend("c", [10, 20], runs[:num])
        assert found.p == pytest.approx(0.5**num)
        assert (found.n, found.verdict) == (num, YES if num == 6 else FEW)
    assert trend("c", [10, 20], runs, rising=False).verdict is NO


def test_what_is_constant_shows_no_trend():
    found = trend("c", [1, 2, 3], [[5.0, 5.0, 5.0]] * 3, ours="5 everywhere")
    assert (found.ours, found.p, found.verdict) == ("5 everywhere; constant", None, FEW)


def test_a_starting_point_without_any_change_does_not_hide_the_others():
    runs = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [5.0] * 4]
    found = trend("c", [1, 2, 3, 4], runs)
    assert found.ours == "tau +0.67"
    assert found.p == pytest.approx(1 / 24**2)
    assert found.verdict is YES
    assert trend("c", [1, 2, 3, 4], runs, rising=False).verdict is NO


def test_a_starting_point_that_lacks_a_number_is_left_out_of_a_trend():
    whole, x = [1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4]
    for lacking in (math.nan, math.inf):
        found = trend("c", x, [whole, [1.0, lacking, 0.5, 0.1]])
        assert (found.n, found.ours) == (1, "tau +1.00")
        assert found.p == pytest.approx(1 / 24)
    for runs in ([[math.nan] * 4], []):
        found = trend("c", x, runs)
        assert (found.p, found.n, found.verdict) == (None, 0, FEW)


# -- ranges ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(8))
def test_a_range_is_judged_by_students_interval(case):
    rng = np.random.default_rng(case)
    values = rng.normal(2.0, rng.choice([0.05, 0.5]), int(rng.integers(3, 8)))
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
    assert within("c", [], 0.0, 1.0).n == 0


def test_our_range_does_not_stand_for_the_papers_number():
    found = within("c", [0.9, 1.0, 1.1], 0.5, 1.5)
    assert (found.paper, found.ours, found.n) == ("", "1.00 ± 0.10 (0.752 to 1.25)", 3)
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
    assert found.ours == f"{middle}×, {least} to {most}"
    assert (found.paper, found.n, found.p) == ("10×", len(logs), None)


def test_what_has_no_test_holds_or_does_not_from_three_starting_points_on():
    yes = holds("c", True, ours="4 of 4", n=4, paper="all")
    assert (yes.verdict, yes.ours, yes.paper, yes.p) == (YES, "4 of 4", "all", None)
    assert holds("c", False, ours="", n=3).verdict is NO
    for answer in (True, False):
        assert holds("c", answer, ours="", n=2).verdict is FEW
    assert holds("c", False, ours="", n=1, counted=True).verdict is NO


def test_an_effect_is_drawn_with_its_own_edges():
    found = effect_of([1.0, 1.5, 2.0], True)
    assert found.edges == pytest.approx([10**x for x in (1.5, found.low, found.high)])
    one = effect_of([2.0], True)
    assert one.edges == (100.0, 0.0, math.inf)
    assert effect_of([-0.5, 0.5], False).edges[0] == 0.0


# -- findings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "outcome"),
    [
        ([], Verdict.NOT_RUN),
        ([check(YES, BEYOND), check(NO, BEYOND)], Verdict.NO_CLAIM),
        ([check(YES)], YES),
        ([check(FEW), check(YES, BEYOND)], FEW),
        # The primary claim decides, not what is claimed besides.
        ([check(YES), check(NO, ALSO), check(SOLVER, ALSO)], YES),
        ([check(NO), check(YES, ALSO)], NO),
        ([check(SOLVER), check(YES, ALSO)], SOLVER),
        # Of several primary ones the strongest objection.
        ([check(YES), check(FEW)], FEW),
        ([check(FEW), check(SOLVER)], SOLVER),
        ([check(NO), check(YES)], NO),
        # A premise is no claim, and takes the verdict away where it fails.
        ([check(YES, PREMISE), check(FEW)], FEW),
        ([check(YES, PREMISE), check(NO)], NO),
        ([check(NO, PREMISE), check(YES)], Verdict.NO_PREMISE),
        ([check(NO, PREMISE), check(NO)], Verdict.NO_PREMISE),
        ([check(FEW, PREMISE), check(YES)], YES),
    ],
)
def test_an_items_verdict_is_that_of_its_primary_claim_where_premises_hold(checks, outcome):
    for order in (checks, checks[::-1]):
        assert finding(*order).outcome is outcome
        assert finding(*order).verdict is outcome


def test_a_premise_is_met_or_not():
    texts = [check(verdict, PREMISE).verdict_text for verdict in (YES, NO, FEW)]
    assert texts == ["met", "not met", "undecided at n = 6"]


def test_a_stand_in_is_called_one_whatever_it_shows():
    for verdict in (YES, NO, FEW):
        found = finding(check(verdict), stand_in="digits for TIMIT")
        assert (found.verdict, found.outcome) == (Verdict.STAND_IN, verdict)
        assert found.verdict_text.startswith("stand-in: ")


def test_a_stand_in_that_was_not_observed_was_not_run():
    assert finding(stand_in="digits for TIMIT").verdict is Verdict.NOT_RUN
    found = finding(check(YES, BEYOND), stand_in="digits for TIMIT")
    assert found.verdict is Verdict.NO_CLAIM


@pytest.mark.parametrize(
    ("checks", "more", "text"),
    [
        ([], {}, "not run"),
        ([check(YES)], {}, "reproduced"),
        ([check(YES, n=5)], {}, "reproduced (provisional)"),
        ([check(NO, n=3)], {}, "not reproduced (provisional)"),
        ([check(YES, n=3, exact=True)], {}, "reproduced"),
        ([check(FEW, n=4)], {}, "undecided at n = 4"),
        ([check(SOLVER)], {}, "undecided (solver)"),
        ([check(YES, size=NO)], {}, "reproduced; size not reproduced"),
        ([check(FEW, size=FEW)], {}, "undecided at n = 6"),
        ([check(YES, n=9, num_new=3)], {}, "reproduced (provisional)"),
        ([check(FEW, num_new=2)], {}, "undecided at n = 2 new starting points"),
        ([check(NO, PREMISE), check(YES)], {}, "premise not met"),
        ([], {"made": 2, "wanted": 12}, "unfinished (2 of 12 observations)"),
        (
            [check(FEW, n=1)],
            {"made": 2, "wanted": 12},
            "so far undecided at n = 1, unfinished (2 of 12 observations)",
        ),
    ],
)
def test_a_verdict_says_what_it_rests_on(checks, more, text):
    assert finding(*checks, **more).verdict_text == text


# -- several claims --------------------------------------------------------------------


def test_holm_is_the_step_down_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("case", range(3))
def test_holm_rejects_as_brute_force_over_all_intersections_does(case):
    """The closed test with Bonferroni in each intersection."""
    ps = np.random.default_rng(case).random(4) ** 3
    subsets = [
        [i for i in range(4) if chosen[i]]
        for chosen in product((0, 1), repeat=4)
        if any(chosen)
    ]
    closed = [
        max(min(1, len(s) * min(ps[j] for j in s)) for s in subsets if i in s)
        for i in range(4)
    ]
    assert holm(ps) == pytest.approx(closed)


def test_holm_is_taken_over_the_primary_claims_of_a_paper():
    first = finding(
        check(YES, p=0.01), check(YES, ALSO, p=0.001), check(YES, PREMISE, p=0.1)
    )
    second, other = finding(check(NO, p=0.04)), finding(check(YES, p=0.02), paper="q")
    adjusted = [[c.holm for c in one.checks] for one in with_holm([first, second, other])]
    assert adjusted == [[pytest.approx(0.02), None, None], [0.04], [0.02]]
    assert [one.outcome for one in with_holm([first, second])] == [YES, NO]
