"""Checks of what is passed in: one line that names the argument, the value, the way out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import field, fields
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar


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


def fraction(name: str, value: Any, advice: str = "Pass 0.95.") -> float:
    """A number in (0, 1), such as a confidence.

    Raises:
        ValueError: it is none.
    """
    require(0 < value < 1, name, "lie in (0, 1)", value, advice)
    return float(value)


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
    ensure(sound, name, contract, repr(value), advice)


def ensure(
    sound: bool,
    name: object,
    contract: str,
    got: object,
    advice: str = "",
    kind: type[Exception] = ValueError,
) -> None:
    """As `require`, where words say what was got.

    Raises:
        ValueError: it is not sound; or another `kind` of error.
    """
    if not sound:
        raise kind(f"`{name}` must {contract}; got {got}. {advice}".rstrip())


def known(argument: str, name: Any, names: Iterable[str], contract: str = "") -> None:
    """Refuse a name that is none of `names`, and say which of them is close to it.

    Raises:
        ValueError: it is none.
    """
    lower = {each.lower(): each for each in names}
    close = get_close_matches(str(name).lower(), lower, 1, 0.5)
    advice = f"Did you mean {lower[close[0]]}?" if close else ""
    contract = contract or f"be one of {', '.join(lower.values())}"
    require(name in list(lower.values()), argument, contract, name, advice)


@contextmanager
def explained(
    name: object,
    contract: str,
    got: str,
    advice: str = "",
    kinds: tuple[type[BaseException], ...] = (Exception, SystemExit),
) -> Iterator[None]:
    """Make one line, as `ensure`, of whatever somebody else's code raises.

    Raises:
        ValueError: it raised one of `kinds`.
    """
    try:
        yield
    except kinds as error:
        kind = type(error).__name__
        first = (str(error).strip().splitlines() or [kind])[0].rstrip(".")
        text = f"`{name}` must {contract}; got {got} ({kind}: {first}). {advice}"
        raise ValueError(text.rstrip()) from None


def package(name: str, install: str = "'sharpness[lab]'") -> Any:
    """A package that measuring does not need, imported.

    Raises:
        ModuleNotFoundError: it is not installed; what to install is said in one line.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:  # of it, or of what it needs itself
        raise ModuleNotFoundError(
            f"`{error.name}` must be installed for this; got no such package. "
            f"Install it: pip install {install}."
        ) from None


def at_least(name: str, value: Any, least: float, advice: str = "") -> float:
    """A finite number >= `least`.

    Raises:
        ValueError: it is none.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    sound = is_number and least <= value < math.inf
    require(sound, name, f"be a number of at least {least:g}", value, advice)
    return float(value)


def setting(
    default: Any, text: str = "", check: Callable[[str, Any], Any] | None = None
) -> Any:
    """A field of a `Checked` dataclass.

    Args:
        default: None means that None may be given.
        text: help for the flag that a command has for it; no text, no flag.
        check: called with name and value, to refuse it.
    """
    return field(default=default, metadata={"help": text, "check": check})


class Checked:
    """A dataclass whose fields are checked when it is made: see `setting`."""

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            ValueError: one is.
        """
        for each in fields(self):  # type: ignore[arg-type]
            value, check = getattr(self, each.name), each.metadata.get("check")
            if check and (value is not None or each.default is not None):
                check(each.name, value)


class NotAvailableError(TypeError):
    """A measure has no meaning for a risk: a closure, no classes, too few samples."""


# Measures of a risk whose vectors no process has whole.
_IN_PARTS = (
    *("eigenpairs", "trace", "frobenius_norm", "spectral_density", "norms", "summary"),
)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def of_a_risk(measure: Callable[_P, _R]) -> Callable[_P, _R]:
    """Refuse, in one line, what is no risk: a model, say; a result gets a risk's notes.

    On several processes an interrupt inside waits until all can stop at the same place.
    """

    @wraps(measure)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        risk: Any = args[0] if args else kwargs.get("risk")
        if risk is not None and not hasattr(risk, "hvp"):
            raise TypeError(
                f"`risk` must be an EmpiricalRisk; got {type(risk).__name__}. Write "
                f"{measure.__name__}(EmpiricalRisk(model, loss, data))."
            )
        ensure(
            measure.__name__ in _IN_PARTS or not getattr(risk, "is_sharded", False),
            "risk",
            f"have theta whole on every process for {measure.__name__}",
            "a sharded model (not available)",
            f"Load the whole model on one process, or use {', '.join(_IN_PARTS)}.",
            NotAvailableError,
        )
        ranks: Any = getattr(risk, "ranks", None)
        with ranks.holding_back_interrupts() if ranks else nullcontext():
            found = measure(*args, **kwargs)
        return found.noted(risk.notes) if hasattr(found, "noted") else found

    return checked
