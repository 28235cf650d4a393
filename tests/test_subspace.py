"""Metric 2.1 from chosen corners, and over several random subspaces."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from helpers.problems import ONE_SAMPLE, Point, mlp_risk, quadratic
from torch import Tensor

import sharpness as sh
from sharpness._results import number
from sharpness._tensors import seeded
from sharpness.measures.epsilon import _Manifold
from sharpness.results import EpsilonSharpness

N = 24
H = torch.logspace(-1, 1, N, dtype=torch.float64)
HERE = torch.linspace(-2, 3, N, dtype=torch.float64)
SOLVERS = [None, "lbfgsb", "scipy", "ascent"]
FREE = {"seconds", "displacement", "draws"}  # compared apart


def signs(seed: int, n: int = N) -> Tensor:
    drawn = np.random.default_rng(seed).choice([-1.0, 1.0], n)
    return torch.from_numpy(drawn)


def columns_by_hand(n: int, p: int, seed: int, kind: str = "normal") -> np.ndarray:
    a = torch.randn((n, p), generator=torch.Generator().manual_seed(seed))
    a = a.double().numpy()
    return a if kind == "normal" else a / np.linalg.norm(a, axis=0)


def tilted(pattern: Tensor, epsilon: float, share: float = 0.02) -> sh.EmpiricalRisk:
    """A bowl whose minimum lies a little off theta, on the other side of `pattern`."""
    half = epsilon * (HERE.abs() + 1)
    return quadratic(H, HERE - share * half * pattern, at=HERE, offset=0.3)


def top_of_tilted(epsilon: float, share: float = 0.02) -> float:
    """phi of `tilted`: y = half * pattern gains sum h (d y + y^2 / 2) everywhere."""
    half, h = epsilon * (np.abs(HERE.numpy()) + 1), H.numpy()
    value = 0.3 + 0.5 * np.sum(h * (share * half) ** 2)
    return 100 * float(np.sum(h * half**2) * (share + 0.5)) / (1 + value)


def ridge(v: Tensor, slope: float = 0.003, curvature: float = 40.0) -> sh.EmpiricalRisk:
    """0.2 + curvature / 2 (v theta)^2 + slope v theta, held at zero; two tops."""

    def closure(model: Point, _: Tensor) -> Tensor:
        along = v @ model.theta
        return 0.2 + 0.5 * curvature * along**2 + slope * along

    return sh.EmpiricalRisk(Point(0 * v), closure=closure, data=ONE_SAMPLE)


def top_of_ridge(reach: float, slope: float = 0.003, curvature: float = 40.0) -> float:
    return 100 * (0.5 * curvature * reach**2 + slope * reach) / 1.2


def same_bits(a: EpsilonSharpness, b: EpsilonSharpness) -> bool:
    b = dataclasses.replace(b, cost=dataclasses.replace(b.cost, seconds=a.seconds))
    return a == b and torch.equal(a.displacement, b.displacement)


def watched(risk: sh.EmpiricalRisk, interrupt: int = 0) -> list[Tensor]:
    """Where the risk is asked for a gradient; Ctrl-C at one of these calls."""
    points: list[Tensor] = []
    evaluate = risk.value_and_gradient

    def value_and_gradient(theta: Tensor | None = None) -> tuple[float, Tensor]:
        points.append(risk.theta if theta is None else theta.clone())
        if len(points) == interrupt:
            raise KeyboardInterrupt
        return evaluate(theta)

    risk.value_and_gradient = value_and_gradient
    return points


# -- corners -----------------------------------------------------------------------


@pytest.mark.parametrize("away", [1.0, -1.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_corner_pointed_at_or_away_from_is_reached_exactly(solver, away):
    epsilon = 0.01
    for seed in range(2):
        pattern = signs(seed)
        risk = tilted(pattern, epsilon)
        plain = sh.epsilon_sharpness(risk, epsilon, solver=solver, max_iter=80)
        vector = away * pattern * torch.rand(N, dtype=torch.float64)
        found = sh.epsilon_sharpness(
            risk, epsilon, solver=solver, max_iter=80, corners=vector
        )
        assert found.phi == pytest.approx(top_of_tilted(epsilon), rel=1e-9)
        half = epsilon * (HERE.abs() + 1)
        torch.testing.assert_close(found.displacement, half * pattern, rtol=1e-9, atol=0)
        assert plain.phi < found.phi * (1 - 1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_better_side_of_a_ridge_is_found_from_its_direction_whatever_the_seed(solver):
    v = torch.linspace(-1, 2, N, dtype=torch.float64)
    best = top_of_ridge(1e-3 * float(v.abs().sum()))
    missed = 0
    for seed in range(6):
        options = {"seed": seed, "solver": solver, "max_iter": 30}
        missed += sh.epsilon_sharpness(ridge(v), 1e-3, **options).phi < best * (1 - 1e-3)
        found = sh.epsilon_sharpness(ridge(v), 1e-3, corners=-v, **options)
        assert found.phi == pytest.approx(best, rel=1e-9)
    assert missed > 0


@pytest.mark.parametrize("columns", ["normal", "unit"])
@pytest.mark.parametrize("p", [1, 5, N])
def test_in_a_subspace_a_vector_points_at_the_corner_of_the_smaller_box(p, columns):
    v, theta = torch.linspace(-1, 2, N, dtype=torch.float64), HERE.numpy()
    a = columns_by_hand(N, p, 4, columns)
    half = 0.01 * (np.abs(np.linalg.pinv(a) @ theta) + 1)
    centre = float(v @ HERE)

    def closure(model: Point, _: Tensor) -> Tensor:
        along = v @ model.theta - centre
        return 0.2 + 20 * along**2 + 0.003 * along

    risk = sh.EmpiricalRisk(Point(HERE), closure=closure, data=ONE_SAMPLE)
    best = top_of_ridge(float(np.abs(a.T @ v.numpy()) @ half))
    found = sh.epsilon_sharpness(
        risk, 0.01, subspace_dim=p, columns=columns, seed=4, corners=v, max_iter=40
    )
    # The library solves normal equations, which square the condition of A.
    exact = 100 * np.finfo(float).eps * np.linalg.cond(a) ** 2
    assert found.phi == pytest.approx(best, rel=max(1e-9, exact))


@pytest.mark.parametrize("p", [None, 4])
def test_the_search_starts_a_tenth_of_the_way_to_the_corner_and_to_its_opposite(p):
    risk, vectors = mlp_risk(), torch.randn((2, 45), dtype=torch.float64)
    points = watched(risk)
    sh.epsilon_sharpness(risk, 0.05, subspace_dim=p, seed=3, corners=vectors, max_iter=1)
    a = np.eye(risk.n) if p is None else columns_by_hand(risk.n, p, 3)
    theta = risk.theta.numpy()
    half = 0.05 * (np.abs(np.linalg.pinv(a) @ theta) + 1)
    for vector in vectors.numpy():
        for side in (1, -1):
            start = theta + a @ (0.1 * side * half * np.sign(a.T @ vector))
            nearest = min(np.abs(point.numpy() - start).max() for point in points)
            assert nearest < 1e-12


def test_several_corners_are_as_good_as_the_best_of_them_and_cost_their_sum():
    risk, vectors = mlp_risk(), torch.randn((2, 45), dtype=torch.float64)
    plain = sh.epsilon_sharpness(risk, 0.5, max_iter=5)
    single = [sh.epsilon_sharpness(risk, 0.5, max_iter=5, corners=v) for v in vectors]
    calls = watched(risk)
    found = sh.epsilon_sharpness(risk, 0.5, max_iter=5, corners=vectors)
    assert found.phi == max(s.phi for s in single) >= plain.phi
    more = sum(s.num_evals - plain.num_evals for s in single)
    assert found.num_evals == plain.num_evals + more == len(calls)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [None, 6])
def test_starts_of_any_kind_never_lower_phi(solver, p):
    risk, vectors = mlp_risk(), torch.randn((2, 45), dtype=torch.float64)
    fixed = {"solver": solver, "subspace_dim": p, "seed": 1, "max_iter": 3}
    starts = [(1, None), (1, vectors[0]), (1, vectors), (2, vectors)]
    grown = [
        sh.epsilon_sharpness(risk, 0.4, num_starts=num, corners=corners, **fixed).phi
        for num, corners in starts
    ]
    assert grown == sorted(grown)


@pytest.mark.parametrize("max_iter", [1, 2, 10, 14])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_protocol_is_that_of_the_first_random_start_alone(solver, max_iter):
    """Here the corners are reached at once, and stop before ten iterations."""
    risk = quadratic(torch.ones(N).double(), offset=0.3)
    fixed = {"solver": solver, "max_iter": max_iter, "seed": 1}
    alone = sh.epsilon_sharpness(risk, 0.1, **fixed).phi_protocol
    with_starts = sh.epsilon_sharpness(risk, 0.1, num_starts=8, **fixed)
    with_corners = sh.epsilon_sharpness(risk, 0.1, corners=signs(0), **fixed)
    assert with_starts.phi_protocol == alone
    assert with_corners.phi_protocol == alone


@pytest.mark.parametrize(
    "shape", [(), (N + 1,), (N - 1,), (2, N + 1), (N, 1), (1, 1, N), (N, 2), (5,)]
)
def test_corners_of_another_shape_are_refused_with_both_shapes(shape):
    risk = tilted(signs(0), 0.01)
    calls = watched(risk)
    text = rf"`corners` must have shape \(n,\) or \(j, n\) with n={N}; got "
    with pytest.raises(ValueError, match=text + re.escape(f"{shape}.")):
        sh.epsilon_sharpness(risk, subspace_dim=5, corners=torch.ones(shape))
    assert not calls


@pytest.mark.parametrize("kind", [list, np.asarray, lambda v: [v, v]])
def test_corners_that_are_no_tensor_are_taken_or_refused_by_name(kind):
    risk, vector = tilted(signs(0), 0.01), signs(0)
    refusal = None
    try:
        found = sh.epsilon_sharpness(risk, 0.01, corners=kind(vector), solver="ascent")
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if refusal is None:
        assert found.phi == pytest.approx(top_of_tilted(0.01), rel=1e-9)
    else:
        assert refusal.startswith("`corners`")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_corner_that_points_nowhere_neither_helps_nor_harms(solver, value):
    risk = tilted(signs(0), 0.01)
    vector = torch.full((N,), value)
    vector[0] = -value
    plain = sh.epsilon_sharpness(risk, 0.01, solver=solver)
    found = sh.epsilon_sharpness(risk, 0.01, solver=solver, corners=vector)
    assert found.status == "completed"
    assert found.phi >= plain.phi
    assert torch.isfinite(found.displacement).all()


def test_an_interrupt_among_the_corners_keeps_what_the_random_start_found():
    plain = sh.epsilon_sharpness(mlp_risk(), 0.4)
    risk = mlp_risk()
    calls = watched(risk, interrupt=plain.num_evals + 3)
    found = sh.epsilon_sharpness(risk, 0.4, corners=torch.ones(risk.n))
    assert found.status == "interrupted"
    assert len(calls) == plain.num_evals + 3
    assert found.phi >= plain.phi
    assert found.phi_protocol == plain.phi_protocol


def test_a_constant_loss_says_that_nothing_was_found():
    risk = quadratic(torch.zeros(5), offset=0.3)
    found = sh.epsilon_sharpness(risk, corners=torch.ones(5))
    assert (found.phi, found.status) == (0.0, "line_search_failed")
    several = sh.subspace_sharpness(risk, subspace_dim=2)
    assert (several.phi, several.phi_sd, several.status) == (0, 0, "line_search_failed")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"subspace_dim": 1}, {"solver": "lbfgsb"}])
def test_at_the_maximum_of_a_single_parameter_nothing_rises(options, dtype):
    risk = quadratic(torch.tensor([-1.0], dtype=dtype))
    found = sh.epsilon_sharpness(risk, 0.1, **options)
    assert (found.phi, found.status) == (0.0, "line_search_failed")


def test_a_single_parameter_has_a_single_pair_of_corners():
    risk = quadratic([3.0], torch.tensor([2.0]), at=torch.tensor([2.5]))
    expected = 100 * 0.5 * 3 * ((0.5 + 0.35) ** 2 - 0.25) / (1 + 0.375)
    for options in ({}, {"corners": torch.ones(1)}, {"subspace_dim": 1}):
        found = sh.epsilon_sharpness(risk, 0.1, **options)
        if not options.get("subspace_dim"):
            assert found.phi == pytest.approx(expected, rel=1e-9)
            assert found.displacement.tolist() == pytest.approx([0.35])
        assert found.status == "completed"


# -- several subspaces -------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"subspace_dim": 4},
        {"subspace_dim": 3, "columns": "unit", "num_draws": 2, "seed": 7},
        {"subspace_dim": 1, "solver": "scipy", "num_draws": 3, "max_iter": 12},
        {"subspace_dim": 45, "solver": "lbfgsb", "num_draws": 3, "seed": -2},
    ],
)
def test_mean_and_spread_are_those_of_separate_calls_with_the_seeds_that_follow(options):
    rest = {k: v for k, v in options.items() if k not in ("num_draws", "seed")}
    seed, num = options.get("seed", 0), options.get("num_draws", 5)
    singles = [
        sh.epsilon_sharpness(mlp_risk(), 0.05, seed=seed + draw, **rest)
        for draw in range(num)
    ]
    risk = mlp_risk()
    calls = watched(risk)
    found = sh.subspace_sharpness(risk, 0.05, **options)
    assert all(map(same_bits, found.draws, singles))
    assert len(found.draws) == num
    phi = [s.phi for s in singles]
    protocol = [s.phi_protocol for s in singles]
    assert found.phi == pytest.approx(np.mean(phi), rel=1e-13)
    assert found.phi_sd == pytest.approx(np.std(phi, ddof=1), rel=1e-13)
    assert found.phi_protocol == pytest.approx(np.mean(protocol), rel=1e-13)
    assert found.phi_protocol_sd == pytest.approx(np.std(protocol, ddof=1), rel=1e-13)
    assert found.phi_sd > 0
    assert found.num_evals == sum(s.num_evals for s in singles) == len(calls)
    assert found.seconds == pytest.approx(sum(d.seconds for d in found.draws))
    assert (found.status, found.settings["seed"]) == ("completed", seed)
    assert found.settings["epsilon"] == 0.05
    assert found.settings["subspace_dim"] == options["subspace_dim"]
    assert found.settings["columns"] == options.get("columns", "normal")


@pytest.mark.parametrize("columns", ["normal", "unit"])
def test_on_lines_mean_and_spread_have_a_closed_form(columns):
    """p = 1: the box is an interval, and a bowl is highest at its ends."""
    phi = []
    for draw in range(6):
        a = columns_by_hand(N, 1, 11 + draw, columns)[:, 0]
        half = 0.02 * (abs(a @ HERE.numpy()) / (a @ a) + 1)
        phi.append(100 * 0.5 * (H.numpy() @ a**2) * half**2 / 1.3)
    risk = quadratic(H, HERE, offset=0.3)
    found = sh.subspace_sharpness(
        risk, 0.02, subspace_dim=1, columns=columns, num_draws=6, seed=11
    )
    assert [draw.phi for draw in found.draws] == pytest.approx(phi, rel=1e-9)
    assert found.phi == pytest.approx(np.mean(phi), rel=1e-9)
    assert found.phi_sd == pytest.approx(np.std(phi, ddof=1), rel=1e-9)


@pytest.mark.parametrize("num_changed", [0, 1, 3, 5, 10])
def test_a_point_is_the_same_whichever_was_asked_for_before(num_changed):
    manifold = _Manifold(mlp_risk(), 10, "normal", seed=0)
    y = torch.linspace(-1, 1, 10).double()
    manifold.point(y)
    other = y.clone()
    other[:num_changed] += 1
    expected = manifold.theta + other @ manifold.a
    assert manifold.point(other).numpy() == pytest.approx(expected.numpy(), rel=1e-12)


def test_several_epsilons_are_measured_in_the_same_subspaces():
    risk, epsilons = mlp_risk(), (0.05, 1e-3)
    many = sh.subspace_sharpness(risk, epsilons, subspace_dim=4, num_draws=3, seed=2)
    assert isinstance(many, list)
    for epsilon, one in zip(epsilons, many, strict=True):
        alone = sh.subspace_sharpness(risk, epsilon, subspace_dim=4, num_draws=3, seed=2)
        assert one.settings["epsilon"] == epsilon
        assert all(map(same_bits, one.draws, alone.draws))
        assert (one.phi, one.phi_sd) == (alone.phi, alone.phi_sd)


def test_a_seed_fixes_every_bit_another_changes_it_and_nothing_is_touched():
    risk = mlp_risk()
    theta, state = risk.theta.clone(), torch.get_rng_state()
    first, again, other = (
        sh.subspace_sharpness(risk, subspace_dim=3, num_draws=2, seed=s) for s in (1, 1, 9)
    )
    assert all(map(same_bits, first.draws, again.draws))
    assert (first.phi, first.phi_sd) == (again.phi, again.phi_sd)
    assert first.phi != other.phi
    assert torch.equal(risk.theta, theta)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_draws": 1}, "`num_draws` must be at least 2; got 1"),
        ({"num_draws": 0}, "`num_draws` must be at least 2; got 0"),
        ({"num_draws": -3}, "`num_draws` must be at least 2; got -3"),
        ({"subspace_dim": 0}, r"`subspace_dim` must lie in \[1, n\]; got 0"),
        ({"subspace_dim": 46}, r"`subspace_dim` must lie in \[1, n\]; got 46"),
        ({}, r"`subspace_dim` must lie in \[1, n\]; got 100"),
        ({"subspace_dim": 3, "epsilon": [1e-3, -1.0]}, r"`epsilon` .* got -1\.0"),
        ({"subspace_dim": 3, "columns": "sparse"}, "`columns` .* got 'sparse'"),
        ({"subspace_dim": 3, "solver": "adam"}, "`solver` .* got 'adam'"),
        ({"subspace_dim": 3, "max_iter": 0}, "`max_iter` .* got 0"),
    ],
)
def test_a_wrong_call_is_refused_before_any_evaluation(options, text):
    risk = mlp_risk()
    calls = watched(risk)
    with pytest.raises(ValueError, match=text) as error:
        sh.subspace_sharpness(risk, **options)
    assert "\n" not in str(error.value)
    assert not calls


# -- how it can end ----------------------------------------------------------------


def test_an_interrupt_leaves_the_draws_that_were_done():
    options = {"subspace_dim": 4, "num_draws": 5, "seed": 3}
    whole = sh.subspace_sharpness(mlp_risk(), 0.05, **options)
    done = sum(draw.num_evals for draw in whole.draws[:2])
    risk = mlp_risk()
    calls = watched(risk, interrupt=done + 1)
    found = sh.subspace_sharpness(risk, 0.05, **options)
    assert len(calls) == done + 1
    assert found.status == "interrupted"
    assert all(map(same_bits, found.draws[:2], whole.draws[:2]))
    # The third had not seen a single value: its phi of 0 says nothing.
    assert len(found.draws) == 2
    assert found.phi == pytest.approx(np.mean([d.phi for d in whole.draws[:2]]), rel=1e-13)


def test_an_interrupt_in_the_first_draw_gives_a_result_without_a_spread():
    risk = mlp_risk()
    watched(risk, interrupt=3)
    found = sh.subspace_sharpness(risk, 0.05, subspace_dim=4)
    assert found.status == "interrupted"
    assert math.isnan(found.phi_sd)
    assert "interrupted" in str(found)
    (reading,) = found.readings()
    assert "interrupted" in reading.evidence


def test_with_fewer_draws_than_asked_for_no_epsilon_is_completed():
    risk = mlp_risk()
    watched(risk, interrupt=3)
    found = sh.subspace_sharpness(risk, [0.05, 1e-3], subspace_dim=4, num_draws=4)
    assert [result.status for result in found] == ["interrupted"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_time_is_up_for_each_draw_anew(solver):
    risk = mlp_risk()
    calls = watched(risk)
    found = sh.subspace_sharpness(
        risk, 0.05, subspace_dim=4, num_draws=3, solver=solver, max_seconds=0
    )
    assert found.status == "max_seconds"
    assert [draw.status for draw in found.draws] == ["max_seconds"]  # the others wait
    assert found.num_evals == len(calls) <= 6


# -- what a person sees ------------------------------------------------------------


def test_the_reading_of_several_draws_has_the_standard_error_of_their_mean():
    found = sh.subspace_sharpness(mlp_risk(), 0.05, subspace_dim=5, num_draws=4)
    (reading,) = found.readings()
    assert (reading.name, reading.value) == ("phi(0.05, p=5)", found.phi)
    assert reading.error == pytest.approx(found.phi_sd / 2, rel=1e-14)
    assert reading.evidence == (
        f"protocol {found.phi_protocol:.4g} %, standard error over 4 draws of A, normal A, "
        "completed"
    )
    assert reading.cost.startswith(f"{found.num_evals} gradients, ")
    assert (reading.bound, reading.unit) == ("≥", "%")


def test_the_line_of_several_draws_says_what_was_averaged():
    found = sh.subspace_sharpness(mlp_risk(), 5e-4, subspace_dim=5, columns="unit")
    found = dataclasses.replace(found, cost=dataclasses.replace(found.cost, seconds=2.04))
    (reading,) = found.readings()
    assert str(found) == (
        f"phi(5e-4, p=5) ≥ {number(found.phi)} ± {reading.error:.1g} %   (protocol "
        f"{found.phi_protocol:.4g} %, standard error over 5 draws of A, unit A, completed; "
        f"{found.num_evals} gradients, 2.0 s)"
    )


def test_a_protocol_not_run_is_not_shown_as_a_number():
    found = sh.subspace_sharpness(mlp_risk(), subspace_dim=5, num_draws=2, solver="ascent")
    assert found.phi_protocol is None
    (reading,) = found.readings()
    assert "nan" not in str(found)
    assert "nan" not in reading.evidence


def test_rounding_does_not_add_up_over_many_points():
    p = 20
    manifold, generator = _Manifold(mlp_risk(), p, "normal", seed=0), seeded(1)
    manifold.theta, manifold.a = manifold.theta.float(), manifold.a.float()
    y = torch.zeros(p)
    for i in range(4000):
        y = y.clone()
        y[i % p] = 1e3 * torch.rand(1, generator=generator) - 500
        found = manifold.point(y.clone())
    exact = manifold.theta.double() + manifold.a.double().T @ y.double()
    once = torch.addmv(manifold.theta, manifold.a.T, y)
    assert (found - exact).norm() <= 8 * (once - exact).norm()
