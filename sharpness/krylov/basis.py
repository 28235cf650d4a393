"""Orthonormal vectors in blocks: grown without copies, combined in place.

They may be held in a narrower type than they are worked with. What is combined with them
is widened a strip at a time, which stays in the processor's cache: memory is read once, in
the narrow type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpness import _tensors
from sharpness._ranks import Vectors

_ROWS = 16  # of a block, or fewer where it would take more than that many bytes
_BLOCK_BYTES = 1 << 29
# Combined at once, or 1/256 of all: the scratch memory is less than a row.
_COLUMNS = 1 << 12
_STRIP = 1 << 16  # entries of a row that are worked with at once, at least
_IN_CACHE = 1 << 20  # of all rows together (a share of a processor's last cache: 4 MB)


class Basis:
    """Rows q_1, q_2, ... of length n, in the type and on the device of `like`.

    Where several processes share them, each holds its own part of every row. `dtype` is
    what they are held in, by default that type. A row has to be `rounded` before it is put
    in, so that what is in the basis is what was multiplied.

    Memory comes in blocks of a few rows when it is needed, `most` in all. The first block
    holds `num_first` rows: what is combined there at the end outlives the others.
    """

    def __init__(
        self,
        like: Tensor,
        num_first: int,
        most: int,
        vectors: Vectors | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._like, self._num_first, self._most = like.new_empty(0), num_first, most
        self.dtype = dtype or like.dtype
        self._held = like.numel()  # entries of a row that are here
        self._vectors = vectors or Vectors(self._held)
        self.n = self._vectors.n
        self._blocks: list[Tensor] = []

    def __setitem__(self, i: int, row: Tensor) -> None:
        self._make_room(i)
        self._row(i).copy_(row)

    def _make_room(self, i: int) -> None:
        while i >= (held := sum(map(len, self._blocks))):
            few = max(1, _BLOCK_BYTES // max(1, self._held * self.dtype.itemsize))
            wanted = min(_ROWS, few) if held else self._num_first
            size = min(wanted, self._most - held)
            block = self._like.new_empty((size, self._held), dtype=self.dtype)
            self._blocks.append(block)

    def __getitem__(self, i: int) -> Tensor:
        return self._row(i).to(self._like.dtype)

    @property
    def is_narrow(self) -> bool:
        """Whether rows are held in a narrower type than they are worked with."""
        return self.dtype != self._like.dtype

    def rounded(self, w: Tensor) -> float:
        """Round w to what a row can hold, in place; how far it moved, in norm."""
        if not self.is_narrow:
            return 0.0
        moved = w.new_zeros((), dtype=_tensors.widest(w))
        held, off = (w.new_empty(min(_STRIP, len(w)), dtype=t) for t in (self.dtype, None))
        for part in w.split(_STRIP):
            narrow, error = held[: len(part)].copy_(part), off[: len(part)]
            torch.sub(part, narrow, out=error)
            moved += torch.dot(error, error)
            part.copy_(narrow)
        return float(self._vectors.total(moved).sqrt())

    def put(self, i: int, row: Tensor, beside: Tensor) -> float:
        """Row i becomes `row`; its inner product with another vector, by strips."""
        self._make_room(i)
        found = row.new_zeros((), dtype=_tensors.widest(row))
        vectors = self._row(i), row, beside
        size = _STRIP if self._like.device.type == "cpu" else max(1, self._held)
        for held, part, other in zip(*(v.split(size) for v in vectors), strict=True):
            held.copy_(part)
            found += torch.dot(part, other)
        return float(self._vectors.total(found))

    def overlaps(self, w: Tensor, m: int) -> Tensor:
        """Inner products of the first m rows with w, (m,), float64."""
        return self.subtract_last(w, m, w.new_empty(0))[0]

    def subtract_last(self, w: Tensor, m: int, known: Tensor) -> tuple[Tensor, float]:
        """Take sum_i known_i q_i over the last of m rows away from w, in place.

        Returns:
            what is left on each of the m rows, (m,) float64, and its norm: all of it in
            one reading of rows and vector.
        """
        sums, found = w.new_empty(m), w.new_zeros(m + 1, dtype=_tensors.widest(w))
        known = known.to(w.dtype)
        for rows, part in self._strips(m, w):
            self._take_away(part, rows, known[-1:], m - 1)  # the largest, as a rule
            self._take_away(part, rows, known[:-1], m - len(known))
            for block, places in zip(rows, self._spans(rows), strict=True):
                torch.mv(block, part, out=sums[places])
            found[:m] += sums
            found[m] += torch.dot(part, part)
        found = self._vectors.total(found)
        return found[:m], self._root(float(found[m]), w)

    def subtract(self, w: Tensor, coefficients: Tensor) -> float:
        """Take sum_i coefficients_i q_i away from w, in place; the norm that is left."""
        coefficients = coefficients.to(w.dtype)
        left = w.new_zeros((), dtype=_tensors.widest(w))
        for rows, part in self._strips(len(coefficients), w):
            self._take_away(part, rows, coefficients, 0)
            left += torch.dot(part, part)
        return self._root(float(self._vectors.total(left)), w)

    def _root(self, square: float, w: Tensor) -> float:
        """The norm of w from its square; summed anew where its type does not hold that."""
        limits = torch.finfo(w.dtype)
        if self.n * limits.tiny / limits.eps < square < math.inf:
            return math.sqrt(square)
        return self._vectors.norm(w)

    def _take_away(
        self, part: Tensor, rows: Sequence[Tensor], coefficients: Tensor, first: int
    ) -> None:
        """Of a strip: multiples of rows, from `first` on."""
        for block, places in zip(rows, self._spans(rows), strict=True):
            start = max(places.start, first)
            mine = coefficients[start - first : max(0, places.stop - first)]
            if len(mine):
                row = start - places.start
                part.addmv_(block[row : row + len(mine)].T, mine, alpha=-1)

    def _spans(self, rows: Sequence[Tensor]) -> list[slice]:
        ends = list(accumulate(map(len, rows)))
        return [slice(end - len(block), end) for end, block in zip(ends, rows, strict=True)]

    def _strips(self, m: int, *vectors: Tensor) -> Iterator[tuple[Any, ...]]:
        """The first m rows, in blocks and in the type of `like`, and vectors beside them.

        So many entries at once as the processor's cache holds of all rows: what is widened
        there is not written to memory.
        """
        blocks = self._upto(m)
        if self._like.device.type == "cpu":
            size = max(_STRIP, _IN_CACHE // max(1, m))
        else:
            size = _IN_CACHE if self.is_narrow else max(1, self._held)
        parts = [block.split(size, dim=1) for block in blocks]
        wide = [self._like.new_empty((len(b), min(size, self._held))) for b in blocks]
        for i, beside in enumerate(zip(*(v.split(size) for v in vectors), strict=True)):
            rows = [part[i] for part in parts]
            if self.is_narrow:
                width = len(beside[0])
                rows = [w[:, :width].copy_(r) for w, r in zip(wide, rows, strict=True)]
            yield rows, *beside

    def combine(self, coefficients: np.ndarray) -> np.ndarray:
        """The first rows become `coefficients` (l, m) times the first m rows; l <= m.

        A strip of columns at a time, so that it takes no second basis.

        Returns:
            (l,) how far each was moved by rounding it to the rows' type, in norm.
        """
        rows = len(coefficients)
        lost = self._like.new_zeros(rows, dtype=_tensors.widest(self._like))
        for strip, mixed in self._mixed(coefficients):
            for block, part in zip(self._upto(rows), self._parts(mixed), strict=True):
                block[:, strip] = part
            if self.is_narrow:
                held = torch.cat([block[:, strip] for block in self._upto(rows)])
                lost += mixed.sub_(held).square_().sum(1)
        lost = self._vectors.total(lost) if self.is_narrow else lost
        return np.asarray(lost.sqrt().cpu().numpy())

    def combined(self, coefficients: np.ndarray) -> Tensor:
        """`coefficients` (l, m) times the first m rows, (l, n), in the type of `like`."""
        found = self._like.new_empty((len(coefficients), self._held))
        for strip, mixed in self._mixed(coefficients):
            found[:, strip] = mixed
        return found

    def clear(self) -> None:
        """Give the memory of all rows back."""
        self._blocks.clear()

    def rows(self, m: int) -> Tensor:
        """The first m rows, (m, n): a view where one block holds them, else a copy."""
        return self.held(m).to(self._like.dtype)

    def held(self, m: int) -> Tensor:
        """The same in the type that they are held in."""
        if not m:
            return self._like.new_empty((0, self._held), dtype=self.dtype)
        blocks = self._upto(m)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _mixed(self, coefficients: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """Places, and what combinations of the rows are there."""
        blocks = self._upto(coefficients.shape[1])
        new = torch.from_numpy(np.ascontiguousarray(coefficients)).to(self._like)
        width = max(_COLUMNS, self._held >> 8)
        for start in range(0, self._held, width):
            strip = slice(start, start + width)
            yield (
                strip,
                new @ torch.cat([block[:, strip] for block in blocks]).to(new.dtype),
            )

    def _row(self, i: int) -> Tensor:
        for block in self._blocks:
            if i < len(block):
                return block[i]
            i -= len(block)
        raise IndexError(i)

    def _upto(self, m: int) -> list[Tensor]:
        """The blocks cut to the first m rows."""
        found = []
        for block in self._blocks:
            if m > 0:
                found.append(block[:m])
            m -= len(block)
        return found

    def _parts(self, mixed: Tensor) -> list[Tensor]:
        return list(mixed.split([len(block) for block in self._upto(len(mixed))]))
