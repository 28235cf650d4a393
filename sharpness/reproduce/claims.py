"""A paper's claim as a predicate on our numbers, and the verdict that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sharpness.statistics import mean_and_sd, mean_sd, paired_t, sign_flip


class Verdict(StrEnum):
    """What our numbers say of a paper's claim."""

    REPRODUCED = "reproduced"
    IN_PART = "reproduced in part"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE_SOLVER = "inconclusive (solver)"
    INCONCLUSIVE_FEW = "inconclusive (n too small)"
    STAND_IN = "stand-in"
    NOT_RUN = "not run"
    NO_CLAIM = "no claim to judge"


LEVEL = 0.05  # of every test, one-sided
MIN_PAIRS = 3  # pairs or runs below which no test decides
MIN_PAIRS_AGAINST = 6  # pairs from which a test that shows nothing counts against a claim
Published = tuple[Sequence[float], Sequence[float]]  # (mean, sd) of two groups


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim: what the paper found, what we found, and whether they agree."""

    claim: str
    ours: str
    n: int  # pairs, or runs, that it rests on
    paper: str = ""
    p: float | None = None  # one-sided, of the claim
    flip_p: float | None = None  # the same by sign flips; 2^-n at best
    verdict: Verdict | None = None  # None: beyond the paper, no claim to hold it to


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An item of a paper, reproduced: its claim, the checks, the verdict."""

    paper: str
    item: str
    title: str
    claim: str
    study: str
    data: str
    preset: str
    command: str
    stand_in: str | None = None  # what stands in for data that cannot be had
    made: int = 0  # observations
    wanted: int = 0  # of so many
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> Verdict:
        """What the checks say together, whatever the data: all hold, some, or none."""
        found = [check.verdict for check in self.checks if check.verdict is not None]
        if not found:
            return Verdict.NO_CLAIM if self.checks else Verdict.NOT_RUN
        if Verdict.REPRODUCED in found:
            every = all(verdict is Verdict.REPRODUCED for verdict in found)
            return Verdict.REPRODUCED if every else Verdict.IN_PART
        order = list(Verdict)
        return min(found, key=order.index)

    @property
    def verdict(self) -> Verdict:
        """The outcome, or that the data are a stand-in."""
        judged = self.outcome not in (Verdict.NOT_RUN, Verdict.NO_CLAIM)
        return Verdict.STAND_IN if self.stand_in and judged else self.outcome

    @property
    def verdict_text(self) -> str:
        """With how many claims hold; for a stand-in the outcome; or what is lacking."""
        if 0 < self.made < self.wanted:
            return f"unfinished ({self.made} of {self.wanted} observations)"
        judged = [check for check in self.checks if check.verdict is not None]
        held = sum(check.verdict is Verdict.REPRODUCED for check in judged)
        of_all = f" ({held} of {len(judged)} claims hold)" if len(judged) > 1 else ""
        if self.verdict is Verdict.STAND_IN:
            return f"stand-in: {self.outcome} there{of_all}"
        return f"{self.outcome}{of_all}"


def by_test(p: float, opposite: float, n: int) -> Verdict:
    """Of a one-sided test and of its opposite: shown, refuted, or too few to tell."""
    if n >= MIN_PAIRS and p < LEVEL:
        return Verdict.REPRODUCED
    if (n >= MIN_PAIRS and opposite < LEVEL) or n >= MIN_PAIRS_AGAINST:
        return Verdict.NOT_REPRODUCED
    return Verdict.INCONCLUSIVE_FEW


def paired(
    claim: str,
    first: Sequence[float],
    second: Sequence[float],
    *,
    larger: bool = True,
    ratio: bool = True,
    paper: Published | None = None,
    judged: bool = True,
) -> Check:
    """Is the second of each pair larger (or smaller)? Paired t test, by pairs' seeds.

    Args:
        claim: in words.
        first: values; `first[i]` and `second[i]` share a starting point.
        second: values.
        larger: the direction claimed.
        ratio: compare by ratios (logarithms), where all values are positive.
        paper: (mean, sd) of both groups in the paper.
        judged: whether it is a claim of the paper.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if not len(a):
        return Check(
            claim=claim, ours="–", n=0, verdict=by_test(1, 1, 0) if judged else None
        )
    by_ratio = ratio and min(a.min(), b.min()) > 0
    moved = np.log10(b) - np.log10(a) if by_ratio else b - a
    signed = moved if larger else -moved
    n, flips = len(a), sign_flip(signed)
    p = paired_t(signed)
    if math.isfinite(p):
        opposite = 1 - p
    else:  # no spread to test against
        p, opposite = flips, sign_flip(-signed)
    means = " → ".join(mean_sd(*mean_and_sd(values)) for values in (a.tolist(), b.tolist()))
    count = f"{int((signed > 0).sum())} of {n} {'larger' if larger else 'smaller'}"
    effect = f"{10 ** moved.mean():.3g}×" if by_ratio else f"{moved.mean():+.2f}"
    published = ""
    if paper is not None:
        (low, low_sd), (high, high_sd) = paper
        change = f"{high / low:.3g}×" if by_ratio else f"{high - low:+.2f}"
        published = f"{low:g} ± {low_sd:g} → {high:g} ± {high_sd:g} ({change})"
    return Check(
        claim=claim,
        paper=published,
        ours=f"{means} ({effect}, {count})",
        n=n,
        p=p if n > 1 else None,
        flip_p=flips if n > 1 else None,
        verdict=by_test(p, opposite, n) if judged else None,
    )


def by_both_solvers(protocol: Check, best: Check) -> Check:
    """The protocol's check, whose verdict the best value found must share."""
    verdict = protocol.verdict
    if best.verdict is not verdict:
        verdict = Verdict.INCONCLUSIVE_SOLVER
    return replace(protocol, verdict=verdict)


def trend(
    claim: str,
    x: Sequence[float],
    runs: Sequence[Sequence[float]],
    *,
    rising: bool = True,
    ours: str = "",
    judged: bool = True,
) -> Check:
    """Does y rise (or fall) with x, within starting points?

    What shares a starting point is compared with each other alone: Page's L (1963), one
    row a starting point; Kendall's tau where there is one; a paired t test where x has
    two values. One-sided.

    Args:
        claim: in words.
        x: where y was observed.
        runs: for each starting point y at every x; one that lacks a number is left out.
        rising: the direction claimed.
        ours: what was found; the mean of Kendall's tau is added.
        judged: whether it is a claim of the paper.
    """
    order = np.argsort(np.asarray(x, float), kind="stable")
    rows = [np.asarray(run, float)[order] for run in runs]
    rows = [row for row in rows if np.isfinite(row).all()]
    at = np.asarray(x, float)[order]
    tau, p, opposite = math.nan, math.nan, math.nan
    taus = [float(stats.kendalltau(at, row).statistic) for row in rows if np.ptp(row)]
    if taus and len(at) > 1:
        tau = sum(taus) / len(rows)  # a starting point without any change counts as 0
        p, opposite = _p_of_rise(at, rows), _p_of_rise(at, [-row for row in rows])
        p, opposite = (p, opposite) if rising else (opposite, p)
    text = f"tau {tau:+.2f}" if math.isfinite(tau) else "constant"
    n = len(rows) * len(at)
    enough = n if len(at) > 2 else len(rows)  # pairs
    return Check(
        claim=claim,
        ours=f"{ours}; {text}" if ours else text,
        n=n,
        p=p if math.isfinite(p) else None,
        verdict=by_test(p, opposite, enough) if judged else None,
    )


def _p_of_rise(x: NDArray[np.float64], rows: Sequence[NDArray[np.float64]]) -> float:
    if len(rows) == 1:
        return float(stats.kendalltau(x, rows[0], alternative="greater").pvalue)
    if len(x) < 3:  # Page's L wants three columns
        moved = np.array([row[-1] - row[0] for row in rows])
        p = paired_t(moved)
        return p if math.isfinite(p) else sign_flip(moved)
    return float(stats.page_trend_test(np.array(rows)).pvalue)


def within(
    claim: str, values: Sequence[float], low: float, high: float, *, paper: str = ""
) -> Check:
    """Does the mean lie in a range? Yes or no where its 95 % interval is on one side."""
    n, (mean, sd) = len(values), mean_and_sd(values or [math.nan])
    half = _half_width(values) if n >= MIN_PAIRS else math.inf
    if low <= mean - half and mean + half <= high:
        verdict = Verdict.REPRODUCED
    elif mean + half < low or mean - half > high:
        verdict = Verdict.NOT_REPRODUCED
    else:
        verdict = Verdict.INCONCLUSIVE_FEW
    return Check(claim=claim, paper=paper, ours=mean_sd(mean, sd), n=n, verdict=verdict)


def ratio_within(
    claim: str,
    first: Sequence[float],
    second: Sequence[float],
    low: float = 0.0,
    high: float = math.inf,
    *,
    paper: str = "",
) -> Check:
    """Does the geometric mean of the pairs' ratios lie in a range?

    Nothing can be said where a value is not positive, or where there is none.
    """
    if not first or min(*first, *second) <= 0:
        ours, n = "no ratio: not all are positive" if first else "–", len(first)
        few = Verdict.INCONCLUSIVE_FEW
        return Check(claim=claim, paper=paper, ours=ours, n=n, verdict=few)
    logs = [math.log10(b / a) for a, b in zip(first, second, strict=True)]
    edges = [math.log10(edge) if edge > 0 else -math.inf for edge in (low, high)]
    check = within(claim, logs, *edges, paper=paper)
    mean, half = float(np.mean(logs)), _half_width(logs)
    least, middle, most = (10**x for x in (mean - half, mean, mean + half))
    interval = f" ({least:.3g} to {most:.3g})" if half else ""
    return replace(check, ours=f"{middle:.3g}×{interval}")


def _half_width(values: Sequence[float]) -> float:
    """Of the mean's 95 % interval; 0 for one value."""
    n, sd = len(values), mean_and_sd(values)[1]
    return float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n) if n > 1 else 0.0


def holds(claim: str, answer: bool, *, ours: str, n: int, paper: str = "") -> Check:
    """A predicate without a test: a shape, a count, an identity."""
    verdict = Verdict.REPRODUCED if answer else Verdict.NOT_REPRODUCED
    return Check(claim=claim, paper=paper, ours=ours, n=n, verdict=verdict)
