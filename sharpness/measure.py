"""`python -m sharpness.measure ckpt.pt`: how sharp is this checkpoint?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpness import _command
from sharpness._arguments import ensure, positive
from sharpness._json import as_plain, to_line
from sharpness.measures.registry import DEFAULT_FAMILIES, FAMILIES, MEASURES
from sharpness.measures.settings import MeasurementSettings, MeasureSettings
from sharpness.record import append_record

if TYPE_CHECKING:
    from sharpness._ranks import Ranks
    from sharpness._results import Reading
    from sharpness.loading import LoadedCheckpoint
    from sharpness.measurement import Measurement

_USUAL = object()  # the number of samples, where none is given


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.measure",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure how sharp checkpoints are: curvature and Keskar's phi by "
        "default, on the\nsame data, each number with its evidence and cost.",
        epilog=_measures_by_family(),
    )
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="*",
        help="a .pt or .safetensors file, a folder of transformers, the name of a model in "
        "Hugging Face's local cache; several, or a glob in quotes",
    )
    add_options(parser)
    add(
        "--from",
        dest="page",
        help="measure again what a page of --report shows, with its settings; what is "
        "given beside it goes before. Functions of --network, --data and --loss have to "
        "be given again: a page runs no code",
    )
    add = parser.add_argument_group("more about a checkpoint").add_argument
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
        "--plan",
        action="store_true",
        help="measure nothing: say how long it takes, and whether the eigenvalues' vectors "
        "fit the memory, from two products",
    )
    add(
        "--resume",
        action="store_true",
        help="keep the search for eigenvalues on disk as it goes, and go on with one that "
        "was cut short by the same command",
    )
    add(
        "--patience",
        type=float,
        default=300.0,
        help="under torchrun: seconds that a process waits for another before it saves "
        "what there is and ends (default: 300)",
    )
    add(
        "--doctor",
        action="store_true",
        help="check the model and data first: determinism, symmetry, differences of "
        "gradients, BatchNorm, dropout, unused parameters; exit 1 if a check fails",
    )
    return parser


def _measures_by_family() -> str:
    """Every measure with its definition, below the family that also names it."""
    lines = ["families and measures, as --measures takes them ('all' for every one):"]
    for family, names in FAMILIES.items():
        default = " (by default)" if family in DEFAULT_FAMILIES else ""
        lines += [f"  {family}{default}"]
        lines += [f"    {name:<25} {MEASURES[name].definition}" for name in names]
    return "\n".join(lines)


_WHICH = (
    *(
        "k",
        "tol",
        "basis_dtype",
        "epsilon",
        "subspace_dim",
        "num_starts",
        "rho",
        "shard_size",
    ),
    *("batch_size", "accuracy_drop"),
)


def add_source(parser: _command.Parser) -> None:
    """Where network and data come from: shared with all that read checkpoints."""
    add = parser.add_argument_group("a network and data of your own").add_argument
    add(
        "--network",
        help="for a checkpoint of your own: package.module:factory or file.py:factory, "
        "with arguments as in '?depth=20&width=16'; timm:NAME; transformers:FOLDER",
    )
    add("--state", help="which state dict, where a file holds several")
    add(
        "--data",
        help="a named set, an .npz file with x and y, a .csv or .parquet table "
        "(?target=COLUMN), a text file for a causal model, or a factory as for --network "
        "that returns (inputs, targets), batches, a loader, or these by split",
    )
    add("--data-dir", help="folder of a named set's files (also $SHARPNESS_DATA)")
    add(
        "--loss",
        help="'cross-entropy', 'mse', another of torch.nn, or a function of (outputs, "
        "targets) as for --network (default: by the targets)",
    )


def add_options(parser: _command.Parser) -> None:
    """What is measured and how: shared with `compare`."""
    add_source(parser)
    which = parser.add_argument_group("which measures")
    _command.add_flags(which, MeasurementSettings, only=("measures",))
    _command.add_flags(which, MeasureSettings, only=_WHICH)
    how = add_samples(parser)
    others = {field.name for field in fields(MeasureSettings)} - set(_WHICH)
    _command.add_flags(how, MeasureSettings, only=others)
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print JSON, one line a record")
    add("--output", help="record file to append to (default: beside the checkpoint)")
    _command.add_report(
        parser, "the numbers with figures, what they mean and do not say, and the record"
    )


def add_samples(parser: _command.Parser) -> Any:
    """On which samples, and how f is computed: the group of flags."""
    how = parser.add_argument_group("on which samples, and how")
    how.add_argument(
        "--num-samples",
        type=_command.samples_or_all,
        default=_USUAL,
        help="class-balanced samples, or 'all' (default: 1000, or all if fewer)",
    )
    others = {field.name for field in fields(MeasurementSettings)} - {"measures"}
    _command.add_flags(how, MeasurementSettings, only=others)
    how.add_argument("--device", default="auto", help="'auto', 'cpu', ... (default: auto)")
    return how


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.page is None and not options.checkpoint:
        parser.error("the following arguments are required: checkpoint, or --from")
    name = parser.prog.removeprefix("python -m ")
    return _command.guarded(name, lambda: _asked(parser, arguments, options))


def _asked(parser: _command.Parser, arguments: Sequence[str] | None, options: Any) -> int:
    """Measure, with the options of a page where one is given below those that are."""
    if options.page is None:
        return _measure(options, [])
    from sharpness._pages import measured_with
    from sharpness.report.page import read_page

    records = read_page(options.page)
    given = options.checkpoint
    parser.set_defaults(**measured_with(options.page, records))
    options = parser.parse_args(arguments)
    source = records[0]["checkpoint"]["source"]
    lost = [k for k in ("network", "data", "loss") if source[k] and not getattr(options, k)]
    flags = " ".join(f"--{name} {source[name]}" for name in lost)
    ensure(
        not lost,
        "--from",
        "have the functions beside it, since a page runs no code",
        str(options.page),
        f"Add {flags}.",
    )
    return _measure(options, [] if given else records)


def _measure(options: Any, before: Sequence[dict[str, Any]]) -> int:
    """Measure every checkpoint; `before` are records that this repeats."""
    from sharpness._ranks import launched

    device = _command.chosen_device(options.device)
    positive("--patience", options.patience)
    with launched(device, options.patience) as ranks, ranks.holding_back_interrupts():
        return _measure_together(options, before, device, ranks)


def _measure_together(
    options: Any, before: Sequence[dict[str, Any]], device: str, ranks: Ranks
) -> int:
    from sharpness import _pages
    from sharpness.measurement import check_possible

    for flag in ("--doctor", "--audit", "--cross-check"):
        asked = getattr(options, flag.strip("-").replace("-", "_"))
        sound, got = ranks.size == 1 or not asked, f"{ranks.size} of them"
        ensure(sound, flag, "be for one process", got, "Run it without torchrun.")
    paths = expanded(options.checkpoint)
    check_options(options, paths)
    if options.cross_check:
        check_possible(options.batchnorm)
    found: list[Measurement] = []
    try:
        codes = [_one(path, options, device, found, ranks) for path in paths]
    finally:  # what has been measured is shown
        if found and ranks.is_first:
            page = _pages.measurement_page
            _pages.report("sharpness.measure", options.report, page, found)
    for old, new in zip(before, found, strict=False):
        _say_what_differs(old, new.record)
    return max(codes)


def _say_what_differs(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Of a measurement that was to be repeated: file, network, data, settings."""
    was, now = question_of(old), question_of(new)
    if was and now and (names := [name for name in was if was[name] != now[name]]):
        path = new["checkpoint"]["path"]
        text = f"not as on the page: {', '.join(names)} of {path}"
        _command.say("sharpness.measure", text)


def question_of(record: dict[str, Any]) -> dict[str, Any] | None:
    """What a record is a measurement of; None for a record of another kind."""
    try:
        checkpoint, settings = record["checkpoint"], dict(record["settings"])
        _ = settings.pop("risk", None), record["measures"], record["status"]
        return {
            "sha256": checkpoint["sha256"],
            "network": checkpoint["network"],
            "data": record["data"],
            "settings": settings,
        }
    except (KeyError, TypeError, ValueError):
        return None


def check_options(options: Any, paths: Sequence[str]) -> None:
    """Refuse wrong options before any work is done."""
    from sharpness.checkpoint import check_file, weights_of
    from sharpness.measures.summary import selected

    selected(options.measures)
    measure_settings(options)
    _command.check_report(options.report)
    for path in paths:
        check_file(weights_of(path))
        _command.check_writable("--output", output_of(options, path))


def output_of(options: Any, path: str) -> Path:
    """The record file of a checkpoint."""
    beside = Path(path) if Path(path).exists() else Path(Path(path).name)
    return Path(options.output or beside.with_name("records.jsonl"))


def expanded(patterns: Sequence[str]) -> list[str]:
    """Paths, with globs replaced by what they match, in order and once each."""
    found: dict[str, None] = {}
    for pattern in patterns:
        is_glob = any(c in pattern for c in "*?[") and not Path(pattern).exists()
        matches = sorted(glob(pattern, recursive=True)) if is_glob else [pattern]
        got = f"{pattern!r}, which matches none"
        ensure(bool(matches), "checkpoint", "match a file", got)
        found |= dict.fromkeys(matches)
    return list(found)


def loaded(path: str, options: Any) -> LoadedCheckpoint:
    """The checkpoint with the network and data that the options name."""
    from sharpness.loading import load_checkpoint

    names = ("network", "state", "data", "loss", "data_dir")
    source = {name: getattr(options, name) for name in names}
    subject = load_checkpoint(path, **source)
    subject.facts["source"] = source  # as given, for who repeats it
    return subject


def settings_of(options: Any, subject: LoadedCheckpoint) -> MeasurementSettings:
    """The settings from a command's options."""
    given = {name: value for name, value in vars(options).items() if name in _SETTINGS}
    if options.num_samples is _USUAL:
        given["num_samples"] = subject.usual_number(options.split)
    return MeasurementSettings(**given, of_measures=measure_settings(options))


_SETTINGS = {field.name for field in fields(MeasurementSettings)}


def measure_settings(options: Any) -> MeasureSettings:
    """What the measures share, from a command's options."""
    names = {field.name for field in fields(MeasureSettings)} & vars(options).keys()
    return MeasureSettings(**{name: getattr(options, name) for name in names})


def _one(
    path: str, options: Any, device: str, done: list[Measurement], ranks: Ranks
) -> int:
    from sharpness import measurement
    from sharpness._ranks import GroupEndedError
    from sharpness.measures.audit import audit

    ranks.heed()
    subject = loaded(path, options)
    settings = settings_of(options, subject)
    if options.plan:
        return _planned(subject, settings, device, ranks)
    extra: list[Reading] = []
    if options.cross_check:  # first: where it fails, nothing has been spent
        risk = measurement.risk_of(subject, settings, device)
        extra = measurement.pyhessian_readings(risk, seed=options.seed)
    shown: dict[str, Any] = {}
    if ranks.is_first:
        shown = {} if options.json else _shown_as_it_comes(settings)
        shown["on_estimate"] = _command.announce
    output = output_of(options, path)
    resume = output.with_name(f"{output.name}.{Path(path).stem}.search")
    found = measurement.measured(
        subject,
        settings,
        device=device,
        ranks=ranks,
        resume=resume if options.resume else None,
        **shown,
    )
    found.record["cross_check"] = as_plain(extra)
    text = ""
    if ranks.lost and not ranks.is_first:  # whether the first can write, nobody knows
        output = output.with_name(f"{output.name}.rank{ranks.rank}")
    try:
        if options.audit and not found.interrupted:
            risk = measurement.risk_of(subject, settings, device)
            audited = audit(risk, **vars(settings.of_measures))
            found.record["audit"] = {r.name: r.value for r in audited.readings()}
            text = audited.table()
    finally:  # what has been measured is kept
        if ranks.is_first or ranks.lost:
            append_record(output, found.record)
        done.append(found)
    if not ranks.is_first:
        pass
    elif options.json:
        print(to_line(found.record))
    else:
        _print(found, extra, text, output)
    if found.interrupted:  # the others are not begun
        if ranks.size > 1:
            why = ranks.lost or "interrupted, so all processes have stopped"
            raise GroupEndedError(f"{why}; {output} has what there is. --resume goes on.")
        raise KeyboardInterrupt
    return _command.OK if found.ok else _command.NOT_CONVERGED


def _planned(
    subject: LoadedCheckpoint, settings: MeasurementSettings, device: str, ranks: Ranks
) -> int:
    """Say what measuring would take; exit code 1 where it does not fit."""
    import torch

    from sharpness.measurement import risk_of
    from sharpness.measures.costs import predicted_costs
    from sharpness.measures.summary import expected_seconds, selected

    risk, chosen = risk_of(subject, settings, device, ranks), settings.of_measures
    kind = getattr(torch, chosen.basis_dtype) if chosen.basis_dtype else None
    costs = predicted_costs(risk, chosen.k, basis_dtype=kind)
    whole = sum(expected_seconds(risk, selected(settings.measures), chosen).values())
    if ranks.is_first:
        print(
            f"{subject.path}: {risk.n} parameters, {risk.num_samples} samples, lambda_max"
        )
        print(*(f"  {line}" for line in costs.lines()), sep="\n")
        print(f"all measures asked for: {whole:.3g} s")
    return _command.OK if costs.fits else _command.NOT_CONVERGED


def _shown_as_it_comes(settings: MeasurementSettings) -> dict[str, Any]:
    """What prints the head when it is known, and each row when it is done."""
    from sharpness.measures.summary import selected
    from sharpness.report import tables

    def begin(known: dict[str, Any]) -> None:
        checkup = known["doctor"]
        parts = (
            tables.headline(known),
            tables.loss_line(known),
            *known["checkpoint"].get("notes", []),
            f"doctor: {checkup}" if checkup else "",
        )
        tables.console().print(*filter(None, parts), "", sep="\n")

    rows = tables.ReadingRows(selected(settings.measures))
    return {"on_begin": begin, "on_readings": rows.add}


def _print(found: Measurement, extra: list[Reading], audited: str, output: Path) -> None:
    """What stands below the rows."""
    from sharpness.report import tables

    summary = found.summary
    results = [r for results in summary.results.values() for r in results]
    bad = dict.fromkeys(r.status for r in results if not r.status.ok)
    parts = (
        tables.readings_table(extra) if extra else "",
        audited,
        *summary.notes,
        *(f"{status}: {status.advice}" for status in bad),
        f"Appended to {output} · what these mean: docs/concepts/which_measure.md",
    )
    tables.console().print("", *filter(None, parts), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
