"""Derivatives that are not those of f are seen, and those that are raise no alarm."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import generator, normal
from torch import Tensor, nn

import sharpness as sh
from sharpness.lab import networks
from sharpness.measures import flatness, traces
from sharpness.results import DerivativeDisagreesError, Status
from sharpness.risk.derivatives import Derivatives

QUIET = {"progress": False}


class Through(nn.Module):
    """Two layers with a function of (model, x) in the place of the forward pass."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def built(function, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Through(function).to(dtype)


def data(dtype=torch.float64, rows=40):
    draw = generator(0)
    y = torch.randint(3, (rows,), generator=draw)
    return normal(draw, rows, 4).to(dtype), y


def risk_of(function, dtype=torch.float64, **settings):
    return sh.EmpiricalRisk(
        built(function, dtype), nn.CrossEntropyLoss(), data(dtype), **settings
    )


def plain(m, x):
    return m.last(torch.tanh(m.first(x)))


class Rounded(torch.autograd.Function):
    """Straight through: a step function with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


class Weaker(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.97 * grad


def quantised(w: Tensor) -> Tensor:
    return w + ((8 * w).round() / 8 - w).detach()


# -- gradients ---------------------------------------------------------------------------

CUT = {
    "numpy": lambda m, x: m.last(torch.from_numpy(np.tanh(m.first(x).detach().numpy()))),
    "a detached layer": lambda m, x: m.last(torch.tanh(m.first(x)).detach()),
    "a number taken out": lambda m, x: plain(m, x) * m.first.weight.norm().item(),
    ".data": lambda m, x: F.linear(torch.tanh(m.first(x)), m.last.weight.data),
    "a target network": lambda m, x: plain(m, x) - plain(m, -x).detach() / 2,
    "gradient reversal": lambda m, x: 2 * plain(m, x).detach() - plain(m, x),
    "straight through": lambda m, x: m.last(Rounded.apply(torch.tanh(m.first(x)))),
    "quantised weights": lambda m, x: F.linear(m.first(x), quantised(m.last.weight)),
    "three percent less": lambda m, x: Weaker.apply(plain(m, x)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", CUT)
def test_a_gradient_that_is_not_that_of_f_is_never_converged(kind, dtype):
    risk = risk_of(CUT[kind], dtype)
    with torch.no_grad():
        value = F.cross_entropy(risk.model(risk.full_batch()[0]), risk.targets)
    assert risk.value() == pytest.approx(float(value), rel=1e-6)
    pairs = sh.eigenpairs(risk, **QUIET)
    assert pairs.status is Status.DERIVATIVE_DISAGREES
    assert "unknown" in str(pairs)
    assert "derivative_disagrees" in str(pairs)
    assert any("where differences give" in note for note in risk.notes)
    for call in (risk.gradient, lambda: risk.hvp(risk.theta)):
        with pytest.raises(DerivativeDisagreesError, match="`model` must have") as error:
            call()
        assert len(str(error.value)) <= 200
    as_it_comes = risk_of(CUT[kind], dtype, check=False)
    assert as_it_comes.gradient().isfinite().all()
    assert not sh.doctor(risk).ok


MEASURES = {
    "eigenpairs": sh.eigenpairs,
    "gauss_newton": lambda r, **_: sh.eigenpairs(r, matrix="gauss_newton", **QUIET),
    "layers": sh.layerwise_eigenpairs,
    "trace": sh.trace,
    "fisher": lambda r, **_: sh.trace(r, matrix="empirical_fisher", **QUIET),
    "frobenius_norm": traces.frobenius_norm,
    "diagonal": traces.diagonal,
    "spectral_density": sh.spectral_density,
    "phi": lambda r, **_: sh.epsilon_sharpness(r, 1e-3, **QUIET),
    "phi by scipy": lambda r, **_: sh.epsilon_sharpness(r, 1e-3, solver="scipy", **QUIET),
    "worst case": lambda r, **_: sh.worst_case_sharpness(r, 0.05, **QUIET),
    "shards": lambda r, **_: sh.worst_case_sharpness(r, 0.05, shard_size=10, **QUIET),
    "norms": lambda r, **_: sh.norms(r),
    "box_alpha": flatness.box_alpha,
    "relative_flatness": flatness.relative_flatness,
    "lambda_max_sampling": sh.lambda_max_sampling,
    "summary": lambda r, **_: sh.summary(r, ["spectrum"], **QUIET),
    "tracker": lambda r, **_: sh.SharpnessTracker(
        r.model, r.loss, [r.full_batch()], measures=("lambda_max", "phi")
    ).history[0],
}


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_that_needs_derivatives_says_so(name):
    found = MEASURES[name](risk_of(CUT["straight through"]), **QUIET)
    assert found.status is Status.DERIVATIVE_DISAGREES
    assert "derivative_disagrees" in str(found)


def test_a_summary_notes_both_numbers():
    found = sh.summary(risk_of(CUT["a detached layer"]), ["norms"], **QUIET)
    assert any("where differences give" in note for note in found.notes)


def test_more_than_half_is_seen_where_the_model_has_one_type_only():
    def sound(m, x):
        return plain(m, x.float())

    def reversed_(m, x):
        return 2 * sound(m, x).detach() - sound(m, x)

    assert risk_of(sound, torch.float32).gradient().any()
    with pytest.raises(DerivativeDisagreesError):
        risk_of(reversed_, torch.float32).gradient()


def test_kinks_where_data_and_biases_are_zero_raise_no_alarm():
    def kinked(m, x):
        return m.last(torch.relu(m.first(x)))

    model = built(kinked)
    nn.init.zeros_(model.first.bias)
    x, y = data()
    risk = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (torch.zeros_like(x), y))
    assert sh.eigenpairs(risk, **QUIET).status.ok


# -- second derivatives ------------------------------------------------------------------


class Saved(torch.autograd.Function):
    """tanh whose derivative is held fixed."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 1 - x.detach().tanh() ** 2
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


class Slope(torch.autograd.Function):
    """softplus whose derivative is computed without a graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            slope = ctx.saved_tensors[0].sigmoid()
        return grad * slope


HALF_RIGHT = {
    "saved": (lambda m, x: m.last(Saved.apply(m.first(x))), plain),
    "no graph": (
        lambda m, x: m.last(Slope.apply(m.first(x))),
        lambda m, x: m.last(F.softplus(m.first(x))),
    ),
}


@pytest.mark.parametrize("kind", HALF_RIGHT)
def test_differences_take_the_place_of_a_wrong_second_derivative(kind):
    wrong, right = (risk_of(function) for function in HALF_RIGHT[kind])
    found, expected = (sh.eigenpairs(r, tol=1e-3, **QUIET) for r in (wrong, right))
    assert found.engine == "differences"
    assert "where differences give" in wrong.settings()["engine"]["reason"]
    assert abs(found.lambda_max - expected.lambda_max) <= float(found.error_bounds[0])
    blocks = [sh.layerwise_eigenpairs(r, tol=1e-3, **QUIET) for r in (wrong, right)]
    for mine, other in zip(*(b.blocks for b in blocks), strict=True):
        apart = abs(float(mine.eigenvalues[0] - other.eigenvalues[0]))
        assert apart <= float(mine.error_bounds[0] + other.error_bounds[0])


@pytest.mark.parametrize("kind", HALF_RIGHT)
def test_an_engine_that_was_asked_for_and_is_wrong_is_never_converged(kind):
    risk = risk_of(HALF_RIGHT[kind][0], engine="kept_graph")
    assert sh.eigenpairs(risk, **QUIET).status is Status.DERIVATIVE_DISAGREES
    assert not sh.doctor(risk).ok
    unchecked = risk_of(HALF_RIGHT[kind][0], engine="kept_graph", check=False)
    assert sh.eigenpairs(unchecked, **QUIET).status.ok


def norm_at_zero(m, x):
    z = plain(m, x)
    return z + torch.linalg.vector_norm(z - z, dim=1, keepdim=True)


def far_apart(m, x):
    z = plain(m, x)
    return torch.logaddexp(z, z / 2 - 900)


@pytest.mark.parametrize("function", [far_apart, norm_at_zero])
def test_differences_take_the_place_of_a_second_derivative_that_is_nan(function):
    risk, right = risk_of(function), risk_of(plain)
    found, expected = (sh.eigenpairs(r, tol=1e-3, **QUIET) for r in (risk, right))
    assert found.status.ok
    assert found.engine == "differences"
    assert found.lambda_max == pytest.approx(expected.lambda_max, rel=1e-2)
    assert "not finite" in risk.settings()["engine"]["reason"]
    layers = sh.layerwise_eigenpairs(risk_of(function), **QUIET)
    assert layers.status.ok
    assert sh.trace(risk_of(function), **QUIET).status.ok


# -- f -----------------------------------------------------------------------------------

OF_PRODUCTS = (
    *("eigenpairs", "layers", "trace", "frobenius_norm", "diagonal"),
    "spectral_density",
)


@pytest.mark.parametrize("name", OF_PRODUCTS)
def test_where_f_is_not_finite_nothing_is_claimed(name):
    x, y = data()
    nothing = torch.full_like(y, -100)

    def closure(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])  # 0 / 0 where all are ignored
        return loss if loss.isfinite() else loss.detach() + 0 * model.last.bias.sum()

    risk = sh.EmpiricalRisk(built(plain), closure=closure, data=[(x, y), (x, nothing)])
    assert np.isnan(risk.value())
    assert MEASURES[name](risk, **QUIET).status is Status.NON_FINITE
    assert risk.hvp(risk.theta).isnan().all()
    assert sh.doctor(risk)["finite"].status == "failed"


# -- cost --------------------------------------------------------------------------------


def rows_seen(risk, call):
    """Rows that run through the model in a call."""
    rows = []
    hook = risk.model.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )
    call()
    hook.remove()
    return sum(rows)


@pytest.mark.parametrize("num_samples", [40, 20_000])
def test_the_check_takes_a_few_passes_over_one_percent(num_samples):
    x, y = data(rows=num_samples)
    model, loss = built(plain), nn.CrossEntropyLoss()
    v = normal(generator(3), sum(p.numel() for p in model.parameters()))
    checked, unchecked = (
        rows_seen(risk, lambda risk=risk: risk.hvp(v))
        for check in (True, False)
        for risk in [sh.EmpiricalRisk(model, loss, (x, y), check=check)]
    )
    more = checked - unchecked - num_samples  # of these: f itself
    assert 0 < more <= 16 * max(32, num_samples // 100)
    assert checked < 2.2 * unchecked or num_samples < 3200


def test_it_is_made_once():
    risk = risk_of(plain)
    v = normal(generator(3), risk.n)
    first, second = (rows_seen(risk, lambda: risk.hvp(v)) for _ in range(2))
    assert first > 0 == second
    assert rows_seen(risk.subset([1, 2, 3]), risk.subset([1, 2, 3]).gradient) == 3


# -- no false alarm ----------------------------------------------------------------------

CLASSES = 4
SMALL = {
    "MLP": lambda: networks.mlp(4, 1, 16),
    "GPT": lambda: networks.gpt(7, 5, 8, 1, 2),
    "ResNet-8": lambda: networks.resnet(1, 1, CLASSES),
    "ResNet-8 without BatchNorm": lambda: networks.resnet(1, 1, CLASSES, batchnorm=False),
    "AlexNet": lambda: networks.alexnet(1, 4, CLASSES),
    "AlexNet without BatchNorm": lambda: networks.alexnet(1, 4, CLASSES, False),
}
LARGE = {
    "F1": lambda: networks.f1(16, CLASSES),
    "F2": lambda: networks.f2(16, CLASSES),
    "C1": lambda: networks.c1(1, 4, CLASSES),
    "C2": lambda: networks.c2(1, 4, CLASSES),
    "ResNet-20": lambda: networks.resnet(3, 1, CLASSES),
    "WRN-16-4": lambda: networks.wide_resnet(1, CLASSES),
}


def batch(name, seed, rows=8):
    draw = generator(seed)
    y = torch.randint(CLASSES, (rows,), generator=draw)
    if name == "MLP":
        return normal(draw, rows, 4).float(), normal(draw, rows, 1).float()
    if name == "GPT":
        tokens = torch.randint(7, (rows, 6), generator=draw)
        return tokens[:, :-1], tokens[:, 1:]
    x = normal(draw, rows, 1, 4, 4).float()
    return (x.relu() if seed % 2 else x), y  # every other: half of the pixels are black


def states(name, build, seed):
    """The network at its start, trained for a while, and saturated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        x, y = batch(name, seed)
        loss = nn.MSELoss() if name == "MLP" else nn.CrossEntropyLoss()
        yield model.eval(), loss, (x, y)
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(15):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        yield model.eval(), loss, (x, y)
        with torch.no_grad():
            [p for p in model.parameters() if p.ndim == 2][-1].mul_(30)
        yield model.eval(), loss, (x, y)


def in_type(part, dtype):
    return part.to(dtype) if part.is_floating_point() else part


def alarms(name, build, seed, dtypes):
    """Comparisons that disagree, and how many agree, over all three states."""
    wrong, agreed = [], 0
    for state, (model, loss, pair) in enumerate(states(name, build, seed)):
        for dtype in dtypes:
            given = tuple(in_type(part, dtype) for part in pair)
            risk = sh.EmpiricalRisk(copy.deepcopy(model).to(dtype), loss, given)
            seen = Derivatives()
            sample = risk._f.sample
            for found in (seen.of("gradient", sample), seen.of("product", sample)):
                agreed += found.agrees is True
                if found.disagrees:
                    wrong.append((name, seed, state, dtype, found))
    return wrong, agreed


TYPES = (torch.float64, torch.float32, torch.bfloat16)


def kinky():
    """ReLUs and a pool, at a size that takes no time."""
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(12, CLASSES)),
    )


@pytest.mark.parametrize("name", ["MLP", "kinks"])
def test_smooth_and_kinky_networks_raise_no_alarm(name):
    wrong, agreed = alarms(name, SMALL.get(name, kinky), 0, TYPES)
    assert not wrong
    assert agreed >= 12


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_networks_of_the_lab_raise_no_alarm(name):
    wrong, agreed = alarms(name, SMALL[name], 0, TYPES)
    assert not wrong
    assert agreed >= 12  # all of start and trained


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_networks_of_the_lab_raise_no_alarm(name):
    types = TYPES if name != "C2" else TYPES[1:2]  # 15 million parameters
    wrong, agreed = alarms(name, LARGE[name], 1, types)
    assert not wrong
    assert agreed >= 4 * len(types)


@pytest.mark.slow
def test_networks_of_the_lab_raise_no_alarm_over_100_seeds():
    wrong, agreed = [], 0
    for seed in range(100):
        for place, name in enumerate(SMALL):
            if name in ("MLP", "GPT") or seed % 10 == place:
                found = alarms(name, SMALL[name], seed, [TYPES[seed % 3]])
                wrong += found[0]
                agreed += found[1]
    assert not wrong
    assert agreed >= 800
