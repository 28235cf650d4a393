"""Figures 3 and 7: the line and the arc through both minima."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from sharpness.report.panels import Curve, Panel
from sharpness.reproduce.claims import Check, paired
from sharpness.reproduce.columns import Facts
from sharpness.reproduce.keskar2017.study import KeskarStudy, ends
from sharpness.reproduce.observations import InterpolationRun
from sharpness.reproduce.paper import Item, paper_numbers
from sharpness.reproduce.runner import ObservationStore


def _joinings(study: KeskarStudy, arc: bool) -> list[InterpolationRun]:
    networks = ends(study)[: study.num_followed]
    return [
        InterpolationRun(
            first=a, second=b, arc=arc, num_samples=study.num_samples, split=split
        )
        for a, b in networks
        for split in ("train", "test")
    ]


def _curves(study: KeskarStudy, arc: bool) -> dict[str, Any]:
    """The authors' own points on the line."""
    return {} if arc or study.stand_in else paper_numbers("keskar2017_curves")


def _rises(curve: Facts) -> tuple[float, float]:
    """Mean rise of f an eighth of the way to both sides of either minimum."""
    at = dict(zip(curve["alphas"], curve["values"], strict=True))
    small, large = ((at[x - 0.125] + at[x + 0.125]) / 2 - at[x] for x in (0.0, 1.0))
    return small, large


def _between(arc: bool, study: KeskarStudy, store: ObservationStore) -> list[Check]:
    looks = [j for j in _joinings(study, arc) if j.split == "train"]
    found = [_rises(facts["curve"]) for j in looks if (facts := store.get(j))]
    if not found:
        return []
    published = ""
    theirs = _curves(study, arc)
    if study.network in theirs:
        values = theirs[study.network]["train_xent"]
        low, high = _rises({"alphas": theirs["alphas"], "values": values})
        published = f"{low:.2g} → {high:.2g} (one pair)"
    small, large = [a for a, _ in found], [b for _, b in found]
    words = "rise of the training loss an eighth of the way off, small → large: larger"
    return [replace(paired(words, small, large), paper=published)]


def _between_panels(arc: bool, study: KeskarStudy, store: ObservationStore) -> list[Panel]:
    panels = []
    shown = _joinings(study, arc)[:2]  # of one pair, as in the paper
    theirs = _curves(study, arc)
    for key, name, times in (("values", "xent", 1.0), ("accuracies", "acc", 100.0)):
        curves = []
        for colour, joining in enumerate(shown):
            facts = store.get(joining)
            if facts is None:
                continue
            y = [times * value for value in facts["curve"][key]]
            x, split = facts["curve"]["alphas"], joining.split
            curves.append(Curve(label=f"ours, {split}", x=x, y=y, colour=colour))
            if study.network in theirs:
                published = theirs[study.network][f"{split}_{name}"]
                curves.append(
                    Curve(
                        label=f"paper, {split}",
                        x=theirs["alphas"],
                        y=published,
                        colour=colour,
                        style="s--",
                        faint=True,
                    )
                )
        label = "cross-entropy" if key == "values" else "accuracy, %"
        where = "alpha: 0 small batch, 1 large batch"
        panels.append(
            Panel(title="", x_label=where, y_label=label, curves=curves, marks=(0, 1))
        )
    return panels


ITEMS = (
    Item(
        name="figure3",
        title="Figure 3: the line through both minima",
        claim="The loss rises more steeply around the large-batch minimum.",
        observations=partial(_joinings, arc=False),
        checks=partial(_between, False),
        panels=partial(_between_panels, False),
    ),
    Item(
        name="figure7",
        title="Figure 7: the arc through both minima",
        claim="On the arc, too, the loss rises more steeply at the large-batch minimum. (A "
        "step there is as long as the small-batch parameters are, and the other way round: "
        "part of the rise is length.)",
        observations=partial(_joinings, arc=True),
        checks=partial(_between, True),
        panels=partial(_between_panels, True),
    ),
)
