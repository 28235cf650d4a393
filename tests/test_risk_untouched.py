"""A risk leaves model, data, gradients and random generators bit for bit as found."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import (
    Problem,
    assert_near,
    directions,
    filled,
    generator,
    mlp_by_hand,
    normal,
    softmax_regression,
    tiny_mlp,
)
from helpers.untouched import assert_same, assert_states, fingerprint, random_states
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sharpness import EmpiricalRisk
from sharpness.risk import memory


class TwoNames(nn.Module):
    """A layer that is registered twice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.again, self.tail = self.first, self.last

    def forward(self, x):
        return self.tail(self.again(self.first(x)).tanh())


@pytest.mark.parametrize("given", ["loss", "closure"])
def test_parameters_stay_the_same_objects(given):
    model, pair = TwoNames(), (torch.randn(6, 3), torch.arange(6) % 2)
    before = list(model.named_parameters(remove_duplicate=False))
    if given == "loss":
        risk = EmpiricalRisk(model, F.cross_entropy, pair)
    else:
        risk = EmpiricalRisk(
            model, closure=lambda m, b: F.cross_entropy(m(b[0]), b[1]), data=[pair]
        )
    risk.hvp(risk.gradient())
    after = list(model.named_parameters(remove_duplicate=False))
    assert [(name, id(p)) for name, p in after] == [(name, id(p)) for name, p in before]


USES = {
    "value": lambda risk: risk.value(),
    "gradient": lambda risk: risk.gradient(),
    "elsewhere": lambda risk: risk.value_and_gradient(risk.theta + 1),
    "product": lambda risk: risk.hvp(directions(2, risk.n)),
    "outputs": lambda risk: risk.outputs(),
    "accuracy": lambda risk: risk.accuracy(),
    "operator": lambda risk: risk.linear_operator() @ np.ones(risk.n),
}
MODES = ["running", "batch"]


class Interrupted(nn.Module):
    """Passes its input on, or raises once it is armed."""

    error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x


def mixed_model():
    """BatchNorm of three kinds, dropout, a frozen layer; every part in a mode of its own.

    The exception leaves from the last layer, when all others have run.
    """
    layers = [
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4, momentum=None),
        nn.Tanh(),
        nn.BatchNorm1d(4, affine=False),
        Interrupted(),
    ]
    model = filled(nn.Sequential(*layers).double(), generator(0))
    model[3].weight.requires_grad_(False)
    for i, part in enumerate(model.modules()):
        part.training = i % 3 != 2
    return model


def mixed_risk(model, batchnorm, **settings):
    x, y = normal(generator(1), 11, 3), torch.arange(11) % 4
    return EmpiricalRisk(
        model, nn.CrossEntropyLoss(), (x, y), batchnorm=batchnorm, **settings
    )


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("batchnorm", MODES)
def test_model_comes_back_bit_for_bit_R17_R18_R23_R24(use, batchnorm):
    model = mixed_model()
    before = fingerprint(model)
    risk = mixed_risk(model, batchnorm)
    assert_same(before, fingerprint(model))
    USES[use](risk)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("use", ["building", *USES])
@pytest.mark.parametrize("batchnorm", MODES)
def test_model_comes_back_after_an_exception_in_its_forward_R23_R24(use, batchnorm, error):
    model = mixed_model()
    before = fingerprint(model)
    risk = None if use == "building" else mixed_risk(model, batchnorm)
    generators = random_states()
    model[-1].error = error
    with pytest.raises(type(error)):
        mixed_risk(model, batchnorm) if risk is None else USES[use](risk)
    del model[-1].error
    assert_same(before, fingerprint(model))
    assert_states(generators, random_states())


@pytest.mark.parametrize("use", USES)
def test_a_risk_works_on_after_an_exception(use):
    model = mixed_model()
    risk, untouched = mixed_risk(model, "batch"), mixed_risk(mixed_model(), "batch")
    model[-1].error = RuntimeError("no")
    with pytest.raises(RuntimeError, match="no"):
        USES[use](risk)
    model[-1].error = None
    v = directions(1, risk.n)
    assert torch.equal(risk.hvp(v), untouched.hvp(v))
    assert risk.value() == untouched.value()


@pytest.mark.parametrize("use", USES)
def test_gradients_of_the_user_stay_and_none_stays_none_R21(use):
    problem = softmax_regression()
    problem.model.weight.grad = torch.full_like(problem.model.weight, 7)
    USES[use](problem.risk(chunk_size=7))
    assert problem.model.bias.grad is None
    assert (problem.model.weight.grad == 7).all()


class Drawing(nn.Module):
    """A forward pass that draws from every global generator, in any mode."""

    def __init__(self, *sources):
        super().__init__()
        self.linear, self.sources = softmax_regression().model, sources

    def forward(self, x):
        noise = {
            "torch": lambda: F.dropout(torch.ones_like(x), 0.5),
            "numpy": lambda: np.random.rand(),  # noqa: NPY002
            "python": lambda: random.random(),
        }
        for source in self.sources:
            x = x * noise[source]()
        return self.linear(x)


@pytest.mark.parametrize("use", ["building", *USES])
def test_no_global_generator_moves_R22(use):
    model = Drawing("torch", "numpy", "python")
    loss, data = nn.CrossEntropyLoss(), softmax_regression().data
    before = random_states()
    risk = EmpiricalRisk(model, loss, data, chunk_size=7)
    assert_states(before, random_states())
    if use != "building":
        USES[use](risk)
    assert_states(before, random_states())


@pytest.mark.parametrize("shuffle", [False, True])
def test_running_through_a_loader_moves_no_generator_R22(shuffle):
    problem = softmax_regression()
    loader = DataLoader(TensorDataset(*problem.data), batch_size=7, shuffle=shuffle)
    before = random_states()
    EmpiricalRisk(problem.model, problem.loss, loader)
    assert_states(before, random_states())


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_a_model_that_draws_is_one_fixed_function(source):
    data = softmax_regression().data
    risk = EmpiricalRisk(Drawing(source), nn.CrossEntropyLoss(), data, chunk_size=7)
    first = risk.value(), risk.gradient()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    assert risk.value() == first[0] == risk.value_and_gradient()[0]
    assert torch.equal(risk.gradient(), first[1])


# -- dropout -----------------------------------------------------------------------------


def dropout_problem():
    """`tiny_mlp` with a dropout layer in train mode; by hand it is not there."""
    plain = tiny_mlp()
    layers = [plain.model[0], plain.model[1], nn.Dropout(0.5), plain.model[2]]
    model = nn.Sequential(*layers).train()
    return Problem(model=model, loss=plain.loss, data=plain.data, f=plain.f)


def test_dropout_is_off_and_the_same_direction_gives_the_same_product_R20():
    problem = dropout_problem()
    risk, plain = problem.risk(chunk_size=7), tiny_mlp().risk(chunk_size=7)
    v = directions(1, 44)[0]
    first = risk.hvp(v)
    assert torch.equal(risk.hvp(v), first)
    assert torch.equal(plain.hvp(v), first)
    assert risk.value() == plain.value()
    assert torch.equal(risk.gradient(), plain.gradient())
    gradient = torch.func.grad(problem.f)(risk.theta)
    assert_near(risk.gradient(), gradient, 1e-10)


@pytest.mark.parametrize("budget", [1, 1 << 40])
def test_dropout_that_is_always_on_gives_the_same_product_twice_R20(monkeypatch, budget):
    # With a small budget the graphs of some chunks are built anew at each product.
    monkeypatch.setattr(memory, "budget_bytes", lambda _: budget)
    data = softmax_regression().data
    risk = EmpiricalRisk(Drawing("torch"), nn.CrossEntropyLoss(), data, chunk_size=7)
    v = directions(1, 16)
    first = risk.hvp(v)
    assert torch.equal(risk.hvp(v), first)
    assert torch.equal(risk.hvp(v.expand(3, -1)), first.expand(3, -1))


def test_dropout_that_is_always_on_is_the_same_function_for_value_and_product():
    data = softmax_regression().data
    risk = EmpiricalRisk(Drawing("torch"), nn.CrossEntropyLoss(), data, chunk_size=7)
    v, h = directions(1, 16)[0], 1e-4
    rise = risk.gradient(risk.theta + h * v) - risk.gradient(risk.theta - h * v)
    assert_near(risk.hvp(v), rise / (2 * h), 1e-6)  # error of order h^2


# -- a snapshot --------------------------------------------------------------------------


def retrain(model):
    for p in model.parameters():
        p.add_(1)


def reload(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


def move_averages(model):
    model[1].running_mean.add_(1)
    model[1].running_var.mul_(3)


def recast(model):
    model.float()


def switch(model):
    model.train(not model.training)
    model.requires_grad_(False)


CHANGES = [retrain, reload, move_averages, recast, switch]


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("change", CHANGES)
def test_changing_the_model_changes_no_number_of_the_risk(change, used):
    problem, other = tiny_mlp(batchnorm=True), tiny_mlp(batchnorm=True)
    risk, expected = problem.risk(chunk_size=7), other.risk(chunk_size=7)
    v = directions(2, risk.n)
    if used:
        risk.hvp(v)
    with torch.no_grad():
        change(problem.model)
    assert risk.value() == expected.value()
    assert torch.equal(risk.gradient(), expected.gradient())
    assert torch.equal(risk.hvp(v), expected.hvp(v))
    assert torch.equal(risk.theta, expected.theta)
    assert torch.equal(risk.outputs(), expected.outputs())


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("kind", ["tensors", "arrays", "closure"])
def test_changing_the_data_in_place_changes_no_number_of_the_risk(kind, used):
    problem = tiny_mlp()
    x, y = (part.clone() for part in problem.data)
    if kind == "closure":
        risk = EmpiricalRisk(
            problem.model,
            closure=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            data=[(x, y)],
        )
    else:
        data = (x, y) if kind == "tensors" else (x.numpy(), y.numpy())
        risk = EmpiricalRisk(problem.model, problem.loss, data)
    expected, v = problem.risk(), directions(2, risk.n)
    if used:
        risk.hvp(v)
    x.mul_(2)
    y.zero_()
    assert risk.value() == expected.value()
    assert torch.equal(risk.hvp(v), expected.hvp(v))


def test_two_risks_of_one_model_do_not_mix():
    problem = tiny_mlp(batchnorm=True)
    x, y = problem.data
    running, batch = problem.risk(), problem.risk(batchnorm="batch")
    v = directions(1, running.n)[0]
    running.hvp(v)
    batch.hvp(v)
    by_hand = {
        "running": problem.f,
        "batch": mlp_by_hand(problem.model, x, y, statistics="batch"),
    }
    for risk in (running, batch):
        expected = float(by_hand[risk.batchnorm](risk.theta))
        assert risk.value() == pytest.approx(expected, rel=1e-12)
    assert running.value() != pytest.approx(batch.value(), rel=1e-3)


# -- what a closure does to gradients ----------------------------------------------------

CALLS = {
    "sets to none": lambda optimizer, value: optimizer.zero_grad(),
    "zeroes": lambda optimizer, value: optimizer.zero_grad(set_to_none=False),
    "accumulates": lambda optimizer, value: value.backward(retain_graph=True),
}


@pytest.mark.parametrize("use", ["value", "gradient", "product"])
@pytest.mark.parametrize("call", CALLS)
def test_a_closure_that_touches_gradients_leaves_the_users_R17(call, use):
    problem = softmax_regression()
    model, (x, y) = problem.model, problem.data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    before = fingerprint(model)
    kept = [p.grad for p in model.parameters()]

    def closure(model, batch):
        value = nn.functional.cross_entropy(model(batch[0]), batch[1])
        if value.requires_grad or call != "accumulates":
            CALLS[call](optimizer, value)
        return value

    risk = EmpiricalRisk(model, closure=closure, data=[(x, y)])
    found = USES[use](risk)
    assert_same(before, fingerprint(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    expected = USES[use](problem.risk())
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_closure_that_changes_the_mode_changes_neither_f_nor_the_model(mode):
    def plain(m, b):
        return m(b).square().mean()

    def closure(m, b):
        getattr(m, mode)()
        return plain(m, b)

    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)]
    model = nn.Sequential(*layers)
    model[2].eval()
    before = [m.training for m in model.modules()]
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    found, expected = (
        EmpiricalRisk(model, closure=c, data=[x, x], batchnorm="batch")
        for c in (closure, plain)
    )
    assert found.value() == expected.value()
    assert torch.equal(found.hvp(found.theta), expected.hvp(found.theta))
    assert [m.training for m in model.modules()] == before
    assert not any("train" in vars(m) for m in model.modules())
    assert model.train() is model
    assert all(m.training for m in model.modules())
