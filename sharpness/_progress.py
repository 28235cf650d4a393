"""Progress bars: on stderr, on a terminal or in a notebook, gone when done."""

from __future__ import annotations

import warnings
from typing import Any

with warnings.catch_warnings():  # in a notebook without ipywidgets; there is a text bar
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm


def bar(description: str, total: int | None, shown: bool | None, **options: Any) -> Any:
    """A tqdm bar; `shown=None` means only where a person can see it."""
    hidden = None if shown is None else not shown
    return tqdm(desc=description, total=total, disable=hidden, leave=False, **options)
