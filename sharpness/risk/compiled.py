"""Exact products traced once, split by what depends on the direction, and compiled.

`make_fx` writes a chunk's product down as plain tensor operations: reverse mode twice,
with both backward passes spelled out. Nodes that do not depend on the direction form
the primal part, run once a chunk; the others the tangent part, run once a product,
which `torch.compile` fuses. What crosses from one to the other is kept.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from sharpness.risk.kept_graph import ChunkedSum, KeptGraph
from sharpness.risk.memory import nests_transforms


class UnsuitableError(RuntimeError):
    """This product cannot be traced or compiled; another engine can do it."""


class CompiledProduct:
    """v -> M v, one row at a time.

    Shapes are fixed in a trace: chunks of the most frequent shape are traced, the others
    keep their graph.

    Args:
        work: the matrix.
        budget: bytes that may be held between products.

    Raises:
        UnsuitableError: what is traced draws random numbers or branches on values, there
            is no compiler, or a check against the kept graph fails.
    """

    def __init__(self, work: ChunkedSum, budget: int) -> None:
        kinds = [_kind(batch) for batch in work.batches]
        common = Counter(kinds).most_common(1)[0][0]
        self._own = [i for i, kind in enumerate(kinds) if kind == common]
        self._work = work
        other = [i for i, kind in enumerate(kinds) if kind != common]
        self._rest = KeptGraph(work.of(other), len(other)) if other else None
        first = self._own[0]
        self._primal, tangent = split(trace_product(work, first), len(work.leaves))
        kept = self._residuals(first)
        self.held_bytes = _own_bytes(
            kept, [*work.leaves, *_tensors_of(work.batches[first])]
        )
        self.num_kept = min(len(self._own), max(1, budget // max(1, self.held_bytes)))
        self._kept = {first: kept}
        self._tangent = _compiled(tangent)
        for i in self._own:  # a constant of the first may be wrong for another
            self._check(i)

    def __call__(self, v: Tensor) -> Tensor:
        """M v for (n,), or for each row of (b, n)."""
        if v.ndim == 2:
            return torch.stack([self(row) for row in v])
        total = self._rest(v) if self._rest else torch.zeros_like(v)
        pieces = self._work.split(v)
        for place, i in enumerate(self._own):
            self._work.add(total, self._product(place, pieces), i)
        return total

    def _product(self, place: int, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        i = self._own[place]
        kept = self._kept.get(i) or self._residuals(i)
        if place < self.num_kept:
            self._kept[i] = kept
        return self._tangent(*pieces, *kept)

    def _residuals(self, i: int) -> Sequence[Tensor]:
        leaves = [leaf.detach() for leaf in self._work.leaves]
        with torch.no_grad():
            kept: Sequence[Tensor] = self._primal(
                *leaves, *_tensors_of(self._work.batches[i])
            )
        return kept

    def _check(self, i: int) -> None:
        """One product of one chunk against the kept graph's."""
        leaves = self._work.leaves
        draw = torch.Generator().manual_seed(0)
        pieces = [torch.randn(x.shape, generator=draw).to(x) for x in leaves]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compilers warn of themselves
            mine = self._tangent(*pieces, *(self._kept.get(i) or self._residuals(i)))
        other = self._work.linearised(i)(pieces)
        apart = sum(
            float((a - b).double().norm() ** 2) for a, b in zip(mine, other, strict=True)
        )
        size = sum(float(b.double().norm() ** 2) for b in other)
        rounding = max(torch.finfo(x.dtype).eps for x in leaves)
        if not apart <= (1e4 * rounding) ** 2 * size:
            raise UnsuitableError(
                "its product parts from the kept graph's by a relative "
                f"{(apart / size) ** 0.5 if size else float('inf'):.1e}"
            )


def trace_product(work: ChunkedSum, chunk: int) -> fx.GraphModule:
    """A chunk's product as a graph of (leaves, pieces, the batch's tensors)."""
    parts, spec = tree_flatten(work.batches[chunk])
    num = len(work.leaves)

    def product(*flat: Tensor) -> list[Tensor]:
        left = iter(flat[2 * num :])
        filled = [next(left) if isinstance(part, Tensor) else part for part in parts]
        leaves = [leaf.detach().requires_grad_() for leaf in flat[:num]]
        apply = work.linearise(leaves, tree_unflatten(filled, spec))
        return list(apply(flat[num : 2 * num]))

    leaves = [leaf.detach() for leaf in work.leaves]
    flat = [*leaves, *(torch.ones_like(x) for x in leaves), *_tensors_of(parts)]
    with work.evaluating():
        if nests_transforms(lambda: work.linearise(work.leaves, work.batches[chunk])):
            raise UnsuitableError("it uses the transforms of torch.func inside")
        graph: fx.GraphModule = make_fx(product)(*flat)
    if any(_writes(node) for node in graph.graph.nodes):
        graph = make_fx(functionalize(graph, remove="mutations"))(*flat)
    if any(torch.Tag.dynamic_output_shape in _tags(n) for n in graph.graph.nodes):
        _FixedShapes(graph).run(*flat)
    drawing = [
        str(n.target)
        for n in graph.graph.nodes
        if torch.Tag.nondeterministic_seeded in _tags(n)
    ]
    if drawing:
        raise UnsuitableError(f"it draws random numbers ({drawing[0]})")
    return graph


class _FixedShapes(fx.Interpreter):
    """Runs a graph, and refuses shapes that depend on values: a trace holds them fast."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Refuse `nonzero` and the like, and indexing by masks."""
        if torch.Tag.dynamic_output_shape in getattr(target, "tags", ()):
            indices = [t for t in tree_flatten(args[1:])[0] if isinstance(t, Tensor)]
            masks = [t for t in indices if t.dtype in (torch.bool, torch.uint8)]
            if masks or not indices:
                raise UnsuitableError(f"shapes depend on values ({target})")
        return super().call_function(target, args, kwargs)


def split(graph: fx.GraphModule, num_leaves: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(primal, tangent): primal(leaves, tensors) -> kept; tangent(pieces, kept) -> M v."""
    *nodes, result = graph.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    directions = inputs[num_leaves : 2 * num_leaves]
    moving = _descendants(directions, nodes)
    kept = _kept(nodes, moving, result)

    primal, there = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        if node not in moving:
            there[node] = primal.node_copy(node, there.__getitem__)
    primal.output(tuple(there[node] for node in kept))
    primal.eliminate_dead_code()

    tangent, here = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in directions:
        here[node] = tangent.placeholder(node.name)
    for node in kept:
        here[node] = tangent.placeholder("kept_" + node.name)
    wanted = _wanted(nodes, moving, set(kept), result)
    for node in nodes:
        if node in wanted and node not in here:
            here[node] = tangent.node_copy(node, here.__getitem__)
    tangent.output(fx.map_arg(result.args[0], here.__getitem__))
    tangent.eliminate_dead_code()
    return fx.GraphModule(graph, primal), fx.GraphModule(graph, tangent)


def _descendants(sources: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in nodes:
        found |= {node} if found.intersection(node.all_input_nodes) else set()
    return found


def _kept(nodes: Sequence[fx.Node], moving: set[fx.Node], result: fx.Node) -> list[fx.Node]:
    """What crosses from the primal to the tangent part; of a view, what it looks at.

    Elementwise results are kept although they could be computed again: compiled, that
    made F1's product a fifth slower and spared a fifth of the memory.
    """
    crossing = [n for n in nodes if any(u in moving or u is result for u in n.users)]
    kept = {_base(node) for node in crossing if node not in moving}
    return sorted(node for node in kept if node.op != "get_attr")


def _wanted(
    nodes: Sequence[fx.Node], moving: set[fx.Node], kept: set[fx.Node], result: fx.Node
) -> set[fx.Node]:
    """Nodes of the tangent part: the moving ones, and what is computed again for them."""
    wanted = {*moving, *result.all_input_nodes}
    for node in reversed(nodes):
        if node in wanted and node not in kept:
            wanted |= set(node.all_input_nodes)
    return wanted


def _base(node: fx.Node) -> fx.Node:
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _tags(node: fx.Node) -> Sequence[torch.Tag]:
    tags: Sequence[torch.Tag] = getattr(node.target, "tags", ())
    return tags


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable or len(node.all_input_nodes) != 1:
        return False
    return any(value.alias_info is not None for value in schema.returns)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _compiled(tangent: fx.GraphModule) -> Callable[..., Sequence[Tensor]]:
    compiled = torch.compile(tangent, fullgraph=True, dynamic=False)

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():  # always, or a change of mode would compile again
            result: Sequence[Tensor] = compiled(*tensors)
        return result

    return run


def _tensors_of(batch: Any) -> list[Tensor]:
    return [part for part in tree_flatten(batch)[0] if isinstance(part, Tensor)]


def _kind(batch: Any) -> tuple[Any, ...]:
    """Batches of one kind share a trace: same structure, shapes, types and constants."""
    parts, spec = tree_flatten(batch)
    described = [
        (p.shape, p.dtype, p.stride()) if isinstance(p, Tensor) else repr(p) for p in parts
    ]
    return (str(spec), *described)


def _own_bytes(tensors: Sequence[Tensor], given: Sequence[Tensor]) -> int:
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in own.items() if address not in known)
