"""EmpiricalRisk: a mean loss, its gradient and its curvature, at fixed parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from sharpness import _tensors
from sharpness.risk import batches, memory
from sharpness.risk.model_state import (
    batchnorm_layers,
    evaluation,
    seed_generators,
)
from sharpness.risk.products import KeptGraph
from sharpness.risk.terms import LossTerms, asked_reduction, loss_terms, num_rows

BatchNorm = Literal["running", "batch"]
_PROBE = 16  # samples whose graph is measured to predict the memory of a chunk
# Larger chunks fall out of the processor's cache; docs/decisions.md has the timings.
_CPU_CHUNK = 1024


class EmpiricalRisk:
    r"""The mean loss f(theta) of a model over fixed data, ready to be measured.

    $$f(\theta) = \frac{1}{T} \sum_{t=1}^{T} \ell_t(\theta)$$

    over all T **loss terms** (samples; tokens that are not masked; elements for a
    squared error), each once. Ragged batches, `ignore_index`, class weights,
    `reduction="sum"` and every chunk size give the same number to rounding. Weight decay
    and augmentation are not part of it.

    The parameters and buffers are copied here: theta stays where it was when the risk
    was built. The model itself is left bit for bit as it was (mode, buffers, `.grad`,
    `requires_grad`), and so is every random generator, also after an exception.
    Dropout is off.

    Args:
        model: the network; its parameters are the point that is measured.
        loss: `loss(outputs, targets)` as in PyTorch. PyTorch's own losses are asked for
            `reduction`, `ignore_index` and `weight`; any other callable is taken to have
            one term for each target row.
        data: a pair (inputs, targets), a list of batches, or a loader, which is run
            through once. Kept on `device`.
        closure: `closure(model, batch)` -> loss, instead of `loss`, for dict batches,
            several inputs or losses that differentiate the model. Each batch is then
            evaluated whole.
        params: names or globs of the parameters that form theta; None means all that
            require a gradient.
        batchnorm: `"running"` (evaluation mode) or `"batch"` (batch statistics, as in
            Keskar et al.'s Keras models). With `"batch"` the data are cut into
            ceil(N / `batchnorm_batch`) near-equal parts, each evaluated whole: they are
            part of the definition of f.
        batchnorm_batch: the most samples in such a part, >= 2; Keskar et al. used 5000.
        chunk_size: samples evaluated at once; `"auto"` fits the memory. Changes no
            number beyond rounding.
        device: where to compute; None means where the parameters are.
        terms: number of loss terms behind a set of targets (with `closure`: behind a
            batch), for a loss that averages over something else than rows.

    Raises:
        TypeError: both or neither of `loss` and `closure`, or data of another kind.
        ValueError: empty data, no parameters, an unknown `batchnorm`, a `chunk_size`
            with `batchnorm="batch"`.

    Cost: building runs the model once, on a few samples. A gradient is one pass over
    the data, a Hessian-vector product about two passes' worth of arithmetic.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor] | None = None,
        data: Any = None,
        *,
        closure: Callable[[nn.Module, Any], Tensor] | None = None,
        params: str | Sequence[str] | None = None,
        batchnorm: BatchNorm = "running",
        batchnorm_batch: int = 5000,
        chunk_size: int | Literal["auto"] = "auto",
        device: str | torch.device | None = None,
        terms: Callable[[Any], float] | None = None,
    ) -> None:
        _check_arguments(loss, closure, batchnorm, batchnorm_batch, chunk_size)
        self._model = model
        self._objective = _Objective(model, loss, closure)
        self.batchnorm: BatchNorm = batchnorm
        self.batchnorm_batch = batchnorm_batch
        self._names = _selected(model, params)
        chosen = [dict(model.named_parameters())[name] for name in self._names]
        self.device = torch.device(device) if device is not None else chosen[0].device
        self.theta = _tensors.flatten(p.detach() for p in chosen).to(self.device)
        self._shapes = [p.shape for p in chosen]
        self._dtypes = [p.dtype for p in chosen]
        self._fixed = self._copied_state()
        _check_batchnorm(model, batchnorm)
        given = batches.materialised(data, self.device, pairs=closure is None)
        if batchnorm == "batch" and closure is None and batchnorm_layers(model):
            _check_parts(given, batchnorm_batch)
        self.num_samples = int(sum(num_rows(batch) for batch in given))
        self._terms = self._find_terms(given[0], terms)
        self._budget = memory.budget_bytes(self.device)
        self.chunk_size = self._choose_chunk_size(given[0], chunk_size)
        self._chunks = [_Chunk(part, self._count(part)) for part in self._cut(given)]
        # A mean over no terms at all would be NaN.
        self._counted = [chunk for chunk in self._chunks if chunk.count]
        self.num_terms = sum(chunk.count for chunk in self._counted)
        if not self._counted:
            raise ValueError(
                "`data` must hold at least one loss term; got none that counts (every "
                "target equals `ignore_index`, or every weight is 0)."
            )
        self._hessian: KeptGraph | None = None

    # -- what it is ------------------------------------------------------------------

    @property
    def n(self) -> int:
        """Number of parameters in theta."""
        return self.theta.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Type of theta, gradients and products."""
        return self.theta.dtype

    @property
    def targets(self) -> Tensor:
        """All targets, in the order of `outputs`."""
        self._refuse_closure("targets")
        return torch.cat([chunk.batch[1] for chunk in self._chunks])

    def settings(self) -> dict[str, Any]:
        """Plain values that say how f is defined and computed, for a record."""
        return {
            "num_samples": self.num_samples,
            "num_terms": self.num_terms,
            "num_parameters": self.n,
            "batchnorm": self.batchnorm if batchnorm_layers(self._model) else None,
            "batchnorm_parts": len(self._chunks) if self.batchnorm == "batch" else None,
            "chunk_size": self.chunk_size,
            "engine": "kept_graph",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }

    def __repr__(self) -> str:
        return (
            f"EmpiricalRisk({type(self._model).__name__}, n={self.n}, "
            f"num_samples={self.num_samples}, batchnorm={self.batchnorm!r})"
        )

    # -- what it gives ---------------------------------------------------------------

    @torch.inference_mode(False)
    def value(self, theta: Tensor | None = None) -> float:
        """The risk at `theta` (n,), by default the model's own. Cost: one forward pass."""
        leaves = self._pieces(theta)
        closed = self._objective.closure is not None  # may differentiate the model
        leaves = [piece.requires_grad_(closed) for piece in leaves]
        with evaluation(self._model, self.batchnorm), torch.set_grad_enabled(closed):
            parts = [
                self._share(chunk, leaves).detach().double() for chunk in self._counted
            ]
        return float(torch.stack(parts).sum())

    def gradient(self, theta: Tensor | None = None) -> Tensor:
        """Gradient of f at `theta`, (n,). Cost: one pass over the data."""
        return self.value_and_gradient(theta)[1]

    @torch.inference_mode(False)
    def value_and_gradient(self, theta: Tensor | None = None) -> tuple[float, Tensor]:
        """The risk and its gradient (n,) at `theta`. Cost: one pass over the data."""
        leaves = [piece.requires_grad_() for piece in self._pieces(theta)]
        shares, gradient = [], torch.zeros_like(self.theta)
        with evaluation(self._model, self.batchnorm), torch.enable_grad():
            for chunk in self._counted:
                share = self._share(chunk, leaves)
                gradient += self._flat(_gradients(share, leaves, create_graph=False))
                shares.append(share.detach().double())
        return float(torch.stack(shares).sum()), gradient

    @torch.inference_mode(False)
    def hvp(self, v: Tensor) -> Tensor:
        """Hessian of f times `v`: (n,) -> (n,), or (b, n) -> (b, n), row by row.

        Exact up to rounding (reverse mode twice). The first product also builds the
        graphs that later ones reuse.

        Raises:
            ValueError: the last dimension of `v` is not n.

        Cost: about two gradients' worth of arithmetic for each row.
        """
        if v.ndim not in (1, 2) or v.shape[-1] != self.n:
            raise ValueError(
                f"`v` must have shape (n,) or (b, n) with n={self.n}; got {tuple(v.shape)}."
            )
        v = v.detach().to(device=self.device, dtype=self.dtype)
        product = self._product()
        with evaluation(self._model, self.batchnorm):
            if v.ndim == 1:
                return product(v)
            return torch.stack([product(row) for row in v]) if len(v) else v.clone()

    @torch.inference_mode(False)
    def outputs(self, theta: Tensor | None = None) -> Tensor:
        """Model outputs (N, ...) at `theta`, in the order of the data.

        Raises:
            TypeError: the risk was built from a closure, which hides the outputs.
        """
        self._refuse_closure("outputs")
        leaves = self._pieces(theta)
        with evaluation(self._model, self.batchnorm), torch.no_grad():
            return torch.cat([self._outputs(c.batch, leaves) for c in self._chunks])

    def accuracy(self, theta: Tensor | None = None) -> float:
        """Share of samples whose largest output is their class, in [0, 1]."""
        predicted = self.outputs(theta).argmax(1)
        return float((predicted == self.targets).double().mean())

    def linear_operator(self) -> LinearOperator:
        """The Hessian as a SciPy `LinearOperator` of shape (n, n)."""
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype

        def matvec(v: np.ndarray) -> np.ndarray:
            product = self.hvp(torch.from_numpy(np.ascontiguousarray(v.reshape(-1))))
            return np.asarray(product.cpu().numpy())

        return LinearOperator((self.n, self.n), matvec=matvec, rmatvec=matvec, dtype=dtype)

    # -- one chunk -------------------------------------------------------------------

    def _share(self, chunk: _Chunk, leaves: Sequence[Tensor]) -> Tensor:
        """What a chunk contributes to f: the sum over all chunks is f."""
        seed_generators()  # what a chunk draws does not depend on the chunks before
        reduced = self._call(leaves, chunk.batch)
        if self._objective.closure is not None and reduced.ndim:
            raise ValueError(
                "`closure` must return one value, the mean over the batch; got shape "
                f"{tuple(reduced.shape)}. Average it."
            )
        return self._terms.share(reduced, chunk.count, self.num_terms)

    def _outputs(self, batch: Any, leaves: Sequence[Tensor]) -> Tensor:
        return self._call(leaves, batch, outputs_only=True)

    def _call(self, leaves: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        moving = {"model." + k: v for k, v in zip(self._names, leaves, strict=True)}
        state = {**self._fixed, **moving}
        result: Tensor = functional_call(self._objective, state, args, kwargs)
        return result

    def _pieces(self, theta: Tensor | None) -> list[Tensor]:
        """`theta` as separate tensors, none of which shares a graph with another."""
        if theta is None:
            theta = self.theta
        elif theta.shape != self.theta.shape:
            raise ValueError(
                f"`theta` must have shape (n,) with n={self.n}; got {tuple(theta.shape)}."
            )
        pieces = _tensors.split(theta.detach().to(self.device), self._shapes)
        return [p.detach().to(d) for p, d in zip(pieces, self._dtypes, strict=True)]

    def _flat(self, gradients: Sequence[Tensor]) -> Tensor:
        return _tensors.flatten(g.to(self.dtype) for g in gradients)

    # -- products --------------------------------------------------------------------

    def _product(self) -> KeptGraph:
        if self._hessian is None:
            this = weakref.proxy(self)  # a cycle would hold the graphs until collected
            leaves = [piece.requires_grad_() for piece in self._pieces(None)]
            largest = max(self._counted, key=lambda chunk: num_rows(chunk.batch))
            each = self._graph_bytes(largest) + self.theta.nbytes
            self._hessian = KeptGraph(
                lambda i: this._graph(this._counted[i], leaves),
                leaves,
                num_chunks=len(self._counted),
                num_kept=max(1, int(self._budget / each)),
            )
        return self._hessian

    def _graph(self, chunk: _Chunk, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.enable_grad():
            return _gradients(self._share(chunk, leaves), leaves, create_graph=True)

    def _graph_bytes(self, chunk: _Chunk) -> int:
        """Memory of a chunk's kept graph, from graphs of the same kind on few samples.

        Part of a graph grows with the samples and part does not: two sizes tell them
        apart. A closure's batch cannot be cut, so its graph is built and measured.
        """
        if self._objective.closure is not None or len(chunk.batch[0]) <= _PROBE:
            return self._held_bytes(chunk.batch)
        small, large = (
            self._held_bytes(tuple(part[:size] for part in chunk.batch))
            for size in (_PROBE // 2, _PROBE)
        )
        a_sample = (large - small) / (_PROBE - _PROBE // 2)
        return int(large + a_sample * (len(chunk.batch[0]) - _PROBE))

    def _held_bytes(self, batch: Any) -> int:
        leaves = [piece.requires_grad_() for piece in self._pieces(None)]

        def build() -> Sequence[Tensor]:
            with torch.enable_grad():
                reduced = self._call(leaves, batch).sum()
                return _gradients(reduced, leaves, create_graph=True)

        with evaluation(self._model, self.batchnorm):
            held = memory.saved_bytes(build, [*leaves, *self._fixed.values()])
        return max(1, held)

    # -- building --------------------------------------------------------------------

    def _copied_state(self) -> dict[str, Tensor]:
        """Everything a call needs beside theta: buffers, and parameters held fixed."""
        moving = {"model." + name for name in self._names}
        state: dict[str, Tensor] = dict(self._objective.named_parameters())
        state |= dict(self._objective.named_buffers())
        return {
            k: v.detach().to(self.device, copy=True)
            for k, v in state.items()
            if k not in moving
        }

    def _find_terms(self, first: Any, terms: Callable[[Any], float] | None) -> LossTerms:
        loss = self._objective.loss
        if terms is not None:
            return LossTerms(asked_reduction(loss) or "mean", terms)
        if loss is None:
            return LossTerms("mean", num_rows)
        batch = (first[0][:_PROBE], first[1][:_PROBE])
        with evaluation(self._model, self.batchnorm), torch.no_grad():
            outputs = self._outputs(batch, self._pieces(None))
        return loss_terms(loss, outputs, batch[1])

    def _count(self, batch: Any) -> float:
        is_pair = self._objective.closure is None
        return float(self._terms.count(batch[1] if is_pair else batch))

    def _choose_chunk_size(self, first: Any, asked: int | str) -> int | None:
        if self.batchnorm == "batch" or self._objective.closure is not None:
            return None
        if isinstance(asked, int):
            return asked
        largest = _Chunk(tuple(part[:_CPU_CHUNK] for part in first), 1.0)
        a_sample = self._graph_bytes(largest) / len(largest.batch[0])
        most = max(1, int(self._budget / 4 / a_sample))
        return min(most, _CPU_CHUNK) if self.device.type == "cpu" else most

    def _cut(self, given: list[Any]) -> list[Any]:
        if self._objective.closure is not None:
            return given
        if self.chunk_size is None:
            most = self.batchnorm_batch
            return [part for pair in given for part in batches.cut_evenly(pair, most)]
        return [part for pair in given for part in batches.cut(pair, self.chunk_size)]

    def _refuse_closure(self, what: str) -> None:
        if self._objective.closure is not None:
            raise TypeError(
                f"`{what}` must come from a risk with a `loss`; got one with a "
                "`closure` (not available for a closure). Pass `loss=` and pairs."
            )


@dataclass(frozen=True)
class _Chunk:
    """A part of the data that is evaluated at once, and the loss terms it holds."""

    batch: Any
    count: float


class _Objective(nn.Module):
    """Model and loss as one module, so that parameters of both can be handed in."""

    def __init__(self, model: nn.Module, loss: Any, closure: Any) -> None:
        super().__init__()
        self.model, self.loss, self.closure = model, loss, closure

    def forward(self, batch: Any, outputs_only: bool = False) -> Any:
        if self.closure is not None:
            return self.closure(self.model, batch)
        outputs = self.model(batch[0])
        return outputs if outputs_only else self.loss(outputs, batch[1])


def _gradients(
    value: Tensor, leaves: Sequence[Tensor], *, create_graph: bool
) -> Sequence[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(
        value,
        leaves,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _check_parts(given: list[Any], most: int) -> None:
    parts = [part for pair in given for part in batches.cut_evenly(pair, most)]
    smallest = min(len(part[0]) for part in parts)
    if smallest < 2:
        raise ValueError(
            "`batchnorm_batch` must leave at least two samples in each part; got "
            f"{most} (a part has {smallest} sample). Choose another."
        )


def _selected(model: nn.Module, params: str | Sequence[str] | None) -> list[str]:
    """Names of the parameters in theta, in `named_parameters()` order."""
    named = dict(model.named_parameters())
    if params is None:
        names = [name for name, p in named.items() if p.requires_grad]
    else:
        globs = [params] if isinstance(params, str) else list(params)
        names = [k for k in named if any(fnmatchcase(k, glob) for glob in globs)]
    if not names:
        raise ValueError(
            "`params` must match at least one parameter of `model`; got "
            f"{params!r} (model parameters: {', '.join(list(named)[:5]) or 'none'}, …). "
            "Use names or globs from `model.named_parameters()`."
        )
    return names


def _check_batchnorm(model: nn.Module, batchnorm: str) -> None:
    untracked = [
        name
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is None
    ]
    if batchnorm == "running" and untracked:
        raise ValueError(
            "`batchnorm` must be 'batch' for layers with track_running_stats=False; got "
            f"'running' ({untracked[0]} has no running averages). Pass 'batch'."
        )


def _check_arguments(
    loss: Any, closure: Any, batchnorm: str, batchnorm_batch: int, chunk_size: Any
) -> None:
    if (loss is None) == (closure is None):
        both = "both" if loss is not None else "neither"
        raise TypeError(
            f"`loss` must be given, or `closure` instead of it; got {both}. "
            "Pass `loss(outputs, targets)`, or `closure(model, batch)`."
        )
    if batchnorm not in ("running", "batch"):
        raise ValueError(
            f"`batchnorm` must be 'running' or 'batch'; got {batchnorm!r}. "
            "'running' is evaluation mode."
        )
    if batchnorm_batch < 2:
        raise ValueError(
            f"`batchnorm_batch` must be at least 2; got {batchnorm_batch}. "
            "A batch of one has no variance."
        )
    if chunk_size == "auto":
        return
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(
            f"`chunk_size` must be a whole number >= 1 or 'auto'; got {chunk_size!r}."
        )
    if batchnorm == "batch":
        raise ValueError(
            f"`chunk_size` must be 'auto' with batchnorm='batch'; got {chunk_size} "
            "(the parts BatchNorm sees define the risk). Set `batchnorm_batch`."
        )
