"""Training F1 on MNIST: the lab beside the loops that people write.

    python benchmarks/training.py [--data mnist] [--data-dir DIR] [--epochs 2] [--rounds 3]

For batches of 32 and of 256, Adam 1e-3, the same start:

- plain: a PyTorch loop on tensors that are in memory, `randperm`, `torch.optim.Adam` with
  its defaults, all threads;
- loader: the usual loop over a `DataLoader` (shuffling, no workers; with two workers
  where that is faster) of single samples;
- lab: `sharpness.lab.run.train`, one run with all threads;
- lab, six seeds: `sharpness.lab.sweep.sweep` with its defaults, six runs together.

They take turns, round by round, so that a change of the machine's speed hits all; ratios
are taken within a round, and the median is reported with the range. plain and loader are
timed for one run; six runs one after another take six times as long. The lab's times are
wall-clock times of all that it does: starting processes, reading the data there, writing
checkpoints and evaluating the trained network on training and test set, which the other
loops do not do; beside them stands the time of its updates alone.

Writes `training.json` beside this file.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from products import processor, say
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sharpness.lab import networks
from sharpness.lab.data import Dataset
from sharpness.lab.run import train
from sharpness.lab.sweep import ExecutionSettings, Run, sweep
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.record import environment

BATCH_SIZES = (32, 256)
SEEDS = 6


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = networks.f1()
    networks.initialise(model, 0)
    return model.train(), torch.optim.Adam(model.parameters(), 1e-3)


def plain(dataset: Dataset, batch_size: int, epochs: int) -> None:
    model, optimizer = model_and_optimizer()
    loss_of = nn.CrossEntropyLoss()
    x, y = dataset.train
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(batch_size):
            optimizer.zero_grad()
            loss = loss_of(model(x[index]), y[index])
            loss.backward()
            optimizer.step()


def loader(dataset: Dataset, batch_size: int, epochs: int, workers: int) -> None:
    model, optimizer = model_and_optimizer()
    loss_of = nn.CrossEntropyLoss()
    samples = TensorDataset(*dataset.train)
    batches = DataLoader(samples, batch_size, shuffle=True, num_workers=workers)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()


def lab(dataset: Dataset, batch_size: int, epochs: int) -> float:
    """Seconds of its updates alone."""
    with tempfile.TemporaryDirectory() as folder:
        run = Training(network="F1", batch_size=batch_size)
        done = train(run, StoppingCriteria(epochs=epochs), dataset, Path(folder, "a.pt"))
    return float(done.training["seconds"])


def lab_six_seeds(place: ExecutionSettings, batch_size: int, epochs: int) -> float:
    """Mean time that a process spent on updates alone."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            Run(
                training=Training(network="F1", batch_size=batch_size, seed=seed),
                budget=StoppingCriteria(epochs=epochs),
                path=Path(folder, f"{seed}.pt"),
            )
            for seed in range(SEEDS)
        ]
        outcomes = list(sweep(runs, place, progress=False))
    assert not any(outcome.failure for outcome in outcomes), outcomes
    jobs = place.side_by_side(SEEDS)[0]
    return sum(outcome.facts["seconds"] for outcome in outcomes) / jobs


def seconds(task: Callable[..., object], *arguments: object) -> tuple[float, object]:
    began = time.perf_counter()
    result = task(*arguments)
    return time.perf_counter() - began, result


def one_round(place: ExecutionSettings, batch_size: int, epochs: int) -> dict[str, float]:
    dataset = place.dataset()
    found = {"plain": seconds(plain, dataset, batch_size, epochs)[0]}
    found["lab"], found["lab_updates"] = seconds(lab, dataset, batch_size, epochs)
    six = seconds(lab_six_seeds, place, batch_size, epochs)
    found["lab_six"], found["lab_six_updates"] = six
    for workers in (0, 2):
        wall, _ = seconds(loader, dataset, batch_size, 1, workers)
        found[f"loader_{workers}"] = wall * epochs
    return found


def ratios(round_: dict[str, float]) -> dict[str, float]:
    """How many times as long the others take as the lab."""
    quickest = min(round_["loader_0"], round_["loader_2"])
    return {
        "plain / lab": round_["plain"] / round_["lab"],
        "plain / lab, updates alone": round_["plain"] / round_["lab_updates"],
        "six plain / lab six": SEEDS * round_["plain"] / round_["lab_six"],
        "six plain / lab six, updates alone": SEEDS
        * round_["plain"]
        / round_["lab_six_updates"],
        "loader / lab": quickest / round_["lab"],
        "six loader / lab six": SEEDS * quickest / round_["lab_six"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    place = ExecutionSettings(data=options.data, data_dir=options.data_dir)
    rows = []
    for batch_size in BATCH_SIZES:
        rounds = []
        for i in range(options.rounds):
            rounds.append(one_round(place, batch_size, options.epochs))
            say(f"batch {batch_size}, round {i + 1}: {rounds[-1]}")
        names = ratios(rounds[0])
        table = {name: sorted(ratios(r)[name] for r in rounds) for name in names}
        for name, values in table.items():
            middle = statistics.median(values)
            spread = f"({values[0]:.2f}–{values[-1]:.2f})"
            print(f"batch {batch_size}: {name}: {middle:.2f} {spread}")
        rows.append({"batch_size": batch_size, "rounds": rounds, "ratios": table})
    setting = {
        "data": options.data,
        "epochs": options.epochs,
        "processor": processor("cpu"),
        "threads": torch.get_num_threads(),
        "side_by_side": place.side_by_side(SEEDS),
    }
    target = Path(__file__).with_suffix(".json")
    found = {"setting": setting, "rows": rows, "environment": environment()}
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"raw numbers: {target}")


if __name__ == "__main__":
    main()
