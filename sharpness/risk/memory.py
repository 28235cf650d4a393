"""How much memory a chunk's graph holds, and how much there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

_SHARE = 0.6  # of what is free: a CPU process out of memory is killed, not told


def budget_bytes(device: torch.device) -> int:
    """What a risk may hold in kept graphs on `device`."""
    if device.type == "cuda":
        return int(_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(_SHARE * psutil.virtual_memory().available)


def saved_bytes(build: Callable[[], Any], excluded: list[Tensor]) -> int:
    """Bytes that autograd keeps for a graph, each storage once, without `excluded`."""
    known = {_storage(tensor) for tensor in excluded}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            seen[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = build()  # alive until counted, so that no address is used twice
    total = sum(seen.values())
    del graph
    return total


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
