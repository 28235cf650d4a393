"""Kinds of models, wrappers, types and data that people bring, each left as it was.

The oracle is first-order autograd on a copy of the model, and fourth-order differences of
its gradients.
"""

import copy
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import (
    assert_near,
    differenced_hvp,
    directions,
    filled,
    flat,
    generator,
    normal,
    softmax_regression,
    tiny_mlp,
)
from helpers.untouched import assert_same, assert_states, fingerprint, random_states
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sharpness import EmpiricalRisk, eigenpairs

DIFFERENCED = 1e-8  # fourth-order differences of float64 gradients
ROUNDING = 1e-12  # the same sum in another order, in float64


def everything(model):
    """What must come back, with buffers that no checkpoint has and global switches."""
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    return {
        "buffers": {k: b.clone() for k, b in model.named_buffers()},
        "attributes": {
            (name, key, value.grad_fn is None): value.detach().clone()
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
    """theta -> value, and theta -> gradient, on a copy in evaluation mode."""
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

    def near(there):
        return gradient(theta + step * (there - theta)) / step

    return differenced_hvp(near, theta, v)


def assert_right(risk, value, gradient, *, engine="kept_graph"):
    """Value, gradient and products, one by one and in a block, are the oracle's."""
    theta, v = risk.theta.clone(), directions(2, risk.n)
    with untouched(risk.model):
        here, slope = risk.value_and_gradient()
        alone, block = risk.hvp(v[0]), risk.hvp(v)
        evaluated = risk.value()
    expected = float(value(theta).detach())
    assert here == pytest.approx(expected, rel=ROUNDING)
    assert evaluated == pytest.approx(expected, rel=ROUNDING)
    assert_near(slope, gradient(theta), ROUNDING)
    assert_near(alone, block[0], ROUNDING)
    plan = risk.settings()["engine"]
    rtol = max(DIFFERENCED, 10 * (plan["relative_error"] or 0))
    for row, product in zip(v, block, strict=True):
        assert_near(product, differenced(gradient, theta, row), rtol)
    assert plan["engine"] == engine


def assert_network_is_right(
    layers, inputs, *, training=True, engine="kept_graph", **settings
):
    """The network under a mean squared error to random targets, in chunks of two."""
    model = filled(layers.double(), generator(0)).train(training)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        y = normal(generator(1), *copy.deepcopy(model).eval()(*inputs).shape)
    expected = oracle(model, lambda other: ((other(*inputs) - y) ** 2).mean())
    settings = {"chunk_size": 2, **settings}
    with untouched(model):
        risk = EmpiricalRisk(model, nn.MSELoss(), (inputs, y), **settings)
    assert_right(risk, *expected, engine=engine)
    return risk


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


def reused(m, x):
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
    return x @ torch.linalg.cholesky(matrix) + torch.logdet(matrix)


def grid_sampled(m, x):
    grid = torch.tanh(m.layer(x[:, :, :3, :3].permute(0, 2, 3, 1)))
    return F.grid_sample(x, grid, align_corners=False)


def slopes(m, x):
    return torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(m.layer(z))))(x)


def linear():
    return nn.Linear(4, 4)


def number(value=0.0):
    return nn.Parameter(torch.tensor(value))


OTHERS = {
    "a parameter used twice": (lambda: Applied(reused, layer=linear()), vectors),
    "linalg.solve": (lambda: Applied(solved, layer=linear()), vectors),
    "linalg.cholesky": (
        lambda: Applied(cholesky_and_determinant, layer=linear()),
        vectors,
    ),
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
    "grid_sample": (lambda: Applied(grid_sampled, layer=nn.Linear(2, 2)), images),
    "vmap of a Jacobian": (lambda: Applied(slopes, layer=linear()), vectors),
    "singular values": (
        lambda: Applied(
            lambda m, x: torch.linalg.svdvals(m.layer.weight) * m.layer(x), layer=linear()
        ),
        vectors,
    ),
    "Fourier transform": (
        lambda: Applied(lambda m, x: torch.fft.rfft(m.layer(x)).abs(), layer=linear()),
        vectors,
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


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_networks_of_vectors_have_products(name):
    layers = [nn.Linear(4, 6), ACTIVATIONS[name](), nn.Linear(6, 3), nn.Tanh()]
    assert_network_is_right(nn.Sequential(*layers), vectors())


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_networks_of_images_have_products(name):
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), IMAGE_LAYERS[name](), nn.Softplus()]
    assert_network_is_right(nn.Sequential(*layers), images())


@pytest.mark.parametrize("name", OTHERS)
def test_graphs_of_any_shape_have_products(name):
    build, inputs = OTHERS[name]
    # PyTorch's own second derivative of weight_norm is wrong.
    engine = "differences" if name == "weight_norm" else "kept_graph"
    assert_network_is_right(build(), inputs(), engine=engine)


UNDIFFERENTIABLE = {
    "EmbeddingBag": (
        lambda: nn.Sequential(nn.EmbeddingBag(5, 4), nn.Tanh(), linear()),
        tokens,
    ),
    "EmbeddingBag by sum": (
        lambda: nn.Sequential(nn.EmbeddingBag(5, 4, mode="sum"), nn.Tanh()),
        tokens,
    ),
    "cdist": (
        lambda: Applied(
            lambda m, x: torch.cdist(m.layer(x), m.layer.weight), layer=linear()
        ),
        vectors,
    ),
}


@pytest.mark.parametrize("name", UNDIFFERENTIABLE)
def test_where_pytorch_has_no_second_derivative_products_are_differences(name):
    build, inputs = UNDIFFERENTIABLE[name]
    risk = assert_network_is_right(build(), inputs(), engine="differences")
    plan = risk.settings()["engine"]
    assert "no second derivative: NotImplementedError" in plan["reason"]
    assert 0 < plan["relative_error"] < 1e-4


def test_the_padding_row_of_an_embedding_is_not_moved():
    layers = [nn.Embedding(5, 4, padding_idx=0), nn.Tanh(), linear()]
    model = filled(nn.Sequential(*layers).double(), generator(0))
    y = vectors(5, 3, 4)
    _, gradient = oracle(model, lambda other: ((other(tokens()) - y) ** 2).mean())
    risk = EmpiricalRisk(model, nn.MSELoss(), (tokens(), y), chunk_size=2)
    v = directions(1, risk.n)[0]
    still = torch.cat([torch.zeros(4).double(), v[4:]])
    product = risk.hvp(v)
    assert product[:4].tolist() == risk.gradient()[:4].tolist() == [0.0] * 4
    expected = differenced(gradient, risk.theta, still)
    assert_near(product, expected, DIFFERENCED)
    assert_near(risk.hvp(still), expected, DIFFERENCED)


def test_an_embedding_that_scales_its_rows_down_goes_in_chunks():
    def model(max_norm):
        layers = [nn.Embedding(5, 4, max_norm=max_norm), nn.Tanh(), linear()]
        return filled(nn.Sequential(*layers).double(), generator(0))

    found, expected = (
        EmpiricalRisk(model(m), nn.MSELoss(), (tokens(), vectors(5, 3, 4)), chunk_size=2)
        for m in (100.0, None)
    )
    v = directions(1, found.n)[0]
    assert_near(found.hvp(v), expected.hvp(v), 1e-12)
    at_the_edge = EmpiricalRisk(
        model(0.1), nn.MSELoss(), (tokens(), vectors(5, 3, 4)), chunk_size=2, check=False
    )
    assert at_the_edge.hvp(v).isfinite().all()


def test_the_padding_row_is_a_constant_for_values_too():
    layers = [nn.Embedding(5, 4, padding_idx=0), nn.Tanh(), linear()]
    model = filled(nn.Sequential(*layers).double(), generator(0))
    risk = EmpiricalRisk(model, nn.MSELoss(), (tokens(), vectors(5, 3, 4)))
    assert (tokens() == 0).any()
    moved = risk.theta.clone()
    moved[:4] += 1
    assert risk.value(moved) == risk.value()
    moved[4:8] += 1
    assert risk.value(moved) != risk.value()


def test_a_padding_row_that_another_layer_uses_is_a_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(5, 4, padding_idx=0)
            self.scores = nn.Linear(4, 5, bias=False)
            self.scores.weight = self.tokens.weight

        def forward(self, t):
            return self.scores(torch.tanh(self.tokens(t))).transpose(1, 2)

    model, t = filled(Tied().double(), generator(0)), tokens()
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), (t.clamp(min=1), t))
    model.zero_grad()
    nn.functional.cross_entropy(model(t.clamp(min=1)), t).backward()
    assert_near(risk.gradient(), model.tokens.weight.grad.flatten(), 1e-12)
    assert risk.gradient()[:4].abs().min() > 0


class Spectral(nn.Module):
    """A circular convolution whose kernel is kept as pairs of real numbers."""

    def __init__(self, as_complex):
        super().__init__()
        self.shift, self.kernel = (
            nn.Parameter(torch.zeros(1)),
            nn.Parameter(torch.ones(3, 2)),
        )
        self.as_complex = as_complex

    def forward(self, x):
        kernel = self.as_complex(self.kernel)
        return torch.fft.irfft(torch.fft.rfft(x) * kernel, n=4) + self.shift


@pytest.mark.parametrize("rows", [1, 3])
def test_a_parameter_at_an_odd_place_may_be_viewed_as_complex(rows):
    x = vectors(12, 4)
    found, expected = (
        EmpiricalRisk(
            filled(Spectral(as_complex).double(), generator(0)), nn.MSELoss(), (x, x)
        )
        for as_complex in (
            torch.view_as_complex,
            lambda pair: torch.complex(*pair.unbind(1)),
        )
    )
    v = directions(rows, found.n)
    assert found.value() == expected.value()
    for matrix in ("hessian", "gauss_newton"):
        assert_near(found.product(v, matrix), expected.product(v, matrix), 1e-12)


# -- attention ---------------------------------------------------------------------------


def attended(m, x, **settings):
    n, length, _ = x.shape
    q, k, v = m.qkv(x).view(n, length, 3, 2, 2).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, **settings)


def self_attended(m, x, **settings):
    return m.attention(x, x, x, **settings)[0]


def with_its_weights(m, x):
    out, weights = m.attention(x, x, x, average_attn_weights=False)
    return torch.cat([out.flatten(1), weights.flatten(1)], 1)


def attention(**settings):
    return nn.MultiheadAttention(4, 2, batch_first=True, **settings)


def last_is_padding(x):
    return (torch.arange(3) == 2).expand(len(x), 3)


def padded(m, x):
    return m.encoder(x, src_key_padding_mask=last_is_padding(x))


LATE = torch.ones(3, 3).triu(1).bool()
SCALED = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"attn_mask": ~LATE},
    "biased": {"attn_mask": torch.linspace(-1, 1, 9).view(3, 3).double()},
    "scaled": {"scale": 2.0},
}
ATTENTION = {
    "with weights": (attention, {}),
    "without weights": (attention, {"need_weights": False}),
    "weights of each head": (attention, {"average_attn_weights": False}),
    "masked": (attention, {"attn_mask": LATE}),
    "causal": (attention, {"attn_mask": LATE, "is_causal": True, "need_weights": False}),
    "dropout": (lambda: attention(dropout=0.5), {"need_weights": False}),
    "own key and value sizes": (lambda: attention(kdim=4, vdim=4, add_bias_kv=True), {}),
    "zero attention": (lambda: attention(add_zero_attn=True, bias=False), {}),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_dot_product_attention_in_4d_has_products_R27(name):
    layers = Applied(lambda m, x: attended(m, x, **SCALED[name]), qkv=nn.Linear(4, 12))
    assert_network_is_right(layers, sequences())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_multi_head_attention_has_products_R27(name, training):
    build, settings = ATTENTION[name]
    layers = Applied(lambda m, x: self_attended(m, x, **settings), attention=build())
    assert_network_is_right(layers, sequences(), training=training)


def test_weights_of_attention_may_be_in_the_loss_R27():
    assert_network_is_right(Applied(with_its_weights, attention=attention()), sequences())


def encoder_layer(**settings):
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **settings)


def decoder_layer(**settings):
    return nn.TransformerDecoderLayer(4, 2, 6, batch_first=True, **settings)


TRANSFORMERS = {
    "encoder layer": lambda: encoder_layer(),
    "norm first": lambda: encoder_layer(norm_first=True, activation="gelu", bias=False),
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 2),
    "encoder with norm": lambda: nn.TransformerEncoder(
        encoder_layer(norm_first=True), 2, nn.LayerNorm(4), enable_nested_tensor=False
    ),
    "causal encoder": lambda: Applied(
        lambda m, x: m.encoder(x, mask=LATE, is_causal=True),
        encoder=nn.TransformerEncoder(encoder_layer(), 2),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_encoders_have_products_in_either_mode_R28(name, training):
    assert_network_is_right(TRANSFORMERS[name](), sequences(), training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_transformer_decoders_have_products_in_either_mode_R28(layers, training):
    model = (
        nn.TransformerDecoder(decoder_layer(), layers) if layers > 1 else decoder_layer()
    )
    inputs = sequences(), vectors(5, 2, 4)
    assert_network_is_right(model, inputs, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_padded_sequences_have_one_risk_in_an_encoder_R28(nested, training):
    # Without gradients the fast path would set what is padded to zero.
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=nested)
    model = filled(Applied(padded, encoder=encoder).double(), generator(0)).train(training)
    x, y = sequences(), vectors(5, 3, 4) + 1
    expected = oracle(model, lambda other: ((other(x) - y) ** 2).mean())
    risk = EmpiricalRisk(model, nn.MSELoss(), (x, y), chunk_size=2)
    assert_right(risk, *expected)


# -- recurrent networks ------------------------------------------------------------------

RECURRENT = {
    "LSTM": lambda **settings: nn.LSTM(4, 2, **settings),
    "LSTM with projections": lambda **settings: nn.LSTM(4, 3, proj_size=2, **settings),
    "GRU": lambda **settings: nn.GRU(4, 2, **settings),
    "RNN": lambda **settings: nn.RNN(4, 2, **settings),
    "RNN of ReLU": lambda **settings: nn.RNN(4, 2, nonlinearity="relu", **settings),
}
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}


def recurrent(m, x):
    if m.layer.batch_first:
        return m.layer(x)[0]
    return m.layer(x.transpose(0, 1))[0].transpose(0, 1)


def packed(m, x):
    lengths = torch.tensor([2, 3, 1, 3, 2])[: len(x)]
    sequence = nn.utils.rnn.pack_padded_sequence(
        x, lengths, batch_first=True, enforce_sorted=False
    )
    last = m.layer(sequence)[1]
    return (last[0] if isinstance(last, tuple) else last)[-1]


def unrolled(m, x):
    state = None
    for step in x.unbind(1):
        state = m.cell(step, state)
    return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize(("batch_first", "training"), [(True, True), (False, False)])
@pytest.mark.parametrize("name", RECURRENT)
def test_deep_recurrent_networks_have_products_R29(name, batch_first, training):
    layer = RECURRENT[name](
        num_layers=2, dropout=0.5, bidirectional=True, batch_first=batch_first
    )
    layers = Applied(recurrent, layer=layer)
    assert_network_is_right(layers, sequences(), training=training)


def test_a_recurrent_layer_keeps_no_copy_of_its_weights_R29():
    model = Applied(recurrent, layer=nn.LSTM(4, 2, batch_first=True).double())
    EmpiricalRisk(model, nn.MSELoss(), (sequences(), vectors(5, 3, 2))).gradient()
    pairs = zip(model.layer._flat_weights, model.layer.parameters(), strict=True)
    assert all(weight is p for weight, p in pairs)


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_cells_have_products_R29(name):
    assert_network_is_right(Applied(unrolled, cell=CELLS[name](4, 3)), sequences())


@pytest.mark.parametrize("name", RECURRENT)
def test_packed_sequences_have_products_R29(name):
    layer = RECURRENT[name](batch_first=True)
    assert_network_is_right(Applied(packed, layer=layer), sequences(), chunk_size=5)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN needs a CUDA device")
def test_on_cuda_recurrent_networks_have_the_products_of_the_cpu_R29(name):
    layer = RECURRENT[name](num_layers=2, bidirectional=True, batch_first=True)
    model = filled(Applied(recurrent, layer=layer).double(), generator(0))
    data, v = (sequences(), vectors(5, 3, 4)), directions(2, len(flat(model)))
    here = EmpiricalRisk(model, nn.MSELoss(), data)
    there = EmpiricalRisk(copy.deepcopy(model).cuda(), nn.MSELoss(), data, chunk_size=2)
    assert torch.backends.cudnn.enabled
    assert_near(there.hvp(v).cpu(), here.hvp(v), 1e-10)
    assert there.settings()["engine"]["engine"] == "kept_graph"
    assert torch.backends.cudnn.enabled


# -- wrappers ----------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()  # else what earlier tests compiled counts towards the limit


class Counted:
    """A backend for `torch.compile` that compiles nothing, and counts."""

    def __init__(self):
        self.num_graphs = self.num_calls = 0

    def __call__(self, graph, _):
        self.num_graphs += 1

        def run(*args):
            self.num_calls += 1
            return graph(*args)

        return run


class Own(nn.Sequential):
    """A class of the user's: those of PyTorch are not compiled in place."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def compiled_whole(model, backend):
    return torch.compile(model, backend=backend)


def compiled_and_run(model, backend):
    model = torch.compile(model, backend=backend)
    model(tiny_mlp().data[0]).sum().backward()
    model.zero_grad()
    return model


def compiled_in_place(model, backend):
    model = Own(*model)
    model.compile(backend=backend)
    return model


def compiled_submodule(model, backend):
    return nn.Sequential(torch.compile(model[0], backend=backend), *model[1:])


def compiled_submodule_in_place(model, backend):
    last = Own(model[2])
    last.compile(backend=backend)
    return nn.Sequential(*model[:2], last)


COMPILED = [
    compiled_whole,
    compiled_and_run,
    compiled_in_place,
    compiled_submodule,
    compiled_submodule_in_place,
]


def assert_same_risk(risk, expected):
    v = directions(2, expected.n)
    assert risk.value() == expected.value()
    assert torch.equal(risk.gradient(), expected.gradient())
    assert torch.equal(risk.hvp(v), expected.hvp(v))


def assert_noted(risk, what):
    assert any(what in note for note in risk.notes)
    assert risk.settings()["notes"] == risk.notes


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compiled", COMPILED)
def test_of_a_compiled_model_the_original_is_measured_R30(compiled, backend):
    problem = tiny_mlp()
    model = compiled(tiny_mlp().model, backend)
    with untouched(model):
        risk = EmpiricalRisk(model, problem.loss, problem.data, chunk_size=7)
        assert_same_risk(risk, problem.risk(chunk_size=7))
    assert_noted(risk, "torch.compile")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_of_a_model_that_inductor_has_compiled_the_original_is_measured_R30():
    problem = tiny_mlp()
    model = compiled_and_run(tiny_mlp().model, "inductor")
    risk = EmpiricalRisk(model, problem.loss, problem.data, chunk_size=7)
    assert_same_risk(risk, problem.risk(chunk_size=7))
    assert_noted(risk, "torch.compile")


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model_runs_compiled_as_before_R30(compiled):
    problem, backend = tiny_mlp(), Counted()
    model, run = compiled(problem.model, backend), torch.no_grad()(lambda m, x: m(x))
    first = run(model, problem.data[0])
    before = backend.num_graphs, backend.num_calls
    EmpiricalRisk(model, problem.loss, problem.data, chunk_size=7).hvp(directions(2, 44))
    assert (backend.num_graphs, backend.num_calls) == before
    assert torch.equal(run(model, problem.data[0]), first)
    assert (backend.num_graphs, backend.num_calls) == (before[0], before[1] + 1)


def test_parameters_of_a_compiled_model_keep_their_names_R30():
    problem = tiny_mlp()
    model = compiled_whole(problem.model, "eager")
    risk = EmpiricalRisk(model, problem.loss, problem.data, params="0.*")
    assert risk.n == 20


def masked_targets():
    return torch.where(torch.arange(23) % 5 < 2, -100, torch.arange(23) % 4)


LOSSES = {
    "module": nn.CrossEntropyLoss(),
    "weighted": nn.CrossEntropyLoss(weight=torch.arange(1.0, 5).double()),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "function": F.cross_entropy,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_is_asked_for_its_terms_like_the_original_R2_R30(name):
    model, x, y = tiny_mlp().model, tiny_mlp().data[0], masked_targets()
    loss = torch.compile(LOSSES[name], backend="eager")
    expected = EmpiricalRisk(model, LOSSES[name], (x, y), chunk_size=7)
    risk = EmpiricalRisk(model, loss, (x, y), chunk_size=7)
    assert risk.num_terms == expected.num_terms
    assert_same_risk(risk, expected)
    assert_noted(risk, "torch.compile")


def test_a_compiled_function_inside_a_closure_is_measured_as_it_is_R30():
    problem = tiny_mlp()
    function = torch.compile(lambda m, x: torch.tanh(m(x)), backend="aot_eager")
    rows = list(zip(*(part.split(7) for part in problem.data), strict=True))
    risks = [
        EmpiricalRisk(
            problem.model,
            closure=lambda m, b, f=f: F.cross_entropy(f(m, b[0]), b[1]),
            data=rows,
        )
        for f in (function, lambda m, x: torch.tanh(m(x)))
    ]
    assert_same_risk(*risks)


@pytest.fixture
def _process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


PARALLEL = {
    "DistributedDataParallel": [nn.parallel.DistributedDataParallel],
    "DataParallel": [nn.DataParallel],
    "compiled DistributedDataParallel": [
        nn.parallel.DistributedDataParallel,
        partial(torch.compile, backend="eager"),
    ],
    "DistributedDataParallel of compiled": [
        partial(torch.compile, backend="eager"),
        nn.parallel.DistributedDataParallel,
    ],
}


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("name", PARALLEL)
def test_of_a_parallel_model_the_module_inside_is_measured(name):
    problem, model = tiny_mlp(), tiny_mlp().model
    for wrap in PARALLEL[name]:
        model = wrap(model)
    with untouched(model):
        settings = {"chunk_size": 7, "params": "2.*"}
        risk = EmpiricalRisk(model, problem.loss, problem.data, **settings)
        assert_same_risk(risk, problem.risk(**settings))
    for part in name.replace("compiled", "torch.compile").replace("of ", "").split():
        assert_noted(risk, part)


@pytest.mark.usefixtures("_process_group")
def test_a_parallel_model_trains_on_after_a_measurement():
    problem, plain = tiny_mlp(), tiny_mlp()
    model = nn.parallel.DistributedDataParallel(problem.model)
    EmpiricalRisk(model, problem.loss, problem.data).hvp(directions(1, 44))
    for network in (model, plain.model):
        plain.loss(network(plain.data[0]), plain.data[1]).backward()
    pairs = zip(problem.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs)


# -- Hugging Face ------------------------------------------------------------------------

IDS = torch.tensor([[5, 3, 8, 1, 9, 2], [7, 7, 4, 6, 0, 0], [1, 5, 2, 0, 0, 0]])
IDS = torch.cat([IDS, torch.tensor([[6, 9, 3, 8, 4, 0], [8, 2, 0, 0, 0, 0]])])
LENGTHS = torch.tensor([6, 4, 3, 5, 2])
CLASSES = torch.tensor([0, 2, 1, 1, 0])
ATTENTIONS = ["sdpa", "eager"]


def text(labels=None):
    """Five sentences, padded on the right; by default each token is to be predicted."""
    mask = (torch.arange(6) < LENGTHS[:, None]).long()
    labels = IDS.masked_fill(mask == 0, -100) if labels is None else labels
    return {"input_ids": IDS, "attention_mask": mask, "labels": labels}


def ragged(batch, sizes=(2, 3)):
    """The same in batches, each as long as its longest sentence."""
    parts = zip(*(tensor.split(sizes) for tensor in batch.values()), strict=True)
    parts = [dict(zip(batch, tensors, strict=True)) for tensors in parts]
    longest = [int(part["attention_mask"].sum(1).max()) for part in parts]
    return [
        {k: v[:, :length] if v.ndim == 2 else v for k, v in part.items()}
        for part, length in zip(parts, longest, strict=True)
    ]


def gpt2(attention="sdpa", **settings):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 10, "n_positions": 6, "n_embd": 4, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(
        **sizes, bos_token_id=None, eos_token_id=None, **settings
    )
    assert config.use_cache
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention
    )
    return filled(model.double(), generator(0)).train()


def bert(attention="sdpa"):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=10,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=6,
        num_labels=3,
        problem_type="single_label_classification",  # else written at the first call
    )
    model = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation=attention
    )
    return filled(model.double(), generator(0)).train()


def next_tokens(model, batch):
    """The loss of a language model; its own is computed in float32."""
    logits = model(**batch).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def num_predicted(batch):
    return (batch["labels"][:, 1:] != -100).sum()


def language_risk(model, closure, batches, **settings):
    return EmpiricalRisk(
        model, closure=closure, data=batches, terms=num_predicted, **settings
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1)])
def test_a_language_model_counts_each_predicted_token_once_R2(sizes, attention):
    model = gpt2(attention)
    expected = oracle(model, lambda other: next_tokens(other, text()))
    with untouched(model):
        risk = language_risk(model, next_tokens, ragged(text(), sizes))
    assert risk.num_terms == 15
    assert_right(risk, *expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_own_loss_of_a_language_model_is_right_to_its_float32_R2(attention):
    model, few = gpt2(attention), 100 * torch.finfo(torch.float32).eps
    exact = language_risk(model, next_tokens, [text()])
    with untouched(model):
        risk = language_risk(model, lambda m, b: m(**b).loss, ragged(text()))
        value, gradient = risk.value_and_gradient()
        v = directions(2, risk.n)
        products = risk.hvp(v)
    assert model.config.use_cache
    assert value == pytest.approx(exact.value(), rel=few)
    assert risk.value() == pytest.approx(exact.value(), rel=few)
    assert_near(gradient, exact.gradient(), few)
    assert_near(products, exact.hvp(v), few)


def test_embeddings_that_a_language_model_ties_are_one_R12():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    risk = language_risk(model, next_tokens, [text()])
    assert risk.n == len(flat(model))
    params = "transformer.wte.*"
    only = language_risk(model, next_tokens, [text()], params=params)
    v = directions(1, only.n)[0]
    whole = torch.cat([v, torch.zeros(risk.n - only.n).double()])
    assert_near(only.hvp(v), risk.hvp(whole)[: only.n], ROUNDING)
    untied = gpt2(tie_word_embeddings=False)
    apart = language_risk(untied, next_tokens, [text()])
    assert apart.n == risk.n + only.n


def test_a_frozen_body_leaves_the_hessian_of_the_head_R11():
    model, batch = bert(), text(CLASSES)
    model.bert.requires_grad_(False)
    expected = oracle(model, lambda m: F.cross_entropy(m(**batch).logits, CLASSES))
    risk = EmpiricalRisk(model, closure=lambda m, b: m(**b).loss, data=[batch])
    assert risk.n == 15
    assert_right(risk, *expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sizes", [(5,), (3, 2)])
def test_a_classifier_of_padded_text_has_products(sizes, attention):
    model, batch = bert(attention), text(CLASSES)
    expected = oracle(model, lambda m: F.cross_entropy(m(**batch).logits, CLASSES))
    with untouched(model):
        data = ragged(batch, sizes)
        risk = EmpiricalRisk(model, closure=lambda m, b: m(**b).loss, data=data)
    assert_right(risk, *expected)


def test_a_classifier_of_text_takes_pairs_with_a_dict_of_inputs():
    model, batch = bert(), text(CLASSES)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    expected = oracle(model, lambda m: F.cross_entropy(m(**batch).logits, CLASSES))
    risk = EmpiricalRisk(
        model,
        lambda outputs, labels: F.cross_entropy(outputs.logits, labels),
        (inputs, CLASSES),
        terms=len,
        chunk_size=2,
    )
    assert_right(risk, *expected)


class Sentences(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {k: v[i] for k, v in text().items()}


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_of_sentences_is_read_once_R26(shuffle):
    model = gpt2()
    loader = DataLoader(Sentences(), batch_size=2, shuffle=shuffle)
    with untouched(model):
        risk = language_risk(model, next_tokens, loader)
        expected = language_risk(model, next_tokens, [text()])
    v = directions(1, risk.n)[0]
    assert risk.value() == pytest.approx(expected.value(), rel=ROUNDING)
    assert_near(risk.hvp(v), expected.hvp(v), ROUNDING)
    assert torch.equal(risk.hvp(v), risk.hvp(v))


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("use", ["value", "gradient", "hvp"])
def test_a_closure_that_raises_midway_leaves_all_as_before_R23_R24(use, error):
    model = gpt2()
    model.transformer.h[0].eval()
    model.transformer.wpe.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    calls = []

    def closure(m, batch):
        calls.append(len(batch["labels"]))
        loss = next_tokens(m, batch)
        if armed and calls[-1] == 3:
            raise error
        return loss

    armed = []
    risk = language_risk(model, closure, ragged(text()))
    armed.append(calls.clear())  # what follows is the evaluation
    uses = {"value": risk.value, "gradient": risk.gradient}
    with untouched(model), pytest.raises(type(error)):
        uses.get(use, lambda: risk.hvp(directions(1, risk.n)))()
    assert 3 in calls


# -- types -------------------------------------------------------------------------------

HALF = [torch.bfloat16, torch.float16]


def low_and_high(name, dtype, wide=torch.float64):
    """Risks of a network in `dtype`, and of the same numbers in a wider type."""
    build, inputs = LOW[name]
    model = filled(build().double(), generator(0)).to(dtype)
    wider, x = copy.deepcopy(model).to(wide), inputs().to(dtype)
    with torch.no_grad():
        y = torch.sin(10 * wider(x.to(wide))).to(dtype)
    low = EmpiricalRisk(model, nn.MSELoss(), (x, y), chunk_size=2)
    return low, EmpiricalRisk(wider, nn.MSELoss(), (x.to(wide), y.to(wide)))


def convolutions():
    layers = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


LOW = {
    "attention": (encoder_layer, sequences),
    "convolutions": (convolutions, images),
    "GRU": (lambda: Applied(recurrent, layer=nn.GRU(4, 2, batch_first=True)), sequences),
    "LSTM": (lambda: Applied(recurrent, layer=nn.LSTM(4, 2, batch_first=True)), sequences),
}


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("name", LOW)
def test_networks_of_low_precision_are_right_to_that_precision_R15(name, dtype):
    low, high = low_and_high(name, dtype)
    v = directions(2, low.n)
    with untouched(low.model):
        value, gradient = low.value_and_gradient()
        products = low.hvp(v)
    assert {gradient.dtype, products.dtype, low.theta.dtype} == {torch.float32}
    few = 10 * torch.finfo(dtype).eps
    assert value == pytest.approx(high.value(), rel=few)
    assert_near(gradient.double(), high.gradient(), few)
    scale = eigenpairs(high).lambda_max * float(v.norm())
    assert float((products.double() - high.hvp(v)).norm()) <= few * scale


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["attention", "convolutions", "GRU"])
def test_lambda_max_of_half_precision_is_that_of_float32_R15(name, dtype):
    low, high = low_and_high(name, dtype, torch.float32)
    rough, sharp = eigenpairs(low), eigenpairs(high)
    bounds = float(rough.error_bounds[0] + sharp.error_bounds[0])
    rounding = torch.finfo(dtype).eps * sharp.lambda_max
    assert abs(rough.lambda_max - sharp.lambda_max) <= bounds + rounding
    assert rough.noise_floor > sharp.noise_floor  # a smaller value is not called flat
    assert rough.eigenvectors.dtype == torch.float32


def test_scipy_works_on_the_operator_of_a_bfloat16_model_R15():
    low, high = low_and_high("convolutions", torch.bfloat16, torch.float32)
    operator = low.linear_operator()
    v0 = np.ones(low.n, dtype=np.float32)
    assert operator.dtype == v0.dtype
    found = eigsh(operator, 1, which="LA", v0=v0, tol=1e-3, return_eigenvectors=False)
    rounding = 10 * torch.finfo(torch.bfloat16).eps
    assert float(found[0]) == pytest.approx(eigenpairs(high).lambda_max, rel=rounding)


def test_a_network_of_several_types_is_as_wide_as_its_widest_R14():
    layers = [nn.Linear(4, 6).bfloat16(), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)]
    layers[3].double()

    def forward(m, x):
        hidden = m.norm(torch.tanh(m.first(x.bfloat16())).float())
        return m.last(hidden.double())

    parts = {"first": layers[0], "norm": layers[2], "last": layers[3]}
    model = Applied(forward, **parts)
    x, y = vectors(), vectors(5, 3)
    exact = copy.deepcopy(model).double()
    exact.function = lambda m, x: m.last(m.norm(torch.tanh(m.first(x))))
    risk = EmpiricalRisk(model, nn.MSELoss(), (x, y), chunk_size=2)
    expected = EmpiricalRisk(exact, nn.MSELoss(), (x.bfloat16().double(), y))
    few, v = 10 * torch.finfo(torch.bfloat16).eps, directions(2, risk.n)
    assert risk.dtype == risk.hvp(v).dtype == torch.float64
    assert torch.equal(risk.theta, expected.theta)
    assert_near(risk.gradient(), expected.gradient(), few)
    scale = eigenpairs(expected).lambda_max * float(v.norm())
    assert float((risk.hvp(v) - expected.hvp(v)).norm()) <= few * scale


@pytest.mark.parametrize("autocast", HALF)
def test_under_autocast_vectors_stay_float32_and_bounds_cover_the_rounding_R16(autocast):
    problem = tiny_mlp(dtype=torch.float32)
    with untouched(problem.model):
        risk = problem.risk(autocast=autocast, chunk_size=7)
        rough, v = eigenpairs(risk, tol=1e-4), directions(2, risk.n).float()
        products = risk.hvp(v)
    plain = problem.risk()
    sharp = eigenpairs(plain, tol=1e-4)
    assert {products.dtype, risk.theta.dtype, risk.gradient().dtype} == {torch.float32}
    assert not torch.equal(products, plain.hvp(v))
    assert torch.equal(products, risk.hvp(v))
    few = 10 * torch.finfo(autocast).eps
    assert float((products - plain.hvp(v)).norm()) <= few * sharp.lambda_max * v.norm()
    bounds = float(rough.error_bounds[0] + sharp.error_bounds[0])
    assert 0 < abs(rough.lambda_max - sharp.lambda_max) <= bounds
    assert rough.noise_floor > sharp.noise_floor
    assert risk.settings()["autocast"] == str(autocast).removeprefix("torch.")


def test_autocast_around_a_measurement_changes_no_number_R16():
    problem, v = tiny_mlp(dtype=torch.float32), directions(2, 44)
    risk = problem.risk(chunk_size=7)
    expected = risk.value(), risk.gradient(), risk.hvp(v)
    again = problem.risk(chunk_size=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for inside in (again, problem.risk(chunk_size=7)):
            assert inside.value() == expected[0]
            assert torch.equal(inside.gradient(), expected[1])
            assert torch.equal(inside.hvp(v), expected[2])


def test_the_default_type_changes_no_number_R14():
    problem = tiny_mlp(dtype=torch.float32)
    expected = eigenpairs(problem.risk(chunk_size=7))
    torch.set_default_dtype(torch.float64)
    try:
        found = eigenpairs(problem.risk(chunk_size=7))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.eigenvalues, expected.eigenvalues)
    assert torch.equal(found.eigenvectors, expected.eigenvectors)


# -- several inputs ----------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, a, b):
        return torch.tanh(self.first(a)) * self.second(b)


class Rows(Dataset):
    """Samples made by `form(a, b, y)`."""

    def __init__(self, form, parts):
        self.form, self.parts = form, parts

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, i):
        return self.form(*(part[i] for part in self.parts))


def as_tuple(a, b, y):
    return (a, b), y


def as_list(a, b, y):
    return [[a, b], y]


def as_dict(a, b, y):
    return {"b": b, "a": a}, y


CONTAINERS = {
    "whole": lambda form, parts: form(*parts),
    "batches": lambda form, parts: [
        form(*rows) for rows in zip(*(part.split(5) for part in parts), strict=True)
    ],
    "loader": lambda form, parts: DataLoader(Rows(form, parts), batch_size=5),
    "generator_R25": lambda form, parts: (
        form(*rows) for rows in zip(*(part.split(4) for part in parts), strict=True)
    ),
}


@pytest.mark.parametrize("chunk_size", ["auto", 4])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", [as_tuple, as_list, as_dict])
def test_several_inputs_come_in_a_tuple_a_list_or_a_dict(form, container, chunk_size):
    model = filled(TwoInputs().double(), generator(0))
    parts = a, b, y = vectors(11, 3), vectors(11, 2), vectors(11, 2) ** 2
    expected = oracle(model, lambda other: ((other(a, b) - y) ** 2).mean())
    data = CONTAINERS[container](form, parts)
    with untouched(model):
        risk = EmpiricalRisk(model, nn.MSELoss(), data, chunk_size=chunk_size)
    assert risk.num_samples == 11
    assert_right(risk, *expected)
    with torch.no_grad():
        assert_near(risk.outputs(), model(a, b), ROUNDING)


# -- closures ----------------------------------------------------------------------------


def by_autograd(m, x):
    x = x.clone().requires_grad_()
    u = m(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return ddu


def by_transforms(m, x):
    second = torch.func.jacfwd(torch.func.jacrev(lambda z: m(z)[0]))
    return torch.func.vmap(second)(x).squeeze(1)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by jacfwd
@pytest.mark.parametrize("second_derivative", [by_autograd, by_transforms])
@pytest.mark.parametrize("size", [11, 4])
def test_a_closure_may_hold_a_differential_equation(second_derivative, size):
    layers = [nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)]
    model = filled(nn.Sequential(*layers).double(), generator(0))

    def closure(m, batch):  # u'' = -sin x, u(0) = 0
        residual = second_derivative(m, batch["x"]) + torch.sin(batch["x"])
        return (residual**2).mean() + m(torch.zeros(1, 1).double()).square().sum()

    x = torch.linspace(-2, 2, 11).double()[:, None]
    expected = oracle(model, lambda other: closure(other, {"x": x}))
    data = [{"x": part} for part in x.split(size)]
    with untouched(model):
        risk = EmpiricalRisk(model, closure=closure, data=data)
    assert risk.num_samples == 11
    assert_right(risk, *expected)


def test_a_closure_may_hold_weight_decay_and_use_the_model_by_its_own_name():
    problem = softmax_regression()
    model, (x, y) = problem.model, problem.data
    risk = EmpiricalRisk(
        model,
        closure=lambda _, b: (
            F.cross_entropy(model(b[0]), b[1]) + 3 * (model.weight**2).sum()
        ),
        data=[(x[:20], y[:20]), (x[20:], y[20:])],
    )
    decay = 6 * torch.cat([torch.ones(12), torch.zeros(4)]).double()
    eye = torch.eye(16).double()
    assert_near(risk.hvp(eye), problem.hessian + torch.diag(decay), 1e-10)


def test_a_closure_may_take_its_batch_apart():
    problem = softmax_regression()

    def closure(m, batch):
        labels = batch.pop("y")
        return F.cross_entropy(m(batch.pop("inputs")[0]), labels)

    x, y = problem.data
    risk = EmpiricalRisk(
        problem.model, closure=closure, data=[{"inputs": [x], "y": y}], terms=len
    )
    value = float(problem.f(problem.theta))
    assert [risk.value(), risk.value()] == pytest.approx([value] * 2, rel=ROUNDING)
    assert_near(risk.hvp(torch.eye(16)), problem.hessian, 1e-10)


def test_parameters_without_curvature_have_zero_rows_in_a_closure_R10_R13():
    problem = softmax_regression()
    layers = {"unused": nn.LSTM(2, 2), "offset": number(2.0), "layer": problem.model}
    model = Applied(lambda m, x: m.layer(x), **layers).double()
    x, y = problem.data
    risk = EmpiricalRisk(
        model,
        closure=lambda m, b: F.cross_entropy(m(b[0]), b[1]) + 3 * m.offset,
        data=[(x[:20], y[:20]), (x[20:], y[20:])],
    )
    v = directions(1, risk.n)[0]
    with untouched(model):
        product, gradient = risk.hvp(v), risk.gradient()
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    slopes = dict(zip(names, gradient.split(sizes), strict=True))
    assert slopes["offset"].item() == pytest.approx(3, rel=ROUNDING)
    assert not any(g.any() for name, g in slopes.items() if "unused" in name)
    assert not product[:-16].any()
    assert_near(product[-16:], problem.hessian @ v[-16:], 1e-10)


# -- data --------------------------------------------------------------------------------


def closed(data, model=None):
    return EmpiricalRisk(
        model or softmax_regression().model,
        closure=lambda m, b: F.cross_entropy(m(b["x"]), b["y"]),
        data=data,
    )


class Samples(Dataset):
    """Softmax regression's, each look with other noise where asked."""

    def __init__(self, noise=0.0):
        self.pairs, self.noise = list(zip(*softmax_regression().data, strict=True)), noise

    def __len__(self):
        return 23

    def __getitem__(self, i):
        x, y = self.pairs[i]
        return {"x": x + self.noise * torch.randn(3) if self.noise else x, "y": y}


class Stream(IterableDataset):
    def __iter__(self):
        samples = Samples()
        return (samples[i] for i in range(23))


LOADERS = {
    "a generator_R25": lambda: (batch for batch in DataLoader(Samples(), 7)),
    "an iterator_R25": lambda: iter(DataLoader(Samples(), 7)),
    "shuffled_R26": lambda: DataLoader(Samples(), 7, shuffle=True),
    "a stream": lambda: DataLoader(Stream(), 7),
    "another process": lambda: DataLoader(Samples(), 7, num_workers=1),
}


@pytest.mark.parametrize("name", LOADERS)
def test_batches_for_a_closure_come_from_any_loader(name):
    problem, loader = softmax_regression(), LOADERS[name]()
    generators = random_states()
    risk = closed(loader, problem.model)
    assert_states(generators, random_states())
    assert risk.num_samples == 23
    assert_near(risk.hvp(torch.eye(16)), problem.hessian, 1e-10)


def test_an_augmenting_loader_for_a_closure_is_read_once_R26():
    loader = DataLoader(Samples(noise=0.5), 7, shuffle=True)
    risk, other = closed(loader), closed(loader)
    v = directions(1, 16)[0]
    assert torch.equal(risk.hvp(v), risk.hvp(v))
    assert risk.value() == risk.value() == risk.value_and_gradient()[0]
    assert risk.value() != softmax_regression().risk().value()
    assert other.num_samples == 23


@pytest.mark.parametrize("kind", ["pairs", "closure"])
def test_what_drop_last_leaves_out_is_not_in_the_mean_R26(kind):
    problem = softmax_regression()
    x, y = problem.data
    expected = EmpiricalRisk(problem.model, problem.loss, (x[:20], y[:20]))
    if kind == "closure":
        risk = closed(DataLoader(Samples(), 5, drop_last=True))
    else:
        loader = DataLoader(Rows(lambda *pair: pair, (x, y)), 5, drop_last=True)
        risk = EmpiricalRisk(problem.model, problem.loss, loader)
    v = directions(1, 16)[0]
    assert risk.num_samples == risk.num_terms == 20
    assert risk.value() == pytest.approx(expected.value(), rel=ROUNDING)
    assert_near(risk.hvp(v), expected.hvp(v), ROUNDING)


def test_a_loader_shuffles_on_as_if_it_had_not_been_read_R22():
    draw, other = generator(3), generator(3)
    loader = DataLoader(Samples(), 7, shuffle=True, generator=draw)
    closed(loader)
    assert torch.equal(draw.get_state(), other.get_state())


# -- models that change themselves -------------------------------------------------------


class Counting(nn.Module):
    """Its output depends on how often it was called and on the largest input so far."""

    def __init__(self, in_place):
        super().__init__()
        self.linear, self.in_place = linear().double(), in_place
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("largest", torch.ones(4).double(), persistent=False)

    def forward(self, x):
        largest = torch.maximum(self.largest, x.max(0).values)
        if self.in_place:
            self.calls.add_(1)
            self.largest.copy_(largest)
        else:
            self.calls, self.largest = self.calls + 1, largest
        return torch.tanh(self.linear(x)) * self.calls / self.largest


@pytest.mark.parametrize("chunk_size", [2, 5])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_counts_its_calls_is_one_function_and_keeps_its_count(
    in_place, chunk_size
):
    model, (x, y) = Counting(in_place), (vectors(), vectors())
    first_call = Applied(
        lambda m, x: torch.tanh(m.linear(x)) / x.max(0).values.clamp(min=1),
        linear=copy.deepcopy(model.linear),
    )
    risks = []
    with untouched(model):
        for network in (model, first_call):
            risks.append(
                EmpiricalRisk(network, nn.MSELoss(), (x, y), chunk_size=chunk_size)
            )
        for _ in range(2):
            assert_same_risk(*risks)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    layer.weight = layer.weight.detach()  # else there is no copying it
    return layer


NORMED = {
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm by hook": nn.utils.spectral_norm,
    "pruned": pruned,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMED)
def test_a_weight_made_of_others_is_left_as_it_was(name, training):
    layers = nn.Sequential(NORMED[name](linear()), nn.Tanh(), linear())
    risk = assert_network_is_right(layers, vectors(), training=training)
    model = risk.model
    with untouched(model):
        risk.value(risk.theta + 1)
        risk.gradient(risk.theta + 1)


@pytest.mark.parametrize("how", ["pairs", "closure"])
def test_a_model_that_writes_into_its_input_is_one_function(how):
    problem, (x, y) = softmax_regression(), softmax_regression().data
    model = Applied(lambda m, x: m.layer(x.sub_(1).div_(2)), layer=problem.model)
    if how == "pairs":
        risk = EmpiricalRisk(model, problem.loss, (2 * x + 1, y), chunk_size=7)
    else:
        risk = EmpiricalRisk(
            model,
            closure=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            data=[(2 * x + 1, y)],
        )
    value = float(problem.f(problem.theta))
    assert [risk.value(), risk.value()] == pytest.approx([value] * 2, rel=ROUNDING)
    assert_near(risk.hvp(torch.eye(16)), problem.hessian, 1e-10)


def test_a_loss_that_writes_into_its_targets_is_one_function():
    problem, (x, y) = softmax_regression(), softmax_regression().data

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets.sub_(1))

    risk = EmpiricalRisk(problem.model, loss, (x, y + 1), chunk_size=7, terms=len)
    values = [risk.value(), risk.value()]
    assert values == pytest.approx([float(problem.f(problem.theta))] * 2, rel=ROUNDING)
    assert_near(risk.hvp(torch.eye(16)), problem.hessian, 1e-10)


# -- models that cannot be measured ------------------------------------------------------


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight).abs()


def meta_part():
    return nn.Sequential(nn.Linear(3, 3).double(), nn.Linear(3, 4, device="meta"))


REFUSED = {
    "lazy": (lambda: nn.LazyLinear(4), "initiali[sz]ed"),
    "lazy part": (
        lambda: nn.Sequential(nn.Linear(3, 3).double(), nn.LazyLinear(4)),
        "initiali[sz]ed",
    ),
    "lazy buffers": (
        lambda: nn.Sequential(linear().double(), nn.LazyBatchNorm1d(affine=False)),
        "initiali[sz]ed",
    ),
    "meta": (lambda: nn.Linear(3, 4, device="meta"), "meta"),
    "meta part": (meta_part, "meta"),
    "complex": (Complex, "complex"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_measured_is_refused_in_one_line(name):
    build, what = REFUSED[name]
    data = vectors(5, 3), vectors(5, 4)
    with pytest.raises((TypeError, ValueError), match=f"`model` must .*{what}") as caught:
        EmpiricalRisk(build(), nn.MSELoss(), data)
    assert "\n" not in str(caught.value)


def computed_again(m, x):
    return checkpoint(lambda z: torch.tanh(m.layer(z)), x, use_reentrant=False)


def test_gradient_checkpointing_is_refused_or_right_away_from_theta_too():
    model = Applied(computed_again, layer=linear().double())
    x, y = vectors(), vectors(5, 4) + 1
    _, gradient = oracle(model, lambda other: ((other(x) - y) ** 2).mean())
    there = flat(model) + 1
    try:
        found = EmpiricalRisk(model, nn.MSELoss(), (x, y)).gradient(there)
    except ValueError as error:
        assert "gradient checkpointing" in str(error)  # noqa: PT017
    else:
        assert_near(found, gradient(there), ROUNDING)


SEVERAL_OUTPUTS = {
    "tuple": (lambda m, x: (m.layer(x), x), lambda o, y: F.mse_loss(o[0], y)),
    "dict": (lambda m, x: {"z": m.layer(x)}, lambda o, y: F.mse_loss(o["z"], y)),
}


@pytest.mark.parametrize("name", SEVERAL_OUTPUTS)
def test_a_loss_of_several_outputs_need_not_say_its_terms(name):
    forward, loss = SEVERAL_OUTPUTS[name]
    model, (x, y) = Applied(forward, layer=linear().double()), (vectors(), vectors())
    risk = EmpiricalRisk(model, loss, (x, y), chunk_size=2)
    assert risk.value() == pytest.approx(float(loss(model(x), y).detach()), rel=ROUNDING)
    assert risk.chunk_size == 2
    with pytest.raises(TypeError, match=r"`(model|outputs)` must"):
        risk.outputs()


def test_sparse_gradients_of_an_embedding_are_measured():
    y = vectors(5, 3, 4)
    risks = []
    for sparse in (True, False):
        layers = [nn.Embedding(5, 4, sparse=sparse), nn.Tanh(), linear()]
        model = filled(nn.Sequential(*layers).double(), generator(0))
        risks.append(EmpiricalRisk(model, nn.MSELoss(), (tokens(), y)))
    v = directions(1, risks[0].n)[0]
    assert_near(*(risk.gradient() for risk in risks), ROUNDING)
    assert_near(*(risk.hvp(v) for risk in risks), 1e-5)
