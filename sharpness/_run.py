"""One run of an iteration: its clock (`max_seconds`), Ctrl-C, bar, counts, and its end."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NoReturn

from sharpness import _progress
from sharpness._ranks import ALONE, Ranks
from sharpness._results import DerivativeDisagreesError, NonFiniteProductError, Status

_LONG = 60.0  # seconds: what takes longer says so beforehand, also where no bar is seen


class Run:
    """The frame of a measure's loop.

    Inside `with run:` the loop calls `step()` before each unit of work. Ctrl-C, the end of
    the time or of the steps, `stop()`, a product that is not finite and a derivative that
    is not that of f leave the block quietly: `status` says which it was, and what the
    block has kept is there.

    Args:
        unit: what a step is, as the bar names it.
        max_seconds: no step begins later than this; None for no limit.
        max_steps: most steps; None for no limit.
        min_steps: so many are made however short the time.
        total: steps expected, for the bar.
        progress: show a bar; by default on a terminal.
        status: how it ends when nothing cuts it short.
        ranks: the processes that run this together. They agree, at each step, on whether
            the time is up or one of them was interrupted (SIGINT, SIGTERM), so that all
            end after the same step; only the first shows a bar.
    """

    def __init__(
        self,
        unit: str,
        *,
        max_seconds: float | None = None,
        max_steps: int | None = None,
        min_steps: int = 0,
        total: int | None = None,
        progress: bool | None = None,
        status: Status = Status.COMPLETED,
        ranks: Ranks = ALONE,
    ) -> None:
        self._shown = unit, total, progress if ranks.is_first else False
        self._ranks, self._held_back = ranks, ExitStack()
        self._bar: Any = None
        self._began = time.monotonic()
        self._most_seconds = math.inf if max_seconds is None else max_seconds
        self._most, self._least = math.inf if max_steps is None else max_steps, min_steps
        self._taken: float | None = None
        self.status = status
        self.num_steps = 0  # completed
        self._begun = 0

    @property
    def seconds(self) -> float:
        """Time since the run was made, until its block was left."""
        if self._taken is not None:
            return self._taken
        return time.monotonic() - self._began

    def step(self, num: int = 1) -> None:
        """Begin `num` units of work, unless a limit is reached; those before are done."""
        self._count()
        late = self.num_steps >= self._least and self.seconds > self._most_seconds
        late = self._ranks.heed(late)
        if late:
            self.stop(Status.MAX_SECONDS)
        if self.num_steps + num > self._most:
            self.stop(Status.MAX_HVPS)
        self._begun = num

    def stop(self, status: Status) -> NoReturn:
        """Leave the block with this status."""
        self.status = status
        raise _Stopped(self)

    def _count(self) -> None:
        if self.num_steps == 0 < self._begun:
            self._foretell()
        self.num_steps += self._begun
        self._bar.update(self._begun)
        self._begun = 0

    def _foretell(self) -> None:
        """After the first step: how long all will take, where nobody sees a bar."""
        unit, total, progress = self._shown
        most = self.seconds * (total or 0) / self._begun
        if progress is None and self._bar.disable and most > _LONG:
            seconds = min(most, self._most_seconds)
            _progress.foretell(f"{total} {unit}", seconds)

    def __enter__(self) -> Run:
        self._bar = _progress.bar(*self._shown)
        self._held_back.enter_context(self._ranks.holding_back_interrupts())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, KeyboardInterrupt):
            self._count()
        self._bar.close()
        self._taken = time.monotonic() - self._began
        self._held_back.__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            self.status = Status.INTERRUPTED
        elif isinstance(error, NonFiniteProductError):
            self.status = Status.NON_FINITE
        elif isinstance(error, DerivativeDisagreesError):
            self.status = Status.DERIVATIVE_DISAGREES
        elif not (isinstance(error, _Stopped) and error.run is self):
            return False
        return True


class _Stopped(Exception):
    """On its way out of the block of `run`, through whatever code is running inside."""

    def __init__(self, run: Run) -> None:
        super().__init__(str(run.status))
        self.run = run


class Deadline:
    """The time that several runs of one call share."""

    def __init__(self, max_seconds: float | None) -> None:
        self._at = None if max_seconds is None else time.monotonic() + max_seconds

    @property
    def left(self) -> float | None:
        """Seconds until it; None for no limit."""
        return None if self._at is None else self._at - time.monotonic()
