"""Carries a plan out: trains what is lacking, observes it, keeps every record."""

from __future__ import annotations

import time
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from sharpness import _progress
from sharpness._arguments import ensure
from sharpness._json import as_plain
from sharpness.lab import data, networks
from sharpness.lab.data import Dataset
from sharpness.lab.run import criterion_for
from sharpness.lab.sweep import pool, side_by_side
from sharpness.record import append_record, new_record, read_records
from sharpness.reproduce.model_spec import Bench, ModelSpec, in_order
from sharpness.reproduce.observations import Observation
from sharpness.reproduce.serialisation import described, digest, restored

_KIND = "observation"
_Unit = TypeVar("_Unit")
Found = dict[str, dict[str, Any]]  # records by the digest of their observation


class ObservationStore:
    """Observations that were made, to be asked for by their plan."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
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
    """

    folder: Path
    data_dir: str | None = None
    device: str = "cpu"
    jobs: int | None = None

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

    def store(self) -> ObservationStore:
        """What has been found so far."""
        return ObservationStore(read_records(self.records) if self.records.exists() else ())

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
        """
        stages, missing = self.lacking(wanted)
        self.bench.folder.mkdir(parents=True, exist_ok=True)
        layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} to go"
        costs = Costs(self.bench)
        total = round(costs.of_all(stages, missing))
        with (
            warnings.catch_warnings(),
            _progress.bar("reproduce", total, progress, bar_format=layout) as bar,
        ):
            # joblib replaces a process that has grown; nothing is lost, nothing to say.
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
            for stage in stages:
                stage.sort(key=costs.of_run, reverse=True)
                for run, _ in self._each(Bench.train_missing, stage):
                    bar.update(round(costs.of_run(run)))
                    said(f"trained {run[-1]}")
            for i, (observation, record) in enumerate(self._each(_recorded, missing), 1):
                append_record(self.records, record)
                bar.update(round(costs.of(observation)))
                if i * 10 // len(missing) > (i - 1) * 10 // len(missing):
                    said(f"made {i} of {len(missing)} observations")
        return self.store()

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

    def _each(
        self, work: Callable[[Bench, _Unit], Any], units: Sequence[_Unit]
    ) -> Iterator[tuple[_Unit, Any]]:
        """Every unit with what came of it, as they come."""
        asked = self.jobs and min(self.jobs, len(units))
        jobs, threads = side_by_side(asked, self.device, len(units))
        yield from pool(
            jobs, _with_threads, ((threads, work, self.bench, unit) for unit in units)
        )


def _with_threads(
    threads: int, work: Callable[[Bench, _Unit], Any], bench: Bench, unit: _Unit
) -> tuple[_Unit, Any]:
    with _threads(threads):
        return unit, work(bench, unit)


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
