import math
from itertools import product

import numpy as np
import pytest
import torch

from sharpness.lab.augment import AUGMENTATIONS, CROP_FLIP, KESKAR, Augmentation

SHAPES = [(6, 3, 8, 8), (5, 1, 6, 9)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(shape=(6, 3, 8, 8), dtype=torch.float64):
    return torch.rand(shape, generator=generator(7), dtype=torch.float64).to(dtype)


def draws(count):
    """Flips, angles and shifts from seed 0 as documented, uniform in [0, 1)."""
    rng = generator()
    shapes = [(count,), (count,), (count, 2)]
    return [torch.rand(shape, generator=rng).double().numpy() for shape in shapes]


def bilinear(image, row, column):
    """The value between the pixels (H, W) of an image in a sea of zeros."""
    value, above, left = 0.0, math.floor(row), math.floor(column)
    for r, c in product((above, above + 1), (left, left + 1)):
        if 0 <= r < image.shape[0] and 0 <= c < image.shape[1]:
            value += image[r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return value


def turned(image, angle, right, down):
    """Each pixel about the centre, in pixels: where it came from, by a plain loop."""
    height, width = image.shape
    out = np.empty_like(image)
    for r, c in product(range(height), range(width)):
        y, x = r - (height - 1) / 2, c - (width - 1) / 2
        from_x = math.cos(angle) * x - math.sin(angle) * y + right * width
        from_y = math.sin(angle) * x + math.cos(angle) * y + down * height
        out[r, c] = bilinear(image, from_y + (height - 1) / 2, from_x + (width - 1) / 2)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("degrees", [0.0, 10.0, 180.0])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_turns_and_shifts_are_those_of_a_plain_loop(shape, degrees, share):
    x = images(shape)
    out = Augmentation(flip=True, rotation=degrees, translation=share)(x, generator())
    flip, angle, shift = draws(shape[0])
    for i, channel in product(range(shape[0]), range(shape[1])):
        image = x[i, channel].numpy()
        expected = turned(
            image[:, ::-1] if flip[i] < 0.5 else image,
            math.radians(degrees) * (2 * angle[i] - 1),
            *(share * (2 * shift[i] - 1)),
        )
        # Angles and shifts are drawn and scaled in single precision.
        np.testing.assert_allclose(out[i, channel], expected, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pad", [1, 4, 9])
def test_a_crop_is_a_slice_of_the_padded_image(shape, pad):
    x = images(shape)
    out = Augmentation(crop=pad)(x, generator())
    _, _, height, width = shape
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    for i in range(shape[0]):
        found = [
            (top, left)
            for top, left in product(range(2 * pad + 1), repeat=2)
            if np.array_equal(padded[i, :, top : top + height, left : left + width], out[i])
        ]
        assert found


def test_every_crop_is_as_likely():
    x = torch.zeros(2000, 1, 5, 5)
    x[:, :, 2, 2] = 1
    out = Augmentation(crop=1)(x, generator())
    counts = out.sum((0, 1))
    assert counts.sum() == 2000
    inner = counts[1:4, 1:4]
    assert inner.sum() == 2000
    error = (2000 * 8 / 81) ** 0.5  # of a count with probability 1/9
    assert (inner - 2000 / 9).abs().max() < 4 * error


def test_half_of_the_images_are_flipped():
    x = images((2000, 2, 3, 4))
    out = Augmentation(flip=True)(x, generator())
    same = (out == x).flatten(1).all(1)
    flipped = (out == x.flip(3)).flatten(1).all(1)
    assert bool((same ^ flipped).all())
    assert abs(int(flipped.sum()) - 1000) < 4 * math.sqrt(500)


def test_angles_and_shifts_are_uniform():
    """A bright pixel tells where its image went."""
    count, size = 4000, 41
    x = torch.zeros(count, 1, size, size)
    x[:, :, 10, 30] = 1.0
    middle = (size - 1) / 2
    grid = torch.arange(size) - middle
    for augmentation, half_width in (
        (Augmentation(translation=0.2), 0.2 * size),
        (Augmentation(rotation=20), 20.0),
    ):
        out = augmentation(x, generator())[:, 0]
        weight = out.sum((1, 2))
        down = (out.sum(2) * grid).sum(1) / weight
        right = (out.sum(1) * grid).sum(1) / weight
        if augmentation.rotation:
            moves = [torch.rad2deg(torch.atan2(down, right)) + 45]
        else:
            moves = [down + 10, right - 10]
        for move in moves:
            assert move.abs().max() < half_width * 1.02  # bilinear
            assert abs(move.mean()) < 4 * half_width / math.sqrt(3 * count)
            # The variance of a uniform distribution is known to sqrt(4 / 5 / count).
            spread = move.var() * 3 / half_width**2
            assert abs(spread - 1) < 4 * math.sqrt(0.8 / count) + 0.01


@pytest.mark.parametrize("augmentation", [KESKAR, CROP_FLIP])
def test_a_seed_means_the_same_images(augmentation):
    x = images()
    first, again, other = (augmentation(x, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(augmentation(x), first)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    augmentation(x, generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_switched_off_draws_nothing():
    x, rng = images(), generator()
    Augmentation(flip=True)(x, rng)
    Augmentation(crop=2)(x, rng)
    after = generator()
    torch.rand(len(x), generator=after)
    torch.rand(len(x), 2, generator=after)
    assert torch.equal(rng.get_state(), after.get_state())


def test_an_augmentation_of_nothing_returns_the_images_themselves():
    x = images()
    assert Augmentation()(x) is x
    assert AUGMENTATIONS["none"]() is None


@pytest.mark.parametrize("augmentation", [KESKAR, CROP_FLIP, Augmentation(flip=True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_type_and_layout_stay_and_the_images_too(augmentation, dtype, layout):
    x = images(dtype=dtype).contiguous(memory_format=layout)
    before = x.clone()
    out = augmentation(x, generator())
    assert torch.equal(x, before)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    assert out.is_contiguous(memory_format=layout)
    assert out.stride() == x.stride()
    exact = augmentation(x.double().contiguous(), generator())
    tolerance = {torch.float64: 0, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=0)


def test_an_empty_batch_stays_empty():
    x = images((0, 3, 8, 8))
    assert KESKAR(x).shape == CROP_FLIP(x).shape == x.shape


def test_the_presets_are_those_of_the_papers():
    assert AUGMENTATIONS["keskar"]() == KESKAR
    assert Augmentation(flip=True, rotation=10, translation=0.2) == KESKAR
    assert AUGMENTATIONS["crop-flip"]() == CROP_FLIP == Augmentation(flip=True, crop=4)
    assert AUGMENTATIONS["crop-flip"](crop=2) == Augmentation(flip=True, crop=2)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ({"crop": -1}, "`crop` must .* got -1"),
        ({"crop": 1.5}, "`crop` must .* got 1.5"),
        ({"rotation": -1}, r"`rotation` must lie in \[0, 180\] degrees; got -1"),
        ({"rotation": 181}, "got 181"),
        ({"rotation": math.nan}, "got nan"),
        ({"translation": -0.1}, r"`translation` must lie in \[0, 1\).*; got -0.1"),
        ({"translation": 4}, "got 4"),
    ],
)
def test_what_is_out_of_range_is_refused(wrong, got):
    with pytest.raises(ValueError, match=got) as caught:
        Augmentation(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 360), torch.zeros(4, 1, 2, 2, dtype=torch.uint8)]
)
def test_what_is_no_batch_of_images_is_refused(x):
    for augmentation in (KESKAR, Augmentation()):
        with pytest.raises(ValueError, match=r"`x` must be images .* got shape \(4,"):
            augmentation(x)
