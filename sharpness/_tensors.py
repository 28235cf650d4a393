"""Flat vectors and named parameters: the one place that knows how they correspond."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 20  # elements upcast to float64 at a time: 8 MB, whatever n is


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One flat vector (n,) from tensors in order; always a copy."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def split(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of a flat vector (n,) in the given shapes; the inverse of `flatten`."""
    pieces = vector.split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def dot64(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two vectors (n,), summed in float64; a 0-d tensor on their device.

    In blocks, because a float64 copy of a whole vector would double its memory. A
    device without float64 (MPS) sums in the vectors' own type.
    """
    if a.dtype == torch.float64 or a.device.type == "mps":
        return torch.dot(a, b)
    blocks = zip(a.split(_BLOCK), b.split(_BLOCK), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in blocks]).sum()


def norm64(a: Tensor) -> Tensor:
    """Euclidean norm of a vector (n,), summed in float64; a 0-d tensor."""
    return dot64(a, a).sqrt()


def random_unit(like: Tensor, generator: torch.Generator) -> Tensor:
    """A uniformly random unit vector (n,) in the type and on the device of `like`.

    Drawn on the CPU in float32, so that a seed means the same vector on every device.
    """
    draw = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    v = draw.to(device=like.device, dtype=like.dtype)
    return v / norm64(v).to(v.dtype)
