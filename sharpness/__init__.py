"""How sharp is the minimum a network was trained to, and can the number be trusted?"""

from __future__ import annotations

from typing import Any

import lazy_loader

# `__init__.pyi` lists the public names; each is loaded when it is first asked for.
_loaded, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sharpness")
    return _loaded(name)
