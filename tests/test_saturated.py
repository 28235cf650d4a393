"""float32 where a loss has saturated, and where a rise is smaller than rounding."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import ONE_SAMPLE, Point, quadratic
from torch import Tensor, nn

import sharpness as sh

WEIGHT = torch.tensor([1.0, 0.5, 2.0])
CLASS_LOSSES = {
    "module": nn.CrossEntropyLoss(),
    "weighted": nn.CrossEntropyLoss(WEIGHT),
    "function": F.cross_entropy,
    "lambda": lambda o, y: F.cross_entropy(o, y),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "probabilities": lambda o, y: F.cross_entropy(o, F.one_hot(y, 3).to(o.dtype)),
    "margin": nn.MultiMarginLoss(margin=50.0),
}
SATURATED = [name for name in CLASS_LOSSES if name != "margin"]


def saturated(value: float, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple]:
    """A network whose every sample is classified with a loss of about `value`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 6, generator=generator)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    best, second = model(x).topk(2).values.T
    x = x[(best - second).argsort(descending=True)[:60]]
    labels = model(x).argmax(1)
    low, high = 0.0, 1e6
    for _ in range(60):
        scale = (low + high) / 2
        f = float(F.cross_entropy(scale * model(x).double().detach(), labels))
        low, high = (low, scale) if f < value else (scale, high)
    model[2].weight.data *= low
    model[2].bias.data *= low
    return model.to(dtype), (x.to(dtype), labels)


def pair_of_risks(value: float, name: str) -> tuple[sh.EmpiricalRisk, sh.EmpiricalRisk]:
    """The same risk with a float32 model, and in float64 by another way than `double`."""
    model, (x, y) = saturated(value)
    loss = CLASS_LOSSES[name]
    exact = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
    wide = copy.deepcopy(model).double()
    return (
        sh.EmpiricalRisk(model, loss, (x, y)),
        sh.EmpiricalRisk(wide, exact, (x.double(), y)),
    )


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", SATURATED)
@pytest.mark.parametrize("value", [1e-2, 1e-6, 1e-9])
def test_value_gradient_and_product_keep_their_digits_r7(value, name):
    risk, exact = pair_of_risks(value, name)
    v = torch.linspace(-1, 1, risk.n)
    assert risk.settings()["loss_dtype"] == "float64"
    assert risk.value() == pytest.approx(exact.value(), rel=1e-4)
    assert relative(risk.gradient(), exact.gradient()) < 1e-4
    assert relative(risk.hvp(v), exact.hvp(v.double())) < 1e-4
    assert risk.hvp(v).dtype == risk.gradient().dtype == torch.float32


@pytest.mark.parametrize("matrix", ["gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize("engine", ["kept_graph", "compiled"])
def test_so_do_other_matrices_and_engines(matrix, engine, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # the trace is what matters
    model, (x, y) = saturated(1e-8)
    risk = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y), engine=engine)
    exact = sh.EmpiricalRisk(
        copy.deepcopy(model).double(), nn.CrossEntropyLoss(), (x.double(), y)
    )
    v = torch.linspace(-1, 1, risk.n)
    assert relative(risk.product(v, matrix), exact.product(v.double(), matrix)) < 1e-4


def test_binary_cross_entropy_keeps_its_digits_too():
    x = torch.linspace(18, 22, 9)[:, None]
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0), model.bias.zero_()
    risk = sh.EmpiricalRisk(model, nn.BCEWithLogitsLoss(), (x, torch.ones(9, 1)))
    s = torch.sigmoid(-x.double())
    assert risk.gradient()[1] == pytest.approx(-float(s.mean()), rel=1e-5)
    curvature = float((s * (1 - s) * x.double() ** 2).mean())
    assert risk.hvp(torch.tensor([1.0, 0.0]))[0] == pytest.approx(curvature, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_of_lambda_max_holds_at_a_loss_of_1e_minus_9(seed):
    risk, exact = pair_of_risks(1e-9, "module")
    true = float(torch.linalg.eigvalsh(exact.hvp(torch.eye(risk.n).double()))[-1])
    found = sh.eigenpairs(risk, seed=seed, progress=False)
    assert abs(found.lambda_max - true) <= float(found.error_bounds[0]) < 0.05 * true


def captured(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, WEIGHT)  # whose type cannot be changed


def asserting(outputs: Tensor, targets: Tensor) -> Tensor:
    assert outputs.dtype == torch.float32
    return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("loss", [captured, asserting])
def test_a_loss_that_takes_float32_only_stays_in_float32(loss):
    model, data = saturated(0.1)
    risk = sh.EmpiricalRisk(model, loss, data)
    assert risk.settings()["loss_dtype"] == "float32"
    assert risk.value() == pytest.approx(float(loss(model(data[0]), data[1]).detach()))
    assert torch.isfinite(risk.hvp(torch.ones(risk.n))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_have_a_loss_in_float64(dtype):
    model, (x, y) = saturated(0.1, dtype)
    risk = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y))
    outputs = model(x).double()
    assert risk.value() == pytest.approx(float(F.cross_entropy(outputs, y).detach()))


def test_targets_and_the_loss_itself_are_left_as_they_were():
    model, (x, y) = saturated(0.1)
    loss, targets = nn.CrossEntropyLoss(WEIGHT.clone()), F.one_hot(y, 3).float()
    risk = sh.EmpiricalRisk(model, loss, (x, targets))
    risk.hvp(torch.ones(risk.n))
    assert loss.weight.dtype == targets.dtype == torch.float32
    assert risk.targets.dtype == torch.float32
    assert {p.dtype for p in risk.network().parameters()} == {torch.float32}


# -- in float64 throughout ---------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("batchnorm", [None, "running", "batch", "recalibrated"])
def test_double_is_the_risk_of_the_model_in_float64(name, batchnorm):
    model, (x, y) = saturated(1e-3)
    if batchnorm:
        model = nn.Sequential(nn.BatchNorm1d(6), *model)
    loss = CLASS_LOSSES[name]
    exact = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
    mode = batchnorm or "running"
    found = sh.EmpiricalRisk(model, loss, (x, y), batchnorm=mode).double()
    wide = copy.deepcopy(model).double()
    true = sh.EmpiricalRisk(wide, exact, (x.double(), y), batchnorm=mode)
    v = torch.linspace(-1, 1, found.n).double()
    assert found.dtype == torch.float64
    assert torch.equal(found.theta, true.theta)
    assert found.value() == pytest.approx(true.value(), rel=1e-14)
    there = found.theta + 0.1 * v
    assert found.value(there) == pytest.approx(true.value(there), rel=1e-13)
    assert torch.allclose(found.gradient(), true.gradient(), rtol=1e-12, atol=1e-18)
    assert torch.allclose(found.hvp(v), true.hvp(v), rtol=1e-12, atol=1e-18)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_double_of_a_closure_casts_its_batches():
    model, batch = nn.Linear(3, 1), {"x": torch.randn(5, 3), "ids": torch.arange(5)}
    seen = []

    def closure(m: nn.Module, b: dict) -> Tensor:
        seen.append((b["x"].dtype, b["ids"].dtype))
        return m(b["x"]).square().mean()

    risk = sh.EmpiricalRisk(model, closure=closure, data=[batch])
    value = risk.value()
    assert risk.double().value() == pytest.approx(value, rel=1e-5)
    assert seen[-1] == (torch.float64, torch.int64)
    assert risk.value() == value
    assert seen[-1] == (torch.float32, torch.int64)


# -- phi below rounding ------------------------------------------------------------


def highest(exact: sh.EmpiricalRisk, epsilon: float) -> float:
    """What no point of the box exceeds to second order: sum |g_i| h_i + h |H| h / 2."""
    hessian = exact.hvp(torch.eye(exact.n).double())
    value, gradient = exact.value_and_gradient()
    h = epsilon * (exact.theta.abs() + 1)
    rise = gradient.abs() @ h + 0.5 * h @ hessian.abs() @ h
    return 100 * float(rise) / (1 + value)


@pytest.mark.parametrize("value", [0.1, 1e-4, 1e-7])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-8])
def test_phi_in_a_tiny_box_is_no_rounding(value, epsilon):
    risk, exact = pair_of_risks(value, "module")
    found = sh.epsilon_sharpness(risk, epsilon, progress=False)
    assert found.dtype == "float64"
    assert found.displacement.dtype == torch.float32
    bound = highest(exact, epsilon)
    assert 0.9 * bound < found.phi <= (1 + 1e-3) * bound
    assert found.phi_protocol <= found.phi
    assert found.num_evals > sh.epsilon_sharpness(exact, epsilon, progress=False).num_evals


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_at_a_minimum_a_tiny_box_gives_its_closed_form(offset):
    risk = quadratic(torch.ones(5), torch.full((5,), 2.0), offset=offset)
    found = sh.epsilon_sharpness(risk, 1e-5, progress=False)
    exact = 100 * 5 * 0.5 * 3e-5**2 / (1 + offset)
    assert found.phi == pytest.approx(exact, rel=1e-6)
    assert found.dtype == "float64"


@pytest.mark.parametrize(("offset", "dtype"), [(0.0, "float32"), (1e4, "float64")])
def test_in_a_usual_box_float64_is_for_a_rise_that_f_drowns(offset, dtype):
    risk = quadratic(torch.ones(5), torch.full((5,), 2.0), offset=offset)
    found = sh.epsilon_sharpness(risk, 1e-2, progress=False)
    exact = 100 * 5 * 0.5 * 3e-2**2 / (1 + offset)
    assert (found.phi, found.dtype) == (pytest.approx(exact, rel=1e-4), dtype)


def test_in_a_subspace_the_columns_are_the_same():
    risk, exact = pair_of_risks(0.1, "module")
    found, true = (
        sh.epsilon_sharpness(r, 1e-7, subspace_dim=3, seed=4, progress=False)
        for r in (risk, exact)
    )
    assert found.dtype == true.dtype == "float64"
    assert found.phi == pytest.approx(true.phi, rel=1e-4)


def test_where_there_is_no_float64_a_rise_in_doubt_is_none():
    def closure(model: nn.Module, _: object) -> Tensor:
        assert_float32(model.theta)
        return 1 + 0.5 * model.theta.square().sum()

    def assert_float32(theta: Tensor) -> None:
        if theta.dtype != torch.float32:
            raise RuntimeError("expected float32")

    risk = sh.EmpiricalRisk(Point(torch.zeros(3)), closure=closure, data=ONE_SAMPLE)
    found = sh.epsilon_sharpness(risk, [1.0, 1e-4], progress=False)
    assert found[0].status.ok
    assert found[0].phi > 0
    assert (found[1].phi, found[1].status) == (0.0, "line_search_failed")
    assert found[1].value_max == found[1].value
    assert "rounding" in found[1].message
