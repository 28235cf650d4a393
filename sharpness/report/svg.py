"""A matplotlib figure as lean SVG that stands in a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element, fromstring, tostring

import matplotlib
from matplotlib.collections import QuadMesh

_CROWD = 200  # marks of a curve, from which on they are pixels
_POINT, _LARGEST = 72.0, 1.42  # points in an inch; pixels for a point, at most
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_BROKEN, _COMMAND = re.compile(r"-?\d+\.\d+"), re.compile(r"\s*([A-Za-z])\s*")
_FONT = re.compile(r"font-family: [^;]*(; |$)")


def maps(figure: Any) -> list[QuadMesh]:
    """Its maps of colours."""
    drawn = [each for axes in figure.axes for each in axes.collections]
    return [each for each in drawn if isinstance(each, QuadMesh)]


def drawn(figure: Any, salt: str = "") -> Element:
    """The figure as an element of a page; maps and crowds of marks as pixels.

    Args:
        figure: of matplotlib.
        salt: another one for each figure of a page, since names of parts are made of it.
    """
    lines = [line for axes in figure.axes for line in axes.lines]
    crowds = [line for line in lines if len(line.get_xdata()) > _CROWD]
    for each in (*maps(figure), *(line for line in crowds if line.get_marker() != "None")):
        each.set_rasterized(True)
    if not maps(figure):
        for axes in figure.axes:
            axes.patch.set_visible(False)  # the page's ground, light or dark
    out = io.BytesIO()
    # Letters instead of their outlines, and the same names of parts every time.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": f"sharpness{salt}"}
    ):
        figure.savefig(out, format="svg", facecolor="none", metadata=_NO_METADATA, dpi=150)
    root = fromstring(out.getvalue().decode())
    for each in root.iter():
        each.tag = each.tag.rpartition("}")[2]
        each.attrib = {k.rpartition("}")[2]: v for k, v in each.attrib.items()}
    root[:] = _kept(root)
    styles = {f"#{each.get('id')}": each.get("style") for each in root.iter("path")}
    for each in root.iter("use"):  # a tick says again what its mark says
        if each.get("style") == styles.get(each.get("href", "")):
            each.attrib.pop("style", None)
    width = _POINT * figure.get_figwidth()
    size = f"min-width:min({width:.0f}px,66rem);max-width:{_LARGEST * width:.0f}px"
    root.attrib = {"viewBox": root.attrib["viewBox"], "style": size}
    return root


def text_of(root: Element) -> str:
    """An element as it stands in a page."""
    return tostring(root, encoding="unicode").replace(" />", "/>")


def _kept(parent: Element, digits: int = 1) -> Iterator[Element]:
    """What is seen of a parent's children: a third of what matplotlib writes.

    Coordinates to a tenth of a point, those of marks that are used again to a hundredth.
    """
    for child in parent:
        child.tail = None
        child[:] = _kept(child, 2 if child.tag == "defs" else digits)
        if child.tag == "g":
            child.attrib.pop("id", None)
            child.text = None
        if child.tag == "g" and not child.attrib:
            yield from child
        elif not _is_empty(child):
            child.attrib = {k: _short(k, v, digits) for k, v in child.attrib.items()}
            yield child


def _is_empty(element: Element) -> bool:
    if element.tag == "path":
        return element.get("style") == "fill: none" or "d" not in element.attrib
    return element.tag == "style" or (element.tag in ("g", "defs") and not len(element))


def _short(name: str, value: str, digits: int) -> str:
    if name == "style":  # the page has the letters' family
        return _FONT.sub("", value).replace(": ", ":").replace("; ", ";").strip("; ")
    if name not in ("d", "x", "y", "transform"):
        return value
    value = _BROKEN.sub(lambda m: f"{round(float(m[0]), digits):g}", value)
    return _COMMAND.sub(r"\1", value.strip()) if name == "d" else value
