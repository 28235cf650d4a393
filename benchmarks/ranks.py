"""Seconds of a product and of a Lanczos step of C1 on one process and on several.

    python benchmarks/ranks.py [--processes 1,2] [--samples 512] [--products 6] [--rounds 3]

Each process has one thread and its share of the samples. Beside the wall time stands each
process's own processor time, which says how the work was divided also where other programs
share the machine. The rounds take turns (a minute each on two idle cores), and go with the
median of each number's ratio to one process's to `ranks.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from sharpness import EmpiricalRisk
from sharpness._ranks import launched
from sharpness.krylov.lanczos import Lanczos
from sharpness.lab.networks import c1

TARGET = Path(__file__).with_suffix(".json")


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


def launched_with(number: str) -> dict[str, float]:
    """What the first of so many processes has measured."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    call = [*launch, f"--nproc-per-node={number}", *sys.argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, check=True, env=env, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ratios(rounds: list[list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The median over the rounds of each number by that of the first of its round."""
    return {
        f"{many['processes']} processes": {
            name: statistics.median(row[place][name] / row[0][name] for row in rounds)
            for name in many
            if name.startswith(("seconds", "processor", "basis"))
        }
        for place, many in enumerate(rounds[0])
    }


def main() -> None:
    """Each number of processes in turn; a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--products", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if "RANK" in os.environ:
        found = measured(options.samples, options.products)
        if os.environ["RANK"] == "0":
            print(json.dumps(found), flush=True)
        return
    numbers = options.processes.split(",")
    rounds = [[launched_with(one) for one in numbers] for _ in range(options.rounds)]
    asked = {"samples": options.samples, "products": options.products}
    found = {"setting": asked, "ratios": ratios(rounds), "rounds": rounds}
    TARGET.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
