"""The parts of L-BFGS-B against the papers' formulas, written out densely in NumPy."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from sharpness.optimize.box import Box, Maximum, ValueAndGradient
from sharpness.optimize.lbfgsb import _breakpoints, _Model, lbfgsb

module = importlib.import_module("sharpness.optimize.lbfgsb")
DTYPES = [torch.float64, torch.float32]
Pair = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def sweeps(monkeypatch):
    """Sweeps over W that each search for the Cauchy point made; none may be endless."""
    counts: list[int] = []
    slopes, search = _Model._slopes, _Model._cauchy_step

    def counted(self, *arguments):
        counts[-1] += 1
        assert counts[-1] < 1500, "the search for the Cauchy point does not end"
        return slopes(self, *arguments)

    def begun(self, *arguments):
        counts.append(0)
        return search(self, *arguments)

    monkeypatch.setattr(_Model, "_slopes", counted)
    monkeypatch.setattr(_Model, "_cauchy_step", begun)
    return counts


# -- what the papers say -----------------------------------------------------------


def pairs_of(n: int, num: int, seed: int, rise: float = 1.0, width: float = 1.0):
    """Steps and gradient differences of a convex function that is no quadratic."""
    rng = np.random.default_rng(seed)
    diagonal, low = 10 ** rng.uniform(0, 1, n), rng.normal(size=(n, 2)) / n**0.5
    pairs = []
    for _ in range(num):
        s = rng.normal(size=n)
        y = diagonal * rng.uniform(0.7, 1.4, n) * s + 3 * low @ (low.T @ s)
        pairs.append((width * s, rise / width * y))
    return pairs


def dense(pairs: list[Pair]) -> np.ndarray:
    """B by the BFGS formula, one pair after another, from theta I."""
    s, y = pairs[-1]
    b = (y @ y) / (s @ y) * np.eye(len(s))
    for s, y in pairs:
        bs = b @ s
        b = b + np.outer(y, y) / (y @ s) - np.outer(bs, bs) / (s @ bs)
    return b


def compact(pairs: list[Pair]) -> tuple[float, np.ndarray, np.ndarray]:
    """Theta, W = [Y, theta S] (n, 2m) and the inverse of M, as in the paper's (3.3)."""
    s, y = (np.stack(vectors, 1) for vectors in zip(*pairs, strict=True))
    sy = s.T @ y
    theta, lower = (y[:, -1] @ y[:, -1]) / sy[-1, -1], np.tril(sy, -1)
    inverse = np.block([[-np.diag(np.diag(sy)), lower.T], [lower, theta * s.T @ s]])
    return theta, np.hstack([y, theta * s]), inverse


@dataclass(frozen=True)
class Path:
    """A box, a point in it, a gradient, and the pairs behind a model."""

    x: np.ndarray
    g: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    pairs: list[Pair]

    @property
    def breaks(self) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            reached = (self.x - np.where(self.g < 0, self.upper, self.lower)) / self.g
        return np.where(self.g == 0, np.inf, reached)

    def moved(self, t: float) -> np.ndarray:
        """clip(x - t g) - x."""
        return -self.g * np.minimum(self.breaks, t)

    def slope(self, t: float, b: np.ndarray) -> tuple[float, float]:
        """The model's derivative just after t, and the size of what it is a sum of."""
        velocity, moved = np.where(self.breaks > t, -self.g, 0.0), self.moved(t)
        size = np.abs(velocity) @ (np.abs(self.g) + np.abs(b) @ np.abs(moved))
        return float(velocity @ (self.g + b @ moved)), float(size)

    def model(self, t: float, b: np.ndarray) -> float:
        moved = self.moved(t)
        return float(self.g @ moved + 0.5 * moved @ b @ moved)

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Box]:
        x, g, low, up = (
            torch.from_numpy(v).to(dtype) for v in (self.x, self.g, self.lower, self.upper)
        )
        return x, g, Box(low, up)


def path(n: int, seed: int, rise: float = 1.0, width: float = 1.0, num: int = 6) -> Path:
    """A third of the variables on a bound; some g = 0; every other seed full of ties."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        lower, upper = -np.ones(n), np.ones(n)
        x = rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], n)
        g = 4.0 * rng.choice([-4.0, -2.0, -1.0, 0.0, 1.0, 2.0], n)
    else:
        lower, upper = -rng.uniform(0, 2, n), rng.uniform(0, 2, n)
        x = np.clip(rng.uniform(-3, 3, n), lower, upper)
        g = 10 ** rng.uniform(-1.5, 1.5, n) * rng.choice([-1, 1, 1, 0], n)
    g[rng.integers(n)] = 3.0  # at least one that can move
    x[g == 3.0] = upper[g == 3.0]
    pairs = pairs_of(n, num, seed, rise, width)
    return Path(width * x, rise / width * g, width * lower, width * upper, pairs)


def published(p: Path) -> float:
    """The t at which algorithm CP of Byrd, Lu, Nocedal and Zhu (1995) stops."""
    theta, w, inverse = compact(p.pairs)
    m, breaks, g = np.linalg.inv(inverse), p.breaks, p.g
    d = np.where(breaks > 0, -g, 0.0)
    w_d, c = w.T @ d, np.zeros(len(m))
    slope, t = -d @ d, 0.0
    curvature = -theta * slope - w_d @ m @ w_d
    for b in np.argsort(breaks, kind="stable"):
        if breaks[b] == 0:
            continue
        if breaks[b] == np.inf or slope >= 0 or -slope < curvature * (breaks[b] - t):
            break
        ahead, t, row, bound = breaks[b] - t, breaks[b], m @ w[b], -g[b] * breaks[b]
        c = c + ahead * w_d
        slope += ahead * curvature + g[b] ** 2 + theta * g[b] * bound - g[b] * (c @ row)
        curvature -= theta * g[b] ** 2 + 2 * g[b] * (w_d @ row) + g[b] ** 2 * (w[b] @ row)
        w_d, d[b] = w_d + g[b] * w[b], 0.0
    return t + max(0.0, -slope / curvature) if d.any() else t


def model_of(pairs: list[Pair], like: Tensor, memory: int = 10) -> _Model:
    model = _Model(like, memory)
    for s, y in pairs:
        model.add(torch.from_numpy(s).to(like), torch.from_numpy(y).to(like))
    return model


def as_stored(pairs: list[Pair], dtype: torch.dtype) -> list[Pair]:
    """The pairs as a model of this type sees them."""
    single = np.float32 if dtype == torch.float32 else np.float64
    return [tuple(v.astype(single).astype(float) for v in pair) for pair in pairs]


def matrix_of(model: _Model) -> np.ndarray:
    w = model._rows[: len(model._m)].double().numpy()
    return model._theta * np.eye(w.shape[1]) - w.T @ model._m.numpy() @ w


# -- the matrix --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "num", "memory"),
    [(2, 1, 10), (12, 1, 1), (12, 5, 1), (30, 4, 10), (30, 10, 10), (40, 23, 5), (9, 8, 3)],
)
def test_the_model_is_the_bfgs_matrix_of_its_last_pairs(n, num, memory, dtype):
    pairs = as_stored(pairs_of(n, num, seed=n + num), dtype)
    model = model_of(pairs, torch.zeros(n, dtype=dtype), memory)
    expected = dense(pairs[-memory:])
    inner = np.linalg.cond(compact(pairs[-memory:])[2])
    exact = 4 * torch.finfo(dtype).eps * inner
    assert exact < 0.01
    assert not model.is_empty
    found = matrix_of(model)
    assert np.abs(found - expected).max() <= exact * np.abs(expected).max()
    s, y = pairs[-1]
    assert found @ s == pytest.approx(y, abs=exact * np.abs(y).max() * 10)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_in_one_dimension_the_matrix_is_the_last_secant(num):
    pairs = pairs_of(1, num, seed=num)
    model = model_of(pairs, torch.zeros(1).double())
    s, y = pairs[-1]
    assert matrix_of(model)[0, 0] == pytest.approx(float(y[0] / s[0]), rel=1e-9)


@pytest.mark.parametrize("curvature", [-1.0, 0.0, 1e-17])
def test_a_pair_without_positive_curvature_is_left_out(curvature):
    pairs = pairs_of(8, 3, seed=0)
    model = model_of(pairs, torch.zeros(8).double())
    before = matrix_of(model)
    s = np.eye(8)[0]
    model.add(*(torch.from_numpy(v) for v in (s, curvature * s + np.eye(8)[1])))
    assert np.array_equal(matrix_of(model), before)


def test_a_first_pair_without_positive_curvature_leaves_the_model_empty():
    s = np.eye(3)[0]
    assert model_of([(s, -s), (s, 0 * s)], torch.zeros(3).double()).is_empty


# -- along the path ----------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 1 << 15])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 20, 120])
def test_slopes_are_the_derivative_of_the_model_along_the_path(
    n, dtype, block, monkeypatch
):
    monkeypatch.setattr(module, "_BLOCK", block)
    for seed in range(6):
        p = path(n, seed, num=min(n, 6))
        x, g, box = p.tensors(dtype)
        p = Path(*(v.double().numpy() for v in (x, g, box.lower, box.upper)), p.pairs)
        pairs = as_stored(p.pairs, dtype)
        b = dense(pairs)
        breaks = _breakpoints(x, g, box)
        # Powers of two are the same in both types, and meet the breaks of the ties.
        steps = [2.0**i for i in range(-12, 4)]
        found = model_of(pairs, x)._slopes(g, breaks, steps)
        theta, w, inverse = compact(pairs)
        exact = 4 * torch.finfo(dtype).eps * np.linalg.cond(inverse)
        for t, slope in zip(steps, found, strict=True):
            if np.any(np.abs(p.breaks - t) < 1e-5 * t) and not seed % 2:
                continue
            expected, size = p.slope(t, b)
            assert slope == pytest.approx(expected, abs=exact * size), (seed, t)


def test_the_slope_is_exactly_zero_where_nothing_moves_any_more():
    p = path(50, seed=2)
    x, g, box = p.tensors()
    breaks = _breakpoints(x, g, box)
    end = float(breaks[breaks.isfinite()].max())
    assert model_of(p.pairs, x)._slopes(g, breaks, [end, 7 * end]) == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(8))
def test_the_published_algorithm_as_written_here_stops_at_a_local_minimum(seed):
    p = path(40, seed)
    theta, w, inverse = compact(p.pairs)
    b = dense(p.pairs)
    assert theta * np.eye(40) - w @ np.linalg.inv(inverse) @ w.T == pytest.approx(b)
    t = published(p)
    assert p.slope(t * (1 - 1e-9), b)[0] < 0 <= p.slope(t * (1 + 1e-9), b)[0]
    assert all(p.slope(share * t, b)[0] < 0 for share in np.linspace(0, 0.999, 500))


SCALES = [(1.0, 1.0), (1e8, 1.0), (1e-8, 1.0), (1.0, 1e8), (1.0, 1e-8), (1e8, 1e-8)]


@pytest.mark.parametrize(("rise", "width"), SCALES)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 3000])
def test_the_cauchy_point_is_that_of_the_published_algorithm(n, rise, width):
    """Within a bracket, 2 % of t wide, always; to three digits where the slope is smooth."""
    for seed in range(40 if n <= 100 else 2):
        p = path(n, seed, rise, width, num=min(n, 6))
        x, g, box = p.tensors()
        t = model_of(p.pairs, x)._cauchy_step(g, _breakpoints(x, g, box))
        expected = p.moved(published(p))
        exact = 1e-3 if n == 3000 else 0.02
        assert p.moved(t) == pytest.approx(
            expected, rel=exact, abs=1e-12 * np.abs(expected).max()
        ), seed


@pytest.mark.parametrize("n", [10, 100, 3000])
def test_a_cauchy_point_takes_about_three_sweeps(n, sweeps):
    for seed in range(40 if n <= 100 else 2):
        p = path(n, seed)
        x, g, box = p.tensors()
        model_of(p.pairs, x)._cauchy_step(g, _breakpoints(x, g, box))
    assert np.mean(sweeps) <= 4
    assert max(sweeps) <= 6


def two_minima(second: float) -> Path:
    """B = diag(100, second): variable 0 overshoots, and meets its bound at t = 0.039."""
    pairs = [(np.eye(2)[1], second * np.eye(2)[1]), (np.eye(2)[0], 100 * np.eye(2)[0])]
    lower = np.array([-0.039, -10.0])
    return Path(np.zeros(2), np.array([1.0, 0.1]), lower, -lower, pairs)


@pytest.mark.parametrize("second", [0.1, 1.0, 10.0])
def test_the_first_of_two_minima_along_the_path_is_the_cauchy_point(second):
    p = two_minima(second)
    b = dense(p.pairs)
    assert b == pytest.approx(np.diag([100.0, second]))
    x, g, box = p.tensors()
    t = model_of(p.pairs, x)._cauchy_step(g, _breakpoints(x, g, box))
    assert p.model(t, b) < 0, "the model is higher there than at the start"
    assert t == pytest.approx(1.01 / (100 + 0.01 * second), rel=1e-3)


# -- over the free variables -------------------------------------------------------


def dense_minimiser(p: Path, b: np.ndarray, t: float) -> tuple[np.ndarray, bool]:
    """Section 5.1 of the paper, with the projection of Morales and Nocedal (2011)."""
    moved, free = p.moved(t), p.breaks > t
    step = np.zeros_like(p.x)
    if free.any():
        pull = (p.g + b @ moved)[free]
        step[free] = -np.linalg.solve(b[np.ix_(free, free)], pull)
    cauchy = np.clip(p.x + moved, p.lower, p.upper)
    projected = np.clip(cauchy + step, p.lower, p.upper)
    if p.g @ (projected - p.x) < 0:
        return projected, True
    room = np.where(step < 0, cauchy - p.lower, p.upper - cauchy)
    shares = room[step != 0] / np.abs(step[step != 0])
    return cauchy + min(1.0, shares.min(initial=1.0)) * step, False


@pytest.mark.parametrize(("rise", "width"), SCALES)
@pytest.mark.parametrize("n", [1, 2, 5, 30, 100])
def test_the_minimiser_over_the_free_variables_is_that_of_a_dense_solve(n, rise, width):
    for seed in range(30):
        p = path(n, seed, rise, width, num=min(n, 6))
        x, g, box = p.tensors()
        model, breaks = model_of(p.pairs, x), _breakpoints(x, g, box)
        t = model._cauchy_step(g, breaks)
        expected, _ = dense_minimiser(p, dense(p.pairs), t)
        found = model.minimiser(x, g, box).numpy()
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-8 * width), seed


def test_a_projected_step_that_climbs_is_cut_at_the_first_bound_instead():
    cut = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        hessian = q * np.array([1.0, 3.0, 30.0, 1000.0]) @ q.T
        p = Path(
            np.zeros(4),
            rng.normal(size=4),
            -(10 ** rng.uniform(-4, 0, 4)),
            10 ** rng.uniform(-4, 0, 4),
            [(v, hessian @ v) for v in q.T],
        )
        x, g, box = p.tensors()
        model = model_of(p.pairs, x)
        t = model._cauchy_step(g, _breakpoints(x, g, box))
        expected, projected = dense_minimiser(p, dense(p.pairs), t)
        cut += not projected
        assert model.minimiser(x, g, box).numpy() == pytest.approx(expected, rel=1e-6)
    assert cut > 0


def test_an_empty_model_steps_along_the_gradient_to_the_bounds():
    x, g, box = path(20, seed=3).tensors()
    found = _Model(x, 10).minimiser(x, g, box)
    assert torch.equal(found, torch.minimum(torch.maximum(x - g, box.lower), box.upper))


# -- the whole ---------------------------------------------------------------------

Smooth = Callable[[np.ndarray], tuple[float, np.ndarray]]


def convex(n: int, seed: int) -> Smooth:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a, centre = q * np.logspace(0, 2, n) @ q.T, 1.5 * rng.normal(size=n)

    def f(u: np.ndarray) -> tuple[float, np.ndarray]:
        v = u - centre
        return float(0.5 * v @ a @ v + (v**4).sum()), a @ v + 4 * v**3

    return f


def wavy(n: int, seed: int) -> Smooth:
    bowl, rng = convex(n, seed), np.random.default_rng(seed + 999)
    height, phase = 20 * rng.uniform(size=n), rng.uniform(0, 6, n)

    def f(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = bowl(u)
        angle = 3 * u + phase
        gradient = gradient - 3 * height * np.sin(angle)
        return value + float((height * np.cos(angle)).sum()), gradient

    return f


def indefinite(n: int, seed: int) -> Smooth:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a, b = q * np.linspace(-3, 9, n) @ q.T, rng.normal(size=n)
    return lambda u: (float(0.5 * u @ a @ u + b @ u), a @ u + b)


def maximised(f: Smooth, dtype: torch.dtype) -> ValueAndGradient:
    def objective(u: Tensor) -> tuple[float, Tensor]:
        value, gradient = f(u.double().numpy())
        return -value, torch.from_numpy(-gradient).to(dtype)

    return objective


def box_of(n: int, seed: int, dtype: torch.dtype) -> tuple[Box, Tensor]:
    """Some variables without room, some without a bound; and a start."""
    rng = np.random.default_rng(seed)
    lower, upper = -rng.uniform(0.2, 2, n), rng.uniform(0.2, 2, n)
    fixed, open_ = rng.uniform(size=n) < 0.1, rng.uniform(size=n) < 0.05
    upper = np.where(fixed, lower, upper)
    start = rng.uniform(lower, upper)
    lower, upper = np.where(open_, -np.inf, lower), np.where(open_ & ~fixed, np.inf, upper)
    tensors = [torch.from_numpy(v).to(dtype) for v in (lower, upper, start)]
    return Box(*tensors[:2]), tensors[2]


def ended(f: Smooth, box: Box, start: Tensor, most: int = 400, **options) -> Maximum:
    """The last state, with what must hold of all of them."""
    objective = maximised(f, start.dtype)
    states = list(islice(lbfgsb(objective, start, box, **options), most))
    for state in states:
        assert torch.all((box.lower <= state.point) & (state.point <= box.upper))
        assert state.value == objective(state.point)[0]
        assert state.point.dtype == start.dtype
    for old, new in pairwise(states):
        assert new.value >= old.value
        assert new.num_evals >= old.num_evals
        assert not old.stopped
    return states[-1]


def scipy_value(f: Smooth, box: Box, start: Tensor) -> float:
    bounds = np.stack([box.lower.double().numpy(), box.upper.double().numpy()], 1)
    x0 = start.double().numpy()
    options = {"maxiter": 3000, "maxfun": 10000, "ftol": 0.0, "gtol": 1e-9}
    return float(
        minimize(f, x0, jac=True, method="L-BFGS-B", bounds=bounds, options=options).fun
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_a_convex_minimum_is_that_of_scipy(n, dtype):
    for seed in range(12):
        f, (box, start) = convex(n, seed), box_of(n, seed + 50, dtype)
        end = ended(f, box, start)
        first = f(start.double().numpy())[0]
        exact = 50 * torch.finfo(dtype).eps * max(first, 1.0)
        assert -end.value == pytest.approx(scipy_value(f, box, start), abs=exact), seed


@pytest.mark.parametrize("kind", [wavy, indefinite])
@pytest.mark.parametrize("n", [2, 10, 40])
def test_minima_of_functions_that_are_not_convex_are_as_good_as_those_of_scipy(n, kind):
    better = worse = 0
    for seed in range(40):
        f, (box, start) = kind(n, seed), box_of(n, seed + 50, torch.float64)
        if kind is indefinite:
            box = Box(box.lower.clamp(min=-3), box.upper.clamp(max=3))
        end = ended(f, box, start)
        gradient = torch.from_numpy(f(end.point.numpy())[1])
        rest = float((box.clip(end.point - gradient) - end.point).abs().max())
        assert rest < 1e-5, f"seed {seed} ends where the gradient points inwards"
        gain, theirs = -end.value, scipy_value(f, box, start)
        better += gain < theirs - 1e-6
        worse += gain > theirs + 1e-6
    assert worse - better <= 3 * math.sqrt(worse + better)  # a coin three sigma off


def test_about_one_value_an_iteration_is_asked_for():
    evals = iterations = 0
    for seed in range(20):
        f, (box, start) = convex(30, seed), box_of(30, seed, torch.float64)
        state = ended(f, box, start, most=30)
        evals, iterations = evals + state.num_evals, iterations + state.num_iters
    assert iterations < evals <= 2 * iterations


@pytest.mark.parametrize("memory", [1, 2, 30])
def test_other_memories_reach_the_same_minimum(memory):
    f, (box, start) = convex(20, 5), box_of(20, 5, torch.float64)
    end = ended(f, box, start, most=2000, memory=memory)
    assert -end.value == pytest.approx(scipy_value(f, box, start), rel=1e-9)


def test_a_box_without_room_is_left_at_once():
    point = torch.linspace(-1, 1, 5).double()
    end = ended(convex(5, 0), Box(point, point), point + 3)
    assert torch.equal(end.point, point)
    assert (end.num_evals, end.num_iters, end.stopped) == (1, 0, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("power", [2, 4])
def test_a_minimum_at_zero_is_approached_without_end_and_without_trouble(n, power, dtype):
    """No rounding stops this one: steps shrink until their products underflow."""
    h = np.logspace(0, 1, n)
    wide = torch.full((n,), 5.0, dtype=dtype)
    end = ended(
        lambda u: (float((h * u**power).sum()), power * h * u ** (power - 1)),
        Box(-wide, wide),
        torch.linspace(1, 2, n).to(dtype),
    )
    assert 0 <= -end.value < 1e-12


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-30, 2.0**30, 2.0**60])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_function_in_other_units_has_the_same_minimum(dtype, factor):
    f, (box, start) = convex(10, 4), box_of(10, 4, dtype)
    first, expected = f(start.double().numpy())[0], scipy_value(f, box, start)
    end = ended(lambda u: tuple(factor * part for part in f(u)), box, start)
    exact = 50 * torch.finfo(dtype).eps * first
    assert -end.value / factor == pytest.approx(expected, abs=exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [1.0, np.inf])
def test_a_function_that_overflows_in_most_of_the_box_is_minimised(top, dtype):
    """Sum exp(2000 (u - 0.3)) - 5 u, which is infinite from 0.66 on."""
    n = 6

    def f(u: np.ndarray) -> tuple[float, np.ndarray]:
        with np.errstate(over="ignore"):
            grown = np.exp(2000 * (u - 0.3))
            return float((grown - 5 * u).sum()), 2000 * grown - 5

    box = Box(torch.full((n,), -1.0, dtype=dtype), torch.full((n,), top, dtype=dtype))
    end = ended(f, box, torch.linspace(-0.9, 0.2, n).to(dtype))
    best = 0.3 + math.log(5 / 2000) / 2000
    assert end.point.double().numpy() == pytest.approx(best, abs=1e-5)


def test_an_exception_in_the_function_comes_through():
    calls = []

    def objective(u: Tensor) -> tuple[float, Tensor]:
        calls.append(u)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return maximised(convex(3, 0), torch.float64)(u)

    one = torch.ones(3).double()
    states = lbfgsb(objective, 0 * one, Box(-one, one))
    with pytest.raises(KeyboardInterrupt):
        list(states)
