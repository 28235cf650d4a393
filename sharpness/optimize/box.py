"""The box, and what every maximiser over it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]


@dataclass(frozen=True)
class Box:
    """All points (p,) with lower <= point <= upper, element by element."""

    lower: Tensor  # (p,)
    upper: Tensor  # (p,)

    def clip(self, point: Tensor, out: Tensor | None = None) -> Tensor:
        """The nearest point of the box."""
        return torch.clamp(point, self.lower, self.upper, out=out)

    def stepped(self, point: Tensor, direction: Tensor, step: float) -> Tensor:
        """The point of the box nearest to point + step direction, in one new vector."""
        ahead = torch.add(point, direction, alpha=step)
        return self.clip(ahead, out=ahead)


@dataclass(frozen=True)
class Maximum:
    """The best point so far, and what it took."""

    point: Tensor  # (p,), inside the box
    value: float
    num_evals: int  # values with gradient
    num_iters: int
    message: str
    stopped: bool  # nothing more to gain here, whatever budget is left
