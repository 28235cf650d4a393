"""Does a measure survive a reparametrisation? The same function in other parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from sharpness._arguments import of_a_risk
from sharpness._results import Cost, Reading, Result, Status, number
from sharpness.measures.reparametrise import relative_change, reparametrisations
from sharpness.measures.summary import Keywords, summary
from sharpness.risk.empirical import EmpiricalRisk

_TOLERATED = 1e-5  # change of an output, over all samples
_SPREAD = ("standard error", " draws")  # in the evidence of an error that is one
AUDITED = (
    "lambda_max",
    "trace",
    "phi",
    "worst_l2",
    "worst_l2_elementwise",
    "worst_linf_elementwise",
    "worst_l2_filterwise",
    "average",
    "average_elementwise",
    "relative_flatness",
    "norms",
)


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One measure before the maps and after each of them."""

    measure: str
    value: float
    after: dict[str, float]  # by map
    allowed: dict[str, float]  # by map: what the errors of both values allow

    def moved(self, name: str) -> bool:
        """Whether the map of this name has moved the value beyond its error."""
        after = self.after[name]
        if math.isnan(after) or math.isnan(self.value):
            return math.isnan(after) != math.isnan(self.value)
        return abs(after - self.value) > self.allowed[name]

    def times(self, name: str) -> str:
        """`× 3.2`, the factor by which the map has moved it, or `same`."""
        if not self.moved(name):
            return "same"
        after = self.after[name]
        return f"× {after / self.value:.3g}" if self.value else number(after)

    @property
    def verdict(self) -> str:
        """`invariant`, `moved`, or `unknown` where a value is missing."""
        if any(self.moved(name) for name in self.after):
            return "moved"
        values = (self.value, *self.after.values())
        return "invariant" if all(map(math.isfinite, values)) else "unknown"

    @property
    def invariant(self) -> bool:
        """Whether no map has moved it, and all values are there."""
        return self.verdict == "invariant"


@dataclass(frozen=True, kw_only=True)
class Audit(Result):
    """How far each measure moves when the parameters change and the function does not."""

    rows: tuple[AuditRow, ...]
    drifts: dict[str, float]  # by map: largest change of an output over the largest
    layers: dict[str, tuple[str, ...]]  # by map: the layers that were scaled

    def __getitem__(self, measure: str) -> AuditRow:
        return {row.measure: row for row in self.rows}[measure]

    @property
    def invariant(self) -> tuple[str, ...]:
        """The measures that no map has moved."""
        return tuple(row.measure for row in self.rows if row.invariant)

    def _rows(self) -> Iterable[Reading]:
        """For each measure the largest factor by which a map has moved it."""
        for row in self.rows:
            factors = (_factor(row.value, after) for after in row.after.values())
            moved = row.verdict == "moved"
            yield Reading(
                name=f"audit {row.measure}",
                value=max(factors, default=1.0),
                evidence=f"moved by {_movers(row)}" if moved else row.verdict,
                axis="times the value, at most, under maps that keep the function",
            )

    def _line(self) -> str:
        maps = ", ".join(f"{name} (drift {d:.1g})" for name, d in self.drifts.items())
        if not self.drifts:
            return f"audit: no map applies to this network   ({self.cost})"
        moved = (row.measure for row in self.rows if row.verdict == "moved")
        return (
            f"audit under {maps}: invariant are {', '.join(self.invariant) or 'none'}; "
            f"moved are {', '.join(moved)}   ({self.cost})"
        )

    def table(self) -> str:
        """Every measure, and by which factor each map has moved it, as text."""
        from sharpness.report.tables import table_text

        if not self.drifts:
            return f"{self}\n"
        rows = [
            (r.measure, number(r.value), *map(r.times, self.drifts), r.verdict)
            for r in self.rows
        ]
        drifts = (f"{name} {drift:.1g}" for name, drift in self.drifts.items())
        note = f"Largest change of an output: {', '.join(drifts)}."
        return table_text(("measure", "value", *self.drifts, "verdict"), rows, note)


@of_a_risk
def audit(
    risk: EmpiricalRisk,
    measures: str | Sequence[str] | None = None,
    *,
    margin: float = 0.02,
    progress: bool | None = None,
    **settings: Unpack[Keywords],
) -> Audit:
    """Measure a network again after maps that change its parameters, not its function.

    The maps (`reparametrisations`) scale layers and single neurons against each other
    past ReLU and pooling, and weights before BatchNorm with its running statistics
    along; that the outputs stay is checked and reported as drift. A measure that moves
    says something of the parametrisation, not of the function alone (Dinh et al. 2017).
    Measures draw the same random numbers, in units of their own scale, each time.

    Args:
        risk: with a network of modules, and inputs rather than a closure.
        measures: names or families of `summary`; None means the ones that are cheap.
        margin: relative change that counts as none, beside both values' error bounds.
        progress: show a bar for each map; by default on a terminal.
        **settings: of the measures, as in `summary`; `seed` is that of the maps too.

    Returns:
        `Audit`. With no layers that a map applies to (`drifts` is empty), its status is
        `not_available`.

    Raises:
        TypeError: a risk from a closure, or a model that returns no single tensor.

    Cost: the measures once more for each map, at most five times in all.

    References:
        Dinh, Pascanu, Bengio, Bengio (2017), arXiv:1703.04933, theorems 2 and 4.
    """
    began = time.monotonic()
    chosen = list(AUDITED) if measures is None else measures
    settings.setdefault("epsilon", (1e-3,))
    seed = settings.get("seed", 0)
    network = risk.network().eval()
    maps = reparametrisations(network, risk.probe_inputs(), seed=seed)
    others = {each.name: risk.with_model(each.network) for each in maps}
    drifts = {
        name: relative_change(risk.outputs(), other.outputs())
        for name, other in others.items()
    }
    drifts = {name: drift for name, drift in drifts.items() if drift <= _TOLERATED}
    before, status, cost = _values(risk, chosen, settings, progress)
    after: dict[str, dict[str, tuple[float, float]]] = {}
    for name in drifts:
        if status is not Status.INTERRUPTED:
            after[name], status, more = _values(others[name], chosen, settings, progress)
            cost += more
    missing = (math.nan, 0.0)
    rows = tuple(
        AuditRow(
            measure=measure,
            value=value,
            after={name: after[name].get(measure, missing)[0] for name in after},
            allowed={
                name: error + after[name].get(measure, missing)[1] + margin * abs(value)
                for name in after
            },
        )
        for measure, (value, error) in before.items()
    )
    if not drifts:
        status = Status.NOT_AVAILABLE
    return Audit(
        rows=rows if drifts else (),
        drifts={name: drifts[name] for name in drifts if name in after},
        layers={each.name: each.layers for each in maps if each.name in after},
        status=status,
        cost=replace(cost, seconds=time.monotonic() - began),
        settings={**settings, "margin": margin, "seed": seed},
    )


def _values(
    risk: EmpiricalRisk, measures: Any, settings: Keywords, progress: bool | None
) -> tuple[dict[str, tuple[float, float]], Status, Cost]:
    """Value and error of every reading. Draws are shared, so their spread is no error."""
    found = summary(risk, measures, progress=progress, **settings)
    values = {}
    for reading in found.readings():
        is_spread = any(words in reading.evidence for words in _SPREAD)
        values[reading.name] = reading.value, 0.0 if is_spread else reading.error or 0.0
    interrupted = found.status is Status.INTERRUPTED
    return values, Status.INTERRUPTED if interrupted else Status.COMPLETED, found.cost


def _factor(before: float, after: float) -> float:
    """How many times larger or smaller, whichever is at least 1."""
    if before == after:
        return 1.0
    if before * after <= 0:
        return math.inf
    return max(after / before, before / after)


def _movers(row: AuditRow) -> str:
    return ", ".join(
        f"{name} ({_factor(row.value, row.after[name]):.3g}x)"
        for name in row.after
        if row.moved(name)
    )
