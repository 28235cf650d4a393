"""Figures of plain numbers, drawn off-screen; a notebook shows them by themselves.

They know neither results nor measures, so that a result can draw itself.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import figure as _figure
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import LogFormatter, NullFormatter

_LOSS, _ACCURACY = "#1f4e9c", "#b3261e"
_WIDTH, _ROW = 7.2, 0.28  # inches
_MOST_LABELS = 40  # of rows; beyond, only every so many has its name
_MOST_VALUES = 10  # bars that have their values beside them


class _Plain(LogFormatter):
    """`0.7` rather than 7 x 10^-1; in between only where there are few decades."""

    def _num_to_string(self, value: float, *_: float) -> str:
        return f"{value:g}"


def _logarithmic(axes: Axes, *names: Literal["x", "y"]) -> None:
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(_Plain())
        axis.set_minor_formatter(_Plain(minor_thresholds=(1.5, 0.5)))


class Figure(_figure.Figure):
    """A figure that a notebook shows, whether pyplot has been imported or not."""

    def __init__(self, height: float, width: float = _WIDTH) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=110)
        return picture.getvalue()

    def written(self, path: str | Path | None) -> Figure:
        """Itself; as a PNG at `path`, too, where there is one."""
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.savefig(path, dpi=150)
        return self


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
    figure = Figure(3.8)
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
    return figure.written(path)


def readings_plot(readings: Sequence[Any], path: str | Path | None = None) -> Figure:
    """Numbers with their errors; an axis for each kind of number.

    Several positive ones on one axis are dots on a logarithmic scale. One alone is a bar
    from zero with its value beside it: a dot would have nothing to be compared with.

    Args:
        readings: each with `.name`, `.value`, `.error`, `.bound`, `.unit` and `.axis`:
            only numbers with the same one are drawn on one axis.
        path: where the PNG goes, if anywhere.
    """
    axes_of: dict[str, list[Any]] = {}
    for reading in readings:
        if math.isfinite(reading.value):
            axes_of.setdefault(reading.axis or reading.name, []).append(reading)
    rows = [len(shown) for shown in axes_of.values()]
    if not rows:
        axes_of, rows = {"no number": []}, [1]
    figure = Figure(0.3 + sum(0.55 + _ROW * num for num in rows))
    ratios = {"height_ratios": [1.2 + num for num in rows]}
    panels = figure.subplots(len(rows), squeeze=False, gridspec_kw=ratios)[:, 0]
    for axes, (label, shown) in zip(panels, axes_of.items(), strict=True):
        in_dots = len(shown) != 1 and all(r.value > 0 for r in shown)
        (_dots if in_dots else _from_zero)(axes, shown)
        axes.set_xlabel("" if [r.name for r in shown] == [label] else label, fontsize=8)
    return figure.written(path)


def _label(reading: Any) -> str:
    return " ".join(filter(None, (reading.name, reading.bound, reading.unit)))


def _from_zero(axes: Axes, readings: Sequence[Any]) -> None:
    errors = [_known(reading.error) for reading in readings]
    _bars(axes, list(map(_label, readings)), [r.value for r in readings], errors)
    axes.tick_params(axis="x", labelsize=8)


def _known(error: float | None) -> float:
    return error if error and math.isfinite(error) else 0.0


_MARKS = {"≥": ">", "≤": "<", "": "o"}  # a triangle points to where the true value lies


def _dots(axes: Axes, readings: Sequence[Any]) -> None:
    for i, reading in enumerate(reversed(readings)):
        error = _known(reading.error)
        axes.errorbar(
            reading.value,
            i,
            xerr=[[min(error, 0.999 * reading.value)], [error]],
            fmt=_MARKS[reading.bound],
            color=_LOSS,
            markersize=5,
        )
    labels = list(map(_label, readings))
    axes.set_yticks(range(len(labels)), labels[::-1])
    axes.set_ylim(-0.6, max(1, len(labels)) - 0.4)
    _logarithmic(axes, "x")
    if readings:  # whole decades, so that a tick is never without a round number
        low, high = (math.log10(limit) for limit in axes.get_xlim())
        axes.set_xlim(10 ** math.floor(low), 10 ** math.ceil(high))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="0.9")


def bars_plot(
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float] | None = None,
    path: str | Path | None = None,
    *,
    label: str,
) -> Figure:
    """A bar for each name from top to bottom, with its error; zero is on the axis.

    Args:
        names: (m,) one a bar.
        values: (m,); a bar that is not finite is left out.
        errors: (m,) half widths, if any.
        path: where the PNG goes, if anywhere.
        label: what the values are, with the unit.
    """
    figure = Figure(0.9 + min(_MOST_LABELS, max(1, len(names))) * _ROW)
    axes = figure.add_subplot()
    _bars(axes, names, values, errors)
    axes.set_xlabel(label)
    return figure.written(path)


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float] | None,
) -> None:
    places = range(len(names))
    bars = axes.barh(places, values, xerr=errors, color=_LOSS, ecolor="0.3", height=0.6)
    if len(names) <= _MOST_VALUES:
        axes.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
        axes.margins(x=0.12)
    step = -(-len(names) // _MOST_LABELS) or 1
    axes.set_yticks(places[::step], names[::step], fontsize=8)
    axes.set_ylim(max(1, len(names)) - 0.4, -0.6)
    axes.axvline(0.0, color="0.6", linewidth=0.8)


def points_plot(
    x: Sequence[float],
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    path: str | Path | None = None,
    *,
    labels: tuple[str, str],
) -> Figure:
    """Numbers against one that was chosen, such as phi against epsilon.

    A line is drawn through three or more: between two, nothing was measured. Where one was
    chosen they are bars from zero. Triangles are lower bounds.

    Args:
        x: (m,) what was chosen.
        curves: name, values (m,) and errors (m,), NaN where there is none, of each.
        path: where the PNG goes, if anywhere.
        labels: of both axes, with units. Both are logarithmic where all is positive.
    """
    if len(x) == 1:
        names, values = [name for name, _, _ in curves], [y[0] for _, y, _ in curves]
        known = [_known(errors[0]) for _, _, errors in curves]
        label = f"{labels[1]}, at {labels[0]} = {x[0]:g}"
        return bars_plot(names, values, known, path, label=label)
    figure = Figure(3.6)
    axes = figure.add_subplot()
    for colour, (name, y, errors) in zip((_LOSS, _ACCURACY), curves, strict=False):
        fmt = ("^" if "≥" in name else "o") + ("-" if len(x) > 2 else "")
        axes.errorbar(x, y, yerr=errors, fmt=fmt, color=colour, label=name, capsize=2)
    shown = [v for _, y, _ in curves for v in y if math.isfinite(v)]
    if shown and min(shown) > 0:
        _logarithmic(axes, "x", "y")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if curves:
        axes.legend(frameon=False, fontsize=9)
    return figure.written(path)


def way_plot(
    alphas: Sequence[float],
    values: Sequence[float],
    accuracies: Sequence[float],
    path: str | Path | None = None,
) -> Figure:
    """Loss (left axis) and accuracy (right axis) from one point to another.

    Args:
        alphas: (m,) 0 at the first point, 1 at the other; both are marked.
        values: (m,) loss.
        accuracies: (m,) in [0, 1]; empty where there are none.
        path: where the PNG goes, if anywhere.
    """
    figure = Figure(3.6)
    loss = figure.add_subplot()
    loss.plot(alphas, values, ".-", color=_LOSS)
    if values and min(values) > 0:
        loss.set_yscale("log")
    loss.set_xlabel("alpha: 0 is the first network, 1 the other")
    loss.set_ylabel("loss", color=_LOSS)
    for end in (0.0, 1.0):
        loss.axvline(end, color="0.75", linewidth=1, zorder=0)
    if accuracies:
        right = loss.twinx()
        right.plot(alphas, [100 * a for a in accuracies], ".--", color=_ACCURACY)
        right.set_ylabel("accuracy, %", color=_ACCURACY)
    return figure.written(path)


def comparison_plot(
    rows: Sequence[Any], names: tuple[str, str], path: str | Path | None = None
) -> Figure:
    """For each measure the ratio of every pair, second over first.

    Args:
        rows: each with `.name`, `.ratios` and `.ratio`; without ratios it is left out.
        names: of both sides.
        path: where the PNG goes, if anywhere.
    """
    shown = [row for row in rows if row.ratios][::-1]
    figure = Figure(1.1 + _ROW * max(1, len(shown)))
    axes = figure.add_subplot()
    for i, row in enumerate(shown):
        axes.plot(row.ratios, [i] * len(row.ratios), "o", color=_LOSS, alpha=0.45)
        axes.plot([row.ratio], [i], "|", color=_ACCURACY, markersize=14, markeredgewidth=2)
    axes.axvline(1.0, color="0.6", linewidth=1, zorder=0)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.set_ylim(-0.6, max(1, len(shown)) - 0.4)
    _logarithmic(axes, "x")
    axes.margins(x=0.08)
    axes.grid(axis="x", color="0.9")
    axes.set_title(f"first: {names[0]}\nsecond: {names[1]}", fontsize=8, loc="left")
    axes.set_xlabel("second / first: dots are pairs, bars geometric means")
    return figure.written(path)


def tracking_plot(
    points: Sequence[Any], names: Sequence[str], path: str | Path | None = None
) -> Figure:
    """Each measure along training with its stability threshold, above the loss.

    Args:
        points: each with `.step`, `.loss`, `.values()` and `.thresholds`.
        names: the measures to draw, from top to bottom.
        path: where the PNG goes, if anywhere.
    """
    figure = Figure(0.8 + 1.9 * (len(names) + 1))
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
    return figure.written(path)


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
