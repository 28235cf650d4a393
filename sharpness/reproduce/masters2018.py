"""Masters & Luschi (2018): batch size against learning rate, SGD without momentum.

Learning rates are given per sample, as in the paper: an update of m samples uses m
times as much ("linear scaling"), so that equal base rates mean equal mean progress.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sharpness.report.panels import Curve, Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, Role, holds, trend
from sharpness.reproduce.columns import (
    TEST_ACCURACY_RUNNING,
    accuracy,
    band,
    listed,
    panel,
    read,
    table,
)
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.paper import Item, Paper
from sharpness.reproduce.runner import ObservationStore


@dataclass(frozen=True, kw_only=True)
class MastersStudy(paper.Study):
    """A grid of batch sizes and base learning rates.

    Args:
        batch_sizes: of SGD.
        rates: base rates, per sample.
        epochs: for every run; the rate falls tenfold after half and three quarters.
        normalised: the same network with BatchNorm.
        ghosts: samples that BatchNorm takes its statistics from.
        batch_sizes_ghost: batch sizes of SGD for them.
        rate_ghost: base rate of those runs.
        weight_decay: added to gradients.
        chance: accuracy of a guess, %; a run has trained if it is beyond three times it.
    """

    batch_sizes: tuple[int, ...]
    rates: tuple[float, ...]
    epochs: float
    normalised: str
    ghosts: tuple[int, ...] = ()
    batch_sizes_ghost: tuple[int, ...] = ()
    rate_ghost: float = 0.0
    weight_decay: float = 1e-4
    chance: float = 10.0
    num_seeds: int = 1

    def network_at(self, batch_size: int, rate: float, seed: int, **more: Any) -> ModelSpec:
        """A run of the grid."""
        schedule = f"decay?drops=({self.epochs / 2:g},{self.epochs * 0.75:g})&factor=10"
        return self.trained(
            self.epochs,
            batch_size=batch_size,
            seed=seed,
            optimizer="sgd",
            learning_rate=rate,
            scaling="linear",
            base_batch_size=1,
            weight_decay=self.weight_decay,
            **{"schedule": schedule, **more},
        )

    def grid(self) -> list[tuple[int, float, ModelSpec]]:
        """(batch size, base rate, run)."""
        return [
            (batch_size, rate, self.network_at(batch_size, rate, seed))
            for batch_size in self.batch_sizes
            for rate in self.rates
            for seed in self.seeds
        ]

    def ghostly(self) -> list[tuple[int, int, ModelSpec]]:
        """(batch size of SGD, of BatchNorm, run)."""
        return [
            (
                size,
                ghost,
                self.network_at(
                    size,
                    self.rate_ghost,
                    seed,
                    network=self.normalised,
                    ghost_batch_size=ghost,
                ),
            )
            for size in self.batch_sizes_ghost
            for ghost in self.ghosts
            if ghost <= size
            for seed in self.seeds
        ]

    def warmed(self) -> list[tuple[float, ModelSpec]]:
        """(base rate, run) of the largest batch with warm-up over 5 % of the epochs."""
        drops = f"({self.epochs / 2:g},{self.epochs * 0.75:g})"
        warm = f"decay?drops={drops}&factor=10&warmup={self.epochs / 20:g}"
        return [
            (rate, self.network_at(self.batch_sizes[-1], rate, seed, schedule=warm))
            for rate in self.rates
            for seed in self.seeds
        ]


def _by_rate(study: MastersStudy, store: ObservationStore) -> pd.Series:
    """Test accuracy by batch size, base rate and starting point; 0 where diverged."""
    return pd.Series(
        {
            (size, rate, network.training.seed): read(
                store, accuracy(network), TEST_ACCURACY_RUNNING, 0.0
            )
            for size, rate, network in study.grid()
        }
    ).rename_axis(["size", "rate", "start"])


def _best_of(found: pd.Series) -> pd.DataFrame:
    """Best accuracy over rates: a row for each starting point, a column for each size."""
    return found.groupby(level=[2, 0]).max().unstack()


def _best(study: MastersStudy, store: ObservationStore) -> Iterator[Check]:
    found = _by_rate(study, store)
    best = _best_of(found)
    means = best.mean()
    winner = means[means == means.max()].index.max()
    yield holds(
        "the best batch size over all rates is 32 or less",
        bool(winner <= 32 and means.max() > 3 * study.chance),
        ours=f"best at {winner}: {listed(best)}",
        n=len(best),
        paper="2 to 32",
    )
    large = best[[size for size in best if size >= 16]]
    yield trend(
        "from 16 on the best accuracy over rates falls with the batch size",
        large.columns.tolist(),
        large.to_numpy(),
        rising=False,
        role=Role.SECONDARY,
    )


def _range(study: MastersStudy, store: ObservationStore) -> Iterator[Check]:
    """By starting point; below all rates that were tried where none trains."""
    found = _by_rate(study, store).reset_index(name="y")
    none = math.log2(min(study.rates)) - 1
    found["exponent"] = np.log2(found["rate"]).where(found["y"] > 3 * study.chance, none)
    largest = found.groupby(["start", "size"])["exponent"].max().unstack()
    shown = ", ".join(
        f"2^{mean:g} ({size})" if mean > none else f"none ({size})"
        for size, mean in largest.mean().items()
    )
    yield trend(
        "the largest base rate that trains falls with the batch size",
        largest.columns.tolist(),
        largest.to_numpy(),
        rising=False,
        ours=shown,
    )


def _grid_panels(study: MastersStudy, store: ObservationStore) -> list[Panel]:
    found = _by_rate(study, store)
    means, best = found.groupby(level=[0, 1]).mean().unstack(), _best_of(found).mean()
    x = means.columns.tolist()
    by_rate = [
        Curve(label=f"batch {size}", x=x, y=row.tolist(), colour=colour)
        for colour, (size, row) in enumerate(means.iterrows())
    ]
    x_label, y_label = "base learning rate (per sample)", "test accuracy, %"
    sizes, title = best.index.tolist(), "0 %: diverged"
    of_best = [Curve(label="", x=sizes, y=best.tolist())]
    return [
        panel(x_label, y_label, by_rate, log_x=True, title=title),
        panel(
            "batch size",
            "best test accuracy over rates, %",
            of_best,
            log_x=True,
            ticks=sizes,
        ),
    ]


def _by_ghost(study: MastersStudy, store: ObservationStore) -> dict[int, pd.DataFrame]:
    """For each batch size of SGD the accuracy by that of BatchNorm."""
    return {
        size: table(
            store,
            accuracy,
            TEST_ACCURACY_RUNNING,
            [(ghost, network) for of, ghost, network in study.ghostly() if of == size],
            diverged=0.0,
        )
        for size in study.batch_sizes_ghost
    }


def _ghosts(study: MastersStudy, store: ObservationStore) -> Iterator[Check]:
    for size, found in _by_ghost(study, store).items():
        if found.isna().any(axis=None) or max(found.columns) <= 8:
            continue
        means = found.mean()
        best = means[means == means.max()].index.max()
        yield holds(
            f"SGD batch {size}: the best BatchNorm batch is 8 or less",
            best <= 8,
            ours=f"best at {best:g}: {listed(found)}",
            n=len(found),
            paper="4 or 8",
        )


def _ghost_panels(study: MastersStudy, store: ObservationStore) -> list[Panel]:
    curves = [
        band(f"SGD batch {size}", found, colour=colour)
        for colour, (size, found) in enumerate(_by_ghost(study, store).items())
    ]
    return [
        panel(
            "samples of BatchNorm's statistics",
            "test accuracy, %",
            curves,
            log_x=True,
            ticks=study.ghosts,
        )
    ]


def _warm(study: MastersStudy, store: ObservationStore) -> Iterator[Check]:
    found = _by_rate(study, store)
    warm = table(store, accuracy, TEST_ACCURACY_RUNNING, study.warmed(), diverged=0.0)
    best, last = _best_of(found).mean(), study.batch_sizes[-1]
    small = best[best.index <= 32].max()
    with_it, without = warm.max(axis="columns").mean(), best[last]
    yield holds(
        f"with warm-up a batch of {last} stays below the best small batch",
        bool(with_it < small),
        ours=f"{with_it:.3g} % with, {without:.3g} % without; small batch {small:.3g} %",
        n=len(warm),
    )


ITEMS = (
    Item(
        name="grid",
        title="Accuracy by batch size and base learning rate",
        claim="At equal epochs the best accuracy is had with a batch of 2 to 32.",
        observations=lambda study: [accuracy(n) for _, _, n in study.grid()],
        checks=_best,
        all_or_none=True,
        panels=_grid_panels,
    ),
    Item(
        name="stable-range",
        title="The range of learning rates that train",
        claim="Smaller batches train over a wider range of base learning rates.",
        observations=lambda study: [accuracy(n) for _, _, n in study.grid()],
        checks=_range,
        all_or_none=True,
    ),
    Item(
        name="bn-batch",
        title="BatchNorm's batch apart from SGD's",
        claim="BatchNorm does best with few samples (4 or 8), whatever the batch of SGD.",
        observations=lambda study: [accuracy(n) for _, _, n in study.ghostly()],
        checks=_ghosts,
        panels=_ghost_panels,
        applies=lambda study: bool(study.ghosts),
        in_quick=False,
    ),
    Item(
        name="warm-up",
        title="Gradual warm-up",
        claim="Warm-up does not bring the largest batches back.",
        observations=lambda study: [
            accuracy(n)
            for n in (*(n for _, n in study.warmed()), *(n for *_, n in study.grid()))
        ],
        checks=_warm,
        all_or_none=True,
        in_quick=False,
    ),
)

_DIGITS = "digits of 8 x 8 pixels for CIFAR-10"
STUDIES = (
    MastersStudy(
        name="ResNet-8-digits",
        preset="quick",
        network="ResNet-8?batchnorm=False",
        data="digits",
        reduced="digits, 6 epochs for the paper's 82, so that it takes minutes",
        stand_in=_DIGITS,
        batch_sizes=(8, 32, 128, 512),
        rates=tuple(2.0**k for k in (-10, -8, -6)),
        epochs=6,
        num_seeds=2,
        normalised="ResNet-8",
    ),
    MastersStudy(
        name="ResNet-8-cifar10",
        preset="reduced",
        network="ResNet-8?batchnorm=False",
        data="cifar10[2000,test=2000]",
        reduced="2000 of CIFAR-10's 50 000 training images, 10 epochs for 82, accuracy at "
        "the end for the median of the last 5 epochs, for two cores",
        batch_sizes=(4, 16, 64, 256, 1000),
        rates=tuple(2.0**k for k in (-14, -12, -10, -8, -7, -6)),
        epochs=10,
        normalised="ResNet-8",
        ghosts=(4, 16, 64, 256),
        batch_sizes_ghost=(64, 256),
        rate_ghost=2.0**-8,
    ),
    *(
        MastersStudy(
            name=f"{network}-cifar10",
            preset="full",
            network=f"{network}?batchnorm=False",
            data="cifar10",
            batch_sizes=tuple(2**k for k in range(1, 12)),
            rates=tuple(2.0**k for k in range(-12, 1)),
            epochs=82,
            normalised=network,
            ghosts=(2, 4, 8, 16, 32, 64),
            batch_sizes_ghost=(16, 64, 256),
            rate_ghost=2.0**-8,
            weight_decay=decay,
            num_seeds=3,
        )
        for network, decay in (("AlexNet", 5e-4), ("ResNet-8", 1e-4), ("ResNet-20", 1e-4))
    ),
)

PAPER = Paper(
    name="masters2018",
    citation="Masters, Luschi (2018), Revisiting Small Batch Training for Deep Neural "
    "Networks, arXiv:1804.07612",
    says="the smallest batches generalise best, over the widest range of rates",
    items=ITEMS,
    studies=STUDIES,
)
