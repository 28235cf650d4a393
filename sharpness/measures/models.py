"""How sharp is this network, or which of two? One call each, on live models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from sharpness._results import Reading, Result, Status, number
from sharpness.measures.summary import Keywords, Summary, summary
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.mean_loss import BatchNorm
from sharpness.statistics import ReadingComparison, compare_readings, numbers_of


class RiskKeywords(TypedDict, total=False):
    """Of `EmpiricalRisk`, what may stand beside the measures' own."""

    batchnorm: BatchNorm
    params: str | Sequence[str] | None
    num_samples: int | None
    chunk_size: int | Literal["auto"]
    device: str | torch.device | None
    closure: Callable[[nn.Module, Any], Tensor] | None


class ModelKeywords(Keywords, RiskKeywords, total=False):
    """Of the measures and of the risk."""


def _apart(
    risk: Mapping[str, Any] | None, settings: ModelKeywords
) -> tuple[dict[str, Any], Keywords]:
    """Keywords of the risk, and those of the measures."""
    names = RiskKeywords.__annotations__
    of_risk = {name: value for name, value in settings.items() if name in names}
    others = {name: value for name, value in settings.items() if name not in names}
    return {**of_risk, **(risk or {})}, cast(Keywords, others)


def measure_model(
    model: nn.Module,
    loss: Callable[..., Tensor] | None,
    data: Any,
    measures: str | Sequence[str] | None = None,
    *,
    risk: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    on_estimate: Callable[[float], None] | None = None,
    **settings: Unpack[ModelKeywords],
) -> Summary:
    """Measure a network where it stands: `EmpiricalRisk` and `summary` in one call.

    Args:
        model: the network; it is left as it was, to the bit.
        loss: `loss(outputs, targets)`, as in `EmpiricalRisk`.
        data: (inputs, targets), a list of batches or a loader, as there.
        measures: names or families; None means curvature and phi (see `summary`).
        risk: more keywords of `EmpiricalRisk`, such as `{"engine": "compiled"}`.
        progress: show a bar with the expected time; by default on a terminal.
        on_estimate: called with the expected seconds before anything is measured.
        **settings: of the measures, as in `summary`: `k`, `epsilon`, `seed`, ...; of the
            risk: `batchnorm`, `params`, `num_samples`, `chunk_size`, `device`, `closure`.

    Returns:
        `Summary`: `.table()`, `.plot()`, `.to_frame()`, `["lambda_max"]`.

    Raises:
        ValueError, TypeError: what `EmpiricalRisk` or `summary` refuses.

    Cost: that of `summary`.
    """
    of_risk, others = _apart(risk, settings)
    made = EmpiricalRisk(model, loss, data, **of_risk)
    return summary(made, measures, progress=progress, on_estimate=on_estimate, **others)


@dataclass(frozen=True, kw_only=True)
class ModelComparison(Result):
    """Two networks by every measure, on the same data; `second` over `first`."""

    first: Summary
    second: Summary
    rows: tuple[ReadingComparison, ...]

    def __getitem__(self, name: str) -> ReadingComparison:
        """One number's comparison, such as that of "lambda_max" or "phi(1e-3)"."""
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise KeyError(f"{name!r} was not compared; there are {list(found)}")
        return found[name]

    def _rows(self) -> Iterable[Reading]:
        """The ratio of every number; NaN where one of the two is not positive."""
        for row in self.rows:
            yield Reading(
                name=row.name,
                value=row.ratio,
                evidence=f"first {row.first_text}, {row.verdict}: {row.second_text}",
                axis="second / first",
            )

    def _line(self) -> str:
        """A line for each number, after one that says what is below."""
        lines = (
            f"{row.name}: {row.first_text} and {row.second_text}, {row.verdict}"
            for row in self.rows
        )
        return "\n".join([f"first and second model   ({self.cost})", *lines])

    def table(self) -> str:
        """Both values, their ratio and a verdict for every number, as text."""
        from sharpness.report.tables import BOUNDS, table_text

        columns = ("measure", "first", "second", "second / first", "verdict")
        cells = [
            (r.name, r.first_text, r.second_text, number(r.ratio), r.verdict)
            for r in self.rows
        ]
        pair = "One pair: a difference beyond both errors, not a statistical test."
        bounds = [BOUNDS] if any(row.bound for row in self.rows) else []
        return table_text(columns, cells, *self.notes, pair, *bounds)

    def _figure(self, path: Any, ax: Any) -> Any:
        """The ratio of every number, on a logarithmic axis."""
        from sharpness.report.figures import comparison_plot

        return comparison_plot(self.rows, ("first model", "second model"), path, ax=ax)


def compare_models(
    first: nn.Module,
    second: nn.Module,
    loss: Callable[..., Tensor] | None,
    data: Any,
    measures: str | Sequence[str] | None = None,
    *,
    risk: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    **settings: Unpack[ModelKeywords],
) -> ModelComparison:
    """Measure two networks on the same data, with the same draws, side by side.

    It compares these two networks, within the errors of the measures. Whether a way of
    training makes them differ takes several pairs: `python -m sharpness.compare`.

    Args:
        first: a network.
        second: the other one; it may have another architecture.
        loss: `loss(outputs, targets)`, as in `EmpiricalRisk`.
        data: as there; a loader is run through once, for both.
        measures: names or families; None means curvature and phi (see `summary`).
        risk: more keywords of `EmpiricalRisk`, as in `measure_model`.
        progress: show a bar with the expected time; by default on a terminal.
        **settings: of the measures and the risk, as in `measure_model`.

    Returns:
        `ModelComparison`: `.table()`, `.plot()`, `.first`, `.second`.

    Raises:
        ValueError, TypeError: what `EmpiricalRisk` or `summary` refuses.

    Cost: that of `summary`, twice.
    """
    of_risk, others = _apart(risk, settings)
    made = EmpiricalRisk(first, loss, data, **of_risk)
    risks = (made, made.with_model(second))
    a, b = (summary(each, measures, progress=progress, **others) for each in risks)
    of_a, of_b = ([numbers_of(each.readings())] for each in (a, b))
    return ModelComparison(
        first=a,
        second=b,
        rows=tuple(compare_readings(of_a, of_b, [None, None])),
        status=Status.worst(a.status, b.status),
        cost=a.cost + b.cost,
        settings=a.settings,
        notes=[
            *(f"first: {note}" for note in a.notes),
            *(f"second: {note}" for note in b.notes),
        ],
    )
