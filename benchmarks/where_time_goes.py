"""Where the time of each measure goes: passes over the data, and what is beside them.

    python benchmarks/where_time_goes.py --before FOLDER [small F1 commands] [--samples N]
    python benchmarks/where_time_goes.py --docs

`--before` is a checkout of an earlier version (`git worktree add --detach FOLDER COMMIT`).
Each version runs in a process of its own; for every task both take their turn, in the
other order each time, on the same network, samples and seeds. What is counted is processor
time of one thread, since others may use the machine: forward passes (f, outputs,
accuracy), gradients, products (a block of directions as so many), gradients of single
samples, the check of derivatives, and all the rest, which is the library's own.

`F1` is the checkpoint of README's command (`python -m sharpness.train F1 --data mnist5k
--batch-size large --epochs 20 --seeds 1`), 1.5 million parameters; `small` a perceptron of
9840 parameters on digits. The density makes two of its ten starts, which are alike; "all"
counts it five times. `--samples 250` takes about ten minutes on two idle cores.
`commands` are whole ones, on one thread, in the order before, after, after, before: about
half an hour. They need MNIST (`SHARPNESS_DATA`).

Results go to `where_time_goes.json` beside this file; a task that is there is not run
again. `--docs` writes the tables into docs/where_time_goes.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).with_name("where_time_goes.json")
PAGE = ROOT / "docs" / "where_time_goes.md"
CHECKPOINT = ROOT / "runs" / "f1-mnist5k" / "large-seed0.pt"
KINDS = ("forward", "gradient", "product", "sample gradients", "check")
DENSITY_STARTS = 2  # of ten
COMMANDS = {
    "measure --measures all": "sharpness.measure {checkpoint} --measures all",
    "reproduce --quick": "sharpness.reproduce keskar2017 --quick --jobs 1",
}


# -- one version, in a process of its own ------------------------------------------------


class Passes:
    """Processor time and number of the passes, by kind; one inside another is its part."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.num: Counter[str] = Counter()
        self._inside = False

    @contextmanager
    def of(self, kind: str, num: int = 1) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside, began = True, time.process_time()
        try:
            yield
        finally:
            self.seconds[kind] += time.process_time() - began
            self.num[kind] += num
            self._inside = False

    def count(
        self, owner: Any, name: str, kind: str, num: Callable[..., int] = lambda *_: 1
    ) -> None:
        """Count the calls of a method, which an earlier version may not have."""
        method = getattr(owner, name, None)
        if method is None:
            return

        @wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.of(kind, num(*args)):
                return method(*args, **kwargs)

        setattr(owner, name, counted)

    def count_blocks(self, owner: Any, kind: str) -> None:
        """Count what an iteration over blocks of rows gives."""
        iterate = owner.__iter__

        def counted(this: Any) -> Iterator[Any]:
            blocks = iterate(this)
            while True:
                with self.of(kind, 0):
                    block = next(blocks, None)
                if block is None:
                    return
                self.num[kind] += len(block)
                yield block

        owner.__iter__ = counted


def counted_passes() -> Passes:
    from sharpness.risk import derivatives, empirical, mean_loss, points, products
    from sharpness.risk.sample_gradients import SampleGradients

    passes = Passes()
    for name in ("value", "outputs"):
        passes.count(mean_loss.MeanLoss, name, "forward")
    passes.count(empirical.EmpiricalRisk, "accuracy", "forward")
    passes.count(points.Points, "at", "forward")
    for name in ("value_and_gradient", "value_and_gradient_seen"):
        passes.count(mean_loss.MeanLoss, name, "gradient")
    rows = lambda _, v: 1 if v.ndim == 1 else len(v)  # noqa: E731
    passes.count(products.Products, "__call__", "product", rows)
    passes.count(products.Products, "of_blocks", "product")
    passes.count(empirical.EmpiricalRisk, "_exact_gradient_and_product", "product")
    passes.count(derivatives.Derivatives, "of", "check")
    passes.count_blocks(SampleGradients, "sample gradients")
    return passes


def risk_of_case(case: str, samples: int, checkpoint: str) -> Any:
    import torch

    import sharpness
    from sharpness.lab import data

    if case == "F1":
        from sharpness.loading import load_checkpoint
        from sharpness.measurement import MeasurementSettings, risk_of

        return risk_of(
            load_checkpoint(checkpoint), MeasurementSettings(num_samples=samples)
        )
    torch.manual_seed(0)
    layers = (torch.nn.Linear(64, 100), torch.nn.Linear(100, 30), torch.nn.Linear(30, 10))
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        layers[0],
        torch.nn.ReLU(),
        layers[1],
        torch.nn.ReLU(),
        layers[2],
    )
    x, y = (part[:samples] for part in data.load("digits").train)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    return sharpness.EmpiricalRisk(model, "cross_entropy", (x, y))


def tasks_of(risk: Any) -> dict[str, Callable[[], Any]]:
    """Every measure of `summary` by its own name, and what else people run."""
    import sharpness
    from sharpness.measures.settings import MeasureSettings
    from sharpness.measures.summary import RUNS, _measured

    left = {"start": None, "training": None}
    settings = MeasureSettings()
    tasks: dict[str, Callable[[], Any]] = {
        name: partial(_measured, name, risk, settings, left) for name in RUNS
    }
    tasks["density"] = lambda: [
        sharpness.spectral_density(risk, num_starts=DENSITY_STARTS, progress=False)
    ]
    for k in (5, 50):
        tasks[f"eigenpairs, k = {k}"] = lambda k=k: [  # type: ignore[misc]
            sharpness.eigenpairs(risk, k, progress=False)
        ]
    tracker = sharpness.SharpnessTracker(risk.model, risk.loss, risk.full_batch(), every=1)
    tasks["tracker, one look"] = lambda: [tracker.measure()]
    return tasks


def work(case: str, samples: int, checkpoint: str) -> None:
    """Run the tasks named on stdin, a line each; answer with a line of JSON."""
    import torch

    torch.set_num_threads(1)
    passes, risk = counted_passes(), risk_of_case(case, samples, checkpoint)
    risk.value_and_gradient()  # checks its derivatives, once
    risk.hvp(risk.theta)
    tasks = tasks_of(risk)
    print(json.dumps({"tasks": list(tasks), "n": risk.n}), flush=True)
    for line in sys.stdin:
        passes.seconds.clear()
        passes.num.clear()
        began = time.process_time()
        found = tasks[line.strip()]()
        seconds = time.process_time() - began
        rows = [row for result in found for row in result.readings()]
        answer = {
            "seconds": seconds,
            "passes": dict(passes.num),
            "passes_seconds": dict(passes.seconds),
            "status": str(found[0].status),
            "values": [finite(row.value) for row in rows],
            "errors": [finite(row.error) for row in rows],
        }
        print(json.dumps(answer), flush=True)


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# -- both versions in turn ---------------------------------------------------------------


class Version:
    """A process that runs tasks with the library of one checkout."""

    def __init__(self, folder: Path, case: str, options: argparse.Namespace) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, case, "--work", "--samples", options.samples]
        self._process = subprocess.Popen(
            [*map(str, command), "--checkpoint", options.checkpoint],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.known = self._answer()

    def __call__(self, task: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(task, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the process has ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(case: str, options: argparse.Namespace) -> None:
    from products import processor, say

    from sharpness.record import environment

    record = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    cells = record.setdefault(case, {"samples": options.samples, "tasks": {}})
    versions = {
        "before": Version(Path(options.before), case, options),
        "after": Version(ROOT, case, options),
    }
    cells["n"] = versions["after"].known["n"]
    for i, task in enumerate(versions["after"].known["tasks"]):
        if task in cells["tasks"] or (options.tasks and task not in options.tasks):
            continue
        order = list(versions)[:: 1 if i % 2 else -1]
        cells["tasks"][task] = {name: versions[name](task) for name in order}
        seconds = {name: cells["tasks"][task][name]["seconds"] for name in versions}
        say(f"{case}, {task}: {seconds}")
        record["processor"], record["environment"] = processor("cpu"), environment()
        TARGET.write_text(json.dumps(record, indent=1) + "\n")
    for version in versions.values():
        version.close()


def compare_commands(options: argparse.Namespace) -> None:
    """Seconds of the clock and of the processor of whole commands, each version twice."""
    from products import say

    record = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    cells = record.setdefault("commands", {})
    folders = {"before": Path(options.before), "after": ROOT}
    for name, command in COMMANDS.items():
        if name in cells or (options.tasks and name not in options.tasks):
            continue
        runs: dict[str, list[list[float]]] = {"before": [], "after": []}
        words = command.format(checkpoint=Path(options.checkpoint).resolve()).split()
        for version in ("before", "after", "after", "before"):
            runs[version].append(seconds_of(words, folders[version]))
            say(f"{name}, {version}: {runs[version][-1]}")
        cells[name] = runs
        TARGET.write_text(json.dumps(record, indent=1) + "\n")


def seconds_of(words: list[str], folder: Path) -> list[float]:
    """Of the clock and of the processor, in a folder that is empty at first."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as run_folder:
        before, began = os.times(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", *words],
            env=environment,
            cwd=run_folder,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        clock, after = time.perf_counter() - began, os.times()
    user = after.children_user - before.children_user
    return [clock, user + after.children_system - before.children_system]


# -- the page ----------------------------------------------------------------------------


def seconds_in(run: dict[str, Any]) -> float:
    return float(run["seconds"])


def own(run: dict[str, Any]) -> float:
    return float(run["seconds"] - sum(run["passes_seconds"].values()))


def total(cells: dict[str, Any], name: str, of: Callable[[dict[str, Any]], float]) -> float:
    """Seconds, or those of its own, of the measures of `measure --measures all` there are.

    The density's starts are a part of them.
    """
    from sharpness.measures.summary import RUNS

    known = {task: of(both[name]) for task, both in cells.items() if task in RUNS}
    return float(sum(known.values()) + (10 / DENSITY_STARTS - 1) * known.get("density", 0))


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The largest relative difference of a value; where it is more, in errors too."""
    rows = zip(before["values"], after["values"], after["errors"], strict=True)
    known = [(abs(a - b), abs(b), error) for a, b, error in rows if None not in (a, b)]
    largest = max((apart / (size or 1) for apart, size, _ in known), default=0.0)
    errors = max((apart / error for apart, _, error in known if error), default=0.0)
    return f"{largest:.0e}" + (
        f", {errors:.1g} errors" if largest > 1e-3 and errors else ""
    )


def table(case: dict[str, Any]) -> str:
    cells = case["tasks"]
    lines = [
        "| task | passes, before → after | seconds | own share | after / before | values "
        "differ by |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for task, both in cells.items():
        runs = both["before"], both["after"]
        if not runs[1]["passes"]:
            continue
        texts = [passes_text(run["passes"]) for run in runs]
        shown = texts[0] if texts[0] == texts[1] else " → ".join(texts)
        seconds = " → ".join(f"{run['seconds']:.3g}" for run in runs)
        shares = " → ".join(f"{own(run) / run['seconds']:.0%}" for run in runs)
        ratio = runs[1]["seconds"] / runs[0]["seconds"]
        apart = difference(*runs)
        lines.append(f"| {task} | {shown} | {seconds} | {shares} | {ratio:.2f} | {apart} |")
    versions = "before", "after"
    sums, owns = ([total(cells, v, of) for v in versions] for of in (seconds_in, own))
    text = " → ".join(f"{seconds:.3g}" for seconds in sums)
    shares = " → ".join(f"{part / s:.0%}" for part, s in zip(owns, sums, strict=True))
    name = "measure --measures all" if {"density", "noise_scale"} <= set(cells) else "sum"
    ratio = sums[1] / sums[0]
    lines.append(f"| **{name}** | | {text} | {shares} | **{ratio:.2f}** | |")
    return "\n".join(lines)


def passes_text(passes: dict[str, int]) -> str:
    short = {"forward": "f", "gradient": "g", "product": "p", "sample gradients": "s"}
    found = [f"{passes[kind]} {name}" for kind, name in short.items() if passes.get(kind)]
    return " ".join(found)


def costs(case: dict[str, Any]) -> str:
    """Milliseconds of a pass, over all tasks of the later version."""
    seconds: Counter[str] = Counter()
    num: Counter[str] = Counter()
    for both in case["tasks"].values():
        num.update(both["after"]["passes"])
        seconds.update(both["after"]["passes_seconds"])
    parts = [f"{k} {1e3 * seconds[k] / num[k]:.3g} ms" for k in KINDS[:4] if num[k]]
    return ", ".join(parts)


def table_of_commands(cells: dict[str, dict[str, list[list[float]]]]) -> str:
    """Means over both runs of each version, with a heading."""
    lines = [
        "## Whole commands",
        "",
        "On one thread, in the order before, after, after, before; means of two.",
        "",
        "| command | of the clock, s | after / before | processor, s | after / before |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, runs in cells.items():
        means = [[sum(x) / 2 for x in zip(*runs[v], strict=True)] for v in runs]
        pairs = list(zip(*means, strict=True))  # of the clock, of the processor
        texts = [f"{a:.3g} → {b:.3g} | {b / a:.2f}" for a, b in pairs]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def between_marks(text: str, name: str, content: str) -> str:
    """The text with other content between the marks of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def page_of(text: str, record: dict[str, Any]) -> str:
    """The page with the tables of the record between its marks."""
    for case in set(record) & {"F1", "small"}:
        facts = f"{record[case]['n']} parameters, {record[case]['samples']} samples."
        said = textwrap.fill(f"{facts} A pass costs: {costs(record[case])}.", 118)
        text = between_marks(text, case, f"{said}\n\n{table(record[case])}")
    if "commands" in record:
        text = between_marks(text, "commands", table_of_commands(record["commands"]))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=["small", "F1"])
    parser.add_argument("--before", help="checkout of the earlier version")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="of F1")
    parser.add_argument("--tasks", nargs="*", help="only these")
    parser.add_argument("--docs", action="store_true", help="write the page, run nothing")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.cases[0], options.samples, options.checkpoint)
        return
    if not options.docs:
        if options.before is None:
            parser.error("--before is needed: the checkout of an earlier version")
        for case in options.cases:
            if case == "commands":
                compare_commands(options)
            else:
                compare(case, options)
    PAGE.write_text(page_of(PAGE.read_text(), json.loads(TARGET.read_text())))


if __name__ == "__main__":
    main()
