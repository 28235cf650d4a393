"""Arrays that stay on disk: the same values, no row read that is not asked for."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import sharpness as sh
from sharpness.batchsize.problem import Problem
from sharpness.risk import batches, files, memory

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
Y = np.arange(40) % 4


def folder(path):
    np.save(path / "x.npy", X)
    np.save(path / "y.npy", Y)
    return path


def npz(path):
    np.savez(path / "d.npz", x=X, y=Y)
    return path / "d.npz"


def of_columns(path):
    np.savez(path / "d.npz", x=np.asfortranarray(X), y=Y)
    return path / "d.npz"


def compressed(path):
    np.savez_compressed(path / "d.npz", x_train=X, y_train=Y)
    return path / "d.npz"


def with_fields(path):
    """Headers of 64-bit sizes and of other lengths than the directory's."""
    with zipfile.ZipFile(path / "d.npz", "w") as archive:
        for name, array in (("y", Y), ("x", X)):
            content = io.BytesIO()
            np.save(content, array)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(content.getvalue())
    return path / "d.npz"


def table():
    return pd.DataFrame(X, columns=list("abc")).assign(label=Y)


def csv(path):
    table().to_csv(path / "d.csv", index=False)
    return path / "d.csv"


def parquet(path):
    pytest.importorskip("pyarrow")
    table().to_parquet(path / "d.parquet")
    return path / "d.parquet"


WRITTEN = [folder, npz, of_columns, compressed, with_fields, csv, parquet]


@pytest.mark.parametrize("written", WRITTEN)
def test_values_are_those_of_the_file(tmp_path, written, monkeypatch):
    monkeypatch.setattr(files, "_ROWS_COPIED", 7)
    path = written(tmp_path)
    x, y = files.mapped(path)
    assert isinstance(x, np.memmap)
    assert isinstance(y, np.memmap)
    assert {x.flags.writeable, y.flags.writeable} == {False}
    assert x.dtype == (np.float64 if written is csv else np.float32)
    assert np.allclose(x, X, rtol=1e-6)
    assert np.array_equal(y, Y)
    risk = sh.EmpiricalRisk(nn.Linear(3, 4), "cross_entropy", path)
    assert torch.equal(risk.targets, torch.tensor(Y))


def test_a_table_is_of_one_type_throughout(tmp_path, monkeypatch):
    """Also where a part of it looks like whole numbers, or like class numbers."""
    monkeypatch.setattr(files, "_ROWS_COPIED", 2)
    text = "a,b,y\n1,2,0.5\n3,4,1\n5.25,6,2\n"
    (tmp_path / "d.csv").write_text(text)
    x, y = files.mapped(tmp_path / "d.csv")
    assert x.tolist() == [[1, 2], [3, 4], [5.25, 6]]
    assert y.tolist() == [[0.5], [1], [2]]
    assert not y.flags.writeable


def test_no_row_is_read_that_is_not_asked_for(tmp_path, monkeypatch):
    """Also where the whole file would not fit."""
    path = folder(tmp_path)
    monkeypatch.setattr(batches, "_OF_A_TENSOR", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2 * 25 * 20)
    with pytest.raises(ValueError, match="half of the free memory"):
        sh.EmpiricalRisk(nn.Linear(3, 4), "cross_entropy", path)
    copied = []
    moved = np.asarray

    def counted(part, *args, **kwargs):
        copied.append(len(part))
        return moved(part, *args, **kwargs)

    monkeypatch.setattr("sharpness.risk.batches.np.asarray", counted)
    for data in (path, files.mapped(path)):
        risk = sh.EmpiricalRisk(
            nn.Linear(3, 4), "cross_entropy", data, num_samples=12, chunk_size=12
        )
        assert torch.equal(risk.targets, torch.tensor(Y[:12]))
    assert set(copied) == {12}


def cut(path):
    content = (path / "x.npy").read_bytes()
    (path / "x.npy").write_bytes(content[:-5])


BAD = {
    "must be an .npy file .*none": cut,
    "x.npy` must be an .npy file": lambda p: (p / "x.npy").write_bytes(b"no"),
    r"as many inputs as targets.*\(40, 3\) and \(7,\)": lambda p: np.save(
        p / "y.npy", Y[:7]
    ),
    r"at least one; got shapes \(0, 3\)": lambda p: [
        np.save(p / "x.npy", X[:0]),
        np.save(p / "y.npy", Y[:0]),
    ],
    "y.npy` must be an .npy file with a plain array": lambda p: np.save(
        p / "y.npy", np.array([{}] * 40), allow_pickle=True
    ),
    "y.npy` must .* plain array of numbers": lambda p: np.save(
        p / "y.npy", np.array(["a"] * 40)
    ),
}


@pytest.mark.parametrize("expected", BAD)
def test_arrays_that_are_no_data_are_one_line(tmp_path, expected):
    BAD[expected](folder(tmp_path))
    with pytest.raises(ValueError, match=expected) as caught:
        files.mapped(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_table_without_rows_is_one_line(tmp_path):
    (tmp_path / "d.csv").write_text("a,y\n")
    with pytest.raises(ValueError, match="must hold inputs and targets; got no rows"):
        files.mapped(tmp_path / "d.csv")


def test_a_problem_reads_a_file_where_it_lies(tmp_path):
    problem = Problem(
        nn.Linear(3, 4), "cross_entropy", folder(tmp_path), lr=1, batch_size=8
    )
    x, y = next(problem.batches(40))
    order = torch.argsort(x[:, 0])
    assert torch.equal(x[order], torch.tensor(X[np.argsort(X[:, 0])]))
    assert torch.equal(y[order], torch.tensor(Y[np.argsort(X[:, 0])]))
