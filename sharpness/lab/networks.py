"""The networks of the papers and two small ones for other data, by name.

F1, F2, C1–C4 are those of Keskar et al. (2017, Table 1 and App. B); AlexNet and the
ResNets those of Masters & Luschi (2018); WRN-16-4 that of Smith et al. (2018). GPT and
MLP stand for language models and for regression, at a size that a CPU trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sharpness import _tensors
from sharpness._arguments import ensure, explained, known, require
from sharpness.lab.named import parsed

# -- the networks of Keskar et al. -------------------------------------------------------


def f1(in_features: int = 784, num_classes: int = 10) -> nn.Module:
    """F1: five hidden layers of 512, BatchNorm and ReLU after each.

    1 462 794 parameters on 28x28 images and 10 classes (Keskar et al. 2017, App. B.1).
    """
    return _fully_connected([in_features, *[512] * 5, num_classes], _activated)


def f2(in_features: int = 360, num_classes: int = 1973) -> nn.Module:
    """F2: seven hidden layers of 512, BatchNorm and ReLU after each.

    2 780 085 parameters on TIMIT's 360 features and 1973 classes (Keskar et al. 2017,
    App. B.2).
    """
    return _fully_connected([in_features, *[512] * 7, num_classes], _activated)


def c1(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """C1: two 5x5 convolutions and two dense layers, BatchNorm everywhere, dropout 0.5.

    1 757 834 parameters on 32x32 colour images and 10 classes; C3 is C1 with 100 classes
    (1 775 204). As in the authors' code (convolutions of stride 1, overlapping pools of
    stride 2); the text of Keskar et al. 2017, App. B.3 gives stride 2 to the convolutions
    instead.
    """
    side = -(-image_size // 4)
    return nn.Sequential(
        *_activated(_convolution(in_channels, 64, 5)),
        _SamePool(),
        *_activated(_convolution(64, 64, 5)),
        _SamePool(),
        nn.Flatten(),
        *_activated(nn.Linear(64 * side * side, 384)),
        nn.Dropout(0.5),
        *_activated(nn.Linear(384, 192)),
        nn.Dropout(0.5),
        nn.Linear(192, num_classes),
    )


def c2(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """C2: thirteen 3x3 convolutions and a dense layer of 512, in the manner of VGG.

    14 991 946 parameters on 32x32 colour images and 10 classes; C4 is C2 with 100 classes
    (15 038 116). As in the authors' code, with dropout between the convolutions of a
    block; the text of Keskar et al. 2017, App. B.4 does not list it. Pools of 2x2 round
    odd sizes up.
    """
    layers: list[nn.Module] = []
    wide = in_channels
    blocks = [(64, 2, 0.3), (128, 2, 0.4), (256, 3, 0.4), (512, 3, 0.4), (512, 3, 0.4)]
    for narrow, num_convolutions, rate in blocks:
        for _ in range(num_convolutions):
            layers += [*_activated(_convolution(wide, narrow)), nn.Dropout(rate)]
            wide = narrow
        layers[-1] = nn.MaxPool2d(2, ceil_mode=True)  # a block ends in this, not dropout
    side = -(-image_size // 32)
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Dropout(0.5),
        *_activated(nn.Linear(512 * side * side, 512)),
        nn.Dropout(0.5),
        nn.Linear(512, num_classes),
    )


# -- of Masters & Luschi, and of Smith et al. --------------------------------------------


def alexnet(
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    batchnorm: Literal["all", "convolutions", False] = "all",
) -> nn.Module:
    """The reduced AlexNet of Masters & Luschi (2018), arXiv:1804.07612.

    Convolutions of stride 1 with kernels 5, 3, 3, 3, 3 and 16, 48, 96, 64, 64 channels,
    3x3 pools of stride 2, dense layers of 256. 474 394 parameters on 32x32 colour images
    and 10 classes. The paper leaves open, and we chose: pools after the first, second and
    fifth convolution and two dense layers, both as in Krizhevsky et al. (2012); padding
    as TensorFlow's "same"; biases in every variant; no dropout.

    Args:
        in_channels: of the images.
        image_size: height and width of the images, in pixels.
        num_classes: number of outputs.
        batchnorm: where it stands between a layer and its ReLU: after "all" hidden
            layers, after "convolutions" only, or nowhere (False); the paper tries each.
    """
    _check_batchnorm(batchnorm, ("all", "convolutions", False))

    def convolution(wide: int, narrow: int, size: int = 3) -> list[nn.Module]:
        return _activated(_convolution(wide, narrow, size), bool(batchnorm))

    def dense(wide: int, narrow: int) -> list[nn.Module]:
        return _activated(nn.Linear(wide, narrow), batchnorm == "all")

    side = -(-image_size // 8)
    return nn.Sequential(
        *convolution(in_channels, 16, 5),
        _SamePool(),
        *convolution(16, 48),
        _SamePool(),
        *convolution(48, 96),
        *convolution(96, 64),
        *convolution(64, 64),
        _SamePool(),
        nn.Flatten(),
        *dense(64 * side * side, 256),
        *dense(256, 256),
        nn.Linear(256, num_classes),
    )


def resnet(
    num_blocks: int, in_channels: int = 3, num_classes: int = 10, batchnorm: bool = True
) -> nn.Module:
    """ResNet-8, -20 or -32: three stages of 1, 3 or 5 residual blocks.

    The network for CIFAR of He et al. (2016), arXiv:1512.03385, Section 4.2: 16, 32 and
    64 channels, shortcuts without parameters (type A). ResNet-20 has 269 722 parameters
    on 10 classes. The channels that a shortcut lacks are zeros after those it has, an
    order the paper leaves open. Images of any size.

    Args:
        num_blocks: residual blocks in each stage.
        in_channels: of the images.
        num_classes: number of outputs.
        batchnorm: False leaves it out; the convolutions then have biases.
    """
    _check_batchnorm(batchnorm, (True, False))

    def convolution(wide: int, narrow: int, stride: int = 1) -> list[nn.Module]:
        layer = _convolution(wide, narrow, stride=stride, bias=not batchnorm)
        return _activated(layer, batchnorm)

    def block(wide: int, narrow: int) -> nn.Module:
        stride = narrow // wide  # twice the channels, half the size
        body = [*convolution(wide, narrow, stride), *convolution(narrow, narrow)[:-1]]
        shortcut = nn.Identity() if stride == 1 else _PaddedShortcut(stride, narrow - wide)
        return nn.Sequential(_Sum(shortcut, nn.Sequential(*body)), nn.ReLU())

    widths = [16, *[16] * num_blocks, *[32] * num_blocks, *[64] * num_blocks]
    return nn.Sequential(
        *convolution(in_channels, 16),
        *(block(wide, narrow) for wide, narrow in pairwise(widths)),
        *_pooled_classes(64, num_classes),
    )


def wide_resnet(in_channels: int = 3, num_classes: int = 10) -> nn.Module:
    """WRN-16-4: sixteen layers, four times as wide as a ResNet for CIFAR.

    Zagoruyko & Komodakis (2016), arXiv:1605.07146, without dropout: BatchNorm and ReLU
    come before each convolution; where the number of channels changes, the shortcut is a
    1x1 convolution of the activated input. 2 748 890 parameters on colour images and 10
    classes. Images of any size.
    """

    def activation(channels: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(channels), nn.ReLU()]

    def block(wide: int, narrow: int) -> nn.Module:
        stride = 2 if narrow == 2 * wide else 1  # the first stage keeps the size
        first = _convolution(wide, narrow, stride=stride, bias=False)
        second = _convolution(narrow, narrow, bias=False)
        body = [*_activated(first), second]
        if wide == narrow:
            return _Sum(nn.Identity(), nn.Sequential(*activation(wide), *body))
        shortcut = _convolution(wide, narrow, 1, stride, bias=False)
        return nn.Sequential(*activation(wide), _Sum(shortcut, nn.Sequential(*body)))

    return nn.Sequential(
        _convolution(in_channels, 16, bias=False),
        *(block(*widths) for widths in pairwise([16, 64, 64, 128, 128, 256, 256])),
        *activation(256),
        *_pooled_classes(256, num_classes),
    )


# -- for tokens and for numbers ----------------------------------------------------------


def gpt(
    vocabulary: int, length: int, width: int = 64, depth: int = 2, heads: int = 4
) -> nn.Module:
    """A small decoder-only transformer: (B, T) tokens, int64, to scores (B, V, T).

    Scores of the next token have the classes second, so `nn.CrossEntropyLoss` takes
    targets (B, T) as they are. LayerNorm before attention and MLP (four times as wide,
    GELU) and before the head, as in GPT-2 (Radford et al. 2019); in contrast to it, the
    head shares no parameters with the embedding, and there is no dropout. It has
    V(2W + 1) + TW + depth (12 W^2 + 13 W) + 2W parameters, of width W.

    Args:
        vocabulary: V, number of different tokens.
        length: the largest T.
        width: of a token's vector.
        depth: number of blocks.
        heads: of the attention; must divide `width`.

    Raises:
        ValueError: `heads` does not divide `width`.
    """
    ensure(width % heads == 0, "heads", f"divide width={width}", str(heads))
    return _GPT(vocabulary, length, width, depth, heads)


def mlp(
    in_features: int = 4, out_features: int = 1, width: int = 32, depth: int = 2
) -> nn.Module:
    """A tanh network for regression: `depth` hidden layers of `width`."""
    sizes = [in_features, *[width] * depth, out_features]
    return _fully_connected(sizes, lambda layer: [layer, nn.Tanh()])


# -- what they are made of ---------------------------------------------------------------


def _fully_connected(
    sizes: list[int], activated: Callable[[nn.Linear], list[nn.Module]]
) -> nn.Module:
    """Dense layers between these sizes, all but the last of them activated."""
    *hidden, last = (nn.Linear(wide, narrow) for wide, narrow in pairwise(sizes))
    layers = [part for layer in hidden for part in activated(layer)]
    return nn.Sequential(nn.Flatten(), *layers, last)


def _convolution(
    wide: int, narrow: int, size: int = 3, stride: int = 1, bias: bool = True
) -> nn.Conv2d:
    return nn.Conv2d(wide, narrow, size, stride, padding=size // 2, bias=bias)


def _activated(layer: nn.Linear | nn.Conv2d, batchnorm: bool = True) -> list[nn.Module]:
    """A layer, BatchNorm where asked for, and ReLU."""
    if not batchnorm:
        return [layer, nn.ReLU()]
    if isinstance(layer, nn.Linear):
        return [layer, nn.BatchNorm1d(layer.out_features), nn.ReLU()]
    return [layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()]


def _pooled_classes(channels: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]


def _check_batchnorm(batchnorm: object, choices: tuple[object, ...]) -> None:
    require(
        batchnorm in choices,
        "batchnorm",
        f"be one of {', '.join(map(repr, choices))}",
        batchnorm,
    )


class _SamePool(nn.Module):
    """3x3 max pooling of stride 2 that pads as TensorFlow's "same" does: on the right."""

    def forward(self, x: Tensor) -> Tensor:
        pads = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in x.shape[-2:]]
        right, bottom = pads[1] - pads[1] // 2, pads[0] - pads[0] // 2
        padding = (pads[1] // 2, right, pads[0] // 2, bottom)
        return F.max_pool2d(F.pad(x, padding, value=float("-inf")), 3, 2)


class _Sum(nn.Module):
    """Adds the outputs of a shortcut and of a body for the same input."""

    def __init__(self, shortcut: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.shortcut, self.body = shortcut, body

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.shortcut(x), self.body(x))


class _PaddedShortcut(nn.Module):
    """Type A of He et al. (2016): every `stride`-th pixel, and channels of zeros."""

    def __init__(self, stride: int, added: int) -> None:
        super().__init__()
        self.stride, self.added = stride, added

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.added))


class _CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, W / heads)
            for part in self.queries_keys_values(x).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return cast(Tensor, self.mixed(seen.transpose(1, 2).flatten(2)))


class _GPT(nn.Module):
    def __init__(
        self, vocabulary: int, length: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()

        def added(*layers: nn.Module) -> nn.Module:
            return _Sum(nn.Identity(), nn.Sequential(nn.LayerNorm(width), *layers))

        def block() -> list[nn.Module]:
            wider = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
            return [added(_CausalAttention(width, heads)), added(*wider)]

        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(layer for _ in range(depth) for layer in block()))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.blocks(self.tokens(tokens) + self.positions(places))
        return torch.transpose(self.head(x), 1, 2)


# -- by name -----------------------------------------------------------------------------

_USUAL_START = "glorot_uniform"


@dataclass(frozen=True)
class Network:
    """Makes a network when called, and says how its weights start."""

    make: Callable[..., nn.Module]
    initialisation: str = _USUAL_START

    def __call__(self, *sizes: Any, **arguments: Any) -> nn.Module:
        """A network that `initialise` knows how to start.

        Raises:
            ValueError: a number that is not whole or below 1.
        """
        for name, value in arguments.items():
            wrong = isinstance(value, float) or (type(value) is int and value < 1)
            ensure(not wrong, name, "be a whole number of at least 1", str(value))
        model = self.make(*sizes, **arguments)
        model.initialisation = self.initialisation  # type: ignore[assignment]
        return model


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "F1": Network(f1),
    "F2": Network(f2),
    "C1": Network(c1),
    "C2": Network(c2),
    "C3": Network(partial(c1, num_classes=100)),
    "C4": Network(partial(c2, num_classes=100)),
    "AlexNet": Network(alexnet, "he_normal"),
    "ResNet-8": Network(partial(resnet, 1), "he_normal"),
    "ResNet-20": Network(partial(resnet, 3), "he_normal"),
    "ResNet-32": Network(partial(resnet, 5), "he_normal"),
    "WRN-16-4": Network(wide_resnet, "he_normal"),
    "GPT": Network(gpt, "normal_0.02"),
    "MLP": Network(mlp),
}


def build(network: dict[str, Any]) -> nn.Module:
    """A network from its name and arguments, as they stand in a checkpoint.

    Its weights are PyTorch's own, drawn from the global generator: see `initialise`.

    Raises:
        ValueError: no network of that name, or arguments it does not take.
    """
    name, arguments = network.get("name"), network.get("arguments", {})
    make = _named(name)
    contract, takes = f"have arguments that {name} takes", ", ".join(_arguments(make))
    with explained("network", contract, repr(arguments), f"It takes {takes}."):
        return make(**dict(arguments))


def _arguments(make: Callable[..., nn.Module]) -> list[str]:
    return list(signature(make.make if isinstance(make, Network) else make).parameters)


def _named(name: Any) -> Callable[..., nn.Module]:
    known("network", name, NETWORKS)
    return NETWORKS[name]


# -- fitted to data ----------------------------------------------------------------------

# What a network asks of the data, by the argument that tells it.
_ASKED = {
    "in_features": "samples of at least one dimension",
    "in_channels": "images (channels, height, width)",
    "image_size": "square images",
    "length": "sequences of tokens (length,)",
    "vocabulary": "classes as targets",
    "num_classes": "classes as targets",
    "out_features": "targets of one dimension",
}
_ONE_NUMBER = torch.Size([1])


def arguments_for(
    name: str,
    sample_shape: torch.Size,
    num_classes: int | None,
    targets_shape: torch.Size = _ONE_NUMBER,
) -> dict[str, Any]:
    """The arguments that fit a network to data.

    Args:
        name: of a network.
        sample_shape: of one sample: (C, H, W) for images, (d,) for feature vectors,
            (T,) for tokens, without the axis of the samples. F1, F2 and MLP take every
            shape and flatten it.
        num_classes: number of classes, for tokens the size of the vocabulary; None for
            targets that are numbers. The network has as many outputs.
        targets_shape: (k,) of one target, where targets are numbers.

    Raises:
        ValueError: no network of that name, or one that cannot take such data.
    """
    make, sizes = _named(name), _sizes(sample_shape, num_classes, targets_shape)
    if lacking := _lacking(make, sizes):
        fitting = [other for other in NETWORKS if not _lacking(NETWORKS[other], sizes)]
        targets = "numbers" if num_classes is None else f"{num_classes} classes"
        raise ValueError(
            f"`network` must fit samples of shape {tuple(sample_shape)} with {targets} as "
            f"targets; got {name}, which takes {_ASKED[lacking[0]]}. Those that fit: "
            f"{', '.join(fitting) or 'none'}."
        )
    return {asked: sizes[asked] for asked in _asked(make)}


def fitted(network: str, x: Tensor, y: Tensor, num_classes: int | None) -> dict[str, Any]:
    """A network's name and arguments as `build` takes them, where it is to fit data.

    Args:
        network: its name, with the arguments that are asked for.
        x: inputs of samples (N, ...).
        y: their targets.
        num_classes: as in `arguments_for`.

    Raises:
        ValueError: what `arguments_for` raises.
    """
    name, asked = parsed(network)
    fitting = arguments_for(name, x.shape[1:], num_classes, y.shape[1:])
    return {"name": name, "arguments": {**fitting, **asked}}


def _sizes(
    sample_shape: torch.Size, num_classes: int | None, targets_shape: torch.Size
) -> dict[str, int]:
    """Values for a network's arguments, as far as the data determine them."""
    sizes = {}
    if sample_shape:
        sizes["in_features"] = sample_shape.numel()
    match tuple(sample_shape):
        case (length,):
            sizes["length"] = length
        case (channels, height, width):
            sizes["in_channels"] = channels
            if height == width:
                sizes["image_size"] = height
    if num_classes is not None:
        sizes |= dict.fromkeys(("num_classes", "vocabulary", "out_features"), num_classes)
    elif len(targets_shape) == 1:
        sizes["out_features"] = targets_shape.numel()
    return sizes


def _asked(make: Callable[..., nn.Module]) -> list[str]:
    return [name for name in _arguments(make) if name in _ASKED]


def _lacking(make: Callable[..., nn.Module], sizes: dict[str, int]) -> list[str]:
    return [asked for asked in _asked(make) if asked not in sizes]


# -- where training starts ---------------------------------------------------------------

_DRAWS: dict[str, Callable[..., Tensor]] = {
    "glorot_uniform": nn.init.xavier_uniform_,
    "he_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "normal_0.02": partial(nn.init.normal_, std=0.02),
}


def initialisation_of(name: str) -> str:
    """The initialisation a network starts from by default.

    "glorot_uniform" for F1, F2, C1–C4 (Keras' default then) and MLP, "he_normal" for
    AlexNet and all ResNets (Masters & Luschi 2018), "normal_0.02" for GPT.

    Raises:
        ValueError: no network of that name.
    """
    return str(getattr(_named(name), "initialisation", _USUAL_START))


def initialise(model: nn.Module, seed: int, how: str | None = None) -> None:
    """Start weights afresh: the same bits for a seed, whatever was drawn before.

    Biases become 0, BatchNorm and LayerNorm the identity, running statistics as new. The
    global generator is neither used nor moved. Weights of linear layers, convolutions and
    embeddings are drawn on the CPU, layer by layer:

    - "glorot_uniform": uniform of variance 2 / (fan_in + fan_out) (Glorot & Bengio 2010);
    - "he_normal": normal of variance 2 / fan_in, the last layer's too (He et al. 2015,
      arXiv:1502.01852, Eq. 10);
    - "normal_0.02": normal of standard deviation 0.02, as in GPT-2, without its smaller
      start of the layers that end a block.

    Args:
        model: changed in place; on the CPU.
        seed: of the draws.
        how: one of these; None is the network's own for a model from `build` or
            `NETWORKS`, and "glorot_uniform" for any other.

    Raises:
        ValueError: an unknown `how`.
    """
    if how is None:
        how = str(getattr(model, "initialisation", _USUAL_START))
    known("how", how, _DRAWS)
    generator = _tensors.seeded(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm | nn.LayerNorm):
                module.reset_parameters()  # 1, 0 and fresh running averages
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                _DRAWS[how](module.weight, generator=generator)
                if isinstance(bias := getattr(module, "bias", None), Tensor):
                    nn.init.zeros_(bias)


def digest(model: nn.Module) -> str:
    """sha256 of the parameters, in order."""
    values = (parameter.detach().cpu().numpy() for parameter in model.parameters())
    return hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()
