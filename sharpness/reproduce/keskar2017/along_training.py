"""Figures 2 and 6: accuracy and phi along training."""

from __future__ import annotations

from typing import Any

from sharpness.claims import Check, by_both_solvers, not_shown, trend, within
from sharpness.report.panels import Curve, Panel
from sharpness.reproduce.keskar2017.study import ROLES, Role, Study
from sharpness.reproduce.looks import band, phi
from sharpness.reproduce.observations import Accuracy
from sharpness.reproduce.paper import Item
from sharpness.reproduce.trained import Trained
from sharpness.reproduce.workshop import Seen


def _figure2_observations(study: Study) -> list[Any]:
    return [
        Accuracy(of=network)
        for role in ROLES
        for run in study.followed(role)
        for network in run
    ]


def _accuracies(seen: Seen, run: list[Trained], name: str) -> list[float]:
    found = [seen.get(Accuracy(of=network)) for network in run]
    return [100 * facts["metrics"][name] for facts in found if facts is not None]


def _figure2(study: Study, seen: Seen) -> list[Check]:
    """Would stopping the large batch early have helped?"""
    runs = study.followed("large")
    curves = [_accuracies(seen, run, "test_accuracy_batch") for run in runs]
    lost = [max(c) - c[-1] for c in curves if len(c) == len(study.epochs_large)]
    if not lost:
        return []
    words = "large batch: best test accuracy along training less the last, points"
    return [within(words, lost, -0.01, 0.25, paper="no peak is seen")]


def _figure2_panels(study: Study, seen: Seen) -> list[Panel]:
    curves = []
    for colour, role in enumerate(ROLES):
        for split, style in (("test", "o-"), ("train", "o:")):
            runs = study.followed(role)
            values = [_accuracies(seen, run, f"{split}_accuracy_batch") for run in runs]
            full = [v for v in values if len(v) == len(study.epochs(role))]
            flat = [value for run in full for value in run]
            if full:
                epochs = [*study.epochs(role)] * len(full)
                label = f"{role} batch, {split}"
                curves.append(band(label, epochs, flat, colour=colour, style=style))
    return [
        Panel(title="", x_label="epoch", y_label="accuracy, %", curves=curves, log_x=True)
    ]


def _figure6_observations(study: Study) -> list[Any]:
    return [
        study.phi(network)
        for role in ROLES
        for run in study.followed(role)
        for network in run
    ]


def _figure6_points(
    study: Study, seen: Seen, role: Role, name: str = "phi_protocol"
) -> list[tuple[float, float]]:
    """(training loss, phi) of every followed network, in order of the loss."""
    looks = [seen.get(study.phi(n)) for run in study.followed(role) for n in run]
    return sorted((f["value"], phi(0, name)(f)) for f in looks if f)


def _figure6(study: Study, seen: Seen) -> list[Check]:
    """Over all networks that were looked at, of all followed starting points."""

    def growth(words: str, role: Role, name: str, rising: bool) -> Check | None:
        found = _figure6_points(study, seen, role, name)
        if len(found) < 3:
            return None
        falling, values = [-loss for loss, _ in found], [value for _, value in found]
        return trend(words, falling, values, rising=rising)

    checks = []
    words = "large batch: phi(1e-3) grows as the loss falls"
    protocol, best = (
        growth(words, "large", name, True) for name in ("phi_protocol", "phi")
    )
    if protocol and best:
        checks.append(by_both_solvers(protocol, best))
    words = "small batch: phi(1e-3) does not grow as the loss falls"
    grown = growth(words, "small", "phi_protocol", True)
    if grown:
        checks.append(not_shown(grown))
    return checks


def _figure6_panels(study: Study, seen: Seen) -> list[Panel]:
    curves = [
        Curve(
            label=f"{role} batch",
            x=[loss for loss, _ in points],
            y=[value for _, value in points],
            colour=colour,
            style="o",
        )
        for colour, role in enumerate(ROLES)
        if (points := _figure6_points(study, seen, role))
    ]
    return [
        Panel(
            title="",
            x_label="cross-entropy on the training set",
            y_label="phi(1e-3), %",
            curves=curves,
            log_x=True,
            log_y=True,
        )
    ]


ITEMS = (
    Item(
        name="figure2",
        title="Figure 2: accuracy along training",
        claim="Test accuracy rises and levels off: stopping early would not help.",
        observations=_figure2_observations,
        checks=_figure2,
        panels=_figure2_panels,
    ),
    Item(
        name="figure6",
        title="Figure 6: phi against the loss along training",
        claim="As the loss falls phi grows in large-batch training and not in small-batch "
        "training.",
        observations=_figure6_observations,
        checks=_figure6,
        panels=_figure6_panels,
    ),
)
