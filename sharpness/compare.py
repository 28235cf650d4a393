"""`python -m sharpness.compare A B`: do two checkpoints, or two groups, differ?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from sharpness import _command, measure
from sharpness._arguments import ensure
from sharpness._json import as_plain, to_line
from sharpness._results import Status
from sharpness.record import Records, append_record, read_records

Record = dict[str, Any]


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
    add("--figure", help="a PNG, PDF or SVG with every pair's ratio")
    measure.add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return _command.run(_parser(), arguments, _compare)


def _compare(options: Any) -> int:
    from sharpness import _pages
    from sharpness.statistics import compare_readings

    device = _command.chosen_device(options.device)
    groups = [_paths(options.first), _paths(options.second)]
    ensure(
        len(groups[0]) == len(groups[1]),
        "first` and `second",
        "be groups of one size, to be compared in pairs",
        f"{len(groups[0])} and {len(groups[1])} checkpoints",
    )
    measure.check_options(options, [*groups[0], *groups[1]])
    if options.figure:
        _command.check_figure("--figure", Path(options.figure))
    records = [[_record(p, options, device) for p in group] for group in groups]
    first, second = _paired(*records)
    gaps = [_gap(record) for record in (*first, *second)]
    rows = compare_readings(_numbers(first), _numbers(second), gaps)
    if options.figure:
        from sharpness.report import figures

        figures.comparison_plot(rows, (options.first, options.second), options.figure)
    names = (options.first, options.second)
    shown = ((first, second), rows, gaps, names)
    _pages.report("sharpness.compare", options.report, _pages.comparison_page, *shown)
    if options.json:
        checkpoints = [[r["checkpoint"]["path"] for r in g] for g in (first, second)]
        derived = [{"ratio": row.ratio, "verdict": row.verdict} for row in rows]
        plain = [as_plain(row) | more for row, more in zip(rows, derived, strict=True)]
        print(to_line({"checkpoints": checkpoints, "comparisons": plain}))
    else:
        _print(first, second, rows, gaps)
    status = Status.worst(*(Status(record["status"]) for record in (*first, *second)))
    return _command.OK if status.ok else _command.NOT_CONVERGED


def _print(
    first: list[Record], second: list[Record], rows: Any, gaps: list[float | None]
) -> None:
    from sharpness.report import tables

    title, table = tables.comparison_title(first, second), tables.comparison_table(rows)
    tables.console().print(title, table, *tables.comparison_notes(rows, gaps), sep="\n")


def _paths(text: str) -> list[str]:
    found = measure.expanded([part for part in text.split(",") if part])
    ensure(bool(found), "first` and `second", "name checkpoints", repr(text))
    return found


def _record(path: str, options: Any, device: str) -> Record:
    """This checkpoint's measurement: from its record file, or made now and kept."""
    from sharpness import measurement

    subject = measure.loaded(path, options)
    settings = measure.settings_of(options, subject)
    output = measure.output_of(options, path)
    question = as_plain(
        {
            "sha256": subject.facts["sha256"],
            "network": subject.facts["network"],
            "data": measurement.data_facts(subject, settings),
            "settings": asdict(settings),
        }
    )
    for record in reversed(read_records(output) if output.exists() else Records()):
        if measure.question_of(record) == question and Status(record["status"]).ok:
            return record
    found = measurement.measured(
        subject, settings, device=device, on_estimate=_command.announce
    )
    append_record(output, found.record)
    if found.interrupted:
        raise KeyboardInterrupt
    return found.record


def _numbers(records: list[Record]) -> list[Any]:
    from sharpness.results import readings_of
    from sharpness.statistics import numbers_of

    return [numbers_of(readings_of(record)) for record in records]


def _paired(first: list[Record], second: list[Record]) -> tuple[list[Record], list[Record]]:
    """Both groups in an order in which they pair: by seed, or as they are."""
    ours, theirs = (
        {record["checkpoint"]["training"].get("seed"): record for record in group}
        for group in (first, second)
    )
    if None in ours or len(ours) < len(first) or ours.keys() != theirs.keys():
        return first, second
    return first, [theirs[seed] for seed in ours]


def _gap(record: Record) -> float | None:
    """Generalisation gap: of the accuracy, or of the loss where there is no accuracy."""
    test = record.get("generalisation") or {}
    return cast("float | None", test.get("accuracy_gap", test.get("loss_gap")))


if __name__ == "__main__":
    sys.exit(main())
