r"""The matrices a risk is multiplied with, one chunk at a time.

Each function here linearises at some leaves, on a batch: what does not depend on the
direction happens once, and what it returns, `apply(pieces)`, is one product of the chunk's
matrix.
Every matrix is that of the mean over the chunk; the caller weights the chunks.

With z the outputs, J = dz/dtheta, l the loss and c its terms (samples; unmasked targets
of a cross-entropy), a_c their weights in the mean and g_c the gradient of one case:

    hessian              d^2 f / dtheta^2
    gauss_newton         J^T (d^2 l / dz^2) J                      (Schraudolph 2002)
    empirical_fisher     sum_c a_c g_c g_c^T                       targets as given
    sampled_fisher       sum_c a_c g_c g_c^T                       targets ~ the model
    gradient_covariance  sum_c a_c (g_c - g)(g_c - g)^T
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sharpness._arguments import ensure
from sharpness._results import ensure_available
from sharpness.risk.fisher_terms import FisherTerms, loss_of_scores
from sharpness.risk.memory import graph_nodes
from sharpness.risk.objective import Objective, gradients

Matrix = Literal[
    "hessian",
    "gauss_newton",
    "empirical_fisher",
    "sampled_fisher",
    "gradient_covariance",
]
Matvec = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Linearise = Callable[[Sequence[Tensor], Any], Matvec]
Mean = Callable[[Tensor, Any], Tensor]  # the value of a batch -> its mean


def hessian(
    objective: Objective, mean: Mean, leaves: Sequence[Tensor], batch: Any
) -> Matvec:
    """Reverse mode twice: the gradient with a graph, and one pass back through it."""
    with torch.enable_grad():
        value = mean(objective.reduced(leaves, batch), batch)
        slopes = gradients(value, leaves, create_graph=True)
    _check_differentiable(slopes, value)
    return Pullback(slopes, leaves)


def gauss_newton(
    objective: Objective, mean: Mean, leaves: Sequence[Tensor], batch: Any
) -> Matvec:
    """J v by reverse mode twice, the loss' curvature in its outputs, then J^T.

    Forward mode would do for J v, but many kernels lack it.
    """
    pushforward, outputs = _pushforward(objective, leaves, batch)
    with torch.enable_grad():
        at = outputs.detach().requires_grad_()
        loss = loss_of_scores(objective.loss, at)
        value = mean(objective.loss_of(leaves, batch, at, loss), batch)
        slope = gradients(value, [at], create_graph=True)
    ensure_available(
        any(part.requires_grad for part in slope),
        "loss",
        "curve in the model's outputs for the Gauss-Newton matrix",
        "one that is linear in them",
        "Move the model's last function into the loss.",
    )
    curvature, pullback = Pullback(slope, [at]), Pullback([outputs], leaves)
    return lambda pieces: pullback(curvature(pushforward(pieces)))


def fisher(
    objective: Objective,
    mean: Mean,
    terms: FisherTerms,
    leaves: Sequence[Tensor],
    batch: Any,
) -> Matvec:
    """Outer products of the terms' gradients: J^T S S^T J, S_c = dl_c/dz.

    The loss is that of the terms: sampled targets may have another than given ones.
    """
    pushforward, outputs = _pushforward(objective, leaves, batch)
    with torch.enable_grad():
        at = outputs.detach().requires_grad_()
        value = mean(objective.loss_of(leaves, batch, at, terms.loss), batch)
        (slope,) = gradients(value, [at])  # a_c dl_c/dz
    weight, dims = terms.weights(at.detach(), batch[1]), terms.dims(outputs)
    scaled = torch.where(weight > 0, slope / weight, torch.zeros_like(slope))
    pullback = Pullback([outputs], leaves)

    def apply(pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        along = slope * pushforward(pieces)[0]
        return pullback([scaled * (along.sum(dims, keepdim=True) if dims else along)])

    return apply


def _pushforward(
    objective: Objective, leaves: Sequence[Tensor], batch: Any
) -> tuple[Matvec, Tensor]:
    """The map v -> [J v], and the outputs with their graph.

    u -> J^T u is linear; its own pullback is v -> J v.
    """
    with torch.enable_grad():
        outputs = objective.outputs(leaves, batch)
        ensure(
            isinstance(outputs, Tensor),
            "model",
            "return one tensor for this matrix",
            type(outputs).__name__,
            "Wrap it, or use matrix='hessian'.",
            TypeError,
        )
        u = torch.zeros_like(outputs, requires_grad=True)
        if outputs.requires_grad:
            slopes = gradients(outputs, leaves, grad_outputs=u, create_graph=True)
        else:
            slopes = [torch.zeros_like(leaf) for leaf in leaves]
    _check_differentiable(slopes, outputs)
    return Pullback(slopes, [u]), outputs


class Pullback:
    """The map pieces -> (d values / d leaves)^T pieces.

    Values without a graph (a parameter that is unused or enters linearly) add nothing.
    """

    def __init__(self, values: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        self.values, self._leaves = values, leaves
        edges = (get_gradient_edge(v) if v.requires_grad else None for v in values)
        types = (value.dtype for value in values)
        self._edges = list(zip(edges, types, strict=True))

    def __call__(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """From a piece for each value to one for each leaf."""
        edges, along = self._curved(pieces)
        if not edges:
            return [torch.zeros_like(leaf) for leaf in self._leaves]
        return torch.autograd.grad(
            edges,
            self._leaves,
            along,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    def add_to(self, totals: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        """Add what a call gives to `totals`, in the leaves' shapes and types, in place.

        Each part is added as soon as it is there: all together are a vector of their own.
        """
        edges, along = self._curved(pieces)
        if not edges:
            return
        for leaf, total in zip(self._leaves, totals, strict=True):
            leaf.grad = total
        try:
            torch.autograd.backward(edges, along, retain_graph=True, inputs=self._leaves)
        finally:
            for leaf in self._leaves:
                leaf.grad = None

    def _curved(self, pieces: Sequence[Tensor]) -> tuple[list[GradientEdge], list[Tensor]]:
        """Those of the values that have a graph, and the pieces for them."""
        known = [
            (edge, piece.to(dtype))
            for (edge, dtype), piece in zip(self._edges, pieces, strict=True)
            if edge is not None
        ]
        return [edge for edge, _ in known], [piece for _, piece in known]

    def forget_values(self) -> None:
        """Hold the graph only: the values are as large as the leaves."""
        self.values = []

    def within(self, block: Sequence[int]) -> Pullback:
        """From some of the values to the same of the leaves: a diagonal block.

        Autograd walks only the part of the graph that connects them.
        """
        part = Pullback([], [self._leaves[i] for i in block])
        part._edges = [self._edges[i] for i in block]
        return part


def _check_differentiable(slopes: Sequence[Tensor], value: Tensor) -> None:
    """Refuse a graph whose second derivative would be wrong without a word.

    A once-differentiable function cuts it: autograd puts an error node there, which
    `torch.autograd.grad` never visits, since no parameter lies behind it. And PyTorch's
    fused weight normalisation forgets that the norm depends on the weight (2.13).
    """
    if any("WeightNormInterface" in node.name() for node in graph_nodes([value])):
        raise NotImplementedError("PyTorch's weight_norm, whose second derivative is wrong")
    if any(node.name() == "torch::autograd::Error" for node in graph_nodes(slopes)):
        custom = {
            type(node).__name__.removesuffix("Backward")
            for node in graph_nodes([value])
            if isinstance(node, torch.autograd.function.BackwardCFunction)
        }
        raise NotImplementedError(
            f"a function that is marked once_differentiable ({', '.join(sorted(custom))})"
        )
