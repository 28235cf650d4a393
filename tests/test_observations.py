import copy
import json
import math

import numpy as np
import pytest
import torch
from helpers.problems import by_hand, mlp_risk, second_minimum
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

import sharpness as sh
from sharpness import checkpoint
from sharpness._json import as_plain
from sharpness.lab import networks
from sharpness.lab.data import class_balanced, load
from sharpness.lab.run import train
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.measures.reparametrise import scaled_by
from sharpness.reproduce.model_spec import Bench, ModelSpec
from sharpness.reproduce.observations import (
    MEASURES,
    Accuracy,
    InterpolationRun,
    Measured,
    Rescaled,
    TrackingRun,
)

DATA = "digits[60,test=40]"  # three updates an epoch
MLP = "MLP?width=8&out_features=10"


def tiny(in_features: int = 64, num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_features, 6),
        nn.ReLU(),
        nn.Linear(6, num_classes),
    )


def net(epochs=1.0, network=MLP, **changes):
    settings = {"batch_size": 20, "learning_rate": 0.01, **changes}
    training = Training(network=network, **settings)
    return ModelSpec(data=DATA, training=training, budget=StoppingCriteria(epochs=epochs))


A, B = net(), net(4.0, seed=1)
STILL = net(optimizer="sgd", learning_rate=1e-30)  # ends where it began


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(folder=tmp_path_factory.mktemp("networks"))
    for trained in (A, B, STILL):
        bench.train_missing([trained])
    return bench


@pytest.fixture
def relu(bench, monkeypatch):
    """A trained network whose layers can be scaled, on the bench."""
    monkeypatch.setitem(networks.NETWORKS, "tiny", networks.Network(tiny))
    trained = net(8.0, network="tiny")
    bench.train_missing([trained])
    return trained


def parameters(bench, trained):
    state = checkpoint.load(bench.path(trained)).state_dict
    return {name: value.double() for name, value in state.items()}


def theta(state):
    return torch.cat([value.reshape(-1) for value in state.values()])


def unflattened(vector, like):
    parts = vector.split([value.numel() for value in like.values()])
    return {n: p.reshape(like[n].shape) for n, p in zip(like, parts, strict=True)}


def loss_and_accuracy(state, x, y):
    """Of a tanh network, written out."""
    *hidden, (w, b) = zip(*[iter(state.values())] * 2, strict=True)
    h = x.double().flatten(1)
    for weight, bias in hidden:
        h = torch.tanh(h @ weight.T + bias)
    logits = h @ w.T + b
    chosen = logits[torch.arange(len(y)), y]
    loss = (logits.logsumexp(1) - chosen).mean()
    return loss, float((logits.argmax(1) == y).double().mean())


def largest_eigenvalue(state, x, y):
    """SciPy's, from products of the Hessian by two derivatives."""
    at = theta(state).requires_grad_()
    loss, _ = loss_and_accuracy(unflattened(at, state), x, y)
    (gradient,) = torch.autograd.grad(loss, at, create_graph=True)

    def product(v):
        v = torch.from_numpy(v.ravel()).to(at)
        return torch.autograd.grad(gradient @ v, at, retain_graph=True)[0].numpy()

    hessian = LinearOperator((len(at), len(at)), product, dtype=np.float64)
    return float(eigsh(hessian, k=1, which="LA", return_eigenvectors=False)[0])


# -- how training ended ----------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_loss_and_accuracy_are_those_of_the_network_by_hand(bench, split):
    found = Accuracy(of=B).found(bench)
    loss, accuracy = loss_and_accuracy(parameters(bench, B), *getattr(load(DATA), split))
    for mode in ("batch", "running"):  # a network without BatchNorm
        assert found["metrics"][f"{split}_loss_{mode}"] == pytest.approx(
            float(loss), rel=1e-5
        )
        assert found["metrics"][f"{split}_accuracy_{mode}"] == accuracy
    assert found["updates"] == 12
    assert len(found["history"]) == 4
    assert found["num_threads"] == 1


def test_what_is_needed_is_what_is_looked_at():
    assert Accuracy(of=A).needs == Measured(of=A, measures=()).needs == (A,)
    assert Rescaled(of=A, factors=(1.0,), measures=()).needs == (A,)
    assert InterpolationRun(first=A, second=B).needs == (A, B)
    followed = TrackingRun(data=DATA, training=A.training, budget=A.budget)
    assert followed.needs == ()
    for look in (Measured(of=A, measures=("phi",)), InterpolationRun(first=A, second=B)):
        assert look.gradients > Accuracy(of=A).gradients == 0


# -- sharpness -------------------------------------------------------------------------


def test_curvature_is_that_of_scipy_on_balanced_samples(bench):
    found = Measured(of=A, measures=("lambda_max",), num_samples=35).found(bench)
    x, y = load(DATA).train
    chosen = class_balanced(y, 35, 0)
    state, part = parameters(bench, A), (x[chosen], y[chosen])
    loss, accuracy = loss_and_accuracy(state, *part)
    assert found["value"] == pytest.approx(float(loss), rel=1e-5)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert found["risk"]["num_samples"] == 35
    (eigenvalue,) = found["lambda_max"].eigenvalues.tolist()
    (bound,) = found["lambda_max"].error_bounds.tolist()
    expected = largest_eigenvalue(state, *part)
    assert bound < 0.05 * expected
    assert abs(eigenvalue - expected) <= bound + 1e-4 * expected


@pytest.mark.parametrize("num_samples", [None, 60, 1000])
def test_more_samples_than_there_are_means_all(bench, num_samples):
    found = Measured(of=A, measures=(), num_samples=num_samples).found(bench)
    assert found["risk"]["num_samples"] == 60
    loss, _ = loss_and_accuracy(parameters(bench, A), *load(DATA).train)
    assert found["value"] == pytest.approx(float(loss), rel=1e-5)


def test_all_that_is_asked_for_is_measured_and_fits_a_record(bench):
    measures = ("phi", "phi_normal", "phi_unit", "adaptive")
    found = Measured(of=A, measures=measures, num_samples=20).found(bench)
    json.dumps(as_plain(found), allow_nan=False)
    assert "lambda_max" not in found
    assert [phi.settings["epsilon"] for phi in found["phi"]] == [1e-3, 5e-4]
    wide, narrow = (phi.phi_protocol for phi in found["phi"])
    assert 0 < narrow < wide
    assert found["adaptive"].value > 0
    assert found["phi_normal"][0].phi_protocol > 0
    assert found["phi_unit"][0].phi_protocol != found["phi_normal"][0].phi_protocol


def test_the_distance_is_from_where_training_began(bench):
    found = Measured(of=A, measures=()).found(bench)
    moved = theta(parameters(bench, A)) - theta(parameters(bench, STILL))
    assert found["distance_from_start"] == pytest.approx(float(moved.norm()), rel=1e-5)
    still = Measured(of=STILL, measures=()).found(bench)
    assert still["distance_from_start"] < 1e-20


def test_the_seed_is_that_of_the_measures(bench):
    first, second = (
        Measured(of=A, measures=("lambda_max",), num_samples=35, seed=s).found(bench)
        for s in (0, 3)
    )
    assert [x["lambda_max"].settings["seed"] for x in (first, second)] == [0, 3]


def test_the_seed_draws_the_samples(bench):
    first, second = (
        Measured(of=A, measures=(), num_samples=35, seed=s).found(bench) for s in (0, 3)
    )
    assert first["data"]["samples"] != second["data"]["samples"]


# -- between two networks --------------------------------------------------------------


@pytest.mark.parametrize("arc", [False, True], ids=["line", "arc"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_point_between_two_networks_is_that_of_the_network_by_hand(bench, split, arc):
    look = InterpolationRun(first=A, second=B, split=split, arc=arc, num_samples=None)
    curve = look.found(bench)["curve"]
    assert curve.alphas == pytest.approx(np.linspace(-1, 2, 25), abs=1e-15)
    first, second = parameters(bench, A), parameters(bench, B)
    part = getattr(load(DATA), split)
    for alpha, value, accuracy in list(
        zip(curve.alphas, curve.values, curve.accuracies, strict=True)
    )[::4]:
        share = (math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2))
        share = share if arc else (1 - alpha, alpha)
        point = share[0] * theta(first) + share[1] * theta(second)
        expected = loss_and_accuracy(unflattened(point, first), *part)
        assert value == pytest.approx(float(expected[0]), rel=1e-5)
        assert abs(accuracy - expected[1]) < 1.5 / len(part[1])  # a tie to rounding


def test_line_and_arc_share_their_ends_and_nothing_between(bench):
    line, arc = (
        InterpolationRun(first=A, second=B, arc=arc, num_samples=None).found(bench)["curve"]
        for arc in (False, True)
    )
    begin, end = line.alphas.index(0.0), line.alphas.index(1.0)
    assert arc.values[begin] == line.values[begin]
    assert arc.values[end] == pytest.approx(line.values[end], rel=1e-5)
    assert arc.values[begin + 4] != pytest.approx(line.values[begin + 4], rel=1e-4)
    for look, at in ((A, begin), (B, end)):
        loss = Accuracy(of=look).found(bench)["metrics"]["train_loss_batch"]
        assert line.values[at] == pytest.approx(loss, rel=1e-5)


def test_both_ends_are_told_by_their_files(bench):
    found = InterpolationRun(first=A, second=B).found(bench)
    assert found["sha256"] == [checkpoint.load(bench.path(end)).sha256 for end in (A, B)]


def test_the_arc_agrees_with_the_network_by_hand():
    other, start = second_minimum(), mlp_risk().theta.numpy()
    arc = sh.interpolation(mlp_risk(), other, arc=True)
    assert arc.alphas == pytest.approx(np.linspace(-1, 2, 25), abs=1e-15)
    for alpha, value in zip(arc.alphas, arc.values, strict=True):
        turned = np.exp(1j * math.pi / 2 * alpha)
        expected = by_hand(turned.real * start + turned.imag * other.numpy())
        assert value == pytest.approx(expected[0], rel=1e-12)


# -- other parameters for the same function --------------------------------------------


def test_rescaling_leaves_the_outputs_and_sharpens(bench, relu):
    factors = (1.0, 16.0, 64.0)
    look = Rescaled(of=relu, factors=factors, measures=("lambda_max",), num_samples=50)
    points = look.found(bench)["points"]
    assert [point["factor"] for point in points] == list(factors)
    assert all(point["drift"] < 1e-6 for point in points)
    assert all(point["layers"] == ("1", "3") for point in points)
    values = [float(point["lambda_max"].eigenvalues[0]) for point in points]
    plain = Measured(of=relu, measures=("lambda_max",), num_samples=50).found(bench)
    assert values[0] == pytest.approx(float(plain["lambda_max"].eigenvalues[0]), rel=0.02)
    # The last layer's block grows by the factor squared, and soon outgrows all others.
    assert values[1] > 10 * values[0]
    assert values[2] / values[1] == pytest.approx((64 / 16) ** 2, rel=0.05)


def test_a_network_that_cannot_be_rescaled_is_refused(bench):
    look = Rescaled(of=A, factors=(2.0,), measures=("lambda_max",), num_samples=50)
    with pytest.raises(ValueError, match="`network` must have two layers"):
        look.found(bench)


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)
    ).eval()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).eval()


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0, 64.0])
@pytest.mark.parametrize(
    ("build", "shape"), [(deep, (9, 5)), (convolutional, (9, 1, 8, 8))]
)
def test_powers_of_two_leave_every_bit_of_the_outputs(build, shape, factor):
    network, x = build(), torch.randn(shape)
    scaled, _ = scaled_by(network, x, factor)
    assert torch.equal(scaled(x), network(x))
    other = torch.randn(shape)
    assert torch.equal(scaled(other), network(other))


def test_other_factors_leave_the_outputs_to_rounding():
    network, x = deep().double(), torch.randn(9, 5, dtype=torch.float64)
    scaled, _ = scaled_by(network, x, 0.3)
    torch.testing.assert_close(scaled(x), network(x), rtol=1e-12, atol=1e-13)


def test_the_first_layer_gains_what_the_last_one_loses():
    network, x = deep(), torch.randn(9, 5)
    before = copy.deepcopy(network.state_dict())
    scaled, layers = scaled_by(network, x, 8.0)
    assert layers == ("0", "2", "4")
    after = scaled.state_dict()
    assert torch.equal(after["0.weight"], 8 * before["0.weight"])
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert torch.equal(after["4.weight"], before["4.weight"] / 8)
    assert torch.equal(after["0.bias"], 8 * before["0.bias"])
    assert torch.equal(after["4.bias"], before["4.bias"])
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_without_two_layers_there_is_nothing_to_scale():
    for network in (nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 4), nn.Tanh())):
        with pytest.raises(ValueError, match=r"two layers .*; got none"):
            scaled_by(network, torch.randn(2, 5), 2.0)


@pytest.mark.parametrize("factor", [0.0, -2.0])
def test_factors_that_are_not_above_zero_are_refused(factor):
    with pytest.raises(ValueError, match="`factor`"):
        scaled_by(deep(), torch.randn(2, 5), factor)


class Residual(nn.Module):
    """A sum that no module makes takes the first layer's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x):
        h = self.first(x)
        return self.head(self.second(self.act(h)) + h)


def test_what_is_connected_outside_of_modules_keeps_its_function():
    network, x = Residual().eval(), torch.randn(9, 4)
    scaled, layers = scaled_by(network, x, 4.0)
    assert {"head.0", "head.2"} <= set(layers)
    torch.testing.assert_close(scaled(x), network(x))


# -- along a training ------------------------------------------------------------------


def followed(**changes):
    training = Training(network=MLP, batch_size=20, optimizer="sgd", learning_rate=0.1)
    settings = {
        "every": 2,
        "num_samples": 60,
        "budget": StoppingCriteria(epochs=2.0),
        **changes,
    }
    return TrackingRun(**{"data": DATA, "training": training, **settings})


def test_points_along_a_training_are_those_of_runs_that_ended_there(bench, tmp_path):
    look = followed(every=3)
    found = look.found(bench)
    assert found["diverged_at"] is None
    assert found["steps"] == [0, 3, 6]
    assert found["thresholds"] == [pytest.approx(2 / 0.1)] * 3
    x, y = load(DATA).train
    for i, step in enumerate(found["steps"]):
        if not step:
            continue
        path = tmp_path / f"{step}.pt"
        state = train(
            look.training, StoppingCriteria(updates=step), load(DATA), path
        ).state_dict
        state = {name: value.double() for name, value in state.items()}
        loss, _ = loss_and_accuracy(state, x, y)
        assert found["losses"][i] == pytest.approx(float(loss), rel=1e-5)
        expected = largest_eigenvalue(state, x, y)
        value = found["values"][i]
        assert value.error < 0.05 * expected
        assert abs(value.value - expected) <= value.error + 1e-4 * expected


def test_a_followed_training_that_diverges_keeps_its_points(bench):
    wild = Training(network=MLP, batch_size=20, optimizer="sgd", learning_rate=1e38)
    found = followed(training=wild, every=1).found(bench)
    assert "finite; got inf in update 2" in found["diverged_at"]
    assert found["steps"][:2] == [0, 1]
    assert math.isfinite(found["losses"][0])
    assert len(found["values"]) == len(found["thresholds"]) == len(found["steps"])
    json.dumps(as_plain(found), allow_nan=False)


def test_adams_curvature_stands_beside_its_own_threshold(bench):
    adam = Training(network=MLP, batch_size=20, learning_rate=1e-3)
    name = "lambda_max_preconditioned"
    found = followed(training=adam, measure=name).found(bench)
    assert found["steps"] == [0, 2, 4, 6]
    assert found["values"][0] is None  # before Adam's first step there are no moments
    assert all(value.value > 0 for value in found["values"][1:])
    assert found["thresholds"] == [pytest.approx(38 / 1e-3)] * 4


def test_more_samples_than_there_are_means_all_in_a_training_too(bench):
    training = Training(network=MLP, batch_size=500, optimizer="sgd")
    look = followed(
        data="digits",
        training=training,
        budget=StoppingCriteria(updates=1),
        num_samples=2000,
    )
    assert look.found(bench)["steps"] == [0]


def test_a_kept_tridiagonal_has_the_eigenvalues_and_the_start_that_it_says():
    risk = mlp_risk()
    found = MEASURES["lanczos"][0](risk, seed=3)
    alphas, betas = (np.array(found[name]) for name in ("alphas", "betas"))
    assert alphas.shape == betas.shape == (40,)
    matrix = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    top = sh.eigenpairs(risk, tol=1e-8, progress=False).lambda_max
    assert np.linalg.eigvalsh(matrix)[-1] == pytest.approx(top, rel=1e-8)
    draw = torch.randn(
        risk.n, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    assert found["start_norm_squared"] == pytest.approx(float(draw @ draw))
    start = draw / draw.norm()
    assert alphas[0] == pytest.approx(float(start @ risk.hvp(start)))


def test_searches_in_a_subspace_differ_in_where_they_begin_alone():
    names = "phi_normal_zero", "phi_normal_best", "phi_normal"
    looks = [MEASURES[name][0] for name in names]
    assert [look.keywords["subspace_dim"] for look in looks] == [100] * 3
    # This network has fewer parameters than that.
    zero, best, usual = (look(mlp_risk(), seed=1, subspace_dim=3)[0] for look in looks)
    starts = [(r.settings["start"], r.settings["num_starts"]) for r in (zero, usual, best)]
    assert starts == [("zero", 1), ("random", 1), ("random", 2)]
    assert zero.solver == "lbfgsb"
    assert best.phi >= usual.phi > 0
