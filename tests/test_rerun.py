"""Someone else gets the same row: from its record, its checkpoint, or by training again."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sharpness.record import read_records
from sharpness.reproduce.columns import lambda_max, phi
from sharpness.reproduce.keskar2017 import STUDIES
from sharpness.reproduce.runner import Runner
from sharpness.reproduce.serialisation import digest

FOLDER = Path(__file__).parent.parent / "docs" / "reproductions"
STUDY = next(study for study in STUDIES if study.name == "MLP-digits")
NUMBERS = {"lambda_max": lambda_max, "phi(1e-3)": phi(0), "phi(5e-4)": phi(1)}


def recorded(seed):
    wanted = digest(STUDY.sharpness(STUDY.at("large", seed)))
    records = read_records(FOLDER / "quick.jsonl")
    return next(record for record in records if record.get("digest") == wanted)


def timeless(found):
    if isinstance(found, dict):
        timed = ("seconds", "sha256")  # a file's digest is that of its times as well
        return {k: timeless(v) for k, v in found.items() if k not in timed}
    return [timeless(item) for item in found] if isinstance(found, list) else found


@pytest.fixture(scope="module")
def trained_again(tmp_path_factory):
    """The row of starting point 0, twice, each from its record alone."""
    folders = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    return [Runner(folder=folder).again(recorded(0)) for folder in folders]


@pytest.mark.slow
def test_a_record_gives_the_same_bits_again(trained_again):
    first, second = (timeless(record["found"]) for record in trained_again)
    assert first == second
    assert first["theta"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_training_again_stays_within_the_spread_of_starting_points(trained_again, name):
    pick = NUMBERS[name]
    others = np.array([pick(recorded(seed)["found"]) for seed in range(1, 6)])
    n, sd = len(others), float(others.std(ddof=1))
    # 95 % prediction interval for one more starting point.
    half = float(stats.t.ppf(0.975, n - 1)) * sd * math.sqrt(1 + 1 / n)
    assert abs(pick(trained_again[0]["found"]) - others.mean()) <= half


def test_the_committed_checkpoint_measures_the_same_within_its_bounds(tmp_path):
    record, runner = recorded(0), Runner(folder=tmp_path)
    network = STUDY.at("large", 0)
    runner.bench.folder.mkdir()
    shutil.copy(FOLDER / network.file, runner.bench.path(network))
    again = runner.again(record)["found"]
    assert again["sha256"] == record["found"]["sha256"]  # measured, not trained
    assert again["data"]["samples"] == record["found"]["data"]["samples"]
    ours, theirs = (found["lambda_max"] for found in (again, record["found"]))
    bound = ours["error_bounds"][0] + theirs["error_bounds"][0]
    assert abs(ours["eigenvalues"][0] - theirs["eigenvalues"][0]) <= bound
    for name in ("phi(1e-3)", "phi(5e-4)"):  # lower bounds: what a search reached
        assert NUMBERS[name](again) == pytest.approx(
            NUMBERS[name](record["found"]), rel=0.02
        )
