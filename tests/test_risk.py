import copy
import gc
import math
import os
import weakref
from collections import UserDict, namedtuple
from functools import cache, partial
from itertools import pairwise

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import (
    assert_near,
    differenced_hvp,
    directions,
    filled,
    flat,
    generator,
    hessian_of,
    linear_regression,
    mlp_by_hand,
    normal,
    prescribed_hessian,
    quadratic,
    softmax_hessian,
    softmax_regression,
    symmetric,
    tiny_mlp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sharpness import EmpiricalRisk
from sharpness.lab.networks import _SamePool
from sharpness.risk import memory

EXACT = 1e-10  # against another formula, in float64
ROUNDING = 1e-12  # the same sum in another order, in float64
CHUNKS = [1, 7, 23]  # of 23 samples: the last of 7 is uneven

Pair = namedtuple("Pair", "inputs targets")


def dense(risk):
    return risk.hvp(torch.eye(risk.n, dtype=risk.dtype))


def assert_is(risk, f, rtol=EXACT, hessian=None):
    """Value, gradient and Hessian of the risk are those of a function of theta."""
    theta = risk.theta.clone()
    value, gradient = risk.value_and_gradient()
    expected = torch.func.grad(f)(theta)
    hessian = hessian_of(f)(theta) if hessian is None else hessian
    assert risk.value() == pytest.approx(float(f(theta)), rel=rtol)
    assert value == pytest.approx(float(f(theta)), rel=rtol)
    assert_near(gradient, expected, rtol)
    assert_near(risk.gradient(), expected, rtol)
    assert_near(dense(risk), hessian, rtol)


# -- closed forms ------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [linear_regression(), softmax_regression()])
@pytest.mark.parametrize("chunk_size", ["auto", 1, 7, 23, 100])
def test_regressions_have_the_hessian_of_the_textbook_R14(problem, chunk_size):
    risk = problem.risk(chunk_size=chunk_size)
    assert_is(risk, problem.f, hessian=problem.hessian)
    assert (risk.n, risk.num_samples) == (len(problem.theta), 23)


def test_a_quadratic_of_any_signs_is_what_it_says():
    h, theta0, c = normal(generator(0), 3, 6)
    risk = quadratic(h, c, at=theta0)
    assert min(h) < 0 < max(h)
    assert risk.value() == pytest.approx(0.5 * float((h * (theta0 - c) ** 2).sum()))
    assert_near(risk.gradient(), h * (theta0 - c), 1e-15)
    assert_near(dense(risk), torch.diag(h), 1e-15)


@pytest.mark.parametrize("spectrum", [[5, 2, 1, 0.1], [3, 0, -1e-8, -4], [-1, -2, -3]])
def test_the_hessian_is_taken_at_theta_and_nowhere_else(spectrum):
    matrix = symmetric(spectrum)
    risk = prescribed_hessian(matrix)
    assert_near(dense(risk), matrix, 1e-15)
    there = risk.theta + 1
    d = torch.ones_like(there)
    assert risk.value(there) == pytest.approx(float(matrix.sum() / 2 + 3 * d.sum()))
    assert_near(risk.gradient(there), matrix @ d + 8 * d, 1e-14)
    assert_near(dense(risk), matrix, 1e-15)


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_the_gradient_is_that_of_theta_by_default(slope):
    risk = prescribed_hessian(symmetric([2, -1]), slope=slope)
    assert risk.gradient().tolist() == [slope, slope]


def test_a_single_parameter_has_a_second_derivative():
    risk = quadratic([3.0], at=torch.tensor([2.0]))
    assert risk.hvp(torch.tensor([5.0])).tolist() == [15.0]
    assert risk.n == 1


# -- BatchNorm ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("training", [True, False])
def test_running_batchnorm_uses_the_running_averages_R18(chunk_size, training):
    problem = tiny_mlp(batchnorm=True)
    problem.model.train(training)
    assert_is(problem.risk(chunk_size=chunk_size), problem.f)


@pytest.mark.parametrize(
    ("batchnorm_batch", "sizes"),
    [(5000, [23]), (23, [23]), (22, [12, 11]), (10, [8, 8, 7]), (6, [6, 6, 6, 5])],
)
@pytest.mark.parametrize("training", [True, False])
def test_batch_batchnorm_is_the_mean_over_near_equal_parts(
    batchnorm_batch, sizes, training
):
    problem = tiny_mlp(batchnorm=True)
    problem.model.train(training)
    x, y = problem.data
    parts = [
        (len(a) / 23, mlp_by_hand(problem.model, a, b, statistics="batch"))
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
    ]
    risk = problem.risk(batchnorm="batch", batchnorm_batch=batchnorm_batch)
    assert_is(risk, lambda theta: sum(share * f(theta) for share, f in parts))
    assert risk.settings()["batchnorm_parts"] == len(sizes)


def test_batch_batchnorm_is_a_forward_pass_in_train_mode():
    problem, copied = tiny_mlp(batchnorm=True), tiny_mlp(batchnorm=True)
    x, y = problem.data
    expected = float(copied.loss(copied.model.train()(x), y).detach())
    assert problem.risk(batchnorm="batch").value() == pytest.approx(expected, 1e-14)


@pytest.mark.parametrize("batchnorm", ["running", "batch"])
def test_a_convolution_with_a_pool_equals_differenced_gradients(batchnorm):
    layers = [nn.Conv2d(1, 2, 3, padding="same"), nn.BatchNorm2d(2), nn.Tanh()]
    model = nn.Sequential(*layers, _SamePool(), nn.Flatten(), nn.Linear(18, 3))
    draw = generator(5)
    filled(model.double(), draw)
    x, y = normal(draw, 11, 1, 5, 5), torch.arange(11) % 3
    other = nn.Sequential(*model)  # the same layers, in the mode that autograd sees
    v = directions(1, len(flat(model)))[0]
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y), batchnorm=batchnorm)
    product, here = risk.hvp(v), flat(model)

    def gradient(theta):
        nn.utils.vector_to_parameters(theta, other.parameters())
        value = F.cross_entropy(other(x), y)
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(value, [*other.parameters()])]
        )

    other.train(batchnorm == "batch")
    assert_near(product, differenced_hvp(gradient, here, v), 1e-9)


def test_layers_that_keep_no_running_averages_are_refused_in_running_mode():
    # In evaluation mode they normalise by the chunk, so chunk_size would change f.
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    model = nn.Sequential(nn.Linear(3, 4), norm).double()
    x, y = normal(generator(0), 23, 3), torch.arange(23) % 4
    with pytest.raises(ValueError, match="track_running_stats"):
        EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y), chunk_size=7)


@pytest.mark.parametrize(("num_samples", "batchnorm_batch"), [(1, 5000), (5, 2)])
def test_a_batchnorm_part_of_one_sample_is_refused(num_samples, batchnorm_batch):
    problem = tiny_mlp(batchnorm=True, num_samples=num_samples)
    with pytest.raises(ValueError, match="`batchnorm_batch` must"):
        problem.risk(batchnorm="batch", batchnorm_batch=batchnorm_batch).value()


# -- vectors, blocks, chunks -------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_a_block_of_directions_equals_its_rows(chunk_size):
    risk = tiny_mlp().risk(chunk_size=chunk_size)
    block = directions(3, risk.n)
    products = risk.hvp(block)
    assert products.shape == (3, risk.n)
    for v, product in zip(block, products, strict=True):
        assert_near(risk.hvp(v), product, ROUNDING)  # all at once, or one by one
    by_columns = block.T.contiguous().T
    assert_near(risk.hvp(by_columns), products, ROUNDING)


def test_a_block_without_rows_gives_none():
    assert tiny_mlp().risk().hvp(torch.empty(0, 44)).shape == (0, 44)


@pytest.mark.parametrize("chunk_size", ["auto", *CHUNKS[:-1]])
def test_the_chunk_size_changes_no_number(chunk_size):
    problem = tiny_mlp(batchnorm=True)
    risk, whole = problem.risk(chunk_size=chunk_size), problem.risk(chunk_size=23)
    v = directions(2, risk.n)
    assert risk.value() == pytest.approx(whole.value(), rel=ROUNDING)
    assert_near(risk.gradient(), whole.gradient(), ROUNDING)
    assert_near(risk.hvp(v), whole.hvp(v), ROUNDING)
    assert_near(risk.outputs(), whole.outputs(), ROUNDING)


@given(cuts=st.lists(st.integers(0, 23), max_size=4), chunk_size=st.integers(1, 30))
@settings(max_examples=15)
def test_no_split_into_batches_and_chunks_changes_a_number(cuts, chunk_size):
    problem = tiny_mlp()
    x, y = problem.data
    edges = [0, *sorted(cuts), 23]  # empty batches among them
    batches = [(x[a:b], y[a:b]) for a, b in pairwise(edges)]
    risk = EmpiricalRisk(problem.model, problem.loss, batches, chunk_size=chunk_size)
    v = directions(1, risk.n)[0]
    whole = problem.risk(chunk_size=23)
    assert risk.num_samples == 23
    assert risk.value() == pytest.approx(whole.value(), rel=ROUNDING)
    assert_near(risk.gradient(), whole.gradient(), ROUNDING)
    assert_near(risk.hvp(v), whole.hvp(v), ROUNDING)


MLP_RISK = tiny_mlp(batchnorm=True).risk(batchnorm="batch", batchnorm_batch=10)
SCALE = float(dense(MLP_RISK).norm())
COEFFICIENTS = st.floats(-1e3, 1e3)


@given(seed=st.integers(0, 2**32 - 1))
def test_the_product_is_symmetric(seed):
    u, v = directions(2, MLP_RISK.n, seed)
    rounding = ROUNDING * SCALE * float(u.norm() * v.norm())
    assert abs(float(u @ MLP_RISK.hvp(v) - v @ MLP_RISK.hvp(u))) <= rounding


@given(seed=st.integers(0, 2**32 - 1), a=COEFFICIENTS, b=COEFFICIENTS)
def test_the_product_is_linear(seed, a, b):
    u, v = directions(2, MLP_RISK.n, seed)
    together = MLP_RISK.hvp(a * u + b * v)
    apart = a * MLP_RISK.hvp(u) + b * MLP_RISK.hvp(v)
    rounding = ROUNDING * SCALE * (abs(a) * u.norm() + abs(b) * v.norm())
    assert (together - apart).norm() <= rounding


def test_settings_say_how_f_is_defined():
    plain, normed = tiny_mlp().risk(chunk_size=7), tiny_mlp(batchnorm=True).risk()
    expected = {"num_samples": 23, "num_terms": 23, "num_parameters": 44}
    expected |= {"chunk_size": 7, "dtype": "float64", "device": "cpu"}
    expected |= {"batchnorm": None, "batchnorm_parts": None}
    assert expected.items() <= plain.settings().items()
    assert normed.settings()["batchnorm"] == "running"
    assert repr(plain).startswith("EmpiricalRisk(Sequential, n=44, num_samples=23")


def test_results_are_detached_and_theta_stays_as_it_is():
    risk = tiny_mlp().risk()
    theta = risk.theta.clone()
    results = [risk.gradient(), risk.hvp(risk.theta), risk.outputs(), risk.theta]
    assert not any(result.requires_grad for result in results)
    risk.hvp(risk.theta.clone().requires_grad_()).add_(1)
    risk.gradient(theta.requires_grad_()).add_(1)
    assert torch.equal(risk.theta, theta)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("built", ["inside", "outside"])
def test_an_outer_block_without_gradients_changes_no_number(outer, built):
    problem = tiny_mlp()
    risk, v = problem.risk(chunk_size=7), directions(2, 44)
    expected = risk.value(), risk.gradient(), risk.hvp(v)
    again = problem.risk(chunk_size=7)
    with outer():
        again = problem.risk(chunk_size=7) if built == "inside" else again
        assert again.value() == expected[0]
        assert torch.equal(again.gradient(), expected[1])
        assert torch.equal(again.hvp(v), expected[2])


# -- loss terms --------------------------------------------------------------------------

WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


def token_model():
    """Logits (N, 4, L) from (N, L, 3), as the cross-entropy wants them."""
    linear = nn.Linear(3, 4, dtype=torch.float64)
    return nn.Sequential(filled(linear, generator(4)), nn.Unflatten(1, (-1, 1)), Swap())


class Swap(nn.Module):
    def forward(self, x):
        return x.squeeze(2).transpose(1, 2)


def classes(*shape):
    """Classes 0..3, with 2 in the first third: a chunk where 2 does not count is empty."""
    y = torch.randint(4, shape, generator=generator(6))
    y[:8] = 2
    return y


def probabilities(*shape):
    return torch.softmax(normal(generator(6), *shape), 1)


def masked(y):
    return torch.where(y == 2, -100, y)


def elements():
    return normal(generator(6), 23, 4)


LOSSES = {
    "class": (nn.CrossEntropyLoss, {}, classes(23)),
    "smoothed": (nn.CrossEntropyLoss, {"label_smoothing": 0.1}, classes(23)),
    "ignored": (nn.CrossEntropyLoss, {"ignore_index": 2}, classes(23)),
    "masked": (nn.CrossEntropyLoss, {}, masked(classes(23))),
    "weighted": (nn.CrossEntropyLoss, {"weight": WEIGHT}, classes(23)),
    "weighted-ignored-smoothed": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "ignore_index": 2, "label_smoothing": 0.2},
        classes(23),
    ),
    "probabilities": (nn.CrossEntropyLoss, {"weight": WEIGHT}, probabilities(23, 4)),
    "function": (F.cross_entropy, None, classes(23)),
    "partial": (F.cross_entropy, {"weight": WEIGHT, "ignore_index": 2}, classes(23)),
    "nll": (nn.NLLLoss, {"weight": WEIGHT}, classes(23)),
    "nll-partial": (F.nll_loss, {"ignore_index": 2}, classes(23)),
    "mse": (nn.MSELoss, {}, elements()),
    "mse-function": (F.mse_loss, None, elements()),
    "mse-partial": (F.mse_loss, {}, elements()),
    "l1": (nn.L1Loss, {}, elements()),
    "smooth-l1": (nn.SmoothL1Loss, {}, elements()),
    "huber": (F.huber_loss, {"delta": 0.5}, elements()),
    "bce-logits": (nn.BCEWithLogitsLoss, {"pos_weight": WEIGHT}, elements().sigmoid()),
    "poisson": (nn.PoissonNLLLoss, {}, elements().exp()),
    "soft-margin": (nn.SoftMarginLoss, {}, elements().sign()),
}


def built(kind, keywords, reduction):
    if keywords is None:
        return kind
    keywords = {**keywords, "reduction": reduction}
    return kind(**keywords) if isinstance(kind, type) else partial(kind, **keywords)


@cache
def full_batch(name):
    """Value, gradient and one product of the mean over all 23 samples at once."""
    kind, keywords, y = LOSSES[name]
    problem, loss = softmax_regression(), built(kind, keywords, "mean")
    x, _ = problem.data

    def f(theta):
        return loss(x @ theta[:12].view(4, 3).T + theta[12:], y)

    theta, v = problem.theta, directions(1, 16)[0]
    product = hessian_of(f)(theta) @ v
    return float(f(theta)), torch.func.grad(f)(theta), v, product


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", LOSSES)
def test_f_is_the_mean_that_pytorch_takes_over_the_full_batch_R2_R3(
    name, chunk_size, reduction
):
    value, gradient, v, product = full_batch(name)
    kind, keywords, y = LOSSES[name]
    problem, loss = softmax_regression(), built(kind, keywords, reduction)
    data = problem.data[0], y
    risk = EmpiricalRisk(problem.model, loss, data, chunk_size=chunk_size)
    assert risk.value() == pytest.approx(value, rel=ROUNDING)
    assert_near(risk.gradient(), gradient, EXACT)
    if float(product.norm()):
        assert_near(risk.hvp(v), product, EXACT)
    else:
        assert torch.equal(risk.hvp(v), product)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_weights_and_ignored_targets_count_as_in_the_closed_form_R2(chunk_size):
    problem, y = softmax_regression(), classes(23)
    x, _ = problem.data
    loss = nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2)
    risk = EmpiricalRisk(problem.model, loss, (x, y), chunk_size=chunk_size)
    counts = torch.where(y == 2, 0, WEIGHT[y])
    assert_near(dense(risk), softmax_hessian(problem.model, x, counts), EXACT)
    assert risk.num_terms == pytest.approx(float(counts.sum()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [1, 7, 11])
@pytest.mark.parametrize(
    "y", [masked(classes(11, 6)), probabilities(11, 4, 6)], ids=["masked", "soft"]
)
def test_every_counted_token_is_one_term_R2(y, chunk_size, reduction):
    x = normal(generator(5), 11, 6, 3)
    model, loss = token_model(), nn.CrossEntropyLoss(reduction=reduction)
    risk = EmpiricalRisk(model, loss, (x, y), chunk_size=chunk_size)

    def f(theta):
        log_p = torch.log_softmax(x @ theta[:12].view(4, 3).T + theta[12:], 2)
        if y.ndim == 3:
            return -(log_p * y.transpose(1, 2)).sum() / 66
        kept = y >= 0
        return -log_p[kept].gather(1, y[kept][:, None]).sum() / kept.sum()

    assert_is(risk, f)


CALLABLES = {
    "mean": (lambda o, t: ((o - t) ** 2).mean(), 23 * 4),
    "sum": (lambda o, t: ((o - t) ** 2).sum(), 23),
    "rows": (lambda o, t: ((o - t) ** 2).sum(1), 23),
    "mean of rows": (lambda o, t: ((o - t) ** 2).sum(1).mean(), 23),
}


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", CALLABLES)
def test_any_other_callable_has_one_term_a_row_R3(name, chunk_size):
    loss, divisor = CALLABLES[name]
    problem, y = softmax_regression(), elements()
    x, _ = problem.data
    risk = EmpiricalRisk(problem.model, loss, (x, y), chunk_size=chunk_size)
    assert_is(
        risk,
        lambda theta: ((x @ theta[:12].view(4, 3).T + theta[12:] - y) ** 2).sum() / divisor,
    )


def masked_mean(outputs, targets):
    counted = targets > 0
    return ((outputs - targets) ** 2)[counted].sum() / counted.sum()


@pytest.mark.parametrize("chunk_size", [7, 23])
def test_terms_say_how_many_a_callable_averages(chunk_size):
    problem, y = softmax_regression(), elements()
    x, _ = problem.data
    risk = EmpiricalRisk(
        problem.model,
        masked_mean,
        (x, y),
        chunk_size=chunk_size,
        terms=lambda targets: (targets > 0).sum(),
    )
    assert_is(risk, lambda theta: masked_mean(x @ theta[:12].view(4, 3).T + theta[12:], y))
    assert risk.num_terms == int((y > 0).sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_terms_override_the_count_and_not_the_reduction_R3(reduction):
    problem, y = softmax_regression(), elements()
    x, _ = problem.data
    risk = EmpiricalRisk(
        problem.model,
        nn.MSELoss(reduction=reduction),
        (x, y),
        chunk_size=7,
        terms=lambda targets: targets.numel(),
    )
    expected = float(F.mse_loss(problem.model(x).detach(), y))
    assert risk.value() == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("how", ["pairs", "closure"])
def test_ragged_batches_give_the_same_hessian_R1(how):
    problem = softmax_regression(num_samples=21)
    x, y = problem.data
    x = torch.cat([x[:20], 30 * x[20:]])  # an outlier alone in the last batch
    full = EmpiricalRisk(problem.model, problem.loss, (x, y))
    ragged = [(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])]
    if how == "pairs":
        risk = EmpiricalRisk(problem.model, problem.loss, ragged)
    else:
        risk = EmpiricalRisk(
            problem.model,
            closure=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            data=ragged,
        )
    equal = torch.ones(21, dtype=torch.float64)
    assert_near(dense(risk), softmax_hessian(problem.model, x, equal), EXACT)
    assert_near(dense(risk), dense(full), ROUNDING)
    assert_near(risk.gradient(), full.gradient(), ROUNDING)
    assert risk.value() == pytest.approx(full.value(), rel=ROUNDING)
    assert risk.num_samples == 21


def test_parameters_of_the_loss_are_held_fixed():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

        def forward(self, outputs, targets):
            return self.scale * F.cross_entropy(outputs, targets)

    problem, loss = softmax_regression(), Scaled()
    risk = EmpiricalRisk(problem.model, loss, problem.data, chunk_size=7)
    assert risk.n == 16
    assert_near(dense(risk), 3 * problem.hessian, EXACT)
    assert loss.scale.grad is None


# -- parameters --------------------------------------------------------------------------


class Extended(nn.Module):
    """A linear layer, one parameter that is not used and one that enters linearly."""

    def __init__(self, extra):
        super().__init__()
        self.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.linear, self.used = softmax_regression().model, extra == "linear"

    def forward(self, x):
        return self.linear(x), self.extra.sum() if self.used else 0.0


@pytest.mark.parametrize(
    ("extra", "slope"),
    [
        pytest.param("unused", 0.0, id="unused_R10"),
        pytest.param("linear", 1.0, id="linear_R13"),
    ],
)
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_a_parameter_without_curvature_has_zero_rows(extra, slope, chunk_size):
    problem, model = softmax_regression(), Extended(extra)
    risk = EmpiricalRisk(
        model,
        lambda outputs, y: F.cross_entropy(outputs[0], y) + outputs[1],
        problem.data,
        chunk_size=chunk_size,
        terms=len,
    )
    expected = torch.zeros(18, 18, dtype=torch.float64)
    expected[2:, 2:] = problem.hessian
    assert_near(dense(risk), expected, EXACT)
    assert torch.equal(risk.hvp(torch.ones(18))[:2], torch.zeros(2).double())
    assert risk.gradient()[:2].tolist() == pytest.approx([slope] * 2, rel=ROUNDING)


def test_a_loss_that_is_linear_in_every_parameter_has_hessian_zero_R13():
    problem = softmax_regression()
    risk = EmpiricalRisk(problem.model, lambda o, y: o.mean(1), problem.data)
    product = risk.hvp(torch.ones(16))
    assert torch.equal(product, torch.zeros(16, dtype=torch.float64))
    means = problem.data[0].mean(0) / 4
    assert_near(risk.gradient()[:3], means, EXACT)


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
BLOCKS = dict(zip(NAMES, torch.arange(44).split([15, 5, 20, 4]), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_parameter_is_left_out_and_held_R11(name):
    problem = tiny_mlp()
    problem.model.get_parameter(name).requires_grad_(False)
    risk = problem.risk(chunk_size=7)
    rest = torch.cat([BLOCKS[other] for other in NAMES if other != name])
    hessian = hessian_of(problem.f)(problem.theta)
    assert_near(dense(risk), hessian[rest][:, rest], EXACT)
    assert_near(risk.theta, problem.theta[rest], 0)
    frozen = [k for k, p in problem.model.named_parameters() if not p.requires_grad]
    assert frozen == [name]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("2.*", ["2.weight", "2.bias"]),
        (["*.bias"], ["0.bias", "2.bias"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),  # in the model's order
        (("0.*", "*"), NAMES),
        ("?.weight", ["0.weight", "2.weight"]),
    ],
)
def test_params_are_names_or_globs_R11(params, expected):
    problem = tiny_mlp()
    problem.model[0].requires_grad_(False)  # named ones count even where frozen
    risk = problem.risk(params=params)
    chosen = torch.cat([BLOCKS[name] for name in expected])
    hessian = hessian_of(problem.f)(problem.theta)
    assert_near(dense(risk), hessian[chosen][:, chosen], EXACT)
    moved = problem.theta
    moved[chosen] += 0.1
    there = risk.theta + 0.1
    assert risk.value(there) == pytest.approx(float(problem.f(moved)), rel=ROUNDING)
    gradient = torch.func.grad(problem.f)(moved)[chosen]
    assert_near(risk.gradient(there), gradient, EXACT)


@pytest.mark.parametrize("chunk_size", [7, 23])
def test_tied_parameters_are_one_R12(chunk_size):
    first, last = (nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(2))
    last.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), last)
    x, y = normal(generator(0), 2, 23, 3)
    risk = EmpiricalRisk(model, nn.MSELoss(), (x, y), chunk_size=chunk_size)

    def f(theta):
        w = theta.view(3, 3)
        return ((torch.tanh(x @ w.T) @ w.T - y) ** 2).sum() / 69

    assert risk.n == 9
    assert_is(risk, f)
    there = risk.theta + 0.1
    assert risk.value(there) == pytest.approx(float(f(there)), rel=ROUNDING)


# -- types -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_model_of_low_precision_is_right_to_that_precision_R15(dtype, batchnorm):
    problem = tiny_mlp(batchnorm=batchnorm, dtype=dtype)
    x, y = problem.data
    model = problem.model
    risk = problem.risk(chunk_size=7)
    v = directions(2, risk.n).float()
    products, gradient = risk.hvp(v), risk.gradient()
    # Vectors of half precision would be noise: theta and products are float32.
    assert {products.dtype, gradient.dtype, risk.dtype} == {torch.float32}
    theta, f = problem.theta.double(), mlp_by_hand(model.double(), x.double(), y)
    hessian = hessian_of(f)(theta)
    few = 10 * torch.finfo(dtype).eps  # a handful of roundings, one after another
    assert risk.value() == pytest.approx(float(f(theta)), rel=few)
    assert_near(gradient.double(), torch.func.grad(f)(theta), few)
    for row, product in zip(v.double(), products.double(), strict=True):
        assert (product - hessian @ row).norm() <= few * hessian.norm() * row.norm()


def test_parts_of_different_types_are_measured_together():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            layers = tiny_mlp().model
            self.body, self.head = layers[:2], layers[2].float()

        def forward(self, x):
            return self.head(self.body(x).float())

    problem = tiny_mlp()
    risk = EmpiricalRisk(Mixed(), problem.loss, problem.data, chunk_size=7)
    hessian = hessian_of(problem.f)(problem.theta)
    assert risk.dtype == torch.float64
    assert_near(dense(risk), hessian, 10 * torch.finfo(torch.float32).eps)


def test_many_terms_do_not_overflow_half_precision():
    model = nn.Linear(2, 100, bias=False).half()  # 1e5 terms of about 1; largest 65504
    nn.init.zeros_(model.weight)
    x, y = torch.ones(1000, 2).half(), torch.ones(1000, 100).half()
    risk = EmpiricalRisk(model, nn.MSELoss(), (x, y), chunk_size=1000)
    assert risk.value() == pytest.approx(1, rel=torch.finfo(torch.float16).eps)
    few = 10 * torch.finfo(torch.float16).eps
    assert_near(risk.gradient(), torch.full((200,), -0.02), few)


# -- kinds of network --------------------------------------------------------------------


class Attention(nn.Module):
    """Two heads of size 2 on (N, L, 4): queries, keys and values are 4-D."""

    def __init__(self, is_causal):
        super().__init__()
        self.qkv, self.is_causal = nn.Linear(4, 12), is_causal

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 2, 2).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return out.transpose(1, 2).reshape(n, length, 4)


def attention_by_hand(x, w, b, is_causal=False):
    heads = []
    for head in range(2):
        q, k, v = (
            x @ w[rows].T + b[rows]
            for rows in (slice(4 * i + 2 * head, 4 * i + 2 * head + 2) for i in range(3))
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(2)
        if is_causal:
            late = torch.ones(scores.shape[1:]).triu(1).bool()
            scores = scores.masked_fill(late, -math.inf)
        heads.append(torch.softmax(scores, 2) @ v)
    return torch.cat(heads, 2)


def sequences(num=5, length=3, size=4):
    draw = generator(8)
    return normal(draw, num, length, size), normal(draw, num, length, size)


@pytest.mark.parametrize("is_causal", [False, True])
def test_scaled_dot_product_attention_in_4d_needs_no_setting_up_R27(is_causal):
    model = filled(Attention(is_causal).double(), generator(0))
    x, y = sequences()
    risk = EmpiricalRisk(model, nn.MSELoss(), (x, y), chunk_size=2)

    def f(theta):
        out = attention_by_hand(x, theta[:48].view(12, 4), theta[48:], is_causal)
        return ((out - y) ** 2).mean()

    assert_is(risk, f)


@pytest.mark.parametrize("training", [True, False])
def test_a_stock_transformer_layer_works_in_either_mode_R28(training):
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dtype=torch.float64)
    model = filled(layer, generator(0)).train(training)
    x, y = sequences()
    sizes = [p.numel() for p in model.parameters()]
    shapes = [p.shape for p in model.parameters()]

    def norm(z, scale, shift):
        z = z - z.mean(2, keepdim=True)
        return z / ((z**2).mean(2, keepdim=True) + 1e-5).sqrt() * scale + shift

    def f(theta):
        parts = [p.view(s) for p, s in zip(theta.split(sizes), shapes, strict=True)]
        qkv, qkv_b, out, out_b, w1, b1, w2, b2, s1, t1, s2, t2 = parts
        z = norm(x + attention_by_hand(x, qkv, qkv_b) @ out.T + out_b, s1, t1)
        z = norm(z + torch.relu(z @ w1.T + b1) @ w2.T + b2, s2, t2)
        return ((z - y) ** 2).mean()

    assert_is(EmpiricalRisk(model, nn.MSELoss(), (x, y), chunk_size=2), f)
    assert model.training is training


def lstm_step(z, _, h, c):
    i, f, g, o = z.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(z, recurrent, h, c):
    r, u = z[:, :6].sigmoid().chunk(2, 1)
    new = torch.tanh(z[:, 6:] - recurrent[:, 6:] + r * recurrent[:, 6:])
    return (1 - u) * new + u * h, c


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "step"), [(nn.LSTM, lstm_step), (nn.GRU, gru_step)])
def test_recurrent_networks_have_products_R29(kind, step, training):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(4, 3, batch_first=True)

        def forward(self, x):
            return self.cell(x)[0]

    model = filled(Recurrent().double(), generator(0)).train(training)
    x, y = sequences()
    y = y[..., :3]
    gates = model.cell.bias_hh_l0.numel()

    def f(theta):
        w, u, b, d = theta.split([4 * gates, 3 * gates, gates, gates])
        h = c = torch.zeros(5, 3, dtype=x.dtype)
        states = []
        for t in range(3):
            recurrent = h @ u.view(gates, 3).T + d
            z = x[:, t] @ w.view(gates, 4).T + b + recurrent
            h, c = step(z, recurrent, h, c)
            states.append(h)
        return ((torch.stack(states, 1) - y) ** 2).mean()

    assert_is(EmpiricalRisk(model, nn.MSELoss(), (x, y), chunk_size=2), f)


# -- data --------------------------------------------------------------------------------


def frozen_array(tensor):
    array = tensor.numpy().copy()
    array.flags.writeable = False  # as np.frombuffer gives it
    return array


def batched(x, y, kind=tuple, size=7):
    return [kind(p) for p in zip(x.split(size), y.split(size), strict=True)]


FORMS = {
    "pair": lambda x, y: (x, y),
    "list of two": lambda x, y: [x, y],
    "batches": batched,
    "two batches": lambda x, y: batched(x, y, size=12),
    "tuple of batches": lambda x, y: tuple(batched(x, y, size=12)),
    "list batches": lambda x, y: batched(x, y, kind=list),
    "named batches": lambda x, y: batched(x, y, kind=lambda p: Pair(*p)),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "read-only arrays": lambda x, y: (frozen_array(x), frozen_array(y)),
    "batches of arrays": lambda x, y: [(a.numpy(), b.numpy()) for a, b in batched(x, y)],
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7),
    "shuffling loader": lambda x, y: DataLoader(TensorDataset(x, y), 7, shuffle=True),
    "generator_R25": lambda x, y: (pair for pair in batched(x, y)),
    "inputs with a graph": lambda x, y: (x.clone().requires_grad_() * 1, y),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_data_gives_the_same_risk(form):
    problem = softmax_regression()
    risk = EmpiricalRisk(problem.model, problem.loss, FORMS[form](*problem.data))
    assert_is(risk, problem.f, hessian=problem.hessian)
    assert risk.num_samples == 23
    assert sorted(risk.targets.tolist()) == sorted(problem.data[1].tolist())


class Noisy(Dataset):
    """Augmentation: another draw at every look."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + torch.randn(3, dtype=torch.float64), self.y[i]


def test_an_augmenting_and_shuffling_loader_is_run_once():
    problem = softmax_regression()
    loader = DataLoader(Noisy(*problem.data), batch_size=5, shuffle=True)
    risk = EmpiricalRisk(problem.model, problem.loss, loader)
    v = directions(1, 16)[0]
    first = risk.value(), risk.gradient(), risk.hvp(v), risk.targets
    torch.manual_seed(99)
    assert risk.value() == first[0] == risk.value_and_gradient()[0]
    again = risk.gradient(), risk.hvp(v), risk.targets
    assert all(torch.equal(a, b) for a, b in zip(first[1:], again, strict=True))


def test_a_loader_that_fills_one_buffer_over_and_over_is_read_batch_by_batch():
    problem = softmax_regression(num_samples=24)
    x, y = problem.data
    buffer = torch.empty(6, 3, dtype=torch.float64), torch.empty(6, dtype=torch.int64)

    def loader():
        for a, b in batched(x, y, size=6):
            buffer[0].copy_(a)
            buffer[1].copy_(b)
            yield buffer

    risk = EmpiricalRisk(problem.model, problem.loss, loader())
    assert risk.value() == pytest.approx(float(problem.f(problem.theta)), rel=ROUNDING)


@pytest.mark.parametrize("chunk_size", [7, "auto"])
def test_one_pass_gives_what_several_give(chunk_size):
    y = torch.arange(40) % 4
    y[::5] = -100  # which the loss ignores
    blobs = torch.randn(40, 3), y
    risk = EmpiricalRisk(nn.Linear(3, 4), "cross_entropy", blobs, chunk_size=chunk_size)
    theta = risk.theta + 1
    value, gradient, accuracy = risk.value_gradient_and_accuracy(theta)
    expected = risk.value_and_gradient(theta)
    assert value == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=1e-9)
    assert 0 < accuracy == risk.accuracy(theta) < 1
    at_theta = risk.value(), risk.accuracy()
    assert risk.value_and_accuracy() == (pytest.approx(at_theta[0], rel=1e-12), at_theta[1])
    assert risk.known_value() == pytest.approx(risk.value(), rel=1e-12)
    assert torch.equal(risk.known_gradient()[1], risk.gradient())


def test_one_pass_draws_what_a_pass_of_f_draws():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x + 0.5 * torch.randn_like(x))

    def loss(z, y):
        return F.cross_entropy(z + 0.5 * torch.randn_like(z), y)

    torch.manual_seed(0)
    pair = torch.randn(16, 6), torch.randint(0, 3, (16,))
    risk = EmpiricalRisk(Noisy(), loss, pair)
    assert risk.value_and_accuracy()[0] == risk.value()
    value, gradient, _ = risk.value_gradient_and_accuracy()
    assert value == risk.value()
    assert torch.equal(gradient, risk.gradient())


def test_outputs_targets_and_accuracy_are_in_the_order_of_the_data():
    problem = softmax_regression()
    x, y = problem.data
    risk = problem.risk(chunk_size=7)
    logits = x @ problem.model.weight.T + problem.model.bias
    assert_near(risk.outputs(), logits.detach(), ROUNDING)
    assert torch.equal(risk.targets, y)
    right = sum(int(row.argmax() == c) for row, c in zip(logits, y, strict=True))
    assert 0 < right < 23
    assert risk.accuracy() == pytest.approx(right / 23)
    there = 0 * risk.theta
    there[12] = 1.0  # always class 0
    assert risk.accuracy(there) == pytest.approx(float((y == 0).double().mean()))


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_sequences_of_uneven_length_count_each_element_once(chunk_size):
    draw, model = generator(0), softmax_regression().model
    data = [(normal(draw, 5, n, 3), normal(draw, 5, n, 4)) for n in (2, 6, 3)]
    risk = EmpiricalRisk(model, nn.MSELoss(), data, chunk_size=chunk_size)

    def f(theta):
        w, b = theta[:12].view(4, 3), theta[12:]
        return sum(((x @ w.T + b - y) ** 2).sum() for x, y in data) / (5 * 11 * 4)

    assert_is(risk, f)
    assert risk.num_samples == 15


CLOSURE_BATCHES = {
    "dict": lambda x, y: {"y": y, "inputs": {"x": x}},
    "text first": lambda x, y: {"name": ["a"], "inputs": {"id": "b", "x": x}, "y": y},
    "none first": lambda x, y: {"mask": None, "inputs": {"scale": 2.0, "x": x}, "y": y},
    "mapping": lambda x, y: UserDict(y=y, inputs={"x": x}),  # as Hugging Face's are
    "dict of arrays": lambda x, y: {"y": y.numpy(), "inputs": {"x": x.numpy()}},
}


@pytest.mark.parametrize("kind", CLOSURE_BATCHES)
def test_a_closure_takes_batches_of_any_kind_each_weighted_by_its_rows(kind):
    problem = softmax_regression()
    batches = [CLOSURE_BATCHES[kind](*pair) for pair in batched(*problem.data)]
    risk = EmpiricalRisk(
        problem.model,
        closure=lambda m, batch: F.cross_entropy(m(batch["inputs"]["x"]), batch["y"]),
        data=batches,
    )
    assert_is(risk, problem.f, hessian=problem.hessian)
    assert risk.num_samples == 23


def test_a_closure_says_its_loss_terms_by_terms_R2():
    problem, y = softmax_regression(), masked(classes(23))
    x, _ = problem.data
    risk = EmpiricalRisk(
        problem.model,
        closure=lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]),
        data=[{"x": a, "y": b} for a, b in batched(x, y)],  # the first counts no term
        terms=lambda batch: (batch["y"] >= 0).sum(),
    )
    counted = (y >= 0).double()
    assert_near(dense(risk), softmax_hessian(problem.model, x, counted), EXACT)
    assert math.isfinite(risk.value())


def test_a_closure_may_differentiate_the_model():
    draw = generator(0)
    model = filled(nn.Linear(3, 1, bias=False, dtype=torch.float64), draw)
    x, y = normal(draw, 2, 11, 3)

    def closure(network, batch):
        inputs = batch[0].clone().requires_grad_()
        out = torch.sin(network(inputs)).sum()
        (slope,) = torch.autograd.grad(out, inputs, create_graph=True)
        return ((slope - batch[1]) ** 2).mean()

    risk = EmpiricalRisk(model, closure=closure, data=[(x, y)])
    assert_is(
        risk,
        lambda theta: ((torch.cos(x @ theta)[:, None] * theta - y) ** 2).sum() / 33,
    )


# -- SciPy -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scipy_finds_the_eigenvalues_of_the_linear_operator(dtype):
    matrix = symmetric([9, 4, 1, 0.5, -2, -6])
    risk = prescribed_hessian(matrix.to(dtype))
    operator = risk.linear_operator()
    few = 100 * torch.finfo(dtype).eps
    assert operator.shape == (6, 6)
    assert operator.dtype == matrix.to(dtype).numpy().dtype
    v0 = np.ones(6, dtype=operator.dtype)
    found = eigsh(operator, k=2, which="LA", v0=v0, return_eigenvectors=False)
    assert sorted(found) == pytest.approx([4, 9], rel=few)
    block = np.random.default_rng(0).standard_normal((6, 3)).astype(operator.dtype)
    assert operator @ block == pytest.approx(matrix.numpy() @ block, rel=few, abs=few)
    assert operator.rmatmat(block) == pytest.approx(operator @ block, rel=few, abs=few)
    assert operator.rmatvec(block[:, 0]) == pytest.approx((operator @ block)[:, 0])
    assert (operator @ block).dtype == operator.dtype


# -- wrong calls -------------------------------------------------------------------------

X, Y = torch.zeros(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
CE = nn.CrossEntropyLoss()


def risk_of(loss=CE, data=(X, Y), **settings):
    return EmpiricalRisk(softmax_regression().model, loss, data, **settings)


def closure_risk(**settings):
    settings.setdefault("closure", lambda model, batch: model(batch[0]).sum())
    return risk_of(None, settings.pop("data", [(X, Y)]), **settings)


WRONG_CALLS = {
    "no loss": (lambda: risk_of(None), TypeError, "got neither"),
    "loss and closure": (lambda: risk_of(closure=print), TypeError, "got both"),
    "batchnorm": (
        lambda: risk_of(batchnorm="train"),
        ValueError,
        "`batchnorm` must .*; got 'train'",
    ),
    "batchnorm_batch": (
        lambda: risk_of(batchnorm="batch", batchnorm_batch=1),
        ValueError,
        "`batchnorm_batch` must .*; got 1",
    ),
    "chunk 0": (lambda: risk_of(chunk_size=0), ValueError, "`chunk_size` .*; got 0"),
    "chunk 2.5": (lambda: risk_of(chunk_size=2.5), ValueError, "; got 2.5"),
    "chunk all": (lambda: risk_of(chunk_size="all"), ValueError, "; got 'all'"),
    "chunk and batch": (
        lambda: risk_of(chunk_size=3, batchnorm="batch"),
        ValueError,
        "`chunk_size` must be 'auto' with batchnorm='batch'; got 3",
    ),
    "params": (
        lambda: risk_of(params="head.*"),
        ValueError,
        r"`params` must .*; got 'head.\*' \(model parameters: weight, bias",
    ),
    "no params": (lambda: risk_of(params=[]), ValueError, r"got \[\]"),
    "nothing to move": (
        lambda: EmpiricalRisk(nn.Linear(3, 4).requires_grad_(False), CE, (X, Y)),
        ValueError,
        "got None .*weight, bias",
    ),
    "no parameters": (
        lambda: EmpiricalRisk(nn.Tanh(), CE, (X, Y)),
        ValueError,
        r"got None \(model parameters: none",
    ),
    "no data": (lambda: risk_of(data=None), TypeError, "`data` must .*; got NoneType"),
    "data of one tensor": (
        lambda: risk_of(data=X),
        TypeError,
        "pairs .*; got Tensor .*alone",
    ),
    "three in a batch": (
        lambda: risk_of(data=[(X, Y, Y)]),
        TypeError,
        "got a batch of type tuple",
    ),
    "dict batch": (
        lambda: risk_of(data=[{"x": X, "y": Y}]),
        TypeError,
        "got a dict of x, y.*`closure=",
    ),
    "targets in a list": (
        lambda: risk_of(data=(X, [0] * 6)),
        TypeError,
        "got 'targets' of type list",
    ),
    "uneven pair": (
        lambda: risk_of(data=(X, Y[:5])),
        ValueError,
        "got 6 inputs and 5 targets",
    ),
    "empty list": (lambda: risk_of(data=[]), ValueError, "one sample; got none"),
    "empty pair": (lambda: risk_of(data=(X[:0], Y[:0])), ValueError, "; got none"),
    "used generator": (lambda: risk_of(data=iter(())), ValueError, "; got none"),
    "no closure data": (lambda: closure_risk(data=[]), ValueError, "; got none"),
    "one dict, no list": (
        lambda: closure_risk(data={"x": X, "y": Y}),
        TypeError,
        "got dict.*Wrap a single batch in a list",
    ),
    "no term counts": (
        lambda: risk_of(nn.CrossEntropyLoss(ignore_index=0)),
        ValueError,
        "one loss term; got none that counts",
    ),
    "no closure term counts": (
        lambda: closure_risk(terms=lambda batch: 0),
        ValueError,
        "got none that counts",
    ),
    "a closure of many values": (
        lambda: closure_risk(closure=lambda m, batch: m(batch[0])).value(),
        (TypeError, ValueError),
        "`closure` must .*got",
    ),
    "short v": (
        lambda: risk_of().hvp(torch.ones(15)),
        ValueError,
        r"`v` must .* n=16; got \(15,\)",
    ),
    "columns": (
        lambda: risk_of().hvp(torch.ones(16, 2)),
        ValueError,
        r"`v` must .*; got \(16, 2\)",
    ),
    "three dimensions": (
        lambda: risk_of().hvp(torch.ones(1, 1, 16)),
        ValueError,
        r"got \(1, 1, 16\)",
    ),
    "scalar v": (lambda: risk_of().hvp(torch.tensor(1.0)), ValueError, r"got \(\)"),
    "closure outputs": (
        lambda: closure_risk().outputs(),
        TypeError,
        "`outputs` must .*; got one with a `closure` .not available for a closure",
    ),
    "closure targets": (lambda: closure_risk().targets, TypeError, "`targets` must"),
    "closure accuracy": (
        lambda: closure_risk().accuracy(),
        TypeError,
        "not available for a closure",
    ),
}
for method in ("value", "gradient", "value_and_gradient", "outputs", "accuracy"):
    WRONG_CALLS[f"theta of {method}"] = (
        lambda method=method: getattr(risk_of(), method)(torch.ones(1, 16)),
        ValueError,
        r"`theta` must .* n=16; got \(1, 16\)",
    )


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_told_what_it_got(name):
    call, kind, message = WRONG_CALLS[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# -- memory ------------------------------------------------------------------------------


def count_of_forward_passes(model):
    counts = []
    model.register_forward_hook(lambda *_: counts.append(1))
    return counts


def test_a_smaller_budget_keeps_fewer_graphs_and_changes_no_product(monkeypatch):
    rebuilt, products = [], []
    v = directions(2, 44)
    for exponent in range(6, 20):
        monkeypatch.setattr(memory, "budget_bytes", lambda _, e=exponent: 2**e)
        problem = tiny_mlp()
        risk = problem.risk(chunk_size=5)
        risk.hvp(v)
        passes = count_of_forward_passes(problem.model)
        products.append(risk.hvp(v[0]))
        rebuilt.append(len(passes))
    assert rebuilt == sorted(rebuilt, reverse=True)
    assert rebuilt[0] == 4  # of five chunks: one graph is always kept
    assert rebuilt[-1] == 0
    assert len(set(rebuilt)) > 2
    assert all(torch.equal(product, products[0]) for product in products)


def test_the_automatic_chunk_shrinks_with_the_budget(monkeypatch):
    problem = tiny_mlp(num_samples=2000)
    sizes, values = [], []
    for budget in (1 << 40, 1 << 18, 1 << 16, 1):
        monkeypatch.setattr(memory, "budget_bytes", lambda _, b=budget: b)
        risk = problem.risk()
        sizes.append(risk.chunk_size)
        values.append(risk.value())
    assert sizes[0] == 1024
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] == 1
    assert values == pytest.approx([values[0]] * 4, rel=ROUNDING)


def test_a_footprint_counts_what_is_held_and_the_peak():
    def build():
        held = [torch.ones(100, dtype=torch.float64), torch.ones(50)]
        torch.ones(1000)  # freed at once

        def work():
            passing = held[0] + 1
            return passing[:10]  # a view holds all of it

        return work

    assert memory.footprint(build) == memory.Footprint(held=1000, peak=5000, largest=4000)
    assert memory.footprint(lambda: lambda: torch.ones(10)).peak == 40


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 1 << 40])
def test_200_products_leave_nothing_behind_R31(monkeypatch, budget):
    monkeypatch.setattr(memory, "budget_bytes", lambda _: budget)
    draw = generator(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).double()
    data = normal(draw, 300, 64), normal(draw, 300, 64)
    risk = EmpiricalRisk(model, nn.MSELoss(), data, chunk_size=150)
    v = directions(1, risk.n)[0]

    def state():
        gc.collect()
        tensors = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
        return tensors, psutil.Process(os.getpid()).memory_info().rss

    for _ in range(5):
        risk.hvp(v)
    tensors, resident = state()
    for _ in range(200):
        risk.hvp(v)
    assert state()[0] == tensors
    # One graph here holds over half a MiB: leaked, they would be over 100 MiB.
    assert state()[1] - resident < 30 * 2**20


def test_a_dropped_risk_gives_its_graphs_back_at_once():
    # A reference cycle waits for the collector, and a graph may hold most of the memory.
    risk = quadratic([1.0], at=torch.ones(1))
    risk.hvp(torch.ones(1))
    gone = weakref.ref(risk)
    gc.disable()
    try:
        del risk
        assert gone() is None
    finally:
        gc.enable()


# -- recalibrated BatchNorm ---------------------------------------------------------------


def recalibrated_by_pytorch(problem, theta):
    """A copy of the model at theta whose averages `update_bn` has re-estimated."""
    model = copy.deepcopy(problem.model).double()
    nn.utils.vector_to_parameters(theta, model.parameters())
    x, _ = problem.data
    torch.optim.swa_utils.update_bn([part for part in x.tensor_split(3)], model)
    return model.eval()


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_recalibrated_statistics_are_those_of_pytorch_at_every_theta_R19(chunk_size):
    problem = tiny_mlp(batchnorm=True)
    before = {k: b.clone() for k, b in problem.model.named_buffers()}
    risk = problem.risk(batchnorm="recalibrated", batchnorm_batch=8, chunk_size=chunk_size)
    x, y = problem.data
    for theta in (problem.theta, problem.theta + 0.1):
        model = recalibrated_by_pytorch(problem, theta)
        f = mlp_by_hand(model, x, y)
        assert risk.value(theta) == pytest.approx(float(f(theta)), rel=ROUNDING)
        assert_near(risk.gradient(theta), torch.func.grad(f)(theta), EXACT)
    model = recalibrated_by_pytorch(problem, problem.theta)
    assert_near(dense(risk), hessian_of(mlp_by_hand(model, x, y))(problem.theta), EXACT)
    assert risk.settings()["batchnorm"] == "recalibrated"
    assert risk.settings()["batchnorm_parts"] == 3
    for name, buffer in problem.model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert problem.model[1].momentum == 0.1


def test_differences_hold_recalibrated_statistics_fixed():
    problem = tiny_mlp(batchnorm=True)
    exact = problem.risk(batchnorm="recalibrated")
    by_differences = problem.risk(batchnorm="recalibrated", engine="differences")
    v = directions(1, exact.n)[0]
    assert_near(by_differences.hvp(v), exact.hvp(v), 1e-6)


# -- what the doctor reads -------------------------------------------------------------


def test_the_batches_are_the_data_in_chunks_and_come_from_the_source():
    x, y = normal(generator(1), 23, 3), normal(generator(2), 23, 2)
    risk = EmpiricalRisk(nn.Linear(3, 2).double(), F.mse_loss, (x, y), chunk_size=7)
    inputs, targets = zip(*risk.batches, strict=True)
    assert [len(part) for part in inputs] == [6, 6, 6, 5]
    assert torch.equal(torch.cat(inputs), x)
    assert torch.equal(torch.cat(targets), y)
    assert risk.source[0] is x


@pytest.mark.parametrize("draws", [False, True])
def test_a_risk_knows_whether_its_forward_pass_draws_numbers(draws):
    class Model(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, training=draws)

    data = normal(generator(1), 8, 3), normal(generator(2), 8, 2)
    risk = EmpiricalRisk(Model(3, 2).double(), F.mse_loss, data)
    assert risk.draws_random_numbers is draws


def test_derivatives_are_seen_beside_differences_also_where_nothing_is_checked():
    class Model(nn.Linear):
        def forward(self, x):
            return super().forward(x) + super().forward(x).detach()

    data = normal(generator(1), 8, 3), normal(generator(2), 8, 2)
    right = EmpiricalRisk(nn.Linear(3, 2).double(), F.mse_loss, data, check=False)
    wrong = EmpiricalRisk(Model(3, 2).double(), F.mse_loss, data, check=False)
    assert all(seen.agrees for seen in right.beside_differences())
    assert all(seen.disagrees for seen in wrong.beside_differences())


@pytest.mark.parametrize("wrong", ["a parameter", "parameters", "a module"])
def test_parameters_are_chosen_by_name_and_never_by_themselves(wrong):
    model = nn.Linear(3, 2)
    given = {
        "a parameter": model.weight,
        "parameters": model.parameters(),
        "a module": model,
    }[wrong]
    with pytest.raises(ValueError, match="`params` must be names or globs; got") as error:
        EmpiricalRisk(
            model, nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), params=given
        )
    assert "\n" not in str(error.value)
