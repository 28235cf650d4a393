"""A checkpoint and a data set in, one measurement record out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from sharpness.lab.subjects import Subject
from sharpness.measures.summary import Settings as MeasureSettings
from sharpness.measures.summary import Summary, selected, summary
from sharpness.record import new_record
from sharpness.risk.checks import Checkup, doctor
from sharpness.risk.empirical import BatchNorm, EmpiricalRisk

_MOST_TEST_SAMPLES = 10_000  # for the generalisation gap


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, on which samples, and how."""

    num_samples: int | None = 1000  # class-balanced, by the seed; None means all
    split: Literal["train", "test"] = "train"
    batchnorm: BatchNorm = "running"
    measures: tuple[str, ...] | None = None  # names or families; None means default
    of_measures: MeasureSettings = field(default_factory=MeasureSettings)
    engine: str = "auto"
    dtype: Literal["float32", "float64"] | None = None  # None: as in the checkpoint
    doctor: bool = False  # check the risk first

    @property
    def seed(self) -> int:
        """Of samples and measures."""
        return self.of_measures.seed


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The results for one checkpoint, and the record that keeps them."""

    summary: Summary
    record: dict[str, Any]
    checkup: Checkup | None = None

    @property
    def ok(self) -> bool:
        """Whether everything ended as asked for."""
        return self.summary.status.ok and (self.checkup is None or self.checkup.ok)


def risk_of(subject: Subject, settings: Settings, device: str = "cpu") -> EmpiricalRisk:
    """The mean loss of a checkpoint's network on the chosen samples."""
    return _risk(subject, settings, settings.split, settings.num_samples, device)


def measured(
    subject: Subject,
    settings: Settings,
    *,
    device: str = "cpu",
    progress: bool | None = None,
    on_estimate: Callable[[float], None] | None = None,
) -> Measurement:
    """Measure a checkpoint.

    Raises:
        ValueError: f(theta) is not finite, or a setting is out of range.
    """
    selected(settings.measures)  # before any work
    risk = risk_of(subject, settings, device)
    value = risk.value()
    if not math.isfinite(value):
        raise ValueError(
            f"`{subject.path}` must give a finite loss; got f(theta) = {value}. Its "
            "parameters or the data hold NaN or infinite values."
        )
    checkup = doctor(risk) if settings.doctor else None
    start = subject.start
    if start is not None and start.shape != risk.theta.shape:
        start = None
    found = summary(
        risk,
        settings.measures,
        start=start,
        progress=progress,
        on_estimate=on_estimate,
        **vars(settings.of_measures),
    )
    record = new_record(
        "measurement",
        checkpoint=subject.facts,
        data={**subject.data, "split": settings.split},
        settings={**asdict(settings), "risk": risk.settings()},
        measures={
            "value": found.value,
            "accuracy": found.accuracy,
            "notes": found.notes,
            **found.results,
            **({"doctor": checkup} if checkup else {}),
        },
        readings={r.name: {"value": r.value, "error": r.error} for r in found.readings()},
        generalisation=_generalisation(subject, settings, found, device),
    )
    return Measurement(summary=found, record=record, checkup=checkup)


def _generalisation(
    subject: Subject, settings: Settings, found: Summary, device: str
) -> dict[str, Any] | None:
    """Loss and accuracy on test samples, and how much worse they are."""
    if subject.test is None or settings.split == "test":
        return None
    total = len(subject.test[1])
    num = None if total <= _MOST_TEST_SAMPLES else _MOST_TEST_SAMPLES
    risk = _risk(subject, settings, "test", num, device)
    loss = risk.value()
    facts: dict[str, Any] = {"test_loss": loss, "loss_gap": loss - found.value}
    if found.accuracy is not None:
        accuracy = risk.accuracy()
        facts |= {"test_accuracy": accuracy, "accuracy_gap": found.accuracy - accuracy}
    return facts


def _risk(
    subject: Subject, settings: Settings, split: str, num: int | None, device: str
) -> EmpiricalRisk:
    inputs, targets = subject.samples(split, num, settings.seed)
    model = subject.model
    if settings.dtype is not None:
        dtype = getattr(torch, settings.dtype)
        model, inputs = model.to(dtype), _as_type(inputs, dtype)
        targets = _as_type(targets, dtype)
    return EmpiricalRisk(
        model,
        subject.loss,
        (inputs, targets),
        batchnorm=settings.batchnorm,
        device=device,
        engine=settings.engine,
    )


def _as_type(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in another precision."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _as_type(item, dtype) for key, item in value.items()}
    return tuple(_as_type(item, dtype) for item in value)
