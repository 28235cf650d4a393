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
from scipy.optimize import brentq
from torch import Tensor

from sharpness._tensors import dot64
from sharpness.optimize.box import Box, Maximum, ValueAndGradient
from sharpness.optimize.line_search import strong_wolfe

_BLOCK = 1 << 17  # variables handled at a time


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


def _along(
    function: ValueAndGradient, box: Box, x: Tensor, direction: Tensor, step: float
) -> tuple[float, Tensor]:
    return function(box.clip(x + step * direction))


def _longest_step(x: Tensor, direction: Tensor, box: Box) -> float:
    """The largest multiple of `direction`, at least 1, that stays in the box."""
    return max(1.0, min(float(_breakpoints(x, -direction, box).min()), 1e10))


class _Model:
    """The quadratic model with B = theta I - W^T M W, from the last correction pairs.

    Rows of W (2m, p) are the y's, then the s's; the papers' factor theta on the s's
    stands in M instead, so that a new theta leaves W as it is.
    """

    def __init__(self, like: Tensor, memory: int) -> None:
        self._memory = memory
        self._y = like.new_empty((memory, like.numel()))
        self._s = like.new_empty((memory, like.numel()))
        self._sy = torch.empty((0, 0), dtype=torch.float64)  # s_i^T y_j
        self._ss = torch.empty((0, 0), dtype=torch.float64)
        self._theta = 1.0
        self._m = torch.empty((0, 0), dtype=torch.float64)

    @property
    def is_empty(self) -> bool:
        return not len(self._ss)

    @property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        m = len(self._ss)
        return self._y[:m], self._s[:m]  # (m, p) each

    def add(self, s: Tensor, y: Tensor) -> None:
        """Take in a pair, unless the curvature along it is not positive."""
        curvature, square = float(dot64(s, y)), float(dot64(y, y))
        if curvature <= torch.finfo(s.dtype).eps * square:
            return
        if len(self._ss) == self._memory:
            self._y, self._s = self._y.roll(-1, 0), self._s.roll(-1, 0)
            self._sy, self._ss = self._sy[1:, 1:], self._ss[1:, 1:]
        m = len(self._ss)
        self._y[m], self._s[m] = y, s
        new = torch.stack([s, y])
        s_y = (new @ self._y[: m + 1].T)[0].double().cpu()
        s_s, y_s = (new @ self._s[: m + 1].T).double().cpu()
        self._ss = _bordered(self._ss, s_s, s_s)
        self._sy = _bordered(self._sy, y_s, s_y)
        self._theta = square / curvature
        self._m = self._middle_matrix()

    def _middle_matrix(self) -> Tensor:
        theta, lower = self._theta, self._sy.tril(-1)
        top = torch.cat([-torch.diag(self._sy.diag()), lower.T], 1)
        bottom = torch.cat([lower, theta * self._ss], 1)
        scale = torch.ones(len(top) * 2, dtype=torch.float64)
        scale[len(top) :] = theta
        inverse: Tensor = torch.linalg.inv(torch.cat([top, bottom]))
        return scale[:, None] * inverse * scale

    def _w(self, *vectors: Tensor) -> Tensor:
        """W times vectors (p,), as (number of vectors, 2m) on the CPU."""
        y, s = self._pairs
        stacked = torch.stack(vectors)  # tall-and-thin is slow the other way round
        return torch.cat([stacked @ y.T, stacked @ s.T], 1).double().cpu()

    def _w_transposed(self, small: Tensor) -> Tensor:
        """W^T times a vector (2m,), as (p,)."""
        y, s = self._pairs
        for_y, for_s = small.to(y).chunk(2)
        result: Tensor = for_y @ y + for_s @ s
        return result

    def _gram(self, kept: Tensor) -> Tensor:
        """W W^T over the variables that are `kept`, (2m, 2m) on the CPU.

        In blocks: a masked copy of W would cost more than the product itself.
        """
        y, s = self._pairs
        total = torch.zeros(2 * len(y), 2 * len(y), dtype=torch.float64)
        for start in range(0, len(kept), _BLOCK):
            block = slice(start, start + _BLOCK)
            w = torch.cat([y[:, block], s[:, block]])
            total += ((w * kept[block]) @ w.T).double().cpu()
        return total

    def minimiser(self, x: Tensor, g: Tensor, box: Box) -> Tensor:
        """Minimise the model: along the projected gradient, then over the free part."""
        if self.is_empty:
            return box.clip(x - g)  # B = I: the path ends at its unconstrained minimum
        breaks = _breakpoints(x, g, box)
        cauchy_step = self._cauchy_step(x, g, breaks, box)
        cauchy = box.clip(x - cauchy_step * g)
        return self._subspace_minimiser(x, g, cauchy, breaks > cauchy_step, box)

    def _cauchy_step(self, x: Tensor, g: Tensor, breaks: Tensor, box: Box) -> float:
        """The t that minimises the model along clip(x - t g), to three digits.

        With a million variables the path bends a million times and the derivative of
        the model along it is smooth to the eye: a root finder needs ten looks at it
        where the published scan sorts and visits every bend.
        """

        def derivative(t: float) -> float:
            moving = torch.where(breaks > t, -g, 0.0)
            moved = box.clip(x - t * g) - x
            p, c = self._w(moving, moved)
            linear = float(dot64(g, moving)) + self._theta * float(dot64(moving, moved))
            return linear - float(p @ self._m @ c)

        low, high = 0.0, 1.0 / self._theta
        while derivative(high) < 0:
            low, high = high, 4 * high
            if not float((breaks > low).any()):
                return low  # every variable has met its bound
        return float(brentq(derivative, low, high, rtol=1e-3))

    def _subspace_minimiser(
        self, x: Tensor, g: Tensor, cauchy: Tensor, free: Tensor, box: Box
    ) -> Tensor:
        theta, m, moved = self._theta, self._m, cauchy - x
        correction = self._w_transposed(m @ self._w(moved)[0])
        r = torch.where(free, g + theta * moved - correction, 0.0)
        identity = torch.eye(len(m), dtype=torch.float64)
        middle = identity - m @ self._gram(free) / theta
        v = torch.linalg.solve(middle, m @ self._w(r)[0])
        step = torch.where(free, -r / theta - self._w_transposed(v) / theta**2, 0.0)
        best = box.clip(cauchy + step)
        if float(dot64(g, best - x)) < 0:
            return best
        return cauchy + min(1.0, float(_breakpoints(cauchy, -step, box).min())) * step


def _bordered(matrix: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """A square matrix with a last column and a last row more."""
    wide = torch.cat([matrix, column[:-1, None]], 1)
    return torch.cat([wide, row[None]])


def _breakpoints(x: Tensor, g: Tensor, box: Box) -> Tensor:
    """For each variable, the t at which x - t g reaches its bound."""
    room = torch.where(g < 0, box.upper - x, x - box.lower)
    return torch.where(g == 0, torch.inf, room / g.abs())
