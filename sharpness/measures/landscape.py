"""What does the risk look like between two minima? The parametric plot."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sharpness import _tensors
from sharpness._arguments import of_a_risk
from sharpness._results import Cost, Reading, Result, Status, counted
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.model_state import unwrapped

if TYPE_CHECKING:
    from pathlib import Path

    from sharpness.report.figures import Figure


@dataclass(frozen=True, kw_only=True)
class Interpolation(Result):
    """Risk and accuracy along the line, or the arc, through two points."""

    alphas: tuple[float, ...]
    values: tuple[float, ...]  # f at each alpha
    accuracies: tuple[float, ...]  # in [0, 1]; none where targets are no classes

    def _rows(self) -> Iterable[Reading]:
        """How far f rises between the two above the higher of them, and the largest f."""
        at = dict(zip(self.alphas, self.values, strict=True))
        between = [value for alpha, value in at.items() if 0 <= alpha <= 1]
        if {0.0, 1.0} <= at.keys():
            barrier = max(between) - max(at[0.0], at[1.0])
            evidence = f"of {counted(len(between), 'point')} from 0 to 1"
            yield Reading(name="barrier", value=barrier, evidence=evidence, bound="≥")
        value, alpha = max(zip(self.values, self.alphas, strict=True))
        evidence = f"at alpha {alpha:g}, of {counted(len(self.alphas), 'point')}"
        yield Reading(name="largest f", value=value, evidence=evidence)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Loss and accuracy from one network to the other; a matplotlib figure.

        Args:
            path: where the PNG goes, if anywhere.
        """
        from sharpness.report.figures import way_plot

        return way_plot(self.alphas, self.values, self.accuracies, path)


@of_a_risk
def interpolation(
    risk: EmpiricalRisk,
    other: Tensor | Mapping[str, Tensor] | nn.Module,
    alphas: Iterable[float] | None = None,
    *,
    arc: bool = False,
) -> Interpolation:
    """Risk and accuracy at (1 - alpha) theta + alpha `other`, or on an arc through both.

    Buffers stay those of the model: with `batchnorm="running"` the statistics fit only
    alpha = 0, so the paper's picture needs `batchnorm="batch"` (or `"recalibrated"`).

    Args:
        risk: f and theta, the point at alpha = 0 (in the paper: small batch).
        other: parameters at alpha = 1 (large batch): (n,), a state dict, or the
            other network.
        alphas: where to look; by default 25 points from -1 to 2.
        arc: look at cos(alpha pi/2) theta + sin(alpha pi/2) `other` instead.

    Raises:
        ValueError: `other` has another length than theta.

    Cost: a forward pass a point, and one more for the accuracy of a classifier.

    References:
        Keskar et al. (2017), figures 3 and 7 (the arc); Goodfellow et al. (2015),
        arXiv:1412.6544.
    """
    if isinstance(other, nn.Module):
        other = unwrapped(other)[0].state_dict()
    end = _tensors.flat_like(other, risk.names, risk.shapes, "other")
    default = (i / 8 - 1 for i in range(25))
    points = tuple(float(alpha) for alpha in (default if alphas is None else alphas))
    way, end = _on_arc if arc else _on_line, end.to(risk.theta)
    thetas, began = [way(risk.theta, end, alpha) for alpha in points], time.monotonic()
    values = tuple(risk.value(theta) for theta in thetas)
    classes = risk.is_classification
    return Interpolation(
        alphas=points,
        values=values,
        accuracies=tuple(map(risk.accuracy, thetas)) if classes else (),
        status=Status.worst(finite=all(map(math.isfinite, values))),
        cost=Cost(forwards=(1 + classes) * len(points), seconds=time.monotonic() - began),
        settings={"arc": arc},
    )


def _on_line(theta: Tensor, end: Tensor, alpha: float) -> Tensor:
    return theta.lerp(end, alpha)


def _on_arc(theta: Tensor, end: Tensor, alpha: float) -> Tensor:
    angle = alpha * math.pi / 2
    return math.cos(angle) * theta + math.sin(angle) * end
