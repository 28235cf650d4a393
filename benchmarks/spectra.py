"""Eigenvalues, trace and density of trained networks: what a given accuracy takes.

    python benchmarks/spectra.py counts [CELL ...]   (about 25 minutes on one idle core)
    python benchmarks/spectra.py costs [CASE ...]    (two minutes)
    python benchmarks/spectra.py page

The networks come from `trained.py`. Tasks, all in float32, on the same batches, from the
starts 0 to 4:

- top-1, top-5: the largest eigenvalues, each to 1 % of a float64 run's;
- trace: to +- 2 % with 95 % confidence, on F1 and C1, from one start;
- density: 10 random starts of 80 Lanczos steps.

`counts` runs every contender's own algorithm on one and the same exact product, that of
`EmpiricalRisk`, and keeps how many products it made and how far off it was. Neither depends
on the machine, rounding apart. What a product costs each of them, in gradients, is measured
by `products.py`, all in turn, on the same networks with more samples; `costs` measures what
sharpness pays once (checks, the graph), in user seconds over those of a gradient of the
same batches. Peers are taken to pay nothing once, and nobody for vectors. The time of a
task, in gradients, is what is paid once and the products.

sharpness runs with its defaults and does not know the truth. A peer has two standards:

- in hindsight: the cheapest setting that is accurate, chosen by the truth and not paid for;
- by a rule that its user could apply:
  - PyHessian: its defaults, `tol=1e-3` and at most 100 products a value or a trace;
  - hessian-eigenthings: `tol=1e-2`, `max_iter` from its default 2 k, doubled until every
    `converged` flag is set, each run anew; the trace likewise by its standard error;
  - curvlinops: SciPy's `eigsh` (ARPACK) with `tol=1e-2` and its other defaults. It gives
    no error of a trace: as many products as sharpness made.

Between the two stands the smallest `max_iter` that hessian-eigenthings' flags accept, which
its user would have to guess. Everything goes to `spectra.json` beside this file, cell by
cell; what is there is not done again. The peers come with `pip install -e '.[bench]'`.
"""

import argparse
import json
import math
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import products
import torch
from filelock import FileLock
from products import ROOT, get_ready, in_one_line, processor, say, version_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from trained import CASES, Case, samples, trained

import sharpness
from sharpness import EmpiricalRisk

TARGET = Path(__file__).with_name("spectra.json")
COUNTED = {"F1": 512, "C1": 64, "ResNet-20": 32, "GPT": 8}  # samples, in four batches
VALUES = ("top-1", "top-5")
WITH_TRACE = ("F1", "C1")
NUM_STARTS = 5
WITHIN, WITHIN_TRACE = 0.01, 0.02
STARTS, STEPS = 10, 80  # of a density
BUILDS = 3
_Z = 1.96

Outcome = dict[str, Any]


@dataclass
class Problem:
    """One case, with a counter of the products made on it."""

    risk: EmpiricalRisk
    truth: list[float]  # largest eigenvalues
    trace: float = math.nan  # as sharpness had it
    start: int = 0
    made: int = 0

    def product(self, v: Tensor) -> Tensor:
        self.made += 1
        return self.risk.hvp(v)

    def of_values(self, values: Any, made: int, **facts: Any) -> Outcome:
        """The largest relative error of the k largest eigenvalues."""
        found = np.sort(np.asarray(values, float))[::-1]
        true = np.array(self.truth)[: len(found)]
        error = float(np.max(np.abs(found - true) / np.abs(true)))
        return {"products": made, "error": error, "wrong": error > WITHIN, **facts}

    def of_trace(self, value: float, made: int, **facts: Any) -> Outcome:
        """Wrong is what is further from sharpness' than both may be off."""
        apart = abs(value / self.trace - 1)
        wrong = apart > 2 * WITHIN_TRACE
        return {"products": made, "value": value, "wrong": wrong, **facts}


def k_of(task: str) -> int:
    return int(task.removeprefix("top-"))


# -- counts: what each contender does, by standard ---------------------------------------


def ours(problem: Problem, task: str) -> dict[str, Outcome]:
    risk, options = problem.risk, {"seed": problem.start, "progress": False}
    if task == "trace":
        found = sharpness.trace(risk, tol=WITHIN_TRACE, **options)
        problem.trace = found.value
        facts = {"status": str(found.status), "standard_error": found.standard_error}
        return {"default": problem.of_trace(found.value, found.num_hvps, **facts)}
    pairs = sharpness.eigenpairs(risk, k_of(task), **options)
    facts = {"status": str(pairs.status), "verified": pairs.explicit_residual is not None}
    return {"default": problem.of_values(pairs.eigenvalues, pairs.num_hvps, **facts)}


def pyhessian(problem: Problem, task: str) -> dict[str, Outcome]:
    from pyhessian import hessian

    risk = problem.risk
    x, y = risk.full_batch()
    peer = hessian(risk.model, nn.CrossEntropyLoss(), data=(x[:1], y[:1]), cuda=False)
    peer.full_dataset = True
    shapes = [p.shape for p in peer.params]

    def product(v: list[Tensor]) -> tuple[float, list[Tensor]]:
        flat = torch.cat([part.reshape(-1) for part in v])
        found = problem.product(flat)
        parts = found.split([shape.numel() for shape in shapes])
        pieces = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return float(found @ flat), pieces

    peer.dataloader_hv_product = product
    torch.manual_seed(problem.start)
    problem.made = 0
    if task == "trace":
        found = peer.trace()
        value, probes = float(np.mean(found)), len(found)
        spread = float(np.std(found, ddof=1)) if probes > 1 else math.nan
        wanted = WITHIN_TRACE * abs(problem.trace) / _Z
        outcomes = {"rule": problem.of_trace(value, probes)}
        if probes >= 10:
            outcomes["hindsight"] = {"products": math.ceil((spread / wanted) ** 2)}
        return outcomes

    def run(tol: float) -> Outcome:
        torch.manual_seed(problem.start)
        problem.made = 0
        values, _ = peer.eigenvalues(maxIter=100, tol=tol, top_n=k_of(task))
        return problem.of_values(values, problem.made, setting=f"tol={tol:g}")

    return with_cheapest(run(1e-3), [run(1e-2)])


def with_cheapest(rule: Outcome, others: list[Outcome]) -> dict[str, Outcome]:
    right = [outcome for outcome in (rule, *others) if not outcome["wrong"]]
    if not right:
        return {"rule": rule}
    return {"rule": rule, "hindsight": min(right, key=lambda o: int(o["products"]))}


def operator_of(problem: Problem) -> Any:
    from hessian_eigenthings.operators import CurvatureOperator

    class Exact(CurvatureOperator):  # type: ignore[misc]
        size, dtype, device = problem.risk.n, torch.float32, torch.device("cpu")

        def matvec(self, v: Tensor) -> Tensor:
            return problem.product(v)

    return Exact()


def eigenthings(problem: Problem, task: str) -> dict[str, Outcome]:
    if task == "trace":
        return eigenthings_trace(problem)
    k = k_of(task)
    longest = 4 * k
    while not (found := read_off(problem, k, longest)):
        longest *= 2
    return found


def read_off(problem: Problem, k: int, longest: int) -> dict[str, Outcome]:
    """All standards from one run: with full reorthogonalisation a shorter is its start.

    Empty where `longest` steps do not meet them all.
    """
    from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal

    operator = operator_of(problem)
    draw = torch.Generator().manual_seed(problem.start)
    v0 = torch.randn(operator.size, generator=draw)
    run = lanczos_tridiagonal(operator, v0, longest, reorthogonalize=True)
    alphas, betas = run.alphas.double().numpy(), [*run.betas.tolist(), run.last_beta]

    def after(m: int) -> tuple[bool, np.ndarray]:
        off = betas[: m - 1]
        t = np.diag(alphas[:m]) + np.diag(off, 1) + np.diag(off, -1)
        values, vectors = np.linalg.eigh(t)
        values, last = values[::-1][:k], vectors[-1, ::-1][:k]
        return bool((np.abs(betas[m - 1] * last) < WITHIN * np.abs(values)).all()), values

    looks = range(k, longest + 1)
    accepted = next((m for m in looks if after(m)[0]), None)
    doubled = [m for m in (2 * k * 2**i for i in range(9)) if m <= longest]
    last = next((m for m in doubled if after(m)[0]), None)
    right = (m for m in looks if not problem.of_values(after(m)[1], m)["wrong"])
    accurate = next(right, None)
    if accepted is None or last is None or accurate is None:
        return {}
    made = sum(m for m in doubled if m <= last)
    steps = "max_iter=" + "+".join(str(m) for m in doubled if m <= last)
    return {
        "rule": problem.of_values(after(last)[1], made, setting=steps),
        "flags": problem.of_values(after(accepted)[1], accepted),
        "hindsight": problem.of_values(after(accurate)[1], accurate),
    }


def eigenthings_trace(problem: Problem) -> dict[str, Outcome]:
    """Hutch++ with more and more products, until its own standard error will do."""
    import hessian_eigenthings as peer

    tried: list[int] = []
    for num in (99, 198, 396, 792):  # 99 is its default
        found = peer.trace(
            operator_of(problem), num_matvecs=num, method="hutch++", seed=problem.start
        )
        tried.append(num)
        value, error = float(found.estimate), float(found.stderr)
        if _Z * error <= WITHIN_TRACE * abs(value):
            break
    steps = "num_matvecs=" + "+".join(map(str, tried))
    last = problem.of_trace(value, tried[-1], standard_error=error)
    rule = problem.of_trace(value, sum(tried), standard_error=error, setting=steps)
    return {"rule": rule, "flags": last, "hindsight": last}


def curvlinops(problem: Problem, task: str) -> dict[str, Outcome]:
    k = k_of(task)
    others = [arpack(problem, k, ncv) for ncv in (k + 4, 2 * k + 2)]
    return with_cheapest(arpack(problem, k, None), others)


def arpack(problem: Problem, k: int, ncv: int | None) -> Outcome:
    from scipy.sparse.linalg import LinearOperator, eigsh

    def matvec(v: np.ndarray) -> np.ndarray:
        return problem.product(torch.from_numpy(v.reshape(-1).copy())).numpy()

    n = problem.risk.n
    problem.made = 0
    v0 = np.random.default_rng(problem.start).standard_normal(n).astype(np.float32)
    matrix = LinearOperator((n, n), matvec, dtype=np.float32)
    values = eigsh(matrix, k, which="LA", ncv=ncv, tol=WITHIN, v0=v0)[0]
    return problem.of_values(values, problem.made, setting=f"ncv={ncv or 'default'}")


CONTENDERS = {
    "sharpness": ours,
    "hessian-eigenthings": eigenthings,
    "curvlinops": curvlinops,
    "pyhessian": pyhessian,
}


def cells(case: str) -> list[tuple[int, str, str]]:
    """Start, task and contender of what `counts` runs; ours first of its kind."""
    values = [
        (start, task, contender)
        for start in range(NUM_STARTS)
        for task in VALUES
        for contender in CONTENDERS
    ]
    peers = ("sharpness", "pyhessian", "hessian-eigenthings")
    return values + [(0, "trace", peer) for peer in peers if case in WITH_TRACE]


def count(case: Case, beginnings: tuple[str, ...]) -> None:
    """All cells of a case that begin so and are not there."""
    names = {f"{case.name}:{task}:{c}:{start}": (start, task, c)
             for start, task, c in cells(case.name)}  # fmt: skip
    names = {n: cell for n, cell in names.items() if n.startswith(beginnings or ("",))}
    if not names.keys() - load()["counts"].keys():
        return
    problem = Problem(risk_of(case), reference(case))
    for name, (problem.start, task, contender) in names.items():
        if name in load()["counts"]:
            continue
        problem.trace = trace_of(case)
        try:
            outcome: Outcome = CONTENDERS[contender](problem, task)
        except Exception as error:
            outcome = {"failed": in_one_line(error)}
        say(f"{name}: {outcome}")
        save("counts", name, outcome)


def risk_of(case: Case, dtype: torch.dtype = torch.float32) -> EmpiricalRisk:
    """On as many of the samples as products are counted on."""
    x, y = (part[: COUNTED[case.name]] for part in samples(case))
    x = x.to(dtype) if x.is_floating_point() else x
    return EmpiricalRisk(trained(case).to(dtype), nn.CrossEntropyLoss(), (x, y))


def reference(case: Case) -> list[float]:
    """The five largest eigenvalues, in float64 to 1e-5; computed once."""
    if case.name not in load()["truth"]:
        risk = risk_of(case, torch.float64)
        pairs = sharpness.eigenpairs(risk, 5, tol=1e-5, seed=99, max_hvps=400)
        values = pairs.raise_for_status().eigenvalues.tolist()
        save("truth", case.name, {"eigenvalues": values, "parameters": risk.n})
    return list(load()["truth"][case.name]["eigenvalues"])


def trace_of(case: Case) -> float:
    found = load()["counts"].get(f"{case.name}:trace:sharpness:0", {})
    return float(found.get("default", {}).get("value", math.nan))


# -- costs: what sharpness pays once -----------------------------------------------------


def costs_of(case: Case) -> Outcome:
    """User seconds of a gradient, of a product, and of all up to the first one."""
    x, y = samples(case)
    rows = case.rows_of_a_batch
    batches = list(zip(x.split(rows), y.split(rows), strict=True))
    model, loss = trained(case), nn.CrossEntropyLoss()
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    problem = products.Problem(case, model, batches, v)  # type: ignore[arg-type]
    gradient = products.eager_gradient(problem).run
    used(gradient)
    rounds: list[dict[str, float]] = []
    for _ in range(BUILDS):
        unit, risk = used(gradient), EmpiricalRisk(model, loss, batches)  # warms up
        began = time.process_time()
        risk = EmpiricalRisk(model, loss, batches)
        risk.prepare(14)
        risk.hvp(v)
        first = time.process_time() - began
        product = min(used(partial(risk.hvp, v)) for _ in range(2))
        setup = first - product
        rounds.append({"gradient": unit, "product": product, "setup": setup})
        say(f"{case.name}: {rounds[-1]}")
    setup = statistics.median(r["setup"] / r["gradient"] for r in rounds)
    product = statistics.median(r["product"] / r["gradient"] for r in rounds)
    engine = str(risk.settings()["engine"]["engine"])
    return {"rounds": rounds, "setup": setup, "product": product, "engine": engine}


def used(run: Callable[[], Any]) -> float:
    """User seconds."""
    began = time.process_time()
    run()
    return time.process_time() - began


# -- the page ----------------------------------------------------------------------------


STANDARDS = {
    ("hessian-eigenthings", "hindsight"): "hessian-eigenthings, in hindsight",
    ("hessian-eigenthings", "flags"): "fewest steps its flags accept",
    ("hessian-eigenthings", "rule"): "its flags, doubling",
    ("curvlinops", "hindsight"): "curvlinops + ARPACK, in hindsight",
    ("curvlinops", "rule"): "its defaults, tol 1e-2",
    ("pyhessian", "hindsight"): "PyHessian, in hindsight",
    ("pyhessian", "rule"): "its defaults",
}
AIMS = {"hessian-eigenthings": 1.3, "curvlinops": 1.5, "pyhessian": 4.0}
KEPT = "sharpness kept_graph"


def product_costs() -> dict[str, dict[str, float]]:
    """A product in gradients, by case and contender, as `products.py` found it."""
    rows = products.load(ROOT / "benchmarks" / "products.json")
    return {
        row["case"]: {
            name.replace(KEPT, "sharpness"): entry["gradients"]["median"]
            for name, entry in row["contenders"].items()
            if "gradients" in entry
        }
        for row in rows
        if row["setting"]["batches"] > 1
    }


@dataclass
class Page:
    """Ratios of times, in gradients."""

    found: Outcome
    costs: dict[str, dict[str, float]] = field(default_factory=product_costs)

    def gradients(self, case: str, contender: str, made: float) -> float:
        once = self.found["costs"][case]["setup"] if contender == "sharpness" else 0.0
        return float(once + made * self.costs[case][contender])

    def ours(self, case: str, task: str) -> dict[int, Outcome]:
        cells = self.found["counts"]
        starts = range(NUM_STARTS)
        named = {
            start: cells.get(f"{case}:{task}:sharpness:{start}", {}) for start in starts
        }
        return {
            start: cell["default"] for start, cell in named.items() if "default" in cell
        }

    def ratios(self, case: str, task: str, key: tuple[str, str]) -> list[Outcome]:
        """For each start: the peer's time over ours, with what the peer's cell says."""
        (contender, standard), rows = key, []
        for start, mine in self.ours(case, task).items():
            cell = self.found["counts"].get(f"{case}:{task}:{contender}:{start}", {})
            if standard in cell:
                ratio = self.gradients(case, contender, cell[standard]["products"])
                ratio /= self.gradients(case, "sharpness", mine["products"])
                rows.append({"ratio": ratio, **cell[standard]})
        return rows

    def table(self) -> str:
        """Rows of case and task, columns of peers by standard."""
        names = ["case, task", "sharpness", *STANDARDS.values()]
        lines = ["| " + " | ".join(names) + " |", "|---|" + "--:|" * (1 + len(STANDARDS))]
        for case in self.found["costs"]:
            for task in (*VALUES, "trace"):
                if self.ours(case, task):
                    entries = [in_words(self.ratios(case, task, key)) for key in STANDARDS]
                    lines.append(self.row(case, task, entries))
            entries = [self.density(case, *key) for key in STANDARDS]
            made = STARTS * STEPS
            whole = f"{self.gradients(case, 'sharpness', made):.0f} ({made} products)"
            lines.append("| " + " | ".join([f"{case}, density", whole, *entries]) + " |")
        return "\n".join(lines)

    def row(self, case: str, task: str, entries: list[str]) -> str:
        mine = list(self.ours(case, task).values())
        made = statistics.median(outcome["products"] for outcome in mine)
        first = f"{self.gradients(case, 'sharpness', made):.0f} ({made:g} products)"
        wrong = sum(outcome["wrong"] for outcome in mine)
        first += f", {wrong} of {len(mine)} wrong" if wrong else ""
        return "| " + " | ".join([f"{case}, {task}", first, *entries]) + " |"

    def density(self, case: str, contender: str, standard: str) -> str:
        if standard != "rule":
            return ""
        if contender == "pyhessian":
            return "fails"  # it calls torch.eig, which is gone
        made = STARTS * STEPS
        whole = self.gradients(case, "sharpness", made)
        return f"{self.gradients(case, contender, made) / whole:.1f}×"

    def medians(self) -> str:
        """Over all cases and starts, beside what was aimed at."""
        lines = ["| peer | standard | top-1 | top-5 | aim | wrong answers |"]
        lines.append("|---|---|--:|--:|--:|--:|")
        for key in STANDARDS:
            by_task = [
                [
                    row
                    for case in self.found["costs"]
                    for row in self.ratios(case, task, key)
                ]
                for task in VALUES
            ]
            if not all(by_task):
                continue
            both = [statistics.median(row["ratio"] for row in rows) for rows in by_task]
            rows = [row for rows in by_task for row in rows]
            wrong = f"{sum(bool(row.get('wrong')) for row in rows)} of {len(rows)}"
            aim = "" if key[1] == "hindsight" else aimed(AIMS[key[0]], both)
            times = [f"{ratio:.2f}×" for ratio in both]
            cells = [key[0], MEANT[key[1]], *times, aim, wrong]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def num_starts(self, case: str) -> int:
        """From how many starts all contenders have done all tasks on eigenvalues."""
        done = self.found["counts"]
        return sum(
            all(f"{case}:{task}:{c}:{start}" in done for task in VALUES for c in CONTENDERS)
            for start in range(NUM_STARTS)
        )

    def caption(self) -> str:
        setting = self.found["setting"]
        versions = ", ".join(f"{k} {v}" for k, v in setting["versions"].items())
        once = ", ".join(f"{c} {e['setup']:.1f}" for c, e in self.found["costs"].items())
        counted = ", ".join(f"{case} {num}" for case, num in COUNTED.items())
        cases = self.found["costs"]
        starts = ", ".join(f"{c} {self.num_starts(c)}" for c in cases)
        return textwrap.fill(
            "First column: time in gradients of the same batches; the others: how many "
            "times as long, median and range over starts. Products were counted on so many "
            f"samples: {counted}; from so many starts, beside every peer: {starts}. "
            "What sharpness pays once is in its time, in gradients: "
            f"{once} (user seconds, one thread, {setting['processor']}). –: not run, or "
            f"right at no setting tried. {versions}.",
            width=120,
        )

    def whole(self) -> str:
        """All that stands between the markers."""
        return f"{self.medians()}\n\n{self.table()}\n\n{self.caption()}"


MEANT = {
    "hindsight": "in hindsight",
    "flags": "fewest steps its flags accept",
    "rule": "a rule its user could apply",
}


def aimed(least: float, found: list[float]) -> str:
    """What was aimed at, and where it was missed."""
    missed = [task for task, ratio in zip(VALUES, found, strict=True) if ratio < least]
    return f"{least:g}×, " + (f"missed at {' and '.join(missed)}" if missed else "met")


def in_words(rows: list[Outcome]) -> str:
    """The median ratio, its range, and how many answers were wrong."""
    if not rows:
        return "–"
    found = [row["ratio"] for row in rows]
    text = f"{statistics.median(found):.1f}×"
    if len(found) > 1:
        text += f" ({min(found):.1f}–{max(found):.1f})"
    wrong = sum(bool(row.get("wrong")) for row in rows)
    return text + (f", {wrong} of {len(rows)} wrong" if wrong else "")


def write_page(found: Outcome) -> None:
    begin, end = "<!-- spectra:begin -->", "<!-- spectra:end -->"
    path = ROOT / "docs" / "benchmarks.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    text = f"{before}{begin}\n\n{Page(found).whole()}\n\n{end}{rest.partition(end)[2]}"
    path.write_text(text, encoding="utf-8")


# -- command -----------------------------------------------------------------------------


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("what", choices=("counts", "costs", "page"))
    add("cells", nargs="*", help="CASE:TASK:CONTENDER:START, or beginnings; all by default")
    options = parser.parse_args()
    if options.what == "page":
        write_page(load())
        return
    get_ready()
    torch.set_num_threads(1)
    with sdpa_kernel(SDPBackend.MATH):  # the default has no second derivative
        for case in CASES.values():
            if options.cells and not any(c.startswith(case.name) for c in options.cells):
                continue
            if options.what == "counts":
                count(case, tuple(options.cells))
            elif case.name not in load()["costs"]:
                save("costs", case.name, costs_of(case))


def load() -> Outcome:
    empty: Outcome = {"setting": {}, "truth": {}, "counts": {}, "costs": {}}
    return json.loads(TARGET.read_text()) if TARGET.exists() else empty


def save(part: str, name: str, outcome: Outcome) -> None:
    """Add a cell; several processes may, each its own."""
    packages = ("torch", "pyhessian", "hessian-eigenthings", "scipy")
    versions = {package: version_of(package) for package in packages}
    with FileLock(TARGET.with_suffix(".lock")):
        found = load()
        found[part][name] = outcome
        found["setting"] = {"processor": processor("cpu"), "versions": versions}
        part_file = TARGET.with_suffix(".part")
        part_file.write_text(json.dumps(found, indent=1) + "\n")
        part_file.replace(TARGET)


if __name__ == "__main__":
    main()
