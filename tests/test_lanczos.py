"""Lanczos: the recurrence, its breakdowns, and what the Ritz values prove."""

from __future__ import annotations

import signal
import sys
import threading
from itertools import pairwise
from types import FrameType

import numpy as np
import pytest
import torch
from helpers.problems import random_spectrum, symmetric
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharpness import _tensors
from sharpness.krylov import basis
from sharpness.krylov.basis import Basis
from sharpness.krylov.lanczos import (
    Lanczos,
    LanczosState,
    RitzPairs,
    meets,
    ritz_pairs,
    thick,
    wanted,
)
from sharpness.risk import memory

SPECTRA = {
    "indefinite": np.linspace(-3, 5, 40),
    "clustered": np.repeat([1.0, 1.0 + 1e-9, 7.0, -2.0], 10),
    "geometric": 0.7 ** np.arange(40),
    "negative": -np.linspace(1, 2, 40),
    "tiny": 1e-8 * np.linspace(-1, 1, 40),
    "huge": 1e8 * np.linspace(-1, 1, 40),
}


def random_start(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


def started(matrix: Tensor, start: Tensor | None = None, seed: int = 0) -> Lanczos:
    start = random_start(len(matrix), seed, matrix.dtype) if start is None else start
    return Lanczos(start, torch.Generator().manual_seed(seed))


def step(lanczos: Lanczos, matrix: Tensor) -> LanczosState:
    lanczos.absorb(matrix @ lanczos.direction())
    return lanczos.state


def run(
    matrix: Tensor, start: Tensor | None = None, steps: int | None = None, seed: int = 0
) -> list[LanczosState]:
    """The states after 1, 2, ... products, to the whole space or `steps`."""
    lanczos, states = started(matrix, start, seed), []
    while not lanczos.is_whole and len(states) != steps:
        states.append(step(lanczos, matrix))
    return states


def best(state: LanczosState, k: int, which: str = "LA") -> RitzPairs:
    pairs = ritz_pairs(state)
    return pairs.at(wanted(pairs.values, k, which))


def diagonals(state: LanczosState) -> tuple[np.ndarray, np.ndarray]:
    return np.diag(state.projected), np.diag(state.projected, 1)


def tolerance(dtype: torch.dtype) -> float:
    return 10 * torch.finfo(dtype).eps ** 0.5


def rounding(matrix: Tensor) -> float:
    """What a dense eigenvalue in float64 may be off by."""
    norm = float(torch.linalg.matrix_norm(matrix.double(), 2))
    return 10 * len(matrix) * np.finfo(float).eps * norm


# -- the recurrence ----------------------------------------------------------------


def identity_defect(matrix: Tensor, state: LanczosState, following: Tensor) -> float:
    """|| A Q^T - Q^T T - q b^T || in float64."""
    q, t, b = state.basis.double(), state.projected, state.coupling
    left = matrix.double() @ q.T - q.T @ torch.from_numpy(t)
    return float((left - torch.outer(following.double(), torch.from_numpy(b))).norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_lanczos_identity_holds_after_every_step(name, dtype):
    a = symmetric(SPECTRA[name], dtype=dtype)
    norm = float(torch.linalg.matrix_norm(a.double(), 2))
    states = run(a)
    assert len(states) == len(a)
    for state, following in pairwise(states):
        error = identity_defect(a, state, following.basis[-1])
        assert error <= tolerance(dtype) * norm
    assert not states[-1].coupling.any()
    zero = torch.zeros(len(a))
    assert identity_defect(a, states[-1], zero) <= tolerance(dtype) * norm


def test_without_a_restart_t_is_tridiagonal_and_couples_by_its_last_row_alone():
    a = symmetric(SPECTRA["indefinite"])
    for m, state in enumerate(run(a, steps=30), 1):
        alphas, betas = diagonals(state)
        plain = np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
        assert np.array_equal(state.projected, plain)
        assert np.array_equal(state.projected, state.projected.T)
        assert np.flatnonzero(state.coupling).tolist() == [m - 1]
        assert np.array_equal(state.first.alphas, alphas)
        assert np.array_equal(state.first.betas, [*betas, state.coupling[-1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_basis_is_orthonormal_to_the_last_step(name, dtype):
    a = symmetric(SPECTRA[name], dtype=dtype)
    q = run(a)[-1].basis.double()
    assert q.shape == a.shape
    gram = q @ q.T - torch.eye(len(a), dtype=torch.float64)
    assert float(gram.abs().max()) <= tolerance(dtype)


def test_eighty_steps_in_float32_stay_orthogonal():
    a = symmetric(np.append(np.linspace(0, 1, 395), [2, 3, 5, 10, 20]))
    q = run(a.float(), steps=80)[-1].basis.double()
    overlap = q @ q.T - torch.eye(80, dtype=torch.float64)
    assert float(overlap.abs().max()) < 5e-6


def test_a_product_that_is_all_but_inside_the_space_leaves_an_orthogonal_direction():
    """One pass of Gram-Schmidt leaves eps times what it takes away: here 1e-2."""
    a = symmetric(SPECTRA["indefinite"], dtype=torch.float32)
    lanczos = started(a)
    for _ in range(5):
        step(lanczos, a)
    asymmetric = 1e5 * lanczos.state.basis[0]
    lanczos.absorb(a @ lanczos.direction() + asymmetric)
    rows = torch.cat([lanczos.state.basis, lanczos.direction()[None]]).double()
    gram = rows @ rows.T - torch.eye(7, dtype=torch.float64)
    assert float(gram.abs().max()) <= 100 * torch.finfo(torch.float32).eps
    assert lanczos.state.noise >= 1e5


def test_each_state_costs_one_product_and_there_are_n_of_them():
    a = symmetric(SPECTRA["indefinite"])
    states = run(a)
    for m, state in enumerate(states, 1):
        assert state.num_products == m == state.m == len(state.basis)
        assert state.projected.shape == (m, m)
    assert len(states) == 40


def test_a_direction_stays_the_same_until_its_product_is_in():
    a = torch.diag(torch.ones(9).double())
    lanczos = started(a)
    for _ in range(9):  # after each product a random start
        first = lanczos.direction().clone()
        assert torch.equal(lanczos.direction(), first)
        assert float(first.norm()) == pytest.approx(1, rel=1e-14)
        step(lanczos, a)
    assert lanczos.is_whole


def test_the_product_is_left_as_it_was():
    a = symmetric(SPECTRA["indefinite"])
    lanczos = started(a)
    for _ in range(5):
        product = a @ lanczos.direction()
        kept = product.clone()
        lanczos.absorb(product)
        assert torch.equal(product, kept)


def test_later_steps_leave_earlier_states_as_they_were():
    a = symmetric(SPECTRA["indefinite"])
    lanczos = started(a)
    for _ in range(10):
        early = step(lanczos, a)
    kept = early.basis.clone(), early.projected.copy(), early.coupling.copy()
    while not lanczos.is_whole:
        step(lanczos, a)
    assert torch.equal(early.basis, kept[0])
    assert np.array_equal(early.projected, kept[1])
    assert np.array_equal(early.coupling, kept[2])
    assert early.basis.shape == (10, 40)


@pytest.mark.parametrize("length", [1e-30, 1e-3, 1e30])
def test_the_length_of_the_start_does_not_matter(length):
    a, start = symmetric(SPECTRA["indefinite"]), random_start(40)
    plain, scaled = run(a, start, 12)[-1], run(a, start * length, 12)[-1]
    np.testing.assert_allclose(scaled.projected, plain.projected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(scaled.coupling, plain.coupling, rtol=1e-10)


# -- breakdown ---------------------------------------------------------------------


def test_a_start_on_an_eigenvector_goes_on_elsewhere_until_all_is_found():
    spectrum = torch.linspace(-2, 7, 10, dtype=torch.float64)
    start = torch.eye(10, dtype=torch.float64)[3] * 4
    states = run(torch.diag(spectrum), start)
    assert states[0].invariant
    assert states[0].projected.tolist() == [[float(spectrum[3])]]
    assert [s.num_random for s in states[:2]] == [0, 1]
    assert states[1].newest == 1
    values = ritz_pairs(states[-1]).values
    assert values == pytest.approx(spectrum.tolist(), rel=1e-13, abs=1e-13)


def test_an_exhausted_krylov_space_is_seen_as_invariant():
    a = torch.diag(torch.tensor([4.0] * 5 + [1.0] * 5 + [-3.0] * 5).double())
    states = run(a)
    assert [s.invariant for s in states[:4]] == [False, False, True, False]
    assert [s.num_random for s in states[:4]] == [0, 0, 0, 1]
    assert [s.newest for s in states[:4]] == [0, 0, 0, 3]
    assert ritz_pairs(states[2]).values == pytest.approx([-3, 1, 4], rel=1e-13)
    assert all(s.first.invariant and len(s.first.alphas) == 3 for s in states[2:])


@pytest.mark.parametrize(
    "spectrum",
    [
        [3.0],
        [0.0] * 6,
        [2.0] * 6,
        [5.0, 5.0, 5.0, 1.0, 1.0, 0.5],
        [-4.0, -3.0, -3.0, -1e-6],
        [1e-8, 2e-8, 2e-8, -1e-8],
        [1e8, -2e8, -2e8, 3.0],
        [1.0, 1.0 + 1e-12, 1.0 - 1e-12, 2.0],
    ],
)
def test_the_whole_space_shows_every_copy_of_every_eigenvalue(spectrum):
    a = symmetric(spectrum)
    state = run(a)[-1]
    pairs = ritz_pairs(state)
    true = np.linalg.eigvalsh(a.numpy())
    assert np.all(np.abs(pairs.values - true) <= pairs.bounds + rounding(a))
    assert np.all(pairs.bounds <= rounding(a))


def test_the_zero_matrix_gives_zeros_and_nothing_else():
    states = run(torch.zeros(5, 5, dtype=torch.float64))
    assert len(states) == 5
    assert all(s.invariant and not s.projected.any() for s in states)
    assert states[-1].noise == 0.0
    gram = states[-1].basis @ states[-1].basis.T
    torch.testing.assert_close(gram, torch.eye(5).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps", [0, 3, 17])
def test_a_product_that_is_not_finite_is_refused_and_the_state_stays(bad, steps):
    a = symmetric(SPECTRA["indefinite"])
    lanczos = started(a)
    for _ in range(steps):
        step(lanczos, a)
    before, rows = lanczos.state, lanczos.state.basis.clone()
    product = a @ lanczos.direction()
    product[7] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos.absorb(product)
    assert lanczos.state is before
    assert torch.equal(lanczos.state.basis, rows)
    again = run(a, steps=steps + 1)[-1]  # and the run can go on
    assert np.array_equal(step(lanczos, a).projected, again.projected)


# -- what the Ritz values prove ----------------------------------------------------


def test_ritz_pairs_are_the_eigenpairs_of_the_projected_matrix():
    a = symmetric(SPECTRA["indefinite"])
    state = run(a, steps=12)[-1]
    q = state.basis
    true = torch.linalg.eigvalsh(q @ a @ q.T).numpy()
    pairs = ritz_pairs(state)
    assert pairs.values == pytest.approx(true, rel=1e-12, abs=1e-13)
    assert np.all(np.diff(pairs.values) > 0)
    for value, residual, row in zip(
        pairs.values, pairs.residuals, pairs.coefficients, strict=True
    ):
        v = torch.from_numpy(row) @ q
        assert float(v.norm()) == pytest.approx(1, rel=1e-12)
        assert float((a @ v - value * v).norm()) == pytest.approx(residual, abs=1e-12)


def test_some_of_the_pairs_come_in_the_order_asked_for():
    pairs = ritz_pairs(run(symmetric(SPECTRA["indefinite"]), steps=12)[-1])
    some = pairs.at(np.array([7, 2]))
    for name in ("values", "residuals", "bounds", "coefficients"):
        every = getattr(pairs, name)
        assert np.array_equal(getattr(some, name), np.stack([every[7], every[2]]))


@pytest.mark.parametrize(
    ("which", "k", "expected"),
    [
        ("LA", 2, [5, 3]),
        ("SA", 2, [-4, -6]),
        ("LM", 3, [5, -4, -6]),
        ("LM", 1, [-6]),
        ("BE", 1, [5]),
        ("BE", 2, [5, -6]),
        ("BE", 3, [5, 3, -6]),
        ("BE", 4, [5, 3, -4, -6]),
        ("LA", 99, [5, 3, 1, -4, -6]),
        ("SA", 99, [5, 3, 1, -4, -6]),
        ("LM", 99, [5, 3, 1, -4, -6]),
        ("BE", 99, [5, 3, 1, -4, -6]),
        ("BE", 8, [5, 3, 1, -4, -6]),
    ],
)
def test_what_is_wanted_stands_in_descending_order(which, k, expected):
    theta = np.array([-6.0, -4.0, 1.0, 3.0, 5.0])
    assert theta[wanted(theta, k, which)].tolist() == expected


@pytest.mark.parametrize(
    "which",
    ["LA", "SA", "LM", "BE"],
)
def test_a_repeated_value_is_wanted_as_often_as_it_stands_there(which):
    assert len(wanted(np.zeros(5), 3, which)) == 3


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_a_thick_restart_keeps_what_is_wanted_and_half_of_the_rest(which):
    theta = np.sort(np.random.default_rng(0).normal(size=41))
    kept = thick(theta, 7, which)
    assert len(kept) == len(set(kept)) == 7 + 17
    assert {*wanted(theta, 7, which)} <= {*kept}
    for m in range(8, 12):  # there is always room for another vector
        assert 7 <= len(thick(theta[:m], 7, which)) < m


def test_fewer_steps_than_wanted_values_give_what_there_is():
    state = run(symmetric(SPECTRA["indefinite"]), steps=3)[-1]
    assert len(ritz_pairs(state).values) == 3
    assert len(best(state, 7).values) == 3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_an_eigenvalue_lies_within_the_residual_of_every_ritz_value(part):
    for case in range(part, 240, 6):
        a = symmetric(random_spectrum(case), seed=case)
        true = np.linalg.eigvalsh(a.numpy())
        for state in run(a, seed=case):
            pairs = ritz_pairs(state)
            nearest = np.abs(pairs.values[:, None] - true).min(1)
            proven = pairs.residuals + state.noise + rounding(a)
            assert np.all(nearest <= proven), f"case {case}"


@pytest.mark.parametrize("part", range(6))
def test_an_error_bound_is_never_wider_than_its_residual(part):
    for case in range(part, 60, 6):
        for state in run(symmetric(random_spectrum(case), seed=case), seed=case):
            pairs = ritz_pairs(state)
            assert np.all(pairs.bounds <= pairs.residuals + state.noise)


def test_a_single_ritz_value_is_no_better_than_its_residual():
    state = run(symmetric(SPECTRA["indefinite"]), steps=1)[0]
    pairs = ritz_pairs(state)
    assert pairs.bounds == pytest.approx(pairs.residuals + state.noise, rel=1e-15)


def test_a_separated_value_is_known_to_its_residual_squared_over_the_gap():
    a = symmetric(np.append(np.linspace(0, 1, 60), [10.0]))
    state = run(a, steps=6)[-1]
    pairs = best(state, 1)
    assert 1e-12 < pairs.residuals[0] < 0.1
    assert pairs.bounds[0] <= pairs.residuals[0] ** 2 / 8 + state.noise
    assert abs(pairs.values[0] - 10) <= pairs.bounds[0] + rounding(a)


# -- when to stop ------------------------------------------------------------------


def test_the_bounds_decide_when_to_stop():
    a = symmetric(np.append(np.linspace(0, 1, 60), [2.0, 3.0, 10.0]))
    for tol in (1e-2, 1e-5, 1e-8):
        states = run(a)
        first = next(m for m, s in enumerate(states, 1) if meets(s, 2, tol))
        pairs = best(states[first - 1], 2)
        assert np.all(pairs.bounds <= tol * pairs.values)
        assert pairs.values == pytest.approx([10, 3], rel=tol)
        assert first < len(a)


def test_a_space_invariant_from_its_first_start_is_not_yet_enough():
    a = torch.diag(torch.linspace(1, 9, 9, dtype=torch.float64))
    start = torch.eye(9, dtype=torch.float64)[2]
    first = run(a, start)[0]
    assert first.invariant
    assert not meets(first, 1, 1e-2)


def test_a_next_interval_that_reaches_higher_forbids_stopping():
    """The start is all but the eigenvector of 10, and 12 has hardly shown itself yet."""
    bulk = np.append(np.linspace(9.3, 9.6, 48), np.linspace(-41, -39, 10))
    spectrum = torch.tensor([12.0, 10.0, *bulk], dtype=torch.float64)
    start = 1e-6 * random_start(60)
    start[1] = 1.0
    state = run(torch.diag(spectrum), start, steps=3)[-1]
    *_, rest, top = range(state.m)
    pairs = ritz_pairs(state)
    assert pairs.values[top] == pytest.approx(10, abs=1e-6)
    reach = pairs.values[rest] + pairs.residuals[rest]
    assert pairs.bounds[top] <= 0.01 * pairs.values[top] < reach - 10
    assert not meets(state, 1, 0.01)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_the_bounds_and_the_next_interval_decide_and_nothing_else_does(which):
    sign = {"LA": np.positive, "SA": np.negative, "LM": np.abs}[which]
    answers = []
    for case in range(0, 60, 3):
        a = symmetric(random_spectrum(case), seed=case)
        for state in run(a, seed=case)[:-1]:
            pairs, k, tol = ritz_pairs(state), 2, 10.0 ** -(case % 7)
            if state.num_random or state.m <= k or state.invariant:
                continue
            order = sorted(range(state.m), key=lambda i: -sign(pairs.values)[i])
            sizes, zero = np.abs(pairs.values), 2 * state.noise
            allowed = np.where(sizes > zero, tol * sizes, zero)
            good = all(pairs.bounds[i] <= allowed[i] for i in order[:k])
            reach = sign(pairs.values)[order[k]] + pairs.residuals[order[k]]
            good &= bool(reach <= sign(pairs.values)[order[k - 1]] + allowed[order[k - 1]])
            assert meets(state, k, tol, which) == good, f"case {case}"
            answers.append(good)
    assert {*answers} == {True, False}


def test_both_ends_are_met_where_each_of_them_is():
    """k = 3: two at the top, one at the bottom."""
    a = symmetric(np.concatenate([np.linspace(-1, 1, 50), [-8.0, 3.0, 9.0]]))
    met = []
    for state in run(a, steps=30):
        both = meets(state, 3, 1e-6, "BE")
        assert both == (meets(state, 2, 1e-6, "LA") and meets(state, 1, 1e-6, "SA"))
        met.append(both)
    assert not met[3]
    assert met[-1]


def test_fewer_values_than_wanted_are_not_enough():
    a = symmetric(np.append(np.linspace(0, 1, 60), [9.9, 10.0]))
    assert [meets(s, 4, 1e3) for s in run(a, steps=4)] == [False, False, False, True]


# -- noise -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_symmetric_matrix_shows_only_rounding_as_noise(dtype):
    a = symmetric(SPECTRA["indefinite"], dtype=dtype)
    noise = run(a)[-1].noise
    eps = torch.finfo(dtype).eps
    assert eps <= noise <= 40 * eps * 5  # n eps ||A||


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3])
def test_noise_is_what_asymmetry_leaves_off_the_diagonals(size):
    a = symmetric(SPECTRA["indefinite"])
    skew = torch.randn(40, 40, generator=torch.Generator().manual_seed(7)).double()
    skew = size * (skew - skew.T) / float((skew - skew.T).norm())
    for state in run(a + skew)[4::5]:
        q = state.basis
        upper = torch.triu(q @ (a + skew) @ q.T - torch.from_numpy(state.projected), 1)
        expected = 2**0.5 * float(upper.norm())
        assert state.noise == pytest.approx(expected, rel=1e-4)
        assert state.noise > 0.1 * size * (len(q) / 40)


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3])
def test_noise_bounds_what_asymmetry_does_to_the_eigenvalues(size):
    a = symmetric(SPECTRA["indefinite"])
    skew = torch.randn(40, 40, generator=torch.Generator().manual_seed(8)).double()
    state = run(a + size * (skew - skew.T))[-1]
    true = torch.linalg.eigvalsh(a).numpy()
    error = np.abs(ritz_pairs(state).values - true)
    assert error.max() <= state.noise
    assert error.max() > 0


# -- thick restarts ----------------------------------------------------------------


def restarted(
    matrix: Tensor, *, size: int = 14, which: str = "LA", steps: int = 100, seed: int = 0
) -> tuple[Lanczos, int]:
    """A run whose basis is shrunk whenever it holds `size` vectors, and how often."""
    lanczos, restarts = started(matrix, seed=seed), 0
    for _ in range(steps):
        if lanczos.state.m == size:
            values = ritz_pairs(lanczos.state).values
            lanczos.restart(thick(values, 4, which))
            restarts += 1
        step(lanczos, matrix)
    return lanczos, restarts


def shrinks(lanczos: Lanczos) -> None:
    lanczos.restart(np.array([9, 8, 0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("name", SPECTRA)
def test_thick_restarts_keep_the_identity_and_the_basis_orthonormal(name, which, dtype):
    a = symmetric(SPECTRA[name], dtype=dtype)
    norm = float(torch.linalg.matrix_norm(a.double(), 2))
    lanczos, restarts = restarted(a, which=which)
    assert restarts >= 5
    state, eps = lanczos.state, torch.finfo(dtype).eps
    error = identity_defect(a, state, lanczos.direction())
    rounded = len(a) * eps * norm  # n eps ||A||: what one product may be off by
    assert error <= state.num_products * rounded
    assert state.noise <= state.num_products * rounded
    rows = torch.cat([state.basis, lanczos.direction()[None]]).double()
    gram = rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)
    assert float(gram.abs().max()) <= 100 * eps
    assert np.array_equal(state.projected, state.projected.T)
    assert state.num_products == 100


def test_a_restart_keeps_the_ritz_pairs_it_was_told_to():
    a = symmetric(SPECTRA["indefinite"])
    lanczos = started(a)
    for _ in range(14):
        step(lanczos, a)
    before, direction = ritz_pairs(lanczos.state), lanczos.direction().clone()
    vectors = torch.from_numpy(before.coefficients) @ lanczos.state.basis
    kept = np.array([13, 12, 11, 5, 0])
    lanczos.restart(kept)
    state = lanczos.state
    assert torch.equal(lanczos.direction(), direction)
    assert np.array_equal(state.projected, np.diag(before.values[kept]))
    torch.testing.assert_close(state.basis, vectors[kept], rtol=0, atol=1e-14)
    np.testing.assert_allclose(
        np.abs(state.coupling), before.residuals[kept], rtol=1e-13, atol=1e-18
    )
    assert (state.m, state.newest, state.num_products) == (5, 5, 14)
    assert identity_defect(a, state, direction) <= 1e-13


def test_the_step_after_a_restart_is_no_noise():
    """The new vector overlaps with all rows; the coupling says by how much."""
    a = symmetric(SPECTRA["indefinite"])
    lanczos, restarts = restarted(a, steps=14 * 5)
    assert restarts > 5
    assert lanczos.state.noise <= 100 * np.finfo(float).eps * 5


def test_a_restart_does_not_lose_what_asymmetry_has_left():
    a = symmetric(SPECTRA["indefinite"])
    skew = torch.randn(40, 40, generator=torch.Generator().manual_seed(7)).double()
    skew = 1e-6 * (skew - skew.T) / float((skew - skew.T).norm())
    lanczos, noise = started(a + skew), 0.0
    for _ in range(60):
        if lanczos.state.m == 14:
            lanczos.restart(thick(ritz_pairs(lanczos.state).values, 4, "LA"))
        state = step(lanczos, a + skew)
        q = state.basis
        beside = q @ (a + skew) @ q.T - torch.from_numpy(state.projected)
        assert float(beside.norm()) <= state.noise * (1 + 1e-6)
        assert state.noise >= noise
        noise = state.noise
    assert 1e-7 < noise < 1e-5


def test_what_the_first_steps_say_stops_at_the_first_restart():
    a = symmetric(SPECTRA["indefinite"])
    plain = run(a, steps=14)[-1]
    lanczos, _ = restarted(a, steps=40)
    first = lanczos.state.first
    assert np.array_equal(first.alphas, np.diag(plain.projected))
    assert np.array_equal(first.betas, [*np.diag(plain.projected, 1), plain.coupling[-1]])
    nodes, weights = first.nodes_and_weights()
    dense, vectors = np.linalg.eigh(plain.projected)
    assert nodes == pytest.approx(dense, rel=1e-12, abs=1e-12)
    assert weights == pytest.approx(vectors[0] ** 2, abs=1e-13)


def test_an_invariant_space_can_be_restarted_and_left():
    a = torch.diag(torch.tensor([4.0] * 5 + [1.0] * 5 + [-3.0] * 5).double())
    lanczos = started(a)
    for _ in range(3):
        step(lanczos, a)
    assert lanczos.state.invariant
    lanczos.restart(np.array([2, 1]))
    assert lanczos.state.invariant
    state = step(lanczos, a)
    assert state.num_random == 1
    assert (state.m, state.newest) == (3, 2)
    assert identity_defect(a, state, lanczos.direction()) <= 1e-14
    rows = state.basis @ state.basis.T
    torch.testing.assert_close(rows, torch.eye(3).double(), rtol=0, atol=1e-14)


def test_restarts_find_the_values_that_one_long_run_finds():
    a = symmetric(np.concatenate([np.linspace(0, 1, 195), [2.0, 2.5, 3.0, 4.0, 9.0]]))
    lanczos, restarts = restarted(a, size=16, steps=90)
    assert restarts > 5
    pairs = best(lanczos.state, 4)
    assert np.all(np.abs(pairs.values - [9, 4, 3, 2.5]) <= pairs.bounds + rounding(a))
    assert pairs.bounds.max() < 1e-6


# -- interrupts --------------------------------------------------------------------


class CtrlC:
    """Ctrl-C as the `number`-th line of the library in the block is about to run."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __enter__(self) -> CtrlC:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: object):
        if "krylov" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self._trace


def at_every_line(act, check) -> int:
    """Interrupt `act(lanczos)` at each of its lines; how many there are."""
    a = symmetric(SPECTRA["indefinite"])
    for number in range(1, 1000):
        lanczos = started(a)
        for _ in range(10):
            step(lanczos, a)
        product = a @ lanczos.direction()
        arguments = (lanczos, product) if act is Lanczos.absorb else (lanczos,)
        ctrl_c = CtrlC(number)
        handler = signal.getsignal(signal.SIGINT)
        try:
            with ctrl_c:
                act(*arguments)
        except KeyboardInterrupt:
            assert ctrl_c.left <= 0
        else:
            assert ctrl_c.left > 0
            return number - 1
        assert signal.getsignal(signal.SIGINT) is handler
        check(a, lanczos)
    raise AssertionError("no end")


def test_an_interrupt_anywhere_in_a_step_leaves_the_state_whole():
    whole = run(symmetric(SPECTRA["indefinite"]), steps=11)[-2:]

    def check(a: Tensor, lanczos: Lanczos) -> None:
        state = lanczos.state
        expected = whole[state.m - 10]
        assert np.array_equal(state.projected, expected.projected)
        assert np.array_equal(state.coupling, expected.coupling)
        assert torch.equal(state.basis, expected.basis)
        assert (state.num_products, state.noise) == (state.m, expected.noise)

    assert at_every_line(Lanczos.absorb, check) > 40


def test_an_interrupt_anywhere_in_a_restart_leaves_the_state_whole():
    sizes = []

    def check(a: Tensor, lanczos: Lanczos) -> None:
        state = lanczos.state
        sizes.append(state.m)
        assert identity_defect(a, state, lanczos.direction()) <= 1e-13
        gram = state.basis @ state.basis.T
        assert float((gram - torch.eye(state.m)).abs().max()) < 1e-14

    assert at_every_line(shrinks, check) > 20
    assert {*sizes} == {10, 3}


@pytest.mark.parametrize("name", ["subtract_last", "subtract", "put"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_in_a_method_of_the_basis_leaves_the_last_state(
    name, call, late, monkeypatch
):
    a = symmetric(SPECTRA["clustered"], dtype=torch.float32)  # often a second pass
    lanczos, original, calls = started(a), getattr(Basis, name), 0
    for _ in range(3):
        step(lanczos, a)

    def interrupted(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == call and not late:
            raise KeyboardInterrupt
        result = original(self, *arguments)
        if calls == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Basis, name, interrupted)
    seen = []

    def go_on() -> None:
        while not lanczos.is_whole:
            seen[:] = lanczos.state, lanczos.state.basis.clone()
            step(lanczos, a)

    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert lanczos.state is seen[0]
    assert torch.equal(lanczos.state.basis, seen[1])


def test_ctrl_c_during_a_restart_waits_until_the_rotation_is_done(monkeypatch):
    a = symmetric(SPECTRA["indefinite"])
    lanczos = started(a)
    for _ in range(10):
        step(lanczos, a)
    original, handler = Basis.combine, signal.getsignal(signal.SIGINT)

    def pressed_twice(self, coefficients):
        signal.raise_signal(signal.SIGINT)
        lost = original(self, coefficients)
        signal.raise_signal(signal.SIGINT)
        return lost

    monkeypatch.setattr(Basis, "combine", pressed_twice)
    with pytest.raises(KeyboardInterrupt):
        shrinks(lanczos)
    assert signal.getsignal(signal.SIGINT) is handler
    assert lanczos.state.m == 3
    assert identity_defect(a, lanczos.state, lanczos.direction()) <= 1e-13
    step(lanczos, a)  # and the run can go on
    assert identity_defect(a, lanczos.state, lanczos.direction()) <= 1e-13


def test_a_handler_of_ones_own_is_asked_after_a_restart_and_stays(monkeypatch):
    a, pressed, original = symmetric(SPECTRA["indefinite"]), [], Basis.combine
    lanczos = started(a)
    for _ in range(10):
        step(lanczos, a)

    def own(*_: object) -> None:
        pressed.append(lanczos.state.m)

    def combine(self, coefficients):
        signal.raise_signal(signal.SIGINT)
        return original(self, coefficients)

    monkeypatch.setattr(Basis, "combine", combine)
    before = signal.signal(signal.SIGINT, own)
    try:
        shrinks(lanczos)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [3]


def test_the_handler_is_put_back_when_a_restart_fails(monkeypatch):
    a = symmetric(SPECTRA["indefinite"])
    lanczos, handler = started(a), signal.getsignal(signal.SIGINT)
    for _ in range(10):
        step(lanczos, a)

    def fails(self, coefficients):
        raise MemoryError

    monkeypatch.setattr(Basis, "combine", fails)
    with pytest.raises(MemoryError):
        shrinks(lanczos)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_restart_works_in_another_thread():
    a, found = symmetric(SPECTRA["indefinite"]), []
    here, _ = restarted(a, steps=40)
    thread = threading.Thread(target=lambda: found.append(restarted(a, steps=40)[0]))
    thread.start()
    thread.join()
    assert np.array_equal(found[0].state.projected, here.state.projected)
    assert torch.equal(found[0].state.basis, here.state.basis)


# -- the basis, block by block -----------------------------------------------------

SIZES = [(1, 1), (1, 16), (1, 17), (3, 18), (3, 19), (3, 20), (16, 16), (16, 33), (40, 39)]


def filled(num_first: int, m: int, n: int = 23) -> tuple[Basis, np.ndarray]:
    dense = np.random.default_rng(m).normal(size=(m, n))
    rows = Basis(torch.zeros(n, dtype=torch.float64), num_first, 100)
    for i, row in enumerate(dense):
        rows[i] = torch.from_numpy(row)
    return rows, dense


@pytest.mark.parametrize(("num_first", "m"), SIZES)
def test_rows_in_blocks_are_one_matrix(num_first, m):
    rows, dense = filled(num_first, m)
    for j in {0, 1, num_first, m - 1, m} & set(range(m + 1)):
        assert np.array_equal(rows.rows(j).numpy(), dense[:j])
    assert all(np.array_equal(rows[i].numpy(), dense[i]) for i in range(m))
    rows[m - 1] = torch.ones(23)  # a row can be written again
    assert rows[m - 1].tolist() == [1.0] * 23
    with pytest.raises(IndexError):
        rows[m + 40]


@pytest.mark.parametrize(("num_first", "m"), SIZES)
def test_inner_products_and_differences_in_blocks_are_those_of_the_matrix(num_first, m):
    rows, dense = filled(num_first, m)
    w = np.random.default_rng(99).normal(size=23)
    for j in {1, num_first, m - 1, m} & set(range(1, m + 1)):
        overlaps = rows.overlaps(torch.from_numpy(w), j)
        np.testing.assert_allclose(overlaps.numpy(), dense[:j] @ w, rtol=1e-13, atol=1e-13)
        left = torch.from_numpy(w.copy())
        rows.subtract(left, overlaps)
        expected = w - dense[:j].T @ (dense[:j] @ w)
        np.testing.assert_allclose(left.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert np.array_equal(rows.rows(m).numpy(), dense)


@pytest.mark.parametrize("columns", [1, 7, 23, 1 << 16])
@pytest.mark.parametrize(("num_first", "m"), SIZES)
def test_rows_combined_in_strips_are_the_product_of_matrices(
    num_first, m, columns, monkeypatch
):
    monkeypatch.setattr(basis, "_COLUMNS", columns)
    for j in {1, m // 2 + 1, m} & set(range(1, m + 1)):
        rows, dense = filled(num_first, m)
        mix = np.random.default_rng(7).normal(size=(m, j)).T  # not contiguous
        rows.combine(mix)
        np.testing.assert_allclose(
            rows.rows(j).numpy(), mix @ dense, rtol=1e-12, atol=1e-12
        )
        assert np.array_equal(rows.rows(m).numpy()[j:], dense[j:])


def test_combining_takes_no_second_basis():
    n, m, num = 3 * (1 << 16) + 5, 24, 12
    rows = Basis(torch.zeros(n), num, 100)
    for i in range(m):
        rows[i] = torch.full((n,), float(i))
    mix = np.random.default_rng(0).normal(size=(num, m))
    with memory._Storages() as storages:
        rows.combine(mix)
    assert storages.peak <= (2 * m + num) * (1 << 16) * 4 + mix.nbytes
    expected = (mix @ np.arange(m))[:, None]
    assert np.allclose(rows.rows(num).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_memory_comes_a_block_at_a_time_and_the_first_block_is_not_copied():
    with memory._Storages() as storages:
        rows = Basis(torch.zeros(1000, dtype=torch.float64), 5, 100)
        sizes = []
        for i in range(22):
            rows[i] = torch.ones(1000)
            sizes.append(storages.now // 8000)
    assert [sizes[i] for i in (0, 4, 5, 20, 21)] == [5, 5, 21, 21, 37]
    assert rows.rows(5).data_ptr() == rows[0].data_ptr()
    assert rows.rows(6).data_ptr() != rows[0].data_ptr()
    assert rows.rows(0).shape == (0, 1000)


@pytest.mark.parametrize("scale", [1e-24, 1e-20, 1e22])
def test_squares_beyond_the_type_of_the_products_do_no_harm(scale):
    values = torch.linspace(-1, 1, 20_000) ** 9
    found = []
    for size in (1.0, scale):
        matrix = values * size
        lanczos = Lanczos(random_start(20_000, dtype=torch.float32), torch.Generator())
        for _ in range(12):
            lanczos.absorb(matrix * lanczos.direction(), owned=True)
        found.append(lanczos.state.projected / size)
        assert lanczos.state.num_random == 0
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_a_device_without_float64_is_asked_for_none(monkeypatch):
    monkeypatch.setattr(_tensors, "widest", lambda tensor: torch.float32)
    values, made = torch.linspace(-1, 1, 300), []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if (kwargs or {}).get("dtype") == torch.float64:
                made.append(func)
            return func(*args, **(kwargs or {}))

    lanczos = Lanczos(
        random_start(300, dtype=torch.float32), torch.Generator(), dtype=torch.bfloat16
    )
    with Watched():
        for _ in range(8):
            lanczos.absorb(values * lanczos.direction())
        lanczos.restart(np.arange(3))
    assert not made
