"""A checkpoint and a data set in, one measurement record out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from sharpness.checkpoint import Checkpoint
from sharpness.lab import networks
from sharpness.lab.data import Dataset, class_balanced
from sharpness.measures.eigenvalues import HessianEigenpairs, eigenpairs
from sharpness.measures.epsilon import EpsilonSharpness, epsilon_sharpness
from sharpness.record import new_record
from sharpness.results import Status
from sharpness.risk.checks import Checkup, doctor
from sharpness.risk.empirical import BatchNorm, EmpiricalRisk


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, on which samples, and how."""

    num_samples: int | None = 1000  # class-balanced, by `seed`; None means all
    split: Literal["train", "test"] = "train"
    batchnorm: BatchNorm = "running"
    k: int = 1
    tol: float = 1e-2
    epsilon: tuple[float, ...] = (1e-3, 5e-4)
    subspace_dim: int | None = None
    seed: int = 0
    max_seconds: float | None = None  # for each measure
    engine: str = "auto"
    doctor: bool = False  # check the risk first


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The results for one checkpoint, and the record that keeps them."""

    value: float  # f(theta)
    accuracy: float  # on the samples measured, in [0, 1]
    eigenpairs: HessianEigenpairs
    epsilon_sharpness: list[EpsilonSharpness]
    record: dict[str, Any]
    checkup: Checkup | None = None

    @property
    def statuses(self) -> list[Status]:
        """How each measure ended."""
        return [self.eigenpairs.status, *(e.status for e in self.epsilon_sharpness)]


def load_model(checkpoint: Checkpoint, path: str | Path) -> nn.Module:
    """The network of a checkpoint with its parameters, in evaluation mode.

    Raises:
        ValueError: the parameters are those of another network.
    """
    model = networks.build(checkpoint.network)
    ours, theirs = model.state_dict(), checkpoint.state_dict
    wrong = [
        name
        for name in {**ours, **theirs}
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]
    if wrong:
        raise ValueError(
            f"`{path}` must hold the parameters of {checkpoint.network['name']} "
            f"({checkpoint.network.get('arguments')}); got others: {len(wrong)} tensors "
            f"differ, first {wrong[0]}. Name the network it was trained with."
        )
    model.load_state_dict(theirs)
    return model.eval()


def samples(dataset: Dataset, settings: Settings) -> tuple[Tensor, Tensor]:
    """The images and labels that are measured."""
    x, y = dataset.train if settings.split == "train" else dataset.test
    if settings.num_samples is None or settings.num_samples == len(y):
        return x, y
    index = class_balanced(y, settings.num_samples, settings.seed)
    return x[index], y[index]


def risk_of(
    checkpoint: Checkpoint,
    path: str | Path,
    dataset: Dataset,
    settings: Settings,
    device: str = "cpu",
) -> EmpiricalRisk:
    """The mean cross-entropy of a checkpoint's network on the chosen samples."""
    return EmpiricalRisk(
        load_model(checkpoint, path),
        nn.CrossEntropyLoss(),
        samples(dataset, settings),
        batchnorm=settings.batchnorm,
        device=device,
        engine=settings.engine,
    )


def measured(
    checkpoint: Checkpoint,
    path: str | Path,
    dataset: Dataset,
    settings: Settings,
    *,
    device: str = "cpu",
    progress: bool | None = None,
) -> Measurement:
    """Measure a checkpoint.

    Raises:
        ValueError: f(theta) is not finite, the checkpoint was trained on other data of
            the same name, or a setting is out of range.
    """
    if checkpoint.data.get("sha256") not in (None, dataset.sha256):
        raise ValueError(
            f"`{path}` must have been trained on this {dataset.name}; got a checkpoint "
            "of other data with that name (sha256 differs). Point --data-dir at it."
        )
    risk = risk_of(checkpoint, path, dataset, settings, device)
    value = risk.value()
    if not math.isfinite(value):
        raise ValueError(
            f"`{path}` must give a finite loss; got f(theta) = {value}. Its parameters "
            "or the data hold NaN or infinite values."
        )
    checkup = doctor(risk) if settings.doctor else None
    common: dict[str, Any] = {
        "seed": settings.seed,
        "progress": progress,
        "max_seconds": settings.max_seconds,
    }
    pairs = eigenpairs(risk, settings.k, tol=settings.tol, **common)
    phi: Sequence[EpsilonSharpness] = epsilon_sharpness(
        risk, list(settings.epsilon), subspace_dim=settings.subspace_dim, **common
    )
    accuracy = risk.accuracy()
    record = new_record(
        "measurement",
        checkpoint=checkpoint_facts(checkpoint, path),
        data={"name": dataset.name, "sha256": dataset.sha256, "split": settings.split},
        settings={**asdict(settings), "risk": risk.settings()},
        measures={
            "value": value,
            "accuracy": accuracy,
            "eigenpairs": pairs,
            "epsilon_sharpness": list(phi),
            **({"doctor": checkup} if checkup else {}),
        },
    )
    return Measurement(
        value=value,
        accuracy=accuracy,
        eigenpairs=pairs,
        epsilon_sharpness=list(phi),
        record=record,
        checkup=checkup,
    )


def checkpoint_facts(checkpoint: Checkpoint, path: str | Path) -> dict[str, Any]:
    """What a record says of a checkpoint."""
    kept = ("batch_size", "seed", "learning_rate", "optimizer", "epoch", "metrics")
    return {
        "path": str(path),
        "sha256": checkpoint.sha256,
        "network": checkpoint.network,
        "start": checkpoint.start,
        "training": {name: checkpoint.training.get(name) for name in kept},
    }
