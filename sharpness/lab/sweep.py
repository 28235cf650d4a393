"""Many training runs: side by side, each resumable, none stopped by another's failure."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sharpness import _progress
from sharpness._arguments import Checked, ensure, setting, whole
from sharpness.lab import data
from sharpness.lab.cluster import (
    Engine,
    Lost,
    Task,
    as_completed,
    checked,
    opened,
    side_by_side,
)
from sharpness.lab.data import Dataset
from sharpness.lab.following import Following
from sharpness.lab.run import train
from sharpness.lab.stacked import can_be_stacked, train_together
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.record import merge_records

_FIXED_COST = 64  # samples whose gradient costs as much as an update of the parameters


@dataclass(frozen=True, kw_only=True)
class Run:
    """One unit of a sweep: what is trained, for how long, and where it goes."""

    training: Training
    budget: StoppingCriteria
    path: Path

    def cost(self, num_train: int) -> float:
        """Relative cost for the progress bar: samples, and a fixed cost of each update."""
        updates = self.budget.num_updates(self.training.course(num_train))
        return updates * (self.training.batch_size + _FIXED_COST)

    def epochs(self, num_train: int) -> float:
        """The largest number of epochs; approximate where batches grow."""
        updates = self.budget.num_updates(self.training.course(num_train))
        return self.budget.epochs or updates * self.training.batch_size / num_train


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: the facts of its checkpoint, or why there is none."""

    run: Run
    seconds: float  # spent on it just now; little for one that was finished already
    failure: str | None = None
    facts: dict[str, Any] = field(repr=False, default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings(Checked):
    """Where a sweep runs, and on what.

    Args:
        data: a name or file that `data.load` knows.
        data_dir: where the files of named sets lie.
        device: where to compute.
        jobs: runs at once; None means one a core on a CPU (no more than there are runs),
            one on a GPU. On a CPU they share the cores: a run's threads are the cores
            divided by `jobs`.
        stacked: whether runs that differ in their seed alone are trained as one stacked
            model where they can be (`stacked.can_be_stacked`); None means on a GPU. On a
            CPU that gains nothing over runs side by side.
        cluster: None for this machine; "dask" or "ray" starts one of two or more workers
            here, "dask://HOST:PORT", "ray://HOST:PORT" and "slurm" use one that is there.
            A worker has as many threads as it was given there, and finds the data itself.
    """

    data: str
    data_dir: str | None = None
    device: str = "cpu"
    jobs: int | None = setting(
        None, check=partial(whole, least=1, advice="None means one a core.")
    )
    stacked: bool | None = None
    cluster: str | None = setting(None, check=checked)

    @property
    def num_train(self) -> int:
        """Training samples; known here, whatever device the workers have."""
        here = self if self.cluster is None else replace(self, device="cpu")
        return len(here.dataset().train[0])

    def dataset(self) -> Dataset:
        """The data set; the last few loaded stay in memory."""
        return data.cached(self.data, data_dir=self.data_dir, device=self.device)

    def side_by_side(self, num_runs: int) -> tuple[int, int]:
        """(runs at once, threads of each) for so many runs."""
        return side_by_side(self.jobs, self.device, num_runs)

    def engine(self, num: int, folder: Path) -> AbstractContextManager[Engine]:
        """What carries out so many tasks in this folder."""
        return opened(
            self.cluster, jobs=self.jobs, device=self.device, num=num, folder=folder
        )


def sweep(
    runs: Sequence[Run],
    place: ExecutionSettings,
    *,
    keep_every: int | None = None,
    following: Following | None = None,
    progress: bool | None = None,
) -> Iterator[Outcome]:
    """Train every run, each to its checkpoint; yields outcomes as they come.

    A run that is finished is not trained again, one that was killed is carried on
    (`run.train`), one that fails is reported and the others go on, and so is one whose
    worker dies each time it is tried (`cluster.as_completed`). Processes end with the
    one that started them.

    Args:
        runs: each with a path of its own.
        place: data, device, how many at once.
        keep_every: also keep the checkpoint of every so many epochs.
        following: measure on the way; see `Following`.
        progress: whether a bar is shown; None means only where a person can see it.

    Raises:
        ValueError: two runs with one path, or a set that cannot be loaded.
    """
    paths = [run.path for run in runs]
    contract = "each have a path of their own"
    for path in paths:
        ensure(paths.count(path) == 1, "runs", contract, f"{path} twice", "Leave one out.")
    num_train = place.num_train
    numbered = list(enumerate(runs))
    units = [[run] for run in numbered] if following else _units(numbered, place)
    jobs, threads = place.side_by_side(len(units))
    root = Path(os.path.commonpath([p.absolute().parent for p in paths] or [Path.cwd()]))
    with (
        _gauge([_cost(run, num_train) for run in runs], progress) as gauge,
        place.engine(len(units), root) as engine,
    ):
        worker = _Worker(
            place=replace(place, cluster=None),
            threads=None if jobs == 1 or place.cluster else threads,
            keep_every=keep_every,
            following=following,
            levels=None if place.cluster else gauge.file,
            apart=place.cluster is not None,
        )
        tasks = [_task(worker, unit, root) for unit in units]
        for number, found in as_completed(engine, tasks, root):
            for outcome in _outcomes(found, [run for _, run in units[number]]):
                _gather_points(outcome.run.path)
                yield outcome
            gauge.end([i for i, _ in units[number]])


_Unit = list[tuple[int, Run]]  # what one worker does at a time, numbered


def _task(worker: _Worker, unit: _Unit, root: Path) -> Task:
    """A unit for whoever does it, with what an interrupted one carries on from."""
    names = [run.path.absolute().relative_to(root) for _, run in unit]
    needs = [
        path.absolute().relative_to(root).as_posix()
        for _, run in unit
        for path in [run.path, *run.path.parent.glob(f"{run.path.stem}-epoch*")]
    ]
    return Task(partial(_in_folder, worker, unit, names, root), tuple(needs))


def _in_folder(
    worker: _Worker, unit: _Unit, names: Sequence[Path], root: Path, folder: Path
) -> list[Outcome]:
    if folder != root:  # another machine's
        unit = [
            (number, replace(run, path=folder / name))
            for (number, run), name in zip(unit, names, strict=True)
        ]
    return worker(unit)


def _outcomes(found: list[Outcome] | Lost, runs: Sequence[Run]) -> list[Outcome]:
    """How the runs of a unit ended, with their paths as they are here."""
    if isinstance(found, Lost):
        return [Outcome(run=run, seconds=math.nan, failure=str(found)) for run in runs]
    return [replace(one, run=run) for one, run in zip(found, runs, strict=True)]


def _points(path: Path) -> Path:
    """Where a run leaves its points when others at other machines do so as well."""
    return path.with_name(f"{path.stem}-points.jsonl")


def _gather_points(path: Path) -> None:
    """Take the points of a run that has ended into the records of its folder."""
    if _points(path).exists():
        merge_records(_points(path), path.with_name("records.jsonl"), path=path)


def _units(runs: _Unit, place: ExecutionSettings) -> list[_Unit]:
    """Runs that can be stacked, together; each other one by itself."""
    stacked = place.device != "cpu" if place.stacked is None else place.stacked
    units: dict[Any, _Unit] = {}
    for number, run in runs:
        together = stacked and can_be_stacked([run.training], run.budget)
        key = (replace(run.training, seed=0), run.budget) if together else number
        units.setdefault(key, []).append((number, run))
    return list(units.values())


def _cost(run: Run, num_train: int) -> float:
    try:
        return run.cost(num_train)
    except ValueError:  # it will fail, and say why
        return 0.0


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """Trains a unit, in whatever process; what goes wrong becomes its failure."""

    place: ExecutionSettings
    threads: int | None  # None: as they are
    keep_every: int | None
    following: Following | None
    levels: Path | None  # None: nobody looks
    apart: bool = False  # points go to a file of the run's own

    def __call__(self, unit: _Unit) -> list[Outcome]:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if len(unit) > 1:
            with suppress(Exception):  # one by one, each says what is wrong with it
                return self._together(unit)
        return [self._alone(number, run) for number, run in unit]

    def _together(self, unit: _Unit) -> list[Outcome]:
        began, runs = time.monotonic(), [run for _, run in unit]
        trained = train_together(
            [run.training for run in runs],
            runs[0].budget,
            self.place.dataset(),
            [run.path for run in runs],
            device=self.place.device,
            keep_every=self.keep_every,
            on_epoch=lambda epoch, loss: self._show(unit, epoch),
        )
        spent = time.monotonic() - began  # on all of them together
        return [
            Outcome(run=run, seconds=spent, facts=done.training)
            for run, done in zip(runs, trained, strict=True)
        ]

    def _alone(self, number: int, run: Run) -> Outcome:
        began, facts, failure = time.monotonic(), {}, None
        options: dict[str, Any] = {}
        try:
            dataset = self.place.dataset()
            if self.following is not None:
                options["on_update"] = self.following.of(
                    dataset,
                    run.path,
                    run.training.batch_size,
                    records=_points(run.path) if self.apart else None,
                )
            facts = train(
                run.training,
                run.budget,
                dataset,
                run.path,
                device=self.place.device,
                keep_every=self.keep_every,
                on_epoch=lambda epoch, loss: self._show([(number, run)], epoch),
                **options,
            ).training
        except Exception as error:  # the others go on
            kind = "" if isinstance(error, ValueError | OSError) else type(error).__name__
            failure = " ".join(f"{kind}: {error}".removeprefix(": ").split())
        self._show([(number, run)])
        return Outcome(
            run=run, seconds=time.monotonic() - began, failure=failure, facts=facts
        )

    def _show(self, unit: _Unit, epoch: int | None = None) -> None:
        """Write down how far the runs are; `epoch=None` means at their end."""
        if self.levels is None:
            return
        num_train, levels = len(self.place.dataset().train[0]), np.memmap(self.levels, "f8")
        for number, run in unit:
            done = 1.0 if epoch is None else epoch / run.epochs(num_train)
            levels[number] = min(1.0, done)


# -- progress across processes ---------------------------------------------------------


@dataclass(frozen=True)
class _Gauge:
    """How much of each run is done: a number from 0 to 1 in a file."""

    file: Path

    def end(self, numbers: Sequence[int]) -> None:
        """These are done."""
        np.memmap(self.file, "f8")[list(numbers)] = 1.0


@contextmanager
def _gauge(costs: Sequence[float], progress: bool | None) -> Iterator[_Gauge]:
    """A progress bar over all runs, which report in a shared file."""
    layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} to go"
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        _progress.bar("train", round(sum(costs)) or 1, progress, bar_format=layout) as bar,
    ):
        file = Path(folder) / "levels"
        np.memmap(file, np.float64, "w+", shape=(max(1, len(costs)),)).flush()
        done = threading.Event()
        follower = threading.Thread(target=_follow, args=(bar, file, costs, done))
        follower.start()
        try:
            yield _Gauge(file)
        finally:
            done.set()
            follower.join()


def _follow(bar: Any, file: Path, costs: Sequence[float], done: threading.Event) -> None:
    levels: NDArray[np.float64] = np.memmap(file, np.float64, "r")
    while not done.wait(0.5):
        bar.n = float(np.dot(levels[: len(costs)], costs))
        bar.refresh()
