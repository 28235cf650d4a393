"""Smith et al. (2018): don't decay the learning rate, increase the batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd

from sharpness.lab.regimes import REGIMES
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.report.panels import Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, Role, holds, paired, ratio_within, within
from sharpness.reproduce.columns import (
    TEST_ACCURACY_RUNNING,
    accuracy,
    band_panels,
    metric,
    observed,
    pairs,
    retested,
    table,
)
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.paper import Item, Paper, paper_numbers
from sharpness.reproduce.runner import ObservationStore

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
        return self.trained(
            epochs,
            batch_size=self.batch_size * times,
            seed=seed,
            optimizer="momentum",
            momentum=momentum,
            learning_rate=self.learning_rate * times,
            weight_decay=5e-4,
            schedule=f"{kind}?drops=({drops})&factor=5{most}",
            ghost_batch_size=self.ghost,
            augmentation=self.augmentation,
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
    loss = metric("train_loss_running")
    published = paper_numbers("smith2018")["accuracy"]

    def means(kind: str) -> pd.Series:
        """Geometric means over the late epochs, by starting point; of whole runs."""
        late = [run for run in study.moments(kind) if run[0] > study.drops[0]]
        with np.errstate(divide="ignore"):  # the mean of what has a 0 is 0
            logs = np.log(table(store, accuracy, loss, late))
        return np.exp(logs.mean(axis="columns", skipna=False)).dropna()

    def coincides(kind: str, runs: Sequence[tuple[float, ModelSpec]]) -> Check:
        both = pd.concat([means("decay"), means(kind)], axis="columns").dropna()
        starts = {network.training.seed for _, network in runs}
        first, second = both[both.index.isin(starts)].T.to_numpy().tolist()
        return ratio_within(
            f"{kind} over decay: training loss after the first drop, mean over epochs: "
            "0.9 to 1.1",
            first,
            second,
            0.9,
            1.1,
            role=Role.SECONDARY,
        )

    for name, networks, theirs, role in (
        ("increasing batch", study.ends("increase"), "increase", Role.PRIMARY),
        ("hybrid", study.ends("hybrid"), None, Role.SECONDARY),
        (
            "increasing batch, rate five times as high",
            study.ends("increase", 5),
            "rate",
            Role.SECONDARY,
        ),
    ):
        found = zip(study.ends("decay"), networks, strict=True)
        first, second = pairs(store, accuracy, TEST_ACCURACY_RUNNING, found)
        yield replace(
            within(
                f"{name}, test accuracy less that of decaying, points: within 1.5",
                np.subtract(second, first).tolist(),
                -1.5,
                1.5,
                paper=f"{published[theirs] - published['decay']:+.1f}" if theirs else "",
                role=role,
            ),
            ours=paired("", first, second, ratio=False).ours,
        )
    for kind in _KINDS[1:]:
        yield retested(partial(coincides, kind), study.moments(kind), study.seen)


def _panels(study: SmithStudy, store: ObservationStore) -> list[Panel]:
    quantities = (
        ("training loss", accuracy, metric("train_loss_running"), True),
        ("test accuracy, %", accuracy, TEST_ACCURACY_RUNNING, False),
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
        yield holds(
            words, low <= count <= high, ours=str(count), n=1, paper=text, counted=True
        )


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
        seen=3,
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
    says="growing the batch does what decaying the rate does",
    items=ITEMS,
    studies=STUDIES,
)
