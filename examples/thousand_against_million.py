"""Why batches of 1000 can converge faster than batches of a million.

A regression with four features on a million generated rows. Left: the error of a batch's
gradient falls as the root of its size while its cost grows with the size. Right: the loss
above its minimum against time. Prints the numbers and writes a figure.
"""

import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from sharpness.report.figures import Figure, written

ROWS, FEATURES, NOISE = 1_000_000, 4, 1.0
SIZES = (10, 100, 1000, 10_000, 100_000, 1_000_000)
RACED = {10: 0.003, 1000: 0.1, 1_000_000: 0.4}  # batch size: learning rate
SECONDS, LOOKS = 2.0, 100
STYLES = {10: ("#D55E00", ":"), 1000: ("#0072B2", "-"), 1_000_000: ("black", "--")}


def generated(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows (N, 4) whose columns differ threefold in scale, and noisy targets (N,)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=draw) * torch.linspace(0.4, 1.2, FEATURES)
    weights = torch.tensor([1.0, -2.0, 3.0, -1.0])
    return x, x @ weights + NOISE * torch.randn(ROWS, generator=draw)


def gradient(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean squared error."""
    return 2 / len(y) * (x.T @ (x @ w - y))


def errors_and_seconds(x: Tensor, y: Tensor) -> Iterator[tuple[int, float, float]]:
    """For each size: relative error of a batch's gradient, and seconds to compute it."""
    w = torch.zeros(FEATURES)
    whole = gradient(w, x, y)
    for size in SIZES:
        found, seconds = [], []
        for _ in range(min(100, 10 * ROWS // size)):
            rows = torch.randint(ROWS, (size,))
            batch = x[rows], y[rows]
            began = time.perf_counter()
            found.append(gradient(w, *batch))
            seconds.append(time.perf_counter() - began)
        spread = torch.stack(found) - whole
        error = spread.square().sum(1).mean().sqrt() / whole.norm()
        yield size, float(error), float(torch.tensor(seconds).median())


def descent(
    x: Tensor, y: Tensor, size: int, rate: float, seconds: float = SECONDS
) -> list[tuple[float, int, Tensor]]:
    """SGD over the rows, which are in random order: time, update and weights on the way."""
    w, course, spent, update, looked = torch.zeros(FEATURES), [], 0.0, 0, 0.0
    gradient(w, x[:size], y[:size])  # warm
    while spent < seconds:
        at = update * size % ROWS
        began = time.perf_counter()
        w = w - rate * gradient(w, x[at : at + size], y[at : at + size])
        spent += time.perf_counter() - began
        update += 1
        if spent > looked:  # ever farther apart
            course.append((spent, update, w))
            looked = spent * (1 + 8 / LOOKS)
    return course


def excess(w: Tensor, x: Tensor, y: Tensor, best: Tensor) -> float:
    """Mean squared error above the least one: it is quadratic in w."""
    d = (w - best).double()
    return float(d @ (x.T @ x).double() @ d) / ROWS


def draw(x: Tensor, y: Tensor) -> Figure:
    """Both panels; the numbers are printed."""
    figure = Figure(3.4, 8.4)
    of_size, of_time = figure.subplots(1, 2)
    sizes, errors, seconds = zip(*errors_and_seconds(x, y), strict=True)
    for size, error, each in zip(sizes, errors, seconds, strict=True):
        print(f"batch {size}: gradient off by {error:.2%}, {1e3 * each:.3g} ms")
    of_size.loglog(sizes, errors, "o-", color="#0072B2", label="relative error")
    of_size.loglog(sizes, seconds, "s--", color="#D55E00", label="seconds")
    of_size.set_xlabel("batch size")
    of_size.set_title("error and cost of one gradient", fontsize=10, loc="left")
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    for size, rate in RACED.items():
        course = descent(x, y, size, rate)
        times = [at for at, _, _ in course]
        losses = [excess(w, x, y, best) for _, _, w in course]
        colour, line = STYLES[size]
        of_time.loglog(times, losses, line, color=colour, label=f"batch {size:,}")
        for level in (1e-2, 1e-3):
            first = next((i for i, loss in enumerate(losses) if loss <= level), None)
            reached = "not reached"
            if first is not None:
                reached = f"{course[first][1]} updates, {1e3 * times[first]:.3g} ms"
            print(f"batch {size}, rate {rate:g}, excess loss {level:g}: {reached}")
    of_time.set_xlabel("seconds")
    of_time.set_title("loss above its minimum", fontsize=10, loc="left")
    for axes in (of_size, of_time):
        axes.grid(color="0.9")
        axes.legend(frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    torch.manual_seed(0)
    path = sys.argv[1] if len(sys.argv) > 1 else "thousand_against_million.png"
    written(draw(*generated()), path)
