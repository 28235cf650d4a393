"""Times per update and races that follow their laws exactly, for advice without a clock."""

import math

import numpy as np

from sharpness._results import Cost
from sharpness.batchsize.choice import chosen
from sharpness.batchsize.race import Race, RaceRun, SizeResult
from sharpness.batchsize.result import BatchSizeAdvice
from sharpness.batchsize.updates import UpdateTimes
from sharpness.results import Status
from sharpness.tracking import TrackedValue

SIZES = (16, 64, 256, 1024)


def times(
    sizes=SIZES, overhead=1e-3, per_sample=1e-5, survived=None, status=Status.COMPLETED
):
    """t = a + c B, exactly."""
    each = np.array(sizes)
    alive = np.ones(len(each), bool) if survived is None else np.array(survived)
    return UpdateTimes(
        batch_sizes=each,
        seconds=np.where(alive, overhead + per_sample * each, np.nan),
        spread=np.where(alive, 1e-5, np.nan),
        peak_bytes=np.full(len(each), np.nan),
        survived=alive,
        reasons=tuple("" if ok else "no memory" for ok in alive),
        overhead=overhead,
        per_sample=per_sample,
        residual=0.01,
        memory="unknown",
        status=status,
    )


def value(number, error=0.1):
    return TrackedValue(value=number, error=error, status=Status.COMPLETED)


def size(batch_size, updates, *, of=None, measures=None, note=""):
    reached = math.isfinite(updates)
    return SizeResult(
        batch_size=batch_size,
        lr=1e-3 * math.sqrt(batch_size / 16),
        reached=reached,
        updates=updates,
        updates_error=math.nan,
        samples=updates * batch_size,
        seconds=updates * (of or times()).of(batch_size),
        loss=0.5 if reached else 0.9,
        loss_error=0.01,
        at_edge=False,
        note=note,
        measures=measures or {},
    )


def race(sizes, s_min, e_min, interval=None, residual=0.02, status=Status.COMPLETED):
    critical = e_min / s_min if s_min else math.inf
    runs = [
        RaceRun(
            batch_size=each.batch_size,
            lr=each.lr * factor,
            seed=0,
            updates=each.updates,
            samples=each.samples,
            seconds=each.seconds,
            reached=each.reached,
            end="reached" if each.reached else "overtaken",
            course=(),
        )
        for each in sizes
        for factor in (0.5, 1, 2)
    ]
    return Race(
        target=0.5,
        target_how="given",
        start_loss=2.3,
        runs=tuple(runs),
        sizes=tuple(sizes),
        s_min=s_min,
        s_min_interval=(s_min, s_min),
        e_min=e_min,
        e_min_interval=(e_min, e_min),
        critical=critical,
        critical_interval=interval or (critical, critical),
        residual=residual,
        status=status,
    )


def by_law(s_min, e_min, sizes=SIZES, **settings):
    """A race that follows S = S_min + E_min / B to the letter."""
    results = [size(b, s_min + e_min / b) for b in sizes]
    return race(results, s_min, e_min, **settings)


def advice(t=None, r=None):
    """What follows from these times and this race, at a rate that was not measured."""
    t, r = t or times(), r or by_law(100, 1e4)
    choice = chosen(t, r)
    return BatchSizeAdvice(
        batch_size=choice and choice.batch_size,
        learning_rate=0.01,
        learning_rate_how="assumed",
        own=16,
        choice=choice,
        times=t,
        noise=None,
        race=r,
        stable_rates={"lambda_max": 0.2},
        notes=(),
        status=Status.COMPLETED,
        cost=Cost(seconds=61.0),
    )
