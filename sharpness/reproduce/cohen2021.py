"""Cohen et al. (2021, 2022): full-batch training goes to the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import pandas as pd

from sharpness.lab.training import StoppingCriteria, Training
from sharpness.report.panels import Curve, Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, Role, holds, within
from sharpness.reproduce.columns import number, panel, retested
from sharpness.reproduce.observations import TrackingRun
from sharpness.reproduce.paper import Item, Paper
from sharpness.reproduce.runner import ObservationStore

Optimizer = Literal["sgd", "adam"]
Runs = Sequence[tuple[float, TrackingRun]]  # (learning rate, run)


@dataclass(frozen=True, kw_only=True)
class CohenStudy(paper.Study):
    """Full-batch training of one network, by gradient descent and by Adam.

    Args:
        num_train: samples, which are the batch.
        rates: learning rates of gradient descent.
        updates: of gradient descent.
        every: updates from one measurement to the next.
        rates_adam: learning rates of Adam.
        updates_adam: of Adam.
    """

    num_train: int
    rates: tuple[float, ...]
    updates: int
    every: int
    rates_adam: tuple[float, ...] = ()
    updates_adam: int = 0

    def descents(self, optimizer: Optimizer) -> list[tuple[float, TrackingRun]]:
        """(learning rate, run) for every rate and starting point."""
        adam = optimizer == "adam"
        return [
            (
                rate,
                TrackingRun(
                    data=self.data,
                    training=Training(
                        network=self.network,
                        batch_size=self.num_train,
                        seed=seed,
                        optimizer=optimizer,
                        learning_rate=rate,
                    ),
                    budget=StoppingCriteria(
                        updates=self.updates_adam if adam else self.updates
                    ),
                    measure="lambda_max_preconditioned" if adam else "lambda_max",
                    every=self.every,
                    num_samples=self.num_train,
                ),
            )
            for rate in (self.rates_adam if adam else self.rates)
            for seed in self.seeds
        ]


def _curve(store: ObservationStore, run: TrackingRun) -> pd.DataFrame:
    """Curvature over its threshold, and the loss, by update, where both are known."""
    facts = store.get(run) or {"steps": [], "values": [], "thresholds": [], "losses": []}
    values = [math.nan if v is None else number(v["value"]) for v in facts["values"]]
    limits = [limit or math.nan for limit in facts["thresholds"]]
    share = np.divide(values, limits)
    found = {"update": facts["steps"], "share": share, "loss": facts["losses"]}
    return pd.DataFrame(found).dropna(subset="share")


def _checks(
    study: CohenStudy, store: ObservationStore, optimizer: Optimizer, name: str
) -> Iterator[Check]:
    """That curvature reaches its threshold is the claim, that it stays there is more."""

    def shares(runs: Runs) -> list[pd.Series]:
        curves = [_curve(store, run)["share"] for _, run in runs]
        return [share for share in curves if len(share)]

    def reaches(runs: Runs) -> Check:
        found = shares(runs) or [pd.Series([math.nan])]
        most, first = [s.max() for s in found], max(s.iloc[0] for s in found)
        number_of, n = sum(share >= 1 for share in most), len(shares(runs))
        return holds(
            f"eta {runs[0][0] if runs else 0:g}: {name} starts below its threshold and "
            "reaches it",
            bool(min(most) >= 1 > first),
            ours=f"at first {first:.2g} of it or less, at most {min(most):.2g} to "
            f"{max(most):.2g}; {number_of} of {n} runs reach it",
            n=n,
        )

    def stays(runs: Runs) -> Check:
        return within(
            f"eta {runs[0][0]:g}: median of {name} over threshold after that: 0.9 to 1.2",
            [s[(s >= 1).cummax()].median() for s in shares(runs) if s.max() >= 1],
            0.9,
            1.2,
            paper="just above 1",
            role=Role.SECONDARY,
        )

    for _, same_rate in groupby(study.descents(optimizer), key=lambda run: run[0]):
        runs = list(same_rate)
        yield retested(reaches, runs, study.seen)
        yield stays(runs)


def _panels(
    study: CohenStudy, store: ObservationStore, optimizer: Optimizer, name: str
) -> list[Panel]:
    first = [run for run in study.descents(optimizer) if run[1].training.seed == 0]
    curves = [
        (f"eta {rate:g}", colour, found)
        for colour, (rate, run) in enumerate(first)
        if len(found := _curve(store, run))
    ]
    if not curves:
        return []

    def drawn(column: str) -> list[Curve]:
        return [
            Curve(
                label=label,
                x=found["update"].tolist(),
                y=found[column].tolist(),
                colour=colour,
            )
            for label, colour, found in curves
        ]

    last = max(found["update"].max() for *_, found in curves)
    edge = Curve(label="stability threshold", x=[0, last], y=[1, 1], colour=6, style="--")
    return [
        panel("update", f"{name} / threshold", [*drawn("share"), edge]),
        panel("update", "loss", drawn("loss"), log_y=True),
    ]


def _item(name: str, title: str, claim: str, optimizer: Optimizer, measure: str) -> Item:
    return Item(
        name=name,
        title=title,
        claim=claim,
        observations=lambda study: [run for _, run in study.descents(optimizer)],
        checks=lambda study, store: _checks(study, store, optimizer, measure),
        panels=lambda study, store: _panels(study, store, optimizer, measure),
        applies=lambda study: bool(study.descents(optimizer)),
    )


ITEMS = (
    _item(
        "gradient-descent",
        "Gradient descent at the edge of stability",
        "Full-batch gradient descent drives lambda_max up to 2 / eta and keeps it there "
        "(Cohen et al. 2021).",
        "sgd",
        "lambda_max",
    ),
    _item(
        "adam",
        "Adam at the adaptive edge of stability",
        "Full-batch Adam drives the preconditioned lambda_max to 38 / eta and keeps it "
        "there (Cohen et al. 2022).",
        "adam",
        "preconditioned lambda_max",
    ),
)

_TANH = "MLP?width=200&out_features=10"
STUDIES = (
    CohenStudy(
        name="tanh-digits",
        preset="quick",
        network="MLP?width=64&out_features=10",
        data="digits[300]",
        reduced="300 digits of 8 x 8 pixels, so that it takes a minute",
        stand_in="digits for CIFAR-10",
        num_seeds=3,
        num_train=300,
        rates=(0.2, 0.4),
        updates=300,
        every=10,
        rates_adam=(1e-3,),
        updates_adam=300,
    ),
    CohenStudy(
        name="tanh-cifar10",
        preset="reduced",
        network=_TANH,
        data="cifar10[300,test=300]",
        reduced="300 of CIFAR-10's images (the paper: 5000), cross-entropy, for two cores",
        num_train=300,
        rates=(0.01,),
        updates=1000,
        every=40,
        seen=3,
    ),
    CohenStudy(
        name="tanh-cifar10-1000",
        preset="reduced",
        network=_TANH,
        data="cifar10[1000,test=300]",
        reduced="1000 of CIFAR-10's images, cross-entropy, for two cores: enough for Adam "
        "to reach its edge before the images are learned",
        num_train=1000,
        rates=(0.01,),
        updates=1600,
        every=40,
        rates_adam=(2e-4,),
        updates_adam=400,
    ),
    CohenStudy(
        name="tanh-cifar10",
        preset="full",
        network=_TANH,
        data="cifar10[5000]",
        num_train=5000,
        rates=(0.01, 0.02, 0.04),
        updates=5000,
        every=25,
        rates_adam=(3e-5, 1e-4),
        updates_adam=5000,
    ),
)

PAPER = Paper(
    name="cohen2021",
    citation="Cohen, Kaur, Li, Kolter, Talwalkar (2021), Gradient Descent on Neural "
    "Networks Typically Occurs at the Edge of Stability, arXiv:2103.00065; for Adam Cohen "
    "et al. (2022), arXiv:2207.14484",
    says="full-batch training drives curvature up to the threshold of stability",
    items=ITEMS,
    studies=STUDIES,
)
