"""Gradient noise: closed forms, every leave-one-out and subset by hand, coverage."""

from __future__ import annotations

import json
import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from helpers.problems import Pole
from helpers.untouched import assert_same, assert_states, fingerprint, random_states
from torch import Tensor, nn

import sharpness as sh
from sharpness._json import to_line
from sharpness.measures import gradient_noise as noise
from sharpness.results import GradientNoise
from sharpness.risk import sample_gradients
from sharpness.statistics import ratio_interval

FLOAT64 = torch.float64


def regression(delta: float, num: int, dim: int, seed: int) -> sh.EmpiricalRisk:
    """Half of (x w - y)^2 at a point `delta` from the true parameters; unit noise."""
    draw = np.random.default_rng(seed)
    x, e = draw.standard_normal((num, dim)), draw.standard_normal(num)
    model = nn.Linear(dim, 1, bias=False, dtype=FLOAT64)
    nn.init.zeros_(model.weight)
    y = e - delta * x[:, 0]  # of parameters -delta e_1
    data = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    return sh.EmpiricalRisk(model, HalfSquares(), data, check=False)


class HalfSquares(nn.MSELoss):
    pass


def true_scale(delta: float, dim: int) -> float:
    """tr Sigma = 4 (d (delta^2 + 1) + delta^2), |G|^2 = 4 delta^2."""
    return (dim * (delta**2 + 1) + delta**2) / delta**2 if delta else math.inf


def holds(found: GradientNoise, scale: float) -> bool:
    low, high = found.interval
    return low <= scale and (high is None or scale <= high)


def classifier(num: int = 60, **settings) -> sh.EmpiricalRisk:
    draw = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=FLOAT64)
    x = torch.randn(num, 5, generator=draw, dtype=FLOAT64)
    y = torch.randint(4, (num,), generator=draw)
    loss = settings.pop("loss", nn.CrossEntropyLoss())
    return sh.EmpiricalRisk(model, loss, (x, y), **settings)


def flat_gradient(value: Tensor, model: nn.Module) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in found])


def joined(risk: sh.EmpiricalRisk, index=None, **how) -> Tensor:
    index = range(risk.num_samples) if index is None else index
    return torch.cat(list(risk.sample_gradients(index, **how)))


# -- gradients of samples ---------------------------------------------------------------

LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]).double()),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "a function": lambda z, y: nn.functional.cross_entropy(z, y),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_samples_are_autograds_and_their_mean_is_the_gradient(name):
    risk, loss = classifier(20, loss=LOSSES[name], chunk_size=7), LOSSES[name]
    x, y = risk.full_batch()
    each = torch.stack([
        flat_gradient(loss(risk.model(x[i : i + 1]), y[i : i + 1]), risk.model)
        for i in range(20)
    ])  # fmt: skip
    weight = getattr(loss, "weight", None)
    if weight is not None:  # PyTorch's mean over one sample divides its weight out
        each = each * (weight[y] / weight[y].mean())[:, None]
    found = risk.sample_gradients(range(20))
    assert len(found) == 20
    blocks = list(found)
    assert found.how == "per-sample gradients"
    assert max(map(len, blocks)) <= 7
    torch.testing.assert_close(torch.cat(blocks), each, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat(blocks).mean(0), risk.gradient())
    some = [1, 4, 13]
    torch.testing.assert_close(joined(risk, some).mean(0), risk.subset(some).gradient())


def language_model(num: int = 12) -> sh.EmpiricalRisk:
    """Sequences of 6 tokens, of which some are masked, and one sequence has none."""
    draw = torch.Generator().manual_seed(2)
    model = Tokens().double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=FLOAT64)
    x = torch.randint(7, (num, 6), generator=draw)
    y = torch.randint(7, (num, 6), generator=draw)
    y[torch.rand(y.shape, generator=draw) < 0.3] = -100
    y[3] = -100
    return sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.out(h.tanh() + h.mean(1, keepdim=True)).transpose(1, 2)


def test_tokens_of_a_sequence_are_one_sample_unless_asked_otherwise():
    risk = language_model()
    x, y = risk.full_batch()
    tokens = int((y != -100).sum())
    rows = joined(risk)
    assert len(rows) == 12
    assert not rows[3].any()
    torch.testing.assert_close(rows.mean(0), risk.gradient())
    sums = nn.functional.cross_entropy(risk.model(x), y, reduction="none")
    parameters = list(risk.model.parameters())
    each = [
        torch.autograd.grad(value, parameters, retain_graph=True)
        for value in sums[y != -100]
    ]
    each = torch.stack([torch.cat([g.reshape(-1) for g in grads]) for grads in each])
    found = risk.sample_gradients(range(12), "term")
    assert len(found) == tokens
    torch.testing.assert_close(torch.cat(list(found)), each)
    assert found.how == "per-term gradients"
    measured = sh.gradient_noise(risk, unit="term")
    assert measured.num_vectors == tokens
    assert measured.trace_covariance == pytest.approx(float(each.var(0).sum()), rel=1e-9)


def test_terms_that_are_no_class_numbers_have_no_gradient_of_their_own():
    with pytest.raises(TypeError, match=r"`unit` must be 'sample' .* HalfSquares"):
        sh.gradient_noise(regression(1.0, 20, 2, 0), unit="term")
    with pytest.raises(TypeError, match="`metric` must be 'identity' with unit='term'"):
        sh.gradient_noise(classifier(), unit="term", metric="sign")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


def test_layers_without_a_rule_for_vmap_go_sample_by_sample():
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(10, 4, 3, generator=draw), torch.arange(10) % 2
    risk = sh.EmpiricalRisk(Recurrent(), nn.CrossEntropyLoss(), data)
    found = sh.gradient_noise(risk)
    assert "one at a time" in found.how
    assert found.trace_covariance == pytest.approx(
        float(joined(risk).double().var(0).sum()), rel=1e-4
    )


def test_a_block_changes_no_number(monkeypatch):
    plain = sh.gradient_noise(classifier())
    monkeypatch.setattr(sample_gradients, "_BLOCK_BYTES", 1)
    single = sh.gradient_noise(classifier())
    assert single.noise_scale == pytest.approx(plain.noise_scale, rel=1e-10)
    assert single.interval == pytest.approx(plain.interval, rel=1e-8)


# -- the estimates ----------------------------------------------------------------------


def vectors(g: np.ndarray) -> noise._Vectors:
    mean = g.mean(0)
    c = g - mean
    return noise._Vectors(
        squares=(g**2).sum(1),
        along=g @ mean,
        mean_square=float(mean @ mean),
        square_trace=noise._square_trace(c @ c.T, min(g.shape)),
        batch_size=1.0,
        share=1.0,
        how="",
    )


def skewed(num: int, dim: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return 0.3 + draw.exponential(size=(num, dim)) * draw.uniform(0.5, 2, dim)


def test_moments_are_those_of_the_gradients_themselves():
    risk = classifier()
    g, found = joined(risk).numpy(), sh.gradient_noise(risk)
    n, mean = len(g), g.mean(0)
    assert found.trace_covariance == pytest.approx(g.var(0, ddof=1).sum(), rel=1e-12)
    pairs = (g @ g.T)[~np.eye(n, dtype=bool)]
    assert found.gradient_norm_squared == pytest.approx(pairs.mean(), rel=1e-10)
    left_out = []
    for i in range(n):
        rest = np.delete(g, i, 0)
        left_out.append(rest.var(0, ddof=1).sum())
    error = math.sqrt((n - 1) / n * np.sum((left_out - np.mean(left_out)) ** 2))
    assert found.trace_covariance_error == pytest.approx(error, rel=1e-9)
    assert found.noise_scale == found.trace_covariance / found.gradient_norm_squared
    whole = sh.gradient_noise(risk, population="data")
    assert whole.gradient_norm_squared == pytest.approx(mean @ mean, rel=1e-12)
    assert whole.interval == pytest.approx((whole.noise_scale, whole.noise_scale))
    assert whole.gradient_norm_squared_error == 0


def test_what_samples_say_of_the_data_is_right_on_average():
    """Over all samples of 8 out of 10: unbiased for the ten, whatever they are."""
    g = skewed(10, 3)
    found = [
        vectors(g[list(some)]).found(1 - 8 / 10, 0.95)
        for some in combinations(range(10), 8)
    ]
    whole, mean = g.var(0, ddof=1).sum(), g.mean(0)
    for name, value in (
        ("trace_covariance", whole),
        ("gradient_norm_squared", mean @ mean),
    ):
        assert np.mean([f[name] for f in found]) == pytest.approx(value, rel=1e-12)


def test_the_trace_of_sigma_squared_is_unbiased():
    """It is the mean of ((x1 - x2)(x3 - x4))^2 / 4 over all distinct fours."""
    g = skewed(7, 3)
    c = g - g.mean(0)
    fours = [
        ((g[a] - g[b]) @ (g[c_] - g[d])) ** 2 / 4
        for a, b, c_, d in permutations(range(7), 4)
    ]
    assert noise._square_trace(c @ c.T, 10**9) == pytest.approx(np.mean(fours), rel=1e-10)


def test_few_rows_for_the_trace_of_sigma_squared_suffice(monkeypatch):
    plain = sh.gradient_noise(classifier(400))
    monkeypatch.setattr(noise, "_GRAM_ROWS", 100)
    few = sh.gradient_noise(classifier(400))
    assert few.interval != plain.interval
    assert few.interval == pytest.approx(plain.interval, rel=0.1)


@pytest.mark.parametrize("square", [-0.5, 0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("linear", [-0.3, 0.0, 2.0])
def test_the_interval_is_what_its_inequality_keeps(square, linear):
    spread, variance, t = 4.0, (0.5, linear, 0.02), 2.0
    low, high = ratio_interval(spread, square, variance, t)
    r = np.geomspace(1e-3, 1e6, 20001)
    # A variance is a square: its middle term is bounded by the outer ones.
    linear = max(linear, -2 * math.sqrt(variance[0] * variance[2]))
    v = variance[0] + linear * r + variance[2] * r**2
    kept = (spread - r * max(square, 0)) ** 2 <= t**2 * v
    assert kept.any()
    assert r[kept].min() == pytest.approx(low, rel=2e-3)
    if high is None:
        assert kept[-1]
        assert square**2 <= t**2 * variance[2] or square < 0
    else:
        assert r[kept].max() == pytest.approx(high, rel=2e-3)


def test_no_gradient_in_the_noise_is_at_least():
    found = sh.gradient_noise(regression(0.0, 200, 4, 0))
    low, high = found.interval
    assert high is None
    assert found.is_lower_bound
    assert str(found).startswith("noise_scale ≥")
    assert "G = 0 cannot be excluded" in str(found)
    assert "\n" not in str(found)
    reading = found.readings()[0]
    assert (reading.value, reading.bound) == (low, "≥")
    assert json.loads(to_line(found))["interval"] == [low, None]


def test_a_clear_gradient_has_both_ends():
    found = sh.gradient_noise(regression(1.0, 400, 4, 0))
    assert holds(found, true_scale(1.0, 4))
    assert not found.is_lower_bound
    assert found.relative_error(4) == math.sqrt(found.noise_scale / 4)


def test_a_drawn_part_is_at_random_by_the_seed():
    risk = classifier()
    found = [sh.gradient_noise(risk, num_samples=20, seed=s) for s in (0, 0, 1)]
    assert found[0].interval == found[1].interval != found[2].interval
    assert found[0].num_vectors == 20
    narrower = sh.gradient_noise(risk, num_samples=20, population="data")
    assert narrower.trace_covariance_error < found[0].trace_covariance_error


# -- other metrics ----------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["gauss_newton", "hessian"])
def test_noise_in_the_curvature_of_least_squares(metric):
    """H = 2 I: the Euclidean scale again, and twice its numerator."""
    found = sh.gradient_noise(regression(1.0, 4000, 4, 0), metric=metric)
    assert holds(found, true_scale(1.0, 4))
    numerator = 2 * 4 * (4 * 2 + 1)
    assert abs(found.trace_covariance - numerator) < 4 * found.trace_covariance_error
    assert found.batch_size == 4000 // 2 // 32
    assert found.cost.products == pytest.approx(32 * (4000 - 32 * 62) / 4000)
    assert f"noise_scale_{metric}" in str(found)


def test_a_hessian_of_the_wrong_sign_gives_no_scale():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=draw, dtype=FLOAT64)
    model = nn.Linear(2, 1, bias=False, dtype=FLOAT64)

    def falling(z: Tensor, y: Tensor) -> Tensor:
        return -((z - y) ** 2).mean()

    risk = sh.EmpiricalRisk(model, falling, (x, x[:, :1] + 1))
    found = sh.gradient_noise(risk, metric="hessian")
    assert found.status == "not_available"
    assert "wrong sign" in str(found)
    assert math.isnan(found.noise_scale)


def test_the_scale_of_signs_holds_its_truth():
    """(sum_j sigma_j / |G|_1)^2, with the standard deviations of the closed form."""
    delta, dim = 1.0, 4
    sigmas = [math.sqrt(delta**2 + 1 + delta**2 * (j == 0)) for j in range(dim)]
    truth = (sum(sigmas) / delta) ** 2
    found = [
        sh.gradient_noise(regression(delta, 2000, dim, s), metric="sign") for s in range(5)
    ]
    assert all(holds(f, truth) for f in found)
    scale = np.mean([f.noise_scale for f in found])
    assert scale == pytest.approx(truth, rel=0.2)
    none = sh.gradient_noise(regression(0.0, 200, dim, 0), metric="sign")
    assert none.is_lower_bound


# -- what has no number -----------------------------------------------------------------


def test_rows_that_are_not_numbers_are_counted_and_named():
    risk = classifier()
    x, y = risk.full_batch()
    x = x.clone()
    x[[17, 40], 0] = 9.0
    broken = sh.EmpiricalRisk(Pole(risk.model), nn.CrossEntropyLoss(), (x, y))
    found = sh.gradient_noise(broken)
    assert found.status == "non_finite"
    assert "2 (the first: number 17) are not finite" in str(found)
    assert math.isnan(found.noise_scale)
    assert "\n" not in str(found)
    json.loads(to_line(found), parse_constant=pytest.fail)
    assert sh.gradient_noise(broken, metric="sign").status == "non_finite"


def test_no_gradient_at_all():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    data = torch.ones(20, 2), torch.zeros(20, 1)
    risk = sh.EmpiricalRisk(model, nn.MSELoss(), data)
    for metric in ("identity", "sign"):
        assert sh.gradient_noise(risk, metric=metric).status == "zero_gradient"


def test_equal_samples_have_no_noise():
    model = nn.Linear(2, 1, dtype=FLOAT64)
    data = torch.ones(20, 2, dtype=FLOAT64), torch.full((20, 1), 9.0, dtype=FLOAT64)
    found = sh.gradient_noise(sh.EmpiricalRisk(model, nn.MSELoss(), data))
    assert found.noise_scale == pytest.approx(0, abs=1e-12)
    assert found.interval == pytest.approx((0, 0), abs=1e-10)


def with_batchnorm(batchnorm_batch: int, num: int = 96) -> sh.EmpiricalRisk:
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    data = torch.randn(num, 5, generator=draw), torch.arange(num) % 3
    return sh.EmpiricalRisk(
        model,
        nn.CrossEntropyLoss(),
        data,
        batchnorm="batch",
        batchnorm_batch=batchnorm_batch,
    )


def test_batches_stand_for_samples_without_gradients_of_their_own():
    risk = with_batchnorm(8)
    found = sh.gradient_noise(risk)
    assert found.how == "batches of 8 (samples have no gradients of their own)"
    assert (found.num_vectors, found.batch_size) == (12, 8)
    g = np.stack([part.gradient().double().numpy() for part in risk.parts()])
    assert found.trace_covariance == pytest.approx(8 * g.var(0, ddof=1).sum(), rel=1e-4)
    with pytest.raises(TypeError, match=r"must have 8 batches of one size .* got 2"):
        sh.gradient_noise(with_batchnorm(48))
    with pytest.raises(TypeError, match="`metric` and `unit` must be"):
        sh.gradient_noise(risk, metric="hessian")


def test_batches_of_a_closure_are_samples_for_the_same_noise():
    risk = classifier(80)
    x, y = risk.full_batch()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 80, 8)] + [(x[:3], y[:3])]
    closed = sh.EmpiricalRisk(
        risk.model, data=batches, closure=lambda m, b: nn.CrossEntropyLoss()(m(b[0]), b[1])
    )
    found = sh.gradient_noise(closed)
    assert (found.num_vectors, found.batch_size) == (10, 8)
    expected = torch.stack(
        [risk.subset(range(i, i + 8)).gradient() for i in range(0, 80, 8)]
    )
    assert found.trace_covariance == pytest.approx(8 * float(expected.var(0).sum()))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("metric", "fisher"),
        ("unit", "token"),
        ("population", "all"),
        ("confidence", 1.0),
        ("num_samples", 7),
        ("num_batches", 4),
        ("seed", 0.5),
    ],
)
def test_arguments_outside_their_range_are_named(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must") as caught:
        sh.gradient_noise(classifier(), **{argument: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


def test_too_few_samples_are_refused():
    with pytest.raises(TypeError, match="must have at least 8 samples; got 7"):
        sh.gradient_noise(classifier(7))
    with pytest.raises(TypeError, match="must have 64 samples for 32 batches"):
        sh.gradient_noise(classifier(), metric="hessian")


def test_time_that_is_up_leaves_no_number():
    found = sh.gradient_noise(classifier(), max_seconds=0)
    assert found.status == "max_seconds"
    assert math.isnan(found.noise_scale)
    assert str(found).startswith("noise_scale unknown")


# -- promises ---------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["identity", "gauss_newton", "sign"])
def test_the_model_and_random_states_stay(metric):
    risk = classifier(100)
    risk.model[0].weight.grad = torch.ones_like(risk.model[0].weight)
    before, states = fingerprint(risk.model), random_states()
    sh.gradient_noise(risk, metric=metric)
    assert_same(before, fingerprint(risk.model))
    assert_states(states, random_states())


def test_the_result_comes_back_from_its_file(tmp_path):
    found = sh.gradient_noise(classifier())
    again = json.loads(to_line(found))
    assert again["noise_scale"] == found.noise_scale
    assert again["settings"]["population"] == "distribution"
    found.save(tmp_path / "noise.safetensors")
    assert sh.load_result(tmp_path / "noise.safetensors") == found


# Sampling: 0.935 lies three standard errors below 95 % of 2000.
DELTAS = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 4, 50])
@pytest.mark.parametrize("delta", DELTAS)
def test_the_interval_covers(delta, dim):
    """Of the distribution's noise scale, in 2000 samples of 200; G = 0 included."""
    truth = true_scale(delta, dim)
    covered = 0
    for seed in range(2000):
        draw = np.random.default_rng(seed)
        x, e = draw.standard_normal((200, dim)), draw.standard_normal(200)
        g = x * (delta * x[:, :1] - e[:, None])
        found = vectors(g).found(1.0, 0.95)
        low, high = found["interval"]
        covered += low <= truth and (high is None or truth <= high)
    assert covered / 2000 >= 0.935


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.0, 0.1, 1.0])
def test_the_whole_measure_covers(delta):
    """The same through a risk, with per-sample gradients by vmap."""
    found = [
        sh.gradient_noise(regression(delta, 100, 4, s), progress=False) for s in range(400)
    ]
    covered = np.mean([holds(f, true_scale(delta, 4)) for f in found])
    assert covered >= 0.917  # three standard errors below 95 %


# -- what the number depends on ----------------------------------------------------------


def test_rate_and_optimizer_are_kept_and_change_no_number():
    risk = classifier()
    optimizer = torch.optim.SGD(risk.model.parameters(), lr=0.05, momentum=0.9)
    plain = sh.gradient_noise(risk)
    assert plain.settings["training"] is None
    known = {"learning_rate": 0.05, "momentum": 0.9, "dampening": 0, "nesterov": False}
    for given, name in ((optimizer, "SGD"), (optimizer.state_dict(), None)):
        found = sh.gradient_noise(risk, optimizer=given)
        expected = {"optimizer": name, **known, "weight_decay": 0}
        assert found.settings["training"] == expected
        assert found.interval == plain.interval
        json.loads(to_line(found))
    facts = {"learning_rate": 0.1, "batch_size": 8}
    assert sh.gradient_noise(risk, optimizer=facts).settings["training"] == facts


def test_groups_that_differ_are_told_apart():
    risk = classifier()
    first, *others = risk.model.parameters()
    groups = [{"params": [first], "lr": 0.1}, {"params": others}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    found = sh.gradient_noise(risk, optimizer=optimizer).settings["training"]
    assert found == {
        "optimizer": "Adam",
        "learning_rate": [0.1, 1e-3],
        "betas": [0.9, 0.999],
        "weight_decay": 0,
    }


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"`optimizer` must be .*; got float"):
        sh.gradient_noise(classifier(), optimizer=0.1)
