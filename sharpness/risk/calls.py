"""A look at every call of PyTorch's functions, in the forward pass of a model or a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


class Calls(TorchFunctionMode):
    """Inside, `see(function, args, kwargs, result)` is called after each call."""

    def __init__(self, see: Callable[[Any, Any, Any, Any], object]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._see(function, args, kwargs or {}, result)
        return result
