"""Two published courses of noise and curvature along a training, measured here.

    python benchmarks/noise.py scale [--momentum 0.9]
    python benchmarks/noise.py hover [--data cifar10 --num-samples 8000 --updates 200000]

`scale`: a network of two convolutions on MNIST, SGD with rate 0.01 and batches of 128, one
epoch. McCandlish et al. (2018), arXiv:1812.06162, Table 1: noise scale 50 at the start, 900
on average over the whole run. Beside the noise scale at each theta stands what batches of
20 successive updates give, in which the gradient of an oscillating training cancels.

`hover`: a perceptron with squared error, SGD without momentum in batches of 8. Andreyev
and Beneventano (2024), arXiv:2412.20553: batch sharpness rises to 2 / eta and stays there,
while lambda_max stays lower.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import sharpness as sh
from sharpness.lab import data

EVERY = 24  # updates from one point of `scale` to the next
SUCCESSIVE = 20  # updates whose gradients are averaged


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(320, 50), nn.ReLU(), nn.Linear(50, 10)),
    )


def batches(num: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(num, generator=generator).split(size)[: num // size]


def scale(momentum: float, num_samples: int, seed: int) -> None:
    x, y = data.load("mnist").train
    x = (x - x.mean()) / x.std()
    torch.manual_seed(seed)
    draw, model, loss = (
        torch.Generator().manual_seed(seed),
        convolutions(),
        nn.CrossEntropyLoss(),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
    found, gradients, along = [], [], []
    for step, batch in zip(range(len(x) // 128), batches(len(x), 128, draw), strict=False):
        if step % EVERY == 0:
            some = torch.randperm(len(x), generator=draw)[:num_samples]
            risk = sh.EmpiricalRisk(model, loss, (x[some], y[some]))
            found.append(sh.gradient_noise(risk, progress=False))
            print(f"update {step}: {found[-1]}", flush=True)
        optimizer.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        gradients.append(parameters_to_vector(slopes).double())
        if len(gradients) == SUCCESSIVE:
            along.append(of_successive(torch.stack(gradients)))
            gradients.clear()
    scales = np.nanmean([f.noise_scale for f in found])
    means = np.mean([(f.trace_covariance, f.gradient_norm_squared) for f in found], axis=0)
    print(
        f"mean of the scales {scales:.0f}, ratio of the means {np.divide(*means):.0f}; by "
        f"gradients of successive updates {np.divide(*np.mean(along, axis=0)):.0f}"
    )


def of_successive(gradients: Tensor) -> tuple[float, float]:
    """tr Sigma and |G|^2 as if all had been taken at one theta."""
    spread = float(gradients.var(0).sum())
    return 128 * spread, float(gradients.mean(0).square().sum()) - spread / len(gradients)


def hover(name: str, num_samples: int, rate: float, updates: int, seed: int) -> None:
    part = data.load(name).balanced_subset(num_samples)
    x = part[0].flatten(1)
    x, y = (x - x.mean()) / x.std(), nn.functional.one_hot(part[1]).float()
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        nn.Linear(128, y.shape[1]),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    tracker = sh.SharpnessTracker(
        model,
        nn.MSELoss(),
        (x, y),
        optimizer=optimizer,
        every=max(1, updates // 20),
        measures=["lambda_max", "batch_sharpness"],
        batch_size=8,
        on_point=lambda point: print(point, flush=True),
    )
    draw = torch.Generator().manual_seed(seed)
    for _, batch in zip(range(updates), batches(len(x), 8, draw), strict=False):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
        tracker.step()
    print(tracker.table())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["scale", "hover"])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--num-samples", type=int)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--updates", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.what == "scale":
        scale(asked.momentum, asked.num_samples or 4096, asked.seed)
    else:
        num = asked.num_samples or 8000
        hover(asked.data, num, asked.rate, asked.updates, asked.seed)
