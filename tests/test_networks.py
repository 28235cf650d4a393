import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import sharpness
from sharpness.lab.named import parsed
from sharpness.lab.networks import (
    NETWORKS,
    _PaddedShortcut,
    _SamePool,
    _Sum,
    arguments_for,
    build,
    c1,
    f1,
    initialisation_of,
    initialise,
    resnet,
    wide_resnet,
)

COLOUR = torch.Size([3, 32, 32])
DENSE = {"in_features": 12, "num_classes": 3}
SQUARE = {"in_channels": 1, "image_size": 8, "num_classes": 3}
ANY_SIZE = {"in_channels": 1, "num_classes": 3}
SMALL = {
    **dict.fromkeys(("F1", "F2"), DENSE),
    **dict.fromkeys(("C1", "C2", "C3", "C4", "AlexNet"), SQUARE),
    **dict.fromkeys(("ResNet-8", "ResNet-20", "ResNet-32", "WRN-16-4"), ANY_SIZE),
    "GPT": {"vocabulary": 5, "length": 6, "width": 8, "heads": 2},
    "MLP": {"in_features": 12, "width": 5},
}
# C3 and C4 are C1 and C2 with another default.
DISTINCT = [name for name in NETWORKS if name not in ("C3", "C4")]
VARIANTS = [
    *DISTINCT,
    "AlexNet?batchnorm='convolutions'",
    "AlexNet?batchnorm=False",
    "ResNet-8?batchnorm=False",
    "ResNet-32?batchnorm=False",
]
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
NORMS = (*BATCHNORMS, nn.LayerNorm)


def started(variant, seed):
    name, arguments = parsed(variant)
    model = NETWORKS[name](**SMALL[name], **arguments)
    initialise(model, seed)
    return model


def samples(variant, num=2, seed=0):
    """Inputs and targets that fit a small network, and the loss that joins them."""
    name, generator = parsed(variant)[0], torch.Generator().manual_seed(seed)
    if name == "GPT":
        tokens = torch.randint(5, (num, 7), generator=generator)
        return tokens[:, :-1], tokens[:, 1:], nn.CrossEntropyLoss()
    shape = (12,) if "in_features" in SMALL[name] else (1, 8, 8)
    x = torch.randn(num, *shape, generator=generator)
    if name == "MLP":
        return x, torch.randn(num, 1, generator=generator), nn.MSELoss()
    return x, torch.arange(num) % 3, nn.CrossEntropyLoss()


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


# -- sizes -------------------------------------------------------------------------------


def conv(wide, narrow, size=3, bias=True):
    return narrow * (wide * size**2 + bias)


def dense(wide, narrow):
    return narrow * (wide + 1)


def norms(*channels):
    return 2 * sum(channels)


def fully_connected(*sizes):
    hidden = sum(dense(*pair) for pair in pairwise(sizes[:-1]))
    return hidden + norms(*sizes[1:-1]) + dense(*sizes[-2:])


def residual(num_blocks):
    """He et al.: every 3x3 convolution followed by BatchNorm, shortcuts for free."""
    widths = [16] * (2 * num_blocks + 1) + [32] * 2 * num_blocks + [64] * 2 * num_blocks
    layers = sum(conv(*pair, bias=False) for pair in pairwise([3, *widths]))
    return layers + norms(*widths) + dense(64, 10), sum(widths)


def wide_residual():
    """Two blocks a stage: BatchNorm before each convolution, 1x1 where widths change."""
    widths = [16, *[64] * 4, *[128] * 4, *[256] * 4]
    layers = sum(conv(*pair, bias=False) for pair in pairwise([3, *widths]))
    shortcuts = 16 * 64 + 64 * 128 + 128 * 256
    return layers + norms(*widths) + shortcuts + dense(256, 10)


def deep(num_classes):
    widths = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    convolutions = sum(conv(*pair) for pair in pairwise([3, *widths]))
    hidden = dense(512, 512) + norms(512)  # five pools leave one pixel of 32x32
    return convolutions + norms(*widths) + hidden + dense(512, num_classes)


def shallow(num_classes):
    convolutions = conv(3, 64, 5) + conv(64, 64, 5) + norms(64, 64)
    hidden = dense(64 * 8 * 8, 384) + dense(384, 192) + norms(384, 192)
    return convolutions + hidden + dense(192, num_classes)


def reduced_alexnet(normed=()):
    convolutions = conv(3, 16, 5) + conv(16, 48) + conv(48, 96) + conv(96, 64)
    convolutions += conv(64, 64)
    hidden = dense(64 * 4 * 4, 256) + dense(256, 256)
    return convolutions + hidden + norms(*normed) + dense(256, 10)


def transformer(vocabulary, length, width, depth):
    attention = dense(width, 3 * width) + dense(width, width)
    wider = dense(width, 4 * width) + dense(4 * width, width)
    blocks = depth * (attention + wider + norms(width, width))
    head = norms(width) + dense(width, vocabulary)
    return (vocabulary + length) * width + blocks + head


PIXELS, CONVOLVED = torch.Size([1, 28, 28]), (16, 48, 96, 64, 64)
COUNTS = [
    ("F1", PIXELS, 10, fully_connected(784, *[512] * 5, 10)),
    ("F1", PIXELS, 10, 1_462_794),
    ("F2", torch.Size([360]), 1973, fully_connected(360, *[512] * 7, 1973)),
    ("F2", torch.Size([360]), 1973, 2_780_085),
    ("C1", COLOUR, 10, shallow(10)),
    ("C1", COLOUR, 10, 1_757_834),
    ("C3", COLOUR, 100, 1_775_204),
    ("C2", COLOUR, 10, deep(10)),
    ("C2", COLOUR, 10, 14_991_946),
    ("C4", COLOUR, 100, 15_038_116),
    ("AlexNet", COLOUR, 10, reduced_alexnet((*CONVOLVED, 256, 256))),
    ("AlexNet", COLOUR, 10, 474_394),
    ("AlexNet?batchnorm=convolutions", COLOUR, 10, reduced_alexnet(CONVOLVED)),
    ("AlexNet?batchnorm=False", COLOUR, 10, reduced_alexnet()),
    ("ResNet-8", COLOUR, 10, residual(1)[0]),
    ("ResNet-20", COLOUR, 10, residual(3)[0]),
    ("ResNet-20", COLOUR, 10, 269_722),
    ("ResNet-32", COLOUR, 10, residual(5)[0]),
    # A bias for each channel in place of BatchNorm's two parameters.
    ("ResNet-20?batchnorm=False", COLOUR, 10, 269_722 - residual(3)[1]),
    ("WRN-16-4", COLOUR, 10, wide_residual()),
    ("WRN-16-4", COLOUR, 10, 2_748_890),
    ("GPT", torch.Size([16]), 20, transformer(20, 16, 64, 2)),
    ("GPT?width=6&depth=3&heads=3", torch.Size([4]), 9, transformer(9, 4, 6, 3)),
    ("MLP", torch.Size([4]), None, dense(4, 32) + dense(32, 32) + dense(32, 1)),
    ("MLP?depth=1&width=7", torch.Size([4]), 3, dense(4, 7) + dense(7, 3)),
]


@pytest.mark.parametrize(("variant", "shape", "num_classes", "expected"), COUNTS)
def test_a_network_has_as_many_parameters_as_in_the_paper(
    variant, shape, num_classes, expected
):
    name, arguments = parsed(variant)
    arguments |= arguments_for(name, shape, num_classes)
    model = build({"name": name, "arguments": arguments})
    assert num_parameters(model) == expected
    assert all(p.requires_grad for p in model.parameters())
    kind = torch.int64 if name == "GPT" else torch.float32
    outputs = model.eval()(torch.zeros(2, *shape, dtype=kind))
    rest = shape if name == "GPT" else ()
    assert outputs.shape == (2, num_classes or 1, *rest)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("F1", 1_462_794),
        ("F2", 2_780_085),
        ("C1", 1_757_834),
        ("C2", 14_991_946),
        ("C3", 1_775_204),
        ("C4", 15_038_116),
        ("ResNet-20", 269_722),
    ],
)
def test_the_defaults_are_the_papers_sizes(name, expected):
    assert num_parameters(NETWORKS[name]()) == expected


@pytest.mark.parametrize(("name", "depth"), [("F1", 5), ("F2", 7)])
def test_f1_and_f2_are_linear_batchnorm_relu_again_and_again(name, depth):
    kinds = [type(layer) for layer in NETWORKS[name]()]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * depth
    assert kinds == [nn.Flatten, *hidden, nn.Linear]


def test_c1_has_batchnorm_before_every_relu_and_dropout_after_dense_layers():
    conv = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, _SamePool]
    dense = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in c1()] == [
        *conv * 2,
        nn.Flatten,
        *dense * 2,
        nn.Linear,
    ]
    assert [m.p for m in c1().modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    strides = {m.stride for m in c1().modules() if isinstance(m, nn.Conv2d)}
    assert strides == {(1, 1)}


def test_c2_has_dropout_between_the_convolutions_of_a_block_as_in_the_authors_code():
    # Letters in order: a convolution with its BatchNorm and ReLU, a pool, dropout's rate.
    marks = {nn.Conv2d: "c", nn.MaxPool2d: "p", nn.Flatten: "f", nn.Linear: "d"}
    written = ""
    for layer in NETWORKS["C2"](**SQUARE):
        if isinstance(layer, nn.Dropout):
            written += str(round(10 * layer.p))
        written += marks.get(type(layer), "")
    assert written == "c3cp" + "c4cp" + "c4c4cp" * 3 + "f5d5d"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, size) for name in ("C1", "AlexNet", "ResNet-8") for size in range(1, 10)),
        *((name, size) for name in ("C2", "WRN-16-4") for size in (1, 9, 28)),
    ],
)
def test_convolutions_fit_images_of_any_size(name, size):
    shape = torch.Size([2, size, size])
    model = NETWORKS[name](**arguments_for(name, shape, 3)).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize(
    ("batchnorm", "batchnorms", "convolution_biases"),
    [("all", 7, 5), ("convolutions", 5, 5), (False, 0, 5)],
)
def test_alexnet_has_three_variants(batchnorm, batchnorms, convolution_biases):
    model = NETWORKS["AlexNet"](batchnorm=batchnorm)
    kinds = Counter(type(m) for m in model)
    assert kinds[nn.BatchNorm1d] + kinds[nn.BatchNorm2d] == batchnorms
    assert kinds[nn.BatchNorm2d] == (5 if batchnorm else 0)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size[0] for m in convolutions] == [5, 3, 3, 3, 3]
    assert {m.stride for m in convolutions} == {(1, 1)}
    assert sum(m.bias is not None for m in convolutions) == convolution_biases
    assert kinds[nn.ReLU] == 7
    assert kinds[_SamePool] == 3


def pooled_by_hand(image):
    """TensorFlow's "same": the odd cell of padding, if any, goes right and below.

    Windows start at 2 i where the size is even, one earlier where it is odd.
    """
    height, width = image.shape
    rows, columns = math.ceil(height / 2), math.ceil(width / 2)
    out = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            cells = [
                float(image[y, x])
                for y in range(2 * i - height % 2, 2 * i - height % 2 + 3)
                for x in range(2 * j - width % 2, 2 * j - width % 2 + 3)
                if 0 <= y < height and 0 <= x < width
            ]
            out[i, j] = max(cells)
    return out


@pytest.mark.parametrize("height", range(1, 9))
@pytest.mark.parametrize("width", [1, 4, 7, 8])
def test_pooling_pads_as_tensorflow_does(height, width):
    images = -1 - torch.rand(2, 3, height, width)  # a padding of zeros would win
    pooled = _SamePool()(images)
    assert pooled.shape == (2, 3, math.ceil(height / 2), math.ceil(width / 2))
    for image, result in zip(images.flatten(0, 1), pooled.flatten(0, 1), strict=True):
        assert torch.equal(result, pooled_by_hand(image))


# -- residual blocks ---------------------------------------------------------------------


def convolved_by_hand(image, weight, bias, stride):
    """A 3x3 convolution of one image (C, H, W) with a border of zeros."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    rows = range(0, image.shape[1], stride)
    columns = range(0, image.shape[2], stride)
    windows = [[padded[:, i : i + 3, j : j + 3] for j in columns] for i in rows]
    out = [[(window * weight).sum((1, 2, 3)) for window in row] for row in windows]
    return np.array(out).transpose(2, 0, 1) + bias[:, None, None]


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("block", [3, 4], ids=["same width", "twice the width"])
def test_a_residual_block_is_relu_of_shortcut_and_two_convolutions(block, size):
    # The stem is a convolution and a ReLU; of two blocks a stage, the third is wider.
    model = resnet(2, batchnorm=False).double()[block]
    wider = block == 4
    channels, stride = 16, 2 if wider else 1
    image = torch.randn(channels, size, size, dtype=torch.float64)
    first, second = (m for m in model.modules() if isinstance(m, nn.Conv2d))

    x = image.numpy()
    hidden = convolved_by_hand(x, *numbers(first), stride).clip(0)
    shortcut = np.zeros_like(hidden)
    for channel in range(channels):
        for i in range(hidden.shape[1]):
            for j in range(hidden.shape[2]):
                shortcut[channel, i, j] = x[channel, stride * i, stride * j]
    expected = (shortcut + convolved_by_hand(hidden, *numbers(second), 1)).clip(0)

    assert any(isinstance(m, _PaddedShortcut) for m in model.modules()) == wider
    torch.testing.assert_close(model(image[None])[0], torch.from_numpy(expected))


def numbers(layer):
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


def test_type_a_adds_channels_of_zeros_behind():
    image = torch.arange(2.0 * 9).reshape(1, 2, 3, 3)
    expected = torch.zeros(1, 5, 2, 2)
    expected[0, 0] = torch.tensor([[0.0, 2], [6, 8]])
    expected[0, 1] = torch.tensor([[9.0, 11], [15, 17]])
    assert torch.equal(_PaddedShortcut(2, 3)(image), expected)


@pytest.mark.parametrize(("block", "stride"), [(1, 1), (2, 1), (3, 2), (6, 1)])
def test_a_block_of_wrn_activates_first_and_its_sum_stays_bare(block, stride):
    model = wide_resnet()[block].eval()
    sums = [m for m in model.modules() if isinstance(m, _Sum)]
    wide = next(m.num_features for m in model.modules() if isinstance(m, BATCHNORMS))
    with torch.no_grad():
        [m for m in sums[0].body if isinstance(m, nn.Conv2d)][-1].weight.zero_()
    x = torch.randn(2, wide, 4, 4)
    expected = x
    if isinstance(sums[0].shortcut, nn.Conv2d):  # widths change: 1x1, of the activated x
        kernel = sums[0].shortcut.weight[:, :, 0, 0]
        active = x.clamp(min=0)[..., ::stride, ::stride] / math.sqrt(1 + 1e-5)
        expected = torch.einsum("oc,bchw->bohw", kernel, active)
    assert isinstance(sums[0].shortcut, nn.Conv2d) == (block in (1, 3))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("ResNet-8", [(16, 8)] * 2 + [(32, 4)] + [(64, 2)]),
        ("WRN-16-4", [(16, 8)] + [(64, 8)] * 2 + [(128, 4)] * 2 + [(256, 2)] * 2),
    ],
)
def test_stages_double_the_channels_and_halve_the_image(name, stages):
    shapes, x = [], torch.zeros(2, 1, 8, 8)
    for layer in NETWORKS[name](**ANY_SIZE).eval():
        x = layer(x)
        whole = isinstance(layer, nn.Conv2d | _Sum | nn.Sequential)
        shapes += [(x.shape[1], x.shape[2])] if whole else []
    assert shapes == stages


# -- GPT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(6))
def test_a_later_token_changes_no_earlier_output(place):
    model = started("GPT", 0).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)  # away from attention that weighs all tokens alike
    tokens = samples("GPT")[0]
    changed = tokens.clone()
    changed[:, place] = (tokens[:, place] + 1) % 5
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 5, 6)
    torch.testing.assert_close(before[..., :place], after[..., :place])
    moved = (before - after).abs().amax(1)[:, place:]
    assert bool((moved > 1e-9).all())  # attention sees all that came before


def test_gpt_is_what_its_formulas_say():
    width, heads, length = 4, 2, 3
    model = NETWORKS["GPT"](vocabulary=5, length=4, width=width, depth=2, heads=heads)
    state = model.double().state_dict()
    with torch.no_grad():
        for value in state.values():
            value.normal_()  # LayerNorm's parameters and biases too
    p = {name: value.numpy() for name, value in state.items()}

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def normed(x, name):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attention(x, name):
        q, k, v = np.split(linear(x, f"{name}.queries_keys_values"), 3, axis=1)
        out = np.zeros((length, width))
        for head in np.split(np.arange(width), heads):
            for i in range(length):
                scores = k[: i + 1, head] @ q[i, head] / math.sqrt(width / heads)
                shares = np.exp(scores) / np.exp(scores).sum()
                out[i, head] = shares @ v[: i + 1, head]
        return linear(out, f"{name}.mixed")

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    tokens = torch.tensor([[4, 0, 2]])
    x = p["tokens.weight"][tokens[0].numpy()] + p["positions.weight"][:length]
    for block in range(2):
        attended, widened = f"blocks.{2 * block}.body", f"blocks.{2 * block + 1}.body"
        x = x + attention(normed(x, f"{attended}.0"), f"{attended}.1")
        hidden = gelu(linear(normed(x, f"{widened}.0"), f"{widened}.1"))
        x = x + linear(hidden, f"{widened}.3")
    expected = linear(normed(x, "head.0"), "head.1").T[None]
    torch.testing.assert_close(model(tokens), torch.from_numpy(expected))


# -- every network can be trained and measured -------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_samples_give_a_finite_loss_and_gradient(variant):
    model, (x, y, loss) = started(variant, 0).train(), samples(variant)
    value = loss(model(x), y)
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def normalised(model, x):
    """With running statistics of these samples: else C2's activations vanish by depth."""
    for m in model.modules():
        m.momentum = 1.0
    model.train()(x)
    model.eval()


HEAVY = ("C2", "ResNet-20", "ResNet-32", "WRN-16-4")  # one of each kind is left


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=[pytest.mark.slow] if v.startswith(HEAVY) else [])
        for v in VARIANTS
    ],
)
def test_a_product_is_the_difference_of_two_gradients(variant):
    model, (x, y, loss) = started(variant, 0).double(), samples(variant, 16)
    x = x.double() if x.is_floating_point() else x
    normalised(model, x)
    x, y = x[:2], y[:2]
    # All but the largest layers of C2, whose products take seconds.
    named = {n: p for n, p in model.named_parameters() if p.numel() < 10**6}
    parameters = list(named.values())
    theta = parameters_to_vector(parameters).detach()

    def gradient(at):
        vector_to_parameters(at, parameters)
        parts = torch.autograd.grad(loss(model(x), y), parameters)
        return torch.cat([part.flatten() for part in parts])

    risk = sharpness.EmpiricalRisk(model, loss, (x, y), params=list(named))
    v = gradient(theta)
    v, step = v / v.norm(), 1e-7
    expected = (gradient(theta + step * v) - gradient(theta - step * v)) / (2 * step)
    difference = (risk.hvp(v) - expected).norm() / expected.norm()
    assert float(difference) <= 1e-7  # gradients, known to 1e-15, are divided by 2e-7


# -- initialisation ----------------------------------------------------------------------


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return [*a] == [*b] and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", DISTINCT)
def test_a_seed_means_the_same_bits_whatever_was_drawn_before(name):
    model = started(name, 3)
    before = torch.get_rng_state()
    initialise(model, 3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert equal(model, started(name, 3))
    assert not equal(model, started(name, 4))


@pytest.mark.parametrize("name", DISTINCT)
def test_a_used_network_starts_afresh(name):
    model = started(name, 3)
    model.train()(samples(name)[0])  # moves the running averages
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    initialise(model, 3)
    assert equal(model, started(name, 3))


OWN = {
    "glorot_uniform": ["F1", "F2", "C1", "C2", "C3", "C4", "MLP"],
    "he_normal": ["AlexNet", "ResNet-8", "ResNet-20", "ResNet-32", "WRN-16-4"],
    "normal_0.02": ["GPT"],
}
HOW = {name: how for how, names in OWN.items() for name in names}


def fans(layer):
    narrow, wide = layer.weight.shape[:2]
    return wide * layer.weight[0, 0].numel(), narrow * layer.weight[0, 0].numel()


def variance(how, layer):
    fan_in, fan_out = fans(layer)
    known = {
        "glorot_uniform": 2 / (fan_in + fan_out),
        "he_normal": 2 / fan_in,
        "normal_0.02": 4e-4,
    }
    return known[how]


@pytest.mark.parametrize("name", DISTINCT)
def test_weights_have_the_variance_of_their_initialisation_and_biases_are_zero(name):
    how = HOW[name]
    fourth = 9 / 5 if how == "glorot_uniform" else 3  # of a uniform, of a normal
    drawn = [m for m in started(name, 0).modules() if isinstance(m, DRAWN)]
    assert len(drawn) > 2
    for module in drawn:
        weights, wanted = module.weight.detach().double(), variance(how, module)
        num = weights.numel()
        # Five standard errors of the mean and of the mean square.
        assert abs(float(weights.mean())) <= 5 * math.sqrt(wanted / num)
        error = wanted * math.sqrt((fourth - 1) / num)
        assert abs(float((weights**2).mean()) - wanted) <= 5 * error
        if how == "glorot_uniform":
            assert float(weights.abs().max()) <= math.sqrt(3 * wanted) * (1 + 1e-6)
        bias = getattr(module, "bias", None)
        assert bias is None or not bias.any()


DRAWN = (nn.Linear, nn.Conv2d, nn.Embedding)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_is_left_as_it_was(variant):
    model = started(variant, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    initialise(model, 0)
    assert not any(bool((p == 7.0).any()) for p in model.parameters())


def test_a_network_starts_by_default_as_its_paper_did():
    assert set(HOW) == set(NETWORKS)
    assert {name: initialisation_of(name) for name in NETWORKS} == HOW


@pytest.mark.parametrize("name", ["F1", "ResNet-8", "GPT"])
def test_another_initialisation_can_be_asked_for(name):
    own, asked = (build({"name": name, "arguments": SMALL[name]}) for _ in range(2))
    initialise(own, 0)
    for how in OWN:
        initialise(asked, 0, how)
        assert equal(own, asked) == (how == HOW[name])


def test_a_foreign_model_starts_by_glorot():
    ours = started("ResNet-8", 2)
    theirs = nn.Sequential(*started("ResNet-8", 3))
    initialise(theirs, 2)
    assert not equal(ours, theirs)
    initialise(ours, 2, "glorot_uniform")
    assert equal(ours, theirs)


@pytest.mark.parametrize("how", ["he", "", "Glorot"])
def test_an_unknown_initialisation_is_refused(how):
    with pytest.raises(ValueError, match=r"^`how` must be one of glorot_uniform.*; got"):
        initialise(f1(3, 2), 0, how)


@pytest.mark.parametrize("name", DISTINCT)
def test_normalisation_starts_as_the_identity(name):
    found = [m for m in started(name, 0).modules() if isinstance(m, NORMS)]
    expected = {"F1": 5, "F2": 7, "C1": 4, "C2": 14, "AlexNet": 7}
    expected |= {"ResNet-8": 7, "ResNet-20": 19, "ResNet-32": 31, "WRN-16-4": 13}
    assert len(found) == {**expected, "GPT": 5, "MLP": 0}[name]
    for norm in found:
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
        if isinstance(norm, BATCHNORMS):
            assert not norm.running_mean.any()
            assert (norm.running_var == 1).all()


# -- names -------------------------------------------------------------------------------

NUMBERS, TOKENS = torch.Size([9]), torch.Size([6])


@pytest.mark.parametrize(
    ("name", "shape", "num_classes", "expected"),
    [
        ("F1", COLOUR, 7, {"in_features": 3072, "num_classes": 7}),
        ("F2", NUMBERS, 7, {"in_features": 9, "num_classes": 7}),
        ("C1", COLOUR, 7, {"in_channels": 3, "image_size": 32, "num_classes": 7}),
        ("C4", COLOUR, 7, {"in_channels": 3, "image_size": 32, "num_classes": 7}),
        ("AlexNet", COLOUR, 7, {"in_channels": 3, "image_size": 32, "num_classes": 7}),
        ("ResNet-20", COLOUR, 7, {"in_channels": 3, "num_classes": 7}),
        ("WRN-16-4", torch.Size([1, 8, 9]), 7, {"in_channels": 1, "num_classes": 7}),
        ("GPT", TOKENS, 7, {"vocabulary": 7, "length": 6}),
        ("MLP", NUMBERS, None, {"in_features": 9, "out_features": 1}),
        ("MLP", COLOUR, 7, {"in_features": 3072, "out_features": 7}),
    ],
)
def test_arguments_fit_the_data(name, shape, num_classes, expected):
    assert arguments_for(name, shape, num_classes) == expected


def test_regression_has_as_many_outputs_as_a_target_has_columns():
    found = arguments_for("MLP", NUMBERS, None, torch.Size([3]))
    assert found == {"in_features": 9, "out_features": 3}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("C1", NUMBERS, 7), r"\(9,\) with 7 classes .* got C1, which takes images \(ch"),
        (("C2", torch.Size([3, 8, 9]), 7), r"got C2, which takes square images\."),
        (("ResNet-8", NUMBERS, 7), "got ResNet-8, which takes images"),
        (("GPT", COLOUR, 7), "got GPT, which takes sequences of tokens"),
        (("GPT", TOKENS, None), "with numbers as targets; got GPT, which takes classes"),
        (("F1", NUMBERS, None), r"classes as targets\. Those that fit: MLP\.$"),
        (("F1", torch.Size([]), 7), r"got F1, .* Those that fit: none\.$"),
        (("MLP", NUMBERS, None, torch.Size([])), "got MLP, .* targets of one dimension"),
        (("MLP", NUMBERS, None, torch.Size([2, 2])), "targets of one dimension"),
        (("C9", COLOUR, 7), r"one of F1, .*; got 'C9'\. Did you mean C"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        arguments_for(*data)
    assert str(caught.value).startswith("`network` must ")
    assert "\n" not in str(caught.value)


def test_those_that_fit_are_named():
    with pytest.raises(ValueError, match=r"Those that fit: F1, F2, GPT, MLP\.$"):
        arguments_for("C1", NUMBERS, 7)
    with pytest.raises(ValueError, match=r"fit: F1, F2, ResNet-8, .*, WRN-16-4, MLP"):
        arguments_for("C1", torch.Size([3, 8, 9]), 7)


def test_a_network_is_built_from_its_name_and_arguments():
    kinds = Counter(type(m) for m in build({"name": "F1", "arguments": SMALL["F1"]}))
    assert kinds[nn.Linear] == 6
    default = build({"name": "F1"})
    assert default[1].in_features == 784


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("F1", ("F1", {})),
        ("ResNet-8?batchnorm=False", ("ResNet-8", {"batchnorm": False})),
        ("MLP?width=8&depth=3", ("MLP", {"width": 8, "depth": 3})),
        ("AlexNet?batchnorm=convolutions", ("AlexNet", {"batchnorm": "convolutions"})),
        ("any?rate=1e+3&name=&of=[1, 2]", ("any", {"rate": 1e3, "name": "", "of": [1, 2]})),
        ("?", ("", {})),
    ],
)
def test_a_variant_is_a_name_with_arguments(text, expected):
    assert parsed(text) == expected


@pytest.mark.parametrize("text", ["F1?width", "F1?a=1&b", "F1?&"])
def test_an_argument_without_a_value_is_refused(text):
    with pytest.raises(ValueError, match=r"`arguments` must be .*; got 'F1\?") as caught:
        parsed(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"name": "F3"}, r"must be one of F1, F2, C1, .*; got 'F3'\. Did you mean F"),
        ({"name": "c1"}, r"got 'c1'\. Did you mean C1\?"),
        ({"name": "resnet20"}, r"got 'resnet20'\. Did you mean ResNet-20\?"),
        ({"name": "os.system"}, r"got 'os.system'\.$"),
        ({"name": None}, "got None"),
        ({"name": ["F1"]}, r"got \['F1'\]"),
        ({}, "got None"),
        ({"name": "F1", "arguments": {"width": 3}}, r"F1 takes; got \{'width': 3\}"),
        ({"name": "F1", "arguments": {"a": 3}}, r"It takes in_features, num_classes\.$"),
        ({"name": "ResNet-8", "arguments": {"a": 3}}, r"takes in_channels, num_classes, b"),
        ({"name": "C1", "arguments": {"image_size": "a"}}, "C1 takes; got"),
        ({"name": "F1", "arguments": {"in_features": -1}}, "F1 takes; got"),
        (
            {"name": "F1", "arguments": {"in_features": 0}},
            "must be a whole number of at least 1; got 0",
        ),
        ({"name": "F1", "arguments": {"in_features": 2.5}}, "F1 takes; got"),
        ({"name": "F1", "arguments": None}, "F1 takes; got None"),
        ({"name": "F1", "arguments": [1]}, r"F1 takes; got \[1\]"),
        (
            {"name": "GPT", "arguments": {**SMALL["GPT"], "heads": 2.0}},
            "`heads` must be a whole number of at least 1; got 2.0",
        ),
        ({"name": "GPT"}, "missing 2 required .*: 'vocabulary' and 'length'"),
        (
            {"name": "GPT", "arguments": {**SMALL["GPT"], "heads": 3}},
            r"`heads` must divide width=8; got 3",
        ),
        (
            {"name": "ResNet-8", "arguments": {"batchnorm": "false"}},
            r"`batchnorm` must be one of True, False; got 'false'",
        ),
        (
            {"name": "AlexNet", "arguments": {"batchnorm": True}},
            r"`batchnorm` must be one of 'all', 'convolutions', False; got True",
        ),
    ],
)
def test_a_network_that_is_not_known_is_refused(network, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(network)
    assert str(caught.value).startswith("`network` must ")
    assert "\n" not in str(caught.value)


def test_a_function_put_into_the_table_is_a_network(monkeypatch):
    monkeypatch.setitem(NETWORKS, "mine", lambda in_features: nn.Linear(in_features, 2))
    assert initialisation_of("mine") == "glorot_uniform"
    arguments = arguments_for("mine", NUMBERS, 2)
    assert build({"name": "mine", "arguments": arguments}).in_features == 9
    with pytest.raises(ValueError, match=r"It takes in_features\.$"):
        build({"name": "mine", "arguments": {}})
