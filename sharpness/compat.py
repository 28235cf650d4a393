"""PyHessian's interface on this engine: change one import and run the script again.

    from sharpness.compat import hessian          # was: from pyhessian import hessian

The same calls give the same shapes. What differs is said in each docstring: values stop
at an error bound instead of a small change, the trace stops on its standard error, the
density runs on today's PyTorch, ragged batches count as they should, and the model
comes back in the mode it was in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharpness import _tensors
from sharpness._arguments import whole
from sharpness._results import Status
from sharpness.krylov.quadrature import Rule
from sharpness.krylov.stochastic_trace import Hutchinson
from sharpness.measures.eigenvalues import eigenpairs
from sharpness.measures.spectrum import spectral_density
from sharpness.risk.empirical import EmpiricalRisk


class hessian:
    """The Hessian of a loss, called as PyHessian's class of that name.

    Args:
        model: the network; measured in evaluation mode and left as it was.
        criterion: the loss.
        data: one batch (inputs, targets), or
        dataloader: batches of them.
        cuda: compute on the GPU; refused where there is none.
        seed: of the random vectors; PyHessian takes the global generator instead.

    Raises:
        ValueError: both or neither of `data` and `dataloader`; `cuda` without a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        data: Any = None,
        dataloader: Iterable[Any] | None = None,
        cuda: bool = True,
        seed: int = 0,
    ) -> None:
        if (data is None) == (dataloader is None):
            both = "neither" if data is None else "both"
            raise ValueError(f"`data` or `dataloader` must be given; got {both}.")
        if cuda and not torch.cuda.is_available():
            raise ValueError("`cuda` must be False without a GPU; got True.")
        self.risk = EmpiricalRisk(
            model,
            criterion,
            data if dataloader is None else dataloader,
            device="cuda" if cuda else "cpu",
        )
        self._seed = seed

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """The `top_n` eigenvalues of largest modulus, and eigenvectors by parameter.

        Lanczos instead of power iteration, stopped when each value's error bound is
        `tol` of it; at most `maxIter` products a value.
        """
        if whole("top_n", top_n, 1) > self.risk.n:
            raise ValueError(f"`top_n` must be at most n={self.risk.n}; got {top_n}.")
        found = eigenpairs(
            self.risk,
            top_n,
            which="LM",
            tol=tol,
            seed=self._seed,
            max_hvps=max(2, maxIter) * top_n,
            progress=False,
        )
        _check_ended(found.status)
        order = found.eigenvalues.abs().argsort(descending=True)
        vectors = [_tensors.split(v, self.risk.shapes) for v in found.eigenvectors[order]]
        return found.eigenvalues[order].tolist(), vectors

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Samples v^T H v over random signs; their mean estimates the trace.

        Stops where the standard error of the mean is `tol` of it, looked at after 10,
        20, 40, ... samples, or at `maxIter`.
        """
        whole("maxIter", maxIter, 1)
        signs = Hutchinson(self.risk.theta, self._seed)
        num = min(10, maxIter)
        while True:
            signs.grow(self.risk.hvp, num)
            samples = np.asarray(signs.estimates)
            error = samples.std(ddof=1) / math.sqrt(num) if num > 1 else math.inf
            if num >= maxIter or error <= tol * abs(samples.mean()):
                return [float(sample) for sample in samples]
            num = min(2 * num, maxIter)

    def density(
        self, iter: int = 100, n_v: int = 1
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Nodes and weights of `n_v` stochastic Lanczos quadratures of `iter` steps."""
        whole("n_v", n_v, 1)
        whole("iter", iter, 2)
        found = spectral_density(
            self.risk, num_starts=n_v, num_steps=iter, seed=self._seed, progress=False
        )
        _check_ended(found.status)
        nodes, weights = zip(*(_filled(rule, iter) for rule in found.rules), strict=True)
        return list(nodes), list(weights)


def _filled(rule: Rule, length: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of a rule that ended early, to full length by weights of 0."""
    missing = length - len(rule.nodes)
    nodes = [*rule.nodes.tolist(), *[float(rule.nodes[-1])] * missing]
    return nodes, [*rule.weights.tolist(), *[0.0] * missing]


def _check_ended(status: Status) -> None:
    """PyHessian's shapes have no place for a status: what went wrong is raised."""
    if status is Status.INTERRUPTED:
        raise KeyboardInterrupt
    if status is Status.NON_FINITE:
        raise ValueError(f"`model` must be finite; got NaN or inf. {status.advice}")
