"""Auto-PGD and its balls: against the paper's algorithm written again, and under strain."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from helpers.maximum import ball_maximum, checkpoints, dense_quadratic, reference
from helpers.problems import Function
from scipy.optimize import minimize
from torch import Tensor

from sharpness.optimize.auto_pgd import auto_pgd
from sharpness.optimize.ball import Ball, Norm
from sharpness.optimize.box import Maximum

NORMS: list[Norm] = ["l2", "linf"]


def waves(n: int, seed: int) -> Function:
    """Coupled sines under a bump: smooth, with many maxima, no quadratic."""
    rng = np.random.default_rng(seed)
    mixing, slope = rng.normal(size=(n, n)) / math.sqrt(n), rng.normal(size=n)
    frequency = rng.uniform(1, 4, n)

    def function(u: np.ndarray) -> tuple[float, np.ndarray]:
        inner = frequency * (mixing @ u)
        bump = math.exp(-0.1 * u @ u)
        value = np.sin(inner).sum() + bump * (slope @ u)
        gradient = mixing.T @ (frequency * np.cos(inner)) + bump * slope
        return float(value), gradient - 0.2 * bump * (slope @ u) * u

    return function


def run(
    function: Function,
    start: np.ndarray | Tensor,
    ball: Ball,
    num_steps: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Maximum], list[Tensor]]:
    """The states, and every point that was evaluated."""
    points: list[Tensor] = []

    def in_torch(u: Tensor) -> tuple[float, Tensor]:
        points.append(u.clone())
        value, gradient = function(u.double().numpy())
        return value, torch.as_tensor(gradient).to(dtype)

    begin = torch.as_tensor(start).to(dtype)
    return list(auto_pgd(in_torch, begin, ball, num_steps=num_steps)), points


# -- against the paper -------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20, 50, 100])
@pytest.mark.parametrize(("seed", "rho"), [(0, 1.0), (1, 0.6), (2, 1.5), (3, 0.02)])
def test_every_point_is_the_one_of_algorithm_1(norm, num_steps, seed, rho):
    function = waves(12, seed)
    start = np.zeros(12)
    expected = reference(function, start, rho, norm, num_steps)
    gaps = np.abs(np.diff(expected.values))
    settled = np.flatnonzero(gaps < 1e-10 * np.abs(expected.values[1:]))
    # Where the climb has arrived, rounding decides what counts as a gain.
    shared = int(settled[0]) + 1 if len(settled) else num_steps + 1
    states, points = run(function, start, Ball(norm, rho), num_steps)
    assert len(points) == len(states) == num_steps + 1
    for k in range(shared):
        np.testing.assert_allclose(points[k], expected.points[k], rtol=0, atol=1e-9 * rho)
        best = max(expected.values[: k + 1])
        assert states[k].value == pytest.approx(best, rel=1e-9)
    assert states[-1].value == pytest.approx(max(expected.values), rel=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_the_sequence_that_is_compared_halves_its_step_before_it_settles(norm):
    found = reference(waves(12, 2), np.zeros(12), 1.5, norm, 50)
    gaps = np.abs(np.diff(found.values))
    settled = [*np.flatnonzero(gaps < 1e-10 * np.abs(found.values[1:])), 50]
    assert sum(w <= settled[0] for w in found.halved_at) >= 3


@pytest.mark.parametrize("num_steps", [10, 20, 50, 100, 200, 300, 1000])
def test_steps_are_halved_at_the_checkpoints_of_the_paper(num_steps):
    """A function that never gains: the step is halved at every checkpoint."""

    def falling(u: np.ndarray) -> tuple[float, np.ndarray]:
        return -abs(float(u[0])), np.ones(1)

    _, points = run(falling, np.zeros(1), Ball("linf", 1.0), num_steps)
    # From 0, three quarters of the step are made, and more with every further one.
    first = {k + 1 for k in range(1, num_steps) if points[k + 1] < points[k]}
    expected = [w + 1 for w in checkpoints(num_steps)[1:] if w < num_steps]
    assert first == set(expected)


# -- closed forms ------------------------------------------------------------------


def on_quadratic(h: np.ndarray, g: np.ndarray) -> Function:
    return lambda u: (float(g @ u + 0.5 * u @ h @ u), g + h @ u)


@pytest.mark.parametrize("spectrum", [(0.5, 2.0), (-2.0, 2.0), (-4.0, -0.1)])
@pytest.mark.parametrize("rho", [0.01, 0.3])
def test_the_maximum_of_a_quadratic_over_a_ball_is_found(spectrum, rho):
    h, g = dense_quadratic(12, spectrum, seed=1)
    most = ball_maximum(h, g, rho)
    states, _ = run(on_quadratic(h, g), np.zeros(12), Ball("l2", rho), 100)
    assert states[-1].value == pytest.approx(most, rel=1e-6)
    assert most * 0.99 < states[20].value <= states[-1].value <= most * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_maximum_inside_the_ball_is_found_to_the_last_step(seed):
    """A step of s misses it by s, by 2 s with momentum; the last is 2 rho / 2^8."""
    h, g = dense_quadratic(6, (-3.0, -1.0), seed)
    centre = np.linalg.solve(-h, g)
    top, rho = 0.5 * g @ centre, 2 * np.linalg.norm(centre)
    assert ball_maximum(h, g, rho) == pytest.approx(top, rel=1e-12)
    states, _ = run(on_quadratic(h, g), np.zeros(6), Ball("l2", rho), 200)
    miss = 2 * (2 * rho / 2**8)
    assert top - 0.5 * 3.0 * miss**2 <= states[-1].value <= top * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_a_convex_quadratic_over_a_cube_is_a_corner(seed):
    h, g = dense_quadratic(8, (0.1, 2.0), seed)
    g, rho = 2 * g, 0.5
    corners = rho * np.array(list(product([-1, 1], repeat=8)))
    rises = corners @ g + 0.5 * np.einsum("ki,ij,kj->k", corners, h, corners)
    states, _ = run(on_quadratic(h, g), np.zeros(8), Ball("linf", rho), 100)
    u = states[-1].point.numpy()
    assert np.all(np.abs(u) == rho)
    assert np.all(u * (g + h @ u) > 0)  # no direction into the cube rises
    assert states[1].value <= states[-1].value <= rises.max() * (1 + 1e-12)


# -- what a state says -------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_a_state_holds_the_best_point_so_far_and_its_cost(norm):
    function, ball = waves(8, 5), Ball(norm, 1.5)
    states, points = run(function, np.zeros(8), ball, 30)
    values = [function(point.numpy())[0] for point in points]
    for k, state in enumerate(states):
        best = int(np.argmax(values[: k + 1]))
        assert state.value == values[best]
        assert torch.equal(state.point, points[best])
        assert (state.num_evals, state.num_iters) == (k + 1, k)
        assert state.stopped == (k == 30)
        assert state.message == "ascending"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", [1e-6, 0.3, 50.0])
def test_every_point_lies_in_the_ball_and_keeps_its_type(norm, dtype, rho):
    start = 10 * np.ones(6)
    _, points = run(waves(6, 3), start, Ball(norm, rho), 40, dtype)
    order = 2 if norm == "l2" else math.inf
    for point in points:
        assert point.dtype == dtype
        length = float(point.double().norm(p=order))
        assert length <= rho * (1 + 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("norm", NORMS)
def test_the_first_step_reaches_the_border_straight_up_from_the_centre(norm):
    g = np.array([3.0, -4.0, 0.0])
    states, points = run(lambda u: (float(g @ u), g), np.zeros(3), Ball(norm, 0.5), 5)
    up = g / 5 if norm == "l2" else np.sign(g)
    np.testing.assert_allclose(points[1], 0.5 * up, rtol=1e-15)
    highest = 0.5 * (5.0 if norm == "l2" else 7.0)
    assert [s.value for s in states[1:]] == pytest.approx([highest] * 5, rel=1e-15)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_scale_of_the_function_changes_no_point(norm, scale):
    function = waves(5, 1)
    _, plain = run(function, np.zeros(5), Ball(norm, 1.0), 25)
    _, scaled = run(
        lambda u: tuple(scale * part for part in function(u)),
        np.zeros(5),
        Ball(norm, 1.0),
        25,
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_scale_of_the_ball_scales_every_point(norm, scale):
    function = waves(5, 1)

    def stretched(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = function(u / scale)
        return value, gradient / scale

    _, plain = run(function, np.zeros(5), Ball(norm, 1.0), 25)
    _, scaled = run(stretched, np.zeros(5), Ball(norm, scale), 25)
    assert all(torch.equal(scale * a, b) for a, b in zip(plain, scaled, strict=True))


def test_the_start_is_left_as_it_was():
    start = 10 * torch.ones(4, dtype=torch.float64)
    run(waves(4, 0), start, Ball("l2", 1.0), 10)
    assert torch.equal(start, 10 * torch.ones(4, dtype=torch.float64))


# -- degenerate functions ----------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_ends_the_search_where_it_begins(norm):
    states, points = run(lambda u: (2.0, 0 * u), np.zeros(3), Ball(norm, 1.0), 20)
    (only,) = states
    assert len(points) == 1
    assert only.stopped
    assert (only.value, only.num_evals, only.num_iters) == (2.0, 1, 0)
    assert only.message == "the gradient is zero"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["value", "gradient"])
def test_a_start_that_is_not_finite_ends_the_search(norm, wrong, where):
    gradient = np.array([1.0, 1.0 if where == "value" else wrong])
    value = wrong if where == "value" else 1.0
    states, _ = run(lambda u: (value, gradient), np.zeros(2), Ball(norm, 1.0), 20)
    (only,) = states
    assert only.stopped
    assert only.message == "the value or the gradient is not finite"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["value", "gradient"])
def test_a_point_that_is_not_finite_is_a_step_too_far(norm, wrong, where):
    """Beyond u_0 = 0.3 there is nothing; the supremum before it is 0.3."""

    def broken(u: np.ndarray) -> tuple[float, np.ndarray]:
        beyond = u[0] > 0.3
        value = wrong if beyond and where == "value" else float(u[0])
        return value, np.array([wrong if beyond and where == "gradient" else 1.0, 0.0])

    states, points = run(broken, np.zeros(2), Ball(norm, 1.0), 40)
    assert len(points) == 41
    best = states[-1]
    assert 0.2 < best.value <= 0.3
    assert float(best.point[0]) == best.value
    assert all(math.isfinite(state.value) for state in states)


@pytest.mark.parametrize("norm", NORMS)
def test_a_search_that_lands_on_a_flat_top_stops_there(norm):
    def capped(u: np.ndarray) -> tuple[float, np.ndarray]:
        return min(float(u[0]), 0.5), np.array([float(u[0] < 0.5)])

    states, _ = run(capped, np.zeros(1), Ball(norm, 1.0), 20)
    assert states[-1].value == 0.5
    assert states[-1].stopped
    assert states[-1].message == "the gradient is zero"


# -- the balls ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("norm", NORMS)
def test_a_projection_is_the_nearest_point(norm, seed):
    u = 2 * np.random.default_rng(seed).normal(size=4)
    inside = {"type": "ineq", "fun": lambda x: 1 - x @ x}
    found = minimize(
        lambda x: (x - u) @ (x - u),
        np.zeros(4),
        jac=lambda x: 2 * (x - u),
        method="SLSQP",
        constraints=[inside] if norm == "l2" else [],
        bounds=None if norm == "l2" else [(-1, 1)] * 4,
        options={"ftol": 1e-14, "maxiter": 500},
    )
    projected = Ball(norm, 1.0).project(torch.from_numpy(u))
    np.testing.assert_allclose(projected, found.x, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_projection_cuts_what_is_outside_and_keeps_what_is_inside(norm, dtype, scale):
    u = torch.tensor([0.6, -0.8, 0.0], dtype=dtype) * scale
    inside, outside = (Ball(norm, share * scale).project(u) for share in (1.001, 0.5))
    assert torch.equal(inside, u)
    expected = u / 2 if norm == "l2" else torch.tensor([0.5, -0.5, 0], dtype=dtype) * scale
    assert outside.dtype == dtype
    torch.testing.assert_close(outside / scale, expected / scale)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, 10.0**power) for power in (-300, -200, 0, 200, 300)]
    + [(torch.float32, 10.0**power) for power in (-36, -30, 0, 30, 37)],
)
def test_the_steepest_step_rises_by_the_dual_norm(norm, dtype, scale):
    unit = np.array([0.5, -1.0, 0.0, 2.0])
    up = Ball(norm, 3.0).steepest(torch.tensor(unit * scale, dtype=dtype)).double()
    dual = np.linalg.norm(unit, 2 if norm == "l2" else 1)
    length = float(up.norm(p=2 if norm == "l2" else math.inf))
    eps = torch.finfo(dtype).eps
    assert float(up @ torch.from_numpy(unit)) == pytest.approx(dual, rel=8 * eps)
    assert length == pytest.approx(1.0, rel=8 * eps)


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_has_no_steepest_step(norm):
    up = Ball(norm, 1.0).steepest(torch.zeros(3))
    assert torch.equal(up, torch.zeros(3))
