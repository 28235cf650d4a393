"""A training carried out: the loop, when it is over, and how a killed run goes on."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from sharpness import checkpoint
from sharpness._arguments import ensure, require, whole
from sharpness._json import as_plain
from sharpness.checkpoint import Checkpoint
from sharpness.lab import networks
from sharpness.lab.data import Dataset
from sharpness.lab.ghost import use_ghost_batches
from sharpness.lab.remedies import Loss, Step
from sharpness.lab.training import OPTIMIZERS, StoppingCriteria, Training
from sharpness.risk.empirical import EmpiricalRisk


class DivergedError(ValueError):
    """The loss or the parameters of a training are no longer finite."""


OnEpoch = Callable[[int, float], None]
OnUpdate = Callable[[int, nn.Module, torch.optim.Optimizer], None]
_SAVE_EVERY = 20.0  # seconds of work a kill may cost


def train(
    training: Training,
    budget: StoppingCriteria,
    dataset: Dataset,
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    keep_every: int | None = None,
    on_epoch: OnEpoch = lambda epoch, loss: None,
    on_update: OnUpdate = lambda update, model, optimizer: None,
) -> Checkpoint:
    """Train until the budget is spent, and leave a checkpoint at `path`.

    A checkpoint of the same training that stands there already is carried on from where
    it was saved, or returned as it is when its budget is spent. What a run draws follows
    from its seed and the state that is saved, so a run that was killed ends with the
    same bits as one that was not (on a CPU, with one number of threads). Two
    processes that are asked for the same `path` take turns.

    Args:
        training: what to train; see `Training`.
        budget: when to stop; a longer budget carries a finished run on.
        dataset: the training and test samples.
        path: where the checkpoint goes, `.pt` or `.safetensors`.
        device: where to compute; the data go there whole.
        keep_every: also keep the checkpoint of every so many epochs, as
            `STEM-epoch7.pt` beside `path`.
        on_epoch: called with the epochs done and the mean loss of the last one.
        on_update: called with the number of updates made, the model and its optimizer
            before the first update and after each; the rate is that of the next.

    Raises:
        ValueError: `path` holds a checkpoint of another training, the batch is larger
            than the training set, or `keep_every` is below 1.
        DivergedError: the loss or the parameters are no longer finite; what was saved
            before stays.
    """
    with at_work_on([Path(path)], keep_every):
        run = TrainingRun(training, dataset, Path(path), torch.device(device))

        def one_update() -> None:
            run.one_update()
            run.set_rate()
            on_update(run.update, run.model, run.optimizer)

        with run.own_generators():
            run.set_rate()
            if not run.update:
                on_update(0, run.model, run.optimizer)
            carry_out([run], one_update, budget, keep_every, on_epoch)
    return checkpoint.load(path)


def carry_out(
    runs: Sequence[TrainingRun],
    one_update: Callable[[], None],
    budget: StoppingCriteria,
    keep_every: int | None,
    on_epoch: OnEpoch,
) -> None:
    """Train runs in step until the budget is spent, and save each of them."""
    first = runs[0]
    for run in runs:
        run.check_kept(keep_every)
    while not first.is_over(budget):
        _one_epoch(runs, one_update, budget.num_updates(first.course))
        if keep_every and first.epoch_ended and first.epoch % keep_every == 0:
            for run in runs:
                run.save(finished=True, epoch=first.epoch)
        on_epoch(first.epoch, sum(run.mean_loss() for run in runs) / len(runs))
    for run in runs:
        if not run.finished:
            run.save(finished=True)


def _one_epoch(
    runs: Sequence[TrainingRun], one_update: Callable[[], None], last: int
) -> None:
    """Update runs in step until the epoch ends or update number `last` is made."""
    first = runs[0]
    end = first.course.num_updates(first.epoch + 1)
    for run in runs:
        run.begin()
    while first.update < min(end, last):
        if time.monotonic() - first.saved_at > _SAVE_EVERY:
            for run in runs:
                run.save(finished=False)
        one_update()
    for run in runs:
        run.pause(epoch_ended=first.update == end)


class TrainingRun:
    """The state of one training, from its start or from its checkpoint."""

    def __init__(
        self, training: Training, dataset: Dataset, path: Path, device: torch.device
    ) -> None:
        self.training, self.dataset, self.path = training, dataset, path
        self.device = device
        self._cuda = [device] if device.type == "cuda" else []
        x, y = dataset.train
        self.course = training.course(len(x))
        self.x, self.y = x.to(device), y.to(device)
        self._start()
        self.update, self.seen, self.seconds = 0, 0, 0.0
        self.losses: list[Tensor] = []  # of this run's updates, () or (several,) each
        self.epoch_begins = [0]  # number of each epoch's first update
        self.finished = False
        self.random = self._seeded()
        self.order = _Order(len(x), training.seed, device)
        self.saved_at = self.counted_at = time.monotonic()
        if path.exists():
            self._carry_on(checkpoint.load(path))

    def _start(self) -> None:
        """Build the network, its starting point and its optimizer."""
        self.network = networks.fitted(
            self.training.network, *self.dataset.train, self.dataset.num_classes
        )
        self.initialisation = networks.initialisation_of(self.network["name"])
        with torch.random.fork_rng(devices=[]):
            self.model = networks.build(self.network)
        networks.initialise(self.model, self.training.seed)
        if self.training.start_from is not None:
            _take_over(self.model, self.training.start_from)
        self.start = {
            "seed": self.training.seed,
            "sha256": networks.digest(self.model),
            "from": self.training.start_from,
        }
        self.model.to(self.device)
        normalises = any(isinstance(m, _BatchNorm) for m in self.model.modules())
        if self.training.ghost_batch_size is not None:
            use_ghost_batches(self.model, self.training.ghost_batch_size)
        given, contract = self.training.batch_size, "be at least 2 for BatchNorm"
        require(given > 1 or not normalises, "batch_size", contract, given)
        self.optimizer = optimizer_for(self.training, self.model.parameters())
        self.criterion: Loss = criterion_for(self.dataset)

    # -- where it stands -----------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Number of passes over the training set; a batch may reach into the next one."""
        return len(self.epoch_begins) - 1

    @property
    def epoch_ended(self) -> bool:
        """Whether the last update was the last of an epoch."""
        return self.epoch_begins[-1] == self.update

    @property
    def history(self) -> list[float]:
        """Mean loss of each epoch; the last may be part of one."""
        losses, ends = self._all_losses(), [*self.epoch_begins[1:], self.update]
        spans = zip(self.epoch_begins, ends, strict=True)
        return [float(losses[a:b].mean()) for a, b in spans if b > a]

    def check_kept(self, keep_every: int | None) -> None:
        """Refuse to keep checkpoints of epochs that are over: no epoch is trained twice."""
        first = self._kept(keep_every) if keep_every else self.path
        ensure(
            not keep_every or self.epoch < keep_every or first.exists(),
            "keep_every",
            "be given from the beginning of a run",
            f"{keep_every} for {self.path}, which has made {self.epoch} epochs and kept "
            "none",
            "Choose another output folder.",
        )

    def _kept(self, epoch: int) -> Path:
        return self.path.with_stem(f"{self.path.stem}-epoch{epoch}")

    def mean_loss(self) -> float:
        """Mean loss of the epoch that has just ended, or of the current one."""
        begins = [*self.epoch_begins, self.update]
        first = max(begin for begin in begins if begin < self.update)
        return float(self._all_losses()[first:].mean())

    def is_over(self, budget: StoppingCriteria) -> bool:
        """Whether the budget is spent; beside updates it is looked at after epochs."""
        if self.update >= budget.num_updates(self.course):
            return True
        if not self.update or not self.epoch_ended:
            return False
        if budget.patience is not None and budget.out_of_patience(self.history):
            return True
        accuracy, loss = budget.until_accuracy, budget.until_loss
        if accuracy is None and loss is None:
            return False
        risk = self._risk(self.dataset.train, "batch")
        enough = accuracy is not None and risk.accuracy() >= accuracy
        return enough or (loss is not None and risk.value() <= loss)

    # -- training ------------------------------------------------------------------------

    def begin(self) -> None:
        """Put the model in training mode before updates, and start the clock."""
        self.model.train()
        self.finished = False
        self.counted_at = time.monotonic()

    def one_update(self) -> None:
        """Make one update with the next batch, as the remedy does it."""
        batch_size = self.set_rate()
        index = self.order.take(self.seen, batch_size)
        step = Step(
            model=self.model,
            loss=self.criterion,
            optimizer=self.optimizer,
            inputs=(self.training.augmented or nn.Identity())(self.x[index]),
            targets=self.y[index],
            clip_norm=self.training.clip_norm,
        )
        self.count(self.training.update_with(step), batch_size)

    def set_rate(self) -> int:
        """Set the learning rate of the next update; returns its batch size."""
        batch_size, rate = self.course.at(self.update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return batch_size

    def count(self, loss: Tensor, batch_size: int) -> None:
        """Count an update and keep its loss ()."""
        self.losses.append(loss)
        self.update, self.seen = self.update + 1, self.seen + batch_size

    def pause(self, *, epoch_ended: bool) -> None:
        """Stop the clock after updates, and check that their losses are finite."""
        self._count_seconds()
        self._all_losses()
        if epoch_ended:
            self.epoch_begins.append(self.update)

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.seconds, self.counted_at = self.seconds + now - self.counted_at, now

    def _all_losses(self) -> Tensor:
        """The losses (updates,) so far, all finite."""
        if not self.losses:
            return torch.zeros(0)
        losses = torch.cat([loss.reshape(-1) for loss in self.losses])
        self.losses = [losses]
        bad = losses.isfinite().logical_not().nonzero().flatten().tolist()
        if bad:
            got = f"{float(losses[bad[0]])} in update {bad[0] + 1}"
            raise self._diverged("the loss", got)
        return losses

    def _check_parameters(self) -> None:
        """Check the parameters of the last update, which no loss has been computed with."""
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise self._diverged("parameters", f"{name} after update {self.update}")

    def _diverged(self, what: str, got: str) -> DivergedError:
        rate = self.course.at(max(0, self.update - 1))[1]
        return DivergedError(
            f"`learning_rate` must keep {what} finite; got {got} (at a rate of {rate:g}). "
            "Lower it."
        )

    # -- random numbers ------------------------------------------------------------------

    @contextmanager
    def own_generators(self) -> Iterator[None]:
        """Draws follow the run's seed; the caller's generators stay as they are."""
        with torch.random.fork_rng(devices=self._cuda):
            torch.set_rng_state(self.random["cpu"])
            for device in self._cuda:
                torch.cuda.set_rng_state(self.random["cuda"], device)
            yield

    def _seeded(self) -> dict[str, Tensor]:
        """States of the random generators before the first update."""
        kinds = {"cpu", *(device.type for device in self._cuda)}
        seed = _seed_of(self.training.seed, "draws")
        return {kind: torch.Generator(kind).manual_seed(seed).get_state() for kind in kinds}

    def _states_of_generators(self) -> dict[str, Tensor]:
        cuda = {gpu.type: torch.cuda.get_rng_state(gpu) for gpu in self._cuda}
        return {"cpu": torch.get_rng_state(), **cuda}

    # -- keeping -------------------------------------------------------------------------

    def save(self, *, finished: bool, epoch: int | None = None) -> None:
        """Write the checkpoint; with `epoch`, a separate one beside it."""
        self._count_seconds()
        self._check_parameters()
        path = self.path if epoch is None else self._kept(epoch)
        progress = {
            "losses": self._all_losses(),
            "seen": self.seen,
            "epoch_begins": list(self.epoch_begins),
            "generators": self._states_of_generators(),
        }
        saved = Checkpoint(
            state_dict=_on_cpu(dict(self.model.state_dict())),
            network=self.network,
            data={
                "name": self.dataset.name,
                "num_train": len(self.x),
                "num_test": len(self.dataset.test[0]),
                "sha256": self.dataset.sha256,
            },
            training=self._facts(finished),
            start=self.start,
            optimizer=_on_cpu(self.optimizer.state_dict()),
            progress=_on_cpu(progress),
        )
        checkpoint.save(path, saved)
        if epoch is None:
            self.finished, self.saved_at = finished, time.monotonic()
        self.counted_at = time.monotonic()  # saving and evaluating are not training

    def _facts(self, finished: bool) -> dict[str, Any]:
        return {
            **asdict(self.training),
            "epoch": self.epoch,
            "updates": self.update,
            "finished": finished,
            "history": self.history,
            "seconds": self.seconds,
            "metrics": self._metrics() if finished else {},
            "num_threads": torch.get_num_threads(),
            "device": str(self.device),
            "initialisation": self.initialisation,
            "torch": str(torch.__version__),
        }

    def _metrics(self) -> dict[str, float]:
        """Loss and accuracy on both splits, with batch and with running statistics."""
        metrics = {}
        splits = {"train": self.dataset.train, "test": self.dataset.test}
        for mode, (split, data) in itertools.product(("batch", "running"), splits.items()):
            risk = self._risk(data, mode)
            outputs, targets = risk.outputs(), risk.targets
            if self.dataset.num_classes is None:
                targets = targets.double()
            else:
                right = outputs.argmax(1) == targets
                metrics[f"{split}_accuracy_{mode}"] = float(right.double().mean())
            loss = self.criterion(outputs.double(), targets)
            metrics[f"{split}_loss_{mode}"] = float(loss)
        return metrics

    def _risk(self, data: tuple[Tensor, Tensor], mode: Any) -> EmpiricalRisk:
        return EmpiricalRisk(
            self.model,
            criterion_for(self.dataset),
            data,
            batchnorm=mode,
            device=self.device,
        )

    def _carry_on(self, saved: Checkpoint) -> None:
        ours = {
            **as_plain(asdict(self.training)),
            "start_from": None,  # wherever it lies now, its digest is the start's
            "start": self.start["sha256"],
            "data": self.dataset.sha256,
            "device": str(self.device),
            "progress": True,
        }
        theirs = {
            **as_plain(saved.training),
            "start_from": None,
            "start": saved.start.get("sha256"),
            "data": saved.data.get("sha256"),
            "progress": bool(saved.progress),
        }
        for name, asked in ours.items():
            ensure(
                asked == theirs.get(name),
                self.path,
                "hold a checkpoint of the same training to be carried on",
                f"{name}={theirs.get(name)!r} (asked for {asked!r})",
                "Choose another output folder, or delete the file.",
            )
        self.model.load_state_dict(saved.state_dict)
        self.optimizer.load_state_dict(saved.optimizer)
        self.update = int(saved.training["updates"])
        self.seconds = float(saved.training["seconds"])
        self.finished = bool(saved.training["finished"])
        self.losses = [saved.progress["losses"].to(self.device)]
        self.seen = int(saved.progress["seen"])
        self.epoch_begins = list(saved.progress["epoch_begins"])
        self.random = saved.progress["generators"]


class _Order:
    """The endless stream of samples: one random order of the training set an epoch."""

    def __init__(self, num_train: int, seed: int, device: torch.device) -> None:
        self.num_train, self.seed, self.device = num_train, seed, device
        self._epoch, self._indices = -1, torch.empty(0)

    def take(self, start: int, count: int) -> Tensor:
        """Indices (count,) of the samples from position `start` on."""
        epoch, offset = divmod(start, self.num_train)
        part = self._of(epoch)[offset : offset + count]
        if len(part) == count:
            return part
        return torch.cat([part, self._of(epoch + 1)[: count - len(part)]])

    def _of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_seed_of(self.seed, epoch))
            order = torch.randperm(self.num_train, generator=generator)
            self._epoch, self._indices = epoch, order.to(self.device)
        return self._indices


def optimizer_for(
    training: Training, parameters: Iterable[Tensor]
) -> torch.optim.Optimizer:
    """The optimizer of PyTorch; its learning rate is set before each update."""
    name, arguments, _ = OPTIMIZERS[training.optimizer]
    if training.optimizer in ("momentum", "nesterov"):
        arguments = {**arguments, "momentum": training.momentum}
    kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, name)
    return kind(
        parameters,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        **arguments,
    )


@contextmanager
def at_work_on(paths: Sequence[Path], keep_every: int | None) -> Iterator[None]:
    """Hold the locks of checkpoints; one process at a time writes each."""
    if keep_every is not None:
        whole("keep_every", keep_every, 1, "None keeps the last one alone.")
    with ExitStack() as locks:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
            checkpoint.remove_leftovers(path)
        yield


def criterion_for(dataset: Dataset) -> nn.Module:
    """The mean loss that is trained: squared error for numbers, else cross-entropy."""
    return nn.MSELoss() if dataset.num_classes is None else nn.CrossEntropyLoss()


def _take_over(model: nn.Module, path: str) -> None:
    """Load the parameters and buffers of another checkpoint."""
    try:
        model.load_state_dict(checkpoint.load(path).state_dict)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"`start_from` must hold parameters of the same network; got {path} ({first})."
        ) from None


def _seed_of(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _on_cpu(value: Any) -> Any:
    """A copy of nested dicts and lists with every tensor on the CPU."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), value)
