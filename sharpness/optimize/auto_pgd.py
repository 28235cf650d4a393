"""Auto-PGD: projected gradient ascent over a ball that chooses its own steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sharpness._tensors import is_finite
from sharpness.optimize.ball import Ball
from sharpness.optimize.box import Maximum, ValueAndGradient

_MOMENTUM = 0.75  # Croce and Hein (2020), section 4.1, as are the figures below
_ENOUGH_GAINS = 0.75  # share of steps since the last checkpoint that must have gained


def auto_pgd(
    value_and_gradient: ValueAndGradient, start: Tensor, ball: Ball, *, num_steps: int
) -> Iterator[Maximum]:
    """The best point after 1, 2, ..., `num_steps` + 1 evaluations.

    Steps begin at twice the radius. At checkpoints that come closer and closer together
    the step is halved, and the search goes back to its best point, where too few of the
    steps since the last one have gained, or where neither step nor best value changed.

    Stops early at a best point whose gradient is zero, and at the start where value or
    gradient is not finite; later on such points count as a step too far.

    Cost: one value with gradient a state; memory 6 vectors.

    References:
        Croce and Hein (2020), arXiv:2003.01690, algorithm 1. As in the authors' code,
        condition 2 is not asked at the first checkpoint; other than there, a search that
        goes back to its best point starts without momentum.
    """
    points_to_check = _checkpoints(num_steps)
    u = last = best = ball.project(start)
    value, gradient = value_and_gradient(u)
    best_value, best_gradient, last_value = value, gradient, value
    step, halved_last, best_at_check, gains, last_check = 2 * ball.radius, True, value, 0, 0
    for k in range(num_steps + 1):
        up = ball.steepest(gradient)
        message = "" if bool(up.any()) else "the gradient is zero"
        if _overflows(value, gradient):
            message = "the value or the gradient is not finite"
        done = bool(message) or k == num_steps
        yield Maximum(best, best_value, k + 1, k, message or "ascending", done)
        if done:
            return
        ahead = torch.add(u, up, alpha=step)
        ahead = ball.project(ahead, out=ahead)
        if k:  # u + _MOMENTUM (ahead - u) + (1 - _MOMENTUM) (u - last)
            ahead.mul_(_MOMENTUM).add_(u, alpha=2 - 2 * _MOMENTUM)
            ahead = ball.project(ahead.sub_(last, alpha=1 - _MOMENTUM), out=ahead)
        last, u = u, ahead
        value, gradient = value_and_gradient(u)
        is_dead = value <= best_value and not bool(gradient.any())
        if is_dead or _overflows(value, gradient):  # nowhere to climb from: go back
            u, value, gradient, step = best, best_value, best_gradient, step / 2
        gains, last_value = gains + (value > last_value), value
        if value > best_value:
            best, best_value, best_gradient = u, value, gradient
        if k + 1 in points_to_check:
            stuck = not halved_last and best_value == best_at_check
            halved_last = gains < _ENOUGH_GAINS * (k + 1 - last_check) or stuck
            if halved_last:
                step /= 2
                u = last = best
                value, gradient, last_value = best_value, best_gradient, best_value
            best_at_check, gains, last_check = best_value, 0, k + 1


def _overflows(value: float, gradient: Tensor) -> bool:
    return not (math.isfinite(value) and is_finite(gradient))


def _checkpoints(num_steps: int) -> set[int]:
    """After 22 % of the steps, then at distances that shrink by 3 % down to 6 %."""
    found, gap, percent = set(), 22, 22
    while percent < 100:
        found.add(-(-percent * num_steps // 100))  # rounded up, without rounding errors
        gap = max(gap - 3, 6)
        percent += gap
    return found
