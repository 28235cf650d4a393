import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import (
    assert_near,
    directions,
    filled,
    flat,
    generator,
    hessian_of,
    linear_regression,
    mlp_by_hand,
    normal,
    softmax_regression,
    tiny_mlp,
)
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sharpness import EmpiricalRisk, NotAvailableError, norms
from sharpness.risk import memory, plan

ROOT = Path(__file__).parents[1]
EXACT = 1e-10  # against another formula, in float64
ROUNDING = 1e-12  # the same sum in another order, in float64
PER_CASE = ["empirical_fisher", "sampled_fisher", "gradient_covariance"]
MATRICES = ["gauss_newton", *PER_CASE]
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
CE = nn.CrossEntropyLoss()


def num_tensors():
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def dense(risk, matrix="hessian"):
    return risk.product(torch.eye(risk.n, dtype=risk.dtype), matrix)


# -- definitions -------------------------------------------------------------------------

# `each` is the loss of every case, of outputs whose classes come last: (..., 4).
Family = namedtuple("Family", "kind keywords y each counts", defaults=[None])


class Last(nn.Module):
    """Outputs (N, ..., 4) with their classes moved to dimension 1."""

    def forward(self, outputs):
        return outputs.movedim(-1, 1)


def log_p(z):
    return z - z.exp().sum(-1, keepdim=True).log()


def hard(z, y):
    return -log_p(z).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def soft(z, y):
    return -(log_p(z) * y.movedim(1, -1)).sum(-1)


def smoothed(z, y):
    return 0.9 * hard(z, y) + 0.1 * -log_p(z).mean(-1)


def smoothed_and_weighted(z, y):
    both = 0.9 * WEIGHT[y] * hard(z, y) + 0.1 * -(log_p(z) * WEIGHT).mean(-1)
    return both / WEIGHT[y]


def squared(z, y):
    return ((z - y) ** 2).mean(-1)


def fourth(z, y):
    return ((z - y) ** 4).sum(-1)


def binary(z, y):
    return ((1 + z.exp()).log() - y * z).mean(-1)


def classes(*shape):
    """Classes 0..3; 2 in the first rows, so that there are chunks where it is all."""
    y = torch.randint(4, shape, generator=generator(6))
    y[:5] = 2
    return y


def reals(*shape):
    return normal(generator(6), *shape)


Y, TOKENS, REALS = classes(11), classes(11, 3), reals(11, 4)
COUNTS = WEIGHT[Y] * (Y != 2)
FAMILIES = {
    "class": Family(nn.CrossEntropyLoss, {}, Y, hard),
    "tokens": Family(nn.CrossEntropyLoss, {}, TOKENS, hard),
    "masked tokens": Family(
        nn.CrossEntropyLoss, {}, torch.where(TOKENS == 2, -100, TOKENS), hard, TOKENS != 2
    ),
    "ignored": Family(nn.CrossEntropyLoss, {"ignore_index": 2}, Y, hard, Y != 2),
    "weighted": Family(nn.CrossEntropyLoss, {"weight": WEIGHT}, Y, hard, WEIGHT[Y]),
    "weight 0": Family(
        nn.CrossEntropyLoss, {"weight": WEIGHT * (WEIGHT != 0.5)}, Y, hard, COUNTS
    ),
    "smoothed": Family(nn.CrossEntropyLoss, {"label_smoothing": 0.1}, Y, smoothed),
    "smoothed and weighted": Family(
        nn.CrossEntropyLoss,
        {"label_smoothing": 0.1, "weight": WEIGHT},
        Y,
        smoothed_and_weighted,
        WEIGHT[Y],
    ),
    "soft": Family(nn.CrossEntropyLoss, {}, REALS.softmax(1), soft),
    "soft tokens": Family(nn.CrossEntropyLoss, {}, reals(11, 4, 3).softmax(1), soft),
    "nll": Family(nn.NLLLoss, {}, Y, hard),
    "nll weighted": Family(
        F.nll_loss, {"weight": WEIGHT, "ignore_index": 2}, Y, hard, COUNTS
    ),
    "mse": Family(nn.MSELoss, {}, REALS, squared),
    "bce": Family(nn.BCEWithLogitsLoss, {}, REALS.sigmoid(), binary),
    "callable": Family(lambda o, t: fourth(o, t).mean(), None, REALS, fourth),
    "callable sum": Family(lambda o, t: fourth(o, t).sum(), None, REALS, fourth),
}
CUTS = [("mean", 1), ("mean", 4), ("sum", 4), ("none", 11)]
EVERY = [
    (name, *cut)
    for name, family in FAMILIES.items()
    for cut in CUTS
    if family.keywords is not None or cut[0] == "mean"  # a callable has its own reduction
]


def inputs(name):
    shape = (11, 3, 3) if "tokens" in name else (11, 3)
    return normal(generator(5), *shape)


def network(name):
    layers = list(tiny_mlp().model)
    if "tokens" in name:
        layers.append(Last())
    return nn.Sequential(*layers, *([nn.LogSoftmax(1)] if "nll" in name else []))


def risk_of(name, reduction="mean", repeat=1, **settings):
    kind, keywords, y, *_ = FAMILIES[name]
    loss = kind if keywords is None else partial(kind, **keywords, reduction=reduction)
    if isinstance(kind, type):
        loss = loss()
    data = tuple(part.repeat(repeat, *part[0].ndim * [1]) for part in (inputs(name), y))
    return EmpiricalRisk(network(name), loss, data, **settings)


def outputs(theta, x):
    w1, b1, w2, b2 = theta.split([15, 5, 20, 4])
    return torch.tanh(x @ w1.view(5, 3).T + b1) @ w2.view(4, 5).T + b2


@cache
def by_definition(name):
    """Dense matrices (44, 44) of one of the families, from their formulas."""
    _, _, y, each, counts = FAMILIES[name]
    x, theta = inputs(name), flat(tiny_mlp().model)
    z = outputs(theta, x)
    a = torch.ones_like(each(z, y)) if counts is None else counts.to(z)
    a = (a / a.sum()).flatten()
    jacobian = torch.func.jacrev(outputs)(theta, x).reshape(-1, 44)
    inner = hessian_of(lambda z: (a * each(z, y).flatten()).sum())(z)
    g = torch.func.jacrev(lambda theta: each(outputs(theta, x), y).flatten())(theta)
    centred = g - a @ g
    return {
        "gauss_newton": jacobian.T @ inner.reshape(2 * [z.numel()]) @ jacobian,
        "empirical_fisher": (a * g.T) @ g,
        "gradient_covariance": (a * centred.T) @ centred,
    }


@pytest.mark.parametrize(("name", "reduction", "chunk_size"), EVERY)
def test_gauss_newton_is_the_curvature_of_the_loss_between_two_jacobians(
    name, reduction, chunk_size
):
    risk, v = risk_of(name, reduction, chunk_size=chunk_size), directions(3, 44)
    product = risk.product(v, "gauss_newton")
    # Of -log p[y] after a log-softmax too: z are the scores before it.
    assert_near(product, v @ by_definition(name)["gauss_newton"], EXACT)


@pytest.mark.parametrize(("name", "reduction", "chunk_size"), EVERY)
def test_every_case_adds_the_outer_product_of_its_gradient(name, reduction, chunk_size):
    risk, v = risk_of(name, reduction, chunk_size=chunk_size), directions(3, 44)
    for matrix in ("empirical_fisher", "gradient_covariance"):
        assert_near(risk.product(v, matrix), v @ by_definition(name)[matrix], EXACT)


@pytest.mark.parametrize("problem", [linear_regression(), softmax_regression()])
def test_of_a_linear_model_gauss_newton_is_the_hessian_of_the_textbook(problem):
    for chunk_size in (1, 7, 23):
        risk = problem.risk(chunk_size=chunk_size)
        assert_near(dense(risk, "gauss_newton"), problem.hessian, EXACT)


@pytest.mark.parametrize("name", ["masked tokens", "ignored", "mse", "bce"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_the_matrices_are_symmetric_and_have_no_negative_eigenvalue(name, matrix):
    found = dense(risk_of(name, chunk_size=4), matrix)
    values = torch.linalg.eigvalsh(found)
    assert_near(found, found.T, ROUNDING)
    assert values[0] >= -ROUNDING * values[-1]
    assert values[-1] > 0


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_rows_of_uneven_length_weigh_what_they_hold(chunk_size):
    draw, model = generator(0), tiny_mlp().model
    data = [(normal(draw, 5, n, 3), normal(draw, 5, n, 4)) for n in (2, 6, 3)]
    risk = EmpiricalRisk(model, nn.MSELoss(), data, chunk_size=chunk_size)

    def rows(theta):
        each = [((outputs(theta, x) - y) ** 2).mean((1, 2)) for x, y in data]
        return torch.cat(each)

    a = torch.tensor([2.0, 6.0, 3.0], dtype=torch.float64).repeat_interleave(5) / 55
    g = torch.func.jacrev(rows)(flat(model))
    assert_near(dense(risk, "empirical_fisher"), (a * g.T) @ g, EXACT)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_block_is_its_rows_one_by_one(matrix):
    risk, v = risk_of("tokens"), directions(9, 44)
    block = risk.product(v, matrix)
    assert risk.prepare(matrix=matrix).directions_at_once > 1
    assert_near(block, torch.stack([risk.product(row, matrix) for row in v]), ROUNDING)
    assert risk.product(v[:0], matrix).shape == (0, risk.n)


@pytest.mark.parametrize("matrix", ["hessian", *MATRICES])
def test_scipy_multiplies_with_each_matrix(matrix):
    risk, v = risk_of("class"), directions(2, 44)
    operator = risk.linear_operator(matrix)
    assert operator.shape == (44, 44)
    for found in (operator @ v.numpy().T, operator.rmatmat(v.numpy().T)):
        assert_near(torch.from_numpy(found).T, risk.product(v, matrix), ROUNDING)


@pytest.mark.parametrize(
    ("outputs", "loss", "named"),
    [
        ("scores", nn.NLLLoss(), "`model`"),
        ("log p", lambda o, y: -o[torch.arange(len(o)), y].mean(), "`loss`"),
    ],
)
def test_gauss_newton_is_not_available_where_the_split_is_not_found(outputs, loss, named):
    model = network("nll" if outputs == "log p" else "class")
    risk = EmpiricalRisk(model, loss, (inputs("class"), Y))
    with pytest.raises(NotAvailableError, match=f"{named} must .* Gauss-Newton"):
        risk.product(risk.theta, "gauss_newton")
    assert norms(risk).fisher_rao is None


def test_fisher_rao_of_log_probabilities_is_that_of_the_scores():
    found = [norms(risk_of(name)).fisher_rao for name in ("nll", "class")]
    assert found[0] == pytest.approx(found[1], rel=EXACT)


# -- targets that are drawn --------------------------------------------------------------

DRAWN = ["ignored", "masked tokens", "soft", "nll", "mse", "bce"]


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_the_sampled_fisher_is_gauss_newton_on_average(name):
    seeds, repeat, v = 12, 50, directions(4, 44)
    drawn = [
        (risk_of(name, repeat=repeat, seed=s).product(v, "sampled_fisher") * v).sum(1)
        for s in range(seeds)
    ]
    mean, error = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / seeds**0.5
    expected = (v @ by_definition(name)["gauss_newton"] * v).sum(1)
    assert (error < 0.05 * expected).all()
    assert ((mean - expected).abs() <= 5 * error).all()


@pytest.mark.parametrize("name", DRAWN)
def test_one_seed_draws_the_same_targets_in_chunks_of_any_size(name):
    v = directions(2, 44)
    found = [
        risk_of(name, seed=3, chunk_size=size).product(v, "sampled_fisher")
        for size in (11, 11, 1, 4)
    ]
    assert torch.equal(found[0], found[1])
    assert_near(found[2], found[0], ROUNDING)
    assert_near(found[3], found[0], ROUNDING)
    other = risk_of(name, seed=4).product(v, "sampled_fisher")
    assert (other - found[0]).norm() > 1e-3 * other.norm()


# -- wrong calls -------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = softmax_regression().model

    def forward(self, x):
        return {"logits": self.linear(x)}


def loss_risk(loss):
    y = Y if isinstance(loss, nn.CrossEntropyLoss) else REALS
    return EmpiricalRisk(softmax_regression().model, loss, (inputs("mse"), y))


def closure_risk(**settings):
    settings.setdefault("model", tiny_mlp().model)
    return EmpiricalRisk(
        closure=lambda model, batch: CE(model(batch[0]), batch[1]),
        data=[tiny_mlp().data],
        **settings,
    )


def batchnorm_risk():
    return tiny_mlp(batchnorm=True).risk(batchnorm="batch", batchnorm_batch=12)


def named_risk():
    def loss(out, y):
        return CE(out["logits"], y)

    return EmpiricalRisk(Named(), loss, softmax_regression().data, terms=len)


NO_DENSITY = {
    "weight": nn.CrossEntropyLoss(weight=WEIGHT),
    "label_smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "pos_weight": nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
    "L1Loss": nn.L1Loss(),
    "function": lambda o, t: ((o - t) ** 2).mean(),
}
WRONG = {
    "unknown": (tiny_mlp().risk, "fisher", ValueError, "`matrix` must .*; got 'fisher'"),
    **{
        f"no density {got}": (
            partial(loss_risk, loss),
            "sampled_fisher",
            ValueError,
            f"`loss` must be the -log of a density.*; got {got}",
        )
        for got, loss in NO_DENSITY.items()
    },
    **{
        f"closure {matrix}": (
            closure_risk,
            matrix,
            TypeError,
            f"`matrix` must be 'hessian' .*`closure`; got '{matrix}'",
        )
        for matrix in MATRICES
    },
    **{
        f"batch statistics {matrix}": (
            batchnorm_risk,
            matrix,
            ValueError,
            f"`batchnorm` must be 'running' for matrix='{matrix}'; got 'batch'",
        )
        for matrix in PER_CASE
    },
    **{
        f"no tensor {matrix}": (
            named_risk,
            matrix,
            TypeError,
            "must return one .*; got dict",
        )
        for matrix in ("gauss_newton", "empirical_fisher", "gradient_covariance")
    },
    **{
        f"differences {matrix}": (
            partial(tiny_mlp().risk, engine="differences"),
            matrix,
            ValueError,
            f"`matrix` must be 'hessian' .*; got '{matrix}'",
        )
        for matrix in MATRICES
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_a_matrix_that_cannot_be_had_is_refused_in_one_line(name):
    build, matrix, kind, message = WRONG[name]
    risk = build()
    with pytest.raises(kind, match=message) as caught:
        risk.product(torch.ones(risk.n), matrix)
    assert "\n" not in str(caught.value)


def test_gauss_newton_goes_through_the_statistics_of_a_batch():
    problem, risk = tiny_mlp(batchnorm=True), batchnorm_risk()
    x, y = problem.data
    model, theta = problem.model.train(), problem.theta
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def z(theta, x):
        pieces = theta.split([shape.numel() for shape in shapes.values()])
        named = {k: p.view(s) for (k, s), p in zip(shapes.items(), pieces, strict=True)}
        return torch.func.functional_call(model, named, x)

    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    expected = 0
    for a, b in ((x[:12], y[:12]), (x[12:], y[12:])):
        jacobian = torch.func.jacrev(z)(theta, a).reshape(-1, risk.n)
        inner = hessian_of(lambda z, b=b: hard(z, b).sum() / 23)(z(theta, a))
        size = 2 * [4 * len(a)]
        expected = expected + jacobian.T @ inner.reshape(size) @ jacobian
    assert_near(dense(risk, "gauss_newton"), expected, EXACT)


# -- engines -----------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
    reason="no C++ compiler",
)


def uncompiled(function, **_):
    """In place of `torch.compile`, where what is tested lies before it."""
    return function


class InPlace(nn.Module):
    """A layer, tanh, and five features made of it, all written in place."""

    def __init__(self):
        super().__init__()
        self.first, self.last = (
            nn.Linear(*s, dtype=torch.float64) for s in ((3, 5), (5, 4))
        )
        filled(self, generator(0))

    def forward(self, x):
        h = self.first(x).tanh_()
        out = torch.zeros_like(h)
        out[:, :2] = h[:, :2]
        out[:, 2:] = h[:, 2:] * h[:, :3]
        out[:, 0].mul_(2)
        return self.last(F.relu_(out))


def in_place_outputs(theta, x):
    w1, b1, w2, b2 = theta.split([15, 5, 20, 4])
    h = torch.tanh(x @ w1.view(5, 3).T + b1)
    parts = [2 * h[:, :1], h[:, 1:2], h[:, 2:] * h[:, :3]]
    return torch.cat(parts, 1).clamp(min=0) @ w2.view(4, 5).T + b2


@cache
def in_place_matrices():
    x, y = tiny_mlp().data
    theta, a = flat(InPlace()), WEIGHT[y] * (y != 2)
    a = a / a.sum()

    def each(theta):
        return hard(in_place_outputs(theta, x), y)

    z = in_place_outputs(theta, x)
    jacobian = torch.func.jacrev(in_place_outputs)(theta, x).reshape(-1, 44)
    inner = hessian_of(lambda z: a @ hard(z, y))(z).reshape(92, 92)
    g = torch.func.jacrev(each)(theta)
    return {
        "hessian": hessian_of(lambda theta: a @ each(theta))(theta),
        "gauss_newton": jacobian.T @ inner @ jacobian,
        "empirical_fisher": (a * g.T) @ g,
    }


@pytest.fixture(scope="module")
def in_place():
    """Risks of unequal counts whose last chunk is ragged; each matrix is compiled once."""
    loss = nn.CrossEntropyLoss(WEIGHT, ignore_index=2)
    return {
        engine: EmpiricalRisk(InPlace(), loss, tiny_mlp().data, chunk_size=7, engine=engine)
        for engine in ("kept_graph", "compiled")
    }


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize(
    "engine",
    ["kept_graph", pytest.param("compiled", marks=[needs_compiler, pytest.mark.slow])],
)
def test_the_engines_have_the_matrices_of_the_definition(in_place, engine, matrix):
    risk = in_place[engine]
    found = risk.prepare(matrix=matrix)
    assert (found.engine, found.matrix) == (engine, matrix), found.reason
    assert_near(dense(risk, matrix), in_place_matrices()[matrix], EXACT)


@pytest.mark.slow
@needs_compiler
def test_compiled_products_of_a_network_that_writes_in_place_repeat(in_place):
    risk, v = in_place["compiled"], directions(2, 44)
    theta, first = risk.theta.clone(), risk.hvp(v)
    assert torch.equal(risk.hvp(v), first)
    assert_near(risk.hvp(v[0]), first[0], ROUNDING)
    assert torch.equal(risk.theta, theta)


@pytest.mark.slow
@needs_compiler
def test_200_compiled_products_leave_nothing_behind_R31(in_place):
    risk, v = in_place["compiled"], directions(1, 44)[0]

    for _ in range(5):
        risk.hvp(v)
    before = num_tensors()
    for _ in range(200):
        risk.hvp(v)
    assert num_tensors() == before


@pytest.fixture
def compilations(monkeypatch):
    """Every run of what was compiled, by a compiler that warns and changes nothing."""
    runs, compile_ = [], torch.compile

    def backend(graph, _):
        warnings.warn("made of old parts", DeprecationWarning, stacklevel=1)

        def run(*arguments):
            runs.append(len(arguments))
            return graph(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", partial(compile_, backend=backend))
    return runs


def test_what_was_compiled_is_what_multiplies(compilations):
    problem = tiny_mlp(num_samples=24)
    risk, v = problem.risk(chunk_size=8, engine="compiled"), directions(1, 44)[0]
    assert risk.prepare().engine == "compiled", risk.prepare().reason
    for _ in range(2):
        compilations.clear()
        product = risk.hvp(v)
        assert len(compilations) == 3
        assert_near(product, hessian_of(problem.f)(problem.theta) @ v, EXACT)


@pytest.mark.parametrize("budget", [1, 1 << 40])
def test_traced_products_are_those_of_the_kept_graph(monkeypatch, budget):
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(memory, "budget_bytes", lambda _: budget)
    problem, v = tiny_mlp(batchnorm=True), directions(2, 54)
    kept, traced = (
        problem.risk(chunk_size=7, engine=e) for e in ("kept_graph", "compiled")
    )
    for matrix in ("hessian", "sampled_fisher"):
        found = traced.prepare(matrix=matrix)
        assert found.engine == "compiled"
        assert found.num_kept == (1 if budget == 1 else 3)
        expected = kept.product(v, matrix)
        for _ in range(2):
            assert_near(traced.product(v, matrix), expected, ROUNDING)


def by_index(outputs, y):
    return (outputs.tanh() - y)[y > 0].pow(2).sum() / (y > 0).sum()


def by_length(outputs, y):
    return (outputs.tanh() - y).pow(2).sum() / len((y > 0).nonzero())


def by_list(outputs, y):
    return (outputs.tanh() - y).pow(2).sum() / sum((y > 0).flatten().tolist())


def by_array(outputs, y):
    return (outputs.tanh() - y).pow(2).sum() / int((y.numpy() > 0).sum())


@pytest.mark.parametrize("loss", [by_index, by_length, by_list, by_array])
def test_what_depends_on_the_values_of_a_chunk_is_no_constant_of_the_trace_R2(
    monkeypatch, loss
):
    monkeypatch.setattr(torch, "compile", uncompiled)
    kept, traced = (
        EmpiricalRisk(
            softmax_regression().model,
            loss,
            (inputs("mse"), REALS),
            chunk_size=4,
            terms=lambda y: (y > 0).sum(),
            engine=engine,
        )
        for engine in ("kept_graph", "compiled")
    )
    v = directions(2, 16)
    assert_near(traced.hvp(v), kept.hvp(v), ROUNDING)


# -- stepping aside ----------------------------------------------------------------------


class Odd(nn.Module):
    """A linear layer, and a forward pass that cannot be traced."""

    def __init__(self, way):
        super().__init__()
        self.linear, self.way = softmax_regression().model, way

    def forward(self, x):
        z = self.linear(x)
        if self.way == "draws":
            return torch.tanh(z + 0.1 * torch.randn_like(z))
        return torch.tanh(z) if z.sum() > 0 else torch.sin(z)


def failing(message):
    def compile_(function, **_):
        def fail(*arguments):
            raise RuntimeError(message)

        return fail

    return compile_


def slightly_wrong(function, **_):
    return lambda *arguments: [(1 + 1e-6) * part for part in function(*arguments)]


def not_a_number(function, **_):
    return lambda *arguments: [float("nan") * part for part in function(*arguments)]


NO_COMPILER = (
    "backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found"
)
ASIDE = {
    "draws": (lambda: Odd("draws"), uncompiled, "random numbers"),
    "branches": (lambda: Odd("branches"), uncompiled, "data-dependent"),
    "no compiler": (
        lambda: softmax_regression().model,
        failing(NO_COMPILER),
        "No working C",
    ),
    "wrong": (lambda: softmax_regression().model, slightly_wrong, "1.0e-06"),
    "nan": (lambda: softmax_regression().model, not_a_number, "nan|inf"),
}


@pytest.mark.parametrize("name", ASIDE)
def test_where_compiling_fails_the_kept_graph_multiplies_and_the_plan_says_why(
    name, monkeypatch
):
    build, compile_, reason = ASIDE[name]
    monkeypatch.setattr(torch, "compile", compile_)
    data, v = softmax_regression().data, directions(2, 16)
    risk = EmpiricalRisk(build(), CE, data, chunk_size=7, engine="compiled")
    found = risk.prepare()
    assert found.engine == "kept_graph"
    assert re.fullmatch(f".*stepped aside.*{reason}.*", found.reason), found.reason
    same = EmpiricalRisk(build(), CE, data, chunk_size=7, engine="kept_graph")
    assert torch.equal(risk.hvp(v), same.hvp(v))
    assert risk.prepare(10**12) == found


# -- the plan ----------------------------------------------------------------------------


@pytest.fixture
def cheap_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setitem(plan._SECONDS_A_TENSOR, "cpu", 1e-3)


@pytest.mark.usefixtures("cheap_compiler")
def test_many_products_are_worth_compiling_and_few_are_not():
    risk, again = (tiny_mlp().risk(chunk_size=7) for _ in range(2))
    assert risk.settings()["engine"] == {"engine": "auto"}
    for num_products, engine in (
        (1, "kept_graph"),
        (10, "kept_graph"),
        (10**7, "compiled"),
    ):
        found = risk.prepare(num_products)
        assert found.engine == engine
        assert found == again.prepare(num_products)
        assert (found.matrix, found.chunk_size, found.num_chunks) == ("hessian", 7, 4)
        assert found.relative_error is None
    assert str(10**7) in found.reason
    assert risk.prepare(1) == found  # it is there already
    fresh = tiny_mlp().risk(chunk_size=7)
    assert fresh.prepare(10**7) == found
    assert_near(fresh.hvp(risk.theta), tiny_mlp().risk().hvp(risk.theta), ROUNDING)


def test_on_a_gpu_the_rule_is_no_bolder_than_what_was_measured_there():
    """With C1 and F1 as `benchmarks/gpu.json` has them compiling is not too early."""
    found = json.loads((ROOT / "benchmarks" / "gpu.json").read_text())
    steps = found["parts"]["products"]["steps"]
    for name, num_tensors in (("C1", 18), ("F1", 22)):
        kept, compiled = steps[f"{name}: sharpness"], steps[f"{name}: sharpness compiled"]
        saved = kept["seconds_per_product"] - compiled["seconds_per_product"]
        paid = compiled["first_product_seconds"] - kept["first_product_seconds"]
        held = kept["settings"]["engine"]["predicted_bytes"]
        needed = math.ceil(paid / saved)
        assert not plan.worth_compiling(needed, held, num_tensors, "cuda", False)
        assert plan.worth_compiling(5 * needed, held, num_tensors, "cuda", False)
    assert not plan.worth_compiling(10**9, held, num_tensors, "mps", False)


def test_for_few_products_of_a_small_network_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    assert tiny_mlp().risk().prepare(200).engine == "kept_graph"


@pytest.mark.usefixtures("cheap_compiler")
def test_what_cannot_be_compiled_is_not_tried_again(monkeypatch):
    tried = []

    def compile_(function, **_):
        tried.append(function)
        raise RuntimeError(NO_COMPILER)

    monkeypatch.setattr(torch, "compile", compile_)
    risk = tiny_mlp().risk()
    found = risk.prepare(10**7)
    assert (found.engine, "stepped aside" in found.reason) == ("kept_graph", True)
    assert risk.prepare(10**7) == found
    assert len(tried) == 1


@pytest.mark.usefixtures("cheap_compiler")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_rule_does_not_compile_recurrent_networks(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(3, 4, batch_first=True, dtype=torch.float64)

        def forward(self, x):
            return self.cell(x)[0]

    data = inputs("tokens"), reals(11, 3, 4)
    risk = EmpiricalRisk(Recurrent(), nn.MSELoss(), data)
    assert risk.prepare(10**12).engine == "kept_graph"


@pytest.mark.usefixtures("cheap_compiler")
@pytest.mark.parametrize("engine", ["kept_graph", "compiled", "differences"])
def test_a_recorded_plan_repeats_engine_and_chunk_size(engine):
    problem = tiny_mlp()
    risk = problem.risk(chunk_size=5, engine=engine)
    product = risk.hvp(risk.theta)
    found = risk.settings()["engine"]
    assert found == risk.prepare().to_dict()
    assert json.loads(json.dumps(found)) == found
    again = problem.risk(engine=json.loads(json.dumps(found)))
    assert torch.equal(again.hvp(risk.theta), product)
    assert again.settings() == {**risk.settings(), "engine": again.prepare().to_dict()}
    assert again.prepare().engine == engine
    assert again.chunk_size == 5


def test_the_rule_of_an_earlier_risk_is_taken_before_anything_is_planned():
    settings = tiny_mlp().risk().settings()
    assert tiny_mlp().risk(engine=settings["engine"]).prepare().engine == "kept_graph"


def test_the_plan_of_the_matrix_that_was_prepared_stands_in_the_settings():
    risk = tiny_mlp().risk()
    risk.product(risk.theta, "empirical_fisher")
    found = risk.prepare()
    assert risk.settings()["engine"] == found.to_dict()


@pytest.mark.parametrize("engine", ["fast", "", None, 3, {}, {"engine": "fast"}])
def test_an_unknown_engine_is_refused(engine):
    got = re.escape(repr(engine))
    with pytest.raises(ValueError, match=f"`engine` must .*kept_graph.*; got {got}"):
        tiny_mlp().risk(engine=engine)


# -- differences of gradients ------------------------------------------------------------


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return slope * (1 - ctx.saved_tensors[0] ** 2)


class NeverDifferentiable(OnceDifferentiable):
    @staticmethod
    def backward(ctx, slope):
        raise RuntimeError("a bug of the model's own")


class Applied(nn.Module):
    """A `tiny_mlp` with another function between its layers."""

    def __init__(self, function):
        super().__init__()
        self.first, _, self.last = tiny_mlp().model
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def applied(function, **settings):
    return EmpiricalRisk(Applied(function), CE, tiny_mlp().data, **settings)


def relative_errors(risk, hessian):
    """Of products along random directions and the top, relative to the Hessian's norm."""
    top = torch.linalg.eigh(hessian).eigenvectors[:, -1:].T
    v = torch.cat([F.normalize(directions(5, len(hessian))), top])
    apart = risk.hvp(v.to(risk.dtype)).double() - v @ hessian
    return apart.norm(dim=1) / torch.linalg.matrix_norm(hessian, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(4))
def test_differences_know_how_far_off_they_are(dtype, seed):
    problem = tiny_mlp(dtype=dtype)
    model, (x, y) = problem.model, problem.data
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(normal(generator(seed), *p.shape) / 2)
    risk = problem.risk(chunk_size=7, engine="differences")
    found = risk.prepare()
    hessian = hessian_of(mlp_by_hand(model.double(), x.double(), y))(flat(model))
    errors = relative_errors(risk, hessian)
    assert (found.engine, found.reason) == ("differences", "asked for")
    assert 0.1 * errors.max() <= found.relative_error <= 100 * errors.max()
    assert found.relative_error < torch.finfo(dtype).eps ** 0.4


def test_without_a_second_derivative_products_are_differences_and_the_plan_says_so():
    problem, risk = tiny_mlp(), applied(OnceDifferentiable.apply, chunk_size=7)
    found, hessian = risk.prepare(), hessian_of(problem.f)(problem.theta)
    assert found.engine == "differences"
    assert re.fullmatch("no second derivative: .*OnceDifferentiable.*", found.reason)
    assert relative_errors(risk, hessian).max() <= 5 * found.relative_error
    assert risk.prepare(10**12) == found
    assert torch.equal(risk.hvp(0 * risk.theta), 0 * risk.theta)


class Recomputing(Applied):
    def forward(self, x):
        def body(x):
            return self.function(self.first(x))

        return self.last(checkpoint(body, x, use_reentrant=False))


@pytest.mark.parametrize("engine", ["auto", "kept_graph", "differences"])
@pytest.mark.parametrize("use", ["gradient", "prepare"])
def test_layers_that_are_computed_again_are_refused(engine, use):
    # The second pass would read the model's parameters as they are then, not theta.
    risk = EmpiricalRisk(
        Recomputing(torch.tanh), CE, tiny_mlp().data, chunk_size=7, engine=engine
    )
    with pytest.raises(ValueError, match=r"`model` must not .*; got first .*Switch it off"):
        getattr(risk, use)()


@pytest.mark.parametrize("engine", ["kept_graph", "compiled"])
def test_an_exact_engine_that_was_asked_for_is_not_replaced_by_differences(engine):
    with pytest.raises((RuntimeError, NotImplementedError), match="once_differentiable"):
        applied(OnceDifferentiable.apply, engine=engine).hvp(torch.ones(44))


@pytest.mark.parametrize("chunk_size", ["auto", 7])
@pytest.mark.parametrize("engine", ["auto", "kept_graph", "compiled", "differences"])
def test_a_bug_of_the_model_is_not_hidden(engine, chunk_size):
    with pytest.raises(RuntimeError, match="a bug of the model's own"):
        applied(NeverDifferentiable.apply, engine=engine, chunk_size=chunk_size).prepare()


# -- out of memory -----------------------------------------------------------------------


class Limited(nn.Module):
    """A model on a device that holds no more than so many rows."""

    def __init__(self, inside, most):
        super().__init__()
        self.inside, self.most = inside, most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB. 1 GiB is free.\nDetails")
        return self.inside(x)


CALLS = {
    "value": lambda risk: torch.tensor(risk.value()),
    "gradient": lambda risk: risk.gradient(),
    "value_and_gradient": lambda risk: risk.value_and_gradient()[1],
    "outputs": lambda risk: risk.outputs(),
    "accuracy": lambda risk: torch.tensor(risk.accuracy()),
    "hvp": lambda risk: risk.hvp(directions(2, 44)),
    "gradient_covariance": lambda risk: risk.product(
        directions(2, 44), "gradient_covariance"
    ),
    "sampled_fisher": lambda risk: risk.product(directions(2, 44), "sampled_fisher"),
}


@pytest.mark.parametrize("name", CALLS)
def test_chunks_are_halved_until_they_fit_and_the_mean_stays_what_it_is(name):
    problem = tiny_mlp(num_samples=100)
    model = Limited(problem.model, 100)
    risk = EmpiricalRisk(model, CE, problem.data, chunk_size=50)
    whole = CALLS[name](problem.risk(chunk_size=100))
    model.most = 20
    assert_near(CALLS[name](risk), whole, ROUNDING)
    assert risk.chunk_size == risk.settings()["chunk_size"] == 13
    assert_near(CALLS["hvp"](risk), CALLS["hvp"](problem.risk()), ROUNDING)
    assert risk.prepare().num_chunks == 8


def test_chunks_that_no_longer_fit_are_halved_between_products():
    problem = tiny_mlp(num_samples=100)
    model = Limited(problem.model, 100)
    risk = EmpiricalRisk(model, CE, problem.data, chunk_size=50)
    before = risk.product(directions(2, 44), "gauss_newton"), risk.hvp(directions(2, 44))
    model.most = 20
    assert_near(risk.gradient(), problem.risk().gradient(), ROUNDING)
    after = risk.product(directions(2, 44), "gauss_newton"), risk.hvp(directions(2, 44))
    for a, b in zip(after, before, strict=True):
        assert_near(a, b, ROUNDING)


def test_no_more_samples_are_evaluated_at_once_than_was_asked_for():
    problem = tiny_mlp()
    risk = EmpiricalRisk(Limited(problem.model, 4), CE, problem.data, chunk_size=4)
    assert_near(risk.gradient(), problem.risk().gradient(), ROUNDING)


UNCUT = {
    "parts": (
        lambda: EmpiricalRisk(
            Limited(tiny_mlp(batchnorm=True).model, 16),
            CE,
            tiny_mlp().data,
            batchnorm="batch",
        ),
        "`batchnorm_batch` must .*; got up to 23 samples",
    ),
    "closure": (
        lambda: closure_risk(model=Limited(tiny_mlp().model, 16)),
        "`data` must .*; got up to 23 samples",
    ),
    "closure with batch statistics": (
        lambda: closure_risk(
            model=Limited(tiny_mlp(batchnorm=True).model, 16), batchnorm="batch"
        ),
        "`data` must .*; got up to 23 samples",
    ),
}


@pytest.mark.parametrize("method", ["value", "gradient", "hvp"])
@pytest.mark.parametrize("name", UNCUT)
def test_what_cannot_be_cut_is_refused_in_one_line(name, method):
    build, message = UNCUT[name]
    risk = build()
    with pytest.raises(MemoryError, match=message + ".*Tried to allocate 2 GiB") as caught:
        getattr(risk, method)(*[risk.theta] * (method == "hvp"))
    assert "\n" not in str(caught.value)


# -- memory that is predicted ------------------------------------------------------------


def dense_layers():
    layers = [nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 70), nn.ReLU(), nn.Linear(70, 10)]
    return nn.Sequential(*layers), torch.randn(1000, 60)


def convolutions():
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    last = [nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 40)]
    return nn.Sequential(*first, *last), torch.randn(1000, 1, 14, 14)


def chunked(build, **settings):
    (model, x), y = build(), torch.arange(1000) % 10
    return EmpiricalRisk(model, CE, (x, y), chunk_size=250, **settings)


@pytest.mark.usefixtures("cheap_compiler")
@pytest.mark.parametrize(
    ("build", "engine"), [(dense_layers, "compiled"), (convolutions, "kept_graph")]
)
def test_the_rule_compiles_dense_layers_and_no_convolutions(build, engine):
    assert chunked(build).prepare(10**7).engine == engine


@pytest.mark.parametrize(("share", "num_kept"), [(2, 4), (0.5, 2), (1e-6, 1)])
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("build", [dense_layers, convolutions])
def test_the_predicted_peak_is_that_of_a_product(
    monkeypatch, build, matrix, share, num_kept
):
    everything = chunked(build).prepare(matrix=matrix).predicted_bytes
    monkeypatch.setattr(memory, "budget_bytes", lambda _: int(share * everything))
    risk = chunked(build)
    v = torch.randn(risk.n)
    counted = memory.footprint(lambda: lambda: risk.product(v, matrix)).peak
    found = risk.prepare(matrix=matrix)
    assert (found.num_kept, found.directions_at_once) == (num_kept, 1)
    assert found.predicted_bytes == pytest.approx(counted, rel=0.2)


def test_dropped_risks_leave_no_tensor_behind_R31(monkeypatch):
    monkeypatch.setattr(torch, "compile", uncompiled)
    before = num_tensors()
    for engine in ("kept_graph", "compiled", "differences"):
        for build in (tiny_mlp().risk, closure_risk):
            risk = build(engine=engine)
            risk.hvp(risk.theta)
    del risk, build
    assert num_tensors() == before


@pytest.mark.parametrize("engine", ["kept_graph", "compiled"])
def test_what_is_held_between_products_is_what_the_budget_allows(monkeypatch, engine):
    monkeypatch.setattr(torch, "compile", uncompiled)
    held = {}
    for budget in (1, 1 << 40):
        monkeypatch.setattr(memory, "budget_bytes", lambda _, b=budget: b)
        risk = chunked(dense_layers, engine=engine)
        v = torch.randn(risk.n)
        counted = memory.footprint(lambda r=risk, v=v: (r.hvp(v), gc.collect(), int)[2])
        held[risk.prepare().num_kept] = counted.held
    assert held[4] == pytest.approx(4 * held[1], rel=0.2)


GROWTH = """
import torch
from sharpness import EmpiricalRisk, NotAvailableError, norms
from sharpness.lab.networks import f1

def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

def risk(num_samples):
    data = torch.randn(num_samples, 784), torch.arange(num_samples) % 10
    return EmpiricalRisk(model, torch.nn.CrossEntropyLoss(), data, chunk_size=512)

torch.set_num_threads(1)
torch.manual_seed(0)
model = f1()
risk(32).hvp(torch.ones(1_462_794))  # what PyTorch loads once
whole = risk(2048)
predicted, before = whole.prepare().predicted_bytes, resident("VmRSS")
whole.hvp(whole.theta)
print(predicted, resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_the_predicted_peak_is_what_the_process_grows_by():
    # In a heap, freed memory between what is kept would stay with the process.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", GROWTH]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    predicted, growth = map(int, printed.stdout.split())
    assert predicted > 100e6
    assert predicted == pytest.approx(growth, rel=0.2)


# -- several directions at once ----------------------------------------------------------


class Times(torch.autograd.Function):
    """A product without a rule for several directions."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, slope):
        a, b = ctx.saved_tensors
        return slope * b, slope * a


class SingleTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return Times.apply(slope, 1 - x.tanh() ** 2)


@pytest.mark.parametrize(
    ("function", "several"), [(torch.tanh, True), (SingleTanh.apply, False)]
)
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
def test_blocks_go_at_once_where_every_operation_can(function, several, matrix):
    risk, plain = applied(function, chunk_size=7), tiny_mlp().risk()
    v = directions(11, 44)
    found = risk.prepare(matrix=matrix)
    assert found.engine == "kept_graph"
    assert (found.directions_at_once > 1) is several
    one_by_one = torch.stack([plain.product(row, matrix) for row in v])
    assert_near(risk.product(v, matrix), one_by_one, ROUNDING)


def test_directions_of_a_large_network_go_one_by_one():
    problem = tiny_mlp(num_samples=100_000)
    assert problem.risk(chunk_size=100_000).prepare().directions_at_once == 1
