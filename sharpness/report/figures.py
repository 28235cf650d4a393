"""Figures, drawn off-screen and written as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sharpness._results import Reading
from sharpness.statistics import ReadingComparison

_LOSS, _ACCURACY = "#1f4e9c", "#b3261e"


def density_plot(
    x: Any,
    density: Any,
    band: Any,
    peak: float,
    path: str | Path | None = None,
    *,
    title: str,
    band_label: str,
) -> Figure:
    """A spectral density with its band, on a logarithmic scale.

    Args:
        x: eigenvalues (m,).
        density: (m,), what to draw.
        band: (2, m), its lower and upper end.
        peak: height of a single eigenvalue; what lies far below is nothing.
        path: where the PNG goes, if anywhere.
        title: the line above.
        band_label: what the band is.
    """
    low, high = band
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.fill_between(
        x,
        low,
        high,
        color=_LOSS,
        alpha=0.25,
        linewidth=0,
        label=band_label,
    )
    axes.plot(x, density, color=_LOSS, linewidth=1.2, label="density")
    axes.axhline(peak, color="0.6", linewidth=0.8, linestyle=":", label="one eigenvalue")
    axes.set_yscale("log")
    axes.set_ylim(peak / 10, 3 * float(high.max()))
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return _written(figure, path)


def readings_plot(readings: Sequence[Reading], path: str | Path | None) -> Figure:
    """One dot for each positive number, with its error, on a logarithmic axis."""
    shown = [r for r in readings if math.isfinite(r.value) and r.value > 0][::-1]
    figure = Figure(figsize=(7.2, 0.8 + 0.28 * max(4, len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, reading in enumerate(shown):
        error = reading.error or 0.0
        low = min(error, 0.999 * reading.value)
        axes.errorbar(
            reading.value,
            i,
            xerr=[[low], [error]],
            fmt=">" if reading.bound == "≥" else "<" if reading.bound == "≤" else "o",
            color=_LOSS,
            markersize=5,
        )
    units = [f"{r.name} ({r.unit})" if r.unit else r.name for r in shown]
    axes.set_yticks(range(len(shown)), units)
    axes.set_xscale("log")
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel("value; triangles point to where the true value lies")
    return _written(figure, path)


def comparison_plot(
    rows: Sequence[ReadingComparison], names: tuple[str, str], path: str | Path | None
) -> Figure:
    """For each measure the ratio of every pair, second over first."""
    shown = [row for row in rows if row.ratios][::-1]
    figure = Figure(figsize=(7.2, 0.9 + 0.28 * max(4, len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, row in enumerate(shown):
        axes.plot(row.ratios, [i] * len(row.ratios), "o", color=_LOSS, alpha=0.45)
        axes.plot([row.ratio], [i], "|", color=_ACCURACY, markersize=14, markeredgewidth=2)
    axes.axvline(1.0, color="0.6", linewidth=1, zorder=0)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.set_xscale("log")
    axes.grid(axis="x", color="0.9")
    axes.set_title(f"first: {names[0]}\nsecond: {names[1]}", fontsize=8, loc="left")
    axes.set_xlabel("second / first: dots are pairs, bars geometric means")
    return _written(figure, path)


def tracking_plot(
    points: Sequence[Any], names: Sequence[str], path: str | Path | None = None
) -> Figure:
    """Each measure along training with its stability threshold, above the loss.

    Args:
        points: each with `.step`, `.loss`, `.values()` and `.thresholds`.
        names: the measures to draw, from top to bottom.
        path: where the PNG goes, if anywhere.
    """
    height = 0.8 + 1.9 * (len(names) + 1)
    figure = Figure(figsize=(7.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names) + 1, sharex=True, squeeze=False)[:, 0]
    kinds = dict.fromkeys(point.statistics for point in points if point.batchnorm)
    if kinds:
        panels[0].set_title(f"BatchNorm on {', then '.join(kinds)}", fontsize=9)
    for axes, name in zip(panels, names, strict=False):
        _tracked_panel(axes, points, name)
    losses = [point.loss for point in points]
    panels[-1].plot([point.step for point in points], losses, color=_ACCURACY)
    if all(loss > 0 for loss in losses):
        panels[-1].set_yscale("log")
    panels[-1].set_ylabel("loss")
    panels[-1].set_xlabel("update")
    return _written(figure, path)


def _tracked_panel(axes: Axes, points: Sequence[Any], name: str) -> None:
    shown = [(p.step, p.values()[name]) for p in points if name in p.values()]
    steps, values = [step for step, _ in shown], [value.value for _, value in shown]
    errors = [math.nan if v.error is None else v.error for _, v in shown]
    axes.errorbar(
        steps, values, yerr=errors, fmt=".-", color=_LOSS, linewidth=1, markersize=4
    )
    limits = [(p.step, p.thresholds[name]) for p in points if name in p.thresholds]
    if limits:
        axes.step(
            [step for step, _ in limits],
            [limit for _, limit in limits],
            where="post",
            color="0.4",
            linestyle="--",
            label="stability threshold",
        )
        axes.legend(frameon=False, fontsize=9)
    heights = [*(v for v in values if math.isfinite(v)), *(limit for _, limit in limits)]
    if heights and 0 < min(heights) < max(heights) / 50:
        axes.set_yscale("log")
    elif heights and min(heights) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(
        "phi (%), at least" if name == "phi" else name.replace("_pre", "\n_pre")
    )


def _written(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure
