"""Mishkin et al. (2016), section 3.7: batch size with and without a scaled rate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sharpness.lab.training import StoppingCriteria, Training
from sharpness.report.panels import Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, paired, within
from sharpness.reproduce.columns import accuracy, band, metric, pairs, points
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.paper import Item, Paper, paper_numbers
from sharpness.reproduce.runner import ObservationStore

_TEST = metric("test_accuracy_running", 100)


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

    def with_seeds(self, num: int) -> MishkinStudy:
        """The same with so many starting points."""
        return replace(self, num_seeds=num)

    def network_at(self, times: float, scaled: bool, seed: int) -> ModelSpec:
        """A run with `times` the default batch size."""
        drops = ",".join(f"{self.epochs * 0.3125 * k:g}" for k in (1, 2, 3))
        return ModelSpec(
            data=self.data,
            training=Training(
                network=self.network,
                batch_size=int(self.default * times),
                seed=seed,
                optimizer="momentum",
                momentum=0.9,
                learning_rate=self.learning_rate,
                scaling="linear" if scaled and times != 1 else "none",
                base_batch_size=self.default,
                weight_decay=5e-4,
                schedule=f"decay?drops=({drops})&factor=10",
            ),
            budget=StoppingCriteria(epochs=self.epochs),
        )

    def runs(self, scaled: bool) -> list[tuple[float, ModelSpec]]:
        """(batch size, run)."""
        return [
            (self.default * times, self.network_at(times, scaled, seed))
            for times in sorted({1.0, *self.times})
            for seed in range(self.num_seeds)
        ]


def _checks(study: MishkinStudy, store: ObservationStore) -> list[Check]:
    checks = []
    published = paper_numbers("mishkin2016")
    seeds = range(study.num_seeds)
    for times in study.times:
        theirs = {
            scaled: published["accuracy"].get(f"{256 * times:g}", {}).get(name)
            for scaled, name in ((False, "same"), (True, "scaled"))
        }
        default = published["accuracy"]["256"]["same"]

        def networks(
            a: tuple[float, bool], b: tuple[float, bool]
        ) -> list[tuple[ModelSpec, ModelSpec]]:
            return [
                (study.network_at(*a, seed), study.network_at(*b, seed)) for seed in seeds
            ]

        size = f"batch {study.default * times:g} ({times:g} times the default)"
        values = pairs(store, accuracy, _TEST, networks((1, False), (times, False)))
        if times > 1 and values[0]:
            check = paired(
                f"{size}, same rate, test accuracy, %: smaller than the default's",
                *values,
                larger=False,
                ratio=False,
            )
            text = f"{default} → {theirs[False]} (single runs)" if theirs[False] else ""
            checks.append(_told(check, text))
        values = pairs(store, accuracy, _TEST, networks((1, False), (times, True)))
        if values[0]:
            gaps = [b - a for a, b in zip(*values, strict=True)]
            words = f"{size}, scaled rate: within 1 point of the default"
            text = f"{theirs[True] - default:+.1f} (single runs)" if theirs[True] else ""
            checks.append(_told(within(words, gaps, -1, 1), text))
    return checks


def _told(check: Check, paper: str) -> Check:
    """Beside the paper's number; not judged where it has none."""
    return replace(check, paper=paper, verdict=check.verdict if paper else None)


def _panels(study: MishkinStudy, store: ObservationStore) -> list[Panel]:
    curves = []
    for colour, (scaled, label) in enumerate(((True, "scaled rate"), (False, "same rate"))):
        x, y = points(store, accuracy, _TEST, study.runs(scaled))
        if x:
            curves.append(band(label, x, y, colour=colour))
    sizes = sorted({float(x) for curve in curves for x in curve.x})
    return [
        Panel(
            title="",
            x_label="batch size",
            y_label="test accuracy, %",
            curves=curves,
            log_x=True,
            ticks=sizes,
        )
    ]


ITEMS = (
    Item(
        name="figure8",
        title="Figure 8: batch size and learning rate at equal epochs",
        claim="Large batches lose accuracy at an unchanged rate; with the rate scaled in "
        "proportion there is little difference.",
        observations=lambda study: [
            accuracy(n) for scaled in (False, True) for _, n in study.runs(scaled)
        ],
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
    items=ITEMS,
    studies=STUDIES,
)
