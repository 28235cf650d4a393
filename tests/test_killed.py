"""Runs that are killed, by SIGKILL at random moments, end with the same bits."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import psutil
import pytest
import torch
from helpers.training import FOUR, RUN, bits, kill_at, tiny
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sharpness import checkpoint, read_records
from sharpness import train as command
from sharpness.lab import data, sweep
from sharpness.lab import run as loop
from sharpness.lab.run import train
from sharpness.lab.training import StoppingCriteria

PREPARED = ["sharpness.train", "sklearn.datasets", "torch._dynamo", "pytest", __name__]
FORKS = multiprocessing.get_context("forkserver")  # clean, with PyTorch loaded
FORKS.set_forkserver_preload(PREPARED)
CALL = ["F1", "--data", "digits", "--batch-size", "64,256", "--seeds", "2"]
CALL += ["--epochs", "1", "--device", "cpu"]
NAMES = [f"batch{size}-seed{seed}.pt" for size in (64, 256) for seed in (0, 1)]
UPDATES = 2 * (22 + 6)  # of all four runs
DIGITS = data.load("digits")  # once, before the forks
PAIR = ["MLP?width=16", "--data", "digits", "--batch-size", "64,256", "--seeds", "2"]
PAIR += ["--updates", "250", "--device", "cpu", "--jobs"]
LONG = 300.0  # seconds that nothing here takes, even on a busy machine


def always_save():
    loop._SAVE_EVERY = -1.0


class Impatient(sweep._Worker):
    """Saves before each update, in whatever process it works."""

    def __call__(self, unit):
        always_save()
        return super().__call__(unit)


def live(call, beats):
    """One life of the command; a beat before each update that it makes itself."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    sweep._Worker, data.cached = Impatient, lambda *_, **__: DIGITS
    os.cpu_count = lambda: 2
    if beats is not None:
        register_optimizer_step_pre_hook(lambda *_: beats.send_bytes(b"."))
    sys.exit(command.main(call))


def one_life(call, updates, seconds):
    """SIGKILL the command so many seconds into an update; how it ended."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=live, args=(call, theirs))
    process.start()
    theirs.close()
    with suppress(EOFError):  # it ended by itself
        for _ in range(updates):
            ours.recv_bytes()
    process.join(seconds if updates else 0.3 * seconds)
    process.kill()
    process.join(LONG)
    ours.close()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The four networks, trained in one go on one thread."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert command.main([*CALL, "--jobs", "1", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def often_killed(tmp_path_factory):
    """(folder, kills, updates saved at each kill) of the same under many kills."""
    folder = tmp_path_factory.mktemp("killed")
    call = [*CALL, "--jobs", "1", "--output", str(folder)]
    moments, saved = random.Random(0), []
    while True:
        ended = one_life(call, moments.randrange(0, 5), moments.uniform(0, 0.1))
        if ended != -signal.SIGKILL:
            break
        paths = [path for path in map(folder.joinpath, NAMES) if path.exists()]
        saved.append(sum(checkpoint.load(path).training["updates"] for path in paths))
        assert len(saved) < 80
    assert ended == 0
    return folder, saved


@pytest.mark.slow
def test_a_sweep_killed_twenty_times_ends_with_the_same_bits(undisturbed, often_killed):
    folder, _ = often_killed
    assert sorted(path.name for path in folder.glob("*.pt")) == sorted(NAMES)
    for name in NAMES:
        killed, whole = (checkpoint.load(f / name) for f in (folder, undisturbed))
        assert bits(killed) == bits(whole)
        assert killed.training["finished"]
    records = read_records(folder / "records.jsonl")
    assert {record["path"] for record in records} == {str(folder / n) for n in NAMES}
    assert {record["status"] for record in records} == {"finished"}


@pytest.mark.slow
def test_the_kills_are_many_and_all_over_the_sweep(often_killed):
    _, saved = often_killed
    assert len(saved) >= 20
    assert saved == sorted(saved)  # nothing that was saved is lost
    for quarter in range(4):
        assert any(quarter / 4 <= s / UPDATES <= (quarter + 1) / 4 for s in saved)
    assert len(set(saved) - {0, 22, 28, 50, 56}) >= 12  # in the middle of a run


@pytest.mark.slow
def test_kills_leave_no_half_written_files(often_killed):
    folder, _ = often_killed
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}
    assert names == {*NAMES, "records.jsonl"}


# -- killed in this process, at every update ---------------------------------------------


@pytest.fixture
def saving_always(monkeypatch):
    monkeypatch.setattr(loop, "_SAVE_EVERY", -1.0)


@pytest.fixture(scope="module")
def images():
    return tiny()


def carried_on(training, budget, dataset, path, kills, **options):
    for number in kills:
        with pytest.raises(KeyboardInterrupt):
            train(training, budget, dataset, path, on_update=kill_at(number), **options)
    return train(training, budget, dataset, path, **options)


KINDS = {
    "adam": {},
    "sgd": {"optimizer": "sgd", "clip_norm": 0.1},
    "nesterov": {"optimizer": "nesterov", "weight_decay": 1e-3},
    "adagrad": {"optimizer": "adagrad"},
    "increase": {"optimizer": "momentum", "scaling": "sqrt", "base_batch_size": 8,
                 "schedule": "increase?drops=(1,2.5)&factor=1.5&warmup=0.5"},
    "conservative": {"remedy": "conservative"},
    "adversarial": {"remedy": "adversarial?epsilon=0.1"},
    "asam": {"remedy": "asam", "optimizer": "momentum"},
    "batchnorm": {"network": "ResNet-8", "ghost_batch_size": 8, "augmentation": "keskar",
                  "remedy": "sam"},
    "dropout": {"network": "C1"},
}  # fmt: skip


FEW = ["adam", "increase", "dropout"]  # the others take as long and differ in one part


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in FEW else [pytest.mark.slow]) for k in KINDS]
)
def test_a_run_killed_after_every_update_ends_with_the_same_bits(
    images, tmp_path, saving_always, kind
):
    run = replace(RUN, **KINDS[kind])
    budget = StoppingCriteria(updates=5)
    whole = train(run, budget, images, tmp_path / "whole.pt")
    torch.rand(7)  # the global generator stands elsewhere now
    path = tmp_path / "killed.pt"
    killed = carried_on(run, budget, images, path, range(1, 6))
    assert bits(killed) == bits(whole)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_kill_changes_neither_where_a_run_stops_nor_what_it_keeps(
    images, tmp_path, saving_always, suffix
):
    run = replace(RUN, learning_rate=0.03)
    budget = StoppingCriteria(epochs=60, until_loss=1.9, patience=5)
    (tmp_path / "a").mkdir()
    whole = train(run, budget, images, tmp_path / f"a/f{suffix}", keep_every=2)
    updates = whole.training["updates"]
    assert 5 < updates < 60
    killed = tmp_path / f"b/f{suffix}"
    carried_on(run, budget, images, killed, range(1, updates + 1), keep_every=2)
    names = {p.name for p in (tmp_path / "a").glob(f"*{suffix}")}
    assert {p.name for p in (tmp_path / "b").glob(f"*{suffix}")} == names
    for name in names:
        ours, theirs = (checkpoint.load(tmp_path / folder / name) for folder in "ab")
        assert bits(ours) == bits(theirs)


def test_a_kill_before_the_first_save_costs_nothing_but_time(images, tmp_path):
    whole = train(RUN, FOUR, images, tmp_path / "whole.pt")
    path = tmp_path / "killed.pt"
    with pytest.raises(KeyboardInterrupt):
        train(RUN, FOUR, images, path, on_update=kill_at(6))
    assert not path.exists()
    assert bits(train(RUN, FOUR, images, path)) == bits(whole)


def test_what_a_kill_leaves_is_a_checkpoint_in_mid_epoch(images, tmp_path, saving_always):
    path = tmp_path / "a.pt"
    with pytest.raises(KeyboardInterrupt):
        train(RUN, FOUR, images, path, on_update=kill_at(5))
    left = checkpoint.load(path)
    assert (left.training["updates"], left.training["epoch"]) == (4, 1)
    assert not left.training["finished"]
    assert len(left.training["history"]) == 2
    assert len(left.progress["losses"]) == 4


def test_a_kill_while_a_kept_checkpoint_is_written_does_not_lose_it(
    images, tmp_path, saving_always, monkeypatch
):
    path, save = tmp_path / "a.pt", checkpoint.save

    def dying(where, saved):
        if where.name == "a-epoch2.pt":
            raise KeyboardInterrupt
        save(where, saved)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            train(RUN, FOUR, images, path, keep_every=1)
    train(RUN, FOUR, images, path, keep_every=1)
    assert {p.name for p in tmp_path.glob("a-*")} == {
        f"a-epoch{i}.pt" for i in (1, 2, 3, 4)
    }


# -- processes side by side --------------------------------------------------------------


def waited(condition, seconds=LONG):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def family(process):
    parent = psutil.Process(process.pid)
    return [*parent.children(recursive=True), parent]


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def two_processes(folder):
    """The command with two worker processes; nobody outlives the test."""
    call = [*PAIR, "2", "--output", str(folder)]
    process = FORKS.Process(target=live, args=(call, None))
    process.start()
    try:
        yield process
    finally:
        for member in family(process) if process.is_alive() else []:
            member.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_of_two_processes_loses_nothing_and_leaves_nobody(tmp_path, number):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with two_processes(killed) as process:
        assert waited(lambda: len(list(killed.glob("batch*.pt"))) >= 2)
        members = family(process)
        assert len(members) >= 3
        os.kill(process.pid, number)
        process.join(LONG)
        assert process.exitcode == (-9 if number == signal.SIGKILL else 130)
        assert waited(lambda: not alive(members), 8), alive(members)
    left = sum(checkpoint.load(p).training["updates"] for p in killed.glob("batch*.pt"))
    assert 0 < left < 1000
    again = [sys.executable, "-m", "sharpness.train", *PAIR, "2", "--output", str(killed)]
    ended = subprocess.run(again, capture_output=True, text=True, timeout=LONG)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(re.findall(r"seed\d\.pt +\d+ +250 ", ended.stdout)) == 4
    assert command.main([*PAIR, "1", "--output", str(whole)]) == 0
    for name in NAMES:
        ours, theirs = (checkpoint.load(folder / name) for folder in (killed, whole))
        assert bits(ours) == bits(theirs)


@pytest.mark.slow
def test_processes_that_are_killed_before_they_begin_leave_nobody(tmp_path):
    with two_processes(tmp_path) as process:
        assert waited(lambda: len(family(process)) >= 3)
        members = family(process)
        process.kill()
        process.join(LONG)
    try:
        assert waited(lambda: not alive(members), 15), alive(members)
    finally:
        for member in alive(members):
            member.kill()


def count(path, beats):
    torch.set_num_threads(1)
    always_save()
    register_optimizer_step_pre_hook(lambda *_: beats.send_bytes(b"."))
    train(RUN, FOUR, tiny(), path)


@pytest.mark.slow
def test_two_processes_on_one_path_train_it_once(tmp_path):
    whole = train(RUN, FOUR, tiny(), tmp_path / "whole.pt")
    beats, processes = [], []
    for _ in range(2):
        ours, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=count, args=(tmp_path / "a.pt", theirs))
        process.start()
        theirs.close()
        beats.append(ours)
        processes.append(process)
    total = 0
    for process, ours in zip(processes, beats, strict=True):
        with suppress(EOFError):
            while True:
                ours.recv_bytes()
                total += 1
        process.join(LONG)
        assert process.exitcode == 0
    assert total == 10
    assert bits(checkpoint.load(tmp_path / "a.pt")) == bits(whole)
