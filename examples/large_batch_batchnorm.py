"""A very large batch, and BatchNorm on small parts of it.

BatchNorm ties two sizes together: that of the update, and the number of rows whose mean
and variance normalise them. `batchnorm_batch` takes them apart: here updates of up to half
of the data, normalised by 32 rows at a time, beside the same with the whole batch.

    python examples/large_batch_batchnorm.py
"""

import torch
from torch import nn

import sharpness as sh
from sharpness.batchsize.result import BatchSizeAdvice
from sharpness.lab import data

SIZES, GHOST = (64, 512, 2048), 32
TARGET = 0.25  # validation loss


def network() -> nn.Module:
    """Two convolutions with BatchNorm for 28 x 28 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )


def advise(
    batchnorm_batch: int | None,
    num: int = 4000,
    batch_sizes: tuple[int, ...] = SIZES,
    max_seconds: float = 120.0,
) -> BatchSizeAdvice:
    """The same race to the same loss, whatever BatchNorm takes its statistics from."""
    digits = data.load("mnist5k")
    return sh.batch_size_advice(
        network(),
        "cross_entropy",
        digits.balanced_subset(num),
        digits.test,
        optimizer="momentum",
        lr=0.02,
        batch_size=batch_sizes[0],
        batch_sizes=batch_sizes,
        target=TARGET,
        batchnorm_batch=batchnorm_batch,
        max_seconds=max_seconds,
    )


if __name__ == "__main__":
    for rows in (None, GHOST):
        print(f"\nBatchNorm on {f'{rows} rows' if rows else 'the whole batch'}\n")
        print(advise(rows))
