"""Products from differences of gradients, for models without a second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sharpness._ranks import Vectors

Gradient = Callable[[Tensor], Tensor]
_LENGTHS = 12  # step lengths that are tried once
_RATIO = 4.0  # of each to the next
_SHORTER = 3  # further steps for a product that changes more than usual
_USUAL = 4.0  # times the change along the probe


class Differences:
    """v -> (g(theta + h v) - g(theta - h v)) / 2h, each product with its own error.

    The step is chosen once, along a direction of large curvature (the product of a
    random one): of twelve lengths the one whose product changes least when the step is
    four times as long. That balances rounding (short steps) against curvature that
    changes on the way (long ones). Every later product is compared with that of the
    longer step as well, four gradients in all. Where the two differ by more than usual,
    the gradient jumps on the way (at a kink of a ReLU), and shorter steps are tried:
    a jump inside a step counts by its size over the step, so two lengths agree only
    where neither meets one.

    Args:
        gradient: theta (n,) -> gradient (n,).
        theta: the point.
        vectors: how processes share theta and all vectors; None where each has them whole.

    Attributes:
        relative_error: the change along the probe over the product's norm: an estimate
            of the error of M v relative to the norm of M.
        probe: the direction it was taken along, (n,).
        product: M times it.
    """

    def __init__(
        self, gradient: Gradient, theta: Tensor, vectors: Vectors | None = None
    ) -> None:
        self._gradient, self._theta = gradient, theta
        self._vectors = vectors or Vectors(theta.numel())
        longest = 0.2 * (1.0 + self._norm(theta))
        lengths = [longest / _RATIO**i for i in range(_LENGTHS)]
        random = self._vectors.normal(theta, torch.Generator().manual_seed(0))
        random = random / random.new_tensor(self._norm(random))
        steep = self._along(random, lengths[_LENGTHS // 2])
        size = self._norm(steep)
        usable = math.isfinite(size) and size > 0
        self.probe = steep / steep.new_tensor(size) if usable else random
        products = [self._along(self.probe, length) for length in lengths]
        candidates = zip(lengths[1:], products[1:], products, strict=False)
        self._change, self._step, self.product = min(
            ((self._apart(near, far), length, near) for length, near, far in candidates),
            key=lambda candidate: candidate[0],
        )
        self.relative_error = _relative(self._change, self._norm(self.product))

    def __call__(self, v: Tensor) -> Tensor:
        """M v for (n,), or for each row of (b, n)."""
        return self.with_error(v)[0]

    def with_error(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """M v, and an estimate of its error's norm: a number, or (b,) for (b, n)."""
        if v.ndim == 2:
            if not len(v):
                return v.clone(), v.new_empty(0)
            products, errors = zip(*map(self.with_error, v), strict=True)
            return torch.stack(products), torch.stack(errors)
        length = self._norm(v)
        if not length:
            return torch.zeros_like(v), v.new_zeros(())
        step = self._step / length
        least, far, product = math.inf, self._along(v, step * _RATIO), torch.zeros_like(v)
        for _ in range(1 + _SHORTER):
            near = self._along(v, step)
            change = self._apart(near, far)
            if change <= least:
                least, product = change, near
            if change <= _USUAL * self._change * length:
                break
            step, far = step / _RATIO, near
        return product, v.new_tensor(least)

    def _along(self, v: Tensor, step: float) -> Tensor:
        ahead = self._gradient(self._theta + step * v)
        return (ahead - self._gradient(self._theta - step * v)) / (2 * step)

    def _norm(self, vector: Tensor) -> float:
        return self._vectors.norm(vector)

    def _apart(self, near: Tensor, far: Tensor) -> float:
        change = self._norm(near - far)
        return change if math.isfinite(change) else math.inf


def _relative(change: float, size: float) -> float:
    return change / size if size else math.inf if change else 0.0
