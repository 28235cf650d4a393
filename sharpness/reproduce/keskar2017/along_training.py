"""Figures 2 and 6: accuracy and phi along training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sharpness.report.panels import Curve, Panel
from sharpness.reproduce.claims import Check, by_both_solvers, paired, ratio_within, within
from sharpness.reproduce.columns import band, pairs, phi
from sharpness.reproduce.keskar2017.study import BEST_PHI, ROLES, KeskarStudy, Role
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Accuracy
from sharpness.reproduce.paper import Item
from sharpness.reproduce.runner import ObservationStore


def _figure2_observations(study: KeskarStudy) -> list[Any]:
    return [
        Accuracy(of=network)
        for role in ROLES
        for run in study.followed(role)
        for network in run
    ]


def _accuracies(store: ObservationStore, run: list[ModelSpec], name: str) -> list[float]:
    found = [store.get(Accuracy(of=network)) for network in run]
    return [100 * facts["metrics"][name] for facts in found if facts is not None]


def _figure2(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    """Would stopping the large batch early have helped?"""
    runs = study.followed("large")
    curves = [_accuracies(store, run, "test_accuracy_batch") for run in runs]
    lost = [max(c) - c[-1] for c in curves if len(c) == len(study.epochs_large)]
    if not lost:
        return []
    words = (
        "large batch: best test accuracy along training less the last, points: 0.25 or less"
    )
    return [within(words, lost, -math.inf, 0.25, paper="no peak is seen")]


def _figure2_panels(study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    curves = []
    for colour, role in enumerate(ROLES):
        for split, style in (("test", "o-"), ("train", "o:")):
            runs = study.followed(role)
            values = [_accuracies(store, run, f"{split}_accuracy_batch") for run in runs]
            full = [v for v in values if len(v) == len(study.epochs(role))]
            flat = [value for run in full for value in run]
            if full:
                epochs = [*study.epochs(role)] * len(full)
                label = f"{role} batch, {split}"
                curves.append(band(label, epochs, flat, colour=colour, style=style))
    return [
        Panel(title="", x_label="epoch", y_label="accuracy, %", curves=curves, log_x=True)
    ]


def _figure6_observations(study: KeskarStudy) -> list[Any]:
    return [
        study.phi(network)
        for role in ROLES
        for run in study.followed(role)
        for network in run
    ]


def _figure6_points(
    study: KeskarStudy, store: ObservationStore, role: Role
) -> list[tuple[float, float]]:
    """(training loss, phi) of every followed network, in order of the loss."""
    looks = [store.get(study.phi(n)) for run in study.followed(role) for n in run]
    return sorted((f["value"], phi(0)(f)) for f in looks if f)


def _figure6(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    """From the first look to the last, by starting point."""
    checks = []
    for role in ROLES[::-1]:
        moments = [(run[0], run[-1]) for run in study.followed(role)]
        values, best = (
            pairs(store, study.phi, pick, moments) for pick in (phi(0), BEST_PHI)
        )
        if not values[0]:
            continue
        words = f"{role} batch: phi(1e-3), %, first look → last: "
        if role == "large":
            check, found = (paired(f"{words}larger", *v) for v in (values, best))
        else:
            check, found = (_hardly_grows(words, *v) for v in (values, best))
        checks.append(by_both_solvers(check, found))
    return checks


def _hardly_grows(words: str, first: list[float], last: list[float]) -> Check:
    change = ratio_within(f"{words}at most half as large again", first, last, high=1.5)
    shown = paired(words, first, last, judged=False)
    return replace(change, ours=f"{shown.ours}; {change.ours}")


def _figure6_panels(study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    curves = [
        Curve(
            label=f"{role} batch",
            x=[loss for loss, _ in points],
            y=[value for _, value in points],
            colour=colour,
            style="o",
        )
        for colour, role in enumerate(ROLES)
        if (points := _figure6_points(study, store, role))
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
