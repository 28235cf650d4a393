"""Figure 5: large batches after an epoch or more of small ones."""

from __future__ import annotations

import math
from typing import Any

from sharpness.report.panels import Panel
from sharpness.reproduce.claims import Check, by_both_solvers, ratio_within, within
from sharpness.reproduce.columns import accuracy, band, pairs, phi, points, trend_of
from sharpness.reproduce.keskar2017.study import BEST_PHI, TEST_ACCURACY, KeskarStudy
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Accuracy
from sharpness.reproduce.paper import Item
from sharpness.reproduce.runner import ObservationStore


def _warm(study: KeskarStudy) -> list[tuple[float, ModelSpec]]:
    """(epochs of small batch before, large-batch network); 0 is a cold start."""
    found = []
    for seed in range(study.num_warm):
        found.append((0.0, study.at("large", seed, study.epochs_warm)))
        for epochs in study.epochs_small:
            start = study.at("small", seed, epochs)
            found.append((epochs, study.at("large", seed, study.epochs_warm, start=start)))
    return found


def _figure5_observations(study: KeskarStudy) -> list[Any]:
    networks = [network for _, network in _warm(study)]
    looks: list[Any] = [Accuracy(of=network) for network in networks]
    looks += [study.phi(network) for network in networks]
    small = [n for run in study.followed("small")[: study.num_warm] for n in run]
    looks += [Accuracy(of=network) for network in small]
    return looks + [study.phi(network) for network in small]


def _figure5(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    networks = _warm(study)
    words = "test accuracy rises with the epochs before"
    checks = trend_of(words, store, accuracy, TEST_ACCURACY, networks, rising=True)
    words = "phi(1e-3) falls with the epochs before"
    checks += trend_of(
        words, store, study.phi, phi(0), networks, rising=False, best=BEST_PHI
    )
    last = study.epochs_small[-1]
    warm = [(network.start, network) for epochs, network in networks if epochs == last]
    starts = [(start, network) for start, network in warm if start is not None]
    values = pairs(store, accuracy, TEST_ACCURACY, starts)
    if values[0]:
        gains = [b - a for a, b in zip(*values, strict=True)]
        words = (
            f"after {last:g}: test accuracy less the small batch's, points: -0.5 or more"
        )
        checks.append(within(words, gains, -0.5, math.inf))
    words = f"after {last:g}: phi(1e-3) over the small batch's: 1 or less"
    values, best = (pairs(store, study.phi, pick, starts) for pick in (phi(0), BEST_PHI))
    if values[0]:
        flat, flattest = (ratio_within(words, *v, high=1) for v in (values, best))
        checks.append(by_both_solvers(flat, flattest))
    return checks


def _figure5_panels(study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    small = [
        (network.budget.epochs or 0.0, network)
        for run in study.followed("small")[: study.num_warm]
        for network in run
    ]
    panels = []
    for label, look, pick, log in (
        ("test accuracy, %", accuracy, TEST_ACCURACY, False),
        ("phi(1e-3), %", study.phi, phi(0), True),
    ):
        curves = []
        warm = points(store, look, pick, _warm(study))
        if warm[0]:
            curves.append(band("large batch, warm start", *warm, colour=1))
        before = points(store, look, pick, small)
        if before[0]:
            curves.append(band("small batch, before", *before, colour=0))
        panels.append(
            Panel(
                title="",
                x_label="epochs of small-batch training before",
                y_label=label,
                curves=curves,
                log_y=log,
            )
        )
    return panels


ITEMS = (
    Item(
        name="figure5",
        title="Figure 5: large batch after a warm start with small batches",
        claim="After enough epochs of small batches the large batch reaches as good and as "
        "flat minima.",
        observations=_figure5_observations,
        checks=_figure5,
        panels=_figure5_panels,
        applies=lambda study: study.epochs_warm > 0,
        in_quick=False,
    ),
)
