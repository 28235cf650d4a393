"""Records of today's schema can be read back; those of another are left out."""

import json
import warnings
from pathlib import Path

import pytest

from sharpness import read_records
from sharpness._results import Result
from sharpness._saving import restored
from sharpness.record import SCHEMA, append_record, parsed
from sharpness.reproduce.page import _merge

COMMITTED = sorted((Path(__file__).parent.parent / "docs/reproductions").glob("*.jsonl"))


def results(plain):
    """The results in a record, at any depth."""
    if isinstance(plain, dict) and "type" in plain:
        yield plain
    elif isinstance(plain, dict | list):
        for item in plain.values() if isinstance(plain, dict) else plain:
            yield from results(item)


def test_records_are_merged_once_and_those_of_another_schema_are_left_out(tmp_path):
    source, target = tmp_path / "records.jsonl", tmp_path / "kept.jsonl"
    facts = {"kind": "observation", "diverged": None, "found": {"accuracy": 0.9}}
    records = [{"schema": s, "digest": d, **facts} for s, d in ((1, "ab"), (SCHEMA, "cd"))]
    for record in records:
        append_record(source, record)
    for added in (1, 0):
        with pytest.warns(UserWarning, match="holds 1 records that are not of schema 2"):
            assert _merge(source, target) == added
    assert read_records(target) == records[1:]


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
