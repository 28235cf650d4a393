"""Model and loss as a pure function of theta's pieces and one batch."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_map

from sharpness import _tensors
from sharpness._arguments import ensure
from sharpness.risk import large_heads, loss_terms
from sharpness.risk.computed_again import repeated_blocks, without_graphs
from sharpness.risk.model_state import batchnorm_layers, held, seed_generators


class Objective:
    """What is evaluated on a batch, with everything but theta copied and held fixed.

    Args:
        model: the network.
        loss: `loss(outputs, targets)`, or None with a closure.
        closure: `closure(model, batch)`, or None with a loss.
        params: names or globs of the parameters in theta; None means all that require
            a gradient.
        device: where to compute.
        autocast: type of the forward pass under `torch.autocast`, or None.
        tf32: whether float32 products may have fewer digits.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor] | None,
        closure: Callable[[nn.Module, Any], Tensor] | None,
        *,
        params: str | Sequence[str] | None,
        device: torch.device | None,
        autocast: torch.dtype | None,
        tf32: bool,
    ) -> None:
        self.model, self.loss, self.closure = model, loss, closure
        _check_model(model)
        self.names = _selected(model, params)
        chosen = [dict(model.named_parameters())[name] for name in self.names]
        self.device = device if device is not None else chosen[0].device
        self.shapes = [p.shape for p in chosen]
        self.dtypes = [p.dtype for p in chosen]
        self.theta = _wide(_tensors.flatten(p.detach() for p in chosen)).to(self.device)
        self._constant = self._padding_rows()
        self._autocast = autocast
        types = {p.dtype for p in model.parameters()} | ({autocast} if autocast else set())
        found = [torch.finfo(t).eps for t in types if t.is_floating_point]
        self.eps = max(*found, 2.0**-10 if tf32 else 0.0)  # of the coarsest arithmetic
        self._whole = _Whole(model, loss, closure)
        self.fixed = self._copied_state()
        # What each kind of call (outputs, loss, both) writes into.
        self._written: dict[tuple[str, ...], set[str]] = {}
        self._batches_in_float64 = False
        self.has_large_head = any(
            p.ndim == 2 and len(p) >= large_heads.LEAST_CLASSES for p in model.parameters()
        )
        # Those that may be computed again instead of keeping a graph, and those that are.
        self.blocks, self.blocks_again = repeated_blocks(model), list[nn.Module]()

    def take(self, predicted: Callable[[Any], Any]) -> None:
        """Give the loss this of the model's return value."""
        self._whole.predicted = predicted

    @property
    def predicted(self) -> Callable[[Any], Any]:
        """What of the model's return value the loss is given."""
        return self._whole.predicted

    @property
    def loss_dtype(self) -> torch.dtype:
        """Type that the loss is computed in; the outputs' own unless it was widened."""
        return torch.float64 if self._whole.widens else self.theta.dtype

    def widen_loss(self, batch: Any) -> None:
        """Compute the loss in float64 from the outputs on, where it takes them.

        A softmax in float32 knows 1 - p to 6e-8 only. At a cross-entropy of 1e-7 a tenth
        of f and some percent of gradients and products are then rounding.
        """
        leaves = self.pieces(self.theta)
        outputs: Any = self.outputs(leaves, batch)
        is_narrow = isinstance(outputs, Tensor) and outputs.is_floating_point()
        if not is_narrow or outputs.dtype == torch.float64 or self.device.type == "mps":
            return
        narrow = self.fixed
        self.fixed = {
            name: _in_float64(value) if name.startswith("loss.") else value
            for name, value in narrow.items()
        }
        self._whole.widens = True
        try:
            with torch.enable_grad():
                at = outputs.detach().requires_grad_()
                gradients(self.loss_of(leaves, batch, at).sum(), [at])
        except Exception:  # a kernel or a tensor of its own that has no float64
            self._whole.widens, self.fixed = False, narrow

    def double(self) -> Objective:
        """The same function at the same theta, in float64 throughout."""
        other = copy.copy(self)
        other.theta, other._batches_in_float64 = self.theta.double(), True
        other.dtypes = [torch.float64 for _ in self.dtypes]
        other.fixed = {name: _in_float64(value) for name, value in self.fixed.items()}
        other._autocast = None
        return other

    def pieces(self, theta: Tensor) -> list[Tensor]:
        """A flat vector (n,) as new tensors in the parameters' shapes and types."""
        theta = self._with_constants(theta.detach())
        pieces = map(_tensors.aligned, _tensors.split(theta, self.shapes))
        return [p.detach().to(d) for p, d in zip(pieces, self.dtypes, strict=True)]

    def moved(self, theta: Tensor) -> Objective:
        """The same function, held at another theta (n,)."""
        other = copy.copy(self)
        other.theta = self._with_constants(theta)
        return other

    def leaves(self, theta: Tensor) -> list[Tensor]:
        """The same, to be differentiated in."""
        return [piece.requires_grad_() for piece in self.pieces(theta)]

    def reduced(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """What the loss or the closure returns.

        Scores of many classes are not made where cross-entropy follows (`large_heads`).
        """
        value = self._with_scores_postponed(leaves, batch)
        is_tensor = isinstance(value, Tensor)
        if self.closure is not None and not (is_tensor and value.ndim == 0):
            got = f"shape {tuple(value.shape)}" if is_tensor else type(value).__name__
            raise ValueError(
                "`closure` must return one value, the mean over the batch, as a tensor; "
                f"got {got}. Return the loss, averaged."
            )
        return value

    def outputs(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """What the model returns for the inputs of a pair."""
        return self._call(leaves, batch, outputs_only=True)

    def loss_of(
        self,
        leaves: Sequence[Tensor],
        batch: Any,
        outputs: Tensor,
        loss: Any = None,
        draws_on: bool = False,
    ) -> Tensor:
        """The loss, or another one, of outputs that are already there.

        `draws_on`: random numbers follow those that the outputs were made with, as where
        both are one call.
        """
        if loss is None or loss is self.loss:
            return self._call(leaves, batch, seeded=not draws_on, outputs=outputs)
        value: Tensor = loss(*self._whole.as_compared(outputs, batch[1]))
        return value

    def estimated_statistics(
        self, leaves: Sequence[Tensor], parts: Sequence[Any]
    ) -> dict[str, Tensor]:
        """BatchNorm's running averages at these parameters, over these batches.

        As `torch.optim.swa_utils.update_bn` has them: every batch is normalised by its
        own statistics, and their plain average is kept. To be called in the mode
        "estimating".
        """
        found = {
            key: torch.zeros_like(self.fixed[key])
            for name in batchnorm_layers(self.model)
            for buffer, _ in self.model.get_submodule(name).named_buffers()
            for key in [f"model.{name}.{buffer}"]
        }
        with self.holding(found), torch.no_grad():
            for part in parts:
                self._call(leaves, part, outputs_only=True)
        return found

    def holding(self, buffers: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """With these in place of the buffers that were copied."""
        return held([(self, "fixed", {**self.fixed, **buffers})])

    def _with_scores_postponed(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        if self.has_large_head:
            try:
                with large_heads.Postponed():
                    value = self._call(leaves, batch)
                return value.whole() if isinstance(value, large_heads.Scores) else value
            except large_heads.NotPostponedError:
                self.has_large_head = False
        return self._call(leaves, batch)

    def _call(
        self, leaves: Sequence[Tensor], batch: Any, seeded: bool = True, **kwargs: Any
    ) -> Tensor:
        if seeded:  # what a batch draws does not depend on the batches before
            seed_generators()
        moving = {"model." + k: v for k, v in zip(self.names, leaves, strict=True)}
        if self._batches_in_float64:
            batch = _tensors.mapped(_in_float64, batch)
        kind = tuple(kwargs) if self.closure is None else ()
        state = {**self.fixed, **moving}
        state, batch = self._safe_to_write(state, batch, self._written.get(kind))
        autocast = torch.autocast(
            self.device.type, dtype=self._autocast, enabled=self._autocast is not None
        )
        again = without_graphs(self.blocks_again)
        with autocast, _compiled_parts_run_eagerly(), again:
            result: Tensor = functional_call(self._whole, state, (batch,), kwargs)
        if kind not in self._written:
            self._written[kind] = _changed({**state, "batch": batch})
        return result

    def _safe_to_write(
        self, state: dict[str, Tensor], batch: Any, written: set[str] | None
    ) -> tuple[dict[str, Tensor], Any]:
        """The state and the batch; copies of what the forward pass writes into.

        That may be parameters too: `Embedding(max_norm=)` scales rows down. The first
        call of a kind gets copies of all and shows what that is. A batch's containers are
        always new: a closure may take them apart.
        """

        def copied(tensor: Any) -> Any:
            return tensor.clone() if isinstance(tensor, Tensor) else tensor

        if written is None:
            return {k: v.clone() for k, v in state.items()}, tree_map(copied, batch)
        state = {k: v.clone() if k in written else v for k, v in state.items()}
        return state, _tensors.mapped(copied if "batch" in written else lambda x: x, batch)

    def _with_constants(self, theta: Tensor) -> Tensor:
        """With an embedding's `padding_idx` row as it is: training does not move it."""
        if self._constant is None:
            return theta
        return torch.where(self._constant, self.theta.to(theta), theta)

    def _padding_rows(self) -> Tensor | None:
        """(n,) True where theta is a row that no gradient reaches; None for nowhere."""
        rows = list(_padding_rows(self.model, self.names))
        if not rows:
            return None
        mask = torch.zeros_like(self.theta, dtype=torch.bool)
        pieces = dict(zip(self.names, _tensors.split(mask, self.shapes), strict=True))
        for name, row in rows:
            pieces[name][row] = True
        return mask

    def _copied_state(self) -> dict[str, Tensor]:
        """Everything a call needs beside theta: buffers, and parameters held fixed."""
        moving = {"model." + name for name in self.names}
        state = (*self._whole.named_parameters(), *self._whole.named_buffers())
        return {
            k: v.detach().to(self.device, copy=True) for k, v in state if k not in moving
        }


class _Whole(nn.Module):
    """Model and loss as one module, so that parameters of both can be handed in."""

    def __init__(self, model: nn.Module, loss: Any, closure: Any) -> None:
        super().__init__()
        self.model, self.loss, self.closure = model, loss_terms.evaluated(loss), closure
        self._elementwise = loss_terms.is_elementwise(loss)
        self.widens = False
        self.predicted: Callable[[Any], Any] = lambda outputs: outputs

    def forward(self, batch: Any, outputs: Any = None, outputs_only: bool = False) -> Any:
        if self.closure is not None:
            return self.closure(self.model, batch)
        if outputs is None:
            outputs = self.predicted(call_model(self.model, batch[0]))
        if outputs_only:
            return outputs
        if self._elementwise:
            loss_terms.refuse_broadcast(outputs, batch[1])
        return self.loss(*self.as_compared(outputs, batch[1]))

    def as_compared(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        if not self.widens:
            return outputs, targets
        return _in_float64(outputs), tree_map(_in_float64, targets)


def _in_float64(value: Any) -> Any:
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_floating else value


def _padding_rows(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Weights of embeddings and the row that their gradient leaves out.

    One that another layer uses too is moved by the gradient from there.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            name, row = f"{path}.weight".removeprefix("."), module.padding_idx
            if row is not None and name in names and uses[id(module.weight)] == 1:
                yield name, row


def _changed(state: Mapping[str, Any]) -> set[str]:
    """Names of fresh copies that have been written into."""
    return {
        name
        for name, value in state.items()
        if any(isinstance(t, Tensor) and t._version for t in _tensors.leaves(value))
    }


def _compiled_parts_run_eagerly() -> AbstractContextManager[None]:
    """What `torch.compile` has made cannot be differentiated twice."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eagerly: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return eagerly


def gradients(value: Tensor, leaves: Sequence[Tensor], **how: Any) -> Sequence[Tensor]:
    """`torch.autograd.grad` with zeros for leaves that `value` does not depend on."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(
        value, leaves, allow_unused=True, materialize_grads=True, **how
    )


def call_model(model: nn.Module, inputs: Any) -> Any:
    """What a model makes of one input, of several in order, or of several by name."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _wide(vector: Tensor) -> Tensor:
    """At least float32: Krylov vectors and steps of half precision would be noise."""
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def _check_model(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        wrong = None
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            wrong = "be initialised", "not initialised yet", "Run it on a batch first"
        elif tensor.device.type == "meta":
            wrong = "hold its values", "on the meta device", "Load its parameters"
        elif isinstance(tensor, nn.Parameter) and tensor.is_complex():
            wrong = "have real parameters", "complex", "Use real and imaginary parts"
        must, got, advice = wrong or ("", "", "")
        ensure(not wrong, "model", must, f"{name}, which is {got}", f"{advice}.")


_NAMES = "Use names or globs of `model.named_parameters()`."


def _selected(model: nn.Module, params: str | Sequence[str] | None) -> list[str]:
    """Names of the parameters in theta, in `named_parameters()` order."""
    named = dict(model.named_parameters())
    if params is None:
        names = [name for name, p in named.items() if p.requires_grad]
    else:
        several = isinstance(params, Iterable) and not isinstance(params, str | Tensor)
        globs: list[Any] = list(params) if several else [params]
        wrong = [type(glob).__name__ for glob in globs if not isinstance(glob, str)]
        ensure(not wrong, "params", "be names or globs", "".join(wrong[:1]), _NAMES)
        names = [k for k in named if any(fnmatchcase(k, glob) for glob in globs)]
    there = "no requires_grad" if params is None and named else "model parameters"
    ensure(
        bool(names),
        "params",
        "match at least one parameter of `model`",
        f"{params!r} ({there}: {', '.join(list(named)[:3]) or 'none'}, …)",
        _NAMES,
    )
    return names
