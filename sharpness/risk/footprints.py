"""What evaluating a part of the data takes, seen on a few of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sharpness._arguments import ensure
from sharpness.risk import batches, curvature, memory
from sharpness.risk.computed_again import NotAgainError
from sharpness.risk.curvature import Linearise, Mean
from sharpness.risk.loss_terms import num_rows
from sharpness.risk.memory import Footprint
from sharpness.risk.model_state import evaluation, no_layers_computed_again
from sharpness.risk.objective import Objective, gradients

# Samples whose graph is measured to predict the memory of a chunk, at least and at most:
# few show the parameters' part of the peak only.
_FEW, _PROBE, _MOST_PROBED = 4, 16, 128
# Larger chunks fall out of the processor's cache; docs/decisions.md has the timings.
_CPU_CHUNK = 1024
# Larger tensors the C library takes from the system anew each time (glibc: from 32 MB
# on), which costs more than computing with them: C1 by 64 samples at a time takes three
# quarters of the time it takes by 128.
_CPU_TENSOR = 1 << 24
# Bytes of a product's graph, at its peak, for each that the forward pass keeps (measured:
# docs/decisions.md).
_GRAPH = 4


@dataclass(frozen=True)
class Footprints:
    """Memory of products and gradients on a batch.

    The Hessian's product is measured once for each shape of a batch: `known` keeps it.
    """

    objective: Objective
    batchnorm: str
    mean: Mean
    budget: int  # bytes
    known: dict[Any, Footprint] = field(default_factory=dict)

    def of(self, batch: Any) -> Footprint:
        """Of the Hessian's product; of the gradient, where there is no second."""
        try:
            hessian = partial(curvature.hessian, self.objective, self.mean)
            return self.predicted(hessian, batch)
        except (RuntimeError, NotImplementedError):
            return self.predicted(self._gradient_only, batch)

    def predicted(self, linearise: Linearise, batch: Any) -> Footprint:
        """Of one product, from a few of the batch's samples."""
        if getattr(linearise, "func", None) is not curvature.hessian:
            return self._predicted(linearise, batch)
        shapes = tuple(getattr(leaf, "shape", None) for leaf in tree_leaves(batch))
        if shapes not in self.known:
            self.known[shapes] = self._predicted(linearise, batch)
        return self.known[shapes]

    def _predicted(self, linearise: Linearise, batch: Any) -> Footprint:
        rows = int(num_rows(batch))
        seen = self._spare_graphs(linearise, batches.rows(batch, 0, 1), min(rows, _FEW))
        if seen and rows == 1:
            return seen
        if rows <= _FEW:
            return self.measured(linearise, batch)

        def of_first(n: int) -> Footprint:
            return self.measured(linearise, batches.rows(batch, 0, n))

        for probed in (_FEW, _PROBE, min(max(_PROBE, rows // 4), _MOST_PROBED)):
            if probed >= rows:
                return self.measured(linearise, batch)
            many = of_first(probed)
            if many.held > 4 * self.objective.theta.nbytes:
                break  # the rows' part rules already
        return many.at(rows, of_first(probed // 2), (probed // 2, probed))

    def measured(self, linearise: Linearise, batch: Any) -> Footprint:
        """Of one product: the batch's graph is built."""
        seen = self._spare_graphs(linearise, batch, 1)
        return seen or self._measured(linearise, batch)

    def _spare_graphs(
        self, linearise: Linearise, batch: Any, times: int
    ) -> Footprint | None:
        """Let repeated blocks be computed again, where so many such batches do not fit.

        Seen on a forward pass: the graph of a product might not fit either. The footprint
        of one such batch, if that is what happened.
        """
        objective = self.objective
        if not objective.blocks or objective.blocks_again:
            return None
        if self._of_forward(batch) * _GRAPH * times <= self.budget:
            return None
        objective.blocks_again = objective.blocks
        try:
            return self._measured(linearise, batch)
        except torch.OutOfMemoryError:
            raise
        except (NotAgainError, RuntimeError):  # or a transform that knows no such blocks
            objective.blocks_again = objective.blocks = []
        return None

    def _of_forward(self, batch: Any) -> int:
        """Bytes that a forward pass keeps for its gradient."""
        objective = self.objective
        leaves = objective.leaves(objective.theta)

        def build() -> Callable[[], Any]:
            value = self.mean(objective.reduced(leaves, batch), batch)
            return lambda: value

        with evaluation(objective.model, self.batchnorm), torch.enable_grad():
            return memory.footprint(build).held

    def _measured(self, linearise: Linearise, batch: Any) -> Footprint:
        objective = self.objective
        leaves = objective.leaves(objective.theta)
        ones = [torch.ones_like(leaf) for leaf in leaves]

        def build() -> Callable[[], Any]:
            apply = linearise(leaves, batch)
            if isinstance(apply, curvature.Pullback):
                apply.forget_values()

            def work() -> Any:
                with no_layers_computed_again(objective.model):
                    return apply(ones)

            return work

        with evaluation(objective.model, self.batchnorm):
            if not memory.nests_transforms(build):
                return memory.footprint(build, (leaf.nbytes for leaf in leaves))
            with torch.enable_grad():
                value = self.mean(objective.reduced(leaves, batch), batch)
                held = memory.saved_bytes(gradients(value, leaves, create_graph=True))
            return Footprint(held, 2 * held)  # the peak is a guess

    def _gradient_only(self, leaves: Sequence[Tensor], batch: Any) -> curvature.Matvec:
        with torch.enable_grad():
            value = self.mean(self.objective.reduced(leaves, batch), batch)
        return lambda _: gradients(value, leaves, retain_graph=True)

    def rows_at_once(self, pair: batches.Pair, budget: int) -> int:
        """Of the rows of a pair, so many as a quarter of the budget holds."""
        rows = min(len(pair[1]), _CPU_CHUNK)
        chunk = self.of(batches.rows(pair, 0, rows))
        most = max(1, int(budget / 4 / chunk.peak * rows))
        if self.objective.device.type != "cpu":
            return most
        return max(1, min(most, _CPU_CHUNK, rows * _CPU_TENSOR // max(1, chunk.largest)))

    def require_room(self, parts: Sequence[Any], what: str, free: int) -> None:
        """Refuse parts that must be whole and do not fit the memory, by a few rows."""
        largest = max(parts, key=num_rows)
        try:
            need = self.of(largest).peak
        except Exception:
            if what == "data":  # a few rows cannot be evaluated
                return
            raise
        rows = int(num_rows(largest))
        ensure(
            need <= free,
            what,
            "come in parts that fit the memory",
            f"{rows} samples that are evaluated at once and take {need / 1e9:.1f} of "
            f"{free / 1e9:.1f} GB",
            f"Pass at most {max(2, int(rows * free / need))}.",
        )
