"""Blocks that are computed again: the same numbers, less memory, and where they refuse."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharpness as sh
from sharpness.risk import curvature, memory
from sharpness.risk.computed_again import repeated_blocks
from sharpness.risk.kept_graph import KeptGraph
from sharpness.risk.mean_loss import MeanLoss

WIDTH, CLASSES, PLACES = 16, 40, 24


class Block(nn.Module):
    """A block of a causal transformer; `scaled` is passed by name and may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scaled=None):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.drop(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.down(F.gelu(self.up(self.after(x))))
        return x if scaled is None else x * scaled


class Causal(nn.Module):
    """Tied embedding and head around a list of blocks."""

    def __init__(self, block=Block, num=4, scaled=False) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(CLASSES, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(num))
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.tokens.weight
        self.scale = nn.Parameter(torch.ones(WIDTH)) if scaled else None

    def forward(self, x):
        h = self.tokens(x)
        for block in self.blocks:
            h = block(h) if self.scale is None else block(h, scaled=self.scale)
        return self.head(self.norm(h)).transpose(1, 2)


def risk_of(model=None, again=False, rows=3, **settings):
    torch.manual_seed(0)
    model = model or Causal()
    x = torch.randint(CLASSES, (rows, PLACES))
    settings = {"chunk_size": rows, "check": False} | settings
    risk = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, x.roll(1, 1)), **settings)
    if again:
        risk._objective.blocks_again = risk._objective.blocks
        assert risk._objective.blocks_again
    return risk


def assert_same_derivatives(model, matrix="hessian", tol=1e-5, **settings):
    plain, again = (risk_of(model, way, **settings) for way in (False, True))
    v = torch.randn(plain.n, generator=torch.Generator().manual_seed(1))
    assert again.value() == pytest.approx(plain.value(), rel=1e-6)
    torch.testing.assert_close(again.gradient(), plain.gradient(), rtol=0, atol=1e-6)
    mine, theirs = again.product(v, matrix), plain.product(v, matrix)
    assert float((mine - theirs).norm()) <= tol * float(theirs.norm())


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
def test_products_are_those_of_a_kept_graph(matrix):
    torch.manual_seed(0)
    assert_same_derivatives(Causal(), matrix)


def test_a_tensor_passed_by_name_gets_its_derivatives_and_chunks_add_up():
    torch.manual_seed(0)
    assert_same_derivatives(Causal(scaled=True), chunk_size=1)


def test_some_of_the_parameters_and_blocks_of_the_matrix():
    torch.manual_seed(0)
    model = Causal()
    assert_same_derivatives(model, params=["blocks.1.*", "norm.*"])
    plain, again = (risk_of(model, way) for way in (False, True))
    names = [n for n in plain.names if n.startswith("blocks.2")]
    sizes = dict(zip(plain.names, (s.numel() for s in plain.shapes), strict=True))
    v = torch.randn(sum(sizes[n] for n in names))
    (mine,), (theirs,) = (r.block_products([names], [v]) for r in (again, plain))
    assert float((mine - theirs).norm()) <= 1e-5 * float(theirs.norm())


def footprint(risk):
    f = risk._mean._footprints
    linearise = partial(curvature.hessian, f.objective, f.mean)
    return f._measured(linearise, risk._mean.counted[0].batch)


def test_memory_beside_the_parameters_is_that_of_one_block():
    """Four more blocks: a kept graph grows by theirs, this one by what lies between."""
    torch.manual_seed(0)

    def more(again):
        four, eight = (risk_of(Causal(num=num), again, rows=16) for num in (4, 8))
        grown = footprint(eight).peak - footprint(four).peak
        return grown - 4 * (eight.theta.nbytes - four.theta.nbytes)

    assert more(again=True) < more(again=False) / 8


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_blocks_are_computed_again_where_the_graph_does_not_fit_the_memory(
    share, monkeypatch
):
    torch.manual_seed(0)
    model = Causal()
    plain = risk_of(model)
    need = footprint(plain).peak
    monkeypatch.setattr(memory, "budget_bytes", lambda device: int(share * need))
    risk = risk_of(model)
    v = torch.randn(risk.n)
    plan = risk.prepare()
    assert bool(risk._objective.blocks_again) == (share < 1)
    assert plan.blocks_again == (4 if share < 1 else 0)
    assert plan.engine == "kept_graph"
    error = (risk.hvp(v) - plain.hvp(v)).norm() / plain.hvp(v).norm()
    assert float(error) < 1e-5


class Drawing(Block):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, training=True))


class InPlace(nn.Module):
    """Begins by writing to what it is given, as `nn.ReLU(inplace=True)` does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(F.relu(x, inplace=True))))


class InPlaceCausal(Causal):
    def forward(self, x):
        h = 1.0 * self.tokens(x)  # no leaf, and saved by nothing
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)).transpose(1, 2)


class Reaching(Block):
    """Reads a parameter that lies in another module."""

    def forward(self, x):
        return super().forward(x) + _ELSEWHERE[0].sum()


_ELSEWHERE: list[nn.Parameter] = []


def assert_graphs_are_kept(model, words, **settings):
    """Where that is seen late, the numbers are the same, and a note says why."""
    again, plain = (risk_of(model, way, **settings) for way in (True, False))
    v = torch.randn(plain.n, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        torch.testing.assert_close(again.product(v), plain.product(v))
    torch.testing.assert_close(again.gradient(), plain.gradient())
    assert not again._objective.blocks_again
    assert [note for note in again.notes if words in note]


def test_a_block_that_draws_is_not_computed_again(monkeypatch):
    torch.manual_seed(0)
    model = Causal(Drawing)
    assert_graphs_are_kept(model, "draws random numbers", rows=1)
    monkeypatch.setattr(memory, "budget_bytes", lambda device: 1)
    risk = risk_of(model, rows=1)
    risk.prepare()
    assert not risk._objective.blocks_again
    assert not risk._objective.blocks


def test_a_block_that_writes_to_what_it_is_given_is_not_computed_again(monkeypatch):
    torch.manual_seed(0)
    model = InPlaceCausal(InPlace)
    assert_graphs_are_kept(model, "in place")
    plain = risk_of(model)
    v = torch.randn(plain.n)
    wanted = plain.hvp(v)
    monkeypatch.setattr(memory, "budget_bytes", lambda device: 1)
    risk = risk_of(model)
    torch.testing.assert_close(risk.hvp(v), wanted)
    assert not risk._objective.blocks


def test_a_block_that_reaches_beyond_what_it_is_given_is_not_computed_again():
    torch.manual_seed(0)
    model = Causal(Reaching)
    _ELSEWHERE[:] = [model.norm.weight]
    assert_graphs_are_kept(model, "was not given")


class Sharing(Block):
    """Multiplies by what lies in an object that all blocks have."""

    def forward(self, x):
        return super().forward(x) * _SHARED["mask"]


_SHARED: dict[str, torch.Tensor] = {}


class SharingCausal(Causal):
    def forward(self, x):
        _SHARED["mask"] = (x > CLASSES / 2).float()[..., None]
        return super().forward(x)


def test_a_block_that_makes_something_else_the_second_time_is_not_computed_again():
    """By then the mask is that of the last chunk."""
    torch.manual_seed(0)
    assert_graphs_are_kept(SharingCausal(Sharing), "something else", chunk_size=1)


def test_what_counts_as_a_block():
    assert len(repeated_blocks(Causal())) == 4
    encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    assert len(repeated_blocks(nn.TransformerEncoder(encoder, 3))) == 3
    assert not repeated_blocks(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    normed = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert not repeated_blocks(nn.ModuleList([normed, normed]))


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = Causal()
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    risk = risk_of(model, again=True)
    risk.hvp(torch.randn(risk.n))
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert model.training


def test_a_gradient_that_took_smaller_chunks_leaves_the_product_those(monkeypatch):
    risk = risk_of(rows=8, chunk_size=4)
    calls = (MeanLoss, "value_and_gradient"), (KeptGraph, "__call__")

    def limited(original):
        def fitting(self, *args):
            if risk.chunk_size > 2 or any(len(b[1]) > 2 for b in risk_batches(self)):
                raise torch.OutOfMemoryError("full")
            return original(self, *args)

        return fitting

    for holder, name in calls:
        monkeypatch.setattr(holder, name, limited(getattr(holder, name)))
    risk.gradient_and_product()
    assert risk.chunk_size == 2


def risk_batches(holder):
    """What a graph was made for."""
    return holder._work.batches if isinstance(holder, KeptGraph) else []


class Masked(InPlace):
    """Reads a mask that the model leaves in it for each batch."""

    def forward(self, x):
        return x + self.mask * self.down(torch.tanh(self.up(x)))


class MaskedCausal(Causal):
    def forward(self, x):
        for block in self.blocks:
            block.mask = (x > CLASSES / 2).float()[..., None]
        return super().forward(x)


@pytest.mark.parametrize("rows", [6, 7])
def test_a_block_finds_what_the_model_left_in_it_for_that_batch(rows):
    torch.manual_seed(0)
    model = MaskedCausal(Masked)
    assert_same_derivatives(model, rows=rows, chunk_size=2)
    assert model.blocks[0].mask.shape[0] in (1, 2)


def rows_slope(model, batch):
    """A loss of the slope by the inputs, as a physics-informed network has it."""
    x = batch[0].requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.sum(1) - batch[1]).square().mean()


class Sloped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Plain(), Plain())

    def forward(self, x):
        return self.blocks(x).square()


class Plain(InPlace):
    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Transformed(Sloped):
    def forward(self, x):
        return torch.func.grad(lambda z: super(Transformed, self).forward(z).sum())(x)


def sloped(**loss):
    torch.manual_seed(0)
    x, y = torch.randn(6, WIDTH), torch.randn(6)
    if loss:
        return sh.EmpiricalRisk(Sloped(), data=[(x, y)], check=False, **loss)
    data = x, torch.randn(6, WIDTH)
    return sh.EmpiricalRisk(Transformed(), nn.MSELoss(), data, check=False)


@pytest.mark.parametrize("loss", [{"closure": rows_slope}, {}])
def test_a_model_that_takes_derivatives_itself_keeps_its_graph(loss, monkeypatch):
    v = torch.randn(sloped(**loss).n)
    wanted = sloped(**loss).hvp(v)
    monkeypatch.setattr(memory, "budget_bytes", lambda device: 1)
    risk = sloped(**loss)
    torch.testing.assert_close(risk.hvp(v), wanted)
    assert risk.prepare().engine == "kept_graph"
    assert not risk._objective.blocks_again
