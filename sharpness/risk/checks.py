"""Is a risk fit to be measured? The pre-flight: `doctor(risk)`."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from sharpness import _tensors
from sharpness._results import DerivativeDisagreesError, NondeterministicRiskError
from sharpness.risk import batches
from sharpness.risk.derivatives import Comparison, Derivatives
from sharpness.risk.differences import Differences
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.model_state import evaluation, seed_generators

OK, NOTE, FAILED = "ok", "note", "failed"
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
class Checkup:
    """All findings about a risk."""

    findings: tuple[CheckResult, ...]
    values: tuple[float, float]  # of f, evaluated twice
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(finding.status != FAILED for finding in self.findings)

    def __getitem__(self, check: str) -> CheckResult:
        """The finding of a check, by its name."""
        return next(finding for finding in self.findings if finding.check == check)

    def __str__(self) -> str:
        failed = sum(finding.status == FAILED for finding in self.findings)
        verdict = f"{failed} failed" if failed else "none failed"
        head = f"{len(self.findings)} checks, {verdict} ({self.seconds:.1f} s)"
        return "\n".join([head, *(f"  {finding}" for finding in self.findings)])

    def raise_for_status(self) -> Checkup:
        """Itself when no check failed.

        Raises:
            NondeterministicRiskError: two evaluations gave two values.
            ValueError: another check failed; the message is its finding.
        """
        if self.ok:
            return self
        if self["deterministic"].status == FAILED:
            raise NondeterministicRiskError(*self.values)
        first = next(finding for finding in self.findings if finding.status == FAILED)
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
      can be read once only;
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
    findings = [
        _finite(values[0], first),
        _deterministic(values, (first, second), (hv, again)),
        _symmetric(risk, (u, hu), (v, hv)),
        *_derivatives(asked),
        _differences(risk),
        _engine(risk),
        *_inventory(risk, first, hv),
        *_data(risk),
        _untouched(risk, before),
    ]
    return Checkup(
        findings=tuple(findings), values=values, seconds=time.perf_counter() - began
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
    seen = Derivatives()
    slope, product = seen.gradient(risk._sample), seen.product(risk._sample)
    advice = (
        "Look for `detach`, `no_grad`, `.data`, NumPy, rounding or a custom backward pass."
    )
    yield _compared("gradient", "a slope of", slope, FAILED, advice)
    mended = not slope.disagrees and risk._asked in ("auto", "differences")
    status, rest = NOTE if mended else FAILED, "Use engine='differences'."
    if mended:
        rest = "Differences of gradients are taken instead."
    yield _compared("product", "a product of norm", product, status, rest)


def _compared(
    check: str, what: str, seen: Comparison, trouble: str, advice: str
) -> CheckResult:
    if seen.disagrees:
        return CheckResult(check, trouble, f"{what} {seen}.", seen.apart, advice)
    if seen.agrees:
        return CheckResult(check, OK, f"{what} {seen}", seen.apart)
    text = "rounding or kinks hide whether it is the derivative"
    return CheckResult(check, NOTE, text)


def _finite(value: float, gradient: Tensor) -> CheckResult:
    if bool(torch.isfinite(gradient).all()) and np.isfinite(value):
        return CheckResult("finite", OK, f"f = {value:.4g}", value)
    advice = "Look for NaN or infinite values in parameters, buffers and data."
    return CheckResult(
        "finite", FAILED, f"f = {value}, or its gradient, is not.", value, advice
    )


def _deterministic(
    values: tuple[float, float],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
) -> CheckResult:
    same = values[0] == values[1] or values[0] != values[0]
    if same and all(_same_bits(a, b) for a, b in (first, second)):
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
    if relative <= allowed:
        return CheckResult("symmetric", OK, text, relative)
    advice = "A custom backward pass may be wrong: try engine='differences'."
    return CheckResult("symmetric", FAILED, text + ".", relative, advice)


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
    if apart <= max(10 * error, _rounding(risk)):
        status = OK if error < 0.1 else NOTE
        text += "" if status == OK else f", but the latter are only good to {error:.1g}"
        return CheckResult("differences", status, text, apart)
    advice = (
        "Something in the model is cut off from the second derivative (`detach`, a "
        "custom backward pass): use engine='differences'."
    )
    return CheckResult("differences", FAILED, text + ".", apart, advice)


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
    modules = dict(risk.model.named_modules())
    norms = [name for name, m in modules.items() if isinstance(m, _BatchNorm)]
    if norms:
        text = f"{len(norms)} layers, on {risk.batchnorm} statistics"
        yield CheckResult("BatchNorm", NOTE, text)
    drops = [k for k, m in modules.items() if isinstance(m, _DropoutNd) and m.p > 0]
    if drops:
        yield CheckResult("dropout", NOTE, f"off while measuring: {_some(drops)}")
    if _draws(risk):
        text = "the forward pass draws random numbers: the same ones at each evaluation"
        yield CheckResult("random draws", NOTE, text)
    yield from _parameters(risk, gradient, hv)


def _parameters(risk: EmpiricalRisk, gradient: Tensor, hv: Tensor) -> Iterator[CheckResult]:
    shapes, names = risk._objective.shapes, risk._objective.names
    pieces = zip(
        names, _tensors.split(gradient, shapes), _tensors.split(hv, shapes), strict=True
    )
    flat = [(name, bool(g.any()), bool(h.any())) for name, g, h in pieces]
    unused = [name for name, slope, curve in flat if not slope and not curve]
    if unused:
        yield CheckResult("unused", NOTE, f"f does not depend on {_some(unused)}")
    linear = [name for name, slope, curve in flat if slope and not curve]
    if linear:
        yield CheckResult("no curvature", NOTE, f"f is linear in {_some(linear)}")
    others = [name for name, _ in risk.model.named_parameters() if name not in set(names)]
    if others:
        yield CheckResult("held fixed", NOTE, f"not in theta: {_some(others)}")
    every = [name for name, _ in risk.model.named_parameters(remove_duplicate=False)]
    single = {name for name, _ in risk.model.named_parameters()}
    tied = [name for name in every if name not in single]
    if tied:
        yield CheckResult("tied", NOTE, f"counted once, under another name: {_some(tied)}")


def _draws(risk: EmpiricalRisk) -> bool:
    batch = risk._mean.counted[0].batch
    leaves = risk._objective.leaves(risk.theta)
    with evaluation(risk.model, risk.batchnorm):
        seed_generators()
        fresh = _generators()
        risk._objective.reduced(leaves, batch)
        return _generators() != fresh


def _data(risk: EmpiricalRisk) -> Iterator[CheckResult]:
    """What a loader would give on a second pass; the risk keeps the first."""
    source = risk._source
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
    kept = [chunk.batch for chunk in risk._mean.all]
    closed = risk._objective.closure is not None
    again = batches.materialised(source, risk.device, pairs=not closed, seed=1)
    yield _second_pass(kept, again)


def _second_pass(kept: list[Any], again: list[Any]) -> CheckResult:
    first, second = _rows(kept), _rows(again)
    if first == second:
        return CheckResult("data", OK, "the loader gives the same data each time")
    shuffled = 2 * len(set(first) & set(second)) >= len(first)
    what = "another order (it shuffles)" if shuffled else "other values (it augments)"
    text = f"a second pass through the loader gives {what}; the first is kept."
    advice = "For a function that can be built again: no shuffling, no augmentation."
    return CheckResult("data", NOTE, text, advice=advice)


def _rows(given: list[Any]) -> list[bytes]:
    """A digest of every row, in order."""
    found = []
    for batch in given:
        parts = [p.cpu() for p in tree_leaves(batch) if isinstance(p, Tensor) and p.ndim]
        for row in zip(*(part.unbind() for part in parts), strict=False):
            found.append(hashlib.blake2b(b"".join(map(_bytes, row))).digest())
    return found


# -- untouched ---------------------------------------------------------------------------


def _untouched(risk: EmpiricalRisk, before: dict[str, str]) -> CheckResult:
    changed = _changed(before, _fingerprints(risk.model))
    if not changed:
        _fail_once(risk)
        changed = [
            f"{k} (after an exception)" for k in _changed(before, _fingerprints(risk.model))
        ]
    if not changed:
        text = "parameters, buffers, modes, gradients, generators: same bits, also after "
        return CheckResult("untouched", OK, text + "an exception")
    advice = "The model changes itself in its forward pass, outside its buffers."
    return CheckResult("untouched", FAILED, f"changed: {_some(changed)}.", None, advice)


def _fail_once(risk: EmpiricalRisk) -> None:
    """Interrupt an evaluation in the middle."""

    def fail(*_: Any) -> None:
        raise _DeliberateError

    *_, last = risk.model.modules()
    hook = last.register_forward_hook(fail)
    try:
        risk.value_and_gradient()
    except _DeliberateError:
        pass
    finally:
        hook.remove()


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
    found["random generators"] = _generators()
    return {name: str(value) for name, value in found.items()}


def _changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [k for k in {**before, **after} if before.get(k) != after.get(k)]


def _generators() -> str:
    states = [torch.default_generator.get_state(), str(random.getstate())]
    states.append(str(np.random.get_state()))  # noqa: NPY002
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return _digest(*states)


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b()
    for part in parts:
        digest.update(_bytes(part) if isinstance(part, Tensor) else part.encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return _digest(a) == _digest(b)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
