"""The networks that findings rest on: how each is trained, and having it trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from sharpness import checkpoint
from sharpness.lab import data
from sharpness.lab.data import Dataset
from sharpness.lab.run import DivergedError, train
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.reproduce.serialisation import described, digest, kind

kind("Training")(Training)
kind("Budget")(StoppingCriteria)


@kind("Trained")
@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A network after training, by all that decides it.

    Args:
        data: a name that `data.load` knows.
        training: network, batch size, seed, optimizer, remedy, ...
        budget: how long; networks that differ in `budget.epochs` and
            `budget.until_accuracy` alone are moments of one run.
        until_loss_of: stop as soon as the training loss is that network's.
        start: the network whose parameters are the starting point.
    """

    data: str
    training: Training
    budget: StoppingCriteria
    until_loss_of: ModelSpec | None = None
    start: ModelSpec | None = None

    @cached_property
    def file(self) -> str:
        """Its checkpoint's name: readable, and its own."""
        about = self.training
        parts = [
            re.sub(r"[^\w-]+", "", about.network),
            f"b{about.batch_size}",
            f"s{about.seed}",
            *(["matched"] if self.until_loss_of else []),
            *(["warm"] if self.start else []),
            *([f"e{self.budget.epochs:g}"] if self.budget.epochs else []),
            *(["fitted"] if self.budget.until_accuracy else []),
            digest(self),
        ]
        return "-".join(parts) + ".pt"

    @cached_property
    def run(self) -> str:
        """Which run it is a moment of; one of its own where updates are counted."""
        if self.budget.epochs is None or self.budget.updates is not None:
            return digest(self)
        whole = replace(self.budget, epochs=1.0, until_accuracy=None)
        return digest(replace(self, budget=whole))

    @property
    def after(self) -> tuple[ModelSpec, ...]:
        """Networks that must be there first."""
        return tuple(other for other in (self.until_loss_of, self.start) if other)

    def __str__(self) -> str:
        about = described(self.training)
        rest = (f"{k} {v}" for k, v in about.items() if k not in ("kind", "network"))
        length = f"{self.budget.epochs:g} epochs" if self.budget.epochs else "by updates"
        return f"{about['network']} on {self.data}, {', '.join(rest)}, {length}"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where networks lie, and what they are trained and measured with."""

    folder: Path
    data_dir: str | None = None
    device: str = "cpu"

    def path(self, trained: ModelSpec) -> Path:
        """Of its checkpoint."""
        return self.folder / trained.file

    def diverged(self, trained: ModelSpec) -> str | None:
        """Why there is no such network; None where there is, or may be."""
        note = self.path(trained).with_suffix(".diverged")
        return note.read_text(encoding="utf-8") if note.exists() else None

    def has(self, trained: ModelSpec) -> bool:
        """Whether nothing remains to be done for it."""
        if self.diverged(trained) is not None:
            return True
        with suppress(OSError, ValueError):
            return bool(checkpoint.load(self.path(trained)).training["finished"])
        return False

    def dataset(self, name: str) -> Dataset:
        """A named set; the last few asked for are kept."""
        return data.cached(name, data_dir=self.data_dir)

    def train_missing(self, moments: Sequence[ModelSpec]) -> None:
        """Train one run through its moments, in order of their epochs.

        Each moment is a file of its own; the next carries on from a copy of it, to the
        same bits as a run without stops. So does one whose earlier moments lie here for
        another reason. A run whose loss is no longer finite leaves a note instead of the
        moments it did not reach.
        """
        for moment in sorted(moments, key=_in_order):
            path = self.path(moment)
            if self.has(moment):
                continue
            earlier = self._last_before(moment) or self._fitted_before(moment, moments)
            if earlier is not None and not path.exists():
                _carry_over(earlier, path)
            try:
                self._train(moment, path)
            except DivergedError as error:
                path.unlink(missing_ok=True)
                path.with_suffix(".diverged").write_text(str(error), encoding="utf-8")

    def _last_before(self, moment: ModelSpec) -> Path | None:
        """Of the moments of its run that lie here the latest before it."""
        epochs = moment.budget.epochs or 0.0
        if moment.budget.until_accuracy is not None:
            return None  # the accuracy may have been reached before
        stem, mark, _ = moment.file.rpartition(f"-e{epochs:g}-")
        earlier: dict[float, ModelSpec] = {}
        for file in self.folder.glob(f"{stem}-e*-*.pt") if mark else ():
            at = float(file.name.removeprefix(f"{stem}-e").split("-")[0])
            other = replace(moment, budget=replace(moment.budget, epochs=at))
            if at < epochs and other.file == file.name and other.run == moment.run:
                earlier[at] = other
        for at in sorted(earlier, reverse=True):
            if self.has(earlier[at]) and self.diverged(earlier[at]) is None:
                return self.path(earlier[at])
        return None

    def _fitted_before(self, moment: ModelSpec, others: Sequence[ModelSpec]) -> Path | None:
        """Another moment that stopped at an accuracy, where it is no later than this."""
        for other in others:
            fitted = other.budget.until_accuracy is not None and other != moment
            if fitted and self.has(other) and self.diverged(other) is None:
                epoch = checkpoint.load(self.path(other)).training["epoch"]
                if epoch <= (moment.budget.epochs or 0.0):
                    return self.path(other)
        return None

    def _train(self, moment: ModelSpec, path: Path) -> None:
        training, budget = moment.training, moment.budget
        for other in moment.after:
            if self.diverged(other) is not None:
                raise DivergedError(f"{other} diverged, so this one cannot begin.")
        if moment.start is not None:
            training = replace(training, start_from=str(self.path(moment.start)))
        if moment.until_loss_of is not None:
            twin = checkpoint.load(self.path(moment.until_loss_of))
            budget = replace(
                budget, until_loss=twin.training["metrics"]["train_loss_batch"]
            )
        train(training, budget, self.dataset(moment.data), path, device=self.device)


def _in_order(moment: ModelSpec) -> tuple[bool, float]:
    """What stops at an accuracy comes first: it may be the earliest of all."""
    return moment.budget.until_accuracy is None, moment.budget.epochs or 0.0


def _carry_over(reached: Path, path: Path) -> None:
    """Begin a moment where an earlier one ended; a kill leaves it unfinished."""
    earlier = checkpoint.load(reached)
    training = {**earlier.training, "finished": False}
    checkpoint.save(path, replace(earlier, training=training))


def in_order(wanted: Iterable[ModelSpec]) -> list[list[list[ModelSpec]]]:
    """Stages of runs, each a list of moments; a stage needs only those before it."""
    level: dict[ModelSpec, int] = {}

    def rank(one: ModelSpec) -> int:
        if one not in level:
            level[one] = 1 + max((rank(other) for other in one.after), default=-1)
        return level[one]

    for one in wanted:
        rank(one)
    num = 1 + max(level.values(), default=-1)
    stages: list[dict[str, list[ModelSpec]]] = [{} for _ in range(num)]
    for one, stage in level.items():
        stages[stage].setdefault(one.run, []).append(one)
    return [list(stage.values()) for stage in stages]
