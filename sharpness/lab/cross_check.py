"""A second opinion: PyHessian on the same network and data, beside our numbers."""

from __future__ import annotations

import time
import warnings
from typing import Any

from sharpness.results import Reading
from sharpness.risk.empirical import EmpiricalRisk


def pyhessian_readings(risk: EmpiricalRisk, *, max_iter: int = 200) -> list[Reading]:
    """lambda_max by PyHessian's power iteration, to a relative change of 1e-4.

    It knows evaluation mode only, has no error bound, and finds the eigenvalue of
    largest modulus, whatever its sign.

    Raises:
        ValueError: PyHessian is not installed, or BatchNorm is not on running
            statistics.
        TypeError: the risk was built from a closure.
    """
    if risk.settings()["batchnorm"] not in (None, "running"):
        raise ValueError(
            "`--cross-check` must go with --batchnorm running; got "
            f"{risk.batchnorm!r}, which PyHessian cannot do."
        )
    try:
        from pyhessian import hessian
    except ImportError:
        raise ValueError(
            "`--cross-check` must have PyHessian installed; got none. "
            "pip install pyhessian."
        ) from None
    began = time.monotonic()
    with warnings.catch_warnings():  # it backpropagates with create_graph=True
        warnings.simplefilter("ignore")
        peer = hessian(risk.network(), *_loss_and_data(risk))
        values, _ = peer.eigenvalues(maxIter=max_iter, tol=1e-4, top_n=1)
    seconds = time.monotonic() - began
    return [
        Reading(
            name="lambda_max (PyHessian)",
            value=float(values[0]),
            error=None,
            evidence="power iteration, no bound",
            cost=f"{seconds:.1f} s",
        )
    ]


def _loss_and_data(risk: EmpiricalRisk) -> tuple[Any, ...]:
    batches, loss = risk.batches(), risk.loss
    on_gpu = risk.device.type == "cuda"
    if len(batches) == 1:
        return loss, batches[0], None, on_gpu
    return loss, None, batches, on_gpu
