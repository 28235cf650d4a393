"""Radii that accuracy survives, norms, relative flatness: closed forms and brute force."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import (
    ONE_SAMPLE,
    Point,
    filled,
    generator,
    linear_regression,
    normal,
    softmax_regression,
    tiny_mlp,
)
from scipy import stats
from scipy.linalg import hadamard
from scipy.optimize import brentq
from torch import Tensor, nn

import sharpness as sh
from sharpness import _run, _tensors
from sharpness._json import to_line
from sharpness.measures import flatness

CE = nn.CrossEntropyLoss()
RADII = pytest.mark.parametrize("measure", [flatness.pac_bayes_sigma, flatness.box_alpha])


def one_feature_each(margins: Tensor, lower: float = 0.0) -> sh.EmpiricalRisk:
    """Sample j sees column j of the weight alone, and is right while W_1j > W_0j."""
    num, dtype = len(margins), margins.dtype
    model = nn.Linear(num, 2, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight[0] = lower
        model.weight[1] = lower + margins
    data = torch.eye(num, dtype=dtype), torch.ones(num, dtype=torch.long)
    return sh.EmpiricalRisk(model, CE, data)


def alike(margin: float, num: int = 400) -> sh.EmpiricalRisk:
    return one_feature_each(torch.full((num,), margin, dtype=torch.float64))


def calls_of(risk: sh.EmpiricalRisk, name: str, fail_at: int | None = None) -> list[tuple]:
    """Arguments of every call of a method, which is interrupted in one of them."""
    calls, method = [], getattr(risk, name)

    def counting(*args):
        calls.append(args)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return method(*args)

    setattr(risk, name, counting)
    return calls


# -- the noise that accuracy survives ----------------------------------------------


@pytest.mark.parametrize("drop", [0.1, 0.3])
@pytest.mark.parametrize("margin", [0.03, 1.0, 50.0])
def test_sigma_is_the_standard_deviation_of_the_normal_distribution(margin, drop):
    found = flatness.pac_bayes_sigma(alike(margin), accuracy_drop=drop)
    sigma = margin / (math.sqrt(2) * stats.norm.isf(drop))
    assert (found.status, found.accuracy) == ("converged", 1.0)
    low, high = found.interval
    assert low < found.value < high < 1.3 * low
    assert low * 0.95 < sigma < high * 1.05
    assert found.readings()[0].error == pytest.approx((high - low) / 2)
    low, high = found.bracket
    assert low < found.value < high <= low * 1.02
    assert found.flatness_measure == pytest.approx(found.value**-2)


@pytest.mark.parametrize("magnitude_aware", [False, True])
@pytest.mark.parametrize(("lower", "dtype"), [(-0.4, torch.float32), (0, torch.float64)])
@pytest.mark.parametrize("size", [2e-3, 1.0])
def test_noise_is_scaled_by_each_weight_with_a_floor(size, lower, magnitude_aware, dtype):
    """The mean of Phi(-margin / (sigma sqrt(s_0^2 + s_1^2))) is the drop."""
    margins = size * torch.linspace(0.5, 2, 400, dtype=dtype)
    risk = one_feature_each(margins, size * lower)
    found = flatness.pac_bayes_sigma(risk, magnitude_aware=magnitude_aware, tol=5e-3)
    theta = risk.theta.double().numpy().reshape(2, -1)
    spread = np.sqrt((theta**2 + 1e-6 if magnitude_aware else np.ones_like(theta)).sum(0))

    def excess(log_sigma: float) -> float:
        lost = stats.norm.cdf((theta[0] - theta[1]) / (math.exp(log_sigma) * spread))
        return float(lost.mean()) - 0.1

    sigma = math.exp(brentq(excess, -20, 20, xtol=1e-12))
    low, high = found.interval
    assert low * 0.95 < sigma < high * 1.05
    assert low < found.value < high < 1.3 * low
    assert found.name == f"pac_bayes_sigma{'_magnitude' if magnitude_aware else ''}"


@pytest.mark.parametrize("power", [-12, -6, 3, 12])
def test_sigma_scales_with_the_weights(power):
    plain, scaled = (
        flatness.pac_bayes_sigma(alike(margin, 50), num_draws=6)
        for margin in (1.1, 1.1 * 4.0**power)
    )
    assert scaled.status == "converged"
    assert scaled.value == plain.value * 4.0**power
    moved = tuple(end * 4.0**power for end in plain.interval)
    assert scaled.interval == pytest.approx(moved, rel=0.1)  # other sigmas are looked at
    assert 0 < scaled.interval[0] < scaled.interval[1] < math.inf


def linear_classifier(num_features: int) -> tuple[sh.EmpiricalRisk, float]:
    """One output whose sign is the class, and the sigma at which 10 % are lost."""
    x = normal(generator(3), 400, num_features)
    theta = torch.ones(num_features, dtype=torch.float64)

    class Signed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(theta.clone())

        def forward(self, inputs: Tensor) -> Tensor:
            margin = inputs @ self.theta
            return torch.stack([-margin, margin], 1)

    distance = ((x @ theta).abs() / x.norm(dim=1)).numpy()

    def excess(log_sigma: float) -> float:
        return stats.norm.cdf(-distance / math.exp(log_sigma)).mean() - 0.1

    risk = sh.EmpiricalRisk(Signed(), CE, (x, (x @ theta > 0).long()))
    return risk, math.exp(brentq(excess, -20, 20))


@pytest.mark.slow
@pytest.mark.parametrize("num_features", [2, 3, 40])
def test_the_interval_of_sigma_covers_as_often_as_it_says(num_features):
    risk, sigma = linear_classifier(num_features)
    found = [flatness.pac_bayes_sigma(risk, seed=seed) for seed in range(60)]
    assert all(f.status == "converged" for f in found)
    hits = sum(f.interval[0] <= sigma <= f.interval[1] for f in found)
    assert hits >= stats.binom.ppf(1e-3, 60, 0.95)
    again = flatness.pac_bayes_sigma(risk, seed=7)
    assert dataclasses.replace(again, cost=found[7].cost) == found[7] != found[8]


def one_margin() -> sh.EmpiricalRisk:
    """A single weight that all samples hang on: noise costs nothing or everything."""
    model = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]]))
    model.weight.requires_grad_(True)
    x = torch.ones(5, 1, dtype=torch.float64)
    return sh.EmpiricalRisk(model, CE, (x, torch.ones(5, dtype=torch.int64)))


@pytest.mark.parametrize("seed", range(5))
def test_where_few_draws_bear_the_drop_the_interval_has_no_lower_end(seed):
    found = flatness.pac_bayes_sigma(one_margin(), seed=seed)
    assert found.status == "converged"
    assert found.interval[0] == 0
    assert found.interval[1] > found.value
    assert found.readings()[0].error is None
    assert "95 %: 0 to" in str(found)


def test_two_draws_have_no_interval():
    found = flatness.pac_bayes_sigma(alike(1.0, 50), num_draws=2)
    assert found.interval == (0, math.inf)
    json.loads(to_line({"found": found}))


# -- the box that accuracy survives -------------------------------------------------


def shuffled_margins(num: int = 30) -> Tensor:
    return 0.1 + 0.07 * torch.randperm(num, generator=generator(5)).double()


@pytest.mark.parametrize(
    ("size", "lower", "magnitude_aware"),
    [(1, 0.3, False), (1, 0, True), (1, -0.5, True), (1e-3, 2e-3, True)],
)
@pytest.mark.parametrize("num_steps", [1, 20])
@pytest.mark.parametrize(("drop", "flips"), [(0.01, 1), (0.08, 3), (0.95, 29)])
def test_alpha_is_where_enough_small_margins_are_used_up(
    drop, flips, num_steps, size, lower, magnitude_aware
):
    """W_0j rises and W_1j falls by alpha in units of s: margins below both are lost."""
    risk = one_feature_each(size * shuffled_margins(), lower)
    calls = calls_of(risk, "value_gradient_and_accuracy")
    found = flatness.box_alpha(
        risk, accuracy_drop=drop, num_steps=num_steps, magnitude_aware=magnitude_aware
    )
    theta = risk.theta.numpy().reshape(2, -1)
    scale = np.sqrt(theta**2 + 1e-6) if magnitude_aware else np.ones_like(theta)
    alpha = np.sort((theta[1] - theta[0]) / scale.sum(0))[flips - 1]
    low, high = found.bracket
    assert low * (1 - 1e-9) <= alpha <= high * (1 + 1e-9)
    assert high <= low * 1.1
    assert (found.value, found.status) == (high, "converged")
    assert (found.num_evals, found.interval) == (1 + len(calls), None)
    assert found.readings()[0].bound == "≤"


@pytest.mark.parametrize(("num", "drop"), [(10, 0.1), (20, 0.1), (10, 0.3), (50, 0.1)])
def test_a_drop_of_exactly_what_was_asked_for_is_enough(num, drop):
    margins = shuffled_margins(num)
    found = flatness.box_alpha(one_feature_each(margins), accuracy_drop=drop, num_steps=1)
    alpha = float(margins.sort().values[round(num * drop) - 1]) / 2
    assert alpha <= found.value * (1 + 1e-12) <= alpha * 1.11


# -- accuracy that cannot fall ------------------------------------------------------


class Twice(nn.Module):
    """One output, given as two columns: the first is always the largest."""

    def forward(self, x):
        return x.repeat(1, 2)


def single_class() -> sh.EmpiricalRisk:
    data = normal(generator(0), 12, 3), torch.zeros(12, dtype=torch.long)
    return sh.EmpiricalRisk(nn.Sequential(nn.Linear(3, 1).double(), Twice()), CE, data)


def at_chance() -> sh.EmpiricalRisk:
    """Each sample with either label: half are right whatever the weights."""
    x = normal(generator(0), 12, 3)
    data = torch.cat([x, x]), torch.arange(2).repeat_interleave(12)
    return sh.EmpiricalRisk(filled(nn.Linear(3, 2).double(), generator(1)), CE, data)


@pytest.mark.parametrize(
    "measure", [flatness.pac_bayes_sigma, partial(flatness.box_alpha, num_steps=2)]
)
@pytest.mark.parametrize("magnitude_aware", [False, True])
@pytest.mark.parametrize(("build", "accuracy"), [(single_class, 1), (at_chance, 0.5)])
def test_accuracy_that_cannot_fall_is_not_reached(
    build, accuracy, measure, magnitude_aware
):
    found = measure(build(), magnitude_aware=magnitude_aware)
    assert (found.status, found.accuracy) == ("not_reached", accuracy)
    assert math.isnan(found.value)
    assert found.interval in (None, (0, math.inf))
    assert found.bracket[1] == math.inf
    assert "not_reached" in str(found)
    with pytest.raises(sh.NotConvergedError, match="above chance"):
        found.raise_for_status()


@pytest.mark.slow
@RADII
def test_a_tolerance_below_rounding_comes_to_an_end(measure):
    found = measure(one_feature_each(torch.ones(3).double()), tol=1e-17, max_seconds=30)
    assert found.status == "converged"


# -- how a search can end -----------------------------------------------------------

PATH = {  # sigmas done: the bracket, from 2^-5 by fours and then by halves
    0: (0.0, math.inf),
    1: (2**-5, math.inf),
    2: (2**-3, math.inf),
    3: (0.5, math.inf),
    4: (0.5, 2.0),
    5: (0.5, 1.0),
}


@pytest.mark.parametrize("how", ["interrupted", "max_seconds"])
@pytest.mark.parametrize("done", PATH)
def test_what_ends_a_search_leaves_the_bracket_reached_so_far(done, how, monkeypatch):
    """And every sigma is tried with the same draws."""
    risk, passes = alike(1.1), 5 * done + 3
    calls = calls_of(risk, "accuracy", passes if how == "interrupted" else None)
    clock = SimpleNamespace(monotonic=lambda: float(len(calls)))
    monkeypatch.setattr(_run, "time", clock)
    limit = passes - 0.5 if how == "max_seconds" else None
    found = flatness.pac_bayes_sigma(risk, num_draws=5, max_seconds=limit)
    whole = passes - (how == "interrupted")  # the last one was not completed
    assert (found.status, found.num_evals, found.seconds) == (how, whole, passes)
    assert found.bracket == PATH[done]
    tried = [args[0] - risk.theta for args in calls]
    assert torch.allclose(tried[-1], tried[2] * float(tried[-1].norm() / tried[2].norm()))
    middle = math.sqrt(math.prod(PATH[done])) if done > 3 else math.nan
    assert found.value == pytest.approx(middle, nan_ok=True)
    assert how in str(found)


@pytest.mark.parametrize("call", [1, 2, 30, 60])
def test_an_interrupted_box_keeps_its_bracket(call):
    risk = one_feature_each(shuffled_margins())
    calls = calls_of(risk, "value_gradient_and_accuracy", fail_at=call)
    found = flatness.box_alpha(risk, accuracy_drop=0.25)
    assert (found.status, found.num_evals, len(calls)) == ("interrupted", call, call)
    alpha = float(shuffled_margins().sort().values[7]) / 2
    assert found.bracket[0] <= alpha <= found.bracket[1]
    assert (found.bracket[0] > 0) == (call > 20)  # a safe box takes 20 gradients more
    assert "interrupted" in str(found)


# -- refusals -----------------------------------------------------------------------


@RADII
@pytest.mark.parametrize(
    ("name", "wrong"), [("accuracy_drop", 1), ("accuracy_drop", 10), ("tol", -0.1)]
)
@pytest.mark.parametrize("value", [None, 0, math.nan])
def test_a_number_outside_its_range_is_refused(measure, name, wrong, value):
    wrong = wrong if value is None else value
    with pytest.raises(ValueError, match=f"`{name}` must .*got {wrong}") as error:
        measure(alike(1.0, 5), **{name: wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("measure", "options", "said"),
    [
        (
            flatness.pac_bayes_sigma,
            {"num_draws": 1},
            "`num_draws` must be at least 2; got 1",
        ),
        (flatness.box_alpha, {"num_steps": 0}, "`num_steps` must be at least 1; got 0"),
        (
            flatness.relative_flatness,
            {"num_probes": 1},
            "`num_probes` must be at least 2; got 1",
        ),
        (flatness.relative_flatness, {"layers": ["w"]}, "`layers` must .*got 'w'.*weight"),
        (flatness.relative_flatness, {"layers": []}, "`layers` must"),
        (sh.norms, {"start": torch.ones(3)}, r"`start` must .*n=10; got \(3,\)"),
        (sh.norms, {"start": torch.ones(10, 1)}, r"`start` must .*got \(10, 1\)"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(measure, options, said):
    with pytest.raises(ValueError, match=said):
        measure(alike(1.0, 5), **options)


def closed() -> sh.EmpiricalRisk:
    model = Point(torch.ones(3))
    return sh.EmpiricalRisk(
        model, closure=lambda m, _: m.theta.square().sum(), data=ONE_SAMPLE
    )


def one_hot() -> sh.EmpiricalRisk:
    """Three targets of three elements, which could be compared with three classes."""
    data = normal(generator(0), 3, 3), torch.eye(3).double()
    return sh.EmpiricalRisk(nn.Linear(3, 3).double(), nn.MSELoss(), data)


@pytest.mark.parametrize("build", [one_hot, closed, lambda: linear_regression().risk()])
def test_a_risk_without_classes_has_neither_radius_nor_accuracy(build):
    risk = build()
    assert not risk.is_classification
    for measure in (flatness.pac_bayes_sigma, flatness.box_alpha):
        with pytest.raises(TypeError, match="`risk` must classify"):
            measure(risk)
    with pytest.raises(TypeError):
        risk.accuracy()


# -- norms --------------------------------------------------------------------------


def fisher_rao_by_sums(model: nn.Module, x: Tensor) -> float:
    """The mean over samples of sum_c p_c (theta . d log p_c / d theta)^2."""
    params, total = list(model.parameters()), 0.0
    for sample in x:
        for log_p in torch.log_softmax(model(sample[None]), 1)[0]:
            slopes = torch.autograd.grad(log_p, params, retain_graph=True)
            along = sum(
                float((s * p.detach()).sum()) for s, p in zip(slopes, params, strict=True)
            )
            total += math.exp(log_p.item()) * along**2
    return total / len(x)


@pytest.mark.parametrize("build", [softmax_regression, tiny_mlp])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_the_fisher_rao_norm_is_a_sum_over_samples_and_classes(build, ignored):
    problem = build()
    x, y = problem.data
    risk = sh.EmpiricalRisk(
        problem.model, nn.CrossEntropyLoss(ignore_index=ignored), (x, y), chunk_size=5
    )
    expected = fisher_rao_by_sums(problem.model, x[y != ignored])
    assert sh.norms(risk).fisher_rao == pytest.approx(expected, rel=1e-10)


def test_for_squared_errors_it_is_the_gauss_newton_matrix_that_is_taken():
    problem = linear_regression()
    expected = float(problem.theta @ problem.hessian @ problem.theta)
    assert sh.norms(problem.risk()).fisher_rao == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_parameters_and_way_are_plain_lengths(dtype):
    problem = tiny_mlp(dtype=dtype)
    risk = problem.risk()
    calls = [calls_of(risk, name) for name in ("gradient", "product")]
    found = sh.norms(risk, start=torch.ones(risk.n))
    calls_made = [len(each) for each in calls]
    theta, rel = problem.theta.double(), 1e3 * torch.finfo(dtype).eps
    model, (x, y) = problem.model.double(), problem.data
    F.cross_entropy(model(x.double()), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert found.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=rel)
    assert found.parameter_norm == pytest.approx(np.linalg.norm(theta), rel=1e-12)
    assert found.distance_from_start == pytest.approx(np.linalg.norm(theta - 1), rel=rel)
    assert calls_made == [1, 1]
    names = ["gradient_norm", "parameter_norm", "distance_from_start", "fisher_rao"]
    assert [r.name for r in found.readings()] == names
    assert [r.value for r in found.readings()] == [getattr(found, name) for name in names]
    assert found.status == "completed"


def test_a_closure_has_no_fisher_rao_norm_and_no_start_no_way():
    found = sh.norms(closed())
    assert (found.fisher_rao, found.distance_from_start) == (None, None)
    assert found.gradient_norm == pytest.approx(2 * math.sqrt(3), rel=1e-6)
    assert [r.name for r in found.readings()] == ["gradient_norm", "parameter_norm"]


def relu_network(*, bias: bool) -> nn.Sequential:
    layers = nn.Linear(3, 6, bias), nn.ReLU(), nn.Linear(6, 5, bias), nn.ReLU()
    return filled(nn.Sequential(*layers, nn.Linear(5, 4, bias)).double(), generator(3))


def test_the_fisher_rao_norm_survives_a_rescaling_of_layers():
    plain, scaled = (relu_network(bias=False) for _ in range(2))
    with torch.no_grad():
        scaled[0].weight *= 10
        scaled[4].weight /= 10
    a, b = (sh.norms(sh.EmpiricalRisk(m, CE, tiny_mlp().data)) for m in (plain, scaled))
    assert b.fisher_rao == pytest.approx(a.fisher_rao, rel=1e-10)
    assert b.gradient_norm != pytest.approx(a.gradient_norm, rel=0.1)


@pytest.mark.parametrize("name", ["gradient", "product"])
def test_interrupted_norms_say_so(name):
    risk = tiny_mlp().risk()
    calls_of(risk, name, fail_at=1)
    assert sh.norms(risk).status == "interrupted"


# -- relative flatness --------------------------------------------------------------


def kappa(model: nn.Module, data: tuple[Tensor, Tensor], name: str) -> float:
    """sum_{s,s'} <w_s, w_s'> tr(H_ss') from the dense Hessian of one weight."""
    state = {k: p.detach() for k, p in model.named_parameters()}
    weight = state[name]

    def f(w: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {**state, name: w}, (data[0],))
        return F.cross_entropy(out, data[1])

    num, w = len(weight), weight.flatten(1)
    h = torch.autograd.functional.hessian(f, weight).reshape(num, -1, num, w.shape[1])
    pairs = ((s, t) for s in range(num) for t in range(num))
    return float(sum(w[s] @ w[t] * h[s, :, t].trace() for s, t in pairs))


def test_the_last_layer_of_a_softmax_network_has_a_closed_form():
    """H_ss' = mean (p_s delta_ss' - p_s p_s') h h^T with the features h."""
    problem = tiny_mlp()
    with torch.no_grad():
        h = problem.model[:2](problem.data[0])
        p = torch.softmax(problem.model[2](h), 1)
    w = problem.model[2].weight.detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    sizes = h.square().sum(1)[:, None, None]
    expected = float((w @ w.T * (inner * sizes).mean(0)).sum())
    found = flatness.relative_flatness(problem.risk(), num_probes=400)
    assert abs(found["2.weight"] - expected) <= 4 * found.standard_errors[-1]
    assert found.standard_errors[-1] < 0.05 * expected
    reading = found.readings()[0]
    assert (reading.value, reading.error) == (found.values[1], found.standard_errors[1])
    assert "2.weight" in reading.evidence


def convolution() -> nn.Sequential:
    layers = nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)
    return filled(nn.Sequential(*layers).double(), generator(4))


def three_layers() -> nn.Sequential:
    layers = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    return filled(nn.Sequential(*layers).double(), generator(4))


@pytest.mark.parametrize(
    ("model", "shape"), [(convolution(), (2, 3, 3)), (three_layers(), (4,))]
)
def test_each_layer_has_that_of_its_dense_hessian(model, shape, monkeypatch):
    """The rows of a Hadamard matrix are signs whose mean z^T A z is tr(A) exactly."""
    data = normal(generator(5), 10, *shape), torch.arange(10) % 2
    drawn: list[int] = []

    def signs(like: Tensor, _: torch.Generator) -> Tensor:
        drawn.append(0)
        row = hadamard(like.numel())[(len(drawn) - 1) // num_layers % like.numel()]
        return torch.from_numpy(row).to(like).view_as(like)

    monkeypatch.setattr(_tensors, "random_signs", signs)
    risk = sh.EmpiricalRisk(model, CE, data)
    num_layers = sum(len(each) > 1 for each in risk.shapes)
    found = flatness.relative_flatness(risk, num_probes=64)
    assert found.layers == tuple(n for n in risk.names if n.endswith("weight"))
    expected = [kappa(model, data, name) for name in found.layers]
    assert found.values == pytest.approx(expected, rel=1e-9)
    assert (found.num_probes, found.num_hvps) == (64, 64 * num_layers)


@pytest.mark.parametrize("num_features", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_diagonal_hessian_leaves_no_doubt(num_features, dtype):
    """Least squares on one feature a sample: |w|^2 tr(2/N X^T X), whatever the signs."""
    x = torch.arange(1, num_features + 1, dtype=dtype).diag()
    model = filled(nn.Linear(num_features, 1, bias=False, dtype=dtype), generator(6))
    risk = sh.EmpiricalRisk(model, nn.MSELoss(), (x, 0 * x[:, :1]))
    found = flatness.relative_flatness(risk, num_probes=2)
    w, rel = model.weight.detach().double(), 100 * torch.finfo(dtype).eps
    expected = float(w.square().sum() * 2 * x.double().square().sum() / num_features)
    assert found.values == pytest.approx((expected,), rel=rel)
    assert found.standard_errors[0] <= rel * expected


def test_the_standard_error_is_that_of_the_mean_over_probes():
    problem = tiny_mlp()
    estimate = partial(flatness.relative_flatness, problem.risk(), layers=["2.weight"])
    expected = kappa(problem.model, problem.data, "2.weight")
    found = [estimate(seed=seed) for seed in range(40)]
    z = np.array([(f.values[0] - expected) / f.standard_errors[0] for f in found])
    low, high = stats.f.ppf([1e-3, 1 - 1e-3], 40, 29)
    assert low < np.mean(z**2) < high
    assert len({f.values for f in found}) == 40
    assert estimate(seed=7).values == found[7].values


@pytest.mark.parametrize("factor", [8.0, 1 / 64])
def test_scaling_a_layer_changes_nothing_and_scaling_a_neuron_does(factor):
    plain, whole, single = (relu_network(bias=True) for _ in range(3))
    with torch.no_grad():
        for part in (*whole[0].parameters(), single[0].weight[2], single[0].bias[2]):
            part *= factor
        whole[2].weight /= factor
        single[2].weight[:, 2] /= factor
    risks = [sh.EmpiricalRisk(m, CE, tiny_mlp().data) for m in (plain, whole, single)]
    values = [flatness.relative_flatness(risk).values for risk in risks]
    assert values[1] == pytest.approx(values[0], rel=1e-10)
    assert values[2][1] != pytest.approx(values[0][1], rel=0.05)


def test_weights_that_are_zero_or_unused_have_none():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).double()
    nn.init.zeros_(model[1].weight)
    model.spare = nn.Linear(5, 5).double()
    model.forward = lambda x: model[1](model[0](x))
    found = flatness.relative_flatness(sh.EmpiricalRisk(model, CE, tiny_mlp().data))
    assert found["1.weight"] == found["spare.weight"] == 0.0
    assert found.standard_errors == (0.0, 0.0, 0.0)
    assert found.status == "completed"


@pytest.mark.parametrize("done", [0, 1, 2, 5])
@pytest.mark.parametrize("how", ["interrupted", "max_seconds"])
def test_relative_flatness_is_of_the_sweeps_that_were_made(done, how, monkeypatch):
    risk, fail_at = tiny_mlp().risk(), done + 1 if how == "interrupted" else None
    calls = calls_of(risk, "block_products", fail_at)
    clock = SimpleNamespace(monotonic=lambda: float(len(calls)))
    monkeypatch.setattr(_run, "time", clock)
    found = flatness.relative_flatness(risk, max_seconds=None if fail_at else done - 0.5)
    assert (found.status, found.num_probes, found.num_hvps) == (how, done, 2 * done)
    if done > 1:
        fewer = flatness.relative_flatness(tiny_mlp().risk(), num_probes=done)
        assert found.values == fewer.values
    assert math.isnan(found.values[0]) == (done == 0)
    assert math.isnan(found.standard_errors[0]) == (done < 2)
    assert how in found.readings()[0].evidence


# -- for all of them ----------------------------------------------------------------

MEASURES = [
    sh.norms,
    partial(flatness.pac_bayes_sigma, num_draws=3),
    partial(flatness.box_alpha, num_steps=3),
    partial(flatness.relative_flatness, num_probes=3),
]


@pytest.mark.parametrize("measure", MEASURES)
def test_nan_is_a_status_and_stands_in_the_text(measure):
    problem = tiny_mlp()
    nn.init.constant_(problem.model[0].weight, math.nan)
    found = measure(problem.risk())
    assert found.status == "non_finite"
    assert "non_finite" in str(found)


@pytest.mark.parametrize("measure", MEASURES)
def test_risk_model_and_generators_are_as_they_were(measure):
    problem = tiny_mlp(batchnorm=True)
    model, risk = problem.model.train(), problem.risk()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    theta, value = risk.theta.clone(), risk.value()
    before = torch.get_rng_state(), random.getstate()
    measure(risk)
    assert torch.equal(risk.theta, theta)
    assert risk.value() == value
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("build", [single_class, at_chance, partial(alike, 1.0, 20)])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_record_is_strict_json_and_a_text_one_line(measure, build):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = measure(build())
    plain = json.loads(to_line({"found": found}), parse_constant=refuse)["found"]
    assert plain["status"] == found.status
    line, *notes = str(found).splitlines()
    assert found.readings()[0].name in line
    assert len(notes) == len(found.notes)
    assert all(isinstance(reading.value, float) for reading in found.readings())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_flatness_by_differences_is_that_of_exact_products(dtype):
    """Its error over the probes holds what the differences themselves are off by."""
    problem = tiny_mlp(dtype=dtype)
    found, exact = (
        flatness.relative_flatness(problem.risk(engine=engine), num_probes=3)
        for engine in ("differences", "kept_graph")
    )
    for layer in range(2):
        apart = abs(found.values[layer] - exact.values[layer])
        of_products = found.standard_errors[layer] ** 2 - exact.standard_errors[layer] ** 2
        assert apart**2 <= of_products + 1e-3 * exact.standard_errors[layer] ** 2
