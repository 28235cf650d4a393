"""Which measures survive other parameters of the same function, and which do not."""

from __future__ import annotations

import copy
import json
import math
from functools import cache

import pytest
import torch
from helpers.problems import quadratic
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

import sharpness as sh
from sharpness._json import to_line
from sharpness.measures import audit as audits
from sharpness.measures import perturbation
from sharpness.measures import summary as summaries
from sharpness.measures.audit import AUDITED, Audit, AuditRow
from sharpness.measures.reparametrise import reparametrisations
from sharpness.results import Status
from sharpness.risk.empirical import EmpiricalRisk

MAPS = ["layers", "neurons", "batchnorm", "batchnorm-neurons"]
WHOLE = ["layers", "batchnorm"]
MOVING = [
    "lambda_max",
    "trace",
    "phi(1e-3)",
    "worst_l2(0.05)",
    "sam_l2(0.05)",
    "average(0.01)",
    "gradient_norm",
    "parameter_norm",
]
STAYING = [
    "worst_l2_elementwise(0.5)",
    "sam_l2_elementwise(0.5)",
    "worst_linf_elementwise(2e-3)",
    "sam_linf_elementwise(2e-3)",
    "average_elementwise(0.1)",
    "fisher_rao",  # theta^T F theta: both sides of F are scaled back
]


def samples(num: int = 40) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    y = torch.arange(num) % 3
    x = torch.randn((num, 4), generator=draw, dtype=torch.float64)
    return x + 1.5 * torch.eye(3, 4, dtype=torch.float64)[y], y


def trained(network: nn.Module) -> nn.Module:
    """Some steps of full-batch descent, BatchNorm on batch statistics."""
    draw = torch.Generator().manual_seed(0)
    network = network.double()
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64)
            p.copy_(noise / 2 + (1 if p.ndim == 1 else 0))
    x, y = samples()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network


@cache
def normed() -> nn.Module:
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()]
    return trained(nn.Sequential(*layers, nn.Linear(4, 3)))


@cache
def rectified() -> nn.Module:
    return trained(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))


def risk_of(network: nn.Module, loss=None, data=None, **settings) -> EmpiricalRisk:
    return EmpiricalRisk(
        network, loss or nn.CrossEntropyLoss(), data or samples(), **settings
    )


@cache
def audited() -> Audit:
    """All audited measures of the network with BatchNorm."""
    return sh.audit(risk_of(normed()))


def dense_top(network: nn.Module) -> float:
    """The largest eigenvalue of the Hessian, all of it, without the library."""
    x, y = samples()
    network = network.eval()
    named = dict(network.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def value(theta: Tensor) -> Tensor:
        pieces = zip(named.items(), theta.split(sizes), strict=True)
        moved = {name: piece.view_as(p) for (name, p), piece in pieces}
        return nn.functional.cross_entropy(functional_call(network, moved, (x,)), y)

    theta = torch.cat([p.detach().flatten() for p in named.values()])
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(value, theta))[-1])


# -- what moves and what stays -------------------------------------------------------


def test_all_four_maps_are_applied_and_change_no_output():
    found = audited()
    assert list(found.drifts) == list(found.layers) == MAPS
    assert all(drift <= 1e-12 for drift in found.drifts.values())
    assert found.layers["layers"] == found.layers["neurons"] == ("1", "3")
    assert found.layers["batchnorm"] == found.layers["batchnorm-neurons"] == ("0",)
    assert found.status == "completed"
    assert found.seconds > 0


def test_every_audited_measure_has_its_rows():
    names = {row.measure.partition("(")[0] for row in audited().rows}
    assert set(AUDITED) - {"norms"} <= names
    assert {*MOVING, *STAYING} <= {row.measure for row in audited().rows}
    for row in audited().rows:
        assert list(row.after) == list(row.allowed) == MAPS
        assert math.isfinite(row.value)


@pytest.mark.parametrize("measure", MOVING)
def test_what_counts_distances_in_parameters_moves(measure):
    row = audited()[measure]
    assert row.moved("layers")
    assert row.moved("neurons")
    assert not row.invariant
    assert measure not in audited().invariant


@pytest.mark.parametrize("measure", STAYING)
def test_what_counts_distances_in_weights_stays_to_rounding(measure):
    row = audited()[measure]
    assert row.invariant
    assert measure in audited().invariant
    for name in MAPS:
        assert row.after[name] == pytest.approx(row.value, rel=1e-9)


@pytest.mark.parametrize("measure", ["worst_l2_filterwise(0.05)", "relative_flatness"])
def test_what_counts_by_layers_or_filters_stays_under_maps_of_whole_layers(measure):
    row = audited()[measure]
    for name in WHOLE:
        assert not row.moved(name)
        assert row.after[name] == pytest.approx(row.value, rel=1e-9)
    assert row.moved("neurons")
    assert measure not in audited().invariant


def test_lambda_max_after_each_map_is_that_of_the_dense_hessian():
    row, risk = audited()["lambda_max"], risk_of(normed())
    assert row.value == pytest.approx(dense_top(risk.network()), rel=1e-2)
    for found in reparametrisations(risk.network().eval(), risk.probe_inputs(), seed=0):
        oracle = dense_top(found.network)
        assert row.after[found.name] == pytest.approx(oracle, rel=1e-2)


def with_floor(risk: EmpiricalRisk, adaptive: str | None) -> Tensor:
    return risk.theta.abs() + 0.01


def test_an_additive_floor_in_the_perturbation_scale_is_seen_to_move(monkeypatch):
    risk = risk_of(rectified())
    names = ["worst_l2_elementwise", "average_elementwise"]
    settings = {"rho": (0.05,), "margin": 1e-3}
    honest = sh.audit(risk, names, **settings)
    assert len(honest.invariant) == 3
    monkeypatch.setattr(perturbation, "perturbation_scale", with_floor)
    assert sh.audit(risk, names, **settings).invariant == ()


@pytest.mark.parametrize("name", ["average", "pac_bayes_sigma", "relative_flatness"])
def test_the_spread_over_draws_that_are_shared_allows_nothing(name):
    risk = risk_of(rectified())
    errors = [r.error for r in sh.summary(risk, [name], rho=(0.05,)).readings()]
    (row,) = sh.audit(risk, [name], rho=(0.05,), margin=0.0).rows
    assert errors[0] > 0
    assert {*row.allowed.values()} == {0.0}


def test_float32_is_enough_to_tell():
    x, y = samples()
    risk = risk_of(copy.deepcopy(rectified()).float(), data=(x.float(), y))
    names = ["lambda_max", "worst_l2", "worst_l2_elementwise", "norms"]
    found = sh.audit(risk, names)
    assert all(drift <= 1e-6 for drift in found.drifts.values())
    assert {"lambda_max", "worst_l2(0.05)"}.isdisjoint(found.invariant)
    assert {"worst_l2_elementwise(0.5)", "fisher_rao"} <= set(found.invariant)


# -- arguments -----------------------------------------------------------------------


def as_numbers(found: Audit) -> list:
    return [(row.measure, row.value, row.after, row.allowed) for row in found.rows]


def test_the_same_seed_gives_the_same_numbers_and_another_one_others():
    risk, names = risk_of(rectified()), ["lambda_max", "average", "worst_l2_elementwise"]
    first, again, other = (sh.audit(risk, names, seed=s) for s in (3, 3, 4))
    assert as_numbers(first) == as_numbers(again)
    assert first.settings["seed"] == 3
    assert first["lambda_max"].after["neurons"] != other["lambda_max"].after["neurons"]
    assert first["average(0.01)"].value != other["average(0.01)"].value


def test_measures_and_their_settings_are_those_of_summary():
    risk = risk_of(rectified())
    names = ["phi", "worst_l2", "norms"]
    found = sh.audit(risk, names, epsilon=(1e-4,), rho=(0.1,), seed=2)
    plain = sh.summary(risk, names, epsilon=(1e-4,), rho=(0.1,), seed=2)
    assert [(r.measure, r.value) for r in found.rows] == [
        (r.name, r.value) for r in plain.readings()
    ]
    assert found.rows[0].measure == "phi(1e-4)"
    with pytest.raises(ValueError, match=r"`measures` must be of .*Did you mean trace\?"):
        sh.audit(risk, ["trase"])


def test_the_measures_are_taken_once_more_for_each_map(monkeypatch):
    calls, real = [], audits.summary
    monkeypatch.setattr(
        audits, "summary", lambda *a, **k: (calls.append(k["seed"]), real(*a, **k))[1]
    )
    sh.audit(risk_of(normed()), "norms", seed=6)
    assert calls == [6] * 5


def test_a_tolerance_above_any_change_leaves_everything_in_place():
    found = sh.audit(risk_of(rectified()), ["lambda_max", "norms"], margin=1e9)
    assert found.invariant == tuple(row.measure for row in found.rows)


def test_a_risk_without_inputs_or_with_several_outputs_is_refused():
    with pytest.raises(TypeError, match="closure") as error:
        sh.audit(quadratic([1.0, 2.0]))
    assert "\n" not in str(error.value)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x), x

    loss = nn.functional.cross_entropy
    risk = risk_of(Two(), lambda out, y: loss(out[0], y), terms=len)
    with pytest.raises(TypeError, match="`model` must return one tensor") as error:
        sh.audit(risk, "norms")
    assert "\n" not in str(error.value)


def test_the_model_and_the_random_generators_are_left_as_they_were():
    network = copy.deepcopy(normed()).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    random = torch.get_rng_state()
    sh.audit(risk_of(network), ["lambda_max", "norms"])
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# -- networks of another kind --------------------------------------------------------


def tanh_risk() -> EmpiricalRisk:
    return risk_of(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())


def test_a_network_that_no_map_applies_to_is_not_available():
    found = sh.audit(tanh_risk(), ["lambda_max", "norms"])
    assert found.status == "not_available"
    assert not found.status.ok
    assert found.drifts == found.layers == {}
    assert "no map applies" in str(found)
    assert len(found.readings()) == len(found.rows)
    assert all(math.isfinite(row.value) for row in found.rows)


def test_nothing_is_called_invariant_where_no_map_was_applied():
    found = sh.audit(tanh_risk(), ["lambda_max"])
    assert "invariant" not in found.table()
    assert all("invariant" not in reading.evidence for reading in found.readings())


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.Hardtanh])
def test_what_bends_only_beyond_the_first_samples_is_seen_on_all_of_them(kind):
    x, y = samples()
    x[:16] *= 1e-3
    x[16:] *= 10
    network = nn.Sequential(nn.Linear(4, 6, bias=False), kind(), nn.Linear(6, 3)).double()
    found = sh.audit(risk_of(network, data=(x, y)), "norms")
    assert all(drift <= 1e-6 for drift in found.drifts.values())


def test_a_first_layer_that_works_in_place_leaves_the_data_of_the_risk_alone():
    network = nn.Sequential(nn.LeakyReLU(0.5, inplace=True), *rectified())
    risk = risk_of(network)
    value = risk.value()
    found = sh.audit(risk, "norms")
    assert risk.value() == value
    assert found.layers["layers"] == ("1",)


def test_a_pruned_network_is_audited_or_left_alone():
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    prune.l1_unstructured(network[0], "weight", amount=0.3)
    found = sh.audit(risk_of(network), "norms")
    assert all(drift <= 1e-12 for drift in found.drifts.values())


def test_several_inputs_in_a_dict_are_no_trouble():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = rectified()

        def forward(self, a, b):
            return self.body(a + b)

    x, y = samples()
    found = sh.audit(risk_of(Sum(), data=({"a": x / 3, "b": 2 * x / 3}, y)), "norms")
    assert found.layers["layers"] == ("body.0",)
    assert "fisher_rao" in found.invariant


# -- numbers that are not there ------------------------------------------------------


def test_a_measure_without_a_number_is_not_called_invariant():
    x, _ = samples()
    risk = risk_of(rectified(), nn.MSELoss(), (x, x[:, :3].clone()))
    found = sh.audit(risk, ["pac_bayes_sigma", "norms"])
    assert math.isnan(found["pac_bayes_sigma"].value)
    assert "pac_bayes_sigma" not in found.invariant
    assert "fisher_rao" in found.invariant
    json.loads(to_line({"audit": found}), parse_constant=pytest.fail)


def test_a_number_without_an_error_bound_is_not_called_invariant():
    found = sh.audit(risk_of(rectified()), ["trace"], max_seconds=0.0)
    assert found.invariant == ()


@pytest.mark.parametrize("at", [1, 60])
def test_an_interrupt_is_either_passed_on_or_told(monkeypatch, at):
    calls: list[int] = []
    gradient = EmpiricalRisk.value_and_gradient

    def failing(self, theta=None):
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt
        return gradient(self, theta)

    risk = risk_of(rectified())
    monkeypatch.setattr(
        summaries, "expected_seconds", lambda _, names, __: dict.fromkeys(names, 1.0)
    )
    monkeypatch.setattr(EmpiricalRisk, "value_and_gradient", failing)
    try:
        found = sh.audit(risk, ["worst_l2", "worst_linf", "norms"])
    except KeyboardInterrupt:
        pass
    else:
        assert found.status == "interrupted"
    assert len(calls) <= at + 1


def test_a_constant_loss_is_audited_without_a_crash():
    risk = risk_of(rectified(), lambda out, y: 0 * out.sum() + 1)
    found = sh.audit(risk, ["lambda_max", "worst_l2", "norms"])
    assert found["gradient_norm"].value == 0
    assert found["gradient_norm"].invariant


# -- how it is shown -----------------------------------------------------------------


def row(value: float, after: float, allowed: float = 0.1, name: str = "a") -> AuditRow:
    return AuditRow(
        measure=name, value=value, after={"layers": after}, allowed={"layers": allowed}
    )


@pytest.mark.parametrize(
    ("value", "after", "moved", "factor"),
    [
        (2.0, 8.0, True, 4.0),
        (8.0, 2.0, True, 4.0),
        (-8.0, -2.0, True, 4.0),
        (2.0, 2.0625, False, 1.03125),
        (2.0, 2.25, True, 1.125),
        (0.0, 0.0, False, 1.0),
        (0.0, 3.0, True, math.inf),
        (1.0, -1.0, True, math.inf),
        (1.0, math.nan, True, math.nan),
        (math.nan, 1.0, True, math.nan),
    ],
)
def test_a_value_has_moved_when_it_changed_beyond_what_is_allowed(
    value, after, moved, factor
):
    found = row(value, after)
    assert found.moved("layers") is moved
    assert found.invariant is not moved
    reading = of_rows(found).readings()[0]
    assert reading.name == "audit a"
    assert reading.value == factor or (math.isnan(factor) and math.isnan(reading.value))
    assert ("layers" in reading.evidence) is moved


def of_rows(*rows: AuditRow) -> Audit:
    return Audit(
        rows=rows,
        drifts={"layers": 3e-8},
        layers={"layers": ("0",)},
        status=Status.COMPLETED,
    )


def test_the_table_tells_by_which_factor_each_map_moved_a_measure():
    found = of_rows(row(2.0, 8.0, name="sharp"), row(5.0, 5.0, name="flat"))
    lines = {
        line.split()[0]: line.split() for line in found.table().splitlines() if line.strip()
    }
    assert lines["measure"][-1] == "verdict"
    assert lines["sharp"][1:] == ["2.000", "×", "4", "moved"]
    assert lines["flat"][1:] == ["5.000", "same", "invariant"]
    assert "layers 3e-08" in found.table()
    assert "invariant are flat" in str(found)
    assert "moved are sharp" in str(found)
