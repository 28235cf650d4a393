"""Cohen et al. (2021, 2022): full-batch training goes to the edge of stability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from sharpness.lab.training import StoppingCriteria, Training
from sharpness.report.panels import Curve, Panel
from sharpness.reproduce import paper
from sharpness.reproduce.claims import Check, holds, within
from sharpness.reproduce.observations import TrackingRun
from sharpness.reproduce.paper import Item, Paper
from sharpness.reproduce.runner import ObservationStore


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

    def with_seeds(self, num: int) -> CohenStudy:
        """The same with so many starting points."""
        return replace(self, num_seeds=num)

    def descents(
        self, optimizer: Literal["sgd", "adam"]
    ) -> list[tuple[float, TrackingRun]]:
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
            for seed in range(self.num_seeds)
        ]


def _curve(facts: dict[str, Any]) -> list[tuple[int, float, float]]:
    """(update, curvature over its threshold, loss) wherever both are known."""
    rows = zip(
        facts["steps"], facts["values"], facts["thresholds"], facts["losses"], strict=True
    )
    return [
        (step, value["value"] / limit, loss)
        for step, value, limit, loss in rows
        if value is not None and limit and value["value"] is not None
    ]


def _after_crossing(curve: Sequence[tuple[int, float, float]]) -> float | None:
    """The median of curvature over threshold, once it has reached the threshold."""
    shares = [share for _, share, _ in curve]
    first = next((i for i, share in enumerate(shares) if share >= 1), None)
    return None if first is None else median(shares[first:])


def _checks(
    study: CohenStudy, store: ObservationStore, optimizer: Literal["sgd", "adam"], name: str
) -> list[Check]:
    checks = []
    rates = study.rates_adam if optimizer == "adam" else study.rates
    for rate in rates:
        runs = [store.get(run) for at, run in study.descents(optimizer) if at == rate]
        curves = [curve for facts in runs if facts and (curve := _curve(facts))]
        if not curves:
            continue
        most = [max(share for _, share, _ in curve) for curve in curves]
        first, n = max(curve[0][1] for curve in curves), len(curves)
        words = f"eta {rate:g}: {name} starts below its threshold and reaches it"
        ours = (
            f"at first {first:.2g} of it or less, at most {min(most):.2g} to "
            f"{max(most):.2g}; {sum(m >= 1 for m in most)} of {n} runs reach it"
        )
        checks.append(holds(words, min(most) >= 1 > first, ours=ours, n=n))
        after = [m for curve in curves if (m := _after_crossing(curve)) is not None]
        words = f"eta {rate:g}: median of {name} over threshold after that: 0.9 to 1.2"
        if after:
            checks.append(within(words, after, 0.9, 1.2, paper="just above 1"))
    return checks


def _panels(
    study: CohenStudy, store: ObservationStore, optimizer: Literal["sgd", "adam"], name: str
) -> list[Panel]:
    shares, losses = [], []
    for colour, (rate, run) in enumerate(
        (rate, run) for rate, run in study.descents(optimizer) if run.training.seed == 0
    ):
        facts = store.get(run)
        curve = _curve(facts) if facts else []
        if not curve:
            continue
        steps, values = [c[0] for c in curve], [c[1] for c in curve]
        label = f"eta {rate:g}"
        shares.append(Curve(label=label, x=steps, y=values, colour=colour, style=".-"))
        values = [c[2] for c in curve]
        losses.append(Curve(label=label, x=steps, y=values, colour=colour, style=".-"))
    if not shares:
        return []
    last = max(max(curve.x) for curve in shares)
    edge = Curve(label="stability threshold", x=[0, last], y=[1, 1], colour=6, style="--")
    return [
        Panel(
            title="",
            x_label="update",
            y_label=f"{name} / threshold",
            curves=[*shares, edge],
        ),
        Panel(title="", x_label="update", y_label="loss", curves=losses, log_y=True),
    ]


def _item(
    name: str, title: str, claim: str, optimizer: Literal["sgd", "adam"], measure: str
) -> Item:
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
    items=ITEMS,
    studies=STUDIES,
)
