"""Orthonormal vectors in blocks: grown without copies, combined in place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sharpness._ranks import Vectors

_ROWS = 16  # of a block
# Combined at once, or 1/256 of all: the scratch memory is less than a row.
_COLUMNS = 1 << 12


class Basis:
    """Rows q_1, q_2, ... of length n, in the type and on the device of `like`.

    Where several processes share them, each holds its own part of every row.

    Memory comes in blocks of a few rows when it is needed, `most` in all. The first block
    holds `num_first` rows: what is combined there at the end outlives the others.
    """

    def __init__(
        self, like: Tensor, num_first: int, most: int, vectors: Vectors | None = None
    ) -> None:
        self._like, self._num_first, self._most = like.new_empty(0), num_first, most
        self._held = like.numel()  # entries of a row that are here
        self._vectors = vectors or Vectors(self._held)
        self.n = self._vectors.n
        self._blocks: list[Tensor] = []

    def __setitem__(self, i: int, row: Tensor) -> None:
        while i >= (held := sum(map(len, self._blocks))):
            size = min(_ROWS if held else self._num_first, self._most - held)
            self._blocks.append(self._like.new_empty((size, self._held)))
        self._row(i).copy_(row)

    def __getitem__(self, i: int) -> Tensor:
        return self._row(i)

    def overlaps(self, w: Tensor, m: int) -> Tensor:
        """Inner products of the first m rows with w, (m,)."""
        return self._vectors.total(torch.cat([block @ w for block in self._upto(m)]))

    def subtract(self, w: Tensor, coefficients: Tensor) -> None:
        """Take sum_i coefficients_i q_i away from w, in place."""
        m = len(coefficients)
        parts = coefficients.split([len(block) for block in self._upto(m)])
        for block, part in zip(self._upto(m), parts, strict=True):
            w.addmv_(block.T, part, alpha=-1)

    def combine(self, coefficients: np.ndarray) -> None:
        """The first rows become `coefficients` (l, m) times the first m rows; l <= m.

        A strip of columns at a time, so that it takes no second basis.
        """
        rows, m = coefficients.shape
        blocks = self._upto(m)
        new = torch.from_numpy(np.ascontiguousarray(coefficients)).to(self._like)
        width = max(_COLUMNS, self._held >> 8)
        for start in range(0, self._held, width):
            strip = slice(start, start + width)
            mixed = new @ torch.cat([block[:, strip] for block in blocks])
            for block, part in zip(self._upto(rows), self._parts(mixed), strict=True):
                block[:, strip] = part
            del mixed, part

    def rows(self, m: int) -> Tensor:
        """The first m rows, (m, n): a view where one block holds them, else a copy."""
        if not m:
            return self._like.new_empty((0, self._held))
        blocks = self._upto(m)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

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
