"""How curved is a mini-batch's loss along its own gradient, the way that training goes?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sharpness import _tensors
from sharpness._arguments import of_a_risk, whole, whole_seed
from sharpness._results import Cost, Reading, Result, Status, ensure_available
from sharpness._run import Run
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.statistics import mean_and_error


@dataclass(frozen=True, kw_only=True)
class BatchSharpness(Result):
    """The mean of g^T H g / |g|^2 over mini-batches, each with its own g and H."""

    value: float
    standard_error: float  # over the batches
    ratio_of_means: float  # E[g^T H g] / E[|g|^2], a second form in use
    batch_size: float  # mean over the batches
    num_batches: int  # completed

    def _rows(self) -> Iterable[Reading]:
        yield Reading(
            name="batch_sharpness",
            value=self.value,
            error=self.standard_error,
            evidence=f"standard error over {self.num_batches} batches of "
            f"{self.batch_size:g}",
        )


@of_a_risk
def batch_sharpness(
    risk: EmpiricalRisk,
    batch_size: int | None = None,
    num_batches: int = 200,
    seed: int = 0,
    *,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> BatchSharpness:
    r"""Curvature that a step of mini-batch SGD meets on the batch that it is made from.

    $$E_{batch}\left[\frac{g^T H g}{|g|^2}\right]$$

    with gradient g and Hessian H of one mini-batch's loss. Where full-batch gradient
    descent drives lambda_max to 2 / eta, SGD with small batches drives this there, while
    lambda_max stays lower: 2 / lambda_max is the wrong limit of the rate. With heavy-ball
    momentum b the limit is 2 (1 - b) / eta for small batches and 2 (1 + b) / eta for
    large ones. It is an observed regularity, not a theorem. At a point where training
    is not at its edge the value says how far the rate could rise.

    Args:
        risk: the mean loss f, held at the parameters theta.
        batch_size: samples of a mini-batch, drawn without replacement; None means the
            batches that the risk is evaluated in (those of a closure, or BatchNorm's).
        num_batches: independent draws, >= 2; of the risk's own batches the first so many.
        seed: of the draws.
        max_seconds: stop after the batch that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `BatchSharpness`; after an interrupt (Ctrl-C) or `max_seconds` of the batches that
        are done, NaN below two. Batches whose gradient is zero have no direction and do
        not count; status `zero_gradient` where fewer than two are left.

    Raises:
        TypeError: `batch_size` for a risk that cannot be cut (a closure, a loss or layers
            that couple samples, BatchNorm that depends on the data), or fewer than two
            batches.
        ValueError: an argument out of range.

    Cost: a gradient and a Hessian-vector product of each batch.

    References:
        Andreyev and Beneventano (2024), arXiv:2412.20553; with momentum
        arXiv:2604.14108.
    """
    if batch_size is not None:
        batch_size = whole("batch_size", batch_size, 1)
    num_batches, seed = whole("num_batches", num_batches, 2), whole_seed(seed)
    run = Run(
        "batches",
        max_seconds=max_seconds,
        total=num_batches,
        progress=progress,
        ranks=risk.ranks,
    )
    seen: list[tuple[float, float, int]] = []  # curvature, square, size
    with run:
        for batch in _batches(risk, batch_size, num_batches, seed):
            run.step()
            if not seen:
                batch.gradient()  # refuses layers that are computed again
            slope, product = batch.gradient_and_product()
            curvature, square = (_tensors.dot64(slope, v) for v in (product, slope))
            seen.append((float(curvature), float(square), batch.num_samples))
    curved, squares, sizes = np.array(seen, float).reshape(-1, 3).T
    some = squares != 0  # NaN counts, and shows
    ratios = curved[some] / squares[some]
    enough = len(ratios) > 1
    finite = bool(np.isfinite(curved).all() and np.isfinite(squares).all())
    status = Status.worst(run.status, finite=finite)
    if status.ok and not enough:
        status = Status.ZERO_GRADIENT
    value, error = mean_and_error(ratios if enough else [])
    return BatchSharpness(
        value=value,
        standard_error=error,
        ratio_of_means=float(curved.sum() / squares.sum()) if enough else math.nan,
        batch_size=float(sizes.mean()) if seen else math.nan,
        num_batches=len(ratios),
        status=status,
        cost=Cost(
            products=float(sizes.sum()) / risk.num_samples,
            gradients=float(sizes.sum()) / risk.num_samples,
            seconds=run.seconds,
        ),
        settings={"batch_size": batch_size, "num_batches": num_batches, "seed": seed},
    )


def _batches(
    risk: EmpiricalRisk, batch_size: int | None, num: int, seed: int
) -> Iterator[EmpiricalRisk]:
    if batch_size is None:
        parts = risk.parts()[:num]
        ensure_available(
            len(parts) >= 2,
            "risk",
            "have at least 2 batches",
            f"{len(parts)} (not available)",
            "Pass `batch_size`, or smaller batches.",
        )
        yield from parts
        return
    ensure_available(
        risk.can_be_cut and batch_size <= risk.num_samples,
        "risk",
        f"have samples that can be drawn for batch_size={batch_size}",
        f"{risk.num_samples} (not available with a closure, or where BatchNorm or the loss "
        "depends on the batch)",
        "Pass None for the batches as given.",
    )
    generator = _tensors.seeded(seed)
    for _ in range(num):
        order = torch.randperm(risk.num_samples, generator=generator)
        yield risk.subset(order[:batch_size])
