"""Eigenpairs of the Hessian: values, what is claimed of them, and how a run can end."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from measure_problems import (
    ONE_SAMPLE,
    Point,
    by_hand,
    mlp_data,
    mlp_hessian,
    mlp_risk,
    prescribed_hessian,
    quadratic,
    random_spectrum,
    symmetric,
    trained_mlp,
    with_products,
)
from scipy.sparse.linalg import eigsh
from scipy.stats import binom
from torch import Tensor, nn

import sharpness as sh
from sharpness.measures import eigenvalues

# One value far out, four close behind it, the rest a bulk.
GAPPED = np.concatenate([np.linspace(-0.5, 1.5, 115), [2.0, 3.0, 4.0, 5.0, 10.0]])
SEPARATED = {
    "geometric": 20 * 0.7 ** np.arange(60),
    "outliers": np.append(np.linspace(-0.1, 0.1, 55), [1.0, 2.0, 3.5, 5.0, 8.0]),
    "indefinite": np.append(np.linspace(-0.1, 0.1, 55), [-9.0, -4.0, 2.0, 5.0, 8.0]),
    "negative": -np.append(np.linspace(5, 6, 55), [0.5, 1.0, 1.5, 2.5, 9.0]),
    "tiny": 1e-8 * np.append(np.linspace(-0.1, 0.1, 55), [1.0, 2.0, 3.5, 5.0, 8.0]),
    "huge": 1e8 * np.append(np.linspace(-0.1, 0.1, 55), [1.0, 2.0, 3.5, 5.0, 8.0]),
}


def dense_rounding(true: np.ndarray) -> float:
    """What `eigvalsh` may be off by."""
    return 10 * len(true) * np.finfo(float).eps * float(np.abs(true).max())


def end_of(spectrum: np.ndarray, k: int, which: str) -> np.ndarray:
    """The k largest or smallest values, descending."""
    descending = np.sort(spectrum)[::-1]
    return descending[:k] if which == "LA" else descending[-k:]


def nearest(values: Tensor, true: np.ndarray) -> np.ndarray:
    return np.abs(values.numpy()[:, None] - true).min(1)


def interrupted_at(
    risk: sh.EmpiricalRisk, call: int, by: BaseException | float
) -> sh.EmpiricalRisk:
    """The risk, whose `call`-th product raises, or is multiplied by, `by`."""
    product, calls = risk.product, 0

    def counted(v: Tensor, matrix: str) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call and isinstance(by, BaseException):
            raise by
        return product(v) * (by if calls == call else 1.0)

    risk.product = counted
    return risk


# -- the values --------------------------------------------------------------------


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("name", SEPARATED)
def test_separated_values_equal_the_dense_ones_within_their_bounds(name, which):
    a = symmetric(SEPARATED[name])
    true = np.linalg.eigvalsh(a.numpy())
    found = sh.eigenpairs(with_products(a), 4, which=which, tol=1e-6)
    error = np.abs(found.eigenvalues.numpy() - end_of(true, 4, which))
    assert found.status == "converged"
    assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))
    scale = found.eigenvalues.abs().clamp(min=found.noise_floor)
    assert torch.all(found.error_bounds <= 1e-6 * scale)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_the_mlp_agrees_with_scipy_on_its_dense_hessian(which):
    risk = mlp_risk()
    dense = mlp_hessian(risk.theta).numpy()
    expected = eigsh(dense, 3, which=which, tol=1e-12, v0=np.ones(risk.n))[0]
    found = sh.eigenpairs(risk, 3, which=which, tol=1e-4)
    error = np.abs(found.eigenvalues.numpy() - np.sort(expected)[::-1])
    assert np.all(error <= found.error_bounds.numpy() + 1e-13)


def test_scipy_through_the_linear_operator_finds_the_same_values():
    risk = mlp_risk()
    expected = eigsh(risk.linear_operator(), 2, which="LA", v0=np.ones(risk.n))[0]
    found = sh.eigenpairs(risk, 2, tol=1e-6)
    error = np.abs(found.eigenvalues.numpy() - np.sort(expected)[::-1])
    assert np.all(error <= found.error_bounds.numpy() + 1e-12)


def test_thirty_values_of_a_gapped_spectrum_equal_the_dense_ones_r4():
    a = symmetric(GAPPED)
    true = np.linalg.eigvalsh(a.numpy())[::-1]
    found = sh.eigenpairs(prescribed_hessian(a), 30, tol=1e-6)
    values, vectors = found.eigenvalues.numpy(), found.eigenvectors
    error = np.abs(values - true[:30])
    assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))
    assert np.all(error <= 1e-6 * np.abs(values))
    assert np.sum(np.abs(values - 10) < 0.1) == 1
    gram = vectors @ vectors.T
    torch.testing.assert_close(gram, torch.eye(30).double(), rtol=0, atol=1e-12)
    assert found.raise_for_status() is found


def test_default_settings_find_the_largest_value_to_a_percent_r5():
    found = sh.eigenpairs(prescribed_hessian(symmetric(GAPPED)))
    assert found.status == "converged"
    assert found.lambda_max == float(found.eigenvalues[0])
    assert abs(found.lambda_max - 10) <= found.error_bounds[0] <= 0.1
    early = sh.eigenpairs(prescribed_hessian(symmetric(GAPPED)), max_hvps=3)
    assert early.status == "max_hvps"
    assert early.num_hvps == 3
    assert early.num_converged == 0
    assert "0 of 1 converged" in str(early)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_a_close_pair_of_opposite_signs_keeps_signs_and_order_r6(which):
    large = [0.9, -0.8, 0.7, -0.6, 0.5, -0.45, 0.352, -0.336]
    a = symmetric(np.concatenate([large, np.linspace(-0.05, 0.05, 42)]))
    true = np.linalg.eigvalsh(a.numpy())
    for seed in range(30):
        found = sh.eigenpairs(with_products(a), 4, which=which, tol=1e-4, seed=seed)
        error = np.abs(found.eigenvalues.numpy() - end_of(true, 4, which))
        assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))
        assert torch.all(found.eigenvalues.diff() < 0)
        assert torch.all(found.eigenvalues.sign() == (1 if which == "LA" else -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-8, 1e8, 2.0**-50])
def test_values_scale_with_the_loss_r7(scale, dtype):
    a = symmetric(SEPARATED["outliers"], dtype=dtype)
    plain = sh.eigenpairs(prescribed_hessian(a), 3)
    scaled = sh.eigenpairs(prescribed_hessian(a, scale=scale), 3)
    exact = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        scaled.eigenvalues / scale, plain.eigenvalues, rtol=exact, atol=0
    )
    assert scaled.lambda_max_upper / scale == pytest.approx(
        plain.lambda_max_upper, rel=exact
    )
    assert scaled.num_hvps == plain.num_hvps
    assert scaled.eigenvectors.norm(dim=1) == pytest.approx([1.0] * 3, rel=exact)


def test_a_float32_risk_keeps_its_bounds_with_the_noise_in_them():
    for seed in range(20):
        a = symmetric(SEPARATED["indefinite"], seed, dtype=torch.float32)
        true = np.linalg.eigvalsh(a.double().numpy())
        found = sh.eigenpairs(with_products(a), 3, tol=1e-9, seed=seed)
        assert np.all(nearest(found.eigenvalues, true) <= found.error_bounds.numpy())
        assert found.eigenvalues.dtype == found.error_bounds.dtype == torch.float64
        assert found.error_bounds[0] < 1e-3


def test_a_flat_risk_has_eigenvalues_zero_and_has_converged_r9():
    linear = sh.EmpiricalRisk(
        Point(torch.ones(5).double()),
        closure=lambda model, _: model.theta.sum(),
        data=ONE_SAMPLE,
    )
    for risk in (quadratic([0.0] * 7), linear):
        found = sh.eigenpairs(risk, 3)
        assert found.eigenvalues.tolist() == [0.0, 0.0, 0.0]
        assert found.error_bounds.tolist() == [0.0, 0.0, 0.0]
        assert found.status == "converged"
        assert found.lambda_max_upper == 0.0


def test_one_parameter_has_one_eigenvalue():
    found = sh.eigenpairs(quadratic([-3.0]))
    assert found.eigenvalues.tolist() == [-3.0]
    assert found.num_hvps == 1
    assert found.status == "converged"
    assert found.eigenvectors.abs().tolist() == [[1.0]]


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_asking_for_all_n_gives_every_copy(which):
    a = symmetric([5.0, 5.0, 5.0, 1.0, 1.0, 0.5, -2.0, -2.0])
    found = sh.eigenpairs(prescribed_hessian(a), 8, which=which)
    true = np.linalg.eigvalsh(a.numpy())[::-1]
    error = np.abs(found.eigenvalues.numpy() - true)
    assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))
    assert torch.all(found.error_bounds < 1e-12)
    assert found.status == "converged"


def test_two_seeds_together_span_the_eigenspace_of_a_double_value():
    a = symmetric(np.concatenate([[5.0, 5.0], np.linspace(-1, 1, 60)]))
    risk = prescribed_hessian(a)
    first, second = (sh.eigenpairs(risk, 2, tol=1e-10, seed=seed) for seed in (0, 1))
    for found in (first, second):
        assert abs(found.lambda_max - 5) <= found.error_bounds[0] + 1e-12
    joint = torch.cat([first.eigenvectors, second.eigenvectors])
    q = torch.linalg.qr(joint.T).Q
    values = torch.linalg.eigvalsh(q.T @ a @ q)
    assert values[-2:].tolist() == pytest.approx([5.0, 5.0], rel=1e-9)
    assert values[-3] < 1 + 1e-9


# -- what is claimed of them -------------------------------------------------------


def random_problem(case: int) -> tuple[sh.HessianEigenpairs, np.ndarray]:
    """Any k, end, tolerance and budget; and the true eigenvalues."""
    a = symmetric(random_spectrum(case), seed=case)
    rng = np.random.default_rng(1000 + case)
    found = sh.eigenpairs(
        with_products(a),
        int(rng.integers(1, min(len(a), 6) + 1)),
        which=("LA", "SA")[int(rng.integers(2))],
        tol=10.0 ** rng.uniform(-8, -0.5),
        max_hvps=int(rng.integers(1, len(a) + 1)),
        seed=case,
    )
    return found, np.linalg.eigvalsh(a.numpy())


@pytest.mark.parametrize("part", range(6))
def test_every_value_lies_within_its_residual_of_an_eigenvalue(part):
    for case in range(part, 240, 6):
        found, true = random_problem(case)
        proven = found.residuals.numpy() + found.noise_floor + dense_rounding(true)
        assert np.all(nearest(found.eigenvalues, true) <= proven), f"case {case}"


@pytest.mark.parametrize("part", range(6))
def test_every_value_lies_within_its_error_bound_of_an_eigenvalue(part):
    beaten = []
    for case in range(part, 240, 6):
        found, true = random_problem(case)
        claimed = found.error_bounds.numpy() + dense_rounding(true)
        if np.any(nearest(found.eigenvalues, true) > claimed):
            beaten.append(case)
    assert beaten == []


def test_the_residuals_are_those_of_the_vectors():
    a = symmetric(SEPARATED["outliers"])
    found = sh.eigenpairs(prescribed_hessian(a), 4, max_hvps=7)
    for value, residual, v in zip(
        found.eigenvalues, found.residuals, found.eigenvectors, strict=True
    ):
        assert float((a @ v - value * v).norm()) == pytest.approx(
            float(residual), rel=1e-9, abs=1e-12
        )
    gram = found.eigenvectors @ found.eigenvectors.T
    torch.testing.assert_close(gram, torch.eye(4).double(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("max_hvps", "useful"), [(2, 15.0), (5, 3.0), (10, 1.5)])
def test_the_upper_bound_holds_for_19_starts_in_20(max_hvps, useful):
    risk = with_products(torch.diag(torch.tensor([*0.9 ** np.arange(80), 1.01, 1.05])))
    runs = [sh.eigenpairs(risk, max_hvps=max_hvps, seed=seed) for seed in range(200)]
    uppers = np.array([found.lambda_max_upper for found in runs])
    assert np.sum(uppers < 1.05) <= binom.ppf(0.999, 200, 0.05)
    assert np.median(uppers) < useful
    assert all(found.lambda_max_upper >= found.lambda_max for found in runs)


def test_only_a_random_start_at_the_top_earns_an_upper_bound():
    risk = quadratic(SEPARATED["outliers"])
    assert sh.eigenpairs(risk).lambda_max_upper is not None
    assert sh.eigenpairs(risk, v0=torch.ones(60)).lambda_max_upper is None
    assert sh.eigenpairs(risk, which="SA").lambda_max_upper is None


def test_asymmetric_products_show_in_the_noise_floor_and_in_the_bounds():
    spectrum = SEPARATED["outliers"]
    quiet = sh.eigenpairs(quadratic(spectrum), 2)
    skew = torch.randn(60, 60, generator=torch.Generator().manual_seed(3)).double()
    skew = 1e-5 * (skew - skew.T)
    risk = quadratic(spectrum)
    product = risk.product
    risk.product = lambda v, _: product(v) + skew @ v
    noisy = sh.eigenpairs(risk, 2)
    assert quiet.noise_floor < 1e-12
    assert noisy.noise_floor > 1e-5
    assert torch.all(noisy.error_bounds >= noisy.noise_floor)
    error = np.abs(noisy.eigenvalues.numpy() - end_of(spectrum, 2, "LA"))
    assert np.all(error <= noisy.error_bounds.numpy())


def test_ragged_chunks_give_the_value_of_the_whole_batch_r1():
    x, y = mlp_data(21)
    whole, cut = (
        sh.EmpiricalRisk(trained_mlp(), nn.CrossEntropyLoss(), (x, y), chunk_size=size)
        for size in (21, 10)
    )
    assert cut.value() == pytest.approx(by_hand(cut.theta.numpy(), 21)[0], rel=1e-12)
    torch.testing.assert_close(
        sh.eigenpairs(cut, 3).eigenvalues,
        sh.eigenpairs(whole, 3).eigenvalues,
        rtol=1e-10,
        atol=0,
    )


# -- starts and seeds --------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_no_generator_moves_r22():
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = (sh.eigenpairs(mlp_risk(), 3, seed=4) for _ in range(2))
    for name in ("eigenvalues", "error_bounds", "residuals", "eigenvectors"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.lambda_max_upper == again.lambda_max_upper
    other = sh.eigenpairs(mlp_risk(), 3, seed=5)
    assert not torch.equal(first.eigenvectors, other.eigenvectors)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_earlier_eigenvectors_as_start_save_products():
    risk = prescribed_hessian(symmetric(GAPPED))
    cold = sh.eigenpairs(risk, 3, tol=1e-6)
    warm = sh.eigenpairs(risk, 3, tol=1e-6, v0=cold.eigenvectors)
    assert warm.num_hvps < cold.num_hvps
    error = (warm.eigenvalues - cold.eigenvalues).abs()
    assert torch.all(error <= warm.error_bounds + cold.error_bounds)


def test_a_start_on_a_lower_eigenvector_still_finds_the_largest():
    spectrum = torch.linspace(1, 40, 40, dtype=torch.float64)
    start = torch.eye(40, dtype=torch.float64)[2]
    found = sh.eigenpairs(quadratic(spectrum), v0=start, tol=1e-4)
    assert abs(found.lambda_max - 40) <= found.error_bounds[0]


def test_a_start_from_before_two_values_changed_places_finds_the_new_largest():
    """What a warm start meets along a training run: 39 was the top, and 40 is now."""
    spectrum = torch.linspace(1, 40, 40, dtype=torch.float64)
    noise = torch.randn(40, generator=torch.Generator().manual_seed(1))
    start = torch.eye(40, dtype=torch.float64)[38] + 1e-3 * noise
    found = sh.eigenpairs(quadratic(spectrum), v0=start, tol=1e-2)
    assert found.status == "converged"
    assert abs(found.lambda_max - 40) <= found.error_bounds[0]


# -- how a run can end -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"k": 0}, "got k=0"),
        ({"k": -1}, "got k=-1"),
        ({"k": 46}, r"got k=46 \(n=45 parameters\)"),
        ({"tol": 0.0}, "got 0.0"),
        ({"tol": -1e-2}, "got -0.01"),
        ({"tol": float("nan")}, "got nan"),
        ({"max_hvps": 0}, "got 0"),
        ({"max_hvps": -5}, "got -5"),
        ({"which": "LM"}, "got 'LM'"),
        ({"which": "BE"}, "got 'BE'"),
        ({"v0": torch.ones(44)}, r"n=45; got shape \(44,\)"),
        ({"v0": torch.ones(2, 44)}, r"n=45; got shape \(2, 44\)"),
        ({"v0": torch.tensor(1.0)}, r"n=45; got shape \(\)"),
        ({"v0": torch.zeros(45)}, "nonzero vector"),
        ({"v0": torch.full((45,), float("nan"))}, "nonzero vector"),
    ],
)
def test_a_wrong_call_is_refused_with_what_was_got_r8(options, got):
    with pytest.raises(ValueError, match=got) as error:
        sh.eigenpairs(mlp_risk(0), **options)
    assert f"`{next(iter(options))}` must" in str(error.value)


def test_an_interrupt_returns_what_five_products_have_earned_r32():
    risk = interrupted_at(mlp_risk(), 6, KeyboardInterrupt())
    found = sh.eigenpairs(risk, 2, tol=1e-12)
    budget = sh.eigenpairs(mlp_risk(), 2, tol=1e-12, max_hvps=5)
    assert found.status == "interrupted"
    assert found.num_hvps == 5
    assert torch.equal(found.eigenvalues, budget.eigenvalues)
    assert torch.equal(found.error_bounds, budget.error_bounds)
    assert found.lambda_max_upper == budget.lambda_max_upper
    true = np.linalg.eigvalsh(mlp_hessian(risk.theta).numpy())
    assert np.all(nearest(found.eigenvalues, true) <= found.error_bounds.numpy())
    assert risk.gradient().isfinite().all()  # still of use


def test_an_interrupt_before_the_first_product_returns_an_empty_result():
    found = sh.eigenpairs(interrupted_at(mlp_risk(), 1, KeyboardInterrupt()))
    assert found.status == "interrupted"
    assert len(found.eigenvalues) == len(found.error_bounds) == found.num_hvps == 0
    assert found.eigenvectors.shape == (0, 45)
    assert np.isnan(found.lambda_max)
    assert found.lambda_max_upper is None
    assert found.num_converged == 0
    assert str(found) == "lambda_max unknown (interrupted, 0 products)"


@pytest.mark.parametrize("max_hvps", [1, 4])
def test_the_budget_stops_the_run_and_is_never_passed(max_hvps):
    risk = mlp_risk()
    product, calls = risk.product, []
    risk.product = lambda v, _: (calls.append(0), product(v))[1]
    found = sh.eigenpairs(risk, 3, tol=1e-12, max_hvps=max_hvps)
    assert len(calls) == found.num_hvps == max_hvps
    assert found.status == "max_hvps"
    assert len(found.eigenvalues) == min(3, max_hvps)


def test_time_passed_stops_the_run_after_one_product():
    found = sh.eigenpairs(mlp_risk(), max_seconds=0)
    assert found.status == "max_seconds"
    assert found.num_hvps == 1
    assert found.seconds > 0


def test_an_unfinished_result_raises_an_error_that_carries_it():
    found = sh.eigenpairs(mlp_risk(), max_hvps=2)
    with pytest.raises(sh.NotConvergedError, match="Raise `max_hvps`") as error:
        found.raise_for_status()
    assert error.value.result is found


def test_a_risk_that_is_nan_gives_no_values():
    found = sh.eigenpairs(quadratic([1.0, float("nan"), 2.0]), 2)
    assert found.status == "non_finite"
    assert len(found.eigenvalues) == 0
    assert found.lambda_max_upper is None
    with pytest.raises(sh.NotConvergedError, match="non-finite values"):
        found.raise_for_status()


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_product_that_overflows_later_keeps_what_was_earned(factor):
    found = sh.eigenpairs(interrupted_at(mlp_risk(), 6, factor), 2, tol=1e-12)
    budget = sh.eigenpairs(mlp_risk(), 2, tol=1e-12, max_hvps=5)
    assert found.status == "non_finite"
    assert torch.equal(found.eigenvalues, budget.eigenvalues)
    assert torch.equal(found.error_bounds, budget.error_bounds)


@pytest.mark.parametrize("by", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_in_the_mode_it_was_in(by):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 3)).double()
    model.train()
    model[2].eval()
    fails = False

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if fails:
            raise by
        return nn.functional.cross_entropy(outputs, targets)

    risk = sh.EmpiricalRisk(model, loss, mlp_data())
    modes = [[m.training for m in model.modules()]]
    fails = True
    if by is KeyboardInterrupt:
        assert sh.eigenpairs(risk).status == "interrupted"
    else:
        with pytest.raises(by):
            sh.eigenpairs(risk)
    modes.append([m.training for m in model.modules()])
    fails = False
    assert sh.eigenpairs(risk, 2).status == "converged"
    modes.append([m.training for m in model.modules()])
    assert modes == [[True, True, True, False]] * 3


# -- what a person sees ------------------------------------------------------------


def test_the_line_names_value_bound_and_cost():
    found = sh.eigenpairs(quadratic([1.0, 2.0, 4.0]), 2)
    line = str(dataclasses.replace(found, seconds=0.25))
    expected = "lambda_max 4 ± {:.1g}   (2 of 2 converged, 3 Hessian-vector products, "
    assert line == expected.format(float(found.error_bounds[0])) + "0.2 s)"
    smallest = sh.eigenpairs(quadratic([1.0, 2.0, 4.0]), 2, which="SA")
    assert str(smallest).startswith("lambda_min 1 ± ")


def test_neither_text_prints_the_vectors():
    found = sh.eigenpairs(mlp_risk(), 2)
    for text in (repr(found), str(found)):
        assert "eigenvectors" not in text
        assert len(text) < 1000
    assert "eigenvalues" in repr(found)


def test_a_result_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sh.eigenpairs(quadratic([1.0])).status = sh.Status.CONVERGED


def test_every_status_that_is_not_ok_says_what_to_do():
    failures = [status for status in sh.Status if not status.ok]
    assert {*sh.Status} - {*failures} == {sh.Status.CONVERGED, sh.Status.COMPLETED}
    advice = [status.advice for status in failures]
    assert len(set(advice)) == len(failures) > 0
    for status, text in zip(failures, advice, strict=True):
        assert text.endswith(".")
        assert text[0].isupper()
        result = SimpleNamespace(status=status)
        with pytest.raises(sh.NotConvergedError) as error:
            sh.HessianEigenpairs.raise_for_status(result)
        assert str(error.value) == text


def test_progress_is_shown_on_stderr_only(capsys):
    sh.eigenpairs(mlp_risk(), progress=True)
    shown = capsys.readouterr()
    assert "Hessian-vector products" in shown.err
    assert shown.out == ""
    sh.eigenpairs(mlp_risk(), progress=False)
    assert capsys.readouterr().err == ""


def test_the_measure_uses_the_stopping_rule_twice_in_a_row(monkeypatch):
    asked = []
    meets = eigenvalues.meets

    def noted(*args):
        asked.append(meets(*args))
        return asked[-1]

    monkeypatch.setattr(eigenvalues, "meets", noted)
    found = sh.eigenpairs(quadratic(GAPPED))
    assert found.status == "converged"
    assert asked[-2:] == [True, True]
    assert len(asked) == found.num_hvps
