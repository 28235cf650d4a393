"""What can be asked of a measurement, as plain values: readable without PyTorch.

A field's help text is that of the flag which a command has for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sharpness._arguments import ensure, flag, positive, positive_list, require, whole

FAMILIES: dict[str, tuple[str, ...]] = {
    "curvature": ("lambda_max", "trace"),
    "epsilon": ("phi",),
    "subspace": ("phi_subspace",),
    "perturbation": (
        *("worst_l2", "worst_linf", "worst_l2_elementwise", "worst_linf_elementwise"),
        *("worst_l2_filterwise", "average", "average_elementwise"),
    ),
    "sharded": ("worst_l2_sharded",),
    "logits": ("worst_normalised",),
    "flatness": (
        *("pac_bayes_sigma", "pac_bayes_sigma_magnitude"),
        *("box_alpha", "box_alpha_magnitude", "relative_flatness"),
    ),
    "norms": ("norms",),
    "spectrum": ("frobenius_norm", "density"),
    "sampling": ("lambda_max_sampling",),
}
"""The measures of `summary`, by family."""
DEFAULT_FAMILIES = ("curvature", "epsilon", "perturbation", "flatness", "norms")
TRACKED = ("lambda_max", "lambda_max_preconditioned", "phi")
"""The measures of a tracker."""


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """What the measures of a summary share. See `summary`."""

    k: int = flag(1, "eigenvalues wanted")
    tol: float = flag(1e-2, "their relative error")
    epsilon: tuple[float, ...] = flag((1e-3, 5e-4), "box sizes of phi, with commas")
    subspace_dim: int | None = flag(
        None, "columns of A for the measure phi_subspace (default: 100)"
    )
    num_starts: int = flag(1, "starts of phi")
    rho: tuple[float, ...] | None = flag(
        None, "radii of all perturbation measures, with commas (default: each its own)"
    )
    shard_size: int | None = flag(None, "samples of a shard in m-sharpness (default: 128)")
    accuracy_drop: float = flag(0.1, "that sigma and alpha are measured by")
    seed: int = flag(0, "of samples and draws")
    max_seconds: float | None = flag(None, "time limit of each measure")

    def __post_init__(self) -> None:
        """Refuse a value before any work is done."""
        positive("tol", self.tol, "The default is 1e-2.")
        positive_list("epsilon", self.epsilon, "The paper used 1e-3 and 5e-4.")
        if self.rho is not None:
            positive_list("rho", self.rho, "SAM's default is 0.05.")
        drop = self.accuracy_drop
        require(0 < drop < 1, "accuracy_drop", "lie in (0, 1)", drop, "0.1 is usual.")
        if self.max_seconds is not None:
            sound = self.max_seconds >= 0
            ensure(sound, "max_seconds", "be at least 0", str(self.max_seconds))
        whole("num_starts", self.num_starts, 1)
        for name in ("subspace_dim", "shard_size"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
        require(whole("seed", self.seed, 0) < 1 << 62, "seed", "be below 2^62", self.seed)


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings:
    """What is measured of a checkpoint, on which samples, and how."""

    num_samples: int | None = 1000  # class-balanced, by the seed; None means all
    split: Literal["train", "test"] = flag("train", "part of the data")
    batchnorm: Literal["running", "batch", "recalibrated"] = flag(
        "running",
        "'running' statistics (evaluation mode), 'batch' statistics as in Keskar et al., "
        "or running ones 'recalibrated' at the point measured",
    )
    measures: tuple[str, ...] | None = flag(  # None means the default families
        None, "families or single measures, with commas (`measure --help` lists them)"
    )
    of_measures: MeasureSettings = field(default_factory=MeasureSettings)
    engine: Literal["auto", "kept_graph", "compiled", "differences"] = flag(
        "auto", "how Hessian-vector products are computed; 'auto' goes by a rule"
    )
    dtype: Literal["float32", "float64"] | None = flag(
        None, "of parameters and data (default: as in the checkpoint)"
    )
    doctor: bool = False  # check the risk first

    @property
    def seed(self) -> int:
        """Of samples and measures."""
        return self.of_measures.seed
