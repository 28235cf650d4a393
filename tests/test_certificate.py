"""What a random start rules out: against sums over known eigenvectors, and counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.problems import symmetric
from scipy.stats import binom, chi2
from torch import Tensor

from sharpness.krylov.certificate import Kernel, hiding, largest, log_limit
from sharpness.krylov.eigenpair_search import Search
from sharpness.krylov.lanczos import Lanczos, christoffel, ritz_pairs, thick

OUTLIERS = np.append(np.linspace(-0.2, 1, 50), [2.0, 2.4, 3.0, 5.0, 7.5])


def kernel_of(lanczos: Lanczos) -> Kernel:
    state = lanczos.state
    pairs = ritz_pairs(state)
    return Kernel(pairs.values, pairs.couplings, state.dropped, state.log_betas)


def normal(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64)


def run(
    matrix: Tensor,
    steps: int,
    *,
    seed: int = 0,
    size: int | None = None,
    which: str = "LA",
    k: int = 3,
) -> Lanczos:
    """`steps` products; with a thick restart whenever the basis holds `size` vectors."""
    lanczos = Lanczos(normal(len(matrix), seed), torch.Generator().manual_seed(seed))
    for _ in range(steps):
        if lanczos.state.m == size:
            lanczos.restart(thick(ritz_pairs(lanczos.state).values, k, which))
        lanczos.absorb(matrix @ lanczos.direction())
    return lanczos


# -- K -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "size", "which"),
    [(1, None, "LA"), (7, None, "LA"), (20, None, "LA")]
    + [(steps, 12, which) for steps in (13, 22, 40) for which in ("LA", "SA", "LM")],
)
def test_k_is_the_sum_over_the_basis_at_every_eigenvalue(steps, size, which):
    """With a part of u in each vector of phi(x) u^T q_1: also after thick restarts."""
    a = symmetric(OUTLIERS)
    lanczos = run(a, steps, size=size, which=which)
    values, vectors = np.linalg.eigh(a.numpy())
    rows = torch.cat([lanczos.state.basis, lanczos.direction()[None]]).numpy()
    start = normal(len(a), 0).numpy()
    part = (start / np.linalg.norm(start)) @ vectors
    expected = ((rows @ vectors) ** 2).sum(0) / part**2
    # At an eigenvalue that is found, K hangs on digits that rounding has taken.
    found = np.append(ritz_pairs(lanczos.state).values, lanczos.state.dropped)
    clear = np.abs(values[:, None] - found).min(1) > 1e-5
    assert clear.sum() > 20
    logs = kernel_of(lanczos).log(values[clear])
    np.testing.assert_allclose(logs, np.log(expected[clear]), atol=1e-6)


def test_without_a_restart_k_is_what_the_recurrence_gives():
    lanczos = run(symmetric(OUTLIERS), 15)
    x = np.random.default_rng(0).uniform(-2, 9, 200)
    expected = [np.log(christoffel(each, lanczos.state.first)) for each in x]
    np.testing.assert_allclose(kernel_of(lanczos).log(x), expected, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-44, 1e-8, 1e37])
def test_k_does_not_depend_on_the_scale(scale):
    a = symmetric(OUTLIERS)
    x = np.linspace(-1, 9, 31)
    plain = kernel_of(run(a, 15)).log(x)
    scaled = kernel_of(run(a * scale, 15)).log(x * scale)
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


def test_an_exhausted_space_leaves_no_place_to_hide():
    lanczos = run(torch.diag(torch.tensor([4.0] * 5 + [1.0] * 5).double()), 2)
    kernel = kernel_of(lanczos)
    assert kernel.exhausted
    assert hiding(kernel, 1e9, (0.0, -np.inf), np.empty(0), np.empty(0)) == ()
    assert largest(kernel, 1e9) == pytest.approx(4, rel=1e-14)


def test_k_is_finite_at_a_ritz_value():
    kernel = kernel_of(run(symmetric(OUTLIERS - 2), 5))  # its residuals are large
    values = kernel.values
    at, beside = kernel.log(values), kernel.log(values + 1e-9)
    np.testing.assert_allclose(at, beside, atol=1e-4)


# -- where a value may hide ----------------------------------------------------------


@pytest.mark.parametrize("steps", range(4, 24, 2))
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_every_point_is_in_an_interval_or_has_k_above_l(steps, which):
    lanczos = run(symmetric(OUTLIERS - 2), steps, seed=steps)
    kernel = kernel_of(lanczos)
    score = {"LA": np.positive, "SA": np.negative, "LM": np.abs}[which]
    centres = kernel.values[np.argsort(-score(kernel.values))][:3]
    halves = 0.01 * np.abs(centres)
    reach = score(centres[-1]) + halves[-1]
    beyond = {
        "LA": (reach, -np.inf),
        "SA": (np.inf, -reach),
        "LM": (reach, -reach),
    }[which]
    limit = log_limit(55.0, 0.05)
    found = hiding(kernel, limit, beyond, centres, halves)
    x = np.linspace(-30, 30, 200_001)
    looked_at = (x > beyond[0]) | (x < beyond[1])
    looked_at &= (np.abs(x[:, None] - centres) > halves).all(1)
    inside = np.zeros(len(x), bool)
    for low, high in found:
        inside |= (low <= x) & (x <= high)
    small = kernel.log(x) <= limit
    assert not (looked_at & small & ~inside).any()
    # An outer approximation, but a close one.
    assert (inside & ~small).sum() <= 0.02 * small.sum() + 60
    assert [*found] == sorted(found)
    assert all(low < high for low, high in found)


def test_a_place_between_two_values_is_seen_though_both_its_ends_are_ruled_out():
    """Both ends of the gap lie close to values, where K is large with the residuals."""
    values = np.array([1.0, 2.0])
    kernel = Kernel(values, np.array([0.3, 0.3]), np.empty(0), 0.0)
    ends, inside = kernel.log(np.array([1.05, 1.95])), np.linspace(1.05, 1.95, 999)
    limit = (min(ends) + kernel.log(inside).min()) / 2
    assert min(ends) > limit
    found = hiding(kernel, limit, (1.05, -np.inf), values, np.array([0.05, 0.05]))
    between = [each for each in found if each[1] < 2]
    assert 1 <= len(between) <= 2
    assert all(1.05 < low < high < 1.95 for low, high in between)


@pytest.mark.parametrize("miss", [0.5, 0.05, 1e-4])
def test_the_largest_is_where_k_is_l(miss):
    kernel = kernel_of(run(symmetric(OUTLIERS), 9))
    limit = log_limit(55.0, miss)
    x = largest(kernel, limit)
    assert x > kernel.values[-1]
    assert kernel.log(np.array([x]))[0] == pytest.approx(limit, abs=1e-6)
    beyond = np.linspace(x, 20 * x, 1000)[1:]
    assert (kernel.log(beyond) > limit).all()


# -- how likely ----------------------------------------------------------------------


@pytest.mark.parametrize("miss", [0.5, 0.05, 1e-4])
def test_the_limit_is_the_quantile_of_chi_square(miss):
    assert log_limit(7.0, miss) == pytest.approx(np.log(7 / chi2.ppf(miss, 1)), rel=1e-12)


@pytest.mark.parametrize("miss", [0.5, 0.1])
def test_k_exceeds_l_at_an_eigenvalue_as_often_as_foretold(miss):
    """Once the eigenvector lies in the space, Bessel's inequality is an equality."""
    a, x, num = torch.diag(torch.from_numpy(OUTLIERS)), OUTLIERS[-1:], 400
    early = late = 0
    for seed in range(num):
        start = normal(len(a), seed)
        limit = log_limit(float(start @ start), miss)
        early += kernel_of(run(a, 2, seed=seed)).log(x)[0] > limit
        late += kernel_of(run(a, 6, seed=seed)).log(x)[0] > limit
    assert early <= late
    assert binom.ppf(1e-3, num, miss) <= late <= binom.ppf(1 - 1e-3, num, miss)


def planted(part: float, miss: float, seed: int) -> bool:
    """Whether a search in float32 finds the top value, of which the start has `part`."""
    n = 2000
    draw = np.random.default_rng(seed)
    spectrum = np.concatenate(
        [[1.03, 1], 0.2 + 0.75 * draw.random(11), 0.05 * draw.random(n - 13) ** 8]
    )
    values = torch.from_numpy(spectrum).float()
    start = normal(n, seed).float()
    start[0] = part
    search = Search(
        start,
        torch.Generator().manual_seed(seed),
        k=1,
        which="LA",
        tol=1e-2,
        miss=miss,
        basis_size=150,
    )
    while not search.is_converged:
        search.absorb(values * search.direction())
    return bool(abs(search.found().values[0] - 1.03) <= 0.0103)


@pytest.mark.parametrize(
    ("miss", "num"),
    [(0.05, 12), (1e-4, 12)]
    + [pytest.param(miss, 200, marks=pytest.mark.slow) for miss in (0.05, 1e-2, 1e-3)],
)
def test_small_overlaps_planted_in_float32_are_found_as_in_theory(miss, num):
    """A part just above the quantile is never overlooked; one far below it always is."""
    quantile = chi2.ppf(miss, 1) ** 0.5
    assert all(planted(1.02 * quantile, miss, seed) for seed in range(num))
    assert not any(planted(0.03 * quantile, miss, seed) for seed in range(num))


def distinct(spectrum: np.ndarray, k: int, tol: float) -> list[float]:
    """c_1, ..., c_k of the theorem, for positive values."""
    chosen: list[float] = []
    for x in np.sort(spectrum)[::-1].tolist():
        if len(chosen) < k and not (chosen and x >= chosen[-1] * (1 - tol) / (1 + tol)):
            chosen.append(x)
    return chosen


@pytest.mark.parametrize("num", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_only_a_start_with_a_part_below_the_quantile_can_miss(num):
    """At a confidence of 1/2 there are many such; the others never do."""
    k, tol, miss, small = 3, 1e-2, 0.5 / 3, 0
    for seed in range(num):
        draw = np.random.default_rng(seed)
        spectrum = np.append(0.2 + 0.8 * draw.random(12), 0.05 * draw.random(500) ** 8)
        start, values = normal(512, seed), torch.from_numpy(spectrum)
        search = Search(
            start,
            torch.Generator().manual_seed(seed),
            k=k,
            which="LA",
            tol=tol,
            miss=miss,
            basis_size=13 if seed % 2 else 150,
        )
        while not search.is_converged:
            search.absorb(values * search.direction())
        found = search.found().values
        c = distinct(spectrum, k, tol)
        parts = [abs(float(start[np.flatnonzero(spectrum == x)[0]])) for x in c]
        if min(parts) >= chi2.ppf(miss, 1) ** 0.5:
            above = [x for x in c if x > (1 + tol) * found[-1] * (1 + 1e-9)]
            assert len(above) < k
            assert all(np.any(np.abs(found - x) <= tol * found) for x in above)
        else:
            small += 1
    assert small > num / 4
