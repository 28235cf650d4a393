"""f as a function of theta: its value, gradient and outputs, its product without checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sharpness import _tensors
from sharpness._ranks import Vectors
from sharpness.risk.chunks import ChunkedMean
from sharpness.risk.derivatives import Sample
from sharpness.risk.kept_graph import KeptGraph
from sharpness.risk.model_state import evaluation, no_layers_computed_again, true_float32
from sharpness.risk.objective import Objective, gradients

BatchNorm = Literal["running", "batch", "recalibrated"]
_VECTORS = 10  # of theta's length that a comparison with differences holds
# Loss terms on which derivatives are compared with differences, in float64 and in other
# types, whose rounding needs more of them; and the fewest rows that hold them.
_TERMS_CHECKED, _FEWEST_CHECKED = {True: 16, False: 32}, 4


@dataclass(frozen=True)
class MeanLoss:
    """The mean of an objective over fixed data, at any theta.

    The model is put into the state it is evaluated in, each time, and left as found.
    """

    objective: Objective  # model and loss, held at theta
    mean: ChunkedMean  # the data
    batchnorm: BatchNorm
    batchnorm_batch: int
    tf32: bool  # as these in `EmpiricalRisk`
    vectors: Vectors  # how processes share gradients

    def of(self, mean: ChunkedMean) -> MeanLoss:
        """The same over other data."""
        return replace(self, mean=mean)

    def frozen(self) -> MeanLoss:
        """The same with BatchNorm's statistics as they are at the model's own theta."""
        held = self.batchnorm == "recalibrated"
        return replace(self, batchnorm="running") if held else self

    def double(self) -> MeanLoss:
        """The same in float64 throughout."""
        wide = self.objective.double()
        other = replace(self, objective=wide, mean=self.mean.of(wide))
        other.estimate_statistics()
        return other

    def estimate_statistics(self) -> None:
        """Recalibrate BatchNorm's statistics at theta, where that is how f is defined."""
        if self.batchnorm == "recalibrated":
            self.objective.fixed |= self._statistics(None)

    def pieces(self, theta: Tensor | None) -> list[Tensor]:
        """`theta` as separate tensors, none of which shares a graph with another."""
        objective = self.objective
        theta = objective.theta if theta is None else theta
        theta = _tensors.flat_like(theta, objective.names, objective.shapes)
        return objective.pieces(theta.to(objective.device))

    @contextmanager
    def evaluating(self, theta: Tensor | None = None) -> Iterator[None]:
        """Evaluation as `batchnorm` says, with the statistics of `theta`."""
        moved = self.batchnorm == "recalibrated" and theta is not None
        buffers, model = self._statistics(theta) if moved else {}, self.objective.model
        with self.objective.holding(buffers), evaluation(model, self.batchnorm):
            yield

    def _statistics(self, theta: Tensor | None) -> dict[str, Tensor]:
        leaves = self.pieces(theta)
        parts = self.mean.statistics_parts(self.batchnorm_batch)
        with evaluation(self.objective.model, "estimating"):
            return self.objective.estimated_statistics(leaves, parts)

    def value(self, theta: Tensor | None = None) -> float:
        """F at `theta`."""
        closed = self.objective.closure is not None  # it may differentiate the model
        leaves = [piece.requires_grad_(closed) for piece in self.pieces(theta)]
        with self.evaluating(theta), torch.set_grad_enabled(closed):
            parts = self.mean.fitting(
                lambda: [part.detach().double() for part in self.mean.shares(leaves)]
            )
        return self._value(parts)

    def value_and_gradient(self, theta: Tensor | None = None) -> tuple[float, Tensor]:
        """F and its gradient (n,) at `theta`."""
        with self._differentiable(theta) as leaves:
            return self._summed(self.mean.shares(leaves), leaves)

    def value_and_gradient_seen(
        self, theta: Tensor | None, see: Callable[[Any, Tensor], None]
    ) -> tuple[float, Tensor]:
        """The same; `see` is shown each chunk with the model's outputs on it."""

        def shares(leaves: Sequence[Tensor]) -> Iterator[Tensor]:
            for batch, outputs, share in self.mean.shares_and_outputs(leaves):
                see(batch, outputs.detach())
                yield share

        with self._differentiable(theta) as leaves:
            return self._summed(shares(leaves), leaves)

    @contextmanager
    def _differentiable(self, theta: Tensor | None) -> Iterator[list[Tensor]]:
        leaves = [piece.requires_grad_() for piece in self.pieces(theta)]
        with self.evaluating(theta), torch.enable_grad():
            yield leaves

    def _summed(
        self, shares: Iterable[Tensor], leaves: Sequence[Tensor]
    ) -> tuple[float, Tensor]:
        parts, total = self.mean.fitting(lambda: self._summed_here(shares, leaves))
        return self._value(parts), self.vectors.collected(total)

    def _summed_here(
        self, shares: Iterable[Tensor], leaves: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        parts, total = [], None
        for share in shares:
            with no_layers_computed_again(self.objective.model):
                pieces = gradients(share, leaves)
            gradient = _tensors.flatten(g.to(self.objective.theta) for g in pieces)
            total = gradient if total is None else total.add_(gradient)
            parts.append(share.detach().double())
        if total is None:  # a process without data
            total = torch.zeros_like(self.objective.theta)
        return parts, total

    def _value(self, parts: list[Tensor]) -> float:
        """The sum over chunks, of which a process may have none, and over ranks."""
        own = float(torch.stack(parts).sum()) if parts else 0.0
        return self.mean.ranks.add(own)

    def outputs(self, theta: Tensor | None = None) -> list[Any]:
        """What the model returns at `theta`, for each chunk."""
        leaves = self.pieces(theta)
        with self.evaluating(theta), torch.no_grad():
            return [self.objective.outputs(leaves, c.batch) for c in self.mean.all]

    def product(self, theta: Tensor, v: Tensor) -> Tensor:
        """The Hessian at `theta` times v (n,), by a graph that is not kept.

        Of this process's data alone.
        """
        work = self.mean.of(self.objective.moved(theta)).work("hessian", 0)
        return KeptGraph(work, 0)(v)

    def _fits_in_float64(self) -> bool:
        vectors = _VECTORS * 8 * self.objective.theta.numel()
        return vectors <= self.mean.budget and self.mean.fits_in_float64()

    def sample(self, wide: bool) -> Sample:
        """A few rows of it, in float64 if asked for; BatchNorm's statistics held.

        Of this process's data alone: nothing in it waits for another.
        """
        if wide and not self._fits_in_float64():
            raise MemoryError("The parameters or a whole batch do not fit in float64.")
        few = self.mean.sample(self._rows_checked(wide))
        part = replace(self.frozen(), mean=few, vectors=Vectors(0))
        part = part.double() if wide else part
        objective = part.objective
        eps = max(torch.finfo(dtype).eps for dtype in objective.dtypes)
        return Sample(
            objective.theta,
            objective.shapes,
            eps,
            part.value,
            part.value_and_gradient,
            part.product,
        )

    def _rows_checked(self, wide: bool) -> int:
        """So many that hold a few terms: a sequence has one at each place."""
        mean, terms = self.mean, _TERMS_CHECKED[wide]
        rows = math.ceil(terms * mean.num_samples_everywhere / max(1.0, mean.num_terms))
        return max(min(max(_FEWEST_CHECKED, rows), terms), mean.num_samples // 100)


@contextmanager
def exact_arithmetic(device: torch.device, tf32: bool) -> Iterator[None]:
    """Without TF32 unless it was allowed, and without an autocast around the call.

    That would reach into backward passes.
    """
    with (
        torch.autocast(device.type, enabled=False),
        nullcontext() if tf32 else true_float32(),
    ):
        yield
