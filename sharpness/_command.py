"""What the commands share: one line for every mistake, and the exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

OK, NOT_CONVERGED, WRONG_CALL, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong call in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the help is; exit 2."""
        self.exit(WRONG_CALL, f"{self.prog}: {message} (--help lists the options)\n")


def guarded(name: str, command: Callable[[], int]) -> int:
    """Run a command; what a person can cause becomes one line on stderr."""
    try:
        return command()
    except KeyboardInterrupt:
        _say(name, "interrupted; the same command carries on where it stopped.")
        return INTERRUPTED
    except (ValueError, TypeError, OSError, RuntimeError, IndexError, KeyError) as error:
        # The last three are what a network raises on data that do not fit it.
        plain = isinstance(error, ValueError | TypeError | OSError)
        kind = "" if plain else f"{type(error).__name__}: "
        _say(name, kind + " ".join(str(error).split()))
        return WRONG_CALL


def check_writable(flag: str, path: Path) -> None:
    """Refuse a file that cannot be written before hours are spent on what goes there.

    Raises:
        ValueError: it is a folder, or lies below something that is none.
    """
    parents = [p for p in path.absolute().parents if p.exists()]
    if path.is_dir() or not parents[0].is_dir():
        raise ValueError(f"`{flag}` must be a file that can be written; got {path}.")


def _say(name: str, text: str) -> None:
    print(f"{name}: {text}", file=sys.stderr)


def chosen_device(name: str) -> str:
    """The device of `--device`: "auto" is the GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("holds no numbers")
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"`--device` must be a device that is there; got {name!r}. Use 'auto' or 'cpu'."
        ) from None
    return name


def floats(text: str) -> tuple[float, ...]:
    """`1e-3,5e-4` as a tuple."""
    return tuple(float(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """`curvature,phi` as a tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def announce(seconds: float) -> None:
    """Say on stderr how long a measurement will take."""
    print(f"measuring: about {_rounded(seconds)} s", file=sys.stderr)


def _rounded(seconds: float) -> str:
    return f"{seconds:.1g}" if seconds < 10 else f"{seconds:.2g}"


def samples_or_all(text: str) -> int | None:
    """A whole number, or None for "all"."""
    return None if text == "all" else int(text)
