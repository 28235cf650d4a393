import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sharpness import _tensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(torch.Size), min_size=1)


@given(shapes=SHAPES)
def test_splitting_a_flattened_list_gives_the_list_back(shapes):
    tensors = [torch.randn(shape) for shape in shapes]
    vector = _tensors.flatten(tensors)
    assert vector.shape == (sum(shape.numel() for shape in shapes),)
    pieces = _tensors.split(vector, shapes)
    assert [piece.shape for piece in pieces] == shapes
    assert all(torch.equal(a, b) for a, b in zip(pieces, tensors, strict=True))


def test_flattening_goes_row_by_row_in_the_given_order():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(5.0)
    assert _tensors.flatten([a.T, b]).tolist() == [1, 3, 2, 4, 5]


@pytest.mark.parametrize("num", [1, 2])
def test_a_flat_vector_is_a_copy(num):
    tensors = [torch.zeros(3) for _ in range(num)]
    _tensors.flatten(tensors).add_(1)
    assert all(torch.equal(t, torch.zeros(3)) for t in tensors)


def test_the_pieces_are_views_of_the_vector():
    vector = torch.zeros(4)
    _tensors.split(vector, [torch.Size([2, 2])])[0][1, 0] = 7
    assert vector.tolist() == [0, 0, 7, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot64_is_the_inner_product_summed_in_float64(dtype):
    a, b = torch.randn(2, 1000).to(dtype)
    exact = math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    dot = _tensors.dot64(a, b)
    assert dot.dtype == torch.float64
    assert dot.shape == ()
    # Products of two half-precision numbers are exact in float32.
    product = torch.float32 if dtype == torch.float32 else torch.float64
    scale = float((a.double() * b.double()).abs().sum())
    assert abs(float(dot) - exact) <= torch.finfo(product).eps * scale


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_dot64_keeps_what_a_sum_in_float32_would_lose(dtype):
    a = torch.tensor([2.0**27, 1.0, -(2.0**27)], dtype=dtype)
    assert float(a.float()[:2].sum()) == 2.0**27  # float32 has no room for the 1
    assert float(_tensors.dot64(a, torch.ones_like(a))) == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm64_does_not_overflow_the_type_of_the_vector(dtype):
    a = torch.full((300,), 300.0, dtype=dtype)
    # 300 * 300^2 is beyond float16
    assert float(_tensors.norm64(a)) == pytest.approx(300 * math.sqrt(300), rel=1e-15)


def test_the_empty_vector_has_norm_zero():
    assert float(_tensors.norm64(torch.empty(0))) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_random_unit_vector_has_length_one_to_the_type(dtype):
    like = torch.zeros(257, dtype=dtype)
    v = _tensors.random_unit(like, torch.Generator().manual_seed(0))
    assert v.dtype == dtype
    assert v.shape == (257,)
    assert abs(float(v.double().norm()) - 1) <= torch.finfo(dtype).eps


def test_a_seed_means_the_same_random_vector_in_every_type():
    double, single, half = (
        _tensors.random_unit(torch.zeros(50, dtype=d), torch.Generator().manual_seed(3))
        for d in (torch.float64, torch.float32, torch.bfloat16)
    )
    eps = torch.finfo(torch.float32).eps
    assert torch.allclose(double, single.double(), rtol=2 * eps, atol=0)
    eps = torch.finfo(torch.bfloat16).eps
    assert torch.allclose(double, half.double(), rtol=2 * eps, atol=0)
    other = torch.Generator().manual_seed(4)
    assert not torch.equal(single, _tensors.random_unit(single, other))


def test_a_random_unit_vector_prefers_no_direction():
    n = 100_000
    v = _tensors.random_unit(torch.zeros(n), torch.Generator().manual_seed(0)).double()
    # Entries of a uniform unit vector are normal: mean 0, kurtosis 3, 4 standard errors.
    assert abs(float(v.sum())) < 4
    assert abs(float(n * (v**4).sum()) - 3) < 4 * math.sqrt(24 / n)


def test_a_random_vector_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    _tensors.random_unit(torch.zeros(5), torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
