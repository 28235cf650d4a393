"""Checks that many measures share: one line that names the argument and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def positive(name: str, value: Any, advice: str = "") -> float:
    """A finite number > 0.

    Raises:
        ValueError: it is none.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise ValueError(f"`{name}` must be positive; got {value}. {advice}".rstrip())
    return float(value)


def positive_list(name: str, value: Any, advice: str = "") -> tuple[list[float], bool]:
    """Positive numbers, and whether several were asked for (a list, an array).

    Raises:
        ValueError: none, or one that is not positive.
    """
    several = isinstance(value, Iterable) and not isinstance(value, str)
    found = [positive(name, v, advice) for v in (value if several else [value])]
    if not found:
        raise ValueError(f"`{name}` must hold at least one number; got none. {advice}")
    return found, several


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int, advice: str = "") -> int:
    """A whole number >= `least`.

    Raises:
        ValueError: it is none.
    """
    if not is_whole(value):
        raise ValueError(f"`{name}` must be a whole number; got {value}.")
    if value < least:
        text = f"`{name}` must be at least {least}; got {value}. {advice}"
        raise ValueError(text.rstrip())
    return int(value)


def whole_seed(seed: Any) -> int:
    """A seed: a whole number of either sign.

    Raises:
        ValueError: it is none.
    """
    if not is_whole(seed):
        raise ValueError(f"`seed` must be a whole number; got {seed!r}.")
    return int(seed)


def require(sound: bool, name: str, contract: str, value: Any, advice: str = "") -> None:
    """Say in one line what an argument must be, unless it is `sound`.

    Raises:
        ValueError: it is not.
    """
    if not sound:
        raise ValueError(f"`{name}` must {contract}; got {value!r}. {advice}".rstrip())


def at_least(name: str, value: Any, least: float, advice: str = "") -> float:
    """A finite number >= `least`.

    Raises:
        ValueError: it is none.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    sound = is_number and least <= value < math.inf
    require(sound, name, f"be a number of at least {least:g}", value, advice)
    return float(value)
