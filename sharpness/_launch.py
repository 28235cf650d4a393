"""Whether a launcher such as torchrun has started this process beside others."""

from __future__ import annotations

import os

_ALL = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ONE_OF = ("LOCAL_RANK", "TORCHELASTIC_RUN_ID")  # some clusters set all others in any job


def is_launched() -> bool:
    """Whether all variables are set by which torchrun tells processes of each other."""
    return not _lacking()


def local_rank() -> str | None:
    """Which of this machine's processes this is, and so which GPU it has."""
    return os.environ.get("LOCAL_RANK") if is_launched() else None


def local_processes() -> int:
    """How many processes of the launch share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def half_launched() -> str:
    """In a line what lacks, where a process has a rank and no launcher; else empty."""
    there = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not there or is_launched():
        return ""
    return (
        f"{' and '.join(there)} of the environment look like a launch by torchrun, without "
        f"{', '.join(_lacking())}: this process measures alone. Use torchrun for several."
    )


def _lacking() -> list[str]:
    lacking = [name for name in _ALL if name not in os.environ]
    return lacking + ([] if os.environ.keys() & set(_ONE_OF) else [" or ".join(_ONE_OF)])
