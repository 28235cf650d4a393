"""The search for a few extreme eigenpairs: when to restart, when to stop, what to claim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpness._ranks import Vectors
from sharpness.krylov import certificate
from sharpness.krylov.certificate import Intervals, Kernel
from sharpness.krylov.lanczos import (
    Lanczos,
    allowed,
    meets,
    ritz_pairs,
    thick,
    thresholds,
    wanted,
)


@dataclass(frozen=True)
class Found:
    """Eigenpairs, largest algebraic value first."""

    values: np.ndarray  # (k,) float64
    residuals: np.ndarray  # (k,)
    bounds: np.ndarray  # (k,)
    vectors: Tensor  # (k, n), rows orthonormal
    hidden: Intervals | None  # where a value may hide; None without a certificate


class Search:
    """The k eigenpairs at one end (or both) of a symmetric matrix, product by product.

    It ends when the values meet `lanczos.meets` and none can hide beyond them
    (`krylov.certificate`), each with probability `miss` at most. Without a certificate it
    ends when `meets` holds twice in a row: on trained networks that left a value out in
    one run of fifteen.

    Args:
        v0: start (n,), c + g with g standard normal and c independent of g.
        generator: of further random starts.
        k: pairs wanted.
        which: "LA", "SA", "LM" or "BE", as in SciPy.
        tol: error wanted, relative to each value.
        miss: probability, for each of the k, that it is overlooked; None for no
            certificate.
        basis_size: most vectors held; a full basis is shrunk by a thick restart.
        vectors: how the processes share them, as in `Lanczos`.
        dtype: of the vectors held; by default that of `v0`.
    """

    def __init__(
        self,
        v0: Tensor,
        generator: torch.Generator,
        *,
        k: int,
        which: str,
        tol: float,
        miss: float | None,
        basis_size: int,
        vectors: Vectors | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._squared_norm = (vectors or Vectors(v0.numel())).dot(v0, v0)
        self.run = Lanczos(v0, generator, k, basis_size, vectors, dtype)
        self._k, self._which, self._tol, self._miss = k, which, tol, miss
        self.basis_size = basis_size
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
    def recurrence_error(self) -> float:
        """What a residual by the recurrence may be off by; 0 in the whole space.

        `noise` is the part of the products' errors inside the basis, m of n directions;
        they are taken to be alike in all.
        """
        state = self.run.state
        if self.is_whole or not state.m:
            return 0.0
        return float(self.noise * math.sqrt(self.run.n / state.m))

    @property
    def is_narrow(self) -> bool:
        """Whether vectors are held in a narrower type than the products."""
        return self.run.state.store.is_narrow

    @property
    def is_converged(self) -> bool:
        """Whether the stopping rule has been met."""
        once = self._miss is not None or (self.num_products and self.run.state.invariant)
        return self._settled >= (1 if once else 2)

    @property
    def has_values(self) -> bool:
        """Whether there is anything to report."""
        return self.num_products > 0

    @property
    def is_whole(self) -> bool:
        """Whether every eigenvalue is among the Ritz values."""
        return self.run.is_whole

    def direction(self) -> Tensor:
        """The unit vector (n,) to multiply next; shrinks the basis when it is full."""
        state = self.run.state
        if state.m >= self.basis_size:
            theta = ritz_pairs(state).values
            self.run.restart(thick(theta, self._k, self._which))
        return self.run.direction()

    def absorb(self, product: Tensor, owned: bool = False) -> None:
        """Take the product of `direction()` in; `owned`: its memory may be written to.

        Raises:
            NonFiniteProductError: it is not finite.
        """
        self.run.absorb(product, owned)
        self._settled = self._settled + 1 if self._meets_rule() else 0

    def _meets_rule(self) -> bool:
        met = meets(self.run.state, self._k, self._tol, self._which)
        return met and not self.hidden()

    def frozen(self) -> dict[str, Tensor]:
        """All that `thawed` needs to go on from here; see `Lanczos.frozen`."""
        of_search = torch.tensor([self._squared_norm], dtype=torch.float64)
        return {**self.run.frozen(), "search": of_search}

    def fits(self, saved: Mapping[str, Tensor]) -> bool:
        """Whether `thawed` can go on from it: nothing lacks, all is finite and fits."""
        norm = saved.get("search")
        known = norm is not None and norm.dtype == torch.float64 and norm.shape == (1,)
        sound = known and 0 < float(saved["search"]) < math.inf
        return sound and self.run.fits(saved) and len(saved["basis"]) <= self.basis_size

    def thawed(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `frozen` gave, in a search like that one.

        Whether it has settled is asked anew: a file is not believed.
        """
        self._squared_norm = float(saved["search"])
        self.run.thawed(saved)
        self._settled = int(self._meets_rule())

    def hidden(self) -> Intervals | None:
        """Where one of the wanted may hide, further than `tol` from all that are found.

        Each of the k escapes with probability `miss` at most; None without a certificate.
        """
        state = self.run.state
        if self._miss is None:
            return None
        if state.m < self._k and not self.is_whole:
            return ((-math.inf, math.inf),)
        kernel = self._kernel()
        values = kernel.values[wanted(kernel.values, self._k, self._which)]
        errors = allowed(values, state.noise, self._tol)
        beyond = thresholds(values, errors, self._which)
        limit = certificate.log_limit(self._squared_norm, self._miss)
        return certificate.hiding(kernel, limit, beyond, values, errors)

    def upper(self, miss: float) -> float:
        """What the largest eigenvalue exceeds with probability `miss` at most."""
        limit = certificate.log_limit(self._squared_norm, miss)
        return certificate.largest(self._kernel(), limit) + self.noise

    def _kernel(self) -> Kernel:
        state = self.run.state
        pairs = ritz_pairs(state)
        return Kernel(pairs.values, pairs.couplings, state.dropped, state.log_betas)

    def found(self, product_error: float = 0.0) -> Found:
        """What has been earned. Ends the search: the vectors take the basis' place.

        The error bound is the residual, which is proven; or `tol` times the value, if
        the search converged because r^2 / gap is below that. The quotient itself is not
        claimed: close eigenvalues that the Krylov space has not told apart beat it by far.

        Args:
            product_error: of the products, relative to the largest value.
        """
        state, hidden = self.run.state, self.hidden()
        pairs = ritz_pairs(state)
        positions = wanted(pairs.values, self._k, self._which)
        pairs = pairs.at(positions)
        inexact = product_error * np.abs(pairs.values).max()
        bounds = state.noise + pairs.residuals + inexact
        if self.is_converged:
            trusted = self._tol * np.abs(pairs.values)
            bounds = np.minimum(bounds, np.maximum(pairs.bounds + inexact, trusted))
        if state.store.is_narrow:
            vectors = self.run.ended(pairs.coefficients)
        else:
            self.run.restart(positions)
            vectors = self.run.state.basis
        return Found(pairs.values, pairs.residuals, bounds, vectors, hidden)
