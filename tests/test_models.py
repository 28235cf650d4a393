"""Kinds of models, wrappers, types and data that people bring, each left as it was.

The oracle is first-order autograd on a copy of the model, and fourth-order differences of
its gradients.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from problems import (
    assert_near,
    differenced_hvp,
    directions,
    filled,
    generator,
    normal,
)
from test_risk_untouched import assert_same, assert_states, fingerprint, random_states
from torch import nn
from torch.nn.utils import parametrizations

from sharpness import EmpiricalRisk

DIFFERENCED = 1e-8  # fourth-order differences of float64 gradients
ROUNDING = 1e-12  # the same sum in another order, in float64


def everything(model):
    """What must come back, with buffers that no checkpoint has and global switches."""
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    return {
        "buffers": {k: b.clone() for k, b in model.named_buffers()},
        "attributes": {
            (name, key): value.detach().clone()
            for name, m in model.named_modules()
            for key, value in vars(m).items()
            if isinstance(value, torch.Tensor)
        },
        "switches": [
            torch.backends.cudnn.enabled,
            torch.backends.cuda.cudnn_sdp_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.mha.get_fastpath_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            [config.to_dict() for config in configs],
        ],
    }


@contextmanager
def untouched(model):
    model_before, rest, generators = fingerprint(model), everything(model), random_states()
    yield
    assert_same(model_before, fingerprint(model))
    assert_states(generators, random_states())
    after = everything(model)
    assert after["switches"] == rest["switches"]
    for kind in ("buffers", "attributes"):
        assert after[kind].keys() == rest[kind].keys()
        for name, tensor in rest[kind].items():
            assert torch.equal(after[kind][name], tensor), name


def oracle(model, objective):
    """theta -> value, and theta -> gradient, of a copy in evaluation mode."""
    other = copy.deepcopy(model).eval()
    leaves = [p for p in other.parameters() if p.requires_grad]

    def value(theta):
        nn.utils.vector_to_parameters(theta, leaves)
        return objective(other)

    def gradient(theta):
        slopes = torch.autograd.grad(value(theta), leaves, allow_unused=True)
        pairs = zip(slopes, leaves, strict=True)
        return torch.cat([(0 * p if g is None else g).flatten() for g, p in pairs])

    return value, lambda theta: gradient(theta).detach()


def differenced(gradient, theta, v, step=0.01):
    """H v by steps of a hundredth of the usual, which do not cross the kinks of a max."""
    near = lambda there: gradient(theta + step * (there - theta)) / step
    return differenced_hvp(near, theta, v)


def assert_right(risk, model, objective, rtol=DIFFERENCED):
    """Value, gradient and products, one by one and in a block, are the oracle's."""
    value, gradient = oracle(model, objective)
    theta, v = risk.theta.clone(), directions(2, risk.n)
    with untouched(model):
        here, slope = risk.value_and_gradient()
        alone, block = risk.hvp(v[0]), risk.hvp(v)
        evaluated = risk.value()
    expected = float(value(theta).detach())
    assert here == pytest.approx(expected, rel=ROUNDING)
    assert evaluated == pytest.approx(expected, rel=ROUNDING)
    assert_near(slope, gradient(theta), ROUNDING)
    assert_near(alone, block[0], ROUNDING)
    for row, product in zip(v, block, strict=True):
        assert_near(product, differenced(gradient, theta, row), rtol)
    assert risk.settings()["engine"]["engine"] == "kept_graph"


def assert_network_is_right(layers, inputs, *, training=True, **settings):
    """The network under a mean squared error to random targets, in chunks of two."""
    model = filled(layers.double(), generator(0)).train(training)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        shape = copy.deepcopy(model).eval()(*inputs).shape
    y = normal(generator(1), *shape)
    settings = {"chunk_size": 2, **settings}
    with untouched(model):
        risk = EmpiricalRisk(model, nn.MSELoss(), (inputs, y), **settings)
    assert_right(risk, model, lambda network: ((network(*inputs) - y) ** 2).mean())


class Applied(nn.Module):
    """A forward pass given as `function(module, *inputs)` over named layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def vectors(*shape):
    return normal(generator(2), *(shape or (5, 4)))


def images():
    return vectors(5, 2, 6, 6)


def sequences():
    return vectors(5, 3, 4)


def tokens():
    return torch.tensor([[1, 2, 0], [3, 3, 4], [0, 0, 1], [4, 1, 0], [2, 2, 2]])


# -- layers ------------------------------------------------------------------------------

ACTIVATIONS = {
    "PReLU": lambda: nn.PReLU(),
    "PReLU of channels": lambda: nn.PReLU(6),
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "LeakyReLU in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "RReLU": lambda: nn.RReLU(),
    "Softplus": lambda: nn.Softplus(beta=2, threshold=1),
    "GELU": lambda: nn.GELU(),
    "GELU by tanh": lambda: nn.GELU("tanh"),
    "SiLU": lambda: nn.SiLU(),
    "Mish": lambda: nn.Mish(),
    "ELU in place": lambda: nn.ELU(inplace=True),
    "SELU": lambda: nn.SELU(),
    "Hardswish": lambda: nn.Hardswish(),
    "LogSigmoid": lambda: nn.LogSigmoid(),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "Dropout in place": lambda: nn.Dropout(0.5, inplace=True),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
}
IMAGE_LAYERS = {
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2),
    "grouped convolution": lambda: nn.Conv2d(4, 4, 3, groups=2, dilation=2),
    "reflected padding": lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True),
    "InstanceNorm with averages": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "LayerNorm": lambda: nn.LayerNorm((4, 6, 6)),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2, alpha=0.1),
    "Dropout2d": lambda: nn.Dropout2d(0.5),
    "MaxPool": lambda: nn.MaxPool2d(3, 2, padding=1),
    "AvgPool": lambda: nn.AvgPool2d(4, 3, ceil_mode=True),
    "AdaptiveAvgPool": lambda: nn.AdaptiveAvgPool2d(4),
    "AdaptiveMaxPool": lambda: nn.AdaptiveMaxPool2d(2),
    "LPPool": lambda: nn.LPPool2d(2, 2),
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample((7, 9), mode="bilinear"),
    "bicubic": lambda: nn.Upsample((4, 4), mode="bicubic", align_corners=True),
    "channels last": lambda: nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last),
}


def half_reused(m, x):
    return m.layer(torch.tanh(m.layer(x))) + x @ m.layer.weight


def solved(m, x):
    matrix = m.layer.weight @ m.layer.weight.T + torch.eye(4).double()
    return torch.linalg.solve(matrix, x.T).T


def written_in_place(m, x):
    z = m.layer(x)
    z[:, 1:3] *= x[:, :1]
    return z.sin_()


def cholesky_and_determinant(m, x):
    matrix = m.layer.weight @ m.layer.weight.T + torch.eye(4).double()
    return torch.linalg.cholesky(matrix) @ x.T + torch.logdet(matrix)


def linear():
    return nn.Linear(4, 4)


def number(value=0.0):
    return nn.Parameter(torch.tensor(value))


OTHERS = {
    "a parameter used twice": (lambda: Applied(half_reused, layer=linear()), vectors),
    "linalg.solve": (lambda: Applied(solved, layer=linear()), vectors),
    "written in place": (lambda: Applied(written_in_place, layer=linear()), vectors),
    "einsum": (
        lambda: Applied(
            lambda m, x: torch.einsum("ni,ijk,nj->nk", x, m.cube, torch.tanh(x * m.scale)),
            cube=nn.Parameter(torch.zeros(4, 4, 3)),
            scale=number(),
        ),
        vectors,
    ),
    "a parameter without entries": (
        lambda: Applied(lambda m, x: m.layer(x) ** 2, layer=linear(), none=nn.Parameter()),
        vectors,
    ),
    "interpolate": (
        lambda: Applied(
            lambda m, x: F.interpolate(torch.tanh(m.conv(x)), size=3, mode="area"),
            conv=nn.Conv2d(2, 2, 3),
        ),
        images,
    ),
    "bilinear form": (
        lambda: Applied(
            lambda m, x: m.form(x, torch.sin(x)).exp(), form=nn.Bilinear(4, 4, 2)
        ),
        vectors,
    ),
    "EmbeddingBag": (
        lambda: nn.Sequential(nn.EmbeddingBag(5, 4, padding_idx=0), nn.Tanh(), linear()),
        tokens,
    ),
    "EmbeddingBag by sum": (
        lambda: nn.Sequential(nn.EmbeddingBag(5, 4, mode="sum"), nn.Tanh(), linear()),
        tokens,
    ),
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh(), linear()),
        vectors,
    ),
    "spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(linear()), nn.Tanh()),
        vectors,
    ),
    "orthogonal": (
        lambda: nn.Sequential(parametrizations.orthogonal(linear()), nn.Tanh(), linear()),
        vectors,
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_networks_of_vectors_have_products(name, training):
    layers = [nn.Linear(4, 6), ACTIVATIONS[name](), nn.Linear(6, 3), nn.Tanh()]
    assert_network_is_right(nn.Sequential(*layers), vectors(), training=training)


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_networks_of_images_have_products(name):
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), IMAGE_LAYERS[name](), nn.Softplus()]
    assert_network_is_right(nn.Sequential(*layers), images())


@pytest.mark.parametrize("name", OTHERS)
def test_graphs_of_any_shape_have_products(name):
    build, inputs = OTHERS[name]
    assert_network_is_right(build(), inputs())
