"""`measure_model` and `compare_models`: one call on networks that are at hand."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.problems import Point, softmax_regression
from torch import nn

import sharpness as sh
from sharpness.results import ModelComparison, load_result


def bowl(h: float, centre: float = 0.0) -> nn.Module:
    """A model whose loss is h/2 (theta - centre)^2, held at 0."""

    class Bowl(Point):
        def forward(self, x):
            return 0.5 * h * (self.theta - centre).square().sum() + 0 * x

    return Bowl(torch.zeros(2, dtype=torch.float64))


DATA = (torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))


def mean(outputs, targets):
    return (outputs + targets).mean()


def test_a_model_is_measured_as_by_risk_and_summary():
    problem = softmax_regression()
    model, loss, data = problem.model, problem.loss, problem.data
    found = sh.measure_model(model, loss, data, ["lambda_max", "norms"], k=2)
    apart = sh.summary(problem.risk(), ["lambda_max", "norms"], k=2)
    assert [r.value for r in found.readings()] == [r.value for r in apart.readings()]


def test_keywords_of_the_risk_are_passed_on():
    problem = softmax_regression()
    name = next(name for name, _ in problem.model.named_parameters())
    given = (problem.model, problem.loss, problem.data, "norms")
    part = sh.measure_model(*given, risk={"params": [name]})
    values = dict(problem.model.named_parameters())[name].detach()
    assert part["norms"].parameter_norm == pytest.approx(float(values.norm()))


@pytest.mark.parametrize("how", ["batch", "recalibrated"])
def test_keywords_of_the_risk_stand_beside_those_of_the_measures(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    data, loss = (torch.randn(20, 3), torch.arange(20) % 2), nn.CrossEntropyLoss()
    keywords = {"batchnorm": how, "num_samples": 15}
    risk = sh.EmpiricalRisk(model, loss, data, **keywords)
    found = sh.measure_model(model, loss, data, "norms", seed=3, **keywords)
    assert found.value == risk.value() != sh.measure_model(model, loss, data, "norms").value
    both = sh.compare_models(model, model, loss, data, "norms", **keywords)
    assert both.first.value == both.second.value == found.value


def test_two_models_are_compared_on_the_same_data():
    found = sh.compare_models(bowl(1.0), bowl(3.0), mean, DATA, ["lambda_max", "phi"])
    assert isinstance(found, ModelComparison)
    row = found["lambda_max"]
    assert row.ratio == pytest.approx(3, rel=1e-2)
    assert row.verdict == "second larger"
    assert found["phi(1e-3)"].bound == "≥"
    assert found["phi(1e-3)"].verdict == "second found larger, bounds have no order"
    assert "the true value may be larger" in found.table()
    assert "second larger" in str(found)
    with pytest.raises(KeyError, match="there are"):
        found["lambda_min"]


def test_a_loader_that_shuffles_is_run_through_once_for_both():
    problem = softmax_regression()
    loader = iter([problem.data])  # a second run would find nothing
    model = problem.model
    found = sh.compare_models(model, model, problem.loss, loader, "lambda_max")
    assert found["lambda_max"].verdict == "within the errors"
    assert found["lambda_max"].ratio == 1


def test_a_comparison_shows_itself_and_lasts(tmp_path):
    found = sh.compare_models(bowl(1.0), bowl(3.0), mean, DATA, ["lambda_max", "norms"])
    assert found._repr_html_().startswith("<table")
    assert len(found.to_frame()) == len(found.rows)
    assert found.plot()._repr_png_()
    found.save(tmp_path / "both.safetensors")
    again = load_result(tmp_path / "both.safetensors")
    assert again["lambda_max"].ratio == found["lambda_max"].ratio
    assert str(again) == str(found)


def test_an_interrupt_in_the_second_leaves_what_there_is(monkeypatch):
    from sharpness.measures import summary

    runs, count = dict(summary.RUNS), []
    measure, expected = runs["trace"]

    def interrupted(*args):
        count.append(0)
        if len(count) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setitem(summary.RUNS, "trace", (interrupted, expected))
    found = sh.compare_models(bowl(1.0), bowl(3.0), mean, DATA, ["lambda_max", "trace"])
    assert found.status == "interrupted"
    assert [row.name for row in found.rows] == ["lambda_max"]
    assert not math.isnan(found["lambda_max"].ratio)
