"""One self-contained HTML page of figures, tables and words, and the records behind it.

It opens from disk and asks the network for nothing: its policy forbids that. Every
picture stands beside a table of its numbers. Nothing here knows a measure.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import count, repeat
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

from sharpness._arguments import ensure
from sharpness._json import to_line
from sharpness._results import Reading, plain

Cell: TypeAlias = str | float | tuple[str, float]  # a text with what it is sorted by

MOST_BYTES = 500_000  # of a page, from which on it is packed
_WITHOUT_SCRIPT = "<noscript><p>This page is packed: it needs its script.</p></noscript>"
_SHARES = (1.0, 0.5, 0.25, 0.0)  # of the pictures, till a packed page is small enough
_LEFT_OUT = (
    "pictures, the last ones, are left out: with them this page would take more than "
    "500 kB. Their tables are here."
)
_LONG = 24  # rows, from which on a table scrolls by itself
_RECORDS = re.compile(
    r'<script type="application/(json|gzip)" id="sharpness-records">(.*?)</'
)


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

    One of more than `MOST_BYTES` is packed, by about five times: its script unpacks it.
    Where that is not enough its last pictures are left out, and it says so.

    Args:
        path: of the file, replaced where there is one.
        title: the heading of all.
        sections: in order, each with an entry in the table of contents.
        records: plain values, kept in the page for `read_page`.
    """
    entries = "".join(
        f'<li><a href="#s{i}">{_text(section.title)}</a></li>'
        for i, section in enumerate(sections)
    )
    kept = to_line(list(records))
    page = Template(files("sharpness.report").joinpath("page.html").read_text("utf-8"))
    parts = {
        "title": _text(title),
        "contents": f'<nav aria-label="Contents"><ul>{entries}</ul></nav>',
        "records": _data(kept, ' id="sharpness-records"'),
    }
    pictures = _pictures(sections)
    written = page.substitute(parts, sections=_main(sections, pictures))
    for share in _SHARES if len(written.encode()) > MOST_BYTES else ():
        drawn = dict(list(pictures.items())[: round(share * len(pictures))])
        main = _main(sections, drawn)
        if left := len(pictures) - len(drawn):
            main = f"<p>{left} of {len(pictures)} {_LEFT_OUT}</p>{main}"
        parts["records"] = _packed(kept, ' id="sharpness-records"')
        packed = _packed(main, ' id="packed"') + _WITHOUT_SCRIPT
        written = page.substitute(parts, sections=packed)
        if len(written.encode()) <= MOST_BYTES:
            break
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
    kind, text = found.groups()  # type: ignore[union-attr]
    try:
        plain = gzip.decompress(base64.b64decode(text)) if kind == "gzip" else text
        records = json.loads(plain)
    except (OSError, EOFError, zlib.error, ValueError):  # damaged on its way
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


def _data(text: str, attributes: str) -> str:
    """JSON that the page's script reads; no tag can end it."""
    plain = text.replace("<", "\\u003c")
    return f'<script type="application/json"{attributes}>{plain}</script>'


def _packed(text: str, attributes: str) -> str:
    """The same, compressed; with no time in it, so that equal pages are equal files."""
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return f'<script type="application/gzip"{attributes}>{packed}</script>'


def _pictures(sections: Sequence[Section]) -> dict[str, str]:
    """Every picture as it stands in a page, by its place."""
    return {
        f"{i}-{j}": _picture(block, f"{i}-{j}")
        for i, section in enumerate(sections)
        for j, block in enumerate(section.blocks)
        if isinstance(block, Picture)
    }


def _main(sections: Sequence[Section], pictures: Mapping[str, str]) -> str:
    """All sections, with those of their pictures that are given."""
    return "\n".join(_section(each, i, pictures) for i, each in enumerate(sections))


def _section(section: Section, i: int, pictures: Mapping[str, str]) -> str:
    blocks = "\n".join(
        _block(each, pictures.get(f"{i}-{j}", "")) for j, each in enumerate(section.blocks)
    )
    heading = f'<h2 id="s{i}">{_text(section.title)}</h2>'
    return f'<section aria-labelledby="s{i}">\n{heading}\n{blocks}\n</section>'


def _block(block: Block, picture: str) -> str:
    if isinstance(block, str):
        return f"<p>{_text(block)}</p>"
    if isinstance(block, Table):
        return _figure("", block)
    if isinstance(block, Picture):
        return _figure(picture, block.table)
    if isinstance(block, Mapping):
        terms = (f"<dt>{_text(t)}</dt><dd>{_text(m)}</dd>" for t, m in block.items())
        return f"<dl>{''.join(terms)}</dl>"
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in block)}</ul>"


def _picture(picture: Picture, name: str) -> str:
    """The drawing, and the values of its marks for the script."""
    from sharpness.report import marks, svg

    drawn = svg.drawn(picture.figure, name)
    drawn.attrib |= {"role": "img", "aria-label": picture.alt}
    drawn.attrib |= {"class": "map"} if svg.maps(picture.figure) else {}
    values = to_line(marks.marks(picture.figure))
    shown = _scrolled(svg.text_of(drawn), f"Picture: {picture.table.caption}")
    return shown + _data(values, ' class="marks"')


def _figure(picture: str, table: Table) -> str:
    live = '<p class="live" aria-live="polite"></p>'
    return f"<figure>{picture}{live}{_table(table)}</figure>"


def _scrolled(inner: str, label: str, kind: str = "wide") -> str:
    """What may be wider than the window; the keyboard reaches it."""
    what = f'class="{kind}" tabindex="0" role="group" aria-label="{_text(label)}"'
    return f"<div {what}>{inner}</div>"


def _table(table: Table) -> str:
    first = table.rows[0] if table.rows else [""] * len(table.columns)
    kinds = [_kind(cell) for cell in first]
    all_numbers = all(kinds)  # then no cell has to say so
    heads = "".join(
        f'<th scope="col"{kind}><button type="button">{_text(name)}</button></th>'
        for name, kind in zip(table.columns, kinds, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(map(_cell, row, count(), repeat(all_numbers)))}\n"
        for row in table.rows
    )
    caption = f"<caption>{_text(table.caption)}</caption>"
    start = '<table class="numbers">' if all_numbers else "<table>"
    inner = (
        f"{start}{caption}<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>"
    )
    kind = "wide long" if len(table.rows) > _LONG else "wide"
    return _scrolled(inner, f"Table: {table.caption}", kind)


def _kind(cell: Cell) -> str:
    return "" if isinstance(cell, str) else ' class="n"'


def _cell(cell: Cell, column: int, all_numbers: bool) -> str:
    """A cell; HTML lets its end be left out, a fifth of a long table."""
    kind = "" if all_numbers else _kind(cell)
    start = f"<td{kind}" if column else f"<th scope=row{kind}"
    if isinstance(cell, tuple):
        text, value = cell
        key = f"{value:.9g}" if math.isfinite(value) else ""
        return f'{start} data-value="{key}">{_text(text)}'
    return f"{start}>{plain(cell) if isinstance(cell, float) else _text(cell)}"
