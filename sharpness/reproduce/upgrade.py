"""Observations recorded under schema 1, in the shape of schema 2."""

from __future__ import annotations

from typing import Any

_KINDS = {  # by a field that no other result has
    "error_bounds": "HessianEigenpairs",
    "phi_protocol": "EpsilonSharpness",
    "sam_value": "WorstCaseSharpness",
    "error": "TrackedValue",
    "accuracies": "Interpolation",
}
_COUNTS = {"num_hvps": "products", "num_evals": "gradients", "seconds": "seconds"}
_SETTINGS = {
    *("which", "tol", "confidence", "seed", "matrix", "preconditioned", "epsilon", "start"),
    *("subspace_dim", "columns", "max_iter", "num_starts", "rho", "norm", "adaptive"),
    "num_steps",
}


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """The record with cost and settings of each result together, its numbers unchanged."""
    if record["schema"] != 1:
        return record
    return {**record, "schema": 2, "found": _upgraded(record["found"])}


def _upgraded(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_upgraded(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    kind = next((kind for field, kind in _KINDS.items() if field in plain), None)
    if kind is None:
        return {name: _upgraded(item) for name, item in plain.items()}
    moved = {*_COUNTS, *_SETTINGS, "status"}
    return {
        "type": kind,
        "status": plain.get("status", "completed"),
        "cost": {new: plain[old] for old, new in _COUNTS.items() if old in plain},
        "settings": {name: plain[name] for name in plain if name in _SETTINGS},
        **{name: item for name, item in plain.items() if name not in moved},
    }
