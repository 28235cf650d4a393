"""Spectral density: the quadrature, its bounds, coverage, and how a run can end."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers.problems import (
    directions,
    mlp_data,
    mlp_hessian,
    mlp_risk,
    quadratic,
    random_spectrum,
    symmetric,
)
from scipy import stats
from torch import Tensor

import sharpness as sh
from sharpness import _run
from sharpness._json import to_line
from sharpness._results import number
from sharpness.krylov.lanczos import Lanczos, Tridiagonal
from sharpness.krylov.quadrature import Rule, interval, smoothed, standard_error
from sharpness.measures import spectrum
from sharpness.results import SpectralDensity
from sharpness.risk import products

EPS = float(np.finfo(float).eps)
N = 150
SPECTRA = {
    "outliers": np.append(np.linspace(-0.05, 0.1, N - 4), [0.5, 1.0, 1.4, 2.0]),
    "bulk": np.random.default_rng(0).normal(size=N),
    "decaying": 4 * 0.93 ** np.arange(N),
}
# As in large networks, most are zero: a kink at zero lies on an eigenvalue of much weight.
MOSTLY_ZERO = np.concatenate(
    [np.zeros(N - 60), 2 * 0.9 ** np.arange(45), -0.3 * 0.8 ** np.arange(15)]
)
SEEDS = 200


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


def enough(num: int, share: float) -> int:
    """Hits that a share of `num` cases falls short of once in a thousand times."""
    return int(stats.binom.ppf(1e-3, num, share))


def gaussians(values: np.ndarray, grid: np.ndarray, sigma: float) -> np.ndarray:
    """The density of these eigenvalues, by its definition."""
    z = (grid[:, None] - values) / sigma
    return np.exp(-0.5 * z**2).mean(1) / (sigma * math.sqrt(2 * math.pi))


@cache
def grid_of(name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Some forty points where there is density, the density there, and sigma."""
    values = SPECTRA[name]
    sigma = 0.01 * float(np.ptp(values))
    points = np.linspace(values.min() - 3 * sigma, values.max() + 3 * sigma, 60)
    points = np.append(points, values[-4:] if name == "outliers" else [])
    points = np.sort(points)
    true = gaussians(values, points, sigma)
    seen = true > 1e-6 * true.max()
    return points[seen], true[seen], sigma


def by_blocks(a: np.ndarray, starts: np.ndarray, steps: int) -> list[Tridiagonal]:
    """Lanczos from all starts (b, n) at once, in NumPy."""
    q, basis = starts, np.empty((len(starts), 0, len(a)))
    alphas, betas = [], []
    for _ in range(steps):
        w = q @ a
        alphas.append(np.sum(w * q, 1))
        basis = np.concatenate([basis, q[:, None]], 1)
        for _ in range(2):
            w = w - ((basis @ w[:, :, None])[:, None, :, 0] @ basis)[:, 0]
        betas.append(np.linalg.norm(w, axis=1))
        q = w / betas[-1][:, None]
    return [
        Tridiagonal(*pair)
        for pair in zip(np.transpose(alphas), np.transpose(betas), strict=True)
    ]


def measured_often(
    values: np.ndarray, num_starts: int, num_steps: int, **options: Any
) -> list[SpectralDensity]:
    """The density by many seeds, whose products are made together."""
    a = symmetric(values)
    risk, starts, runs = fast(a), [], []

    def noted(multiply, own, is_over):
        starts.extend(lanczos.direction() for lanczos in own)
        yield [Tridiagonal(np.zeros(1), np.zeros(1)) for _ in own]

    def replayed(multiply, own, is_over):
        multiply._run.step(len(own) * num_steps)
        yield [runs.pop(0) for _ in own]

    options |= {"num_starts": num_starts, "num_steps": num_steps}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectrum, "_lockstep", noted)
        for seed in range(SEEDS):
            sh.spectral_density(risk, seed=seed, **options)
        runs += by_blocks(a.numpy(), torch.stack(starts).numpy(), num_steps)
        patch.setattr(spectrum, "_lockstep", replayed)
        return [sh.spectral_density(risk, seed=s, **options) for s in range(SEEDS)]


@cache
def runs_of(name: str) -> list[SpectralDensity]:
    points, _, sigma = grid_of(name)
    return measured_often(SPECTRA[name], 5, 40, grid=points, sigma=sigma)


# -- the quadrature ----------------------------------------------------------------


def rule_of(
    matrix: Tensor, steps: int, seed: int = 0, start: Tensor | None = None
) -> tuple[Rule, np.ndarray, np.ndarray]:
    """A rule, the eigenvalues, and the start's mass on each."""
    generator = torch.Generator().manual_seed(seed)
    if start is None:
        start = torch.randn(len(matrix), generator=generator, dtype=torch.float64)
    start = start / start.norm()
    run = Lanczos(start, generator)
    while run.state.num_products < steps and not run.state.first.invariant:
        run.absorb(matrix @ run.direction())
    values, vectors = np.linalg.eigh(matrix.numpy())
    return Rule.of(run.state.first), values, (vectors.T @ start.numpy()) ** 2


@pytest.mark.parametrize("m", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_the_rule_has_the_moments_of_the_start_up_to_degree_2m_minus_1(m, seed):
    a = symmetric(np.linspace(-1, 1, 50), seed)
    rule, values, mass = rule_of(a, m, seed)
    assert len(rule.nodes) == m
    for power in range(2 * m):
        expected = mass @ values**power
        assert rule.weights @ rule.nodes**power == pytest.approx(expected, abs=1e-13)
    beyond = rule.weights @ rule.nodes ** (2 * m) - mass @ values ** (2 * m)
    assert beyond < -1e-12  # the first that it lacks: a square, underestimated


@pytest.mark.parametrize("m", [2, 8, 12])
def test_the_coarse_rule_is_one_of_three_quarters_of_the_steps(m):
    a = symmetric(np.linspace(-1, 1, 50))
    rule, values, mass = rule_of(a, m)
    coarse = max(1, 3 * m // 4)
    assert len(rule.coarse_nodes) == coarse
    for power in range(2 * coarse):
        found = rule.coarse_weights @ rule.coarse_nodes**power
        assert found == pytest.approx(mass @ values**power, abs=1e-13)


@pytest.mark.parametrize("case", range(30))
def test_weights_are_a_probability_and_nodes_lie_in_the_spectrum(case):
    a = symmetric(random_spectrum(case), case)
    rule, values, _ = rule_of(a, 12, case)
    slack = 100 * len(a) * EPS * np.abs(values).max()
    assert rule.weights.min() >= 0
    assert rule.weights.sum() == pytest.approx(1, abs=1e-13)
    assert values[0] - slack <= rule.nodes[0]
    assert rule.nodes[-1] <= values[-1] + slack
    assert np.all(np.diff(rule.nodes) >= 0)


def brackets_hold(rule: Rule, values: np.ndarray, mass: np.ndarray, t: float) -> None:
    """Up to rounding, which shifts nodes by eps, and mass by eps over their distance."""
    low, high = rule.mass_above(t)
    scale = float(np.abs(values).max())
    nearly = 1e-6 * scale
    most, least = mass[values > t - nearly].sum(), mass[values > t + nearly].sum()
    distance = max(np.abs(values - t).min(), nearly)
    slack = 100 * len(values) * EPS * (1 + scale / distance)
    assert 0 <= low <= high + 100 * EPS
    assert high <= 1 + 100 * EPS
    assert low <= most + slack
    assert high >= least - slack


@pytest.mark.parametrize("part", range(6))
def test_the_bracket_holds_the_mass_above_any_t(part):
    for case in range(part, 120, 6):
        rng = np.random.default_rng(case)
        a = symmetric(random_spectrum(case), case)
        steps = int(rng.integers(1, len(a) + 2))
        rule, values, mass = rule_of(a, steps, case)
        reach = np.ptp(values) or np.abs(values).max()
        inside = rng.uniform(values[0], values[-1], 6)
        outside = [values[0] - 0.01 * reach, values[-1] + 0.01 * reach]
        far = [values[0] - 1e3 * reach, values[-1] + 1e3 * reach]
        between = (rule.nodes[1:] + rule.nodes[:-1])[:3] / 2
        near = rule.nodes[:2] + 1e-13 * reach
        for t in (*inside, *outside, *far, *between, *near, *rule.nodes[:3], 0.0):
            brackets_hold(rule, values, mass, float(t))


@pytest.mark.parametrize("steps", [1, 3, 10, 25])
def test_the_bracket_at_a_ritz_value_holds(steps):
    a = symmetric(np.random.default_rng(1).normal(size=60))
    rule, values, mass = rule_of(a, steps)
    for t in rule.nodes:
        brackets_hold(rule, values, mass, float(t))
        for off in (1e-16, 1e-14, 1e-12, 1e-8):
            brackets_hold(rule, values, mass, float(t + off))
            brackets_hold(rule, values, mass, float(t - off))


def test_all_mass_lies_above_what_is_far_below():
    rule, _, _ = rule_of(symmetric(SPECTRA["bulk"]), 20)
    for far in (1e3, 1e8, 1e15):
        assert rule.mass_above(-far) == pytest.approx((1.0, 1.0), abs=1e-12)
        assert rule.mass_above(far) == pytest.approx((0.0, 0.0), abs=1e-12)


def test_the_bracket_closes_in_a_gap_and_stays_open_in_a_bulk():
    a = symmetric(np.append(np.linspace(-1, 1, 140), np.linspace(5, 6, 10)))
    rule, values, mass = rule_of(a, 25)
    low, high = rule.mass_above(3.0)
    assert high - low < 1e-8
    assert low == pytest.approx(mass[values > 3].sum(), abs=1e-8)
    low, high = rule.mass_above(0.0)
    assert 0.01 < high - low < 0.5
    widths = []
    for steps in (5, 10, 15, 20, 25):
        low, high = rule_of(a, steps)[0].mass_above(3.0)
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_a_space_that_is_exhausted_gives_the_exact_mass():
    a = symmetric(np.repeat([-2.0, 0.0, 1.0, 4.0], 5))
    rule, values, mass = rule_of(a, 20)
    assert rule.tridiagonal.invariant
    for t in (-3, -1, 0.5, 2, 5):
        low, high = rule.mass_above(t)
        assert low == high == pytest.approx(mass[values > t].sum(), abs=1e-12)


def test_the_smoothed_rule_is_the_sum_of_its_gaussians():
    rule, _, _ = rule_of(symmetric(SPECTRA["bulk"]), 10)
    grid = np.linspace(-3, 3, 7)
    found = smoothed(rule, grid, 0.3, N, moved=0.1)
    kernel = stats.norm.pdf(grid[:, None], rule.nodes, 0.3)
    assert found.density == pytest.approx(kernel @ rule.weights, rel=1e-12)
    assert found.square == pytest.approx(kernel**2 @ rule.weights, rel=1e-12)
    kernel = stats.norm.pdf(grid[:, None], rule.coarse_nodes, 0.3)
    assert found.coarse == pytest.approx(kernel @ rule.coarse_weights, rel=1e-12)
    for moves in directions(50, 10).clamp(-1, 1).numpy():  # any way the nodes may have gone
        kernel = stats.norm.pdf(grid[:, None], rule.nodes + 0.1 * moves, 0.3)
        density = kernel @ rule.weights
        assert np.all((found.least <= density) & (density <= found.most))


@pytest.mark.parametrize("share", [3e-3, 1e-3, 3e-4])
def test_a_sigma_that_the_steps_do_not_resolve_widens_the_band_and_is_named(share):
    """Between the teeth of a comb of Ritz values there is density all the same."""
    values = SPECTRA["bulk"]
    points, sigma = np.linspace(-1.5, 1.5, 200), share * float(np.ptp(values))
    found = sh.spectral_density(
        fast(symmetric(values)), num_starts=3, num_steps=30, sigma=sigma, grid=points
    )
    low, high = found.band
    true = gaussians(values, points, sigma)
    assert np.mean((low <= true) & (true <= high)) > 0.95
    assert found.unresolved > 0.5
    assert f" unresolved at {found.unresolved:.0%} " in str(found)


def test_a_band_is_not_widened_where_the_steps_resolve_sigma():
    values = np.append(np.zeros(N - 3), [1.0, 2.0, 5.0])
    found = sh.spectral_density(fast(symmetric(values)), num_steps=30, sigma=0.01)
    assert found.unresolved == 0
    assert "unresolved" not in str(found)
    gap = (found.grid > 2.5) & (found.grid < 4.5)
    assert found.band[1][gap].max() < 1e-9


# -- intervals ---------------------------------------------------------------------


def simulated(f: np.ndarray, starts: int, num: int = 2000) -> tuple[np.ndarray, ...]:
    """Means over starts of sum f_i z_i^2 and sum f_i^2 z_i^2, z on the unit sphere."""
    rng = np.random.default_rng(len(f) + starts)
    z = rng.standard_normal((num, starts, len(f))) ** 2
    z /= z.sum(2, keepdims=True)
    return (z @ f).mean(1), (z @ f**2).mean(1)


@pytest.mark.parametrize("starts", [1, 5, 10])
@pytest.mark.parametrize("equal", [1, 2, 10, 60])
def test_the_interval_covers_where_some_eigenvalues_are_equal(equal, starts):
    f = np.append(np.full(equal, 3.0), np.zeros(N - equal))
    mean, square = simulated(f, starts)
    low, high = interval(mean, square, f.max(), N, starts, 0.95)
    hits = np.sum((low <= f.mean()) & (f.mean() <= high))
    assert hits >= enough(2000, 0.95)
    assert np.all(low <= high)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_interval_of_one_eigenvalue_is_that_of_chi_square(confidence):
    """A single one far out, which five starts see with five degrees of freedom."""
    f = np.append(np.zeros(N - 1), 7.0)
    mean, square = simulated(f, 5)
    low, high = interval(mean, square, f.max(), N, 5, confidence)
    assert np.all(low <= high)
    hits = np.sum((low <= f.mean()) & (f.mean() <= high))
    assert hits >= enough(2000, confidence)


@pytest.mark.parametrize(
    "f",
    [
        0.9 ** np.arange(N),
        np.linspace(0, 1, N),
        np.append(np.full(N - 1, 0.01), 5.0),
        np.append(np.full(N - 3, 1e-4), [1.0, 2.0, 8.0]),
        np.exp(-0.5 * np.linspace(-8, 8, N) ** 2),
    ],
    ids=["decaying", "linear", "one above a floor", "three", "bell"],
)
@pytest.mark.parametrize("starts", [1, 2, 5, 10])
def test_the_interval_covers_sums_of_unequal_squares(f, starts):
    mean, square = simulated(f, starts)
    low, high = interval(mean, square, f.max(), N, starts, 0.95)
    hits = np.sum((low <= f.mean()) & (f.mean() <= high))
    assert hits >= enough(2000, 0.95)


def test_a_multiple_of_the_identity_needs_no_interval():
    low, high = interval([0.5, 0.0], [0.25, 0.0], [0.5, 0.0], N, 5, 0.95)
    assert low.tolist() == high.tolist() == [0.5, 0.0]


def test_the_standard_error_is_that_of_quadratic_forms_on_the_sphere():
    f = np.linspace(-1, 2, N)
    mean, _ = simulated(f, 4)
    expected = standard_error(f.mean(), np.mean(f**2), N, 4)
    spread = np.std(mean, ddof=1) / expected
    assert abs(spread - 1) < stats.norm.isf(5e-4) / math.sqrt(2 * 2000)


# -- coverage ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_the_band_covers_the_density_at_each_point(name, capsys):
    points, true, _ = grid_of(name)
    bands = np.stack([run.band for run in runs_of(name)])
    hits = np.sum((bands[:, 0] <= true) & (true <= bands[:, 1]), 0)
    print("lowest coverage", hits.min() / SEEDS)
    width = np.median((bands[:, 1] - bands[:, 0]) / true, 0)
    with capsys.disabled():
        print(
            f"\nband ({name}): coverage {hits.min() / SEEDS:.3f} to "
            f"{hits.max() / SEEDS:.3f}, median width {np.median(width):.2f}",
            end="",
        )
    assert len(points) >= 15
    assert hits.min() >= enough(SEEDS, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_bands_are_not_wider_than_they_need_to_be(name):
    """Where the standard error of the truth says so, up to a factor."""
    points, true, sigma = grid_of(name)
    values = SPECTRA[name]
    kernel = stats.norm.pdf(points[:, None], values, sigma)
    error = standard_error(true, np.mean(kernel**2, 1), N, 5)
    bands = np.stack([run.band for run in runs_of(name)])
    width = np.median(bands[:, 1] - bands[:, 0], 0)
    well_seen = error < 0.3 * true
    assert well_seen.sum() >= 3
    assert np.median((width / (2 * 1.96 * error))[well_seen]) < 2


FUNCTIONS = {
    "trace": (lambda run: run.integral(lambda x: x), lambda x: x.sum()),
    "square": (lambda run: run.integral(lambda x: x**2), lambda x: np.sum(x**2)),
    "negative": (
        lambda run: run.negative_mass,
        lambda x: np.maximum(-x, 0).sum() / N,
    ),
    "dimension": (
        lambda run: run.effective_dimension(0.1),
        lambda x: np.sum(np.maximum(x, 0) / (np.maximum(x, 0) + 0.1)),
    ),
    "above 0.2": (lambda run: run.count_above(0.2), lambda x: np.sum(x > 0.2)),
    "above 0": (lambda run: run.count_above(0.003), lambda x: np.sum(x > 0.003)),
    "above 1.2": (lambda run: run.count_above(1.2), lambda x: np.sum(x > 1.2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("quantity", FUNCTIONS)
def test_integrals_cover_their_exact_values(quantity, name):
    measured, exact = FUNCTIONS[quantity]
    true = float(exact(SPECTRA[name]))
    found = [measured(run) for run in runs_of(name)]
    slack = 1e-9 * np.abs(SPECTRA[name]).sum()
    hits = sum(f.interval[0] - slack <= true <= f.interval[1] + slack for f in found)
    print("coverage", hits / SEEDS)
    assert hits >= enough(SEEDS, 0.95)
    assert all(f.interval[0] <= f.interval[1] for f in found)
    mean = np.mean([f.value for f in found])
    off = np.std([f.value for f in found]) / math.sqrt(SEEDS)
    off += np.mean([f.quadrature_error for f in found])
    assert abs(mean - true) <= stats.norm.isf(5e-4) * off + slack


@pytest.mark.parametrize("steps", [16, 24, 40])
def test_the_error_of_few_steps_covers_the_negative_mass_of_each_start(steps):
    """By the difference of two numbers of steps 41, 49 and 91 of 100 were covered."""
    a, rng = symmetric(MOSTLY_ZERO).numpy(), np.random.default_rng(0)
    starts = rng.normal(size=(100, N))
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(a)
    hits = 0
    for start, run in zip(starts, by_blocks(a, starts, steps), strict=True):
        true = np.maximum(-values, 0) @ (vectors.T @ start) ** 2
        found = Rule.of(run).integrals(lambda x: np.maximum(-x, 0))
        hits += abs(found.mean() - true) <= spectrum._swing(found)
    assert hits >= enough(100, 0.95)


@pytest.mark.slow
def test_the_negative_mass_covers_where_most_eigenvalues_are_zero():
    true = np.maximum(-MOSTLY_ZERO, 0).mean()
    found = [run.negative_mass.interval for run in measured_often(MOSTLY_ZERO, 3, 24)]
    assert sum(low <= true <= high for low, high in found) >= enough(SEEDS, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "negative"])
def test_the_trace_covers_where_one_eigenvalue_rules(name):
    values = np.append(np.linspace(-0.01, 0.01, 59), 5.0)
    values = -values if name == "negative" else values
    runs = measured_often(values, 5, 8, grid=2)
    intervals = np.array([run.integral(lambda x: x).interval for run in runs])
    hits = np.sum((intervals[:, 0] <= values.sum()) & (values.sum() <= intervals[:, 1]))
    print("coverage", hits / SEEDS)
    assert hits >= enough(SEEDS, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_the_runs_of_all_seeds_together_are_those_of_one(name):
    points, _, sigma = grid_of(name)
    options = {"num_starts": 5, "num_steps": 40, "grid": points, "sigma": sigma}
    for seed in (0, 7):
        single = sh.spectral_density(fast(symmetric(SPECTRA[name])), seed=seed, **options)
        shared = runs_of(name)[seed]
        assert shared.density == pytest.approx(single.density, rel=1e-6, abs=1e-9)
        top = single.band.max()
        assert shared.band == pytest.approx(single.band, rel=1e-6, abs=1e-9 * top)
        assert shared.num_hvps == single.num_hvps


def test_counts_of_isolated_outliers_are_never_far_off():
    for run in runs_of("outliers")[:20]:
        above = run.count_above(0.3)
        assert above.quadrature_error < 1e-6
        low, high = above.interval
        assert high > 1
        assert low < 12


# -- the density -------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [None, 0.02, 0.3])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_density_integrates_to_one(name, sigma):
    found = sh.spectral_density(fast(symmetric(SPECTRA[name])), sigma=sigma, num_starts=2)
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1, abs=1e-5)
    assert np.all(found.band[0] <= found.band[1])
    assert found.band.min() >= 0
    assert len(found.grid) == 1000
    assert found.status == "completed"


def test_the_default_sigma_is_a_percent_of_the_range():
    found = sh.spectral_density(fast(symmetric(SPECTRA["outliers"])))
    assert found.sigma == pytest.approx(0.01 * np.ptp(SPECTRA["outliers"]), rel=1e-3)
    assert found.ends == pytest.approx((-0.05, 2.0), abs=1e-3)
    assert found.grid[0] == pytest.approx(found.ends[0] - 5 * found.sigma)
    assert found.grid[-1] == pytest.approx(found.ends[1] + 5 * found.sigma)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_steps_that_exhaust_the_space_give_exact_ends_and_counts_in_the_mean(n):
    values = np.linspace(-1, 3, n) if n > 1 else np.array([3.0])
    risk = fast(symmetric(values))
    found = sh.spectral_density(risk, num_starts=6, num_steps=80)
    assert found.num_hvps == risk.made == 6 * n
    assert found.ends == pytest.approx((values[0], values[-1]), abs=1e-10)
    for run in found.rules:
        assert run.nodes == pytest.approx(values, abs=1e-10)
    for value in (found.integral(lambda x: x), found.count_above(0.1)):
        assert value.quadrature_error == 0.0
    everything = found.count_above(-2.0)
    assert everything.interval == pytest.approx((n, n), rel=1e-12)
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [3.0, -0.1, 1e-8, 1 / 3])
def test_a_multiple_of_the_identity_is_one_gaussian(value):
    found = sh.spectral_density(fast(value * torch.eye(30).double()), num_starts=5)
    assert found.sigma == pytest.approx(0.01 * abs(value), rel=1e-6)
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1, abs=1e-5)
    trace = found.integral(lambda x: x)
    assert trace.interval == pytest.approx((30 * value, 30 * value), rel=1e-6)
    assert found.num_hvps == 5


def test_a_flat_risk_has_all_its_density_at_zero_r9():
    found = sh.spectral_density(quadratic([0.0] * 40), num_starts=3)
    assert found.status == "completed"
    assert found.ends == (0.0, 0.0)
    assert found.num_hvps == 3
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1, abs=1e-5)
    assert found.grid[np.argmax(found.density)] == pytest.approx(0, abs=found.sigma / 10)
    zero = found.integral(lambda x: x)
    assert (zero.value, zero.interval) == (0.0, (0.0, 0.0))
    assert found.negative_mass.interval == (0.0, 0.0)
    assert found.effective_dimension(1e-3).value == 0.0
    assert found.count_above(1.0).interval == (0.0, 0.0)
    assert found.count_above(-1.0).interval == (40.0, 40.0)
    assert "\n" not in str(found)


@pytest.mark.parametrize("scale", [2.0**-27, 2.0**27, 1e-8, 1e8])
@pytest.mark.parametrize("name", ["outliers", "bulk"])
def test_everything_scales_with_the_loss_r7(name, scale):
    a = symmetric(SPECTRA[name])
    plain, scaled = (
        sh.spectral_density(fast(m), num_starts=3, num_steps=30, grid=50)
        for m in (a, scale * a)
    )
    # Lanczos without restarts is stable up to here: rounding grows with convergence.
    near = {"rel": 1e-6, "abs": 0}
    assert scaled.num_hvps == plain.num_hvps
    assert scaled.sigma / scale == pytest.approx(plain.sigma, **near)
    assert scaled.grid / scale == pytest.approx(plain.grid, rel=1e-6, abs=1e-9)
    top = plain.density.max()
    assert scaled.density * scale == pytest.approx(plain.density, abs=1e-6 * top)
    assert scaled.band * scale == pytest.approx(plain.band, abs=1e-6 * plain.band.max())
    for quantity in (lambda d: d.integral(lambda x: x), lambda d: d.negative_mass):
        assert quantity(scaled).value / scale == pytest.approx(
            quantity(plain).value, **near
        )
    counts = scaled.count_above(0.3 * scale), plain.count_above(0.3)
    assert counts[0].interval == pytest.approx(counts[1].interval, rel=1e-6)


def test_a_float32_risk_agrees_with_float64():
    a = symmetric(SPECTRA["outliers"])
    narrow = sh.spectral_density(fast(a.float()), num_starts=4)
    wide = sh.spectral_density(fast(a), num_starts=4)
    for measured, _ in FUNCTIONS.values():
        assert measured(narrow).value == pytest.approx(measured(wide).value, abs=2e-2)
    assert narrow.num_hvps == wide.num_hvps == 4 * 40


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
def test_a_network_agrees_with_its_dense_matrix(matrix):
    risk = mlp_risk()
    dense = risk.product(torch.eye(risk.n).double(), matrix).numpy()
    if matrix == "hessian":
        dense = mlp_hessian(risk.theta).numpy()
    values = np.linalg.eigvalsh(dense)
    found = sh.spectral_density(risk, matrix=matrix, num_starts=20, confidence=0.999)
    assert found.settings["matrix"] == matrix
    assert found.ends == pytest.approx((values[0], values[-1]), abs=1e-9)
    for integral, true in (
        (found.integral(lambda x: x), values.sum()),
        (found.integral(lambda x: x**2), np.sum(values**2)),
        (found.count_above(0.1), np.sum(values > 0.1)),
        (found.effective_dimension(0.01), np.sum(values / (values + 0.01))),
    ):
        if matrix == "hessian" and integral == found.effective_dimension(0.01):
            true = np.sum(np.maximum(values, 0) / (np.maximum(values, 0) + 0.01))
        assert integral.interval[0] - 1e-9 <= true <= integral.interval[1] + 1e-9


def test_several_starts_at_once_give_the_numbers_of_one_after_another(monkeypatch):
    several = mlp_risk()
    assert several.prepare().directions_at_once > 1
    monkeypatch.setattr(products, "directions_at_once", lambda *_: 1)
    one = mlp_risk()
    assert one.prepare().directions_at_once == 1
    found, expected = (
        sh.spectral_density(risk, num_starts=10, num_steps=12, grid=60)
        for risk in (several, one)
    )
    assert found.num_hvps == expected.num_hvps == 120
    assert found.density == pytest.approx(expected.density, abs=1e-8 * expected.sigma**-1)
    for a, b in zip(found.rules, expected.rules, strict=True):
        assert a.nodes == pytest.approx(b.nodes, abs=1e-8)


@pytest.mark.parametrize("name", SPECTRA)
def test_steps_end_where_further_ones_change_less_than_the_last_quarter_did(name):
    risk = fast(symmetric(SPECTRA[name]))
    found = sh.spectral_density(risk, num_starts=3)
    options = {"sigma": found.sigma, "grid": found.grid}
    further = sh.spectral_density(risk, num_starts=3, num_steps=80, **options)
    assert found.num_hvps <= 3 * 64 < further.num_hvps == 3 * 80
    of_each = [smoothed(rule, found.grid, found.sigma, N) for rule in found.rules]
    changed = np.abs(found.density - np.mean([each.coarse for each in of_each], 0)).max()
    assert np.abs(found.density - further.density).max() < changed
    assert changed < further.density.max() / 3


def test_steps_go_on_where_the_density_still_changes():
    risk = fast(symmetric(SPECTRA["bulk"]))
    found = sh.spectral_density(risk, num_starts=2, sigma=1e-3)
    assert found.num_hvps == 2 * 80
    assert found.unresolved > 0.5


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_counted_products_are_those_made(at_once):
    """Starts that break down at once and starts that do not."""
    for values, steps in ((SPECTRA["bulk"], 13), (np.repeat([1.0, 2.0, 5.0], 9), 13)):
        risk = fast(symmetric(values), at_once)
        found = sh.spectral_density(risk, num_starts=7, num_steps=steps)
        assert found.num_hvps == risk.made
        assert found.num_starts == len(found.rules) == 7
        assert risk.made == 7 * 13 or len(values) < N


@pytest.mark.parametrize("grid", [2, 50, np.linspace(-1, 1, 33), np.array([0.0])])
def test_the_grid_is_the_one_asked_for(grid):
    found = sh.spectral_density(
        fast(symmetric(SPECTRA["bulk"])), grid=grid, num_starts=2, num_steps=10
    )
    if isinstance(grid, int):
        assert len(found.grid) == grid
    else:
        assert np.array_equal(found.grid, grid)
    assert found.density.shape == found.grid.shape
    assert found.band.shape == (2, len(found.grid))


@pytest.mark.slow
def test_more_starts_and_more_steps_narrow_the_band():
    risk = fast(symmetric(SPECTRA["bulk"]))
    points = np.linspace(-1, 1, 9)
    options = {"grid": points, "sigma": 0.3}
    few = sh.spectral_density(risk, num_starts=3, **options)
    many = sh.spectral_density(risk, num_starts=48, **options)
    ratio = np.ptp(many.band, 0) / np.ptp(few.band, 0)
    assert np.median(ratio) == pytest.approx(1 / 4, rel=0.5)


def test_a_wider_confidence_is_a_wider_band():
    risk = fast(symmetric(SPECTRA["bulk"]))
    bands = [
        sh.spectral_density(risk, num_starts=3, num_steps=20, confidence=c).band
        for c in (0.5, 0.9, 0.99)
    ]
    for narrow, wide in pairwise(bands):
        assert np.all(wide[0] <= narrow[0])
        assert np.all(narrow[1] <= wide[1])


# -- how a run can end -------------------------------------------------------------


@pytest.mark.parametrize("made", [20, 25, 39])
def test_an_interrupt_keeps_the_starts_that_were_completed_r32(made):
    a = symmetric(SPECTRA["outliers"])
    risk = fast(a, at_once=1)
    product = risk.product

    def failing(v: Tensor, name: str) -> Tensor:
        if risk.made == made:
            raise KeyboardInterrupt
        return product(v, name)

    risk.product = failing
    found = sh.spectral_density(risk, num_starts=5, num_steps=10)
    expected = sh.spectral_density(fast(a), num_starts=made // 10, num_steps=10)
    assert found.status == "interrupted"
    assert found.num_starts == made // 10
    assert found.num_hvps == made
    assert found.density == pytest.approx(expected.density, rel=1e-6, abs=1e-9)
    assert found.count_above(0.3).value == pytest.approx(expected.count_above(0.3).value)
    with pytest.raises(sh.NotConvergedError, match="Interrupted"):
        found.raise_for_status()


@pytest.mark.parametrize(("at", "starts"), [(0.5, 0), (9.5, 1), (10.5, 1), (31.5, 3)])
def test_time_keeps_the_starts_that_were_completed(at, starts, monkeypatch):
    """With a clock that ticks once a product."""
    risk = fast(symmetric(SPECTRA["outliers"]), at_once=1)
    clock = SimpleNamespace(monotonic=lambda: float(risk.made))
    monkeypatch.setattr(_run, "time", clock)
    found = sh.spectral_density(risk, num_starts=5, num_steps=10, max_seconds=at)
    assert found.status == "max_seconds"
    assert found.num_starts == starts
    assert found.num_hvps == found.seconds == math.ceil(at)


def test_time_that_ends_with_the_last_start_has_cost_nothing(monkeypatch):
    risk = fast(symmetric(SPECTRA["outliers"]), at_once=1)
    clock = SimpleNamespace(monotonic=lambda: float(risk.made))
    monkeypatch.setattr(_run, "time", clock)
    found = sh.spectral_density(risk, num_starts=5, num_steps=10, max_seconds=49.5)
    assert found.status == "completed"
    assert found.num_starts == 5


@pytest.mark.parametrize("grid", [100, np.linspace(0, 1, 7)])
@pytest.mark.parametrize("sigma", [None, 0.1])
def test_without_a_completed_start_nothing_is_claimed(grid, sigma, tmp_path):
    found = sh.spectral_density(
        fast(symmetric(SPECTRA["bulk"])), max_seconds=0, grid=grid, sigma=sigma
    )
    assert found.status == "max_seconds"
    assert found.num_starts == 0
    assert np.isnan(found.density).all()
    assert np.isnan(found.band).all()
    assert str(found).startswith("negative_mass unknown   (max_seconds; ")
    assert found.negative_mass is None
    json.loads(to_line({"found": found}))
    for refused in (
        lambda: found.integral(lambda x: x),
        lambda: found.count_above(0.0),
        lambda: found.effective_dimension(1.0),
        lambda: found.plot(str(tmp_path / "nothing.png")),
    ):
        with pytest.raises(ValueError, match=r"completed start; got none \(max_seconds"):
            refused()


def test_a_risk_that_is_nan_gives_no_density():
    found = sh.spectral_density(quadratic([1.0, float("nan"), 2.0]), num_starts=2)
    assert found.status == "non_finite"
    assert found.num_starts == 0
    with pytest.raises(sh.NotConvergedError, match="non-finite"):
        found.raise_for_status()


@pytest.mark.parametrize("call", [None, 2])
def test_the_model_and_all_generators_are_as_they_were_r22(call):
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
    found = sh.spectral_density(risk, num_starts=2, num_steps=5)
    assert (found.status == "interrupted") == (call is not None)
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), state, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_the_same_seed_gives_the_same_bits():
    first, again, other = (
        sh.spectral_density(mlp_risk(), seed=seed, num_starts=2, num_steps=9)
        for seed in (4, 4, 5)
    )
    assert np.array_equal(first.density, again.density)
    assert np.array_equal(first.band, again.band)
    assert not np.array_equal(first.density, other.density)


def test_two_results_can_be_compared():
    first, other = (
        sh.spectral_density(mlp_risk(), seed=seed, num_starts=1, num_steps=4)
        for seed in (4, 5)
    )
    assert first == first
    assert first != other


# -- arguments ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"num_starts": 0}, "got 0. Pass 10"),
        ({"num_starts": -1}, "got -1. Pass 10"),
        ({"num_steps": 1}, "got 1. Pass 80"),
        ({"sigma": 0.0}, r"got 0\.0\. Leave it out"),
        ({"sigma": -1.0}, r"got -1\.0\. Leave it out"),
        ({"sigma": float("nan")}, r"got nan\. Leave it out"),
        ({"confidence": 0.0}, r"got 0\.0\. Pass 0\.95"),
        ({"confidence": 95}, r"got 95\. Pass 0\.95"),
        ({"matrix": "fisher"}, "got 'fisher'"),
    ],
)
def test_a_wrong_call_is_refused_with_what_was_got_r8(options, got):
    with pytest.raises(ValueError, match=got) as error:
        sh.spectral_density(mlp_risk(0), **options)
    assert f"`{next(iter(options))}` must" in str(error.value)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    found = runs_of("bulk")[0]
    with pytest.raises(ValueError, match="`ridge` must be positive; got") as error:
        found.effective_dimension(ridge)
    assert f"got {ridge}" in str(error.value)


# -- what a person sees ------------------------------------------------------------


def test_both_texts_are_one_short_line():
    found = runs_of("outliers")[0]
    for text in (str(found), repr(found)):
        assert "\n" not in text
        assert "array" not in text
        assert len(text) < 600
    cost = dataclasses.replace(found.cost, seconds=0.25)
    (low, high), mass = found.ends, found.negative_mass
    least, largest = mass.interval
    assert str(dataclasses.replace(found, cost=cost)) == (
        f"negative_mass {number(mass.value)} ± {(largest - least) / 2:.1g}   (95%: "
        f"{least:.4g} to {largest:.4g}; 5 starts, spectrum from {low:.4g} to {high:.4g}, "
        "completed; 200 products, 0.2 s)"
    )
    count = found.count_above(0.3)
    low, high = count.interval
    assert str(count) == (
        f"{count.value:.4g} ± {count.standard_error:.1g}   (standard error; "
        f"95%: {low:.4g} to {high:.4g})"
    )


def test_a_record_is_strict_json_without_big_arrays():
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = runs_of("outliers")[0]
    line = to_line({"density": found, "count": found.count_above(0.3)})
    assert len(line) < 1200
    plain = json.loads(line, parse_constant=refuse)
    assert plain["density"]["cost"]["products"] == 200
    assert plain["density"]["sigma"] == found.sigma
    assert not {"grid", "density", "band", "rules"} & set(plain["density"])
    assert plain["count"]["value"] == found.count_above(0.3).value


def test_progress_is_shown_on_stderr_only(capsys):
    sh.spectral_density(mlp_risk(), num_starts=2, num_steps=5, progress=True)
    shown = capsys.readouterr()
    assert "Hessian-vector products" in shown.err
    assert shown.out == ""
    sh.spectral_density(mlp_risk(), num_starts=2, num_steps=5, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", SPECTRA)
def test_the_figure_is_a_png_with_something_on_it(name, tmp_path):
    found = sh.spectral_density(fast(symmetric(SPECTRA[name])), num_starts=3)
    path = tmp_path / "deep" / f"{name}.png"
    figure = found.plot(str(path), title="what it is")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "what it is"
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert 0 < low < found.density.max() < high
    assert found.band.max() < high
    left, right = axes.get_xlim()
    assert left <= found.grid[0] < found.grid[-1] <= right
    one = 1 / (found.n * found.sigma * math.sqrt(2 * math.pi))
    assert low < one < high
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"95% band", "density", "one eigenvalue", "eigenvalues seen"}
    drawn = {line.get_label(): line for line in axes.get_lines()}
    seen = set(drawn["eigenvalues seen"].get_xdata())
    assert seen == {node for rule in found.rules for node in rule.nodes}
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape == (570, 1080, 3)  # 7.2 x 3.8 inches at 150 dots
    inked = (image < 0.9).any(2)
    assert 0.01 < inked.mean() < 0.6
    blue = (image[..., 2] > image[..., 0] + 0.1).mean()
    assert blue > 0.005  # the density and its band


def test_a_figure_of_a_flat_risk_can_be_drawn(tmp_path):
    found = sh.spectral_density(quadratic([0.0] * 40), num_starts=3)
    found.plot(str(tmp_path / "flat.png"))
    assert (tmp_path / "flat.png").stat().st_size > 5000


# -- inexact products --------------------------------------------------------------


def inexact(values: np.ndarray, share: float) -> sh.EmpiricalRisk:
    """Products of a matrix whose eigenvalues have all moved, by so much of the largest."""
    shift = share * float(np.abs(values).max())
    risk = fast(symmetric(values))
    product = risk.product

    def product_and_error(v: Tensor, matrix: str = "hessian") -> tuple[Tensor, Tensor]:
        return product(v, matrix) + shift * v, shift * v.norm(dim=1)

    risk.product_and_error = product_and_error
    return risk


@pytest.mark.parametrize("name", SPECTRA)
def test_band_and_integrals_hold_what_inexact_products_have_moved(name):
    points, true, sigma = grid_of(name)
    values = SPECTRA[name]
    found = sh.spectral_density(
        inexact(values, 5e-4), num_starts=5, num_steps=40, grid=points, sigma=sigma
    )
    low, high = found.band
    assert np.mean((low <= true) & (true <= high)) > 0.95
    assert 5e-4 * np.abs(values).max() <= found.product_error
    truths = {
        lambda: found.negative_mass: np.maximum(-values, 0).mean(),
        lambda: found.count_above(0.3): np.sum(values > 0.3),
        lambda: found.integral(np.square): np.sum(values**2),
    }
    for integral, truth in truths.items():
        assert integral().interval[0] <= truth <= integral().interval[1]
    assert found.integral(np.square).product_error > 0


def test_a_density_finer_than_the_products_is_not_claimed():
    risk = inexact(SPECTRA["bulk"], 0.01)
    found = sh.spectral_density(risk, num_starts=2, num_steps=20, sigma=0.01)
    assert found.status == "inexact"
    assert found.product_error > found.sigma
    with pytest.raises(sh.NotConvergedError, match="less exact"):
        found.raise_for_status()


def test_a_density_by_differences_holds_that_of_the_dense_matrix():
    values = np.linalg.eigvalsh(mlp_hessian(mlp_risk().theta).numpy())
    exact = mlp_risk()
    risk = sh.EmpiricalRisk(
        exact.model, torch.nn.CrossEntropyLoss(), mlp_data(), engine="differences"
    )
    found = sh.spectral_density(risk, num_starts=3, num_steps=30, grid=200, sigma=0.01)
    low, high = found.band
    true = gaussians(values, found.grid, found.sigma)
    assert np.mean((low <= true) & (true <= high)) > 0.9
    assert 0 < found.product_error < 1e-3 * np.abs(values).max()
