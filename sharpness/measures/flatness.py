"""What do the generalisation bounds call flat? Noise and boxes that accuracy survives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpness import _tensors
from sharpness._arguments import ensure, fraction, of_a_risk, positive, require, whole
from sharpness._results import Cost, Reading, Result, Status, bars, ensure_available
from sharpness._run import Run
from sharpness.measures.perturbation import repeated_draws
from sharpness.optimize.auto_pgd import auto_pgd
from sharpness.optimize.ball import Ball
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.statistics import mean_and_error, mean_interval

_MAGNITUDE_FLOOR = 1e-3  # Jiang et al. (2020): lets weights of 0 move at all
_MOST_FOR_THE_ENDS = 8  # sigmas looked at for the ends of the interval alone
_CLEAR = 1.5  # factor between the sigmas beside an end
_FEWEST_BEARING = 4  # draws: (sum d)^2 / sum d^2 of the drops d
_SLACK = 1e-9  # of an accuracy: 1 - 0.9 is a little less than 0.1


@dataclass(frozen=True, kw_only=True)
class AccuracyRadius(Result):
    """The perturbation at which the accuracy has fallen by `accuracy_drop`.

    For `pac_bayes_sigma` the standard deviation of noise at which it falls by that much
    on average; for `box_alpha` the half-width of a box in which ascent makes it fall
    that much, an upper bound of the largest box that is safe.
    """

    value: float  # sigma or alpha; relative to |theta| where magnitude-aware
    interval: tuple[float, float] | None  # of sigma, 95 % over the draws; None for alpha
    bracket: tuple[float, float]  # the last values on either side
    accuracy: float  # at theta, in [0, 1]
    quantity: str  # "pac_bayes_sigma" or "box_alpha"

    @property
    def flatness_measure(self) -> float:
        """1 / value^2, as Jiang et al. (2020) rank networks by; larger is sharper."""
        return 1 / self.value**2 if self.value else math.inf

    @property
    def name(self) -> str:
        """`pac_bayes_sigma`, `box_alpha_magnitude`, ..."""
        return f"{self.quantity}{'_magnitude' if self.settings['magnitude_aware'] else ''}"

    def _rows(self) -> Iterable[Reading]:
        """One number."""
        num, (low, high) = self.settings.get("num_draws"), self.bracket
        words, error = [], None
        if self.interval is not None:
            start, end = self.interval
            words = [f"95 %: {start:.3g} to {end:.3g} over {num} draws"]
            error = (end - start) / 2 if start and end < math.inf else None
        words += [f"accuracy {self.accuracy:.1%} less {self.settings['accuracy_drop']:.0%}"]
        words += [f"between {low:.3g} and {high:.3g}"] if self.status.ok else []
        yield Reading(
            name=self.name,
            value=self.value,
            error=error,
            evidence=", ".join(words),
            bound="" if num else "≤",
        )


@of_a_risk
def pac_bayes_sigma(
    risk: EmpiricalRisk,
    *,
    accuracy_drop: float = 0.1,
    magnitude_aware: bool = False,
    num_draws: int = 10,
    tol: float = 0.02,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> AccuracyRadius:
    r"""The noise that costs the network `accuracy_drop` of its accuracy, on average.

    The sigma at which $E_{z \sim N(0, I)}\,\mathrm{acc}(\theta + \sigma\,s \odot z)$
    lies `accuracy_drop` below the accuracy at theta, with s = 1, or magnitude-aware
    $s_i = \sqrt{\theta_i^2 + (10^{-3})^2}$, found by bisection of log sigma over fixed
    draws. sigma is a **standard deviation**: the code that several papers share draws
    with sigma squared in its place, so its values are roots of ours.

    Args:
        risk: classification with targets as class numbers, held at theta.
        accuracy_drop: of the accuracy, in (0, 1).
        magnitude_aware: noise in proportion to each parameter.
        num_draws: of z, >= 2, the same for every sigma.
        tol: width of the bracket, relative to sigma, at which to stop; > 0.
        seed: of the draws.
        max_seconds: stop after the forward pass that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `AccuracyRadius` with the 95 % interval of sigma: every sigma at which the mean drop
        over the draws may be the one asked for. It has no lower end where fewer than four
        draws bear the drop, as in a network of one or two parameters. Status `not_reached`
        where noise of any size leaves the accuracy too high.

    Raises:
        ValueError: an argument outside its range.
        TypeError: targets that are no class numbers.

    Cost: about 15 `num_draws` forward passes, up to 23 where draws differ much; memory 2
    vectors.

    References:
        Jiang et al. (2020), arXiv:1912.02178, appendix C (sigma with a drop of 0.1,
        magnitude-aware with epsilon = 1e-3). Their noise there has variance
        sigma'^2 |theta_i|^2 + epsilon^2; here the floor scales along, so that the drop
        vanishes with sigma.
    """
    _check(risk, accuracy_drop, tol)
    num_draws = whole("num_draws", num_draws, 2, "One draw has no spread.")
    scale, accuracy = _scale(risk, magnitude_aware), math.nan
    run = Run(
        "forward passes",
        max_seconds=max_seconds,
        progress=progress,
        status=Status.CONVERGED,
        ranks=risk.ranks,
    )
    drops: dict[float, np.ndarray] = {}
    draws = repeated_draws(risk, num_draws, seed)

    def mean_drop(sigma: float) -> float:
        found = []
        for z in draws():
            run.step()
            moved = torch.addcmul(risk.theta, scale, z, value=sigma)
            found.append(accuracy - risk.accuracy(moved))
        drops[sigma] = np.array(found)
        return float(np.mean(found))

    root = _Root(mean_drop, accuracy_drop, tol)
    with run:
        accuracy = _accuracy_at_theta(risk)
        root.find(math.isfinite(accuracy))
        for _ in range(_MOST_FOR_THE_ENDS if root.status.ok else 0):
            sigma = _unclear(drops, accuracy_drop)
            if sigma is not None:
                mean_drop(sigma)
    return AccuracyRadius(
        value=root.middle,
        interval=_interval(drops, accuracy_drop),
        bracket=root.bracket,
        accuracy=accuracy,
        quantity="pac_bayes_sigma",
        status=Status.worst(run.status, root.status),
        cost=Cost(forwards=run.num_steps, seconds=run.seconds),
        settings={
            "accuracy_drop": accuracy_drop,
            "magnitude_aware": magnitude_aware,
            "num_draws": num_draws,
            "tol": tol,
            "seed": seed,
        },
    )


@of_a_risk
def box_alpha(
    risk: EmpiricalRisk,
    *,
    accuracy_drop: float = 0.1,
    magnitude_aware: bool = False,
    num_steps: int = 20,
    tol: float = 0.1,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> AccuracyRadius:
    r"""The box in which ascent of the loss costs the network `accuracy_drop`.

    The least alpha found for which Auto-PGD on the loss over $|u_i| \le \alpha\,s_i$
    meets a point whose accuracy lies `accuracy_drop` below that at theta; s as in
    `pac_bayes_sigma`. It is sought by bisection of log alpha. Since only points that
    were looked at count, the largest safe box may be smaller: an upper bound.

    Args:
        risk: classification with targets as class numbers, held at theta.
        accuracy_drop: of the accuracy, in (0, 1).
        magnitude_aware: a box in proportion to each parameter.
        num_steps: of Auto-PGD in each box, >= 1; a box is left at once when it is
            found unsafe.
        tol: width of the bracket, relative to alpha, at which to stop; > 0.
        max_seconds: stop after the evaluation that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `AccuracyRadius`. Status `not_reached` where no box was found unsafe.

    Raises:
        ValueError: an argument outside its range.
        TypeError: targets that are no class numbers.

    Cost: up to 10 `num_steps` values with gradient.

    References:
        Jiang et al. (2020), arXiv:1912.02178, after Keskar et al. (2017): the largest
        box in which the accuracy drops by at most 0.1. How the box is searched is left
        open there; they climb the loss by gradient steps as well.
    """
    _check(risk, accuracy_drop, tol)
    num_steps = whole("num_steps", num_steps, 1)
    scale, accuracy = _scale(risk, magnitude_aware), math.nan
    run = Run(
        "gradients",
        max_seconds=max_seconds,
        progress=progress,
        status=Status.CONVERGED,
        ranks=risk.ranks,
    )

    def largest_drop(alpha: float) -> float:
        largest, ball = 0.0, Ball("linf", alpha)
        seen: dict[float, float] = {}  # accuracies, by the loss of the point

        def function(u: Tensor) -> tuple[float, Tensor]:
            if not seen:  # at theta itself
                value, gradient = risk.known_gradient()
                gradient, found = gradient.clone(), accuracy
            else:
                run.step()
                moved = torch.addcmul(risk.theta, scale, u)
                value, gradient, found = risk.value_gradient_and_accuracy(moved)
            seen.setdefault(value, found)
            return value, gradient.mul_(scale)

        states = auto_pgd(function, torch.zeros_like(scale), ball, num_steps=num_steps)
        for state in islice(states, 1, None):
            largest = max(largest, accuracy - seen[state.value])
            if largest >= accuracy_drop - _SLACK:
                break
        return largest

    root = _Root(largest_drop, accuracy_drop, tol)
    with run:
        accuracy = _accuracy_at_theta(risk)
        run.step()  # the gradient at theta, from which every ascent begins
        root.find(math.isfinite(accuracy))
    return AccuracyRadius(
        value=root.bracket[1] if root.bracket[1] < math.inf else math.nan,
        interval=None,
        bracket=root.bracket,
        accuracy=accuracy,
        quantity="box_alpha",
        status=Status.worst(run.status, root.status),
        cost=Cost(gradients=run.num_steps, seconds=run.seconds),
        settings={
            "accuracy_drop": accuracy_drop,
            "magnitude_aware": magnitude_aware,
            "num_steps": num_steps,
            "tol": tol,
        },
    )


@dataclass(frozen=True, kw_only=True)
class Norms(Result):
    """Lengths: of the gradient, of the parameters, of the way from the start."""

    gradient_norm: float
    parameter_norm: float
    distance_from_start: float | None  # None without a start
    fisher_rao: float | None  # theta^T F theta; None where there is no such product

    def _rows(self) -> Iterable[Reading]:
        """The numbers that there are."""
        exact = "exact to rounding" if self.status.ok else ""
        names = ("gradient_norm", "parameter_norm", "distance_from_start", "fisher_rao")
        for name in names:
            if getattr(self, name) is not None:
                yield Reading(name=name, value=getattr(self, name), evidence=exact)


@of_a_risk
def norms(
    risk: EmpiricalRisk, *, start: Tensor | Mapping[str, Tensor] | None = None
) -> Norms:
    r"""Norms of gradient and parameters, distance from the start, Fisher-Rao norm.

    The Fisher-Rao norm is $\theta^T F \theta$ (Liang et al. 2019, arXiv:1711.01530,
    definition 2, which calls this the square) with the Fisher information of the
    model, F = J^T (d^2 loss / dz^2) J for cross-entropy: for other losses it is the
    Gauss-Newton matrix that is taken. For a ReLU network without biases and BatchNorm
    it is invariant under rescaling of the layers.

    Args:
        risk: the mean loss f, held at the parameters theta.
        start: the parameters that training began with: (n,), or a state dict.

    Returns:
        `Norms`; `fisher_rao` is None for a risk from a closure, which hides the outputs.

    Raises:
        ValueError: `start` has another length than theta.

    Cost: one gradient, one Gauss-Newton product.
    """
    distance = None
    if start is not None:
        origin = _tensors.flat_like(start, risk.names, risk.shapes, "start")
        distance = risk.shared.norm(risk.theta - origin.to(risk.theta))
    fisher_rao, gradient_norm = None, math.nan
    with Run("norms", progress=False, ranks=risk.ranks) as run:
        gradient_norm = risk.shared.norm(risk.gradient())
        # Neither a closure nor a loss without second derivative has such a product.
        with suppress(ValueError, TypeError):
            product = risk.product(risk.theta, "gauss_newton")
            fisher_rao = risk.shared.dot(product, risk.theta)
    lengths = (gradient_norm, fisher_rao or 0.0, distance or 0.0)
    is_finite = all(math.isfinite(length) for length in lengths)
    return Norms(
        gradient_norm=gradient_norm,
        parameter_norm=risk.shared.norm(risk.theta),
        distance_from_start=distance,
        fisher_rao=fisher_rao,
        status=Status.worst(run.status, finite=is_finite),
        cost=Cost(gradients=1, products=int(fisher_rao is not None), seconds=run.seconds),
    )


@dataclass(frozen=True, kw_only=True)
class RelativeFlatness(Result):
    """Petzka's relative flatness of every layer; small is flat."""

    layers: tuple[str, ...]  # names of the weights
    values: tuple[float, ...]
    standard_errors: tuple[float, ...]  # over the probes, with the products' own
    num_probes: int  # completed; each is a product of every block

    def __getitem__(self, layer: str) -> float:
        return self.values[self.layers.index(layer)]

    def _rows(self) -> Iterable[Reading]:
        """That of the last layer, the one the theory is about."""
        yield Reading(
            name="relative_flatness",
            value=self.values[-1],
            error=self.standard_errors[-1],
            evidence=f"standard error over {self.num_probes} probes; of {self.layers[-1]}",
        )

    def _figure(self, path: Any, ax: Any) -> Any:
        """A bar for each layer with its standard error."""
        rows = zip(self.layers, self.values, self.standard_errors, strict=True)
        shown = [Reading(name=name, value=v, error=error) for name, v, error in rows]
        return bars(shown, "relative flatness with its standard error, loss", path, ax=ax)


@of_a_risk
def relative_flatness(
    risk: EmpiricalRisk,
    *,
    layers: str | Sequence[str] | None = None,
    num_probes: int = 30,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> RelativeFlatness:
    r"""How curved is each layer, relative to the size of its weights?

    $$\kappa^l = \sum_{s,s'} \langle w_s, w_{s'} \rangle\, \mathrm{tr}(H_{s,s'})$$

    with w_s the rows of the layer's weight (a filter of a convolution is a row) and
    H_{s,s'} the block of the Hessian between rows s and s'. It equals the trace of
    $L H_l L$ with $L = (W W^T)^{1/2}$ acting on rows, which random signs estimate for
    all layers in one sweep over the data. Rescaling a whole layer leaves it unchanged;
    rescaling single neurons does not.

    Args:
        risk: the mean loss f, held at the parameters theta.
        layers: names of weights with at least two dimensions; None means all of them
            (the theory of Petzka et al. is about the last one).
        num_probes: random signs, >= 2.
        seed: of the signs.
        max_seconds: stop after the sweep that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `RelativeFlatness`; after an interrupt from the probes made so far.

    Raises:
        ValueError: a layer that is no such weight, too few probes.
        TypeError: a network without such weights.

    Cost: `num_probes` sweeps over the data, in each a product of every layer's block.

    References:
        Petzka et al. (2021), arXiv:2001.00939, definition 3 (trace). Their code first
        scales the feature layer to unit standard deviation; here nothing is scaled.
    """
    shapes = dict(zip(risk.names, risk.shapes, strict=True))
    chosen = [name for name, shape in shapes.items() if len(shape) > 1]
    if layers is not None:
        layers = [layers] if isinstance(layers, str) else list(layers)
        ensure(bool(layers), "layers", "name at least one weight", "none")
        unknown = next((name for name in layers if name not in chosen), None)
        contract = "name weights of two dimensions or more"
        there = f"There are {', '.join(chosen[:5])}."
        require(unknown is None, "layers", contract, unknown, there)
        chosen = layers
    ensure_available(
        bool(chosen),
        "risk",
        "have a weight of two dimensions or more",
        "none (not available for this network)",
    )
    num_probes = whole("num_probes", num_probes, 2)
    weights = dict(zip(risk.names, _tensors.split(risk.theta, risk.shapes), strict=True))
    is_finite = all(bool(weights[name].isfinite().all()) for name in chosen)
    rows = [weights[name].flatten(1) for name in chosen]
    roots = [_root_of_rows(weight) for weight in rows] if is_finite else []
    samples: list[list[float]] = []
    inexact: list[list[float]] = []
    generator = _tensors.seeded(seed)
    run = Run(
        "sweeps",
        max_seconds=max_seconds,
        total=num_probes,
        progress=progress,
        ranks=risk.ranks,
    )
    with run:
        for _ in range(num_probes if is_finite else 0):
            run.step()
            probes = [
                root @ _tensors.random_signs(weight, generator)
                for weight, root in zip(rows, roots, strict=True)
            ]
            forms, errors = _quadratic_forms(risk, chosen, probes)
            samples.append(forms)
            inexact.append(errors)
    columns = list(zip(*samples, strict=True)) or [()] * len(chosen)
    found = [mean_and_error(column) for column in columns]
    of_products = np.mean(inexact, 0) if inexact else np.zeros(len(chosen))
    is_finite &= not samples or all(math.isfinite(value) for value, _ in found)
    return RelativeFlatness(
        layers=tuple(chosen),
        values=tuple(value for value, _ in found),
        standard_errors=tuple(
            math.hypot(error, of_product)
            for (_, error), of_product in zip(found, of_products, strict=True)
        ),
        status=Status.worst(run.status, finite=is_finite),
        num_probes=len(samples),
        cost=Cost(products=len(samples) * len(chosen), seconds=run.seconds),
        settings={"num_probes": num_probes, "seed": seed},
    )


# -- inside ----------------------------------------------------------------------------


def _quadratic_forms(
    risk: EmpiricalRisk, names: Sequence[str], probes: Sequence[Tensor]
) -> tuple[list[float], list[float]]:
    """z^T H_l z for every layer, and what inexact products may have moved it by.

    Differences of gradients know the error of a whole product, not of a block.
    """
    if risk.prepare().relative_error is None:
        z = [probe.flatten() for probe in probes]
        products = risk.block_products([[name] for name in names], z)
        forms = [float(_tensors.dot64(*pair)) for pair in zip(z, products, strict=True)]
        return forms, [0.0] * len(forms)
    rows = risk.theta.new_zeros(len(names), risk.n)
    for row, name, probe in zip(rows, names, probes, strict=True):
        pieces = _tensors.split(row, risk.shapes)
        place = pieces[risk.names.index(name)]
        place.copy_(probe.view_as(place))
    whole, errors = risk.product_and_error(rows)
    forms = [float(_tensors.dot64(*pair)) for pair in zip(rows, whole, strict=True)]
    return forms, (errors * rows.norm(dim=1)).tolist()


def _root_of_rows(weight: Tensor) -> Tensor:
    """(W W^T)^(1/2), (rows, rows)."""
    values, vectors = torch.linalg.eigh((weight.double() @ weight.double().T).cpu())
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root.to(weight)


class _Root:
    """Where an increasing function of log x passes a level: by fours, then halving.

    `bracket` holds the last points below and above the level, also when interrupted.
    """

    def __init__(
        self, function: Callable[[float], float], level: float, tol: float
    ) -> None:
        self._function, self._level, self._tol = function, level, tol
        self.bracket = (0.0, math.inf)
        self.status = Status.NOT_REACHED

    @property
    def middle(self) -> float:
        """Of the bracket, in the logarithm; NaN while it is open."""
        low, high = self.bracket
        return math.sqrt(low * high) if low > 0 and high < math.inf else math.nan

    def find(self, is_finite: bool) -> None:
        """Look at points until the bracket is narrow, or as narrow as numbers can be."""
        if not is_finite:
            self.status = Status.NON_FINITE
            return
        exponent = -5
        for stride in (2, 2, 2, 2, 4, 8, 16, 32, 64):  # powers of 2, until enclosed
            self._look(2.0**exponent)
            low, high = self.bracket
            if low > 0 and high < math.inf:
                break
            exponent += stride if low else -stride
        else:
            return
        while high > low * (1 + self._tol) and self.middle not in (low, high):
            self._look(self.middle)
            low, high = self.bracket
        self.status = Status.CONVERGED

    def _look(self, x: float) -> None:
        low, high = self.bracket
        is_below = self._function(x) < self._level - _SLACK
        self.bracket = (x, high) if is_below else (low, x)


def _accuracy_at_theta(risk: EmpiricalRisk) -> float:
    """NaN where the loss is not finite: its largest outputs mean nothing."""
    value, accuracy = risk.value_and_accuracy()
    return accuracy if math.isfinite(value) else math.nan


def _interval(drops: dict[float, np.ndarray], level: float) -> tuple[float, float]:
    """The sigmas at which the 95 % interval of the mean drop holds the level.

    Ends that no sigma looked at excludes are open: 0 and infinity. So is the lower one
    where few draws bear the drop, since another, not drawn, may bear as much.
    """
    if not drops:
        return 0.0, math.inf
    sigmas, table, lower, upper = _ends(drops)
    low, high = (_crossing(np.log(sigmas), end, level) for end in (upper, lower))
    reached = np.flatnonzero(table.mean(1) >= level - _SLACK)
    at_level = table[reached[0] if len(reached) else -1].clip(0)
    bearing = at_level.sum() ** 2 / np.square(at_level).sum() if at_level.any() else 0.0
    return (
        math.exp(low) if math.isfinite(low) and bearing >= _FEWEST_BEARING else 0.0,
        math.exp(high) if math.isfinite(high) else math.inf,
    )


def _unclear(drops: dict[float, np.ndarray], level: float) -> float | None:
    """A sigma that tells more of an end of the interval; None where both are clear."""
    sigmas, _, lower, upper = _ends(drops)
    for end in (upper, lower):
        above = np.flatnonzero(end >= level)
        i = int(above[0]) if len(above) else len(sigmas)
        if i in (0, len(sigmas)):
            return float(sigmas[0] / 2 if i == 0 else sigmas[-1] * 2)
        if sigmas[i] > _CLEAR * sigmas[i - 1]:
            return math.sqrt(sigmas[i] * sigmas[i - 1])
    return None


def _ends(
    drops: dict[float, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sigmas in order; their drops (sigmas, draws); ends of each mean drop's interval."""
    sigmas = np.array(sorted(drops))
    table = np.stack([drops[s] for s in sigmas])
    lower, upper = np.array([mean_interval(row) for row in table]).T
    return sigmas, table, lower, upper


def _crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Where the line through the points first comes from below to the level."""
    above = np.flatnonzero(y >= level)
    if not len(above) or above[0] == 0:
        return math.nan
    i = above[0]
    return float(x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def _scale(risk: EmpiricalRisk, magnitude_aware: bool) -> Tensor:
    if not magnitude_aware:
        return torch.ones_like(risk.theta)
    return (risk.theta.square() + _MAGNITUDE_FLOOR**2).sqrt()


def _check(risk: EmpiricalRisk, accuracy_drop: float, tol: float) -> None:
    fraction("accuracy_drop", accuracy_drop, "0.1 is usual.")
    positive("tol", tol)
    ensure_available(
        risk.is_classification,
        "risk",
        "classify, with class numbers as targets",
        "another loss or targets (not available for regression or a closure)",
    )
