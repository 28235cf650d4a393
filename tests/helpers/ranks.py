"""Processes that compute together, started for a test and ended with it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
LONG = 600.0  # seconds that nothing here takes, even on a busy machine


def started(
    function: str, size: int, folder: Path, *, patience: float = 120.0, **environment: str
) -> list[subprocess.Popen[str]]:
    """`module:function` on gloo ranks, called as `function(group, folder)`.

    What it returns is saved as `folder/RANK.pt`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(TESTS.parent), str(TESTS)]
    paths += [p for p in [os.environ.get("PYTHONPATH")] if p]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    call = [sys.executable, __file__, function, str(folder), str(size), str(patience)]
    return [
        subprocess.Popen(
            [*call, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=variables,
        )
        for rank in range(size)
    ]


def together(function: str, size: int, folder: Path) -> list[Any]:
    """What the function gives on each rank; all have ended well."""
    processes = started(function, size, folder)
    try:
        told = [process.communicate(timeout=LONG)[0] for process in processes]
    finally:
        end(processes)
    codes = [process.returncode for process in processes]
    assert codes == [0] * size, "\n".join(told)
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(size)]


def end(processes: list[subprocess.Popen[str]]) -> None:
    """Nothing of them is left."""
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _main(function: str, folder: str, size: str, patience: str, rank: str) -> int:
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{Path(folder).absolute()}/store"
    limit = timedelta(seconds=float(patience))
    dist.init_process_group(
        "gloo", init_method=store, rank=int(rank), world_size=int(size), timeout=limit
    )
    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name)(dist.group.WORLD, Path(folder))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
