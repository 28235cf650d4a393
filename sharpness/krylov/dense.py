"""All of a small matrix by its products with unit vectors: an oracle without a method."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sharpness._results import NonFiniteProductError
from sharpness.krylov.eigenpair_search import Found
from sharpness.krylov.lanczos import wanted


class Dense:
    """As a `Search` is used: ask for `direction()`, `absorb` its product; n times.

    Args:
        like: a vector (n,) whose type and device the directions take.
        k: pairs wanted.
        which: "LA", "SA", "LM" or "BE".
    """

    def __init__(self, like: Tensor, *, k: int, which: str) -> None:
        self._like, self._k, self._which = like, k, which
        self._rows = np.empty((like.numel(), like.numel()))
        self.num_products = 0

    recurrence_error = 0.0  # there is none

    @property
    def is_whole(self) -> bool:
        """Whether every eigenvalue is known; before, none is."""
        return self.num_products == len(self._rows)

    is_converged = has_values = is_whole

    @cached_property
    def noise(self) -> float:
        """Asymmetry of the products and their rounding, Frobenius norms; NaN before."""
        if not self.is_whole:
            return np.nan
        eps = torch.finfo(self._like.dtype).eps
        skew = np.linalg.norm(self._rows - self._rows.T) / 2
        return float(skew + eps * np.linalg.norm(self._rows))

    def direction(self) -> Tensor:
        """The next unit vector (n,)."""
        unit = torch.zeros_like(self._like)
        unit[self.num_products] = 1
        return unit

    def absorb(self, product: Tensor, owned: bool = False) -> None:
        """Take the product of `direction()` in.

        Raises:
            NonFiniteProductError: it is not finite.
        """
        if not bool(product.isfinite().all()):
            raise NonFiniteProductError("the product is not finite")
        self._rows[self.num_products] = product.double().cpu().numpy()
        self.num_products += 1

    def upper(self, miss: float) -> float:
        """What the largest eigenvalue does not exceed, whatever `miss`."""
        return float(self._eigh[0][-1]) + self.noise

    def found(self, product_error: float = 0.0) -> Found:
        """The k pairs; `product_error` as in `Search.found`."""
        theta, vectors = self._eigh
        at = wanted(theta, self._k, self._which)
        values, rows = theta[at], torch.from_numpy(vectors.T[at].copy()).to(self._like)
        bounds = np.full(len(at), self.noise + product_error * np.abs(theta).max())
        return Found(values, np.zeros(len(at)), bounds, rows, ())

    @cached_property
    def _eigh(self) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh((self._rows + self._rows.T) / 2)
        return values, vectors
