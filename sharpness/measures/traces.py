"""How curved on the whole? Trace, Frobenius norm and diagonal of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sharpness._arguments import (
    ensure,
    fraction,
    is_whole,
    of_a_risk,
    positive,
    require,
    whole_seed,
)
from sharpness._ranks import Vectors
from sharpness._results import Cost, Reading, Result, Status
from sharpness._run import Run
from sharpness.krylov.stochastic_trace import (
    Estimator,
    Hutchinson,
    HutchPlusPlus,
    Multiply,
    Probes,
    Sketch,
    XTrace,
)
from sharpness.measures.eigenvalues import product_name
from sharpness.measures.multiplication import Multiplication
from sharpness.risk.curvature import Matrix
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.statistics import mean_and_sd, mean_interval

Interval = tuple[float, float]
Method = Literal["hutch++", "hutchinson", "xtrace"]
_METHODS: dict[str, Callable[[Tensor, int], Estimator]] = {
    "hutch++": HutchPlusPlus,
    "hutchinson": Hutchinson,
    "xtrace": XTrace,
}
_FEWEST = 10  # probes that a budget must allow
_FIRST_LOOK = 16  # probes: a rule that may stop at ten stops at what is narrow by luck
_SKETCH = 10  # directions that Frobenius norm and diagonal treat exactly


@dataclass(frozen=True, kw_only=True)
class StochasticEstimate(Result):
    """A number estimated from random probes, with its confidence interval."""

    value: float
    standard_error: float  # of the mean over probes
    interval: Interval  # for the probes and for the products' own error
    product_error: float  # what inexact products may have moved the value by
    num_probes: int
    quantity: str

    def _rows(self) -> Iterable[Reading]:
        """The number with half the width of its interval."""
        low, high = self.interval
        yield Reading(
            name=self.quantity.lower().replace(" ", "_"),
            value=self.value,
            error=(high - low) / 2,
            evidence=f"{self.settings['confidence']:.0%}: {low:.4g} to {high:.4g}",
            axis="curvature, loss / parameter²",
        )


@dataclass(frozen=True, kw_only=True)
class DiagonalEstimate(Result):
    """The diagonal of the Hessian, each entry with its standard error."""

    values: Tensor = field(repr=False, compare=False)  # (n,) in theta's type
    standard_errors: Tensor = field(repr=False, compare=False)  # (n,)
    norm: float  # ||values||
    relative_error: float  # ||standard errors|| / ||values||
    num_probes: int

    def _rows(self) -> Iterable[Reading]:
        """The norm of the diagonal, with that of its standard errors."""
        yield Reading(
            name="diagonal_norm",
            value=self.norm,
            error=self.relative_error * self.norm,
            evidence="norm of all standard errors",
        )


@of_a_risk
def trace(
    risk: EmpiricalRisk,
    *,
    method: Method | None = None,
    matrix: Matrix = "hessian",
    tol: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    max_hvps: int = 1000,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> StochasticEstimate:
    r"""The trace of the Hessian: the sum of its eigenvalues.

    Stopped when half the width of the interval (the wider of Student's t and Hall's, which
    takes skewness out) is at most `tol` times the value. It is looked at after 16 probes;
    their spread foretells how many are needed, and the next look is there, or at twice as
    many probes if that is sooner. So a small spread by luck in the first few stops nothing.
    What inexact products (rounding, differences of gradients) may have moved the value by
    is part of the interval; where that alone exceeds `tol`, the status is `inexact`.

    Args:
        risk: the mean loss f, held at the parameters theta.
        method: `"hutch++"` (Meyer et al. 2021) treats a sketch of the largest
            eigenvectors exactly, `"hutchinson"` is plain, `"xtrace"` (Epperly et al.
            2024) uses each probe twice, with the jackknife's standard error. None:
            `"hutch++"`; `"hutchinson"` for a sharded model, whose vectors no process has
            whole to sketch with.
        matrix: `"hessian"`, or another matrix of `EmpiricalRisk.product`.
        tol: half width wanted, relative to the value; > 0.
        confidence: of the interval, in (0, 1).
        seed: of the random signs.
        max_hvps: most products, at least those of ten probes.
        max_seconds: stop after the product that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `StochasticEstimate`; also after an interrupt (Ctrl-C), with what was earned.

    Raises:
        ValueError: an argument outside its range.

    Cost: 30 to 250 products (291 for ± 2 % on a trained F1), hundreds where eigenvalues
    of both signs cancel; memory 2 n, and n more for each sketched direction.
    """
    contract = f"be one of {', '.join(map(repr, get_args(Method)))}"
    if method is None:
        method = "hutchinson" if risk.is_sharded else "hutch++"
    require(method in _METHODS, "method", contract, method)
    sound, advice = method == "hutchinson" or not risk.is_sharded, "Leave it out."
    ensure(sound, "method", "be 'hutchinson' for a sharded model", repr(method), advice)
    seed = whole_seed(seed)
    if risk.is_sharded:
        estimator: Estimator = Hutchinson(risk.theta, seed, risk.shared)
    else:
        estimator = _METHODS[method](risk.theta, seed)
    return _estimated(
        risk,
        estimator,
        lambda _, error: risk.n * error,
        quantity="trace",
        method=method,
        matrix=matrix,
        tol=tol,
        confidence=confidence,
        seed=seed,
        max_hvps=max_hvps,
        max_seconds=max_seconds,
        progress=progress,
    )


@of_a_risk
def frobenius_norm(
    risk: EmpiricalRisk,
    *,
    matrix: Matrix = "hessian",
    tol: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    max_hvps: int = 1000,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> StochasticEstimate:
    r"""The Frobenius norm of the Hessian: the root of the sum of squared eigenvalues.

    $\|H\|_F^2 = \|H Q\|_F^2 + E \|H (I - Q Q^T) z\|^2$ with a sketch Q of the 10 largest
    eigenvectors and random signs z. Stopped as `trace` is. For a sharded model without
    the sketch, which takes more probes where a few eigenvalues lead.

    Args:
        risk: the mean loss f, held at the parameters theta.
        matrix: `"hessian"`, or another matrix of `EmpiricalRisk.product`.
        tol: half width of the interval wanted, relative to the norm; > 0.
        confidence: of the interval, in (0, 1).
        seed: of the random signs.
        max_hvps: most products, at least 30.
        max_seconds: stop after the product that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `StochasticEstimate`; the standard error is that of the norm, to first order.

    Raises:
        ValueError: an argument outside its range.

    Cost: 20 products for the sketch, then one a probe; memory 22 n.
    """
    _check(tol, confidence, max_hvps, 3 * _FEWEST)
    squared = _estimated(
        risk,
        _SquaredNorm(
            risk.theta, whole_seed(seed), risk.shared if risk.is_sharded else None
        ),
        lambda square, error: error * (2 * math.sqrt(risk.n * square) + risk.n * error),
        quantity="Frobenius norm",
        method="Hutchinson" if risk.is_sharded else "deflated Hutchinson",
        matrix=matrix,
        tol=2 * tol,  # of the square
        confidence=confidence,
        seed=seed,
        max_hvps=max_hvps,
        max_seconds=max_seconds,
        progress=progress,
    )
    settings = {**squared.settings, "tol": tol}
    if not math.isfinite(squared.value):
        return replace(squared, settings=settings)
    norm = math.sqrt(squared.value)
    low, high = (math.sqrt(max(0.0, end)) for end in squared.interval)
    return replace(
        squared,
        value=norm,
        standard_error=squared.standard_error / (2 * norm) if norm else 0.0,
        product_error=squared.product_error / (2 * norm) if norm else 0.0,
        interval=(low, high),
        settings=settings,
    )


@of_a_risk
def diagonal(
    risk: EmpiricalRisk,
    *,
    matrix: Matrix = "hessian",
    tol: float = 0.1,
    seed: int = 0,
    max_hvps: int = 1000,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> DiagonalEstimate:
    r"""The diagonal of the Hessian.

    Exact on a sketch of the 10 largest eigenvectors; for the rest R the mean of
    $z \odot R z$ over random signs z (Bekas, Kokiopoulou, Saad 2007), whose variance is
    the sum of squares beside the diagonal. Stopped when the norm of all standard errors
    is at most `tol` times the norm of the diagonal.

    Args:
        risk: the mean loss f, held at the parameters theta.
        matrix: `"hessian"`, or another matrix of `EmpiricalRisk.product`.
        tol: error wanted, relative to the norm of the diagonal; > 0.
        seed: of the random signs.
        max_hvps: most products, at least 30.
        max_seconds: stop after the product that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `DiagonalEstimate`; also after an interrupt (Ctrl-C), with what was earned.

    Raises:
        ValueError: an argument outside its range.

    Cost: 20 products for the sketch, then one a probe, hundreds as a rule; memory 26 n.
    """
    _check(tol, 0.95, max_hvps, 3 * _FEWEST, default=0.1)
    run = Run(
        product_name(matrix),
        max_seconds=max_seconds,
        max_steps=max_hvps,
        progress=progress,
        ranks=risk.ranks,
    )
    multiply = Multiplication(run, risk, matrix)
    estimate = _Diagonal(risk.theta, whole_seed(seed))
    num = _FEWEST
    with run:
        while True:
            estimate.grow(multiply, num)
            ratio = estimate.relative_error(multiply.error) / tol
            if math.isnan(ratio):
                run.stop(Status.NON_FINITE)
            if ratio <= 1:
                run.stop(Status.CONVERGED)
            if multiply.error * math.sqrt(risk.n) > tol * float(estimate.values.norm()):
                run.stop(Status.INEXACT)
            num = _next_look(num, ratio)
    return DiagonalEstimate(
        values=estimate.values,
        norm=float(estimate.values.norm()),
        standard_errors=estimate.standard_errors(multiply.error),
        relative_error=estimate.relative_error(multiply.error),
        status=run.status,
        num_probes=estimate.num,
        cost=Cost(products=run.num_steps, seconds=run.seconds),
        settings={"tol": tol, "seed": seed, "matrix": matrix},
    )


# -- inside ----------------------------------------------------------------------------


def _estimated(
    risk: EmpiricalRisk,
    estimator: Estimator,
    effect: Callable[[float, float], float],
    *,
    quantity: str,
    method: str,
    matrix: Matrix,
    tol: float,
    confidence: float,
    seed: int,
    max_hvps: int,
    max_seconds: float | None,
    progress: bool | None,
) -> StochasticEstimate:
    """Grow an estimator until its interval is narrow enough.

    `effect` has the value and the error of a product with a unit vector, and says what
    that may change in the value.
    """
    fewest = estimator.fixed_products + _FEWEST * estimator.products_a_probe
    _check(tol, confidence, max_hvps, fewest)
    run = Run(
        product_name(matrix),
        max_seconds=max_seconds,
        max_steps=max_hvps,
        progress=progress,
        ranks=risk.ranks,
    )
    multiply = Multiplication(run, risk, matrix)
    most = (max_hvps - estimator.fixed_products) // estimator.products_a_probe
    num = min(_FIRST_LOOK, most)
    with run:
        if num > _FEWEST:  # something for an interrupt before the first look
            estimator.grow(multiply, _FEWEST)
        while True:
            estimator.grow(multiply, num)
            value, _, (low, high) = _mean(estimator.estimates, confidence)
            inexact = effect(value, multiply.error)
            allowed = 2 * (tol * abs(value) - inexact)
            if not math.isfinite(value):
                run.stop(Status.NON_FINITE)
            if high - low <= allowed:
                run.stop(Status.CONVERGED)
            if inexact > tol * max(abs(low), abs(high)):
                run.stop(Status.INEXACT)
            num = _next_look(num, (high - low) / allowed if allowed > 0 else math.inf)
            if len(estimator.estimates) == most:
                run.stop(Status.MAX_HVPS)
            num = min(num, most)
    value, error, (low, high) = _mean(estimator.estimates, confidence)
    inexact = effect(value, multiply.error)
    return StochasticEstimate(
        value=value,
        standard_error=error,
        interval=(low - inexact, high + inexact),
        product_error=inexact,
        status=run.status,
        num_probes=len(estimator.estimates),
        quantity=quantity,
        cost=Cost(products=run.num_steps, seconds=run.seconds),
        settings={
            "method": method,
            "matrix": matrix,
            "tol": tol,
            "confidence": confidence,
            "seed": seed,
        },
    )


def _mean(estimates: np.ndarray, confidence: float) -> tuple[float, float, Interval]:
    """Mean, standard error, and an interval for quadratic forms, which are lopsided."""
    num = len(estimates)
    if not np.isfinite(estimates).all():
        return math.nan, math.nan, (math.nan, math.nan)
    if num < 3:  # interrupted
        value = float(estimates.mean()) if num else math.nan
        return value, math.inf, (-math.inf, math.inf)
    value, spread = mean_and_sd(estimates)
    return value, spread / math.sqrt(num), mean_interval(estimates, confidence)


def _next_look(num: int, ratio: float) -> int:
    """How many probes to look at next: as foretold, at most twice as many.

    `ratio` is the error over the one wanted; it falls with the root of the number.
    """
    if not ratio < 1.3:
        return 2 * num
    return max(num + 2, math.ceil(1.1 * num * ratio**2))


class _Deflated:
    """A sketch of fixed size, made at the first growth, and probes of the rest.

    There is none of vectors in parts.
    """

    products_a_probe = 1

    def __init__(self, like: Tensor, seed: int, vectors: Vectors | None = None) -> None:
        self._sketching = Probes(like, 2 * seed)
        self._probes = Probes(like, 2 * seed + 1, vectors)
        self._vectors = vectors or Vectors(like.numel())
        self._size = 0 if vectors else min(_SKETCH, like.numel())
        self._like, self._sketch = like, Sketch(like)
        self.fixed_products = 2 * self._size

    def _sketched(self, multiply: Multiply) -> Tensor | None:
        """A times the sketch, when it is made."""
        if len(self._sketch.q) or not self._size:
            return None
        probes = self._sketching(0, self._size)
        made, z = self._sketch.extended(multiply(probes), multiply)
        self._sketch = made
        return z


class _SquaredNorm(_Deflated):
    """||A Q||_F^2 exactly, and ||A z||^2 for probes z of the rest."""

    def __init__(self, like: Tensor, seed: int, vectors: Vectors | None) -> None:
        super().__init__(like, seed, vectors)
        self._exact = 0.0
        self.estimates = np.empty(0)

    def grow(self, multiply: Multiply, num: int) -> None:
        image = self._sketched(multiply)
        if image is not None:
            self._exact = float(image.double().square().sum())
        for i in range(len(self.estimates), num):
            z = self._sketch.without(self._probes(i, i + 1))
            square = float(self._vectors.total(multiply(z).double().square().sum()))
            self.estimates = np.append(self.estimates, self._exact + square)


class _Diagonal(_Deflated):
    """Running mean and squared deviations of z * (I - P) A (I - P) z, and the rest."""

    def __init__(self, like: Tensor, seed: int) -> None:
        super().__init__(like, seed)
        self._exact = torch.zeros_like(like)
        self._mean, self._squares = torch.zeros_like(like), torch.zeros_like(like)
        self.num = 0

    @property
    def values(self) -> Tensor:
        return self._exact + self._mean

    def standard_errors(self, of_products: float) -> Tensor:
        """With the products' own, for a unit vector: what it comes to in each entry."""
        if self.num < 2:
            return torch.full_like(self._mean, math.inf)
        variance = self._squares / (self.num - 1) / self.num
        return variance.add_(of_products**2).sqrt_()

    def relative_error(self, of_products: float) -> float:
        error = float(self.standard_errors(of_products).norm())
        norm = float(self.values.norm())
        return error / norm if norm else error and math.inf

    def grow(self, multiply: Multiply, num: int) -> None:
        image = self._sketched(multiply)
        if image is not None:
            q = self._sketch.q
            inner = torch.from_numpy(self._sketch.t).to(q)
            self._exact = (q * (2 * image - inner @ q)).sum(0)
        for i in range(self.num, num):
            z = self._probes(i, i + 1)
            product = self._sketch.without(multiply(self._sketch.without(z)))
            sample = (z * product)[0]
            self.num += 1
            step = sample - self._mean
            self._mean += step / self.num
            self._squares += step * (sample - self._mean)


def _check(
    tol: float, confidence: float, max_hvps: int, fewest: int, default: float = 0.05
) -> None:
    positive("tol", tol, f"The default is {default}.")
    fraction("confidence", confidence)
    sound = is_whole(max_hvps) and max_hvps >= fewest
    require(sound, "max_hvps", f"be at least {fewest}, for ten probes", max_hvps)
