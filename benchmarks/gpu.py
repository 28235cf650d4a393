"""What the library does on one GPU, in one command of at most eight minutes.

    python benchmarks/gpu.py --data-dir FOLDER [--only PART ...] [--output PATH]
                             [--limit SECONDS] [--rehearse]

The parts, in this order:

- tests: those that need CUDA, in a process of their own;
- products: one Hessian-vector product on F1, C1, ResNet-20 and a network of GPT-2's small
  shape (embedding and head tied, random weights), beside the peers that are installed, on
  one batch of random inputs;
- top5: the five largest eigenvalues of the same networks;
- training: F1 on MNIST from five starting points, stacked and one by one;
- c1: C1 on CIFAR-10 with a small and a large batch, then phi and lambda_max;
- phi: epsilon-sharpness of F1 and C2 at their starting points, on random inputs.

MNIST and CIFAR-10 are read from FOLDER and not downloaded; without them their parts are
skipped. Each part has its share of the time and is made of steps. A step that fails is
noted in one line, one that the time does not reach as not run. A training that would take
too long ends after an epoch: F1's time is then extrapolated, and the record says so; C1 is
measured as it is by then.

Writes `gpu.json` beside this file, anew after every step, so that a kill loses one step.
Run again on the same card with the same versions and revision it does what is not done.

    {"rehearsal", "date", "device", "environment", "tf32", "settings", "conventions",
     "parts": {PART: {"status", "seconds", "steps": {STEP: {"status", ...}}}}}

A step that is done has the status "done", its `date`, `wall_seconds`, a `headline` and its
numbers; any other its status alone: "skipped: …", "failed: …" or "not run: out of time".

`--rehearse` does all of it on a CPU at tiny sizes in about a minute, on random data where
no FOLDER is named, and writes into a temporary folder. Its numbers mean nothing.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import products
import torch
from products import GRADIENT, Problem, in_one_line, say
from torch import Tensor, nn

from sharpness import EmpiricalRisk, eigenpairs, epsilon_sharpness
from sharpness._json import as_plain
from sharpness.lab import data, networks
from sharpness.lab.data import Dataset
from sharpness.lab.run import train
from sharpness.lab.stacked import train_together
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.record import environment

TARGET = Path(__file__).with_suffix(".json")
TESTS = products.ROOT / "tests" / "test_cuda.py"
SEEDS = 5
GOAL = 20.0  # seconds for the stacked training on an H100
AFTER = 15.0  # seconds kept for measuring C1 after its training
PEERS = ("pyhessian", "hessian-eigenthings", "curvlinops")
COMPILED = "sharpness compiled"
CONTENDERS = {
    "sharpness": products.sharpness("auto"),
    COMPILED: products.sharpness("compiled"),
}
CONTENDERS |= {name: products.PRODUCTS[name] for name in PEERS}
# Published float32 peaks without tensor cores, TFLOP/s.
PEAKS = {"H100 80GB HBM3": 67.0, "H100 PCIe": 51.0, "H200": 67.0, "A100": 19.5}
CONVENTIONS = {
    "gflops_per_second": "a gradient's operations are what FlopCounterMode counts in its "
    "two passes; the useful work of a product is counted as that of two gradients",
    "ratio": "a product's time over that of one eager gradient, median over rounds in turn",
    "share_of_peak": "of the card's published float32 peak without tensor cores",
    "peak_bytes": "the most allocated, less what was before the contender was built",
    "bookkeeping_per_evaluation": "seconds of the search beside values with gradients",
    "training": "seconds of all that the runs do, and of an epoch of all five",
}
# By name: in earnest, and in a rehearsal.
SIZES: dict[str, tuple[Any, Any]] = {
    "samples": (  # of a product
        {"F1": 8192, "C1": 1024, "ResNet-20": 1024, "GPT-2-small": 4},
        {"F1": 64, "C1": 4, "ResNet-20": 4, "GPT-2-small": 4},
    ),
    "gpt": (
        {"vocabulary": 50257, "length": 1024, "width": 768, "depth": 12, "heads": 12},
        {"vocabulary": 50, "length": 16, "width": 16, "depth": 2, "heads": 2},
    ),
    "tokens": (512, 8),  # of a sequence
    "rounds": (7, 2),
    "compiled": (("F1", "C1"), ()),  # the others take half a minute to compile
    "max_hvps": (None, 10),
    "num_train": (None, 20),  # None: the whole data set
    "num_test": (None, 10),
    "epochs": (100, 1),
    "f1_batch": (256, 10),
    "c1_batches": ((256, 5000), (10, 20)),
    "c1_measured": (5000, 5),
    "phi_networks": (("F1", "C2"), ("F1", "ResNet-8")),  # in C2's stead
    "phi_samples": (1000, 8),
    "max_iter": (10, 2),  # of epsilon-sharpness
}


class Skipped(Exception):
    """A step cannot be run here; the message says why."""


class Enough(Exception):
    """The time of a training is over."""


@dataclass(kw_only=True)
class Bench:
    """Where the steps run, on what, and how large; the last network is kept."""

    rehearsal: bool
    data_dir: Path | None
    datasets: dict[str, Dataset] = field(default_factory=dict)
    studied: tuple[str, Problem, Tensor, dict[str, int]] | None = None

    def __post_init__(self) -> None:
        self.device = torch.device("cpu" if self.rehearsal else "cuda")
        self.sizes = {name: pair[self.rehearsal] for name, pair in SIZES.items()}

    def dataset(self, name: str) -> Dataset:
        if name not in self.datasets:
            self.datasets[name] = loaded(name, self)
        return self.datasets[name]

    def study(self, network: str) -> tuple[Problem, Tensor, dict[str, int]]:
        """A network's problem, its exact product and its operations."""
        if self.studied is None or self.studied[0] != network:
            self.studied = None  # its memory is free before the next is built
            problem = built(network, self)
            exact, flops = products.exact_product(problem), products.count_flops(problem)
            self.studied = network, problem, exact, flops
        return self.studied[1:]


Step = Callable[[Bench, float], dict[str, Any]]  # takes the seconds it may spend

# -- data and networks -------------------------------------------------------------------


def loaded(name: str, bench: Bench) -> Dataset:
    """A data set from its files in the folder."""
    numbers = {part: bench.sizes[part] for part in ("num_train", "num_test")}
    if bench.data_dir is None:
        if bench.rehearsal:
            return synthetic(name, **numbers)
        raise Skipped(f"{name} is read from a folder, and --data-dir names none")
    table = (resources.files("sharpness.lab") / "published.json").read_text()
    there = {path.name.removesuffix(".gz") for path in bench.data_dir.rglob("*")}
    for file in json.loads(table)[name]["files"]:
        if file not in there:
            raise Skipped(f"{name} needs {file} in {bench.data_dir}")
    return data.load(name, data_dir=bench.data_dir, **numbers)


def synthetic(name: str, num_train: int, num_test: int) -> Dataset:
    shape = (1, 28, 28) if name == "mnist" else (3, 32, 32)
    draw = torch.Generator().manual_seed(0)
    train_part, test_part = (
        (torch.rand(num, *shape, generator=draw), torch.arange(num) % 10)
        for num in (num_train, num_test)
    )
    parts = {"train": train_part, "test": test_part}
    return Dataset(name=name, **parts, num_classes=10, source="random numbers")


def built(network: str, bench: Bench) -> Problem:
    samples, sizes = bench.sizes["samples"][network], bench.sizes["gpt"]
    if network != "GPT-2-small":
        return products.build(products.Case(network, samples, 1), bench.device)
    torch.manual_seed(0)
    model = networks.NETWORKS["GPT"](**sizes)
    model.head[1].weight = model.tokens.weight  # as in GPT-2
    networks.initialise(model, 0)
    tokens = torch.randint(sizes["vocabulary"], (2, samples, bench.sizes["tokens"]))
    pair = tuple(tokens.to(bench.device))
    v = torch.randn(sum(p.numel() for p in model.parameters())).to(bench.device)
    case = products.Case("GPT", samples, 1)
    return Problem(case, model.to(bench.device).eval(), [pair], v)


def risk_on(model: nn.Module, pair: Any, mode: Any, bench: Bench) -> EmpiricalRisk:
    loss = nn.CrossEntropyLoss()
    return EmpiricalRisk(model, loss, pair, batchnorm=mode, device=bench.device)


# -- tests -------------------------------------------------------------------------------


def cuda_tests(bench: Bench, seconds: float) -> dict[str, Any]:
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    quiet = {"capture_output": True, "text": True, "timeout": seconds}
    run = subprocess.run(command, cwd=products.ROOT, **quiet)
    lines = (run.stdout.strip() or run.stderr.strip()).splitlines()[-8:]
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]):
        counts[word] = int(number)
    headline = ", ".join(f"{number} {word}" for word, number in counts.items())
    facts = {"return_code": run.returncode, "last_lines": lines, "headline": headline}
    return counts | facts


# -- products ----------------------------------------------------------------------------


def product(bench: Bench, seconds: float, network: str, contender: str) -> dict[str, Any]:
    """One Hessian-vector product, with one gradient beside it in turn."""
    try:
        import_module(contender.split()[0].replace("-", "_"))
    except ImportError as error:
        raise Skipped(f"no {contender} ({in_one_line(error)})") from None
    problem, exact, flops = bench.study(network)
    before = allocated(bench.device)
    live, facts = products.prepare(CONTENDERS[contender], problem, exact)
    facts |= on_a_gpu(live.run, before, bench.device)
    both = {GRADIENT: products.eager_gradient(problem), contender: live}
    both[GRADIENT].run()
    times = products.race(both, bench.sizes["rounds"], problem)
    facts |= rates(times[contender], times[GRADIENT], flops["gradient"], bench.device)
    facts |= {"wrong": facts["relative_error"] > products.WRONG, "flops": flops}
    facts |= {"parameters": problem.v.numel(), "samples": problem.case.samples}
    headline = f"{network}: {contender} {facts['ratio']:.2f} gradients a product"
    return facts | live.facts() | {"headline": headline}


def rates(
    mine: list[float], units: list[float], flops: int, device: torch.device
) -> dict[str, Any]:
    seconds, peak = statistics.median(mine), peak_of(device)
    rate = 2 * flops / seconds / 1e9
    return {
        "seconds_per_product": seconds,
        "seconds_per_gradient": statistics.median(units),
        "ratio": statistics.median(a / b for a, b in zip(mine, units, strict=True)),
        "gflops_per_second": rate,
        "share_of_peak": None if peak is None else rate / 1e3 / peak,
        "rounds": {"products": mine, "gradients": units},
    }


def peak_of(device: torch.device) -> float | None:
    name = products.processor(device.type)
    if "NVL" in name or "MIG" in name:  # other than the card whose name it begins with
        return None
    return next((peak for card, peak in PEAKS.items() if f"NVIDIA {card}" in name), None)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def on_a_gpu(run: Callable[[], Any], before: int, device: torch.device) -> dict[str, Any]:
    """Peak memory of a call, and how often it makes the CPU wait for the GPU."""
    if device.type != "cuda":
        return {"peak_bytes": None, "synchronisations": None}
    torch.cuda.reset_peak_memory_stats(device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing" in str(warning.message) for warning in seen)
    peak = torch.cuda.max_memory_allocated(device) - before
    return {"peak_bytes": peak, "synchronisations": waits}


# -- eigenvalues -------------------------------------------------------------------------


def top5(bench: Bench, seconds: float, network: str) -> dict[str, Any]:
    problem = built(network, bench)
    risk = risk_on(problem.model, problem.batches, "running", bench)
    facts = eigenvalues(risk, 5, bench, seconds)
    return facts | {"headline": f"{network}: {facts['headline']}"}


def eigenvalues(
    risk: EmpiricalRisk, k: int, bench: Bench, seconds: float
) -> dict[str, Any]:
    limits = {"max_hvps": bench.sizes["max_hvps"], "max_seconds": seconds}
    pairs = eigenpairs(risk, k=k, seed=0, progress=False, **limits)
    return {"eigenpairs": as_plain(pairs), "headline": f"{pairs}, {pairs.status}"}


# -- training ----------------------------------------------------------------------------


def timed_epochs(run: Callable[..., Any], epochs: int, seconds: float) -> dict[str, Any]:
    """A training to its end, or to the first epoch that ends after `seconds`."""
    marks = [time.monotonic()]

    def on_epoch(epoch: int, loss: float) -> None:
        marks.append(time.monotonic())
        if epoch < epochs and marks[-1] - marks[0] > seconds:
            raise Enough

    with suppress(Enough):
        run(on_epoch=on_epoch)
    taken, done = time.monotonic() - marks[0], len(marks) - 1
    first = marks[1] - marks[0]  # with what is paid once
    each = (marks[-1] - marks[1]) / (done - 1) if done > 1 else first
    total = taken if done == epochs else first + (epochs - 1) * each
    facts = {"epochs": done, "epochs_asked": epochs, "extrapolated": done < epochs}
    return facts | {"seconds": total, "seconds_per_epoch": each}


def common(bench: Bench, name: str) -> dict[str, Any]:
    budget = StoppingCriteria(epochs=bench.sizes["epochs"])
    return {"budget": budget, "dataset": bench.dataset(name), "device": bench.device}


def f1_runs(bench: Bench, folder: str) -> dict[Path, Training]:
    size = bench.sizes["f1_batch"]
    runs = [Training(network="F1", batch_size=size, seed=seed) for seed in range(SEEDS)]
    return {Path(folder, f"{run.seed}.pt"): run for run in runs}


def stacked(bench: Bench, seconds: float) -> dict[str, Any]:
    """All starting points as one model."""
    fixed = common(bench, "mnist")
    with tempfile.TemporaryDirectory() as folder:
        runs = f1_runs(bench, folder)
        run = partial(train_together, list(runs.values()), paths=list(runs), **fixed)
        facts = of_all("stacked", [timed_epochs(run, bench.sizes["epochs"], seconds)])
    met = None if bench.rehearsal else facts["seconds"] < GOAL
    headline = f"{facts['headline']} (goal on an H100: {GOAL:g} s)"
    return facts | {"goal_seconds": GOAL, "goal_met": met, "headline": headline}


def one_by_one(bench: Bench, seconds: float) -> dict[str, Any]:
    fixed, epochs, times = common(bench, "mnist"), bench.sizes["epochs"], []
    with tempfile.TemporaryDirectory() as folder:
        for path, training in f1_runs(bench, folder).items():
            run = partial(train, training, path=path, **fixed)
            times.append(timed_epochs(run, epochs, seconds / SEEDS))
    return of_all("one by one", times)


def of_all(name: str, times: list[dict[str, Any]]) -> dict[str, Any]:
    """Trainings one after another as one; epochs are those of the shortest."""
    facts = {key: min(run[key] for run in times) for key in ("epochs", "epochs_asked")}
    facts |= {
        key: sum(run[key] for run in times) for key in ("seconds", "seconds_per_epoch")
    }
    facts |= {"extrapolated": any(run["extrapolated"] for run in times), "runs": SEEDS}
    how = f", from {facts['epochs']}" if facts["extrapolated"] else ""
    headline = (
        f"{name}: {SEEDS} x {facts['epochs_asked']} epochs in {facts['seconds']:.1f} s"
    )
    return facts | {"headline": headline + how}


# -- C1 ----------------------------------------------------------------------------------


def c1(bench: Bench, seconds: float, batch_size: int) -> dict[str, Any]:
    """ModelSpec for as long as there is time, then measured with batch statistics."""
    training, kept = Training(network="C1", batch_size=batch_size), {}
    fixed = common(bench, "cifar10")

    def keep(update: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        kept["model"] = model

    with tempfile.TemporaryDirectory() as folder:
        run = partial(train, training, path=Path(folder, "a.pt"), on_update=keep, **fixed)
        limit = min(60.0, max(1.0, seconds - AFTER))
        times = timed_epochs(run, bench.sizes["epochs"], limit)
    facts = {key: times[key] for key in ("epochs", "epochs_asked", "seconds_per_epoch")}
    facts |= accuracies(kept["model"], fixed["dataset"], bench)
    facts |= sharpness_of(kept["model"], fixed["dataset"], bench)
    score = f"{facts['epochs']} epochs, test accuracy {facts['test_accuracy_batch']:.1%}"
    sharp = f"phi {facts['phi']['phi']:.4g} %, {facts['lambda_max']['headline']}"
    return facts | {"headline": f"batch {batch_size}: {score}, {sharp}"}


def accuracies(model: nn.Module, dataset: Dataset, bench: Bench) -> dict[str, float]:
    return {
        f"{split}_accuracy_{mode}": risk_on(model, pair, mode, bench).accuracy()
        for mode in ("batch", "running")
        for split, pair in (("train", dataset.train), ("test", dataset.test))
    }


def sharpness_of(model: nn.Module, dataset: Dataset, bench: Bench) -> dict[str, Any]:
    risk = risk_on(
        model, dataset.balanced_subset(bench.sizes["c1_measured"]), "batch", bench
    )
    half = 10 * AFTER if bench.rehearsal else AFTER / 2
    limits = {"max_iter": bench.sizes["max_iter"], "max_seconds": half}
    found = epsilon_sharpness(risk, 1e-3, progress=False, **limits)
    top = eigenvalues(risk, 1, bench, half)
    return {"measured_samples": risk.num_samples, "phi": as_plain(found), "lambda_max": top}


# -- epsilon-sharpness -------------------------------------------------------------------


def phi(bench: Bench, seconds: float, network: str) -> dict[str, Any]:
    """At the starting point, with batch statistics: it is the search that is timed."""
    model, num = networks.NETWORKS[network](), bench.sizes["phi_samples"]
    networks.initialise(model, 0)
    torch.manual_seed(0)
    shape = (1, 28, 28) if network == "F1" else (3, 32, 32)
    pair = torch.randn(num, *shape), torch.randint(10, (num,))
    risk = risk_on(model.to(bench.device), pair, "batch", bench)
    facts = {"network": network, "parameters": risk.n, "samples": num}
    facts |= search(risk, bench.sizes["max_iter"], seconds)
    rest = f"{1e3 * facts['bookkeeping_per_evaluation']:.3g} ms of bookkeeping each"
    begin = f"{network}: {facts['evaluations']} evaluations in {facts['seconds']:.2f} s"
    return facts | {"headline": f"{begin}, {rest}"}


def search(risk: EmpiricalRisk, max_iter: int, seconds: float) -> dict[str, Any]:
    """Epsilon-sharpness, and the part of its time that is not evaluations."""
    spent, plain = [], risk.value_and_gradient
    plain()  # what is paid once

    def timed(theta: Tensor | None = None) -> tuple[float, Tensor]:
        began = waited(risk.device)
        result = plain(theta)
        spent.append(waited(risk.device) - began)
        return result

    risk.value_and_gradient = timed  # type: ignore[method-assign]
    limits, began = {"max_iter": max_iter, "max_seconds": seconds}, waited(risk.device)
    found = epsilon_sharpness(risk, 1e-3, progress=False, **limits)
    taken = waited(risk.device) - began
    rest = (taken - sum(spent)) / len(spent)
    facts = {"seconds": taken, "evaluations": len(spent), "phi": as_plain(found)}
    gradient = statistics.median(spent)
    return facts | {"seconds_per_gradient": gradient, "bookkeeping_per_evaluation": rest}


def waited(device: torch.device) -> float:
    """The time at which all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- parts and steps ---------------------------------------------------------------------


def steps_of_products(sizes: dict[str, Any]) -> dict[str, Step]:
    return {
        f"{network}: {name}": partial(product, network=network, contender=name)
        for network in sizes["samples"]
        for name in CONTENDERS
        if name != COMPILED or network in sizes["compiled"]
    }


def steps_of_top5(sizes: dict[str, Any]) -> dict[str, Step]:
    return {name: partial(top5, network=name) for name in sizes["samples"]}


def steps_of_c1(sizes: dict[str, Any]) -> dict[str, Step]:
    return {f"batch {size}": partial(c1, batch_size=size) for size in sizes["c1_batches"]}


def steps_of_phi(sizes: dict[str, Any]) -> dict[str, Step]:
    named = zip(("F1", "C2"), sizes["phi_networks"], strict=True)
    return {label: partial(phi, network=network) for label, network in named}


# The seconds of each part, and its steps by the sizes.
PARTS: dict[str, tuple[float, Callable[[dict[str, Any]], dict[str, Step]]]] = {
    "tests": (90, lambda sizes: {"CUDA tests": cuda_tests}),
    "products": (85, steps_of_products),
    "top5": (50, steps_of_top5),
    "training": (80, lambda sizes: {"stacked": stacked, "one by one": one_by_one}),
    "c1": (150, steps_of_c1),
    "phi": (25, steps_of_phi),
}


def steps_left(part: str, bench: Bench, found: dict[str, Any], end: float) -> Iterator[str]:
    """Take the steps that are not done; `found` grows, and is to be saved at each."""
    seconds, steps = PARTS[part][0], PARTS[part][1](bench.sizes)
    if bench.rehearsal:  # on whatever machine, it comes to its end
        seconds *= 10
    deadline = min(time.monotonic() + seconds, end)
    todo = [name for name in steps if found.get(name, {}).get("status") != "done"]
    for place, name in enumerate(todo):
        left = deadline - time.monotonic()
        share = left / (len(todo) - place)  # what one leaves, the others have
        late = {"status": "not run: out of time"}
        found[name] = outcome(steps[name], bench, share) if left > 0 else late
        products.start_afresh()
        yield name


def outcome(step: Step, bench: Bench, seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    try:
        facts = step(bench, seconds)
    except Skipped as reason:
        return {"status": f"skipped: {reason}"}
    except Exception as error:  # the others go on
        return {"status": f"failed: {in_one_line(error)}"}
    date = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    taken = time.monotonic() - began
    return as_plain({"status": "done", "date": date, "wall_seconds": taken, **facts})


def summed_up(steps: dict[str, Any]) -> dict[str, Any]:
    every = [step["status"] for step in steps.values()]
    mixed = f"{every.count('done')} of {len(every)} done"
    seconds = sum(step.get("wall_seconds", 0.0) for step in steps.values())
    status = every[0] if len(set(every)) == 1 else mixed
    return {"status": status, "seconds": seconds, "steps": steps}


def line(name: str, part: dict[str, Any]) -> str:
    done = [step["headline"] for step in part["steps"].values() if "headline" in step]
    return "; ".join([f"{name}: {part['status']}, {part['seconds']:.0f} s", *done[:1]])


# -- page --------------------------------------------------------------------------------


def page(record: dict[str, Any]) -> str:
    """The record as Markdown: products beside the peers, and a line for each other step."""
    parts, device = record["parts"], record["device"]
    products_ = parts.get("products", {"steps": {}})["steps"]
    heads = ["network, samples", "gradient, ms", *CONTENDERS]
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    for network in record["settings"]["sizes"]["samples"]:
        cells = [products_.get(f"{network}: {name}", {}) for name in CONTENDERS]
        rows.append([*_labels(network, cells), *map(_ratio, cells)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    told = [
        f"- {name}, {step}: {_told(name, facts)}."
        for name, part in parts.items()
        if name != "products"
        for step, facts in part["steps"].items()
    ]
    about, rounds = record["environment"], record["settings"]["sizes"]["rounds"]
    caption = (
        f"One Hessian-vector product on one {device['name']}, in eager gradients of the "
        f"same batch (median of {rounds} rounds in turn; float32 without TF32; "
        f"torch {about['torch']}, driver {device['driver']}, {record['date']}). "
        "Lower is faster; —: not run."
    )
    return "\n\n".join(["\n".join(lines), textwrap.fill(caption, 120), "\n".join(told)])


def _told(part: str, facts: dict[str, Any]) -> str:
    if part != "top5" or facts["status"] != "done":
        return str(facts.get("headline", facts["status"]))
    cost, status = facts["eigenpairs"]["cost"], facts["eigenpairs"]["status"]
    return f"{cost['products']} products, {cost['seconds']:.1f} s, {status}"


def _labels(network: str, cells: Sequence[dict[str, Any]]) -> list[str]:
    done = [cell for cell in cells if cell.get("status") == "done"]
    if not done:
        return [network, "—"]
    seconds = statistics.median(cell["seconds_per_gradient"] for cell in done)
    return [f"{network}, {done[0]['samples']}", f"{1e3 * seconds:.3g}"]


def _ratio(cell: dict[str, Any]) -> str:
    if cell.get("status") != "done":
        return "—"
    return f"{cell['ratio']:.2f}" + (" (wrong)" if cell["wrong"] else "")


# -- command -----------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data-dir", type=Path, metavar="FOLDER", help="where MNIST and CIFAR-10 lie")
    add("--rehearse", action="store_true", help="all of it on a CPU, at tiny sizes")
    add("--output", type=Path, metavar="PATH", help="(default: gpu.json beside this file)")
    add("--limit", type=float, default=480.0, metavar="SECONDS", help="(default: 480)")
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    return parser.parse_args(arguments)


def true_float32() -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()
    assert (matmul, cudnn, precision) == (False, False, "highest")
    return {"matmul": matmul, "cudnn": cudnn, "float32_matmul_precision": precision}


def device_facts(device: torch.device) -> dict[str, Any]:
    facts = {"name": products.processor(device.type), "cuda": torch.version.cuda}
    facts |= {"peak_float32_tflops": peak_of(device), "memory_bytes": None, "driver": None}
    if device.type == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        facts["driver"] = driver()
    return facts


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, text=True, timeout=10).split()[0]
    return None


def new_record(bench: Bench, limit: float) -> dict[str, Any]:
    facts = {
        "rehearsal": bench.rehearsal,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "device": device_facts(bench.device),
        "environment": environment(),
        "tf32": true_float32(),
        "settings": {"limit": limit, "sizes": bench.sizes},
        "conventions": CONVENTIONS,
        "parts": {},
    }
    return as_plain(facts)


def carried_on(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """What stands at `path`, where it is of the same making; else the new record."""
    if not path.exists():
        return record
    found = json.loads(path.read_text())
    if making(found) == making(record):
        return found
    if record["rehearsal"] and not found["rehearsal"]:
        sys.exit(f"`--output` must not be a measurement's file in a rehearsal; got {path}.")
    say(f"{path} is of another card, version or revision: begun afresh")
    return record


def making(record: dict[str, Any]) -> list[Any]:
    versions = ("sharpness", "torch", "git_revision")
    facts = [record["environment"][name] for name in versions]
    return [
        record["rehearsal"],
        record["device"]["name"],
        record["settings"]["sizes"],
        *facts,
    ]


def save(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partly = path.with_suffix(".part")
    partly.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    partly.replace(path)


def where_to(options: argparse.Namespace) -> Path:
    if options.output is None and options.rehearse:
        return Path(tempfile.mkdtemp(prefix="rehearsal-"), TARGET.name)
    return options.output or TARGET


def main(arguments: Sequence[str] | None = None) -> None:
    began, options = time.monotonic(), parse(arguments)
    if not (options.rehearse or torch.cuda.is_available()):
        say("gpu.py needs a CUDA device; got none. `--rehearse` tries it out on a CPU.")
        sys.exit(2)
    warnings.simplefilter("ignore")
    path = where_to(options)
    bench = Bench(rehearsal=options.rehearse, data_dir=options.data_dir)
    record = carried_on(new_record(bench, options.limit), path)
    for part in (name for name in PARTS if name in (options.only or PARTS)):
        steps = record["parts"].get(part, {}).get("steps", {})
        for _ in steps_left(part, bench, steps, began + options.limit):
            record["parts"][part] = summed_up(steps)
            save(record, path)
        bench.studied = None
        print(line(part, record["parts"][part]), flush=True)
    print(f"raw numbers: {path}")


if __name__ == "__main__":
    main()
