"""Results as plain values, and as one line of strict JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def to_line(value: Any) -> str:
    """One line of strict JSON (no NaN)."""
    return json.dumps(as_plain(value), allow_nan=False)


def as_plain(value: Any, keep: Callable[[Any], str] | None = None) -> Any:
    """Nested plain values: results become dicts without their big arrays, NaN null.

    A class that has `kinds` is named under `type`. With `keep` no array is left out: it
    is given each and returns the name that stands for it; and NaN stays.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.repr or keep]
        found = {name: as_plain(getattr(value, name), keep) for name in names}
        named = {"type": type(value).__name__} if hasattr(value, "kinds") else {}
        return named | found
    if hasattr(value, "tolist"):  # tensors, and NumPy's arrays and numbers
        value = keep(value) if keep and value.ndim else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): as_plain(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item, keep) for item in value]
    if not keep and isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, str | Path) else value
