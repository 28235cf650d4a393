"""How curved is the risk? Its extreme Hessian eigenvalues, with error bounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sharpness import _tensors
from sharpness._arguments import (
    ensure,
    is_whole,
    of_a_risk,
    positive,
    require,
    whole,
    whole_seed,
)
from sharpness._ranks import Vectors
from sharpness._results import Cost, Reading, Result, Status, bars
from sharpness._run import Run
from sharpness.krylov.certificate import Intervals
from sharpness.krylov.dense import Dense
from sharpness.krylov.eigenpair_search import Found, Search
from sharpness.krylov.lanczos import WHICH, Which, allowed
from sharpness.measures.resumed import KeptSearch
from sharpness.risk import memory
from sharpness.risk.curvature import Matrix
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.identity import identity
from sharpness.risk.plan import Plan

_USUAL_PRODUCTS = 10  # and four more for each eigenvalue wanted
_USUAL_CONFIDENCE = 0.95  # of `lambda_max_upper` where none was asked for
Method = Literal["lanczos", "dense"]
_LARGEST_DENSE = 5000  # n; the matrix then takes 200 MB, its eigenvectors as much
_BASIS_TYPES = (torch.float32, torch.bfloat16)
_SPARE = 10  # least basis vectors beside the k wanted, of use in a thick restart
PRODUCTS = {
    "hessian": "Hessian-vector products",
    "gauss_newton": "Gauss-Newton products",
    "empirical_fisher": "empirical Fisher products",
    "sampled_fisher": "sampled Fisher products",
    "gradient_covariance": "gradient covariance products",
}


def product_name(matrix: str) -> str:
    """What products with a matrix are called.

    Raises:
        ValueError: an unknown matrix.
    """
    require(matrix in PRODUCTS, "matrix", f"be one of {', '.join(PRODUCTS)}", matrix)
    return PRODUCTS[matrix]


@dataclass(frozen=True, kw_only=True)
class HessianEigenpairs(Result):
    """Extreme eigenpairs of the Hessian of a risk, largest algebraic value first.

    An eigenvalue of the Hessian lies within `error_bounds[i]` of `eigenvalues[i]`: the
    smaller of the residual (plus noise), which is proven, and of `tol` times the value,
    which a converged run has reason to claim from the gaps it has seen.

    With the probability `confidence` over the random start, and for all k at once, each
    of the k largest lies within `tol` of a reported value, or above the last of them by
    at most `tol`, or in `hidden`: intervals, none where the run has converged (theorem in
    docs/concepts/spectra.md). Eigenvalues within 2 `tol` of each other, and copies of a
    repeated one, may count as one.
    """

    eigenvalues: Tensor  # (k,) float64, descending; unit: loss per parameter^2
    error_bounds: Tensor  # (k,) float64, same unit
    # (k,) float64: ||H v - lambda v||, by the recurrence where no product of the pair
    # was spent; there rounding comes on top, as `noise_floor` and `error_bounds` have it.
    residuals: Tensor
    # (k, n), rows orthonormal; of a sharded model this process's part of each
    eigenvectors: Tensor = field(repr=False, compare=False)
    # Of the leading pair, by a product of its own; None where the recurrence is trusted.
    explicit_residual: float | None = None
    lambda_max_upper: float | None = None  # at `confidence` (.95); None at which="SA"
    hidden: Intervals | None = None  # where a value may hide; None without a confidence
    noise_floor: float  # rounding and asymmetry of the products, same unit
    engine: str | None = None  # that multiplied; None when interrupted before

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue; NaN where that end was not asked for."""
        return self._end(0, self.settings["which"] in ("LA", "BE"), 1.0)

    @property
    def lambda_min(self) -> float:
        """The smallest eigenvalue; NaN where that end was not asked for."""
        which = self.settings["which"]
        at_bottom = which == "SA" or (which == "BE" and len(self.eigenvalues) > 1)
        return self._end(-1, at_bottom, -1.0)

    @property
    def num_converged(self) -> int:
        """How many values meet `tol`."""
        if self.status is Status.CONVERGED and self.explicit_residual is None:
            return len(self.eigenvalues)  # nothing took the claim back
        errors = allowed(self.eigenvalues.numpy(), self.noise_floor, self.settings["tol"])
        return int((self.error_bounds.numpy() <= errors).sum())

    def _rows(self) -> Iterable[Reading]:
        """Every eigenvalue: `lambda_max`, `lambda_2`, ..., `lambda_min`."""
        num, confidence = len(self.eigenvalues), self.settings.get("confidence")
        lead = "error bound"
        if num > 1 or not self.num_converged:
            lead += f", {self.num_converged} of {num} converged"
        if self.lambda_max_upper is not None:
            lead += f", below {self.lambda_max_upper:.4g} ({_percent(confidence)})"
        if self.settings.get("preconditioned"):
            lead += ", of P^-1/2 H P^-1/2"
        lead += hiding_place(self.hidden, confidence)
        for i, name in enumerate(self._reading_names()):
            yield Reading(
                name=name,
                value=float(self.eigenvalues[i]),
                error=float(self.error_bounds[i]),
                evidence="" if i else lead,
                axis="curvature, loss / parameter²",
            )
        if not num:
            yield Reading(name="lambda_max", value=math.nan)

    def _figure(self, path: Any, ax: Any) -> Any:
        """A bar for each eigenvalue with its error bound, and what is certified.

        A dashed line is what lambda_max is below; values may hide where it is hatched.
        """
        rows = [row for row in self._rows() if row.error is not None]
        upper, limit = self.lambda_max_upper, None
        confidence = _percent(self.settings.get("confidence"))
        if upper is not None and math.isfinite(upper):
            limit = upper, f"lambda_max is below ({confidence})"
        return bars(
            rows,
            "eigenvalue with its error bound, loss / parameter²",
            path,
            limit=limit,
            spans=[span for span in self.hidden or () if all(map(math.isfinite, span))],
            spans_label=f"others may hide here ({confidence}, all at once)",
            ax=ax,
        )

    def _reading_names(self) -> list[str]:
        num, which = len(self.eigenvalues), self.settings["which"]
        if which == "LM":
            return [f"lambda({i + 1} of {num})" for i in range(num)]
        at_bottom = {"LA": 0, "SA": num, "BE": num // 2}[which]
        top = [f"lambda_{i + 1}" for i in range(num - at_bottom)]
        bottom = [f"lambda_n-{i}" for i in reversed(range(at_bottom))]
        ends = {"lambda_1": "lambda_max", "lambda_n-0": "lambda_min"}
        return [ends.get(name, name) for name in top + bottom]

    def _end(self, index: int, asked: bool, sign: float) -> float:
        if not len(self.eigenvalues):
            return math.nan
        value = float(self.eigenvalues[index])
        # What is largest in modulus among the positive is largest of all.
        beyond_doubt = self.settings["which"] == "LM" and sign * value > 0
        in_parts = self.settings.get("in_parts", False)
        complete = not in_parts and len(self.eigenvalues) == self.eigenvectors.shape[1]
        return value if asked or beyond_doubt or complete else math.nan


def hiding_place(hidden: Intervals | None, confidence: float | None) -> str:
    """Where a value may hide, as the end of a line; empty where none can."""
    if not hidden:
        return ""
    places = ", ".join(f"({a:.4g}, {b:.4g})" for a, b in hidden[:3])
    more = f" and {len(hidden) - 3} more" if len(hidden) > 3 else ""
    return f"; others may hide in {places}{more} ({_percent(confidence)})"


def _percent(confidence: float | None) -> str:
    return f"{100 * (confidence or _USUAL_CONFIDENCE):.4g} %"


def leading(values: np.ndarray, which: str) -> int:
    """Position of the value that the search was for, in descending values."""
    if which == "LM":
        return int(np.argmax(np.abs(values)))
    return len(values) - 1 if which == "SA" else 0


@of_a_risk
def eigenpairs(
    risk: EmpiricalRisk,
    k: int = 1,
    *,
    which: Which = "LA",
    matrix: Matrix = "hessian",
    preconditioner: Tensor | None = None,
    tol: float = 1e-2,
    confidence: float | None = 0.95,
    method: Method = "lanczos",
    seed: int = 0,
    v0: Tensor | None = None,
    basis_size: int | None = None,
    basis_device: str | torch.device | None = None,
    basis_dtype: torch.dtype | None = None,
    max_hvps: int | None = None,
    max_seconds: float | None = None,
    progress: bool | None = None,
    resume: str | Path | None = None,
) -> HessianEigenpairs:
    r"""The k largest (or smallest) eigenvalues of the Hessian of f, and eigenvectors.

    Thick-restart Lanczos with full reorthogonalisation, stopped when the error bound of
    every wanted value is at most `tol` times the value (or times the noise floor, if that
    is larger) and no other that ought to be among them can hide, with the probability
    `confidence`. Where products are inexact, or so noisy that the recurrence may have erred
    by `tol`, one more product gives the residual of the leading pair explicitly.
    It is the largest *algebraic* value that the literature calls sharpness, so a large
    negative eigenvalue is never returned in its place.

    The value depends on the parametrisation (Dinh et al. 2017): a large one does not by
    itself mean bad generalisation.

    Args:
        risk: the mean loss f, held at the parameters theta.
        k: how many eigenpairs, 1 <= k <= n.
        which: `"LA"` the largest algebraic, `"SA"` the smallest, `"LM"` the largest in
            modulus, `"BE"` from both ends (k odd: one more at the top).
        matrix: `"hessian"`, or another matrix of `EmpiricalRisk.product`.
        preconditioner: P > 0, (n,): eigenpairs of $P^{-1/2} H P^{-1/2}$ instead, as
            `adam_preconditioner` gives it (Cohen et al. 2022).
        tol: error bound wanted, relative to each value; > 0. A value within twice
            `noise_floor` is a zero: it need not be known more closely than that.
        confidence: in (0, 1), that the values are the k wanted ones, up to `tol`: over
            the random start, for exact arithmetic (and counted in float32). None stops
            when the error bounds are met twice in a row, which now and then leaves a
            value out.
        method: `"lanczos"`, or `"dense"` to check it by: all n columns of the matrix and
            LAPACK, for n <= 5000. There `v0`, `basis_size` and `confidence` mean nothing.
        seed: of the random start vector.
        v0: start vector (n,), or eigenvectors (j, n) of an earlier result: following a
            training run then costs a few products a time. Half of the start stays
            random, drawn anew for other bits of `v0`, so that the confidence holds.
        basis_size: most Lanczos vectors held at once, at least k + 10 (or n). By default
            as many as half the free memory holds; the basis is shrunk when it is full,
            which costs products, not accuracy.
        basis_device: where they are held, such as "cpu" beside a full GPU; by default
            where the risk is.
        basis_dtype: `torch.bfloat16` holds them in half the memory of float32, with
            coefficients in float64. Directions are rounded before they are multiplied,
            which leaves residuals of about 1e-3 of the largest value; value and residual
            of all k pairs are then measured, by a product each, and are the error bounds.
            None: as the products.
        max_hvps: most products; by default 100 + 10 k (n where dense).
        max_seconds: stop after the product that passes this time.
        progress: show a bar; by default on a terminal.
        resume: a folder to keep the search in, every half minute and where it is cut
            short: the same call for the same f goes on from there, also on another
            number of processes; any other begins anew, and takes the folder over. A disk
            that cannot be written to is warned of, and ends nothing.
            Emptied when the search has converged. It takes as much room as the basis.

    Returns:
        `HessianEigenpairs`. An interrupt (Ctrl-C), `max_hvps` or `max_seconds` give
        what has been earned so far, with a status that says so.

    Raises:
        ValueError: `k` outside [1, n], `tol` <= 0, `max_hvps` < 1, an unknown `which`,
            `confidence` outside (0, 1), a `v0` or `preconditioner` of the wrong shape, a
            `basis_size` too small, `method="dense"` with n > 5000 or `max_hvps` < n.
        MemoryError: not even the smallest basis fits.

    Cost: about 6 to 35 products for k <= 5 at `tol=1e-2`, each about two gradients;
    memory (basis_size + 4) n beside the products' own. Where products are differences of
    gradients, their estimated error is part of every bound.

    References:
        Lanczos (1950); Wu and Simon (2000), SIAM J. Matrix Anal. Appl. 22(2), for the
        restart; Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13; van
        Dorsselaer, Hochstenbach, van der Vorst (2000), SIAM J. Matrix Anal. Appl. 22(3),
        section 3, for bounds from a random start.
    """
    of_n = f"k={k} (n={risk.n} parameters)"
    sound = is_whole(k) and 1 <= k <= risk.n
    ensure(sound, "k", "lie in [1, n]", of_n, "Ask for between 1 and n eigenpairs.")
    check_search(which, tol, confidence, max_hvps=max_hvps)
    known = basis_dtype is None or basis_dtype in _BASIS_TYPES
    contract = "be torch.float32, torch.bfloat16 or None"
    require(known, "basis_dtype", contract, basis_dtype, "None is as the products.")
    k, dense = int(k), _is_dense(method, risk.n, max_hvps)
    advice = "Only 'lanczos' takes vectors in parts."
    sound = not (dense and risk.is_sharded)
    ensure(sound, "method", "be 'lanczos' for a sharded model", "'dense'", advice)
    most = max_hvps or (risk.n if dense else 100 + 10 * k)
    held_on = torch.device(basis_device) if basis_device is not None else risk.device
    start, generator = _start(risk, v0, seed, whole=dense)
    start = start.to(held_on)
    multiply = _multiplication(risk, matrix, preconditioner, held_on, whole=dense)
    ensure(
        basis_size is None or basis_size >= min(risk.n, k + _SPARE),
        "basis_size",
        f"be at least k + {_SPARE} (or n={risk.n})",
        f"{basis_size} (k={k})",
        "Leave it out for what the memory holds.",
    )
    held_in = str(basis_dtype or risk.dtype).removeprefix("torch.")
    asked: dict[str, Any] = {
        "k": k,
        "which": which,
        "matrix": matrix,
        "seed": seed,
        "basis": held_in,
    }
    search: Search | Dense | None = None
    plan, kept = None, None
    run = Run(
        product_name(matrix),
        max_seconds=max_seconds,
        max_steps=most,
        min_steps=1,
        progress=progress,
        ranks=risk.ranks,
    )
    with run:
        plan = risk.prepare(most if dense else _USUAL_PRODUCTS + 4 * k, matrix)
        if dense:
            search = Dense(start, k=k, which=which)
        else:
            search = Search(
                start,
                generator,
                k=k,
                which=which,
                tol=tol,
                miss=None if confidence is None else (1 - confidence) / k,
                basis_size=basis_size
                or _affordable(risk, plan, k, most, held_on, basis_dtype or risk.dtype),
                vectors=risk.vectors,
                dtype=basis_dtype,
            )
            if resume is not None:
                asked |= {"tol": tol, "confidence": confidence}
                asked["differences"] = plan.engine == "differences"
                of_risk = identity(risk, v0=v0, preconditioner=preconditioner)
                key = {**asked, "risk": of_risk}
                kept = KeptSearch(resume, key, risk.vectors)
                kept.restore(search)
        del start
        while not search.is_converged:
            run.step()
            search.absorb(multiply(search.direction()), owned=True)
            if kept is not None and isinstance(search, Search):
                kept.keep(search)
        run.stop(Status.CONVERGED)
    if isinstance(search, Search) and kept is not None:
        kept.end(search, run.status)
    if search and search.num_products:
        plan = risk.prepare(1, matrix)  # the first product may have changed it
    return _result(
        risk,
        search,
        plan,
        run,
        multiply=multiply,
        most=most,
        k=k,
        confidence=confidence,
        which=which,
        tol=tol,
        seed=seed,
        matrix=matrix,
        preconditioned=preconditioner is not None,
        basis_dtype=held_in,
    )


def _result(
    risk: EmpiricalRisk,
    search: Search | Dense | None,
    plan: Plan | None,
    run: Run,
    *,
    multiply: Callable[[Tensor], Tensor],
    most: int,
    confidence: float | None,
    tol: float,
    **settings: object,
) -> HessianEigenpairs:
    """What a search has earned; verified by one product where it is not trusted."""
    which, inexact = str(settings["which"]), (plan and plan.relative_error) or 0.0
    upper, explicit, status, began = None, None, run.status, time.monotonic()
    verified = 0
    if search is None or not search.has_values:
        found = nothing(risk.theta, confidence)
    else:
        noise = search.noise
        if which != "SA":
            upper = search.upper(1 - (confidence or _USUAL_CONFIDENCE))
        may_verify = status is Status.CONVERGED and run.num_steps < most
        doubtful = bool(inexact) and not search.is_whole
        error = math.inf if doubtful else search.recurrence_error
        found = search.found(inexact)
        lead = leading(found.values, which)
        ends: list[float | None] = []
        if may_verify and isinstance(search, Search) and search.is_narrow:
            order = sorted(range(len(found.values)), key=lambda i: i != lead)
            largest = inexact * float(np.abs(found.values).max())
            for i in order:
                ends.append(_measured_anew(found, i, multiply, risk.vectors, largest))
                if ends[-1] is None:
                    break
        elif may_verify and error > allowed(found.values, noise, tol)[lead]:
            ends = [_verified(found, lead, noise, multiply, risk.vectors)]
        if ends:
            verified, explicit = sum(end is not None for end in ends), ends[0]
            if None in ends:
                status = Status.INTERRUPTED
    products = search.num_products if search else 0
    vectors = found.vectors if isinstance(search, Dense) else _whole(found.vectors, risk)
    return HessianEigenpairs(
        eigenvalues=torch.from_numpy(found.values),
        error_bounds=torch.from_numpy(found.bounds),
        residuals=torch.from_numpy(found.residuals),
        eigenvectors=vectors,
        explicit_residual=explicit,
        lambda_max_upper=upper,
        hidden=found.hidden,
        noise_floor=search.noise if search else math.nan,
        status=status,
        engine=plan.engine if plan else None,
        cost=Cost(
            products=products + verified,
            seconds=run.seconds + time.monotonic() - began,
        ),
        settings={
            **settings,
            "tol": tol,
            "confidence": confidence,
            **({"in_parts": True} if risk.is_sharded or risk.ranks.lost else {}),
        },
    )


def _whole(parts: Tensor, risk: EmpiricalRisk) -> Tensor:
    """Eigenvectors (k, n) from this process's part of each.

    The part itself for a sharded model, and where another process is lost.
    """
    if risk.ranks.size == 1 or risk.ranks.lost or risk.is_sharded:
        return parts
    try:
        whole = [risk.vectors.whole(part) for part in parts]
    except KeyboardInterrupt:
        return parts
    return torch.stack(whole) if whole else parts.new_empty((0, risk.n))


def _verified(
    found: Found,
    i: int,
    noise: float,
    multiply: Callable[[Tensor], Tensor],
    vectors: Vectors,
) -> float | None:
    """The residual of pair i by a product of its own; None when interrupted.

    One that is larger than the recurrence had it takes the claim of `tol` back.
    """
    v = found.vectors[i]
    try:
        vectors.ranks.heed()
        difference = torch.add(multiply(v), v, alpha=-float(found.values[i]))
        residual = vectors.norm(difference)
    except KeyboardInterrupt:
        return None
    doubtful = residual > 2 * (found.residuals[i] + noise)
    found.residuals[i] = residual
    proven = residual + noise
    found.bounds[i] = proven if doubtful else min(found.bounds[i], proven)
    return residual


def _measured_anew(
    found: Found,
    i: int,
    multiply: Callable[[Tensor], Tensor],
    vectors: Vectors,
    inexact: float,
) -> float | None:
    """Value and residual of pair i by a product of its own; None when interrupted.

    Those of a basis of rounded rows are off by their rounding, which is not in a product.
    """
    v = found.vectors[i]
    try:
        vectors.ranks.heed()
        product = multiply(v)
        value = vectors.dot(v, product)
        rounded = 8 * torch.finfo(product.dtype).eps * vectors.norm(product)
        residual = vectors.norm(torch.sub(product, v, alpha=value))
    except KeyboardInterrupt:
        return None
    found.values[i], found.residuals[i] = value, residual
    found.bounds[i] = residual + rounded + inexact  # the products' own error
    return residual


def _multiplication(
    risk: EmpiricalRisk,
    matrix: Matrix,
    preconditioner: Tensor | None,
    held_on: torch.device,
    whole: bool,
) -> Callable[[Tensor], Tensor]:
    """The map v -> M v, or P^-1/2 M P^-1/2 v, for vectors on the basis' device.

    For whole vectors, or for this process's part of them.
    """
    whole = whole or risk.ranks.size == 1
    product = risk.product if whole else risk.product_part
    if preconditioner is None:
        return lambda v: product(v, matrix).to(held_on)
    p = preconditioner.detach().to(risk.theta)
    ensure(
        p.shape == risk.theta.shape and bool(((p > 0) & p.isfinite()).all()),
        "preconditioner",
        f"be positive, finite and of shape (n,) with n={risk.n}",
        f"shape {tuple(p.shape)}, smallest {float(p.min()) if len(p) else 0:.3g}",
        "`adam_preconditioner(risk, optimizer.state_dict())` gives one.",
    )
    scale = p.rsqrt()
    if not (whole or risk.is_sharded):
        scale = risk.vectors.part(scale)
    return lambda v: product(v.to(scale.device) * scale, matrix).mul_(scale).to(held_on)


def _affordable(
    risk: EmpiricalRisk,
    plan: Plan,
    k: int,
    most: int,
    held_on: torch.device,
    dtype: torch.dtype,
) -> int:
    """Lanczos vectors that half of the free memory holds, beside the products' own."""
    needed = min(risk.n, k + _SPARE)
    free = memory.budget_bytes(held_on) / memory.SHARE
    if held_on == risk.device:
        free -= plan.predicted_bytes
    row = dtype.itemsize * -(-risk.n // risk.ranks.size)  # bytes of it here
    fit = int(risk.ranks.least(int(free / 2 / row)))
    ensure(
        2 * fit >= needed,
        "k",
        f"leave room for a basis of {needed} vectors",
        f"k={k}, and memory for {max(0, 2 * fit)} of {row / 1e9:.2f} GB each on {held_on}",
        "Pass a smaller `k` or another `basis_device`.",
        MemoryError,
    )
    return max(needed, min(risk.n, most, fit))


def nothing(like: Tensor, confidence: float | None) -> Found:
    """What a run has found that was interrupted before its first product."""
    none = np.empty(0)
    anywhere = None if confidence is None else ((-math.inf, math.inf),)
    return Found(none, none, none, like.new_empty((0, like.numel())), anywhere)


def _start(
    risk: EmpiricalRisk, v0: Tensor | None, seed: int, whole: bool
) -> tuple[Tensor, torch.Generator]:
    """A start c + g as `Search` wants it, and the generator that drew g.

    Whole, or this process's part of it.
    """
    vectors = Vectors(risk.n) if whole else risk.vectors
    if v0 is None:
        generator = _tensors.seeded(seed)
        return vectors.normal(risk.theta, generator), generator
    v = (v0.sum(0) if v0.ndim == 2 else v0).to(risk.theta)
    ensure(
        v.shape == risk.theta.shape and (risk.is_sharded or float(_tensors.norm64(v)) > 0),
        "v0",
        f"be a nonzero vector (n,) or (j, n) with n={risk.n}",
        f"shape {tuple(v0.shape)}",
        "Leave it out for a random start.",
    )
    # The g that led to v0 is not independent of it, so another one is drawn.
    mixed = _tensors.mixed(whole_seed(seed), v0)
    generator = _tensors.seeded(risk.ranks.objects(mixed)[0])
    # Half of it random: an old eigenvector alone is blind to a new one.
    v = v if whole or risk.is_sharded else vectors.part(v)
    c = v * v.new_tensor(math.sqrt(risk.n) / vectors.norm(v))
    return c + vectors.normal(v, generator), generator


def _is_dense(method: str, n: int, max_hvps: int | None) -> bool:
    dense = method == "dense"
    require(method in get_args(Method), "method", "be 'lanczos' or 'dense'", method)
    ensure(
        not dense or n <= _LARGEST_DENSE,
        "method",
        f"be 'lanczos' for more than {_LARGEST_DENSE} parameters",
        f"'dense' (n={n})",
        "Ask for a higher `confidence` or another `seed` instead.",
    )
    ensure(
        not dense or max_hvps is None or max_hvps >= n,
        "max_hvps",
        "be at least n for method='dense'",
        f"{max_hvps} (n={n})",
        "Leave it out, or use 'lanczos'.",
    )
    return dense


def check_confidence(confidence: float | None) -> None:
    """That it is None or lies in (0, 1).

    Raises:
        ValueError: it does not.
    """
    sound, contract = confidence is None or 0 < confidence < 1, "lie in (0, 1) or be None"
    require(sound, "confidence", contract, confidence, "The default is 0.95.")


def check_search(
    which: str, tol: float, confidence: float | None, **limit: int | None
) -> None:
    """That the arguments of a search for eigenpairs are in their range.

    Args:
        which: as in `eigenpairs`.
        tol: as in `eigenpairs`.
        confidence: as in `eigenpairs`.
        limit: the one on the number of steps, under its name.

    Raises:
        ValueError: one is not.
    """
    kinds = "'LA' (largest algebraic), 'SA' (smallest), 'LM' (largest in modulus)"
    require(which in WHICH, "which", f"be {kinds} or 'BE' (both ends)", which)
    positive("tol", tol, "The default is 1e-2.")
    check_confidence(confidence)
    for name, most in limit.items():
        whole(name, 1 if most is None else most, 1, "Leave it out for the default.")
