"""Metric 2.1: closed forms, all corners, and what makes the number go wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from helpers.problems import ONE_SAMPLE, Point, by_hand, mlp_risk, quadratic, symmetric
from torch import Tensor

import sharpness as sh
from sharpness._results import number
from sharpness.measures import epsilon as metric
from sharpness.results import EpsilonSharpness
from sharpness.risk import memory

H = torch.logspace(-2, 2, 30, dtype=torch.float64)
CENTRE = torch.linspace(-2, 3, 30, dtype=torch.float64)
SOLVERS = [None, "lbfgsb", "scipy", "ascent"]


def bowl(offset: float = 0.3) -> sh.EmpiricalRisk:
    """A convex diagonal quadratic at its minimiser."""
    return quadratic(H, CENTRE, offset=offset)


def closed_form(epsilon: float, offset: float = 0.3) -> float:
    """phi of `bowl`, by hand: every coordinate goes to a face of the box."""
    half = epsilon * (np.abs(CENTRE.numpy()) + 1)
    return 100 * float(0.5 * np.sum(H.numpy() * half**2)) / (1 + offset)


def columns_by_hand(n: int, p: int, seed: int, kind: str = "normal") -> np.ndarray:
    """A, drawn as the record says: seed, N(0, 1) in float32."""
    a = torch.randn((n, p), generator=torch.Generator().manual_seed(seed))
    a = a.double().numpy()
    return a if kind == "normal" else a / np.linalg.norm(a, axis=0)


def half_widths_by_hand(a: np.ndarray, theta: Tensor, epsilon: float) -> np.ndarray:
    return epsilon * (np.abs(np.linalg.pinv(a) @ theta.numpy()) + 1)


def best_corner(f: Callable[[np.ndarray], float], half_widths: np.ndarray) -> float:
    signs = product((-1, 1), repeat=len(half_widths))
    return max(f(np.array(s) * half_widths) for s in signs)


def watched(risk: sh.EmpiricalRisk, interrupt: int = 0) -> list[float]:
    """The values the risk gives with gradients, as they come; Ctrl-C at one of them."""
    values: list[float] = []
    evaluate = risk.value_and_gradient

    def value_and_gradient(theta: Tensor | None = None) -> tuple[float, Tensor]:
        if len(values) + 1 == interrupt:
            raise KeyboardInterrupt
        value, gradient = evaluate(theta)
        values.append(value)
        return value, gradient

    risk.value_and_gradient = value_and_gradient
    return values


# -- closed forms ------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
@pytest.mark.parametrize("solver", SOLVERS)
def test_phi_of_a_bowl_is_its_closed_form_r33(solver, epsilon):
    found = sh.epsilon_sharpness(bowl(), epsilon, solver=solver, max_iter=60)
    assert found.phi == pytest.approx(closed_form(epsilon), rel=1e-6)
    assert found.status == "completed"
    assert found.value == pytest.approx(0.3, rel=1e-12)
    assert found.value_max == pytest.approx(
        0.3 + closed_form(epsilon) * 1.3 / 100, rel=1e-12
    )
    assert found.box_share == 1.0


def test_default_settings_give_the_closed_form_of_a_bowl():
    found = sh.epsilon_sharpness(bowl())
    assert found.settings["epsilon"] == 1e-3
    assert found.phi == pytest.approx(closed_form(1e-3), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0, 50.0])
def test_phi_is_a_percentage_of_one_plus_the_risk(offset):
    found = sh.epsilon_sharpness(bowl(offset), 0.05)
    assert found.phi == pytest.approx(closed_form(0.05, offset), rel=1e-6)
    rise = found.value_max - found.value
    assert found.phi == pytest.approx(100 * rise / (1 + found.value), rel=1e-9)


def test_a_slope_has_its_maximum_at_the_corner_it_points_to():
    risk = quadratic(H, CENTRE, at=CENTRE + 5)
    half = 1e-2 * ((CENTRE + 5).abs() + 1)
    expected = 0.5 * float((H * (5 + half) ** 2).sum())
    found = sh.epsilon_sharpness(risk, 1e-2)
    assert found.value_max == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(found.displacement, half, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_phi_is_positive_at_an_exact_minimiser(solver):
    """At y = 0 the gradient vanishes, and a solver that starts there stays there."""
    risk = bowl()
    assert not risk.gradient().any()
    found = sh.epsilon_sharpness(risk, solver=solver)
    assert found.phi > 0.5 * closed_form(1e-3)
    assert found.status == "completed"


@pytest.mark.parametrize("solver", SOLVERS)
def test_at_a_maximum_nothing_rises_and_the_status_says_so(solver):
    found = sh.epsilon_sharpness(quadratic(-H, CENTRE, offset=0.3), solver=solver)
    assert found.phi == 0.0
    assert found.value_max == found.value
    assert not found.displacement.any()
    assert found.status == "line_search_failed"
    with pytest.raises(sh.NotConvergedError, match="Try another `seed`") as error:
        found.raise_for_status()
    assert error.value.result is found


# -- the subspace ------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["normal", "unit"])
@pytest.mark.parametrize("p", [1, 3, 6, 8])
def test_a_subspace_agrees_with_all_of_its_corners(p, columns):
    a = symmetric(np.linspace(0.5, 4, 12))
    scaled = torch.linalg.cholesky(a).T  # f = 1/2 |L^T (theta - c)|^2 has Hessian a
    risk = sh.EmpiricalRisk(
        Point(CENTRE[:12]),
        closure=lambda model, _: (
            0.2 + 0.5 * (scaled @ (model.theta - CENTRE[:12])).square().sum()
        ),
        data=ONE_SAMPLE,
    )
    matrix = columns_by_hand(12, p, 7, columns)
    half = half_widths_by_hand(matrix, risk.theta, 0.01)
    hessian = matrix.T @ a.numpy() @ matrix
    expected = best_corner(lambda y: 0.5 * y @ hessian @ y, half) / 1.2 * 100
    found = sh.epsilon_sharpness(
        risk, 0.01, subspace_dim=p, columns=columns, seed=7, num_starts=20
    )
    assert found.phi == pytest.approx(expected, rel=1e-9)
    assert np.abs(found.displacement.numpy()) == pytest.approx(half, rel=1e-9)
    single = sh.epsilon_sharpness(risk, 0.01, subspace_dim=p, columns=columns, seed=7)
    assert single.phi <= expected * (1 + 1e-12)
    assert (found.settings["subspace_dim"], found.settings["columns"]) == (p, columns)


@pytest.mark.parametrize("p", [2, 29, 30])
def test_the_box_of_a_subspace_is_measured_by_the_pseudo_inverse(p):
    matrix = columns_by_hand(30, p, 3)
    found = sh.epsilon_sharpness(bowl(), 0.01, subspace_dim=p, seed=3, solver="ascent")
    half = half_widths_by_hand(matrix, CENTRE, 0.01)
    # The normal equations square the condition of A.
    exact = 100 * np.finfo(float).eps * np.linalg.cond(matrix) ** 2
    on_face = np.abs(found.displacement.numpy()) / half
    assert on_face.max() == pytest.approx(1, rel=max(exact, 1e-12))
    assert np.mean(on_face > 1 - max(exact, 1e-12)) == found.box_share


def test_the_pseudo_inverse_adds_up_over_many_rows():
    n = (1 << 16) + 1000  # more than one block
    theta = 50 * torch.randn(n, generator=torch.Generator().manual_seed(1)).double()
    theta += 300 * torch.randn((n, 3), generator=torch.Generator().manual_seed(2))[:, 1]
    found = sh.epsilon_sharpness(
        quadratic(torch.ones(n).double(), theta), subspace_dim=3, seed=2, solver="ascent"
    )
    half = half_widths_by_hand(columns_by_hand(n, 3, 2), theta, 1e-3)
    assert found.box_share == 1.0
    assert np.abs(found.displacement.numpy()) == pytest.approx(half, rel=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_subspace_point_reproduces_its_value(solver):
    risk = mlp_risk()
    found = sh.epsilon_sharpness(risk, 0.05, subspace_dim=10, seed=5, solver=solver)
    y = columns_by_hand(risk.n, 10, 5) @ found.displacement.numpy()
    value = risk.value(risk.theta + torch.from_numpy(y))
    assert value == pytest.approx(found.value_max, rel=1e-12)
    assert value > found.value


def test_columns_that_do_not_fit_are_refused_before_they_are_drawn(monkeypatch):
    risk = bowl()
    monkeypatch.setattr(memory, "budget_bytes", lambda device: 2 * 30 * 5 * 8)
    assert sh.epsilon_sharpness(risk, subspace_dim=5).status == "completed"
    with pytest.raises(ValueError, match="`subspace_dim` must leave A in memory; got 6 "):
        sh.epsilon_sharpness(risk, subspace_dim=6)


# -- a lower bound, and never a wrong one ------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 0.5])
def test_phi_is_never_below_a_thousand_random_points_r34(epsilon):
    risk = mlp_risk()
    found = sh.epsilon_sharpness(risk, epsilon)
    half = epsilon * (risk.theta.abs() + 1)
    shares = np.random.default_rng(11).uniform(-1, 1, (1000, risk.n))
    shares[500:] = np.sign(shares[500:])  # half of them corners
    points = risk.theta.numpy() + shares * half.numpy()
    assert found.value_max >= max(by_hand(point)[0] for point in points)
    assert torch.all(found.displacement.abs() <= half * (1 + 1e-12))


@pytest.mark.parametrize("epsilon", [0.05, 2.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_returned_point_reproduces_its_value_and_lies_in_the_box(solver, epsilon):
    risk = mlp_risk()
    found = sh.epsilon_sharpness(risk, epsilon, solver=solver, num_starts=2)
    value = risk.value(risk.theta + found.displacement)
    assert value == pytest.approx(found.value_max, rel=1e-12)
    half = epsilon * (risk.theta.abs() + 1)
    assert torch.all(found.displacement.abs() <= half * (1 + 1e-12))
    on_faces = (found.displacement.abs() >= half * (1 - 1e-12)).double().mean()
    assert found.box_share == pytest.approx(float(on_faces))


def test_more_starts_never_lower_phi():
    phis = [sh.epsilon_sharpness(mlp_risk(), 0.5, num_starts=s).phi for s in (1, 2, 4)]
    assert phis == sorted(phis)
    assert phis[-1] > phis[0] * (1 + 1e-6)


def test_both_solvers_together_are_as_good_as_the_better_one():
    risk = mlp_risk()
    both, *single = (
        sh.epsilon_sharpness(risk, 0.5, subspace_dim=8, solver=s, seed=2)
        for s in (None, "lbfgsb", "ascent")
    )
    assert both.phi == max(s.phi for s in single)
    assert both.phi >= both.phi_protocol == single[0].phi
    assert single[1].phi_protocol is None
    # The value and gradient at the common start are asked for once.
    assert both.num_evals == sum(s.num_evals for s in single) - 1
    assert both.solver in ("lbfgsb", "ascent")


def test_the_device_solver_agrees_with_scipy_after_ten_iterations():
    for epsilon in (1e-3, 0.05):
        ours, theirs = (
            sh.epsilon_sharpness(bowl(), epsilon, solver=solver)
            for solver in ("lbfgsb", "scipy")
        )
        assert ours.phi == pytest.approx(theirs.phi, rel=1e-6)
        assert ours.phi < closed_form(epsilon) * (1 - 1e-6)  # ten are not the end


@pytest.mark.parametrize("max_iter", [3, 10, 60])
@pytest.mark.parametrize("solver", [None, "lbfgsb", "scipy"])
def test_the_protocol_is_ten_iterations_or_nothing(solver, max_iter):
    ten = sh.epsilon_sharpness(bowl(), solver="lbfgsb", max_iter=10).phi
    end = sh.epsilon_sharpness(bowl(), solver=solver, max_iter=max_iter)
    if max_iter < 10:
        assert end.phi_protocol is None
    else:
        assert end.phi_protocol == pytest.approx(ten, rel=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted(solver):
    risk = mlp_risk()
    values = watched(risk)
    found = sh.epsilon_sharpness(
        risk, 0.05, subspace_dim=6, solver=solver, num_starts=3, max_iter=4
    )
    assert found.num_evals == len(values) > 3
    assert found.value_max == pytest.approx(max(values), rel=1e-12)


# -- units -------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_loss_in_other_units_rises_in_these_units(factor, solver):
    def rise(c: float) -> float:
        risk = quadratic(c * H, CENTRE)
        return sh.epsilon_sharpness(risk, solver=solver, max_iter=10).value_max

    assert rise(factor) == pytest.approx(factor * rise(1.0), rel=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_loss_times_a_power_of_two_gives_the_same_point(solver):
    points = [
        sh.epsilon_sharpness(quadratic(c * H, CENTRE), solver=solver).displacement
        for c in (1.0, 2.0**-20, 2.0**20)
    ]
    for other in points[1:]:
        torch.testing.assert_close(other, points[0], rtol=1e-9, atol=1e-15)


def test_a_float32_risk_gives_nearly_the_closed_form():
    risk = quadratic(H.float(), CENTRE.float(), offset=0.3)
    found = sh.epsilon_sharpness(risk, 0.1)
    assert found.displacement.dtype == torch.float32
    assert found.phi == pytest.approx(closed_form(0.1), rel=1e-5)


# -- seeds and lists ---------------------------------------------------------------


def same_bits(a: EpsilonSharpness, b: EpsilonSharpness) -> bool:
    b = dataclasses.replace(b, cost=dataclasses.replace(b.cost, seconds=a.seconds))
    return a == b and torch.equal(a.displacement, b.displacement)


@pytest.mark.parametrize("subspace_dim", [None, 5])
def test_a_list_of_epsilons_equals_single_calls_bit_for_bit(subspace_dim):
    risk, epsilons = mlp_risk(), (0.05, 1e-3, 0.05)
    many = sh.epsilon_sharpness(risk, epsilons, subspace_dim=subspace_dim, seed=3)
    assert isinstance(many, list)
    for epsilon, one in zip(epsilons, many, strict=True):
        alone = sh.epsilon_sharpness(risk, epsilon, subspace_dim=subspace_dim, seed=3)
        assert same_bits(one, alone)
        assert one.settings["epsilon"] == epsilon


@pytest.mark.parametrize(
    "options", [{"solver": "lbfgsb"}, {"solver": "scipy"}, {"subspace_dim": 4}]
)
def test_a_seed_fixes_every_bit_and_another_changes_the_point(options):
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, again, other = (
        sh.epsilon_sharpness(mlp_risk(), 1e-3, seed=s, max_iter=2, **options)
        for s in (1, 1, 2)
    )
    assert same_bits(first, again)
    assert not torch.equal(first.displacement, other.displacement)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_box_of_a_subspace_has_the_same_bits_every_time():
    """LAPACK's least squares differ in the last bit from one call to the next."""
    risk = mlp_risk()
    points = {
        tuple(
            sh.epsilon_sharpness(
                risk, subspace_dim=8, solver="ascent", max_iter=1, seed=2
            ).displacement.tolist()
        )
        for _ in range(60)
    }
    assert len(points) == 1


def test_the_model_is_never_moved():
    risk = mlp_risk()
    theta = risk.theta.clone()
    sh.epsilon_sharpness(risk, 0.5)
    assert torch.equal(risk.theta, theta)


# -- how it can end ----------------------------------------------------------------


def test_a_risk_that_is_nan_is_said_to_be_so():
    found = sh.epsilon_sharpness(quadratic(H * torch.nan, CENTRE))
    assert found.status == "non_finite"
    assert np.isnan(found.phi)
    assert np.isnan(found.value)
    with pytest.raises(sh.NotConvergedError, match="non-finite values"):
        found.raise_for_status()


def in_part(kind: str) -> sh.EmpiricalRisk:
    """A bowl that is broken where theta_0 > 0.1, beyond all starting points."""

    def closure(model: Point, _: Tensor) -> Tensor:
        value = 0.5 * model.theta.square().sum()
        if model.theta[0] <= 0.1:
            return value
        return {
            "inf": value + torch.inf,
            "nan": value * torch.nan,
            "nan gradient": value + 0 * (0 * model.theta).clamp(min=0).sqrt().sum(),
        }[kind]

    here = Point(torch.zeros(8).double())
    return sh.EmpiricalRisk(here, closure=closure, data=ONE_SAMPLE)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["inf", "nan", "nan gradient"])
def test_overflow_in_a_part_of_the_box_is_not_a_rise(kind, solver):
    found = sh.epsilon_sharpness(in_part(kind), 0.5, solver=solver, num_starts=2)
    assert np.isfinite(found.phi)
    assert 0 < found.phi <= 100 * 0.5 * 8 * 0.25
    assert torch.isfinite(found.displacement).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_interrupt_returns_the_best_point_so_far(solver):
    risk = mlp_risk()
    values = watched(risk, interrupt=6)
    found = sh.epsilon_sharpness(risk, 0.05, solver=solver)
    assert found.status == "interrupted"
    assert len(values) == 5
    assert found.phi > 0
    assert found.value_max == pytest.approx(max(values), rel=1e-12)
    value = mlp_risk().value(risk.theta + found.displacement)
    assert value == pytest.approx(found.value_max, rel=1e-12)


@pytest.mark.parametrize("max_seconds", [1e-9, 0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_time_passed_stops_the_search(solver, max_seconds):
    risk = mlp_risk()
    values = watched(risk)
    found = sh.epsilon_sharpness(risk, 0.05, solver=solver, max_seconds=max_seconds)
    assert found.status == "max_seconds"
    assert len(values) <= 2


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"epsilon": -1}, "got -1"),
        ({"epsilon": 0}, "got 0"),
        ({"epsilon": float("nan")}, "got nan"),
        ({"epsilon": float("inf")}, "got inf"),
        ({"epsilon": [1e-3, 0.0]}, r"got 0\.0"),
        ({"subspace_dim": 0}, r"got 0 \(n=30 parameters\)"),
        ({"subspace_dim": 31}, r"got 31 \(n=30 parameters\)"),
        ({"columns": "uniform"}, "got 'uniform'"),
        ({"solver": "adam"}, "got 'adam'"),
        ({"max_iter": 0}, "got 0"),
        ({"num_starts": 0}, "got 0"),
        ({"num_starts": -2}, "got -2"),
    ],
)
def test_a_wrong_call_is_refused_with_what_was_got(options, got):
    with pytest.raises(ValueError, match=got) as error:
        sh.epsilon_sharpness(bowl(), **options)
    assert f"`{next(iter(options))}` must" in str(error.value)


# -- what a person sees ------------------------------------------------------------


def test_the_line_is_honest_about_what_was_found():
    found = sh.epsilon_sharpness(bowl(), 5e-3)
    found = dataclasses.replace(found, cost=dataclasses.replace(found.cost, seconds=1.24))
    assert str(found) == (
        f"phi(5e-3) ≥ {number(found.phi)} %   (protocol {found.phi_protocol:.4g} %, 100% "
        f"of coordinates on the box, completed; {found.num_evals} gradients, 1.2 s)"
    )


def test_the_line_names_the_subspace_and_leaves_out_a_protocol_not_run():
    found = sh.epsilon_sharpness(bowl(), subspace_dim=4, columns="unit", solver="ascent")
    assert str(found).startswith("phi(1e-3, p=4) ≥ ")
    assert "unit A" in str(found)
    assert "protocol" not in str(found)


@pytest.mark.parametrize(
    ("epsilon", "text"), [(5e-4, "5e-4"), (1.5e-3, "0.0015"), (1.0, "1"), (2.0, "2")]
)
def test_epsilon_is_written_as_a_person_would(epsilon, text):
    found = sh.epsilon_sharpness(bowl(), epsilon, max_iter=1)
    assert str(found).startswith(f"phi({text}) ≥ ")


def test_the_text_never_prints_the_point():
    found = sh.epsilon_sharpness(bowl())
    assert "displacement" not in repr(found)
    assert len(repr(found)) < 1000


def test_progress_is_shown_on_stderr_only(capsys):
    sh.epsilon_sharpness(bowl(), progress=True)
    shown = capsys.readouterr()
    assert "evaluations" in shown.err
    assert shown.out == ""


# -- where the search begins -------------------------------------------------------------


@pytest.mark.parametrize("solver", ["lbfgsb", "scipy", "ascent"])
def test_a_search_from_zero_first_looks_at_theta_itself(solver, monkeypatch):
    risk, seen = mlp_risk(20), []
    original = type(risk).value_and_gradient

    def noting(self, theta=None):
        seen.append(theta)
        return original(self, theta)

    monkeypatch.setattr(type(risk), "value_and_gradient", noting)
    found = sh.epsilon_sharpness(risk, 0.01, start="zero", solver=solver, progress=False)
    assert torch.equal(seen[0], risk.theta)
    assert found.settings["start"] == "zero"
    assert found.phi > 0
    seen.clear()
    usual = sh.epsilon_sharpness(risk, 0.01, solver=solver, progress=False)
    assert usual.settings["start"] == "random"
    assert not torch.equal(seen[0], risk.theta)


def test_from_zero_nothing_is_found_where_the_gradient_vanishes():
    risk = quadratic([1.0, 2.0, 3.0])
    found = sh.epsilon_sharpness(risk, 0.1, start="zero", progress=False)
    assert (found.phi, found.status) == (0.0, "line_search_failed")
    both = sh.epsilon_sharpness(risk, 0.1, start="zero", num_starts=2, progress=False)
    assert both.phi > 0  # the second start is a random one
    assert both.phi_protocol == 0.0  # the first alone is the protocol's


def test_in_a_subspace_zero_is_theta_too():
    risk = mlp_risk(20)
    options = {"subspace_dim": 3, "solver": "lbfgsb", "progress": False}
    found = sh.epsilon_sharpness(risk, 0.1, start="zero", **options)
    assert found.phi > 0
    assert found.phi == pytest.approx(
        sh.epsilon_sharpness(risk, 0.1, **options).phi, rel=0.5
    )


def test_later_starts_are_mirrored_and_leave_the_tenth_of_the_box(monkeypatch):
    theta, seen = torch.arange(1.0, 201, dtype=torch.float64), []
    risk = quadratic(torch.ones(200), centre=theta)
    noting = {"ascent": lambda _, start, *options: seen.append(start) or []}
    monkeypatch.setattr(metric, "_SOLVERS", noting)
    sh.epsilon_sharpness(risk, 0.1, solver="ascent", num_starts=6, progress=False)
    first, mirrored, *others = seen
    assert torch.equal(mirrored, -first)
    assert 0.09 < float(first.abs().max()) <= 0.1
    assert torch.equal(others[0], -others[1])
    assert torch.equal(others[2], -others[3])
    assert all(0.9 < float(u.abs().max()) <= 1 for u in others)
    assert len({float(u[0]) for u in seen}) == 6


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(6))
def test_the_higher_side_of_a_valley_is_found_from_one_of_the_first_two(seed, solver):
    """The valley is so near that a start beyond it climbs the lower side."""
    theta, centre = torch.zeros(1), torch.full((1,), 1e-3)
    risk = quadratic(torch.ones(1, dtype=torch.float64), centre, at=theta)
    found = sh.epsilon_sharpness(risk, 0.1, num_starts=2, seed=seed, solver=solver)
    rise = 0.5 * (0.101**2 - 1e-6)
    assert found.phi == pytest.approx(100 * rise / (1 + 5e-7), rel=1e-6)


@pytest.mark.parametrize("start", ["", "Zero", None, 0])
def test_another_start_is_refused_in_one_line(start):
    with pytest.raises(ValueError, match=r"`start` must be 'random' or 'zero'; got"):
        sh.epsilon_sharpness(mlp_risk(20), start=start)


@pytest.mark.parametrize("offset", [-1.0, -1.5, -1e6])
def test_the_metric_is_not_defined_where_one_plus_f_is_not_positive(offset):
    risk = quadratic([1.0, 2.0], offset=offset)
    with pytest.raises(sh.NotAvailableError, match=r"`risk` must lie above -1") as error:
        sh.epsilon_sharpness(risk, progress=False)
    assert "\n" not in str(error.value)
    phis = sh.summary(risk, ["phi"], progress=False).results["phi"]
    assert [result.status for result in phis] == ["not_available"]


def test_just_above_minus_one_the_metric_is_positive():
    risk = quadratic([1.0, 2.0], offset=-0.999)
    assert sh.epsilon_sharpness(risk, 0.1, progress=False).phi > 0
