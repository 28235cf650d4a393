"""What a plan of products says, and what each engine would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from sharpness._arguments import require

Engine = Literal["kept_graph", "compiled", "differences"]
ENGINES: tuple[str, ...] = get_args(Engine)

# Measured (docs/decisions.md) on two CPU cores, and on one H200, where of two networks the
# slower to compile and the one that gains less are taken: compiling takes about this long
# for each parameter tensor, and a product then saves about this long for each GB of graph.
_SECONDS_A_TENSOR = {"cpu": 1.0, "cuda": 0.8}
_SECONDS_SAVED_A_GB = {"cpu": 0.35, "cuda": 0.0027}
# Rows x parameters up to which a block of directions beats one after another: on a CPU
# measured, on a GPU a guess.
_BLOCK_WORK = {"cpu": 2e6, "cuda": 1e8}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the products of one matrix are carried out."""

    matrix: str
    engine: str
    reason: str
    chunk_size: int | None  # rows; None where batches are evaluated whole
    num_chunks: int
    num_kept: int  # chunks whose graph is held between products
    directions_at_once: int
    predicted_bytes: int  # peak: what is held, and one chunk being worked on
    blocks_again: int = 0  # of the model, computed again instead of keeping a graph
    relative_error: float | None = None  # of differences of gradients, estimated

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record; `EmpiricalRisk(engine=...)` takes them back."""
        return asdict(self)


def asked_engine(asked: str | Mapping[str, Any]) -> str:
    """The engine's name in what a person passed: a name, or an earlier plan.

    Raises:
        ValueError: neither.
    """
    name = asked.get("engine") if isinstance(asked, Mapping) else asked
    kinds = ", ".join(map(repr, ("auto", *ENGINES)))
    contract = f"be {kinds}, or the plan of an earlier risk"
    require(name in ("auto", *ENGINES), "engine", contract, asked)
    return str(name)


def worth_compiling(
    num_products: int, graph_bytes: int, num_tensors: int, device: str, seldom: bool
) -> bool:
    """Whether so many products repay the time that compiling takes.

    On the kinds of device where it was measured. `seldom` marks networks it seldom pays
    for: convolutions gained nothing on a CPU, loops over time steps give traces of
    thousands of nodes.
    """
    if device not in _SECONDS_A_TENSOR or seldom:
        return False
    saved = num_products * graph_bytes / 1e9 * _SECONDS_SAVED_A_GB[device]
    return saved > _SECONDS_A_TENSOR[device] * num_tensors


def directions_at_once(rows: int, n: int, device: str) -> int:
    """How many directions one backward pass takes, for small networks."""
    return 8 if rows * n <= _BLOCK_WORK.get(device, 0) else 1
