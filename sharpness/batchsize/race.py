"""How many updates to a loss, at which batch size? A race from one start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharpness._results import Result
from sharpness.batchsize.problem import Problem
from sharpness.batchsize.updates import UpdateTimes
from sharpness.tracking import TrackedValue


@dataclass(frozen=True, kw_only=True)
class RaceRun:
    """One training of the race, on three clocks."""

    batch_size: int
    lr: float
    seed: int
    updates: float  # to the target, between two looks; those made where not reached
    samples: float  # updates * batch_size
    seconds: float  # updates * measured time per update; looks at the loss not counted
    reached: bool
    end: str  # "reached", "diverged", "overtaken", "budget", "no memory", "no time"
    course: tuple[tuple[int, float, float], ...]  # updates, validation loss, its error


@dataclass(frozen=True, kw_only=True)
class SizeResult:
    """A batch size at its best rate: means over seeds."""

    batch_size: int
    lr: float
    reached: bool  # by every seed
    updates: float  # NaN where not reached
    updates_error: float  # standard error over seeds; NaN for one
    samples: float
    seconds: float
    loss: float  # validation loss at the end
    loss_error: float
    at_edge: bool  # the best rate is the first or last of its grid, extended or not
    note: str  # why there is no number, or what bounds it; "" else
    measures: dict[str, TrackedValue]  # lambda_max, batch_sharpness, phi at the end


@dataclass(frozen=True, kw_only=True)
class Race(Result):
    """Updates, samples and seconds to a validation loss, by batch size and rate."""

    target: float  # validation loss
    target_how: str  # given, or where it comes from
    start_loss: float  # validation loss of the starting point
    runs: tuple[RaceRun, ...]
    sizes: tuple[SizeResult, ...]  # rising batch sizes
    s_min: float  # of S(B) = S_min + E_min / B, updates; NaN below three sizes
    s_min_interval: tuple[float, float]
    e_min: float  # samples
    e_min_interval: tuple[float, float]
    critical: float  # B_crit = E_min / S_min; inf where S_min is 0
    critical_interval: tuple[float, float | None]  # high is None: "at least"
    residual: float  # of the fit: root mean square of S(B) / measured - 1

    def best(self, clock: str) -> SizeResult | None:
        """The size that was there first by "updates", "samples" or "seconds"."""
        raise NotImplementedError

    def table(self) -> str:
        """A line for each size: its best rate and the three clocks."""
        raise NotImplementedError


def race(
    problem: Problem,
    batch_sizes: Sequence[int],
    *,
    target: float | None = None,
    rates: Sequence[float] = (0.25, 0.5, 1, 2, 4),
    rule: str | None = None,
    max_updates: int | None = None,
    max_samples: float | None = None,
    max_seconds: float | None = None,
    times: UpdateTimes | None = None,
    seeds: Sequence[int] = (0,),
    measure: bool = True,
    confidence: float = 0.95,
    folder: str | Path | None = None,
    on_run: Callable[[RaceRun], object] | None = None,
    progress: bool | None = None,
) -> Race:
    """Train from one start with several batch sizes and rates until a loss is reached."""
    raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Branches(Result):
    """From one checkpoint, the same samples in batches of k times the size."""

    factors: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    rates: tuple[float, ...]
    updates: tuple[int, ...]
    losses: tuple[float, ...]  # mean training loss over the last quarter of the samples
    errors: tuple[float, ...]  # standard error of the difference to the first branch
    tolerance: float  # share of the first branch's loss
    critical: int | None  # the largest batch that stays within; None: not even the first
    is_lower_bound: bool  # all of them do


def branches(
    problem: Problem,
    state: Mapping[str, Any] | None = None,
    factors: Sequence[float] = (1, 2, 4, 8, 16),
    *,
    optimizer_state: Mapping[str, Any] | None = None,
    samples: int | None = None,
    tolerance: float = 0.01,
    rule: str | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> Branches:
    """From a checkpoint: the same samples in batches of k times the size."""
    raise NotImplementedError
