"""What the benchmark of the advice on a batch size makes of counted updates."""

import importlib
import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("advice")


def run(seed, batch_size, updates, reached=True):
    return dict(seed=seed, batch_size=batch_size, updates=updates, reached=reached)


@pytest.fixture
def found(benchmark):
    """128 takes 200 updates of 10 ms, 256 takes 100 of 15 ms, other sizes ever longer."""
    updates = {128: 200.0, 256: 100.0}
    return {
        "exhaustive": [
            run(seed, size, updates.get(size, 1000.0) * more)
            for seed in benchmark.SEEDS
            for size in benchmark.SIZES
            for more in (1.0, 1.5)
        ],
        "times": {
            str(size): {"seconds": {128: 0.01, 256: 0.015}.get(size, 0.1)}
            for size in benchmark.TIMED
        },
        "trained": [run(0, 256, 100.0), run(1, 128, 200.0)],
        "grid": [run(0, 128, 300.0), run(0, 128, 900.0, False), run(1, 128, 200.0)],
    }


def test_a_size_is_judged_by_its_time_and_the_whole_way_beside_the_grid(benchmark, found):
    given = {"seed": 0, "batch_size": 256, "learning_rate": 1e-3, "seconds": 30.0}
    facts = benchmark.judged(found, given)
    assert facts["ratio"] == 1
    assert facts["whole"] == pytest.approx(30 + 1.5)
    assert facts["grid"] == pytest.approx(4 * 3)
    assert facts["verdict"] == "loses"
    # A training saves 1.5 s: 19.5 s are back after 13 more.
    assert facts["pays"] == 14


def test_without_an_advised_size_training_goes_on_as_before(benchmark, found):
    given = {"seed": 1, "batch_size": None, "learning_rate": None, "seconds": 1.0}
    facts = benchmark.judged(found, given)
    assert facts["ratio"] == pytest.approx(2 / 1.5)
    assert facts["verdict"] == "wins"
    assert facts["pays"] == math.inf  # it takes as long as the grid's best


@pytest.mark.parametrize(
    ("whole", "grid", "verdict"),
    [(10, 11.1, "wins"), (10, 10.9, "ties"), (11, 10, "ties"), (11.1, 10, "loses")],
)
def test_a_tie_is_within_a_tenth(benchmark, whole, grid, verdict):
    assert benchmark.verdict(whole, grid) == verdict


def test_who_does_not_get_there_loses(benchmark):
    assert benchmark.verdict(math.nan, 10.0) == "loses"
    assert benchmark.verdict(10.0, math.nan) == "wins"
