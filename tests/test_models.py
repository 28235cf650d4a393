"""Kinds of models, wrappers, types and data that people bring, each left as it was.

The oracle is first-order autograd on a copy of the model, and fourth-order differences of
its gradients.
"""

import copy
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import (
    assert_near,
    differenced_hvp,
    directions,
    filled,
    flat,
    generator,
    normal,
    quadratic_risk,
    softmax_regression,
    tiny_mlp,
)
from scipy.sparse.linalg import eigsh
from test_risk_untouched import assert_same, assert_states, fingerprint, random_states
from torch import nn
from torch.nn.utils import parametrizations
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
    near = lambda there: gradient(theta + step * (there - theta)) / step
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


def grid_sampled(m, x):
    grid = torch.tanh(m.layer(x[:, :, :3, :3].permute(0, 2, 3, 1)))
    return F.grid_sample(x, grid, align_corners=False)


def checkpointed(m, x):
    return checkpoint(lambda z: torch.tanh(m.layer(z)), x, use_reentrant=False)


def slopes(m, x):
    return torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(m.layer(z))))(x)


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
    "grid_sample": (lambda: Applied(grid_sampled, layer=nn.Linear(2, 2)), images),
    "checkpointed": (lambda: Applied(checkpointed, layer=linear()), vectors),
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
    padded = lambda m, x: m.encoder(x, src_key_padding_mask=last_is_padding(x))
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
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


def compiled_whole(model, backend):
    return torch.compile(model, backend=backend)


def compiled_and_run(model, backend):
    model = torch.compile(model, backend=backend)
    model(tiny_mlp().data[0]).sum().backward()
    model.zero_grad()
    return model


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


def compiled_submodule(model, backend):
    return nn.Sequential(torch.compile(model[0], backend=backend), *model[1:])


def compiled_submodule_in_place(model, backend):
    model[2].compile(backend=backend)
    return model


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
    model = compiled(problem.model, backend)
    first = model(problem.data[0])
    before = backend.num_graphs, backend.num_calls
    EmpiricalRisk(model, problem.loss, problem.data, chunk_size=7).hvp(directions(2, 44))
    assert (backend.num_graphs, backend.num_calls) == before
    assert torch.equal(model(problem.data[0]), first)
    assert (backend.num_graphs, backend.num_calls) == (before[0], before[1] + 1)


def test_parameters_of_a_compiled_model_keep_their_names_R30():
    problem = tiny_mlp()
    model = compiled_whole(problem.model, "eager")
    risk = EmpiricalRisk(model, problem.loss, problem.data, params="0.*")
    assert risk.n == 20


def masked_targets():
    return torch.where(torch.arange(23) % 5 < 2, -100, torch.arange(23) % 4)


def masked_loss(outputs, targets):
    return F.cross_entropy(outputs, targets, ignore_index=-100)


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
