"""Eigenpairs of the Hessian: values, what is claimed of them, and how a run can end."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.problems import (
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
from sharpness.krylov import eigenpair_search
from sharpness.results import HessianEigenpairs, Status
from sharpness.risk import memory

ENDS = ["LA", "SA", "LM", "BE"]
EPS = float(np.finfo(float).eps)
# One value far out, four close behind it, the rest a bulk.
GAPPED = np.concatenate([np.linspace(-0.5, 1.5, 115), [2.0, 3.0, 4.0, 5.0, 10.0]])
SEPARATED = {
    "geometric": 20 * 0.75 ** np.arange(60),  # 1e-6 of the least is above rounding
    "outliers": np.append(np.linspace(-0.1, 0.1, 55), [1.0, 2.0, 3.5, 5.0, 8.0]),
    "indefinite": np.append(np.linspace(-0.1, 0.1, 55), [-9.0, -4.0, 2.0, 5.0, 8.0]),
    "negative": -np.append(np.linspace(5, 6, 55), [0.5, 1.0, 1.5, 2.5, 9.0]),
    "tiny": 1e-8 * np.append(np.linspace(-0.1, 0.1, 55), [1.0, 2.0, 3.5, 5.0, 8.0]),
    "huge": 1e8 * np.append(np.linspace(-0.1, 0.1, 55), [1.0, 2.0, 3.5, 5.0, 8.0]),
}
RESTARTED: dict[str, Callable[[int], np.ndarray]] = {
    "geometric": lambda n: 20 * 0.9 ** np.arange(n),
    "clustered": lambda n: np.append(
        np.random.default_rng(0).uniform(-0.1, 0.1, n - 60),
        np.repeat(np.linspace(1, 6, 12), 5) + np.tile(1e-3 * np.arange(5), 12),
    ),
    "indefinite": lambda n: np.append(
        np.random.default_rng(1).uniform(-0.2, 0.2, n - 60),
        np.linspace(0.5, 4, 60) * np.tile([1, -1.1], 30),
    ),
}


def dense_rounding(true: np.ndarray) -> float:
    """What `eigvalsh` may be off by."""
    return 10 * len(true) * np.finfo(float).eps * float(np.abs(true).max())


def end_of(spectrum: np.ndarray, k: int, which: str) -> np.ndarray:
    """The k values at that end of the spectrum, or at both, descending."""
    descending = np.sort(spectrum)[::-1]
    if which == "LM":
        return np.sort(descending[np.argsort(-np.abs(descending))[:k]])[::-1]
    at_bottom = {"LA": 0, "SA": k, "BE": k // 2}[which]
    top, bottom = descending[: k - at_bottom], descending[len(descending) - at_bottom :]
    return np.concatenate([top, bottom])


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


@pytest.mark.parametrize("which", ENDS)
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


@pytest.mark.parametrize("which", ENDS)
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


CLOSE_PAIR = [0.9, -0.8, 0.7, -0.6, 0.5, -0.45, 0.352, -0.336]  # the last two


@pytest.mark.parametrize("which", ENDS)
def test_a_close_pair_of_opposite_signs_keeps_signs_and_order_r6(which):
    a = symmetric(np.concatenate([CLOSE_PAIR, np.linspace(-0.05, 0.05, 42)]))
    expected = {
        "LA": [[0.9, 0.7, 0.5, 0.352]],
        "SA": [[-0.336, -0.45, -0.6, -0.8]],
        "LM": [
            [0.9, 0.7, 0.5, 0.352, -0.336, -0.45, -0.6, -0.8],
            [0.9, 0.7, 0.5, 0.352, -0.45, -0.6, -0.8],
        ],
        "BE": [
            [0.9, 0.7, 0.5, 0.352, -0.336, -0.45, -0.6, -0.8],
            [0.9, 0.7, 0.5, 0.352, -0.45, -0.6, -0.8],
        ],
    }[which]
    rounding = dense_rounding(np.array(CLOSE_PAIR))
    for seed in range(30):
        for true in expected:
            k = len(true)
            found = sh.eigenpairs(with_products(a), k, which=which, tol=1e-4, seed=seed)
            error = np.abs(found.eigenvalues.numpy() - true)
            assert np.all(error <= found.error_bounds.numpy() + rounding)
            assert torch.all(found.eigenvalues.diff() < 0)
            assert np.array_equal(found.eigenvalues.sign().numpy(), np.sign(true))
            assert found.status == "converged"


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7])
def test_both_ends_with_an_odd_k_have_one_more_at_the_top(k):
    a = symmetric(SEPARATED["indefinite"])
    true = np.linalg.eigvalsh(a.numpy())
    found = sh.eigenpairs(with_products(a), k, which="BE", tol=1e-6)
    top, bottom = -(-k // 2), k // 2
    expected = [*true[::-1][:top], *true[:bottom][::-1]]
    error = np.abs(found.eigenvalues.numpy() - expected)
    assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))


def test_the_ends_agree_with_scipy_on_a_dense_matrix():
    a = symmetric(np.concatenate([GAPPED, -GAPPED[-3:] * 1.1]))
    for which in ENDS:
        expected = eigsh(a.numpy(), 4, which=which, tol=1e-12, v0=np.ones(len(a)))[0]
        found = sh.eigenpairs(with_products(a), 4, which=which, tol=1e-8)
        error = np.abs(found.eigenvalues.numpy() - np.sort(expected)[::-1])
        assert np.all(error <= found.error_bounds.numpy() + 1e-10)


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


@pytest.mark.parametrize("which", ENDS)
def test_values_scale_with_the_loss_through_restarts_too_r7(which):
    a = symmetric(RESTARTED["indefinite"](120))
    options = {"which": which, "tol": 1e-8, "basis_size": 14, "max_hvps": 120}
    plain = sh.eigenpairs(with_products(a), 3, **options)
    scaled = sh.eigenpairs(with_products(1e-8 * a), 3, **options)
    assert plain.status == scaled.status == "converged"
    assert plain.num_hvps > 2 * 14
    torch.testing.assert_close(
        1e8 * scaled.eigenvalues, plain.eigenvalues, rtol=1e-8, atol=0
    )
    true = end_of(np.linalg.eigvalsh(a.numpy()), 3, which)
    error = np.abs(1e8 * scaled.eigenvalues.numpy() - true)
    assert np.all(error <= 1e8 * scaled.error_bounds.numpy() + dense_rounding(true))


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
    for risk, which in itertools.product((quadratic([0.0] * 40), linear), ENDS[:3]):
        found = sh.eigenpairs(risk, 3, which=which, basis_size=min(risk.n, 13))
        assert found.eigenvalues.tolist() == [0.0, 0.0, 0.0]
        assert found.error_bounds.tolist() == [0.0, 0.0, 0.0]
        assert found.status == "converged"
        assert found.lambda_max_upper == (None if which == "SA" else 0.0)
        assert found.explicit_residual in (0.0, None)


def test_both_ends_of_a_flat_risk_are_three_zeros_r9():
    found = sh.eigenpairs(quadratic([0.0] * 40), 3, which="BE")
    assert found.eigenvalues.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("which", ENDS)
def test_values_beyond_the_rank_are_zeros_and_found_at_once(which, rank, dtype):
    n, k = 500, 8
    spectrum = np.append(np.zeros(n - rank), 1.0 + np.arange(rank))
    found = sh.eigenpairs(with_products(symmetric(spectrum).to(dtype)), k, which=which)
    error = np.abs(found.eigenvalues.numpy() - end_of(spectrum, k, which))
    assert found.status == "converged"
    assert found.num_converged == k
    assert found.hidden == ()
    assert found.cost.products <= rank + k + 2  # each, a copy, one to verify the first
    assert np.all(error <= found.error_bounds.numpy() + dense_rounding(spectrum))
    zeros = error[end_of(spectrum, k, which) == 0]
    assert zeros.max() <= 2 * found.noise_floor


def test_a_small_value_is_no_zero():
    """Ten noises above 0: `tol` stands, and is met or not."""
    a = symmetric(np.append(np.zeros(300), [1e-5, 1.0])).float()
    found = sh.eigenpairs(with_products(a), 2)
    assert found.eigenvalues[1] > 2 * found.noise_floor
    within = found.error_bounds <= 1e-2 * found.eigenvalues
    assert within.all() == (found.status == "converged")


def test_one_parameter_has_one_eigenvalue():
    found = sh.eigenpairs(quadratic([-3.0]))
    assert found.eigenvalues.tolist() == [-3.0]
    assert found.num_hvps == 1
    assert found.status == "converged"
    assert found.eigenvectors.abs().tolist() == [[1.0]]


@pytest.mark.parametrize("which", ENDS)
def test_asking_for_all_n_gives_every_copy(which):
    a = symmetric([5.0, 5.0, 5.0, 1.0, 1.0, 0.5, -2.0, -2.0])
    found = sh.eigenpairs(prescribed_hessian(a), 8, which=which, basis_size=8)
    true = np.linalg.eigvalsh(a.numpy())[::-1]
    error = np.abs(found.eigenvalues.numpy() - true)
    assert found.num_hvps == 8
    assert found.num_converged == 8
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


@cache
def random_problem(case: int) -> tuple[HessianEigenpairs, np.ndarray]:
    """Any k, end, tolerance, basis and budget; and the true eigenvalues."""
    a = symmetric(random_spectrum(case), seed=case)
    rng = np.random.default_rng(1000 + case)
    k = int(rng.integers(1, min(len(a), 6) + 1))
    found = sh.eigenpairs(
        with_products(a),
        k,
        which=ENDS[int(rng.integers(4))],
        tol=10.0 ** rng.uniform(-8, -0.5),
        max_hvps=int(rng.integers(1, len(a) + 1)),
        basis_size=min(len(a), k + 10 + int(rng.integers(4))),
        seed=case,
    )
    return found, np.linalg.eigvalsh(a.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_every_value_lies_within_its_residual_of_an_eigenvalue(part):
    for case in range(part, 240, 6):
        found, true = random_problem(case)
        proven = found.residuals.numpy() + found.noise_floor + dense_rounding(true)
        assert np.all(nearest(found.eigenvalues, true) <= proven), f"case {case}"


@pytest.mark.slow
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


SLOW = [pytest.mark.slow]


@pytest.mark.parametrize(
    ("max_hvps", "useful"),
    [
        pytest.param(2, 15.0, marks=SLOW),
        (5, 3.0),
        pytest.param(10, 1.5, marks=SLOW),
    ],
)
def test_the_upper_bound_holds_for_19_starts_in_20(max_hvps, useful):
    risk = with_products(torch.diag(torch.tensor([*0.9 ** np.arange(80), 1.01, 1.05])))
    runs = [sh.eigenpairs(risk, max_hvps=max_hvps, seed=seed) for seed in range(200)]
    uppers = np.array([found.lambda_max_upper for found in runs])
    assert np.sum(uppers < 1.05) <= binom.ppf(0.999, 200, 0.05)
    assert np.median(uppers) < useful
    assert all(found.lambda_max_upper >= found.lambda_max for found in runs)


def test_only_a_search_at_the_top_earns_an_upper_bound():
    risk = quadratic(SEPARATED["outliers"])
    assert sh.eigenpairs(risk).lambda_max_upper is not None
    assert sh.eigenpairs(risk, which="SA").lambda_max_upper is None
    for which in ("LM", "BE"):
        assert sh.eigenpairs(risk, which=which).lambda_max_upper is not None


# -- the certificate ---------------------------------------------------------------


def crowded(seed: int) -> np.ndarray:
    """A bulk and a dozen outliers, largest first."""
    draw = np.random.default_rng(seed)
    outliers, bulk = 0.2 + 0.8 * draw.random(12), 0.05 * draw.random(500) ** 8 - 0.005
    return np.sort(np.concatenate([outliers, bulk]))[::-1].copy()


def none_is_left_out(found: HessianEigenpairs, spectrum: np.ndarray) -> bool:
    """Whether what exceeds the k-th by more than `tol` lies within `tol` of a value."""
    values = found.eigenvalues.numpy()
    above = spectrum[spectrum > 1.01 * values[-1]]
    return bool(np.all(nearest(torch.from_numpy(above), values) <= 0.01 * above))


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("num", [12, pytest.param(400, marks=SLOW)])
def test_no_value_is_left_out_at_95_percent(num, k):
    """The rule without a certificate leaves one out in 9 and 5 % of such spectra."""
    right = 0
    for seed in range(num):
        spectrum = crowded(seed)
        found = sh.eigenpairs(quadratic(spectrum), k, seed=seed)
        assert found.status == "converged"
        assert found.hidden == ()
        right += none_is_left_out(found, spectrum)
    assert right >= binom.ppf(1e-3, num, 0.95)
    if num > 100:
        assert right > 0.97 * num


@pytest.mark.parametrize("which", ENDS)
def test_a_hidden_value_lies_where_the_result_says(which):
    """The start has too little of the top for a short run: the intervals hold it."""
    inside = 0
    for seed in range(40):
        spectrum = crowded(seed) * (-1 if which == "SA" else 1)
        found = sh.eigenpairs(quadratic(spectrum), which=which, seed=seed, max_hvps=4)
        assert found.status == "max_hvps"
        assert found.hidden
        lead, allowed = float(found.eigenvalues[0]), 0.01 * abs(found.lambda_max)
        extreme = spectrum[np.argmax(np.abs(spectrum))]
        near = abs(extreme - lead) <= allowed
        inside += near or any(low <= extreme <= high for low, high in found.hidden)
    assert inside >= binom.ppf(1e-3, 40, 0.95)


def test_the_line_says_where_a_value_may_hide():
    spectrum = crowded(0)
    short = sh.eigenpairs(quadratic(spectrum), 2, max_hvps=5)
    (low, high), *rest = short.hidden
    place = str(short).split("; others may hide in ")[1]
    assert place.startswith(f"({low:.4g}, {high:.4g})")
    assert "(95 %), max_hvps; 5 products" in place
    assert len(rest) <= 1
    assert "hide" not in str(sh.eigenpairs(quadratic(spectrum), 2))
    assert sh.eigenpairs(quadratic(spectrum), 2, max_hvps=1).hidden == (
        (-math.inf, math.inf),
    )


def test_a_higher_confidence_costs_more_and_bounds_less():
    risk = quadratic(crowded(1))
    runs = [sh.eigenpairs(risk, 2, confidence=c, max_hvps=9) for c in (0.5, 0.95, 0.999)]
    assert runs[0].lambda_max_upper < runs[1].lambda_max_upper < runs[2].lambda_max_upper
    widths = [sum(high - low for low, high in each.hidden) for each in runs]
    assert widths[0] <= widths[1] <= widths[2]
    costs = [sh.eigenpairs(risk, 2, confidence=c).num_hvps for c in (0.5, 0.95, 1 - 1e-9)]
    assert costs[0] <= costs[1] < costs[2]


@pytest.mark.parametrize("k", [1, 3])
def test_the_certificate_lasts_through_restarts(k):
    right = restarted = 0
    for seed in range(15):
        spectrum = crowded(seed)
        found = sh.eigenpairs(quadratic(spectrum), k, seed=seed, basis_size=k + 10)
        right += found.status == "converged" and none_is_left_out(found, spectrum)
        restarted += found.num_hvps > k + 11
    assert right >= 14
    assert restarted >= 8


def test_a_start_at_the_second_does_not_hide_the_first():
    """By the bounds alone 9.02 came back for 10, converged, in most of such runs."""
    risk = quadratic(np.concatenate([[10.0, 9.02], np.linspace(0, 1, 998)]))
    start = torch.zeros(1000, dtype=torch.float64)
    start[1] = 1.0
    found, right = {}, {}
    for rule in (0.95, None):
        found[rule] = [
            sh.eigenpairs(risk, v0=start, seed=seed, confidence=rule) for seed in range(20)
        ]
        assert all(each.status == "converged" for each in found[rule])
        right[rule] = sum(abs(each.lambda_max - 10) <= 0.1 for each in found[rule])
    assert right[0.95] >= binom.ppf(1e-3, 20, 0.95)
    assert right[None] < 10


def test_the_random_half_of_a_warm_start_follows_seed_and_bits(monkeypatch):
    starts = []
    original = eigenpair_search.Lanczos

    def noted(v0, *args, **kwargs):
        starts.append(v0.clone())
        return original(v0, *args, **kwargs)

    monkeypatch.setattr(eigenpair_search, "Lanczos", noted)
    v = torch.ones(60, dtype=torch.float64)
    near = v.clone()
    near[0] = np.nextafter(1.0, 2.0)
    for seed, v0 in ((0, v), (0, v.clone()), (1, v), (0, near)):
        sh.eigenpairs(quadratic(SEPARATED["outliers"]), v0=v0, seed=seed)
    first, again, other_seed, other_bits = starts
    assert torch.equal(first, again)
    for other in (other_seed, other_bits):
        g, h = first - v, other - v
        assert abs(float(g @ h / g.norm() / h.norm())) < 0.5


# -- the dense oracle --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ENDS)
def test_the_dense_method_gives_the_values_of_lapack(which, dtype):
    spectrum = np.repeat([5.0, -7.0, 1.0, 0.5], [3, 1, 20, 6])
    matrix = symmetric(spectrum)
    found = sh.eigenpairs(
        with_products(matrix.to(dtype)), 4, which=which, method="dense", progress=False
    )
    error = np.abs(found.eigenvalues.numpy() - end_of(spectrum, 4, which))
    assert np.all(error <= found.error_bounds.numpy() + dense_rounding(spectrum))
    assert np.all(found.error_bounds.numpy() <= 1e-4)
    assert (found.status, found.num_hvps, found.hidden) == ("converged", 30, ())
    assert found.num_converged == 4
    v = found.eigenvectors.double()
    residual = (v @ matrix - found.eigenvalues[:, None] * v).norm(dim=1)
    assert torch.all(residual <= found.error_bounds + 1e-12)


def test_the_dense_method_has_values_only_at_the_end():
    risk = interrupted_at(quadratic(np.arange(9.0)), 5, KeyboardInterrupt())
    found = sh.eigenpairs(risk, method="dense")
    assert (found.status, found.num_hvps) == ("interrupted", 4)
    assert len(found.eigenvalues) == 0
    assert math.isnan(found.lambda_max)
    assert str(found).startswith("lambda_max unknown   (interrupted; ")


def test_the_dense_method_is_for_small_networks():
    with pytest.raises(ValueError, match=r"`method` must be 'lanczos'.*n=5001"):
        sh.eigenpairs(quadratic(np.ones(5001)), method="dense")


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


# -- a basis smaller than the run --------------------------------------------------


WITHIN_REACH = [
    *itertools.product(["geometric", "clustered"], [10, 50], ["LA", "LM"]),
    *itertools.product(["indefinite"], [10], ENDS),
    *itertools.product(["indefinite"], [50], ["LM", "BE"]),
]


@cache
def with_small_basis(
    name: str, k: int, which: str
) -> tuple[HessianEigenpairs, Tensor, np.ndarray]:
    a = symmetric(RESTARTED[name](250 if k == 10 else 200))
    found = sh.eigenpairs(with_products(a), k, which=which, tol=1e-6, basis_size=k + 10)
    assert found.num_hvps > k + 10  # restarted
    return found, a, np.linalg.eigvalsh(a.numpy())


@pytest.mark.parametrize(("name", "k", "which"), WITHIN_REACH)
def test_a_small_basis_gives_the_values_of_the_dense_matrix(name, k, which):
    found, _, true = with_small_basis(name, k, which)
    assert found.status == "converged"
    assert found.num_converged == k
    error = np.abs(found.eigenvalues.numpy() - end_of(true, k, which))
    assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))


@pytest.mark.slow
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("k", [10, 50])
@pytest.mark.parametrize("name", RESTARTED)
def test_what_a_small_basis_claims_holds_converged_or_not(name, k, which):
    found, a, true = with_small_basis(name, k, which)
    rounding = dense_rounding(true)
    claimed = found.error_bounds.numpy() + rounding
    assert np.all(nearest(found.eigenvalues, true) <= claimed)
    v, values = found.eigenvectors, found.eigenvalues
    norms = (v @ a - values[:, None] * v).norm(dim=1).numpy()
    assert np.all(norms <= found.residuals.numpy() + found.noise_floor + rounding)
    rounding = found.num_hvps * len(a) * EPS  # n eps for each product
    torch.testing.assert_close(v @ v.T, torch.eye(k).double(), rtol=0, atol=rounding)


@pytest.mark.parametrize("which", ENDS)
def test_many_restarts_converge_to_the_values_of_one_large_basis(which):
    a = symmetric(RESTARTED["indefinite"](300))
    true = end_of(np.linalg.eigvalsh(a.numpy()), 10, which)
    options = {"which": which, "tol": 1e-6, "max_hvps": 300}
    small, large = (
        sh.eigenpairs(with_products(a), 10, basis_size=size, **options)
        for size in (20, 300)
    )
    for found in (small, large):
        error = np.abs(found.eigenvalues.numpy() - true)
        assert found.status == "converged"
        assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))
    assert small.num_hvps >= large.num_hvps
    assert small.num_hvps > 20 + 5 * 5  # each restart makes room for five


def test_two_hundred_values_of_five_hundred():
    rng = np.random.default_rng(2)
    a = symmetric(np.concatenate([rng.uniform(-0.5, 0.5, 280), 1 + 9 * rng.random(220)]))
    true = np.linalg.eigvalsh(a.numpy())
    found = sh.eigenpairs(with_products(a), 200, tol=1e-3, basis_size=260)
    claimed = found.error_bounds.numpy() + dense_rounding(true)
    assert found.eigenvalues.shape == (200,)
    assert torch.all(found.eigenvalues.diff() <= 0)
    assert np.all(nearest(found.eigenvalues, true) <= claimed)
    gram = found.eigenvectors @ found.eigenvectors.T
    rounding = found.num_hvps * len(a) * EPS  # n eps for each product
    torch.testing.assert_close(gram, torch.eye(200).double(), rtol=0, atol=rounding)
    assert found.status == "converged"
    error = np.abs(found.eigenvalues.numpy() - end_of(true, 200, "LA"))
    assert np.all(error <= claimed)


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("width", [0.0, 1e-12, 1e-6])
def test_repeated_and_clustered_values_survive_restarts(width, which):
    clusters = np.repeat([6.0, 4.0, -5.0], 4) + width * np.tile(np.arange(4), 3)
    a = symmetric(np.concatenate([clusters, np.linspace(-1, 1, 100)]))
    true = np.linalg.eigvalsh(a.numpy())
    for seed in range(3):
        found = sh.eigenpairs(
            with_products(a), 3, which=which, tol=1e-5, basis_size=13, seed=seed
        )
        claimed = found.error_bounds.numpy() + dense_rounding(true)
        assert np.all(nearest(found.eigenvalues, true) <= claimed)
        ends = {"LA": [6], "SA": [-5], "LM": [6], "BE": [6, -5]}[which]
        for end in ends:  # of each cluster asked for, at least one copy
            assert np.abs(found.eigenvalues.numpy() - end).min() <= 1e-4 * abs(end)


def test_a_budget_beyond_n_is_of_use_to_a_small_basis():
    a = symmetric(np.linspace(0, 1, 24))
    found = sh.eigenpairs(with_products(a), 5, tol=1e-8, basis_size=15, max_hvps=500)
    true = np.linalg.eigvalsh(a.numpy())
    assert found.status == "converged"
    error = np.abs(found.eigenvalues.numpy() - end_of(true, 5, "LA"))
    assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))


def test_n_products_of_a_small_basis_are_not_the_whole_space():
    a = symmetric(np.linspace(0, 1, 24))
    found = sh.eigenpairs(with_products(a), 5, tol=1e-8, basis_size=15, max_hvps=24)
    assert found.status == "max_hvps"
    met = found.error_bounds <= 1e-8 * found.eigenvalues.abs()
    assert found.num_converged == int(met.sum()) == 0


def test_an_interrupt_between_two_restarts_returns_valid_bounds_r32():
    a = symmetric(RESTARTED["indefinite"](200))
    true = np.linalg.eigvalsh(a.numpy())
    for call in (1 + 13, 40, 41, 57):
        risk = interrupted_at(with_products(a), call, KeyboardInterrupt())
        found = sh.eigenpairs(risk, 3, tol=1e-12, basis_size=13)
        budget = sh.eigenpairs(
            with_products(a), 3, tol=1e-12, basis_size=13, max_hvps=call - 1
        )
        assert found.status == "interrupted"
        assert found.num_hvps == call - 1
        assert torch.equal(found.eigenvalues, budget.eigenvalues)
        assert torch.equal(found.error_bounds, budget.error_bounds)
        claimed = found.error_bounds.numpy() + dense_rounding(true)
        assert np.all(nearest(found.eigenvalues, true) <= claimed)
        v, values = found.eigenvectors, found.eigenvalues
        norms = (v @ a - values[:, None] * v).norm(dim=1)
        torch.testing.assert_close(norms, found.residuals, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [None, 13, 60])
def test_the_basis_can_be_held_elsewhere(size):
    risk = with_products(symmetric(SEPARATED["outliers"]))
    here = sh.eigenpairs(risk, 3, basis_size=size)
    there = sh.eigenpairs(risk, 3, basis_size=size, basis_device="cpu")
    assert torch.equal(here.eigenvalues, there.eigenvalues)
    assert torch.equal(here.eigenvectors, there.eigenvectors)
    assert there.eigenvectors.device.type == "cpu"
    assert torch.equal(
        sh.eigenpairs(risk, 3, basis_device=torch.device("cpu")).eigenvalues,
        sh.eigenpairs(risk, 3).eigenvalues,
    )


def test_a_basis_that_does_not_fit_is_refused_before_the_first_product(monkeypatch):
    monkeypatch.setattr(memory, "budget_bytes", lambda device: int(0.6 * 60 * 8 * 9))
    risk = with_products(symmetric(SEPARATED["outliers"]))
    with pytest.raises(MemoryError, match="basis of 12 vectors; got k=2"):
        sh.eigenpairs(risk, 2)


def diagonal_risk(n: int) -> tuple[sh.EmpiricalRisk, Tensor]:
    """1/2 sum h_i theta_i^2 in float32: a few values far out, the rest a bulk."""
    h = torch.linspace(-1, 1, n)
    h[:: n // 60] = torch.linspace(2, 30, len(h[:: n // 60]))
    return quadratic(h), h


def peak_and_allowed(n: int, k: int, basis_size: int, products: int) -> tuple[int, int]:
    """Bytes of a restarted run, and (basis_size + 4) n beside the products' own."""
    risk, h = diagonal_risk(n)
    plan = risk.prepare(1)
    with memory._Storages() as storages:
        found = sh.eigenpairs(
            risk, k, basis_size=basis_size, max_hvps=products, tol=1e-7, seed=1
        )
    assert found.num_hvps == products > basis_size
    true = h.double().numpy()
    assert np.all(nearest(found.eigenvalues, true) <= found.error_bounds.numpy())
    assert storages.peak > basis_size * risk.theta.nbytes
    return storages.peak, (basis_size + 4) * risk.theta.nbytes + plan.predicted_bytes


def test_memory_stays_at_the_basis_and_four_vectors():
    """At n = 15_000_000, k = 40, basis_size = 56 it was 66 vectors of 69 (87 s)."""
    peak, allowed = peak_and_allowed(2_100_000, 2, 18, 22)
    assert peak <= allowed


def test_memory_stays_at_the_basis_where_a_vector_is_three_strips():
    peak, allowed = peak_and_allowed(200_000, 50, 64, 75)
    assert peak <= allowed


def test_memory_stays_at_the_basis_whatever_the_blocks_hold():
    peak, allowed = peak_and_allowed(2_100_000, 1, 18, 19)
    assert peak <= allowed


# -- one more product, which verifies ----------------------------------------------


def doubt_the_recurrence(patch):
    patch.setattr(eigenpair_search.Search, "recurrence_error", math.inf)


def noisy(matrix: Tensor, size: float) -> tuple[sh.EmpiricalRisk, Callable]:
    """Products off by vectors of norm `size`, alike in all directions."""
    draw = torch.Generator().manual_seed(3)
    risk, n = with_products(matrix), len(matrix)

    def product(v: Tensor, matrix_name: str = "hessian") -> Tensor:
        error = torch.randn(n, generator=draw, dtype=torch.float64)
        return matrix @ v + size / math.sqrt(n) * error

    risk.product = product
    return risk, product


def test_a_recurrence_that_is_trusted_takes_no_product_of_its_own():
    a = symmetric(GAPPED)
    risk, seen = counting(with_products(a))
    found = sh.eigenpairs(risk, 2)
    residuals = found.eigenvectors @ a - found.eigenvalues[:, None] * found.eigenvectors
    assert found.status == "converged"
    assert found.explicit_residual is None
    assert found.num_hvps == len(seen)
    assert found.num_converged == 2
    torch.testing.assert_close(found.residuals, residuals.norm(dim=1), rtol=1e-6, atol=1e-9)


def test_noise_in_the_products_is_verified_where_it_may_hide_an_error_of_tol():
    a = symmetric(np.concatenate([np.zeros(400), GAPPED]))
    quiet, _ = noisy(a, 1e-3)
    assert sh.eigenpairs(quiet).explicit_residual is None
    loud, _ = noisy(a, 0.1)
    found = sh.eigenpairs(loud, max_hvps=60)
    assert found.explicit_residual is not None
    true = np.linalg.eigvalsh(a.numpy())
    assert nearest(found.eigenvalues, true)[0] <= found.error_bounds[0]


@pytest.mark.parametrize("size", [1e-6, 1e-2])
def test_the_error_of_a_recurrence_is_foretold_from_its_part_in_the_basis(size):
    a = symmetric(np.concatenate([np.zeros(400), GAPPED]))
    _, product = noisy(a, size)
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(len(a), generator=draw, dtype=torch.float64)
    options = {"k": 1, "which": "LA", "tol": 1e-2, "miss": 0.05, "basis_size": 60}
    search = eigenpair_search.Search(start, draw, **options)
    for _ in range(12):
        search.absorb(product(search.direction()))
    state = search.run.state
    errors = a @ state.basis.T - state.basis.T @ torch.from_numpy(state.projected)
    errors -= torch.outer(search.direction(), torch.from_numpy(state.coupling))
    assert 0.5 < search.recurrence_error / float(errors.norm()) < 2


@pytest.mark.parametrize("which", ENDS)
def test_the_explicit_residual_is_that_of_the_leading_pair(which, monkeypatch):
    doubt_the_recurrence(monkeypatch)
    a = symmetric(np.concatenate([GAPPED, [-20.0, -3.0]]))
    found = sh.eigenpairs(with_products(a), 3, which=which)
    lead = {"LA": 0, "BE": 0, "SA": 2, "LM": 2}[which]
    value, v = found.eigenvalues[lead], found.eigenvectors[lead]
    residual = float((a @ v - value * v).norm())
    assert found.status == "converged"
    assert found.explicit_residual == pytest.approx(residual, rel=1e-9)
    assert found.residuals[lead] == found.explicit_residual
    assert found.error_bounds[lead] <= found.explicit_residual + found.noise_floor


def counting(risk: sh.EmpiricalRisk) -> tuple[sh.EmpiricalRisk, list[Tensor]]:
    product, seen = risk.product, []
    risk.product = lambda v, matrix="hessian": (seen.append(v.clone()), product(v))[1]
    return risk, seen


def test_the_verifying_product_is_counted_and_never_passes_the_budget(monkeypatch):
    doubt_the_recurrence(monkeypatch)
    a = symmetric(GAPPED)
    free, seen = counting(with_products(a))
    found = sh.eigenpairs(free, 2)
    assert found.explicit_residual is not None
    assert found.num_hvps == len(seen)
    torch.testing.assert_close(seen[-1], found.eigenvectors[0], rtol=0, atol=0)
    tight, seen = counting(with_products(a))
    bounded = sh.eigenpairs(tight, 2, max_hvps=found.num_hvps - 1)
    assert bounded.status == "converged"
    assert bounded.num_hvps == len(seen) == found.num_hvps - 1
    assert bounded.explicit_residual is None
    assert torch.equal(bounded.eigenvalues, found.eigenvalues)
    exact = sh.eigenpairs(with_products(a), 2, max_hvps=found.num_hvps)
    assert exact.explicit_residual == found.explicit_residual


@pytest.mark.parametrize("options", [{"max_hvps": 3}, {"max_seconds": 0}])
def test_only_a_converged_run_is_verified(options):
    found = sh.eigenpairs(mlp_risk(), **options)
    assert found.explicit_residual is None


def test_an_interrupt_while_verifying_keeps_the_converged_values(monkeypatch):
    doubt_the_recurrence(monkeypatch)
    a = symmetric(GAPPED)
    plain = sh.eigenpairs(with_products(a))
    risk = interrupted_at(with_products(a), plain.num_hvps, KeyboardInterrupt())
    found = sh.eigenpairs(risk)
    assert found.status == "interrupted"
    assert found.explicit_residual is None
    assert found.num_hvps == plain.num_hvps - 1
    assert torch.equal(found.eigenvalues, plain.eigenvalues)


@pytest.mark.parametrize("which", ENDS)
def test_a_recurrence_that_lied_has_its_bound_raised(which, monkeypatch):
    """Halfway through, the products become those of another matrix."""
    doubt_the_recurrence(monkeypatch)
    a = symmetric(np.concatenate([GAPPED, -GAPPED]))
    b = symmetric(np.concatenate([GAPPED, -GAPPED]) * 1.3, seed=5)
    honest = sh.eigenpairs(with_products(a), 2, which=which)
    risk, calls = with_products(a), 0

    def product(v: Tensor, matrix: str) -> Tensor:
        nonlocal calls
        calls += 1
        return (a if calls < honest.num_hvps else b) @ v

    risk.product = product
    found = sh.eigenpairs(risk, 2, which=which)
    lead = 1 if which == "SA" else 0
    lead = int(found.eigenvalues.abs().argmax()) if which == "LM" else lead
    value, v = found.eigenvalues[lead], found.eigenvectors[lead]
    residual = float((b @ v - value * v).norm())
    assert found.num_hvps == honest.num_hvps
    assert found.explicit_residual == pytest.approx(residual, rel=1e-12)
    assert found.error_bounds[lead] >= residual > 10 * honest.error_bounds[lead]
    true = np.linalg.eigvalsh(b.numpy())
    assert nearest(found.eigenvalues, true)[lead] <= found.error_bounds[lead]
    assert found.num_converged < honest.num_converged == 2


# -- the ends, by name -------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "k", "largest", "smallest"),
    [
        ("LA", 2, 8.0, None),
        ("SA", 2, None, -9.0),
        ("BE", 1, 8.0, None),
        ("BE", 2, 8.0, -9.0),
        ("LM", 1, None, -9.0),
        ("LM", 2, 8.0, -9.0),
    ],
)
def test_an_end_that_was_not_asked_for_is_nan(which, k, largest, smallest):
    risk = with_products(symmetric(SEPARATED["indefinite"]))
    found = sh.eigenpairs(risk, k, which=which, tol=1e-6)
    for value, expected in ((found.lambda_max, largest), (found.lambda_min, smallest)):
        if expected is None:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(expected, rel=1e-6)


def test_values_of_one_sign_leave_the_other_end_open():
    risk = with_products(symmetric(SEPARATED["outliers"]))
    found = sh.eigenpairs(risk, 3, which="LM")
    assert found.lambda_max == float(found.eigenvalues[0])
    assert np.isnan(found.lambda_min)


@pytest.mark.parametrize("which", ENDS)
def test_all_n_values_have_both_ends(which):
    found = sh.eigenpairs(quadratic([3.0, 1.0, 2.0]), 3, which=which)
    assert found.lambda_max == pytest.approx(3, rel=1e-14)
    assert found.lambda_min == pytest.approx(1, rel=1e-14)


# -- preconditioned ----------------------------------------------------------------


@pytest.mark.parametrize("which", ENDS)
def test_a_preconditioner_gives_the_pairs_of_the_scaled_matrix(which):
    risk = mlp_risk()
    p = torch.logspace(-2, 2, risk.n, dtype=torch.float64)
    p = p[torch.randperm(risk.n, generator=torch.Generator().manual_seed(0))]
    scale = np.diag(p.numpy() ** -0.5)
    dense = scale @ mlp_hessian(risk.theta).numpy() @ scale
    found = sh.eigenpairs(risk, 3, which=which, preconditioner=p, tol=1e-6)
    true = end_of(np.linalg.eigvalsh(dense), 3, which)
    error = np.abs(found.eigenvalues.numpy() - true)
    assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))
    for value, residual, v in zip(
        found.eigenvalues, found.residuals, found.eigenvectors, strict=True
    ):
        left = float((torch.from_numpy(dense) @ v - value * v).norm())
        assert left <= float(residual) + found.noise_floor + 1e-11
    assert found.settings["preconditioned"]
    assert "of P^-1/2 H P^-1/2" in str(found)


def test_a_preconditioner_may_have_another_type_and_stays_as_it_was():
    risk = mlp_risk()
    p = torch.linspace(1, 2, risk.n, requires_grad=True)  # float32
    found = sh.eigenpairs(risk, 1, preconditioner=p)
    other = sh.eigenpairs(risk, 1, preconditioner=p.detach().double())
    assert torch.equal(found.eigenvalues, other.eigenvalues)
    assert torch.equal(p.detach(), torch.linspace(1, 2, risk.n))
    assert not sh.eigenpairs(risk).settings["preconditioned"]


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
    cold = sh.eigenpairs(risk, 3, tol=1e-6, confidence=None)
    warm = sh.eigenpairs(risk, 3, tol=1e-6, v0=cold.eigenvectors, confidence=None)
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


def test_following_slowly_changing_matrices_costs_fewer_products_than_cold_starts():
    a, b = symmetric(GAPPED), symmetric(GAPPED, seed=1)
    previous, cold, warm = None, 0, 0
    for step in range(8):
        matrix = a + 2e-3 * step * b
        true = np.linalg.eigvalsh(matrix.numpy())
        fresh = sh.eigenpairs(with_products(matrix), 3, confidence=None)
        found = sh.eigenpairs(with_products(matrix), 3, v0=previous, confidence=None)
        error = np.abs(found.eigenvalues.numpy() - end_of(true, 3, "LA"))
        assert np.all(error <= found.error_bounds.numpy() + dense_rounding(true))
        previous = found.eigenvectors
        cold += fresh.num_hvps
        warm += found.num_hvps if step else fresh.num_hvps
    assert warm < cold


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
        ({"confidence": 0}, "got 0"),
        ({"confidence": 1.0}, "got 1.0"),
        ({"confidence": float("nan")}, "got nan"),
        ({"method": "qr"}, "got 'qr'"),
        ({"max_hvps": 44, "method": "dense"}, r"got 44 \(n=45\)"),
        ({"max_hvps": 0}, "got 0"),
        ({"max_hvps": -5}, "got -5"),
        ({"which": "LR"}, "got 'LR'"),
        ({"which": "la"}, "got 'la'"),
        ({"which": None}, "got None"),
        ({"basis_size": 10, "k": 1}, r"at least k \+ 10 \(or n=45\); got 10 \(k=1\)"),
        ({"basis_size": 44, "k": 36}, r"\(or n=45\); got 44 \(k=36\)"),
        ({"basis_size": 0}, "got 0"),
        ({"preconditioner": torch.ones(44)}, r"n=45; got shape \(44,\)"),
        ({"preconditioner": torch.ones(45, 1)}, r"n=45; got shape \(45, 1\)"),
        ({"preconditioner": torch.arange(45.0) - 3}, "smallest -3"),
        ({"preconditioner": torch.arange(45.0)}, "smallest 0"),
        ({"preconditioner": torch.full((45,), float("inf"))}, "finite"),
        ({"preconditioner": torch.full((45,), float("nan"))}, "finite"),
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
    assert str(found).startswith("lambda_max unknown   (interrupted; ")


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
    cost = dataclasses.replace(found.cost, seconds=0.25)
    assert str(dataclasses.replace(found, cost=cost)) == (
        "lambda_max 4.000 ± {:.1g}, lambda_2 2.000 ± {:.1g}   (error bound, 2 of 2 "
        "converged, below 4 (95 %); 3 products, 0.2 s)".format(*found.error_bounds.tolist())
    )
    smallest = sh.eigenpairs(quadratic([1.0, 2.0, 4.0]), 2, which="SA")
    assert ", lambda_min 1.000 ± " in str(smallest)


def test_the_line_names_the_end_that_was_asked_for():
    risk = quadratic([-5.0, 1.0, 2.0, 4.0])
    both = str(sh.eigenpairs(risk, 2, which="BE"))
    assert both.startswith("lambda_max 4.000 ± ")
    assert ", lambda_min -5.000 ± " in both
    assert "lambda_min" not in str(sh.eigenpairs(risk, 1, which="BE"))
    largest = str(sh.eigenpairs(risk, 2, which="LM"))
    assert "lambda(2 of 2) -5.000 ± " in largest


def test_neither_text_prints_the_vectors():
    found = sh.eigenpairs(mlp_risk(), 2)
    for text in (repr(found), str(found)):
        assert "eigenvectors" not in text
        assert len(text) < 1000
    assert repr(found) == str(found)


def test_a_result_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sh.eigenpairs(quadratic([1.0])).status = Status.CONVERGED


def test_every_status_that_is_not_ok_says_what_to_do():
    failures = [status for status in Status if not status.ok]
    assert {*Status} - {*failures} == {Status.CONVERGED, Status.COMPLETED}
    advice = [status.advice for status in failures]
    assert len(set(advice)) == len(failures) > 0
    for status, text in zip(failures, advice, strict=True):
        assert text.endswith(".")
        assert text[0].isupper()
        result = SimpleNamespace(status=status)
        with pytest.raises(sh.NotConvergedError) as error:
            HessianEigenpairs.raise_for_status(result)
        assert str(error.value) == text


def test_progress_is_shown_on_stderr_only(capsys):
    sh.eigenpairs(mlp_risk(), progress=True)
    shown = capsys.readouterr()
    assert "Hessian-vector products" in shown.err
    assert shown.out == ""
    sh.eigenpairs(mlp_risk(), progress=False)
    assert capsys.readouterr().err == ""


def test_without_a_confidence_the_rule_is_met_twice_in_a_row(monkeypatch):
    asked = []
    meets = eigenpair_search.meets

    def noted(*args):
        asked.append(meets(*args))
        return asked[-1]

    monkeypatch.setattr(eigenpair_search, "meets", noted)
    found = sh.eigenpairs(quadratic(GAPPED), confidence=None)
    assert found.status == "converged"
    assert found.hidden is None
    assert asked[-2:] == [True, True]
    assert True not in asked[:-2]
    assert len(asked) == found.num_hvps
