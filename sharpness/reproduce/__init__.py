"""The papers, table by table: our number beside theirs, and a verdict.

What stands here is readable without PyTorch, for the command's help.
"""

from typing import Literal, get_args

PAPER_NAMES = (
    *("keskar2017", "masters2018", "smith2018"),
    *("mishkin2016", "dinh2017", "cohen2021"),
)
Preset = Literal["quick", "reduced", "full"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
