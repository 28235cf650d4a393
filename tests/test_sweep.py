"""Many runs: side by side, each to its checkpoint, none stopped by another's failure."""

import os
import random
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import bits, generators
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sharpness import checkpoint
from sharpness.lab import data
from sharpness.lab.run import train
from sharpness.lab.sweep import ExecutionSettings, Run, sweep
from sharpness.lab.training import StoppingCriteria, Training

TRAINING = Training(network="MLP?width=8&depth=1", batch_size=64)
PLACE = ExecutionSettings(data="digits", jobs=1)
FEW = StoppingCriteria(updates=5)


TWENTY = StoppingCriteria(updates=20)


def run(path, budget=FEW, **settings):
    return Run(training=replace(TRAINING, **settings), budget=budget, path=path)


def wild(path):
    return run(path, optimizer="sgd", learning_rate=1e39)


@pytest.fixture
def updates():
    """A list that grows by one with every update in this process."""
    made = []
    hook = register_optimizer_step_pre_hook(lambda *_: made.append(0))
    yield made
    hook.remove()


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def tidy(monkeypatch, tmp_path_factory):
    """Asks whether the threads and temporary files of sweeps are gone."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = set(threading.enumerate())
    return lambda: not list(folder.iterdir()) and set(threading.enumerate()) <= before


def by_path(outcomes):
    return {outcome.run.path.name: outcome for outcome in outcomes}


def test_a_sweep_is_nothing_but_its_runs(tmp_path):
    runs = [run(tmp_path / "a.pt"), run(tmp_path / "b.pt", seed=1, remedy="sam")]
    outcomes = list(sweep(runs, PLACE))
    assert [outcome.run for outcome in outcomes] == runs
    for one in outcomes:
        alone = tmp_path / f"alone-{one.run.path.name}"
        expected = train(one.run.training, FEW, data.load("digits"), alone)
        assert bits(checkpoint.load(one.run.path)) == bits(expected)
        assert one.failure is None
        assert one.facts == checkpoint.load(one.run.path).training
        assert one.seconds >= one.facts["seconds"] > 0


def test_finished_runs_are_skipped_and_longer_ones_carried_on(tmp_path, updates):
    list(sweep([run(tmp_path / "a.pt")], PLACE))
    before = (tmp_path / "a.pt").read_bytes()
    longer = run(tmp_path / "b.pt", StoppingCriteria(updates=3))
    list(sweep([run(tmp_path / "a.pt"), longer], PLACE))
    assert len(updates) == 5 + 3
    outcomes = list(sweep([run(tmp_path / "a.pt"), run(tmp_path / "b.pt")], PLACE))
    assert len(updates) == 5 + 5
    assert [outcome.facts["updates"] for outcome in outcomes] == [5, 5]
    assert (tmp_path / "a.pt").read_bytes() == before
    assert bits(checkpoint.load(tmp_path / "a.pt")) == bits(
        checkpoint.load(tmp_path / "b.pt")
    )


def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4 half a file")
    (tmp_path / "file").write_text("")
    list(sweep([run(tmp_path / "other.pt", seed=1)], PLACE))
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")}
    reasons = {
        "wild.pt": "`learning_rate` must keep the loss finite; got nan in update 2",
        "damaged.pt": "must be a checkpoint written by torch.save; got a damaged",
        "large.pt": "`batch_size` must be at most the 1433 training samples; got 2000",
        "grown.pt": "got 1600, grown from 64",
        "below.pt": "file",
        "other.pt": "got seed=1 (asked for 0)",
        "adversarial.pt": "RuntimeError: no more memory at all",
    }

    def fail(self, step):
        raise RuntimeError("no more memory\nat all")

    monkeypatch.setattr("sharpness.lab.remedies.Adversarial.__call__", fail)
    runs = [
        wild(tmp_path / "wild.pt"),
        run(tmp_path / "damaged.pt"),
        run(tmp_path / "large.pt", batch_size=2000),
        run(tmp_path / "grown.pt", schedule="increase?drops=(1,2)&factor=5"),
        run(tmp_path / "file" / "below.pt"),
        run(tmp_path / "other.pt"),
        run(tmp_path / "adversarial.pt", remedy="adversarial"),
        run(tmp_path / "sound.pt"),
    ]
    outcomes = by_path(sweep(runs, PLACE))
    assert len(outcomes) == 8
    assert outcomes["sound.pt"].failure is None
    for name, reason in reasons.items():
        assert reason in outcomes[name].failure, outcomes[name].failure
        assert "\n" not in outcomes[name].failure
        assert outcomes[name].facts == {}
    after = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")}
    assert after.keys() == before.keys() | {"sound.pt"}
    assert before.items() <= after.items()


def test_an_outcome_comes_as_soon_as_its_run_has_ended(tmp_path, tidy):
    outcomes = sweep([run(tmp_path / f"{name}.pt") for name in "abc"], PLACE)
    assert next(outcomes).run.path == tmp_path / "a.pt"
    assert not (tmp_path / "b.pt").exists()
    assert next(outcomes).run.path == tmp_path / "b.pt"
    outcomes.close()  # whoever listened went away
    assert not (tmp_path / "c.pt").exists()
    assert tidy()


def test_an_interrupt_ends_a_sweep_and_leaves_nothing_behind(tmp_path, tidy):
    made = []

    def interrupt(*_):
        made.append(0)
        if len(made) == 8:
            raise KeyboardInterrupt

    hook = register_optimizer_step_pre_hook(interrupt)
    outcomes = sweep([run(tmp_path / f"{name}.pt") for name in "abc"], PLACE)
    try:
        assert next(outcomes).run.path.name == "a.pt"
        with pytest.raises(KeyboardInterrupt):
            next(outcomes)
    finally:
        hook.remove()
    assert len(made) == 8
    assert tidy()


def test_no_runs_are_no_outcomes():
    assert list(sweep([], ExecutionSettings(data="digits"))) == []
    assert list(sweep([], PLACE)) == []


def test_two_runs_cannot_share_a_path(tmp_path, updates):
    runs = [run(tmp_path / "a.pt"), run(tmp_path / "b.pt"), run(tmp_path / "a.pt", seed=1)]
    with pytest.raises(ValueError, match=r"`runs` must .*a\.pt twice\. [^\n]*$"):
        list(sweep(runs, PLACE))
    assert updates == []


@pytest.mark.parametrize("name", ["imagenet", "missing.npz"])
def test_data_that_cannot_be_loaded_are_refused_at_once(tmp_path, name):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}[^\n]*$"):
        list(sweep([run(tmp_path / "a.pt")], replace(PLACE, data=name)))
    assert list(tmp_path.iterdir()) == []


def test_the_callers_random_generators_are_untouched(tmp_path):
    runs = [run(tmp_path / "a.pt"), wild(tmp_path / "b.pt")]
    np.random.rand(3), random.random(), torch.rand(3)  # noqa: NPY002
    before = generators()
    list(sweep(runs, PLACE, keep_every=1))
    assert generators() == before


def test_a_bar_follows_the_runs_where_it_is_asked_for(tmp_path, capsys):
    list(sweep([run(tmp_path / "a.pt", StoppingCriteria(epochs=3))], PLACE, progress=True))
    assert "train: " in capsys.readouterr().err
    list(sweep([run(tmp_path / "b.pt")], PLACE, progress=False))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("cores", "place", "num_runs", "expected"),
    [
        (8, {}, 3, (3, 2)),
        (8, {}, 20, (8, 1)),
        (2, {"jobs": 1}, 4, (1, 2)),
        (8, {"jobs": 2}, 4, (2, 4)),
        (2, {"jobs": 5}, 4, (5, 1)),
        (8, {"device": "cuda"}, 4, (1, 8)),
        (None, {}, 4, (1, 1)),
    ],
)
def test_runs_at_once_share_the_cores(monkeypatch, cores, place, num_runs, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ExecutionSettings(data="digits", **place).side_by_side(num_runs) == expected


@pytest.mark.parametrize(
    ("limit", "threads"), [("1", 1), ("3", 3), ("16", 8), ("0", 8), ("4,2", 8), ("", 8)]
)
def test_a_run_takes_no_more_threads_than_the_environment_allows(
    monkeypatch, limit, threads
):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    place = ExecutionSettings(data="digits", jobs=1)
    assert place.side_by_side(4) == (1, threads)


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "2"])
def test_jobs_are_a_whole_number_of_at_least_1(jobs):
    with pytest.raises(ValueError, match=rf"`jobs` must .*; got '?{jobs}"):
        ExecutionSettings(data="digits", jobs=jobs)


# -- in processes ------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_give_the_same_bits_and_outcomes(tmp_path, two_cores):
    """One thread each, as in this process."""
    (tmp_path / "one").mkdir()
    PLACE.dataset()  # the first time it imports packages, one of which draws (rich)
    before, threads = generators(), torch.get_num_threads()
    for folder, jobs in (("one", 1), ("two", 2)):
        place = replace(PLACE, jobs=jobs)
        runs = [run(tmp_path / folder / f"{i}.pt", seed=i) for i in range(3)]
        outcomes = by_path(sweep([*runs, wild(tmp_path / folder / "w.pt")], place))
        assert sorted(outcomes) == ["0.pt", "1.pt", "2.pt", "w.pt"]
        assert "must keep the loss finite" in outcomes["w.pt"].failure
        assert [outcomes[f"{i}.pt"].failure for i in range(3)] == [None] * 3
    for i in range(3):
        one, two = (checkpoint.load(tmp_path / f / f"{i}.pt") for f in ("one", "two"))
        assert bits(one) == bits(two)
    assert (generators(), torch.get_num_threads()) == (before, threads)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "num"), [("MLP", 20), ("F1", 3)])
def test_other_packings_agree_in_their_first_losses(tmp_path, two_cores, network, num):
    """One run with two threads, then two runs with one thread each.

    Smooth networks stay together; a ReLU at its kink within rounding parts them.
    """
    losses, threads = {}, []
    for jobs in (1, 2):
        runs = [
            run(tmp_path / f"{jobs}-{i}.pt", TWENTY, network=network, batch_size=32, seed=i)
            for i in range(2)
        ]
        torch.set_num_threads(2 // jobs)
        try:
            outcomes = list(sweep(runs, replace(PLACE, jobs=jobs)))
        finally:
            torch.set_num_threads(1)
        threads += [outcome.facts["num_threads"] for outcome in outcomes]
        losses[jobs] = [checkpoint.load(r.path).progress["losses"].tolist() for r in runs]
    assert threads == [2, 2, 1, 1]
    for one, two in zip(losses[1], losses[2], strict=True):
        assert len(one) == 20
        assert one[:num] == pytest.approx(two[:num], rel=1e-4)


@pytest.mark.slow
def test_threads_of_a_process_are_the_cores_divided_by_the_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = [run(Path(tmp_path) / f"{i}.pt", seed=i) for i in range(2)]
    outcomes = list(sweep(runs, replace(PLACE, jobs=2)))
    assert [outcome.facts["num_threads"] for outcome in outcomes] == [3, 3]
