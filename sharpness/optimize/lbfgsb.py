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

from sharpness._tensors import dot64
from sharpness.optimize.box import Box, Maximum, ValueAndGradient
from sharpness.optimize.line_search import strong_wolfe

_BLOCK = 1 << 17  # variables handled at a time
_NEAR = 0.02  # of a step: from there on the slope is a straight line
_EXACT = 1 << 17  # variables up to which the path's bends are sorted
_LOOKS = 8  # points of the path looked at in one sweep


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
        if not (math.isfinite(value) and bool(gradient.isfinite().all())):
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
        direction = _minimiser(model, x, g, box) - x
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
            new_x = box.clip(x + step * direction)
            model.add(new_x - x, new_g - g)
            x, g, iteration = new_x, new_g, iteration + 1


def _can_move(x: Tensor, g: Tensor, box: Box) -> bool:
    """Whether any variable has room in the direction of descent."""
    return bool((((g > 0) & (x > box.lower)) | ((g < 0) & (x < box.upper))).any())


def _minimiser(model: _Model, x: Tensor, g: Tensor, box: Box) -> Tensor:
    """The model's, or that of B = I where rounding has made the model singular."""
    try:
        return model.minimiser(x, g, box)
    except LinAlgError:
        return box.clip(x - g)


def _along(
    function: ValueAndGradient, box: Box, x: Tensor, direction: Tensor, step: float
) -> tuple[float, Tensor]:
    return function(box.clip(x + step * direction))


def _longest_step(x: Tensor, direction: Tensor, box: Box) -> float:
    """The largest multiple of `direction`, at least 1, that stays in the box."""
    return max(1.0, min(float(_breakpoints(x, -direction, box).min()), 1e10))


class _Model:
    """The quadratic model with B = theta I - W^T M W, from the last correction pairs.

    Rows of W (2m, p) are y_1, s_1, y_2, s_2, ...; the papers' factor theta on the s's
    stands in M instead, so that a new theta leaves W as it is. W is by far the largest
    thing here, so it is read block by block, few times an iteration: about six.
    """

    def __init__(self, like: Tensor, memory: int) -> None:
        self._rows = like.new_empty((2 * memory, like.numel()))
        self._sy = torch.empty((0, 0), dtype=torch.float64)  # s_i^T y_j
        self._ss = torch.empty((0, 0), dtype=torch.float64)
        self._theta = 1.0
        self._m = torch.empty((0, 0), dtype=torch.float64)

    @property
    def is_empty(self) -> bool:
        return not len(self._ss)

    def add(self, s: Tensor, y: Tensor) -> None:
        """Take in a pair, unless the curvature along it is not positive.

        It is kept for a step of length 1: the model is the same, and products of tiny
        steps do not vanish in float32.
        """
        length = float(dot64(s, s)) ** 0.5
        if not 0 < length < math.inf:
            return
        s, y = s / length, y / length
        curvature, square = float(dot64(s, y)), float(dot64(y, y))
        if not curvature > torch.finfo(s.dtype).eps * square**0.5:
            return
        m = len(self._ss)
        if 2 * m == len(self._rows):
            self._rows = self._rows.roll(-2, 0)
            self._sy, self._ss, m = self._sy[1:, 1:], self._ss[1:, 1:], m - 1
        self._rows[2 * m], self._rows[2 * m + 1] = y, s
        with_s, with_y = self._w(m + 1, s, y)
        self._ss = _bordered(self._ss, with_s[1::2], with_s[1::2])
        self._sy = _bordered(self._sy, with_y[1::2], with_s[::2])
        self._theta = square / curvature
        try:
            self._m = self._middle_matrix()
        except LinAlgError:  # pairs that rounding cannot tell apart
            self._sy = self._ss = self._m = self._sy[:0, :0]
            self._theta = 1.0

    def _middle_matrix(self) -> Tensor:
        theta, lower, m = self._theta, self._sy.tril(-1), len(self._ss)
        top = torch.cat([-torch.diag(self._sy.diag()), lower.T], 1)
        bottom = torch.cat([lower, theta * self._ss], 1)
        scale = torch.ones(2 * m, dtype=torch.float64)
        scale[m:] = theta
        inverse: Tensor = torch.linalg.inv(torch.cat([top, bottom]))
        rows = torch.arange(2 * m).view(2, m).T.flatten()  # y's and s's in turn, as in W
        return (scale[:, None] * inverse * scale)[rows][:, rows]

    def _blocks(self, pairs: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """W a few variables at a time, (2m, block)."""
        height = 2 * (len(self._ss) if pairs is None else pairs)
        for start in range(0, self._rows.shape[1], _BLOCK):
            block = slice(start, start + _BLOCK)
            yield block, self._rows[:height, block]

    def _w(self, pairs: int, *vectors: Tensor) -> Tensor:
        """W times vectors (p,), as (number of vectors, 2m) on the CPU."""
        total = torch.zeros((len(vectors), 2 * pairs), dtype=torch.float64)
        for block, w in self._blocks(pairs):
            stacked = torch.stack([v[block] for v in vectors])
            total += (stacked @ w.T).double().cpu()
        return total

    def minimiser(self, x: Tensor, g: Tensor, box: Box) -> Tensor:
        """Minimise the model: along the projected gradient, then over the free part."""
        if self.is_empty:
            return box.clip(x - g)  # B = I: the path ends at its unconstrained minimum
        breaks = _breakpoints(x, g, box)
        cauchy_step = self._cauchy_step(g, breaks)
        moved = -g * breaks.clamp(max=cauchy_step)
        return self._subspace_minimiser(x, g, moved, breaks > cauchy_step, box)

    def _cauchy_step(self, g: Tensor, breaks: Tensor) -> float:
        """The t that first minimises the model along clip(x - t g)."""
        if len(g) <= _EXACT:
            return self._cauchy_by_sorting(g.double(), breaks.double())
        return self._cauchy_by_bracketing(g, breaks)

    def _cauchy_by_sorting(self, g: Tensor, breaks: Tensor) -> float:
        """Exactly: slope and curvature between all bends at once, by prefix sums.

        Algorithm CP of Byrd et al. (1995) visits the bends one by one.
        """
        theta, m = self._theta, self._m.to(g)
        w = self._rows[: 2 * len(self._ss)].double()
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
        the model along it is smooth to the eye. One sweep over W gives it at several t;
        three sweeps and a line through the last two do what sorting does in more time
        and memory. A minimum that ends before the path has become a quarter longer can
        be passed over. Where nothing moves any more the slope is 0, so that the end is
        always found.
        """
        low, slope = 0.0, -float(dot64(g, torch.where(breaks > 0, g, 0.0)))
        steps = [4.0**i / self._theta for i in range(-3, _LOOKS - 3)]
        while True:
            found = list(zip(steps, self._slopes(g, breaks, steps), strict=True))
            rising = next((i for i, (_, d) in enumerate(found) if not d < 0), None)
            if rising is None:
                low, slope = found[-1]
                steps = [low * 4.0 ** (i + 1) for i in range(_LOOKS)]
                continue
            high, top = found[rising]
            if math.isnan(top):
                return low
            low, slope = found[rising - 1] if rising else (low, slope)
            secant = low + (high - low) * slope / (slope - top)
            if high - low <= _NEAR * high:
                return secant
            even = [low + (high - low) * (i + 1) / _LOOKS for i in range(_LOOKS)]
            around = [secant * (1 - _NEAR / 3), secant * (1 + _NEAR / 3)]
            steps = sorted(even + [t for t in around if low < t < high])

    def _slopes(self, g: Tensor, breaks: Tensor, steps: list[float]) -> list[float]:
        """Derivatives of the model along the path, each just after its step t.

        What moves has moved by -t g, with the velocity -g; the rest by -g times its own
        break.
        """
        t = torch.tensor(steps, dtype=g.dtype, device=g.device)[:, None]
        squares = torch.zeros(len(steps), dtype=torch.float64)  # of the velocity
        p = torch.zeros((len(steps), len(self._m)), dtype=torch.float64)
        c = torch.zeros_like(p)
        for block, w in self._blocks():
            g_b, breaks_b = g[block], breaks[block]
            moving = (breaks_b > t).to(g.dtype)  # (steps, block)
            pull = w * g_b
            p -= (moving @ pull.T).double().cpu()
            c -= (torch.minimum(breaks_b, t) @ pull.T).double().cpu()
            squares += (moving @ g_b.square()).double().cpu()
        linear = (self._theta * torch.tensor(steps, dtype=torch.float64) - 1) * squares
        slopes: list[float] = (linear - ((p @ self._m) * c).sum(1)).tolist()
        return slopes

    def _subspace_minimiser(
        self, x: Tensor, g: Tensor, moved: Tensor, free: Tensor, box: Box
    ) -> Tensor:
        theta, m, num = self._theta, self._m, len(self._ss)
        back = (m @ self._w(num, moved)[0]).to(g)
        r, w_r = torch.empty_like(g), torch.zeros(2 * num, dtype=torch.float64)
        gram = torch.zeros((2 * num, 2 * num), dtype=torch.float64)
        for block, w in self._blocks():
            free_b = free[block].to(g.dtype)
            pull = g[block] + theta * moved[block] - back @ w
            r[block] = free_b * pull
            w_r += (w @ r[block]).double().cpu()
            gram += ((w * free_b) @ w.T).double().cpu()
        identity = torch.eye(2 * num, dtype=torch.float64)
        v = torch.linalg.solve(identity - m @ gram / theta, m @ w_r).to(g)
        for block, w in self._blocks():  # r becomes the step
            step = -(r[block] + (v @ w) / theta) / theta
            r[block] = step * free[block].to(g.dtype)
        cauchy = box.clip(x + moved)
        best = box.clip(cauchy + r)
        if float(dot64(g, best - x)) < 0:
            return best
        return cauchy + min(1.0, float(_breakpoints(cauchy, -r, box).min())) * r


def _sums_after(rows: Tensor) -> Tensor:
    """For every position 0..p the sum of what comes after it, (r, p) -> (r, p + 1)."""
    backwards = rows.flip(1).cumsum(1).flip(1)
    return torch.cat([backwards, rows.new_zeros((len(rows), 1))], 1)


def _bordered(matrix: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """A square matrix with a last column and a last row more."""
    wide = torch.cat([matrix, column[:-1, None]], 1)
    return torch.cat([wide, row[None]])


def _breakpoints(x: Tensor, g: Tensor, box: Box) -> Tensor:
    """For each variable, the t at which x - t g reaches its bound; a block at a time."""
    breaks = torch.empty_like(x)
    for start in range(0, len(x), _BLOCK):
        block = slice(start, start + _BLOCK)
        x_b, g_b = x[block], g[block]
        room = torch.where(g_b < 0, box.upper[block] - x_b, x_b - box.lower[block])
        breaks[block] = torch.where(g_b == 0, torch.inf, room / g_b.abs())
    return breaks
