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
    caveat: str  # what it does not say


_REWRITTEN = (
    "It moves when the network is rewritten without changing its function (Dinh et al. "
    "2017)."
)
_CURVATURE = (
    f"{_REWRITTEN} It shrinks as cross-entropy saturates, and depends on how BatchNorm is "
    "run. A large value alone does not prove bad generalisation."
)
_SEARCHED = "A lower bound: a search finds no more than there is. It grows with the radius."
_IN_THETA = (
    "It stays when layers are rescaled, but it is no more than one number at one radius: "
    "the order of two networks may turn at another."
)
_DROP = "It is about accuracy, not loss, at one size of the drop, and only for classes."

MEASURES: dict[str, About] = {
    "lambda_max": About(
        "curvature", "eigenpairs", "largest eigenvalues of the Hessian", caveat=_CURVATURE
    ),
    "trace": About(
        "curvature", "trace", "sum of the Hessian's eigenvalues", caveat=_CURVATURE
    ),
    "phi": About(
        "epsilon",
        "epsilon_sharpness",
        "largest rise of the loss in Keskar's box, in percent of 1 + f",
        caveat=(
            "A lower bound: a search finds no more than there is. It grows with the number "
            f"of parameters; far above 100 % it is no matter of curvature. {_REWRITTEN}"
        ),
    ),
    "phi_subspace": About(
        "subspace",
        "subspace_sharpness",
        "the same over random subspaces, mean of several draws",
        caveat="It depends on how the subspaces are drawn, by orders of magnitude.",
    ),
    "worst_l2": About(
        "perturbation",
        "worst_case_sharpness",
        "largest rise in a Euclidean ball (and after one SAM step)",
        caveat=f"{_SEARCHED} {_REWRITTEN}",
    ),
    "worst_linf": About(
        "perturbation",
        "worst_case_sharpness",
        "largest rise in a cube",
        caveat=f"{_SEARCHED} {_REWRITTEN}",
    ),
    "worst_l2_elementwise": About(
        "perturbation",
        "worst_case_sharpness",
        "largest rise in a ball measured in |theta| (ASAM)",
        caveat=f"{_SEARCHED} {_IN_THETA}",
    ),
    "worst_linf_elementwise": About(
        "perturbation",
        "worst_case_sharpness",
        "largest rise in a cube measured in |theta|",
        caveat=f"{_SEARCHED} {_IN_THETA}",
    ),
    "worst_l2_filterwise": About(
        "perturbation",
        "worst_case_sharpness",
        "largest rise in a ball measured in filter norms",
        caveat=(
            f"{_SEARCHED} It stays when whole layers are rescaled and moves when single "
            "neurons are."
        ),
    ),
    "worst_l2_sharded": About(
        "sharded",
        "worst_case_sharpness",
        "m-sharpness: the largest rise on each shard, mean over shards",
        caveat=f"{_SEARCHED} It depends on the size of the shards. {_REWRITTEN}",
    ),
    "worst_normalised": About(
        "logits",
        "worst_case_sharpness",
        "largest rise in |theta| with normalised logits",
        caveat=f"{_SEARCHED} The loss is another one than that of the training.",
    ),
    "average": About(
        "perturbation",
        "average_case_sharpness",
        "mean rise under Gaussian noise",
        caveat=f"A mean: the steepest direction hardly counts in it. {_REWRITTEN}",
    ),
    "average_elementwise": About(
        "perturbation",
        "average_case_sharpness",
        "mean rise under Gaussian noise in proportion to |theta|",
        caveat=f"A mean: the steepest direction hardly counts in it. {_IN_THETA}",
    ),
    "pac_bayes_sigma": About(
        "flatness",
        "pac_bayes_sigma",
        "noise that costs accuracy_drop of the accuracy",
        caveat=f"{_DROP} {_REWRITTEN}",
    ),
    "pac_bayes_sigma_magnitude": About(
        "flatness", "pac_bayes_sigma", "the same in proportion to |theta|", caveat=_DROP
    ),
    "box_alpha": About(
        "flatness",
        "box_alpha",
        "box in which ascent costs accuracy_drop of the accuracy",
        caveat=f"An upper bound: only points that were looked at count. {_DROP}",
    ),
    "box_alpha_magnitude": About(
        "flatness",
        "box_alpha",
        "the same in proportion to |theta|",
        caveat=f"An upper bound: only points that were looked at count. {_DROP}",
    ),
    "relative_flatness": About(
        "flatness",
        "relative_flatness",
        "trace of a layer's Hessian weighted with its weights (Petzka)",
        caveat="It stays when whole layers are rescaled and moves when single neurons are.",
    ),
    "norms": About(
        "norms",
        "norms",
        "norms of gradient and parameters, distance from the start, Fisher-Rao",
        caveat=(
            "Lengths of parameters say how far training went, not how the loss curves: "
            "only the Fisher-Rao norm stays when the network is rewritten."
        ),
    ),
    "frobenius_norm": About(
        "spectrum",
        "frobenius_norm",
        "root of the sum of squared eigenvalues",
        caveat=_CURVATURE,
    ),
    "density": About(
        "spectrum",
        "spectral_density",
        "spectral density of the Hessian, with its negative mass",
        caveat=f"Single eigenvalues are blurred to its width. {_CURVATURE}",
    ),
    "noise_scale": About(
        "noise",
        "gradient_noise",
        "variance of a sample's gradient over the gradient's square",
        caveat=(
            "About the training loss at one point of one training. It grows along it and "
            "depends on the learning rate that led there: no batch size to use by itself."
        ),
    ),
    "batch_sharpness": About(
        "noise",
        "batch_sharpness",
        "mean curvature of mini-batches along their own gradients",
        caveat="An observed regularity, not a proven limit of the learning rate.",
    ),
    "lambda_max_sampling": About(
        "sampling",
        "lambda_max_sampling",
        "lambda_max of the distribution behind the samples",
        caveat="It is as good as the law that is fitted to a few subsets. " + _CURVATURE,
    ),
    "lambda_max_preconditioned": About(
        "tracking",
        "SharpnessTracker",
        "lambda_max in the metric of Adam's second moments",
        caveat="It holds for Adam's moments at this update. " + _CURVATURE,
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
