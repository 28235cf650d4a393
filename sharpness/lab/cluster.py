"""Many tasks, here or on other machines: handed over as they end, tried again when lost.

An engine takes tasks and has their results later: this process, processes of this
machine, Dask, Ray, or Slurm by way of submitit. `as_completed` keeps one supplied.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from sharpness import _progress, _saving
from sharpness._arguments import ensure, explained, known, package
from sharpness.lab.named import parsed

_PACKAGES = {"dask": "distributed", "ray": "ray", "slurm": "submitit"}
_RETRIES = 2  # deaths that a task may share with others before it is tried alone
_MAX_JOBS = 100  # of Slurm's at once without `jobs`; many sites accept few hundred
_MINUTES = 240  # of a Slurm job, unless `timeout_min` is given
_WITHOUT_WORKERS = 60.0  # seconds until a cluster without workers is given up
_POLLS = (0.02, 0.5)  # seconds from one look at the tasks to the next: at first, at most
_SLOWER = 1.1  # from one look without news to the next: a tenth of the waiting is lost


@dataclass(frozen=True)
class Task:
    """Something to do in a folder, wherever that lies.

    Args:
        work: called with the folder to work in; it can be pickled, and leaves in that
            folder what is to stay.
        needs: names in the folder of the files that it carries on from; those that are
            not there are left out.
    """

    work: Callable[[Path], Any]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lost:
    """What came of a task whose worker died each time."""

    deaths: int
    reason: str

    def __str__(self) -> str:
        return (
            f"its worker died {self.deaths} times, at last with nothing else running "
            f"({self.reason})"
        )


class WorkerDiedError(Exception):
    """A task did not come back."""

    def __init__(self, reason: str, times: int) -> None:
        super().__init__(reason)
        self.times = times


class Engine(Protocol):
    """Carries tasks out."""

    far: bool  # whether a worker may not see the files of this process

    @property
    def room(self) -> int:
        """Tasks that it may hold now."""

    def submit(self, errand: Errand) -> Any:
        """Take a task; returns what the other methods know it by."""

    def ended(self, running: Mapping[int, Any]) -> list[int]:
        """The numbers of those whose results can be had, without waiting for any."""

    def result(self, handle: Any) -> Returned:
        """What came of it.

        Raises:
            WorkerDiedError: the task did not come back.
        """

    def drop(self, handle: Any) -> None:
        """Do not wait for a task any more."""

    def close(self) -> None:
        """End what was started for the tasks."""


def as_completed(
    engine: Engine, tasks: Sequence[Task], folder: Path
) -> Iterator[tuple[int, Any]]:
    """The number of each task and what its work returned, as they come.

    A task whose worker dies is tried again. A worker takes down with it what it was
    given beside that task, so one that was lost three times waits until all others are
    done and is tried once more by itself; if its worker dies again it comes back as
    `Lost`. What work raises is raised here, and ends the others.

    A worker that sees `folder` works in it. One on another machine that does not is
    sent what the task needs, works in a folder of its own, and what it leaves there
    comes back and is written to `folder` by this process.

    Args:
        engine: carries them out.
        tasks: in the order in which they are begun.
        folder: the folder of all of them; it is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _marked(folder if engine.far else None) as mark:
        supply = _Supply(engine, tasks, folder, mark)
        try:
            while supply.begin():
                for number in supply.ended():
                    yield from supply.taken(number)
        finally:
            for handle in supply.running.values():
                engine.drop(handle)


class _Supply:
    """What waits, what runs, and what is suspected of killing its worker."""

    def __init__(
        self, engine: Engine, tasks: Sequence[Task], folder: Path, mark: Path | None
    ) -> None:
        self.engine, self.tasks, self.folder, self.mark = engine, tasks, folder, mark
        self.waiting, self.suspects = deque(range(len(tasks))), deque[int]()
        self.running: dict[int, Any] = {}
        self.deaths: Counter[int] = Counter()
        self.alone: int | None = None
        self.carry = False  # once a worker did not see the folder: files are sent
        self.pause = _POLLS[0]

    def begin(self) -> bool:
        """Give the engine as much as it takes; False when all is done."""
        if not self.waiting and not self.running:
            if not self.suspects:
                return False
            self.alone = self.suspects.popleft()
            self.waiting.append(self.alone)
        while self.waiting and len(self.running) < self.engine.room:
            number = self.waiting.popleft()
            self.running[number] = self.engine.submit(self.errand(self.tasks[number]))
        return True

    def errand(self, task: Task) -> Errand:
        """The task ready for its way."""
        files = None
        if self.carry:
            there = [name for name in task.needs if (self.folder / name).is_file()]
            files = {name: (self.folder / name).read_bytes() for name in there}
        return Errand(task.work, self.folder, self.mark, Path.cwd(), files)

    def ended(self) -> list[int]:
        """Those that have ended by now; the less happens, the less often is looked."""
        found = self.engine.ended(self.running)
        self.pause = _POLLS[0] if found else min(_POLLS[1], _SLOWER * self.pause)
        if not found:
            time.sleep(self.pause)
        return found

    def taken(self, number: int) -> Iterator[tuple[int, Any]]:
        """What came of one that has ended, unless it is to be tried again."""
        try:
            returned = self.engine.result(self.running.pop(number))
        except WorkerDiedError as error:
            yield from self._died(number, error)
            return
        if returned.unseen:
            self.carry = True
            self.waiting.appendleft(number)
            return
        for name, content in returned.files.items():
            _saving.write(self.folder / name, content)
        if returned.error is not None:
            raise returned.error
        yield number, returned.value

    def _died(self, number: int, error: WorkerDiedError) -> Iterator[tuple[int, Any]]:
        self.deaths[number] += error.times
        if number == self.alone:
            yield number, Lost(self.deaths[number], str(error))
            return
        _progress.say(f"a worker died ({error}); its task is tried again.")
        again = self.deaths[number] <= _RETRIES
        (self.waiting if again else self.suspects).append(number)


@contextmanager
def _marked(folder: Path | None) -> Iterator[Path | None]:
    """A file by which a worker knows that it sees this folder, and no other."""
    if folder is None:
        yield None
        return
    mark = folder.absolute() / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


# -- in the worker -------------------------------------------------------------------------


@dataclass(frozen=True)
class Returned:
    """What comes back from a worker."""

    value: Any = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    error: Exception | None = None
    unseen: bool = False  # it lacks the folder and its files, and has done nothing


@dataclass(frozen=True)
class Errand:
    """A task on its way: called in the worker, by itself in its process."""

    work: Callable[[Path], Any]
    folder: Path
    mark: Path | None  # there where the folder is; None: on the same machine
    cwd: Path  # relative names of data mean the same there as here
    files: Mapping[str, bytes] | None  # what it needs, once they are to be sent

    def __call__(self, threads: int | None = None) -> Returned:
        """Carry it out, with so many of PyTorch's threads; errors are returned."""
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            return self.carried_out()
        except Exception as error:
            error.add_note(f"In its worker:\n{traceback.format_exc()}")
            return Returned(error=_sendable(error))

    def carried_out(self) -> Returned:
        """Carry it out; errors are raised."""
        if self.mark is None or self.mark.is_file():
            with chdir(self.cwd) if self.cwd.is_dir() else nullcontext():
                return Returned(self.work(self.folder))
        if self.files is None:
            return Returned(unseen=True)
        with TemporaryDirectory(prefix="sharpness-") as name:
            away = Path(name)
            for file, content in self.files.items():
                (away / file).parent.mkdir(parents=True, exist_ok=True)
                (away / file).write_bytes(content)
            value = self.work(away)
            return Returned(value, dict(_left(away, self.files)))


def _sendable(error: Exception) -> Exception:
    """The error, or one in words that comes through: some cannot be pickled, or back."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does there
        instead = RuntimeError(f"{type(error).__name__}: {error}")
        for note in error.__notes__:
            instead.add_note(note)
        return instead
    return error


def _left(folder: Path, before: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Files of a folder that are new or have changed; locks and the like are left out."""
    for path in sorted(folder.rglob("[!.]*")):
        name = path.relative_to(folder).as_posix()
        kept = path.is_file() and path.suffix != ".lock"
        if kept and (content := path.read_bytes()) != before.get(name):
            yield name, content


# -- engines -------------------------------------------------------------------------------


def side_by_side(jobs: int | None, device: str, num: int) -> tuple[int, int]:
    """(at once, threads of each) for `num` things to do; the cores are shared.

    Without `jobs`: one a core on a CPU, no more than there are; one on a GPU. Where
    OMP_NUM_THREADS is set, nothing takes more threads: on a machine with other work two
    threads of one training waited for each other most of the time.
    """
    cores = os.cpu_count() or 1
    jobs = jobs or (min(cores, num) if device == "cpu" else 1) or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    most = int(asked) if asked.isdecimal() and int(asked) else cores
    return jobs, max(1, min(most, cores // jobs))


def checked(name: str, cluster: Any) -> None:
    """Refuse a cluster that cannot be one, before anything is done.

    Raises:
        ValueError: an unknown engine, or arguments where it takes none.
        ModuleNotFoundError: its package is not installed.
    """
    kind, where, arguments = _parts(name, cluster)
    _module(kind)
    takes, got = "take no arguments for dask", repr(cluster)
    ensure(kind != "dask" or not arguments, name, takes, got, "Give its workers theirs.")
    contract = "be 'slurm', or 'slurm://local' to try it without"
    ensure(kind != "slurm" or where in ("", "local"), name, contract, got)


def _parts(name: str, cluster: Any) -> tuple[str, str, dict[str, Any]]:
    """`ray://host:1?num_cpus=2` as ("ray", "host:1", {"num_cpus": 2})."""
    address, arguments = parsed(str(cluster), name)
    kind, _, where = address.partition("://")
    contract = "be dask, dask://HOST:PORT, ray, ray://HOST:PORT or slurm"
    known(name, kind, _PACKAGES, contract)
    return kind, where, arguments


def _module(kind: str) -> Any:
    return package(_PACKAGES[kind], f"'sharpness[lab,{kind}]'")


@contextmanager
def opened(
    cluster: str | None, *, jobs: int | None, device: str, num: int, folder: Path
) -> Iterator[Engine]:
    """An engine for a while.

    Args:
        cluster: None for this machine; "dask" or "ray" starts one here, with an address
            it is one that is there; "slurm" submits jobs.
        jobs: tasks at once; None means one a core here, one a worker of a cluster.
        device: where a task computes.
        num: of tasks, at most.
        folder: where Slurm's job files go, in a folder "slurm".

    Raises:
        ValueError: the cluster cannot be reached, or is unknown.
        ModuleNotFoundError: its package is not installed.
    """
    at_once, threads = side_by_side(jobs, device, num)
    if cluster is None:
        engine: Engine = _Here() if at_once == 1 else _Processes(at_once, threads)
    else:
        checked("cluster", cluster)
        kind, where, arguments = _parts("cluster", cluster)
        module = _module(kind)
        advice = "Without an address one is started here." if kind != "slurm" else ""
        with explained("cluster", "be one that can be reached", repr(cluster), advice):
            if kind == "dask":
                engine = _Dask(module, where, jobs, at_once, threads)
            elif kind == "ray":
                gpus = {} if device == "cpu" else {"num_gpus": 1 if where else 1 / at_once}
                options = {"num_cpus": 1 if where else threads, **gpus, **arguments}
                engine = _Ray(module, where, jobs, at_once, options)
            else:
                engine = _Slurm(module, where, jobs, arguments, folder / "slurm")
    with closing(engine):
        yield engine


class _Here:
    """In this process, one after the other; a task is begun when it is asked for."""

    far, room = False, 1

    def submit(self, errand: Errand) -> Errand:
        return errand

    def ended(self, running: Mapping[int, Errand]) -> list[int]:
        return list(running)

    def result(self, handle: Errand) -> Returned:
        return handle.carried_out()

    def drop(self, handle: Errand) -> None:
        pass

    def close(self) -> None:
        pass


class _Processes:
    """In processes that end with this one; they stay for the next tasks."""

    far = False

    def __init__(self, jobs: int, threads: int) -> None:
        package("joblib")
        self.room, self._jobs = 2 * jobs, jobs  # none waits for this process
        self._env = {f"{name}_NUM_THREADS": str(threads) for name in _LIBRARIES}
        self._dropped = False

    def _executor(self) -> Any:
        """The one that is there, or another where that one broke."""
        from joblib.externals import loky

        return loky.get_reusable_executor(
            max_workers=self._jobs,
            initializer=_end_with,
            initargs=(os.getpid(),),
            env={name: os.environ.get(name, value) for name, value in self._env.items()},
        )

    def submit(self, errand: Errand) -> Any:
        return self._executor().submit(errand)

    def ended(self, running: Mapping[int, Any]) -> list[int]:
        return _done(running)

    def result(self, handle: Any) -> Returned:
        with _deaths():
            return _returned(handle.result())

    def drop(self, handle: Any) -> None:
        self._dropped = True

    def close(self) -> None:
        if self._dropped:
            self._executor().shutdown(wait=True, kill_workers=True)


_LIBRARIES = ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB_MAXIMUM", "NUMEXPR")


def _end_with(parent: int) -> None:
    """End this process soon after its parent: a killed sweep leaves no orphans."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _deaths() -> Iterator[None]:
    """Whatever an engine raises for a result: the task did not come back.

    Errors of the task itself are no exceptions by then; see `Errand`.
    """
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
        # Dask has tried that often before it gives a task back.
        times = getattr(error, "allowed_failures", 0) + 1
        raise WorkerDiedError(f"{type(error).__name__}: {first}", times) from error


def _done(running: Mapping[int, Any]) -> list[int]:
    return [number for number, handle in running.items() if handle.done()]


def _returned(value: Any) -> Returned:
    ensure(isinstance(value, Returned), "result", "come back whole", type(value).__name__)
    found: Returned = value
    return found


class _Dask:
    """A Dask cluster; a worker does one task at a time, with all its threads."""

    far = True

    def __init__(
        self, distributed: Any, where: str, jobs: int | None, at_once: int, threads: int
    ) -> None:
        self._jobs, self._seen, self._local = jobs, time.monotonic(), None
        if not where:
            # Deaths are counted by `as_completed`.
            never = {"distributed.scheduler.allowed-failures": 0}
            with package("dask").config.set(never):
                self._local = distributed.LocalCluster(
                    n_workers=at_once,
                    threads_per_worker=threads,
                    dashboard_address=None,
                    silence_logs="CRITICAL",
                )
        self._client = distributed.Client(self._local or where, set_as_default=False)

    def _num_workers(self) -> int:
        return len(self._client.nthreads())

    @property
    def room(self) -> int:
        return self._jobs or max(1, self._num_workers())

    def submit(self, errand: Errand) -> Any:
        return self._client.submit(_on_dask, errand, pure=False)

    def ended(self, running: Mapping[int, Any]) -> list[int]:
        found = _done(running)
        if found or self._num_workers():
            self._seen = time.monotonic()
        waited = time.monotonic() - self._seen
        if waited > _WITHOUT_WORKERS:
            raise ConnectionError(
                f"`cluster` must have a worker; got none for {waited:.0f} s. Start some; "
                "the same command carries on."
            )
        return found

    def result(self, handle: Any) -> Returned:
        with _deaths():
            return _returned(handle.result())

    def drop(self, handle: Any) -> None:
        handle.cancel()

    def close(self) -> None:
        self._client.close()
        if self._local is not None:
            self._local.close()


_IN_TURN = threading.Lock()  # random generators and threads belong to the whole process


def _on_dask(errand: Errand) -> Returned:
    with _IN_TURN:
        return errand(package("distributed").get_worker().state.nthreads)


class _Ray:
    """Plain tasks of Ray, which Ray itself does not repeat."""

    far = True

    def __init__(
        self,
        ray: Any,
        where: str,
        jobs: int | None,
        at_once: int,
        options: Mapping[str, Any],
    ) -> None:
        self._ray, self._jobs, self._each = ray, jobs, options["num_cpus"]
        self._own = not ray.is_initialized()
        quiet = {"log_to_driver": False, "include_dashboard": False}
        if where:
            address = where if where == "auto" else f"ray://{where}"
            ray.init(address=address, log_to_driver=False)
        elif self._own:
            ray.init(num_cpus=at_once * options["num_cpus"], **quiet)
        self._remote = ray.remote(max_retries=0, **options)(_on_ray)

    @property
    def room(self) -> int:
        there = self._ray.cluster_resources().get("CPU", 0)
        return self._jobs or max(1, int(there / self._each))

    def submit(self, errand: Errand) -> Any:
        return self._remote.remote(errand, max(1, int(self._each)))

    def ended(self, running: Mapping[int, Any]) -> list[int]:
        handles = list(running.values())
        ready = self._ray.wait(handles, num_returns=len(handles), timeout=0)[0]
        return [number for number, handle in running.items() if handle in ready]

    def result(self, handle: Any) -> Returned:
        with _deaths():
            return _returned(self._ray.get(handle))

    def drop(self, handle: Any) -> None:
        self._ray.cancel(handle, force=True)

    def close(self) -> None:
        if self._own:
            self._ray.shutdown()


def _on_ray(errand: Errand, threads: int) -> Returned:
    return errand(threads)


class _Slurm:
    """A job of Slurm for each task, by submitit; "local" are processes of this machine."""

    far = True

    def __init__(
        self,
        submitit: Any,
        where: str,
        jobs: int | None,
        arguments: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self.room = jobs or _MAX_JOBS
        self._threads = int(arguments.get("cpus_per_task", 1))
        self._executor = submitit.AutoExecutor(folder.absolute(), where or "slurm")
        usual = {"timeout_min": _MINUTES, "cpus_per_task": 1, "name": "sharpness"}
        self._executor.update_parameters(**{**usual, **arguments})
        if not where and subprocess.run(["sacct", "-n"], capture_output=True).returncode:
            _progress.say("no accounting (sacct): a job that dies is waited for for ever.")

    def submit(self, errand: Errand) -> Any:
        return self._executor.submit(errand, self._threads)

    def ended(self, running: Mapping[int, Any]) -> list[int]:
        return _done(running)

    def result(self, handle: Any) -> Returned:
        with _deaths():
            return _returned(handle.result())

    def drop(self, handle: Any) -> None:
        with suppress(Exception):  # it may have ended meanwhile
            handle.cancel(check=False)

    def close(self) -> None:
        pass
