"""Two published courses of noise and curvature along a training, measured here.

    python benchmarks/noise.py [scale scale-momentum hover ...]

`scale`: a network of two convolutions on MNIST, plain SGD with rate 0.01 and batches of
128. McCandlish et al. (2018), arXiv:1812.06162, Table 1: the noise scale is 50 at the start
and 900 on average over the run. Their average is over a run until it has converged, so
this one goes on until the test error is 1 % (the goal of Shallue et al. 2018,
arXiv:1811.03600, for a simple CNN on MNIST), and the scale is averaged over its updates
by the trapezoidal rule. At each point |G|^2 is exact, of all 60 000 images, and tr Sigma
is estimated from 6000 of them. `scale-momentum` has momentum 0.9, and `repeat` what a
public repeat of the 900 takes, on the first epoch of `scale`: successive updates for one
theta.

`hover`: a perceptron on 8192 CIFAR-10 images, squared error, SGD without momentum in
batches of 8. Andreyev and Beneventano (2024), arXiv:2412.20553: batch sharpness rises to
2 / eta and stays there, while lambda_max stays lower. As in their code: 3072-512-512-10
with ReLU, He's normal weights times 0.2, images normalised by channel, lambda_max of 2048
of the images; 77 000 updates, half of theirs. Their loss is the sum over the 10 classes
and eta 0.01; with `MSELoss`, the mean, the same steps are those of eta 0.1. What it
hovers at is the mean over the second half of the updates, its standard error that of six
equal blocks.

Results go to `noise.json` beside this file; a case that is there is not run again. One
that was killed goes on at the epoch that it was in, from `runs/noise/`; `scale-
unfinished` is what `scale` had after 14 epochs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import sharpness as sh
from sharpness.lab import data

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FOLDER = ROOT / "benchmarks" / "noise.json", ROOT / "runs" / "noise"
Row = dict[str, float]


@dataclass
class Course:
    """A training, and what is measured after an update of it."""

    name: str
    model: nn.Module
    loss: nn.Module
    data: tuple[Tensor, Tensor]
    optimizer: torch.optim.SGD
    batch_size: int
    seed: int
    measure: Callable[[int], Row | None]  # of the number of updates made
    ended: Callable[[int, list[Row]], bool]  # after so many epochs
    by_hand: Callable[[Tensor], None] | None = None  # an update that takes less time

    @property
    def updates_of_an_epoch(self) -> int:
        return len(self.data[0]) // self.batch_size

    def rows(self) -> list[Row]:
        """Train, or go on where it was killed."""
        path = FOLDER / f"{self.name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        begin, rows = 0, []
        if path.exists():
            saved = torch.load(path, weights_only=True)
            begin, rows = saved["epoch"], saved["rows"]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        else:
            self._add(rows, 0)
        for epoch in count(begin):
            if self.ended(epoch, rows):
                return rows
            for step, batch in enumerate(self.batches(epoch), 1):
                self.update(batch)
                self._add(rows, epoch * self.updates_of_an_epoch + step)
            state = {"model": self.model, "optimizer": self.optimizer}
            saved = {name: part.state_dict() for name, part in state.items()}
            torch.save({**saved, "epoch": epoch + 1, "rows": rows}, path)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Positions, in an order of this epoch's own."""
        draw = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(len(self.data[0]), generator=draw)
        yield from order.split(self.batch_size)[: self.updates_of_an_epoch]

    def update(self, batch: Tensor) -> None:
        if self.by_hand is not None:
            self.by_hand(batch)
            return
        x, y = self.data
        self.optimizer.zero_grad()
        self.loss(self.model(x[batch]), y[batch]).backward()
        self.optimizer.step()

    def _add(self, rows: list[Row], step: int) -> None:
        row = self.measure(step)
        if row is not None:
            rows.append({"update": step} | row)
            print(self.name, json.dumps(rows[-1]), flush=True)


# -- the noise scale ---------------------------------------------------------------------


GOAL, MOST_EPOCHS = 0.01, 40
SAMPLES = 6000  # whose gradients are taken one by one
SUCCESSIVE = 20  # updates whose gradients the public repeat averages


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(320, 50), nn.ReLU(), nn.Linear(50, 10)),
    )


def scaling(name: str, momentum: float, seed: int) -> Course:
    """Measured four times in the first epoch and after each."""
    mnist, loss = data.load("mnist"), nn.CrossEntropyLoss()
    (x, y), (x_test, y_test) = mnist.train, mnist.test
    x_test, x = (x_test - x.mean()) / x.std(), (x - x.mean()) / x.std()
    torch.manual_seed(seed)
    model = convolutions()
    epoch = len(x) // 128

    def measure(step: int) -> Row | None:
        if step % (epoch // 4 if step < epoch else epoch):
            return None
        risk = sh.EmpiricalRisk(model, loss, (x, y))
        found = sh.gradient_noise(risk, num_samples=SAMPLES, seed=step, progress=False)
        square = float(risk.gradient().double().square().sum())
        with torch.no_grad():
            wrong = model(x_test).argmax(1) != y_test
        return {
            "loss": risk.value(),
            "test_error": float(wrong.float().mean()),
            "noise_scale": found.trace_covariance / square,
            "trace_covariance": found.trace_covariance,
            "trace_covariance_error": found.trace_covariance_error,
            "gradient_norm_squared": square,
        }

    return Course(
        name=name,
        model=model,
        loss=loss,
        data=(x, y),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum),
        batch_size=128,
        seed=seed,
        measure=measure,
        ended=lambda epoch, rows: rows[-1]["test_error"] <= GOAL or epoch == MOST_EPOCHS,
    )


def scale(name: str, momentum: float, seed: int) -> dict[str, Any]:
    course = scaling(name, momentum, seed)
    rows, epoch = course.rows(), course.updates_of_an_epoch
    averages = {}
    for num in range(1, rows[-1]["update"] // epoch + 1):
        some = [row for row in rows if row["update"] <= num * epoch]
        averages[num] = over_updates(some)
    return {"epochs": num, **averages[num], "by_epochs": averages, "rows": rows}


def over_updates(rows: list[Row]) -> Row:
    """The mean of the scale, and the scale of the mean trace and squared norm."""
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    steps = columns["update"]

    def mean(key: str) -> float:
        return float(np.trapezoid(columns[key], steps) / (steps[-1] - steps[0]))

    ratio = mean("trace_covariance") / mean("gradient_norm_squared")
    return {"mean_of_scales": mean("noise_scale"), "ratio_of_means": ratio}


def repeat(name: str, momentum: float, seed: int) -> dict[str, Any]:
    """|G|^2 of the mean of successive updates' gradients, as if at one theta.

    Numerator and denominator are moving averages (0.99), their ratio is averaged.
    """
    course = scaling(name, momentum, seed)
    gradients, scales, averages = [], [], np.zeros(2)
    for batch in course.batches(0):
        course.update(batch)
        slopes = [p.grad for p in course.model.parameters() if p.grad is not None]
        gradients.append(parameters_to_vector(slopes).double())
        if len(gradients) == SUCCESSIVE:
            small = float(gradients[-1].square().sum())
            large = float(torch.stack(gradients).mean(0).square().sum())
            trace = (small - large) * 128 / (1 - 1 / SUCCESSIVE)
            square = (SUCCESSIVE * large - small) / (SUCCESSIVE - 1)
            averages = 0.99 * averages + 0.01 * np.array([trace, square])
            scales.append(float(averages[0] / averages[1]))
            gradients.clear()
    return {"mean_of_scales": float(np.mean(scales)), "scales": scales}


# -- batch sharpness ---------------------------------------------------------------------


RATE, EPOCHS = 0.1, 75
BATCHES = 200  # of a batch sharpness
SHARPNESS_EVERY, LAMBDA_EVERY = 3, 15  # epochs
BLOCKS = 6


def perceptron(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()),
        nn.Linear(512, 10),
    )
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
        layer.weight.data *= 0.2
        nn.init.zeros_(layer.bias)
    return model


def images(num: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = data.load("cifar10").train
    draw = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(x), generator=draw)[:num]
    deviation, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
    x = ((x[some] - mean) / deviation).flatten(1)
    return x, nn.functional.one_hot(y[some], 10).float()


def hovering(name: str, rate: float, seed: int) -> Course:
    x, y = images(8192, seed)
    model, loss, epoch = perceptron(seed), nn.MSELoss(), len(x) // 8

    @torch.no_grad()
    def descend(batch: Tensor) -> None:
        """Half the time: no gradient is stored, the weights change in place."""
        layers, hidden = model[::2], [x[batch]]
        for layer in layers[:-1]:
            hidden.append(layer(hidden[-1]).relu_())
        slope = 2 / (8 * 10) * (layers[-1](hidden[-1]) - y[batch])
        for layer, inputs in zip(reversed(layers), reversed(hidden), strict=True):
            below = (
                (slope @ layer.weight) * (inputs > 0) if inputs is not hidden[0] else None
            )
            layer.weight.addmm_(slope.T, inputs, alpha=-rate)
            layer.bias.sub_(slope.sum(0), alpha=rate)
            slope = below

    def measure(step: int) -> Row | None:
        if step % (SHARPNESS_EVERY * epoch):
            return None
        risk = sh.EmpiricalRisk(model, loss, (x, y))
        found = sh.batch_sharpness(risk, 8, BATCHES, seed=step, progress=False)
        row = {
            "loss": risk.value(),
            "batch_sharpness": found.value,
            "standard_error": found.standard_error,
            "ratio_of_means": found.ratio_of_means,
        }
        if step % (LAMBDA_EVERY * epoch) == 0:
            some = sh.EmpiricalRisk(model, loss, (x, y), num_samples=2048)
            row["lambda_max"] = sh.eigenpairs(some, tol=1e-2, progress=False).lambda_max
        return row

    return Course(
        name=name,
        model=model,
        loss=loss,
        data=(x, y),
        optimizer=torch.optim.SGD(model.parameters(), lr=rate),
        batch_size=8,
        seed=seed,
        measure=measure,
        ended=lambda epoch, rows: epoch == EPOCHS,
        by_hand=descend,
    )


def hover(name: str, rate: float, seed: int) -> dict[str, Any]:
    """Batch sharpness and lambda_max in units of 2 / eta, over the second half."""
    rows = hovering(name, rate, seed).rows()
    late = [row for row in rows if row["update"] >= rows[-1]["update"] / 2]

    def in_thresholds(key: str) -> np.ndarray:
        return np.array([row[key] for row in late if key in row]) * rate / 2

    reached = in_thresholds("batch_sharpness")
    blocks = [block.mean() for block in np.array_split(reached, BLOCKS)]
    return {
        "rate": rate,
        "threshold": 2 / rate,
        "over_threshold": float(reached.mean()),
        "standard_error": float(np.std(blocks, ddof=1) / BLOCKS**0.5),
        "least": float(reached.min()),
        "most": float(reached.max()),
        "within_a_tenth": float((abs(reached - 1) < 0.1).mean()),
        "ratio_of_means_over_threshold": float(in_thresholds("ratio_of_means").mean()),
        "lambda_max_over_threshold": float(in_thresholds("lambda_max").mean()),
        "rows": rows,
    }


CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    "scale": lambda name: scale(name, momentum=0.0, seed=0),
    "scale-momentum": lambda name: scale(name, momentum=0.9, seed=0),
    "repeat": lambda name: repeat(name, momentum=0.0, seed=0),
    "repeat-other-seed": lambda name: repeat(name, momentum=0.0, seed=1),
    "hover": lambda name: hover(name, RATE, seed=0),
}


def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", choices=CASES)
    for name in parser.parse_args().cases or CASES:
        if name not in results():
            found = CASES[name](name)
            RESULTS.write_text(json.dumps(results() | {name: found}, indent=1) + "\n")
        shown = {k: v for k, v in results()[name].items() if not isinstance(v, list | dict)}
        print(name, json.dumps(shown))
