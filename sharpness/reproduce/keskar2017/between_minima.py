"""Figures 3 and 7: the line and the arc through both minima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sharpness.report.panels import Curve, Panel
from sharpness.reproduce.claims import Check, paired
from sharpness.reproduce.columns import panel
from sharpness.reproduce.keskar2017.study import KeskarStudy
from sharpness.reproduce.observations import InterpolationRun
from sharpness.reproduce.paper import Item, paper_numbers
from sharpness.reproduce.runner import ObservationStore


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
    small, large = [a for a, _ in rises], [b for _, b in rises]
    return [
        replace(
            paired(
                "rise of the training loss an eighth of the way off, small → large: larger",
                small,
                large,
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
        where = "alpha: 0 small batch, 1 large batch"
        panels.append(panel(where, label, curves, marks=(0, 1), title=title))
    return panels


ITEMS = (
    Item(
        name="figure3",
        title="Figure 3: the line through both minima",
        claim="The loss rises more steeply around the large-batch minimum.",
        observations=partial(_runs, arc=False),
        checks=partial(_between, False),
        panels=partial(_between_panels, False),
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
