"""Workers that die: imported by processes of other engines as well."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from sharpness.lab import run as loop
from sharpness.lab import sweep


@dataclass(frozen=True, kw_only=True)
class Mortal(sweep._Worker):
    """Is killed after the first epoch of the run `dies.pt`: once, or each time."""

    def __call__(self, unit):
        loop._SAVE_EVERY = -1.0  # before each update
        return super().__call__(unit)

    def _show(self, unit, epoch=None):
        path = unit[0][1].path
        once = path.with_name("once")
        due = not once.exists() or once.read_text() == "always"
        if path.name == "dies.pt" and epoch == 1 and due:
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super()._show(unit, epoch)


def write_or_die(folder: Path, name: str, text: str = "") -> str:
    """Append to a file; "die" kills the process, "raise" raises."""
    if text == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "raise":
        raise ValueError(f"{name} is wrong")
    with (folder / name).open("a") as file:
        file.write(text)
    return name
