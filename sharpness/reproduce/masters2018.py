"""Masters & Luschi (2018): batch size against learning rate, SGD without momentum.

Learning rates are given per sample, as in the paper: an update of m samples uses m
times as much ("linear scaling"), so that equal base rates mean equal mean progress.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from sharpness.lab.training import StoppingCriteria, Training
from sharpness.report.panels import Curve, Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, holds, means_by, trend
from sharpness.reproduce.columns import accuracy, band, listed
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

    def with_seeds(self, num: int) -> MastersStudy:
        """The same with so many starting points."""
        return replace(self, num_seeds=num)

    @property
    def seeds(self) -> range:
        """Starting points."""
        return range(self.num_seeds)

    def network_at(self, batch_size: int, rate: float, seed: int, **more: Any) -> ModelSpec:
        """A run of the grid."""
        settings: dict[str, Any] = {
            "network": self.network,
            "schedule": f"decay?drops=({self.epochs / 2:g},{self.epochs * 0.75:g})"
            "&factor=10",
            **more,
        }
        return ModelSpec(
            data=self.data,
            training=Training(
                batch_size=batch_size,
                seed=seed,
                optimizer="sgd",
                learning_rate=rate,
                scaling="linear",
                base_batch_size=1,
                weight_decay=self.weight_decay,
                **settings,
            ),
            budget=StoppingCriteria(epochs=self.epochs),
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


def _test(store: ObservationStore, network: ModelSpec) -> float | None:
    """Test accuracy in percent; 0 where training diverged, None where nobody looked."""
    if store.diverged(accuracy(network)):
        return 0.0
    facts = store.get(accuracy(network))
    return None if facts is None else 100 * facts["metrics"]["test_accuracy_running"]


_Table = dict[int, dict[float, list[float]]]  # batch size -> base rate -> accuracies


def _by_size(study: MastersStudy, store: ObservationStore) -> _Table:
    """Test accuracies over starting points; empty until the whole grid was run."""
    table: _Table = {}
    for size, rate, network in study.grid():
        value = _test(store, network)
        if value is None:
            return {}
        table.setdefault(size, {}).setdefault(rate, []).append(value)
    return table


def _best_of(rows: dict[float, list[float]]) -> list[float]:
    """Best accuracy over rates, by starting point."""
    return [max(values) for values in zip(*rows.values(), strict=True)]


def _best(study: MastersStudy, store: ObservationStore) -> list[Check]:
    table = _by_size(study, store)
    if not table:
        return []
    best = {size: fmean(_best_of(rows)) for size, rows in table.items()}
    most = max(best.values())
    winner = max(size for size in best if best[size] == most)
    n = len(best) * len(study.rates) * study.num_seeds
    sizes = [float(size) for size in best]
    ours = f"best at {winner}: {listed(sizes, list(best.values()))}"
    words = "the best batch size over all rates is 32 or less"
    small = winner <= 32 and most > 3 * study.chance
    checks = [holds(words, small, ours=ours, n=n, paper="2 to 32")]
    large = {size: _best_of(rows) for size, rows in table.items() if size >= 16}
    words = "from 16 on the best accuracy over rates falls with the batch size"
    checks.append(
        trend(words, list(large), list(zip(*large.values(), strict=True)), rising=False)
    )
    return checks


def _trains(study: MastersStudy, rows: dict[float, list[float]]) -> list[float]:
    """Base rates at which the network learned something."""
    return [rate for rate, values in rows.items() if fmean(values) > 3 * study.chance]


def _range(study: MastersStudy, store: ObservationStore) -> list[Check]:
    table = _by_size(study, store)
    if not table:
        return []
    trains = {size: _trains(study, rows) for size, rows in table.items()}
    none = math.log2(min(study.rates)) - 1  # below all that were tried
    largest = {
        size: math.log2(max(rates)) if rates else none for size, rates in trains.items()
    }
    shown = ", ".join(
        f"2^{largest[size]:g} ({size})" if rates else f"none ({size})"
        for size, rates in trains.items()
    )
    words = "the largest base rate that trains falls with the batch size"
    sizes, exponents = list(largest), list(largest.values())
    return [trend(words, sizes, [exponents], rising=False, ours=shown)]


def _grid_panels(study: MastersStudy, store: ObservationStore) -> list[Panel]:
    table = _by_size(study, store)
    if not table:
        return []
    by_rate = [
        Curve(
            label=f"batch {size}",
            x=list(rows),
            y=[fmean(values) for values in rows.values()],
            colour=colour,
        )
        for colour, (size, rows) in enumerate(table.items())
    ]
    means = [fmean(_best_of(rows)) for rows in table.values()]
    best = Curve(label="", x=list(table), y=means)
    return [
        Panel(
            title="0 %: diverged",
            x_label="base learning rate (per sample)",
            y_label="test accuracy, %",
            curves=by_rate,
            log_x=True,
        ),
        Panel(
            title="",
            x_label="batch size",
            y_label="best test accuracy over rates, %",
            curves=[best],
            log_x=True,
            ticks=list(table),
        ),
    ]


def _ghost_points(
    study: MastersStudy, store: ObservationStore
) -> dict[int, tuple[list[float], list[float]]]:
    found: dict[int, tuple[list[float], list[float]]] = {}
    for size, ghost, network in study.ghostly():
        value = _test(store, network)
        if value is not None:
            x, y = found.setdefault(size, ([], []))
            x.append(float(ghost))
            y.append(value)
    return found


def _ghosts(study: MastersStudy, store: ObservationStore) -> list[Check]:
    checks = []
    for size, (x, y) in _ghost_points(study, store).items():
        sizes, means, _, _ = means_by(x, y)
        wanted = [ghost for ghost in study.ghosts if ghost <= size]
        if len(x) < len(wanted) * study.num_seeds or max(sizes) <= 8:
            continue
        best = max(zip(means, sizes, strict=True))[1]
        words = f"SGD batch {size}: the best BatchNorm batch is 8 or less"
        ours = f"best at {best:g}: {listed(x, y)}"
        checks.append(holds(words, best <= 8, ours=ours, n=len(x), paper="4 or 8"))
    return checks


def _ghost_panels(study: MastersStudy, store: ObservationStore) -> list[Panel]:
    curves = [
        band(f"SGD batch {size}", x, y, colour=colour)
        for colour, (size, (x, y)) in enumerate(_ghost_points(study, store).items())
    ]
    label = "samples of BatchNorm's statistics"
    return [
        Panel(
            title="",
            x_label=label,
            y_label="test accuracy, %",
            curves=curves,
            log_x=True,
            ticks=study.ghosts,
        )
    ]


def _warm(study: MastersStudy, store: ObservationStore) -> list[Check]:
    table = _by_size(study, store)
    warm: dict[float, list[float]] = {}
    for rate, network in study.warmed():
        value = _test(store, network)
        if value is None or not table:
            return []
        warm.setdefault(rate, []).append(value)
    last = study.batch_sizes[-1]
    best = max(
        (fmean(_best_of(rows)) for size, rows in table.items() if size <= 32), default=0.0
    )
    with_it, without = fmean(_best_of(warm)), fmean(_best_of(table[last]))
    words = f"with warm-up a batch of {last} stays below the best small batch"
    ours = f"{with_it:.3g} % with, {without:.3g} % without; small batch {best:.3g} %"
    n = len(study.rates) * study.num_seeds
    return [holds(words, with_it < best, ours=ours, n=n)]


ITEMS = (
    Item(
        name="grid",
        title="Accuracy by batch size and base learning rate",
        claim="At equal epochs the best accuracy is had with a batch of 2 to 32.",
        observations=lambda study: [accuracy(n) for _, _, n in study.grid()],
        checks=_best,
        panels=_grid_panels,
    ),
    Item(
        name="stable-range",
        title="The range of learning rates that train",
        claim="Smaller batches train over a wider range of base learning rates.",
        observations=lambda study: [accuracy(n) for _, _, n in study.grid()],
        checks=_range,
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
    items=ITEMS,
    studies=STUDIES,
)
