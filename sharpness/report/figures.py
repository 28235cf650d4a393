"""Figures of plain numbers, drawn off-screen; a notebook shows them by themselves.

They know neither results nor measures, so that a result can draw itself.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from matplotlib import figure as _figure
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sharpness._arguments import ensure

# Blue and red that stay apart without colour vision; in grey, marks and dashes do it.
_LOSS, _ACCURACY, _BAR = "#1f4e9c", "#b3261e", "#8fb0dd"
_STYLES: tuple[dict[str, Any], ...] = (
    {"linestyle": "-", "color": _LOSS},
    {"linestyle": "--", "color": _ACCURACY, "markerfacecolor": "white"},
)
_SMALL: dict[str, Any] = {"markersize": 3, "linewidth": 1.2, "markerfacecolor": "white"}
NO_NUMBER: dict[str, Any] = {
    "facecolor": "0.93",
    "edgecolor": "0.6",
    "hatch": "xxx",
    "linewidth": 0,
}
_WIDTH, _ROW = 7.2, 0.28  # inches
_TEXT = 0.35  # of a bar's axis, for the number beside it
_MOST_LABELS = 40  # of rows; beyond, only every so many has its name


class Figure(_figure.Figure):
    """A figure that a notebook shows, whether pyplot has been imported or not."""

    def __init__(self, height: float, width: float = _WIDTH) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=110)
        return picture.getvalue()


def panels(
    ax: Axes | None,
    height: float,
    ratios: Sequence[float] = (1.0,),
    *,
    across: bool = False,
    shared: bool = False,
    width: float = _WIDTH,
) -> tuple[Any, list[Axes]]:
    """A figure and its diagrams: new ones, or in the place of axes that are there.

    Args:
        ax: of somebody's own figure; several diagrams take its place in the grid.
        height: of a new figure, in inches.
        ratios: heights of the diagrams from the top; widths where they stand `across`.
        across: side by side.
        shared: one x axis for all.
        width: of a new figure, in inches.

    Raises:
        ValueError: several diagrams are to stand where axes were placed by hand.
    """
    if ax is not None and len(ratios) == 1:
        return ax.figure, [ax]
    rows, columns = (1, len(ratios)) if across else (len(ratios), 1)
    sizes: dict[str, Any] = {"width_ratios" if across else "height_ratios": list(ratios)}
    if ax is None:
        figure = Figure(height, width)
        grid = figure.add_gridspec(rows, columns, **sizes)
        return figure, list(grid.subplots(squeeze=False, sharex=shared).ravel())
    place = ax.get_subplotspec()
    contract, got = "be one of `subplots`, for several diagrams", "axes placed by hand"
    ensure(place is not None, "ax", contract, got)
    there = ax.figure
    ax.remove()
    inner = place.subgridspec(rows, columns, **sizes)  # type: ignore[union-attr]
    return there, list(inner.subplots(squeeze=False, sharex=shared).ravel())


def written(figure: Any, path: str | Path | None, dpi: int = 150) -> Figure:
    """The figure itself; as a PNG (PDF, SVG) at `path`, too, where there is one."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    return cast(Figure, figure)


def plain_ticks(axis: Axis) -> None:
    """A logarithmic axis in plain numbers: 1, 2, 5 of each decade where it spans few."""
    low, high = sorted(axis.get_view_interval())
    if not 0 < low < high:
        return
    decades = math.log10(high / low)
    if decades > 4:
        return
    subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else range(1, 10)
    axis.set_major_locator(LogLocator(subs=[float(sub) for sub in subs]))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def density_plot(
    x: Any,
    density: Any,
    band: Any,
    peak: float,
    path: str | Path | None = None,
    *,
    ritz: Sequence[float] = (),
    title: str,
    band_label: str,
    ax: Axes | None = None,
) -> Figure:
    """A spectral density with its band, on a logarithmic scale.

    Args:
        x: eigenvalues (m,).
        density: (m,), what to draw.
        band: (2, m), its lower and upper end.
        peak: height of a single eigenvalue; what lies far below is nothing.
        path: where the PNG goes, if anywhere.
        ritz: where the runs saw eigenvalues, as ticks: outliers stand alone.
        title: the line above.
        band_label: what the band is.
        ax: where to draw instead of on a new figure.
    """
    low, high = band
    figure, (axes,) = panels(ax, 3.8)
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
    axes.axhline(peak, color="0.4", linewidth=0.8, linestyle=":", label="one eigenvalue")
    axes.set_yscale("log")
    axes.set_ylim(peak / 10, 3 * float(high.max()))
    if len(ritz):
        ticks: dict[str, Any] = {
            "marker": "|",
            "markersize": 9,
            "markeredgewidth": 0.8,
            "color": _ACCURACY,
        }
        floor = axes.get_xaxis_transform()
        ticks |= {"linestyle": "", "label": "eigenvalues seen"}
        axes.plot(ritz, [0.02] * len(ritz), transform=floor, **ticks)
    axes.set_xlabel("eigenvalue, loss / parameter²")
    axes.set_ylabel("density, share per unit")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return written(figure, path)


def readings_plot(
    readings: Sequence[Any], path: str | Path | None = None, *, ax: Axes | None = None
) -> Figure:
    """Every finite number with its error and its text; an axis for each kind of number.

    Bars from zero; points on a logarithmic axis where numbers of a kind are far apart.

    Args:
        readings: each with `.name`, `.value`, `.value_text`, `.error`, `.bound`, `.unit`
            and `.axis`: only numbers with the same one are drawn on one axis.
        path: where the PNG goes, if anywhere.
        ax: whose place to take instead of a new figure.
    """
    axes_of: dict[str, list[Any]] = {}
    for reading in readings:
        if math.isfinite(reading.value):
            axes_of.setdefault(reading.axis or reading.name, []).append(reading)
    rows = [len(shown) for shown in axes_of.values()]
    if not rows:
        axes_of, rows = {"no number": []}, [1]
    height = 0.3 + sum(0.55 + _ROW * num for num in rows)
    figure, places = panels(ax, height, [1.2 + num for num in rows])
    for axes, (label, shown) in zip(places, axes_of.items(), strict=True):
        _numbers(axes, shown)
        axes.set_xlabel("" if [r.name for r in shown] == [label] else label, fontsize=8)
    return written(figure, path)


_MARKS = {"≥": ">", "≤": "<", "": "o"}  # a triangle points to where the true value lies
_FAR = 30.0  # between numbers of a kind: then a bar from zero would hide the smaller


def _numbers(axes: Axes, readings: Sequence[Any]) -> None:
    values = [r.value for r in readings]
    errors = [r.error if r.error and math.isfinite(r.error) else 0.0 for r in readings]
    texts = [
        f"{r.value_text}{f' ± {e:.1g}' if e else ''}"
        for r, e in zip(readings, errors, strict=True)
    ]
    if values and min(values) > 0 and max(values) > _FAR * min(values):
        _dots(axes, values, errors, [_MARKS[r.bound] for r in readings])
    else:
        _bars(axes, values, [errors, errors])
    ends = [value + error for value, error in zip(values, errors, strict=True)]
    for i, (end, text) in enumerate(zip(ends, texts, strict=True)):
        _beside(axes, max(end, 0.0), i, text)
    axes.set_yticks(range(len(readings)), [r.name for r in readings])
    axes.set_ylim(max(1, len(readings)) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)


def _dots(
    axes: Axes, values: Sequence[float], errors: Sequence[float], marks: Sequence[str]
) -> None:
    """On whole decades, so that a tick is never without a round number."""
    axes.set_xscale("log")
    lowest = math.floor(math.log10(min(values)) - 0.1)
    highest = math.ceil(math.log10(max(map(sum, zip(values, errors, strict=True)))) + 0.1)
    for i, (value, error, mark) in enumerate(zip(values, errors, marks, strict=True)):
        down = min(error, value - 10.0**lowest)  # to the edge where it reaches zero
        axes.errorbar(value, i, xerr=[[down], [error]], fmt=mark, color=_LOSS, markersize=5)
    axes.set_xlim(10.0**lowest, 10.0 ** (highest + 0.3 * (highest - lowest)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="0.9")


def _bars(axes: Axes, values: Sequence[float], errors: Any = None) -> None:
    """From zero, with errors that can be seen on them, and room for a text."""
    whiskers: dict[str, Any] = {
        "ecolor": "black",
        "capsize": 3,
        "error_kw": {"elinewidth": 1},
    }
    if errors is not None:  # none rather than one of length 0
        errors = [[e if e > 0 else math.nan for e in ends] for ends in errors]
    axes.barh(range(len(values)), values, xerr=errors, color=_BAR, height=0.6, **whiskers)
    axes.axvline(0.0, color="0.3", linewidth=0.8)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.0), max(high, 0.0) + _TEXT * (high - low))
    axes.spines[["top", "right"]].set_visible(False)  # a long text may go on


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    place: dict[str, Any] = {
        "xytext": (4, 0),
        "textcoords": "offset points",
        "va": "center",
    }
    axes.annotate(text, (x, y), fontsize=8, **place)


def bars_plot(
    names: Sequence[str],
    values: Sequence[float],
    errors: Any = None,
    path: str | Path | None = None,
    *,
    label: str,
    limit: tuple[float, str] | None = None,
    spans: Sequence[tuple[float, float]] = (),
    spans_label: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A bar for each name from top to bottom, with its error; zero is on the axis.

    Args:
        names: (m,) one a bar.
        values: (m,); a bar that is not finite is left out.
        errors: (m,) half widths, or (2, m) downwards and upwards, if any.
        path: where the PNG goes, if anywhere.
        label: what the values are, with the unit.
        limit: a bound of the first, as a line, and what it is.
        spans: intervals that are hatched.
        spans_label: what they are.
        ax: where to draw instead of on a new figure.
    """
    figure, (axes,) = panels(ax, 0.9 + min(_MOST_LABELS, max(3, len(names))) * _ROW)
    ends = errors
    if errors is not None and not isinstance(errors[0], Sequence):
        ends = [errors, errors]
    _bars(axes, values, ends)
    step = -(-len(names) // _MOST_LABELS) or 1
    axes.set_yticks(range(len(names))[::step], names[::step], fontsize=8)
    axes.set_ylim(max(2, len(names)) - 0.4, -0.6)
    if step == 1:
        above = [0.0] * len(names) if ends is None else ends[1]
        for i, (value, more) in enumerate(zip(values, above, strict=True)):
            if math.isfinite(value):
                top = value + (more if 0 < more < math.inf else 0.0)
                _beside(axes, max(top, 0.0), i, f"{value:.4g}")
    for i, (low, high) in enumerate(spans):
        hatched: dict[str, Any] = {
            "facecolor": "none",
            "edgecolor": "0.6",
            "hatch": "////",
            "zorder": 0,
        }
        axes.axvspan(low, high, label="" if i else spans_label, **hatched)
    if limit is not None:
        axes.set_xlim(right=max(axes.get_xlim()[1], 1.05 * limit[0]))
        axes.axvline(limit[0], color=_ACCURACY, linestyle="--", linewidth=1, label=limit[1])
    if limit is not None or spans:
        above_axes: dict[str, Any] = {
            "loc": "lower left",
            "bbox_to_anchor": (0.0, 1.0),
            "ncols": 2,
        }
        axes.legend(frameon=False, fontsize=8, borderaxespad=0.2, **above_axes)
    axes.set_xlabel(label)
    return written(figure, path)


def points_plot(
    x: Sequence[float],
    curves: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[float]]],
    path: str | Path | None = None,
    *,
    labels: tuple[str, str],
    ax: Axes | None = None,
) -> Figure:
    """Numbers against one that was chosen, such as phi against epsilon; bars for one x.

    A line is drawn through three or more: between two, nothing was measured. Triangles
    are lower bounds.

    Args:
        x: (m,) what was chosen.
        curves: name, values (m,), and lower and upper ends (m,), NaN where there are
            none, of each.
        path: where the PNG goes, if anywhere.
        labels: of both axes, with units. Both are logarithmic where all is positive.
        ax: where to draw instead of on a new figure.
    """
    if len(x) == 1:
        names, (values, errors) = [name for name, *_ in curves], _of_one(curves)
        label = f"{labels[1]}, at {labels[0]} {x[0]:g}"
        return bars_plot(names, values, errors, path, label=label, ax=ax)
    figure, (axes,) = panels(ax, 3.6)
    shown = [v for _, y, *_ in curves for v in y if math.isfinite(v)]
    positive = bool(shown) and min(shown) > 0 and min(x) > 0
    for (name, y, low, high), style in zip(curves, _STYLES, strict=False):
        floor = (
            min(shown, default=0.0) / 10
        )  # of a logarithmic axis, where an interval holds zero
        ends = [floor if positive and a <= 0 else a for a in low]
        down = [v - a for v, a in zip(y, ends, strict=True)]
        up = [b - v for v, b in zip(y, high, strict=True)]
        line = style["linestyle"] if len(x) > 2 else ""
        kind = {**style, "marker": "^" if "≥" in name else "o", "linestyle": line}
        axes.errorbar(x, y, yerr=[down, up], label=name, capsize=3, **kind)
    if positive:
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
    axes.grid(color="0.92")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if curves:
        axes.legend(frameon=False, fontsize=9)
    return written(figure, path)


def _of_one(curves: Sequence[Any]) -> tuple[list[float], list[list[float]]]:
    """Values of the curves, and how far their ends lie below and above."""
    values = [y[0] for _, y, _, _ in curves]
    down = [y[0] - low[0] for _, y, low, _ in curves]
    up = [high[0] - y[0] for _, y, _, high in curves]
    known = [[0.0 if math.isnan(e) else e for e in ends] for ends in (down, up)]
    return values, known


def way_plot(
    alphas: Sequence[float],
    values: Sequence[float],
    accuracies: Sequence[float],
    path: str | Path | None = None,
    *,
    others: Sequence[tuple[str, Sequence[float], Sequence[float]]] = (),
    labels: tuple[str, str] = ("alpha: 0 is the first network, 1 the other", ""),
    marks: Sequence[float] = (0.0, 1.0),
    both: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Loss (left axis) and accuracy (right axis) from one point to another.

    Where the loss is no number the axis is hatched.

    Args:
        alphas: (m,) 0 at the first point, 1 at the other; both are marked.
        values: (m,) loss.
        accuracies: (m,) in [0, 1]; empty where there are none.
        path: where the PNG goes, if anywhere.
        others: more curves of a loss: name, places and values.
        labels: of the x axis, and of the loss in the legend where there are `others`.
        marks: places with a line.
        both: keep the other curves inside the picture, too.
        ax: where to draw instead of on a new figure.
    """
    figure, (loss,) = panels(ax, 3.6)
    loss.plot(alphas, values, ".-", color=_LOSS, label=labels[1])
    for (name, x, y), style in zip(others, ("--", ":"), strict=False):
        loss.plot(x, y, style, color="black", linewidth=1.2, label=name)
    drawn = [*values, *(v for _, _, y in others for v in y)] if both else values
    seen = [v for v in drawn if math.isfinite(v)]
    if seen and min(seen) > 0 and max(seen) > 10 * min(seen):
        loss.set_yscale("log")
    if seen:  # others may leave the picture
        _fit(loss, seen)
    _hatch_gaps(loss, alphas, values)
    loss.set_xlabel(labels[0])
    loss.set_ylabel("loss", color=_LOSS)
    for end in marks:
        loss.axvline(end, color="0.75", linewidth=1, zorder=0)
    if others:
        loss.legend(frameon=False, fontsize=8)
    if len(accuracies):
        right = loss.twinx()
        right.plot(alphas, [100 * a for a in accuracies], "s--", color=_ACCURACY, **_SMALL)
        right.set_ylabel("accuracy, %", color=_ACCURACY)
    return written(figure, path)


def _fit(axes: Axes, values: Sequence[float]) -> None:
    """The range of the loss, with a margin: no point is cut."""
    low, high = min(values), max(values)
    if axes.get_yscale() == "log":
        room = (high / low) ** 0.08
        axes.set_ylim(low / room, high * room)
        plain_ticks(axes.yaxis)
    else:
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def _hatch_gaps(axes: Axes, x: Sequence[float], values: Sequence[float]) -> None:
    half = [(b - a) / 2 for a, b in pairwise(x)] or [0.5]
    for i, value in enumerate(values):
        if not math.isfinite(value):
            left, right = x[i] - half[max(0, i - 1)], x[i] + half[min(i, len(half) - 1)]
            axes.axvspan(left, right, **NO_NUMBER)


def comparison_plot(
    rows: Sequence[Any],
    names: tuple[str, str],
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """For each measure the ratio of every pair, second over first, beside 1."""
    shown = [row for row in rows if row.ratios]
    figure, (axes,) = panels(ax, 1.0 + _ROW * max(4, len(shown)))
    pair: dict[str, Any] = {
        "markerfacecolor": "none",
        "markersize": 6,
        "linestyle": "",
        "color": _LOSS,
    }
    mean: dict[str, Any] = {
        "markersize": 15,
        "markeredgewidth": 2,
        "linestyle": "",
        "color": _ACCURACY,
    }
    for i, row in enumerate(shown):
        axes.plot(row.ratios, [i] * len(row.ratios), "o", **pair)
        if len(row.ratios) > 1:
            axes.plot([row.ratio], [i], "|", **mean)
    axes.axvline(1.0, color="0.3", linewidth=1, zorder=0)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.set_ylim(max(1, len(shown)) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    plain_ticks(axes.xaxis)
    axes.grid(axis="x", color="0.9")
    axes.set_title(f"first: {names[0]}\nsecond: {names[1]}", fontsize=8, loc="left")
    several = any(len(row.ratios) > 1 for row in shown)
    dots = "circles are pairs, bars geometric means" if several else "1 is no difference"
    axes.set_xlabel(f"second / first: {dots}")
    return written(figure, path)


def tracking_plot(
    points: Sequence[Any],
    names: Sequence[str],
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Each measure along training with its stability threshold, above the loss.

    Args:
        points: each with `.step`, `.loss`, `.values()` and `.thresholds`.
        names: the measures to draw, from top to bottom.
        path: where the PNG goes, if anywhere.
        ax: whose place to take instead of a new figure.
    """
    num = len(names) + 1
    figure, places = panels(ax, 0.8 + 1.9 * num, [1.0] * num, shared=True)
    kinds = dict.fromkeys(point.statistics for point in points if point.batchnorm)
    if kinds:
        places[0].set_title(f"BatchNorm on {', then '.join(kinds)}", fontsize=9)
    for axes, name in zip(places, names, strict=False):
        _tracked_panel(axes, points, name)
    losses = [point.loss for point in points]
    last = places[-1]
    last.plot([point.step for point in points], losses, ".-", color=_ACCURACY, markersize=4)
    if all(loss > 0 for loss in losses):
        last.set_yscale("log")
        plain_ticks(last.yaxis)
    last.set_ylabel("loss")
    last.set_xlabel("update")
    return written(figure, path)


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
        ends = [v + e for v, e in zip(values, errors, strict=True) if math.isfinite(v + e)]
        axes.set_ylim(0.0, 1.08 * max([*heights, *ends]) or 1.0)
    axes.set_ylabel(
        "phi (%), at least" if name == "phi" else name.replace("_pre", "\n_pre")
    )
