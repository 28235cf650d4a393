"""Every oracle is seen to fail: one line is sabotaged, and a named test turns red.

That the same test, called in the same way, is green without the sabotage is seen where it
stands: each is one of the suite's own cases.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_audit
import test_augment
import test_batch_dependence
import test_blocks
import test_certificate
import test_compare
import test_compat
import test_doctor
import test_eigenpairs
import test_epsilon
import test_faults
import test_flatness
import test_float32
import test_lanczos
import test_landscape
import test_large_heads
import test_lbfgsb
import test_optimize
import test_perturbation
import test_products
import test_ranks
import test_remedies
import test_reparametrise
import test_schedules
import test_spectrum
import test_subspace
import test_traces
import test_tracking
import torch
from helpers.problems import second_minimum

from sharpness import _ranks, _tensors, compat, statistics, tracking
from sharpness.krylov import (
    basis,
    certificate,
    eigenpair_search,
    lanczos,
    quadrature,
    stochastic_trace,
)
from sharpness.lab import augment, ghost, remedies, run, schedules
from sharpness.measures import (
    audit,
    eigenvalues,
    epsilon,
    flatness,
    landscape,
    perturbation,
    preconditioner,
    reparametrise,
    spectrum,
)
from sharpness.optimize import lbfgsb, line_search
from sharpness.optimize.ball import Ball
from sharpness.risk import (
    batch_dependence,
    batches,
    chunks,
    curvature,
    doctor,
    empirical,
    fisher_terms,
    large_heads,
    loss_terms,
    mean_loss,
    products,
)

Mutate = Callable[[pytest.MonkeyPatch], None]
MUTANTS: list[tuple[Mutate, Callable[..., None], tuple[object, ...]]] = []
# Fixtures that a named test asks for, made here.
FIXTURES = {"other": second_minimum, "outside": lambda: "as PyTorch starts"}


def seen_by(test: Callable[..., None], *arguments: object) -> Callable[[Mutate], Mutate]:
    """Name the test that must turn red, and the parameters it is called with."""

    def register(mutate: Mutate) -> Mutate:
        MUTANTS.append((mutate, test, arguments))
        return mutate

    return register


def call(test: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """Call a test with its parameters and the fixtures that it names."""
    given = inspect.signature(test).bind_partial(*arguments).arguments
    with pytest.MonkeyPatch.context() as patch:
        made = {name: build() for name, build in FIXTURES.items() if name in names_of(test)}
        if "monkeypatch" in names_of(test):
            made["monkeypatch"] = patch
        test(**given, **made)


def names_of(test: Callable[..., None]) -> list[str]:
    return list(inspect.signature(test).parameters)


def told(case: Mapping[str, object]) -> list[str]:
    return sorted(map(repr, case.items()))


def cases_of(test: Callable[..., None]) -> list[dict[str, object]]:
    """The parameters of every case that the fast part of the suite runs."""
    if _is_slow(getattr(test, "pytestmark", ())):
        return []
    cases: list[dict[str, object]] = [{}]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, rows = mark.args
            names = names.split(",") if isinstance(names, str) else names
            fast = [row for row in rows if not _is_slow(getattr(row, "marks", ()))]
            rows = [values_of(row, alone=len(names) == 1) for row in fast]
            cases = [c | dict(zip(names, row, strict=True)) for c in cases for row in rows]
    return cases


def _is_slow(marks: Any) -> bool:
    return any(mark.name == "slow" for mark in marks)


def values_of(row: Any, *, alone: bool) -> tuple[object, ...]:
    if hasattr(row, "marks"):  # a `pytest.param`
        return tuple(row.values)
    return (row,) if alone else tuple(row)


# -- the risk ----------------------------------------------------------------------


@seen_by(test_eigenpairs.test_ragged_chunks_give_the_value_of_the_whole_batch_r1)
def chunks_are_weighted_alike(patch):
    def weight(self, count, size, of):
        return 1 / 3  # three chunks, whatever they hold

    patch.setattr(loss_terms.LossTerms, "weight", weight)


@seen_by(test_eigenpairs.test_the_model_is_left_in_the_mode_it_was_in, RuntimeError)
def training_mode_is_not_restored(patch):
    @contextmanager
    def evaluation(model, batchnorm):
        model.eval()
        yield

    patch.setattr(mean_loss, "evaluation", evaluation)


@seen_by(
    test_products.test_every_case_adds_the_outer_product_of_its_gradient, "mse", "mean", 4
)
def every_case_weighs_one(patch):
    patch.setattr(
        fisher_terms.FisherTerms, "weights", lambda self, z, y: torch.ones_like(z)
    )


@seen_by(
    test_products.test_without_a_second_derivative_products_are_differences_and_the_plan_says_so
)
def a_graph_that_was_cut_is_trusted(patch):
    patch.setattr(curvature, "_check_differentiable", lambda slopes, value: None)


@seen_by(test_doctor.test_a_model_that_varies_from_call_to_call_is_named_and_raised)
def two_evaluations_are_not_compared(patch):
    def deterministic(values, first, second):
        return doctor.CheckResult("deterministic", "ok", "not looked at")

    patch.setattr(doctor, "_deterministic", deterministic)


@seen_by(test_float32.test_no_shortcut_is_taken_forth_or_back)
def shortcuts_of_the_caller_are_taken(patch):
    patch.setattr(mean_loss, "true_float32", nullcontext)


# -- Lanczos and the eigenpairs ----------------------------------------------------


@seen_by(test_lanczos.test_eighty_steps_in_float32_stay_orthogonal)
def vectors_are_not_freed_from_the_basis(patch):
    patch.setattr(basis.Basis, "subtract", lambda self, w, coefficients: float(w.norm()))


@seen_by(
    test_lanczos.test_a_product_that_is_all_but_inside_the_space_leaves_an_orthogonal_direction
)
@seen_by(test_lanczos.test_the_zero_matrix_gives_zeros_and_nothing_else)
def gram_schmidt_passes_only_once(patch):
    first, again, last = basis.Basis.subtract_last, basis.Basis.overlaps, []

    def subtract_last(self, w, m, known):
        last[:] = [w]
        return first(self, w, m, known)

    def overlaps(self, w, m):
        seen = bool(last) and last[0] is w
        return w.new_zeros(m, dtype=torch.float64) if seen else again(self, w, m)

    patch.setattr(basis.Basis, "subtract_last", subtract_last)
    patch.setattr(basis.Basis, "overlaps", overlaps)


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
    original = basis.Basis.subtract_last

    def subtract_last(self, w, m, known):
        overlaps, norm = original(self, w, m, known)
        overlaps[:-1] = 0
        return overlaps, norm

    patch.setattr(basis.Basis, "subtract_last", subtract_last)


@seen_by(test_lanczos.test_a_next_interval_that_reaches_higher_forbids_stopping)
def stopping_does_not_look_at_the_next_interval(patch):
    original = lanczos.ritz_pairs

    def ritz_pairs(state):
        pairs = original(state)
        return replace(pairs, residuals=np.full_like(pairs.residuals, -np.inf))

    # The test looks at the honest one, `meets` at this one.
    patch.setattr(lanczos, "ritz_pairs", ritz_pairs)


@seen_by(
    test_eigenpairs.test_values_beyond_the_rank_are_zeros_and_found_at_once,
    "LA",
    5,
    torch.float32,
)
def zeros_must_be_known_below_the_noise(patch):
    def allowed(values, noise, tol):
        return tol * np.maximum(np.abs(values), noise)

    patch.setattr(lanczos, "allowed", allowed)


@seen_by(test_lanczos.test_a_restart_keeps_the_ritz_pairs_it_was_told_to)
def a_restart_forgets_the_coupling(patch):
    original = lanczos.Lanczos.restart

    def restart(self, kept):
        original(self, kept)
        only_last = np.append(np.zeros(len(kept) - 1), self.state.coupling[-1])
        self.state = replace(self.state, coupling=only_last)

    patch.setattr(lanczos.Lanczos, "restart", restart)


@seen_by(test_lanczos.test_the_step_after_a_restart_is_no_noise)
def the_step_after_a_restart_looks_at_one_row(patch):
    original = lanczos.Lanczos.restart

    def restart(self, kept):
        original(self, kept)
        self.state = replace(self.state, newest=0)

    patch.setattr(lanczos.Lanczos, "restart", restart)


@seen_by(test_lanczos.test_a_restart_does_not_lose_what_asymmetry_has_left)
def a_restart_forgets_the_noise(patch):
    original = lanczos.Lanczos.restart

    def restart(self, kept):
        original(self, kept)
        self.state = replace(self.state, noise=0.0)

    patch.setattr(lanczos.Lanczos, "restart", restart)


@seen_by(test_large_heads.test_loss_gradient_and_product_are_those_of_the_scores,
         "mean", True)  # fmt: skip
def a_softmax_that_moves_is_taken_for_fixed(patch):
    def no_mean(self, rows):
        return (torch.zeros_like(self._logs[rows]),) * 2

    patch.setattr(large_heads, "LEAST_CLASSES", 500)
    patch.setattr(large_heads._Along, "means", no_mean)


@seen_by(test_large_heads.test_memory_beside_inputs_and_results_does_not_grow_with_the_rows)
def blocks_of_scores_hold_all_rows(patch):
    patch.setattr(large_heads, "LEAST_CLASSES", 500)
    patch.setattr(large_heads, "_BLOCK", {"cpu": (1024, 256)})


@seen_by(test_lanczos.test_ctrl_c_during_a_restart_waits_until_the_rotation_is_done)
def ctrl_c_is_not_held_back(patch):
    patch.setattr(lanczos, "_uninterrupted", nullcontext)


@seen_by(test_lanczos.test_rows_combined_in_strips_are_the_product_of_matrices,
         3, 18, 7)  # fmt: skip
def rows_are_combined_one_after_another(patch):
    def combine(self, coefficients):
        rows, m = coefficients.shape
        for i in range(rows):  # of which the later ones see the first overwritten
            self[i] = torch.from_numpy(coefficients[i].copy()) @ self.rows(m)

    patch.setattr(basis.Basis, "combine", combine)


@seen_by(test_eigenpairs.test_a_close_pair_of_opposite_signs_keeps_signs_and_order_r6, "LA")
def the_largest_magnitude_is_taken_for_the_largest_value(patch):
    original = eigenpair_search.wanted
    patch.setattr(
        eigenpair_search, "wanted", lambda theta, k, which: original(theta, k, "LM")
    )


@seen_by(test_eigenpairs.test_a_close_pair_of_opposite_signs_keeps_signs_and_order_r6, "LM")
def the_largest_value_is_taken_for_the_largest_magnitude(patch):
    original = eigenpair_search.wanted
    patch.setattr(
        eigenpair_search, "wanted", lambda theta, k, which: original(theta, k, "LA")
    )


@seen_by(test_eigenpairs.test_both_ends_with_an_odd_k_have_one_more_at_the_top, 3)
def both_ends_have_one_more_at_the_bottom(patch):
    original = eigenpair_search.wanted

    def mirrored(theta, k, which):
        return len(theta) - 1 - original(-theta[::-1], k, which)[::-1]

    patch.setattr(eigenpair_search, "wanted", mirrored)


@seen_by(test_eigenpairs.test_without_a_confidence_the_rule_is_met_twice_in_a_row)
def the_rule_is_met_once(patch):
    met_once = property(lambda self: self._settled >= 1)
    patch.setattr(eigenpair_search.Search, "is_converged", met_once)


@seen_by(test_eigenpairs.test_the_upper_bound_holds_for_19_starts_in_20, 5, 3.0)
def the_upper_bound_holds_for_half_of_the_starts(patch):
    original = eigenpair_search.Search.upper
    patch.setattr(eigenpair_search.Search, "upper", lambda self, miss: original(self, 0.5))


@seen_by(test_eigenpairs.test_a_start_at_the_second_does_not_hide_the_first)
def nothing_is_ever_hidden(patch):
    patch.setattr(eigenpair_search.Search, "hidden", lambda self: ())


@seen_by(
    test_certificate.test_small_overlaps_planted_in_float32_are_found_as_in_theory, 0.05, 12
)
def the_limit_forgets_how_long_the_start_is(patch):
    original = certificate.log_limit
    known = lambda squared_norm, miss: original(1.0, miss)  # noqa: E731
    patch.setattr(certificate, "log_limit", known)


@seen_by(test_eigenpairs.test_the_random_half_of_a_warm_start_follows_seed_and_bits)
def a_warm_start_draws_what_a_cold_one_drew(patch):
    patch.setattr(_tensors, "mixed", lambda seed, *parts: seed)


@seen_by(
    test_certificate.test_a_place_between_two_values_is_seen_though_both_its_ends_are_ruled_out
)
def only_the_ends_of_a_gap_are_looked_at(patch):
    def between(kernel, limit, low, high):
        ends = kernel.log(np.array([low, high]))
        return [] if ends.min() > limit else [(low, high)]

    patch.setattr(certificate, "_between", between)


@seen_by(
    test_certificate.test_k_is_the_sum_over_the_basis_at_every_eigenvalue, 22, 12, "LA"
)
def a_restart_forgets_what_it_dropped(patch):
    original = lanczos.Lanczos.restart

    def restart(self, kept):
        original(self, kept)
        self.state = replace(self.state, dropped=np.empty(0))

    patch.setattr(lanczos.Lanczos, "restart", restart)


@seen_by(test_eigenpairs.test_the_explicit_residual_is_that_of_the_leading_pair, "SA")
def the_largest_pair_is_verified_whatever_was_asked_for(patch):
    patch.setattr(eigenvalues, "leading", lambda values, which: 0)


@seen_by(test_eigenpairs.test_a_recurrence_that_lied_has_its_bound_raised, "LA")
def a_residual_that_lied_keeps_its_bound(patch):
    original = eigenvalues._verified

    def verified(found, *arguments):
        bounds = found.bounds.copy()
        residual = original(found, *arguments)
        found.bounds[:] = bounds
        return residual

    patch.setattr(eigenvalues, "_verified", verified)


@seen_by(test_eigenpairs.test_an_end_that_was_not_asked_for_is_nan, "LA", 2, 8.0, None)
def the_last_value_is_called_the_smallest(patch):
    def end(self, index, asked, sign):
        return float(self.eigenvalues[index])

    patch.setattr(eigenvalues.HessianEigenpairs, "_end", end)


@seen_by(test_eigenpairs.test_a_preconditioner_gives_the_pairs_of_the_scaled_matrix, "LA")
def the_preconditioner_is_applied_on_each_side_in_full(patch):
    original = eigenvalues._multiplication
    patch.setattr(
        eigenvalues,
        "_multiplication",
        lambda risk, matrix, p, *rest, **more: original(risk, matrix, p**2, *rest, **more),
    )


@seen_by(test_eigenpairs.test_the_same_seed_gives_the_same_bits_and_no_generator_moves_r22)
def the_start_is_drawn_from_the_global_generator(patch):
    drawn = lambda self, like, generator: torch.randn(like.shape).to(like)  # noqa: E731
    patch.setattr(_ranks.Vectors, "normal", drawn)


@seen_by(
    test_spectrum.test_the_error_of_few_steps_covers_the_negative_mass_of_each_start, 24
)
def two_numbers_of_steps_say_how_far_an_integral_swings(patch):
    def integrals(self, function):
        coarse = self.coarse_weights @ function(self.coarse_nodes)
        return np.array([self.weights @ function(self.nodes), coarse])

    patch.setattr(quadrature.Rule, "integrals", integrals)


@seen_by(test_spectrum.test_steps_go_on_where_the_density_still_changes)
def every_density_stands_still(patch):
    patch.setattr(spectrum, "stands_still", lambda *_: True)


# -- diagonal blocks, Adam and parts of the data -----------------------------------


@seen_by(
    test_blocks.test_block_products_are_slices_of_the_dense_hessian, "auto", "kept_graph"
)
def parameters_of_a_block_are_put_in_order(patch):
    original = products.Products.of_blocks

    def of_blocks(self, blocks, vectors):
        return original(self, [sorted(block) for block in blocks], vectors)

    patch.setattr(products.Products, "of_blocks", of_blocks)


@seen_by(
    test_blocks.test_a_sweep_builds_the_graph_of_a_chunk_once_however_many_blocks, 2, 1
)
def every_block_has_a_sweep_of_its_own(patch):
    original = products.Products.of_blocks

    def of_blocks(self, blocks, vectors):
        pairs = zip(blocks, vectors, strict=True)
        return [original(self, [block], [v])[0] for block, v in pairs]

    patch.setattr(products.Products, "of_blocks", of_blocks)


@seen_by(
    test_blocks.test_the_preconditioner_is_the_formula_after_real_steps,
    torch.optim.Adam,
    False,
)
def adams_bias_is_not_corrected(patch):
    original = preconditioner._divisor

    def divisor(name, shape, state, group):
        return original(name, shape, {**state, "step": 1e9}, group)

    patch.setattr(preconditioner, "_divisor", divisor)


@seen_by(test_blocks.test_amsgrad_uses_the_largest_second_moment)
def amsgrad_is_taken_for_adam(patch):
    original = preconditioner._divisor

    def divisor(name, shape, state, group):
        plain = {key: value for key, value in state.items() if key != "max_exp_avg_sq"}
        return original(name, shape, plain, group)

    patch.setattr(preconditioner, "_divisor", divisor)


@seen_by(test_blocks.test_a_subset_is_the_risk_of_the_indexed_data, "repeated", "auto")
def repeated_samples_count_once(patch):
    original = batches.taken
    patch.setattr(batches, "taken", lambda pair, index: original(pair, index.unique()))


@seen_by(test_blocks.test_the_parent_of_a_subset_is_left_as_it_was)
def a_subset_is_its_parent(patch):
    patch.setattr(chunks, "copy", SimpleNamespace(copy=lambda parent: parent))


# -- the maximisers ----------------------------------------------------------------


@seen_by(test_optimize.test_lbfgsb_follows_scipy_on_rosenbrock_in_a_box, 1.1, 3.0, 2.0, 10)
def the_model_is_only_minimised_along_the_gradient(patch):
    patch.setattr(
        lbfgsb._Model,
        "_subspace_minimiser",
        lambda self, x, g, breaks, t, box: box.clip(x - g * breaks.clamp(max=t)),
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
    patch.setattr(epsilon, "_least_squares", lambda a, theta: a @ theta)


@seen_by(test_epsilon.test_a_subspace_agrees_with_all_of_its_corners, 3, "unit")
def columns_are_never_scaled(patch):
    original = epsilon._random_columns
    patch.setattr(
        epsilon,
        "_random_columns",
        lambda risk, p, columns, seed: original(risk, p, "normal", seed),
    )


@seen_by(test_subspace.test_a_point_is_the_same_whichever_was_asked_for_before, 3)
def a_point_moves_along_one_column_too_few(patch):
    original = epsilon._Manifold.point

    def point(self, y):
        if self._last is not None:
            first = (y != self._last[0]).nonzero()[0]
            self._last[0][first] = y[first]
        return original(self, y)

    patch.setattr(epsilon._Manifold, "point", point)


# -- perturbations and flatness ----------------------------------------------------


@seen_by(
    test_perturbation.test_the_worst_of_a_quadratic_is_that_of_the_secular_equation,
    "elementwise",
)
def the_worst_case_is_never_adaptive(patch):
    patch.setattr(
        perturbation, "perturbation_scale", lambda risk, _: torch.ones_like(risk.theta)
    )


@seen_by(
    test_perturbation.test_the_step_of_sam_is_in_closed_form_r35,
    "elementwise",
    "l2",
    (-2.0, 2.0),
)
def the_step_of_sam_is_too_short(patch):
    patch.setattr(perturbation.Ball, "project", lambda self, u, out=None: u / 4)


@seen_by(
    test_perturbation.test_each_pair_of_draws_on_a_quadratic_rises_by_its_square_form,
    "elementwise",
)
def the_noise_is_twice_as_strong(patch):
    original = perturbation.normal_draws
    patch.setattr(perturbation, "normal_draws", lambda *a: (2 * z for z in original(*a)))


@seen_by(test_perturbation.test_filter_norms_are_those_of_a_plain_loop, torch.float64)
def filters_are_columns(patch):
    original = perturbation._filter_norms
    patch.setattr(
        perturbation,
        "_filter_norms",
        lambda w: original(w.transpose(0, 1)).transpose(0, 1) if w.ndim > 1 else w.abs(),
    )


@seen_by(test_perturbation.test_shards_of_a_network_rise_as_in_a_plain_loop)
def shards_are_all_samples(patch):
    patch.setattr(perturbation, "_shards", lambda risk, size, seed: iter([risk]))


@seen_by(
    test_perturbation.test_normalised_logits_have_mean_0_and_length_1,
    torch.float64,
    (6, 4),
)
def logits_are_left_as_they_are(patch):
    patch.setattr(perturbation.NormalisedLogits, "forward", lambda self, x: self.model(x))


@seen_by(
    test_flatness.test_sigma_is_the_standard_deviation_of_the_normal_distribution, 0.03, 0.1
)
def sigma_is_a_variance(patch):
    original = flatness._Root.__init__

    def init(self, function, level, tol):
        original(self, lambda x: function(x**0.5), level, tol)

    patch.setattr(flatness._Root, "__init__", init)


@seen_by(
    test_flatness.test_noise_is_scaled_by_each_weight_with_a_floor,
    2e-3,
    -0.4,
    True,
    torch.float32,
)
def the_floor_of_the_magnitudes_is_gone(patch):
    patch.setattr(flatness, "_MAGNITUDE_FLOOR", 0.0)


@seen_by(
    test_flatness.test_alpha_is_where_enough_small_margins_are_used_up,
    0.08,
    3,
    20,
    1,
    0.3,
    False,
)
def the_box_is_half_as_wide_as_it_says(patch):
    patch.setattr(flatness, "Ball", lambda norm, radius: Ball(norm, radius / 2))


@seen_by(test_flatness.test_the_last_layer_of_a_softmax_network_has_a_closed_form)
def rows_are_not_weighted_by_their_products(patch):
    patch.setattr(flatness, "_root_of_rows", lambda w: torch.eye(len(w)).to(w))


@seen_by(
    test_flatness.test_the_fisher_rao_norm_is_a_sum_over_samples_and_classes,
    test_flatness.tiny_mlp,
    -100,
)
def the_fisher_rao_norm_takes_the_hessian(patch):
    original = empirical.EmpiricalRisk.product
    patch.setattr(
        empirical.EmpiricalRisk, "product", lambda self, v, matrix: original(self, v)
    )


# -- the audit, and PyHessian's door -----------------------------------------------


@seen_by(
    test_traces.test_coordinates_without_curvature_do_not_spoil_the_sketch,
    "hutch++",
    torch.float32,
    0,
)
def a_sketch_takes_its_own_directions_again(patch):
    patch.setattr(stochastic_trace, "_MOST_PASSES", stochastic_trace._PASSES)


@seen_by(test_reparametrise.test_running_statistics_are_scaled_along, "batchnorm")
def the_running_mean_stays(patch):
    original = reparametrise._rescale_before_norm

    def rescale(draw, network, pair):
        before = network.get_submodule(pair.consumer).running_mean.clone()
        applied = original(draw, network, pair)
        network.get_submodule(pair.consumer).running_mean.copy_(before)
        return applied

    patch.setattr(reparametrise, "_rescale_before_norm", rescale)
    patch.setattr(reparametrise, "_TOLERANCE", 1e9)


@seen_by(test_audit.test_what_counts_distances_in_parameters_moves, "lambda_max")
def every_change_is_allowed(patch):
    patch.setattr(audit.AuditRow, "moved", lambda self, name: False)


@seen_by(test_compat.test_a_negative_eigenvalue_comes_before_a_smaller_positive_one)
def the_door_asks_for_the_largest_algebraic(patch):
    original = compat.eigenpairs

    def pairs(risk, k, *, which, **rest):
        return original(risk, k, which="LA", **rest)

    patch.setattr(compat, "eigenpairs", pairs)


@seen_by(
    test_subspace.test_mean_and_spread_are_those_of_separate_calls_with_the_seeds_that_follow,
    {"subspace_dim": 4},
)
def every_draw_is_the_first(patch):
    original = epsilon.epsilon_sharpness

    def same(risk, epsilons, *, seed, **rest):
        return original(risk, epsilons, seed=0, **rest)

    patch.setattr(epsilon, "epsilon_sharpness", same)


@seen_by(test_lbfgsb.test_the_cauchy_point_is_that_of_the_published_algorithm, 10)
def the_path_is_left_too_late(patch):
    original = lbfgsb._Model._cauchy_step
    patch.setattr(
        lbfgsb._Model, "_cauchy_step", lambda self, g, b: 1.5 * original(self, g, b)
    )


@seen_by(test_compare.test_every_number_is_that_of_scipy_and_of_enumeration, 0, 0.0)
def the_other_side_is_tested(patch):
    original = statistics.paired_t
    patch.setattr(statistics, "paired_t", lambda d: original(-d))


# -- the lab, and what is seen on the way ------------------------------------------


@seen_by(
    test_schedules.test_smiths_schedules_take_the_updates_of_his_table,
    "smith2018-increased-rate",
    6_406,
)
def every_phase_is_rounded(patch):
    original = schedules._updates_before
    patch.setattr(
        schedules, "_updates_before", lambda *phases: [round(u) for u in original(*phases)]
    )


@seen_by(
    test_schedules.test_batches_are_one_stream_with_every_sample_once_an_epoch, [7] * 6
)
def every_epoch_has_the_same_order(patch):
    patch.setattr(run, "_seed_of", lambda *parts: 0)


@seen_by(
    test_remedies.test_a_conservative_update_descends_to_the_solution_of_the_proximal_problem,
    0.5,
    3,
)
def the_proximal_term_pushes_away(patch):
    original = remedies.Conservative.__call__

    def opposite(self, step):
        away = copy.copy(self)
        object.__setattr__(away, "strength", -self.strength)  # no setting can be negative
        return original(away, step)

    patch.setattr(remedies.Conservative, "__call__", opposite)


@seen_by(test_remedies.test_a_sam_update_takes_the_gradient_on_the_sphere, 0.5, 0.0)
def the_ball_has_the_wrong_radius(patch):
    original = remedies._unit
    patch.setattr(remedies, "_unit", lambda vectors: [2 * v for v in original(vectors)])


@seen_by(
    test_remedies.test_an_asam_update_takes_the_gradient_on_the_stretched_sphere, 1, 0.3
)
def the_ball_is_not_stretched(patch):
    patch.setattr(remedies.ASAM, "scale", remedies.SAM.scale)


@seen_by(
    test_remedies.test_a_network_with_ghost_batches_is_the_network_on_split_batches, {}
)
def the_batch_is_normalised_whole(patch):
    patch.setattr(
        ghost, "_in_parts", lambda model, layer, size, x: type(layer).forward(layer, x)
    )


@seen_by(
    test_tracking.test_an_eigenvalue_that_overtakes_the_one_that_was_followed_is_seen, None
)
def only_one_eigenpair_is_followed(patch):
    patch.setattr(tracking, "_NUM_FOLLOWED", 1)


@seen_by(
    test_augment.test_turns_and_shifts_are_those_of_a_plain_loop, (5, 1, 6, 9), 10.0, 0.2
)
def images_turn_the_other_way(patch):
    original = augment._moved
    patch.setattr(augment, "_moved", lambda x, angles, shifts: original(x, -angles, shifts))


# -- what f owes to the batches ----------------------------------------------------


@seen_by(test_batch_dependence.test_a_risk_says_where_f_depends_on_the_batches)
def every_loss_is_a_mean_over_rows(patch):
    patch.setattr(batch_dependence, "reductions", lambda *_: frozenset({"mean"}))


@seen_by(test_batch_dependence.test_a_dependence_that_only_the_curvature_has_is_seen)
def only_values_and_gradients_are_compared(patch):
    original = batch_dependence._responses
    patch.setattr(batch_dependence, "_responses", lambda *args: (*original(*args)[:2], []))


@seen_by(
    test_batch_dependence.test_a_layer_that_mixes_rows_sees_the_batches_as_given,
    test_batch_dependence.mean_square,
)
def no_layer_mixes_rows(patch):
    patch.setattr(batch_dependence, "_are_apart", lambda *_: True)


@seen_by(test_batch_dependence.test_random_draws_are_the_same_in_chunks_of_any_size, "loss")
def draws_are_not_noticed(patch):
    patch.setattr(batch_dependence, "random_states", lambda: ())


# -- the line between two points ---------------------------------------------------


@seen_by(test_landscape.test_the_ends_are_the_two_points)
def the_line_runs_backwards(patch):
    original = landscape._along

    def mirrored(risk, at, points, progress):
        return original(risk, lambda alpha: at(1 - alpha), points, progress)

    patch.setattr(landscape, "_along", mirrored)


@seen_by(test_ranks.test_a_vector_drawn_in_stretches_is_the_whole_one_to_the_bit, 100)
def every_process_draws_its_part_anew(patch):
    def normal(self, like, generator):
        span = self.ranks.span(self.n)
        return torch.randn(span.stop - span.start, generator=generator)

    patch.setattr(_ranks.Vectors, "normal", normal)


@seen_by(test_ranks.test_processes_take_all_samples_and_whole_batches_of_batchnorm, 23, 5)
def processes_cut_batches_of_batchnorm(patch):
    original = test_ranks._own_part
    patch.setattr(
        test_ranks, "_own_part", lambda pair, ranks, most: original(pair, ranks, 1)
    )


@seen_by(test_faults.test_all_stop_after_the_step_at_which_one_is_late)
def a_process_goes_by_its_own_clock(patch):
    patch.setattr(test_faults.Two, "most", lambda self, number: number)


NAMES = [mutate.__name__ for mutate, *_ in MUTANTS]


@pytest.mark.parametrize(("mutate", "test", "arguments"), MUTANTS, ids=NAMES)
def test_a_sabotaged_line_is_seen_by_the_test_that_names_it(
    mutate, test, arguments, monkeypatch
):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        call(test, arguments)


@pytest.mark.parametrize(("mutate", "test", "arguments"), MUTANTS, ids=NAMES)
def test_the_test_that_it_names_is_a_case_of_the_suite(mutate, test, arguments):
    given = inspect.signature(test).bind_partial(*arguments).arguments
    assert told(given) in map(told, cases_of(test))
    fixtures = set(names_of(test)) - set(given)
    assert fixtures <= {*FIXTURES, "monkeypatch"}
