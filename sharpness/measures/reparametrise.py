"""Other parameters for the same function: the maps that an audit applies to a network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from sharpness import _tensors
from sharpness._arguments import ensure, positive
from sharpness.risk.model_state import held
from sharpness.risk.objective import call_model

# Powers of two: scaling by them is exact in floating point, so that what moves is moved
# by the map and not by rounding.
_FACTORS = (0.125, 0.25, 0.5, 2.0, 4.0, 8.0)
_UPWARDS = tuple(factor for factor in _FACTORS if factor > 1)
_TOLERANCE = 1e-6  # of the largest output, in float32

Draw = Callable[[Tensor], Tensor]  # a weight -> a factor for each of its rows
_Affine = (nn.Linear, _ConvNd, _BatchNorm)  # outputs scale with weight and bias


@dataclass(frozen=True)
class _Call:
    """One call of a module without children."""

    name: str
    module: nn.Module
    given: Tensor
    returned: Tensor


@dataclass(frozen=True)
class _Pair:
    """A layer, and the one that is fed by it, with what lies between."""

    source: str
    path: tuple[str, ...]  # positively homogeneous modules without parameters
    consumer: str  # or the BatchNorm
    shape: torch.Size  # of the source's output


@dataclass(frozen=True, kw_only=True)
class Reparametrisation:
    """A network that computes the same function with other parameters."""

    name: str
    layers: tuple[str, ...]  # the ones whose weights were scaled
    drift: float  # largest change of an output, relative to the largest output
    network: nn.Module


def reparametrisations(
    network: nn.Module, inputs: Any, *, seed: int = 0
) -> list[Reparametrisation]:
    """Every kind of map that the network admits, applied wherever it can be.

    - `layers`: a layer's output is scaled by a factor, the next layer's weight by its
      inverse, past ReLU, pooling and whatever else is positively homogeneous (the
      alpha-scale map of Dinh et al. 2017);
    - `neurons`: the same with a factor for every output of the layer;
    - `batchnorm`: weight and bias before a BatchNorm are scaled by a factor, its
      running statistics along;
    - `batchnorm-neurons`: the same with a factor for every output.

    Layers are found by watching the tensors that pass from module to module in one
    forward pass; a map that changes an output by more than 1e-6 of the largest is taken
    back. What is connected outside of modules (a residual sum, a functional ReLU) is
    thereby left alone.

    Args:
        network: in evaluation mode; not changed.
        inputs: what it is called with, for the search and the check.
        seed: of the factors.
    """
    calls = _watched(network, inputs)
    pairs = list(_pairs(calls))
    before_norm = [
        _Pair(call.name, (), following.name, call.returned.shape)
        for call, following in _following(calls)
        if isinstance(call.module, nn.Linear | _ConvNd)
        and _is_affine(call)
        and isinstance(following.module, _BatchNorm)
        and following.module.running_mean is not None
        and following.module.num_features == call.returned.shape[_channels(call.module)]
        and _channels(call.module) % call.returned.ndim == 1
    ]
    found = []
    for name, rescale, uniform, factors, places in (
        ("layers", _rescale, True, _FACTORS, pairs),
        ("neurons", _rescale, False, _FACTORS, pairs),
        ("batchnorm", _rescale_before_norm, True, _UPWARDS, before_norm),
        ("batchnorm-neurons", _rescale_before_norm, False, _UPWARDS, before_norm),
    ):
        draw = partial(_drawn, uniform, _tensors.seeded(seed), factors)
        other, kept, drift = _applied(network, inputs, partial(rescale, draw), places)
        if kept:
            layers = tuple(place.source for place in kept)
            made = Reparametrisation(name=name, layers=layers, drift=drift, network=other)
            found.append(made)
    return found


def scaled_by(
    network: nn.Module, inputs: Any, factor: float
) -> tuple[nn.Module, tuple[str, ...]]:
    """The alpha-scale map of Dinh et al. (2017) by a factor of choice: same function.

    Every pair of layers that can be: the first scaled by `factor`, the second's weight
    by its inverse. A map that changes an output by more than 1e-6 of the largest is
    taken back, as in `reparametrisations`.

    Args:
        network: in evaluation mode; not changed.
        inputs: what it is called with, to see how layers are connected.
        factor: > 0; a power of two is exact.

    Returns:
        The network, and the names of the layers of all pairs.

    Raises:
        ValueError: `factor` <= 0, or no layer of the network can be scaled.
    """
    positive("factor", factor)
    rescale = partial(_rescale, lambda weight: weight.new_full((len(weight),), factor))
    pairs = _pairs(_watched(network, inputs))
    current, kept, _ = _applied(network, inputs, rescale, pairs, same_too=True)
    layers = [layer for pair in kept for layer in (pair.source, pair.consumer)]
    contract = "have two layers with ReLU or pooling between"
    ensure(bool(layers), "network", contract, "none")
    return current, tuple(dict.fromkeys(layers))


def _applied(
    network: nn.Module,
    inputs: Any,
    rescale: Callable[[nn.Module, _Pair], bool],
    places: Iterable[_Pair],
    *,
    same_too: bool = False,
) -> tuple[nn.Module, list[_Pair], float]:
    """A copy with a map applied wherever it can be, those places, and the last drift."""
    current, kept, drift = copy.deepcopy(network), [], 0.0
    for place in places:
        candidate = copy.deepcopy(current)
        with torch.no_grad():
            applied = rescale(candidate, place)
        changed = _drift(network, candidate, inputs) if applied else math.inf
        if changed <= _TOLERANCE and (same_too or _differ(current, candidate)):
            current, drift = candidate, changed
            kept.append(place)
    return current, kept, drift


# -- the maps --------------------------------------------------------------------------


def _rescale(draw: Draw, network: nn.Module, pair: _Pair) -> bool:
    """Scale one layer's outputs up and the next one's weights down."""
    source: Any = network.get_submodule(pair.source)
    columns: Any = network.get_submodule(pair.consumer).weight
    factors = draw(source.weight)
    gain = _carried(network, pair, source, factors)
    if gain is None or len(gain) != columns.shape[1]:
        return False
    _scale_rows(source, factors)
    columns /= gain.view(1, -1, *[1] * (columns.ndim - 2))
    return True


def _rescale_before_norm(draw: Draw, network: nn.Module, pair: _Pair) -> bool:
    """Scale what a BatchNorm divides by anyway, up only.

    The variance is scaled together with the eps that is added to it, so that nothing
    moves: to make up for it, it would have to fall below 0 for small factors.
    """
    layer: Any = network.get_submodule(pair.source)
    statistics: Any = network.get_submodule(pair.consumer)
    factors = draw(layer.weight)
    _scale_rows(layer, factors)
    statistics.running_mean *= factors
    wide = (statistics.running_var.double() + statistics.eps) * factors.double() ** 2
    statistics.running_var.copy_(wide - statistics.eps)
    return True


def _drawn(
    uniform: bool, generator: torch.Generator, factors: tuple[float, ...], weight: Tensor
) -> Tensor:
    """A factor for every row of a weight; all the same if `uniform`."""
    num = len(weight)
    index = torch.randint(len(factors), (1 if uniform else num,), generator=generator)
    return torch.tensor(factors)[index].expand(num).to(weight)


def _scale_rows(layer: Any, factors: Tensor) -> None:
    layer.weight *= factors.view(-1, *[1] * (layer.weight.ndim - 1))
    if layer.bias is not None:
        layer.bias *= factors


def _carried(
    network: nn.Module, pair: _Pair, source: nn.Module, factors: Tensor
) -> Tensor | None:
    """The factors as they arrive at the consumer's input, one for each of its columns."""
    view = [1] * len(pair.shape)
    view[_channels(source)] = -1
    ones = torch.ones((1, *pair.shape[1:]), device=factors.device, dtype=factors.dtype)
    scaled = ones * factors.view(view)
    for name in pair.path:
        module = network.get_submodule(name)
        ones, scaled = module(ones), module(scaled)
    gains = (scaled / ones)[0]
    if isinstance(network.get_submodule(pair.consumer), nn.Linear):
        flat = gains.reshape(-1, gains.shape[-1])
    else:
        flat = gains.flatten(1).T
    known = flat.isfinite()  # a path that pads with zeros leaves 0/0
    gain = torch.where(known, flat, -math.inf).amax(0)
    agrees = bool(((flat == gain) | ~known).all()) and bool(gain.isfinite().all())
    return gain if agrees else None


# -- how layers are connected ----------------------------------------------------------


def _pairs(calls: Mapping[str, _Call]) -> Iterator[_Pair]:
    following = {call.name: after for call, after in _following(calls)}
    for call in calls.values():
        if not _is_affine(call):
            continue
        path: list[str] = []
        after = following.get(call.name)
        while after is not None and _is_homogeneous(after):
            path.append(after.name)
            after = following.get(after.name)
        if after is not None and isinstance(after.module, nn.Linear | _ConvNd):
            ungrouped = getattr(after.module, "groups", 1) == 1
            if ungrouped and not getattr(after.module, "transposed", False):
                yield _Pair(call.name, tuple(path), after.name, call.returned.shape)


def _is_affine(call: _Call) -> bool:
    """Whether a layer's outputs scale with weight and bias; samples come first."""
    module, dims = call.module, call.returned.ndim
    if not isinstance(module, _Affine) or getattr(module, "transposed", False):
        return False
    least = module.weight.ndim if isinstance(module, _ConvNd) else 2
    return module.weight is not None and dims >= least


def _channels(module: nn.Module) -> int:
    """The dimension of a layer's output that counts its rows."""
    return -1 if isinstance(module, nn.Linear) else 1


def _differ(network: nn.Module, other: nn.Module) -> bool:
    """Whether any parameter does: a weight that is computed anew undoes a map."""
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


def _is_homogeneous(call: _Call) -> bool:
    """Whether a module without parameters scales with its inputs, up and down."""
    if next(call.module.parameters(), None) is not None:
        return False
    with torch.no_grad():
        return all(
            torch.equal(call.module(factor * call.given), factor * call.returned)
            for factor in (0.5, 2.0**16)
        )


def _following(calls: Mapping[str, _Call]) -> Iterator[tuple[_Call, _Call]]:
    """Each call with the only one that takes its output."""
    for call in calls.values():
        takers = [
            other
            for other in calls.values()
            if other is not call and other.given is call.returned
        ]
        if len(takers) == 1:
            yield call, takers[0]


def _watched(network: nn.Module, inputs: Any) -> dict[str, _Call]:
    """The calls of modules without children, of those called once on one tensor."""
    calls: dict[str, list[_Call | None]] = {}

    def note(name: str, module: nn.Module, given: Any, out: Any) -> None:
        single = len(given) == 1 and isinstance(given[0], Tensor)
        fits = single and isinstance(out, Tensor) and out is not given[0]
        call = _Call(name, module, given[0], out) if fits else None
        calls.setdefault(name, []).append(call)

    with ExitStack() as hooks, _out_of_place(network), torch.no_grad():
        for name, module in network.named_modules():
            if next(module.children(), None) is None:
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
        _call(network, inputs)
    return {name: c[0] for name, c in calls.items() if len(c) == 1 and c[0] is not None}


def _out_of_place(network: nn.Module) -> AbstractContextManager[None]:
    """With every in-place activation writing into a tensor of its own."""
    changed = [m for m in network.modules() if getattr(m, "inplace", False) is True]
    return held([(module, "inplace", False) for module in changed])


def _drift(network: nn.Module, other: nn.Module, inputs: Any) -> float:
    with torch.no_grad():
        return relative_change(_call(network, inputs), _call(other, inputs))


def relative_change(before: Tensor, after: Tensor) -> float:
    """Largest change of an entry, over the largest entry."""
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))


def _call(network: nn.Module, inputs: Any) -> Tensor:
    inputs = tree_map(lambda part: part.clone(), inputs)  # the model may write on them
    result = call_model(network, inputs)
    sound, got = isinstance(result, Tensor), type(result).__name__
    ensure(sound, "model", "return one tensor for an audit", got, kind=TypeError)
    outputs: Tensor = result
    return outputs
