"""Curves side by side in one picture: what reproductions draw."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

COLOURS = ("#1f4e9c", "#b3261e", "#2e7d32", "#8a5a00", "#6a3d9a", "#00798c", "#555555")
_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points joined by a line; a band from `low` to `high` where runs were several."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0  # of COLOURS
    style: str = "o-"
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
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (max(6.4, 4.2 * columns), 0.4 + 3.5 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    lines = textwrap.fill(title, int(13 * size[0]))
    figure.suptitle(lines, fontsize=10, x=0.01, ha="left")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for curve in panel.curves:
        colour = COLOURS[curve.colour % len(COLOURS)]
        axes.plot(
            curve.x,
            curve.y,
            curve.style,
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
    if panel.log_y and _any_positive(panel):
        axes.set_yscale("log")
    if panel.ticks is not None:
        axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(panel.y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    if any(curve.label for curve in panel.curves):
        axes.legend(frameon=False, fontsize=8)


def _any_positive(panel: Panel) -> bool:
    return any(value > 0 for curve in panel.curves for value in curve.y)
