"""Flat vectors and named parameters, seeds and random vectors: one place for each."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpness._arguments import ensure, whole_seed

_STRETCH = 1 << 18  # entries; fits a processor's cache


def parts(value: Any) -> Iterable[Any] | None:
    """What a container holds, or an object that can be moved (`.to`); else None."""
    if is_object(value):
        return vars(value).values()  # type: ignore[no-any-return]
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, tuple | list) else None


def leaves(value: Any) -> Iterator[Any]:
    """Everything inside that is no container."""
    inside = parts(value)
    if inside is None:
        yield value
    else:
        for part in inside:
            yield from leaves(part)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same containers and objects, new ones, with `function` of what they hold."""
    if is_object(value):
        other = copy.copy(value)
        vars(other).update({k: mapped(function, v) for k, v in vars(value).items()})
        return other
    if isinstance(value, Mapping):
        return {key: mapped(function, part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        several = [mapped(function, part) for part in value]
        return type(value)(*several) if hasattr(value, "_fields") else type(value)(several)
    return function(value)


def is_object(value: Any) -> bool:
    """A batch of somebody's own class, such as a tokenizer's `BatchEncoding`."""
    movable = hasattr(value, "to") and hasattr(value, "__dict__")
    return movable and not isinstance(value, Tensor | torch.nn.Module)


def flat_like(
    theta: Any, names: Sequence[str], shapes: Sequence[torch.Size], argument: str = "theta"
) -> Tensor:
    """A flat vector (n,): a state dict's tensors of these names, or the vector itself.

    Raises:
        ValueError: a vector of another length; a state dict that lacks one of the
            tensors, or has it in another shape.
    """
    if isinstance(theta, Mapping):
        for name, shape in zip(names, shapes, strict=True):
            found = getattr(theta.get(name), "shape", "nothing")
            got = f"{found} (a state dict of another network?)"
            ensure(found == shape, argument, f"hold `{name}` of shape {tuple(shape)}", got)
        return flatten(theta[name].detach() for name in names)
    n = sum(shape.numel() for shape in shapes)
    sound, got = theta.shape == (n,), str(tuple(theta.shape))
    ensure(sound, argument, f"have shape (n,) with n={n}", got)
    flat: Tensor = theta
    return flat


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One flat vector (n,) from tensors in order; always a copy."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


_ALIGNED = 16  # bytes: an element of the widest type that a tensor may be viewed as


def aligned(piece: Tensor) -> Tensor:
    """A part of a flat vector, copied where `view_as_complex` would refuse its place.

    The storage of a parameter of its own begins at a whole element of any type.
    """
    is_odd = piece.storage_offset() * piece.element_size() % _ALIGNED
    return piece.clone() if is_odd else piece


def split(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of a flat vector (n,) in the given shapes; the inverse of `flatten`."""
    pieces = vector.split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def widest(tensor: Tensor) -> torch.dtype:
    """What sums are kept in on its device: MPS has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def dot64(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two vectors (n,) in float64; 0-d, on their device.

    A stretch at a time, so that no second vector is made. A device without float64
    (MPS) takes float32.
    """
    wide = widest(a)
    pairs = zip(a.split(_STRETCH), b.split(_STRETCH), strict=True)
    parts = [torch.dot(x.to(wide), y.to(wide)) for x, y in pairs]
    return torch.stack(parts).sum()


def is_finite(a: Tensor) -> bool:
    """Whether every entry is; one reading and no second vector, as a rule."""
    # A finite sum has finite terms; where it is none, it may be their sum that overflows.
    return math.isfinite(float(a.sum())) or bool(a.isfinite().all())


def norm64(a: Tensor) -> Tensor:
    """Euclidean norm of a vector (n,), summed in float64; a 0-d tensor."""
    wide = widest(a)
    parts = (x.to(wide) for x in a.split(_STRETCH))
    return torch.stack([torch.dot(x, x) for x in parts]).sum().sqrt()


def seeded(seed: Any) -> torch.Generator:
    """A generator on the CPU that starts from a whole number, Python's or NumPy's.

    Raises:
        ValueError: it is none.
    """
    return torch.Generator().manual_seed(whole_seed(seed))


def mixed(seed: int, *parts: Tensor | int) -> int:
    """A seed below 2^32 that is another for another `seed` or other bits in the parts.

    32 bits, since PyTorch's CPU generator looks at no more.
    """
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=4)
    for part in parts:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(repr(part).encode())
    return int.from_bytes(digest.digest(), "big")


def random_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal entries (n,) in the type and on the device of `like`.

    Drawn on the CPU in float32, so that a seed means the same vector on every device.
    """
    draw = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return draw.to(device=like.device, dtype=like.dtype)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Entries 1 and -1, each as likely, in the shape, type and place of `like`."""
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return bits.to(like).mul_(2).sub_(1)


def float64(tensor: Tensor) -> np.ndarray:
    """As a NumPy array of that type."""
    return np.asarray(tensor.detach().double().cpu().numpy())


def random_unit(like: Tensor, generator: torch.Generator) -> Tensor:
    """A uniformly random unit vector (n,), drawn as in `random_normal`."""
    v = random_normal(like, generator)
    return v / norm64(v).to(v.dtype)
