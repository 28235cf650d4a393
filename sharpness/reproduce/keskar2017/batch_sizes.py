"""Figure 4: accuracy, phi and lambda_max by batch size."""

from __future__ import annotations

from typing import Any

from sharpness.report.panels import Panel
from sharpness.reproduce.claims import Check
from sharpness.reproduce.columns import accuracy, band, lambda_max, phi, points, trend_of
from sharpness.reproduce.keskar2017.study import BEST_PHI, TEST_ACCURACY, KeskarStudy
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Accuracy
from sharpness.reproduce.paper import Item
from sharpness.reproduce.runner import ObservationStore


def _swept(study: KeskarStudy) -> list[tuple[int, ModelSpec]]:
    return [
        (batch_size, study.network_at(batch_size, seed, study.epochs_swept))
        for batch_size in study.swept
        for seed in range(study.num_swept)
    ]


def _figure4_observations(study: KeskarStudy) -> list[Any]:
    networks = [network for _, network in _swept(study)]
    looks: list[Any] = [Accuracy(of=network) for network in networks]
    return looks + [study.curvature_and_phi(network) for network in networks]


def _figure4(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    """The paper's thresholds are 1 and 2 % of its data: here the larger half of sizes."""
    networks, measured = _swept(study), study.curvature_and_phi
    least = study.swept[len(study.swept) // 2]
    large = [(size, network) for size, network in networks if size >= least]
    words = f"test accuracy falls with batch size, from {least} on"
    checks = trend_of(words, store, accuracy, TEST_ACCURACY, large, rising=False)
    words = "test accuracy over all batch sizes: falls"
    checks += trend_of(
        words, store, accuracy, TEST_ACCURACY, networks, rising=False, judged=False
    )
    words = "phi(1e-3) rises with batch size"
    checks += trend_of(words, store, measured, phi(0), networks, rising=True, best=BEST_PHI)
    words = "lambda_max with batch size (Yao et al. 2018: rises)"
    return checks + trend_of(
        words,
        store,
        measured,
        lambda_max,
        networks,
        rising=True,
        judged=False,
    )


def _figure4_panels(study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    panels = []
    for label, look, pick, log in (
        ("test accuracy, %", accuracy, TEST_ACCURACY, False),
        ("phi(1e-3), %", study.curvature_and_phi, phi(0), True),
        ("lambda_max", study.curvature_and_phi, lambda_max, True),
    ):
        x, y = points(store, look, pick, _swept(study))
        if x:
            panels.append(
                Panel(
                    title="",
                    x_label="batch size",
                    y_label=label,
                    curves=[band("", x, y)],
                    log_x=True,
                    log_y=log,
                    ticks=study.swept,
                )
            )
    return panels


ITEMS = (
    Item(
        name="figure4",
        title="Figure 4: accuracy and phi by batch size",
        claim="Beyond a threshold test accuracy falls with the batch size, and phi rises "
        "up to about there.",
        observations=_figure4_observations,
        checks=_figure4,
        panels=_figure4_panels,
        applies=lambda study: bool(study.swept),
        in_quick=False,
    ),
)
