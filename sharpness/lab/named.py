"""What the lab knows by name, and names with arguments: `sam?rho=0.1`.

The names stand here because a command's help needs them without PyTorch; the tables of
what they make stand beside what is made.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from sharpness._arguments import explained, known, require

Made = TypeVar("Made")

DATA = (
    "mnist5k",
    "digits",
    "mnist",
    "fashion-mnist",
    "cifar10",
    "cifar100",
    "spoken-digits",
)
NETWORKS = (
    *("F1", "F2", "C1", "C2", "C3", "C4", "AlexNet"),
    *("ResNet-8", "ResNet-20", "ResNet-32", "WRN-16-4", "GPT", "MLP"),
)
AUGMENTATIONS = ("none", "keskar", "crop-flip", "augment")
REMEDIES = ("none", "conservative", "adversarial", "sam", "asam")


def parsed(text: str, argument: str = "arguments") -> tuple[str, dict[str, Any]]:
    """`ResNet-8?batchnorm=False` as ("ResNet-8", {"batchnorm": False}).

    Arguments are joined by `&`; their values are Python literals, and whatever is none
    is a string. The name is taken as it is.

    Raises:
        ValueError: an argument without a value.
    """
    name, _, query = text.partition("?")
    with explained(
        argument, "be written NAME?argument=value&...", repr(text), kinds=(ValueError,)
    ):
        pairs = parse_qsl(query.replace("+", "%2B"), True, bool(query))
    return name, {key: _literal(value) for key, value in pairs}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def from_spec(argument: str, text: str, table: Mapping[str, Callable[..., Made]]) -> Made:
    """What a table makes of a name and its arguments.

    Args:
        argument: whose value `text` is, for the error message.
        text: `name` or `name?key=value&...`.
        table: the names that are known, and what is called with the arguments.

    Raises:
        ValueError: an unknown name, or arguments it does not take.
    """
    require(isinstance(text, str), argument, "be a name, with its arguments", text)
    name, arguments = parsed(text, argument)
    known(argument, name, table)
    try:
        return table[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{argument}` must be sound; got {text!r} ({error})") from None
