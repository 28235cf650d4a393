"""`python -m sharpness.compare A B`: do two checkpoints, or two groups, differ?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sharpness import _command, measure, measurement
from sharpness._json import as_plain, to_line
from sharpness.record import Records, append_record, read_records
from sharpness.report import figures, tables
from sharpness.statistics import compare_readings

_COMPLETE = ("completed", "converged")


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
    options = _parser().parse_args(arguments)

    def command() -> int:
        device = _command.chosen_device(options.device)
        groups = [_paths(options.first), _paths(options.second)]
        if len(groups[0]) != len(groups[1]):
            raise ValueError(
                "`first` and `second` must be groups of one size, to be compared in "
                f"pairs; got {len(groups[0])} and {len(groups[1])} checkpoints."
            )
        measure.check_options(options, [*groups[0], *groups[1]])
        if options.figure:
            _check_figure(Path(options.figure))
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
            plain = [
                {**as_plain(row), "ratio": row.ratio, "verdict": row.verdict}
                for row in rows
            ]
            print(to_line({"checkpoints": checkpoints, "comparisons": plain}))
        else:
            out = tables.console()
            out.print(tables.comparison_title(first, second))
            out.print(tables.comparison_table(rows))
            for line in tables.comparison_notes(rows, gaps):
                out.print(line)
        complete = all(record["status"] in _COMPLETE for r in records for record in r)
        return _command.OK if complete else _command.NOT_CONVERGED

    return _command.guarded("sharpness.compare", command)


def _check_figure(path: Path) -> None:
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"`--figure` must end in .png, .pdf or .svg; got {path}.")
    _command.check_writable("--figure", path)


def _paths(text: str) -> list[str]:
    found = measure.expanded([part for part in text.split(",") if part])
    if not found:
        raise ValueError(f"`first` and `second` must name checkpoints; got {text!r}.")
    return found


def _record(path: str, options: Any, device: str) -> dict[str, Any]:
    """This checkpoint's measurement: from its record file, or made now and kept."""
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
        if _question(record) == question and record["status"] in _COMPLETE:
            return record
    found = measurement.measured(
        subject, settings, device=device, on_estimate=_command.announce
    )
    append_record(output, found.record)
    if found.interrupted:
        raise KeyboardInterrupt
    return found.record


def _question(record: dict[str, Any]) -> dict[str, Any] | None:
    """What a record answers; None for one of another kind."""
    checkpoint, settings = record.get("checkpoint"), record.get("settings")
    known = isinstance(checkpoint, dict) and isinstance(settings, dict)
    if not known or "readings" not in record or "status" not in record:
        return None
    return {
        "sha256": checkpoint.get("sha256"),  # type: ignore[union-attr]
        "network": checkpoint.get("network"),  # type: ignore[union-attr]
        "data": record.get("data"),
        "settings": {k: v for k, v in settings.items() if k != "risk"},  # type: ignore[union-attr]
    }


def _paired(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both groups in an order in which they pair: by seed, or as they are."""
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
