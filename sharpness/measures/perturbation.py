"""How much does the risk rise in a ball around the parameters: at worst, on average?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from sharpness import _tensors
from sharpness._arguments import of_a_risk, positive_list, require, whole
from sharpness._results import (
    Cost,
    Reading,
    Result,
    Results,
    Status,
    short,
    until_interrupted,
)
from sharpness._run import Deadline, Run
from sharpness.optimize.auto_pgd import auto_pgd
from sharpness.optimize.ball import Ball, Norm
from sharpness.risk import memory
from sharpness.risk.chunks import NoLossTermsError
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.statistics import mean_and_error, mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharpness.report.figures import Figure

Adaptive = Literal["elementwise", "filterwise"]


@dataclass(frozen=True, kw_only=True)
class WorstCaseSharpness(Result):
    """The largest rise found in a ball: a lower bound of the maximum.

    With shards (m-sharpness) the mean over them of each one's largest rise.
    """

    radius: ClassVar[str] = "rho"
    value: float  # largest rise of the loss that was found
    standard_error: float | None  # over shards; None for a single one
    sam_value: float  # rise after the one step along the gradient that SAM takes
    risk_value: float  # f(theta)
    displacement: Tensor | None = field(repr=False, compare=False)  # (n,); None if shards
    num_shards: int  # a gradient is over the samples of one
    shard_size: int | None  # samples of the largest shard; None: all at once

    @property
    def name(self) -> str:
        """`worst_l2(0.05)`, `worst_linf_elementwise(0.001)`, ..."""
        return self._name("worst")

    def _rows(self) -> Iterable[Reading]:
        """The largest rise, and that of one SAM step."""
        over = (
            ""
            if self.num_shards == 1
            else f"standard error over {self.num_shards} shards, "
        )
        evidence = f"{over}best of {self.settings['num_steps']} Auto-PGD steps"
        axis = f"rise of the loss within {self._name('rho').removeprefix('rho_')}"
        yield Reading(
            name=self.name,
            value=self.value,
            error=self.standard_error,
            evidence=evidence,
            bound="≥",
            axis=axis,
        )
        yield Reading(
            name=self._name("sam"),
            value=self.sam_value,
            evidence="one step along the gradient",
            bound="≥",
            axis=axis,
        )

    def _name(self, kind: str) -> str:
        shard = "" if self.shard_size is None else f", m={self.shard_size}"
        return _name(f"{kind}_{self.settings['norm']}", self.settings, shard)


@dataclass(frozen=True, kw_only=True)
class AverageCaseSharpness(Result):
    """The mean rise of the loss under Gaussian perturbations of the parameters."""

    radius: ClassVar[str] = "rho"
    value: float
    standard_error: float  # of the mean over the draws
    interval: tuple[float, float]  # 95 %; NaN below three pairs
    risk_value: float  # f(theta)
    num_draws: int  # antithetic pairs, completed

    @property
    def name(self) -> str:
        """`average(0.05)`, `average_elementwise(0.05)`, ..."""
        return _name("average", self.settings)

    def _rows(self) -> Iterable[Reading]:
        """The mean rise, with half the width of its interval."""
        low, high = self.interval
        ends = "unknown" if math.isnan(low + high) else f"{low:.4g} to {high:.4g}"
        yield Reading(
            name=self.name,
            value=self.value,
            error=(high - low) / 2,
            evidence=f"95 %: {ends} over {self.num_draws} pairs of draws",
            axis=f"mean rise of the loss, {self.name}",
        )

    def _curves(self) -> Iterable[tuple[str, float, float, float]]:
        yield self.name.partition("(")[0], self.value, *self.interval

    def plot(self, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
        """The mean rise with its interval; a list of results draws them against rho.

        Args:
            path: where the PNG goes, if anywhere.
            ax: axes of your own figure, to draw there.
        """
        return Results([self]).plot(path, ax=ax)


@of_a_risk
def worst_case_sharpness(
    risk: EmpiricalRisk,
    rho: float | Sequence[float],
    *,
    norm: Norm = "l2",
    adaptive: Adaptive | None = None,
    num_steps: int = 20,
    shard_size: int | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> WorstCaseSharpness | Results[WorstCaseSharpness]:
    r"""The largest rise of the risk in a ball around the parameters.

    $$S = \max_{\|u\|_p \le \rho} f(\theta + c \odot u) - f(\theta)$$

    with c = 1, or adaptively c = |theta| element by element, or the norm of the filter
    (row of the weight) that an entry belongs to, |theta| where there is none. Sought by
    Auto-PGD from u = 0, so a lower bound; the one step of SAM stands beside it.

    Element-wise adaptive values do not change when weights are rescaled without
    changing the function; plain ones do. `audit` shows it.

    Args:
        risk: the mean loss f, held at the parameters theta.
        rho: radius of the ball, > 0, in units of c. A list gives a list of results,
            each searched afresh; an interrupt (Ctrl-C) ends the list.
        norm: `"l2"` (p = 2) or `"linf"` (p = infinity).
        adaptive: `None`, `"elementwise"` or `"filterwise"`.
        num_steps: of Auto-PGD, >= 1.
        shard_size: m of m-sharpness: the samples are shuffled by `seed` into near-equal
            shards, of the size nearest to this (within a factor of 1.42; the result has
            it), the maximum is taken in each, and the mean given with its standard
            error. None: all samples at once.
        seed: of the shards.
        max_seconds: of the whole call, all radii together: stop after the evaluation that
            passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `WorstCaseSharpness`. Its status is `zero_gradient` where f has no first-order
        ascent at theta.

    Raises:
        ValueError: an argument outside its range.
        TypeError: `shard_size` for a risk from a closure.

    Cost: `num_steps` + 1 values with gradient over the data; memory 7 vectors.

    References:
        Foret et al. (2021), arXiv:2010.01412 (the step, m-sharpness); Kwon et al.
        (2021), arXiv:2102.11600 (adaptive; without their additive 0.01 and for every
        parameter, so that the value is invariant); Andriushchenko et al. (2023),
        arXiv:2302.07011 (Auto-PGD with 20 steps, shards of 128).
    """
    radii, several = positive_list("rho", rho, "SAM's default is 0.05.")
    _check_choices(norm, adaptive)
    num_steps = whole("num_steps", num_steps, 1)
    shards = list(_shards(risk, shard_size, seed))
    scale = perturbation_scale(risk, adaptive)
    deadline, single = Deadline(max_seconds), len(shards) == 1

    def within(radius: float) -> WorstCaseSharpness:
        searches = [_Search(shard, scale, keep=single) for shard in shards]
        run = Run(
            "gradients", max_seconds=deadline.left, progress=progress, ranks=risk.ranks
        )
        with run:
            for search in searches:
                search.run(run, Ball(norm, radius), num_steps)
        # Those that are finished; the one that is not, if it is the only one.
        done = [search for search in searches if search.finished]
        counted = done or [search for search in searches if search.values]
        return WorstCaseSharpness(
            value=_mean(counted, "rise"),
            standard_error=None if single else mean_and_error([s.rise for s in counted])[1],
            sam_value=_mean(counted, "sam"),
            risk_value=_mean(counted, "value"),
            displacement=searches[0].displacement,
            num_shards=len(shards),
            shard_size=None
            if shard_size is None
            else max(shard.num_samples for shard in shards),
            status=Status.worst(run.status, _status(searches, counted)),
            cost=Cost(gradients=run.num_steps, seconds=run.seconds),
            settings={
                "rho": radius,
                "norm": norm,
                "adaptive": adaptive,
                "num_steps": num_steps,
                "seed": seed,
            },
        )

    results = until_interrupted(map(within, radii))
    return results if several else results[0]


@of_a_risk
def average_case_sharpness(
    risk: EmpiricalRisk,
    rho: float | Sequence[float],
    *,
    adaptive: Adaptive | None = None,
    num_draws: int = 20,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> AverageCaseSharpness | Results[AverageCaseSharpness]:
    r"""The mean rise of the risk under Gaussian noise on the parameters.

    $$S = E_{z \sim N(0, I)}\, f(\theta + \rho\, c \odot z) - f(\theta)$$

    with c as in `worst_case_sharpness`. Each draw z is used with its mirror image -z:
    what is odd in z cancels exactly instead of on average. Near a minimum
    S ~ rho^2 / 2 tr(C H C).

    Args:
        risk: the mean loss f, held at the parameters theta.
        rho: standard deviation of the noise in units of c, > 0. The norm of the
            perturbation is about rho sqrt(n). A list gives a list of results, from the
            same draws.
        adaptive: `None`, `"elementwise"` or `"filterwise"`.
        num_draws: pairs of draws, >= 2.
        seed: of the draws.
        max_seconds: of the whole call, all radii together: stop after the evaluation that
            passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `AverageCaseSharpness`, whose `interval` covers the mean in 95 %, as counted where
        one or two eigenvalues rule too; after an interrupt with the draws made so far.

    Raises:
        ValueError: an argument outside its range.

    Cost: 2 `num_draws` forward passes for each rho; memory 3 vectors.

    References:
        Andriushchenko et al. (2023), arXiv:2302.07011, eq. 1; Keskar et al. (2017) and
        others perturb on average without a scale (c = 1).
    """
    radii, several = positive_list("rho", rho)
    _check_choices("l2", adaptive)
    num_draws = whole("num_draws", num_draws, 2, "One draw has no spread.")
    scale, value = perturbation_scale(risk, adaptive), math.nan
    draws = (
        repeated_draws(risk, num_draws, seed)
        if several
        else partial(normal_draws, risk, num_draws, seed)
    )
    deadline = Deadline(max_seconds)

    def around(radius: float) -> AverageCaseSharpness:
        nonlocal value
        rises: list[float] = []
        run = Run(
            "forward passes",
            max_seconds=deadline.left,
            total=2 * num_draws,
            progress=progress,
            ranks=risk.ranks,
        )
        with run:
            value = risk.known_value()
            for z in draws():
                run.step(2)
                ends = (
                    torch.addcmul(risk.theta, scale, z, value=r) for r in (radius, -radius)
                )
                rises.append(sum(map(risk.value, ends)) / 2 - value)
        mean, error = mean_and_error(rises)
        finite = math.isfinite(mean) or not rises
        return AverageCaseSharpness(
            value=mean,
            standard_error=error,
            interval=mean_interval(rises),
            risk_value=value,
            status=Status.worst(run.status, finite=finite),
            num_draws=len(rises),
            cost=Cost(forwards=run.num_steps, seconds=run.seconds),
            settings={
                "rho": radius,
                "adaptive": adaptive,
                "num_draws": num_draws,
                "seed": seed,
            },
        )

    results = until_interrupted(map(around, radii))
    return results if several else results[0]


def perturbation_scale(risk: EmpiricalRisk, adaptive: Adaptive | None) -> Tensor:
    """The c of both measures, (n,): 1, |theta|, or the norm of each entry's filter."""
    if adaptive is None:
        return torch.ones_like(risk.theta)
    if adaptive == "elementwise":
        return risk.theta.abs()
    pieces = _tensors.split(risk.theta, risk.shapes)
    return _tensors.flatten(_filter_norms(piece) for piece in pieces)


def _filter_norms(weight: Tensor) -> Tensor:
    """Norm of the row (an output's weights) an entry is in; vectors have no rows."""
    if weight.ndim < 2:
        return weight.abs()
    norms: Tensor = weight.flatten(1).norm(dim=1)
    return norms.view(-1, *[1] * (weight.ndim - 1)).expand_as(weight)


def repeated_draws(
    risk: EmpiricalRisk, num: int, seed: int
) -> Callable[[], Iterable[Tensor]]:
    """The same, to be gone through again and again: kept where there is room for them."""
    draw = partial(normal_draws, risk, num, seed)
    if 4 * num * risk.theta.nbytes > memory.budget_bytes(risk.device):
        return draw
    kept = list(draw())
    return lambda: kept


def normal_draws(risk: EmpiricalRisk, num: int, seed: int) -> Iterator[Tensor]:
    """Standard normal vectors (n,), the same on every device."""
    generator = _tensors.seeded(seed)
    for _ in range(num):
        yield _tensors.random_normal(risk.theta, generator)


class NormalisedLogits(nn.Module):
    """A classifier whose logits have mean 0 and length 1 for every sample.

    The scale of the last layer then cannot make the loss flat or sharp. Measure
    `EmpiricalRisk(NormalisedLogits(model), loss, data)`.

    References:
        Andriushchenko et al. (2023), arXiv:2302.07011, section 3; their lower limit of
        1e-10 for the length.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Logits (N, classes, ...) of the model, centred and scaled along dimension 1."""
        logits: Tensor = self.model(*args, **kwargs)
        centred = logits - logits[:, :1]  # so that equal logits become exactly 0
        centred = centred - centred.mean(1, keepdim=True)
        # Not `norm`, whose second derivative at 0 is NaN.
        square = centred.square().sum(1, keepdim=True).clamp_min(1e-20)
        unit: Tensor = centred / square.sqrt()
        return unit


# -- inside ----------------------------------------------------------------------------


class _Search:
    """Auto-PGD on one shard, and the values of f it has seen, that at theta first.

    Every point that is evaluated lies in the ball, so each is a candidate for the best;
    the second one is SAM's, since the first step is cut back to the ball.
    """

    def __init__(self, shard: EmpiricalRisk, scale: Tensor, *, keep: bool) -> None:
        self._shard, self._scale, self.terms = shard, scale, shard.num_terms
        self._best = torch.zeros_like(scale) if keep else None
        self.values: list[float] = []
        self.finished, self.is_finite = False, True

    def run(self, run: Run, ball: Ball, num_steps: int) -> None:
        """Climb while the run lasts."""

        def function(u: Tensor) -> tuple[float, Tensor]:
            run.step()
            if self._best is not None and not self.values:  # at theta itself
                value, gradient = self._shard.known_gradient()
                gradient = gradient.clone()
            else:
                theta = torch.addcmul(self._shard.theta, self._scale, u)
                value, gradient = self._shard.value_and_gradient(theta)
            is_best = math.isfinite(value) and all(value > v for v in self._finite)
            if is_best and self._best is not None:
                self._best = u
            self.values.append(value)
            return value, gradient.mul_(self._scale)

        zero = torch.zeros_like(self._scale)
        for state in auto_pgd(function, zero, ball, num_steps=num_steps):
            last = state
        self.finished = True
        self.is_finite = last.num_iters > 0 or last.message == "the gradient is zero"

    @property
    def displacement(self) -> Tensor | None:
        """Of the best point."""
        return None if self._best is None else self._scale * self._best

    @property
    def _finite(self) -> list[float]:
        return [v for v in self.values if math.isfinite(v)]

    @property
    def value(self) -> float:
        return self.values[0]

    @property
    def sam(self) -> float:
        """The rise after one step: 0 where there is no step to make, NaN before it."""
        if len(self.values) > 1:
            return self.values[1] - self.values[0]
        return 0.0 if self.finished and math.isfinite(self.values[0]) else math.nan

    @property
    def rise(self) -> float:
        """The largest finite rise, at least 0."""
        return max(self._finite) - self.values[0] if self._finite else math.nan


def _mean(searches: Sequence[_Search], what: str) -> float:
    """Mean over the shards, each with the weight of its loss terms."""
    if not searches:
        return math.nan
    values = [getattr(search, what) for search in searches]
    return float(np.average(values, weights=[search.terms for search in searches]))


def _status(searches: Sequence[_Search], counted: Sequence[_Search]) -> Status:
    """What the finished shards say together."""
    if not all(search.is_finite for search in searches):
        return Status.NON_FINITE
    is_flat = all(len(search.values) == 1 for search in counted)
    return Status.ZERO_GRADIENT if is_flat and counted else Status.COMPLETED


def _shards(
    risk: EmpiricalRisk, shard_size: int | None, seed: int
) -> Iterator[EmpiricalRisk]:
    if shard_size is None:
        yield risk
        return
    whole("shard_size", shard_size, 1)
    generator = _tensors.seeded(seed)
    order = torch.randperm(risk.num_samples, generator=generator)
    for index in order.tensor_split(_num_shards(risk.num_samples, shard_size)):
        try:
            yield risk.subset(index)
        except NoLossTermsError:  # all its targets are ignored: it weighs nothing
            continue


def _num_shards(num_samples: int, size: int) -> int:
    """Equal shards whose size is nearest to `size`, in ratio."""
    few = max(1, num_samples // size)
    return few + (num_samples / size > math.sqrt(few * (few + 1)))


def _name(what: str, settings: Mapping[str, Any], rest: str = "") -> str:
    kinds = (settings["adaptive"], settings.get("logits"))
    return f"{'_'.join(filter(None, (what, *kinds)))}({short(settings['rho'])}{rest})"


def _check_choices(norm: str, adaptive: str | None) -> None:
    require(norm in get_args(Norm), "norm", "be 'l2' or 'linf'", norm)
    known = (None, *get_args(Adaptive))
    contract = "be None, 'elementwise' or 'filterwise'"
    require(adaptive in known, "adaptive", contract, adaptive)
