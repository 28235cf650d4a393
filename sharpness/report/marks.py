"""Where the marks of a drawn figure are, and what values they stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator

from sharpness._results import plain

Mark: TypeAlias = list[Any]  # x, y, and each value in words
Series: TypeAlias = tuple[list[str], list[Mark]]  # names of the values, and marks

_MOST = 250  # of a curve; of more, every so many
_POINT = 72.0  # of them in an inch: the unit of a figure's SVG
_BAR = "<colorbar>"  # how matplotlib calls its axes
_IS_NUMBER = re.compile(r"[≥≤]?\s*[-−\d]")


def marks(figure: Any) -> list[Series]:
    """Every mark of curves, bars and maps that has values, where it was last drawn.

    Args:
        figure: of matplotlib, drawn before; places are in points from its top left.
    """
    scale, height = _POINT / figure.dpi, _POINT * figure.get_figheight()
    found: list[Series] = []
    for axes in figure.axes:
        for names, places, values in _series(axes) if axes.get_label() != _BAR else ():
            shown = [
                [round(x * scale, 1), round(height - y * scale, 1), *texts]
                for (x, y), texts in zip(places, values, strict=True)
                if math.isfinite(x + y)
            ]
            if shown:
                found.append((names, shown))
    return found


_Found: TypeAlias = tuple[list[str], Any, list[list[str]]]  # places in pixels (m, 2)


def _series(axes: Axes) -> Iterator[_Found]:
    for mesh in axes.collections:
        if isinstance(mesh, QuadMesh):
            yield _of_map(axes, mesh)
    bars = [each for each in axes.containers if isinstance(each, BarContainer)]
    errors = [each for each in axes.containers if isinstance(each, ErrorbarContainer)]
    yield from (_of_bars(axes, each) for each in bars)
    caps = {id(line) for each in errors for line in each.lines[1]}
    with_errors = {id(each.lines[0]): each for each in errors}
    for line in axes.lines:
        if id(line) not in caps and (known := _of_line(axes, line, with_errors)):
            yield known


def _of_map(axes: Axes, mesh: QuadMesh) -> _Found:
    """The middle of each cell; "no number" where it is none."""
    corners: Any = mesh.get_coordinates()
    numbers: Any = mesh.get_array()
    cells = (corners[:-1, :-1] + corners[1:, 1:]) / 2  # (b, a, 2)
    values = np.ma.filled(numbers, math.nan).ravel()
    bar = mesh.colorbar.ax if mesh.colorbar else axes
    up = _name(axes, "y") or _name(axes.figure.axes[0], "y")  # of maps side by side
    names = [_name(axes, "x"), up, bar.get_xlabel() or bar.get_ylabel()]
    at = cells.reshape(-1, 2)
    told = [
        [_told(x), _told(y), _told(value)] for (x, y), value in zip(at, values, strict=True)
    ]
    return names, axes.transData.transform(at), told


def _of_bars(axes: Axes, bars: BarContainer) -> _Found:
    at = [
        (bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in bars
    ]
    values = [_at_row(axes, row, value) for value, row in at]
    return ["", _name(axes, "x"), ""], axes.transData.transform(at), values


def _of_line(axes: Axes, line: Any, with_errors: dict[int, Any]) -> _Found | None:
    """Points of a curve; a helping line without a name has none."""
    label, container = line.get_label(), with_errors.get(id(line))
    if container is not None:
        label = container.get_label() or ""
    label = "" if label.startswith("_") else label
    across, up = line.get_transform().contains_branch_seperately(axes.transData)
    at = np.column_stack([np.asarray(each, float) for each in line.get_data()])
    if not len(at) or not (across or up) or not (label or (across and up)):
        return None
    ends = _ends(container, len(at))
    step = -(-len(at) // _MOST)
    rows = list(zip(at, ends, strict=True))[::step]
    places = line.get_transform().transform(at[::step])
    if across and up and _categories(axes):
        told = [_at_row(axes, y, x, end) for (x, y), end in rows]
        return [label, _name(axes, "x"), ""], places, told
    names = [label, _name(axes, "x") * across, _name(axes, "y") * up]
    told = [["", _told(x) * across, (_told(y) + end) * up] for (x, y), end in rows]
    return names, places, told


def _at_row(axes: Axes, row: float, value: float, interval: str = "") -> list[str]:
    """The name of a row, and its value: as it is written beside it, where it is."""
    names = _categories(axes)
    near = min(names, key=lambda at: abs(at - row), default=math.nan)
    name = names[near] if abs(near - row) < 0.5 else ""
    notes = {t.xy[1]: t.get_text() for t in axes.texts if isinstance(t, Annotation)}
    note = notes.get(row, "")
    if _IS_NUMBER.match(note):
        return [name, note, ""]
    return [name, _told(value) + interval, note]


def _categories(axes: Axes) -> dict[float, str]:
    """Names of rows, by their place; none on an axis of numbers."""
    if not isinstance(axes.yaxis.get_major_locator(), FixedLocator):
        return {}
    places = [float(place) for place in axes.yaxis.get_majorticklocs()]
    names = axes.yaxis.get_major_formatter().format_ticks(places)
    return dict(zip(places, names, strict=True))


def _ends(container: Any, num: int) -> Sequence[str]:
    """` (0.1 to 0.2)` for each point that has an error bar."""
    if container is None or not container.lines[2]:
        return [""] * num
    axis = 0 if container.has_xerr else 1
    segments = container.lines[2][0].get_segments()
    spans = [np.reshape(segment, (-1, 2))[:, axis] for segment in segments]
    known = [len(span) == 2 and span[0] != span[1] for span in spans]
    texts = [
        f" ({_told(min(span))} to {_told(max(span))})" if there else ""
        for span, there in zip(spans, known, strict=True)
    ]
    return texts if len(texts) == num else [""] * num


def _name(axes: Axes, which: str) -> str:
    """What an axis shows: of those that share it, one has the words."""
    group = axes.get_shared_x_axes() if which == "x" else axes.get_shared_y_axes()
    labels = [
        getattr(one, f"get_{which}label")() for one in (axes, *group.get_siblings(axes))
    ]
    titles = [axes.get_title("left"), axes.get_title()] if which == "y" else []
    return next(filter(None, (*labels, *titles)), "").replace("\n", " ")


def _told(value: float) -> str:
    return plain(value) if math.isfinite(value) else "no number"
