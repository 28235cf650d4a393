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

from sharpness.risk.linearised import Apply, Linearise


@dataclass(frozen=True)
class ChunkedSum:
    """A matrix as a weighted sum over chunks."""

    linearise: Linearise
    leaves: Sequence[Tensor]
    batches: Sequence[Any]
    weights: Sequence[float]
    evaluating: Callable[[], AbstractContextManager[None]]  # around every linearisation

    def linearised(self, chunk: int) -> Apply:
        """One chunk's product, with all that does not depend on the direction done."""
        with self.evaluating():
            return self.linearise(self.leaves, self.batches[chunk])

    def of(self, chunks: Sequence[int]) -> ChunkedSum:
        """Some of the terms."""
        batches = [self.batches[i] for i in chunks]
        weights = [self.weights[i] for i in chunks]
        return replace(self, batches=batches, weights=weights)

    def split(self, v: Tensor) -> list[Tensor]:
        """(n,) or (b, n) as pieces in the leaves' shapes and types."""
        pieces = _views(v, self.leaves)
        return [p.to(x.dtype) for p, x in zip(pieces, self.leaves, strict=True)]

    def add(self, total: Tensor, product: Sequence[Tensor], chunk: int) -> None:
        """Add one chunk's product to a flat vector (n,), or (b, n)."""
        for view, piece in zip(_views(total, self.leaves), product, strict=True):
            view.add_(piece, alpha=self.weights[chunk])


class KeptGraph:
    """v -> M v, (n,) or (b, n); the first `num_kept` chunks keep their graph."""

    def __init__(self, work: ChunkedSum, num_kept: int) -> None:
        self._work = work
        self._num_kept = num_kept
        self._kept: dict[int, Apply] = {}

    def __call__(self, v: Tensor) -> Tensor:
        """M v, one row at a time or all rows of a block at once."""
        pieces, total = self._work.split(v), torch.zeros_like(v)
        for i in range(len(self._work.batches)):
            self._work.add(total, self._product(i, pieces, v.ndim), i)
        return total

    def _product(self, i: int, pieces: Sequence[Tensor], ndim: int) -> Sequence[Tensor]:
        # A function of its own: a graph that is not kept is gone before the next is built.
        apply = self._linearised(i)
        return apply(pieces) if ndim == 1 else torch.vmap(apply)(pieces)

    def _linearised(self, i: int) -> Apply:
        if i in self._kept:
            return self._kept[i]
        apply = self._work.linearised(i)
        if i < self._num_kept:
            self._kept[i] = apply
        return apply


def _views(v: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    parts = v.split([leaf.numel() for leaf in leaves], dim=-1)
    shaped = zip(parts, leaves, strict=True)
    return [part.view((*v.shape[:-1], *leaf.shape)) for part, leaf in shaped]
