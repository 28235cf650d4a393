"""A second opinion: PyHessian on the same network and data, beside our numbers."""

from __future__ import annotations

import importlib.util
import time
import warnings

from sharpness.results import Reading
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.model_state import random_generators_kept


def check_possible(batchnorm: str) -> None:
    """Refuse early what PyHessian cannot do.

    Raises:
        ValueError: it is not installed, or BatchNorm is not on running statistics.
    """
    if batchnorm != "running":
        raise ValueError(
            "`--cross-check` must go with --batchnorm running; got "
            f"{batchnorm!r}, which PyHessian cannot do."
        )
    if importlib.util.find_spec("pyhessian") is None:
        raise ValueError(
            "`--cross-check` must have PyHessian installed; got none. "
            "pip install pyhessian."
        )


def pyhessian_readings(
    risk: EmpiricalRisk, *, max_iter: int = 200, seed: int = 0
) -> list[Reading]:
    """lambda_max by PyHessian's power iteration, to a relative change of 1e-4.

    It has no error bound and finds the eigenvalue of largest modulus, whatever its
    sign. It gets all samples as one batch, since it weights chunks by their number.

    Raises:
        ValueError: it fails on this network or data, or the loss is no plain mean.
    """
    began = time.monotonic()
    if getattr(risk.loss, "reduction", None) != "mean":
        raise ValueError(
            "`--cross-check` must have a loss that averages; got "
            f"{type(risk.loss).__name__}, which PyHessian would scale otherwise."
        )
    network = risk.network()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in set(risk.names))
    try:
        with warnings.catch_warnings(), random_generators_kept(seed):
            warnings.simplefilter("ignore")  # it backpropagates with create_graph=True
            from pyhessian import hessian

            on_gpu = risk.device.type == "cuda"
            peer = hessian(network, risk.loss, data=risk.full_batch(), cuda=on_gpu)
            values, _ = peer.eigenvalues(maxIter=max_iter, tol=1e-4, top_n=1)
    except Exception as error:  # it was written for plain classifiers
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"`--cross-check` must run PyHessian; got {type(error).__name__} from it "
            f"({first}). Leave it out for this network."
        ) from None
    return [
        Reading(
            name="lambda_max (PyHessian)",
            value=float(values[0]),
            error=None,
            evidence="power iteration, no bound",
            cost=f"{time.monotonic() - began:.1f} s",
        )
    ]
