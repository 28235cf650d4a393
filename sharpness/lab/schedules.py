"""Batch size and learning rate along training, as functions of the updates made."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, get_args

from sharpness._arguments import (
    Checked,
    at_least,
    ensure,
    known,
    positive,
    require,
    setting,
    whole,
)

Kind = Literal["constant", "decay", "hybrid", "increase"]
Scaling = Literal["none", "linear", "sqrt"]
_POWER = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


class Phase(NamedTuple):
    """A stretch of training with one batch size and, after warm-up, one learning rate."""

    begins: float  # epochs
    batch_size: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Schedule(Checked):
    r"""What happens to batch size B and learning rate eta as training goes on.

    At each of the `drops` the noise scale $\eta N / B$ falls by `factor`, in one of the
    three ways of Smith et al. (2018, arXiv:1711.00489, section 5.1), whose learning
    curves agree epoch by epoch: `"decay"` divides eta; `"increase"` multiplies B;
    `"hybrid"` multiplies B at the first drop and divides eta at the others. `"constant"`
    has no drops.

    Args:
        kind: what a drop does.
        drops: epochs at which the noise scale falls, rising; Smith et al. had 60, 120
            and 160 of 200.
        factor: by how much, > 1; Smith et al. had 5.
        max_batch_size: B_max, 5120 in the paper. What a larger batch would have taken
            from the noise scale is then taken by the learning rate (the paper says that
            the rate decays from there on, not by how much at that drop).
        warmup: epochs of gradual warm-up (Goyal et al. 2017, arXiv:1706.02677): eta
            rises linearly, update by update.
        warmup_start: the share of eta it begins at; 1/32 in Masters & Luschi (2018).

    Raises:
        ValueError: an unknown kind, drops that do not rise, a number out of range.
    """

    kind: Literal["constant", "decay", "hybrid", "increase"] = setting(
        "constant", check=partial(known, names=get_args(Kind))
    )
    drops: tuple[float, ...] = ()
    factor: float = setting(5.0, check=partial(at_least, least=1))
    max_batch_size: int | None = setting(None, check=partial(whole, least=1))
    warmup: float = setting(0.0, check=partial(at_least, least=0))
    warmup_start: float = setting(1 / 32, check=partial(at_least, least=0))

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        drops = tuple(self.drops) if isinstance(self.drops, Iterable) else (self.drops,)
        object.__setattr__(self, "drops", drops)
        super().__post_init__()
        times = [positive("drops", epoch) for epoch in drops]
        require(times == sorted(set(times)), "drops", "be rising epochs", drops)
        some = "no epochs" if self.kind == "constant" else "at least one epoch"
        require(
            bool(drops) == (self.kind != "constant"),
            "drops",
            f"be {some} for {self.kind}",
            drops,
        )
        require(self.factor > 1, "factor", "be above 1", self.factor)
        require(self.warmup_start <= 1, "warmup_start", "be at most 1", self.warmup_start)

    def stretched(self, times: float) -> Schedule:
        """The same schedule over `times` as many epochs."""
        drops = tuple(times * epoch for epoch in self.drops)
        return replace(self, drops=drops, warmup=times * self.warmup)

    def phases(self, batch_size: int, learning_rate: float) -> list[Phase]:
        """The phases of a run that begins with this batch size and learning rate.

        Raises:
            ValueError: `batch_size` is above `max_batch_size` from the beginning.
        """
        most = math.inf if self.max_batch_size is None else self.max_batch_size
        ensure(
            batch_size <= most,
            "max_batch_size",
            "be at least the first batch size",
            f"{most} (batch_size={batch_size})",
            "Raise it.",
        )
        found = [Phase(0.0, batch_size, learning_rate)]
        for i, epoch in enumerate(self.drops):
            _, batch, rate = found[-1]
            grows = self.kind == "increase" or (self.kind == "hybrid" and i == 0)
            larger = round(min(most, batch * self.factor)) if grows else batch
            found.append(Phase(epoch, larger, rate * larger / batch / self.factor))
        return found


def _of_kind(kind: Kind, **settings: Any) -> Schedule:
    return Schedule(kind=kind, **settings)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    kind: partial(_of_kind, kind) for kind in get_args(Kind)
}


class Course:
    """A schedule laid out over a training set: what update number u is made with.

    Batches are cut from one endless stream of samples across the borders of epochs, so
    update u begins at an epoch that is linear in u within a phase: a phase of E epochs
    holds E N / B updates, whole or not, and only the total is rounded.

    Args:
        schedule: how batch size and learning rate change.
        batch_size: of the first update.
        learning_rate: after warm-up, before the first drop.
        num_train: N, samples in the training set.

    Raises:
        ValueError: a batch larger than the training set.
    """

    def __init__(
        self, schedule: Schedule, *, batch_size: int, learning_rate: float, num_train: int
    ) -> None:
        self.schedule, self.num_train = schedule, num_train
        self.phases = schedule.phases(batch_size, learning_rate)
        largest = max(phase.batch_size for phase in self.phases)
        grown = "" if largest == batch_size else f", grown from {batch_size}"
        ensure(
            largest <= num_train,
            "batch_size",
            f"be at most the {num_train} training samples",
            f"{largest}{grown}",
            f"Take a smaller one{' or a `max_batch_size`' if grown else ''}.",
        )
        self._begins = _updates_before(self.phases, num_train)

    def num_updates(self, epochs: float) -> int:
        """Updates in so many epochs: the sum over phases, rounded once (half up)."""
        last = bisect_right([phase.begins for phase in self.phases], epochs) - 1
        begins, batch_size, _ = self.phases[last]
        here = (Fraction(epochs) - Fraction(begins)) * self.num_train / batch_size
        return math.floor(self._begins[last] + here + Fraction(1, 2))

    def num_samples(self, updates: int) -> int:
        """Samples in the first so many updates."""
        begins = [math.ceil(begin) for begin in self._begins]
        spans = zip(begins, [*begins[1:], updates], self.phases, strict=True)
        return sum(
            max(0, min(end, updates) - begin) * phase.batch_size
            for begin, end, phase in spans
        )

    def at(self, update: int) -> tuple[int, float]:
        """Batch size and learning rate of update number `update`, from 0."""
        i = bisect_right(self._begins, update) - 1
        begins, batch_size, rate = self.phases[i]
        epoch = begins + float(update - self._begins[i]) * batch_size / self.num_train
        if epoch < self.schedule.warmup:
            start = self.schedule.warmup_start
            rate *= start + (1 - start) * epoch / self.schedule.warmup
        return batch_size, rate


def scaled_rate(
    learning_rate: float, batch_size: int, base_batch_size: int, scaling: Scaling
) -> float:
    """A learning rate meant for `base_batch_size`, scaled to another batch size.

    `"linear"` (Goyal et al. 2017) keeps the mean step per sample; with a base of 1 the
    rate is the base learning rate per sample of Masters & Luschi (2018). `"sqrt"`
    (Hoffer et al. 2017, arXiv:1705.08741) keeps the covariance of the steps. `"none"`
    is what Keskar et al. did.
    """
    return learning_rate * float((batch_size / base_batch_size) ** _POWER[scaling])


def _updates_before(phases: Sequence[Phase], num_train: int) -> list[Fraction]:
    """Updates made when each phase begins: exact, so that none is on the wrong side."""
    lengths = (
        (Fraction(after.begins) - Fraction(phase.begins)) * num_train / phase.batch_size
        for phase, after in pairwise(phases)
    )
    return list(accumulate(lengths, initial=Fraction(0)))
