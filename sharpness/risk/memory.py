"""How much memory a product takes, and how much there is."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharpness._launch import local_processes

SHARE = 0.6  # of what is free: a CPU process out of memory is killed, not told


def free_bytes(device: torch.device) -> int:
    """What is free on `device`; of a machine's memory, this process's share."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available) // local_processes(), _allowed())


def resident_bytes(device: torch.device) -> int:
    """What this process has on `device`, with what its allocator keeps of freed blocks."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)


def most_resident_bytes(device: torch.device) -> int:
    """The most that this process ever had there; 0 where nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _allowed() -> int:
    """What is left of a limit on this process's data (`ulimit -d`), where there is one."""
    try:
        import resource
    except ImportError:  # not on Windows
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    held = getattr(psutil.Process().memory_info(), "data", 0)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(0, limit - held)


def budget_bytes(device: torch.device) -> int:
    """What a risk may hold in kept graphs on `device`."""
    return int(SHARE * free_bytes(device))


@dataclass(frozen=True)
class Footprint:
    """Bytes of one chunk: what its graph holds, and the most while it is worked on."""

    held: int
    peak: int
    largest: int = 0  # of a single tensor

    def at(self, rows: int, smaller: Footprint, from_rows: tuple[int, int]) -> Footprint:
        """Extrapolated to `rows`, from `smaller` and this one at `from_rows`.

        Part of the memory grows with the rows and part does not: two sizes tell them
        apart.
        """
        few, many = from_rows
        more = (rows - many) / (many - few)
        return Footprint(
            max(1, round(self.held + more * (self.held - smaller.held))),
            max(1, round(self.peak + more * (self.peak - smaller.peak))),
            max(
                self.largest, round(self.largest + more * (self.largest - smaller.largest))
            ),
        )


def footprint(
    build: Callable[[], Callable[[], Any]], sizes_of_parameters: Iterable[int] = ()
) -> Footprint:
    """Bytes that `build()` holds, and the peak of it and of calling what it returns.

    Counted, not sampled: every storage an operator allocates, until it is freed. The
    largest is looked for among those that are no parameter's size: they grow with rows.
    """
    with _Storages(set(sizes_of_parameters)) as storages:
        work = build()
        held = storages.now
        result = work()
    peak, largest = storages.peak, storages.largest
    del result, work
    return Footprint(max(1, held), max(1, peak), largest)


def nests_transforms(build: Callable[[], Any]) -> bool:
    """Whether the graph comes from `torch.func.grad` and the like, used inside.

    Going back through such a graph (forward over reverse mode) under a dispatch mode ends
    the process in PyTorch 2.13. The transforms forbid hooks on saved tensors, which
    tells them apart.
    """

    def cut(tensor: Tensor) -> Tensor:
        return tensor.detach()  # with its node it would be a cycle that nothing frees

    try:
        with torch.autograd.graph.saved_tensors_hooks(cut, cut):
            build()
    except RuntimeError as error:
        return "saved tensor hooks" in str(error)
    return False


def saved_bytes(values: Iterable[Tensor]) -> int:
    """Bytes of what the graphs that lead to these values have saved."""
    sizes = {}
    for node in graph_nodes(values):
        for name in dir(node):
            saved = getattr(node, name, None) if name.startswith("_saved_") else None
            for tensor in tree_leaves(saved):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    sizes[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return max(1, sum(sizes.values()))


def graph_nodes(values: Iterable[Tensor]) -> set[Node]:
    """All nodes of the graphs that lead to these values."""
    found: set[Node] = set()
    waiting = [value.grad_fn for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return found


class _Storages(TorchDispatchMode):
    """Bytes of the storages that were allocated inside and are alive."""

    def __init__(self, passed_over: Container[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._passed_over = passed_over
        self.now = self.peak = self.largest = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for old in tree_leaves((args, kwargs)):
            self._note(old, counted=False)
        result = function(*args, **(kwargs or {}))
        for new in tree_leaves(result):
            self._note(new, counted=True)
        return result

    def _note(self, tensor: Any, *, counted: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if counted else 0
        self.now += self._known[key]
        if self._known[key] not in self._passed_over:
            self.largest = max(self.largest, self._known[key])
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)
