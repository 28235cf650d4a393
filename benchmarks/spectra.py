"""Eigenvalues, trace and density of trained networks: time to a given accuracy.

    python benchmarks/spectra.py [CELL ...] [--cap 600] [--again]
    python benchmarks/spectra.py --readme

A cell is CASE:TASK:CONTENDER, or the beginning of one (`F1`, `F1:top-5`). The cases and
their reference values come from `trained.py`, which is run first where they are missing.
Tasks, all in float32, on the same batches:

- top-1, top-5, top-50: the largest eigenvalues, each to 1 % of the value of a float64 run;
- trace: to ± 2 % with 95 % confidence;
- density: 10 random starts of 80 Lanczos steps; one start is run, nine are extrapolated
  from it (marked "projected").

sharpness runs with its defaults and does not know the truth. A peer gets the cheapest
setting that reaches the accuracy, found beforehand and not timed:

- PyHessian: the loosest `tol` of 1e-2, 1e-3, 1e-4 (power iteration; `trace` with as many
  probes as its own spread asks for);
- hessian-eigenthings, in hindsight: the smallest `max_iter` that reaches the accuracy, with
  full reorthogonalisation; and by its own flags: the smallest one at which all `converged`
  flags are set at tol=1e-2;
- curvlinops: SciPy's `eigsh` (ARPACK) with the best of a few basis sizes; Hutch++ with the
  number of products that sharpness ended with.

Each cell runs in a fresh process with empty compiler caches: building, tracing and
compiling count, imports and reading the data do not. A cell that takes longer than `--cap`
seconds in its timed part is stopped and entered as "more than". Memory is the peak of the
process above its size before the contender is built. Results go to `spectra.json` beside
this file, cell by cell; a cell that is there is not run again. The peers come with
`pip install -e '.[bench]'`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from products import ROOT, get_ready, peak_bytes, processor, say, version_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from trained import CASES, Case, samples, trained, truth

import sharpness
from sharpness.record import environment

TASKS = ("top-1", "top-5", "top-50", "trace", "density")
WITHIN = 0.01  # of each eigenvalue
WITHIN_TRACE = 0.02
STARTS, STEPS = 10, 80
TARGET = Path(__file__).with_name("spectra.json")
_Z = 1.96


@dataclass
class Problem:
    """One case, with a counter of the products made on it and a limit of time."""

    case: Case
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    truth: dict[str, Any]
    cap: float
    sharpness_products: int  # that the same task took; 0 where unknown
    loss: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    products: int = 0
    began: float = math.inf

    @property
    def n(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def start(self) -> None:
        """The timed part begins."""
        self.products, self.began = 0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def count(self) -> None:
        self.products += 1
        if self.seconds > self.cap:
            raise TimeoutError

    def error(self, values: Any) -> float:
        """The largest relative error of the k largest eigenvalues."""
        found = np.sort(np.asarray(values, float))[::-1]
        true = np.array(self.truth["eigenvalues"])[: len(found)]
        return float(np.max(np.abs(found - true) / np.abs(true)))


Outcome = dict[str, Any]
Solve = Callable[[Problem, str], Outcome]


def k_of(task: str) -> int:
    return int(task.removeprefix("top-"))


# -- contenders ------------------------------------------------------------------------


def ours(problem: Problem, task: str) -> Outcome:
    problem.start()
    risk = sharpness.EmpiricalRisk(problem.model, problem.loss, problem.batches)
    if task == "density":
        risk.prepare(STARTS * STEPS)
        built = problem.seconds
        density = sharpness.spectral_density(risk, num_starts=1, num_steps=STEPS)
        return projected(problem, built) | {
            "products": density.num_hvps,
            "engine": engine_of(risk),
        }
    if task == "trace":
        found = sharpness.trace(risk, tol=WITHIN_TRACE)
        error = abs(found.value / problem.truth["trace"] - 1)
        facts = {"method": found.settings["method"], "standard_error": found.standard_error}
    else:
        found = sharpness.eigenpairs(risk, k_of(task))
        error, facts = problem.error(found.eigenvalues), {}
    return {
        **facts,
        "seconds": problem.seconds,
        "products": found.num_hvps,
        "error": error,
        "status": str(found.status),
        "engine": engine_of(risk),
        "chunk_size": risk.chunk_size,
    }


def engine_of(risk: sharpness.EmpiricalRisk) -> str:
    return str(risk.settings()["engine"]["engine"])


def pyhessian(problem: Problem, task: str) -> Outcome:
    from pyhessian import hessian

    def build() -> Any:
        peer = hessian(problem.model, problem.loss, dataloader=problem.batches, cuda=False)
        product = peer.dataloader_hv_product

        def counted(v: Any) -> Any:
            problem.count()
            return product(v)

        peer.dataloader_hv_product = counted
        return peer

    if task == "density":
        problem.start()
        built = problem.seconds
        build().density(iter=STEPS, n_v=1)
        return projected(problem, built)
    if task == "trace":
        problem.start()
        few = np.array(build().trace(maxIter=10, tol=0.0))
        return hutchinson(problem, few)
    for tol in (1e-2, 1e-3, 1e-4):
        problem.start()
        values, _ = build().eigenvalues(maxIter=1000, tol=tol, top_n=k_of(task))
        outcome = {"seconds": problem.seconds, "products": problem.products}
        outcome |= {"error": problem.error(values), "setting": f"tol={tol:g}"}
        if outcome["error"] <= WITHIN:
            break
    return outcome


def hutchinson(problem: Problem, few: np.ndarray) -> Outcome:
    """Plain Hutchinson, as far as its own first probes say it has to go."""
    wanted = WITHIN_TRACE * abs(float(problem.truth["trace"])) / _Z
    num = math.ceil(float(np.var(few, ddof=1)) / wanted**2)
    num = max(num, 10)
    return {
        "seconds": problem.seconds * num / len(few),
        "products": num,
        "setting": f"{num} probes",
        "projected": f"from {len(few)} probes",
    }


def eigenthings_operator(problem: Problem) -> Any:
    from hessian_eigenthings import HessianOperator, supervised_loss

    loss = supervised_loss(problem.loss)
    operator = HessianOperator(problem.model, problem.batches, loss, method="autograd")
    product = operator.matvec

    def counted(v: Tensor) -> Tensor:
        problem.count()
        return product(v)

    operator.matvec = counted
    return operator


def eigenthings_hindsight(problem: Problem, task: str) -> Outcome:
    return eigenthings(problem, task, flags=False)


def eigenthings_flags(problem: Problem, task: str) -> Outcome:
    return eigenthings(problem, task, flags=True)


def eigenthings(problem: Problem, task: str, *, flags: bool) -> Outcome:
    import hessian_eigenthings as peer

    if task == "density":
        problem.start()
        operator = eigenthings_operator(problem)
        built = problem.seconds
        peer.spectral_density(operator, num_runs=1, lanczos_steps=STEPS, seed=0)
        return projected(problem, built)
    if task == "trace":
        return eigenthings_trace(problem)
    steps = fewest_steps(problem, k_of(task), flags)
    problem.start()
    operator = eigenthings_operator(problem)
    found = peer.lanczos(
        operator,
        k=k_of(task),
        max_iter=steps,
        tol=WITHIN,
        which="LA",
        seed=0,
        reorthogonalize=True,
    )
    return {
        "seconds": problem.seconds,
        "products": problem.products,
        "error": problem.error(found.eigenvalues),
        "setting": f"max_iter={steps}",
    }


def fewest_steps(problem: Problem, k: int, flags: bool) -> int:
    """The smallest max_iter that is accurate, or that the peer's own flags accept.

    Read off one long run: with full reorthogonalisation a shorter one is its beginning.
    """
    from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal
    from hessian_eigenthings.linalg.backend import SingleDeviceBackend

    operator = eigenthings_operator(problem)
    draw = torch.Generator().manual_seed(0)
    v0 = torch.randn(operator.size, dtype=operator.dtype, generator=draw)
    problem.start()
    longest = 20 + 4 * k
    cap, problem.cap = problem.cap, math.inf  # the search is not timed
    run = lanczos_tridiagonal(
        operator, v0, longest, reorthogonalize=True, backend=SingleDeviceBackend()
    )
    problem.cap = cap
    alphas, betas = (np.array([float(x) for x in row]) for row in (run.alphas, run.betas))
    for m in range(k, len(alphas)):
        t = np.diag(alphas[:m]) + np.diag(betas[: m - 1], 1) + np.diag(betas[: m - 1], -1)
        values, vectors = np.linalg.eigh(t)
        values, last = values[::-1][:k], vectors[-1, ::-1][:k]
        accepted = (np.abs(betas[m - 1] * last) < WITHIN * np.abs(values)).all()
        if accepted if flags else problem.error(values) <= WITHIN:
            return m
    return longest


def eigenthings_trace(problem: Problem) -> Outcome:
    """Hutch++ with more and more products, until its own standard error will do."""
    import hessian_eigenthings as peer

    for num in (30, 60, 120, 240, 480):
        problem.start()
        operator = eigenthings_operator(problem)
        found = peer.trace(operator, num_matvecs=num, method="hutch++", seed=0)
        error = abs(float(found.estimate) / problem.truth["trace"] - 1)
        outcome = {
            "seconds": problem.seconds,
            "products": problem.products,
            "error": error,
            "setting": f"hutch++, {num} products",
        }
        if _Z * float(found.stderr) <= WITHIN_TRACE * abs(float(found.estimate)):
            break
    return outcome


def curvlinops(problem: Problem, task: str) -> Outcome:
    from curvlinops import hutchpp_trace
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum
    from scipy.sparse.linalg import eigsh

    if task == "density":
        ends = (-1.0, 1.05 * problem.truth["eigenvalues"][0])  # spares it the search
        problem.start()
        operator = curvlinops_operator(problem)
        built = problem.seconds
        lanczos_approximate_spectrum(operator, STEPS, num_repeats=1, boundaries=ends)
        return projected(problem, built) | {"products": STEPS}
    if task == "trace":
        num = 3 * math.ceil((problem.sharpness_products or 90) / 3)
        problem.start()
        found = float(hutchpp_trace(curvlinops_operator(problem), num))
        return {
            "seconds": problem.seconds,
            "products": num,
            "error": abs(found / problem.truth["trace"] - 1),
            "setting": f"Hutch++, {num} products, as sharpness",
        }
    k, best = k_of(task), None
    for ncv in (k + 4, 2 * k + 2, max(2 * k + 1, 20)):
        problem.start()
        operator = curvlinops_operator(problem).to_scipy()
        product = operator._matvec

        def counted(v: np.ndarray, product: Any = product) -> np.ndarray:
            problem.count()
            return product(v)

        operator._matvec = counted
        v0 = np.random.default_rng(0).standard_normal(problem.n).astype(np.float32)
        try:
            values = eigsh(operator, k, which="LA", ncv=ncv, tol=WITHIN, v0=v0)[0]
        except TimeoutError:
            continue
        outcome = {"seconds": problem.seconds, "products": problem.products}
        outcome |= {"error": problem.error(values), "setting": f"ncv={ncv}"}
        reached = outcome["error"] <= WITHIN
        if reached and (best is None or outcome["seconds"] < best["seconds"]):
            best = outcome
            problem.cap = min(problem.cap, best["seconds"])
    if best is None:
        raise TimeoutError
    return best


def curvlinops_operator(problem: Problem) -> Any:
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        problem.model,
        problem.loss,
        list(problem.model.parameters()),
        problem.batches,
        check_deterministic=False,
        num_data=problem.case.samples,
    )


def projected(problem: Problem, built: float) -> Outcome:
    """Ten starts, from the time that one has taken."""
    each = problem.seconds - built
    return {
        "seconds": built + STARTS * each,
        "products": problem.products,
        "projected": f"from 1 start of {STARTS}",
    }


CONTENDERS: dict[str, Solve] = {
    "sharpness": ours,
    "pyhessian": pyhessian,
    "hessian-eigenthings (hindsight)": eigenthings_hindsight,
    "hessian-eigenthings (its flags)": eigenthings_flags,
    "curvlinops": curvlinops,
}

# -- one cell, in a process of its own -------------------------------------------------


def run_cell(name: str, cap: float) -> Outcome:
    case_name, task, contender = name.split(":")
    case = CASES[case_name]
    earlier = load().get(f"{case_name}:{task}:sharpness", {})
    x, y = samples(case)
    rows = case.rows_of_a_batch
    problem = Problem(
        case,
        trained(case),
        list(zip(x.split(rows), y.split(rows), strict=True)),
        truth(case),
        cap,
        int(earlier.get("products", 0)),
    )
    before = peak_bytes("cpu")
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the default has no second derivative
            outcome = CONTENDERS[contender](problem, task)
    except TimeoutError:
        outcome = {"seconds": cap, "products": problem.products, "more_than": True}
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        outcome = {"failed": f"{type(error).__name__}: {first}"[:160]}
    if task == "trace":  # the reference has an error as well
        spread = 2 * problem.truth["trace_standard_error"] / problem.truth["trace"]
        outcome["error_allowed"] = WITHIN_TRACE + spread
    outcome["memory_bytes"] = peak_bytes("cpu") - before
    return outcome


def in_fresh_process(name: str, cap: float) -> Outcome:
    with tempfile.TemporaryDirectory() as caches:
        place = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
        command = [sys.executable, __file__, "--inside", name, "--cap", str(cap)]
        run = subprocess.run(command, env=place, capture_output=True, text=True)
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1][:160]}
    return json.loads(run.stdout.splitlines()[-1])


# -- showing ---------------------------------------------------------------------------


def table(cells: dict[str, Outcome]) -> str:
    """Seconds of sharpness and, of the others, times as long."""
    lines = ["| case, task | sharpness, s | " + " | ".join(list(CONTENDERS)[1:]) + " |"]
    lines.append("|---|" + "--:|" * len(CONTENDERS))
    for case in CASES:
        for task in TASKS:
            mine = cells.get(f"{case}:{task}:sharpness")
            if mine is None or "seconds" not in mine:
                continue
            found = [
                entry(cells.get(f"{case}:{task}:{name}"), mine)
                for name in list(CONTENDERS)[1:]
            ]
            first = f"{mine['seconds']:.1f} ({mine['products']} products)"
            first += " (p)" if "projected" in mine else ""
            lines.append("| " + " | ".join([f"{case}, {task}", first, *found]) + " |")
    return "\n".join(lines)


def entry(cell: Outcome | None, mine: Outcome) -> str:
    if cell is None:
        return "not run"
    if "failed" in cell:
        return "fails"
    ratio = f"{cell['seconds'] / mine['seconds']:.1f}×"
    if cell.get("more_than"):
        return f"> {ratio}"
    limit = cell.get("error_allowed", WITHIN)
    missed = cell.get("error", 0.0) > limit
    return (
        ratio
        + (" (p)" if "projected" in cell else "")
        + (f" (off by {cell['error']:.0%})" if missed else "")
    )


def caption(cells: dict[str, Outcome]) -> str:
    settings = {json.dumps(cell["setting_of_run"]) for cell in cells.values()}
    facts = [json.loads(text) for text in sorted(settings)]
    versions = ", ".join(f"{k} {v}" for k, v in facts[0]["versions"].items())
    caps = " / ".join(sorted({f"{fact['cap']:g}" for fact in facts}))
    return textwrap.fill(
        f"First column: seconds (float32, {facts[0]['processor']}, "
        f"{facts[0]['threads']} threads); the others: how many times as long, each peer "
        "with the cheapest setting that reaches the accuracy, found beforehand and not "
        f'timed. "> x": stopped after {caps} s. (p): projected. {versions}.',
        width=120,
    )


def write_readme(cells: dict[str, Outcome]) -> None:
    begin, end = "<!-- spectra:begin -->", "<!-- spectra:end -->"
    readme = ROOT / "docs" / "benchmarks.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    text = f"{before}{begin}\n\n{table(cells)}\n\n{caption(cells)}\n\n{end}{after}"
    readme.write_text(text, encoding="utf-8")


# -- command ---------------------------------------------------------------------------


def main() -> None:
    warnings.simplefilter("ignore")
    options = parse()
    if options.readme:
        write_readme(load())
        return
    if options.inside:
        get_ready()
        print(json.dumps(run_cell(options.inside, options.cap)))
        return
    for name in wanted(options.cells):
        cells = load()
        if name in cells and not options.again:
            continue
        case = CASES[name.split(":")[0]]
        trained(case)
        truth(case)
        say(f"{name} …")
        outcome = in_fresh_process(name, options.cap)
        outcome["setting_of_run"] = setting(options.cap)
        outcome["environment"] = environment()
        save(load() | {name: outcome})
        say(f"{name}: { {k: v for k, v in outcome.items() if k in SHOWN} }")
    print(table(load()))


SHOWN = ("seconds", "products", "error", "setting", "engine", "failed", "more_than")


def wanted(beginnings: list[str]) -> list[str]:
    names = [f"{c}:{t}:{p}" for t in TASKS for c in CASES for p in CONTENDERS]
    names = [
        name
        for name in names
        if has_truth(*name.split(":")[:2])
        and not ("its flags" in name and not name.split(":")[1].startswith("top"))
    ]
    return [n for n in names if not beginnings or n.startswith(tuple(beginnings))]


def has_truth(case: str, task: str) -> bool:
    if task == "trace":
        return CASES[case].trace_products > 0
    return not task.startswith("top") or k_of(task) <= CASES[case].top


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("cells", nargs="*", metavar="CELL", help="CASE:TASK:CONTENDER, or its beginning")
    add("--cap", type=float, default=600.0, help="seconds of a cell (default: 600)")
    add("--again", action="store_true", help="measure anew what is in the JSON already")
    add(
        "--readme",
        action="store_true",
        help="only rewrite the page from the JSON",
    )
    add("--inside", metavar="CELL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not wanted(options.cells):
        parser.error(f"CELL must begin with one of {', '.join(CASES)}; {TASKS}.")
    return options


def setting(cap: float) -> dict[str, Any]:
    packages = ("torch", "pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch")
    return {
        "processor": processor("cpu"),
        "threads": torch.get_num_threads(),
        "cap": cap,
        "versions": {name: version_of(name) for name in packages},
    }


def load() -> dict[str, Outcome]:
    return json.loads(TARGET.read_text())["cells"] if TARGET.exists() else {}


def save(cells: dict[str, Outcome]) -> None:
    part = TARGET.with_suffix(".part")
    part.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
    part.replace(TARGET)


if __name__ == "__main__":
    main()
