"""Terminal tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sharpness.lab.measurement import Measurement
from sharpness.measures.epsilon import short

_PIPED_WIDTH = 124  # columns when the output is no terminal


def console() -> Console:
    """A console on stdout: colour on a terminal only, wide enough in a pipe."""
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(width=width, highlight=False, soft_wrap=False)


def plain_table(title: str, *columns: str, right: int = 0) -> Table:
    """A table without frames; the last `right` columns are left-aligned text."""
    table = Table(
        title=title or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(columns):
        number = 0 < i < len(columns) - right
        table.add_column(column, justify="right" if number else "left")
    return table


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where a person needs none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 4 - 1 - math.floor(math.log10(abs(value))) if value else 0
        return f"{value:.{max(0, min(digits, 6))}f}"
    return f"{value:.3g}"


def mean_sd(mean: float, sd: float) -> str:
    """Mean ± standard deviation, both to the digits the deviation allows."""
    if not math.isfinite(sd):
        return number(mean)
    if sd == 0:
        return f"{number(mean)} ± 0"
    digits = max(0, 1 - math.floor(math.log10(sd)))
    if abs(mean) >= 1:
        digits = min(digits, 2)
    if digits > 5:
        return f"{mean:.3g} ± {sd:.1g}"
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def p_value(p: float) -> str:
    """A p-value as it is usually printed."""
    if not math.isfinite(p):
        return "–"
    return f"{p:.1e}" if p < 1e-4 else f"{p:.2g}"


def measurement_table(measurement: Measurement) -> Table:
    """Value, evidence and cost of every measure of one checkpoint."""
    table = plain_table("", "measure", "value", "evidence", "cost", right=2)
    pairs = measurement.eigenpairs
    for i, value in enumerate(pairs.eigenvalues.tolist()):
        name = "lambda_max" if i == 0 else f"lambda_{i + 1}"
        bound = float(pairs.error_bounds[i])
        cost = f"{pairs.num_hvps} products, {pairs.seconds:.1f} s" if i == 0 else ""
        evidence = f"± {bound:.1g}, {pairs.status}"
        if i == 0 and pairs.lambda_max_upper is not None:
            evidence += f"; below {number(pairs.lambda_max_upper)} (95 %)"
        table.add_row(name, number(value), evidence, cost)
    for phi in measurement.epsilon_sharpness:
        space = "" if phi.subspace_dim is None else f", p={phi.subspace_dim}"
        protocol = "" if phi.phi_protocol is None else f"protocol {phi.phi_protocol:.4g} %"
        share = f"{phi.box_share:.0%} of coordinates on the box"
        table.add_row(
            f"phi({short(phi.epsilon)}{space})",
            f"≥ {number(phi.phi)} %",
            "; ".join(part for part in (protocol, share, _unless_ok(phi)) if part),
            f"{phi.num_evals} evaluations, {phi.seconds:.1f} s",
        )
    return table


def _unless_ok(result: Any) -> str:
    return "" if result.status.ok else str(result.status)


def headline(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """One line: which network, measured on what, trained how."""
    training = checkpoint["training"]
    normalisation = {
        "batch": "BatchNorm on batch statistics",
        "running": "BatchNorm on running statistics",
        "recalibrated": "BatchNorm on recalibrated statistics",
        None: "no BatchNorm",
    }[settings["risk"]["batchnorm"]]
    return (
        f"{checkpoint['network']['name']} · {settings['risk']['num_samples']} "
        f"{settings['split']} samples · trained with batch {training['batch_size']} for "
        f"{training['epoch']} epochs · {normalisation}"
    )
