"""Rises of the loss in a ball: closed forms, plain loops, invariances, broken runs."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.intervals import mean_ends
from helpers.maximum import ball_maximum, dense_quadratic, reference
from helpers.problems import ONE_SAMPLE, Point, Pole, mlp_data, mlp_risk
from scipy import stats
from torch import Tensor, nn

import sharpness as sh
from sharpness import _run
from sharpness._json import to_line
from sharpness.measures import perturbation
from sharpness.measures.perturbation import (
    NormalisedLogits,
    normal_draws,
    perturbation_scale,
)

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


def scale_by_hand(theta: np.ndarray, adaptive: str | None, columns: int) -> np.ndarray:
    """The c of one matrix with so many columns."""
    if adaptive is None:
        return np.ones_like(theta)
    if adaptive == "elementwise":
        return np.abs(theta)
    rows = theta.reshape(-1, columns)
    return np.repeat(np.sqrt((rows**2).sum(1)), columns)


def classifier_risk(model: nn.Module) -> sh.EmpiricalRisk:
    x, y = mlp_data()
    data = x.to(next(model.parameters()).dtype), y
    return sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), data)


def without_time(result):
    return dataclasses.replace(result, cost=dataclasses.replace(result.cost, seconds=0.0))


# -- the ball ----------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_the_worst_of_a_quadratic_is_that_of_the_secular_equation(adaptive):
    h, g = dense_quadratic(12, (-2.0, 2.0), seed=1)
    risk = quadratic(h, g, (3, 4))
    c = scale_by_hand(risk.theta.numpy(), adaptive, 4)
    most = ball_maximum(c[:, None] * h * c, c * g, 0.3)
    found = sh.worst_case_sharpness(risk, 0.3, adaptive=adaptive, num_steps=100)
    t = found.displacement.numpy()
    assert np.linalg.norm(t / c) <= 0.3 * (1 + 1e-12)
    assert found.value == pytest.approx(g @ t + 0.5 * t @ h @ t, rel=1e-9)
    assert found.value == pytest.approx(most, rel=1e-6)
    assert found.value <= most * (1 + 1e-9)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("spectrum", [(-2.0, 2.0), (-40.0, -10.0)])
def test_the_step_of_sam_is_in_closed_form_r35(adaptive, norm, spectrum):
    h, g = dense_quadratic(12, spectrum, seed=7)
    risk = quadratic(h, g, (4, 3))
    c = scale_by_hand(risk.theta.numpy(), adaptive, 3)
    b = c * g
    up = c * (np.sign(b) if norm == "linf" else b / np.linalg.norm(b))
    step = 0.2 * g @ up + 0.02 * up @ h @ up
    options = {"norm": norm, "adaptive": adaptive, "num_steps": 1}
    found = sh.worst_case_sharpness(risk, 0.2, **options)
    assert found.sam_value == pytest.approx(step, rel=1e-9)
    assert found.value == pytest.approx(max(step, 0.0), rel=1e-9)
    assert found.num_evals == 2
    assert found.risk_value == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("adaptive", [None, "elementwise"])
def test_without_a_gradient_the_step_of_sam_is_none_r35(adaptive, norm):
    h, _ = dense_quadratic(12, (0.5, 2.0), seed=0)
    risk = quadratic(h, np.zeros(12), (4, 3))
    found = sh.worst_case_sharpness(risk, 0.05, norm=norm, adaptive=adaptive)
    assert found.status == "zero_gradient"
    assert found.value == 0.0
    assert found.num_evals == 1
    assert not found.displacement.any()
    with pytest.raises(sh.NotConvergedError, match="gradient is exactly zero"):
        found.raise_for_status()
    assert found.sam_value == 0.0


@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_each_pair_of_draws_on_a_quadratic_rises_by_its_square_form(adaptive):
    h, g = dense_quadratic(12, (-1.0, 4.0), seed=4)
    risk = quadratic(h, 30 * g, (3, 4))
    c = scale_by_hand(risk.theta.numpy(), adaptive, 4)
    found = sh.average_case_sharpness(risk, 0.3, adaptive=adaptive, num_draws=7, seed=3)
    z = np.array([c * draw.numpy() for draw in normal_draws(risk, 7, 3)])
    rises = 0.3**2 / 2 * np.einsum("ki,ij,kj->k", z, h, z)
    assert found.value == pytest.approx(rises.mean(), rel=1e-9)
    assert found.standard_error == pytest.approx(rises.std(ddof=1) / 7**0.5, rel=1e-9)
    assert found.interval == pytest.approx(mean_ends(rises, 0.95), rel=1e-9)
    assert (found.num_draws, found.num_evals, found.status) == (7, 14, "completed")


def test_the_average_and_its_error_cover_the_trace():
    h, g = dense_quadratic(30, (-0.5, 2.0), seed=9)
    risk = quadratic(h, g, (5, 6))
    c = scale_by_hand(risk.theta.numpy(), "filterwise", 6)
    a = 0.04 / 2 * c[:, None] * h * c
    options = {"adaptive": "filterwise", "num_draws": 10}
    found = [sh.average_case_sharpness(risk, 0.2, seed=s, **options) for s in range(60)]
    miss = np.array([f.value for f in found]) - np.trace(a)
    errors = np.array([f.standard_error for f in found])
    true_error = math.sqrt(2 * np.sum(a**2) / 10)
    hits = int(np.sum(np.abs(miss) <= stats.t.ppf(0.975, 9) * errors))
    assert stats.binom.ppf(1e-3, 60, 0.95) <= hits
    assert abs(miss.mean()) < 4 * true_error / math.sqrt(60)
    spread = (errors**2).std(ddof=1) / math.sqrt(60)
    assert abs((errors**2).mean() - true_error**2) < 4 * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_norms_are_those_of_a_plain_loop(dtype):
    layers = nn.Conv2d(2, 3, (2, 1)), nn.Conv1d(3, 2, 2), nn.BatchNorm1d(2), nn.Linear(2, 5)
    model = nn.Sequential(*layers).to(dtype)
    model.register_parameter("factor", nn.Parameter(torch.tensor(-1.5, dtype=dtype)))
    with torch.no_grad():
        model[3].weight[1] = 0
    risk = sh.EmpiricalRisk(model, closure=lambda m, _: 0 * m.factor, data=ONE_SAMPLE)
    expected = []
    for p in model.parameters():
        for row in p.detach() if p.ndim > 1 else p.detach().flatten():
            entries = [float(x) for x in row.flatten()]
            expected += [math.sqrt(sum(x * x for x in entries))] * len(entries)
    found = perturbation_scale(risk, "filterwise")
    assert found.dtype == dtype
    rtol = 8 * torch.finfo(dtype).eps
    np.testing.assert_allclose(found.numpy(), expected, rtol=rtol)
    assert torch.equal(perturbation_scale(risk, "elementwise"), risk.theta.abs())
    assert torch.equal(perturbation_scale(risk, None), torch.ones(risk.n, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_adaptive_values_do_not_change_when_layers_trade_a_factor(dtype, adaptive):
    """Factors that are powers of two change no bit of what is invariant."""
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    scaled = deepcopy(plain)
    with torch.no_grad():
        scaled[0].weight.mul_(4)
        scaled[0].bias.mul_(4)
        scaled[2].weight.div_(4)
    risks = [classifier_risk(model) for model in (plain, scaled)]
    options = {"adaptive": adaptive}
    for measure, more in (
        (sh.worst_case_sharpness, {"norm": "l2", "num_steps": 6}),
        (sh.worst_case_sharpness, {"norm": "linf", "num_steps": 2, "shard_size": 20}),
        (sh.average_case_sharpness, {"num_draws": 3}),
    ):
        first, second = (without_time(measure(r, 0.02, **options, **more)) for r in risks)
        assert (first == second) == (adaptive is not None)
        assert first.risk_value == second.risk_value


# -- shards ------------------------------------------------------------------------


def linear_slopes(num_samples: int) -> tuple[sh.EmpiricalRisk, np.ndarray]:
    """A loss that is linear in theta, and the gradient of each sample."""
    rng = np.random.default_rng(num_samples)
    x, y = rng.normal(size=(num_samples, 5)), rng.normal(size=(num_samples, 1))
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    data = torch.from_numpy(x), torch.from_numpy(y)
    return sh.EmpiricalRisk(model, lambda z, y: 3 + (z * y).mean(), data, terms=len), x * y


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shard_size", "num"),
    [(10, 4), (1, 41), (None, 1), (41, 1), (1000, 1), (40, 1), (29, 1), (28, 2), (13, 3)],
)
def test_shards_of_a_linear_loss_rise_by_the_norms_of_their_slopes(norm, shard_size, num):
    risk, slopes = linear_slopes(41)
    options = {"norm": norm, "shard_size": shard_size, "num_steps": 3, "seed": 8}
    found = sh.worst_case_sharpness(risk, 0.3, **options)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(8)).numpy()
    shards = np.array_split(order, num)
    means = np.array([slopes[shard].mean(0) for shard in shards])
    rises = 0.3 * np.linalg.norm(means, 2 if norm == "l2" else 1, axis=1)
    sizes = [len(shard) for shard in shards]
    assert found.value == pytest.approx(np.average(rises, weights=sizes), rel=1e-9)
    assert found.sam_value == pytest.approx(found.value, rel=1e-9)
    assert found.risk_value == pytest.approx(risk.value(), rel=1e-12)
    largest = None if shard_size is None else max(sizes)
    assert (found.num_shards, found.shard_size) == (len(shards), largest)
    assert (found.num_evals, found.status) == (4 * len(shards), "completed")
    assert (found.displacement is None) == (len(shards) > 1)
    error = stats.sem(rises) if len(shards) > 1 else None
    assert found.standard_error == (error and pytest.approx(error, rel=1e-6))


@pytest.mark.parametrize("num_samples", range(2, 60))
def test_shards_are_never_far_from_the_size_asked_for(num_samples):
    for size in range(1, num_samples + 1):
        ratio = num_samples / perturbation._num_shards(num_samples, size) / size
        assert 0.5**0.5 <= ratio <= 2**0.5


def test_shards_of_a_network_rise_as_in_a_plain_loop():
    (x, y), theta = mlp_data(24), mlp_risk(20).theta
    risk = sh.EmpiricalRisk(mlp_risk(20).model, nn.CrossEntropyLoss(), (x, y))
    options = {"adaptive": "elementwise", "shard_size": 6, "num_steps": 10, "seed": 1}
    found = sh.worst_case_sharpness(risk, 0.2, **options)
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


@pytest.mark.parametrize("shard_size", [6, 1])
def test_shards_weigh_as_much_as_their_loss_terms(shard_size):
    """With class weights, and a sample that the loss ignores altogether."""
    x, y = mlp_data(12)
    y = torch.where(torch.arange(12) == 5, -100, y)
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    risk = sh.EmpiricalRisk(mlp_risk(20).model, nn.CrossEntropyLoss(weight), (x, y))
    found = sh.worst_case_sharpness(risk, 0.1, shard_size=shard_size, num_steps=1)
    assert found.risk_value == pytest.approx(risk.value(), rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_shard_that_is_nan_is_not_hidden_by_one_without_a_gradient(seed):
    x = torch.zeros(4, 2, dtype=torch.float64)
    x[1] = 9.0
    model = Pole(nn.Linear(2, 1, bias=False, dtype=torch.float64))
    risk = sh.EmpiricalRisk(model, nn.MSELoss(), (x, torch.zeros(4, 1).double()))
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
    risk = mlp_risk(20).unchecked()
    gradients = evaluations("value_and_gradient")
    found = sh.worst_case_sharpness(risk, [0.05, 0.1], shard_size=10, num_steps=7)
    assert [f.num_evals for f in found] == [32, 32]
    assert len(gradients) == 64
    values = evaluations("value")
    found = sh.average_case_sharpness(risk, [0.05, 0.1, 0.2], num_draws=4)
    assert [f.num_evals for f in found] == [8, 8, 8]
    assert len(values) == 24 + 1  # f(theta) serves every radius


@pytest.mark.parametrize(
    ("call", "shard_size"), [(1, None), (2, None), (5, None), (1, 10), (7, 10), (10, 10)]
)
def test_an_interrupt_gives_the_best_points_so_far(call, shard_size, evaluations):
    risk = mlp_risk(20).unchecked()
    values = evaluations("value_and_gradient", interrupt=call)
    found = sh.worst_case_sharpness(risk, 0.5, shard_size=shard_size, num_steps=5)
    assert found.status == "interrupted"
    assert found.num_evals == len(values) - 1 == call - 1
    whole = [values[i : i + 6] for i in range(0, call - 6, 6)]  # the finished shards
    begun = whole or ([values[: call - 1]] if call > 1 else [])
    expected = np.mean([max(v) - v[0] for v in begun]) if begun else math.nan
    assert found.value == pytest.approx(expected, rel=1e-12, nan_ok=True)
    if shard_size is None:
        rise = risk.value(risk.theta + found.displacement) - risk.value()
        assert (found.value if begun else 0.0) == pytest.approx(rise, rel=1e-9)
    assert "\n" not in str(found)
    json.loads(to_line({"found": found}))


@pytest.mark.parametrize("call", [3, 5, 6, 40])
def test_an_interrupt_gives_the_average_of_the_pairs_done(call, evaluations):
    values = evaluations("value", interrupt=call)
    found = sh.average_case_sharpness(mlp_risk(20), 0.5)
    pairs = (call - 2) // 2
    assert (found.status, found.num_draws) == ("interrupted", pairs)
    rises = np.array(values[1 : 1 + 2 * pairs]).reshape(-1, 2).mean(1) - values[0]
    expected = rises.mean() if pairs else math.nan
    error = stats.sem(rises) if pairs > 1 else math.nan
    assert found.value == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert found.standard_error == pytest.approx(error, rel=1e-7, nan_ok=True)


@pytest.mark.parametrize(
    ("most", "evals", "draws"), [(-1, 0, 0), (0.5, 1, 0), (3.5, 4, 2), (100, 21, 20)]
)
def test_time_stops_after_the_evaluation_that_passes_it(
    most, evals, draws, evaluations, monkeypatch
):
    """With a clock that ticks once an evaluation."""
    for measure, method, expected in (
        (sh.worst_case_sharpness, "value_and_gradient", evals),
        (sh.average_case_sharpness, "value", 2 * draws),
    ):
        calls = evaluations(method)
        clock = SimpleNamespace(monotonic=lambda calls=calls: float(len(calls)))
        monkeypatch.setattr(_run, "time", clock)
        found = measure(mlp_risk(20).unchecked(), 0.1, max_seconds=most)
        assert found.num_evals == expected
        assert found.status == ("completed" if most == 100 else "max_seconds")
        assert math.isnan(found.value) == (not expected)


@pytest.mark.parametrize("where", ["model", "theta"])
def test_a_risk_that_is_nan_says_so(where):
    model, (x, y) = mlp_risk(20).model, mlp_data()
    if where == "theta":
        model.last.bias.data[:1].fill_(math.nan)
    else:
        x[3, 0], model = 9.0, Pole(model)
    risk = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y))
    for measure in (sh.worst_case_sharpness, sh.average_case_sharpness):
        found = measure(risk, 0.1)
        assert found.status == "non_finite"
        assert math.isnan(found.value)
        assert "non_finite" in str(found)
        assert all("non_finite" in r.evidence for r in found.readings())


def test_a_dead_region_does_not_end_the_search_as_completed():
    def ramp(model: nn.Module, _: Tensor) -> Tensor:
        return (model.theta * (model.theta < 0.5)).sum()

    risk = sh.EmpiricalRisk(Point(torch.zeros(1)), closure=ramp, data=ONE_SAMPLE)
    found = sh.worst_case_sharpness(risk, 1.0)
    assert found.status == "completed"
    assert 0.2 < found.value < 0.5


@pytest.mark.parametrize("call", [None, 3])
def test_risk_model_and_generators_are_as_they_were_r22(call, evaluations):
    risk = mlp_risk(20)
    model = risk.model.train()
    state = [p.detach().clone() for p in model.parameters()]
    theta, numbers = risk.theta.clone(), (risk.value(), risk.gradient())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    for method in ("value", "value_and_gradient") if call else ():
        evaluations(method, interrupt=call)
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


@pytest.mark.parametrize(
    ("measure", "more"),
    [
        (sh.worst_case_sharpness, {"shard_size": 15, "num_steps": 4}),
        (sh.average_case_sharpness, {"num_draws": 4}),
    ],
)
def test_lists_give_what_each_radius_gives_and_seeds_the_same_bits(measure, more):
    risk, radii = mlp_risk(20), [0.2, 0.05, 1]
    found = measure(risk, radii, seed=3, **more)
    alone = [measure(risk, rho, seed=3, **more) for rho in radii]
    assert [without_time(f) for f in found] == [without_time(a) for a in alone]
    assert [f.settings["rho"] for f in found] == radii
    assert isinstance(measure(risk, (0.2,), seed=3, **more), list)
    assert measure(risk, 0.2, seed=4, **more).value != alone[0].value


@pytest.mark.parametrize("rho", [0, -1.0, math.nan, math.inf, None, "0.05", [0.05, -2.0]])
@pytest.mark.parametrize("measure", [sh.worst_case_sharpness, sh.average_case_sharpness])
def test_a_radius_that_is_not_positive_is_refused(measure, rho):
    with pytest.raises(ValueError, match=r"\A`rho` must be positive; got [^\n]+\Z"):
        measure(mlp_risk(20), rho)


@pytest.mark.parametrize("rho", [np.float64(0.1), np.float32(0.125), np.int64(1)])
def test_a_number_of_numpy_is_a_number(rho):
    found = sh.worst_case_sharpness(mlp_risk(20), rho, num_steps=1)
    assert found.settings["rho"] == float(rho)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l1"}, "`norm` must be 'l2' or 'linf'; got 'l1'"),
        ({"adaptive": "layer"}, "`adaptive` must be None, .*; got 'layer'"),
        ({"num_steps": 0}, "`num_steps` must be at least 1; got 0"),
        ({"num_steps": 2.5}, "`num_steps` must .*; got 2.5"),
        ({"shard_size": 0}, "`shard_size` must be at least 1; got 0"),
        ({"shard_size": 2.5}, "`shard_size` must .*; got 2.5"),
        ({"num_draws": 1}, "`num_draws` must be at least 2; got 1"),
        ({"num_draws": 2.5}, "`num_draws` must .*; got 2.5"),
    ],
)
def test_an_argument_outside_its_range_is_refused(options, message):
    average = "num_draws" in options
    measure = sh.average_case_sharpness if average else sh.worst_case_sharpness
    with pytest.raises((ValueError, TypeError), match=message):
        measure(mlp_risk(20), 0.1, **options)


@pytest.mark.parametrize("num_samples", [1, 10])
def test_shards_of_a_closure_are_refused(num_samples):
    data = ONE_SAMPLE * num_samples
    risk = sh.EmpiricalRisk(
        Point(torch.ones(3)), closure=lambda m, _: m.theta[0], data=data
    )
    with pytest.raises(TypeError, match="a `closure`"):
        sh.worst_case_sharpness(risk, 0.1, shard_size=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (2, 3, 5, 2)])
def test_normalised_logits_have_mean_0_and_length_1(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    logits = 7 + 5 * torch.randn(shape, generator=generator, dtype=dtype)
    found = NormalisedLogits(nn.Identity())(logits)
    z = logits.double().numpy()
    centred = z - z.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).sum(axis=1, keepdims=True))
    eps = torch.finfo(dtype).eps
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), expected, atol=64 * eps)
    tiny = torch.tensor([[1.0, -1.0, 0.0]], dtype=dtype) * 1e-12
    found = NormalisedLogits(nn.Identity())(tiny)
    torch.testing.assert_close(found, tiny / 1e-10)  # the lower limit


@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("constant", [0.0, 0.5, 0.1])
def test_constant_logits_become_zero(classes, constant):
    logits = torch.full((2, classes), constant)
    assert not NormalisedLogits(nn.Identity())(logits).any()


def test_a_model_with_constant_logits_has_finite_derivatives():
    model = nn.Linear(3, 3, dtype=torch.float64)
    for p in model.parameters():
        nn.init.zeros_(p)
    risk = classifier_risk(NormalisedLogits(model))
    assert risk.value() == pytest.approx(math.log(3), rel=1e-12)
    assert risk.gradient().isfinite().all()
    assert risk.hvp(torch.ones(12, dtype=torch.float64)).isfinite().all()


def test_names_and_readings_say_what_was_measured():
    risk = mlp_risk(20)
    worst = sh.worst_case_sharpness(risk, 1e-3, norm="linf", adaptive="elementwise")
    shards = sh.worst_case_sharpness(risk, 0.05, shard_size=20, num_steps=2)
    average = sh.average_case_sharpness(risk, 0.05, num_draws=6)
    read = [(r.name, r.value, r.error, r.bound) for r in worst.readings()]
    assert read[0] == ("worst_linf_elementwise(1e-3)", worst.value, None, "≥")
    assert read[1] == ("sam_linf_elementwise(1e-3)", worst.sam_value, None, "≥")
    (mean,) = average.readings()
    low, high = average.interval
    assert low < average.value < high
    assert (mean.value, mean.error) == (average.value, (high - low) / 2)
    assert f"95 %: {low:.4g} to {high:.4g}" in str(average)
    assert "unknown" in str(sh.average_case_sharpness(risk, 0.05, num_draws=2))
    assert (mean.name, mean.bound) == ("average(0.05)", "")
    assert shards.readings()[0].error == shards.standard_error > 0
    for found in (worst, average, shards):
        assert found.name in str(found)
        assert "\n" not in str(found) + repr(found)
        assert json.loads(to_line({"found": found}))["found"]["value"] == found.value
