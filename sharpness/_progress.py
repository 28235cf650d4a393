"""Progress bars: on stderr, on a terminal or in a notebook, gone when done."""

from __future__ import annotations

import sys
import warnings
from typing import Any

with warnings.catch_warnings():  # in a notebook without ipywidgets; there is a text bar
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm


def duration(seconds: float) -> str:
    """`about 8 s`, `about 1 minute`, `about 13 minutes`."""
    if seconds < 60:
        return f"about {seconds:.{(1 if seconds < 10 else 2)}g} s"
    minutes = round(seconds / 60)
    return "about 1 minute" if minutes == 1 else f"about {minutes} minutes"


def say(text: str) -> None:
    """One line on stderr."""
    print(f"sharpness: {text}", file=sys.stderr, flush=True)


def foretell(description: str, seconds: float) -> None:
    """One line on stderr where no bar tells how long it will take."""
    say(f"{description}: {duration(seconds)}")


def bar(description: str, total: int | None, shown: bool | None, **options: Any) -> Any:
    """A tqdm bar; `shown=None` means only where a person can see it."""
    hidden = None if shown is None else not shown
    return tqdm(desc=description, total=total, disable=hidden, leave=False, **options)
