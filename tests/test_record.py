import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sharpness import read_records
from sharpness._json import as_plain, to_line
from sharpness._results import Cost
from sharpness.measures.eigenvalues import HessianEigenpairs
from sharpness.record import SCHEMA, append_record, merge_records, new_record
from sharpness.results import Status


def result() -> HessianEigenpairs:
    return HessianEigenpairs(
        eigenvalues=torch.tensor([2.0]),
        error_bounds=torch.tensor([0.1]),
        residuals=torch.tensor([math.nan]),
        eigenvectors=torch.zeros(1, 1000),
        explicit_residual=None,
        lambda_max_upper=None,
        hidden=((2.1, math.inf),),
        noise_floor=1e-7,
        engine="kept_graph",
        status=Status.CONVERGED,
        cost=Cost(products=7, seconds=0.1),
        settings={
            "which": "LA",
            "tol": 1e-2,
            "seed": 0,
            "matrix": "hessian",
            "confidence": 0.95,
        },
    )


def test_a_result_becomes_plain_values_with_its_evidence_and_without_vectors():
    plain = as_plain(result())
    assert plain["eigenvalues"] == [2.0]
    assert plain["error_bounds"] == [pytest.approx(0.1)]
    assert plain["status"] == "converged"
    assert plain["residuals"] == [None]  # NaN is not JSON
    assert plain["hidden"] == [[2.1, None]]
    assert "eigenvectors" not in plain


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    written = [new_record("measurement", measures={"x": i}) for i in range(3)]
    for record in written:
        append_record(path, record)
    assert list(read_records(path)) == written
    assert written[0]["schema"] == SCHEMA
    assert written[0]["environment"]["torch"] == torch.__version__


def test_a_torn_last_line_is_skipped_and_the_next_record_starts_afresh(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, {"schema": SCHEMA, "kind": "a"})
    with path.open("a") as file:
        file.write('{"schema": 2, "kind": "torn", "val')
    append_record(path, {"schema": SCHEMA, "kind": "b"})
    assert [record["kind"] for record in read_records(path)] == ["a", "b"]


def test_records_appended_at_once_do_not_mix(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [{"schema": SCHEMA, "kind": "x" * 5000, "i": i} for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda record: append_record(path, record), records))
    assert sorted(record["i"] for record in read_records(path)) == list(range(40))


def test_a_line_is_strict_json_on_one_line():
    line = to_line(new_record("measurement", result=result(), text="two\nlines"))
    assert "\n" not in line
    assert json.loads(line)["result"]["cost"]["products"] == 7


def test_records_become_a_data_frame_with_dotted_names(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, new_record("measurement", measures={"value": 3.0}))
    assert read_records(path).to_frame()["measures.value"].tolist() == [3.0]


def test_records_of_many_writers_are_merged_once_and_none_is_lost(tmp_path):
    whole = tmp_path / "records.jsonl"
    append_record(whole, new_record("tracking", path="a", point=0))
    parts = [tmp_path / f"{i}.jsonl" for i in range(8)]
    for i, part in enumerate(parts):
        for point in range(3):
            append_record(part, new_record("tracking", path=f"/there/{i}", point=point))
        with part.open("a") as file:
            file.write('{"schema": 2, "kind": "tor')
    first = parts[0].read_bytes()
    merge_records(parts[0], whole, path="0")
    parts[0].write_bytes(first)  # a merge that was interrupted before it deleted its part
    with ThreadPoolExecutor(8) as pool:
        merged = [pool.submit(merge_records, p, whole, path=p.stem) for p in parts]
        assert [future.result() for future in merged] == [None] * 8
    found = sorted((r["path"], r["point"]) for r in read_records(whole))
    expected = [(str(i), point) for i in range(8) for point in range(3)]
    assert found == sorted([("a", 0), *expected])
    assert not [part for part in parts if part.exists()]
