"""What is trained, and for how long: plain values, checked when they are made.

Readable without PyTorch; a field's help text is that of the flag `train` has for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sharpness._arguments import at_least, flag, known, positive, require, whole
from sharpness.lab import named
from sharpness.lab.named import from_spec
from sharpness.lab.schedules import SCHEDULES, Course, Scaling, Schedule, scaled_rate

if TYPE_CHECKING:
    from torch import Tensor

    from sharpness.lab.augment import Augmentation
    from sharpness.lab.remedies import Step

# Name: class in `torch.optim`, what it is called with, and a usual learning rate (Keras').
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "adam": ("Adam", {"fused": True}, 1e-3),
    "sgd": ("SGD", {"fused": True}, 1e-2),
    "momentum": ("SGD", {"fused": True}, 1e-2),
    "nesterov": ("SGD", {"fused": True, "nesterov": True}, 1e-2),
    "adagrad": ("Adagrad", {}, 1e-2),
}
_RATES = ", ".join(f"{rate:g} for {name}" for name, (*_, rate) in OPTIMIZERS.items())
_IMPROVED = 1e-3  # a smaller relative fall of the loss is no improvement


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training run is, apart from how long it goes on.

    The seed decides the starting point and the order of the samples. The start does not
    depend on the batch size: small and large batch leave from the same point. Names may
    carry arguments: `"ResNet-8?batchnorm=False"`, `"sam?rho=0.1"`,
    `"increase?drops=(60,120,160)&max_batch_size=5120"`.

    Args:
        network: one of `networks.NETWORKS`.
        batch_size: samples of the first update.
        seed: of the start, the order and all that is drawn on the way.
        optimizer: one of `OPTIMIZERS`.
        learning_rate: at a batch of `base_batch_size`, where `scaling` is not "none".
        momentum: of "momentum" and "nesterov", in [0, 1).
        weight_decay: added to the gradient of every parameter, as PyTorch does.
        scaling: of the rate with the batch size: "none", "linear" or "sqrt"; see
            `schedules.scaled_rate`.
        base_batch_size: 1 makes `learning_rate` one per sample (with "linear").
        schedule: one of `schedules.SCHEDULES`: drops and warm-up, in epochs.
        regime_adaptation: stretch the schedule's epochs by the batch size over
            `base_batch_size` (rounded up), so that a larger batch makes its drops after
            as many updates (Hoffer et al. 2017); see `stretch`.
        clip_norm: gradients longer than this are shortened to it; None for never.
        ghost_batch_size: samples that BatchNorm takes its statistics from.
        augmentation: one of `augment.AUGMENTATIONS`.
        remedy: one of `remedies.REMEDIES`.
        start_from: a checkpoint whose parameters and buffers are the starting point;
            its optimizer state is not taken over.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    network: str
    batch_size: int
    seed: int = 0
    optimizer: str = flag("adam", f"with commas: {', '.join(OPTIMIZERS)}")
    learning_rate: float = flag(1e-3, f"with commas (default: {_RATES})")
    momentum: float = flag(0.9, "of momentum and nesterov")
    weight_decay: float = flag(0.0, "added to gradients, times the parameters")
    scaling: Literal["none", "linear", "sqrt"] = flag(
        "none", "of the rate with the batch size: none, linear, sqrt"
    )
    base_batch_size: int = flag(
        256, "that the learning rate is meant for; 1: a rate per sample"
    )
    schedule: str = flag(
        "constant", f"{', '.join(SCHEDULES)}; ?drops=(epochs,...)&warmup=epochs"
    )
    regime_adaptation: bool = flag(
        False, "as many updates for every batch size: epochs and schedule grow with it"
    )
    clip_norm: float | None = flag(None, "longest gradient (default, 0: any)")
    ghost_batch_size: int | None = flag(
        None, "samples of BatchNorm's statistics (default, 0: the whole batch)"
    )
    augmentation: str = flag("none", ", ".join(named.AUGMENTATIONS))
    remedy: str = flag("none", f"with commas: {', '.join(named.REMEDIES)}")
    start_from: str | None = flag(
        None, "with commas: checkpoints whose parameters to start from"
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        from sharpness.lab.networks import initialisation_of

        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # as a grid in NumPy gives them
                object.__setattr__(self, name, value.item())
        require(isinstance(self.network, str), "network", "be a name", self.network)
        initialisation_of(named.parsed(self.network)[0])  # a known name
        whole("batch_size", self.batch_size, 1)
        require(whole("seed", self.seed, 0) < 2**63, "seed", "be below 2^63", self.seed)
        known("optimizer", self.optimizer, OPTIMIZERS)
        positive("learning_rate", self.learning_rate)
        momentum = at_least("momentum", self.momentum, 0)
        require(momentum < 1, "momentum", "be below 1", momentum)
        some = momentum > 0 or self.optimizer != "nesterov"
        require(some, "momentum", "be above 0 for nesterov", momentum)
        at_least("weight_decay", self.weight_decay, 0)
        known("scaling", self.scaling, get_args(Scaling), "be none, linear or sqrt")
        whole("base_batch_size", self.base_batch_size, 1)
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)
        if self.ghost_batch_size is not None:
            whole("ghost_batch_size", self.ghost_batch_size, 2)
        _ = self.laid_out, self.augmented, self.update_with

    @property
    def stretch(self) -> int:
        """By how much regime adaptation lengthens the schedule; so should the budget."""
        return -(-self.batch_size // self.base_batch_size) if self.regime_adaptation else 1

    @cached_property
    def laid_out(self) -> Schedule:
        """The schedule by its name, stretched."""
        return from_spec("schedule", self.schedule, SCHEDULES).stretched(self.stretch)

    @cached_property
    def augmented(self) -> Augmentation | None:
        """The augmentation by its name; None for none."""
        from sharpness.lab.augment import AUGMENTATIONS

        return from_spec("augmentation", self.augmentation, AUGMENTATIONS)

    @cached_property
    def update_with(self) -> Callable[[Step], Tensor]:
        """The remedy by its name."""
        from sharpness.lab.remedies import REMEDIES

        return from_spec("remedy", self.remedy, REMEDIES)

    def course(self, num_train: int) -> Course:
        """Batch size and learning rate of every update.

        Raises:
            ValueError: a batch larger than the training set.
        """
        return Course(
            self.laid_out,
            batch_size=self.batch_size,
            learning_rate=scaled_rate(
                self.learning_rate, self.batch_size, self.base_batch_size, self.scaling
            ),
            num_train=num_train,
        )


@dataclass(frozen=True, kw_only=True)
class StoppingCriteria:
    """When to stop: whatever comes first.

    Args:
        epochs: passes over the training set, whole or not.
        updates: a number of updates: with equal `updates` a run with a larger batch sees
            more epochs (regime adaptation, Hoffer et al. 2017).
        until_loss: the training loss f that is enough: of the whole training set,
            BatchNorm on batch statistics, dropout off, looked at after each epoch.
        until_accuracy: the training accuracy in (0, 1] that is enough, looked at likewise.
        patience: so many epochs together, the best of which is no improvement (by 0.1 %)
            on the best before them, measured by their mean losses, are the end: "until
            the loss ceases to improve" (Keskar et al. 2017).

    Raises:
        ValueError: neither epochs nor updates, or a number out of range.
    """

    epochs: float | None = flag(
        None,
        "(default: the regime's; else 40 from 10 %% of the training set on, and 20)",
    )
    updates: int | None = flag(None, "stop after so many updates, whatever the batch size")
    until_loss: float | None = flag(None, "stop earlier, at this training loss")
    patience: int | None = flag(None, "stop earlier, after so many epochs no better")
    until_accuracy: float | None = flag(None, "stop earlier, at this training accuracy")

    def __post_init__(self) -> None:
        """Refuse a budget of nothing."""
        limited = self.epochs is not None or self.updates is not None
        require(limited, "epochs", "be given, or `updates`", self.epochs)
        if self.epochs is not None:
            positive("epochs", self.epochs)
        if self.updates is not None:
            whole("updates", self.updates, 1)
        if self.until_loss is not None:
            at_least("until_loss", self.until_loss, 0)
        if self.until_accuracy is not None:
            accuracy = positive("until_accuracy", self.until_accuracy)
            require(accuracy <= 1, "until_accuracy", "be at most 1", accuracy)
        if self.patience is not None:
            whole("patience", self.patience, 1)

    def num_updates(self, course: Course) -> int:
        """The most updates it allows, at least one."""
        in_epochs = math.inf if self.epochs is None else course.num_updates(self.epochs)
        return int(
            max(1, min(in_epochs, math.inf if self.updates is None else self.updates))
        )

    def out_of_patience(self, history: list[float]) -> bool:
        """Whether the last epochs brought no improvement."""
        if self.patience is None or len(history) <= self.patience:
            return False
        before, since = history[: -self.patience], history[-self.patience :]
        return min(since) >= (1 - _IMPROVED) * min(before)


def default_batch_sizes(num_train: int) -> tuple[int, int]:
    """(small, large): 256, or 32 below 10 000 samples; and 10 % of the training set.

    Keskar et al. (2017) used 256 against 6000 of MNIST's 60 000. On a small set 256
    would be nearly the large batch, so it shrinks: 32 against 400 of 4000 keeps a
    ratio of 12.5 where the paper has 23.
    """
    return (256 if num_train >= 10_000 else 32), max(2, num_train // 10)
