"""Every measure under its one name: in `summary`, commands, records and the tracker.

Plain text, readable without PyTorch. `docs/concepts/measures.md` has it as a table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """What a measure is."""

    family: str
    function: str  # of this package, that computes it alone
    definition: str


MEASURES: dict[str, About] = {
    "lambda_max": About("curvature", "eigenpairs", "largest eigenvalues of the Hessian"),
    "trace": About("curvature", "trace", "sum of the Hessian's eigenvalues"),
    "phi": About(
        "epsilon",
        "epsilon_sharpness",
        "largest rise of the loss in Keskar's box, in percent of 1 + f",
    ),
    "phi_subspace": About(
        "subspace",
        "subspace_sharpness",
        "the same over random subspaces, mean of several draws",
    ),
    "worst_l2": About(
        "perturbation",
        "worst_case_sharpness",
        "largest rise in a Euclidean ball (and after one SAM step)",
    ),
    "worst_linf": About("perturbation", "worst_case_sharpness", "largest rise in a cube"),
    "worst_l2_elementwise": About(
        "perturbation",
        "worst_case_sharpness",
        "largest rise in a ball measured in |theta| (ASAM)",
    ),
    "worst_linf_elementwise": About(
        "perturbation", "worst_case_sharpness", "largest rise in a cube measured in |theta|"
    ),
    "worst_l2_filterwise": About(
        "perturbation",
        "worst_case_sharpness",
        "largest rise in a ball measured in filter norms",
    ),
    "worst_l2_sharded": About(
        "sharded",
        "worst_case_sharpness",
        "m-sharpness: the largest rise on each shard, mean over shards",
    ),
    "worst_normalised": About(
        "logits", "worst_case_sharpness", "largest rise in |theta| with normalised logits"
    ),
    "average": About(
        "perturbation", "average_case_sharpness", "mean rise under Gaussian noise"
    ),
    "average_elementwise": About(
        "perturbation",
        "average_case_sharpness",
        "mean rise under Gaussian noise in proportion to |theta|",
    ),
    "pac_bayes_sigma": About(
        "flatness", "pac_bayes_sigma", "noise that costs accuracy_drop of the accuracy"
    ),
    "pac_bayes_sigma_magnitude": About(
        "flatness", "pac_bayes_sigma", "the same in proportion to |theta|"
    ),
    "box_alpha": About(
        "flatness", "box_alpha", "box in which ascent costs accuracy_drop of the accuracy"
    ),
    "box_alpha_magnitude": About(
        "flatness", "box_alpha", "the same in proportion to |theta|"
    ),
    "relative_flatness": About(
        "flatness",
        "relative_flatness",
        "trace of a layer's Hessian weighted with its weights (Petzka)",
    ),
    "norms": About(
        "norms",
        "norms",
        "norms of gradient and parameters, distance from the start, Fisher-Rao",
    ),
    "frobenius_norm": About(
        "spectrum", "frobenius_norm", "root of the sum of squared eigenvalues"
    ),
    "density": About(
        "spectrum",
        "spectral_density",
        "spectral density of the Hessian, with its negative mass",
    ),
    "noise_scale": About(
        "noise",
        "gradient_noise",
        "variance of a sample's gradient over the gradient's square",
    ),
    "batch_sharpness": About(
        "noise",
        "batch_sharpness",
        "mean curvature of mini-batches along their own gradients",
    ),
    "lambda_max_sampling": About(
        "sampling",
        "lambda_max_sampling",
        "lambda_max of the distribution behind the samples",
    ),
    "lambda_max_preconditioned": About(
        "tracking", "SharpnessTracker", "lambda_max in the metric of Adam's second moments"
    ),
}
FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(name for name, about in MEASURES.items() if about.family == family)
    for family in dict.fromkeys(about.family for about in MEASURES.values())
    if family != "tracking"
}
"""The measures of `summary`, by family."""
DEFAULT_FAMILIES = ("curvature", "epsilon")
TRACKED = (
    *("lambda_max", "lambda_max_preconditioned", "phi"),
    *("batch_sharpness", "noise_scale"),
)
"""The measures of a tracker."""
