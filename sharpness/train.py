"""`python -m sharpness.train F1`: networks from the same starts, under any regime."""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpness import _command
from sharpness._arguments import ensure
from sharpness.lab import named
from sharpness.lab.regimes import REGIMES, Regime
from sharpness.lab.training import (
    OPTIMIZERS,
    StoppingCriteria,
    Training,
    default_batch_sizes,
)
from sharpness.measures.registry import TRACKED
from sharpness.record import append_record, new_record, read_records

if TYPE_CHECKING:
    from sharpness.lab.sweep import Outcome, Run

EPOCHS = {"small": 20, "large": 40}
# Flags that may have several values, with commas; each is a setting of `Training`.
_SEVERAL = {"learning_rate": float, "optimizer": str, "remedy": str, "start_from": str}


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.train",
        description="Train a network from the same starting points with several batch "
        "sizes, learning rates, optimizers or remedies (with commas: every combination). "
        "A finished run is skipped, an interrupted one carried on, a failed one recorded.",
        epilog="Names take arguments: 'ResNet-8?batchnorm=False', 'sam?rho=0.1', "
        "'increase?drops=(60,120,160)&max_batch_size=5120', 'decay?drops=(41,)&warmup=4', "
        "'augment?flip=True&crop=4'.",
    )
    add = parser.add_argument
    add("network", help=f"one of {', '.join(named.NETWORKS)}")
    add(
        "--data",
        default="mnist5k",
        help=f"{', '.join(named.DATA)}, an .npz file, or a class-balanced part as in "
        "'cifar10[5000]' (default: mnist5k)",
    )
    add("--data-dir", help="folder of the data set's files (also $SHARPNESS_DATA)")
    add("--regime", choices=sorted(REGIMES), help="a paper's settings; flags override them")
    add(
        "--batch-size",
        help="with commas; 'small' is 256 (32 below 10 000 training samples), 'large' "
        "10 %% of the training set (default: the regime's, or small,large)",
    )
    add("--seeds", type=int, default=1, help="number of starting points (default: 1)")
    group = parser.add_argument_group
    _command.add_flags(group("how long"), StoppingCriteria, as_text=())
    _command.add_flags(group("how"), Training, as_text=(*_SEVERAL, "scaling"))
    add = group("where").add_argument
    add("--output", help="folder for the checkpoints (default: runs/NETWORK-DATA)")
    add("--keep-every", type=int, help="also keep the checkpoint of every so many epochs")
    add(
        "--track",
        type=_command.names,
        help=f"measure on the way, with commas: {', '.join(TRACKED)}; points go to "
        "records.jsonl",
    )
    add("--track-every", type=int, default=50, help="updates between (default: 50)")
    _command.add_report(
        parser, "every run's end and clocks, what was tracked, and the records"
    )
    add("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")
    add("--jobs", type=int, help="runs at once (default: one a core; on a GPU one)")
    _command.add_cluster(add)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return _command.run(_parser(), arguments, _train)


def _train(options: Any) -> int:
    from sharpness.lab.following import Following
    from sharpness.lab.sweep import ExecutionSettings, sweep

    place = ExecutionSettings(
        data=options.data,
        data_dir=options.data_dir,
        device=_command.chosen_device(options.device, options.cluster),
        jobs=options.jobs,
        cluster=options.cluster,
    )
    folder = Path(options.output or _default_folder(options))
    for start in filter(None, (options.start_from or "").split(",")):
        ensure(
            Path(start).is_file(),
            "--start-from",
            "be a checkpoint file",
            f"{start}, no such file",
            "A run keeps some with --keep-every.",
        )
    following = None
    if options.track is not None:
        following = Following(measures=options.track, every=options.track_every)
    try:
        num_train = place.num_train
    except ValueError as error:
        raise ValueError(str(error).replace("`name`", "`--data`")) from None
    runs = list(_runs(options, folder, num_train))
    _check_folder(folder)
    _command.check_report(options.report)
    _say_clocks(runs, num_train)
    outcomes = []
    for outcome in sweep(runs, place, keep_every=options.keep_every, following=following):
        outcomes.append(outcome)
        _note(outcome, folder / "records.jsonl", options.regime)
        _say(outcome, num_train)
    _say_table(outcomes, num_train)
    _report(options, outcomes, folder / "records.jsonl", num_train)
    failed = sum(outcome.failure is not None for outcome in outcomes)
    if failed == len(runs):
        return _command.WRONG_CALL
    return _command.NOT_CONVERGED if failed else _command.OK


def _default_folder(options: Any) -> str:
    parts = [options.network, Path(options.data).name, options.regime]
    return f"runs/{_slug('-'.join(filter(None, parts))).lower()}"


def _runs(options: Any, folder: Path, num_train: int) -> Iterator[Run]:
    """Every combination of what was given with commas, seed by seed."""
    from sharpness.lab.sweep import Run

    ensure(options.seeds >= 1, "--seeds", "be at least 1", str(options.seeds))
    regime = REGIMES[options.regime] if options.regime else Regime(source="")
    sizes = _batch_sizes(options.batch_size, regime, num_train)
    settings, limits = _given(options, Training), _given(options, StoppingCriteria)
    single = {name: value for name, value in settings.items() if name not in _SEVERAL}
    single |= {k: None for k in ("clip_norm", "ghost_batch_size") if single.get(k) == 0}
    choices = [_parts(settings, name, kind) for name, kind in _SEVERAL.items()]
    large = default_batch_sizes(num_train)[1]
    for seed in range(options.seeds):
        for (label, size), *several in itertools.product(sizes.items(), *choices):
            given = {k: v for k, v in zip(_SEVERAL, several, strict=True) if v is not None}
            training = _training(options, regime, {**single, **given}, size, seed)
            default = regime.epochs or EPOCHS["large" if size >= large else "small"]
            epochs = limits.get("epochs", None if "updates" in limits else default)
            stretched = None if epochs is None else epochs * training.stretch
            budget = StoppingCriteria(**{**limits, "epochs": stretched})
            name = "-".join([label, *_differences(given), f"seed{seed}.pt"])
            yield Run(training=training, budget=budget, path=folder / name)


def _given(options: Any, settings: type) -> dict[str, Any]:
    """The flags of a dataclass that were used."""
    flags = [field.name for field in fields(settings) if field.metadata.get("help")]
    return {name: value for name in flags if (value := getattr(options, name)) is not None}


def _training(
    options: Any, regime: Regime, given: Mapping[str, Any], batch_size: int, seed: int
) -> Training:
    own = regime.training.get("optimizer", "adam")
    optimizer = given.get("optimizer", own)
    usual = {"learning_rate": OPTIMIZERS[optimizer][2]} if optimizer in OPTIMIZERS else {}
    # The rate of a regime is meant for its own optimizer.
    layers = (usual, regime.training) if optimizer == own else (regime.training, usual)
    settings = {**layers[0], **layers[1], **given}
    return Training(network=options.network, batch_size=batch_size, seed=seed, **settings)


def _parts(settings: Mapping[str, Any], name: str, kind: Any) -> list[Any]:
    """The values of a flag with commas; [None] where it was not given."""
    text = settings.get(name)
    try:
        return [None] if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        flag = f"--{name.replace('_', '-')}"
        raise ValueError(f"`{flag}` must be numbers with commas; got {text!r}.") from None


def _batch_sizes(text: str | None, regime: Regime, num_train: int) -> dict[str, int]:
    """Label of each run and its batch size: {"small": 32, "batch512": 512}."""
    sizes = dict(zip(("small", "large"), default_batch_sizes(num_train), strict=True))
    text = text or str(regime.batch_size or "small,large")
    contract = f"be 'small', 'large' or a whole number from 1 to {num_train}"
    for part in text.split(","):
        ensure(
            part in sizes or (part.isdecimal() and 1 <= int(part) <= num_train),
            "--batch-size",
            f"{contract} (the training set)",
            repr(part),
        )
    parts = text.split(",")
    return {p if p in sizes else f"batch{p}": sizes.get(p) or int(p) for p in parts}


def _differences(given: Mapping[str, Any]) -> list[str]:
    """Parts of a file's name for settings that were given: 'sgd', 'lr0.01'."""
    said = {
        "learning_rate": lambda value: f"lr{value:g}",
        "start_from": lambda value: f"from-{Path(value).stem}",
    }
    return [said.get(k, _slug)(v) for k, v in given.items() if v not in ("adam", "none")]


def _slug(text: str) -> str:
    """A text as part of a file's name."""
    kept = "".join(c if c.isalnum() or c in "._" else "-" for c in text.replace("=", ""))
    return "-".join(filter(None, kept.split("-")))


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written before anything is trained."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"`--output` must be a folder that can be written; got {folder} "
            f"({error.strerror})."
        ) from None


def _note(outcome: Outcome, path: Path, regime: str | None) -> None:
    """Append a record, unless a run was finished before and is recorded."""
    run = outcome.run
    record = new_record(
        "training",
        path=run.path,
        status="failed" if outcome.failure else "finished",
        failure=outcome.failure,
        training=outcome.facts or run.training,
        budget=run.budget,
        regime=regime and {"name": regime, "source": REGIMES[regime].source},
        seconds=outcome.seconds,
    )
    before = read_records(path) if path.exists() else []
    what = ("path", "status", "failure", "training")
    if any(all(old.get(key) == record[key] for key in what) for old in before):
        return
    try:
        append_record(path, record)
    except OSError as error:  # the checkpoints are what counts
        _command.say("sharpness.train", f"{path}: {error.strerror}")


def _say_clocks(runs: Sequence[Run], num_train: int) -> None:
    """What different batch sizes have to do, where it is not the same."""
    made = {}
    for run in runs:
        with suppress(ValueError):  # that run will say so
            course = run.training.course(num_train)
            updates = run.budget.num_updates(course)
            made[run.training.batch_size] = (updates, course.num_samples(updates))
    if len(set(made.values())) > 1:
        each = "; ".join(f"{b}: {u} updates, {n} samples" for b, (u, n) in made.items())
        print(
            f"By batch size at most {each}. No two sizes are equal in updates, samples and "
            "time at once: --updates gives equal updates, --epochs equal samples.",
            flush=True,
        )


def _clocks(outcome: Outcome, num_train: int) -> tuple[int, int, float]:
    """Updates, samples and seconds of a finished run."""
    updates = outcome.facts["updates"]
    samples = outcome.run.training.course(num_train).num_samples(updates)
    return updates, samples, outcome.facts["seconds"]


def _tested(metrics: Mapping[str, float]) -> str:
    if "test_accuracy_batch" in metrics:
        return f"accuracy {metrics['test_accuracy_batch']:.2%}"
    return f"loss {metrics['test_loss_batch']:.2g}"


def _say(outcome: Outcome, num_train: int) -> None:
    path, facts = outcome.run.path, outcome.facts
    if outcome.failure is not None:
        _command.say("sharpness.train", f"{path}: {outcome.failure}")
        return
    metrics, (updates, samples, seconds) = facts["metrics"], _clocks(outcome, num_train)
    print(
        f"{path}: {facts['epoch']} epochs, {samples} samples, {updates} updates, training "
        f"loss {metrics['train_loss_batch']:.2g}, test {_tested(metrics)}, {seconds:.0f} s"
    )


_COLUMNS = ("run", "batch", "updates", "samples", "seconds", "training loss", "test")


def _rows(outcomes: Sequence[Outcome], num_train: int) -> list[list[str]]:
    """The three clocks and the end of every finished run, by batch size."""
    done = [outcome for outcome in outcomes if outcome.failure is None]
    rows = []
    for outcome in sorted(done, key=lambda o: o.run.training.batch_size):
        updates, samples, seconds = _clocks(outcome, num_train)
        metrics, training = outcome.facts["metrics"], outcome.run.training
        clocks = (str(updates), str(samples), f"{seconds:.1f}")
        loss = f"{metrics['train_loss_batch']:.2g}"
        name = outcome.run.path.name
        rows.append([name, str(training.batch_size), *clocks, loss, _tested(metrics)])
    return rows


def _say_table(outcomes: Sequence[Outcome], num_train: int) -> None:
    """The runs side by side, where batch sizes are compared."""
    from sharpness.report.tables import table_text

    rows = _rows(outcomes, num_train)
    if len({batch_size for _, batch_size, *_ in rows}) > 1:
        print(table_text(_COLUMNS, rows), end="")


def _report(
    options: Any, outcomes: Sequence[Outcome], records: Path, num_train: int
) -> None:
    """The page of `--report`, from the records of these runs."""
    if options.report is None:
        return
    from sharpness import _pages
    from sharpness.report.page import Cell, Table

    cells: list[list[Cell]] = [
        [name, *((text, float(text)) for text in numbers), tested]
        for name, *numbers, tested in _rows(outcomes, num_train)
    ]
    runs = Table(caption="At the end of training", columns=_COLUMNS, rows=cells)
    failures = {str(o.run.path): o.failure for o in outcomes if o.failure is not None}
    shown = (runs, failures, _records_of(outcomes, records), options.asked)
    _pages.report("sharpness.train", options.report, _pages.training_page, *shown)


def _records_of(outcomes: Sequence[Outcome], path: Path) -> list[dict[str, Any]]:
    """Of each run its last record and its points, of those with one number the last."""
    ends = {str(o.run.path): o.facts.get("updates", math.inf) for o in outcomes}
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for record in read_records(path) if path.exists() else ():
        run = record.get("path")
        at = record["point"]["step"] if record["kind"] == "tracking" else -1
        if run in ends and at <= ends[run]:
            last[run, at] = record
    place = {run: i for i, run in enumerate(ends)}
    return [last[key] for key in sorted(last, key=lambda key: (place[key[0]], key[1]))]


if __name__ == "__main__":
    sys.exit(main())
