"""Exact products of models whose parameters lie on several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import together
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sharpness import (
    EmpiricalRisk,
    eigenpairs,
    epsilon_sharpness,
    spectral_density,
    summary,
    trace,
)
from sharpness._ranks import Ranks, Vectors
from sharpness.krylov.stochastic_trace import Probes
from sharpness.measures.flatness import norms
from sharpness.measures.traces import frobenius_norm
from sharpness.risk.memory import _Storages

VOCABULARY, WIDTH, LENGTH, ROWS = 13, 8, 5, 14
PARTS = ((0, 9), (9, 14))  # of the rows: uneven


class Block(nn.Module):
    """A layer norm, attention and a perceptron, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0] * self.scale
        return x + self.mlp(x) + shift


class Transformer(nn.Module):
    """Tied embeddings, a position table of its own, and three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        for block in self.blocks:
            x = block(x, shift=0.1)
        return self.head(x.mean(1))


def network() -> Transformer:
    torch.manual_seed(0)
    return Transformer().double()


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=draw)
    return x, torch.randint(VOCABULARY, (ROWS,), generator=draw)


def plain() -> EmpiricalRisk:
    return EmpiricalRisk(network(), nn.CrossEntropyLoss(), data(), chunk_size=7)


def facts(risk: EmpiricalRisk) -> dict[str, Any]:
    """Numbers, and vectors made whole, of one risk."""
    whole, part = risk.vectors.whole, risk.vectors.part
    v = torch.linspace(-1, 1, risk.n, dtype=torch.float64)
    own = part(v)
    pairs = eigenpairs(risk, 1, tol=1e-3, max_hvps=12)
    again = eigenpairs(risk, 1, tol=1e-2, v0=pairs.eigenvectors, max_hvps=4)
    bent = eigenpairs(risk, 1, preconditioner=part(1 + v.abs()), max_hvps=4)
    products = {
        matrix: whole(risk.product(own, matrix)) for matrix in ("hessian", "gauss_newton")
    }
    return {
        "n": risk.n,
        "value": risk.value(),
        "accuracy": risk.accuracy(),
        "gradient": whole(risk.gradient()),
        **products,
        "two": whole(risk.hvp(torch.stack([own, own.cos()]))[1]),
        "eigenvalues": pairs.eigenvalues,
        "vectors": torch.stack([whole(v).abs() for v in pairs.eigenvectors]),
        "others": torch.cat([again.eigenvalues, bent.eigenvalues]),
        "bounds": pairs.error_bounds,
    }


def wrapped(how: str, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = network()
    if how == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "tensor parallel":
        plan = {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, mesh, plan)
    else:
        weight = model.positions
        placed = distribute_tensor(weight.detach(), mesh, [Shard(1)])
        model.positions = nn.Parameter(placed)
    return model


def everything(_: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    ranks = Ranks(torch.distributed.group.WORLD)
    mesh = init_device_mesh("cpu", (ranks.size,))
    x, y = data()
    own = slice(*PARTS[ranks.rank]) if ranks.size == 2 else slice(None)
    found: dict[str, Any] = {}
    for how in ("fsdp", "tensor parallel", "one dtensor"):
        model = wrapped(how, mesh)
        if how == "fsdp":
            model(x)  # leaves the root's parameters whole
        loss = nn.CrossEntropyLoss()
        risk = EmpiricalRisk(model, loss, (x[own], y[own]), chunk_size=7)
        found[how] = facts(risk)
        if how == "fsdp":
            by_differences = EmpiricalRisk(
                model, loss, (x[own], y[own]), chunk_size=7, engine="differences"
            )
            v = torch.linspace(-1, 1, risk.n, dtype=torch.float64)
            product, error = by_differences.product_and_error(risk.vectors.part(v)[None])
            found["differences"] = risk.vectors.whole(product[0]), float(error)
            found["peak"] = peak()
            found["measured"] = measured(risk)
            found["refused"] = refusals(risk, model, (x[own], y[own]))
            found["canary"] = canary(model, mesh, (x[own], y[own]))
    return found


class Layers(_Storages):
    """Bytes of what is as large as a whole layer: parameters, directions, gradients."""

    def _note(self, tensor: Any, *, counted: bool) -> None:
        if (
            isinstance(tensor, Tensor)
            and 64 * 64 * 4 <= tensor.untyped_storage().nbytes() < 5e4
        ):
            super()._note(tensor, counted=counted)


def peak() -> tuple[int, int]:
    """Bytes of whole layers that are there at once in a product; of all parameters."""
    from torch.distributed.fsdp import fully_shard

    layers = [layer for _ in range(24) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(64, 3))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    whole = sum(p.numel() for p in model.parameters()) * 4
    batch = torch.randn(4, 64), torch.tensor([0, 1, 2, 0])
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), batch, chunk_size=4)
    with Layers() as seen:
        risk.hvp(torch.ones_like(risk.theta))
    assert seen.peak >= 64 * 64 * 4  # or nothing was counted
    return seen.peak, whole


def measured(risk: EmpiricalRisk) -> dict[str, Any]:
    """What needs products, gradients and values only."""
    lengths, density = norms(risk), spectral_density(risk, num_starts=1, num_steps=6)
    found = trace(risk, tol=1e-9, max_hvps=16)
    several = summary(risk, "norms,phi", progress=False)
    return {
        "trace": found.value,
        "frobenius": frobenius_norm(risk, tol=1e-9, max_hvps=30).value,
        "norms": (lengths.gradient_norm, lengths.parameter_norm, lengths.fisher_rao),
        "ends": density.ends,
        "mass": density.negative_mass.value,
        "value": several.value,
        "interval": found.interval,
        "phi": str(several["phi"].note),
    }


def by_hand(risk: EmpiricalRisk) -> dict[str, Any]:
    """The same of the plain model, by its Hessian and the same random signs."""
    hessian = risk.hvp(torch.eye(risk.n, dtype=torch.float64))
    z = [Probes(risk.theta, seed, Vectors(risk.n))(0, 30) for seed in (0, 1)]
    lengths, density = norms(risk), spectral_density(risk, num_starts=1, num_steps=6)
    return {
        "trace": (z[0][:16] @ hessian * z[0][:16]).sum(1).mean(),
        "frobenius": (z[1] @ hessian).square().sum(1).mean().sqrt(),
        "norms": (lengths.gradient_norm, lengths.parameter_norm, lengths.fisher_rao),
        "ends": density.ends,
        "mass": density.negative_mass.value,
        "value": risk.value(),
        "whole trace": hessian.trace(),
    }


def refusals(risk: EmpiricalRisk, model: nn.Module, batch: Any) -> list[str]:
    """What is said where a sharded model cannot be measured so."""
    told = []
    for call in (
        lambda: epsilon_sharpness(risk),
        lambda: trace(risk, method="hutch++"),
        lambda: risk.subset([0]),
        lambda: risk.product(risk.theta, "empirical_fisher"),
        lambda: eigenpairs(risk, method="dense"),
        lambda: EmpiricalRisk(model, closure=lambda m, b: m(b).sum(), data=[batch]),
        lambda: EmpiricalRisk(model, lambda z, y: cross_entropy(z, y), batch),
        lambda: EmpiricalRisk(model, nn.CrossEntropyLoss(), batch, engine="compiled"),
    ):
        try:
            call()
            told.append("nothing")
        except (TypeError, ValueError) as error:
            told.append(str(error))
    return told


def canary(model: nn.Module, mesh: Any, batch: Any) -> dict[str, bool]:
    """Whether PyTorch can do what `risk.sharded` is there to avoid."""
    from torch.distributed.tensor import distribute_tensor

    def twice() -> None:
        loss = cross_entropy(model(batch[0]), batch[1])
        parameters = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        inner = sum((slope * slope.detach()).sum() for slope in slopes)
        torch.autograd.grad(inner, parameters)

    def forwards() -> None:
        from torch.distributed.tensor import Shard

        weight = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        torch.func.jvp(lambda w: w.full_tensor().sum(), (weight,), (weight,))

    works = {}
    for name, attempt in (("FSDP2 twice", twice), ("jvp of a DTensor", forwards)):
        try:
            attempt()
            works[name] = True
        except (RuntimeError, NotImplementedError, TypeError, AttributeError):
            works[name] = False
    return works


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return together("test_sharded:everything", 2, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return facts(plain())


def close(a: Any, b: Any) -> bool:
    x, y = (torch.as_tensor(each, dtype=torch.float64) for each in (a, b))
    return bool((x - y).norm() <= 1e-6 * y.norm())


@pytest.mark.parametrize("how", ["fsdp", "tensor parallel", "one dtensor"])
def test_products_of_a_sharded_model_are_those_of_the_whole(two, one, how):
    for found in two:
        assert not [name for name in one if not close(found[how][name], one[name])]


def test_what_needs_only_products_and_gradients_is_that_of_the_whole(two):
    expected = by_hand(plain())
    trace_of_all = float(expected.pop("whole trace"))
    for found in two:
        here = found["measured"]
        assert not [name for name in expected if not close(here[name], expected[name])]
        low, high = here["interval"]
        assert low <= trace_of_all <= high
        assert "Load the whole model on one process" in here["phi"]


def test_differences_of_a_sharded_model_carry_their_error(two, one):
    for found in two:
        product, error = found["differences"]
        assert 0 < error < 1e-4 * one["hessian"].norm()
        assert (product - one["hessian"]).norm() <= 10 * error


def test_no_process_ever_holds_all_parameters(two):
    for found in two:
        peak, whole = found["peak"]
        assert peak < whole / 2


def test_what_a_sharded_model_cannot_do_is_said(two):
    named = ["epsilon_sharpness", "hutchinson", "a subset of the data"]
    named += ["matrix", "method", "closure", "loss", "engine"]
    for found in two:
        for name, told in zip(named, found["refused"], strict=True):
            assert name in told, told


def test_pytorch_still_has_the_limits_that_force_a_copy(two):
    """A failure here means that PyTorch can do more now: see `risk.sharded`."""
    for found in two:
        assert found["canary"] == {"FSDP2 twice": False, "jvp of a DTensor": False}


def test_a_sharded_model_on_one_process_is_the_model(one, tmp_path):
    (found,) = together("test_sharded:everything", 1, tmp_path)
    assert close(found["fsdp"]["hessian"], one["hessian"])
