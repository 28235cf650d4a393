"""Lines and planes through the parameters: every number by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers.problems import (
    ONE_SAMPLE,
    Pole,
    by_hand,
    mlp_data,
    mlp_hessian,
    mlp_risk,
    quadratic,
    second_minimum,
    symmetric,
    tiny_mlp,
    trained_mlp,
)
from torch import Tensor, nn

import sharpness as sh
from sharpness._json import as_plain
from sharpness._saving import restored
from sharpness.measures.directions import filter_normalised
from sharpness.results import LossPlane, load_result

# -- filter normalisation --------------------------------------------------------------


class EveryLayer(nn.Module):
    """A layer of each kind; its loss is the sum of squares of all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)  # weight (4, 3, 2, 2)
        self.embedding = nn.Embedding(5, 3)
        self.batchnorm = nn.BatchNorm2d(4)
        self.layernorm = nn.LayerNorm((2, 3))
        self.groupnorm = nn.GroupNorm(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.recurrent = nn.LSTM(3, 2)
        self.position = nn.Parameter(torch.zeros(2, 5))


def loops(name: str, shape: torch.Size) -> list[tuple]:
    """The filters of a parameter as index tuples, written out."""
    rows = [(i,) for i in range(shape[0])]
    return {
        "linear.weight": rows,
        "conv.weight": rows,
        "up.weight": [
            (slice(2 * group, 2 * group + 2), output)
            for group in range(2)
            for output in range(3)
        ],
        "embedding.weight": rows,
        "attention.in_proj_weight": rows,
        "attention.out_proj.weight": rows,
        "recurrent.weight_ih_l0": rows,
        "recurrent.weight_hh_l0": rows,
        "position": rows,
    }.get(name, [])


def test_filter_normalisation_is_what_loops_over_all_filters_give():
    torch.manual_seed(0)
    model = EveryLayer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.linear.weight[1] = 0.0
    risk = sh.EmpiricalRisk(
        model,
        closure=lambda m, _: sum(p.square().sum() for p in m.parameters()),
        data=ONE_SAMPLE,
    )
    direction = torch.randn(risk.n)
    found = filter_normalised(risk, direction)
    start = 0
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        step = direction[start : start + shape.numel()].view(shape)
        expected = torch.zeros(shape)
        for place in loops(name, shape):
            ratio = parameter[place].detach().square().sum() / step[place].square().sum()
            expected[place] = step[place] * ratio.sqrt()
        ours = found[start : start + shape.numel()].view(shape)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
        assert bool(ours.any()) == bool(loops(name, shape)), name
        start += shape.numel()
    start = sum(p.numel() for p in (model.position, model.linear.weight[0]))
    assert not found[start : start + 3].any()  # the filter of zeros stays


def test_random_directions_need_a_filter():
    with pytest.raises(ValueError, match="`directions` must be another kind"):
        sh.loss_plane(quadratic([1.0, 2.0]))


# -- values ----------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [None, 1, 7])
def test_every_point_agrees_with_the_network_by_hand(at_once):
    risk = mlp_risk()
    plane = sh.loss_plane(risk, num_points=5, extent=0.5, at_once=at_once)
    assert plane.axes == ((-0.5, -0.25, 0.0, 0.25, 0.5),) * 2
    u, v = plane.directions.numpy()
    for (i, x), (j, y) in (
        (a, b) for a in enumerate(plane.axes[0]) for b in enumerate(plane.axes[1])
    ):
        value, accuracy = by_hand(risk.theta.numpy() + x * u + y * v)
        assert plane.values[i, j] == pytest.approx(value, rel=1e-12)
        assert plane.accuracies[i, j] == accuracy
    assert plane.value == plane.values[2, 2] == risk.value()
    assert plane.cost.forwards == 26
    assert (plane.cost.gradients, plane.cost.products) == (1, 2)
    assert plane.status == "completed"


class Counted(nn.Module):
    """Control flow that `vmap` cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = trained_mlp()

    def forward(self, x: Tensor) -> Tensor:
        out = self.inside(x)
        return out if float(out.detach().sum()) > -math.inf else -out


def test_a_model_that_vmap_cannot_follow_goes_point_by_point():
    risk = sh.EmpiricalRisk(Counted(), nn.CrossEntropyLoss(), mlp_data())
    same = sh.loss_plane(mlp_risk(), num_points=3)
    found = sh.loss_plane(risk, num_points=3, at_once=4)
    np.testing.assert_allclose(found.values, same.values, rtol=1e-12)


@pytest.mark.parametrize("batchnorm", ["running", "batch", "recalibrated"])
def test_batchnorm_is_as_the_risk_says_at_every_point(batchnorm):
    risk = tiny_mlp(batchnorm=True).risk(batchnorm=batchnorm)
    direction = torch.linspace(-1, 1, risk.n, dtype=torch.float64)
    line = sh.loss_plane(risk, direction, num_points=3, at_once=3)
    for x, value in zip(line.axes[0], line.values, strict=True):
        assert value == pytest.approx(risk.value(risk.theta + x * direction), rel=1e-12)


def test_regression_has_no_accuracies_and_goes_at_once_too():
    x, y = mlp_data()
    data = x, nn.functional.one_hot(y, 3).double()
    risk = sh.EmpiricalRisk(trained_mlp(), nn.MSELoss(), data)
    line = sh.loss_plane(risk, num_points=3, dims=1, at_once=3)
    assert line.accuracies is None
    end = risk.theta + line.directions[0]
    assert line.values[2] == pytest.approx(risk.value(end), rel=1e-12)


# -- the quadratic model ---------------------------------------------------------------


def test_the_top_eigenvectors_plane_has_their_eigenvalues_as_curvatures():
    risk = mlp_risk()
    top = torch.linalg.eigvalsh(mlp_hessian(risk.theta)).flip(0)
    plane = sh.loss_plane(risk, "eigenvectors", num_points=3, extent=1e-3)
    for i in range(2):
        through = plane.values[:, 1] if i == 0 else plane.values[1]
        curvature = (through[0] - 2 * through[1] + through[2]) / 1e-6
        assert curvature == pytest.approx(float(top[i]), rel=1e-2)
        assert plane.curvatures[i][i] == pytest.approx(float(top[i]), rel=1e-2)
    assert abs(plane.curvatures[0][1]) < 1e-2 * float(top[0])


def test_of_a_quadratic_nothing_deviates():
    matrix = symmetric([3.0, 1.0, -2.0])
    risk = quadratic(torch.ones(3, dtype=torch.float64), at=torch.ones(3) * 0.5)
    assert sh.loss_plane(risk, matrix[:2], num_points=4).deviation < 1e-12


def test_the_deviation_is_that_of_f_from_its_model():
    risk = mlp_risk()
    plane = sh.loss_plane(risk, num_points=3)
    hessian, slope = mlp_hessian(risk.theta), risk.gradient()
    off = way = 0.0
    for i, x in enumerate(plane.axes[0]):
        for j, y in enumerate(plane.axes[1]):
            step = x * plane.directions[0] + y * plane.directions[1]
            model = risk.value() + float(slope @ step + step @ hessian @ step / 2)
            assert plane.model[i, j] == pytest.approx(model, rel=1e-9)
            off += (plane.values[i, j] - model) ** 2
            way += (plane.values[i, j] - risk.value()) ** 2
    assert plane.deviation == pytest.approx(math.sqrt(off / way), rel=1e-9)
    assert plane.deviation > 0.01
    reading = {r.name: r for r in plane.readings()}["deviation"]
    assert reading.value == plane.deviation


def test_without_the_model_there_is_no_derivative():
    plane = sh.loss_plane(mlp_risk(), num_points=2, quadratic=False)
    assert (plane.cost.gradients, plane.cost.products) == (0, 0)
    assert math.isnan(plane.deviation)
    assert [reading.name for reading in plane.readings()] == ["lowest f"]


# -- networks --------------------------------------------------------------------------


def test_a_plane_through_three_networks_has_their_losses_where_they_lie():
    risk, second, third = mlp_risk(), second_minimum(), trained_mlp(200, seed=5)
    plane = sh.loss_plane(risk, "between", [second, third], num_points=3)
    u, v = plane.directions
    assert torch.stack([u @ u, v @ v, u @ v]).tolist() == pytest.approx([1, 1, 0], abs=1e-9)
    expected = [by_hand(second.numpy())[0], risk.with_model(third).value()]
    for (x, y), value in zip(plane.networks, expected, strict=True):
        assert risk.value(risk.theta + x * u + y * v) == pytest.approx(value, rel=1e-9)
        assert plane.axes[0][0] < x < plane.axes[0][-1]
        assert plane.axes[1][0] < y < plane.axes[1][-1]
    assert plane.networks[0][1] == pytest.approx(0, abs=1e-9)
    assert max(plane.unexplained) < 1e-9


def test_a_trajectory_has_the_principal_directions_and_says_what_they_leave_out():
    risk = mlp_risk()
    points = [trained_mlp(steps).state_dict() for steps in (1, 10, 40, 90, 150)]
    plane = sh.loss_plane(risk, "trajectory", points, num_points=2)
    offsets = np.stack(
        [np.concatenate([t.numpy().ravel() for t in p.values()]) for p in points]
    )
    offsets -= risk.theta.numpy()
    basis = np.linalg.svd(offsets, full_matrices=False)[2][:2]
    ours = plane.directions.numpy()
    np.testing.assert_allclose(np.abs(np.sum(ours * basis, 1)), 1, rtol=1e-9)
    places = offsets @ ours.T
    np.testing.assert_allclose(plane.networks, places, atol=1e-9)
    off = np.linalg.norm(offsets - places @ ours, axis=1)[:4]
    share = off / np.linalg.norm(offsets, axis=1)[:4]
    np.testing.assert_allclose(plane.unexplained[:4], share, rtol=1e-6)
    assert plane.unexplained[4] == 0.0  # theta itself
    reading = {r.name: r for r in plane.readings()}["unexplained"]
    assert reading.value == pytest.approx(share.max())
    assert 0 < share.max() < 1


# -- no numbers ------------------------------------------------------------------------


def poles() -> sh.EmpiricalRisk:
    """Outputs that are 0 / 0 for one sample once the weights are all zero."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    nn.init.ones_(model[0].weight)
    return sh.EmpiricalRisk(
        model, lambda out, y: (out / out).square().mean() + out.mean(), mlp_pairs()
    )


def mlp_pairs() -> tuple[Tensor, Tensor]:
    return torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)


def test_nan_stays_nan_and_is_hatched():
    line = sh.loss_plane(poles(), -torch.ones(4), num_points=5, extent=1.0)
    assert line.axes[0][-1] == 1.0  # there every weight is 0
    assert np.isnan(line.values).tolist() == [False] * 4 + [True]
    assert line.status == "completed"
    assert "5 points, 1 without a number" in str(line)
    (axes,) = line.plot().axes
    (gap,) = [patch for patch in axes.patches if patch.get_hatch()]
    assert gap.get_x() <= 1.0 <= gap.get_x() + gap.get_width()
    assert gap.get_x() > line.axes[0][-2]


def test_a_plane_with_a_hole_shows_what_there_is():
    both = torch.stack([-torch.ones(4), -torch.ones(4)]).double()
    plane = sh.loss_plane(poles(), both, num_points=3, extent=1.0, quadratic=False)
    assert np.isnan(plane.values).sum() == 2  # x + y = 1
    mesh = plane.plot().axes[0].collections[0]
    assert mesh.get_array().mask.tolist() == np.isnan(plane.values).T.tolist()


# -- resuming --------------------------------------------------------------------------


def test_finished_points_are_not_evaluated_again(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "points.csv"
    whole = sh.loss_plane(mlp_risk(), num_points=4, points_file=path, at_once=3)
    lines = path.read_text().splitlines()
    assert lines[1] == "x,y,loss,accuracy"
    assert len(lines) == 2 + 16
    path.write_text("\n".join(lines[:9]) + "\n" + lines[9][:-3])  # 7 points, one torn
    risk = mlp_risk()
    seen = []
    values = risk.values
    monkeypatch.setattr(risk, "values", lambda t, n: (seen.append(len(t)), values(t, n))[1])
    again = sh.loss_plane(risk, num_points=4, points_file=path, at_once=3)
    assert sum(seen) == 9
    assert again.values.tolist() == whole.values.tolist()
    assert again.accuracies.tolist() == whole.accuracies.tolist()
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    assert again.num_evaluated == 16


def test_an_interrupt_keeps_what_was_seen(tmp_path, monkeypatch):
    path, risk = tmp_path / "points.csv", mlp_risk()
    values = risk.values
    left = iter([True] * 4)

    def interrupted(thetas, at_once):
        if not next(left, False):
            raise KeyboardInterrupt
        return values(thetas, at_once)

    monkeypatch.setattr(risk, "values", interrupted)
    found = sh.loss_plane(risk, num_points=3, points_file=path, at_once=1)
    assert found.status == "interrupted"
    assert np.isfinite(found.values).sum() == found.num_evaluated == 4
    assert "of 4 points, at" in str(found)
    monkeypatch.undo()
    assert sh.loss_plane(mlp_risk(), num_points=3, points_file=path).cost.forwards == 6


def test_the_points_of_another_plane_are_refused(tmp_path):
    path = tmp_path / "points.csv"
    sh.loss_plane(mlp_risk(), num_points=2, points_file=path)
    before = path.read_text()
    others = (
        lambda: sh.loss_plane(mlp_risk(), num_points=2, seed=1, points_file=path),
        lambda: sh.loss_plane(mlp_risk(), num_points=3, points_file=path),
        lambda: sh.loss_plane(mlp_risk().subset(range(20)), num_points=2, points_file=path),
    )
    for other in others:
        with pytest.raises(ValueError, match=r"`points_file` must hold points of this"):
            other()
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"`points_file` must hold points of this"):
        sh.loss_plane(mlp_risk(), num_points=2, points_file=path)
    path.write_text(before)
    assert sh.loss_plane(mlp_risk(), num_points=2, points_file=path).cost.forwards == 1


# -- how it is kept and shown ----------------------------------------------------------


def test_a_plane_comes_back_from_its_file_and_its_record(tmp_path):
    plane = sh.loss_plane(mlp_risk(), num_points=2)
    plane.save(tmp_path / "plane.safetensors")
    again = load_result(tmp_path / "plane.safetensors")
    assert again.values.tolist() == plane.values.tolist()
    assert torch.equal(again.directions, plane.directions)
    plain = json.loads(json.dumps(as_plain(plane)))
    record = restored(LossPlane, plain)
    assert record.values.tolist() == plane.values.tolist()
    assert record.readings() == plane.readings()


def test_the_picture_of_a_plane_is_its_numbers():
    plane = sh.loss_plane(
        mlp_risk(), "between", [second_minimum(), trained_mlp(200, seed=5)], num_points=5
    )
    figure = plane.plot()
    loss, accuracy, *bars = figure.axes
    assert [bar.get_xlabel() for bar in bars] == ["loss", "accuracy, %"]
    figure.canvas.draw()
    for bar in bars:  # each has a scale to read it by
        low, high = bar.get_xlim()
        assert sum(low <= tick <= high for tick in bar.get_xticks()) >= 2
    assert loss.get_xlabel() == "towards network 1 (distance)"
    assert loss.get_ylabel() == "across, towards network 2 (distance)"
    mesh = loss.collections[0]
    assert mesh.get_array().tolist() == plane.values.T.tolist()
    assert mesh.get_clim() == (plane.values.min(), plane.values.max())
    shade = accuracy.collections[0]
    assert shade.get_array().tolist() == (100 * plane.accuracies).T.tolist()
    for axes in (loss, accuracy):
        circles = axes.get_lines()[-1]
        np.testing.assert_allclose(circles.get_xydata(), plane.networks)
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert all(left < x < right and low < y < high for x, y in plane.networks)
    assert f"off by {plane.deviation:.2g} of the rise" in loss.get_title(loc="left")


def test_the_picture_of_a_line_has_loss_model_and_accuracy():
    line = sh.loss_plane(mlp_risk(), dims=1, num_points=5)
    loss, accuracy = line.plot().axes
    seen, model = loss.get_lines()[:2]
    assert list(seen.get_xdata()) == list(line.axes[0])
    assert list(seen.get_ydata()) == line.values.tolist()
    assert list(model.get_ydata()) == line.model.tolist()
    assert model.get_linestyle() == "--"
    low, high = loss.get_ylim()
    assert low < line.values.min() < line.values.max() < high
    assert list(accuracy.lines[0].get_ydata()) == (100 * line.accuracies).tolist()
    assert loss.get_xlabel() == "random 1 (filter norms)"


# -- wrong calls -----------------------------------------------------------------------

WRONG = [
    ({"directions": "randm"}, "`directions` must be a tensor or one of random"),
    ({"directions": torch.ones(3)}, "`directions` must have shape"),
    ({"directions": torch.ones(3, 45)}, "`directions` must have shape"),
    ({"dims": 3}, "`dims` must be 1 or 2"),
    ({"num_points": 1}, "`num_points` must be at least 2"),
    ({"extent": 0}, "`extent` must be positive"),
    ({"at_once": 0}, "`at_once` must be at least 1"),
    ({"networks": [torch.ones(45)]}, "`networks` must be given for 'between'"),
    ({"directions": "between"}, "`networks` must hold 1 for a line or 2 for a plane"),
    ({"directions": "trajectory", "networks": [0]}, "`networks` must hold at least 2"),
    (
        {"directions": "between", "dims": 1, "networks": [torch.ones(4)]},
        "`networks` must have shape",
    ),
    (
        {"directions": "between", "dims": 1, "networks": [trained_mlp()]},
        "`networks` must differ from the risk's",
    ),
    (
        {"directions": "trajectory", "networks": [trained_mlp(), trained_mlp()]},
        "`networks` must span 2 directions",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_a_wrong_call_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        sh.loss_plane(mlp_risk(), **call)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


def test_a_centre_without_a_number_says_so():
    x = torch.tensor([[9.0, 1.0]], dtype=torch.float64)
    model = Pole(nn.Linear(2, 1, bias=False)).double()
    plane = sh.loss_plane(
        sh.EmpiricalRisk(model, nn.MSELoss(), (x, x[:, :1])), num_points=2
    )
    assert (plane.value, plane.status) == (math.inf, "non_finite")
    assert np.isinf(plane.values).all()
    assert plane.plot().axes[0].get_xlabel() == "random 1 (filter norms)"
