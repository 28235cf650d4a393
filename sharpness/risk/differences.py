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

    The step is chosen once, along a direction of large curvature (the product of a
    random one): of twelve lengths the one whose product changes least when the step is
    doubled. That balances rounding (short steps) against curvature that changes on the
    way (long ones).

    Args:
        gradient: theta (n,) -> gradient (n,).
        theta: the point.

    Attributes:
        relative_error: that change over the product's norm: an estimate of the error of
            M v relative to the norm of M.
        probe: the direction it was taken along, (n,).
        product: M times it.
    """

    def __init__(self, gradient: Gradient, theta: Tensor) -> None:
        self._gradient, self._theta = gradient, theta
        longest = 0.2 * (1.0 + float(_tensors.norm64(theta)))
        lengths = [longest * 0.5**i for i in range(_LENGTHS)]
        random = _tensors.random_unit(theta, torch.Generator().manual_seed(0))
        steep = self._along(random, lengths[_LENGTHS // 2])
        size = _tensors.norm64(steep)
        usable = bool(torch.isfinite(size)) and float(size) > 0
        self.probe = steep / size.to(steep.dtype) if usable else random
        products = [self._along(self.probe, length) for length in lengths]
        candidates = zip(lengths[1:], products[1:], products, strict=False)
        self.relative_error, self._step, self.product = min(
            ((_change(near, far), length, near) for length, near, far in candidates),
            key=lambda candidate: candidate[0],
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
