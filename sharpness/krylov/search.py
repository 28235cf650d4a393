"""The search for a few extreme eigenpairs: when to restart, when to stop, what to claim."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpness.krylov.lanczos import Lanczos, meets, ritz_pairs, thick, wanted


@dataclass(frozen=True)
class Found:
    """Eigenpairs, largest algebraic value first."""

    values: np.ndarray  # (k,) float64
    residuals: np.ndarray  # (k,)
    bounds: np.ndarray  # (k,)
    vectors: Tensor  # (k, n), rows orthonormal


class Search:
    """The k eigenpairs at one end (or both) of a symmetric matrix, product by product.

    It ends when the stopping rule (`lanczos.meets`) holds twice in a row. On trained
    networks stopping at the first time left a value out in one run of four, stopping at
    the second in one of fifteen.

    Args:
        v0: start (n,).
        generator: of further random starts.
        k: pairs wanted.
        which: "LA", "SA", "LM" or "BE", as in SciPy.
        tol: error wanted, relative to each value.
        basis_size: most vectors held; a full basis is shrunk by a thick restart.
    """

    def __init__(
        self,
        v0: Tensor,
        generator: torch.Generator,
        *,
        k: int,
        which: str,
        tol: float,
        basis_size: int,
    ) -> None:
        self.run = Lanczos(v0, generator, num_first=k, basis_size=basis_size)
        self._k, self._which, self._tol = k, which, tol
        self._basis_size = basis_size
        self._settled = 0

    @property
    def num_products(self) -> int:
        """Products absorbed so far."""
        return self.run.state.num_products

    @property
    def noise(self) -> float:
        """Rounding and asymmetry of the products seen; NaN before the first."""
        return self.run.state.noise if self.num_products else np.nan

    @property
    def is_converged(self) -> bool:
        """Whether the stopping rule has been met."""
        needed = 1 if self.num_products and self.run.state.invariant else 2
        return self._settled >= needed

    def direction(self) -> Tensor:
        """The unit vector (n,) to multiply next; shrinks the basis when it is full."""
        state = self.run.state
        if state.m >= self._basis_size:
            theta = ritz_pairs(state).values
            self.run.restart(thick(theta, self._k, self._which))
        return self.run.direction()

    def absorb(self, product: Tensor) -> None:
        """Take the product of `direction()` in.

        Raises:
            NonFiniteProductError: it is not finite.
        """
        self.run.absorb(product)
        met = meets(self.run.state, self._k, self._tol, self._which)
        self._settled = self._settled + 1 if met else 0

    def found(self, product_error: float = 0.0) -> Found:
        """What has been earned. Ends the search: the vectors take the basis' place.

        The error bound is the residual, which is proven; or `tol` times the value, if
        the search converged because r^2 / gap is below that. The quotient itself is not
        claimed: close eigenvalues that the Krylov space has not told apart beat it by far.

        Args:
            product_error: of the products, relative to the largest value.
        """
        state = self.run.state
        pairs = ritz_pairs(state)
        positions = wanted(pairs.values, self._k, self._which)
        pairs = pairs.at(positions)
        inexact = product_error * np.abs(pairs.values).max()
        bounds = state.noise + pairs.residuals + inexact
        if self.is_converged:
            trusted = self._tol * np.abs(pairs.values)
            bounds = np.minimum(bounds, np.maximum(pairs.bounds + inexact, trusted))
        self.run.restart(positions)
        vectors = self.run.state.basis
        return Found(pairs.values, pairs.residuals, bounds, vectors)
