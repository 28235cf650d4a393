"""Other parameters, the same function: what each map finds, scales and leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from sharpness.lab import networks
from sharpness.measures.reparametrise import Reparametrisation, reparametrisations

FACTORS = {0.125, 0.25, 0.5, 2.0, 4.0, 8.0}


def prepared(network: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In evaluation mode, every parameter and running statistic random and not zero."""
    draw = torch.Generator().manual_seed(5)
    network = network.double().eval()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / 2)
        for name, b in network.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=draw, dtype=torch.float64))
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=draw, dtype=torch.float64))
    return network.to(dtype)


def inputs(shape: tuple[int, ...], num: int = 12, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn((num, *shape), generator=draw, dtype=torch.float64)


def largest_change(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Of an output, relative to the largest; each network gets an x of its own."""
    with torch.no_grad():
        before, after = one(x.clone()), other(x.clone())
    return float((after - before).abs().max() / before.abs().max())


def changed_parameters(one: nn.Module, other: nn.Module) -> set[str]:
    others = dict(other.named_parameters())
    return {k for k, p in one.named_parameters() if not torch.equal(p, others[k])}


def maps_of(network: nn.Module, x: Tensor, **options) -> dict[str, Reparametrisation]:
    found = reparametrisations(network, x, **options)
    assert len({m.name for m in found}) == len(found)
    return {m.name: m for m in found}


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
    )


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(2, padding=1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(45, 3),
    )


def convolutional_with_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def affected(layers: tuple[str, ...], norm: tuple[str, ...] = ()) -> dict:
    both = {"layers": layers, "neurons": layers} if layers else {}
    return both | ({"batchnorm": norm, "batchnorm-neurons": norm} if norm else {})


# Network, shape of an input, and by map the layers whose weights are to be scaled.
SEARCHED = {
    "mlp": (mlp, (6,), affected(("0", "2"))),
    "batchnorm": (with_norm, (6,), affected(("1",), ("0",))),
    "tokens": (mlp, (5, 6), affected(("0", "2"))),
    "convolutions": (convolutional, (2, 10, 10), affected(("0", "3"))),
    "conv batchnorm": (convolutional_with_norm, (2, 6, 6), affected(("1",), ("0",))),
    "no path": (
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3)),
        (6,),
        affected(("0",)),
    ),
    "norm without weights": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 3)
        ),
        (6,),
        affected((), ("0",)),
    ),
    "grouped source": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.Flatten()
        ),
        (4, 5, 5),
        affected(("0",)),
    ),
    "zero padding": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(4, 3, 3)
        ),
        (2, 5, 5),
        affected(("0",)),
    ),
    "positions by a linear layer": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.ReLU(), nn.Linear(4, 2)),
        (3, 5),
        {"layers": ("0",)},
    ),
}


@pytest.mark.parametrize("case", SEARCHED)
def test_every_layer_that_a_map_applies_to_is_found(case):
    build, shape, expected = SEARCHED[case]
    found = maps_of(prepared(build()), inputs(shape))
    assert {name: m.layers for name, m in found.items()} == expected


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)]
)
@pytest.mark.parametrize("case", SEARCHED)
def test_the_function_stays_on_other_inputs_too_and_the_weights_change(
    case, dtype, tolerance
):
    build, shape, _ = SEARCHED[case]
    network = prepared(build(), dtype)
    given, others = inputs(shape).to(dtype), 3 * inputs(shape, 50, seed=2).to(dtype)
    for found in maps_of(network, given).values():
        assert found.drift == largest_change(network, found.network, given)
        assert found.drift <= tolerance
        assert largest_change(network, found.network, others) <= tolerance
        scaled = {f"{layer}.weight" for layer in found.layers}
        assert scaled <= changed_parameters(network, found.network)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("build", "arguments", "shape", "layers", "norm"),
    [
        (networks.f1, (64,), (64,), (2, 5, 8, 11, 14), (1, 4, 7, 10, 13)),
        (networks.c1, (1, 8), (1, 8, 8), (1, 5, 10, 14), (0, 4, 9, 13)),
    ],
)
def test_the_papers_networks_admit_all_four_maps(
    build, arguments, shape, layers, norm, dtype
):
    network = build(*arguments)
    networks.initialise(network, 0)
    network = network.to(dtype).train()
    x = inputs(shape, 60).to(dtype)
    with torch.no_grad():
        network(x)  # running averages other than 0 and 1
    network.eval()
    found = maps_of(network, x[:16])
    for m in found.values():
        assert m.drift <= (1e-12 if dtype is torch.float64 else 1e-6)
        if dtype is torch.float64:
            assert largest_change(network, m.network, x[16:]) <= 1e-12
        assert {f"{k}.weight" for k in m.layers} <= changed_parameters(network, m.network)
    expected = affected(tuple(map(str, layers)), tuple(map(str, norm)))
    assert {name: m.layers for name, m in found.items()} == expected


# -- what is scaled by what ----------------------------------------------------------


def ratio(after: Tensor, before: Tensor) -> Tensor:
    return after.detach() / before.detach()


@pytest.mark.parametrize("name", ["layers", "neurons"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_next_layer_takes_back_exactly_what_the_first_one_gains(name, dtype):
    network = prepared(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), dtype)
    after = maps_of(network, inputs((6,)).to(dtype))[name].network
    gain = ratio(after[0].bias, network[0].bias)
    assert set(gain.tolist()) <= FACTORS
    assert len(gain.unique()) == 1 if name == "layers" else len(gain.unique()) > 1
    assert torch.equal(after[0].weight, network[0].weight * gain[:, None])
    assert torch.equal(after[2].weight, network[2].weight / gain)
    assert torch.equal(after[2].bias, network[2].bias)


@pytest.mark.parametrize("name", ["batchnorm", "batchnorm-neurons"])
def test_running_statistics_are_scaled_along(name):
    network = prepared(with_norm())
    found = maps_of(network, inputs((6,)))[name]
    after, gain = found.network, ratio(found.network[0].bias, network[0].bias)
    assert set(gain.tolist()) <= {2.0, 4.0, 8.0}
    assert len(gain.unique()) == 1 if name == "batchnorm" else len(gain.unique()) > 1
    assert torch.equal(after[0].weight, network[0].weight * gain[:, None])
    assert torch.equal(after[1].running_mean, network[1].running_mean * gain)
    eps = network[1].eps
    wide = (network[1].running_var + eps) * gain**2
    torch.testing.assert_close(after[1].running_var + eps, wide, rtol=1e-14, atol=0)
    assert (after[1].running_var > 0).all()
    for part in (1, 3):
        for p, q in zip(network[part].parameters(), after[part].parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_pixel_of_a_flattened_image_keeps_the_factor_of_its_channel():
    network = prepared(convolutional())
    found = maps_of(network, inputs((2, 10, 10)))["neurons"].network
    gain = ratio(found[3].bias, network[3].bias)
    per_pixel = 1 / gain.repeat_interleave(9)
    torch.testing.assert_close(
        ratio(found[8].weight, network[8].weight), per_pixel.expand(3, 45), rtol=0, atol=0
    )


def test_the_same_seed_gives_the_same_parameters_and_another_one_others():
    network, x = prepared(with_norm()), inputs((6,))
    first, again, other = (maps_of(network, x, seed=s) for s in (3, 3, 4))
    for name in first:
        assert not changed_parameters(first[name].network, again[name].network)
    for name in ("neurons", "batchnorm-neurons"):
        assert changed_parameters(first[name].network, other[name].network)


# -- the network that is given -------------------------------------------------------


def facts(network: nn.Module) -> list:
    return [
        (name, m.training, len(m._forward_hooks), getattr(m, "inplace", None))
        for name, m in network.named_modules()
    ]


def test_the_network_is_left_as_it_was_and_shares_nothing_with_what_is_returned():
    network = prepared(convolutional_with_norm())
    network[0].weight.grad = torch.ones_like(network[0].weight)
    before, state = facts(network), copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    found = maps_of(network, inputs((2, 6, 6)))
    assert torch.equal(torch.get_rng_state(), random)
    assert facts(network) == before
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert (network[0].weight.grad == 1).all()
    for m in found.values():
        assert facts(m.network) == before
        with torch.no_grad():
            for tensor in (*m.network.parameters(), *m.network.buffers()):
                tensor.zero_()
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))

    def forward(self, x):
        return self.body(x), x


def test_a_network_with_several_outputs_is_refused_and_left_as_it_was():
    network = prepared(TwoOutputs())
    before = facts(network)
    with pytest.raises(TypeError, match=r"`model` must return one tensor.*got tuple") as e:
        reparametrisations(network, inputs((6,)))
    assert "\n" not in str(e.value)
    assert facts(network) == before


def test_inputs_are_not_written_into_by_a_first_layer_that_works_in_place():
    network = prepared(
        nn.Sequential(
            nn.LeakyReLU(0.5, inplace=True), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)
        )
    )
    x = inputs((6,))
    before = x.clone()
    found = maps_of(network, x)
    assert torch.equal(x, before)
    assert found["layers"].layers == ("1",)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, a, b):
        return self.body(a + b)


@pytest.mark.parametrize("form", [tuple, list, lambda ab: dict(zip("ab", ab, strict=True))])
def test_several_inputs_come_in_a_tuple_a_list_or_a_dict(form):
    network, a, b = prepared(Sum()), inputs((6,)), inputs((6,), seed=8)
    found = maps_of(network, form((a, b)))
    assert found["layers"].layers == ("body.0", "body.2")
    with torch.no_grad():
        before, after = network(a, b), found["neurons"].network(a, b)
    torch.testing.assert_close(
        after, before, rtol=0, atol=1e-12 * float(before.abs().max())
    )


@pytest.mark.parametrize(
    ("build", "shape"),
    [(mlp, (6,)), (lambda: nn.Sequential(*convolutional()[:4]), (2, 10, 10))],
    ids=["linear", "convolution"],
)
def test_a_single_input_without_a_batch_is_no_trouble(build, shape):
    network, x = prepared(build()), inputs(shape, 1)[0]
    for found in reparametrisations(network, x):
        assert largest_change(network, found.network, 3 * inputs(shape, 9)) <= 1e-12


def test_a_network_of_zeros_has_no_drift():
    network = prepared(mlp())
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert all(found.drift == 0 for found in reparametrisations(network, inputs((6,))))


# -- what is left alone --------------------------------------------------------------


class Wired(nn.Module):
    """Three layers, connected as `how` says."""

    def __init__(self, how) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()
        self.how = how

    def forward(self, x):
        return self.how(self, x)


def wired(how):
    return lambda: Wired(how)


def between(*path):
    return lambda: nn.Sequential(nn.Linear(6, 6), *(p() for p in path), nn.Linear(6, 3))


def tied(bias: bool):
    network = nn.Sequential(
        nn.Linear(6, 6, bias), nn.ReLU(), nn.Linear(6, 6, bias), nn.Tanh(), nn.Linear(6, 3)
    )
    network[2].weight = network[0].weight
    return network


def shared():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 3))


def weight_normed():
    layers = [parametrizations.weight_norm(nn.Linear(6, n, bias=False)) for n in (6, 3)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def spectral_normed():
    layers = [nn.utils.spectral_norm(nn.Linear(6, n, bias=False)) for n in (6, 3)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


ALONE = {
    **{
        kind.__name__: (between(kind), (6,))
        for kind in (
            nn.Sigmoid,
            nn.Tanh,
            nn.GELU,
            nn.SiLU,
            nn.Softplus,
            nn.ELU,
            nn.ReLU6,
            nn.Hardtanh,
            nn.PReLU,
        )
    },
    "softmax": (between(lambda: nn.Softmax(-1)), (6,)),
    "LayerNorm": (between(lambda: nn.LayerNorm(6), nn.ReLU), (6,)),
    "plain LayerNorm": (between(lambda: nn.LayerNorm(6, elementwise_affine=False)), (6,)),
    "functional ReLU": (wired(lambda m, x: m.c(F.relu(m.a(x)))), (6,)),
    "written into": (wired(lambda m, x: m.c(torch.tanh_(m.a(x)))), (6,)),
    "residual": (
        wired(lambda m, x: m.c((h := m.act(m.a(x))) + torch.tanh(m.b(h)))),
        (6,),
    ),
    "residual in place": (wired(lambda m, x: m.c(m.a(x).add_(x))), (6,)),
    "two consumers": (wired(lambda m, x: m.c(h := m.act(m.a(x))) + m.b(h)[:, :3]), (6,)),
    "one activation for all": (
        wired(lambda m, x: m.c(m.act(m.b(m.act(m.a(x)))))),
        (6,),
    ),
    "looked at": (wired(lambda m, x: m.c(h := m.act(m.a(x))) * h.mean()), (6,)),
    "shared layer": (shared, (6,)),
    "tied": (lambda: tied(True), (6,)),
    "tied without bias": (lambda: tied(False), (6,)),
    "weight norm": (weight_normed, (6,)),
    "spectral norm": (spectral_normed, (6,)),
    "grouped consumer": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)),
        (2, 6, 6),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3)
        ),
        (2, 4, 4),
    ),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_no_map_applies_to_is_left_alone(case):
    build, shape = ALONE[case]
    network, x = prepared(build()), 3 * inputs(shape)
    assert maps_of(network, x) == {}


def transposed_before_norm(wide: int):
    return lambda: nn.Sequential(nn.ConvTranspose2d(wide, 4, 3), nn.BatchNorm2d(4))


MIXED = {
    "functional ReLU in place": (wired(lambda m, x: m.c(F.relu_(m.a(x)))), (6,)),
    "own activations": (wired(lambda m, x: m.c(m.act2(m.b(m.act(m.a(x)))))), (6,)),
    "out of order": (wired(lambda m, x: m.a(m.act(m.b(x)))[:, :3] + m.c(x)), (6,)),
    "transposed before a norm": (transposed_before_norm(2), (2, 4, 4)),
    "transposed square before a norm": (transposed_before_norm(4), (4, 4, 4)),
    "norm over another dimension": (
        lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(3)),
        (3, 6),
    ),
    "norm over another dimension, square": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
        (3, 6),
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_whatever_is_done_keeps_the_function(case):
    build, shape = MIXED[case]
    network = prepared(build())
    for found in reparametrisations(network, inputs(shape)):
        assert largest_change(network, found.network, 3 * inputs(shape, 50)) <= 1e-12
        scaled = {f"{layer}.weight" for layer in found.layers}
        assert scaled <= changed_parameters(network, found.network)


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.Hardtanh, nn.Hardshrink])
def test_what_bends_only_beyond_the_inputs_of_the_search_is_left_alone(kind):
    network = prepared(between(kind)())
    with torch.no_grad():
        network[0].bias.zero_()
    for found in reparametrisations(network, 1e-3 * inputs((6,))):
        assert largest_change(network, found.network, 10 * inputs((6,), 50)) <= 1e-12
