"""Figures: every result draws itself, and a notebook shows what it draws."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.problems import quadratic, softmax_regression

import sharpness as sh
from sharpness._results import Reading, Results, number
from sharpness.measures import flatness, traces
from sharpness.report import figures


def labels(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def interpolated(risk):
    return sh.interpolation(risk, risk.theta + 1, [0.0, 0.5, 1.0])


MEASURED = {
    "eigenpairs": lambda r: sh.eigenpairs(r, 3),
    "layers": sh.layerwise_eigenpairs,
    "phi": sh.epsilon_sharpness,
    "phis": lambda r: sh.epsilon_sharpness(r, [1e-2, 1e-3]),
    "subspace": lambda r: sh.subspace_sharpness(r, [1e-2, 1e-3], subspace_dim=3),
    "worst": lambda r: sh.worst_case_sharpness(r, [0.05, 0.1]),
    "average": lambda r: sh.average_case_sharpness(r, [0.05, 0.1], num_draws=3),
    "sigma": lambda r: flatness.pac_bayes_sigma(r, num_draws=3),
    "trace": sh.trace,
    "diagonal": traces.diagonal,
    "density": lambda r: sh.spectral_density(r, num_starts=2),
    "norms": sh.norms,
    "flatness": flatness.relative_flatness,
    "interpolation": interpolated,
    "path": lambda r: sh.low_loss_path(r, r.theta + 1, num_steps=2, num_points=3),
    "plane": lambda r: sh.loss_plane(r, num_points=3),
    "line": lambda r: sh.loss_plane(r, dims=1, num_points=3),
    "sampling": lambda r: sh.lambda_max_sampling(r, num_folds=3),
    "noise": sh.gradient_noise,
    "summary": lambda r: sh.summary(r, ["curvature", "norms"]),
    "audit": sh.audit,
}


@pytest.mark.parametrize("name", MEASURED)
def test_every_result_shows_itself(name, tmp_path):
    found = MEASURED[name](softmax_regression().risk())
    figure = found.plot(tmp_path / "deep" / "a.png")
    assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert found._repr_html_().startswith("<table")
    assert len(found.to_frame()) == len(found.readings())
    assert str(found) == repr(found)


def test_a_figure_needs_no_pyplot():
    code = "import sys; from sharpness.report import figures as f\n"
    code += "f.readings_plot([])._repr_png_(); print('matplotlib.pyplot' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout.decode().strip() == "False"


def test_eigenvalues_are_bars_with_their_bounds():
    found = sh.eigenpairs(quadratic([3.0, 2.0, -1.0]), 3)
    (axes,) = found.plot().axes
    assert labels(axes) == ["lambda_max", "lambda_2", "lambda_3"]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([3, 2, -1], rel=1e-3)


def test_every_eigenvalue_that_was_asked_for_stands_in_the_line():
    line = str(sh.eigenpairs(quadratic([3.0, 2.0, 1.0, 0.5]), 3))
    for name in ("lambda_max 3.000 ±", "lambda_2 2.000 ±", "lambda_3 1.000 ±"):
        assert name in line


def test_several_radii_are_drawn_against_the_radius_and_print_a_line_each():
    risk = softmax_regression().risk()
    found = sh.epsilon_sharpness(risk, [1e-2, 1e-3])
    assert isinstance(found, Results)
    assert str(found).splitlines() == [str(result) for result in found]
    (axes,) = found.plot().axes
    assert axes.get_xlabel() == "epsilon"
    assert "%" in axes.get_ylabel()
    best, protocol = (container.lines[0] for container in axes.containers)
    assert list(best.get_xdata()) == [1e-2, 1e-3]
    assert list(best.get_ydata()) == [result.phi for result in found]
    assert list(protocol.get_ydata()) == [result.phi_protocol for result in found]
    assert Results([]).plot().axes[0].get_xlabel() == "radius"


def test_the_way_between_two_networks_has_the_loss_and_the_accuracy():
    found = interpolated(softmax_regression().risk())
    loss, accuracy = found.plot().axes
    assert list(loss.lines[0].get_ydata()) == list(found.values)
    assert list(accuracy.lines[0].get_ydata()) == [100 * a for a in found.accuracies]


def test_numbers_share_an_axis_only_with_their_own_kind():
    given = [
        Reading(name="a", value=1.0, axis="rise within 0.1"),
        Reading(name="b", value=100.0, error=5.0, bound="≥", axis="rise within 0.1"),
        Reading(name="c", value=2.0, axis="rise within 0.2"),
        Reading(name="d", value=3.0),
        Reading(name="e", value=math.nan),
    ]
    axes = figures.readings_plot(given).axes
    assert [labels(each) for each in axes] == [["a", "b"], ["c"], ["d"]]
    assert [each.get_xscale() for each in axes] == ["log", "linear", "linear"]
    texts = [[text.get_text() for text in each.texts] for each in axes]
    assert texts == [["1.000", "≥ 100.0 ± 5"], ["2.000"], ["3.000"]]
    for each, values in zip(axes, [[1.0, 105.0], [0.0, 2.0], [0.0, 3.0]], strict=True):
        low, high = each.get_xlim()
        assert low <= min(values) < max(values) < high  # nothing is cut, zero is there


def test_a_number_alone_is_a_bar_from_zero_with_its_value():
    """A dot on an axis of its own would have nothing to be compared with."""
    given = [
        Reading(name="trace", value=20.75, error=0.5),
        Reading(name="lowest", value=-2.0, axis="curvature"),
        Reading(name="largest", value=3.0, axis="curvature"),
    ]
    for axes, value in zip(figures.readings_plot(given).axes, (20.75, -2.0), strict=True):
        assert axes.patches[0].get_width() == value
        assert min(axes.get_xlim()) <= 0 <= max(axes.get_xlim())
        assert any(t.get_text().startswith(number(value)) for t in axes.texts)


def test_one_radius_is_bars_and_between_two_nothing_is_drawn():
    risk = softmax_regression().risk()
    (axes,) = sh.epsilon_sharpness(risk, 1e-2).plot().axes
    assert [bar.get_width() > 0 for bar in axes.patches] == [True, True]
    for radii, style in (
        ([0.05, 0.1], ["None", "None"]),
        ([0.05, 0.1, 0.2], ["-", "--"]),
    ):
        (axes,) = sh.worst_case_sharpness(risk, radii).plot().axes
        lines = [container.lines[0] for container in axes.containers]
        assert [line.get_linestyle() for line in lines] == style
        assert {line.get_marker() for line in lines} == {"^"}  # lower bounds


def test_a_comparison_shows_its_dots_whole():
    rows = [
        SimpleNamespace(name=n, ratios=(r,), ratio=r) for n, r in (("a", 0.6), ("b", 3))
    ]
    (axes,) = figures.comparison_plot(rows, ("x", "y")).axes
    low, high = axes.get_ylim()
    assert min(low, high) <= -0.5
    assert max(low, high) >= len(rows) - 0.5


def test_of_very_many_bars_some_are_named():
    names = [f"layer {i}" for i in range(500)]
    (axes,) = figures.bars_plot(names, torch.arange(500.0).tolist(), label="x").axes
    assert len(axes.patches) == 500
    assert len(labels(axes)) <= 40


@pytest.mark.parametrize("name", MEASURED)
def test_every_result_draws_into_axes_of_ones_own(name):
    figure = figures.Figure(4.0)
    left, right = figure.subplots(1, 2)
    found = MEASURED[name](softmax_regression().risk())
    assert found.plot(ax=left) is figure
    assert not right.has_data()
    drawn = [axes for axes in figure.axes if axes is not right and axes.has_data()]
    assert drawn
    figure.canvas.draw()
    for axes in drawn:  # in the left half, labels and all
        assert axes.get_window_extent().x1 <= right.get_window_extent().x0


def test_several_diagrams_need_a_place_in_a_grid():
    figure = figures.Figure(4.0)
    by_hand = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    given = [Reading(name="a", value=1.0), Reading(name="b", value=2.0)]
    with pytest.raises(ValueError, match="`ax` must be one of `subplots`"):
        figures.readings_plot(given, ax=by_hand)


def test_no_interval_is_cut_and_each_end_is_where_it_was_measured():
    found = sh.average_case_sharpness(
        softmax_regression().risk(), [0.05, 0.1, 0.2], num_draws=3
    )
    (axes,) = found.plot().axes
    (bars,) = (container.lines[2][0] for container in axes.containers)
    for segment, result in zip(bars.get_segments(), found, strict=True):
        low, high = result.interval
        assert segment[1][1] == pytest.approx(high)
        assert segment[0][1] == pytest.approx(low) or low <= 0
    assert axes.get_ylim()[1] > max(result.interval[1] for result in found)


def test_what_is_certified_of_eigenvalues_is_drawn():
    found = sh.eigenpairs(softmax_regression().risk(), 2, max_hvps=4)
    (axes,) = found.plot().axes
    named = {line.get_label(): line for line in axes.get_lines()}
    (limit,) = (line for name, line in named.items() if "lambda_max is below" in name)
    assert list(limit.get_xdata()) == [found.lambda_max_upper] * 2
    assert axes.get_xlim()[1] > found.lambda_max_upper
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches if p.get_hatch()]
    expected = [span for span in found.hidden if all(map(math.isfinite, span))]
    assert len(spans) == len(expected) > 0
    for drawn, wanted in zip(spans, expected, strict=True):
        assert drawn == pytest.approx(wanted)
