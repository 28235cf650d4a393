"""What a measure returns: a value, the evidence for it, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a computation ended. `advice` says what to do about it."""

    CONVERGED = "converged"
    COMPLETED = "completed"
    MAX_HVPS = "max_hvps"
    MAX_SECONDS = "max_seconds"
    INTERRUPTED = "interrupted"
    INEXACT = "inexact"
    LINE_SEARCH_FAILED = "line_search_failed"
    NON_FINITE = "non_finite"
    ZERO_GRADIENT = "zero_gradient"
    NOT_REACHED = "not_reached"
    NOT_AVAILABLE = "not_available"

    @property
    def ok(self) -> bool:
        """Whether the result is what was asked for."""
        return self in (Status.CONVERGED, Status.COMPLETED)

    @property
    def advice(self) -> str:
        """One sentence: what happened and the way out."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "Every wanted value met `tol`.",
    Status.COMPLETED: "The stated budget was used in full.",
    Status.MAX_HVPS: "Stopped at `max_hvps` (`max_sweeps` for layers) before every "
    "error met its tolerance. Raise `max_hvps` or loosen `tol` (`rtol`).",
    Status.MAX_SECONDS: "Stopped at `max_seconds`; the bounds reached so far hold. "
    "Raise `max_seconds` or loosen `tol`.",
    Status.INTERRUPTED: "Interrupted; the bounds reached so far hold.",
    Status.INEXACT: "The products themselves are less exact than what was asked for, so "
    "more of them would not help. Use float64, or a loss with a second derivative.",
    Status.LINE_SEARCH_FAILED: "The line search found no rise at all, so the value 0 "
    "says nothing. Try another `seed` or `solver='ascent'`.",
    Status.NON_FINITE: "The risk or a product of it is NaN or infinite. Check the "
    "parameters and the data for non-finite values.",
    Status.ZERO_GRADIENT: "The gradient is exactly zero, so there is no direction of "
    "first-order ascent and the value 0 says nothing. Check whether the loss is constant.",
    Status.NOT_REACHED: "The accuracy never fell as far as asked, however large the "
    "perturbation. Lower `accuracy_drop` below what the accuracy has above chance.",
    Status.NOT_AVAILABLE: "This measure is not defined for this risk; its note says why.",
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One number of a result, as it stands in tables and comparisons."""

    name: str  # unique within a summary, such as "phi(1e-3)"
    value: float  # NaN where there is none
    error: float | None  # half width of a bound, or a standard error; same unit
    evidence: str  # what the error is and how the computation ended, in words
    cost: str = ""
    bound: str = ""  # "≥" or "≤" where the value is one by construction
    unit: str = ""


class NotConvergedError(RuntimeError):
    """Raised by `raise_for_status()`; `.result` holds what was computed."""

    def __init__(self, result: Any) -> None:
        super().__init__(result.status.advice)
        self.result = result


class NondeterministicRiskError(RuntimeError):
    """Two evaluations of the same risk gave two values, `.first` and `.second`."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__(
            "`risk` must be one function; got two evaluations at the same theta that "
            f"differ (f = {first!r} and {second!r}). Remove what varies from call to call."
        )
        self.first, self.second = first, second


class NonFiniteProductError(FloatingPointError):
    """A product with a curvature matrix holds NaN or infinity."""


class NotAvailableError(TypeError):
    """A measure has no meaning for a risk: a closure, no classes, too few samples."""


class Result:
    """Base of every result: the status check, and a small table for notebooks."""

    __slots__ = ()
    status: Status

    def raise_for_status(self) -> Any:
        """The result itself when its status is fine, else `NotConvergedError`."""
        if self.status.ok:
            return self
        raise NotConvergedError(self)

    def readings(self) -> list[Reading]:
        """The numbers of this result, one a row of a table."""
        raise NotImplementedError


def short(value: float) -> str:
    """`1e-3` rather than `0.001` or `1e-03`, where one digit says it all."""
    digit = f"{value:.0e}".replace("e-0", "e-")
    return digit if float(digit) == value < 0.01 else f"{value:g}"
