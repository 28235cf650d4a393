"""Which function a risk is: digests that differ where its numbers would."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from torch import Tensor

from sharpness import _tensors
from sharpness.risk.digests import as_bytes, described, digest
from sharpness.risk.empirical import EmpiricalRisk

# They change no number beyond rounding, or follow from the rest.
_NO_MATTER = ("notes", "engine", "chunk_size", "device", "processes")


def identity(risk: EmpiricalRisk, **tensors: Tensor | None) -> dict[str, Any]:
    """Plain values that are others for another f, theta or seed, the same on all ranks.

    SHA-256 of the data, of all parameters and buffers, of the loss with what it holds,
    and of further tensors, under their names. They do not depend on how many processes
    share the data, unless f does. What no digest sees (the code of a model's forward
    pass) shows in `at_theta`: f and the gradient's norm, equal to rounding only.

    Cost: one reading of the data and one gradient.
    """
    objective, settings = risk._objective, risk.settings()
    loss = objective.closure or objective.loss
    of_terms = {"num_terms": f"{risk.num_terms:.9g}"}  # a sum over processes
    settings = {k: v for k, v in settings.items() if k not in _NO_MATTER} | of_terms
    model = re.sub("0x[0-9a-fA-F]+", "", f"{type(risk.model).__qualname__} {risk.model}")
    own = {
        "theta": digest(risk.theta),
        "parameters": digest(model, risk.names, [list(s) for s in risk.shapes]),
        "fixed": digest(objective.fixed),
        "loss": digest(described(loss)),
        **{name: digest(value) for name, value in tensors.items()},
    }
    everyone = risk.ranks.objects(own)
    # Parts of a sharded model differ; elsewhere a rank more has nothing to add.
    joined = everyone if risk.is_sharded else _distinct(everyone)
    sums = risk.ranks.objects(_sum_of_data(risk))
    gradient = risk.gradient()
    norm = risk.vectors.norm(gradient if risk.is_sharded else risk.vectors.part(gradient))
    return {
        "digests": {name: digest([one[name] for one in joined]) for name in own},
        "data": f"{sum(sums) % (1 << 256):064x}",
        "settings": settings,
        "seed": risk.seed,
        "at_theta": [risk.value(), norm, objective.eps**0.5],
    }


def is_same(one: Any, other: Any) -> bool:
    """Whether two identities, as JSON gives them, are of one function."""
    try:
        (f, norm, eps), (f0, norm0, _) = one["at_theta"], other["at_theta"]
        alike = abs(f - f0) <= eps * abs(f) and abs(norm - norm0) <= eps * (norm + abs(f))
        rest = [{k: v for k, v in x.items() if k != "at_theta"} for x in (one, other)]
    except (LookupError, TypeError, ValueError, AttributeError):
        return False
    return alike and rest[0] == rest[1]


def _distinct(facts: list[dict[str, str]]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for one in facts:
        if one not in found:
            found.append(one)
    return found


def _sum_of_data(risk: EmpiricalRisk) -> int:
    """The digests of this process's rows, or of batches that have to be whole, added up.

    A sum is the same for every order and every division among processes.
    """
    whole = risk._mean.whole or not risk.has_outputs or not risk._has_fixed_statistics
    if whole:
        return sum(int(digest(described(batch)), 16) for batch in risk.batches)
    return sum(map(_sum_of_rows, risk.batches))


def _sum_of_rows(batch: Any) -> int:
    num, rows, common = len(batch[1]), [], hashlib.sha256()
    for leaf in _tensors.leaves(batch) if num else ():
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == num:
            common.update(f"{leaf.dtype}{tuple(leaf.shape[1:])}".encode())
            rows.append(as_bytes(leaf).reshape(num, -1))
        else:
            common.update(digest(described(leaf)).encode())
    total = 0
    for parts in zip(*rows, strict=True):
        row = common.copy()
        for part in parts:
            row.update(part.data)
        total += int.from_bytes(row.digest(), "big")
    return total
