"""Models whose parameters lie on several processes (FSDP2, tensor parallel), in parts.

A module is copied without its wrapper, with this process's part of every parameter as a
plain tensor. A layer gathers its parameters when it is called, and again in each of its
two backward passes; what it gives back is the sum over processes of its gradient, this
one's part. So autograd sees plain tensors and plain functions, everything that is kept
between passes is as large as a part, and no process ever holds more than a layer whole.

FSDP2's own modules cannot be differentiated twice (their storage is freed by hooks in the
first backward pass), and forward mode does not pass through a DTensor's collectives; tests
say when PyTorch 2.13 is no longer so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from sharpness._arguments import ensure
from sharpness._ranks import Ranks, Vectors, normals
from sharpness.risk.model_state import evaluation

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_state_dict_hooks", "_state_dict_pre_hooks"),
    "_load_state_dict_pre_hooks",
)
_A_TENSOR = object()  # stands where a tensor was, among what a layer is given or returns


@dataclass(frozen=True)
class Place:
    """How a parameter is spread: along one dimension, ceil(size / W) rows a process."""

    shape: torch.Size
    dim: int
    ranks: Ranks = field(repr=False, compare=False)

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows."""
        whole = whole.reshape(self._at_least_1d)
        span = self.ranks.span(whole.shape[self.dim])
        return whole.narrow(self.dim, span.start, span.stop - span.start)

    def block(self, part: Tensor) -> Tensor:
        """This process's rows, padded to as many as any has: flat."""
        rows = part.movedim(self.dim, 0)
        padded = rows.new_zeros((self._rows, *rows.shape[1:]))
        padded[: len(rows)] = rows
        return padded.reshape(-1)

    def unblocked(self, block: Tensor) -> Tensor:
        """This process's rows, from what `block` makes of them."""
        span = self.ranks.span(self._at_least_1d[self.dim])
        rows = block.view(self._rows, *self._others)[: span.stop - span.start]
        return rows.movedim(0, self.dim)

    def blocks(self, whole: Tensor) -> Tensor:
        """The whole as a block for each process, (W, block)."""
        rows = whole.reshape(self._at_least_1d).movedim(self.dim, 0)
        num = self.ranks.size
        padded = rows.new_zeros((num * self._rows, *rows.shape[1:]))
        padded[: len(rows)] = rows
        return padded.view(num, -1)

    def joined(self, blocks: Tensor) -> Tensor:
        """The whole, from what `blocks` makes of it."""
        rows = blocks.reshape(-1, *self._others)[: self._at_least_1d[self.dim]]
        return rows.movedim(0, self.dim).reshape(self.shape)

    @property
    def size(self) -> int:
        """Entries of a block."""
        return self._rows * prod(self._others)

    @property
    def _rows(self) -> int:
        return -(-self._at_least_1d[self.dim] // self.ranks.size)

    @property
    def _others(self) -> list[int]:
        shape = list(self._at_least_1d)
        return [*shape[: self.dim], *shape[self.dim + 1 :]]

    @property
    def _at_least_1d(self) -> torch.Size:
        return self.shape or torch.Size([1])


def gathered(places: Sequence[Place], parts: Sequence[Tensor]) -> list[Tensor]:
    """Several parameters whole. Cost: one all-gather (for each of their types)."""

    def together(some: Sequence[Place], own: Sequence[Tensor]) -> list[Tensor]:
        ranks, flat = (
            some[0].ranks,
            torch.cat(
                [place.block(part.detach()) for place, part in zip(some, own, strict=True)]
            ),
        )
        every = ranks.gathered(flat, len(flat) * ranks.size).view(ranks.size, -1)
        blocks = every.split([place.size for place in some], dim=1)
        return [place.joined(block) for place, block in zip(some, blocks, strict=True)]

    return _by_type(together, places, parts)


def scattered(places: Sequence[Place], wholes: Sequence[Tensor]) -> list[Tensor]:
    """This process's parts of their sums over processes. Cost: one reduce-scatter."""

    def together(some: Sequence[Place], wholes: Sequence[Tensor]) -> list[Tensor]:
        ranks, blocks = (
            some[0].ranks,
            torch.cat(
                [
                    place.blocks(each.detach())
                    for place, each in zip(some, wholes, strict=True)
                ],
                dim=1,
            ),
        )
        own = ranks.scattered(blocks.reshape(-1)).split([place.size for place in some])
        return [place.unblocked(block) for place, block in zip(some, own, strict=True)]

    return _by_type(together, places, wholes)


def _by_type(
    together: Callable[[Sequence[Place], Sequence[Tensor]], list[Tensor]],
    places: Sequence[Place],
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    """Tensors of one type at a time, in their order."""
    found: dict[int, Tensor] = {}
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
        at = [i for i, tensor in enumerate(tensors) if tensor.dtype == kind]
        done = together([places[i] for i in at], [tensors[i] for i in at])
        found.update(zip(at, done, strict=True))
    return [found[i] for i in range(len(tensors))]


class Parts(Vectors):
    """Vectors that every process only ever has its part of, as of the parameters.

    Args:
        places: of the parameters that form theta, in order.
        ranks: the processes.
    """

    def __init__(self, places: Sequence[Place], ranks: Ranks) -> None:
        super().__init__(sum(prod(place.shape) for place in places), ranks)
        self._places, self.may_be_cut_anew = places, False

    def collected(self, parts: Tensor) -> Tensor:
        """Layers have summed them."""
        return parts

    def part(self, whole: Tensor) -> Tensor:
        """This process's entries of a vector (n,)."""
        pieces = whole.split([prod(place.shape) for place in self._places])
        return torch.cat(
            [
                place.part(piece.view(place.shape)).reshape(-1)
                for place, piece in zip(self._places, pieces, strict=True)
            ]
        )

    def whole(self, part: Tensor) -> Tensor:
        """The vector (n,): for small models."""
        found = []
        for place in self._places:
            own = place.part(torch.empty(place.shape, device="meta")).shape
            piece, part = part[: prod(own)], part[prod(own) :]
            found += [w.reshape(-1) for w in gathered([place], [piece.view(own)])]
        return torch.cat(found)

    def normal(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Own entries of a standard normal vector, drawn a parameter at a time."""
        draws, left, found = normals(self.n, generator), torch.empty(0), []
        for place in self._places:
            pieces, missing = [left], prod(place.shape) - len(left)
            while missing > 0:
                pieces.append(next(draws))
                missing -= len(pieces[-1])
            both = torch.cat(pieces)
            piece, left = both[: prod(place.shape)], both[prod(place.shape) :]
            found.append(place.part(piece.view(place.shape)).reshape(-1))
        return torch.cat(found).to(device=like.device, dtype=like.dtype)


def is_sharded(model: Any) -> bool:
    """Whether a parameter is a DTensor: of FSDP2, or of tensor parallelism."""
    return any(hasattr(p, "placements") for p in _parameters(model))


def _parameters(model: Any) -> Iterator[Any]:
    return model.parameters() if isinstance(model, nn.Module) else iter(())


def in_parts(model: nn.Module) -> tuple[nn.Module, dict[str, Place], Ranks]:
    """A module like this one, with this process's part of each parameter.

    Raises:
        ValueError: a mesh of several dimensions, or parameters that are partial sums.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "reshard"):  # FSDP2: after a forward pass they may be whole
            module.reshard()
    mesh = next(p.device_mesh for p in _parameters(model) if hasattr(p, "placements"))
    ensure(
        mesh.ndim == 1,
        "model",
        "lie on a mesh of one dimension",
        f"one of shape {tuple(mesh.shape)}",
        "Use plain FSDP2 or plain tensor parallelism.",
    )
    ranks = Ranks(mesh.get_group())
    builder = _Builder(ranks)
    copied = builder.copied(model)
    builder.gather(model, copied)
    return (
        copied,
        {name: builder.places[id(p)] for name, p in copied.named_parameters()},
        ranks,
    )


class _Builder:
    """Copies a module tree: parameters in parts, or none at all (on the meta device)."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
        self._emptied: dict[int, nn.Parameter] = {}
        self._modules: dict[int, nn.Module] = {}  # and a layer with two names one
        self.places: dict[int, Place] = {}  # by the id of the copy

    def copied(self, module: nn.Module, *, empty: bool = False) -> nn.Module:
        """The module without wrapper and hooks of wrappers."""
        if not empty and id(module) in self._modules:
            return self._modules[id(module)]
        wrapped = hasattr(module, "reshard")
        kind: Any = type(module).__mro__[2] if wrapped else type(module)
        other: nn.Module = kind.__new__(kind)
        if not empty:
            self._modules[id(module)] = other
        vars(other).update(vars(module))
        spread = any(hasattr(p, "placements") for p in module.parameters())
        for name in _HOOKS if wrapped or spread else ():
            if name in vars(module):
                vars(other)[name] = OrderedDict()
        parameters = module._parameters.items()
        make = self._empty if empty else self._part
        vars(other)["_parameters"] = {k: p if p is None else make(p) for k, p in parameters}
        vars(other)["_buffers"] = {k: _plain(b) for k, b in module._buffers.items()}
        vars(other)["_modules"] = {
            k: m if m is None else self.copied(m, empty=empty)
            for k, m in module._modules.items()
        }
        if empty:
            other.training = False
        elif getattr(module, "padding_idx", None) is not None:
            vars(other)["padding_idx"] = None  # a row of the whole; the layer knows it
        return other

    def _part(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self._made:
            place, own = self._placed(parameter)
            made = nn.Parameter(own, requires_grad=parameter.requires_grad)
            self._made[id(parameter)], self.places[id(made)] = made, place
        return self._made[id(parameter)]

    def _placed(self, parameter: Any) -> tuple[Place, Tensor]:
        placement = getattr(parameter, "placements", [None])[0]
        dim = getattr(placement, "dim", None)
        is_sum = placement is not None and placement.is_partial()
        ensure(not is_sum, "model", "have parameters that are whole or sharded", "sums")
        local = _local(parameter).detach()
        if dim is None:  # the same on all processes: each takes its part of it
            place = Place(parameter.shape, 0, self.ranks)
            return place, place.part(local).clone()
        return Place(parameter.shape, dim % parameter.ndim, self.ranks), local

    def _empty(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self._emptied:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            self._emptied[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
        return self._emptied[id(parameter)]

    def gather(self, model: nn.Module, copied: nn.Module, root: bool = True) -> None:
        """Let every layer of the copy gather its parameters when it is called.

        A layer is what FSDP2 wraps, but for the root and for what holds others; elsewhere
        a module without children, or attention, which uses its children's parameters.
        """
        inside = any(hasattr(module, "reshard") for module in list(model.modules())[1:])
        is_unit = hasattr(model, "reshard") and not root and not inside
        has_own = any(True for _ in model.parameters(recurse=False))
        has_children = any(True for _ in model.children())
        if is_unit or isinstance(model, nn.MultiheadAttention):
            vars(copied)["forward"] = self._layer(model, copied)
            return
        if has_own and not has_children:
            vars(copied)["forward"] = self._layer(model, copied)
        elif has_own:
            places = self._places_of(copied, recurse=False)
            vars(copied)["forward"] = _Container(copied, places)
        for child, other in zip(model.children(), copied.children(), strict=True):
            self.gather(child, other, root=False)

    def _layer(self, model: nn.Module, copied: nn.Module) -> _Layer:
        return _Layer(copied, self.copied(model, empty=True), self._places_of(copied))

    def _places_of(self, copied: nn.Module, recurse: bool = True) -> dict[str, Place]:
        named = copied.named_parameters(recurse=recurse)
        return {name: self.places[id(parameter)] for name, parameter in named}


class _Container:
    """The forward pass of a module with children and parameters of its own, gathered."""

    def __init__(self, module: nn.Module, places: Mapping[str, Place]) -> None:
        self._module, self._places = module, places

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own: dict[str, Any] = self._module._parameters
        parts = {name: own[name] for name in self._places}
        try:
            for name, place in self._places.items():
                own[name] = _Gathered.apply(place, parts[name])  # type: ignore[no-untyped-call]
            return type(self._module).forward(self._module, *args, **kwargs)
        finally:
            own.update(parts)


class _Layer:
    """The forward pass of a layer whose parameters are gathered for it alone.

    Args:
        module: the copy that holds the parts.
        twin: the same layer without any parameters.
        places: of its parameters, by name.
    """

    def __init__(
        self, module: nn.Module, twin: nn.Module, places: Mapping[str, Place]
    ) -> None:
        self._module, self._twin, self._places = module, twin, places

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parts = dict(self._module.named_parameters())  # as `functional_call` has set them
        leaves, spec = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = [_A_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        buffers = dict(self._module.named_buffers())
        call = _Call(self._twin, self._places, buffers, constants, spec)
        own = [parts[name] for name in self._places]
        return call.restored(_Forward.apply(call, *own, *inputs))  # type: ignore[no-untyped-call]


class _Call:
    """One call of a layer: everything but its tensors."""

    def __init__(
        self,
        twin: nn.Module,
        places: Mapping[str, Place],
        buffers: Mapping[str, Tensor],
        constants: Sequence[Any],
        spec: Any,
    ) -> None:
        self._twin, self._names, self._buffers = twin, list(places), buffers
        self._places, self.num = list(places.values()), len(places)
        self._constants, self._spec = constants, spec
        self._result: tuple[list[Any], Any] = [], None  # leaves, and what holds them
        self.smooth: list[bool] = []  # which outputs can have a gradient
        self._autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        self._types = torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")

    def whole(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Parameters from all processes."""
        return gathered(self._places, parts)

    def chosen(self, needed: Sequence[bool]) -> list[Place]:
        """Places of the parameters whose gradient is needed."""
        return [p for p, need in zip(self._places, needed, strict=False) if need]

    def outputs(self, whole: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the layer returns, as tensors."""
        given = iter(inputs)
        filled = [next(given) if x is _A_TENSOR else x for x in self._constants]
        args, kwargs = tree_unflatten(filled, self._spec)
        state = {**self._buffers, **dict(zip(self._names, whole, strict=True))}
        with self._as_it_was():
            result = functional_call(self._twin, state, args, kwargs)
        leaves, spec = tree_flatten(result)
        self._result = [_A_TENSOR if isinstance(x, Tensor) else x for x in leaves], spec
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.smooth = [each.is_floating_point() for each in found]
        return found

    def restored(self, outputs: Any) -> Any:
        """Tensors as the layer returns them."""
        tensors, (constants, spec) = iter(outputs), self._result
        leaves = [next(tensors) if x is _A_TENSOR else x for x in constants]
        return tree_unflatten(leaves, spec)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The state of the forward pass, also where this is called by a backward pass."""
        with ExitStack() as stack:
            stack.enter_context(evaluation(self._twin, "running"))
            for device, on, kind in zip(
                ("cpu", "cuda"), self._autocast, self._types, strict=True
            ):
                if on:
                    stack.enter_context(torch.autocast(device, kind))
            yield


class _Gathered(Function):
    """Parts -> the whole; its derivative is the sum of what comes back, in parts."""

    @staticmethod
    def forward(ctx: Any, place: Place, part: Tensor) -> Tensor:
        ctx.place = place
        return gathered([place], [part])[0]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return None, _Scattered.apply(ctx.place, slope)  # type: ignore[no-untyped-call]


class _Scattered(Function):
    """The whole -> this process's part of the sum."""

    @staticmethod
    def forward(ctx: Any, place: Place, whole: Tensor) -> Tensor:
        ctx.place = place
        return scattered([place], [whole])[0]

    @staticmethod
    def backward(ctx: Any, part: Tensor) -> Any:
        return None, _Gathered.apply(ctx.place, part)  # type: ignore[no-untyped-call]


class _Forward(Function):
    """A layer as a function of the parts of its parameters and of its inputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Any:
        outputs = call.outputs(call.whole(tensors[: call.num]), tensors[call.num :])
        ctx.call = call
        ctx.save_for_backward(*tensors)
        pairs = zip(outputs, call.smooth, strict=True)
        ctx.mark_non_differentiable(*(each for each, smooth in pairs if not smooth))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        pairs = zip(slopes, call.smooth, strict=True)
        smooth = [slope for slope, is_smooth in pairs if is_smooth]
        found = iter(
            _Backward.apply(call, needed, len(smooth), *smooth, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        )
        return None, *(next(found) if need else None for need in needed)


class _Backward(Function):
    """The gradients of a layer, as a function of theirs, of parts and of inputs.

    The layer is computed again, here and in this function's own backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, needed: Sequence[bool], num: int, *tensors: Tensor
    ) -> Any:
        ctx.call, ctx.needed, ctx.num = call, needed, num
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            slopes = _Backward._slopes(call, needed, num, tensors, again=False)[-1]
        of_parameters = sum(needed[: call.num])
        chosen = call.chosen(needed)
        parts = scattered(chosen, slopes[:of_parameters])
        return *parts, *(slope.detach() for slope in slopes[of_parameters:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *along: Tensor) -> Any:
        call, needed = ctx.call, ctx.needed
        chosen = call.chosen(needed)
        num = len(chosen)
        directions = [*gathered(chosen, along[:num]), *along[num:]]
        with torch.enable_grad():
            given, points, slopes = _Backward._slopes(
                call, needed, ctx.num, ctx.saved_tensors, again=True
            )
        curved = [
            (slope, way)
            for slope, way in zip(slopes, directions, strict=True)
            if slope.requires_grad
        ]
        leaves = [*given, *points]
        if curved:
            found = torch.autograd.grad(
                [slope for slope, _ in curved],
                leaves,
                [way for _, way in curved],
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            found = tuple(torch.zeros_like(leaf) for leaf in leaves)
        to_given, to_points = found[: len(given)], found[len(given) :]
        wanted = iter([*scattered(chosen, to_points[:num]), *to_points[num:]])
        results = [next(wanted) if need else None for need in needed]
        return None, None, None, *to_given, *results

    @staticmethod
    def _slopes(
        call: _Call,
        needed: Sequence[bool],
        num: int,
        tensors: Sequence[Tensor],
        again: bool,
    ) -> tuple[list[Tensor], list[Tensor], Sequence[Tensor]]:
        """What came in, the points that slopes are wanted at, and the slopes there."""
        given = [slope.detach().requires_grad_(again) for slope in tensors[:num]]
        parts, inputs = tensors[num : num + call.num], tensors[num + call.num :]
        at = [*call.whole(parts), *(each.detach() for each in inputs)]
        for each, need in zip(at, needed, strict=True):
            each.requires_grad_(need)
        outputs = call.outputs(at[: call.num], at[call.num :])
        smooth = [each for each, yes in zip(outputs, call.smooth, strict=True) if yes]
        pairs = [(z, s) for z, s in zip(smooth, given, strict=True) if z.requires_grad]
        points = [each for each, need in zip(at, needed, strict=True) if need]
        slopes = torch.autograd.grad(
            [z for z, _ in pairs],
            points,
            [s for _, s in pairs],
            create_graph=again,
            allow_unused=True,
            materialize_grads=True,
        )
        return given, points, slopes


def _plain(buffer: Any) -> Any:
    return buffer.full_tensor() if hasattr(buffer, "placements") else buffer


def _local(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local() if hasattr(parameter, "placements") else parameter
    return local
