"""Digests of data and of what a loss holds, the same in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 8  # of what a loss holds


def digest(*values: Any) -> str:
    """SHA-256, in hexadecimal, of tensors, containers of them and plain values."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(as_bytes(value).data)
        elif isinstance(value, Mapping):
            for name, part in value.items():
                found.update(f"{name}={digest(part)};".encode())
        elif isinstance(value, list | tuple):
            found.update(json.dumps([digest(part) for part in value]).encode())
        else:
            found.update(f"{type(value).__name__} {value!r};".encode())
    return found.hexdigest()


def described(value: Any, surroundings: bool = True) -> Any:
    """What a loss is made of, as `digest` takes it: without addresses in memory.

    `surroundings`: with the objects that a function written inside another refers to, such
    as a trainer or a command's arguments, which may know their rank and hold its data.
    """
    seen = {} if surroundings else {id(x): x for x in _surroundings(value)}
    return _described(value, _DEPTH, seen)


def _surroundings(loss: Any) -> list[Any]:
    cells = getattr(getattr(loss, "func", loss), "__closure__", None) or ()
    held = [_content(cell) for cell in cells]
    return [x for x in held if hasattr(x, "__dict__") and not callable(x)]


def _described(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    if isinstance(value, Tensor | str | bytes | int | float | complex | None):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return [str(value.dtype), list(np.shape(value)), value.tobytes()]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if id(value) in seen or not depth:
        return [kind]
    if not isinstance(value, tuple):  # equal constants may be one object, or not
        seen[id(value)] = value  # held, so that no other gets its place
    return [kind, *(_described(part, depth - 1, seen) for part in _inside(value))]


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, torch.device):
        return [value.type]  # each process may have one of its own
    if isinstance(value, type | torch.dtype):
        return [str(value)]
    if isinstance(value, ModuleType):
        return [value.__name__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        name = [value.__module__, value.__qualname__]
        return [name, value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, nn.Module):
        held = [*value.named_children(), *value.named_parameters(), *value.named_buffers()]
        return [*held, *_public(value)]
    of_builtin = getattr(value, "__qualname__", None)
    return [of_builtin, *_public(value)]


def _public(value: Any) -> list[Any]:
    """Attributes, without those that belong to a module's surroundings."""
    attributes = getattr(value, "__dict__", {})
    return [x for x in attributes.items() if x[0][0] != "_" and x[0] != "training"]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def as_bytes(tensor: Tensor) -> np.ndarray:
    """What it holds, as bytes (b,)."""
    dense = (
        tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    )
    flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    found: np.ndarray = flat.view(torch.uint8).numpy()
    return found
