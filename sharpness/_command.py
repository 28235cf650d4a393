"""What the commands share: flags from dataclasses, one line for a mistake, exit codes.

Nothing here loads PyTorch before a device is asked for, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from sharpness._arguments import ensure
from sharpness._launch import is_launched, local_rank
from sharpness._progress import duration

_DEVICES = "Use 'auto' or 'cpu'."
OK, NOT_CONVERGED, WRONG_CALL, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong call in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the help is; exit 2."""
        self.exit(WRONG_CALL, f"{self.prog}: {message} (--help lists the options)\n")


def add_flags(
    group: Any,
    settings: type,
    as_text: Sequence[str] | None = None,
    only: Container[str] | None = None,
) -> None:
    """A flag for each field of a dataclass that has a help text, with its default.

    Args:
        group: the parser, or a group of it.
        settings: the dataclass; its fields' types say what a value is read as.
        as_text: fields whose values are taken as they are typed. Where this is given, a
            flag that was not used is None instead of the field's default.
        only: fields to take; None means all.
    """
    hints = get_type_hints(settings)
    for field in fields(settings):
        text = field.metadata.get("help")
        if text and (only is None or field.name in only):
            read = {} if field.name in (as_text or ()) else _read_as(hints[field.name])
            group.add_argument(
                f"--{field.name.replace('_', '-')}",
                default=field.default if as_text is None else None,
                help=text + _usual(field.default, text),
                **read,
            )


def _read_as(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return {"type": floats if float in get_args(kind) else names}
    return {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}


def _usual(default: Any, text: str) -> str:
    if default is None or default is False or "(default" in text:
        return ""
    values = default if isinstance(default, tuple) else [default]
    return f" (default: {','.join(map(str, values))})"


def run(
    parser: Parser, arguments: Sequence[str] | None, command: Callable[[Any], int]
) -> int:
    """Run a command with its parser's options; returns the exit code.

    `options.asked` is the line that was typed.
    """
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.asked = shlex.join([*parser.prog.split(), *given])
    return guarded(parser.prog.removeprefix("python -m "), lambda: command(options))


def guarded(name: str, command: Callable[[], int]) -> int:
    """Run a command; an error that a person can cause becomes one line on stderr."""
    try:
        return command()
    except KeyboardInterrupt as stop:  # of one process, or of several that cannot go on
        why = str(stop) or "interrupted; the same command carries on where it stopped."
        say(name, why)
        return int(getattr(stop, "exit_code", INTERRUPTED))
    except (
        *(ValueError, TypeError, OSError, ImportError),
        *(RuntimeError, IndexError, KeyError),  # of a network, on data that do not fit it
    ) as error:
        plain = isinstance(error, ValueError | TypeError | OSError | ImportError)
        kind = "" if plain else f"{type(error).__name__}: "
        say(name, kind + " ".join(str(error).split()))
        return WRONG_CALL


def check_writable(flag: str, path: Path) -> None:
    """Refuse a file that cannot be written before hours are spent on what goes there.

    Raises:
        ValueError: it is a folder, or lies below something that is none.
    """
    parent = next(p for p in path.absolute().parents if p.exists())
    sound = not path.is_dir() and parent.is_dir()
    ensure(sound, flag, "be a file that can be written", str(path))


def check_figure(flag: str, path: Path) -> None:
    """Refuse a picture of a kind that is not drawn, or that cannot be written.

    Raises:
        ValueError: it is one.
    """
    drawn = path.suffix in (".png", ".pdf", ".svg")
    ensure(drawn, flag, "end in .png, .pdf or .svg", str(path))
    check_writable(flag, path)


def add_report(group: Any, what: str) -> None:
    """The flag `--report`, with what stands on the page."""
    group.add_argument("--report", help=f"an HTML page to write, in one file: {what}")


def check_report(path: str | None) -> None:
    """Refuse a page that cannot be written, or that a browser would not open.

    Raises:
        ValueError: it is one.
    """
    if path is not None:
        sound = Path(path).suffix in (".html", ".htm")
        ensure(sound, "--report", "end in .html", path)
        check_writable("--report", Path(path))


def say(name: str, text: str) -> None:
    """One line on stderr from a command; of several processes each says which it is."""
    who = f"{name} [rank {os.environ['RANK']}]" if is_launched() else name
    print(f"{who}: {text}", file=sys.stderr)


def add_cluster(add: Callable[..., Any]) -> None:
    """The flag `--cluster`: where tasks are carried out that are not timed."""
    add(
        "--cluster",
        metavar="WHERE",
        help="spread the work: dask://HOST:PORT, ray://HOST:PORT, slurm (with settings: "
        "'slurm?partition=gpu&timeout_min=600'); dask or ray alone start workers here "
        "(default: processes of this machine)",
    )


def chosen_device(name: str, cluster: str | None = None) -> str:
    """The device of `--device`: "auto" is the GPU where there is one.

    One that is named for a `cluster` need not be there on this machine.
    """
    import torch

    if cluster is not None and name != "auto":
        return name
    of_launch = local_rank()  # torchrun: each process has a GPU
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and of_launch is not None:
        name = f"cuda:{of_launch}"
    try:
        there = not torch.empty(0, device=name).is_meta  # that one holds no numbers
    except (RuntimeError, AssertionError):
        there = False
    ensure(there, "--device", "be a device that is there", repr(name), _DEVICES)
    return name


def floats(text: str) -> tuple[float, ...]:
    """`1e-3,5e-4` as a tuple."""
    return tuple(float(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """`curvature,phi` as a tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def announce(seconds: float) -> None:
    """Say on stderr how long a measurement will take."""
    say("measuring", duration(seconds))


def samples_or_all(text: str) -> int | None:
    """A whole number, or None for "all"."""
    return None if text == "all" else int(text)
