"""How curved is the risk? Its extreme Hessian eigenvalues, with error bounds."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sharpness import _progress, _tensors
from sharpness.krylov.lanczos import (
    LanczosState,
    RitzPairs,
    lanczos,
    meets,
    ritz_pairs,
    upper_bound,
)
from sharpness.results import Result, Status
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.linearised import Matrix
from sharpness.risk.plan import Plan

Which = Literal["LA", "SA"]
_USUAL_PRODUCTS = 10  # and four more for each eigenvalue wanted
_PRODUCTS = {
    "hessian": "Hessian-vector products",
    "gauss_newton": "Gauss-Newton products",
    "empirical_fisher": "empirical Fisher products",
    "sampled_fisher": "sampled Fisher products",
    "gradient_covariance": "gradient covariance products",
}


@dataclass(frozen=True, kw_only=True)
class HessianEigenpairs(Result):
    """Extreme eigenpairs of the Hessian of a risk, largest algebraic value first.

    An eigenvalue of the Hessian lies within `error_bounds[i]` of `eigenvalues[i]`: the
    smaller of the residual (plus noise), which is proven, and of `tol` times the value,
    which a converged run has reason to claim from the gaps it has seen. That it is the
    i-th is not proven: a single start can miss a value (a second copy of a repeated
    one, above all). `lambda_max_upper` bounds what a random start may have missed at
    the top, and a second seed tells more than a smaller `tol`.
    """

    eigenvalues: Tensor  # (k,) float64, descending; unit: loss per parameter^2
    error_bounds: Tensor  # (k,) float64, same unit
    residuals: Tensor  # (k,) float64, ||H v - lambda v||
    eigenvectors: Tensor = field(repr=False, compare=False)  # (k, n), rows orthonormal
    lambda_max_upper: float | None  # 95 %; None with `v0=` or `which="SA"`
    noise_floor: float  # rounding and asymmetry of the products, same unit
    status: Status
    num_hvps: int
    seconds: float
    which: str
    tol: float
    seed: int
    matrix: str
    engine: str | None  # that multiplied; None when interrupted before

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue found."""
        return float(self.eigenvalues[0]) if len(self.eigenvalues) else math.nan

    @property
    def num_converged(self) -> int:
        """How many values meet `tol`."""
        return int(_met(self.eigenvalues, self.error_bounds, self).sum())

    def __str__(self) -> str:
        name = "lambda_max" if self.which == "LA" else "lambda_min"
        if not len(self.eigenvalues):
            return f"{name} unknown ({self.status}, {self.num_hvps} products)"
        index = 0 if self.which == "LA" else -1
        value, bound = self.eigenvalues[index], self.error_bounds[index]
        return (
            f"{name} {float(value):.4g} ± {float(bound):.1g}   "
            f"({self.num_converged} of {len(self.eigenvalues)} converged, "
            f"{self.num_hvps} {_PRODUCTS[self.matrix]}, {self.seconds:.1f} s)"
        )


def eigenpairs(
    risk: EmpiricalRisk,
    k: int = 1,
    *,
    which: Which = "LA",
    matrix: Matrix = "hessian",
    tol: float = 1e-2,
    seed: int = 0,
    v0: Tensor | None = None,
    max_hvps: int | None = None,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> HessianEigenpairs:
    r"""The k largest (or smallest) eigenvalues of the Hessian of f, and eigenvectors.

    Lanczos with full reorthogonalisation, stopped when, twice in a row, the error bound
    of every wanted value is at most `tol` times the value (or times the noise floor, if
    that is larger). On trained networks stopping at the first time left a value out in
    one run of four, stopping at the second in one of fifteen.
    It is the largest *algebraic* value that the literature calls sharpness, so a large
    negative eigenvalue is never returned in its place.

    The value depends on the parametrisation (Dinh et al. 2017): a large one does not by
    itself mean bad generalisation.

    Args:
        risk: the mean loss f, held at the parameters theta.
        k: how many eigenpairs, 1 <= k <= n.
        which: `"LA"` the largest algebraic, `"SA"` the smallest.
        matrix: `"hessian"`, or another matrix of `EmpiricalRisk.product`.
        tol: error bound wanted, relative to each value; > 0.
        seed: of the random start vector.
        v0: start vector (n,), or eigenvectors (j, n) of an earlier result.
        max_hvps: most products; by default 100 + 10 k, at most n.
        max_seconds: stop after the product that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `HessianEigenpairs`. An interrupt (Ctrl-C), `max_hvps` or `max_seconds` give
        what has been earned so far, with a status that says so.

    Raises:
        ValueError: `k` outside [1, n], `tol` <= 0, `max_hvps` < 1, an unknown `which`
            or a `v0` of the wrong length.

    Cost: about 5 to 30 products for k <= 5 at `tol=1e-2`, each about two gradients;
    memory (products + k) n. Where products are differences of gradients, their estimated
    error is part of every bound.

    References:
        Lanczos (1950); Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13.
    """
    _check(risk, k, which, tol, max_hvps)
    began = time.monotonic()
    sign = 1.0 if which == "LA" else -1.0
    most = min(risk.n, max_hvps or 100 + 10 * k)
    generator = torch.Generator().manual_seed(seed)
    start = _start_vector(risk, v0, generator)
    states = lanczos(lambda v: sign * risk.product(v, matrix), start, generator)
    state: LanczosState | None = None
    plan: Plan | None = None
    settled, status = 0, Status.MAX_HVPS
    with _progress.bar("Hessian-vector products", None, progress) as bar:
        try:
            plan = risk.prepare(_USUAL_PRODUCTS + 4 * k, matrix)
            for new in states:
                if not math.isfinite(new.alphas[-1] + new.betas[-1]):
                    status = Status.NON_FINITE
                    break
                state = new
                bar.update()
                settled = settled + 1 if meets(state, k, tol) else 0
                if settled >= 2 or (settled and state.invariant):
                    status = Status.CONVERGED
                    break
                if len(state.alphas) >= most:
                    break
                if max_seconds is not None and time.monotonic() - began > max_seconds:
                    status = Status.MAX_SECONDS
                    break
        except KeyboardInterrupt:
            status = Status.INTERRUPTED
    trusted = tol if status is Status.CONVERGED else None
    inexact = plan.relative_error if plan and plan.relative_error else 0.0
    found = _extracted(state, k, sign, risk, trusted, inexact)
    upper = None
    if state is not None and v0 is None and which == "LA":
        upper = upper_bound(state, risk.n)
    return HessianEigenpairs(
        **found,
        lambda_max_upper=upper,
        noise_floor=state.noise if state else math.nan,
        status=status,
        num_hvps=len(state.alphas) if state else 0,
        seconds=time.monotonic() - began,
        which=which,
        tol=tol,
        seed=seed,
        matrix=matrix,
        engine=plan.engine if plan else None,
    )


def _met(values: Tensor, bounds: Tensor, result: HessianEigenpairs) -> Tensor:
    floor = values.abs().clamp(min=result.noise_floor)
    if result.num_hvps >= result.eigenvectors.shape[1]:
        return torch.ones_like(values, dtype=torch.bool)  # the whole space
    return bounds <= result.tol * floor


def _extracted(
    state: LanczosState | None,
    k: int,
    sign: float,
    risk: EmpiricalRisk,
    trusted: float | None,
    product_error: float,
) -> dict[str, Tensor]:
    """Eigenpairs of H from a Lanczos state of sign * H, in descending order.

    The error bound is the residual, which is proven; or `trusted` times the value, if
    the run ended because r^2 / gap is below that. The quotient itself is not reported:
    close eigenvalues that the Krylov space has not told apart beat it by far.
    """
    if state is None:
        none = torch.empty(0, dtype=torch.float64)
        vectors = risk.theta.new_empty((0, risk.n))
        names = ("eigenvalues", "error_bounds", "residuals")
        return {**dict.fromkeys(names, none), "eigenvectors": vectors}
    pairs: RitzPairs = ritz_pairs(state, k)
    inexact = product_error * np.abs(pairs.values).max()
    bounds = state.noise + pairs.residuals + inexact
    if trusted is not None:
        floor = np.maximum(pairs.bounds + inexact, trusted * np.abs(pairs.values))
        bounds = np.minimum(bounds, floor)
    order = np.argsort(-sign * pairs.values, kind="stable")
    coefficients = torch.from_numpy(pairs.coefficients[order]).to(state.basis)
    return {
        "eigenvalues": torch.from_numpy(sign * pairs.values[order]),
        "error_bounds": torch.from_numpy(bounds[order]),
        "residuals": torch.from_numpy(pairs.residuals[order]),
        "eigenvectors": coefficients @ state.basis,
    }


def _start_vector(
    risk: EmpiricalRisk, v0: Tensor | None, generator: torch.Generator
) -> Tensor:
    if v0 is None:
        return _tensors.random_unit(risk.theta, generator)
    v = (v0.sum(0) if v0.ndim == 2 else v0).to(risk.theta)
    if v.shape != risk.theta.shape or not float(_tensors.norm64(v)) > 0:
        raise ValueError(
            f"`v0` must be a nonzero vector (n,) or (j, n) with n={risk.n}; "
            f"got shape {tuple(v0.shape)}. Leave it out for a random start."
        )
    # Half of it random: an old eigenvector alone is blind to a new one.
    return v / _tensors.norm64(v).to(v.dtype) + _tensors.random_unit(v, generator)


def _check(
    risk: EmpiricalRisk, k: int, which: str, tol: float, max_hvps: int | None
) -> None:
    if not (isinstance(k, int) and 1 <= k <= risk.n):
        raise ValueError(
            f"`k` must lie in [1, n]; got k={k} (n={risk.n} parameters). "
            "Ask for between 1 and n eigenpairs."
        )
    if which not in ("LA", "SA"):
        raise ValueError(
            f"`which` must be 'LA' (largest algebraic) or 'SA' (smallest); got {which!r}."
        )
    if not tol > 0:
        raise ValueError(f"`tol` must be positive; got {tol}. The default is 1e-2.")
    if max_hvps is not None and max_hvps < 1:
        raise ValueError(
            f"`max_hvps` must be at least 1; got {max_hvps}. Leave it out for the default."
        )
