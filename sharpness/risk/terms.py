"""What a loss averages over, so that chunks of any size add up to the same mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_CLASS_FUNCTIONS = (F.cross_entropy, F.nll_loss)
_ELEMENT_LOSSES = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)
_ELEMENT_FUNCTIONS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.poisson_nll_loss,
    F.soft_margin_loss,
)


@dataclass(frozen=True)
class LossTerms:
    """How one loss reduces its terms, and how many a set of targets holds."""

    reduction: str  # "mean", "sum" or "none"
    count: Callable[[Any], float]  # terms that count, with their weights
    size: Callable[[Any], float]  # places for a term: the same for all of one shape

    def mean(self, reduced: Tensor, size: float) -> Tensor:
        """The loss of a chunk, as a mean that depends on its shape alone."""
        return reduced if self.reduction == "mean" else reduced.sum() / size

    def weight(self, count: float, size: float, of: float) -> float:
        """What that mean adds to the mean over all `of` terms."""
        return (count if self.reduction == "mean" else size) / of


def asked_reduction(loss: Any) -> str | None:
    """The reduction of one of PyTorch's own losses; None for any other callable."""
    function, keywords = _unwrapped(loss)
    known = (*_CLASS_LOSSES, *_ELEMENT_LOSSES)
    if isinstance(loss, known) or function in (*_CLASS_FUNCTIONS, *_ELEMENT_FUNCTIONS):
        return str(keywords.get("reduction", "mean"))
    return None


def loss_terms(loss: Callable[..., Tensor], outputs: Tensor, targets: Any) -> LossTerms:
    """The terms of `loss`; `outputs, targets` is a small example it accepts.

    PyTorch's own losses are asked. Any other callable is taken to have one term for
    each target row, and whether it averages or adds is seen by doubling the example.
    """
    function, keywords = _unwrapped(loss)
    if isinstance(loss, _CLASS_LOSSES) or function in _CLASS_FUNCTIONS:
        weight, ignored = keywords.get("weight"), keywords.get("ignore_index", -100)
        count = partial(_class_count, weight=weight, ignore_index=ignored)
        return LossTerms(keywords.get("reduction", "mean"), count, _class_places)
    if isinstance(loss, _ELEMENT_LOSSES) or function in _ELEMENT_FUNCTIONS:
        return LossTerms(keywords.get("reduction", "mean"), _element_count, _element_count)
    return LossTerms(_observed_reduction(loss, outputs, targets), num_rows, num_rows)


def is_class_loss(loss: Any) -> bool:
    """Whether `loss` compares scores of classes along dimension 1 with a class."""
    return isinstance(loss, _CLASS_LOSSES) or _unwrapped(loss)[0] in _CLASS_FUNCTIONS


def is_any(loss: Any, module: type, function: Callable[..., Tensor]) -> bool:
    """Whether `loss` is PyTorch's `module` or `function`, with whatever keywords."""
    return isinstance(loss, module) or _unwrapped(loss)[0] is function


def keyword(loss: Any, name: str, default: Any = None) -> Any:
    """A setting of one of PyTorch's own losses."""
    return _unwrapped(loss)[1].get(name, default)


def num_rows(batch: Any) -> float:
    """Length of the first tensor found in a batch (a tensor, tuple, list or dict)."""
    first = next(_tensors_in(batch), None)
    if first is None:
        raise TypeError(
            f"`data` must hold a tensor in each batch; got {type(batch).__name__}. "
            "Its rows are what `num_samples` counts."
        )
    return float(first.shape[0]) if first.ndim else 1.0


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors_in(item)


def _unwrapped(loss: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(loss, nn.Module):
        names = ("reduction", "weight", "ignore_index", "label_smoothing", "pos_weight")
        return loss, {n: getattr(loss, n) for n in names if hasattr(loss, n)}
    if isinstance(loss, partial):
        return loss.func, dict(loss.keywords)
    return loss, {}


def _class_places(targets: Tensor) -> float:
    if targets.is_floating_point():  # class probabilities: PyTorch divides by the rows
        return targets.numel() / targets.shape[1 if targets.ndim > 1 else 0]
    return float(targets.numel())


def _class_count(targets: Tensor, weight: Tensor | None, ignore_index: int) -> float:
    if targets.is_floating_point():
        return _class_places(targets)
    counted = targets[targets != ignore_index]
    if weight is None:
        return float(counted.numel())
    return float(weight.to(counted.device)[counted].double().sum())


def _element_count(targets: Tensor) -> float:
    return float(targets.numel())


def _observed_reduction(loss: Any, outputs: Tensor, targets: Any) -> str:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "`loss` must say its number of terms where the model returns a "
            f"{type(outputs).__name__}. Pass `terms=`, a function of the targets that "
            "returns how many terms the loss averages."
        )
    with torch.no_grad():
        once = loss(outputs, targets)
        if once.ndim:
            return "none"
        twice = loss(torch.cat([outputs, outputs]), torch.cat([targets, targets]))
    ratio = float(twice / once) if float(once) else float("nan")
    for reduction, expected in (("mean", 1.0), ("sum", 2.0)):
        if abs(ratio - expected) < 0.01:
            return reduction
    raise ValueError(
        "`loss` must be a mean or a sum over target rows; got a value that changes by "
        f"a factor of {ratio:.3g} when the rows are doubled. Pass `terms=`, a function "
        "of the targets that returns how many terms the loss averages."
    )
