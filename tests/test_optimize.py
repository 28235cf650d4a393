"""The maximisers over a box: against SciPy, against all corners, and under strain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, product

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from sharpness.optimize.ascent import sign_ascent
from sharpness.optimize.box import Box, Maximum, ValueAndGradient
from sharpness.optimize.lbfgsb import lbfgsb
from sharpness.optimize.line_search import strong_wolfe

Solver = Callable[[ValueAndGradient, Tensor, Box], Iterator[Maximum]]
SOLVERS = [lbfgsb, sign_ascent]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def uniform(lower: Tensor, upper: Tensor, seed: int) -> Tensor:
    share = torch.rand(len(lower), generator=generator(seed), dtype=torch.float64)
    return lower + share * (upper - lower)


def cube(p: int, half_width: float = 1.0, dtype: torch.dtype = torch.float64) -> Box:
    one = torch.full((p,), half_width, dtype=dtype)
    return Box(-one, one)


def quadratic(a: Tensor, b: Tensor, sign: float = 1.0) -> ValueAndGradient:
    """sign * (1/2 u^T A u + b^T u)."""

    def objective(u: Tensor) -> tuple[float, Tensor]:
        return sign * float(0.5 * u @ (a @ u) + b @ u), sign * (a @ u + b)

    return objective


def positive_definite(p: int, decades: float, seed: int) -> Tensor:
    q = torch.linalg.qr(normal(p, p, seed=seed)).Q
    return q * torch.logspace(0, decades, p, dtype=torch.float64) @ q.T


def rosenbrock(u: Tensor) -> tuple[float, Tensor]:
    """Minus the chained Rosenbrock function, by hand."""
    valley, left = u[1:] - u[:-1] ** 2, 1 - u[:-1]
    gradient = torch.zeros_like(u)
    gradient[1:] += 200 * valley
    gradient[:-1] -= 400 * valley * u[:-1] + 2 * left
    return -float((100 * valley**2 + left**2).sum()), -gradient


def counted(objective: ValueAndGradient) -> tuple[ValueAndGradient, list[Tensor]]:
    """The objective, and every point it is asked for."""
    points: list[Tensor] = []

    def noted(u: Tensor) -> tuple[float, Tensor]:
        points.append(u.clone())
        return objective(u)

    return noted, points


def run(
    solver: Solver, objective: ValueAndGradient, start: Tensor, box: Box, most: int = 60
) -> list[Maximum]:
    return list(islice(solver(objective, start, box), most))


def scipy_values(
    objective: ValueAndGradient, start: Tensor, box: Box, iterations: int
) -> list[float]:
    """What SciPy's L-BFGS-B reaches after each iteration."""
    values: list[float] = []

    def negated(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(torch.from_numpy(u.copy()))
        return -value, -gradient.numpy()

    def note(intermediate_result: object) -> None:
        values.append(-intermediate_result.fun)

    minimize(
        negated,
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(box.lower.tolist(), box.upper.tolist(), strict=True)),
        callback=note,
        options={"maxiter": iterations, "maxcor": 10, "ftol": 0.0, "gtol": 0.0},
    )
    return values


# -- against SciPy -----------------------------------------------------------------


def departure_from_scipy(states: list[Maximum], expected: list[float]) -> float:
    """The largest relative difference of the values after 1, 2, ... iterations."""
    # One that is done says so in a further state of the same iteration.
    values = list({s.num_iters: s.value for s in states}.values())[1:]
    shared = min(len(values), len(expected))
    assert shared >= 1
    pairs = zip(
        [*values[:shared], values[-1]], [*expected[:shared], expected[-1]], strict=True
    )
    return max(abs(value / other - 1) for value, other in pairs)


@pytest.mark.parametrize("pull", [3, 10])
@pytest.mark.parametrize(("p", "decades"), [(20, 1), (50, 2), (100, 3)])
def test_lbfgsb_does_as_well_as_scipy_on_quadratics_with_many_active_bounds(
    p, decades, pull
):
    """The iterates part where the path has two minima or a search interpolates.

    In most problems they are SciPy's; in all of them ten iterations gain as much.
    """
    departing, active, shares = [], [], []
    for seed in range(12):
        a = positive_definite(p, decades, seed)
        b = pull * normal(p, seed=100 + seed) * 10 ** (decades / 2)
        start = 0.5 * uniform(*vars(cube(p)).values(), seed=200 + seed)
        problem = quadratic(a, b, -1), start, cube(p)
        states = run(lbfgsb, *problem, 11)
        expected = scipy_values(*problem, 10)
        if departure_from_scipy(states, expected) > 1e-6:
            departing.append(seed)
        active.append(float((states[-1].point.abs() == 1).double().mean()))
        gain = states[-1].value - states[0].value
        shares.append(gain / (expected[-1] - states[0].value))
    assert np.mean(active) > 0.5
    assert len(departing) <= 3
    assert min(shares) > 0.99


@pytest.mark.parametrize(
    ("lower", "upper", "start", "iterations"),
    [
        (-2.0, 2.0, -1.2, 10),
        (1.1, 3.0, 2.0, 10),
        (-2.0, 2.0, -1.2, 20),  # old correction pairs are dropped
    ],
)
def test_lbfgsb_follows_scipy_on_rosenbrock_in_a_box(lower, upper, start, iterations):
    box = Box(torch.full((50,), lower).double(), torch.full((50,), upper).double())
    point = box.clip(start + 0.1 * normal(50, seed=1))
    states = run(lbfgsb, rosenbrock, point, box, iterations + 1)
    assert len(states) == iterations + 1
    expected = scipy_values(rosenbrock, point, box, iterations)
    assert departure_from_scipy(states, expected) < 1e-6


def test_lbfgsb_reaches_the_minimum_of_rosenbrock():
    end = run(lbfgsb, rosenbrock, torch.zeros(10).double() - 1, cube(10, 2.0), 300)[-1]
    torch.testing.assert_close(end.point, torch.ones(10).double(), rtol=0, atol=1e-6)
    assert end.value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_lbfgsb_ends_where_the_conditions_of_a_constrained_minimum_hold(seed):
    a, b = positive_definite(30, 1, seed), 10 * normal(30, seed=seed + 50)
    end = run(lbfgsb, quadratic(a, b, -1), torch.zeros(30).double(), cube(30), 200)[-1]
    gradient = a @ end.point + b  # of the function that is minimised
    free = end.point.abs() < 1
    assert 0 < free.sum() < 30
    assert gradient[free].abs().max() < 1e-6 * gradient.abs().max()
    assert torch.all(gradient[~free] * end.point[~free] < 0)


# -- against all corners -----------------------------------------------------------


def corners(box: Box) -> Tensor:
    return torch.tensor(
        list(product(*zip(box.lower.tolist(), box.upper.tolist(), strict=True))),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [1, 2, 5, 10])
def test_a_convex_function_is_never_found_above_its_best_corner(p, solver):
    for seed in range(10):
        a, b = positive_definite(p, 2, seed), normal(p, seed=seed + 20)
        box = Box(-1 - normal(p, seed=seed).abs(), normal(p, seed=seed + 40).abs())
        every = corners(box)
        values = 0.5 * ((every @ a) * every).sum(1) + every @ b
        states = run(solver, quadratic(a, b), uniform(*vars(box).values(), seed), box)
        best = float(values.max())
        assert states[-1].value <= best * (1 + 1e-12)
        # Both climb to a corner, though not always to the best one.
        nearest = float((every - states[-1].point).abs().amax(1).min())
        assert nearest == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_best_corner_is_found_from_one_of_many_starts(solver):
    for seed in range(5):
        a, b = positive_definite(6, 1, seed), normal(6, seed=seed + 20)
        every = corners(cube(6))
        best = float((0.5 * ((every @ a) * every).sum(1) + every @ b).max())
        starts = [uniform(*vars(cube(6)).values(), s) for s in range(30)]
        found = max(run(solver, quadratic(a, b), s, cube(6))[-1].value for s in starts)
        assert found == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sign_ascent_lands_exactly_on_the_corner_of_a_separable_convex_function(dtype):
    for seed in range(20):
        lower = -normal(30, seed=seed).abs().to(dtype)
        upper = normal(30, seed=seed + 50).abs().to(dtype)
        centre = 9 * normal(30, seed=seed + 99).sign().to(dtype)  # far outside
        start = uniform(lower.double(), upper.double(), seed).to(dtype)

        def objective(u, centre=centre):
            return float(0.5 * (u - centre).double().square().sum()), u - centre

        states = run(sign_ascent, objective, start, Box(lower, upper))
        assert torch.equal(states[-1].point, torch.where(centre < 0, upper, lower))
        assert states[-1].num_evals == 2
        assert states[-1].stopped


def test_sign_ascent_crosses_the_whole_box_to_the_exact_corner():
    for seed in range(50):
        lower = -1.1 * normal(30, seed=seed).abs()
        upper = 0.7 * normal(30, seed=seed + 50).abs()
        end = run(
            sign_ascent,
            lambda u: (float(u.sum()), torch.ones_like(u)),
            lower,
            Box(lower, upper),
        )[-1]
        assert torch.equal(end.point, upper), f"seed {seed}"


def test_sign_ascent_halves_its_step_towards_a_maximum_inside():
    centre = 0.7 * normal(20, seed=0).tanh()
    objective = quadratic(torch.eye(20).double(), -centre, -1)
    states = run(sign_ascent, objective, torch.zeros(20).double(), cube(20), 200)
    torch.testing.assert_close(states[-1].point, centre, rtol=0, atol=1e-3)


# -- both, always ------------------------------------------------------------------

OBJECTIVES: dict[str, ValueAndGradient] = {
    "convex": quadratic(positive_definite(12, 2, 0), normal(12, seed=0)),
    "concave": quadratic(positive_definite(12, 2, 1), 9 * normal(12, seed=1), -1),
    "saddle": quadratic(torch.diag(torch.linspace(-5, 5, 12).double()), normal(12, seed=2)),
    "rosenbrock": rosenbrock,
    "waves": lambda u: (float(torch.sin(9 * u).sum()), 9 * torch.cos(9 * u)),
    "flat": lambda u: (1.0, torch.zeros_like(u)),
    "linear": lambda u: (float(u.sum()), torch.ones_like(u)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_never_fall_points_stay_inside_and_evaluations_are_counted(
    name, solver, dtype
):
    def objective(u):
        value, gradient = OBJECTIVES[name](u.double())
        return value, gradient.to(dtype)

    noted, points = counted(objective)
    box = Box(*(b.to(dtype) for b in (-0.3 - normal(12, seed=3).abs(), *[cube(12).upper])))
    best = -np.inf
    for state in islice(solver(noted, 2 * normal(12, seed=4).to(dtype), box), 60):
        assert state.num_evals == len(points)
        assert state.value >= best
        best = state.value
        assert state.value == objective(state.point)[0]
        assert state.point.dtype == dtype
    for point in points:
        assert torch.all((box.lower <= point) & (point <= box.upper))
    assert best >= objective(points[0])[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_outside_is_brought_into_the_box(solver):
    noted, points = counted(OBJECTIVES["linear"])
    run(solver, noted, torch.full((12,), 7.0).double(), cube(12))
    assert points[0].tolist() == [1.0] * 12


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_flat_function_stops_at_once(solver):
    states = run(solver, OBJECTIVES["flat"], torch.zeros(12).double(), cube(12))
    assert len(states) == 1
    assert states[0].stopped
    assert states[0].num_evals == 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_a_function_in_other_units_is_climbed_as_high_with_its_gradient_scaled(
    solver, factor
):
    """Ascent sees signs only; L-BFGS-B forgets the scale after its first step."""
    a, b = positive_definite(12, 1, 0), normal(12, seed=0)
    start = 0.1 * normal(12, seed=5)
    plain = run(solver, quadratic(a, b), start, cube(12), 200)[-1]
    scaled = run(solver, quadratic(factor * a, factor * b), start, cube(12), 200)[-1]
    assert scaled.point.abs().tolist() == pytest.approx([1.0] * 12)
    if solver is sign_ascent:
        assert torch.equal(scaled.point, plain.point)
        assert scaled.value == factor * plain.value


def partly(kind: str) -> ValueAndGradient:
    """-|u - 0.3|^2, broken where u_0 > 0.1."""

    def objective(u: Tensor) -> tuple[float, Tensor]:
        value, gradient = -float((u - 0.3).square().sum()), -2 * (u - 0.3)
        if u[0] <= 0.1:
            return value, gradient
        nan = torch.full_like(u, torch.nan)
        return {
            "nan": (float("nan"), nan),
            "-inf": (-float("inf"), torch.zeros_like(u)),
            "-inf, nan gradient": (-float("inf"), nan),
            "nan gradient": (value, nan),
        }[kind]

    return objective


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["nan", "-inf", "-inf, nan gradient", "nan gradient"])
def test_a_part_of_the_box_without_finite_values_is_survived(kind, solver):
    start = torch.linspace(-0.9, 0.0, 6, dtype=torch.float64)
    noted, points = counted(partly(kind))
    states = run(solver, noted, start, cube(6), 40)
    values = [state.value for state in states]
    assert np.isfinite(values).all()
    assert values[-1] > values[0]
    assert values == sorted(values)
    assert torch.isfinite(states[-1].point).all()
    assert all(torch.isfinite(point).all() for point in points)
    assert len(points) < 40 * 20


def test_a_nan_at_the_start_ends_without_a_word():
    for solver in SOLVERS:
        states = run(
            solver,
            lambda u: (float("nan"), torch.full_like(u, torch.nan)),
            torch.zeros(3).double(),
            cube(3),
        )
        assert not any(np.isfinite(state.value) for state in states)
        assert states[-1].stopped


# -- the line search ---------------------------------------------------------------

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "bowl": lambda t: (t - 3) ** 2,
    "short": lambda t: (t - 0.01) ** 2,
    "quartic": lambda t: (t - 2) ** 4 - t,
    "waves": lambda t: t / 2 - torch.sin(3 * t),
    "steep": lambda t: torch.exp(5 * t) - 30 * t,
    "log": lambda t: t - torch.log(t + 0.01),
}


def search(
    curve: Callable[[Tensor], Tensor], longest: float
) -> tuple[tuple[float, float, Tensor] | None, list[float], tuple[float, float]]:
    direction, steps = torch.ones(1, dtype=torch.float64), []

    def at(t: float) -> tuple[float, Tensor]:
        x = torch.tensor([t], dtype=torch.float64, requires_grad=True)
        value = curve(x).sum()
        return float(value.detach()), torch.autograd.grad(value, x)[0]

    def noted(t: float) -> tuple[float, Tensor]:
        steps.append(t)
        return at(t)

    value, gradient = at(0.0)
    zero = (value, float(gradient))
    return strong_wolfe(noted, zero, direction, longest), steps, zero


@pytest.mark.parametrize("name", CURVES)
def test_the_line_search_ends_on_the_strong_wolfe_conditions(name):
    found, steps, (value, slope) = search(CURVES[name], 1e10)
    assert found is not None
    step, new_value, gradient = found
    assert step in steps
    assert new_value == float(CURVES[name](torch.tensor(step, dtype=torch.float64)))
    assert new_value <= value + 1e-3 * step * slope
    assert abs(float(gradient)) <= 0.9 * abs(slope)
    assert len(steps) <= 20


def test_a_step_past_a_minimum_is_not_accepted_for_being_the_longest():
    found, _, (_, slope) = search(lambda t: (t - 0.51) ** 2, 1.0)
    assert found is not None
    assert abs(float(found[2])) <= 0.9 * abs(slope)


@pytest.mark.parametrize("longest", [0.3, 1.0, 2.0])
def test_the_line_search_never_steps_beyond_the_longest_step(longest):
    found, steps, _ = search(CURVES["bowl"], longest)
    assert found is not None
    assert max(steps) <= longest
    assert steps[0] == min(1.0, longest)


def test_a_line_search_that_can_only_rise_finds_nothing():
    """The slope says down, the values say up: what rounding does near a minimum."""
    found, steps = None, []

    def rising(t: float) -> tuple[float, Tensor]:
        steps.append(t)
        return 1.0 + t, torch.ones(1).double()

    found = strong_wolfe(rising, (1.0, -1e-3), torch.ones(1).double(), 1e10)
    assert found is None
    assert 0 < len(steps) <= 20


def test_a_gain_below_rounding_is_not_searched_for():
    def never(t: float) -> tuple[float, Tensor]:
        raise AssertionError("asked for a value")

    assert strong_wolfe(never, (1.0, -1e-17), torch.ones(1).double(), 1.0) is None
