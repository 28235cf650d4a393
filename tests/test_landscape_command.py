"""`python -m sharpness.landscape`: pictures, points and records of checkpoints."""

import json

import pytest
from test_commands import changed, files, refused

from sharpness import checkpoint, landscape, read_records
from sharpness.lab import data
from sharpness.lab.run import train
from sharpness.lab.training import StoppingCriteria, Training

QUICK = ["--num-samples", "50", "--num-points", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for seed in range(2):
        run = Training(network="MLP?width=8&depth=1", batch_size=256, seed=seed)
        train(run, StoppingCriteria(epochs=2), data.load("digits"), folder / f"{seed}.pt")
    return folder


@pytest.fixture
def pair(trained, tmp_path):
    for path in trained.glob("*.pt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return [str(tmp_path / f"{seed}.pt") for seed in range(2)]


def test_a_plane_is_drawn_kept_and_carried_on(pair, tmp_path, capsys):
    assert landscape.main([pair[0], *QUICK]) == 0
    out = capsys.readouterr().out
    (picture,), (points,) = tmp_path.glob("0-random-*.png"), tmp_path.glob("0-random-*.csv")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in out
    assert "deviation" in out
    assert len(points.read_text().splitlines()) == 2 + 9
    (first,) = read_records(tmp_path / "records.jsonl")
    assert first["kind"] == "landscape"
    assert first["checkpoint"]["sha256"] == checkpoint.load(pair[0]).sha256
    assert first["landscape"]["cost"]["forwards"] == 10
    points.write_text("\n".join(points.read_text().splitlines()[:6]) + "\n")
    assert landscape.main([pair[0], "--max-seconds", "600", *QUICK]) == 0
    second = read_records(tmp_path / "records.jsonl")[1]
    assert second["landscape"]["cost"]["forwards"] == 1 + 5
    assert second["landscape"]["values"] == first["landscape"]["values"]


def test_with_another_network_it_is_the_line_between(pair, tmp_path, capsys):
    assert landscape.main([*pair, "--json", *QUICK]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["networks"] == pair[1:]
    found = record["landscape"]
    assert found["settings"]["directions"] == "between"
    assert len(found["values"]) == 3
    assert found["networks"][0][0] > 0
    assert record == read_records(tmp_path / "records.jsonl")[0]


def test_a_path_has_both_barriers(pair, tmp_path, capsys):
    call = [*pair, "--directions", "path", "--num-steps", "2", *QUICK]
    figure = tmp_path / "deep" / "path.svg"
    assert landscape.main([*call, "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "barrier of the path" in out
    assert "barrier of the line" in out
    assert "<svg" in figure.read_text()


def test_time_that_runs_out_is_exit_1(pair, capsys):
    assert landscape.main([pair[0], "--max-seconds", "0", *QUICK]) == 1
    assert "max_seconds: Stopped at" in capsys.readouterr().out


WRONG = [
    (["--num-points", "1"], "`num_points` must be at least 2"),
    (["--extent", "-1"], "`extent` must be positive"),
    (["--figure", "a.gif"], "`--figure` must end in .png, .pdf or .svg"),
    (["--directions", "between"], "`networks` must hold 1 for a line or 2 for a plane"),
    (["--directions", "path"], "`networks` must be one for 'path'"),
    (["--directions", "sideways"], "invalid choice: 'sideways'"),
    (["--data", "imagenet"], "got 'imagenet'"),
]


@pytest.mark.parametrize(("options", "expected"), WRONG)
def test_a_wrong_option_is_one_line(pair, tmp_path, capsys, options, expected):
    err = refused(landscape.main, [pair[0], *QUICK, *options], tmp_path, capsys)
    assert expected in err


def test_another_network_is_refused(pair, tmp_path, capsys):
    other = {"name": "MLP", "arguments": {"in_features": 64, "out_features": 10}}
    state = {"weight": next(iter(checkpoint.load(pair[0]).state_dict.values()))}
    changed(tmp_path / "1.pt", network=other, state_dict=state)
    before = files(tmp_path)
    err = refused(landscape.main, [*pair, *QUICK], tmp_path, capsys)
    assert "must hold the parameters" in err
    assert files(tmp_path) == before
