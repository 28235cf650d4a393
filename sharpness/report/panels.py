"""What reproductions draw: curves, or estimates with their intervals, side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import blended_transform_factory

from sharpness.report.figures import Figure, plain_ticks, written

# Apart for every eye, dichromats' too (CIELAB distance above 20 by Machado et al. 2009),
# and from white; in grey print each has a marker of its own.
COLOURS = ("#1f4e9c", "#d55e00", "#28a574", "#c466b0", "#000000", "#8250f0", "#585858")
_MARKERS = "osD^vPX"
_COLUMNS = 3
_MOST_MARKERS = 24  # of a curve, where it has more points


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points joined by a line; a band from `low` to `high` where runs were several."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0  # of COLOURS
    style: str = "o-"  # "o" stands for the marker of the colour
    faint: bool = False  # somebody else's, in the background


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One diagram."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[float] | None = None
    marks: Sequence[float] = ()  # vertical lines


def draw(path: str | Path, panels: Sequence[Panel], *, title: str) -> Path:
    """Draw panels in rows of up to three, as PNG."""
    written(panels_figure(panels, title=title), path, dpi=110)
    return Path(path)


def panels_figure(panels: Sequence[Panel], *, title: str) -> Figure:
    """Panels in rows of up to three."""
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width = max(6.4, 4.2 * columns)
    figure = Figure(0.4 + 3.5 * rows, width)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(textwrap.fill(title, int(13 * width)), fontsize=10, x=0.01, ha="left")
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for curve in panel.curves:
        which = curve.colour % len(COLOURS)
        colour = COLOURS[which]
        axes.plot(
            curve.x,
            curve.y,
            curve.style.replace("o", _MARKERS[which]),
            markevery=-(-len(curve.x) // _MOST_MARKERS) or 1,
            color=colour,
            label=curve.label or None,
            linewidth=1.0 if curve.faint else 1.4,
            markersize=2.5 if curve.faint else 4,
            alpha=0.45 if curve.faint else 1.0,
        )
        if curve.low is not None and curve.high is not None:
            axes.fill_between(
                curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0
            )
    for mark in panel.marks:
        axes.axvline(mark, color="0.75", linewidth=1, zorder=0)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y and any(value > 0 for curve in panel.curves for value in curve.y):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    set_ticks(axes, panel.ticks)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(panel.y_label, fontsize=9)
    axes.tick_params(labelsize=8, which="both")
    if any(curve.label for curve in panel.curves):
        axes.legend(frameon=False, fontsize=8)


def set_ticks(axes: Axes, ticks: Sequence[float] | None) -> None:
    """Name these places on the x axis, and none between them."""
    if ticks is not None:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())


# -- estimates with their intervals, in rows -----------------------------------------------

_ROW = 0.32  # inches


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One number with its interval; an infinite interval is not drawn."""

    row: float  # counted from the top
    edges: tuple[float, float, float]  # middle, low, high
    label: str  # of the legend: how it was made
    text: str = ""  # beside the interval
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class ForestPanel:
    """Estimates of one kind, on one axis."""

    title: str
    x_label: str
    estimates: Sequence[Estimate]
    lines: Sequence[float] = ()
    band: tuple[float, float] | None = None
    hatched: Sequence[tuple[float, float]] = ()  # rows, from and to
    log: bool = False
    ticks: Sequence[float] | None = None


def draw_forest(path: str | Path, panels: Sequence[ForestPanel], **more: Any) -> Path:
    """Draw panels that share their rows, as PNG; the arguments of `forest_figure`."""
    written(forest_figure(panels, **more), path, dpi=110)
    return Path(path)


def forest_figure(
    panels: Sequence[ForestPanel],
    *,
    groups: Sequence[tuple[str, Sequence[str]]],
    markers: dict[str, tuple[str, int]],
    hatched: str = "",
) -> Figure:
    """Panels that share their rows.

    Args:
        panels: from left to right; the first is the widest, and rows are named for it.
        groups: (heading, names of rows) from the top; a heading takes a row of its own.
        markers: for each label its marker and its colour.
        hatched: what hatched rows mean; empty where none are.
    """
    names = [name for heading, rows in groups for name in ("", *rows)]
    figure = Figure(1.6 + _ROW * len(names), 15.0)
    grid = figure.subplots(
        1, len(panels), sharey=True, width_ratios=[3.0, *[1.4] * (len(panels) - 1)]
    )
    for axes, panel in zip(grid, panels, strict=True):
        _draw_forest_panel(axes, panel, markers)
    top, across = 0, blended_transform_factory(grid[0].transAxes, grid[0].transData)
    for heading, rows in groups:
        beside = {"fontsize": 9, "fontweight": "bold", "va": "center", "ha": "left"}
        beside["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        grid[0].text(0.005, top, heading, transform=across, **beside)
        top += 1 + len(rows)
        for axes in grid:
            axes.axhline(top - 0.5, color="0.7", linewidth=0.8)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    for axes in grid:
        axes.tick_params(axis="y", length=0)
    handles: list[Line2D | Patch] = [
        Line2D([], [], linestyle="", marker=marker, color=COLOURS[colour], label=label)
        for label, (marker, colour) in markers.items()
    ]
    if hatched:
        handles.append(
            Patch(facecolor="white", edgecolor="0.5", hatch="////", label=hatched)
        )
    if len(handles) > 1:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9
        )
    return figure


def _draw_forest_panel(
    axes: Axes, panel: ForestPanel, markers: dict[str, tuple[str, int]]
) -> None:
    for first, last in panel.hatched:
        axes.axhspan(
            first, last, facecolor="none", edgecolor="0.85", hatch="////", linewidth=0
        )
    if panel.band:
        axes.axvspan(*panel.band, color="0.9", zorder=0)
    for at in panel.lines:
        axes.axvline(at, color="0.6", linewidth=1, zorder=0)
    for one in panel.estimates:
        marker, colour = markers[one.label]
        shade = "0.45" if one.faint else COLOURS[colour]
        middle, low, high = one.edges
        if math.isfinite(high - low):
            axes.plot([low, high], [one.row] * 2, color=shade, linewidth=1.2)
        axes.plot([middle], [one.row], marker, color=shade, markersize=5)
        ends = high if math.isfinite(high) else middle
        axes.annotate(
            one.text,
            (ends, one.row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=6.5,
            color=shade,
        )
    if panel.log:
        axes.set_xscale("log")
    set_ticks(axes, panel.ticks)
    axes.margins(x=0.1)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.tick_params(labelsize=8)
