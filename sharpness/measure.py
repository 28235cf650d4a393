"""`python -m sharpness.measure ckpt.pt`: how sharp is this checkpoint?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sharpness import _command, checkpoint
from sharpness.lab import data, measurement
from sharpness.record import append_record, to_line
from sharpness.report import tables
from sharpness.risk.plan import ENGINES


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.measure",
        description="Measure a checkpoint: lambda_max (the largest Hessian eigenvalue) "
        "and phi(epsilon) (Keskar et al. 2017, Metric 2.1), each with its evidence.",
    )
    add = parser.add_argument
    add("checkpoint", help="a .pt or .safetensors file written by sharpness")
    add("--json", action="store_true", help="print the record as one JSON line")
    add("--output", help="record file to append to (default: beside the checkpoint)")
    add(
        "--num-samples",
        type=_command.samples_or_all,
        default=1000,
        help="class-balanced samples, or 'all' (default: 1000)",
    )
    add("--split", choices=("train", "test"), default="train")
    add(
        "--batchnorm",
        choices=("running", "batch", "recalibrated"),
        default="running",
        help="'running' statistics (evaluation mode), 'batch' statistics as in Keskar et "
        "al., or running ones 'recalibrated' at the point measured (default: running)",
    )
    add("--k", type=int, default=1, help="eigenvalues wanted (default: 1)")
    add("--tol", type=float, default=1e-2, help="their relative error (default: 1e-2)")
    add(
        "--epsilon",
        type=_command.floats,
        default=(1e-3, 5e-4),
        help="box sizes of phi, with commas (default: 1e-3,5e-4)",
    )
    add("--subspace-dim", type=int, help="columns of a random A (default: full space)")
    add("--seed", type=int, default=0, help="of samples and starts (default: 0)")
    add("--max-seconds", type=float, help="time limit of each measure")
    add("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")
    add(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="how Hessian-vector products are computed (default: auto, by a rule)",
    )
    add(
        "--doctor",
        action="store_true",
        help="check the model and data first: determinism, symmetry, differences of "
        "gradients, BatchNorm, dropout, unused parameters; exit 1 if a check fails",
    )
    add("--data-dir", help="folder of the data set's files (also $SHARPNESS_DATA)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    settings = measurement.Settings(
        num_samples=options.num_samples,
        split=options.split,
        batchnorm=options.batchnorm,
        k=options.k,
        tol=options.tol,
        epsilon=options.epsilon,
        subspace_dim=options.subspace_dim,
        seed=options.seed,
        max_seconds=options.max_seconds,
        engine=options.engine,
        doctor=options.doctor,
    )

    def command() -> int:
        loaded = checkpoint.load(options.checkpoint)
        device = _command.chosen_device(options.device)
        dataset = data.load(loaded.data["name"], data_dir=options.data_dir)
        found = measurement.measured(
            loaded, options.checkpoint, dataset, settings, device=device
        )
        default = Path(options.checkpoint).with_name("records.jsonl")
        output = Path(options.output or default)
        append_record(output, found.record)
        if options.json:
            print(to_line(found.record))
        else:
            _print(found, output)
        healthy = found.checkup is None or found.checkup.ok
        ok = healthy and all(status.ok for status in found.statuses)
        return _command.OK if ok else _command.NOT_CONVERGED

    return _command.guarded("sharpness.measure", command)


def _print(found: measurement.Measurement, output: Path) -> None:
    out = tables.console()
    record = found.record
    metrics = record["checkpoint"]["training"].get("metrics") or {}
    test = metrics.get(f"test_accuracy_{record['settings']['batchnorm']}")
    out.print(tables.headline(record["checkpoint"], record["settings"]))
    out.print(
        f"loss {tables.number(found.value)} · accuracy {found.accuracy:.1%}"
        + (f" · test accuracy {test:.1%}" if test is not None else "")
    )
    if found.checkup:
        out.print(f"doctor: {found.checkup}")
    out.print(tables.measurement_table(found))
    for status in {status for status in found.statuses if not status.ok}:
        out.print(f"{status}: {status.advice}")
    out.print(f"Appended to {output} · what these mean: docs/concepts/measures.md")


if __name__ == "__main__":
    sys.exit(main())
