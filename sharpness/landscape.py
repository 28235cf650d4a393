"""`python -m sharpness.landscape ckpt.pt`: what does the loss look like around it?"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpness import _command, measure
from sharpness._arguments import ensure
from sharpness._json import to_line
from sharpness._results import Result, Status
from sharpness.measures.settings import MeasurementSettings, MeasureSettings

if TYPE_CHECKING:
    from torch import Tensor

    from sharpness.loading import LoadedCheckpoint
    from sharpness.risk.empirical import EmpiricalRisk

_KINDS = ("random", "eigenvectors", "between", "trajectory", "path")


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.landscape",
        description="Draw the loss and the accuracy on a line or a plane through a "
        "checkpoint, with the quadratic model at it.",
        epilog="Finished points are kept in a CSV file: the same command carries on there. "
        "BatchNorm's running statistics fit the checkpoint alone; --batchnorm batch or "
        "recalibrated has those of each point.",
    )
    add = parser.add_argument
    add("checkpoint", help="a .pt or .safetensors file: the centre")
    add("networks", nargs="*", help="others of this network, or a glob in quotes")
    add = parser.add_argument_group("which line or plane").add_argument
    add(
        "--directions",
        choices=_KINDS,
        help="'random' (filter-normalised), 'eigenvectors' of the Hessian, 'between' the "
        "checkpoint and one or two others, 'trajectory' (principal directions of several) "
        "or a bent low-loss 'path' to one (default: random; with one or two networks "
        "between, with more trajectory)",
    )
    add(
        "--dims",
        type=int,
        choices=(1, 2),
        help="a line or a plane (default: 2; between one 1)",
    )
    add("--num-points", type=int, default=21, help="along each direction (default: 21)")
    add("--extent", type=float, help="largest coordinate (default: by the directions)")
    add("--num-steps", type=int, default=200, help="that bend the path (default: 200)")
    add("--seed", type=int, default=0, help="of samples and directions (default: 0)")
    add("--max-seconds", type=float, help="time limit; the points so far are kept")
    measure.add_source(parser)
    measure.add_samples(parser)
    add = parser.add_argument_group("output").add_argument
    add("--figure", help="a PNG, PDF or SVG (default: beside the checkpoint)")
    add("--points", help="the CSV file of points (default: beside the checkpoint)")
    add("--json", action="store_true", help="print the record as JSON on one line")
    _command.add_report(parser, "the picture, every point, how to read it, and the record")
    add("--output", help="record file to append to (default: beside the checkpoint)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return _command.run(_parser(), arguments, _landscape)


def _landscape(options: Any) -> int:
    from sharpness import _pages, measurement
    from sharpness.checkpoint import check_file, weights_of
    from sharpness.record import append_record, new_record

    device = _command.chosen_device(options.device)
    paths = measure.expanded(options.networks)
    kind = _asked(options, len(paths))
    for path in (options.checkpoint, *paths):
        check_file(weights_of(path))
    output = measure.output_of(options, options.checkpoint)
    _command.check_writable("--output", output)
    _command.check_report(options.report)
    subject = measure.loaded(options.checkpoint, options)
    settings = measure.settings_of(options, subject)
    networks = [_state(path, options, subject) for path in paths]
    figure, points = _files(options, subject, kind, settings)
    risk = measurement.risk_of(subject, settings, device)
    found = _seen(options, risk, kind, networks, points)
    found.plot(figure)
    record = new_record(
        "landscape",
        checkpoint=subject.facts,
        networks=paths,
        data=measurement.data_facts(subject, settings),
        settings={**asdict(settings), "risk": risk.settings()},
        status=str(found.status),
        landscape=found,
    )
    append_record(output, record)
    shown = (found, record, options.asked)
    _pages.report("sharpness.landscape", options.report, _pages.landscape_page, *shown)
    if options.json:
        print(to_line(record))
    else:
        _print(found, [f"Figure: {figure}", *([f"Points: {points}"] if points else [])])
    if found.status is Status.INTERRUPTED:
        raise KeyboardInterrupt
    return _command.OK if found.status.ok else _command.NOT_CONVERGED


def _asked(options: Any, num: int) -> str:
    """The kind of picture."""
    usual = ("random", "between", "between", "trajectory")[min(num, 3)]
    kind = options.directions or usual
    alone = kind in ("random", "eigenvectors")
    contract = "come with 'between', 'trajectory' or 'path'"
    ensure(not (alone and num), "networks", contract, f"{num} with {kind!r}")
    ensure(kind != "path" or num == 1, "networks", "be one for 'path'", str(num))
    return kind


def _state(path: str, options: Any, subject: LoadedCheckpoint) -> dict[str, Tensor]:
    from sharpness import checkpoint, state_dicts

    state = checkpoint.load_any(path, options.state).state_dict
    return state_dicts.matched(state, subject.model, path, subject.network_name)[0]


def _files(
    options: Any, subject: LoadedCheckpoint, kind: str, settings: MeasurementSettings
) -> tuple[Path, Path | None]:
    """Figure and points: named for the question, so that each has its own."""
    names = ("networks", "dims", "num_points", "extent", "num_steps", "seed")
    others = replace(settings, of_measures=MeasureSettings())  # without the time limit
    asked = [getattr(options, name) for name in names]
    question = repr((subject.facts["sha256"], subject.data, others, asked))
    digest = hashlib.blake2b(question.encode(), digest_size=4).hexdigest()
    path = Path(options.checkpoint)
    beside = path.with_name(f"{path.stem}-{kind}-{digest}")
    figure = Path(options.figure or beside.with_suffix(".png"))
    _command.check_figure("--figure", figure)
    points = Path(options.points or beside.with_suffix(".csv"))
    _command.check_writable("--points", points)
    return figure, None if kind == "path" else points


def _seen(
    options: Any,
    risk: EmpiricalRisk,
    kind: Any,
    networks: list[dict[str, Tensor]],
    points: Path | None,
) -> Result:
    from sharpness.measures.landscape import low_loss_path
    from sharpness.measures.planes import loss_plane

    shared = {
        "num_points": options.num_points,
        "seed": options.seed,
        "max_seconds": options.max_seconds,
    }
    if kind == "path":
        return low_loss_path(risk, networks[0], num_steps=options.num_steps, **shared)
    return loss_plane(
        risk,
        kind,
        networks,
        dims=options.dims,
        extent=options.extent,
        points_file=points,
        **shared,
    )


def _print(found: Result, notes: list[str]) -> None:
    from sharpness.report import tables

    advice = [] if found.status.ok else [f"{found.status}: {found.status.advice}"]
    print(tables.readings_text(found.readings(), [*advice, *notes]), end="")


if __name__ == "__main__":
    sys.exit(main())
