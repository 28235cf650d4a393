"""Several processes, each with a part of the data, measure what one measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import together
from torch import Tensor, nn

from sharpness import EmpiricalRisk, _command, _launch, _ranks, eigenpairs
from sharpness._ranks import GroupEndedError, Ranks, Vectors, normals, span
from sharpness.measurement import _own_part
from sharpness.measures.summary import summary
from sharpness.risk.batches import cut

SIZES = {1: [1.0], 2: [0.7, 0.3], 4: [0.4, 0.05, 0.35, 0.2]}  # uneven shares of the data
NUM = 120


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 3)
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(NUM, 6, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (NUM,), generator=draw)
    y[torch.rand(NUM, generator=draw) < 0.2] = -100  # ignored: terms are uneven as well
    return x, y


def own(rank: int, size: int) -> tuple[Tensor, Tensor]:
    x, y = data()
    ends = [0, *(round(NUM * sum(SIZES[size][: i + 1])) for i in range(size))]
    part = slice(ends[rank], ends[rank + 1])
    return x[part], y[part]


def risk_of(group: Any, **settings: Any) -> EmpiricalRisk:
    ranks = Ranks(group)
    part = own(ranks.rank, ranks.size)
    return EmpiricalRisk(
        network(), nn.CrossEntropyLoss(), part, process_group=group, **settings
    )


def everything(group: Any, _: Path | None = None) -> dict[str, Any]:
    """All that is compared, from one rank or from the only process."""
    risk, calls = risk_of(group, chunk_size=16), Counter[str]()
    pairs = eigenpairs(risk, 3, tol=1e-6)
    ends = eigenpairs(risk, 2, which="BE", tol=1e-6, v0=pairs.eigenvectors)
    full = eigenpairs(risk, 2, method="dense")
    short = eigenpairs(risk, 2, basis_size=12, tol=1e-6)
    v = torch.linspace(-1, 1, risk.n, dtype=torch.float64)
    if group is not None:
        calls = counted_calls(risk, v)
    default = summary(risk, epsilon=(1e-2,), subspace_dim=10, progress=False)
    return {
        "value": risk.value(),
        "accuracy": risk.accuracy(),
        "samples": (risk.num_samples, risk.num_terms, risk.num_classes_seen()),
        "gradient": risk.gradient(),
        "products": {
            matrix: risk.product(torch.stack([v, v.cos()]), matrix)
            for matrix in (
                *("hessian", "gauss_newton", "empirical_fisher", "sampled_fisher"),
            )
        },
        "covariance": risk.product(v, "gradient_covariance"),
        "blocks": risk.block_products([["0.weight"], ["2.bias"]], [v[:66], v[:3]]),
        "both": risk.gradient_and_product(),
        "subset": risk.subset([3, 5, 7, 3]).hvp(v),
        "rows": rows_of(risk.subset(range(30))),
        "on_one_rank": on_one_rank(risk.subset(range(30))),
        "eigenvalues": [p.eigenvalues for p in (pairs, ends, full, short)],
        "lambda_max_upper": pairs.lambda_max_upper,
        "converged": pairs.num_converged,
        "vectors": pairs.eigenvectors.abs(),
        "explicit": pairs.explicit_residual is not None,
        "default": {r.name: r.value for r in default.readings()},
        "calls": calls,
    }


def rows_of(risk: EmpiricalRisk) -> Tensor:
    """The outputs, which are a process's own, of all processes."""
    return torch.cat(risk.ranks.objects(risk.outputs()))


def on_one_rank(risk: EmpiricalRisk) -> list[Any]:
    """What is to be had of data that lie in the first process."""
    default = summary(risk, epsilon=(1e-2,), subspace_dim=10, progress=False)
    return [
        *(risk.accuracy(), risk.num_classes_seen(), *risk.value_and_accuracy()),
        *risk.value_gradient_and_accuracy(),
        *(r.value for r in default.readings() if isinstance(r.value, float)),
        *(risk.product(risk.theta, "sampled_fisher"), *risk.gradient_and_product()),
    ]


class Limited(nn.Module):
    """A network on a device that holds no more than so many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.most = network(), NUM

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB. 1 GiB is free.")
        return self.inside(x)


def with_less_room(group: Any, _: Path | None = None) -> dict[str, Any]:
    """The last process runs out of memory: over each thing first, and once for good."""
    ranks, v = Ranks(group), torch.linspace(-1, 1, 113, dtype=torch.float64)
    found, chunks = dict[str, Any](), []
    asked: dict[str, Callable[[EmpiricalRisk], Any]] = {
        "value": lambda risk: risk.value(),
        "values": lambda risk: risk.value_and_accuracy(),
        "gradient": lambda risk: risk.gradient(),
        "accuracy": lambda risk: risk.accuracy(),
        "first product": lambda risk: risk.hvp(v),
        "sampled_fisher": lambda risk: risk.product(v, "sampled_fisher"),
        "both": lambda risk: risk.gradient_and_product(),
    }
    for name, ask in asked.items():
        risk = limited(group)
        risk.model.most = 3 if ranks.rank == ranks.size - 1 else NUM
        found[name] = ask(risk)
        chunks.append(risk.chunk_size)
    risk = limited(group)
    risk.hvp(v)
    risk.model.most = 3 if ranks.rank == ranks.size - 1 else NUM
    found["next product"] = risk.vectors.whole(risk.product_part(risk.vectors.part(v)))
    found["blocks"] = risk.block_products([["inside.2.bias"]], [v[:3]])
    if group is not None:
        risk.model.most = 0 if ranks.rank == ranks.size - 1 else NUM
        with pytest.raises(MemoryError):
            risk.value()
        if risk.model.most == 0:  # a process's own outputs: nothing to agree upon
            with pytest.raises(GroupEndedError, match=r"cannot go on .*`chunk_size`"):
                risk.outputs()
    return {"values": found, "chunks": chunks}


def other_losses(group: Any, _: Path) -> list[str]:
    """What is said where the ranks' losses differ, and where they only seem to."""
    ranks, own_data = Ranks(group), own(Ranks(group).rank, 2)
    weight = torch.tensor([1.0, 2.0, 1.0 + ranks.rank], dtype=torch.float64)
    smoothing, told = 0.1 * ranks.rank, []
    for loss in (
        nn.CrossEntropyLoss(weight=weight),
        nn.CrossEntropyLoss(label_smoothing=smoothing),
        partial(nn.functional.cross_entropy, label_smoothing=smoothing),
        lambda z, y: nn.functional.cross_entropy(z, y, label_smoothing=smoothing),
        nn.CrossEntropyLoss(weight=weight * 0 + 2),
        Trainer(ranks.rank).loss,
        Trainer(ranks.rank).written_inside(),
    ):
        try:
            EmpiricalRisk(network(), loss, own_data, process_group=group)
            told.append("nothing")
        except ValueError as error:
            told.append(str(error))
    return told


class Trainer:
    """Knows its rank; its loss does not."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z, y)

    def written_inside(self) -> Any:
        return lambda z, y: self.loss(z, y)


def limited(group: Any) -> EmpiricalRisk:
    ranks = Ranks(group)
    data = own(ranks.rank, ranks.size)
    loss = nn.CrossEntropyLoss()
    return EmpiricalRisk(Limited(), loss, data, process_group=group, chunk_size=16)


def counted_calls(risk: EmpiricalRisk, v: Tensor) -> Counter[str]:
    """Collectives of one product between parts, after the first, and bytes of a basis."""
    import torch.distributed as dist

    part, calls = risk.vectors.part(v), Counter[str]()
    risk.product_part(part)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather_single", "reduce_scatter_single"):
            real = getattr(dist, name)

            def call(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
                calls[name] += 1
                return real(*args, **kwargs)

            patch.setattr(dist, name, call)
        risk.product_part(part)
    from sharpness.krylov.lanczos import Lanczos

    run = Lanczos(part, torch.Generator(), 5, 5, risk.vectors)
    run.absorb(risk.product_part(run.direction()))
    calls["basis"] = sum(block.nbytes for block in run.state.store._blocks)
    return calls


@cache
def alone() -> dict[str, Any]:
    return everything(None)


def apart(a: Any, b: Any) -> float:
    """The largest relative distance between two results of the same form."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((apart(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return max((apart(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    x, y = (torch.as_tensor(each, dtype=torch.float64) for each in (a, b))
    if bool(x.isnan().all() and y.isnan().all()):
        return 0.0
    return float((x - y).norm() / x.norm().clamp_min(1e-300))


@pytest.fixture(
    scope="module",
    params=[2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 4))],
)
def several(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return together("test_ranks:everything", request.param, folder)


COMPARED = (
    *("value", "accuracy", "samples", "gradient", "products", "covariance", "blocks"),
    *("both", "subset", "eigenvalues", "lambda_max_upper", "converged", "vectors"),
    *("explicit", "default", "on_one_rank", "rows"),
)


@pytest.mark.parametrize("what", COMPARED)
def test_ranks_with_uneven_parts_agree_with_one_process(several, what):
    for found in several:
        assert apart(alone()[what], found[what]) <= 1e-6


def test_one_reduce_scatter_a_product_and_a_basis_in_parts(several):
    size, n = len(several), 6 * 11 + 11 + 11 * 3 + 3
    for rank, found in enumerate(several):
        calls = found["calls"]
        assert calls["reduce_scatter_single"] == calls["all_gather_single"] == (size > 1)
        assert calls["all_reduce"] == (size > 1)  # of one number: whether memory sufficed
        own = -(-n // size)
        held = min(n, (rank + 1) * own) - rank * own
        assert calls["basis"] == 5 * 8 * held


def test_a_rank_that_runs_out_of_memory_halves_the_chunks_of_all(tmp_path):
    whole, ranks = with_less_room(None), together("test_ranks:with_less_room", 2, tmp_path)
    for found in ranks:
        assert found["chunks"] == ranks[0]["chunks"]
        assert all(size <= 4 for size in found["chunks"])
        assert apart(whole["values"], found["values"]) <= 1e-6


def test_losses_that_differ_in_what_they_hold_are_refused(tmp_path):
    for told in together("test_ranks:other_losses", 2, tmp_path):
        assert all("class weights" in each for each in told[:4]), told
        assert told[4:] == ["nothing"] * 3


# -- without other processes ---------------------------------------------------------------


class Fake(Ranks):
    """A rank of several that does not speak to the others."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


@pytest.mark.parametrize("n", [1, 5, 15, 16, 17, 31, 100, 1000])
def test_a_vector_drawn_in_stretches_is_the_whole_one_to_the_bit(n, monkeypatch):
    monkeypatch.setattr(_ranks, "_STRETCH", 64)
    whole, after = (torch.randn(k, generator=g) for g in [seeded()] for k in (n, 5))
    generator = seeded()
    assert torch.equal(torch.cat(list(normals(n, generator))), whole)
    assert torch.equal(torch.randn(5, generator=generator), after)
    for size in (2, 3, 7):
        parts = [
            Vectors(n, Fake(rank, size)).normal(whole, seeded()) for rank in range(size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_spans_follow_one_another(size):
    places = [i for rank in range(size) for i in range(10)[span(10, rank, size)]]
    assert places == list(range(10))


TORCHRUN = {
    **{"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    "LOCAL_RANK": "0",
}


@pytest.mark.parametrize("lacks", [*TORCHRUN, "nothing", "all"])
def test_a_launch_is_one_only_with_all_that_torchrun_sets(lacks, monkeypatch, capsys):
    for name in (*TORCHRUN, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in TORCHRUN.items():
        if lacks not in (name, "all"):
            monkeypatch.setenv(name, value)
    assert _launch.is_launched() == (lacks == "nothing")
    if lacks != "nothing":
        with _ranks.launched("cpu", 1.0) as ranks:
            assert ranks is _ranks.ALONE
        told = capsys.readouterr().err
        assert told.count("\n") == (lacks != "all")
        assert lacks == "all" or lacks in told.partition("without ")[2]
        assert _command.chosen_device("cpu") == "cpu"
        _command.say("name", "text")
        assert capsys.readouterr().err == "name: text\n"


@pytest.mark.parametrize(("num", "most"), [(10, 1), (23, 5), (20, 5), (7, 3)])
def test_processes_take_all_samples_and_whole_batches_of_batchnorm(num, most):
    pair = torch.arange(num), torch.arange(num)
    batches = [len(part[1]) for part in cut(pair, most)]
    for size in (2, 3):
        parts = [_own_part(pair, Fake(rank, size), most)[1] for rank in range(size)]
        assert torch.equal(torch.cat(parts), pair[1])
        again = [len(p[1]) for part in parts for p in cut((part, part), most)]
        assert again == batches


def test_more_processes_than_batches_are_refused_in_a_line():
    pair = torch.arange(10), torch.arange(10)
    with pytest.raises(ValueError, match=r"at most 2 .*got 3 processes.*batchnorm running"):
        _own_part(pair, Fake(0, 3), 5)
