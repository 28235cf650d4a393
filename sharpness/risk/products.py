"""How a Hessian-vector product is carried out.

The engine here keeps the graph of the gradient. For each chunk of the data the gradient
is computed once with a graph of its own; a product H v is then one backward pass through
that graph (six matrix products a layer where the gradient takes three, and no forward
pass). Chunks whose graph does not fit the memory budget are rebuilt at each product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharpness import _tensors


class KeptGraph:
    """Products v -> H v through kept double-backward graphs.

    Args:
        gradient: for chunk i, the gradient with a graph: one tensor a leaf.
        leaves: the parameters the gradient was taken in.
        num_chunks: chunks the mean is cut into.
        num_kept: how many of them, from the first, keep their graph.
    """

    def __init__(
        self,
        gradient: Callable[[int], Sequence[Tensor]],
        leaves: Sequence[Tensor],
        num_chunks: int,
        num_kept: int,
    ) -> None:
        self._gradient = gradient
        self._leaves = leaves
        self._num_chunks = num_chunks
        self.num_kept = min(num_kept, num_chunks)
        self._kept: dict[int, list[tuple[int, Tensor]]] = {}

    def __call__(self, v: Tensor) -> Tensor:
        """H v for one flat direction (n,)."""
        pieces = _tensors.split(v, [leaf.shape for leaf in self._leaves])
        pieces = [p.to(x.dtype) for p, x in zip(pieces, self._leaves, strict=True)]
        total = torch.zeros_like(v)
        for i in range(self._num_chunks):
            total += self._chunk_product(i, pieces)
        return total

    def _chunk_product(self, i: int, pieces: Sequence[Tensor]) -> Tensor:
        keep = i < self.num_kept
        graph = self._kept.get(i) or self._graph(i)
        if keep:
            self._kept[i] = graph
        if not graph:  # the gradient of this chunk is constant
            return pieces[0].new_zeros(())
        with torch.enable_grad():
            product = torch.autograd.grad(
                [g for _, g in graph],
                self._leaves,
                [pieces[j] for j, _ in graph],
                retain_graph=keep,
                allow_unused=True,
                materialize_grads=True,
            )
        return _tensors.flatten(product)

    def _graph(self, i: int) -> list[tuple[int, Tensor]]:
        """(leaf number, gradient) where the gradient itself depends on theta.

        A parameter that is unused, or enters the loss linearly, has a gradient without a
        graph: its row of the Hessian is zero.
        """
        return [(j, g) for j, g in enumerate(self._gradient(i)) if g.requires_grad]
