"""The ball of a norm, with what an ascent over it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sharpness._tensors import norm64

Norm = Literal["l2", "linf"]


@dataclass(frozen=True)
class Ball:
    """All u (n,) with ||u|| <= radius, in the Euclidean or the maximum norm."""

    norm: Norm
    radius: float

    def project(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """The nearest point of the ball."""
        if self.norm == "linf":
            return torch.clamp(u, -self.radius, self.radius, out=out)
        length = float(norm64(u))
        return u if length <= self.radius else torch.mul(u, self.radius / length, out=out)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit step along which a linear function rises most; 0 for a gradient of 0.

        g/||g|| in the Euclidean norm, sign(g) in the maximum norm: the dual norm's
        direction (Foret et al. 2021, eq. 2).
        """
        if self.norm == "linf":
            return gradient.sign()
        length = float(norm64(gradient))
        if torch.finfo(gradient.dtype).tiny < length < math.inf:
            return gradient / length
        largest = gradient.abs().max()
        if not float(largest) > 0:
            return torch.zeros_like(gradient)
        scaled = gradient / largest  # so that tiny gradients keep their direction
        return scaled / norm64(scaled).to(scaled.dtype)
