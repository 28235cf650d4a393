"""The line between two points: risks and accuracies by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.problems import by_hand, mlp_risk, quadratic, second_minimum
from torch import Tensor

import sharpness as sh
from sharpness._results import number


@pytest.fixture(scope="module")
def other() -> Tensor:
    return second_minimum()


def test_the_ends_are_the_two_points(other):
    line = sh.interpolation(mlp_risk(), other, [0.0, 1.0])
    assert line.alphas == (0.0, 1.0)
    assert line.values == (mlp_risk().value(), mlp_risk(300, seed=3).value())
    assert line.values[0] != line.values[1]


def test_every_point_of_the_line_agrees_with_the_network_by_hand(other):
    line = sh.interpolation(mlp_risk(), other)
    start, end = mlp_risk().theta.numpy(), other.numpy()
    for alpha, value, accuracy in zip(
        line.alphas, line.values, line.accuracies, strict=True
    ):
        expected = by_hand((1 - alpha) * start + alpha * end)
        assert value == pytest.approx(expected[0], rel=1e-12)
        assert accuracy == expected[1]
    assert len(set(line.accuracies)) > 2


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_where_it_is_asked_for(shown, other, capsys):
    sh.interpolation(mlp_risk(), other, [0.0, 1.0], progress=shown)
    said = capsys.readouterr()
    assert ("points" in said.err, said.out) == (shown, "")


def test_by_default_there_are_25_points_from_minus_one_to_two(other):
    line = sh.interpolation(mlp_risk(), other)
    assert line.alphas == pytest.approx(np.linspace(-1, 2, 25), abs=1e-15)
    assert {0.0, 1.0} <= set(line.alphas)
    assert len(line.values) == len(line.accuracies) == 25


@pytest.mark.parametrize(
    "alphas",
    [
        (0.0, 0.5),
        np.array([0.0, 0.5]),
        torch.tensor([0.0, 0.5], dtype=torch.float64),
        (a for a in (0.0, 0.5)),
    ],
    ids=["tuple", "array", "tensor", "generator"],
)
def test_alphas_may_come_from_anything_that_can_be_run_through(alphas, other):
    line = sh.interpolation(mlp_risk(), other, alphas)
    assert list(line.alphas) == [0.0, 0.5]
    assert len(line.values) == 2


def test_a_point_of_the_wrong_length_is_refused(other):
    for wrong in (other[:-1], other[:1]):
        with pytest.raises(ValueError, match=f"got .*{len(wrong)}"):
            sh.interpolation(mlp_risk(), wrong)


def test_a_closure_has_a_loss_and_no_accuracies(tmp_path):
    line = sh.interpolation(quadratic([1.0, 2.0]), torch.ones(2), [0.0, 0.5, 1.0])
    assert line.values == pytest.approx([0.0, 1.5 / 4, 1.5])
    assert line.accuracies == ()
    assert line.cost.forwards == 3
    assert "accuracy" not in [axes.get_ylabel() for axes in line.plot().axes]


def test_the_barrier_is_the_rise_above_the_higher_end_between_the_two():
    risk = quadratic([-2.0])  # f = -theta^2: highest at 0, which lies between -1 and 1
    risk = risk.with_model(risk.network())
    start = sh.EmpiricalRisk.network(risk)
    with torch.no_grad():
        next(start.parameters()).fill_(-1.0)
    hill = risk.with_model(start)
    line = sh.interpolation(hill, torch.ones(1), [-2.0, 0.0, 0.5, 1.0, 2.0])
    barrier, largest = line.readings()
    assert (barrier.name, barrier.value, barrier.bound) == ("barrier", 1.0, "≥")
    assert (largest.name, largest.value) == ("largest f", 0.0)
    (alone,) = sh.interpolation(hill, torch.ones(1), [0.0, 0.5]).readings()
    assert alone.name == "largest f"


def test_a_float32_point_is_taken_in_the_type_of_the_risk(other):
    line = sh.interpolation(mlp_risk(), other.float(), [1.0])
    assert line.values[0] == mlp_risk().value(other.float().double())


def test_the_line_of_text_names_the_worst_point(other):
    line = sh.interpolation(mlp_risk(), other, [0.0, 0.5, 2.0])
    worst = int(np.argmax(line.values))
    value, alpha = line.values[worst], line.alphas[worst]
    expected = f"largest f {number(value)}   (at alpha {alpha:g}, of 3 points, completed; "
    assert str(line).startswith(expected + "3 forward passes")


# -- bent paths ------------------------------------------------------------------------


def test_a_bent_path_goes_around_the_barrier_of_the_line(other):
    risk = mlp_risk()
    found = sh.low_loss_path(risk, other, num_steps=100, num_points=9)
    a, w, b = risk.theta.numpy(), found.bend.numpy(), other.numpy()
    for t, value, accuracy in zip(
        found.path.alphas, found.path.values, found.path.accuracies, strict=True
    ):
        expected = by_hand((1 - t) ** 2 * a + 2 * t * (1 - t) * w + t**2 * b)
        assert (value, accuracy) == (pytest.approx(expected[0], rel=1e-9), expected[1])
    line = sh.interpolation(risk, other, found.line.alphas)
    assert found.line.values == line.values
    assert found.line.barrier == max(line.values) - max(line.values[0], line.values[-1])
    assert 0 <= found.path.barrier < found.line.barrier
    assert (found.cost.gradients, found.cost.forwards) == (100, 18)
    assert [r.value for r in found.readings()] == [found.path.barrier, found.line.barrier]


def test_the_picture_of_a_path_holds_both_ways(other):
    found = sh.low_loss_path(mlp_risk(), other, num_steps=3, num_points=5)
    loss, accuracy = found.plot().axes
    path, line = loss.get_lines()[:2]
    assert list(path.get_ydata()) == list(found.path.values)
    assert list(line.get_ydata()) == list(found.line.values)
    low, high = loss.get_ylim()
    both = (*found.path.values, *found.line.values)
    assert low < min(both) < max(both) < high
    assert accuracy.get_ylabel() == "accuracy, %"


def test_a_path_that_is_cut_short_is_seen_all_the_same(other):
    found = sh.low_loss_path(mlp_risk(), other, max_seconds=0, num_points=3)
    assert found.status == "max_seconds"
    assert found.losses == ()
    assert found.path.values == pytest.approx(found.line.values)
    with pytest.raises(ValueError, match="`num_points` must be at least 3"):
        sh.low_loss_path(mlp_risk(), other, num_points=2)
