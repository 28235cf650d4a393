"""Does each interval hold the truth as often as it says? Every one is counted.

    python benchmarks/coverage.py [CASE ...] [--runs 400] [--again]
    python benchmarks/coverage.py --page

A case is an interval and a problem whose right value is known in closed form. Each run has
another seed, and other data where the interval is about the data. What is counted is the
interval as it stands in the result, whatever its status. Where a result has a standard
error and no interval, it is that times Student's t. A band, or the entries of a diagonal,
are counted point by point: the mean over points, and over the tenth that is covered least.

Matrices have random eigenvectors; their products are plain ones, in float64 unless float32
is named. Results go to `coverage.json` beside this file, a case that is there is not run
again, and `--page` writes `docs/concepts/coverage.md` from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor, nn

import sharpness as sh
from sharpness.measures import flatness, traces
from sharpness.measures import spectrum as spectrum_module
from sharpness.results import SpectralDensity

TARGET = Path(__file__).with_name("coverage.json")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "concepts" / "coverage.md"
N = 200
MAX_HVPS = 100  # intervals that are still wide then count as well
INDEX = np.arange(1, N + 1.0)
SPECTRA = {
    "equal": np.ones(N),
    "flat": np.linspace(0.5, 1.5, N),
    "i^-0.5": INDEX**-0.5,
    "i^-1": INDEX**-1.0,
    "i^-2": INDEX**-2.0,
    "0.8^i": 0.8**INDEX,
    "outliers": np.append(np.linspace(-0.05, 0.1, N - 4), [2.0, 4.0, 7.0, 20.0]),
    "one": np.append(np.zeros(N - 1), 5.0),
    "both signs": np.append(np.linspace(-1, 1, N - 1), 1.0),
    "normal": stats.norm.ppf((INDEX - 0.5) / N),
    "trained": np.concatenate(
        [
            1e-3 * stats.norm.ppf(INDEX[:170] / 171),
            stats.expon.ppf(INDEX[:25] / 26) / 3,
            [3.0, 4, 5, 7, 10],
        ]
    ),
}


@dataclass(frozen=True)
class Case:
    """What is counted: `run` tells for a seed which points were covered."""

    interval: str
    problem: str
    run: Callable[[int], Any]  # seed -> bool, or array of bool
    claim: float = 0.95

    @property
    def name(self) -> str:
        return f"{self.interval}: {self.problem}"


def count(case: Case, runs: int) -> dict[str, Any]:
    """The share covered: its mean, its error, and that of the worst tenth of points."""
    began = time.monotonic()
    hits = np.array([np.atleast_1d(case.run(seed)) for seed in range(runs)], float)
    by_run, by_point = hits.mean(1), np.sort(hits.mean(0))
    tenth = float(by_point[: max(1, len(by_point) // 10)].mean())
    spread = max(
        float(by_run.std()), math.sqrt(case.claim * (1 - case.claim) / len(by_point))
    )
    return {
        "interval": case.interval,
        "problem": case.problem,
        "claimed": case.claim,
        "covered": float(by_run.mean()),
        "standard_error": spread / math.sqrt(runs),
        "worst_tenth": tenth if len(by_point) > 1 else None,
        "runs": runs,
        "seconds": round(time.monotonic() - began, 1),
    }


def within(interval: tuple[float, float], truth: float) -> bool:
    """Whether it is covered, up to the rounding of the truth itself."""
    slack = 1e-12 * abs(truth)
    return interval[0] - slack <= truth <= interval[1] + slack


def by_t(value: float, error: float, num: int, truth: float) -> bool:
    """Whether Student's t interval from a standard error of `num` draws covers."""
    t = float(stats.t.ppf(0.975, num - 1))
    return within((value - t * error, value + t * error), truth)


# -- matrices ------------------------------------------------------------------------


class Point(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)


@cache
def rotated(spectrum: str) -> Tensor:
    gauss = np.random.default_rng(0).normal(size=(N, N))
    q = np.linalg.qr(gauss)[0]
    return torch.from_numpy(q * SPECTRA[spectrum] @ q.T)


@cache
def matrix_risk(spectrum: str, dtype: torch.dtype = torch.float64) -> sh.EmpiricalRisk:
    """A risk with this Hessian; its products are plain ones."""
    matrix = rotated(spectrum).to(dtype)

    def quadratic(model: nn.Module, _: Tensor) -> Tensor:
        return 0.5 * model.theta @ matrix @ model.theta

    risk = sh.EmpiricalRisk(
        Point(torch.zeros(N, dtype=dtype)), closure=quadratic, data=[torch.zeros(1)]
    )
    risk.product = lambda v, _="hessian": v @ matrix  # type: ignore[method-assign]
    return risk


def trace(spectrum: str, method: str, dtype: torch.dtype, seed: int) -> bool:
    risk = matrix_risk(spectrum, dtype)
    found = sh.trace(risk, method=method, seed=seed, max_hvps=MAX_HVPS)
    return within(found.interval, float(np.trace(rotated(spectrum).to(dtype).double())))


def frobenius_norm(spectrum: str, seed: int) -> bool:
    found = traces.frobenius_norm(matrix_risk(spectrum), seed=seed, max_hvps=MAX_HVPS)
    return within(found.interval, float(np.linalg.norm(SPECTRA[spectrum])))


def diagonal(spectrum: str, seed: int) -> np.ndarray:
    found = traces.diagonal(matrix_risk(spectrum), seed=seed, max_hvps=MAX_HVPS)
    t = stats.t.ppf(0.975, found.num_probes - 1)
    off = (found.values - rotated(spectrum).diag()).abs()
    return (off <= t * found.standard_errors + 1e-12).numpy()


@cache
def density_points(spectrum: str, sigma: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Where there is some density, the density there, and the width in its unit."""
    values = SPECTRA[spectrum]
    width, rng = sigma * float(np.ptp(values)), np.random.default_rng(1)
    low, high = values.min() - 2 * width, values.max() + 2 * width
    points = np.append(rng.uniform(low, high, 60), rng.choice(values, 40, replace=False))
    z = (points[:, None] - values) / width
    true = np.exp(-0.5 * z**2).mean(1) / (width * math.sqrt(2 * math.pi))
    seen = true > 1e-6 * true.max()
    return points[seen], true[seen], width


@cache
def density(spectrum: str, seed: int) -> SpectralDensity:
    return sh.spectral_density(matrix_risk(spectrum), num_starts=5, num_steps=40, seed=seed)


def band(spectrum: str, sigma: float, seed: int) -> np.ndarray:
    """As `spectral_density` gives it for this grid and sigma, from the same starts."""
    points, true, width = density_points(spectrum, sigma)
    found = density(spectrum, seed)
    (low, high) = spectrum_module._band(
        found.rules, points, width, N, 0.95, found.product_error
    )[1]
    return (low <= true) & (true <= high)


def negative_mass(spectrum: str, seed: int) -> bool:
    truth = float(np.maximum(-SPECTRA[spectrum], 0).mean())
    return within(density(spectrum, seed).negative_mass.interval, truth)


def effective_dimension(spectrum: str, seed: int) -> bool:
    values = np.maximum(SPECTRA[spectrum], 0)
    ridge = 0.1 * float(values.max())
    found = density(spectrum, seed).effective_dimension(ridge)
    return within(found.interval, float((values / (values + ridge)).sum()))


def count_above(spectrum: str, seed: int) -> bool:
    """Above the middle of the range, between two eigenvalues."""
    values = np.sort(SPECTRA[spectrum])
    i = int(np.searchsorted(values, values[0] + np.ptp(values) / 2))
    found = density(spectrum, seed).count_above(float(values[i - 1 : i + 1].mean()))
    return within(found.interval, float(N - i))


def lambda_max_upper(spectrum: str, seed: int) -> bool:
    found = sh.eigenpairs(matrix_risk(spectrum), seed=seed)
    return bool(found.lambda_max_upper >= SPECTRA[spectrum].max() * (1 - 1e-12))


def lambda_max(spectrum: str, seed: int) -> bool:
    found = sh.eigenpairs(matrix_risk(spectrum), seed=seed)
    off = abs(found.lambda_max - float(SPECTRA[spectrum].max()))
    return bool(off <= float(found.error_bounds[0]))


# -- other samples, noise, draws -----------------------------------------------------


def lambda_max_sampling(variances: tuple[float, ...], num: int, seed: int) -> bool:
    """Least squares on normal inputs: the Hessian of the distribution is 2 Sigma."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(variances, dtype=torch.float64).sqrt()
    x = torch.randn(num, len(variances), generator=generator, dtype=torch.float64) * scale
    y = torch.randn(num, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(len(variances), 1, bias=False, dtype=torch.float64)
    risk = sh.EmpiricalRisk(model, nn.MSELoss(), (x, y))
    found = sh.lambda_max_sampling(risk, seed=seed, progress=False)
    return within(found.interval, 2 * max(variances))


@cache
def quadratic(curvatures: tuple[float, ...]) -> sh.EmpiricalRisk:
    h = torch.tensor(curvatures, dtype=torch.float64)
    return sh.EmpiricalRisk(
        Point(torch.zeros(len(h), dtype=torch.float64)),
        closure=lambda model, _: 0.5 * (h * model.theta**2).sum(),
        data=[torch.zeros(1)],
    )


def average_case(curvatures: tuple[float, ...], seed: int) -> bool:
    found = sh.average_case_sharpness(quadratic(curvatures), rho=0.1, seed=seed)
    truth = 0.5 * 0.1**2 * sum(curvatures)
    if hasattr(found, "interval"):
        return within(found.interval, truth)
    return by_t(found.value, found.standard_error, found.num_draws, truth)


class Margin(nn.Module):
    """Two classes, told apart by the sign of theta^T x."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor) -> Tensor:
        margin = x @ self.theta
        return torch.stack([-margin, margin], 1)


@cache
def margins(dimension: int) -> tuple[sh.EmpiricalRisk, float]:
    """A linear classifier, and the sigma at which its mean accuracy has fallen by 0.1.

    Under noise of standard deviation sigma on theta, x is told right with probability
    Phi(y theta^T x / (sigma ||x||)).
    """
    generator = torch.Generator().manual_seed(dimension)
    x = torch.randn(500, dimension, generator=generator, dtype=torch.float64)
    theta = torch.ones(dimension, dtype=torch.float64)
    noisy = x @ theta + torch.randn(500, generator=generator, dtype=torch.float64) / 2
    y = (noisy > 0).long()
    distances = ((2 * y - 1) * (x @ theta) / x.norm(dim=1)).numpy()
    accuracy = float((distances > 0).mean())

    def drop(log_sigma: float) -> float:
        mean = stats.norm.cdf(distances / math.exp(log_sigma)).mean()
        return float(accuracy - mean - 0.1)

    sigma = math.exp(optimize.brentq(drop, -12, 12))
    return sh.EmpiricalRisk(Margin(theta), nn.CrossEntropyLoss(), (x, y)), sigma


def pac_bayes_sigma(dimension: int, seed: int) -> bool:
    risk, truth = margins(dimension)
    found = flatness.pac_bayes_sigma(risk, seed=seed, progress=False)
    if getattr(found, "interval", None) is not None:
        return within(found.interval, truth)
    num = found.settings["num_draws"]
    return by_t(found.value, found.standard_error or math.nan, num, truth)


@cache
def regression(outputs: int) -> tuple[sh.EmpiricalRisk, float]:
    """Least squares with several outputs: H_{s,s'} = 0 but for s = s'."""
    generator = torch.Generator().manual_seed(outputs)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    model = nn.Linear(6, outputs, bias=False, dtype=torch.float64)
    with torch.no_grad():
        shape = model.weight.shape
        model.weight.copy_(torch.randn(shape, generator=generator, dtype=torch.float64))
    risk = sh.EmpiricalRisk(model, nn.MSELoss(), (x, x[:, :outputs]))
    curvature = 2 / (50 * outputs) * float((x**2).sum())
    return risk, curvature * float((model.weight.detach() ** 2).sum())


def relative_flatness(outputs: int, seed: int) -> bool:
    risk, truth = regression(outputs)
    found = flatness.relative_flatness(risk, seed=seed, progress=False)
    if hasattr(found, "intervals"):
        return within(found.intervals[0], truth)
    return by_t(found.values[0], found.standard_errors[0], found.num_probes, truth)


# -- which ---------------------------------------------------------------------------

METHODS = {
    "hutch++": tuple(s for s in SPECTRA if s != "equal"),
    "hutchinson": ("flat", "i^-1", "outliers", "both signs"),
    "xtrace": tuple(s for s in SPECTRA if s != "equal"),
}
WIDE = ("equal", "i^-1", "outliers", "both signs", "normal", "trained")
VARIANCES = {
    "one leads": (4.0, *[1.0] * 9),
    "two near the top": (1.1, 1.0, *[0.3] * 8),
    "all equal": (1.0,) * 10,
}
CURVATURES = {
    "one eigenvalue rules": (100.0, *[0.1] * 49),
    "two eigenvalues rule": (100.0, 50.0, *[0.1] * 48),
    "equal": (1.0,) * 50,
}
CASES = (
    *(
        Case(f"trace, {method}", spectrum, partial(trace, spectrum, method, torch.float64))
        for method, spectra in METHODS.items()
        for spectrum in spectra
    ),
    *(
        Case(
            f"trace, {method}",
            f"{spectrum}, float32",
            partial(trace, spectrum, method, torch.float32),
        )
        for method in METHODS
        for spectrum in ("equal", "i^-2")
    ),
    *(Case("Frobenius norm", s, partial(frobenius_norm, s)) for s in WIDE),
    *(Case("diagonal, entry by entry", s, partial(diagonal, s)) for s in WIDE),
    *(
        Case(f"density, sigma {sigma:.1%} of the range", s, partial(band, s, sigma))
        for sigma in (0.01, 0.003, 0.001)
        for s in ("flat", *WIDE[1:])
    ),
    *(
        Case("negative mass", s, partial(negative_mass, s))
        for s in ("outliers", "both signs", "normal", "trained")
    ),
    *(
        Case(name, s, partial(run, s))
        for name, run in (
            ("effective dimension", effective_dimension),
            ("count above t", count_above),
        )
        for s in ("flat", *WIDE[1:])
    ),
    *(
        Case(name, s, partial(run, s))
        for name, run in (
            ("lambda_max ± bound", lambda_max),
            ("lambda_max_upper", lambda_max_upper),
        )
        for s in WIDE
    ),
    *(
        Case("lambda_max_sampling", name, partial(lambda_max_sampling, variances, 200))
        for name, variances in VARIANCES.items()
    ),
    *(
        Case("average case", name, partial(average_case, curvatures))
        for name, curvatures in CURVATURES.items()
    ),
    *(
        Case("pac_bayes_sigma", f"{d} dimensions", partial(pac_bayes_sigma, d))
        for d in (1, 2, 20)
    ),
    *(
        Case("relative flatness", f"{m} outputs", partial(relative_flatness, m))
        for m in (1, 4)
    ),
)

# -- the page ------------------------------------------------------------------------

INTRODUCTION = """# Do the intervals cover?

Every interval the library prints, counted on problems whose right value is known: how often
it holds the truth. Written by `python benchmarks/coverage.py --page` from
`benchmarks/coverage.json`; matrices have 200 eigenvalues and are named by their spectrum.
Behind ± is the standard error of a share. Bands and diagonals are counted point by point,
with the tenth of the points that is covered least beside them. A slow test counts fewer
runs of the same cases.
"""


def page(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| interval | problem | runs | claimed | covered | worst tenth |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found = results.get(case.name)
        if found is None:
            continue
        worst = "" if found["worst_tenth"] is None else f"{found['worst_tenth']:.1%}"
        lines.append(
            f"| {case.interval} | {case.problem} | {found['runs']} "
            f"| {found['claimed']:.0%} | "
            f"{found['covered']:.1%} ± {found['standard_error']:.1%} | {worst} |"
        )
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", help="beginnings of names; all by default")
    parser.add_argument("--file", type=Path, default=TARGET)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--again", action="store_true", help="also what is there")
    parser.add_argument("--page", action="store_true", help="write the page only")
    given = parser.parse_args()
    results = json.loads(given.file.read_text()) if given.file.exists() else {}
    if given.page:
        PAGE.write_text(page(results))
        return
    torch.set_num_threads(1)
    for case in CASES:
        asked = not given.cases or case.name.startswith(tuple(given.cases))
        if not asked or (case.name in results and not given.again):
            continue
        results[case.name] = count(case, given.runs)
        print(case.name, results[case.name], flush=True)
        given.file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
