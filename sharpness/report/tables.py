"""Terminal tables."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sharpness._results import Reading, number
from sharpness.statistics import ReadingComparison

_PIPED_WIDTH = 124  # columns when the output is no terminal


def console() -> Console:
    """A console on stdout: colour on a terminal only, wide enough in a pipe."""
    return Console(
        width=None if sys.stdout.isatty() else _PIPED_WIDTH,
        highlight=False,
        soft_wrap=False,
        markup=False,
    )


def plain_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: int
) -> Table:
    """A table without frames; the last `right` columns are left-aligned text."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(columns):
        number = 0 < i < len(columns) - right
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def p_value(p: float) -> str:
    """A p-value as it is usually printed."""
    if not math.isfinite(p):
        return "–"
    return f"{p:.1e}" if p < 1e-4 else f"{p:.2g}"


def readings_table(readings: Sequence[Reading]) -> Table:
    """Value, evidence and cost of every number."""
    rows = [(r.name, r.value_text, r.evidence_text, r.cost) for r in readings]
    return plain_table(("measure", "value", "evidence", "cost"), rows, right=2)


class ReadingRows:
    """That table with rows that are printed as they come.

    Args:
        names: what will be measured, from which the first column has its width.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._console = console()
        radius = len("(1e-3, p=100)")
        first = min(30, max(map(len, names), default=0) + radius)
        value, cost = 13, 22
        rest = self._console.width - first - value - cost - 3
        self._widths = (first, value, max(20, rest), cost)
        self._headed = False

    def add(self, readings: Sequence[Reading]) -> None:
        """Print these, below the head of the table if they are the first."""
        table = readings_table(readings)
        table.show_header, table.show_edge = not self._headed, False
        for column, width in zip(table.columns, self._widths, strict=True):
            column.width = width
        self._console.print(table)
        self._console.file.flush()
        self._headed = True


def readings_text(readings: Sequence[Reading], notes: Sequence[str]) -> str:
    """The table as plain text, notes below."""
    return _as_text(readings_table(readings), *notes)


def table_text(columns: Sequence[str], rows: Iterable[Sequence[str]], *notes: str) -> str:
    """Rows of cells as plain text, the last column to the left; notes below."""
    return _as_text(plain_table(columns, rows, right=1), *notes)


def _as_text(*parts: Table | str) -> str:
    out = Console(
        width=_PIPED_WIDTH,
        highlight=False,
        markup=False,
        file=io.StringIO(),
        force_jupyter=False,  # in a notebook it would be shown, and the text be empty
    )
    out.print(*parts, sep="\n")
    return out.file.getvalue().rstrip() + "\n"  # type: ignore[attr-defined,no-any-return]


def headline(record: Mapping[str, Any]) -> str:
    """One line: which network, measured on what, trained how."""
    checkpoint, settings, about = record["checkpoint"], record["settings"], record["data"]
    training, risk = checkpoint["training"], settings["risk"]
    batch = training.get("batch_size")
    trained = (
        f" · trained with batch {batch} for {training['epoch']} epochs" if batch else ""
    )
    normalisation = {
        "batch": " · BatchNorm on batch statistics",
        "running": " · BatchNorm on running statistics",
        "recalibrated": " · BatchNorm on recalibrated statistics",
        None: " · no BatchNorm",
    }[risk["batchnorm"]]
    there = record.get("num_there", risk["num_samples"])
    some = f"{risk['num_samples']} of " if risk["num_samples"] != there else ""
    return (
        f"{checkpoint['network']['name']} · {about['name']} {about['split']}, "
        f"{some}{there} samples{trained}{normalisation}"
    )


def loss_line(record: Mapping[str, Any]) -> str:
    """Loss and accuracy, and those on test samples where there are any."""
    test = record["generalisation"] or {}
    parts = [f"loss {number(record['value'])}"]
    if record["accuracy"] is not None:
        parts.append(f"accuracy {record['accuracy']:.1%}")
    if test:
        parts.append(f"test loss {number(test['test_loss'])}")
    if "test_accuracy" in test:
        parts.append(f"test accuracy {test['test_accuracy']:.1%}")
    return " · ".join(parts)


BOUNDS = (
    "≥: what a search found; the true value may be larger on either side, so two such "
    "values alone do not say which network's is."
)


def comparison_title(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> str:
    """Which checkpoints stand on which side."""
    return f"first: {_side(first)}\nsecond: {_side(second)}"


def _side(group: Sequence[Mapping[str, Any]]) -> str:
    paths = [record["checkpoint"]["path"] for record in group]
    return paths[0] if len(paths) == 1 else f"{len(paths)} checkpoints, {paths[0]}, …"


COMPARED = (
    *("measure", "first", "second", "ratio", "d", "larger", "p", "flip p", "tau"),
    "verdict",
)


def comparison_cells(row: ReadingComparison) -> tuple[str, ...]:
    """The texts below `COMPARED`."""
    return (
        row.name,
        row.first_text,
        row.second_text,
        number(row.ratio),
        number(row.effect_size),
        f"{row.num_larger} of {row.num_pairs}",
        p_value(row.p_value),
        p_value(row.sign_flip_p) if row.num_pairs > 1 else "–",
        "–" if row.kendall_tau is None else f"{row.kendall_tau:.2f}",
        row.verdict.removeprefix("second "),
    )


def comparison_table(rows: Sequence[ReadingComparison]) -> Table:
    """A row for each measure: both sides, ratio, effect, p-values, tau, verdict."""
    table = plain_table(COMPARED, map(comparison_cells, rows), right=1)
    table.columns[0].min_width = max([7, *(len(row.name) for row in rows)])
    return table


def comparison_notes(
    rows: Sequence[ReadingComparison], gaps: Sequence[float | None]
) -> list[str]:
    """What the columns mean, and what so few checkpoints can show at all."""
    num = rows[0].num_pairs if rows else 0
    notes = [
        "ratio: geometric mean of second / first · d: mean over sd of the paired "
        "differences of log10 (of the values where one is not positive)"
    ]
    if num > 1:
        notes.append(
            f"p: one-sided paired t, 'second larger', {num} pairs; above 0.975 it is "
            f"smaller · flip p: sign flips, {rows[0].sign_flip_smallest:.3g} at best"
        )
    else:
        notes.append("One pair: a difference beyond both errors, not a statistical test.")
    if any(row.bound for row in rows):
        notes.append(BOUNDS)
    known = [gap for gap in gaps if gap is not None]
    if len(known) >= 4:
        notes.append(
            "tau: Kendall's, of the measure with the generalisation gap, over "
            f"{len(known)} checkpoints"
        )
    return notes
