"""The terms a loss averages over, for matrices made of their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpness import _tensors
from sharpness._arguments import ensure
from sharpness._results import ensure_available
from sharpness.risk import loss_terms


@dataclass(frozen=True)
class FisherTerms:
    """How outputs fall into terms, and what each weighs in the mean over a chunk.

    A case is an unmasked target of a class loss; of any other loss a row, or, with
    `elementwise`, one element of the outputs.
    """

    loss: Any
    elementwise: bool = False

    def dims(self, outputs: Tensor) -> tuple[int, ...]:
        """Dimensions of the outputs that one case spans."""
        if loss_terms.is_class_loss(self.loss):
            return (1,)
        return () if self.elementwise else tuple(range(1, outputs.ndim))

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Weight of every case, to be broadcast against the outputs; they sum to 1."""
        if not loss_terms.is_class_loss(self.loss):
            number = outputs.numel() if self.elementwise else len(outputs)
            return torch.full_like(outputs, 1 / number)
        each = self._of_classes(targets).to(outputs)
        mean = loss_terms.keyword(self.loss, "reduction", "mean") == "mean"
        return (each / (each.sum() if mean else each.numel())).unsqueeze(1)

    def _of_classes(self, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return torch.ones_like(targets.select(1, 0))
        ignored: int = loss_terms.keyword(self.loss, "ignore_index", -100)
        kept = targets != ignored
        weight: Tensor | None = loss_terms.keyword(self.loss, "weight")
        if weight is None:
            return kept
        return weight.to(targets.device)[targets * kept] * kept


_ROUNDINGS = 100  # of a log-softmax, which sums over classes
_SQUARED = (nn.MSELoss, F.mse_loss)
_STRETCH = 1 << 20  # other processes' random numbers passed over at once
_IGNORED = -100  # no class, unlike what a loss may ignore


def loss_of_sampled(loss: Any) -> Any:
    """The loss for sampled targets: a class that the loss ignores may be drawn too."""
    reduction = loss_terms.keyword(loss, "reduction", "mean")
    if loss_terms.is_any(loss, nn.NLLLoss, F.nll_loss):
        return partial(F.nll_loss, reduction=reduction)
    if loss_terms.is_class_loss(loss):
        return partial(F.cross_entropy, reduction=reduction)
    return loss


def loss_of_scores(loss: Any, outputs: Tensor) -> Any:
    """The loss whose curvature in the outputs is meant: an NLL's lies in the log-softmax.

    log-softmax leaves log-probabilities as they are, so cross-entropy of them is the same
    function of theta, and J^T (diag p - p p^T) J the same with J of the scores before it.

    Raises:
        NotAvailableError: an NLL whose outputs are no log-probabilities.
    """
    if not loss_terms.is_any(loss, nn.NLLLoss, F.nll_loss):
        return loss
    apart = float(outputs.detach().double().logsumexp(1).abs().max())
    ensure_available(
        apart <= _ROUNDINGS * torch.finfo(outputs.dtype).eps * outputs.shape[1],
        "model",
        "end in a log-softmax for an NLL's Gauss-Newton matrix",
        f"outputs whose log-sum-exp reaches {apart:.3g}",
        "Use matrix='hessian'.",
    )
    names = ("weight", "ignore_index", "reduction")
    settings = {name: loss_terms.keyword(loss, name) for name in names}
    return partial(F.cross_entropy, **{k: v for k, v in settings.items() if v is not None})


def sampled_targets(
    loss: Any, pairs: Iterable[tuple[Tensor, Tensor]], seed: int, before: int = 0
) -> Iterator[Tensor]:
    """Targets drawn from the distribution whose -log is the loss, for every chunk.

    Args:
        loss: a cross-entropy, an NLL, a binary cross-entropy on logits (each without
            weights or smoothing) or a squared error, whose density is a Gaussian of
            variance 1/2.
        pairs: (outputs, targets) of the chunks, in order; ignored targets stay so.
        seed: of the draws, which do not depend on how the data are cut.
        before: how many draws are other processes', whose data come first.
    """
    _check_distribution(loss)
    generator = _tensors.seeded(seed)
    for start in range(0, before, _STRETCH):
        num = min(_STRETCH, before - start)
        torch.rand(num, generator=generator, dtype=torch.float64)
    for outputs, targets in pairs:
        of_class = loss_terms.is_class_loss(loss)
        shape = outputs.select(1, 0).shape if of_class else outputs.shape
        # One uniform number each, so that the sequence is the same in chunks of any size.
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        yield _drawn(loss, outputs.detach(), targets, uniform.to(outputs.device))


def num_draws(loss: Any, targets: Tensor) -> int:
    """How many numbers `sampled_targets` draws for a chunk, by its targets."""
    of_class = loss_terms.is_class_loss(loss) and targets.is_floating_point()
    return (targets.select(1, 0) if of_class else targets).numel()


def _drawn(loss: Any, outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
    if loss_terms.is_class_loss(loss):
        # NLL takes log-probabilities, which softmax leaves as they are.
        below = outputs.double().softmax(1).cumsum(1)[:, :-1] < uniform.unsqueeze(1)
        drawn = below.sum(1)
        if targets.is_floating_point():
            return drawn
        ignored: int = loss_terms.keyword(loss, "ignore_index", -100)
        return torch.where(targets == ignored, _IGNORED, drawn)
    if loss_terms.is_any(loss, *_SQUARED):
        noise: Tensor = torch.special.ndtri(uniform)
        return outputs + noise.mul(0.5**0.5).to(outputs.dtype)
    return (uniform < outputs.double().sigmoid()).to(outputs.dtype)


def _check_distribution(loss: Any) -> None:
    binary = (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)
    known = loss_terms.is_class_loss(loss) or loss_terms.is_any(loss, *_SQUARED, *binary)
    changed = [
        name
        for name in ("weight", "pos_weight", "label_smoothing")
        if isinstance(loss_terms.keyword(loss, name, 0), Tensor)
        or loss_terms.keyword(loss, name) not in (None, 0)
    ]
    ensure(
        known and not changed,
        "loss",
        "be the -log of a density to sample targets from (cross-entropy, NLL, binary "
        "cross-entropy on logits, squared error)",
        changed[0] + " set" if changed else type(loss).__name__,
        "Use matrix='gauss_newton' or 'empirical_fisher'.",
    )
