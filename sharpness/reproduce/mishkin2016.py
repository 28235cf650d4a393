"""Mishkin et al. (2016), section 3.7: batch size with and without a scaled rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sharpness.report.panels import Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, Role, paired, within
from sharpness.reproduce.columns import (
    TEST_ACCURACY_RUNNING,
    accuracy,
    band_panels,
    observed,
    pairs,
)
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.paper import Item, Paper, paper_numbers
from sharpness.reproduce.runner import ObservationStore


@dataclass(frozen=True, kw_only=True)
class MishkinStudy(paper.Study):
    """Batch sizes at equal epochs, with one rate for all and with a scaled one.

    Args:
        default: batch size that the rate belongs to.
        times: batch sizes, as multiples of it.
        epochs: for every run; the rate falls tenfold after each 31 % of them.
    """

    default: int
    times: tuple[float, ...]
    epochs: float
    learning_rate: float = 0.01

    def network_at(self, times: float, scaled: bool, seed: int) -> ModelSpec:
        """A run with `times` the default batch size."""
        drops = ",".join(f"{self.epochs * 0.3125 * k:g}" for k in (1, 2, 3))
        return self.trained(
            self.epochs,
            batch_size=int(self.default * times),
            seed=seed,
            optimizer="momentum",
            momentum=0.9,
            learning_rate=self.learning_rate,
            scaling="linear" if scaled and times != 1 else "none",
            base_batch_size=self.default,
            weight_decay=5e-4,
            schedule=f"decay?drops=({drops})&factor=10",
        )

    def runs(self, scaled: bool) -> list[tuple[float, ModelSpec]]:
        """(batch size, run)."""
        return [
            (self.default * times, self.network_at(times, scaled, seed))
            for times in sorted({1.0, *self.times})
            for seed in self.seeds
        ]


def _checks(study: MishkinStudy, store: ObservationStore) -> Iterator[Check]:
    """The claim is on the largest batch at an unchanged rate that the paper has."""
    published = paper_numbers("mishkin2016")["accuracy"]
    default = published["256"]["same"]
    theirs = {times: published.get(f"{256 * times:g}", {}) for times in study.times}
    largest = max((times for times in theirs if "same" in theirs[times]), default=0)

    def values(times: float, scaled: bool) -> tuple[list[float], list[float]]:
        networks = [
            (study.network_at(1, False, seed), study.network_at(times, scaled, seed))
            for seed in study.seeds
        ]
        return pairs(store, accuracy, TEST_ACCURACY_RUNNING, networks)

    for times, numbers in theirs.items():
        size = f"batch {study.default * times:g} ({times:g} times the default)"
        if times > 1:
            same = numbers.get("same")
            words = f"{size}, same rate, test accuracy, %: smaller than the default's"
            check = paired(words, *values(times, False), larger=False, ratio=False)
            text = f"{default} → {same} (single runs)" if same else ""
            yield _told(check, text, Role.PRIMARY if times == largest else Role.SECONDARY)
        scaled, (first, second) = numbers.get("scaled"), values(times, True)
        gaps = np.subtract(second, first).tolist()
        words = f"{size}, scaled rate: within 1 point of the default"
        text = f"{scaled - default:+.1f} (single runs)" if scaled else ""
        yield _told(within(words, gaps, -1, 1), text, Role.SECONDARY)


def _told(check: Check, paper: str, role: Role) -> Check:
    """Beside the paper's number; not judged where it has none."""
    return replace(check, paper=paper, role=role if paper else Role.BEYOND)


def _panels(study: MishkinStudy, store: ObservationStore) -> list[Panel]:
    groups = [("scaled rate", 0, study.runs(True)), ("same rate", 1, study.runs(False))]
    quantities = [("test accuracy, %", accuracy, TEST_ACCURACY_RUNNING, False)]
    return band_panels(
        store,
        "batch size",
        quantities,
        groups,
        log_x=True,
        ticks=sorted({x for x, _ in study.runs(True)}),
    )


ITEMS = (
    Item(
        name="figure8",
        title="Figure 8: batch size and learning rate at equal epochs",
        claim="Large batches lose accuracy at an unchanged rate; with the rate scaled in "
        "proportion there is little difference.",
        observations=lambda study: observed(
            [network for scaled in (False, True) for _, network in study.runs(scaled)],
            accuracy,
        ),
        checks=_checks,
        panels=_panels,
    ),
)

_FOR_IMAGENET = "CIFAR-10 and the reduced AlexNet for ImageNet and CaffeNet"
STUDIES = (
    MishkinStudy(
        name="ResNet-8-digits",
        preset="quick",
        network="ResNet-8",
        data="digits",
        reduced="ResNet-8 on digits of 8 x 8 pixels, so that it takes minutes",
        stand_in="digits and ResNet-8 for ImageNet and CaffeNet",
        num_seeds=2,
        default=32,
        times=(4,),
        epochs=4,
    ),
    MishkinStudy(
        name="AlexNet-cifar10",
        preset="reduced",
        network="AlexNet",
        data="cifar10[2000,test=2000]",
        reduced="2000 of CIFAR-10's 50 000 training images, 10 epochs, for two cores",
        stand_in=_FOR_IMAGENET,
        default=32,
        times=(4, 16),
        epochs=10,
    ),
    MishkinStudy(
        name="AlexNet-cifar10",
        preset="full",
        network="AlexNet",
        data="cifar10",
        stand_in=_FOR_IMAGENET,
        default=256,
        times=(0.125, 0.25, 0.5, 2, 4, 8),
        epochs=64,
    ),
)

PAPER = Paper(
    name="mishkin2016",
    citation="Mishkin, Sergievskiy, Matas (2016), Systematic evaluation of CNN advances on "
    "the ImageNet, arXiv:1606.02228",
    says="large batches lose accuracy unless the rate grows with them",
    items=ITEMS,
    studies=STUDIES,
)
