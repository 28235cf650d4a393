"""Runs that are killed, by SIGKILL at random moments, end with the same bits."""

import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
from test_training import FOUR, RUN, bits, tiny
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sharpness import checkpoint, read_records
from sharpness import train as command
from sharpness.lab import run as loop
from sharpness.lab import sweep
from sharpness.lab.run import train

PREPARED = ["sharpness.train", "sklearn.datasets", "pytest", __name__]
FORKS = multiprocessing.get_context("forkserver")  # clean, with PyTorch loaded
FORKS.set_forkserver_preload(PREPARED)
CALL = ["F1", "--data", "digits", "--batch-size", "64,256", "--seeds", "2"]
CALL += ["--epochs", "2", "--device", "cpu"]
NAMES = [f"batch{size}-seed{seed}.pt" for size in (64, 256) for seed in (0, 1)]
UPDATES = 2 * (45 + 11)  # of all four runs
LONG = 60.0  # seconds that nothing here takes


def always_save():
    loop._SAVE_EVERY = -1.0


class Impatient(sweep._Worker):
    """Saves before each update, in whatever process it works."""

    def __call__(self, unit):
        always_save()
        return super().__call__(unit)


def live(call, beats):
    """One life of the command; a beat before each update that it makes itself."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    sweep._Worker = Impatient
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
        ended = one_life(call, moments.randrange(0, 10), moments.uniform(0, 0.1))
        if ended != -signal.SIGKILL:
            break
        paths = [path for path in map(folder.joinpath, NAMES) if path.exists()]
        saved.append(sum(checkpoint.load(path).training["updates"] for path in paths))
        assert len(saved) < 80
    assert ended == 0
    return folder, saved


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


def test_the_kills_are_many_and_all_over_the_sweep(often_killed):
    _, saved = often_killed
    assert len(saved) >= 20
    assert saved == sorted(saved)  # nothing that was saved is lost
    for quarter in range(4):
        assert any(quarter / 4 <= s / UPDATES <= (quarter + 1) / 4 for s in saved)
    assert len(set(saved) - {0, 45, 56, 101, 112}) >= 12  # in the middle of a run


def test_kills_leave_no_half_written_files(often_killed):
    folder, _ = often_killed
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}
    assert names == {*NAMES, "records.jsonl"}


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
    return [
        p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_of_two_processes_loses_nothing_and_leaves_nobody(
    undisturbed, tmp_path, number
):
    call = [*CALL, "--jobs", "2", "--output", str(tmp_path)]

    def begun():
        return FORKS.Process(target=live, args=(call, None))

    process = begun()
    process.start()
    assert waited(lambda: len(list(tmp_path.glob("batch*.pt"))) >= 2)
    members = family(process)
    assert len(members) >= 3
    os.kill(process.pid, number)
    process.join(LONG)
    assert process.exitcode == (-9 if number == signal.SIGKILL else 130)
    assert waited(lambda: not alive(members), 8), alive(members)
    left = sum(checkpoint.load(p).training["updates"] for p in tmp_path.glob("batch*.pt"))
    assert 0 < left < UPDATES
    process = begun()
    process.start()
    process.join(LONG)
    assert process.exitcode == 0
    for name in NAMES:
        killed, whole = (checkpoint.load(f / name) for f in (tmp_path, undisturbed))
        assert bits(killed) == bits(whole)


def test_processes_that_are_killed_before_they_begin_leave_nobody(tmp_path):
    call = [*CALL, "--jobs", "2", "--output", str(tmp_path)]
    process = FORKS.Process(target=live, args=(call, None))
    process.start()
    assert waited(lambda: len(family(process)) >= 3)
    members = family(process)
    process.kill()
    process.join(LONG)
    assert waited(lambda: not alive(members), 20), alive(members)


def count(path, beats):
    torch.set_num_threads(1)
    always_save()
    register_optimizer_step_pre_hook(lambda *_: beats.send_bytes(b"."))
    train(RUN, FOUR, tiny(), path)


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
