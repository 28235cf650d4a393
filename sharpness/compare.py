"""`python -m sharpness.compare A B`: do two checkpoints, or two groups, differ?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sharpness import _command, measure
from sharpness.lab import measurement
from sharpness.record import Records, append_record, as_plain, read_records, to_line
from sharpness.report import figures, tables
from sharpness.statistics import compare_readings


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.compare",
        description="Compare two checkpoints or two groups of them, pair by pair, by every "
        "measure of sharpness; and each measure with the generalisation gap.",
        epilog="Pairs share a seed where the checkpoints tell it, else they go by order. A "
        "checkpoint measured with the same settings before is not measured again.",
    )
    add = parser.add_argument
    add("first", help="a checkpoint, or several: a glob in quotes, or names with commas")
    add("second", help="the same for the other side")
    add("--figure", help="PNG with every pair's ratio")
    measure.add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)

    def command() -> int:
        device = _command.chosen_device(options.device)
        groups = [_paths(options.first), _paths(options.second)]
        records = [[_record(p, options, device) for p in group] for group in groups]
        first, second = _paired(*records)
        gaps = [_gap(record) for record in (*first, *second)]
        rows = compare_readings(
            [record["readings"] for record in first],
            [record["readings"] for record in second],
            gaps,
        )
        if options.figure:
            names = (options.first, options.second)
            figures.comparison_plot(rows, names, options.figure)
        if options.json:
            checkpoints = [[r["checkpoint"]["path"] for r in g] for g in (first, second)]
            print(to_line({"checkpoints": checkpoints, "comparisons": as_plain(rows)}))
        else:
            out = tables.console()
            out.print(tables.comparison_title(first, second))
            out.print(tables.comparison_table(rows))
            for line in tables.comparison_notes(rows, gaps):
                out.print(line)
        return _command.OK

    return _command.guarded("sharpness.compare", command)


def _paths(text: str) -> list[str]:
    return measure.expanded([part for part in text.split(",") if part])


def _record(path: str, options: Any, device: str) -> dict[str, Any]:
    """This checkpoint's measurement: from its record file, or made now and kept."""
    subject = measure.opened(path, options)
    settings = measure.settings_of(options, subject)
    output = Path(options.output or Path(path).with_name("records.jsonl"))
    wanted = as_plain(asdict(settings))
    for record in reversed(read_records(output) if output.exists() else Records()):
        same_file = record.get("checkpoint", {}).get("sha256") == subject.facts["sha256"]
        known = {k: v for k, v in record.get("settings", {}).items() if k != "risk"}
        if same_file and known == wanted and "readings" in record:
            return record
    found = measurement.measured(
        subject, settings, device=device, on_estimate=_command.announce
    )
    append_record(output, found.record)
    return found.record


def _paired(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both groups in an order in which they pair: by seed, or as they are."""
    if len(first) != len(second):
        raise ValueError(
            f"`first` and `second` must be groups of one size, to be compared in pairs; "
            f"got {len(first)} and {len(second)} checkpoints."
        )
    seeds = [[r["checkpoint"]["training"].get("seed") for r in g] for g in (first, second)]
    if (
        None in seeds[0]
        or len(set(seeds[0])) < len(first)
        or set(seeds[0]) != set(seeds[1])
    ):
        return first, second
    by_seed = dict(zip(seeds[1], second, strict=True))
    return first, [by_seed[seed] for seed in seeds[0]]


def _gap(record: dict[str, Any]) -> float | None:
    """Accuracy on the samples measured less that on test samples, or the losses'."""
    test = record.get("generalisation") or {}
    found: float | None = test.get("accuracy_gap", test.get("loss_gap"))
    return found


if __name__ == "__main__":
    sys.exit(main())
