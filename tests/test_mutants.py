"""Every oracle is seen to fail: one line is sabotaged, and a named test turns red."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import test_doctor
import test_eigenpairs
import test_epsilon
import test_lanczos
import test_landscape
import test_optimize
import test_products
import torch
from measure_problems import second_minimum

from sharpness import _tensors
from sharpness.krylov import lanczos
from sharpness.measures import eigenvalues, epsilon, landscape
from sharpness.optimize import lbfgsb, line_search
from sharpness.risk import cases, checks, empirical, linearised, terms

Mutate = Callable[[pytest.MonkeyPatch], None]
MUTANTS: list[tuple[Mutate, Callable[[], None]]] = []


def seen_by(test: Callable[..., None], *arguments: object) -> Callable[[Mutate], Mutate]:
    """Name the test that must turn red, and what it is called with."""

    def register(mutate: Mutate) -> Mutate:
        MUTANTS.append((mutate, lambda: test(*arguments)))
        return mutate

    return register


# -- the risk ----------------------------------------------------------------------


@seen_by(test_eigenpairs.test_ragged_chunks_give_the_value_of_the_whole_batch_r1)
def chunks_are_weighted_alike(patch):
    def weight(self, count, size, of):
        return 1 / 3  # three chunks, whatever they hold

    patch.setattr(terms.LossTerms, "weight", weight)


@seen_by(test_eigenpairs.test_the_model_is_left_in_the_mode_it_was_in, RuntimeError)
def training_mode_is_not_restored(patch):
    @contextmanager
    def evaluation(model, batchnorm):
        model.eval()
        yield

    patch.setattr(empirical, "evaluation", evaluation)


@seen_by(
    test_products.test_every_case_adds_the_outer_product_of_its_gradient, "mse", "mean", 4
)
def every_case_weighs_one(patch):
    patch.setattr(cases.Cases, "weights", lambda self, z, y: torch.ones_like(z))


@seen_by(
    test_products.test_without_a_second_derivative_products_are_differences_and_the_plan_says_so
)
def a_graph_that_was_cut_is_trusted(patch):
    patch.setattr(linearised, "_check_differentiable", lambda slopes, value: None)


@seen_by(test_doctor.test_a_model_that_varies_from_call_to_call_is_named_and_raised)
def two_evaluations_are_not_compared(patch):
    def deterministic(values, first, second):
        return checks.Finding("deterministic", "ok", "not looked at")

    patch.setattr(checks, "_deterministic", deterministic)


# -- Lanczos and the eigenpairs ----------------------------------------------------


@seen_by(test_lanczos.test_eighty_steps_in_float32_stay_orthogonal)
def gram_schmidt_passes_only_once(patch):
    def orthogonalised(w, basis):
        overlaps = basis @ w
        return w - overlaps @ basis, overlaps

    patch.setattr(lanczos, "_orthogonalised", orthogonalised)


@seen_by(test_lanczos.test_an_error_bound_is_never_wider_than_its_residual, 0)
def bounds_are_tightened_without_a_gap(patch):
    def tightened(theta, residuals):
        distance = np.abs(theta[:, None] - theta)
        np.fill_diagonal(distance, np.inf)
        return residuals**2 / distance.min(1)

    patch.setattr(lanczos, "_tightened", tightened)


@seen_by(
    test_lanczos.test_noise_is_what_asymmetry_leaves_off_the_diagonals,
    1e-6,
)
def asymmetry_is_not_measured(patch):
    patch.setattr(lanczos, "_outside_tridiagonal", lambda overlaps, betas: 0.0)


@seen_by(test_lanczos.test_a_next_interval_that_reaches_higher_forbids_stopping)
def stopping_does_not_look_at_the_next_interval(patch):
    original = lanczos.ritz_pairs

    def ritz_pairs(state, k):
        pairs = original(state, k)
        return SimpleNamespace(**{**vars(pairs), "next_upper": -np.inf})

    # The test looks at the honest one, `meets` at this one.
    patch.setattr(lanczos, "ritz_pairs", ritz_pairs)


@seen_by(test_eigenpairs.test_a_close_pair_of_opposite_signs_keeps_signs_and_order_r6, "LA")
def the_largest_magnitude_is_taken_for_the_largest_value(patch):
    original = eigenvalues.ritz_pairs

    def ritz_pairs(state, k):
        every = original(state, len(state.alphas))
        best = np.argsort(-np.abs(every.values))[:k]
        return lanczos.RitzPairs(
            every.values[best],
            every.residuals[best],
            every.bounds[best],
            every.coefficients[best],
            every.next_upper,
        )

    patch.setattr(eigenvalues, "ritz_pairs", ritz_pairs)


@seen_by(test_eigenpairs.test_the_upper_bound_holds_for_19_starts_in_20, 5, 3.0)
def the_upper_bound_holds_for_half_of_the_starts(patch):
    original = lanczos.upper_bound
    patch.setattr(eigenvalues, "upper_bound", lambda s, n: original(s, n, 0.5))


@seen_by(test_eigenpairs.test_the_same_seed_gives_the_same_bits_and_no_generator_moves_r22)
def the_start_is_drawn_from_the_global_generator(patch):
    def random_unit(like, generator):
        v = torch.randn(like.shape).to(like)
        return v / v.norm()

    patch.setattr(_tensors, "random_unit", random_unit)


# -- the maximisers ----------------------------------------------------------------


@seen_by(test_optimize.test_lbfgsb_follows_scipy_on_rosenbrock_in_a_box, 1.1, 3.0, 2.0, 10)
def the_model_is_only_minimised_along_the_gradient(patch):
    patch.setattr(
        lbfgsb._Model,
        "_subspace_minimiser",
        lambda self, x, g, cauchy, free, box: cauchy,
    )


@seen_by(test_optimize.test_the_line_search_ends_on_the_strong_wolfe_conditions, "short")
def the_line_search_takes_any_slope(patch):
    patch.setattr(line_search, "_CURVATURE", 1e9)
    patch.setattr(line_search, "_DECREASE", -1e9)


# -- Metric 2.1 --------------------------------------------------------------------


@seen_by(test_epsilon.test_phi_is_positive_at_an_exact_minimiser, "lbfgsb")
def the_search_starts_at_theta(patch):
    patch.setattr(epsilon, "_START", 0.0)


@seen_by(test_epsilon.test_phi_is_a_percentage_of_one_plus_the_risk, 1.0)
def phi_is_no_percentage(patch):
    original = epsilon.EpsilonSharpness

    def result(*, phi, **fields):
        return original(phi=phi / 100, **fields)

    patch.setattr(epsilon, "EpsilonSharpness", result)


@seen_by(test_epsilon.test_phi_of_a_bowl_is_its_closed_form_r33, "ascent", 0.1)
def the_box_is_as_wide_for_every_weight(patch):
    original = epsilon._Manifold.__init__

    def init(self, *arguments):
        original(self, *arguments)
        self.half_widths = torch.ones_like(self.half_widths)

    patch.setattr(epsilon._Manifold, "__init__", init)


@seen_by(test_epsilon.test_phi_of_a_bowl_is_its_closed_form_r33, "lbfgsb", 0.1)
def the_gradient_has_the_wrong_sign(patch):
    original = epsilon._Search._rise

    def rise(self, u):
        value, gradient = original(self, u)
        return value, -gradient

    patch.setattr(epsilon._Search, "_rise", rise)


@seen_by(test_epsilon.test_the_box_of_a_subspace_is_measured_by_the_pseudo_inverse, 2)
def the_box_of_a_subspace_is_measured_by_the_transpose(patch):
    patch.setattr(epsilon, "_least_squares", lambda a, theta: a.T @ theta)


@seen_by(test_epsilon.test_a_subspace_agrees_with_all_of_its_corners, 3, "unit")
def columns_are_never_scaled(patch):
    original = epsilon._random_columns
    patch.setattr(
        epsilon,
        "_random_columns",
        lambda risk, p, columns, seed: original(risk, p, "normal", seed),
    )


# -- the line between two points ---------------------------------------------------


@seen_by(lambda: test_landscape.test_the_ends_are_the_two_points(second_minimum()))
def the_line_runs_backwards(patch):
    swapped = SimpleNamespace(lerp=lambda a, b, alpha: torch.lerp(b, a, alpha))
    patch.setattr(landscape, "torch", swapped)


@pytest.mark.parametrize(
    ("mutate", "test"), MUTANTS, ids=[mutate.__name__ for mutate, _ in MUTANTS]
)
def test_a_sabotaged_line_is_seen_by_the_test_that_names_it(mutate, test, monkeypatch):
    with monkeypatch.context() as patch:
        mutate(patch)
        with pytest.raises(AssertionError):
            test()
    test()  # and whole again, it is green
