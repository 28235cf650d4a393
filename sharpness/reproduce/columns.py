"""Numbers picked from observations: what findings are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from sharpness.report.panels import Curve
from sharpness.reproduce.claims import Check, by_both_solvers, means_by, trend
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Accuracy, Measured
from sharpness.reproduce.runner import ObservationStore

Facts = dict[str, Any]
Pick = Callable[[Facts], float]
Look = Callable[[ModelSpec], Accuracy | Measured]


def pairs(
    store: ObservationStore,
    look: Look,
    pick: Pick,
    networks: Sequence[tuple[ModelSpec, ModelSpec]],
    other_look: Look | None = None,
) -> tuple[list[float], list[float]]:
    """A number of both networks of each pair that has been looked at.

    The second one may have been looked at in another way.
    """
    other = other_look or look
    found = [(store.get(look(a)), store.get(other(b))) for a, b in networks]
    picked = [(pick(a), pick(b)) for a, b in found if a is not None and b is not None]
    known = [(a, b) for a, b in picked if math.isfinite(a) and math.isfinite(b)]
    return [a for a, _ in known], [b for _, b in known]


def metric(name: str, times: float = 1.0) -> Pick:
    """One of a training's metrics."""
    return lambda facts: times * float(facts["metrics"][name])


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


def accuracy(network: ModelSpec) -> Accuracy:
    """Look at how its training ended."""
    return Accuracy(of=network)


def points(
    store: ObservationStore,
    look: Look,
    pick: Pick,
    networks: Sequence[tuple[float, ModelSpec]],
) -> tuple[list[float], list[float]]:
    """(x, number) of each network that has been looked at."""
    found = [(x, store.get(look(network))) for x, network in networks]
    picked = [(x, pick(facts)) for x, facts in found if facts is not None]
    known = [(x, y) for x, y in picked if math.isfinite(y)]
    return [x for x, _ in known], [y for _, y in known]


def trend_of(
    claim: str,
    store: ObservationStore,
    look: Look,
    pick: Pick,
    networks: Sequence[tuple[float, ModelSpec]],
    *,
    rising: bool,
    best: Pick | None = None,
    judged: bool = True,
) -> list[Check]:
    """Does a number rise with x? Nothing before one starting point has been looked at.

    Where the best value found is given as well, it must share the verdict.
    """
    at, runs = by_start(store, look, pick, networks)
    shown = listed(*points(store, look, pick, networks))
    check = trend(claim, at, runs, rising=rising, ours=shown, judged=judged)
    if not check.n:
        return []
    if best is None:
        return [check]
    others = by_start(store, look, best, networks)
    return [by_both_solvers(check, trend(claim, *others, rising=rising))]


def by_start(
    store: ObservationStore,
    look: Look,
    pick: Pick,
    networks: Sequence[tuple[float, ModelSpec]],
) -> tuple[list[float], list[list[float]]]:
    """Every x, and for each starting point the number there; NaN where there is none."""
    at = sorted({x for x, _ in networks})
    found: dict[int, dict[float, float]] = {}
    for x, network in networks:
        facts = store.get(look(network))
        row = found.setdefault(network.training.seed, {})
        row[x] = math.nan if facts is None else pick(facts)
    return at, [[row.get(x, math.nan) for x in at] for row in found.values()]


def band(label: str, x: Sequence[float], y: Sequence[float], **style: Any) -> Curve:
    """Means by x, with the range of the runs."""
    at, mean, low, high = means_by(x, y)
    return Curve(label=label, x=at, y=mean, low=low, high=high, **style)


def listed(x: Sequence[float], y: Sequence[float]) -> str:
    """`94.1 (32), 93.0 (100)`: the mean at each x."""
    at, means, _, _ = means_by(x, y)
    return ", ".join(f"{mean:.3g} ({a:g})" for a, mean in zip(at, means, strict=True))
