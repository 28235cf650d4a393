import math
from collections import Counter

import pytest
import torch
from torch import nn

from sharpness.lab.networks import (
    NETWORKS,
    _SamePool,
    arguments_for,
    build,
    c1,
    f1,
    initialise,
)

COLOUR = torch.Size([3, 32, 32])
SMALL = {
    "F1": {"in_features": 12, "num_classes": 3},
    "C1": {"in_channels": 1, "image_size": 8, "num_classes": 3},
}


@pytest.mark.parametrize(
    ("name", "image", "num_classes", "expected"),
    [
        ("F1", torch.Size([1, 28, 28]), 10, 1_462_794),
        ("C1", COLOUR, 10, 1_757_834),
        ("C1", COLOUR, 100, 1_775_204),
    ],
)
def test_a_network_has_as_many_parameters_as_in_the_paper(
    name, image, num_classes, expected
):
    arguments = arguments_for(name, image, num_classes)
    model = build({"name": name, "arguments": arguments})
    assert sum(p.numel() for p in model.parameters()) == expected
    assert all(p.requires_grad for p in model.parameters())
    assert model.eval()(torch.zeros(2, *image)).shape == (2, num_classes)


def test_the_defaults_are_the_papers_sizes():
    assert sum(p.numel() for p in f1().parameters()) == 1_462_794
    assert sum(p.numel() for p in c1().parameters()) == 1_757_834


def test_f1_is_five_times_linear_batchnorm_relu():
    kinds = [type(layer) for layer in f1()]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 5
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


@pytest.mark.parametrize("size", range(1, 10))
def test_c1_fits_images_of_any_size(size):
    model = c1(in_channels=2, image_size=size, num_classes=3).eval()
    assert model(torch.zeros(2, 2, size, size)).shape == (2, 3)


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


# -- initialisation ----------------------------------------------------------------------


def started(name, seed):
    model = NETWORKS[name](**SMALL[name])
    initialise(model, seed)
    return model


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return [*a] == [*b] and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_seed_means_the_same_bits_whatever_was_drawn_before(name):
    model = started(name, 3)
    before = torch.get_rng_state()
    initialise(model, 3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert equal(model, started(name, 3))
    assert not equal(model, started(name, 4))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_used_network_starts_afresh(name):
    model = started(name, 3)
    shape = (2, 12) if name == "F1" else (2, 1, 8, 8)
    model.train()(torch.randn(shape))  # moves the running averages
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    initialise(model, 3)
    assert equal(model, started(name, 3))


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_uniform_within_glorots_bound_and_biases_zero(name):
    model = started(name, 0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fans = module.in_features + module.out_features
        elif isinstance(module, nn.Conv2d):
            fans = 5 * 5 * (module.in_channels + module.out_channels)
        else:
            continue
        weights = module.weight.detach().double().flatten()
        bound, num = math.sqrt(6 / fans), len(weights)
        assert float(weights.abs().max()) <= bound * (1 + 1e-6)
        # Four standard errors of the mean and of the mean square of a uniform.
        assert abs(float(weights.mean())) <= 4 * bound / math.sqrt(3 * num)
        square = float((weights**2).mean())
        assert abs(square - bound**2 / 3) <= 4 * bound**2 * math.sqrt(4 / 45 / num)
        assert not module.bias.any()


@pytest.mark.parametrize("name", NETWORKS)
def test_batchnorm_starts_as_the_identity(name):
    norms = [m for m in started(name, 0).modules() if isinstance(m, BATCHNORMS)]
    assert len(norms) == {"F1": 5, "C1": 4}[name]
    for norm in norms:
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
        assert not norm.running_mean.any()
        assert (norm.running_var == 1).all()


BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


# -- names -------------------------------------------------------------------------------


def test_arguments_fit_the_images():
    assert arguments_for("F1", COLOUR, 7) == {"in_features": 3072, "num_classes": 7}
    assert arguments_for("C1", COLOUR, 7) == {
        "in_channels": 3,
        "image_size": 32,
        "num_classes": 7,
    }


def test_a_network_is_built_from_its_name_and_arguments():
    kinds = Counter(type(m) for m in build({"name": "F1", "arguments": SMALL["F1"]}))
    assert kinds[nn.Linear] == 6
    default = build({"name": "F1"})
    assert default[1].in_features == 784


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"name": "F2"}, r"must be one of F1, C1; got 'F2'\. Did you mean F1\?"),
        ({"name": "c1"}, r"got 'c1'\. Did you mean C1\?"),
        ({"name": "os.system"}, "got 'os.system'"),
        ({"name": None}, "got None"),
        ({}, "got None"),
        ({"name": "F1", "arguments": {"width": 3}}, r"F1 takes; got \{'width': 3\}"),
        ({"name": "C1", "arguments": {"image_size": "a"}}, "C1 takes; got"),
        ({"name": "F1", "arguments": {"in_features": -1}}, "F1 takes; got"),
        ({"name": "F1", "arguments": None}, "F1 takes; got None"),
    ],
)
def test_a_network_that_is_not_known_is_refused(network, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(network)
    assert str(caught.value).startswith("`network` must ")
    assert "\n" not in str(caught.value)
