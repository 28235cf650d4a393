"""What a loss averages over, so that chunks of any size add up to the same mean."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sharpness import _tensors

_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
_OF_VALUES = (
    *(nn.MSELoss, F.mse_loss),
    *(nn.L1Loss, F.l1_loss),
    *(nn.SmoothL1Loss, F.smooth_l1_loss),
    *(nn.HuberLoss, F.huber_loss),
)
_ELEMENTS = (
    *_OF_VALUES,
    *(nn.BCELoss, F.binary_cross_entropy),
    *(nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits),
    *(nn.PoissonNLLLoss, F.poisson_nll_loss),
    *(nn.SoftMarginLoss, F.soft_margin_loss),
)
FUNCTIONS = [known for known in (*_CLASSES, *_ELEMENTS) if not isinstance(known, type)]


@dataclass(frozen=True)
class LossTerms:
    """How one loss reduces its terms, and how many a set of targets holds."""

    reduction: str  # "mean", "sum" or "none"
    count: Callable[[Any], float]  # terms that count, with their weights
    size: Callable[[Any], float]  # places for a term: the same for all of one shape

    def mean(self, reduced: Tensor, size: float) -> Tensor:
        """The loss of a chunk, as a mean that depends on its shape alone."""
        if self.reduction == "mean":
            return reduced.sum() if reduced.ndim else reduced
        return reduced.sum() / size

    def weight(self, count: float, size: float, of: float) -> float:
        """What that mean adds to the mean over all `of` terms."""
        return (count if self.reduction == "mean" else size) / of


def is_any(loss: Any, *known: Any) -> bool:
    """Whether `loss` is one of these modules and functions, with whatever keywords.

    A subclass with a `forward` of its own may compute something else.
    """
    modules = [kind for kind in known if isinstance(kind, type)]
    own = getattr(type(loss), "forward", None)
    return _unwrapped(loss)[0] in known or any(
        isinstance(loss, m) and own is getattr(m, "forward", None) for m in modules
    )


def asked_reduction(loss: Any) -> str | None:
    """The reduction of one of PyTorch's own losses; None for any other callable."""
    if not is_any(loss, *_CLASSES, *_ELEMENTS):
        return None
    return str(keyword(loss, "reduction", "mean"))


def known_terms(loss: Any) -> LossTerms | None:
    """The terms of one of PyTorch's own losses, which are asked; None for any other."""
    loss = evaluated(loss)
    reduction = asked_reduction(loss)
    if reduction is None:
        return None
    if is_elementwise(loss):
        return LossTerms(reduction, _element_count, _element_count)
    weight, ignored = keyword(loss, "weight"), keyword(loss, "ignore_index", -100)
    count = partial(_class_count, weight=weight, ignore_index=ignored)
    return LossTerms(reduction, count, _class_places)


def evaluated(loss: Any) -> Any:
    """The loss itself; a sum where a mean would be 0/0 over classes that weigh nothing.

    With label smoothing their samples add to the sum all the same.
    """
    weight = keyword(loss, "weight")
    if not is_class_loss(loss) or weight is None or bool((weight > 0).all()):
        return loss
    if isinstance(loss, nn.Module):
        loss = copy.copy(loss)
        vars(loss)["reduction"] = "sum"
        return loss
    function, keywords = _unwrapped(loss)
    return partial(function, **{**keywords, "reduction": "sum"})


def weighs_places(loss: Any, targets: Tensor) -> bool:
    """Whether an elementwise loss has a weight for each row by its place in the batch."""
    weights = [keyword(loss, "weight"), keyword(loss, "pos_weight")]
    return is_elementwise(loss) and any(
        isinstance(w, Tensor) and w.ndim == targets.ndim and len(w) > 1 for w in weights
    )


def is_class_loss(loss: Any) -> bool:
    """Whether `loss` compares scores of classes along dimension 1 with a class."""
    return is_any(loss, *_CLASSES)


def is_of_values(loss: Any) -> bool:
    """Whether `loss` is in the unit of its targets, or in its square."""
    return is_any(loss, *_OF_VALUES)


def is_elementwise(loss: Any) -> bool:
    """Whether `loss` compares each output with the target in its place."""
    return is_any(loss, *_ELEMENTS)


def keyword(loss: Any, name: str, default: Any = None) -> Any:
    """A setting of one of PyTorch's own losses."""
    return _unwrapped(loss)[1].get(name, default)


def num_rows(batch: Any) -> float:
    """Samples of a batch: the length that most of its parts have, of several the first.

    A tensor without dimensions, such as a step counter, has no rows. A list inside the
    batch is a part that may be meant in two ways: inputs side by side, or samples (images
    of several sizes, say).
    """
    if not any(isinstance(part, Tensor) for part in _tensors.leaves(batch)):
        raise TypeError(
            f"`data` must hold a tensor in each batch; got {type(batch).__name__}. "
            "A closure that needs none takes `data=[torch.ones(1)]`."
        )
    lengths = Counter(_lengths(batch))
    return float(lengths.most_common(1)[0][0]) if lengths else 1.0


def _lengths(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        yield from batch.shape[:1]
    for part in _tensors.parts(batch) or ():
        if isinstance(part, list):
            yield from dict.fromkeys((*_lengths(part), len(part)))
        else:
            yield from _lengths(part)


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


def refuse_broadcast(outputs: Any, targets: Any) -> None:
    """Raise where an elementwise loss would stretch one to the other's shape."""
    shapes = getattr(outputs, "shape", None), getattr(targets, "shape", None)
    if None not in shapes and shapes[0] != shapes[1]:
        raise ValueError(
            "`data` must have targets of the outputs' shape for an elementwise loss; got "
            f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}, which "
            "would be broadcast. Reshape the targets."
        )
