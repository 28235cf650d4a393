"""`python -m sharpness.measure ckpt.pt`: how sharp is this checkpoint?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import Any

from sharpness import _command, loading, measurement
from sharpness._json import to_line
from sharpness._results import Reading
from sharpness.measures.audit import audit
from sharpness.measures.summary import (
    DEFAULT_FAMILIES,
    FAMILIES,
    MEASURES,
    MeasureSettings,
    selected,
)
from sharpness.record import append_record
from sharpness.report import tables
from sharpness.risk.plan import ENGINES

_USUAL = object()  # the number of samples, where none is given


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.measure",
        description="Measure checkpoints by every measure of sharpness, on the same data, "
        "each with its evidence and cost.",
        epilog="Families of measures: "
        + "; ".join(f"{family}: {', '.join(_members(family))}" for family in FAMILIES)
        + f". By default: {', '.join(DEFAULT_FAMILIES)}.",
    )
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="+",
        help="a .pt or .safetensors file, several, or a glob in quotes",
    )
    add_options(parser)
    add(
        "--audit",
        action="store_true",
        help="also: which measures survive maps that keep the function",
    )
    add(
        "--cross-check",
        action="store_true",
        help="also: lambda_max by PyHessian on the same data",
    )
    add(
        "--doctor",
        action="store_true",
        help="check the model and data first: determinism, symmetry, differences of "
        "gradients, BatchNorm, dropout, unused parameters; exit 1 if a check fails",
    )
    return parser


def _members(family: str) -> list[str]:
    return [name for name, measure in MEASURES.items() if measure.family == family]


def add_options(parser: _command.Parser) -> None:
    """What is measured and how: shared with `compare`."""
    _add_subject(parser)
    _add_measures(parser)
    add = parser.add_argument
    add("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")
    add("--dtype", choices=("float32", "float64"), help="(default: as in the checkpoint)")
    add(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="how Hessian-vector products are computed (default: auto, by a rule)",
    )
    add("--json", action="store_true", help="print JSON, one line a record")
    add("--output", help="record file to append to (default: beside the checkpoint)")


def _add_measures(parser: _command.Parser) -> None:
    add = parser.add_argument
    add(
        "--measures",
        type=_command.names,
        help="families or single measures, with commas (`measure --help` lists them)",
    )
    add("--k", type=int, default=1, help="eigenvalues wanted (default: 1)")
    add("--tol", type=float, default=1e-2, help="their relative error (default: 1e-2)")
    add(
        "--epsilon",
        type=_command.floats,
        default=(1e-3, 5e-4),
        help="box sizes of phi, with commas (default: 1e-3,5e-4)",
    )
    add(
        "--subspace-dim",
        type=int,
        help="columns of A for the measure phi_subspace (default: 100)",
    )
    add("--num-starts", type=int, default=1, help="starts of phi (default: 1)")
    add(
        "--rho",
        type=_command.floats,
        help="radii of all perturbation measures, with commas (default: each its own)",
    )
    add("--shard-size", type=int, help="samples of a shard in m-sharpness (default: 128)")
    add(
        "--accuracy-drop",
        type=float,
        default=0.1,
        help="that sigma and alpha are measured by (default: 0.1)",
    )
    add("--max-seconds", type=float, help="time limit of each measure")
    add("--seed", type=int, default=0, help="of samples and draws (default: 0)")


def _add_subject(parser: _command.Parser) -> None:
    add = parser.add_argument
    add(
        "--network",
        help="for a checkpoint of your own: package.module:factory or file.py:factory, "
        "with arguments as in '?depth=20&width=16'; timm:NAME; transformers:FOLDER",
    )
    add(
        "--data",
        help="a named set, an .npz file with x and y, or a factory as for --network that "
        "returns (inputs, targets), batches, a loader, or these by split",
    )
    add("--data-dir", help="folder of a named set's files (also $SHARPNESS_DATA)")
    add("--loss", help="'cross-entropy', 'mse' or a factory (default: by the targets)")
    add(
        "--num-samples",
        type=_command.samples_or_all,
        default=_USUAL,
        help="class-balanced samples, or 'all' (default: 1000, or all if fewer)",
    )
    add("--split", choices=("train", "test"), default="train")
    add(
        "--batchnorm",
        choices=("running", "batch", "recalibrated"),
        default="running",
        help="'running' statistics (evaluation mode), 'batch' statistics as in Keskar et "
        "al., or running ones 'recalibrated' at the point measured (default: running)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)

    def command() -> int:
        device = _command.chosen_device(options.device)
        paths = expanded(options.checkpoint)
        check_options(options, paths)
        if options.cross_check:
            measurement.check_possible(options.batchnorm)
        return max([_one(path, options, device) for path in paths])

    return _command.guarded("sharpness.measure", command)


def check_options(options: Any, paths: Sequence[str]) -> None:
    """Refuse before any work what can be seen to be wrong before it."""
    selected(options.measures)
    measure_settings(options)
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"`{path}` must be a checkpoint file; got no such file. Train one with "
                "`python -m sharpness.train`."
            )
        _command.check_writable("--output", output_of(options, path))


def output_of(options: Any, path: str) -> Path:
    """The record file of a checkpoint."""
    return Path(options.output or Path(path).with_name("records.jsonl"))


def expanded(patterns: Sequence[str]) -> list[str]:
    """Paths, with globs replaced by what they match, in order and once each."""
    found: dict[str, None] = {}
    for pattern in patterns:
        is_glob = any(c in pattern for c in "*?[") and not Path(pattern).exists()
        matches = sorted(glob(pattern, recursive=True)) if is_glob else [pattern]
        if not matches:
            raise FileNotFoundError(
                f"`checkpoint` must match a file; got {pattern!r}, which matches none."
            )
        found |= dict.fromkeys(matches)
    return list(found)


def loaded(path: str, options: Any) -> loading.LoadedCheckpoint:
    """The checkpoint with the network and data that the options name."""
    return loading.load_checkpoint(
        path,
        network=options.network,
        data=options.data,
        loss=options.loss,
        data_dir=options.data_dir,
    )


def settings_of(
    options: Any, subject: loading.LoadedCheckpoint
) -> measurement.MeasurementSettings:
    """The settings from a command's options."""
    num = options.num_samples
    if num is _USUAL:
        num = subject.usual_number(options.split)
    return measurement.MeasurementSettings(
        num_samples=num,
        split=options.split,
        batchnorm=options.batchnorm,
        measures=options.measures,
        of_measures=measure_settings(options),
        engine=options.engine,
        dtype=options.dtype,
        doctor=getattr(options, "doctor", False),
    )


def measure_settings(options: Any) -> MeasureSettings:
    """What the measures share, from a command's options."""
    names = [field.name for field in fields(MeasureSettings)]
    return MeasureSettings(**{name: getattr(options, name) for name in names})


def _one(path: str, options: Any, device: str) -> int:
    subject = loaded(path, options)
    settings = settings_of(options, subject)
    extra: list[Reading] = []
    if options.cross_check:  # first: where it fails, nothing has been spent
        risk = measurement.risk_of(subject, settings, device)
        extra = measurement.pyhessian_readings(risk, seed=options.seed)
    found = measurement.measured(
        subject, settings, device=device, on_estimate=_command.announce
    )
    for reading in extra:
        found.record["readings"][reading.name] = {"value": reading.value, "error": None}
    text, output = "", output_of(options, path)
    try:
        if options.audit and not found.interrupted:
            risk = measurement.risk_of(subject, settings, device)
            audited = audit(risk, **vars(settings.of_measures))
            found.record["audit"] = {r.name: r.value for r in audited.readings()}
            text = audited.table()
    finally:  # what has been measured is kept
        append_record(output, found.record)
    if options.json:
        print(to_line(found.record))
    else:
        _print(found, extra, text, output)
    if found.interrupted:
        raise KeyboardInterrupt  # the others are not begun
    return _command.OK if found.ok else _command.NOT_CONVERGED


def _print(
    found: measurement.Measurement, extra: list[Any], audited: str, output: Path
) -> None:
    out = tables.console()
    summary = found.summary
    out.print(tables.headline(found.record))
    out.print(tables.loss_line(found.record))
    if found.checkup:
        out.print(f"doctor: {found.checkup}")
    out.print(tables.readings_table([*summary.readings(), *extra]))
    if audited:
        out.print(audited)
    for note in summary.notes:
        out.print(note)
    results = [r for results in summary.results.values() for r in results]
    for status in dict.fromkeys(r.status for r in results if not r.status.ok):
        out.print(f"{status}: {status.advice}")
    out.print(f"Appended to {output} · what these mean: docs/concepts/measures.md")


if __name__ == "__main__":
    sys.exit(main())
