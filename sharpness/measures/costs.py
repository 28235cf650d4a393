r"""What eigenpairs cost before they are looked for: seconds, bytes, and traffic of ranks.

From one measured product, a few Lanczos steps on vectors of at most a million entries, and
shapes. With n parameters on W ranks and a basis of m rows of b bytes an entry,

    seconds   s + products t + sum over steps m of (a + c m) n / W
    bytes     the plan's peak, or what two products have taken + (rows b + 4) n / W
    traffic   2 (W - 1) / W 4 n a product, sent and received by each rank: the direction is
              gathered, and products are added up in parts

with t, a, c and s, what is paid before the first product, measured. Rows of a basis on a
CPU take memory when they are written, on a GPU by blocks. How many products there will be
nobody knows beforehand: `usual_products` is what trained networks took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpness import _tensors
from sharpness._arguments import whole
from sharpness.krylov.lanczos import Lanczos
from sharpness.risk import memory
from sharpness.risk.curvature import Matrix
from sharpness.risk.empirical import EmpiricalRisk

_MOST_ENTRIES = 1 << 20  # of the vectors that Lanczos' own steps are timed on
_STEPS = 12
_BLOCK = 16  # rows that a basis takes at once
_ADDED_UP = 4  # bytes of an entry of products between ranks


def usual_products(k: int) -> int:
    """How many products k eigenpairs of trained networks took, as a rule: 10 + 4 k."""
    return 10 + 4 * k


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a search takes on each rank, if it ends after so many products."""

    products: int
    setup_seconds: float  # before the first product: checks, plan, graphs
    product_seconds: float  # of one
    lanczos_seconds: float  # of all steps, beside the products
    basis_bytes: int
    peak_bytes: int  # beside what is held now: model, theta and data
    sent_bytes: int  # by each rank, and as many received
    free_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole search."""
        own = self.setup_seconds + self.lanczos_seconds
        return own + self.products * self.product_seconds

    @property
    def fits(self) -> bool:
        """Whether the peak is below what is free."""
        return self.peak_bytes <= self.free_bytes

    def lines(self) -> list[str]:
        """The same in words."""
        free = self.free_bytes / 1e9
        verdict = "fits" if self.fits else "does not fit"
        text = [
            f"a product: {self.product_seconds:.3g} s; before the first "
            f"{self.setup_seconds:.2g} s",
            f"{self.products} products (assumed): {self.seconds:.3g} s, of which "
            f"{self.lanczos_seconds:.2g} s between them",
            f"memory: {self.peak_bytes / 1e9:.3g} GB more than is held now, of which "
            f"{self.basis_bytes / 1e9:.3g} GB for the basis; {verdict} in {free:.3g} GB",
        ]
        if self.sent_bytes:
            text.append(f"traffic: {self.sent_bytes / 1e9:.3g} GB sent by each rank")
        return text


def predicted_costs(
    risk: EmpiricalRisk,
    k: int = 1,
    *,
    products: int | None = None,
    basis_dtype: torch.dtype | None = None,
    matrix: Matrix = "hessian",
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """What `eigenpairs` will take.

    Args:
        risk: as there; its ranks share the basis.
        k: eigenpairs, >= 1.
        products: how many there will be; None: `usual_products(k)`.
        basis_dtype: as there.
        matrix: as there.
        clock: seconds; `time.process_time` on a machine that others use, too.

    Raises:
        ValueError: `k` or `products` is no whole number >= 1.

    Cost: two products with what the first one needs, and a dozen Lanczos steps on at most
    a million entries.
    """
    k = whole("k", k, 1)
    num = whole("products", products or usual_products(k), 1)
    v = risk.shared.normal(risk.theta, _tensors.seeded(0))
    held, highest = (
        seen(risk.device) for seen in (memory.resident_bytes, memory.most_resident_bytes)
    )
    began = clock()
    plan = risk.prepare(num, matrix)
    risk.product(v, matrix)  # builds what the others reuse
    set_up, began = clock() - began, clock()
    risk.product(v, matrix)
    seconds = clock() - began
    grown = memory.resident_bytes(risk.device) - held
    most = memory.most_resident_bytes(risk.device)
    of_setup = most - held if most > highest else 0  # checks, in float64, may be the peak
    dtype = basis_dtype or risk.dtype
    ranks = risk.ranks.size
    here = -(-risk.n // ranks)
    rows = num if risk.device.type == "cpu" else basis_rows(k, num)
    first, each = _step_seconds(min(here, _MOST_ENTRIES), risk.theta, dtype, clock)
    own = sum(first + each * m for m in range(1, num + 1)) * here
    basis = rows * here * dtype.itemsize
    return Costs(
        products=num,
        setup_seconds=max(0.0, set_up - seconds),
        product_seconds=seconds,
        lanczos_seconds=own,
        basis_bytes=basis,
        peak_bytes=max(
            of_setup,
            basis + max(plan.predicted_bytes, grown) + here * risk.theta.element_size(),
        ),
        sent_bytes=num * traffic(risk.n, ranks),
        free_bytes=memory.free_bytes(risk.device),
    )


def traffic(n: int, ranks: int) -> int:
    """Bytes that each rank sends for one product, n entries in all, vectors in parts.

    A ring's all-gather of the direction and its reduce-scatter of the products:
    n (W - 1) / W entries of 4 bytes each.
    """
    return 2 * _ADDED_UP * n * (ranks - 1) // ranks


def basis_rows(k: int, steps: int) -> int:
    """Rows that a basis holds after so many steps: k at first, then blocks of 16."""
    return k if steps <= k else k + -(-(steps - k) // _BLOCK) * _BLOCK


def _step_seconds(
    n: int, like: Tensor, dtype: torch.dtype, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of a Lanczos step for each entry: without a basis, and more for each row."""
    generator = _tensors.seeded(0)
    values = torch.rand(n, generator=generator).to(like)
    run = Lanczos(values.clone(), generator, dtype=dtype)
    rows, seconds = [], []
    for _ in range(min(_STEPS, n)):
        product = values * run.direction()
        began = clock()
        run.absorb(product, owned=True)
        seconds.append(clock() - began)
        rows.append(run.state.m)
    if len(rows) < 2:
        return seconds[0] / n, 0.0
    each, first = (
        np.polyfit(rows[1:], seconds[1:], 1) if len(rows) > 2 else (0.0, seconds[1])
    )
    return max(0.0, float(first)) / n, max(0.0, float(each)) / n


# -- from shapes alone -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """The shapes of a decoder: gated layers, heads that share keys, no biases."""

    layers: int
    width: int
    inner: int  # of the gated layer
    vocabulary: int
    heads: int
    key_heads: int
    tied: bool = False

    @property
    def n(self) -> int:
        """Parameters; norms, which are width each, included."""
        keys = 2 * self.width * self.width * self.key_heads // self.heads
        layer = 2 * self.width**2 + keys + 3 * self.width * self.inner + 2 * self.width
        ends = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * layer + ends + self.width

    def product_flops(self, tokens: int, length: int, *, kept: bool) -> float:
        """Floating-point operations of one exact product.

        A matrix product of the forward pass is three in the gradient and six in the pass
        back through it (nine where the graph is not kept); the head, in blocks, ten.

        Args:
            tokens: in all.
            length: of a sequence, for the attention's own products.
            kept: whether the gradient's graph is held between products.
        """
        head = self.vocabulary * self.width
        inner = self.n - head * (1 if self.tied else 2)
        attention = (
            2 * self.layers * self.width * length
        )  # scores and their use, causal: half
        passes = 6 if kept else 9
        return 2.0 * tokens * (passes * (inner + attention / 2) + 10 * head)

    def rank_bytes(
        self, ranks: int, rows: int, *, basis_bytes: int = 2
    ) -> dict[str, float]:
        """Bytes on each of W ranks that share all vectors, beside the graph of a chunk.

        Args:
            ranks: W.
            rows: of the basis.
            basis_bytes: an entry of it; 2 for bfloat16.
        """
        share = self.n / ranks
        return {
            "parameters, gradient, direction, product": 4 * 4 * share,
            "basis": rows * basis_bytes * share,
        }

    def seconds(
        self, tokens: int, length: int, *, ranks: int, flops: float, kept: bool = False
    ) -> float:
        """Of a product, on W ranks that reach so many operations a second each."""
        return self.product_flops(tokens, length, kept=kept) / (ranks * flops)


LLAMA_7B = Transformer(
    layers=32, width=4096, inner=11008, vocabulary=32000, heads=32, key_heads=32
)
LLAMA_70B = Transformer(
    layers=80, width=8192, inner=28672, vocabulary=32000, heads=64, key_heads=8
)
