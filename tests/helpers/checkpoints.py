"""A user's folder: networks and data of their own, and checkpoints."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from torch import nn

CODE = """
import collections, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class ResNet(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width)
        self.conv, self.head = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 3)
    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(x + self.conv(x)).mean((2, 3)))

class Transformer(nn.Module):
    def __init__(self, width=4, heads=2):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True)
        self.embed, self.head = nn.Embedding(7, width), nn.Linear(width, 3)
    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens)).mean(1))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(2, 3)
    def forward(self, a, b):
        return self.first(a) + torch.tanh(self.second(b))

def mlp(width=6, outputs=3):
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, outputs))
wide_floats = lambda: mlp(4).double()
lazy = lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 3))

def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
points = lambda num=30, seed=0: (normal(num, 5, seed=seed), torch.arange(num) % 3)
images = lambda: (normal(20, 1, 6, 6), torch.arange(20) % 3)
words = lambda: (torch.arange(100).view(20, 5).remainder(7), torch.arange(20) % 3)
regression = lambda: (normal(30, 5), normal(30, 2, seed=1))
named = lambda: ({"a": normal(30, 5), "b": normal(30, 2, seed=1)}, torch.arange(30) % 3)
mapped = lambda: (collections.UserDict(named()[0]), named()[1])
several = lambda: (tuple(named()[0].values()), named()[1])
tokens = lambda x: {"input_ids": x, "attention_mask": x > 0}
sentences = lambda: (tokens(words()[0]), words()[1])
splits = lambda: {"train": points(), "test": points(13, 1)}
rare = lambda: torch.cat([torch.arange(3), torch.zeros(9_998, dtype=torch.long)])
unbalanced_test = lambda: {"train": points(), "test": (normal(10_001, 5), rare())}
rows = lambda pair, *ends: [(pair[0][i:j], pair[1][i:j]) for i, j in zip((0, *ends), ends)]
batches = lambda: rows(points(), 7, 28, 30)
two_batches = lambda: rows(points(), 20, 30)
loader = lambda: DataLoader(TensorDataset(*points()), batch_size=8)
some = lambda i: {k: v[i:i + 8] for k, v in named()[0].items()}
loader_of_dicts = lambda: [(some(i), named()[1][i:i + 8]) for i in range(0, 30, 8)]
uneven = lambda: (normal(30, 5), points(29)[1])
shifted = lambda x, y: [(x[:10], y[:9]), (x[10:], y[9:])]
uneven_batch = lambda: shifted(*points())
uneven_second = lambda: ({"a": normal(30, 5), "b": normal(29, 2)}, points()[1])
number, empty, constant, received = lambda: 3, list, 4, []
leaving = lambda: sys.exit("goodbye")

def raising(**arguments):
    raise RuntimeError("no luck today\\nand tomorrow")

def echo(**arguments):
    received.append(arguments)
    return mlp()
"""


@contextmanager
def user_folder(tmp_path, monkeypatch, more=""):
    """A user's folder, with `nets.py` in it, as the current one."""
    (tmp_path / "nets.py").write_text(CODE + more)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    spec = importlib.util.spec_from_file_location("nets", tmp_path / "nets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def called(model, inputs):
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def by_hand(model, pair):
    """The mean loss, in the precision of the model."""
    outputs, y = called(model, pair[0]), pair[1]
    if y.is_floating_point():
        return (outputs - y).square().mean()
    return -outputs.log_softmax(1)[torch.arange(len(y)), y].mean()


def trained(model, pair):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        by_hand(model, pair).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def saved(model, path="net.pt"):
    torch.save(model.state_dict(), path)
    return path


class Attack:
    def __reduce__(self):
        return os.system, ("touch executed",)


def widened(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: widened(v) for k, v in value.items()}
    return tuple(widened(v) for v in value)


def dense_top(model, pair, loss=None):
    wide, (x, y) = deepcopy(model).double(), widened(pair)
    shapes = [(name, p.shape) for name, p in wide.named_parameters()]

    def value(theta):
        parts = theta.split([shape.numel() for _, shape in shapes])
        state = {n: p.view(s) for (n, s), p in zip(shapes, parts, strict=True)}
        outputs = torch.func.functional_call(wide, state, (x,))
        return (loss or nn.CrossEntropyLoss())(outputs, y)

    theta = torch.cat([p.detach().flatten() for p in wide.parameters()])
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(value, theta))[-1])


def write_npz(path="d.npz", **arrays):
    np.savez(path, **arrays)
    return str(path)
