"""A line search that ends at a point satisfying the strong Wolfe conditions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sharpness._tensors import dot64

_DECREASE, _CURVATURE = 1e-3, 0.9  # those of L-BFGS-B 3.0
_MAX_EVALS = 20

Sample = tuple[float, float, float, Tensor]  # step, value, slope, gradient


def strong_wolfe(
    value_and_gradient: Callable[[float], tuple[float, Tensor]],
    at_zero: tuple[float, float],
    direction: Tensor,
    longest: float,
) -> tuple[float, float, Tensor] | None:
    """Step, value and gradient of an acceptable point, or None if nothing decreases.

    Args:
        value_and_gradient: function and full gradient at a step along `direction`.
        at_zero: value and slope (< 0) at step 0.
        direction: (p,); turns gradients into slopes.
        longest: the largest step allowed; the first one tried is min(1, longest).

    Nocedal and Wright, Numerical Optimization, algorithms 3.5 and 3.6, with cubic
    interpolation.
    """
    f0, slope0 = at_zero

    def sample(t: float) -> Sample:
        value, gradient = value_and_gradient(t)
        return t, value, float(dot64(gradient, direction)), gradient

    def too_high(s: Sample) -> bool:
        return not s[1] <= f0 + _DECREASE * s[0] * slope0

    def flat_enough(s: Sample) -> bool:
        return abs(s[2]) <= -_CURVATURE * slope0

    low: Sample = (0.0, f0, slope0, direction)  # the gradient at 0 is never read
    high: Sample | None = None
    t = min(1.0, longest)
    for _ in range(_MAX_EVALS):
        if -slope0 * t <= torch.finfo(direction.dtype).eps * abs(f0):
            break  # what could be gained is lost in rounding
        new = sample(t)
        if too_high(new) or (low[0] > 0 and new[1] >= low[1]):
            high = new
        elif flat_enough(new) or (high is None and t >= longest and new[2] < 0):
            return new[0], new[1], new[3]
        elif high is None and new[2] < 0:
            low, t = new, min(longest, 5 * t)  # as far as L-BFGS-B extrapolates
            continue
        else:
            if high is None or new[2] * (high[0] - low[0]) >= 0:
                high = low
            low = new
        assert high is not None
        if abs(high[0] - low[0]) <= 1e-10 * max(high[0], low[0]):
            break
        t = _interpolated(low, high)
    return (low[0], low[1], low[3]) if low[0] > 0 else None


def _interpolated(low: Sample, high: Sample) -> float:
    """Minimum of the cubic through both ends, kept off the ends by a tenth."""
    (a, fa, da, _), (b, fb, db, _) = low, high
    d1 = da + db - 3 * (fa - fb) / (a - b)
    inside = d1 * d1 - da * db
    t = (a + b) / 2
    if 0 <= inside < math.inf and math.isfinite(fb):
        d2 = (1 if b > a else -1) * inside**0.5
        bottom = db - da + 2 * d2
        t = b - (b - a) * (db + d2 - d1) / bottom if bottom else t
    margin = 0.1 * abs(b - a)
    return min(max(t, min(a, b) + margin), max(a, b) - margin)
