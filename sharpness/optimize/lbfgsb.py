"""L-BFGS-B on the device: a handful of vector operations an iteration.

The algorithm is Byrd, Lu, Nocedal and Zhu (1995), SIAM J. Sci. Comput. 16(5), with the
projected subspace step of Morales and Nocedal (2011), ACM TOMS 38(1). Its inner loops
over single variables become sorts, cumulative sums and products with thin matrices.
Written for minimisation, as in the papers; the door turns maximisation into it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sharpness._tensors import dot64
from sharpness.optimize.box import Box, Maximum, ValueAndGradient
from sharpness.optimize.line_search import strong_wolfe

_BLOCK = 1 << 17  # breakpoints scanned at a time


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
        return -value, -gradient

    x = box.clip(start)
    f, g = negated(x)
    model, iteration, message = _Model(x, memory), 0, "running"
    while True:
        if torch.equal(box.clip(x - g), x):
            message = "the projected gradient is zero"
        yield Maximum(x, -f, evals, iteration, message, message != "running")
        if message != "running":
            return
        direction = model.minimiser(x, g, box) - x
        slope = float(dot64(g, direction))
        longest = 1.0 if iteration == 0 else _longest_step(x, direction, box)
        found = None
        if slope < 0:
            found = strong_wolfe(
                lambda t, x=x, d=direction: negated(box.clip(x + t * d)),
                (f, slope),
                direction,
                longest,
            )
        if found is None and model.is_empty:
            message = "the line search found no gain"
        elif found is None:
            model = _Model(x, memory)  # start again from steepest ascent
        else:
            step, f, new_g = found
            new_x = box.clip(x + step * direction)
            model.add(new_x - x, new_g - g)
            x, g, iteration = new_x, new_g, iteration + 1


def _longest_step(x: Tensor, direction: Tensor, box: Box) -> float:
    """The largest multiple of `direction` that stays in the box."""
    room = torch.where(direction > 0, box.upper - x, x - box.lower)
    steps = torch.where(direction == 0, torch.inf, room / direction.abs())
    return max(1.0, min(float(steps.min()), 1e10))


class _Model:
    """The quadratic model with B = theta I - W^T M W, from the last correction pairs.

    Rows of W (2m, p) are the y's, then theta times the s's.
    """

    def __init__(self, like: Tensor, memory: int) -> None:
        self._memory = memory
        self._s = like.new_empty((0, like.numel()))
        self._y = like.new_empty((0, like.numel()))
        self._theta = 1.0

    @property
    def is_empty(self) -> bool:
        return not len(self._s)

    def add(self, s: Tensor, y: Tensor) -> None:
        """Take in a pair, unless the curvature along it is not positive."""
        curvature, square = float(dot64(s, y)), float(dot64(y, y))
        if curvature <= torch.finfo(s.dtype).eps * square:
            return
        keep = self._memory - 1
        self._s = torch.cat([self._s[-keep:], s[None]])
        self._y = torch.cat([self._y[-keep:], y[None]])
        self._theta = square / curvature
        self._w = torch.cat([self._y, self._theta * self._s])
        sy, ss = (self._s @ self._y.T).double(), (self._s @ self._s.T).double()
        lower = sy.tril(-1)
        blocks = [[-torch.diag(sy.diag()), lower.T], [lower, self._theta * ss]]
        self._m = torch.linalg.inv(torch.cat([torch.cat(row, 1) for row in blocks]))

    def minimiser(self, x: Tensor, g: Tensor, box: Box) -> Tensor:
        """Minimise the model: along the projected gradient, then over the free part."""
        if self.is_empty:
            return box.clip(x - g)  # B = I: the path ends at its unconstrained minimum
        breaks = _breakpoints(x, g, box)
        cauchy_step = self._cauchy_step(breaks, g)
        cauchy = box.clip(x - cauchy_step * g)
        free = breaks > cauchy_step
        return self._subspace_minimiser(x, g, cauchy, free, box)

    def _cauchy_step(self, breaks: Tensor, g: Tensor) -> float:
        """First local minimum of the model along clip(x - t g), t >= 0.

        Between two breakpoints the path's derivative d is -g on what still moves, and
        q'(t) = a + t b. Both follow from cumulative sums over the sorted breakpoints.
        """
        order = breaks.argsort()
        total = -(self._w @ g).double()  # W d at t = 0
        moving, done = float(dot64(g, g)), torch.zeros_like(total)
        left = 0.0
        for index in order.split(_BLOCK):
            t, g_i = breaks[index].double(), g[index].double()
            w_i = self._w[:, index].double()
            # State on the interval that ends at each breakpoint of the block.
            wg = w_i * g_i
            p = total[:, None] + wg.cumsum(1) - wg
            settled = wg * torch.where(t.isfinite(), t, 0.0)
            c = done[:, None] - settled.cumsum(1) + settled
            rest = moving - (g_i * g_i).cumsum(0) + g_i * g_i
            mp = self._m @ p
            a = -rest - (mp * c).sum(0)
            b = self._theta * rest - (mp * p).sum(0)
            starts = torch.cat([t.new_tensor([left]), t[:-1]])
            minimum = torch.where(b > 0, -a / b, torch.inf)
            hit = ((a + starts * b >= 0) | (minimum <= t)).nonzero()
            if len(hit):
                j = int(hit[0])
                return max(float(starts[j]), min(float(minimum[j]), float(t[j])))
            total = total + wg.sum(1)
            done = done - settled.sum(1)
            moving -= float((g_i * g_i).sum())
            left = float(t[-1])
        return left

    def _subspace_minimiser(
        self, x: Tensor, g: Tensor, cauchy: Tensor, free: Tensor, box: Box
    ) -> Tensor:
        theta, w, m = self._theta, self._w, self._m
        moved = cauchy - x
        correction = (m @ (w @ moved).double()).to(x.dtype)
        r = torch.where(free, g + theta * moved - correction @ w, 0.0)
        w_free = w * free
        k = (w_free @ w_free.T).double()
        v = m @ (w_free @ r).double()
        v = torch.linalg.solve(torch.eye(len(m)).to(m) - m @ k / theta, v)
        step = -r / theta - (v.to(x.dtype) @ w_free) / theta**2
        best = box.clip(cauchy + step)
        if float(dot64(g, best - x)) < 0:
            return best
        return cauchy + min(1.0, _longest_fraction(cauchy, step, box)) * step


def _breakpoints(x: Tensor, g: Tensor, box: Box) -> Tensor:
    """For each variable, the t at which x - t g reaches its bound."""
    room = torch.where(g < 0, box.upper - x, x - box.lower)
    return torch.where(g == 0, torch.inf, room / g.abs())


def _longest_fraction(x: Tensor, direction: Tensor, box: Box) -> float:
    return float(_breakpoints(x, -direction, box).min())
