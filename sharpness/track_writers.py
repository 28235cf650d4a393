"""Where a tracker's points go: a CSV file, TensorBoard, Weights & Biases.

Each function gives a callback for `SharpnessTracker(on_point=...)`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpness._arguments import package
from sharpness.measures.registry import TRACKED

if TYPE_CHECKING:
    from sharpness.tracking import TrackedPoint

Write = Callable[["TrackedPoint"], None]
_OF_EACH = ("", "_error", "_status", "_threshold")  # of each measure
_COLUMNS = (
    *("update", "loss", "learning_rate", "seconds"),
    *(f"{name}{of}" for name in TRACKED for of in _OF_EACH),
)


def csv_writer(path: str | Path) -> Write:
    """Append a row for each point to a CSV file, with the same columns in every file.

    Args:
        path: of the file, made where there is none; a run that goes on appends to it.
    """
    path = Path(path)

    def write(point: TrackedPoint) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists() or not path.stat().st_size
        with path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, _COLUMNS)
            if is_new:
                rows.writeheader()
            rows.writerow(_row(point))

    return write


def _row(point: TrackedPoint) -> dict[str, Any]:
    row: dict[str, Any] = {
        "update": point.step,
        "loss": point.loss,
        "learning_rate": point.learning_rate,
        "seconds": point.cost.seconds,
    }
    for name, value in point.values().items():
        told: tuple[Any, ...] = (
            value.value,
            value.error,
            value.status,
            point.thresholds.get(name),
        )
        row |= {f"{name}{of}": each for of, each in zip(_OF_EACH, told, strict=True)}
    return row


def tensorboard_writer(to: Any = None) -> Write:
    """Write every point to TensorBoard, as scalars under `sharpness/`.

    Args:
        to: a `SummaryWriter` of your own, a folder, or None for TensorBoard's usual one.

    Raises:
        ImportError: there is none of your own, and tensorboard is not installed.
    """
    writer = to
    if not hasattr(to, "add_scalar"):
        package("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(to)

    def write(point: TrackedPoint) -> None:
        for name, number in _scalars(point).items():
            writer.add_scalar(name, number, point.step)
        writer.flush()

    return write


def wandb_writer(run: Any = None) -> Write:
    """Log every point to Weights & Biases, under `sharpness/`.

    Args:
        run: what `wandb.init()` gave; None for the run that is active at each point. The
            update is logged as `sharpness/update`, since a run has a step of its own.

    Raises:
        ImportError: there is no run, and wandb is not installed.
    """
    target = package("wandb", "wandb") if run is None else run

    def write(point: TrackedPoint) -> None:
        target.log({"sharpness/update": point.step, **_scalars(point)})

    return write


def _scalars(point: TrackedPoint) -> dict[str, float]:
    """The loss, every measure and its threshold, named for a dashboard."""
    found = {"loss": point.loss}
    found |= {name: value.value for name, value in point.values().items()}
    found |= {f"{name}_threshold": limit for name, limit in point.thresholds.items()}
    return {f"sharpness/{name}": number for name, number in found.items()}
