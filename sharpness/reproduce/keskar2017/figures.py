"""The figures: along training, by batch size, after a warm start, between both minima."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from sharpness.report.panels import Curve, Panel
from sharpness.reproduce.claims import Check, Role, paired, ratio_within, within
from sharpness.reproduce.columns import (
    Pick,
    Runs,
    accuracy,
    band,
    band_panels,
    by_solvers,
    lambda_max,
    metric,
    observed,
    pairs,
    panel,
    phi,
    retested,
    table,
    trend_of,
)
from sharpness.reproduce.keskar2017.study import (
    ROLES,
    TEST_ACCURACY,
    BatchRole,
    KeskarStudy,
    Pair,
)
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import InterpolationRun, Observation
from sharpness.reproduce.paper import Item, paper_numbers
from sharpness.reproduce.runner import ObservationStore


def _followed(study: KeskarStudy) -> list[ModelSpec]:
    return [network for role in ROLES for _, network in study.followed(role)]


def _networks(runs: Runs) -> list[ModelSpec]:
    return [network for _, network in runs]


# -- figure 2 ----------------------------------------------------------------------------


def _figure2(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    """Would stopping the large batch early have helped?"""
    curves = table(store, accuracy, TEST_ACCURACY, study.followed("large")).dropna()
    lost = curves.max(axis="columns") - curves.iloc[:, -1]
    return [
        within(
            "large batch: best test accuracy along training less the last, points: "
            "0.25 or less",
            lost.tolist(),
            -math.inf,
            0.25,
            paper="no peak is seen",
        )
    ]


def _figure2_panels(study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    curves = []
    for colour, role in enumerate(ROLES):
        for split, style in (("test", "o-"), ("train", "o:")):
            pick = metric(f"{split}_accuracy_batch", 100)
            whole = table(store, accuracy, pick, study.followed(role)).dropna()
            curves.append(band(f"{role} batch, {split}", whole, colour=colour, style=style))
    return [panel("epoch", "accuracy, %", curves, log_x=True)]


# -- figure 6 ----------------------------------------------------------------------------


def _first_and_last(study: KeskarStudy, role: BatchRole) -> list[Pair]:
    first, *_, last = study.epochs(role)
    seeds = range(study.num_followed)
    return [(study.at(role, seed, first), study.at(role, seed, last)) for seed in seeds]


def _by_solvers_on_new(
    judge: Callable[[list[Pair], Pick], Check], runs: list[Pair], study: KeskarStudy
) -> Check:
    return retested(lambda some: by_solvers(partial(judge, some)), runs, study.seen)


def _figure6(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    """From the first observation to the last, by starting point."""

    def grows(runs: list[Pair], pick: Pick) -> Check:
        values = pairs(store, study.phi, pick, runs)
        return paired("large batch: phi(1e-3), %, first → last: larger", *values)

    def hardly_grows(runs: list[Pair], pick: Pick) -> Check:
        values = pairs(store, study.phi, pick, runs)
        words = "small batch: phi(1e-3), %, first → last: at most half as large again"
        change = ratio_within(words, *values, high=1.5, role=Role.SECONDARY)
        return replace(change, ours=paired(words, *values).ours)

    yield _by_solvers_on_new(grows, _first_and_last(study, "large"), study)
    yield _by_solvers_on_new(hardly_grows, _first_and_last(study, "small"), study)


def _figure6_panels(study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    curves = []
    for colour, role in enumerate(ROLES):
        facts = [store.get(study.phi(network)) for _, network in study.followed(role)]
        points = sorted((found["value"], phi(0)(found)) for found in facts if found)
        x, y = [loss for loss, _ in points], [value for _, value in points]
        curves.append(Curve(label=f"{role} batch", x=x, y=y, colour=colour, style="o"))
    return [
        panel(
            "cross-entropy on the training set",
            "phi(1e-3), %",
            curves,
            log_x=True,
            log_y=True,
        )
    ]


# -- figure 4 ----------------------------------------------------------------------------


def _swept(study: KeskarStudy) -> list[tuple[int, ModelSpec]]:
    return [
        (batch_size, study.network_at(batch_size, seed, study.epochs_swept))
        for batch_size in study.swept
        for seed in range(study.num_swept)
    ]


def _figure4(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    """The paper's thresholds are 1 and 2 % of its data: here the larger half of sizes."""
    runs, measured = _swept(study), study.curvature_and_phi
    least = study.swept[len(study.swept) // 2]

    def asked(words: str, pick: Pick, rising: bool, role: Role, some: Runs = runs) -> Check:
        observe = accuracy if pick is TEST_ACCURACY else measured
        return trend_of(words, store, observe, pick, some, rising=rising, role=role)

    words = "phi(1e-3) rises with batch size"
    yield by_solvers(lambda pick: asked(words, pick, True, Role.PRIMARY))
    yield retested(
        lambda some: asked(
            f"test accuracy falls with batch size, from {least} on",
            TEST_ACCURACY,
            False,
            Role.SECONDARY,
            some,
        ),
        [run for run in runs if run[0] >= least],
        study.seen,
    )
    words = "test accuracy over all batch sizes: falls"
    yield asked(words, TEST_ACCURACY, False, Role.BEYOND)
    words = "lambda_max with batch size (Yao et al. 2018: rises)"
    yield asked(words, lambda_max, True, Role.BEYOND)


def _figure4_panels(study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    measured = study.curvature_and_phi
    quantities = (
        ("test accuracy, %", accuracy, TEST_ACCURACY, False),
        ("phi(1e-3), %", measured, phi(0), True),
        ("lambda_max", measured, lambda_max, True),
    )
    groups = [("", 0, _swept(study))]
    return band_panels(
        store, "batch size", quantities, groups, log_x=True, ticks=study.swept
    )


# -- figure 5 ----------------------------------------------------------------------------


def _warm(study: KeskarStudy) -> list[tuple[float, ModelSpec]]:
    """(epochs of small batch before, large-batch network); 0 is a cold start."""
    found = []
    for seed in range(study.num_warm):
        found.append((0.0, study.at("large", seed, study.epochs_warm)))
        for epochs in study.epochs_small:
            start = study.at("small", seed, epochs)
            found.append((epochs, study.at("large", seed, study.epochs_warm, start=start)))
    return found


def _before(study: KeskarStudy) -> list[tuple[float, ModelSpec]]:
    """The small-batch networks that they start from."""
    return [run for run in study.followed("small") if run[1].training.seed < study.num_warm]


def _figure5_observations(study: KeskarStudy) -> list[Observation]:
    warm, before = _networks(_warm(study)), _networks(_before(study))
    return observed(warm, accuracy, study.phi) + observed(before, accuracy, study.phi)


def _figure5(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    """There must be a deficit of the cold large batch for the warm start to recover."""
    runs, last = _warm(study), study.epochs_small[-1]
    ends = [(n.start, n) for epochs, n in runs if epochs == last and n.start]
    yield paired(
        "cold start: test accuracy of the large batch below the small batch's, %",
        *pairs(
            store,
            accuracy,
            TEST_ACCURACY,
            [
                (small, study.at("large", small.training.seed, study.epochs_warm))
                for small, _ in ends
            ],
        ),
        larger=False,
        ratio=False,
        role=Role.PREMISE,
    )

    def as_accurate(some: list[Pair]) -> Check:
        small, warm = pairs(store, accuracy, TEST_ACCURACY, some)
        words = (
            f"after {last:g}: test accuracy less the small batch's, points: -0.5 or more"
        )
        return within(words, np.subtract(warm, small).tolist(), -0.5, math.inf)

    def as_flat(some: list[Pair], pick: Pick) -> Check:
        words = f"after {last:g}: phi(1e-3) over the small batch's: 1 or less"
        values = pairs(store, study.phi, pick, some)
        return ratio_within(words, *values, high=1, role=Role.SECONDARY)

    yield retested(as_accurate, ends, study.seen)
    yield _by_solvers_on_new(as_flat, ends, study)
    how = {"role": Role.SECONDARY}
    words = "test accuracy rises with the epochs before"
    yield trend_of(words, store, accuracy, TEST_ACCURACY, runs, rising=True, **how)
    words = "phi(1e-3) falls with the epochs before"
    yield by_solvers(
        lambda pick: trend_of(words, store, study.phi, pick, runs, rising=False, **how)
    )


def _figure5_panels(study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    quantities = (
        ("test accuracy, %", accuracy, TEST_ACCURACY, False),
        ("phi(1e-3), %", study.phi, phi(0), True),
    )
    groups = [
        ("large batch, warm start", 1, _warm(study)),
        ("small batch, before", 0, _before(study)),
    ]
    return band_panels(store, "epochs of small-batch training before", quantities, groups)


# -- figures 3 and 7 -----------------------------------------------------------------------


def _runs(study: KeskarStudy, arc: bool) -> list[InterpolationRun]:
    return [
        InterpolationRun(
            first=a, second=b, arc=arc, num_samples=study.num_samples, split=split
        )
        for a, b in study.ends(study.num_followed)
        for split in ("train", "test")
    ]


def _authors(study: KeskarStudy, arc: bool) -> dict[str, Any] | None:
    """The authors' own points on the line, with their places."""
    curves = {} if arc or study.stand_in else paper_numbers("keskar2017_curves")
    if study.network not in curves:
        return None
    return {"alphas": curves["alphas"], **curves[study.network]}


def _rises(alphas: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Mean rise of f an eighth of the way to both sides of either minimum."""
    at = dict(zip(alphas, values, strict=True))
    small, large = ((at[x - 0.125] + at[x + 0.125]) / 2 - at[x] for x in (0.0, 1.0))
    return small, large


def _between(arc: bool, study: KeskarStudy, store: ObservationStore) -> list[Check]:
    curves = [
        facts["curve"]
        for run in _runs(study, arc)
        if run.split == "train" and (facts := store.get(run))
    ]
    rises = [_rises(curve["alphas"], curve["values"]) for curve in curves]
    published, theirs = "", _authors(study, arc)
    if theirs:
        low, high = _rises(theirs["alphas"], theirs["train_xent"])
        published = f"{low:.2g} → {high:.2g} (one pair)"
    return [
        replace(
            paired(
                "rise of the training loss an eighth of the way off, small → large: larger",
                [a for a, _ in rises],
                [b for _, b in rises],
            ),
            paper=published,
        )
    ]


def _between_panels(arc: bool, study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    panels, theirs = [], _authors(study, arc)
    title = f"{study.num_samples or 'all'} samples of each set, or all"
    for key, name, times, label in (
        ("values", "xent", 1.0, "cross-entropy"),
        ("accuracies", "acc", 100.0, "accuracy, %"),
    ):
        curves = []
        for colour, run in enumerate(_runs(study, arc)[:2]):  # of one pair, as there
            facts = store.get(run)
            if facts is None:
                continue
            y = [times * value for value in facts["curve"][key]]
            x, about = facts["curve"]["alphas"], run.split
            curves.append(Curve(label=f"ours, {about}", x=x, y=y, colour=colour))
            if theirs:
                curves.append(
                    Curve(
                        label=f"paper, {about}",
                        x=theirs["alphas"],
                        y=theirs[f"{about}_{name}"],
                        colour=colour,
                        style="s--",
                        faint=True,
                    )
                )
        panels.append(
            panel(
                "alpha: 0 small batch, 1 large batch",
                label,
                curves,
                marks=(0, 1),
                title=title,
            )
        )
    return panels


ITEMS = (
    Item(
        name="figure2",
        title="Figure 2: accuracy along training",
        claim="Test accuracy rises and levels off: stopping early would not help.",
        observations=lambda study: observed(_followed(study), accuracy),
        checks=_figure2,
        panels=_figure2_panels,
    ),
    Item(
        name="figure3",
        title="Figure 3: the line through both minima",
        claim="The loss rises more steeply around the large-batch minimum.",
        observations=partial(_runs, arc=False),
        checks=partial(_between, False),
        panels=partial(_between_panels, False),
    ),
    Item(
        name="figure4",
        title="Figure 4: accuracy and phi by batch size",
        claim="Beyond a threshold test accuracy falls with the batch size, and phi rises "
        "up to about there.",
        observations=lambda study: observed(
            _networks(_swept(study)), accuracy, study.curvature_and_phi
        ),
        checks=_figure4,
        panels=_figure4_panels,
        applies=lambda study: bool(study.swept),
        in_quick=False,
    ),
    Item(
        name="figure5",
        title="Figure 5: large batch after a warm start with small batches",
        claim="After enough epochs of small batches the large batch reaches as good and as "
        "flat minima.",
        observations=_figure5_observations,
        checks=_figure5,
        panels=_figure5_panels,
        applies=lambda study: study.epochs_warm > 0,
        in_quick=False,
    ),
    Item(
        name="figure6",
        title="Figure 6: phi against the loss along training",
        claim="As the loss falls phi grows in large-batch training and not in small-batch "
        "training.",
        observations=lambda study: observed(_followed(study), study.phi),
        checks=_figure6,
        panels=_figure6_panels,
    ),
    Item(
        name="figure7",
        title="Figure 7: the arc through both minima",
        claim="On the arc, too, the loss rises more steeply at the large-batch minimum. (A "
        "step there is as long as the small-batch parameters are, and the other way round: "
        "part of the rise is length.)",
        observations=partial(_runs, arc=True),
        checks=partial(_between, True),
        panels=partial(_between_panels, True),
    ),
)
