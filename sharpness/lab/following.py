"""A training followed by a tracker: points as records beside the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from sharpness._arguments import Checked, known, require, setting, whole
from sharpness.lab.data import Dataset
from sharpness.lab.run import OnUpdate, criterion_for
from sharpness.measures.registry import TRACKED
from sharpness.record import append_record, new_record
from sharpness.tracking import OnPoint, SharpnessTracker, TrackedPoint


@dataclass(frozen=True, kw_only=True)
class Following(Checked):
    """What is measured on the way, and how often.

    Args:
        measures: of `SharpnessTracker`.
        every: updates from one point to the next; update 0 is the first point.
        num_samples: of the training set, class-balanced where that can be had.

    Raises:
        ValueError: an unknown measure, or a number below 1.
    """

    measures: tuple[str, ...] = ("lambda_max",)
    every: int = setting(
        50, check=partial(whole, least=1, advice="1 measures after each update.")
    )
    num_samples: int = setting(1000, check=partial(whole, least=1))

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, before anything is trained."""
        super().__post_init__()
        require(bool(self.measures), "measures", "be at least one", self.measures)
        for name in self.measures:
            known("measures", name, TRACKED, f"be of {', '.join(TRACKED)}")

    def of(
        self, dataset: Dataset, path: Path, batch_size: int, records: Path | None = None
    ) -> OnUpdate:
        """What `run.train` calls: each point goes to `records.jsonl` beside `path`.

        Or to `records`, where that is given.

        A run that was killed measures again what came after its last save; of points with
        one number the last counts.
        """
        where = records or path.with_name("records.jsonl")

        def note(point: TrackedPoint) -> None:
            append_record(where, new_record("tracking", path=path, point=point))

        return self.told(dataset, batch_size, note)

    def told(self, dataset: Dataset, batch_size: int, on_point: OnPoint) -> OnUpdate:
        """What `run.train` calls: each point goes to `on_point`.

        BatchNorm takes the statistics of batches of the training's size.
        """
        trackers: list[SharpnessTracker] = []

        def on_update(update: int, model: nn.Module, optimizer: Optimizer) -> None:
            if update % self.every:
                return
            if not trackers:
                trackers.append(
                    SharpnessTracker(
                        model,
                        criterion_for(dataset),
                        dataset.balanced_subset(self.num_samples),
                        optimizer=optimizer,
                        every=self.every,
                        measures=self.measures,
                        batch_size=batch_size,
                        at_start=False,
                        batchnorm="batch",
                        batchnorm_batch=max(2, batch_size),
                        on_point=on_point,
                    )
                )
            trackers[0].num_updates = update
            trackers[0].measure()

        return on_update
