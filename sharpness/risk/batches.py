"""The data of a risk: fixed once, on one device, and cut into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpness.risk.model_state import random_generators_kept

Batch = Any  # (inputs, targets), or whatever a closure takes


def materialised(data: Any, device: torch.device, *, pairs: bool) -> list[Batch]:
    """`data` as a list of batches on `device`: one (x, y), a list of them, a loader.

    A loader is run through once, so shuffling, augmentation or a one-shot generator
    cannot change the risk from one evaluation to the next.
    """
    if pairs and _is_pair(data):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, Mapping | str):
        raise TypeError(
            "`data` must be a pair (inputs, targets), a list of batches or a DataLoader;"
            f" got {type(data).__name__}. Wrap a single batch in a list."
        )
    with random_generators_kept():  # a loader draws a seed as it starts
        batches = [_moved(batch, device) for batch in data]
    if pairs:
        batches = _joined([_checked_pair(batch) for batch in batches])
    if not batches:
        raise ValueError(
            "`data` must hold at least one sample; got none. Pass (inputs, targets), "
            "or a loader that has not been used up."
        )
    return batches


def cut(pair: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    """A pair in chunks of `size` samples, the last one shorter."""
    return list(zip(pair[0].split(size), pair[1].split(size), strict=True))


def cut_evenly(pair: tuple[Tensor, Tensor], most: int) -> list[tuple[Tensor, Tensor]]:
    """A pair in ceil(N / most) parts whose sizes differ by at most one."""
    parts = -(-len(pair[0]) // most)
    return list(zip(pair[0].tensor_split(parts), pair[1].tensor_split(parts), strict=True))


def _is_pair(data: Any) -> bool:
    return (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(hasattr(part, "shape") for part in data)
    )


def _moved(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [_moved(value, device) for value in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*moved)
        return type(batch)(moved)
    if isinstance(batch, Tensor):
        return batch.detach().to(device, copy=True)
    if hasattr(batch, "shape"):
        return torch.tensor(batch, device=device)
    return batch


def _checked_pair(batch: Batch) -> tuple[Tensor, Tensor]:
    if not (_is_pair(batch) and all(isinstance(part, Tensor) for part in batch)):
        raise TypeError(
            "`data` must give pairs (inputs, targets) of tensors; got a batch of type "
            f"{type(batch).__name__}. Pass `closure=` for any other kind of batch."
        )
    inputs, targets = batch
    if len(inputs) != len(targets):
        raise ValueError(
            "`data` must have as many targets as inputs; got "
            f"{len(inputs)} inputs and {len(targets)} targets."
        )
    return inputs, targets


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """One pair where the shapes allow it (all but sequences of uneven length)."""
    pairs = [pair for pair in pairs if len(pair[0])]
    kinds = {(x.shape[1:], x.dtype, y.shape[1:], y.dtype) for x, y in pairs}
    if len(kinds) != 1 or len(pairs) == 1:
        return list(pairs)
    return [(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))]
