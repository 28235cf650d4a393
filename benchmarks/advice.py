"""Is the advice on a batch size right, and is it worth its time? F1 on Fashion-MNIST.

    python benchmarks/advice.py exhaustive [--seeds 0 1 2]
    python benchmarks/advice.py time       # alone on a quiet machine
    python benchmarks/advice.py advise     # likewise; five minutes a seed at most
    python benchmarks/advice.py grid
    python benchmarks/advice.py table

Fixed before any advice was asked for: 50 000 training images and the next 2000 for
validation; Adam at 1e-3 for batch 128; a validation loss of 0.40; batch sizes of 16 to
4096 by factors of two; three seeds, each of a starting point and of an order of rows.

- exhaustive: the updates to the target of every size, at 0.5, 1 and 2 times the rate of
  the square-root rule, and on by factors of two where the best is at an end. Updates do not
  depend on how busy the machine is. Runs are kept in a folder, so that it can go on.
- time: seconds of an update, t(B). A size's time to the target is the mean over seeds of
  the fewest updates at any rate, times t(B).
- advise: `batch_size_advice` from each starting point with an order of rows of its own
  (which the exhaustive run does not know), told the target, all else by default.
- grid: 3e-4, 1e-3, 3e-3 and 1e-2 at batch 128, and the advised size at the advised rate,
  both from the same starting point in the order of the exhaustive run.

The whole way is the seconds of the advice and those of training at what it advises. The
grid has as long: its four runs share the machine, a quarter of the time each, and end when
the first of them is at the target. The whole way wins where it is there 10 % sooner, loses
where it is there 10 % later, and else it is a tie.

Results go to `advice.json` beside this file, step by step; `table` writes the page.
"""

import argparse
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from products import ROOT, processor, say

import sharpness
from sharpness.batchsize.problem import Problem
from sharpness.batchsize.race import Race, RaceRun, race
from sharpness.batchsize.updates import time_per_update
from sharpness.lab import networks
from sharpness.lab.data import load
from sharpness.record import environment

DATA, OPTIMIZER = "fashion-mnist", "adam"
TRAINED, VALIDATED = 50_000, 2000
LR, OWN = 1e-3, 128
TARGET = 0.40
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TIMED = (8, *SIZES, 8192)  # the advice may name the others too
SEEDS = (0, 1, 2)
RATES = (0.5, 1.0, 2.0)  # times the rule's; the race goes on where the best is at an end
PLAIN = (3e-4, 1e-3, 3e-3, 1e-2)
ADVICE_SECONDS = 300.0
OTHER_ORDER = 100  # added to the seed, the order of rows of the advice
NEAR = 1.15  # of the best: the advice is right
TIE = 1.1
PATH = Path(__file__).with_suffix(".json")

Found = dict[str, Any]


@cache
def arguments(seed: int) -> tuple[tuple[Any, ...], Found]:
    """Of `Problem` and of `batch_size_advice`: starting point, data and optimizer."""
    x, y = load(DATA).train
    end = TRAINED + VALIDATED
    model = networks.f1()
    networks.initialise(model, seed)
    data, held_out = (x[:TRAINED], y[:TRAINED]), (x[TRAINED:end], y[TRAINED:end])
    settings = {"lr": LR, "batch_size": OWN, "optimizer": OPTIMIZER}
    return (model, "cross_entropy", data), {"validation": held_out, **settings}


def problem(seed: int) -> Problem:
    positional, settings = arguments(seed)
    return Problem(*positional, **settings)


# -- steps -------------------------------------------------------------------------------


def exhaustive(seeds: Iterable[int], folder: Path) -> Found:
    return {"exhaustive": [run for s in seeds for run in counted(s, SIZES, RATES, folder)]}


def counted(
    seed: int, sizes: Iterable[int], rates: Iterable[float], folder: Path, name: str = "all"
) -> list[Found]:
    """The runs of a race to the target, from their files where they are there."""

    def told(run: RaceRun) -> None:
        say(
            f"seed {seed}, batch {run.batch_size}: {run.lr:.3g} {run.end} {run.updates:.0f}"
        )

    found: Race = race(
        problem(seed),
        list(sizes),
        target=TARGET,
        rates=list(rates),
        seeds=[seed],
        measure=False,
        folder=folder / f"{name}-{seed}",
        on_run=told,
        progress=False,
    )
    names = ("seed", "batch_size", "lr", "updates", "reached", "end")
    return [{name: getattr(run, name) for name in names} for run in found.runs]


def timed() -> Found:
    times = time_per_update(problem(SEEDS[0]), TIMED, repeats=15, progress=False)
    say(times.table())
    named = {
        str(size): {"seconds": float(t), "spread": float(spread)}
        for size, t, spread in zip(
            times.batch_sizes, times.seconds, times.spread, strict=True
        )
    }
    return {"times": named, "load": Path("/proc/loadavg").read_text().split()[0]}


def advised(seed: int) -> Found:
    positional, settings = arguments(seed)
    advice = sharpness.batch_size_advice(
        *positional,
        **settings,
        target=TARGET,
        seeds=(seed + OTHER_ORDER,),
        seed=seed,
        max_seconds=ADVICE_SECONDS,
        progress=False,
    )
    say(str(advice))
    return {
        "seed": seed,
        "batch_size": advice.batch_size,
        "near": list(advice.near),
        "learning_rate": advice.learning_rate,
        "seconds": advice.cost.seconds,
        "status": advice.status.value,
        "words": str(advice).splitlines(),
    }


def grid(found: Found, folder: Path) -> Found:
    """Updates of the plain grid, and of the training that was advised."""
    plain, trained = [], []
    for advice in found["advice"]:
        seed, (size, rate) = advice["seed"], taken(advice)
        runs = counted(seed, [OWN], [rate / LR for rate in PLAIN], folder, "grid")
        plain += [run for run in runs if min(abs(run["lr"] / r - 1) for r in PLAIN) < 1e-6]
        factor = rate / problem(seed).scaled_rate(size)
        runs = counted(seed, [size], [factor], folder, "advised")
        trained += [run for run in runs if abs(run["lr"] / rate - 1) < 1e-6]
    return {"grid": plain, "trained": trained}


def taken(advice: Found) -> tuple[int, float]:
    """Size and rate that training goes on with: as before where none is advised."""
    if advice["batch_size"] is None:
        return OWN, LR
    return advice["batch_size"], advice["learning_rate"]


# -- what follows ------------------------------------------------------------------------


def seconds_to_target(found: Found) -> dict[int, float]:
    """Of each size: the mean over seeds of the fewest updates, times t(B); NaN: never."""
    return {size: float(np.mean(updates(found, size))) * t(found, size) for size in SIZES}


def updates(found: Found, size: int) -> list[float]:
    """To the target at the best rate, by seed."""
    return [fewest(found["exhaustive"], seed, size) for seed in SEEDS]


def fewest(runs: Iterable[Found], seed: int, size: int) -> float:
    """Updates to the target at the best rate; NaN where none came to it."""
    there = [r for r in runs if r["seed"] == seed and r["batch_size"] == size]
    return min((r["updates"] for r in there if r["reached"]), default=math.nan)


def t(found: Found, size: int) -> float:
    return float(found["times"][str(size)]["seconds"])


def judged(found: Found, advice: Found) -> Found:
    """The advice beside the exhaustive run, and the whole way beside the plain grid."""
    seed, (size, _) = advice["seed"], taken(advice)
    of_size = seconds_to_target(found)
    training = fewest(found["trained"], seed, size) * t(found, size)
    alone = fewest(found["grid"], seed, OWN) * t(found, OWN)
    whole, four = advice["seconds"] + training, len(PLAIN) * alone
    saved = alone - training  # by every further training
    return {
        "ratio": of_size.get(size, math.nan) / np.nanmin(list(of_size.values())),
        "training": training,
        "alone": alone,
        "whole": whole,
        "grid": four,
        "verdict": verdict(whole, four),
        "pays": max(1, math.ceil((whole - four) / saved) + 1) if saved > 0 else math.inf,
    }


def verdict(whole: float, four: float) -> str:
    """Of the whole way; one that is NaN did not get there."""
    if four > TIE * whole or (math.isnan(four) and whole == whole):
        return "wins"
    return "ties" if whole <= TIE * four else "loses"


# -- showing -----------------------------------------------------------------------------


def sizes_table(found: Found) -> str:
    seconds = seconds_to_target(found)
    best = np.nanmin(list(seconds.values()))
    rows = []
    for size in SIZES:
        counts = updates(found, size)
        span = f"{np.mean(counts):.0f} ({min(counts):.0f}–{max(counts):.0f})"
        ratio = f"{seconds[size] / best:.2f}×"
        each = f"{1e3 * t(found, size):.1f}"
        rows.append([str(size), span, each, f"{seconds[size]:.1f}", ratio])
    heads = ("batch", "updates", "ms an update", "s to the target", "of the best")
    return markdown(heads, rows)


def advice_table(found: Found) -> str:
    rows = []
    for advice in found["advice"]:
        facts = judged(found, advice)
        near = [f"{size}" for size in advice["near"][:: max(1, len(advice["near"]) - 1)]]
        rows.append(
            [
                str(advice["seed"]),
                f"{advice['batch_size'] or 'none'} ({' to '.join(near)})",
                f"{facts['ratio']:.2f}×" + ("" if facts["ratio"] <= NEAR else " (missed)"),
                f"{advice['seconds']:.0f}",
                f"{facts['training']:.1f}",
                f"{facts['alone']:.1f}",
                f"{facts['whole']:.0f} and {facts['grid']:.0f}",
                facts["verdict"],
                f"{facts['pays']}" if math.isfinite(facts["pays"]) else "never",
            ]
        )
    heads = (
        "seed",
        "advised (as good)",
        "of the best",
        "made in, s",
        "training, s",
        "grid's best, s",
        "whole way and grid, s",
        "the whole way",
        "pays from training",
    )
    return markdown(heads, rows)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "--:|" * len(heads), *lines[1:]])


def caption(found: Found) -> str:
    setting = found["setting"]
    return textwrap.fill(
        f"F1, {TRAINED} images of Fashion-MNIST, Adam, to a validation loss of "
        f"{TARGET:.2f}; updates: mean and range of {len(SEEDS)} seeds; "
        f"{setting['processor']}, {setting['threads']} threads, "
        f"torch {found['environment']['torch']}.",
        width=120,
    )


def page(found: Found) -> str:
    return f"{sizes_table(found)}\n\n{caption(found)}\n\n{advice_table(found)}"


def write_page(found: Found) -> None:
    begin, end = "<!-- advice:begin -->", "<!-- advice:end -->"
    target = ROOT / "docs" / "benchmarks.md"
    before, _, rest = target.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    text = f"{before}{begin}\n\n{page(found)}\n\n{end}{after}"
    target.write_text(text, encoding="utf-8")


# -- command -----------------------------------------------------------------------------


def stored(path: Path) -> Found:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def store(path: Path, **parts: Any) -> None:
    """Put the parts into the JSON beside those that are there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(stored(path) | parts, indent=1) + "\n")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("step", choices=("exhaustive", "time", "advise", "grid", "table"))
    add("--seeds", type=int, nargs="+", default=SEEDS, help="default: all three")
    add("--folder", type=Path, default=ROOT / "runs" / "advice", help="keeps the runs")
    options = parser.parse_args()
    if options.step == "exhaustive":
        parts = exhaustive(options.seeds, options.folder)
        if tuple(options.seeds) == SEEDS:
            store(PATH, **parts)
    elif options.step == "time":
        setting = {"processor": processor("cpu"), "threads": torch.get_num_threads()}
        store(PATH, setting=setting, environment=environment(), **timed())
    elif options.step == "advise":
        for seed in options.seeds:
            others = [a for a in stored(PATH).get("advice", []) if a["seed"] != seed]
            all_ = sorted([*others, advised(seed)], key=lambda advice: advice["seed"])
            store(PATH, advice=all_)
    elif options.step == "grid":
        store(PATH, **grid(stored(PATH), options.folder))
    else:
        write_page(stored(PATH))
        print(page(stored(PATH)))


if __name__ == "__main__":
    main()
