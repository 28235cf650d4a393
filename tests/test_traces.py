"""Trace, Frobenius norm and diagonal: exact cases, coverage, and how a run can end."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import (
    ONE_SAMPLE,
    Point,
    generator,
    mlp_data,
    mlp_hessian,
    mlp_risk,
    normal,
    quadratic,
    symmetric,
)
from scipy import stats
from torch import Tensor

import sharpness as sh
from sharpness import _run
from sharpness._json import to_line
from sharpness._results import number
from sharpness.krylov.stochastic_trace import (
    Hutchinson,
    HutchPlusPlus,
    Probes,
    XTrace,
)
from sharpness.measures import traces
from sharpness.results import Status, StochasticEstimate
from sharpness.risk import products

EPS = float(np.finfo(float).eps)
METHODS = ["hutch++", "hutchinson", "xtrace"]
MEASURES: dict[str, Callable[..., Any]] = {
    "trace": sh.trace,
    "frobenius_norm": traces.frobenius_norm,
    "diagonal": traces.diagonal,
}
PRODUCTS_A_PROBE = {"hutch++": 3, "hutchinson": 1, "xtrace": 2}
N = 80
SPECTRA = {
    "flat": np.linspace(0.5, 1.5, N),
    "decaying": 10 * 0.8 ** np.arange(N),
    "outliers": np.append(np.linspace(-0.05, 0.1, N - 4), [2.0, 4.0, 7.0, 20.0]),
    "negative": -np.append(np.linspace(0, 0.1, N - 3), [1.0, 3.0, 9.0]),
    "single": np.append(np.zeros(N - 1), 5.0),
    "cancelling": np.append(np.linspace(-1, 1, N - 1), 1.0),  # sums to 1
}
MATRICES = [
    "hessian",
    "gauss_newton",
    "empirical_fisher",
    "sampled_fisher",
    "gradient_covariance",
]


def fast(matrix: Tensor, at_once: int = 8) -> sh.EmpiricalRisk:
    """A risk whose products are `v @ matrix` for whole blocks; `.made` counts them."""
    risk = quadratic(torch.ones(len(matrix), dtype=matrix.dtype))
    risk.made = 0

    def product(v: Tensor, name: str = "hessian") -> Tensor:
        risk.made += 1 if v.ndim == 1 else len(v)
        return v @ matrix

    risk.product = product
    risk.prepare = lambda *_: SimpleNamespace(directions_at_once=at_once)
    return risk


@cache
def problem(name: str) -> tuple[sh.EmpiricalRisk, np.ndarray]:
    matrix = symmetric(SPECTRA[name])
    return fast(matrix), matrix.numpy()


def interrupted_at(risk: sh.EmpiricalRisk, made: int) -> sh.EmpiricalRisk:
    """Ctrl-C in the product that would go beyond `made`."""
    product = risk.product

    def failing(v: Tensor, name: str = "hessian") -> Tensor:
        if risk.made + len(v) > made:
            raise KeyboardInterrupt
        return product(v, name)

    risk.product = failing
    return risk


def enough(num: int, share: float) -> int:
    """Hits that a share of `num` cases falls short of once in a thousand times."""
    return int(stats.binom.ppf(1e-3, num, share))


def rounding(matrix: np.ndarray) -> float:
    return 100 * len(matrix) * EPS * float(np.linalg.norm(matrix, "nuc"))


# -- probes ------------------------------------------------------------------------


def bits(seed: int, start: int, stop: int, n: int = 4096) -> np.ndarray:
    return Probes(torch.zeros(n), seed)(start, stop).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_are_signs_in_the_type_of_theta(dtype):
    found = Probes(torch.zeros(1000, dtype=dtype), 3)(0, 5)
    assert found.shape == (5, 1000)
    assert found.dtype == dtype
    assert torch.equal(found.abs(), torch.ones_like(found))


def test_probes_come_again_and_blocks_of_them_are_single_draws():
    block = bits(3, 0, 9)
    assert np.array_equal(block, bits(3, 0, 9))
    for i, row in enumerate(block):
        assert np.array_equal(row, bits(3, i, i + 1)[0])
    assert np.array_equal(block[4:7], bits(3, 4, 7))


@pytest.mark.parametrize("seed", [1, 2, 7, 8, 2**31, 2**32, 2**32 + 7, 2**40 + 7, 2**63])
def test_probes_of_other_seeds_and_indices_are_uncorrelated(seed):
    """Each of 600 inner products is a sum of 4096 signs; none comes near all of them."""
    other, first = bits(seed, 0, 24), bits(0, 0, 24)
    assert not np.array_equal(other, first)
    for a, b in ((other, first), (other, bits(seed + 1, 0, 24))):
        overlaps = a @ b.T / 64
        assert np.abs(overlaps).max() < stats.norm.isf(1e-3 / (2 * overlaps.size))
    own = (other @ other.T / 64)[np.triu_indices(24, 1)]
    assert np.abs(own).max() < stats.norm.isf(1e-3 / (2 * own.size))


def test_rows_of_seeds_that_differ_above_32_bits_do_not_meet():
    small = bits(7, 0, 12)
    for k in range(1, 10):
        large = bits(7 + k * 2**32, 0, 3)
        assert not (small[:, None] == large[None]).all(2).any()


def test_signs_are_balanced():
    found = bits(11, 0, 64, n=10_000)
    ups = np.sum(found > 0)
    assert abs(ups - found.size / 2) < stats.norm.isf(5e-4) * math.sqrt(found.size) / 2
    columns = found.sum(0) / 8  # across probes, by entry
    assert np.var(columns) == pytest.approx(1, abs=4 * math.sqrt(2 / 10_000))


# -- the estimators ----------------------------------------------------------------


def multiplied_by(matrix: np.ndarray) -> Callable[[Tensor], Tensor]:
    a = torch.from_numpy(matrix)
    return lambda rows: rows @ a


def grown(kind: type, matrix: np.ndarray, steps: tuple[int, ...], seed: int = 3) -> Any:
    estimator = kind(torch.zeros(len(matrix), dtype=torch.float64), seed)
    for num in steps:
        estimator.grow(multiplied_by(matrix), num)
    return estimator.estimates


def signs(n: int, seed: int, num: int) -> np.ndarray:
    """Probes as columns (n, num)."""
    return Probes(torch.zeros(n, dtype=torch.float64), seed)(0, num).numpy().T


def hutch_plus_plus_by_hand(a: np.ndarray, num: int, seed: int) -> np.ndarray:
    s, g = signs(len(a), 2 * seed, num), signs(len(a), 2 * seed + 1, num)
    q = np.linalg.qr(a @ s)[0]
    rest = g - q @ (q.T @ g)
    return np.trace(q.T @ a @ q) + np.sum(rest * (a @ rest), 0)


def xtrace_by_hand(a: np.ndarray, g: np.ndarray) -> float:
    """The mean over probes, columns (n, s), each left out of the sketch of the others."""
    estimates = []
    for i in range(g.shape[1]):
        q = np.linalg.qr(a @ np.delete(g, i, 1))[0]
        rest = g[:, i] - q @ (q.T @ g[:, i])
        estimates.append(np.trace(q.T @ a @ q) + rest @ a @ rest)
    return float(np.mean(estimates))


def test_hutchinson_is_the_quadratic_form_of_its_probes():
    a = symmetric(SPECTRA["outliers"]).numpy()
    z = signs(N, 3, 40)
    expected = np.sum(z * (a @ z), 0)
    assert grown(Hutchinson, a, (40,)) == pytest.approx(expected, abs=rounding(a))


def test_the_variance_of_hutchinson_is_that_of_its_formula():
    a = symmetric(SPECTRA["flat"]).numpy() + symmetric(SPECTRA["cancelling"], 1).numpy()
    found = grown(Hutchinson, a, (2000,))
    variance = 2 * (np.sum(a**2) - np.sum(np.diag(a) ** 2))
    spread = np.var(found, ddof=1) / variance
    kurtosis = stats.kurtosis(found)
    assert abs(spread - 1) < stats.norm.isf(5e-4) * math.sqrt((2 + kurtosis) / 2000)


@pytest.mark.parametrize("name", ["flat", "decaying", "outliers", "cancelling"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hutch_plus_plus_equals_the_textbook(name, seed):
    a = symmetric(SPECTRA[name]).numpy()
    for steps in ((12,), (10, 17, 40)):
        found = grown(HutchPlusPlus, a, steps, seed)
        condition = np.linalg.cond(a @ signs(N, 2 * seed, steps[-1]))
        expected = hutch_plus_plus_by_hand(a, steps[-1], seed)
        assert found == pytest.approx(expected, abs=condition * rounding(a))


@pytest.mark.parametrize("name", ["flat", "decaying", "outliers", "cancelling"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_xtrace_is_the_jackknife_of_the_naive_one_that_leaves_each_probe_out(name, seed):
    a = symmetric(SPECTRA[name]).numpy()
    for steps in ((12,), (10, 17)):
        found, num = grown(XTrace, a, steps, seed), steps[-1]
        g = signs(N, seed, num)
        fewer = np.array([xtrace_by_hand(a, np.delete(g, j, 1)) for j in range(num)])
        expected = xtrace_by_hand(a, g) + (num - 1) * (fewer.mean() - fewer)
        slack = num * np.linalg.cond(a @ g) * rounding(a)
        assert found == pytest.approx(expected, abs=slack)


def test_hutchinson_grown_in_steps_has_the_same_bits():
    a = symmetric(SPECTRA["flat"]).numpy()
    at_once = grown(Hutchinson, a, (40,))
    assert np.array_equal(grown(Hutchinson, a, (10, 17, 40)), at_once)
    assert np.array_equal(grown(Hutchinson, a, (10,)), at_once[:10])


@pytest.mark.parametrize("kind", [HutchPlusPlus, XTrace])
@pytest.mark.parametrize("name", ["flat", "decaying", "outliers"])
def test_growing_in_steps_gives_what_growing_at_once_does(kind, name):
    a = symmetric(SPECTRA[name]).numpy()
    at_once = grown(kind, a, (40,))
    condition = np.linalg.cond(a @ signs(N, 6 if kind is HutchPlusPlus else 3, 40))
    steps = grown(kind, a, (10, 17, 40))
    assert steps == pytest.approx(at_once, abs=condition * rounding(a))


def test_every_estimate_of_hutchinson_is_the_trace_of_a_diagonal_matrix():
    found = grown(Hutchinson, np.diag(SPECTRA["outliers"]), (20,))
    trace = SPECTRA["outliers"].sum()
    assert found == pytest.approx(np.full(20, trace), rel=1e-13)


@pytest.mark.parametrize("steps", [(10,), (20,), (10, 17, 40)])
@pytest.mark.parametrize("rank", [0, 1, 4, 9])
@pytest.mark.parametrize("kind", [HutchPlusPlus, XTrace])
def test_every_estimate_of_a_low_rank_matrix_is_its_trace(kind, rank, steps):
    a = symmetric(np.append(np.zeros(N - rank), 3.0 * (-0.7) ** np.arange(rank))).numpy()
    found = grown(kind, a, steps)
    expected = np.full(steps[-1], np.trace(a))
    assert found == pytest.approx(expected, abs=rounding(a) + 1e-300)


@pytest.mark.parametrize("n", [1, 2, 5, 10, 15, 30])
@pytest.mark.parametrize("kind", [HutchPlusPlus, XTrace])
def test_more_probes_than_dimensions_give_the_trace_and_no_more(kind, n):
    a = symmetric(np.linspace(-1, 2, n)).numpy()
    for steps in ((40,), (10, 20, 40)):
        found = grown(kind, a, steps)
        assert found == pytest.approx(np.full(40, np.trace(a)), abs=1e-10)


@pytest.mark.parametrize("kind", [Hutchinson, HutchPlusPlus, XTrace])
def test_the_zero_matrix_has_trace_zero(kind):
    for steps in ((10,), (10, 20)):
        assert not grown(kind, np.zeros((N, N)), steps).any()


@pytest.mark.parametrize("kind", [Hutchinson, HutchPlusPlus, XTrace])
def test_an_interrupted_growth_leaves_the_estimates_that_were(kind):
    a = symmetric(SPECTRA["outliers"]).numpy()
    estimator = kind(torch.zeros(N, dtype=torch.float64), 3)
    estimator.grow(multiplied_by(a), 10)
    before, calls = estimator.estimates.copy(), 0

    def failing(rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return multiplied_by(a)(rows)

    with pytest.raises(KeyboardInterrupt):
        estimator.grow(failing, 20)
    assert np.array_equal(estimator.estimates[:10], before)
    estimator.grow(multiplied_by(a), 20)
    expected = grown(kind, a, (10, 20))
    assert estimator.estimates == pytest.approx(expected, abs=1e6 * rounding(a))


# -- coverage ----------------------------------------------------------------------


def truth_of(quantity: str, matrix: np.ndarray) -> float:
    return float(np.trace(matrix) if quantity == "trace" else np.linalg.norm(matrix))


def covered(found: StochasticEstimate, truth: float, slack: float) -> bool:
    low, high = found.interval
    return low - slack <= truth <= high + slack


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "hutchinson") for name in SPECTRA if name != "decaying"]
    + [(name, "hutch++") for name in ("flat", "cancelling")],
)
def test_the_interval_of_the_trace_covers_it_r36(name, method):
    risk, a = problem(name)
    options = {"tol": 0.1, "max_hvps": 20 * PRODUCTS_A_PROBE[method], "method": method}
    runs = [sh.trace(risk, seed=seed, **options) for seed in range(200)]
    hits = sum(covered(run, np.trace(a), rounding(a)) for run in runs)
    print("coverage", hits / 200)
    assert hits >= enough(200, 0.95)
    assert min(run.num_probes for run in runs) >= 10
    signs_ = {np.sign(run.value) for run in runs if run.status == "converged"}
    assert signs_ <= {np.sign(np.trace(a))}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_the_interval_of_the_frobenius_norm_covers_it(name):
    risk, a = problem(name)
    runs = [
        traces.frobenius_norm(risk, seed=seed, tol=0.05, max_hvps=60) for seed in range(200)
    ]
    hits = sum(covered(run, np.linalg.norm(a), rounding(a)) for run in runs)
    print("coverage", hits / 200)
    assert hits >= enough(200, 0.95)
    assert min(run.num_probes for run in runs) >= 10


@pytest.mark.slow
def test_an_interval_that_meets_tol_covers_the_trace_too_r36():
    """The rule stops at a narrow interval, which could favour narrow by luck."""
    risk, a = problem("flat")
    options = {"method": "hutchinson", "tol": 0.02, "confidence": 0.9}
    runs = [sh.trace(risk, seed=seed, **options) for seed in range(200)]
    hits = sum(covered(run, np.trace(a), 0) for run in runs)
    print("coverage", hits / 200)
    assert len({run.num_probes for run in runs}) > 5
    assert all(run.status == "converged" for run in runs)
    assert hits >= enough(200, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("confidence", [0.5, 0.99])
def test_another_confidence_is_kept_too(confidence):
    risk, a = problem("flat")
    runs = [
        sh.trace(risk, confidence=confidence, seed=s, method="hutchinson", tol=1e-9,
                 max_hvps=20)
        for s in range(200)
    ]  # fmt: skip
    hits = sum(covered(run, np.trace(a), 0) for run in runs)
    assert enough(200, confidence) <= hits <= 200 - enough(200, 1 - confidence)


# -- the rule ----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["flat", "decaying", "outliers", "negative"])
def test_a_converged_trace_meets_tol_and_an_unfinished_one_does_not(name, method):
    risk, _ = problem(name)
    for tol, budget in ((0.2, 1000), (1e-2, 200)):
        found = sh.trace(risk, method=method, tol=tol, max_hvps=budget)
        low, high = found.interval
        met = high - low <= 2 * tol * abs(found.value)
        assert met == (found.status == "converged")
        assert found.status in ("converged", "max_hvps")
        assert low <= found.value <= high
        assert found.num_hvps <= budget


@pytest.mark.parametrize("tol", [0.2, 0.01])
@pytest.mark.parametrize("name", ["flat", "outliers", "cancelling"])
def test_a_converged_frobenius_norm_meets_tol_nearly(name, tol):
    """To first order: the interval is that of the square."""
    risk, a = problem(name)
    found = traces.frobenius_norm(risk, tol=tol)
    assert found.status == "converged"
    low, high = found.interval
    assert high - low <= 2 * tol * found.value * (1 + tol**2)
    assert found.settings["tol"] == tol
    assert abs(found.value - np.linalg.norm(a)) <= 4 * found.standard_error


def test_less_tol_takes_more_products():
    risk, _ = problem("flat")
    costs = [traces.frobenius_norm(risk, tol=tol).num_hvps for tol in (0.1, 0.01, 0.003)]
    costs_ = [sh.trace(risk, tol=tol).num_hvps for tol in (0.1, 0.01, 0.003)]
    assert costs == sorted(costs)
    assert costs_ == sorted(costs_)
    assert costs_[-1] > costs_[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [30, 31, 64, 100])
def test_a_budget_of_products_is_never_passed_and_all_are_counted(method, budget):
    risk = fast(symmetric(SPECTRA["cancelling"]), at_once=3)
    found = sh.trace(risk, method=method, tol=1e-9, max_hvps=budget)
    assert found.status == "max_hvps"
    assert risk.made == found.num_hvps <= budget
    assert 10 <= found.num_probes <= found.num_hvps / PRODUCTS_A_PROBE[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_put_to_use_instead_of_wasted(method):
    """A growth that the budget cuts short must not lose what was paid for."""
    risk = fast(symmetric(SPECTRA["cancelling"]))
    found = sh.trace(risk, method=method, tol=1e-9, max_hvps=110)
    left = 110 - found.num_probes * PRODUCTS_A_PROBE[method]
    assert left < 2 * PRODUCTS_A_PROBE[method]


@pytest.mark.parametrize("measure", MEASURES)
def test_counted_products_are_those_made(measure):
    risk = fast(symmetric(SPECTRA["outliers"]), at_once=4)
    found = MEASURES[measure](risk)
    assert found.status == "converged"
    assert risk.made == found.num_hvps


def test_counted_products_of_a_network_are_those_made():
    risk = mlp_risk()
    product, made = risk.product, []
    risk.product = lambda v, name: (made.append(len(v)), product(v, name))[1]
    for measure in MEASURES.values():
        made.clear()
        assert measure(risk, tol=0.3).num_hvps == sum(made)


@pytest.mark.parametrize("measure", ["trace", "frobenius_norm", "diagonal"])
@pytest.mark.parametrize("at", [0.5, 25.5, 31.5, 55.5])
def test_time_stops_a_run_after_the_product_that_passes_it(measure, at, monkeypatch):
    """With a clock that ticks once a product."""
    risk = fast(symmetric(SPECTRA["cancelling"]), at_once=1)
    clock = SimpleNamespace(monotonic=lambda: float(risk.made))
    monkeypatch.setattr(_run, "time", clock)
    found = MEASURES[measure](risk, tol=1e-9, max_seconds=at)
    assert found.status == "max_seconds"
    assert found.num_hvps == found.seconds == math.ceil(at)
    fewest = 1 if at < 1 else {"trace": 30, "frobenius_norm": 21, "diagonal": 21}[measure]
    assert (found.num_probes > 0) == (at > fewest)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_keeps_what_was_earned_r32(method):
    a = symmetric(SPECTRA["cancelling"])
    cost = PRODUCTS_A_PROBE[method]
    risk = interrupted_at(fast(a, at_once=1), 10 * cost + 5)
    found = sh.trace(risk, method=method, tol=1e-9)
    assert found.status == "interrupted"
    assert found.num_hvps == risk.made == 10 * cost + 5
    assert found.num_probes == (15 if method == "hutchinson" else 10)
    budget = sh.trace(fast(a), method=method, tol=1e-9, max_hvps=found.num_probes * cost)
    assert found.value == pytest.approx(budget.value, rel=1e-12)
    assert found.interval == pytest.approx(budget.interval, rel=1e-12)
    with pytest.raises(sh.NotConvergedError, match="Interrupted") as error:
        found.raise_for_status()
    assert error.value.result is found


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("made", [0, 7, 20, 25, 33])
def test_an_interrupt_anywhere_gives_a_result_that_can_be_printed(measure, made):
    risk = interrupted_at(fast(symmetric(SPECTRA["cancelling"]), at_once=1), made)
    found = MEASURES[measure](risk, tol=1e-9)
    assert found.status == "interrupted"
    assert found.num_hvps == made
    assert "interrupted" in str(found)
    json.loads(to_line({"found": found}))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("call", [None, 1, 3])
def test_the_model_and_all_generators_are_as_they_were_r22(measure, call):
    risk = mlp_risk()
    model = risk.model.train()
    state = [p.detach().clone() for p in model.parameters()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    product, calls = risk.product, []

    def failing(v: Tensor, name: str) -> Tensor:
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return product(v, name)

    risk.product = failing
    found = MEASURES[measure](risk)
    assert (found.status == "interrupted") == (call is not None)
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), state, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method):
    options = {"method": method, "max_hvps": 60}
    first, again, other = (sh.trace(mlp_risk(), seed=s, **options) for s in (4, 4, 5))
    same = {"cost": dataclasses.replace(first.cost, seconds=0.0)}
    assert again.num_hvps == first.num_hvps
    assert dataclasses.replace(first, **same) == dataclasses.replace(again, **same)
    assert first.value != other.value


def test_the_diagonal_of_the_same_seed_has_the_same_bits():
    first, again, other = (traces.diagonal(mlp_risk(), seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.standard_errors, again.standard_errors)
    assert not torch.equal(first.values, other.values)


# -- arguments ---------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"tol": 0.0}, r"positive; got 0\.0\. The default is 0\."),
        ({"tol": -0.25}, r"positive; got -0\.25\. The default is 0\."),
        ({"tol": float("nan")}, r"positive; got nan\. The default is 0\."),
        ({"max_hvps": 29}, "at least 30, .*got 29"),
        ({"max_hvps": 0}, "at least 30, .*got 0"),
        ({"max_hvps": -3}, "at least 30, .*got -3"),
        ({"matrix": "fisher"}, "got 'fisher'"),
    ],
)
def test_a_wrong_call_is_refused_with_what_was_got_r8(measure, options, got):
    with pytest.raises(ValueError, match=got) as error:
        MEASURES[measure](fast(torch.eye(5).double()), **options)
    assert f"`{next(iter(options))}` must" in str(error.value)


@pytest.mark.parametrize("measure", ["trace", "frobenius_norm"])
@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 95.0, float("nan")])
def test_a_confidence_that_is_no_probability_is_refused(measure, confidence):
    with pytest.raises(ValueError, match=r"`confidence` must lie in \(0, 1\)") as error:
        MEASURES[measure](fast(torch.eye(5).double()), confidence=confidence)
    assert f"got {confidence}. Pass 0.95." in str(error.value)


@pytest.mark.parametrize("method", ["hutchpp", "Hutchinson", ""])
def test_an_unknown_method_is_refused_with_those_there_are(method):
    with pytest.raises(ValueError, match="`method` must be one of 'hutch") as error:
        sh.trace(fast(torch.eye(5).double()), method=method)
    assert f"got {method!r}" in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_budget_is_that_of_ten_probes(method):
    fewest = 10 * PRODUCTS_A_PROBE[method]
    risk = fast(symmetric(SPECTRA["cancelling"]))
    with pytest.raises(ValueError, match=f"at least {fewest}, .*got {fewest - 1}"):
        sh.trace(risk, method=method, max_hvps=fewest - 1)
    found = sh.trace(risk, method=method, tol=1e-9, max_hvps=fewest)
    assert found.num_probes == 10
    assert found.num_hvps == fewest


def test_the_default_that_an_error_names_is_that_of_the_measure():
    with pytest.raises(ValueError, match=r"The default is 0\.1\."):
        traces.diagonal(fast(torch.eye(5).double()), tol=0)


# -- special Hessians --------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 7, 40])
def test_a_flat_risk_has_trace_zero_and_has_converged_r9(method, n):
    found = sh.trace(quadratic([0.0] * n), method=method)
    assert (found.value, found.standard_error, found.interval) == (0.0, 0.0, (0.0, 0.0))
    assert found.status == "converged"
    assert found.num_probes == 16


def test_a_flat_risk_has_norm_and_diagonal_zero_r9():
    linear = sh.EmpiricalRisk(
        Point(torch.ones(12).double()),
        closure=lambda model, _: model.theta.sum(),
        data=ONE_SAMPLE,
    )
    for risk in (linear, quadratic([0.0] * 40)):
        norm, diagonal = traces.frobenius_norm(risk), traces.diagonal(risk)
        assert (norm.value, norm.standard_error, norm.interval) == (0, 0, (0, 0))
        assert not diagonal.values.any()
        assert diagonal.relative_error == 0.0
        assert norm.status == diagonal.status == "converged"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_trace_that_is_nan_says_so(method, bad):
    found = sh.trace(quadratic([1.0, bad, *[2.0] * 30]), method=method)
    assert found.status == "non_finite"
    assert math.isnan(found.value) or math.isinf(found.value)
    assert "unknown" in str(found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_nan_says_so(bad):
    found = traces.frobenius_norm(quadratic([1.0, bad, *[2.0] * 30]))
    assert found.status == "non_finite"
    assert "unknown" in str(found)


def test_a_diagonal_that_is_nan_says_so():
    found = traces.diagonal(quadratic([1.0, float("nan"), *[2.0] * 30]))
    assert found.status == "non_finite"


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 11, 15])
@pytest.mark.parametrize("method", METHODS)
def test_a_few_parameters_are_no_obstacle(method, n):
    a = symmetric(np.linspace(-0.5, 1, n))
    found = sh.trace(fast(a), method=method, confidence=0.9999)
    assert covered(found, float(a.trace()), 1e-12)
    assert found.interval[1] - found.interval[0] < 10
    norm = traces.frobenius_norm(fast(a), confidence=0.9999)
    assert covered(norm, float(a.norm()), 1e-12)
    diagonal = traces.diagonal(fast(a), tol=0.01)
    error = (diagonal.values - a.diag()).norm() / a.diag().norm()
    assert error <= 4 * diagonal.relative_error + 1e-12


@pytest.mark.parametrize("scale", [2.0**-27, 2.0**27, 1e-8, 1e8])
@pytest.mark.parametrize("method", METHODS)
def test_the_trace_scales_with_the_loss_r7(method, scale):
    for name in ("flat", "negative"):
        a = symmetric(SPECTRA[name])
        plain, scaled = (sh.trace(fast(m), method=method) for m in (a, scale * a))
        exact = 0 if math.frexp(scale)[0] == 0.5 and method != "xtrace" else 1e-9
        assert scaled.num_hvps == plain.num_hvps
        assert scaled.value / scale == pytest.approx(plain.value, rel=exact, abs=0)
        assert [end / scale for end in scaled.interval] == pytest.approx(
            plain.interval, rel=exact, abs=0
        )


@pytest.mark.parametrize("scale", [2.0**-27, 2.0**27, 1e-8, 1e8])
def test_norm_and_diagonal_scale_with_the_loss_r7(scale):
    exact = 0 if math.frexp(scale)[0] == 0.5 else 1e-10
    for name in ("flat", "outliers"):
        a = symmetric(SPECTRA[name])
        plain, scaled = (traces.frobenius_norm(fast(m)) for m in (a, scale * a))
        assert scaled.num_hvps == plain.num_hvps
        assert scaled.value / scale == pytest.approx(plain.value, rel=exact, abs=0)
        plain, scaled = (traces.diagonal(fast(m)) for m in (a, scale * a))
        assert scaled.num_hvps == plain.num_hvps
        difference = (scaled.values / scale - plain.values).norm() / plain.values.norm()
        assert float(difference) <= exact
        assert scaled.relative_error == pytest.approx(plain.relative_error, rel=exact)


def test_a_float32_risk_agrees_with_float64_to_its_rounding():
    a = symmetric(SPECTRA["outliers"])
    for method in METHODS:
        narrow = sh.trace(fast(a.float()), method=method)
        wide = sh.trace(fast(a), method=method)
        assert narrow.value == pytest.approx(wide.value, rel=1e-4)
        assert type(narrow.value) is float
    assert traces.frobenius_norm(fast(a.float())).value == pytest.approx(
        traces.frobenius_norm(fast(a)).value, rel=1e-4
    )
    narrow = traces.diagonal(fast(a.float()))
    assert narrow.values.dtype == narrow.standard_errors.dtype == torch.float32


# -- networks ----------------------------------------------------------------------


def dense(matrix: str) -> np.ndarray:
    """A curvature matrix of `mlp_risk`, from formulas."""
    risk = mlp_risk()
    x, y = mlp_data()

    def logits(theta: Tensor) -> Tensor:
        w1, b1, w2, b2 = theta.split([18, 6, 18, 3])
        return torch.tanh(x @ w1.view(6, 3).T + b1) @ w2.view(3, 6).T + b2

    if matrix == "hessian":
        return mlp_hessian(risk.theta).numpy()
    z = logits(risk.theta)
    jacobian = torch.autograd.functional.jacobian(logits, risk.theta)  # (N, 3, n)
    p = torch.softmax(z, 1)
    if matrix == "gauss_newton":
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        each = jacobian.transpose(1, 2) @ inner @ jacobian
        return each.mean(0).numpy()
    slope = p - torch.eye(3, dtype=torch.float64)[y]
    each = (slope[:, :, None] * jacobian).sum(1).numpy()
    fisher = each.T @ each / len(y)
    if matrix == "gradient_covariance":
        return fisher - np.outer(each.mean(0), each.mean(0))
    return fisher


@cache
def dense_once(matrix: str) -> np.ndarray:
    if matrix == "sampled_fisher":  # of targets that only the library knows
        risk = mlp_risk()
        return risk.product(torch.eye(risk.n).double(), matrix).numpy()
    return dense(matrix)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_the_trace_of_a_network_is_that_of_the_dense_matrix(matrix, method):
    a = dense_once(matrix)
    found = sh.trace(mlp_risk(), method=method, matrix=matrix, confidence=0.999, tol=0.2)
    assert covered(found, np.trace(a), rounding(a))
    assert found.status == "converged"
    assert (found.settings["matrix"], found.settings["method"]) == (matrix, method)
    assert found.quantity == "trace"


@pytest.mark.parametrize("matrix", MATRICES)
def test_norm_and_diagonal_of_a_network_are_those_of_the_dense_matrix(matrix):
    a = dense_once(matrix)
    norm = traces.frobenius_norm(mlp_risk(), matrix=matrix, confidence=0.999)
    assert covered(norm, np.linalg.norm(a), rounding(a))
    assert norm.quantity == "Frobenius norm"
    found = traces.diagonal(mlp_risk(), matrix=matrix, tol=0.05, max_hvps=2000)
    assert found.status == norm.status == "converged"
    error = np.abs(found.values.numpy() - np.diag(a))
    assert np.linalg.norm(error) <= 3 * 0.05 * np.linalg.norm(np.diag(a))
    far = stats.norm.isf(1e-3 / (2 * len(a)))
    assert np.all(error <= far * found.standard_errors.numpy() + rounding(a))


@pytest.mark.parametrize("measure", MEASURES)
def test_several_directions_at_once_give_the_numbers_of_one(measure, monkeypatch):
    several = mlp_risk()
    assert several.prepare().directions_at_once > 1
    monkeypatch.setattr(products, "directions_at_once", lambda *_: 1)
    one = mlp_risk()
    assert one.prepare().directions_at_once == 1
    found, expected = (MEASURES[measure](risk, seed=2) for risk in (several, one))
    assert found.num_hvps == expected.num_hvps
    if measure == "diagonal":
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)
    else:
        assert found.value == pytest.approx(expected.value, rel=1e-12)
        assert found.interval == pytest.approx(expected.interval, rel=1e-9)


# -- the diagonal ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["outliers", "cancelling"])
def test_each_entry_lies_within_two_standard_errors_as_often_as_it_should(name):
    """One entry a run, since those of a run share their probes."""
    risk, a = problem(name)
    runs = [traces.diagonal(risk, tol=1e-9, max_hvps=40, seed=seed) for seed in range(200)]
    assert {run.num_probes for run in runs} == {20}
    hits = 0
    for i, run in enumerate(runs):
        error = abs(float(run.values[i % N]) - a[i % N, i % N])
        hits += error <= 2 * float(run.standard_errors[i % N])
    print("coverage", hits / 200)
    assert hits >= enough(200, 2 * stats.t.cdf(2, 19) - 1)


@pytest.mark.parametrize("tol", [0.1, 0.02])
@pytest.mark.parametrize("name", ["flat", "outliers", "negative"])
def test_the_relative_error_is_that_of_its_definition(name, tol):
    risk, a = problem(name)
    found = traces.diagonal(risk, tol=tol, max_hvps=10_000)
    norms = [float(v.norm()) for v in (found.standard_errors, found.values)]
    assert found.relative_error == pytest.approx(norms[0] / norms[1], rel=1e-12)
    assert found.relative_error <= tol
    assert found.status == "converged"
    error = np.linalg.norm(found.values.numpy() - np.diag(a))
    # The expected square of the error is that of the standard errors.
    assert error <= 2 * norms[0]
    assert found.num_hvps == 20 + found.num_probes


def test_the_diagonal_of_a_low_rank_matrix_is_exact():
    a = symmetric(np.append(np.zeros(N - 6), [5.0, 4.0, -3.0, 2.0, 1.0, 1.0]))
    found = traces.diagonal(fast(a))
    assert found.values.numpy() == pytest.approx(a.diag().numpy(), abs=1e-12)
    assert found.standard_errors.numpy() == pytest.approx(np.zeros(N), abs=1e-12)
    assert found.num_hvps == 30


def test_the_diagonal_by_hand_from_the_same_probes():
    a = symmetric(SPECTRA["outliers"]).numpy()
    found = traces.diagonal(fast(torch.from_numpy(a)), tol=1e-9, max_hvps=30, seed=4)
    q = np.linalg.qr(a @ signs(N, 8, 10))[0]
    rest = np.eye(N) - q @ q.T
    rest = rest @ a @ rest
    z = signs(N, 9, 10)
    samples = np.diag(a - rest)[:, None] + z * (rest @ z)
    assert found.values.numpy() == pytest.approx(samples.mean(1), abs=1e-10)
    assert found.standard_errors.numpy() == pytest.approx(
        samples.std(1, ddof=1) / math.sqrt(10), abs=1e-10
    )


def test_the_frobenius_norm_by_hand_from_the_same_probes():
    a = symmetric(SPECTRA["flat"]).numpy()
    found = traces.frobenius_norm(fast(torch.from_numpy(a)), tol=1e-9, max_hvps=30, seed=4)
    q = np.linalg.qr(a @ signs(N, 8, 10))[0]
    z = signs(N, 9, 10)
    squares = np.sum((a @ (z - q @ (q.T @ z))) ** 2, 0) + np.sum((a @ q) ** 2)
    assert found.value == pytest.approx(math.sqrt(squares.mean()), rel=1e-12)
    error = squares.std(ddof=1) / math.sqrt(10) / (2 * found.value)
    assert found.standard_error == pytest.approx(error, rel=1e-9)


# -- what a person sees ------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_both_texts_are_one_short_line(measure):
    found = MEASURES[measure](fast(symmetric(SPECTRA["outliers"])))
    for text in (str(found), repr(found)):
        assert "\n" not in text
        assert "tensor" not in text
        assert len(text) < 600
    assert f"{found.num_hvps} products" in str(found)
    assert found.status in str(found)


def test_the_line_of_a_trace_is_its_numbers():
    found = sh.trace(fast(symmetric(SPECTRA["outliers"])), confidence=0.9)
    low, high = found.interval
    cost = dataclasses.replace(found.cost, seconds=0.25)
    assert str(dataclasses.replace(found, cost=cost)) == (
        f"trace {number(found.value)} ± {(high - low) / 2:.1g}   (90%: {low:.4g} to "
        f"{high:.4g}, converged; {found.num_hvps} products, 0.2 s)"
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_a_record_is_strict_json_without_big_arrays(measure):
    found = MEASURES[measure](fast(symmetric(SPECTRA["outliers"])))
    line = to_line({"found": found})
    assert "\n" not in line
    assert len(line) < 1000

    def refuse(name: str) -> None:
        raise AssertionError(name)

    plain = json.loads(line, parse_constant=refuse)["found"]
    assert plain["cost"]["products"] == found.num_hvps
    assert plain["status"] == "converged"
    assert not {"values", "standard_errors"} & set(plain)
    if measure != "diagonal":
        assert plain["value"] == found.value
        assert tuple(plain["interval"]) == found.interval


@pytest.mark.parametrize("measure", MEASURES)
def test_a_result_cannot_be_changed(measure):
    found = MEASURES[measure](fast(torch.eye(12).double()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.status = Status.CONVERGED


@pytest.mark.parametrize("measure", MEASURES)
def test_progress_is_shown_on_stderr_only(measure, capsys):
    MEASURES[measure](mlp_risk(), progress=True)
    shown = capsys.readouterr()
    assert "Hessian-vector products" in shown.err
    assert shown.out == ""
    MEASURES[measure](mlp_risk(), progress=False)
    assert capsys.readouterr().err == ""


# -- inexact products --------------------------------------------------------------


def smooth_margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """`MultiMarginLoss(p=2)`, written so that it has a second derivative."""
    rise = (1 - outputs.gather(1, targets[:, None]) + outputs).clamp(min=0) ** 2
    others = 1 - torch.nn.functional.one_hot(targets, outputs.shape[1])
    return (rise * others).sum(1).mean() / outputs.shape[1]


def margin_problem(seed: int, dtype: torch.dtype, width: int = 8, num: int = 60):
    """A ReLU network, and risks without and with a second derivative."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = torch.nn.Linear(5, width), torch.nn.Linear(width, 3)
        model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]).to(dtype)
        data = torch.randn(num, 5).to(dtype), torch.randint(3, (num,))
    losses = torch.nn.MultiMarginLoss(p=2), smooth_margin
    return [sh.EmpiricalRisk(model, loss, data) for loss in losses]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_differenced_products_give_what_exact_ones_give(seed, dtype):
    """Kinks of ReLU units lie between the points that gradients are taken at."""
    differenced, exact = margin_problem(seed, dtype)
    assert differenced.prepare().engine == "differences"
    # Hutch++ has directions of rounding in its sketch where the rank is small.
    for measure in (partial(sh.trace, method="hutchinson"), traces.frobenius_norm):
        found, known = (measure(r, seed=seed, max_hvps=30) for r in (differenced, exact))
        assert abs(found.value - known.value) <= found.product_error
        assert known.product_error < found.product_error < 0.05 * known.value
        low, high = found.interval
        assert high - low >= 2 * found.product_error
    found, known = (
        traces.diagonal(r, seed=seed, max_hvps=30) for r in (differenced, exact)
    )
    apart = (found.values - known.values).double().norm()
    assert apart <= found.standard_errors.double().norm()


@pytest.mark.parametrize("name", MEASURES)
def test_products_that_are_less_exact_than_tol_end_the_measure_at_once(name, monkeypatch):
    rough = fast(symmetric(SPECTRA["outliers"]))
    share = 0.02  # of each product's norm, in a direction that no one knows

    def product_and_error(v: Tensor, matrix: str = "hessian") -> tuple[Tensor, Tensor]:
        products = rough.product(v, matrix)
        errors = share * products.norm(dim=1)
        away = torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator())
        away *= (errors / away.norm(dim=1))[:, None]
        return products + away, errors

    monkeypatch.setattr(rough, "product_and_error", product_and_error)
    found = MEASURES[name](rough, tol=1e-3)
    assert found.status == "inexact"
    assert not found.status.ok
    assert found.num_hvps <= 48  # the first look at a trace
    if name != "diagonal":
        truth = truth_of(name, symmetric(SPECTRA["outliers"]).numpy())
        assert covered(found, truth, 0)


def test_rounding_of_a_sketch_does_not_count_for_probes_that_are_n_times_as_long():
    """Else no trace of a large network in float32 was exact enough for 2 %."""
    spectrum = torch.full((200_000,), 1e-4)
    spectrum[:20] = 5.0
    found = sh.trace(quadratic(spectrum), tol=2e-3, max_hvps=96)
    truth = float(spectrum.double().sum())
    assert found.status == "converged"
    assert covered(found, truth, 0)
    assert found.product_error <= 5e-4 * truth


@pytest.mark.parametrize("method", METHODS)
def test_an_interval_in_float32_is_never_narrower_than_rounding(method):
    """Every estimate is the same, and the trace is a sum of rounded products."""
    spectrum = torch.rand(400, generator=torch.Generator().manual_seed(1))
    truth = float(spectrum.double().sum())
    found = sh.trace(fast(torch.diag(spectrum)), method=method, seed=2)
    assert covered(found, truth, 0)
    assert found.interval[1] > found.interval[0]
    assert found.product_error <= 1e-4 * truth


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_coordinates_without_curvature_do_not_spoil_the_sketch(method, dtype, seed):
    """Layers that are not used: products are 0 there, and so is what rounding leaves."""
    a = torch.zeros(120, 120, dtype=torch.float64)
    bent = normal(generator(seed), 40, 40)
    a[:40, :40] = (bent + bent.T) / 2 + torch.diag(torch.arange(40.0))
    found = sh.trace(fast(a.to(dtype)), method=method, tol=1e-3, seed=seed, max_hvps=600)
    true = float(a.trace())
    margin = 4 * max(found.standard_error, 1e-4 * abs(true))
    assert abs(found.value - true) <= margin
    if method != "hutchinson":
        assert found.status == "converged"
        assert found.standard_error < 1e-3 * abs(true)
