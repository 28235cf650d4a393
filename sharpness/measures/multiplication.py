"""Products for a stochastic measure: counted by its run, their own error kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sharpness._run import Run
from sharpness.risk.curvature import Matrix
from sharpness.risk.empirical import EmpiricalRisk


class Multiplication:
    """Rows of directions (b, n) -> rows of products, each a step of the run.

    What is made of products is no better than they are. Where they are off by at most
    `error` times the length of the direction, a quadratic form z^T M z is off by at most
    `error` ||z||^2 (Cauchy and Schwarz), the norm of M z by `error` ||z||.
    """

    def __init__(self, run: Run, risk: EmpiricalRisk, matrix: Matrix) -> None:
        self._run, self._risk, self._matrix = run, risk, matrix
        self._squares = self._lengths = 0.0  # of all errors, and of all directions

    def __call__(self, rows: Tensor) -> Tensor:
        """The products, as many at once as the plan has it."""
        block = self._risk.prepare(len(rows), self._matrix).directions_at_once
        return torch.cat([self._product(part) for part in rows.split(block)])

    def _product(self, rows: Tensor) -> Tensor:
        self._run.step(len(rows))
        products, errors = self._risk.product_and_error(rows, self._matrix)
        square = float(errors.double().square().sum())
        if math.isfinite(square):  # what is not finite stops the measure by itself
            self._squares += square
            squares = rows.double().square().sum()
            self._lengths += float(self._risk.shared.total(squares))
        return products

    @property
    def error(self) -> float:
        """Of the product with a unit vector, in norm; root mean square over those made.

        Each counts by its length. Rounding is as large as the product, and that of an
        eigenvector in a sketch says nothing of a random probe, which is n times as long.
        """
        return math.sqrt(self._squares / self._lengths) if self._lengths else 0.0

    def errors_together(self, num: int) -> float:
        """Of `num` products with orthonormal vectors, in the Frobenius norm."""
        return math.sqrt(num) * self.error
