"""Figures, drawn off-screen and written as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sharpness.measures.spectrum import SpectralDensity
from sharpness.results import Reading
from sharpness.statistics import ReadingComparison

_LOSS, _ACCURACY = "#1f4e9c", "#b3261e"


def parametric_plot(
    path: str | Path,
    alphas: Sequence[float],
    train: tuple[Sequence[float], Sequence[float]],
    test: tuple[Sequence[float], Sequence[float]],
    *,
    title: str,
) -> Path:
    """Loss and accuracy along the line from the small-batch to the large-batch minimum.

    Args:
        path: where the PNG goes.
        alphas: 0 is the small-batch minimum, 1 the large-batch one.
        train: losses and accuracies in [0, 1] on training samples.
        test: the same on test samples.
        title: the line above.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    losses = figure.add_subplot()
    accuracies = losses.twinx()
    for (values, shares), style, name in ((train, "-", "train"), (test, "--", "test")):
        losses.plot(alphas, values, style, color=_LOSS, label=f"loss, {name}")
        percent = [100 * share for share in shares]
        accuracies.plot(alphas, percent, style, color=_ACCURACY, label=f"accuracy, {name}")
    for minimum in (0.0, 1.0):
        losses.axvline(minimum, color="0.75", linewidth=1, zorder=0)
    ticks = [alpha for alpha in alphas if float(alpha).is_integer()]
    names = {0.0: "0\nsmall batch", 1.0: "1\nlarge batch"}
    losses.set_xticks(ticks, [names.get(float(t), f"{t:g}") for t in ticks])
    losses.set_xlabel("alpha")
    losses.set_ylabel("cross-entropy", color=_LOSS)
    accuracies.set_ylabel("accuracy (%)", color=_ACCURACY)
    accuracies.set_ylim(0, 102)
    losses.set_ylim(bottom=0)
    losses.set_title(title, fontsize=10, loc="left")
    lines = [*losses.get_lines()[:2], *accuracies.get_lines()]
    figure.legend(
        lines,
        [str(line.get_label()) for line in lines],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def density_plot(
    density: SpectralDensity, path: str | Path | None = None, *, title: str = ""
) -> Figure:
    """A spectral density with its band, on a logarithmic scale.

    Args:
        density: what to draw.
        path: where the PNG goes, if anywhere.
        title: the line above.
    """
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x, (low, high) = density.grid, density.band
    # One eigenvalue of n, at its peak: what lies far below is nothing.
    peak = 1 / (density.n * density.sigma * math.sqrt(2 * math.pi))
    axes.fill_between(
        x,
        low,
        high,
        color=_LOSS,
        alpha=0.25,
        linewidth=0,
        label=f"{density.confidence:.0%} band",
    )
    axes.plot(x, density.density, color=_LOSS, linewidth=1.2, label="density")
    axes.axhline(peak, color="0.6", linewidth=0.8, linestyle=":", label="one eigenvalue")
    axes.set_yscale("log")
    axes.set_ylim(peak / 10, 3 * float(high.max()))
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    axes.set_title(title or str(density).split("   ")[0], fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


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


def _written(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure
