"""Processes that compute together: sums over them, vectors in parts, and their loss.

A product with a matrix of curvature is linear in the data. So each process (a rank)
computes that of its own samples, and one collective at the end adds them up. Long vectors
lie in parts: rank r of W holds entries r c to (r + 1) c, c = ceil(n / W).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpness import _launch, _progress, _tensors

_Given = TypeVar("_Given")
_STRETCH = 1 << 20  # random numbers drawn at once; a multiple of 16
_FILLED = 16  # from so many on PyTorch's CPU generator draws in blocks
_INTERRUPT = 2.0  # what a process wishes for, above 1 for the end of the time


class GroupEndedError(KeyboardInterrupt):
    """Processes cannot go on together: one has died, does not answer or was interrupted.

    An interrupt, since everything that keeps a partial result on Ctrl-C keeps it here, and
    nothing that takes an error of the model for a hint may take this one.
    """

    exit_code = 3


class OutOfMemoryEverywhereError(torch.OutOfMemoryError):
    """A process ran out of memory, and every process of the group knows it."""


class Ranks:
    """The processes of a group, or this one alone.

    Every process must call the same methods in the same order.

    Args:
        group: of `torch.distributed`, with the backend gloo or NCCL; None for one process.

    Attributes:
        lost: why no other process can be reached any more; empty while they can.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        self.lost = ""
        self._caught: int | None = None  # a signal that waits for `heed`
        self._holds = False
        if group is not None:
            import torch.distributed as dist

            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            on_gpu = "nccl" in str(dist.get_backend(group))
            self._device = torch.device("cuda" if on_gpu else "cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each. Cost: one all-reduce."""
        return self._all_reduced(x, "SUM")

    def add(self, number: float) -> float:
        """The sum of a number over ranks, in float64."""
        return self._reduced_number(number, "SUM")

    def most(self, number: float) -> float:
        """The largest of a number on all ranks."""
        return self._reduced_number(number, "MAX")

    def least(self, number: float) -> float:
        """The smallest."""
        return -self.most(-number)

    def any(self, holds: bool) -> bool:
        """Whether something holds on one of them, at least."""
        return bool(self.most(float(holds)))

    def fitting(self, compute: Callable[[], _Given]) -> _Given:
        """What is computed here, where no process runs out of memory over it.

        Raises:
            OutOfMemoryEverywhereError: one of them has. All raise it, and none waits.

        Cost: a sum of one number over ranks; none on one process.
        """
        if self.size == 1:
            return compute()
        found, trouble = list[_Given](), ""
        try:
            found.append(compute())
        except torch.OutOfMemoryError as error:
            trouble = str(error)
        if self.any(bool(trouble)):
            raise OutOfMemoryEverywhereError(trouble or "another process had no room")
        return found[0]

    def end(self, why: str) -> GroupEndedError:
        """An error to raise where the others cannot follow: this process leaves them."""
        self.lost = f"rank {self.rank} of {self.size} cannot go on with the others: {why}"
        return GroupEndedError(self.lost)

    def heed(self, is_late: bool = False) -> bool:
        """Whether one of the processes is late; between two pieces of work.

        Raises:
            GroupEndedError: one of them was interrupted while signals are held back. All
                raise it, so that all stop at the same place.

        Cost: a sum of one number over ranks; none on one process.
        """
        if self.size == 1:
            return is_late
        wish = self.most(float(is_late) if self._caught is None else _INTERRUPT)
        if wish == _INTERRUPT:
            self._caught = None
            raise GroupEndedError("interrupted, so all processes have stopped")
        return bool(wish)

    @contextmanager
    def holding_back_interrupts(self) -> Iterator[None]:
        """SIGINT and SIGTERM wait inside for `heed`; a second one ends this process's part.

        One that came too late for that is passed on at the end. Nothing is held back on
        one process, nor in a thread. May be nested.
        """
        in_main = threading.current_thread() is threading.main_thread()
        if self.size == 1 or self._holds or not in_main:
            yield
            return
        numbers, self._holds = (signal.SIGINT, signal.SIGTERM), True
        before = [signal.signal(number, self._catch) for number in numbers]
        try:
            yield
        except KeyboardInterrupt:
            self._caught = None
            raise
        finally:
            self._holds = False
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
            caught, self._caught = self._caught, None
            if caught is not None and not self.lost:
                signal.raise_signal(caught)

    def _catch(self, number: int, _: object) -> None:
        if self._caught is not None:
            raise self.end("interrupted twice")
        self._caught = number

    def objects(self, value: _Given) -> list[_Given]:
        """What each rank has given, in their order; small things that can be pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        self._together(lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def span(self, size: int) -> slice:
        """The rows of `size` that are this rank's."""
        return span(size, self.rank, self.size)

    def ready(self) -> None:
        """Wait until every process is here."""
        self.total(torch.zeros(1))

    def gathered(self, part: Tensor, size: int) -> Tensor:
        """All `size` rows, from each rank's own. Cost: one all-gather."""
        if self.size == 1:
            return part
        import torch.distributed as dist

        rows = -(-size // self.size)
        own = _padded(part, rows).to(self._device)
        whole = own.new_empty((rows * self.size, *part.shape[1:]))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._together(lambda: gather(whole, own, group=self.group))
        return whole[:size].to(part.device)

    def scattered(self, whole: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks. Cost: one reduce-scatter."""
        if self.size == 1:
            return whole
        import torch.distributed as dist

        size, rows = len(whole), -(-len(whole) // self.size)
        given = _padded(whole, rows * self.size).to(self._device)
        own = given.new_empty((rows, *whole.shape[1:]))
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._together(lambda: scatter(own, given, group=self.group))
        span = self.span(size)
        return own[: span.stop - span.start].to(whole.device)

    def _all_reduced(self, x: Tensor, how: str) -> Tensor:
        if self.size == 1:
            return x
        import torch.distributed as dist

        result = x.detach().to(self._device, copy=True).contiguous()
        operation = getattr(dist.ReduceOp, how)
        self._together(lambda: dist.all_reduce(result, operation, group=self.group))
        return result.to(x.device)

    def _reduced_number(self, number: float, how: str) -> float:
        if self.size == 1:
            return number
        given = torch.tensor([number], dtype=torch.float64)
        return float(self._all_reduced(given, how))

    def _together(self, collective: Callable[[], Any]) -> None:
        """A collective; once one has failed none is tried again.

        Raises:
            GroupEndedError: another process is gone, or took longer than the group's limit.
        """
        if self.lost:
            raise GroupEndedError(self.lost)
        try:
            collective()
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            who = f"rank {self.rank} of {self.size}"
            self.lost = f"{who} can no longer reach another: {_in_short(error)}"
            raise GroupEndedError(self.lost) from error


ALONE = Ranks()


def span(size: int, rank: int, of: int) -> slice:
    """The rows of `size` that belong to a rank: ceil(size / of), fewer at the end."""
    rows = -(-size // of)
    start = min(rank * rows, size)
    return slice(start, min(start + rows, size))


class Vectors:
    """How the vectors of a Krylov space lie on the ranks: each in parts of n / W entries.

    Args:
        n: their length.
        ranks: the processes.
    """

    def __init__(self, n: int, ranks: Ranks = ALONE) -> None:
        self.n, self.ranks = n, ranks
        self.may_be_cut_anew = True  # whether another number of ranks can take parts over

    def total(self, sums: Tensor) -> Tensor:
        """Sums over own entries -> sums over all entries."""
        return self.ranks.total(sums)

    def collected(self, product: Tensor) -> Tensor:
        """What all have computed, from what each has of its own data: one all-reduce."""
        return self.ranks.total(product)

    def part(self, whole: Tensor) -> Tensor:
        """Own entries of a vector (n,) that is the same on all ranks; a copy."""
        return whole if self.ranks.size == 1 else whole[self.ranks.span(self.n)].clone()

    def whole(self, part: Tensor) -> Tensor:
        """The vector (n,) from each rank's part."""
        return self.ranks.gathered(part, self.n)

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Inner product in float64."""
        return float(self.total(_tensors.dot64(a, b)))

    def norm(self, a: Tensor) -> float:
        """Euclidean norm, summed in float64."""
        return float(self.total(_tensors.dot64(a, a)).sqrt())

    def normal(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Own entries of a standard normal vector, drawn as if it were whole."""
        span, start, found = self.ranks.span(self.n), 0, []
        for draw in normals(self.n, generator):
            inside = slice(max(span.start - start, 0), max(span.stop - start, 0))
            found.append(draw[inside])
            start += len(draw)
        return torch.cat(found).to(device=like.device, dtype=like.dtype)


def normals(n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`torch.randn(n)` in float32, to the bit, a stretch at a time."""
    while n:
        num = _STRETCH if n >= _STRETCH + _FILLED else n
        yield torch.randn(num, generator=generator, dtype=torch.float32)
        n -= num


# -- started by torchrun -----------------------------------------------------------------


@contextmanager
def launched(device: str, seconds: float) -> Iterator[Ranks]:
    """The ranks of the launcher's processes; this one alone where there was none.

    SIGTERM, which torchrun sends when another process has died, interrupts this one.

    Args:
        device: "cpu" for gloo, "cuda:1" and the like for NCCL.
        seconds: how long a collective may wait for another process.
    """
    if not _launch.is_launched():
        if lacks := _launch.half_launched():
            _progress.say(lacks)
        yield ALONE
        return
    import torch.distributed as dist

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # an error, not an abort
    limit = timedelta(seconds=seconds)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit)
    ranks = Ranks(dist.group.WORLD)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield ranks
    finally:
        signal.signal(signal.SIGTERM, before)
        if not ranks.lost:
            dist.destroy_process_group()


def _padded(rows: Tensor, num: int) -> Tensor:
    if len(rows) == num:
        return rows.contiguous()
    missing = rows.new_zeros((num - len(rows), *rows.shape[1:]))
    return torch.cat([rows, missing])


def _in_short(error: Exception) -> str:
    """The first line of a backend's message, without where in its source it stands."""
    line = str(error).strip().splitlines()[0]
    return line.rpartition("] ")[2].partition(". ")[0][:200]
