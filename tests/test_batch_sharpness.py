"""Curvature of mini-batches along their gradients: by hand, thresholds, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers.problems import Pole
from helpers.untouched import assert_same, assert_states, fingerprint, random_states
from torch import nn

import sharpness as sh
from sharpness._json import to_line
from sharpness.tracking import batch_thresholds, stability_thresholds

FLOAT64 = torch.float64


def data(num: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num, 3, generator=draw, dtype=FLOAT64)
    return x, torch.randint(3, (num,), generator=draw)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def risk_of(model: nn.Module | None = None, **settings) -> sh.EmpiricalRisk:
    return sh.EmpiricalRisk(model or network(), nn.CrossEntropyLoss(), data(), **settings)


def by_hand(part: sh.EmpiricalRisk) -> float:
    """g^T H g / |g|^2 from a dense Hessian."""
    dense = torch.stack([part.hvp(row) for row in torch.eye(part.n, dtype=FLOAT64)])
    g = part.gradient()
    return float(g @ dense @ g / (g @ g))


def closed(batches) -> sh.EmpiricalRisk:
    return sh.EmpiricalRisk(
        network(), data=batches, closure=lambda m, b: nn.CrossEntropyLoss()(m(b[0]), b[1])
    )


def test_batches_as_given_are_taken_one_by_one():
    x, y = data()
    batches = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)]
    found = sh.batch_sharpness(closed(batches))
    each = [by_hand(risk_of().subset(range(i, i + 10))) for i in range(0, 40, 10)]
    assert found.value == pytest.approx(np.mean(each), rel=1e-10)
    assert found.standard_error == pytest.approx(np.std(each, ddof=1) / 2, rel=1e-8)
    assert (found.num_batches, found.batch_size) == (4, 10)
    assert found.status == "completed"


def test_one_batch_of_everything_is_the_hessian_along_the_gradient():
    risk = risk_of()
    found = sh.batch_sharpness(risk, 40, num_batches=3)
    assert found.value == pytest.approx(by_hand(risk), rel=1e-10)
    assert found.ratio_of_means == pytest.approx(found.value, rel=1e-10)
    assert found.standard_error < 1e-12
    assert found.value <= sh.eigenpairs(risk).lambda_max_upper


def test_single_samples_average_over_the_data():
    """Batches of one are uniform draws of the samples."""
    risk = risk_of()
    each = [by_hand(risk.subset([i])) for i in range(40)]
    found = sh.batch_sharpness(risk, 1, num_batches=100)
    assert abs(found.value - np.mean(each)) < 3 * found.standard_error
    assert found.standard_error == pytest.approx(np.std(each) / 10, rel=0.3)


@pytest.mark.parametrize("chunk_size", [3, 40])
def test_gradient_and_product_are_those_of_their_own_methods(chunk_size):
    risk = risk_of(chunk_size=chunk_size)
    g, product = risk.gradient_and_product()
    torch.testing.assert_close(g, risk.gradient())
    torch.testing.assert_close(product, risk.hvp(risk.gradient()))


def test_without_a_second_derivative_it_is_differences():
    exact = sh.batch_sharpness(risk_of(), 10, num_batches=5)
    found = sh.batch_sharpness(risk_of(engine="differences"), 10, num_batches=5)
    assert found.value == pytest.approx(exact.value, rel=1e-4)


def test_draws_follow_the_seed():
    risk = risk_of()
    found = [sh.batch_sharpness(risk, 4, num_batches=5, seed=s).value for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_batchnorm_on_batch_statistics_gives_its_own_parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    risk = risk_of(model.double(), batchnorm="batch", batchnorm_batch=8)
    assert sh.batch_sharpness(risk).batch_size == 8
    with pytest.raises(TypeError, match=r"drawn for batch_size=8; .* Pass None"):
        sh.batch_sharpness(risk, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"batch_size": 4, "num_batches": 1}, "`num_batches` must be at least 2"),
        ({"batch_size": 4, "seed": 0.5}, "`seed` must be a whole number"),
        ({"batch_size": 41}, "must have samples that can be drawn"),
        ({}, "must have at least 2 batches"),
    ],
)
def test_arguments_outside_their_range_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        sh.batch_sharpness(risk_of(), **arguments)
    assert "\n" not in str(caught.value)


def test_a_gradient_of_zero_has_no_direction():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    risk = sh.EmpiricalRisk(model, nn.MSELoss(), (torch.ones(20, 2), torch.zeros(20, 1)))
    found = sh.batch_sharpness(risk, 4, num_batches=5)
    assert found.status == "zero_gradient"
    assert math.isnan(found.value)
    json.loads(to_line(found), parse_constant=pytest.fail)


def test_what_is_not_a_number_is_said():
    x, y = data()
    x = x.clone()
    x[5, 0] = 9.0
    risk = sh.EmpiricalRisk(Pole(*network()), nn.CrossEntropyLoss(), (x, y))
    found = sh.batch_sharpness(risk, 20, num_batches=10)
    assert found.status == "non_finite"
    assert "\n" not in str(found)


def test_time_that_is_up_leaves_the_batches_that_are_done():
    found = sh.batch_sharpness(risk_of(), 4, max_seconds=0)
    assert found.status == "max_seconds"
    assert math.isnan(found.value)


def test_the_model_and_random_states_stay():
    risk = risk_of()
    before, states = fingerprint(risk.model), random_states()
    sh.batch_sharpness(risk, 4, num_batches=3)
    assert_same(before, fingerprint(risk.model))
    assert_states(states, random_states())


# -- in the tracker -----------------------------------------------------------------------


def sgd(**settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(network().parameters(), lr=0.1, **settings)


def test_thresholds_of_batches_beside_those_of_the_whole():
    assert batch_thresholds(sgd()) == {"batch_sharpness": 20.0}
    heavy = batch_thresholds(sgd(momentum=0.9))
    assert heavy["batch_sharpness"] == pytest.approx(2 * (1 - 0.9) / 0.1)
    assert heavy["batch_sharpness_large_batch"] == pytest.approx(2 * (1 + 0.9) / 0.1)
    nesterov = sgd(momentum=0.9, nesterov=True)
    large = stability_thresholds(nesterov)["lambda_max"]
    assert batch_thresholds(nesterov) == {"batch_sharpness_large_batch": large}
    assert batch_thresholds(torch.optim.Adam(network().parameters())) == {}
    assert batch_thresholds(None) == {}


def tracked(**settings) -> sh.SharpnessTracker:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    measures = ["lambda_max", "batch_sharpness", "noise_scale"]
    settings = {"measures": measures, "batch_size": 8, **settings}
    given = settings.pop("data", data())
    return sh.SharpnessTracker(
        model, nn.CrossEntropyLoss(), given, optimizer=optimizer, **settings
    )


def test_the_tracker_shows_noise_and_batch_sharpness(tmp_path):
    tracker = tracked()
    (point,) = tracker.history
    assert set(point.values()) == {"lambda_max", "batch_sharpness", "noise_scale"}
    assert point.thresholds["batch_sharpness"] == pytest.approx(2)
    assert point.learning_rate == 0.1
    found = sh.gradient_noise(risk_of(), seed=0)
    low, high = found.interval
    expected = low if high is None else found.noise_scale
    assert point.noise_scale.value == pytest.approx(expected)
    assert point.noise_scale.settings["training"]["learning_rate"] == 0.1
    table = tracker.table()
    assert "batch_sharpness" in table
    assert "noise_scale" in table
    tracker.plot(tmp_path / "tracked.png")
    other = tracked(at_start=False)
    other.load_state_dict(tracker.state_dict())
    assert str(other.history) == str(tracker.history)


def test_the_tracker_takes_the_loops_batch_size_where_data_tell():
    x, y = data()
    batches = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)]
    (point,) = tracked(data=batches, batch_size=None).history
    assert point.batch_sharpness.settings["batch_size"] == 10
    with pytest.raises(ValueError, match="`batch_size` must be a whole number; got None"):
        tracked(batch_size=None)


def test_a_noise_that_is_not_to_be_had_does_not_end_a_training():
    x, y = data()
    tracker = tracked(data=(x[:5], y[:5]), batch_size=2)
    (point,) = tracker.history
    assert point.noise_scale.status == "not_available"
    assert point.status.ok
