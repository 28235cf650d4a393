"""Checkpoints as other programs write them: read, with one line on what was done."""

import argparse
import collections
import copy
import fractions
import json
import pathlib
import re
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from helpers.checkpoints import saved, trained, user_folder
from torch import nn

from sharpness import EmpiricalRisk, measure
from sharpness.lab.data import class_balanced
from sharpness.loading import load_checkpoint
from sharpness.measurement import measured
from sharpness.measures.settings import MeasurementSettings
from sharpness.risk import files, memory

MORE = """
from torch.nn.utils.parametrizations import weight_norm
def normed():
    return nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3))
def norm(): return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
class Stateful(nn.Sequential):
    def get_extra_state(self): return {"scale": 2}
    def set_extra_state(self, state): pass
made = mlp()
def stateful(): return Stateful(*mlp())
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.head, self.second.weight = nn.Linear(5, 3), self.first.weight
    def forward(self, x): return self.head(self.second(torch.tanh(self.first(x))))
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(5)
    def forward(self, x): return self.LayerNorm(x)
class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = Norm(), nn.Linear(5, 3)
    def forward(self, x): return self.head(self.norm(x))
class Placed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("position_ids", torch.arange(4))
    def forward(self, x): return self.net(x)
def my_loss(outputs, targets): return nn.functional.cross_entropy(outputs, targets)
dicts = lambda: DataLoader(
    [{"input": x, "labels": y} for x, y in zip(*points())], batch_size=7)
plain_set = lambda: TensorDataset(*points())
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    with user_folder(tmp_path, monkeypatch, MORE) as module:
        yield module


def net(nets, name="mlp"):
    return trained(getattr(nets, name)(), nets.points())


def loaded(path="net.pt", network="mlp", data="points", **options):
    names = {"network": f"nets.py:{network}", "data": f"nets.py:{data}"}
    return load_checkpoint(path, **{**names, **options})


def same(subject, model):
    found, expected = subject.model.state_dict(), model.state_dict()
    return all(torch.equal(found[k], v) for k, v in expected.items() if hasattr(v, "shape"))


def refusal(*arguments, **options):
    with pytest.raises(ValueError, match=r"must.*got") as caught:
        loaded(*arguments, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line.replace(str(arguments[:1]), "")) <= 240
    return line


def inside(state, wrapper):
    return {re.sub(r"^(\w+)\.", rf"\1.{wrapper}.", k): v for k, v in state.items()}


def lightning(state):
    more = {"criterion.weight": torch.ones(3), "acc.confmat": torch.zeros(3, 3)}
    return {
        "state_dict": {**{f"backbone.{k}": v for k, v in state.items()}, **more},
        "pytorch-lightning_version": "2.5.0",
        "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}],
    }


AVERAGED = torch.optim.swa_utils.AveragedModel
# What the file holds, made of a state dict; a word of the line.
FILES = {
    "fsdp": (lambda s: inside(s, "_fsdp_wrapped_module"), "_fsdp_wrapped_module"),
    "activation checkpointing": (
        lambda s: inside(s, "_checkpoint_wrapped_module"),
        "_checkpoint_wrapped_module",
    ),
    "compiled inside": (lambda s: inside(s, "_orig_mod"), "_orig_mod"),
    "all of them": (
        lambda s: inside(
            inside({f"module.{k}": v for k, v in s.items()}, "_orig_mod"), "module"
        ),
        "module",
    ),
    "lightning": (lightning, r"backbone\. taken off.*criterion.weight, acc.confmat"),
    "extra state": (lambda s: {**s, "0._extra_state": torch.ones(2)}, "_extra_state"),
    "old positions": (lambda s: {**s, "position_ids": torch.arange(4)}, "position_ids"),
    "old masks": (
        lambda s: {
            **s,
            "0.attn.bias": torch.ones(1, 1, 4, 4),
            "0.masked_bias": torch.ones(()),
        },
        "attn.bias, 0.masked_bias",
    ),
    "a loss with weights": (
        lambda s: {**s, "criterion.pos_weight": torch.tensor(3.2)},
        "left out: criterion.pos_weight",
    ),
    "profiled": (lambda s: {**s, "total_ops": torch.zeros(1)}, "total_ops"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_others_write_it_is_read_and_what_was_done_is_said(nets, name):
    change, said = FILES[name]
    model = net(nets)
    torch.save(change(model.state_dict()), "net.pt")
    subject = loaded()
    assert same(subject, model)
    assert len(subject.notes) == 1
    assert re.search(said, subject.notes[0]), subject.notes
    assert subject.facts["notes"] == list(subject.notes)


class Config:
    """Of somebody's module."""

    def __init__(self, **values):
        self.__dict__.update(values)


class Caller:
    """Unpickled by Python's own reader, it writes a file."""

    def __reduce__(self):
        return pathlib.Path("executed").write_text, ("",)


class Runner:
    def __reduce__(self):
        return subprocess.check_call, (["touch", "executed"],)


def legacy(content):
    torch.save(content, "net.pt", _use_new_zipfile_serialization=False)


def split_name(state, name, **parts):
    return {**{k: v for k, v in state.items() if k != name}, **parts}


EMA = {"model_ema.0weight": torch.ones(6, 5), "model_ema.decay": torch.ones(())}
# As trackers tell of them: the file, made of a state dict, and its line; None where the
# network is read as it was.
REPORTED = {
    "a legacy file with a namespace": (
        lambda s: legacy({"model": s, "args": argparse.Namespace(lr=1)}),
        None,
    ),
    "an average beside the network": (
        lambda s: {"state_dict": {**{f"net.{k}": v for k, v in s.items()}, **EMA}},
        None,
    ),
    "further inside": (lambda s: {"state": {"model": s, "optim": {"a": s}}}, None),
    "a language model's encoder": (
        lambda s: {"model": {"language_model": {"encoder": s}}, "iteration": 3},
        None,
    ),
    "parameters": (lambda s: {k: nn.Parameter(v) for k, v in s.items()}, None),
    "a sparse weight": (lambda s: {**s, "0.weight": s["0.weight"].to_sparse()}, None),
    "two inside": (
        lambda s: {"runs": {"first": s, "second": s}},
        "several: runs.first, runs.second. Say which: --state runs.first",
    ),
    "means beside it": (
        lambda s: {"model": s, "ema": {"decay": 0.99, "shadow": s}},
        "several: model, ema.shadow. Say which: --state model",
    ),
    "folds": (lambda s: {0: s, 1: s}, "several: 0, 1. Say which: --state 0"),
    "a module inside": (lambda s: {"model": nn.Linear(2, 2), "epoch": 3}, "whole module"),
    "arrays": (lambda s: {k: v.numpy() for k, v in s.items()}, r"torch.from_numpy\(array"),
    "a list of weights": (lambda s: list(s.values()), "must hold a state_dict"),
    "an optimizer alone": (
        lambda s: {"optimizer": {"state": {"0.weight": {"exp_avg": s["0.weight"]}}}},
        "must hold a state_dict",
    ),
    "4 bits": (lambda s: {**s, "0.qweight": torch.ones(2, 2).int()}, "quantised ones"),
    "8-bit floats": (
        lambda s: {k: v.to(torch.float8_e4m3fn) for k, v in s.items()},
        "quantised ones, first 0.weight",
    ),
    "an adapter": (
        lambda s: {**s, "0.lora_A.weight": torch.ones(2, 5)},
        r"0.lora_A.weight.*merge_and_unload\(\)",
    ),
    "no values": (lambda s: {k: v.to("meta") for k, v in s.items()}, "'meta', first 0.w"),
    "complex weights": (
        lambda s: {**s, "0.weight": s["0.weight"].to(torch.complex64)},
        "real parameters.*first 0.weight",
    ),
    "other names": (
        lambda s: {k.replace("0.", "fc1."): v for k, v in s.items()},
        "first 0.weight .* the file begins with fc1.weight",
    ),
    "flat parameters": (
        lambda s: {"_fsdp_wrapped_module._flat_param": torch.ones(57)},
        "begins with _fsdp_wrapped_module._flat_param",
    ),
    "the other way round": (
        lambda s: {**s, "0.weight": s["0.weight"].t()},
        r"\(5, 6\) in the file, \(6, 5\) wanted",
    ),
}


@pytest.mark.parametrize("name", REPORTED)
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_a_file_that_somebody_reported_is_read_or_told_in_a_line(nets, name):
    make, line = REPORTED[name]
    model = net(nets)
    content = make(model.state_dict())
    if content is not None:
        torch.save(content, "net.pt")
    if line is None:
        assert same(loaded(), model)
    else:
        assert re.search(line, refusal())


def test_pruned_weights_are_folded(nets):
    model, mask = net(nets), (torch.arange(30).view(6, 5) % 2).float()
    weight = model[0].weight.detach()
    parts = {"0.weight_orig": weight, "0.weight_mask": mask}
    torch.save(split_name(model.state_dict(), "0.weight", **parts), "net.pt")
    subject = loaded()
    assert torch.equal(subject.model[0].weight, weight * mask)
    assert "folded" in subject.notes[0]


BESIDE = {
    "argparse.Namespace": argparse.Namespace(lr=0.1, out=pathlib.Path("runs")),
    "multiarray.scalar": np.float64(0.93),
    "multiarray._reconstruct": np.arange(3.0),
    "Config": Config(depth=3, inner=[Config(width=2)]),
    "Fraction": fractions.Fraction(1, 3),
}


@pytest.mark.parametrize("name", BESIDE)
def test_objects_beside_the_tensors_are_passed_over_and_named(nets, name):
    model = net(nets)
    torch.save({"model": model.state_dict(), "beside": BESIDE[name]}, "net.pt")
    subject = loaded()
    assert same(subject, model)
    assert re.search(f"not read, since they are no tensors: .*{name}", subject.notes[-1])


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_calls_beside_the_tensors_are_never_made_R37(nets, tmp_path, name):
    beside = {"first": Caller(), "second": fractions.Fraction(1, 3)}
    torch.save({"model": nets.mlp().state_dict(), **beside}, name)
    assert "not executed" in refusal(name)
    assert not (tmp_path / "executed").exists()


def test_a_dict_of_ones_own_beside_the_tensors_is_one_line(nets):
    state = nets.mlp().state_dict()
    torch.save({"model": state, "more": collections.defaultdict(int, a=1)}, "net.pt")
    assert "`collections.defaultdict`" in refusal()


KINDS = {
    "net.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "net.bin": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "page.pt": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "net.gguf": (b"GGUF\x03\x00\x00\x00", "GGUF file"),
    "net.onnx": (b"\x08\x08\x12\x07pytorch", "ONNX"),
    "net.h5": (b"\x89HDF\r\n\x1a\n", "Keras"),
    "net.pt.gz": (b"\x1f\x8b\x08\x00", "gzip archive. Unpack"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_called_by_its_name(nets, name):
    content, expected = KINDS[name]
    Path(name).write_bytes(content)
    assert re.search(expected, refusal(name))


def test_arrays_and_exported_programs_are_no_checkpoints(nets):
    np.savez("net.npz", x=np.ones(3))
    assert "NumPy arrays" in refusal("net.npz")
    program = torch.export.export(net(nets), nets.points()[:1])
    torch.export.save(program, "net.pt2")
    assert "torch.export program" in refusal("net.pt2")
    torch.save(program.state_dict, "net.pt")  # the way out
    assert loaded().notes == ()


FOLDERS = {
    "__0_0.distcp": "format_utils dcp_to_torch",
    "zero_to_fp32.py": "DeepSpeed",
    "adapter_model.safetensors": "merge_and_unload",
    "tf_model.h5": "another framework",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_another_kind_is_called_by_its_name(nets, tmp_path, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(b"")
    assert FOLDERS[name] in refusal("model")


def test_what_a_file_is_is_told_by_its_bytes(nets):
    """A name that lies is no obstacle."""
    model = net(nets)
    safetensors.torch.save_file(model.state_dict(), "net.bin")
    torch.save(model.state_dict(), "net.safetensors")
    assert same(loaded("net.bin"), model)
    assert same(loaded("net.safetensors"), model)


def test_a_plain_file_needs_nothing_said(nets):
    saved(net(nets))
    assert loaded().notes == ()


def test_an_averaged_model_is_read(nets):
    model = AVERAGED(net(nets))
    torch.save(model.state_dict(), "net.pt")
    subject = loaded()
    assert same(subject, model.module)
    assert "n_averaged" in subject.notes[0]


def test_batchnorm_without_a_counter_is_read(nets):
    model = net(nets, "norm")
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save(state, "net.pt")
    subject = loaded(network="norm")
    assert torch.equal(subject.model[1].running_mean, model[1].running_mean)
    assert "num_batches_tracked" in subject.notes[0]


def test_a_network_with_extra_state_takes_a_file_without(nets):
    model = net(nets)
    saved(model)
    assert same(loaded(network="stateful"), model)


def test_the_names_of_the_first_bert_are_read(nets):
    model = net(nets, "Normed")
    state = model.state_dict()
    old = {"norm.LayerNorm.weight": "gamma", "norm.LayerNorm.bias": "beta"}
    renamed = {f"norm.LayerNorm.{old[k]}" if k in old else k: v for k, v in state.items()}
    torch.save(renamed, "net.pt")
    assert same(loaded(network="Normed"), model)


def test_a_call_that_a_file_asks_for_is_named_and_not_made_R37(nets, tmp_path):
    model = net(nets)
    torch.save({"model": model.state_dict(), "beside": Runner()}, "net.pt")
    subject = loaded()
    assert same(subject, model)
    assert "check_call" in subject.notes[-1]
    assert not (tmp_path / "executed").exists()


def test_a_buffer_of_positions_may_be_absent(nets):
    model = net(nets, "Placed")
    state = {k: v for k, v in model.state_dict().items() if k != "position_ids"}
    torch.save(state, "net.pt")
    assert same(loaded(network="Placed"), model)


@pytest.mark.parametrize("network", ["normed", "mlp"])
def test_the_old_names_of_weight_norm_are_read(nets, network):
    model = net(nets, "normed")
    head = "0.parametrizations.weight.original"
    names = {f"{head}0": "0.weight_g", f"{head}1": "0.weight_v"}
    torch.save({names.get(k, k): v for k, v in model.state_dict().items()}, "net.pt")
    subject = loaded(network=network)
    x = nets.points()[0]
    assert torch.allclose(subject.model(x), model(x), atol=1e-6)
    assert ("folded" in " ".join(subject.notes)) == (network == "mlp")


def test_tied_weights_are_in_a_file_once(nets):
    model = net(nets, "Tied")
    safetensors.torch.save_model(model, "net.safetensors")
    assert len(safetensors.torch.load_file("net.safetensors")) == 3
    subject = loaded("net.safetensors", "Tied")
    assert same(subject, model)
    assert "tied" in subject.notes[0]


def test_one_of_several_state_dicts_is_never_taken_silently(nets):
    first, second = net(nets), nets.mlp()
    file = {"model": first.state_dict(), "model_ema": second.state_dict(), "epoch": 3}
    torch.save({**file, "deep": {"er": first.state_dict()}}, "net.pt")
    assert "several: model, model_ema" in refusal()
    assert same(loaded(state="model_ema"), second)
    assert same(loaded(state="deep.er"), first)
    assert "'ema'" in refusal(state="ema")


def test_two_networks_under_two_prefixes_are_told_apart(nets):
    state = nets.mlp().state_dict()
    model = nets.mlp()
    both = {f"teacher.{k}": v for k, v in state.items()}
    both |= {f"student.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": both}, "net.pt")
    assert "'student.' and 'teacher.'" in refusal()
    assert same(loaded(state="state_dict.student"), model)


def test_a_parameter_that_is_missing_or_too_many_is_refused(nets):
    state = nets.mlp().state_dict()
    torch.save({k: v for k, v in state.items() if k != "2.bias"}, "net.pt")
    assert "first 2.bias (none in the file, (3,) wanted; the file begins" in refusal()
    torch.save({**state, "4.weight": torch.ones(2)}, "net.pt")
    assert "first 4.weight ((2,) in the file, none wanted)" in refusal()
    torch.save({**state, "2.weight": torch.ones(4, 6)}, "net.pt")
    assert "first 2.weight ((4, 6) in the file, (3, 6) wanted)" in refusal()


def sharded(state, suffix, folder):
    save = torch.save if suffix == "bin" else safetensors.torch.save_file
    stem = "pytorch_model" if suffix == "bin" else "model"
    names = list(state)
    files = {k: f"{stem}-0000{1 + (i > 1)}-of-00002.{suffix}" for i, k in enumerate(names)}
    for file in set(files.values()):
        save({k: state[k] for k in names if files[k] == file}, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_sharded_checkpoint_is_read_by_its_index_or_its_folder(nets, tmp_path, suffix):
    model, folder = net(nets), tmp_path / "model"
    folder.mkdir()
    index = sharded(model.state_dict(), suffix, folder)
    by_index, by_folder = loaded(index), loaded(folder)
    assert same(by_index, model)
    assert same(by_folder, model)
    assert by_index.facts["sha256"] == by_folder.facts["sha256"]


def test_an_index_reads_nothing_from_elsewhere_R37(nets, tmp_path):
    saved(net(nets))
    (tmp_path / "sub").mkdir()
    index = tmp_path / "sub" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "../net.pt"}}))
    assert "lies elsewhere" in refusal(index)


def test_a_folder_that_is_no_checkpoint_says_what_it_holds(nets, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "holds config.json, no weights" in refusal("model")
    for name in ("a.pt", "b.pt"):
        saved(net(nets), f"model/{name}")
    assert "holds a.pt, b.pt, config.json, several" in refusal("model")


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_state_dict_is_refused_by_its_kind_and_never_executed_R37(nets):
    model = net(nets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, nets.points()[0]).save("script.pt")
        torch.save(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), "q.pt")
        narrow = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}).state_dict()
        torch.save(narrow, "narrow.pt")
    torch.save(model, "whole.pt")
    torch.save(
        {"0.weight": torch.ones(2, 2, dtype=torch.int8), "s": torch.ones(2)}, "int8.pt"
    )
    assert "TorchScript program" in refusal("script.pt")
    assert "not the whole module" in refusal("whole.pt")
    assert "not the whole module" in refusal("q.pt")
    for name in ("narrow.pt", "int8.pt"):
        assert "quantised" in refusal(name)


# -- what stands beside the checkpoint ---------------------------------------------------


@pytest.mark.parametrize("data", ["dicts", "plain_set"])
def test_loaders_of_dicts_and_data_sets_are_data(nets, data):
    saved(net(nets))
    x, y = nets.points()
    found, targets = loaded(data=data).train if data == "plain_set" else (None, None)
    if data == "dicts":
        inputs, targets = loaded(data=data).train
        found = inputs["input"]
    assert torch.equal(found, x)
    assert torch.equal(targets, y)


def test_a_table_is_data_and_its_target_is_said(nets):
    saved(net(nets))
    x, y = nets.points()
    header = ",".join([*"abcde", "label"])
    np.savetxt(
        "d.csv", torch.column_stack([x, y]), delimiter=",", header=header, comments=""
    )
    text = Path("d.csv").read_text()
    Path("d.csv").write_text(re.sub(r"(\d)\.0+e\+00$", r"\1", text, flags=re.MULTILINE))
    subject = load_checkpoint("net.pt", network="nets.py:mlp", data="d.csv")
    assert torch.allclose(subject.train[0].float(), x)
    assert torch.equal(subject.train[1], y)
    assert subject.notes == ("targets: column 'label' of d.csv",)
    with pytest.raises(ValueError, match=r"`--data d.csv\?target=z` must .*'z'"):
        load_checkpoint("net.pt", network="nets.py:mlp", data="d.csv?target=z")


def in_npz(x, y, save=np.savez):
    save("d.npz", x=x, y=y)
    return "d.npz"


def in_csv(x, y):
    pd.DataFrame(x).assign(label=y).to_csv("d.csv", index=False)
    return "d.csv"


def in_parquet(x, y):
    pytest.importorskip("pyarrow")
    pd.DataFrame(x, columns=list("abcde")).assign(label=y).to_parquet("d.parquet")
    return "d.parquet"


def in_folder(x, y, split="train"):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input": x, "labels": y})
    datasets.DatasetDict({split: rows, "validation": rows}).save_to_disk("d")
    return "d"


STORED = {
    "npz": in_npz,
    "compressed": lambda x, y: in_npz(x, y, np.savez_compressed),
    "by column": lambda x, y: in_npz(np.asfortranarray(x), y),
    "other byte order": lambda x, y: in_npz(x.astype(">f8"), y.astype(">i4")),
    "csv": in_csv,
    "parquet": in_parquet,
    "folder": in_folder,
}


@pytest.mark.parametrize("name", STORED)
def test_samples_of_a_file_are_drawn_while_it_is_read(nets, name, monkeypatch):
    """The same rows as of data in memory, and no more than these are ever held."""
    monkeypatch.setattr(files, "_ROWS_AT_ONCE", 64)
    saved(nets.mlp())
    x, y = nets.normal(2000, 5).double().numpy(), np.arange(2000) % 3
    source = STORED[name](x, y)
    expected = x[class_balanced(torch.from_numpy(y), 60, 4).numpy()]
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2 * 150 * 48)  # 150 rows, twice
    subject = load_checkpoint("net.pt", network="nets.py:mlp", data=source)
    found, targets = subject.samples("train", 60, 4)
    found = found["input"] if isinstance(found, dict) else found
    assert np.allclose(found.numpy(), expected, rtol=1e-6)
    assert targets.bincount().tolist() == [20, 20, 20]
    with pytest.raises(
        ValueError, match=rf"`--data {source}` must fit in half of the free"
    ):
        subject.samples("train", None, 4)


def test_a_folder_of_several_parts_says_which_it_lacks(nets):
    saved(nets.mlp())
    in_folder(np.ones((6, 5)), np.arange(6) % 3, split="test")
    with pytest.raises(ValueError, match="part 'train'; got test, validation"):
        load_checkpoint("net.pt", network="nets.py:mlp", data="d")


@pytest.mark.parametrize("loss", ["nets.py:my_loss", "torch.nn.functional:cross_entropy"])
def test_a_plain_function_is_a_loss(nets, loss):
    saved(net(nets))
    x, y = nets.points()
    subject = loaded(loss=loss)
    expected = nn.functional.cross_entropy(subject.model(x), y)
    assert torch.equal(subject.loss(subject.model(x), y), expected)


def test_losses_have_pytorchs_names(nets):
    saved(net(nets))
    assert isinstance(loaded(loss="CrossEntropyLoss").loss, nn.CrossEntropyLoss)


def test_a_variable_is_no_factory(nets):
    saved(net(nets))
    assert "'constant', which is a int" in refusal(network="constant")
    assert "'made', which is a Sequential" in refusal(network="made")


# -- transformers ------------------------------------------------------------------------

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 30


@pytest.fixture
def gpt2(nets, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=32, n_embd=8, n_layer=1, n_head=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "corpus.txt").write_text(TEXT)
    return model


def test_a_folder_of_a_causal_model_is_measured_on_a_text_file(gpt2, capsys):
    command = "gpt2 --data corpus.txt --measures norms --json --num-samples all"
    assert measure.main(command.split()) == 0
    record = json.loads(capsys.readouterr().out)
    tokens = torch.tensor(list(TEXT.encode()))
    blocks = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    expected = float(gpt2(input_ids=blocks, labels=blocks).loss.detach())
    assert record["value"] == pytest.approx(expected, rel=1e-5)
    notes = record["checkpoint"]["notes"]
    assert "tied: lm_head.weight" in notes[0].replace("model.", "")
    assert notes[1] == f"text: {len(blocks)} blocks of 32 bytes, for want of a tokenizer"
    assert record["settings"]["risk"]["num_terms"] == len(blocks) * 31


def test_a_name_is_found_in_the_local_cache_alone(gpt2, tmp_path, monkeypatch, capsys):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    kept = tmp_path / "hub" / "models--some--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("1a2b")
    (kept / "snapshots").mkdir()
    (tmp_path / "gpt2").rename(kept / "snapshots" / "1a2b")
    command = "some/model --data corpus.txt --measures norms --json --num-samples 8"
    assert measure.main(command.split()) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["checkpoint"]["network"] == {"name": "transformers:some/model"}
    assert (tmp_path / "records.jsonl").is_file()
    assert measure.main(["some/other", *command.split()[1:]]) == 2
    error = capsys.readouterr().err
    assert "`some/other` must be a file, a folder or a model in Hugging Face's" in error
    assert "hf download some/other" in error


def test_named_parameters_alone_are_measured(gpt2, capsys):
    command = "gpt2 --data corpus.txt --measures norms --json --num-samples 8"
    assert measure.main([*command.split(), "--params", "*attn*,*ln_f.bias"]) == 0
    record = json.loads(capsys.readouterr().out)
    sizes = [
        p.numel()
        for k, p in gpt2.named_parameters()
        if "attn" in k or k.endswith("ln_f.bias")
    ]
    assert record["settings"]["risk"]["num_parameters"] == sum(sizes)


def test_what_was_done_is_a_line_of_the_output(gpt2, capsys):
    command = "gpt2 --data corpus.txt?length=16 --measures norms"
    assert measure.main(command.split()) == 0
    out = capsys.readouterr().out
    assert re.search(r"^text: \d+ blocks of 16 bytes", out, re.MULTILINE)


def test_labels_that_were_moved_already_are_refused(gpt2, nets, tmp_path):
    (tmp_path / "moved.py").write_text(
        "import torch\n"
        "t = torch.arange(60).view(5, 12)\n"
        "def pair(): return t[:, :-1], t[:, 1:]\n"
        "def same(): return [{'input_ids': t, 'labels': t}]\n"
    )
    with pytest.raises(ValueError, match="moved by one already"):
        load_checkpoint("gpt2", data="moved.py:pair")
    inputs, labels = load_checkpoint("gpt2", data="moved.py:same").train
    assert labels.shape == (5, 11)
    assert torch.equal(labels, inputs["input_ids"][:, 1:])
    with pytest.raises(ValueError, match="causal model"):
        load_checkpoint("gpt2", data="nets.py:words")


def test_a_text_that_is_too_short_is_one_line(gpt2, tmp_path):
    (tmp_path / "short.txt").write_text("no")
    with pytest.raises(ValueError, match="hold at least 32 tokens; got 2"):
        load_checkpoint("gpt2", data="short.txt")


def test_copies_of_models_stay_apart(gpt2):
    """Tied weights are one parameter, of the model as of the folder."""
    subject = load_checkpoint("gpt2", data="corpus.txt")
    inner = copy.deepcopy(subject.model).model
    assert inner.lm_head.weight is inner.transformer.wte.weight
    assert torch.equal(inner.lm_head.weight, gpt2.lm_head.weight)


SMALL = {
    **{
        "vocab_size": 30,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    **{"intermediate_size": 8, "max_position_embeddings": 16},
}
LABELS = """
import torch
def number(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))
tokens = lambda: {"input_ids": number(30, 12, 7)}
each = lambda: torch.where(number(2, 12, 7) > 0, number(4, 12, 7), -100)
per_token = lambda: (tokens(), each())
per_row = lambda: (tokens(), number(4, 12))
values = lambda: (tokens(), number(4, 12).float())
several = lambda: (tokens(), number(2, 12, 4).float())
"""
HEADS = {
    "SequenceClassification": ("per_row", {}),
    "TokenClassification": ("per_token", {}),
    "MaskedLM": ("per_token", {}),
    "one value": ("values", {"num_labels": 1}),
    "several labels": ("several", {"problem_type": "multi_label_classification"}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_transformers_have_the_loss_that_they_compute_themselves(
    nets, tmp_path, name
):
    transformers = pytest.importorskip("transformers")
    data, more = HEADS[name]
    config = transformers.BertConfig(**{**SMALL, "num_labels": 4, **more})
    kind = name if name[0].isupper() else "SequenceClassification"
    torch.manual_seed(0)
    model = getattr(transformers, f"BertFor{kind}")(config).eval()
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "labels.py").write_text(LABELS)
    subject = load_checkpoint("bert", data=f"labels.py:{data}")
    risk = EmpiricalRisk(subject.model, subject.loss, subject.train)
    inputs, labels = subject.train
    expected = float(model(**inputs, labels=labels).loss.detach())
    assert risk.value() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "BertModel", "T5Model"])
def test_other_classes_of_transformers_are_one_line_that_says_which_are_known(
    nets, tmp_path, name
):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL, architectures=[name])
    config.save_pretrained(tmp_path / "bert")
    saved(nets.mlp(), tmp_path / "bert" / "model.pt")
    with pytest.raises(ValueError, match=f"masked or a causal LM; got {name}") as caught:
        load_checkpoint("bert", data="nets.py:points")
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize("name", ["corpus.txt", "d.tsv", "x.npy", "pair.pt"])
def test_text_is_data_of_causal_models_alone(nets, tmp_path, name):
    saved(nets.mlp())
    (tmp_path / name).write_text("words")
    with pytest.raises(ValueError, match=rf"`--data {name}` must .*got a .* file. Take"):
        load_checkpoint("net.pt", network="nets.py:mlp", data=name)


TABLES = {
    "semicolons": ("d.csv", b"a;b;c\n1;2;0\n", r"no two \(it has a;b;c\). Put commas"),
    "nothing": ("d.csv", b"", "be a .csv table; got 0 bytes"),
    "other letters": ("d.csv", b"\xff\xfe\x00a", "be a .csv table; got 4 bytes"),
    "a head alone": ("d.csv", b"a,b,label\n", "got no rows"),
    "broken": ("d.parquet", b"PAR1xx", "be a .parquet table; got 6 bytes"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_file_that_is_no_table_is_one_line(nets, tmp_path, name):
    file, content, line = TABLES[name]
    if file.endswith("parquet"):
        pytest.importorskip("pyarrow")
    saved(nets.mlp())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"`--data {file}` must .*{line}") as caught:
        load_checkpoint("net.pt", network="nets.py:mlp", data=file)
    assert "\n" not in str(caught.value)


def test_row_numbers_that_pandas_writes_are_no_input(nets):
    saved(nets.mlp())
    x, y = nets.points()
    pd.DataFrame(x.numpy(), columns=list("abcde")).assign(label=y.numpy()).to_csv("d.csv")
    subject = load_checkpoint("net.pt", network="nets.py:mlp", data="d.csv")
    assert torch.allclose(subject.train[0].float(), x)


# -- what the network was trained with ---------------------------------------------------


@pytest.mark.parametrize("kept", ["optimizer", "optimizer_states"])
def test_the_rate_of_somebodys_optimizer_goes_with_the_noise_scale(nets, kept):
    model = net(nets)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    state = optimizer.state_dict()
    file = {"state_dict": model.state_dict(), "epoch": 3, kept: state}
    if kept == "optimizer_states":
        file[kept] = [state]
    torch.save(file, "net.pt")
    subject = loaded()
    assert subject.facts["training"]["learning_rate"] == 0.3
    settings = MeasurementSettings(measures=["noise_scale"], num_samples=30)
    found = measured(subject, settings, progress=False)
    record = found.record["measures"]["noise_scale"][0]
    assert record["settings"]["training"] == subject.facts["training"]


@pytest.mark.parametrize("groups", [[], [3], {"lr": 1}, None])
def test_what_is_no_optimizer_is_passed_over(nets, groups):
    file = {"state_dict": net(nets).state_dict(), "optimizer": {"param_groups": groups}}
    torch.save(file, "net.pt")
    assert not loaded().facts["training"].get("learning_rate")
