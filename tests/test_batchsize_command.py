"""`python -m sharpness.batchsize`: from a network and data on disk to advice and record."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.batchsize import by_law, race, size, times

from sharpness import read_records
from sharpness.batchsize import __main__ as command
from sharpness.batchsize import advice
from sharpness.loading import load_trainable

EXAMPLES = Path(__file__).parent.parent / "examples"
FACTORIES = """
import numpy as np
import torch

def network(width=4):
    return torch.nn.Sequential(
        torch.nn.Linear(4, int(width)), torch.nn.Tanh(), torch.nn.Linear(int(width), 1)
    )

def rows(num=300):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(num, 4)).astype("float32")
    y = (x @ [[1.0], [-1.0], [2.0], [0.5]]).astype("float32")
    return {"train": (x, y), "test": (x[:100], y[:100])}

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 300
    def __getitem__(self, i):
        x, y = rows()["train"]
        return torch.from_numpy(x[i]), torch.from_numpy(y[i])
"""
FEW = ["--sizes", "8,32,128", "--lr", "0.05", "--batch-size", "32", "--device", "cpu"]
FEW += ["--optimizer", "sgd", "--max-seconds", "60", "--target"]  # is soon reached


@pytest.fixture
def told(monkeypatch):
    """Nothing is timed and nothing trained: both follow their laws."""
    sizes = (8, 32, 128)
    monkeypatch.setattr(advice, "time_per_update", lambda *_, **__: times(sizes))
    monkeypatch.setattr(advice, "race", lambda *_, **__: by_law(100, 3200, sizes))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FACTORIES)
    return tmp_path


def call(*arguments, target="1.5"):
    return command.main([*FEW, target, *arguments])


def files(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {path: path.read_bytes() for path in paths}


@pytest.mark.slow
def test_advice_on_a_network_and_rows_of_ones_own(here, capsys):
    assert call("--network", "mine.py:network?width=3", "--data", "mine.py:rows") == 0
    out, err = capsys.readouterr()
    assert out.startswith(("Use ", "No difference found"))
    assert "What this cannot tell" in out
    assert "at most about 1 minute" in err
    (record,) = read_records(here / "runs/batchsize/records.jsonl")
    assert record["kind"] == "batch_size_advice"
    assert record["subject"]["data"]["name"] == "mine.py:rows"
    assert record["words"][0] == out.splitlines()[0]
    advice = record["advice"]
    assert advice["batch_size"] in (8, 32, 128)
    assert advice["times"]["batch_sizes"] == [8, 32, 128]
    assert [run["batch_size"] for run in advice["race"]["sizes"]] == [8, 32, 128]
    assert (here / "runs/batchsize/advice.png").stat().st_size > 10_000


def test_a_record_is_appended_and_printed_as_json(here, told, capsys):
    network = ["--network", "mine.py:network", "--data", "mine.py:Rows", "--loss", "mse"]
    for _ in range(2):
        assert call(*network, "--output", "out", "--json") == 0
    records = read_records(here / "out/records.jsonl")
    assert len(records) == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == records[-1]


def test_classes_in_an_npz_file_and_a_network_of_the_lab(here, told, capsys):
    draw = np.random.default_rng(0)
    y = draw.integers(3, size=300)
    x = (draw.normal(size=(300, 4)) + 2 * np.eye(3, 4)[y]).astype("float32")
    x[7, 0] = np.nan
    np.savez("rows.npz", x=x, y=y)
    network = ["--network", "MLP?width=4&depth=1", "--data", "rows.npz"]
    assert call(*network, target="1.0") == 0
    out = capsys.readouterr().out
    assert "1 of 300 rows hold NaN" in out
    assert "training rows stand in" in out


def test_a_checkpoint_is_the_starting_point_and_stays_as_it_is(here, told, capsys):
    x = np.random.default_rng(0).normal(size=(300, 4))
    table = np.concatenate([x, 2 * x.sum(1, keepdims=True)], 1)
    lines = ["a,b,c,d,y", *(",".join(f"{v:.4f}" for v in row) for row in table)]
    (here / "rows.csv").write_text("\n".join(lines))
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    )
    torch.save(model.state_dict(), here / "mine.pt")
    before = files(here)
    options = ["mine.pt", "--network", "mine.py:network", "--data", "rows.csv"]
    assert call(*options, target="10") == 0
    record = read_records(here / "runs/batchsize/records.jsonl")[0]
    assert record["subject"]["path"] == "mine.pt"
    assert record["subject"]["sha256"]
    after = files(here)
    assert {name: after[name] for name in before} == before


def test_an_answer_without_a_size_exits_1_and_is_kept(here, told, capsys, monkeypatch):
    lost = race([size(8, math.nan)], math.nan, math.nan)
    monkeypatch.setattr(advice, "race", lambda *_, **__: lost)
    assert call("--network", "mine.py:network", "--data", "mine.py:rows") == 1
    assert capsys.readouterr().out.startswith("No size can be advised")
    assert read_records(here / "runs/batchsize/records.jsonl")[0]["advice"]["race"]


def test_an_interrupt_exits_130_with_what_there_is(here, told, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(advice, "race", stop)
    assert call("--network", "mine.py:network", "--data", "mine.py:rows") == 130
    record = read_records(here / "runs/batchsize/records.jsonl")[0]
    assert record["status"] == "interrupted"
    assert record["advice"]["times"]["batch_sizes"] == [8, 32, 128]


def test_the_examples_of_the_page_are_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES.parent)
    where = "examples/four_features.py"
    found = load_trainable(network=f"{where}:network", data=f"{where}:rows?num=50")
    assert [len(part[1]) for part in (found.train, found.validation)] == [50, 4096]
    assert sum(p.numel() for p in found.model.parameters()) == 193

    example = runpy.run_path(str(EXAMPLES / "thousand_against_million.py"))
    few = {"ROWS": 20_000, "SIZES": (10, 1000), "RACED": {10: 0.003}, "SECONDS": 0.01}
    example["draw"].__globals__.update(few)
    axes = example["draw"](*example["generated"]()).axes
    errors = axes[0].lines[0].get_ydata()
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.3)  # the root of 1000 / 10
    assert "batch 1000: gradient off by" in capsys.readouterr().out


NETWORK, DATA = ["--network", "mine.py:network"], ["--data", "mine.py:rows"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DATA, "`--network` must be given without a checkpoint; got none"),
        (NETWORK, "`--data` must say what to train on; got none"),
        ([*NETWORK, "--data", "none.csv"], "got no such file"),
        ([*NETWORK, "--data", "mine.py:nothing"], "got 'nothing'"),
        ([*NETWORK, *DATA, "--sizes", "8,x"], "invalid"),
        ([*NETWORK, *DATA, "--sizes", "0,8"], "`batch_sizes` must be at least 1; got 0"),
        ([*NETWORK, *DATA, "--lr", "-1"], "`lr` must be positive; got -1.0"),
        ([*NETWORK, *DATA, "--batch-size", "999"], "at most the 300 training rows"),
        ([*NETWORK, *DATA, "--max-seconds", "0"], "`max_seconds` must be positive; got 0"),
        ([*NETWORK, *DATA, "--seeds", "0"], "`--seeds` must be at least 1; got 0"),
        ([*NETWORK, *DATA, "--optimizer", "lion"], "invalid choice: 'lion'"),
        ([*NETWORK, *DATA, "--output", "mine.py"], "`--output` must be a file that can"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(here, capsys, options, expected):
    before = files(here)
    try:
        code = call(*options)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if "at most about" not in line]
    assert len(lines) == 1
    assert expected in lines[0]
    assert files(here) == before
