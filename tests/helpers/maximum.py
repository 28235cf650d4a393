"""Maxima over balls, and Auto-PGD written again from the paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.optimize import brentq

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


@dataclass
class Ascent:
    """What a run of the reference evaluated, and where it halved its step."""

    points: list[np.ndarray]
    values: list[float]
    halved_at: list[int]


def checkpoints(num_steps: int) -> list[int]:
    """w_j = ceil(p_j N) of section 4.1, in fractions."""
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    return sorted({math.ceil(share * num_steps) for share in p[:-1]})


def reference(
    function: Function, start: np.ndarray, rho: float, norm: str, num_steps: int
) -> Ascent:
    """Algorithm 1 of Croce and Hein (2020); x_max restarts without momentum."""

    def projected(x: np.ndarray) -> np.ndarray:
        if norm == "linf":
            return np.minimum(np.maximum(x, -rho), rho)
        return x * min(1.0, rho / max(np.linalg.norm(x), 1e-300))

    w, eta, halved_at = checkpoints(num_steps), 2 * rho, []
    x = x_before = projected(start)
    f, g = function(x)
    points, values, gained = [x], [f], []
    f_max, x_max, g_max, f_max_at_check = f, x, g, f
    for k in range(1, num_steps + 1):
        up = np.sign(g) if norm == "linf" else g / np.linalg.norm(g)
        z = projected(x + eta * up)
        alpha = 1.0 if k == 1 else 0.75
        x_next = projected(x + alpha * (z - x) + (1 - alpha) * (x - x_before))
        f_next, g_next = function(x_next)
        gained.append(f_next > f)
        points.append(x_next)
        values.append(f_next)
        x_before, x, f, g = x, x_next, f_next, g_next
        if f > f_max:
            f_max, x_max, g_max = f, x, g
        if k in w:
            j = w.index(k)
            since = gained[w[j - 1] :]
            too_few = sum(since) < 0.75 * len(since)
            idle = j > 1 and w[j - 1] not in halved_at and f_max == f_max_at_check
            f_max_at_check = f_max
            if too_few or idle:
                halved_at.append(k)
                eta /= 2
                x = x_before = x_max
                f, g = f_max, g_max
    return Ascent(points, values, halved_at)


def dense_quadratic(
    n: int, spectrum: tuple[float, float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A dense H with eigenvalues evenly spread over `spectrum`, and a gradient."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    h = q * np.linspace(*spectrum, n) @ q.T
    return (h + h.T) / 2, rng.normal(size=n)


def ball_maximum(h: np.ndarray, g: np.ndarray, rho: float) -> float:
    """max of g^T u + 1/2 u^T H u over ||u||_2 <= rho, by the secular equation."""
    values, q = np.linalg.eigh(h)
    b = q.T @ g

    def too_long(shift: float) -> float:
        return 1 / rho - 1 / np.linalg.norm(b / (shift - values))

    low, shift = max(values[-1], 0.0), 0.0
    if values[-1] >= 0 or too_long(0.0) > 0:
        start = low + 1e-12 * np.linalg.norm(b) / rho
        high = low + 2 * np.linalg.norm(b) / rho
        shift = brentq(too_long, start, high, xtol=1e-15, rtol=1e-14)
    u = q @ (b / (shift - values))
    return float(g @ u + 0.5 * u @ h @ u)
