"""f, and the accuracy in the same pass, at other thetas: several at once by vmap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpness.risk.chunks import ChunkedMean
from sharpness.risk.footprints import Footprints
from sharpness.risk.objective import Objective

# On a CPU several thetas at once save calls, not arithmetic: it pays where everything
# fits a processor's cache, and costs up to twice the time where it does not.
_CPU_BYTES = 1 << 24
_MOST = 64
Point = tuple[Tensor, Tensor]  # f in float64 and the number of right answers, 0-d or (b,)


@dataclass(frozen=True)
class Points:
    """What a forward pass over the data gives.

    Args:
        objective: what is evaluated.
        mean: over the data.
        is_right: (outputs, targets) -> True where a class is right; None where there are
            no classes.
    """

    objective: Objective
    mean: ChunkedMean
    is_right: Callable[[Tensor, Tensor], Tensor] | None

    def at(self, leaves: Sequence[Tensor]) -> Point:
        """At one theta, given in pieces. Cost: a forward pass."""
        value = torch.zeros((), dtype=torch.float64, device=self.objective.device)
        right = torch.zeros((), dtype=torch.int64, device=self.objective.device)
        if self.is_right is None:
            for share in self.mean.shares(leaves):
                value = value + share.detach().double()
            return value, right
        for batch, outputs, share in self.mean.shares_and_outputs(leaves):
            right = right + self.is_right(outputs, batch[1]).sum()
            value = value + share.double()
        return value, right

    def at_several(self, pieces: Sequence[Sequence[Tensor]]) -> Point | None:
        """At several thetas, each in pieces, at once; None where a layer has no rule."""
        stacked = tuple(torch.stack(same) for same in zip(*pieces, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # vmap warns of loops: nothing is gained
            try:
                found: Point = torch.func.vmap(self.at, randomness="same")(stacked)
                return found
            except torch.OutOfMemoryError:
                raise
            except Exception:  # in many ways; a true error shows again point by point
                return None

    def at_once(self, batchnorm: str) -> int:
        """How many thetas a pass should take, by the memory of a product."""
        largest: Any = max((c.batch for c in self.mean.counted), key=lambda b: len(b[1]))
        footprints = Footprints(self.objective, batchnorm, self.mean.mean, self.mean.budget)
        on_cpu = self.objective.device.type == "cpu"
        room = _CPU_BYTES if on_cpu else self.mean.budget // 4
        return max(1, min(_MOST, room // footprints.of(largest).peak))
