"""What does the risk look like between two minima? Lines, arcs and bent paths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpness import _progress, _tensors
from sharpness._arguments import of_a_risk, positive, whole
from sharpness._results import Cost, Reading, Result, Status, counted
from sharpness._run import Run
from sharpness.measures.directions import Network, parameters_of
from sharpness.risk.empirical import EmpiricalRisk

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from sharpness.report.figures import Figure

Way = Callable[[float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Interpolation(Result):
    """Risk and accuracy along a line, an arc or a bent path through two points."""

    alphas: tuple[float, ...]
    values: tuple[float, ...]  # f at each alpha
    accuracies: tuple[float, ...]  # in [0, 1]; none where targets are no classes

    @property
    def barrier(self) -> float:
        """How far f rises from 0 to 1 above the higher end; NaN if one was not seen."""
        at = dict(zip(self.alphas, self.values, strict=True))
        if not {0.0, 1.0} <= at.keys():
            return math.nan
        between = [value for alpha, value in at.items() if 0 <= alpha <= 1]
        known = not any(map(math.isnan, between))
        return max(between) - max(at[0.0], at[1.0]) if known else math.nan

    def _rows(self) -> Iterable[Reading]:
        """How far f rises between the two above the higher of them, and the largest f."""
        num = sum(0 <= alpha <= 1 for alpha in self.alphas)
        if {0.0, 1.0} <= set(self.alphas):
            evidence = f"of {counted(num, 'point')} from 0 to 1"
            yield Reading(name="barrier", value=self.barrier, evidence=evidence, bound="≥")
        value, alpha = max(zip(self.values, self.alphas, strict=True))
        evidence = f"at alpha {alpha:g}, of {counted(len(self.alphas), 'point')}"
        yield Reading(name="largest f", value=value, evidence=evidence)

    def drawn(self) -> tuple[Sequence[str], list[tuple[float, ...]]]:
        """Loss, and accuracy where there is one, at each alpha."""
        shown = {"alpha": self.alphas, "loss": self.values}
        if self.accuracies:
            shown["accuracy"] = self.accuracies
        return list(shown), list(zip(*shown.values(), strict=True))

    def _figure(self, path: Any, ax: Any) -> Any:
        """Loss and accuracy from one network to the other."""
        from sharpness.report.figures import way_plot

        return way_plot(self.alphas, self.values, self.accuracies, path, ax=ax)


@dataclass(frozen=True, kw_only=True)
class LowLossPath(Result):
    """A bent path between two networks, and the straight line beside it."""

    path: Interpolation
    line: Interpolation
    bend: Tensor = field(repr=False, compare=False)  # (n,) the control point
    losses: tuple[float, ...]  # f at the point of each step

    def _rows(self) -> Iterable[Reading]:
        """The barrier of the path, then that of the line."""
        num, axis = len(self.path.alphas), "rise of f above the higher end"
        evidence = f"of {counted(num, 'point')}, {counted(len(self.losses), 'step')}"
        facts: dict[str, Any] = {"bound": "≥", "axis": axis}
        yield Reading(
            name="barrier of the path", value=self.path.barrier, evidence=evidence, **facts
        )
        evidence = f"of {counted(num, 'point')}"
        yield Reading(
            name="barrier of the line", value=self.line.barrier, evidence=evidence, **facts
        )

    def drawn(self) -> tuple[Sequence[str], list[tuple[float, ...]]]:
        """At each t the loss and accuracy of the path, and the loss of the line."""
        (_, *names), rows = self.path.drawn()
        line = dict(zip(self.line.alphas, self.line.values, strict=True))
        beside = [(*row, line.get(row[0], math.nan)) for row in rows]
        return ["t", *(f"{name} of the path" for name in names), "loss of the line"], beside

    def plot(self, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
        """Loss and accuracy along the path, and the loss on the line (dashed).

        Args:
            path: where the PNG goes, if anywhere.
            ax: axes of your own figure, to draw there.
        """
        from sharpness.report.figures import way_plot

        return way_plot(
            self.path.alphas,
            self.path.values,
            self.path.accuracies,
            path,
            others=[("straight line", self.line.alphas, self.line.values)],
            labels=("t: 0 is the first network, 1 the other", "bent path"),
            both=True,
            ax=ax,
        )


@of_a_risk
def interpolation(
    risk: EmpiricalRisk,
    other: Network,
    alphas: Iterable[float] | None = None,
    *,
    arc: bool = False,
    progress: bool | None = None,
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
        progress: show a bar; by default on a terminal.

    Raises:
        ValueError: `other` has another length than theta.

    Cost: a forward pass a point, for loss and accuracy together.

    References:
        Keskar et al. (2017), figures 3 and 7 (the arc); Goodfellow et al. (2015),
        arXiv:1412.6544.
    """
    theta, end = risk.theta, parameters_of(risk, other)
    default = (i / 8 - 1 for i in range(25))
    points = tuple(float(alpha) for alpha in (default if alphas is None else alphas))

    def on_arc(alpha: float) -> Tensor:
        angle = alpha * math.pi / 2
        return math.cos(angle) * theta + math.sin(angle) * end

    def on_line(alpha: float) -> Tensor:
        return theta.lerp(end, alpha)

    found = _along(risk, on_arc if arc else on_line, points, progress)
    return replace(found, settings={"arc": arc})


@of_a_risk
def low_loss_path(
    risk: EmpiricalRisk,
    other: Network,
    *,
    num_steps: int = 200,
    learning_rate: float = 0.1,
    num_points: int = 21,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> LowLossPath:
    r"""A bent path of low loss from theta to another network, and its barrier.

    $$p(t) = (1-t)^2\, \theta + 2t(1-t)\, w + t^2\, \theta_{other}$$

    a quadratic Bezier curve whose control point w is trained for the mean of f over t.
    Networks with a high barrier on the line between them often have none on such a
    path; a barrier that stays says only that this search found no better one.
    As for `interpolation`, BatchNorm needs `batchnorm="batch"` or `"recalibrated"`.

    Args:
        risk: f and theta, the point at t = 0.
        other: parameters at t = 1: (n,), a state dict, or the other network.
        num_steps: of Adam, each with the gradient at one t, stratified over [0, 1]; the
            rate falls to 0 as a half cosine.
        learning_rate: of Adam, > 0, times the root mean square of `other` - theta.
        num_points: where path and line are seen, ends included, >= 3.
        seed: of the t.
        max_seconds: no step begins later than this; the path is seen all the same.
        progress: show a bar; by default on a terminal.

    Raises:
        ValueError: an argument outside its range, `other` of another length.

    Cost: a gradient a step, then 2 `num_points` forward passes; memory 6 vectors.

    References:
        Garipov et al. (2018), arXiv:1802.10026 (the curve, t uniform); Draxler et al.
        (2018), arXiv:1803.00885, find such paths as chains of points.
    """
    num_steps = whole("num_steps", num_steps, 1)
    num_points = whole("num_points", num_points, 3)
    rate, end = positive("learning_rate", learning_rate), parameters_of(risk, other)
    theta = risk.theta
    spread = float(_tensors.norm64(end - theta)) / math.sqrt(risk.n)
    bend = theta.lerp(end, 0.5)
    adam = torch.optim.Adam([bend], lr=rate * spread)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)

    def bent(t: float) -> Tensor:
        return (1 - t) ** 2 * theta + 2 * t * (1 - t) * bend + t**2 * end

    losses: list[float] = []
    run = Run(
        "gradients",
        max_seconds=max_seconds,
        total=num_steps,
        progress=progress,
        ranks=risk.ranks,
    )
    with run:
        for t in _stratified(num_steps, seed):
            run.step()
            loss, gradient = risk.value_and_gradient(bent(t))
            bend.grad = 2 * t * (1 - t) * gradient
            adam.step()
            falling.step()
            losses.append(loss)
    points = [i / (num_points - 1) for i in range(num_points)]
    path = _along(risk, bent, points, progress)
    line = _along(risk, lambda t: theta.lerp(end, t), points, progress)
    return LowLossPath(
        path=path,
        line=line,
        bend=bend.detach().cpu(),
        losses=tuple(losses),
        status=Status.worst(run.status, path.status, line.status),
        cost=path.cost + line.cost + Cost(gradients=run.num_steps, seconds=run.seconds),
        settings={
            "num_steps": num_steps,
            "learning_rate": learning_rate,
            "num_points": num_points,
            "seed": seed,
        },
    )


def _along(
    risk: EmpiricalRisk, way: Way, points: Iterable[float], progress: bool | None
) -> Interpolation:
    """Risk and accuracy at some points of a way."""
    began, places = time.monotonic(), tuple(points)
    seen = []
    with _progress.bar("points", len(places), progress) as bar:
        for place in places:
            seen.append(risk.values(way(place)[None]))
            bar.update(1)
    values, accuracies = (tuple(float(pair[i]) for pair in seen) for i in (0, 1))
    return Interpolation(
        alphas=places,
        values=values,
        accuracies=accuracies if risk.is_classification else (),
        status=Status.worst(finite=all(map(math.isfinite, values))),
        cost=Cost(forwards=len(places), seconds=time.monotonic() - began),
    )


def _stratified(num: int, seed: int) -> list[float]:
    """One t in each of `num` equal parts of [0, 1], in random order."""
    generator = _tensors.seeded(seed)
    order = torch.randperm(num, generator=generator)
    shift = torch.rand(num, generator=generator)
    return ((order + shift) / num).tolist()
