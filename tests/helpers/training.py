"""A small training run, and all of a checkpoint that a kill must not change."""

import hashlib
import random

import numpy as np
import torch

from sharpness.lab import data
from sharpness.lab.training import StoppingCriteria, Training

NETWORK = "MLP?width=8&depth=1"


RUN = Training(network=NETWORK, batch_size=16, seed=3)


FOUR = StoppingCriteria(
    epochs=4
)  # of tiny's 40 samples: 10 updates of 16, epochs end at 3, 5, 8, 10


def tiny(num=40, classes=10):
    """Random images whose first pixel is their number / 64."""
    images = torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.arange(num) / 64
    part = images, torch.arange(num) % classes
    return data.Dataset(
        name="tiny", train=part, test=part, num_classes=classes, source="here"
    )


def bits(saved):
    """What a kill must not change, short enough to be compared by eye."""
    training = {k: v for k, v in saved.training.items() if k != "seconds"}
    return dict(leaves("", {**vars(saved), "training": training, "sha256": ""}))


def leaves(name, value):
    if isinstance(value, torch.Tensor):
        digest = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16]
        yield name, f"{value.dtype} {tuple(value.shape)} {digest}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{name}.{key}", item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from leaves(f"{name}[{i}]", item)
    else:
        yield name, repr(value)


def generators():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]


def kill_at(number):
    """An `on_update` that ends the run when an update is made and not yet saved."""

    def kill(update, model, optimizer):
        if update == number:
            raise KeyboardInterrupt

    return kill
