"""The trainings of a race, one by one: each the same whatever was run before it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from sharpness import _saving, _tensors
from sharpness._arguments import ensure
from sharpness._json import as_plain
from sharpness._run import Run
from sharpness.batchsize.problem import Problem
from sharpness.batchsize.updates import UpdateTimes, is_out_of_memory, now
from sharpness.risk.model_state import seed_generators

_LOOK_EVERY = 1.1  # from one look at the validation loss to the next, times the updates
_FAR = 100.0  # times the start's loss: diverged
_LONGEST = 4.0  # times what the anchor's updates become by perfect scaling
_ANCHOR = (1000, 10)  # updates, epochs of the anchor by default, whichever is less
_BACK = 0.02  # of the anchor's way, from where it ends to the target
_ENDLESS = 1 << 62  # updates


@dataclass(frozen=True, kw_only=True)
class RaceRun:
    """One training of the race, on three clocks."""

    batch_size: int
    lr: float
    seed: int
    updates: float  # to the target, interpolated; those made where not reached
    samples: float  # updates * batch_size
    seconds: float  # updates * time per update; looks at the loss are not counted
    reached: bool
    end: str  # "reached", "diverged", "overtaken", "lost", "budget", "no memory"
    course: tuple[tuple[int, float, float], ...]  # updates, validation loss, its error


@dataclass(frozen=True)
class Limits:
    """Of one run: updates and samples."""

    updates: float
    samples: float

    def of(self, size: int) -> int:
        """Whole updates of this size, at least one."""
        most = min(self.updates, self.samples / size)
        return max(1, math.floor(most)) if math.isfinite(most) else _ENDLESS


class Folder:
    """Runs that are finished, a small file each; nothing without a path."""

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)

    def check(self, facts: Mapping[str, Any]) -> None:
        """Refuse runs of another race.

        Raises:
            ValueError: what the folder says of its race is something else.
        """
        plain = as_plain(facts)
        before = self.read("race", dict[str, Any])
        for name, ours in plain.items():
            theirs = ours if before is None else before.get(name)
            contract, got = "hold runs of the same race", f"{name}={theirs!r}, not {ours!r}"
            ensure(ours == theirs, "folder", contract, got, "Choose another.")
        self.write("race", plain)

    def read(self, name: str, kind: Any) -> Any:
        """What was written under a name; None where nothing was."""
        path = self._path and self._path / f"{name}.json"
        if not path or not path.exists():
            return None
        try:
            return _saving.restored(kind, json.loads(path.read_text()))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"`folder` must hold files of a race; got {path.name}, which is damaged. "
                "Delete that file."
            ) from None

    def write(self, name: str, value: Any) -> None:
        """Keep a value, whole or not at all."""
        if self._path:
            text = json.dumps(as_plain(value), allow_nan=False)
            _saving.write(self._path / f"{name}.json", text.encode())


@dataclass
class Racers:
    """Runs single trainings, each the same whatever was run before."""

    problem: Problem
    times: UpdateTimes | None
    limits: Limits
    seeds: list[int]
    clock: Run
    folder: Folder
    on_run: Callable[[RaceRun], object] | None
    give_up: float = math.inf  # times the seconds of the soonest size: lost
    soonest: float = math.inf  # seconds of a size at its best rate
    runs: list[RaceRun] = field(default_factory=list)
    target: float = math.nan
    target_how: str = "not known"
    start_loss: float = math.nan
    _pace: float = math.inf  # updates that the anchor took

    def begin(self, target: float | None) -> None:
        """Know the start's loss, the target, and how long the anchor takes."""
        problem, size = self.problem, self.problem.batch_size
        self.start_loss, _ = problem.validation_loss(problem.copy())
        most = self.limits.of(size)
        if most == _ENDLESS or target is None:
            usual = min(_ANCHOR[0], _ANCHOR[1] * problem.num_rows // size)
            most = min(most, max(2, usual))
        about = {"anchor": [size, problem.lr, most, self.seeds[0]], "target": target}
        if target is not None:
            self.target, self.target_how = float(target), "given"
            sound, contract = self.target < self.start_loss, "lie below the start's loss"
            ensure(sound, "target", f"{contract} {self.start_loss:.4g}", f"{target:g}")
        self.folder.check({**problem.facts(), **about})
        half = -(-most // 2)
        anchor: RaceRun | None = self.folder.read("anchor", RaceRun)
        if anchor is None:
            until, limit = (-math.inf, half) if target is None else (self.target, most)
            anchor, _ = self.trained(size, problem.lr, self.seeds[0], until, limit)
            self.folder.write("anchor", anchor)
        if target is None:
            last = [loss for made, loss, _ in anchor.course if made >= 0.8 * half]
            self.target = sum(last) / len(last) if last else math.nan
            self.target += _BACK * (self.start_loss - self.target)
            self.target_how = f"where the anchor stands after {half} updates of {size}"
            learns = anchor.end == "budget" and self.target < self.start_loss
            got = f"a loss of {self.target:.4g} from {self.start_loss:.4g} on"
            ensure(learns, "lr", f"make the anchor learn (batch_size={size})", got)
        if anchor.end in ("reached", "budget"):
            self._pace = anchor.updates

    def budget(self, size: int) -> int:
        """The most updates of a run of this size."""
        scaled = self._pace * max(1.0, self.problem.batch_size / size)
        most = min(self.limits.of(size), self._until_lost(size))
        return most if math.isinf(scaled) else min(most, math.ceil(_LONGEST * scaled))

    def _until_lost(self, size: int) -> int:
        """Updates until a size can no longer be nearly the soonest."""
        per_update = math.nan if self.times is None else self.times.of(size)
        updates = self.give_up * self.soonest / per_update
        return math.ceil(updates) if math.isfinite(updates) else _ENDLESS

    def run(
        self, size: int, lr: float, seed: int, worth: float
    ) -> tuple[RaceRun, nn.Module | None]:
        """One run, from its file or carried out; then with the model at its end.

        Args:
            size: of its batches.
            lr: its rate.
            seed: of its order.
            worth: with more updates than that another rate has won.
        """
        name, model = f"{size}-{lr:.6g}-{seed}", None
        budget = self.budget(size)
        most = budget
        if math.isfinite(worth):  # the last look is one beyond the middle one
            most = min(budget, math.ceil(_LOOK_EVERY * worth) + 2)
        found: RaceRun | None = self.folder.read(name, RaceRun)
        cut_short = found and found.end in ("overtaken", "lost", "budget")
        if found is None or (cut_short and found.updates < most):
            found, model = self.trained(size, lr, seed, self.target, most)
            if found.end == "budget" and most < budget:
                found = replace(found, end="overtaken")
            elif found.end == "budget" and budget == self._until_lost(size):
                found = replace(found, end="lost")
            self.folder.write(name, found)
        self.runs.append(found)
        if self.on_run:
            self.on_run(found)
        return found, model

    def trained(
        self, size: int, lr: float, seed: int, target: float, most: int
    ) -> tuple[RaceRun, nn.Module]:
        """Train until the target, divergence or so many updates."""
        problem, made, seconds, end = self.problem, 0, 0.0, "budget"
        seed_generators(_tensors.mixed(seed, size))
        model = problem.copy()
        optimizer = problem.optimizer_for(model, lr)
        stream = problem.batches(size, seed)
        course = [(0, *problem.validation_loss(model))]
        while made < most and end == "budget":
            look = min(most, max(made + 1, math.ceil(made * _LOOK_EVERY)))
            self.clock.step(look - made)
            try:
                began = now(problem.device)
                for _ in range(look - made):
                    problem.update(model, optimizer, next(stream))
                seconds += now(problem.device) - began
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                end = "no memory"
                break
            made = look
            course.append((made, *problem.validation_loss(model)))
            loss = course[-1][1]
            if not math.isfinite(loss) or loss > self.start_loss + _FAR * abs(
                self.start_loss
            ):
                end = "diverged"
            elif _smoothed(course)[1] <= target:
                end = "reached"
        updates = _crossing(course, target) if end == "reached" else float(made)
        per_update = seconds / max(made, 1)
        if self.times is not None and math.isfinite(self.times.of(size)):
            per_update = self.times.of(size)
        result = RaceRun(
            batch_size=size,
            lr=lr,
            seed=seed,
            updates=updates,
            samples=updates * size,
            seconds=updates * per_update,
            reached=end == "reached",
            end=end,
            course=tuple(course),
        )
        return result, model


def _smoothed(course: Sequence[tuple[int, float, float]]) -> tuple[int, float]:
    """Updates and loss of the middle one of three looks: one alone may be low by luck.

    The median of a course that falls is its own middle, so nothing is late.
    """
    if len(course) < 3:
        return 0, course[0][1]
    return course[-2][0], sorted(loss for _, loss, _ in course[-3:])[1]


def _crossing(course: Sequence[tuple[int, float, float]], target: float) -> float:
    """Updates at the target, on the line between the last two smoothed looks."""
    (before, high), (after, low) = _smoothed(course[:-1]), _smoothed(course)
    return before + (after - before) * (high - target) / (high - low)
