"""A plain training loop: from one start, with one batch size, to one checkpoint."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpness import checkpoint
from sharpness.checkpoint import Checkpoint
from sharpness.lab import networks
from sharpness.lab.data import Dataset
from sharpness.risk.empirical import EmpiricalRisk

INITIALISATION = "glorot_uniform"
_SAVE_EVERY = 20.0  # seconds of work a kill may cost


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training run is, apart from how long it goes on.

    The seed decides the starting point and the order of the samples. The start does not
    depend on the batch size: small and large batch leave from the same point.
    """

    network: str
    batch_size: int
    seed: int = 0
    learning_rate: float = 1e-3
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.batch_size < 2:
            raise ValueError(
                f"`batch_size` must be at least 2; got {self.batch_size}. BatchNorm "
                "needs two samples for a variance."
            )
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive; got {self.learning_rate}.")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When to stop: after `epochs`, or once f on the training set is `until_loss`.

    The training loss is that of the whole training set, BatchNorm on batch statistics,
    dropout off, looked at after each epoch.
    """

    epochs: int
    until_loss: float | None = None

    def __post_init__(self) -> None:
        """Refuse a budget of nothing."""
        if self.epochs < 1:
            raise ValueError(f"`epochs` must be at least 1; got {self.epochs}.")

    def spent(self, epoch: int, loss: float | None) -> bool:
        """Whether a run that stands after `epoch` epochs at `loss` is over."""
        reached = loss is not None and self.until_loss is not None
        return epoch >= self.epochs or (reached and loss <= self.until_loss)  # type: ignore[operator]


def default_batch_sizes(num_train: int) -> tuple[int, int]:
    """(small, large): 256, or 32 below 10 000 samples; and 10 % of the training set.

    Keskar et al. (2017) used 256 against 6000 of MNIST's 60 000. On a small set 256
    would be nearly the large batch, so it shrinks: 32 against 400 of 4000 keeps a
    ratio of 12.5 where the paper has 23.
    """
    return (256 if num_train >= 10_000 else 32), max(2, num_train // 10)


def train(
    training: Training,
    budget: Budget,
    dataset: Dataset,
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Checkpoint:
    """Train until the budget is spent, and leave a checkpoint at `path`.

    A checkpoint of the same training that stands there already is carried on from its
    last saved epoch, or returned as it is when its budget is spent. The order of the
    samples depends on seed and epoch alone, so a run that was killed ends with the same
    bits as one that was not (on one device, with one number of threads).

    Args:
        training: what to train; see `Training`.
        budget: when to stop; a longer budget carries a finished run on.
        dataset: images and labels.
        path: where the checkpoint goes, `.pt` or `.safetensors`.
        device: where to compute.
        on_epoch: called with the epochs done and the mean loss of the last one.

    Raises:
        ValueError: `path` holds a checkpoint of another training, or the loss is no
            longer finite.
    """
    run = _Run(training, dataset, Path(path), torch.device(device))
    while not run.is_over(budget):
        loss = run.epoch_of_updates()
        on_epoch(run.epoch, loss)
        if time.monotonic() - run.saved_at > _SAVE_EVERY:
            run.save(finished=False)
    if not run.finished:
        run.save(finished=True)
    return checkpoint.load(path)


class _Run:
    """The state of one training run between epochs."""

    def __init__(
        self, training: Training, dataset: Dataset, path: Path, device: torch.device
    ) -> None:
        self.training, self.dataset, self.path = training, dataset, path
        self.device = device
        x, y = dataset.train
        self.x, self.y = x.to(device), y.to(device)
        self.network = {
            "name": training.network,
            "arguments": networks.arguments_for(
                training.network, x.shape[1:], dataset.num_classes
            ),
        }
        self.model = networks.build(self.network)
        networks.initialise(self.model, training.seed)
        self.start = {"seed": training.seed, "sha256": networks.digest(self.model)}
        self.model.to(device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=training.learning_rate, fused=True
        )
        self.epoch, self.seconds, self.finished = 0, 0.0, False
        self.history: list[float] = []
        self.loss: float | None = None
        self.saved_at = time.monotonic()
        if path.exists():
            self._carry_on(checkpoint.load(path))

    def is_over(self, budget: Budget) -> bool:
        if budget.until_loss is not None and self.epoch and self.loss is None:
            self.loss = self._risk(self.dataset.train, "batch").value()
        return budget.spent(self.epoch, self.loss)

    def epoch_of_updates(self) -> float:
        """One pass over the training set in a new order; the mean of its losses."""
        began = time.monotonic()
        self.model.train()
        seed = _epoch_seed(self.training.seed, self.epoch)
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        total = torch.zeros((), device=self.device)
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)  # dropout
            for index in order.to(self.device).split(self.training.batch_size):
                if len(index) > 1:  # one sample has no variance
                    total += self._update(index) * len(index)
        mean = float(total) / len(self.x)
        if not math.isfinite(mean):
            raise ValueError(
                f"`learning_rate` must keep the loss finite; got {mean} in epoch "
                f"{self.epoch + 1} (learning_rate={self.training.learning_rate}). "
                "Lower it."
            )
        self.epoch, self.loss, self.finished = self.epoch + 1, None, False
        self.history.append(mean)
        self.seconds += time.monotonic() - began
        return mean

    def _update(self, index: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        outputs = self.model(self.x[index])
        loss = nn.functional.cross_entropy(outputs, self.y[index])
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def save(self, *, finished: bool) -> None:
        self.finished = finished
        progress = {
            **asdict(self.training),
            "epoch": self.epoch,
            "finished": finished,
            "history": list(self.history),
            "seconds": self.seconds,
            "metrics": self._metrics() if finished else {},
            "num_threads": torch.get_num_threads(),
            "device": str(self.device),
            "initialisation": INITIALISATION,
            "torch": str(torch.__version__),
        }
        x, _ = self.dataset.train
        data = {
            "name": self.dataset.name,
            "num_train": len(x),
            "num_test": len(self.dataset.test[0]),
            "sha256": self.dataset.sha256,
        }
        saved = Checkpoint(
            state_dict=_on_cpu(self.model.state_dict()),
            network=self.network,
            data=data,
            training=progress,
            start=self.start,
            optimizer=_on_cpu(self.optimizer.state_dict()),
        )
        checkpoint.save(self.path, saved)
        self.saved_at = time.monotonic()

    def _metrics(self) -> dict[str, float]:
        """Loss and accuracies of the trained network, for both ways to run BatchNorm."""
        metrics = {}
        for mode in ("batch", "running"):
            train = self._risk(self.dataset.train, mode)
            test = self._risk(self.dataset.test, mode)
            metrics[f"train_loss_{mode}"] = train.value()
            metrics[f"train_accuracy_{mode}"] = train.accuracy()
            metrics[f"test_accuracy_{mode}"] = test.accuracy()
        return metrics

    def _risk(self, data: tuple[Tensor, Tensor], mode: Any) -> EmpiricalRisk:
        loss = nn.CrossEntropyLoss()
        return EmpiricalRisk(self.model, loss, data, batchnorm=mode, device=self.device)

    def _carry_on(self, saved: Checkpoint) -> None:
        ours = {**asdict(self.training), "start": self.start["sha256"]}
        ours |= {"data": self.dataset.sha256, "device": str(self.device)}
        theirs = {name: saved.training.get(name) for name in asdict(self.training)}
        theirs |= {"start": saved.start.get("sha256"), "data": saved.data.get("sha256")}
        theirs |= {"device": saved.training.get("device")}
        different = [name for name in ours if ours[name] != theirs[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"`{self.path}` must hold a checkpoint of the same training to be "
                f"carried on; got {name}={theirs[name]!r} (asked for {ours[name]!r}). "
                "Choose another output folder, or delete the file."
            )
        self.model.load_state_dict(saved.state_dict)
        self.optimizer.load_state_dict(saved.optimizer)
        self.epoch = int(saved.training["epoch"])
        self.history = list(saved.training["history"])
        self.seconds = float(saved.training["seconds"])
        self.finished = bool(saved.training["finished"])


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _on_cpu(value: Any) -> Any:
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(item) for item in value]
    return value
