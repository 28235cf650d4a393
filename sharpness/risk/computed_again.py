r"""Blocks of a model that keep no graph: each is computed again where it is needed.

A language model is a list of equal blocks y = B(x, W). The graph of a product holds what
every one of them computed, and what computing their gradients computed. Here it holds x,
W and y's gradient g of each, and the graph of one block at a time:

    value      y                                            one pass through the block
    gradient   J^T g by x and W                             one more, and back
    product    its derivatives along a direction, by x, W   one more, back, and back
               and g                                        through that

The graph of one block is that of PyTorch: nothing is approximated. A product takes ten
matrix products a layer, where a kept graph takes six and one made anew each time nine.
PyTorch's own checkpoints hold everything again once a gradient has a graph
(`create_graph=True`), since they know no second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from sharpness.risk.memory import graph_nodes
from sharpness.risk.model_state import (
    batchnorm_layers,
    evaluation,
    layers_may_run_again,
    random_states,
)


class NotAgainError(Exception):
    """A block would not give the same a second time: with its graph kept, it works.

    No RuntimeError, for which `engine="auto"` takes differences of gradients instead.
    """


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of lists of layers of one kind, each of several layers itself.

    The outermost ones; none where BatchNorm connects rows.
    """
    found: dict[str, nn.Module] = {}
    if batchnorm_layers(model):
        return []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        members = list(module)
        alike = len({type(member) for member in members}) == 1
        if len(members) > 1 and alike and all(_is_a_block(member) for member in members):
            found |= {f"{name}.{key}": member for key, member in module.named_children()}
    return list(dict.fromkeys(found.values()))


def _is_a_block(module: nn.Module) -> bool:
    return sum(bool(layer._parameters) for layer in module.modules()) > 1


@contextmanager
def without_graphs(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these keep no graph where they are called."""
    before = [(block, vars(block).get("forward")) for block in blocks]
    inside = [True]
    try:
        for block in blocks:
            vars(block)["forward"] = _wrapped(block, block.forward, inside)
        yield
    finally:
        inside.clear()
        for block, own in before:
            vars(block).pop("forward", None)
            if own is not None:
                vars(block)["forward"] = own


def _wrapped(
    block: nn.Module, forward: Callable[..., Any], inside: list[bool]
) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        call = _Call(block, forward, args, kwargs, inside)
        return call.result(_apply(_Value, call, *call.tensors()))

    return called


class _Call:
    """One call of a block: its tensors, and how it is made again with others."""

    def __init__(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        inside: list[bool],
    ) -> None:
        self._block, self._forward, self._inside = _Forward(block), forward, inside
        self._attributes = _attributes(block)
        state = (*self._block.named_parameters(), *self._block.named_buffers())
        self._names = [name for name, _ in state]
        self._given, self._how = tree_flatten((args, kwargs))
        self._places = [i for i, x in enumerate(self._given) if isinstance(x, Tensor)]
        self._state: list[Tensor] = [tensor for _, tensor in state]
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {tensor.device.type for tensor in self.tensors()}
        }

    def tensors(self) -> list[Tensor]:
        """What the block is a function of; handed out once, to autograd."""
        return [*self._state, *(self._given[i] for i in self._places)]

    def first(self) -> list[Tensor]:
        """The block's tensors, made the first time."""
        before, versions = random_states(), self._versions()
        args, kwargs = tree_unflatten(self._given, self._how)
        made, self._made_how = tree_flatten(self._forward(*args, **kwargs))
        if self._versions() != versions:
            raise NotAgainError("a block changes in place what it is given")
        if not all(isinstance(part, Tensor) for part in made):
            raise NotAgainError("a block returns more than tensors")
        if random_states() != before:
            raise NotAgainError("a block draws random numbers")
        self._seen = _traits(made)
        self._state, self._forward = [], _spent
        self._given = [None if isinstance(x, Tensor) else x for x in self._given]
        return made

    def _versions(self) -> list[int]:
        """How often each tensor was written to."""
        return [tensor._version for tensor in self.tensors()]

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same from other tensors, with a graph."""
        if self._inside:
            raise NotAgainError("a model takes derivatives by itself")
        num, given = len(self._names), list(self._given)
        for place, tensor in zip(self._places, tensors[num:], strict=True):
            given[place] = tensor
        args, kwargs = tree_unflatten(given, self._how)
        state = dict(zip(self._names, tensors[:num], strict=True))
        with (
            _holding(self._block.block, self._attributes),
            evaluation(self._block, "running"),
            layers_may_run_again(),
            self._autocasting(),
            torch.enable_grad(),
        ):
            made = tree_flatten(functional_call(self._block, state, args, kwargs))[0]
        if not _alike(_traits(made), self._seen):
            raise NotAgainError("a block made something else the second time")
        return made

    @contextmanager
    def _autocasting(self) -> Iterator[None]:
        (kind, (enabled, dtype)), *more = self._autocast.items()
        if more:
            raise NotAgainError("a block takes tensors of several devices")
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            yield

    def result(self, made: tuple[Tensor, ...]) -> Any:
        """What the block returns, of those tensors."""
        return tree_unflatten(list(made), self._made_how)


_OF_ANY_MODULE = {*vars(nn.Module()), "forward"}


def _attributes(block: nn.Module) -> list[dict[str, Any]]:
    """What a model may have left in each module of a block for this call, as a mask is.

    Not what has a graph: it would hold that of the call before, and so on.
    """
    return [
        {
            name: value
            for name, value in vars(module).items()
            if name not in _OF_ANY_MODULE and not _has_graph(value)
        }
        for module in block.modules()
    ]


def _has_graph(value: Any) -> bool:
    leaves = tree_flatten(value)[0]
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


@contextmanager
def _holding(block: nn.Module, attributes: Sequence[dict[str, Any]]) -> Iterator[None]:
    """With these in the modules of a block."""
    modules = list(block.modules())
    before = [dict(vars(module)) for module in modules]
    try:
        for module, then in zip(modules, attributes, strict=True):
            vars(module).update(then)
        yield
    finally:
        for module, now in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(now)


_Traits = list[tuple[Tensor, Tensor, float]]


def _traits(made: Sequence[Tensor]) -> _Traits:
    """Of each tensor: sum, norm, and by how much of the norm both may be off."""
    found = []
    for part in (part.detach() for part in made if part.is_floating_point()):
        wide = torch.promote_types(part.dtype, torch.float32)
        norm = torch.linalg.vector_norm(part, dtype=wide)
        found.append((part.sum(dtype=wide), norm, torch.finfo(part.dtype).eps ** 0.5))
    return found


def _alike(some: _Traits, others: _Traits) -> bool:
    """Whether they may be of the same tensors: a mask, say, may have changed meanwhile."""
    return not any(
        bool((a - b).abs() > tol * norm)
        for (total, norm, tol), (first, first_norm, _) in zip(some, others, strict=True)
        for a, b in ((total, first), (norm, first_norm))
    )


def _spent(*_: Any, **__: Any) -> Any:
    raise AssertionError("a call is made once")


class _Forward(nn.Module):
    """A block without its hooks, which run around the whole call."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block.forward(*args, **kwargs)


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


class _Value(torch.autograd.Function):
    """(call, its tensors) -> what the block makes of them."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = tuple(call.first())
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return made

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> Any:
        needs, tensors = ctx.needs_input_grad[1:], ctx.saved_tensors
        places = [i for i, part in enumerate(g) if part is not None]
        along = [part for part in g if part is not None]
        if not along:
            return (None,) * (1 + len(tensors))
        found = iter(_apply(_Slopes, ctx.call, needs, places, *tensors, *along))
        return (None, *(next(found) if need else None for need in needs))


class _Slopes(torch.autograd.Function):
    """(call, which are needed, places of g, tensors, g) -> J^T g by those needed."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, needs: Sequence[bool], places: Sequence[int], *given: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.needs, ctx.places = call, needs, places
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        return _slopes(call, needs, places, _leaves(given, needs), create_graph=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *direction: Tensor | None) -> Any:
        given, needs = _leaves(ctx.saved_tensors, ctx.needs, True), ctx.needs
        slopes = _slopes(ctx.call, needs, ctx.places, given, create_graph=True)
        curved = [
            (slope, along)
            for slope, along in zip(slopes, direction, strict=True)
            if along is not None and slope.requires_grad
        ]
        moving = [leaf for leaf in given if leaf.requires_grad]
        if not curved:
            return (None,) * (3 + len(given))
        found = iter(
            torch.autograd.grad(
                [slope for slope, _ in curved],
                moving,
                [along for _, along in curved],
                allow_unused=True,
            )
        )
        return (
            *(None, None, None),
            *(next(found) if leaf.requires_grad else None for leaf in given),
        )


def _leaves(
    given: Sequence[Tensor], needs: Sequence[bool], slopes_too: bool = False
) -> list[Tensor]:
    """The tensors that are needed, and g if asked for, to be differentiated in."""
    wanted = [*needs, *([slopes_too] * (len(given) - len(needs)))]
    return [
        tensor.detach().requires_grad_(want and tensor.is_floating_point())
        for tensor, want in zip(given, wanted, strict=True)
    ]


def _slopes(
    call: _Call,
    needs: Sequence[bool],
    places: Sequence[int],
    given: Sequence[Tensor],
    create_graph: bool,
) -> tuple[Tensor, ...]:
    tensors, g = given[: len(needs)], given[len(needs) :]
    made = call.again(tensors)
    values = [made[place] for place in places]
    wanted = [leaf for leaf, need in zip(tensors, needs, strict=True) if need]
    _check_leaves(values, wanted)
    linked = [pair for pair in zip(values, g, strict=True) if pair[0].requires_grad]
    with torch.enable_grad():
        return torch.autograd.grad(
            [value for value, _ in linked],
            wanted,
            [along for _, along in linked],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )


def _check_leaves(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """That the block depends on nothing but what it was seen to be given."""
    known = {id(leaf) for leaf in wanted}
    for node in graph_nodes(values):
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise NotAgainError("a block depends on a tensor that it was not given")
