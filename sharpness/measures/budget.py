"""What every measure has to watch: the clock, Ctrl-C and the progress bar."""

from __future__ import annotations

import math
import time

from sharpness import _progress
from sharpness.results import Status


class OutOfBudgetError(Exception):
    """Raised by `step` when the time is up; the budget swallows it."""


class Budget:
    """One measure's time. Inside `with`, `step()` before each unit of work.

    A Ctrl-C or the end of the time leaves the block quietly, with a status that says so
    and whatever the block has kept.
    """

    def __init__(
        self, unit: str, max_seconds: float | None, progress: bool | None, total: int | None
    ) -> None:
        self._bar = _progress.bar(unit, total, progress)
        self._began = time.monotonic()
        self._most = math.inf if max_seconds is None else max_seconds
        self.status = Status.COMPLETED
        self.num_steps = 0

    @property
    def seconds(self) -> float:
        """Time since the budget was made."""
        return time.monotonic() - self._began

    def step(self, num: int = 1) -> None:
        """Announce `num` units of work.

        Raises:
            OutOfBudgetError: the time was up before they began.
        """
        if self.seconds > self._most:
            self.status = Status.MAX_SECONDS
            raise OutOfBudgetError
        self.num_steps += num
        self._bar.update(num)

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._bar.close()
        if kind is KeyboardInterrupt:
            self.status = Status.INTERRUPTED
        return kind in (KeyboardInterrupt, OutOfBudgetError)
