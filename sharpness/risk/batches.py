"""The data of a risk: fixed once, on one device, and cut into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from sharpness.risk.model_state import random_generators_kept

Batch = Any  # (inputs, targets), or whatever a closure takes
Pair = tuple[Any, Tensor]  # inputs: a tensor, or several in a tuple, list or dict


def materialised(
    data: Any, device: torch.device, *, pairs: bool, seed: int = 0
) -> list[Batch]:
    """`data` as a list of batches on `device`: one (x, y), a list of them, a loader.

    A loader is run through once, so shuffling, augmentation or a one-shot generator
    cannot change the risk from one evaluation to the next. `seed` is that of its draws.
    """
    if pairs and is_pair(data):
        data = [data]
    if not pairs and isinstance(data, tuple) and is_pair(data):
        raise TypeError(
            "`data` must be a list of batches for a `closure`; got a pair of tensors, "
            "which would be two batches. Wrap it in a list: `data=[(inputs, targets)]`."
        )
    if not isinstance(data, Iterable) or isinstance(data, Mapping | str):
        raise TypeError(
            "`data` must be a pair (inputs, targets), a list of batches or a DataLoader;"
            f" got {type(data).__name__}. Wrap a single batch in a list."
        )
    with (
        random_generators_kept(seed),
        _own_generators_kept(data),
    ):  # a loader draws a seed as it starts
        batches = [_moved(batch, device) for batch in data]
    if pairs:
        checked = [_checked_pair(batch) for batch in batches]
        batches = [pair for pair in checked if len(pair[1])]
    if not batches:
        raise ValueError(
            "`data` must hold at least one sample; got none. Pass (inputs, targets), "
            "or a loader that has not been used up."
        )
    return batches


@contextmanager
def _own_generators_kept(data: Any) -> Iterator[None]:
    """A loader and its sampler may have generators of their own."""
    holders = (data, getattr(data, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def cut(pair: Pair, most: int) -> list[Pair]:
    """A pair in ceil(N / most) parts whose sizes differ by at most one.

    So a part of one row is there only where `most` is 1, or 2 and N odd.
    """
    total = len(pair[1])
    parts = -(-total // most)
    sizes = [total // parts + (i < total % parts) for i in range(parts)]
    return [rows(pair, a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def rows(pair: Pair, start: int, stop: int) -> Pair:
    """Samples `start` to `stop`; views."""
    cut: Pair = tree_map(lambda part: part[start:stop], pair)
    return cut


def taken(pair: Pair, index: Tensor) -> Pair:
    """Samples at these positions; copies."""
    some: Pair = tree_map(lambda part: part[index], pair)
    return some


def joined(pairs: Sequence[Pair]) -> list[Pair]:
    """One pair where the shapes allow it (all but sequences of uneven length)."""
    pairs = [pair for pair in pairs if len(pair[1])]
    kinds = {row_kind(pair) for pair in pairs}
    if len(kinds) != 1 or len(pairs) == 1:
        return list(pairs)
    return [tree_map(lambda *parts: torch.cat(parts), *pairs)]


def is_pair(data: Any) -> bool:
    """(inputs, targets); several inputs are a tuple, a list or a dict of tensors."""
    if not (isinstance(data, tuple | list) and len(data) == 2):
        return False
    inputs, targets = data
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    parts = inputs if isinstance(inputs, tuple | list) else [inputs]
    return bool(parts) and all(hasattr(part, "shape") for part in (*parts, targets))


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


def _checked_pair(batch: Batch) -> Pair:
    if not is_pair(batch):
        raise TypeError(
            "`data` must give pairs (inputs, targets) of tensors; got a batch of type "
            f"{type(batch).__name__}. Pass `closure=` for any other kind of batch."
        )
    inputs, targets = batch
    for part in tree_leaves(inputs):
        if len(part) != len(targets):
            raise ValueError(
                "`data` must have as many targets as inputs; got "
                f"{len(part)} inputs and {len(targets)} targets. Pass `closure=` for "
                "batches whose first dimension is not that of samples."
            )
    return inputs, targets


def row_kind(pair: Pair) -> tuple[Any, ...]:
    """Structure, shapes and types of a row: pairs of one kind can be joined."""
    parts, structure = tree_flatten(pair)
    return (str(structure), *((part.shape[1:], part.dtype) for part in parts))
