"""Processes that die, stall or are interrupted: the others save what there is and end."""

from __future__ import annotations

import json
import os
import shutil
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
from safetensors.torch import load_file, save_file
from test_ranks import network, own, risk_of
from torch import nn

from sharpness import EmpiricalRisk, eigenpairs, measure, read_records
from sharpness._ranks import Ranks
from sharpness._results import Status
from sharpness._run import Run
from sharpness.measures import eigenvalues, resumed, summary
from sharpness.risk.identity import identity, is_same

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


def cut(group: Any, folder: Path) -> int:
    found = eigenpairs(risk_of(group), 3, tol=TOL, max_hvps=9, resume=folder / "kept")
    return found.cost.products


@pytest.mark.slow
def test_one_process_goes_on_from_two_but_not_with_other_labels(tmp_path):
    assert together("test_faults:cut", 2, tmp_path) == [9, 9]
    copy = shutil.copytree(tmp_path / "kept", tmp_path / "copy")
    more: dict[str, Any] = {"tol": TOL, "max_hvps": 1}
    assert eigenpairs(risk_of(None), 3, resume=copy, **more).cost.products == 10
    x, y = own(0, 1)
    other = EmpiricalRisk(network(), nn.CrossEntropyLoss(), (x, y.flip(0)))
    found = eigenpairs(other, 3, resume=tmp_path / "kept", **more)
    assert found.cost.products == 1


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


def commands(
    folder: Path, arguments: list[str], function: str = "command"
) -> list[subprocess.Popen[str]]:
    """The command on two processes, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    code = "import sys; from pathlib import Path; import test_faults as t; "
    code += f"sys.exit(t.{function}(Path(sys.argv[1]), sys.argv[2:]))"
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


def interrupted_between_measures() -> None:
    """SIGINT to this process once lambda_max is measured, before the trace is."""
    real = summary._measured

    def measured(name: str, *args: Any) -> Any:
        found = real(name, *args)
        if name == "lambda_max":
            os.kill(os.getpid(), signal.SIGINT)
        return found

    summary._measured = measured


def interrupted_in_verification() -> None:
    """SIGINT to this process in the product that measures the first pair anew."""
    real, product = eigenvalues._measured_anew, EmpiricalRisk.product_part
    verifying = False

    def measured_anew(*args: Any) -> Any:
        nonlocal verifying
        verifying = True
        return real(*args)

    def interrupted(risk: EmpiricalRisk, *args: Any) -> torch.Tensor:
        nonlocal verifying
        if verifying:
            verifying = False
            os.kill(os.getpid(), signal.SIGINT)
        return product(risk, *args)

    eigenvalues._measured_anew = measured_anew
    EmpiricalRisk.product_part = interrupted  # type: ignore[method-assign]


WHEN = {
    "between": interrupted_between_measures,
    "verification": interrupted_in_verification,
}


def interrupted(folder: Path, arguments: list[str]) -> int:
    """`sharpness.measure`, which is interrupted on one of its processes."""
    when, victim, *arguments = arguments
    if os.environ["RANK"] == victim:
        WHEN[when]()
    return measure.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("when", "victim"), [("between", 1), ("verification", 0)])
def test_an_interrupt_of_one_process_ends_all_with_3_and_what_there_is(
    when, victim, tmp_path
):
    code, path, output = (tmp_path / n for n in ("own.py", "own.pt", "records.jsonl"))
    code.write_text(CODE)
    torch.save(network().state_dict(), path)
    call = [when, str(victim), str(path), "--network", f"{code}:network"]
    call += ["--data", f"{code}:data", "--k", "2", "--basis-dtype", "bfloat16"]
    call += ["--output", str(output), "--device", "cpu", "--measures", "lambda_max,trace"]
    processes = commands(tmp_path, call, "interrupted")
    try:
        told = [process.communicate(timeout=LONG)[0] for process in processes]
    finally:
        end(processes)
    assert [process.returncode for process in processes] == [3, 3], told
    assert all("interrupted, so all processes have stopped" in each for each in told)
    (record,) = read_records(output)
    assert record["status"] == "interrupted"
    assert ("trace" in record["measures"]) == (when == "between")
    (pairs,) = record["measures"]["lambda_max"]
    truth = eigenpairs(risk_of_code(), 2, tol=1e-9).eigenvalues
    apart = (torch.tensor(pairs["eigenvalues"]) - truth).abs()
    assert (apart <= 1.1 * torch.tensor(pairs["error_bounds"])).all()


def risk_of_code() -> EmpiricalRisk:
    names: dict[str, Any] = {}
    exec(CODE, names)
    return EmpiricalRisk(network(), nn.CrossEntropyLoss(), names["data"]())


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


def labels(shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(2)).double()
    return x, (torch.arange(60) + shift * (torch.arange(60) % 7 == 0)) % 3


def normed(frozen: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    net[3].requires_grad_(False).weight.data *= frozen
    return net.double().eval()


def smoothed(smoothing: float) -> Any:
    """A function of one's own: only what it holds tells it from another."""
    return lambda out, y: nn.functional.cross_entropy(out, y, label_smoothing=smoothing)


CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "labels": {"data": labels(1)},
    "batchnorm": {"batchnorm": "batch"},
    "frozen weights": {"model": normed(1.5)},
    "smoothing": {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "weights": {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0]).double())},
    "own loss": {"loss": smoothed(0.1)},
    "activation": {"model": nn.Sequential(*normed()[:2], nn.ReLU(), normed()[3]).eval()},
    "tol": {"tol": 1e-7},
    "confidence": {"confidence": 0.5},
}


def measured(change: str, resume: Path | None = None, **more: Any) -> Any:
    given = {"model": normed(), "loss": nn.CrossEntropyLoss(), "data": labels()}
    given |= CHANGES[change]
    search = {"tol": given.pop("tol", TOL), "confidence": given.pop("confidence", 0.95)}
    return eigenpairs(EmpiricalRisk(**given), 2, resume=resume, **search, **more)


@pytest.mark.parametrize("change", CHANGES)
def test_another_search_begins_anew(change, tmp_path):
    measured("nothing", tmp_path, max_hvps=6)
    fresh, found = measured(change), measured(change, tmp_path, max_hvps=200)
    assert torch.equal(found.eigenvalues, fresh.eigenvalues)
    assert torch.equal(found.error_bounds, fresh.error_bounds)
    assert found.cost.products == fresh.cost.products
    again = measured("nothing", tmp_path / "b", max_hvps=6)
    counted = measured(change, tmp_path / "b", max_hvps=1).cost.products
    assert counted == (again.cost.products + 1 if change == "nothing" else 1)


def test_an_old_manifest_does_not_vouch_for_another_search(tmp_path, monkeypatch):
    measured("nothing", tmp_path, max_hvps=6)
    write, refused = resumed._saving.write, []

    def broken(path: Path, content: bytes) -> None:
        if path.name == "search.json":  # killed before the new manifest
            refused.append(path)
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(resumed._saving, "write", broken)
    with pytest.warns(RuntimeWarning, match="No space left"):
        measured("labels", tmp_path, max_hvps=6)
    assert refused
    assert not (tmp_path / "search.json").exists()
    names = [path.name for path in tmp_path.iterdir()]
    assert len({name.split("-")[0] for name in names}) == len(names) == 2


@pytest.mark.parametrize("trouble", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_what_cannot_be_kept_is_measured_all_the_same(trouble, tmp_path, monkeypatch):
    def broken(path: Path, content: bytes) -> None:
        raise trouble

    monkeypatch.setattr(resumed._saving, "write", broken)
    with pytest.warns(RuntimeWarning, match="was not kept"):
        cut = measured("nothing", tmp_path, max_hvps=6)
    assert torch.equal(cut.eigenvalues, measured("nothing", max_hvps=6).eigenvalues)


def test_a_full_disk_does_not_end_a_search(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(resumed, "_SAVE_EVERY", -1.0)
    with pytest.warns(RuntimeWarning, match="was not kept"):
        found = measured("nothing", tmp_path / "file" / "folder")
    assert found.status is Status.CONVERGED


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"key": 1}', "{", "", "wrong step"]
)
def test_a_damaged_manifest_begins_anew(content, tmp_path):
    measured("nothing", tmp_path, max_hvps=6)
    manifest = tmp_path / "search.json"
    if content == "wrong step":
        content = json.dumps(json.loads(manifest.read_text()) | {"step": "6", "size": -1})
    manifest.write_text(content)
    found = measured("nothing", tmp_path, max_hvps=1)
    assert found.cost.products == 1


def parts_with(change: str, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name, how = change.split()
    if how == "missing":
        return {key: part for key, part in parts.items() if key != name}
    if how == "nan":
        parts[name].view(-1)[0] = torch.nan
    if how == "short":
        parts[name] = parts[name][..., :-1].contiguous()
    if how == "scalar":
        parts[name] = torch.tensor(1.0)
    if how == "zero":
        parts[name].zero_()
    return parts


NAMES = ["basis", "next", "projected", "coupling", "defects", "alphas", "numbers", "search"]
DAMAGE = [
    f"{name} {how}" for name in NAMES for how in ("missing", "nan", "short", "scalar")
]


@pytest.mark.parametrize("damage", [*DAMAGE, "generator short", "generator zero"])
def test_a_damaged_part_begins_anew(damage, tmp_path):
    measured("nothing", tmp_path, max_hvps=6)
    (path,) = tmp_path.glob("*.safetensors")
    save_file(parts_with(damage, load_file(path)), path)
    found = measured("nothing", tmp_path, max_hvps=1)
    assert found.cost.products == 1
    assert torch.equal(found.eigenvalues, measured("nothing", max_hvps=1).eigenvalues)


def test_verification_is_paid_from_this_sessions_products(tmp_path):
    more: dict[str, Any] = {"basis_dtype": torch.bfloat16, "basis_size": 12}
    risk = EmpiricalRisk(normed(), nn.CrossEntropyLoss(), labels())
    first = eigenpairs(risk, 1, max_hvps=3, resume=tmp_path, **more)
    assert first.status is Status.MAX_HVPS
    whole = eigenpairs(risk, 1, **more)
    least = whole.cost.products - 3  # with one for the verification
    found = eigenpairs(risk, 1, max_hvps=least, resume=tmp_path, **more)
    assert found.status is Status.CONVERGED
    assert found.explicit_residual == whole.explicit_residual is not None


def test_whether_a_search_has_settled_is_not_believed(tmp_path):
    measured("nothing", tmp_path, max_hvps=6)
    (path,) = tmp_path.glob("*.safetensors")
    parts = load_file(path)
    parts["search"] = torch.tensor([float(parts["search"][0]), 2.0]).double()
    save_file(parts, path)
    assert measured("nothing", tmp_path, max_hvps=1).status is Status.MAX_HVPS


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "model.safetensors").touch()
    measured("nothing", tmp_path, max_hvps=6)
    measured("nothing", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_identity_is_the_same_however_the_data_are_divided():
    x, y = labels()
    half = [(x[:25], y[:25]), (x[25:], y[25:])]
    risks = [
        EmpiricalRisk(normed(), smoothed(0.1), data, chunk_size=size)
        for data, size in [((x, y), 60), (half, 7), ((x.flip(0), y.flip(0)), 60)]
    ]
    facts = [identity(risk) for risk in risks]
    assert all(is_same(facts[0], other) for other in facts)


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
