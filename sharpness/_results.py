"""What a measure returns: its values, the evidence for them, what they cost and how."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from sharpness._arguments import NotAvailableError as NotAvailableError
from sharpness._arguments import ensure, package

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharpness.report.figures import Figure

_MOST_SHOWN = 20  # numbers on the line that `print` shows


class Status(StrEnum):
    """How a computation ended, from good to bad. `advice` says what to do about it."""

    NOT_AVAILABLE = "not_available"
    CONVERGED = "converged"
    COMPLETED = "completed"
    NOT_REACHED = "not_reached"
    ZERO_GRADIENT = "zero_gradient"
    LINE_SEARCH_FAILED = "line_search_failed"
    INEXACT = "inexact"
    MAX_HVPS = "max_hvps"
    MAX_SECONDS = "max_seconds"
    NON_FINITE = "non_finite"
    DERIVATIVE_DISAGREES = "derivative_disagrees"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def ok(self) -> bool:
        """Whether the result is what was asked for."""
        return self in (Status.CONVERGED, Status.COMPLETED)

    @property
    def advice(self) -> str:
        """One sentence: what happened and the way out."""
        return _ADVICE[self]

    @classmethod
    def worst(cls, *statuses: Status, finite: bool = True) -> Status:
        """That of several parts together: the last of them in the order above.

        What is not available is missing, and spoils nothing that is there. Numbers that
        are not all `finite` count as a part that is not; no part at all is completed.
        """
        order = list(cls)
        ended = [*statuses, *([] if finite else [cls.NON_FINITE])]
        return max(ended, key=order.index, default=cls.COMPLETED)


_ADVICE = {
    Status.CONVERGED: "Every wanted value met `tol`.",
    Status.COMPLETED: "The stated budget was used in full.",
    Status.MAX_HVPS: "Stopped at `max_hvps` (`max_sweeps` for layers) before every "
    "error met its tolerance. Raise `max_hvps` or loosen `tol`.",
    Status.MAX_SECONDS: "Stopped at `max_seconds`; the bounds reached so far hold. "
    "Raise `max_seconds` or loosen `tol`.",
    Status.INTERRUPTED: "Interrupted; the bounds reached so far hold.",
    Status.INEXACT: "The products themselves are less exact than what was asked for, so "
    "more of them would not help. Use float64, or a loss with a second derivative.",
    Status.LINE_SEARCH_FAILED: "The line search found no rise at all, so the value 0 "
    "says nothing. Try another `seed` or `solver='ascent'`.",
    Status.NON_FINITE: "The risk or a product of it is NaN or infinite. Check the "
    "parameters and the data for non-finite values.",
    Status.DERIVATIVE_DISAGREES: "A derivative disagrees with f; `doctor(risk)` gives both "
    "numbers. Look for `detach`, `no_grad`, rounding or a custom backward pass, or take it "
    "as it comes with `EmpiricalRisk(check=False)`.",
    Status.FAILED: "A check failed; its finding says what was seen and what to do.",
    Status.ZERO_GRADIENT: "The gradient is exactly zero, so there is no direction of "
    "first-order ascent and the value 0 says nothing. Check whether the loss is constant.",
    Status.NOT_REACHED: "The accuracy never fell as far as asked, however large the "
    "perturbation. Lower `accuracy_drop` below what the accuracy has above chance.",
    Status.NOT_AVAILABLE: "This measure is not defined for this risk; its note says why.",
}


@dataclass(frozen=True)
class Cost:
    """Passes over the data, and time: what a result has taken, or is expected to."""

    products: float = 0  # with a curvature matrix; of parts of the data, a fraction
    gradients: float = 0  # with the value
    forwards: float = 0  # forward passes
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: n + getattr(other, name) for name, n in vars(self).items()})

    def __str__(self) -> str:
        counts = (self.products, self.gradients, self.forwards)
        names = ("product", "gradient", "forward pass")
        passes = [counted(n, name) for n, name in zip(counts, names, strict=True) if n]
        return ", ".join([*passes, *([f"{self.seconds:.1f} s"] if self.seconds else [])])


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One number of a result, as it stands in tables and comparisons."""

    name: str  # unique within a summary, such as "phi(1e-3)"
    value: float  # NaN where there is none
    error: float | None = None  # half width of a bound, or a standard error; same unit
    evidence: str = ""  # what the error is and how the computation ended, in words
    cost: str = ""
    bound: str = ""  # "≥" or "≤" where the value is one by construction
    unit: str = ""
    axis: str = ""  # with whom it can share one: quantity, radius; "" is nobody

    @property
    def value_text(self) -> str:
        """`≥ 178.2 %`, `0.0123`."""
        if not math.isfinite(self.value):
            return number(self.value)
        return " ".join(filter(None, (self.bound, number(self.value), self.unit)))

    @property
    def evidence_text(self) -> str:
        """`± 0.001; standard error over ...`, or only the words."""
        return "; ".join(filter(None, (self._error, self.evidence)))

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"{self.name} unknown"
        shown = (self.name, self.bound, number(self.value), self._error, self.unit)
        return " ".join(filter(None, shown))

    @property
    def _error(self) -> str:
        known = self.error is not None and math.isfinite(self.error)
        return f"± {self.error:.1g}" if known else ""


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


class DerivativeDisagreesError(ArithmeticError):
    """A gradient or a product is not the derivative of f; the message has both numbers."""

    def __init__(self, argument: str, numbers: str) -> None:
        super().__init__(
            f"`{argument}` must have the derivatives of f; got others ({numbers}). "
            "`detach`, `no_grad` or a custom backward does that; check=False ignores it."
        )


def ensure_available(
    sound: bool, name: str, contract: str, got: str, advice: str = ""
) -> None:
    """As `_arguments.ensure`, of what the kind of risk allows.

    Raises:
        NotAvailableError: it is not sound.
    """
    ensure(sound, name, contract, got, advice, NotAvailableError)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of every result: how it ended, what it cost, how it was asked for.

    A subclass adds its values and their evidence, and names them in `_rows`; what is
    printed, tabulated and compared follows from these.
    """

    kinds: ClassVar[dict[str, type[Result]]] = {}  # every subclass by its name
    radius: ClassVar[str] = ""  # the setting in which a list of such results differs

    status: Status
    cost: Cost = Cost()
    settings: Mapping[str, Any] = field(default_factory=dict)  # as asked for
    # Of the risk: how its model, loss and data were understood.
    notes: Sequence[str] = field(default=(), repr=False, compare=False)

    def __init_subclass__(cls) -> None:
        Result.kinds[cls.__name__] = cls
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign]  # or dataclass has its own

    @property
    def num_hvps(self) -> Any:
        """Products with the matrix; of parts of the data, a fraction."""
        return self.cost.products

    @property
    def num_evals(self) -> Any:
        """Values with gradient, or forward passes where there are none."""
        return self.cost.gradients or self.cost.forwards

    @property
    def seconds(self) -> float:
        """From the call to its end."""
        return self.cost.seconds

    def noted(self, notes: Iterable[str]) -> Self:
        """The same result with these notes."""
        return replace(self, notes=tuple(notes))

    def raise_for_status(self) -> Self:
        """The result itself when its status is fine, else `NotConvergedError`."""
        if self.status.ok:
            return self
        raise NotConvergedError(self)

    def save(self, path: str | Path) -> None:
        """Keep it whole, eigenvectors and all, in a file for `sharpness.load_result`.

        Plain tensors with JSON in their header (safetensors); written under another name
        first, then renamed.

        Args:
            path: of the file, such as "pairs.safetensors"; replaced where there is one.
        """
        from sharpness import _saving

        _saving.save(path, self)

    def readings(self) -> list[Reading]:
        """The numbers of this result, one a row of a table; the first bears the cost."""
        cost, matrix = str(self.cost), self.settings.get("matrix", "hessian")
        of = [] if matrix == "hessian" else [f"of the {matrix}"]
        found = []
        for row in self._rows():
            words = [row.evidence, *of] if row.evidence else of
            if self.status not in row.evidence:
                words = [*words, str(self.status)]
            found.append(replace(row, evidence=", ".join(words), cost=row.cost or cost))
            cost = ""
        return found

    def _rows(self) -> Iterable[Reading]:
        """The numbers with the words for their evidence, without status and cost."""
        raise NotImplementedError

    def _curves(self) -> Iterable[tuple[str, float, float, float]]:
        """What is drawn against the radius: name, value, and its ends (NaN if none)."""
        for row in self._rows():
            error = math.nan if row.error is None else row.error
            name = f"{row.name.partition('(')[0]} {row.bound}".strip()
            yield name, row.value, row.value - error, row.value + error

    def __str__(self) -> str:
        """One line, and one for each of the notes."""
        return "\n".join([self._line(), *_noted(self.notes)])

    def _line(self) -> str:
        """The numbers, then in brackets their evidence and the cost."""
        rows = self.readings()
        shown, more = rows[:_MOST_SHOWN], len(rows) - _MOST_SHOWN
        numbers = [*map(str, shown), *([f"{more} more"] if more > 0 else [])]
        words = ""
        for text in (*(row.evidence for row in shown), str(self.cost)):
            words += f"; {text}" if text not in words else ""
        return f"{', '.join(numbers)}   ({words.removeprefix('; ')})"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return _html(self.readings(), self.notes)

    def to_frame(self) -> Any:
        """A pandas data frame with a row for each of the `readings()`."""
        return _frame(self.readings())

    @property
    def has_picture(self) -> bool:
        """Whether `plot()` draws something else than a bar for each number."""
        kind, base = type(self), Result
        return kind.plot is not base.plot or kind._figure is not base._figure

    def drawn(self) -> tuple[Sequence[str], list[tuple[float, ...]]]:
        """What `plot()` draws beyond the readings: names of columns, and rows.

        Both are empty where it draws the readings.
        """
        return (), []

    def plot(self, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the numbers with their errors.

        Args:
            path: where the PNG goes, if anywhere.
            ax: axes of your own figure, to draw there.
        """
        return self._figure(path, ax)

    def _figure(self, path: Any, ax: Any) -> Figure:
        """What `plot` draws: dots on logarithmic axes, unless a subclass knows better."""
        from sharpness.report.figures import readings_plot

        return readings_plot(self.readings(), path, ax=ax)


_One = TypeVar("_One", bound=Result)


class Results(list[_One]):
    """The results for several radii: a list that shows itself as one result does."""

    def readings(self) -> list[Reading]:
        """The numbers of all of them, in order."""
        return [reading for result in self for reading in result.readings()]

    @property
    def notes(self) -> Sequence[str]:
        """Of the risk, as each of them has them."""
        return self[0].notes if self else ()

    def noted(self, notes: Iterable[str]) -> Results[_One]:
        """The same results with these notes."""
        return Results(result.noted(notes) for result in self)

    def __str__(self) -> str:
        """A line for each, and one for each of the notes."""
        return "\n".join([*(each._line() for each in self), *_noted(self.notes)])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return _html(self.readings(), self.notes)

    def to_frame(self) -> Any:
        """A pandas data frame with a row for each of the `readings()`."""
        return _frame(self.readings())

    def plot(self, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
        """The numbers against the radius, with their errors; a matplotlib figure.

        Args:
            path: where the PNG goes, if anywhere.
            ax: axes of your own figure, to draw there.
        """
        from sharpness.report.figures import points_plot

        curves = [list(result._curves()) for result in self]
        by_name = {
            name: list(zip(*(numbers[i][1:] for numbers in curves), strict=True))
            for i, (name, *_) in enumerate(curves[0] if curves else [])
        }
        radius = self[0].radius if self else "radius"
        return points_plot(
            [result.settings[radius] for result in self],
            [(name, *columns) for name, columns in by_name.items()],
            path,
            ax=ax,
            labels=(radius, self[0].readings()[0].axis.partition("(")[0] if self else ""),
        )


def bars(readings: Sequence[Reading], label: str, path: Any, **more: Any) -> Any:
    """A figure with a bar for each number, and its error; `more` as in `bars_plot`."""
    from sharpness.report.figures import bars_plot

    return bars_plot(
        [reading.name for reading in readings],
        [reading.value for reading in readings],
        [reading.error or 0.0 for reading in readings],
        path,
        label=label,
        **more,
    )


def until_interrupted(results: Iterable[_One]) -> Results[_One]:
    """Results, each made as it is asked for, up to one that Ctrl-C has ended."""
    found = Results[_One]()
    for result in results:
        found.append(result)
        if result.status is Status.INTERRUPTED:
            break
    return found


def _frame(readings: Iterable[Reading]) -> Any:
    columns = [field.name for field in fields(Reading)]
    return package("pandas").DataFrame(map(asdict, readings), columns=columns)


def _noted(notes: Iterable[str] | None) -> list[str]:
    """A line for each; of a result that was read from a record there are none."""
    return [f"note: {note}" for note in notes or ()]


def _html(readings: Iterable[Reading], notes: Iterable[str] | None) -> str:
    rows = [(r.name, r.value_text, r.evidence_text, r.cost) for r in readings]
    table = html_table(("", "value", "evidence", "cost"), rows)
    return table + "".join(f"<p>{html.escape(line)}</p>" for line in _noted(notes))


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a notebook, from cells of plain text."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    cells = ("".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<table class="dataframe">{table}</table>'  # notebooks and pages style that


def counted(num: float, noun: str) -> str:
    """`1 point`, `2 points`, `3 forward passes`."""
    ending = "" if num == 1 else "es" if noun.endswith("s") else "s"
    return f"{num:.0f} {noun}{ending}"


def short(value: float) -> str:
    """`1e-3` rather than `0.001` or `1e-03`, where one digit says it all."""
    digit = f"{value:.0e}".replace("e-0", "e-")
    return digit if float(digit) == value < 0.01 else f"{value:g}"


def plain(value: float) -> str:
    """A whole number as it is, any other by `number`."""
    whole = math.isfinite(value) and value == round(value) and abs(value) < 1e6
    return f"{value:.0f}" if whole else number(value)


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where a person needs none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        size = abs(float(f"{value:.3e}"))  # 0.99999 is written as 1.000
        digits = 4 - 1 - math.floor(math.log10(size)) if size else 0
        return f"{value:.{max(0, min(digits, 6))}f}"
    return f"{value:.3g}"
