"""Lanczos: the recurrence, its breakdowns, and what the Ritz values prove."""

from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from measure_problems import random_spectrum, symmetric
from torch import Tensor

from sharpness.krylov.lanczos import LanczosState, lanczos, meets, ritz_pairs

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


def run(
    matrix: Tensor, start: Tensor | None = None, steps: int | None = None, seed: int = 0
) -> list[LanczosState]:
    start = random_start(len(matrix), seed, matrix.dtype) if start is None else start
    generator = torch.Generator().manual_seed(seed)
    return list(islice(lanczos(lambda v: matrix @ v, start, generator), steps))


def tridiagonal(state: LanczosState) -> Tensor:
    off = torch.tensor(state.betas[:-1], dtype=torch.float64)
    diagonal = torch.tensor(state.alphas, dtype=torch.float64)
    return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)


def tolerance(dtype: torch.dtype) -> float:
    return 10 * torch.finfo(dtype).eps ** 0.5


def rounding(matrix: Tensor) -> float:
    """What a dense eigenvalue in float64 may be off by."""
    norm = float(torch.linalg.matrix_norm(matrix.double(), 2))
    return 10 * len(matrix) * np.finfo(float).eps * norm


# -- the recurrence ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_lanczos_identity_holds_after_every_step(name, dtype):
    a = symmetric(SPECTRA[name], dtype=dtype)
    norm = float(torch.linalg.matrix_norm(a.double(), 2))
    states = run(a)
    assert len(states) == len(a)
    for state, following in pairwise(states):
        q, t = state.basis.double(), tridiagonal(state)
        error = a.double() @ q.T - q.T @ t
        error[:, -1] -= state.betas[-1] * following.basis[-1].double()
        assert float(error.norm()) <= tolerance(dtype) * norm
    q, t = states[-1].basis.double(), tridiagonal(states[-1])
    assert float((a.double() @ q.T - q.T @ t).norm()) <= tolerance(dtype) * norm


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


def test_each_state_costs_one_product_and_there_are_n_of_them():
    a, calls = symmetric(SPECTRA["indefinite"]), 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return a @ v

    generator = torch.Generator().manual_seed(0)
    for m, state in enumerate(lanczos(product, random_start(40), generator), 1):
        assert calls == m == len(state.alphas) == len(state.betas) == len(state.basis)
    assert calls == 40


def test_later_steps_leave_earlier_states_as_they_were():
    a = symmetric(SPECTRA["indefinite"])
    states = lanczos(lambda v: a @ v, random_start(40), torch.Generator())
    early = next(islice(states, 9, None))
    kept = early.basis.clone()
    list(states)
    assert torch.equal(early.basis, kept)
    assert early.basis.shape == (10, 40)


@pytest.mark.parametrize("length", [1e-30, 1e-3, 1e30])
def test_the_length_of_the_start_does_not_matter(length):
    a, start = symmetric(SPECTRA["indefinite"]), random_start(40)
    plain, scaled = run(a, start, 12)[-1], run(a, start * length, 12)[-1]
    assert scaled.alphas == pytest.approx(plain.alphas, rel=1e-10, abs=1e-10)
    assert scaled.betas == pytest.approx(plain.betas, rel=1e-10)


# -- breakdown ---------------------------------------------------------------------


def test_a_start_on_an_eigenvector_goes_on_elsewhere_until_all_is_found():
    spectrum = torch.linspace(-2, 7, 10, dtype=torch.float64)
    start = torch.eye(10, dtype=torch.float64)[3] * 4
    states = run(torch.diag(spectrum), start)
    assert states[0].invariant
    assert states[0].alphas == (float(spectrum[3]),)
    assert [s.num_restarts for s in states[:2]] == [0, 1]
    values = ritz_pairs(states[-1], 10).values
    assert values == pytest.approx(spectrum.flip(0).tolist(), rel=1e-13, abs=1e-13)


def test_an_exhausted_krylov_space_is_seen_as_invariant():
    a = torch.diag(torch.tensor([4.0] * 5 + [1.0] * 5 + [-3.0] * 5).double())
    states = run(a)
    assert [s.invariant for s in states[:4]] == [False, False, True, False]
    assert ritz_pairs(states[2], 3).values == pytest.approx([4, 1, -3], rel=1e-13)


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
    pairs = ritz_pairs(state, len(a))
    true = np.linalg.eigvalsh(a.numpy())[::-1]
    assert np.all(np.abs(pairs.values - true) <= pairs.bounds + rounding(a))
    assert np.all(pairs.bounds <= rounding(a))


def test_the_zero_matrix_gives_zeros_and_nothing_else():
    states = run(torch.zeros(5, 5, dtype=torch.float64))
    assert len(states) == 5
    assert all(s.invariant and not any(s.alphas + s.betas) for s in states)
    assert states[-1].noise == 0.0
    gram = states[-1].basis @ states[-1].basis.T
    torch.testing.assert_close(gram, torch.eye(5).double(), rtol=0, atol=1e-14)


def test_a_product_that_is_not_finite_ends_the_iteration_after_its_own_state():
    a, calls = symmetric(SPECTRA["indefinite"]), 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return a @ v * (float("nan") if calls == 4 else 1.0)

    states = list(lanczos(product, random_start(40), torch.Generator()))
    assert len(states) == 4
    assert np.isfinite(states[2].alphas + states[2].betas).all()
    assert not np.isfinite(states[3].alphas[-1])


# -- what the Ritz values prove ----------------------------------------------------


def test_ritz_pairs_are_the_eigenpairs_of_the_projected_matrix():
    a = symmetric(SPECTRA["indefinite"])
    state = run(a, steps=12)[-1]
    q = state.basis
    true = torch.linalg.eigvalsh(q @ a @ q.T).flip(0).numpy()
    pairs = ritz_pairs(state, 5)
    assert pairs.values == pytest.approx(true[:5], rel=1e-12)
    assert np.all(np.diff(pairs.values) < 0)
    for value, residual, row in zip(
        pairs.values, pairs.residuals, pairs.coefficients, strict=True
    ):
        v = torch.from_numpy(row) @ q
        assert float(v.norm()) == pytest.approx(1, rel=1e-12)
        assert float((a @ v - value * v).norm()) == pytest.approx(residual, abs=1e-12)


def test_next_upper_is_the_top_of_the_next_ritz_interval():
    state = run(symmetric(SPECTRA["indefinite"]), steps=8)[-1]
    everything = ritz_pairs(state, 8)
    tops = everything.values + everything.residuals
    assert ritz_pairs(state, 3).next_upper == pytest.approx(tops[3], rel=1e-14)
    assert everything.next_upper == -np.inf


def test_fewer_steps_than_wanted_values_give_what_there_is():
    state = run(symmetric(SPECTRA["indefinite"]), steps=3)[-1]
    assert len(ritz_pairs(state, 7).values) == 3


@pytest.mark.parametrize("part", range(6))
def test_an_eigenvalue_lies_within_the_residual_of_every_ritz_value(part):
    for case in range(part, 240, 6):
        a = symmetric(random_spectrum(case), seed=case)
        true = np.linalg.eigvalsh(a.numpy())
        for state in run(a, seed=case):
            pairs = ritz_pairs(state, len(a))
            nearest = np.abs(pairs.values[:, None] - true).min(1)
            proven = pairs.residuals + state.noise + rounding(a)
            assert np.all(nearest <= proven), f"case {case}"


@pytest.mark.parametrize("part", range(6))
def test_an_error_bound_is_never_wider_than_its_residual(part):
    for case in range(part, 60, 6):
        for state in run(symmetric(random_spectrum(case), seed=case), seed=case):
            pairs = ritz_pairs(state, 40)
            assert np.all(pairs.bounds <= pairs.residuals + state.noise)


def test_a_single_ritz_value_is_no_better_than_its_residual():
    state = run(symmetric(SPECTRA["indefinite"]), steps=1)[0]
    pairs = ritz_pairs(state, 1)
    assert pairs.bounds == pytest.approx(pairs.residuals + state.noise, rel=1e-15)


def test_a_separated_value_is_known_to_its_residual_squared_over_the_gap():
    a = symmetric(np.append(np.linspace(0, 1, 60), [10.0]))
    state = run(a, steps=6)[-1]
    pairs = ritz_pairs(state, 1)
    assert 1e-12 < pairs.residuals[0] < 0.1
    assert pairs.bounds[0] <= pairs.residuals[0] ** 2 / 8 + state.noise
    assert abs(pairs.values[0] - 10) <= pairs.bounds[0] + rounding(a)


# -- when to stop ------------------------------------------------------------------


def test_the_bounds_decide_when_to_stop():
    a = symmetric(np.append(np.linspace(0, 1, 60), [2.0, 3.0, 10.0]))
    for tol in (1e-2, 1e-5, 1e-8):
        states = run(a)
        first = next(m for m, s in enumerate(states, 1) if meets(s, 2, tol))
        pairs = ritz_pairs(states[first - 1], 2)
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
    pairs = ritz_pairs(state, 1)
    assert pairs.values == pytest.approx([10], abs=1e-6)
    assert pairs.bounds[0] <= 0.01 * pairs.values[0] < pairs.next_upper - 10
    assert not meets(state, 1, 0.01)


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
        upper = torch.triu(q @ (a + skew) @ q.T - tridiagonal(state), 1)
        expected = 2**0.5 * float(upper.norm())
        assert state.noise == pytest.approx(expected, rel=1e-4)
        assert state.noise > 0.1 * size * (len(q) / 40)


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3])
def test_noise_bounds_what_asymmetry_does_to_the_eigenvalues(size):
    a = symmetric(SPECTRA["indefinite"])
    skew = torch.randn(40, 40, generator=torch.Generator().manual_seed(8)).double()
    state = run(a + size * (skew - skew.T))[-1]
    true = torch.linalg.eigvalsh(a).flip(0).numpy()
    error = np.abs(ritz_pairs(state, 40).values - true)
    assert error.max() <= state.noise
    assert error.max() > 0
