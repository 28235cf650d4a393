"""The papers that can be reproduced, by name."""

from __future__ import annotations

from sharpness.reproduce import (
    cohen2021,
    dinh2017,
    keskar2017,
    masters2018,
    mishkin2016,
    smith2018,
)
from sharpness.reproduce.paper import Paper

_MODULES = (keskar2017, masters2018, smith2018, mishkin2016, dinh2017, cohen2021)
PAPERS: dict[str, Paper] = {module.PAPER.name: module.PAPER for module in _MODULES}
