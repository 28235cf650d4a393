"""Lanczos tridiagonalisation of a symmetric matrix, and what its Ritz values prove."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.special import ndtri
from torch import Tensor

from sharpness import _tensors

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LanczosState:
    """m steps: A Q^T = Q^T T + beta_m q_{m+1} e_m^T, with Q (m, n), rows orthonormal.

    `noise` is the Frobenius norm of what `Q A Q^T` has outside its three diagonals. It
    would be 0 in exact arithmetic with a symmetric A, so it measures both rounding and
    the asymmetry of the products, and shifts eigenvalues by at most itself.
    """

    alphas: tuple[float, ...]  # m diagonal entries of T
    betas: tuple[float, ...]  # m: m-1 off-diagonal entries of T, then the residual's
    noise: float
    num_restarts: int  # random restarts after an invariant subspace
    basis: Tensor  # Q, (m, n)

    @property
    def invariant(self) -> bool:
        """Whether the space is invariant: every Ritz value is an eigenvalue."""
        return self.betas[-1] == 0.0


def lanczos(
    matvec: Matvec, v0: Tensor, generator: torch.Generator
) -> Iterator[LanczosState]:
    """States after 1, 2, ... products, until the space is the whole of R^n.

    Size, type and device are those of `v0` (n,), which need not be normalised. Where the
    Krylov space of `v0` is exhausted, a random vector orthogonal to it carries on; that
    is also how further copies of a repeated eigenvalue are found.

    Each vector passes Gram-Schmidt twice against all earlier ones: one pass leaves an
    overlap of 8e-4 in float32 after 80 steps, two leave 5e-7.

    Cost: one product and 8 m n operations a step; memory m n.
    """
    n = v0.numel()
    basis = v0.new_empty((min(16, n), n))
    alphas: list[float] = []
    betas: list[float] = []
    noise_squared, scale, restarts = 0.0, 0.0, 0
    q = _normalised(v0)
    while True:
        m = len(alphas) + 1
        if m > len(basis):
            more = v0.new_empty((min(len(basis), n - len(basis)), n))
            basis = torch.cat([basis, more])
        basis[m - 1] = q
        w = matvec(q)
        alpha = float(_tensors.dot64(q, w))
        w, overlaps = _orthogonalised(w, basis[:m])
        beta = float(_tensors.norm64(w))
        scale = max(scale, abs(alpha) + beta)
        noise_squared += _outside_tridiagonal(overlaps, betas)
        # A remainder of the size of rounding is no direction.
        if not beta > 10 * torch.finfo(v0.dtype).eps * scale or m == n:
            beta = 0.0
        alphas.append(alpha)
        betas.append(beta)
        noise = max(noise_squared**0.5, torch.finfo(v0.dtype).eps * scale)
        yield LanczosState(tuple(alphas), tuple(betas), noise, restarts, basis[:m])
        if m == n or not np.isfinite(alpha + beta):
            return
        if beta:
            q = _normalised(w)
        else:
            restarts += 1
            q = _tensors.random_unit(v0, generator)
            q = _normalised(_orthogonalised(q, basis[:m])[0])


@dataclass(frozen=True)
class RitzPairs:
    """The k largest Ritz values of a state, best first, with what is known of each."""

    values: np.ndarray  # (k,)
    residuals: np.ndarray  # (k,) ||A v - value v||
    bounds: np.ndarray  # (k,) distance to the nearest eigenvalue of A is at most this
    coefficients: np.ndarray  # (k, m) eigenvectors in the basis
    next_upper: float  # how far up the interval of the (k+1)-th reaches; -inf without


def ritz_pairs(state: LanczosState, k: int) -> RitzPairs:
    """The min(k, m) largest Ritz pairs of a state, with error bounds.

    A residual r proves that an eigenvalue lies within r of the Ritz value (not that it
    is the i-th). Where every other Ritz interval is more than 2 r away, the Ritz value
    is accurate to r^2 / gap (Kato-Temple; Parlett, The Symmetric Eigenvalue Problem,
    section 11.7), as far as the gap seen in the Krylov space is the gap of A.
    """
    theta, vectors = eigh_tridiagonal(np.array(state.alphas), np.array(state.betas[:-1]))
    residuals = state.betas[-1] * np.abs(vectors[-1])
    bounds = state.noise + _tightened(theta, residuals)
    order = np.argsort(-theta, kind="stable")
    best, rest = order[:k], order[k:]
    upper = float((theta + residuals)[rest[0]]) if len(rest) else -np.inf
    return RitzPairs(theta[best], residuals[best], bounds[best], vectors[:, best].T, upper)


def _tightened(theta: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    if len(theta) == 1:
        return residuals  # nothing is known of a gap
    distance = np.abs(theta[:, None] - theta[None, :]) - residuals[None, :]
    np.fill_diagonal(distance, np.inf)
    gap = distance.min(axis=1)
    resolved = gap > 2 * residuals
    tightened = residuals.copy()
    np.divide(residuals**2, gap, out=tightened, where=resolved)
    return tightened


def meets(state: LanczosState, k: int, tol: float) -> bool:
    """Whether the k largest Ritz values of a state are accurate to `tol`.

    Every bound is at most `tol` times its value (or times the noise, if larger), and the
    interval of the next Ritz value stays below the k-th: while it reaches higher, an
    eigenvalue may still emerge there.
    """
    m, n = state.basis.shape
    if m == n or m < k:
        return m == n
    # An invariant space says nothing of what lies outside it, further copies of its
    # eigenvalues included: the next random start must bring nothing above the k-th.
    if state.invariant and state.num_restarts == 0:
        return False
    pairs = ritz_pairs(state, k)
    if state.num_restarts and _newest_top(state) > pairs.values[-1] + state.noise:
        return False
    wanted = tol * np.maximum(np.abs(pairs.values), state.noise)
    return bool(
        (pairs.bounds <= wanted).all() and pairs.next_upper <= pairs.values[-1] + wanted[-1]
    )


def _newest_top(state: LanczosState) -> float:
    """The largest Ritz value of the part after the last random restart."""
    ends = [i + 1 for i, beta in enumerate(state.betas[:-1]) if beta == 0.0]
    alphas = np.array(state.alphas[ends[-1] :])
    betas = np.array(state.betas[ends[-1] : -1])
    return float(eigh_tridiagonal(alphas, betas, eigvals_only=True)[-1])


def upper_bound(state: LanczosState, n: int, confidence: float = 0.95) -> float:
    r"""A bound that lambda_max exceeds with probability at most 1 - confidence.

    For a start drawn uniformly from the unit sphere. The Lanczos vectors are
    $q_{j+1} = p_j(A) q_1$ with polynomials orthonormal for the start's spectral measure,
    so the projection of the top eigenvector u on the space has squared length
    $(u^T q_1)^2 \sum_j p_j(\lambda_{max})^2 \le 1$, and $(u^T q_1)^2$ falls below its
    5 % quantile, about 0.0039 / n, only once in twenty starts.

    References:
        van Dorsselaer, Hochstenbach, van der Vorst (2000), SIAM J. Matrix Anal. Appl.
        22(3), section 3: the same idea with the last polynomial alone. Only the steps
        before the first restart are used, since later ones do not start at random.
    """
    limit = n / ndtri(0.5 + (1 - confidence) / 2) ** 2  # chi^2 with 1 d.o.f., by n
    betas = np.array(state.betas)
    m = int(np.argmax(betas == 0.0)) + 1 if (betas == 0.0).any() else len(betas)
    alphas, betas = np.array(state.alphas[:m]), betas[:m]
    low = float(eigh_tridiagonal(alphas, betas[:-1], eigvals_only=True)[-1])
    if betas[-1] == 0.0:
        return low + state.noise
    high = low + float(betas.max())
    while _christoffel(high, alphas, betas) < limit:
        high += high - low
    for _ in range(60):
        middle = (low + high) / 2
        inside = _christoffel(middle, alphas, betas) < limit
        low, high = (middle, high) if inside else (low, middle)
    return high + state.noise


def _christoffel(x: float, alphas: np.ndarray, betas: np.ndarray) -> float:
    """Sum of p_j(x)^2, j = 0..m, by the three-term recurrence; inf on overflow."""
    total, previous, current = 1.0, 0.0, 1.0
    for j, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
        before = betas[j - 1] * previous if j else 0.0
        previous, current = current, ((x - alpha) * current - before) / beta
        total += current * current
        if total > 1e100:
            return np.inf
    return float(total)


def _normalised(v: Tensor) -> Tensor:
    return v / _tensors.norm64(v).to(v.dtype)


def _orthogonalised(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """`w` without its part in the rows of `basis`, and its coefficients on them."""
    overlaps = basis @ w
    w = w - overlaps @ basis
    again = basis @ w
    return w - again @ basis, overlaps + again


def _outside_tridiagonal(overlaps: Tensor, betas: list[float]) -> float:
    """Squared norm of a column of Q A Q^T - T above the diagonal, both triangles."""
    expected = torch.zeros_like(overlaps[:-1], dtype=torch.float64)
    if betas:
        expected[-1] = betas[-1]
    error = overlaps[:-1].double() - expected
    return 2 * float(torch.dot(error, error))
