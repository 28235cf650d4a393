"""Numbers picked from observations: what findings and pictures are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from sharpness.report.panels import Curve, Panel
from sharpness.reproduce.claims import Check, Role, by_both_solvers, trend
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Accuracy, Measured, Observation
from sharpness.reproduce.runner import ObservationStore

Facts = dict[str, Any]
Pick = Callable[[Facts], float]
Observe = Callable[[ModelSpec], Accuracy | Measured]
Runs = Iterable[tuple[float, ModelSpec]]  # (x, network)


def metric(name: str, times: float = 1.0) -> Pick:
    """One of a training's metrics."""
    return lambda facts: times * float(facts["metrics"][name])


TEST_ACCURACY_RUNNING = metric("test_accuracy_running", 100)  # percent


def phi(i: int, name: str = "phi_protocol", of: str = "phi") -> Pick:
    """Phi for the i-th epsilon: by the protocol, or the best found."""
    return lambda facts: number(facts[of][i][name])


def number(value: float | None) -> float:
    """As it was: a record has null for NaN."""
    return math.nan if value is None else float(value)


def lambda_max(facts: Facts) -> float:
    """The largest eigenvalue."""
    return number(facts["lambda_max"]["eigenvalues"][0])


def adaptive_rise(facts: Facts) -> float:
    """The worst rise in the element-wise adaptive ball."""
    return number(facts["adaptive"]["value"])


def distance(facts: Facts) -> float:
    """Of the parameters from where training began."""
    return number(facts["distance_from_start"])


def accuracy(network: ModelSpec) -> Accuracy:
    """Its loss and accuracy as training ended."""
    return Accuracy(of=network)


def observed(networks: Iterable[ModelSpec], *ways: Observe) -> list[Observation]:
    """Every network, observed in each of these ways."""
    networks = list(networks)
    return [observe(network) for observe in ways for network in networks]


def read(
    store: ObservationStore,
    observation: Observation,
    pick: Pick,
    diverged: float = math.nan,
) -> float:
    """A number of an observation; NaN where there is none yet."""
    if store.diverged(observation):
        return diverged
    facts = store.get(observation)
    return math.nan if facts is None else pick(facts)


def pairs(
    store: ObservationStore,
    observe: Observe,
    pick: Pick,
    networks: Iterable[tuple[ModelSpec, ModelSpec]],
    observe_second: Observe | None = None,
) -> tuple[list[float], list[float]]:
    """A number of both networks of each pair, where both have one.

    The second one may be observed in another way.
    """
    other = observe_second or observe
    numbers = [
        (read(store, observe(a), pick), read(store, other(b), pick)) for a, b in networks
    ]
    found = _finite(pd.DataFrame(numbers, columns=["first", "second"])).dropna()
    return found["first"].tolist(), found["second"].tolist()


def table(
    store: ObservationStore,
    observe: Observe,
    pick: Pick,
    runs: Runs,
    diverged: float = math.nan,
) -> pd.DataFrame:
    """A number of every run: a row for each starting point, a column for each x."""
    rows = [
        (network.training.seed, x, read(store, observe(network), pick, diverged))
        for x, network in runs
    ]
    found = pd.DataFrame(rows, columns=["start", "x", "y"])
    return _finite(found.pivot(index="start", columns="x", values="y"))


def _finite(found: pd.DataFrame) -> pd.DataFrame:
    return found.astype(float).replace([math.inf, -math.inf], math.nan)


def trend_of(
    claim: str,
    store: ObservationStore,
    observe: Observe,
    pick: Pick,
    runs: Runs,
    *,
    rising: bool,
    role: Role = Role.PRIMARY,
) -> Check:
    """Does a number rise (or fall) with x, within starting points?"""
    found = table(store, observe, pick, runs)
    ours, x = listed(found), found.columns.tolist()
    return trend(claim, x, found.to_numpy(), rising=rising, ours=ours, role=role)


def by_solvers(judge: Callable[[Pick], Check], i: int = 0) -> Check:
    """A claim on phi, judged by the protocol; the best value found must agree."""
    return by_both_solvers(judge(phi(i)), judge(phi(i, "phi")))


Run = tuple[Any, Any]  # (x, network), or two networks of one starting point


def retested(judge: Callable[[list[Any]], Check], runs: Iterable[Run], seen: int) -> Check:
    """A claim whose predicate was changed when `seen` starting points were known.

    All are shown; p and verdict are those of the starting points that came after.
    """
    runs = list(runs)
    shown = judge(runs)
    if not seen:
        return shown
    new = judge([run for run in runs if run[1].training.seed >= seen])
    return replace(
        new,
        claim=shown.claim,
        ours=shown.ours,
        paper=shown.paper,
        n=shown.n,
        num_new=new.n,
    )


def listed(found: pd.DataFrame) -> str:
    """`94.1 (32), 93.0 (100)`: the mean at each x."""
    means = found.mean().dropna()
    return ", ".join(f"{mean:.3g} ({x:g})" for x, mean in means.items())


def band(label: str, found: pd.DataFrame, **style: Any) -> Curve:
    """Means by x, with the range over starting points."""
    found = found.dropna(axis="columns", how="all")
    low, high = found.min().tolist(), found.max().tolist()
    x, y = found.columns.tolist(), found.mean().tolist()
    return Curve(label=label, x=x, y=y, low=low, high=high, **style)


def panel(x_label: str, y_label: str, curves: Iterable[Curve], **style: Any) -> Panel:
    """Those of the curves that have points."""
    drawn = [curve for curve in curves if len(curve.x)]
    return Panel(**{"title": "", **style}, x_label=x_label, y_label=y_label, curves=drawn)


Quantity = tuple[str, Observe, Pick, bool]  # name, how it is read, logarithmic scale


def band_panels(
    store: ObservationStore,
    x_label: str,
    quantities: Sequence[Quantity],
    groups: Sequence[tuple[str, int, Runs]],
    **style: Any,
) -> list[Panel]:
    """A panel for each quantity, with a band for each (label, colour, runs)."""
    return [
        panel(
            x_label,
            name,
            [
                band(label, table(store, observe, pick, runs), colour=colour)
                for label, colour, runs in groups
            ],
            log_y=log_y,
            **style,
        )
        for name, observe, pick, log_y in quantities
    ]
