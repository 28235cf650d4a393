"""Directions through the parameters: random, between networks, along a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from sharpness import _tensors
from sharpness._arguments import ensure
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.model_state import unwrapped

Network = Tensor | Mapping[str, Tensor] | nn.Module


def parameters_of(risk: EmpiricalRisk, network: Network, name: str = "other") -> Tensor:
    """Parameters (n,) of another network: flat, a state dict, or the network itself.

    Raises:
        ValueError: it has another length, or lacks a parameter.
    """
    if isinstance(network, nn.Module):
        network = unwrapped(network)[0].state_dict()
    flat = _tensors.flat_like(network, risk.names, risk.shapes, name)
    return flat.detach().to(risk.theta)


def random_directions(risk: EmpiricalRisk, num: int, seed: int) -> Tensor:
    """Normal draws (num, n), filter-normalised.

    Raises:
        ValueError: no parameter has filters, so nothing would move.
    """
    generator = _tensors.seeded(seed)
    draws = [_tensors.random_normal(risk.theta, generator) for _ in range(num)]
    found = torch.stack([filter_normalised(risk, draw) for draw in draws])
    ensure(
        bool(found.any()),
        "directions",
        "be another kind where no parameter has filters",
        "'random' (biases and normalisation layers stay where they are)",
        "Pass 'eigenvectors' or a tensor.",
    )
    return found


def filter_normalised(risk: EmpiricalRisk, direction: Tensor) -> Tensor:
    """`direction` (n,) with every filter as long as that filter of theta.

    A filter is all that leads to one output: a row of a linear, recurrent or attention
    weight, a token's vector in an embedding, an output channel of a convolution (its
    group's inputs; transposed ones too), and the first dimension of any other tensor.
    Biases, normalisation layers and other vectors do not move, since scaled directions
    would say nothing of them; nor do filters of zeros.

    References:
        Li et al. (2018), arXiv:1712.09913, section 4; their code leaves out biases and
        BatchNorm too.
    """
    moved = direction.detach().clone()
    pieces = (_tensors.split(vector, risk.shapes) for vector in (moved, risk.theta))
    for name, step, weight in zip(risk.names, *pieces, strict=True):
        owner, _, leaf = name.rpartition(".")
        layout = _filters(risk.model.get_submodule(owner), leaf, weight.shape)
        if layout is None:
            step.zero_()
            continue
        shape, within = layout
        wanted, drawn = (
            torch.linalg.vector_norm(part.view(shape), dim=within, keepdim=True)
            for part in (weight, step)
        )
        step.view(shape).mul_(wanted / drawn.clamp_min(torch.finfo(drawn.dtype).tiny))
    return moved


def _filters(
    layer: nn.Module, name: str, shape: torch.Size
) -> tuple[list[int], tuple[int, ...]] | None:
    """How to view a parameter, and the dimensions a filter extends over."""
    if len(shape) < 2 or name.startswith("bias") or _normalises(layer):
        return None
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...)
        groups, outputs = layer.groups, shape[1]
        view = [groups, shape[0] // groups, outputs, *shape[2:]]
        return view, (1, *range(3, len(view)))
    if type(layer).__name__ == "Conv1D":  # of transformers: a linear layer, (in, out)
        return list(shape), (0,)
    return list(shape), tuple(range(1, len(shape)))


def _normalises(layer: nn.Module) -> bool:
    """Whether it is a normalisation layer, by its class or by what it is called."""
    kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm)
    return isinstance(layer, kinds) or type(layer).__name__.endswith("Norm")


def between(offsets: Tensor) -> Tensor:
    """An orthonormal basis (k, n) of offsets (k, n), the first along the first.

    Raises:
        ValueError: they span less: a network equals another, or three lie on a line.
    """
    wide = offsets.cpu().double()
    basis, triangle = torch.linalg.qr(wide.T)
    lengths, sizes = triangle.diagonal(), wide.norm(dim=1)
    eps = torch.finfo(offsets.dtype).eps ** 0.5
    sound = bool((lengths.abs() > eps * sizes).all())
    contract = "differ from the risk's, and not lie on one line with it"
    ensure(sound, "networks", contract, "networks that span no plane")
    found: Tensor = (basis * lengths.sign()).T.to(offsets)
    return found


def principal(offsets: Tensor, num: int) -> Tensor:
    """Leading right singular vectors (num, n) of offsets (m, n), from theta, not centred.

    So the plane contains theta, as in Li et al. (2018), section 7.

    Raises:
        ValueError: fewer offsets than that, or they span less.
    """
    # By the small Gram matrix: m is some hundred at most, n are millions.
    gram = (offsets @ offsets.T).cpu().double()
    squares, vectors = torch.linalg.eigh(gram)
    floor = torch.finfo(offsets.dtype).eps * float(squares[-1])
    rank = int((squares > floor * len(offsets)).sum())
    contract = f"span {num} directions from the risk's"
    ensure(rank >= num, "networks", contract, f"{len(offsets)} that span {rank}")
    leading = vectors[:, -num:].flip(1).T.to(offsets) @ offsets
    found: Tensor = leading / leading.norm(dim=1, keepdim=True)
    return found


def unexplained(offsets: Tensor, directions: Tensor) -> tuple[Any, Any]:
    """Coordinates (m, k) along orthonormal directions, and what they leave out, (m,).

    That is the distance from the plane over the distance from theta; 0 for theta itself.
    """
    places = offsets @ directions.T
    off = (offsets - places @ directions).norm(dim=1)
    share = (off / offsets.norm(dim=1)).nan_to_num(0.0)
    return places.tolist(), share.tolist()
