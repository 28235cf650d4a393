"""Plans as plain values: what stands in a record, and the plan made from it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

from sharpness._arguments import require

_T = TypeVar("_T", bound=type)
_KINDS: dict[str, type] = {}
_NAMES: dict[type, str] = {}


def kind(name: str) -> Callable[[_T], _T]:
    """Let a dataclass be told by this name in a record, whatever it is called here."""

    def named(cls: _T) -> _T:
        _KINDS[name], _NAMES[cls] = cls, name
        return cls

    return named


def described(value: Any) -> Any:
    """A plan's class and the fields that differ from their defaults, nested.

    Defaults are left out, so that a field that is added later changes no record; 2.0 is
    2, so that equal plans have one description.
    """
    if isinstance(value, tuple | list):
        return [described(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {
        field.name: described(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    }
    return {"kind": _NAMES[type(value)], **fields}


def restored(plain: Any) -> Any:
    """The plan that `described` was given.

    Raises:
        ValueError: it names a kind that is not known.
    """
    if isinstance(plain, list):
        return tuple(restored(item) for item in plain)
    if not isinstance(plain, dict):
        return plain
    fields = {name: restored(item) for name, item in plain.items() if name != "kind"}
    name = plain.get("kind")
    require(
        name in _KINDS,
        "observation",
        f"be one of {', '.join(sorted(_KINDS))}",
        name,
        "Use the version of sharpness that wrote the record.",
    )
    return _KINDS[name](**fields)  # type: ignore[index]


def digest(plan: Any) -> str:
    """Sixteen hexadecimal digits that tell plans apart, here and anywhere."""
    text = json.dumps(described(plan), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
