"""`python -m sharpness.train F1`: networks from the same starts, under any regime."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sharpness import _command
from sharpness.lab import data, networks
from sharpness.lab.augment import AUGMENTATIONS
from sharpness.lab.following import Following
from sharpness.lab.regimes import REGIMES, Regime
from sharpness.lab.remedies import REMEDIES
from sharpness.lab.schedules import SCHEDULES
from sharpness.lab.sweep import ExecutionSettings, Outcome, Run, sweep
from sharpness.lab.training import (
    OPTIMIZERS,
    StoppingCriteria,
    Training,
    default_batch_sizes,
)
from sharpness.record import append_record, new_record, read_records
from sharpness.tracking import MEASURES

EPOCHS = {"small": 20, "large": 40}
# Settings of `Training` that are flags of their own; these may be several, with commas.
_SEVERAL = {"learning_rate": float, "optimizer": str, "remedy": str, "start_from": str}
_SINGLE = (
    "momentum",
    "weight_decay",
    "scaling",
    "base_batch_size",
    "schedule",
    "regime_adaptation",
    "clip_norm",
    "ghost_batch_size",
    "augmentation",
)


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
    add("network", help=f"one of {', '.join(sorted(networks.NETWORKS))}")
    add(
        "--data",
        default="mnist5k",
        help=f"{', '.join(data.NAMES)}, an .npz file, or a class-balanced part as in "
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
    _add_budget(parser.add_argument_group("how long"))
    _add_regime(parser.add_argument_group("how"))
    _add_place(parser.add_argument_group("where"))
    return parser


def _add_budget(group: Any) -> None:
    add = group.add_argument
    add(
        "--epochs",
        type=float,
        help="(default: the regime's; else 40 from 10 %% of the training set on, and 20)",
    )
    add("--updates", type=int, help="stop after so many updates, whatever the batch size")
    add("--until-loss", type=float, help="stop earlier, at this training loss")
    add("--patience", type=int, help="stop earlier, after so many epochs no better")


def _add_regime(group: Any) -> None:
    add = group.add_argument
    rates = ", ".join(f"{rate:g} for {name}" for name, (*_, rate) in OPTIMIZERS.items())
    add("--optimizer", help=f"with commas: {', '.join(OPTIMIZERS)} (default: adam)")
    add("--learning-rate", help=f"with commas (default: {rates})")
    add("--momentum", type=float, help="of momentum and nesterov (default: 0.9)")
    add("--weight-decay", type=float, help="(default: 0)")
    add("--scaling", help="of the rate with the batch size: none, linear, sqrt")
    add(
        "--base-batch-size",
        type=int,
        help="that the learning rate is meant for; 1: a rate per sample (default: 256)",
    )
    add(
        "--schedule", help=f"{', '.join(SCHEDULES)}, with ?drops=(epochs,...)&warmup=epochs"
    )
    add(
        "--regime-adaptation",
        action=argparse.BooleanOptionalAction,
        help="as many updates for every batch size: epochs and schedule grow with it",
    )
    add("--clip-norm", type=float, help="longest gradient (default, 0: any)")
    add(
        "--ghost-batch-size",
        type=int,
        help="samples of BatchNorm's statistics (0: the whole batch)",
    )
    add("--augmentation", help=f"{', '.join(AUGMENTATIONS)} (default: none)")
    add("--remedy", help=f"with commas: {', '.join(REMEDIES)} (default: none)")
    add("--start-from", help="with commas: checkpoints whose parameters to start from")


def _add_place(group: Any) -> None:
    add = group.add_argument
    add("--output", help="folder for the checkpoints (default: runs/NETWORK-DATA)")
    add("--keep-every", type=int, help="also keep the checkpoint of every so many epochs")
    add(
        "--track",
        type=_command.names,
        help=f"measure on the way, with commas: {', '.join(MEASURES)}; points go to "
        "records.jsonl",
    )
    add("--track-every", type=int, default=50, help="updates between (default: 50)")
    add("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")
    add("--jobs", type=int, help="runs at once (default: one a core; on a GPU one)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    return _command.guarded("sharpness.train", lambda: _train(options))


def _train(options: argparse.Namespace) -> int:
    place = ExecutionSettings(
        data=options.data,
        data_dir=options.data_dir,
        device=_command.chosen_device(options.device),
        jobs=options.jobs,
    )
    folder = Path(options.output or _default_folder(options))
    for start in (options.start_from or "").split(","):
        if start and not Path(start).is_file():
            raise ValueError(
                f"`--start-from` must be a checkpoint file; got {start}, no such file. A "
                "run keeps some on its way with --keep-every."
            )
    following = None
    if options.track is not None:
        following = Following(measures=options.track, every=options.track_every)
    runs = list(_runs(options, folder, len(_dataset(place).train[0])))
    _check_folder(folder)
    failed = 0
    outcomes = sweep(runs, place, keep_every=options.keep_every, following=following)
    for outcome in outcomes:
        _note(outcome, folder / "records.jsonl", options.regime)
        failed += outcome.failure is not None
        _say(outcome)
    if failed == len(runs):
        return _command.WRONG_CALL
    return _command.NOT_CONVERGED if failed else _command.OK


def _dataset(place: ExecutionSettings) -> data.Dataset:
    try:
        return place.dataset()
    except ValueError as error:
        raise ValueError(str(error).replace("`name`", "`--data`")) from None


def _default_folder(options: argparse.Namespace) -> str:
    parts = [options.network, Path(options.data).name, options.regime]
    return f"runs/{_slug('-'.join(part for part in parts if part)).lower()}"


def _runs(options: argparse.Namespace, folder: Path, num_train: int) -> Iterator[Run]:
    """Every combination of what was given with commas, seed by seed."""
    if options.seeds < 1:
        raise ValueError(f"`--seeds` must be at least 1; got {options.seeds}.")
    regime = REGIMES[options.regime] if options.regime else Regime(source="")
    sizes = _batch_sizes(options.batch_size, regime, num_train)
    single = {k: v for k in _SINGLE if (v := getattr(options, k)) is not None}
    single |= {k: None for k in ("clip_norm", "ghost_batch_size") if single.get(k) == 0}
    choices = [_parts(options, name, kind) for name, kind in _SEVERAL.items()]
    large = default_batch_sizes(num_train)[1]
    for seed in range(options.seeds):
        for (label, size), *several in itertools.product(sizes.items(), *choices):
            given = {k: v for k, v in zip(_SEVERAL, several, strict=True) if v is not None}
            training = _training(options, regime, {**single, **given}, size, seed)
            default = regime.epochs or EPOCHS["large" if size >= large else "small"]
            epochs = default if options.epochs is None else options.epochs
            limited = options.updates is not None and options.epochs is None
            budget = StoppingCriteria(
                epochs=None if limited else epochs * training.stretch,
                updates=options.updates,
                until_loss=options.until_loss,
                patience=options.patience,
            )
            name = "-".join([label, *_differences(given), f"seed{seed}.pt"])
            yield Run(training=training, budget=budget, path=folder / name)


def _training(
    options: argparse.Namespace,
    regime: Regime,
    given: Mapping[str, Any],
    batch_size: int,
    seed: int,
) -> Training:
    settings = {**regime.training, **given}
    optimizer = settings.get("optimizer", "adam")
    if optimizer != regime.training.get("optimizer", optimizer):  # a rate of another
        settings["learning_rate"] = given.get("learning_rate", OPTIMIZERS[optimizer][2])
    if optimizer in OPTIMIZERS:
        settings.setdefault("learning_rate", OPTIMIZERS[optimizer][2])
    return Training(network=options.network, batch_size=batch_size, seed=seed, **settings)


def _parts(options: argparse.Namespace, name: str, kind: Any) -> list[Any]:
    """The values of a flag with commas; [None] where it was not given."""
    text = getattr(options, name)
    if text is None:
        return [None]
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        flag = f"--{name.replace('_', '-')}"
        raise ValueError(f"`{flag}` must be numbers with commas; got {text!r}.") from None


def _batch_sizes(text: str | None, regime: Regime, num_train: int) -> dict[str, int]:
    """Label of each run and its batch size: {"small": 32, "batch512": 512}."""
    small, large = default_batch_sizes(num_train)
    named = {"small": small, "large": large}
    text = text or (str(regime.batch_size) if regime.batch_size else "small,large")
    sizes = {}
    for part in text.split(","):
        if part in named:
            sizes[part] = named[part]
        elif part.isdecimal() and 1 <= int(part) <= num_train:
            sizes[f"batch{part}"] = int(part)
        else:
            raise ValueError(
                "`--batch-size` must be 'small', 'large' or a whole number from 1 to "
                f"{num_train} (the training set); got {part!r}."
            )
    return sizes


def _differences(given: Mapping[str, Any]) -> list[str]:
    """What a file's name says of settings that were given: 'sgd', 'lr0.01'."""
    names = []
    for name, value in given.items():
        if name == "learning_rate":
            names.append(f"lr{value:g}")
        elif name == "start_from":
            names.append(f"from-{Path(value).stem}")
        elif value not in ("adam", "none"):
            names.append(_slug(str(value)))
    return names


def _slug(text: str) -> str:
    """A text as part of a file's name."""
    kept = "".join(c if c.isalnum() or c in "._" else "-" for c in text.replace("=", ""))
    return "-".join(part for part in kept.split("-") if part)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written before anything is trained."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
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
        print(f"sharpness.train: {path}: {error.strerror}", file=sys.stderr)


def _say(outcome: Outcome) -> None:
    if outcome.failure is not None:
        print(f"sharpness.train: {outcome.run.path}: {outcome.failure}", file=sys.stderr)
        return
    facts, metrics = outcome.facts, outcome.facts["metrics"]
    accuracy = metrics.get("test_accuracy_batch")
    tested = f"loss {metrics['test_loss_batch']:.2g}"
    if accuracy is not None:
        tested = f"accuracy {accuracy:.2%}"
    print(
        f"{outcome.run.path}: {facts['epoch']} epochs, {facts['updates']} updates, "
        f"training loss {metrics['train_loss_batch']:.2g}, test {tested}, "
        f"{facts['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
