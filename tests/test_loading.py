"""Anybody's checkpoint with its network, data and loss; and what is refused."""

from __future__ import annotations

import builtins
import json
import os
import re
import socket
import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.checkpoints import (
    CODE,
    Attack,
    by_hand,
    saved,
    trained,
    user_folder,
    widened,
    write_npz,
)
from torch import nn

from sharpness import checkpoint, loading
from sharpness._json import to_line
from sharpness.checkpoint import Checkpoint, load_any
from sharpness.lab import networks
from sharpness.loading import load_checkpoint
from sharpness.measurement import MeasurementSettings, measured


@pytest.fixture
def nets(tmp_path, monkeypatch):
    with user_folder(tmp_path, monkeypatch) as module:
        yield module


def mlp_subject(nets, data="nets.py:points", path=None, **options):
    path = path or saved(trained(nets.mlp(), nets.points()))
    return load_checkpoint(path, network="nets.py:mlp", data=data, **options)


def refusal(call, *arguments, **options):
    """The line of a `ValueError`."""
    with pytest.raises(ValueError, match=r"must.*got") as error:
        call(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


# -- files -------------------------------------------------------------------------------

WRAPPERS = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
WRAPPERS += ["model.", "net.", "model._orig_mod.", "model.module."]
NAMES = ["state_dict", "model_state_dict", "model_state", "model", "net", "params"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_every_wrappers_prefix_comes_off(nets, prefix, suffix):
    model = trained(nets.ResNet(), nets.images())
    state = {prefix + k: v for k, v in model.state_dict().items()}
    save = torch.save if suffix == ".pt" else safetensors.torch.save_file
    save(state, "net" + suffix)
    subject = load_checkpoint(
        "net" + suffix, network="nets.py:ResNet?width=4", data="nets.py:images"
    )
    found = subject.model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
    assert not any(module.training for module in subject.model.modules())
    assert subject.start is None
    assert subject.network_name == "nets.py:ResNet?width=4"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("name", [*NAMES, None])
def test_a_state_dict_is_found_under_the_usual_names(tmp_path, name, suffix):
    state = nn.Linear(3, 2).state_dict()
    path = tmp_path / f"net{suffix}"
    around = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(())}}}}
    torch.save({**around, name: state} if name else state, path)
    saved = load_any(path)
    found = saved.state_dict
    assert list(found) == list(state)
    assert all(torch.equal(found[k], v) for k, v in state.items())
    assert not any([saved.network, saved.data, saved.training, saved.start])


BAD_FILES = {
    "attack": ({"state_dict": Attack()}, "system.*not executed"),
    "whole_module": (nn.Linear(2, 2), "Save the `state_dict` alone"),
    "no_tensors": ({"epoch": 3}, "must hold a state_dict"),
    "empty_state": ({"state_dict": {}}, "must hold a state_dict"),
    "one_tensor": (torch.ones(3), "must hold a state_dict"),
    "list": ([torch.ones(3)], "must hold a state_dict"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_and_never_executed_R37(nets, tmp_path, kind):
    content, expected = BAD_FILES[kind]
    torch.save(content, "bad.pt")
    for read in (load_any, lambda p: mlp_subject(nets, path=p)):
        text = refusal(read, tmp_path / "bad.pt")
        assert str(tmp_path / "bad.pt") in text
        assert re.search(expected, text), text
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_is_named_before_anything_else(tmp_path):
    for read in (load_any, load_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"gone\.pt` must .* no such file"):
            read(tmp_path / "gone.pt")


def native(nets, monkeypatch, **changes):
    """A checkpoint in our own format, of a network that is registered for the test."""
    monkeypatch.setitem(networks.NETWORKS, "M", nets.mlp)
    fresh = nets.mlp(width=4)
    networks.initialise(fresh, 5)
    model = trained(deepcopy(fresh), nets.points())
    facts = {
        "state_dict": model.state_dict(),
        "network": {"name": "M", "arguments": {"width": 4}},
        "data": {"name": "digits"},
        "training": {"seed": 5, "batch_size": 30, "epoch": 3},
        "start": {"seed": 5, "sha256": networks.digest(fresh)},
    }
    checkpoint.save("own.pt", Checkpoint(**{**facts, **changes}))
    return fresh, model


def test_a_native_checkpoint_knows_its_network_and_its_start(nets, monkeypatch):
    fresh, model = native(nets, monkeypatch)
    assert load_any("own.pt").network["name"] == "M"
    subject = load_checkpoint("own.pt", data="nets.py:points")
    assert subject.facts["training"]["seed"] == 5
    start, end = (
        torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in (fresh, model)
    )
    assert torch.equal(subject.start, start)
    found = measured(subject, MeasurementSettings(measures=("norms",), num_samples=None))
    distance = found.summary["norms"].distance_from_start
    assert distance == pytest.approx(float((end - start).double().norm()), rel=1e-6)


def test_a_start_that_cannot_be_made_again_is_none(nets, monkeypatch):
    native(nets, monkeypatch, start={"seed": 5, "sha256": "0" * 64})
    assert load_checkpoint("own.pt", data="nets.py:points").start is None


# -- networks and their numbers ----------------------------------------------------------

KINDS = [
    ("ResNet?width=3", "images"),
    ("Transformer?heads=1", "words"),
    ("mlp?width=4", "points"),
    ("mlp?outputs=2", "regression"),
    ("Two", "named"),
    ("Two", "mapped"),
    ("Two", "several"),
    ("Two", "loader_of_dicts"),
    ("mlp", "batches"),
    ("mlp", "two_batches"),
    ("mlp", "loader"),
]


@pytest.mark.parametrize(("network", "data"), KINDS)
@pytest.mark.parametrize("num_samples", [None, 11])
def test_loss_and_gradient_are_those_by_hand(nets, network, data, num_samples):
    name, _, query = network.partition("?")
    arguments = {k: int(v) for k, v in [query.split("=")]} if query else {}
    once = {"batches": "points", "two_batches": "points", "loader": "points"}
    pair = getattr(nets, once.get(data, data.replace("loader_of_dicts", "named")))()
    model = trained(getattr(nets, name)(**arguments), pair)
    subject = load_checkpoint(
        saved(model), network=f"nets.py:{network}", data=f"nets.py:{data}"
    )
    settings = MeasurementSettings(
        measures=("norms",), num_samples=num_samples, dtype="float64"
    )
    record = measured(subject, settings).record
    if num_samples:
        pair = subject.samples("train", 11, 0)
        assert len(pair[1]) == 11
        counts = pair[1].bincount() if pair[1].ndim == 1 else torch.zeros(1)
        assert counts.max() - counts.min() <= 1
    wide, pair = model.double(), widened(pair)
    value = by_hand(wide, pair)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(value, wide.parameters())])
    assert record["value"] == pytest.approx(float(value.detach()), rel=1e-12)
    found = record["measures"]["norms"][0]["gradient_norm"]
    assert found == pytest.approx(float(slope.norm()), rel=1e-10)
    assert record["settings"]["risk"]["num_samples"] == (num_samples or len(pair[1]))
    json.loads(to_line(record), parse_constant=pytest.fail)


ARGUMENTS = {
    "width=8&bias=True": {"width": 8, "bias": True},
    "rate=1e-3&act=relu": {"rate": 1e-3, "act": "relu"},
    "sizes=[8, 8]&none=None": {"sizes": [8, 8], "none": None},
    "where=a:b&low=-1": {"where": "a:b", "low": -1},
    "path='x=1'": {"path": "x=1"},
    "rate=1e+3": {"rate": 1e3},
    "name=": {"name": ""},
}


@pytest.mark.parametrize("query", ARGUMENTS)
def test_arguments_of_a_factory_arrive_as_python_values(nets, query):
    loading.made_network(f"nets.py:echo?{query}")
    assert sys.modules["nets"].received == [ARGUMENTS[query]]


def test_an_argument_without_a_value_is_refused_and_not_dropped(nets):
    assert "width8" in refusal(loading.made_network, "nets.py:mlp?width8")


def test_modules_of_packages_and_files_elsewhere_are_found(nets, tmp_path):
    (tmp_path / "mine_r1" / "inner").mkdir(parents=True)
    (tmp_path / "mine_r1" / "models.py").write_text(CODE)
    (tmp_path / "mine_r1" / "inner" / "nets.py").write_text(
        "from torch import nn\ndef mlp():\n    return nn.Linear(1, 1)\n"
    )
    assert len(loading.made_network("mine_r1.models:mlp?width=9")[0].bias) == 9
    assert len(loading.made_network("nets.py:mlp?width=7")[0].bias) == 7
    other = loading.made_network(f"{tmp_path}/mine_r1/inner/nets.py:mlp")
    assert isinstance(other, nn.Linear)
    assert len(loading.made_network("nets.py:mlp?width=5")[0].bias) == 5


def test_timm_is_called_with_the_name_and_the_arguments(nets, monkeypatch):
    asked = []

    def create_model(model_name, **arguments):
        asked.append((model_name, arguments))
        return nets.mlp()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    loading.made_network("timm:resnet18?num_classes=3&in_chans=1")
    assert asked == [("resnet18", {"num_classes": 3, "in_chans": 1})]


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_an_absent_package_is_one_line_with_the_way_out(nets, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    text = refusal(loading.made_network, f"{package}:resnet18")
    assert f"pip install {package}" in text
    assert f"'{package}:resnet18'" in text


WRONG_NETWORKS = [
    ("nets.py", "file.py:factory"),
    ("nets.py:", "'nets.py:'"),
    (":mlp", "':mlp'"),
    ("gone.py:mlp", "'gone.py'"),
    ("gone_package.models:mlp", "'gone_package.models'"),
    ("nets.py:missing", "'missing'"),
    ("nets.py:constant", "'constant'"),
    ("nets.py:raising", "no luck today"),
    ("nets.py:leaving", "goodbye"),
    ("nets.py:number", "got int"),
    ("nets.py:mlp?depth=3", "depth"),
    ("nets.py:mlp?width=7", "tensors differ"),
    ("nets.py:ResNet", "tensors differ"),
    ("nets.py:lazy", "nets.py:lazy"),
    ("broken.py:mlp", "SyntaxError"),
]


@pytest.mark.parametrize(("network", "expected"), WRONG_NETWORKS)
def test_a_wrong_network_is_one_line(nets, tmp_path, network, expected):
    (tmp_path / "broken.py").write_text("def mlp(:\n")
    path = saved(nets.mlp())
    text = refusal(load_checkpoint, path, network=network, data="nets.py:points")
    assert expected in text
    assert "--network" in text or path in text


def test_missing_network_and_data_are_asked_for(nets):
    path = saved(nets.mlp())
    assert "`--network` must say" in refusal(load_checkpoint, path, data="nets.py:points")
    assert "`--data` must say" in refusal(load_checkpoint, path, network="nets.py:mlp")


# -- classifiers of transformers ---------------------------------------------------------


def bert_config(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 7, "hidden_size": 4, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 6}
    return transformers.BertConfig(
        **sizes, max_position_embeddings=5, num_labels=3, **changes
    )


@pytest.mark.parametrize("what", ["model", "config"])
def test_a_classifier_of_transformers_is_made_from_its_folder(nets, what):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_config(bert_config())
    (model if what == "model" else bert_config()).save_pretrained("bert")
    safetensors.torch.save_file(model.state_dict(), "bert/model.safetensors")
    subject = load_checkpoint(
        "bert/model.safetensors", network="transformers:bert", data="nets.py:sentences"
    )
    record = measured(
        subject, MeasurementSettings(measures=("norms",), num_samples=None, dtype="float64")
    ).record
    inputs, y = nets.sentences()
    logits = model.double().eval()(**inputs).logits.log_softmax(1)
    value = -float(logits[torch.arange(20), y].mean().detach())
    assert record["value"] == pytest.approx(value, rel=1e-10)


def test_a_model_without_a_classifier_is_refused(nets):
    transformers = pytest.importorskip("transformers")
    transformers.BertModel(bert_config()).save_pretrained("bert")
    text = refusal(loading.made_network, "transformers:bert")
    assert "`--network`" in text
    assert "classifier" in text


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_internet(nets, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail(f"asked {a}"))
    assert "'nobody/none'" in refusal(loading.made_network, "transformers:nobody/none")


def test_code_in_a_folder_of_transformers_is_never_executed_R37(
    nets, tmp_path, monkeypatch
):
    pytest.importorskip("transformers")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "evil.py").write_text(
        "import os\nos.system('touch executed')\nclass Evil: pass\n"
    )
    config = {"model_type": "evil_r1", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "cache"))
    text = refusal(loading.made_network, "transformers:bert")
    assert "bert" in text
    assert not (tmp_path / "executed").exists()


# -- data and loss -----------------------------------------------------------------------


X, Y = np.random.default_rng(0).normal(size=(12, 5)), np.arange(12) % 3


@pytest.mark.parametrize("x_type", ["f4", "f8"])
@pytest.mark.parametrize("y_type", ["i8", "i4", "u1", "?"])
def test_an_npz_file_gives_floats_and_class_numbers(nets, x_type, y_type):
    source = write_npz(x=X.astype(x_type), y=Y.astype(y_type))
    x, y = mlp_subject(nets, source).train
    assert y.dtype == torch.int64
    assert y.tolist() == Y.astype(y_type).astype(int).tolist()
    assert np.array_equal(x.numpy(), X.astype(x_type).astype(x.numpy().dtype))


def test_an_npz_file_may_have_two_splits_and_arrays_of_its_own(nets):
    names = np.array(["cat", "dog", "emu"])
    source = write_npz(x_train=X, y_train=Y, x_test=X[:6], y_test=Y[:6], names=names)
    subject = mlp_subject(nets, source)
    assert len(subject.part("train")[1]) == 12
    assert len(subject.part("test")[1]) == 6


def test_a_float64_network_is_measured_on_an_npz_file_of_float64(nets):
    model = trained(nets.mlp(4), nets.points()).double()
    subject = load_checkpoint(
        saved(model), network="nets.py:wide_floats", data=write_npz(x=X, y=Y)
    )
    found = measured(
        subject, MeasurementSettings(measures=("norms",), num_samples=None)
    ).record
    expected = by_hand(model, (torch.from_numpy(X), torch.from_numpy(Y)))
    assert found["value"] == pytest.approx(float(expected.detach()), rel=1e-12)


def test_a_float64_checkpoint_is_measured_in_float64(nets):
    """The help of --dtype: as in the checkpoint."""
    model = trained(nets.mlp(), nets.points()).double()
    with torch.no_grad():
        model[0].weight.add_(1e-12)
    subject = mlp_subject(nets, path=saved(model))
    assert torch.equal(subject.model[0].weight.double(), model[0].weight)


def truncated_npz(path):
    write_npz(path, x=X, y=Y)
    os.truncate(path, 300)


def npy_inside(path):
    with path.open("wb") as file:
        np.save(file, X)


BAD_NPZ = {
    "missing": lambda p: None,
    "text": lambda p: p.write_text("x,y\n1,2\n"),
    "empty": lambda p: p.write_bytes(b""),
    "truncated": truncated_npz,
    "npy": npy_inside,
    "pickled": lambda p: write_npz(p, x=X, y=np.array([Attack()] * 12)),
    "no_y": lambda p: write_npz(p, x=X),
    "other_names": lambda p: write_npz(p, inputs=X, targets=Y),
    "test_only": lambda p: write_npz(p, x_test=X, y_test=Y),
    "words": lambda p: write_npz(p, x=np.array(["a", "b"]), y=Y[:2]),
    "uneven": lambda p: write_npz(p, x=X, y=Y[:7]),
    "scalars": lambda p: write_npz(p, x=1.0, y=2),
}


@pytest.mark.parametrize("kind", BAD_NPZ)
def test_a_bad_npz_file_is_one_line_and_runs_nothing_R37(nets, tmp_path, kind):
    BAD_NPZ[kind](tmp_path / "bad.npz")
    text = refusal(mlp_subject, nets, str(tmp_path / "bad.npz"))
    assert "--data" in text
    assert str(tmp_path / "bad.npz") in text
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("nets.py:uneven", "30 and 29"),
        ("nets.py:uneven_batch", "uneven_batch"),
        ("nets.py:empty", "list"),
        ("nets.py:number", "int"),
        ("nets.py:raising", "no luck today"),
        ("nets.py:missing", "'missing'"),
        ("imagenet-r1", "'imagenet-r1'"),
    ],
)
def test_wrong_data_are_one_line(nets, data, expected):
    text = refusal(mlp_subject, nets, data)
    assert expected in text
    assert "--data" in text


@pytest.mark.parametrize("loss", ["hinge", "nets.py:number", "nets.py:raising"])
def test_a_wrong_loss_is_one_line(nets, loss):
    text = refusal(mlp_subject, nets, loss=loss)
    assert "--loss" in text
    assert loss in text


def test_the_loss_goes_by_the_targets_unless_named(nets):
    assert isinstance(mlp_subject(nets).loss, nn.CrossEntropyLoss)
    path = saved(nets.mlp(outputs=2))
    options = {"network": "nets.py:mlp?outputs=2", "data": "nets.py:regression"}
    assert isinstance(load_checkpoint(path, **options).loss, nn.MSELoss)
    named = load_checkpoint(path, **options, loss="torch.nn:SmoothL1Loss?beta=0.5").loss
    assert (type(named), named.beta) == (nn.SmoothL1Loss, 0.5)


def test_samples_are_balanced_drawn_by_the_seed_and_in_order(nets):
    subject = mlp_subject(nets, "nets.py:splits")
    x, y = subject.samples("train", 9, 0)
    assert y.bincount().tolist() == [3, 3, 3]
    assert torch.equal(x, subject.samples("train", 9, 0)[0])
    assert not torch.equal(x, subject.samples("train", 9, 1)[0])
    rows = [int((subject.train[0] == row).all(1).nonzero()[0]) for row in x]
    assert rows == sorted(set(rows))
    assert torch.equal(subject.samples("test", None, 0)[0], nets.points(13, 1)[0])
    for num in (0, -1, 31):
        assert f"got {num}" in refusal(subject.samples, "train", num, 0)


def test_a_missing_test_split_is_said(nets):
    text = refusal(mlp_subject(nets).part, "test")
    assert "`--split`" in text
    assert "nets.py:points" in text
