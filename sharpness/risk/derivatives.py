"""Are gradient and product the derivatives of f? Seen along one random direction.

A graph that is cut (`detach`, `no_grad`, NumPy), a straight-through estimator, or a
backward pass that saves a detached tensor gives numbers without a word. Differences tell,
where they can be told from rounding and from kinks. So they are taken on a few rows, in
float64 where model and loss can be computed in it, with steps so short that hardly a
ReLU changes sides (1e-7 of each parameter), and beside theta, where no input sits on a
kink by construction. Two lengths must agree with each other before they contradict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sharpness import _tensors
from sharpness._ranks import ALONE, Ranks
from sharpness.risk.calls import Calls


@dataclass(frozen=True)
class _Tolerances:
    agree: float
    settled: float
    resolved: float


@dataclass(frozen=True)
class Sample:
    """A function that may be evaluated anywhere: f over a few rows."""

    theta: Tensor  # (n,)
    shapes: Sequence[torch.Size]  # of the parameters
    eps: float  # of their coarsest type
    value: Callable[[Tensor], float]
    value_and_gradient: Callable[[Tensor], tuple[float, Tensor]]
    product: Callable[[Tensor, Tensor], Tensor]  # theta, v -> H(theta) v, exact


Sampling = Callable[[bool], Sample]  # in float64 (True), or in the risk's own types


# Relative distances: up to which a derivative and differences agree (the default `tol` of
# eigenpairs), up to which differences of two lengths do, and the rounding up to which one
# tells anything. The effect of a kink falls as the length grows tenfold: what two lengths
# agree on to `settled` holds a ninth of that.
_FINE = _Tolerances(agree=1e-2, settled=3e-3, resolved=2e-3)
_COARSE = _Tolerances(agree=5e-1, settled=3e-2, resolved=2e-2)
_ROUNDINGS = 16  # in f, in units of the type's own
_LEAST = 1e-30  # f, and gradients, below which everything may have underflown
# All relative to a parameter's size: how far beside theta; how far away f shows the size
# of what it is computed from (a saturated loss is a small difference of larger numbers).
_BESIDE, _FAR = 1e-2, (0.3, 1.0)
_STEPS = (1e-7, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
_SMALL_STEPS = (1e-7, 1e-8, 1e-6, 1e-9)  # of gradients: longer ones cross kinks
_COARSE_STEPS = (1e-2, 3e-2, 3e-3)  # in float32


@dataclass(frozen=True)
class Comparison:
    """A derivative along a direction, beside differences of what it is one of."""

    agrees: bool | None = None  # None: rounding or kinks hide it
    claimed: float = math.nan  # a slope, or the norm of a product
    found: float = math.nan  # by differences
    apart: float = math.nan  # relative distance

    @property
    def disagrees(self) -> bool:
        """Whether differences contradict the derivative."""
        return self.agrees is False

    def __str__(self) -> str:
        return (
            f"{self.claimed:.4g} where differences give {self.found:.4g}, "
            f"{self.apart:.0%} apart"
        )


class Derivatives:
    """Both comparisons, each made when it is first asked for, on every rank's data.

    All ranks go by the first that disagrees.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks, self._seen = ranks, dict[str, Comparison]()

    def of(self, what: Literal["gradient", "product"], sample: Sampling) -> Comparison:
        """The gradient against f, or a Hessian-vector product against gradients.

        Cost: a gradient and 4 values of the sample; 5 gradients and a product.
        """
        if what not in self._seen:
            seen = self._ranks.objects(compared(what, sample))
            contrary = [comparison for comparison in seen if comparison.disagrees]
            self._seen[what] = (contrary or seen)[0]
        return self._seen[what]


def compared(what: Literal["gradient", "product"], sample: Sampling) -> Comparison:
    """The same, seen anew: in float64 where that is possible."""
    for wide in (True, False):
        try:
            line = _Line(sample(wide))
            if line.is_fine or not wide:
                return line.gradient() if what == "gradient" else line.product()
        except Exception:  # other types or a point beside are refused
            continue
    return Comparison()


class _Line:
    """A function along a random direction, through a point beside theta."""

    def __init__(self, sample: Sample) -> None:
        draw, size = _tensors.seeded(0), _sizes(sample)
        beside, self.direction = (
            size * torch.randn(size.shape, generator=draw).to(size) for _ in range(2)
        )
        self.f, self.theta = sample, sample.theta + _BESIDE * beside
        types = {torch.float64}  # of what depends on theta
        with Calls(lambda *call: types.update(_moving_types(call[-1]))):
            self.here = sample.value_and_gradient(self.theta)
        self.eps = max(sample.eps, *(torch.finfo(dtype).eps for dtype in types))
        if not _is_finite(self.here):
            self.theta, self.here = sample.theta, sample.value_and_gradient(sample.theta)

    @property
    def is_fine(self) -> bool:
        """Whether everything that depends on theta is computed in float64."""
        return bool(self.eps <= torch.finfo(torch.float64).eps)

    def at(self, step: float) -> Tensor:
        return self.theta + step * self.direction

    def gradient(self) -> Comparison:
        value, gradient = self.here
        along = gradient * self.direction
        steps = _STEPS if self.is_fine else _COARSE_STEPS
        values = ([self.f.value(self.at(t)) for t in (step, -step)] for step in steps)
        return self._settled(
            _number(float(_tensors.dot64(gradient, self.direction))),
            (_number(ahead - behind) for ahead, behind in values),
            steps=steps,
            scales=[value, *(self.f.value(self.at(far)) for far in _FAR)],
            least=0.1 * float(_tensors.norm64(along)),
        )

    def product(self) -> Comparison:
        if not self.is_fine:
            return Comparison()  # steps that rounding asks for cross too many kinks
        return self._settled(
            self.f.product(self.theta, self.direction),
            (self._slopes(step) - self._slopes(-step) for step in _SMALL_STEPS),
            steps=_SMALL_STEPS,
            scales=[
                float(_tensors.norm64(slopes))
                for slopes in (self.here[1], *map(self._slopes, _FAR))
            ],
        )

    def _slopes(self, step: float) -> Tensor:
        return self.f.value_and_gradient(self.at(step))[1]

    def _settled(
        self,
        claimed: Tensor,
        changes: Iterable[Tensor],
        *,
        steps: Iterable[float],
        scales: Sequence[float],
        least: float = 0.0,
    ) -> Comparison:
        """Differences with one length after the other, until two agree or one confirms."""
        last, limits = None, _FINE if self.is_fine else _COARSE
        signed = len(claimed) == 1
        scale = max(abs(number) for number in scales if math.isfinite(number))
        for change, step in zip(changes, steps, strict=True):
            found = change / (2 * step)
            sizes = float(_tensors.norm64(claimed)), float(_tensors.norm64(found))
            size, rounding = max(*sizes, least), _ROUNDINGS * self.eps * scale / step
            if scale < _LEAST or not rounding <= limits.resolved * size < math.inf:
                continue
            apart = float(_tensors.norm64(found - claimed)) / size
            moved = math.inf if last is None else float(_tensors.norm64(found - last))
            agrees, last = apart <= limits.agree, found
            if agrees or moved <= limits.settled * size:
                ours, theirs = map(float, (claimed, found)) if signed else sizes
                return Comparison(agrees, ours, theirs, apart)
        return Comparison()


def _moving_types(result: Any) -> set[torch.dtype]:
    tensors = (part for part in tree_leaves(result) if isinstance(part, Tensor))
    return {tensor.dtype for tensor in tensors if tensor.requires_grad}


def _sizes(sample: Sample) -> Tensor:
    """(n,) the size of each parameter: that of its tensor, or a tenth of all if larger."""
    pieces = _tensors.split(sample.theta, sample.shapes)
    overall = float(sample.theta.square().mean().sqrt()) or 1.0
    return _tensors.flatten(
        torch.full_like(piece, max(float(piece.square().mean().sqrt()), 0.1 * overall))
        for piece in pieces
    )


def _number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _is_finite(found: tuple[float, Tensor]) -> bool:
    return math.isfinite(found[0]) and bool(torch.isfinite(found[1]).all())
