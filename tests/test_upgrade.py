"""Records of schema 1 keep every number when their results take today's shape."""

import copy
import json
import warnings
from collections import Counter
from pathlib import Path

import pytest

from sharpness import read_records
from sharpness._results import Result
from sharpness._saving import restored
from sharpness.record import SCHEMA, append_record, parsed
from sharpness.reproduce.page import _merge
from sharpness.reproduce.upgrade import upgraded

COMMITTED = sorted((Path(__file__).parent.parent / "docs/reproductions").glob("*.jsonl"))
PAIRS = {
    **{"eigenvalues": [2.5], "error_bounds": [0.01], "residuals": [0.02]},
    **{"explicit_residual": 0.03, "lambda_max_upper": None, "noise_floor": 1e-7},
    **{"status": "converged", "num_hvps": 9, "seconds": 1.5, "which": "LA", "tol": 0.04},
    **{"seed": 3, "matrix": "hessian", "preconditioned": False, "engine": "kept_graph"},
}
PHI = {
    **{"phi": 12.5, "phi_protocol": 11.5, "value": 0.1, "value_max": 0.2},
    **{"box_share": 0.75, "status": "completed", "message": "running", "num_evals": 31},
    **{"seconds": 2.5, "epsilon": 1e-3, "subspace_dim": None, "columns": None},
    **{"solver": "ascent", "max_iter": 10, "num_starts": 1, "seed": 4},
}
FOUND = {
    "lambda_max": PAIRS,
    "accuracy": 0.9,
    "points": [{"factor": 2.0, "phi": [PHI]}],
    "curve": {"alphas": [0.0, 1.0], "values": [0.3, 0.4], "accuracies": [0.5, 0.6]},
    "values": [
        None,
        {"value": 7.5, "error": 0.5, "status": "max_hvps", "num_hvps": 5, "num_evals": 0},
    ],
}
OLD = {"schema": 1, "kind": "observation", "digest": "ab", "diverged": None, "found": FOUND}


def numbers(plain) -> Counter:
    if isinstance(plain, dict):
        return sum(map(numbers, plain.values()), Counter())
    if isinstance(plain, list):
        return sum(map(numbers, plain), Counter())
    return Counter([plain]) if isinstance(plain, int | float) else Counter()


def results(plain):
    """The results in a record, at any depth."""
    if isinstance(plain, dict) and "type" in plain:
        yield plain
    elif isinstance(plain, dict | list):
        for item in plain.values() if isinstance(plain, dict) else plain:
            yield from results(item)


def test_every_number_is_kept_and_none_is_added():
    before = copy.deepcopy(OLD)
    new = upgraded(OLD)
    assert before == OLD
    assert new["schema"] == SCHEMA == 2
    assert numbers(new["found"]) == numbers(FOUND)


def test_each_result_has_todays_shape():
    found = upgraded(OLD)["found"]
    pairs = restored(Result, found["lambda_max"])
    assert (pairs.num_hvps, pairs.seconds, pairs.status) == (9, 1.5, "converged")
    assert (pairs.settings["seed"], pairs.settings["tol"]) == (3, 0.04)
    (phi,) = restored(list[Result], found["points"][0]["phi"])
    assert (phi.phi, phi.num_evals, phi.solver) == (12.5, 31, "ascent")
    assert phi.readings()[0].name == "phi(1e-3)"
    assert restored(Result, found["curve"]).values == (0.3, 0.4)
    tracked = restored(Result, found["values"][1])
    assert (tracked.value, tracked.num_hvps) == (7.5, 5)
    assert (found["values"][0], found["accuracy"]) == (None, 0.9)


def test_a_record_of_today_stays_as_it_is():
    new = upgraded(OLD)
    assert upgraded(new) is new


def test_records_of_both_schemas_are_merged_into_one(tmp_path):
    source, target = tmp_path / "records.jsonl", tmp_path / "kept.jsonl"
    append_record(source, OLD)
    append_record(source, {**upgraded(OLD), "digest": "cd"})
    assert _merge(source, target) == 2
    assert _merge(source, target) == 0
    first, second = read_records(target)
    assert first == upgraded(OLD)
    assert second["found"] == first["found"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_the_committed_records_are_todays_and_their_results_can_be_read(path):
    records, found = list(parsed(path)), 0
    assert {record["schema"] for record in records} == {SCHEMA}
    for record in records:
        for plain in results(record["found"]):
            readings = restored(Result, plain).readings()
            assert plain["status"] in readings[0].evidence
            found += 1
    assert found


def test_records_of_another_schema_are_left_out_with_one_warning(tmp_path):
    path = tmp_path / "records.jsonl"
    for schema in (1, SCHEMA, 1, 99):
        append_record(path, {"schema": schema, "kind": "x"})
    with pytest.warns(
        UserWarning, match="holds 3 records that are not of schema 2"
    ) as seen:
        assert read_records(path) == [{"schema": SCHEMA, "kind": "x"}]
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)
    path.write_text(json.dumps({"schema": SCHEMA}) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_records(path)) == 1
