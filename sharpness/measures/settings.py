"""What can be asked of a measurement, as plain values: readable without PyTorch.

A field's help text is that of the flag which a command has for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from sharpness._arguments import (
    Checked,
    positive,
    positive_list,
    require,
    setting,
    whole,
)

_COUNT = partial(whole, least=1)


@dataclass(frozen=True, kw_only=True)
class MeasureSettings(Checked):
    """What the measures of a summary share. See `summary`."""

    k: int = setting(1, "eigenvalues wanted")
    tol: float = setting(
        1e-2, "their relative error", partial(positive, advice="The default is 1e-2.")
    )
    basis_dtype: Literal["float32", "bfloat16"] | None = setting(
        None,
        "type that Lanczos vectors are held in: bfloat16 takes half the memory and leaves "
        "residuals of about 1e-3 (default: as the products)",
    )
    epsilon: tuple[float, ...] = setting(
        (1e-3, 5e-4),
        "box sizes of phi, with commas",
        partial(positive_list, advice="The paper used 1e-3 and 5e-4."),
    )
    subspace_dim: int | None = setting(
        None, "columns of A for the measure phi_subspace (default: 100)", _COUNT
    )
    num_starts: int = setting(1, "starts of phi", _COUNT)
    rho: tuple[float, ...] | None = setting(
        None,
        "radii of all perturbation measures, with commas (default: each its own)",
        partial(positive_list, advice="SAM's default is 0.05."),
    )
    shard_size: int | None = setting(
        None, "samples of a shard in m-sharpness (default: 128)", _COUNT
    )
    batch_size: int | None = setting(
        None, "samples of a mini-batch in batch_sharpness (default: 32)", _COUNT
    )
    accuracy_drop: float = setting(0.1, "that sigma and alpha are measured by")
    seed: int = setting(0, "of samples and draws")
    max_seconds: float | None = setting(None, "time limit of each measure")

    def __post_init__(self) -> None:
        """Refuse a value before any work is done."""
        super().__post_init__()
        drop, seconds = self.accuracy_drop, self.max_seconds
        require(0 < drop < 1, "accuracy_drop", "lie in (0, 1)", drop, "0.1 is usual.")
        require(seconds is None or seconds >= 0, "max_seconds", "be at least 0", seconds)
        require(whole("seed", self.seed, 0) < 1 << 62, "seed", "be below 2^62", self.seed)


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings:
    """What is measured of a checkpoint, on which samples, and how."""

    num_samples: int | None = 1000  # class-balanced, by the seed; None means all
    split: Literal["train", "test"] = setting("train", "part of the data")
    batchnorm: Literal["running", "batch", "recalibrated"] = setting(
        "running",
        "'running' statistics (evaluation mode), 'batch' statistics as in Keskar et al., "
        "or running ones 'recalibrated' at the point measured",
    )
    measures: tuple[str, ...] | None = setting(  # None means the default families
        None, "families or single measures, with commas (`measure --help` lists them)"
    )
    of_measures: MeasureSettings = field(default_factory=MeasureSettings)
    engine: Literal["auto", "kept_graph", "compiled", "differences"] = setting(
        "auto", "how Hessian-vector products are computed; 'auto' goes by a rule"
    )
    params: tuple[str, ...] | None = setting(
        None,
        "names or globs of the parameters that are measured, with commas, such as "
        "'*lora_*' (default: all)",
    )
    dtype: Literal["float32", "float64"] | None = setting(
        None, "of parameters and data (default: as in the checkpoint)"
    )
    doctor: bool = False  # check the risk first

    @property
    def seed(self) -> int:
        """Of samples and measures."""
        return self.of_measures.seed
