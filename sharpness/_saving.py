"""Results, and other tensors with JSON, in files and out of them: nothing is executed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from itertools import repeat
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharpness._json import as_plain

_FORMAT = "sharpness-result"


def save(path: str | Path, value: Any) -> None:
    """Write a result to a .safetensors file, its plain values as JSON in the header."""
    arrays: dict[str, Tensor] = {}

    def keep(array: Any) -> str:
        name = str(len(arrays))
        arrays[name] = torch.as_tensor(array).detach().cpu().clone().contiguous()
        return name

    facts = {"format": _FORMAT, "result": json.dumps(as_plain(value, keep))}
    write(path, safetensors.torch.save(arrays, facts))


def load(path: str | Path, base: Any) -> Any:
    """The result in a file, of any class below `base` that is known to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a result, or damaged.
    """
    try:
        with safe_open(str(path), "pt") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.get("format") != _FORMAT:
            raise ValueError("another file")
        return restored(base, json.loads(facts["result"]), arrays)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"`path` must be a file that a result's `save` wrote; got {path}. Model files "
            "are for `python -m sharpness.measure`."
        ) from None


def write(path: str | Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, then rename: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def restored(hint: Any, plain: Any, arrays: Mapping[str, Tensor] | None = None) -> Any:
    """What `as_plain` was given, of the type `hint`.

    A class that has `kinds` is looked up there by the name in `plain`; arrays that were
    left out are None.

    Raises:
        KeyError, TypeError, ValueError: `plain` is none of this type.
    """
    kinds, origin = get_args(hint), get_origin(hint) or hint
    if origin is UnionType:  # X | None
        return None if plain is None else restored(kinds[0], plain, arrays)
    if origin is float:
        return math.nan if plain is None else plain
    if origin in (list, tuple):
        each = repeat(kinds[0]) if origin is list or ... in kinds else kinds
        return origin(map(restored, each, plain, repeat(arrays)))
    if origin is dict:
        return {key: restored(kinds[1], item, arrays) for key, item in plain.items()}
    if origin in (Tensor, np.ndarray):
        if arrays is None:
            array = np.array(plain, dtype=float)  # null becomes NaN
            return torch.from_numpy(array) if origin is Tensor else array
        return arrays[plain] if origin is Tensor else arrays[plain].numpy()
    if isinstance(origin, type) and issubclass(origin, Enum):
        return origin(plain)
    if dataclasses.is_dataclass(origin):
        return _built(origin, plain, arrays)
    return plain


def _built(cls: Any, plain: Any, arrays: Mapping[str, Tensor] | None) -> Any:
    if hasattr(cls, "kinds"):
        cls = cls.kinds[plain["type"]]
    hints, facts = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if field.name in plain:
            facts[field.name] = restored(hints[field.name], plain[field.name], arrays)
        elif not field.repr:
            facts[field.name] = None
    return cls(**facts)
