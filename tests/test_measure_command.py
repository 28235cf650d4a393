"""`measure` on networks and data of one's own: every flag, every mistake, every end."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import (
    Attack,
    by_hand,
    dense_top,
    saved,
    trained,
    user_folder,
    widened,
    write_npz,
)
from torch import nn

from sharpness import EmpiricalRisk, compare, measure, measurement, read_records
from sharpness.loading import load_checkpoint
from sharpness.measurement import MeasurementSettings, measured, pyhessian_readings
from sharpness.measures import summary
from sharpness.measures.registry import MEASURES
from sharpness.results import readings_of

MORE = """
class Drifting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 0.01 * self.calls)

def drifting():
    return Drifting(5, 3)

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.used(x)

def relu():
    first, last = nn.Linear(5, 6, bias=False), nn.Linear(6, 3, bias=False)
    return nn.Sequential(first, nn.ReLU(), last)

far_classes = lambda: (points()[0], torch.arange(30))
flat = lambda: (points()[0], normal(30))

def ignored():
    y = points()[1]
    y[:4] = -100
    return points()[0], y

nan = lambda: (points()[0].log(), points()[1])
"""
CALL = ["--network", "nets.py:mlp", "--data", "nets.py:points", "--device", "cpu"]
NORMS = ["--measures", "norms"]
NET = Path("net.pt")


@pytest.fixture
def nets(tmp_path, monkeypatch):
    with user_folder(tmp_path, monkeypatch, MORE) as module:
        saved(trained(module.mlp(), module.points()))
        yield module


@pytest.fixture
def run(nets, capsys):
    """The record and the exit code of a call, with `--json`."""

    def call(*options, code=0, paths=("net.pt",)):
        assert measure.main([*paths, *CALL, "--json", *options]) == code
        out = capsys.readouterr().out
        records = [
            json.loads(line, parse_constant=pytest.fail) for line in out.split("\n")[:-1]
        ]
        assert len(records) == len(paths)
        return records[0]

    return call


def files(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {path: path.read_bytes() for path in paths}


@pytest.fixture
def refused(nets, tmp_path, capsys, monkeypatch):
    """A call that must end at once: exit 2, one line, nothing written, nothing measured."""
    runs = []
    summary = measurement.summary
    monkeypatch.setattr(
        measurement, "summary", lambda *a, **k: (runs.append(0), summary(*a, **k))[1]
    )

    def call(*arguments, main=measure.main, at_once=True):
        before = files(tmp_path)
        try:
            code = main([*arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        assert files(tmp_path) == before
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        assert not (at_once and runs)
        return err

    return call


# -- a plan ------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "code"), [(10**12, 0), (20_000, 1)])
def test_a_plan_says_what_it_takes_and_measures_nothing(
    free, code, nets, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(measurement, "summary", pytest.fail)
    monkeypatch.setattr("sharpness.risk.memory.free_bytes", lambda device: free)
    before = files(tmp_path)
    assert measure.main(["net.pt", *CALL, "--plan"]) == code
    out = capsys.readouterr().out
    assert files(tmp_path) == before
    assert "net.pt: " in out
    assert re.search(r"all measures asked for: [\d.e+-]+ s", out)


# -- flags -------------------------------------------------------------------------------

FLAGS = """
--network --data --data-dir --loss --measures --num-samples --split --batchnorm
--epsilon --rho --k --tol --seed --device --dtype --max-seconds --json --output
--num-starts --subspace-dim --shard-size --accuracy-drop --engine
"""


@pytest.mark.parametrize(
    ("command", "own"),
    [
        (measure, ["--audit", "--cross-check", "--doctor", "checkpoint"]),
        (compare, ["--figure", "first"]),
    ],
)
def test_help_names_every_flag_and_what_it_does(command, own, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for flag in (*FLAGS.split(), *own):
        assert flag in out
    for action in command._parser()._actions:
        assert action.help or action.choices, action.dest
    for name in ("curvature", "lambda_max", "worst_l2_sharded"):
        assert name in out or command is compare


def read(record):
    return {reading.name: reading for reading in readings_of(record)}


def eigenvalues(record):
    return record["measures"]["lambda_max"][0]


EFFECTS = {
    "--k 3": ("lambda_max", lambda r: "lambda_3" in read(r)),
    "--tol 1e-6": (
        "lambda_max",
        lambda r: (
            max(eigenvalues(r)["error_bounds"]) <= 1e-6 * eigenvalues(r)["eigenvalues"][0]
        ),
    ),
    "--epsilon 1e-2,2e-2": (
        "phi",
        lambda r: set(read(r)) >= {"phi(0.01)", "phi(0.02)"},
    ),
    "--subspace-dim 7": (
        "phi_subspace --epsilon 1e-3",
        lambda r: "phi(1e-3, p=7)" in read(r),
    ),
    "--rho 0.1,0.2": ("average", lambda r: len(r["measures"]["average"]) == 2),
    "--rho 0.3": (
        "worst_l2",
        lambda r: r["measures"]["worst_l2"][0]["settings"]["rho"] == 0.3,
    ),
    "--shard-size 10": (
        "worst_l2_sharded",
        lambda r: r["measures"]["worst_l2_sharded"][0]["num_shards"] == 3,
    ),
    "--accuracy-drop 0.2": (
        "box_alpha",
        lambda r: r["measures"]["box_alpha"][0]["settings"]["accuracy_drop"] == 0.2,
    ),
    "--num-samples 12": ("norms", lambda r: r["settings"]["risk"]["num_samples"] == 12),
    "--num-samples all": ("norms", lambda r: r["settings"]["risk"]["num_samples"] == 30),
    "--dtype float64": ("norms", lambda r: r["settings"]["risk"]["dtype"] == "float64"),
    "--engine differences": (
        "lambda_max",
        lambda r: r["settings"]["risk"]["engine"]["engine"] == "differences",
    ),
    "--doctor": (
        "norms",
        lambda r: len((r["doctor"] or {"findings": []})["findings"]) > 5,
    ),
    "--data nets.py:splits --split test": (
        "norms",
        lambda r: (
            (r["data"]["split"], r["settings"]["risk"]["num_samples"]) == ("test", 13)
        ),
    ),
}


@pytest.mark.parametrize("options", EFFECTS)
def test_a_flag_does_what_its_help_says(run, options):
    measures, holds = EFFECTS[options]
    record = run("--measures", *measures.split(), *options.split())
    assert holds(record), read(record)
    without = [o for o in options.split() if o.startswith("--data") or o.startswith("nets")]
    assert not holds(
        run("--measures", *measures.split(), *without, "--num-samples", "30")
    ) or ("all" in options)


def test_more_starts_of_phi_cost_more_and_find_no_less(run):
    one, three = (
        run("--measures", "phi", "--epsilon", "1e-2", "--num-starts", num)["measures"][
            "phi"
        ][0]
        for num in "13"
    )
    assert three["cost"]["gradients"] > one["cost"]["gradients"]
    assert three["phi"] >= one["phi"]


def test_the_seed_draws_the_samples(run):
    values = [run(*NORMS, "--num-samples", "9", "--seed", seed)["value"] for seed in "001"]
    assert values[0] == values[1] != values[2]


def test_names_and_families_choose_the_measures(run):
    record = run("--measures", " norms, average ")
    names = [n.split("(")[0] for n in read(record)]
    assert names == ["average", "gradient_norm", "parameter_norm", "fisher_rao"]
    assert {"lambda_max", "trace"} <= set(run("--measures", "curvature")["measures"])


@pytest.mark.parametrize("mode", ["running", "batch", "recalibrated"])
def test_batchnorm_runs_as_asked(nets, capsys, mode):
    model = trained(nets.ResNet(), nets.images())
    call = [saved(model), "--network", "nets.py:ResNet", "--data", "nets.py:images"]
    options = [
        *NORMS,
        "--batchnorm",
        mode,
        "--dtype",
        "float64",
        "--device",
        "cpu",
        "--json",
    ]
    assert measure.main([*call, *options]) == 0
    record = json.loads(capsys.readouterr().out)
    images = widened(nets.images())
    model = model.double().train()
    if mode != "batch":
        if mode == "recalibrated":
            model.norm.reset_running_stats()
            model.norm.momentum = 1.0
            model(images[0])
        model.eval()
    expected = float(by_hand(model, images).detach())
    assert record["value"] == pytest.approx(expected, rel=1e-10)
    assert record["settings"]["risk"]["batchnorm"] == mode


def test_regression_takes_mse_and_a_loss_of_ones_own(nets, capsys):
    model = trained(nets.mlp(outputs=2), nets.regression())
    call = [saved(model), "--network", "nets.py:mlp?outputs=2", "--data"]
    call += ["nets.py:regression", *NORMS, "--json", "--dtype", "float64"]
    x, y = widened(nets.regression())
    distance = (model.double()(x) - y).detach().abs()
    for loss, expected in (("mse", distance.square()), ("torch.nn:L1Loss", distance)):
        assert measure.main([*call, "--loss", loss]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["value"] == pytest.approx(float(expected.mean()), rel=1e-12)
        assert record["accuracy"] is None
        assert record["generalisation"] is None


def test_targets_in_a_row_are_not_spread_against_outputs_in_a_column(nets, refused):
    """(N,) against (N, 1): PyTorch would compare every output with every target."""
    saved(nets.mlp(outputs=1))
    call = ["net.pt", "--network", "nets.py:mlp?outputs=1", "--data", "nets.py:flat"]
    assert "nets.py:flat" in refused(*call, *NORMS)


def test_a_network_that_draws_fails_the_doctor_and_exits_1(nets, capsys):
    path = saved(trained(nets.drifting(), nets.points()))
    call = [path, "--network", "nets.py:drifting", *CALL[2:], *NORMS, "--doctor"]
    assert measure.main(call) == 1
    assert "failed deterministic" in " ".join(capsys.readouterr().out.split())


def test_the_audit_tells_what_moves_from_what_does_not(nets, capsys, monkeypatch):
    """Fisher-Rao of a ReLU network without biases is invariant, lengths are not."""
    monkeypatch.setattr("sharpness.measures.audit.AUDITED", ("norms", "average"))  # cheap
    path = saved(trained(nets.relu(), nets.points()))
    call = [path, "--network", "nets.py:relu", *CALL[2:], *NORMS, "--audit"]
    assert measure.main(call) == 0
    out = capsys.readouterr().out
    assert "moved" in out
    audited = read_records("records.jsonl")[0]["audit"]
    assert audited["audit fisher_rao"] == pytest.approx(1, rel=1e-3)
    assert audited["audit parameter_norm"] > 1.02


# -- what is printed and kept ------------------------------------------------------------


def test_several_checkpoints_and_globs_are_measured_once_each_in_order(
    nets, tmp_path, capsys
):
    for name in ("b2", "a1", "b1"):
        saved(nets.mlp(), f"{name}.pt")
    assert measure.main(["net.pt", "b*.pt", "b1.pt", *CALL, *NORMS, "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    paths = [json.loads(line)["checkpoint"]["path"] for line in out]
    assert paths == ["net.pt", "b1.pt", "b2.pt"]
    assert [r["checkpoint"]["path"] for r in read_records("records.jsonl")] == paths


def test_brackets_in_names_are_letters(nets, tmp_path, capsys):
    folder = tmp_path / "[best]"
    folder.mkdir()
    saved(nets.mlp(), folder / "net[1].pt")
    assert measure.main([str(folder / "net[1].pt"), *CALL, *NORMS]) == 0
    assert "[best]" in capsys.readouterr().out
    assert len(read_records(folder / "records.jsonl")) == 1


def test_the_table_says_what_the_record_says(nets, capsys):
    options = ["--data", "nets.py:splits", "--measures", "norms,lambda_max"]
    assert measure.main(["net.pt", *CALL, *options]) == 0
    out = capsys.readouterr().out
    record = read_records("records.jsonl")[0]
    for name, reading in read(record).items():
        row = next(row for row in map(str.split, out.splitlines()) if row[:1] == [name])
        assert float(row[1]) == pytest.approx(reading.value, rel=2e-3)
    assert "nets.py:splits train, 30 samples" in out
    assert f"accuracy {record['accuracy']:.1%}" in out
    assert "\x1b[" not in out


def test_the_generalisation_gap_is_the_one_by_hand(nets, run):
    record = run("--data", "nets.py:splits", *NORMS, "--dtype", "float64")
    model = trained(nets.mlp(), nets.points())
    model.load_state_dict(torch.load("net.pt"))
    model, parts = model.double(), [widened(p) for p in nets.splits().values()]
    train, test = (float(by_hand(model, part).detach()) for part in parts)
    right = [float((model(x).argmax(1) == y).double().mean()) for x, y in parts]
    found = record["generalisation"]
    assert found["test_loss"] == pytest.approx(test, rel=1e-12)
    assert found["loss_gap"] == pytest.approx(test - train, rel=1e-9)
    assert found["test_accuracy"] == right[1]
    assert found["accuracy_gap"] == pytest.approx(right[0] - right[1], abs=1e-15)
    assert (
        run("--data", "nets.py:splits", "--split", "test", *NORMS)["generalisation"] is None
    )


def test_a_large_test_set_of_uneven_classes_is_no_obstacle(run):
    record = run("--data", "nets.py:unbalanced_test", *NORMS)
    assert record["generalisation"]["test_loss"] > 0


def test_one_subject_can_be_measured_in_both_precisions(nets):
    """None is the precision of the checkpoint, whatever was measured before."""
    subject = load_checkpoint("net.pt", network="nets.py:mlp", data="nets.py:points")
    types = [
        measured(
            subject, MeasurementSettings(measures=("norms",), num_samples=None, dtype=dtype)
        ).record
        for dtype in ("float64", None)
    ]
    assert [r["settings"]["risk"]["dtype"] for r in types] == ["float64", "float32"]


# -- mistakes ----------------------------------------------------------------------------


def nan_weights(nets):
    model = nets.mlp()
    torch.nn.init.constant_(model[0].weight, float("nan"))
    return saved(model)


BAD_CHECKPOINTS = {
    "nan": (nan_weights, "f(theta) = nan"),
    "shapes": (lambda n: saved(n.mlp(7)), "tensors differ"),
    "attack": (lambda n: NET.write_bytes(pickle.dumps(Attack())), "not executed"),
    "text": (lambda n: NET.write_text("hello"), "another file"),
    "truncated": (lambda n: os.truncate(NET, 700), "truncated"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_one_line_R37(nets, tmp_path, refused, kind):
    spoil, expected = BAD_CHECKPOINTS[kind]
    spoil(nets)
    err = refused("net.pt", *CALL)
    assert expected in err
    assert "net.pt" in err
    assert not (tmp_path / "executed").exists()


MISFITS = {
    "images": ["--data", "nets.py:images"],
    "words": ["--data", "nets.py:words"],
    "two inputs": ["--data", "nets.py:named"],
    "more classes": ["--data", "nets.py:far_classes"],
    "another loss": ["--loss", "mse"],
    "bytes": ["--data", "bytes.npz"],
    "uneven inputs": ["--data", "nets.py:uneven_second", "--num-samples", "9"],
    "nan": ["--data", "nets.py:nan"],
    "none": ["--data", "none.npz"],
}


@pytest.mark.parametrize("kind", MISFITS)
def test_data_that_do_not_fit_the_network_are_one_line(refused, kind):
    write_npz("none.npz", x=np.ones((0, 5)), y=np.arange(0))
    write_npz("bytes.npz", x=np.ones((6, 5), np.uint8), y=np.arange(6) % 3)
    err = refused("net.pt", *CALL, *NORMS, *MISFITS[kind])
    assert MISFITS[kind][1] in err or "net.pt" in err


def test_ignored_targets_are_no_class_when_samples_are_drawn(run):
    found = run(*NORMS, "--data", "nets.py:ignored", "--num-samples", "9")
    assert found["settings"]["risk"]["num_samples"] == 9


BAD_OPTIONS = [
    ("--measures sharpnes", "'sharpnes'"),
    ("--measures ,", "`measures`"),
    ("--measures lambda_max --k 0", "got k=0"),
    ("--measures lambda_max --k 2.5", "'2.5'"),
    ("--measures lambda_max --tol nan", "got nan"),
    ("--measures phi --epsilon 0", "got 0.0"),
    ("--measures phi --num-starts 0", "got 0"),
    ("--measures phi_subspace --subspace-dim 0", "got 0"),
    ("--measures worst_l2_sharded --shard-size 0", "got 0"),
    ("--measures worst_l2_sharded --shard-size=-3", "got -3"),
    ("--measures average --rho=-0.1", "got -0.1"),
    ("--measures average --rho 0.1,inf", "got inf"),
    ("--measures average --rho a", "'a'"),
    ("--measures box_alpha --accuracy-drop 1.5", "got 1.5"),
    ("--measures lambda_max,box_alpha --accuracy-drop 0", "got 0"),
    ("--measures norms --num-samples 31", "got 31"),
    ("--measures norms --num-samples some", "'some'"),
    ("--measures norms --split validation", "'validation'"),
    ("--measures norms --split test", "--split"),
    ("--measures norms --dtype float8", "'float8'"),
    ("--measures norms --device abacus", "'abacus'"),
    ("--measures norms --device meta", "'meta'"),
    ("--measures average --max-seconds=-1", "-1"),
    ("--measures average --max-seconds nan", "nan"),
    ("--measures average --seed 99999999999999999999", "99999999999999999999"),
    ("--measures norms --network nets.py:gone", "'gone'"),
    ("--measures norms --network gone", "'gone'"),
    ("--measures norms --data gone.npz", "gone.npz"),
    ("--measures norms --loss gone", "'gone'"),
    ("--measures norms --output folder", "folder"),
    ("--measures norms --output net.pt/records.jsonl", "net.pt/records.jsonl"),
]


@pytest.mark.parametrize(("options", "expected"), BAD_OPTIONS)
def test_a_bad_option_is_one_line_before_anything_is_measured(
    refused, tmp_path, options, expected
):
    (tmp_path / "folder").mkdir()
    early = "--k" not in options and "--tol" not in options  # the measure's own check
    err = refused("net.pt", *CALL, *options.split(), at_once=early)
    assert expected in err


def test_a_second_checkpoint_that_is_missing_stops_before_the_first_is_measured(refused):
    assert "gone.pt" in refused("net.pt", "gone.pt", *CALL, *NORMS)
    assert "'no*.pt'" in refused("net.pt", "no*.pt", *CALL, *NORMS)


# -- how it can end ----------------------------------------------------------------------


def test_an_interrupt_keeps_what_there_is_and_measures_nothing_more(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(EmpiricalRisk, "product", interrupt)
    record = run("--measures", "lambda_max,trace,norms", code=130)
    assert eigenvalues(record)["status"] == "interrupted"
    assert "trace" not in record["measures"]
    assert "norms" not in record["measures"]


def test_an_interrupt_of_the_first_checkpoint_stops_before_the_second(
    nets, capsys, monkeypatch
):
    calls = []

    def interrupt(*_):
        calls.append(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(EmpiricalRisk, "product", interrupt)
    saved(nets.mlp(), "other.pt")
    assert measure.main(["net.pt", "other.pt", *CALL, "--measures", "lambda_max"]) != 0
    assert len(calls) == 1


def test_an_interrupt_before_the_measures_is_one_line_and_130(nets, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(EmpiricalRisk, "value", interrupt)
    assert measure.main(["net.pt", *CALL, *NORMS]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_no_time_is_exit_1_with_every_measure_in_the_record(run):
    record = run("--measures", "lambda_max,average", "--max-seconds", "1e-9", code=1)
    assert eigenvalues(record)["status"] == "max_seconds"
    assert record["measures"]["average"][0]["status"] == "max_seconds"


# -- PyHessian ---------------------------------------------------------------------------


def least_squares(**options):
    """One output; the Hessian is 2/N X^T X, with a wide gap below its top."""
    x = torch.randn(40, 5, dtype=torch.float64) * torch.tensor([3, 1, 0.5, 0.2, 0.1])
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    risk = EmpiricalRisk(model, nn.MSELoss(), (x, x[:, :1].clone()), **options)
    return risk, float(torch.linalg.eigvalsh(2 / 40 * x.T @ x)[-1])


@pytest.mark.parametrize("chunk_size", [40, 9, 1])
def test_pyhessian_finds_the_closed_form_on_any_chunks(chunk_size):
    """It stops at a relative change of 1e-4, and gives the value before that step."""
    risk, top = least_squares(chunk_size=chunk_size)
    [reading] = pyhessian_readings(risk)
    assert reading.value == pytest.approx(top, rel=1.1e-4)
    assert reading.error is None
    assert all(p.grad is None for p in risk.model.parameters())


def test_pyhessian_leaves_the_generator_alone_r22():
    risk, _ = least_squares()
    state = torch.get_rng_state()
    pyhessian_readings(risk)
    assert torch.equal(torch.get_rng_state(), state)


def part_of_theta(nets):
    return EmpiricalRisk(nets.mlp(), nn.CrossEntropyLoss(), nets.points(), params="2.*")


def summed(nets):
    return EmpiricalRisk(nets.mlp(), nn.CrossEntropyLoss(reduction="sum"), nets.points())


def ignoring(nets):
    model = trained(nets.mlp(), nets.points())
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), nets.ignored(), chunk_size=5)


def unused(nets):
    return EmpiricalRisk(nets.Unused(), nn.CrossEntropyLoss(), nets.points())


def named(nets):
    return EmpiricalRisk(nets.Two(), nn.CrossEntropyLoss(), nets.named())


@pytest.mark.parametrize("make", [part_of_theta, summed, ignoring, unused, named])
def test_pyhessian_sees_the_same_function_or_says_that_it_cannot(nets, make):
    risk = make(nets)
    values = np.linalg.eigvalsh(risk.product(torch.eye(risk.n)).double().numpy())
    top = max(values, key=abs)
    try:
        [reading] = pyhessian_readings(risk, max_iter=2000)
    except (ValueError, TypeError) as error:
        said = str(error)
    else:
        assert reading.value == pytest.approx(top, rel=2e-2)
        return
    assert "--cross-check" in said
    assert "\n" not in said


def test_the_cross_check_stands_beside_our_number(nets, run):
    record = run("--measures", "lambda_max", "--cross-check", "--num-samples", "all")
    model = nets.mlp()
    model.load_state_dict(torch.load("net.pt"))
    top = dense_top(model, nets.points())
    ours, (theirs,) = read(record)["lambda_max"], record["cross_check"]
    assert theirs["name"] == "lambda_max (PyHessian)"
    assert abs(ours.value - top) <= ours.error + 1e-6 * top
    assert theirs["value"] == pytest.approx(top, rel=2e-2)
    (again,) = run("--measures", "lambda_max", "--cross-check")["cross_check"]
    assert again["value"] == theirs["value"]


def test_a_cross_check_that_cannot_be_is_refused_at_once(nets, refused, monkeypatch):
    saved(trained(nets.ResNet(), nets.images()))
    call = ["net.pt", "--network", "nets.py:ResNet", "--data", "nets.py:images", *NORMS]
    err = refused(*call, "--cross-check", "--batchnorm", "batch")
    assert "--cross-check" in err
    assert "'batch'" in err
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    assert "pip install pyhessian" in refused(*call, "--cross-check")


def test_rows_are_printed_as_they_are_done(nets, monkeypatch, capsys):
    """An interrupt in the second measure: the head and the first row stand there."""

    def interrupted(*_):
        print("NOW")
        raise KeyboardInterrupt

    monkeypatch.setitem(summary.RUNS, "trace", (interrupted, summary.RUNS["trace"][1]))
    options = ["--measures", "lambda_max,trace"]
    assert measure.main(["net.pt", *CALL, *options]) == 130
    before, after = capsys.readouterr().out.split("NOW")
    assert before.startswith("nets.py:mlp")
    assert "evidence" in before
    assert "lambda_max" in before
    assert "lambda_max" not in after


def test_help_has_a_line_for_each_measure_and_flags_in_groups(capsys):
    with pytest.raises(SystemExit):
        measure.main(["--help"])
    out = capsys.readouterr().out
    for name, about in MEASURES.items():
        assert f"{name:<25} {about.definition}" in out or about.family == "tracking"
    order = [out.index(text) for text in ("which measures:", "  --epsilon ", "output:")]
    assert order == sorted(order)
