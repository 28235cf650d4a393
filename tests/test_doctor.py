"""The pre-flight: every check is seen to pass and seen to fail."""

from __future__ import annotations

import pytest
import torch
from helpers.problems import tiny_mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import sharpness as sh
from sharpness._results import Status
from sharpness.results import Checkup

QUIET = {
    *("finite", "deterministic", "symmetric", "gradient", "product", "differences"),
    *("engine", "high or low", "untouched"),
}


def checks(found: Checkup, status: str) -> set[str]:
    return {finding.check for finding in found.findings if finding.status == status}


class Through(nn.Module):
    """A tiny MLP whose hidden layer passes through a function of the test."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5).double(), nn.Linear(5, 4).double()
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def checkup_of(function, **settings) -> Checkup:
    problem = tiny_mlp()
    risk = sh.EmpiricalRisk(Through(function), problem.loss, problem.data, **settings)
    return sh.doctor(risk)


def test_a_plain_model_passes_every_check_and_has_nothing_to_note():
    found = checkup_of(torch.tanh)
    assert checks(found, "ok") == QUIET
    assert found.ok
    assert found.raise_for_status() is found
    assert "9 checks, none failed" in str(found)


def test_a_checkup_is_a_result_like_any_other(tmp_path):
    found = checkup_of(lambda h: torch.tanh(h).detach(), engine="kept_graph")
    assert found.status is Status.FAILED
    assert not found.status.ok
    assert found.settings == {"seed": 0}
    assert found.seconds > 0
    rows = {row.name: row for row in found.readings()}
    assert list(rows) == [finding.check for finding in found.findings]
    assert rows["finite"].value == found.values[0]
    assert rows["gradient"].evidence.startswith("failed: a slope of")
    assert list(found.to_frame()["name"]) == list(rows)
    assert "<td>untouched</td>" in found._repr_html_()
    found.save(tmp_path / "checkup")
    assert str(sh.load_result(tmp_path / "checkup")) == str(found)
    assert found.plot().axes


def test_a_model_that_varies_from_call_to_call_is_named_and_raised():
    calls = []

    def varying(h):
        calls.append(1)
        return torch.tanh(h) * (1 + 1e-9 * len(calls))

    found = checkup_of(varying)
    assert "deterministic" in checks(found, "failed")
    with pytest.raises(sh.NondeterministicRiskError) as caught:
        found.raise_for_status()
    assert (caught.value.first, caught.value.second) == found.values
    assert caught.value.first != caught.value.second
    assert "\n" not in str(caught.value)


def test_a_risk_that_is_not_finite_fails():
    found = checkup_of(lambda h: h * float("nan"))
    assert "finite" in checks(found, "failed")
    with pytest.raises(ValueError, match="`risk` must pass the check 'finite'"):
        found.raise_for_status()


class Detached(torch.autograd.Function):
    """tanh with a backward pass that hides how it depends on its input."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.tanh()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return grad * (1 - a.tanh() ** 2).detach()


class Skewed(torch.autograd.Function):
    """The identity; its derivative is one, the derivative of that is wrong."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return grad * (1 + a.cumsum(1) - a.cumsum(1).detach())


def test_differences_of_gradients_see_a_second_derivative_that_is_cut_off_R26():
    found = checkup_of(Detached.apply, engine="kept_graph")
    assert checks(found, "failed") == {"product", "differences"}
    assert "engine='differences'" in found["differences"].advice


def test_differences_take_the_place_of_a_second_derivative_that_is_cut_off():
    found = checkup_of(Detached.apply)
    assert found.ok
    assert {"product", "engine", "differences"} <= checks(found, "note")
    assert "are taken instead" in found["product"].advice


def test_a_gradient_that_is_not_that_of_f_fails_with_both_numbers():
    found = checkup_of(lambda h: torch.tanh(h).detach())
    assert "gradient" in checks(found, "failed")
    claimed, measured = found["gradient"].text.split(" where differences give ")
    assert float(claimed.split()[-1]) != float(measured.split(",")[0])


def test_a_product_that_is_not_symmetric_fails():
    found = checkup_of(Skewed.apply, engine="kept_graph")
    assert {"symmetric", "differences"} <= checks(found, "failed")


def test_products_by_differences_are_noted_with_their_error():
    risk = tiny_mlp().risk(engine="differences")
    found = sh.doctor(risk)
    assert {"engine", "differences"} <= checks(found, "note")
    assert found["differences"].value == risk.prepare().relative_error


def test_the_inventory_names_what_is_there_R10():
    class Rich(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)
            self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.3)
            self.idle, self.again = nn.Linear(2, 2), self.last
            self.first.bias.requires_grad_(False)
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            h = self.drop(torch.tanh(self.norm(self.first(x))))
            return nn.functional.dropout(self.again(h), 0.1, training=True), self.shift

    problem = tiny_mlp()
    x, y = problem.data

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs[0], targets) + outputs[1]

    batches = [{"x": x.float(), "y": y}]
    risk = sh.EmpiricalRisk(
        Rich(), closure=lambda m, b: loss(m(b["x"]), b["y"]), data=batches
    )
    found = sh.doctor(risk)
    assert found.ok
    assert found["BatchNorm"].text == "1 layer, on running statistics"
    assert found["dropout"].text.endswith("drop")
    assert "same ones" in found["random draws"].text
    assert found["unused"].text.endswith("idle.weight, idle.bias")
    assert found["no curvature"].text.endswith("shift")
    assert found["held fixed"].text.endswith("first.bias")
    assert found["tied"].text.endswith("again.weight, again.bias")


# -- loaders -----------------------------------------------------------------------------


class Augmented(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i] + torch.randn(3, dtype=torch.float64), self.y[i]


LOADERS = {
    "plain": (lambda x, y: DataLoader(TensorDataset(x, y), 5), "same data each time"),
    "shuffles": (
        lambda x, y: DataLoader(TensorDataset(x, y), 5, shuffle=True),
        "another order",
    ),
    "augments": (lambda x, y: DataLoader(Augmented(x, y), 5), "other values"),
    "generator": (lambda x, y: (pair for pair in [(x, y)]), "one-shot"),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_are_told_apart_by_a_second_pass_R25_R26(kind):
    problem = tiny_mlp()
    build, text = LOADERS[kind]
    risk = sh.EmpiricalRisk(problem.model, problem.loss, build(*problem.data))
    found = sh.doctor(risk)
    assert found.ok
    assert text in found["data"].text
    assert found["data"].status == ("ok" if kind == "plain" else "note")


def test_samples_that_drop_last_leaves_out_are_counted():
    problem = tiny_mlp()
    loader = DataLoader(TensorDataset(*problem.data), 5, drop_last=True)
    found = sh.doctor(sh.EmpiricalRisk(problem.model, problem.loss, loader))
    assert found["drop_last"].value == 3


# -- untouched ---------------------------------------------------------------------------


def test_a_forward_pass_that_changes_the_model_behind_its_back_fails():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 4).double()
            self.register_buffer("steps", torch.zeros(()))
            self.out_of_sight = [self.steps]

        def forward(self, x):
            self.out_of_sight[0].add_(1)
            return self.inner(x)

    problem = tiny_mlp()
    found = sh.doctor(sh.EmpiricalRisk(Counting(), problem.loss, problem.data))
    assert "changed: steps" in found["untouched"].text
    assert not found.ok


def test_the_guarantee_is_tried_after_an_exception_too(monkeypatch):
    from sharpness.risk import doctor as module

    seen = []
    original = module._fail_once
    monkeypatch.setattr(module, "_fail_once", lambda r: (original(r), seen.append(r)))
    risk = tiny_mlp().risk()
    assert sh.doctor(risk)["untouched"].status == "ok"
    assert seen == [risk]
