"""The papers' networks, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def f1(in_features: int = 784, num_classes: int = 10) -> nn.Module:
    """F1: five hidden layers of 512, BatchNorm and ReLU after each.

    1 462 794 parameters on 28x28 images and 10 classes (Keskar et al. 2017, App. B.1).
    """
    sizes = [in_features] + [512] * 5
    hidden = [
        layer
        for wide, narrow in pairwise(sizes)
        for layer in (nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, num_classes))


def c1(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """C1: two 5x5 convolutions and two dense layers, BatchNorm everywhere, dropout 0.5.

    1 757 834 parameters on 32x32 colour images and 10 classes. As in the authors' code
    (convolutions of stride 1, overlapping pools of stride 2); the text of Keskar et al.
    2017, App. B.3 gives stride 2 to the convolutions instead.
    """

    def convolution(channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels, 64, 5, padding="same")
        return [conv, nn.BatchNorm2d(64), nn.ReLU(), _SamePool()]

    def dense(wide: int, narrow: int) -> list[nn.Module]:
        linear = nn.Linear(wide, narrow)
        return [linear, nn.BatchNorm1d(narrow), nn.ReLU(), nn.Dropout(0.5)]

    side = -(-image_size // 4)
    return nn.Sequential(
        *convolution(in_channels),
        *convolution(64),
        nn.Flatten(),
        *dense(64 * side * side, 384),
        *dense(384, 192),
        nn.Linear(192, num_classes),
    )


class _SamePool(nn.Module):
    """3x3 max pooling of stride 2 that pads as TensorFlow's "same" does: on the right."""

    def forward(self, x: Tensor) -> Tensor:
        pads = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in x.shape[-2:]]
        right, bottom = pads[1] - pads[1] // 2, pads[0] - pads[0] // 2
        padding = (pads[1] // 2, right, pads[0] // 2, bottom)
        x = nn.functional.pad(x, padding, value=float("-inf"))
        return nn.functional.max_pool2d(x, 3, 2)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"F1": f1, "C1": c1}


def arguments_for(name: str, image_shape: torch.Size, num_classes: int) -> dict[str, int]:
    """The arguments that fit a network to images (C, H, W)."""
    if name.startswith("F"):
        return {"in_features": image_shape.numel(), "num_classes": num_classes}
    channels, height, _ = image_shape
    return {
        "in_channels": channels,
        "image_size": height,
        "num_classes": num_classes,
    }


def build(network: dict[str, Any]) -> nn.Module:
    """A network from its name and arguments, as they stand in a checkpoint.

    Raises:
        ValueError: no network of that name, or arguments it does not take.
    """
    name, arguments = network.get("name"), network.get("arguments", {})
    if name not in NETWORKS:
        close = get_close_matches(str(name).upper(), NETWORKS, 1, 0.1)
        raise ValueError(
            f"`network` must be one of {', '.join(NETWORKS)}; got {name!r}."
            + (f" Did you mean {close[0]}?" if close else "")
        )
    try:
        return NETWORKS[name](**arguments)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"`network` must have arguments that {name} takes; got {arguments!r}."
        ) from None


def initialise(model: nn.Module, seed: int) -> None:
    """Glorot-uniform weights, zero biases, BatchNorm 1 and 0 (Keras' defaults then)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.reset_parameters()  # 1, 0 and fresh running averages
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def digest(model: nn.Module) -> str:
    """sha256 of the parameters, in order."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()
