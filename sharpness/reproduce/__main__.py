"""`python -m sharpness.reproduce keskar2017 --quick`: a paper's findings beside ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sharpness import _command
from sharpness._arguments import package
from sharpness.reproduce import PAPER_NAMES, PRESETS


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.reproduce",
        description="Train what a paper trained, measure it, and print every table and "
        "figure with ours beside theirs and a verdict. What is already there is not done "
        "again: an interrupted run carries on.",
    )
    add = parser.add_argument
    add("paper", nargs="?", choices=sorted(PAPER_NAMES), help="which paper")
    add(
        "--items",
        type=_command.names,
        default=(),
        help="tables or figures, with commas, or 'all' (--list names them; default: the "
        "paper's question in short where it can be had, else all)",
    )
    add("--preset", choices=PRESETS, default="quick", help="size of the job")
    add(
        "--quick",
        action="store_const",
        const="quick",
        dest="preset",
        help="short for --preset quick, the default: minutes on two cores",
    )
    add("--study", action="append", help="network and data, by name (default: all)")
    add("--seeds", type=int, help="starting points (default: the preset's)")
    add("--data-dir", help="folder of the data sets' files (also $SHARPNESS_DATA)")
    add("--output", type=Path, help="run folder (default: runs/reproduce-PRESET)")
    _command.add_report(
        parser, "tables and figures beside the paper's, verdicts, and the records"
    )
    add("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")
    add("--jobs", type=int, help="things done at once (default: one a core)")
    _command.add_cluster(add)
    add("--list", action="store_true", help="name items and studies, and do nothing")
    add("--plan", action="store_true", help="say what would be done, and do nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return _command.run(_parser(), arguments, _reproduce)


def _reproduce(options: argparse.Namespace) -> int:
    package("pandas")  # of the papers' tables: says what to install
    from sharpness.reproduce.command import reproduce

    return reproduce(options)


if __name__ == "__main__":
    sys.exit(main())
