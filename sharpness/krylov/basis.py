"""Orthonormal vectors in blocks: grown without copies, combined in place.

They may be held in a narrower type than they are worked with. What is combined with them
is widened a strip at a time, which stays in the processor's cache: memory is read once, in
the narrow type.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sharpness._ranks import Vectors

_ROWS = 16  # of a block
# Combined at once, or 1/256 of all: the scratch memory is less than a row.
_COLUMNS = 1 << 12
_STRIP = 1 << 15  # entries of a row that are widened at once


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
        while i >= (held := sum(map(len, self._blocks))):
            size = min(_ROWS if held else self._num_first, self._most - held)
            block = self._like.new_empty((size, self._held), dtype=self.dtype)
            self._blocks.append(block)
        self._row(i).copy_(row)

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
        moved = w.new_zeros((), dtype=torch.float64)
        for part in w.split(_STRIP):
            held = part.to(self.dtype).to(part.dtype)
            moved += part.sub_(held).square_().sum()
            part.copy_(held)
        return float(self._vectors.total(moved).sqrt())

    def overlaps(self, w: Tensor, m: int) -> Tensor:
        """Inner products of the first m rows with w, (m,); float64 of narrow rows."""
        blocks = self._upto(m)
        if not self.is_narrow:
            return self._vectors.total(torch.cat([block @ w for block in blocks]))
        total = w.new_zeros(m, dtype=torch.float64)
        for at in self._strips():
            total += torch.cat([block[:, at].to(w.dtype) @ w[at] for block in blocks])
        return self._vectors.total(total)

    def subtract_row(self, w: Tensor, i: int, coefficient: float) -> None:
        """Take a multiple of row i away from w, in place."""
        for at in self._strips() if self.is_narrow else [slice(None)]:
            w[at].sub_(self._row(i)[at].to(w.dtype), alpha=coefficient)

    def subtract(self, w: Tensor, coefficients: Tensor) -> None:
        """Take sum_i coefficients_i q_i away from w, in place."""
        m = len(coefficients)
        parts = coefficients.split([len(block) for block in self._upto(m)])
        for at in self._strips() if self.is_narrow else [slice(None)]:
            for block, part in zip(self._upto(m), parts, strict=True):
                w[at].addmv_(block[:, at].to(w.dtype).T, part.to(w.dtype), alpha=-1)

    def combine(self, coefficients: np.ndarray) -> np.ndarray:
        """The first rows become `coefficients` (l, m) times the first m rows; l <= m.

        A strip of columns at a time, so that it takes no second basis.

        Returns:
            (l,) how far each was moved by rounding it to the rows' type, in norm.
        """
        rows = len(coefficients)
        lost = self._like.new_zeros(rows, dtype=torch.float64)
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

    def _strips(self) -> Iterator[slice]:
        return (slice(start, start + _STRIP) for start in range(0, self._held, _STRIP))

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
