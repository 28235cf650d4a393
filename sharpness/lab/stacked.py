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
from sharpness._arguments import whole
from sharpness.checkpoint import Checkpoint
from sharpness.lab.data import Dataset
from sharpness.lab.run import OnEpoch, TrainingRun, at_work_on, one_epoch, optimizer_for
from sharpness.lab.training import StoppingCriteria, Training


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
    if keep_every is not None:
        whole("keep_every", keep_every, 1, "None keeps the last one alone.")
    if not can_be_stacked(trainings, budget):
        raise ValueError(
            "`trainings` must differ in their seed alone, without remedy, augmentation, "
            "clipping, ghost batches or a budget by loss, to be stacked; got others. Train "
            "them one by one."
        )
    with at_work_on(paths):
        runs = [
            TrainingRun(training, dataset, path, torch.device(device))
            for training, path in zip(trainings, paths, strict=True)
        ]
        _check(runs)
        stack = Stack(runs)
        with runs[0].own_generators():
            while not runs[0].is_over(budget):
                one_epoch(runs, stack.one_update, budget.num_updates(runs[0].course))
                epoch = runs[0].epoch
                if keep_every and runs[0].epoch_ended and epoch % keep_every == 0:
                    for run in runs:
                        run.save(finished=True, epoch=epoch)
                on_epoch(epoch, sum(run.mean_loss() for run in runs) / len(runs))
            for run in runs:
                if not run.finished:
                    run.save(finished=True)
    return [checkpoint.load(path) for path in paths]


def can_be_stacked(trainings: Sequence[Training], budget: StoppingCriteria) -> bool:
    """Whether they differ in the seed alone, and each would do what it does alone.

    Augmentation (as dropout, which only the network tells) would draw other numbers;
    clipping and remedies take norms over all parameters of one network; a budget by loss
    or accuracy ends each run at another update.
    """
    first = replace(trainings[0], seed=0)
    alike = all(replace(training, seed=0) == first for training in trainings)
    plain = first.remedy == "none" and first.augmentation == "none"
    plain = plain and first.clip_norm is None and first.ghost_batch_size is None
    asked = (budget.until_loss, budget.until_accuracy, budget.patience)
    return alike and plain and not any(one is not None for one in asked)


def _check(runs: Sequence[TrainingRun]) -> None:
    if any(isinstance(m, nn.modules.dropout._DropoutNd) for m in runs[0].model.modules()):
        raise ValueError(
            "`trainings` must be of a network without dropout to be stacked; got "
            f"{runs[0].network['name']}. Train them one by one."
        )
    updates = sorted({run.update for run in runs})
    if len(updates) > 1:
        raise ValueError(
            "`paths` must hold checkpoints of the same update to be stacked; got updates "
            f"{updates[0]} to {updates[-1]}. Train them one by one."
        )


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
        """The next update of every run."""
        first = self.runs[0]
        batch_size, rate = first.course.at(first.update)
        for optimizer in (self.optimizer, *(run.optimizer for run in self.runs)):
            for group in optimizer.param_groups:
                group["lr"] = rate
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
        criterion = self.runs[0].criterion

        def of_one(
            parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor
        ) -> Tensor:
            outputs = functional_call(self.model, (parameters, buffers), (x,))
            return criterion(outputs, y)

        found: Tensor = vmap(of_one)(self.parameters, self.buffers, x, y)
        return found

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
    """Moments are stacked; the count of steps is one for all."""
    first = values[0]
    moments = (
        isinstance(first, Tensor) and first.shape == parameter.shape[1:] and first.ndim
    )
    return torch.stack(list(values)) if moments else first


def _at(model: nn.Module, name: str) -> Any:
    """A parameter or buffer by its dotted name."""
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)
