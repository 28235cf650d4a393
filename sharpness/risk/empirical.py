"""EmpiricalRisk: a mean loss, its gradient and its curvature, at fixed parameters."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from sharpness import _tensors
from sharpness._arguments import ensure, is_whole, require, whole, whole_seed
from sharpness._ranks import OutOfMemoryEverywhereError, Ranks, Vectors
from sharpness._results import DerivativeDisagreesError, ensure_available
from sharpness.risk import batch_dependence, batches, files, intake, sharded
from sharpness.risk.chunks import ChunkedMean
from sharpness.risk.computed_again import NotAgainError
from sharpness.risk.curvature import Matrix, Pullback
from sharpness.risk.derivatives import Comparison, Derivatives, compared
from sharpness.risk.digests import described, digest
from sharpness.risk.kept_graph import KeptGraph
from sharpness.risk.loss_terms import keyword
from sharpness.risk.mean_loss import BatchNorm, MeanLoss, exact_arithmetic
from sharpness.risk.model_state import (
    batchnorm_layers,
    convolves,
    deep_copy,
    is_recurrent,
    original,
    unwrapped,
)
from sharpness.risk.objective import Objective
from sharpness.risk.plan import Plan, asked_engine
from sharpness.risk.points import Point, Points
from sharpness.risk.products import Products, Task, rounding
from sharpness.risk.sample_gradients import SampleGradients, Unit

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

BATCHNORM_BATCH = 5000  # samples of a part for BatchNorm, as in Keskar et al.
MATRICES: tuple[str, ...] = get_args(Matrix)
_Computed = TypeVar("_Computed")
_Asked = ParamSpec("_Asked")


def _fitting(
    evaluate: Callable[Concatenate[EmpiricalRisk, _Asked], _Computed],
) -> Callable[Concatenate[EmpiricalRisk, _Asked], _Computed]:
    """A method that is called again, in smaller chunks, where the memory runs out.

    Or with the graphs of all blocks, where one cannot be computed again.
    """

    @wraps(evaluate)
    @torch.inference_mode(False)
    def fitted(
        risk: EmpiricalRisk, /, *args: _Asked.args, **kwargs: _Asked.kwargs
    ) -> _Computed:
        while True:
            try:
                given = risk._f.mean.given
                with (
                    exact_arithmetic(risk.device, risk.tf32),
                    intake.explained(risk._objective, given),
                ):
                    return evaluate(risk, *args, **kwargs)
            except (torch.OutOfMemoryError, NotAgainError) as error:
                trouble = str(error).split(". ")[0]
                agreed = isinstance(error, OutOfMemoryEverywhereError)
                is_full = isinstance(error, torch.OutOfMemoryError)
            # Outside the handler, so that what the failed evaluation held is free.
            if risk.ranks.size > 1 and not (agreed or risk.is_sharded):
                raise risk.ranks.end(f"{trouble}. Pass a smaller `chunk_size`.")
            if is_full:
                risk._take_smaller_chunks(trouble)
            else:
                risk._keep_graphs(trouble)

    return fitted


class EmpiricalRisk:
    r"""The mean loss f(theta) of a model over fixed data, ready to be measured.

    $$f(\theta) = \frac{1}{T} \sum_{t=1}^{T} \ell_t(\theta)$$

    over all T **loss terms** (samples; tokens that are not masked; elements for a
    squared error), each once. Ragged batches, `ignore_index`, class weights,
    `reduction="sum"` and every chunk size give the same number to rounding. Weight decay
    and augmentation are not part of it.

    f is defined by the batches that are given. They are cut and joined where it was seen,
    on the data, that the number does not depend on it: where a row's outputs do not
    depend on other rows, and the loss, its gradient and its curvature by the outputs are
    those of its parts, as a mean or as a sum. Else (a root of a mean, a mask or class
    weights inside a function of your own, a contrastive loss, layers that mix rows,
    random draws in the forward pass) every batch is evaluated whole, f is the mean over
    the batches weighted by their rows, or by `terms`, and `notes` say so.

    The parameters and buffers are copied here: theta stays where it was when the risk
    was built. The model itself is left bit for bit as it was (mode, buffers, `.grad`,
    `requires_grad`), and so is every random generator, also after an exception.
    The loss is computed in float64 from the model's outputs on, where it takes them, since
    in float32 a saturated cross-entropy is mostly rounding.
    Dropout is off. `torch.compile`, DDP and DataParallel are taken off; attention and
    recurrent layers run on kernels that can be differentiated twice.
    `sharpness.doctor(risk)` checks all this.

    Args:
        model: the network; its parameters are the point that is measured.
        loss: `loss(outputs, targets)` as in PyTorch; also the name or the class of one of
            PyTorch's. These are asked for `reduction`, `ignore_index` and `weight`; any
            other callable has one term for each target row, and whether it averages or
            adds them is seen on the data.
        data: a pair (inputs, targets) of tensors, arrays, tables or sparse matrices; a
            list of batches; a loader, which is run through once; a data set; an `.npz`,
            `.csv` or `.parquet` file, or a folder of `datasets` (`risk.files`). Several
            inputs: a tuple, called as `model(*inputs)`, or a dict, called as
            `model(**inputs)`; a batch may be a dict with `labels`. Kept on `device`, in
            at most half of the memory that is free.
        num_samples: the first so many of the data; reading stops there, so that a stream
            may be endless. With a closure the last batch is kept whole. None: all.
        closure: `closure(model, batch)` -> loss, instead of `loss`, for dict batches
            or losses that differentiate the model. Each batch is then evaluated whole
            and weighs by its samples: along its first dimension, or the second (time
            first) where the closure was seen to be a mean over that one. One that was
            seen to add up its samples is divided by their number.
        params: names or globs of the parameters that form theta; None means all that
            require a gradient.
        batchnorm: `"running"` (evaluation mode), `"batch"` (batch statistics, as in
            Keskar et al.'s Keras models) or `"recalibrated"` (running statistics
            re-estimated at the theta that is evaluated, as
            `torch.optim.swa_utils.update_bn` does). With `"batch"` the data are cut into
            ceil(N / `batchnorm_batch`) near-equal parts, each evaluated whole: they are
            part of the definition of f, as they are of recalibrated statistics.
            Gradients and products hold recalibrated statistics fixed.
        batchnorm_batch: the most samples in such a part, >= 2; Keskar et al. used 5000.
        chunk_size: samples evaluated at once; `"auto"` fits the memory. Changes no
            number beyond rounding. Halved where a GPU runs out of memory.
        device: where to compute; None means where the parameters are.
        terms: number of loss terms behind a set of targets (with `closure`: behind a
            batch), for a loss that averages over something else than rows, such as
            `lambda targets: (targets >= 0).sum()`.
        engine: how products are carried out: `"kept_graph"`, `"compiled"` (both exact),
            `"differences"` (of gradients), or `"auto"`, a rule without a clock: the kept
            graph; compiled where `prepare` announces products enough to repay it;
            differences where there is no second derivative. The plan of an earlier risk
            (`settings()["engine"]`) repeats its choice.
        autocast: type of the forward pass under `torch.autocast`, such as
            `torch.bfloat16`. theta, gradients and products stay in float32 or wider.
        tf32: leave PyTorch's flags for TF32 (and bfloat16 inside float32 products) as
            they are; by default they are off while the risk computes, since they are on
            for convolutions on a GPU and leave 3 digits of 7.
        seed: of the targets that the sampled Fisher draws.
        check: before the first gradient and the first product, compare the gradient with
            f and a product with gradients, along one direction, on max(32, 1 %) of the
            samples (batches that cannot be cut whole). Where products are not the
            derivatives of right gradients, `engine="auto"` takes differences; a gradient
            that is not f's, such as a straight-through one, is refused with both numbers;
            products are NaN where f is not finite. False takes derivatives as they come.
        process_group: of `torch.distributed`, with gloo or NCCL: each process builds the
            risk with the same model and its own part of the data, however uneven, and f
            is the mean over all of them. Every process then makes the same calls and
            gets the same numbers; `batches`, `targets` and `outputs` are its own. With
            `batchnorm="batch"` the parts are those of each process. A model of FSDP2 or
            tensor parallelism brings its own group: theta, gradients and products are
            then this process's part of them (`vectors`), and layers are gathered one at
            a time.

    Raises:
        TypeError: both or neither of `loss` and `closure`, or data of another kind.
        ValueError: empty data, no parameters, an unknown `batchnorm` or `engine`, a
            `chunk_size` with `batchnorm="batch"`, a BatchNorm part or a batch that has to
            be whole beyond the memory, outputs and targets that would be broadcast; data
            that do not fit model and loss in one of the usual ways, or that hold NaN;
            processes that differ in the model, the loss or what it holds (class weights,
            label smoothing), or in how f is defined.
        NondeterministicRiskError: the model draws from a generator of its own.

    Cost: building runs the model on a few samples; with a loss that is not PyTorch's own,
    or with `terms`, also once forwards over the data, with a closure and several batches
    three times, unless a few samples show that batches must be whole. A gradient is one
    pass over the data, a Hessian-vector product about two passes' worth of arithmetic. The
    check costs about eleven gradients of its sample; the first product one more forward
    pass, since nothing is claimed where f is not finite. Neither counts as a product of a
    measure.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor] | None = None,
        data: Any = None,
        *,
        num_samples: int | None = None,
        closure: Callable[[nn.Module, Any], Tensor] | None = None,
        params: str | Sequence[str] | None = None,
        batchnorm: BatchNorm = "running",
        batchnorm_batch: int = BATCHNORM_BATCH,
        chunk_size: int | Literal["auto"] = "auto",
        device: str | torch.device | None = None,
        terms: Callable[[Any], float] | None = None,
        engine: str | Mapping[str, Any] = "auto",
        autocast: torch.dtype | None = None,
        tf32: bool = False,
        seed: int = 0,
        check: bool = True,
        process_group: Any = None,
    ) -> None:
        known = isinstance(process_group, Ranks)
        self.ranks: Ranks = process_group if known else Ranks(process_group)
        self.engine = asked_engine(engine)
        if isinstance(engine, Mapping) and chunk_size == "auto":
            chunk_size = engine.get("chunk_size") or "auto"
        _check_arguments(loss, closure, batchnorm, batchnorm_batch, chunk_size)
        seed = whole_seed(seed)
        if num_samples is not None:
            num_samples = whole("num_samples", num_samples, 1, "None means all.")
        intake.check_roles(model, loss, data)
        if closure is not None:
            intake.check_takes_two(closure, "closure", "model, batch")
        self.model, of_model = unwrapped(model)
        places: dict[str, sharded.Place] | None = None
        if sharded.is_sharded(self.model):
            self.model, places, self.ranks = sharded.in_parts(self.model)
            check = False
            of_model.append(
                f"the parameters lie on {self.ranks.size} processes: derivatives are not "
                "compared with differences"
            )
            _check_sharded(closure, batchnorm, self.model, self.engine)
        loss, of_loss = original(intake.made_loss(loss))
        of_data = files.notes(data) if isinstance(data, str | Path) else []
        self.notes = [*of_model, *of_loss, *of_data]
        self.batchnorm: BatchNorm = batchnorm
        self.batchnorm_batch = batchnorm_batch
        self.autocast, self.tf32, self.seed = autocast, tf32, seed
        self._objective = Objective(
            self.model,
            loss,
            closure,
            params=params,
            device=intake.found_device(device),
            autocast=autocast,
            tf32=tf32,
        )
        self.device, self.theta = self._objective.device, self._objective.theta
        self._parts: sharded.Parts | None = None  # where no process has theta whole
        if places is not None:
            self._objective.has_large_head = False  # a layer's scores are made whole
            chosen = [places[name] for name in self._objective.names]
            self._parts = sharded.Parts(chosen, self.ranks)
        _check_batchnorm(self.model, batchnorm, self.ranks)
        self.source, self._most = data, num_samples
        given = intake.batches_of(
            data, self.device, pairs=closure is None, num_samples=num_samples
        )
        with exact_arithmetic(self.device, tf32):
            if closure is None:
                most = batch_dependence.num_few(chunk_size, self._objective)
                given, changes = intake.fitted(self._objective, given, batchnorm, most)
            else:
                changes = intake.closure_notes(self._objective, given, batchnorm)
            self.notes += changes
            mean = ChunkedMean(
                self._objective,
                given,
                terms=terms,
                batchnorm=batchnorm,
                batchnorm_batch=batchnorm_batch,
                chunk_size=chunk_size,
                ranks=self.ranks,
                in_lockstep=self.is_sharded,
            )
        self.notes += mean.notes
        self._require_one_function(mean)
        self._f = MeanLoss(
            self._objective, mean, batchnorm, batchnorm_batch, tf32, self.vectors
        )
        self._again: dict[str, Any] = {  # what another risk like this one is built with
            "loss": loss,
            "closure": closure,
            "params": params,
            "batchnorm": batchnorm,
            "batchnorm_batch": batchnorm_batch,
            "chunk_size": chunk_size,
            "device": self.device,
            "terms": terms,
            "engine": engine,
            "autocast": autocast,
            "tf32": tf32,
            "seed": seed,
            "check": check,
            "process_group": self.ranks,
        }
        self._products: dict[str, Products] = {}
        self._gradient: Tensor | None = None
        self._value: float | None = None  # at theta, once it is known
        self._derivatives = Derivatives(self.ranks) if check else None
        self._f.estimate_statistics()

    @property
    def _mean(self) -> ChunkedMean:
        return self._f.mean

    # -- what it is ------------------------------------------------------------------

    @property
    def n(self) -> int:
        """Number of parameters in theta."""
        return self._parts.n if self._parts else self.theta.numel()

    @property
    def is_sharded(self) -> bool:
        """Whether theta and all vectors (n,) are this process's part of them only."""
        return self._parts is not None

    @property
    def names(self) -> list[str]:
        """Names of the parameters in theta, in order."""
        return list(self._objective.names)

    @property
    def shapes(self) -> list[torch.Size]:
        """Their shapes."""
        return list(self._objective.shapes)

    @property
    def num_samples(self) -> int:
        """Number of samples (with a closure: rows of the batches), on all processes."""
        return self._mean.num_samples_everywhere

    @property
    def num_terms(self) -> float:
        """What the loss is averaged over: terms that count, with their weights."""
        return self._mean.num_terms

    @property
    def chunk_size(self) -> int | None:
        """Samples evaluated at once; None where batches are evaluated whole."""
        return self._mean.chunk_size

    @property
    def vectors(self) -> Vectors:
        """How the processes share the vectors of a Krylov space."""
        return self._parts or Vectors(self.n, self.ranks)

    @property
    def shared(self) -> Vectors:
        """How they share theta, gradients and products: each has them whole, as a rule."""
        return self._parts or Vectors(self.n)

    @property
    def dtype(self) -> torch.dtype:
        """Type of theta, gradients and products: float32 or wider."""
        return self.theta.dtype

    @property
    def batches(self) -> list[Any]:
        """The data as they are evaluated: chunks, or batches that have to be whole."""
        return [chunk.batch for chunk in self._mean.all]

    @property
    def targets(self) -> Tensor:
        """All targets, in the order of `outputs`."""
        self._refuse_closure("targets")
        found = [targets for _, targets in self.batches]
        if not found:  # a process may have no sample of a subset
            return torch.empty(0, dtype=torch.int64, device=self.device)
        return torch.cat(found)

    @property
    def has_outputs(self) -> bool:
        """Whether the model's outputs can be seen: not with a closure."""
        return self._objective.closure is None

    @cached_property
    def is_classification(self) -> bool:
        """Whether outputs are scores of classes (N, C, ...) and targets class numbers."""
        if not self.has_outputs:
            return False
        inputs, targets = self._mean.first(2)
        with self._f.evaluating(), torch.no_grad():
            outputs = self._objective.outputs(self._f.pieces(None), (inputs, targets))
        of_classes = _are_classes(outputs, targets)
        here = of_classes and bool((self.targets < outputs.shape[1]).all())
        return not self.ranks.any(not here)

    @property
    def draws_random_numbers(self) -> bool:
        """Whether a forward pass draws some, the same at each. Cost: one of a batch."""
        leaves = self._objective.leaves(self.theta)
        with self._f.evaluating():
            here = any(
                batch_dependence.draws(self._objective, leaves, chunk.batch)[1]
                for chunk in self._mean.counted[:1]
            )
        return self.ranks.any(here)

    @property
    def can_be_cut(self) -> bool:
        """Whether `subset` works: no closure, and f does not depend on the batches."""
        fixed = self._has_fixed_statistics and not self.is_sharded
        return self.has_outputs and fixed and not self._mean.whole

    @property
    def _has_fixed_statistics(self) -> bool:
        return self.batchnorm == "running" or not batchnorm_layers(self.model)

    def num_classes_seen(self) -> int:
        """How many classes the targets that count are of."""
        here = self.targets[self._counts()].unique().tolist()
        return len(set().union(*self.ranks.objects(here)))

    def settings(self) -> dict[str, Any]:
        """Plain values that say how f is defined and computed, for a record."""
        known = sorted(self._products, key=lambda matrix: matrix != "hessian")
        plans = [self._products[matrix].plan for matrix in known]
        has_batchnorm = bool(batchnorm_layers(self.model))
        parts = None
        if has_batchnorm and self.batchnorm != "running":
            parts = len(self._mean.statistics_parts(self.batchnorm_batch))
        return {
            "num_samples": self.num_samples,
            "num_terms": self.num_terms,
            "num_parameters": self.n,
            "batchnorm": self.batchnorm if has_batchnorm else None,
            "batchnorm_parts": parts,
            "chunk_size": self.chunk_size,
            "engine": plans[0].to_dict() if plans else {"engine": self.engine},
            "dtype": str(self.dtype).removeprefix("torch."),
            "loss_dtype": str(self._objective.loss_dtype).removeprefix("torch."),
            "autocast": str(self.autocast).removeprefix("torch.")
            if self.autocast
            else None,
            "tf32": self.tf32,
            "device": str(self.device),
            "notes": list(self.notes),
            **({"processes": self.ranks.size} if self.ranks.size > 1 else {}),
        }

    def __repr__(self) -> str:
        return (
            f"EmpiricalRisk({type(self.model).__name__}, n={self.n}, "
            f"num_samples={self.num_samples}, batchnorm={self.batchnorm!r})"
        )

    # -- what it gives ---------------------------------------------------------------

    @_fitting
    def value(self, theta: Tensor | None = None) -> float:
        """The risk at `theta` (n,), by default the model's own. Cost: one forward pass."""
        value = self._f.value(theta)
        self._value = value if theta is None else self._value
        return value

    @_fitting
    def values(self, thetas: Tensor, at_once: int = 1) -> tuple[Tensor, Tensor]:
        """Give f and the accuracy at points (b, n): float64 (b,) each.

        The accuracy is that of `accuracy`; NaN where there are no classes, or f is NaN.

        Args:
            thetas: the points.
            at_once: how many of them share a pass, by `torch.func.vmap`, where model and
                loss can; `points_at_once` suggests a number. Changes no number beyond
                rounding.

        Cost: a forward pass a point, for both.
        """
        classes = self.is_classification
        points = Points(self._objective, self._mean, self._is_right if classes else None)
        blocks = self._mean.fitting(
            lambda: [
                point
                for block in thetas.split(at_once)
                for point in self._several(points, block)
                or [self._one(points, t) for t in block]
            ]
        )
        value, right = (
            self.ranks.total(torch.cat([p[i].reshape(-1) for p in blocks])) for i in (0, 1)
        )
        total = self.ranks.total(self._counts().sum()) if classes else math.nan
        return value, (right.to(value) / total).masked_fill(value.isnan(), math.nan)

    @_fitting
    def points_at_once(self) -> int:
        """How many points `values` should take in a pass, by a rule without a clock.

        Several on a CPU where a small network's calls take longer than its arithmetic, on
        other devices as memory allows; one with a closure, and where BatchNorm's
        statistics have to be estimated at each point.
        """
        if not self._take_together:
            return 1
        return Points(self._objective, self._mean, None).at_once(self.batchnorm)

    @property
    def _take_together(self) -> bool:
        by_point = self.batchnorm == "recalibrated" or self.ranks.size > 1
        return self.has_outputs and not by_point

    def _several(self, points: Points, thetas: Tensor) -> list[Point]:
        """At once; nothing where that does not work."""
        if len(thetas) == 1 or not self._take_together:
            return []
        with self._f.evaluating(), torch.no_grad():
            found = points.at_several([self._f.pieces(theta) for theta in thetas])
        return [found] if found else []

    def _one(self, points: Points, theta: Tensor) -> Point:
        closed = not self.has_outputs  # a closure may differentiate the model
        leaves = [piece.requires_grad_(closed) for piece in self._f.pieces(theta)]
        with self._f.evaluating(theta), torch.set_grad_enabled(closed):
            return points.at(leaves)

    def gradient(
        self, theta: Tensor | None = None, *, freeze_batchnorm: bool = False
    ) -> Tensor:
        """Gradient of f at `theta`, (n,). Cost: one pass over the data.

        Args:
            theta: where; None is the model's own.
            freeze_batchnorm: keep BatchNorm's statistics as they are at the model's own
                parameters. The derivative of that gradient is the Hessian; it parts from
                the plain one with `batchnorm="recalibrated"` alone.
        """
        risk = self
        if freeze_batchnorm:
            risk = copy.copy(self)
            risk._f = self._f.frozen()
        return risk.value_and_gradient(theta)[1]

    @_fitting
    def value_and_gradient(self, theta: Tensor | None = None) -> tuple[float, Tensor]:
        """The risk and its gradient (n,) at `theta`. Cost: one pass over the data.

        Raises:
            DerivativeDisagreesError: the gradient is not that of f (`check=False` in the
                constructor gives it all the same).
        """
        self._require_gradient_of_f()
        value, gradient = self._f.value_and_gradient(theta)
        self._value = value if theta is None else self._value
        return value, gradient

    @_fitting
    def value_gradient_and_accuracy(
        self, theta: Tensor | None = None
    ) -> tuple[float, Tensor, float]:
        """`value_and_gradient` and `accuracy` at `theta`. Cost: one pass over the data.

        Raises:
            DerivativeDisagreesError: as in `value_and_gradient`.
            TypeError: as in `accuracy`.
        """
        self._require_classes()
        self._require_gradient_of_f()
        right: list[Tensor] = []

        def see(batch: Any, outputs: Tensor) -> None:
            right.append(self._is_right(outputs, batch[1]).sum())

        value, gradient = self._f.value_and_gradient_seen(theta, see)
        counted = self.ranks.add(int(self._counts().sum()))
        return value, gradient, self.ranks.add(sum(map(int, right))) / counted

    def value_and_accuracy(self) -> tuple[float, float]:
        """F and the accuracy at theta, NaN where there are no classes, in one pass."""
        value, accuracy = (float(each) for each in self.values(self.theta[None]))
        self._value = value
        return value, accuracy

    def known_value(self) -> float:
        """The risk at theta. Cost: one forward pass the first time, then nothing."""
        return self.value() if self._value is None else self._value

    def known_gradient(self) -> tuple[float, Tensor]:
        """The risk and its gradient (n,) at theta, computed once; not to be written on."""
        if self._gradient is None:
            self._gradient = self.gradient()
        return self.known_value(), self._gradient

    def hvp(self, v: Tensor) -> Tensor:
        """Hessian of f times `v`: (n,) -> (n,), or (b, n) -> (b, n), row by row.

        Exact up to rounding (reverse mode twice), but for `engine="differences"`. The
        first product also builds the graphs that later ones reuse.

        Raises:
            ValueError: the last dimension of `v` is not n.

        Cost: about two gradients' worth of arithmetic for each row.
        """
        return self.product(v, "hessian")

    @_fitting
    def product(self, v: Tensor, matrix: Matrix = "hessian") -> Tensor:
        r"""A curvature matrix times `v`: (n,) -> (n,), or (b, n) -> (b, n).

        With z the outputs, J = dz/dtheta, and g_c the gradient of one case (a sample; an
        unmasked target of a cross-entropy) with weight a_c in the mean:

        - `"hessian"`: the second derivative of f;
        - `"gauss_newton"`: J^T (d^2 loss / dz^2) J, exact (Schraudolph 2002);
        - `"empirical_fisher"`: sum_c a_c g_c g_c^T with the targets as given;
        - `"sampled_fisher"`: the same over loss terms, each with one target drawn from
          the model by `seed`. Its expectation is the Fisher information, which for these
          losses is the Gauss-Newton matrix (Martens 2020);
        - `"gradient_covariance"`: sum_c a_c (g_c - g)(g_c - g)^T.

        Raises:
            TypeError: another matrix than the Hessian for a risk from a closure, which
                hides the outputs.
            ValueError: the last dimension of `v` is not n; an unknown matrix; per-sample
                gradients with `batchnorm="batch"`; targets to be sampled for a loss that
                is no -log density.
            DerivativeDisagreesError: a derivative that is not that of f, where
                differences cannot take its place.

        NaN where f is not finite.

        Cost: two gradients' worth of arithmetic a row, or less; once a gradient for the
        covariance, and a forward pass for the sampled targets.
        """
        num = self.theta.numel()
        sound = v.ndim in (1, 2) and v.shape[-1] == num
        contract = f"have shape (n,) or (b, n) with n={num}"
        ensure(sound, "v", contract, str(tuple(v.shape)))
        v = v.detach().to(device=self.device, dtype=self.dtype)
        if not self._is_finite():
            return torch.full_like(v, math.nan)
        product = self._products_of(matrix, 1)(v)
        if matrix != "gradient_covariance":
            return product
        gradient = self.known_gradient()[1]
        return product - (v @ gradient).unsqueeze(-1) * gradient

    @_fitting
    def product_part(self, part: Tensor, matrix: Matrix = "hessian") -> Tensor:
        """This process's entries of `product`, from its entries of a vector (n,).

        Where there is one process that is all of them. `vectors` says which are whose.

        Cost: that of `product`; one all-gather, and one reduce-scatter instead of its
        all-reduce.
        """
        if self.is_sharded:
            return self.product(part, matrix)
        part = part.detach().to(device=self.device, dtype=self.dtype)
        if not self._is_finite():
            return torch.full_like(part, math.nan)
        product = self._products_of(matrix, 1).of_part(part)
        if matrix != "gradient_covariance":
            return product
        gradient = self.vectors.part(self.known_gradient()[1])
        return product - self.vectors.total(part @ gradient) * gradient

    @_fitting
    def product_and_error(
        self, v: Tensor, matrix: Matrix = "hessian"
    ) -> tuple[Tensor, Tensor]:
        """`product` for rows v (b, n), and what each may be off by in norm, (b,).

        For exact engines that is rounding; for differences of gradients an estimate:
        what changes with a step four times as long.

        Raises:
            TypeError: as in `product`.
            ValueError: as in `product`.

        Cost: that of `product`.
        """
        found = self._measured(v, matrix)
        if found is not None:
            return found
        products = self.product(v, matrix)
        # The first product may have shown that differences are needed.
        return self._measured(v, matrix) or (
            products,
            rounding(products, self.shared),
        )

    def _measured(self, rows: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor] | None:
        rows = rows.detach().to(device=self.device, dtype=self.dtype)
        finite = self._is_finite()
        return self._products_of(matrix, 1).with_errors(rows) if finite else None

    @_fitting
    def gradient_and_product(self) -> tuple[Tensor, Tensor]:
        """The gradient g and the Hessian's product H g, (n,) each, of a risk met once.

        For many small risks, such as mini-batches: no memory is measured, and no graph
        kept. Where there is no second derivative H g is a difference of gradients.

        Cost: that of a gradient and a product, in one go where the data are one chunk.
        """
        self._require_gradient_of_f()
        if self.engine != "differences" and not self._doubt_of_product():
            with suppress(NotImplementedError):
                return self._exact_gradient_and_product()
        slope = self.gradient()
        return slope, self.product(slope)

    def _exact_gradient_and_product(self) -> tuple[Tensor, Tensor]:
        if len(self._mean.counted) > 1 or self.ranks.size > 1:
            slope = self.gradient()  # which may take smaller chunks
            work = self._mean.work("hessian", self.seed)
            own = self._mean.fitting(lambda: KeptGraph(work, 0)(slope))
            return slope, self.ranks.total(own)
        work = self._mean.work("hessian", self.seed)
        apply = work.linearised(0)
        assert isinstance(apply, Pullback)
        slope, product = (torch.zeros_like(self.theta) for _ in range(2))
        work.add(slope, apply.values, 0)
        work.add(product, apply(work.split(slope)), 0)
        return slope, product

    @_fitting
    def block_products(
        self,
        blocks: Sequence[Sequence[str]],
        vectors: Sequence[Tensor],
        matrix: Matrix = "hessian",
    ) -> list[Tensor]:
        """Diagonal blocks of a curvature matrix times a vector each: M_bb v_b.

        Args:
            blocks: names of the parameters of each block; blocks may overlap.
            vectors: (n_b,) each, the parameters flat and in the block's order.
            matrix: as in `product`, but for the gradient covariance.

        Cost: one sweep over the data; for each block at most a product, and for the
        Hessian only the part of the graph that lies behind the block.
        """
        require(
            matrix != "gradient_covariance",
            "matrix",
            "be another one for diagonal blocks",
            matrix,
            "'empirical_fisher' differs by g g^T.",
        )
        self._refuse_sharded("diagonal blocks")
        position = {name: i for i, name in enumerate(self.names)}
        places = [[position[name] for name in block] for block in blocks]
        moved = [v.detach().to(device=self.device, dtype=self.dtype) for v in vectors]
        if not self._is_finite():
            return [torch.full_like(v, math.nan) for v in moved]
        return self._products_of(matrix, 1).of_blocks(places, moved)

    def subset(self, index: Sequence[int] | Tensor) -> EmpiricalRisk:
        """The mean over some of the samples, at the same theta. They may repeat.

        Raises:
            TypeError: a risk from a closure, whose batches cannot be cut.
            ValueError: BatchNorm, or the loss, depends on how the data are batched, so a
                subset is another function; no positions, or one outside of
                [0, num_samples).
        """
        self._refuse_closure("data")
        self._refuse_sharded("a subset of the data")
        ensure(
            self._has_fixed_statistics,
            "batchnorm",
            "be 'running' for a subset of the data",
            f"{self.batchnorm!r} (its statistics would change with the samples)",
        )
        ensure(
            not self._mean.whole,
            "loss",
            "be a mean or a sum over rows for a subset of the data",
            f"one that depends on how they are batched ({self._mean.whole})",
        )
        places = torch.as_tensor(index, device=self.device)
        inside = (places >= 0) & (places < self.num_samples)
        sound = bool(len(places)) and not places.is_floating_point() and bool(inside.all())
        ensure(
            sound,
            "index",
            f"hold positions in [0, {self.num_samples})",
            str(places[~inside].tolist()[:1]) if len(places) else "none",
            "They count from 0 and may repeat.",
        )
        if self.ranks.size > 1:
            _ = self.is_classification, self._row  # a process may have no sample left
            places = self._own(places)
        return self._with(_f=self._f.of(self._mean.subset(places)))

    def _own(self, places: Tensor) -> Tensor:
        """Positions among this process's samples; the ranks' follow one another."""
        numbers = self.ranks.objects(self._mean.num_samples)
        start, num = sum(numbers[: self.ranks.rank]), numbers[self.ranks.rank]
        return places[(places >= start) & (places < start + num)] - start

    def parts(self) -> list[EmpiricalRisk]:
        """The means over what is evaluated at once: batches, BatchNorm parts, or chunks.

        Weighted by their terms they add up to f.

        Raises:
            TypeError: several processes have parts of their own.
        """
        self._refuse_ranks()
        return [self._with(_f=self._f.of(part)) for part in self._mean.parts()]

    def unchecked(self) -> EmpiricalRisk:
        """The same risk with `check=False`: its derivatives as they come."""
        return self._with(_derivatives=None, _again={**self._again, "check": False})

    def _with(self, **changes: Any) -> EmpiricalRisk:
        """A risk like this one, of which nothing has been computed yet."""
        other = copy.copy(self)
        vars(other).update(changes, _products={}, _gradient=None, _value=None)
        return other

    def sample_gradients(
        self, index: Sequence[int] | Tensor, unit: Unit = "sample"
    ) -> SampleGradients:
        """Gradients g_i (n,) of some samples, in blocks (b, n), in the data's order.

        Each is scaled so that their mean is the gradient of the mean over these samples.

        Args:
            index: positions in [0, num_samples), rising.
            unit: `"sample"`: all its loss terms, such as the tokens of a sequence, are
                one; `"term"`: every class number that counts has a gradient of its own.

        Returns:
            An iterable over blocks of at most 64 MB (or one row), with a length; `how`
            says in words whether the samples of a block went through at once.

        Raises:
            TypeError: samples have no gradients of their own (a closure, a loss or
                layers that couple them, BatchNorm that depends on the data), or terms
                that are no class numbers.

        Cost: a gradient for each sample; at once by `torch.func.vmap`, or one by one.
        """
        self._refuse_sharded("gradients of single samples")
        ensure_available(
            self.can_be_cut,
            "risk",
            "be a mean over samples to have their gradients",
            "one that is evaluated a batch at a time (not available)",
            "Use `parts()`.",
        )
        self._refuse_ranks()
        mean = self._mean.subset(torch.as_tensor(index, device=self.device))
        return SampleGradients(self._f.of(mean), unit)

    def double(self) -> EmpiricalRisk:
        """The same risk at the same theta, computed in float64 throughout.

        What float32 rounds away can be seen there: the rise of f over a tiny step, the
        curvature behind a softmax that has saturated inside of the model. Not for a model
        that itself turns to float32 midway, nor on a device without float64 (MPS).

        Cost: nothing yet; passes take about twice as long on a CPU, and up to 64 times on
        GPUs made for games.
        """
        wide = self._f.double()
        return self._with(_f=wide, _objective=wide.objective, theta=wide.objective.theta)

    def network(self) -> nn.Module:
        """A copy of the model with the parameters and buffers that are measured."""
        self._refuse_sharded("a copy of it")
        copied = deep_copy(self.model)
        state = dict(zip(self.names, self._f.pieces(None), strict=True))
        state |= {k.removeprefix("model."): v for k, v in self._objective.fixed.items()}
        for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
            tensor.data = state[name].clone()
        return copied

    @property
    def loss(self) -> Callable[..., Tensor]:
        """The loss it was built with.

        Raises:
            TypeError: it was built from a closure.
        """
        self._refuse_closure("loss")
        assert self._objective.loss is not None
        return self._objective.loss

    def read_again(self, seed: int) -> list[Any]:
        """The data that `source` gives on another pass, as the risk takes them."""
        again = intake.batches_of(
            self.source,
            self.device,
            pairs=self.has_outputs,
            seed=seed,
            num_samples=self._most,
        )
        if self.has_outputs:
            most = batch_dependence.num_few(self._again["chunk_size"], self._objective)
            again, _ = intake.fitted(self._objective, again, self.batchnorm, most)
        return again

    def full_batch(self) -> Any:
        """All data as one batch (inputs, targets), on the device.

        Raises:
            TypeError: a closure, or batches that cannot be joined.
        """
        self._refuse_closure("data")
        joined = batches.joined(self._mean.given)
        got = f"batches of {len(joined)} shapes"
        ensure(len(joined) == 1, "data", "have rows of one shape", got, kind=TypeError)
        return joined[0]

    def probe_inputs(self, most: int = 16) -> Any:
        """A copy of the inputs of the first few samples, as the model is called."""
        self._refuse_closure("inputs")
        inputs = self._mean.first(most)[0]
        return tree_map(lambda part: part.clone(), inputs)  # the model may write on them

    def with_model(
        self, model: nn.Module, params: str | Sequence[str] | None = None
    ) -> EmpiricalRisk:
        """The same mean loss over the same data for another network.

        Args:
            model: such as `NormalisedLogits(risk.network())`.
            params: names or globs of its parameters in theta; None means as here.
        """
        other = {**self._again, "params": params or self._again["params"]}
        return EmpiricalRisk(model, data=self._mean.given, **other)

    @_fitting
    def prepare(self, num_products: int = 1, matrix: Matrix = "hessian") -> Plan:
        """Get ready for so many products, and say how they will be carried out.

        With `engine="auto"` many products may be worth compiling for, and this is where
        that happens. The plan also stands in `settings()["engine"]`.

        Cost: nothing, or seconds for a trace and a compilation.
        """
        products = self._products_of(matrix, num_products)
        products.expect(num_products)
        return products.plan

    @_fitting
    def outputs(self, theta: Tensor | None = None) -> Tensor:
        """Model outputs (N, ...) at `theta`, in the order of the data.

        Those of this process; (0, ...) where it has no sample of a subset.

        Raises:
            TypeError: the risk was built from a closure, which hides the outputs.
        """
        self._refuse_closure("outputs")
        parts = self._f.outputs(theta) or [self._no_outputs(theta)]
        ensure(
            all(isinstance(part, Tensor) for part in parts),
            "model",
            "return one tensor",
            f"{type(parts[0]).__name__} (its outputs cannot be joined)",
            kind=TypeError,
        )
        return torch.cat(parts)

    @_fitting
    def accuracy(self, theta: Tensor | None = None) -> float:
        """Share of targets whose class has the largest output, in [0, 1].

        Targets that the loss ignores (`ignore_index`) do not count.

        Raises:
            TypeError: outputs that are no scores of classes, or other targets.
        """
        self._require_classes()
        leaves = self._f.pieces(theta)
        with self._f.evaluating(theta), torch.no_grad():
            right = self._mean.fitting(lambda: self._num_right(leaves))
        counted = int(self._counts().sum())
        return self.ranks.add(right) / self.ranks.add(counted)

    def _num_right(self, leaves: Sequence[Tensor]) -> int:
        """Of this process; chunk by chunk, as all outputs may be too many to hold."""
        outputs = (
            (self._objective.outputs(leaves, pair), pair[1]) for pair in self.batches
        )
        return sum(int(self._is_right(z, y).sum()) for z, y in outputs)

    def _require_classes(self) -> None:
        self._refuse_closure("accuracy")
        ensure_available(
            self.is_classification,
            "risk",
            "classify, with scores (N, C, ...) and class numbers",
            "other outputs or targets (not available for regression)",
        )

    def _is_right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Where a target that counts has the largest output."""
        return (outputs.argmax(1) == targets) & (targets != self._ignored)

    def _counts(self) -> Tensor:
        """Where targets are not ignored."""
        return self.targets != self._ignored

    @property
    def _ignored(self) -> int:
        index: int = keyword(self._objective.loss, "ignore_index", -100)
        return index

    def linear_operator(self, matrix: Matrix = "hessian") -> LinearOperator:
        """One of the matrices of `product` as a SciPy `LinearOperator` (n, n)."""
        from scipy.sparse.linalg import LinearOperator  # half a second, and seldom used

        self._refuse_sharded("a LinearOperator")
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype

        def matvec(v: np.ndarray) -> np.ndarray:
            flat = torch.from_numpy(np.ascontiguousarray(v.reshape(-1)))
            return np.asarray(self.product(flat, matrix).cpu().numpy())

        return LinearOperator((self.n, self.n), matvec, rmatvec=matvec, dtype=dtype)

    # -- inside ----------------------------------------------------------------------

    @_fitting
    def beside_differences(self) -> tuple[Comparison, Comparison]:
        """The gradient beside differences of f, a product beside those of gradients.

        Seen anew, as by `check=True`. Cost: about eleven gradients of a few rows.
        """
        return compared("gradient", self._f.sample), compared("product", self._f.sample)

    def _require_gradient_of_f(self) -> None:
        if doubt := self._doubt("gradient", "a slope of"):
            self._note(f"gradient disagrees with f: {doubt}")
            raise DerivativeDisagreesError("model", doubt)

    def _doubt_of_product(self) -> str:
        """Why the graph's product is not the Hessian's, where differences say so."""
        wanted = self.engine != "differences"
        doubt = self._doubt("product", "a product of norm") if wanted else ""
        if doubt:
            self._note(f"second derivative disagrees with gradients: {doubt}")
        return doubt

    def _doubt(self, what: Literal["gradient", "product"], words: str) -> str:
        """A derivative beside differences, in words, where it is not that of f."""
        if self._derivatives is None:
            return ""
        seen = self._derivatives.of(what, self._f.sample)
        return f"{words} {seen}" if seen.disagrees else ""

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _is_finite(self) -> bool:
        """Whether f is, at theta; else nothing is claimed of its derivatives."""
        if self._derivatives is None:
            return True
        return math.isfinite(self.known_value())

    def _products_of(self, matrix: str, num_products: int) -> Products:
        contract = f"be one of {', '.join(MATRICES)}"
        require(matrix in MATRICES, "matrix", contract, matrix)
        if matrix not in self._products:
            self._require_gradient_of_f()
            self._products[matrix] = Products(self._task(matrix), num_products)
        return self._products[matrix]

    def _task(self, matrix: str) -> Task:
        objective = self._objective
        this = weakref.proxy(self)  # a cycle would hold the graphs until collected
        return Task(
            matrix=matrix,
            work=self._mean.work(matrix, self.seed),
            footprint=self._mean.footprint,
            gradient=lambda theta: this.gradient(theta, freeze_batchnorm=True),
            theta=self.theta,
            chunk_size=self.chunk_size,
            budget=self._mean.budget,
            asked=self.engine,
            doubt=self._doubt_of_product() if matrix == "hessian" else "",
            compiling_seldom_pays=is_recurrent(self.model)
            or (self.device.type == "cpu" and convolves(self.model))
            or self._objective.has_large_head,
            vectors=self.vectors,
            blocks_again=lambda: len(objective.blocks_again),
            shared=self._parts,
        )

    def _take_smaller_chunks(self, trouble: str) -> None:
        self._products.clear()
        self._mean.halve(trouble)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _keep_graphs(self, trouble: str) -> None:
        self._products.clear()
        self._objective.blocks = self._objective.blocks_again = []
        self._mean.forget_footprints()
        self._note(f"blocks are not computed again, and take more memory: {trouble}")

    def _require_one_function(self, mean: ChunkedMean) -> None:
        """Refuse processes whose risks are not parts of one mean."""
        if self.ranks.size == 1:
            return
        facts = {
            "parameters": (
                self.names,
                None if self.is_sharded else _tensors.mixed(0, self.theta),
            ),
            "buffers": _tensors.mixed(0, *self._objective.fixed.values()),
            "batchnorm": self.batchnorm,
            "loss": mean.reduction,
            "class weights or other settings of the loss": self._loss_digest(),
            "need of whole batches": bool(mean.whole),
        }
        theirs = self.ranks.objects(facts)
        others = [name for name in facts if any(t[name] != facts[name] for t in theirs)]
        ensure(
            not any(self.ranks.objects(others)),
            "process_group",
            "be of processes with one model, loss and kind of data, each with a part of it",
            f"ranks that differ in: {', '.join(others) or 'nothing seen from here'}",
            "Load the same checkpoint in each; broadcast what one has drawn.",
        )

    @cached_property
    def _row(self) -> Any:
        """One sample; of a subset without any here, of the data that it is of."""
        return self._mean.first(1)

    def _no_outputs(self, theta: Tensor | None) -> Any:
        with self._f.evaluating(theta), torch.no_grad():
            return self._objective.outputs(self._f.pieces(theta), self._row)[:0]

    def _loss_digest(self) -> str:
        """Of the loss with all that it holds.

        Not of the object whose method it is or that it was written in, nor of a closure:
        they may know their rank.
        """
        loss = self._objective.loss
        return digest(described(getattr(loss, "__func__", loss), surroundings=False))

    def _refuse_ranks(self) -> None:
        ensure_available(
            self.ranks.size == 1,
            "process_group",
            "be None for gradients of single samples and batches",
            f"one of {self.ranks.size} processes (not available)",
            "Measure this on one process.",
        )

    def _refuse_sharded(self, what: str) -> None:
        ensure_available(
            not self.is_sharded,
            "model",
            f"have its parameters whole for {what}",
            "a sharded one (not available)",
            "Load the whole model on one process for this.",
        )

    def _refuse_closure(self, what: str) -> None:
        ensure_available(
            self.has_outputs,
            what,
            "come from a risk with a `loss`",
            "one with a `closure` (not available for a closure)",
            "Pass `loss=` and pairs.",
        )


def _are_classes(outputs: Any, targets: Any) -> bool:
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return False
    if targets.is_floating_point() or targets.dtype == torch.bool or outputs.ndim < 2:
        return False
    others = (*outputs.shape[:1], *outputs.shape[2:])
    return others == tuple(targets.shape)


def _check_sharded(closure: Any, batchnorm: str, model: nn.Module, engine: str) -> None:
    ensure(
        engine != "compiled",
        "engine",
        "be another one for a model whose parameters lie on several processes",
        "'compiled' (a trace would not wait for them)",
    )
    ensure(
        closure is None,
        "closure",
        "be None for a model whose parameters lie on several processes",
        "one",
        "Pass `loss` and pairs.",
    )
    ensure(
        batchnorm == "running" or not batchnorm_layers(model),
        "batchnorm",
        "be 'running' for a model whose parameters lie on several processes",
        repr(batchnorm),
    )


def _check_batchnorm(model: nn.Module, batchnorm: str, ranks: Ranks) -> None:
    ensure(
        ranks.size == 1 or batchnorm != "recalibrated" or not batchnorm_layers(model),
        "batchnorm",
        "be 'running' or 'batch' with a `process_group`",
        "'recalibrated' (its averages are over all data, and no process has them)",
        "Recalibrate the model first, with `torch.optim.swa_utils.update_bn`.",
    )
    untracked = [
        name
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is None
    ]
    ensure(
        batchnorm == "batch" or not untracked,
        "batchnorm",
        "be 'batch' for layers with track_running_stats=False",
        f"{batchnorm!r} ({', '.join(untracked[:1])} has no running averages)",
        "Pass 'batch'.",
    )


def _check_arguments(
    loss: Any, closure: Any, batchnorm: str, batchnorm_batch: int, chunk_size: Any
) -> None:
    ensure(
        (loss is None) != (closure is None),
        "loss",
        "be given, or `closure` instead of it",
        "neither" if loss is None else "both",
        "Pass `loss(outputs, targets)`, or `closure(model, batch)`.",
        TypeError,
    )
    require(
        batchnorm in get_args(BatchNorm),
        "batchnorm",
        "be 'running', 'batch' or 'recalibrated'",
        batchnorm,
        "'running' is evaluation mode.",
    )
    ensure(
        batchnorm_batch >= 2,
        "batchnorm_batch",
        "be at least 2",
        str(batchnorm_batch),
        "A batch of one has no variance.",
    )
    if chunk_size != "auto":
        sound = is_whole(chunk_size) and chunk_size >= 1
        require(sound, "chunk_size", "be a whole number >= 1 or 'auto'", chunk_size)
        ensure(
            batchnorm != "batch",
            "chunk_size",
            "be 'auto' with batchnorm='batch'",
            f"{chunk_size} (the parts BatchNorm sees define the risk)",
            "Set `batchnorm_batch`.",
        )
