"""Results made from their plain values again, and kept in a file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from sharpness._results import Result, Status


def restored(hint: Any, plain: Any, arrays: Mapping[str, Tensor] | None = None) -> Any:
    """What `as_plain` was given, of the type `hint`.

    Of a result the class is named in `plain`, and must have been imported; arrays that
    were left out are None.

    Raises:
        KeyError, TypeError, ValueError: `plain` is none of this type.
    """
    kinds = get_args(hint)
    origin = get_origin(hint) or hint
    if origin is UnionType:
        if plain is None:
            return None
        return restored(next(k for k in kinds if k is not type(None)), plain, arrays)
    if origin is float:
        return math.nan if plain is None else plain
    if origin is tuple:
        kinds = kinds[:1] * len(plain) if kinds[-1] is ... else kinds
        return tuple(restored(*each, arrays) for each in zip(kinds, plain, strict=True))
    if origin is list:
        return [restored(*kinds, item, arrays) for item in plain]
    if origin is dict:
        return {key: restored(kinds[1], item, arrays) for key, item in plain.items()}
    if origin in (Tensor, np.ndarray):
        if arrays is None:
            return torch.tensor(restored(list[float], plain), dtype=torch.float64)
        return arrays[plain] if origin is Tensor else arrays[plain].numpy()
    if origin is Status:
        return Status(plain)
    if dataclasses.is_dataclass(origin):
        return _built(origin, plain, arrays)
    return plain


def _built(cls: Any, plain: Any, arrays: Mapping[str, Tensor] | None) -> Any:
    if issubclass(cls, Result):
        cls = Result.kinds[plain["type"]]
    hints, facts = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if field.name in plain:
            facts[field.name] = restored(hints[field.name], plain[field.name], arrays)
        elif not field.repr:
            facts[field.name] = None
    return cls(**facts)
