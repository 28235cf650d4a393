"""Which layers are curved? Eigenpairs of the diagonal blocks of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from sharpness import _tensors
from sharpness._arguments import ensure, of_a_risk, whole
from sharpness._results import Cost, NonFiniteProductError, Reading, Result, Status, bars
from sharpness._run import Run
from sharpness.krylov.eigenpair_search import Search
from sharpness.krylov.lanczos import Which
from sharpness.measures.eigenvalues import HessianEigenpairs, check_search, nothing
from sharpness.risk.curvature import Matrix
from sharpness.risk.empirical import EmpiricalRisk

Blocks = Callable[[str], str | None] | Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class BlockEigenpairs(HessianEigenpairs):
    """Extreme eigenpairs of one diagonal block; k of them, or as many as it has."""

    name: str
    parameters: tuple[str, ...]
    n: int

    def _rows(self) -> Iterable[Reading]:
        """Every eigenvalue: `lambda_max layer`, `lambda_2 layer`, ..."""
        return (replace(r, name=f"{r.name} {self.name}") for r in super()._rows())


@dataclass(frozen=True, kw_only=True)
class LayerwiseEigenpairs(Result):
    """Eigenpairs of every diagonal block; `result["layer"]` gives one of them."""

    blocks: tuple[BlockEigenpairs, ...]
    num_sweeps: int  # over the data; a block's product is at most a whole one

    def __getitem__(self, name: str) -> BlockEigenpairs:
        return {block.name: block for block in self.blocks}[name]

    def readings(self) -> list[Reading]:
        """Every eigenvalue of every block."""
        return [reading for block in self.blocks for reading in block.readings()]

    def _figure(self, path: Any, ax: Any) -> Any:
        """A bar for each block's leading eigenvalue, with its bound."""
        some = (block for block in self.blocks if len(block.eigenvalues))
        shown = [replace(block.readings()[0], name=block.name) for block in some]
        label = "leading eigenvalue of the block, loss / parameter²"
        return bars(shown, label, path, ax=ax)


@of_a_risk
def layerwise_eigenpairs(
    risk: EmpiricalRisk,
    blocks: Blocks | None = None,
    *,
    k: int = 1,
    which: Which = "LA",
    matrix: Matrix = "hessian",
    tol: float = 1e-2,
    confidence: float | None = 0.95,
    seed: int = 0,
    max_sweeps: int | None = None,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> LayerwiseEigenpairs:
    r"""Extreme eigenpairs of the diagonal blocks $\partial^2 f / \partial \theta_b^2$.

    All blocks advance by one Lanczos step in each sweep over the data; a block that has
    converged drops out. No block is larger than the whole: its largest eigenvalue is at
    most that of the Hessian.

    Args:
        risk: the mean loss f, held at the parameters theta.
        blocks: None for one block a layer (the parameters of a module); globs of
            parameter names, one block each; a function from a parameter's name to its
            block's (None leaves it out); or a dict from a block's name to its
            parameters'.
        k: eigenpairs of each block (all, where it has fewer).
        which: as in `eigenpairs`.
        matrix: as in `eigenpairs`, but for the gradient covariance.
        tol: error bound wanted, relative to each value; > 0.
        confidence: as in `eigenpairs`, for all blocks at once.
        seed: of the random start vectors.
        max_sweeps: most sweeps; by default 100 + 10 k.
        max_seconds: stop after the sweep that passes this time.
        progress: show a bar; by default on a terminal.

    Returns:
        `LayerwiseEigenpairs`; also after an interrupt (Ctrl-C), with what was earned.

    Raises:
        ValueError: no parameter in a block, an unknown `which`, `k` < 1, `tol` <= 0,
            `confidence` outside (0, 1).

    Cost: 8 to 35 sweeps; in each, a block costs the part of a Hessian-vector product
    that lies behind it. Memory (sweeps) n in all.
    """
    k = whole("k", k, 1, "Ask for 1 or more.")
    check_search(which, tol, confidence, max_sweeps=max_sweeps)
    named = _named_blocks(risk.names, blocks)
    miss = None if confidence is None else (1 - confidence) / (k * len(named))
    generator = _tensors.seeded(seed)
    most = max_sweeps or 100 + 10 * k
    sizes = dict(zip(risk.names, (shape.numel() for shape in risk.shapes), strict=True))
    searches = {}
    for name, parameters in named.items():
        n = sum(sizes[parameter] for parameter in parameters)
        searches[name] = Search(
            _tensors.random_normal(risk.theta.new_empty(n), generator),
            generator,
            k=min(k, n),
            which=which,
            tol=tol,
            miss=miss,
            basis_size=min(n, most),
        )
    status: dict[str, Status] = {}
    open_, inexact = list(named), 0.0
    run = Run(
        "sweeps",
        max_seconds=max_seconds,
        max_steps=most,
        min_steps=1,
        progress=progress,
        ranks=risk.ranks,
    )
    with run:
        while open_:
            run.step()
            products = risk.block_products(
                [named[name] for name in open_],
                [searches[name].direction() for name in open_],
                matrix,
            )
            for name, product in zip(list(open_), products, strict=True):
                ended = _absorbed(searches[name], product)
                if ended is not None:
                    status[name] = ended
                    open_.remove(name)
            # Of whole products; a positive matrix exceeds its largest block by no more.
            inexact = len(named) * (risk.prepare(1, matrix).relative_error or 0.0)
    status |= dict.fromkeys(open_, run.status)
    settings = {
        "k": k,
        "which": which,
        "matrix": matrix,
        "tol": tol,
        "confidence": confidence,
        "seed": seed,
    }
    results = tuple(
        _block(name, parameters, searches[name], status[name], inexact, settings)
        for name, parameters in named.items()
    )
    return LayerwiseEigenpairs(
        blocks=results,
        status=Status.worst(*(block.status for block in results)),
        num_sweeps=run.num_steps,
        cost=Cost(products=sum(b.cost.products for b in results), seconds=run.seconds),
        settings=settings,
    )


def _absorbed(search: Search, product: Tensor) -> Status | None:
    try:
        search.absorb(product)
    except NonFiniteProductError:
        return Status.NON_FINITE
    done = search.is_converged or search.is_whole
    return Status.CONVERGED if done else None


def _block(
    name: str,
    parameters: Sequence[str],
    search: Search,
    status: Status,
    product_error: float,
    settings: Mapping[str, Any],
) -> BlockEigenpairs:
    if search.num_products:
        found = search.found(product_error)
    else:
        found = nothing(search.direction(), settings["confidence"])
    return BlockEigenpairs(
        name=name,
        parameters=tuple(parameters),
        n=search.run.n,
        eigenvalues=torch.from_numpy(found.values),
        error_bounds=torch.from_numpy(found.bounds),
        residuals=torch.from_numpy(found.residuals),
        eigenvectors=found.vectors,
        noise_floor=search.noise,
        status=status,
        hidden=found.hidden,
        cost=Cost(products=search.num_products),
        settings=settings,
    )


def _named_blocks(names: Sequence[str], blocks: Blocks | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if isinstance(blocks, str):
        blocks = [blocks]
    if isinstance(blocks, Mapping):
        found = {block: list(parameters) for block, parameters in blocks.items()}
    elif blocks is None or callable(blocks):
        for name in names:
            block = blocks(name) if blocks else name.rpartition(".")[0] or name
            if block is not None:
                found.setdefault(block, []).append(name)
    else:
        found = {glob: [n for n in names if fnmatchcase(n, glob)] for glob in blocks}
    for block, parameters in found.items():
        unknown = [name for name in parameters if name not in names]
        ensure(
            bool(parameters) and not unknown,
            "blocks",
            "name parameters of theta",
            f"{block!r} with {unknown[0] if unknown else 'none'}",
            f"They are {', '.join(names[:4])}, …",
        )
    ensure(bool(found), "blocks", "give at least one block", "none")
    return found
