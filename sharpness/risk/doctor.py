"""Is a risk fit to be measured? The pre-flight: `doctor(risk)`."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from sharpness import _tensors
from sharpness._results import (
    Cost,
    DerivativeDisagreesError,
    NondeterministicRiskError,
    Reading,
    Result,
    Status,
    counted,
)
from sharpness.risk.derivatives import Comparison
from sharpness.risk.differences import Differences
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.loss_terms import is_of_values
from sharpness.risk.model_state import batchnorm_layers, random_states

OK, NOTE, FAILED = "ok", "note", "failed"
_DISTANCES = ("symmetric", "gradient", "product", "differences")
_NAMED = 3  # names listed before "and n more"


@dataclass(frozen=True)
class CheckResult:
    """What one check saw; `advice` says what to do where something is to be done."""

    check: str
    status: str  # "ok", "note" (worth knowing) or "failed"
    text: str
    value: float | None = None
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:<6} {self.check:<16} {self.text} {self.advice}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Checkup(Result):
    """All findings about a risk; its status is `failed` where one of the checks has."""

    findings: tuple[CheckResult, ...]
    values: tuple[float, float]  # of f, evaluated twice

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return self.status.ok

    @property
    def _failed(self) -> list[CheckResult]:
        return [finding for finding in self.findings if finding.status == FAILED]

    def __getitem__(self, check: str) -> CheckResult:
        """The finding of a check, by its name."""
        return next(finding for finding in self.findings if finding.check == check)

    def readings(self) -> list[Reading]:
        """A row for each check: what it measured, if anything, and what it saw."""
        return [
            Reading(
                name=f.check,
                value=math.nan if f.value is None else f.value,
                evidence=f"{f.status}: {f.text} {f.advice}".rstrip(),
                axis="relative distance" if f.check in _DISTANCES else "",
            )
            for f in self.findings
        ]

    def __str__(self) -> str:
        verdict = f"{len(self._failed) or 'none'} failed"
        head = f"{len(self.findings)} checks, {verdict} ({self.seconds:.1f} s)"
        return "\n".join([head, *(f"  {finding}" for finding in self.findings)])

    def raise_for_status(self) -> Self:
        """Itself when no check failed.

        Raises:
            NondeterministicRiskError: two evaluations gave two values.
            ValueError: another check failed; the message is its finding.
        """
        if self.ok:
            return self
        if self["deterministic"].status == FAILED:
            raise NondeterministicRiskError(*self.values)
        first = self._failed[0]
        raise ValueError(
            f"`risk` must pass the check {first.check!r}; {first.text} {first.advice}"
        )


def doctor(risk: EmpiricalRisk, *, seed: int = 0) -> Checkup:
    """Check a risk before measuring it, and that measuring leaves the model untouched.

    - finite: f and its gradient are;
    - deterministic: value, gradient and product twice, bit for bit;
    - symmetric: |u.Hv - v.Hu| / (|u| |Hv|) for random u, v;
    - gradient, product: along one direction and on a few rows, the gradient beside
      differences of f and a product beside those of gradients, as `EmpiricalRisk` checks
      them before it claims anything;
    - differences: H v against differences of gradients, which catch a backward pass that
      is not differentiated;
    - inventory: engine, BatchNorm, dropout, random draws, parameters that are unused, have
      no curvature, are frozen or tied, loaders that shuffle, augment, drop samples or
      can be read once only; for regression, that values have the loss's unit;
    - untouched: parameters, buffers, modes, `.grad`, `requires_grad` and every random
      generator before and after all this, and after an exception in the forward pass.

    Args:
        risk: what is to be measured.
        seed: of the random directions.

    Cost: about 33 gradients and 4 products; one more pass through a loader.
    """
    began = time.perf_counter()
    before = _fingerprints(risk.model)
    generator = _tensors.seeded(seed)
    u, v = (_tensors.random_unit(risk.theta, generator) for _ in range(2))
    asked, risk = risk, _working(risk)
    values = risk.value(), risk.value()
    first, second = risk.gradient(), risk.gradient()
    hu, hv, again = risk.hvp(u), risk.hvp(v), risk.hvp(v)
    findings = (
        _finite(values[0], first),
        _deterministic(values, (first, second), (hv, again)),
        _symmetric(risk, (u, hu), (v, hv)),
        *_derivatives(asked),
        _differences(risk),
        _engine(risk),
        *_inventory(risk, first, hv),
        *_data(risk),
        _scale(risk),
        _untouched(risk, before),
    )
    failed = any(finding.status == FAILED for finding in findings)
    return Checkup(
        findings=findings,
        values=values,
        status=Status.FAILED if failed else Status.COMPLETED,
        cost=Cost(seconds=time.perf_counter() - began),
        settings={"seed": seed},
    )


# -- numbers -----------------------------------------------------------------------------


def _working(risk: EmpiricalRisk) -> EmpiricalRisk:
    """The risk, or what computes where it refuses to."""
    try:
        risk.prepare()
    except DerivativeDisagreesError:
        return risk.unchecked()
    return risk


def _derivatives(risk: EmpiricalRisk) -> Iterator[CheckResult]:
    slope, product = risk.beside_differences()
    advice = (
        "Look for `detach`, `no_grad`, `.data`, NumPy, rounding or a custom backward pass."
    )
    yield _compared("gradient", f"a slope of {slope}", slope, advice)
    found = _compared(
        "product", f"a product of norm {product}", product, "Use engine='differences'."
    )
    if not slope.disagrees and product.disagrees and risk.engine in ("auto", "differences"):
        advice = "Differences of gradients are taken instead."
        found = replace(found, status=NOTE, advice=advice)
    yield found


def _compared(check: str, text: str, seen: Comparison, advice: str) -> CheckResult:
    if seen.agrees is None:
        text = "rounding or kinks hide whether it is the derivative"
        return CheckResult(check, NOTE, text)
    return _judged(check, seen.agrees, text, seen.apart, advice)


def _judged(
    check: str, sound: bool, text: str, value: float | None, advice: str
) -> CheckResult:
    if sound:
        return CheckResult(check, OK, text, value)
    return CheckResult(check, FAILED, f"{text}.", value, advice)


def _finite(value: float, gradient: Tensor) -> CheckResult:
    sound = bool(torch.isfinite(gradient).all()) and np.isfinite(value)
    text = f"f = {value:.4g}" if sound else f"f = {value}, or its gradient, is not"
    advice = "Look for NaN or infinite values in parameters, buffers and data."
    return _judged("finite", sound, text, value, advice)


def _deterministic(
    values: tuple[float, float],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
) -> CheckResult:
    same = values[0] == values[1] or values[0] != values[0]
    if same and all(_bytes(a) == _bytes(b) for a, b in (first, second)):
        return CheckResult(
            "deterministic", OK, "value, gradient and product twice: same bits"
        )
    apart = max(float((a - b).abs().max()) for a, b in (first, second))
    text = f"two evaluations gave {values[0]!r} and {values[1]!r}"
    if same:
        text = f"two evaluations differ by up to {apart:.1g} in the gradient or product"
    advice = "Remove what varies from call to call in the model or closure."
    return CheckResult("deterministic", FAILED, text + ".", apart, advice)


def _symmetric(
    risk: EmpiricalRisk, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> CheckResult:
    (u, hu), (v, hv) = first, second
    size = float(torch.maximum(_tensors.norm64(hu), _tensors.norm64(hv)))
    apart = abs(float(_tensors.dot64(u, hv) - _tensors.dot64(v, hu)))
    relative = apart / size if size else 0.0
    allowed = max(_rounding(risk), 10 * (risk.prepare().relative_error or 0.0))
    text = f"|u.Hv - v.Hu| is {relative:.1g} of |Hv|"
    advice = "A custom backward pass may be wrong: try engine='differences'."
    return _judged("symmetric", relative <= allowed, text, relative, advice)


def _differences(risk: EmpiricalRisk) -> CheckResult:
    plan = risk.prepare()
    if plan.relative_error is not None:
        text = f"products are differences of gradients, good to {plan.relative_error:.1g}"
        return CheckResult("differences", NOTE, text, plan.relative_error)
    differences = Differences(partial(risk.gradient, freeze_batchnorm=True), risk.theta)
    exact = risk.hvp(differences.probe)
    size = float(_tensors.norm64(exact))
    apart = float(_tensors.norm64(differences.product - exact)) / size if size else 0.0
    error = differences.relative_error
    text = f"H v and differences of gradients are {apart:.1g} apart"
    advice = (
        "Something in the model is cut off from the second derivative (`detach`, a "
        "custom backward pass): use engine='differences'."
    )
    sound = apart <= max(10 * error, _rounding(risk))
    if sound and not error < 0.1:
        text += f", but the latter are only good to {error:.1g}"
        return CheckResult("differences", NOTE, text, apart)
    return _judged("differences", sound, text, apart, advice)


def _rounding(risk: EmpiricalRisk) -> float:
    """Relative error that rounding in the model's coarsest type may cause."""
    types = {p.dtype for p in risk.model.parameters() if p.is_floating_point()}
    types |= {risk.autocast} if risk.autocast else set()
    return min(0.3, 1e4 * max(torch.finfo(dtype).eps for dtype in types))


# -- inventory ---------------------------------------------------------------------------


def _engine(risk: EmpiricalRisk) -> CheckResult:
    plan = risk.prepare()
    text = f"{plan.engine} ({plan.reason}); about {plan.predicted_bytes / 1e6:.0f} MB"
    if plan.num_kept < plan.num_chunks and plan.engine != "differences":
        text += f"; {plan.num_kept} of {plan.num_chunks} graphs fit the memory"
    unusual = plan.engine == "differences" or "aside" in plan.reason or risk.notes
    return CheckResult("engine", NOTE if unusual else OK, "; ".join([text, *risk.notes]))


def _inventory(risk: EmpiricalRisk, gradient: Tensor, hv: Tensor) -> Iterator[CheckResult]:
    norms, modules = batchnorm_layers(risk.model), risk.model.named_modules()
    drops = [k for k, m in modules if isinstance(m, _DropoutNd) and m.p > 0]
    pieces = (_tensors.split(v, risk.shapes) for v in (gradient, hv))
    moves = {
        name: (bool(slope.any()), bool(curve.any()))
        for name, slope, curve in zip(risk.names, *pieces, strict=True)
    }
    unused, linear = (
        [k for k, move in moves.items() if move == kind]
        for kind in ((False, False), (True, False))
    )
    single = dict(risk.model.named_parameters())
    every = risk.model.named_parameters(remove_duplicate=False)
    tied = [name for name, _ in every if name not in single]
    draws = "the forward pass draws random numbers: the same ones at each evaluation"
    of_layers = f"{counted(len(norms), 'layer')}, on {risk.batchnorm} statistics"
    for check, text in (
        ("BatchNorm", of_layers if norms else ""),
        ("dropout", _listed("off while measuring:", drops)),
        ("random draws", draws if risk.draws_random_numbers else ""),
        ("unused", _listed("f does not depend on", unused)),
        ("no curvature", _listed("f is linear in", linear)),
        ("held fixed", _listed("not in theta:", [k for k in single if k not in moves])),
        ("tied", _listed("counted once, under another name:", tied)),
    ):
        if text:
            yield CheckResult(check, NOTE, text)


def _listed(text: str, names: list[str]) -> str:
    """The text with the names; empty where there is none."""
    return f"{text} {_some(names)}" if names else ""


def _data(risk: EmpiricalRisk) -> Iterator[CheckResult]:
    """What a loader would give on a second pass; the risk keeps the first."""
    source = risk.source
    if isinstance(source, tuple | list | Mapping):
        return
    if getattr(source, "drop_last", False):
        left_out = len(source.dataset) - risk.num_samples
        text = f"drop_last left out {left_out} of {len(source.dataset)} samples"
        yield CheckResult("drop_last", NOTE, text + ".", left_out, "Use drop_last=False.")
    if isinstance(source, Iterator):
        text = "a one-shot iterator: read once, and kept"
        yield CheckResult("data", NOTE, text)
        return
    yield _second_pass(risk.batches, risk.read_again(seed=1))


def _second_pass(kept: list[Any], again: list[Any]) -> CheckResult:
    first, second = _rows(kept), _rows(again)
    if first == second:
        return CheckResult("data", OK, "the loader gives the same data each time")
    shuffled = 2 * len(set(first) & set(second)) >= len(first)
    what = "another order (it shuffles)" if shuffled else "other values (it augments)"
    text = f"a second pass through the loader gives {what}; the first is kept."
    advice = "For a function that can be built again: no shuffling, no augmentation."
    return CheckResult("data", NOTE, text, advice=advice)


def _rows(given: list[Any]) -> list[str]:
    """A digest of every row, in order."""
    found = []
    for batch in given:
        parts = [p.cpu() for p in tree_leaves(batch) if isinstance(p, Tensor) and p.ndim]
        found += [_digest(*row) for row in zip(*(p.unbind() for p in parts), strict=False)]
    return found


def _scale(risk: EmpiricalRisk) -> CheckResult:
    """What can be said of high and low before anything is measured."""
    text = "no threshold: compare with networks on the same loss, data and radius."
    if risk.has_outputs and is_of_values(risk.loss):
        text += " A loss times c has lambda_max and trace times c, and another phi."
        advice = "Standardise the targets."
        return CheckResult("high or low", NOTE, text, advice=advice)
    return CheckResult("high or low", OK, text)


# -- untouched ---------------------------------------------------------------------------


def _untouched(risk: EmpiricalRisk, before: dict[str, str]) -> CheckResult:
    changed = _changed(risk, before)
    if not changed:
        _fail_once(risk)
        changed = [f"{k} (after an exception)" for k in _changed(risk, before)]
    text = "parameters, buffers, modes, gradients, generators: same bits, also after "
    text = f"changed: {_some(changed)}" if changed else text + "an exception"
    advice = "The model changes itself in its forward pass, outside its buffers."
    return _judged("untouched", not changed, text, None, advice)


def _fail_once(risk: EmpiricalRisk) -> None:
    """Interrupt an evaluation in the middle."""

    def fail(*_: Any) -> None:
        raise _DeliberateError

    *_, last = risk.model.modules()
    with last.register_forward_hook(fail), suppress(_DeliberateError):
        risk.value_and_gradient()


class _DeliberateError(Exception):
    pass


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """A digest of everything that measuring must leave as it is, by name."""
    found: dict[str, Any] = {f"{k}.training": m.training for k, m in model.named_modules()}
    for name, p in model.named_parameters():
        found[name] = _digest(p)
        found[f"{name}.requires_grad"] = p.requires_grad
        found[f"{name}.grad"] = None if p.grad is None else _digest(p.grad)
    found |= {name: _digest(buffer) for name, buffer in model.named_buffers()}
    found["random generators"] = random_states()
    return {name: str(value) for name, value in found.items()}


def _changed(risk: EmpiricalRisk, before: dict[str, str]) -> list[str]:
    after = _fingerprints(risk.model)
    return [k for k in {**before, **after} if before.get(k) != after.get(k)]


def _digest(*tensors: Tensor) -> str:
    return hashlib.blake2b(b"".join(map(_bytes, tensors))).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
