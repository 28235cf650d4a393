"""How far lambda_max moves with the samples: coverage on digits, closed forms, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.intervals import mean_ends
from helpers.problems import ONE_SAMPLE, Point, Pole, mlp_hessian, mlp_risk
from scipy import stats
from torch import Tensor, nn

import sharpness as sh
from sharpness import _progress, _run
from sharpness._json import to_line
from sharpness._results import Cost, number
from sharpness.lab import data
from sharpness.measures import sampling
from sharpness.results import LambdaMaxSampling
from sharpness.risk.chunks import ChunkedMean
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.memory import Footprint


def linear_regression(x: np.ndarray) -> sh.EmpiricalRisk:
    """Least squares with one output: the Hessian is 2/N X^T X, whatever the targets."""
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64)
    inputs = torch.from_numpy(x)
    return sh.EmpiricalRisk(model, nn.MSELoss(), (inputs, inputs[:, :1].clone()))


def top_of(x: np.ndarray) -> float:
    return float(np.linalg.eigvalsh(2 / len(x) * x.T @ x)[-1])


def heavy_tailed(num_samples: int, seed: int, num_features: int = 6) -> np.ndarray:
    """Student t with 9 degrees of freedom, a standard deviation of 2 to 1 by column."""
    rng = np.random.default_rng(seed)
    scales = np.linspace(2, 1, num_features) * math.sqrt(7 / 9)
    return rng.standard_t(9, (num_samples, num_features)) * scales


def samples(num: int = 200, seed: int = 0) -> sh.EmpiricalRisk:
    return linear_regression(heavy_tailed(num, seed))


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C in one of the products that any risk makes."""

    def at(call: int) -> list[int]:
        calls: list[int] = []
        product = EmpiricalRisk.product

        def failing(self, v: Tensor, matrix: str = "hessian") -> Tensor:
            calls.append(0)
            if len(calls) == call:
                raise KeyboardInterrupt
            return product(self, v, matrix)

        monkeypatch.setattr(EmpiricalRisk, "product", failing)
        return calls

    return at


def num_products(risk: sh.EmpiricalRisk, **options) -> int:
    """How many calls of `product` an undisturbed run makes."""
    calls, product = [], EmpiricalRisk.product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            EmpiricalRisk,
            "product",
            lambda self, *args: (calls.append(0), product(self, *args))[1],
        )
        sh.lambda_max_sampling(risk, **options)
    return len(calls)


@pytest.fixture(autouse=True)
def _memory_is_known(monkeypatch):
    without_measuring_memory(monkeypatch)


# -- real data ---------------------------------------------------------------------


def without_measuring_memory(patch: pytest.MonkeyPatch) -> None:
    """It is measured for each subset anew, which takes most of the time here."""
    size = Footprint(1 << 20, 1 << 20)
    patch.setattr(ChunkedMean, "footprint", lambda *_: size)


@cache
def digits_risk() -> sh.EmpiricalRisk:
    """All training digits under a small network, after 300 full-batch steps of Adam."""
    images, labels = data.load("digits").train
    x = nn.functional.avg_pool2d(images, 2).flatten(1).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, labels))


@cache
def resampled() -> tuple[float, list[LambdaMaxSampling]]:
    """lambda_max of all digits, and what 100 draws of 300 of them say of it."""
    risk = digits_risk()
    truth = sh.eigenpairs(risk, tol=1e-8).lambda_max
    found = []
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_memory(patch)
        for draw in range(100):
            subset = risk.subset(torch.from_numpy(drawn(draw)))
            found.append(sh.lambda_max_sampling(subset, num_folds=5, seed=draw))
    return truth, found


def drawn(draw: int) -> np.ndarray:
    """300 of the training digits, each at most once."""
    return np.random.default_rng(draw).permutation(digits_risk().num_samples)[:300]


def students_width(found: LambdaMaxSampling) -> float:
    """The relative width by Student's t alone, over five folds."""
    t = float(stats.t.ppf(0.975, 4))
    low = found.cross_fitted - t * found.cross_fitted_standard_error
    high = found.plug_in + t * found.plug_in_standard_error
    return (high - low) / (high + low)


@pytest.mark.slow
def test_the_interval_covers_the_lambda_max_of_all_digits(capsys):
    truth, found = resampled()
    ends = np.array([result.interval for result in found])
    hits = int(np.sum((ends[:, 0] <= truth) & (truth <= ends[:, 1])))
    width = np.median([result.relative_width for result in found])
    plug_in = np.mean([result.plug_in for result in found]) / truth - 1
    crossed = np.mean([result.cross_fitted for result in found]) / truth - 1
    print("coverage", hits / 100)
    with capsys.disabled():
        print(
            f"\nlambda_max {truth:.3g} of all digits: covered {hits} times of 100, median "
            f"relative width ±{width:.1%}, plug-in {plug_in:+.1%}, cross-fitted "
            f"{crossed:+.1%}",
            end="",
        )
    assert hits >= 90
    by_student = np.median([students_width(result) for result in found])
    assert by_student < 0.5
    assert width < 1.25 * by_student  # what lopsided folds add
    assert all(result.status == "completed" for result in found)


@pytest.mark.slow
def test_the_plug_in_is_biased_upward_and_the_cross_fitted_downward():
    truth, found = resampled()
    for bias in (
        np.array([result.plug_in for result in found]) - truth,
        truth - np.array([result.cross_fitted for result in found]),
    ):
        assert bias.mean() > -stats.norm.isf(1e-3) * bias.std() / math.sqrt(len(bias))
    gaps = [result.plug_in - result.cross_fitted for result in found]
    assert np.mean(gaps) > 0
    assert min(gaps) > -0.05 * truth


@pytest.mark.slow
def test_the_plug_in_is_the_largest_eigenvalue_of_the_same_samples():
    _, found = resampled()
    risk = digits_risk()
    for draw in (0, 50, 99):
        subset = risk.subset(torch.from_numpy(drawn(draw)))
        true = sh.eigenpairs(subset, tol=1e-8).lambda_max
        assert found[draw].plug_in == pytest.approx(true, rel=1e-2)


def test_the_plug_in_of_a_network_is_that_of_its_dense_hessian():
    risk = mlp_risk()
    found = sh.lambda_max_sampling(risk, tol=1e-6)
    true = np.linalg.eigvalsh(mlp_hessian(risk.theta).numpy())[-1]
    assert found.plug_in == pytest.approx(true, rel=1e-6)
    assert found.num_samples == 40
    assert found.interval[0] < found.cross_fitted < found.plug_in < found.interval[1]


# -- closed forms ------------------------------------------------------------------


def by_hand(x: np.ndarray, folds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """v_{-g}^T H_g v_{-g} and v^T H_g v of each fold."""

    def hessian(rows: np.ndarray) -> np.ndarray:
        return 2 / len(rows) * rows.T @ rows

    whole = np.linalg.eigh(hessian(x))[1][:, -1]
    crossed, plain = [], []
    for fold in folds:
        v = np.linalg.eigh(hessian(np.delete(x, fold, 0)))[1][:, -1]
        crossed.append(v @ hessian(x[fold]) @ v)
        plain.append(whole @ hessian(x[fold]) @ whole)
    return np.array(crossed), np.array(plain)


@pytest.mark.parametrize("num_folds", [3, 7, 10])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_every_number_of_a_linear_regression_is_the_one_by_hand(num_folds, confidence):
    x = heavy_tailed(200, 3)
    found = sh.lambda_max_sampling(
        linear_regression(x),
        num_folds=num_folds,
        confidence=confidence,
        tol=1e-10,
        seed=5,
    )
    order = torch.randperm(200, generator=torch.Generator().manual_seed(5)).numpy()
    crossed, plain = by_hand(x, np.array_split(order, num_folds))
    root = math.sqrt(num_folds)
    errors = crossed.std(ddof=1) / root, plain.std(ddof=1) / root
    assert found.plug_in == pytest.approx(top_of(x), rel=1e-9)
    assert found.cross_fitted == pytest.approx(crossed.mean(), rel=1e-6)
    assert found.cross_fitted_standard_error == pytest.approx(errors[0], rel=1e-4)
    assert found.plug_in_standard_error == pytest.approx(errors[1], rel=1e-4)
    low, above = mean_ends(crossed, confidence)[0], mean_ends(plain, confidence)[1]
    high = top_of(x) + above - plain.mean()
    assert found.interval == pytest.approx((low, high), rel=1e-5)
    assert found.relative_width == pytest.approx((high - low) / (high + low), rel=1e-4)
    assert (found.num_folds, found.settings["confidence"]) == (num_folds, confidence)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [40, 400])
def test_the_interval_covers_the_population_of_a_linear_regression(
    num_samples, capsys, monkeypatch
):
    """E x x^T is diagonal: its largest entry is 4, and the Hessian is twice it."""
    without_measuring_memory(monkeypatch)
    found = [
        sh.lambda_max_sampling(samples(num_samples, seed), seed=seed, num_folds=8)
        for seed in range(16)
    ]
    hits = sum(r.interval[0] <= 8 <= r.interval[1] for r in found)
    print("coverage", hits / 16)
    plug_in = np.array([result.plug_in for result in found])
    crossed = np.array([result.cross_fitted for result in found])
    with capsys.disabled():
        print(
            f"\nregression, {num_samples} samples: covered {hits} times of 16, plug-in "
            f"{plug_in.mean() / 8 - 1:+.1%}, cross-fitted {crossed.mean() / 8 - 1:+.1%}",
            end="",
        )
    assert hits >= stats.binom.ppf(1e-3, 16, 0.95)
    three = stats.norm.isf(1e-3) / math.sqrt(16)
    assert plug_in.mean() >= 8 - three * plug_in.std()
    assert crossed.mean() <= 8 + three * crossed.std()


@pytest.mark.parametrize("scale", [1e-8, 1e8, 2.0**-30])
def test_everything_scales_with_the_loss_r7(scale):
    x = heavy_tailed(100, 1)
    plain, scaled = (
        sh.lambda_max_sampling(linear_regression(part)) for part in (x, x * scale**0.5)
    )
    for name in ("plug_in", "plug_in_standard_error", "cross_fitted"):
        assert getattr(scaled, name) / scale == pytest.approx(
            getattr(plain, name), rel=1e-7
        )
    assert scaled.num_hvps == pytest.approx(plain.num_hvps, rel=1e-12)
    assert scaled.relative_width == pytest.approx(plain.relative_width, rel=1e-6)


def test_samples_that_are_all_alike_leave_no_doubt():
    x = np.tile([[1.0, 2.0, 3.0]], (30, 1))
    found = sh.lambda_max_sampling(linear_regression(x), tol=1e-8)
    assert found.interval == pytest.approx((28.0, 28.0), rel=1e-7)
    assert found.relative_width < 1e-7
    assert found.samples_needed(0.1) <= 1


def test_a_flat_risk_has_an_interval_of_zero_r9():
    found = sh.lambda_max_sampling(linear_regression(np.zeros((20, 3))))
    assert found.interval == (0.0, 0.0)
    assert found.plug_in == found.cross_fitted == 0.0
    assert found.status == "completed"
    assert "\n" not in str(found)


@pytest.mark.slow
def test_more_samples_narrow_the_interval_as_predicted(monkeypatch):
    """The width falls as 1 / sqrt(N), so the samples needed grow as 1 / width^2."""
    without_measuring_memory(monkeypatch)
    few, many = (
        np.mean([sh.lambda_max_sampling(samples(num, s)).relative_width for s in range(8)])
        for num in (100, 1600)
    )
    assert few / many == pytest.approx(4, rel=0.4)


def test_the_samples_needed_follow_the_square_of_the_width():
    found = sh.lambda_max_sampling(samples())
    half = found.relative_width / 2
    assert found.samples_needed(half) == pytest.approx(800, abs=1)
    assert found.samples_needed(found.relative_width) in (200, 201)
    assert found.samples_needed(10 * found.relative_width) in (2, 3)
    need = [found.samples_needed(relative) for relative in (0.2, 0.1, 0.05)]
    assert [b / a for a, b in pairwise(need)] == pytest.approx([4, 4], rel=0.1)


@pytest.mark.parametrize("relative", [0.0, -0.1, float("nan")])
def test_a_width_that_is_not_positive_is_refused(relative):
    found = sh.lambda_max_sampling(samples(30))
    with pytest.raises(ValueError, match="`relative` must be positive; got") as error:
        found.samples_needed(relative)
    assert f"got {relative}; " in str(error.value).replace(". ", "; ")


# -- how a run can end -------------------------------------------------------------


def test_an_interrupt_between_folds_gives_what_the_done_ones_tell_r32(monkeypatch):
    done, forms = [], sampling._quadratic_forms

    def failing(*args):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(forms(*args))
        return done[-1]

    monkeypatch.setattr(sampling, "_quadratic_forms", failing)
    found = sh.lambda_max_sampling(samples())
    assert found.status == "interrupted"
    assert found.num_folds == 6
    crossed = np.array([values for values, _ in done])[:, 0]
    assert found.cross_fitted == pytest.approx(crossed.mean(), rel=1e-12)
    assert found.interval[0] == pytest.approx(mean_ends(crossed, 0.95)[0], rel=1e-9)
    with pytest.raises(sh.NotConvergedError, match="Interrupted"):
        found.raise_for_status()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_an_interrupt_in_any_product_ends_the_run_r32(share, interrupted):
    """Also one that the search for an eigenvector of a fold meets."""
    risk = samples()
    total = num_products(risk)
    calls = interrupted(max(1, int(share * total)))
    found = sh.lambda_max_sampling(risk)
    assert found.status == "interrupted"
    assert len(calls) == max(1, int(share * total))
    assert found.num_folds < 10


@pytest.mark.parametrize("call", [1, 2, 6, 9, 17, 30])
def test_an_interrupt_anywhere_gives_a_result_that_can_be_printed(call, interrupted):
    interrupted(call)
    found = sh.lambda_max_sampling(samples())
    assert found.status == "interrupted"
    assert "interrupted" in str(found)
    assert "\n" not in str(found)
    json.loads(to_line({"found": found}))


@pytest.mark.parametrize("folds", [1, 2, 3, 5, 10])
def test_time_stops_after_the_fold_that_passes_it(folds, monkeypatch):
    """With a clock that ticks once a fold."""
    done, forms = [], sampling._quadratic_forms
    monkeypatch.setattr(
        sampling, "_quadratic_forms", lambda *args: (done.append(0), forms(*args))[1]
    )
    clock = SimpleNamespace(monotonic=lambda: float(len(done)))
    monkeypatch.setattr(_run, "time", clock)
    # The search on all samples looks at a clock of its own, which must not run out.
    whole = sampling.eigenpairs
    monkeypatch.setattr(
        sampling,
        "eigenpairs",
        lambda *args, **options: whole(*args, **{**options, "max_seconds": None}),
    )
    found = sh.lambda_max_sampling(samples(), max_seconds=folds - 0.5)
    assert found.num_folds == len(done) == folds
    assert found.status == ("completed" if folds == 10 else "max_seconds")
    assert np.isnan(found.interval).any() == (folds < 3)
    assert found.plug_in > 0
    assert "\n" not in str(found)
    assert found.status in str(found)


def test_no_time_at_all_stops_after_the_first_search():
    found = sh.lambda_max_sampling(samples(), max_seconds=0)
    assert found.status == "max_seconds"
    assert found.num_folds == 0
    assert "max_seconds" in str(found)


def test_a_risk_that_is_nan_says_so():
    x = torch.from_numpy(heavy_tailed(30, 0))
    x[3, 0] = 9.0
    model = Pole(nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64))
    found = sh.lambda_max_sampling(sh.EmpiricalRisk(model, nn.MSELoss(), (x, x[:, :1])))
    assert found.status == "non_finite"
    assert math.isnan(found.plug_in)
    assert "non_finite" in str(found)


# -- refusals ----------------------------------------------------------------------


def test_a_risk_from_a_closure_is_refused():
    risk = sh.EmpiricalRisk(
        Point(torch.ones(3)),
        closure=lambda model, _: model.theta.square().sum(),
        data=ONE_SAMPLE * 10,
    )
    with pytest.raises(TypeError, match=r"a `closure` .*Pass `loss=` and pairs") as error:
        sh.lambda_max_sampling(risk, num_folds=5)
    assert "`data` must" in str(error.value)


@pytest.mark.parametrize("mode", ["batch", "recalibrated"])
def test_batchnorm_that_depends_on_the_data_is_refused(mode):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = torch.from_numpy(heavy_tailed(40, 0))
    risk = sh.EmpiricalRisk(model, nn.MSELoss(), (x, x[:, :1].clone()), batchnorm=mode)
    with pytest.raises(ValueError, match="`batchnorm` must be 'running'") as error:
        sh.lambda_max_sampling(risk)
    assert f"got {mode!r}" in str(error.value)
    running = sh.EmpiricalRisk(model, nn.MSELoss(), (x, x[:, :1].clone()))
    assert sh.lambda_max_sampling(running).status == "completed"


@pytest.mark.parametrize("num_folds", [2, 0, -1, 31, 1000])
def test_a_number_of_folds_that_cannot_be_is_refused(num_folds):
    with pytest.raises(ValueError, match=r"`num_folds` must lie in \[3, num_samp") as error:
        sh.lambda_max_sampling(samples(30), num_folds=num_folds)
    assert f"got {num_folds} (30 samples). The default is 10." in str(error.value)


@pytest.mark.parametrize("num_folds", [3, 29, 30])
def test_as_many_folds_as_samples_is_the_most(num_folds):
    found = sh.lambda_max_sampling(samples(30), num_folds=num_folds)
    assert found.num_folds == num_folds
    assert found.status == "completed"


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, float("nan")])
def test_a_confidence_that_is_no_probability_is_refused(confidence):
    with pytest.raises(ValueError, match=r"`confidence` must lie in \(0, 1\)") as error:
        sh.lambda_max_sampling(samples(30), confidence=confidence)
    assert f"got {confidence}. Pass 0.95." in str(error.value)


def test_an_unknown_matrix_and_a_wrong_tol_are_refused():
    with pytest.raises(ValueError, match="`matrix` must be one of"):
        sh.lambda_max_sampling(samples(30), matrix="fisher")
    with pytest.raises(ValueError, match="`tol` must"):
        sh.lambda_max_sampling(samples(30), tol=0)


# -- what stays as it was ----------------------------------------------------------


@pytest.mark.parametrize("call", [None, 12])
def test_risk_model_and_generators_are_as_they_were_r22(call, interrupted):
    risk = mlp_risk()
    model = risk.model.train()
    v = torch.linspace(-1, 1, risk.n, dtype=torch.float64)
    state = [p.detach().clone() for p in model.parameters()]
    numbers = risk.value(), risk.gradient(), risk.hvp(v)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    if call:
        interrupted(call)
    sh.lambda_max_sampling(risk)
    assert risk.value() == numbers[0]
    assert torch.equal(risk.gradient(), numbers[1])
    assert torch.equal(risk.hvp(v), numbers[2])
    assert risk.num_samples == 40
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), state, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_the_same_seed_gives_the_same_bits():
    first, again, other = (
        dataclasses.replace(sh.lambda_max_sampling(samples(), seed=seed), cost=Cost())
        for seed in (4, 4, 5)
    )
    assert first == again
    assert first.cross_fitted != other.cross_fitted
    assert first.plug_in == pytest.approx(other.plug_in, rel=1e-2)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
def test_other_matrices_have_intervals_too(matrix):
    risk = mlp_risk()
    found = sh.lambda_max_sampling(risk, matrix=matrix, tol=1e-6)
    assert found.settings["matrix"] == matrix
    dense = risk.product(torch.eye(risk.n).double(), matrix).numpy()
    assert found.plug_in == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-5)
    assert found.interval[0] < found.plug_in < found.interval[1]


# -- what a person sees ------------------------------------------------------------


def test_both_texts_are_one_line_with_the_interval_first():
    found = sh.lambda_max_sampling(samples())
    low, high = found.interval
    cost = Cost(products=61.4, seconds=0.25)
    assert str(dataclasses.replace(found, cost=cost)) == (
        f"lambda_max_sampling {number((low + high) / 2)} ± {(high - low) / 2:.1g}   (95%: "
        f"{low:.4g} to {high:.4g} for other samples, on these 200 {found.plug_in:.4g}, "
        f"cross-fitted {found.cross_fitted:.4g}, completed; 61 products, 0.2 s)"
    )
    assert "\n" not in repr(found)
    assert len(repr(found)) < 600


def test_a_record_is_strict_json():
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = sh.lambda_max_sampling(samples())
    plain = json.loads(to_line({"found": found}), parse_constant=refuse)["found"]
    assert plain["plug_in"] == found.plug_in
    assert tuple(plain["interval"]) == found.interval
    assert plain["num_folds"] == 10


@pytest.mark.parametrize("shown", [True, False])
def test_every_bar_is_shown_or_hidden_as_asked(shown, monkeypatch, capsys):
    asked, bar = [], _progress.bar
    monkeypatch.setattr(
        _progress, "bar", lambda *args: (asked.append(args[2]), bar(*args))[1]
    )
    sh.lambda_max_sampling(samples(40), progress=shown)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("folds" in printed.err) == shown
    assert shown or not any(hidden is not False for hidden in asked)


def test_what_differenced_products_are_off_by_is_in_the_interval(monkeypatch):
    """With as much of it as moves every quadratic form by a tenth."""
    exact = sh.lambda_max_sampling(mlp_risk(), num_folds=3)
    original = sh.EmpiricalRisk.product_and_error

    def rough(risk, v, matrix="hessian"):
        products, errors = original(risk, v, matrix)
        return products, errors + 0.1

    monkeypatch.setattr(sh.EmpiricalRisk, "product_and_error", rough)
    found = sh.lambda_max_sampling(mlp_risk(), num_folds=3)
    assert found.interval[0] == pytest.approx(exact.interval[0] - 0.1, abs=1e-9)
    assert found.interval[1] == pytest.approx(exact.interval[1] + 0.1, abs=1e-9)
