"""Intervals for a mean, by other means than the library's."""

import math

import numpy as np
from scipy import stats
from scipy.optimize import brentq


def mean_ends(x: np.ndarray, confidence: float) -> tuple[float, float]:
    """At each end the wider of Student's t interval and Hall's, found by a root search."""
    n, mean, sd = len(x), x.mean(), x.std(ddof=1)
    t = stats.t.ppf((1 + confidence) / 2, n - 1)
    skewness = ((x - mean) ** 3).mean() / sd**3 * n / (n - 1)

    def transformed(studentised: float) -> float:
        cubic = skewness * studentised**2 / 3 + skewness**2 * studentised**3 / 27
        return studentised + cubic + skewness / (6 * n)

    ends = [
        brentq(lambda s, y=y: transformed(s) - y / math.sqrt(n), -1e3, 1e3, xtol=1e-14)
        for y in (t, -t)
    ]
    plain = t / math.sqrt(n)
    return mean - sd * max(plain, ends[0]), mean - sd * min(-plain, ends[1])
