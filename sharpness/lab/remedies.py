"""What is done to a batch's gradient before, or instead of, a plain update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sharpness._arguments import (
    Checked,
    at_least,
    ensure,
    positive,
    require,
    setting,
    whole,
)
from sharpness.risk.model_state import held

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One batch, and what an update with it needs."""

    model: nn.Module
    loss: Loss  # (outputs, targets) -> mean
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor
    clip_norm: float | None = None

    @property
    def parameters(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of the parameters that are trained."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def gradient(self, inputs: Tensor | None = None, weight: float = 1.0) -> Tensor:
        """Add `weight` times the gradient to `.grad`; returns the batch's loss."""
        outputs = self.model(self.inputs if inputs is None else inputs)
        loss = self.loss(outputs, self.targets)
        (loss if weight == 1 else weight * loss).backward()
        return loss.detach()

    def update(self) -> None:
        """Move the parameters along `.grad`."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_([p for _, p in self.parameters], self.clip_norm)
        self.optimizer.step()


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The optimizer's own update. One gradient."""

    def __call__(self, step: Step) -> Tensor:
        """Make one update; returns the loss () of the batch before it."""
        step.optimizer.zero_grad()
        loss = step.gradient()
        step.update()
        return loss


@dataclass(frozen=True, kw_only=True)
class Conservative(Checked):
    r"""Conservative training: a proximal step on each batch (Li et al. 2014).

    $$x_{k+1} \approx \arg\min_x f_B(x) + \frac{\lambda}{2} \|x - x_k\|^2$$

    by `inner_steps` iterations of the optimizer on the same batch. Keskar et al. (2017,
    Appendix E) had lambda = 1e-3 and 3 iterations of Adam; whether Adam's moments are
    kept from batch to batch they do not say (here they are). The running averages of
    BatchNorm move with the first iteration alone. `inner_steps` gradients an update.
    """

    strength: float = setting(1e-3, check=partial(at_least, least=0))  # lambda
    inner_steps: int = setting(3, check=partial(whole, least=1))

    def __call__(self, step: Step) -> Tensor:
        """Make one proximal step; returns the loss () of the batch before it."""
        anchors = [(p, p.detach().clone()) for _, p in step.parameters]
        first = Plain()(step)  # at the anchor the proximal term has no gradient
        with frozen_averages(step.model):
            for _ in range(self.inner_steps - 1):
                step.optimizer.zero_grad()
                step.gradient()
                for p, anchor in anchors:
                    if p.grad is not None:
                        p.grad.add_(p.detach() - anchor, alpha=self.strength)
                step.update()
        return first


@dataclass(frozen=True, kw_only=True)
class Adversarial(Checked):
    r"""Adversarial training by the fast gradient sign method (Goodfellow et al. 2014).

    $$(1 - s) f(x) + s f(x + \epsilon\, \mathrm{sign} \nabla_x f(x))$$

    arXiv:1412.6572 with s = 1/2; its epsilon for MNIST, 0.25, is the default. Keskar et
    al. (2017) do not say theirs. Inputs are not clipped to [0, 1]. The running averages
    of BatchNorm see the clean batch alone. Two gradients an update.
    """

    epsilon: float = setting(0.25, check=positive)
    share: float = setting(0.5, check=positive)

    def __post_init__(self) -> None:
        """Refuse what is no adversary."""
        super().__post_init__()
        require(self.share < 1, "share", "be below 1", self.share)

    def __call__(self, step: Step) -> Tensor:
        """Make one update; returns the loss () of the clean batch before it."""
        ensure(
            step.inputs.is_floating_point(),
            "remedy",
            "fit the data: 'adversarial' moves inputs that are real numbers",
            str(step.inputs.dtype),
        )
        step.optimizer.zero_grad()
        clean = step.inputs.detach().requires_grad_()
        loss = step.gradient(clean, 1 - self.share)
        moved = clean.detach()
        if clean.grad is not None:  # of a network that looks at its input
            moved = moved + self.epsilon * clean.grad.sign()
        with frozen_averages(step.model):
            step.gradient(moved, self.share)
        step.update()
        return loss


@dataclass(frozen=True, kw_only=True)
class SAM(Checked):
    r"""Sharpness-aware minimisation (Foret et al. 2021, arXiv:2010.01412).

    The gradient is taken at $w + \rho g / \|g\|_2$, with g the batch's gradient over all
    parameters; rho = 0.05 is the authors'. The running averages of BatchNorm move with
    the first gradient alone; weight decay and clipping act on the second. Two gradients
    an update.
    """

    rho: float = setting(0.05, check=positive)

    def __call__(self, step: Step) -> Tensor:
        """Make one update; returns the loss () of the batch before it."""
        step.optimizer.zero_grad()
        loss = step.gradient()
        moving = [(n, p, p.grad) for n, p in step.parameters if p.grad is not None]
        here = [(p, p.detach().clone()) for _, p, _ in moving]
        with torch.no_grad():
            scales = [self.scale(name, p) for name, p, _ in moving]
            scaled = [s * g for s, (*_, g) in zip(scales, moving, strict=True)]
            for (p, _), s, direction in zip(here, scales, _unit(scaled), strict=True):
                p.add_(s * direction, alpha=self.rho)
        try:
            step.optimizer.zero_grad()
            with frozen_averages(step.model):
                step.gradient()
        finally:
            with torch.no_grad():
                for p, before in here:
                    p.copy_(before)
        step.update()
        return loss

    def scale(self, name: str, parameter: Tensor) -> Tensor | float:
        """The operator T that stretches the ball along each parameter."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class ASAM(SAM):
    r"""Adaptive SAM (Kwon et al. 2021, arXiv:2102.11600), element-wise.

    The gradient is taken at $w + \rho\, T^2 g / \|T g\|_2$. As in the authors' code
    T = |w| + eta, eta = 0.01, for parameters called "weight" (so also BatchNorm's), and
    1 for the others; rho = 0.5 is theirs for CIFAR-10, 1.0 for CIFAR-100.
    """

    rho: float = setting(0.5, check=positive)
    eta: float = setting(0.01, check=partial(at_least, least=0))

    def scale(self, name: str, parameter: Tensor) -> Tensor | float:
        """|w| + eta for weights, 1 for everything else."""
        return parameter.abs() + self.eta if "weight" in name else 1.0


REMEDIES: dict[str, Callable[..., Callable[[Step], Tensor]]] = {
    "none": Plain,
    "conservative": Conservative,
    "adversarial": Adversarial,
    "sam": SAM,
    "asam": ASAM,
}


def frozen_averages(model: nn.Module) -> AbstractContextManager[None]:
    """BatchNorm normalises with batch statistics, but its running averages stay."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return held([(m, "track_running_stats", False) for m in norms])


def _unit(vectors: list[Tensor]) -> list[Tensor]:
    """Divide tensors by the l2 norm of all of them together; zeros stay zeros."""
    if not vectors:
        return []
    # Squares of a saturated network's gradient underflow; those of its shape do not.
    largest = torch.stack([v.abs().max() for v in vectors if v.numel()]).max()
    shapes = [v / largest.clamp_min(torch.finfo(v.dtype).tiny) for v in vectors]
    norms = [torch.linalg.vector_norm(shape) for shape in shapes]
    norm = torch.linalg.vector_norm(torch.stack(norms)).clamp_min(1)  # one entry is 1
    return [shape / norm for shape in shapes]
