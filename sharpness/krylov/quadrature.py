"""Stochastic Lanczos quadrature: what random starts tell of the whole spectrum.

For a unit vector z, Lanczos with m steps gives nodes and weights of the Gauss quadrature
for the measure sum_i (u_i^T z)^2 delta(lambda_i). Its mean over z is the spectral density.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, eigh_tridiagonal, solve_banded
from scipy.special import chdtriv

from sharpness.krylov.lanczos import Tridiagonal, christoffel

_COARSER = 0.75  # of the steps: the difference shows the error of the quadrature


@dataclass(frozen=True)
class Rule:
    """Nodes and weights of one start, also with fewer steps."""

    nodes: np.ndarray  # (m,) Ritz values, ascending
    weights: np.ndarray  # (m,) nonnegative, sum 1
    coarse_nodes: np.ndarray
    coarse_weights: np.ndarray
    tridiagonal: Tridiagonal

    @classmethod
    def of(cls, run: Tridiagonal) -> Rule:
        """The quadrature of a Lanczos run."""
        fewer = run
        if not run.invariant:
            m = max(1, int(_COARSER * len(run.alphas)))
            fewer = Tridiagonal(run.alphas[:m], run.betas[:m])
        return cls(*run.nodes_and_weights(), *fewer.nodes_and_weights(), run)

    def mass_above(self, t: float) -> tuple[float, float]:
        """Bounds on the start's mass above t: proven, but for rounding.

        The quadrature with a node forced onto t has all mass above t in the nodes above
        it, up to the weight at t itself (Chebyshev, Markov, Stieltjes), which is the
        Christoffel function there and vanishes exponentially in gaps of the spectrum.
        """
        run = self.tridiagonal
        if run.invariant:  # the nodes are eigenvalues
            mass = float(self.weights[self.nodes > t].sum())
            return mass, mass
        nodes, weights = _with_node(run, t)
        at = int(np.argmin(np.abs(nodes - t)))
        above = float(weights[at + 1 :].sum())
        return above, min(1.0, above + 1 / christoffel(t, run))


def _with_node(run: Tridiagonal, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Radau: one more row, chosen so that t is a node (Golub 1973)."""
    m = len(run.alphas)
    bands = np.zeros((3, m))
    bands[0, 1:], bands[2, :-1] = run.betas[:-1], run.betas[:-1]
    bands[1] = run.alphas - t
    right = np.zeros(m)
    right[-1] = run.betas[-1] ** 2
    try:
        last = t + solve_banded((1, 1), bands, right)[-1]
    except LinAlgError:  # t is a Ritz value already
        last = run.alphas[-1]
    nodes, vectors = eigh_tridiagonal(np.append(run.alphas, last), run.betas)
    return nodes, vectors[0] ** 2


def smoothed(rule: Rule, grid: np.ndarray, sigma: float) -> tuple[np.ndarray, ...]:
    """Density with Gaussians of width sigma: value, coarser value, mean square kernel."""

    def kernel(nodes: np.ndarray) -> np.ndarray:
        z = (grid[:, None] - nodes[None, :]) / sigma
        return np.asarray(np.exp(-0.5 * z**2) / (sigma * np.sqrt(2 * np.pi)))

    fine = kernel(rule.nodes)
    coarse = kernel(rule.coarse_nodes) @ rule.coarse_weights
    return fine @ rule.weights, coarse, fine**2 @ rule.weights


def standard_error(mean: np.ndarray, square: np.ndarray, n: int, starts: int) -> np.ndarray:
    """Of the average of z^T F z over random unit vectors z.

    For F with eigenvalues f_i its variance is 2 / (n + 2) (mean of f_i^2 - (mean of
    f_i)^2) for one start: no need to estimate it from a handful of them.
    """
    variance = np.maximum(square - mean**2, 0) * 2 / (n + 2) / starts
    return np.asarray(np.sqrt(variance))


def interval(
    mean: np.ndarray, square: np.ndarray, n: int, starts: int, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where the expectation of z^T F z lies, F >= 0, from the average over starts.

    A sum of squared Gaussians is close to c times a chi^2 with d degrees of freedom
    (Satterthwaite 1946). The ratio of mean square and mean gives c, and d is inverted
    from what was seen: exact for d / starts equal eigenvalues, also for a single one,
    where a Student t interval would fail. No start sees less than one eigenvalue.

    Args:
        mean: of f_i over the eigenvalues, as estimated.
        square: of f_i^2.
        n: dimension.
        starts: that were averaged.
        confidence: such as 0.95.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        c = np.where(mean > 0, (square / mean - mean) / (starts * (n + 2)), 0.0)
        seen = np.where(c > 0, mean / c, np.inf)
    sure = ~(seen < 1e12)  # F is a multiple of the identity, or nothing was seen
    seen = np.where(sure, 1.0, seen)
    tail = (1 - confidence) / 2
    low, high = (np.maximum(chdtriv(p, seen), starts) * c for p in (1 - tail, tail))
    return np.where(sure, mean, low), np.where(sure, mean, high)
