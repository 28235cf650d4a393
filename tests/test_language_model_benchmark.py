"""The benchmark of a language model, rehearsed small; and the page that shows it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("language_model")
    sys.modules.pop("language_model", None)


def test_the_product_in_parts_is_the_plain_one_in_small(benchmark, monkeypatch):
    small = {"CLASSES": 4200, "WIDTH": 16, "LAYERS": 2, "HEADS": 2, "PLACES": 128}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setitem(sys.modules, "transformers", None)  # not installed
    found = benchmark.agreement()
    assert found["blocks"] == 2
    assert 0 < found["apart"] < 1e-5


def test_the_heads_memory_is_flat_in_small(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "CLASSES", 4200)
    monkeypatch.setattr(benchmark, "WIDTH", 16)
    found = benchmark.head()
    extra = [row["extra_bytes"] for row in found.values()]
    assert max(extra[1:]) < 1.5 * min(extra[1:])
    assert extra[-1] < found["1024"]["scores_bytes"] / 8


def test_the_page_shows_what_was_measured(benchmark):
    page = (ROOT / "docs" / "concepts" / "scale.md").read_text()
    assert benchmark.table(benchmark.known()) in page
