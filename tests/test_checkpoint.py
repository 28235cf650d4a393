import dataclasses
import hashlib
import math
import os
import pathlib
import pickle
import stat
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from sharpness import checkpoint
from sharpness.checkpoint import FORMAT, SCHEMA, Checkpoint, load, save

SUFFIXES = [".pt", ".safetensors"]
FIELDS = ["state_dict", "network", "data", "training", "start", "optimizer"]


def stepped():
    """A network and its Adam after two updates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        update(model, optimizer)
    return model, optimizer


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(15.0).view(5, 3)).square().sum().backward()
    optimizer.step()


def plain(value):
    """Tuples as lists: what the lab hands over."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [*map(plain, value)] if isinstance(value, list | tuple) else value


def full():
    model, optimizer = stepped()
    return Checkpoint(
        state_dict=model.state_dict(),
        network={"name": "F1", "arguments": {"in_features": 64, "num_classes": 10}},
        data={"name": "digits", "num_train": 1433, "sha256": "ab" * 32},
        training={"epoch": 3, "history": [0.1, 1 / 3, 5e-324], "finished": True},
        start={"seed": 2**62, "sha256": "é", "nothing": None, "empty": {}},
        optimizer=plain(optimizer.state_dict()),
    )


def small(**changes):
    facts = {name: {} for name in FIELDS} | {"state_dict": {"w": torch.ones(2)}}
    return Checkpoint(**{**facts, **changes})


def assert_identical(a, b):
    """Equal values of equal types, tensors bit for bit, keys in order."""
    if isinstance(a, dict):
        assert [*map(repr, a)] == [*map(repr, b)]
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits)
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b)
    else:
        assert (type(a), a) == (type(b), b)


def assert_round_trip(written, path):
    save(path, written)
    read = load(path)
    for name in FIELDS:
        assert_identical(getattr(written, name), getattr(read, name))
    return read


# -- what is written is what is read -----------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, suffix):
    path = tmp_path / "new" / f"run{suffix}"
    read = assert_round_trip(full(), path)
    assert 0 in read.optimizer["state"]  # a whole number, not "0"
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load(str(path)).sha256 == read.sha256


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path, suffix):
    save(tmp_path / f"run{suffix}", full())
    read = load(tmp_path / f"run{suffix}")
    model, optimizer = stepped()
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    other.load_state_dict(read.state_dict)
    adam = torch.optim.Adam(other.parameters(), lr=9.0)
    adam.load_state_dict(read.optimizer)
    update(model, optimizer)
    update(other, adam)
    assert_identical(dict(model.state_dict()), dict(other.state_dict()))


TENSORS = {
    "float64": torch.tensor([math.nan, -0.0, math.inf, 1e-310], dtype=torch.float64),
    "bfloat16": torch.tensor([1.0, 3e38], dtype=torch.bfloat16),
    "float16": torch.tensor([6e-8, 65504.0], dtype=torch.float16),
    "int64": torch.tensor(2**62),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "strided": torch.arange(6.0).view(2, 3).T,
    "slice": torch.arange(100.0)[10:12],
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_tensor_comes_back(tmp_path, suffix, name):
    assert_round_trip(small(state_dict={"w": TENSORS[name]}), tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shared_tensors_come_back_under_both_names(tmp_path, suffix):
    w = torch.randn(3)
    assert_round_trip(small(state_dict={"a": w, "b": w}), tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "nested",
    [
        {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}},
        {0: torch.zeros(1), "0": torch.ones(1)},
        {"__tensor__": "a", "__dict__": [torch.ones(1)]},
    ],
    ids=["slash", "number and text", "our own marks"],
)
def test_names_that_look_alike_are_kept_apart(tmp_path, suffix, nested):
    assert_round_trip(small(optimizer=nested), tmp_path / f"a{suffix}")


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text()
    | st.lists(st.floats(width=32), max_size=3).map(torch.tensor)
)
KEYS = st.text() | st.integers(0, 2**31 - 1)
NESTED = st.dictionaries(
    KEYS,
    st.recursive(LEAVES, lambda of: st.lists(of) | st.dictionaries(KEYS, of), max_leaves=8),
    max_size=4,
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(facts=NESTED)
def test_nested_plain_values_come_back(tmp_path_factory, suffix, facts):
    path = tmp_path_factory.getbasetemp() / f"nested{suffix}"
    assert_round_trip(small(training=facts), path)


# -- saving ------------------------------------------------------------------------------


def half_written(kind):
    def write(path, content):
        with open(path, "wb") as file:
            file.write(content[:11])
        raise kind("no space left")

    return write


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_failing_save_keeps_the_old_file_and_no_other(
    tmp_path, monkeypatch, suffix, error, where
):
    path = tmp_path / f"run{suffix}"
    save(path, small())
    before = path.read_bytes()

    def fail(*arguments):
        raise error("no space left")

    if where == "writing":
        monkeypatch.setattr(pathlib.Path, "write_bytes", half_written(error))
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error, match="no space left"):
        save(path, full())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_value_that_cannot_be_written_leaves_nothing(tmp_path, suffix):
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save(tmp_path / f"run{suffix}", small(training={"f": lambda: 0}))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "value", [pathlib.PurePosixPath("a"), np.float64(0.5), np.int64(3), 1j, {1, 2}]
)
def test_what_was_saved_can_be_read_and_else_is_refused_at_once(tmp_path, suffix, value):
    path = tmp_path / f"run{suffix}"
    try:
        save(path, small(training={"value": value}))
    except (TypeError, ValueError):
        assert not path.exists()
    else:
        assert load(path).training == {"value": value}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saving_replaces_the_file_and_not_its_place(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    save(path, small())
    assert_round_trip(full(), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_checkpoint_can_be_read_by_whom_the_umask_lets(tmp_path, suffix):
    before = os.umask(0o022)
    try:
        save(tmp_path / f"run{suffix}", small())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / f"run{suffix}").stat().st_mode) == 0o644


# -- files that are no checkpoint of ours ------------------------------------------------


def facts_of(**changes):
    facts = dataclasses.asdict(small())
    facts.pop("sha256")
    return {"format": FORMAT, "schema": SCHEMA, **facts, **changes}


def without(name):
    facts = facts_of()
    del facts[name]
    return facts


def torch_file(content):
    return lambda path: torch.save(content, path)


def raw_file(content):
    return lambda path: path.write_bytes(content)


def pickle_file(content, protocol=None):
    return raw_file(pickle.dumps(content, protocol))


def tensor_file(metadata=None):
    return lambda path: safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata)


def truncated(suffix, share):
    def write(path):
        whole = path.with_name(f"whole{suffix}")
        save(whole, full())
        content = whole.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return write


SHARES = [0.01, 0.3, 0.6, 0.9, 0.999]
FOREIGN = {
    "empty": (".pt", raw_file(b""), r"got another file \(0 bytes\)"),
    "text": (".pt", raw_file(b"epoch,loss\n1,0.5\n"), r"got another file \(17 bytes\)"),
    "picture": (".pt", raw_file(b"\x89PNG\r\n\x1a\n" * 9), "got another file"),
    "zip": (".pt", raw_file(b"PK\x03\x04" + bytes(50)), "got a damaged or truncated"),
    "plain pickle": (".pt", pickle_file({"a": 1}, 2), "; got "),
    "new pickle": (".pt", pickle_file({"a": 1}, 4), "; got "),
    "safetensors inside": (".pt", tensor_file(), "; got "),
    "state dict": (
        ".pt",
        torch_file(OrderedDict({"0.weight": torch.ones(2), "0.bias": torch.ones(2)})),
        r"got (Ordered)?[dD]ict \(0.weight, 0.bias",
    ),
    "nested state dict": (
        ".pt",
        torch_file({"state_dict": {"w": torch.ones(2)}, "epoch": 3}),
        r"got dict \(state_dict, epoch",
    ),
    "other format": (".pt", torch_file(facts_of(format="x")), r"got dict \(format"),
    "tensor": (".pt", torch_file(torch.ones(2)), "got something else"),
    "list": (".pt", torch_file([1, 2]), "got something else"),
    "empty dict": (".pt", torch_file({}), "got something else"),
    "schema 2": (".pt", torch_file(facts_of(schema=2)), "must have schema 1; got 2"),
    "no schema": (".pt", torch_file(without("schema")), "schema 1; got None"),
    "empty s": (".safetensors", raw_file(b""), r"got a damaged .* \(0 bytes\)"),
    "text s": (".safetensors", raw_file(b"epoch,loss\n" * 9), "got a damaged"),
    "pt inside": (".safetensors", torch_file({"w": torch.ones(2)}), r"got dict \(w, "),
    "bare s": (".safetensors", tensor_file(), r"got dict \(w, "),
    "foreign s": (".safetensors", tensor_file({"format": "pt"}), r"got dict \(w, "),
    **{
        f"header {text}": (".safetensors", tensor_file({FORMAT: text}), "; got ")
        for text in (
            "no json",
            "3",
            '{"a": 1}',
            '{"__dict__": 5}',
            '{"__dict__": [[[], 1]]}',
            '{"__tensor__": "gone"}',
            '{"__tensor__": []}',
        )
    },
    **{
        f"no {name}": (".pt", torch_file(without(name)), f"got one without {name}")
        for name in ("state_dict", "network", "data", "training", "start")
    },
    **{
        f"{share} of {suffix}": (suffix, truncated(suffix, share), "; got .* bytes")
        for share in SHARES
        for suffix in SUFFIXES
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_file_is_refused_in_one_line_that_says_what_it_is(tmp_path, name):
    suffix, write, message = FOREIGN[name]
    path = tmp_path / f"other{suffix}"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"`{path}` must ")
    assert "\n" not in str(caught.value)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_missing_file_is_named(tmp_path, suffix, kind):
    path = tmp_path / f"gone{suffix}"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(FileNotFoundError, match="; got no such file") as caught:
        load(path)
    assert str(caught.value).startswith(f"`{path}` must ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(content=st.binary(max_size=60))
@example(content=b"X\x01")  # a pickle that announces text and ends
@example(content=b"\x80\x04.")
@example(content=pickle.dumps(b"a", 2).replace(b"latin1", b"la-in1"))
@example(content=b"\x80\x02}q\x00(X\x06\x00\x00\x00formatq\x01")
@example(content=b"(" * 60)
@example(content=b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
def test_no_bytes_raise_anything_but_a_value_error(tmp_path_factory, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="; got "):
        load(path)


# -- pickles that want to run code -------------------------------------------------------


class Malicious:
    """Unpickled by Python's own reader, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


CARRIERS = {
    "torch.save": lambda evil, path: torch.save(evil, path),
    "in a checkpoint": lambda evil, path: torch.save(facts_of(optimizer=evil), path),
    "old torch.save": lambda evil, path: torch.save(
        evil, path, _use_new_zipfile_serialization=False
    ),
    **{
        f"protocol {number}": lambda evil, path, number=number: path.write_bytes(
            pickle.dumps(evil, number)
        )
        for number in range(6)
    },
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_pickle_is_never_executed_and_its_wish_is_named_R37(tmp_path, carrier):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    CARRIERS[carrier](Malicious(marker), path)
    pickle.loads(pickle.dumps(Malicious(marker)))
    marker.rmdir()  # so it does run where it is let
    with pytest.raises(ValueError, match=r"; got a pickle that needs `\w+\.mkdir`"):
        load(path)
    assert not marker.exists()


def test_a_pickle_under_another_name_is_never_executed_R37(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.safetensors"
    torch.save(Malicious(marker), path)
    with pytest.raises(ValueError, match=r"pickle that needs `\w+\.mkdir`"):
        load(path)
    assert not marker.exists()


def test_a_whole_model_in_a_pickle_is_refused_by_the_name_of_its_class_R37(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    name = r"torch\.nn\.modules\.linear\.Linear"
    with pytest.raises(ValueError, match=f"needs `{name}`") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_loading_puts_tensors_on_the_cpu_and_moves_no_generator(tmp_path):
    save(tmp_path / "run.pt", full())
    before = torch.get_rng_state()
    tensors = load(tmp_path / "run.pt").state_dict.values()
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert torch.equal(before, torch.get_rng_state())


def test_the_format_is_what_other_versions_will_look_for(tmp_path):
    save(tmp_path / "run.pt", small())
    raw = torch.load(tmp_path / "run.pt", weights_only=True)
    assert raw["format"] == "sharpness-checkpoint"
    assert raw["schema"] == checkpoint.SCHEMA == 1
    assert set(FIELDS) <= set(raw)
