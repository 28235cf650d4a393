"""Figures of a loss on lines and planes through the parameters, from plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from sharpness.report.figures import (
    NO_NUMBER,
    Figure,
    panels,
    plain_ticks,
    way_plot,
    written,
)

_WIDE = 10.0  # of the loss, largest over least: then its scale is logarithmic
_LEVELS = 7  # contour lines
_PANEL = 2.9  # inches wide
_BELOW: dict[str, Any] = {
    "location": "bottom",
    "pad": 0.02,
    "aspect": 30,
}
_MAP = "cividis"  # even in lightness, so that grey print and any eye tell it apart
_CIRCLES: dict[str, Any] = {
    "color": "white",
    "markeredgecolor": "black",
    "markersize": 6,
    "linewidth": 1,
}


def line_plot(
    grid: Sequence[Sequence[float]],
    values: Any,
    accuracies: Any,
    path: str | Path | None = None,
    *,
    names: Sequence[str],
    model: Any = None,
    marks: Sequence[Sequence[float]] = (),
    unexplained: Sequence[float] = (),
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Loss, quadratic model and accuracy along a line; the arguments of `plane_plot`."""
    others = [] if model is None else [("quadratic model", grid[0], list(model))]
    figure = way_plot(
        grid[0],
        list(values),
        [] if accuracies is None else list(accuracies),
        others=others,
        labels=(names[0], "loss"),
        marks=[0.0, *(place for (place,) in marks)],
        ax=ax,
    )
    (ax or figure.axes[0]).set_title(title, fontsize=9, loc="left")
    return written(figure, path)


def plane_plot(
    grid: Sequence[Sequence[float]],
    values: Any,
    accuracies: Any,
    path: str | Path | None = None,
    *,
    names: Sequence[str],
    model: Any = None,
    marks: Sequence[Sequence[float]] = (),
    unexplained: Sequence[float] = (),
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Loss on a plane with contour lines, and accuracy beside it; hatched is no number.

    Args:
        grid: coordinates x (a,) and y (b,).
        values: loss (a, b); logarithmic where it is positive and spans a decade.
        accuracies: (a, b) in [0, 1], or None.
        path: where the PNG goes, if anywhere.
        names: of both directions, with units.
        model: (a, b) its quadratic model, as dashed lines of the same levels.
        marks: (m, 2) networks, joined in their order; the centre is a cross.
        unexplained: (m,) how far off the plane each is, in [0, 1].
        title: the line above.
        ax: whose place to take instead of a new figure.
    """
    with_accuracy = accuracies is not None and bool(np.isfinite(accuracies).any())
    ratios = [1.0, 1.0] if with_accuracy else [1.0]
    height = _PANEL * min(1.2, np.ptp(grid[1]) / np.ptp(grid[0])) + 1.5
    figure, places = panels(ax, height, ratios, across=True)
    _loss(figure, places[0], grid, values, model)
    if with_accuracy:
        percent = np.ma.masked_invalid(100 * accuracies).T
        ends = (percent.min(), percent.max()) if percent.max() > percent.min() else (0, 100)
        shade = places[1].pcolormesh(*grid, percent, cmap=_MAP, norm=Normalize(*ends))
        ticks = MaxNLocator(5)  # one each: a locator belongs to its axis
        figure.colorbar(shade, ax=places[1], label="accuracy, %", ticks=ticks, **_BELOW)
    for axes in places:
        axes.patch.set(**NO_NUMBER)
        axes.set_aspect("equal")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.plot(0, 0, "+", color="black", markersize=12, markeredgewidth=3)
        axes.plot(0, 0, "+", color="white", markersize=10, markeredgewidth=1.2)
        if len(marks):
            axes.plot(*zip(*marks, strict=True), "o-", **_CIRCLES)
        axes.set_xlabel(names[0], fontsize=9)
    places[0].set_ylabel(names[1], fontsize=9)
    if len(unexplained) and max(unexplained) > 0.005:
        title += f"\ncircles lie up to {max(unexplained):.0%} of their way off the plane"
    if title:
        places[0].set_title(title.strip(), fontsize=8, loc="left")
    return written(figure, path)


def _loss(figure: Any, axes: Axes, grid: Any, values: Any, model: Any) -> None:
    seen = values[np.isfinite(values)]
    if not seen.size:
        axes.set(xlim=(grid[0][0], grid[0][-1]), ylim=(grid[1][0], grid[1][-1]))
        return
    low, high = float(seen.min()), float(seen.max())
    logarithmic = low > 0 and high > _WIDE * low
    norm = (LogNorm if logarithmic else Normalize)(low, high)
    between = np.geomspace if logarithmic else np.linspace
    levels = between(low, high, _LEVELS + 2)[1:-1]
    shown = np.ma.masked_invalid(values).T
    shade = axes.pcolormesh(*grid, shown, norm=norm, cmap=_MAP)
    ticks = None if logarithmic else MaxNLocator(5)
    bar = figure.colorbar(shade, ax=axes, label="loss", ticks=ticks, **_BELOW)
    if logarithmic:
        plain_ticks(bar.ax.xaxis)
    if high > low:
        lines = axes.contour(*grid, shown, levels, colors="white", linewidths=0.9)
        lines.set(path_effects=[withStroke(linewidth=1.8, foreground="0.25")])
        for text in axes.clabel(lines, fmt="%.2g", fontsize=7):
            text.set(path_effects=[withStroke(linewidth=1.8, foreground="0.25")])
        if model is not None and np.isfinite(model).all():
            dashed: dict[str, Any] = {
                "colors": "black",
                "linestyles": "--",
                "linewidths": 0.9,
            }
            edged = [withStroke(linewidth=2.0, foreground="0.8")]
            axes.contour(*grid, model.T, levels, **dashed).set(path_effects=edged)
