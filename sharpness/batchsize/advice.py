"""Which batch size should I use? An answer from measurements on one's own model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sharpness._arguments import positive, require, whole, whole_seed
from sharpness._results import Cost, NotAvailableError, Result, Status
from sharpness._run import Deadline
from sharpness.batchsize.choice import Choice, beyond, chosen, to_race, usual_sizes
from sharpness.batchsize.problem import OptimizerFactory, Problem
from sharpness.batchsize.race import Race, SizeResult, race
from sharpness.batchsize.result import BatchSizeAdvice
from sharpness.batchsize.updates import UpdateTimes, time_per_update
from sharpness.measures.gradient_noise import GradientNoise, gradient_noise
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.model_state import batchnorm_layers
from sharpness.tracking import batch_thresholds, stability_thresholds

_SHARES = {"times": 0.15, "noise": 0.1}  # of the time; the race has the rest
_RATES = (0.5, 1, 2)  # times the rule's; the race goes on where the best is at an end
_WIDENED = 1  # sizes that the race may go on with
_RUNS = 5  # as long as the longest, that a size takes in all
_GIVE_UP = 3.0  # times the seconds of the soonest size
_MEASURES, _MEASURED_ROWS = 90, 1024  # gradients and rows that sharpness at an end takes
_NOISE_ROWS = 2048
_BATCHES = 16  # of rows, where they have no gradients of their own


def batch_size_advice(
    model: nn.Module,
    loss: Callable[..., Tensor] | str,
    data: Any,
    validation: Any = None,
    *,
    lr: float | None = None,
    batch_size: int = 128,
    optimizer: str | OptimizerFactory = "adam",
    batch_sizes: Sequence[int] | None = None,
    target: float | None = None,
    seeds: Sequence[int] = (0,),
    batchnorm_batch: int | None = None,
    device: str | torch.device | None = None,
    max_seconds: float = 300.0,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> BatchSizeAdvice:
    r"""Which batch size reaches a validation loss soonest, measured on this model and data.

    The time to a target is $T(B) = S_{min} (1 + B_{crit} / B)\, t(B)$: t(B), seconds per
    update, is measured at every size; the updates $S_{min} (1 + B_{crit} / B)$ are fitted
    to a race, which trains from this start with several sizes and rates until the target
    is reached. The size with the least T is advised, with those within 10 % of it. The
    gradient noise scale only says which sizes are worth racing: by itself it missed the
    critical batch size of language models by orders of magnitude.

    Args:
        model: the starting point. It is left as it was; copies are trained.
        loss: the mean over rows, as `EmpiricalRisk` takes it; also a name.
        data: training rows: a pair (inputs, targets) of tensors or arrays, memory-mapped
            ones too; a data set; or what `EmpiricalRisk` takes, read once.
        validation: rows that tell how good a model is; None: training rows stand in.
        lr: a learning rate that works at `batch_size`, > 0, from which rates around a
            scaling rule are tried. None: 1e-3 for Adam and 1e-2 for SGD, as an assumption.
        batch_size: the size that is used so far, >= 1.
        optimizer: "sgd", "momentum" (0.9), "adam", "adamw", or a function of parameters
            and learning rate, such as a class of `torch.optim`.
        batch_sizes: sizes to time, and to race a part of; None: powers of two from 8 up
            to the number of rows, at most 262 144.
        target: validation loss to reach; None, or where it is out of reach in the time:
            what the race takes (it says what).
        seeds: of the orders of rows that are raced, >= 1; one cannot tell how far seeds
            differ.
        batchnorm_batch: rows that BatchNorm takes its statistics from in training; None
            for the whole batch.
        device: where to compute; None means where the parameters are.
        max_seconds: for all of it: about 15 % for timing, 10 % for the noise scale, the
            rest for the race.
        seed: of the rows that are drawn.
        folder: where the race keeps its runs, to be carried on; None: nowhere.
        progress: show bars; by default on a terminal.

    Returns:
        `BatchSizeAdvice`: print it for the words, `.plot()` for the picture, `.readings()`
        for every number with where it comes from. What could not be measured is a line
        of `.notes`, and the rest of the answer stands; `batch_size` is None where no size
        reached the target. After an interrupt (Ctrl-C) it holds what there is.

    Raises:
        ValueError: an argument out of its range, or what `EmpiricalRisk` refuses.
        TypeError: `optimizer` makes no optimizer.

    Cost: `max_seconds`, less where the race is over before.

    References:
        McCandlish et al. (2018), arXiv:1812.06162, for the law of the updates; Shallue
        et al. (2019), JMLR 20(112), for racing instead: no rule for the rate held over
        their 35 workloads. Merrill et al. (2025), arXiv:2505.23971, for the noise scale.
    """
    positive("max_seconds", max_seconds)
    batch_size, seed = whole("batch_size", batch_size, 1), whole_seed(seed)
    seeds = tuple(whole("seeds", each, 0) for each in seeds)
    require(bool(seeds), "seeds", "hold at least one", seeds)
    deadline = Deadline(max_seconds)
    notes: list[str] = []
    if lr is None:
        lr = 1e-3 if "adam" in str(optimizer).lower() else 1e-2
        notes.append(f"the rate at batch {batch_size}, {lr:g}, is assumed: pass `lr`")
    problem = Problem(
        model,
        loss,
        data,
        lr=lr,
        batch_size=batch_size,
        optimizer=optimizer,
        validation=validation,
        device=device,
        batchnorm_batch=batchnorm_batch,
    )
    notes.extend(problem.notes)
    parts = _Parts(notes)
    sizes = batch_sizes or usual_sizes(problem.num_rows, batch_size)
    times = parts.tried(
        "updates were not timed",
        lambda: time_per_update(
            problem,
            sizes,
            max_seconds=_SHARES["times"] * max_seconds,
            seed=seed,
            progress=progress,
        ),
    )
    noise = parts.tried(
        "no gradient noise scale",
        lambda: _noise(problem, seed, _SHARES["noise"] * max_seconds, progress),
        kinds=(ValueError, TypeError, RuntimeError),  # it is the least of the parts
    )

    def raced_in_time() -> Race:
        first = batch_sizes or _worth_racing(times, noise, batch_size)
        how = {"times": times, "seeds": seeds, "progress": progress}
        racing = _Racing(problem, deadline, notes, how, target)
        with _kept(folder) as place:
            return racing.run(first, Path(place), widen=batch_sizes is None)

    # A loss that does not fall, a target that is none: the rest of the answer stands.
    raced = parts.tried("no race", raced_in_time, kinds=(NotAvailableError, ValueError))
    choice = chosen(times, raced) if times and raced else None
    rate, how, stable = None, "", {}
    if choice is not None and raced is not None:
        rate, how = _rate(problem, raced, choice.batch_size)
        stable = _stable_rates(problem, raced, choice.batch_size)
    statuses = [part.status for part in (times, noise, raced) if part is not None]
    return BatchSizeAdvice(
        batch_size=choice.batch_size if choice else None,
        learning_rate=rate,
        learning_rate_how=how,
        own=batch_size,
        choice=choice,
        times=times,
        noise=noise,
        race=raced,
        stable_rates=stable,
        notes=tuple(notes),
        status=_status(choice, parts.interrupted, statuses),
        cost=Cost(seconds=max_seconds - (deadline.left or 0.0)),
        settings={
            "lr": lr,
            "batch_size": batch_size,
            "optimizer": optimizer if isinstance(optimizer, str) else repr(optimizer),
            "batch_sizes": batch_sizes and tuple(batch_sizes),
            "target": target,
            "seeds": seeds,
            "batchnorm_batch": batchnorm_batch,
            "max_seconds": max_seconds,
            "seed": seed,
        },
    )


_One = TypeVar("_One", bound=Result)


class _Parts:
    """The parts of the work: one that cannot be done is a line, and the others go on."""

    def __init__(self, notes: list[str]) -> None:
        self.notes, self.interrupted = notes, False

    def tried(
        self,
        failure: str,
        work: Callable[[], _One],
        kinds: tuple[type[Exception], ...] = (NotAvailableError,),
    ) -> _One | None:
        if self.interrupted:
            return None
        try:
            found = work()
        except KeyboardInterrupt:
            self.interrupted = True
            return None
        except kinds as error:
            self.notes.append(f"{failure}: {str(error).rstrip('.')}")
            return None
        self.interrupted = found.status is Status.INTERRUPTED
        return found


def _status(choice: Choice | None, interrupted: bool, parts: Iterable[Status]) -> Status:
    """Time that was used up is what was asked for, where there is an answer."""
    if interrupted:
        return Status.INTERRUPTED
    if choice is None:
        return Status.NOT_REACHED
    return Status.worst(*(s for s in parts if s is not Status.MAX_SECONDS))


def _noise(
    problem: Problem, seed: int, max_seconds: float, progress: bool | None
) -> GradientNoise:
    """Of rows at the starting point; BatchNorm as in training, on batch statistics."""
    num = min(problem.num_rows, _NOISE_ROWS)
    model = problem.copy()
    settings: dict[str, Any] = {}
    if batchnorm_layers(model):
        settings = {"batchnorm": "batch", "batchnorm_batch": max(2, num // _BATCHES)}
    risk = EmpiricalRisk(model, problem.loss, problem.rows(num, seed), **settings)
    return gradient_noise(risk, seed=seed, max_seconds=max_seconds, progress=progress)


def _worth_racing(
    times: UpdateTimes | None, noise: GradientNoise | None, own: int
) -> list[int]:
    sizes = [] if times is None else to_race(times, _interval(noise), own)
    if not sizes:
        raise NotAvailableError("no batch size was seen to run")
    return sizes


@dataclass
class _Racing:
    """A race that fits the time that is left; its runs are kept, so that it can go on."""

    problem: Problem
    deadline: Deadline
    notes: list[str]
    how: dict[str, Any]  # keywords of every race
    target: float | None

    def run(self, sizes: Sequence[int], folder: Path, *, widen: bool) -> Race:
        """Race these, then as long as the soonest is the last on its side one more."""
        times = self.how["times"]
        self.how |= _limits(times, len(sizes), self._left, len(self.how["seeds"]))
        folder = self._with_a_target_in_reach(folder)
        found = self._race(sizes, folder)
        while widen and times is not None and found.status is Status.COMPLETED:
            more = beyond(times, found)
            if more is None:
                break
            sizes = sorted({*sizes, more})
            found = self._race(sizes, folder)
        return self._with_sharpness(found, sizes, folder)

    @property
    def _left(self) -> float:
        return max(0.0, self.deadline.left or 0.0)

    def _race(self, sizes: Sequence[int], folder: Path, **how: Any) -> Race:
        settings = {"rates": _RATES, "measure": False, **self.how, **how}
        return race(
            self.problem,
            sizes,
            target=self.target,
            give_up=_GIVE_UP,
            max_seconds=self._left,
            folder=folder,
            **settings,
        )

    def _with_a_target_in_reach(self, folder: Path) -> Path:
        """Without the target where the size in use does not come to it in its share."""
        own = self.problem.batch_size
        if self.target is None:
            return folder
        if self._race([own], folder, rates=(1.0,)).best("seconds"):
            return folder
        self.notes.append(
            f"the target {self.target:g} is not reached by batch {own} in its share of the "
            "time, so an easier one was raced; later on larger sizes gain (assumed)"
        )
        self.target = None
        return folder / "easier"

    def _with_sharpness(self, found: Race, sizes: Sequence[int], folder: Path) -> Race:
        """Measured at the end of each size's best run, where there is time for it."""
        reached, times = [r for r in found.sizes if r.reached], self.how["times"]
        if not reached or found.status is not Status.COMPLETED:
            return found
        each = _MEASURES * (_seconds_of(times, _MEASURED_ROWS) if times else 0.0)
        again = sum(r.seconds for r in reached)  # their ends are trained once more
        if each * len(reached) + again > self._left:
            self.notes.append("sharpness at the ends was left out: no time was left")
            return found
        return self._race(sizes, folder, measure=True)


@contextmanager
def _kept(folder: str | Path | None) -> Iterator[str | Path]:
    """The folder of the race's runs, or one that is gone afterwards."""
    if folder is not None:
        yield folder
        return
    with TemporaryDirectory() as place:
        yield place


def _limits(
    times: UpdateTimes | None, num_sizes: int, seconds: float, num_seeds: int
) -> dict[str, Any]:
    """Limits that fit a race to the time, as keywords of `race`.

    A run of B takes t(B) min(max_updates, max_samples / B), at most twice its share.
    """
    if times is None or not times.survived.any():
        return {}
    alive = times.batch_sizes[times.survived]
    each = np.array([times.of(int(size)) for size in alive])
    share = seconds / ((num_sizes + _WIDENED) * _RUNS * num_seeds)
    return {
        "max_updates": max(2, math.ceil(share / each.min())),
        "max_samples": share / float((each / alive).min()),
    }


def _seconds_of(times: UpdateTimes, num_rows: int) -> float:
    """Of an update of so many rows, by the fit; 0 where it is not known."""
    found = times.overhead + times.per_sample * num_rows
    return found if math.isfinite(found) else 0.0


def _interval(noise: GradientNoise | None) -> tuple[float, float | None] | None:
    if noise is None or not math.isfinite(noise.interval[0]):
        return None
    return noise.interval


# -- rates -------------------------------------------------------------------------------


def _nearest(raced: Race, batch_size: int) -> SizeResult:
    """The size that reached the target whose ratio to this one is nearest to 1."""
    reached = [r for r in raced.sizes if r.reached]
    return min(reached, key=lambda r: abs(math.log(r.batch_size / batch_size)))


def _rate(problem: Problem, raced: Race, batch_size: int) -> tuple[float, str]:
    """A rate for the size, and where it comes from."""
    near = _nearest(raced, batch_size)
    if near.batch_size == batch_size:
        tried = {run.lr for run in raced.runs if run.batch_size == batch_size}
        return near.lr, f"measured, the best of {len(tried)} raced at this size"
    grown = problem.scaled_rate(batch_size) / problem.scaled_rate(near.batch_size)
    how = f"assumed, by the {problem.rule} rule from the best at {near.batch_size}"
    return near.lr * grown, how


def _stable_rates(problem: Problem, raced: Race, batch_size: int) -> dict[str, float]:
    """The largest rate that each curvature at the end bears, by its threshold."""
    near = _nearest(raced, batch_size)
    optimizer = problem.optimizer_for(problem.copy(), near.lr)
    limits = stability_thresholds(optimizer) | batch_thresholds(optimizer)
    return {
        name: near.lr * limits[name] / value.value
        for name, value in near.measures.items()
        if name in limits and value.value > 0
    }
