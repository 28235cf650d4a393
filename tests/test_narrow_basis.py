"""A Krylov basis in bfloat16: the values, and what is claimed of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sharpness as sh
from sharpness._tensors import seeded
from sharpness.krylov.basis import Basis
from sharpness.krylov.eigenpair_search import Search
from sharpness.krylov.lanczos import Lanczos, ritz_pairs

HALF = torch.bfloat16
N = 3000


def spectrum(outliers=(10.0, 7.0, 6.5, -4.0)):
    """Values of a diagonal matrix: a few outliers over a bulk around zero."""
    values = torch.linspace(-0.3, 1.0, N)
    values[: len(outliers)] = torch.tensor(outliers)
    return values


def found(values, k=3, dtype=HALF, seed=0, most=60, **settings):
    generator = seeded(seed)
    v0 = torch.randn(N, generator=generator)
    given = {"which": "LA", "tol": 1e-2, "miss": 0.05, "basis_size": 40} | settings
    search = Search(v0, generator, k=k, dtype=dtype, **given)
    while not search.is_converged and search.num_products < most:
        search.absorb(values * search.direction())
    return search, search.found()


def rows_of(basis, m):
    return torch.stack([basis[i] for i in range(m)])


def test_overlaps_and_differences_are_those_of_the_rows_that_are_held():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 70_000, generator=draw)  # more than two strips, two blocks
    basis = Basis(rows[0], 3, 20, dtype=HALF)
    for i, row in enumerate(rows):
        basis[i] = row
    held, w = rows.bfloat16().double(), torch.randn(70_000, generator=draw)
    overlaps = basis.overlaps(w, 18)
    exact = held[:18] @ w.double()
    assert overlaps.dtype == torch.float64
    assert float((overlaps - exact).norm()) < 1e-6 * float(held[0].norm() * w.norm())
    left = w.clone()
    basis.subtract(left, overlaps)
    wanted = w.double() - held[:18].T @ overlaps
    assert float((left - wanted).norm()) < 1e-6 * float(wanted.norm())


def test_memory_of_the_basis_is_half():
    like = torch.zeros(1 << 16)
    basis = Basis(like, 16, 16, dtype=HALF)
    basis[0] = like
    assert sum(block.nbytes for block in basis._blocks) == 16 * like.nbytes // 2


@pytest.mark.parametrize(("rows_of_a_block", "held"), [(2, 7), (0.5, 6), (100, 12)])
def test_long_rows_get_their_memory_a_few_at_a_time(monkeypatch, rows_of_a_block, held):
    """Three first rows, then blocks of two, of one, or of all up to the limit."""
    like = torch.arange(1000.0)
    monkeypatch.setattr("sharpness.krylov.basis._BLOCK_BYTES", int(2000 * rows_of_a_block))
    basis = Basis(like, 3, 12, dtype=HALF)
    for i in range(6):
        basis[i] = (i + 1) * like
    assert sum(map(len, basis._blocks)) == held
    torch.testing.assert_close(rows_of(basis, 6)[5], (6 * like).bfloat16().float())


@pytest.mark.parametrize("restarted", [False, True])
def test_what_the_rows_miss_is_at_most_what_is_said_r4(restarted):
    """A Q^T = Q^T T + q b^T up to the defects, row by row, against the matrix itself."""
    values, generator = spectrum(), seeded(0)
    run = Lanczos(torch.randn(N, generator=generator), generator, dtype=HALF)
    for _ in range(25):
        run.absorb(values * run.direction())
    if restarted:
        run.restart(np.arange(15, 25))
        for _ in range(5):
            run.absorb(values * run.direction())
    s = run.state
    q = rows_of(s.store, s.m).double()
    projected, coupling = torch.from_numpy(s.projected), torch.from_numpy(s.coupling)
    missed = q * values - projected @ q - coupling[:, None] * run.direction().double()
    assert (missed.norm(dim=1).numpy() <= s.defects + s.noise).all()
    assert missed.norm(dim=1).max() > 1e-5 * values.max()  # else nothing was tested


def test_residuals_of_ritz_pairs_are_those_of_the_vectors():
    values, generator = spectrum(), seeded(1)
    run = Lanczos(torch.randn(N, generator=generator), generator, dtype=HALF)
    for _ in range(30):
        run.absorb(values * run.direction())
    pairs = ritz_pairs(run.state)
    vectors = torch.from_numpy(pairs.coefficients) @ rows_of(run.state.store, 30).double()
    exact = (values * vectors - torch.from_numpy(pairs.values)[:, None] * vectors).norm(
        dim=1
    )
    # Rounding errors of different rows are taken for orthogonal: a third is let go.
    assert (exact.numpy() <= 1.33 * (pairs.residuals + run.state.noise)).all()


@pytest.mark.parametrize("basis_size", [13, 40])
@pytest.mark.parametrize("seed", range(4))
def test_values_are_right_within_their_bounds(seed, basis_size):
    values = spectrum()
    search, pairs = found(values, seed=seed, basis_size=basis_size, most=120)
    assert search.is_converged
    assert (np.abs(pairs.values - [10.0, 7.0, 6.5]) <= pairs.bounds).all()
    assert (pairs.bounds <= 1e-2 * pairs.values).all()
    gram = pairs.vectors.double() @ pairs.vectors.T.double()
    assert float((gram - torch.eye(3)).abs().max()) < 1e-6


def test_float64_in_float32_is_a_narrow_basis_too():
    generator = seeded(0)
    v0 = torch.randn(N, generator=generator, dtype=torch.float64)
    settings = {"k": 1, "which": "LA", "tol": 1e-5, "miss": 0.05, "basis_size": 60}
    search = Search(v0, generator, dtype=torch.float32, **settings)
    values = spectrum().double()
    while not search.is_converged:
        search.absorb(values * search.direction())
    pairs = search.found()
    assert pairs.vectors.dtype == torch.float64
    assert abs(pairs.values[0] - 10) <= pairs.bounds[0] < 1e-4


# -- through the public door --------------------------------------------------------------


def risk():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 4))
    x, y = torch.randn(200, 10), torch.randint(0, 4, (200,))
    return sh.EmpiricalRisk(model, "cross_entropy", (x, y))


def test_every_residual_is_measured_by_a_product_and_within_its_bound():
    half = sh.eigenpairs(risk(), 4, basis_dtype=HALF)
    full = sh.eigenpairs(risk().double(), 4, tol=1e-6)
    assert half.status.ok
    assert half.settings["basis_dtype"] == "bfloat16"
    assert half.eigenvectors.dtype == torch.float32
    products = risk().hvp(half.eigenvectors).double()
    exact = products - half.eigenvalues[:, None] * half.eigenvectors.double()
    assert torch.allclose(exact.norm(dim=1), half.residuals, rtol=1e-2, atol=1e-6)
    apart = (half.eigenvalues - full.eigenvalues).abs()
    assert (apart <= half.error_bounds).all()
    assert (half.error_bounds <= 1e-2 * half.eigenvalues.abs()).all()


def test_each_of_the_k_residuals_costs_a_product():
    counted = []
    r = risk()
    product = r.product
    r.product = lambda v, matrix="hessian": [counted.append(len(v)), product(v, matrix)][1]
    pairs = sh.eigenpairs(r, 3, basis_dtype=HALF)
    assert pairs.cost.products == len(counted)


def test_another_type_is_refused():
    with pytest.raises(ValueError, match="`basis_dtype` must be"):
        sh.eigenpairs(risk(), basis_dtype=torch.float16)


@pytest.mark.slow
def test_a_value_is_overlooked_as_seldom_as_a_confidence_of_95_percent_says():
    """Counted over starts, on a value that the start hardly sees."""
    missed = 0
    for seed in range(400):
        values = spectrum((10.0, 9.0, 8.0))
        search, pairs = found(values, k=1, seed=seed)
        missed += not (search.is_converged and abs(pairs.values[0] - 10) <= 0.1)
    assert missed <= 32  # a rate of 5 % gives more in 1 of 100 such tests
