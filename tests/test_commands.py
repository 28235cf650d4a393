"""The commands, in process: what they print, what they write, how they fail."""

import json
import os
import pickle
import re

import pytest
import torch

from sharpness import checkpoint, compare, landscape, measure, read_records, train
from sharpness.batchsize import __main__ as batchsize
from sharpness.checkpoint import Checkpoint
from sharpness.lab import data, networks
from sharpness.lab.run import train as train_network
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.reproduce import __main__ as reproduce

FEW = ["--measures", "lambda_max,phi", "--epsilon", "1e-3", "--device", "cpu"]
QUICK = ["--num-samples", "100", *FEW]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A digits F1 after two epochs; the tests copy it, never write beside it."""
    path = tmp_path_factory.mktemp("trained") / "f1.pt"
    run = Training(network="F1", batch_size=256)
    train_network(run, StoppingCriteria(epochs=2), data.load("digits"), path)
    return path


@pytest.fixture
def ckpt(trained, tmp_path):
    path = tmp_path / "f1.pt"
    path.write_bytes(trained.read_bytes())
    return path


def changed(path, **fields):
    """Write the checkpoint at `path` again with some fields changed."""
    saved = checkpoint.load(path)
    checkpoint.save(path, Checkpoint(**{**vars(saved), **fields}))
    return path


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_measure_prints_a_table_and_appends_the_record(ckpt, capsys):
    assert measure.main([str(ckpt), "--k", "2", *QUICK]) == 0
    out, err = capsys.readouterr()
    record = read_records(ckpt.with_name("records.jsonl"))[0]
    first = record["measures"]["lambda_max"][0]["eigenvalues"][0]
    shown = re.search(r"lambda_max +([\d.]+) ", out)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(first, rel=1e-3)
    assert "lambda_2" in out
    assert re.search(r"phi\(1e-3\) +≥ [\d.]+ %", out)
    assert "BatchNorm on running statistics" in out
    assert "\x1b[" not in out  # no colour in a pipe
    assert re.fullmatch(r"measuring: about [\d.e+-]+ s\n", err)


def test_measure_json_is_the_record_on_one_line_of_stdout(ckpt, tmp_path, capsys):
    output = tmp_path / "elsewhere" / "r.jsonl"
    options = ["--json", "--output", str(output), "--batchnorm", "batch", *QUICK]
    assert measure.main([str(ckpt), *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == read_records(output)[0]
    assert not ckpt.with_name("records.jsonl").exists()
    assert record["kind"] == "measurement"
    assert record["checkpoint"]["sha256"] == checkpoint.load(ckpt).sha256
    assert record["settings"]["risk"]["batchnorm"] == "batch"
    assert record["settings"]["risk"]["num_samples"] == 100
    pairs = record["measures"]["lambda_max"][0]
    assert pairs["error_bounds"][0] <= 1e-2 * pairs["eigenvalues"][0]
    phi = record["measures"]["phi"][0]
    assert phi["phi"] >= phi["phi_protocol"] > 0


def test_measure_measures_what_it_says(ckpt, capsys):
    """The value in the record is the loss of the network on that many samples."""
    assert (
        measure.main([str(ckpt), "--json", "--num-samples", "all", "--measures", "norms"])
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    x, y = data.load("digits").train
    saved = checkpoint.load(ckpt)
    model = networks.build(saved.network)
    model.load_state_dict(saved.state_dict)
    logits = model.eval()(x).log_softmax(1)
    assert record["value"] == pytest.approx(
        -float(logits[torch.arange(len(y)), y].mean().detach()), rel=1e-5
    )


def test_measure_exits_1_when_time_runs_out_and_keeps_what_it_has(ckpt, capsys):
    assert measure.main([str(ckpt), "--max-seconds", "1e-9", *QUICK]) == 1
    assert "max_seconds" in capsys.readouterr().out
    record = read_records(ckpt.with_name("records.jsonl"))[0]
    assert record["measures"]["lambda_max"][0]["status"] == "max_seconds"


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def missing(path):
    path.unlink()
    return "got no such file"


def text_file(path):
    path.write_text("lambda_max = 3\n")
    return "got another file"


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5000])
    return "got a damaged or truncated file"


def empty(path):
    path.write_bytes(b"")
    return "got another file"


def attack(path):
    path.write_bytes(pickle.dumps(Attack(path.with_name("executed")), protocol=2))
    return r"needs `(posix|nt)\.system`, which was not executed"


def attack_in_a_zip(path):
    torch.save({"format": Attack(path.with_name("executed"))}, path)
    return r"needs `(posix|nt)\.system`, which was not executed"


def bare_state_dict(path):
    torch.save(checkpoint.load(path).state_dict, path)
    return "`--network` must say what .* is a checkpoint of; got none"


def other_network(path):
    changed(path, network={"name": "F1", "arguments": {"in_features": 65}})
    return "must hold the parameters of F1; got others"


def unknown_network(path):
    changed(path, network={"name": "F9", "arguments": {}})
    return "got 'F9'"


def nan_weights(path):
    state = checkpoint.load(path).state_dict
    next(iter(state.values()))[0, 0] = float("nan")
    changed(path, state_dict=state)
    return r"got f\(theta\) = nan"


def other_data(path):
    changed(path, data={"name": "digits", "sha256": "0" * 64})
    return "other data with that name"


def unknown_data(path):
    changed(path, data={"name": "imagenet"})
    return "got 'imagenet'"


BAD_FILES = [
    missing,
    text_file,
    truncated,
    empty,
    attack,
    attack_in_a_zip,
    bare_state_dict,
    other_network,
    unknown_network,
    nan_weights,
    other_data,
    unknown_data,
]
BAD_OPTIONS = [
    (["--k", "0"], "got k=0"),
    (["--k", "1000000000"], "got k=1000000000"),
    (["--epsilon=-1"], "got -1.0"),
    (["--epsilon", "nan"], "got nan"),
    (["--epsilon", "x"], "invalid floats value: 'x'"),
    (["--tol", "0"], "got 0.0"),
    (["--num-samples", "0"], "got 0"),
    (["--num-samples", "10000000"], "got 10000000"),
    (["--subspace-dim", "0"], "got 0"),
    (["--measures", "lamda_max"], "got 'lamda_max'. Did you mean lambda_max"),
    (["--device", "abacus"], "got 'abacus'"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
]


def refused(main, arguments, folder, capsys):
    """Run a command that must fail: exit 2, one line, nothing written."""
    before = files(folder)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert files(folder) == before
    return err


@pytest.mark.parametrize("spoil", BAD_FILES, ids=lambda spoil: spoil.__name__)
def test_a_bad_checkpoint_is_one_line_and_runs_nothing_R37(ckpt, tmp_path, capsys, spoil):
    expected = spoil(ckpt)
    err = refused(measure.main, [str(ckpt), *QUICK], tmp_path, capsys)
    assert re.search(expected, err), err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("options", "expected"), BAD_OPTIONS)
def test_a_bad_option_is_one_line(ckpt, tmp_path, capsys, options, expected):
    err = refused(measure.main, [str(ckpt), *QUICK, *options], tmp_path, capsys)
    assert expected in err


def test_train_writes_both_batch_sizes_and_skips_what_is_done(tmp_path, capsys):
    network = "MLP?width=8&depth=1"
    call = [network, "--data", "digits", "--epochs", "1", "--output", str(tmp_path)]
    assert train.main([*call, "--device", "cpu", "--jobs", "1"]) == 0
    first = capsys.readouterr().out
    names = {p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")}
    assert names == {"small-seed0.pt", "large-seed0.pt", "records.jsonl"}
    assert re.findall(r"(\w+)-seed0\.pt +(\d+) +\d+ +\d+", first) == [
        ("small", "32"),
        ("large", "143"),
    ]
    before = files(tmp_path)
    assert train.main([*call, "--device", "cpu", "--jobs", "1"]) == 0
    assert files(tmp_path) == before
    sizes = {
        name: checkpoint.load(tmp_path / f"{name}-seed0.pt").training["batch_size"]
        for name in ("small", "large")
    }
    assert sizes == {"small": 32, "large": 143}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--batch-size", "0"], "got '0'"),
        (["--batch-size", "small,9999999"], "got '9999999'"),
        (["--epochs", "0"], "got 0"),
        (["--seeds", "0"], "got 0"),
        (["--learning-rate", "-1"], "got -1.0"),
        (["--data", "imagenet"], "`--data` must be one of"),
    ],
)
def test_train_refuses_in_one_line(tmp_path, capsys, options, expected):
    output = tmp_path / "runs"
    call = ["F1", "--data", "digits", "--output", str(output), *options]
    err = refused(train.main, call, tmp_path, capsys)
    assert expected in err


@pytest.mark.parametrize(
    "command", [measure, compare, landscape, train, reproduce, batchsize]
)
def test_every_flag_has_help(command):
    parser = command._parser()
    for action in parser._actions:
        assert action.help or action.choices, action.dest
