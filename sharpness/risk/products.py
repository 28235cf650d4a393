"""Products with a risk's matrices: exact or by differences is chosen and done here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpness import _tensors
from sharpness._arguments import ensure
from sharpness._ranks import Vectors
from sharpness._results import DerivativeDisagreesError
from sharpness.risk.compiled import CompiledProduct, UnsuitableError
from sharpness.risk.curvature import Linearise
from sharpness.risk.differences import Differences
from sharpness.risk.kept_graph import Block, ChunkedSum, KeptGraph
from sharpness.risk.loss_terms import num_rows
from sharpness.risk.memory import Footprint
from sharpness.risk.plan import Plan, directions_at_once, worth_compiling

_Computed = TypeVar("_Computed")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be multiplied with, and what the rule may look at."""

    matrix: str
    work: ChunkedSum
    footprint: Callable[[Linearise, Any], Footprint]  # of one batch's product
    gradient: Callable[[Tensor], Tensor]
    theta: Tensor
    chunk_size: int | None
    budget: int
    asked: str  # an engine's name, or "auto"
    doubt: str  # why exact products are not the derivatives of gradients, or empty
    compiling_seldom_pays: bool  # for this kind of network
    vectors: Vectors  # how processes share those of a Krylov space
    blocks_again: Callable[[], int]  # how many keep no graph, once a footprint is known
    shared: Vectors | None  # likewise, where they share theta itself


class Products:
    """v -> M v for (n,), or (b, n) row by row.

    Args:
        task: the matrix and its circumstances.
        num_products: how many are expected; many may be worth compiling for.

    Raises:
        ValueError: no second derivative, and another matrix than the Hessian.
        DerivativeDisagreesError: exact products were asked for, and are wrong.
    """

    plan: Plan

    def __init__(self, task: Task, num_products: int) -> None:
        self._task, self._tried = task, False
        self._ranks = task.vectors.ranks
        # A trace would not wait for other processes.
        self._may_compile = task.asked == "auto" and task.shared is None
        self._rows = max((int(num_rows(batch)) for batch in task.work.batches), default=0)
        self._engine: KeptGraph | CompiledProduct | Differences
        if task.asked == "differences":
            self._use_differences("asked for")
            return
        self._apart = task.shared is None  # whether a product waits for no process
        own = self._fitting(self._no_second_derivative)
        trouble = next(filter(None, self._ranks.objects(own)), "")
        if trouble:
            task.gradient(task.theta)  # fails likewise if the trouble is another
            self._use_differences(f"no second derivative: {trouble}")
            return
        if task.doubt:
            if task.asked != "auto":
                raise DerivativeDisagreesError("engine", task.doubt)
            self._use_differences(f"second derivative disagrees: {task.doubt}")
        elif task.asked == "compiled":
            self._use_compiled("asked for")
        else:
            self._use_kept_graph("the default")
            self.expect(num_products)

    def _fitting(self, compute: Callable[[], _Computed]) -> _Computed:
        """What is computed by this process; all know it if it fits on one of them not."""
        return self._ranks.fitting(compute) if self._apart else compute()

    def _no_second_derivative(self) -> str:
        """Measure a chunk's product; why there is none, in words."""
        task = self._task
        try:
            largest = max(task.work.batches, key=num_rows, default=None)
            self._chunk = Footprint(0, 0)
            if largest is not None:  # a process may have no sample of a subset
                self._chunk = task.footprint(task.work.linearise, largest)
        except (RuntimeError, NotImplementedError) as error:
            if task.asked != "auto" or isinstance(error, torch.OutOfMemoryError):
                raise
            return _in_short(error)
        return ""

    def __call__(self, v: Tensor) -> Tensor:
        """M v, or M times every row of v."""
        (product,) = self._first_finite(lambda: [self._of_all(self._own(v))])
        return product

    def of_part(self, part: Tensor) -> Tensor:
        """This process's part of M v, from its part of v: one reduce-scatter.

        For vectors that are whole on every process otherwise.
        """
        v = self._task.vectors.whole(part)
        (product,) = self._first_finite(lambda: [self._part_of_all(self._own(v))])
        return product

    def _of_all(self, product: Tensor) -> Tensor:
        """The sum over ranks; differences are of gradients that are sums already."""
        exact = not isinstance(self._engine, Differences)
        return self._task.vectors.collected(product) if exact else product

    def _part_of_all(self, product: Tensor) -> Tensor:
        exact = not isinstance(self._engine, Differences)
        return (self._ranks.scattered if exact else self._task.vectors.part)(product)

    def of_blocks(self, blocks: Sequence[Block], vectors: Sequence[Tensor]) -> list[Tensor]:
        """M_bb v_b for each diagonal block; of whole products where nothing is kept."""
        return self._first_finite(
            lambda: [
                self._of_all(product)
                for product in self._fitting(
                    lambda: self._multiplied_blocks(blocks, vectors)
                )
            ]
        )

    def _first_finite(self, multiply: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Products; the first ones by differences where the second derivative is NaN."""
        products = multiply()
        if not self._tried:
            self._tried = True
            finite = not self._ranks.any(not _are_finite(products))
            if not finite and self._may_be_differences():
                self._use_differences("the second derivative is not finite")
                products = multiply()
        return products

    def _may_be_differences(self) -> bool:
        task, exact = self._task, not isinstance(self._engine, Differences)
        is_free = exact and task.asked == "auto" and task.matrix == "hessian"
        return is_free and _are_finite([task.gradient(task.theta)])

    def _own(self, v: Tensor) -> Tensor:
        return self._fitting(lambda: self._multiplied(v))

    def _multiplied(self, v: Tensor) -> Tensor:
        block = self.plan.directions_at_once
        if v.ndim == 1:
            return self._engine(v)
        if not len(v):
            return v.clone()
        if block == 1:
            return torch.stack([self._engine(row) for row in v])
        return torch.cat([self._engine(rows) for rows in v.split(block)])

    def with_errors(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """M times every row of (b, n), and the norm of each product's error, (b,).

        None where the engine is exact, so that nothing was measured.
        """
        engine = self._engine
        return engine.with_error(rows) if isinstance(engine, Differences) else None

    def _multiplied_blocks(
        self, blocks: Sequence[Block], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        if isinstance(self._engine, KeptGraph):
            return self._engine.of_blocks(blocks, vectors)
        zeros, places = (
            torch.zeros_like(self._task.theta),
            map(self._task.work.places, blocks),
        )
        return [
            self._engine(zeros.index_copy(0, at, v))[at]
            for at, v in zip(places, vectors, strict=True)
        ]

    def expect(self, num_products: int) -> None:
        """Compile, if so many more products repay it."""
        task = self._task
        again = task.blocks_again()  # which no trace can hold
        if not self._may_compile or again or not isinstance(self._engine, KeptGraph):
            return
        held, leaves = self._chunk.held * len(task.work.batches), task.work.leaves
        device, seldom = task.theta.device.type, task.compiling_seldom_pays
        if worth_compiling(num_products, held, len(leaves), device, seldom):
            self._use_compiled(f"repaid by {num_products} products")

    def _use_kept_graph(self, reason: str) -> None:
        task = self._task
        most = max(1, task.budget // (self._chunk.held + task.theta.nbytes))
        kept = min(len(task.work.batches), most)
        self._engine = KeptGraph(task.work, kept)
        at_once = directions_at_once(self._rows, task.theta.numel(), task.theta.device.type)
        if at_once > 1 and (self._ranks.size > 1 or not self._takes_blocks()):
            at_once = 1  # and the same on all ranks
        self.plan = self._plan("kept_graph", reason, self._chunk, kept, at_once)

    def _use_compiled(self, reason: str) -> None:
        try:
            engine = CompiledProduct(self._task.work, self._task.budget)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # tracers and compilers fail in many ways
            self._use_kept_graph(f"compiling stepped aside: {_in_short(error)}")
            self._may_compile = False  # not tried again
            return
        self._engine = engine
        passing = self._chunk.peak - self._chunk.held
        chunk = Footprint(engine.held_bytes, engine.held_bytes + passing)
        self.plan = self._plan("compiled", reason, chunk, engine.num_kept, 1)

    def _use_differences(self, reason: str) -> None:
        task = self._task
        ensure(
            task.matrix == "hessian",
            "matrix",
            "be 'hessian' where products are differences of gradients",
            f"{task.matrix!r} ({reason})",
        )
        self._apart = False  # its gradients are sums over the processes
        self._engine = engine = Differences(task.gradient, task.theta, task.shared)
        plan = self._plan("differences", reason, Footprint(0, 0), 0, 1)
        self.plan = replace(plan, relative_error=engine.relative_error)

    def _takes_blocks(self) -> bool:
        """Whether every operation has a rule for several directions at once."""
        zeros = torch.zeros(2, self._task.theta.numel()).to(self._task.theta)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                self._engine(zeros)
            except (RuntimeError, UserWarning):
                return False
        return True

    def _plan(
        self, engine: str, reason: str, chunk: Footprint, kept: int, at_once: int
    ) -> Plan:
        """The choice, and the peak: what is held, and one chunk being worked on."""
        task = self._task
        chunks = len(task.work.batches)
        held = (kept + (kept < chunks)) * chunk.held
        passing = max(0, chunk.peak - chunk.held) * at_once
        vectors = 2 * task.theta.nbytes * at_once  # the direction and the sum
        return Plan(
            matrix=task.matrix,
            engine=engine,
            reason=reason,
            chunk_size=task.chunk_size,
            num_chunks=chunks,
            num_kept=kept,
            directions_at_once=at_once,
            predicted_bytes=held + passing + vectors,
            blocks_again=task.blocks_again(),
        )


def rounding(products: Tensor, vectors: Vectors) -> Tensor:
    """What rounding may have changed in each row (b, n), in norm, (b,).

    In float32 products of perceptrons and convolutions were 2 to 7 eps off.
    """
    # Squares of what is below 1e-22 are zeros in float32.
    norms = products.norm(dim=-1).to(_tensors.widest(products))
    norms = vectors.total(norms.square()).sqrt().to(products)
    return 8 * torch.finfo(products.dtype).eps * norms


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _in_short(error: Exception) -> str:
    kind = "" if isinstance(error, UnsuitableError) else f"{type(error).__name__}: "
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (kind + " ".join(lines[:2])).strip()[:200]
