"""Results as plain values, and as one line of strict JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON (no NaN)."""
    return json.dumps(as_plain(record), allow_nan=False)


def as_plain(value: Any) -> Any:
    """Nested plain values: results become dicts without their big arrays, NaN null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.repr]
        return {name: as_plain(getattr(value, name)) for name in fields}
    if hasattr(value, "tolist"):  # tensors, and NumPy's arrays and numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, str | Path) else value
