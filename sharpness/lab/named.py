"""Things by their name, with arguments: `sam?rho=0.1`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from sharpness._arguments import require
from sharpness.lab.networks import parsed


def from_spec(argument: str, text: str, table: Mapping[str, Callable[..., Any]]) -> Any:
    """What a table makes of a name and its arguments.

    Args:
        argument: whose value `text` is, for the error message.
        text: `name` or `name?key=value&...`.
        table: the names that are known, and what is called with the arguments.

    Raises:
        ValueError: an unknown name, or arguments it does not take.
    """
    require(isinstance(text, str), argument, "be a name, with its arguments", text)
    try:
        name, arguments = parsed(text)
    except ValueError:
        raise ValueError(
            f"`{argument}` must be written NAME?argument=value&...; got {text!r}."
        ) from None
    if name not in table:
        close = get_close_matches(name.lower(), table, 1, 0.5)
        raise ValueError(
            f"`{argument}` must be one of {', '.join(table)}; got {name!r}."
            + (f" Did you mean {close[0]}?" if close else "")
        )
    try:
        return table[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{argument}` must be sound; got {text!r} ({error})") from None
