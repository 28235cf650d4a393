"""A search for eigenpairs that is kept in a folder as it goes, and gone on with later.

Each process writes its own part of the basis; when all have, the first writes which step
that is. So what the folder says is there is whole, whenever a process is killed.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
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
from sharpness.risk.digests import digest
from sharpness.risk.identity import is_same

_SAVE_EVERY = 30.0  # seconds
_OF_LENGTH_N = ("basis", "next")
_OWN = re.compile(r"([0-9a-f]{32}-)?\d+-(\d+)of\d+\.safetensors")  # names of parts
_MOST_PROCESSES = 1 << 16


class KeptSearch:
    """A folder that one search is kept in.

    Args:
        folder: on a file system that all processes of one machine see.
        key: plain values that say which search it is, the function under `risk` as
            `risk.identity` gives it: another one begins anew.
        vectors: how the processes share its vectors.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], vectors: Vectors) -> None:
        self._folder = Path(folder)
        self._key = json.loads(json.dumps(key))
        self._vectors, self._ranks = vectors, vectors.ranks
        self._vouches = False  # whether the manifest is of this search
        of_risk = {k: v for k, v in key["risk"].items() if k != "at_theta"}
        self._name = digest(json.dumps({**self._key, "risk": of_risk}, sort_keys=True))[:32]
        self._saved_at = time.monotonic()

    def restore(self, search: Search) -> None:
        """Let the search go on from what is in the folder, if that is of the same one."""
        facts = self._ranks.objects(self._facts())[0]  # as the first process reads them
        found = self._read(facts) if self._is_own(facts) else None
        fits = found is not None and search.fits(found)
        if not self._ranks.any(not fits):
            search.thawed(found or {})
            self._vouches = True

    def keep(self, search: Search) -> None:
        """Save it, if that is half a minute ago on any process."""
        if self._ranks.any(time.monotonic() - self._saved_at >= _SAVE_EVERY):
            self.save(search)

    def save(self, search: Search) -> None:
        """Write this process's part, and say so once all have.

        Where a process cannot (a full disk), all are warned and what there was stays.
        """
        if not search.num_products:
            return
        step, size = search.num_products, self._ranks.size
        self._saved_at = time.monotonic()
        if not self._vouches and not self._all(self._forget):
            return
        self._vouches = True
        path = self._path(step, self._ranks.rank, size)
        if not self._all(lambda: self._write_part(path, search)):
            return
        if self._all(lambda: self._write_manifest(step)):
            self._clear(but=f"{self._name}-{step}-")

    def end(self, search: Search, status: Status) -> None:
        """Forget it where it has ended as asked for; else keep what there is.

        An interrupt ends the saving, not the measurement.
        """
        if self._ranks.lost:
            return
        try:
            if status is not Status.CONVERGED:
                self.save(search)
            elif self._all(self._forget):
                self._clear()
        except KeyboardInterrupt:
            self._warn("interrupted")

    def _write_part(self, path: Path, search: Search) -> None:
        parts = {name: part.cpu().contiguous() for name, part in search.frozen().items()}
        _saving.write(path, safetensors.torch.save(parts))

    def _write_manifest(self, step: int) -> None:
        if self._ranks.is_first:
            facts = {"key": self._key, "step": step, "size": self._ranks.size}
            _saving.write(self._manifest, json.dumps(facts).encode())

    def _forget(self) -> None:
        """Take the manifest away: it vouches for no file any more."""
        if self._ranks.is_first:
            self._manifest.unlink(missing_ok=True)

    def _all(self, act: Callable[[], object]) -> bool:
        """Whether every process could do this; warns where one could not."""
        trouble = ""
        try:
            act()
        except OSError as error:
            trouble = str(error)
        if not self._ranks.any(bool(trouble)):
            return True
        self._warn(trouble or "another process could not write")
        return False

    def _warn(self, trouble: str) -> None:
        text = f"the search was not kept in {self._folder} ({trouble}); it is not affected"
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _is_own(self, facts: dict[str, Any]) -> bool:
        """Whether a manifest is one, and of this search."""
        key, step, size = (facts.get(name) for name in ("key", "step", "size"))
        if not (isinstance(key, dict) and type(step) is int and type(size) is int):
            return False
        rest = [{k: v for k, v in x.items() if k != "risk"} for x in (key, self._key)]
        alike = rest[0] == rest[1] and is_same(self._key["risk"], key.get("risk"))
        return alike and 1 <= size <= _MOST_PROCESSES

    def _facts(self) -> dict[str, Any]:
        try:
            facts = json.loads(self._manifest.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return facts if isinstance(facts, dict) else {}

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
            return {
                name: torch.cat(parts, -1) if name in _OF_LENGTH_N else parts[0]
                for name, parts in found.items()
            }
        except (SafetensorError, LookupError, TypeError, ValueError, OSError, RuntimeError):
            return None  # damaged, or on another machine

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
        for path in self._folder.glob("*.safetensors"):
            own = _OWN.fullmatch(path.name)
            mine = own and (self._ranks.is_first or int(own[2]) == self._ranks.rank)
            if mine and not path.name.startswith(but):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    @property
    def _manifest(self) -> Path:
        return self._folder / "search.json"

    def _path(self, step: int, rank: int, size: int) -> Path:
        return self._folder / f"{self._name}-{step}-{rank}of{size}.safetensors"
