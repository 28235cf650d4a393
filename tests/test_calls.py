"""What people pass in: it works and gives the right value, or one line says what to do."""

import copy
import math
import re
import subprocess
import sys
from collections import UserDict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import sharpness as sh
from sharpness import EmpiricalRisk
from sharpness.risk import batches, files, memory

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
ONE = nn.Linear(3, 1)
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
Y = torch.arange(40) % 4
CE = nn.CrossEntropyLoss()


def cross_entropy(x=X, y=Y, model=MODEL):
    return float(F.cross_entropy(model(x).detach().double(), y))


EXPECTED = cross_entropy()


class Wrapped(nn.Module):
    """Something around the outputs."""

    def __init__(self, around):
        super().__init__()
        self.inner, self.around = copy.deepcopy(MODEL), around

    def forward(self, x):
        return self.around(self.inner(x))


class ByName(nn.Module):
    """Called as transformers' models are, with or without labels."""

    def __init__(self):
        super().__init__()
        self.inner = copy.deepcopy(MODEL)

    def forward(self, x, labels=None):
        logits = self.inner(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


class Detector(nn.Module):
    """Gives a loss in training mode only, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        self.inner = copy.deepcopy(MODEL)

    def forward(self, x, y=None):
        logits = self.inner(x)
        return {"loss": F.cross_entropy(logits, y)} if self.training else [logits]


class Tagger(nn.Module):
    """A class for each token, classes last; called as transformers' models are."""

    def __init__(self, named=True):
        super().__init__()
        self.inner, self.named = copy.deepcopy(MODEL), named

    def forward(self, x, attention_mask=None):
        logits = self.inner(F.one_hot(x, 3).float())
        return SimpleNamespace(logits=logits) if self.named else logits


TOKENS = torch.arange(40).view(10, 4) // 3 % 3
TAGS = torch.where(torch.arange(4) > 2, -100, Y.view(10, 4))
MASK = (TAGS >= 0).long()


def of_tags(rows=10):
    scores = MODEL(F.one_hot(TOKENS[:rows], 3).float()).detach().double()
    return float(F.cross_entropy(scores.flatten(0, 1), TAGS[:rows].flatten()))


class Samples(Dataset):
    def __len__(self):
        return len(Y)

    def __getitem__(self, i):
        return X[i], Y[i]


class Broken(Samples):
    def __getitem__(self, i):
        raise KeyError("no such image")


class Counted:
    """A data set that inherits from nothing."""

    def __len__(self):
        return len(Y)

    def __getitem__(self, i):
        if not 0 <= i < len(Y):
            raise IndexError(i)
        return X[i].numpy(), int(Y[i])


class Stream(IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        yield from zip(X[first::step], Y[first::step], strict=True)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield X[0], Y[0]


def endless_pairs():
    while True:
        yield X[:1], Y[:1]


class Labelled(Samples):
    def __getitem__(self, i):
        return {"x": X[i], "labels": Y[i]}


class Encoding(UserDict):
    """As a tokenizer's: a dict with attributes and `.to`."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device):
        self.data = {k: v.to(device) for k, v in self.data.items()}
        return self


class Graph:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


def frame():
    return pd.DataFrame(X.numpy(), columns=list("abc"), index=np.arange(40)[::-1])


def risk_of(data=(X, Y), loss=CE, model=MODEL, **settings):
    return EmpiricalRisk(model, loss, data, **settings)


def of_two_outputs(outputs, targets):
    """For a model that gives a second one in training mode."""
    first, second = outputs
    return CE(first, targets) + CE(second, targets)


def closure_risk(closure, *data, model=MODEL):
    return EmpiricalRisk(model, closure=closure, data=list(data))


def backward(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def summed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


class SparseFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = copy.deepcopy(MODEL)

    def forward(self, x):
        first, *rest = self.inner
        z = torch.sparse.mm(x, first.weight.T) + first.bias
        return nn.Sequential(*rest)(z)


def sparse(kind):
    dense = X * (X > 0)
    x = {
        "coo": dense.to_sparse_coo,
        "csr": dense.to_sparse_csr,
        "scipy": lambda: scipy.sparse.csr_matrix(dense.numpy()),
    }[kind]()
    return risk_of((x, Y), model=SparseFirst()), cross_entropy(dense)


# A call, what it is worth (by default EXPECTED), and a word of the notes.
ACCEPTED = {
    "dataset": lambda: risk_of(TensorDataset(X, Y)),
    "own dataset": lambda: risk_of(Samples()),
    "dataset by duck typing": lambda: risk_of(Counted()),
    "stream": lambda: risk_of(Stream()),
    "list of samples": lambda: risk_of(list(zip(X, Y, strict=True))),
    "list of samples with plain labels": lambda: risk_of(
        list(zip(X.numpy(), Y.tolist(), strict=True))
    ),
    "loader of dicts": lambda: risk_of(
        DataLoader(Labelled(), batch_size=7), model=ByName()
    ),
    "dict with labels": lambda: risk_of({"x": X, "labels": Y}, model=ByName()),
    "encoding with labels": lambda: risk_of([Encoding(x=X, labels=Y)], model=ByName()),
    "loss by name": lambda: risk_of(loss="cross_entropy"),
    "loss by its class's name": lambda: risk_of(loss="CrossEntropyLoss"),
    "loss with a dash": lambda: risk_of(loss="cross-entropy"),
    "loss class": lambda: risk_of(loss=nn.CrossEntropyLoss),
    "arrays": lambda: risk_of((X.numpy(), Y.numpy())),
    "float64 arrays": lambda: risk_of((X.double().numpy(), Y.numpy())),
    "float64 tensors": lambda: risk_of((X.double(), Y)),
    "whole numbers of NumPy": lambda: risk_of(chunk_size=np.int64(7), seed=np.int32(3)),
    "frame and series": lambda: risk_of((frame(), pd.Series(Y.numpy(), frame().index))),
    "closure of encodings": lambda: closure_risk(
        lambda m, b: F.cross_entropy(m(b.x), b.labels), Encoding(x=X, labels=Y)
    ),
    "closure of tensors and numbers": lambda: closure_risk(
        lambda m, b: F.cross_entropy(m(b[0][0]), b[0][1]) * b[1], ((X, Y), 1)
    ),
    "closure of objects": lambda: closure_risk(
        lambda m, b: F.cross_entropy(m(b.x), b.y), Graph(X, Y)
    ),
    "closure of two objects": lambda: closure_risk(
        lambda m, b: F.cross_entropy(m(b.x), b.y), Graph(X[:9], Y[:9]), Graph(X[9:], Y[9:])
    ),
    "logits": lambda: risk_of(model=Wrapped(lambda z: SimpleNamespace(logits=z))),
    "tuple": lambda: risk_of(model=Wrapped(lambda z: (z, z.tanh()))),
    "logits in a dict": lambda: risk_of(model=Wrapped(lambda z: {"logits": z, "a": X})),
    "out in a dict": lambda: risk_of(model=Wrapped(lambda z: {"out": z, "aux": z})),
    "int32 labels": lambda: risk_of((X, Y.int())),
    "labels in a column": lambda: risk_of((X, Y[:, None])),
    "int8 labels in a column": lambda: risk_of(
        (X.numpy(), Y.numpy().astype("i1")[:, None])
    ),
    "partial": lambda: risk_of(loss=partial(F.cross_entropy, reduction="mean")),
    "workers": lambda: risk_of(DataLoader(Samples(), batch_size=9, num_workers=2)),
    "persistent workers": lambda: risk_of(
        DataLoader(Samples(), batch_size=9, num_workers=1, persistent_workers=True)
    ),
    "stream of workers": lambda: risk_of(DataLoader(Stream(), 9, num_workers=2)),
}
TWO = nn.Sequential(MODEL, nn.LogSoftmax(1))
ACCEPTED |= {
    "sum": lambda: risk_of(loss=nn.CrossEntropyLoss(reduction="sum")),
    "a function that sums": lambda: risk_of(
        loss=lambda o, y: F.cross_entropy(o, y, reduction="sum")
    ),
    "a closure that sums": lambda: closure_risk(summed, (X, Y)),
    "a closure that sums over batches": lambda: closure_risk(
        summed, (X[:9], Y[:9]), (X[9:], Y[9:])
    ),
    "log-probabilities": lambda: risk_of(loss="nll", model=TWO),
    "log-probabilities as scores": lambda: risk_of(model=TWO),
    "targets first in a squared error": lambda: closure_risk(
        lambda m, b: (
            F.cross_entropy(m(b[0]), b[1]) + F.mse_loss(b[0], m[0](b[0])[:, :3]) * 0
        ),
        (X, Y),
    ),
}
SAID = {
    **dict.fromkeys(("sum", "a function that sums"), "the loss adds up .* over 40"),
    **dict.fromkeys(
        ("a closure that sums", "a closure that sums over batches"),
        "the closure adds up .* over 40",
    ),
    "float64 arrays": "converted to float32",
    "float64 tensors": "converted to float32",
    "logits": "`logits` are its outputs",
    "logits in a dict": "a dict: its `logits` are its outputs",
    "out in a dict": "a dict: its `out` are its outputs",
    "tuple": "first entry is its outputs",
    "int32 labels": "labels of int32 were made int64",
    "labels in a column": r"\(N, 1\) made \(N,\)",
    "loader of dicts": "`logits`",
    "dict with labels": "`logits`",
    "encoding with labels": "`logits`",
    "int8 labels in a column": r"int8 were made int64 and \(N, 1\)",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_call_as_people_write_it_has_the_value_by_hand(name):
    risk = ACCEPTED[name]()
    assert risk.value() == pytest.approx(EXPECTED, rel=1e-6)
    assert risk.num_samples == 40
    notes = " ".join(risk.notes)
    assert bool(notes) == (name in SAID), notes
    if name in SAID:
        assert re.search(SAID[name], notes)


@pytest.mark.parametrize("name", ["dataset", "logits", "closure of objects", "tuple"])
def test_derivatives_of_such_a_call_are_those_of_the_plain_one(name):
    plain, risk = risk_of(), ACCEPTED[name]()
    v = torch.randn(plain.n, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(risk.gradient(), plain.gradient(), atol=1e-6)
    assert torch.allclose(risk.hvp(v), plain.hvp(v), atol=1e-5)
    assert torch.allclose(risk.double().gradient().float(), plain.gradient(), atol=1e-6)


TAGGED = {"x": TOKENS, "attention_mask": MASK, "labels": TAGS}


@pytest.mark.parametrize("rows", [10, 4])  # of four tokens and classes: square as well
@pytest.mark.parametrize("batch", [4, 10])
def test_classes_may_come_last(rows, batch):
    parts = [
        {k: v[i : i + batch] for k, v in TAGGED.items()} for i in range(0, rows, batch)
    ]
    risk = risk_of(
        [{k: v[:rows] for k, v in part.items()} for part in parts], model=Tagger()
    )
    assert risk.value() == pytest.approx(of_tags(risk.num_samples), rel=1e-6)
    assert "classes last" in risk.notes[0]


def test_classes_of_a_plain_tensor_may_come_last():
    risk = risk_of((TOKENS[:, :3], TAGS[:, :3]), model=Tagger(named=False))
    assert risk.value() == pytest.approx(of_tags(), rel=1e-6)
    assert risk.notes == ["the last dimension of the outputs was taken as that of classes"]
    assert 0 <= risk.accuracy() <= 1


@pytest.mark.parametrize("kind", ["coo", "csr", "scipy"])
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:Sparse invariant")
def test_sparse_inputs_have_the_value_and_gradient_of_dense_ones(kind):
    risk, expected = sparse(kind)
    assert risk.value() == pytest.approx(expected, rel=1e-6)
    plain = risk_of((X * (X > 0), Y))
    assert torch.allclose(risk.gradient(), plain.gradient(), atol=1e-6)
    found, expected = (sh.eigenpairs(r).eigenvalues for r in (risk, plain))
    assert torch.allclose(found, expected, rtol=1e-3)


def test_whole_numbers_of_numpy_are_taken_everywhere():
    risk = risk_of()
    found = sh.eigenpairs(risk, k=np.int64(2), seed=np.int32(0), max_hvps=np.int64(40))
    assert torch.allclose(found.eigenvalues, sh.eigenpairs(risk, 2).eigenvalues)
    assert sh.trace(risk, seed=np.uint8(1)).value == sh.trace(risk, seed=1).value


def test_measures_may_be_named_in_one_string():
    found = sh.summary(risk_of(), measures="norms, trace")
    assert set(found.results) == {"norms", "trace"}


def test_a_state_dict_stands_for_a_flat_theta():
    other = copy.deepcopy(MODEL)
    nn.init.normal_(other[0].weight, generator=torch.Generator().manual_seed(4))
    risk, theta = risk_of(), torch.cat([p.detach().flatten() for p in other.parameters()])
    assert risk.value(other.state_dict()) == risk.value(theta)
    assert torch.equal(risk.gradient(other.state_dict()), risk.gradient(theta))
    found = sh.norms(risk, start=other.state_dict())
    assert found.distance_from_start == sh.norms(risk, start=theta).distance_from_start
    lines = (
        sh.interpolation(risk, to, alphas=(0.5,)) for to in (theta, other.state_dict())
    )
    assert len({float(line.values[0]) for line in lines}) == 1


def test_the_notes_of_a_risk_stand_beside_each_number(tmp_path):
    risk = risk_of((X, Y.int()))
    (note,) = risk.notes
    found = sh.norms(risk)
    found.save(tmp_path / "norms")
    several = sh.worst_case_sharpness(risk, rho=[0.01, 0.02])
    for each in (found, sh.load_result(tmp_path / "norms"), several):
        assert str(each).splitlines()[-1] == f"note: {note}"
        assert str(each).count(note) == each._repr_html_().count(note) == 1
    everything = sh.summary(risk, "norms,trace")
    for text in (str(everything), everything.table(), everything._repr_html_()):
        assert text.count(note) == 1
    assert "note" not in str(sh.norms(risk_of()))


NOTED = {
    "scores for log-probabilities": (lambda: risk_of(loss=nn.NLLLoss()), "LogSoftmax"),
    "the same in a closure": (
        lambda: closure_risk(lambda m, b: F.nll_loss(m(b[0]), b[1]), (X, Y)),
        "do not look like log-probabilities",
    ),
    "probabilities for scores": (
        lambda: risk_of(model=nn.Sequential(MODEL, nn.Softmax(1))),
        "look like probabilities",
    ),
    "probabilities for their logarithms": (
        lambda: risk_of((X, X.softmax(1)), "kl_div", nn.Sequential(ONE, nn.Sigmoid())),
        "log-probabilities.*kl_div",
    ),
    "a constant closure": (
        lambda: closure_risk(lambda m, b: b.square().mean(), X),
        "no gradient reaches the parameters",
    ),
    "a closure of another model": (
        lambda: closure_risk(lambda m, b: ONE(b).square().mean(), X),
        "no gradient reaches the parameters",
    ),
    "a loss without a gradient": (
        lambda: risk_of(loss=lambda o, y: (o.argmax(1) != y).double().mean()),
        "no gradient reaches the parameters",
    ),
}


@pytest.mark.parametrize("name", NOTED)
@pytest.mark.filterwarnings("ignore:reduction")
def test_what_may_not_be_meant_is_noted_beside_the_number(name):
    call, expected = NOTED[name]
    risk = call()
    (note,) = risk.notes
    assert re.search(expected, note)
    assert note in str(sh.norms(risk))


def masked(model, batch):
    x, kept = batch
    return (model(x).square().sum(1) * kept).sum() / kept.sum()


KEPT = (torch.arange(40) % 5 > 0).float()


@pytest.mark.parametrize(
    "given",
    [
        [(X[:20], KEPT[:20]), (X[20:], (torch.arange(20) > 9).float())],
        [(X[:20], torch.ones(20)), (X[20:], torch.full((20,), 2.0))],
        [(X[:20], torch.ones(20)), (X[20:], torch.cat([torch.ones(19), torch.zeros(1)]))],
    ],
    ids=["rows", "batches", "one row"],
)
def test_a_closure_that_is_no_mean_is_noted_wherever_that_shows(given):
    risk = closure_risk(masked, *given)
    assert "2 batches as given" in " ".join(risk.notes)
    weighed = EmpiricalRisk(
        MODEL, closure=masked, data=given, terms=lambda b: float(b[1].sum())
    )
    assert not weighed.notes
    whole = tuple(map(torch.cat, zip(*given, strict=True)))
    assert weighed.value() == pytest.approx(closure_risk(masked, whole).value(), rel=1e-6)


def test_a_closure_that_sums_may_have_terms():
    risk = EmpiricalRisk(
        MODEL,
        closure=summed,
        data=[(X[:9], Y[:9]), (X[9:], Y[9:])],
        terms=lambda b: 2.0 * len(b[1]),
    )
    assert risk.value() == pytest.approx(EXPECTED / 2, rel=1e-6)


# -- one line ----------------------------------------------------------------------------


def with_wrong(value, rows):
    x = X.clone()
    x[rows, 1] = value
    return x


def quantised():
    layer = nn.Linear(3, 4)
    layer.register_buffer("packed", torch.zeros(3, dtype=torch.int8))
    return layer


BCE = nn.BCEWithLogitsLoss()
IMAGES = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
CONV = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
DETECTED = (lambda m, b: sum(m(b["x"], b["y"]).values()), {"x": X, "y": Y})
REFUSED = {
    "float labels": (lambda: risk_of((X, Y.float())), "class numbers.*float32.*long"),
    "labels that are missing": (
        lambda: risk_of((X, torch.where(Y > 0, Y, math.nan))),
        "NaN among the targets",
    ),
    "outputs of training mode": (
        lambda: risk_of(loss=of_two_outputs),
        "in evaluation mode.*values to unpack",
    ),
    "a scripted network": (lambda: risk_of(model=torch.jit.script(MODEL)), "TorchScript"),
    "labels from 1": (lambda: risk_of((X, Y + 1)), r"labels in \[0, 4\).*got 4 .*10 of 40"),
    "negative labels": (lambda: risk_of((X, Y - 1)), "got -1"),
    "narrow inputs": (lambda: risk_of((X[:, :2], Y)), r"fit the model; got .*\(16|40, 2\)"),
    "flat images": (lambda: risk_of((X, Y), model=CONV), "fit the model"),
    "bytes": (lambda: risk_of((IMAGES, Y[:6]), model=CONV), r"uint8.*x.float\(\) / 255"),
    "bce shapes": (
        lambda: risk_of((X, (Y % 2).float()), BCE, ONE),
        r"\(40, 1\).*\(40,\).*broadcast",
    ),
    "bce of whole numbers": (lambda: risk_of((X, Y[:, None] % 2), BCE, ONE), "y.float"),
    "tokens as their own labels": (
        lambda: risk_of({"x": TOKENS, "labels": TOKENS}, model=Tagger()),
        r"the same tokens.*closure=lambda",
    ),
    "sequence of scores": (
        lambda: risk_of((X, Y[:, None].expand(40, 7)), model=MODEL),
        "a class for each row",
    ),
    "scores of a language model": (
        lambda: risk_of((Y.view(5, 8), Y.view(5, 8)), model=nn.Embedding(9, 50)),
        "the same tokens.*Shift them",
    ),
    "scores of an image for a class": (
        lambda: risk_of((X.view(40, 3, 1), Y), model=nn.Conv1d(3, 4, 1)),
        r"\(N, C, ...\); got outputs float32 of shape \(40|16, 4, 1\)",
    ),
    "scores for probabilities": (
        lambda: risk_of((9 * X, (Y[:, None] % 2).float()), nn.BCELoss(), ONE),
        "probabilities.*bce_with_logits",
    ),
    "three weights for four classes": (
        lambda: risk_of(loss=nn.CrossEntropyLoss(weight=torch.ones(3))),
        "a weight for each class",
    ),
    "a class for a model": (lambda: risk_of(model=nn.Linear), "got the class Linear"),
    "floats into an embedding": (
        lambda: risk_of((X, Y), model=nn.Sequential(nn.Embedding(5, 4), nn.Flatten())),
        "whole numbers",
    ),
    "tokens out of range": (
        lambda: risk_of((Y + 3, Y), model=nn.Embedding(5, 4)),
        "tokens below the size",
    ),
    "two inputs for one": (lambda: risk_of(((X, X), Y)), "model's inputs"),
    "tensor as a model": (lambda: risk_of(model=MODEL(X)), "got Tensor"),
    "risk's outputs as a model": (lambda: risk_of(model=risk_of().outputs()), "got Tensor"),
    "risk as a model": (lambda: risk_of(model=risk_of()), "got EmpiricalRisk"),
    "loss first": (lambda: EmpiricalRisk(CE, MODEL, (X, Y)), "order is EmpiricalRisk"),
    "loss last": (lambda: EmpiricalRisk(MODEL, (X, Y), CE), "order is EmpiricalRisk"),
    "data first": (lambda: EmpiricalRisk((X, Y), MODEL, CE), "order is EmpiricalRisk"),
    "a loss value": (lambda: risk_of(loss=torch.ones(())), "function of"),
    "unknown loss": (lambda: risk_of(loss="crossentropi"), "Did you mean crossentropy"),
    "a loss class with arguments": (
        lambda: risk_of(loss=nn.AdaptiveLogSoftmaxWithLoss),
        "needs arguments",
    ),
    "measure of a model": (lambda: sh.eigenpairs(MODEL, CE, (X, Y)), "EmpiricalRisk.model"),
    "summary of a model": (lambda: sh.summary(MODEL), "EmpiricalRisk.model"),
    "no such measure": (
        lambda: sh.summary(risk_of(), measures="norms,lambda_mx"),
        r"got 'lambda_mx'. Did you mean lambda_max\?",
    ),
    "three in a tuple": (lambda: risk_of((X, X, Y)), r"Several inputs: \(\(a, b\)"),
    "three in a batch": (lambda: risk_of([(X, X, Y)]), r"tuple \(3\)"),
    "several targets": (lambda: risk_of((X, (Y, X))), "'targets' of type tuple.*closure"),
    "targets in a list": (lambda: risk_of([(X, [Y, [1]])]), "'targets' of type list"),
    "targets in a dict": (lambda: risk_of((X, {"y": Y})), "'targets' of type dict"),
    "weights of samples": (
        lambda: risk_of(DataLoader(TensorDataset(X, Y, X[:, 0]), 8)),
        r"list \(3\).*Weights.*closure=lambda",
    ),
    "a dict without labels": (
        lambda: risk_of([{"x": X, "z": Y}]),
        "dict of x, z.*'labels'",
    ),
    "words beside numbers": (
        lambda: risk_of({"x": X, "text": ["a"] * 40, "labels": Y}),
        "words in 'text'",
    ),
    "single samples": (
        lambda: risk_of(DataLoader(TensorDataset(X, Y), batch_size=None)),
        "single samples.*`batch_size`",
    ),
    "single samples in dicts": (
        lambda: risk_of({"x": x, "labels": int(y)} for x, y in zip(X, Y, strict=True)),
        "single samples.*`batch_size`",
    ),
    "a loss of three": (lambda: risk_of(loss=nn.GaussianNLLLoss()), "input, target, var"),
    "a class of such a loss": (
        lambda: risk_of(loss=nn.TripletMarginLoss),
        "TripletMarginLoss, which takes.*closure=lambda",
    ),
    "a loss of sequences": (
        lambda: risk_of([(X, (Y, Y, Y))], nn.CTCLoss()),
        "CTCLoss, which takes.*closure=lambda",
    ),
    "a function of one": (lambda: risk_of(loss=lambda z: z.sum()), r"takes \(z\)"),
    "swapped arguments": (
        lambda: risk_of(loss=lambda y, o: F.cross_entropy(o, y)),
        "`loss` must give cross_entropy the outputs first.*Swap",
    ),
    "swapped values": (
        lambda: risk_of(
            (X, Y[:, None] % 2.0),
            lambda y, o: F.binary_cross_entropy_with_logits(o, y),
            ONE,
        ),
        "the outputs first.*Swap",
    ),
    "swapped in a closure": (
        lambda: closure_risk(lambda m, b: F.cross_entropy(b[1], m(b[0])), (X, Y)),
        "`closure` must give cross_entropy the outputs first.*Swap",
    ),
    "one column": (lambda: risk_of((X, 0 * Y), model=ONE), "one column.*bce_with_logits"),
    "one column in a closure": (
        lambda: closure_risk(
            lambda m, b: F.cross_entropy(m(b), 0 * Y[: len(b)]), X, model=ONE
        ),
        "`closure` must give.*one column",
    ),
    "plain numbers": (lambda: risk_of((X.tolist(), Y.tolist())), r"torch.tensor\(values\)"),
    "one-hot numbers": (
        lambda: risk_of((X, F.one_hot(Y, 4))),
        r"class numbers or probabilities.*y.argmax\(1\)",
    ),
    "targets first": (lambda: risk_of((Y, X)), r"\(inputs, targets\).*Swap them"),
    "a closure as a loss": (
        lambda: risk_of(loss=lambda m, b: F.cross_entropy(m(b[0]), b[1])),
        "`loss` must take outputs.*not callable.*`closure=`",
    ),
    "a loss that is a number": (
        lambda: risk_of(loss=lambda o, y: F.cross_entropy(o, y).item()),
        "as a tensor; got float",
    ),
    "a loss in a dict": (
        lambda: risk_of(loss=lambda o, y: {"loss": F.cross_entropy(o, y)}),
        "as a tensor; got dict",
    ),
    "a closure of one": (
        lambda: closure_risk(lambda m: m[0].weight.sum(), X),
        r"\(model, batch\); got <lambda>, which takes \(m\)",
    ),
    "a closure the wrong way round": (
        lambda: closure_risk(lambda b, m: F.cross_entropy(m(b[0]), b[1]), (X, Y)),
        r"closure\(model, batch\) on a tuple \(2\).*not callable",
    ),
    "a closure that goes backward": (
        lambda: closure_risk(backward, (X, Y)),
        "Take `backward` out",
    ),
    "a closure of other names": (
        lambda: closure_risk(lambda m, b: m(b["y"]).sum(), {"x": X, "labels": Y}),
        "on a dict of x, labels; got KeyError: 'y'",
    ),
    "a closure on narrow data": (
        lambda: closure_risk(lambda m, b: m(b).sum(), X[:, :2]),
        "on a Tensor .*cannot be multiplied",
    ),
    "a closure on double data": (
        lambda: closure_risk(lambda m, b: m(b).sum(), X.double()),
        "got RuntimeError: .*dtype",
    ),
    "a closure with labels out of range": (
        lambda: closure_risk(lambda m, b: F.cross_entropy(m(b[0]), b[1]), (X, Y + 1)),
        "Target 4 is out of bounds",
    ),
    "a closure of a tensor's rows": (
        lambda: EmpiricalRisk(MODEL, closure=lambda m, b: m(b).sum(), data=X),
        r"Wrap it in a list: `data=\[x\]`",
    ),
    "a closure of nothing": (
        lambda: closure_risk(lambda m, b: m[0].weight.square().sum(), None),
        r"data=\[torch.ones\(1\)\]",
    ),
    "a closure of an object": (
        lambda: closure_risk(lambda m, b: m(b[0], b[1]), (X, Y), model=ByName()),
        "got SimpleNamespace",
    ),
    "lone tensor": (lambda: risk_of(X), "Tensor .*alone"),
    "lone array": (lambda: risk_of(X.numpy()), "ndarray .*alone"),
    "lone frame": (lambda: risk_of(frame()), "DataFrame .*alone"),
    "words": (lambda: risk_of((X, pd.Series(["a"] * 40))), "numbers; got Series"),
    "all frozen": (
        lambda: risk_of(model=copy.deepcopy(MODEL).requires_grad_(False)),
        "requires_grad",
    ),
    "no cuda": (lambda: risk_of(device="cuda"), "'cuda'.*'cpu'"),
    "no such device": (lambda: risk_of(device="gpu"), "'gpu'"),
    "an error in a worker": (
        lambda: risk_of(DataLoader(Broken(), 8, num_workers=1)),
        "KeyError: 'no such image' in a worker.*num_workers=0",
    ),
    "samples of several lengths": (
        lambda: risk_of([(X[i, : 1 + i % 3], int(Y[i])) for i in range(9)]),
        "samples of one shape.*Pad",
    ),
    "pictures": (lambda: risk_of([(object(), 1)] * 3), "got <class 'object'>. Transform"),
    "nan": (
        lambda: risk_of((with_wrong(np.nan, [3, 5]), Y)),
        r"2 of 40 rows \(3, 5\)",
    ),
    "infinite": (lambda: risk_of((with_wrong(np.inf, [7]), Y)), r"1 of 40 rows \(7\)"),
    "nan targets": (
        lambda: risk_of((X, with_wrong(np.nan, [0, 1, 2, 9])[:, 1:2]), "mse", ONE),
        r"4 of 40 rows \(0, 1, 2, …\)",
    ),
    "int8": (lambda: risk_of(model=quantised()), "quantised"),
    "dynamically quantised": (
        lambda: risk_of(model=torch.ao.quantization.quantize_dynamic(MODEL, {nn.Linear})),
        "quantised",
    ),
    "a loss in training mode": (
        lambda: closure_risk(DETECTED[0], DETECTED[1], model=Detector()).value(),
        "evaluation mode",
    ),
    "a list of outputs": (lambda: risk_of(model=Detector()), "outputs as a tensor"),
    "a closure of a dict": (
        lambda: closure_risk(lambda m, b: {"loss": m(b).sum()}, X).value(),
        "got dict",
    ),
    "theta of another network": (
        lambda: risk_of().value(ONE.state_dict()),
        "hold `0.weight`",
    ),
}
CAUSED = {
    "a loss of three",
    "swapped arguments",
    "swapped in a closure",
    "float labels",
    "narrow inputs",
    "bytes",
    "a loss in training mode",
    "no cuda",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize")
def test_a_wrong_call_is_one_line(name):
    if name == "no cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is there")
    call, expected = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=expected) as caught:
        call()
    line = str(caught.value)
    assert line.startswith("`")
    assert "\n" not in line
    assert len(line) <= 200, line
    if name in CAUSED:
        assert isinstance(caught.value.__cause__, Exception)


def test_an_error_of_ones_own_stays_as_it_is():
    def broken(outputs):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        risk_of(model=Wrapped(broken))
    with pytest.raises(RuntimeError, match=r"^mine$"):
        closure_risk(lambda m, b: broken(b), X).value()


def test_values_that_are_masked_may_be_nan():
    model = Wrapped(lambda z: z)
    model.inner.insert(0, SimpleModule(torch.nan_to_num))
    risk = risk_of((with_wrong(np.nan, [3]), Y), model=model)
    assert risk.value() == pytest.approx(cross_entropy(with_wrong(0.0, [3])), rel=1e-6)


class SimpleModule(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_data_beyond_half_of_the_free_memory_are_refused_before_it_is_full(monkeypatch):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield X, Y

    monkeypatch.setattr(memory, "free_bytes", lambda _: 20_000)
    with pytest.raises(ValueError, match=r"half of the free memory.*num_samples="):
        risk_of(endless())
    each = X.nbytes + Y.nbytes + 2 * batches._OF_A_TENSOR
    assert len(taken) == 10_000 // each + 1


@pytest.mark.parametrize("data", [Endless(), endless_pairs(), DataLoader(Endless(), 1)])
def test_data_without_an_end_say_what_is_waited_for(data, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2_000_000)
    with pytest.raises(ValueError, match=r"half of the free memory.*num_samples="):
        risk_of(data)
    first = capsys.readouterr().err.splitlines()[0]
    assert re.search(r"^sharpness: 64 batches read, .*no known end, `num_samples=`", first)


def test_data_with_an_end_say_nothing(capsys):
    risk_of(DataLoader(TensorDataset(*(part.repeat_interleave(2, 0) for part in (X, Y)))))
    assert not capsys.readouterr().err


def test_batches_that_are_joined_for_batchnorm_are_told():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).eval()
    loader = DataLoader(TensorDataset(X, Y), batch_size=9)
    joined = risk_of(loader, model=model, batchnorm="batch", batchnorm_batch=20)
    (note,) = joined.notes
    assert (
        "the 5 batches given were joined and cut for BatchNorm, into 2 of up to 20" in note
    )
    plain = risk_of(model=model, batchnorm="batch", batchnorm_batch=20)
    assert plain.value() == joined.value()
    assert not plain.notes
    assert not risk_of(loader, batchnorm="batch").notes


def test_regression_is_told_that_there_is_no_threshold():
    found = sh.summary(risk_of((X, X[:, :1]), "mse", ONE), "norms")
    assert "no threshold" in str(found)
    assert "threshold" not in str(sh.summary(risk_of(), "norms"))


# -- files -------------------------------------------------------------------------------


def table(**columns):
    return pd.DataFrame(X.numpy(), columns=list("abc")).assign(**columns)


def npz(folder):
    np.savez(folder / "d.npz", x=X.numpy(), y=Y.numpy())
    return folder / "d.npz"


def csv(folder, **columns):
    path = folder / "d.csv"
    table(**(columns or {"label": Y.numpy()})).to_csv(path, index=False)
    return path


def parquet(folder):
    pytest.importorskip("pyarrow")
    table(first=Y.numpy()).to_parquet(folder / "d.parquet")
    return folder / "d.parquet"


def saved_set(folder, monkeypatch):
    """A folder of `datasets`, or of a stand-in where that is not installed."""
    rows = [{"x": x.tolist(), "labels": int(y)} for x, y in zip(X, Y, strict=True)]
    try:
        import datasets
    except ModuleNotFoundError:
        (folder / "dataset_info.json").write_text("{}")
        stored = SimpleNamespace(with_format={"torch": Labelled()}.get)
        monkeypatch.setitem(
            sys.modules, "datasets", SimpleNamespace(load_from_disk=lambda _: stored)
        )
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("written", [npz, csv, parquet])
@pytest.mark.parametrize("rows", [7, 4096])
def test_a_file_is_data(tmp_path, written, rows, monkeypatch):
    monkeypatch.setattr(files, "_ROWS_AT_ONCE", rows)
    path = written(tmp_path)
    for name in (path, str(path)):
        risk = risk_of(name)
        assert risk.value() == pytest.approx(EXPECTED, rel=1e-6)
        assert torch.equal(risk.targets, Y)
    assert any("targets: column" in n for n in risk.notes) == (path.suffix != ".npz")


def test_a_data_set_on_disk_is_data(tmp_path, monkeypatch):
    risk = risk_of(saved_set(tmp_path, monkeypatch), model=ByName())
    assert risk.value() == pytest.approx(EXPECTED, rel=1e-6)
    assert risk.num_samples == 40


def test_the_targets_of_a_table_may_be_named(tmp_path):
    path = csv(tmp_path, price=X[:, 0].numpy() * 2, label=Y.numpy())
    model = nn.Linear(4, 1)
    risk = risk_of(f"{path}?target=price", "mse", model)
    inputs = torch.cat([X, Y[:, None].float()], 1)
    expected = float((model(inputs).detach() - 2 * X[:, :1]).square().mean())
    assert risk.value() == pytest.approx(expected, rel=1e-5)
    assert risk.notes[0] == "targets: column 'price' of d.csv"


BAD_FILES = {
    "no such column": (
        lambda p: f"{csv(p)}?target=gone",
        "no column 'gone'.*a, b, c, label",
    ),
    "words": (lambda p: csv(p, name=["a"] * 40, y=Y.numpy()), "words in name"),
    "words as targets": (lambda p: csv(p, y=["a"] * 40), "numbers as targets"),
    "no file": (lambda p: p / "gone.csv", "no such file"),
    "another file": (lambda p: p / "notes.doc", ".csv or .parquet"),
    "a folder": (lambda p: p, ".csv or .parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path, name):
    make, expected = BAD_FILES[name]
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as caught:
        risk_of(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_num_samples_reads_no_more_of_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_ROWS_AT_ONCE", 8)
    monkeypatch.setattr(batches, "_OF_A_TENSOR", 0)
    path = csv(tmp_path)
    monkeypatch.setattr(
        memory, "free_bytes", lambda _: 2 * 32 * 20
    )  # bytes of twenty rows, twice
    with pytest.raises(ValueError, match="half of the free memory"):
        risk_of(path, num_samples=40)
    risk = risk_of(path, num_samples=12, chunk_size=12)
    assert torch.equal(risk.targets, Y[:12])


@pytest.mark.parametrize("written", [npz, csv])
def test_a_file_beyond_half_of_the_free_memory_is_refused(tmp_path, written, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 900)
    with pytest.raises(ValueError, match=r"half of the free memory.*num_samples="):
        risk_of(path)


def test_workers_end(tmp_path):
    code = """
import torch, sharpness as sh, multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset
if __name__ == "__main__":
    data = TensorDataset(torch.randn(40, 3), torch.arange(40) % 4)
    model = torch.nn.Linear(3, 4)
    for persistent in (False, True):
        loader = DataLoader(data, 8, num_workers=1, persistent_workers=persistent)
        sh.EmpiricalRisk(model, "cross_entropy", loader, num_samples=9)
        del loader  # the persistent ones are its own
    print(len(mp.active_children()))
"""
    (tmp_path / "run.py").write_text(code)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert run.stdout.strip() == "0", run.stderr
