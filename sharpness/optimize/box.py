"""The box, and what every maximiser over it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]


@dataclass(frozen=True)
class Box:
    """All points (p,) with lower <= point <= upper, element by element."""

    lower: Tensor  # (p,)
    upper: Tensor  # (p,)

    def clip(self, point: Tensor) -> Tensor:
        """The nearest point of the box."""
        return point.clamp(self.lower, self.upper)


@dataclass(frozen=True)
class Maximum:
    """The best point so far, and what it took."""

    point: Tensor  # (p,), inside the box
    value: float
    num_evals: int  # values with gradient
    num_iters: int
    message: str
    stopped: bool  # nothing more to gain here, whatever budget is left
