"""Paired comparisons of small and large batch, and the verdicts drawn from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import stats


class Verdict(StrEnum):
    """What our numbers say of a paper's ordering."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE_SOLVER = "inconclusive (solver)"
    INCONCLUSIVE_FEW = "inconclusive (too few pairs)"


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Is the large-batch value larger than the small-batch one, pair by pair?

    The pairs share a starting point. Ratios are compared, so everything is done on
    log10 of the values, which must be positive.
    """

    num_pairs: int
    num_larger: int  # pairs in which large > small
    ratio: float  # geometric mean of large / small
    p_value: float  # one-sided paired t test on log10; NaN below two pairs
    sign_flip_p: float  # exact one-sided sign-flip test of the mean of log10 ratios
    sign_flip_smallest: float  # the least that test can give: 2^-num_pairs

    @property
    def larger_in_every_pair(self) -> bool:
        """The ordering holds without exception."""
        return self.num_larger == self.num_pairs


def paired_comparison(small: Sequence[float], large: Sequence[float]) -> PairedComparison:
    """Compare values of pairs; `small[i]` and `large[i]` share a starting point.

    Raises:
        ValueError: unequal lengths, no pairs, or a value that is not positive and
            finite (its logarithm is wanted).
    """
    a, b = np.asarray(small, float), np.asarray(large, float)
    if a.shape != b.shape or not len(a):
        raise ValueError(
            f"`small` and `large` must be pairs; got {len(a)} and {len(b)} values."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all() and min(a.min(), b.min()) > 0):
        raise ValueError(
            f"`small` and `large` must be positive and finite; got {a.tolist()} and "
            f"{b.tolist()}. Compare logarithms only of values that have them."
        )
    differences = np.log10(b) - np.log10(a)
    return PairedComparison(
        num_pairs=len(a),
        num_larger=int((b > a).sum()),
        ratio=float(10 ** differences.mean()),
        p_value=_paired_t(differences),
        sign_flip_p=_sign_flip(differences),
        sign_flip_smallest=0.5 ** len(a),
    )


def _paired_t(differences: np.ndarray) -> float:
    # Differences equal to rounding have no spread to test against.
    if len(differences) < 2 or np.ptp(differences) <= 1e-9 * np.abs(differences).max():
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue)


def _sign_flip(differences: np.ndarray) -> float:
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


def order_verdict(best: PairedComparison, protocol: PairedComparison) -> Verdict:
    """Whether "large batch is sharper" holds, for both solvers of phi.

    The predicate: larger in every pair, and p < .05 in the paired t test.
    """
    if min(best.num_pairs, protocol.num_pairs) < 2:
        return Verdict.INCONCLUSIVE_FEW
    holds = [_holds(comparison) for comparison in (best, protocol)]
    if all(holds):
        return Verdict.REPRODUCED
    return Verdict.INCONCLUSIVE_SOLVER if any(holds) else Verdict.NOT_REPRODUCED


def _holds(comparison: PairedComparison) -> bool:
    return comparison.larger_in_every_pair and comparison.p_value < 0.05


def size_verdict(ratio: float, paper_ratio: float, factor: float = 10.0) -> bool:
    """Whether a ratio lies within a factor of the paper's."""
    return paper_ratio / factor <= ratio <= paper_ratio * factor


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for one value)."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), sd


@dataclass(frozen=True, kw_only=True)
class Row:
    """A quantity for small and large batch: ours over starting points, the paper's."""

    quantity: str
    small: tuple[float, float]  # mean, sd
    large: tuple[float, float]
    comparison: PairedComparison
    paper_small: tuple[float, float] | None = None
    paper_large: tuple[float, float] | None = None
    verdict: Verdict | None = None  # on the ordering, by both solvers of phi
    size_agrees: bool | None = None  # ratio within ten times of the paper's

    @property
    def paper_ratio(self) -> float | None:
        """Large over small batch in the paper."""
        if self.paper_small is None or self.paper_large is None:
            return None
        return self.paper_large[0] / self.paper_small[0]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that belong together: one way to train, one way to run BatchNorm."""

    title: str
    rows: list[Row]


def row(
    quantity: str,
    small: Sequence[float],
    large: Sequence[float],
    paper: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Row:
    """A row from paired values, beside the paper's (mean, sd) of each."""
    published = [(float(mean), float(sd)) for mean, sd in paper or ()]
    return Row(
        quantity=quantity,
        small=mean_and_sd(small),
        large=mean_and_sd(large),
        comparison=paired_comparison(small, large),
        paper_small=published[0] if published else None,
        paper_large=published[1] if published else None,
    )
