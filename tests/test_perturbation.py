"""Rises of the loss in a ball: closed forms, plain loops, invariances, broken runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from measure_problems import ONE_SAMPLE, Point, mlp_data, mlp_risk
from scipy import stats
from scipy.optimize import brentq
from test_auto_pgd import reference
from torch import Tensor, nn

import sharpness as sh
from sharpness import _progress
from sharpness.measures import budget
from sharpness.measures.perturbation import normal_draws, perturbation_scale
from sharpness.record import to_line

NORMS = ["l2", "linf"]
ADAPTIVE = [None, "elementwise", "filterwise"]


def quadratic(h: np.ndarray, g: np.ndarray, shape: tuple[int, ...] = (-1,)):
    """1 + g^T t + 1/2 t^T H t, t measured from a random theta of this shape."""
    n = len(g)
    theta = torch.from_numpy(np.random.default_rng(n).normal(size=n))
    here, h, g = theta.clone(), torch.from_numpy(h), torch.from_numpy(g)

    def closure(model: nn.Module, _: Tensor) -> Tensor:
        t = model.theta.flatten() - here
        return 1 + g @ t + 0.5 * t @ (h @ t)

    return sh.EmpiricalRisk(Point(theta.view(shape)), closure=closure, data=ONE_SAMPLE)


def problem(n: int, spectrum: tuple[float, float], seed: int, slope: float = 1.0):
    """A dense H with eigenvalues evenly spread over `spectrum`, and a gradient."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    h = q * np.linspace(*spectrum, n) @ q.T
    return (h + h.T) / 2, slope * rng.normal(size=n)


def scale_by_hand(theta: np.ndarray, adaptive: str | None, columns: int) -> np.ndarray:
    """The c of one matrix with so many columns."""
    if adaptive is None:
        return np.ones_like(theta)
    if adaptive == "elementwise":
        return np.abs(theta)
    rows = theta.reshape(-1, columns)
    return np.repeat(np.sqrt((rows**2).sum(1)), columns)


def ball_maximum(h: np.ndarray, g: np.ndarray, rho: float) -> float:
    """max of g^T u + 1/2 u^T H u over ||u||_2 <= rho, by the secular equation."""
    values, q = np.linalg.eigh(h)
    b = q.T @ g

    def too_long(shift: float) -> float:
        return 1 / rho - 1 / np.linalg.norm(b / (shift - values))

    low, shift = max(values[-1], 0.0), 0.0
    if values[-1] >= 0 or too_long(0.0) > 0:
        start = low + 1e-12 * np.linalg.norm(b) / rho
        high = low + 2 * np.linalg.norm(b) / rho
        shift = brentq(too_long, start, high, xtol=1e-15, rtol=1e-14)
    u = q @ (b / (shift - values))
    return float(g @ u + 0.5 * u @ h @ u)


def classifier(num_samples: int = 40, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small ReLU network, always the same."""
    draw = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return model


def classifier_risk(model: nn.Module, num_samples: int = 40) -> sh.EmpiricalRisk:
    x, y = mlp_data(num_samples)
    x = x.to(next(model.parameters()).dtype)
    return sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y))


def without_time(result):
    return dataclasses.replace(result, seconds=0.0)


# -- the ball ----------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("spectrum", [(0.5, 2.0), (-2.0, 2.0), (-4.0, -0.1)])
@pytest.mark.parametrize("rho", [0.01, 0.3])
def test_the_worst_of_a_quadratic_is_that_of_the_secular_equation(adaptive, spectrum, rho):
    h, g = problem(12, spectrum, seed=1)
    risk = quadratic(h, g, (3, 4))
    c = scale_by_hand(risk.theta.numpy(), adaptive, 4)
    most = ball_maximum(c[:, None] * h * c, c * g, rho)
    few, many = (
        sh.worst_case_sharpness(risk, rho, adaptive=adaptive, num_steps=steps)
        for steps in (20, 200)
    )
    assert few.value <= many.value * (1 + 1e-9) <= most * (1 + 2e-9)
    assert many.value == pytest.approx(most, rel=1e-6)
    assert few.value > 0.99 * most
    assert few.status == many.status == "completed"


@pytest.mark.parametrize("seed", range(4))
def test_a_maximum_inside_the_ball_is_found_to_the_last_step(seed):
    """A step of s misses it by s at most, and the last one is 2 rho / 2^8."""
    h, g = problem(6, (-3.0, -1.0), seed)
    top = 0.5 * g @ np.linalg.solve(-h, g)
    rho = 2 * np.linalg.norm(np.linalg.solve(h, g))
    assert ball_maximum(h, g, rho) == pytest.approx(top, rel=1e-12)
    found = sh.worst_case_sharpness(quadratic(h, g), rho, num_steps=200)
    miss = 2 * rho / 2**8
    assert top - 0.5 * 3.0 * (2 * miss) ** 2 <= found.value <= top * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_worst_of_a_convex_quadratic_over_a_cube_lies_in_a_corner(seed):
    h, g = problem(8, (0.1, 2.0), seed, slope=2.0)
    rho = 0.5
    corners = rho * np.array(list(itertools.product([-1, 1], repeat=8)))
    rises = corners @ g + 0.5 * np.einsum("ki,ij,kj->k", corners, h, corners)
    risk = quadratic(h, g)
    found = sh.worst_case_sharpness(risk, rho, norm="linf", num_steps=100)
    u = found.displacement.numpy()
    np.testing.assert_allclose(np.abs(u), rho, rtol=1e-12)
    assert np.all(u * (g + h @ u) > 0)  # no direction into the cube rises
    assert found.value == pytest.approx(g @ u + 0.5 * u @ h @ u, rel=1e-9)
    assert found.sam_value <= found.value <= rises.max() * (1 + 1e-12)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rho", [1e-3, 0.05])
def test_where_the_slope_rules_the_worst_over_a_cube_is_known(adaptive, norm, rho):
    """No gradient in the cube changes sign, so its corner is the highest: one step."""
    h, g = problem(12, (0.1, 1.0), seed=2)
    g = np.sign(g) * (np.abs(g) + 12)
    risk = quadratic(h, g, (3, 4))
    c = scale_by_hand(risk.theta.numpy(), adaptive, 4)
    a, b = c[:, None] * h * c, c * g
    up = np.sign(b) if norm == "linf" else b / np.linalg.norm(b)
    step = b @ up * rho + 0.5 * rho**2 * up @ a @ up
    found = sh.worst_case_sharpness(risk, rho, norm=norm, adaptive=adaptive)
    assert found.sam_value == pytest.approx(step, rel=1e-9)
    most = step if norm == "linf" else ball_maximum(a, b, rho)
    assert found.value == pytest.approx(most, rel=1e-6)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("spectrum", [(0.5, 2.0), (-2.0, 2.0), (-4.0, -0.1)])
def test_the_step_of_sam_is_in_closed_form_r35(adaptive, norm, spectrum):
    h, g = problem(12, spectrum, seed=7)
    risk = quadratic(h, g, (4, 3))
    c = scale_by_hand(risk.theta.numpy(), adaptive, 3)
    b = c * g
    up = c * (np.sign(b) if norm == "linf" else b / np.linalg.norm(b))
    step = 0.2 * g @ up + 0.02 * up @ h @ up
    (found,) = sh.worst_case_sharpness(
        risk, [0.2], norm=norm, adaptive=adaptive, num_steps=1
    )
    assert found.sam_value == pytest.approx(step, rel=1e-9)
    assert found.value == pytest.approx(max(step, 0.0), rel=1e-9)
    assert found.num_evals == 2
    assert found.risk_value == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("norm", NORMS)
def test_without_a_gradient_the_step_of_sam_is_none_r35(adaptive, norm):
    h, _ = problem(12, (0.5, 2.0), seed=0)
    risk = quadratic(h, np.zeros(12), (4, 3))
    found = sh.worst_case_sharpness(risk, 0.05, norm=norm, adaptive=adaptive)
    assert found.status == "zero_gradient"
    assert found.value == 0.0
    assert found.num_evals == 1
    assert not found.displacement.any()
    with pytest.raises(sh.NotConvergedError, match="gradient is exactly zero"):
        found.raise_for_status()
    assert found.sam_value == 0.0


@pytest.mark.parametrize("norm", NORMS)
def test_one_parameter_and_a_whole_number_for_rho(norm):
    risk = quadratic(np.array([[3.0]]), np.array([-2.0]))
    found = sh.worst_case_sharpness(risk, 1, norm=norm)
    assert found.value == pytest.approx(3.5, rel=1e-12)
    assert found.displacement.tolist() == pytest.approx([-1.0])
    assert found.name == f"worst_{norm}(1)"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_the_displacement_is_in_the_ball_and_rises_by_the_value(norm, adaptive):
    risk = mlp_risk()
    found = sh.worst_case_sharpness(risk, 0.1, norm=norm, adaptive=adaptive)
    c = perturbation_scale(risk, adaptive)
    u = found.displacement / c
    assert float(u.norm(p=2 if norm == "l2" else math.inf)) <= 0.1 * (1 + 1e-12)
    rise = risk.value(risk.theta + found.displacement) - risk.value()
    assert found.value == pytest.approx(rise, rel=1e-9)
    assert found.risk_value == pytest.approx(risk.value(), rel=1e-12)
    assert found.value >= found.sam_value > 0


# -- averages ----------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_each_pair_of_draws_on_a_quadratic_rises_by_its_square_form(adaptive):
    h, g = problem(12, (-1.0, 4.0), seed=4, slope=30.0)
    risk = quadratic(h, g, (3, 4))
    c = scale_by_hand(risk.theta.numpy(), adaptive, 4)
    found = sh.average_case_sharpness(risk, 0.3, adaptive=adaptive, num_draws=7, seed=3)
    z = np.array([c * draw.numpy() for draw in normal_draws(risk, 7, 3)])
    rises = 0.3**2 / 2 * np.einsum("ki,ij,kj->k", z, h, z)
    assert found.value == pytest.approx(rises.mean(), rel=1e-9)
    assert found.standard_error == pytest.approx(rises.std(ddof=1) / 7**0.5, rel=1e-9)
    assert (found.num_draws, found.num_evals, found.status) == (7, 14, "completed")


def test_the_average_and_its_error_cover_the_trace(monkeypatch):
    h, g = problem(30, (-0.5, 2.0), seed=9)
    risk = quadratic(h, g, (5, 6))
    c = scale_by_hand(risk.theta.numpy(), "filterwise", 6)
    a = 0.04 / 2 * c[:, None] * h * c
    found = [
        sh.average_case_sharpness(risk, 0.2, adaptive="filterwise", seed=seed)
        for seed in range(150)
    ]
    miss = np.array([f.value for f in found]) - np.trace(a)
    errors = np.array([f.standard_error for f in found])
    true_error = math.sqrt(2 * np.sum(a**2) / 20)
    hits = int(np.sum(np.abs(miss) <= stats.t.ppf(0.975, 19) * errors))
    assert stats.binom.ppf(1e-3, 150, 0.95) <= hits
    assert abs(miss.mean()) < 4 * true_error / math.sqrt(150)
    spread = (errors**2).std(ddof=1) / math.sqrt(150)
    assert abs((errors**2).mean() - true_error**2) < 4 * spread


def test_the_draws_are_normal_and_belong_to_their_seed():
    risk = quadratic(*problem(50, (1.0, 2.0), seed=0))
    first, again, other = (torch.stack([*normal_draws(risk, 40, s)]) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (40, 50)
    assert first.dtype == torch.float64
    assert stats.kstest(first.flatten().numpy(), "norm").pvalue > 1e-3


def test_a_constant_loss_rises_nowhere():
    risk = quadratic(np.zeros((3, 3)), np.zeros(3))
    found = sh.average_case_sharpness(risk, 0.1)
    assert (found.value, found.standard_error, found.risk_value) == (0.0, 0.0, 1.0)
    assert sh.worst_case_sharpness(risk, 0.1).status == "zero_gradient"


# -- the scale ---------------------------------------------------------------------


class Varied(nn.Module):
    """Parameters of every number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(-1.5))
        self.conv = nn.Conv2d(2, 3, (2, 1))
        self.line = nn.Conv1d(3, 2, 2, bias=False)
        self.norm = nn.BatchNorm1d(2)
        self.table = nn.Embedding(4, 2)
        self.last = nn.Linear(2, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_norms_are_those_of_a_plain_loop(dtype):
    model = Varied().to(dtype)
    with torch.no_grad():
        model.last.weight[1] = 0
    risk = sh.EmpiricalRisk(
        model,
        closure=lambda m, _: sum(p.square().sum() for p in m.parameters()),
        data=ONE_SAMPLE,
    )
    expected = []
    for p in model.parameters():
        if p.ndim < 2:
            expected += [abs(float(x)) for x in p.detach().flatten()]
            continue
        for row in p.detach():
            entries = [float(x) for x in row.flatten()]
            expected += [math.sqrt(sum(x * x for x in entries))] * len(entries)
    found = perturbation_scale(risk, "filterwise")
    assert found.shape == risk.theta.shape
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(found.numpy(), expected, rtol=8 * eps)
    assert torch.equal(perturbation_scale(risk, "elementwise"), risk.theta.abs())
    assert torch.equal(perturbation_scale(risk, None), torch.ones(risk.n, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_adaptive_values_do_not_change_when_layers_trade_a_factor(dtype, adaptive):
    """Factors that are powers of two change no bit of what is invariant."""
    plain, scaled = classifier(dtype=dtype), classifier(dtype=dtype)
    with torch.no_grad():
        scaled[0].weight.mul_(4)
        scaled[0].bias.mul_(4)
        scaled[2].weight.div_(4)
    pairs = [
        [without_time(m) for m in measured(classifier_risk(model), adaptive)]
        for model in (plain, scaled)
    ]
    for first, second in zip(*pairs, strict=True):
        assert (first == second) == (adaptive is not None)
        assert first.risk_value == second.risk_value


def measured(risk: sh.EmpiricalRisk, adaptive: str | None):
    for norm in NORMS:
        yield sh.worst_case_sharpness(risk, 0.02, norm=norm, adaptive=adaptive)
        yield sh.worst_case_sharpness(
            risk, 0.02, norm=norm, adaptive=adaptive, shard_size=10
        )
    yield sh.average_case_sharpness(risk, 0.02, adaptive=adaptive)


def test_element_wise_values_do_not_change_when_neurons_trade_factors():
    plain, scaled = classifier(), classifier()
    factors = 2.0 ** torch.arange(-4, 4, dtype=torch.float64)
    with torch.no_grad():
        scaled[0].weight.mul_(factors[:, None])
        scaled[0].bias.mul_(factors)
        scaled[2].weight.div_(factors)
    for kind, same in (("elementwise", True), ("filterwise", False)):
        first, second = (
            sh.worst_case_sharpness(classifier_risk(model), 0.02, adaptive=kind)
            for model in (plain, scaled)
        )
        assert (first.value == second.value) == same


# -- shards ------------------------------------------------------------------------


def linear_slopes(num_samples: int) -> tuple[sh.EmpiricalRisk, np.ndarray]:
    """A loss that is linear in theta, and the gradient of each sample."""
    rng = np.random.default_rng(num_samples)
    x, y = rng.normal(size=(num_samples, 5)), rng.normal(size=(num_samples, 1))
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    risk = sh.EmpiricalRisk(
        model,
        lambda outputs, targets: 3 + (outputs * targets).mean(),
        (torch.from_numpy(x), torch.from_numpy(y)),
        terms=len,
    )
    return risk, x * y


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("num_samples", "shard_size"), [(40, 10), (41, 10), (41, 1)])
def test_shards_of_a_linear_loss_rise_by_the_norms_of_their_slopes(
    norm, num_samples, shard_size
):
    risk, slopes = linear_slopes(num_samples)
    found = sh.worst_case_sharpness(
        risk, 0.3, norm=norm, shard_size=shard_size, num_steps=3, seed=8
    )
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(8))
    shards = np.array_split(order.numpy(), math.ceil(num_samples / shard_size))
    rises, sizes = [], [len(shard) for shard in shards]
    for shard in shards:
        slope = slopes[shard].mean(0)
        rises.append(0.3 * np.linalg.norm(slope, 2 if norm == "l2" else 1))
    assert found.value == pytest.approx(np.average(rises, weights=sizes), rel=1e-9)
    assert found.sam_value == pytest.approx(found.value, rel=1e-9)
    error = np.std(rises, ddof=1) / math.sqrt(len(rises))
    assert found.standard_error == pytest.approx(error, rel=1e-6)
    assert found.risk_value == pytest.approx(risk.value(), rel=1e-12)
    assert (found.num_shards, found.shard_size) == (len(shards), max(sizes))
    assert found.num_evals == 4 * len(shards)
    assert found.displacement is None
    assert found.status == "completed"


def test_shards_of_a_network_rise_as_in_a_plain_loop():
    x, y = mlp_data(24)
    theta = mlp_risk().theta
    found = sh.worst_case_sharpness(
        sh.EmpiricalRisk(mlp_risk().model, nn.CrossEntropyLoss(), (x, y)),
        0.2,
        adaptive="elementwise",
        shard_size=6,
        num_steps=10,
        seed=1,
    )
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    rises, sam = [], []
    for shard in order.split(6):

        def function(u: np.ndarray, rows: Tensor = shard) -> tuple[float, np.ndarray]:
            v = torch.tensor(u, requires_grad=True)
            w1, b1, w2, b2 = (theta + theta.abs() * v).split([18, 6, 18, 3])
            hidden = torch.tanh(x[rows] @ w1.view(6, 3).T + b1)
            logits = hidden @ w2.view(3, 6).T + b2
            picked = logits[torch.arange(len(rows)), y[rows]]
            value = (logits.logsumexp(1) - picked).mean()
            return value.item(), torch.autograd.grad(value, v)[0].numpy()

        values = reference(function, np.zeros(len(theta)), 0.2, "l2", 10).values
        rises.append(max(values) - values[0])
        sam.append(values[1] - values[0])
    assert found.value == pytest.approx(np.mean(rises), rel=1e-7)
    assert found.sam_value == pytest.approx(np.mean(sam), rel=1e-9)
    assert found.standard_error == pytest.approx(stats.sem(rises), rel=1e-6)


def test_single_samples_need_no_seed_and_others_do():
    risk, _ = linear_slopes(23)
    ones, others = (
        [sh.worst_case_sharpness(risk, 0.1, shard_size=m, seed=s).value for s in (0, 1)]
        for m in (1, 5)
    )
    assert ones[0] == pytest.approx(ones[1], rel=1e-12)
    assert others[0] != pytest.approx(others[1], rel=1e-6)
    assert ones[0] > others[0] > sh.worst_case_sharpness(risk, 0.1).value


@pytest.mark.parametrize("shard_size", [None, 23, 1000])
def test_one_shard_is_the_whole_and_has_no_error(shard_size):
    risk, slopes = linear_slopes(23)
    found = sh.worst_case_sharpness(risk, 0.1, shard_size=shard_size)
    assert found.value == pytest.approx(0.1 * np.linalg.norm(slopes.mean(0)), rel=1e-9)
    assert found.standard_error is None
    assert (found.num_shards, found.shard_size) == (1, 23)
    assert found.displacement.shape == (5,)


def test_shards_weigh_as_much_as_their_loss_terms():
    """With class weights, and a sample that the loss ignores altogether."""
    x, y = mlp_data(12)
    y = y.clone()
    y[5] = -100
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weight, ignore_index=-100)
    risk = sh.EmpiricalRisk(mlp_risk().model, loss, (x, y))
    halves = sh.worst_case_sharpness(risk, 0.1, shard_size=6)
    assert halves.risk_value == pytest.approx(risk.value(), rel=1e-12)
    single = sh.worst_case_sharpness(risk, 0.1, shard_size=1)
    assert single.risk_value == pytest.approx(risk.value(), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_gravest_status_of_the_shards_is_the_one_given(seed):
    x = torch.zeros(4, 2, dtype=torch.float64)  # no gradient, but for one NaN
    x[1] = math.nan
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    risk = sh.EmpiricalRisk(model, nn.MSELoss(), (x, x[:, :1] * 0))
    found = sh.worst_case_sharpness(risk, 0.1, shard_size=1, seed=seed)
    assert found.status == "non_finite"


# -- how a run can end -------------------------------------------------------------


@pytest.fixture
def evaluations(monkeypatch):
    """Every value that any risk computes; Ctrl-C instead of the given one."""

    def watch(method: str, interrupt: int = 0) -> list[float]:
        values: list[float] = []
        whole = getattr(sh.EmpiricalRisk, method)

        def watched(self, theta: Tensor | None = None):
            if len(values) + 1 == interrupt:
                values.append(math.nan)
                raise KeyboardInterrupt
            found = whole(self, theta)
            values.append(found if method == "value" else found[0])
            return found

        monkeypatch.setattr(sh.EmpiricalRisk, method, watched)
        return values

    return watch


def test_the_costs_are_the_calls_that_are_made(evaluations):
    risk = mlp_risk()
    gradients = evaluations("value_and_gradient")
    found = sh.worst_case_sharpness(risk, [0.05, 0.1], shard_size=10, num_steps=7)
    assert [f.num_evals for f in found] == [32, 32]
    assert len(gradients) == 64
    values = evaluations("value")
    found = sh.average_case_sharpness(risk, [0.05, 0.1, 0.2], num_draws=4)
    assert [f.num_evals for f in found] == [8, 8, 8]
    assert len(values) == 24 + 1  # f(theta) serves every radius


@pytest.mark.parametrize("call", [1, 2, 3, 9, 21])
def test_an_interrupt_gives_the_best_point_so_far(call, evaluations):
    risk = mlp_risk()
    values = evaluations("value_and_gradient", interrupt=call)
    found = sh.worst_case_sharpness(risk, 0.5)
    assert found.status == "interrupted"
    assert len(values) == call
    assert "interrupted" in str(found)
    if call == 1:
        assert math.isnan(found.value)
        return
    assert found.value == max(values[:-1]) - values[0]
    assert math.isnan(found.sam_value) == (call == 2)
    rise = risk.value(risk.theta + found.displacement) - values[0]
    assert found.value == pytest.approx(rise, rel=1e-9)


@pytest.mark.parametrize("call", [1, 2, 6, 7, 13])
def test_an_interrupt_among_shards_gives_those_begun(call, evaluations):
    risk = mlp_risk()
    values = evaluations("value_and_gradient", interrupt=call)
    found = sh.worst_case_sharpness(risk, 0.5, shard_size=10, num_steps=5)
    assert found.status == "interrupted"
    assert found.num_evals == call
    begun = [values[i : min(i + 6, call - 1)] for i in range(0, call - 1, 6)]
    expected = np.mean([max(v) - v[0] for v in begun]) if begun else math.nan
    assert found.value == pytest.approx(expected, rel=1e-12, nan_ok=True)
    json.loads(to_line({"found": found}))
    assert "\n" not in str(found)


@pytest.mark.parametrize("call", [2, 3, 4, 5, 6, 40])
def test_an_interrupt_gives_the_average_of_the_pairs_done(call, evaluations):
    risk = mlp_risk()
    values = evaluations("value", interrupt=call)
    found = sh.average_case_sharpness(risk, 0.5)
    pairs = (call - 2) // 2
    assert found.status == "interrupted"
    assert found.num_draws == pairs
    rises = np.array(values[1 : 1 + 2 * pairs]).reshape(-1, 2).mean(1) - values[0]
    expected = rises.mean() if pairs else math.nan
    error = stats.sem(rises) if pairs > 1 else math.nan
    assert found.value == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert found.standard_error == pytest.approx(error, rel=1e-7, nan_ok=True)
    assert "interrupted" in str(found)


@pytest.mark.parametrize(
    ("most", "evals", "draws"), [(-1, 0, 0), (0.5, 1, 1), (3.5, 4, 2), (100, 21, 20)]
)
def test_time_stops_after_the_evaluation_that_passes_it(
    most, evals, draws, evaluations, monkeypatch
):
    """With a clock that ticks once an evaluation."""
    risk = mlp_risk()
    for method in ("value_and_gradient", "value"):
        calls = evaluations(method)
        clock = SimpleNamespace(monotonic=lambda calls=calls: float(len(calls)))
        monkeypatch.setattr(budget, "time", clock)
        if method == "value":
            found = sh.average_case_sharpness(risk, 0.1, max_seconds=most)
            assert (found.num_draws, found.num_evals) == (draws, 2 * draws)
        else:
            found = sh.worst_case_sharpness(risk, 0.1, max_seconds=most)
            assert found.num_evals == evals
        assert found.status == ("completed" if most == 100 else "max_seconds")
        assert math.isnan(found.value) == (most < 0)


@pytest.mark.parametrize("where", ["data", "theta"])
def test_a_risk_that_is_nan_says_so(where):
    model, (x, y) = mlp_risk().model, mlp_data()
    if where == "theta":
        model.last.bias.data[1] = math.nan
    else:
        x[3, 2] = math.nan
    risk = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y))
    worst = sh.worst_case_sharpness(risk, 0.1)
    average = sh.average_case_sharpness(risk, 0.1)
    for found in (worst, average):
        assert found.status == "non_finite"
        assert math.isnan(found.value)
        assert "non_finite" in str(found)
        assert all("non_finite" in r.evidence for r in found.readings())


@pytest.mark.parametrize("norm", NORMS)
def test_a_ball_that_reaches_where_nothing_is_finite_gives_what_is(norm):
    """-log(1 - t) has no value beyond 1, and the ball goes up to 3."""
    risk = sh.EmpiricalRisk(
        Point(torch.zeros(2, dtype=torch.float64)),
        closure=lambda model, _: -torch.log(1 - model.theta[0]) + model.theta[1],
        data=ONE_SAMPLE,
    )
    found = sh.worst_case_sharpness(risk, 3.0, norm=norm)
    assert found.status == "completed"
    assert math.isfinite(found.value)
    assert found.value > 1
    assert sh.average_case_sharpness(risk, 3.0).status == "non_finite"


def test_a_dead_region_does_not_end_the_search_as_completed():
    risk = sh.EmpiricalRisk(
        Point(torch.zeros(1, dtype=torch.float64)),
        closure=lambda model, _: (model.theta * (model.theta < 0.5)).sum(),
        data=ONE_SAMPLE,
    )
    found = sh.worst_case_sharpness(risk, 1.0)
    assert found.status == "completed"
    assert 0.2 < found.value < 0.5


@pytest.mark.parametrize("call", [None, 3])
def test_risk_model_and_generators_are_as_they_were_r22(call, evaluations):
    risk = mlp_risk()
    model = risk.model.train()
    state = [p.detach().clone() for p in model.parameters()]
    theta, numbers = risk.theta.clone(), (risk.value(), risk.gradient())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    if call:
        evaluations("value", interrupt=call)
        evaluations("value_and_gradient", interrupt=call)
    sh.worst_case_sharpness(risk, 0.1, shard_size=9, adaptive="filterwise")
    sh.average_case_sharpness(risk, 0.1, adaptive="elementwise")
    assert torch.equal(risk.theta, theta)
    assert risk.value() == numbers[0]
    assert torch.equal(risk.gradient(), numbers[1])
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), state, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


# -- lists, seeds and refusals -----------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_radii_gives_what_each_gives_alone(kind):
    risk, radii = mlp_risk(), [0.2, 0.05, 1]
    options = {"adaptive": "elementwise", "seed": 3}
    for measure in (sh.worst_case_sharpness, sh.average_case_sharpness):
        found = measure(risk, kind(radii), **options)
        alone = [measure(risk, rho, **options) for rho in radii]
        assert [without_time(f) for f in found] == [without_time(a) for a in alone]
        assert [f.rho for f in found] == radii
        assert isinstance(measure(risk, kind([0.1])), list)


def test_the_same_seed_gives_the_same_bits():
    risk = mlp_risk()
    for measure, options in (
        (sh.worst_case_sharpness, {"shard_size": 7}),
        (sh.average_case_sharpness, {}),
    ):
        first, again, other = (
            without_time(measure(risk, 0.1, seed=seed, **options)) for seed in (4, 4, 5)
        )
        assert first == again
        assert first.value != other.value


@pytest.mark.parametrize("rho", [0, -1.0, math.nan, math.inf, None, "0.05", [0.05, -2.0]])
def test_a_radius_that_is_not_positive_is_refused(rho):
    for measure in (sh.worst_case_sharpness, sh.average_case_sharpness):
        with pytest.raises(ValueError, match="`rho` must be positive; got") as error:
            measure(mlp_risk(), rho)
        assert "\n" not in str(error.value)
    if rho == [0.05, -2.0]:
        assert "got -2.0" in str(error.value)


@pytest.mark.parametrize("number", [np.float64(0.1), np.float32(0.125), np.int64(1)])
def test_a_number_of_numpy_is_a_number(number):
    for measure in (sh.worst_case_sharpness, sh.average_case_sharpness):
        expected = measure(mlp_risk(), float(number)).value
        assert measure(mlp_risk(), number).value == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l1"}, "`norm` must be 'l2' or 'linf'; got 'l1'"),
        ({"norm": 2}, "`norm` must be 'l2' or 'linf'; got 2"),
        ({"adaptive": "layer"}, "`adaptive` must be None, .*; got 'layer'"),
        ({"adaptive": True}, "`adaptive` must be None, .*; got True"),
        ({"num_steps": 0}, "`num_steps` must be at least 1; got 0"),
        ({"shard_size": 0}, "`shard_size` must be at least 1; got 0"),
        ({"shard_size": -3}, "`shard_size` must be at least 1; got -3"),
        ({"num_steps": 2.5}, "`num_steps` must .*; got 2.5"),
        ({"shard_size": 2.5}, "`shard_size` must .*; got 2.5"),
        ({"num_draws": 1}, "`num_draws` must be at least 2; got 1"),
        ({"num_draws": 2.5}, "`num_draws` must .*; got 2.5"),
    ],
)
def test_an_argument_outside_its_range_is_refused(options, message):
    average = "num_draws" in options
    measure = sh.average_case_sharpness if average else sh.worst_case_sharpness
    with pytest.raises((ValueError, TypeError), match=message) as error:
        measure(mlp_risk(), 0.1, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_samples", [1, 10])
def test_shards_of_a_closure_are_refused(num_samples):
    risk = sh.EmpiricalRisk(
        Point(torch.ones(3)),
        closure=lambda model, _: model.theta.square().sum(),
        data=ONE_SAMPLE * num_samples,
    )
    with pytest.raises(TypeError, match="a `closure`"):
        sh.worst_case_sharpness(risk, 0.1, shard_size=1)


# -- logits ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (2, 3, 5, 2)])
def test_normalised_logits_have_mean_0_and_length_1(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    logits = 7 + 5 * torch.randn(shape, generator=generator, dtype=dtype)
    found = sh.NormalisedLogits(nn.Identity())(logits)
    z = logits.double().numpy()
    centred = z - z.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).sum(axis=1, keepdims=True))
    eps = torch.finfo(dtype).eps
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), expected, atol=64 * eps)


@pytest.mark.parametrize("size", [1e-6, 1e-12])
def test_logits_that_hardly_differ_are_divided_by_the_lower_limit(size):
    z = size * torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    found = sh.NormalisedLogits(nn.Identity())(z)
    torch.testing.assert_close(found, z / max(size * math.sqrt(2), 1e-10))


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("constant", [0.0, 0.5, 0.1, 1.7, 1e3 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_logits_become_zero(classes, constant, dtype):
    logits = torch.full((2, classes), constant, dtype=dtype)
    assert not sh.NormalisedLogits(nn.Identity())(logits).any()


def test_a_model_with_constant_logits_has_finite_derivatives():
    model = nn.Linear(3, 3, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    risk = classifier_risk(sh.NormalisedLogits(model))
    assert risk.value() == pytest.approx(math.log(3), rel=1e-12)
    assert risk.gradient().isfinite().all()
    assert risk.hvp(torch.ones(12, dtype=torch.float64)).isfinite().all()


def test_the_scale_of_the_last_layer_does_not_matter_to_normalised_logits():
    plain, scaled = classifier(), classifier()
    with torch.no_grad():
        scaled[2].weight.mul_(8)
        scaled[2].bias.mul_(8)
    for wrap, same in ((sh.NormalisedLogits, True), (lambda model: model, False)):
        first, second = (
            without_time(
                sh.worst_case_sharpness(
                    classifier_risk(wrap(model)), 0.05, adaptive="elementwise"
                )
            )
            for model in (plain, scaled)
        )
        assert (first == second) == same


def test_normalised_logits_pass_on_whatever_the_model_takes():
    class Sum(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
            return a + b

    a, b = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[4.0, -2.0, 1.0]])
    wrapped = sh.NormalisedLogits(Sum())
    torch.testing.assert_close(wrapped(a, b=b)[0], torch.tensor([1, -5, 4]) / 42**0.5)


# -- what a person sees ------------------------------------------------------------


def test_names_and_readings_say_what_was_measured():
    risk = mlp_risk()
    worst = sh.worst_case_sharpness(risk, 1e-3, norm="linf", adaptive="elementwise")
    average = sh.average_case_sharpness(risk, 0.05, num_draws=6)
    shards = sh.worst_case_sharpness(risk, 0.05, shard_size=10)
    best, sam = worst.readings()
    assert worst.name == best.name == "worst_linf_elementwise(1e-3)"
    assert sam.name == "sam_linf_elementwise(1e-3)"
    assert (best.value, sam.value) == (worst.value, worst.sam_value)
    assert (best.bound, sam.bound, best.error) == ("≥", "≥", None)
    (mean,) = average.readings()
    assert average.name == mean.name == "average(0.05)"
    assert (mean.value, mean.error) == (average.value, average.standard_error)
    assert mean.bound == ""
    assert "6 pairs" in mean.evidence
    assert shards.readings()[0].error == shards.standard_error > 0
    assert "4 shards" in str(shards)
    for found in (worst, average, shards):
        assert found.name in str(found)
        assert "\n" not in str(found)
        assert "\n" not in repr(found)
        plain = json.loads(to_line({"found": found}))["found"]
        assert plain["value"] == found.value


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_is_shown_or_hidden_as_asked(shown, monkeypatch, capsys):
    asked, bar = [], _progress.bar
    monkeypatch.setattr(
        _progress, "bar", lambda *args: (asked.append(args[2]), bar(*args))[1]
    )
    risk = mlp_risk()
    sh.worst_case_sharpness(risk, 0.1, progress=shown)
    sh.average_case_sharpness(risk, 0.1, progress=shown)
    printed = capsys.readouterr()
    assert asked == [shown, shown]
    assert printed.out == ""
    assert ("gradients" in printed.err) == ("forward passes" in printed.err) == shown
