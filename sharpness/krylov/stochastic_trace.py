"""Stochastic estimates of a trace: Hutchinson, Hutch++ and XTrace.

All three give estimates whose mean is the value and whose spread is its error. A is
symmetric, (n, n), and known by `multiply`: (b, n) -> (b, n), row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sharpness._ranks import Vectors
from sharpness._tensors import float64, random_signs

Multiply = Callable[[Tensor], Tensor]
_PASSES, _MOST_PASSES = 2, 8  # of Gram-Schmidt


class Probes:
    """Random signs (n,), each by its own number: drawn again instead of kept.

    With `vectors`, which say how processes share them, this one's part of each.
    """

    def __init__(self, like: Tensor, seed: int, vectors: Vectors | None = None) -> None:
        self._like, self._seed, self._vectors = like, seed, vectors  # seed >= 0

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, (stop - start, n)."""
        return torch.stack([self._row(i) for i in range(start, stop)])

    def _row(self, i: int) -> Tensor:
        # PyTorch's CPU generator looks at 32 bits of its seed.
        mixed = int(np.random.SeedSequence(self._seed, spawn_key=(i,)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        if self._vectors is None:
            return random_signs(self._like, generator)
        draw = self._vectors.normal(self._like, generator)
        return (draw >= 0).to(draw).mul_(2).sub_(1)


class Estimator(Protocol):
    """Estimates of a trace that can be made more precise."""

    products_a_probe: int
    fixed_products: int  # whatever the number of probes
    estimates: np.ndarray  # (s,); their mean is the value

    def grow(self, multiply: Multiply, num: int) -> None:
        """Have `num` estimates. What an interrupt leaves is as before, or further."""


class Hutchinson:
    """z^T A z for random signs z (Girard 1989; Hutchinson 1990).

    Variance of one: twice the squared Frobenius norm of A without its diagonal. With
    `vectors` it takes vectors in parts.
    """

    products_a_probe, fixed_products = 1, 0

    def __init__(self, like: Tensor, seed: int, vectors: Vectors | None = None) -> None:
        self._probes = Probes(like, seed, vectors)
        self._vectors = vectors or Vectors(like.numel())
        self.estimates = np.empty(0)

    def grow(self, multiply: Multiply, num: int) -> None:
        """Have `num` estimates, one product each."""
        for i in range(len(self.estimates), num):
            z = self._probes(i, i + 1)
            own = torch.from_numpy(_dots(z, multiply(z)))
            self.estimates = np.append(self.estimates, self._vectors.total(own).numpy())


class Sketch:
    """An orthonormal basis Q (s, n) of A times random signs, and T = Q A Q^T.

    In it lie, nearly, the largest eigenvectors.
    """

    def __init__(self, like: Tensor) -> None:
        self.q = like.new_empty((0, like.numel()))
        self.t = np.empty((0, 0))
        self.r = np.empty((0, 0))  # of what was taken in: Y = R^T Q

    def extended(self, y: Tensor, multiply: Multiply) -> tuple[Sketch, Tensor]:
        """With the rows of y taken in, and A times the new rows of Q."""
        added, above, corner = _orthonormal(y, self.q)
        z = multiply(added)
        new = Sketch(self.q[0] if len(self.q) else y[0])
        new.q = torch.cat([self.q, added])
        side, last = _gram(self.q, z), _gram(added, z)
        new.t = np.block([[self.t, side], [side.T, (last + last.T) / 2]])
        zeros = np.zeros((len(added), self.r.shape[1]))
        new.r = np.block([[self.r, above], [zeros, corner]])
        return new, z

    def overlaps(self, rows: Tensor) -> np.ndarray:
        """Q times each row, (s, rows)."""
        return _gram(self.q, rows)

    def without(self, rows: Tensor) -> Tensor:
        """The rows, freed of the sketch."""
        return rows - (rows @ self.q.T) @ self.q


class HutchPlusPlus:
    """The trace on a sketch exactly, and Hutchinson's estimate of the rest.

    Meyer, Musco, Musco, Woodruff (2021), SOSA, algorithm 1: a third of the products each
    for the sketch, for A on it, and for the rest.
    """

    products_a_probe, fixed_products = 3, 0

    def __init__(self, like: Tensor, seed: int) -> None:
        self._sketching, self._probes = Probes(like, 2 * seed), Probes(like, 2 * seed + 1)
        self._sketch = Sketch(like)
        self._a, self._w, self._h = np.empty(0), np.empty((0, 0)), np.empty((0, 0))
        self.estimates = np.empty(0)

    def grow(self, multiply: Multiply, num: int) -> None:
        """Have `num` estimates: as many directions in the sketch, as many probes."""
        old = len(self._a)
        sketch, z = self._sketch.extended(multiply(self._sketching(old, num)), multiply)
        w, h = self._w, self._h
        if old:  # the earlier probes in the new directions
            before = self._probes(0, old)
            w = np.vstack([w, _gram(sketch.q[old:], before)])
            h = np.vstack([h, _gram(z, before)])
        g = self._probes(old, num)
        product = multiply(g)
        w, h = _beside(w, sketch.overlaps(g)), _beside(h, sketch.overlaps(product))
        self._a = np.append(self._a, _dots(g, product))
        self._sketch, self._w, self._h = sketch, w, h
        with np.errstate(invalid="ignore"):  # of an infinite matrix
            rest = self._a - 2 * (w * h).sum(0) + (w * (sketch.t @ w)).sum(0)
            self.estimates = np.trace(sketch.t) + rest


class XTrace:
    """Hutch++ with every probe also in the sketch of all the others.

    Epperly, Tropp, Webber (2024), SIAM J. Matrix Anal. Appl. 45(1), section 2.1: the mean
    of s estimates, each with one probe for the rest and the others for the sketch. They
    are exchangeable, not independent, and their spread is a third too small. So it is the
    jackknife's: what is kept is mean + (s - 1) (mean of T_j - T_j), with T_j all of it
    without probe j. Its variance is at least that of s - 1 probes on average (Efron and
    Stein 1981, Ann. Stat. 9(3)).
    """

    products_a_probe, fixed_products = 2, 0

    def __init__(self, like: Tensor, seed: int) -> None:
        self._probes, self._sketch = Probes(like, seed), Sketch(like)
        self._a, self._w = np.empty(0), np.empty((0, 0))
        self.estimates = np.empty(0)

    def grow(self, multiply: Multiply, num: int) -> None:
        """Have `num` pseudo-values of the jackknife."""
        old = len(self._a)
        g = self._probes(old, num)
        y = multiply(g)
        sketch, _ = self._sketch.extended(y, multiply)
        w = self._w
        if old:
            w = np.vstack([w, _gram(sketch.q[old:], self._probes(0, old))])
        self._w = _beside(w, sketch.overlaps(g))
        self._a = np.append(self._a, _dots(g, y))
        self._sketch = sketch
        self.estimates = self._pseudo_values()

    def _pseudo_values(self) -> np.ndarray:
        t, w, h, num = self._sketch.t, self._w, self._sketch.r, len(self._a)
        if not (np.isfinite(h).all() and np.isfinite(t).all()):
            return np.full(num, np.nan)
        if len(t) < num:  # the whole space, also without one probe
            return np.full(num, np.trace(t))
        # Column i is orthogonal to the products of all other probes.
        left = np.linalg.pinv(h, rcond=0).T
        norms = np.linalg.norm(left, axis=0)
        left = np.where(norms > 0, left / np.where(norms > 0, norms, 1), np.eye(num))
        g, b = left.T @ left, left.T @ t @ left
        u, v, c = left.T @ w, left.T @ h, left.T @ t @ w
        own, form = np.diag(u), np.diag(b)
        rest = self._a - 2 * (w * h).sum(0) + (w * (t @ w)).sum(0)
        rest += 2 * own * (np.diag(v) - np.diag(c)) + own**2 * form
        estimates = np.trace(t) - form + rest
        # Without probe j too: what is left of column j beside column i goes as well.
        square = 1 - g**2
        length = np.sqrt(np.where(square > 1e-12, square, np.inf))

        def beside(x: np.ndarray) -> np.ndarray:  # x[j, i] -> for the rest of j, [i, j]
            return np.asarray((x.T - g * np.diag(x)[:, None]) / length)

        forms = (form - 2 * g * b + g**2 * form[:, None]) / length**2
        change = beside(u) * (beside(v) - beside(c) + own[:, None] * beside(b))
        fewer = estimates[:, None] - forms + 2 * change + beside(u) ** 2 * forms
        np.fill_diagonal(fewer, 0)
        means = fewer.sum(0) / (num - 1)
        pseudo: np.ndarray = estimates.mean() + (num - 1) * (means.mean() - means)
        return pseudo


def _orthonormal(y: Tensor, q: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Rows that span those of y beside those of q: y = above^T q + corner^T rows.

    Twice, since what is left of y after the first pass may be rounding.
    """
    if len(q) + len(y) > y.shape[1]:  # more than there are dimensions
        full = torch.linalg.qr(torch.cat([q, y]).T).Q.T
        rows = full[len(q) :].contiguous()
        return rows, _gram(q, y), _gram(rows, y)
    above, corner, rows = np.zeros((len(q), len(y))), np.eye(len(y)), y
    limit, generator = torch.finfo(y.dtype).eps ** 0.5, torch.Generator().manual_seed(0)
    for i in range(_MOST_PASSES):
        part = _gram(q, rows)
        # Where y adds nothing to q the rounding that is left may lie in the span of q, and
        # no pass leads out of it; any other direction does as well there.
        lost = np.abs(part).max(0, initial=0) > limit
        if i >= _PASSES and not lost.any():
            break
        if i >= _PASSES:
            rows, corner = rows.clone(), np.where(lost[:, None], 0, corner)
            for row in np.flatnonzero(lost):
                rows[row] = random_signs(y[0], generator)
            part = _gram(q, rows)
        rows = rows - torch.from_numpy(part.T).to(q) @ q
        columns, r = torch.linalg.qr(rows.T)
        with np.errstate(invalid="ignore"):  # of an infinite matrix
            above, corner = above + part @ corner, float64(r) @ corner
        rows = columns.T.contiguous()
    return rows, above, corner


def _gram(a: Tensor, b: Tensor) -> np.ndarray:
    return float64(a @ b.T)


def _dots(a: Tensor, b: Tensor) -> np.ndarray:
    """Inner products row by row, in float64."""
    pairs = zip(a, b, strict=True)
    return np.array([float(torch.dot(x.double(), y.double())) for x, y in pairs])


def _beside(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return b if not a.size else np.hstack([a, b])
