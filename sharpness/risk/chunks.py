"""The mean loss over fixed data, cut into chunks that fit the memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpness._arguments import ensure
from sharpness._ranks import ALONE, Ranks
from sharpness._results import ensure_available
from sharpness.risk import batch_dependence, batches, curvature, memory
from sharpness.risk.batch_dependence import FEW, Count
from sharpness.risk.curvature import Linearise
from sharpness.risk.fisher_terms import (
    FisherTerms,
    loss_of_sampled,
    num_draws,
    sampled_targets,
)
from sharpness.risk.footprints import Footprints
from sharpness.risk.kept_graph import ChunkedSum
from sharpness.risk.loss_terms import (
    LossTerms,
    asked_reduction,
    evaluated,
    known_terms,
    num_rows,
    refuse_broadcast,
    weighs_places,
)
from sharpness.risk.memory import Footprint
from sharpness.risk.model_state import batchnorm_layers, evaluation
from sharpness.risk.objective import Objective

_Computed = TypeVar("_Computed")


class NoLossTermsError(ValueError):
    """No target counts: there is no mean to take."""


@dataclass(frozen=True)
class Chunk:
    """A part of the data that is evaluated at once, and the loss terms it holds."""

    batch: Any
    count: float


class ChunkedMean:
    """f as a weighted sum of the means over chunks.

    Args:
        objective: what is evaluated on a batch.
        given: the batches, on the device.
        terms: as in `EmpiricalRisk`.
        batchnorm: as in `EmpiricalRisk`.
        batchnorm_batch: as in `EmpiricalRisk`.
        chunk_size: as in `EmpiricalRisk`.
        ranks: the processes, each with its own part of the data.
        in_lockstep: whether an evaluation waits for other processes, so that each has to
            make as many.
    """

    def __init__(
        self,
        objective: Objective,
        given: Sequence[Any],
        *,
        terms: Callable[[Any], float] | None,
        batchnorm: str,
        batchnorm_batch: int,
        chunk_size: int | str,
        ranks: Ranks = ALONE,
        in_lockstep: bool = False,
    ) -> None:
        self.ranks, self._in_lockstep = ranks, in_lockstep
        self._objective, self._batchnorm = objective, batchnorm
        self._closed = objective.closure is not None
        self.given, self.num_samples = given, int(sum(num_rows(batch) for batch in given))
        self.budget = memory.budget_bytes(objective.device)
        self._peak: int | None = None  # bytes of the largest whole batch, once known
        self._known: dict[Any, Footprint] = {}  # footprints of products, by shape
        self.chunk_size: int | None = None
        self._rejoined = ""  # how batches that were given became BatchNorm's
        self.whole = ""  # why f depends on how the data are batched, where it does
        if self._closed:
            self._set(self._of_closure(terms))
        elif batchnorm == "batch":
            self._set(self._of_batchnorm_parts(terms, batchnorm_batch))
        else:
            self._set(self._of_pairs(terms, chunk_size))

    num_terms: float  # on all processes
    num_samples_everywhere: int

    @property
    def reduction(self) -> str:
        """What the loss makes of its terms: "mean", "sum" or "none"."""
        return self._terms.reduction

    @property
    def notes(self) -> list[str]:
        """What a reader should know of how f is defined."""
        joined = [self._rejoined] if self._rejoined else []
        return [*self._of_a_sum(), *joined, *self._of_batches()]

    def _of_a_sum(self) -> Iterator[str]:
        asked = None if self._closed else asked_reduction(self._objective.loss)
        if (asked or self._terms.reduction) == "sum":
            what = "closure" if self._closed else "loss"
            yield f"the {what} adds up its terms: f is their mean, over {self.num_terms:g}"

    def _of_batches(self) -> list[str]:
        if not self.whole:
            return []
        how = f"{len(self.all)} {'batch' if len(self.all) == 1 else 'batches'} as given"
        if self._batchnorm == "batch" and not self._closed:
            how = f"{len(self.all)} parts for BatchNorm"
        return [f"f depends on how the data are batched: {how} ({self.whole})"]

    def first(self, most: int) -> Any:
        """A few rows of a pair, or all of a batch that has to be whole."""
        return self.given[0] if self.whole else batches.rows(self.given[0], 0, most)

    def subset(self, index: Tensor, chunk_size: int | None = None) -> ChunkedMean:
        """The mean over some samples, which may repeat, in chunks of the same size."""
        given, start = [], 0
        for pair in self.given:
            inside = (index >= start) & (index < start + len(pair[1]))
            given.append(batches.taken(pair, index[inside] - start))
            start += len(pair[1])
        given, size = batches.joined(given), chunk_size or self.chunk_size
        parts = [part for pair in given for part in batches.cut(pair, size or len(index))]
        return self._of_parts(parts, given=given, num_samples=len(index), chunk_size=size)

    def parts(self) -> list[ChunkedMean]:
        """The means over single chunks that hold a term."""
        parts = [chunk.batch for chunk in self.counted if chunk.count]
        return [self._of_parts([p], num_samples=int(num_rows(p))) for p in parts]

    def of(self, objective: Objective) -> ChunkedMean:
        """The mean of another function over the same data, in the same chunks."""
        other = copy.copy(self)
        other._objective, other._known = objective, {}
        return other

    def _of_parts(self, parts: Sequence[Any], **changes: Any) -> ChunkedMean:
        """The mean over other batches."""
        other = copy.copy(self)
        vars(other).update(changes)
        other._set(parts)
        return other

    def alone(self) -> ChunkedMean:
        """The mean over this process's part of the data."""
        return self._of_parts([chunk.batch for chunk in self.all], ranks=ALONE)

    def sample(self, rows: int) -> ChunkedMean:
        """Some rows, spread evenly, as one batch, also where that is another f.

        Of batches that cannot be cut the first ones that hold so many rows.
        """
        if self.ranks.size > 1:
            return self.alone().sample(rows)
        parts = [chunk.batch for chunk in self.counted]
        if not self._has_rows:
            num = 1 + sum(end < rows for end in accumulate(map(num_rows, parts)))
            return self._of_parts(parts[:num])
        rows = min(rows, self.num_samples)
        spread = torch.arange(rows, device=self._objective.device)
        try:
            return self.subset(spread * self.num_samples // rows, rows)
        except NoLossTermsError:  # of few rows, where most are masked
            return self._of_parts(parts[:1], chunk_size=rows)

    def fits_in_float64(self) -> bool:
        """Whether twice the memory is there: batches that are whole may be large."""
        if not self._has_rows and self._peak is None:
            largest = max((chunk.batch for chunk in self.counted), key=num_rows)
            self._peak = self._footprints.of(largest).peak
        return self._peak is None or 2 * self._peak <= self.budget

    @property
    def _has_rows(self) -> bool:
        """Whether some rows of the data are a batch: BatchNorm's parts are made of them."""
        return not self._closed and (not self.whole or self._batchnorm == "batch")

    def statistics_parts(self, most: int) -> list[Any]:
        """The data in near-equal parts of at most `most` rows, however they are cut."""
        if self._closed:
            return [chunk.batch for chunk in self.all]
        pairs = batches.joined(self.given)
        return [part for pair in pairs for part in batches.cut(pair, most)]

    def shares(self, leaves: Sequence[Tensor]) -> Iterator[Tensor]:
        """What each chunk adds to f, one at a time."""
        for chunk in self.counted:
            reduced = self._objective.reduced(leaves, chunk.batch)
            yield self.mean(reduced, chunk.batch) * self._weight(chunk)

    def shares_and_outputs(
        self, leaves: Sequence[Tensor]
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Each chunk with the model's outputs on it and what it adds to f."""
        for chunk in self.all:
            outputs = self._objective.outputs(leaves, chunk.batch)
            share = torch.zeros(())
            if self._counts(chunk):
                reduced = self._objective.loss_of(
                    leaves, chunk.batch, outputs, draws_on=True
                )
                share = self.mean(reduced, chunk.batch) * self._weight(chunk)
            yield chunk.batch, outputs, share

    def weight_of(self, batch: Any) -> float:
        """What the mean over a batch adds to f; 0 where no term of it counts."""
        chunk = Chunk(batch, float(self._terms.count(self._counted_in(batch))))
        return self._weight(chunk) if self._counts(chunk) else 0.0

    def mean(self, reduced: Tensor, batch: Any) -> Tensor:
        """The mean over one chunk, from what the loss returned."""
        return self._terms.mean(reduced, self._terms.size(self._counted_in(batch)))

    def _share(self, reduced: Tensor, batch: Any) -> Tensor:
        """What a chunk adds to f, from what the loss returned."""
        return self.mean(reduced, batch) * self.weight_of(batch)

    def work(self, matrix: str, seed: int) -> ChunkedSum:
        """One of the matrices, linearised at theta chunk by chunk."""
        linearise = self._linearise(matrix)
        leaves = self._objective.leaves(self._objective.theta)
        parts = [chunk.batch for chunk in self.counted]
        if matrix == "sampled_fisher":
            parts = self._with_sampled_targets(leaves, seed)
        weights = [self._weight(chunk) for chunk in self.counted]
        if self._in_lockstep:  # layers add up over processes what is weighed before
            weights = [1.0 for _ in weights]
        evaluating = partial(evaluation, self._objective.model, self._batchnorm)
        return ChunkedSum(linearise, leaves, parts, weights, evaluating)

    def footprint(self, linearise: Linearise, batch: Any) -> Footprint:
        """Memory of one chunk's product, predicted from a few of its samples.

        For a batch that is not to be cut its own graph is built and measured.
        """
        if self._closed or self.whole or self._in_lockstep:
            return self._footprints.measured(linearise, batch)
        return self._footprints.predicted(linearise, batch)

    def fitting(self, compute: Callable[[], _Computed]) -> _Computed:
        """What needs no other process, unless one of them runs out of memory over it.

        Layers that lie in parts wait for other processes: those cannot agree after it.
        """
        return compute() if self._in_lockstep else self.ranks.fitting(compute)

    def halve(self, trouble: str) -> None:
        """Chunks of half the size; the mean stays what it is.

        Raises:
            MemoryError: chunks cannot be cut: they are single samples, parts that define
                BatchNorm's statistics, a closure's batches, or as many on every process.
        """
        whole = (self.chunk_size or 1) == 1
        if self._in_lockstep or self.ranks.any(whole):
            by_parts = self._batchnorm == "batch" and not self._closed
            what = "batchnorm_batch" if by_parts else "data"
            most = max((int(num_rows(c.batch)) for c in self.all), default=0)
            raise MemoryError(
                f"`{what}` must come in parts that fit the memory; got up to {most} "
                f"samples evaluated at once ({trouble}). Pass smaller ones, or another "
                "`device`."
            )
        size = self.chunk_size = -(-(self.chunk_size or 1) // 2)
        self._cut([part for c in self.all for part in batches.cut(c.batch, size)])

    # -- building ----------------------------------------------------------------------

    def _set(self, parts: Sequence[Any]) -> None:
        self._cut(parts)
        own = [sum(chunk.count for chunk in self.all), float(self.num_samples)]
        totals = self.ranks.total(torch.tensor(own, dtype=torch.float64)).tolist()
        self.num_terms, self.num_samples_everywhere = totals[0], int(totals[1])
        got = "none that counts (every target equals `ignore_index`, or every weight is 0)"
        some = bool(self.num_terms)
        ensure(some, "data", "hold at least one loss term", got, kind=NoLossTermsError)

    def _cut(self, parts: Sequence[Any]) -> None:
        counts = [float(self._terms.count(self._counted_in(part))) for part in parts]
        self.all = [Chunk(part, n) for part, n in zip(parts, counts, strict=True)]
        self.counted = [chunk for chunk in self.all if self._counts(chunk)]

    def _counts(self, chunk: Chunk) -> bool:
        """A mean over no terms at all would be NaN, and a sum is one of zeros."""
        return bool(chunk.count) or self._terms.reduction != "mean"

    def _weight(self, chunk: Chunk) -> float:
        size = self._terms.size(self._counted_in(chunk.batch))
        return self._terms.weight(chunk.count, size, self.num_terms)

    def _counted_in(self, batch: Any) -> Any:
        """What terms are counted in: the targets, or all that a closure gets."""
        return batch if self._closed else batch[1]

    def _of_closure(self, terms: Count | None) -> Sequence[Any]:
        """Batches as they are, weighted by their samples."""
        with evaluation(self._objective.model, self._batchnorm), torch.enable_grad():
            found = batch_dependence.closure_terms(self._objective, self.given, terms)
        if found is None and len(self.given) > 1:
            self.whole = "the closure was not seen to be a mean over rows"
        reduction, dim = found or ("mean", 0)
        size = partial(batch_dependence.length, dim=dim)
        self._terms = LossTerms(reduction, terms or size, size)
        self.num_samples = sum(size(batch) for batch in self.given)
        return self.given

    def _of_batchnorm_parts(self, terms: Count | None, most: int) -> Sequence[Any]:
        """Near-equal parts, each with batch statistics of its own."""
        before = [len(pair[1]) for pair in self.given]
        self.given = batches.joined(self.given)
        parts = self._batchnorm_parts(self.given, most)
        kept = len(before) == 1 or before == [len(part[1]) for part in parts]
        if not kept and batchnorm_layers(self._objective.model):
            self._rejoined = (
                f"the {len(before)} batches given were joined and cut for BatchNorm, into "
                f"{len(parts)} of up to {max(len(part[1]) for part in parts)} samples "
                f"(`batchnorm_batch`)"
            )
        known = None if terms is not None else known_terms(self._objective.loss)
        self._terms = known or LossTerms("mean", terms or num_rows, num_rows)
        with evaluation(self._objective.model, "batch"), torch.no_grad():
            self._objective.widen_loss(batches.rows(parts[0], 0, FEW))
            self._footprints.require_room(
                parts, "batchnorm_batch", int(self.budget / memory.SHARE)
            )
            if known is None:
                seen = batch_dependence.seen_whole(self._objective, parts)
                self._see_reduction(seen, parts[0])
        return parts

    def _of_pairs(self, terms: Count | None, chunk_size: int | str) -> Sequence[Any]:
        """Chunks where f does not depend on them; else the batches that were given."""
        objective, given = self._objective, self.given
        known = None if terms is not None else known_terms(objective.loss)
        with evaluation(objective.model, self._batchnorm), torch.no_grad():
            most = batch_dependence.num_few(chunk_size, objective)
            few = batch_dependence.few_rows(given, most)
            self.whole = batch_dependence.why_whole(objective, few, given[0])
            self._objective.widen_loss(
                given[0] if self.whole == batch_dependence.UNCUT else few
            )
            count = terms or num_rows
            if self.whole == batch_dependence.COUPLED:
                dim = batch_dependence.sample_dim(objective, given[0][0])
                self.num_samples = sum(batch_dependence.length(b[0], dim) for b in given)
                count = terms or torch.numel  # the first dimension may be time
            self._terms = known or LossTerms("mean", count, num_rows)
            ensure(
                not self._in_lockstep or (known is not None and not self.whole),
                "loss",
                "be one of PyTorch's own, of rows that are apart, for a sharded model",
                self.whole or "another, whose terms have to be seen on the data",
            )
            if known is None:
                self._see_loss(few, batches.joined(given)[0], chunk_size)
            elif weighs_places(objective.loss, given[0][1]):
                self.whole = self.whole or "the loss weighs rows by their places"
        if self.whole:
            self.chunk_size = None
            self._footprints.require_room(
                given, "data", memory.free_bytes(objective.device)
            )
            return given
        self.given = batches.joined(given)
        if self._in_lockstep:
            return self._as_many_everywhere(chunk_size)
        if self.chunk_size is None:
            self.chunk_size = self._chosen(self.given[0], chunk_size)
        return [part for b in self.given for part in batches.cut(b, self.chunk_size)]

    def _as_many_everywhere(self, chunk_size: int | str) -> Sequence[Any]:
        """The same number of chunks on every process, each with a loss term."""
        pair, ranks = self.given[0], self.ranks
        size = chunk_size
        if isinstance(size, str):
            few = batches.rows(pair, 0, FEW)
            hessian = partial(curvature.hessian, self._objective, self.mean)
            each = self._footprints.measured(hessian, few).peak / len(few[1])
            size = max(1, int(self.budget / 4 / each))
        num = int(ranks.most(-(-len(pair[1]) // size)))
        parts = batches.cut_into(pair, min(num, len(pair[1])))
        empty = any(not self._terms.count(self._counted_in(part)) for part in parts)
        ensure(
            not ranks.any(len(self.given) > 1 or len(parts) < num or empty),
            "data",
            f"come in {num} chunks on every process, of rows of one shape, each with a "
            "term that counts, for a sharded model",
            "others",
            "Give each process about as many samples.",
        )
        self.chunk_size = max(len(part[1]) for part in parts)
        return parts

    def _see_loss(self, few: Any, first: Any, chunk_size: int | str) -> None:
        """Whether a loss that is not PyTorch's own is a mean or a sum over rows."""
        objective, given = self._objective, self.given
        if self.whole:
            self._footprints.require_room(
                given, "data", memory.free_bytes(objective.device)
            )
            self._see_reduction(batch_dependence.seen_whole(objective, given), given[0])
            return
        outputs = objective.outputs(objective.pieces(objective.theta), few)
        if batch_dependence.reductions(objective, outputs, few[1], self._terms.count):
            self.chunk_size = self._chosen(first, chunk_size)
            most = batch_dependence.most_rows(outputs, len(few[1]), self.budget)
            seen = batch_dependence.seen_in_chunks(objective, given, self.chunk_size, most)
            self._see_reduction(seen, few)
        else:
            self._set_reduction(None, few)

    def _see_reduction(self, seen: Iterator[batch_dependence.Seen], example: Any) -> None:
        reduction = batch_dependence.observed(self._objective, seen, self._terms.count)
        self._set_reduction(reduction, example)

    def _set_reduction(self, reduction: str | None, pair: Any) -> None:
        objective = self._objective
        if reduction is None:
            self.whole = self.whole or batch_dependence.LOSS_COUPLED
            leaves = objective.pieces(objective.theta)
            outputs = objective.outputs(leaves, pair)
            if two := batch_dependence.broadcast(objective, outputs, pair[1]):
                refuse_broadcast(*two)
            value = objective.loss_of(leaves, pair, outputs)
            values = "sum" if value.numel() > 1 else "mean"
            reduction = asked_reduction(objective.loss) or values
        self._terms = replace(self._terms, reduction=reduction)

    def _chosen(self, first: Any, asked: int | str) -> int:
        if not isinstance(asked, str):
            return asked
        return self._footprints.rows_at_once(first, self.budget)

    def forget_footprints(self) -> None:
        """The objective is evaluated in another way: what it takes is to be seen anew."""
        self._known.clear()
        self._peak = None

    @property
    def _footprints(self) -> Footprints:
        return Footprints(
            self._objective, self._batchnorm, self.mean, self.budget, self._known
        )

    def _batchnorm_parts(self, given: Sequence[Any], most: int) -> list[Any]:
        parts = [part for pair in given for part in batches.cut(pair, most)]
        smallest = min(len(part[1]) for part in parts)
        ensure(
            smallest >= 2 or not batchnorm_layers(self._objective.model),
            "batchnorm_batch",
            "leave at least two samples in each part",
            f"{most} (a part has {smallest} sample)",
            "Choose another.",
        )
        return parts

    # -- matrices ----------------------------------------------------------------------

    def _linearise(self, matrix: str) -> Linearise:
        objective = self._objective
        mean = self._share if self._in_lockstep else self.mean
        if matrix == "hessian":
            return partial(curvature.hessian, objective, mean)
        ensure_available(
            not self._closed,
            "matrix",
            "be 'hessian' for a risk with a `closure`",
            f"{matrix!r} (not available for a closure)",
            "Pass `loss=` and pairs.",
        )
        if matrix == "gauss_newton":
            return partial(curvature.gauss_newton, objective, mean)
        ensure_available(
            not self._in_lockstep,
            "matrix",
            "be 'hessian' or 'gauss_newton' for a sharded model",
            f"{matrix!r} (not available)",
        )
        ensure_available(
            self.whole != batch_dependence.LOSS_COUPLED,
            "loss",
            f"be a mean or a sum over rows for matrix={matrix!r}",
            "one that couples them (not available: a sample has no gradient of its own)",
        )
        ensure(
            self._batchnorm != "batch" or not batchnorm_layers(objective.model),
            "batchnorm",
            f"be 'running' for matrix={matrix!r}",
            "'batch' (a sample has no gradient of its own there)",
        )
        terms = FisherTerms(evaluated(objective.loss))
        if matrix == "sampled_fisher":
            terms = FisherTerms(loss_of_sampled(objective.loss), elementwise=True)
        return partial(curvature.fisher, objective, self.mean, terms)

    def _with_sampled_targets(self, leaves: Sequence[Tensor], seed: int) -> list[Any]:
        # Chunks without a counted term draw too: a seed means the same in any chunks.
        objective, parts = self._objective, [chunk.batch for chunk in self.all]
        own = sum(num_draws(objective.loss, part[1]) for part in parts)
        before = sum(self.ranks.objects(own)[: self.ranks.rank])
        with evaluation(objective.model, self._batchnorm), torch.no_grad():
            pairs = ((objective.outputs(leaves, part), part[1]) for part in parts)
            drawn = self.fitting(
                lambda: list(sampled_targets(objective.loss, pairs, seed, before))
            )
        sampled = zip(self.all, parts, drawn, strict=True)
        return [(part[0], y) for chunk, part, y in sampled if self._counts(chunk)]
