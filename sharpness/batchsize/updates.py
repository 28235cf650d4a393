"""How long does an update take, at which batch size, and which sizes fit in memory?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from sharpness._arguments import ensure, whole, whole_seed
from sharpness._results import Cost, Reading, Result, number
from sharpness._run import Run
from sharpness.batchsize.problem import Problem
from sharpness.risk import memory
from sharpness.risk.model_state import random_generators_kept
from sharpness.statistics import relative_line

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

_NO_MEMORY = "out of memory"
_BLOCK_SECONDS = 0.02  # a repeat is a block of updates of about this length
_MOST_IN_BLOCK = 200
_COUNTED = (4, 32)  # batch sizes whose memory on a CPU is counted; larger ones follow


@dataclass(frozen=True, kw_only=True)
class UpdateTimes(Result):
    """Seconds and memory of a whole update, by batch size; arrays (S,), rising."""

    batch_sizes: np.ndarray  # as asked for
    # Median over repeats; NaN where a size did not survive. The default hides `Result`'s
    # property of that name; the seconds of the whole call are `cost.seconds`.
    seconds: np.ndarray = None  # type: ignore[assignment]
    spread: np.ndarray  # half the distance of the quartiles over repeats, seconds
    peak_bytes: np.ndarray  # see `memory`; NaN where unknown
    survived: np.ndarray  # bool: two full updates, optimizer state and all
    reasons: tuple[str, ...]  # why not, in words; "" where it did
    overhead: float  # a of t = a + c B, seconds, >= 0; NaN below two sizes
    per_sample: float  # c, seconds per sample, >= 0
    residual: float  # of the fit: root mean square of (a + c B) / t - 1
    memory: str  # what `peak_bytes` is

    @property
    def fit(self) -> tuple[float, float]:
        """(a, c) of t = a + c B."""
        return self.overhead, self.per_sample

    @property
    def knee(self) -> float:
        """The batch size a / c, where half of the time is overhead; inf where c is 0."""
        return math.inf if self.per_sample == 0 else self.overhead / self.per_sample

    @property
    def largest(self) -> int | None:
        """The largest batch that survived; None where none did."""
        sizes = self.batch_sizes[self.survived]
        return int(sizes[-1]) if len(sizes) else None

    def of(self, batch_size: int) -> float:
        """Measured seconds per update; NaN for a size that was not run."""
        found = self.seconds[self.batch_sizes == batch_size]
        return float(found[0]) if len(found) else math.nan

    def _rows(self) -> Iterable[Reading]:
        for size, t, spread, why in zip(
            self.batch_sizes, self.seconds, self.spread, self.reasons, strict=True
        ):
            words = why or "median and half the distance of the quartiles"
            shown = Reading(name=f"seconds_per_update({size})", value=float(t))
            yield replace(shown, error=float(spread), evidence=words)
        words = f"fitted, relative residual {self.residual:.2g}"
        for name in ("overhead", "per_sample", "knee"):
            yield Reading(name=name, value=getattr(self, name), evidence=words)

    def table(self) -> str:
        """A line for each size: milliseconds, samples per second, memory, why not."""
        from sharpness.report.tables import table_text

        rows = []
        for i, size in enumerate(self.batch_sizes):
            t, peak = self.seconds[i], self.peak_bytes[i] / 2**20
            times = (number(1e3 * t), number(1e3 * self.spread[i]), number(size / t))
            rows.append([str(size), *times, number(peak), self.reasons[i]])
        columns = ("batch", "ms/update", "±", "samples/s", "peak MB", "")
        a, c = 1e3 * self.overhead, 1e3 * self.per_sample
        line = f"t = {number(a)} ms + {number(c)} ms * B (residual {self.residual:.1%})"
        return table_text(columns, rows, f"{line}, knee at {number(self.knee)}")


def time_per_update(
    problem: Problem,
    batch_sizes: Sequence[int],
    *,
    repeats: int = 5,
    max_seconds: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> UpdateTimes:
    """Seconds and peak memory of whole updates: reading rows, both passes, optimizer.

    For each size a new copy of the model makes two full updates, so that the optimizer's
    state is there. The sizes that survive are timed in turn, `repeats` rounds of a block
    of updates (about 20 ms) of each, so that a machine that slows down does so for all.
    The line t = a + c B is fitted by least squares of its relative errors: a is paid by
    each update whatever its size, c by each sample. It describes the sizes that were
    run; no time is given for any other.

    Args:
        problem: what is trained.
        batch_sizes: to run, in any order, each >= 1.
        repeats: timed blocks of each size, >= 2.
        max_seconds: no size begins later than this.
        seed: of the order of the rows.
        progress: show a bar; by default on a terminal.

    Returns:
        `UpdateTimes`. A size does not survive where it is larger than the number of rows,
        where CUDA runs out of memory, or, on a CPU, which would end the process, where
        the memory counted in two small updates says that it would; `reasons` say which.
        Larger sizes are not tried then. Status `max_seconds` or `interrupted` where some
        were not run.

    Raises:
        ValueError: no batch sizes, or an argument outside its range.

    Cost: 2 + `repeats` updates of each size, or what fills the blocks; one more copy of
    the model and its optimizer's state.
    """
    sizes = sizes_of(batch_sizes)
    repeats, seed = whole("repeats", repeats, 2), whole_seed(seed)
    run = Run(
        "sizes",
        max_seconds=max_seconds,
        total=len(sizes) * (1 + repeats),
        progress=progress,
    )
    rows = {size: _Row() for size in sizes}
    with random_generators_kept(), run:
        reason = refusals(problem, seed)
        for size in sizes:
            run.step()
            rows[size] = _tried(problem, size, seed, reason(size))
            if rows[size].reason:
                for later in sizes[sizes.index(size) + 1 :]:
                    rows[later].reason = f"not run, as {size} did not survive"
                break
        block = _blocks(problem, seed)
        for _ in range(repeats):
            for size, row in rows.items():
                if not row.reason:
                    run.step()
                    seconds = block(size, row.num)
                    row.times += [] if seconds is None else [seconds]
                    row.reason = _NO_MEMORY if seconds is None else ""
    survived = np.array([not row.reason for row in rows.values()])
    all_seconds = np.array([row.seconds for row in rows.values()])
    a = c = residual = math.nan
    if survived.sum() > 1:
        line = relative_line(np.array(sizes)[survived], all_seconds[survived])
        a, c, residual = line.a, line.b, line.residual
    return UpdateTimes(
        batch_sizes=np.array(sizes),
        seconds=all_seconds,
        spread=np.array([row.spread for row in rows.values()]),
        peak_bytes=np.array([row.peak for row in rows.values()]),
        survived=survived,
        reasons=tuple(row.reason for row in rows.values()),
        memory=_MEMORY.get(problem.device.type, "unknown"),
        overhead=a,
        per_sample=c,
        residual=residual,
        status=run.status,
        cost=Cost(seconds=run.seconds),
        settings={
            "batch_sizes": list(sizes),
            "repeats": repeats,
            "seed": seed,
            "device": str(problem.device),
        },
    )


def sizes_of(batch_sizes: Sequence[int]) -> list[int]:
    """Batch sizes as they were asked for, rising, each once.

    Raises:
        ValueError: none, or one that is no whole number from 1 on.
    """
    sizes = sorted({whole("batch_sizes", size, 1) for size in batch_sizes})
    ensure(bool(sizes), "batch_sizes", "hold at least one size", "none")
    return sizes


_MEMORY = {
    "cuda": "most that was allocated on the GPU, model and data included",
    "cpu": "high-water mark of the process until then",
}


@dataclass
class _Row:
    """What is known of one size."""

    reason: str = "not run"
    peak: float = math.nan
    num: int = 1  # updates in a block
    tried: float = math.nan  # seconds of the second update: all there is where time is up
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return math.nan if self.reason else float(np.median(self.times or [self.tried]))

    @property
    def spread(self) -> float:
        low, high = np.quantile(self.times or [math.nan], [0.25, 0.75])
        return float(high - low) / 2


def _tried(problem: Problem, size: int, seed: int, reason: str) -> _Row:
    """Two full updates of a new copy, unless there is a reason against them."""
    if reason:
        return _Row(reason)
    if problem.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(problem.device)
    block = _blocks(problem, seed)
    first, tried = block(size, 1), block(size, 1)
    if first is None or tried is None:
        return _Row(_NO_MEMORY)
    num = min(math.ceil(_BLOCK_SECONDS / max(tried, 1e-9)), _MOST_IN_BLOCK)
    return _Row("", _peak_bytes(problem.device), num, tried)


def _blocks(problem: Problem, seed: int) -> Callable[[int, int], float | None]:
    """Seconds per update over some updates of a size; one model for all sizes.

    None where memory ran out.
    """
    model = problem.copy()
    optimizer = problem.optimizer_for(model, problem.lr)
    streams: dict[int, Any] = {}

    def block(size: int, num: int) -> float | None:
        try:
            if size not in streams:
                streams[size] = problem.batches(size, seed)
                next(streams[size])  # shuffles all rows, once an epoch
            began = now(problem.device)
            for _ in range(num):
                problem.update(model, optimizer, next(streams[size]))
            return (now(problem.device) - began) / num
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    return block


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on a GPU or in the main memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "not enough memory" in str(error)  # PyTorch's allocator on a CPU


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if device.type == "cpu" and resource is not None:
        # In kilobytes on Linux, in bytes on macOS.
        unit = 1 if torch.backends.mps.is_built() else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
    return math.nan


# -- before a size is run ----------------------------------------------------------------


def refusals(problem: Problem, seed: int) -> Callable[[int], str]:
    """Why a batch size cannot be run, as far as that can be known beforehand."""
    few, many = (min(size, problem.num_rows) for size in _COUNTED)
    known: list[memory.Footprint] = []

    def reason(size: int) -> str:
        if size > problem.num_rows:
            return f"larger than the {problem.num_rows} rows"
        if problem.device.type != "cpu" or not few < many < size:
            return ""
        if not known:
            known.extend(_counted(problem, num, seed) for num in (few, many))
        needed = known[1].at(size, known[0], (few, many)).peak
        free = memory.budget_bytes(problem.device)
        if needed <= free:
            return ""
        return f"needs about {needed / 1e9:.3g} GB of {free / 1e9:.3g} GB (predicted)"

    return reason


def _counted(problem: Problem, size: int, seed: int) -> memory.Footprint:
    """Bytes of one update with its rows, counted; the weights and states are in it."""
    model = problem.copy()
    optimizer = problem.optimizer_for(model, problem.scaled_rate(size))
    batches = problem.batches(size, seed)

    def build() -> Callable[[], Any]:
        batch = next(batches)
        return lambda: problem.update(model, optimizer, batch)

    found = memory.footprint(build)
    given = sum(part.nbytes for part in tree_leaves(next(batches)))
    held = 2 * given + sum(p.nbytes for p in model.parameters())
    return replace(found, peak=found.peak + held)
