"""Means, paired tests, and comparisons of groups of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sharpness._results import Reading

LEVEL = 0.025  # of every test, on each side


def paired_t(differences: np.ndarray) -> float:
    """One-sided p of a mean above 0; NaN below two, or where all are the same."""
    # Differences equal to rounding have no spread to test against.
    if len(differences) < 2 or np.ptp(differences) <= 1e-9 * np.abs(differences).max():
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue)


def sign_flip(differences: np.ndarray) -> float:
    """Exact: all 2^n sign patterns (a random 9999 of them beyond 13 pairs)."""
    if len(differences) == 1:
        return 0.5 if differences[0] > 0 else 1.0
    return float(
        stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            alternative="greater",
            rng=np.random.default_rng(0),
        ).pvalue
    )


def page_p(x: np.ndarray, rows: Sequence[np.ndarray]) -> float:
    """One-sided p of Page's L (1963): do rows (k,) rise with x (k,)? Exact, ties too.

    Were there no trend, every order of a row's values would be as likely as any other,
    in each row for itself. All k! orders up to k = 8, a random 50 000 beyond.
    """
    at = np.rint(2 * stats.rankdata(x)).astype(int)  # doubled: ties have half ranks
    found, null = 0, np.ones(1)
    for row in rows:
        ranks = np.rint(2 * stats.rankdata(row)).astype(int)
        found += int(at @ ranks)
        sums = _orders(ranks) @ at
        null = np.convolve(null, np.bincount(sums) / len(sums))
    return min(1.0, float(null[found:].sum()))


def _orders(values: np.ndarray) -> np.ndarray:
    if len(values) <= 8:
        return np.array(list(permutations(values.tolist())))
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(values, (49_999, 1)), axis=1)
    return np.concatenate([values[None], shuffled])


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p (1979): one of m claims is wrong with this probability or less."""
    order = np.argsort(ps, kind="stable")
    factors = len(ps) - np.arange(len(ps))
    grown = np.minimum(1.0, np.maximum.accumulate(np.asarray(ps)[order] * factors))
    adjusted = np.empty(len(ps))
    adjusted[order] = grown
    return [float(p) for p in adjusted]


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval that `paired_t` decides by; without bounds below two values."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf(1 - LEVEL, n - 1)) * mean_and_sd(values)[1] / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def mean_and_sd(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for one value)."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), sd


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; NaN where there are too few."""
    if not len(values):
        return math.nan, math.nan
    array = np.asarray(values, float)
    if len(array) < 2 or not np.isfinite(array).all():
        return float(array.mean()), math.nan
    return float(array.mean()), float(array.std(ddof=1)) / math.sqrt(len(array))


def mean_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
    """Where the mean behind some draws lies: at each end the wider of two intervals.

    Student's t falls short on the long side of a lopsided distribution: 89 % of 95 for
    20 squares of normal numbers. Hall's takes the skewness out by a cubic; with both,
    94 %. NaN below three values.

    References:
        Hall (1992), J. R. Statist. Soc. B 54(1), eq. 2.5.
    """
    x = np.asarray(values, float)
    n = len(x)
    if n < 3 or not np.isfinite(x).all():
        return math.nan, math.nan
    mean, sd = float(x.mean()), float(x.std(ddof=1))
    if not sd > 0:
        return mean, mean
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) / math.sqrt(n)
    skewness = float(((x - mean) ** 3).mean()) / sd**3 * n / (n - 1)
    below = max(reach, _without_skewness(reach, skewness, n))
    above = max(reach, -_without_skewness(-reach, skewness, n))
    return mean - sd * below, mean + sd * above


def _without_skewness(reach: float, skewness: float, n: int) -> float:
    """Hall's cubic, solved for the studentised mean where it equals `reach`."""
    if abs(skewness) < 1e-6:
        return reach
    inside = 1 + skewness * (reach - skewness / (6 * n))
    return 3 / skewness * (float(np.cbrt(inside)) - 1)


def ratio_interval(
    above: float, below: float, variance: tuple[float, float, float], t: float
) -> tuple[float, float | None]:
    """Where the ratio behind two numbers lies; no high end where `below` may be 0.

    Fieller's set: the r > 0 with (above - r below)^2 <= t^2 V(r), V(r) = v0 + v1 r + v2 r^2
    the variance of that difference. A negative `below` counts as 0: this keeps all r that
    it would keep, and those near infinity, the closest there are to it.
    """
    v0, v1, v2 = variance
    v1 = max(v1, -2 * math.sqrt(v0 * v2))  # V is a variance
    below = max(below, 0.0)
    # bend r^2 - 2 half r + at0 <= 0
    bend, at0 = below**2 - t**2 * v2, above**2 - t**2 * v0
    half = above * below + t**2 * v1 / 2
    reach = half + math.sqrt(max(0.0, half**2 - bend * at0))
    if reach <= 0:
        return 0.0, None
    return max(0.0, at0 / reach), reach / bend if bend > 0 else None


@dataclass(frozen=True, kw_only=True)
class RelativeLine:
    """A line y = a + b x through positive y, each known to the same share of itself."""

    a: float  # >= 0
    b: float  # >= 0
    residual: float  # root mean square of (a + b x) / y - 1
    covariance: np.ndarray  # (2, 2) of a and b, before they were kept from being negative
    free: tuple[float, float]  # a and b, before
    t: float  # Student's quantile for the interval, n - 2 degrees of freedom

    def interval(self, i: int) -> tuple[float, float]:
        """Where a (0) or b (1) lies; from 0 on."""
        half = self.t * math.sqrt(self.covariance[i, i])
        return max(0.0, self.free[i] - half), max(0.0, self.free[i] + half)

    @property
    def ratio_interval(self) -> tuple[float, float | None]:
        """Where b / a lies; without a high end where a may be 0."""
        if not math.isfinite(self.t):
            return 0.0, None
        (v_a, v_ab), (_, v_b) = self.covariance
        variance = float(v_b), -2 * float(v_ab), float(v_a)
        return ratio_interval(max(0.0, self.free[1]), self.free[0], variance, self.t)


def relative_line(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
) -> RelativeLine:
    """Least squares of (a + b x) / y - 1, with a, b >= 0; two points at least.

    The errors' size is that of the residuals, so that of two points nothing is known of
    it, and every interval is unbounded.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    n = len(x)
    design = np.stack([1 / y, x / y], 1)
    scale = np.linalg.norm(design, axis=0)  # x may be 1e-4 or 1e6
    inverse = np.linalg.pinv(design / scale)
    free = inverse @ np.ones(n) / scale
    kept = free
    if free.min() < 0:  # the best on an edge of the quadrant
        i = int(np.argmax(free))
        kept = np.zeros(2)
        kept[i] = max(0.0, float(design[:, i].sum() / scale[i] ** 2))
    rest = design @ free - 1
    variance = float(rest @ rest) / (n - 2) if n > 2 else math.inf
    product = inverse @ inverse.T / np.outer(scale, scale)
    return RelativeLine(
        a=float(kept[0]),
        b=float(kept[1]),
        residual=float(np.sqrt(np.mean((design @ kept - 1) ** 2))),
        covariance=variance * product if n > 2 else np.full((2, 2), math.inf),
        free=(float(free[0]), float(free[1])),
        t=float(stats.t.ppf((1 + confidence) / 2, n - 2)) if n > 2 else math.inf,
    )


def mean_sd(mean: float, sd: float) -> str:
    """Mean ± standard deviation, both to the digits that the deviation allows."""
    if not math.isfinite(mean):
        return "–"
    if not math.isfinite(sd):
        return f"{mean:.4g}"
    if sd == 0:
        return f"{mean:.4g} ± 0"
    digits = max(0, 1 - math.floor(math.log10(sd)))
    if abs(mean) >= 1:
        digits = max(min(digits, 2), digits - 1) if sd < 0.005 else min(digits, 2)
    if digits > 5:
        return f"{mean:.3g} ± {sd:.1g}"
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class ReadingComparison:
    """One measure in two groups of checkpoints, and against the generalisation gap."""

    name: str
    first: tuple[float, float]  # mean, sd
    second: tuple[float, float]
    num_pairs: int
    num_larger: int  # pairs in which the second is larger
    num_smaller: int
    ratios: tuple[float, ...]  # second / first by pair; empty unless all are positive
    scale: str  # "log10" or "linear": what was tested
    effect_size: float  # mean over sd of the paired differences (Cohen's d_z)
    p_value: float  # one-sided paired t, "second larger"; NaN below two pairs
    sign_flip_p: float  # the same by sign flips, exact up to 13 pairs
    sign_flip_smallest: float  # the least that test can give
    beyond_error: bool | None  # one pair: whether it differs by more than both errors
    kendall_tau: float | None  # with the gap, over all checkpoints; None below four
    kendall_p: float | None  # two-sided; with ties exact up to 8 checkpoints
    bound: str = ""  # "≥" or "≤" where the values are bounds by construction

    @property
    def first_text(self) -> str:
        """`≥ 35 ± 15`: sign of a bound, mean and standard deviation."""
        return f"{self.bound} {mean_sd(*self.first)}".strip()

    @property
    def second_text(self) -> str:
        """The same of the second group."""
        return f"{self.bound} {mean_sd(*self.second)}".strip()

    @property
    def ratio(self) -> float:
        """Geometric mean of the ratios; NaN without."""
        if not self.ratios:
            return math.nan
        return float(np.exp(np.mean(np.log(self.ratios))))

    @property
    def verdict(self) -> str:
        """In words: larger, smaller, or no difference shown.

        Differences that are all the same have no spread for a t test: there it is the
        sign flips that show something, from six pairs on. Two pairs show nothing by any
        test but one of their own likeness: there only the signs are told. Bounds have no
        order, however far apart: of them it is said what was found.
        """
        return self._words.replace("second", "second found") if self.bound else self._words

    @property
    def _words(self) -> str:
        side = "larger" if self.num_larger else "smaller"  # where all pairs agree
        if self.num_pairs == 1:
            if self.beyond_error is False or self.first == self.second:
                return "the same was found" if self.bound else "within the errors"
            known = "" if self.beyond_error else " (no error known)"
            return f"second {side}{', bounds have no order' if self.bound else known}"
        if self.num_pairs == 2:
            agree = 2 in (self.num_larger, self.num_smaller)
            told = f"second {side} in both pairs, too few to test"
            return told if agree else "no difference shown"
        is_larger, shown = self.p_value < 0.5, min(self.p_value, 1 - self.p_value) < LEVEL
        if math.isnan(self.p_value):
            is_larger = self.num_larger == self.num_pairs
            all_agree = self.num_pairs in (self.num_larger, self.num_smaller)
            shown = all_agree and self.sign_flip_smallest < LEVEL
        if not shown:  # 5 % for both sides
            return "no difference shown"
        num = self.num_larger if is_larger else self.num_smaller
        everywhere = " in every pair" if num == self.num_pairs else ""
        return f"second {'larger' if is_larger else 'smaller'}{everywhere}"


Readings = Mapping[str, Mapping[str, Any]]  # name -> {"value", "error", "bound"}


def numbers_of(readings: Iterable[Reading]) -> dict[str, dict[str, Any]]:
    """What of readings is compared, by their names."""
    kept = ("value", "error", "bound")
    return {r.name: {name: getattr(r, name) for name in kept} for r in readings}


def compare_readings(
    first: Sequence[Readings],
    second: Sequence[Readings],
    gaps: Sequence[float | None],
) -> list[ReadingComparison]:
    """Compare every measure that all checkpoints have; `first[i]` pairs with `second[i]`.

    Positive values are compared by their logarithms, others as they are.

    Args:
        first: readings of each checkpoint of the first group.
        second: of the second group, in the same order.
        gaps: generalisation gap of each checkpoint, the first group's before the
            second's; None where it is unknown.

    Raises:
        ValueError: groups of different sizes, or empty ones.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"`first` and `second` must be pairs; got {len(first)} and {len(second)}."
        )
    if len(gaps) != 2 * len(first):
        raise ValueError(
            f"`gaps` must have one entry a checkpoint, {2 * len(first)}; got {len(gaps)}."
        )
    everywhere = [n for n in first[0] if all(n in r for r in (*first, *second))]
    found = []
    for name in everywhere:
        a, b = ([r[name]["value"] for r in group] for group in (first, second))
        if any(value is None or not math.isfinite(value) for value in (*a, *b)):
            continue
        row = _compared(
            name,
            np.array(a, float),
            np.array(b, float),
            [r[name].get("error") for r in (first[0], second[0])],
            gaps,
        )
        found.append(replace(row, bound=first[0][name].get("bound", "")))
    return found


def _compared(
    name: str,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    errors: Sequence[float | None],
    gaps: Sequence[float | None],
) -> ReadingComparison:
    positive = min(a.min(), b.min()) > 0
    differences = np.log10(b) - np.log10(a) if positive else b - a
    num, mean = len(a), float(differences.mean())
    sd = float(differences.std(ddof=1)) if num > 1 else math.nan
    constant = num < 2 or np.ptp(differences) <= 1e-9 * np.abs(differences).max()
    beyond = None
    if num == 1 and all(error is not None for error in errors):
        beyond = bool(abs(b[0] - a[0]) > sum(float(error or 0.0) for error in errors))
    tau, tau_p = _kendall(np.concatenate([a, b]), gaps)
    return ReadingComparison(
        name=name,
        first=mean_and_sd(a.tolist()),
        second=mean_and_sd(b.tolist()),
        num_pairs=num,
        num_larger=int((b > a).sum()),
        num_smaller=int((b < a).sum()),
        ratios=tuple((b / a).tolist()) if positive else (),
        scale="log10" if positive else "linear",
        effect_size=math.nan if constant else mean / sd,
        p_value=paired_t(differences),
        sign_flip_p=sign_flip(differences),
        sign_flip_smallest=0.5**num if num <= 13 else 1e-4,  # as `sign_flip` tries them
        beyond_error=beyond,
        kendall_tau=tau,
        kendall_p=tau_p,
    )


def _kendall(
    values: NDArray[np.float64], gaps: Sequence[float | None]
) -> tuple[float | None, float | None]:
    """Rank correlation of a measure with the gap; None below four checkpoints."""
    known = [(v, g) for v, g in zip(values, gaps, strict=True) if g is not None]
    if len(known) < 4:
        return None, None
    x, y = np.array(known, float).T
    found = stats.kendalltau(x, y)
    if not math.isfinite(found.statistic):
        return None, None
    has_ties = min(len(np.unique(x)), len(np.unique(y))) < len(x)
    p = _kendall_with_ties(x, y) if has_ties else found.pvalue
    return float(found.statistic), float(p)


def _kendall_with_ties(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Share of the orders with at least this |tau|: all 8!, a random 50 000 beyond.

    Ties make tau's distribution coarse and lopsided: the normal one that SciPy falls
    back to says 0.057 where the orders say 0.133.
    """
    first, second = np.triu_indices(len(x), 1)
    signs = np.sign(y[first] - y[second])

    def concordance(x: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return np.asarray(np.abs(np.sign(x[..., first] - x[..., second]) @ signs))

    found = stats.permutation_test(
        (x,),
        concordance,
        permutation_type="pairings",
        alternative="greater",
        vectorized=True,
        n_resamples=50_000,
        batch=1000,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
