"""Which batch size for a regression on four features and 20 million rows on disk?

Writes the rows, 400 MB, a part at a time to the folder that is named (they stay there),
and measures on them where they lie: a batch is read when it is trained on. Prints the
advice, the seconds and the peak of memory.

    python examples/rows_on_disk.py [FOLDER] [ROWS]
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

import sharpness as sh
from sharpness.batchsize.result import BatchSizeAdvice
from sharpness.risk import files

ROWS, FEATURES, HELD_OUT = 20_000_000, 4, 4096
AT_ONCE = 1_000_000


def write(folder: Path, rows: int, seed: int = 0) -> None:
    """Targets are a wave of the features, and noise."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    x, y = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (rows, columns))
        for name, columns in (("x", FEATURES), ("y", 1))
    )
    weights = np.array([1.0, -0.5, 0.5, 2.0], np.float32)[:, None]
    for start in range(0, rows, AT_ONCE):
        part = draw.standard_normal((min(AT_ONCE, rows - start), FEATURES), np.float32)
        noise = draw.standard_normal((len(part), 1), np.float32)
        x[start : start + len(part)] = part
        y[start : start + len(part)] = np.sin(part @ weights) + 0.1 * noise


def advise(folder: Path, max_seconds: float = 240.0) -> BatchSizeAdvice:
    """The last rows tell how good a model is, the others train it."""
    x, y = files.mapped(folder)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(FEATURES, 64), torch.nn.Tanh()),
        *(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)),
    )
    return sh.batch_size_advice(
        model,
        "mse",
        (x[:-HELD_OUT], y[:-HELD_OUT]),
        (x[-HELD_OUT:], y[-HELD_OUT:]),
        optimizer="adam",
        lr=1e-3,
        batch_size=128,
        max_seconds=max_seconds,
    )


def main(folder: Path, rows: int, max_seconds: float = 240.0) -> None:
    """Write what is not there, and print."""
    began = time.monotonic()
    if not (folder / "y.npy").exists():
        write(folder, rows)
        print(f"{rows} rows written in {time.monotonic() - began:.0f} s")
    print(advise(folder, max_seconds))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    print(f"\n{time.monotonic() - began:.0f} s, at most {peak:.2f} GB of memory")


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/rows")
    main(where, int(sys.argv[2]) if len(sys.argv) > 2 else ROWS)
