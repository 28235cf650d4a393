"""Products from differences of gradients, for models without a second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sharpness import _tensors

Gradient = Callable[[Tensor], Tensor]
_LENGTHS = 12  # step lengths that are tried once, each half of the one before


class Differences:
    """v -> (g(theta + h v) - g(theta - h v)) / 2h, two gradients a product.

    The step is chosen once, for a random direction: of twelve lengths the one whose
    product changes least when the step is doubled, which balances rounding (short
    steps) against curvature that changes (long ones).

    Args:
        gradient: theta (n,) -> gradient (n,).
        theta: the point.

    Attributes:
        relative_error: that change over the product's norm, an estimate of the error of
            any product.
    """

    def __init__(self, gradient: Gradient, theta: Tensor) -> None:
        self._gradient, self._theta = gradient, theta
        v = _tensors.random_unit(theta, torch.Generator().manual_seed(0))
        longest = 0.2 * (1.0 + float(_tensors.norm64(theta)))
        lengths = [longest * 0.5**i for i in range(_LENGTHS)]
        products = [self._along(v, length) for length in lengths]
        self.relative_error, self._step = min(
            (_change(near, far), length)
            for length, near, far in zip(lengths[1:], products[1:], products, strict=False)
        )

    def __call__(self, v: Tensor) -> Tensor:
        """M v for (n,), or for each row of (b, n)."""
        if v.ndim == 2:
            return torch.stack([self(row) for row in v]) if len(v) else v.clone()
        length = float(_tensors.norm64(v))
        return self._along(v, self._step / length) if length else torch.zeros_like(v)

    def _along(self, v: Tensor, step: float) -> Tensor:
        ahead = self._gradient(self._theta + step * v)
        return (ahead - self._gradient(self._theta - step * v)) / (2 * step)


def _change(near: Tensor, far: Tensor) -> float:
    size, change = float(_tensors.norm64(near)), float(_tensors.norm64(near - far))
    relative = change / size if size else float(change > 0)
    return relative if math.isfinite(relative) else math.inf
