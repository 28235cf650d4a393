"""Stochastic Lanczos quadrature: what random starts tell of the whole spectrum.

For a unit vector z, Lanczos with m steps gives nodes and weights of the Gauss quadrature
for the measure sum_i (u_i^T z)^2 delta(lambda_i). Its mean over z is the spectral density.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.special import chdtriv

from sharpness.krylov.lanczos import Tridiagonal, christoffel

_LEAST_WEIGHT = 1e-4  # of an eigenvalue, in 1/n: less is as rare as 1 in 100
_COARSER = 0.75  # of the steps: the difference shows the error of the quadrature
_REACH = 1.5  # distances between nodes that such a difference tells about
_STILL = 1 / 3  # of a density: ten starts leave more than that of it open


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
            fewer = run.shortened(max(1, int(_COARSER * len(run.alphas))))
        return cls(*run.nodes_and_weights(), *fewer.nodes_and_weights(), run)

    def integrals(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The integral of a function by this rule and by those with fewer steps, (r,).

        Where the function has a kink at an eigenvalue of much weight (the mass below zero
        of a large network) they swing about the integral and do not converge to it.
        """
        return np.array([weights @ function(nodes) for nodes, weights in self._late])

    @cached_property
    def _late(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Nodes and weights over the last half of the steps; an exhausted space has one."""
        run, m = self.tridiagonal, len(self.nodes)
        if run.invariant:
            return [(self.nodes, self.weights)]
        return [
            run.shortened(j).nodes_and_weights() for j in range(m, max(1, m // 2) - 1, -1)
        ]

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
    pivot = run.alphas[0] - t
    for alpha, beta in zip(run.alphas[1:], run.betas[:-1], strict=True):
        pivot = alpha - t - beta**2 / (pivot or np.finfo(float).tiny)
    scale = float(np.abs(run.alphas).max() + run.betas.max())
    if abs(pivot) * 1e6 * scale < run.betas[-1] ** 2:
        return run.nodes_and_weights()  # t is one of them
    last = t + run.betas[-1] ** 2 / pivot
    nodes, vectors = eigh_tridiagonal(np.append(run.alphas, last), run.betas)
    return nodes, vectors[0] ** 2


@dataclass(frozen=True)
class Smoothed:
    """Density with Gaussians of one width on a grid (g,), from one start."""

    density: np.ndarray
    coarse: np.ndarray  # the same with fewer steps
    square: np.ndarray  # mean square of the Gaussians
    largest: np.ndarray  # the largest of them that an eigenvalue can be behind
    least: np.ndarray  # density, if every eigenvalue has moved away by `moved`
    most: np.ndarray  # and towards the grid point


def smoothed(
    rule: Rule, grid: np.ndarray, sigma: float, n: int, moved: float = 0.0
) -> Smoothed:
    """The density of one start at each grid point, and what can be said of its error."""
    distance = np.abs(grid[:, None] - rule.nodes[None, :])
    fine = _gaussian(distance, sigma)
    real = rule.weights > _LEAST_WEIGHT / n
    coarse = _gaussian(grid[:, None] - rule.coarse_nodes[None, :], sigma)
    return Smoothed(
        density=fine @ rule.weights,
        coarse=coarse @ rule.coarse_weights,
        square=fine**2 @ rule.weights,
        largest=fine[:, real].max(1),
        least=_gaussian(distance + moved, sigma) @ rule.weights,
        most=_gaussian(np.maximum(distance - moved, 0), sigma) @ rule.weights,
    )


def _gaussian(distance: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(np.exp(-0.5 * (distance / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi)))


def steps_error(rule: Rule, grid: np.ndarray, sigma: float) -> tuple[np.ndarray, float]:
    """What few steps may have changed in the density at each grid point.

    Where the Gaussians are narrower than the nodes are apart, the density is a comb. It
    and that of fewer steps agree by chance where they cross, and on zero between their
    teeth. So their differences are taken at the nodes, and count as far as the next
    nodes are away on the nearer side: across a bulk, but not into a gap.

    Returns:
        The error (g,), and the weight of the nodes at which it is half the density.
    """
    at = smoothed(rule, rule.nodes, sigma, 1)
    difference = np.abs(at.density - at.coarse)
    gaps = np.diff(rule.nodes)
    reach = _REACH * np.minimum(np.append(gaps, np.inf), np.append(np.inf, gaps))
    near = np.abs(grid[:, None] - rule.nodes) <= reach
    lost = float(rule.weights[difference > at.density / 2].sum())
    return np.where(near, difference, 0.0).max(1), lost


def stands_still(rule: Rule, sigma: float, n: int) -> bool:
    """Whether the last quarter of the steps changed the density by a third at most.

    What is compared is the density of n eigenvalues with Gaussians of that width, at the
    Ritz values; where it is less than that of one eigenvalue, with this.
    """
    at = smoothed(rule, rule.nodes, sigma, n)
    one = float(_gaussian(np.zeros(()), sigma)) / n
    change = np.abs(at.density - at.coarse) / np.maximum(at.density, one)
    return bool(change.max() <= _STILL)


def standard_error(mean: np.ndarray, square: np.ndarray, n: int, starts: int) -> np.ndarray:
    """Of the average of z^T F z over random unit vectors z.

    For F with eigenvalues f_i its variance is 2 / (n + 2) (mean of f_i^2 - (mean of
    f_i)^2) for one start: no need to estimate it from a handful of them.
    """
    variance = np.maximum(square - mean**2, 0) * 2 / (n + 2) / starts
    return np.asarray(np.sqrt(variance))


def interval(
    mean: np.ndarray,
    square: np.ndarray,
    largest: np.ndarray,
    n: int,
    starts: int,
    confidence: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Where the expectation of z^T F z lies, F >= 0, from the average over starts.

    A sum of squared Gaussians is close to c times a chi^2 with d degrees of freedom
    (Satterthwaite 1946). The ratio of mean square and mean gives c, and d is inverted
    from what was seen: exact for d / starts equal eigenvalues, also for a single one,
    where a Student t interval would fail. No start sees less than one eigenvalue. At the
    upper end, c is that of the largest eigenvalue: the one that may have hidden.

    Args:
        mean: of f_i over the eigenvalues, as estimated.
        square: of f_i^2.
        largest: of the f_i.
        n: dimension.
        starts: that were averaged.
        confidence: such as 0.95.
    """
    mean, square, largest = (np.asarray(a, float) for a in (mean, square, largest))
    with np.errstate(divide="ignore", invalid="ignore"):
        typical = np.where(mean > 0, square / mean - mean, 0.0)
    tail = (1 - confidence) / 2
    low = _end(mean, typical / (starts * (n + 2)), starts, 1 - tail)
    high = _end(mean, (largest - mean) / (starts * (n + 2)), starts, tail)
    return np.minimum(low, mean), np.maximum(high, mean)


def _end(mean: np.ndarray, c: np.ndarray, starts: int, p: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = np.where(c > 0, mean / c, np.inf)
    # F is a multiple of the identity, or nothing was seen.
    sure = ~((seen > 0) & (seen < 1e12))
    dof = chdtriv(p, np.where(sure, 1.0, seen))
    return np.where(sure, mean, np.maximum(dof, starts) * c)
