"""What a search was said to take, beside what it took: seconds, bytes and products.

    python benchmarks/costs.py [CASE ...] [--rounds 3]
    python benchmarks/costs.py --readme

Five networks at their initialisation, random inputs and labels, one thread. In each round a
fresh process makes the plan (`sharpness.measures.costs.predicted_costs`: two products and a
dozen Lanczos steps), and another one looks for five eigenpairs with as many products as the
plan assumed, neither more nor fewer. Compared are

- seconds of processor time of the whole call, set-up included (other programs share the
  machine): the median over rounds of the ratio within a round;
- the peak of resident memory above what was held before the call. Once more with an
  allocator that gives back what is freed (glibc's `MALLOC_MMAP_THRESHOLD_`), which tells
  what the search holds from what the heap keeps;
- products: the number assumed beside the number that the search needs at `tol=1e-2`.

Writes `costs.json` beside this file, case by case; `--readme` puts the table between the
markers in docs/concepts/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sharpness import EmpiricalRisk, eigenpairs
from sharpness.lab import networks
from sharpness.measures.costs import predicted_costs, usual_products
from sharpness.record import environment

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "concepts" / "scale.md"
MARKS = "<!-- costs:begin -->", "<!-- costs:end -->"
K, SEED = 5, 0
_UNREACHED = 1e-12  # a tolerance that no search meets, so that it makes all its products
_Data = tuple[Tensor, Tensor]


def images(num: int, *shape: int) -> _Data:
    """Random inputs and labels of ten classes."""
    return torch.randn(num, *shape), torch.randint(10, (num,))


def tokens(num: int, length: int, vocabulary: int) -> _Data:
    """Random tokens, and the ones to be foretold."""
    drawn = torch.randint(vocabulary, (num, length + 1))
    return drawn[:, :-1], drawn[:, 1:]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], _Data]]] = {
    "F1, 1000 samples": (networks.f1, lambda: images(1000, 784)),
    "C1, 8 samples": (networks.c1, lambda: images(8, 3, 32, 32)),
    "ResNet-20, 16 samples": (lambda: networks.resnet(3), lambda: images(16, 3, 32, 32)),
    "GPT, 16 sequences of 64": (
        lambda: networks.gpt(256, 64, width=128, depth=2),
        lambda: tokens(16, 64, 256),
    ),
    "MLP, 64 samples": (
        lambda: networks.mlp(784, 10, width=4096, depth=2),
        lambda: images(64, 784),
    ),
}
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}  # bytes: larger blocks are unmapped


def risk_of(case: str) -> EmpiricalRisk:
    """The network and data of a case, the same in every process."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    make, draw = CASES[case]
    return EmpiricalRisk(make().eval(), nn.CrossEntropyLoss(), draw())


def plan(case: str) -> dict[str, Any]:
    """What a search is said to take."""
    costs = predicted_costs(risk_of(case), K, clock=time.process_time)
    return {**asdict(costs), "seconds": costs.seconds}


def run(case: str) -> dict[str, Any]:
    """What one takes that makes as many products."""
    risk = risk_of(case)
    held = _peak_begins()
    began = time.process_time()
    most = usual_products(K)
    found = eigenpairs(risk, K, tol=_UNREACHED, max_hvps=most, progress=False)
    seconds = time.process_time() - began
    return {
        "n": risk.n,
        "seconds": seconds,
        "peak_bytes": _peak() - held,
        "products": found.num_hvps,
    }


def usual(case: str) -> dict[str, Any]:
    """How many products a search needs at the tolerance that is usual."""
    found = eigenpairs(risk_of(case), K, progress=False)
    return {"products": found.num_hvps, "status": str(found.status)}


def _peak_begins() -> int:
    """Bytes that are resident; the peak is counted from now on (Linux, man 5 proc)."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


# -- each in a process of its own --------------------------------------------------------


def in_fresh_process(what: str, case: str, **variables: str) -> dict[str, Any]:
    """What `plan`, `run` or `usual` gives there."""
    call = [sys.executable, __file__, case, "--only", what]
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environ = {**os.environ, **common, **variables}
    told = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=environ)
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def compared(case: str, rounds: int) -> dict[str, Any]:
    """All of one case."""
    found: dict[str, Any] = {"plan": [], "run": []}
    for _ in range(rounds):
        for what, results in found.items():
            results.append(in_fresh_process(what, case))
    for what in ("plan", "run"):
        found[f"{what}, returned"] = [in_fresh_process(what, case, **_RETURNED)]
    return {**found, "usual": in_fresh_process("usual", case)}


# -- the table ---------------------------------------------------------------------------


def stored() -> dict[str, Any]:
    """What was measured so far."""
    found: dict[str, Any] = {"cases": {}}
    return json.loads(TARGET.read_text()) if TARGET.exists() else found


def middle(record: dict[str, Any], which: str, name: str) -> float:
    """The median over rounds."""
    return statistics.median(each[name] for each in record[which])


def apart(record: dict[str, Any], name: str, mode: str = "") -> float:
    """By how much the prediction was more than what was measured: median over rounds."""
    pairs = zip(record[f"plan{mode}"], record[f"run{mode}"], strict=True)
    return statistics.median(said[name] / took[name] - 1 for said, took in pairs)


def row(case: str, record: dict[str, Any]) -> str:
    """A line of the table: said, taken, and how far apart."""
    cells = [f"{case}, {record['run'][0]['n'] / 1e6:.2g} M"]
    cells += [f"{middle(record, which, 'seconds'):.3g}" for which in ("plan", "run")]
    cells += [f"{apart(record, 'seconds'):+.0%}"]
    for mode in (", returned", ""):
        both = (middle(record, which + mode, "peak_bytes") for which in ("plan", "run"))
        cells += [f"{each / 1e6:.0f}" for each in both]
        cells += [f"{apart(record, 'peak_bytes', mode):+.0%}"]
    cells += [str(record["plan"][0]["products"]), str(record["usual"]["products"])]
    return f"| {' | '.join(cells)} |"


def page(found: dict[str, Any]) -> str:
    """The table of docs/concepts/scale.md."""
    heads = ["network, parameters", "seconds said", "taken", "apart"]
    heads += ["MB said", "taken", "apart", "MB with glibc's heap said", "taken", "apart"]
    heads += ["products assumed", "needed"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    cases = [case for case in CASES if case in found["cases"]]
    return "\n".join([*lines, *(row(case, found["cases"][case]) for case in cases)])


def main() -> None:
    """Measure the cases asked for, or put the table on its page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {'; '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readme", action="store_true", help="put the table on its page")
    parser.add_argument("--only", choices=["plan", "run", "usual"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        what = {"plan": plan, "run": run, "usual": usual}[options.only]
        print(json.dumps(what(options.cases[0]), default=str))
        return
    found = stored()
    for case in [] if options.readme else options.cases or CASES:
        found["cases"][case] = compared(case, options.rounds)
        found["environment"] = environment()
        TARGET.write_text(json.dumps(found, indent=1) + "\n")
        print(row(case, found["cases"][case]), flush=True)
    if options.readme:
        before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        text = f"{before}{MARKS[0]}\n{page(found)}\n{MARKS[1]}{after}"
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
