"""How much can the risk rise in Keskar's small box? Metric 2.1, epsilon-sharpness."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import (
    Any,
    ClassVar,
    Literal,
    TypedDict,
    Unpack,
    get_args,
    overload,
)

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from sharpness import _tensors
from sharpness._arguments import (
    ensure,
    is_whole,
    of_a_risk,
    positive_list,
    require,
    whole,
    whole_seed,
)
from sharpness._results import (
    Cost,
    Reading,
    Result,
    Results,
    Status,
    ensure_available,
    short,
    until_interrupted,
)
from sharpness._run import Deadline, Run
from sharpness.optimize.ascent import sign_ascent
from sharpness.optimize.box import Box, Maximum, ValueAndGradient
from sharpness.optimize.lbfgsb import lbfgsb
from sharpness.risk import memory
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.statistics import mean_and_sd

Solver = Literal["lbfgsb", "scipy", "ascent"]
Columns = Literal["normal", "unit"]
Start = Literal["random", "zero"]
_WHOLE = (Status.COMPLETED, Status.LINE_SEARCH_FAILED)
_IN_DOUBT = 1e-2  # of f: a rise that is smaller is looked for in float64, and so is
_TINY = 1e-4  # one in a box that is smaller: float32 knows its width to a thousandth
_CUT_SHORT = (Status.INTERRUPTED, Status.MAX_SECONDS)
PROTOCOL_ITERATIONS = 10  # Keskar et al. (2017), section 2.2.2
# The start is small, so that its gradient is the Hessian's answer to a random
# direction, and not zero, so that there is a gradient at all.
_START = 0.1
# So many times all columns are added one by one before theta + A y is made afresh.
_AFRESH = 4
_STRETCH = 1 << 12  # rows of A that are drawn at once
_USUAL = "The paper used 1e-3 and 5e-4."


@dataclass(frozen=True, kw_only=True)
class EpsilonSharpness(Result):
    """Metric 2.1 of Keskar et al. (2017): `phi` percent, a lower bound by construction.

    `phi` is the largest rise any solver found; `phi_protocol` is what ten iterations of
    L-BFGS-B reach, the only number to be put beside the paper's.
    """

    radius: ClassVar[str] = "epsilon"
    phi: float  # percent of 1 + f(theta)
    phi_protocol: float | None  # percent; None where L-BFGS-B did not run 10 iterations
    value: float  # f(theta)
    value_max: float  # f at the best point
    box_share: float  # share of the coordinates of y that lie on the box's faces
    displacement: Tensor = field(repr=False, compare=False)  # y, (n,) or (p,)
    solver: str  # the one that found the best point
    message: str  # its last words
    dtype: str = "float32"  # of theta and f in the search

    def _rows(self) -> Iterable[Reading]:
        """Phi, a lower bound, with the paper's protocol beside it."""
        words = f"{self.box_share:.0%} of coordinates on the box"
        return [_reading(self.settings, self.phi, None, self.phi_protocol, words)]

    def _curves(self) -> Iterable[tuple[str, float, float, float]]:
        yield "phi, best found (≥)", self.phi, math.nan, math.nan
        protocol = math.nan if self.phi_protocol is None else self.phi_protocol
        yield "phi by the paper's protocol", protocol, math.nan, math.nan

    def _figure(self, path: Any, ax: Any) -> Any:
        """Phi at this epsilon; a list of results draws them against epsilon."""
        return Results([self]).plot(path, ax=ax)


def _reading(
    settings: Mapping[str, Any],
    phi: float,
    error: float | None,
    protocol: float | None,
    evidence: str,
) -> Reading:
    """`phi(1e-3)`, `phi(1e-3, p=100)`."""
    p, first = settings["subspace_dim"], ""
    if protocol is not None:
        first = f"protocol {protocol:.4g} %, "
    return Reading(
        name=f"phi({short(settings['epsilon'])}{'' if p is None else f', p={p}'})",
        value=phi,
        error=error,
        evidence=first + evidence + ("" if p is None else f", {settings['columns']} A"),
        bound="≥",
        unit="%",
        axis="phi, % of 1 + f" + ("" if p is None else f", in {p} random directions"),
    )


class _Keywords(TypedDict, total=False):
    subspace_dim: int | None
    columns: Columns
    solver: Solver | None
    max_iter: int
    num_starts: int
    start: Start
    corners: Tensor | None
    seed: int
    max_seconds: float | None
    progress: bool | None


@overload
def epsilon_sharpness(
    risk: EmpiricalRisk, epsilon: float = ..., **options: Unpack[_Keywords]
) -> EpsilonSharpness: ...
@overload
def epsilon_sharpness(
    risk: EmpiricalRisk, epsilon: Sequence[float], **options: Unpack[_Keywords]
) -> Results[EpsilonSharpness]: ...
@of_a_risk
def epsilon_sharpness(
    risk: EmpiricalRisk,
    epsilon: float | Sequence[float] = 1e-3,
    *,
    subspace_dim: int | None = None,
    columns: Columns = "normal",
    solver: Solver | None = None,
    max_iter: int = PROTOCOL_ITERATIONS,
    num_starts: int = 1,
    start: Start = "random",
    corners: Tensor | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> EpsilonSharpness | Results[EpsilonSharpness]:
    r"""Largest relative rise of the risk in a small box around the parameters.

    $$\phi = 100\,\frac{\max_{y \in C_\epsilon} f(\theta + A y) - f(\theta)}
      {1 + f(\theta)}, \qquad
      C_\epsilon = \{y : |y_i| \le \epsilon\,(|(A^{+}\theta)_i| + 1)\}$$

    The maximum is sought, not proven: the value is a lower bound. It depends on the
    number of parameters (the box's corner is at least epsilon sqrt(n) away) and on the
    parametrisation (Dinh et al. 2017), and where it exceeds some tens of percent it is
    no longer a matter of curvature at theta.

    Args:
        risk: the mean loss f, held at the parameters theta.
        epsilon: half-width of the box relative to |theta_i| + 1, > 0; the paper used
            1e-3 and 5e-4. A list gives a list of results, each started afresh.
        subspace_dim: p, columns of a random A, 1 <= p <= n (the paper: 100); None means
            A = I, the full space.
        columns: `"normal"` draws the entries of A from N(0, 1); `"unit"` then scales
            each column to length 1. The paper does not say; the choice moves the value
            by orders of magnitude and is recorded.
        solver: `"lbfgsb"` (on the device), `"scipy"` (the reference implementation, in
            float64 on the CPU), `"ascent"` (projected sign ascent); None runs `lbfgsb`
            and `ascent` from the same starts and keeps the best.
        max_iter: iterations of L-BFGS-B, >= 1; ascent makes twice as many evaluations.
        num_starts: random starting points, >= 1. The first, in a tenth of the box, alone
            gives `phi_protocol`; the second is its mirror image. The others come from the
            whole box, every other one as a mirror image too.
        start: of the search: `"random"`, a point in a tenth of the box; or `"zero"`, the
            point y = 0 before the random ones, of which there is then one fewer. The
            paper does not say. Where the gradient vanishes a search from 0 finds nothing.
        corners: vectors (n,) or (j, n), such as eigenvectors of `eigenpairs` or the
            gradient: the search also starts towards the corner of the box that each one
            points at, and towards the opposite corner, a tenth of the way out.
        seed: of A and of the starts.
        max_seconds: of the whole call, all epsilons together: stop after the evaluation
            that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `EpsilonSharpness`. Its status is `completed` when the stated budget was used,
        and `line_search_failed` when no rise at all was found.

    Raises:
        ValueError: `epsilon` <= 0, `subspace_dim` outside [1, n], an unknown `solver`
            or `columns`, a count below 1, or an A that does not fit in memory.
        NotAvailableError: f(theta) <= -1, where the metric is not defined.

    Cost: about 30 gradients for each start (two starts a corner) and epsilon (11 for
    `lbfgsb`, 19 more for `ascent`) and memory of 2 `max_iter` + 12 vectors; p n numbers
    for a subspace.

    References:
        Keskar et al. (2017), arXiv:1609.04836, Metric 2.1. Left open there, and chosen
        here: y starts at a uniformly random point of a tenth of the box (at a minimum
        the gradient at y = 0 vanishes); coordinates are measured in half-widths and the
        rise in units of the first gradient's root mean square, so that L-BFGS-B's first
        step has the length of the box's half-diagonal, for every epsilon and scale of
        f; ten iterations are run whatever the tolerances.
    """
    epsilons, several = positive_list("epsilon", epsilon, _USUAL)
    seed = whole_seed(seed)
    max_iter = whole("max_iter", max_iter, 1)
    num_starts = whole("num_starts", num_starts, 1)
    require(columns in get_args(Columns), "columns", "be 'normal' or 'unit'", columns)
    known = f"be one of {', '.join(_SOLVERS)}, or None"
    require(solver is None or solver in _SOLVERS, "solver", known, solver)
    require(start in get_args(Start), "start", "be 'random' or 'zero'", start)
    corners = _checked_corners(risk, corners)
    manifold = _Manifold(risk, subspace_dim, columns, seed)
    asked = {
        "subspace_dim": manifold.p,
        "columns": manifold.columns,
        "max_iter": max_iter,
        "num_starts": num_starts,
        "seed": seed,
        "start": start,
    }
    measured = partial(
        _measured,
        solvers=("lbfgsb", "ascent") if solver is None else (solver,),
        corners=corners,
        deadline=Deadline(max_seconds),
        progress=progress,
    )
    firsts = (measured(risk, manifold, {"epsilon": e, **asked}) for e in epsilons)
    results = until_interrupted(
        _again(measured, risk, manifold, first) if _may_be_rounding(first) else first
        for first in firsts
    )
    return results if several else results[0]


@dataclass(frozen=True, kw_only=True)
class SubspaceSharpness(Result):
    """Metric 2.1 over several random subspaces: mean and standard deviation."""

    radius: ClassVar[str] = "epsilon"
    phi: float  # percent, mean over draws of the best found
    phi_sd: float  # over draws of A
    phi_protocol: float | None  # percent, mean over draws; None as in one draw
    phi_protocol_sd: float | None
    draws: tuple[EpsilonSharpness, ...]

    def _rows(self) -> Iterable[Reading]:
        """The mean with its standard error."""
        num = len(self.draws)
        error = self.phi_sd / math.sqrt(num) if num > 1 else None
        words = f"standard error over {num} draws of A"
        return [_reading(self.settings, self.phi, error, self.phi_protocol, words)]


@of_a_risk
def subspace_sharpness(
    risk: EmpiricalRisk,
    epsilon: float | Sequence[float] = 1e-3,
    *,
    subspace_dim: int = 100,
    num_draws: int = 5,
    columns: Columns = "normal",
    solver: Solver | None = None,
    max_iter: int = PROTOCOL_ITERATIONS,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> SubspaceSharpness | Results[SubspaceSharpness]:
    """Metric 2.1 in random subspaces, as in Keskar et al.'s Table 4: mean ± sd.

    Args:
        risk: the mean loss f, held at the parameters theta.
        epsilon: as in `epsilon_sharpness`; a list gives a list of results.
        subspace_dim: p, columns of A (the paper: 100).
        num_draws: of A, >= 2 (the paper: 5 trials; whether it redrew A in each is not
            stated).
        columns: how A is drawn, as in `epsilon_sharpness`.
        solver: as in `epsilon_sharpness`.
        max_iter: as in `epsilon_sharpness`.
        seed: of the first A; the others take the numbers after it.
        max_seconds: of the whole call: no draw begins later than this, and one that is
            not finished does not count.
        progress: show a bar; by default on a terminal.

    Returns:
        `SubspaceSharpness`, with every draw's result; after an interrupt of those done.

    Raises:
        ValueError: `num_draws` below 2, or an argument `epsilon_sharpness` refuses.

    Cost: `num_draws` times that of `epsilon_sharpness`.
    """
    whole("num_draws", num_draws, 2, "One draw is `epsilon_sharpness(subspace_dim=...)`.")
    seed = whole_seed(seed)
    epsilons, several = positive_list("epsilon", epsilon, _USUAL)
    drawn: list[list[EpsilonSharpness]] = []
    deadline = Deadline(max_seconds)
    for draw in range(num_draws):
        found = epsilon_sharpness(
            risk,
            epsilons,
            subspace_dim=subspace_dim,
            columns=columns,
            solver=solver,
            max_iter=max_iter,
            seed=seed + draw,
            max_seconds=deadline.left,
            progress=progress,
        )
        drawn.append(found)
        if found[-1].status in _CUT_SHORT:
            break
    of_each = [[d[i] for d in drawn if i < len(d)] for i in range(len(epsilons))]
    complete = len(drawn) == num_draws and len(of_each[-1]) == num_draws
    ended = drawn[-1][-1].status
    results = [_over_draws(draws, complete, ended) for draws in of_each if draws]
    return Results(results) if several else results[0]


def _over_draws(
    draws: Sequence[EpsilonSharpness], complete: bool, ended: Status
) -> SubspaceSharpness:
    """Mean and sd of the draws that are done; of the one begun, if there is no other."""
    done = [draw for draw in draws if draw.status not in _CUT_SHORT] or draws
    phi, sd = mean_and_sd([draw.phi for draw in done])
    known = [draw.phi_protocol for draw in done if draw.phi_protocol is not None]
    protocol = mean_and_sd(known) if len(known) == len(done) else (None, None)
    return SubspaceSharpness(
        phi=phi,
        phi_sd=sd,
        phi_protocol=protocol[0],
        phi_protocol_sd=protocol[1],
        draws=tuple(done),
        status=Status.worst(*(d.status for d in draws), *([] if complete else [ended])),
        cost=sum((draw.cost for draw in draws), Cost()),
        settings=draws[0].settings,
    )


class _Manifold:
    """theta + A y, and the half-widths of its box for epsilon = 1."""

    def __init__(
        self, risk: EmpiricalRisk, p: int | None, columns: Columns, seed: int
    ) -> None:
        self.theta, self.columns = risk.theta, columns if p is not None else None
        self.p = None if p is None else int(p)
        self.a: Tensor | None = None  # (p, n), a column of A in each row
        self._last: tuple[Tensor, Tensor] | None = None  # y and theta + A y
        self._moved = 0  # columns since theta + A y was made afresh
        preimage = risk.theta
        if p is not None:
            ensure(
                is_whole(p) and 1 <= p <= risk.n,
                "subspace_dim",
                "lie in [1, n]",
                f"{p} (n={risk.n} parameters)",
                "Leave it out for the full space.",
            )
            self.a = _random_columns(risk, int(p), columns, seed)
            preimage = _least_squares(self.a, risk.theta)
        self.half_widths = preimage.abs() + 1  # (n,) or (p,)

    def double(self) -> _Manifold:
        """The same in float64."""
        other = copy.copy(self)
        other.theta, other.half_widths = self.theta.double(), self.half_widths.double()
        other.a, other._last = None if self.a is None else self.a.double(), None
        return other

    def point(self, y: Tensor) -> Tensor:
        """Theta + A y, (n,), until the next one is asked for; y is given away.

        Near the corners of the box few coordinates change from one point to the next: only
        their columns of A are read. As rounding adds up, it is made afresh now and then.
        """
        if self.a is None:
            return y.add_(self.theta)
        before, x = self._last or (torch.full_like(y, math.nan), self.theta.clone())
        change = y - before
        changed = change.nonzero().flatten().tolist()
        self._last = None  # until it is whole
        self._moved += len(changed)
        if 2 * len(changed) > len(y) or self._moved > _AFRESH * len(y):
            torch.addmv(self.theta, self.a.T, y, out=x)
            self._moved = 0
        else:
            for i in changed:
                x.add_(self.a[i], alpha=float(change[i]))
        self._last = y, x
        return x

    def pulled_back(self, gradient: Tensor) -> Tensor:
        """A^T times a gradient (n,)."""
        return gradient if self.a is None else self.a @ gradient


def _random_columns(risk: EmpiricalRisk, p: int, columns: Columns, seed: int) -> Tensor:
    size = p * risk.n * risk.theta.element_size()
    ensure(
        2 * size <= memory.budget_bytes(risk.device),
        "subspace_dim",
        "leave A in memory",
        f"{p} (A would take {size / 1e9:.1f} GB for n={risk.n})",
        "Ask for fewer columns.",
    )
    generator, a = _tensors.seeded(seed), risk.theta.new_empty((p, risk.n))
    for part in a.split(_STRETCH, dim=1):  # turned while it is in the processor's cache
        part.copy_(torch.randn((part.shape[1], p), generator=generator).T)
    return a.div_(a.norm(dim=1, keepdim=True)) if columns == "unit" else a


def _least_squares(a: Tensor, theta: Tensor) -> Tensor:
    """A^+ theta by the normal equations: random columns are well conditioned."""
    gram = torch.zeros((len(a), len(a)), dtype=torch.float64)
    right = torch.zeros(len(a), dtype=torch.float64)
    for rows, part in zip(a.split(1 << 14, dim=1), theta.split(1 << 14), strict=True):
        gram += (rows @ rows.T).double().cpu()
        right += (rows @ part).double().cpu()
    solution: Tensor = torch.linalg.solve(gram, right)  # the same bits every time
    return solution.to(theta)


def _measured(
    risk: EmpiricalRisk,
    manifold: _Manifold,
    settings: Mapping[str, Any],
    *,
    solvers: Sequence[Solver],
    corners: Tensor | None,
    deadline: Deadline,
    progress: bool | None,
) -> EpsilonSharpness:
    run = Run("evaluations", max_seconds=deadline.left, progress=progress, ranks=risk.ranks)
    search = _Search(run, risk, manifold, settings["epsilon"])
    protocol = None
    with run:
        for state in search.states(settings, solvers, corners):
            of_protocol = search.is_first_start and search.solver != "ascent"
            if protocol is None and of_protocol and _ends_protocol(state):
                protocol = 100 * max(0.0, state.value) / (1 + search.value)
    best, status = search.best, run.status
    if status is Status.COMPLETED and not best.rise > 0:
        status = Status.LINE_SEARCH_FAILED
    return EpsilonSharpness(
        phi=100 * best.rise / (1 + search.value),
        phi_protocol=protocol,
        value=search.value,
        value_max=search.value + best.rise,
        box_share=float((best.point.abs() >= 1).double().mean()),
        displacement=best.point * search.half_widths,
        solver=best.solver,
        message=search.message,
        status=Status.worst(status, finite=search.is_finite),
        cost=Cost(gradients=run.num_steps, seconds=run.seconds),
        settings=settings,
        dtype=str(risk.dtype).removeprefix("torch."),
    )


def _may_be_rounding(found: EpsilonSharpness) -> bool:
    """Whether rounding to float32 leaves much of the rise in doubt.

    A network's f in float32 is off by up to 1e-6 of itself, and a maximum over many
    points finds the errors that go up. In a tiny box theta + y is rounded out of it.
    """
    largest = max(abs(found.value), abs(found.value_max))
    is_small = found.value_max - found.value < _IN_DOUBT * largest
    doubtful = is_small or found.settings["epsilon"] < _TINY
    return doubtful and found.dtype == "float32" and found.status in _WHOLE


def _again(
    measured: Callable[..., EpsilonSharpness],
    risk: EmpiricalRisk,
    manifold: _Manifold,
    first: EpsilonSharpness,
) -> EpsilonSharpness:
    """The search in float64; where there is none, a rise in doubt counts as none."""
    try:
        found = measured(risk.double(), manifold.double(), first.settings)
    except (RuntimeError, TypeError):  # a layer, or a device, that knows float32 only
        return replace(
            first,
            phi=0.0,
            phi_protocol=None,
            value_max=first.value,
            message="the rise may be rounding of float32",
            status=Status.LINE_SEARCH_FAILED,
        )
    return replace(
        found,
        displacement=found.displacement.to(first.displacement),
        cost=first.cost + found.cost,
    )


def _ends_protocol(state: Maximum) -> bool:
    return state.num_iters == PROTOCOL_ITERATIONS or (
        state.stopped and state.num_iters < PROTOCOL_ITERATIONS
    )


@dataclass(frozen=True)
class _Best:
    rise: float
    point: Tensor  # in half-widths
    solver: str


class _Search:
    """The rise of f over the box, in half-widths: u in [-1, 1]^p, y = u half_widths.

    Every point that is evaluated lies in the box, so each is a candidate for the best.
    """

    def __init__(
        self, run: Run, risk: EmpiricalRisk, manifold: _Manifold, epsilon: float
    ) -> None:
        self._run, self._risk, self._manifold = run, risk, manifold
        self.half_widths = epsilon * manifold.half_widths
        one = torch.ones_like(self.half_widths)
        self._box = Box(-one, one)
        self.value = risk.known_value()
        ensure_available(
            not self.value <= -1,
            "risk",
            "lie above -1 for Metric 2.1, which divides by 1 + f",
            f"f = {self.value:.4g} (not available)",
            "Add a constant to the loss.",
        )
        self.is_finite = math.isfinite(self.value)
        self.solver, self.message = "none", "theta itself"
        self.is_first_start = True
        self.best = _Best(0.0, torch.zeros_like(one), "none")

    def states(
        self, settings: Mapping[str, Any], solvers: Sequence[Solver], corners: Tensor | None
    ) -> Iterator[Maximum]:
        """States of every solver from every start; their values are rises of f."""
        if not self.is_finite:
            return
        for i, start in enumerate(self._starts(settings, corners)):
            self.is_first_start = i == 0
            rise, gradient = self._rise(start)
            scale = float(gradient.double().square().mean().sqrt()) or 1.0
            objective = self._scaled(start, (rise, gradient), scale)
            for solver in solvers:
                self.solver = solver
                run = _SOLVERS[solver](objective, start, self._box, settings["max_iter"])
                for state in run:
                    if self.best.solver == solver:
                        self.message = state.message
                    yield replace(state, value=state.value * scale)

    def _starts(
        self, settings: Mapping[str, Any], corners: Tensor | None
    ) -> Iterator[Tensor]:
        generator = _tensors.seeded(settings["seed"] + 1)
        from_zero = settings["start"] == "zero"
        if from_zero:
            yield torch.zeros_like(self._box.upper)
        for i in range(settings["num_starts"] - from_zero):
            if i % 2 == 0:
                u = 2 * torch.rand(self._box.upper.shape, generator=generator) - 1
                u = (u * (1 if i else _START)).to(self._box.upper)
            yield u if i % 2 == 0 else -u
        for vector in () if corners is None else corners:
            corner = _START * self._manifold.pulled_back(vector).sign()
            yield from (corner, -corner)

    def _scaled(
        self, start: Tensor, at_start: tuple[float, Tensor], scale: float
    ) -> ValueAndGradient:
        def objective(u: Tensor) -> tuple[float, Tensor]:
            known = torch.equal(u, start)  # every solver asks for its start
            if known:
                rise, gradient = at_start
                return rise / scale, gradient / scale
            rise, gradient = self._rise(u)
            return rise / scale, gradient.div_(scale)

        return objective

    def _rise(self, u: Tensor) -> tuple[float, Tensor]:
        self._run.step()
        theta = self._manifold.point(u * self.half_widths)
        value, gradient = self._risk.value_and_gradient(theta)
        gradient = self._manifold.pulled_back(gradient).mul_(self.half_widths)
        if not (math.isfinite(value) and _tensors.is_finite(gradient)):
            return -math.inf, torch.zeros_like(u)  # overflow is not a rise
        rise = value - self.value
        if rise > self.best.rise:
            self.best = _Best(rise, u.clone(), self.solver)
        return rise, gradient


def _run_lbfgsb(
    objective: ValueAndGradient, start: Tensor, box: Box, max_iter: int
) -> Iterator[Maximum]:
    for state in lbfgsb(objective, start, box):
        yield state
        if state.num_iters == max_iter:
            return


def _run_ascent(
    objective: ValueAndGradient, start: Tensor, box: Box, max_iter: int
) -> Iterator[Maximum]:
    return islice(sign_ascent(objective, start, box), 2 * max_iter)


def _run_scipy(
    objective: ValueAndGradient, start: Tensor, box: Box, max_iter: int
) -> Iterator[Maximum]:
    """SciPy's L-BFGS-B in float64; states at iteration 10 and at the end."""
    states: list[Maximum] = []

    def negated(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(torch.from_numpy(u).to(start))
        return -value, -gradient.double().cpu().numpy()

    def note(intermediate_result: OptimizeResult) -> None:
        point = torch.from_numpy(intermediate_result.x.copy()).to(start)
        value, done = -float(intermediate_result.fun), len(states) + 1
        states.append(Maximum(point, value, 0, done, "running", False))

    found = minimize(
        negated,
        start.double().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=np.broadcast_to([-1.0, 1.0], (start.numel(), 2)),
        callback=note,
        options={"maxiter": max_iter, "ftol": 0.0, "gtol": 0.0},
    )
    yield from states[PROTOCOL_ITERATIONS - 1 : PROTOCOL_ITERATIONS]
    point = torch.from_numpy(found.x).to(start)
    early = found.nit < max_iter
    yield Maximum(point, -float(found.fun), found.nfev, found.nit, found.message, early)


_SOLVERS: dict[str, Callable[[ValueAndGradient, Tensor, Box, int], Iterator[Maximum]]] = {
    "lbfgsb": _run_lbfgsb,
    "scipy": _run_scipy,
    "ascent": _run_ascent,
}


def _checked_corners(risk: EmpiricalRisk, corners: Any) -> Tensor | None:
    """As a tensor (j, n) beside theta."""
    if corners is None:
        return None
    if isinstance(corners, list | tuple):
        corners = torch.stack([torch.as_tensor(vector) for vector in corners])
    vectors = torch.as_tensor(corners).detach().to(risk.theta)
    sound = vectors.ndim in (1, 2) and vectors.shape[-1] == risk.n
    contract = f"have shape (n,) or (j, n) with n={risk.n}"
    ensure(sound, "corners", contract, tuple(vectors.shape))
    return vectors.reshape(-1, risk.n)
