"""L-BFGS-B on the device: a handful of vector operations an iteration.

The algorithm is Byrd, Lu, Nocedal and Zhu (1995), SIAM J. Sci. Comput. 16(5), with the
projected subspace step of Morales and Nocedal (2011), ACM TOMS 38(1). Its inner loops
over single variables become products with thin matrices.
Written for minimisation, as in the papers; the door turns maximisation into it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from sharpness._tensors import dot64, is_finite
from sharpness.optimize.box import Box, Maximum, ValueAndGradient
from sharpness.optimize.line_search import strong_wolfe

_BLOCK = 1 << 15  # variables handled at a time: their part of W fits a cache
_BLOCK_ON_GPU = 1 << 20  # there a call takes longer than its arithmetic
_NEAR = 0.02  # of a step: from there on the slope is a straight line
_EXACT = 1 << 17  # variables up to which the path's bends are sorted
_LOOKS = 3  # points of the path looked at in one sweep, beside those where its end may be
_FEW = 1 << 16  # variables whose exact minimum is where the first sweep looks


def lbfgsb(
    value_and_gradient: ValueAndGradient, start: Tensor, box: Box, *, memory: int = 10
) -> Iterator[Maximum]:
    """The best point after 0, 1, 2, ... iterations.

    Args:
        value_and_gradient: the function to be maximised, (p,) -> value, (p,).
        start: first point, (p,); clipped into the box.
        box: where the maximum is sought.
        memory: correction pairs kept.

    Stops by itself only where the projected gradient is exactly zero or no step along
    the search direction gains: the budget is the caller's.

    Cost: one or two values with gradient an iteration; memory 2 `memory` + 8 vectors.
    """
    evals = 0

    def negated(x: Tensor) -> tuple[float, Tensor]:
        nonlocal evals
        evals += 1
        value, gradient = value_and_gradient(x)
        if not (math.isfinite(value) and is_finite(gradient)):
            return math.inf, torch.zeros_like(gradient)  # no point to go to
        return -value, -gradient

    x = box.clip(start)
    f, g = negated(x)
    model, iteration, message = _Model(x, memory), 0, "running"
    while True:
        if not _can_move(x, g, box):
            message = "the projected gradient is zero"
        yield Maximum(x, -f, evals, iteration, message, message != "running")
        if message != "running":
            return
        direction = _minimiser(model, x, g, box).sub_(x)
        slope = float(dot64(g, direction))
        longest = 1.0 if iteration == 0 else _longest_step(x, direction, box)
        found = None
        if slope < 0:
            along = partial(_along, negated, box, x, direction)
            found = strong_wolfe(along, (f, slope), direction, longest)
        if found is None and model.is_empty:
            message = "the line search found no gain"
        elif found is None:
            model = _Model(x, memory)  # start again from steepest ascent
        else:
            step, f, new_g = found
            new_x = box.stepped(x, direction, step)
            model.add(torch.sub(new_x, x, out=direction), torch.sub(new_g, g, out=g))
            x, g, iteration = new_x, new_g, iteration + 1


def _can_move(x: Tensor, g: Tensor, box: Box) -> bool:
    """Whether any variable has room in the direction of descent."""
    blocks = ((x[b], g[b], box.lower[b], box.upper[b]) for b in _blocks_of(x))
    return any(
        bool((((g > 0) & (x > lower)) | ((g < 0) & (x < upper))).any())
        for x, g, lower, upper in blocks
    )


def _minimiser(model: _Model, x: Tensor, g: Tensor, box: Box) -> Tensor:
    """The model's, or that of B = I where rounding has made the model singular."""
    try:
        return model.minimiser(x, g, box)
    except LinAlgError:
        return box.stepped(x, g, -1.0)


def _along(
    function: ValueAndGradient, box: Box, x: Tensor, direction: Tensor, step: float
) -> tuple[float, Tensor]:
    return function(box.stepped(x, direction, step))


def _longest_step(x: Tensor, direction: Tensor, box: Box) -> float:
    """The largest multiple of `direction`, at least 1, that stays in the box."""
    return max(1.0, min(_first_bound(x, direction, box), 1e10))


class _Model:
    """The quadratic model with B = theta I - W^T M W, from the last correction pairs.

    Rows of W (2m, p) are y_1, s_1, y_2, s_2, ..., where a new pair takes the place of the
    oldest; the papers' factor theta on the s's stands in M instead, so that a new theta
    leaves W as it is. W is by far the largest thing here, so it is read block by block,
    few times an iteration: about five.
    """

    def __init__(self, like: Tensor, memory: int) -> None:
        self._rows = like.new_empty((2 * memory, like.numel()))
        self._pairs: list[int] = []  # places of the pairs in W, oldest first
        self._sy = torch.empty((0, 0), dtype=torch.float64)  # s_i^T y_j, oldest first
        self._ss = torch.empty((0, 0), dtype=torch.float64)
        self._theta = 1.0
        self._m = torch.empty((0, 0), dtype=torch.float64)

    @property
    def is_empty(self) -> bool:
        return not self._pairs

    def add(self, s: Tensor, y: Tensor) -> None:
        """Take in a pair, unless the curvature along it is not positive.

        It is kept for a step of length 1: the model is the same, and products of tiny
        steps do not vanish in float32.
        """
        length = float(dot64(s, s)) ** 0.5
        if not 0 < length < math.inf:
            return
        curvature = float(dot64(s, y)) / length / length
        square = float(dot64(y, y)) / length / length
        if not curvature > torch.finfo(s.dtype).eps * square**0.5:
            return
        place = len(self._pairs)
        if 2 * place == len(self._rows):
            place, *self._pairs = self._pairs
            self._sy, self._ss = self._sy[1:, 1:], self._ss[1:, 1:]
        self._pairs.append(place)
        new = self._rows[2 * place : 2 * place + 2]
        torch.div(y, length, out=new[0])
        torch.div(s, length, out=new[1])
        with_y, with_s = self._w(new).view(2, -1, 2)[:, self._pairs].unbind()
        self._ss = _bordered(self._ss, with_s[:, 1], with_s[:, 1])
        self._sy = _bordered(self._sy, with_y[:, 1], with_s[:, 0])
        self._theta = square / curvature
        try:
            self._m = self._middle_matrix()
        except LinAlgError:  # pairs that rounding cannot tell apart
            self._pairs, self._theta = [], 1.0
            self._sy = self._ss = self._m = self._sy[:0, :0]

    def _middle_matrix(self) -> Tensor:
        theta, lower, m = self._theta, self._sy.tril(-1), len(self._pairs)
        top = torch.cat([-torch.diag(self._sy.diag()), lower.T], 1)
        bottom = torch.cat([lower, theta * self._ss], 1)
        scale = torch.ones(2 * m, dtype=torch.float64)
        scale[m:] = theta
        inverse: Tensor = torch.linalg.inv(torch.cat([top, bottom]))
        rows = torch.empty((m, 2), dtype=torch.int64)  # as W has them
        rows[self._pairs] = torch.arange(2 * m).view(2, m).T
        rows = rows.flatten()
        return (scale[:, None] * inverse * scale)[rows][:, rows]

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """W a few variables at a time, (2m, block)."""
        w = self._rows[: 2 * len(self._pairs)]
        return ((block, w[:, block]) for block in _blocks_of(w[0]))

    def _w(self, rows: Tensor) -> Tensor:
        """W times each of some vectors (b, p), as (b, 2m) on the CPU."""
        total = torch.zeros((len(rows), 2 * len(self._pairs)), dtype=torch.float64)
        for block, w in self._blocks():
            total += (rows[:, block] @ w.T).double().cpu()
        return total

    def minimiser(self, x: Tensor, g: Tensor, box: Box) -> Tensor:
        """Minimise the model: along the projected gradient, then over the free part."""
        if self.is_empty:
            return box.stepped(x, g, -1.0)  # B = I: the path ends at its minimum
        breaks = _breakpoints(x, g, box)
        cauchy_step = self._cauchy_step(g, breaks)
        return self._subspace_minimiser(x, g, breaks, cauchy_step, box)

    def _cauchy_step(self, g: Tensor, breaks: Tensor) -> float:
        """The t that first minimises the model along clip(x - t g)."""
        if len(g) <= _EXACT:
            return self._cauchy_by_sorting(g, breaks)
        return self._cauchy_by_bracketing(g, breaks)

    def _cauchy_by_sorting(self, g: Tensor, breaks: Tensor, stride: int = 1) -> float:
        """Exactly: slope and curvature between all bends at once, by prefix sums.

        Algorithm CP of Byrd et al. (1995) visits the bends one by one. With a stride each
        variable looked at stands for so many: sums over them are that much larger.
        """
        g, breaks = g[::stride].double(), breaks[::stride].double()
        theta, m = self._theta, stride * self._m.to(g)
        w = self._rows[: 2 * len(self._pairs), ::stride].double()
        if not g.any():
            return math.nan
        bends, order = breaks[g != 0].sort()
        g, w = g[g != 0][order], w[:, g != 0][:, order]
        bends = bends.clamp_min(0.0)  # a variable a rounding error outside of its bound
        starts = torch.cat([bends.new_zeros(1), bends])  # of the pieces of the path
        moving, stopped = w * g, w * (g * bends.clamp(max=1e300))
        p = -_sums_after(moving)  # (2m, pieces): W times the velocity
        c = starts * p - torch.cat([w.new_zeros((len(w), 1)), stopped.cumsum(1)], 1)
        square = _sums_after(g.square()[None])[0]  # of the velocity
        slope = (theta * starts - 1) * square - (p * (m @ c)).sum(0)
        curvature = theta * square - (p * (m @ p)).sum(0)
        best = torch.where(slope < 0, starts - slope / curvature, starts)
        ends = torch.cat([bends, bends.new_full((1,), math.inf)])
        found = (best <= ends) | ~(slope < 0)
        return float(best[found.int().argmax()])

    def _cauchy_by_bracketing(self, g: Tensor, breaks: Tensor) -> float:
        """To 2 % or, where the slope is smooth, three digits; for many variables.

        With a million variables the path bends a million times and the derivative of
        the model along it is smooth to the eye. One sweep over W gives it at several t,
        beside the exact minimum of every so manieth variable, and a line through the last
        two does what sorting does in more time and memory. A minimum that ends before the
        path has become four times longer can be passed over. Where nothing moves any more
        the slope is 0, so that the end is always found.
        """
        parts = ((g[b], breaks[b] > 0) for b in _blocks_of(g))
        low, slope = 0.0, -sum(float(dot64(g_b, g_b * moves)) for g_b, moves in parts)
        guess = self._cauchy_by_sorting(g, breaks, len(g) // _FEW)
        guess = guess if 0 < guess < math.inf else 1 / self._theta
        steps = _around(guess)
        while True:
            found = list(zip(steps, self._slopes(g, breaks, steps), strict=True))
            flattest = sorted([(low, slope), *found], key=lambda point: abs(point[1]))[:2]
            ends = _around(_zero(*flattest))
            rising = next((i for i, (_, d) in enumerate(found) if not d < 0), None)
            if rising is None:
                low, slope = found[-1]
                further = [low * 4.0 ** (i + 1) for i in range(_LOOKS)]
                steps = sorted({*further, *(t for t in ends if low < t < further[-1])})
                continue
            high, top = found[rising]
            if math.isnan(top):
                return low
            low, slope = found[rising - 1] if rising else (low, slope)
            secant = _zero((low, slope), (high, top))
            if high - low <= _NEAR * high:
                return secant
            even = [low + (high - low) * i / (_LOOKS + 1) for i in range(1, _LOOKS + 1)]
            ends += _around(secant)
            steps = sorted({*even, *(t for t in ends if low < t < high)})

    def _slopes(self, g: Tensor, breaks: Tensor, steps: list[float]) -> list[float]:
        """Derivatives of the model along the path, each just after its step t.

        What moves has moved by -t g, with the velocity -g; the rest by -g times its own
        break.
        """
        num = len(steps)
        t = torch.tensor(steps, dtype=g.dtype, device=g.device)[:, None]
        total = torch.zeros((2 * num, 2 * len(self._pairs)), dtype=torch.float64)
        squares = torch.zeros(num, dtype=torch.float64)
        scratch = g.new_empty((2 * num, _size(g)))
        for block, w in self._blocks():
            path = scratch[:, : w.shape[1]]
            torch.gt(breaks[block], t, out=path[:num])  # 1 where it moves
            torch.minimum(breaks[block], t, out=path[num:])
            path *= g[block]
            total += (path @ w.T).double().cpu()
            squares += (path[:num] @ g[block]).double().cpu()
        p, c = -total.view(2, num, -1)
        linear = (self._theta * torch.tensor(steps, dtype=torch.float64) - 1) * squares
        slopes: list[float] = (linear - ((p @ self._m) * c).sum(1)).tolist()
        return slopes

    def _subspace_minimiser(
        self, x: Tensor, g: Tensor, breaks: Tensor, cauchy_step: float, box: Box
    ) -> Tensor:
        """Minimise over what still moves at the Cauchy point; overwrites `breaks`."""
        theta, m, num = self._theta, self._m, 2 * len(self._pairs)
        moved, cauchy = torch.empty_like(g), torch.empty_like(g)
        for block in _blocks_of(g):
            torch.clamp(breaks[block], max=cauchy_step, out=moved[block]).mul_(-g[block])
            breaks[block] = breaks[block] > cauchy_step  # from here on: 1 where it is free
            torch.add(x[block], moved[block], out=cauchy[block])
        free, cauchy = breaks, box.clip(cauchy, out=cauchy)
        back = (m @ self._w(moved[None])[0]).to(g)
        gram = torch.zeros((num, num), dtype=torch.float64)
        pulled = torch.zeros(num, dtype=torch.float64)
        for block, w in self._blocks():  # what moved becomes the pull on the free
            pull = moved[block].mul_(theta).add_(g[block]).sub_(back @ w).mul_(free[block])
            gram += ((w * free[block]) @ w.T).double().cpu()
            pulled += (w @ pull).double().cpu()
        eye = torch.eye(num, dtype=torch.float64)
        v = torch.linalg.solve(eye - m @ gram / theta, m @ pulled).to(g)
        for block, w in self._blocks():  # and that the step
            step = moved[block].add_(v @ w, alpha=1 / theta).div_(-theta)
            step.mul_(free[block])
        best, step = box.stepped(cauchy, moved, 1.0), moved
        if sum(float(dot64(g[b], best[b] - x[b])) for b in _blocks_of(x)) < 0:
            return best
        return cauchy.add_(step, alpha=min(1.0, _first_bound(cauchy, step, box)))


def _sums_after(rows: Tensor) -> Tensor:
    """For every position 0..p the sum of what comes after it, (r, p) -> (r, p + 1)."""
    backwards = rows.flip(1).cumsum(1).flip(1)
    return torch.cat([backwards, rows.new_zeros((len(rows), 1))], 1)


def _bordered(matrix: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """A square matrix with a last column and a last row more."""
    wide = torch.cat([matrix, column[:-1, None]], 1)
    return torch.cat([wide, row[None]])


def _zero(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Where the line through two points is 0; NaN where it is level."""
    (a, f_a), (b, f_b) = one, other
    return a - f_a * (b - a) / (f_b - f_a) if f_a != f_b else math.nan


def _around(t: float) -> list[float]:
    """Just before t and just after it."""
    return [t * (1 - _NEAR / 3), t * (1 + _NEAR / 3)]


def _size(like: Tensor) -> int:
    """How many variables are handled at a time."""
    return min(len(like), _BLOCK if like.device.type == "cpu" else _BLOCK_ON_GPU)


def _blocks_of(like: Tensor) -> Iterator[slice]:
    size = _size(like)
    return (slice(start, start + size) for start in range(0, len(like), size))


def _breakpoints(x: Tensor, g: Tensor, box: Box) -> Tensor:
    """For each variable, the t at which x - t g reaches its bound; a block at a time."""
    breaks = torch.empty_like(x)
    for block in _blocks_of(x):
        breaks[block] = _breaks(x[block], g[block], box.lower[block], box.upper[block])
    return breaks


def _first_bound(x: Tensor, direction: Tensor, box: Box) -> float:
    """The t at which x + t direction reaches the first bound, as `_breakpoints`."""
    parts = ((x[b], -direction[b], box.lower[b], box.upper[b]) for b in _blocks_of(x))
    return float(torch.stack([_breaks(*part).min() for part in parts]).min())


def _breaks(x: Tensor, g: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    ahead = torch.maximum((x - lower).div_(g), (x - upper).div_(g))
    return ahead.nan_to_num_(torch.inf, torch.inf)  # 0/0: on a bound, and not moving
