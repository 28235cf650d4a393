"""Whether f depends on how the data are batched: seen on the data, never assumed.

A batch may be cut, and joined with others, where the outputs of its rows do not depend on
each other and the loss is the mean or the sum of its parts'. With w = 1 for a sum and w =
the number of terms for a mean, that is

    w L = sum_j w_j L_j,    w dL/dz = w_j dL_j/dz    and    w H u = w_j H_j u

for every part j of a batch's outputs z, with H = d^2 L / dz^2 and a random u.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from sharpness import _tensors
from sharpness._results import NondeterministicRiskError
from sharpness.risk import batches
from sharpness.risk.calls import Calls
from sharpness.risk.loss_terms import is_elementwise, num_rows
from sharpness.risk.model_state import random_states, seed_generators
from sharpness.risk.objective import Objective, gradients

Count = Callable[[Any], float]
Seen = tuple[Any, Tensor, Sequence[int]]  # outputs, targets, where inner batches begin
Responses = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]  # of a loss to its outputs

COUPLED = "the forward pass couples rows"
UNCUT = "parts of a batch cannot be evaluated"
LOSS_COUPLED = "the loss was not seen to be a mean or a sum over rows"
FEW = 16  # rows of an early look: what couples all rows shows among so many
_BOTH = frozenset({"mean", "sum"})
# What a comparison holds, in tensors of the outputs' size: three derivatives and what
# their graph saves, of the whole and of its parts.
_HELD = 16
# Rounding that is left of the curvature of a saturated loss, beside a loss of order one.
_ROUNDINGS = 1e3


# -- the forward pass --------------------------------------------------------------------


def num_few(chunk_size: int | str, objective: Objective) -> int:
    """Rows of an early look: no more than are evaluated at once, but a pair.

    A pair where each has scores of very many classes, as language models have.
    """
    if objective.has_large_head:
        return 2
    return FEW if isinstance(chunk_size, str) else min(FEW, max(2, chunk_size))


def few_rows(pairs: Sequence[batches.Pair], most: int) -> batches.Pair:
    """Rows from all over the data, of the first batch's kind."""
    alike = [p for p in pairs if batches.row_kind(p) == batches.row_kind(pairs[0])]
    picked = [alike[i] for i in _spread(len(alike), most)]
    each = math.ceil(most / len(picked))
    some = [batches.taken(pair, _spread(len(pair[1]), each)) for pair in picked]
    return batches.rows(batches.joined(some)[0], 0, most)


def why_whole(objective: Objective, few: batches.Pair, first: batches.Pair) -> str:
    """Why a row's outputs may depend on how it is evaluated; "" where they do not.

    Args:
        objective: whose model is run.
        few: some rows.
        first: a whole batch, for errors that have nothing to do with parts.

    Raises:
        NondeterministicRiskError: the model draws from a generator of its own, so that
            the same rows twice give two values.

    Cost: the model four times on a few rows.
    """
    leaves = objective.pieces(objective.theta)
    try:
        value, drawn = draws(objective, leaves, few)
        again = objective.reduced(leaves, few)
        apart = len(few[1]) < 2 or _are_apart(objective, few[0], 0)
    except Exception:
        objective.reduced(leaves, first)  # fails likewise if the trouble is another
        return UNCUT
    if not _near([again], [value], objective.eps):
        handed_in: list[Any] = []
        with Calls(lambda *call: handed_in.append(call[2].get("generator"))):
            objective.reduced(leaves, few)
        if any(isinstance(each, torch.Generator) for each in handed_in):
            raise NondeterministicRiskError(*(float(v.sum()) for v in (value, again)))
        return "the same rows twice give two values"
    if drawn:
        return "random numbers are drawn"
    return "" if apart else COUPLED


def draws(
    objective: Objective, leaves: Sequence[Tensor], batch: Any
) -> tuple[Tensor, bool]:
    """What the loss gives for a batch, and whether random numbers were drawn for it."""
    seed_generators()
    fresh = random_states()
    value = objective.reduced(leaves, batch)
    return value, random_states() != fresh


def sample_dim(objective: Objective, inputs: Any) -> int:
    """The dimension of samples where rows are coupled: 1 (time comes first), or still 0."""
    try:
        few = tree_map(lambda part: part[:, :FEW], inputs)
        return int(length(few, 1) > 1 and _are_apart(objective, few, 1))
    except Exception:
        return 0


def length(batch: Any, dim: int) -> int:
    """Samples of a batch along a dimension: rows, or the size that most parts have."""
    if dim == 0:
        return int(num_rows(batch))
    tensors = (part for part in _tensors.leaves(batch) if isinstance(part, Tensor))
    sizes = Counter(part.shape[dim] for part in tensors if part.ndim > dim)
    return sizes.most_common(1)[0][0]


def some_rows(batch: Any, dim: int = 0) -> Any:
    """A few samples of a closure's batch, from all over it."""
    total = length(batch, dim)
    spread = _spread(total, min(total // 2 * 2, FEW) or total)
    return _cut(batch, total, spread, dim, lists=True)


def closure_terms(
    objective: Objective, given: Sequence[Any], count: Count | None
) -> tuple[str, int] | None:
    """Whether a closure was seen to be a "mean" or a "sum", and over which dimension.

    On some rows first, then, where f depends on it, on all data: each batch beside its
    halves, and two halves of neighbours, where they can be joined, beside each of them.

    Cost: the closure on 16 rows, six times; three times on all data.
    """
    few = [max(given, key=num_rows)]
    seen = [_closure_kinds(objective, few, count, dim, few=True) for dim in (0, 1)]
    for reduction, dim in product(("mean", "sum"), (0, 1)):
        as_given = len(given) == 1 and reduction == "mean"
        if reduction in seen[dim] and (
            as_given or reduction in _closure_kinds(objective, given, count, dim)
        ):
            return reduction, dim
    return None


def _closure_kinds(
    objective: Objective,
    given: Sequence[Any],
    count: Count | None,
    dim: int,
    *,
    few: bool = False,
) -> frozenset[str]:
    """Which of "mean" and "sum" a closure was seen to be; both where nothing is cut."""
    leaves = objective.leaves(objective.theta)

    def weighed(batch: Any) -> tuple[Any, float, Tensor | None]:
        weight = float(count(batch) if count else length(batch, dim))
        return batch, weight, objective.reduced(leaves, batch).detach() if weight else None

    found, last = _BOTH, None
    try:
        for batch in given:
            batch = some_rows(batch, dim) if few else batch
            total = length(batch, dim)
            if dim and total == 1:  # no time, such as the channel of grey images
                return frozenset()
            cut = _halves(total) if total > 1 else [torch.arange(total)]
            parts = [weighed(_cut(batch, total, i, dim, lists=True)) for i in cut]
            if total > 1:
                found &= _sums(weighed(batch), parts, objective.eps)
            if last and (both := _beside(last[0], parts[0][0], dim)) is not None:
                found &= _sums(weighed(both), [last, parts[0]], objective.eps)
            last = parts[-1]
            if not found:
                break
    except Exception:
        return frozenset()
    return found


def _sums(whole: Any, parts: Sequence[Any], eps: float) -> frozenset[str]:
    """Which of "mean" and "sum" (weight, value) of a batch is of those of its parts."""
    counted = [(weight, value) for _, weight, value in parts if weight]
    _, of, value = whole
    if not math.isclose(of, sum(weight for weight, _ in counted), rel_tol=1e-6):
        return frozenset()
    if not counted:
        return _BOTH
    mean = torch.stack([w * v for w, v in counted]).sum()
    total = torch.stack([v for _, v in counted]).sum()
    adds_up = {
        "mean": _near([mean], [of * value], eps),
        "sum": _near([total], [value], eps),
    }
    return frozenset(kind for kind, holds in adds_up.items() if holds)


def _beside(first: Any, second: Any, dim: int) -> Any:
    """Two batches as one; None where they cannot be joined."""
    (a, structure), (b, other) = tree_flatten(first), tree_flatten(second)
    sizes = length(first, dim), length(second, dim)
    if structure != other or not all(isinstance(part, Tensor) for part in (*a, *b)):
        return None
    joined = []
    for x, y in zip(a, b, strict=True):
        of_rows = [
            z.shape[dim : dim + 1] == (n,) for z, n in zip((x, y), sizes, strict=True)
        ]
        try:
            same = not any(of_rows) and torch.equal(x, y)
            joined.append(x if same else torch.cat([x, y], dim))
        except (RuntimeError, IndexError):  # of other shapes
            return None
        if not (same or all(of_rows)):
            return None
    return tree_unflatten(joined, structure)


def _are_apart(objective: Objective, inputs: Any, dim: int) -> bool:
    """Whether the outputs of half of the samples, in another order, are the same."""
    leaves, total = objective.pieces(objective.theta), length(inputs, dim)
    outputs = objective.outputs(leaves, (inputs, None))
    for half in _halves(total):
        found = objective.outputs(leaves, (_cut(inputs, total, half, dim), None))
        expected = _cut(outputs, total, half, dim)
        if not _near(tree_leaves(found), tree_leaves(expected), objective.eps):
            return False
    return True


# -- the loss ----------------------------------------------------------------------------


def most_rows(outputs: Any, rows: int, budget: int) -> int:
    """Rows that can be compared at once, from the outputs of some."""
    each = sum(z.nbytes for z in tree_leaves(outputs) if isinstance(z, Tensor)) / rows
    return max(FEW, int(budget / (2 * _HELD * max(1.0, each))))


def seen_whole(objective: Objective, pairs: Sequence[batches.Pair]) -> Iterator[Seen]:
    """Outputs of every batch, run whole. Cost: the model on all data."""
    leaves = objective.pieces(objective.theta)
    yield from ((objective.outputs(leaves, pair), pair[1], []) for pair in pairs)


def seen_in_chunks(
    objective: Objective, pairs: Sequence[batches.Pair], rows: int, most: int
) -> Iterator[Seen]:
    """Outputs of all batches: small ones joined, each after a few rows of the one before.

    Args:
        objective: whose model is run.
        pairs: the batches.
        rows: to run the model on at once.
        most: rows to compare at once; larger batches come in parts.

    Cost: the model on all data.
    """
    leaves, before = objective.pieces(objective.theta), None
    for group in _groups(pairs, min(rows, most)):
        ends = [0, *accumulate(len(pair[1]) for pair in group[:-1])]
        for part in batches.cut(batches.joined(group)[0], most):
            cut = batches.cut(part, rows)
            outputs = _joined([objective.outputs(leaves, p) for p in cut], _sizes(cut))
            seen = outputs, part[1]
            if before is not None and batches.row_kind(before[1]) == batches.row_kind(part):
                few = min(FEW, len(before[1][1]))
                last = _last(before[0], len(before[1][1]), few), before[1][1][-few:]
                seen = _joined([last, seen], [few, len(part[1])])
                yield *seen, [few + end for end in ends]
            else:
                yield *seen, ends[1:]
            before = outputs, part


def _last(outputs: Any, total: int, few: int) -> Any:
    return _cut(outputs, total, torch.arange(total - few, total))


def _groups(pairs: Sequence[batches.Pair], most: int) -> Iterator[list[batches.Pair]]:
    """Neighbours of one kind with so many rows together, or single ones."""
    group: list[batches.Pair] = []
    for pair in pairs:
        rows = sum(_sizes([*group, pair]))
        if group and (rows > most or batches.row_kind(pair) != batches.row_kind(group[0])):
            yield group
            group = []
        group.append(pair)
    yield group


def _sizes(pairs: Sequence[batches.Pair]) -> list[int]:
    return [len(pair[1]) for pair in pairs]


def observed(objective: Objective, seen: Iterable[Seen], count: Count) -> str | None:
    """What the loss was seen to be on all of these, "mean" or "sum"; None where neither."""
    found, last, terms = _BOTH, None, []
    for outputs, targets, ends in seen:
        terms.append(float(count(targets)))
        found &= reductions(objective, outputs, targets, count, ends)
        if not found:
            return None
        last = outputs, targets
    if all(number == 1 for number in terms):
        return "mean"
    if found == _BOTH and last is not None:  # 0 and flat: targets of other rows may tell
        found = reductions(objective, last[0], last[1].roll(1, 0), count)
    return next(iter(found)) if len(found) == 1 else None


def reductions(
    objective: Objective,
    outputs: Any,
    targets: Tensor,
    count: Count,
    ends: Sequence[int] = (),
) -> frozenset[str]:
    """Which of "mean" and "sum" the loss was seen to be on some outputs.

    Both where it is 0 and flat, and where there is nothing to cut. The parts are halves
    by the size of the gradient, two parts at random, and the batches between the ends.

    Cost: the loss and two derivatives of it three times, once more where there are ends.
    """
    total = len(targets)
    if total < 2 or not float(count(targets)):
        return _BOTH
    along = _directions(outputs)
    whole = _responses(objective, outputs, targets, along)
    shuffled = torch.randperm(total, generator=_tensors.seeded(0))
    third = max(total // 3, min(2, total // 2))
    cuts = [_by_size(whole[1], shuffled), shuffled.tensor_split([third])]
    if ends:
        cuts.append(torch.arange(total).tensor_split(list(ends)))
    found = _BOTH
    for cut in cuts:
        try:
            pieces = [_cut((outputs, targets, along), total, rows) for rows in cut]
            parts = [_responses(objective, *piece) for piece in pieces]
            counts = [float(count(t)) for t in (targets, *(piece[1] for piece in pieces))]
        except Exception:
            return frozenset()
        if not math.isclose(counts[0], sum(counts[1:]), rel_tol=1e-6):
            return frozenset()
        weights = {"mean": counts, "sum": [1.0] * len(counts)}
        found &= {r for r in found if _add_up(whole, parts, cut, weights[r], objective.eps)}
    return found


def broadcast(objective: Objective, outputs: Any, targets: Tensor) -> list[Tensor]:
    """Outputs and targets of as many entries that the loss stretches to more; or none.

    (N, 1) beside (N,) makes N x N, which nobody means who has not written it out.
    """
    leaves, (outputs, _) = objective.pieces(objective.theta), moving(outputs)
    stretched: list[Tensor] = []
    with torch.enable_grad(), Calls(lambda *call: stretched.extend(_stretched(*call))):
        objective.loss_of(leaves, (None, targets), outputs)
    return stretched[:2]


def _stretched(function: Any, args: Any, _: Any, result: Any) -> list[Tensor]:
    """Outputs and targets, where a call broadcasts two shapes to more entries than both."""
    two = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim]
    if len(two) != 2 or len(args) != 2 or two[0].requires_grad == two[1].requires_grad:
        return []
    a, b = (tensor.shape for tensor in two)
    if a == b or a.numel() != b.numel() or a[0] != b[0]:
        return []
    with suppress(RuntimeError):  # shapes that do not broadcast
        shape = torch.broadcast_shapes(a, b)
        elementwise = is_elementwise(function) or getattr(result, "shape", None) == shape
        if elementwise and shape.numel() > a.numel():
            return sorted(two, key=lambda t: not t.requires_grad)
    return []


def _responses(
    objective: Objective, outputs: Any, targets: Tensor, along: Sequence[Tensor]
) -> Responses:
    """The loss, its gradient by the outputs, and its curvature along some direction."""
    outputs, at = moving(outputs)
    leaves = objective.pieces(objective.theta)
    with torch.enable_grad():
        value = objective.loss_of(leaves, (None, targets), outputs).sum()
        slopes = gradients(value, at, create_graph=True)
        slope = value.new_zeros(())
        for s, u in zip(slopes, along, strict=True):
            slope = slope + (s * u).sum()
        try:
            curves = gradients(slope, at)
        except (RuntimeError, NotImplementedError):  # there is no second derivative
            curves = [torch.zeros_like(z) for z in at]
    return value.detach(), [s.detach() for s in slopes], curves


def _add_up(
    whole: Responses,
    parts: Sequence[Responses],
    cut: Sequence[Tensor],
    weights: Sequence[float],
    eps: float,
) -> bool:
    """Whether the weighted responses of the parts are those of the whole."""
    w, *shares = weights
    counted = [(s, p, i) for s, p, i in zip(shares, parts, cut, strict=True) if s]
    total = sum(len(i) for i in cut)
    values = [s * p[0] for s, p, _ in counted]
    size = float(sum(v.abs() for v in values))  # beside which a sum may cancel
    if not _near([sum(values)], [w * whole[0]], eps, size=size):
        return False
    for order, floor in ((1, 0.0), (2, _ROUNDINGS * eps)):
        for k, expected in enumerate(whole[order]):
            found = torch.zeros_like(expected)
            for s, part, rows in counted:
                _add_rows(found, s * part[order][k], rows, total)
            if not _near([found], [w * expected], eps, floor=floor):
                return False
    return True


# -- cutting, joining, comparing ---------------------------------------------------------


def _spread(total: int, most: int) -> Tensor:
    """So many positions, or all, at equal distances."""
    return torch.linspace(0, total - 1, min(total, most), dtype=torch.float64).long()


def _halves(total: int) -> tuple[Tensor, Tensor]:
    """Every other row, backwards."""
    backwards = torch.arange(total).flip(0)
    return backwards[::2], backwards[1::2]


def _by_size(slopes: Sequence[Tensor], shuffled: Tensor) -> Sequence[Tensor]:
    """Halves of the rows, those with the smaller gradients first."""
    total = len(shuffled)
    sizes = torch.zeros(total)
    for slope in slopes:
        if _has_rows(slope, total):
            sizes += slope.abs().reshape(total, -1).sum(1).to(sizes)
    return shuffled[sizes[shuffled].argsort(stable=True)].tensor_split(2)


def _has_rows(part: Any, total: int, dim: int = 0) -> bool:
    """Whether it holds the same number of places for each of so many samples."""
    if not isinstance(part, Tensor) or part.ndim <= dim or not part.shape[dim]:
        return False
    return part.shape[dim] % total == 0


def _cut(tree: Any, total: int, index: Tensor, dim: int = 0, *, lists: bool = False) -> Any:
    """What belongs to some of the samples; lists inside may hold one entry for each."""

    def cut(part: Any) -> Any:
        if _tensors.is_object(part):
            other = copy.copy(part)
            inside = _cut(dict(vars(part)), total, index, dim, lists=lists)
            vars(other).update(inside)
            return other
        if isinstance(part, list):
            return [part[i] for i in index]
        if not _has_rows(part, total, dim):
            return part
        places = part.unflatten(dim, (total, -1))
        return places.index_select(dim, index.to(part.device)).flatten(dim, dim + 1)

    def is_samples(part: Any) -> bool:
        inside = lists and part is not tree and isinstance(part, list)
        return inside and len(part) == total and dim == 0

    return tree_map(cut, tree, is_leaf=is_samples)


def _joined(several: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Outputs of several parts; what has no rows is that of the first."""

    def join(*parts: Any) -> Any:
        rows = all(_has_rows(p, n) for p, n in zip(parts, sizes, strict=True))
        return torch.cat(parts) if rows else parts[0]

    return tree_map(join, *several) if len(several) > 1 else several[0]


def _add_rows(to: Tensor, part: Tensor, rows: Tensor, total: int) -> None:
    if _has_rows(to, total):
        places = to.unflatten(0, (total, -1))
        places.index_add_(0, rows.to(to.device), part.unflatten(0, (len(rows), -1)))
    else:
        to += part


def _moves(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def moving(outputs: Any) -> tuple[Any, list[Tensor]]:
    """Outputs to differentiate by, and those of them that are real numbers."""

    def moving(z: Any) -> Any:
        return z.detach().requires_grad_() if _moves(z) else z

    outputs = tree_map(moving, outputs)
    return outputs, [z for z in tree_leaves(outputs) if _moves(z)]


def _directions(outputs: Any) -> list[Tensor]:
    generator = _tensors.seeded(0)
    return [
        torch.randn(z.shape, generator=generator).to(z)
        for z in tree_leaves(outputs)
        if _moves(z)
    ]


def _near(
    found: Sequence[Any],
    expected: Sequence[Any],
    eps: float,
    *,
    size: float = 0.0,
    floor: float = 0.0,
) -> bool:
    """Whether they agree to half of the digits, in norm; what is infinite, exactly."""
    for a, b in zip(found, expected, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape:
            return False
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        eps = max(eps, torch.finfo(a.dtype).eps)
        same = (a == b) | (a.isnan() & b.isnan())
        apart = float(torch.where(same, 0.0, a - b).norm())
        largest = float(torch.where(b.isfinite(), b, 0.0).norm())
        if not apart <= max(floor, eps**0.5 * max(size, largest)):
            return False
    return True
