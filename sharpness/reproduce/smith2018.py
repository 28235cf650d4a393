"""Smith et al. (2018): don't decay the learning rate, increase the batch size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from sharpness.lab.regimes import REGIMES
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.report.panels import Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, holds, ratio_within, within
from sharpness.reproduce.columns import (
    accuracy,
    band_panels,
    metric,
    observed,
    pairs,
    table,
)
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.paper import Item, Paper, paper_numbers
from sharpness.reproduce.runner import ObservationStore

_TEST = metric("test_accuracy_running", 100)
_KINDS = ("decay", "hybrid", "increase")


@dataclass(frozen=True, kw_only=True)
class SmithStudy(paper.Study):
    """One network under the three schedules of equal noise scale, and two faster ones.

    Args:
        batch_size: at the start.
        most: batch size from which the rate is decayed instead, a tenth of the data.
        drops: epochs at which the noise scale falls fivefold.
        observed_at: epochs; the last is the end.
        ghost: samples that BatchNorm takes its statistics from.
    """

    batch_size: int
    most: int
    drops: tuple[float, ...]
    observed_at: tuple[float, ...]
    ghost: int = 128
    learning_rate: float = 0.1
    augmentation: str = "none"

    def network_at(
        self, kind: str, seed: int, epochs: float, times: int = 1, momentum: float = 0.9
    ) -> ModelSpec:
        """A moment of a run; `times` the batch size goes with `times` the rate."""
        drops = ",".join(f"{drop:g}" for drop in self.drops)
        most = "" if kind == "decay" else f"&max_batch_size={self.most}"
        return ModelSpec(
            data=self.data,
            training=Training(
                network=self.network,
                batch_size=self.batch_size * times,
                seed=seed,
                optimizer="momentum",
                momentum=momentum,
                learning_rate=self.learning_rate * times,
                weight_decay=5e-4,
                schedule=f"{kind}?drops=({drops})&factor=5{most}",
                ghost_batch_size=self.ghost,
                augmentation=self.augmentation,
            ),
            budget=StoppingCriteria(epochs=epochs),
        )

    def moments(self, kind: str) -> list[tuple[float, ModelSpec]]:
        """(epoch, moment) of every starting point."""
        return [
            (epochs, self.network_at(kind, seed, epochs))
            for seed in range(self.num_seeds)
            for epochs in self.observed_at
        ]

    def ends(self, kind: str, times: int = 1) -> list[ModelSpec]:
        """The networks at the end."""
        last = self.observed_at[-1]
        return [self.network_at(kind, seed, last, times) for seed in self.seeds]


def _schedules(study: SmithStudy, store: ObservationStore) -> Iterator[Check]:
    """Do the curves coincide, where they might differ, and the accuracies at the end?"""
    loss, late = metric("train_loss_running"), study.observed_at
    late = tuple(epochs for epochs in late if epochs > study.drops[0])

    def means(kind: str) -> list[float]:
        """Geometric, over the epochs: of each starting point; before that NaN."""
        runs = [run for run in study.moments(kind) if run[0] in late]
        with np.errstate(divide="ignore"):  # the mean of what has a 0 is 0
            logs = np.log(table(store, accuracy, loss, runs))
        found = np.exp(logs.mean(axis="columns", skipna=False)).dropna()
        return list(found)

    for kind in _KINDS[1:]:
        decay, other = means("decay"), means(kind)
        whole = len(decay) == len(other) == study.num_seeds
        words = (
            f"{kind} over decay: training loss after the first drop, mean over epochs: "
            "0.9 to 1.1"
        )
        if whole:
            yield ratio_within(words, decay, other, 0.9, 1.1)
    published = paper_numbers("smith2018")["accuracy"]
    for name, networks, theirs in (
        ("hybrid", study.ends("hybrid"), None),
        ("increasing batch", study.ends("increase"), "increase"),
        ("increasing batch, rate five times as high", study.ends("increase", 5), "rate"),
    ):
        found = zip(study.ends("decay"), networks, strict=True)
        first, second = pairs(store, accuracy, _TEST, found)
        if first:
            gaps = [b - a for a, b in zip(first, second, strict=True)]
            words = f"{name}, test accuracy less that of decaying, points: within 1.5"
            text = f"{published[theirs] - published['decay']:+.1f}" if theirs else ""
            check = within(words, gaps, -1.5, 1.5, paper=text)
            ends = f"{fmean(first):.1f} → {fmean(second):.1f} %; {check.ours}"
            yield replace(check, ours=ends)


def _panels(study: SmithStudy, store: ObservationStore) -> list[Panel]:
    quantities = (
        ("training loss", accuracy, metric("train_loss_running"), True),
        ("test accuracy, %", accuracy, _TEST, False),
    )
    groups = [(kind, colour, study.moments(kind)) for colour, kind in enumerate(_KINDS)]
    return band_panels(store, "epoch", quantities, groups, marks=study.drops)


def _updates(study: SmithStudy, store: ObservationStore) -> Iterator[Check]:
    """Counted for the paper's own sizes; nothing is trained for it."""
    for name, theirs in paper_numbers("smith2018")["updates"].items():
        regime = REGIMES[f"smith2018-{name}"]
        training = Training(
            network="WRN-16-4", batch_size=regime.batch_size or 128, **regime.training
        )
        budget = StoppingCriteria(epochs=regime.epochs)
        count, (low, high) = budget.num_updates(training.course(50_000)), theirs["range"]
        words, text = f"{name}: updates in 200 epochs of CIFAR-10", theirs["text"]
        yield holds(words, low <= count <= high, ours=str(count), n=1, paper=text)


ITEMS = (
    Item(
        name="schedules",
        title="Three schedules, one curve",
        claim="Increasing the batch size instead of decaying the rate gives the same "
        "curves by epochs and the same accuracy.",
        observations=lambda study: observed(
            (
                *(network for kind in _KINDS for _, network in study.moments(kind)),
                *study.ends("increase", 5),
            ),
            accuracy,
        ),
        checks=_schedules,
        panels=_panels,
    ),
    Item(
        name="updates",
        title="The number of updates (counted, nothing trained)",
        claim="The schedules need ever fewer updates.",
        observations=lambda study: [],
        checks=_updates,
    ),
)

_FOR_WIDE = "ResNet-8 for the wide ResNet 16-4"
STUDIES = (
    SmithStudy(
        name="ResNet-8-digits",
        preset="quick",
        network="ResNet-8",
        data="digits",
        reduced="digits of 8 x 8 pixels, 10 epochs for 200, so that it takes minutes",
        stand_in=f"digits for CIFAR-10 and {_FOR_WIDE}",
        num_seeds=2,
        batch_size=8,
        most=140,
        drops=(3, 6, 8),
        observed_at=(2, 4, 7, 10),
        ghost=8,
        learning_rate=0.05,
    ),
    SmithStudy(
        name="ResNet-8-cifar10",
        preset="reduced",
        network="ResNet-8",
        data="cifar10[2000,test=2000]",
        reduced="2000 of CIFAR-10's 50 000 training images, 12 epochs for 200, batch 16 "
        f"for 128, no augmentation, {_FOR_WIDE}: for two cores",
        num_seeds=3,
        batch_size=16,
        most=200,
        drops=(4, 7, 10),
        observed_at=(2, 4, 6, 8, 10, 12),
        ghost=16,
    ),
    SmithStudy(
        name="WRN-16-4-cifar10",
        preset="full",
        network="WRN-16-4",
        data="cifar10",
        batch_size=128,
        most=5120,
        drops=(60, 120, 160),
        observed_at=(20, 40, 60, 80, 100, 120, 140, 160, 180, 200),
        augmentation="crop-flip",
    ),
)

PAPER = Paper(
    name="smith2018",
    citation="Smith, Kindermans, Ying, Le (2018), Don't Decay the Learning Rate, Increase "
    "the Batch Size, arXiv:1711.00489",
    items=ITEMS,
    studies=STUDIES,
)
