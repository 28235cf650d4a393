r"""How noisy is a mini-batch's gradient: from which size on do larger ones buy little?

All inference rests on n vectors g_i through $a_i = |g_i|^2$, $b_i = g_i \cdot \bar g$,
$|\bar g|^2$ and an estimate of tr(Sigma^2). They may be gradients of samples or of batches,
in any inner product.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.optim import Optimizer

from sharpness import _tensors
from sharpness._arguments import fraction, of_a_risk, require, whole, whole_seed
from sharpness._json import as_plain
from sharpness._results import Cost, Reading, Result, Status, ensure_available
from sharpness._run import Run
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.statistics import ratio_interval

Metric = Literal["identity", "gauss_newton", "hessian", "sign"]
Population = Literal["distribution", "data"]
Unit = Literal["sample", "term"]
FEWEST = 8  # vectors: of fewer the variance itself is unknown by more than half
_GRAM_BYTES = 1 << 28  # of the vectors whose pairwise products give tr(Sigma^2)
_GRAM_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class GradientNoise(Result):
    """Variance of a sample's gradient beside the gradient itself, and their ratio.

    With the metric M (the identity, or a curvature matrix): tr(M Sigma), G^T M G and
    B = tr(M Sigma) / G^T M G, in samples. For `"sign"` (sum_j sigma_j)^2 and |G|_1^2.
    """

    trace_covariance: float
    trace_covariance_error: float  # standard error; NaN for "sign"
    gradient_norm_squared: float  # unbiased, so it may be negative
    gradient_norm_squared_error: float  # standard error
    noise_scale: float  # the ratio; NaN where no gradient is seen in the noise
    interval: tuple[float, float | None]  # the high end is None: "at least"
    num_vectors: int  # gradients that the variance is one of
    batch_size: float  # samples behind each of them
    how: str  # how they were taken, in words

    @property
    def is_lower_bound(self) -> bool:
        """Whether only the interval's low end is known."""
        return self.interval[1] is None

    def relative_error(self, batch_size: int) -> float:
        """sqrt(B / batch_size): a mini-batch gradient's error over its norm."""
        return math.sqrt(self.noise_scale / batch_size)

    def _rows(self) -> Iterable[Reading]:
        low, high = self.interval
        metric, sure = self.settings["metric"], f"{self.settings['confidence']:.0%}"
        suffix = "" if metric == "identity" else f"_{metric}"
        of = f"of {self.num_vectors} {self.how}"
        scale = Reading(name=f"noise_scale{suffix}", value=self.noise_scale)
        if high is None:
            words = f"{sure}, as G = 0 cannot be excluded, {of}"
            yield replace(scale, value=low, bound="≥", evidence=words)
        else:
            yield replace(scale, evidence=f"{sure}: {low:.4g} to {high:.4g}, {of}")
        for name in ("trace_covariance", "gradient_norm_squared"):
            value, error = getattr(self, name), getattr(self, f"{name}_error")
            words = "standard error" if math.isfinite(error) else ""
            yield Reading(name=name + suffix, value=value, error=error, evidence=words)


@of_a_risk
def gradient_noise(
    risk: EmpiricalRisk,
    *,
    metric: Metric = "identity",
    unit: Unit = "sample",
    num_samples: int | None = None,
    population: Population = "distribution",
    confidence: float = 0.95,
    num_batches: int = 32,
    seed: int = 0,
    optimizer: Optimizer | Mapping[str, Any] | None = None,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> GradientNoise:
    r"""The gradient noise scale: the batch size at which noise and gradient are equal.

    $$B = \frac{\mathrm{tr}\,\Sigma}{|G|^2}, \qquad
    E\,|g_{batch}|^2 = |G|^2 \left(1 + \frac{B}{batch\ size}\right)$$

    with G the gradient and Sigma the covariance of a sample's. Batches far below B buy
    steps with samples at par, batches far above it buy nothing (McCandlish et al. 2018).
    From n gradients $g_i$ with mean $\bar g$:

    $$S = \frac{\sum_i |g_i|^2 - n |\bar g|^2}{n - 1}, \qquad
    \Gamma = |\bar g|^2 - \frac{S}{n}$$

    are unbiased for tr Sigma and |G|^2. The interval holds those r > 0 for which
    $(S - r \Gamma)^2 \le t^2 (v_{SS} - 2 r v_{S\Gamma} + r^2 v(\Gamma))$, where v(Gamma)
    $= 4 \gamma s / n + 2\,\mathrm{tr}\,\Sigma^2 / n^2$ is taken under the hypothesis,
    $\gamma = S / r$, s is the variance of $g_i \cdot \bar g / |\bar g|$, and the other two
    are the jackknife's. It is one quadratic inequality. Where G = 0 cannot be excluded
    it has no upper end, and B is "at least" the lower one.

    B depends on where in training it is taken, and near a minimum grows as the learning
    rate over the batch size shrinks. It is about the training loss, and not an answer to
    which batch to take: in language models it missed the critical batch size by orders
    of magnitude (Merrill et al. 2025).

    Args:
        risk: the mean loss f, held at the parameters theta.
        metric: `"identity"`; `"gauss_newton"` or `"hessian"` for
            $B = \mathrm{tr}(H \Sigma) / G^T H G$ with the matrix of the half of the
            samples that gives no gradients; `"sign"` for Adam and sign descent,
            $B = (\sum_j \sigma_j / |G|_1)^2$, the same argument in the l1 norm.
        unit: what a batch is counted in: all loss terms of a `"sample"` together (the
            tokens of a sequence are not independent), or each `"term"` as if it were
            drawn by itself, of a loss that compares with class numbers.
        num_samples: to look at, drawn without replacement; None means all.
        population: whose G it is: of the `"distribution"` that the samples come from,
            or of the `"data"` of the risk themselves, of which all samples leave no error.
        confidence: of the interval, in (0, 1).
        num_batches: K batches of samples whose gradients stand for Sigma with a
            curvature matrix, >= 8; K vectors are held.
        seed: of the draws.
        optimizer: what theta was reached with, or its `state_dict()`, or rate and batch
            size in a dict. B depends on them, so the result's settings keep them; no
            number does.
        max_seconds: stop after the block that passes this time; nothing is known then.
        progress: show a bar; by default on a terminal.

    Returns:
        `GradientNoise`. Where samples have no gradients of their own (a closure,
        BatchNorm on batch statistics, a loss that couples them) those of the risk's
        batches stand for them, and `how` says so. Status `non_finite` where a gradient
        is not, with their number in `how`; `zero_gradient` where all are zero;
        `not_available` where the Hessian's G^T H G or trace has the wrong sign.

    Raises:
        TypeError: fewer than 8 samples or batches; another metric or unit than the usual
            where samples, or terms, have no gradients of their own; no optimizer.
        ValueError: an argument outside its range.

    Cost: a gradient of the samples, and their gradients one by one, at once by vmap where
    that works; with a curvature matrix `num_batches` gradients of parts and as many
    products on half of the samples. Memory: a few vectors, a block of at most 64 MB, and
    256 MB (or 8 vectors) for tr Sigma^2.

    References:
        McCandlish et al. (2018), arXiv:1812.06162, for B and the critical batch size.
        Himeno and Yamada (2014), J. Multivariate Anal. 130, for tr Sigma^2.
    """
    for name, value, known in (
        ("metric", metric, get_args(Metric)),
        ("unit", unit, get_args(Unit)),
        ("population", population, get_args(Population)),
    ):
        require(value in known, name, f"be of {', '.join(known)}", value)
    fraction("confidence", confidence)
    num_batches, seed = whole("num_batches", num_batches, FEWEST), whole_seed(seed)
    if num_samples is not None:
        num_samples = whole("num_samples", num_samples, FEWEST, "Fewer have no variance.")
    draw = _Draw(risk, min(num_samples or risk.num_samples, risk.num_samples), seed)
    trained_with = training_facts(optimizer)
    run = Run("gradients", max_seconds=max_seconds, progress=progress, ranks=risk.ranks)
    seen: _Vectors | _Halves | None = None
    with run:
        ensure_available(
            unit == "sample" or metric == "identity",
            "metric",
            "be 'identity' with unit='term'",
            f"{metric!r} (not available)",
            "Take samples as units.",
        )
        if not risk.can_be_cut:
            seen = _of_batches(draw, (metric, unit), run)
        elif metric == "identity":
            seen = _of_samples(draw, unit, run)
        elif metric == "sign":
            seen = _of_halves(draw, run)
        else:
            seen = _in_curvature(draw, metric, num_batches, run)
    found = _unknown(run.status)
    if seen is not None:
        left = 1 - seen.share if population == "data" else 1.0
        found = seen.found(left, confidence)
    return GradientNoise(
        **found,
        cost=replace(draw.cost, seconds=run.seconds),
        settings={
            "metric": metric,
            "unit": unit,
            "num_samples": draw.num_samples,
            "population": population,
            "confidence": confidence,
            "num_batches": num_batches,
            "seed": seed,
            "training": trained_with,
        },
    )


_KEPT = ("lr", "momentum", "dampening", "nesterov", "betas", "weight_decay")


def training_facts(
    optimizer: Optimizer | Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """What a record keeps of an optimizer, of its state, or of facts already in a dict.

    A setting in which the parameter groups differ is a list.

    Raises:
        TypeError: it is none of these.
    """
    state = optimizer.state_dict() if isinstance(optimizer, Optimizer) else optimizer
    if state is not None and not isinstance(state, Mapping):
        raise TypeError(
            "`optimizer` must be a torch.optim.Optimizer, its state_dict or a dict of "
            f"facts; got {type(optimizer).__name__}. Leave it out where there is none."
        )
    if state is None or "param_groups" not in state:
        return dict(state) if state else None
    name = type(optimizer).__name__ if isinstance(optimizer, Optimizer) else None
    facts: dict[str, Any] = {"optimizer": name}
    for key in _KEPT:
        values = [as_plain(group[key]) for group in state["param_groups"] if key in group]
        if values:
            alike = all(value == values[0] for value in values)
            facts["learning_rate" if key == "lr" else key] = values[0] if alike else values
    return facts


# -- vectors ---------------------------------------------------------------------------


class _Draw:
    """Samples drawn from those of a risk, and what their gradients have cost so far."""

    def __init__(self, risk: EmpiricalRisk, num_samples: int, seed: int) -> None:
        self.risk, self.num_samples = risk, num_samples
        self.generator = _tensors.seeded(seed)
        self.cost = Cost()

    def groups(self, sizes: list[int]) -> list[Tensor]:
        """Disjoint groups of so many samples, each in the data's order."""
        order = torch.randperm(self.risk.num_samples, generator=self.generator)
        return [group.sort().values for group in order[: sum(sizes)].split(sizes)]

    def spend(self, num_samples: float, products: float = 0) -> None:
        share = num_samples / self.risk.num_samples
        self.cost += Cost(gradients=share, products=products)


@dataclass(frozen=True)
class _Vectors:
    """What n vectors g_i tell, in some inner product."""

    squares: np.ndarray  # a_i, (n,)
    along: np.ndarray  # b_i, (n,)
    mean_square: float
    square_trace: float  # estimate of tr(Sigma^2)
    batch_size: float
    share: float  # of the data
    how: str
    definite: bool = True  # the inner product

    @property
    def num(self) -> int:
        return len(self.squares)

    def found(self, left: float, confidence: float) -> dict[str, Any]:
        """The fields of a result; `left` is the share of the population not drawn."""
        a, b, q, n = self.squares, self.along, self.mean_square, self.num
        if not np.isfinite(a).all() or not math.isfinite(q):
            num = int((~np.isfinite(a)).sum())
            first = int(np.argmin(np.isfinite(a)))
            return _unknown(
                Status.NON_FINITE,
                f"{self.how}, of which {num} (the first: number {first}) are not finite",
                n,
            )
        if not a.any():
            return _unknown(Status.ZERO_GRADIENT, self.how, n)
        spread = (float(a.sum()) - n * q) / (n - 1)
        if not self.definite and min(spread, q) <= 0:
            why = f"{self.how}: G'HG or tr(H Sigma) has the wrong sign, take 'gauss_newton'"
            return _unknown(Status.NOT_AVAILABLE, why, n)
        spread = max(spread, 0.0)  # but for rounding it is
        square = q - left * spread / n
        # Leave one out, from a and b alone.
        q_out = (n**2 * q - 2 * n * b + a) / (n - 1) ** 2
        spread_out = (a.sum() - a - (n - 1) * q_out) / (n - 2)
        square_out = q_out - left * spread_out / (n - 1)
        cov = left * (n - 1) ** 2 / n * np.cov(spread_out, square_out)
        slope = float(b.var(ddof=1)) / q if q > 0 else 0.0
        # tr(Sigma^2) is no less than the square of one of Sigma's Rayleigh quotients.
        traced = max(self.square_trace, slope**2)
        noise = 2 * traced * (left / n) ** 2
        v_spread, v_both = float(cov[0, 0]), float(cov[0, 1])
        linear = 4 * spread * left * slope / n - 2 * v_both
        t = _quantile(spread, traced, n, confidence)
        interval = ratio_interval(spread, square, (v_spread, linear, noise), t)
        error = math.sqrt(4 * max(square, 0.0) * left * slope / n + noise)
        m = self.batch_size
        return {
            "status": Status.COMPLETED,
            "trace_covariance": m * spread,
            "trace_covariance_error": m * math.sqrt(v_spread),
            "gradient_norm_squared": square,
            "gradient_norm_squared_error": error,
            "noise_scale": m * spread / square if square > 0 else math.nan,
            "interval": (m * interval[0], interval[1] and m * interval[1]),
            "num_vectors": n,
            "batch_size": m,
            "how": self.how,
        }


def _quantile(spread: float, traced: float, n: int, confidence: float) -> float:
    """Student's t, or a chi-squared one where that is larger.

    Where G = 0 is, the estimate of |G|^2 is no normal number but about a chi-squared one
    with (tr Sigma)^2 / tr Sigma^2 degrees of freedom, less its mean.
    """
    t = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    if spread <= 0 or traced <= 0:
        return t
    dof = spread**2 / traced
    return max(t, float(stats.chi2.ppf(confidence, dof) - dof) / math.sqrt(2 * dof))


def _of_samples(draw: _Draw, unit: Unit, run: Run) -> _Vectors:
    (index,) = draw.groups([draw.num_samples])
    found = draw.risk.sample_gradients(index, unit)
    contract = f"have at least {FEWEST} {unit}s"
    ensure_available(
        len(found) >= FEWEST, "risk", contract, f"{len(found)} (not available)"
    )
    mean = draw.risk.subset(index).gradient()
    draw.spend(2 * len(index))
    vectors = _streamed(iter(found), len(found), mean, draw, run)
    return replace(vectors, share=draw.num_samples / draw.risk.num_samples, how=found.how)


def _of_batches(draw: _Draw, asked: tuple[str, str], run: Run) -> _Vectors:
    """Of the batches that the risk is evaluated in, those of the usual size."""
    parts = draw.risk.parts()
    usual = Counter(part.num_samples for part in parts).most_common(1)[0][0]
    parts = [part for part in parts if abs(part.num_samples - usual) <= 1]
    parts = parts[: max(FEWEST, draw.num_samples // usual)]
    ensure_available(
        asked == ("identity", "sample"),
        "metric` and `unit",
        "be 'identity' and 'sample' where samples have no gradients of their own",
        f"{asked} (not available)",
    )
    ensure_available(
        len(parts) >= FEWEST,
        "risk",
        f"have {FEWEST} batches of one size where samples have no gradient of their own",
        f"{len(parts)} (not available)",
        "Pass more, or a smaller `batchnorm_batch`.",
    )
    mean = torch.zeros_like(draw.risk.theta)
    for part in parts:
        run.step()
        mean += part.gradient() / len(parts)
    draw.spend(2 * len(parts) * usual)
    gradients = (part.gradient().unsqueeze(0) for part in parts)
    vectors = _streamed(gradients, len(parts), mean, draw, run)
    how = f"batches of {usual} (samples have no gradients of their own)"
    share = len(parts) * usual / draw.risk.num_samples
    return replace(vectors, batch_size=float(usual), share=share, how=how)


def _streamed(
    blocks: Iterator[Tensor], num: int, mean: Tensor, draw: _Draw, run: Run
) -> _Vectors:
    """One pass over vectors in blocks (b, n); some are kept for tr(Sigma^2)."""
    most = max(FEWEST, min(_GRAM_ROWS, _GRAM_BYTES // mean.nbytes))
    chosen = torch.zeros(num, dtype=torch.bool, device=mean.device)
    chosen[torch.randperm(num, generator=draw.generator)[:most]] = True
    norms, along, kept, seen = [], [], [], 0
    for block in blocks:
        run.step(len(block))
        norms.append(torch.linalg.vector_norm(block, dim=1))
        along.append(block @ mean)
        kept.append(block[chosen[seen : seen + len(block)]])
        seen += len(block)
    rows = torch.cat(kept)
    rows -= rows.mean(0)
    return _Vectors(
        squares=_tensors.float64(torch.cat(norms)) ** 2,
        along=_tensors.float64(torch.cat(along)),
        mean_square=float(_tensors.dot64(mean, mean)),
        square_trace=_square_trace(_tensors.float64(rows @ rows.T), min(mean.numel(), num)),
        batch_size=1.0,
        share=1.0,
        how="",
    )


def _square_trace(gram: np.ndarray, rank: int) -> float:
    """tr(Sigma^2), unbiased, from the inner products of centred vectors.

    Himeno and Yamada (2014), whatever the distribution; but no less than what the trace
    implies for a matrix of this rank.
    """
    n, squares = len(gram), np.diag(gram)
    trace = squares.sum() / (n - 1)
    of_square = (n - 2) * (gram**2).sum() / (n - 1)
    fourth = n * (squares**2).sum() / (n - 1)
    found = (of_square + trace**2 - fourth) * (n - 1) / (n * (n - 2) * (n - 3))
    return float(max(found, trace**2 / rank))


def _in_curvature(
    draw: _Draw, matrix: Literal["gauss_newton", "hessian"], num: int, run: Run
) -> _Vectors:
    """Gradients of batches in the inner product of a matrix of the other samples."""
    size = draw.num_samples // 2 // num
    ensure_available(
        size > 0,
        "risk",
        f"have {2 * num} samples for {num} batches and a matrix of others",
        f"{draw.num_samples} (not available)",
        "Pass a smaller `num_batches`.",
    )
    rest = draw.num_samples - num * size
    *groups, others = draw.groups([*[size] * num, rest])
    other = draw.risk.subset(others)
    gradients, gram = (
        torch.zeros(num, draw.risk.n).to(draw.risk.theta),
        np.zeros((num, num)),
    )
    for i, group in enumerate(groups):
        gradients[i] = draw.risk.subset(group).gradient()
    draw.spend(num * size)
    for i, gradient in enumerate(gradients):
        run.step()
        gram[i] = _tensors.float64(gradients @ other.product(gradient, matrix))
        draw.spend(0, rest / draw.risk.num_samples)
    gram = (gram + gram.T) / 2
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    return _Vectors(
        squares=np.diag(gram).copy(),
        along=gram.mean(1),
        mean_square=float(gram.mean()),
        square_trace=_square_trace(centred, min(draw.risk.n, num)),
        batch_size=float(size),
        share=num * size / draw.risk.num_samples,
        definite=matrix == "gauss_newton",
        how=f"batches of {size}, the matrix of {rest} other samples",
    )


@dataclass(frozen=True)
class _Halves:
    """The l1 norm of the gradient, from the signs of one half on the other."""

    deviations: float  # sum_j sigma_j
    plug_in: float  # |mean|_1, biased upward
    crossed: np.ndarray  # g_i . sign(mean of the other half), (n,): biased downward
    share: float
    how: str

    def found(self, left: float, confidence: float) -> dict[str, Any]:
        """The fields of a result, as of `_Vectors`."""
        n, length = len(self.crossed), float(self.crossed.mean())
        if not math.isfinite(length + self.deviations):
            num = int((~np.isfinite(self.crossed)).sum())
            return _unknown(Status.NON_FINITE, f"{self.how}, {num} not finite", n)
        error = math.sqrt(left / n) * float(self.crossed.std(ddof=1))
        t = float(stats.t.ppf((1 + confidence) / 2, n - 1))
        least, most = length - t * error, self.plug_in + t * error
        if not most:
            return _unknown(Status.ZERO_GRADIENT, self.how, n)
        return {
            "status": Status.COMPLETED,
            "trace_covariance": self.deviations**2,
            "trace_covariance_error": math.nan,
            "gradient_norm_squared": length**2,
            "gradient_norm_squared_error": 2 * abs(length) * error,
            "noise_scale": (self.deviations / length) ** 2 if length > 0 else math.nan,
            "interval": (
                (self.deviations / most) ** 2,
                (self.deviations / least) ** 2 if least > 0 else None,
            ),
            "num_vectors": n,
            "batch_size": 1.0,
            "how": self.how,
        }


def _of_halves(draw: _Draw, run: Run) -> _Halves:
    half = draw.num_samples // 2
    halves = draw.groups([half, draw.num_samples - half])
    means = [draw.risk.subset(index).gradient() for index in halves]
    draw.spend(2 * draw.num_samples)
    squares, crossed, how = torch.zeros_like(means[0]), [], ""
    for index, mean, other in zip(halves, means, reversed(means), strict=True):
        found = draw.risk.sample_gradients(index)
        for block in found:
            run.step(len(block))
            squares += (block - mean).square_().sum(0)
            crossed.append(block @ other.sign())
        how = found.how
    parts = [len(index) * mean for index, mean in zip(halves, means, strict=True)]
    return _Halves(
        deviations=float((squares / (draw.num_samples - 2)).sqrt_().double().sum()),
        plug_in=float(sum(parts).abs().double().sum()) / draw.num_samples,  # type: ignore[union-attr]
        crossed=_tensors.float64(torch.cat(crossed)),
        share=draw.num_samples / draw.risk.num_samples,
        how=how,
    )


def _unknown(status: Status, how: str = "", num: int = 0) -> dict[str, Any]:
    names = ("trace_covariance", "gradient_norm_squared")
    numbers = [*names, *(f"{name}_error" for name in names), "noise_scale", "batch_size"]
    fields: dict[str, Any] = dict.fromkeys(numbers, math.nan)
    return fields | {
        "status": status,
        "interval": (math.nan, math.nan),
        "num_vectors": num,
        "how": how,
    }
