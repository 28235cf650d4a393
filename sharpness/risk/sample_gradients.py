"""Gradients of single samples, a block at a time: by vmap, or one after another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sharpness import _tensors
from sharpness._results import ensure_available
from sharpness.risk import batches
from sharpness.risk.loss_terms import is_class_loss, keyword
from sharpness.risk.mean_loss import MeanLoss, exact_arithmetic
from sharpness.risk.objective import gradients

Unit = Literal["sample", "term"]
# Of one block, beside which vmap holds about two more: small enough for any machine, and
# large enough that a small network's samples go in one.
_BLOCK_BYTES = 1 << 26
_UNCUT = 32  # rows at once where nothing was learnt about the memory of a chunk


class SampleGradients:
    """Iterable over blocks (b, n) of the gradients g_i, whose mean is that of f.

    Args:
        f: the mean over the samples that are asked for, in their order.
        unit: what has a gradient of its own: a sample, or one of its class numbers.
    """

    def __init__(self, f: MeanLoss, unit: Unit) -> None:
        self._f, self._objective, self._mean = f, f.objective, f.mean
        objective, mean = f.objective, f.mean
        self._at_once = True  # until vmap is seen to fail
        self._unit, self._num = unit, mean.num_samples
        self._ignored = int(keyword(objective.loss, "ignore_index", -100))
        if unit == "term":
            targets = [chunk.batch[1] for chunk in mean.all]
            numbers = not any(y.is_floating_point() for y in targets)
            ensure_available(
                is_class_loss(objective.loss) and numbers,
                "unit",
                "be 'sample' for a loss that does not compare with class numbers",
                f"'term' (not available for {_name(objective.loss)})",
            )
            self._num = sum(int((y != self._ignored).sum()) for y in targets)

    def __len__(self) -> int:
        return self._num

    @property
    def how(self) -> str:
        """How the gradients were taken, in words."""
        return f"per-{self._unit} gradients" + ("" if self._at_once else ", one at a time")

    @property
    def block_size(self) -> int:
        """The most samples in a block."""
        rows = max(1, _BLOCK_BYTES // self._objective.theta.nbytes)
        return min(rows, self._mean.chunk_size or _UNCUT)

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in self._mean.all:
            rows = batches.cut(chunk.batch, 1) if self._unit == "term" else [chunk.batch]
            for batch in map(self._units, rows):
                if len(batch[1]):
                    yield from map(self._of, batches.cut(batch, self.block_size))

    def _units(self, batch: Any) -> Any:
        """A batch as it is, or a copy of a row for each of its terms, with that alone."""
        if self._unit == "sample":
            return batch
        inputs, targets = batch
        places = (targets.flatten() != self._ignored).nonzero()[:, 0]
        alone = torch.full_like(targets, self._ignored).flatten().repeat(len(places), 1)
        alone.scatter_(1, places[:, None], targets.flatten()[places][:, None])
        repeated = tree_map(lambda part: part.repeat_interleave(len(places), 0), inputs)
        return repeated, alone.view(-1, *targets.shape[1:])

    @torch.inference_mode(False)
    def _of(self, batch: Any) -> Tensor:
        theta, num = self._objective.theta, len(batch[1])
        rows = [batches.rows(batch, i, i + 1) for i in range(num)]
        scales = [self._num * self._mean.weight_of(row) for row in rows]
        some = [i for i, scale in enumerate(scales) if scale]  # others may be 0 / 0
        exact = exact_arithmetic(theta.device, self._f.tf32)
        with exact, self._f.evaluating(), torch.enable_grad():
            if self._at_once and len(some) > 1:
                places = torch.tensor(some, device=theta.device)
                weights = torch.tensor(scales, dtype=theta.dtype, device=theta.device)[
                    places
                ]
                slopes = self._vmapped(batches.taken(batch, places), weights)
                if slopes is not None:
                    parts = [s.flatten(1).to(theta.dtype) for s in slopes]
                    together = torch.cat(parts, 1)
                    if len(some) == num:
                        return together
                    return theta.new_zeros(num, len(theta)).index_copy_(0, places, together)
            found = theta.new_zeros(num, len(theta))
            for i in some:
                leaves = self._objective.leaves(theta)
                slopes = gradients(self._share(leaves, rows[i], scales[i]), leaves)
                found[i] = _tensors.flatten(s.to(theta.dtype) for s in slopes)
        return found

    def _share(self, leaves: Sequence[Tensor], row: Any, scale: float | Tensor) -> Tensor:
        return self._mean.mean(self._objective.reduced(leaves, row), row) * scale

    def _vmapped(self, batch: Any, scales: Tensor) -> Sequence[Tensor] | None:
        """All at once; None where a layer or the loss has no rule, or room, for that."""

        def share(leaves: tuple[Tensor, ...], row: Any, scale: Tensor) -> Tensor:
            row = tree_map(lambda part: part.unsqueeze(0), row)
            return self._share(leaves, row, scale)

        leaves = tuple(self._objective.pieces(self._objective.theta))
        each = torch.func.vmap(torch.func.grad(share), in_dims=(None, 0, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # vmap warns of loops, and ours is faster
            try:
                slopes: Sequence[Tensor] = each(leaves, tuple(batch), scales)
                return slopes
            except Exception:  # in many ways; a true error shows again sample by sample
                self._at_once = False
                return None


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
