"""Results as plain values, and as one line of strict JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sharpness._results import Result


def to_line(value: Any) -> str:
    """One line of strict JSON (no NaN)."""
    return json.dumps(as_plain(value), allow_nan=False)


def as_plain(value: Any, keep: Callable[[Any], Any] | None = None) -> Any:
    """Nested plain values: results become dicts without their big arrays, NaN null.

    With `keep` no array is left out: it is given each and returns what stands for it;
    and NaN stays.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {name: as_plain(getattr(value, name), keep) for name in _names(value, keep)}
        is_result = isinstance(value, Result)
        return {"type": type(value).__name__, **found} if is_result else found
    if hasattr(value, "tolist"):  # tensors, and NumPy's arrays and numbers
        value = value.tolist() if keep is None or not value.ndim else keep(value)
    if isinstance(value, Mapping):
        return {str(key): as_plain(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item, keep) for item in value]
    if keep is None and isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, str | Path) else value


def _names(value: Any, keep: Any) -> list[str]:
    """Of a dataclass' fields; of a result its own first, then those that all share."""
    names = [f.name for f in dataclasses.fields(value) if f.repr or keep is not None]
    if not isinstance(value, Result):
        return names
    shared = [f.name for f in dataclasses.fields(Result)]
    return [name for name in names if name not in shared] + shared
