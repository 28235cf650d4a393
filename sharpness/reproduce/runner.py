"""Carries a plan out: trains what is lacking, observes it, keeps every record."""

from __future__ import annotations

import time
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sharpness import _progress
from sharpness._arguments import ensure
from sharpness._json import as_plain
from sharpness.lab import data, networks
from sharpness.lab.cluster import Engine, Lost, Task, as_completed, opened, side_by_side
from sharpness.lab.data import Dataset
from sharpness.lab.run import criterion_for
from sharpness.record import append_record, new_record, read_records
from sharpness.reproduce.model_spec import Bench, ModelSpec, in_order
from sharpness.reproduce.observations import Observation
from sharpness.reproduce.serialisation import described, digest, restored

_KIND = "observation"
_Unit = list[ModelSpec] | Observation
Found = dict[str, dict[str, Any]]  # records by the digest of their observation


class ObservationStore:
    """Observations that were made, to be asked for by their plan."""

    def __init__(
        self, records: Iterable[dict[str, Any]], failed: Sequence[str] = ()
    ) -> None:
        self.failed = failed  # what could not be done just now, a line each
        self._found: Found = {
            record["digest"]: record for record in records if record["kind"] == _KIND
        }

    def __contains__(self, observation: Observation) -> bool:
        return digest(observation) in self._found

    def has(self, number: str) -> bool:
        """Whether there is an observation with this digest."""
        return number in self._found

    def __len__(self) -> int:
        return len(self._found)

    def records(self, observations: Iterable[Observation]) -> list[dict[str, Any]]:
        """The records of those that were made, once each."""
        numbers = dict.fromkeys(map(digest, observations))
        return [self._found[number] for number in numbers if number in self._found]

    def get(self, observation: Observation) -> dict[str, Any] | None:
        """What was found; None where it was not observed, or the network diverged."""
        record = self._found.get(digest(observation), {})
        return None if record.get("diverged") else record.get("found")

    def diverged(self, observation: Observation) -> bool:
        """Whether there is no such network because its training diverged."""
        return self._found.get(digest(observation), {}).get("diverged") is not None


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A folder with networks and records, and the means to add to them.

    Args:
        folder: `records.jsonl` and the networks lie here.
        data_dir: where the files of named sets lie.
        device: where to compute.
        jobs: things done at once; None means one a core on a CPU, one on a GPU.
        cluster: where they are done; see `lab.cluster.opened`. None means here.
    """

    folder: Path
    data_dir: str | None = None
    device: str = "cpu"
    jobs: int | None = None
    cluster: str | None = None

    @property
    def bench(self) -> Bench:
        """Where the networks lie; the folder holds them apart from the records."""
        return Bench(
            folder=self.folder / "networks", data_dir=self.data_dir, device=self.device
        )

    @property
    def records(self) -> Path:
        """Where records are kept."""
        return self.folder / "records.jsonl"

    def store(self, failed: Sequence[str] = ()) -> ObservationStore:
        """What has been found so far, and what `failed` on the way."""
        there = read_records(self.records) if self.records.exists() else ()
        return ObservationStore(there, failed)

    def lacking(
        self, wanted: Sequence[Observation]
    ) -> tuple[list[list[list[ModelSpec]]], list[Observation]]:
        """Runs to be trained, in stages, and observations to be made."""
        store = self.store()
        missing = [o for o in dict.fromkeys(wanted) if o not in store]
        needed = dict.fromkeys(one for o in missing for one in o.needs)
        stages = [
            [run for run in stage if not all(map(self.bench.has, run))]
            for stage in in_order(needed)
        ]
        return [stage for stage in stages if stage], missing

    def carry_out(
        self,
        wanted: Sequence[Observation],
        *,
        progress: bool | None = None,
        said: Callable[[str], None] = lambda line: None,
    ) -> ObservationStore:
        """Make every observation that has not been made; each is kept at once.

        Args:
            wanted: what is asked for; networks that it needs are trained first.
            progress: show a bar; by default on a terminal.
            said: called with a line for each network that was trained, and at the end of
                every tenth of the observations.

        Returns:
            all that is known now. What killed its worker each time, and what needs it, is
            left out and told in `failed`; a run that meant to carry on tries it again.
        """
        stages, missing = self.lacking(wanted)
        self.bench.folder.mkdir(parents=True, exist_ok=True)
        layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} to go"
        costs = Costs(self.bench)
        total = round(costs.of_all(stages, missing))
        with (
            warnings.catch_warnings(),
            _progress.bar("reproduce", total, progress, bar_format=layout) as bar,
            self._cluster(max([len(missing), *map(len, stages)])) as engine,
        ):
            work = _Work(self, engine)
            # joblib replaces a process that has grown; nothing is lost, nothing to say.
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
            for stage in stages:
                stage.sort(key=costs.of_run, reverse=True)
                for run, _ in work.each(Bench.train_missing, stage):
                    bar.update(round(costs.of_run(run)))
                    said(f"trained {run[-1]}")
            for i, (observation, record) in enumerate(work.each(_recorded, missing), 1):
                append_record(self.records, record)
                bar.update(round(costs.of(observation)))
                if i * 10 // len(missing) > (i - 1) * 10 // len(missing):
                    said(f"made {i} of {len(missing)} observations")
        return self.store(work.failed)

    def again(self, record: dict[str, Any]) -> dict[str, Any]:
        """Make a record's observation once more, from the plan that stands in it.

        With as many threads as then: the same bits on the same machine and versions.

        Raises:
            ValueError: it is no record of an observation.
        """
        kind = record.get("kind")
        ensure(kind == _KIND, "record", "be of an observation", f"kind {kind!r}")
        observation = restored(record["observation"])
        self.bench.folder.mkdir(parents=True, exist_ok=True)
        with _threads(record["threads"]):
            for stage in in_order(observation.needs):
                for run in stage:
                    self.bench.train_missing(run)
            return _recorded(self.bench, observation)

    def _cluster(self, num: int) -> AbstractContextManager[Engine | None]:
        """The cluster for all stages; None where each has its own processes here."""
        if self.cluster is None:
            return nullcontext()
        return self.engine(num)

    def engine(self, num: int) -> AbstractContextManager[Engine]:
        """What carries out so many things at once, or fewer."""
        asked = self.jobs if self.cluster else self.jobs and min(self.jobs, num)
        return opened(
            self.cluster, jobs=asked, device=self.device, num=num, folder=self.folder
        )


class _Work:
    """Carries units out, and leaves out what needs one that is lost."""

    def __init__(self, runner: Runner, engine: Engine | None) -> None:
        self._runner, self._engine = runner, engine
        self.failed: list[str] = []
        self._gone: set[ModelSpec] = set()

    def each(
        self, work: Callable[[Bench, Any], Any], units: Sequence[_Unit]
    ) -> Iterator[tuple[Any, Any]]:
        """Every unit with what came of it, as they come."""
        sound = []
        for unit in units:
            if self._gone.intersection(_needed(unit)):
                self._fail(unit, "a network that it needs is missing")
            else:
                sound.append(unit)
        bench, runner = self._runner.bench, self._runner
        asked = runner.jobs and min(runner.jobs, len(sound))
        threads = side_by_side(asked, runner.device, len(sound))[1]
        given = None if runner.cluster else threads
        tasks = [Task(partial(_in_bench, given, work, bench, u), _files(u)) for u in sound]
        engine = nullcontext(self._engine) if self._engine else runner.engine(len(sound))
        with engine as open_engine:
            for number, found in as_completed(open_engine, tasks, bench.folder):
                if isinstance(found, Lost):
                    self._fail(sound[number], str(found))
                else:
                    yield sound[number], found

    def _fail(self, unit: _Unit, why: str) -> None:
        if isinstance(unit, Observation):
            about = "; ".join(map(str, unit.needs)) or f"{unit}"
            self.failed.append(f"{type(unit).__name__} of {about}: {why}")
        else:
            self._gone.update(unit)
            self.failed.append(f"{unit[-1]}: {why}")


def _needed(unit: _Unit) -> tuple[ModelSpec, ...]:
    """Networks that must be there before a unit."""
    if isinstance(unit, Observation):
        return unit.needs
    return tuple(other for moment in unit for other in moment.after)


def _files(unit: _Unit) -> tuple[str, ...]:
    """Of the networks that a unit needs or carries on, and notes of divergence."""
    own = [] if isinstance(unit, Observation) else unit
    files = [Path(one.file) for one in (*_needed(unit), *own)]
    return tuple(f"{f.with_suffix(end)}" for f in files for end in (".pt", ".diverged"))


def _in_bench(
    threads: int | None,
    work: Callable[[Bench, _Unit], Any],
    bench: Bench,
    unit: _Unit,
    folder: Path,
) -> Any:
    """Work on a bench whose networks lie in this folder, with so many threads."""
    with _threads(threads or torch.get_num_threads()):
        return work(replace(bench, folder=folder), unit)


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """So many of PyTorch's threads while it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _recorded(bench: Bench, observation: Observation) -> dict[str, Any]:
    began = time.monotonic()
    diverged = next(filter(None, map(bench.diverged, observation.needs)), None)
    return new_record(
        _KIND,
        digest=digest(observation),
        observation=described(observation),
        found=None if diverged else as_plain(observation.found(bench)),
        diverged=diverged,
        device=bench.device,
        threads=torch.get_num_threads(),
        seconds=time.monotonic() - began,
    )


# -- how long it may take ----------------------------------------------------------------

_PROBE = 32  # samples of the gradient that is timed


class Costs:
    """Expected seconds on one core, from a gradient of each network, timed once."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._seconds: dict[tuple[str, str], float] = {}  # for _PROBE samples

    def of_all(
        self, stages: Sequence[Sequence[list[ModelSpec]]], missing: Sequence[Observation]
    ) -> float:
        """Of all that is lacking."""
        runs = [run for stage in stages for run in stage]
        return sum(map(self.of_run, runs)) + sum(map(self.of, missing))

    def of_run(self, run: Sequence[ModelSpec]) -> float:
        """Of training, to its last moment."""
        last = max(run, key=lambda one: one.budget.epochs or 0.0)
        num_train, num_test, _ = self._outline(last.data)
        try:
            updates = last.budget.num_updates(last.training.course(num_train))
        except ValueError:  # it will fail, and say why
            return 0.0
        # An update costs about as much as a gradient of 8 samples, whatever the network.
        samples = (last.budget.epochs or 0.0) * num_train
        samples = (samples or updates * last.training.batch_size) + 8 * updates
        # Every moment is evaluated on both parts, in both ways to run BatchNorm.
        samples += len(run) * 2 * (num_train + num_test) / 3
        return samples / _PROBE * self._gradient(last.training.network, last.data)

    def of(self, observation: Observation) -> float:
        """Of an observation."""
        plans = observation.needs or (observation,)
        probes = [self._gradient(plan.training.network, plan.data) for plan in plans]  # type: ignore[union-attr]
        return observation.gradients / _PROBE * max(probes)

    def _gradient(self, network: str, name: str) -> float:
        """Seconds of one on `_PROBE` samples."""
        if (network, name) not in self._seconds:
            with torch.random.fork_rng(devices=[]), _threads(1):
                *_, dataset = self._outline(name)
                x, y = dataset.train
                model = networks.build(networks.fitted(network, x, y, dataset.num_classes))
                criterion = criterion_for(dataset)
                self._seconds[network, name] = min(
                    timeit.repeat(
                        lambda: criterion(model(x), y).backward(), number=1, repeat=3
                    )
                )
        return self._seconds[network, name]

    def _outline(self, name: str) -> tuple[int, int, Dataset]:
        """Numbers of training and test samples, and some of the training samples.

        They are made up where the files may not be there: only time is taken.
        """
        if known := data.outline(name):
            x, y = torch.rand(_PROBE, *known.shape), torch.arange(_PROBE)
            part = x, y % known.num_classes
            made_up = Dataset(
                name=name,
                train=part,
                test=part,
                num_classes=known.num_classes,
                source="made up",
            )
            return known.num_train, known.num_test, made_up
        dataset = self._bench.dataset(name)
        x, y = dataset.train
        few = replace(dataset, train=(x[:_PROBE], y[:_PROBE]))
        return len(y), len(dataset.test[1]), few
