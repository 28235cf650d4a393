"""Seconds of a product and of a Lanczos step of C1 on one process and on several.

    python benchmarks/ranks.py [--processes 1,2] [--samples 256] [--products 5]

Each process has one thread and its share of the samples. Beside the wall time stands each
process's own processor time, which says how the work was divided also where other programs
share the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import torch
from torch.nn.functional import cross_entropy

from sharpness import EmpiricalRisk
from sharpness._ranks import launched
from sharpness.krylov.lanczos import Lanczos
from sharpness.lab.networks import c1


def measured(samples: int, products: int) -> dict[str, float]:
    """Of one process: seconds of a product, of a whole step, and bytes of the basis."""
    torch.set_num_threads(1)
    with launched("cpu", 600.0) as ranks:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(samples, 3, 32, 32, generator=draw)
        y = torch.randint(10, (samples,), generator=draw)
        own = ranks.span(samples)
        torch.manual_seed(0)
        risk = EmpiricalRisk(
            c1(), cross_entropy, (x[own], y[own]), process_group=ranks.group
        )
        start = risk.vectors.normal(risk.theta, torch.Generator().manual_seed(0))
        run = Lanczos(start, torch.Generator(), products + 1, products + 1, risk.vectors)
        run.absorb(risk.product_part(run.direction()))  # builds the graphs
        seconds, of_products, cpu = 0.0, 0.0, time.process_time()
        for _ in range(products):
            ranks.ready()
            began = time.perf_counter()
            product = risk.product_part(run.direction())
            ranks.ready()
            of_products += time.perf_counter() - began
            run.absorb(product)
            ranks.ready()
            seconds += time.perf_counter() - began
        basis = sum(block.nbytes for block in run.state.store._blocks)
        return {
            "processes": ranks.size,
            "seconds a step": seconds / products,
            "seconds a product": of_products / products,
            "processor seconds a step": (time.process_time() - cpu) / products,
            "basis bytes": basis,
            "n": risk.n,
        }


def main() -> None:
    """Run each number of processes in turn, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--products", type=int, default=5)
    options = parser.parse_args()
    if "RANK" in os.environ:
        found = measured(options.samples, options.products)
        if os.environ["RANK"] == "0":
            print(json.dumps(found), flush=True)
        return
    for number in options.processes.split(","):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        call = [*launch, f"--nproc-per-node={number}", *sys.argv]
        subprocess.run(call, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
