"""The parts of L-BFGS-B against the papers' formulas, written out densely in NumPy."""

from __future__ import annotations

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

DTYPES = [torch.float64, torch.float32]
Pair = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def _no_endless_search(monkeypatch):
    slopes, search, counts = _Model._slopes, _Model._cauchy_step, [0]

    def counted(self, *arguments):
        counts[0] += 1
        assert counts[0] < 1500, "the search for the Cauchy point does not end"
        return slopes(self, *arguments)

    def begun(self, *arguments):
        counts[0] = 0
        return search(self, *arguments)

    monkeypatch.setattr(_Model, "_slopes", counted)
    monkeypatch.setattr(_Model, "_cauchy_step", begun)


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
    found = matrix_of(model)
    assert np.abs(found - expected).max() <= exact * np.abs(expected).max()


@pytest.mark.parametrize("curvature", [-1.0, 0.0, 1e-17])
def test_a_pair_without_positive_curvature_is_left_out(curvature):
    pairs = pairs_of(8, 3, seed=0)
    model = model_of(pairs, torch.zeros(8).double())
    before = matrix_of(model)
    s = np.eye(8)[0]
    model.add(*(torch.from_numpy(v) for v in (s, curvature * s + np.eye(8)[1])))
    assert np.array_equal(matrix_of(model), before)


@pytest.mark.parametrize(("rise", "width"), [(1e8, 1.0), (1e-8, 1.0), (1.0, 1e-8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_of_positive_curvature_is_taken_in_whatever_its_units(dtype, rise, width):
    pairs = pairs_of(8, 3, seed=0, rise=rise, width=width)
    assert len(model_of(pairs, torch.zeros(8, dtype=dtype))._ss) == 3


# -- along the path ----------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 1 << 15])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 20, 120])
def test_slopes_are_the_derivative_of_the_model_along_the_path(
    n, dtype, block, monkeypatch
):
    monkeypatch.setattr("sharpness.optimize.lbfgsb._BLOCK", block)
    for seed in range(6):
        p = path(n, seed, num=min(n, 6))
        x, g, box = p.tensors(dtype)
        p = Path(*(v.double().numpy() for v in (x, g, box.lower, box.upper)), p.pairs)
        pairs = as_stored(p.pairs, dtype)
        # Powers of two are the same in both types, and meet the breaks of the ties.
        steps, b = [2.0**i for i in range(-12, 4)], dense(pairs)
        found = model_of(pairs, x)._slopes(g, _breakpoints(x, g, box), steps)
        exact = 4 * torch.finfo(dtype).eps * np.linalg.cond(compact(pairs)[2])
        assert exact < 0.01
        for t, slope in zip(steps, found, strict=True):
            if np.any(np.abs(p.breaks - t) < 1e-5 * t) and not seed % 2:
                continue
            expected, size = p.slope(t, b)
            assert slope == pytest.approx(expected, abs=exact * size), (seed, t)


@pytest.mark.parametrize("seed", range(8))
def test_the_published_algorithm_as_written_here_stops_at_a_local_minimum(seed):
    p = path(40, seed)
    (theta, w, inverse), b = compact(p.pairs), dense(p.pairs)
    assert theta * np.eye(40) - w @ np.linalg.inv(inverse) @ w.T == pytest.approx(b)
    t = published(p)
    assert p.slope(t * (1 - 1e-9), b)[0] < 0 <= p.slope(t * (1 + 1e-9), b)[0]
    assert all(p.slope(share * t, b)[0] < 0 for share in np.linspace(0, 0.999, 500))


SCALES = [(1.0, 1.0), (1e8, 1.0), (1e-8, 1.0), (1.0, 1e8), (1.0, 1e-4)]


@pytest.mark.parametrize(("rise", "width"), SCALES)
@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_the_cauchy_point_is_a_minimum_along_the_path(n, rise, width):
    """The slope changes its sign within the last bracket, which is 2 % of t wide."""
    for seed in range(20):
        p = path(n, seed, rise, width, num=min(n, 6))
        x, g, box = p.tensors()
        t = model_of(p.pairs, x)._cauchy_step(g, _breakpoints(x, g, box))
        b, apart = dense(p.pairs), np.linspace(0, 0.0205, 12)
        assert min(p.slope(t * (1 - part), b)[0] for part in apart) < 0, seed
        assert max(p.slope(t * (1 + part), b)[0] for part in apart) >= 0, seed


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 3000])
def test_the_cauchy_point_is_that_of_the_published_algorithm(n):
    """In high dimension to three digits; across a jump of the slope within a bracket."""
    differ = []
    for seed in range(40 if n <= 100 else 2):
        p = path(n, seed, num=min(n, 6))
        x, g, box = p.tensors()
        t = model_of(p.pairs, x)._cauchy_step(g, _breakpoints(x, g, box))
        expected, exact = p.moved(published(p)), 1e-3 if n == 3000 else 0.02
        differ += [] if np.allclose(p.moved(t), expected, rtol=exact, atol=0) else [seed]
    assert differ == []


@pytest.mark.parametrize("few", [1, 100, 3000])
def test_many_variables_have_the_cauchy_point_of_the_sorted_path(few, monkeypatch):
    """To three digits, wherever the few variables looked at first say that it is."""
    monkeypatch.setattr("sharpness.optimize.lbfgsb._EXACT", 0)
    monkeypatch.setattr("sharpness.optimize.lbfgsb._FEW", few)
    for seed in range(4):
        p = path(3000, seed, num=6)
        x, g, box = p.tensors()
        model, breaks = model_of(p.pairs, x), _breakpoints(x, g, box)
        expected = model._cauchy_by_sorting(g, breaks)
        assert model._cauchy_step(g, breaks) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("second", [0.1, 1.0, 10.0])
def test_the_first_of_two_minima_along_the_path_is_the_cauchy_point(second):
    """B = diag(100, second): variable 0 overshoots, and meets its bound at t = 0.039."""
    e, low = np.eye(2), np.array([-0.039, -10.0])
    pairs = [(e[1], second * e[1]), (e[0], 100 * e[0])]
    p = Path(np.zeros(2), np.array([1.0, 0.1]), low, -low, pairs)
    x, g, box = p.tensors()
    t = model_of(p.pairs, x)._cauchy_step(g, _breakpoints(x, g, box))
    assert p.model(t, dense(pairs)) < 0, "the model is higher there than at the start"
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


def narrow(seed: int) -> Path:
    """Curvatures of 1 to 1000 in a box whose sides are as unequal."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    hessian = q * np.array([1.0, 3.0, 30.0, 1000.0]) @ q.T
    low, up = (10 ** rng.uniform(-4, 0, 4) for _ in range(2))
    pairs = [(v, hessian @ v) for v in q.T]
    return Path(np.zeros(4), rng.normal(size=4), -low, up, pairs)


def compared(paths: list[Path], width: float = 1.0) -> int:
    """How many subspace steps were cut at a bound instead of projected."""
    cut = 0
    for p in paths:
        x, g, box = p.tensors()
        model = model_of(p.pairs, x)
        t = model._cauchy_step(g, _breakpoints(x, g, box))
        expected, projected = dense_minimiser(p, dense(p.pairs), t)
        found = model.minimiser(x, g, box).numpy()
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-8 * width)
        cut += not projected
    return cut


@pytest.mark.parametrize(("rise", "width"), SCALES)
@pytest.mark.parametrize("n", [1, 2, 30, 100])
def test_the_minimiser_over_the_free_variables_is_that_of_a_dense_solve(n, rise, width):
    compared([path(n, seed, rise, width, num=min(n, 6)) for seed in range(12)], width)


def test_a_projected_step_that_climbs_is_cut_at_the_first_bound_instead():
    assert compared([narrow(seed) for seed in range(100)]) > 0


# -- the whole ---------------------------------------------------------------------

Smooth = Callable[[np.ndarray], tuple[float, np.ndarray]]


def bowl(n: int, seed: int, waves: float = 0.0) -> Smooth:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a, centre = q * np.logspace(0, 2, n) @ q.T, 1.5 * rng.normal(size=n)
    height = waves * rng.uniform(size=n)

    def f(u: np.ndarray) -> tuple[float, np.ndarray]:
        v = u - centre
        value = 0.5 * v @ a @ v + (v**4 + height * np.cos(3 * v)).sum()
        return float(value), a @ v + 4 * v**3 - 3 * height * np.sin(3 * v)

    return f


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


def ended(f: Smooth, box: Box, start: Tensor) -> Maximum:
    """The last state, with what must hold of all of them."""
    objective = maximised(f, start.dtype)
    states = list(islice(lbfgsb(objective, start, box), 400))
    for state in states:
        assert torch.all((box.lower <= state.point) & (state.point <= box.upper))
        assert state.value == objective(state.point)[0]
    assert all(new.value >= old.value for old, new in pairwise(states))
    return states[-1]


def scipy_value(f: Smooth, box: Box, start: Tensor) -> float:
    bounds = np.stack([box.lower.double().numpy(), box.upper.double().numpy()], 1)
    x0 = start.double().numpy()
    exact = {"maxiter": 3000, "maxfun": 10000, "ftol": 0.0, "gtol": 1e-9}
    found = minimize(f, x0, jac=True, method="L-BFGS-B", bounds=bounds, options=exact)
    return float(found.fun)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 20])
def test_a_convex_minimum_is_that_of_scipy(n, dtype):
    for seed in range(8):
        f, (box, start) = bowl(n, seed), box_of(n, seed + 50, dtype)
        end = ended(f, box, start)
        exact = 50 * torch.finfo(dtype).eps * max(f(start.double().numpy())[0], 1.0)
        assert -end.value == pytest.approx(scipy_value(f, box, start), abs=exact), seed


@pytest.mark.parametrize("n", [2, 12])
def test_minima_of_functions_that_are_not_convex_are_as_good_as_those_of_scipy(n):
    better = worse = 0
    for seed in range(20):
        f, (box, start) = bowl(n, seed, waves=40), box_of(n, seed + 50, torch.float64)
        end = ended(f, box, start)
        gradient = torch.from_numpy(f(end.point.numpy())[1])
        rest = float((box.clip(end.point - gradient) - end.point).abs().max())
        assert rest < 1e-5, f"seed {seed} ends where the gradient points inwards"
        behind = -end.value - scipy_value(f, box, start)
        better, worse = better + (behind < -1e-6), worse + (behind > 1e-6)
    assert worse - better <= 3 * math.sqrt(worse + better)  # a coin three sigma off


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("power", [2, 4])
def test_a_minimum_at_zero_is_approached_without_end_and_without_trouble(n, power, dtype):
    """No rounding stops this one: steps shrink until their products underflow."""
    h = np.logspace(0, 1, n)
    wide = torch.full((n,), 5.0, dtype=dtype)
    start = torch.linspace(1, 2, n).to(dtype)
    f = np.polynomial.Polynomial([0] * power + [1])
    end = ended(lambda u: (float(h @ f(u)), h * f.deriv()(u)), Box(-wide, wide), start)
    assert 0 <= -end.value < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_small_is_not_called_zero(dtype):
    one = torch.ones(5, dtype=dtype)
    tiny = 0.1 * torch.finfo(dtype).eps
    end = ended(lambda u: (tiny * float(u.sum()), tiny + 0 * u), Box(-one, one), 0.7 * one)
    assert "is zero" not in end.message or torch.equal(end.point, -one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [1.0, np.inf])
def test_a_function_that_overflows_in_most_of_the_box_is_minimised(top, dtype):
    """Sum exp(2000 (u - 0.3)) - 5 u, which is infinite from 0.66 on."""

    def f(u: np.ndarray) -> tuple[float, np.ndarray]:
        with np.errstate(over="ignore"):
            grown = np.exp(2000 * (u - 0.3))
            return float((grown - 5 * u).sum()), 2000 * grown - 5

    box = Box(torch.full((6,), -1.0, dtype=dtype), torch.full((6,), top, dtype=dtype))
    end = ended(f, box, torch.linspace(-0.9, 0.2, 6).to(dtype))
    best = 0.3 + math.log(5 / 2000) / 2000
    assert end.point.double().numpy() == pytest.approx(best, abs=1e-5)
