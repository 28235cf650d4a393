"""A search for eigenpairs that is kept in a folder as it goes, and gone on with later.

Each process writes its own part of the basis; when all have, the first writes which step
that is. So what the folder says is there is whole, whenever a process is killed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharpness import _saving
from sharpness._ranks import Vectors, span
from sharpness._results import Status
from sharpness.krylov.eigenpair_search import Search

_SAVE_EVERY = 30.0  # seconds
_OF_LENGTH_N = ("basis", "next")


class KeptSearch:
    """A folder that one search is kept in.

    Args:
        folder: on a file system that all processes of one machine see.
        key: plain values that say which search it is: another one begins anew.
        vectors: how the processes share its vectors.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], vectors: Vectors) -> None:
        self._folder = Path(folder)
        self._key = json.loads(json.dumps(key))
        self._vectors, self._ranks = vectors, vectors.ranks
        self._saved_at = time.monotonic()

    def restore(self, search: Search) -> None:
        """Let the search go on from what is in the folder, if that is of the same one."""
        facts = self._ranks.objects(self._facts())[0]  # as the first process reads them
        found = self._read(facts) if facts.get("key") == self._key else None
        fits = found is not None and len(found["basis"]) <= search.basis_size
        if not self._ranks.any(not fits):
            search.thawed(found or {})

    def keep(self, search: Search) -> None:
        """Save it, if that is half a minute ago on any process."""
        if self._ranks.any(time.monotonic() - self._saved_at >= _SAVE_EVERY):
            self.save(search)

    def save(self, search: Search) -> None:
        """Write this process's part, and say so once all have."""
        if not search.num_products:
            return
        step, size = search.num_products, self._ranks.size
        path = self._path(step, self._ranks.rank, size)
        parts = {name: part.cpu().contiguous() for name, part in search.frozen().items()}
        _saving.write(path, safetensors.torch.save(parts))
        self._ranks.ready()
        if self._ranks.is_first:
            facts = {"key": self._key, "step": step, "size": size}
            _saving.write(self._manifest, json.dumps(facts).encode())
        self._ranks.ready()
        self._clear(but=f"{step}-")
        self._saved_at = time.monotonic()

    def end(self, search: Search, status: Status) -> None:
        """Forget it where it has ended as asked for; else keep what there is."""
        if self._ranks.lost:
            return
        if status is not Status.CONVERGED:
            self.save(search)
            return
        if self._ranks.is_first:
            self._manifest.unlink(missing_ok=True)
        self._ranks.ready()
        self._clear()

    def _facts(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads(self._manifest.read_text())
            return facts
        except (OSError, ValueError):
            return {}

    def _read(self, facts: dict[str, Any]) -> dict[str, Tensor] | None:
        """This process's part, from as many files as have some of it."""
        found: dict[str, list[Tensor]] = {}
        try:
            for rank, columns in self._pieces(facts["size"]):
                path = self._path(facts["step"], rank, facts["size"])
                with safe_open(str(path), "pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        tensor = file.get_tensor(name)
                        if name in _OF_LENGTH_N:
                            tensor = tensor[..., columns]
                        found.setdefault(name, []).append(tensor)
        except (SafetensorError, LookupError, TypeError, ValueError, OSError):
            return None  # damaged, or on another machine
        return {
            name: torch.cat(parts, -1) if name in _OF_LENGTH_N else parts[0]
            for name, parts in found.items()
        }

    def _pieces(self, size: int) -> list[tuple[int, slice]]:
        """Which rank's file of `size` has which columns of this process's part."""
        if size == self._ranks.size:
            return [(self._ranks.rank, slice(None))]
        if not self._vectors.may_be_cut_anew:
            raise ValueError("parts of another number of processes")
        n = self._vectors.n
        mine, found = self._ranks.span(n), []
        for rank in range(size):
            theirs = span(n, rank, size)
            start, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
            if start < stop:
                found.append((rank, slice(start - theirs.start, stop - theirs.start)))
        return found or [(0, slice(0))]

    def _clear(self, but: str = "/") -> None:
        """Remove files of other steps; each process its own, the first also others'."""
        mine = "*" if self._ranks.is_first else f"*-{self._ranks.rank}of*"
        for path in self._folder.glob(f"{mine}.safetensors"):
            if not path.name.startswith(but):
                path.unlink(missing_ok=True)

    @property
    def _manifest(self) -> Path:
        return self._folder / "search.json"

    def _path(self, step: int, rank: int, size: int) -> Path:
        return self._folder / f"{step}-{rank}of{size}.safetensors"
