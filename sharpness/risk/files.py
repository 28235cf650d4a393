"""Data in files: arrays (.npz, .npy), tables (.csv, .parquet) and folders of `datasets`."""

from __future__ import annotations

import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from sharpness._arguments import ensure, explained, package
from sharpness.risk import batches, memory

Part = tuple[Tensor, Tensor]  # inputs (N, ...), targets (N, ...)
_ROWS_AT_ONCE = 4096  # of a table
_ROWS_COPIED = 65536  # at once
_SAMPLES_AT_ONCE = 256  # of a data set on disk
_TABLES = (".csv", ".parquet")
_INDEX = "Unnamed: 0"  # what pandas calls the column of its own row numbers
_TARGETS = ("y", "label", "labels", "target", "targets", "class")
_SPELLINGS = {
    "train": [("x", "y"), ("x_train", "y_train"), ("train_x", "train_y")],
    "test": [("x_test", "y_test"), ("test_x", "test_y")],
}
_WRITE = "Write it with `numpy.savez`."
_FOLDERS = ("dataset_info.json", "dataset_dict.json")


def is_file(source: object) -> bool:
    """Whether it names a file of data, or a folder of `datasets`, that is there."""
    path = _path(source)
    return can_be_mapped(path) or is_data_set(path)


def can_be_mapped(source: object) -> bool:
    """Whether it names what `mapped` takes: a table or archive, there or not, or arrays."""
    path = _path(source)
    return path.suffix in (".npz", *_TABLES) or _holds_arrays(path)


def is_data_set(source: object) -> bool:
    """Whether it names a folder that `save_to_disk` of `datasets` wrote."""
    return any((_path(source) / name).is_file() for name in _FOLDERS)


def read(source: str | Path) -> Iterable[Any]:
    """Batches from a file: of a table and of a data set a few thousand rows at a time.

    Args:
        source: `.npz` with x and y (the training part, where there are two); `.csv` or
            `.parquet`, whose columns but one are the inputs; a folder with x.npy and
            y.npy, or one that `datasets.Dataset.save_to_disk` wrote.
            `table.csv?target=price` names the column of the targets; else it is called y,
            label, labels, target, targets or class, or is the last.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no data, no such column, or more than half of the free memory.
        ModuleNotFoundError: pandas, pyarrow or datasets is needed and not installed.
    """
    path = _path(source)
    if path.suffix == ".npz" or _holds_arrays(path):
        return [mapped(path)]
    if path.suffix in _TABLES:
        return _rows(path, target_of(source))
    return samples_at(data_sets(path)["train"])


def samples_at(stored: Any, rows: Tensor | None = None) -> Iterable[Any]:
    """Batches of the samples of a data set at these positions (m,); None for all."""
    some = stored if rows is None else Subset(stored, rows.tolist())
    return DataLoader(some, batch_size=_SAMPLES_AT_ONCE)


def data_sets(source: str | Path) -> dict[str, Any]:
    """The data set of a folder as "train"; of a `DatasetDict` its "train" and "test"."""
    path = _path(source)
    found = package("datasets", "'sharpness[files]'").load_from_disk(str(path))
    parts = found if isinstance(found, dict) else {"train": found}
    advice = "Name the folder of one part."
    ensure("train" in parts, path, "hold a part 'train'", ", ".join(parts), advice)
    kept = [name for name in ("train", "test") if name in parts]
    return {name: parts[name].with_format("torch") for name in kept}


def targets_of(stored: Any) -> Tensor:
    """The targets of a data set, read without the inputs.

    Raises:
        ValueError: no column has their name.
    """
    names = stored.column_names
    name = next((each for each in batches.LABELS if each in names), "")
    advice = "Rename the column of the targets."
    ensure(bool(name), "data", "have a column 'labels'", ", ".join(names[:5]), advice)
    loader = DataLoader(stored.select_columns([name]), batch_size=_ROWS_AT_ONCE)
    return torch.cat([batch[name] for batch in loader])


def mapped(source: str | Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs and targets that stay on disk: rows are read as they are asked for.

    Data of any size for whatever takes a pair of arrays, in the memory of the rows that
    are looked at.

    Args:
        source: a folder with x.npy and y.npy; or an `.npz`, `.csv` or `.parquet` file as
            in `read`. A compressed `.npz` and a table are copied once, a part at a time,
            to a temporary file (see `TMPDIR`) that goes with the arrays.

    Returns:
        Arrays (N, ...) that are not to be written to, with the values as they are; of a
        table inputs (N, d), in single precision where that holds every column.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: as `read`, but for the memory.
    """
    return parts_on_disk(source)["train"]


def parts_on_disk(source: str | Path) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """`mapped` for each split that there is, "train" and "test"."""
    path = _path(source)
    if path.suffix in _TABLES:
        return {"train": _copied(path, target_of(source))}
    if _holds_arrays(path):
        arrays = {name: _npy(path / f"{name}.npy") for name in ("x", "y")}
        return _paired(path, arrays, set(arrays))
    return _paired(path, *_arrays(path, _left_on_disk))


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
    got = f"no column {asked!r}" if asked else "no two"
    got += f" (it has {', '.join(columns[:5])})"
    advice = "" if asked else "Put commas between the columns."
    ensure(known and len(columns) > 1, path, "hold inputs and targets", got, advice)
    return asked or [*usual, columns[-1]][0]


def _path(source: object) -> Path:
    return Path(str(source).partition("?target=")[0]).expanduser()


def _holds_arrays(path: Path) -> bool:
    return all((path / f"{name}.npy").is_file() for name in ("x", "y"))


def _copied(path: Path, target: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """A table in temporary files; targets of whole numbers throughout are labels."""
    with tempfile.TemporaryFile() as inputs, tempfile.TemporaryFile() as targets:
        num, labels = 0, []  # the rows of the parts whose targets look like labels
        for x, y in _rows(path, target, _ROWS_COPIED):
            inputs.write(x.tobytes())
            whole = y.dtype.kind == "i"
            targets.write(y.astype(np.int64 if whole else np.float64).tobytes())
            labels += [slice(num, num + len(y))] * whole
            num += len(y)
        ensure(num > 0, path, "hold inputs and targets", "no rows")
        mapped_inputs = np.memmap(inputs, x.dtype, "r", shape=(num, x.shape[1]))
        if sum(part.stop - part.start for part in labels) == num:
            return mapped_inputs, np.memmap(targets, np.int64, "r", shape=(num,))
        values = np.memmap(targets, np.float64, "r+", shape=(num, 1))
        for part in labels:
            values[part] = values[part].view(np.int64)
        values.flags.writeable = False
        return mapped_inputs, values


def _rows(
    path: Path, target: str, rows: int = _ROWS_AT_ONCE
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Inputs (n, d) of one floating-point type and targets, (n,) of integers or (n, 1)."""
    for frame in filter(len, _frames(path, rows)):
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
        # A part of a CSV file may look like whole numbers, and the next one not.
        least = np.float64 if path.suffix == ".csv" else np.float32
        kind = np.result_type(least, *inputs.dtypes)
        yield inputs.to_numpy(dtype=kind), labels


def _frames(path: Path, rows: int) -> Iterator[Any]:
    """A table, so many rows at a time; without the index that pandas writes."""
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` must be a table; got no such file.")
    is_csv = path.suffix == ".csv"
    parts = (_of_csv if is_csv else _of_parquet)(path, rows)
    got, advice = f"{path.stat().st_size} bytes", "Write it with `DataFrame.to_csv`."
    kinds = (ValueError, OSError)  # of the readers, which do not name the file
    while True:
        with explained(path, f"be a {path.suffix} table", got, advice, kinds):
            frame = next(parts, None)
        if frame is None:
            return
        yield frame.drop(columns=[_INDEX], errors="ignore") if is_csv else frame


def _of_csv(path: Path, rows: int) -> Iterator[Any]:
    read = package("pandas", "'sharpness[files]'").read_csv
    with read(path, chunksize=rows) as table:
        yield from table


def _of_parquet(path: Path, rows: int) -> Iterator[Any]:
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
    return _paired(path, *_arrays(path, _in_memory))


def _paired(
    path: str | Path, arrays: dict[str, Any], names: set[str]
) -> dict[str, tuple[Any, Any]]:
    """Inputs and targets by split; `names` are those of all arrays that are there."""
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
        some = 0 not in (*x.shape, *y.shape)
        ensure(even and some, path, contract, got, _WRITE)
    return parts


def _arrays(
    path: str | Path, taken: Callable[[zipfile.ZipFile, str], Any]
) -> tuple[dict[str, Any], set[str]]:
    """The arrays that `_SPELLINGS` knows, and the names of all."""
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(
            f"`{path}` must be an .npz file; got no such file. Check the path."
        )
    ours = {name for pairs in _SPELLINGS.values() for pair in pairs for name in pair}
    arrays, names, problem = {}, set(), ""
    if taken is _in_memory:
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(place) as archive:
            check_fits(path, sum(part.file_size for part in archive.infolist()))
    try:
        with zipfile.ZipFile(place) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            arrays = {name: taken(archive, f"{name}.npy") for name in ours & names}
    except Exception as error:  # damaged archives raise half a dozen kinds
        problem = f"{place.stat().st_size} bytes that are none ({type(error).__name__})"
    if any("complex" in str(array.dtype) for array in arrays.values()):
        problem = "complex ones"
    contract = "be an .npz file with plain arrays of real numbers"
    ensure(not problem, path, contract, problem, _WRITE)
    return arrays, names


def _in_memory(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(name) as member:
        return torch.from_numpy(batches.native(npy.read_array(member, allow_pickle=False)))


def _left_on_disk(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array where it lies in the archive; a compressed one in a temporary file."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        with archive.open(name) as packed, tempfile.TemporaryFile() as file:
            shutil.copyfileobj(packed, file)
            return _at(file, 0)
    with open(str(archive.filename), "rb") as file:
        # The local header's own length: its name and extra field may be other ones.
        file.seek(member.header_offset + 26)
        return _at(
            file, member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        )


def _npy(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            return _at(file, 0)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{path}` must be an .npy file with a plain array of numbers; got "
            f"{path.stat().st_size} bytes that are none. Write it with `numpy.save`."
        ) from error


def _at(file: IO[bytes], start: int) -> NDArray[Any]:
    """The array that begins there in NumPy's format, on disk."""
    file.seek(start)
    version = npy.read_magic(file)
    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, kind = header(file)
    if kind.kind not in "biufc":
        error = ValueError if kind.hasobject else TypeError
        raise error(f"no numbers: {kind}")
    if 0 in shape:
        return np.empty(shape, kind)
    order: Literal["C", "F"] = "F" if by_columns else "C"
    return np.memmap(file, kind, "r", file.tell(), shape, order)
