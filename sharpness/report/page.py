"""One self-contained HTML page of figures, tables and words, and the records behind it.

It opens from disk and asks the network for nothing: its policy forbids that. Every
picture stands beside a table of its numbers. Nothing here knows a measure.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

import matplotlib
from matplotlib.collections import QuadMesh

from sharpness._arguments import ensure
from sharpness._json import to_line
from sharpness._results import Reading, number

Cell: TypeAlias = str | float | tuple[str, float]  # a text with what it is sorted by

_CROWD = 200  # marks of a curve, from which on they are pixels
_LONG = 24  # rows, from which on a table scrolls by itself
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_INDENT, _ATTRIBUTE = re.compile(r"\n\s*"), re.compile(r'="[^"]*"')
_UNUSED = re.compile(r'(?<=<g) id="[^"]*"| transform="rotate\(-?0 [^"]*"')
_DIGITS = re.compile(r"(\d\.\d\d)\d+")
_RECORDS = re.compile(r'<script type="application/json" id="sharpness-records">(.*?)</')


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under a caption; the first cell names its row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A matplotlib figure, what it shows in words, and its numbers."""

    figure: Any
    alt: str
    table: Table


Block: TypeAlias = str | Sequence[str] | Mapping[str, str] | Table | Picture
"""A paragraph, a list, terms with what they mean, a table, a picture."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page under a heading."""

    title: str
    blocks: Sequence[Block]


def write_page(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    records: Sequence[Mapping[str, Any]],
) -> Path:
    """Write a page; a folder that is not there is made.

    Args:
        path: of the file, replaced where there is one.
        title: the heading of all.
        sections: in order, each with an entry in the table of contents.
        records: plain values, kept in the page for `read_page`.
    """
    names, ids = [section.title for section in sections], count()
    entries = "".join(
        f'<li><a href="#s{i}">{_text(n)}</a></li>' for i, n in enumerate(names)
    )
    page = Template(files("sharpness.report").joinpath("page.html").read_text("utf-8"))
    written = page.substitute(
        title=_text(title),
        contents=f'<nav aria-label="Contents"><ul>{entries}</ul></nav>',
        sections="\n".join(_section(each, next(ids)) for each in sections),
        records=to_line(list(records)).replace("<", "\\u003c"),  # no tag may end it
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written, encoding="utf-8")
    return path


def read_page(path: str | Path) -> list[dict[str, Any]]:
    """The records that a page was written with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such page.
    """
    found = _RECORDS.search(Path(path).read_text(encoding="utf-8", errors="replace"))
    advice = "One is written by --report."
    ensure(found is not None, path, "be a report page", "a file of another kind", advice)
    try:
        records = json.loads(found[1])  # type: ignore[index]
    except json.JSONDecodeError:
        records = None
    sound = isinstance(records, list) and all(isinstance(r, dict) for r in records)
    ensure(sound, path, "hold records", "damaged ones", "Write it again.")
    return list(records)


def readings_table(readings: Iterable[Reading], caption: str) -> Table:
    """Value, evidence and cost of every number."""
    rows = [(r.name, (r.value_text, r.value), r.evidence_text, r.cost) for r in readings]
    return Table(
        caption=caption, columns=("measure", "value", "evidence", "cost"), rows=rows
    )


def facts_table(facts: Mapping[str, Any], caption: str) -> Table:
    """Nested plain values, a row each, their names joined by dots."""
    rows = [(name, value) for name, value in _flat(facts) if value not in ("", "None")]
    return Table(caption=caption, columns=("name", "value"), rows=rows)


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    else:
        yield name, str(value)


# -- as HTML ---------------------------------------------------------------------------


def _text(text: object) -> str:
    return html.escape(str(text))


def _section(section: Section, i: int) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    heading = f'<h2 id="s{i}">{_text(section.title)}</h2>'
    return f'<section aria-labelledby="s{i}">\n{heading}\n{blocks}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{_text(block)}</p>"
    if isinstance(block, Table):
        return _figure("", block)
    if isinstance(block, Picture):
        kind = ' class="map"' if _maps(block.figure) else ""
        image = f'<img{kind} src="{_svg(block.figure)}" alt="{_text(block.alt)}">'
        return _figure(_scrolled(image, f"Picture: {block.table.caption}"), block.table)
    if isinstance(block, Mapping):
        terms = (f"<dt>{_text(t)}</dt><dd>{_text(m)}</dd>" for t, m in block.items())
        return f"<dl>{''.join(terms)}</dl>"
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in block)}</ul>"


def _figure(picture: str, table: Table) -> str:
    live = '<p class="live" aria-live="polite"></p>'
    return f"<figure>{picture}{live}{_table(table)}</figure>"


def _scrolled(inner: str, label: str, kind: str = "wide") -> str:
    """What may be wider than the window; the keyboard reaches it."""
    what = f'class="{kind}" tabindex="0" role="group" aria-label="{_text(label)}"'
    return f"<div {what}>{inner}</div>"


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{kind}><button type="button">{_text(name)}</button></th>'
        for name, kind in zip(table.columns, map(_kind, *table.rows[:1]), strict=False)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row, count()))}\n" for row in table.rows)
    caption = f"<caption>{_text(table.caption)}</caption>"
    inner = (
        f"<table>{caption}<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>"
    )
    kind = "wide long" if len(table.rows) > _LONG else "wide"
    return _scrolled(inner, f"Table: {table.caption}", kind)


def _kind(cell: Cell) -> str:
    return "" if isinstance(cell, str) else ' class="n"'


def _cell(cell: Cell, column: int) -> str:
    """A cell; HTML lets its end be left out, a fifth of a long table."""
    start = f"<td{_kind(cell)}" if column else f'<th scope="row"{_kind(cell)}'
    if isinstance(cell, tuple):
        text, value = cell
        key = f"{value:.9g}" if math.isfinite(value) else ""
        return f'{start} data-value="{key}">{_text(text)}'
    return f"{start}>{number(cell) if isinstance(cell, float) else _text(cell)}"


def _maps(figure: Any) -> list[QuadMesh]:
    """Its maps of colours."""
    drawn = [each for axes in figure.axes for each in axes.collections]
    return [each for each in drawn if isinstance(each, QuadMesh)]


def _svg(figure: Any) -> str:
    """The figure as an address that holds it; maps and crowds of marks as pixels."""
    lines = [line for axes in figure.axes for line in axes.lines]
    crowds = [line for line in lines if len(line.get_xdata()) > _CROWD]
    for each in (*_maps(figure), *(line for line in crowds if line.get_marker() != "None")):
        each.set_rasterized(True)
    out = io.BytesIO()
    # Letters instead of their outlines, and the same names of parts every time.
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "sharpness",
            "font.sans-serif": ["DejaVu Sans", "Verdana"],
        }
    ):
        figure.savefig(out, format="svg", facecolor="none", metadata=_NO_METADATA, dpi=150)
    lean = _UNUSED.sub("", _INDENT.sub("\n", out.getvalue().decode()))
    drawn = _ATTRIBUTE.sub(_rounded, lean)
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.encode()).decode()}"


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point, which nobody sees: half the size."""
    return _DIGITS.sub(r"\1", attribute[0])
