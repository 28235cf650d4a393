"""A result, its settings and its environment as one JSON line, and back."""

from __future__ import annotations

import json
import platform
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
    with _locked(path):
        _append(path, [to_line(record)])


def merge_records(part: str | Path, path: str | Path, /, **facts: Any) -> None:
    """Move the records of one file to the end of another.

    None is lost, and none doubled when this was interrupted and is done again. For files
    that several machines wrote, each its own.

    Args:
        part: what is merged, and then deleted; nobody writes to it any more. A torn
            line is left out.
        path: what it goes into, under its lock.
        facts: what the records say instead, of the path on another machine, say.
    """
    part, path = Path(part), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {key: as_plain(value) for key, value in facts.items()}
    lines = [to_line({**record, **told}) for record in parsed(part)]
    with _locked(path):
        there = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        before = set(there)
        _append(path, [line for line in lines if line not in before])
    part.with_name(f"{part.name}.lock").unlink(missing_ok=True)
    part.unlink()


def _locked(path: Path) -> FileLock:
    return FileLock(path.with_name(path.name + ".lock"))


def _append(path: Path, lines: Iterable[str]) -> None:
    content = "".join(f"{line}\n" for line in lines).encode()
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            content = content if file.read(1) == b"\n" else b"\n" + content
        file.write(content)


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
