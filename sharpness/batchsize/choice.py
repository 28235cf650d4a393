"""Which of the sizes that were timed is soonest at the target? Plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharpness.batchsize.race import Race
from sharpness.batchsize.updates import UpdateTimes

Numbers = NDArray[np.float64]
WITHIN = 1.1  # of the least time: as good as the best
_MISFIT = 0.25  # root mean square from which on the law is not believed
_WIDE = 16.0  # by how much a noise scale may miss the critical batch size, either way


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The sizes compared, each with its seconds to the target, and the soonest."""

    batch_sizes: Numbers  # (m,), rising; all of them were run
    updates: Numbers  # (m,) to the target
    seconds: Numbers  # (m,) updates times measured seconds per update
    how: str  # where the updates come from: "fitted" or "measured"
    could_be: tuple[int, int]  # the soonest at both ends of B_crit's interval

    @property
    def batch_size(self) -> int:
        """The soonest."""
        return int(self.batch_sizes[np.argmin(self.seconds)])

    @property
    def near(self) -> tuple[int, ...]:
        """Sizes within 10 % of the least time."""
        good = self.seconds <= WITHIN * self.seconds.min()
        return tuple(int(size) for size in self.batch_sizes[good])

    @property
    def no_difference(self) -> bool:
        """Whether that holds for all of at least three."""
        return len(self.near) == len(self.batch_sizes) >= 3

    def of(self, batch_size: int) -> tuple[float, float]:
        """Updates and seconds to the target; NaN where it was not compared."""
        (found,) = np.nonzero(self.batch_sizes == batch_size)
        if not len(found):
            return math.nan, math.nan
        return float(self.updates[found[0]]), float(self.seconds[found[0]])


def chosen(times: UpdateTimes, race: Race) -> Choice | None:
    r"""The size with the least time to the target, of those that were timed.

    $$T(B) = S_{min} \left(1 + \frac{B_{crit}}{B}\right) t(B)$$

    with t measured at every size, between the smallest and the largest that reached the
    target. Where the law misses the updates that were counted by more than a quarter, or
    cannot be fitted, the counted ones decide, among the sizes that have one.

    Returns:
        None where no size reached the target, or only one was raced to an end.
    """
    counted = {r.batch_size: r.updates for r in race.sizes if r.reached}
    lost = {r.batch_size for r in race.sizes if not r.reached}
    sizes = [
        int(size)
        for size, alive in zip(times.batch_sizes, times.survived, strict=True)
        if alive and size not in lost
    ]
    sizes = [b for b in sizes if counted and min(counted) <= b <= max(counted)]
    fitted = believed(race)
    if not fitted:
        sizes = [size for size in sizes if size in counted]
    if not sizes or len({run.batch_size for run in race.runs}) < 2:
        return None
    each, per_update = np.array(sizes, float), np.array([times.of(b) for b in sizes])
    law = race.s_min + race.e_min / each
    updates = law if fitted else np.array([counted[b] for b in sizes])
    low, high = race.critical_interval
    ends = [low, math.inf if high is None else high] if fitted else []
    soonest = [int(each[np.argmin(_relative(each, end) * per_update)]) for end in ends]
    best = int(each[np.argmin(updates * per_update)])
    return Choice(
        batch_sizes=each,
        updates=updates,
        seconds=updates * per_update,
        how="fitted" if fitted else "measured",
        could_be=(min([best, *soonest]), max([best, *soonest])),
    )


def believed(race: Race) -> bool:
    """Whether the law was fitted, and fits."""
    return math.isfinite(race.s_min + race.e_min) and race.residual <= _MISFIT


def _relative(batch_sizes: Numbers, critical: float) -> Numbers:
    """Updates to a target but for a factor."""
    return 1 / batch_sizes if math.isinf(critical) else 1 + critical / batch_sizes


def to_race(
    times: UpdateTimes, noise: tuple[float, float | None] | None, own: int, most: int = 4
) -> list[int]:
    """Sizes worth racing: those that could be the soonest, so far as is known.

    The noise scale may miss the critical batch size by an order of magnitude, so the
    interval is widened sixteenfold on both sides; without one the critical batch size
    may be anything up to the largest size that ran.

    Args:
        times: of the sizes that were run.
        noise: interval of the noise scale, if it is known.
        own: the size that is used so far; it is among them where it was run.
        most: how many, >= 3.
    """
    alive = times.batch_sizes[times.survived].astype(float)
    if not len(alive):
        return []
    seconds = np.array([times.of(int(size)) for size in alive])
    low, high = noise or (0.0, None)
    low, high = low / _WIDE, alive.max() if high is None else high * _WIDE
    criticals = np.geomspace(max(low, 0.1), max(high, 0.2), 30)
    soonest = {int(np.argmin(_relative(alive, c) * seconds)) for c in criticals}
    first, last = _at_least(3, min(soonest), max(soonest), len(alive))
    places = np.unique(np.linspace(first, last, min(most, last - first + 1)).round())
    found = {int(alive[int(place)]) for place in places}
    return sorted(found | ({own} & {int(size) for size in alive}))


def beyond(times: UpdateTimes, race: Race) -> int | None:
    """The size to race next: fourfold, where the soonest so far is the last on a side."""
    choice = chosen(times, race)
    if choice is None:
        return None
    raced = [r.batch_size for r in race.sizes]
    best, alive = choice.batch_size, times.batch_sizes[times.survived]
    if best == max(raced) and (larger := alive[alive > best]).size:
        return int(larger[larger <= max(4 * best, larger[0])][-1])
    if best == min(raced) and (smaller := alive[alive < best]).size:
        return int(smaller[smaller >= min(best / 4, smaller[-1])][0])
    return None


def _at_least(num: int, first: int, last: int, length: int) -> tuple[int, int]:
    """A range of places, widened on both sides to so many where there are as many."""
    while last - first + 1 < min(num, length):
        first, last = max(0, first - 1), min(length - 1, last + 1)
    return first, last


def usual_sizes(num_rows: int, own: int) -> list[int]:
    """Powers of two up to the number of rows, and the size that is used so far."""
    powers = (2**k for k in range(3, 19) if 2**k <= num_rows)
    return sorted({*powers, min(own, num_rows)})
