"""Products through kept double-backward graphs.

For each chunk the gradient is computed once with a graph of its own; a product is then
one backward pass through that graph (six matrix products a layer where the gradient
takes three, and no forward pass). Chunks beyond the budget are linearised each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sharpness import _tensors
from sharpness.risk.curvature import Linearise, Matvec, Pullback


@dataclass(frozen=True)
class ChunkedSum:
    """A matrix as a weighted sum over chunks."""

    linearise: Linearise
    leaves: Sequence[Tensor]
    batches: Sequence[Any]
    weights: Sequence[float]
    evaluating: Callable[[], AbstractContextManager[None]]  # around every linearisation

    def linearised(self, chunk: int) -> Matvec:
        """One chunk's product, with all that does not depend on the direction done."""
        with self.evaluating():
            return self.linearise(self.leaves, self.batches[chunk])

    def of(self, chunks: Sequence[int]) -> ChunkedSum:
        """Some of the terms."""
        batches = [self.batches[i] for i in chunks]
        weights = [self.weights[i] for i in chunks]
        return replace(self, batches=batches, weights=weights)

    def among(self, block: Sequence[int]) -> ChunkedSum:
        """The same sum over some of the leaves: for vectors of one diagonal block."""
        return replace(self, leaves=[self.leaves[i] for i in block])

    def places(self, block: Sequence[int]) -> Tensor:
        """Where the entries of a block stand in a flat vector (n,)."""
        sizes = [leaf.numel() for leaf in self.leaves]
        all_places = torch.arange(sum(sizes), device=self.leaves[0].device).split(sizes)
        return torch.cat([all_places[i] for i in block])

    def split(self, v: Tensor) -> list[Tensor]:
        """(n,) or (b, n) as pieces in the leaves' shapes and types."""
        pieces = map(_tensors.aligned, _views(v, self.leaves))
        return [p.to(x.dtype) for p, x in zip(pieces, self.leaves, strict=True)]

    def adds_up(self, total: Tensor, chunk: int) -> bool:
        """Whether a chunk's product is a summand as it is: neither weighed nor cast."""
        plain = all(type(x) is Tensor and x.dtype == total.dtype for x in self.leaves)
        return plain and self.weights[chunk] == 1.0

    def add(self, total: Tensor, product: Sequence[Tensor], chunk: int) -> None:
        """Add one chunk's product to a flat vector (n,), or (b, n)."""
        for view, piece in zip(_views(total, self.leaves), product, strict=True):
            view.add_(piece.detach(), alpha=self.weights[chunk])


Block = Sequence[int]  # positions of its parameters among the leaves


class KeptGraph:
    """v -> M v, (n,) or (b, n); the first `num_kept` chunks keep their graph."""

    def __init__(self, work: ChunkedSum, num_kept: int) -> None:
        self._work = work
        self._num_kept = num_kept
        self._kept: dict[int, Matvec] = {}

    def __call__(self, v: Tensor) -> Tensor:
        """M v, one row at a time or all rows of a block at once."""
        pieces, total = self._work.split(v), torch.zeros_like(v)
        for i in range(len(self._work.batches)):
            self._add_product(total, pieces, i)
        return total

    def of_blocks(self, blocks: Sequence[Block], vectors: Sequence[Tensor]) -> list[Tensor]:
        """M_bb v_b for each diagonal block, in one sweep over the chunks."""
        parts = [self._work.among(block) for block in blocks]
        pieces = [part.split(v) for part, v in zip(parts, vectors, strict=True)]
        totals = [torch.zeros_like(v) for v in vectors]
        for i in range(len(self._work.batches)):
            apply = self._linearised(i)
            for block, part, piece, total in zip(
                blocks, parts, pieces, totals, strict=True
            ):
                part.add(total, self._within(apply, block, piece), i)
            del apply
        return totals

    def _within(
        self, apply: Matvec, block: Block, pieces: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        if isinstance(apply, Pullback):
            return apply.within(block)(pieces)
        padded = [torch.zeros_like(leaf) for leaf in self._work.leaves]
        for i, piece in zip(block, pieces, strict=True):
            padded[i] = piece
        product = apply(padded)
        return [product[i] for i in block]

    def _add_product(self, total: Tensor, pieces: Sequence[Tensor], i: int) -> None:
        # A function of its own: a graph that is not kept is gone before the next is built.
        apply = self._linearised(i)
        if total.ndim == 1 and isinstance(apply, Pullback) and self._work.adds_up(total, i):
            apply.add_to(_views(total, self._work.leaves), pieces)
        else:
            along = apply(pieces) if total.ndim == 1 else torch.vmap(apply)(pieces)
            self._work.add(total, along, i)

    def _linearised(self, i: int) -> Matvec:
        if i in self._kept:
            return self._kept[i]
        apply = self._work.linearised(i)
        if isinstance(apply, Pullback):
            apply.forget_values()
        if i < self._num_kept:
            self._kept[i] = apply
        return apply


def _views(v: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    parts = v.split([leaf.numel() for leaf in leaves], dim=-1)
    shaped = zip(parts, leaves, strict=True)
    return [part.view((*v.shape[:-1], *leaf.shape)) for part, leaf in shaped]
