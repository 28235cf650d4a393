"""Data in files: arrays (.npz), tables (.csv, .parquet) and folders of `datasets`."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sharpness._arguments import ensure, package
from sharpness.risk import memory

Part = tuple[Tensor, Tensor]  # inputs (N, ...), targets (N, ...)
_ROWS_AT_ONCE = 4096  # of a table
_SAMPLES_AT_ONCE = 256  # of a data set on disk
_TABLES = (".csv", ".parquet")
_TARGETS = ("y", "label", "labels", "target", "targets", "class")
_SPELLINGS = {
    "train": [("x", "y"), ("x_train", "y_train"), ("train_x", "train_y")],
    "test": [("x_test", "y_test"), ("test_x", "test_y")],
}
_WRITE = "Write it with `numpy.savez`."


def is_file(source: object) -> bool:
    """Whether it names a file of data, or a folder of `datasets`, that is there."""
    path = _path(source)
    return path.suffix in (".npz", *_TABLES) or (path / "dataset_info.json").is_file()


def read(source: str | Path) -> Iterable[Any]:
    """Batches from a file: of a table and of a data set a few thousand rows at a time.

    Args:
        source: `.npz` with x and y (the training part, where there are two); `.csv` or
            `.parquet`, whose columns but one are the inputs; or a folder that
            `datasets.Dataset.save_to_disk` wrote. `table.csv?target=price` names the
            column of the targets; else it is called y, label, labels, target, targets or
            class, or is the last.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no data, no such column, or more than half of the free memory.
        ModuleNotFoundError: pandas, pyarrow or datasets is needed and not installed.
    """
    path = _path(source)
    if path.suffix == ".npz":
        return [read_npz(path)["train"]]
    if path.suffix in _TABLES:
        return _rows(path, target_of(source))
    stored = package("datasets", "'sharpness[files]'").load_from_disk(str(path))
    return DataLoader(stored.with_format("torch"), batch_size=_SAMPLES_AT_ONCE)


def notes(source: str | Path) -> list[str]:
    """What a reader should know of how a file was read."""
    path = _path(source)
    if path.suffix not in _TABLES:
        return []
    return [f"targets: column {target_of(source)!r} of {path.name}"]


def target_of(source: str | Path) -> str:
    """The column of a table that holds the targets."""
    path, asked = _path(source), str(source).partition("?target=")[2]
    columns = [str(name) for name in next(_frames(path, 1)).columns]
    usual = [name for name in columns if name.lower() in _TARGETS]
    known = not asked or asked in columns
    got = f"no column {asked!r} (it has {', '.join(columns[:5])})"
    ensure(known and len(columns) > 1, path, "hold inputs and targets", got)
    return asked or [*usual, columns[-1]][0]


def _path(source: object) -> Path:
    return Path(str(source).partition("?target=")[0]).expanduser()


def _rows(path: Path, target: str) -> Iterator[tuple[Any, Any]]:
    """Inputs (n, d) in double precision and targets, (n,) of integers or (n, 1)."""
    for frame in _frames(path, _ROWS_AT_ONCE):
        y, inputs = np.asarray(frame[target]), frame.drop(columns=target)
        words = [str(k) for k, kind in inputs.dtypes.items() if kind.kind not in "biuf"]
        got = f"words in {', '.join(words[:3])}"
        ensure(not words, path, "hold numbers as inputs", got, "Encode or drop them.")
        ensure(
            y.dtype.kind in "biuf",
            path,
            "hold numbers as targets",
            f"column {target!r} of {y.dtype}",
            "Number the classes from 0.",
        )
        labels = y.astype(np.int64) if y.dtype.kind in "biu" else y[:, None]
        yield inputs.to_numpy(dtype=np.float64), labels


def _frames(path: Path, rows: int) -> Iterator[Any]:
    """A table, so many rows at a time."""
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` must be a table; got no such file.")
    if path.suffix == ".csv":
        with package("pandas", "'sharpness[files]'").read_csv(
            path, chunksize=rows
        ) as table:
            yield from table
        return
    parquet = package("pyarrow.parquet", "'sharpness[files]'")
    with parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(rows):
            yield batch.to_pandas()


def check_fits(path: object, size: int) -> None:
    """Refuse what takes more than half of the free memory, before it is read.

    Raises:
        ValueError: it does.
    """
    half = memory.free_bytes(torch.device("cpu")) / 2
    contract = "fit in half of the free memory"
    got = f"{size / 1e9:.3g} GB of {half / 1e9:.3g}"
    advice = "Pass fewer samples, or a table, of which `num_samples=` reads some."
    ensure(size <= half, path, contract, got, advice)


def read_npz(path: str | Path) -> dict[str, Part]:
    """The inputs and targets of an `.npz` file by split, values as they are.

    The arrays are `x` and `y`, or `x_train` and `y_train`; beside them, if there is a
    test part, `x_test` and `y_test`; `train_x` and the like are the same. Others are left
    alone. Nothing is unpickled.

    Returns:
        `{"train": (x, y)}`, with "test" where the file has one: at least one sample, and
        as many inputs as targets.

    Raises:
        ValueError: a damaged file, arrays that are missing, of different lengths, empty
            or not of numbers.
        FileNotFoundError: no such file.
    """
    arrays, names = _arrays(path)
    found = {
        split: [pair for pair in spellings if names & set(pair)]
        for split, spellings in _SPELLINGS.items()
    }
    once = len(found["train"]) == 1 and len(found["test"]) <= 1
    whole = all(names.issuperset(pair) for pairs in found.values() for pair in pairs)
    contract = "hold arrays x and y, or x_train, y_train, x_test and y_test"
    ensure(once and whole, path, contract, ", ".join(sorted(names)) or "none", _WRITE)
    parts = {
        split: (arrays[x], arrays[y]) for split, pairs in found.items() for x, y in pairs
    }
    for x, y in parts.values():
        even = x.ndim > 0 and x.shape[:1] == y.shape[:1]
        contract = "hold as many inputs as targets, and at least one"
        got = f"shapes {tuple(x.shape)} and {tuple(y.shape)}"
        ensure(even and x.numel() > 0 < y.numel(), path, contract, got, _WRITE)
    return parts


def _arrays(path: str | Path) -> tuple[dict[str, Tensor], set[str]]:
    """The arrays that `_SPELLINGS` knows, and the names of all."""
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(
            f"`{path}` must be an .npz file; got no such file. Check the path."
        )
    ours = {name for pairs in _SPELLINGS.values() for pair in pairs for name in pair}
    arrays, names, problem = {}, set(), ""
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(place) as archive:
        check_fits(path, sum(part.file_size for part in archive.infolist()))
    try:
        with place.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = set(file.files)
            arrays = {name: torch.from_numpy(file[name]) for name in ours & names}
    except Exception as error:  # damaged archives raise half a dozen kinds
        problem = f"{place.stat().st_size} bytes that are none ({type(error).__name__})"
    if any(array.is_complex() for array in arrays.values()):
        problem = "complex ones"
    contract = "be an .npz file with plain arrays of real numbers"
    ensure(not problem, path, contract, problem, _WRITE)
    return arrays, names
