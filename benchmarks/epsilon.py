"""Keskar's phi: our solvers beside SciPy's L-BFGS-B, in value, evaluations and bookkeeping.

    python benchmarks/epsilon.py [F1 C2 alone] [--samples 64]

Each solver gets 10 iterations (ascent 20 evaluations) from the same start, on the same
network and samples. "Bookkeeping" is what a solver takes beside the evaluations, an
iteration. C2 (15 million parameters, Keskar et al. 2017, App. B.3, on MNIST digits padded
to 32 x 32 and three channels) is trained for some steps only and its f is taken over few
samples, since bookkeeping does not depend on them; the gradient over 1000 samples that
it is compared with is that of 250, times four. F1s are `mnist5k` checkpoints of
`python benchmarks/main_line.py`, found in `runs/main-line`.

"alone" is the bookkeeping by itself, of 15 million variables: a smooth function whose
gradient takes a few sweeps over them stands in for the network, and processor time of one
thread is counted, since others may use the machine (ten minutes, most of it SciPy's).

"Best known" is the largest value that 60 steps of ascent from three random starts, from
the corners of the gradient and of the top eigenvector, and 40 iterations of L-BFGS-B
find. Results go to `epsilon.json` beside this file; a cell that is there is not run again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from products import get_ready, processor, say
from torch import Tensor, nn

import sharpness as sh
from sharpness.lab import data, networks
from sharpness.loading import load_checkpoint
from sharpness.measurement import MeasurementSettings, risk_of
from sharpness.measures.epsilon import _SOLVERS
from sharpness.optimize.box import Box
from sharpness.record import environment

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).with_name("epsilon.json")
RUNS = ROOT / "runs" / "main-line"
SOLVERS = ("scipy", "lbfgsb", "ascent", "default")
EPSILON = 1e-3


def c2() -> nn.Module:
    """13 convolutions of 3x3 in five stages, two dense layers, BatchNorm everywhere."""

    def stage(wide: int, narrow: int, num: int) -> Iterator[nn.Module]:
        for i in range(num):
            yield nn.Conv2d(wide if i == 0 else narrow, narrow, 3, padding=1)
            yield nn.BatchNorm2d(narrow)
            yield nn.ReLU()
        yield nn.MaxPool2d(2)

    stages = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
    layers = [layer for sizes in stages for layer in stage(*sizes)]
    dense = [nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU()]
    return nn.Sequential(*layers, *dense, nn.Linear(512, 10))


def colour(x: Tensor) -> Tensor:
    return F.pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()


def trained_c2(steps: int = 120) -> nn.Module:
    path = ROOT / "runs" / "epsilon" / "C2.pt"
    model = c2()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    networks.initialise(model, 0)
    x, y = data.load("mnist5k").train
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    for i in range(steps):
        index = order[32 * i : 32 * (i + 1)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(colour(x[index])), y[index])
        loss.backward()
        optimizer.step()
        if i % 20 == 0:
            say(f"C2 step {i}, loss {float(loss.detach()):.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def risks(case: str, samples: int) -> Iterator[tuple[str, sh.EmpiricalRisk]]:
    if case == "C2":
        x, y = data.load("mnist5k").train
        some = slice(0, len(y), len(y) // samples)
        pair = colour(x[some]), y[some]
        yield "C2", sh.EmpiricalRisk(trained_c2(), nn.CrossEntropyLoss(), pair)
        return
    paths = sorted(RUNS.glob("*-seed0.pt"))
    if not paths:
        sys.exit(f"no checkpoints in {RUNS}: run benchmarks/main_line.py first")
    for path in paths:
        risk = risk_of(
            load_checkpoint(path), MeasurementSettings(num_samples=1000, batchnorm="batch")
        )
        yield f"F1 {path.stem}", risk


def cell(risk: sh.EmpiricalRisk, solver: str) -> dict[str, Any]:
    spent, plain = [0.0], risk.value_and_gradient

    def timed(theta: Tensor | None = None) -> tuple[float, Tensor]:
        began = time.perf_counter()
        result = plain(theta)
        spent[0] += time.perf_counter() - began
        return result

    risk.value_and_gradient = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    asked: Any = None if solver == "default" else solver
    found = sh.epsilon_sharpness(risk, EPSILON, solver=asked, progress=False)
    seconds = time.perf_counter() - began
    del risk.value_and_gradient  # the method again, which `subset` would copy
    iterations = {"ascent": 20, "default": 30}.get(solver, 10)
    return {
        "phi": found.phi,
        "phi_protocol": found.phi_protocol,
        "evaluations": found.num_evals,
        "seconds": seconds,
        "bookkeeping": (seconds - spent[0]) / iterations,
        "message": found.message,
    }


def alone(solver: str, n: int = 15_000_000, num_iters: int = 10) -> dict[str, Any]:
    """A solver on -u D u / 2 + c u - 25 (w u)^2, D > 0 for nine in ten of the diagonal."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(n, generator=generator).exp_()
    diagonal = draw.mul_(0.1 - torch.rand(n, generator=generator))
    linear = torch.randn(n, generator=generator)
    dense = torch.randn(n, generator=generator) / n**0.5
    start = 0.2 * torch.rand(n, generator=generator) - 0.1
    spent, num_evals = 0.0, 0

    def function(u: Tensor) -> tuple[float, Tensor]:
        nonlocal spent, num_evals
        began, num_evals = time.process_time(), num_evals + 1
        along = float(torch.dot(dense, u))
        value = float(torch.dot(diagonal, u * u)) / 2 + float(torch.dot(linear, u))
        gradient = torch.mul(diagonal, u).add_(linear).add_(dense, alpha=-50 * along)
        spent += time.process_time() - began
        return (value - 25 * along**2) / n**0.5, gradient.div_(n**0.5)

    box, began = Box(-torch.ones(n), torch.ones(n)), time.process_time()
    for state in _SOLVERS[solver](function, start, box, num_iters):
        last = state
    seconds = time.process_time() - began - spent
    iterations = num_evals if solver == "ascent" else num_iters
    return {
        "phi": last.value,
        "evaluations": num_evals,
        "bookkeeping": seconds / iterations,
        "message": last.message,
    }


def best_known(risk: sh.EmpiricalRisk) -> dict[str, Any]:
    top = sh.eigenpairs(risk, progress=False).eigenvectors[:1]
    corners = torch.cat([top, risk.gradient()[None]])
    facts: dict[str, Any] = {"num_starts": 3, "corners": corners, "progress": False}
    ascent = sh.epsilon_sharpness(risk, EPSILON, solver="ascent", max_iter=30, **facts)
    lbfgsb = sh.epsilon_sharpness(risk, EPSILON, solver="lbfgsb", max_iter=40, **facts)
    return {"phi": max(ascent.phi, lbfgsb.phi), "ascent": ascent.phi, "lbfgsb": lbfgsb.phi}


def gradient_over_1000(risk: sh.EmpiricalRisk) -> dict[str, Any]:
    """Seconds for a gradient over 1000 samples."""
    num = min(250, risk.num_samples)
    index = torch.arange(250) % risk.num_samples
    part = risk.subset(index) if risk.batchnorm == "running" else risk
    times = []
    for _ in range(3):
        began = time.perf_counter()
        part.value_and_gradient()
        times.append(time.perf_counter() - began)
    rows = 250 if part is not risk else risk.num_samples
    return {"seconds": sorted(times)[1] * 1000 / rows, "distinct_samples": num}


def table(cells: dict[str, Any]) -> str:
    lines = [
        "| case | solver | phi(1e-3), % | of best known | evaluations | bookkeeping an "
        "iteration, s | of a gradient | SciPy's over it |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    cases = dict.fromkeys(name.rpartition(":")[0] for name in cells)
    for case in cases:
        best = cells.get(f"{case}:best known", {}).get("phi")
        gradient = cells.get(f"{case}:gradient", {}).get("seconds")
        theirs = cells.get(f"{case}:scipy")
        for solver in SOLVERS:
            found = cells.get(f"{case}:{solver}")
            if found is None:
                continue
            share = f"{found['phi'] / best:.1%}" if best else "–"
            of = f"{found['bookkeeping'] / gradient:.2f}" if gradient else "–"
            times = theirs and theirs["bookkeeping"] / max(found["bookkeeping"], 1e-9)
            lines.append(
                f"| {case} | {solver} | {found['phi']:.4g} | {share} | "
                f"{found['evaluations']} | {found['bookkeeping']:.3g} | {of} | "
                f"{f'{times:.1f}×' if times else '–'} |"
            )
    return "\n".join(lines)


def write(cells: dict[str, Any]) -> None:
    facts = {"processor": processor("cpu"), "environment": environment()}
    TARGET.write_text(json.dumps({"cells": cells, **facts}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=["F1", "C2"])
    parser.add_argument("--samples", type=int, default=32, help="of C2 (default: 32)")
    options = parser.parse_args()
    get_ready()
    cells = json.loads(TARGET.read_text())["cells"] if TARGET.exists() else {}
    work = {**{s: None for s in SOLVERS}, "gradient": gradient_over_1000}
    for solver in SOLVERS[:3] if "alone" in options.cases else ():
        key = f"15 million variables alone:{solver}"
        if key not in cells:
            cells[key] = alone(solver)
            say(f"{key}: {cells[key]}")
            write(cells)
    for case in set(options.cases) - {"alone"}:
        for name, risk in risks(case, options.samples):
            tasks = dict(work) | ({"best known": best_known} if case == "F1" else {})
            for task, run in tasks.items():
                key = f"{name}:{task}"
                if key in cells:
                    continue
                say(f"{key} …")
                cells[key] = run(risk) if run else cell(risk, task)
                say(f"{key}: {cells[key]}")
                write(cells)
    print(table(cells))


if __name__ == "__main__":
    main()
