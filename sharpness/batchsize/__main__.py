"""`python -m sharpness.batchsize`: which batch size should I use, on my model and data?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharpness import _command
from sharpness._arguments import ensure
from sharpness._json import to_line
from sharpness._progress import duration
from sharpness.record import append_record, new_record


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.batchsize",
        description="Measure what the choice of a batch size depends on (seconds per "
        "update, memory, gradient noise, and a race to a validation loss) and say which "
        "to take, and why. The model and its checkpoint are left as they are.",
    )
    add = parser.add_argument_group("what is trained").add_argument
    parser.add_argument(
        "checkpoint", nargs="?", help="where to start from (default: a new --network)"
    )
    add(
        "--network",
        help="package.module:factory or file.py:factory, with arguments as in "
        "'?depth=20&width=16'; timm:NAME; without a checkpoint also F1, MLP, ...",
    )
    add("--state", help="which state dict, where a checkpoint holds several")
    add(
        "--data",
        help="a named set, an .npz file with x and y (x_test, y_test), a .csv or .parquet "
        "table (?target=COLUMN), or a factory as for --network that returns (inputs, "
        "targets), arrays on disk too, a data set, or these by split (train, test)",
    )
    add("--data-dir", help="folder of a named set's files (also $SHARPNESS_DATA)")
    add(
        "--loss",
        help="'cross-entropy', 'mse', another of torch.nn, or a function as for --network "
        "(default: by the targets)",
    )
    add = parser.add_argument_group("how it is trained so far").add_argument
    add(
        "--optimizer",
        choices=("sgd", "momentum", "adam", "adamw"),
        default="adam",
        help="(default: adam)",
    )
    add(
        "--lr",
        type=float,
        help="a rate that works at --batch-size (default: 1e-3 for adam, else 1e-2)",
    )
    add("--batch-size", type=int, default=128, help="the one used so far (default: 128)")
    add(
        "--batchnorm-batch",
        type=int,
        help="rows of BatchNorm's statistics (default: the whole batch)",
    )
    add = parser.add_argument_group("how it is measured").add_argument
    add(
        "--sizes",
        type=_whole_numbers,
        help="to time and race, with commas (default: powers of two, raced those that "
        "could be best)",
    )
    add("--target", type=float, help="validation loss to reach (default: it says which)")
    add("--seeds", type=int, default=1, help="orders of the rows raced (default: 1)")
    add("--seed", type=int, default=0, help="of a new network and of draws (default: 0)")
    add(
        "--max-seconds",
        type=float,
        default=300.0,
        help="for all of it (default: 300)",
    )
    add("--device", default="auto", help="'auto', 'cpu', ... (default: auto)")
    add = parser.add_argument_group("output").add_argument
    add(
        "--output",
        default="runs/batchsize",
        help="folder for records.jsonl and advice.png (default: runs/batchsize)",
    )
    add("--json", action="store_true", help="print the record, one line of JSON")
    _command.add_report(parser, "the advice, its numbers and figures, and the record")
    return parser


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return _command.run(_parser(), arguments, _advise)


def _advise(options: Any) -> int:
    from sharpness import _pages
    from sharpness.batchsize.advice import batch_size_advice
    from sharpness.loading import load_trainable

    folder = Path(options.output)
    records, picture = folder / "records.jsonl", folder / "advice.png"
    ensure(options.seeds >= 1, "--seeds", "be at least 1", str(options.seeds))
    _command.check_writable("--output", records)
    _command.check_report(options.report)
    device = _command.chosen_device(options.device)
    names = ("network", "state", "data", "loss", "data_dir", "seed")
    subject = load_trainable(
        options.checkpoint, **{name: getattr(options, name) for name in names}
    )
    _command.say("sharpness.batchsize", f"at most {duration(options.max_seconds)}")
    found = batch_size_advice(
        subject.model,
        subject.loss,
        subject.train,
        subject.validation,
        lr=options.lr,
        batch_size=options.batch_size,
        optimizer=options.optimizer,
        batch_sizes=options.sizes,
        target=options.target,
        seeds=tuple(range(options.seeds)),
        batchnorm_batch=options.batchnorm_batch,
        device=device,
        max_seconds=options.max_seconds,
        seed=options.seed,
    )
    record = new_record(
        "batch_size_advice",
        subject=subject.facts,
        notes=subject.notes,
        words=str(found).splitlines(),
        status=str(found.status),
        advice=found,
    )
    append_record(records, record)
    found.plot(picture)
    shown = (found, record, options.asked)
    _pages.report("sharpness.batchsize", options.report, _pages.advice_page, *shown)
    if options.json:
        print(to_line(record))
    else:
        print(*subject.notes, found, sep="\n")
        print(f"\nAppended to {records} · picture: {picture}")
    if found.interrupted:
        raise KeyboardInterrupt
    return _command.OK if found.status.ok else _command.NOT_CONVERGED


if __name__ == "__main__":
    sys.exit(main())
