"""What differs on Apple's GPUs, which have no float64. Elsewhere all of it skips."""

import pytest
import torch
from helpers.problems import assert_near, directions, tiny_mlp

import sharpness as sh

pytestmark = pytest.mark.skipif(
    not torch.backends.mps.is_available(), reason="needs an MPS device"
)
FEW = 1e4 * torch.finfo(torch.float32).eps


def test_products_are_those_of_the_cpu():
    problem = tiny_mlp(dtype=torch.float32)
    v = directions(1, 44)[0].float()
    found = problem.risk(device="mps", chunk_size=7).hvp(v)
    assert_near(found.cpu(), problem.risk().hvp(v), FEW)


def test_eigenvalues_are_those_of_the_cpu_within_their_bounds():
    problem = tiny_mlp(dtype=torch.float32)
    found = sh.eigenpairs(problem.risk(device="mps"), k=2)
    expected = sh.eigenpairs(problem.risk(), k=2, tol=1e-4)
    distance = (found.eigenvalues.cpu() - expected.eigenvalues).abs()
    assert (distance <= found.error_bounds + expected.error_bounds).all()


def test_phi_is_that_of_the_cpu():
    problem = tiny_mlp(dtype=torch.float32)
    found, expected = (
        sh.epsilon_sharpness(problem.risk(device=device), 1e-2, solver="ascent").phi
        for device in ("mps", "cpu")
    )
    assert found == pytest.approx(expected, rel=1e-3)
