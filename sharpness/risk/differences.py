"""Products from differences of gradients, for models without a second derivative."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharpness import _tensors

Gradient = Callable[[Tensor], Tensor]
_STEPS = 7  # step lengths that are tried once, each a quarter of the one before


class Differences:
    """v -> (g(theta + h v) - g(theta - h v)) / 2h, two gradients a product.

    The step is chosen once, for a random direction: of seven lengths the one whose
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
        probe = _tensors.random_unit(theta, torch.Generator().manual_seed(0))
        reach = 1.0 + float(_tensors.norm64(theta))
        steps = [reach * 0.1 * 4.0**-i for i in range(_STEPS)]
        self.relative_error, self._step = min(
            (self._change(probe, step), step) for step in steps
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

    def _change(self, v: Tensor, step: float) -> float:
        near, far = self._along(v, step), self._along(v, 2 * step)
        size = float(_tensors.norm64(near))
        change = float(_tensors.norm64(near - far))
        return change / size if size else float(change > 0)
