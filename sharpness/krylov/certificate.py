r"""What a random start rules out: where an eigenvalue may still hide from a Krylov space.

The start is s = c + g with g ~ N(0, I_n) and c independent of g. Every vector of the basis
is a polynomial in A times q_1 = s / ||s||, so for an eigenvector u with eigenvalue x its
part along u is phi(x) u^T q_1, and Bessel's inequality says

$$(u^T q_1)^2 K(x) \le 1, \qquad K = \sum_j \phi_j^2.$$

u^T s = a + Z with Z standard normal and P(|a + Z| <= z) <= P(|Z| <= z) (Anderson 1955).
So K(x) exceeds L = ||s||^2 / z^2, z = Phi^-1((1 + miss) / 2), at an eigenvalue with
probability at most `miss`, whatever was computed and however long: where K > L, there is
none. No bound on the spectrum is needed.

For Ritz values t_i with residuals r_i, and the norms b_j of the remainders,

$$K(x) = P(x)^2 \Bigl(1 + \sum_i \frac{r_i^2}{(x - t_i)^2}\Bigr), \qquad
P(x) = \prod_i (x - t_i) / \prod_j b_j,$$

since (x - t_i) phi_i = r_i P, and P belongs to the next direction. A thick restart keeps
that direction and the Ritz vectors with their couplings r_i, so the formula stays: the
product then runs over the Ritz values that restarts have dropped, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

Intervals = tuple[tuple[float, float], ...]
_CELLS, _ROUNDS = 16, 12  # of a gap between two values, and how often an end is halved


@dataclass(frozen=True)
class Kernel:
    """K of a Krylov space, by what Lanczos leaves behind."""

    values: np.ndarray  # (m,) Ritz values of the basis
    residuals: np.ndarray  # (m,)
    dropped: np.ndarray  # Ritz values that thick restarts have dropped
    log_betas: float  # sum of the logarithms of all b_j; -inf: the space is exhausted

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant: K is infinite but at its Ritz values."""
        return self.log_betas == -math.inf

    @property
    def mirrored(self) -> Kernel:
        """That of -A."""
        return replace(self, values=-self.values, dropped=-self.dropped)

    def log_product(self, x: np.ndarray) -> np.ndarray:
        """The logarithm of P(x)^2 at x (p,); concave between its zeros."""
        zeros = np.concatenate([self.values, self.dropped])
        with np.errstate(divide="ignore"):
            logs = np.log(np.abs(x[:, None] - zeros))
        return np.asarray(2 * (logs.sum(1) - self.log_betas))

    def log_rest(self, distances: np.ndarray) -> np.ndarray:
        """The logarithm of the bracket, at distances (p, m) from the Ritz values."""
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.where(self.residuals > 0, self.residuals / distances, 0.0)
            return np.asarray(2 * np.log(np.hypot(1.0, np.linalg.norm(parts, axis=1))))

    def log(self, x: np.ndarray) -> np.ndarray:
        """The logarithm of K(x) at x (p,); at a Ritz value that of the number beside it."""
        if not self.exhausted:
            x = np.where(np.isin(x, self.values), np.nextafter(x, np.inf), x)
        distances = np.abs(x[:, None] - self.values)
        return np.asarray(self.log_product(x) + self.log_rest(distances))


def log_limit(squared_norm: float, miss: float) -> float:
    """The logarithm of L: K exceeds it at an eigenvalue with probability at most `miss`.

    Args:
        squared_norm: ||s||^2 of the start.
        miss: in (0, 1).
    """
    from scipy.special import ndtri

    return math.log(squared_norm) - 2 * math.log(ndtri((1 + miss) / 2))


def hiding(
    kernel: Kernel,
    limit: float,
    thresholds: tuple[float, float],
    centres: np.ndarray,
    halves: np.ndarray,
) -> Intervals:
    """Where K may be at most L: above the first threshold or below the second.

    Values within `halves` of `centres` count as found. Enclosed by a grid whose cells
    are refined: log P^2 is concave between its zeros, so its least value on a cell is at
    an end, and the bracket is least for the larger of the two distances. What is left
    out is ruled out, rounding apart.

    Args:
        kernel: K.
        limit: log L.
        thresholds: (low, high): looked at are x > low and x < high; infinite for neither.
        centres: (k,) among the Ritz values; beyond a threshold there are no others.
        halves: (k,) half widths.

    Returns:
        Intervals, ascending; none where nothing can hide.
    """
    low, high = thresholds
    found = _above(kernel, limit, low, centres, halves)
    mirrored = _above(kernel.mirrored, limit, -high, -centres, halves)
    return tuple((-b, -a) for a, b in reversed(mirrored)) + tuple(found)


def largest(kernel: Kernel, limit: float) -> float:
    """The largest x with K(x) <= L, at or above all Ritz values."""
    top = float(kernel.values.max())
    return top if kernel.exhausted else _end(kernel, limit, top)


def _above(
    kernel: Kernel, limit: float, low: float, centres: np.ndarray, halves: np.ndarray
) -> list[tuple[float, float]]:
    if kernel.exhausted or low == math.inf:
        return []
    found: list[tuple[float, float]] = []
    order = np.argsort(centres)
    for centre, half in zip(centres[order], halves[order], strict=True):
        if centre - half > low:
            found += _between(kernel, limit, low, centre - half)
        low = max(low, centre + half)
    if kernel.log(np.array([low]))[0] <= limit:
        found.append((low, _end(kernel, limit, low)))
    return found


def _between(
    kernel: Kernel, limit: float, low: float, high: float
) -> list[tuple[float, float]]:
    """Cells of [low, high] that are not ruled out, joined."""
    edges = np.linspace(low, high, _CELLS + 1)
    a, b = _open(kernel, limit, edges[:-1], edges[1:])
    if not len(a):
        return []
    for _ in range(_ROUNDS):
        split = (kernel.log(a) > limit) | (kernel.log(b) > limit)
        middle = (a + b)[split] / 2
        finer = np.append(a[split], middle), np.append(middle, b[split])
        finer = _open(kernel, limit, *finer)
        a, b = np.append(a[~split], finer[0]), np.append(b[~split], finer[1])
    order = np.argsort(a)
    return _joined(a[order], b[order])


def _open(
    kernel: Kernel, limit: float, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The cells [a, b] on which it is not shown that K > L throughout."""
    product = np.minimum(kernel.log_product(a), kernel.log_product(b))
    ends = np.abs(np.stack([a, b])[:, :, None] - kernel.values)
    open_ = product + kernel.log_rest(ends.max(0)) <= limit
    return a[open_], b[open_]


def _joined(a: np.ndarray, b: np.ndarray) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for low, high in zip(a.tolist(), b.tolist(), strict=True):
        if found and low <= found[-1][1]:
            low = found.pop()[0]
        found.append((low, high))
    return found


def _end(kernel: Kernel, limit: float, low: float) -> float:
    """The x >= low with K(x) = L, or low where K > L; beyond all Ritz values K rises."""

    def inside(x: float) -> bool:
        return bool(kernel.log(np.array([x]))[0] <= limit)

    width = float(np.ptp(kernel.values) + kernel.residuals.max())
    high = low
    while inside(high := high + width):
        width *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if inside(middle) else (low, middle)
    return high
