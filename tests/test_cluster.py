"""Tasks on engines: complete, each once, whatever dies; files come home."""

import importlib
import os
import pickle
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers.mortal import Mortal, write_or_die
from helpers.training import bits

from sharpness import checkpoint, read_records, train
from sharpness.lab import cluster, data, run, sweep
from sharpness.lab.cluster import Lost, Returned, Task, WorkerDiedError, as_completed
from sharpness.lab.following import Following
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.reproduce import runner as reproduce
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Accuracy, Measured

PACKAGES = {"dask": "distributed", "ray": "ray", "slurm://local": "submitit"}
TRAINING = Training(network="MLP?width=8&depth=1", batch_size=64)
TWO = StoppingCriteria(epochs=2)
PLACE = sweep.ExecutionSettings(data="digits", jobs=1)


class Scripted(cluster._Here):
    """Carries out in this process, but loses tasks as a worker does that dies.

    Args:
        deadly: work that takes down its worker and all that is given beside it.
        times: how often it does that.
        blind: whether the worker sees another disk.
    """

    def __init__(self, deadly=None, times=0, room=4, blind=False):
        self.deadly, self.times, self.room, self.far = deadly, times, room, blind
        self.given, self.dropped, self.beside = [], [], []
        self.dying = False

    def submit(self, errand):
        if self.far:
            errand = replace(errand, mark=Path("/not/there"))
        self.given.append(errand)
        return errand

    def ended(self, running):
        dies = any(errand.work == self.deadly for errand in running.values())
        self.dying = dies and self.times > 0
        if self.dying:
            self.times -= 1
            self.beside.append(len(running) - 1)
        return list(running)

    def result(self, errand):
        if self.dying:
            raise WorkerDiedError("killed", 1)
        return errand()

    def drop(self, errand):
        self.dropped.append(errand)


def tasks_of(names, **texts):
    return [
        Task(partial(write_or_die, name=name, text=texts.get(name, "x"))) for name in names
    ]


@pytest.mark.parametrize("times", [1, 3, 10])
def test_a_task_that_kills_its_worker_is_lost_alone_and_the_rest_is_done(tmp_path, times):
    tasks = tasks_of("abcdefgh")
    engine = Scripted(deadly=tasks[2].work, times=times)
    found = dict(as_completed(engine, tasks, tmp_path))
    assert sorted(found) == list(range(8))
    lost = {number for number, value in found.items() if isinstance(value, Lost)}
    assert lost == ({2} if times > 3 else set())
    assert engine.beside[3:] == [0][: max(0, times - 3)]  # at last by itself, and once
    for number, name in enumerate("abcdefgh"):
        path = tmp_path / name
        assert number in lost or (found[number] == name and path.read_text() == "x")
    if lost:
        assert str(found[2]).startswith("its worker died 4 times, at last with nothing")


def test_a_worker_that_dask_has_already_given_up_counts_its_deaths(tmp_path):
    class Killed(Exception):
        allowed_failures = 3

    with pytest.raises(WorkerDiedError) as caught, cluster._deaths():
        raise Killed("of a worker")
    assert caught.value.times == 4
    assert "Killed: of a worker" in str(caught.value)


def test_an_error_of_the_work_is_raised_and_what_runs_is_dropped(tmp_path):
    engine = Scripted()
    engine.ended = lambda running: [1]
    with pytest.raises(ValueError, match=r"^b is wrong") as caught:
        list(as_completed(engine, tasks_of("abcd", b="raise"), tmp_path))
    assert len(engine.dropped) == 3
    assert "write_or_die" in caught.value.__notes__[0]


class Unreadable(Exception):
    """Cannot be un-pickled: it takes two arguments, and keeps one."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def fail_unreadably(folder):
    raise Unreadable("task", "no luck")


def test_an_error_that_cannot_be_unpickled_is_told_in_words(tmp_path):
    errand = cluster.Errand(fail_unreadably, tmp_path, None, Path.cwd(), None)
    error = pickle.loads(pickle.dumps(errand())).error
    assert type(error) is RuntimeError
    assert str(error) == "Unreadable: task: no luck"
    assert "fail_unreadably" in error.__notes__[0]


def test_whoever_stops_listening_drops_what_runs(tmp_path):
    engine = Scripted(room=2)
    engine.ended = lambda running: [min(running)]
    outcomes = as_completed(engine, tasks_of("abcd"), tmp_path)
    assert next(outcomes) == (0, "a")
    outcomes.close()
    assert len(engine.given) == 2
    assert len(engine.dropped) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_of_a_worker_that_sees_another_disk_come_home(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("old ")
    names = ["kept/a", "b", ".hidden"]
    tasks = [
        Task(partial(write_or_die, name=name, text="new"), ("kept/a", "missing"))
        for name in names
    ]
    engine = Scripted(blind=True, room=1)
    assert dict(as_completed(engine, tasks, tmp_path)) == dict(enumerate(names))
    assert (tmp_path / "kept" / "a").read_text() == "old new"
    assert (tmp_path / "b").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "b"}  # no mark, no lock
    sent = [errand.files for errand in engine.given]
    # Once a worker did not see the folder all others are sent their files at once.
    assert [files is None for files in sent] == [True, False, False, False]
    assert set(sent[-1]) == {"kept/a"}


def test_a_worker_that_sees_the_folder_works_in_it_from_the_same_place(
    tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mark = tmp_path / "mark"
    mark.touch()
    errand = cluster.Errand(tasks_of("a")[0].work, Path("out"), mark, Path.cwd(), None)
    Path("out").mkdir()
    monkeypatch.chdir(tmp_path)
    assert errand() == Returned("a")
    assert (tmp_path / "here" / "out" / "a").read_text() == "x"
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "spark",
            "must be dask, dask://HOST:PORT, ray, ray://HOST:PORT or slurm; got 'spark'",
        ),
        ("dusk://a:1", "Did you mean dask?"),
        ("slurm://a", "must be 'slurm', or 'slurm://local' to try it without"),
        ("dask?num_cpus=2", "must take no arguments for dask; got 'dask?num_cpus=2'"),
        ("ray?num_cpus", "must be written NAME?argument=value"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_in_one_line(monkeypatch, name, said):
    monkeypatch.setattr(cluster, "package", lambda *_: None)
    with pytest.raises(ValueError, match=r"^`cluster` [^\n]*$") as caught:
        replace(PLACE, cluster=name)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_cluster_whose_package_is_missing_says_what_to_install(monkeypatch, name):
    module, kind = PACKAGES[name], name.partition(":")[0]
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"`{module}` .*sharpness\[lab,{kind}\]"):
        replace(PLACE, cluster=name)


# -- sweeps and reproductions by way of an engine -----------------------------------------


def runs_in(folder, num=4, **changes):
    return [
        sweep.Run(
            training=replace(TRAINING, seed=seed, **changes),
            budget=TWO,
            path=folder / f"{seed}.pt",
        )
        for seed in range(num)
    ]


def through(monkeypatch, module, engine):
    """Let a module find this engine behind the name "dask"."""

    @contextmanager
    def opened(cluster, **_):
        yield engine

    monkeypatch.setattr(cluster, "package", lambda *_: None)
    monkeypatch.setattr(module, "opened", opened)
    return engine


def test_a_sweep_over_another_disk_is_that_of_this_one(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    following = Following(measures=("lambda_max",), every=30, num_samples=100)
    for one in runs_in(there, 2):  # half of it was done, and is carried on
        run.train(one.training, StoppingCriteria(epochs=1), data.load("digits"), one.path)
    list(sweep.sweep(runs_in(here, 2), PLACE, keep_every=1, following=following))
    engine = through(monkeypatch, sweep, Scripted(blind=True, room=1))
    place, made = replace(PLACE, cluster="dask"), []
    counted = run.TrainingRun.one_update
    monkeypatch.setattr(
        run.TrainingRun, "one_update", lambda self: made.append(0) or counted(self)
    )
    outcomes = list(sweep.sweep(runs_in(there, 2), place, following=following))
    assert [outcome.run for outcome in outcomes] == runs_in(there, 2)
    assert [outcome.failure for outcome in outcomes] == [None, None]
    assert len(made) == 2 * 23  # of 45, one epoch of each
    assert len(engine.given) == 3
    for name in ("0.pt", "1.pt"):
        assert bits(checkpoint.load(there / name)) == bits(checkpoint.load(here / name))
    steps = {}
    for folder in (here, there):
        records = read_records(folder / "records.jsonl")
        steps[folder] = {(Path(r["path"]).name, r["point"]["step"]) for r in records}
        assert all(Path(r["path"]).parent == folder for r in records)
    assert steps[there] == {p for p in steps[here] if p[1] >= 22}
    assert not list(there.glob("*points*"))


def test_a_run_that_is_lost_is_a_failed_outcome(tmp_path, monkeypatch):
    class Losing(Scripted):
        def result(self, errand):
            if errand.work.args[1][0][0] == 1:
                raise WorkerDiedError("out of memory", 1)
            return errand()

    through(monkeypatch, sweep, Losing())
    outcomes = list(sweep.sweep(runs_in(tmp_path), replace(PLACE, cluster="dask")))
    failures = {outcome.run.path.name: outcome.failure for outcome in outcomes}
    assert failures.pop("1.pt").endswith("(out of memory)")
    assert set(failures.values()) == {None}
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["0.pt", "2.pt", "3.pt"]


@pytest.fixture
def _one_core(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def net(seed, **settings):
    training = replace(TRAINING, network="MLP?width=8&out_features=10", batch_size=20)
    return ModelSpec(
        data="digits[60,test=40]",
        training=replace(training, seed=seed),
        budget=StoppingCriteria(epochs=1),
        **settings,
    )


def courses(found):
    return [(one.get("history"), one.get("metrics"), one.keys()) for one in found]


PLANS = [Accuracy(of=net(1)), Accuracy(of=net(2, start=net(1))), Accuracy(of=net(3))]
PLANS += [Measured(of=net(3), measures=("lambda_max",))]


def found_by(runner):
    store = runner.carry_out(PLANS, progress=False)
    return [store.get(plan) for plan in PLANS], store.failed


@pytest.mark.usefixtures("_one_core")
def test_a_reproduction_over_another_disk_is_that_of_this_one(tmp_path, monkeypatch):
    here = reproduce.Runner(folder=tmp_path / "here", jobs=1)
    engine = through(monkeypatch, reproduce, Scripted(blind=True))
    there = reproduce.Runner(folder=tmp_path / "there", cluster="dask")
    found, failed = found_by(there)
    monkeypatch.setattr(reproduce, "opened", cluster.opened)
    expected, _ = found_by(here)
    assert failed == []
    assert len(engine.given) == 2 * (2 + 1 + 4)  # in each stage all find that out at once
    assert courses(found) == courses(expected)
    for spec in (net(1), net(2, start=net(1)), net(3)):
        one, two = (checkpoint.load(r.bench.path(spec)) for r in (here, there))
        assert one.training["history"] == two.training["history"]


@pytest.mark.usefixtures("_one_core")
def test_what_needs_a_lost_network_is_left_out_and_told(tmp_path, monkeypatch):
    class Losing(Scripted):
        def result(self, errand):
            _, work, _, unit = errand.work.args
            if work is reproduce.Bench.train_missing and unit == [net(1)]:
                raise WorkerDiedError("out of memory", 1)
            return errand()

    through(monkeypatch, reproduce, Losing())
    found, failed = found_by(reproduce.Runner(folder=tmp_path, cluster="dask"))
    assert [one is None for one in found] == [True, True, False, False]
    assert len(failed) == 4
    assert failed[0].endswith("(out of memory)")
    assert all(line.endswith("a network that it needs is missing") for line in failed[1:])


# -- real engines --------------------------------------------------------------------------


@pytest.fixture(params=[None, *PACKAGES], ids=str)
def engine_name(request, monkeypatch):
    """Two workers of this machine; those of this process import this folder as well."""
    name = request.param
    if name is not None:
        pytest.importorskip(PACKAGES[name])
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here.parent}{os.pathsep}{here}")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if name == "slurm://local":  # a job without a result is not waited for long
        local = importlib.import_module("submitit.local.local")
        monkeypatch.setattr(local.LocalJob, "_results_timeout_s", 1)
    return name


def named(folder, num):
    runs = runs_in(folder, num)
    return [*runs[:3], replace(runs[3], path=folder / "dies.pt"), *runs[4:]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A worker stopped while some jobs")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["once", "always"])
def test_a_sweep_whose_worker_is_killed_ends_complete(
    tmp_path, monkeypatch, engine_name, how
):
    monkeypatch.setattr(sweep, "_Worker", Mortal)
    # Slurm's tasks are processes that begin anew, with an import of some seconds each.
    num = 24 if how == "once" and "slurm" not in str(engine_name) else 6
    if how == "always":
        (tmp_path / "once").write_text("always")
    place = sweep.ExecutionSettings(data="digits", jobs=2, cluster=engine_name)
    outcomes = {o.run.path.name: o for o in sweep.sweep(named(tmp_path, num), place)}
    assert len(outcomes) == num
    failure = outcomes["dies.pt"].failure
    assert (tmp_path / "once").exists()
    if how == "always":
        assert failure.startswith("its worker died 4 times")
        outcomes.pop("dies.pt")
    assert {outcome.failure for outcome in outcomes.values()} == {None}
    for name, outcome in outcomes.items():
        assert checkpoint.load(tmp_path / name).training["finished"]
        assert outcome.run.path == tmp_path / name
    alone = runs_in(tmp_path / "alone", 4)[3 if how == "once" else 2]
    name = "dies.pt" if how == "once" else "2.pt"
    expected = run.train(alone.training, TWO, data.load("digits"), alone.path)
    if outcomes[name].facts["num_threads"] == expected.training["num_threads"]:
        assert bits(checkpoint.load(tmp_path / name)) == bits(expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_command_trains_on_a_dask_cluster_that_is_there(tmp_path, monkeypatch, capsys):
    distributed = pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    call = ["MLP", "--data", "digits", "--batch-size", "64", "--updates", "9", "--seeds"]
    call += ["2", "--track", "lambda_max", "--track-every", "9", "--device", "cpu"]
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=None
    ) as there:
        address = there.scheduler_address.replace("tcp", "dask")
        assert train.main([*call, "--cluster", address]) == 0
    records = read_records("runs/mlp-digits/records.jsonl")
    kinds = sorted((r["kind"], r.get("point", {}).get("step")) for r in records)
    assert kinds == 2 * [("tracking", 0)] + 2 * [("tracking", 9)] + 2 * [("training", None)]
    assert {r["training"]["num_threads"] for r in records if "training" in r} == {2}
    with distributed.dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        assert train.main([*call, "--cluster", "dask://127.0.0.1:9"]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert "`cluster` must be one that can be reached; got 'dask://127.0.0.1:9'" in err[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("_one_core")
def test_a_reproduction_on_dask_is_that_of_this_process(tmp_path):
    pytest.importorskip("distributed")
    there = reproduce.Runner(folder=tmp_path / "there", cluster="dask", jobs=2)
    here = reproduce.Runner(folder=tmp_path / "here", jobs=1)
    found, failed = found_by(there)
    assert failed == []
    assert courses(found) == courses(found_by(here)[0])
    assert len(read_records(there.records)) == len(PLANS)
