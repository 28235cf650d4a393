"""From a checkpoint: how much larger may the batch be, over the same samples?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpness._arguments import ensure, positive, positive_list, require, whole
from sharpness._results import Cost, Reading, Result, Status, number
from sharpness._run import Run
from sharpness.batchsize.problem import Problem
from sharpness.risk.model_state import random_generators_kept

_LAST = 0.25  # of the samples of a branch, that its loss is the mean over
_STRETCH = 64  # updates between two looks at the clock


@dataclass(frozen=True, kw_only=True)
class Branches(Result):
    """From one checkpoint, the same samples in batches of k times the size."""

    factors: tuple[float, ...]  # k, rising from 1
    batch_sizes: tuple[int, ...]
    rates: tuple[float, ...]
    updates: tuple[int, ...]
    losses: tuple[float, ...]  # mean training loss over the last quarter of the samples
    errors: tuple[float, ...]  # standard error of the difference to k = 1
    tolerance: float  # share of the loss with k = 1
    critical: int | None  # the largest batch up to which all stay within; None: none run
    is_lower_bound: bool  # all of them do

    def _rows(self) -> Iterable[Reading]:
        base = self.losses[0] if self.losses else math.nan
        for size, loss, error, made in zip(
            self.batch_sizes, self.losses, self.errors, self.updates, strict=True
        ):
            words = f"standard error of the difference, {made} updates"
            yield Reading(name=f"loss({size})", value=loss, error=error, evidence=words)
        yield Reading(
            name="critical_batch_size",
            value=math.nan if self.critical is None else float(self.critical),
            bound="≥" if self.is_lower_bound else "",
            evidence=f"loss within {self.tolerance:.1%} of {number(base)}",
        )


def branches(
    problem: Problem,
    state: Mapping[str, Any] | None = None,
    factors: Sequence[float] = (1, 2, 4, 8, 16),
    *,
    optimizer_state: Mapping[str, Any] | None = None,
    samples: int | None = None,
    tolerance: float = 0.01,
    rule: str | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> Branches:
    """From a checkpoint, the same samples in batches of k times the size: which k is free?

    Every branch sees the same rows in the same order. Its loss is the mean over the
    batches of the last quarter of them. The largest k up to which all of these stay
    within `tolerance` of that with k = 1 is the critical batch size here, at this point of
    training; where all do, it is "at least" that.

    Args:
        problem: what is trained; its lr and batch_size are those of k = 1.
        state: the checkpoint's state dict; None starts from the problem's model.
        factors: k >= 1; 1 itself is always run.
        optimizer_state: the optimizer's state dict, such as Adam's moments; None starts
            anew.
        samples: of each branch, rounded down to whole batches of the largest. None takes
            20 of these.
        tolerance: share of the loss with k = 1, > 0.
        rule: of the rate with k: "linear" (default for SGD), "sqrt" (else), "none".
        seed: of the order of the rows.
        max_seconds: no 64 updates begin later than this; branches that are done come back.
        progress: show a bar; by default on a terminal.

    Raises:
        ValueError: an argument outside its range, or a largest batch beyond the rows.

    Cost: `samples` gradients for each factor.

    References:
        Merrill et al. (2025), arXiv:2505.23971: branched training, with a tolerance of
        0.01 in the loss itself; here it is relative, so that it means the same in any
        unit.
    """
    ks = sorted({1.0, *positive_list("factors", factors)[0]})
    require(ks[0] >= 1, "factors", "be at least 1", ks[0])
    positive("tolerance", tolerance, "Pass 0.01.")
    sizes = [round(k * problem.batch_size) for k in ks]
    contract = f"give batches of at most the {problem.num_rows} rows"
    ensure(sizes[-1] <= problem.num_rows, "factors", contract, str(sizes[-1]))
    num = 20 * sizes[-1] if samples is None else whole("samples", samples, 4 * sizes[-1])
    num -= num % sizes[-1]
    run = Run("updates", max_seconds=max_seconds, progress=progress)
    done: list[np.ndarray] = []  # losses of each branch's updates
    start = state, optimizer_state
    with random_generators_kept(seed), run:
        for size in sizes:
            lr = problem.scaled_rate(size, rule)
            done.append(_branch(problem, start, (size, lr, seed), num // size, run))
    tails = [losses[-max(1, round(_LAST * len(losses))) :] for losses in done]
    means = [float(tail.mean()) for tail in tails]
    fine = [mean <= means[0] + tolerance * abs(means[0]) for mean in means]
    num_fine = sum(accumulate(fine, min))
    ended = run.status
    if done and not math.isfinite(means[0]):
        ended = Status.worst(ended, Status.NON_FINITE)
    return Branches(
        factors=tuple(ks[: len(done)]),
        batch_sizes=tuple(sizes[: len(done)]),
        rates=tuple(problem.scaled_rate(size, rule) for size in sizes[: len(done)]),
        updates=tuple(map(len, done)),
        losses=tuple(means),
        errors=tuple(_error_of_difference(tail, tails[0]) for tail in tails),
        tolerance=tolerance,
        critical=sizes[num_fine - 1] if num_fine else None,
        is_lower_bound=bool(num_fine) and num_fine == len(done),
        status=ended,
        cost=Cost(gradients=len(done) * num / problem.num_rows, seconds=run.seconds),
        settings={"samples": num, "rule": rule or problem.rule, "seed": seed},
    )


def _branch(
    problem: Problem,
    start: tuple[Any, Any],
    how: tuple[int, float, int],
    num: int,
    run: Run,
) -> np.ndarray:
    """Losses of `num` updates; NaN after one that is not finite."""
    (state, optimizer_state), (size, lr, seed) = start, how
    model = problem.copy()
    if state is not None:
        model.load_state_dict(state)
    optimizer = problem.optimizer_for(model, lr)
    if optimizer_state is not None:
        optimizer.load_state_dict(dict(optimizer_state))
        for group in optimizer.param_groups:
            group["lr"] = lr
    stream = problem.batches(size, seed)
    losses: list[Tensor] = []
    for begun in range(0, num, _STRETCH):
        run.step(min(_STRETCH, num - begun))
        for _ in range(begun, min(begun + _STRETCH, num)):
            losses.append(problem.update(model, optimizer, next(stream)))
    return torch.stack(losses).double().cpu().numpy()


def _error_of_difference(tail: np.ndarray, base: np.ndarray) -> float:
    """Of the means of two branches, over stretches of the same samples."""
    num = min(len(tail), len(base))
    if num < 2:
        return math.nan
    with np.errstate(all="ignore"):  # a branch may diverge
        ours, theirs = (
            np.array([part.mean() for part in np.array_split(losses, num)])
            for losses in (tail, base)
        )
        return float((ours - theirs).std(ddof=1) / math.sqrt(num))
