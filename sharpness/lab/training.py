"""What is trained, and for how long: plain values, checked when they are made.

Readable without PyTorch; a field's help text is that of the flag `train` has for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sharpness._arguments import (
    Checked,
    at_least,
    known,
    positive,
    require,
    setting,
    whole,
)
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
_COUNT, _SOME = partial(whole, least=1), partial(at_least, least=0)
_SCALING = partial(known, names=get_args(Scaling), contract="be none, linear or sqrt")
_IMPROVED = 1e-3  # a smaller relative fall of the loss is no improvement


@dataclass(frozen=True, kw_only=True)
class Training(Checked):
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
    batch_size: int = field(metadata={"check": _COUNT})
    seed: int = 0
    optimizer: str = setting(
        "adam", f"with commas: {', '.join(OPTIMIZERS)}", partial(known, names=OPTIMIZERS)
    )
    learning_rate: float = setting(1e-3, f"with commas (default: {_RATES})", positive)
    momentum: float = setting(0.9, "of momentum and nesterov", _SOME)
    weight_decay: float = setting(0.0, "added to gradients, times the parameters", _SOME)
    scaling: Literal["none", "linear", "sqrt"] = setting(
        "none", "of the rate with the batch size: none, linear, sqrt", _SCALING
    )
    base_batch_size: int = setting(
        256, "that the learning rate is meant for; 1: a rate per sample", _COUNT
    )
    schedule: str = setting(
        "constant", f"{', '.join(SCHEDULES)}; ?drops=(epochs,...)&warmup=epochs"
    )
    regime_adaptation: bool = setting(
        False, "as many updates for every batch size: epochs and schedule grow with it"
    )
    clip_norm: float | None = setting(None, "longest gradient (default, 0: any)", positive)
    ghost_batch_size: int | None = setting(
        None,
        "samples of BatchNorm's statistics (default, 0: the whole batch)",
        partial(whole, least=2),
    )
    augmentation: str = setting("none", ", ".join(named.AUGMENTATIONS))
    remedy: str = setting("none", f"with commas: {', '.join(named.REMEDIES)}")
    start_from: str | None = setting(
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
        super().__post_init__()
        require(whole("seed", self.seed, 0) < 2**63, "seed", "be below 2^63", self.seed)
        require(self.momentum < 1, "momentum", "be below 1", self.momentum)
        require(
            self.momentum > 0 or self.optimizer != "nesterov",
            "momentum",
            "be above 0 for nesterov",
            self.momentum,
        )
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
class StoppingCriteria(Checked):
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

    epochs: float | None = setting(
        None,
        "(default: the regime's; else 40 from 10 %% of the training set on, and 20)",
        positive,
    )
    updates: int | None = setting(
        None, "stop after so many updates, whatever the batch size", _COUNT
    )
    until_loss: float | None = setting(None, "stop earlier, at this training loss", _SOME)
    patience: int | None = setting(
        None, "stop earlier, after so many epochs no better", _COUNT
    )
    until_accuracy: float | None = setting(
        None, "stop earlier, at this training accuracy", positive
    )

    def __post_init__(self) -> None:
        """Refuse a budget of nothing."""
        require(
            self.epochs is not None or self.updates is not None,
            "epochs",
            "be given, or `updates`",
            self.epochs,
        )
        super().__post_init__()
        require(
            self.until_accuracy is None or self.until_accuracy <= 1,
            "until_accuracy",
            "be at most 1",
            self.until_accuracy,
        )

    def num_updates(self, course: Course) -> int:
        """The most updates it allows, at least one."""
        in_epochs = math.inf if self.epochs is None else course.num_updates(self.epochs)
        return int(max(1, min(in_epochs, self.updates or math.inf)))

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
