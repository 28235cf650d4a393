r"""Cross-entropy behind a linear layer with many classes, without the scores of all.

The scores z = h W^T + b of T rows in V classes are a (T, V) tensor, of a language model
the largest of all: it, its softmax and their gradients stay in the graph of a product.
Here they are made in blocks of rows and classes, used and dropped, three times over: for
the loss, for its gradient, and for the product with its Hessian. With p the softmax, y the
target's indicator, g_t the weight of row t, and (k, K, c) a direction in (h, W, b),

    loss      l_t = log sum_v exp z_tv - z_ty
    gradient  q = g (p - y);   q W to h,   q^T h to W,   the sum of q to b
    product   u = k W^T + h K^T + c,   s_t = sum_v p_tv u_tv,   r = g p (u - s):
              r W + q K to h,   r^T h + q^T k to W,   the sum of r to b,   s_t - u_ty to g

The matrix products have the types of the tensors, what stands between them that of the
loss, float64 where it was widened. `u` and `s` come from the same numbers, so that a
saturated softmax keeps its digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

LEAST_CLASSES = 4096  # fewer are no burden: 512 rows of them are 8 MB
# Rows and classes of a block: on a CPU what its caches hold and matrix products are fast
# at, on other devices what keeps them busy (not measured).
_BLOCK = {"cpu": (128, 256)}
_OTHER_BLOCK = (1024, 8192)


class NotPostponedError(RuntimeError):
    """Scores are needed where they cannot be made up for: without this, it works."""


class Postponed(TorchFunctionMode):
    """Inside, a linear layer with many classes gives `Scores` that do not exist yet."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        scores = _postponed(*args, **kwargs) if function is F.linear else None
        return function(*args, **kwargs) if scores is None else scores


def _postponed(input: Any, weight: Any, bias: Any = None) -> Scores | None:
    """None where it would not help, or give other numbers than the layer itself."""
    x = input  # the layer's name for it
    if not isinstance(weight, Tensor) or weight.ndim != 2 or x.ndim < 2:
        return None
    given = [t for t in (x, weight, bias) if t is not None]
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in given)
    if len(weight) < LEAST_CLASSES or not plain or x.dtype != weight.dtype:
        return None
    if x.dtype.itemsize < 4:  # sums over the blocks would be rounded once a block
        return None
    if torch.is_autocast_enabled(x.device.type) or get_proxy_mode() is not None:
        return None
    if any(t.is_inference() for t in given):  # nobody would see that they are changed
        return None
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in given):
        return None
    return Scores.of(x, weight, bias)


class Scores(Tensor):
    """What a linear layer gives, before it is computed.

    Moving, cutting and casting it moves, cuts and casts what it will be made of; its
    cross-entropy never makes it. Every other function gets the scores themselves, and from
    then on they are what counts, since they may be written to.
    """

    made_of: Tensor  # the layer's inputs, features where the scores have classes
    weight: Tensor  # (V, d)
    bias: Tensor | None
    axis: int  # of the classes
    recorded: bool  # whether gradients were, when it came about
    family: list[bool]  # whether one of those that share their rows was made
    versions: list[int]  # of what it is made of
    _whole: Tensor | None

    @staticmethod
    def of(
        made_of: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axis: int = -1,
        dtype: torch.dtype | None = None,
        recorded: bool | None = None,
        family: list[bool] | None = None,
    ) -> Scores:
        """Scores of inputs with features along `axis`; `dtype` is what they are cast to."""
        axis %= made_of.ndim
        shape = list(made_of.shape)
        shape[axis] = len(weight)
        self = Tensor._make_wrapper_subclass(
            Scores, shape, dtype=dtype or made_of.dtype, device=made_of.device
        )
        self.made_of, self.weight, self.bias, self.axis = made_of, weight, bias, axis
        self.recorded = torch.is_grad_enabled() if recorded is None else recorded
        self.family = [False] if family is None else family
        self.versions = self._versions_now()
        self._whole = None
        return self

    def _versions_now(self) -> list[int]:
        parts = (self.made_of, self.weight, self.bias)
        return [t._version for t in parts if t is not None]

    def check(self) -> None:
        """That the layer would still give these scores, and that nobody has others.

        Raises:
            NotPostponedError: what it is made of was written to; or scores that share
                their rows were made, and may have been.
        """
        if self._versions_now() != self.versions:
            raise NotPostponedError("what the scores are made of was changed in place")
        if self.family[0] and self._whole is None:
            raise NotPostponedError("scores are used in several places")

    @property
    def is_differentiated(self) -> bool:
        """Whether the scores will require a gradient."""
        parts = (self.made_of, self.weight, self.bias)
        return self.recorded and any(t.requires_grad for t in parts if t is not None)

    def whole(self) -> Tensor:
        """The scores.

        Raises:
            NotPostponedError: gradients are not recorded, but were in the forward pass:
                a function of its own has taken them, whose gradient would be lost.
        """
        if torch.is_grad_enabled() != self.recorded:
            raise NotPostponedError("scores are used inside of a function of its own")
        if self._whole is None:
            self.check()
            self.family[0] = True
            made = F.linear(self.made_of.movedim(self.axis, -1), self.weight, self.bias)
            with torch._C.DisableTorchFunctionSubclass():
                dtype = self.dtype
            self._whole = made.movedim(-1, self.axis).to(dtype)
        return self._whole

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "__get__":
            name = function.__self__.__name__
        first = args[0] if args else None
        if isinstance(first, Scores):
            if name == "requires_grad":
                return first.is_differentiated
            if name in _FACTS:
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **kwargs)
            if _writes(name, kwargs):
                raise NotPostponedError(f"scores are written to ({name})")
            if first._whole is None:
                first.check()
                found = _changed(name, function, first, args[1:], kwargs)
                if found is not None:
                    return found
        args, kwargs = tree_map_only(Scores, Scores.whole, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotPostponedError(f"{function} takes scores that are not there")


_FACTS = {
    *("shape", "ndim", "dtype", "device", "layout", "size", "dim", "numel", "__len__"),
    *("is_floating_point", "is_complex", "is_cuda", "is_sparse", "is_quantized"),
    *("is_nested", "is_mps", "is_meta", "__hash__"),
}
_HANDLES = {"__set__", "__setitem__", "data", "grad", "register_hook", "retain_grad"}
_MOVES = {"transpose", "swapaxes", "movedim", "moveaxis", "permute"}
_CASTS = {"float": torch.float32, "double": torch.float64}


def _writes(name: str, kwargs: Any) -> bool:
    """Whether a call may change the scores, or what is made of their gradient."""
    in_place = name.endswith("_") and not name.endswith("__")
    in_place = in_place or name.startswith("__i") or name in _HANDLES
    return in_place or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _changed(name: str, function: Any, z: Scores, rest: Any, kwargs: Any) -> Any:
    """The scores after a call that only moves, cuts or casts them; or their loss.

    None for any other call, and for arguments that are not foreseen.
    """
    if function is F.cross_entropy:
        return _cross_entropy(z, *rest, **kwargs)
    if name == "contiguous":
        return z
    if name in _MOVES:
        apart = torch.empty(*range(2, 2 + z.made_of.ndim), device="meta")
        axis = list(function(apart, *rest, **kwargs).shape).index(2 + z.axis)
        return _like(z, function(z.made_of, *rest, **kwargs), axis)
    if name == "__getitem__":
        return _cut(z, rest[0])
    if name in ("view", "reshape", "flatten") and not kwargs:
        return _reshaped(z, name, rest)
    wanted = _CASTS.get(name)
    if name == "to" and len(rest) == 1 and isinstance(rest[0], torch.dtype) and not kwargs:
        wanted = rest[0]
    narrowed = z.dtype != z.made_of.dtype and wanted != z.dtype
    if wanted is None or not wanted.is_floating_point or narrowed:
        return None
    return Scores.of(z.made_of, z.weight, z.bias, z.axis, wanted, z.recorded, z.family)


def _like(z: Scores, made_of: Tensor, axis: int) -> Scores:
    return Scores.of(made_of, z.weight, z.bias, axis, z.dtype, z.recorded, z.family)


def _cut(z: Scores, index: Any) -> Scores | None:
    """Rows by slices; None where classes are chosen, or a dimension comes or goes."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(not (isinstance(part, slice) or part is Ellipsis) for part in parts):
        return None
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (z.ndim - len(parts) + 1)
    parts += [slice(None)] * (z.ndim - len(parts))
    if Ellipsis in parts or len(parts) > z.ndim or parts[z.axis] != slice(None):
        return None
    return _like(z, z.made_of[tuple(parts)], z.axis)


def _reshaped(z: Scores, name: str, rest: Sequence[Any]) -> Scores | None:
    """Rows in another shape; None where the classes are not the last dimension of both."""
    if z.axis != z.ndim - 1:
        return None
    if name == "flatten":
        start, end = (rest[i] if i < len(rest) else -i for i in (0, 1))
        if end % z.ndim == z.axis:
            return None
        return _like(z, made := z.made_of.flatten(start, end), made.ndim - 1)
    sizes = list(rest[0] if len(rest) == 1 and not isinstance(rest[0], int) else rest)
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    if sizes[-1] == -1:  # its size has to follow from the others
        rows = prod(z.shape[:-1])
        sizes[-1] = (
            len(z.weight) if -1 not in sizes[:-1] and prod(sizes[:-1]) == rows else 0
        )
    if sizes[-1] != len(z.weight):
        return None
    made = z.made_of.reshape(*sizes[:-1], z.made_of.shape[-1])
    return _like(z, made, made.ndim - 1)


def _cross_entropy(
    z: Scores,
    targets: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """As PyTorch's; None where the scores are needed, or where it would refuse them."""
    if size_average is not None or reduce is not None or label_smoothing or z.axis != 1:
        return None
    if reduction not in ("mean", "sum", "none"):
        return None
    rows_of = (*z.shape[:1], *z.shape[2:])
    if targets.is_floating_point() or tuple(targets.shape) != rows_of:
        return None
    if torch.is_grad_enabled() != z.recorded:
        return None
    flat = targets.reshape(-1)
    counts = flat != ignore_index
    flat = torch.where(counts, flat, 0)
    if bool(((flat < 0) | (flat >= len(z.weight))).any()):
        return None
    h = z.made_of.movedim(1, -1).reshape(len(flat), -1)
    each: Tensor = _apply(Losses, h, z.weight, z.bias, flat, z.dtype)[0]
    share = counts.to(each)
    if weight is not None:
        share = share * weight.to(each)[flat]
    each = torch.where(counts, each, 0) * share
    if reduction == "none":
        return each.reshape(targets.shape)
    return each.sum() / share.sum() if reduction == "mean" else each.sum()


# -- the function and its derivatives -----------------------------------------------------

Saved = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]  # h, W, b, targets, logs
Direction = Sequence[Tensor | None]  # in h, W and b
Block = tuple[slice, Tensor, Tensor]  # classes, their scores, where a row's target is


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


class Losses(torch.autograd.Function):
    """(h (T, d), W (V, d), b (V,) or None, targets (T,), type) -> losses, log-sum-exps.

    Both (T,) in the type. Differentiable twice, by reverse and by forward mode.
    """

    @staticmethod
    def forward(
        h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The losses, and the log-sum-exps, which are kept."""
        logs = h.new_full((len(h),), -torch.inf, dtype=dtype)
        picked = torch.zeros_like(logs)
        for rows in _rows(h):
            for _, z, hit in _scores(h[rows], weight, bias, targets[rows], dtype):
                logs[rows] = torch.logaddexp(logs[rows], z.logsumexp(1))
                picked[rows] += torch.where(hit, z, 0).sum(1)  # z may be infinite
        return logs - picked, logs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the derivatives need: nothing of the scores' size."""
        h, weight, bias, targets, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, bias, targets, output[1])
        ctx.save_for_forward(h, weight, bias, targets, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        """The gradient, by a function that can be differentiated itself."""
        if g is None:
            return (None,) * 5
        h, weight, bias, targets, logs = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return (*_apply(Slopes, h, weight, bias, g, targets, logs, needs), None, None)

    @staticmethod
    def jvp(ctx: Any, k: Any, kk: Any, c: Any, *_: Any) -> Any:
        """How the losses change."""
        return _tangents(ctx.saved_tensors, (k, kk, c)), None


class Slopes(torch.autograd.Function):
    """(h, W, b, g (T,), targets, log-sum-exps, what is needed) -> gradients by h, W, b."""

    @staticmethod
    def forward(
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: Tensor,
        targets: Tensor,
        logs: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients; None for those that are not needed."""
        to_h = torch.zeros_like(h) if needs[0] else None
        to_weight = torch.zeros_like(weight) if needs[1] else None
        to_bias = torch.zeros_like(bias) if needs[2] and bias is not None else None
        for rows in _rows(h):
            x = h[rows]
            for classes, z, hit in _scores(x, weight, bias, targets[rows], g.dtype):
                q = _slope(z, hit, logs[rows], g[rows]).to(h.dtype)
                if to_h is not None:
                    to_h[rows].addmm_(q, weight[classes])
                if to_weight is not None:
                    to_weight[classes].addmm_(q.T, x)
                if to_bias is not None:
                    to_bias[classes] += q.sum(0)
        return to_h, to_weight, to_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the derivatives need: nothing of the scores' size."""
        ctx.set_materialize_grads(False)
        ctx.needs = inputs[-1]
        ctx.save_for_backward(*inputs[:-1])
        ctx.save_for_forward(*inputs[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *direction: Tensor | None) -> Any:
        """The product with the Hessian, which is symmetric; and g's slope."""
        needs = ctx.needs_input_grad[:4]
        h, weight, bias, g, targets, logs = ctx.saved_tensors
        saved = h, weight, bias, targets, logs
        product = _product(saved, g, direction, needs)
        return (*product, None, None, None)

    @staticmethod
    def jvp(ctx: Any, k: Any, kk: Any, c: Any, *others: Any) -> Any:
        """How the gradients change: the same product, and what a moving g adds."""
        g = others[0]
        h, weight, bias, old, targets, logs = ctx.saved_tensors
        needs = (*ctx.needs, False)
        saved = h, weight, bias, targets, logs
        found = _product(saved, old, (k, kk, c), needs)[:3]
        if g is None:
            return found
        more = Slopes.forward(h, weight, bias, g, targets, logs, ctx.needs)
        both = zip(found, more, strict=True)
        return tuple(a if b is None else cast(Tensor, a) + b for a, b in both)


def _product(
    saved: Saved, g: Tensor, direction: Direction, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """What the Hessian of sum_t g_t l_t gives for a direction in h, W and b, and g's."""
    h, weight, bias, _, logs = saved
    k, big_k, _ = direction
    along = _Along(saved, direction)
    to_h = torch.zeros_like(h) if needs[0] else None
    to_weight = torch.zeros_like(weight) if needs[1] else None
    to_bias = torch.zeros_like(bias) if needs[2] and bias is not None else None
    to_g = torch.zeros_like(g) if needs[3] else None
    for rows in _rows(h):
        s, at_target = along.means(rows)
        if to_g is not None:
            to_g[rows] = s - at_target
        for classes, z, hit, u in along.blocks(rows):
            p = (z - logs[rows, None]).exp_()
            q = p.sub(hit.to(p)).mul_(g[rows, None]).to(h.dtype)
            r = p.mul_(u.sub_(s[:, None])).mul_(g[rows, None]).to(h.dtype)
            del z, p, u
            if to_h is not None:
                to_h[rows].addmm_(r, weight[classes])
                if big_k is not None:
                    to_h[rows].addmm_(q, big_k[classes])
            if to_weight is not None:
                to_weight[classes].addmm_(r.T, h[rows])
                if k is not None:
                    to_weight[classes].addmm_(q.T, k[rows])
            if to_bias is not None:
                to_bias[classes] += r.sum(0)
    return to_h, to_weight, to_bias, to_g


def _tangents(saved: Saved, direction: Direction) -> Tensor:
    """How the losses (T,) change along a direction in h, W and b."""
    along, found = _Along(saved, direction), torch.zeros_like(saved[-1])
    for rows in _rows(saved[0]):
        s, at_target = along.means(rows)
        found[rows] = s - at_target
    return found


class _Along:
    """Scores and their change u along a direction, a block at a time."""

    def __init__(self, saved: Saved, direction: Direction) -> None:
        self._h, self._weight, self._bias, self._targets, self._logs = saved
        self._direction = direction

    def means(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The mean of u under the softmax, and u of the target, (r,) each."""
        s = torch.zeros_like(self._logs[rows])
        at_target = torch.zeros_like(s)
        for _, z, hit, u in self.blocks(rows):
            at_target += torch.where(hit, u, 0).sum(1)
            s += (z.sub_(self._logs[rows, None]).exp_().mul_(u)).sum(1)
        return s, at_target

    def blocks(self, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Classes, scores, where a row's target is, and u, (r, v) each."""
        k, big_k, c = self._direction
        x, dtype = self._h[rows], self._logs.dtype
        for classes, z, hit in _scores(
            x, self._weight, self._bias, self._targets[rows], dtype
        ):
            u = x.new_zeros(z.shape)
            if k is not None:
                u.addmm_(k[rows], self._weight[classes].T)
            if big_k is not None:
                u.addmm_(x, big_k[classes].T)
            if c is not None:
                u += c[classes]
            yield classes, z, hit, u.to(dtype)


def _slope(z: Tensor, hit: Tensor, logs: Tensor, g: Tensor) -> Tensor:
    """The matrix q = g (p - y) of a block; takes the scores' place."""
    return z.sub_(logs[:, None]).exp_().sub_(hit.to(z)).mul_(g[:, None])


def _rows(h: Tensor) -> Iterator[slice]:
    size = _BLOCK.get(h.device.type, _OTHER_BLOCK)[0]
    return (slice(start, min(start + size, len(h))) for start in range(0, len(h), size))


def _scores(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> Iterator[Block]:
    """Blocks of classes with the scores of some rows in them, and their targets' places."""
    size = _BLOCK.get(x.device.type, _OTHER_BLOCK)[1]
    for start in range(0, len(weight), size):
        classes = slice(start, min(start + size, len(weight)))
        z = F.linear(x, weight[classes], None if bias is None else bias[classes])
        places = torch.arange(start, classes.stop, device=x.device)
        yield classes, z.to(dtype), targets[:, None] == places
        del z
