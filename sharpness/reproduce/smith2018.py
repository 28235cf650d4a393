"""Smith et al. (2018): don't decay the learning rate, increase the batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, geometric_mean

from sharpness.lab.regimes import REGIMES
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.report.panels import Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, holds, ratio_within, within
from sharpness.reproduce.columns import (
    Pick,
    accuracy,
    band,
    by_start,
    metric,
    pairs,
    points,
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
        looked_at: epochs; the last is the end.
        ghost: samples that BatchNorm takes its statistics from.
    """

    batch_size: int
    most: int
    drops: tuple[float, ...]
    looked_at: tuple[float, ...]
    ghost: int = 128
    learning_rate: float = 0.1
    augmentation: str = "none"

    def with_seeds(self, num: int) -> SmithStudy:
        """The same with so many starting points."""
        return replace(self, num_seeds=num)

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
            for epochs in self.looked_at
        ]

    def ends(self, kind: str, times: int = 1) -> list[ModelSpec]:
        """The networks at the end."""
        last = self.looked_at[-1]
        return [self.network_at(kind, seed, last, times) for seed in range(self.num_seeds)]


def _accuracies(study: SmithStudy, store: ObservationStore) -> list[Check]:
    checks = []
    published = paper_numbers("smith2018")["accuracy"]
    for name, networks, theirs in (
        ("hybrid", study.ends("hybrid"), None),
        ("increasing batch", study.ends("increase"), "increase"),
        ("increasing batch, rate five times as high", study.ends("increase", 5), "rate"),
    ):
        values = pairs(
            store, accuracy, _TEST, list(zip(study.ends("decay"), networks, strict=True))
        )
        if values[0]:
            gaps = [b - a for a, b in zip(*values, strict=True)]
            words = f"{name}, test accuracy less that of decaying, points: within 1.5"
            text = f"{published[theirs] - published['decay']:+.1f}" if theirs else ""
            check = within(words, gaps, -1.5, 1.5, paper=text)
            ends = f"{fmean(values[0]):.1f} → {fmean(values[1]):.1f} %; {check.ours}"
            checks.append(replace(check, ours=ends))
    return checks


def _curves(study: SmithStudy, store: ObservationStore) -> list[Check]:
    """Do the curves of the training loss by epochs coincide, where they might differ?"""
    loss, checks = metric("train_loss_running"), []
    late = [epochs for epochs in study.looked_at if epochs > study.drops[0]]
    for kind in _KINDS[1:]:
        decay, other = (
            _geometric_means(store, study, name, late, loss) for name in ("decay", kind)
        )
        if decay and len(decay) == len(other):
            words = (
                f"{kind} over decay: training loss after the first drop, mean over epochs: "
                "0.9 to 1.1"
            )
            checks.append(ratio_within(words, decay, other, 0.9, 1.1))
    return checks


def _geometric_means(
    store: ObservationStore,
    study: SmithStudy,
    kind: str,
    epochs: Sequence[float],
    pick: Pick,
) -> list[float]:
    """Over the epochs, for each starting point; none before all were looked at."""
    moments = [one for one in study.moments(kind) if one[0] in epochs]
    _, runs = by_start(store, accuracy, pick, moments)
    means = [0.0 if 0.0 in run else geometric_mean(run) for run in runs]
    return means if all(map(math.isfinite, means)) else []


def _schedules(study: SmithStudy, store: ObservationStore) -> list[Check]:
    return [*_curves(study, store), *_accuracies(study, store)]


def _panels(study: SmithStudy, store: ObservationStore) -> list[Panel]:
    panels = []
    for label, name, times, log in (
        ("training loss", "train_loss_running", 1.0, True),
        ("test accuracy, %", "test_accuracy_running", 100.0, False),
    ):
        curves = []
        for colour, kind in enumerate(_KINDS):
            x, y = points(store, accuracy, metric(name, times), study.moments(kind))
            if x:
                curves.append(band(kind, x, y, colour=colour))
        panels.append(
            Panel(
                title="",
                x_label="epoch",
                y_label=label,
                curves=curves,
                log_y=log,
                marks=study.drops,
            )
        )
    return panels


def _updates(study: SmithStudy, store: ObservationStore) -> list[Check]:
    """Counted for the paper's own sizes; nothing is trained for it."""
    checks = []
    published = paper_numbers("smith2018")["updates"]
    for name, theirs in published.items():
        regime = REGIMES[f"smith2018-{name}"]
        training = Training(
            network="WRN-16-4", batch_size=regime.batch_size or 128, **regime.training
        )
        budget = StoppingCriteria(epochs=regime.epochs)
        count = budget.num_updates(training.course(50_000))
        low, high = theirs["range"]
        words = f"{name}: updates in 200 epochs of CIFAR-10"
        checks.append(
            holds(words, low <= count <= high, ours=str(count), n=1, paper=theirs["text"])
        )
    return checks


ITEMS = (
    Item(
        name="schedules",
        title="Three schedules, one curve",
        claim="Increasing the batch size instead of decaying the rate gives the same "
        "curves by epochs and the same accuracy.",
        observations=lambda study: [
            accuracy(n)
            for n in (
                *(n for kind in _KINDS for _, n in study.moments(kind)),
                *study.ends("increase", 5),
            )
        ],
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
        looked_at=(2, 4, 7, 10),
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
        looked_at=(2, 4, 6, 8, 10, 12),
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
        looked_at=(20, 40, 60, 80, 100, 120, 140, 160, 180, 200),
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
