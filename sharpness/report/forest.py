"""Estimates with their intervals in rows, several panels side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Transform, blended_transform_factory

from sharpness.report.panels import COLOURS

_ROW = 0.32  # inches


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One number with its interval; an infinite interval is not drawn."""

    row: float  # counted from the top
    middle: float
    low: float
    high: float
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


def draw_forest(
    path: str | Path,
    panels: Sequence[ForestPanel],
    *,
    groups: Sequence[tuple[str, Sequence[str]]],
    markers: dict[str, tuple[str, int]],
    hatched: str = "",
) -> Path:
    """Draw panels that share their rows, as PNG.

    Args:
        path: of the picture.
        panels: from left to right; the first is the widest, and rows are named for it.
        groups: (heading, names of rows) from the top; a heading takes a row of its own.
        markers: for each label its marker and its colour.
        hatched: what hatched rows mean; empty where none are.
    """
    names = [name for heading, rows in groups for name in ("", *rows)]
    size = (15.0, 1.6 + _ROW * len(names))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [3.0, *[1.4] * (len(panels) - 1)]
    grid = figure.subplots(1, len(panels), sharey=True, width_ratios=ratios)
    for axes, panel in zip(grid, panels, strict=True):
        _draw_panel(axes, panel, markers)
    top = 0
    for heading, rows in groups:
        beside = {"fontsize": 9, "fontweight": "bold", "va": "center", "ha": "left"}
        beside["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        grid[0].text(0.005, top, heading, transform=_across(grid[0]), **beside)
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
        patch = Patch(facecolor="white", edgecolor="0.5", hatch="////", label=hatched)
        handles.append(patch)
    if len(handles) > 1:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _draw_panel(
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
        shade = "0.55" if one.faint else COLOURS[colour]
        if math.isfinite(one.high - one.low):
            axes.plot([one.low, one.high], [one.row] * 2, color=shade, linewidth=1.2)
        axes.plot([one.middle], [one.row], marker, color=shade, markersize=5)
        ends = one.high if math.isfinite(one.high) else one.middle
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
    if panel.ticks is not None:
        axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.tick_params(labelsize=8)


def _across(axes: Axes) -> Transform:
    """From 0 to 1 across the axes, rows downwards."""
    return blended_transform_factory(axes.transAxes, axes.transData)
