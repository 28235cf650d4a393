"""A result, its settings and its environment as one JSON line, and back."""

from __future__ import annotations

import json
import platform
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from sharpness._arguments import package
from sharpness._json import as_plain, to_line

SCHEMA = 2


class Records(list[dict[str, Any]]):
    """The records of a file, oldest first."""

    def to_frame(self) -> Any:
        """A pandas data frame with nested names joined by dots."""
        return package("pandas").json_normalize(list(self))


def new_record(kind: str, **facts: Any) -> dict[str, Any]:
    """A record of `kind` with its facts and the environment, ready for JSON."""
    record = {"schema": SCHEMA, "kind": kind, **facts, "environment": environment()}
    return {key: as_plain(value) for key, value in record.items()}


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add one line to a record file, under a lock, after mending a torn last line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"{to_line(record)}\n".encode()
    with FileLock(path.with_name(path.name + ".lock")), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def read_records(path: str | Path) -> Records:
    """All records of a file; a line that was torn by a kill is left out.

    So are records of another schema, with one warning.

    Raises:
        FileNotFoundError: there is no such file.
    """
    found = list(parsed(path))
    records = Records(record for record in found if record["schema"] == SCHEMA)
    if other := len(found) - len(records):
        warnings.warn(
            f"`{path}` holds {other} records that are not of schema {SCHEMA}, this "
            "version's: left out. Measure again.",
            stacklevel=2,
        )
    return records


def parsed(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a file whatever their schema, oldest first."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "schema" in record:
                yield record


@cache
def environment() -> dict[str, Any]:
    """Versions, machine and revision that a number was computed with."""
    import torch  # here, since a command's --help does not need it

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **{name: _version(name) for name in ("sharpness", "numpy", "scipy")},
        "torch": str(torch.__version__),  # with what it was built for
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda_device": cuda,
        "num_threads": torch.get_num_threads(),
        "git_revision": _git_revision(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the package's own sources, with "+" where they were edited."""
    git = ["git", "-C", str(Path(__file__).parent)]
    options: dict[str, Any] = {"text": True, "timeout": 10, "stderr": subprocess.DEVNULL}
    try:
        revision = subprocess.check_output([*git, "rev-parse", "HEAD"], **options)
        edited = subprocess.check_output([*git, "status", "--porcelain", "."], **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return str(revision).strip() + ("+" if edited else "")
