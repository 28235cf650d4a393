"""Which batch size for an image classifier? Measured on 4000 images of digits.

python examples/image_classifier.py [PICTURE]
"""

import sys

import torch
from torch import nn

import sharpness as sh
from sharpness.batchsize.result import BatchSizeAdvice
from sharpness.lab import data


def network() -> nn.Module:
    """Two convolutions and two linear layers for 28 x 28 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def advise(num: int = 4000, max_seconds: float = 240.0) -> BatchSizeAdvice:
    """Adam as it is mostly used; the test images tell how good the network is."""
    digits = data.load("mnist5k")
    return sh.batch_size_advice(
        network(),
        "cross_entropy",
        digits.balanced_subset(num),
        digits.test,
        optimizer="adam",
        lr=1e-3,
        batch_size=32,
        max_seconds=max_seconds,
    )


if __name__ == "__main__":
    found = advise()
    print(found)
    found.plot(sys.argv[1] if len(sys.argv) > 1 else "image_classifier.png")
