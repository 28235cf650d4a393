"""How long does an update take, at which batch size, and which sizes fit in memory?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharpness._results import Result
from sharpness.batchsize.problem import Problem


@dataclass(frozen=True, kw_only=True)
class UpdateTimes(Result):
    """Seconds and memory of a whole update, by batch size; arrays (S,), rising."""

    batch_sizes: np.ndarray  # as asked for
    seconds: np.ndarray  # median over repeats; NaN where a size did not survive
    spread: np.ndarray  # half the distance of the quartiles over repeats, seconds
    peak_bytes: np.ndarray  # see `memory`; NaN where unknown
    survived: np.ndarray  # bool: two full updates, optimizer state and all
    reasons: tuple[str, ...]  # why not, in words; "" where it did
    overhead: float  # a of t = a + c B, seconds, >= 0; NaN below two sizes
    per_sample: float  # c, seconds per sample, >= 0
    residual: float  # of the fit: root mean square of (a + c B) / t - 1
    memory: str  # what peak_bytes is: of the GPU, the process' high-water mark

    @property
    def fit(self) -> tuple[float, float]:
        """(a, c) of t = a + c B."""
        return self.overhead, self.per_sample

    @property
    def knee(self) -> float:
        """The batch size a / c, from which on time grows with the samples."""
        raise NotImplementedError

    @property
    def largest(self) -> int | None:
        """The largest batch that survived; None where none did."""
        raise NotImplementedError

    def of(self, batch_size: int) -> float:
        """Measured seconds per update; NaN for a size that was not run."""
        raise NotImplementedError


def time_per_update(
    problem: Problem,
    batch_sizes: Sequence[int],
    *,
    repeats: int = 5,
    max_seconds: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> UpdateTimes:
    """Seconds and peak memory of whole updates: reading rows, both passes, optimizer."""
    raise NotImplementedError
