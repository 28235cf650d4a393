"""Tensors, arrays and loaders as batches, fixed once, on one device."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from sharpness import _progress, _tensors
from sharpness._arguments import ensure
from sharpness.risk import memory
from sharpness.risk.loss_terms import num_rows
from sharpness.risk.model_state import random_generators_kept

Batch = Any  # (inputs, targets), or whatever a closure takes
Pair = tuple[Any, Tensor]  # inputs: a tensor, or several in a tuple, list or dict
LABELS = ("labels", "label")  # what batches that are dicts call their targets
_FIRST_TOLD = 64  # batches of data without a known end
_OF_A_TENSOR = 1024  # bytes that a tensor takes beside its numbers, about


def materialised(
    data: Any,
    device: torch.device,
    *,
    pairs: bool,
    seed: int = 0,
    num_samples: int | None = None,
) -> list[Batch]:
    """`data` as a list of batches on `device`: one (x, y), a list of them, a loader.

    A loader is run through once, so shuffling, augmentation or a one-shot generator
    cannot change the risk from one evaluation to the next. `seed` is that of its draws.
    No batch is asked for once there are `num_samples`.
    """
    if pairs:
        if hasattr(data, "shape"):
            raise TypeError(_NO_PAIR.format(f"{kind(data)} alone", _OTHERS))
        lone = isinstance(data, tuple) and hasattr(next(iter(data), None), "shape")
        if lone or is_pair(data):
            data = [data]
    ensure(
        pairs or not hasattr(data, "shape"),
        "data",
        "be a list of batches for a `closure`",
        f"{kind(data)}, whose rows would be batches",
        "Wrap it in a list: `data=[x]`.",
        TypeError,
    )
    ensure(
        pairs or not (isinstance(data, tuple) and is_pair(data)),
        "data",
        "be a list of batches for a `closure`",
        "a pair of tensors, which would be two batches",
        "Wrap it in a list: `data=[(inputs, targets)]`.",
        TypeError,
    )
    ensure(
        isinstance(data, Iterable) and not isinstance(data, Mapping | str),
        "data",
        "be a pair (inputs, targets), a list of batches or a DataLoader",
        type(data).__name__,
        "Wrap a single batch in a list.",
        TypeError,
    )
    with (
        random_generators_kept(seed),
        _own_generators_kept(data),
    ):  # a loader draws a seed as it starts
        batches = list(_read(data, device, pairs, num_samples))
    advice = "Pass (inputs, targets), or a loader that has not been used up."
    ensure(bool(batches), "data", "hold at least one sample", "none", advice)
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
    return cut_into(pair, -(-len(pair[1]) // most))


def cut_into(pair: Pair, parts: int) -> list[Pair]:
    """A pair in so many parts, whose sizes differ by at most one."""
    total = len(pair[1])
    sizes = [total // parts + (i < total % parts) for i in range(parts)]
    return [rows(pair, a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def rows(pair: Pair, start: int, stop: int) -> Pair:
    """Samples `start` to `stop`; views, but for sparse tensors."""

    def some(part: Tensor) -> Tensor:
        if part.layout == torch.strided:
            return part[start:stop]
        places = range(len(part))[start:stop]
        return part.index_select(0, torch.tensor(places, device=part.device))

    cut: Pair = tree_map(some, pair)
    return cut


def taken(pair: Pair, index: Tensor) -> Pair:
    """Samples at these positions; copies."""
    some: Pair = tree_map(lambda part: part.index_select(0, index.to(part.device)), pair)
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


def as_pair(batch: Batch) -> Batch:
    """A dict with `labels` as (the other inputs, labels); anything else as it is."""
    if not isinstance(batch, Mapping):
        return batch
    name = next((n for n in LABELS if n in batch), None)
    if name is None:
        return batch
    return {key: value for key, value in batch.items() if key != name}, batch[name]


def _read(
    data: Iterable[Batch], device: torch.device, pairs: bool, most: int | None
) -> Iterator[Batch]:
    """Batches on `device`, until `most` samples are there; only pairs are cut for it."""
    move, left = partial(_moved, device=device), math.inf if most is None else most
    has_end = most is not None or _has_length(data)
    for given in _within(_begun(data, most) if pairs else data, device, has_end):
        batch = _tensors.mapped(move, given)
        if pairs:
            batch = _checked_pair(as_pair(batch))
            if len(batch[1]) > left:
                batch = taken(batch, torch.arange(int(left)))
        num = len(batch[1]) if pairs else num_rows(batch) if most else 1
        if num:
            yield batch
        left -= num
        if left <= 0:
            return


def _begun(data: Iterable[Batch], most: int | None) -> Iterator[Batch]:
    """Batches with no more rows than are wanted: what is left on disk is not read."""

    def first(part: Any) -> Any:
        return part[:most] if isinstance(part, np.ndarray) and part.ndim else part

    for batch in data:
        yield batch if most is None else _tensors.mapped(first, batch)


def _has_length(data: Iterable[Batch]) -> bool:
    try:
        return len(data) >= 0  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of a stream
        return False


def _within(data: Iterable[Batch], device: torch.device, has_end: bool) -> Iterator[Batch]:
    """The batches, as long as they fit in half of the memory that is free."""
    half, held, told_at = memory.free_bytes(device) / 2, 0, _FIRST_TOLD
    for number, batch in enumerate(_given(data), 1):
        held += sum(_bytes(part) for part in _tensors.leaves(batch))
        if number == told_at and not has_end:
            told_at *= 4
            _progress.say(
                f"{number} batches read, {held / half:.1%} of half the free memory; "
                "the data have no known end, `num_samples=` sets one"
            )
        ensure(
            held <= half,
            "data",
            "fit in half of the free memory",
            f"more than {half / 1e9:.3g} GB",
            "Pass `num_samples=`, or fewer samples.",
        )
        yield batch


_LINES = (  # of PyTorch's errors while samples are read, and of what helps
    (
        "DataLoader worker",
        "give its batches; got {} in a worker process. `num_workers=0` shows where.",
    ),
    (
        "stack expects each tensor to be equal size",
        "have samples of one shape; got {}. Pad them, or pass a loader with `collate_fn`.",
    ),
    (
        "default_collate: batch must contain",
        "have tensors, arrays or numbers as samples; got {}. Transform them to these.",
    ),
)


def _given(data: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; one line for what goes wrong where somebody else's code makes them."""
    try:
        yield from data
    except Exception as error:
        for text, line in _LINES:
            if text in str(error):
                last = str(error).strip().splitlines()[-1].rpartition("; found ")[2]
                last = shorten(last, 100, placeholder=" …")
                raise ValueError(f"`data` must {line.format(last)}") from error
        raise


def _bytes(part: Any) -> int:
    if isinstance(part, Tensor) and part.layout != torch.strided:
        return int(part._nnz()) * (part.element_size() + 8 * part.ndim)
    if not hasattr(part, "shape"):
        return sys.getsizeof(part)
    return int(getattr(part, "nbytes", 0)) + _OF_A_TENSOR


def _moved(part: Any, device: torch.device) -> Any:
    """A copy of a tensor, an array or a table on `device`; by position, without labels."""
    if isinstance(part, Tensor):
        part = part if part.layout == torch.strided else part.to_sparse_coo()
        return part.detach().to(device, copy=True)
    if hasattr(part, "tocoo"):  # SciPy's sparse matrices
        part = part.tocoo()
        where = torch.tensor(np.stack(part.coords), device=device)
        values = torch.tensor(part.data, device=device)
        made = torch.sparse_coo_tensor(where, values, part.shape, check_invariants=True)
        return made.coalesce()
    if not hasattr(part, "shape"):
        return part
    array = np.asarray(part)
    kinds = {getattr(t, "kind", "O") for t in np.atleast_1d(getattr(part, "dtypes", "O"))}
    if array.dtype == object and kinds <= set("biuf"):  # a table with flags, say
        array = array.astype(np.float64)
    ensure(
        array.dtype.kind in "biufc",
        "data",
        "hold numbers",
        f"{type(part).__name__} of type {array.dtype}",
        "Encode words and dates as numbers first.",
        TypeError,
    )
    return torch.tensor(native(array), device=device)


def native(array: Any) -> Any:
    """An array in this machine's byte order, which is the only one PyTorch knows."""
    return np.asarray(array, array.dtype.newbyteorder("="))


_NO_PAIR = "`data` must give pairs (inputs, targets) of tensors; got {}. {}"
_OTHERS = (
    "Several inputs: ((a, b), y). Weights, more targets: `data=[batch]`, "
    "`closure=lambda model, batch: ...`."
)


def _no_pair(batch: Batch) -> TypeError:
    """What stands where a tensor should be, and the way out."""
    got, advice = f"a batch of type {kind(batch)}", _OTHERS
    if isinstance(batch, Mapping):
        got = shorten(f"a {kind(batch)}", 60, placeholder=" …")
        advice = "Name the targets 'labels', or pass `closure=lambda model, batch: ...`."
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
        named: dict[Any, Any] = {"inputs": inputs}
        if isinstance(inputs, Mapping):
            named = dict(inputs)
        elif isinstance(inputs, tuple | list):
            named = dict(enumerate(inputs))
        named["targets"] = targets
        if is_number(targets):
            got = "single samples"
            advice = "Pass the data set itself, or a loader with a `batch_size`."
        elif wrong := [name for name, part in named.items() if not hasattr(part, "shape")]:
            name, part = wrong[0], named[wrong[0]]
            got = shorten(f"{name!r} of type {kind(part)}", 60, placeholder=" …")
            if any(isinstance(leaf, str) for leaf in _tensors.leaves(part)):
                got = f"words in {name!r}"
                advice = "Leave that column out, or encode it as numbers."
    elif isinstance(next(_tensors.leaves(batch), None), int | float):
        advice = "Make tensors of lists of numbers: `torch.tensor(values)`."
    return TypeError(_NO_PAIR.format(got, advice))


def is_number(part: Any) -> bool:
    """One number: Python's, or a tensor or array without dimensions."""
    return isinstance(part, int | float) or getattr(part, "ndim", None) == 0


def kind(batch: Batch) -> str:
    """Its type and size, or the names in a dict."""
    if isinstance(batch, Mapping):
        return f"dict of {', '.join(map(str, batch))}"
    shape = getattr(batch, "shape", None)
    size = len(batch) if isinstance(batch, tuple | list) else shape and tuple(shape)
    return type(batch).__name__ + (f" ({size})" if size else "")


def _checked_pair(batch: Batch) -> Pair:
    if not is_pair(batch) or is_number(batch[1]):
        raise _no_pair(batch)
    inputs, targets = batch
    for part in tree_leaves(inputs):
        ensure(
            len(part) == len(targets),
            "data",
            "have as many targets as inputs",
            f"{len(part)} inputs and {len(targets)} targets",
            "Pass `closure=` for batches whose first dimension is not that of samples.",
        )
    return inputs, targets


def row_kind(pair: Pair) -> tuple[Any, ...]:
    """Structure, shapes and types of a row: pairs of one kind can be joined."""
    parts, structure = tree_flatten(pair)
    return (str(structure), *((part.shape[1:], part.dtype) for part in parts))
