"""Keskar et al. (2017): Tables 2 and 3 and the parametric plot, for one network.

From each starting point one network is trained with the small and one with the large
batch. A third, "matched", has the large batch and stops as soon as its training loss is
that of the small-batch network: the first two may differ a hundredfold in loss. All are
measured with BatchNorm on batch statistics (the authors' Keras models kept no others)
and again with running statistics (what PyTorch calls evaluation mode).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import joblib
import torch

from sharpness import _progress, checkpoint
from sharpness.lab import data
from sharpness.lab.measurement import Settings, measured, risk_of
from sharpness.lab.run import train
from sharpness.lab.subjects import opened
from sharpness.lab.training import Budget, Training, default_batch_sizes
from sharpness.measures.landscape import Interpolation, interpolation
from sharpness.measures.summary import Settings as MeasureSettings
from sharpness.record import (
    Records,
    append_record,
    as_plain,
    new_record,
    read_records,
)
from sharpness.report.figures import parametric_plot
from sharpness.results import short
from sharpness.statistics import Row, Section, order_verdict, row, size_verdict

EPSILONS = (1e-3, 5e-4)
MODES = ("batch", "running")
# A table each. Stopping early is compared in the authors' way to run BatchNorm alone.
TABLES = (("large", "batch"), ("matched", "batch"), ("large", "running"))
ROLES = {
    "small": "small batch",
    "large": "large batch trained to the end",
    "matched": "large batch stopped at the small batch's training loss",
}
_COST = {"train": 6, "matched": 1, "measure": 1}  # relative, for the progress bar

_Record = dict[str, Any]
_Records = dict[tuple[str, str, int], _Record]  # by role, BatchNorm mode, pair


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained and measured, and where it goes."""

    output: Path
    data: str = "mnist5k"
    data_dir: str | None = None
    network: str = "F1"
    num_seeds: int = 3
    epochs_small: int = 20
    epochs_large: int = 40
    num_samples: int | None = 1000
    device: str = "cpu"
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        """Refuse what gives no paired comparison."""
        if self.num_seeds < 2:
            raise ValueError(
                "`num_seeds` must be at least 2 for a paired comparison; got "
                f"{self.num_seeds}. The paper used 5."
            )

    def path(self, role: str, seed: int) -> Path:
        """Where the network of a role and a starting point lies."""
        return self.output / f"{role}-seed{seed}.pt"

    def settings(self, mode: Any) -> Settings:
        """How it is measured, with BatchNorm in `mode`."""
        return Settings(
            num_samples=self.num_samples,
            batchnorm=mode,
            measures=("lambda_max", "phi"),
            of_measures=MeasureSettings(epsilon=EPSILONS),
        )


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """The paper's tables with ours beside them, and where everything lies."""

    plan: Plan
    batch_sizes: tuple[int, int]
    num_trials_paper: int
    sections: list[Section]
    final_losses: dict[str, list[float]]  # training loss by role, one a starting point
    figure: Path
    records: Path


def reproduce(plan: Plan, *, progress: bool | None = None) -> Reproduction:
    """Train, measure, compare, draw; what is already there is not done again.

    Cost: per starting point three trainings (the third a short one), five measurements.
    """
    plan.output.mkdir(parents=True, exist_ok=True)
    records_path = plan.output / "records.jsonl"
    done = _measurements(plan, records_path)
    seeds = range(plan.num_seeds)
    with warnings.catch_warnings(), _pool(plan) as pool, _bar(plan, progress) as bar:
        # joblib replaces a process that has grown; nothing is lost, no need to say so.
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
        first = [(plan, role, s) for role in ("small", "large") for s in seeds]
        for _ in pool(joblib.delayed(_train)(*unit) for unit in first):
            bar.update(_COST["train"])
        # A matched run ends at a loss that its small-batch twin must have reached.
        for _ in pool(joblib.delayed(_train)(plan, "matched", s) for s in seeds):
            bar.update(_COST["matched"])
        known = {
            f"{mode} {record['checkpoint']['sha256']}"
            for (_, mode, _), record in done.items()
        }
        pairs = [("small", mode) for mode in MODES] + list(TABLES)
        units = [(role, s, mode) for role, mode in pairs for s in seeds]
        for record in pool(joblib.delayed(_measure)(plan, *u, known) for u in units):
            if record is not None:
                append_record(records_path, record)
            bar.update(_COST["measure"])
    curves = _curves(plan)
    figure = _draw(plan, curves)
    done = _measurements(plan, records_path)
    found = Reproduction(
        plan=plan,
        batch_sizes=_batch_sizes(plan),
        num_trials_paper=paper_numbers()["num_trials"],
        sections=_sections(plan, done),
        final_losses={
            role: [_metric(done[role, "batch", s], "train_loss_batch") for s in seeds]
            for role in ROLES
        },
        figure=figure,
        records=records_path,
    )
    append_record(records_path, new_record("interpolation", pair=0, curves=curves))
    append_record(records_path, new_record("comparison", paper="keskar2017", **vars(found)))
    return found


# -- training and measuring, each in a process of its own ----------------------------


def _pool(plan: Plan) -> Any:
    """Processes on a CPU; one after another on a GPU."""
    jobs = plan.jobs if plan.device == "cpu" else 1
    return joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")


def _bar(plan: Plan, progress: bool | None) -> Any:
    units = 2 * _COST["train"] + _COST["matched"] + 5 * _COST["measure"]
    layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} to go"
    total = plan.num_seeds * units
    return _progress.bar("train and measure", total, progress, bar_format=layout)


def _train(plan: Plan, role: str, seed: int) -> None:
    _share_cores(plan)
    small, large = _batch_sizes(plan)
    training = Training(
        network=plan.network, batch_size=small if role == "small" else large, seed=seed
    )
    budget = Budget(epochs=plan.epochs_small if role == "small" else plan.epochs_large)
    if role == "matched":
        twin = checkpoint.load(plan.path("small", seed))
        loss = twin.training["metrics"]["train_loss_batch"]
        budget = replace(budget, until_loss=loss)
    train(training, budget, _dataset(plan), plan.path(role, seed), device=plan.device)


def _measure(
    plan: Plan, role: str, seed: int, mode: str, known: set[str]
) -> _Record | None:
    """A measurement record; None for a checkpoint whose records are there already."""
    _share_cores(plan)
    path = plan.path(role, seed)
    loaded = checkpoint.load(path)
    if f"{mode} {loaded.sha256}" in known:
        return None
    subject = opened(path, data_dir=plan.data_dir)
    found = measured(subject, plan.settings(mode), device=plan.device, progress=False)
    return {**found.record, "role": role, "pair": seed}


def _share_cores(plan: Plan) -> None:
    if plan.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // plan.jobs))


def _dataset(plan: Plan) -> data.Dataset:
    return _loaded(plan.data, plan.data_dir)


@cache
def _loaded(name: str, data_dir: str | None) -> data.Dataset:
    return data.load(name, data_dir=data_dir)


def _batch_sizes(plan: Plan) -> tuple[int, int]:
    return default_batch_sizes(len(_dataset(plan).train[0]))


def _measurements(plan: Plan, path: Path) -> _Records:
    """The last measurement by this plan of each role, mode and pair."""
    found: _Records = {}
    for record in read_records(path) if path.exists() else Records():
        if record["kind"] != "measurement" or "role" not in record:
            continue
        mode, pair = record["settings"]["batchnorm"], record["pair"]
        wanted = as_plain(asdict(plan.settings(mode)))
        same = {k: v for k, v in record["settings"].items() if k != "risk"} == wanted
        if same and pair < plan.num_seeds:
            found[record["role"], mode, pair] = record
    return found


# -- comparing with the paper --------------------------------------------------------


def paper_numbers() -> dict[str, Any]:
    """The paper's Tables 2 and 3, as far as they concern the lab's networks."""
    source = files("sharpness.reproduce") / "paper_numbers" / "keskar2017.json"
    numbers: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return numbers


def _sections(plan: Plan, records: _Records) -> list[Section]:
    """One for each table: a way to stop the large batch, a way to run BatchNorm."""
    return [
        Section(
            title=f"{ROLES[role]}; BatchNorm on {mode} statistics",
            rows=_rows(plan, records, role, mode),
        )
        for role, mode in TABLES
    ]


def _rows(plan: Plan, records: _Records, role: str, mode: str) -> list[Row]:
    paper = paper_numbers()
    table2 = paper["table2"].get(plan.network)
    table3 = paper["table3"].get(plan.network, {})

    def pairs(pick: Callable[[_Record], float]) -> tuple[list[float], list[float]]:
        seeds = range(plan.num_seeds)
        small = [pick(records["small", mode, seed]) for seed in seeds]
        return small, [pick(records[role, mode, seed]) for seed in seeds]

    rows = []
    for part in ("train", "test"):
        name = f"{part}_accuracy_{mode}"
        published = (table2[f"{part}_small"], table2[f"{part}_large"]) if table2 else None
        values = pairs(lambda record, name=name: 100 * _metric(record, name))  # type: ignore[misc]
        rows.append(row(f"{part} acc. %", *values, published))
    for i, epsilon in enumerate(EPSILONS):
        cell = table3.get(f"{epsilon:g}")
        published = (cell["small"], cell["large"]) if cell else None
        rows += _phi_rows(epsilon, lambda name, i=i: pairs(_phi(i, name)), published)  # type: ignore[misc]
    lambda_max = pairs(lambda record: record["measures"]["lambda_max"][0]["eigenvalues"][0])
    rows.append(row("lambda_max", *lambda_max))
    return rows


def _phi_rows(
    epsilon: float,
    pairs: Callable[[str], tuple[list[float], list[float]]],
    published: tuple[list[float], list[float]] | None,
) -> list[Row]:
    """The paper's protocol beside the paper's numbers, and the best value found."""
    protocol = row(f"phi({short(epsilon)}) %", *pairs("phi_protocol"), published)
    best = row("  best found", *pairs("phi"))
    size = protocol.paper_ratio
    protocol = replace(
        protocol,
        verdict=order_verdict(best.comparison, protocol.comparison),
        size_agrees=size_verdict(protocol.comparison.ratio, size) if size else None,
    )
    return [protocol, best]


def _phi(i: int, name: str) -> Callable[[_Record], float]:
    return lambda record: float(record["measures"]["phi"][i][name])


def _metric(record: _Record, name: str) -> float:
    return float(record["checkpoint"]["training"]["metrics"][name])


# -- the parametric plot -------------------------------------------------------------


def _curves(plan: Plan) -> dict[str, Interpolation]:
    """Between the minima of starting point 0, on training and on test samples."""
    curves = {}
    dataset = _dataset(plan)
    for split, part in (("train", dataset.train), ("test", dataset.test)):
        num = plan.num_samples
        settings = Settings(
            num_samples=None if num is None or num > len(part[1]) else num,
            split="train" if split == "train" else "test",
            batchnorm="batch",
        )
        small, large = (
            risk_of(opened(path, data_dir=plan.data_dir), settings, plan.device)
            for path in (plan.path("small", 0), plan.path("large", 0))
        )
        curves[split] = interpolation(small, large.theta)
    return curves


def _draw(plan: Plan, curves: dict[str, Interpolation]) -> Path:
    train_curve, test_curve = curves["train"], curves["test"]
    return parametric_plot(
        plan.output / "parametric.png",
        train_curve.alphas,
        (train_curve.values, train_curve.accuracies),
        (test_curve.values, test_curve.accuracies),
        title=f"{plan.network} on {plan.data}, starting point 0: "
        "the line through the two minima",
    )
