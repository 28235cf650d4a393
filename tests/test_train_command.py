"""`python -m sharpness.train`: what it trains, skips, refuses, records and leaves alone."""

import itertools
import math
import re
import resource
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.training import bits, generators
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sharpness import checkpoint, read_records
from sharpness import train as command
from sharpness.lab import data
from sharpness.lab.regimes import REGIMES
from sharpness.lab.run import train
from sharpness.lab.training import StoppingCriteria, Training

MLP = "MLP?width=8&depth=1"
FIXED = ["--data", "digits", "--device", "cpu", "--jobs", "1"]
ONE = [MLP, "--batch-size", "64", "--updates", "5"]
NAME = "batch64-seed0.pt"


def call(folder, *options):
    return command.main([*FIXED, "--output", str(folder), *options])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


def status(folder):
    """How often each checkpoint was recorded with each status."""
    records = read_records(folder / "records.jsonl")
    assert {record["kind"] for record in records} <= {"training"}
    return Counter((r["path"].rpartition("/")[2], r["status"]) for r in records)


@pytest.fixture
def updates():
    """A list that grows by one with every update."""
    made = []
    hook = register_optimizer_step_pre_hook(lambda *_: made.append(0))
    yield made
    hook.remove()


@pytest.fixture
def planned(monkeypatch):
    """The runs that a call would train; none is trained."""

    def of(*options):
        runs = []
        with monkeypatch.context() as patch:
            patch.setattr(
                "sharpness.lab.sweep.sweep",
                lambda asked, *_, **__: runs.extend(asked) or [],
            )
            assert command.main([*options, *FIXED[:4]]) == 0
        return runs

    return of


@contextmanager
def no_file_larger_than(size):
    """As on a disk that is full; Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- what it trains ----------------------------------------------------------------------


def test_two_batch_sizes_and_two_seeds_are_four_networks(tmp_path, capsys):
    options = ["--batch-size", "64,256", "--seeds", "2", "--updates", "3"]
    assert call(tmp_path, MLP, *options) == 0
    out, err = capsys.readouterr()
    names = {f"batch{b}-seed{s}.pt" for b in (64, 256) for s in (0, 1)}
    assert files(tmp_path).keys() == names
    assert status(tmp_path) == {(name, "finished"): 1 for name in names}
    assert (out.count("3 updates, training loss"), err) == (4, "")
    saved = {name: checkpoint.load(tmp_path / name) for name in names}
    training = Training(network=MLP, batch_size=256, seed=1)
    path = tmp_path / "alone" / "a.pt"
    alone = train(training, StoppingCriteria(updates=3), data.load("digits"), path)
    assert bits(saved["batch256-seed1.pt"]) == bits(alone)
    starts = [
        saved[f"batch{b}-seed{s}.pt"].start["sha256"] for s in (0, 1) for b in (64, 256)
    ]
    assert starts[0] == starts[1] != starts[2] == starts[3]


def test_small_and_large_batch_train_for_the_epochs_asked_for(tmp_path, capsys):
    assert call(tmp_path, MLP, "--epochs", "2") == 0
    out = capsys.readouterr().out
    assert files(tmp_path).keys() == {"small-seed0.pt", "large-seed0.pt"}
    for name, size in (("small", 32), ("large", 143)):
        saved = checkpoint.load(tmp_path / f"{name}-seed0.pt").training
        assert saved["batch_size"] == size
        assert saved["updates"] == round(2 * 1433 / size)
        assert saved["epoch"] == len(saved["history"]) == 2
    assert out.count(": 2 epochs, ") == 2


def clocks(out, name):
    """Updates and samples of a run in the table at the end."""
    (row,) = [line.split() for line in out.splitlines() if line.startswith(f" {name}")]
    return int(row[2]), int(row[3])


def test_updates_samples_and_seconds_of_different_batch_sizes_are_said(tmp_path, capsys):
    assert call(tmp_path, MLP, "--batch-size", "64,256", "--epochs", "2") == 0
    out = capsys.readouterr().out
    expected = {64: round(2 * 1433 / 64), 256: round(2 * 1433 / 256)}
    for size, updates in expected.items():
        assert f"{size}: {updates} updates, {size * updates} samples" in out.splitlines()[0]
        assert f"{size * updates} samples, {updates} updates, training loss" in out
        assert clocks(out, f"batch{size}-seed0.pt") == (updates, size * updates)
    assert "seconds" in out
    assert call(tmp_path / "equal", MLP, "--batch-size", "64,256", "--updates", "3") == 0
    out = capsys.readouterr().out
    assert "64: 3 updates, 192 samples; 256: 3 updates, 768 samples" in out
    assert call(tmp_path / "one", *ONE, "--seeds", "2") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 2  # nothing to compare


def test_finished_runs_are_skipped_and_a_longer_budget_carries_on(tmp_path, updates):
    assert call(tmp_path, *ONE) == 0
    before = files(tmp_path)
    assert call(tmp_path, *ONE) == 0
    assert (len(updates), files(tmp_path)) == (5, before)
    assert call(tmp_path, *ONE[:-1], "30", "--seeds", "2") == 0
    assert len(updates) == 30 + 30
    assert call(tmp_path / "whole", *ONE[:-1], "30") == 0
    both = [checkpoint.load(folder / NAME) for folder in (tmp_path, tmp_path / "whole")]
    assert bits(both[0]) == bits(both[1])


def test_an_interrupted_call_carries_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sharpness.lab.run._SAVE_EVERY", -1.0)
    whole, made = tmp_path / "whole", []
    assert call(whole, *ONE, "--seeds", "2") == 0
    capsys.readouterr()

    def interrupt(*_):
        made.append(0)
        if len(made) == 8:
            raise KeyboardInterrupt

    hook, before = register_optimizer_step_pre_hook(interrupt), generators()
    try:
        assert call(tmp_path, *ONE, "--seeds", "2") == 130
        out, err = capsys.readouterr()
        assert (out.count("\n"), err.count("\n")) == (1, 1)
        assert "interrupted; the same command carries on" in err
        assert call(tmp_path, *ONE, "--seeds", "2") == 0
    finally:
        hook.remove()
    assert len(made) <= 10 + 2  # no update but the one in flight was made twice
    for name in files(whole):
        assert bits(checkpoint.load(tmp_path / name)) == bits(checkpoint.load(whole / name))
    assert generators() == before


def test_budgets_of_loss_and_patience_and_what_is_kept(tmp_path):
    options = [MLP, "--batch-size", "64", "--epochs", "30", "--keep-every", "1"]
    assert call(tmp_path / "a", *options, "--until-loss", "1.5") == 0
    saved = checkpoint.load(tmp_path / "a" / NAME).training
    assert saved["metrics"]["train_loss_batch"] <= 1.5
    epochs = range(1, saved["epoch"] + 1)
    kept = [tmp_path / "a" / f"batch64-seed0-epoch{i}.pt" for i in epochs]
    losses = [checkpoint.load(p).training["metrics"]["train_loss_batch"] for p in kept]
    assert len(losses) > 1
    assert all(loss > 1.5 for loss in losses[:-1])
    still = ["--patience", "2", "--optimizer", "sgd", "--learning-rate", "1e-9"]
    assert call(tmp_path / "b", *options, *still) == 0
    saved = checkpoint.load(tmp_path / "b" / "batch64-lr1e-09-sgd-seed0.pt").training
    assert saved["epoch"] == 3


def test_a_run_starts_from_a_checkpoint(tmp_path):
    assert call(tmp_path, *ONE) == 0
    start = ["--start-from", str(tmp_path / NAME), "--optimizer", "sgd"]
    assert call(tmp_path, *ONE[:-1], "1", *start, "--learning-rate", "1e-30") == 0
    first = checkpoint.load(tmp_path / NAME).state_dict
    second = checkpoint.load(tmp_path / f"batch64-lr1e-30-sgd-from-{NAME[:-3]}-seed0.pt")
    assert second.start["from"] == str(tmp_path / NAME)
    assert all(torch.equal(first[name], t) for name, t in second.state_dict.items())


# Learning rate of the first update with a batch of 8, by the papers' rules.
RATES = {
    "keskar2017": 1e-3,
    "masters2018": 8 / 256,
    "smith2018-decay": 0.1,
    "smith2018-hybrid": 0.1,
    "smith2018-increase": 0.1,
    "smith2018-increased-rate": 0.5,
    "smith2018-increased-momentum": 0.5,
    "hoffer2017-mnist": 0.1 * math.sqrt(8 / 128),
    "hoffer2017-cifar": 0.1 * math.sqrt(8 / 128),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REGIMES))
def test_every_regime_trains(tmp_path, name):
    options = ["ResNet-8", "--regime", name, "--batch-size", "8", "--updates", "3"]
    assert call(tmp_path, *options) == 0
    saved = checkpoint.load(tmp_path / "batch8-seed0.pt")
    group = saved.optimizer["param_groups"][0]
    assert group["lr"] == pytest.approx(RATES[name])
    adam = name == "keskar2017"
    momentum = {"masters2018": 0, "smith2018-increased-momentum": 0.98}.get(name, 0.9)
    assert adam == ("betas" in group)
    assert adam or group["momentum"] == momentum
    assert saved.training["updates"] == 3
    assert all(bool(t.isfinite().all()) for t in saved.state_dict.values())


def test_flags_override_a_regime(planned):
    options = ["ResNet-8", "--regime", "hoffer2017-cifar", "--batch-size", "128,1024"]
    small, large = planned(*options)
    assert (small.budget.epochs, large.budget.epochs) == (200, 1600)
    assert large.training.course(50_000).num_updates(1600) == 200 * 50_000 / 128
    flags = ["--learning-rate", "0.3", "--clip-norm", "2", "--weight-decay", "0"]
    flags += ["--epochs", "3", "--schedule", "constant"]
    other = planned(*options[:-1], "128", *flags)
    expected = replace(
        small.training,
        learning_rate=0.3,
        clip_norm=2.0,
        weight_decay=0.0,
        schedule="constant",
    )
    assert [run.training for run in other] == [expected]
    assert other[0].budget == StoppingCriteria(epochs=3)


def test_what_is_not_given_has_the_papers_or_keras_values(planned):
    small, large = planned("F1")
    assert str(small.path.parent) == "runs/f1-digits"
    assert (small.training.batch_size, large.training.batch_size) == (32, 143)
    assert (small.budget, large.budget) == (
        StoppingCriteria(epochs=20),
        StoppingCriteria(epochs=40),
    )
    assert small.training == Training(network="F1", batch_size=32)
    (one,) = planned("F1", "--batch-size", "64", "--updates", "7")
    assert one.budget == StoppingCriteria(updates=7)
    every = "adam,sgd,momentum,nesterov,adagrad"
    runs = planned("F1", "--batch-size", "64", "--optimizer", every)
    assert [run.training.learning_rate for run in runs] == [1e-3] + [1e-2] * 4


def test_lists_with_commas_are_every_combination_with_a_name_of_its_own(planned):
    options = ["--batch-size", "32,64", "--learning-rate", "0.01,0.1", "--seeds", "2"]
    runs = planned(
        "F1", *options, "--optimizer", "adam,sgd", "--remedy", "none,sam?rho=0.1"
    )
    trained = {
        (t.batch_size, t.learning_rate, t.optimizer, t.remedy, t.seed)
        for t in (run.training for run in runs)
    }
    remedies = ("none", "sam?rho=0.1")
    wanted = itertools.product((32, 64), (0.01, 0.1), ("adam", "sgd"), remedies, (0, 1))
    assert trained == set(wanted)
    assert len({run.path for run in runs}) == len(runs) == 32
    assert all(re.fullmatch(r"[\w.+-]+\.pt", run.path.name) for run in runs)


def test_the_callers_random_generators_are_untouched(tmp_path):
    before = generators()
    assert call(tmp_path, "C1", "--batch-size", "8", "--updates", "2") == 0
    assert generators() == before


# -- what goes wrong ---------------------------------------------------------------------


def damaged(folder):
    (folder / "batch64-sgd-seed0.pt").write_bytes(b"PK\3\4 half a file")
    return [], "damaged or truncated file"


def another(folder):
    call(folder, *ONE, "--optimizer", "sgd", "--weight-decay", "0.1")
    (folder / "records.jsonl").unlink()
    return [], r"got weight_decay=0\.1 \(asked for 0\.0\)"


def a_folder(folder):
    (folder / "batch64-sgd-seed0.pt").mkdir()
    return [], "batch64-sgd-seed0.pt"


def diverged(folder):
    return ["--learning-rate", "1e-3,1e39"], r"`learning_rate` must keep the loss finite"


def too_large(folder):
    return ["--batch-size", "64,500", "--schedule", "increase?drops=(1,)&factor=3"], (
        r"`batch_size` must be at most the 1433 training samples; got 1500, grown from 500"
    )


@pytest.mark.parametrize("spoil", [damaged, another, a_folder, diverged, too_large])
def test_one_run_fails_and_the_other_is_trained(tmp_path, capsys, spoil):
    options, reason = spoil(tmp_path)
    capsys.readouterr()
    before = {p: p.read_bytes() for p in tmp_path.glob("*.pt") if p.is_file()}
    several = [] if options else ["--optimizer", "sgd,adam"]
    wild = ["--optimizer", "sgd"] if spoil is diverged else []
    assert call(tmp_path, *ONE, *several, *options, *wild) == 1
    out, err = capsys.readouterr()
    assert (out.count("\n"), err.count("\n")) == (1, 1)
    assert re.search(rf"^sharpness.train: .*{reason}", err), err
    assert all(path.read_bytes() == content for path, content in before.items())
    counts = Counter(how for _, how in status(tmp_path).elements())
    assert counts == {"finished": 1, "failed": 1}
    failed, finished = sorted(read_records(tmp_path / "records.jsonl"),
                              key=lambda record: record["status"])  # fmt: skip
    assert re.search(reason, failed["failure"])
    assert failed["training"]["network"] == MLP
    assert failed["budget"]["updates"] == 5
    assert finished["failure"] is None
    assert finished["training"]["updates"] == 5


def test_a_full_disk_costs_the_run_that_needs_it_and_nothing_else(tmp_path, capsys):
    wide = ["MLP?width=64&depth=1", *ONE[1:]]
    assert call(tmp_path / "sizes", *wide, "--optimizer", "sgd,adam") == 0
    sgd, adam = sorted(map(len, files(tmp_path / "sizes").values()))
    capsys.readouterr()
    with no_file_larger_than((sgd + adam) // 2):
        assert call(tmp_path, *wide, "--optimizer", "adam,sgd") == 1
    err = capsys.readouterr().err
    assert re.fullmatch(rf"sharpness.train: .*{NAME}: .*File too large.*\n", err)
    assert files(tmp_path).keys() == {"batch64-sgd-seed0.pt"}
    assert status(tmp_path) == {
        (NAME, "failed"): 1, ("batch64-sgd-seed0.pt", "finished"): 1
    }  # fmt: skip
    assert not [path for path in tmp_path.glob(".*") if not path.name.endswith(".lock")]


def test_a_disk_that_fills_up_leaves_the_last_sound_checkpoint(tmp_path, capsys):
    wide = ["MLP?width=64&depth=1", *ONE[1:3]]
    assert call(tmp_path, *wide, "--updates", "5") == 0
    before = files(tmp_path)
    with no_file_larger_than(len(before[NAME]) // 2):
        assert call(tmp_path, *wide, "--updates", "9") == 2
    assert files(tmp_path) == before
    assert status(tmp_path) == {(NAME, "finished"): 1, (NAME, "failed"): 1}
    assert call(tmp_path, *wide, "--updates", "9") == 0
    assert call(tmp_path / "whole", *wide, "--updates", "9") == 0
    both = [checkpoint.load(folder / NAME) for folder in (tmp_path, tmp_path / "whole")]
    assert bits(both[0]) == bits(both[1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["F9"], "`network` must be one of .*; got 'F9'. Did you mean F"),
        (["MLP?breadth=3"], "breadth"),
        ([MLP, "--remedy", "none,sum"], "`remedy` must be one of .*; got 'sum'"),
        ([MLP, "--remedy", "sam?rho=-1"], "`remedy` must .*; got 'sam.rho=-1'"),
        ([MLP, "--schedule", "cosine"], "`schedule` must be one of .*; got 'cosine'"),
        ([MLP, "--schedule", "decay"], "`schedule` must .*; got 'decay'"),
        ([MLP, "--optimizer", "adam,lion"], "`optimizer` must be one of .*; got 'lion'"),
        ([MLP, "--augmentation", "mixup"], "`augmentation` must be one of .*'mixup'"),
        ([MLP, "--scaling", "cubic"], "`scaling` must be none, linear or sqrt; got 'cub"),
        ([MLP, "--regime", "keskar2016"], "invalid choice: 'keskar2016'"),
        ([MLP, "--batch-size", "1434"], "`--batch-size` must .*; got '1434'"),
        ([MLP, "--batch-size", "64,0"], "`--batch-size` must .*; got '0'"),
        ([MLP, "--batch-size", "²"], "`--batch-size` must .*; got '²'"),
        ([MLP, "--learning-rate", "0.1,0.1"], "twice"),
        ([MLP, "--learning-rate", "0.1;1"], "`--learning-rate` must .*; got '0.1;1'"),
        ([MLP, "--learning-rate", "nan"], "`learning_rate` must be positive; got nan"),
        ([MLP, "--epochs", "nan"], "`epochs` must be positive; got nan"),
        ([MLP, "--epochs", "0"], "`epochs` must be positive; got 0"),
        ([MLP, "--updates", "0"], "`updates` must be at least 1; got 0"),
        ([MLP, "--patience", "0"], "`patience` must be at least 1; got 0"),
        ([MLP, "--until-loss", "nan"], "until.loss. must .*; got nan"),
        ([MLP, "--keep-every", "0"], "keep.every. must .*; got 0"),
        ([MLP, "--keep-every", "-1"], "keep.every. must .*; got -1"),
        ([MLP, "--jobs", "0"], "jobs. must .*; got 0"),
        ([MLP, "--seeds", "0"], "`--seeds` must be at least 1; got 0"),
        ([MLP, "--data", "imagenet"], "got 'imagenet'"),
        ([MLP, "--device", "abacus"], "got 'abacus'"),
        ([MLP, "--start-from", "missing.pt"], "missing.pt, no such file"),
    ],
)
def test_a_call_that_is_wrong_is_one_line_and_trains_nothing(
    tmp_path, capsys, updates, options, expected
):
    try:
        code = call(tmp_path / "runs", "--batch-size", "64", "--updates", "2", *options)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out, updates) == (2, "", [])
    assert not list(tmp_path.glob("runs/*.pt"))
    assert re.search(expected, err), err
    assert "Traceback" not in err
    assert err.count("\n") == 1, err


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys, updates):
    (tmp_path / "file").write_text("here already")
    assert call(tmp_path / "file" / "runs", *ONE) == 2
    out, err = capsys.readouterr()
    assert (out, updates, err.count("\n")) == ("", [], 1)
    assert re.match(r"sharpness.train: `--output` must .*; got .*file/runs", err)
    assert (tmp_path / "file").read_text() == "here already"
