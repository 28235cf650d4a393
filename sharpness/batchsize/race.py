"""How many updates to a loss, at which batch size? A race from one start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sharpness._arguments import (
    at_least,
    ensure,
    known,
    positive,
    positive_list,
    require,
    whole,
)
from sharpness._results import Cost, NotAvailableError, Reading, Result, Status, number
from sharpness._run import Run
from sharpness.batchsize.branches import Branches as Branches
from sharpness.batchsize.branches import branches as branches
from sharpness.batchsize.problem import RULES, Problem
from sharpness.batchsize.runs import Folder, Limits, Racers
from sharpness.batchsize.runs import RaceRun as RaceRun
from sharpness.batchsize.updates import UpdateTimes, refusals, sizes_of
from sharpness.measures.batch_sharpness import batch_sharpness
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.model_state import random_generators_kept
from sharpness.statistics import mean_and_sd, relative_line
from sharpness.tracking import SharpnessTracker, TrackedValue

_MOST_EXTENSIONS = 3  # of a grid of rates, by a factor of two each
_MEASURED = 1024  # training rows that lambda_max and phi are of
_BATCH_ROWS = 16_384  # that batch sharpness looks at in all, or four batches


@dataclass(frozen=True, kw_only=True)
class SizeResult:
    """A batch size at its best rate: means over seeds."""

    batch_size: int
    lr: float  # NaN where none was run
    reached: bool  # by every seed
    updates: float  # NaN where not reached
    updates_error: float  # standard error over seeds; NaN for one
    samples: float
    seconds: float
    loss: float  # validation loss at the end, of the first seed
    loss_error: float
    at_edge: bool  # a rate outside of those that were run may be better
    note: str  # why there is no number, or what bounds it; "" else
    measures: dict[str, TrackedValue]  # lambda_max, phi, batch_sharpness at the end


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
        known("clock", clock, CLOCKS)
        there = [each for each in self.sizes if each.reached]
        return min(there, key=lambda each: getattr(each, clock), default=None)

    def _rows(self) -> Iterable[Reading]:
        of = f"to a validation loss of {self.target:.4g}"
        for each in self.sizes:
            for clock in CLOCKS:
                words = each.note or f"{of} at rate {each.lr:.3g}"
                value, error = getattr(each, clock), None
                if math.isfinite(each.updates_error) and each.updates:
                    error = value * each.updates_error / each.updates
                name = f"{clock}({each.batch_size})"
                yield Reading(name=name, value=value, error=error, evidence=words)
        low, high = self.critical_interval
        if not math.isfinite(self.s_min):
            yield Reading(name="critical_batch_size", value=math.nan, evidence=_TOO_FEW)
            return
        words = f"from {sum(each.reached for each in self.sizes)} sizes, "
        words += f"residual {self.residual:.2g}"
        yield Reading(
            name="S_min", value=self.s_min, evidence=_between(*self.s_min_interval)
        )
        yield Reading(
            name="E_min", value=self.e_min, evidence=_between(*self.e_min_interval)
        )
        shown = Reading(name="critical_batch_size", value=self.critical)
        if high is None:
            yield replace(shown, value=low, bound="≥", evidence=f"{words}, S_min may be 0")
        else:
            yield replace(shown, evidence=f"{words}, {_between(low, high)}")

    def table(self) -> str:
        """A line for each size: its best rate, the three clocks, sharpness at the end."""
        from sharpness.report.tables import table_text

        names = sorted({name for each in self.sizes for name in each.measures})
        columns = ("batch", "rate", *CLOCKS, "loss", *names, "")
        rows = []
        for each in self.sizes:
            clocks = [number(getattr(each, clock)) for clock in CLOCKS]
            values = [str(each.measures.get(name, "–")) for name in names]
            cells = (str(each.batch_size), number(each.lr), *clocks, number(each.loss))
            rows.append([*cells, *values, each.note])
        fit = [f"{row} ({row.evidence})" for row in self._rows() if "(" not in row.name]
        aim = f"validation loss {number(self.target)} ({self.target_how})"
        return table_text(columns, rows, aim, *fit)


CLOCKS = ("updates", "samples", "seconds")
_TOO_FEW = "fewer than 3 sizes reached the target"


def _between(low: float, high: float) -> str:
    return f"{number(low)} to {number(high)}"


# -- the race ----------------------------------------------------------------------------


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
    give_up: float | None = None,
    measure: bool = True,
    confidence: float = 0.95,
    folder: str | Path | None = None,
    on_run: Callable[[RaceRun], object] | None = None,
    progress: bool | None = None,
) -> Race:
    r"""Train from one start with several batch sizes and rates until a loss is reached.

    For each size B the rate with the fewest updates S to the target counts. Through the
    sizes goes

    $$S(B) = S_{min} + \frac{E_{min}}{B}, \qquad
    B_{crit} = \frac{E_{min}}{S_{min}}$$

    (McCandlish et al. 2018): no batch needs fewer than S_min updates, none fewer than
    E_min samples, and at B_crit both are twice their least. The intervals take the
    relative errors of the S(B) to be alike and of the size of the residuals (Student's t,
    Fieller's set for the ratio); where S_min may be 0, B_crit is "at least".

    Equal updates, equal samples and equal seconds are three clocks, and a size that wins
    by one may lose by another: each is given, and no other number is made of them.

    Args:
        problem: what is trained, with the anchor (lr, batch_size) of the rule.
        batch_sizes: to race, usually by factors of two; three or more for B_crit.
        target: a validation loss. None: where the anchor stands after half of its budget
            (the mean of its looks in the last fifth of that), and 2 % of its way back,
            so that it is a loss that training passes and not one it hovers at.
        rates: factors of the rule's rate. Where the best is at an end of this grid, it is
            extended by factors of two, up to three times; what is at its end still is
            marked `at_edge`.
        rule: of the rate with the size: "linear" (default for SGD), "sqrt" (else, such
            as Adam), "none".
        max_updates: of a run.
        max_samples: of a run.
        max_seconds: of the whole race; what has finished by then comes back.
        times: measured by `time_per_update`; None takes the time of the race's own
            updates.
        seeds: orders of the rows; the starting point is the same.
        give_up: a run has "lost" after so many times the seconds, by `times`, of the
            soonest size so far, > 1; sizes are raced from the anchor's on outward, so
            that it is soon known. None: no size is given up for being slow.
        measure: lambda_max, phi(1e-3) and batch sharpness at the end of each size's best
            run, on 1024 training rows (batch sharpness: more), BatchNorm on running
            statistics.
        confidence: of the intervals, in (0, 1).
        folder: keeps each finished run as a small file, so that a race that was killed
            goes on where it was.
        on_run: called with each `RaceRun` that ends.
        progress: show a bar of updates; by default on a terminal.

    Returns:
        `Race`. A run ends at the target (met by the median of three looks 10 % apart,
        since one alone may be low by luck; updates are interpolated), where the loss is
        not finite or 100 times that of the start ("diverged"), once another rate of its
        size was faster ("overtaken", which cannot change the best), and at the budget:
        the limits given, and four times the updates of the anchor, by perfect scaling for
        smaller sizes. Without a target the anchor has 1000 updates, 10 epochs or the
        limits, whichever is least. Where no rate of a size gets there its `note` says
        so, and the fit leaves it out.

    Raises:
        ValueError: an argument outside its range, or a folder of another race.

    Cost: five rates or so for each size and seed, most of them cut short; about 50 looks
    at up to 4096 validation rows for each run.

    References:
        McCandlish et al. (2018), arXiv:1812.06162, eq. 5.1; the best of several rates at
        each size as in Shallue et al. (2019), arXiv:1811.03600.
    """
    sizes = sizes_of(batch_sizes)
    factors = sorted(positive_list("rates", rates)[0])
    require(0 < confidence < 1, "confidence", "lie in (0, 1)", confidence, "Pass 0.95.")
    rule = problem.rule if rule is None else rule
    known("rule", rule, RULES)
    limits = Limits(
        math.inf if max_updates is None else whole("max_updates", max_updates, 1),
        math.inf if max_samples is None else positive("max_samples", max_samples),
    )
    seeds = [whole("seeds", seed, 0) for seed in seeds]
    ensure(bool(seeds), "seeds", "hold at least one", "none")
    run = Run("updates", max_seconds=max_seconds, progress=progress)
    give_up = math.inf if give_up is None else at_least("give_up", give_up, 1)
    racers = Racers(problem, times, limits, seeds, run, Folder(folder), on_run, give_up)
    found: dict[int, SizeResult] = {size: _not_run(size) for size in sizes}
    with random_generators_kept(), run:
        racers.begin(target)
        refused = refusals(problem, seeds[0])
        last = 1.0
        for size in sorted(sizes, key=lambda b: abs(math.log(b / problem.batch_size))):
            if note := refused(size):
                found[size] = replace(found[size], note=note)
                continue
            grid = _Grid(racers, size, problem.scaled_rate(size, rule), factors)
            try:
                last = grid.searched(last)
            finally:
                found[size] = grid.result()
            if found[size].reached:
                racers.soonest = min(racers.soonest, found[size].seconds)
            if measure:
                found[size] = replace(found[size], measures=grid.measures())
    return Race(
        target=racers.target,
        target_how=racers.target_how,
        start_loss=racers.start_loss,
        runs=tuple(racers.runs),
        sizes=tuple(found.values()),
        **_fitted([each for each in found.values() if each.reached], confidence),
        status=run.status,
        cost=Cost(seconds=run.seconds),
        settings={
            "batch_sizes": sizes,
            "rates": list(factors),
            "rule": rule,
            "max_updates": max_updates,
            "max_samples": max_samples,
            "max_seconds": max_seconds,
            "seeds": list(seeds),
            "confidence": confidence,
            "lr": problem.lr,
            "batch_size": problem.batch_size,
            "batchnorm_batch": problem.batchnorm_batch,
            "give_up": give_up,
            "timed": times is not None,
        },
    )


def _not_run(size: int) -> SizeResult:
    nan = math.nan
    return SizeResult(
        batch_size=size,
        lr=nan,
        reached=False,
        updates=nan,
        updates_error=nan,
        samples=nan,
        seconds=nan,
        loss=nan,
        loss_error=nan,
        at_edge=False,
        note="not run",
        measures={},
    )


def _fitted(there: Sequence[SizeResult], confidence: float) -> dict[str, Any]:
    """S_min, E_min and B_crit of at least three sizes."""
    if len(there) < 3:
        nan = math.nan
        unknown = dict.fromkeys(("s_min", "e_min", "critical", "residual"), nan)
        whole_line = dict.fromkeys(("s_min_interval", "e_min_interval"), (0.0, math.inf))
        return {**unknown, **whole_line, "critical_interval": (0.0, None)}
    line = relative_line(
        [1 / each.batch_size for each in there],
        [each.updates for each in there],
        confidence,
    )
    return {
        "s_min": line.a,
        "s_min_interval": line.interval(0),
        "e_min": line.b,
        "e_min_interval": line.interval(1),
        "critical": line.b / line.a if line.a else math.inf,
        "critical_interval": line.ratio_interval,
        "residual": line.residual,
    }


class _Grid:
    """The rates of one batch size, from the likeliest on."""

    def __init__(
        self, racers: Racers, size: int, rate: float, factors: Sequence[float]
    ) -> None:
        self._racers, self._size, self._rate = racers, size, rate
        self._factors = list(factors)
        self._runs: dict[float, list[RaceRun]] = {}  # by factor, one for each seed so far
        self._best: float | None = None
        self._model: nn.Module | None = None  # at the end of the best rate's first run

    def searched(self, likely: float) -> float:
        """Run all rates, and more where the best is at the end; the best's factor."""
        for factor in sorted(self._factors, key=lambda f: abs(math.log(f / likely))):
            self._run(factor)
            if self._is_too_large:
                return likely
        for _ in range(_MOST_EXTENSIONS):
            beyond = self._beyond()
            if beyond is None or (self._best is None and self._is_lost):
                break
            self._factors = sorted([*self._factors, beyond])
            self._run(beyond)
        return likely if self._best is None else self._best

    def _run(self, factor: float) -> None:
        """A rate with each seed, as long as it can still be the best."""
        left, model = self._best_total(), None
        for i, seed in enumerate(self._racers.seeds):
            run, ended = self._racers.run(self._size, self._rate * factor, seed, left)
            self._runs.setdefault(factor, []).append(run)
            model = ended if i == 0 else model
            left -= run.updates
            if not run.reached or left < 0:
                return
        self._best, self._model = factor, model

    @property
    def _is_too_large(self) -> bool:
        return any(run.end == "no memory" for runs in self._runs.values() for run in runs)

    @property
    def _is_lost(self) -> bool:
        return any(run.end == "lost" for runs in self._runs.values() for run in runs)

    def _best_total(self) -> float:
        if self._best is None:
            return math.inf
        return sum(run.updates for run in self._runs[self._best])

    def _leader(self) -> float:
        """The best rate; else the one that came lowest, or the lowest if all diverged."""
        if self._best is not None:
            return self._best
        last = {f: runs[0].course[-1][1] for f, runs in self._runs.items()}
        stable = {f: last[f] for f, runs in self._runs.items() if runs[0].end == "budget"}
        return min(stable, key=lambda f: stable[f]) if stable else min(last)

    def _beyond(self) -> float | None:
        """The rate to run next where the best is at an end of the grid."""
        leader, ends = self._leader(), (self._factors[0], self._factors[-1])
        if leader == ends[0]:
            return leader / 2
        return leader * 2 if leader == ends[1] else None

    def result(self) -> SizeResult:
        """The size at its best rate."""
        found = _not_run(self._size)
        if not self._runs:
            return found
        ends = sorted({run.end for runs in self._runs.values() for run in runs})
        if self._best is None:
            most = max(run.updates for runs in self._runs.values() for run in runs)
            note = f"target not reached in {most:.0f} updates ({', '.join(ends)})"
            return replace(found, note=note, at_edge=self._beyond() is not None)
        runs = self._runs[self._best]
        updates, sd = mean_and_sd([run.updates for run in runs])
        edge, all_run = self._beyond() is not None, len(self._runs) == len(self._factors)
        note = "best rate at the end of its grid" if edge else ""
        return replace(
            found,
            lr=self._rate * self._best,
            reached=True,
            updates=updates,
            updates_error=sd / math.sqrt(len(runs)),
            samples=updates * self._size,
            seconds=float(np.mean([run.seconds for run in runs])),
            loss=runs[0].course[-1][1],
            loss_error=runs[0].course[-1][2],
            at_edge=edge,
            note=note if all_run else "not all rates were run",
        )

    def measures(self) -> dict[str, TrackedValue]:
        """lambda_max, phi and batch sharpness at the end of the best run."""
        if self._best is None:
            return {}
        racers, size, seed = self._racers, self._size, self._racers.seeds[0]
        lr = self._rate * self._best
        name = f"{size}-{lr:.6g}-{seed}-measures"
        found: dict[str, TrackedValue] | None = racers.folder.read(
            name, dict[str, TrackedValue]
        )
        if found is None:
            model = self._model
            if model is None:  # the run came from its file
                most = racers.budget(size)
                _, model = racers.trained(size, lr, seed, racers.target, most)
            racers.clock.step(0)
            found = _measured(racers.problem, model, size)
            racers.folder.write(name, found)
        return found


def _measured(problem: Problem, model: nn.Module, size: int) -> dict[str, TrackedValue]:
    settings: dict[str, Any] = {"batchnorm": "running", "device": problem.device}
    few = problem.rows(_MEASURED)
    tracker = SharpnessTracker(
        model, problem.loss, few, measures=("lambda_max", "phi"), **settings
    )
    num = max(2 * size, _MEASURED)
    try:
        risk = EmpiricalRisk(model, problem.loss, problem.rows(num), **settings)
        draws = min(100, max(4, _BATCH_ROWS // size))
        found = batch_sharpness(risk, size, draws, progress=False)
        value, error, status = found.value, found.standard_error, found.status
        noise = TrackedValue(value=value, error=error, status=status, cost=found.cost)
    except NotAvailableError:
        nan, status = math.nan, Status.NOT_AVAILABLE
        noise = TrackedValue(value=nan, error=nan, status=status)
    return {**tracker.history[0].values(), "batch_sharpness": noise}
