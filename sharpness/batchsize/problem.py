"""What is trained: a starting point, a loss, data and an optimizer, at any batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[nn.Parameter], float], Optimizer]


@dataclass(frozen=True, eq=False)
class Problem:
    """One starting point, loss, data and optimizer, ready to be trained from at any size.

    Args:
        model: the starting point. Never changed: deep copies are trained.
        loss: the mean over rows, as `EmpiricalRisk` takes it; also a name.
        data: training rows. A pair (inputs, targets) of tensors or arrays, memory-mapped
            ones too, of which a batch's rows are read at a time; a map-style data set
            (`len`, indexing by an array of rows or by one row); anything else that
            `EmpiricalRisk` takes is read once into memory.
        lr: a learning rate that is known to work, > 0 ...
        batch_size: ... and the batch size it works for, >= 1. They anchor the scaling rule.
        optimizer: "sgd", "momentum" (0.9), "adam", "adamw", or a function of parameters
            and learning rate, such as a class of `torch.optim`.
        validation: rows that tell how good a model is, as `data`; at most 4096 of them,
            drawn once, are looked at. None: as many of the training rows stand in.
        device: where to compute; None means where the parameters are.
        batchnorm_batch: rows that BatchNorm takes its statistics from in training (ghost
            batches), >= 2; None for the whole batch.

    Raises:
        ValueError: rows with NaN, targets that are all the same, an argument out of its
            range, or what `EmpiricalRisk` refuses.
        TypeError: `optimizer` makes no optimizer.
    """

    model: nn.Module
    loss: Any
    data: Any
    _: KW_ONLY
    lr: float
    batch_size: int
    optimizer: str | OptimizerFactory = "sgd"
    validation: Any = None
    device: str | torch.device | None = None
    batchnorm_batch: int | None = None

    @property
    def num_rows(self) -> int:
        """Training rows."""
        raise NotImplementedError

    def copy(self) -> nn.Module:
        """The starting point, a new copy on `device`, in training mode."""
        raise NotImplementedError

    def optimizer_for(self, model: nn.Module, lr: float) -> Optimizer:
        """A new optimizer of a model's parameters."""
        raise NotImplementedError

    @property
    def rule(self) -> str:
        """How the rate scales with the batch size: "linear" for SGD, else "sqrt"."""
        raise NotImplementedError

    def scaled_rate(self, batch_size: int, rule: str | None = None) -> float:
        """The anchor's rate, scaled to another batch size."""
        raise NotImplementedError

    def update(self, model: nn.Module, optimizer: Optimizer, batch: Any) -> Tensor:
        """One whole update; returns the batch's loss before it, 0-d, not waited for."""
        raise NotImplementedError

    def batches(self, batch_size: int, seed: int = 0) -> Iterator[Any]:
        """An endless stream of shuffled batches on `device`, read as they are asked for.

        Every epoch has an order of its own; a batch may reach into the next epoch, so
        that all sizes with one seed see the same rows in the same order.

        Raises:
            ValueError: `batch_size` is larger than the number of rows.
        """
        raise NotImplementedError

    def validation_loss(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss over the validation rows in evaluation mode, and its standard error."""
        raise NotImplementedError

    def rows(self, num: int, seed: int = 0) -> Any:
        """`num` training rows (inputs, targets), drawn without replacement, on `device`."""
        raise NotImplementedError
