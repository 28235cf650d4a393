"""Processes that die, stall or are interrupted: the others save what there is and end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import LONG, end, started, together
from test_ranks import network, risk_of

from sharpness import EmpiricalRisk, eigenpairs, measure, read_records
from sharpness._ranks import Ranks
from sharpness._results import Status
from sharpness._run import Run
from sharpness.measures import resumed

TOL = 1e-9  # of a search that takes a while
CODE = """
import torch
from torch import nn
def network():
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 3)).double()
def data():
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(1)).double()
    return x, torch.arange(120) % 3
"""


def search(group: Any, folder: Path, **settings: Any) -> Any:
    """A search that is kept after each product, and says so; slow from the tenth on."""
    resumed._SAVE_EVERY = -1.0
    ranks, risk = Ranks(group), risk_of(group)
    product, num = risk.product_part, 0

    def counted(part: torch.Tensor, matrix: Any = "hessian") -> torch.Tensor:
        nonlocal num
        num += 1
        (folder / f"products-{ranks.rank}").write_text(str(num))
        if num > 8 and not (folder / "go").exists():
            time.sleep(0.2)
        return product(part, matrix)

    risk.product_part = counted  # type: ignore[method-assign]
    found = eigenpairs(risk, 3, tol=TOL, resume=folder / "kept", **settings)
    return {
        "status": str(found.status),
        "values": found.eigenvalues,
        "bounds": found.error_bounds,
        "products": num,
        "lost": risk.ranks.lost,
    }


def waited(folder: Path, num: int) -> None:
    """Until both processes have made so many products."""
    began = time.monotonic()
    while time.monotonic() - began < LONG:
        beats = [folder / f"products-{rank}" for rank in (0, 1)]
        if all(b.exists() and int(b.read_text() or 0) >= num for b in beats):
            return
        time.sleep(0.05)
    raise AssertionError("the processes never got so far")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_search_goes_on_after_a_process_is_gone(fault, tmp_path):
    processes = started("test_faults:search", 2, tmp_path, patience=10.0)
    try:
        waited(tmp_path, 10)
        how = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[fault]
        processes[1].send_signal(how)
        began = time.monotonic()
        told = processes[0].communicate(timeout=LONG)[0]
        took = time.monotonic() - began
    finally:
        end(processes)
    assert processes[0].returncode == 0, told
    assert took < 30
    partial = torch.load(tmp_path / "0.pt", weights_only=False)
    assert partial["status"] == "interrupted"
    assert "rank 0 of 2 can no longer reach another" in partial["lost"]
    step = json.loads((tmp_path / "kept" / "search.json").read_text())["step"]
    assert step >= 8
    truth = eigenpairs(risk_of(None), 3, tol=TOL)
    apart = (partial["values"] - truth.eigenvalues).abs()
    assert (apart <= partial["bounds"]).all()
    (tmp_path / "go").touch()
    for rank in (0, 1):
        (tmp_path / f"products-{rank}").unlink()
    (tmp_path / "store").unlink(missing_ok=True)
    for found in together("test_faults:search", 2, tmp_path):
        assert found["status"] == "converged"
        assert found["products"] <= truth.cost.products - step + 2
        torch.testing.assert_close(found["values"], truth.eigenvalues, rtol=1e-8, atol=0)
    assert not list((tmp_path / "kept").iterdir())


def command(folder: Path, arguments: list[str]) -> int:
    """`sharpness.measure` in this process, slowed and watched as `search` is."""
    resumed._SAVE_EVERY, num = -1.0, 0
    product = EmpiricalRisk.product_part

    def counted(risk: EmpiricalRisk, *args: Any) -> torch.Tensor:
        nonlocal num
        num += 1
        (folder / f"products-{risk.ranks.rank}").write_text(str(num))
        if num > 8 and not (folder / "go").exists():
            time.sleep(0.2)
        return product(risk, *args)

    EmpiricalRisk.product_part = counted  # type: ignore[method-assign]
    return measure.main(arguments)


def commands(folder: Path, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """The command on two processes, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    code = "import sys; from pathlib import Path; import test_faults as t; "
    code += "sys.exit(t.command(Path(sys.argv[1]), sys.argv[2:]))"
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    common |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_command_ends_with_3_and_resumes(victim, tmp_path):
    code, path, output = (tmp_path / n for n in ("own.py", "own.pt", "records.jsonl"))
    code.write_text(CODE)
    torch.save(network().state_dict(), path)
    call = [str(path), "--network", f"{code}:network", "--data", f"{code}:data"]
    call += ["--k", "3", "--tol", "1e-9", "--measures", "lambda_max", "--resume"]
    call += ["--output", str(output), "--device", "cpu"]
    processes = commands(tmp_path, call)
    try:
        waited(tmp_path, 10)
        processes[victim].kill()
        began = time.monotonic()
        told = processes[1 - victim].communicate(timeout=LONG)[0]
        took = time.monotonic() - began
    finally:
        end(processes)
    assert processes[1 - victim].returncode == 3, told
    assert took < 30
    assert "--resume goes on" in told
    kept = output if victim else tmp_path / "records.jsonl.rank1"
    (record,) = read_records(kept)
    assert record["status"] == "interrupted"
    (tmp_path / "go").touch()
    both = commands(tmp_path, call)
    try:
        told = [process.communicate(timeout=LONG)[0] for process in both]
    finally:
        end(both)
    assert [process.returncode for process in both] == [0, 0], told
    record = read_records(output)[-1]
    assert record["status"] == "converged" or record["status"] == "completed"
    assert told[1].strip() == ""  # one writer


# -- without other processes ---------------------------------------------------------------


class Two(Ranks):
    """One of two ranks, whose other wishes for something at some step."""

    def __init__(self, wishes: list[float]) -> None:
        super().__init__()
        self.size, self._wishes = 2, iter(wishes)

    def most(self, number: float) -> float:
        return max(number, next(self._wishes))


def steps(run: Run, num: int = 10) -> int:
    with run:
        for _ in range(num):
            run.step()
    return run.num_steps


def test_all_stop_after_the_step_in_which_one_was_interrupted():
    run = Run("steps", ranks=Two([0, 0, 2]))
    assert (steps(run), run.status) == (2, Status.INTERRUPTED)


def test_all_stop_after_the_step_at_which_one_is_late():
    run = Run("steps", ranks=Two([0, 1]), max_seconds=1e9)
    assert (steps(run), run.status) == (1, Status.MAX_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_next_step(number):
    run, done = Run("steps", ranks=Two([0] * 9)), []
    with run:
        for i in range(5):
            run.step()
            if i == 1:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            done.append(i)
    assert (done, run.status) == ([0, 1], Status.INTERRUPTED)


def test_a_signal_too_late_for_a_step_is_passed_on():
    run = Run("steps", ranks=Two([0] * 9))

    def interrupted() -> None:
        with run:
            run.step()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert run.status is Status.COMPLETED


def kept_and_resumed(folder: Path, *, first: int, **more: Any) -> tuple[Any, Any]:
    risk = risk_of(None)
    cut = eigenpairs(risk, 3, tol=TOL, max_hvps=first, resume=folder, **more)
    return cut, eigenpairs(risk, 3, tol=TOL, resume=folder, **more)


@pytest.mark.parametrize("more", [{}, {"basis_size": 13}], ids=["whole", "restarted"])
def test_a_search_that_was_cut_short_goes_on_to_the_bit(more, tmp_path):
    whole = eigenpairs(risk_of(None), 3, tol=TOL, **more)
    cut, found = kept_and_resumed(tmp_path, first=17, **more)
    assert cut.status is Status.MAX_HVPS
    assert torch.equal(found.eigenvalues, whole.eigenvalues)
    assert torch.equal(found.eigenvectors, whole.eigenvectors)
    assert found.cost.products == whole.cost.products
    assert not list(tmp_path.iterdir())  # nothing is left of what has converged


@pytest.mark.parametrize("fault", ["another search", "damaged", "no part"])
def test_what_cannot_be_gone_on_with_begins_anew(fault, tmp_path):
    risk, seed = risk_of(None), 1 if fault == "another search" else 0
    eigenpairs(risk, 3, tol=TOL, max_hvps=9, resume=tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        if fault == "damaged":
            path.write_bytes(path.read_bytes()[:100])
        if fault == "no part":
            path.unlink()
    found = eigenpairs(risk, 3, tol=TOL, seed=seed, resume=tmp_path)
    whole = eigenpairs(risk_of(None), 3, tol=TOL, seed=seed)
    assert torch.equal(found.eigenvalues, whole.eigenvalues)
    assert found.cost.products == whole.cost.products
