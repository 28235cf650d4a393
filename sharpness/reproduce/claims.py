"""A paper's claim as a predicate on our numbers, and the verdict that follows.

docs/concepts/verdicts.md says the rules in words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from scipy import stats

from sharpness.statistics import (
    LEVEL,
    holm,
    mean_and_sd,
    mean_sd,
    page_p,
    paired_t,
    sign_flip,
    student_interval,
)


class Verdict(StrEnum):
    """What our numbers say of a paper's claim, strongest objection first."""

    NO_PREMISE = "premise not met"
    NOT_REPRODUCED = "not reproduced"
    SOLVER = "undecided (solver)"
    UNDECIDED = "undecided"
    REPRODUCED = "reproduced"
    STAND_IN = "stand-in"
    NOT_RUN = "not run"
    NO_CLAIM = "no claim to judge"


def counts_of(outcomes: Iterable[Verdict]) -> list[str]:
    """`4 reproduced`, `1 undecided`: of those there are, the weakest objection first."""
    counts = Counter(outcomes)
    return [f"{counts[v]} {v}" for v in reversed(Verdict) if counts[v]]


class Role(StrEnum):
    """What a check is to its item; the verdict on the item is that of its primary claim."""

    PRIMARY = "claim"
    SECONDARY = "also claimed"
    PREMISE = "premise"
    BEYOND = "beyond the paper"


MIN_STARTS = 3  # starting points below which nothing is decided
Published = tuple[Sequence[float], Sequence[float]]  # (mean, sd) of two groups
TRIALS = 5  # of a published mean ± sd (Keskar et al. 2017)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim: what the paper found, what we found, and whether they agree.

    `verdict` is on the direction (or the range) that is claimed, `size` on the number
    that was published. With `num_new` the predicate was changed after numbers had been
    seen: p and verdicts are those of so many starting points that had not been seen.
    """

    claim: str
    ours: str
    n: int  # starting points that it rests on
    paper: str = ""
    p: float | None = None  # one-sided, of the claim
    flip_p: float | None = None  # the same by sign flips; 2^-n at best
    holm: float | None = None  # p by Holm (1979), over a paper's primary claims
    verdict: Verdict = Verdict.UNDECIDED
    size: Verdict | None = None
    overlaps: bool = False  # our interval of the size and the paper's own
    role: Role = Role.PRIMARY
    exact: bool = False  # decided without assuming a normal distribution
    num_new: int | None = None

    @property
    def decided_by(self) -> int:
        """Starting points that the verdict rests on."""
        return self.n if self.num_new is None else self.num_new

    @property
    def count_text(self) -> str:
        """`6`, or `3, 0 of them new` where new ones alone decide."""
        return str(self.n) if self.num_new is None else f"{self.n}, {self.num_new} new"

    @property
    def verdict_text(self) -> str:
        """In words, with the n that left it undecided, and whether it is provisional."""
        if self.role is Role.BEYOND:
            return str(self.role)
        text = self._told(self.verdict)
        if self.role is Role.PREMISE:
            return text.replace("reproduced", "met")
        if self.size is None or self.verdict is self.size is Verdict.UNDECIDED:
            return text
        excused = self.size is Verdict.NOT_REPRODUCED and self.overlaps
        aside = ", though the paper's own interval overlaps ours" if excused else ""
        return f"{text}; size {self._told(self.size)}{aside}"

    def _told(self, verdict: Verdict) -> str:
        if verdict is Verdict.UNDECIDED:
            new = "" if self.num_new is None else " new starting points"
            return f"undecided at n = {self.decided_by}{new}"
        by_t_alone = not self.exact and 0.5**self.decided_by > LEVEL
        known = verdict in (Verdict.REPRODUCED, Verdict.NOT_REPRODUCED)
        return f"{verdict} (provisional)" if known and by_t_alone else str(verdict)


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

    def of(self, role: Role) -> list[Check]:
        """The checks of a role."""
        return [check for check in self.checks if check.role is role]

    @property
    def outcome(self) -> Verdict:
        """That of the primary claim, whatever the data, where the premises are met."""
        if any(check.verdict is Verdict.NOT_REPRODUCED for check in self.of(Role.PREMISE)):
            return Verdict.NO_PREMISE
        nothing = Verdict.NO_CLAIM if self.checks else Verdict.NOT_RUN
        return min(
            (check.verdict for check in self.of(Role.PRIMARY)),
            key=list(Verdict).index,
            default=nothing,
        )

    @property
    def verdict(self) -> Verdict:
        """The outcome, or that the data are a stand-in."""
        judged = self.outcome not in (Verdict.NOT_RUN, Verdict.NO_CLAIM)
        return Verdict.STAND_IN if self.stand_in and judged else self.outcome

    @property
    def verdict_text(self) -> str:
        """With the size and the n of the primary claim, and what is unfinished."""
        outcome = self.outcome
        told = [c.verdict_text for c in self.of(Role.PRIMARY) if c.verdict is outcome]
        text = told[0] if told else str(outcome)
        if self.verdict is Verdict.STAND_IN:
            text = f"stand-in: {text}"
        if 0 < self.made < self.wanted:
            unfinished = f"unfinished ({self.made} of {self.wanted} observations)"
            return f"so far {text}, {unfinished}" if told else unfinished
        return text


def with_holm(findings: Sequence[Finding]) -> list[Finding]:
    """The same with every primary claim's p adjusted by Holm, within each paper."""
    adjusted = {}
    for paper in {finding.paper for finding in findings}:
        family = [
            (i, j, check.p)
            for i, finding in enumerate(findings)
            for j, check in enumerate(finding.checks)
            if finding.paper == paper and check.role is Role.PRIMARY and check.p is not None
        ]
        for (i, j, _), p in zip(family, holm([p for *_, p in family]), strict=True):
            adjusted[i, j] = p
    return [
        replace(
            finding,
            checks=[
                replace(check, holm=adjusted.get((i, j)))
                for j, check in enumerate(finding.checks)
            ],
        )
        for i, finding in enumerate(findings)
    ]


# -- effects -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Effect:
    """How far the second of two groups lies from the first, with its 95 % interval.

    Ratios are kept by their logarithms to base 10, differences as they are.
    """

    middle: float
    low: float
    high: float
    n: int
    is_ratio: bool

    def __str__(self) -> str:
        """`9.79×, 7.33 to 13.1`; one starting point has no interval."""
        text = f"{10**self.middle:.3g}×" if self.is_ratio else f"{self.middle:+.2f}"
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            return text
        low, high = (
            f"{10**edge:.3g}" if self.is_ratio else f"{edge:+.2f}"
            for edge in (self.low, self.high)
        )
        return f"{text}, {low} to {high}"

    @property
    def edges(self) -> tuple[float, float, float]:
        """Middle, low and high as they are drawn: ratios, or differences."""
        if not self.is_ratio:
            return self.middle, self.low, self.high
        high = 10**self.high if self.high < 300 else math.inf
        return 10**self.middle, 10**self.low, high


def effect_of(moved: Sequence[float], is_ratio: bool) -> Effect:
    """The mean of paired differences (of logarithms), with Student's interval.

    Of fewer than three starting points it is unbounded: of two it spans decades.
    """
    known = len(moved) >= MIN_STARTS
    low, high = student_interval(moved) if known else (-math.inf, math.inf)
    return Effect(
        middle=float(np.mean(moved)), low=low, high=high, n=len(moved), is_ratio=is_ratio
    )


def published_effect(paper: Published, is_ratio: bool) -> Effect:
    """Of published means ± standard deviations of unpaired trials, by Welch (1947)."""
    (a, sd_a), (b, sd_b) = paper
    middle, errors = b - a, np.array([sd_a, sd_b])
    if is_ratio:  # by the delta method
        middle, errors = math.log10(b / a), errors / [a, b] / math.log(10)
    squares = errors**2 / TRIALS
    half = 0.0
    if squares.any():
        freedom = squares.sum() ** 2 / (squares**2 / (TRIALS - 1)).sum()
        half = stats.t.ppf(1 - LEVEL, freedom) * math.sqrt(squares.sum())
    return Effect(
        middle=middle, low=middle - half, high=middle + half, n=TRIALS, is_ratio=is_ratio
    )


def moves(
    first: Sequence[float], second: Sequence[float], ratio: bool
) -> tuple[list[float], bool]:
    """Differences of pairs, of logarithms where all are positive; whether they are."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    by_ratio = ratio and min(a.min(), b.min()) > 0
    moved = np.log10(b) - np.log10(a) if by_ratio else b - a
    return moved.tolist(), bool(by_ratio)


# -- predicates --------------------------------------------------------------------------


def by_test(p: float, opposite: float, n: int) -> Verdict:
    """Of a one-sided test and of its opposite: shown, refuted, or neither.

    For a paired t test that is the same as: the 95 % interval lies on the claimed side of
    zero, on the other, or across it.
    """
    if n < MIN_STARTS or not min(p, opposite) < LEVEL:
        return Verdict.UNDECIDED
    return Verdict.REPRODUCED if p < LEVEL else Verdict.NOT_REPRODUCED


def _by_size(ours: Effect, theirs: Effect) -> Verdict:
    """The published number is excluded; or it is in, and no change is out; or neither."""
    if ours.n < MIN_STARTS:
        return Verdict.UNDECIDED
    if not ours.low <= theirs.middle <= ours.high:
        return Verdict.NOT_REPRODUCED
    return Verdict.UNDECIDED if ours.low <= 0 <= ours.high else Verdict.REPRODUCED


def paired(
    claim: str,
    first: Sequence[float],
    second: Sequence[float],
    *,
    larger: bool = True,
    ratio: bool = True,
    paper: Published | None = None,
    sized: bool = True,
    role: Role = Role.PRIMARY,
) -> Check:
    """Is the second of each pair larger (or smaller)? Paired t test, by pairs' seeds.

    Args:
        claim: in words.
        first: values; `first[i]` and `second[i]` share a starting point.
        second: values.
        larger: the direction claimed.
        ratio: compare by ratios (logarithms), where all values are positive.
        paper: (mean, sd) of both groups in the paper.
        sized: whether the size is held to the paper's, as well as the direction.
        role: of the claim in its item.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if not len(a):
        return Check(claim=claim, ours="–", n=0, role=role)
    moved, by_ratio = moves(a, b, ratio)
    signed = np.array(moved) if larger else -np.array(moved)
    n, flips, p = len(a), sign_flip(signed), paired_t(signed)
    opposite = 1 - p
    if exact := not math.isfinite(p):  # no spread to test against
        p, opposite = flips, sign_flip(-signed)
    means = " → ".join(mean_sd(*mean_and_sd(values)) for values in (a.tolist(), b.tolist()))
    count = f"{int((signed > 0).sum())} of {n} {'larger' if larger else 'smaller'}"
    ours, published, size, overlaps = effect_of(moved, by_ratio), "", None, False
    if paper is not None:
        theirs = published_effect(paper, by_ratio)
        (low, low_sd), (high, high_sd) = paper
        published = f"{low:g} ± {low_sd:g} → {high:g} ± {high_sd:g} ({theirs})"
        overlaps = theirs.low <= ours.high and ours.low <= theirs.high
        size = _by_size(ours, theirs) if sized and role is not Role.BEYOND else None
    return Check(
        claim=claim,
        paper=published,
        ours=f"{means} ({ours}; {count})",
        n=n,
        p=p if n > 1 else None,
        flip_p=flips if n > 1 else None,
        verdict=by_test(p, opposite, n),
        size=size,
        overlaps=overlaps,
        role=role,
        exact=exact,
    )


def by_both_solvers(protocol: Check, best: Check) -> Check:
    """The protocol's check, whose verdict the best value found must share.

    Verdicts that contradict each other leave it to the solver; one that is undecided
    leaves it undecided. The size is the protocol's: the paper has no other.
    """
    found = {protocol.verdict, best.verdict}
    verdict = protocol.verdict
    if found == {Verdict.REPRODUCED, Verdict.NOT_REPRODUCED}:
        verdict = Verdict.SOLVER
    elif Verdict.UNDECIDED in found:
        verdict = Verdict.UNDECIDED
    return replace(protocol, verdict=verdict)


def trend(
    claim: str,
    x: Sequence[float],
    runs: Sequence[Sequence[float]],
    *,
    rising: bool = True,
    ours: str = "",
    role: Role = Role.PRIMARY,
) -> Check:
    """Does y rise (or fall) with x, within starting points? Page's L (1963), exact.

    What shares a starting point is compared with each other alone. One-sided.

    Args:
        claim: in words.
        x: where y was observed.
        runs: for each starting point y at every x; one that lacks a number is left out.
        rising: the direction claimed.
        ours: what was found; the mean of Kendall's tau is added.
        role: of the claim in its item.
    """
    at, sign = np.asarray(x, float), 1 if rising else -1
    rows = [sign * np.asarray(run, float) for run in runs]
    rows = [row for row in rows if len(row) > 1 and np.isfinite(row).all()]
    taus = [float(stats.kendalltau(at, row).statistic) for row in rows if np.ptp(row)]
    # A starting point without any change counts as 0.
    tau = round(sign * sum(taus) / max(len(rows), 1), 2) + 0.0  # no -0.00
    text = f"tau {tau:+.2f}" if taus else "constant"
    p, opposite = (page_p(at, rows), page_p(-at, rows)) if taus else (1.0, 1.0)
    return Check(
        claim=claim,
        ours=f"{ours}; {text}" if ours else text,
        n=len(rows),
        p=p if taus else None,
        verdict=by_test(p, opposite, len(rows)),
        role=role,
        exact=True,
    )


def within(
    claim: str,
    values: Sequence[float],
    low: float,
    high: float,
    *,
    paper: str = "",
    role: Role = Role.PRIMARY,
) -> Check:
    """Does the mean lie in a range? Yes or no where its 95 % interval is on one side."""
    n, (mean, sd) = len(values), mean_and_sd(values or [math.nan])
    least, most = student_interval(values)
    verdict = Verdict.UNDECIDED
    if n >= MIN_STARTS and low <= least and most <= high:
        verdict = Verdict.REPRODUCED
    elif n >= MIN_STARTS and (most < low or least > high):
        verdict = Verdict.NOT_REPRODUCED
    interval = f" ({least:.3g} to {most:.3g})" if least < most < math.inf else ""
    return Check(
        claim=claim,
        paper=paper,
        ours=f"{mean_sd(mean, sd)}{interval}",
        n=n,
        verdict=verdict,
        role=role,
    )


def ratio_within(
    claim: str,
    first: Sequence[float],
    second: Sequence[float],
    low: float = 0.0,
    high: float = math.inf,
    *,
    paper: str = "",
    role: Role = Role.PRIMARY,
) -> Check:
    """Does the geometric mean of the pairs' ratios lie in a range?

    Nothing can be said where a value is not positive, or where there is none.
    """
    if not first or min(*first, *second) <= 0:
        return Check(
            claim=claim,
            paper=paper,
            ours="no ratio: not all are positive" if first else "–",
            n=len(first),
            role=role,
        )
    logs, _ = moves(first, second, True)
    edges = [math.log10(edge) if edge > 0 else -math.inf for edge in (low, high)]
    check = within(claim, logs, *edges, paper=paper, role=role)
    return replace(check, ours=str(effect_of(logs, True)))


def holds(
    claim: str,
    answer: bool,
    *,
    ours: str,
    n: int,
    paper: str = "",
    role: Role = Role.PRIMARY,
    counted: bool = False,
) -> Check:
    """A predicate without a test: a shape, or an identity, seen from starting points.

    What is `counted`, without any training, holds or does not.
    """
    verdict = Verdict.REPRODUCED if answer else Verdict.NOT_REPRODUCED
    if n < MIN_STARTS and not counted:
        verdict = Verdict.UNDECIDED
    return Check(
        claim=claim, paper=paper, ours=ours, n=n, verdict=verdict, role=role, exact=True
    )
