"""How are the eigenvalues spread? Spectral density with a band, and integrals of it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sharpness import _tensors
from sharpness._arguments import ensure, fraction, is_whole, of_a_risk, positive, whole
from sharpness._results import Cost, Reading, Result, Status
from sharpness._run import Run
from sharpness.krylov.lanczos import Lanczos, Tridiagonal
from sharpness.krylov.quadrature import (
    Rule,
    interval,
    smoothed,
    standard_error,
    stands_still,
    steps_error,
)
from sharpness.measures.eigenvalues import product_name
from sharpness.measures.multiplication import Multiplication
from sharpness.risk.curvature import Matrix
from sharpness.risk.empirical import EmpiricalRisk

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from sharpness.report.figures import Figure

_WIDTH = 0.01  # of the Gaussians, in ranges of the spectrum
_FEWEST, _MOST, _EVERY = 40, 80, 4  # steps, where none are asked for, and looks at them
_MOST_ROWS = 250  # of a table of the density
_MARGIN = 5  # Gaussian widths that the grid reaches beyond the spectrum


@dataclass(frozen=True, kw_only=True)
class SpectralIntegral:
    """An integral of a spectral density, with its confidence interval."""

    value: float
    standard_error: float  # over random starts
    quadrature_error: (
        float  # of finitely many steps: half a proven bracket, or what changed
    )
    product_error: float  # what inexact products may have moved it by
    interval: tuple[float, float]  # all three errors together
    confidence: float

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.value:.4g} ± {self.standard_error:.1g}   (standard error; "
            f"{self.confidence:.0%}: {low:.4g} to {high:.4g})"
        )

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(str(self))}</code>"


class _Part(NamedTuple):
    """Of a nonnegative function: mean over eigenvalues, mean square, ends."""

    mean: float
    square: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SpectralDensity(Result):
    r"""The density of the n eigenvalues, each drawn as a Gaussian of width `sigma`.

    `band` covers, at each grid point by itself, the density
    $\frac{1}{n} \sum_i N(x; \lambda_i, \sigma^2)$ with probability `confidence`: from the
    number of starts, whose variance is known, from the number of steps, whose effect is
    seen by comparing with three quarters of them, and from the products' own error. Where
    `sigma` is finer than the steps resolve, the band is wide: `unresolved` says for what
    share of the eigenvalues.
    """

    grid: np.ndarray = field(repr=False, compare=False)  # (g,) unit of an eigenvalue
    density: np.ndarray = field(repr=False, compare=False)  # (g,), integrates to 1
    band: np.ndarray = field(repr=False, compare=False)  # (2, g) lower and upper end
    sigma: float
    unresolved: float  # share of eigenvalues at which more steps may halve the density
    product_error: float  # how far inexact products may have moved an eigenvalue
    n: int
    num_starts: int  # completed
    ends: tuple[float, float]  # Ritz values: inside of the spectrum's ends
    # Negative curvature for each parameter, sum of |lambda_i| / n over lambda_i < 0: the
    # integral over the negative part, to which zeros add nothing. None without a start.
    negative_mass: SpectralIntegral | None = None
    rules: tuple[Rule, ...] = field(repr=False, compare=False)

    @property
    def confidence(self) -> float:
        """Of the band and of every interval."""
        return float(self.settings["confidence"])

    def _rows(self) -> Iterable[Reading]:
        """The negative curvature for each parameter."""
        mass = self.negative_mass
        if mass is None:
            return [Reading(name="negative_mass", value=math.nan)]
        (low, high), (least, largest) = mass.interval, self.ends
        evidence = (
            f"{self.confidence:.0%}: {low:.4g} to {high:.4g}; {self.num_starts} starts"
        )
        seen = f"spectrum from {least:.4g} to {largest:.4g}"
        if self.unresolved > 0.05:
            seen += f", unresolved at {self.unresolved:.0%} of it"
        return [
            Reading(
                name="negative_mass",
                value=mass.value,
                error=(high - low) / 2,
                evidence=f"{evidence}, {seen}",
            )
        ]

    def integral(self, function: Callable[[np.ndarray], np.ndarray]) -> SpectralIntegral:
        r"""$\sum_i F(\lambda_i)$ over all n eigenvalues, for a continuous function F.

        The value is the mean over the quadratures with all steps down to half of them, the
        quadrature's error the farthest of them from it, in the mean over starts: where F
        has a kink at an eigenvalue of much weight they swing, and none is the best.

        Args:
            function: of an array of eigenvalues, entry by entry.
        """
        self._need_a_start()
        plus = self._part(lambda x: np.maximum(function(x), 0))
        minus = self._part(lambda x: np.maximum(-function(x), 0))
        value = plus.mean - minus.mean
        error = float(np.mean([_swing(rule.integrals(function)) for rule in self.rules]))
        square = np.asarray(plus.square + minus.square)
        moved = self._moved(function)
        # Each end moves with what its parts may be off by (MOVER, Zou and Donner 2008).
        below = math.hypot(plus.mean - plus.low, minus.high - minus.mean) + error + moved
        above = math.hypot(plus.high - plus.mean, minus.mean - minus.low) + error + moved
        spread = standard_error(np.asarray(value), square, self.n, len(self.rules))
        return SpectralIntegral(
            value=self.n * value,
            standard_error=self.n * float(spread),
            quadrature_error=self.n * error,
            product_error=self.n * moved,
            interval=(self.n * (value - below), self.n * (value + above)),
            confidence=self.confidence,
        )

    def count_above(self, t: float) -> SpectralIntegral:
        """How many eigenvalues lie above t.

        The bracket from the quadrature is proven (Chebyshev, Markov, Stieltjes), wide
        where t lies among eigenvalues that the steps do not tell apart, and vanishes in
        gaps. Exact zeros, of which trained networks have many, lie on no side of t = 0.
        """
        self._need_a_start()
        lower, upper = t - self.product_error, t + self.product_error
        brackets = [
            (rule.mass_above(upper)[0], rule.mass_above(lower)[1]) for rule in self.rules
        ]
        ends = np.mean(brackets, 0)
        exact = np.mean([np.ptp(rule.mass_above(t)) for rule in self.rules])
        starts, middle = len(self.rules), ends.mean()
        lows, highs = interval(ends, ends, np.ones(2), self.n, starts, self.confidence)
        spread = standard_error(middle, middle, self.n, starts)
        return SpectralIntegral(
            value=self.n * float(middle),
            standard_error=self.n * float(spread),
            quadrature_error=self.n * float(exact) / 2,
            product_error=self.n * float(ends[1] - ends[0] - exact) / 2,
            interval=(self.n * float(lows[0]), self.n * float(highs[1])),
            confidence=self.confidence,
        )

    def effective_dimension(self, ridge: float) -> SpectralIntegral:
        r"""$\sum_i \lambda_i / (\lambda_i + \alpha)$ over positive eigenvalues, alpha > 0.

        How many directions the data determine against a ridge (or prior precision) alpha
        (MacKay 1992; Maddox, Benton, Wilson 2020).
        """
        positive("ridge", ridge, "It is a curvature.")
        return self.integral(lambda x: np.maximum(x, 0) / (np.maximum(x, 0) + ridge))

    def _part(self, function: Callable[[np.ndarray], np.ndarray]) -> _Part:
        """The mean of a nonnegative function over eigenvalues, and where it lies."""
        mean = float(np.mean([rule.integrals(function).mean() for rule in self.rules]))
        seen = [(function(rule.nodes), rule.weights) for rule in self.rules]
        of_square = float(np.mean([values**2 @ weights for values, weights in seen]))
        largest = max(float(values.max()) for values, _ in seen)
        low, high = interval(
            np.asarray(mean),
            np.asarray(max(of_square, mean**2)),
            np.asarray(largest),
            self.n,
            len(self.rules),
            self.confidence,
        )
        return _Part(mean, of_square, float(low), float(high))

    def _moved(self, function: Callable[[np.ndarray], np.ndarray]) -> float:
        """What the mean changes by, if every eigenvalue moves by the products' error."""
        changes = []
        for rule in self.rules:
            here, far = function(rule.nodes), self.product_error
            ends = [np.abs(function(rule.nodes + d) - here) for d in (-far, far)]
            changes.append(np.maximum(*ends) @ rule.weights)
        return float(np.mean(changes))

    def _negative_mass(self) -> SpectralIntegral:
        total = self.integral(lambda x: np.maximum(-x, 0))
        low, high = total.interval
        return SpectralIntegral(
            value=total.value / self.n,
            standard_error=total.standard_error / self.n,
            quadrature_error=total.quadrature_error / self.n,
            product_error=total.product_error / self.n,
            interval=(max(0.0, low / self.n), high / self.n),
            confidence=total.confidence,
        )

    def _need_a_start(self) -> None:
        contract, got = "have a completed start", f"none ({self.status})"
        ensure(bool(self.rules), "density", contract, got, "Give it more time.")

    def drawn(self) -> tuple[Sequence[str], list[tuple[float, ...]]]:
        """Density with the ends of its band, at up to 250 points of the grid.

        Of more, every so many: by default they lie less than half a sigma apart.
        """
        low, high = self.band
        step = -(-len(self.grid) // _MOST_ROWS)
        shown = (each[::step] for each in (self.grid, self.density, low, high))
        rows = list(zip(*(each.tolist() for each in shown), strict=True))
        which = "eigenvalue" if step == 1 else f"eigenvalue, every {step} of the grid"
        return (which, "density", "band from", "band to"), rows

    def plot(
        self, path: str | Path | None = None, *, title: str = "", ax: Axes | None = None
    ) -> Figure:
        """Density and band, logarithmic, over ticks where the runs saw eigenvalues.

        Args:
            path: where the PNG goes, if anywhere.
            title: the line above; by default what it is.
            ax: axes of your own figure, to draw there.
        """
        self._need_a_start()
        from sharpness.report.figures import density_plot

        low, high = self.ends
        usual = f"spectral density from {low:.4g} to {high:.4g}, sigma {self.sigma:.2g}"
        return density_plot(
            self.grid,
            self.density,
            self.band,
            1 / (self.n * self.sigma * math.sqrt(2 * math.pi)),
            path,
            ritz=np.concatenate([rule.nodes for rule in self.rules]).tolist(),
            title=title or usual,
            ax=ax,
            band_label=f"{self.confidence:.0%} band",
        )


@of_a_risk
def spectral_density(
    risk: EmpiricalRisk,
    *,
    num_starts: int = 10,
    num_steps: int | None = None,
    matrix: Matrix = "hessian",
    sigma: float | None = None,
    grid: np.ndarray | int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> SpectralDensity:
    r"""The spectral density of the Hessian by stochastic Lanczos quadrature.

    $$\phi(x) = \frac{1}{n} \sum_i N(x; \lambda_i, \sigma^2)$$

    Each random start on the unit sphere gives, by Lanczos with full reorthogonalisation, a
    Gauss quadrature for its own spectral measure, whose mean over starts is the density.

    Args:
        risk: the mean loss f, held at the parameters theta.
        num_starts: random starts, >= 1.
        num_steps: Lanczos steps (products) each, >= 2. None: 40, and further ones up to 80
            until the last quarter of them has changed the density by a third at most.
        matrix: `"hessian"`, or another matrix of `EmpiricalRisk.product`.
        sigma: width of the Gaussians, in the unit of an eigenvalue; by default 1 % of
            the range of the spectrum. The literature has no common value.
        grid: where the density is wanted, or how many points, evenly over the spectrum.
        confidence: of the band, in (0, 1).
        seed: of the starts.
        max_seconds: stop after the product that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `SpectralDensity`. Status `inexact` where the products' own error may move an
        eigenvalue by more than `sigma`. An interrupt (Ctrl-C) or `max_seconds` give the
        density from the starts completed; `.integral`, `.count_above`, `.negative_mass`
        and `.effective_dimension` cost nothing more.

    Raises:
        ValueError: an argument outside its range.

    Cost: `num_starts * num_steps` products (fewer where n is smaller), by default about 420
    for a trained network; memory `num_steps` n, or a few times that where small networks
    take several starts at once.

    References:
        Golub and Meurant (1994); Ubaru, Chen, Saad (2017); Ghorbani, Krishnan, Xiao
        (2019) for networks. The band is ours: Var(z^T F z) = 2 / (n + 2) Var(F) for z on
        the sphere, and the chi^2 approximation of Satterthwaite (1946).
    """
    num_starts = whole("num_starts", num_starts, 1, "Pass 10.")
    if num_steps is not None:
        num_steps = whole("num_steps", num_steps, 2, "Pass 80.")
    most = num_steps or _MOST
    positive("sigma", 1 if sigma is None else sigma, "Leave it out for 1 %.")
    fraction("confidence", confidence)
    generator = _tensors.seeded(seed)
    done: list[Tridiagonal] = []
    run = Run(
        product_name(matrix),
        max_seconds=max_seconds,
        min_steps=1,
        total=num_starts * most,
        progress=progress,
        ranks=risk.ranks,
    )
    multiply = Multiplication(run, risk, matrix)

    def is_over(made: Tridiagonal) -> bool:
        steps = len(made.alphas)
        if made.invariant or steps >= most or num_steps is not None:
            return made.invariant or steps >= most
        if steps < _FEWEST or steps % _EVERY:
            return False
        rule = Rule.of(made)
        return stands_still(rule, sigma or _default_sigma(rule.nodes), risk.n)

    with run:
        plan = risk.prepare(num_starts * most, matrix)
        for first in range(0, num_starts, plan.directions_at_once):
            together = range(first, min(num_starts, first + plan.directions_at_once))
            drawn = [risk.shared.normal(risk.theta, generator) for _ in together]
            runs = [Lanczos(v, generator, vectors=risk.shared) for v in drawn]
            for ended in _lockstep(multiply, runs, is_over):
                done += ended
    rules = tuple(map(Rule.of, done))
    nodes = np.concatenate([np.empty(0), *(rule.nodes for rule in rules)])
    width = sigma or _default_sigma(nodes)
    points = _grid(grid, nodes, width)
    inexact = multiply.errors_together(
        max([len(rule.nodes) for rule in rules], default=most)
    )
    density, band, unresolved = _band(rules, points, width, risk.n, confidence, inexact)
    found = SpectralDensity(
        grid=points,
        density=density,
        band=band,
        sigma=width,
        unresolved=unresolved,
        product_error=inexact,
        n=risk.n,
        num_starts=len(rules),
        ends=(float(nodes.min()), float(nodes.max())) if rules else (math.nan, math.nan),
        rules=rules,
        status=Status.worst(run.status, *([Status.INEXACT] if inexact > width else [])),
        cost=Cost(products=run.num_steps, seconds=run.seconds),
        settings={
            "num_starts": num_starts,
            "num_steps": num_steps,
            "matrix": matrix,
            "confidence": confidence,
            "seed": seed,
        },
    )
    return replace(found, negative_mass=found._negative_mass()) if rules else found


def _lockstep(
    multiply: Multiplication,
    runs: list[Lanczos],
    is_over: Callable[[Tridiagonal], bool],
) -> Iterator[list[Tridiagonal]]:
    """Advance all runs by a step a time: what has ended with it."""
    open_ = runs
    while open_:
        directions = torch.stack([lanczos.direction() for lanczos in open_])
        for lanczos, product in zip(open_, multiply(directions), strict=True):
            lanczos.absorb(product)
        over = [lanczos for lanczos in open_ if is_over(lanczos.state.first)]
        open_ = [lanczos for lanczos in open_ if lanczos not in over]
        yield [lanczos.state.first for lanczos in over]


def _band(
    rules: tuple[Rule, ...],
    grid: np.ndarray,
    sigma: float,
    n: int,
    confidence: float,
    moved: float,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Density, band, and the share of eigenvalues that the steps do not resolve."""
    if not rules:
        nothing = np.full(len(grid), np.nan)
        return nothing, np.stack([nothing, nothing]), math.nan
    found = [smoothed(rule, grid, sigma, n, moved) for rule in rules]
    fine, coarse, square, least, most = (
        np.mean([getattr(each, name) for each in found], 0)
        for name in ("density", "coarse", "square", "least", "most")
    )
    largest = np.max([each.largest for each in found], 0)
    low, high = interval(fine, square, largest, n, len(rules), confidence)
    between, lost = zip(*(steps_error(rule, grid, sigma) for rule in rules), strict=True)
    error = np.maximum(np.abs(fine - coarse), np.mean(between, 0))
    error += np.finfo(float).eps * fine.max()
    low = np.maximum(low - error - (fine - least), 0)
    return fine, np.stack([low, high + error + (most - fine)]), float(np.mean(lost))


def _swing(values: np.ndarray) -> float:
    """How far the farthest is from their mean."""
    return float(np.abs(values - values.mean()).max())


def _default_sigma(nodes: np.ndarray) -> float:
    if not len(nodes):
        return math.nan
    scale = float(np.ptp(nodes)) or float(np.abs(nodes).max())
    return _WIDTH * scale or _WIDTH  # of the zero matrix, any width will do


def _grid(grid: np.ndarray | int, nodes: np.ndarray, sigma: float) -> np.ndarray:
    if not is_whole(grid):
        return np.asarray(grid, float)
    if not len(nodes):
        return nodes
    low, high = nodes.min() - _MARGIN * sigma, nodes.max() + _MARGIN * sigma
    return np.linspace(low, high, int(grid))
