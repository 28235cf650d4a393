"""Projected sign ascent: straight for the corner the gradient points at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sharpness.optimize.box import Box, Maximum, ValueAndGradient


def sign_ascent(
    value_and_gradient: ValueAndGradient, start: Tensor, box: Box
) -> Iterator[Maximum]:
    """The best point after 1, 2, ... evaluations.

    The first steps are as wide as the box: they go to the corner where the linear model
    is largest, which for a convex function never loses (the conditional gradient
    method). A step that does not gain is halved and tried again from the best point.

    Cost: one value with gradient a state; memory 4 vectors.
    """
    width = (box.upper - box.lower).clamp_(max=torch.finfo(start.dtype).max / 4)
    point = box.clip(start)
    value, gradient = value_and_gradient(point)
    share, evals = 1.0, 1
    while True:
        up = gradient.sign()
        # At first twice the width: exactly to the corner, without rounding.
        reach = share if share < 1 else 2.0
        candidate = torch.addcmul(point, width, up, value=reach)
        box.clip(candidate, out=candidate)
        if torch.equal(candidate, point):
            yield Maximum(point, value, evals, evals - 1, "at its best corner", True)
            return
        yield Maximum(point, value, evals, evals - 1, "ascending", False)
        new_value, new_gradient = value_and_gradient(candidate)
        evals += 1
        if new_value > value:
            point, value, gradient = candidate, new_value, new_gradient
        else:
            share /= 2
