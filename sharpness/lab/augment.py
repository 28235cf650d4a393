"""Random copies of images, drawn anew for every batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpness._arguments import ensure, require


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Flips, turns, shifts and crops, with a draw of its own for each image.

    They are applied in this order, and drawn in it too, each for the whole batch: the
    flip; the angle, then the horizontal and vertical shift; the crop. Steps that are
    switched off draw nothing. Draws are made where the generator lives, so a generator
    on the CPU means the same images on every device.

    Args:
        flip: mirror left and right with probability 1/2.
        crop: pad by this many pixels of zeros on every side and cut out a window of the
            original size at random; >= 0.
        rotation: turn about the centre by up to this many degrees either way, in
            [0, 180].
        translation: shift, before the turn, by up to this share of the width and of the
            height either way, in [0, 1).

    Raises:
        ValueError: a value outside its range.

    Turns and shifts share one bilinear sampling; flips and crops move whole pixels. What
    comes from outside the image is 0. Cost: less than a forward pass of the networks the
    images are for.
    """

    flip: bool = False
    crop: int = 0
    rotation: float = 0.0
    translation: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        require(isinstance(self.flip, bool), "flip", "be True or False", self.flip)
        require(
            isinstance(self.crop, int) and self.crop >= 0,
            "crop",
            "be a whole number of pixels, at least 0",
            self.crop,
            "4 is usual for 32x32 images.",
        )
        require(
            0 <= self.rotation <= 180,
            "rotation",
            "lie in [0, 180] degrees",
            self.rotation,
            "It is the largest angle, to either side.",
        )
        require(
            0 <= self.translation < 1,
            "translation",
            "lie in [0, 1), a share of the image",
            self.translation,
            "Divide pixels by the image's size.",
        )

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W) changed at random; `x` itself where all is switched off.

        Device, dtype and memory format stay those of `x`. Without a generator the global
        one of the images' device draws.

        Raises:
            ValueError: `x` is not a batch of floating-point images.
        """
        ensure(
            x.ndim == 4 and x.is_floating_point(),
            "x",
            "be images (B, C, H, W) of floating point",
            f"shape {tuple(x.shape)} of {x.dtype}",
            "Other data are trained on unchanged.",
        )
        if self == Augmentation() or not len(x):
            return x
        place = x.device if generator is None else generator.device

        def uniform(*shape: int) -> Tensor:
            draws = torch.rand(
                (len(x), *shape), generator=generator, dtype=torch.float32, device=place
            )
            return draws.to(x.device)

        images = x
        if self.flip:
            images = torch.where(uniform(1, 1, 1) < 0.5, images.flip(-1), images)
        if self.rotation or self.translation:
            angles = math.radians(self.rotation) * (2 * uniform() - 1)
            shifts = self.translation * (2 * uniform(2) - 1)
            images = _moved(images, angles, shifts)
        if self.crop:
            corners = (uniform(2) * (2 * self.crop + 1)).long()
            images = _cropped(images, self.crop, corners)
        return images.contiguous(memory_format=_memory_format(x))


def _moved(images: Tensor, angles: Tensor, shifts: Tensor) -> Tensor:
    """Turned by `angles` (B,) in radians after a shift by `shifts` (B, 2) of the size."""
    height, width = images.shape[-2:]
    # bfloat16 cannot tell neighbouring pixels of a large image apart.
    dtype = torch.promote_types(images.dtype, torch.float32)
    angles, shifts = angles.to(dtype), shifts.to(dtype)
    cos, sin = angles.cos(), angles.sin()
    # Where each pixel comes from. Lengths are in half widths and half heights, so that a
    # turn of an image that is not square takes their ratio, and a whole width is 2.
    across = [cos, -sin * height / width, 2 * shifts[:, 0]]
    down = [sin * width / height, cos, 2 * shifts[:, 1]]
    maps = torch.stack([*across, *down], dim=1).unflatten(1, (2, 3))
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images.to(dtype), grid, align_corners=False).to(images.dtype)


def _cropped(images: Tensor, pad: int, corners: Tensor) -> Tensor:
    """The windows of padded images whose upper left corners (B, 2) are given."""
    height, width = images.shape[-2:]
    windows = F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    each = torch.arange(len(images), device=images.device)
    return windows[each, :, corners[:, 0], corners[:, 1]]


def _memory_format(x: Tensor) -> torch.memory_format:
    last = torch.channels_last
    plain = x.is_contiguous() or not x.is_contiguous(memory_format=last)
    return torch.contiguous_format if plain else last


KESKAR = Augmentation(flip=True, rotation=10.0, translation=0.2)
"""Keskar et al. (2017), appendix E: reflections, turns up to 10 degrees, shifts up to 0.2.

The paper leaves open what fills the margin and how pixels are interpolated; here zeros,
bilinearly.
"""

CROP_FLIP = Augmentation(flip=True, crop=4)
"""Padding by 4, a random crop, a flip: Masters and Luschi (2018), Hoffer et al. (2017)."""

AUGMENTATIONS: dict[str, Callable[..., Augmentation | None]] = {
    "none": lambda: None,
    "keskar": partial(replace, KESKAR),
    "crop-flip": partial(replace, CROP_FLIP),
    "augment": Augmentation,
}
"""By name; keyword arguments change single values: `AUGMENTATIONS["keskar"](crop=4)`."""
