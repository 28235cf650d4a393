"""The examples that ask for a batch size, in a small setting."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sharpness.batchsize.result import BatchSizeAdvice

FOLDER = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_on_disk(tmp_path, capsys, monkeypatch):
    """Written in parts; read where they lie; told with what it took."""
    module = example("rows_on_disk")
    monkeypatch.setattr(module, "AT_ONCE", 7000)
    module.main(tmp_path / "rows", 20_000, max_seconds=4.0)
    x, y = (np.load(tmp_path / "rows" / f"{name}.npy") for name in "xy")
    assert x.shape == (20_000, 4)
    assert y.shape == (20_000, 1)
    assert (x != 0).all()
    wave = np.sin(x @ [1.0, -0.5, 0.5, 2.0])
    assert np.std(y[:, 0] - wave) == pytest.approx(0.1, rel=0.05)
    out = capsys.readouterr().out
    assert "20000 rows written" in out
    assert "GB of memory" in out


def test_an_image_classifier(tmp_path):
    found = example("image_classifier").advise(num=300, max_seconds=4.0)
    assert isinstance(found, BatchSizeAdvice)
    assert str(found)
    found.plot(tmp_path / "advice.png")
    assert (tmp_path / "advice.png").exists()


@pytest.mark.parametrize("ghost", [None, 8])
def test_a_large_batch_with_batchnorm_apart(ghost):
    module = example("large_batch_batchnorm")
    found = module.advise(ghost, num=200, batch_sizes=(16, 64), max_seconds=4.0)
    assert isinstance(found, BatchSizeAdvice)
    assert found.settings["batchnorm_batch"] == ghost
    assert str(found)
