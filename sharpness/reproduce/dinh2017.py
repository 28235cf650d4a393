"""Dinh et al. (2017): sharpen a minimum at will without changing its function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sharpness.report.panels import Curve, Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, Role, holds
from sharpness.reproduce.columns import Pick, adaptive_rise, lambda_max, panel, phi
from sharpness.reproduce.observations import Rescaled
from sharpness.reproduce.paper import Item, Paper
from sharpness.reproduce.runner import ObservationStore

_GROWS = "grows more than tenfold"
# Name, how it is read, what it does, the paper's words, and its role.
_MEASURES: tuple[tuple[str, Pick, str, str, Role], ...] = (
    ("lambda_max", lambda_max, _GROWS, "at will", Role.PRIMARY),
    ("phi(1e-3), full space", phi(0), _GROWS, "at will", Role.SECONDARY),
    (
        "phi(1e-3), 100 normal columns",
        phi(0, of="phi_normal"),
        "moves",
        "could not be shown",
        Role.BEYOND,
    ),
    (
        "worst rise, adaptive l2 ball",
        adaptive_rise,
        "stays (Kwon et al. 2021)",
        "",
        Role.BEYOND,
    ),
)


@dataclass(frozen=True, kw_only=True)
class DinhStudy(paper.Study):
    """Trained networks whose first layer is scaled up and whose last is scaled down."""

    batch_size: int
    epochs: float
    factors: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0)
    num_samples: int = 500

    def rescaled(self) -> list[Rescaled]:
        """One for each starting point."""
        return [
            Rescaled(
                of=self.trained(self.epochs, batch_size=self.batch_size, seed=seed),
                factors=self.factors,
                measures=("lambda_max", "phi", "phi_normal", "adaptive"),
                num_samples=self.num_samples,
            )
            for seed in self.seeds
        ]


def _found(study: DinhStudy, store: ObservationStore) -> list[list[dict[str, Any]]]:
    return [facts["points"] for run in study.rescaled() if (facts := store.get(run))]


def _checks(study: DinhStudy, store: ObservationStore) -> Iterator[Check]:
    """That the function stays is the premise; the claim is on the first measure."""
    runs, most = _found(study, store), max(study.factors)
    n, drifts = len(runs), [point["drift"] for run in runs for point in run]
    yield holds(
        f"scaled by up to {most:g} the function stays",
        max(drifts, default=math.nan) < 1e-4,
        ours=f"outputs move by {max(drifts, default=math.nan):.1g}",
        n=n,
        role=Role.PREMISE,
    )
    for name, pick, moved, theirs, role in _MEASURES:
        ratios = [_ratio(pick, run[0], run[-1]) for run in runs]
        known = [ratio for ratio in ratios if math.isfinite(ratio)]
        yield holds(
            f"{name}: {moved}",
            all(ratio > 10 for ratio in ratios),  # also not from 0
            ours=f"{min(known):.3g}× to {max(known):.3g}×" if known else "from 0",
            n=n,
            paper=theirs,
            role=role,
        )


def _ratio(pick: Pick, before: dict[str, Any], after: dict[str, Any]) -> float:
    return pick(after) / pick(before) if pick(before) else math.nan


def _panels(study: DinhStudy, store: ObservationStore) -> list[Panel]:
    curves = [
        Curve(
            label="" if i else name,
            x=[point["factor"] for point in run],
            y=[_ratio(pick, run[0], point) for point in run],
            colour=colour,
        )
        for colour, (name, pick, *_) in enumerate(_MEASURES)
        for i, run in enumerate(_found(study, store))
    ]
    x_label, y_label = (
        "factor of the first layer",
        "measure, relative to the trained network",
    )
    return [panel(x_label, y_label, curves, log_x=True, log_y=True, ticks=study.factors)]


ITEMS = (
    Item(
        name="rescaling",
        title="Theorem 4: minima sharpened by rescaling",
        claim="Scaling one layer up and a later one down leaves the function and makes "
        "curvature and epsilon-sharpness as large as one likes.",
        observations=DinhStudy.rescaled,
        checks=_checks,
        panels=_panels,
    ),
)

STUDIES = (
    DinhStudy(
        name="F1-mnist",
        preset="quick",
        network="F1",
        data="mnist5k",
        reduced="networks of keskar2017's quick preset, BatchNorm on running statistics",
        num_seeds=2,
        batch_size=32,
        epochs=20,
        factors=(1.0, 16.0),
    ),
    DinhStudy(
        name="F1-mnist",
        preset="reduced",
        network="F1",
        data="mnist[5000]",
        reduced="networks of the reduced preset of keskar2017, BatchNorm on running "
        "statistics; the paper proves, and measures nothing",
        num_seeds=3,
        batch_size=32,
        epochs=20,
    ),
    DinhStudy(
        name="C1-cifar10",
        preset="full",
        network="C1",
        data="cifar10",
        num_seeds=3,
        batch_size=256,
        epochs=100,
    ),
)

PAPER = Paper(
    name="dinh2017",
    citation="Dinh, Pascanu, Bengio, Bengio (2017), Sharp Minima Can Generalize For Deep "
    "Nets, arXiv:1703.04933",
    says="scaling layers makes a minimum as sharp as one likes, and leaves the function",
    items=ITEMS,
    studies=STUDIES,
)
