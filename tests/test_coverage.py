"""Every interval that is printed holds the truth as often as it says: fewer runs."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from scipy import stats

pytestmark = pytest.mark.slow  # a minute or more for a case that multiplies often

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "coverage.py"
RUNS = 50


def script():
    """By its path: `coverage` is also the name of a package."""
    spec = importlib.util.spec_from_file_location("benchmark_coverage", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


coverage = script()


@pytest.mark.parametrize("case", coverage.CASES, ids=lambda case: case.name)
def test_an_interval_holds_the_truth_as_often_as_it_says(case):
    """A claim that is kept fails here once in a thousand times."""
    found = coverage.count(case, RUNS)
    if found["worst_tenth"] is None:
        least = float(stats.binom.ppf(1e-3, RUNS, case.claim)) / RUNS
    else:  # points of one run go together
        least = case.claim + float(stats.norm.ppf(1e-3)) * found["standard_error"]
    assert found["covered"] >= least
    assert math.isfinite(found["covered"])


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in coverage.CASES]
    assert len(set(names)) == len(names)


def test_the_page_is_what_was_counted():
    results = json.loads(coverage.TARGET.read_text())
    assert coverage.PAGE.read_text() == coverage.page(results)
    assert min(found["runs"] for found in results.values()) >= 400
