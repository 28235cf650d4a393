"""A size to use and all that it follows from, in words, numbers and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sharpness._results import Reading, Result, Status
from sharpness.batchsize.choice import Choice, believed
from sharpness.batchsize.race import Race, SizeResult
from sharpness.batchsize.updates import UpdateTimes
from sharpness.measures.gradient_noise import GradientNoise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharpness.report.figures import Figure

_NONE = (math.nan, math.nan)
_DRAWN = (
    *("batch size", "updates, measured", "seconds per update", "seconds, measured"),
    *("updates, compared", "seconds, compared"),
)
_NAMES = {"lambda_max": "lambda_max", "batch_sharpness": "batch sharpness", "phi": "phi"}


@dataclass(frozen=True, kw_only=True)
class BatchSizeAdvice(Result):
    """The size to use, the sizes as good within 10 %, and all that they follow from."""

    batch_size: int | None  # None: no size was seen to reach the target
    learning_rate: float | None  # for it
    learning_rate_how: str  # measured, or assumed and from what
    own: int  # the size that is used so far
    choice: Choice | None  # the sizes compared
    times: UpdateTimes | None
    noise: GradientNoise | None  # at the starting point
    race: Race | None
    stable_rates: dict[str, float]  # the largest, by what is measured at the end
    notes: tuple[str, ...]  # what was left out or could not be measured, and why

    @property
    def near(self) -> tuple[int, ...]:
        """The sizes within 10 % of the least time, rising."""
        return () if self.choice is None else self.choice.near

    @property
    def interrupted(self) -> bool:
        """Whether a Ctrl-C has cut it short."""
        return self.status is Status.INTERRUPTED

    def __str__(self) -> str:
        """The advice in words, the answer first."""
        return "\n".join(_said(self))

    @property
    def unknown(self) -> tuple[str, ...]:
        """What it cannot tell."""
        return tuple(_unknown(self))

    def drawn(self) -> tuple[Sequence[str], list[tuple[float, ...]]]:
        """For each size: updates, seconds per update, and to the target; NaN if unknown."""
        race = {} if self.race is None else {r.batch_size: r for r in self.race.sizes}
        seconds: dict[int, float] = {}
        if self.times is not None:
            pairs = zip(self.times.batch_sizes, self.times.seconds, strict=True)
            seconds = {int(size): float(each) for size, each in pairs}
        rows: list[tuple[float, ...]] = []
        for size in sorted(seconds.keys() | race.keys()):
            raced = race.get(size)
            found = (raced.updates, raced.seconds) if raced and raced.reached else _NONE
            compared = self.choice.of(size) if self.choice else _NONE
            rows.append((size, found[0], seconds.get(size, math.nan), found[1], *compared))
        return _DRAWN, rows

    def plot(self, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
        """Updates, seconds per update and their product against the batch size.

        Args:
            path: where the PNG goes, if anywhere.
            ax: axes of your own figure, whose place the three take.
        """
        from sharpness.batchsize.picture import draw

        return draw(self.times, self.race, self.choice, path, ax=ax)

    def _rows(self) -> Iterable[Reading]:
        """Every number behind the advice, each measured, fitted or assumed."""
        yield from self._advised()
        if self.race is not None and math.isfinite(self.race.s_min):
            yield from _law(self.race)
        if self.times is not None:
            yield from _update_readings(self.times)
        for name, rate in self.stable_rates.items():
            words = f"measured, largest rate by {name} at the end"
            yield Reading(name=f"stable_rate({name})", value=rate, evidence=words)
        if self.noise is not None:
            (first, *_) = self.noise.readings()
            yield replace(first, evidence=f"measured at the start, {first.evidence}")

    def _advised(self) -> Iterator[Reading]:
        choice, size = self.choice, self.batch_size
        name = "batch_size"
        if choice is None or size is None or self.learning_rate is None:
            yield Reading(name=name, value=math.nan, evidence="no size reached the target")
            return
        words = f"{_sources(choice)}; within 10 %: "
        words += ", ".join(map(str, self.near))
        yield Reading(name=name, value=size, evidence=words)
        how = self.learning_rate_how
        yield Reading(name="learning_rate", value=self.learning_rate, evidence=how)
        updates, seconds = choice.of(size)
        yield Reading(name="updates_to_target", value=updates, evidence=choice.how)
        how = _sources(choice)
        yield Reading(name="seconds_to_target", value=seconds, unit="s", evidence=how)


def _law(found: Race) -> Iterator[Reading]:
    low, high = found.critical_interval
    ends = f"fitted, 95 %: {low:.4g} to {'any size' if high is None else f'{high:.4g}'}"
    critical = Reading(name="critical_batch_size", value=found.critical, evidence=ends)
    yield replace(critical, value=low, bound="≥") if high is None else critical
    how = f"fitted, off by {found.residual:.0%}"
    yield Reading(name="least_updates", value=found.s_min, evidence=how)
    yield Reading(name="least_samples", value=found.e_min, evidence=how)


def _update_readings(times: UpdateTimes) -> Iterator[Reading]:
    for size, alive in zip(times.batch_sizes, times.survived, strict=True):
        if alive:
            yield Reading(
                name=f"seconds_per_update({int(size)})",
                value=times.of(int(size)),
                error=float(times.spread[times.batch_sizes == size][0]),
                unit="s",
                evidence="measured, half the distance of the quartiles",
            )
    if math.isfinite(times.overhead):
        yield Reading(name="knee", value=times.knee, evidence="fitted")


# -- in words --------------------------------------------------------------------------


def _said(advice: BatchSizeAdvice) -> Iterator[str]:
    """One sentence, or a few, about each thing that was measured."""
    yield _answer(advice)
    if advice.choice is not None:
        yield from _either_side(advice, advice.choice)
    if advice.race is not None:
        yield from _of_the_race(advice.race)
    if advice.times is not None:
        yield from _of_an_update(advice.times)
    yield from _of_rates(advice)
    if advice.race is not None:
        yield from _of_sharpness(advice.race)
    yield from _of_noise(advice)
    for note in advice.notes:
        yield f"Note: {note}."
    yield f"What this cannot tell: {'; '.join(advice.unknown)}."
    yield f"It took {advice.cost}."


def _answer(advice: BatchSizeAdvice) -> str:
    choice = advice.choice
    if choice is None or advice.batch_size is None:
        reached = [] if advice.race is None else [r for r in advice.race.sizes if r.reached]
        why = "only one was raced" if reached else "none was seen to reach the target"
        return f"No size can be advised: {why}."
    near = choice.near
    if choice.no_difference:
        return (
            f"No difference found: every size from {near[0]} to {near[-1]} is within 10 % "
            f"of the least time. Take {advice.batch_size}, or what is convenient."
        )
    around = f" ({near[0]} to {near[-1]})" if len(near) > 1 else ""
    return (
        f"Use {advice.batch_size}{around}, with a learning rate of "
        f"{advice.learning_rate:.3g}: about {duration(choice.seconds.min())} of updates to "
        f"a validation loss of {_target(advice):.4g}."
    )


def _target(advice: BatchSizeAdvice) -> float:
    return math.nan if advice.race is None else advice.race.target


def _either_side(advice: BatchSizeAdvice, choice: Choice) -> Iterator[str]:
    """What a smaller, a larger size and the one used so far would cost."""
    least, sizes = choice.seconds.min(), choice.batch_sizes
    times = {int(b): t / least for b, t in zip(sizes, choice.seconds, strict=True)}
    parts = []
    if smaller := [b for b in times if b < choice.near[0]]:
        b = smaller[0]
        parts.append(f"Smaller costs time: {b} takes {times[b]:.2g} times as long")
    if larger := [b for b in times if b > choice.near[-1]]:
        b = larger[-1]
        parts.append(f"Larger buys nothing: {b} takes {times[b]:.2g} times as long")
    if advice.own in times and advice.own not in choice.near:
        parts.append(f"Your {advice.own} takes {times[advice.own]:.2g} times as long")
    if parts:
        yield f"{'. '.join(parts)} ({_sources(choice)})."
    low, high = choice.could_be
    if (low, high) != (choice.batch_size, choice.batch_size):
        yield (
            f"Within the interval of the critical batch size the soonest could lie from "
            f"{low} to {high} (fitted)."
        )


def _sources(choice: Choice) -> str:
    fitted = choice.how == "fitted"
    return "updates fitted, seconds measured" if fitted else "measured"


def _of_the_race(race: Race) -> Iterator[str]:
    if not math.isfinite(race.target):
        yield "The time was over before there was a validation loss to race to."
        return
    reached = [r.batch_size for r in race.sizes if r.reached]
    yield (
        f"{len(reached)} of {len(race.sizes)} sizes reached a validation loss of "
        f"{race.target:.4g} ({race.target_how}; measured)."
    )
    for result in race.sizes:
        if result.note:
            yield f"Batch {result.batch_size}: {result.note} (measured)."
    if math.isfinite(race.s_min) and not believed(race):
        yield (
            f"The updates do not follow the law S + E / B (fitted, off by "
            f"{race.residual:.0%}), so those that were counted decide."
        )
    elif math.isfinite(race.s_min):
        yield (
            f"Updates to it: {plain(race.s_min)} + {plain(race.e_min)} / B (fitted, off by "
            f"{race.residual:.0%}); critical batch size {_critical(race)} (fitted)."
        )


def _critical(race: Race) -> str:
    low, high = race.critical_interval
    if high is None:
        return f"at least {plain(low)}" if low else "not known: three sizes say little"
    return f"{plain(race.critical)}, 95 %: {plain(low)} to {plain(high)}"


def _of_an_update(times: UpdateTimes) -> Iterator[str]:
    if math.isfinite(times.overhead):
        knee, grows = times.knee, ""
        if 0 < knee < math.inf:
            grows = f"; from about {plain(knee)} on time grows with the samples"
        yield (
            f"An update takes {duration(times.overhead)} + {duration(times.per_sample)} "
            f"a sample (fitted, off by {times.residual:.0%}){grows}."
        )
    if times.largest is not None:
        yield f"The largest batch that ran is {times.largest} (measured)."
    for size, reason in zip(times.batch_sizes, times.reasons, strict=True):
        if reason:
            yield f"Batch {size} was not run: {reason}."


def _of_rates(advice: BatchSizeAdvice) -> Iterator[str]:
    if advice.learning_rate is None:
        return
    text = f"Learning rate {advice.learning_rate:.3g}: {advice.learning_rate_how}"
    for name, rate in advice.stable_rates.items():
        text += f"; {_NAMES[name]} at the end bears up to {rate:.2g} (measured)"
    yield f"{text}."


def _of_sharpness(race: Race) -> Iterator[str]:
    """The smallest size that reached the target beside the largest."""
    ends = [r for r in race.sizes if r.reached and r.measures]
    if len(ends) < 2:
        return
    small, large = ends[0], ends[-1]
    parts = [
        _compared(name, words, small, large)
        for name, words in _NAMES.items()
        if name in small.measures and name in large.measures
    ]
    yield (
        f"Sharpness where they reached it, batch {small.batch_size} and "
        f"{large.batch_size} (measured): {'; '.join(parts)}."
    )


def _compared(name: str, words: str, small: SizeResult, large: SizeResult) -> str:
    a, b = small.measures[name], large.measures[name]
    if not math.isfinite(a.value + b.value):
        return f"{words} not known"
    text = f"{words} {a} and {b}"
    if a.error is None or b.error is None:
        return text
    apart = abs(a.value - b.value) > 2 * math.hypot(a.error, b.error)
    return text if apart else f"{text}, no difference found"


def _of_noise(advice: BatchSizeAdvice) -> Iterator[str]:
    noise = advice.noise
    if noise is None or math.isnan(noise.interval[0]):
        return
    low, high = noise.interval
    value = f"at least {plain(low)}"
    if high is not None:
        value = f"{plain(noise.noise_scale)} (95 %: {plain(low)} to {plain(high)})"
    yield f"Gradient noise scale at the start: {value} (measured); no advice by itself."


def _unknown(advice: BatchSizeAdvice) -> Iterator[str]:
    race, choice = advice.race, advice.choice
    if race is not None and len({run.seed for run in race.runs}) == 1:
        yield "one starting point was raced, so seeds may differ by more than 10 %"
    if choice is not None:
        edge = (choice.batch_sizes[0], choice.batch_sizes[-1])
        if choice.batch_size == edge[1] > edge[0]:
            yield "the largest size compared is the soonest, a larger one may be sooner"
        elif choice.batch_size == edge[0] < edge[1]:
            yield "the smallest size compared is the soonest, a smaller one may be sooner"
    yield "what holds on another machine, after this target, or with a rate that decays"


def plain(value: float) -> str:
    """Three digits, without an exponent where a person needs none."""
    return f"{float(f'{value:.3g}'):g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`1.3 ms`, `20 s`, `4.1 min`."""
    for unit, scale in (("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= (2 if unit == "min" else 1) * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
