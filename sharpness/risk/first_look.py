"""What a first call of PyTorch's losses shows: uses that cannot be meant, or hardly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONSTANT = "no gradient reaches the parameters, so that f has derivatives of 0"


class FirstLook(TorchFunctionMode):
    """Inside, calls of PyTorch's losses are looked at before they run.

    Args:
        argument: who calls them, "loss" or "closure".
    """

    def __init__(self, argument: str) -> None:
        super().__init__()
        self._argument, self._wrong = argument, ""
        self.notes: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        scores = args[0] if args else named.get("input")
        targets = args[1] if len(args) > 1 else named.get("target")
        if isinstance(scores, Tensor) and isinstance(targets, Tensor):
            for functions, fits, line in _REFUSED:
                if function in functions and fits(scores, targets):
                    self._wrong = line.format(self._argument, function.__name__)
            for of, differs, note in _NOTED:
                if function is of and scores.numel() and differs(scores):
                    self.note(note)
        return function(*args, **named)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, error: Exception | None = None) -> None:
        """Raise for what was seen, `error` as its cause.

        Raises:
            ValueError: a loss was used in a way that cannot be meant.
        """
        if self._wrong:
            raise ValueError(self._wrong) from error

    def at_value(self, value: Any, leaves: Sequence[Tensor]) -> None:
        """Note a value that autograd does not connect with what it should depend on.

        Cost: a gradient.
        """
        if isinstance(value, Tensor) and not _depends(value, leaves):
            self.note(_CONSTANT)


def _depends(value: Tensor, leaves: Sequence[Tensor]) -> bool:
    if not value.requires_grad:
        return False
    found = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return any(slope is not None for slope in found)


def _swapped(scores: Tensor, targets: Tensor) -> bool:
    """Whether what depends on the model stands second, and cannot be probabilities."""
    if scores.requires_grad or not targets.requires_grad:
        return False
    return not (scores.is_floating_point() and _are_shares(targets))


def _are_shares(values: Tensor) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _has_one_class(scores: Tensor, targets: Tensor) -> bool:
    return scores.ndim > 1 and scores.shape[1] == 1 and len(scores) > 1


def _sum_to_one(shares: Tensor) -> bool:
    sums = shares.detach().sum(min(1, shares.ndim - 1))
    return bool(((sums - 1).abs() < 1e-2).all())


_COMPARED = (
    *(F.cross_entropy, F.nll_loss),
    *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits),
)
_REFUSED: tuple[tuple[Sequence[Any], Callable[[Tensor, Tensor], bool], str], ...] = (
    (
        _COMPARED,
        _swapped,
        "`{}` must give {} the outputs first, then the targets; got them the other way "
        "round. Swap them.",
    ),
    (
        [F.cross_entropy],
        _has_one_class,
        "`{}` must give {} scores of two classes or more; got one column, whose softmax is "
        "1 whatever the weights, so that f is 0. Use 'bce_with_logits'.",
    ),
)
_NOTED: tuple[tuple[Any, Callable[[Tensor], bool], str], ...] = (
    (
        F.nll_loss,
        lambda scores: not _sum_to_one(scores.exp()),
        "outputs do not look like log-probabilities (their exp does not sum to 1), which "
        "nll_loss takes: end the model in LogSoftmax, or use 'cross_entropy'",
    ),
    (
        F.cross_entropy,
        lambda scores: _are_shares(scores) and _sum_to_one(scores),
        "outputs look like probabilities (they sum to 1), where cross_entropy takes "
        "scores: take the softmax off the model",
    ),
    (
        F.kl_div,
        lambda scores: bool((scores > 0).any()),
        "outputs do not look like log-probabilities (some are positive), which kl_div "
        "takes: end the model in LogSoftmax",
    ),
)
