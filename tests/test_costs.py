"""What eigenpairs cost, said beforehand."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import sharpness as sh
from sharpness.measures import costs
from sharpness.measures.costs import (
    LLAMA_7B,
    LLAMA_70B,
    Transformer,
    basis_rows,
    predicted_costs,
    traffic,
)
from sharpness.risk import memory


def risk(width=100):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, width), nn.Tanh(), nn.Linear(width, 10))
    return sh.EmpiricalRisk(
        model, "cross_entropy", (torch.randn(400, 50), torch.randint(0, 10, (400,)))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [17, 33])  # whole blocks of rows
def test_the_peak_is_that_of_the_storages_of_a_search(steps, dtype, monkeypatch):
    for name in ("resident_bytes", "most_resident_bytes"):
        monkeypatch.setattr(memory, name, lambda _: 0)
    said = predicted_costs(risk(800), products=steps, basis_dtype=dtype)
    other = risk(800)
    settings = {"basis_dtype": dtype, "tol": 1e-12, "max_hvps": steps, "basis_size": 200}
    gc.collect()
    counted = memory.footprint(lambda: lambda: sh.eigenpairs(other, **settings)).peak
    assert said.peak_bytes == pytest.approx(counted, rel=0.15)
    assert said.basis_bytes == basis_rows(1, steps) * other.n * dtype.itemsize


def test_seconds_are_those_of_the_products_and_of_the_steps_between_them():
    ticks = iter(range(10**6))
    said = predicted_costs(risk(), products=10, clock=lambda: float(next(ticks)))
    assert said.product_seconds == 1
    assert said.lanczos_seconds == pytest.approx(10)  # a tick each, whatever the rows
    assert said.seconds == pytest.approx(20)


def test_what_is_paid_before_the_first_product_is_said():
    ticks = iter([0.0, 5.0, 5.0, 7.0, *(7.0 for _ in range(1000))])
    said = predicted_costs(risk(), products=10, clock=lambda: next(ticks))
    assert (said.setup_seconds, said.product_seconds, said.seconds) == (3, 2, 23)


def test_what_the_allocator_keeps_of_two_products_counts(monkeypatch):
    grown = iter([10**8, 10**9])
    monkeypatch.setattr(memory, "resident_bytes", lambda _: next(grown))
    monkeypatch.setattr(memory, "most_resident_bytes", lambda _: 0)
    said, n = predicted_costs(risk(), products=10), risk().n
    assert said.peak_bytes == 9 * 10**8 + (10 + 1) * 4 * n


def test_a_peak_before_the_first_product_counts(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda _: 10**9)
    highest = iter([2 * 10**9, 5 * 10**9])
    monkeypatch.setattr(memory, "most_resident_bytes", lambda _: next(highest))
    assert predicted_costs(risk(), products=10).peak_bytes == 4 * 10**9


def test_a_row_more_costs_what_a_step_took_longer(monkeypatch):
    """Steps of 2 + 3 m ticks an entry, in a search of as many entries."""
    clock = {"now": 0.0}

    class Steps:
        def __init__(self, v0, generator, dtype):
            self.n, self.state = v0.numel(), type("State", (), {"m": 0})()

        def direction(self):
            return torch.zeros(self.n)

        def absorb(self, product, **_):
            self.state.m += 1
            clock["now"] += (2 + 3 * self.state.m) * self.n

    monkeypatch.setattr(costs, "Lanczos", Steps)
    r = risk()
    said = predicted_costs(r, products=20, clock=lambda: clock["now"])
    assert said.lanczos_seconds == pytest.approx(sum(2 + 3 * m for m in range(1, 21)) * r.n)


@pytest.mark.parametrize(("n", "ranks", "sent"), [(1000, 1, 0), (1000, 4, 6000)])
def test_traffic_is_a_gather_and_a_scatter(n, ranks, sent):
    assert traffic(n, ranks) == sent


def test_what_does_not_fit_is_said(monkeypatch):
    r = risk()
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    said = predicted_costs(r)
    assert not said.fits
    assert "does not fit in 1e-06 GB" in said.lines()[2]


def test_shapes_have_the_published_numbers_of_parameters():
    """Llama 2 (Touvron et al. 2023): 6.74 and 68.98 billion, as in the released files."""
    assert LLAMA_7B.n == 6_738_415_616
    assert LLAMA_70B.n == 68_976_648_192


def test_operations_of_a_small_decoder_are_those_that_pytorch_counts():
    """Of the linear layers, without attention: six matrix products a layer, kept."""
    shapes = Transformer(layers=1, width=8, inner=16, vocabulary=32, heads=2, key_heads=2)
    linear = 4 * 8 * 8 + 3 * 8 * 16
    found = shapes.product_flops(10, 1, kept=True)
    norms, attention = 3 * 8, 8  # counted in, and of one token each
    assert found == 2 * 10 * (6 * (linear + norms + attention) + 10 * 32 * 8)


@pytest.mark.parametrize("k", [0, 1.5])
def test_a_count_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match="`k` must be"):
        predicted_costs(risk(), k)
