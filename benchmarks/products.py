"""One Hessian-vector product: its time as a multiple of one gradient, beside the peers'.

    python benchmarks/products.py [CASE ...] [--device cuda] [--quick] [--again]
    python benchmarks/products.py --readme

Mean cross-entropy, float32, evaluation mode, random inputs and labels. A case is a network
with a number of samples in equal batches; every contender gets the same parameters,
batches and direction v, and computes H v:

- sharpness, its `kept_graph` and its `compiled` engine, one chunk a batch;
- PyHessian: one batch by its kept graph, several by `dataloader_hv_product` (its graph is
  kept for a single batch only, hence the cases of one batch);
- hessian-eigenthings: `HessianOperator.matvec`, exact autograd;
- curvlinops: `HessianLinearOperator @ v`, without its check that the data repeat.

Beside them runs one eager gradient of the same batches, the unit of the result. After
warm-up all take turns in one process, round by round, so that a change of the machine's
speed hits all; a ratio is taken within a round, and the median and the quartiles over
the rounds are reported. Also:

- set-up: the time to the first product less the median product, that is, what is paid
  once (building, tracing, compiling with empty caches; imports aside);
- error: distance to the product of a float64 copy, differentiated twice by hand,
  relative to its norm; beyond 1e-3 a contender is marked wrong;
- GFLOP/s: for a product, the operations of one backward pass through the graph of the
  gradient, divided by the time; the same count for all, so a contender that runs the
  network again at each product shows a lower rate;
- memory: the peak of a fresh process that does two products, above that of one that only
  computes a gradient.

PyTorch's fast attention kernels cannot be differentiated twice, so the peers run under
its "math" kernel where a network has attention. curvlinops is wrong on LayerNorm: its
`jvp` of a `jacrev` meets a derivative that PyTorch (2.13) gets wrong for the weight.

Prints a table for each case and writes every timing to `products.json` beside this file
(`products-cuda.json` on a GPU). A case that is there already, with the same versions,
sizes and threads, is not run again. `--readme` puts the table between the markers in
docs/benchmarks.md. The number of threads is set by the environment:
`OMP_NUM_THREADS=1 python …`.
The peers come with `pip install -e '.[bench]'`.
"""

import argparse
import copy
import gc
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sharpness import EmpiricalRisk
from sharpness.lab import networks
from sharpness.record import environment

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 9
WARM_UPS = 2
SHORTEST = 0.02  # seconds; a shorter call is repeated within one timing
WRONG = 1e-3
PEERS = ("pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch")
IMPORTED_FIRST = (
    "pyhessian",
    "hessian_eigenthings",
    "curvlinops",
    "torch._dynamo",
    "torch._inductor.compile_fx",
)

# -- networks --------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A)."""

    def __init__(self, wide_in: int, wide_out: int) -> None:
        super().__init__()
        self.stride, self.added = wide_out // wide_in, wide_out - wide_in
        self.first = nn.Conv2d(wide_in, wide_out, 3, self.stride, 1, bias=False)
        self.second = nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(wide_out) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        return F.relu(self.norms[1](self.second(inner)) + shortcut)


def resnet20() -> nn.Module:
    """The CIFAR network of He et al. (2016, section 4.2) with 20 layers."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [ResidualBlock(*pair) for pair in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


class AttentionBlock(nn.Module):
    """Causal self-attention and a GELU layer, each behind a LayerNorm and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))

    def attention(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        return self.merge(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A small language model; the logits are (N, vocabulary, T), as the loss wants."""

    vocabulary, length = 256, 64

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 5) -> None:
        super().__init__()
        self.token = nn.Embedding(self.vocabulary, width)
        self.position = nn.Embedding(self.length, width)
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(places)
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


NETWORKS = {
    "F1": networks.NETWORKS["F1"],
    "C1": networks.NETWORKS["C1"],
    "ResNet-20": resnet20,
    "GPT": GPT,
}

# -- cases -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    network: str
    samples: int
    batches: int

    @property
    def name(self) -> str:
        return self.network + ("-one-batch" if self.batches == 1 else "")

    @property
    def title(self) -> str:
        kind = f"sequences of {GPT.length} tokens" if self.attention else "samples"
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        return f"{self.network}, {self.samples} {kind} in {batches}"

    @property
    def attention(self) -> bool:
        return self.network == "GPT"

    @property
    def rows_of_a_batch(self) -> int:
        return self.samples // self.batches

    def small(self) -> "Case":
        return replace(self, samples=max(2 * self.batches, self.samples // 32))


CASES = (
    Case("F1", 4096, 4),
    Case("C1", 512, 4),
    Case("ResNet-20", 256, 4),
    Case("GPT", 32, 4),
    Case("F1", 1024, 1),
    Case("C1", 128, 1),
)


@dataclass
class Problem:
    """A case with its network, batches and direction."""

    case: Case
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    v: Tensor
    loss: nn.Module = field(default_factory=nn.CrossEntropyLoss)

    @property
    def pieces(self) -> list[Tensor]:
        """The direction as one tensor a parameter."""
        shapes = [p.shape for p in self.model.parameters()]
        parts = self.v.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def own_model(self) -> nn.Module:
        """A copy for a contender that changes `.grad` or the mode."""
        return copy.deepcopy(self.model)


def build(case: Case, device: torch.device) -> Problem:
    torch.manual_seed(0)
    model = NETWORKS[case.network]()
    networks.initialise(model, 0)
    inputs, targets = inputs_and_targets(case)
    v = torch.randn(sum(p.numel() for p in model.parameters())).to(device)
    rows = case.rows_of_a_batch
    pairs = zip(inputs.to(device).split(rows), targets.to(device).split(rows), strict=True)
    return Problem(case, model.to(device).eval(), list(pairs), v)


def inputs_and_targets(case: Case) -> tuple[Tensor, Tensor]:
    if case.attention:
        tokens = torch.randint(GPT.vocabulary, (2, case.samples, GPT.length))
        return tokens[0], tokens[1]
    shape = (1, 28, 28) if case.network == "F1" else (3, 32, 32)
    return torch.randn(case.samples, *shape), torch.randint(10, (case.samples,))


# -- contenders ------------------------------------------------------------------------


@dataclass
class Contender:
    """One call of `run` is one product; `facts` says how it was computed."""

    run: Callable[[], Any]
    facts: Callable[[], dict[str, Any]] = dict


Builder = Callable[[Problem], Contender]


def eager_gradient(problem: Problem) -> Contender:
    parameters, batches = list(problem.model.parameters()), problem.batches

    def gradient() -> list[Tensor]:
        total: list[Tensor] = []
        for x, y in batches:
            value = problem.loss(problem.model(x), y) / len(batches)
            parts = list(torch.autograd.grad(value, parameters))
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return total

    return Contender(gradient)


def sharpness(engine: str) -> Builder:
    def built(problem: Problem) -> Contender:
        risk = EmpiricalRisk(
            problem.own_model(),
            problem.loss,
            problem.batches,
            chunk_size=problem.case.rows_of_a_batch,
            engine=engine,
        )

        def facts() -> dict[str, Any]:
            settings = risk.settings()
            ran = settings["engine"]["engine"]
            return {"asked": engine, "engine": ran, "settings": settings}

        return Contender(lambda: risk.hvp(problem.v), facts)

    return built


def math_attention(builder: Builder) -> Builder:
    """Peers leave the kernel to the user; the default has no second derivative."""

    @wraps(builder)
    def built(problem: Problem) -> Contender:
        if not problem.case.attention:
            return builder(problem)
        with sdpa_kernel(SDPBackend.MATH):
            inner = builder(problem)

        def run() -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                return inner.run()

        return Contender(run, lambda: {**inner.facts(), "math_attention": True})

    return built


@math_attention
def pyhessian(problem: Problem) -> Contender:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    one = len(problem.batches) == 1
    data = {"data": problem.batches[0]} if one else {"dataloader": problem.batches}
    on_gpu = problem.v.is_cuda
    peer = hessian(problem.own_model(), problem.loss, **data, cuda=on_gpu)
    pieces = problem.pieces
    if one:
        return Contender(
            lambda: hessian_vector_product(peer.gradsH, peer.params, pieces),
            lambda: {"engine": "kept graph"},
        )
    return Contender(
        lambda: peer.dataloader_hv_product(pieces)[1], lambda: {"engine": "loader"}
    )


@math_attention
def hessian_eigenthings(problem: Problem) -> Contender:
    from hessian_eigenthings import HessianOperator, supervised_loss

    loss = supervised_loss(problem.loss)
    model = problem.own_model()
    operator = HessianOperator(model, problem.batches, loss, method="autograd")
    return Contender(lambda: operator.matvec(problem.v), lambda: {"engine": "autograd"})


@math_attention
def curvlinops(problem: Problem) -> Contender:
    from curvlinops import HessianLinearOperator

    model, pieces = problem.own_model(), problem.pieces
    operator = HessianLinearOperator(
        model,
        problem.loss,
        list(model.parameters()),
        problem.batches,
        check_deterministic=False,
        num_data=problem.case.samples,
    )
    return Contender(lambda: operator @ pieces, lambda: {"engine": "jvp of jacrev"})


GRADIENT = "eager gradient"
PRODUCTS: dict[str, Builder] = {
    "sharpness kept_graph": sharpness("kept_graph"),
    "sharpness compiled": sharpness("compiled"),
    "pyhessian": pyhessian,
    "hessian-eigenthings": hessian_eigenthings,
    "curvlinops": curvlinops,
}
CONTENDERS: dict[str, Builder] = {GRADIENT: eager_gradient, **PRODUCTS}

# -- what is right, and how much work it is ----------------------------------------------


def exact_product(problem: Problem) -> Tensor:
    """H v in float64, each batch differentiated twice."""
    model = problem.own_model().double()
    pieces = [piece.double() for piece in problem.pieces]
    total = torch.zeros_like(problem.v, dtype=torch.float64)
    for x, y in problem.batches:
        x = x.double() if x.is_floating_point() else x
        with sdpa_kernel(SDPBackend.MATH):
            gradient = graph_of_gradient(problem.loss(model(x), y), model)
            total += flat(torch.autograd.grad(gradient, list(model.parameters()), pieces))
    return total / len(problem.batches)


def count_flops(problem: Problem) -> dict[str, int]:
    """Floating-point operations of one gradient and of a pass through its graph."""
    x, y = problem.batches[0]
    parameters = list(problem.model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as first:
            gradient = graph_of_gradient(problem.loss(problem.model(x), y), problem.model)
        with FlopCounterMode(display=False) as second:
            torch.autograd.grad(gradient, parameters, problem.pieces)
    counts = {"gradient": first.get_total_flops(), "product": second.get_total_flops()}
    return {name: len(problem.batches) * count for name, count in counts.items()}


def graph_of_gradient(value: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, list(model.parameters()), create_graph=True)


def flat(result: Any) -> Tensor:
    """A contender's product as one float64 vector."""
    parts = [result] if isinstance(result, Tensor) else list(result)
    return torch.cat([part.detach().double().reshape(-1) for part in parts])


# -- measuring -------------------------------------------------------------------------


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a case: every contender with its timings, or why it has none."""
    problem = build(case, torch.device(options.device))
    exact = exact_product(problem)
    live, entries = {}, {}
    for name, builder in CONTENDERS.items():
        say(f"{case.name}: preparing {name}")
        try:
            live[name], entries[name] = prepare(builder, problem, exact)
        except Exception as error:
            entries[name] = {"error": in_one_line(error)}
    say(f"{case.name}: {options.rounds} rounds of {len(live)} contenders")
    for name, seconds in race(live, options.rounds, problem).items():
        entries[name] |= {**live[name].facts(), "seconds": seconds}
    flops = count_flops(problem)
    summarise(entries, flops)
    row = {"case": case.name, "title": case.title, "setting": setting(case, options)}
    row |= {"parameters": problem.v.numel(), "flops": flops, "contenders": entries}
    return row | {"environment": environment(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def prepare(
    builder: Builder, problem: Problem, exact: Tensor
) -> tuple[Contender, dict[str, Any]]:
    began = time.perf_counter()
    contender = builder(problem)
    finish(problem)
    built = time.perf_counter() - began
    product = contender.run()
    finish(problem)
    first = time.perf_counter() - began
    for _ in range(WARM_UPS):
        product = contender.run()
    entry: dict[str, Any] = {"build_seconds": built, "first_product_seconds": first}
    if builder is not eager_gradient:
        error = float((flat(product) - exact).norm() / exact.norm())
        if not math.isfinite(error):
            raise ArithmeticError("the product is not finite.")
        entry["relative_error"] = error
    return contender, entry


def race(
    live: dict[str, Contender], rounds: int, problem: Problem
) -> dict[str, list[float]]:
    """Seconds of one call, for each contender and round; all take turns."""
    repeats = math.ceil(SHORTEST / timed(live[GRADIENT], problem, 1))
    seconds: dict[str, list[float]] = {name: [] for name in live}
    for _ in range(rounds):
        gc.collect()
        for name, contender in live.items():
            seconds[name].append(timed(contender, problem, repeats))
    return seconds


def timed(contender: Contender, problem: Problem, repeats: int) -> float:
    finish(problem)
    began = time.perf_counter()
    for _ in range(repeats):
        contender.run()
    finish(problem)
    return (time.perf_counter() - began) / repeats


def finish(problem: Problem) -> None:
    if problem.v.is_cuda:
        torch.cuda.synchronize()


def summarise(entries: dict[str, dict[str, Any]], flops: dict[str, int]) -> None:
    """Add to each entry what follows from its timings."""
    gradient = entries[GRADIENT]["seconds"]
    for name, entry in entries.items():
        if "error" in entry:
            continue
        seconds = entry["seconds"]
        ratios = [mine / unit for mine, unit in zip(seconds, gradient, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        entry["gradients"] = {"median": middle, "quartiles": [low, high]}
        entry["median_seconds"] = median = statistics.median(seconds)
        entry["setup_seconds"] = max(0.0, entry["first_product_seconds"] - median)
        count = flops["gradient" if name == GRADIENT else "product"]
        entry["gflops_per_second"] = count / median / 1e9
        entry["wrong"] = entry.get("relative_error", 0.0) > WRONG


def setting(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """What must agree for a measured case to stand."""
    packages = ("torch", "numpy", "sharpness", *PEERS)
    versions = {"python": platform.python_version()}
    return {
        "network": case.network,
        "samples": case.samples,
        "batches": case.batches,
        "rounds": options.rounds,
        "device": options.device,
        "processor": processor(options.device),
        "threads": torch.get_num_threads(),
        "versions": versions | {name: version_of(name) for name in packages},
    }


def version_of(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def in_one_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return textwrap.shorten(f"{type(error).__name__}: {first}", 160, placeholder=" …")


# -- memory ----------------------------------------------------------------------------


def add_memory(row: dict[str, Any], options: argparse.Namespace) -> None:
    """The peak of each contender in a process of its own, above that of a gradient."""
    entries = row["contenders"]
    say(f"{row['case']}: memory, in fresh processes")
    base = peak_in_fresh_process(row["case"], GRADIENT, options)
    for name in PRODUCTS:
        if base is not None and "error" not in entries[name]:
            peak = peak_in_fresh_process(row["case"], name, options)
            entries[name]["memory_bytes"] = None if peak is None else peak - base


def peak_in_fresh_process(
    case: str, contender: str, options: argparse.Namespace
) -> int | None:
    command = [sys.executable, __file__, "--only", f"{case}:{contender}"]
    command += ["--device", options.device, *(["--quick"] if options.quick else [])]
    with tempfile.TemporaryDirectory() as caches:
        place = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
        run = subprocess.run(command, env=place, capture_output=True, text=True)
    if run.returncode:
        say(f"no memory figure for {contender}:\n{run.stderr[-2000:]}")
        return None
    return int(json.loads(run.stdout.splitlines()[-1])["peak_bytes"])


def only(wanted: str, options: argparse.Namespace) -> None:
    """Run one contender of one case and print the peak of this process."""
    case, _, contender = wanted.partition(":")
    problem = build(chosen([case], options)[0], torch.device(options.device))
    live = CONTENDERS[contender](problem)
    for _ in range(1 if contender == GRADIENT else 2):
        live.run()
    finish(problem)
    print(json.dumps({"peak_bytes": peak_bytes(options.device)}))


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):  # unlike ru_maxrss it does not begin at the parent's size
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# -- showing ---------------------------------------------------------------------------


def show(row: dict[str, Any]) -> None:
    """The table of one case, in full."""
    gradient, product = (row["flops"][name] / 1e9 for name in ("gradient", "product"))
    grid = Table(
        title=f"{row['title']}: {row['parameters']} parameters, gradient "
        f"{gradient:.4g} GFLOP, product {product:.4g} GFLOP",
        box=SIMPLE_HEAD,
    )
    heads = "gradients (quartiles)|ms|GFLOP/s|set-up s|first s|memory MiB|error"
    for place, head in enumerate(["contender", "engine", *heads.split("|")]):
        grid.add_column(head, justify="left" if place < 2 else "right", no_wrap=True)
    for name, entry in row["contenders"].items():
        grid.add_row(name, *cells(entry))
    Console(width=max(140, shutil.get_terminal_size().columns)).print(grid)
    for name, entry in row["contenders"].items():
        if "error" in entry:
            print(f"{name}: {entry['error']}")
    sys.stdout.flush()


def cells(entry: dict[str, Any]) -> list[str]:
    if "error" in entry:
        return ["failed"]
    low, high = entry["gradients"]["quartiles"]
    memory, error = entry.get("memory_bytes"), entry.get("relative_error")
    attention = ", math" if entry.get("math_attention") else ""
    return [
        f"{entry.get('engine', '')}{attention}",
        f"{entry['gradients']['median']:.2f} ({low:.2f}–{high:.2f})",
        in_ms(entry),
        f"{entry['gflops_per_second']:.1f}",
        f"{entry['setup_seconds']:.2f}",
        f"{entry['first_product_seconds']:.2f}",
        "" if memory is None else f"{memory / 2**20:.0f}",
        "" if error is None else f"{error:.0e}" + (" wrong" if entry["wrong"] else ""),
    ]


def in_ms(entry: dict[str, Any]) -> str:
    milliseconds = 1e3 * entry["median_seconds"]
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: gradients a product, and why a number is missing."""
    heads = ["case", "gradient, ms", *(name.replace("_", " ") for name in PRODUCTS)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    notes: list[str] = []
    for row in rows:
        entries = row["contenders"]
        found = [cell(name, entries.get(name), notes) for name in PRODUCTS]
        line = [row["title"], in_ms(entries[GRADIENT]), *found]
        lines.append("| " + " | ".join(line) + " |")
    below = [f"({number}) {note}" for number, note in enumerate(notes, 1)]
    paragraphs = [textwrap.fill(text, 120) for text in [caption(rows), *below]]
    return "\n\n".join(["\n".join(lines), *paragraphs]) + "\n"


def cell(name: str, entry: dict[str, Any] | None, notes: list[str]) -> str:
    """A number with references to what must be said about it; `notes` grows."""
    reasons = said_about(name, entry)
    notes += [reason for reason in reasons if reason not in notes]
    marks = "".join(f" ({place + 1})" for place in sorted(map(notes.index, reasons)))
    failed = entry is None or "error" in entry or entry["wrong"]
    return ("—" if failed else f"{entry['gradients']['median']:.2f}") + marks


def said_about(name: str, entry: dict[str, Any] | None) -> list[str]:
    if entry is None:
        return [f"{name}: not run."]
    if "error" in entry:
        return [f"{name} failed: {entry['error'].replace('|', '/')}"]
    reasons = []
    if entry["wrong"]:
        reasons.append(f"{name} is wrong: relative error {entry['relative_error']:.1g}.")
    if entry.get("asked") and entry["asked"] != entry["engine"]:
        reasons.append(f"{name} stepped aside: `{entry['engine']}` ran.")
    if entry.get("math_attention"):
        reasons.append("Under PyTorch's math attention kernel, which its user must choose.")
    return reasons


def caption(rows: list[dict[str, Any]]) -> str:
    """What the numbers are, and where they were measured; differing facts side by side."""

    def each(fact: Callable[[dict[str, Any]], Any]) -> str:
        return " / ".join(sorted({str(fact(row["setting"])) for row in rows}))

    versions = [
        f"{name} {each(lambda setting, name=name: setting['versions'][name])}"
        for name in ("torch", *PEERS)
    ]
    return (
        "One Hessian-vector product, in gradients: its time over that of one eager "
        f"gradient of the same batches (median of {each(lambda s: s['rounds'])} rounds in "
        f"turn, after warm-up; float32; {each(lambda s: s['processor'])}, threads: "
        f"{each(lambda s: s['threads'])}; {', '.join(versions)}). Lower is faster."
    )


def write_readme(rows: list[dict[str, Any]], marker: str, readme: Path) -> None:
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if not rows:
        sys.exit(f"{marker}.json must hold a measured case; run without --readme first.")
    before, found, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        sys.exit(f"{readme.name} must have the markers {begin} and {end}; add them.")
    text = f"{before}{begin}\n\n{table(rows)}\n{end}{after}"
    readme.write_text(text, encoding="utf-8")


# -- command ---------------------------------------------------------------------------


def main() -> None:
    options = parse()
    warnings.simplefilter("ignore")
    if options.readme:
        write_readme(load(target(options)), stem(options), ROOT / "docs" / "benchmarks.md")
        return
    get_ready()
    if options.only:
        only(options.only, options)
        return
    with tempfile.TemporaryDirectory() as caches:  # so that compiling is timed cold
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        run(options)


def get_ready() -> None:
    """True float32, and imports that would count as set-up or memory of a contender."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for module in IMPORTED_FIRST:
        with suppress(ImportError):
            import_module(module)


def run(options: argparse.Namespace) -> None:
    path = target(options)
    for case in chosen(options.cases, options):
        rows = {row["case"]: row for row in load(path)}
        row = rows.get(case.name)
        if options.again or row is None or row["setting"] != setting(case, options):
            row = measure(case, options)
            start_afresh()
            if not options.no_memory:
                add_memory(row, options)
            save(path, in_order([*(rows | {case.name: row}).values()]))
        else:
            revision = row["environment"]["git_revision"]
            say(f"{case.name}: kept from {row['date']}, {revision}; --again measures anew")
        show(row)
    say(f"raw numbers: {path}")


def start_afresh() -> None:
    """What one case compiled must not count against the next one's recompile limit."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    names = [case.name for case in CASES]
    add("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)} (default: all)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to compute")
    add("--rounds", type=int, help=f"timings of each contender, >= 2 (default: {ROUNDS})")
    add("--quick", action="store_true", help="tiny sizes, 2 rounds, into runs/: a trial")
    add("--again", action="store_true", help="measure anew what is in the JSON already")
    add("--no-memory", action="store_true", help="leave out the processes for memory")
    add(
        "--readme",
        action="store_true",
        help="only rewrite the page from the JSON",
    )
    add("--only", metavar="CASE:CONTENDER", help="run one contender, print its peak memory")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else ROUNDS)
    if options.rounds < 2:
        parser.error(f"--rounds must be >= 2; got {options.rounds}.")
    if options.quick and options.readme:
        parser.error("--readme must go without --quick: a trial's numbers mean nothing.")
    case, _, contender = (options.only or f"{names[0]}:{GRADIENT}").partition(":")
    if unknown := {*options.cases, case} - set(names):
        parser.error(f"CASE must be of {', '.join(names)}; got {', '.join(unknown)}.")
    if contender not in CONTENDERS:
        parser.error(f"CONTENDER must be of {', '.join(CONTENDERS)}; got {contender!r}.")
    return options


def chosen(names: list[str], options: argparse.Namespace) -> list[Case]:
    cases = [case for case in CASES if not names or case.name in names]
    return [case.small() for case in cases] if options.quick else cases


def stem(options: argparse.Namespace) -> str:
    return "products-cuda" if options.device == "cuda" else "products"


def target(options: argparse.Namespace) -> Path:
    folder = ROOT / "runs" if options.quick else Path(__file__).parent
    return folder / f"{stem(options)}.json"


def load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    part.replace(path)


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = [case.name for case in CASES]
    return sorted(rows, key=lambda row: order.index(row["case"]))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
