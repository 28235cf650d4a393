"""What happens to sharpness while a network trains? Measures along anyone's loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from sharpness import _tensors
from sharpness._arguments import ensure, is_whole, known, package, positive, whole
from sharpness._json import as_plain
from sharpness._results import Cost, NotAvailableError, Reading, Result, Status, counted
from sharpness._saving import restored
from sharpness.measures.batch_sharpness import batch_sharpness
from sharpness.measures.eigenvalues import check_confidence, eigenpairs
from sharpness.measures.epsilon import epsilon_sharpness
from sharpness.measures.gradient_noise import GradientNoise, gradient_noise
from sharpness.measures.preconditioner import adam_preconditioner
from sharpness.measures.registry import TRACKED
from sharpness.risk import batches
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.risk.loss_terms import num_rows

# At the edge of stability eigenvalues crowd and overtake each other. Without a confidence
# the first pair alone was off by more than 1 % in 5 of 40 points of examples/track.py (up
# to 4 %; in 13 when searched afresh), the first of two in none.
_NUM_FOLLOWED = 2
_NUM_BATCHES = 100  # of batch sharpness: a standard error of some percent


@dataclass(frozen=True, kw_only=True)
class TrackedValue(Result):
    """One number with its evidence and its cost."""

    value: float  # NaN where nothing was earned; phi in percent
    error: float | None  # half width of the bound, or a standard error; None: a lower bound

    def _rows(self) -> Iterable[Reading]:
        bound = "≥" if self.error is None else ""
        yield Reading(
            name="",
            value=self.value,
            error=self.error,
            bound=bound,
            unit="%" if "epsilon" in self.settings else "",
        )

    def __str__(self) -> str:
        (row,) = self._rows()
        return str(row).strip() + ("" if self.status.ok else f" ({self.status})")


@dataclass(frozen=True, kw_only=True)
class TrackedPoint(Result):
    """The risk after `step` updates: its value, its sharpness, what the optimizer bears."""

    step: int  # updates made
    loss: float  # f(theta) over the tracker's data
    lambda_max: TrackedValue | None = None  # None: not asked for, or interrupted before
    lambda_max_preconditioned: TrackedValue | None = None  # also before Adam's first step
    phi: TrackedValue | None = None
    batch_sharpness: TrackedValue | None = None
    noise_scale: TrackedValue | None = None
    learning_rate: float | None  # None: no optimizer, or groups that differ
    thresholds: dict[str, float]  # by measure; see `stability_thresholds`
    batchnorm: str | None = None  # "batch", "running", "recalibrated"; None: no such layer
    batchnorm_batch: int | None = (
        None  # most samples in a batch; None: as given, or running
    )

    def values(self) -> dict[str, TrackedValue]:
        """The measures that were taken, by name."""
        found = {name: getattr(self, name) for name in TRACKED}
        return {name: value for name, value in found.items() if value is not None}

    def _rows(self) -> Iterable[Reading]:
        """The loss, and every measure that was taken."""
        yield Reading(name="loss", value=self.loss)
        for name, value in self.values().items():
            (row,), limit = value.readings(), self.thresholds.get(name)
            words = [] if limit is None else [f"threshold {limit:.4g}"]
            yield replace(row, name=name, evidence=", ".join([*words, row.evidence]))

    def __str__(self) -> str:
        parts = [f"update {self.step}: loss {self.loss:.4g}"]
        for name, value in self.values().items():
            limit = self.thresholds.get(name)
            of_limit = f" (threshold {limit:.4g})" if limit is not None else ""
            parts.append(f"{name} {value}{of_limit}")
        if self.batchnorm:
            parts.append(f"BatchNorm on {self.statistics}")
        return ", ".join(parts)

    @property
    def statistics(self) -> str:
        """What BatchNorm normalises with, in words; empty without such layers."""
        if not self.batchnorm or self.batchnorm_batch is None:
            return f"{self.batchnorm} statistics" if self.batchnorm else ""
        return f"{self.batchnorm} statistics of up to {self.batchnorm_batch} samples"


OnPoint = Callable[[TrackedPoint], object]


class SharpnessTracker:
    r"""Measures a network every so many updates and leaves its training as it is.

    In the training loop::

        tracker = SharpnessTracker(model, loss, (x, y), optimizer=optimizer, every=50)
        for inputs, targets in loader:
            ...
            optimizer.step()
            tracker.step()
        print(tracker.table())

    The first point is update 0, the parameters at construction; then follow updates
    `every`, 2 `every`, ... Every point is measured on the same data, fixed here, and
    model, mode, buffers, `.grad` and all random generators stay bit for bit as they are:
    training ends where it would have ended without the tracker.

    Beside the curvature stand the optimizer's `stability_thresholds`: full-batch
    gradient descent drives lambda_max up to 2 / eta and keeps it there, the *edge of
    stability* (Cohen et al. 2021, arXiv:2103.00065); Adam does so with its
    preconditioned curvature (Cohen et al. 2022, arXiv:2207.14484).

    Ctrl-C during a measurement ends it: what it has earned is kept as a last point, with
    the status `interrupted`, and KeyboardInterrupt goes on to the training loop. An
    interrupt before anything was earned leaves no point.

    In distributed training, build and step the tracker on one process.

    Attributes:
        history: the points so far, oldest first.
        num_updates: how often `step` was called.

    Args:
        model: the network in training, wrapped or not.
        loss: as in `EmpiricalRisk`.
        data: as in `EmpiricalRisk`; a loader is run through once. Copied, and kept in
            main memory between points. A thousand samples give a usable lambda_max.
        optimizer: whose thresholds are noted and whose second moments precondition;
            None for neither.
        every: updates from one point to the next, >= 1.
        measures: of `"lambda_max"`, `"lambda_max_preconditioned"` (P^-1/2 H P^-1/2, P as
            in `adam_preconditioner`; not available before Adam's first step) and `"phi"`
            (Metric 2.1 by the paper's protocol, 10 iterations of L-BFGS-B);
            `"batch_sharpness"`, which mini-batch SGD drives to its `batch_thresholds`, and
            `"noise_scale"` (see `gradient_noise`). The loss is always measured.
        batch_size: samples of a mini-batch in batch_sharpness. None means the loop's own
            where the data tell it: a loader's `batch_size`, the first of a list of
            batches.
        epsilon: of phi, > 0.
        tol: error bound wanted of the eigenvalues, relative; > 0.
        confidence: of each eigenvalue, as in `eigenpairs`: 95 % a point are not 95 % a
            curve. None follows two pairs by the rule without a certificate, for about 8
            products a point.
        seed: of every measure's random starts.
        at_start: whether update 0 is measured now. Pass False before `load_state_dict`,
            and for the callbacks, which measure it when the training begins.
        on_point: called with each new `TrackedPoint`, to log or to write it; or several.
            `sharpness.track_writers` has them for CSV, TensorBoard and Weights & Biases.
        **risk: keywords of `EmpiricalRisk`: `closure`, `params`, `device`, .... Two have
            other defaults here. `batchnorm` is what the training minimises: `"batch"`
            while a BatchNorm layer is in training mode, else `"running"`.
            `batchnorm_batch` is the loop's own batch size where the data tell it: a
            loader's `batch_size`, the first of a list of batches. Pass it with a pair.

    Raises:
        ValueError: an unknown measure, `every` below 1, `epsilon` or `tol` <= 0,
            `confidence` outside (0, 1), preconditioned curvature of an optimizer that is
            no Adam, or what `EmpiricalRisk` refuses (with `at_start=False`, at the first
            point).
        TypeError: `optimizer`, `on_point` or the data are of another kind.

    Cost of a point: building the risk (a few samples), one forward pass for the loss,
    about 14 Hessian-vector products of two gradients each for a lambda_max, 11 gradients
    for phi, gradient and product of 100 mini-batches for batch sharpness, and for the
    noise scale as many gradients as there are samples, mostly a few dozen at a time. Half
    of every search starts at the eigenvector of the last point, half afresh, so that one
    that overtakes is seen. Between points the data are held, and a vector of n numbers for
    each lambda_max.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor] | None = None,
        data: Any = None,
        *,
        optimizer: Optimizer | None = None,
        every: int = 50,
        measures: str | Sequence[str] = ("lambda_max",),
        batch_size: int | None = None,
        epsilon: float = 1e-3,
        tol: float = 1e-2,
        confidence: float | None = 0.95,
        seed: int = 0,
        at_start: bool = True,
        on_point: OnPoint | Iterable[OnPoint] | None = None,
        **risk: Any,
    ) -> None:
        self._every = whole("every", every, 1, "1 measures after each update.")
        self._measures = _selected(measures)
        self._epsilon = positive("epsilon", epsilon, "The paper used 1e-3 and 5e-4.")
        self._tol = positive("tol", tol, "The default is 1e-2.")
        check_confidence(confidence)
        self._confidence = confidence
        self._seed = whole("seed", seed, 0)
        given = [on_point] if callable(on_point) else on_point or ()
        self._on_point = list(given)
        if not all(map(callable, self._on_point)):
            raise TypeError(
                "`on_point` must be a function of a TrackedPoint; got "
                f"{type(on_point).__name__}. To write to a file, pass one that appends."
            )
        self._optimizer = self._checked(optimizer)
        self._model, self._loss, self._risk_settings = model, loss, risk
        self._batchnorm_batch = _batch_size(data)
        self._batch_size = batch_size or self._batchnorm_batch
        if "batch_sharpness" in self._measures:
            self._batch_size = whole("batch_size", self._batch_size, 1, "As in the loop.")
        self._data = batches.materialised(
            data,
            torch.device("cpu"),
            pairs=risk.get("closure") is None,
            num_samples=risk.get("num_samples"),
        )
        self.history: list[TrackedPoint] = []
        self.num_updates = 0
        self._eigenvectors: dict[str, Tensor] = {}  # the last ones, (1 or 2, n) each
        if at_start:
            self.measure()

    # -- in the loop -------------------------------------------------------------------

    def step(self) -> TrackedPoint | None:
        """Count one update, and measure where it is due. Call it after the optimizer's.

        A scheduler that steps with every update comes before, so that the thresholds are
        those of the next update.

        Returns:
            The new point, or None.

        Raises:
            KeyboardInterrupt: the measurement was interrupted.
        """
        self.num_updates += 1
        return self.measure() if self.num_updates % self._every == 0 else None

    def measure(self) -> TrackedPoint:
        """Measure now, whether due or not, and add the point to `history`.

        Raises:
            KeyboardInterrupt: it was interrupted; the point holds what was earned.
        """
        began = time.monotonic()
        settings = {**self._batchnorm(), **self._risk_settings}
        risk = EmpiricalRisk(self._model, self._loss, self._data, **settings)
        loss = risk.value()
        values = self._values(risk, loss)
        point = TrackedPoint(
            step=self.num_updates,
            loss=loss,
            **values,
            learning_rate=_common_learning_rate(self._optimizer),
            thresholds=self._thresholds(),
            status=Status.worst(
                Status.COMPLETED,
                *(value.status for value in values.values()),
                finite=math.isfinite(loss),
            ),
            cost=replace(
                sum((value.cost for value in values.values()), Cost()),
                seconds=time.monotonic() - began,
            ),
            **_statistics(risk),
        )
        self.history.append(point)
        for function in self._on_point:
            function(point)
        if point.status is Status.INTERRUPTED:
            raise KeyboardInterrupt
        return point

    # -- what it shows -----------------------------------------------------------------

    def __str__(self) -> str:
        last = f"; {self.history[-1]}" if self.history else ""
        cost = sum((point.cost for point in self.history), Cost())
        made = counted(len(self.history), "point")
        return f"{made} in {counted(self.num_updates, 'update')}{last}   ({cost})"

    def __repr__(self) -> str:
        return f"SharpnessTracker({self})"

    def table(self) -> str:
        """A line for each point: every number with its evidence, threshold and cost."""
        columns, rows = tracked_rows(self.history)
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = (
            "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
            for row in [columns, *rows]
        )
        return "\n".join(lines) + "\n"

    def plot(self, path: str | Path | None = None, *, ax: Any = None) -> Any:
        """Every measure and its threshold above the loss; a matplotlib figure.

        Args:
            path: where the PNG goes, if anywhere.
            ax: axes of your own figure, to draw there.
        """
        from sharpness.report.figures import tracking_plot

        shown = {name for point in self.history for name in point.values()}
        names = [name for name in TRACKED if name in shown]
        return tracking_plot(self.history, names, path, ax=ax)

    # -- across an interruption --------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors from which tracking goes on, for a checkpoint."""
        return {
            "num_updates": self.num_updates,
            "history": as_plain(self.history),
            "eigenvectors": dict(self._eigenvectors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another tracker was when it gave its `state_dict`.

        A training that goes on with the same bits is then tracked with the same numbers.

        Raises:
            ValueError: `state` is not from `state_dict`.
        """
        try:
            num_updates, eigenvectors = state["num_updates"], dict(state["eigenvectors"])
            history = restored(list[TrackedPoint], state["history"])
        except (KeyError, TypeError, ValueError):
            got = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state)
            raise ValueError(
                f"`state` must come from a tracker's `state_dict()`; got {got or 'none'}. "
                "Save it beside the model's and the optimizer's."
            ) from None
        self.num_updates, self.history = num_updates, history
        self._eigenvectors = eigenvectors

    # -- in other people's loops -------------------------------------------------------

    def transformers_callback(self) -> Any:
        """A `transformers.TrainerCallback` that steps this tracker after each update.

        For a tracker built with `at_start=False`; the optimizer is taken from the
        trainer where none was given. Only the first process measures.

        Raises:
            ImportError: transformers is not installed.
        """
        base: Any = _imported("TrainerCallback", "transformers")
        tracker = self

        class TrackingCallback(base):  # type: ignore[misc]
            def on_train_begin(
                self, args: Any, state: Any, control: Any, **parts: Any
            ) -> None:
                if state.is_world_process_zero:
                    tracker._begin(parts.get("optimizer"), state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.is_world_process_zero:
                    tracker.step()

        return TrackingCallback()

    def lightning_callback(self) -> Any:
        """A Lightning `Callback` that steps this tracker after each update.

        For a tracker built with `at_start=False`; the optimizer is the trainer's first
        where none was given. Only the first process measures. Lightning's checkpoints
        hold the tracker's state.

        Raises:
            ImportError: neither lightning nor pytorch_lightning is installed.
        """
        base: Any = _imported("Callback", "lightning.pytorch", "pytorch_lightning")
        tracker = self

        class TrackingCallback(base):  # type: ignore[misc]
            num_seen = 0  # the trainer's updates; several batches may make one

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                self.num_seen = trainer.global_step
                if trainer.is_global_zero:
                    tracker._begin(next(iter(trainer.optimizers), None), self.num_seen)

            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, *_: Any, **__: Any
            ) -> None:
                updated = trainer.global_step > self.num_seen
                self.num_seen = trainer.global_step
                if updated and trainer.is_global_zero:
                    tracker.step()

            def state_dict(self) -> dict[str, Any]:
                return tracker.state_dict()

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                tracker.load_state_dict(state_dict)

        return TrackingCallback()

    # -- inside ------------------------------------------------------------------------

    def _begin(self, optimizer: Any, num_updates: int) -> None:
        """What a callback does before the first update that it sees."""
        if self._optimizer is None:
            self._optimizer = self._checked(optimizer)
        if not self.history:
            self.num_updates = num_updates
            self.measure()

    def _batchnorm(self) -> dict[str, Any]:
        """What BatchNorm layers normalise with in the training, as it is now."""
        layers = [m for m in self._model.modules() if isinstance(m, _BatchNorm)]
        if not any(layer.training for layer in layers):
            return {}
        size = self._batchnorm_batch
        return {"batchnorm": "batch"} | ({"batchnorm_batch": size} if size else {})

    def _checked(self, optimizer: Any) -> Optimizer | None:
        """The optimizer, out of the wrapper that Accelerate or Lightning puts around."""
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is None:
            return None
        if not isinstance(inner, Optimizer):
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer; got {type(inner).__name__}. "
                "Leave it out where there is none."
            )
        preconditioned = "lambda_max_preconditioned" in self._measures
        ensure(
            not preconditioned or isinstance(inner, Adam | AdamW | NAdam),
            "optimizer",
            "be Adam, AdamW or NAdam for 'lambda_max_preconditioned'",
            type(inner).__name__,
            "Track 'lambda_max' instead.",
        )
        return inner

    def _values(self, risk: EmpiricalRisk, loss: float) -> dict[str, Any]:
        found = {}
        for name in self._measures:
            value = self._value(name, risk) if math.isfinite(loss) else _NON_FINITE
            if value is not None:
                found[name] = value
                if value.status is Status.INTERRUPTED:
                    break
        return found

    def _thresholds(self) -> dict[str, float]:
        wanted = "batch_sharpness" in self._measures
        of_batches = batch_thresholds(self._optimizer) if wanted else {}
        return stability_thresholds(self._optimizer) | of_batches

    def _value(self, name: str, risk: EmpiricalRisk) -> TrackedValue | None:
        # Another draw at each point, also where nothing has moved.
        seed = _tensors.mixed(self._seed, self.num_updates)
        if name.startswith("lambda_max"):
            return self._lambda_max(name, risk, seed)
        try:
            match name:
                case "phi":
                    rise = epsilon_sharpness(
                        risk,
                        self._epsilon,
                        solver="lbfgsb",
                        seed=self._seed,
                        progress=False,
                    )
                    return _tracked(rise, rise.phi, None)
                case "batch_sharpness":
                    size = self._batch_size if risk.can_be_cut else None
                    found = batch_sharpness(
                        risk, size, _NUM_BATCHES, seed=seed, progress=False
                    )
                    return _tracked(found, found.value, found.standard_error)
                case _:
                    noise = gradient_noise(
                        risk, optimizer=self._optimizer, seed=seed, progress=False
                    )
                    return _of_noise(noise)
        except NotAvailableError:  # f <= -1, say, which no training should end for
            return replace(_NON_FINITE, status=Status.NOT_AVAILABLE)

    def _lambda_max(self, name: str, risk: EmpiricalRisk, seed: int) -> TrackedValue | None:
        preconditioner = None
        if name == "lambda_max_preconditioned":
            state = _named_state(self._optimizer, risk.model)
            if state is None:
                return None
            preconditioner = adam_preconditioner(risk, state)
        last = self._eigenvectors.get(name)
        pairs = eigenpairs(
            risk,
            1 if self._confidence else min(_NUM_FOLLOWED, risk.n),
            preconditioner=preconditioner,
            tol=self._tol,
            confidence=self._confidence,
            seed=seed,
            # Freezing or thawing a layer changes what theta is.
            v0=last if last is not None and last.shape[1] == risk.n else None,
            progress=False,
        )
        if len(pairs.eigenvectors):
            self._eigenvectors[name] = pairs.eigenvectors.clone()  # not the whole basis
        bounds = pairs.error_bounds
        error = float(bounds[0]) if len(bounds) else math.nan
        return _tracked(pairs, pairs.lambda_max, error)


def stability_thresholds(optimizer: Optimizer | None) -> dict[str, float]:
    r"""The curvature above which an optimizer's updates diverge on a quadratic.

    With learning rate eta, full-batch gradients, and momentum b:

    - plain gradient descent: $2 / \eta$;
    - heavy-ball (Polyak) momentum: $(2 + 2b) / \eta$;
    - Nesterov momentum: $(2 + 2b) / (\eta (1 + 2b))$;
    - Adam and AdamW, of the preconditioned curvature $P^{-1} H$:
      $(2 + 2\beta_1) / ((1 - \beta_1) \eta)$, 38 / eta for beta_1 = 0.9.

    SGD's dampening d makes eta (1 - d) of eta. Weight decay is no part of f and is left
    out: of SGD and AdamW it moves them by a relative eta times decay at most, of Adam,
    which divides it by P as well, by more where P is small.

    Returns:
        `{"lambda_max": ...}` for SGD, `{"lambda_max_preconditioned": ...}` for Adam and
        AdamW; empty for any other optimizer, a learning rate of 0, ascent
        (`maximize=True`), or parameter groups whose thresholds differ: no single number
        holds for the whole curvature then.

    References:
        Cohen et al. (2021), arXiv:2103.00065, for gradient descent with and without
        momentum; Cohen et al. (2022), arXiv:2207.14484, for Adam.
    """
    groups = optimizer.param_groups if optimizer is not None else []
    found = [_threshold(optimizer, group) for group in groups]
    return found[0] if found and all(other == found[0] for other in found) else {}


def _threshold(optimizer: Optimizer | None, group: Mapping[str, Any]) -> dict[str, float]:
    eta = float(group["lr"])
    if eta <= 0 or group.get("maximize"):
        return {}
    if isinstance(optimizer, SGD):
        b = float(group["momentum"])
        eta *= 1 - (float(group["dampening"]) if b else 0.0)
        times = 1 + 2 * b if group["nesterov"] else 1
        return {"lambda_max": (2 + 2 * b) / (eta * times)} if eta > 0 else {}
    if isinstance(optimizer, Adam | AdamW):
        b = float(group["betas"][0])
        return {"lambda_max_preconditioned": (2 + 2 * b) / ((1 - b) * eta)}
    return {}


def batch_thresholds(optimizer: Optimizer | None) -> dict[str, float]:
    r"""What mini-batch SGD drives `batch_sharpness` to, as far as is known.

    With learning rate eta and heavy-ball momentum b, $2 (1 - b) / \eta$ for small batches
    (`"batch_sharpness"`), on 8000 CIFAR-10 images up to about 16, and $2 (1 + b) / \eta$
    for large ones (`"batch_sharpness_large_batch"`), where it is lambda_max's. Without
    momentum both are $2 / \eta$. For Nesterov momentum the large-batch one alone is known.

    Returns:
        Both, or one, or none where `stability_thresholds` has none for lambda_max.

    References:
        Andreyev and Beneventano (2024), arXiv:2412.20553; with momentum arXiv:2604.14108.
    """
    large = stability_thresholds(optimizer).get("lambda_max")
    if large is None or optimizer is None:
        return {}
    group = optimizer.param_groups[0]
    b, found = float(group["momentum"]), {"batch_sharpness_large_batch": large}
    if group["nesterov"] and b:
        return found
    return {"batch_sharpness": large * (1 - b) / (1 + b)} | (found if b else {})


def _common_learning_rate(optimizer: Optimizer | None) -> float | None:
    groups = optimizer.param_groups if optimizer is not None else []
    rates = {float(group["lr"]) for group in groups}
    return rates.pop() if len(rates) == 1 else None


def _named_state(optimizer: Optimizer | None, model: nn.Module) -> dict[str, Any] | None:
    """Adam's state with the parameters' names in it; None before its first step.

    Its groups may hold some of the parameters only, in any order.
    """
    if optimizer is None or not any("exp_avg_sq" in s for s in optimizer.state.values()):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    for group, live in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group["param_names"] = [names.get(id(p), "") for p in live["params"]]
    return state


def _batch_size(data: Any) -> int | None:
    """Samples in a batch of the loop, where its data tell; None for a single pair."""
    size: Any = getattr(data, "batch_size", None)
    if size is None and isinstance(data, list) and data and not batches.is_pair(data):
        size = int(num_rows(data[0]))
    return size if is_whole(size) and size > 1 else None


def _statistics(risk: EmpiricalRisk) -> dict[str, Any]:
    kind = risk.settings()["batchnorm"]
    cut = kind not in (None, "running") and risk.has_outputs
    return {"batchnorm": kind, "batchnorm_batch": risk.batchnorm_batch if cut else None}


_NON_FINITE = TrackedValue(value=math.nan, error=math.nan, status=Status.NON_FINITE)


def _tracked(found: Result, value: float, error: float | None) -> TrackedValue:
    return TrackedValue(
        value=value,
        error=error,
        status=found.status,
        cost=found.cost,
        settings=found.settings,
    )


def _of_noise(found: GradientNoise) -> TrackedValue:
    low, high = found.interval
    if high is None:
        return _tracked(found, low, None)
    return _tracked(found, found.noise_scale, (high - low) / 2)


def tracked_rows(points: Sequence[TrackedPoint]) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and of each point update, loss, every measure, threshold, cost."""
    shown = [name for name in TRACKED if any(name in p.values() for p in points)]
    columns = ["update", "loss", *shown, "threshold", "products", "gradients", "s"]
    rows = [_cells(point, shown) for point in points]
    if any(point.batchnorm for point in points):
        columns.append("BatchNorm on")
        for row, point in zip(rows, points, strict=True):
            row.append(point.statistics or "–")
    return columns, rows


def _cells(point: TrackedPoint, shown: Sequence[str]) -> list[str]:
    values = point.values()
    limits = ", ".join(f"{limit:.4g}" for limit in point.thresholds.values())
    return [
        str(point.step),
        f"{point.loss:.4g}",
        *(str(values.get(name, "–")) for name in shown),
        limits or "–",
        f"{point.cost.products:.0f}",
        f"{point.cost.gradients:.0f}",
        f"{point.cost.seconds:.1f}",
    ]


def _selected(measures: str | Sequence[str]) -> list[str]:
    asked = [measures] if isinstance(measures, str) else list(measures)
    for name in asked:
        known("measures", name, TRACKED, f"be of {', '.join(TRACKED)}")
    return [name for name in TRACKED if name in asked]


def _imported(name: str, *modules: str) -> Any:
    """A class from the first of these modules that is installed."""
    for module in modules[:-1]:
        with suppress(ModuleNotFoundError):
            return getattr(import_module(module), name)
    return getattr(package(modules[-1], modules[0].partition(".")[0]), name)
