"""What all results share: their statuses, costs, texts, tables and files."""

import json
import math
import os
import pickle
from dataclasses import dataclass, fields, replace
from functools import cache

import pytest
import safetensors.torch
import torch
from helpers.batchsize import advice
from helpers.problems import mlp_risk, quadratic, tiny_mlp

import sharpness as sh
from sharpness import load_result
from sharpness._json import as_plain
from sharpness._results import Cost, Reading, Result
from sharpness._saving import restored
from sharpness.measures import flatness, traces
from sharpness.results import Status, readings_of

QUIET = {"progress": False}
MADE = {
    "Summary": lambda: sh.summary(
        mlp_risk(20), ["lambda_max", "phi", "worst_l2_sharded", "sampling"], **QUIET
    ),
    "HessianEigenpairs": lambda: sh.eigenpairs(mlp_risk(), 3, max_hvps=4, **QUIET),
    "LayerwiseEigenpairs": lambda: sh.layerwise_eigenpairs(tiny_mlp().risk(), **QUIET),
    "StochasticEstimate": lambda: sh.trace(mlp_risk(), max_hvps=60, **QUIET),
    "DiagonalEstimate": lambda: traces.diagonal(mlp_risk(), max_hvps=30, **QUIET),
    "SpectralDensity": lambda: sh.spectral_density(
        mlp_risk(), num_starts=2, num_steps=5, grid=20, **QUIET
    ),
    "SubspaceSharpness": lambda: sh.subspace_sharpness(
        mlp_risk(), subspace_dim=3, num_draws=2, solver="ascent", **QUIET
    ),
    "WorstCaseSharpness": lambda: sh.worst_case_sharpness(mlp_risk(), 0.1, **QUIET),
    "AverageCaseSharpness": lambda: sh.average_case_sharpness(mlp_risk(), 0.1, **QUIET),
    "AccuracyRadius": lambda: flatness.pac_bayes_sigma(mlp_risk(), num_draws=2, **QUIET),
    "RelativeFlatness": lambda: flatness.relative_flatness(
        mlp_risk(), num_probes=2, **QUIET
    ),
    "Norms": lambda: sh.norms(mlp_risk()),
    "LambdaMaxSampling": lambda: sh.lambda_max_sampling(mlp_risk(20), num_folds=3, **QUIET),
    "Audit": lambda: sh.audit(relu_risk(), "norms", **QUIET),
    "BatchSizeAdvice": advice,
    "Interpolation": lambda: sh.interpolation(mlp_risk(), mlp_risk().theta + 1, [0, 0.5]),
    "TrackedPoint": lambda: sh.SharpnessTracker(
        tiny_mlp().model, torch.nn.CrossEntropyLoss(), tiny_mlp().data
    ).history[0],
}


def relu_risk() -> sh.EmpiricalRisk:
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
    data = torch.randn(9, 3), torch.randint(0, 2, (9,))
    return sh.EmpiricalRisk(torch.nn.Sequential(*layers), torch.nn.CrossEntropyLoss(), data)


@cache
def made(name: str) -> Result:
    return MADE[name]()


@dataclass(frozen=True, kw_only=True)
class Plain(Result):
    """A result of `num` numbers."""

    num: int = 1
    value: float = 2.0

    def _rows(self):
        for i in range(self.num):
            yield Reading(name=f"x{i}", value=self.value, error=0.5, evidence="a <guess>")


def whole(result: Result) -> tuple[str, list[torch.Tensor]]:
    """Everything a result holds: its plain values as text, and its arrays."""
    arrays: list[torch.Tensor] = []

    def keep(array) -> str:
        arrays.append(torch.as_tensor(array))
        return str(len(arrays))

    return repr(as_plain(result, keep)), arrays


# -- statuses ----------------------------------------------------------------------------


def test_the_worst_status_is_the_last_in_their_order():
    order = list(Status)
    for i, first in enumerate(order):
        for second in order[i:]:
            assert Status.worst(first, second) is second
            assert Status.worst(second, first) is second


def test_what_is_missing_spoils_nothing_and_an_interrupt_is_never_hidden():
    assert Status.worst(Status.NOT_AVAILABLE, Status.CONVERGED) is Status.CONVERGED
    assert Status.worst(Status.NOT_AVAILABLE) is Status.NOT_AVAILABLE
    assert Status.worst() is Status.COMPLETED
    for other in Status:
        assert Status.worst(other, Status.INTERRUPTED) is Status.INTERRUPTED
    good = [status for status in Status if status.ok]
    for status in set(Status) - {*good, Status.NOT_AVAILABLE}:
        assert all(Status.worst(status, other) is status for other in good)


def test_numbers_that_are_not_finite_count_as_a_part():
    assert Status.worst(Status.COMPLETED, finite=False) is Status.NON_FINITE
    assert Status.worst(Status.INTERRUPTED, finite=False) is Status.INTERRUPTED
    assert Status.worst(Status.MAX_HVPS, finite=True) is Status.MAX_HVPS


# -- costs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (Cost(), ""),
        (
            Cost(products=1, gradients=1, forwards=1),
            "1 product, 1 gradient, 1 forward pass",
        ),
        (Cost(products=61.4, seconds=0.25), "61 products, 0.2 s"),
        (Cost(forwards=2, gradients=3), "3 gradients, 2 forward passes"),
        (Cost(seconds=2.04), "2.0 s"),
    ],
)
def test_a_cost_names_what_was_spent(cost, text):
    assert str(cost) == text


def test_costs_add_up():
    first, second = Cost(1, 2, 3, 0.5), Cost(10, 20, 30, 0.25)
    assert first + second == Cost(11, 22, 33, 0.75)
    assert sum([first, second], Cost()) == first + second


def test_counts_are_read_from_the_cost():
    found = Plain(status=Status.COMPLETED, cost=Cost(1, 2, 3, 4.0))
    assert (found.num_hvps, found.num_evals, found.seconds) == (1, 2, 4.0)
    assert replace(found, cost=Cost(forwards=3)).num_evals == 3


# -- texts and tables --------------------------------------------------------------------


def test_the_line_has_numbers_evidence_status_and_cost():
    found = Plain(num=2, status=Status.MAX_HVPS, cost=Cost(products=3, seconds=1.0))
    line = "x0 2.000 ± 0.5, x1 2.000 ± 0.5   (a <guess>, max_hvps; 3 products, 1.0 s)"
    assert str(found) == line


def test_a_long_result_is_still_one_line():
    found = Plain(num=30, status=Status.CONVERGED)
    assert str(found).endswith("x19 2.000 ± 0.5, 10 more   (a <guess>, converged)")
    assert len(found.readings()) == 30


def test_a_number_that_is_not_there_is_unknown():
    found = Plain(value=math.nan, status=Status.INTERRUPTED)
    assert str(found) == "x0 unknown   (a <guess>, interrupted)"
    assert "<td>–</td>" in found._repr_html_()


def test_other_matrices_are_named():
    found = Plain(status=Status.COMPLETED, settings={"matrix": "gauss_newton"})
    (reading,) = found.readings()
    assert reading.evidence == "a <guess>, of the gauss_newton, completed"


def test_the_first_reading_bears_the_cost():
    found = Plain(num=3, status=Status.COMPLETED, cost=Cost(gradients=2))
    assert [r.cost for r in found.readings()] == ["2 gradients", "", ""]


def test_a_notebook_shows_a_table_with_nothing_but_text_in_it():
    found = Plain(num=2, status=Status.COMPLETED, cost=Cost(gradients=2))
    table = found._repr_html_()
    assert table.count("<tr>") == 3
    assert "a &lt;guess&gt;, completed" in table
    assert "<guess>" not in table
    assert "<td>2.000</td>" in table


@pytest.mark.parametrize("name", MADE)
def test_every_result_has_its_texts_its_table_and_its_frame(name):
    found = made(name)
    readings = found.readings()
    assert all(str(found.status) in r.evidence for r in readings) or name in (
        "Summary",
        "LayerwiseEigenpairs",
        "TrackedPoint",
    )
    assert found._repr_html_().count("<tr>") == len(readings) + 1
    frame = found.to_frame()
    assert list(frame.columns) == [field.name for field in fields(Reading)]
    assert list(frame["name"]) == [r.name for r in readings]
    assert str(found.cost) in str(found) or name == "TrackedPoint"
    assert "tensor" not in str(found)


# -- files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_a_result_is_saved_and_loaded_whole(name, tmp_path):
    path = tmp_path / "deep" / "result.safetensors"
    made(name).save(path)
    again = load_result(path)
    assert type(again) is type(made(name))
    (text, arrays), (other, others) = whole(made(name)), whole(again)
    assert text == other
    assert len(arrays) == len(others)
    for a, b in zip(arrays, others, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert again.readings() == made(name).readings() or "nan" in repr(again.readings())
    assert str(again) == str(made(name))
    assert os.listdir(path.parent) == [path.name]


def test_what_was_loaded_goes_on_answering(tmp_path):
    density, pairs = made("SpectralDensity"), made("HessianEigenpairs")
    density.save(tmp_path / "density")
    again = load_result(tmp_path / "density")
    assert again.count_above(0.1) == density.count_above(0.1)
    assert again.integral(abs) == density.integral(abs)
    pairs.save(tmp_path / "pairs")
    vectors = load_result(str(tmp_path / "pairs")).eigenvectors
    assert torch.equal(vectors, pairs.eigenvectors)
    warm = sh.eigenpairs(mlp_risk(), v0=vectors, **QUIET)
    assert warm.status.ok


def test_a_result_replaces_the_file_and_a_failure_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "a"
    made("Norms").save(path)
    made("Interpolation").save(path)
    assert type(load_result(path)).__name__ == "Interpolation"
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("full disk")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full disk"):
        made("Norms").save(path)
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == before


class Shout:
    def __reduce__(self):
        return print, ("executed",)


def headed(**facts) -> bytes:
    return safetensors.torch.save({"0": torch.ones(2)}, facts)


WRONG = {
    "nothing": b"",
    "letters": b"not a result",
    "a pickle that runs": pickle.dumps(Shout()),
    "another's tensors": headed(),
    "another's format": headed(format="pt", result="{}"),
    "no JSON": headed(format="sharpness-result", result="{"),
    "no result": headed(format="sharpness-result", result="[1, 2]"),
    "a class of none": headed(format="sharpness-result", result='{"type": "os.system"}'),
    "a class without its fields": headed(
        format="sharpness-result", result='{"type": "Norms"}'
    ),
    "no such status": headed(
        format="sharpness-result", result='{"type": "Norms", "status": "fine"}'
    ),
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_in_one_line_and_runs_nothing(content, tmp_path, capsys):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match="`path` must be a file that a result's `save`"
    ) as e:
        load_result(path)
    assert "\n" not in str(e.value)
    assert "executed" not in capsys.readouterr().out


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "a"
    made("HessianEigenpairs").save(path)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="`path` must be"):
            load_result(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_result(tmp_path / "none.safetensors")


# -- records -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_the_plain_values_of_a_result_give_its_numbers_again(name):
    plain = json.loads(json.dumps(as_plain(made(name)), allow_nan=False))
    again = restored(Result, plain)
    for one, other in zip(made(name).readings(), again.readings(), strict=True):
        assert (one.name, one.bound, one.unit) == (other.name, other.bound, other.unit)
        assert one.value == pytest.approx(other.value, rel=0, abs=0, nan_ok=True)


def numbers(plain) -> list[float]:
    if isinstance(plain, dict):
        return [n for item in plain.values() for n in numbers(item)]
    if isinstance(plain, list):
        return [n for item in plain for n in numbers(item)]
    return [plain] if isinstance(plain, float) else []


def test_no_number_of_a_record_stands_under_two_keys():
    names = ["lambda_max", "trace", "phi", "average", "norms", "frobenius_norm", "density"]
    found = sh.summary(mlp_risk(), names, k=3, **QUIET)
    plain = as_plain({"value": found.value, "measures": found.results})
    kept = numbers(plain)
    for reading in readings_of(plain):
        assert kept.count(reading.value) == 1, reading.name


def test_a_status_cost_and_settings_lie_in_one_place_of_every_result():
    shared = {field.name for field in fields(Result) if field.repr}
    for name in MADE:
        plain = as_plain(made(name))
        assert plain["type"] == name
        assert shared <= set(plain)
        assert not {"num_hvps", "num_evals", "seconds", "seed", "tol"} & set(plain)


def test_raise_for_status_gives_the_result_or_raises_with_it():
    found = sh.eigenpairs(quadratic([1.0, 2.0]), **QUIET)
    assert found.raise_for_status() is found
    with pytest.raises(sh.NotConvergedError) as error:
        made("HessianEigenpairs").raise_for_status()
    assert error.value.result is made("HessianEigenpairs")
