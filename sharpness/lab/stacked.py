"""Runs that differ in their seed alone, trained together as one stacked model.

A small network leaves a GPU idle between its kernels; with S seeds stacked, each kernel
does the work of S. The runs stay runs: each owns views into the stacked tensors, so it is
saved, carried on and evaluated as if it had been trained alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from sharpness import checkpoint
from sharpness._arguments import ensure
from sharpness.checkpoint import Checkpoint
from sharpness.lab.data import Dataset
from sharpness.lab.run import OnEpoch, TrainingRun, at_work_on, carry_out, optimizer_for
from sharpness.lab.training import StoppingCriteria, Training

_APART = "Train them one by one."


def train_together(
    trainings: Sequence[Training],
    budget: StoppingCriteria,
    dataset: Dataset,
    paths: Sequence[Path],
    *,
    device: str | torch.device = "cpu",
    keep_every: int | None = None,
    on_epoch: OnEpoch = lambda epoch, loss: None,
) -> list[Checkpoint]:
    """`run.train` for several seeds at once, each to a checkpoint of its own.

    The losses agree with those of single runs to rounding, which Adam, dividing by the
    size of a gradient that is itself rounding, makes visible after some updates. Killed
    and started again it ends with the same bits, as a single run does; killed between
    the saves of two of its runs, they stand at different updates and are refused.

    Args:
        trainings: that differ in their seed alone; see `can_be_stacked`.
        budget: of epochs or updates, the same for all.
        dataset: as in `run.train`.
        paths: of the checkpoints, in order.
        device: as in `run.train`.
        keep_every: as in `run.train`.
        on_epoch: called with the epochs done and the mean loss over all runs.

    Raises:
        ValueError: trainings or a budget that cannot be stacked, checkpoints that stand
            at different updates, or what `run.train` refuses.
    """
    ensure(
        can_be_stacked(trainings, budget),
        "trainings",
        "differ in their seed alone, without remedy, augmentation, clipping, ghost batches "
        "or a budget by loss, to be stacked",
        "others",
        _APART,
    )
    with at_work_on(paths, keep_every):
        runs = [
            TrainingRun(training, dataset, path, torch.device(device))
            for training, path in zip(trainings, paths, strict=True)
        ]
        _check(runs)
        stack = Stack(runs)
        with runs[0].own_generators():
            carry_out(runs, stack.one_update, budget, keep_every, on_epoch)
    return [checkpoint.load(path) for path in paths]


def can_be_stacked(trainings: Sequence[Training], budget: StoppingCriteria) -> bool:
    """Whether they differ in the seed alone, and each would do what it does alone.

    Augmentation (as dropout, which only the network tells) would draw other numbers;
    clipping and remedies take norms over all parameters of one network; a budget by loss
    or accuracy ends each run at another update.
    """
    first = replace(trainings[0], seed=0)
    alike = all(replace(training, seed=0) == first for training in trainings)
    plain = first.remedy == "none" == first.augmentation
    asked = (budget.until_loss, budget.until_accuracy, budget.patience)
    others = (first.clip_norm, first.ghost_batch_size, *asked)
    return alike and plain and all(other is None for other in others)


def _check(runs: Sequence[TrainingRun]) -> None:
    kind, updates = nn.modules.dropout._DropoutNd, sorted({run.update for run in runs})
    plain = not any(isinstance(module, kind) for module in runs[0].model.modules())
    contract = "be of a network without dropout to be stacked"
    got = str(runs[0].network["name"])
    ensure(plain, "trainings", contract, got, _APART)
    contract = "hold checkpoints of the same update to be stacked"
    got = f"updates {updates[0]} to {updates[-1]}"
    ensure(len(updates) == 1, "paths", contract, got, _APART)


class Stack:
    """The joint state of runs that stand at the same update."""

    def __init__(self, runs: Sequence[TrainingRun]) -> None:
        self.runs = runs
        models = [run.model for run in runs]
        self.model = copy.deepcopy(models[0]).train()  # its tensors are never used
        self.parameters, self.buffers = stack_module_state(models)
        for tensors in (self.parameters, self.buffers):
            for name, stacked in tensors.items():
                for model, own in zip(models, stacked.detach().unbind(), strict=True):
                    _at(model, name).data = own
        self.optimizer = optimizer_for(runs[0].training, self.parameters.values())
        self._take_over_states()

    def one_update(self) -> None:
        """Make the next update of every run."""
        first = self.runs[0]
        batch_size, rate = first.course.at(first.update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for run in self.runs:
            run.set_rate()
        index = torch.stack([run.order.take(run.seen, batch_size) for run in self.runs])
        losses = self.losses(first.x[index], first.y[index])
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        if not first.update:
            self._share_states()  # the first step has made it
        for run, loss in zip(self.runs, losses.detach().unbind(), strict=True):
            run.count(loss, batch_size)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean losses (S,) of batches (S, B, ...)."""

        def of_one(state: tuple[dict[str, Tensor], ...], x: Tensor, y: Tensor) -> Tensor:
            return self.runs[0].criterion(functional_call(self.model, state, (x,)), y)

        return vmap(of_one)((self.parameters, self.buffers), x, y)

    def _share_states(self) -> None:
        """Let each run's optimizer hold views of its part of the stacked state."""
        for i, run in enumerate(self.runs):
            for name, stacked in self.parameters.items():
                state = self.optimizer.state[stacked]
                run.optimizer.state[_at(run.model, name)] = {
                    key: value[i] if value.shape == stacked.shape else value
                    for key, value in state.items()
                }

    def _take_over_states(self) -> None:
        """Stack the states of runs that were carried on."""
        for name, stacked in self.parameters.items():
            states = [run.optimizer.state[_at(run.model, name)] for run in self.runs]
            self.optimizer.state[stacked] = {
                key: _stacked([state[key] for state in states], stacked)
                for key in states[0]
            }
        if self.runs[0].update:
            self._share_states()


def _stacked(values: Sequence[Any], parameter: Tensor) -> Any:
    """Stack moments; the count of steps is the same for all."""
    shape = getattr(values[0], "shape", ())
    moments = len(shape) and shape == parameter.shape[1:]
    return torch.stack(list(values)) if moments else values[0]


def _at(model: nn.Module, name: str) -> Any:
    """A parameter or buffer by its dotted name."""
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)
