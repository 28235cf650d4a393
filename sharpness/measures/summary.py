"""How sharp is it by every measure? All of them on the same data, at the same point."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor

from sharpness import _progress, _tensors
from sharpness._arguments import ensure, known, of_a_risk, positive_list
from sharpness._results import (
    Cost,
    NotAvailableError,
    Reading,
    Result,
    Results,
    Status,
    ensure_available,
)
from sharpness.measures.batch_sharpness import batch_sharpness
from sharpness.measures.eigenvalues import HessianEigenpairs, eigenpairs
from sharpness.measures.epsilon import (
    EpsilonSharpness,
    epsilon_sharpness,
    subspace_sharpness,
)
from sharpness.measures.flatness import (
    box_alpha,
    norms,
    pac_bayes_sigma,
    relative_flatness,
)
from sharpness.measures.gradient_noise import gradient_noise
from sharpness.measures.perturbation import (
    NormalisedLogits,
    WorstCaseSharpness,
    average_case_sharpness,
    normal_draws,
    worst_case_sharpness,
)
from sharpness.measures.registry import DEFAULT_FAMILIES, FAMILIES, MEASURES
from sharpness.measures.sampling import lambda_max_sampling
from sharpness.measures.settings import MeasureSettings
from sharpness.measures.spectrum import spectral_density
from sharpness.measures.traces import frobenius_norm, trace
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.loss_terms import is_of_values


class Keywords(TypedDict, total=False):
    """The same as keywords."""

    k: int
    tol: float
    basis_dtype: Literal["float32", "bfloat16"] | None
    epsilon: Sequence[float]
    subspace_dim: int | None
    num_starts: int
    rho: Sequence[float] | None
    shard_size: int | None
    batch_size: int | None
    accuracy_drop: float
    seed: int
    max_seconds: float | None


_SLOPE = 0.1  # share of a rise that the gradient may explain at a minimum

# (risk, settings, what earlier measures left) -> a result, or several
_Run = Callable[[EmpiricalRisk, MeasureSettings, dict[str, Any]], Any]
_Expected = Callable[[EmpiricalRisk, MeasureSettings], Cost]


@dataclass(frozen=True, kw_only=True)
class Unavailable(Result):
    """A measure that has no meaning for this risk, and why."""

    name: str
    note: str
    status: Status = Status.NOT_AVAILABLE

    def _rows(self) -> Iterable[Reading]:
        """A row without a number."""
        return [Reading(name=self.name, value=math.nan, evidence=self.note)]


@dataclass(frozen=True, kw_only=True)
class Summary(Result):
    """The results of many measures of one risk, by name."""

    value: float  # f(theta)
    accuracy: float | None  # in [0, 1]; None where targets are no classes
    results: dict[str, list[Result]]
    notes: Sequence[str]  # what makes numbers doubtful: not a minimum, one class only, ...

    def __getitem__(self, name: str) -> Any:
        """One measure's result, or list of results for several radii."""
        if name not in self.results:
            raise KeyError(f"{name!r} was not measured; there are {list(self.results)}")
        found = self.results[name]
        return found[0] if len(found) == 1 else Results(found)

    def readings(self) -> list[Reading]:
        """Every number, in order."""
        results = (result for found in self.results.values() for result in found)
        return [reading for result in results for reading in result.readings()]

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.1%}"
        head = f"f {self.value:.4g}{accuracy}   ({self.cost})"
        results = (result._line() for found in self.results.values() for result in found)
        return "\n".join([head, *results, *self.notes])

    def noted(self, notes: Iterable[str]) -> Self:
        """Itself: it has the risk's notes and more."""
        return self

    def table(self) -> str:
        """Value, evidence and cost of every measure, as text."""
        from sharpness.report.tables import readings_text

        return readings_text(self.readings(), self.notes)

    def to_json(self) -> str:
        """All numbers, evidence and settings as one line of JSON."""
        from sharpness._json import to_line

        return to_line(vars(self))


@of_a_risk
def summary(
    risk: EmpiricalRisk,
    measures: str | Sequence[str] | None = None,
    *,
    start: Tensor | None = None,
    training: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    on_estimate: Callable[[float], None] | None = None,
    on_readings: Callable[[list[Reading]], None] | None = None,
    resume: str | Path | None = None,
    **settings: Unpack[Keywords],
) -> Summary:
    """Every measure of sharpness on the same data, at the same point.

    Args:
        risk: the mean loss f, held at the parameters theta.
        measures: names of measures or families (`MEASURES`, `FAMILIES`); None means the
            families curvature and epsilon, "all" every one.
        start: the parameters (n,) that training began with, for the distance from them.
        training: rate, optimizer and batch size, where known: the noise scale depends on
            them and its settings keep them.
        progress: show a bar with the expected time; by default on a terminal.
        on_estimate: called with the expected seconds before anything is measured.
        on_readings: called with the numbers of each measure as soon as it is done.
        resume: a folder to keep the search for eigenpairs in, as in `eigenpairs`.
        **settings: `k` and `tol` of the eigenvalues; `epsilon` (a sequence),
            `subspace_dim` and `num_starts` of phi; `rho`, radii of all perturbation
            measures (by default each has its usual one); `shard_size` of m-sharpness;
            `batch_size` of batch sharpness;
            `accuracy_drop` of sigma and alpha; `seed`; `max_seconds` for each measure.

    Returns:
        `Summary`. A measure that has no meaning for the risk is `not_available` with a
        note; an interrupt ends the list with what there is.

    Raises:
        ValueError: an unknown measure, an argument outside its range, or a loss at
            theta that is not finite.

    Cost: by default about 50 products and 70 gradients over the data, 20 s for F1 on 1000
    samples and two cores; the density alone takes about 420 products.
    """
    radii = {
        name: tuple(positive_list(name, settings[name])[0])
        for name in ("epsilon", "rho")  # which may come as a single number
        if settings.get(name) is not None
    }
    shared = MeasureSettings(**{**settings, **radii})  # type: ignore[arg-type]
    chosen = selected(measures)
    sound, got = 1 <= shared.k <= risk.n, f"k={shared.k} (n={risk.n} parameters)"
    ensure(sound, "k", "lie in [1, n]", got)
    began = time.monotonic()
    value, share = risk.value_and_accuracy()
    advice = "Its parameters or the data hold NaN or infinite values."
    ensure(math.isfinite(value), "risk", "be finite", f"f(theta) = {value}", advice)
    accuracy = share if risk.is_classification else None
    expected = expected_seconds(risk, chosen, shared)
    if on_estimate is not None:
        on_estimate(sum(expected.values()))
    results: dict[str, list[Result]] = {}
    left: dict[str, Any] = {"start": start, "training": training, "resume": resume}
    total = max(1, round(sum(expected.values())))
    bar_format = "{desc}: {percentage:.0f} % of about {total} s"
    progress = progress if risk.ranks.is_first else False
    with _progress.bar("measuring", total, progress, bar_format=bar_format) as bar:
        for name in chosen:
            bar.set_description(name)
            results[name] = _measured(name, risk, shared, left)
            if on_readings is not None:
                bar.clear()
                on_readings([row for r in results[name] for row in r.readings()])
            bar.update(min(expected[name], bar.total - bar.n))
            if any(r.status is Status.INTERRUPTED for r in results[name]):
                break
    ended = [r.status for found in results.values() for r in found]
    notes: list[str] = []
    try:
        notes += _notes(risk, accuracy, results)
        risk.ranks.heed()
    except KeyboardInterrupt:  # nothing that was measured is lost
        ended.append(Status.INTERRUPTED)
    return Summary(
        value=value,
        accuracy=accuracy,
        results=results,
        notes=notes,
        status=Status.worst(Status.COMPLETED, *ended),
        cost=replace(
            sum((r.cost for found in results.values() for r in found), Cost()),
            seconds=time.monotonic() - began,
        ),
        settings=asdict(shared),
    )


def selected(measures: str | Sequence[str] | None) -> list[str]:
    """Names of measures from names of measures and families, in the list's order."""
    asked = measures.split(",") if isinstance(measures, str) else measures
    if asked is None:
        asked = DEFAULT_FAMILIES
    asked = [name.strip() for name in asked]
    if "all" in asked:
        return list(RUNS)
    contract = f"be of all, {', '.join(FAMILIES)} or single measures"
    for name in asked or ["none"]:
        known("measures", name, [*RUNS, *FAMILIES], contract)
    return [n for n in RUNS if n in asked or MEASURES[n].family in asked]


def expected_seconds(
    risk: EmpiricalRisk, names: Iterable[str], settings: MeasureSettings
) -> dict[str, float]:
    """How long each measure should take, from one forward pass and one gradient."""
    moved = risk.theta + 1e-6 * next(normal_draws(risk, 1, 0))
    forward = _timed(lambda: (next(normal_draws(risk, 1, 0)), risk.value(moved)))
    gradient = _timed(lambda: risk.unchecked().value_and_gradient(moved))
    limit = math.inf if settings.max_seconds is None else settings.max_seconds
    found = {}
    for name in names:
        cost = RUNS[name][1](risk, settings)
        gradients = cost.gradients + 2.2 * cost.products
        found[name] = min(limit, cost.forwards * forward + gradients * gradient)
    return found


def _timed(work: Callable[[], Any]) -> float:
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _measured(
    name: str, risk: EmpiricalRisk, settings: MeasureSettings, left: dict[str, Any]
) -> list[Result]:
    try:
        risk.ranks.heed()
        found = RUNS[name][0](risk, settings, left)
    except NotAvailableError as error:
        return [Unavailable(name=name, note=str(error))]
    except KeyboardInterrupt:  # before the measure had anything to keep
        note = "interrupted before it began"
        return [Unavailable(name=name, note=note, status=Status.INTERRUPTED)]
    return list(found) if isinstance(found, list) else [found]


def _notes(
    risk: EmpiricalRisk,
    accuracy: float | None,
    results: dict[str, list[Result]],
) -> Iterator[str]:
    """What a reader should know before believing the numbers."""
    yield from risk.notes
    if risk.num_samples == 1:
        yield "One sample only: nothing here says how sharp the loss is on others."
    if accuracy is not None and risk.num_samples > 1:
        num_classes = risk.num_classes_seen()
        if num_classes == 1:
            yield "All samples are of one class: a constant output is a minimum."
        elif accuracy <= 1 / num_classes + 0.04:
            yield (
                f"The accuracy, {accuracy:.1%}, is near chance for {num_classes} classes: "
                "is this checkpoint trained?"
            )
    if risk.has_outputs and is_of_values(risk.loss):
        yield (
            "Regression: no threshold says what is high, and values have the loss's unit. "
            "Compare networks on the same, standardised targets."
        )
    yield from _of_the_slope(risk, results)


def _of_the_slope(risk: EmpiricalRisk, results: dict[str, list[Result]]) -> Iterator[str]:
    """Where the gradient bears on what was measured."""
    pairs = [r for r in results.get("lambda_max", []) if isinstance(r, HessianEigenpairs)]
    tops = [r for r in pairs if math.isfinite(r.lambda_max)]
    rises = list(_rises(results))
    ended = (r.status for found in results.values() for r in found)
    if not (tops or rises) or Status.INTERRUPTED in ended:
        return  # nothing to be explained, or no time for it
    try:
        _, gradient = risk.known_gradient()
    except (ArithmeticError, NotImplementedError, RuntimeError):
        return  # a result says so already
    slope = risk.shared.norm(gradient)
    if tops and tops[0].lambda_max <= tops[0].noise_floor:
        if slope == 0 and abs(tops[0].lambda_max) <= tops[0].noise_floor:
            yield (
                "Gradient and curvature are zero: the loss does not depend on the "
                "parameters."
            )
        elif slope > 0:
            yield "Not a minimum: there is a gradient, and no direction curves upwards."
        return
    shares = [
        (float(_tensors.dot64(gradient, way.to(gradient))) / rise, name)
        for name, rise, way in rises
    ]
    explained = [found for found in shares if found[0] > _SLOPE]
    if explained:
        share, name = max(explained)
        others = f", and more than 10% of {len(explained) - 1} more of the measures"
        yield (
            f"Not a minimum: the slope alone explains {min(share, 1):.0%} of {name}"
            f"{others if len(explained) > 1 else ''}. Train until the gradient is smaller, "
            "or take a larger radius; lambda_max and trace do not see the slope."
        )


def _rises(results: dict[str, list[Result]]) -> Iterator[tuple[str, float, Tensor]]:
    """Name, rise of f and displacement of each maximum that was looked for."""
    for result in (result for found in results.values() for result in found):
        if isinstance(result, EpsilonSharpness):
            rise = result.value_max - result.value
        elif isinstance(result, WorstCaseSharpness) and "logits" not in result.settings:
            rise = result.value
        else:
            continue
        if rise > 0 and result.displacement is not None:
            yield result.readings()[0].name, rise, result.displacement


# -- the list --------------------------------------------------------------------------


def _common(settings: MeasureSettings) -> dict[str, Any]:
    return {
        "seed": settings.seed,
        "max_seconds": settings.max_seconds,
        "progress": False,
    }


def _lambda_max(risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any]) -> Any:
    kind = getattr(torch, s.basis_dtype) if s.basis_dtype else None
    resume = left.get("resume")
    pairs = eigenpairs(risk, s.k, tol=s.tol, basis_dtype=kind, resume=resume, **_common(s))
    left["top"] = pairs.eigenvectors[:1]
    return pairs


def _phi(risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any]) -> Any:
    return epsilon_sharpness(
        risk,
        list(s.epsilon),
        num_starts=s.num_starts,
        corners=left.get("top") if s.num_starts > 1 else None,
        **_common(s),
    )


def _phi_subspace(risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any]) -> Any:
    p = s.subspace_dim or min(100, risk.n)
    return subspace_sharpness(risk, list(s.epsilon), subspace_dim=p, **_common(s))


def _plain(
    measure: Callable[..., Any],
    risk: EmpiricalRisk,
    s: MeasureSettings,
    left: dict[str, Any],
    **fixed: Any,
) -> Any:
    """A measure with what all have in common, and these arguments."""
    return measure(risk, **fixed, **_common(s))


def _at_radii(
    measure: Callable[..., Any],
    usual: float,
    risk: EmpiricalRisk,
    s: MeasureSettings,
    left: dict[str, Any],
    **fixed: Any,
) -> Any:
    """A perturbation measure at the radii asked for, or at its usual one."""
    return measure(risk, list(s.rho or (usual,)), **fixed, **_common(s))


_worst = partial(_at_radii, worst_case_sharpness)
_average = partial(_at_radii, average_case_sharpness)


def _sharded(risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any]) -> Any:
    size = s.shard_size or max(1, min(128, risk.num_samples // 2))
    _refuse_parts(risk, 1)
    return _worst(0.05, risk, s, left, shard_size=size)


def _refuse_parts(risk: EmpiricalRisk, least: int) -> None:
    """Raise where the samples cannot be cut, or are too few for it."""
    ensure_available(
        risk.num_samples >= least and risk.can_be_cut,
        "risk",
        f"have at least {least} samples that can be cut into parts",
        f"{risk.num_samples} (not available with a closure, or where BatchNorm depends on "
        "the batch)",
    )


def _noise(risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any]) -> Any:
    return gradient_noise(risk, optimizer=left["training"], **_common(s))


def _of_batches(risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any]) -> Any:
    size = s.batch_size or min(32, risk.num_samples)
    return batch_sharpness(risk, size if risk.can_be_cut else None, **_common(s))


def _sampling(risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any]) -> Any:
    _refuse_parts(risk, 20)
    return lambda_max_sampling(risk, **_common(s))


def _sigma(
    risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any], **fixed: Any
) -> Any:
    return pac_bayes_sigma(risk, accuracy_drop=s.accuracy_drop, **fixed, **_common(s))


def _box(
    risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any], **fixed: Any
) -> Any:
    return box_alpha(
        risk,
        accuracy_drop=s.accuracy_drop,
        max_seconds=s.max_seconds,
        progress=False,
        **fixed,
    )


def _normalised(risk: EmpiricalRisk, s: MeasureSettings, left: dict[str, Any]) -> Any:
    sound, got = risk.is_classification, "other outputs (not available)"
    ensure_available(sound, "risk", "classify to have logits", got)
    other = risk.with_model(
        NormalisedLogits(risk.network()), [f"model.{name}" for name in risk.names]
    )
    return [
        replace(result, settings={**result.settings, "logits": "normalised_logits"})
        for result in _worst(0.5, other, s, left, adaptive="elementwise")
    ]


def _radii(settings: MeasureSettings) -> int:
    return len(settings.rho or (0,))


def _ascents(extra: float = 0.0) -> _Expected:
    return lambda risk, s: Cost(gradients=(21 + extra) * _radii(s))


RUNS: dict[str, tuple[_Run, _Expected]] = {
    "lambda_max": (
        _lambda_max,
        lambda risk, s: Cost(products=8 + 4 * s.k),
    ),
    "trace": (
        partial(_plain, trace, tol=0.1),
        lambda risk, s: Cost(products=40),
    ),
    "phi": (
        _phi,
        lambda risk, s: Cost(gradients=34 * s.num_starts * len(s.epsilon)),
    ),
    "phi_subspace": (
        _phi_subspace,
        lambda risk, s: Cost(gradients=5 * 60 * len(s.epsilon)),
    ),
    "worst_l2": (
        partial(_worst, 0.05, norm="l2"),
        _ascents(),
    ),
    "worst_linf": (
        partial(_worst, 5e-4, norm="linf"),
        _ascents(),
    ),
    "worst_l2_elementwise": (
        partial(_worst, 0.5, norm="l2", adaptive="elementwise"),
        _ascents(),
    ),
    "worst_linf_elementwise": (
        partial(_worst, 0.002, norm="linf", adaptive="elementwise"),
        _ascents(),
    ),
    "worst_l2_filterwise": (
        partial(_worst, 0.05, norm="l2", adaptive="filterwise"),
        _ascents(),
    ),
    "worst_l2_sharded": (
        _sharded,
        _ascents(10),
    ),
    "worst_normalised": (
        _normalised,
        _ascents(5),
    ),
    "average": (
        partial(_average, 0.01),
        lambda risk, s: Cost(forwards=40 * _radii(s)),
    ),
    "average_elementwise": (
        partial(_average, 0.1, adaptive="elementwise"),
        lambda risk, s: Cost(forwards=40 * _radii(s)),
    ),
    "pac_bayes_sigma": (
        _sigma,
        lambda risk, s: Cost(forwards=130),
    ),
    "pac_bayes_sigma_magnitude": (
        partial(_sigma, magnitude_aware=True),
        lambda risk, s: Cost(forwards=130),
    ),
    "box_alpha": (
        _box,
        lambda risk, s: Cost(forwards=90, gradients=90),
    ),
    "box_alpha_magnitude": (
        partial(_box, magnitude_aware=True),
        lambda risk, s: Cost(forwards=90, gradients=90),
    ),
    "relative_flatness": (
        partial(_plain, relative_flatness),
        lambda risk, s: Cost(products=20 + 5 * sum(len(x) > 1 for x in risk.shapes)),
    ),
    "norms": (
        lambda risk, s, left: norms(risk, start=left["start"]),
        lambda risk, s: Cost(gradients=1, products=1),
    ),
    "frobenius_norm": (
        partial(_plain, frobenius_norm),
        lambda risk, s: Cost(products=60),
    ),
    "density": (
        partial(_plain, spectral_density),
        lambda risk, s: Cost(products=420),
    ),
    "noise_scale": (
        _noise,
        lambda risk, s: Cost(gradients=5),
    ),
    "batch_sharpness": (
        _of_batches,
        lambda risk, s: Cost(products=200 * (s.batch_size or 32) / risk.num_samples),
    ),
    "lambda_max_sampling": (
        _sampling,
        lambda risk, s: Cost(products=60),
    ),
}
