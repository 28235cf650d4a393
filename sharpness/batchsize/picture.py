"""The advice in three panels: updates, seconds per update, and their product."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from sharpness.batchsize.choice import Choice
from sharpness.batchsize.race import Race
from sharpness.batchsize.updates import UpdateTimes
from sharpness.report.figures import Figure, panels, plain_ticks, written

_HEADROOM = 0.35  # of the curves' height, for the legend
# Blue and vermilion of Okabe and Ito (2008): told apart by the colour-blind, and as light
# and dark in grey; marks and lines differ as well.
_SEEN, _FITTED = "#0072B2", "#D55E00"


def draw(
    times: UpdateTimes | None,
    race: Race | None,
    choice: Choice | None,
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Three panels against the batch size; what was not measured stays empty."""
    figure, places = panels(ax, 3.2, [1.0, 1.0, 1.0], across=True, width=10.5)
    updates, seconds, product = places
    if race is not None:
        _updates(updates, race)
        _measured_product(product, race)
    if times is not None:
        _seconds(seconds, times)
    if choice is not None:
        _compared(product, choice)
    product.margins(y=_HEADROOM)
    titles = "updates to the target", "seconds per update", "seconds to the target"
    for axes, title in zip((updates, seconds, product), titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("batch size")
        if not axes.get_legend_handles_labels()[1]:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
            continue
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(2, numticks=7))
        axes.xaxis.set_major_formatter(lambda size, _: _short(size))
        plain_ticks(axes.yaxis)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.92")
        axes.legend(frameon=False, fontsize=8)
    return written(figure, path)


def _short(size: float) -> str:
    """`512`, `16k`."""
    return f"{size:g}" if size < 10_000 else f"{size / 1024:g}k"


def _updates(axes: Axes, race: Race) -> None:
    reached = [r for r in race.sizes if r.reached]
    if not reached:
        return
    sizes = np.array([r.batch_size for r in reached], float)
    errors = [r.updates_error for r in reached]
    counted = [r.updates for r in reached]
    axes.errorbar(sizes, counted, errors, fmt="o", color=_SEEN, label="measured")
    if math.isfinite(race.s_min + race.e_min):
        line = np.geomspace(sizes.min(), sizes.max(), 50)
        law = race.s_min + race.e_min / line
        axes.plot(line, law, "--", color=_FITTED, label="fitted: S + E / B")


def _seconds(axes: Axes, times: UpdateTimes) -> None:
    alive = times.survived
    if not alive.any():
        return
    sizes = times.batch_sizes[alive].astype(float)
    seen, spread = times.seconds[alive], times.spread[alive]
    axes.errorbar(sizes, seen, spread, fmt="o", color=_SEEN, label="measured")
    if math.isfinite(times.overhead + times.per_sample):
        line = np.geomspace(sizes.min(), sizes.max(), 50)
        law = times.overhead + times.per_sample * line
        axes.plot(line, law, "--", color=_FITTED, label="fitted: a + c B")
        if sizes.min() < times.knee < sizes.max():
            label = f"knee {times.knee:.0f}"
            axes.axvline(times.knee, color="0.4", linestyle=":", label=label)


def _measured_product(axes: Axes, race: Race) -> None:
    reached = [r for r in race.sizes if r.reached]
    if reached:
        sizes, took = [r.batch_size for r in reached], [r.seconds for r in reached]
        axes.plot(sizes, took, "o", color=_SEEN, label="measured")


def _compared(axes: Axes, choice: Choice) -> None:
    if choice.how == "fitted":
        line = choice.batch_sizes, choice.seconds
        axes.plot(*line, "--", color=_FITTED, label="fitted updates, measured seconds")
    low, high = choice.near[0], choice.near[-1]
    axes.axvspan(low / 2**0.25, high * 2**0.25, color="0.87", label="within 10 %")
    least = choice.of(choice.batch_size)[1]
    axes.plot(choice.batch_size, least, "k*", markersize=12, label="advised")
